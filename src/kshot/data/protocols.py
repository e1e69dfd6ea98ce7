"""Protocols: the classes that a run is trained on, and the test sets that judge it.

Base-to-new and cross-data-set: CoCoOp, arXiv 2203.05557; domain generalisation: CoOp, arXiv 2109.01134.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple, get_args

from kshot.data.splits import Row, Split, display_name, listed
from kshot.errors import UserError, nearest_first

ProtocolName = Literal["all-to-all", "base-to-new", "cross-dataset", "domain-generalisation"]
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
    spelling = {name.casefold(): name for name in class_names}
    names = [display_name(name) for name in target.class_names]
    if foreign := [name for name in names if name.casefold() not in spelling]:
        raise UserError(
            f"{target.name}: protocol domain-generalisation tests on classes of the source only, and it has no "
            f"{listed(foreign)}; other classes are for protocol cross-dataset"
        )
    return [spelling[name.casefold()] for name in names]
