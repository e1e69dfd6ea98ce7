"""Class means joined with the text: what one image a class can do (SS-Text, arXiv:2506.06076)."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from kshot.backbones.base import Backbone
from kshot.classifiers.base import Shots, Task, exact
from kshot.classifiers.zero_shot import TextPrompt
from kshot.errors import require


class ClassMeanText(TextPrompt):
    """``z = τ cos(f, m_c + ω_c t_c)`` of the mean m_c of a class's unit-length features and its text t_c.

    Args:
        text_weight: ω; None weighs the text of a class with n images 1 / n, as SS-Text does: the more images, the less
            text.
        templates: as :class:`TextPrompt`.

    Attributes:
        means: m, (C, D); zero for classes without images.
        counts: n, (C,).
    """

    means: Tensor
    counts: Tensor
    needs = frozenset({"shots"})
    bound = "its means are those of the training classes"

    def __init__(
        self,
        backbone: Backbone,
        task: Task,
        text_weight: float | None = 1.0,
        templates: Sequence[str] | str | None = None,
    ) -> None:
        super().__init__(backbone, task, templates)
        holds = text_weight is None or 0 < text_weight < float("inf")
        require("ClassMeanText", "text_weight", text_weight, holds, "be above 0, or null for 1 / n")
        self.text_weight = text_weight
        self.register_buffer("means", torch.zeros(len(task.class_names), backbone.feature_dim))
        self.register_buffer("counts", torch.zeros(len(task.class_names)))

    def text_features(self, features: Tensor) -> Tensor:
        text, means, counts = exact(super().text_features(features), self.means, self.counts)
        weight = torch.full_like(counts, self.text_weight) if self.text_weight else 1 / counts.clamp(min=1)
        return means + weight[:, None] * F.normalize(text, dim=-1)

    @torch.no_grad()
    def fit(self, train: Shots, val: Shots | None) -> None:  # noqa: ARG002  nothing to choose
        (views,) = exact(train.features)
        features = F.normalize(views, dim=-1).mean(0)
        member = F.one_hot(train.label, len(self.means)).to(features)
        counts = member.sum(0)
        self.means.copy_(member.T @ features / counts.clamp(min=1)[:, None])
        self.counts.copy_(counts)
