"""Adapter layers: how a method's change of one slot is expressed, and the products that run it.

A change is expressed in one of three ways, and each has its quickest form here:

* :class:`LowRankLayer`, ΔW = up · down with a small inner size: added to the frozen output token by token
  (*factorised*), or folded into the weight once per optimizer step while its gradient is still taken through the small
  factors (*materialised*);
* :class:`FullRankLayer`, any ΔW: formed once per optimizer step and pulled back from the gradient of the weight;
* :class:`AdapterLayer` itself, for everything else: a weight, or an output, by ordinary autograd.

Every path gives the same output and the same gradients to rounding.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from kshot.memo import Memo

if TYPE_CHECKING:
    from kshot.slots import Slot

Path = Literal["auto", "factorised", "materialised", "svd"]

# Cost of one pass over a weight (read, add, write, cast), in multiply-accumulates of a product: measured 8 in float32
# and 20 in bfloat16 on a CPU core; memory-bound accelerators lie higher.
WEIGHT_PASS = 20
WORTHWHILE = 0.75  # a materialised weight takes memory: it has to save at least a quarter


class AdapterLayer(nn.Module, ABC):
    """One method's change of one slot. Holds the trainable tensors; the frozen weight stays in the slot.

    Attributes:
        slot: what is adapted.
        mergeable: False when the change depends on the input, so that no single weight expresses it.
        paths: the ways in which the layer can run; the first is taken unless a cost model or the user says otherwise.
        path: the way that is forced, or ``auto``.
        dropout: probability on the input of the change alone, in training.
        undecayed: names of trainable tensors that weight decay must leave alone, because zero is not where they stand
            for no change.
    """

    mergeable: ClassVar[bool] = True
    paths: ClassVar[tuple[str, ...]] = ("materialised",)
    undecayed: ClassVar[frozenset[str]] = frozenset()
    path: Path = "auto"
    dropout: float = 0.0

    def __init__(self, slot: Slot) -> None:
        super().__init__()
        self.slot = slot

    @abstractmethod
    def effective_weight(self) -> Tensor:
        """The adapted weight W', (out, in), with its gradient."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """The adapted output, (..., out), from the input x, (..., in), and the frozen output y = x Wᵀ + b."""
        return y + F.linear(self.dropped(x), self.effective_weight() - self.slot.weight)

    def dropped(self, x: Tensor) -> Tensor:
        """The input of the change, with dropout in training."""
        return F.dropout(x, self.dropout, self.training)

    def sources(self) -> list[nn.Parameter]:
        """Every trainable tensor that the change depends on, those that it shares with other layers included."""
        return [p for p in self.parameters() if p.requires_grad]

    def choose(self, tokens: int) -> str:  # noqa: ARG002  for subclasses
        """The path to run on this many tokens."""
        return self.paths[0] if self.path == "auto" else self.path

    def running_weight(self, dtype: torch.dtype) -> Tensor:
        """W' for the materialised path, (out, in), in the dtype of the product, with its gradient."""
        return self.effective_weight().to(dtype)

    def finish(self, y: Tensor) -> Tensor:
        """What remains to be done with the output, (..., out), after low-rank terms were added."""
        return y

    def fit_shapes(self, saved: Mapping[str, Tensor]) -> None:
        """Takes on the shapes of saved tensors, by name within this layer, where a method changes shapes."""

    def stored(self) -> dict[str, Tensor] | None:
        """What the small file holds in place of the trainable tensors, by name within this layer; None: themselves."""
        return None

    def from_stored(self, saved: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The trainable tensors, and what else was saved, from what a file holds: the inverse of :meth:`stored`."""
        return dict(saved)


class Factors(NamedTuple):
    """One low-rank term, up · down.

    Attributes:
        up: (out, k), scale included.
        down: (k, in).
    """

    up: Tensor
    down: Tensor


class LowRankLayer(AdapterLayer):
    """A change that is a sum of products of thin factors."""

    paths: ClassVar[tuple[str, ...]] = ("factorised", "materialised")

    @abstractmethod
    def factors(self) -> Sequence[Factors]:
        """The terms of ΔW, with their gradients."""

    def delta(self, dtype: torch.dtype | None = None) -> Tensor:
        """ΔW, (out, in), by products in ``dtype``; None takes that of the factors."""
        terms = self.factors()
        return sum_of_products(terms if dtype is None else [Factors(u.to(dtype), d.to(dtype)) for u, d in terms])

    def effective_weight(self) -> Tensor:
        return self.slot.weight + self.delta()

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        if self.choose(x.numel() // x.shape[-1]) == "materialised":
            return super().forward(x, y)
        x = self.dropped(x)
        for up, down in self.factors():
            y = y + F.linear(F.linear(x, down), up)
        return self.finish(y)

    def choose(self, tokens: int) -> str:
        if self.path != "auto":
            return self.path
        factorised, materialised = self.costs(tokens)
        return "materialised" if materialised < WORTHWHILE * factorised else "factorised"

    def costs(self, tokens: int) -> tuple[float, float]:
        """Multiply-accumulates per step beyond the frozen product: factorised, materialised.

        Both project gradients onto the factors. Materialised saves the factors' products in the forward pass and
        towards the input, and pays for the weight once per step.
        """
        out, into = self.slot.out_features, self.slot.in_features
        factorised, materialised = 0.0, 0.0
        for k, up, down in self.terms():
            gradients = (out + into) * down + (out + into * (not down)) * up
            factorised += tokens * k * (2 * (out + into) + into * down + out * up)
            materialised += tokens * k * gradients + out * into * (k + WEIGHT_PASS)
        return factorised, materialised

    def terms(self) -> list[tuple[int, bool, bool]]:
        """Of each term: its inner size, and whether its up and its down train; found once for each shape."""
        shapes = tuple(p.shape for p in self.parameters())
        if getattr(self, "_shapes", None) != shapes:
            with torch.enable_grad():
                self._terms = [(len(down), up.requires_grad, down.requires_grad) for up, down in self.factors()]
            self._shapes = shapes
        return self._terms


def sum_of_products(terms: Sequence[Factors]) -> Tensor:
    """Σ up · down, (out, in)."""
    if len(terms) == 1:
        return terms[0].up @ terms[0].down
    return torch.cat([t.up for t in terms], 1) @ torch.cat([t.down for t in terms])


class FullRankLayer(AdapterLayer):
    """A change of any rank. ``build`` and ``pullback`` may be given a quicker form than autograd finds."""

    @abstractmethod
    def delta(self) -> Tensor:
        """ΔW, (out, in), with its gradient, by plain operations."""

    def effective_weight(self) -> Tensor:
        return self.slot.weight + self.delta()

    def build(self, dtype: torch.dtype) -> Tensor:  # noqa: ARG002  for subclasses
        """ΔW, (out, in), without gradient; products in ``dtype`` are exact enough."""
        return self.delta()

    def pullback(self, gradient: Tensor) -> Sequence[Tensor | None]:
        """Gradients of :meth:`sources` from that of the weight, (out, in): the adjoint of :meth:`delta`."""
        with torch.enable_grad():
            delta = self.delta()
        return torch.autograd.grad(delta, self.sources(), gradient.to(delta.dtype), allow_unused=True)

    def running_weight(self, dtype: torch.dtype) -> Tensor:
        if torch.compiler.is_compiling():
            return super().running_weight(dtype)
        kept: Tensor = Materialise.apply(self, dtype, *self.sources())
        return kept

    def kept_weight(self, dtype: torch.dtype) -> Tensor:
        """W' without gradient, formed once per optimizer step."""
        if not hasattr(self, "_kept"):
            self._kept: Memo[Tensor] = Memo()
        weight = self.slot.projection.frozen_weight

        def form() -> Tensor:
            frozen = self.slot.weight
            return torch.add(frozen, self.build(dtype), out=torch.empty_like(frozen, dtype=dtype))

        return self._kept.get([weight, *self.sources()], form, key=dtype)


class Materialise(torch.autograd.Function):
    """Hands out a layer's kept weight and pulls its gradient back; a further micro-batch forms no weight again."""

    @staticmethod
    def forward(ctx: Any, layer: FullRankLayer, dtype: torch.dtype, *sources: Tensor) -> Tensor:
        """Returns W', (out, in)."""
        ctx.layer = layer
        ctx.save_for_backward(*sources)  # so that autograd notices when they change before the backward pass
        return layer.kept_weight(dtype).detach()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        """Gradients of the sources."""
        _ = ctx.saved_tensors  # raises if a source changed since the forward pass
        return (None, None, *ctx.layer.pullback(gradient))


class LowRankProduct(torch.autograd.Function):
    """``y = x Wᵀ + b`` with low-rank terms on blocks of its rows, in as few passes as there can be.

    With ``added`` the terms are added to the output. Without it, W holds them already, and only their gradients are
    taken. Either way no (out, in) gradient is formed, x is kept only if a ``down`` trains, and what the terms add to
    the output and to the gradient of x is accumulated in place.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        added: bool,
        rows: tuple[slice, ...],
        *factors: Tensor,
    ) -> Tensor:
        """Returns y, (..., out), for x, (..., in), and up, down, up, down, ... in one dtype."""
        flat = x.reshape(-1, x.shape[-1])
        ups, downs = factors[::2], factors[1::2]
        train_ups, train_downs = ctx.needs_input_grad[5::2], ctx.needs_input_grad[6::2]
        y = flat @ weight.T if bias is None else torch.addmm(bias, flat, weight.T)
        down = downs[0] if len(downs) == 1 else torch.cat(downs)
        h = flat @ down.T if added or any(train_ups) else None
        if added and h is not None:
            for block, up, part in zip(rows, ups, h.split([d.shape[0] for d in downs], 1), strict=True):
                y[:, block].addmm_(part, up.T)
        keep_x = ctx.needs_input_grad[1] or any(train_downs)
        ctx.save_for_backward(flat if keep_x else None, h if any(train_ups) else None, weight, down, *ups)
        ctx.added, ctx.rows, ctx.sizes, ctx.shape = added, rows, [d.shape[0] for d in downs], x.shape
        return y.view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        """Gradients of x, W and the factors."""
        flat, h, weight, down, *ups = ctx.saved_tensors
        g = gradient.reshape(-1, gradient.shape[-1])
        train_ups, train_downs = ctx.needs_input_grad[5::2], ctx.needs_input_grad[6::2]
        to_x = ctx.needs_input_grad[0] and ctx.added
        through = [  # (T, k): the gradient as the inner size of each term sees it
            g[:, block] @ up if to_x or train else None
            for block, up, train in zip(ctx.rows, ups, train_downs, strict=True)
        ]
        dx = g @ weight if ctx.needs_input_grad[0] else None
        if dx is not None and to_x:
            inner = [t for t in through if t is not None]
            dx.addmm_(inner[0] if len(inner) == 1 else torch.cat(inner, 1), down)
        factors: list[Tensor | None] = []
        parts = h.split(ctx.sizes, 1) if h is not None else [None] * len(ups)
        for block, part, seen, train_up, train_down in zip(
            ctx.rows, parts, through, train_ups, train_downs, strict=True
        ):
            factors += [
                g[:, block].T @ part if train_up and part is not None else None,
                seen.T @ flat if train_down and seen is not None else None,
            ]
        dweight = g.T @ flat if ctx.needs_input_grad[1] else None
        return (dx.view(ctx.shape) if dx is not None else None, dweight, None, None, None, *factors)
