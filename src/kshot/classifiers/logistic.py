"""The linear probe by L-BFGS (Radford et al. 2021, arXiv:2103.00020, appendix A.3; searched as in arXiv:2109.01134)."""

import math
import warnings
from collections.abc import Callable
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from kshot.backbones.base import Backbone
from kshot.classifiers.base import Classifier, Shots, Task, exact
from kshot.errors import UserError, require

NEVER = -1e9  # the logit of a class without training images: its probability is 0, and every number stays finite


class LogisticProbe(Classifier):
    """Multinomial logistic regression with an L2 penalty of ``1 / (2 C)``, by scikit-learn, on all recorded views.

    Args:
        C: inverse strength of the penalty; None searches it on the validation shots (:func:`search`).
        normalize: scale features to unit length; CoOp's baseline does not.
    """

    weight: Tensor
    bias: Tensor
    C: Tensor
    bound = "it has one row of weights for each training class"

    def __init__(self, backbone: Backbone, task: Task, C: float | None = None, normalize: bool = False) -> None:  # noqa: N803  its name in every paper
        super().__init__(backbone, task)
        require("LogisticProbe", "C", C, C is None or 0 < C < math.inf, "be above 0, or null to search it")
        self.needs = frozenset({"shots", "val"} if C is None else {"shots"})
        self.strength, self.normalize = C, normalize
        self.register_buffer("weight", torch.zeros(len(task.class_names), backbone.feature_dim))
        self.register_buffer("bias", torch.zeros(len(task.class_names)))
        self.register_buffer("C", torch.tensor(1.0 if C is None else float(C)))

    def scaled(self, features: Tensor) -> Tensor:
        """Features as the probe takes them."""
        return F.normalize(features, dim=-1) if self.normalize else features

    def forward(self, features: Tensor) -> Tensor:
        features, weight, bias = exact(features, self.weight, self.bias)
        with torch.autocast(features.device.type, enabled=False):
            return F.linear(self.scaled(features), weight, bias)

    @torch.no_grad()
    def fit(self, train: Shots, val: Shots | None) -> None:
        features, label = (x.cpu() for x in train.every_view)
        features, strength = self.scaled(features.double()), 1.0 if self.strength is None else self.strength
        if self.strength is None and val is not None:
            queries, truth = (x.cpu() for x in val.every_view)
            queries = self.scaled(queries.double())

            def right(log_c: float) -> int:
                weight, bias = self.solve(features, label, 10**log_c)
                return int((F.linear(queries, weight, bias).argmax(-1) == truth).sum())

            strength = 10 ** search(right)
        self.C.fill_(strength)
        weight, bias = self.solve(features, label, strength)
        self.weight.copy_(weight)
        self.bias.copy_(bias)

    def solve(self, features: Tensor, label: Tensor, C: float) -> tuple[Tensor, Tensor]:  # noqa: N803
        """Weights, (C, D), and intercepts, (C,), from features, (N, D), all in float64 and on the CPU."""
        from sklearn.exceptions import ConvergenceWarning
        from sklearn.linear_model import LogisticRegression

        if len(label.unique()) < 2:
            raise UserError("LogisticProbe: all training images are of one class, and it needs at least two.")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # 1,000 iterations are the recipe, large C needs more
            model = LogisticRegression(C=C, max_iter=1000).fit(features.numpy(), label.numpy())
        rows, intercepts = torch.from_numpy(model.coef_), torch.from_numpy(model.intercept_)
        if len(rows) == 1:  # two classes: the logit of the second against the first
            rows, intercepts = torch.cat([-rows, rows]) / 2, torch.cat([-intercepts, intercepts]) / 2
        seen = torch.from_numpy(model.classes_)
        weight = features.new_zeros(self.weight.shape).index_copy(0, seen, rows)
        return weight, features.new_full(self.bias.shape, NEVER).index_copy(0, seen, intercepts)


def search(right: Callable[[float], int]) -> float:
    """CoOp's search of log10 C for the largest ``right(log10 C)``.

    The best of 1e6, 1e4, ..., 1e-6 (the largest among equals), then eight steps on an interval from a decade below to a
    decade above it: the better end stays (the lower among equals), the other moves to the middle. It ends with the
    better end of the last step.
    """
    right = cache(right)
    peak = max((6.0, 4.0, 2.0, 0.0, -2.0, -4.0, -6.0), key=right)
    low, high, best = peak - 1, peak + 1, peak
    for _ in range(8):
        middle = (low + high) / 2
        if right(low) < right(high):
            best, low = high, middle
        else:
            best, high = low, middle
    return best
