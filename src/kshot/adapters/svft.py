"""SVFT (Lingam et al. 2024, arXiv:2405.19597): W' = W + U M Vᵀ with W = U Σ Vᵀ and M trained on a sparse pattern Ω."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from kshot.adapters.base import Shared, SlotAdapter, generator_for
from kshot.adapters.random_basis import words
from kshot.adapters.svd import SVD, fingerprint, relative_gap, svd_of
from kshot.errors import UserError
from kshot.holding import Castable
from kshot.layers import FullRankLayer
from kshot.slots import Change, Slot

SMALLEST_GAP = 1e-6  # of neighbouring singular values, relative to the largest: closer pairs may turn into each other


@dataclass(frozen=True)
class SVFT(SlotAdapter):
    """Singular vectors of the weight, recombined sparsely.

    Args:
        pattern: Ω, the entries (row, column) of M, (n, n), that train: the diagonal (plain), a band of 2b + 1 diagonals
            (banded), distinct ones at random, or those where u_row and v_column are most alike, up to sign (top_k, of
            square weights only).
        band: b.
        entries: the size of Ω for random and top_k; None for that of banded.
        start: M = 0; or as the authors do, from N(0, 2 / size of Ω) with a gate, which is another model from step 0
            on: ‖ΔW‖_F is about √2 / 2 in each layer.
        gate: M is times sigmoid(g), with g = 0 at first and trained, one a layer; ``start: reference`` always has it.
        save_factors: checkpoints hold U, Σ and Vᵀ; None keeps those of weights with (almost) equal singular values,
            whose vectors may come out otherwise on another machine, unless the pattern is plain.
        seed: of the random pattern.
    """

    rate: ClassVar[float] = 5e-3

    pattern: Literal["plain", "banded", "random", "top_k"] = "plain"
    band: int = 2
    entries: int | None = None
    start: Literal["zero", "reference"] = "zero"
    gate: bool = False
    save_factors: bool | None = None
    seed: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_known("pattern", "start")
        self.require("band", self.band >= 1, "be at least 1; without any, the pattern is plain")
        chosen = self.pattern in ("random", "top_k")
        self.require("entries", self.entries is None or chosen, "be null unless the pattern is random or top_k")
        self.require("entries", self.entries is None or self.entries >= 1, "be at least 1")
        self.require("seed", 0 <= self.seed < 2**63, "lie in 0 ... 2^63 - 1")

    def prepare(self, slots: Mapping[str, Slot]) -> Shared | None:
        """Tells bases apart, pairs of small singular values included: M may weigh them as much as any other."""
        found = {name: svd for name, slot in slots.items() if not self.stores(svd := svd_of(slot.weight))}
        prints = {name: fingerprint(svd._replace(s=torch.ones_like(svd.s))) for name, svd in found.items()}
        return Shared(described={"svd": prints}) if prints else None

    def wrap(self, slot: Slot, shared: Shared | None) -> SVFTLayer:  # noqa: ARG002  the basis is the slot's own
        svd = svd_of(slot.weight)
        if self.save_factors is False and self.is_ambiguous(svd):
            raise UserError(
                f"SVFT: singular values of {slot.name} (almost) coincide, so that {self.pattern} M means little on "
                "another machine: leave save_factors null, or take the pattern plain."
            )
        return SVFTLayer(slot, svd, self.omega(slot, svd), self)

    def is_ambiguous(self, svd: SVD) -> bool:
        """Whether entries of M off the diagonal may mean something else where the factors are computed again."""
        return self.pattern != "plain" and relative_gap(svd) < SMALLEST_GAP

    def stores(self, svd: SVD) -> bool:
        """Whether a checkpoint holds these factors."""
        return self.is_ambiguous(svd) if self.save_factors is None else self.save_factors

    def omega(self, slot: Slot, svd: SVD) -> Band | Positions:
        """The pattern on one slot.

        Raises:
            UserError: the slot's M is too small for it, or not its kind.
        """
        n = len(svd.s)
        if self.pattern == "plain":
            return Band(n, 0)
        if self.band >= n and self.entries is None:
            raise UserError(f"SVFT: band is {self.band}, and must lie below {n}, the smaller side of {slot.name}.")
        if self.pattern == "banded":
            return Band(n, self.band)
        entries = Band(n, self.band).size if self.entries is None else self.entries
        if entries > n * n:
            raise UserError(f"SVFT: entries is {entries}, and M of {slot.name} has {n * n}.")
        if self.pattern == "random":
            scores = words(self.seed, f"svft.{slot.name}", 0, n * n)
        elif slot.in_features == slot.out_features:
            scores = (svd.u.T @ svd.vt.T).abs().flatten()
        else:
            shape = f"{slot.out_features} x {slot.in_features}"
            raise UserError(f"SVFT: the pattern top_k needs square weights, and {slot.name} is {shape}.")
        return Positions(n, scores.topk(entries).indices.sort().values)


class Band(nn.Module):
    """Ω of 2b + 1 diagonals. Values lie diagonal by diagonal: 0, 1, -1, 2, -2, ...; that of d holds M[j - d, j]."""

    def __init__(self, n: int, band: int) -> None:
        super().__init__()
        offsets = [0] + [sign * d for d in range(1, band + 1) for sign in (1, -1)]
        self.lengths = [n - abs(d) for d in offsets]
        self.size = sum(self.lengths)  # |Ω| = n (2b + 1) - b (b + 1)
        self.rows = [slice(max(-d, 0), n - max(d, 0)) for d in offsets]
        self.columns = [slice(max(d, 0), n - max(-d, 0)) for d in offsets]

    def times(self, values: Tensor, h: Tensor, transposed: bool = False) -> Tensor:
        """H Mᵀ, or H M, for H (T, n)."""
        to, off = (self.columns, self.rows) if transposed else (self.rows, self.columns)
        main, *others = values.split(self.lengths)
        result: Tensor = h * main
        for a, b, m in zip(to[1:], off[1:], others, strict=True):
            result[:, a].addcmul_(h[:, b], m)
        return result

    def inner(self, p: Tensor, h: Tensor) -> Tensor:
        """(Pᵀ H) on Ω, for P, H (T, n): the gradient of the values, (|Ω|,)."""
        pairs = zip(self.rows, self.columns, strict=True)
        return torch.cat([(p[:, a] * h[:, b]).sum(0) for a, b in pairs])


class Positions(nn.Module):
    """Ω of any positions in M, (n, n); they are stored with the values, which mean nothing without them."""

    flat: Tensor  # row · n + column of each, (|Ω|,)

    def __init__(self, n: int, flat: Tensor) -> None:
        super().__init__()
        self.n, self.size = n, len(flat)
        self.register_buffer("flat", flat.int())

    def times(self, values: Tensor, h: Tensor, transposed: bool = False) -> Tensor:
        """H Mᵀ, or H M, for H (T, n)."""
        m = values.new_zeros(self.n * self.n).index_put((self.flat,), values).view(self.n, self.n)
        return h @ (m if transposed else m.T)

    def inner(self, p: Tensor, h: Tensor) -> Tensor:
        """(Pᵀ H) on Ω, for P, H (T, n): the gradient of the values, (|Ω|,)."""
        return (p.T @ h).flatten().index_select(0, self.flat)


class SVFTLayer(FullRankLayer, Castable):
    """Runs with a weight of its own, ``W + U M Vᵀ``, or in the singular basis, ``x V (Σ + M)ᵀ Uᵀ + b``."""

    paths: ClassVar[tuple[str, ...]] = ("materialised", "svd")
    undecayed: ClassVar[frozenset[str]] = frozenset({"gate"})
    u: Tensor
    s: Tensor
    vt: Tensor
    gate: nn.Parameter | None

    def __init__(self, slot: Slot, svd: SVD, omega: Band | Positions, settings: SVFT) -> None:
        super().__init__(slot)
        stored, reference = settings.stores(svd), settings.start == "reference"
        for name, factor in svd._asdict().items():
            self.register_buffer(name, factor.clone() if stored else factor, persistent=stored)
        self.omega, size = omega, omega.size
        drawn = torch.randn(size, generator=generator_for(slot.name)) if reference else torch.zeros(size)
        self.values = nn.Parameter(math.sqrt(2 / size) * drawn)
        self.gate = nn.Parameter(torch.zeros(())) if reference or settings.gate else None

    def m(self) -> Tensor:
        """The entries of M on Ω, (|Ω|,)."""
        return self.values if self.gate is None else self.values * self.gate.sigmoid()

    def frozen_tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.u, self.s, self.vt

    def delta(self) -> Tensor:
        return self.build(self.u.dtype)

    def build(self, dtype: torch.dtype) -> Tensor:
        u, _, _ = self.frozen(dtype)
        built: Tensor = u.to(dtype) @ self.omega.times(self.m(), self.vt.T).T.to(dtype)
        return built

    def pullback(self, gradient: Tensor) -> list[Tensor]:
        u, _, _ = self.frozen(gradient.dtype)
        dm = self.omega.inner((gradient.T @ u.to(gradient.dtype)).to(self.vt.dtype), self.vt.T)
        if self.gate is None:
            return [dm]
        factor = self.gate.sigmoid()
        return [dm * factor, dm @ self.values * factor * (1 - factor)]

    def change(self, x: Tensor, dtype: torch.dtype) -> Change:
        if not self.dropping and self.choose(x.numel() // x.shape[-1]) == "svd":
            return Change(product=lambda x: self.product(x, dtype))
        return super().change(x, dtype)

    def choose(self, tokens: int) -> str:
        """In the singular basis where that costs fewer multiply-accumulates, and only where the factors are exact."""
        if self.path != "auto":
            return self.path
        slot = self.slot
        if slot.projection.product_dtype(self.u.device).itemsize < 4:
            return "materialised"
        out, into = slot.out_features, slot.in_features
        n, frozen = min(out, into), 2 * tokens * out * into
        all_rows = slot.part == slot.projection.whole or len(slot.projection.adapters) == len(slot.projection.sizes)
        svd = 2 * tokens * n * (out + into) + (0 if all_rows else frozen)  # other rows need the frozen product anyway
        materialised = frozen + tokens * out * into + 2 * n * out * into
        return "svd" if svd <= materialised else "materialised"

    def product(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """``x V (Σ + M)ᵀ Uᵀ + b``, (..., out)."""
        bias = self.slot.bias
        bias = None if bias is None else bias.to(dtype)
        x, m = x.to(dtype), self.m().to(dtype)
        u, s, vt = (t.to(dtype) for t in self.frozen(dtype))
        if torch.compiler.is_compiling():
            h = F.linear(x, vt).flatten(0, -2)
            z = self.omega.times(m, h) + h * s
            y: Tensor = F.linear(z, u, bias).unflatten(0, x.shape[:-1])
        else:
            y = SingularProduct.apply(x, m, bias, self.omega, u, s, vt)
        return y


class SingularProduct(torch.autograd.Function):
    """``x V (Σ + M)ᵀ Uᵀ + b``: x V, (T, n), is all that it keeps, and no (out, in) gradient is formed."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, m: Tensor, bias: Tensor | None, omega: Band | Positions, u: Tensor, s: Tensor, vt: Tensor
    ) -> Tensor:
        """Returns y, (..., out), for x, (..., in), and M's entries, (|Ω|,), in one dtype."""
        h = x.reshape(-1, x.shape[-1]) @ vt.T
        z = omega.times(m, h).addcmul_(h, s)
        y = z @ u.T if bias is None else torch.addmm(bias, z, u.T)
        ctx.save_for_backward(h, m, u, s, vt)
        ctx.omega, ctx.shape = omega, x.shape
        return y.view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        """Gradients of x, M on Ω, and b: (gU)(Σ + M)Vᵀ, ((gU)ᵀ(xV))_Ω and Σ_t g."""
        h, m, u, s, vt = ctx.saved_tensors
        to_x, to_m, to_bias = ctx.needs_input_grad[:3]
        g = gradient.reshape(-1, gradient.shape[-1])
        p = g @ u
        dx = (ctx.omega.times(m, p, transposed=True).addcmul_(p, s) @ vt).view(ctx.shape) if to_x else None
        dm = ctx.omega.inner(p, h) if to_m else None
        return (dx, dm, g.sum(0) if to_bias else None, None, None, None, None)
