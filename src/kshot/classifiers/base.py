"""The contract of a classifier: from image features to logits, and what to learn from."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kshot.backbones.base import Backbone
from kshot.errors import UserError


@dataclass(frozen=True)
class Task:
    """What to tell apart.

    Attributes:
        class_names: in label order, as they appear in a sentence.
        templates: sentences with ``{}`` where the class name goes; several form an ensemble.
    """

    class_names: tuple[str, ...]
    templates: tuple[str, ...] = ("a photo of a {}.",)


class Shots(NamedTuple):
    """Features of the training or validation images of a run.

    Attributes:
        features: (V, N, D) float32 of V views of N images, not normalised to unit length.
        label: (N,) class indices.
    """

    features: Tensor
    label: Tensor

    @property
    def every_view(self) -> tuple[Tensor, Tensor]:
        """Features, (V·N, D), and labels, (V·N,), of all views as images of their own."""
        return self.features.flatten(0, 1), self.label.repeat(len(self.features))


class Averaging(Protocol):
    """A mean of what is trained over the epochs of a run, which takes its place when the run ends."""

    def add(self, epoch: int, tensors: Mapping[str, Tensor]) -> None:
        """Counts in the tensors at the end of an epoch, counted from 1."""
        ...

    def mean(self) -> dict[str, Tensor]:
        """The mean so far, empty before the first epoch."""
        ...

    def state(self) -> dict[str, Any]:
        """What a resumed run goes on from: tensors and plain data."""
        ...

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Takes on a state."""
        ...


class Classifier(nn.Module, ABC):
    """Tells classes apart by image features. Owns the backbone, so that both travel and train as one module.

    Attributes:
        closed_form: True when :meth:`fit_features` finds the answer and no gradient step is needed.
        from_features: True when :meth:`fit_features` is to be called before training, for the answer or a start.
        selects: True when something is chosen by the validation shots, in :meth:`fit_features` or :meth:`select`.
        class_bound: why it can serve no classes but those that it was trained on; None when it can, for which
            :meth:`prepare_classes` does what there is to do.
        prompts_images: True when tensors of its own enter the image tower, in :meth:`encode_image`.
        learns_from_frozen: True when :meth:`losses` wants image features of the untouched backbone, and
            :meth:`observe_frozen` something of its text tower.
        compares_text: True for a :class:`TextClassifier`, or what wraps one.
        averaging: of the trained tensors over epochs, or None.
    """

    closed_form: bool = False
    from_features: bool = False
    selects: bool = False
    class_bound: str | None = "it was built for its training classes"
    prompts_images: bool = False
    learns_from_frozen: bool = False
    compares_text: bool = False
    averaging: Averaging | None = None

    def __init__(self, backbone: Backbone, task: Task) -> None:
        super().__init__()
        self.backbone = backbone
        self.task = task

    @property
    def title(self) -> str:
        """What tables call it."""
        return type(self).__name__

    def lent(self) -> Self:
        """This classifier as part of another, which owns the backbone."""
        backbone = self.backbone
        del self.backbone
        self.__dict__["backbone"] = backbone  # reached as before, but registered only once
        return self

    # ------------------------------------------------------------------------------------------------ computing

    def encode_image(self, image: Tensor) -> Tensor:
        """Image features, (B, feature_dim), of images, (B, 3, H, W)."""
        return self.backbone.encode_image(image)

    @abstractmethod
    def forward(self, features: Tensor) -> Tensor:
        """Logits, (B, classes) in float32, from image features, (B, feature_dim)."""

    def losses(self, features: Tensor, label: Tensor, frozen: Tensor | None = None) -> dict[str, Tensor]:  # noqa: ARG002  for subclasses
        """The terms of the training loss, by name; their sum is minimised.

        Args:
            features: (B, feature_dim).
            label: (B,) class indices.
            frozen: (B, feature_dim) of the same images by the untouched backbone, where ``learns_from_frozen``.
        """
        return {"cross_entropy": F.cross_entropy(self(features), label)}

    # ------------------------------------------------------------------------------------------------ classes

    def set_class_names(self, class_names: Sequence[str], templates: Sequence[str] | None = None) -> None:
        """Serves other classes from now on: the one entry to base-to-new, cross-data-set and domain evaluation.

        Args:
            class_names: in label order.
            templates: of their data set; None keeps the present ones.

        Raises:
            UserError: what was learnt is bound to the training classes, or a prompt does not fit.
        """
        names = tuple(class_names)
        if self.class_bound and names != self.task.class_names:
            raise UserError(
                f"{type(self).__name__} cannot serve classes that it was not trained on ({', '.join(names[:3])}, ...): "
                f"{self.class_bound}."
            )
        before, self.task = self.task, Task(names, tuple(templates or self.task.templates))
        try:
            self.prepare_classes()
        except UserError:
            self.task = before
            raise

    def prepare_classes(self) -> None:
        """Builds what depends on the class names of :attr:`task`."""

    # ------------------------------------------------------------------------------------------------ a run

    def reserve(self, images: int) -> None:
        """Makes room for what has a size of its own for each training image."""

    def fit_features(self, train: Shots, val: Shots | None) -> None:
        """Finds an answer, or a start, from the features of all shots; ``val`` only for choosing.

        Args:
            train: all recorded views; one, of the evaluation transform or the first, where views are endless.
            val: None without validation images.
        """
        raise NotImplementedError(f"{type(self).__name__} is trained by gradient steps.")

    def select(self, val: Shots) -> None:
        """Chooses, after gradient training, what is left to choose."""

    def observe_frozen(self) -> None:
        """Keeps what the losses need of the untouched text tower; called before training, without gradients."""

    def head_parameters(self) -> list[nn.Parameter]:
        """What ``model.head_lr`` concerns: the classifier's own tensors."""
        inside = {id(p) for p in self.backbone.parameters()}
        return [p for p in self.parameters() if id(p) not in inside]

    def rate_factors(self) -> dict[nn.Parameter, float]:
        """Parameters whose learning rate is a multiple of the optimizer's."""
        return {}

    def fit_shapes(self, saved: Mapping[str, Tensor]) -> None:
        """Takes on the shapes of saved tensors, by name within this classifier, where they depend on the run."""


class ClassifierFactory(Protocol):
    """What a YAML gives: a classifier but for its run-time arguments."""

    def __call__(self, backbone: Backbone, task: Task) -> Classifier:
        """Builds the classifier for one backbone and task."""
        ...


class TextClassifier(Classifier):
    """Compares image features with one text feature a class: ``z = τ cos(f, t_c)``.

    Subclasses give the text; they may change what is done with it in :meth:`terms`.
    """

    compares_text = True
    class_bound: str | None = None

    @abstractmethod
    def text_features(self, features: Tensor) -> Tensor:
        """Class features, (C, D), or (B, C, D) where they depend on the image; not normalised to unit length."""

    def logits(self, features: Tensor, text: Tensor) -> Tensor:
        """(B, C) from image features, (B, D), and text features as :meth:`text_features` gives them."""
        scale: Tensor = self.backbone.logit_scale  # type: ignore[assignment]  # constructors require a text tower
        return cosine_logits(features, text, scale)

    def forward(self, features: Tensor) -> Tensor:
        return self.logits(features, self.text_features(features))

    def terms(self, features: Tensor, text: Tensor, label: Tensor, frozen: Tensor | None) -> dict[str, Tensor]:  # noqa: ARG002  for subclasses
        """The terms of the loss, as :meth:`losses`, from text features that are computed already."""
        return {"cross_entropy": F.cross_entropy(self.logits(features, text), label)}

    def losses(self, features: Tensor, label: Tensor, frozen: Tensor | None = None) -> dict[str, Tensor]:
        return self.terms(features, self.text_features(features), label, frozen)


def cosine_logits(features: Tensor, prototypes: Tensor, scale: Tensor | float) -> Tensor:
    """Scaled cosine similarities in float32.

    Args:
        features: (B, D).
        prototypes: (C, D), or (B, C, D) where they differ by image.
        scale: inverse temperature.

    Returns:
        (B, C).
    """
    features, prototypes = F.normalize(features.float(), dim=-1), F.normalize(prototypes.float(), dim=-1)
    with torch.autocast(features.device.type, enabled=False):
        if prototypes.ndim == 3:
            return scale * (prototypes @ features.unsqueeze(-1)).squeeze(-1)
        return scale * features @ prototypes.T
