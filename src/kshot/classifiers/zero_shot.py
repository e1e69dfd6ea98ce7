"""Zero-shot classification by text prompts (CLIP, Radford et al. 2021, section 3.1)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from kshot.backbones.base import Backbone
from kshot.backbones.language import VisionLanguageBackbone, require_text
from kshot.classifiers.base import Task, TextClassifier, exact
from kshot.errors import UserError
from kshot.templates import named_templates


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

    unit_length = True  # whether the features of an ensemble's sentences are normalised before their mean

    @torch.inference_mode(False)
    def __init__(self, backbone: Backbone, task: Task, templates: Sequence[str] | str | None = None) -> None:
        super().__init__(backbone, task)
        require_text(backbone, type(self).__name__)
        self.templates = named_templates(templates) if templates else None
        self.prepare_classes()

    def prepare_classes(self) -> None:
        templates = self.templates or self.task.templates
        self.sentences = Sentences(self.backbone, self.task.class_names, templates, self.unit_length)

    def encode(self) -> Tensor:
        return self.sentences.encode(self.backbone)


class Sentences:
    """The sentences that stand for classes, as tokens.

    Args:
        backbone: with the text tower that reads them.
        class_names: in label order.
        templates: one, whose features are taken as they are, or an ensemble.
        unit_length: give the features of an ensemble's sentences, and their mean, unit length (CLIP); False takes the
            mean of the features as they are (PromptSRC, TaskRes).

    Raises:
        UserError: a class name without tokens, or a sentence that does not fit.
    """

    def __init__(
        self,
        backbone: VisionLanguageBackbone,
        class_names: Sequence[str],
        templates: Sequence[str],
        unit_length: bool = True,
    ) -> None:
        self.unit_length = unit_length
        for name in class_names:
            require_tokens(backbone, name)
        # Plain tensors on the CPU, where lengths can be read without waiting for a device.
        self.tokens = [backbone.tokenize([t.format(name) for name in class_names]) for t in templates]

    def encode(self, backbone: VisionLanguageBackbone) -> Tensor:
        """Prototypes, (C, D)."""
        features = exact(*[backbone.encode_tokens(tokens) for tokens in self.tokens])
        if len(features) == 1:
            return features[0]
        if self.unit_length:
            return F.normalize(torch.stack([F.normalize(f, dim=-1) for f in features]).mean(0), dim=-1)
        return torch.stack(features).mean(0)


@torch.inference_mode(False)
@torch.no_grad()
def untouched_text(
    backbone: VisionLanguageBackbone, class_names: Sequence[str], templates: Sequence[str], unit_length: bool = True
) -> Tensor:
    """Prototypes, (C, D), by the backbone as it was before anything was attached, as :class:`Sentences`.

    They stand in a run's losses as a teacher, so that they are computed without the rounding of mixed precision.
    """
    sentences = Sentences(backbone, class_names, templates, unit_length)
    with backbone.unadapted(), torch.autocast(backbone.mean.device.type, enabled=False):
        return sentences.encode(backbone)


def require_tokens(backbone: VisionLanguageBackbone, name: str) -> int:
    """The number of tokens of a class name.

    Raises:
        UserError: the tokenizer leaves nothing of it.
    """
    tokens = len(backbone.token_ids(name))
    if tokens == 0:
        raise UserError(f"The tokenizer of {backbone.name} finds no token in the class name {name!r}: give it words.")
    return tokens
