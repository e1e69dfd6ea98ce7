"""The runs of a study: its cells, each with the words of an ordinary run and an id that says what it computes.

The id is a hash over all settings that can change a result, over the split that they draw and over the backbone's
weights. It stays when the study gets another axis, and two cells with the same one are refused.

Settings are resolved once for each combination of values that are configs or classes. Plain values, such as shots and
seeds, are checked where they belong and put in their places, so that 100,000 runs are planned in seconds.
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from lightning.pytorch import seed_everything

from kshot.available import check
from kshot.building import backbone_of, data_of
from kshot.config import Tree, read_command_line, read_word, word_of
from kshot.data.catalogue import CATALOGUE, load_split
from kshot.data.downloads import found_at
from kshot.data.sampling import draw
from kshot.data.splits import TEST_SHARE
from kshot.errors import UserError
from kshot.layering import lay, options_below, written_out
from kshot.places import Place, Places
from kshot.settings import OPTIONS, laid, needed
from kshot.studies.study import Cell, Label, Study, name_of

NO_MATTER = {  # what changes no result: where things are kept, what is shown, how images are loaded
    "run": ("root", "name", "save_every"),
    "trainer": ("default_root_dir", "enable_model_summary", "enable_progress_bar", "log_every_n_steps", "logger"),
    "data": ("download", "keep_decoded", "num_workers", "root", "store_gb"),
}
LAID = ("trainer.", "model.backbone.", "model.targets")  # checked, or built, together with other settings
DRAWN = ("shots", "split_seed")  # of the data, what a draw from the same images depends on


@dataclass(frozen=True, slots=True)
class Planned:
    """A run of a study.

    Attributes:
        id: what it computes, 16 hexadecimal digits.
        group: backbone and data set in words; runs of one share them in a worker.
        axes: its labels.
        words: of its command line after ``fit``, but for where it is kept.
    """

    id: str
    group: str
    axes: Mapping[str, Label]
    words: list[str]


@dataclass
class Resolved:
    """Settings that some cells share but for the values of plain options.

    Attributes:
        cell: what the cells have in common.
        free: the other axes.
        places, tree: of :func:`~kshot.settings.laid`.
        plain: the places of the options of the free axes.
        settings, data: JSON of what changes a result, and of the data, each cut where a plain option stands.
        backbone: JSON of the backbone.
    """

    cell: Cell
    free: list[str]
    places: Places
    tree: Tree
    plain: dict[str, Place]
    settings: list[str]
    data: list[str]
    backbone: str


class Planner:
    """Makes the plan of a study.

    Attributes:
        notes: what there is to know before the runs start, a line each.
    """

    def __init__(self, study: Study) -> None:
        self.study, self.notes = study, list[str]()
        self.laid: dict[tuple[str, str, str], Any] = {}  # plain values by option, type and word
        self.named: dict[str, str] = {}  # digests of backbones' weights by their JSON
        self.drawn: dict[str, str] = {}  # digests of splits by the JSON of their data

    def runs(self) -> list[Planned]:
        """All runs in the order in which a single worker would take them.

        Raises:
            UserError: a cell that cannot be run, or two that are the same run; says which.
        """
        cells = [(shared, *each) for shared in self.resolved({}, list(self.study.axes)) for each in self.cells(shared)]
        if not cells:
            raise UserError(f"{self.study.file}: leave_out leaves nothing to run.")
        data = {text: (cell, shared, values) for shared, cell, values, text in cells}
        self.draw_all(data)
        found: dict[str, Planned] = {}
        groups: dict[str, int] = {}
        for shared, cell, values, data_text in cells:
            if shared.backbone not in self.named:
                self.named[shared.backbone] = self.weights(cell, shared)
            text = "\n".join((joined(shared.settings, values), self.drawn[data_text], self.named[shared.backbone]))
            run = hashlib.sha256(text.encode()).hexdigest()[:16]
            if run in found:
                other = ", ".join(f"{axis} {label}" for axis, label in found[run].axes.items())
                raise UserError(f"{self.study.file}: two cells are the same run: ({other}) and ({name_of(cell)}).")
            group = self.group(shared, values)
            groups.setdefault(group, len(groups))
            labels = {axis: value.label for axis, value in cell.items()}
            found[run] = Planned(run, group, labels, self.study.words(cell))
        return sorted(found.values(), key=lambda planned: groups[planned.group])

    # ------------------------------------------------------------------------------------------------- settings

    def resolved(self, cell: Cell, rest: list[str]) -> Iterator[Resolved]:
        """Settings of a part of a cell, divided further until the axes that are left hold plain values only."""
        with naming(self.study, cell):
            line = read_command_line(["fit", *self.study.words(cell)], list(OPTIONS))
            places, tree = laid(line)
        options = {name: place for name, place, _ in options_below(places, tree)}
        for axis in rest:
            own = {option for value in self.study.axes[axis] for option in value.options}
            others = {o for name, vs in self.study.axes.items() if name != axis for v in vs for o in v.options}
            holds_configs = any(value.configs for value in self.study.axes[axis])
            if holds_configs or not all(is_plain(option, options.get(option), others) for option in own):
                left = [name for name in rest if name != axis]
                for value in self.study.axes[axis]:
                    more = cell | {axis: value}
                    yield from self.resolved({name: more[name] for name in self.study.axes if name in more}, left)
                return
        free = {o for axis in rest for value in self.study.axes[axis] for o in value.options}
        yield self.shared(cell, rest, places, tree, {option: options[option] for option in free}, line)

    def shared(self, cell: Cell, rest: list[str], places: Places, tree: Tree, plain: Any, line: Any) -> Resolved:
        """What cells share, after the checks that a run makes before it builds anything."""
        first = cell | next(self.study.cells(rest))
        with naming(self.study, first):
            filled = with_values(tree, self.values(first, rest, plain))
            missing = needed(places, filled, line)
            if missing is not None:
                raise UserError(missing)
            check(filled["model"]["init_args"], filled["trainer"])
        full = with_values(written_out(places, tree), {name: f"\0{name}\0" for name in plain})
        data, backbone = full["data"], full["model"]["init_args"]["backbone"]
        settings = {name: value for name, value in full.items() if name not in NO_MATTER}
        for name, ignored in NO_MATTER.items():
            own = full[name]["init_args"] if name == "data" else full[name]
            settings[name] = {key: value for key, value in own.items() if key not in ignored}
        return Resolved(cell, rest, places, tree, plain, cut(settings), cut(data), as_json(backbone))

    def values(self, cell: Cell, axes: Sequence[str], plain: Mapping[str, Place]) -> dict[str, Any]:
        """The values of plain options in a cell, as the command line would lay them."""
        found = {}
        for axis in axes:
            for option, value in cell[axis].options.items():
                word, place = word_of(value), plain[option]
                key = (option, str(place.hint), word)
                if key not in self.laid:
                    self.laid[key] = lay(place, None, word, option)
                found[option] = self.laid[key]
        return found

    def cells(self, shared: Resolved) -> Iterator[tuple[Cell, dict[str, Any], str]]:
        """The cells of shared settings that are run, with their plain options and the JSON of the data."""
        for more in self.study.cells(shared.free):
            own = shared.cell | more
            cell = {axis: own[axis] for axis in self.study.axes}
            if self.study.leaves_out(cell):
                continue
            try:
                values = self.values(cell, shared.free, shared.plain)
            except UserError as error:
                raise UserError(f"{self.study.file}: {name_of(cell)}: {error}") from error
            yield cell, values, joined(shared.data, values)

    def group(self, shared: Resolved, values: Mapping[str, Any]) -> str:
        """Backbone and data set in words."""
        given, init = values.get("data.dataset"), shared.tree["model"]["init_args"]["backbone"]
        dataset = shared.tree["data"]["init_args"]["dataset"] if given is None else given
        model = init["init_args"].get("model", init["class_path"].rpartition(".")[2])
        return f"{model} {hashlib.sha256(shared.backbone.encode()).hexdigest()[:4]} on {dataset}"

    # ------------------------------------------------------------------------------------ what settings stand for

    def weights(self, cell: Cell, shared: Resolved) -> str:
        """The digest of a backbone's weights, which is built for it, alike where they are random."""
        with naming(self.study, cell):
            seed_everything(1, verbose=False)
            return backbone_of(shared.tree).weight_sha256

    def draw_all(self, wanted: Mapping[str, tuple[Cell, Resolved, dict[str, Any]]]) -> None:
        """Draws all splits, those from the same images after each other, which are read once."""
        by_source: dict[str, list[tuple[str, Cell, Tree]]] = {}
        for text, (cell, shared, values) in wanted.items():
            data = with_values(shared.tree, {n: v for n, v in values.items() if n.startswith("data.")})["data"]
            rest = {name: value for name, value in data["init_args"].items() if name not in DRAWN}
            by_source.setdefault(as_json(rest), []).append((text, cell, data))
        for same in by_source.values():
            self.draw_from(same)

    def draw_from(self, same: list[tuple[str, Cell, Tree]]) -> None:
        """Draws splits from one set of images: the first as a run does, with all of its checks."""
        _, cell, data = same[0]
        given = data["init_args"]
        with naming(self.study, cell):
            module = data_of({"data": data})
            info = module.split_info()
            about = json.dumps([info["source_sha256"], info["targets"]])
            self.look_for_images(given, module)
        split = None
        for text, own, each in same:
            drawn = each["init_args"]
            with naming(self.study, own):
                if given.get("manifest") or each is data:
                    digest = info["digest"]
                else:
                    split = (
                        split
                        or load_split(
                            given["dataset"],
                            given.get("root", "data"),
                            class_names=read_word(given.get("class_names")),
                            test_share=read_word(given.get("test_share", TEST_SHARE)),
                        )[0]
                    )
                    shots, seed = read_word(drawn.get("shots", 16)), read_word(drawn.get("split_seed", 1))
                    sampler, fewer = given.get("sampler", "coop-v1"), read_word(given.get("allow_fewer", False))
                    digest = draw(split, shots, seed, sampler, fewer).digest
            self.drawn[text] = f"{digest} {about}"

    def look_for_images(self, given: Tree, module: Any) -> None:
        """Notes a data set whose images are not all on this machine."""
        name, root = given["dataset"], given.get("root", "data")
        if read_word(given.get("download", False)):
            if name in CATALOGUE and not found_at(name, Path(root)):
                self.notes.append(f"{name} is not below {root}: the first run downloads it.")
        elif module.test_share is not None:
            try:
                module.check_test_files()
            except UserError as error:
                self.notes.append(f"runs on {name} would fail: {error}")


class naming:  # noqa: N801  used as a function
    """Says of a mistake inside which cell it is in."""

    def __init__(self, study: Study, cell: Cell) -> None:
        self.study, self.cell = study, cell

    def __enter__(self) -> None: ...

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, UserError):
            where = f"{self.study.file}: {name_of(self.cell)}".removesuffix(": ")
            raise UserError(f"{where}: {error}") from error


def is_plain(option: str, place: Place | None, others: set[str]) -> bool:
    """Whether an option takes values that change nothing but themselves, and no other axis sets it or what it is in."""
    if place is None or place.bases or place.group or option.startswith(LAID):
        return False
    return not any(f"{option}.".startswith(f"{other}.") or other.startswith(f"{option}.") for other in others)


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


@lru_cache(maxsize=100_000)
def number_in(word: str) -> Any:
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
        return number_in(value)
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


def joined(pieces: Sequence[str], values: Mapping[str, Any]) -> str:
    """The JSON of a cell."""
    return "".join(as_json(values[piece]) if i % 2 else piece for i, piece in enumerate(pieces))
