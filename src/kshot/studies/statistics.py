"""Intervals and tests over seeds and data sets.

Two questions are kept apart. *These data sets, other draws of shots*: data sets are fixed, seeds are the sample, and
the interval is Student's t over averages of one seed each. *Other data sets of this kind*: data sets are the sample;
the interval is a bootstrap over data sets and seeds, and the test is Wilcoxon's over data sets.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

LEVEL = 0.95
FEWEST_SETS = 6  # data sets below which Wilcoxon's test cannot come below 0.05: its least p-value is 2 / 2^n
DRAWS = 10_000  # of a bootstrap
BySeed = Mapping[Any, float]  # values of one data set


def mean_interval(values: Any, level: float = LEVEL) -> tuple[Any, Any]:
    """The mean of n values, (..., n), and half the width of its interval by Student's t with n - 1 degrees of freedom.

    Unlike 1.96 standard errors, it holds its level for any n of normal values. Of one value there is no interval: NaN.
    """
    from scipy.special import stdtrit

    values = np.asarray(values, dtype=float)
    n = values.shape[-1]
    if n < 2:
        missing = np.full(values.shape[:-1], math.nan)[()]
        return (values[..., 0] if n else missing), missing
    return values.mean(-1), stdtrit(n - 1, (1 + level) / 2) * values.std(-1, ddof=1) / math.sqrt(n)


@dataclass(frozen=True)
class Average:
    """An average over data sets.

    Attributes:
        mean: over the data sets of each seed, and over seeds.
        half: half the width of the 95 % t-interval over seeds; NaN for less than two.
        seeds: that have all data sets; 0: none, and the mean is that of the data sets' means.
    """

    mean: float
    half: float
    seeds: int


def average(values: Mapping[str, BySeed]) -> Average:
    """Averages over data sets, with the interval of other draws of shots: data sets are fixed, seeds are the sample.

    Only seeds that every data set has count, so that no data set weighs more than another.
    """
    common = set.intersection(*(set(each) for each in values.values())) if values else set()
    if not common:
        means = [float(np.mean(list(each.values()))) for each in values.values() if each]
        return Average(float(np.mean(means)) if means else math.nan, math.nan, 0)
    mean, half = mean_interval([np.mean([each[seed] for each in values.values()]) for seed in sorted(common)])
    return Average(float(mean), float(half), len(common))


def bootstrap(values: Sequence[Sequence[float]], level: float = LEVEL, draws: int = DRAWS) -> tuple[float, float]:
    """The interval of the mean over new data sets, each with its seeds, by percentiles (Efron 1979).

    Data sets are drawn with replacement, and seeds within each of them: the two-stage bootstrap of Davison and Hinkley
    (1997, section 3.8). It always draws the same.

    Args:
        values: one row a data set, of any lengths above 0.
        level: share of intervals that should hold the truth.
        draws: number of resamples.
    """
    rng = np.random.default_rng(0)
    lengths = np.array([len(row) for row in values])
    table = np.zeros((len(values), lengths.max()))
    for row, given in zip(table, values, strict=True):
        row[: len(given)] = given
    means = np.empty(draws)
    for start in range(0, draws, 1000):  # a bounded piece of memory
        sets = rng.integers(len(values), size=(min(1000, draws - start), len(values)))
        n = lengths[sets]
        seeds = (rng.random((*sets.shape, table.shape[1])) * n[..., None]).astype(int)
        drawn = table[sets[..., None], seeds] * (np.arange(table.shape[1]) < n[..., None])
        means[start : start + len(sets)] = (drawn.sum(-1) / n).mean(-1)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def wilcoxon(differences: Sequence[float]) -> float:
    """The two-sided p-value of Wilcoxon's signed-rank test (1945); 1 where nothing differs.

    It is exact up to 50 data sets, or 16 where some differ alike or not at all, and beyond by the normal distribution.
    """
    from scipy import stats

    given = np.round(np.asarray(differences, dtype=float), 12)  # equal but for the last bits is equal
    sizes = np.abs(given[given != 0])
    if not len(sizes):
        return 1.0
    tied = len(sizes) < len(given) or len(np.unique(sizes)) < len(sizes)
    every = stats.PermutationMethod(n_resamples=2**16)  # of 16 signs and fewer it counts all
    method = every if tied and len(given) <= 16 else "auto"
    return float(stats.wilcoxon(given, method=method).pvalue)


@dataclass(frozen=True)
class Paired:
    """The difference of two contenders on identical splits.

    Attributes:
        mean, half, seeds: as in :class:`Average`, of differences.
        low, high: the bootstrap's interval for new data sets; NaN for less than ``FEWEST_SETS``.
        p: Wilcoxon's over the data sets' mean differences.
        sets: the mean difference of each data set and half the width of its t-interval over seeds.
    """

    mean: float
    half: float
    seeds: int
    low: float
    high: float
    p: float
    sets: dict[str, tuple[float, float]] = field(default_factory=dict)

    @property
    def told(self) -> bool:
        """Whether the t-interval over seeds leaves 0 out: for these data sets."""
        return abs(self.mean) > self.half  # False where half is NaN


def paired(differences: Mapping[str, BySeed]) -> Paired:
    """Summarises differences by data set and seed."""
    whole = average(differences)
    rows = [list(each.values()) for each in differences.values()]
    low, high = bootstrap(rows) if len(rows) >= FEWEST_SETS else (math.nan, math.nan)
    sets = {name: mean_interval(list(each.values())) for name, each in differences.items()}
    plain = {name: (float(mean), float(half)) for name, (mean, half) in sets.items()}
    p = wilcoxon([mean for mean, _ in plain.values()])
    return Paired(whole.mean, whole.half, whole.seeds, low, high, p, plain)


def too_few(sets: int, comparisons: int = 1) -> str:
    """Says why Wilcoxon's test over so many data sets can tell nothing at 5 %; empty where it can.

    The least p-value of n data sets is 2 / 2^n, and Holm's correction multiplies the least by the comparisons.
    """
    if sets < 2:
        return "One data set says nothing about others: intervals are over the draws of its shots alone."
    least = 2.0 ** (1 - sets)
    if least > 1 - LEVEL:
        return f"{sets} data sets are too few for Wilcoxon's test: its p-value cannot be below {least:.2g}."
    if least * comparisons > 1 - LEVEL:
        return (
            f"{sets} data sets are too few for {comparisons} comparisons at once: a p-value corrected for their number "
            f"cannot be below {least * comparisons:.2g}."
        )
    return ""


@dataclass(frozen=True)
class Ranks:
    """Contenders ranked on each data set.

    Attributes:
        mean: ranks, (k,), 1 for the best.
        p: of Friedman's test that all are alike.
        distance: the critical one of Nemenyi: mean ranks further apart differ at 5 %.
        groups: indices of contenders that cannot be told apart, the largest such groups only.
    """

    mean: np.ndarray
    p: float
    distance: float
    groups: list[list[int]]


def ranks(values: np.ndarray) -> Ranks:
    """Friedman's test (1937) and Nemenyi's critical distance (1963), as Demšar puts them (2006, JMLR 7:1).

    ``values`` (N data sets, k contenders), k at least 3, higher is better; equal ones share their mean rank.
    """
    from scipy import stats

    values = np.round(values, 12)
    sets, contenders = values.shape
    mean = stats.rankdata(-values, axis=1).mean(0)
    alike = bool((values == values[:, :1]).all())
    p = 1.0 if alike else float(stats.friedmanchisquare(*values.T).pvalue)
    quantile = stats.studentized_range.ppf(LEVEL, contenders, np.inf) / math.sqrt(2)
    distance = float(quantile * math.sqrt(contenders * (contenders + 1) / (6 * sets)))
    order = np.argsort(mean, kind="stable").tolist()
    found: list[list[int]] = []
    for i, first in enumerate(order):
        group = [j for j in order[i:] if mean[j] - mean[first] < distance]
        if len(group) > 1 and not (found and set(group) <= set(found[-1])):
            found.append(group)
    return Ranks(mean, p, distance, found)
