"""A linear layer on image features: the linear probe, and the head of adapters without a text tower."""

import torch.nn.functional as F
from torch import Tensor, nn

from kshot.backbones.base import Backbone
from kshot.classifiers.base import Classifier, Task, exact, exact_linear


class LinearProbe(Classifier):
    """``z = W f + b``, trained by the run's optimizer (Radford et al. 2021, appendix A.3, use L-BFGS).

    Args:
        normalize: scale features to unit length, times the square root of their width, before the product.
    """

    bound = "its layer has one row of weights for each training class"

    def __init__(self, backbone: Backbone, task: Task, normalize: bool = True) -> None:
        super().__init__(backbone, task)
        self.normalize = normalize
        self.head = nn.Linear(backbone.feature_dim, len(task.class_names))
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, features: Tensor) -> Tensor:
        (features,) = exact(features)
        if self.normalize:
            features = F.normalize(features, dim=-1) * features.shape[-1] ** 0.5
        return exact_linear(self.head, features)
