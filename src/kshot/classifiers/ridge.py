"""Ridge regression on one-hot labels, its strength chosen on shots that are held out."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from kshot.backbones.base import Backbone
from kshot.classifiers.base import Task
from kshot.classifiers.blend import LinearBlend, held_out, judgeable
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

    def solve(self, features: Tensor, label: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        return ridge(features, label, len(self.task.class_names), self.strength)


def ridge(
    features: Tensor, label: Tensor, classes: int, strength: float | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """:meth:`LinearBlend.solve` of :class:`Ridge`."""
    problem, judged = decompose(features, label, classes), judgeable(label)
    if not judged.any():
        return *problem.solution(strength or ALONE), None
    tried, views = STRENGTHS if strength is None else (strength,), features.mean(0)

    def scores(seen: Tensor, held: Tensor) -> Tensor:
        part = decompose(features[:, seen], label[seen], classes)
        return torch.stack([F.linear(views[held], *part.solution(each)) for each in tried])

    chosen, logits = best_of(zip(tried, held_out(label, scores), strict=True), label[judged])
    return *problem.solution(chosen), logits


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
