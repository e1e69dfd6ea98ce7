"""DoRA (Liu et al. 2024, arXiv:2402.09353): W' = (m / ‖V‖) ⊙ V row by row, with V = W + s B A."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from kshot.adapters.lora import LoRA, LoRALayer
from kshot.slots import Slot

SHORTEST = 1e-6  # of ‖V‖² beside ‖W‖²: below, float32 leaves nothing but rounding of the sum that gives it


@dataclass(frozen=True)
class DoRA(LoRA):
    """Weight-decomposed low-rank adaptation: LoRA turns the rows of the weight, and m alone says how long they are.

    The settings are LoRA's. The paper takes alpha = 2 rank.
    """

    rate: ClassVar[float] = 5e-4

    def wrap(self, slot: Slot, shared: Any) -> DoRALayer:  # noqa: ARG002  shares nothing
        return DoRALayer(slot, self.rank, self.scale)


class DoRALayer(LoRALayer):
    """``c ⊙ (x Wᵀ + (x Aᵀ) (s B)ᵀ) + b`` with c = m / ‖V‖, (out,); m starts at ‖W‖, so that c is exactly 1.

    ‖V‖ is a constant to the gradients, as in section 4.3 of the paper: dB = s (c ⊙ G) Aᵀ, dA = s Bᵀ (c ⊙ G) and
    dm_k = ⟨G_k, V_k⟩ / ‖V_k‖ for the gradient G of the weight.
    """

    undecayed: ClassVar[frozenset[str]] = frozenset({"m"})

    def __init__(self, slot: Slot, rank: int, scale: float) -> None:
        super().__init__(slot, rank, scale)
        self.m = nn.Parameter(lengths(slot.weight).to(self.A.dtype))

    def norm(self) -> Tensor:
        """‖V_k‖ of each row, (out,), without gradient: ‖V_k‖² = ‖W_k‖² + 2s ⟨W Aᵀ, B⟩_k + s² ⟨B A Aᵀ, B⟩_k.

        No (out, in) matrix is formed.
        """
        weight = self.slot.weight
        with torch.no_grad(), torch.autocast(weight.device.type, enabled=False):
            frozen = lengths(weight).square()
            a, b = self.A.to(frozen.dtype), self.B.to(frozen.dtype)
            crossed = ((weight.to(frozen.dtype) @ a.T) * b).sum(1)
            squared = ((b @ (a @ a.T)) * b).sum(1)
            total = frozen + 2 * self.scale * crossed + self.scale**2 * squared
            return torch.maximum(total, SHORTEST * frozen).sqrt()

    def effective_weight(self) -> Tensor:
        return (self.m / self.norm())[:, None] * super().effective_weight()

    def finish(self, x: Tensor, y: Tensor) -> Tensor:  # noqa: ARG002  the output is enough
        """C ⊙ (y - b) + b, for y = x Vᵀ + b, (..., out)."""
        c, bias = self.m / self.norm(), self.slot.bias
        if torch.compiler.is_compiling():
            return (c * y if bias is None else c * y + (1 - c) * bias).to(y.dtype)
        scaled: Tensor = ScaledRows.apply(y, c, bias)
        return scaled

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """With dropout, y + (c - 1) ⊙ (x̃ Wᵀ) + c ⊙ (s x̃ Aᵀ Bᵀ): all of the change sees the dropped input x̃."""
        if not self.dropping:
            return super().forward(x, y)
        x, c = self.dropped(x), self.m / self.norm()
        low_rank = F.linear(F.linear(x, self.A.to(x.dtype)), (self.scale * self.B).to(x.dtype))
        return (y + (c - 1) * F.linear(x, self.slot.weight.to(x.dtype)) + c * low_rank).to(y.dtype)


def lengths(weight: Tensor) -> Tensor:
    """‖W_k‖ of each row, (out,), in at least float32; rows of zeros, which have no direction, count as 1e-6 long."""
    exact = weight.detach().to(torch.promote_types(weight.dtype, torch.float32))
    found: Tensor = torch.linalg.vector_norm(exact, dim=1)
    return found.clamp(min=1e-6)


class ScaledRows(torch.autograd.Function):
    """``c ⊙ (y - b) + b`` for y, (..., out), keeping y alone; y may be of lower precision than c and b, (out,)."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, c: Tensor, bias: Tensor | None) -> Tensor:
        """Returns a tensor like y."""
        ctx.save_for_backward(y, c, bias)
        if bias is None:
            return torch.mul(y, c, out=torch.empty_like(y))
        return torch.addcmul((1 - c) * bias, y, c, out=torch.empty_like(y))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        """Gradients of y and c: c ⊙ g, and Σ g ⊙ (y - b) over tokens, summed in the precision of c."""
        y, c, bias = ctx.saved_tensors
        g = gradient.reshape(-1, len(c))
        dy = torch.empty_like(g)
        dc = torch.mul(g, y.reshape(g.shape), out=dy).sum(0, dtype=c.dtype)  # its room is free until dy is written
        if bias is not None:
            dc -= bias * g.sum(0, dtype=c.dtype)
        return torch.mul(g, c, out=dy).view(gradient.shape), dc, None
