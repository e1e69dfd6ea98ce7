"""The test images of a run. Their rows are forgotten after reading and read again for testing."""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from kshot.data.catalogue import CATALOGUE, load_split
from kshot.data.parts import Part
from kshot.data.protocols import ProtocolName, TestSet, as_in_source, class_groups, restrict
from kshot.data.sources import DatasetEntry
from kshot.data.splits import Split, display_name
from kshot.errors import UserError

Arguments = tuple[str, str, list[str] | None, bool]  # of load_split


@dataclass(frozen=True)
class _Closed:
    """What reads a data set again, what must not have changed by then, and the labels of its test parts."""

    arguments: Arguments
    entry: DatasetEntry
    sha256: str
    parts: Mapping[str, range]


class HeldOut:
    """The test sets of a run, closed: nothing that trains can see a row of them.

    Attributes:
        sets: by the names of their parts, in the order of their loaders; the first has the classes trained on.
        count: test images in all.
        digests: by data set, the digest of its source.
    """

    def __init__(self, protocol: ProtocolName) -> None:
        self.protocol = protocol
        self.sets: dict[str, TestSet] = {}
        self.count = 0
        self._closed: dict[str, _Closed] = {}

    @property
    def digests(self) -> dict[str, str]:
        return {name: closed.sha256 for name, closed in self._closed.items()}

    def add(
        self,
        split: Split,
        entry: DatasetEntry,
        arguments: Arguments,
        class_names: Sequence[str],
        templates: Sequence[str],
    ) -> None:
        """Adds the test sets of a data set, given what ``load_split`` made of which arguments.

        Raises:
            UserError: one of them is empty; without other test sets that is no error before testing.
        """
        groups = class_groups(self.protocol, split)
        parts: dict[str, range] = {}
        for group, labels in groups.items():
            count = sum(row.label in labels for row in split.test)
            if not count and self.protocol != "all-to-all":
                whose = f" of the {group} classes" if len(groups) > 1 else ""
                raise UserError(f"{split.name}: there are no test images{whose}")
            self.count += count
            part = "test" if self.protocol == "all-to-all" else f"test/{group}"
            names = tuple(display_name(class_names[label]) for label in labels)
            parts[part], self.sets[part] = labels, TestSet(group, names, tuple(templates))
        self._closed[split.name] = _Closed(arguments, entry, split.sha256, parts)

    def add_target(self, target: str, root: str, download: bool) -> None:
        """Adds a data set other than the one trained on.

        Raises:
            UserError: it is there already, cannot be read, or has classes or images that the protocol does not allow.
        """
        arguments = (target, root, None, download)
        split, entry = load_split(*arguments)
        if split.name in self._closed:
            raise UserError(
                f"targets: {target!r} is called {split.name!r}, as another data set of this run is: give each one "
                f"once, without the source {next(iter(self._closed))!r}"
            )
        if self.protocol == "domain-generalisation":
            source = next(iter(self.sets.values()))
            self.add(split, entry, arguments, as_in_source(split, source.class_names), source.templates)
        else:
            point_out_numbers(target, split, "give the target as a CSV or split file with names")
            self.add(split, entry, arguments, split.class_names, [entry.template])

    def open(self, image_size: int, skip_unreadable: bool) -> dict[str, Part]:
        """Reads the rows again, and opens a part for each test set.

        Raises:
            UserError: a source has changed, or there are no images.
        """
        opened: dict[str, Part] = {}
        for name, closed in self._closed.items():
            split, entry = load_split(*closed.arguments)
            if split.sha256 != closed.sha256:
                raise UserError(f"{name} has changed since the training images were drawn")
            if not split.test:
                raise UserError(f"{name}: there are no test images")
            _, root, _, download = closed.arguments
            source = entry.images(root, "test", split.test, download)
            for part, labels in closed.parts.items():
                rows = restrict(split.test, labels)
                opened[part] = Part(source, rows, image_size, name=part, lazy=True, skip_unreadable=skip_unreadable)
        return opened

    def source_of(self, part: str) -> tuple[str, str, DatasetEntry]:
        """Gives name, digest and entry of the data set of a part."""
        name, closed = next((name, closed) for name, closed in self._closed.items() if part in closed.parts)
        return name, closed.sha256, closed.entry


def point_out_numbers(dataset: str, split: Split, advice: str) -> None:
    """Warns of class names that are numbers, unless a catalogue data set's are."""
    if dataset not in CATALOGUE and all(name.isdecimal() for name in split.class_names):
        called = f"the classes of {split.name} are called {split.class_names[0]!r} and so on"
        warnings.warn(f"{called}: methods with prompts need words, {advice}", stacklevel=4)
