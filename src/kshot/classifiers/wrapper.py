"""What the methods have in common that add something to any other classifier."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from kshot.backbones.base import Backbone
from kshot.classifiers.base import Averaging, Classifier, ClassifierFactory, Shots, Task, TextClassifier


class Wrapper(TextClassifier):
    """Does what the classifier inside it does; subclasses change a part of that.

    Args:
        backbone: any that the inner classifier takes.
        task: likewise.
        factory: of the inner classifier.
    """

    def __init__(self, backbone: Backbone, task: Task, factory: ClassifierFactory) -> None:
        super().__init__(backbone, task)
        self.inner: Classifier = factory(backbone=backbone, task=task).lent()

    @property
    def title(self) -> str:
        return f"{type(self).__name__} ({self.inner.title})"

    @property
    def from_features(self) -> bool:  # type: ignore[override]  # an attribute that depends on the inner classifier
        return self.inner.from_features

    @property
    def selects(self) -> bool:  # type: ignore[override]
        return self.inner.selects

    @property
    def class_bound(self) -> str | None:  # type: ignore[override]
        return self.inner.class_bound

    @property
    def prompts_images(self) -> bool:  # type: ignore[override]
        return self.inner.prompts_images

    @property
    def learns_from_frozen(self) -> bool:  # type: ignore[override]
        return self.inner.learns_from_frozen

    @property
    def compares_text(self) -> bool:  # type: ignore[override]
        return self.inner.compares_text

    @property
    def averaging(self) -> Averaging | None:  # type: ignore[override]
        return self.inner.averaging

    def encode_image(self, image: Tensor) -> Tensor:
        return self.inner.encode_image(image)

    def forward(self, features: Tensor) -> Tensor:
        logits: Tensor = self.inner(features)
        return logits

    def text_features(self, features: Tensor) -> Tensor:
        return self.text_inner.text_features(features)

    def logits(self, features: Tensor, text: Tensor) -> Tensor:
        return self.text_inner.logits(features, text)

    def terms(self, features: Tensor, text: Tensor, label: Tensor, frozen: Tensor | None) -> dict[str, Tensor]:
        return self.text_inner.terms(features, text, label, frozen)

    def losses(self, features: Tensor, label: Tensor, frozen: Tensor | None = None) -> dict[str, Tensor]:
        if self.compares_text:
            return super().losses(features, label, frozen)
        return self.inner.losses(features, label, frozen)

    @property
    def text_inner(self) -> TextClassifier:
        """The inner classifier, where it compares with text."""
        assert isinstance(self.inner, TextClassifier)
        return self.inner

    def prepare_classes(self) -> None:
        self.inner.set_class_names(self.task.class_names, self.task.templates)

    def reserve(self, images: int) -> None:
        self.inner.reserve(images)

    def fit_features(self, train: Shots, val: Shots | None) -> None:
        self.inner.fit_features(train, val)

    def select(self, val: Shots) -> None:
        self.inner.select(val)

    def observe_frozen(self) -> None:
        self.inner.observe_frozen()

    def head_parameters(self) -> list[nn.Parameter]:
        return self.inner.head_parameters()

    def rate_factors(self) -> dict[nn.Parameter, float]:
        return self.inner.rate_factors()

    def fit_shapes(self, saved: Mapping[str, Tensor]) -> None:
        self.inner.fit_shapes({k.removeprefix("inner."): v for k, v in saved.items() if k.startswith("inner.")})
