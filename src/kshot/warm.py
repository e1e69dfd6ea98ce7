"""What the runs of one process share, one after the other: the backbone, which each gives back as it was."""

from __future__ import annotations

import hashlib
import json
import pickle
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch

from kshot.backbones import Backbone
from kshot.backbones.identity import plain_attributes, values_sha256
from kshot.building import backbone_of
from kshot.config import Tree
from kshot.surroundings import leaving_no_trace


class Shape(NamedTuple):
    """What a run must leave as it was in a backbone, but for values: its tensors and modules, and how they are set."""

    tensors: dict[str, tuple[Any, ...]]
    modules: dict[str, tuple[Any, ...]]


class Drawn(NamedTuple):
    """What came of building a backbone: the random states afterwards, and which weights it had."""

    states: tuple[Any, ...]
    weight_sha256: str


class Warm:
    """Keeps the backbone of a run for the next one, so that runs that follow each other build it once.

    A run is what it would be in a process of its own, to the bit: building draws from the random states, and a run that
    is lent a backbone goes on from where building it left them. So a backbone is built once more for each seed that it
    is first met with, and it is not shared between seeds where its weights hang on them.

    Attributes:
        built: number of backbones that were built; ``lendings`` of those that were lent again.
    """

    def __init__(self) -> None:
        self.built = self.lendings = 0
        self.drawn: dict[tuple[str, str], Drawn] = {}  # by settings, and by the random states before
        self.kept: tuple[str, Backbone] | None = None
        self.lent: tuple[str, Backbone] | None = None
        self.shape: Shape | None = None  # of the one that is kept or lent, as the next two
        self.towers: dict[torch.dtype, str] = {}  # for :class:`~kshot.features.FeatureStore`
        self.values = ""

    def backbone(self, tree: Tree) -> Backbone:
        """The backbone of a command line's settings, with nothing attached, for as long as :meth:`lending`."""
        spec = json.dumps(tree["model"]["init_args"]["backbone"], sort_keys=True)
        key = spec, digest_of_states()
        known = self.drawn.get(key)
        if self.kept is not None and self.kept[0] == spec and known is not None:
            backbone = self.kept[1]
            if known.weight_sha256 and known.weight_sha256 == backbone.weight_sha256:
                self.lent, self.kept = self.kept, None
                self.lendings += 1
                set_states(known.states)
                return backbone
        self.kept = None  # before another one takes its room
        backbone = backbone_of(tree)
        self.built += 1
        self.drawn[key] = Drawn(states(), backbone.weight_sha256)
        self.towers = {}
        self.lent, self.shape, self.values = (spec, backbone), shape_of(backbone), values_of(backbone)
        return backbone

    @contextmanager
    def lending(self) -> Iterator[None]:
        """A run: leaves the process as it was, and takes the backbone back, if it is what it was; else it is dropped.

        All values are compared after a run that trained some of the backbone, or failed.
        """
        failed = True
        try:
            with leaving_no_trace():
                yield
            failed = False
        finally:
            if self.lent is not None:
                (spec, backbone), self.lent = self.lent, None
                trained = any(p.requires_grad for p in backbone.parameters())
                backbone.detach()
                if any(p.device.type != "cpu" for p in backbone.parameters()):
                    backbone.to("cpu")
                same = shape_of(backbone) == self.shape
                same = same and (not (failed or trained) or values_of(backbone) == self.values)
                self.kept = (spec, backbone) if same else None


def shape_of(backbone: Backbone) -> Shape:
    """What is compared but for values."""
    named = (*backbone.named_parameters(), *backbone.named_buffers())
    tensors = {name: (t.dtype, t.device, t.shape, t.requires_grad, t.grad is None) for name, t in named}
    modules: dict[str, tuple[Any, ...]] = {}
    for name, module in backbone.named_modules():
        set_to = plain_attributes(module).items()  # where None is as good as nothing: torch puts it elsewhere
        modules[name] = type(module), module.training, {key: value for key, value in set_to if value is not None}
    return Shape(tensors, modules)


def values_of(backbone: Backbone) -> str:
    """A digest of all values."""
    return values_sha256([*backbone.named_parameters(), *backbone.named_buffers()])


def states() -> tuple[Any, ...]:
    """The random states that building draws from: of Python, NumPy and torch on the CPU."""
    return random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002  which libraries draw from


def set_states(given: tuple[Any, ...]) -> None:
    """Goes on from other random states."""
    random.setstate(given[0])
    np.random.set_state(given[1])  # noqa: NPY002
    torch.set_rng_state(given[2])


def digest_of_states() -> str:
    """Tells random states apart."""
    python, arrays, tensors = states()
    return hashlib.sha256(pickle.dumps((python, arrays)) + tensors.numpy().tobytes()).hexdigest()
