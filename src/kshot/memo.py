"""Values kept until one of the tensors that they were computed from changes."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from typing import ClassVar, Generic, TypeVar, cast

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook

T = TypeVar("T")


class Memo(Generic[T]):
    """Keeps a value until one of the tensors that it was computed from changes: in place, by a move, or by a step."""

    optimizer_steps: ClassVar[int] = 0  # fused optimizers change parameters without raising their version

    def __init__(self) -> None:
        self._sources: list[Tensor] = []
        self._state: tuple[object, ...] | None = None
        self._value: T | None = None

    def get(self, sources: Iterable[Tensor], compute: Callable[[], T], key: Hashable = None) -> T:
        """Returns the kept value, or computes it anew outside autograd, autocast and inference mode.

        Args:
            sources: the tensors that the value depends on.
            compute: makes the value.
            key: what else it depends on, such as a dtype.
        """
        now = list(sources)
        steps = Memo.optimizer_steps if any(t.requires_grad for t in now) else None
        state = (key, steps, *((t._version, t.device, t.dtype) for t in now))
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
