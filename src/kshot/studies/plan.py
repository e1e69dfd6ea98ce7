"""The runs of a study: its cells, each with the words of an ordinary run and an id that says what it computes.

The id is a hash over all settings that can change a result, over the split that they draw and over the backbone's
weights. It stays when the study gets another axis, and two cells with the same one are refused.
"""

from __future__ import annotations

import hashlib
import json
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning.pytorch import seed_everything

from kshot.building import backbone_of, data_of
from kshot.config import Tree, read_word
from kshot.data.catalogue import CATALOGUE, load_split
from kshot.data.downloads import found_at
from kshot.data.sampling import draw
from kshot.data.splits import TEST_SHARE
from kshot.errors import UserError
from kshot.studies.resolving import IMAGES, Resolver, Shared, Values, as_json, joined, naming, values_alone, with_values
from kshot.studies.search import words_for
from kshot.studies.study import Cell, Label, Study, in_words, name_of


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


class Planner:
    """Makes the plan of a study.

    Attributes:
        notes: what there is to know before the runs start, a line each.
    """

    def __init__(self, study: Study) -> None:
        self.study, self.notes = study, list[str]()
        self.weights: dict[str, str] = {}  # digests by the JSON of a backbone
        self.splits: dict[str, str] = {}  # digests by the JSON of what a split is drawn from

    def runs(self) -> list[Planned]:
        """All runs in the order in which a single worker would take them.

        Raises:
            UserError: a cell that cannot be run, or two that are the same run; says which.
        """
        resolver, cells = Resolver(self.study), deque[tuple[Shared, Cell, Values, str]]()
        splits: dict[str, tuple[str, Cell, Shared, Values]] = {}  # by their JSON, with the first cell of each
        for shared in resolver.shared({}, list(self.study.axes)):
            for cell, values in resolver.cells(shared):
                text = joined(shared.data, values)
                cells.append((shared, cell, values, splits.setdefault(text, (text, cell, shared, values))[0]))
        self.notes += resolver.searches.told()
        if not cells:
            raise UserError(f"{self.study.file}: leave_out leaves nothing to run.")
        self.draw_all(splits.values())
        found: dict[str, Planned] = {}
        groups: dict[str, int] = {}
        while cells:  # which are let go one by one, as there may be very many
            shared, cell, values, split = cells.popleft()
            texts = (joined(shared.settings, values), self.splits[split], self.weights_of(cell, shared))
            run = hashlib.sha256("\n".join(texts).encode()).hexdigest()[:16]
            if run in found:
                both = f"({in_words(found[run].axes)}) and ({name_of(cell)})"
                raise UserError(f"{self.study.file}: two cells are the same run: {both}.")
            group = group_of(shared, values)
            groups.setdefault(group, len(groups))
            labels = {axis: value.label for axis, value in cell.items()}
            found[run] = Planned(run, group, labels, [*self.study.words(cell), *words_for(shared.search)])
        return sorted(found.values(), key=lambda planned: groups[planned.group])

    def weights_of(self, cell: Cell, shared: Shared) -> str:
        """The digest of a backbone's weights, which is built for it once, alike where they are random."""
        if shared.backbone not in self.weights:
            with naming(self.study, cell):
                seed_everything(1, verbose=False)
                self.weights[shared.backbone] = backbone_of(shared.tree).weight_sha256
        return self.weights[shared.backbone]

    def draw_all(self, wanted: Iterable[tuple[str, Cell, Shared, Values]]) -> None:
        """Draws all splits, those from the same images after each other, which are read once."""
        by_images: dict[str, list[tuple[str, Cell, Tree]]] = {}
        for text, cell, shared, values in wanted:
            own = {name: value for name, value in values_alone(values).items() if name.startswith("data.")}
            data = with_values({"data": shared.tree["data"]}, own)["data"]
            images = {name: value for name, value in data["init_args"].items() if name in IMAGES}
            by_images.setdefault(as_json(images), []).append((text, cell, data))
        for same in by_images.values():
            self.draw_from(same)

    def draw_from(self, same: list[tuple[str, Cell, Tree]]) -> None:
        """Draws splits from one set of images: the first as a run does, with all of its checks."""
        (text, cell, data), *others = same
        given = data["init_args"]
        with naming(self.study, cell):
            module = data_of({"data": data})
            info = module.split_info()
            self.look_for_images(given, module)
        about = json.dumps([info["source_sha256"], info["targets"]])
        self.splits[text] = f"{info['digest']} {about}"
        split = None
        for text, cell, data in others:
            if given.get("manifest"):  # which holds the draw
                self.splits[text] = f"{info['digest']} {about}"
                continue
            split = (
                split
                or load_split(
                    given["dataset"],
                    given.get("root", "data"),
                    class_names=read_word(given.get("class_names")),
                    test_share=read_word(given.get("test_share", TEST_SHARE)),
                )[0]
            )
            asked = {name: read_word(value) for name, value in data["init_args"].items()}
            sampler, fewer = asked.get("sampler", "coop-v1"), asked.get("allow_fewer", False)
            with naming(self.study, cell):
                drawn = draw(split, asked.get("shots", 16), asked.get("split_seed", 1), sampler, fewer)
            self.splits[text] = f"{drawn.digest} {about}"

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
                self.notes.append(f"Runs on {name} would fail: {error}")


def group_of(shared: Shared, values: Values) -> str:
    """Backbone and data set in words."""
    given, backbone = values.get("data.dataset"), shared.tree["model"]["init_args"]["backbone"]
    dataset = shared.tree["data"]["init_args"]["dataset"] if given is None else given.value
    model = backbone["init_args"].get("model", backbone["class_path"].rpartition(".")[2])
    return f"{model} {hashlib.sha256(shared.backbone.encode()).hexdigest()[:4]} on {dataset}"
