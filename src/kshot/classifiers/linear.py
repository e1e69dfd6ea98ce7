"""A linear layer on image features: the linear probe, and the head of adapters without a text tower."""

import logging
import math
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kshot.backbones.base import Backbone
from kshot.classifiers.base import Classifier, Shots, Task, exact, exact_linear
from kshot.classifiers.blend import require_finite
from kshot.classifiers.gda import gda
from kshot.classifiers.ridge import ridge
from kshot.errors import require
from kshot.judging import scale_of_loss
from kshot.mahalanobis import exact_unit

Start = Literal["ridge", "gda", "zero"]
SOFT, SHARP = 0.8, 0.03  # of the log loss of a guess, what a start leaves on its own shots: features change, or stay

logger = logging.getLogger("kshot")


class LinearProbe(Classifier):
    """``z = W f + b``, trained by the run's optimizer (Radford et al. 2021, appendix A.3, use L-BFGS).

    It starts at a head in closed form on the shots' features by the untouched backbone, as LP-FT does (Kumar et al.
    2022, arXiv:2202.10054). The size of its logits decides what training does. Where features change under it, by an
    adapter or learned tokens, the shots keep 80 % of the log loss of a guess, as a head that tells them apart with
    confidence leaves an adapter no gradient; where it is alone, 3 %, as its steps would undo the closed form.

    Args:
        normalize: scale features to unit length, times the square root of their width, before the product.
        head_start: the head in closed form, or zero.
        head_scale: factor of the closed form's logits at the start; None takes the one that keeps this loss.

    Attributes:
        moving: whether something else than the backbone's own tensors changes the features under it.
        started: from what and with which scale :meth:`fit` started the head.
    """

    bound = "its layer has one row of weights for each training class"

    def __init__(
        self,
        backbone: Backbone,
        task: Task,
        normalize: bool = True,
        head_start: Start = "ridge",
        head_scale: float | None = None,
    ) -> None:
        super().__init__(backbone, task)
        known = get_args(Start)
        require("LinearProbe", "head_start", head_start, head_start in known, f"be one of {', '.join(known)}")
        above = head_scale is None or 0 < head_scale < math.inf
        require("LinearProbe", "head_scale", head_scale, above, "be above 0, or null to choose it")
        self.normalize, self.head_start, self.head_scale = normalize, head_start, head_scale
        self.needs = frozenset(() if head_start == "zero" else {"shots"})
        self.moving = False
        self.started: dict[str, Any] = {}
        self.head = nn.Linear(backbone.feature_dim, len(task.class_names))
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    @property
    def starts_softly(self) -> bool:
        """Whether training goes on from a closed form while features change under it, as in LP-FT."""
        return "shots" in self.needs and (self.moving or bool(self.backbone.trainable("image")))

    @torch.no_grad()
    def fit(self, train: Shots, val: Shots | None) -> None:  # noqa: ARG002  the shots decide
        require_finite(self, train)
        views, label, classes = exact_unit(train.features), train.label.cpu(), len(self.task.class_names)
        weight, bias, _ = gda(train, classes) if self.head_start == "gda" else ridge(train, classes, None)
        logits = F.linear(views, weight, bias).flatten(0, 1)
        share = SOFT if self.starts_softly else SHARP
        scale = self.head_scale or scale_of_loss(logits, label.repeat(len(views)), share * math.log(classes))
        length = views.shape[-1] ** 0.5 if self.normalize else float(train.features.norm(dim=-1).mean())
        self.head.weight.copy_(scale / length * weight)
        self.head.bias.copy_(scale * bias)
        self.started = {"from": self.head_start, "scale": scale}
        logger.info("The linear head starts at %s on the shots, its logits times %.3g.", self.head_start, scale)

    def forward(self, features: Tensor) -> Tensor:
        (features,) = exact(features)
        if self.normalize:
            features = F.normalize(features, dim=-1) * features.shape[-1] ** 0.5
        return exact_linear(self.head, features)
