"""NOLA (Koohpayegani et al. 2023, arXiv:2310.02556): a LoRA of A = A0 + Σ_k α_k A_k and B = Σ_k β_k B_k."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from kshot.adapters.base import Layers, Shared, SlotAdapter, require_rank
from kshot.adapters.random_basis import basis, describe, require_memory, values
from kshot.layers import LowRankLayer
from kshot.products import Factors
from kshot.slots import Slot

Owner = Literal["shared", "layer"]
Start = Literal["official", "vit", "randlora"]
Bits = Literal[32, 16, 8, 4]

KEPT = 1 << 30  # bytes of layers' own bases that are kept in memory rather than made anew in every step
CHUNK = 1 << 22  # values of such a basis that are made at a time
LEVELS = {8: 127, 4: 7}  # the largest code of as many bits


@dataclass(frozen=True)
class NOLA(SlotAdapter):
    """Low-rank adaptation by coefficients of random matrices: 2 K numbers a layer, whatever its shape and rank.

    Args:
        bases: K.
        rank: r.
        alpha: the scale is s = alpha / rank; None takes alpha = rank, so s = 1.
        basis: one for all layers, of which each takes the leading rows, or (layer) one for each layer, as the authors
            have it; such a basis takes r K (in + out) numbers a layer, and is made anew in every step beyond 1 GiB.
        start: official: A0 is Kaiming-uniform, α = β = 0, and entries are U(-1, 1) / √K, as in the authors' code for
            language models. Two others, without A0, change the model before the first step, by α = β = 1/K: vit, the
            authors' code for ViT, with A_k in U(±1/√(in r)) and B_k in U(±1/√(r out)); randlora, the code of RandLoRA
            (arXiv:2502.00987), with entries of variance 1.
        save_bits: of a coefficient in the tuned file; training takes 32.
        seed: of A0 and the basis, apart from the run's.

    Raises:
        UserError: no bases; a rank below 1, or above a layer's smaller side; a scale that is not a positive number; an
            unknown word or number of bits; an impossible seed; a dropout outside [0, 1).
    """

    bases: int = 1024
    rank: int = 4
    alpha: float | None = None
    basis: Owner = "shared"
    start: Start = "official"
    save_bits: Bits = 32
    seed: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require("bases", self.bases >= 1, "be at least 1")
        self.require("rank", self.rank >= 1, "be at least 1")
        self.require("alpha", math.isfinite(self.scale) and self.scale > 0, "be a positive number")
        for name, known in (("basis", Owner), ("start", Start), ("save_bits", Bits)):
            self.require(name, getattr(self, name) in get_args(known), f"be one of {str(get_args(known))[1:-1]}")
        self.require("seed", 0 <= self.seed < 2**63, "lie in [0, 2^63)")

    @property
    def scale(self) -> float:
        """The factor s."""
        return 1.0 if self.alpha is None else self.alpha / self.rank

    def prepare(self, slots: Mapping[str, Slot]) -> Combinations:
        for slot in slots.values():
            require_rank(type(self).__name__, self.rank, slot)
        return Combinations(self, slots)

    def wrap(self, slot: Slot, shared: Combinations) -> NOLALayer:
        return NOLALayer(slot, shared, self)


class NOLALayer(LowRankLayer):
    """Has the coefficients. What they combine to is made for all layers of a pass together.

    Attributes:
        made: the factors, for the time of a pass.
    """

    A0: Tensor
    made: Factors | None = None

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
        packed = [pack(name, p.detach(), self.save_bits) for name, p in self.named_parameters()]
        return {name: tensor for one in packed for name, tensor in one.items()}

    def from_stored(self, saved: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: unpack(name, saved) for name in dict.fromkeys(key.split(".")[0] for key in saved)}


class Combinations(Shared):
    """The bases, and what the coefficients of layers combine to by them.

    Attributes:
        slots: of its layers: the index of a layer in ``A`` and ``B`` is that of its slot.
        A: of the factors (r, in).
        B: of the factors (out, r).
    """

    def __init__(self, settings: NOLA, slots: Mapping[str, Slot]) -> None:
        super().__init__()
        self.slots = tuple(slots)
        inputs, outputs = [s.in_features for s in slots.values()], [s.out_features for s in slots.values()]
        device, total = next(iter(slots.values())).weight.device, 4 * settings.bases * settings.rank
        if settings.basis == "shared":
            require_memory(total * (max(inputs) + max(outputs)), type(settings).__name__, "lower bases or rank")
            self.A: Side = SharedSide(settings, "nola.A", inputs, 1.0, device)
            self.B: Side = SharedSide(settings, "nola.B", outputs, settings.scale, device)
        else:
            keep = device if total * sum(inputs + outputs) <= KEPT else None
            self.A = LayerSide(settings, [f"nola.{name}.A" for name in slots], inputs, 1.0, keep)
            self.B = LayerSide(settings, [f"nola.{name}.B" for name in slots], outputs, settings.scale, keep)

    def fingerprint(self) -> dict[str, Any]:
        return {"A": self.A.fingerprint(), "B": self.B.fingerprint()}

    def begin_pass(self, layers: Layers) -> None:
        own = self.own(layers)
        for layer, factors in zip(own, self.combine(own), strict=True):
            layer.made = factors

    def end_pass(self, layers: Layers) -> None:
        for layer in self.own(layers):
            layer.made = None

    def own(self, layers: Layers) -> list[NOLALayer]:
        """Those of some layers that use these bases."""
        return [v for v in layers.values() if isinstance(v, NOLALayer) and v.combinations is self]

    def combine(self, layers: Sequence[NOLALayer]) -> list[Factors]:
        """The factors of layers, with their gradients: one product a side for all of them."""
        made: list[Tensor] = []
        if torch.compiler.is_compiling():
            made += [self.A.combine_one(v.index, v.alpha) for v in layers]
            made += [self.B.combine_one(v.index, v.beta) for v in layers]
        elif layers:
            with torch.autocast(layers[0].alpha.device.type, enabled=False):
                coefficients = [v.alpha for v in layers] + [v.beta for v in layers]
                made += list(Combine.apply(self.A, self.B, [v.index for v in layers], *coefficients))
        return [Factors(b, v.A0 + a.T) for v, a, b in zip(layers, made, made[len(layers) :], strict=False)]


class Combine(torch.autograd.Function):
    """All α and all β of some layers to their A and B."""

    @staticmethod
    def forward(ctx: Any, a: Side, b: Side, which: Sequence[int], *coefficients: Tensor) -> tuple[Tensor, ...]:
        """Returns all Σ_k α_k A_kᵀ, (in, r), then all s Σ_k β_k B_k, (out, r)."""
        ctx.set_materialize_grads(False)
        ctx.sides, ctx.which = (a, b), which
        half = len(which)
        return (*a.combine(which, coefficients[:half]), *b.combine(which, coefficients[half:]))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Any, ...]:
        """Gradients of the coefficients, None for layers that the loss did not reach."""
        (a, b), half = ctx.sides, len(ctx.which)
        with torch.autocast(next(g for g in gradients if g is not None).device.type, enabled=False):
            found = [*a.project(ctx.which, gradients[:half]), *b.project(ctx.which, gradients[half:])]
        return (None, None, None, *found)


class Side(nn.Module, ABC):
    """The basis of one factor in every layer: K matrices of (width, r), where A_kᵀ is (in, r) and B_k is (out, r).

    They are drawn with variance 1; the scale that a layer's should have goes to its coefficients.

    Args:
        settings: of the method.
        streams: of random numbers.
        widths: by layer.
        scale: of the factor.
    """

    def __init__(self, settings: NOLA, streams: Sequence[str], widths: Sequence[int], scale: float) -> None:
        super().__init__()
        self.bases, self.rank, self.seed = settings.bases, settings.rank, settings.seed
        self.streams, self.widths = streams, widths
        self.shape = (self.bases, widths[0], self.rank)  # of what comes from the first stream
        self.scales = [scale * entry_scale(settings, width) for width in widths]

    @abstractmethod
    def chunks(self, index: int, like: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """The matrices of one layer, (some of K, width r), with where they stand among the K."""

    def fingerprint(self) -> dict[str, Any]:
        """Describes the first stream, and with it the generator."""
        first = values(self.seed, self.streams[0], "uniform", 0, 16)
        return describe(self.seed, self.streams[0], "uniform", self.shape, first)

    def combine_one(self, index: int, coefficients: Tensor) -> Tensor:
        """The combination of one layer, (width, r), by plain operations."""
        c = self.scales[index] * coefficients
        return reduce(torch.add, (c[part] @ m for part, m in self.chunks(index, c))).view(-1, self.rank)

    def project_one(self, index: int, gradient: Tensor) -> Tensor:
        """The gradient of one layer's coefficients, (K,): the adjoint of :meth:`combine_one`."""
        g = self.scales[index] * gradient.flatten()
        return torch.cat([m @ g for _, m in self.chunks(index, g)])

    def combine(self, which: Sequence[int], coefficients: Sequence[Tensor]) -> list[Tensor]:
        """The combinations of some layers."""
        return [self.combine_one(index, c) for index, c in zip(which, coefficients, strict=True)]

    def project(self, which: Sequence[int], gradients: Sequence[Tensor | None]) -> list[Tensor | None]:
        """The gradients of their coefficients."""
        pairs = zip(which, gradients, strict=True)
        return [None if g is None else self.project_one(index, g) for index, g in pairs]


def entry_scale(settings: NOLA, width: int) -> float:
    """Standard deviation of the entries of A_k or B_k, given in or out."""
    match settings.start:
        case "official":
            return 1 / math.sqrt(3 * settings.bases)
        case "vit":
            return 1 / math.sqrt(3 * width * settings.rank)
        case "randlora":
            return 1.0


class SharedSide(Side):
    """One basis for all layers, of which each takes the leading rows: one product combines for all."""

    matrices: Tensor

    def __init__(self, settings: NOLA, stream: str, widths: Sequence[int], scale: float, device: torch.device) -> None:
        super().__init__(settings, [stream], widths, scale)
        self.shape = (self.bases, max(widths), self.rank)
        drawn = basis(self.seed, stream, "uniform", self.shape, device=device).flatten(1)
        self.register_buffer("matrices", drawn, persistent=False)

    def chunks(self, index: int, like: Tensor) -> Iterator[tuple[slice, Tensor]]:  # noqa: ARG002  it is at hand
        yield slice(None), self.matrices[:, : self.widths[index] * self.rank]

    def combine(self, which: Sequence[int], coefficients: Sequence[Tensor]) -> list[Tensor]:
        stacked = torch.stack([self.scales[i] * c for i, c in zip(which, coefficients, strict=True)])
        widest = max(self.widths[i] for i in which)
        rows = (stacked @ self.matrices[:, : widest * self.rank]).unflatten(1, (widest, self.rank))
        return [row[: self.widths[i]] for i, row in zip(which, rows, strict=True)]

    def project(self, which: Sequence[int], gradients: Sequence[Tensor | None]) -> list[Tensor | None]:
        reached = [(i, self.scales[i] * g.flatten()) for i, g in zip(which, gradients, strict=True) if g is not None]
        widest = max((len(g) for _, g in reached), default=0)
        rows = self.matrices.new_zeros(len(reached), widest)
        for row, (_, g) in zip(rows, reached, strict=True):
            row[: len(g)] = g
        found = dict(zip((i for i, _ in reached), rows @ self.matrices[:, :widest].T, strict=True))
        return [found.get(i) for i in which]


class LayerSide(Side):
    """A basis for each layer: on a device if that is named, else made anew, a few matrices at a time."""

    def __init__(
        self, settings: NOLA, streams: Sequence[str], widths: Sequence[int], scale: float, device: torch.device | None
    ) -> None:
        super().__init__(settings, streams, widths, scale)
        self.keep = device is not None
        for index in range(len(widths) if device is not None else 0):
            drawn = self.draw(index, 0, self.bases, torch.empty(0, device=device))
            self.register_buffer(f"matrices_{index}", drawn, persistent=False)

    def draw(self, index: int, first: int, count: int, like: Tensor) -> Tensor:
        """Matrices of a layer from the given one on, (count, width r)."""
        size = self.widths[index] * self.rank
        drawn = values(
            self.seed, self.streams[index], "uniform", first * size, count * size, device=like.device, dtype=like.dtype
        )
        return drawn.view(count, size)

    def chunks(self, index: int, like: Tensor) -> Iterator[tuple[slice, Tensor]]:
        if self.keep:
            yield slice(None), self.get_buffer(f"matrices_{index}")
            return
        step = max(1, CHUNK // (self.widths[index] * self.rank))
        for first in range(0, self.bases, step):
            count = min(step, self.bases - first)
            yield slice(first, first + count), self.draw(index, first, count, like)


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
