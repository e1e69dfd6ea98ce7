"""Slots: the named, frozen projections that adapters attach to.

A *projection* is one frozen product ``y = x Wᵀ + b``. Its output rows may be divided into parts, as the fused q, k, v
of attention are; each part, and the whole, is a *slot* with a canonical name such as ``image.3.q`` or ``image.3.qkv``.
Frozen parts of one projection always share one product, and the frozen weight is never written. What an adapter does
to it is said by its layer, as a :class:`Change`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, ClassVar, Literal, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kshot.errors import UserError
from kshot.holding import Castable, Holder, one_pass, restored
from kshot.products import Factors, Term, low_rank_product

Path = Literal["auto", "factorised", "materialised", "svd"]


class Change(NamedTuple):
    """How a layer changes the product of its rows in one forward pass."""

    weight: Tensor | None = None  # (out, in), in the place of the frozen rows, with its gradient
    terms: Sequence[Factors] = ()  # added in the same product as the frozen weight
    folded: bool = False  # ``weight`` holds the terms already, and only their gradients are to be taken
    product: Callable[[Tensor], Tensor] | None = None  # from (..., in) to (..., out), in place of the product
    after: Callable[[Tensor, Tensor], Tensor] | None = None  # from input and output, when the product is done


class AdapterLayer(nn.Module, ABC):
    """One method's change of one slot. Holds the trainable tensors; the frozen weight stays in the slot."""

    mergeable: ClassVar[bool] = True  # False when the change depends on the input: no single weight expresses it
    # The ways in which the layer can run; the first is taken unless a cost model or the user says otherwise.
    paths: ClassVar[tuple[str, ...]] = ("materialised",)
    # Trainable tensors that weight decay must leave alone, because zero is not where they stand for no change.
    undecayed: ClassVar[frozenset[str]] = frozenset()
    path: Path = "auto"  # the way that is forced, or ``auto``
    wise_alpha: float = 1.0  # how much of the change evaluation takes
    dropout: float = 0.0  # probability on the input of the change alone, in training

    def __init__(self, slot: Slot) -> None:
        super().__init__()
        self.slot = slot

    @abstractmethod
    def effective_weight(self) -> Tensor:
        """The adapted weight W', (out, in), with its gradient."""

    def evaluated_weight(self) -> Tensor:
        """What evaluation runs with, (out, in): W + α (W' - W), of WiSE-FT (Wortsman et al. 2022, arXiv:2109.01903)."""
        adapted = self.effective_weight()
        if self.wise_alpha == 1:
            return adapted
        return torch.lerp(self.slot.weight.to(adapted.dtype), adapted, self.wise_alpha)

    def present_change(self, x: Tensor, dtype: torch.dtype) -> Change:
        """:meth:`change` as the layer's mode has it."""
        if self.training or self.wise_alpha == 1:
            return self.change(x, dtype)
        with torch.autocast(x.device.type, enabled=False):
            return Change(weight=self.evaluated_weight())

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """The adapted output, (..., out), from the input x, (..., in), and the frozen output y = x Wᵀ + b."""
        change = self.effective_weight() - self.slot.weight
        return y + F.linear(self.dropped(x), change.to(x.dtype))

    def change(self, x: Tensor, dtype: torch.dtype) -> Change:
        """What the layer does to the product of its rows with x, (..., in), which runs in a dtype."""
        if self.dropping or self.choose(x.numel() // x.shape[-1]) == "factorised":
            return Change(after=self.forward)
        return Change(weight=self.running_weight(dtype))

    @property
    def dropping(self) -> bool:
        """Whether dropout is active: the change then sees another input than the frozen product."""
        return self.dropout > 0 and self.training

    def dropped(self, x: Tensor) -> Tensor:
        """The input of the change, with dropout in training."""
        return F.dropout(x, self.dropout, self.training)

    def choose(self, tokens: int) -> str:  # noqa: ARG002  for subclasses
        """The path to run on this many tokens."""
        return self.paths[0] if self.path == "auto" else self.path

    def running_weight(self, dtype: torch.dtype) -> Tensor:
        """W' for the materialised path, (out, in), in the dtype of the product, with its gradient."""
        return self.effective_weight().to(dtype)

    def stored(self) -> dict[str, Tensor] | None:
        """What the small file holds in place of the trainable tensors, by name within this layer; None: themselves."""
        return None

    def from_stored(self, saved: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The trainable tensors, and what else was saved, from what a file holds: the inverse of :meth:`stored`.

        A layer whose shapes follow from training takes them on here.
        """
        return dict(saved)


class Projection(Holder, Castable):
    """A frozen linear map whose output rows form one or more slots.

    Args:
        weight: (out, in), kept without a copy.
        bias: (out,) or None.
        parts: number of rows of each part, in order; they sum to ``out``.
        place: where in the backbone, ``<tower>.<block>``: its slots are ``<place>.<part>``.

    Attributes:
        whole: name of all parts together.
        rows: the output rows of each part, and of the whole.
        enabled: False while the model runs as if nothing were attached.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, parts: Mapping[str, int], place: str = "") -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        ends = list(accumulate(parts.values()))
        assert ends[-1] == self.out_features
        self.weight = nn.Parameter(weight.detach(), requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)
        self.sizes = dict(parts)
        self.whole = "".join(parts)
        self.rows = {part: slice(end - size, end) for (part, size), end in zip(parts.items(), ends, strict=True)}
        self.rows[self.whole] = slice(0, self.out_features)
        self.place = place
        self.adapters = nn.ModuleDict()
        self.enabled = True

    @classmethod
    def from_linear(cls, linear: nn.Linear, part: str, place: str = "") -> Projection:
        """Takes over the weight of a plain linear layer, as one slot."""
        return cls(linear.weight, linear.bias, {part: linear.out_features}, place)

    def slot(self, part: str) -> Slot:
        """The slot of a part, or of the whole."""
        return Slot(f"{self.place}.{part}", self, part)

    @property
    def runs_layers(self) -> bool:
        """Whether adapter layers are attached and not left out, nor merged for now."""
        return bool(self.adapters) and self.enabled and self.held is None

    def layers(self) -> dict[str, AdapterLayer]:
        """The attached adapter layers by part."""
        return {part: cast(AdapterLayer, layer) for part, layer in self.adapters.items()}

    def with_rows(self, rows: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
        """The frozen weight with the rows of some parts replaced, (out, in)."""
        if self.whole in rows:
            return rows[self.whole].to(dtype)
        frozen, _ = self.frozen(dtype)
        return torch.cat([(rows[p] if p in rows else frozen[self.rows[p]]).to(dtype) for p in self.sizes])

    def effective_weight(self) -> Tensor:
        """The weight with adapters folded in as evaluation has them, (out, in), in its own dtype, with its gradient."""
        rows = {part: layer.evaluated_weight() for part, layer in self.layers().items()}
        return self.with_rows(rows, self.weight.dtype) if rows else self.weight

    def split(self, x: Tensor) -> tuple[Tensor, ...]:
        """Maps x, (..., in), to one tensor a part, (..., rows of the part)."""
        dtype = self.product_dtype(x.device)
        if self.runs_layers:
            return self._adapted(x, dtype)
        weight, bias = self.frozen(dtype)
        if self.held is not None and self.enabled:
            weight = self.held
        return self._parts(F.linear(x, weight, bias))

    def forward(self, x: Tensor) -> Tensor:
        """Maps x, (..., in), to (..., out)."""
        parts = self.split(x)
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)

    def _parts(self, y: Tensor) -> tuple[Tensor, ...]:
        return (y,) if len(self.sizes) == 1 else torch.split(y, list(self.sizes.values()), dim=-1)

    def product_dtype(self, device: torch.device) -> torch.dtype:
        """The dtype that the product runs in: autocast's, unless the weight is of double precision."""
        if torch.is_autocast_enabled(device.type) and self.weight.dtype != torch.float64:
            return torch.get_autocast_dtype(device.type)
        return self.weight.dtype

    def frozen_tensors(self) -> tuple[Tensor, Tensor | None]:
        return self.weight, self.bias

    def _adapted(self, x: Tensor, dtype: torch.dtype) -> tuple[Tensor, ...]:
        changes = {part: layer.present_change(x, dtype) for part, layer in self.layers().items()}

        def done(part: str, y: Tensor | None) -> Tensor:
            change = changes.get(part, Change())
            if change.product is not None:
                y = change.product(x)
            assert y is not None, "rows without a product of their own share that of the projection"
            return y if change.after is None else change.after(x, y)

        own = [part for part, change in changes.items() if change.product is not None]
        if self.whole in own:
            return self._parts(done(self.whole, None))
        if len(own) == len(self.sizes):
            return tuple(done(part, None) for part in self.sizes)
        weight, bias = self.frozen(dtype)
        rows = {part: change.weight for part, change in changes.items() if change.weight is not None}
        if rows:
            weight = self.with_rows(rows, dtype)
        terms = [Term(self.rows[p], term, not change.folded) for p, change in changes.items() for term in change.terms]
        y = low_rank_product(x.to(dtype), weight, bias, terms) if terms else F.linear(x, weight, bias)
        if self.whole in changes:
            return self._parts(done(self.whole, y))
        return tuple(done(part, part_of_y) for part, part_of_y in zip(self.sizes, self._parts(y), strict=True))

    def hold(self) -> Tensor | None:
        """The effective weight in the dtype of products, (out, in); None where the frozen one will do."""
        dtype = self.product_dtype(self.weight.device)
        mergeable = all(layer.mergeable for layer in self.layers().values())
        if not mergeable or (not self.adapters and self.frozen(dtype)[0].dtype == dtype):
            return None
        with torch.autocast(self.weight.device.type, enabled=False):
            return self.effective_weight().detach().to(dtype)


@dataclass(frozen=True)
class Slot:
    """A named part of a projection, or the whole: all that an adapter knows of the model it adapts."""

    name: str
    projection: Projection
    part: str

    @property
    def rows(self) -> slice:
        """The rows of the projection's output."""
        return self.projection.rows[self.part]

    @property
    def weight(self) -> Tensor:
        """The frozen weight, (out, in): a view."""
        return self.projection.weight[self.rows]

    @property
    def bias(self) -> Tensor | None:
        """The frozen bias, (out,): a view, or None."""
        bias = self.projection.bias
        return None if bias is None else bias[self.rows]

    @property
    def in_features(self) -> int:
        """Width of the input."""
        return self.projection.in_features

    @property
    def out_features(self) -> int:
        """Width of the output."""
        return int(self.rows.stop - self.rows.start)

    def taken(self) -> str | None:
        """The name of the slot whose layer holds some of these rows already."""
        whole = self.projection.whole
        held = [p for p in self.projection.adapters if p == self.part or whole in (p, self.part)]
        return self.name.removesuffix(self.part) + held[0] if held else None

    def attach(self, layer: AdapterLayer) -> None:
        """Puts an adapter layer here; rows take one."""
        assert self.taken() is None, f"{self.taken()} is adapted already"
        self.projection.adapters[self.part] = layer


def projections_of(model: nn.Module) -> list[Projection]:
    """All projections of a model."""
    return [module for module in model.modules() if isinstance(module, Projection)]


def merge(model: nn.Module, keep: bool = True) -> None:
    """Folds every adapter into the weight it changes: the model then costs what it cost before.

    Args:
        model: a backbone, or anything that holds one.
        keep: keep adapters and frozen weights, so that :func:`unmerge` restores the model to the bit; False removes
            them, and leaves the library's own modules under the library's own names.

    Raises:
        UserError: it is merged already, or a method depends on its input; nothing is changed then.
    """
    adapted = [projection for projection in projections_of(model) if projection.adapters]
    for projection in adapted:
        if projection.held is not None:
            raise UserError("The adapters are merged already: unmerge first.")
        for layer in projection.layers().values():
            if not layer.mergeable:
                method = type(layer).__name__.removesuffix("Layer")
                raise UserError(f"{method} on {layer.slot.name} depends on its input: no weight expresses it.")
    modules: list[Any] = [] if keep else [m for m in model.modules() if hasattr(m, "restore_library")]
    for backbone in modules:
        backbone.settle()
    with torch.inference_mode(False), torch.no_grad(), one_pass(model):
        for projection in adapted:
            if keep:
                projection.held = projection.hold()
                continue
            projection.weight = nn.Parameter(projection.effective_weight(), requires_grad=False)
            projection.adapters.clear()
    for backbone in modules:
        backbone.restore_library()


def unmerge(model: nn.Module) -> None:
    """Takes merged adapters out of the weights again, exactly."""
    for projection in projections_of(model):
        projection.held = None


@contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """Runs a model as if no adapter were attached."""
    projections = projections_of(model)
    with restored(projections, "enabled"):
        for projection in projections:
            projection.enabled = False
        yield
