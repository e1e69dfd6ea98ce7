"""What heads in closed form share: an image part in closed form, blended with the text by what the shots say."""

import math
from abc import abstractmethod
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from kshot.backbones.base import Backbone
from kshot.backbones.language import VisionLanguageBackbone, require_text
from kshot.classifiers.base import Classifier, Shots, Task, exact
from kshot.classifiers.leaving_out import judgeable
from kshot.classifiers.zero_shot import TextPrompt
from kshot.errors import UserError
from kshot.judging import accuracy, best_of, best_scale

TEXT_WEIGHTS = (0.0, 1 / 16, 1 / 8, 1 / 4, 1 / 2, 1.0, 2.0, 4.0)
UNJUDGED = 10.0  # scale of the image part where each class has one image, so that nothing can be held out


class WithText(Classifier):
    """A closed form that may start from the text, or be blended with it.

    Args:
        text: use the text; None does where the backbone has a text tower.
        templates: as :class:`TextPrompt`.

    Attributes:
        prompt: the text; None without.
    """

    needs = frozenset({"shots"})

    def __init__(
        self, backbone: Backbone, task: Task, text: bool | None, templates: Sequence[str] | str | None
    ) -> None:
        super().__init__(backbone, task)
        if text is None:
            text = isinstance(backbone, VisionLanguageBackbone)
        if text:
            require_text(backbone, type(self).__name__)
        self.prompt = TextPrompt(backbone, task, templates) if text else None

    def set_class_names(self, class_names: Sequence[str], templates: Sequence[str] | None = None) -> None:
        super().set_class_names(class_names, templates)
        if self.prompt is not None:
            self.prompt.set_class_names(class_names, templates)


class LinearBlend(WithText):
    """``z = α (W f + b) + ω τ cos(f, t)`` of unit-length f, with W and b in closed form.

    Subclasses find W and b, and what they are worth on images that were held out. α is the inverse temperature that
    suits these logits; ω, 0 among its values, is the best on them by accuracy, then log loss; then the sum gets its
    temperature. Where no class has two images, nothing can be held out: ω is 1 if the text is
    right about more shots than chance allows (by two standard deviations), and else 0.

    Args:
        text: as :class:`WithText`.
        templates: as :class:`WithText`.

    Attributes:
        weight: W, (C, D).
        bias: b, (C,).
        scale: α.
        text_weight: ω.
    """

    weight: Tensor
    bias: Tensor
    scale: Tensor
    text_weight: Tensor
    bound = "it has one row of weights for each training class"

    def __init__(
        self, backbone: Backbone, task: Task, text: bool | None = None, templates: Sequence[str] | str | None = None
    ) -> None:
        super().__init__(backbone, task, text, templates)
        self.register_buffer("weight", torch.zeros(len(task.class_names), backbone.feature_dim))
        self.register_buffer("bias", torch.zeros(len(task.class_names)))
        self.register_buffer("scale", torch.tensor(0.0))
        self.register_buffer("text_weight", torch.tensor(0.0 if self.prompt is None else 1.0))

    @abstractmethod
    def solve(self, train: Shots) -> tuple[Tensor, Tensor, Tensor | None]:
        """Finds W, (C, D), and b, (C,), and logits of the images that can be held out by answers without them.

        Returns:
            W, b and the logits, the mean over the views, of the :func:`judgeable` images; None where there are none.
        """

    def forward(self, features: Tensor) -> Tensor:
        return self.blended(features, self.weight, self.bias)

    def blended(self, features: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """Logits, (B, C), from features, (B, D), W and b."""
        f, weight, bias, scale, text_weight = exact(features, weight, bias, self.scale, self.text_weight)
        with torch.autocast(f.device.type, enabled=False):
            image = scale * F.linear(F.normalize(f, dim=-1), weight, bias)
        return image if self.prompt is None else image + text_weight * self.prompt(features)

    @torch.no_grad()
    def fit(self, train: Shots, val: Shots | None) -> None:  # noqa: ARG002  the shots decide
        require_finite(self, train)
        label = train.label.cpu()
        weight, bias, held_out = self.solve(train)
        text = None if self.prompt is None else of_text(self.prompt, train)
        if held_out is None:
            scale, text_weight = UNJUDGED, 0.0 if text is None else float(beats_chance(text, label))
        else:
            judged = judgeable(label)
            truth = label[judged]
            scale, text_weight = best_scale(held_out, truth), 0.0
            if text is not None:
                known = text[judged]
                blends = ((omega, scale * held_out + omega * known) for omega in TEXT_WEIGHTS)
                text_weight, blend = best_of(blends, truth)
                scale, text_weight = (x * best_scale(blend, truth) for x in (scale, text_weight))
        self.weight.copy_(weight)
        self.bias.copy_(bias)
        self.scale.fill_(scale)
        self.text_weight.fill_(text_weight)


def require_finite(classifier: Classifier, train: Shots) -> None:
    """Raises UserError where some feature is not finite."""
    if not train.features.isfinite().all():
        who = type(classifier).__name__
        raise UserError(f"{who}: features of the training images are not finite: try another --trainer.precision.")


def of_text(prompt: TextPrompt, train: Shots) -> Tensor:
    """``τ cos(f, t)`` of the shots, (N, C), the mean over the views, in float64 on the CPU."""
    text = prompt.text_features(train.features[0])  # once for all views
    return torch.stack([prompt.logits(features, text).cpu().double() for features in train.features]).mean(0)


def beats_chance(logits: Tensor, label: Tensor) -> bool:
    """Whether logits, (N, C), are right more often than a guess is, by more than two standard deviations."""
    chance, n = 1 / logits.shape[1], len(label)
    return accuracy(logits, label) > chance + 2 * math.sqrt(chance * (1 - chance) / n)
