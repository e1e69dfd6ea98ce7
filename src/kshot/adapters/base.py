"""The contract of a weight-tuning method, and how its layers come onto slots."""

from __future__ import annotations

import hashlib
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, is_dataclass
from fnmatch import fnmatchcase
from typing import Any, ClassVar, TypeVar, get_args, get_type_hints

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from kshot.backbones.base import Backbone
from kshot.errors import UserError, require
from kshot.slots import AdapterLayer, Path, Slot

T = TypeVar("T")
Layers = Mapping[str, AdapterLayer]  # by slot


class Adapter(ABC):
    """The settings of a method. Subclasses are frozen dataclasses; a YAML names them by ``class_path``.

    Attributes:
        wise_alpha: α of WiSE-FT (arXiv:2109.01903): evaluation, and what is merged and exported, runs with
            W + α (W' - W), where W' is the trained weight and W the frozen one. Training knows nothing of it, and files
            hold W'. A field of those that can do it.
        rate: learning rate at which AdamW trains it, where a run leaves that open.
        rate_width: width of the tower for which that holds; None for any.

    Raises:
        UserError: a setting outside its range, when it is made.
    """

    wise_alpha: float = 1.0

    def __post_init__(self) -> None:
        number = isinstance(self.wise_alpha, (int, float)) and 0 <= self.wise_alpha <= 1
        self.require("wise_alpha", number, "be a number from 0 (the frozen weights) to 1 (the trained ones)")

    rate: ClassVar[float] = 1e-3
    rate_width: ClassVar[int | None] = None

    def default_lr(self, width: int) -> float:
        """The learning rate for a tower of a width.

        That of what meets the tower's own features is in inverse proportion to their width, as each of Adam's steps
        moves every number alike, and the output by their sum (LoRA+, Hayou et al. 2024, arXiv:2402.12354, section 3).
        """
        return self.rate * self.rate_width / width if self.rate_width and width else self.rate

    @abstractmethod
    def attach(self, backbone: Backbone, targets: Sequence[str]) -> None:
        """Makes the targets of a backbone trainable in this method's way; ``backbone.detach()`` undoes it.

        New layers start in training mode, as modules do: call ``backbone.eval()`` before measuring.

        Args:
            backbone: is changed in place; everything else in it stays frozen.
            targets: ``fnmatch`` patterns on names.

        Raises:
            UserError: a pattern matches nothing.
        """

    def settings(self) -> dict[str, Any]:
        """The settings in plain data, with the scale that follows from them, for the record of a run."""
        given: dict[str, Any] = asdict(self) if is_dataclass(self) else {}
        scale = getattr(self, "scale", None)
        return given | ({} if scale is None else {"scale": scale})

    def require(self, name: str, holds: bool, what: str) -> None:
        """Refuses a setting by :func:`kshot.errors.require`."""
        require(type(self).__name__, name, getattr(self, name), holds, what)

    def require_known(self, *names: str) -> None:
        """Refuses words that the annotations of these settings do not list."""
        kinds = get_type_hints(type(self))
        for name in names:
            known = get_args(kinds[name])
            self.require(name, getattr(self, name) in known, f"be one of {', '.join(map(str, known))}")


class Shared(nn.Module):
    """What the layers of a method share, and what the method does beside them while a run trains.

    Frozen bases, a rank budget, or a search: the run calls the hooks below, so that none of it can be forgotten. It
    lies in ``backbone.shared``. What a resumed run needs beside the trained tensors are its persistent buffers.

    Args:
        slots: names of the slots whose layers share it, where it works on the layers.
        described: what coefficients mean nothing without, such as seed, generator and checksum of a basis, in plain
            data. A checkpoint carries it, and is refused where it differs.
    """

    def __init__(self, slots: Iterable[str] = (), described: Mapping[str, Any] | None = None) -> None:
        super().__init__()
        self.slots, self.described = tuple(slots), dict(described or {})

    def fingerprint(self) -> dict[str, Any]:
        """What was described, for the header of a checkpoint."""
        return self.described

    def own(self, layers: Layers) -> list[Any]:
        """Those of some layers that share this, in the order of its slots."""
        return [layers[name] for name in self.slots if name in layers]

    def ranks(self, layers: Layers) -> dict[str, int]:  # noqa: ARG002  for subclasses
        """The rank of each slot, where the method chooses ranks itself."""
        return {}

    def begin_pass(self, layers: Layers) -> None:
        """Makes what some layers need in a forward pass for all of them at once; those are the layers of a tower."""

    def end_pass(self, layers: Layers) -> None:
        """Forgets what :meth:`begin_pass` made."""

    def penalty(self, layers: Layers) -> Tensor | None:  # noqa: ARG002  for subclasses
        """A term that the method adds to the loss, or None."""
        return None

    def plan(self, steps: int) -> None:
        """Hears how many optimizer steps the run has, before it starts.

        Raises:
            UserError: what the method has to do does not fit into them.
        """

    def search(self, problem: SearchProblem) -> None:
        """Decides what is to be trained, before there is an optimizer; trainable tensors may be replaced."""

    def after_step(self, step: int, layers: Layers) -> None:
        """Follows an optimizer step, with gradients still there; ``step`` counts from 1."""


@dataclass(frozen=True)
class SearchProblem:
    """What a method may use to decide what to train: the run's loss on two disjoint halves of the shots."""

    layers: Layers  # of the method
    train: Iterator[Any]  # endless batches of one half
    val: Iterator[Any]  # endless batches of the other
    loss: Callable[[Any], Tensor]  # of a batch, with the graph
    optimizer: Callable[[Iterable[nn.Parameter]], Optimizer]  # makes the run's optimizer for parameters
    parameters: Sequence[nn.Parameter]  # all that train
    steps: int  # optimizer steps in the run


@dataclass(frozen=True, kw_only=True)
class SlotAdapter(Adapter):
    """A method that puts one layer on each targeted slot: all but full tuning and its relatives.

    Targets name single slots (``image.*.[qv]``); a pattern that matches none of those is tried on fused ones
    (``image.*.qkv``), which are one matrix of all their rows.

    Args:
        dropout: probability on the input of the change, in training.
        path: how layers run: added to the frozen output (factorised), as a weight formed once in a forward pass
            (materialised), or in a basis of their own (svd); auto takes the cheapest. Results are the same to rounding.
        wise_alpha: WiSE-FT, the share of the trained change that evaluation takes, from 0 to 1; 1 for all of it.
    """

    dropout: float = 0.0
    path: Path = "auto"
    wise_alpha: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require("dropout", 0 <= self.dropout < 1, "lie in [0, 1)")

    def require_rank(self, rank: int, slots: Mapping[str, Slot]) -> None:
        """Refuses a rank that the matrix of a slot cannot have."""
        for name, slot in slots.items():
            side = min(slot.in_features, slot.out_features)
            if rank > side:
                method = type(self).__name__
                raise UserError(f"{method}: rank {rank} is larger than the smaller side, {side}, of the slot {name}.")

    def prepare(self, slots: Mapping[str, Slot]) -> Shared | None:  # noqa: ARG002  for subclasses
        """Makes what all layers share, such as random bases; None when nothing is shared."""
        return None

    @abstractmethod
    def wrap(self, slot: Slot, shared: Any) -> AdapterLayer:
        """Makes the layer for one slot."""

    @torch.inference_mode(False)  # what is made here will train
    def attach(self, backbone: Backbone, targets: Sequence[str]) -> None:
        slots = select_slots(backbone, targets)
        shared = self.prepare(slots)
        layers = {name: self.wrap(slot, shared) for name, slot in slots.items()}
        for name, layer in layers.items():
            known = ("auto", *layer.paths)
            self.require("path", self.path in known, f"be one of {', '.join(known)}")
            layer.path, layer.dropout, layer.wise_alpha = self.path, self.dropout, self.wise_alpha
            weight = slots[name].weight
            slots[name].attach(layer if weight.is_meta else layer.to(weight.device))
        if shared is not None:
            backbone.shared.append(shared)


@dataclass(frozen=True)
class RankAdapter(SlotAdapter):
    """A method with one rank for all layers.

    Args:
        rank: r.
        alpha: the scale is s = alpha / rank; None takes alpha = rank, so s = 1.
    """

    rank: int = 8
    alpha: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require("rank", self.rank >= 1, "be at least 1")
        self.require("alpha", 0 < self.scale < math.inf, "be a positive number")

    @property
    def scale(self) -> float:
        """The factor s."""
        return 1.0 if self.alpha is None else self.alpha / self.rank

    def prepare(self, slots: Mapping[str, Slot]) -> Shared | None:
        self.require_rank(self.rank, slots)
        return None


def select_slots(backbone: Backbone, patterns: Sequence[str]) -> dict[str, Slot]:
    """The slots that patterns choose, single ones first, fused ones where a pattern matches no single one.

    Raises:
        UserError: a pattern matches nothing, or rows would be adapted twice.
    """
    single, fused = backbone.slots(), backbone.fused_slots()
    only_fused = [p for p in patterns if not matches(p, single) and matches(p, fused)]
    what = f"slots of {backbone.name}"
    chosen = select(single, [p for p in patterns if p not in only_fused], what)
    chosen |= select(fused, only_fused, what)
    for name, slot in chosen.items():
        rivals = [n for n, s in chosen.items() if s.projection is slot.projection and n != name]
        whole = slot.part == slot.projection.whole
        if other := slot.taken() or (rivals[0] if whole and rivals else None):
            raise UserError(f"{name} and {other} are the same rows of one weight: a row takes one adapter.")
    return chosen


def select(named: Mapping[str, T], patterns: Sequence[str], what: str) -> dict[str, T]:
    """The entries whose names match at least one ``fnmatch`` pattern, in their own order.

    Raises:
        UserError: a pattern matches nothing; some names that exist are given.
    """
    for pattern in patterns:
        if not matches(pattern, named):
            names = list(named)
            some = ", ".join([*names[:6], "...", *names[-2:]] if len(names) > 8 else names) or "none"
            raise UserError(
                f"The target pattern {pattern!r} matches none of the {len(names)} {what}, which are: {some}."
            )
    return {name: value for name, value in named.items() if any(fnmatchcase(name, p) for p in patterns)}


def matches(pattern: str, names: Iterable[str]) -> bool:
    """Whether an ``fnmatch`` pattern matches any of the names."""
    return any(fnmatchcase(name, pattern) for name in names)


def kaiming_uniform(name: str, rows: int, columns: int) -> Tensor:
    """(rows, columns) from U(-1/√columns, 1/√columns), as ``nn.Linear`` starts (Kaiming-uniform with a = √5).

    It depends on the run's seed and the name alone, so that two backbones, or two target lists, start a slot alike, and
    the global random state is not touched.
    """
    bound = 1 / math.sqrt(columns)
    return torch.rand(rows, columns, generator=generator_for(name)) * 2 * bound - bound


def generator_for(name: str) -> torch.Generator:
    """A generator for the initial values of one named layer: a function of the run's seed and the name alone."""
    return torch.Generator().manual_seed(derived_seed(torch.initial_seed(), name))


def derived_seed(seed: int, purpose: object) -> int:
    """A seed for one purpose within a run: a function of the run's seed and the purpose's name alone."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{purpose}".encode()).digest()[:7], "little")
