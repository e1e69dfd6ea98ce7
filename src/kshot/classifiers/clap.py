"""CLAP: class weights that start at the text and are held near it (Silva-Rodríguez et al. 2024, arXiv:2312.12730)."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from kshot.backbones.base import Backbone
from kshot.classifiers.base import Shots, Task
from kshot.classifiers.task_res import TaskRes
from kshot.classifiers.zero_shot import TextPrompt
from kshot.errors import require


class CLAP(TaskRes):
    """``z = τ cos(f, w_c)`` with ``w_c`` from ``t_c`` on, and ``mean_c λ_c ‖w_c - t_c‖²`` in the loss (equation 5).

    λ_c is how well the text knows a class: the mean zero-shot probability of the true class over the views of its
    shots, and 0 for a class without any. Without the constraint this is the authors' ZS-LP, :class:`TaskRes` of scale
    1: what trains is ``w - t``. Text features are as the tower gives them, some ten long for CLIP.

    Args:
        weight: of the constraint; the authors' is 1.
        templates: as :class:`TextPrompt`.

    Attributes:
        strength: λ, (C,).
    """

    strength: Tensor
    needs = frozenset({"shots"})
    bound = "it has a row of weights for each training class"

    def __init__(
        self, backbone: Backbone, task: Task, weight: float = 1.0, templates: Sequence[str] | str | None = None
    ) -> None:
        super().__init__(backbone, task, 1.0, templates)
        require("CLAP", "weight", weight, 0 < weight < math.inf, "be above 0; without the constraint it is TaskRes")
        self.weight = weight
        self.register_buffer("strength", torch.zeros(len(task.class_names)))

    @torch.no_grad()
    def fit(self, train: Shots, val: Shots | None) -> None:  # noqa: ARG002  nothing to choose
        views, label = train.every_view
        probability = self.logits(views, TextPrompt.text_features(self, views)).softmax(-1)
        member = F.one_hot(label, len(self.strength)).to(probability)
        self.strength.copy_((member * probability).sum(0) / member.sum(0).clamp(min=1))

    def terms(self, features: Tensor, text: Tensor, label: Tensor, teacher: Tensor | None) -> dict[str, Tensor]:
        away = self.residual.float() if self.residual.dtype.itemsize < 4 else self.residual
        constraint = (self.strength.to(away) * away.square().sum(-1)).mean()
        return {**super().terms(features, text, label, teacher), "constraint": self.weight * constraint}
