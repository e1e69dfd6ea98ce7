"""Protocols: the classes that a run is trained on, and the test sets that judge it.

Base-to-new and cross-data-set: CoCoOp, arXiv 2203.05557; domain generalisation: CoOp, arXiv 2109.01134.

Test sets are closed: their rows are forgotten after reading and read again for testing. No training can see one.
"""

import logging
import warnings
from collections.abc import Iterator, Sequence
from itertools import groupby
from operator import attrgetter
from typing import Any, Literal, NamedTuple, get_args

from kshot.data.catalogue import CATALOGUE, load_split
from kshot.data.copies import same_bytes
from kshot.data.entries import DatasetEntry
from kshot.data.hub_sets import HubImages
from kshot.data.images import ArrayImages, ImageSource
from kshot.data.splits import TEST_SHARE, Row, Split, display_name, listed, words
from kshot.errors import UserError, nearest_first

ProtocolName = Literal["all-to-all", "base-to-new", "cross-dataset", "domain-generalisation"]
logger = logging.getLogger("kshot")
MOST_READ = 20_000  # test images of the hub that are compared: seconds
WITH_TARGETS = ("cross-dataset", "domain-generalisation")


class TestSet(NamedTuple):
    """What one test set is about.

    Attributes:
        name: test, base or new, or the id of the data set.
        class_names: words in label order.
        templates: sentences with one ``{}`` each.
    """

    name: str
    class_names: tuple[str, ...]
    templates: tuple[str, ...]


def check_protocol(protocol: str, targets: Sequence[str] | None) -> None:
    """Raises UserError for an unknown protocol, for targets where there are none to be, or none where there are."""
    if protocol not in get_args(ProtocolName):
        raise UserError(f"unknown protocol {protocol!r}. {nearest_first(protocol, get_args(ProtocolName))}")
    if protocol in WITH_TARGETS and not targets:
        raise UserError(f"protocol {protocol} needs data sets to test on: set --data.targets, as in '[dtd, eurosat]'")
    if targets and protocol not in WITH_TARGETS:
        raise UserError(
            f"protocol {protocol} tests on no other data set: leave out data.targets, or set --data.protocol to "
            f"{' or '.join(WITH_TARGETS)}"
        )


def class_groups(protocol: ProtocolName, split: Split) -> dict[str, range]:
    """Names the test sets of a data set with the labels of each; the first of the source are the ones trained on.

    Base-to-new takes the first ⌈C/2⌉ of the C labels for the base, and the others are new. Raises UserError when there
    is one class, and so no two halves.
    """
    classes = len(split.class_names)
    if protocol != "base-to-new":
        return {"test" if protocol == "all-to-all" else split.name: range(classes)}
    if classes < 2:
        raise UserError(f"{split.name}: protocol base-to-new halves the classes, and there is one: give 2 or more")
    base = (classes + 1) // 2
    return {"base": range(base), "new": range(base, classes)}


def restrict(rows: Sequence[Row], labels: range) -> tuple[Row, ...]:
    """Keeps the rows with one of some adjacent labels, which are numbered from 0 then."""
    return tuple(row._replace(label=row.label - labels.start) for row in rows if row.label in labels)


def as_in_source(target: Split, class_names: Sequence[str]) -> list[str]:
    """Gives a domain's class names as the source spells them, whatever their case; raises UserError for others."""
    spelling = {words(name): name for name in class_names}
    names = [display_name(name) for name in target.said]
    if foreign := [name for name in names if words(name) not in spelling]:
        raise UserError(
            f"{target.name}: protocol domain-generalisation tests on classes of the source only, and it has no "
            f"{listed(foreign)}; other classes are for protocol cross-dataset"
        )
    return [spelling[words(name)] for name in names]


class Source(NamedTuple):
    """A data set that was read: its id, list and digest, what is known about it, and the arguments of ``load_split``.

    Among these is the listing of a folder, so that it is listed once; the rows for testing are forgotten all the same.
    """

    name: str
    file: str
    sha256: str
    entry: DatasetEntry
    arguments: dict[str, Any]

    @property
    def catalogued(self) -> bool:
        """Whether it is one of the catalogue's, and no user's own."""
        return self.arguments["dataset"] in CATALOGUE


def read_source(dataset: str, **arguments: Any) -> tuple[Split, Source]:
    """Reads a data set by the arguments of ``load_split``, and says in the log what its reader found or decided."""
    split, entry = load_split(dataset, **arguments)
    for note in split.notes:
        logger.info(note)
    arguments |= {"dataset": dataset, "listing": split.listing}
    return split, Source(split.name, split.file, split.sha256, entry, arguments)


class HeldOut(NamedTuple):
    """A test set: the name of its part, what it is about, its labels and number of images in its source."""

    part: str
    test_set: TestSet
    labels: range
    images: int
    source: Source


def held_out(
    protocol: ProtocolName, split: Split, source: Source, class_names: Sequence[str], templates: Sequence[str]
) -> list[HeldOut]:
    """Gives the test sets of a data set; raises UserError when one of several is empty."""
    held: list[HeldOut] = []
    groups = class_groups(protocol, split)
    for group, labels in groups.items():
        count = sum(row.label in labels for row in split.test)
        if not count and protocol != "all-to-all":
            whose = f" of the {group} classes" if len(groups) > 1 else ""
            raise UserError(f"{split.name}: there are no test images{whose}")
        names = tuple(display_name(class_names[label]) for label in labels)
        part = "test" if protocol == "all-to-all" else f"test/{group}"
        held.append(HeldOut(part, TestSet(group, names, tuple(templates)), labels, count, source))
    return held


def held_out_target(protocol: ProtocolName, target: str, others: Sequence[HeldOut], **arguments: Any) -> list[HeldOut]:
    """Gives the test set of a target, given the others, that of the data set trained on first, and root and download.

    Raises UserError when it is among the others, cannot be read, or has classes that the protocol does not allow.
    """
    split, source = read_source(target, **arguments)
    trained_on = others[0]
    if split.name in {other.source.name for other in others}:
        raise UserError(
            f"targets: {target!r} is called {split.name!r}, as another data set of this run is: give each one once, "
            f"without the source {trained_on.source.name!r}"
        )
    class_names: Sequence[str] = split.said
    templates: Sequence[str] = [source.entry.template]
    if protocol == "domain-generalisation":
        class_names = as_in_source(split, trained_on.test_set.class_names)
        templates = trained_on.test_set.templates
    else:
        point_out_numbers(target, split, "give the target as a CSV or split file with names")
    return held_out(protocol, split, source, class_names, templates)


def reopened(held: Sequence[HeldOut]) -> Iterator[tuple[HeldOut, ImageSource, tuple[Row, ...]]]:
    """Reads test sets again, with images and rows; raises UserError when a source has changed or has none."""
    for source, group in groupby(held, attrgetter("source")):
        split, entry = load_split(**source.arguments)
        if split.sha256 != source.sha256:
            raise UserError(f"{source.name} has changed since the training images were drawn")
        if not split.test:
            all_trained = source.arguments.get("test_share", TEST_SHARE) is None
            advice = ", as data.test_share is null: all are for training" if all_trained else ""
            raise UserError(f"{source.name}: there are no test images{advice}")
        images = entry.images(source.arguments["root"], "test", split.test, source.arguments["download"])
        for each in group:
            yield each, images, restrict(split.test, each.labels)


def point_out_copies(images: ImageSource, rows: Sequence[Row], source: Source, drawn: Sequence[Row]) -> None:
    """Warns of test images with the bytes of an image that was drawn from a source; arrays are not looked at.

    Of a data set of the hub, whose images have to be read to be compared, at most ``MOST_READ`` are.
    """
    if isinstance(images, ArrayImages) or not drawn:
        return
    trained = source.entry.images(source.arguments["root"], "train", drawn)
    if isinstance(trained, ArrayImages):
        return
    if isinstance(images, HubImages) and len(rows) > MOST_READ:
        logger.info("of %s test images only %s are compared with those that were drawn", f"{len(rows):,}", MOST_READ)
        rows = rows[:MOST_READ]
    if copies := list(same_bytes(images, [row.path for row in rows], trained, [row.path for row in drawn])):
        of = f"{len(copies)} of {len(rows)} test images have the same bytes as one that was drawn"
        logger.warning("%s, which makes the accuracy too high; the first: %s is %s", of, *copies[0])
    images.close()
    trained.close()


def point_out_numbers(dataset: str, split: Split, advice: str) -> None:
    """Warns of class names that are numbers, unless a catalogue data set's are, or others were given."""
    if dataset not in CATALOGUE and not split.prompt_names and all(name.isdecimal() for name in split.class_names):
        called = f"the classes of {split.name} are called {split.class_names[0]!r} and so on"
        warnings.warn(f"{called}: methods with prompts need words, {advice}", stacklevel=4)
