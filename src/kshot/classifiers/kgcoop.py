"""KgCoOp: CoOp that stays near the hand-written prompts (Yao et al. 2023, arXiv:2303.13283)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from kshot.backbones.base import Backbone, require_text
from kshot.classifiers.base import Task
from kshot.classifiers.coop import CoOp
from kshot.classifiers.zero_shot import TextFeatures


class KgCoOp(CoOp):
    """CoOp with the term ``weight · (1 - mean_c cos(t_c, t⁰_c))``, t⁰ the frozen features of the data set's templates.

    The paper writes the mean squared distance of unit vectors (equation 6), which is twice that.

    Args:
        backbone: must have a text tower that takes embeddings.
        task: its class names and templates.
        context_length: M; None takes the length of ``init_words``, or 16.
        init_words: start of the context.
        weight: of the term; the paper's code has 8.

    Raises:
        UserError: as :class:`~kshot.classifiers.coop.CoOp`.
    """

    frozen_text: Tensor

    def __init__(
        self,
        backbone: Backbone,
        task: Task,
        context_length: int | None = None,
        init_words: str | None = "a photo of a",
        weight: float = 8.0,
    ) -> None:
        super().__init__(backbone, task, context_length, init_words=init_words)
        self.weight = weight

    @torch.no_grad()
    def observe_frozen(self) -> None:
        text = TextFeatures(require_text(self.backbone, "KgCoOp"), self.task.class_names, self.task.templates)
        self.register_buffer("frozen_text", text.encode(), persistent=False)

    def terms(self, features: Tensor, text: Tensor, label: Tensor, frozen: Tensor | None) -> dict[str, Tensor]:
        similarity = F.cosine_similarity(text.float(), self.frozen_text.float(), dim=-1)
        return super().terms(features, text, label, frozen) | {"knowledge": self.weight * (1 - similarity.mean())}
