"""VeRA (Kopiczko et al. 2023, arXiv:2310.11454): ΔW = (λ_b ⊙ B) (λ_d ⊙ A) with one frozen random pair A, B for all."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from kshot.adapters.base import SlotAdapter
from kshot.adapters.random_basis import FrozenBases
from kshot.layers import LowRankLayer
from kshot.products import Factors
from kshot.slots import Slot


@dataclass(frozen=True)
class VeRA(SlotAdapter):
    """Vector-based random matrix adaptation. A layer trains r + out numbers; r is high, and may exceed its sides.

    Args:
        rank: r.
        initial: where λ_d starts; λ_b starts at 0.
        seed: of the frozen pair, apart from the run's.
    """

    rate: ClassVar[float] = 1e-2

    rank: int = 256
    initial: float = 0.1
    seed: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require("rank", self.rank >= 1, "be at least 1")
        self.require("initial", math.isfinite(self.initial) and self.initial != 0, "be a number other than 0")
        self.require("seed", 0 <= self.seed < 2**63, "lie in [0, 2^63)")

    def prepare(self, slots: Mapping[str, Slot]) -> FrozenBases:
        """A, (r, largest in), and B, (largest out, r), Kaiming-uniform with gain √2; a layer takes what it needs."""
        inputs, outputs = max(s.in_features for s in slots.values()), max(s.out_features for s in slots.values())
        shapes = {"A": (self.rank, inputs), "B": (outputs, self.rank)}
        device = next(iter(slots.values())).weight.device
        return FrozenBases("VeRA", self.seed, shapes, device, "lower rank", gain=lambda shape: math.sqrt(2 / shape[1]))

    def wrap(self, slot: Slot, shared: FrozenBases) -> VeRALayer:
        return VeRALayer(slot, shared, self.initial)


class VeRALayer(LowRankLayer):
    """Both vectors are folded into the output's side: only h = x Aᵀ, (T, r), is kept for their gradients."""

    def __init__(self, slot: Slot, pair: FrozenBases, initial: float) -> None:
        super().__init__(slot)
        self.pair = pair
        self.lambda_b = nn.Parameter(torch.zeros(slot.out_features))
        self.lambda_d = nn.Parameter(torch.full((len(pair.A),), initial))

    def factors(self) -> list[Factors]:
        pair, slot = self.pair, self.slot
        scales = torch.outer(self.lambda_b, self.lambda_d)  # first, so that autograd keeps nothing of this size but B
        return [Factors(scales * pair.B[: slot.out_features], pair.A[:, : slot.in_features])]
