"""``python main.py compare``: runs against the first of them, image by image."""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from kshot.errors import UserError
from kshot.predictions import Answered, read
from kshot.seeing.hub import located
from kshot.seeing.runs import result_of
from kshot.seeing.statistics import difference, holm, mcnemar, wilson
from kshot.showing import Parser, show

Key = tuple[str, int]  # digest of an image, and how many like it came before


def run_compare(words: Sequence[str]) -> int:
    """Compares runs on the images that all of them were tested on; returns 0.

    Raises:
        UserError: words that there are not, what is no tested run, or runs without a common image.
    """
    parser = Parser(prog="main.py compare", description="Compare runs on the same images, with the first of them.")
    parser.add_argument("runs", nargs="+", metavar="RUN", help="two run directories or more, or hf://ORG/NAME")
    parser.add_argument("--test-set", help="by name, as result.json has them (default: the classes trained on)")
    parser.add_argument("--json", action="store_true", help="JSON instead of tables")
    given = parser.parse_args(list(words))
    if len(given.runs) < 2:
        raise UserError("compare needs two runs or more.")
    found = compared([located(run) for run in given.runs], given.test_set)
    for note in found["notes"]:
        print(note, file=sys.stderr)
    if given.json:
        print(json.dumps(found, indent=1))
        return 0
    first, *others = found["runs"]
    rows: list[tuple[Any, ...]] = [(first["run"], first["method"], shown(first), "", "", "", "")]
    rows += [
        (r["run"], r["method"], shown(r), f"{r['difference']:+.1%} ({r['low']:+.1%} to {r['high']:+.1%})",
         r["won"], r["lost"], f"{r['p']:.3g}")
        for r in others
    ]  # fmt: skip
    header = ("run", "method", "accuracy (95 %)", "difference (95 %)", "won", "lost", "McNemar's p")
    corrected = "" if len(others) == 1 else ", p-values corrected for their number (Holm)"
    title = f"{found['images']:,} images of {found['test_set']}; differences from the first run{corrected}"
    show(title, rows, header)
    print()
    each = range(1, len(found["runs"]) + 1)
    table = [
        (c["class_name"], c["images"], *(f"{value:.1%}" for value in c["accuracy"]), *(f"{p:.3g}" for p in c["p"]))
        for c in found["classes"]
    ]
    columns = ("class", "images", *(f"run {i}" for i in each), *(f"p of {i}" for i in each[1:]))
    print("By class, the largest change first; p-values are corrected for the number of classes (Holm).")
    show("", table, columns)
    return 0


def shown(row: dict[str, Any]) -> str:
    """The accuracy of a row with its interval."""
    return f"{row['accuracy']:.1%} ({row['accuracy_low']:.1%} to {row['accuracy_high']:.1%})"


@dataclass(frozen=True, eq=False)
class Paired:
    """Runs on the images that all of them answered.

    Attributes:
        label: (N,) int, the class of each.
        right: (runs, N) bool.
        class_names: in label order, of the first run.
        notes: what was left out.
    """

    label: np.ndarray
    right: np.ndarray
    class_names: list[str]
    notes: list[str]


def compared(directories: Sequence[Path], test_set: str | None = None) -> dict[str, Any]:
    """Paired differences of runs from the first, and class by class, in plain data.

    Of more than two runs, the p-values of the differences are Holm's over the runs; those of the classes are over the
    classes of one difference.

    Raises:
        UserError: as :func:`paired`, or one is no tested run.
    """
    results = [result_of(directory) for directory in directories]
    answered = [read(directory, test_set) for directory in directories]
    pairs = paired(answered, [str(directory) for directory in directories])
    images, (first, *others) = len(pairs.label), pairs.right
    rows: list[dict[str, Any]] = []
    for directory, result, right in zip(directories, results, pairs.right, strict=True):
        low, high = wilson(int(right.sum()), images)
        told = {"accuracy": float(right.mean()), "accuracy_low": low, "accuracy_high": high}
        rows.append({"run": str(directory), "method": result["method"], **told})
    tests = [counted(first, right) for right in others]
    for row, test, p in zip(rows[1:], tests, holm([test["p"] for test in tests]), strict=True):
        row.update(test, p=p)
    classes = by_class(pairs)
    return {"test_set": answered[0].name, "images": images, "runs": rows, "classes": classes, "notes": pairs.notes}


def counted(first: np.ndarray, second: np.ndarray) -> dict[str, Any]:
    """The difference of two runs that are right, (N,) bool each, on the same images."""
    won, lost, images = int((second & ~first).sum()), int((first & ~second).sum()), len(first)
    low, high = difference(won, lost, images)
    told = {"difference": (won - lost) / images, "low": low, "high": high}
    return told | {"won": won, "lost": lost, "p": mcnemar(won, lost)}


def by_class(pairs: Paired) -> list[dict[str, Any]]:
    """Accuracy of each run on the images of each class, and Holm's p-values of its differences from the first."""
    found = []
    for label, name in enumerate(pairs.class_names):
        mine = pairs.right[:, pairs.label == label]
        if mine.shape[1]:
            accuracy = [float(value) for value in mine.mean(1)]
            p = [counted(mine[0], other)["p"] for other in mine[1:]]
            found.append({"class_name": name, "images": mine.shape[1], "accuracy": accuracy, "p": p})
    corrected = [holm([row["p"][i] for row in found]) for i in range(len(pairs.right) - 1)]
    for row, *p in zip(found, *corrected, strict=True):
        row["p"] = p
    return sorted(found, key=lambda row: -max(abs(value - row["accuracy"][0]) for value in row["accuracy"]))


def paired(answered: Sequence[Answered], names: Sequence[str]) -> Paired:
    """Finds the images that all runs answered, by their bytes; copies of an image pair in their order.

    Raises:
        UserError: there are none, or two runs say other classes of one.
    """
    places = [places_of(each) for each in answered]
    common = [key for key in places[0] if all(key in other for other in places[1:])]
    if not common:
        raise UserError(
            f"{' and '.join(names)} were tested on other images: {', '.join(f'{len(p):,}' for p in places)}, of which "
            "none is in all."
        )
    where = [[place[key] for key in common] for place in places]
    right = np.stack([each.right[rows] for each, rows in zip(answered, where, strict=True)])
    notes = []
    if any(len(place) > len(common) for place in places):
        counts = ", ".join(f"{len(place):,}" for place in places)
        notes.append(f"The runs were tested on {counts} images; compared are the {len(common):,} that all share.")
    label, classes = answered[0].label[where[0]], answered[0].class_names
    for other, rows, name in zip(answered[1:], where[1:], names[1:], strict=True):
        for key, mine, row in zip(common, label, rows, strict=True):
            theirs = other.class_names[other.label[row]]
            if theirs != classes[mine]:
                raise UserError(
                    f"The runs do not agree on what an image is, so they cannot be compared: {other.path[row]} "
                    f"(digest {key[0]}) is {classes[mine]!r} in {names[0]} and {theirs!r} in {name}."
                )
    return Paired(label, right, classes, notes)


def places_of(answered: Answered) -> dict[Key, int]:
    """The row of each image."""
    seen: Counter[str] = Counter()
    found: dict[Key, int] = {}
    for row, digest in enumerate(answered.image):
        found[digest, seen[digest]] = row
        seen[digest] += 1
    return found
