"""KgCoOp: CoOp that stays near the hand-written prompts (Yao et al. 2023, arXiv:2303.13283)."""

import math
from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from kshot.backbones.base import Backbone
from kshot.classifiers.base import Task, exact
from kshot.classifiers.coop import CoOp
from kshot.classifiers.zero_shot import Anchored
from kshot.errors import require


class KgCoOp(Anchored, CoOp):
    """CoOp with the term ``weight · (1 - mean_c cos(t_c, t⁰_c))``, t⁰ the text features of the untouched backbone.

    The paper writes the mean squared distance of unit vectors (equation 6), which is twice that.

    Args:
        context_length: M; None takes the length of ``init_words``, or 16.
        init_words: start of the context.
        weight: of the term; the paper's code has 8.
        templates: of t⁰: sentences, or the name of an ensemble as for TextPrompt; None takes the data set's.
    """

    def __init__(
        self,
        backbone: Backbone,
        task: Task,
        context_length: int | None = None,
        init_words: str | None = "a photo of a",
        weight: float = 8.0,
        templates: Sequence[str] | str | None = None,
    ) -> None:
        super().__init__(backbone, task, context_length, init_words=init_words)
        self.anchor(templates)
        require("KgCoOp", "weight", weight, 0 <= weight < math.inf, "be at least 0")
        self.weight = weight

    def terms(self, features: Tensor, text: Tensor, label: Tensor, teacher: Tensor | None) -> dict[str, Tensor]:
        text, before = exact(text, self.teacher_text())  # so that both terms' gradients add up without rounding
        similarity = F.cosine_similarity(text, before, dim=-1)
        return super().terms(features, text, label, teacher) | {"knowledge": self.weight * (1 - similarity.mean())}
