"""Ridge regression on one-hot labels, its strength chosen on shots that are held out."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from kshot.backbones.base import Backbone
from kshot.classifiers.base import Shots, Task
from kshot.classifiers.blend import LinearBlend
from kshot.classifiers.leaving_out import Spectrum, held_out, judgeable, of_removed
from kshot.errors import require
from kshot.judging import best_of

STRENGTHS = (0.01, 0.03, 0.1, 0.3, 1.0)
ALONE = 0.1  # the strength where nothing can be judged


class Ridge(LinearBlend):
    """Least squares with the penalty ``λ κ ‖W‖²`` from centred, unit-length features to centred one-hot labels.

    κ is the mean squared length of the centred features, so that λ means the same on every backbone. All recorded
    views of an image are rows, each with the weight 1 / V. λ is the best of :data:`STRENGTHS` for images that are held
    out with all their views, one of each class at a time (:func:`rounds`), by accuracy, then log loss.

    Args:
        strength: λ; None chooses it.
        text: as :class:`LinearBlend`.
        templates: as :class:`LinearBlend`.
    """

    def __init__(
        self,
        backbone: Backbone,
        task: Task,
        strength: float | None = None,
        text: bool | None = None,
        templates: Sequence[str] | str | None = None,
    ) -> None:
        super().__init__(backbone, task, text, templates)
        holds = strength is None or 0 < strength < math.inf
        require("Ridge", "strength", strength, holds, "be above 0, or null to choose it")
        self.strength = strength

    def solve(self, train: Shots) -> tuple[Tensor, Tensor, Tensor | None]:
        return ridge(train, len(self.task.class_names), self.strength)


def ridge(train: Shots, classes: int, strength: float | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """:meth:`LinearBlend.solve` of :class:`Ridge`."""
    label = train.label.cpu()
    problem, judged = decompose(train, classes), judgeable(label)
    if not judged.any():
        return *problem.solution(strength or ALONE), None
    tried = STRENGTHS if strength is None else (strength,)
    scores = held_out(label, lambda held: problem.without(held, tried))
    chosen, logits = best_of(zip(tried, scores, strict=True), label[judged])
    return *problem.solution(chosen), logits


class Problem(NamedTuple):
    """A ridge regression in the basis in which every strength is a division.

    Attributes:
        shots: features in it.
        prior: ȳ, (C,), the share of each class.
        targets: centred one-hot labels, (N, C).
        right: ``Xᵀ Y`` of the features in the basis, the mean over the views, and these, (R, C).
    """

    shots: Spectrum
    prior: Tensor
    targets: Tensor
    right: Tensor

    def solution(self, strength: float) -> tuple[Tensor, Tensor]:
        """W, (C, D), and b, (C,)."""
        spread = self.shots.spread
        shrunk = 1 / (spread + strength * spread.sum() / len(self.targets)).clamp(min=1e-300)
        weight = self.shots.basis.outside(self.right.T * shrunk)
        return weight, self.prior - weight @ self.shots.mean

    def without(self, held: Tensor, strengths: Sequence[float]) -> Tensor:
        """Scores, (S, n, C), of n images by answers from the others, (N,) bool, at each strength.

        The bias is the weight of one more direction, in which all rows are 1: other means are other biases.
        """
        out, sizes = self.shots.rows[:, held], (len(self.targets), int((~held).sum()))
        middle, spread = out.mean(0), self.shots.spread
        left = spread.sum() - out.square().sum((-1, -2)).mean() - middle.sum(0).square().sum() / sizes[1]
        penalties = torch.tensor(strengths, dtype=out.dtype)[:, None] * left.clamp(min=1e-300) / sizes[1]
        diagonals = F.pad(spread + penalties, (0, 1), value=sizes[0])
        right = F.pad(self.right, (0, 0, 0, 1)) - with_one(middle).T @ self.targets[held]
        views = math.sqrt(len(out))
        found = of_removed(diagonals, with_one(out).flatten(0, 1) / views, right)
        return torch.stack([each.unflatten(0, out.shape[:2]).sum(0) / views for each in found]) + self.prior


def with_one(rows: Tensor) -> Tensor:
    """Rows, (..., R), with a 1 behind each."""
    return F.pad(rows, (0, 1), value=1.0)


def decompose(train: Shots, classes: int) -> Problem:
    """Takes a ridge regression of C classes apart."""
    shots, label = train.spectrum, train.label.cpu()
    y = F.one_hot(label, classes).to(shots.rows)
    prior = y.mean(0)
    y -= prior
    right = torch.stack([rows.T @ y for rows in shots.rows]).mean(0)
    return Problem(shots, prior, y, right)
