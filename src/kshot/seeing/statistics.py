"""Intervals and tests for accuracies, and for the difference of two on the same images."""

from __future__ import annotations

import math
from collections.abc import Sequence

Z = 1.959963984540054  # 97.5 % of a normal distribution lie below


def wilson(right: int, images: int) -> tuple[float, float]:
    """The 95 % interval of an accuracy by Wilson's score (1927); the whole of [0, 1] for no images."""
    if not images:
        return 0.0, 1.0
    share, extra = right / images, Z**2 / images
    middle = (share + extra / 2) / (1 + extra)
    half = Z / (1 + extra) * math.sqrt(share * (1 - share) / images + extra / (4 * images))
    return max(0.0, middle - half), min(1.0, middle + half)


def mcnemar(won: int, lost: int) -> float:
    """McNemar's exact test of two runs that answered the same images: the two-sided p-value.

    Of the images that one of them alone has right, each is a fair coin where neither is better: the p-value is twice
    the smaller tail of Binomial(won + lost, 1/2), at most 1.

    Args:
        won: images that the second alone has right.
        lost: images that the first alone has right.
    """
    n, least = won + lost, min(won, lost)
    whole = math.lgamma(n + 1) - n * math.log(2)
    terms = (math.exp(whole - math.lgamma(k + 1) - math.lgamma(n - k + 1)) for k in range(least + 1))
    return min(1.0, 2 * math.fsum(terms))


def difference(won: int, lost: int, images: int) -> tuple[float, float]:
    """The 95 % interval of the difference of two accuracies on the same images.

    By Wald's formula with half an image added to each of the four cells (Agresti and Min 2005, Statistics in Medicine
    24:729), which keeps its level with few images, too.
    """
    b, c, n = won + 0.5, lost + 0.5, images + 2
    middle = (b - c) / n
    half = Z * math.sqrt(b + c - (b - c) ** 2 / n) / n
    return max(-1.0, middle - half), min(1.0, middle + half)


def holm(p_values: Sequence[float]) -> list[float]:
    """P-values of several tests so that the chance of any false find stays what one test's would be (Holm 1979)."""
    found, most = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        most = max(most, min(1.0, (len(p_values) - rank) * p_values[i]))
        found[i] = most
    return found
