"""The mean of the probabilities of several answers that take no gradient step."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from kshot.backbones.base import Backbone
from kshot.classifiers.base import Classifier, ClassifierFactory, Shots, Task, exact, own_parameters, title_of
from kshot.classifiers.gda import GDA
from kshot.classifiers.ridge import Ridge
from kshot.errors import UserError


class Average(Classifier):
    """``z = log (1/M Σ_m softmax z_m)``: a linear opinion pool of M members with equal weights (Stone 1961).

    Args:
        members: closed forms, or classifiers that learn nothing from the shots; two at least. By default ridge
            regression and GDA.

    Raises:
        UserError: fewer than two members, or one that takes gradient steps.
    """

    def __init__(self, backbone: Backbone, task: Task, members: list[ClassifierFactory] | None = None) -> None:
        super().__init__(backbone, task)
        members = [Ridge, GDA] if members is None else members
        if len(members) < 2:
            raise UserError(f"Average: members are {len(members)}, and must be two at least.")
        for number, member in enumerate(members):
            self.add_module(f"member_{number}", member(backbone=backbone, task=task))
        trains = next((each for each in self.members if own_parameters(each)), None)
        if trains is not None:
            raise UserError(f"Average: {title_of(trains)} takes gradient steps, and a member may take none.")
        self.needs = frozenset({"shots"}).union(*(each.needs for each in self.members))
        self.bound = next((each.bound for each in self.members if each.bound), "")

    @property
    def members(self) -> list[Classifier]:
        """The classifiers inside, in order."""
        return [part for part in self.children() if isinstance(part, Classifier)]

    def forward(self, features: Tensor) -> Tensor:
        each = torch.stack(exact(*(member(features).log_softmax(-1) for member in self.members)))
        return each.logsumexp(0) - math.log(len(each))

    def set_class_names(self, class_names: Sequence[str], templates: Sequence[str] | None = None) -> None:
        super().set_class_names(class_names, templates)
        for member in self.members:
            member.set_class_names(class_names, templates)

    def fit(self, train: Shots, val: Shots | None) -> None:
        for member in self.members:
            if "shots" in member.needs:
                member.fit(train, val)
