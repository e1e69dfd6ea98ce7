"""Slots: the named, frozen projections that adapters attach to.

A *projection* is one frozen product ``y = x Wᵀ + b``. Its output rows may be divided into parts, as the fused q, k, v
of attention are; each part, and the whole, is a *slot* with a canonical name such as ``image.3.q`` or ``image.3.qkv``.
Whatever module a backbone's library used, an adapter sees the same four things: in, out, weight and bias.

How a slot runs is decided here and nowhere else:

* frozen parts of one projection always share one product;
* under autocast the cast of a frozen weight is kept, not repeated;
* a *factorised* adapter adds to the output of its rows, a *materialised* one replaces its rows of the weight, one in
  the basis of its own (*svd*) replaces the product;
* without gradients, in evaluation, all mergeable adapters are folded into one kept weight, and the frozen weight is
  left alone, so that unmerging is exact to the bit.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol, cast, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kshot.errors import UserError
from kshot.layers import AdapterLayer, Factors, LowRankLayer, LowRankProduct
from kshot.memo import Memo


@runtime_checkable
class OwnProduct(Protocol):
    """A layer with a path that replaces the frozen product instead of adding to it."""

    def product(self, x: Tensor) -> Tensor:
        """The adapted output, (..., out), bias included, from the input, (..., in)."""
        ...


class Projection(nn.Module):
    """A frozen linear map whose output rows form one or more slots.

    Args:
        weight: (out, in), kept without a copy.
        bias: (out,) or None.
        parts: rows of each part, in order; they sum to ``out``.
    """

    unmerged: nn.Parameter | None  # the frozen weight while ``weight`` holds a merged one

    def __init__(self, weight: Tensor, bias: Tensor | None, parts: Mapping[str, int]) -> None:
        super().__init__()
        assert sum(parts.values()) == weight.shape[0]
        self.weight = nn.Parameter(weight.detach(), requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)
        self.register_parameter("unmerged", None)
        self.sizes = dict(parts)
        self.whole = "".join(parts)
        self.adapters = nn.ModuleDict()
        self.enabled = True
        self._merged: Memo[Tensor] = Memo()
        self._materialised: Memo[Tensor] = Memo()
        self._cast: Memo[tuple[Tensor, Tensor | None]] = Memo()

    @classmethod
    def from_linear(cls, linear: nn.Linear, part: str) -> Projection:
        """Takes over the weight of a plain linear layer, as one slot."""
        return cls(linear.weight, linear.bias, {part: linear.out_features})

    @property
    def in_features(self) -> int:
        """Width of the input."""
        return self.weight.shape[1]

    @property
    def out_features(self) -> int:
        """Width of the output, all parts together."""
        return self.weight.shape[0]

    @property
    def frozen_weight(self) -> nn.Parameter:
        """The weight without adapters, (out, in)."""
        return self.weight if self.unmerged is None else self.unmerged

    def rows(self, part: str) -> slice:
        """The output rows that belong to a part, or to the whole."""
        if part == self.whole:
            return slice(0, self.out_features)
        start = 0
        for name, size in self.sizes.items():
            if name == part:
                return slice(start, start + size)
            start += size
        raise KeyError(part)

    def layers(self) -> dict[str, AdapterLayer]:
        """The attached adapter layers by part."""
        return {part: cast(AdapterLayer, layer) for part, layer in self.adapters.items()}

    def sources(self) -> list[nn.Parameter]:
        """Every trainable tensor that the adapters here depend on."""
        return [p for layer in self.layers().values() for p in layer.sources()]

    def with_rows(self, rows: Mapping[str, Tensor]) -> Tensor:
        """The frozen weight with the rows of some parts replaced, (out, in)."""
        if not rows:
            return self.frozen_weight
        if self.whole in rows:
            return rows[self.whole]
        blocks = [rows[p] if p in rows else self.frozen_weight[self.rows(p)] for p in self.sizes]
        return torch.cat([b.to(next(iter(rows.values())).dtype) for b in blocks])

    def effective_weight(self) -> Tensor:
        """The weight with adapters folded in, (out, in), with its gradient."""
        return self.with_rows({part: layer.effective_weight() for part, layer in self.layers().items()})

    # ------------------------------------------------------------------------------------------------ running

    def split(self, x: Tensor) -> tuple[Tensor, ...]:
        """Maps x, (..., in), to one tensor a part, (..., rows of the part)."""
        layers = self.layers() if self.enabled and self.unmerged is None else {}
        merge = not torch.is_grad_enabled() and all(v.mergeable and not v.training for v in layers.values())
        if layers and not merge:
            return self._adapted(x, layers)
        dtype = self.product_dtype(x)
        weight, bias = self._frozen(dtype)
        if layers and torch.compiler.is_compiling():
            weight = self.effective_weight()
        elif layers:
            sources = [self.weight, *self.sources()]
            weight = self._merged.get(sources, lambda: self.effective_weight().to(dtype), key=dtype)
        return self._parts(F.linear(x, weight, bias))

    def forward(self, x: Tensor) -> Tensor:
        """Maps x, (..., in), to (..., out)."""
        parts = self.split(x)
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)

    def _parts(self, y: Tensor) -> tuple[Tensor, ...]:
        return (y,) if len(self.sizes) == 1 else torch.split(y, list(self.sizes.values()), dim=-1)

    def product_dtype(self, x: Tensor) -> torch.dtype:
        """The dtype that the product runs in: autocast's, unless the weight is of double precision."""
        device = x.device.type
        if torch.is_autocast_enabled(device) and self.weight.dtype != torch.float64:
            return torch.get_autocast_dtype(device)
        return self.weight.dtype

    def _frozen(self, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
        """Weight and bias for a product, cast once; autocast would cast a frozen weight in every call."""
        weight, bias = self.weight if self.enabled else self.frozen_weight, self.bias
        trained = weight.requires_grad or (bias is not None and bias.requires_grad)
        if dtype == weight.dtype or trained or torch.compiler.is_compiling():
            return weight, bias
        tensors = [weight] if bias is None else [weight, bias]
        return self._cast.get(tensors, lambda: (weight.to(dtype), None if bias is None else bias.to(dtype)), key=dtype)

    def _adapted(self, x: Tensor, layers: dict[str, AdapterLayer]) -> tuple[Tensor, ...]:
        """Runs the adapters, each on its path; dropout on a change's input leaves only the path beside the product."""
        tokens = x.numel() // x.shape[-1]
        beside = {p: layer for p, layer in layers.items() if layer.dropout > 0 and layer.training}
        chosen = {p: layer.choose(tokens) for p, layer in layers.items() if p not in beside}
        products = {p: v for p, v in layers.items() if chosen.get(p) == "svd" and isinstance(v, OwnProduct)}
        if len(products) == len(layers) and (self.whole in products or len(products) == len(self.sizes)):
            return (
                self._parts(products[self.whole].product(x))
                if self.whole in products
                else tuple(products[p].product(x) for p in self.sizes)
            )
        thin = {p: v for p, v in layers.items() if isinstance(v, LowRankLayer) and p in chosen}
        replaced = {
            p: v for p, v in layers.items() if chosen.get(p) == "materialised" and not isinstance(v, LowRankLayer)
        }
        added = bool(replaced) or any(chosen[p] != "materialised" for p in thin)
        beside |= {p: v for p, v in layers.items() if p not in products and p not in thin and p not in replaced}
        dtype = self.product_dtype(x)
        weight, bias = self._frozen(dtype)
        if replaced:
            weight = self.with_rows({p: v.running_weight(dtype) for p, v in replaced.items()})
        if not thin:
            outputs = self._parts(F.linear(x, weight, bias))
        elif torch.compiler.is_compiling():
            outputs = self._parts(F.linear(x, weight, bias))
            beside |= thin
        else:
            if not added:
                weight = self._with_thin(thin, dtype)
            terms = [(self.rows(p), term) for p, layer in thin.items() for term in layer.factors()]
            y = low_rank_product(x.to(dtype), weight, bias, added, terms)
            outputs = self._parts(y)
        return self._finished(x, outputs, beside, products, {p: v for p, v in thin.items() if p not in beside})

    def _with_thin(self, thin: dict[str, LowRankLayer], dtype: torch.dtype) -> Tensor:
        """The weight with low-rank changes folded in, once per optimizer step; their gradients go another way."""

        def form() -> Tensor:  # a change rounded to the dtype of the product loses less than the sum will
            return self.with_rows({p: layer.slot.weight + layer.delta(dtype) for p, layer in thin.items()}).to(dtype)

        sources = [q for layer in thin.values() for q in layer.sources()]
        return self._materialised.get([self.weight, *sources], form, key=(dtype, *thin))

    def _finished(
        self,
        x: Tensor,
        outputs: tuple[Tensor, ...],
        beside: Mapping[str, AdapterLayer],
        products: Mapping[str, OwnProduct],
        thin: Mapping[str, LowRankLayer],
    ) -> tuple[Tensor, ...]:
        """Lets each layer do what it does to its own part of the output."""

        def done(part: str, y: Tensor) -> Tensor:
            if part in products:
                return products[part].product(x)
            if part in beside:
                adapted: Tensor = beside[part](x, y)
                return adapted
            return thin[part].finish(y) if part in thin else y

        if len(self.sizes) > 1 and (self.whole in beside or self.whole in products or self.whole in thin):
            return self._parts(done(self.whole, torch.cat(outputs, dim=-1)))
        return tuple(done(part, y) for part, y in zip(self.sizes, outputs, strict=True))

    # ------------------------------------------------------------------------------------------------ merging

    def merge(self) -> None:
        """Puts the merged weight in the place of the frozen one, which is kept."""
        with torch.no_grad():
            merged = self.effective_weight()
        self.unmerged, self.weight = self.weight, nn.Parameter(merged, requires_grad=False)

    def unmerge(self) -> None:
        """Puts the frozen weight back."""
        assert self.unmerged is not None
        self.weight, self.unmerged = self.unmerged, None


def low_rank_product(
    x: Tensor, weight: Tensor, bias: Tensor | None, added: bool, terms: list[tuple[slice, Factors]]
) -> Tensor:
    """:class:`LowRankProduct` with everything cast to the dtype of x."""
    factors = [t.to(x.dtype) for _, term in terms for t in term]
    rows = tuple(block for block, _ in terms)
    bias = None if bias is None else bias.to(x.dtype)
    y: Tensor = LowRankProduct.apply(x, weight.to(x.dtype), bias, added, rows, *factors)
    return y


@dataclass(frozen=True)
class Slot:
    """A named part of a projection, or the whole: all that an adapter knows of the model it adapts."""

    name: str
    projection: Projection
    part: str

    @property
    def weight(self) -> Tensor:
        """The frozen weight, (out, in): a view."""
        return self.projection.frozen_weight[self.projection.rows(self.part)]

    @property
    def bias(self) -> Tensor | None:
        """The frozen bias, (out,): a view, or None."""
        bias = self.projection.bias
        return None if bias is None else bias[self.projection.rows(self.part)]

    @property
    def in_features(self) -> int:
        """Width of the input."""
        return self.projection.in_features

    @property
    def out_features(self) -> int:
        """Width of the output."""
        rows = self.projection.rows(self.part)
        return int(rows.stop - rows.start)

    def taken(self) -> str | None:
        """The name of the slot whose layer holds some of these rows already."""
        whole = self.projection.whole
        held = [p for p in self.projection.adapters if p == self.part or whole in (p, self.part)]
        return self.name.removesuffix(self.part) + held[0] if held else None

    def attach(self, layer: AdapterLayer) -> None:
        """Puts an adapter layer here; rows take one."""
        assert self.taken() is None, f"{self.taken()} is adapted already"
        self.projection.adapters[self.part] = layer


def projections_of(model: nn.Module) -> dict[str, Projection]:
    """All projections of a model by module name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, Projection)}


def merge(model: nn.Module, keep: bool = True) -> None:
    """Folds every adapter into the weight it changes: the model then costs what it cost before.

    Args:
        model: a backbone, or anything that holds one.
        keep: keep adapters and frozen weights, so that :func:`unmerge` restores the model to the bit; False removes
            them and leaves a plain model.

    Raises:
        UserError: it is merged already, or a method depends on its input; nothing is changed then.
    """
    adapted = {name: p for name, p in projections_of(model).items() if p.adapters}
    for projection in adapted.values():
        if projection.unmerged is not None:
            raise UserError("The adapters are merged already: unmerge first.")
        for layer in projection.layers().values():
            if not layer.mergeable:
                method = type(layer).__name__.removesuffix("Layer")
                raise UserError(f"{method} on {layer.slot.name} depends on its input: no weight expresses it.")
    for projection in adapted.values():
        projection.merge()
        if not keep:
            projection.unmerged = None
            projection.adapters.clear()


def unmerge(model: nn.Module) -> None:
    """Takes merged adapters out of the weights again, exactly."""
    for projection in projections_of(model).values():
        if projection.unmerged is not None:
            projection.unmerge()


@contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """Runs a model as if no adapter were attached."""
    projections = list(projections_of(model).values())
    before = [p.enabled for p in projections]
    for projection in projections:
        projection.enabled = False
    try:
        yield
    finally:
        for projection, enabled in zip(projections, before, strict=True):
            projection.enabled = enabled
