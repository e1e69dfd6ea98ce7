"""Averages over seeds and data sets, with their intervals."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

LEVEL = 0.95
BySeed = Mapping[Any, float]  # values of one data set


def mean_interval(values: Any, level: float = LEVEL) -> tuple[Any, Any]:
    """The mean of n values, (..., n), and half the width of its interval by Student's t with n - 1 degrees of freedom.

    Of one value there is no interval: NaN.
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
