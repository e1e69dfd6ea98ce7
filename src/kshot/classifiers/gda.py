"""GDA: Gaussians with one covariance, a closed form beside the text (Wang et al. 2024, arXiv:2402.04087)."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from kshot.backbones.base import Backbone
from kshot.classifiers.base import Shots, Task, exact
from kshot.classifiers.blend import LinearBlend
from kshot.classifiers.ridge import ridge
from kshot.errors import require
from kshot.holding import Holder
from kshot.judging import folds_of, out_of_fold

COPIES = 16  # of a new class's text among the images that stand for it
NEVER = -1e9  # the bias of a class without images


class GDA(LinearBlend, Holder):
    """``w_c = P μ_c`` and ``b_c = log π_c - μ_cᵀ P μ_c / 2``, of unit-length features (section 3.1 of the paper).

    ``P = D ((N - 1) S + tr(S) I)⁻¹`` is an empirical Bayes estimate of the precision, S the covariance within classes
    over all recorded views, with the divisor N - 1, N the number of images. What the paper tunes on validation images,
    the weight beside the text, is decided on folds of the shots. Where each class has one image, or all of a class are
    equal, there is no covariance within, and :class:`~kshot.classifiers.Ridge` takes its place.

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
        classes = len(self.task.class_names)
        answer = gaussians(features, label, classes)
        if answer is None:
            return ridge(features, label, classes, None)

        def without(held_out: Tensor) -> Tensor:
            shots = features[:, ~held_out], label[~held_out], classes
            weight, bias = gaussians(*shots) or ridge(*shots, None)[:2]
            return F.linear(features[:, held_out], weight, bias).mean(0)

        return *answer, out_of_fold(folds_of(label), without)

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


def gaussians(features: Tensor, label: Tensor, classes: int) -> tuple[Tensor, Tensor] | None:
    """W, (C, D), and b, (C,), from unit-length features, (V, N, D); None without a covariance within classes."""
    views, images, width = features.shape
    member = F.one_hot(label, classes).to(features)
    count = member.sum(0)
    mean = member.T @ features.mean(0) / count.clamp(min=1)[:, None]
    apart = (features - mean[label]).flatten(0, 1)
    scatter = apart.T @ apart / views  # (N - 1) S
    trace = scatter.trace() / max(images - 1, 1)
    if int(count.max()) < 2 or trace < 1e-12:
        return None
    weight = width * torch.linalg.solve(scatter + trace * torch.eye(width, dtype=scatter.dtype), mean.T).T
    bias = biases(mean, weight, count / images)
    weight, bias = (
        weight - weight.mean(0),
        bias - bias.mean(),
    )  # what all classes share decides nothing, and costs digits
    return weight, torch.where(count > 0, bias, NEVER)


def biases(mean: Tensor, weight: Tensor, prior: Tensor) -> Tensor:
    """b, (C,), from μ and W, (C, D), and π, (C,)."""
    return prior.clamp(min=1e-12).log() - (mean * weight).sum(1) / 2


def precise(mean: Tensor, apart: Tensor, shrinkage: Tensor) -> Tensor:
    """``μ D (AᵀA + s I)⁻¹``, (C, D), from μ, (C, D), and A, (K, D), by the inverse of a K x K matrix alone."""
    inner = apart @ apart.T + shrinkage * torch.eye(len(apart), dtype=apart.dtype, device=apart.device)
    inside: Tensor = torch.linalg.solve(inner, apart @ mean.T)
    return mean.shape[1] / shrinkage * (mean - inside.T @ apart)
