"""Nearest class mean, the simplest few-shot classifier (Mensink et al. 2013; Snell et al. 2017 call it prototypes)."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kshot.backbones.base import Backbone
from kshot.classifiers.base import Classifier, Shots, Task, cosine_logits, exact
from kshot.errors import require


class NearestClassMean(Classifier):
    """Compares an image with the normalised mean of each class's normalised training features.

    Args:
        scale: inverse temperature of the logits; in closed form it decides confidence, not the class.
        trainable: the means are the start of a cosine head, which gradient steps train together with an adapter.
    """

    means: Tensor
    needs = frozenset({"shots"})
    bound = "its means are those of the training classes"

    def __init__(self, backbone: Backbone, task: Task, scale: float = 20.0, trainable: bool = False) -> None:
        super().__init__(backbone, task)
        require("NearestClassMean", "scale", scale, 0 < scale < math.inf, "be above 0")
        self.scale = scale
        means = torch.zeros(len(task.class_names), backbone.feature_dim)
        if trainable:
            self.means = nn.Parameter(means)
        else:
            self.register_buffer("means", means)

    def forward(self, features: Tensor) -> Tensor:
        return cosine_logits(features, self.means, self.scale)

    @torch.no_grad()
    def fit(self, train: Shots, val: Shots | None) -> None:  # noqa: ARG002  nothing to choose
        views, label = train.every_view
        (features,) = exact(views)
        member = F.one_hot(label, len(self.means)).T.to(features)  # (C, N)
        sums = member @ F.normalize(features, dim=-1)
        self.means.copy_(F.normalize(sums / member.sum(1, keepdim=True).clamp(min=1), dim=-1))
