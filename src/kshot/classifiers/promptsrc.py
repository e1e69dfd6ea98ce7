"""PromptSRC: deep prompts in both towers that regulate themselves (Khattak et al. 2023, arXiv:2307.06948)."""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kshot.backbones.base import Backbone
from kshot.classifiers.base import GaussianAverage, Task, cosine_logits, exact
from kshot.classifiers.coop import CoOp
from kshot.classifiers.vpt import checked_blocks
from kshot.classifiers.zero_shot import Anchored
from kshot.errors import require


class PromptSRC(Anchored, CoOp):
    """IVLP with three regularisers and Gaussian aggregation of the prompts over the epochs.

    With t, f the prompted and t⁰, v⁰ the frozen features, all of unit length, and z, z⁰ their logits::

        L = CE(z, y) + text_weight · mean|t - t⁰| + image_weight · mean|f - v⁰| + logit_weight · KL(z⁰ ‖ z) / (B C)

    (the paper's equations 4 to 8; ``mean`` and the division as in its code). t⁰ is the mean of many templates, not
    normalised before the mean.

    Args:
        context_length: text prompts a block.
        init_words: start of the first text block's prompts.
        prompt_length: image prompts a block.
        depth: blocks that get prompts of their own, in both towers; None takes 9, or all blocks of a smaller tower.
        text_weight: of the text term.
        image_weight: of the image term.
        logit_weight: of the Kullback-Leibler term.
        templates: of t⁰: sentences, or the name of an ensemble as for TextPrompt.
        average_mean: epoch, counted from 1, at which the Gaussian weight of the aggregation peaks; None does without
            aggregation and ends with the last epoch.
        average_std: its standard deviation, in epochs.

    Attributes:
        image_prompts: (blocks, prompt_length, image width).
    """

    needs = frozenset({"teacher"})
    unit_length = False

    def __init__(
        self,
        backbone: Backbone,
        task: Task,
        context_length: int | None = None,
        init_words: str | None = "a photo of a",
        prompt_length: int = 4,
        depth: int | None = None,
        text_weight: float = 25.0,
        image_weight: float = 10.0,
        logit_weight: float = 1.0,
        templates: Sequence[str] | str = "imagenet60",
        average_mean: float | None = 30.0,
        average_std: float = 30.0,
    ) -> None:
        super().__init__(backbone, task, context_length, init_words=init_words, depth=depth)
        blocks = checked_blocks("PromptSRC", backbone, prompt_length, depth)
        weights = {"text_weight": text_weight, "image_weight": image_weight, "logit_weight": logit_weight}
        for name, weight in weights.items():
            require("PromptSRC", name, weight, 0 <= weight < math.inf, "be at least 0")
        require("PromptSRC", "average_std", average_std, average_std > 0, "be positive")
        self.image_prompts = nn.Parameter(torch.randn(blocks, prompt_length, backbone.image_width) * 0.02)
        self.text_weight, self.image_weight, self.logit_weight = text_weight, image_weight, logit_weight
        self.anchor(templates)
        self.average = None if average_mean is None else GaussianAverage(average_mean, average_std)

    def image_tokens(self) -> Sequence[Tensor]:
        return list(self.image_prompts)

    def param_groups(self) -> list[dict[str, Any]]:
        text_prompts = [p for p in (self.context, self.deep) if p is not None]
        groups: list[dict[str, Any]] = [{"params": [self.image_prompts]}, {"params": text_prompts, "head": True}]
        return groups if self.average is None else [group | {"average": self.average} for group in groups]

    def terms(self, features: Tensor, text: Tensor, label: Tensor, teacher: Tensor | None) -> dict[str, Tensor]:
        assert teacher is not None, "the caller gives image features of the untouched backbone"
        t, f, t0, v0 = (F.normalize(x, dim=-1) for x in exact(text, features, self.teacher_text(), teacher))
        before = cosine_logits(v0, t0, self.backbone.logit_scale).log_softmax(-1)
        after = self.logits(features, text).log_softmax(-1)
        divergence = F.kl_div(after, before, reduction="sum", log_target=True) / after.numel()
        return super().terms(features, text, label, teacher) | {
            "text_consistency": self.text_weight * (t - t0).abs().mean(),
            "image_consistency": self.image_weight * (f - v0).abs().mean(),
            "logit_consistency": self.logit_weight * divergence,
        }
