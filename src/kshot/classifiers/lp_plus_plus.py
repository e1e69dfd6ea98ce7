"""LP++: a linear probe blended with the text, with step sizes from the data (Huang et al. 2024, arXiv:2404.02285)."""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kshot.backbones.base import Backbone
from kshot.classifiers.base import Shots, Task, exact
from kshot.classifiers.zero_shot import TextPrompt
from kshot.errors import require

ALPHA_EVERY = 10  # iterations between two updates of α


class LPPlusPlus(TextPrompt):
    """``z_c = fᵀ(w_c + α_c t_c) + b_c`` of unit-length f and t_c, without temperature.

    W, (C, D), b and α, (C,), are found by its own full-batch descent on the cross-entropy of all recorded views.

    Args:
        iterations: steps of W and b; every tenth also moves α.
        momentum: of W and b.
        alpha_grad: a step of α follows the sum of its gradients over all iterations so far (``accumulate``, what the
            authors' code does), or its gradient of this iteration (``fresh``).
        select: keep the iterate that is right most often on the validation shots, the latest among equals; False keeps
            the last one and needs no validation shots.
    """

    weight: Tensor
    bias: Tensor
    alpha: Tensor
    bound = "it has a row of weights, a bias and a blending factor for each training class"

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
        require("LPPlusPlus", "iterations", iterations, iterations >= 1, "be at least 1")
        require("LPPlusPlus", "momentum", momentum, 0 <= momentum < 1, "be from 0 to below 1")
        known = alpha_grad in ("accumulate", "fresh")
        require("LPPlusPlus", "alpha_grad", repr(alpha_grad), known, "be 'accumulate' or 'fresh'")
        self.needs = frozenset({"shots", "val"} if select else {"shots"})
        self.iterations, self.momentum, self.accumulates = iterations, momentum, alpha_grad == "accumulate"
        classes = len(task.class_names)
        self.register_buffer("weight", torch.zeros(classes, backbone.feature_dim))
        self.register_buffer("bias", torch.zeros(classes))
        self.register_buffer("alpha", torch.zeros(classes))

    def logits(self, features: Tensor, text: Tensor) -> Tensor:
        f, t, *learnt = exact(features, text, self.weight, self.bias, self.alpha)
        return blended(F.normalize(f, dim=-1), F.normalize(t, dim=-1), *learnt)

    @torch.no_grad()
    def fit(self, train: Shots, val: Shots | None) -> None:
        views, label = train.every_view
        f, t = (F.normalize(x, dim=-1) for x in exact(views, self.text_features(views)))
        best, queries, truth = -1, None, label
        if "val" in self.needs and val is not None:
            queries, truth = val.every_view
            queries = F.normalize(queries.to(f), dim=-1)
        with torch.autocast(f.device.type, enabled=False):
            similarity = f @ t.T  # f_i · t_c, (N, C)
            y = F.one_hot(label, len(t)).to(f)
            shots = y.sum(0)
            # the sum over images; views of one image count as their mean, or W would start V times as long
            weight = y.T @ f / len(train.features)
            bias = nn.Linear(f.shape[1], len(t)).bias.detach().to(f)
            own = (y * similarity).sum(0)[shots > 0] / shots[shots > 0]
            alpha = (250 * own.mean()).repeat(len(t))
            rate, alpha_rate = weight_rate(f), alpha_rate_of(similarity)
            weight_step, bias_step, alpha_step = (torch.zeros_like(x) for x in (weight, bias, alpha))
            kept = weight, bias, alpha
            for iteration in range(1, self.iterations + 1):
                z = torch.addmm(bias, f, weight.T).addcmul_(similarity, alpha)
                error = z.softmax(-1).sub_(y).div_(len(f))  # the gradient of the mean loss by the logits
                alpha_step = (error * similarity).sum(0) + (alpha_step if self.accumulates else 0)
                weight_step = self.momentum * weight_step + error.T @ f
                bias_step = self.momentum * bias_step + error.sum(0)
                weight, bias = weight - rate * weight_step, bias - rate * bias_step
                if iteration % ALPHA_EVERY == 0:
                    alpha = alpha - alpha_rate * alpha_step
                if queries is not None:
                    right = int((blended(queries, t, weight, bias, alpha).argmax(-1) == truth).sum())
                    if right < best:
                        continue
                    best = right
                kept = weight, bias, alpha
        for ours, found in zip((self.weight, self.bias, self.alpha), kept, strict=True):
            ours.copy_(found)


def blended(f: Tensor, t: Tensor, weight: Tensor, bias: Tensor, alpha: Tensor) -> Tensor:
    """Logits, (B, C), of unit-length f, (B, D), and t, (C, D)."""
    with torch.autocast(f.device.type, enabled=False):
        return F.linear(f, weight + alpha[:, None] * t, bias)


def weight_rate(f: Tensor) -> float:
    """Step size of W and b, ``4 N / λ_max(FᵀF)``, from features, (N, D): the inverse of a Lipschitz constant."""
    return 4 * len(f) / float(torch.linalg.eigvalsh(f.T @ f)[-1])


def alpha_rate_of(similarity: Tensor) -> float:
    """Step size of α, ``N / (4 max_c Σ_i (f_i · t_c)²)``, from cosines with the text, (N, C)."""
    return len(similarity) / (4 * float(similarity.square().sum(0).max()))
