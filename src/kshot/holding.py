"""What is held for a while: effective weights and class features in evaluation, casts in a mixed-precision run.

Each is a plain attribute, written when a ``with`` begins and forgotten when it ends. Copies and pickles go without.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

FOR_A_WHILE = ("held", "lowered")


class Temporary(nn.Module):
    """A module that leaves what it has for a while out of its copies and pickles."""

    def __getstate__(self) -> dict[str, Any]:
        state = cast("dict[str, Any]", super().__getstate__())
        return {name: value for name, value in state.items() if name not in FOR_A_WHILE}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Temporary:
        """Moves also what it has for a while: ``module.to(device)``."""
        super()._apply(fn, recurse)
        for name in FOR_A_WHILE:
            value = getattr(self, name, None)
            if isinstance(value, tuple):
                setattr(self, name, tuple(None if each is None else fn(each) for each in value))
            elif value is not None:
                setattr(self, name, fn(value))
        return self


class Holder(Temporary):
    """A module that can compute something once, and hold it for the time of a ``with merged(model):``."""

    held: Tensor | None = None

    def hold(self) -> Tensor | None:
        """Computes what is to be held from the present values, without gradients."""
        raise NotImplementedError


class Castable(Temporary):
    """A module that keeps its frozen tensors in a second dtype, for the time of a ``with stored_as(model, dtype):``."""

    lowered: tuple[Tensor | None, ...] | None = None

    def frozen_tensors(self) -> tuple[Tensor | None, ...]:
        """What there is to keep; the first is a tensor."""
        raise NotImplementedError

    def frozen(self, dtype: torch.dtype) -> tuple[Any, ...]:
        """The frozen tensors for a product, in its dtype where they are kept so."""
        if self.lowered is not None and cast(Tensor, self.lowered[0]).dtype == dtype:
            return self.lowered
        return self.frozen_tensors()


@contextmanager
def restored(modules: Sequence[nn.Module], name: str) -> Iterator[None]:
    """Gives an attribute of some modules its present value back at the end."""
    before = [getattr(module, name) for module in modules]
    try:
        yield
    finally:
        for module, value in zip(modules, before, strict=True):
            setattr(module, name, value)


@contextmanager
def merged(model: nn.Module) -> Iterator[None]:
    """Runs a model at the cost of its plain one: validation, test and prediction run inside.

    What evaluation needs again and again is computed once, at the start: each projection's effective weight, and what
    other holders hold, such as the class features of a text classifier. Weights are not to be written inside. Frozen
    ones stay as they are, to the bit.
    """
    holders = [module for module in model.modules() if isinstance(module, Holder)]
    holders.sort(key=lambda holder: sum(1 for _ in holder.modules()))  # parts before what is made of them
    with restored(holders, "held"):
        with torch.inference_mode(False), torch.no_grad():
            for holder in holders:
                holder.held = None
            with one_pass(model):
                for holder in holders:
                    holder.held = holder.hold()
        yield


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
    with restored(modules, "lowered"):
        with torch.inference_mode(False), torch.no_grad():
            for module in modules:
                tensors = module.frozen_tensors()
                present = [t for t in tensors if t is not None]
                sizes = [t.itemsize for t in present]
                trained = any(t.requires_grad for t in present)
                if not trained and dtype.itemsize < min(sizes) and max(sizes) < 8:  # autocast leaves float64 alone
                    module.lowered = tuple(None if t is None else t.to(dtype) for t in tensors)
        yield
