"""The contract of a weight-tuning method, and how its layers come onto slots."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import TypeVar

import torch
from torch import Tensor, nn

from kshot.backbones.base import Backbone
from kshot.errors import UserError
from kshot.slots import AdapterLayer, Slot

T = TypeVar("T")


class Adapter(ABC):
    """The settings of a method. Subclasses are frozen dataclasses; a YAML names them by ``class_path``."""

    @abstractmethod
    def inject(self, backbone: Backbone, targets: Sequence[str]) -> None:
        """Makes the targets of a backbone trainable in this method's way.

        New layers start in training mode, as modules do: call ``backbone.eval()`` before measuring.

        Args:
            backbone: is changed in place; everything else in it stays frozen.
            targets: ``fnmatch`` patterns on names.

        Raises:
            UserError: a pattern matches nothing.
        """


class SlotAdapter(Adapter):
    """A method that puts one layer on each targeted slot: all but full tuning and its relatives."""

    def prepare(self, slots: Mapping[str, Slot]) -> nn.Module | None:  # noqa: ARG002  for subclasses
        """Makes what all layers share, such as random bases; None when nothing is shared."""
        return None

    @abstractmethod
    def wrap(self, slot: Slot, shared: nn.Module | None) -> AdapterLayer:
        """Makes the layer for one slot."""

    def penalty(self, layers: Iterable[AdapterLayer]) -> Tensor | None:  # noqa: ARG002  for subclasses
        """A term that the method adds to the loss, or None."""
        return None

    def inject(self, backbone: Backbone, targets: Sequence[str]) -> None:
        slots = select(backbone.slots(), targets, f"slots of {backbone.name}")
        shared = self.prepare(slots)
        for slot in slots.values():
            slot.attach(self.wrap(slot, shared))


def select(named: Mapping[str, T], patterns: Sequence[str], what: str) -> dict[str, T]:
    """The entries whose names match at least one ``fnmatch`` pattern, in their own order.

    Raises:
        UserError: a pattern matches nothing; some names that exist are given.
    """
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in named):
            names = list(named)
            some = ", ".join([*names[:6], "...", *names[-2:]] if len(names) > 8 else names) or "none"
            raise UserError(
                f"The target pattern {pattern!r} matches none of the {len(names)} {what}, which are: {some}."
            )
    return {name: value for name, value in named.items() if any(fnmatchcase(name, p) for p in patterns)}


def generator_for(name: str) -> torch.Generator:
    """A generator for the initial values of one named layer.

    It depends on the run's seed and the name alone, so that two backbones, or two target lists, start a slot alike, and
    the global random state is not touched.
    """
    return torch.Generator().manual_seed(derived_seed(torch.initial_seed(), name))


def derived_seed(seed: int, purpose: object) -> int:
    """A seed for one purpose within a run: a function of the run's seed and the purpose's name alone."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{purpose}".encode()).digest()[:7], "little")
