"""Probabilities that mean something: a temperature, and when to abstain, by logits of images that were held out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from kshot.errors import UserError
from kshot.judging import best_scale

RATES = (0.01, 0.02, 0.05, 0.1, 0.2)  # of errors among what is not abstained from
SCORES = ("probability", "energy", "mahalanobis")  # that tell how sure an answer is, or how like the shots an image
SPREAD = 0.5  # of the logarithm of a temperature about 0, so that ten images do not move it far
BINS = 15  # of equal width, as calibration errors in tables have


@dataclass(frozen=True)
class Calibration:
    """What was found on held-out shots.

    Attributes:
        temperature: logits are divided by it before the softmax; 1 where nothing could be held out.
        held_out: number of images that it was found by.
        learnt: shots a class that answers about these had learnt from.
        folds: number of such answers; 0 where an answer learns nothing from the shots.
        abstain: by score, ``probability``, ``energy`` or ``mahalanobis``, and by rate of errors, the least score of
            what is answered, and the share that is; a rate that the shots cannot show has none.
        forecast: what accuracy to expect, in plain data; None where nobody can tell.
    """

    temperature: float = 1.0
    held_out: int = 0
    learnt: float = 0.0
    folds: int = 0
    abstain: dict[str, dict[str, dict[str, float]]] = field(default_factory=dict)
    forecast: dict[str, Any] | None = None

    def plain(self) -> dict[str, Any]:
        """As plain data."""
        return asdict(self)

    def logits(self, logits: Tensor) -> Tensor:
        """Logits of which the softmax gives probabilities."""
        return logits / self.temperature

    def threshold(self, score: str, rate: float) -> float:
        """The least score of what is answered at a rate of errors.

        Raises:
            UserError: it was not found; those that were are named.
        """
        found = {float(each): cell["threshold"] for each, cell in self.abstain.get(score, {}).items()}
        fitting = [each for each in found if each <= rate]
        if not fitting:
            why = "the run was not calibrated, or has too few shots"
            if found or self.held_out:
                shown = f"{self.held_out} held-out shots show no rate up to {max(RATES):g}"
                why = f"the least is {min(found):g}" if found else shown
            raise UserError(f"There is no threshold of {score} for an error rate of {rate:g}: {why}.")
        return found[max(fitting)]


def stored_calibration(told: Mapping[str, Any] | None) -> Calibration:
    """A calibration from the plain data of a checkpoint; none where it has none."""
    return Calibration(**told) if told else Calibration()


def calibrate(
    logits: Tensor, label: Tensor, learnt: float, folds: int, mahalanobis: Tensor | None = None
) -> Calibration:
    """The most probable temperature, of :data:`SPREAD` before anything is seen, and thresholds for :data:`RATES`.

    Args:
        logits: (M, C) of held-out images.
        label: (M,).
        learnt: shots a class behind them.
        folds: number of answers behind them.
        mahalanobis: (M,), negative squared distances from the shots behind them; not a number where there is none.
    """
    scale = best_scale(logits, label, SPREAD)
    right = logits.argmax(-1) == label
    by_score = {name: score(name, scale * logits) for name in ("probability", "energy")}
    if mahalanobis is not None:
        by_score["mahalanobis"] = mahalanobis
    there = {name: ~values.isnan() for name, values in by_score.items()}
    abstain = {name: thresholds(values[there[name]], right[there[name]]) for name, values in by_score.items()}
    return Calibration(round(1 / scale, 6), len(label), round(learnt, 3), folds, abstain)


def score(name: str, logits: Tensor) -> Tensor:
    """How sure an answer is, (B,), of calibrated logits, (B, C): its probability, or the negative energy.

    The energy is ``-log Σ exp z`` (Liu et al. 2020, arXiv:2010.03759).
    """
    return logits.softmax(-1).amax(-1) if name == "probability" else logits.logsumexp(-1)


def thresholds(scores: Tensor, right: Tensor) -> dict[str, dict[str, float]]:
    """By rate of errors, the least score at which those above it show that rate, and the share of them.

    Among n answers of which w are wrong, (w + 1/2) / (n + 1) are taken to be: none wrong of few shows little.

    Args:
        scores: (M,).
        right: (M,) bool.
    """
    order = scores.argsort(descending=True)
    ranked, wrong = scores[order], (~right[order]).cumsum(0)
    count = torch.arange(1, len(order) + 1)
    shown = (wrong + 0.5) / (count + 1)
    last = torch.ones_like(right)
    last[:-1] = ranked[:-1] != ranked[1:]  # equal scores are answered together
    found = {}
    for rate in RATES:
        fitting = ((shown <= rate) & last).nonzero()
        if len(fitting):
            most = int(fitting[-1])
            share = round((most + 1) / len(order), 4)
            found[f"{rate:g}"] = {"threshold": round(float(ranked[most]), 6), "answered": share}
    return found
