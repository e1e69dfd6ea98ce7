"""DoRA (Liu et al. 2024, arXiv:2402.09353): W' = (m / ‖V‖) ⊙ V row by row, with V = W + s B A."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from kshot.adapters.base import require_rank
from kshot.adapters.lora import LoRA, LoRALayer
from kshot.memo import Memo
from kshot.slots import Slot

SHORTEST = 1e-6  # of ‖V‖² beside ‖W‖²: below, float32 leaves nothing but rounding of the sum that gives it


@dataclass(frozen=True)
class DoRA(LoRA):
    """Weight-decomposed low-rank adaptation: LoRA turns the rows of the weight, and m alone says how long they are.

    The settings are LoRA's. The paper takes alpha = 2 rank.
    """

    def wrap(self, slot: Slot, shared: None) -> DoRALayer:  # noqa: ARG002  shares nothing
        require_rank(type(self).__name__, self.rank, slot)
        return DoRALayer(slot, self.rank, self.scale)


class DoRALayer(LoRALayer):
    """``c ⊙ (x Wᵀ + (x Aᵀ) (s B)ᵀ) + b`` with c = m / ‖V‖, (out,); m starts at ‖W‖, so that c is exactly 1.

    ‖V‖ is a constant to the gradients, as in section 4.3 of the paper: dB = s (c ⊙ G) Aᵀ, dA = s Bᵀ (c ⊙ G) and
    dm_k = ⟨G_k, V_k⟩ / ‖V_k‖ for the gradient G of the weight.
    """

    undecayed: ClassVar[frozenset[str]] = frozenset({"m"})
    frozen_squared: Tensor

    def __init__(self, slot: Slot, rank: int, scale: float) -> None:
        super().__init__(slot, rank, scale)
        squared = slot.weight.to(self.A.dtype).square().sum(1).clamp(min=1e-12)  # rows of zeros have no direction
        self.register_buffer("frozen_squared", squared, persistent=False)
        self.m = nn.Parameter(squared.sqrt())
        self._norm: Memo[Tensor] = Memo()

    def norm(self) -> Tensor:
        """‖V_k‖ of each row, (out,), without gradient; once per optimizer step."""
        if torch.compiler.is_compiling():
            return self.measured_norm()
        return self._norm.get([self.slot.projection.frozen_weight, self.A, self.B], self.measured_norm)

    @torch.no_grad()
    def measured_norm(self) -> Tensor:
        """‖V_k‖² = ‖W_k‖² + 2s ⟨W Aᵀ, B⟩_k + s² ⟨B A Aᵀ, B⟩_k: no (out, in) matrix is formed."""
        with torch.autocast(self.A.device.type, enabled=False):
            weight = self.slot.weight.to(self.A.dtype)
            crossed = ((weight @ self.A.T) * self.B).sum(1)
            squared = ((self.B @ (self.A @ self.A.T)) * self.B).sum(1)
            total = self.frozen_squared + 2 * self.scale * crossed + self.scale**2 * squared
            return torch.maximum(total, SHORTEST * self.frozen_squared).sqrt()

    def effective_weight(self) -> Tensor:
        return (self.m / self.norm())[:, None] * super().effective_weight()

    def finish(self, y: Tensor) -> Tensor:
        """C ⊙ (y - b) + b, for y = x Vᵀ + b, (..., out)."""
        c, bias = self.m / self.norm(), self.slot.bias
        if torch.compiler.is_compiling():
            return (c * y if bias is None else c * y + (1 - c) * bias).to(y.dtype)
        scaled: Tensor = ScaledRows.apply(y, c, bias)
        return scaled

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """With dropout, y + (c - 1) ⊙ (x̃ Wᵀ) + c ⊙ (s x̃ Aᵀ Bᵀ): all of the change sees the dropped input x̃."""
        if not self.training or self.dropout == 0:
            return super().forward(x, y)
        x, c = self.dropped(x), self.m / self.norm()
        low_rank = F.linear(F.linear(x, self.A), self.scale * self.B)
        return (y + (c - 1) * F.linear(x, self.slot.weight) + c * low_rank).to(y.dtype)


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
