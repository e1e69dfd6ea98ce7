"""HydraLoRA (Tian et al. 2024, arXiv:2404.19245): Δy = s Σ_j ω_j(x) B_j A x with ω(x) = softmax(G x) per token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kshot.adapters.base import RankAdapter, kaiming_uniform
from kshot.errors import UserError
from kshot.slots import AdapterLayer, Slot


@dataclass(frozen=True)
class HydraLoRA(RankAdapter):
    """Low-rank adaptation with one A and several heads B, which a router mixes for every token.

    No weight expresses it, so it is never merged: evaluation costs what the adapter costs.

    Args:
        heads: N, each of the rank. With one head it is LoRA.
    """

    rate: ClassVar[float] = 4e-3
    rate_width: ClassVar[int | None] = 192

    heads: int = 3

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require("heads", self.heads >= 1, "be at least 1")
        self.require("wise_alpha", self.wise_alpha == 1, "be 1: no weight lies between the frozen one and this change")

    def wrap(self, slot: Slot, shared: Any) -> HydraLoRALayer:  # noqa: ARG002  shares nothing
        return HydraLoRALayer(slot, self.rank, self.heads, self.scale)


class HydraLoRALayer(AdapterLayer):
    """``y + s Σ_j ω_j(x) B_j A drop(x)``; A and the router G start Kaiming-uniform, every B_j at zero.

    The sum over heads is one product: u = ω ⊗ h, all N·r numbers of a token, times [B_1 … B_N]ᵀ.
    """

    mergeable = False
    paths = ("factorised",)
    undecayed = frozenset({"G"})  # a router at zero mixes evenly, which is not what "no change" means

    def __init__(self, slot: Slot, rank: int, heads: int, scale: float) -> None:
        super().__init__(slot)
        self.scale = scale
        self.A = nn.Parameter(kaiming_uniform(slot.name, rank, slot.in_features))
        self.B = nn.Parameter(torch.zeros(heads, slot.out_features, rank))
        self.G = nn.Parameter(kaiming_uniform(f"{slot.name}.G", heads, slot.in_features))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        x = x.reshape(-1, x.shape[-1])
        a, g = self.A.to(x.dtype), self.G.to(x.dtype)
        if self.dropping:  # the router sees every input, A what dropout leaves
            h, logits = F.linear(self.dropped(x), a), F.linear(x, g)
        else:
            h, logits = F.linear(x, torch.cat([a, g])).split([len(a), len(g)], dim=1)
        omega = logits.softmax(1, dtype=torch.promote_types(logits.dtype, torch.float32))  # (T, N)
        u = (omega[:, :, None] * h[:, None, :]).flatten(1).to(y.dtype)  # (T, N·r)
        up = self.B.mT.flatten(0, 1).to(y.dtype)  # (N·r, out)
        return torch.addmm(y.reshape(-1, y.shape[-1]), u, up, alpha=self.scale).view(y.shape)

    def effective_weight(self) -> NoReturn:
        raise UserError(f"HydraLoRA on {self.slot.name} depends on its input: no weight expresses it.")
