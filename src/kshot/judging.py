"""Choosing on the shots alone: what logits of images that were held out are worth, and the temperature that fits."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TypeVar

import torch.nn.functional as F
from torch import Tensor

Setting = TypeVar("Setting")
LEAST, MOST, HALVINGS = 1e-3, 1e3, 24  # inverse temperatures, and steps of the search, to 1 part in a million


def best_of(candidates: Iterable[tuple[Setting, Tensor]], label: Tensor) -> tuple[Setting, Tensor]:
    """The setting whose held-out logits are best, with these: by accuracy, then log loss, then the first.

    Args:
        candidates: settings with logits, (N, C); they are asked for one by one, and two are held.
        label: (N,).
    """
    best: tuple[Setting, Tensor, float] | None = None
    for setting, logits in candidates:
        right = accuracy(logits, label)
        if best is None or right > best[2] or (right == best[2] and log_loss(logits, label) < log_loss(best[1], label)):
            best = setting, logits, right
    assert best is not None, "there is a candidate"
    return best[:2]


def accuracy(logits: Tensor, label: Tensor) -> float:
    """The share that is right of logits, (N, C)."""
    return float((logits.argmax(-1) == label).double().mean())


def log_loss(logits: Tensor, label: Tensor) -> float:
    """The cross-entropy of :func:`smoothed` labels at the best temperature: without one, size alone would decide."""
    return float(F.cross_entropy(logits * best_scale(logits, label), label, label_smoothing=smoothing(label)))


def smoothing(label: Tensor) -> float:
    """1 / (N + 2), as in Platt's scaling (1999): N images that are all right do not show certainty."""
    return 1 / (len(label) + 2)


def best_scale(logits: Tensor, label: Tensor, spread: float = math.inf) -> float:
    """The inverse temperature of the least log loss of logits, (N, C), from 0.001 to 1,000.

    The loss is convex in it: its slope, ``E_p[z] - z_y``, decides which half of the interval of logarithms to keep.

    Args:
        logits: (N, C).
        label: (N,), smoothed where there is no spread.
        spread: standard deviation of the logarithm about 0 before anything is seen, which few images change little.
    """
    soft = smoothing(label) if math.isinf(spread) else 0.0
    target = F.one_hot(label, logits.shape[1]).to(logits)
    target.mul_(1 - soft).add_(soft / logits.shape[1])
    wanted = (target * logits).sum()
    low, high = math.log(LEAST), math.log(MOST)
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        slope = ((logits * math.exp(middle)).softmax(-1) * logits).sum() - wanted
        rising = slope * math.exp(middle) + middle / spread**2 > 0
        low, high = (low, middle) if rising else (middle, high)
    return math.exp((low + high) / 2)


def scale_of_loss(logits: Tensor, label: Tensor, loss: float) -> float:
    """The least inverse temperature at which logits, (N, C), have a log loss; the best one where none reaches it.

    The loss is convex: it falls from that of a guess, log C at 0, to its least value.
    """
    low, high = math.log(LEAST), math.log(MOST)
    truth = logits.gather(1, label[:, None])[:, 0].mean()
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        scaled = logits * math.exp(middle)
        rising = (scaled.softmax(-1) * logits).sum(-1).mean() > truth
        there = bool(rising) or float(F.cross_entropy(scaled, label)) <= loss
        low, high = (low, middle) if there else (middle, high)
    return math.exp((low + high) / 2)
