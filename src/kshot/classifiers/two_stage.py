"""2SFS: first the towers learn the task, then a classifier its classes (Farina et al. 2025, arXiv:2503.11609)."""

import logging
from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kshot.backbones.base import Backbone
from kshot.classifiers.base import Around, Classifier, Task, exact
from kshot.classifiers.zero_shot import TextPrompt
from kshot.errors import require
from kshot.holding import restored

logger = logging.getLogger("kshot")


class Staged(ABC):
    """What a classifier is besides that trains in stages."""

    @abstractmethod
    def plan(self, steps: int) -> Sequence[int]:
        """Divides the optimizer steps of a run, before it starts, into stages; the schedule begins anew in each."""

    @abstractmethod
    def after_step(self, step: int) -> None:
        """Follows an optimizer step; ``step`` counts from 1."""


def staged(classifier: Classifier) -> Staged | None:
    """The classifier, or that inside it, which trains in stages; None where all steps are alike."""
    while isinstance(classifier, Around):
        classifier = classifier.inner
    return classifier if isinstance(classifier, Staged) else None


def stages_of(classifier: Classifier, steps: int) -> Sequence[int]:
    """The stages of a run of so many optimizer steps."""
    found = staged(classifier)
    return (steps,) if found is None else found.plan(steps)


def follow_step(classifier: Classifier, step: int) -> None:
    """Lets what trains in stages follow an optimizer step; ``step`` counts from 1."""
    found = staged(classifier)
    if found is not None:
        found.after_step(step)


class TwoStage(TextPrompt, Staged):
    """``z = τ cos(f, t_c)`` while the adapter trains, then ``z = τ cos(f, w_c)`` with **w** alone, from the text on.

    w starts at the unit-length text features that the first stage ends with, and features pass no gradient on from
    there. Each stage has a schedule of its own. Afterwards classes that were trained on have their w_c, others the
    features of the adapted text tower, also where both are told apart together. Where nothing trains in either tower,
    all steps are the second stage's.

    Args:
        first: share of the steps that the first stage takes, rounded down.
        templates: as :class:`TextPrompt`.

    Attributes:
        head: w, (C, D); (0, D) in the first stage.
        trained_on: names of the training classes.
        rows: of w for the present classes, (C',), -1 for one that has none; :attr:`known` says whether all have.
    """

    rows: Tensor

    def __init__(
        self, backbone: Backbone, task: Task, first: float = 0.6, templates: Sequence[str] | str | None = None
    ) -> None:
        super().__init__(backbone, task, templates)
        require("TwoStage", "first", first, 0 < first < 1, "lie between 0 and 1")
        self.first, self.switch, self.known = first, 0, True
        self.head = nn.Parameter(torch.zeros(0, backbone.feature_dim))
        self.trained_on = task.class_names
        self.register_buffer("rows", torch.arange(len(task.class_names)), persistent=False)

    def plan(self, steps: int) -> Sequence[int]:
        if self.backbone.trainable("image") or self.backbone.trainable("text"):
            self.switch = max(1, int(steps * self.first))
            return self.switch, steps - self.switch
        if not len(self.head):
            logger.info("Nothing in the towers trains: all %s steps are those of TwoStage's second stage.", steps)
            self.start_head()
        return (steps,)

    def after_step(self, step: int) -> None:
        if step == self.switch and not len(self.head):
            self.start_head()

    @torch.inference_mode(False)
    @torch.no_grad()
    def start_head(self) -> None:
        """Begins the second stage."""
        layers = list(self.backbone.layers().values())
        with restored(layers, "dropout"):
            for layer in layers:
                layer.dropout = 0.0
            self.head.data = F.normalize(self.encode(), dim=-1).to(self.head)

    def text_features(self, features: Tensor) -> Tensor:
        if not len(self.head):
            return super().text_features(features)
        if self.known:
            return self.head[self.rows]
        text, own = exact(super().text_features(features), self.head[self.rows.clamp(min=0)])
        return torch.where(self.rows[:, None] < 0, text, own)

    def terms(self, features: Tensor, text: Tensor, label: Tensor, teacher: Tensor | None) -> dict[str, Tensor]:
        return super().terms(features.detach() if len(self.head) else features, text, label, teacher)

    @torch.inference_mode(False)
    def set_class_names(self, class_names: Sequence[str], templates: Sequence[str] | None = None) -> None:
        super().set_class_names(class_names, templates)
        names, known = self.task.class_names, self.trained_on
        rows = [known.index(name) if name in known else -1 for name in names]
        if names == known:  # names may be there twice
            rows = list(range(len(known)))
        self.known = -1 not in rows
        self.rows = torch.tensor(rows, device=self.head.device)
