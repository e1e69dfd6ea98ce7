"""The runs of a study as a grid: contenders by data sets, shots and seeds."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

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

    def draws(self, contender: str) -> set[Draw]:
        """What a contender was run on."""
        return {(name, k, seed) for (who, name, k), rows in self.runs.items() if who == contender for seed in rows}


def grid_of(rows: Iterable[Row], axes: Mapping[str, Sequence[Any]], metric: str = "acc") -> Grid:
    """Places the finished runs of a study.

    A contender is a method with the values of all further axes of the study that vary. Protocols are no contenders:
    what they measure is not the same, so a data set under two protocols counts as two.

    Raises:
        UserError: no finished run has the metric.
    """
    done = [row for row in rows if row.get("state") == "done"]
    kept = [row for row in done if isinstance(row.get(metric), (int, float)) and math.isfinite(row[metric])]
    if not kept:
        why = "no run is finished" if not done else f"none of {len(done):,} finished runs has {metric!r}"
        raise UserError(f"There is nothing to report: {why}.")
    notes = (
        [f"{len(done) - len(kept)} finished runs have no {metric}, and are left out."] if len(kept) < len(done) else []
    )
    further = [name for name, labels in axes.items() if name not in PLACED and len(labels) > 1]
    several = len({row.get("protocol") for row in kept}) > 1
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
    """

    contenders: list[str]
    draws: list[Draw]
    left_out: dict[str, int]

    def sentence(self) -> str:
        """What is compared, and who is left out."""
        sets, seeds = (len({draw[i] for draw in self.draws}) for i in (0, 2))
        said = (
            f"Over {len(self.draws):,} runs of each ({counted(sets, 'data set')}, {counted(seeds, 'seed')}) that "
            f"{len(self.contenders)} contenders all have."
        )
        lacking = ", ".join(f"{who} ({n:,})" for who, n in self.left_out.items())
        return said + (f" Left out, as they have fewer of these: {lacking}." if lacking else "")


def common_ground(grid: Grid) -> Ground:
    """The runs that most contenders share: the largest number of contenders times draws that all of them have."""
    draws = {who: grid.draws(who) for who in grid.contenders}
    best: tuple[int, list[str], set[Draw]] = (0, [], set())
    for wanted in draws.values():
        able = [who for who in grid.contenders if draws[who] >= wanted]
        if len(able) * len(wanted) > best[0]:
            best = len(able) * len(wanted), able, wanted
    _, able, wanted = best
    left_out = {who: len(draws[who] & wanted) for who in grid.contenders if who not in able}
    ordered = sorted(wanted, key=lambda draw: (grid.sets.index(draw[0]), grid.shots.index(draw[1]), str(draw[2])))
    return Ground(able, ordered, left_out)


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
