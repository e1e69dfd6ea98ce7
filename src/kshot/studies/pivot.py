"""Means over seeds of a study's runs, in rows and columns."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from kshot.errors import UserError
from kshot.seeing.runs import SHARES
from kshot.studies.index import KEYS, Condition, Index
from kshot.studies.statistics import average
from kshot.studies.tables import Table, Text

SEEDS = ("seed", "seed_everything", "data.split_seed")  # axes whose values are draws
LESS = (
    "ece",
    "brier",
    "seconds",
    "steps",
    "bytes",
    "parameters",
)  # beginnings and ends of columns of which less is better
PER_CENT = {*SHARES, "harmonic_mean", "targets_mean", "forecast", "forecast_low", "forecast_high"}
Label = tuple[Any, ...]
Place = tuple[Label, Label]  # of a cell: its row and its column


@dataclass
class Cell:
    """Runs that a table has in one place.

    Attributes:
        mean: over seeds of their means over everything else; None where no run tells.
        half: half the width of its 95 % t-interval; None for less than two seeds.
        seeds: that have all of the cell's finished runs; only these count, or all where there are none.
        missing: runs that tell nothing, by their state.
        whole: whether it has all runs, and is of the same as the others that it stands beside.
        best: whether none beside it is better.
    """

    mean: float | None = None
    half: float | None = None
    seeds: int = 0
    missing: Counter[str] = field(default_factory=Counter)
    whole: bool = True
    best: bool = False


@dataclass
class Pivot:
    """A table of means.

    Attributes:
        names: the columns that make its rows, and those that make its columns.
        value: the column of which means are taken.
        rows, columns: labels, in their order.
        cells: by row and column; none where there is no run.
        by_row: whether a row's cells are compared, else a column's.
        notes: what the means are of, and what is missing.
    """

    names: tuple[Sequence[str], Sequence[str]]
    value: str
    rows: list[Label]
    columns: list[Label]
    cells: dict[Place, Cell]
    by_row: bool
    notes: list[str]

    def plain(self) -> list[dict[str, Any]]:
        """Its cells, one after another."""
        found = []
        for (row, column), cell in self.cells.items():
            place = dict(zip(self.names[0], row, strict=True)) | dict(zip(self.names[1], column, strict=True))
            figures = {"mean": cell.mean, "half": cell.half, "seeds": cell.seeds, "missing": dict(cell.missing)}
            found.append(place | figures | {"whole": cell.whole, "best": cell.best})
        return found

    def table(self) -> Table:
        """The same for a file."""
        usual = self.usual_seeds()
        heads = [", ".join(map(named, self.names[1], column)) for column in self.columns]
        lines = [[self.cells.get((row, column), Cell()) for column in self.columns] for row in self.rows]
        return Table(
            [*self.names[0], *(f"{head}{what}" for head in heads for what in ("", " half", " n"))],
            [
                [*row, *(v for cell in line for v in (cell.mean, cell.half, cell.seeds))]
                for row, line in zip(self.rows, lines, strict=True)
            ],
            [*self.names[0], *heads],
            [
                [*(Text(shown(label)) for label in row), *(self.read(cell, usual) for cell in line)]
                for row, line in zip(self.rows, lines, strict=True)
            ],
            len(self.names[0]),
        )

    def usual_seeds(self) -> int:
        """The number of seeds that most cells have."""
        counts = Counter(cell.seeds for cell in self.cells.values() if cell.mean is not None)
        return max(counts, key=lambda n: (counts[n], n), default=0)

    def read(self, cell: Cell, usual: int) -> Text:
        """A cell in words: ``91.2 ± 0.8 (n=2) *``."""
        if cell.mean is None:
            return Text("-")
        words = figure(self.value, cell.mean) + (f" ± {figure(self.value, cell.half)}" if cell.half is not None else "")
        return Text(words + f" (n={cell.seeds})" * (cell.seeds != usual) + " *" * (not cell.whole), cell.best)


def pivoted(
    index: Index, rows: Sequence[str], columns: Sequence[str], value: str, where: Sequence[Condition] = ()
) -> Pivot:
    """Means of a column over seeds, for each value of some columns in rows and of others in columns.

    What else differs between runs, such as the data set, is averaged within each seed first; only seeds that have all
    of it count, as for :func:`kshot.studies.statistics.average`.

    Raises:
        UserError: no such column, or one that holds no numbers.
    """
    drawn = [name for name in index.axes if name in SEEDS] or ["seed"]
    drawn = [name for name in drawn if name not in (*rows, *columns)]
    further = [name for name in index.axes or KEYS if name not in (*rows, *columns, *SEEDS)]
    runs: dict[Place, list[tuple[Any, ...]]] = defaultdict(list)
    unit, seed = len(rows) + len(columns), len(rows) + len(columns) + len(further)
    known = [index.values(name) for name in (*rows, *columns)]  # what all runs have, those that are open have, too
    given = [each[0] if len(each) == 1 else None for each in known]
    for state, told, *run in index.select(["state", value, *rows, *columns, *further, *drawn], where):
        place = tuple(v if v is not None else only for v, only in zip(run, given, strict=False))
        runs[place[: len(rows)], place[len(rows) :]].append((state, told, tuple(run[unit:seed]), tuple(run[seed:])))
    cells = {place: Cell() for place in runs}
    planned = {place: {unit for _, _, unit, _ in found} for place, found in runs.items()}
    done: dict[Place, set[Label]] = {}
    twice = 0
    for place, found in runs.items():
        cell, by = cells[place], defaultdict[Label, dict[Label, list[float]]](dict)
        for state, told, other, draw in found:
            if state != "done" or told is None:
                cell.missing[state if state != "done" else f"without {value}"] += 1
            elif isinstance(told, str):
                raise UserError(f"{value!r} holds words, such as {told!r:.60}: a mean needs a column of numbers.")
            else:
                by[other].setdefault(draw, []).append(told)
        done[place] = set(by)
        twice += sum(len(each) > 1 for seeds in by.values() for each in seeds.values())
        if by:
            mean = average({str(u): {s: sum(v) / len(v) for s, v in seeds.items()} for u, seeds in by.items()})
            cell.mean, cell.seeds, cell.half = mean.mean, mean.seeds, None if math.isnan(mean.half) else mean.half
    down, across = (labels(place[i] for place in cells) for i in (0, 1))
    pivot = Pivot((rows, columns), value, down, across, cells, "method" not in rows, [])
    for line in lines_of(pivot):
        compare(line, planned, done, value)
    pivot.notes = list(notes(pivot, further, planned, twice))
    return pivot


def lines_of(pivot: Pivot) -> list[list[tuple[Place, Cell]]]:
    """The cells that stand beside each other: in a row, or in a column where rows are methods."""
    found: dict[Label, list[tuple[Place, Cell]]] = defaultdict(list)
    for place, cell in pivot.cells.items():
        found[place[not pivot.by_row]].append((place, cell))
    return list(found.values())


def compare(
    line: Sequence[tuple[Place, Cell]],
    planned: Mapping[Place, set[Label]],
    done: Mapping[Place, set[Label]],
    value: str,
) -> None:
    """Says which cells of a line are whole, and the best of these, where there are two or more."""
    everything = set().union(*(planned[place] for place, _ in line))
    for place, cell in line:
        cell.whole = not cell.missing and done[place] == everything
    whole = [cell for _, cell in line if cell.whole and cell.mean is not None]
    if len(whole) > 1:
        best = (min if less_is_better(value) else max)(cell.mean for cell in whole if cell.mean is not None)
        for cell in whole:
            cell.best = cell.mean is not None and figure(value, cell.mean) == figure(value, best)


def notes(pivot: Pivot, further: Sequence[str], planned: Mapping[Any, set[Label]], twice: int) -> Iterable[str]:
    """What has to be said about a table."""
    unit = ", in per cent" if pivot.value in PER_CENT else ""
    cells = pivot.cells.values()
    yield f"{pivot.value}{unit}: mean over seeds" + (
        f" ± half the 95 % t-interval, n={pivot.usual_seeds()} where no other is told"
        if any(cell.half is not None for cell in cells)
        else ""
    )
    units = set().union(*planned.values())
    over = [f"{name} ({n})" for i, name in enumerate(further) if (n := len({unit[i] for unit in units})) > 1]
    if over:
        yield f"each mean is over {', '.join(over)}, too"
    if any(cell.best for cell in cells):
        yield f"bold, in LaTeX and Markdown: the best of each {'row' if pivot.by_row else 'column'}, of what is whole"
    missing: Counter[str] = sum((cell.missing for cell in cells), Counter())
    if missing:
        yield f"missing: {', '.join(f'{n:,} {what}' for what, n in missing.items())}"
    if any(not cell.whole and cell.mean is not None for cell in cells):
        yield "*: runs are missing, or the mean is over less than those that it stands beside"
    if twice:
        yield f"{twice:,} times several runs differ in nothing that is named here: they count as one, by their mean"


def labels(found: Iterable[Label]) -> list[Label]:
    """Labels in their order: of the plan, or by size where all are numbers."""
    known = list(dict.fromkeys(found))
    return sorted(known) if all(isinstance(v, (int, float)) for label in known for v in label) else known


def less_is_better(column: str) -> bool:
    """Whether the least value of a column is the best."""
    return column.startswith(LESS) or column.endswith(LESS)


def named(name: str, label: Any) -> str:
    """A label with the name of its column, where it would tell nothing alone."""
    return label if isinstance(label, str) else f"{name} {shown(label)}"


def shown(value: Any) -> str:
    """A label or any value in words."""
    if isinstance(value, float):
        return f"{value:.6g}"
    return "-" if value is None else str(value)


def figure(column: str, value: float) -> str:
    """A mean or half an interval in digits that can be read, in per cent where it is a share."""
    if column in PER_CENT:
        return f"{100 * value:.1f}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
