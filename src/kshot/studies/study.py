"""A study file, read and checked: what every run has, the axes of the grid, and which cells are left out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import Any

from kshot.config import find_config, read_config, words_of
from kshot.errors import UserError, nearest_first
from kshot.files import packaged_folder

KEYS = ("base", "options", "grid", "leave_out", "ranges", "search")
CONFIGS = {"method": "methods", "backbone": "backbones"}  # axes whose words are configs, and the folder of these
OPTIONS = {  # axes that go by a shorter name than their options
    "dataset": ("data.dataset",),
    "shots": ("data.shots",),
    "seed": ("data.split_seed", "seed_everything"),
    "protocol": ("data.protocol",),
}
OWN = ("run.root", "run.name", "ckpt_path")  # options that the study itself gives its runs
Label = str | int | float | bool
Cell = dict[str, "Value"]


@dataclass(frozen=True)
class Value:
    """A value of an axis: what it is called, and the configs and options that it stands for."""

    label: Label
    configs: tuple[str, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)

    @cached_property
    def words(self) -> tuple[list[str], list[str]]:
        """Configs and options as words of a command line."""
        return [f"--config={config}" for config in self.configs], words_of(self.options, {})


@dataclass(frozen=True)
class Study:
    """What a study file says.

    Attributes:
        name: of the file, without its ending.
        file: where it is.
        base: configs of every run, laid over each other.
        options: of every run, by their names on the command line.
        axes: values by axis, in the order of the file.
        left_out: labels by axis; a cell that has one of each is not run.
        ranges: what runs could search, as ``fit --search`` takes it; None where the file has no ranges.
        search: what they do search; None for nothing.
    """

    name: str
    file: Path
    base: tuple[str, ...]
    options: Mapping[str, Any]
    axes: Mapping[str, tuple[Value, ...]]
    left_out: tuple[Mapping[str, frozenset[str]], ...] = ()
    ranges: dict[str, Any] | None = None
    search: dict[str, Any] | None = None

    def cells(self, axes: Sequence[str] | None = None) -> Iterator[Cell]:
        """The product of the values of some axes, by default of all, the first axis slowest; none is left out yet."""
        names = list(self.axes) if axes is None else axes
        for values in product(*(self.axes[name] for name in names)):
            yield dict(zip(names, values, strict=True))

    def leaves_out(self, cell: Cell) -> bool:
        """Whether the file says that a cell is not run."""
        return any(matches(cell, labels) for labels in self.left_out)

    def words(self, cell: Cell) -> list[str]:
        """The words of a run of ``python main.py fit``: all configs first, then options, those of the cell last."""
        parts = [self.common.words, *(value.words for value in cell.values())]
        return [word for kind in (0, 1) for part in parts for word in part[kind]]

    @cached_property
    def common(self) -> Value:
        """What every run has."""
        return Value("", self.base, self.options)


def matches(cell: Cell, labels: Mapping[str, frozenset[str]]) -> bool:
    """Whether a cell, or a part of one, has one of the labels of each axis."""
    return all(axis in cell and said(cell[axis].label) in wanted for axis, wanted in labels.items())


def said(label: Any) -> str:
    """A label as it is written on a command line and in YAML: ``null``, ``true``, ``4``."""
    return words_of({"x": label}, {})[0].partition("=")[2]


def name_of(cell: Cell) -> str:
    """A cell in words: ``method ridge, shots 4``."""
    return in_words({axis: value.label for axis, value in cell.items()})


def in_words(labels: Mapping[str, Label]) -> str:
    """The same of labels by axis."""
    return ", ".join(f"{axis} {said(label)}" for axis, label in labels.items())


def read_study(name: str) -> Study:
    """Reads a study by its path, or by its name below ``configs/``.

    Raises:
        UserError: there is no such file, or it is none of a study; says where in it.
    """
    file = find_config(name)
    tree = read_config(file)
    for key in tree:
        if key not in KEYS:
            raise UserError(f"{file}: a study has no {key!r}. {nearest_first(key, KEYS)}")
    base = several(tree.get("base"), f"{file}: base", "configs")
    options = own_options(tree.get("options") or {}, f"{file}: options")
    grid = tree.get("grid")
    if not isinstance(grid, dict) or not grid:
        raise UserError(f"{file}: grid must name axes and their values, such as shots: [1, 2, 4].")
    axes = {axis: values_of(axis, given, f"{file}: grid.{axis}") for axis, given in grid.items()}
    left = tuple(
        labels_of(each, axes, f"{file}: leave_out")
        for each in several(tree.get("leave_out"), f"{file}: leave_out", "cells")
    )
    ranges = ranges_in(tree, str(file))
    return Study(file.stem, file, tuple(config_named(c, f"{file}: base") for c in base), options, axes, left, ranges)


def ranges_in(tree: Mapping[str, Any], file: str) -> dict[str, Any] | None:
    """What a study file says of a search: its ranges, and how many trials; None where it has no ranges."""
    ranges, search = tree.get("ranges"), tree.get("search")
    for name, given in (("ranges", ranges), ("search", search)):
        if given is not None and not isinstance(given, dict):
            raise UserError(f"{file}: {name} is {given!r:.200}, and must be a mapping, such as search: {{trials: 20}}.")
    if search is not None and not ranges:
        raise UserError(f"{file}: a search needs ranges beside it: ranges: {{model.optimizer.lr: [1e-4, 1e-3]}}.")
    return None if not ranges else {**(search or {}), "ranges": ranges}


def several(given: Any, where: str, what: str) -> list[Any]:
    """A list, of nothing where nothing is given; raises UserError for anything else."""
    if given is not None and not isinstance(given, list):
        raise UserError(f"{where} must be a list of {what}, and is {given!r:.200}.")
    return given or []


def config_named(name: Any, where: str, folder: str = "") -> str:
    """The name of a config as a command line in any directory finds it; ``folder`` is looked into first."""
    if not isinstance(name, str):
        raise UserError(f"{where} takes names of configs, and is given {name!r:.200}.")
    packaged = packaged_folder("configs")
    if folder and any((packaged / folder / f"{name}{ending}").is_file() for ending in ("", ".yaml")):
        name = f"{folder}/{name}"
    try:
        file = find_config(name)
    except UserError as error:
        if not folder:
            raise UserError(f"{where}: {error}") from None
        known = [path.stem for path in (packaged / folder).glob("*.yaml")]
        raise UserError(f"{where}: there is no {folder[:-1]} {name!r:.200}. {nearest_first(name, known)}") from None
    inside = file.resolve().is_relative_to(packaged)
    return file.resolve().relative_to(packaged).as_posix() if inside else str(file.resolve())


def own_options(given: Any, where: str) -> dict[str, Any]:
    """Options by name; raises UserError where they are none, or the study's own business."""
    if not isinstance(given, dict):
        raise UserError(f"{where} must be options by their names on the command line, and is {given!r:.200}.")
    for name in given:
        if name in OWN or name == "config":
            raise UserError(f"{where}: {name} is given by the study itself, which keeps its runs in its own folder.")
    return given


def values_of(axis: str, given: Any, where: str) -> tuple[Value, ...]:
    """The values of an axis; raises UserError for none, and for one that is there twice."""
    known = [*CONFIGS, *OPTIONS]
    if axis not in known and "." not in axis and axis not in ("budget", "seed_everything"):
        raise UserError(f"{where}: an axis is one of these, or an option in full. {nearest_first(axis, known)}")
    if not isinstance(given, list) or not given:
        raise UserError(f"{where} must be a list of one value or more, and is {given!r:.200}.")
    own_options({axis: None}, where)
    values = tuple(value_of(axis, each, where) for each in given)
    seen: set[str] = set()
    for value in values:
        if said(value.label) in seen:
            raise UserError(f"{where}: {said(value.label)} is there twice.")
        seen.add(said(value.label))
    return values


def value_of(axis: str, given: Any, where: str) -> Value:
    """A value of an axis from a scalar, or from a mapping of its label to configs and options."""
    if isinstance(given, dict):
        (label, stands_for), *more = given.items() or [("", None)]
        if (
            more
            or not isinstance(stands_for, dict)
            or not stands_for
            or not stands_for.keys() <= {"configs", "options"}
        ):
            raise UserError(f"{where}: {given!r:.200} must be one label, with its configs, its options, or both.")
        configs = several(stands_for.get("configs"), f"{where}.{label}.configs", "configs")
        return Value(
            label,
            tuple(config_named(each, f"{where}.{label}", CONFIGS.get(axis, "")) for each in configs),
            own_options(stands_for.get("options") or {}, f"{where}.{label}.options"),
        )
    if isinstance(given, list):
        raise UserError(
            f"{where}: a value that is a list needs a label: - name: {{options: {{{axis}: {given!r:.80}}}}}"
        )
    if axis in CONFIGS:
        name = config_named(given, where, CONFIGS[axis])
        return Value(given, (name,))
    label = said(given) if given is None else given
    return Value(label, options=dict.fromkeys(OPTIONS.get(axis, (axis,)), given))


def labels_of(given: Any, axes: Mapping[str, Sequence[Value]], where: str) -> Mapping[str, frozenset[str]]:
    """Labels by axis, of which one or several are given; raises UserError for an axis or a label that there is not."""
    if not isinstance(given, dict) or not given:
        raise UserError(f"{where} takes axes with labels, such as method: lora, and is given {given!r:.200}.")
    found = {}
    for axis, labels in given.items():
        if axis not in axes:
            raise UserError(f"{where}: the grid has no axis {axis!r}. {nearest_first(axis, axes)}")
        known = {said(value.label) for value in axes[axis]}
        wanted = frozenset(said(label) for label in (labels if isinstance(labels, list) else [labels]))
        for label in sorted(wanted - known):
            raise UserError(f"{where}: the axis {axis} has no {label!r}. {nearest_first(label, known)}")
        found[axis] = wanted
    return found
