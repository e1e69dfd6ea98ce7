"""LP++: a linear probe blended with the text, with step sizes from the data (Huang et al. 2024, arXiv:2404.02285)."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kshot.backbones.base import Backbone, require_text
from kshot.classifiers.base import Classifier, Shots, Task
from kshot.classifiers.zero_shot import TextFeatures
from kshot.errors import UserError

ALPHA_EVERY = 10  # iterations between two updates of α


class LPPlusPlus(Classifier):
    """``z_c = fᵀ(w_c + α_c t_c) + b_c`` of unit-length f and t_c, without temperature.

    W, (C, D), b and α, (C,), are found by its own full-batch descent on the cross-entropy of all recorded views.

    Args:
        backbone: must have a text tower.
        task: its class names and templates.
        iterations: steps of W and b; every tenth also moves α.
        momentum: of W and b.
        alpha_grad: a step of α follows the sum of its gradients over all iterations so far (``accumulate``, what the
            authors' code does), or its gradient of this iteration (``fresh``).
        select: keep the iterate that is right most often on the validation shots, the latest among equals; False keeps
            the last one and needs no validation shots.

    Raises:
        UserError: no text tower; a prompt does not fit; a setting out of its range.
    """

    weight: Tensor
    bias: Tensor
    alpha: Tensor
    closed_form = True
    from_features = True
    class_bound = "it has a row of weights, a bias and a blending factor for each training class"

    def __init__(
        self,
        backbone: Backbone,
        task: Task,
        iterations: int = 300,
        momentum: float = 0.9,
        alpha_grad: Literal["accumulate", "fresh"] = "accumulate",
        select: bool = True,
    ) -> None:
        super().__init__(backbone, task)
        text = require_text(backbone, "LPPlusPlus")
        if iterations < 1:
            raise UserError(f"LPPlusPlus: iterations is {iterations}, and must be at least 1.")
        if not 0 <= momentum < 1:
            raise UserError(f"LPPlusPlus: momentum is {momentum}, and must be from 0 to below 1.")
        if alpha_grad not in ("accumulate", "fresh"):
            raise UserError(f"LPPlusPlus: alpha_grad is {alpha_grad!r}, and must be 'accumulate' or 'fresh'.")
        self.iterations, self.momentum, self.selects = iterations, momentum, select
        self.accumulates = alpha_grad == "accumulate"
        self.text = TextFeatures(text, task.class_names, task.templates)
        classes = len(task.class_names)
        self.register_buffer("weight", torch.zeros(classes, backbone.feature_dim))
        self.register_buffer("bias", torch.zeros(classes))
        self.register_buffer("alpha", torch.zeros(classes))

    def prepare_classes(self) -> None:
        self.text = TextFeatures(self.text.backbone, self.task.class_names, self.task.templates)

    def forward(self, features: Tensor) -> Tensor:
        f, t = F.normalize(features.float(), dim=-1), F.normalize(self.text().float(), dim=-1)
        with torch.autocast(f.device.type, enabled=False):
            return F.linear(f, self.weight + self.alpha[:, None] * t, self.bias)

    @torch.no_grad()
    def fit_features(self, train: Shots, val: Shots | None) -> None:
        features, label = train.every_view
        f, t = F.normalize(features.float(), dim=-1), F.normalize(self.text().float(), dim=-1)
        with torch.autocast(f.device.type, enabled=False):
            similarity = f @ t.T  # f_i · t_c, (N, C)
            y = F.one_hot(label, len(t)).to(f)
            shots = y.sum(0)
            # the sum over images; views of one image count as their mean, or W would start V times as long
            self.weight = y.T @ f / len(train.features)
            self.bias = nn.Linear(f.shape[1], len(t)).bias.detach().to(f)
            own = (y * similarity).sum(0)[shots > 0] / shots[shots > 0]
            self.alpha = (250 * own.mean()).repeat(len(t))
            rate, alpha_rate = weight_rate(f), alpha_rate_of(similarity)
            weight_step, bias_step, alpha_step = (torch.zeros_like(x) for x in (self.weight, self.bias, self.alpha))
            best, kept = -1, (self.weight, self.bias, self.alpha)
            for iteration in range(1, self.iterations + 1):
                z = torch.addmm(self.bias, f, self.weight.T).addcmul_(similarity, self.alpha)
                error = z.softmax(-1).sub_(y).div_(len(f))  # the gradient of the mean loss by the logits
                alpha_step = (error * similarity).sum(0) + (alpha_step if self.accumulates else 0)
                weight_step = self.momentum * weight_step + error.T @ f
                bias_step = self.momentum * bias_step + error.sum(0)
                self.weight, self.bias = self.weight - rate * weight_step, self.bias - rate * bias_step
                if iteration % ALPHA_EVERY == 0:
                    self.alpha = self.alpha - alpha_rate * alpha_step
                if self.selects and val is not None:
                    queries, truth = val.every_view
                    right = int((self(queries).argmax(-1) == truth).sum())
                    if right >= best:
                        best, kept = right, (self.weight, self.bias, self.alpha)
            if self.selects and val is not None:
                self.weight, self.bias, self.alpha = kept


def weight_rate(f: Tensor) -> float:
    """Step size of W and b, ``4 N / λ_max(FᵀF)``, from features, (N, D): the inverse of a Lipschitz constant."""
    return 4 * len(f) / float(torch.linalg.eigvalsh(f.T @ f)[-1])


def alpha_rate_of(similarity: Tensor) -> float:
    """Step size of α, ``N / (4 max_c Σ_i (f_i · t_c)²)``, from cosines with the text, (N, C)."""
    return len(similarity) / (4 * float(similarity.square().sum(0).max()))
