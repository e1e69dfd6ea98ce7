"""Slots: the named, frozen projections that adapters attach to.

A *projection* is one frozen product ``y = x Wᵀ + b``. Its output rows may be divided into parts, as the fused q, k, v
of attention are; each part is a *slot* with a canonical name such as ``image.3.q``. Whatever module a backbone's
library used, an adapter sees the same four things: in, out, weight and bias.

How a slot runs is decided here and nowhere else:

* frozen parts of one projection always share one product;
* a *factorised* adapter adds to the frozen output of its part;
* a *materialised* adapter replaces its rows of the weight before the product;
* without gradients, in evaluation, all mergeable adapters are folded into one cached weight, and the frozen weight is
  left alone, so that unmerging is exact to the bit.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar, Generic, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

T = TypeVar("T")


class Memo(Generic[T]):
    """Keeps a value until one of the tensors that it was computed from changes: in place, by a move, or by a step."""

    optimizer_steps: ClassVar[int] = 0  # fused optimizers change parameters without raising their version

    def __init__(self) -> None:
        self._sources: list[Tensor] = []
        self._state: tuple[object, ...] | None = None
        self._value: T | None = None

    def get(self, sources: Iterable[Tensor], compute: Callable[[], T]) -> T:
        """Returns the kept value, or computes it anew outside autograd, autocast and inference mode."""
        now = list(sources)
        steps = Memo.optimizer_steps if any(t.requires_grad for t in now) else None
        state = (steps, *((t._version, t.device, t.dtype) for t in now))
        same = len(now) == len(self._sources) and all(a is b for a, b in zip(now, self._sources, strict=True))
        if not same or state != self._state:
            device = now[0].device.type if now else "cpu"
            with torch.inference_mode(False), torch.no_grad(), torch.autocast(device, enabled=False):
                self._value = compute()
            self._sources, self._state = now, state
        return cast(T, self._value)


def _count_step(*_: object) -> None:
    Memo.optimizer_steps += 1


register_optimizer_step_post_hook(_count_step)


class AdapterLayer(nn.Module, ABC):
    """One method's change of one slot. Holds the trainable tensors; the frozen weight stays in the slot.

    Attributes:
        slot: what is adapted.
        mergeable: False when the change depends on the input, so that no single weight expresses it.
        materialised: True to run through :meth:`effective_weight`, False to run through :meth:`forward`.
    """

    mergeable: ClassVar[bool] = True
    materialised: bool = False

    def __init__(self, slot: Slot) -> None:
        super().__init__()
        self.slot = slot

    @abstractmethod
    def effective_weight(self) -> Tensor:
        """The adapted weight W', (out, in)."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """The adapted output, (..., out), from the input x, (..., in), and the frozen output y = x Wᵀ + b."""
        return y + F.linear(x, self.effective_weight() - self.slot.weight)


class Projection(nn.Module):
    """A frozen linear map whose output rows form one or more slots.

    Args:
        weight: (out, in), kept without a copy.
        bias: (out,) or None.
        parts: rows of each part, in order; they sum to ``out``.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, parts: Mapping[str, int]) -> None:
        super().__init__()
        assert sum(parts.values()) == weight.shape[0]
        self.weight = nn.Parameter(weight.detach(), requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)
        self.sizes = dict(parts)
        self.adapters = nn.ModuleDict()
        self.enabled = True
        self._merged: Memo[Tensor] = Memo()

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

    def rows(self, part: str) -> slice:
        """The output rows that belong to a part."""
        start = 0
        for name, size in self.sizes.items():
            if name == part:
                return slice(start, start + size)
            start += size
        raise KeyError(part)

    def layers(self) -> dict[str, AdapterLayer]:
        """The attached adapter layers by part."""
        return {part: cast(AdapterLayer, layer) for part, layer in self.adapters.items()}

    def effective_weight(self, only_materialised: bool = False) -> Tensor:
        """The weight with adapters folded in, (out, in)."""
        layers = {p: layer for p, layer in self.layers().items() if layer.materialised or not only_materialised}
        if not layers:
            return self.weight
        rows = [layers[p].effective_weight() if p in layers else self.weight[self.rows(p)] for p in self.sizes]
        return rows[0] if len(rows) == 1 else torch.cat(rows)

    def split(self, x: Tensor) -> tuple[Tensor, ...]:
        """Maps x, (..., in), to one tensor a part, (..., rows of the part)."""
        layers = self.layers() if self.enabled else {}
        if not layers:
            return torch.split(F.linear(x, self.weight, self.bias), list(self.sizes.values()), dim=-1)
        if not torch.is_grad_enabled() and all(v.mergeable and not v.training for v in layers.values()):
            weight = self._merged.get([self.weight, *self.adapters.parameters()], self.effective_weight)
            return torch.split(F.linear(x, weight, self.bias), list(self.sizes.values()), dim=-1)
        frozen = F.linear(x, self.effective_weight(only_materialised=True), self.bias)
        outputs = torch.split(frozen, list(self.sizes.values()), dim=-1)
        return tuple(
            layers[part](x, y) if part in layers and not layers[part].materialised else y
            for part, y in zip(self.sizes, outputs, strict=True)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Maps x, (..., in), to (..., out)."""
        parts = self.split(x)
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)


@dataclass(frozen=True)
class Slot:
    """A named part of a projection: all that an adapter knows of the model it adapts."""

    name: str
    projection: Projection
    part: str

    @property
    def weight(self) -> Tensor:
        """The frozen weight, (out, in): a view."""
        return self.projection.weight[self.projection.rows(self.part)]

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
        return self.projection.sizes[self.part]

    def attach(self, layer: AdapterLayer) -> None:
        """Puts an adapter layer here; a slot takes one."""
        assert self.part not in self.projection.adapters, f"{self.name} is adapted already"
        self.projection.adapters[self.part] = layer


@contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """Runs a model as if no adapter were attached."""
    projections = [m for m in model.modules() if isinstance(m, Projection)]
    before = [p.enabled for p in projections]
    for projection in projections:
        projection.enabled = False
    try:
        yield
    finally:
        for projection, enabled in zip(projections, before, strict=True):
            projection.enabled = enabled
