"""TaskRes: a learned residual on the text features (Yu et al. 2022, arXiv:2211.10277)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kshot.backbones.base import Backbone
from kshot.classifiers.base import Task
from kshot.classifiers.zero_shot import TextPrompt
from kshot.errors import UserError


class TaskRes(TextPrompt):
    """``z = τ cos(f, t_c + a x_c)`` with t_c of unit length and x, (C, D), learned from zero.

    Args:
        backbone: must have a text tower.
        task: its class names and, unless overridden, its templates.
        scale: a.
        templates: as :class:`TextPrompt`.

    Raises:
        UserError: no text tower; a prompt does not fit; the scale is not above 0.
    """

    class_bound = "its residuals belong to the training classes"

    def __init__(
        self, backbone: Backbone, task: Task, scale: float = 0.5, templates: Sequence[str] | str | None = None
    ) -> None:
        super().__init__(backbone, task, templates)
        if not 0 < scale < math.inf:
            raise UserError(f"TaskRes: scale is {scale}, and must be above 0.")
        self.scale = scale
        self.residual = nn.Parameter(torch.zeros(len(task.class_names), backbone.feature_dim))

    def text_features(self, features: Tensor) -> Tensor:
        return F.normalize(super().text_features(features).float(), dim=-1) + self.scale * self.residual
