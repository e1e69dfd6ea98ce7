"""How good an answer will be on new images, by what answers from fewer of the shots were worth on the others."""

from __future__ import annotations

import logging
import math
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from lightning.pytorch import Trainer
from torch import Tensor

from kshot.calibration import Calibration, calibrate
from kshot.data.datamodule import FewShotDataModule
from kshot.folds import HeldOut, Judge, divided
from kshot.judging import accuracy
from kshot.mahalanobis import Mahalanobis
from kshot.module import FewShotModule

LEAST = 2  # shots a class behind held-out logits that a temperature is taken from: answers from one are another matter
logger = logging.getLogger("kshot")

GROWTH = 0.3  # errors fall as shots^-0.3: the law without a bias on the five pairs of docs/choosing.md, 4 to 16 shots
SPREAD = 1.25  # by which the draw of the shots widens the variance of a share
DEVIATIONS = 1.96  # of a normal distribution, to either side: 95 %
RESAMPLED = 200


@dataclass(frozen=True)
class Forecast:
    """The accuracy to expect on new images of the kind of the shots.

    Attributes:
        accuracy: expected.
        low, high: of an interval that should hold the accuracy in 95 of 100 cases.
        held_out: number of images that it was judged by.
        optimism: what was taken off for having chosen the best of several on the same images.
        curve: expected accuracy by shots a class, of this number of shots and of 2, 4 and 8 more.
    """

    accuracy: float
    low: float
    high: float
    held_out: int
    optimism: float
    curve: dict[str, float]


def forecast(found: HeldOut, optimism: float = 0.0, growth: float = GROWTH) -> Forecast:
    """What is to be expected of an answer from all shots.

    Answers behind held-out logits learnt from fewer shots. With an error e at m shots a class, ``e (m / k)^growth`` is
    expected at k. The interval is Agresti and Coull's (1998), of a variance that is :data:`SPREAD` times a share's.

    Args:
        found: held-out logits of the answer.
        optimism: of its accuracy among these.
        growth: the exponent.
    """
    n = len(found.label)
    held_out = accuracy(found.logits, found.label) - optimism
    error = min(1.0, max(1 - held_out, 0.5 / n))
    expected = 1 - error * grown(found.learnt, found.shots, growth)
    size, z = n / SPREAD, DEVIATIONS
    centre = (expected * size + z * z / 2) / (size + z * z)
    half = z * math.sqrt(centre * (1 - centre) / (size + z * z))
    more = {0: expected} | {m: 1 - (1 - expected) * grown(found.shots, found.shots + m, growth) for m in (2, 4, 8)}
    curve = {f"{found.shots + m:g}": round(value, 4) for m, value in more.items()} if found.folds else {}
    low, high = max(0.0, centre - half), min(1.0, centre + half)
    return Forecast(round(expected, 4), round(low, 4), round(high, 4), n, round(optimism, 4), curve)


def grown(before: float, after: float, growth: float) -> float:
    """By what an error shrinks from some shots a class to others."""
    return float((before / after) ** growth)


def growth_of(fewer: HeldOut, more: HeldOut) -> float:
    """The exponent by which errors fall between two numbers of shots, half way to :data:`GROWTH`, for it is noisy."""
    errors = [max(1 - accuracy(each.logits, each.label), 0.5 / len(each.label)) for each in (fewer, more)]
    if more.learnt <= fewer.learnt:
        return GROWTH
    slope = math.log(errors[0] / errors[1]) / math.log(more.learnt / fewer.learnt)
    return (min(1.0, max(0.0, slope)) + GROWTH) / 2


def optimism_of(right: Tensor, seed: int = 0) -> float:
    """By how much the best of several answers seems better than it is, for having been chosen on the same images.

    The accuracy of the best, less what the best on a resample of the images has on those that were not drawn, in the
    mean over resamples (bootstrap bias correction of cross-validation; Tsamardinos et al. 2018, arXiv:1708.07180).

    Args:
        right: (A, M) bool, which of M images each of A answers is right about.
        seed: of the resamples.
    """
    right = right.double()
    if len(right) < 2:
        return 0.0
    chance, n = torch.Generator().manual_seed(seed), right.shape[1]
    drawn = torch.stack([torch.randint(n, (n,), generator=chance).bincount(minlength=n) for _ in range(RESAMPLED)])
    inside = right @ drawn.double().T / n  # (A, resamples)
    left = (drawn == 0).double()
    outside = right @ left.T / left.sum(1).clamp(min=1)
    unseen = outside.gather(0, inside.argmax(0)[None])
    return max(0.0, float(right.mean(1).max() - unseen.mean()))


def look_ahead(
    module: FewShotModule,
    unfitted: FewShotModule,
    data: FewShotDataModule,
    trainer: Trainer,
    settings: dict[str, Any],
) -> Calibration:
    """The calibration of a fitted module, and what to expect of it; an empty one where no shot can be held out.

    A closed form is found again on folds. Whatever takes steps is fitted once more, on three quarters of the shots.

    Args:
        module: the fitted one.
        unfitted: its twin from before.
        data: that it was fitted to.
        trainer: that fitted it.
        settings: of the trainer of the extra fit.
    """
    judge = Judge(data, trainer, module, settings)
    fold, which = divided(judge.label, data.split_seed)
    if unfitted.takes_steps and which:
        share, which = f"{int(fold.max())} of {int(fold.max()) + 1}", which[:1]
        logger.info("An extra fit on %s shots a class, for probabilities and a forecast (run.calibrate).", share)
    found = judge.out_of_fold(unfitted, fold, which)
    return Calibration() if found is None else ahead(found)


def look_around(module: FewShotModule, data: FewShotDataModule, trainer: Trainer) -> Mahalanobis:
    """Where the shots of a fitted module lie among its features; tells how near any image is to them.

    Args:
        module: the fitted one.
        data: that it was fitted to.
        trainer: that fitted it.
    """
    return Judge(data, trainer, module).mahalanobis()


def ahead(found: HeldOut, optimism: float = 0.0, growth: float = GROWTH) -> Calibration:
    """The calibration and the forecast of an answer by its held-out logits; the rest as in :func:`forecast`."""
    calibration = Calibration()
    if found.learnt >= LEAST or not found.folds:
        calibration = calibrate(found.logits, found.label, found.learnt, found.folds, found.mahalanobis)
    return replace(calibration, forecast=asdict(forecast(found, optimism, growth)))
