"""Zero-shot classification by text prompts (CLIP, Radford et al. 2021, section 3.1)."""

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
        templates: override of the data set's templates: sentences, or the name of an ensemble: ``imagenet7`` (CoOp's),
            ``imagenet60`` (PromptSRC's) or ``imagenet80`` (CLIP's).

    Attributes:
        unit_length: give the features of an ensemble's sentences, and their mean, unit length (CLIP); False takes the
            mean of the features as they are (PromptSRC, TaskRes). A single sentence's are always taken as they are.
    """

    unit_length = True

    def __init__(self, backbone: Backbone, task: Task, templates: Sequence[str] | str | None = None) -> None:
        super().__init__(backbone, task)
        require_text(backbone, type(self).__name__)
        self.templates = None if templates is None else named_templates(templates)
        self.prepare_classes()

    def prepare_classes(self) -> None:
        names = self.task.class_names
        for name in names:
            require_tokens(self.backbone, name)
        # Plain tensors on the CPU, where lengths can be read without waiting for a device.
        sentences = [[t.format(name) for name in names] for t in self.templates or self.task.templates]
        self.tokens = [self.backbone.tokenize(each) for each in sentences]

    def encode(self) -> Tensor:
        features = exact(*[self.backbone.encode_tokens(tokens) for tokens in self.tokens])
        if len(features) == 1:
            return features[0]
        if self.unit_length:
            return F.normalize(torch.stack([F.normalize(f, dim=-1) for f in features]).mean(0), dim=-1)
        return torch.stack(features).mean(0)


class Anchored(TextClassifier):
    """Stays near the text features of hand-written sentences, which the untouched backbone gives.

    Attributes:
        templates: of these sentences; None takes the data set's.
        unit_length: as of :class:`TextPrompt`.
        teacher: t⁰, (C, D), once the losses have asked for it; None after a change of classes.
    """

    templates: tuple[str, ...] | None
    unit_length = True
    teacher: Tensor | None

    def anchor(self, templates: Sequence[str] | str | None) -> None:
        """Ends construction: takes the sentences, or the name of an ensemble of them."""
        self.templates = None if templates is None else named_templates(templates)
        self.register_buffer("teacher", None, persistent=False)

    def set_class_names(self, class_names: Sequence[str], templates: Sequence[str] | None = None) -> None:
        super().set_class_names(class_names, templates)
        self.teacher = None

    @torch.inference_mode(False)
    @torch.no_grad()
    def teacher_text(self) -> Tensor:
        """t⁰. It stands in a run's losses, so that it is computed without the rounding of mixed precision."""
        if self.teacher is None:
            prompt = TextPrompt(self.backbone, self.task, self.templates)
            prompt.unit_length = self.unit_length
            with self.backbone.unadapted(), torch.autocast(self.backbone.mean.device.type, enabled=False):
                self.teacher = prompt.encode()
        return self.teacher


def require_tokens(backbone: VisionLanguageBackbone, name: str) -> int:
    """The number of tokens of a class name; raises UserError where the tokenizer leaves none."""
    tokens = len(backbone.token_ids(name))
    if tokens == 0:
        raise UserError(f"The tokenizer of {backbone.name} finds no token in the class name {name!r}: give it words.")
    return tokens
