"""The contract of a classifier: from image features to logits, and what to learn from."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kshot.backbones.base import Backbone


@dataclass(frozen=True)
class Task:
    """What to tell apart.

    Attributes:
        class_names: in label order, as they appear in a sentence.
        templates: sentences with ``{}`` where the class name goes; several form an ensemble.
    """

    class_names: tuple[str, ...]
    templates: tuple[str, ...] = ("a photo of a {}.",)


class Classifier(nn.Module, ABC):
    """Tells classes apart by image features. Owns the backbone, so that both travel and train as one module.

    Attributes:
        closed_form: True when :meth:`fit_features` finds the answer and no gradient step is needed.
        from_features: True when :meth:`fit_features` is to be called before training, for the answer or a start.
    """

    closed_form: bool = False
    from_features: bool = False

    def __init__(self, backbone: Backbone, task: Task) -> None:
        super().__init__()
        self.backbone = backbone
        self.task = task

    @abstractmethod
    def forward(self, features: Tensor) -> Tensor:
        """Logits, (B, classes) in float32, from image features, (B, feature_dim)."""

    def losses(self, features: Tensor, label: Tensor) -> dict[str, Tensor]:
        """The terms of the training loss, by name; their sum is minimised.

        Args:
            features: (B, feature_dim).
            label: (B,) class indices.
        """
        return {"cross_entropy": F.cross_entropy(self(features), label)}

    def fit_features(self, features: Tensor, label: Tensor) -> None:
        """Finds an answer, or a start, in closed form from all features, (N, feature_dim), and labels, (N,)."""
        raise NotImplementedError(f"{type(self).__name__} is trained by gradient steps.")


class ClassifierFactory(Protocol):
    """What a YAML gives: a classifier but for its run-time arguments."""

    def __call__(self, backbone: Backbone, task: Task) -> Classifier:
        """Builds the classifier for one backbone and task."""
        ...


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
