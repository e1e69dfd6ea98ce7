"""PromptSRC: deep prompts in both towers that regulate themselves (Khattak et al. 2023, arXiv:2307.06948)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from kshot.backbones.base import Backbone, require_text
from kshot.classifiers.base import Task, cosine_logits
from kshot.classifiers.coop import CoOp
from kshot.classifiers.vpt import VPT
from kshot.classifiers.zero_shot import TextFeatures, named_templates
from kshot.errors import UserError


class PromptSRC(VPT):
    """IVLP with three regularisers and Gaussian aggregation of the prompts over the epochs.

    With t, f the prompted and t⁰, v⁰ the frozen features, all of unit length, and z, z⁰ their logits::

        L = CE(z, y) + text_weight · mean|t - t⁰| + image_weight · mean|f - v⁰| + logit_weight · KL(z⁰ ‖ z) / (B C)

    (the paper's equations 4 to 8; ``mean`` and the division as in its code). t⁰ is the mean of many templates, not
    normalised before the mean.

    Args:
        backbone: must have a text tower that takes embeddings, and an image tower that takes prompts.
        task: its class names.
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

    Raises:
        UserError: as CoOp and VPT; a standard deviation that is not positive.
    """

    learns_from_frozen = True
    frozen_text: Tensor

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
        require_text(backbone, "PromptSRC")
        head = partial(CoOp, context_length=context_length, init_words=init_words, depth=depth)
        super().__init__(backbone, task, prompt_length, depth, head)
        if not average_std > 0:
            raise UserError(f"PromptSRC: average_std is {average_std}, and must be positive.")
        self.text_weight, self.image_weight, self.logit_weight = text_weight, image_weight, logit_weight
        self.templates = named_templates(templates)
        self.gaussian = None if average_mean is None else GaussianAverage(average_mean, average_std)

    @property
    def title(self) -> str:
        return type(self).__name__

    @property
    def averaging(self) -> GaussianAverage | None:  # type: ignore[override]
        return self.gaussian

    @torch.no_grad()
    def observe_frozen(self) -> None:
        backbone = require_text(self.backbone, "PromptSRC")
        text = TextFeatures(backbone, self.task.class_names, self.templates, normalise_first=False)
        self.register_buffer("frozen_text", F.normalize(text.encode(), dim=-1), persistent=False)

    def terms(self, features: Tensor, text: Tensor, label: Tensor, frozen: Tensor | None) -> dict[str, Tensor]:
        assert frozen is not None, "the caller gives image features of the untouched backbone"
        t, f, v0 = (F.normalize(x.float(), dim=-1) for x in (text, features, frozen))
        scale = require_text(self.backbone, "PromptSRC").logit_scale
        before = cosine_logits(v0, self.frozen_text, scale).log_softmax(-1)
        after = self.logits(features, text).log_softmax(-1)
        divergence = F.kl_div(after, before, reduction="sum", log_target=True) / after.numel()
        return super().terms(features, text, label, frozen) | {
            "text_consistency": self.text_weight * (t - self.frozen_text).abs().mean(),
            "image_consistency": self.image_weight * (f - v0).abs().mean(),
            "logit_consistency": self.logit_weight * divergence,
        }


class GaussianAverage:
    """``Σ_e w_e θ_e / Σ_e w_e`` with ``w_e = exp(-(e - μ)² / 2σ²)`` over the epochs e that were run (equation 9).

    Kept as a running mean in float32, over trained tensors alone. A tensor whose shape changes during the run starts
    anew. Weights are kept as logarithms, since a run may end far from μ.

    Args:
        mean: μ, an epoch counted from 1.
        std: σ, in epochs.
    """

    def __init__(self, mean: float, std: float) -> None:
        self.peak, self.std = mean, std
        self.means: dict[str, Tensor] = {}
        self.log_weights: dict[str, float] = {}  # log Σ w_e so far

    @torch.no_grad()
    def add(self, epoch: int, tensors: Mapping[str, Tensor]) -> None:
        log_weight = -((epoch - self.peak) ** 2) / (2 * self.std**2)
        for name, tensor in tensors.items():
            value, before = tensor.detach().float(), self.means.get(name)
            if before is None or before.shape != value.shape:
                self.means[name], self.log_weights[name] = value.clone(), log_weight
                continue
            total = float(np.logaddexp(self.log_weights[name], log_weight))
            self.means[name] = torch.lerp(before.to(value.device), value, math.exp(log_weight - total))
            self.log_weights[name] = total

    def mean(self) -> dict[str, Tensor]:
        return dict(self.means)

    def state(self) -> dict[str, Any]:
        return {"means": dict(self.means), "log_weights": dict(self.log_weights)}

    def load_state(self, state: Mapping[str, Any]) -> None:
        self.means, self.log_weights = dict(state["means"]), dict(state["log_weights"])
