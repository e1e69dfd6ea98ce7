"""VeRA (Kopiczko et al. 2023, arXiv:2310.11454): ΔW = (λ_b ⊙ B) (λ_d ⊙ A) with one frozen random pair A, B for all."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from kshot.adapters.base import Shared, SlotAdapter
from kshot.adapters.random_basis import basis, describe, require_memory, values
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

    Raises:
        UserError: a rank below 1, an initial value that is 0 or not finite, an impossible seed, a dropout outside
            [0, 1).
    """

    rank: int = 256
    initial: float = 0.1
    seed: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require("rank", self.rank >= 1, "be at least 1")
        self.require("initial", math.isfinite(self.initial) and self.initial != 0, "be a number other than 0")
        self.require("seed", 0 <= self.seed < 2**63, "lie in [0, 2^63)")

    def prepare(self, slots: Mapping[str, Slot]) -> RandomPair:
        inputs, outputs = max(s.in_features for s in slots.values()), max(s.out_features for s in slots.values())
        require_memory(4 * self.rank * (inputs + outputs), type(self).__name__, "lower rank")
        return RandomPair(self.seed, self.rank, inputs, outputs, next(iter(slots.values())).weight.device)

    def wrap(self, slot: Slot, shared: RandomPair) -> VeRALayer:
        return VeRALayer(slot, shared, self.initial)


class RandomPair(Shared):
    """A, (r, largest in), and B, (largest out, r), Kaiming-uniform with gain √2; a layer takes what it needs."""

    A: Tensor
    B: Tensor

    def __init__(self, seed: int, rank: int, inputs: int, outputs: int, device: torch.device) -> None:
        super().__init__()
        self.seed = seed
        for name, shape in (("A", (rank, inputs)), ("B", (outputs, rank))):
            uniform = basis(seed, f"vera.{name}", "uniform", shape, device=device)
            self.register_buffer(name, uniform.mul_(gain(shape)), persistent=False)

    def fingerprint(self) -> dict[str, Any]:
        """Describes both as they are drawn, whatever precision they were cast to since."""
        found = {}
        for name, tensor in self.named_buffers():
            first = values(self.seed, f"vera.{name}", "uniform", 0, 16).mul_(gain(tensor.shape))
            found[name] = describe(self.seed, f"vera.{name}", "uniform", tensor.shape, first)
        return found


def gain(shape: Sequence[int]) -> float:
    """What entries of variance 1 are multiplied by."""
    return math.sqrt(2 / shape[1])


class VeRALayer(LowRankLayer):
    """Both vectors are folded into the output's side: only h = x Aᵀ, (T, r), is kept for their gradients."""

    def __init__(self, slot: Slot, pair: RandomPair, initial: float) -> None:
        super().__init__(slot)
        self.pair = pair
        self.lambda_b = nn.Parameter(torch.zeros(slot.out_features))
        self.lambda_d = nn.Parameter(torch.full((len(pair.A),), initial))

    def factors(self) -> list[Factors]:
        pair, slot = self.pair, self.slot
        scales = torch.outer(self.lambda_b, self.lambda_d)  # first, so that autograd keeps nothing of this size but B
        return [Factors(scales * pair.B[: slot.out_features], pair.A[:, : slot.in_features])]
