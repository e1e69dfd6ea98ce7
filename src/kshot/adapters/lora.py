"""LoRA (Hu et al. 2021, arXiv:2106.09685): ΔW = s B A with A (r, in) and B (out, r)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kshot.adapters.base import SlotAdapter, generator_for
from kshot.errors import UserError
from kshot.slots import AdapterLayer, Slot


@dataclass(frozen=True)
class LoRA(SlotAdapter):
    """Low-rank adaptation.

    Args:
        rank: r.
        alpha: the scale is s = alpha / rank; None takes alpha = rank, so s = 1.
        dropout: probability on the input of the low-rank path, in training.
        rank_stabilised: s = alpha / √rank (rsLoRA, arXiv:2312.03732), as CLIP-LoRA uses.

    Raises:
        UserError: a rank below 1, a scale that is not a positive number, a dropout outside [0, 1).
    """

    rank: int = 8
    alpha: float | None = None
    dropout: float = 0.0
    rank_stabilised: bool = False

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise UserError(f"LoRA: rank is {self.rank}, and must be at least 1.")
        if not (math.isfinite(self.scale) and self.scale > 0):
            raise UserError(f"LoRA: alpha is {self.alpha}, and must be a positive number.")
        if not 0 <= self.dropout < 1:
            raise UserError(f"LoRA: dropout is {self.dropout}, and must lie in [0, 1).")

    @property
    def scale(self) -> float:
        """The factor s."""
        alpha = self.rank if self.alpha is None else self.alpha
        return alpha / (math.sqrt(self.rank) if self.rank_stabilised else self.rank)

    def wrap(self, slot: Slot, shared: nn.Module | None) -> LoRALayer:  # noqa: ARG002  shares nothing
        smaller = min(slot.in_features, slot.out_features)
        if self.rank > smaller:
            raise UserError(
                f"LoRA: rank {self.rank} is larger than the smaller side, {smaller}, of the slot {slot.name}."
            )
        return LoRALayer(slot, self)


class LoRALayer(AdapterLayer):
    """``y + s (drop(x) Aᵀ) Bᵀ``; A starts Kaiming-uniform, B at zero, so that step 0 changes nothing."""

    def __init__(self, slot: Slot, settings: LoRA) -> None:
        super().__init__(slot)
        self.scale, self.dropout = settings.scale, settings.dropout
        bound = 1 / math.sqrt(slot.in_features)
        a = torch.rand(settings.rank, slot.in_features, generator=generator_for(slot.name)) * 2 * bound - bound
        self.A = nn.Parameter(a)
        self.B = nn.Parameter(torch.zeros(slot.out_features, settings.rank))

    def effective_weight(self) -> Tensor:
        return self.slot.weight + self.scale * (self.B @ self.A)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        down = F.linear(F.dropout(x, self.dropout, self.training), self.A)
        return y + F.linear(down, self.B * self.scale)
