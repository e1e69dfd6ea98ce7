"""Choosing on the shots alone: folds, what held-out logits are worth, and the temperature that fits them."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

SCALES = torch.logspace(-3, 3, 121, dtype=torch.float64)  # inverse temperatures that are tried, steps of 12 %


class Worth(NamedTuple):
    """What held-out logits are worth; compares as accuracy first, then log loss.

    Attributes:
        accuracy: share that is right.
        negative_log_loss: mean log probability of the smoothed labels at ``scale``.
        scale: the inverse temperature at which that is largest.
    """

    accuracy: float
    negative_log_loss: float
    scale: float


def folds_of(label: Tensor, most: int = 4) -> Tensor:
    """A fold for each image, (N,): every class is dealt out evenly, in order, to as many folds as its images allow.

    Args:
        label: (N,) class indices.
        most: folds at most; there are two where the largest class has two images, and one where it has one.
    """
    fold = torch.zeros_like(label)
    folds = min(most, int(label.bincount().max()))
    for c in label.unique():
        members = (label == c).nonzero()[:, 0]
        fold[members] = (torch.arange(len(members), device=label.device) + int(c)) % folds
    return fold


def out_of_fold(fold: Tensor, logits_without: Callable[[Tensor], Tensor]) -> Tensor:
    """Logits of each image, (N, C), by a classifier that was fitted on the other folds.

    Args:
        fold: (N,) as :func:`folds_of` gives them.
        logits_without: gets which images are held out, (N,) bool, and gives their logits.
    """
    parts = {int(f): logits_without(fold == f) for f in fold.unique()}
    found = next(iter(parts.values())).new_empty(len(fold), next(iter(parts.values())).shape[1])
    for f, logits in parts.items():
        found[fold == f] = logits
    return found


def worth(logits: Tensor, label: Tensor) -> Worth:
    """Judges held-out logits, (N, C), by their labels, (N,).

    A temperature is fitted first: without one, logits of another size would win or lose by that alone. Labels are
    smoothed by 1 / (N + 2), as in Platt's scaling (1999): N images that are all right do not show certainty.
    """
    logits, smooth = logits.double(), 1 / (len(label) + 2)
    losses = torch.stack([F.cross_entropy(logits * s, label, label_smoothing=smooth) for s in SCALES.to(logits.device)])
    best = int(losses.argmin())
    accuracy = (logits.argmax(-1) == label).double().mean()
    return Worth(float(accuracy), -float(losses[best]), float(SCALES[best]))
