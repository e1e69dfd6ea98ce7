"""ProLIP: the last projection of CLIP's image tower, trained near its start (Fahes et al. 2024, arXiv:2410.05270)."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from kshot.backbones.base import Backbone
from kshot.backbones.language import projected
from kshot.classifiers.base import Shots, Task, exact
from kshot.classifiers.zero_shot import TextPrompt
from kshot.errors import UserError, require


class ProLIP(TextPrompt):
    """``z = τ cos(x W, t_c)`` with W from the image tower's own W₀ on, and ``λ ‖W - W₀‖²_F`` in the loss.

    x is what the tower puts its projection on. W is the classifier's own, so that the tower stays frozen, features are
    kept, and a step is one product.

    Args:
        strength: λ; None takes 1 / k of k shots a class, the mean over classes that have any where k differs.
        templates: as :class:`TextPrompt`.

    Attributes:
        weight: W, (width, D).
        penalty: λ, a scalar; 0 before :meth:`fit` where that is to find it.
    """

    penalty: Tensor
    needs = frozenset({"shots", "unprojected"})

    def __init__(
        self,
        backbone: Backbone,
        task: Task,
        strength: float | None = None,
        templates: Sequence[str] | str | None = None,
    ) -> None:
        super().__init__(backbone, task, templates)
        require("ProLIP", "strength", strength, strength is None or 0 <= strength < math.inf, "be at least 0")
        if self.backbone.projection is None:
            raise UserError(
                "ProLIP trains the matrix with which CLIP's vision transformers project their image features, and "
                f"the image tower of {backbone.name} ends with none: use CLAP, TaskRes or an adapter."
            )
        self.strength = strength
        self.weight = nn.Parameter(self.backbone.projection.clone())
        self.register_buffer("penalty", torch.tensor(float(strength or 0)))

    @torch.no_grad()
    def fit(self, train: Shots, val: Shots | None) -> None:  # noqa: ARG002  nothing to choose
        if self.strength is None:
            self.penalty.fill_(len(train.label.unique()) / len(train.label))

    def logits(self, features: Tensor, text: Tensor) -> Tensor:
        return super().logits(projected(features, self.weight), text)

    def terms(self, features: Tensor, text: Tensor, label: Tensor, teacher: Tensor | None) -> dict[str, Tensor]:
        assert self.backbone.projection is not None
        weight, start = exact(self.weight, self.backbone.projection)
        constraint = self.penalty.to(weight) * (weight - start).square().sum()
        return {**super().terms(features, text, label, teacher), "constraint": constraint}
