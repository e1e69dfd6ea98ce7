"""MaPLe: prompts in both towers, those of the image tower projected from those of the text tower."""

import copy
from collections.abc import Sequence

from torch import Tensor, nn

from kshot.backbones.base import Backbone, require_image_prompts
from kshot.backbones.language import require_prompts
from kshot.classifiers.base import Task, exact_linear
from kshot.classifiers.coop import PUBLISHED_DEPTH, CoOp, checked_depth


class MaPLe(CoOp):
    """Multi-modal prompt learning (Khattak et al. 2022, arXiv:2210.03117).

    Text prompts P_0 ... P_{J-1} go into the first J text blocks, ``P̃_j = P_j W_jᵀ + b_j`` into the first J image blocks
    (the paper's equations 4 to 7). As in the paper's code, the projections of deep prompts start alike.

    Args:
        context_length: prompts a block.
        init_words: the first ``context_length`` are the start of P_0; the others stay in the prompt as they are, as in
            the paper's code.
        depth: J; None takes 9, or all blocks of a smaller tower.

    Attributes:
        project: the J projections, W_j and b_j.
    """

    keeps_words = True

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
        checked_depth("MaPLe", depth, backbone.image_blocks, "image")
        first, deep = (nn.Linear(self.context.shape[-1], backbone.image_width) for _ in range(2))
        self.project = nn.ModuleList([first, *(copy.deepcopy(deep) for _ in range(depth - 1))])

    def image_tokens(self) -> Sequence[Tensor]:
        text_prompts = [self.context] if self.deep is None else [self.context, *self.deep]
        return [exact_linear(project, p).to(p.dtype) for project, p in zip(self.project, text_prompts, strict=True)]
