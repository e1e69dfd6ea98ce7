"""LoRA (Hu et al. 2021, arXiv:2106.09685): ΔW = s B A with A (r, in) and B (out, r)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from kshot.adapters.base import RankAdapter, kaiming_uniform
from kshot.layers import LowRankLayer
from kshot.products import Factors
from kshot.slots import Slot


@dataclass(frozen=True)
class LoRA(RankAdapter):
    """Low-rank adaptation.

    Args:
        rank_stabilised: s = alpha / √rank (rsLoRA, arXiv:2312.03732), as CLIP-LoRA uses.
    """

    rate: ClassVar[float] = 2e-3
    rate_width: ClassVar[int | None] = 192

    rank_stabilised: bool = False

    @property
    def scale(self) -> float:
        alpha = self.rank if self.alpha is None else self.alpha
        return alpha / (math.sqrt(self.rank) if self.rank_stabilised else self.rank)

    def wrap(self, slot: Slot, shared: Any) -> LoRALayer:  # noqa: ARG002  shares nothing
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
