"""Ridge regression on one-hot labels, its strength chosen by exact leave-one-out."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from kshot.backbones.base import Backbone
from kshot.classifiers.base import Task
from kshot.classifiers.blend import LinearBlend, judgeable
from kshot.errors import require
from kshot.judging import best_of

STRENGTHS = (0.01, 0.03, 0.1, 0.3, 1.0)
ALONE = 0.1  # the strength where nothing can be judged
AT_ONCE = 2**24  # numbers in the largest tensor of leave-one-out: 128 MB


class Ridge(LinearBlend):
    """Least squares with the penalty ``λ κ ‖W‖²`` from centred, unit-length features to centred one-hot labels.

    κ is the mean squared length of the centred features, so that λ means the same on every backbone. All recorded
    views of an image are rows, each with the weight 1 / V. λ is the best of :data:`STRENGTHS` for images left out one
    by one with all their views, by accuracy, then log loss (PRESS; Allen 1974): the residual of image i is
    ``(I - H_ii)⁻¹ (Y_i - Ŷ_i)`` with the hat matrix H, so that nothing is fitted again.

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

    def solve(self, features: Tensor, label: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        return ridge(features, label, len(self.task.class_names), self.strength)


def ridge(
    features: Tensor, label: Tensor, classes: int, strength: float | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """:meth:`LinearBlend.solve` of :class:`Ridge`."""
    problem = decompose(features, label, classes)
    judged = judgeable(label)
    if not judged.any():
        return *problem.solution(strength or ALONE), None
    tried = STRENGTHS if strength is None else (strength,)
    chosen, held_out = best_of(((each, problem.left_out(each)[judged]) for each in tried), label[judged])
    return *problem.solution(chosen), held_out


class Problem(NamedTuple):
    """A ridge regression in the basis in which every strength is a division.

    Attributes:
        mean: x̄, (D,).
        prior: ȳ, (C,), the share of each class.
        targets: centred one-hot labels, (N, C).
        basis: Q, (D, R), orthonormal directions of the centred features.
        rows: the centred features in it, (V, N, R).
        spread: eigenvalues of their mean over the views, (R,): ``Σ_i mean_v x xᵀ``.
    """

    mean: Tensor
    prior: Tensor
    targets: Tensor
    basis: Tensor
    rows: Tensor
    spread: Tensor

    def shrunk(self, strength: float) -> Tensor:
        """``1 / (spread + λ κ)``, (R,)."""
        return 1 / (self.spread + strength * self.spread.sum() / len(self.targets)).clamp(min=1e-300)

    def coefficients(self, strength: float) -> Tensor:
        """W in the basis, (R, C)."""
        return self.shrunk(strength)[:, None] * (self.rows.mean(0).T @ self.targets)

    def solution(self, strength: float) -> tuple[Tensor, Tensor]:
        """W, (C, D), and b, (C,)."""
        weight = (self.basis @ self.coefficients(strength)).T
        return weight, self.prior - weight @ self.mean

    def left_out(self, strength: float) -> Tensor:
        """Scores, (N, C), of each image by the solution without it, the mean over its views."""
        views, images, width = self.rows.shape
        shrunk, coefficients = self.shrunk(strength), self.coefficients(strength)
        found, one = torch.empty_like(self.targets), torch.eye(views, dtype=self.rows.dtype)
        step = max(1, AT_ONCE // (views * max(width, len(self.prior), views)))
        for some in torch.arange(images).split(step):
            rows = self.rows[:, some].transpose(0, 1)  # (n, V, R)
            hat = (1 / images + rows * shrunk @ rows.mT) / views  # the intercept's share, and that of W
            residual = self.targets[some, None] - rows @ coefficients  # (n, V, C)
            left = torch.linalg.solve(one - hat, residual)
            found[some] = self.prior + self.targets[some] - left.mean(1)
        return found


def decompose(features: Tensor, label: Tensor, classes: int) -> Problem:
    """Takes a ridge regression apart, by the smaller of the two Gram matrices.

    Args:
        features: (V, N, D) in float64.
        label: (N,).
        classes: C.
    """
    views, images, width = features.shape
    mean = features.mean((0, 1))
    rows = (features - mean).flatten(0, 1)
    y = F.one_hot(label, classes).to(rows)
    prior = y.mean(0)
    if len(rows) > width:
        values, basis = torch.linalg.eigh(rows.T @ rows)
    else:
        values, vectors = torch.linalg.eigh(rows @ rows.T)
        present = values > 1e-12 * values.sum()
        values = values[present]
        basis = rows.T @ (vectors[:, present] / values.sqrt())
    spread = values.clamp(min=0) / views
    return Problem(mean, prior, y - prior, basis, (rows @ basis).view(views, images, -1), spread)
