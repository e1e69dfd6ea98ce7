"""The contract of a classifier: from image features to logits, and what to learn from."""

import inspect
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, reduce, wraps
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kshot.backbones.base import Backbone
from kshot.backbones.language import VisionLanguageBackbone
from kshot.classifiers.leaving_out import Spectrum, spectrum
from kshot.errors import UserError
from kshot.holding import Holder
from kshot.templates import DEFAULT_TEMPLATE


@dataclass(frozen=True)
class Task:
    """What to tell apart.

    Attributes:
        class_names: in label order, as they appear in a sentence.
        templates: sentences with ``{}`` where the class name goes; several form an ensemble.
    """

    class_names: tuple[str, ...]
    templates: tuple[str, ...] = (DEFAULT_TEMPLATE,)


@dataclass(frozen=True, eq=False)
class Shots:
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

    @cached_property
    def spectrum(self) -> Spectrum:
        """The features in the directions of their scatter: found once for all closed forms that learn from these."""
        return spectrum(self.features)


class Classifier(nn.Module, ABC):
    """Tells classes apart by image features. Built on an untouched backbone, which it holds as a part of its own.

    Attributes:
        backbone: shared with the classifiers inside, if there are any.
        task: the classes that it serves now.
        init_args: the settings that it was built with, by the names that a config has for them, as plain data.
        bound: why it cannot serve other classes; empty where it can.
        needs: what a run must give: ``shots`` (:meth:`fit` is to be called before training), ``val`` (something is
            chosen by validation shots, in :meth:`fit` or :meth:`select`), ``teacher`` (:meth:`losses` wants image
            features of the untouched backbone), ``unprojected`` (features are to be those from before the image
            tower's last projection).

    Raises:
        UserError: the backbone lacks what a method needs, a setting is out of its range, a class name has no tokens, or
            a prompt does not fit. So do all classifiers.
    """

    init_args: dict[str, Any]
    needs: frozenset[str] = frozenset()
    bound: str = "it was built for its training classes"

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if "__init__" in vars(cls):
            cls.__init__ = recorded(vars(cls)["__init__"])  # type: ignore[method-assign]

    def __init__(self, backbone: Backbone, task: Task) -> None:
        super().__init__()
        self.backbone = backbone
        self.task = task
        self.init_args = {}

    @abstractmethod
    def forward(self, features: Tensor) -> Tensor:
        """Logits, (B, classes) in float32 or double precision, from image features, (B, feature_dim)."""

    def losses(self, features: Tensor, label: Tensor, teacher: Tensor | None = None) -> dict[str, Tensor]:  # noqa: ARG002  for subclasses
        """The terms of the training loss, by name; their sum is minimised.

        Args:
            features: (B, feature_dim).
            label: (B,) class indices.
            teacher: (B, feature_dim) of the same images by the untouched backbone, where it is needed.
        """
        return {"cross_entropy": F.cross_entropy(self(features), label)}

    def image_tokens(self) -> Sequence[Tensor]:
        """Learned tokens for the first blocks of the image tower, (n, image_width) each; none by default."""
        return ()

    def set_class_names(self, class_names: Sequence[str], templates: Sequence[str] | None = None) -> None:
        """Serves other classes from now on: the one entry to base-to-new, cross-data-set and domain evaluation.

        Args:
            class_names: in label order.
            templates: of their data set; None keeps the present ones.

        Raises:
            UserError: what was learnt is bound to the training classes, or a prompt does not fit.
        """
        task = Task(tuple(class_names), tuple(templates or self.task.templates))
        if self.bound and task.class_names != self.task.class_names:
            raise UserError(
                f"{type(self).__name__} cannot serve classes that it was not trained on "
                f"({', '.join(task.class_names[:3])}, ...): {self.bound}."
            )
        self.task = task

    def param_groups(self) -> list[dict[str, Any]]:
        """What trains of the classifier's own, in groups for an optimizer, and how.

        Each has ``params``, and may have ``head`` (True: ``model.head_lr`` concerns it), ``lr_factor`` (its learning
        rate over the optimizer's) and ``average`` (the :class:`GaussianAverage` over epochs that the run ends with, of
        everything that trains).
        """
        return [{"params": own_parameters(self), "head": True}]

    def fit(self, train: Shots, val: Shots | None) -> None:
        """Finds an answer, or a start, from the features of all shots; ``val`` only for choosing.

        Args:
            train: all recorded views; one, of the evaluation transform or the first, where views are endless.
            val: None without validation images.
        """
        raise NotImplementedError(f"{type(self).__name__} is trained by gradient steps.")

    def select(self, val: Shots) -> None:
        """Chooses, after gradient training, what is left to choose."""


class ClassifierFactory(Protocol):
    """What a YAML gives: a classifier but for its run-time arguments."""

    def __call__(self, backbone: Backbone, task: Task) -> Classifier: ...


def recorded(init: Callable[..., None]) -> Callable[..., None]:
    """A constructor that also notes its settings, and runs outside inference mode, since what it builds may train.

    Left out are None, which stands for what other settings decide, and whatever can be called: the backbone, and what
    builds classifiers inside, which have notes of their own. A constructor that calls another's adds to those of that.
    """
    parameters = inspect.signature(init).parameters
    defaults = {name: p.default for name, p in parameters.items() if p.default is not p.empty}

    @wraps(init)
    def build(self: Classifier, *arguments: Any, **settings: Any) -> None:
        with torch.inference_mode(False):
            init(self, *arguments, **settings)
        given = {**defaults, **dict(zip(parameters, (self, *arguments), strict=False)), **settings}
        builds = {n for n, v in given.items() if callable(v) or (isinstance(v, list) and any(map(callable, v)))}
        plain = {name: v for name, v in given.items() if v is not None and name not in builds | {"task"}}
        self.init_args |= json.loads(json.dumps(plain, default=str))

    return build


def settings_of(classifier: Classifier) -> dict[str, Any]:
    """What a classifier was built as, in plain data: its class, its settings, and the same of classifiers inside it."""
    inside = {name: settings_of(part) for name, part in classifier.named_children() if isinstance(part, Classifier)}
    return {"class": type(classifier).__name__, **classifier.init_args, **inside}


class Around(Classifier):
    """Puts something of its own around another classifier, :attr:`inner`, and leaves the rest to that."""

    def __init__(self, backbone: Backbone, task: Task, inner: ClassifierFactory) -> None:
        super().__init__(backbone, task)
        self.inner: Classifier = inner(backbone=backbone, task=task)
        self.needs = self.inner.needs

    def losses(self, features: Tensor, label: Tensor, teacher: Tensor | None = None) -> dict[str, Tensor]:
        return self.inner.losses(features, label, teacher)

    def image_tokens(self) -> Sequence[Tensor]:
        return self.inner.image_tokens()

    def set_class_names(self, class_names: Sequence[str], templates: Sequence[str] | None = None) -> None:
        self.inner.set_class_names(class_names, templates)
        self.task = self.inner.task

    def fit(self, train: Shots, val: Shots | None) -> None:
        self.inner.fit(train, val)

    def select(self, val: Shots) -> None:
        self.inner.select(val)


class TextClassifier(Classifier, Holder):
    """Compares image features with one text feature a class: ``z = τ cos(f, t_c)``.

    Subclasses give the text by :meth:`encode`; they may change what is done with it in :meth:`text_features`,
    :meth:`logits` and :meth:`terms`.

    Attributes:
        backbone: constructors see to it that it has a text tower.
        held: what :meth:`encode` gave, while it is held: in evaluation, and in a run that trains nothing of it.
    """

    backbone: VisionLanguageBackbone
    bound = ""

    @abstractmethod
    def encode(self) -> Tensor:
        """Class features, (C, D), not normalised to unit length, from the present class names and tensors.

        What trains beside the text tower and its prompts enters in :meth:`text_features` or :meth:`logits`, so that
        these features can be held.
        """

    @abstractmethod
    def prepare_classes(self) -> None:
        """Builds what depends on the class names of :attr:`task`."""

    def hold(self) -> Tensor | None:
        return self.encode()

    def text_features(self, features: Tensor) -> Tensor:  # noqa: ARG002  for subclasses whose text depends on the image
        """Class features, (C, D), or (B, C, D) where they depend on the image, which has features (B, D)."""
        if self.held is not None and not self.backbone.is_unadapted:
            return self.held
        return self.encode()

    def logits(self, features: Tensor, text: Tensor) -> Tensor:
        """(B, C) from image features, (B, D), and text features as :meth:`text_features` gives them."""
        return cosine_logits(features, text, self.backbone.logit_scale)

    def forward(self, features: Tensor) -> Tensor:
        return self.logits(features, self.text_features(features))

    def terms(self, features: Tensor, text: Tensor, label: Tensor, teacher: Tensor | None) -> dict[str, Tensor]:  # noqa: ARG002  for subclasses
        """The terms of the loss, as :meth:`losses`, from text features that are computed already."""
        return {"cross_entropy": F.cross_entropy(self.logits(features, text), label)}

    def losses(self, features: Tensor, label: Tensor, teacher: Tensor | None = None) -> dict[str, Tensor]:
        return self.terms(features, self.text_features(features), label, teacher)

    @torch.inference_mode(False)  # what depends on class names may stand in the graph of a later step
    @torch.no_grad()
    def set_class_names(self, class_names: Sequence[str], templates: Sequence[str] | None = None) -> None:
        before = self.task
        super().set_class_names(class_names, templates)
        try:
            self.prepare_classes()
        except UserError:
            self.task = before
            raise
        if self.held is not None:
            self.held = self.hold()


@dataclass(frozen=True)
class GaussianAverage:
    """``Σ_e w_e θ_e / Σ_e w_e`` with ``w_e = exp(-(e - mean)² / 2 std²)`` over the epochs e that were run, from 1.

    PromptSRC's aggregation (arXiv:2307.06948, equation 9).
    """

    mean: float
    std: float


def own_parameters(classifier: Classifier) -> list[nn.Parameter]:
    """The trainable tensors of a classifier and of classifiers inside it, without the backbone's."""
    around = classifier.named_modules(memo={classifier.backbone})  # all modules but the backbone and what is in it
    own = {id(p): p for _, module in around for p in module.parameters(recurse=False) if p.requires_grad}
    shared = {id(p) for p in classifier.backbone.parameters()} if own else ()
    return [p for name, p in own.items() if name not in shared]


def closed_form(classifier: Classifier) -> bool:
    """Whether :meth:`Classifier.fit` finds the whole answer, so that no gradient step is to be taken."""
    return "shots" in classifier.needs and not own_parameters(classifier)


def title_of(classifier: Classifier) -> str:
    """What tables call a classifier: ``CoOp``, ``DePT (CoOp)``, ``Average (Ridge, GDA)``."""
    parts = [classifier.inner] if isinstance(classifier, Around) else getattr(classifier, "members", [])
    return type(classifier).__name__ + (f" ({', '.join(map(title_of, parts))})" if parts else "")


def require_steps(classifier: Classifier, method: str) -> None:
    """Raises UserError where nothing would train what is attached beside a classifier, ``method`` together."""
    if closed_form(classifier):
        own, _, adapter = method.rpartition(" + ")
        raise UserError(
            f"{own} has a closed form and takes no gradient step: {method} would leave {adapter} untrained: use "
            "LinearProbe, TextPrompt or NearestClassMean with trainable: true, or adapter: null."
        )


def total(terms: Mapping[str, Tensor]) -> Tensor:
    """The sum of the terms of a loss: a scalar."""
    return torch.stack(list(terms.values())).sum()


def cosine_logits(features: Tensor, prototypes: Tensor, scale: Tensor | float) -> Tensor:
    """Scaled cosine similarities, (B, C), in float32 or double precision.

    Args:
        features: (B, D).
        prototypes: (C, D), or (B, C, D) where they differ by image.
        scale: inverse temperature.
    """
    features, prototypes = (F.normalize(x, dim=-1) for x in exact(features, prototypes))
    with torch.autocast(features.device.type, enabled=False):
        if prototypes.ndim == 3:
            return scale * (prototypes @ features.unsqueeze(-1)).squeeze(-1)
        return scale * features @ prototypes.T


def exact(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Tensors in the dtype that classifiers compute in: the widest of theirs, and at least float32."""
    dtype = reduce(torch.promote_types, (t.dtype for t in tensors), torch.float32)
    return tuple(t.to(dtype) for t in tensors)


def exact_linear(layer: nn.Module, x: Tensor) -> Tensor:
    """``x Wᵀ + b`` of a linear layer, in the dtype of :func:`exact` whatever autocast says."""
    with torch.autocast(x.device.type, enabled=False):
        return F.linear(*exact(x, layer.get_parameter("weight"), layer.get_parameter("bias")))
