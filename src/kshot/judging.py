"""Choosing on the shots alone: what logits of images that were held out are worth, and the temperature that fits."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TypeVar

import torch.nn.functional as F
from torch import Tensor

Setting = TypeVar("Setting")
LEAST, MOST = 1e-3, 1e3  # inverse temperatures
HALVINGS, LEFT = 24, 1e-6  # of the interval of their logarithms, and what these leave of it
CLOSE = 1e-4  # a step of Newton's method in it that is the last


def best_of(candidates: Iterable[tuple[Setting, Tensor]], label: Tensor) -> tuple[Setting, Tensor]:
    """The setting whose held-out logits are best, with these: by accuracy, then log loss, then the first.

    Args:
        candidates: settings with logits, (N, C); they are asked for one by one, and two are held.
        label: (N,).
    """
    best: tuple[Setting, Tensor] | None = None
    most, least = -1.0, None  # accuracy of the best, and its log loss once that was asked for
    for setting, logits in candidates:
        right, loss = accuracy(logits, label), None
        if best is not None and right == most:
            least = log_loss(best[1], label) if least is None else least
            loss = log_loss(logits, label)
        if right > most or (loss is not None and least is not None and loss < least):
            best, most, least = (setting, logits), right, loss
    assert best is not None, "there is a candidate"
    return best


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

    The loss is convex in it. Steps of Newton's method in its logarithm find where the slope, ``E_p[z] - z_y``, is 0,
    and halve the interval that is left where such a step would leave it.

    Args:
        logits: (N, C).
        label: (N,), smoothed where there is no spread.
        spread: standard deviation of the logarithm about 0 before anything is seen, which few images change little.
    """
    soft = smoothing(label) if math.isinf(spread) else 0.0
    truth = logits.gather(1, label[:, None])
    wanted = float((1 - soft) * truth.sum() + soft * logits.mean(1).sum())
    low, high = math.log(LEAST), math.log(MOST)
    middle = min(max(-math.log(max(float(logits.std(1, correction=0).mean()), LEAST)), low), high)
    while high - low > LEFT:
        scale = math.exp(middle)
        terms = (logits * scale).softmax(-1).mul_(logits)
        mean = terms.sum(-1)
        slope, curvature = scale * (float(mean.sum()) - wanted), scale**2 * float(variance(terms, logits, mean))
        if math.isfinite(spread):
            slope, curvature = slope + middle / spread**2, slope + curvature + 1 / spread**2
        if slope == 0:
            break
        low, high = (low, middle) if slope > 0 else (middle, high)
        step = middle - slope / curvature if curvature > 0 else math.inf
        before, middle = middle, step if low < step < high else (low + high) / 2
        if middle == step and abs(middle - before) < CLOSE:  # the next would be of the size of its square
            break
    return math.exp(middle)


def variance(terms: Tensor, logits: Tensor, mean: Tensor) -> Tensor:
    """``Σ Var_p[z]`` over rows from p z, (N, C), which is used up, z and E_p[z], (N,)."""
    return (terms.mul_(logits).sum(-1) - mean.square()).sum()


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
