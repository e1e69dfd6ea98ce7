"""PRANC (Nooralinejad et al. 2023, arXiv:2206.08464): ΔW = s Σ_k α_k P_k with pseudo-random, never stored P_k."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial, reduce
from itertools import accumulate
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from kshot.adapters.base import Shared, SlotAdapter
from kshot.adapters.random_basis import describe, permutation, values
from kshot.layers import FullRankLayer
from kshot.slots import Slot

CHUNK = 1 << 21  # numbers of a dense basis made at a time; at least one P_k
KEPT = 256 << 20  # bytes of dense bases that are kept in memory rather than made anew in every step
SLOW = 2e10  # random numbers a step, minutes on a CPU, from which a run is warned


@dataclass(frozen=True)
class PRANC(SlotAdapter):
    """A few coefficients of pseudo-random matrices.

    Args:
        coefficients: K.
        scope: K coefficients for each layer, or (global) K for the concatenation of all matrices, in the
            order of their names.
        basis: ``hashed``: the P_k are disjoint indicators, every weight belongs to one coefficient, by a permutation
            that gives each as many weights as any other, or one less. Others are dense, of variance 1 / (3 in):
            ``uniform`` from U(-1/√in, 1/√in) as in the paper, ``normal``, or ``sign``; each step then makes 2 K random
            numbers for every weight.
        hashes: of ``hashed``: how many independent permutations are added up (the authors' ``ppb``).
        scale: s.
        seed: of the basis, which is a function of it and of the slots' names alone.
    """

    coefficients: int = 1000
    scope: Literal["layer", "global"] = "layer"
    basis: Literal["hashed", "uniform", "normal", "sign"] = "hashed"
    hashes: int = 1
    scale: float = 1.0
    seed: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_known("scope", "basis")
        self.require("coefficients", 1 <= self.coefficients < 2**31, "lie in 1 ... 2^31 - 1")
        self.require("hashes", self.hashes >= 1, "be at least 1")
        self.require("hashes", self.hashes == 1 or self.basis == "hashed", "be 1 unless basis is hashed")
        self.require("scale", 0 < self.scale < math.inf, "be a positive number")
        self.require("seed", 0 <= self.seed < 2**63, "lie in 0 ... 2^63 - 1")

    def prepare(self, slots: Mapping[str, Slot]) -> Coefficients:
        shared = Coefficients(self, slots)
        numbers = 2 * self.coefficients * sum(slot.weight.numel() for slot in slots.values())
        if self.basis != "hashed" and not shared.kept and numbers > SLOW:
            warnings.warn(
                f"PRANC: every step makes {numbers:.1e} random numbers; basis: hashed makes none.", stacklevel=3
            )
        return shared

    def wrap(self, slot: Slot, shared: Coefficients) -> PRANCLayer:
        return (HashedLayer if self.basis == "hashed" else DenseLayer)(slot, self, shared)


class Place(NamedTuple):
    """Which random numbers are a slot's: that of its weight p in P_k has the index k · total + start + p.

    Of permutations, the h-th of a slot is made of the words from h · total + start on.
    """

    stream: str
    start: int
    total: int


class Coefficients(Shared):
    """The coefficients of the global scope, and the place of every slot in the basis."""

    alpha: nn.Parameter | None  # α, (K,), or None where each layer has its own

    def __init__(self, settings: PRANC, slots: Mapping[str, Slot]) -> None:
        super().__init__()
        sizes = {name: slots[name].weight.numel() for name in sorted(slots)}
        total, ends = sum(sizes.values()), accumulate(sizes.values())
        self.kept = 4 * settings.coefficients * total <= KEPT  # a dense basis, in memory
        self.alpha = None
        if settings.scope == "global":
            weight = next(iter(slots.values())).weight
            device = "cpu" if weight.is_meta else weight.device
            self.alpha = nn.Parameter(torch.zeros(settings.coefficients, device=device))
            self.places = {n: Place("pranc", end - sizes[n], total) for n, end in zip(sizes, ends, strict=True)}
        else:
            self.places = {name: Place(f"pranc.{name}", 0, size) for name, size in sizes.items()}
        place = next(iter(self.places.values()))
        if settings.basis == "hashed":
            about = describe(settings.seed, place.stream, "permutation", [settings.hashes, place.total])
        else:
            about = describe(settings.seed, place.stream, settings.basis, [settings.coefficients, place.total])
        about |= {"coefficients": settings.coefficients, "scope": settings.scope}
        if settings.scope == "global":  # the same targets, then: names of tensors do not tell
            about["starts"] = {name: place.start for name, place in self.places.items()}
        self.described = {"pranc": about}


class PRANCLayer(FullRankLayer):
    """``W + s Σ_k α_k P_k``; α starts at zero, so that step 0 changes nothing."""

    alpha: nn.Parameter | None

    def __init__(self, slot: Slot, settings: PRANC, shared: Coefficients) -> None:
        super().__init__(slot)
        self.settings, self.shared = settings, shared
        self.place, self.size = shared.places[slot.name], slot.weight.numel()
        self.alpha = nn.Parameter(torch.zeros(settings.coefficients)) if shared.alpha is None else None

    def coefficients(self) -> nn.Parameter:
        """α, (K,): the layer's own, or that of all."""
        alpha = self.shared.alpha if self.alpha is None else self.alpha
        assert alpha is not None
        return alpha


class HashedLayer(PRANCLayer):
    """Every weight takes the coefficient that a permutation picks for it, or the sum of several."""

    index: Tensor

    def __init__(self, slot: Slot, settings: PRANC, shared: Coefficients) -> None:
        super().__init__(slot, settings, shared)
        device, (stream, start, total) = slot.weight.device, self.place
        index = torch.empty(settings.hashes, self.size, dtype=torch.int32, device=device)  # (hashes, out · in)
        # A permutation of each slot: the remainders go on where those of the slot before ended, so that the counts
        # are as equal over the concatenation of all slots as they are in each.
        remainders = torch.arange(start, start + self.size, device=device).remainder(settings.coefficients).int()
        for h in range(0 if index.is_meta else settings.hashes):
            index[h, permutation(settings.seed, stream, h * total + start, self.size, device)] = remainders
        self.register_buffer("index", index, persistent=False)

    def delta(self) -> Tensor:
        alpha = self.settings.scale * self.coefficients()
        return reduce(torch.add, [alpha.index_select(0, picked) for picked in self.index]).view_as(self.slot.weight)

    def pullback(self, gradient: Tensor) -> list[Tensor]:
        alpha = self.coefficients()
        exact = torch.float64 if gradient.device.type == "cpu" else torch.float32  # many numbers fall on one sum
        g = gradient.flatten().to(torch.promote_types(alpha.dtype, exact))
        sums = g.new_zeros(alpha.shape)
        for picked in self.index:
            sums.index_add_(0, picked, g)
        return [(self.settings.scale * sums).to(alpha.dtype)]


class DenseLayer(PRANCLayer):
    """Makes each P_k anew whenever it needs it, unless all of them are small."""

    kept: Tensor | None

    def __init__(self, slot: Slot, settings: PRANC, shared: Coefficients) -> None:
        super().__init__(slot, settings, shared)
        self.scale = settings.scale / math.sqrt(3 * slot.in_features)  # for numbers of variance 1
        kept = shared.kept and not slot.weight.is_meta
        self.register_buffer("kept", self.made(0, settings.coefficients) if kept else None, persistent=False)

    def made(self, first: int, last: int) -> Tensor:
        """P_first ... P_{last-1} with variance 1, (last - first, out · in)."""
        assert self.settings.basis != "hashed"
        (stream, start, total), device = self.place, self.slot.weight.device
        draw = partial(values, self.settings.seed, stream, self.settings.basis, device=device)
        if total == self.size:  # one run of numbers
            return draw(first * total, (last - first) * total).view(-1, total)
        return torch.stack([draw(k * total + start, self.size) for k in range(first, last)])

    def pieces(self) -> Iterator[tuple[slice, Tensor]]:
        """The basis in pieces: which k, and their P_k, (pieces of K, out · in), in the dtype of α."""
        count, step = self.settings.coefficients, max(1, CHUNK // self.size)
        if self.kept is not None:
            yield slice(0, count), self.kept
            return
        for k in range(0, count, step):
            yield slice(k, k + step), self.made(k, min(k + step, count)).to(self.coefficients().dtype)

    def delta(self) -> Tensor:
        summed: Tensor = Combination.apply(self, self.coefficients())
        return summed

    def build(self, dtype: torch.dtype) -> Tensor:  # noqa: ARG002  generation takes the time
        alpha = self.coefficients().detach()
        delta = alpha.new_zeros(self.size)
        for k, p in self.pieces():
            delta.addmv_(p.T, alpha[k])
        return self.scale * delta.view_as(self.slot.weight)

    def pullback(self, gradient: Tensor) -> list[Tensor]:
        g = gradient.flatten().to(self.coefficients().dtype)
        return [self.scale * torch.cat([p @ g for _, p in self.pieces()])]


class Combination(torch.autograd.Function):
    """The dense ΔW for autograd, which would keep the whole basis for the backward pass."""

    @staticmethod
    def forward(ctx: Any, layer: DenseLayer, alpha: Tensor) -> Tensor:
        ctx.layer = layer
        return layer.build(alpha.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, Tensor]:
        return None, *ctx.layer.pullback(gradient)
