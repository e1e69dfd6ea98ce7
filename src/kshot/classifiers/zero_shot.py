"""Zero-shot classification by text prompts (CLIP, Radford et al. 2021, section 3.1)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from kshot.backbones.base import Backbone, VisionLanguageBackbone, require_text
from kshot.classifiers.base import Classifier, Task, cosine_logits
from kshot.memo import Memo


class TextPrompt(Classifier):
    """Compares an image with one sentence a class, or with the mean over several templates.

    Has nothing to train itself; with an adapter it is the head of CLIP-LoRA and its relatives.

    Args:
        backbone: must have a text tower.
        task: its class names and, unless overridden, its templates.
        templates: override of the data set's templates.

    Raises:
        UserError: the backbone has no text tower, or a prompt does not fit its context.
    """

    def __init__(self, backbone: Backbone, task: Task, templates: Sequence[str] | None = None) -> None:
        super().__init__(backbone, task)
        self.text = TextFeatures(require_text(backbone, "TextPrompt"), task.class_names, templates or task.templates)

    def forward(self, features: Tensor) -> Tensor:
        return cosine_logits(features, self.text(), self.text.backbone.logit_scale)


class TextFeatures:
    """Class prototypes from text; encoded anew only when something in the text tower changed or needs a gradient."""

    def __init__(self, backbone: VisionLanguageBackbone, class_names: Sequence[str], templates: Sequence[str]) -> None:
        self.backbone = backbone
        self.tokens = [backbone.tokenize([t.format(name) for name in class_names]) for t in templates]
        self._memo: Memo[Tensor] = Memo()

    def __call__(self) -> Tensor:
        """Unit-length prototypes, (C, D): the normalised mean over templates of normalised features."""
        if not self.backbone.settled("text"):
            return self.encode()
        return self._memo.get([self.backbone.mean, *self.backbone.trainable("text")], self.encode)

    def encode(self) -> Tensor:
        """The same, computed."""
        device = self.backbone.mean.device
        features = [F.normalize(self.backbone.encode_tokens(t.to(device)).float(), dim=-1) for t in self.tokens]
        return F.normalize(torch.stack(features).mean(0), dim=-1)
