"""The runs of a study as a grid: contenders by data sets, shots and seeds."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from kshot.errors import UserError, nearest_first
from kshot.studies.statistics import Average, average

Row = Mapping[str, Any]
Cell = tuple[str, str, int | None]  # contender, data set, shots
Draw = tuple[str, int | None, Any]  # data set, shots, seed
METRICS = {
    "acc": "accuracy",
    "acc_class_mean": "mean accuracy of the classes",
    "f1_macro": "macro F1",
    "harmonic_mean": "harmonic mean of base and new accuracy",
}
PLACED = {  # axes that are no part of a contender's name
    *("method", "dataset", "shots", "seed", "protocol"),
    *("data.dataset", "data.shots", "data.protocol", "seed_everything", "data.split_seed"),
}


@dataclass(frozen=True, eq=False)
class Grid:
    """Finished runs in their places.

    Attributes:
        metric: the name of what is compared, in rows.
        contenders: by name, the best first.
        sets: data sets; with the protocol in brackets where the study has several.
        shots: a class, ascending; None for all images, last.
        runs: rows by cell and seed.
        notes: what was left out.
    """

    metric: str
    contenders: list[str]
    sets: list[str]
    shots: list[int | None]
    runs: dict[Cell, dict[Any, Row]]
    notes: list[str]

    def values(self, contender: str, name: str, shots: int | None) -> dict[Any, float]:
        """The metric by seed."""
        return {seed: row[self.metric] for seed, row in self.runs.get((contender, name, shots), {}).items()}

    def sets_at(self, shots: int | None) -> list[str]:
        """Data sets that any contender has at so many shots."""
        there = {name for _, name, each in self.runs if each == shots}
        return [name for name in self.sets if name in there]

    def average(self, contender: str, shots: int | None) -> Average | None:
        """Over all data sets; None where the contender lacks one, as its average would be of other data sets."""
        found = {name: self.values(contender, name, shots) for name in self.sets_at(shots)}
        return average(found) if found and all(found.values()) else None


def grid_of(rows: Iterable[Row], axes: Mapping[str, Sequence[Any]], metric: str = "acc") -> Grid:
    """Places the finished runs of a study.

    A contender is a method with the values of all further axes of the study that vary. Protocols are no contenders:
    what they measure is not the same, so a data set under two protocols counts as two.

    Raises:
        UserError: no finished run has the metric, or shots are no numbers.
    """
    done = [row for row in rows if row.get("state") == "done"]
    kept = [row for row in done if isinstance(row.get(metric), (int, float)) and math.isfinite(row[metric])]
    if not kept:
        why = "no run is finished" if not done else f"none of {len(done):,} finished runs has {metric!r}"
        raise UserError(f"There is nothing to report: {why}.")
    notes = [f"{len(done) - len(kept):,} finished runs have no {metric}: left out."] * (len(kept) < len(done))
    further = [name for name, labels in axes.items() if name not in PLACED and len(labels) > 1]
    several = len({row.get("protocol") for row in kept}) > 1
    words = sorted({repr(row["shots"]) for row in kept if isinstance(row.get("shots"), str)})
    if words:
        raise UserError(f"A report needs numbers of shots, and this study has the labels {', '.join(words)}.")
    runs: dict[Cell, dict[Any, Row]] = defaultdict(dict)
    twice = 0
    for row in kept:
        name = f"{row.get('dataset')} ({row.get('protocol')})" if several else str(row.get("dataset"))
        cell = runs[contender_of(row, further), name, row.get("shots")]
        twice += row.get("seed") in cell
        cell[row.get("seed")] = row
    if twice:
        notes.append(f"{twice} runs are of a cell and seed that has another: the last one listed counts.")
    sets = list(dict.fromkeys(name for _, name, _ in runs))
    shots = sorted({k for _, _, k in runs}, key=lambda k: math.inf if k is None else k)
    grid = Grid(metric, sorted({who for who, _, _ in runs}), sets, shots, dict(runs), notes)
    return Grid(metric, ranked(grid), sets, shots, dict(runs), notes)


def contender_of(row: Row, further: Sequence[str]) -> str:
    """The name of a contender: its method, and what else varies."""
    more = [f"{name.rpartition('.')[2]} {row.get(name)}" if "." in name else str(row.get(name)) for name in further]
    return " · ".join([str(row.get("method")), *more])


def ranked(grid: Grid) -> list[str]:
    """Contenders, the best first: by how far above the mean of its cells each is, so that easy cells do not lift it."""
    means = {cell: sum(row[grid.metric] for row in rows.values()) / len(rows) for cell, rows in grid.runs.items()}
    level: dict[Any, list[float]] = defaultdict(list)
    for (_, *where), value in means.items():
        level[tuple(where)].append(value)
    above: dict[str, list[float]] = defaultdict(list)
    for (who, *where), value in means.items():
        others = level[tuple(where)]
        above[who].append(value - sum(others) / len(others))
    return sorted(grid.contenders, key=lambda who: (-sum(above[who]) / len(above[who]), who))


@dataclass(frozen=True)
class Ground:
    """What several contenders were all run on.

    Attributes:
        contenders: that have all of it, the best first.
        draws: data sets, shots and seeds.
        left_out: contenders that lack some, with the number of draws that they have of these.
        whole: the number of draws that any contender has.
    """

    contenders: list[str]
    draws: list[Draw]
    left_out: dict[str, int]
    whole: int

    def sentence(self) -> str:
        """What is compared, and who is left out."""
        sets, seeds = (len({draw[i] for draw in self.draws}) for i in (0, 2))
        said = (
            f"Over the {len(self.draws):,} of {self.whole:,} draws ({counted(sets, 'data set')}, "
            f"{counted(seeds, 'seed')}) that are shared by {counted(len(self.contenders), 'contender')}."
        )
        lacking = ", ".join(f"{who} ({n:,})" for who, n in self.left_out.items())
        return said + (f" Left out, as they have fewer of these: {lacking}." if lacking else "")


def common_ground(grid: Grid) -> Ground:
    """The runs that most contenders share: as many contenders times draws that all of them have as can be found.

    Contenders leave one by one, first the one that alone stands in the way of most draws (of equal ones, the one with
    the fewest), and the best of all these sets is taken.
    """
    every = sorted(
        {(name, k, seed) for (_, name, k), rows in grid.runs.items() for seed in rows},
        key=lambda draw: (grid.sets.index(draw[0]), grid.shots.index(draw[1]), str(draw[2])),
    )
    place = {draw: i for i, draw in enumerate(every)}
    has = np.zeros((len(grid.contenders), len(every)), dtype=bool)
    row = {who: i for i, who in enumerate(grid.contenders)}
    for (who, name, k), rows in grid.runs.items():
        has[row[who], [place[name, k, seed] for seed in rows]] = True
    left = list(range(len(has)))
    best: tuple[int, list[int], Any] = (0, [], has[0])
    while left:
        shared = has[left].all(0)
        if len(left) * shared.sum() > best[0]:
            best = len(left) * int(shared.sum()), list(left), shared
        alone = (~has[left]).sum(0) == 1
        left.remove(max(left, key=lambda i: ((alone & ~has[i]).sum(), -has[i].sum(), i)))
    _, able, shared = best
    left_out = {who: int((has[i] & shared).sum()) for who, i in row.items() if i not in able}
    draws = [draw for draw, kept in zip(every, shared, strict=True) if kept]
    ground = Ground([grid.contenders[i] for i in able], draws, left_out, len(every))
    return replace(ground, contenders=sorted(ground.contenders, key=lambda who: -mean_on(grid, ground, who, None)))


def mean_on(grid: Grid, ground: Ground, who: str, name: str | None, column: str = "") -> float:
    """The mean of a contender over the common ground, on a data set or on all; NaN where a run does not tell."""
    rows = [grid.runs[who, each, k][seed] for each, k, seed in ground.draws if name in (None, each)]
    values = [value for row in rows if isinstance(value := row.get(column or grid.metric), (int, float))]
    return float(np.mean(values)) if len(values) == len(rows) else math.nan


def differences(grid: Grid, first: str, second: str) -> tuple[dict[str, dict[Any, float]], int, int]:
    """``second - first`` by data set and seed, each the mean over shots, on identical splits only.

    Returns:
        The differences; the number of pairs; the number of pairs that were left out because their splits differ or are
        not told.
    """
    found: dict[str, dict[Any, list[float]]] = defaultdict(lambda: defaultdict(list))
    count: Counter[bool] = Counter()
    for (who, name, shots), rows in grid.runs.items():
        if who != second:
            continue
        others = grid.runs.get((first, name, shots), {})
        for seed in rows.keys() & others.keys():
            mine, theirs = rows[seed], others[seed]
            same = mine.get("split") is not None and mine.get("split") == theirs.get("split")
            count[same] += 1
            if same:
                found[name][seed].append(mine[grid.metric] - theirs[grid.metric])
    plain = {
        name: {seed: sum(each) / len(each) for seed, each in sorted(found[name].items(), key=lambda item: str(item[0]))}
        for name in grid.sets
        if name in found
    }
    return plain, count[True], count[False]


def baseline_of(grid: Grid, ground: Ground, wanted: str | None) -> str:
    """The contender that others are compared with: the named one, or the best of the common ground.

    Raises:
        UserError: there is none of that name.
    """
    if wanted is None:
        return ground.contenders[0]
    if wanted not in grid.contenders:
        raise UserError(f"There is no contender {wanted!r} in this study. {nearest_first(wanted, grid.contenders)}")
    return wanted


def counted(number: int, what: str) -> str:
    """A number with its noun."""
    return f"{number:,} {what}" + ("" if number == 1 else "s")
