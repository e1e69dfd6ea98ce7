"""LoRA (Hu et al. 2021, arXiv:2106.09685): ΔW = s B A with A (r, in) and B (out, r)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import nn

from kshot.adapters.base import SlotAdapter, kaiming_uniform, require_rank
from kshot.layers import LowRankLayer
from kshot.products import Factors
from kshot.slots import Slot


@dataclass(frozen=True)
class LoRA(SlotAdapter):
    """Low-rank adaptation.

    Args:
        rank: r.
        alpha: the scale is s = alpha / rank; None takes alpha = rank, so s = 1.
        rank_stabilised: s = alpha / √rank (rsLoRA, arXiv:2312.03732), as CLIP-LoRA uses.

    Raises:
        UserError: a rank below 1, a scale that is not a positive number, a dropout outside [0, 1).
    """

    rank: int = 8
    alpha: float | None = None
    rank_stabilised: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require("rank", self.rank >= 1, "be at least 1")
        self.require("alpha", math.isfinite(self.scale) and self.scale > 0, "be a positive number")

    @property
    def scale(self) -> float:
        """The factor s."""
        alpha = self.rank if self.alpha is None else self.alpha
        return alpha / (math.sqrt(self.rank) if self.rank_stabilised else self.rank)

    def wrap(self, slot: Slot, shared: None) -> LoRALayer:  # noqa: ARG002  shares nothing
        require_rank(type(self).__name__, self.rank, slot)
        return LoRALayer(slot, self.rank, self.scale)


class LoRALayer(LowRankLayer):
    """``y + (drop(x) Aᵀ) (s B)ᵀ``; A starts Kaiming-uniform, B at zero, so that step 0 changes nothing."""

    def __init__(self, slot: Slot, rank: int, scale: float) -> None:
        super().__init__(slot)
        self.scale = scale
        self.A = nn.Parameter(kaiming_uniform(slot.name, rank, slot.in_features))
        self.B = nn.Parameter(torch.zeros(slot.out_features, rank))

    def factors(self) -> list[Factors]:
        return [Factors(self.scale * self.B, self.A)]
