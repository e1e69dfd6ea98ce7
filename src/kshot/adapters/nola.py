"""NOLA (Koohpayegani et al. 2023, arXiv:2310.02556): a LoRA of A = A0 + Σ_k α_k A_k and B = Σ_k β_k B_k."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from kshot.adapters.base import Layers, RankAdapter, Shared
from kshot.adapters.random_basis import basis, describe, require_memory, values
from kshot.layers import LowRankLayer
from kshot.products import Factors
from kshot.slots import Slot

KEPT = 1 << 30  # bytes of layers' own bases that are kept in memory rather than made anew in every step
CHUNK = 1 << 22  # values of such a basis that are made at a time
LEVELS = {8: 127, 4: 7}  # the largest code of as many bits


@dataclass(frozen=True)
class NOLA(RankAdapter):
    """Low-rank adaptation by coefficients of random matrices: 2 K numbers a layer, whatever its shape and rank.

    Args:
        bases: K.
        basis: one for all layers, of which each takes the leading rows, or (layer) one for each layer, as the authors
            have it; such a basis takes r K (in + out) numbers a layer, and is made anew in every step beyond 1 GiB.
        start: official: A0 is Kaiming-uniform, α = β = 0, and entries are U(-1, 1) / √K, as in the authors' code for
            language models. Two others, without A0, change the model before the first step, by α = β = 1/K: vit, the
            authors' code for ViT, with A_k in U(±1/√(in r)) and B_k in U(±1/√(r out)); randlora, the code of RandLoRA
            (arXiv:2502.00987), with entries of variance 1.
        save_bits: of a coefficient in the tuned file; training takes 32.
        seed: of A0 and the basis, apart from the run's.
    """

    rate: ClassVar[float] = 5e-3

    rank: int = 4
    bases: int = 1024
    basis: Literal["shared", "layer"] = "shared"
    start: Literal["official", "vit", "randlora"] = "official"
    save_bits: Literal[32, 16, 8, 4] = 32
    seed: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_known("basis", "start", "save_bits")
        self.require("bases", self.bases >= 1, "be at least 1")
        self.require("seed", 0 <= self.seed < 2**63, "lie in [0, 2^63)")

    def prepare(self, slots: Mapping[str, Slot]) -> Combinations:
        super().prepare(slots)
        return Combinations(self, slots)

    def wrap(self, slot: Slot, shared: Combinations) -> NOLALayer:
        return NOLALayer(slot, shared, self)


class NOLALayer(LowRankLayer):
    """Has the coefficients. What they combine to is made for all layers of a pass together."""

    A0: Tensor
    made: Factors | None = None  # for the time of a pass

    def __init__(self, slot: Slot, combinations: Combinations, settings: NOLA) -> None:
        super().__init__(slot)
        self.combinations, self.index = combinations, combinations.slots.index(slot.name)
        self.save_bits = settings.save_bits
        initial = torch.full((settings.bases,), 0.0 if settings.start == "official" else 1 / settings.bases)
        self.alpha, self.beta = nn.Parameter(initial), nn.Parameter(initial.clone())
        fixed = torch.zeros(())
        if settings.start == "official":
            shape, stream = (settings.rank, slot.in_features), f"nola.{slot.name}.A0"
            drawn = basis(settings.seed, stream, "uniform", shape, device=slot.weight.device)
            fixed = drawn.div_(math.sqrt(3 * slot.in_features))
        self.register_buffer("A0", fixed, persistent=False)

    def factors(self) -> list[Factors]:
        return [self.combinations.combine([self])[0] if self.made is None else self.made]

    def stored(self) -> dict[str, Tensor]:
        return pack("alpha", self.alpha.detach(), self.save_bits) | pack("beta", self.beta.detach(), self.save_bits)

    def from_stored(self, saved: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: unpack(name, saved) for name in dict.fromkeys(key.split(".")[0] for key in saved)}


class Combinations(Shared):
    """The bases, A of the factors (r, in) and B of (out, r), and what the coefficients of layers combine to by them."""

    def __init__(self, settings: NOLA, slots: Mapping[str, Slot]) -> None:
        super().__init__(slots)
        inputs, outputs = [s.in_features for s in slots.values()], [s.out_features for s in slots.values()]
        device, total = next(iter(slots.values())).weight.device, 4 * settings.bases * settings.rank
        if settings.basis == "shared":
            require_memory(total * (max(inputs) + max(outputs)), type(settings).__name__, "lower bases or rank")
            self.A: Side = SharedSide(settings, "nola.A", inputs, 1.0, device)
            self.B: Side = SharedSide(settings, "nola.B", outputs, settings.scale, device)
        else:
            keep = device if total * sum(inputs + outputs) <= KEPT else None
            self.A = Side(settings, [f"nola.{name}.A" for name in slots], inputs, 1.0, keep)
            self.B = Side(settings, [f"nola.{name}.B" for name in slots], outputs, settings.scale, keep)
        self.described = {"A": self.A.described, "B": self.B.described}

    def begin_pass(self, layers: Layers) -> None:
        own = self.own(layers)
        for layer, factors in zip(own, self.combine(own), strict=True):
            layer.made = factors

    def end_pass(self, layers: Layers) -> None:
        for layer in self.own(layers):
            layer.made = None

    def combine(self, layers: Sequence[NOLALayer]) -> list[Factors]:
        """The factors of layers, with their gradients: one product a side for all of them."""
        which = [v.index for v in layers]
        down, up = self.A(which, [v.alpha for v in layers]), self.B(which, [v.beta for v in layers])
        return [Factors(b, v.A0 + a.T) for v, a, b in zip(layers, down, up, strict=True)]


class Side(nn.Module):
    """The basis of one factor in every layer: K matrices of (width, r), where A_kᵀ is (in, r) and B_k is (out, r).

    They are drawn with variance 1; the scale that a layer's should have goes to its coefficients. Here each layer has
    its own, which are kept on a device if one is named, else made anew, a few at a time.

    Args:
        settings: of the method.
        streams: of random numbers; the first, and with it the generator, is described.
        widths: by layer.
        scale: of the factor.
        keep: the device, or None.
    """

    def __init__(
        self, settings: NOLA, streams: Sequence[str], widths: Sequence[int], scale: float, keep: torch.device | None
    ) -> None:
        super().__init__()
        self.bases, self.rank, self.seed = settings.bases, settings.rank, settings.seed
        self.streams, self.widths, self.kept = streams, widths, keep is not None
        self.scales = [scale * entry_scale(settings, width) for width in widths]
        self.described = describe(self.seed, streams[0], "uniform", (self.bases, widths[0], self.rank))
        for index in range(len(widths) if self.kept else 0):
            drawn = self.draw(index, 0, self.bases, torch.empty(0, device=keep))
            self.register_buffer(f"matrices_{index}", drawn, persistent=False)

    def draw(self, index: int, first: int, count: int, like: Tensor) -> Tensor:
        """Matrices of a layer from the given one on, (count, width r)."""
        size, stream = self.widths[index] * self.rank, self.streams[index]
        place = first * size, count * size
        drawn = values(self.seed, stream, "uniform", *place, device=like.device, dtype=like.dtype)
        return drawn.view(count, size)

    def chunks(self, index: int, like: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """The matrices of one layer, (some of K, width r), with where they stand among the K."""
        if self.kept:
            yield slice(None), self.get_buffer(f"matrices_{index}")
            return
        step = max(1, CHUNK // (self.widths[index] * self.rank))
        for first in range(0, self.bases, step):
            count = min(step, self.bases - first)
            yield slice(first, first + count), self.draw(index, first, count, like)

    def forward(self, which: Sequence[int], coefficients: Sequence[Tensor]) -> Sequence[Tensor]:
        """The combinations of some layers, (width, r) each, with their gradients."""
        if torch.compiler.is_compiling() or not which:
            return [self.combine_one(index, c) for index, c in zip(which, coefficients, strict=True)]
        with torch.autocast(coefficients[0].device.type, enabled=False):
            found: Sequence[Tensor] = Combine.apply(self, which, *coefficients)
        return found

    def combine_one(self, index: int, coefficients: Tensor) -> Tensor:
        """The combination of one layer by plain operations."""
        c = self.scales[index] * coefficients
        return reduce(torch.add, (c[part] @ m for part, m in self.chunks(index, c))).view(-1, self.rank)

    def combine(self, which: Sequence[int], coefficients: Sequence[Tensor]) -> list[Tensor]:
        """The combinations of some layers, without gradients."""
        return [self.combine_one(index, c) for index, c in zip(which, coefficients, strict=True)]

    def project(self, which: Collection[int], gradients: Collection[Tensor]) -> list[Tensor]:
        """The gradients of their coefficients, (K,) each: the adjoint of :meth:`combine`."""
        scaled = [(i, self.scales[i] * g.flatten()) for i, g in zip(which, gradients, strict=True)]
        return [torch.cat([m @ g for _, m in self.chunks(i, g)]) for i, g in scaled]


class SharedSide(Side):
    """One basis for all layers, of which each takes the leading rows: one product combines for all."""

    matrices: Tensor

    def __init__(self, settings: NOLA, stream: str, widths: Sequence[int], scale: float, device: torch.device) -> None:
        super().__init__(settings, [stream], widths, scale, None)
        shape = (self.bases, max(widths), self.rank)
        self.described = describe(self.seed, stream, "uniform", shape)
        drawn = basis(self.seed, stream, "uniform", shape, device=device)
        self.register_buffer("matrices", drawn.flatten(1), persistent=False)

    def chunks(self, index: int, like: Tensor) -> Iterator[tuple[slice, Tensor]]:  # noqa: ARG002  it is at hand
        yield slice(None), self.matrices[:, : self.widths[index] * self.rank]

    def combine(self, which: Sequence[int], coefficients: Sequence[Tensor]) -> list[Tensor]:
        stacked = torch.stack([self.scales[i] * c for i, c in zip(which, coefficients, strict=True)])
        widest = max(self.widths[i] for i in which)
        rows = (stacked @ self.matrices[:, : widest * self.rank]).unflatten(1, (widest, self.rank))
        return [row[: self.widths[i]] for i, row in zip(which, rows, strict=True)]

    def project(self, which: Collection[int], gradients: Collection[Tensor]) -> list[Tensor]:
        scaled = [self.scales[i] * g.flatten() for i, g in zip(which, gradients, strict=True)]
        rows = nn.utils.rnn.pad_sequence(scaled, batch_first=True)
        return list(rows @ self.matrices[:, : rows.shape[1]].T)


class Combine(torch.autograd.Function):
    """Coefficients of some layers to their factors of one side, with one product each way where they share a basis."""

    @staticmethod
    def forward(ctx: Any, side: Side, which: Sequence[int], *coefficients: Tensor) -> tuple[Tensor, ...]:
        """Returns Σ_k α_k A_kᵀ, (in, r), or s Σ_k β_k B_k, (out, r), of each."""
        ctx.set_materialize_grads(False)
        ctx.side, ctx.which = side, which
        return tuple(side.combine(which, coefficients))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Any, ...]:
        """Gradients of the coefficients, None for layers that the loss did not reach."""
        reached = {i: g for i, g in zip(ctx.which, gradients, strict=True) if g is not None}
        with torch.autocast(next(iter(reached.values())).device.type, enabled=False):
            found = dict(zip(reached, ctx.side.project(reached.keys(), reached.values()), strict=True))
        return (None, None, *(found.get(i) for i in ctx.which))


def entry_scale(settings: NOLA, width: int) -> float:
    """Standard deviation of the entries of A_k or B_k, given in or out."""
    inverse = {"official": 3 * settings.bases, "vit": 3 * width * settings.rank, "randlora": 1}[settings.start]
    return 1 / math.sqrt(inverse)


def pack(name: str, tensor: Tensor, bits: int) -> dict[str, Tensor]:
    """A vector as a file holds it: in floats, or in codes of 8 or 4 bits with the value of the largest code."""
    if bits >= 16:
        return {name: tensor.to(torch.float32 if bits == 32 else torch.float16)}
    peak = tensor.abs().max().float()
    codes = (tensor / peak.clamp_min(torch.finfo(torch.float32).tiny) * LEVELS[bits]).round().to(torch.int8)
    if bits == 4:  # two a byte, as 1 to 15, so that 0 can fill up an odd number
        halves = nn.functional.pad(codes + 8, (0, len(codes) % 2)).to(torch.uint8).view(-1, 2)
        codes = halves[:, 0] | halves[:, 1] << 4
    return {f"{name}.q{bits}": codes, f"{name}.scale": peak}


def unpack(name: str, tensors: Mapping[str, Tensor]) -> Tensor:
    """The vector, float32, of :func:`pack`, which gives the same codes for it again."""
    if name in tensors:
        return tensors[name].float()
    bits = 8 if f"{name}.q8" in tensors else 4
    codes = tensors[f"{name}.q{bits}"]
    if bits == 4:
        halves = torch.stack([codes & 15, codes >> 4], 1).flatten()
        codes = halves[halves > 0].to(torch.int8) - 8
    return codes.float() / LEVELS[bits] * tensors[f"{name}.scale"]
