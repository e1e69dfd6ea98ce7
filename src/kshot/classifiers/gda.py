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
from kshot.classifiers.leaving_out import Basis, directions, downdated, held_out
from kshot.classifiers.ridge import ridge
from kshot.errors import require
from kshot.holding import Holder

COPIES = 16  # of a new class's text among the images that stand for it
LEAST = 3  # images that some class must have
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

    def solve(self, features: Tensor, label: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        return gda(features, label, len(self.task.class_names))

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


def gda(features: Tensor, label: Tensor, classes: int) -> tuple[Tensor, Tensor, Tensor | None]:
    """:meth:`LinearBlend.solve` of :class:`GDA`."""
    shots = Gaussians.of(features, label, classes)
    if shots.sizes.max() < LEAST or shots.spread.sum() < 1e-12 * len(label):
        return ridge(features, label, classes, None)
    inside = shots.inside
    return *shots.solution(), held_out(label, lambda held: shots.without(held, inside))


class Gaussians(NamedTuple):
    """The shots in a basis in which the scatter within classes, (N - 1) S, is diagonal; it is 0 beyond the basis.

    Attributes:
        label: (N,).
        views: the shots, the mean over their views, (N, D).
        mean: μ, (C, D).
        sizes: n, (C,).
        basis: Q, of R directions.
        apart: the shots less the mean of their class, in it, (V, N, R).
        spread: the diagonal of (N - 1) S, (R,).
    """

    label: Tensor
    views: Tensor
    mean: Tensor
    sizes: Tensor
    basis: Basis
    apart: Tensor
    spread: Tensor

    @classmethod
    def of(cls, features: Tensor, label: Tensor, classes: int) -> Gaussians:
        """Takes unit-length features, (V, N, D), in float64, with their labels, (N,)."""
        member = F.one_hot(label, classes).to(features)
        count, views = member.sum(0), features.mean(0)
        mean = member.T @ views / count.clamp(min=1)[:, None]
        basis, spread, apart = directions((features - mean[label]).flatten(0, 1))
        return cls(label, views, mean, count, basis, apart.view(*features.shape[:2], -1), spread / len(features))

    @property
    def inside(self) -> Tensor:
        """The class means in the basis, (C, R)."""
        return self.basis.inside(self.mean)

    def solution(self) -> tuple[Tensor, Tensor]:
        """W, (C, D), and b, (C,)."""
        shrinkage, inside = self.spread.sum() / (len(self.label) - 1), self.inside
        weight = self.mean / shrinkage + self.basis.outside(inside / (self.spread + shrinkage) - inside / shrinkage)
        weight = self.mean.shape[1] * weight
        bias = biases(self.mean, weight, self.sizes / len(self.label))
        weight, bias = weight - weight.mean(0), bias - bias.mean()  # what classes share decides nothing, costs digits
        return weight, torch.where(self.sizes > 0, bias, NEVER)

    def without(self, held: Tensor, inside: Tensor) -> Tensor:
        """Scores, (n, C), of n images by the answer from the others.

        Without s, the sum of what is held out of a class less its mean, the mean of the n others moves by ``s / n``,
        and the scatter loses each held out image and ``s sᵀ / n``. All of it lies in the basis.

        Args:
            held: (N,) bool.
            inside: :attr:`inside`.
        """
        out, label, left = self.apart[:, held], self.label[held], int((~held).sum())
        member = F.one_hot(label, len(self.sizes)).to(out)
        sizes, lost = self.sizes - member.sum(0), member.T @ out.mean(0)
        mean = inside - lost / sizes.clamp(min=1)[:, None]
        removed = torch.cat([out.flatten(0, 1) / math.sqrt(len(out)), lost / sizes.clamp(min=1)[:, None].sqrt()])
        shrinkage = ((self.spread.sum() - removed.square().sum()) / (left - 1)).clamp(min=1e-12)
        image = out.mean(0) + inside[label]
        weight = downdated((self.spread + shrinkage)[None], removed, mean.T)[0]
        scores = image @ weight + (self.views[held] @ self.mean.T - image @ inside.T) / shrinkage
        norms = (mean.T * weight).sum(0) + (self.mean.square().sum(1) - inside.square().sum(1)) / shrinkage
        scores = self.mean.shape[1] * (scores - norms / 2) + (sizes / left).clamp(min=1e-12).log()
        return torch.where(sizes > 0, scores - scores.mean(1, keepdim=True), NEVER)


def biases(mean: Tensor, weight: Tensor, prior: Tensor) -> Tensor:
    """b, (C,), from μ and W, (C, D), and π, (C,)."""
    return prior.clamp(min=1e-12).log() - (mean * weight).sum(-1) / 2


def precise(mean: Tensor, apart: Tensor, shrinkage: Tensor) -> Tensor:
    """``μ D (AᵀA + s I)⁻¹``, (C, D), from μ, (C, D), and A, (K, D), by the inverse of a K x K matrix alone."""
    inner = apart @ apart.T + shrinkage * torch.eye(len(apart), dtype=apart.dtype, device=apart.device)
    inside: Tensor = torch.linalg.solve(inner, apart @ mean.T)
    return mean.shape[1] / shrinkage * (mean - inside.T @ apart)
