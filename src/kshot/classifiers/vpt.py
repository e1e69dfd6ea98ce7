"""VPT: learned tokens in the image tower (Jia et al. 2022, arXiv:2203.12119), before any classifier."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from kshot.backbones.base import Backbone, require_image_prompts
from kshot.backbones.language import VisionLanguageBackbone
from kshot.classifiers.base import Around, ClassifierFactory, Task, closed_form
from kshot.classifiers.coop import checked_depth
from kshot.classifiers.linear import LinearProbe
from kshot.classifiers.zero_shot import TextPrompt
from kshot.errors import UserError, require


class VPT(Around):
    """Appends prompts P_0 ... P_{J-1} to the tokens of the first J image blocks (VPT-deep, the paper's equation 5).

    With ``head: CoOp`` of the same depth this is IVLP, independent vision-language prompting (Rasheed et al. 2022,
    arXiv:2212.03640), on which PromptSRC builds.

    Args:
        prompt_length: tokens a block.
        depth: J, the image blocks that get prompts of their own; 1 is VPT-shallow; None takes 9, or all blocks of a
            smaller tower.
        head: what tells the classes apart; None takes TextPrompt, or LinearProbe without a text tower. Heads in closed
            form, or with image prompts of their own, are refused.

    Attributes:
        image_prompts: (J, prompt_length, image width).
    """

    def __init__(
        self,
        backbone: Backbone,
        task: Task,
        prompt_length: int = 4,
        depth: int | None = None,
        head: ClassifierFactory | None = None,
    ) -> None:
        depth = checked_blocks("VPT", backbone, prompt_length, depth)
        default = TextPrompt if isinstance(backbone, VisionLanguageBackbone) else LinearProbe
        super().__init__(backbone, task, head or default)
        kind = type(self.inner).__name__
        if closed_form(self.inner):
            raise UserError(
                f"VPT is trained by gradient steps, and {kind} has a closed form: use LinearProbe, or NearestClassMean "
                "with trainable: true."
            )
        if self.inner.image_tokens():
            raise UserError(f"VPT: {kind} has image prompts of its own: use it without VPT.")
        if isinstance(self.inner, LinearProbe):
            self.inner.moving = True
        self.image_prompts = nn.Parameter(torch.randn(depth, prompt_length, backbone.image_width) * 0.02)

    def image_tokens(self) -> Sequence[Tensor]:
        return list(self.image_prompts)

    def forward(self, features: Tensor) -> Tensor:
        logits: Tensor = self.inner(features)
        return logits

    def param_groups(self) -> list[dict[str, Any]]:
        return [{"params": [self.image_prompts]}, *self.inner.param_groups()]


def checked_blocks(who: str, backbone: Backbone, prompt_length: int, depth: int | None) -> int:
    """:func:`checked_depth` of the image tower, which must take prompts, at least one a block."""
    require_image_prompts(backbone, who)
    require(who, "prompt_length", prompt_length, prompt_length >= 1, "be at least 1")
    return checked_depth(who, depth, backbone.image_blocks, "image")
