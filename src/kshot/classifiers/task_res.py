"""TaskRes: a learned residual on the text features (Yu et al. 2022, arXiv:2211.10277)."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from kshot.backbones.base import Backbone
from kshot.classifiers.base import Task
from kshot.classifiers.zero_shot import TextPrompt
from kshot.errors import require


class TaskRes(TextPrompt):
    """``z = τ cos(f, t_c + a x_c)`` with x, (C, D), learned from zero.

    As in the paper's code, t_c is the text feature as the tower gives it, some ten long for CLIP, and of an ensemble
    the mean of these; what ``a x_c`` changes is normalised afterwards.

    Args:
        scale: a.
        templates: as :class:`TextPrompt`.
    """

    unit_length = False
    bound = "its residuals belong to the training classes"

    def __init__(
        self, backbone: Backbone, task: Task, scale: float = 0.5, templates: Sequence[str] | str | None = None
    ) -> None:
        super().__init__(backbone, task, templates)
        require("TaskRes", "scale", scale, 0 < scale < math.inf, "be above 0")
        self.scale = scale
        self.residual = nn.Parameter(torch.zeros(len(task.class_names), backbone.feature_dim))

    def text_features(self, features: Tensor) -> Tensor:
        return super().text_features(features) + self.scale * self.residual
