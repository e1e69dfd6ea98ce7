"""Zero-shot classification by text prompts (CLIP, Radford et al. 2021, section 3.1)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from kshot.backbones.base import Backbone, VisionLanguageBackbone, require_text
from kshot.classifiers.base import Task, TextClassifier
from kshot.errors import UserError, nearest_first
from kshot.memo import Memo

# CoOp's choice of the templates of Radford et al. (2021) for ImageNet.
IMAGENET_7 = (
    "itap of a {}.",
    "a bad photo of the {}.",
    "a origami {}.",
    "a photo of the large {}.",
    "a {} in a video game.",
    "art of the {}.",
    "a photo of the small {}.",
)


class TextPrompt(TextClassifier):
    """Compares an image with one sentence a class, or with the mean over several templates.

    Has nothing to train itself; with an adapter it is the head of CLIP-LoRA and its relatives.

    Args:
        backbone: must have a text tower.
        task: its class names and, unless overridden, its templates.
        templates: override of the data set's templates: sentences, or the name of an ensemble: ``imagenet7`` (CoOp's),
            ``imagenet60`` (PromptSRC's) or ``imagenet80`` (CLIP's).

    Raises:
        UserError: the backbone has no text tower, or a prompt does not fit its context.
    """

    def __init__(self, backbone: Backbone, task: Task, templates: Sequence[str] | str | None = None) -> None:
        super().__init__(backbone, task)
        require_text(backbone, type(self).__name__)
        self.templates = named_templates(templates) if templates else None
        self.prepare_classes()

    def prepare_classes(self) -> None:
        text = require_text(self.backbone, type(self).__name__)
        self.text = TextFeatures(text, self.task.class_names, self.templates or self.task.templates)

    def text_features(self, features: Tensor) -> Tensor:  # noqa: ARG002  the same for every image
        return self.text()


class TextFeatures:
    """Class prototypes from text; encoded anew only when something in the text tower changed or needs a gradient.

    Args:
        backbone: with the text tower.
        class_names: in label order.
        templates: one, whose features are taken as they are, or an ensemble.
        normalise_first: normalise before the mean over templates (CLIP), or only after it (PromptSRC).
    """

    def __init__(
        self,
        backbone: VisionLanguageBackbone,
        class_names: Sequence[str],
        templates: Sequence[str],
        normalise_first: bool = True,
    ) -> None:
        self.backbone, self.normalise_first = backbone, normalise_first
        for name in class_names:
            require_tokens(backbone, name)
        self.tokens = [backbone.tokenize([t.format(name) for name in class_names]) for t in templates]
        self._memo: Memo[Tensor] = Memo()

    def __call__(self) -> Tensor:
        """Prototypes, (C, D); those of an ensemble have unit length."""
        if not self.backbone.settled("text"):
            return self.encode()
        return self._memo.get([self.backbone.mean, *self.backbone.trainable("text")], self.encode)

    def encode(self) -> Tensor:
        """The same, computed."""
        device = self.backbone.mean.device
        features = [self.backbone.encode_tokens(t.to(device)).float() for t in self.tokens]
        if len(features) == 1:
            return features[0]
        if self.normalise_first:
            features = [F.normalize(f, dim=-1) for f in features]
        return F.normalize(torch.stack(features).mean(0), dim=-1)


def require_tokens(backbone: VisionLanguageBackbone, name: str) -> int:
    """The number of tokens of a class name.

    Raises:
        UserError: the tokenizer leaves nothing of it.
    """
    tokens = len(backbone.token_ids(name))
    if tokens == 0:
        raise UserError(f"The tokenizer of {backbone.name} finds no token in the class name {name!r}: give it words.")
    return tokens


def named_templates(templates: Sequence[str] | str) -> tuple[str, ...]:
    """Sentences as they are given, or those of a named ensemble.

    Raises:
        UserError: no ensemble of that name, no sentence, or one without a place for the class name.
    """
    if not isinstance(templates, str) or "{" in templates:
        given = (templates,) if isinstance(templates, str) else tuple(templates)
        wrong = [t for t in given if t.count("{}") != 1 or t.replace("{}", "").strip("{}") != t.replace("{}", "")]
        if not given or wrong:
            raise UserError(f"templates: {(wrong or ['[]'])[0]!r} must have {{}} once, where the class name goes.")
        return given
    if templates == "imagenet7":
        return IMAGENET_7
    if templates not in ("imagenet60", "imagenet80"):
        raise UserError(
            f"templates: {templates!r} has no {{}} for the class name, nor is it an ensemble. "
            f"{nearest_first(templates, ['imagenet7', 'imagenet60', 'imagenet80'])}"
        )
    from open_clip import OPENAI_IMAGENET_TEMPLATES

    sentences = tuple(str(template("{}")) for template in OPENAI_IMAGENET_TEMPLATES)
    return sentences[: int(templates.removeprefix("imagenet"))]  # PromptSRC's 60 are the first of CLIP's 80
