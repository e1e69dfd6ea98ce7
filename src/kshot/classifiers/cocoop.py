"""CoCoOp: a context for each image (Zhou et al. 2022, arXiv:2203.05557)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kshot.backbones.base import Backbone, require_prompts
from kshot.classifiers.base import Task
from kshot.classifiers.coop import CoOp
from kshot.errors import UserError


class CoCoOp(CoOp):
    """CoOp whose context is shifted by a small net of the image: ``V_b = V + 1 h(f̂_b)ᵀ`` (the paper's equation 3).

    The prompts of all images of a batch run together; the backbone divides them by its memory budget.

    Args:
        backbone: must have a text tower that takes embeddings.
        task: its class names.
        context_length: M; None takes the length of ``init_words``, or 16.
        init_words: start of V.
        reduction: width of the image features over that of the meta-net's hidden layer.

    Raises:
        UserError: as :class:`~kshot.classifiers.coop.CoOp`; a reduction that leaves no hidden unit.
    """

    def __init__(
        self,
        backbone: Backbone,
        task: Task,
        context_length: int | None = None,
        init_words: str | None = "a photo of a",
        reduction: int = 16,
    ) -> None:
        super().__init__(backbone, task, context_length, init_words=init_words)
        width = backbone.feature_dim
        if not 1 <= reduction <= width:
            raise UserError(f"CoCoOp: reduction is {reduction}, and must lie between 1 and the feature width {width}.")
        hidden = width // reduction
        self.meta_net = nn.Sequential(nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, self.context.shape[-1]))

    def text_features(self, features: Tensor) -> Tensor:
        """Class features, (B, C, D), one set an image."""
        with torch.autocast(features.device.type, enabled=False):
            shift = self.meta_net(F.normalize(features.float(), dim=-1))  # (B, text width)
        prefix, suffix = self.shared_prompts(self.context + shift.unsqueeze(1))
        return require_prompts(self.backbone, "CoCoOp").encode_embeddings(prefix, suffix, self.end)
