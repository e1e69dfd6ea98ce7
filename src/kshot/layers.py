"""Two kinds of adapter layers that know quicker ways than a weight by ordinary autograd.

* :class:`LowRankLayer`, ΔW = up · down with a small inner size: added to the frozen output token by token
  (*factorised*), or folded into the weight while its gradient is still taken through the small factors
  (*materialised*);
* :class:`FullRankLayer`, any ΔW: formed once in a forward pass and pulled back from the gradient of the weight.

Every path gives the same output and the same gradients to rounding.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from kshot.products import Factors, sum_of_products
from kshot.slots import AdapterLayer, Change

WORTHWHILE = 0.75  # a materialised weight takes memory: it has to save at least a quarter


def weight_pass(device: torch.device) -> int:
    """Cost of one pass over a weight (read, add, write, cast), in multiply-accumulates of a product.

    On a CPU core 8 were measured in float32 and 20 in bfloat16. Accelerators multiply some 300 times in the time that
    they take to move two bytes: a pass moves about eight.
    """
    return 20 if device.type == "cpu" else 1200


class LowRankLayer(AdapterLayer):
    """A change that is a sum of products of thin factors."""

    paths: ClassVar[tuple[str, ...]] = ("factorised", "materialised")
    finish: Callable[[Tensor, Tensor], Tensor] | None = None  # with input and output, after the terms were added

    @abstractmethod
    def factors(self) -> Sequence[Factors]:
        """The terms of ΔW, with their gradients."""

    def delta(self) -> Tensor:
        """ΔW, (out, in)."""
        return sum_of_products(self.factors())

    def effective_weight(self) -> Tensor:
        return self.slot.weight + self.delta()

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        factors = self.factors()
        if self.choose(x.numel() // x.shape[-1], factors) == "materialised":
            return super().forward(x, y)
        dropped = self.dropped(x)
        for up, down in factors:
            y = y + F.linear(F.linear(dropped, down.to(x.dtype)), up.to(x.dtype))
        return y if self.finish is None else self.finish(x, y)

    def change(self, x: Tensor, dtype: torch.dtype) -> Change:
        if self.dropping or torch.compiler.is_compiling():
            return Change(after=self.forward)
        factors = self.factors()
        trains = self.slot.projection.weight.requires_grad  # whose gradient a folded weight would not pass on
        if trains or self.choose(x.numel() // x.shape[-1], factors) == "factorised":
            return Change(terms=factors, after=self.finish)
        with torch.no_grad():  # a change rounded to the dtype of the product loses less than the sum will
            delta = sum_of_products([Factors(up.to(dtype), down.to(dtype)) for up, down in factors])
            folded = (self.slot.weight + delta).to(dtype)
        return Change(weight=folded, terms=factors, folded=True, after=self.finish)

    def choose(self, tokens: int, factors: Sequence[Factors] | None = None) -> str:
        if self.path != "auto":
            return self.path
        factorised, materialised = self.costs(tokens, self.factors() if factors is None else factors)
        return "materialised" if materialised < WORTHWHILE * factorised else "factorised"

    def costs(self, tokens: int, factors: Sequence[Factors]) -> tuple[float, float]:
        """Multiply-accumulates per step beyond the frozen product: factorised, materialised.

        Both project gradients onto the factors. Materialised saves the factors' products in the forward pass and
        towards the input, and pays for the weight once per step.
        """
        out, into = self.slot.out_features, self.slot.in_features
        factorised, materialised = 0.0, 0.0
        for up, down in factors:
            k = len(down)
            gradients = (out + into) * down.requires_grad + (out + into * (not down.requires_grad)) * up.requires_grad
            factorised += tokens * k * (2 * (out + into) + into * down.requires_grad + out * up.requires_grad)
            materialised += tokens * k * gradients + out * into * (k + weight_pass(up.device))
        return factorised, materialised


class FullRankLayer(AdapterLayer):
    """A change of any rank. ``build`` and ``pullback`` may be given a quicker form than autograd finds."""

    @abstractmethod
    def delta(self) -> Tensor:
        """ΔW, (out, in), with its gradient, by plain operations."""

    def effective_weight(self) -> Tensor:
        return self.slot.weight + self.delta()

    def sources(self) -> list[nn.Parameter]:
        """Every trainable tensor that the change depends on, those that it shares with other layers included."""
        return [p for p in self.parameters() if p.requires_grad]

    def build(self, dtype: torch.dtype) -> Tensor:  # noqa: ARG002  for subclasses
        """ΔW, (out, in), without gradient; products in ``dtype`` are exact enough."""
        return self.delta()

    def pullback(self, gradient: Tensor) -> Sequence[Tensor | None]:
        """Gradients of :meth:`sources` from that of the weight, (out, in): the adjoint of :meth:`delta`."""
        with torch.enable_grad():
            delta = self.delta()
        return torch.autograd.grad(delta, self.sources(), gradient.to(delta.dtype), allow_unused=True)

    def running_weight(self, dtype: torch.dtype) -> Tensor:
        if torch.compiler.is_compiling() or self.slot.projection.weight.requires_grad:
            return super().running_weight(dtype)
        weight: Tensor = Materialise.apply(self, dtype, *self.sources())
        return weight


class Materialise(torch.autograd.Function):
    """Forms a layer's weight by its ``build`` and pulls its gradient back by its ``pullback``."""

    @staticmethod
    def forward(ctx: Any, layer: FullRankLayer, dtype: torch.dtype, *sources: Tensor) -> Tensor:
        """Returns W', (out, in)."""
        ctx.layer = layer
        ctx.save_for_backward(*sources)  # so that autograd notices when they change before the backward pass
        frozen = layer.slot.weight
        with torch.autocast(frozen.device.type, enabled=False):
            return torch.add(frozen, layer.build(dtype), out=torch.empty_like(frozen, dtype=dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        """Gradients of the sources."""
        _ = ctx.saved_tensors  # raises if a source changed since the forward pass
        return (None, None, *ctx.layer.pullback(gradient))
