"""GDA: Gaussians with one covariance, a closed form beside the text (Wang et al. 2024, arXiv:2402.04087)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from kshot.backbones.base import Backbone
from kshot.classifiers.base import Shots, Task, exact
from kshot.classifiers.blend import LinearBlend
from kshot.classifiers.leaving_out import Basis, downdated, held_out
from kshot.classifiers.ridge import ridge
from kshot.errors import require
from kshot.holding import Holder
from kshot.mahalanobis import exact_unit

COPIES = 16  # of a new class's text among the images that stand for it
LEAST = 3  # images that some class must have
CLOSE = 1e-6  # of all scatter: less of it within classes, for each image, is not found as a difference
NEVER = -1e9  # the bias of a class without images


class GDA(LinearBlend, Holder):
    """``w_c = P μ_c`` and ``b_c = log π_c - μ_cᵀ P μ_c / 2``, of unit-length features (section 3.1 of the paper).

    ``P = D ((N - 1) S + tr(S) I)⁻¹`` is an empirical Bayes estimate of the precision, S the covariance within classes
    over all recorded views, with the divisor N - 1, N the number of images. What the paper tunes on validation images,
    the weight beside the text, is decided on images that are held out, one of each class at a time. Where no class has
    three images there is no covariance within without one of each, and where all of a class are equal there is none at
    all: :class:`~kshot.classifiers.Ridge` takes its place.

    Where a class is new, all are served as new ones, which have no images: the μ of one is the mean of the
    ``neighbours`` training features nearest to its text and of 16 copies of that text, and P the mean over the classes
    of the precisions of these neighbours around the text (section 3.3, and the authors' code).

    Args:
        neighbours: training features that stand for a new class.
        text: as :class:`LinearBlend`.
        templates: as :class:`LinearBlend`.

    Attributes:
        rows: unit-length features of the shots, (V · N, D), by which new classes are served; none without text.
        held: W and b of the present classes, (C, D + 1), while they are held.
    """

    rows: Tensor

    def __init__(
        self,
        backbone: Backbone,
        task: Task,
        neighbours: int = 64,
        text: bool | None = None,
        templates: Sequence[str] | str | None = None,
    ) -> None:
        super().__init__(backbone, task, text, templates)
        require("GDA", "neighbours", neighbours, neighbours >= 2, "be at least 2")
        self.neighbours, self.fitted = neighbours, {name: c for c, name in enumerate(task.class_names)}
        self.bound = LinearBlend.bound if self.prompt is None else ""
        self.register_buffer("rows", torch.zeros(0, backbone.feature_dim))

    def solve(self, train: Shots) -> tuple[Tensor, Tensor, Tensor | None]:
        return gda(train, len(self.task.class_names))

    @torch.inference_mode(False)  # a state may be loaded over the rows later
    @torch.no_grad()
    def fit(self, train: Shots, val: Shots | None) -> None:
        super().fit(train, val)
        if self.prompt is not None:
            self.rows = F.normalize(train.every_view[0].to(self.rows), dim=-1)

    def forward(self, features: Tensor) -> Tensor:
        found = self.hold() if self.held is None else self.held
        return self.blended(features, found[:, :-1], found[:, -1])

    @torch.inference_mode(False)
    @torch.no_grad()
    def set_class_names(self, class_names: Sequence[str], templates: Sequence[str] | None = None) -> None:
        super().set_class_names(class_names, templates)
        if self.held is not None:
            self.held = self.hold()

    def hold(self) -> Tensor:
        """W and b of the present classes, (C, D + 1): what was fitted, or from their text where any is new."""
        if all(name in self.fitted for name in self.task.class_names):
            order = [self.fitted[name] for name in self.task.class_names]
            return torch.cat([self.weight, self.bias[:, None]], 1)[order]
        assert self.prompt is not None, "bound otherwise"
        rows, text = exact(self.rows, self.prompt.text_features(self.rows))
        text = F.normalize(text, dim=-1)
        near = rows[(text @ rows.T).topk(min(self.neighbours, len(rows))).indices]  # (C, K, D)
        mean = (near.sum(1) + COPIES * text) / (near.shape[1] + COPIES)
        apart = near - text[:, None]
        shrinkage = apart.square().sum((1, 2)) / (near.shape[1] - 1)
        weight = torch.stack([precise(mean, a, s) for a, s in zip(apart, shrinkage, strict=True)]).mean(0)
        return torch.cat([weight, biases(mean, weight, mean.new_full((len(mean),), 1 / len(mean)))[:, None]], 1)


def gda(train: Shots, classes: int) -> tuple[Tensor, Tensor, Tensor | None]:
    """:meth:`LinearBlend.solve` of :class:`GDA`."""
    label = train.label.cpu()
    if label.bincount().max() < LEAST:
        return ridge(train, classes, None)
    shots = Gaussians.of(train, classes)
    if shots.within < 1e-12 * len(label):
        return ridge(train, classes, None)
    return *shots.solution(), held_out(label, shots.without)


class Gaussians(NamedTuple):
    """The shots in a basis in which the scatter within classes is ``(N - 1) S = diag(d) - BᵀB``.

    That is their common spectrum less the scatter of the class means. Where little is left, digits would be lost: the
    scatter within classes is then taken apart itself, and B is empty.

    Attributes:
        label: (N,).
        mean: of the features, (D,), which is the origin of the basis.
        basis: Q, of R directions.
        rows: the shots in it, (V, N, R).
        spread: d, (R,).
        between: B, (C or 0, R).
        means: of the classes, in it, (C, R).
        sizes: n, (C,).
        within: the trace of (N - 1) S.
    """

    label: Tensor
    mean: Tensor
    basis: Basis
    rows: Tensor
    spread: Tensor
    between: Tensor
    means: Tensor
    sizes: Tensor
    within: Tensor

    @classmethod
    def of(cls, train: Shots, classes: int) -> Gaussians:
        """Takes shots of C classes apart."""
        (mean, basis, rows, spread), label = train.spectrum, train.label.cpu()
        sizes = label.bincount(minlength=classes).to(rows)
        means = member_means(rows.mean(0), label, sizes)
        between = sizes.sqrt()[:, None] * means
        within = spread.sum() - between.square().sum()
        if within < CLOSE * len(label) * spread.norm():
            rows = exact_unit(train.features) - mean
            means = member_means(rows.mean(0), label, sizes)
            apart = (rows - means[label]).flatten(0, 1)
            inside = torch.linalg.qr(torch.cat([apart, means]).T).Q
            spread, turn = torch.linalg.eigh((apart @ inside).T @ (apart @ inside) / len(rows))
            basis, spread = Basis(inside @ turn, None), spread.clamp(min=0)
            rows, means, within = rows @ basis.turn, means @ basis.turn, spread.sum()
            between = means[:0]
        return cls(label, mean, basis, rows, spread, between, means, sizes, within)

    def solution(self) -> tuple[Tensor, Tensor]:
        """W, (C, D), and b, (C,)."""
        shrinkage = self.within / (len(self.label) - 1)
        inside = len(self.mean) * downdated(self.spread + shrinkage, self.between, self.means.T).T
        weight = self.basis.outside(inside)
        bias = biases(self.means, inside, self.sizes / len(self.label)) - weight @ self.mean
        weight, bias = weight - weight.mean(0), bias - bias.mean()  # what classes share decides nothing, costs digits
        return weight, torch.where(self.sizes > 0, bias, NEVER)

    def without(self, held: Tensor) -> Tensor:
        """Scores, (n, C), of n images, (N,) bool, by the answer from the others.

        Without s, the sum of what is held out of a class less its mean, the mean of the n others moves by ``s / n``,
        and the scatter loses each held out image and ``s sᵀ / n``.
        """
        out, label, left = self.rows[:, held], self.label[held], int((~held).sum())
        apart = out - self.means[label]
        sizes = self.sizes - label.bincount(minlength=len(self.sizes))
        lost = torch.zeros_like(self.means).index_add_(0, label, apart.mean(0)) / sizes.clamp(min=1)[:, None].sqrt()
        mean = self.means - lost / sizes.clamp(min=1)[:, None].sqrt()
        moved = torch.cat([apart.flatten(0, 1) / math.sqrt(len(out)), lost])
        shrinkage = ((self.within - moved.square().sum()) / (left - 1)).clamp(min=1e-12)
        weight = downdated(self.spread + shrinkage, torch.cat([self.between, moved]), mean.T)
        scores = len(self.mean) * (out.mean(0) @ weight - (mean.T * weight).sum(0) / 2)
        scores += (sizes / left).clamp(min=1e-12).log()
        return torch.where(sizes > 0, scores - scores.mean(1, keepdim=True), NEVER)


def member_means(points: Tensor, label: Tensor, sizes: Tensor) -> Tensor:
    """Means, (C, R), of points, (N, R), by class, of which there are (C,); zero for a class without any."""
    sums = points.new_zeros(len(sizes), points.shape[1]).index_add_(0, label, points)
    return sums / sizes.clamp(min=1)[:, None]


def biases(mean: Tensor, weight: Tensor, prior: Tensor) -> Tensor:
    """b, (C,), from μ and W, (C, D), and π, (C,)."""
    return prior.clamp(min=1e-12).log() - (mean * weight).sum(-1) / 2


def precise(mean: Tensor, apart: Tensor, shrinkage: Tensor) -> Tensor:
    """``μ D (AᵀA + s I)⁻¹``, (C, D), from μ, (C, D), and A, (K, D), by the inverse of a K x K matrix alone."""
    inner = apart @ apart.T + shrinkage * torch.eye(len(apart), dtype=apart.dtype, device=apart.device)
    inside: Tensor = torch.linalg.solve(inner, apart @ mean.T)
    return mean.shape[1] / shrinkage * (mean - inside.T @ apart)
