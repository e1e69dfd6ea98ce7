"""What is held for a while: effective weights and class features in evaluation, casts in a mixed-precision run.

Each is a plain attribute, written when a ``with`` begins and forgotten when it ends. Copies and pickles go without.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn


class Holder(nn.Module):
    """A module that can compute something once for the time of a ``with merged(model):``.

    Attributes:
        held: what :meth:`hold` found, or None. Copies and pickles of the module begin without it.
    """

    held: Tensor | None = None

    def hold(self) -> Tensor | None:
        """Computes what is to be held from the present values, without gradients."""
        raise NotImplementedError

    def __getstate__(self) -> dict[str, Any]:
        return without("held", super().__getstate__())


class Castable(nn.Module):
    """A module with frozen tensors that a mixed-precision run also keeps in the dtype of its products.

    Attributes:
        lowered: the kept ones, for the time of a ``with stored_as(model, dtype):``. Copies and pickles begin without.
    """

    lowered: tuple[Tensor | None, ...] | None = None

    def frozen_tensors(self) -> tuple[Tensor | None, ...]:
        """What there is to keep; the first is a tensor."""
        raise NotImplementedError

    def frozen(self, dtype: torch.dtype) -> tuple[Any, ...]:
        """The frozen tensors for a product, in its dtype where they are kept so."""
        if self.lowered is not None and cast(Tensor, self.lowered[0]).dtype == dtype:
            return self.lowered
        return self.frozen_tensors()

    def __getstate__(self) -> dict[str, Any]:
        return without("lowered", super().__getstate__())


def without(name: str, state: object) -> dict[str, Any]:
    """What a copy or pickle of a module takes along, but for one attribute."""
    return {key: value for key, value in cast("dict[str, Any]", state).items() if key != name}


@contextmanager
def merged(model: nn.Module) -> Iterator[None]:
    """Runs a model at the cost of its plain one: validation, test and prediction run inside.

    What evaluation needs again and again is computed once, at the start: each projection's effective weight, and what
    other holders hold, such as the class features of a text classifier. Weights are not to be written inside. Frozen
    ones stay as they are, to the bit.
    """
    holders = [module for module in model.modules() if isinstance(module, Holder)]
    holders.sort(key=lambda holder: sum(1 for _ in holder.modules()))  # parts before what is made of them
    before = [holder.held for holder in holders]
    try:
        with torch.inference_mode(False), torch.no_grad():
            for holder in holders:
                holder.held = None
            with one_pass(model):
                for holder in holders:
                    holder.held = holder.hold()
        yield
    finally:
        for holder, held in zip(holders, before, strict=True):
            holder.held = held


def one_pass(model: nn.Module) -> ExitStack:
    """A pass through all backbones of a model, in which layers make together what each would make by itself."""
    stack = ExitStack()
    for module in model.modules():
        if hasattr(module, "passing"):
            stack.enter_context(cast(Any, module).passing())
    return stack


@contextmanager
def stored_as(model: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """Keeps frozen weights also in the dtype of a mixed-precision run: autocast would cast each in every call."""
    modules = [module for module in model.modules() if isinstance(module, Castable)]
    before = [module.lowered for module in modules]
    try:
        with torch.inference_mode(False), torch.no_grad():
            for module in modules:
                tensors = module.frozen_tensors()
                sizes = {t.itemsize for t in tensors if t is not None}
                trained = any(t.requires_grad for t in tensors if t is not None)
                if not trained and dtype.itemsize < min(sizes) and max(sizes) < 8:  # autocast leaves float64 alone
                    module.lowered = tuple(None if t is None else t.to(dtype) for t in tensors)
        yield
    finally:
        for module, lowered in zip(modules, before, strict=True):
            module.lowered = lowered
