"""MaPLe: prompts in both towers, those of the image tower projected from those of the text tower."""

from __future__ import annotations

from torch import Tensor, nn

from kshot.backbones.base import Backbone, require_image_prompts, require_prompts
from kshot.classifiers.base import Task
from kshot.classifiers.coop import PUBLISHED_DEPTH, CoOp, checked_depth


class MaPLe(CoOp):
    """Multi-modal prompt learning (Khattak et al. 2022, arXiv:2210.03117).

    Text prompts P_0 ... P_{J-1} go into the first J text blocks, ``P̃_j = P_j W_jᵀ + b_j`` into the first J image blocks
    (the paper's equations 4 to 7).

    Args:
        backbone: must have a text tower that takes embeddings, and an image tower that takes prompts.
        task: its class names.
        context_length: prompts a block.
        init_words: the first ``context_length`` are the start of P_0; the others stay in the prompt as they are, as in
            the paper's code.
        depth: J; None takes 9, or all blocks of a smaller tower.

    Raises:
        UserError: as :class:`~kshot.classifiers.coop.CoOp`; an image tower that takes no prompts, or is shallower.
    """

    keeps_words = True
    prompts_images = True

    def __init__(
        self,
        backbone: Backbone,
        task: Task,
        context_length: int | None = 2,
        init_words: str | None = "a photo of a",
        depth: int | None = None,
    ) -> None:
        text_blocks = require_prompts(backbone, "MaPLe").text_blocks
        require_image_prompts(backbone, "MaPLe")
        if depth is None:
            depth = min(PUBLISHED_DEPTH, text_blocks, backbone.image_blocks)
        super().__init__(backbone, task, context_length, init_words=init_words, depth=depth)
        count = 1 if self.deep is None else 1 + len(self.deep)
        checked_depth("MaPLe", count, backbone.image_blocks, "image")
        width = self.context.shape[-1]
        self.project = nn.ModuleList(nn.Linear(width, backbone.image_width) for _ in range(count))

    def encode_image(self, image: Tensor) -> Tensor:
        text_prompts = [self.context] if self.deep is None else [self.context, *self.deep]
        prompts = [project(p) for project, p in zip(self.project, text_prompts, strict=True)]
        return self.backbone.encode_image(image, prompts)
