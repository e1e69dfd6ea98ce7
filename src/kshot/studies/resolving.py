"""The settings of all cells of a study: what its configs and classes come to, once for all cells that share them.

Plain values, such as shots and seeds, are laid where they belong, with the checks of the command line, and change
nothing but themselves. So their cells differ from each other in a few places of one text.
"""

from __future__ import annotations

import copy
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

from kshot.available import check
from kshot.config import CommandLine, Tree, read_command_line, read_word, word_of
from kshot.errors import UserError
from kshot.layering import lay, options_below, written_out
from kshot.places import Place, Places
from kshot.settings import OPTIONS, laid, needed
from kshot.studies.search import Searches
from kshot.studies.study import Cell, Study, name_of

NO_MATTER = {  # what changes no result: where things are kept, what is shown, how images are loaded
    "run": ("root", "name", "save_every"),
    "trainer": ("default_root_dir", "enable_model_summary", "enable_progress_bar", "log_every_n_steps", "logger"),
    "data": ("download", "keep_decoded", "num_workers", "root", "store_gb"),
}
TOGETHER = ("trainer.", "model.backbone.", "model.targets")  # options that are checked, or built, with others
DRAW = ("shots", "split_seed")  # what a draw from the same images depends on, and what the images depend on
IMAGES = (
    *("allow_fewer", "class_names", "dataset", "download", "manifest", "protocol", "root", "sampler", "targets"),
    *("template", "test_share"),
)


class PlainPlace(NamedTuple):
    """The place of a plain option, and its type in words."""

    place: Place
    said: str


class Laid(NamedTuple):
    """The value of a plain option as the command line lays it, and the JSON of it."""

    value: Any
    text: str


Values = Mapping[str, Laid]


@dataclass
class Shared:
    """Settings that some cells share but for the values of plain options.

    Attributes:
        cell: what the cells have in common.
        free: the other axes.
        tree: of :func:`~kshot.settings.laid`.
        plain: the places of the options of the free axes.
        settings: JSON of what changes a result, cut where a plain option stands.
        data: JSON of what a split is drawn from, cut as well.
        backbone: JSON of the backbone.
        search: what each of their runs searches for, as ``fit --search`` takes it; None for nothing.
    """

    cell: Cell
    free: list[str]
    tree: Tree
    plain: dict[str, PlainPlace]
    settings: list[str]
    data: list[str]
    backbone: str
    search: dict[str, Any] | None


class Resolver:
    """Resolves the cells of a study."""

    def __init__(self, study: Study) -> None:
        self.study = study
        self.searches = Searches(study)
        self.laid: dict[tuple[str, str, str], Laid] = {}  # plain values by option, type and word

    def shared(self, cell: Cell, rest: Sequence[str]) -> Iterator[Shared]:
        """Settings of a part of a cell, divided further until the axes that are left hold plain values only.

        Raises:
            UserError: what the command line refuses; says in which cell.
        """
        if self.study.leaves_out(cell):  # it need not even be possible
            return
        divide = next((axis for axis in rest if any(value.configs for value in self.study.axes[axis])), None)
        if divide is None:
            try:
                with naming(self.study, cell):
                    line = read_command_line(["fit", *self.study.words(cell)], list(OPTIONS))
                    places, tree = laid(line)
            except UserError:  # perhaps for want of what another axis gives
                if not rest:
                    raise
                divide = rest[0]
            else:
                options = {name: place for name, place, _ in options_below(places, tree)}
                divide = next((axis for axis in rest if not self.is_plain(axis, options)), None)
        if divide is not None:
            left = [name for name in rest if name != divide]
            for value in self.study.axes[divide]:
                more = cell | {divide: value}
                yield from self.shared({name: more[name] for name in self.study.axes if name in more}, left)
            return
        free = {option for axis in rest for value in self.study.axes[axis] for option in value.options}
        plain = {option: PlainPlace(options[option], str(options[option].hint)) for option in free}
        yield from self.checked(cell, list(rest), (places, tree), plain, line)

    def is_plain(self, axis: str, options: Mapping[str, Place]) -> bool:
        """Whether the values of an axis change nothing but themselves, and no other axis what they are in."""
        others = {o for name, vs in self.study.axes.items() if name != axis for v in vs for o in v.options}
        for option in {option for value in self.study.axes[axis] for option in value.options}:
            place = options.get(option)
            if place is None or place.bases or place.group or option.startswith(TOGETHER):
                return False
            if any(f"{option}.".startswith(f"{other}.") or other.startswith(f"{option}.") for other in others):
                return False
        return True

    def checked(
        self,
        cell: Cell,
        free: list[str],
        settings: tuple[Places, Tree],
        plain: dict[str, PlainPlace],
        line: CommandLine,
    ) -> Iterator[Shared]:
        """What cells share, after the checks of a run before it builds anything; nothing where all are left out."""
        places, tree = settings
        first = next((c for more in self.study.cells(free) if not self.study.leaves_out(c := cell | more)), None)
        if first is None:
            return
        with naming(self.study, first):
            filled = with_values(tree, values_alone(self.values(first, free, plain)))
            missing = needed(places, filled, line)
            if missing is not None:
                raise UserError(missing)
            check(filled["model"]["init_args"], filled["trainer"])
            search = self.searches.of(cell, first, places, tree)
        tree = tree | {"search": search}
        full = with_values(written_out(places, tree), {name: f"\0{name}\0" for name in plain})
        backbone, data = full["model"]["init_args"]["backbone"], full["data"]["init_args"]
        drawn = {name: value for name, value in data.items() if name in (*DRAW, *IMAGES)}
        full["data"] = data
        for group, ignored in NO_MATTER.items():
            full[group] = {name: value for name, value in full[group].items() if name not in ignored}
        yield Shared(cell, free, tree, plain, cut(full), cut(drawn), as_json(backbone), search)

    def values(self, cell: Cell, axes: Sequence[str], plain: Mapping[str, PlainPlace]) -> Values:
        """The values of plain options in a cell, as the command line would lay them."""
        found = {}
        for axis in axes:
            for (option, value), word in zip(cell[axis].options.items(), cell[axis].words[1], strict=True):
                key = (option, plain[option].said, word)
                if key not in self.laid:
                    as_laid = lay(plain[option].place, None, word_of(value), option)
                    self.laid[key] = Laid(as_laid, as_json(as_laid))
                found[option] = self.laid[key]
        return found

    def cells(self, shared: Shared) -> Iterator[tuple[Cell, Values]]:
        """The cells of shared settings that are run, with the values of their plain options."""
        for more in self.study.cells(shared.free):
            own = shared.cell | more
            cell = {axis: own[axis] for axis in self.study.axes}
            if self.study.leaves_out(cell):
                continue
            with naming(self.study, cell):
                values = self.values(cell, shared.free, shared.plain)
            yield cell, values


@contextmanager
def naming(study: Study, cell: Cell) -> Iterator[None]:
    """Says of a mistake inside which cell it is in."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{study.file}: {name_of(cell)}: {error}") from error


def with_values(tree: Tree, values: Mapping[str, Any]) -> Tree:
    """A copy of settings with other values of some options, by their names."""
    changed = copy.deepcopy(tree)
    for name, value in values.items():
        *way, last = name.split(".")
        at = changed
        for part in way:
            at = at[part]
            at = at["init_args"] if "class_path" in at else at
        at[last] = value
    return changed


def values_alone(values: Values) -> dict[str, Any]:
    """Values of options without their texts."""
    return {name: each.value for name, each in values.items()}


@lru_cache(maxsize=100_000)
def meant(word: str) -> Any:
    """What a word stands for, the same for ``1e-3`` and ``0.001``, ``4`` and ``4.0``."""
    value = read_word(word)
    if isinstance(value, str):
        try:
            value = float(value)
        except ValueError:
            return value
    return canonical(value)


def canonical(value: Any) -> Any:
    """Settings in the one form in which those that mean the same are the same."""
    if isinstance(value, str) and "\0" not in value:
        return meant(value)
    if isinstance(value, dict):
        return {key: canonical(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [canonical(each) for each in value]
    return int(value) if isinstance(value, float) and math.isfinite(value) and value == int(value) else value


def as_json(value: Any) -> str:
    """Settings as text, whatever order they came in."""
    return json.dumps(canonical(value), sort_keys=True, default=str)


def cut(settings: Tree) -> list[str]:
    """JSON of settings, cut at plain options: text, name of the option, text, and so on."""
    return re.split(r'"\\u0000(.+?)\\u0000"', as_json(settings))


def joined(pieces: Sequence[str], values: Values) -> str:
    """The JSON of a cell."""
    return "".join([values[piece].text if i % 2 else piece for i, piece in enumerate(pieces)])
