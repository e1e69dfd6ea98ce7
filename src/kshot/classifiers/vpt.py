"""VPT: learned tokens in the image tower (Jia et al. 2022, arXiv:2203.12119), before any classifier."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from kshot.backbones.base import Backbone, VisionLanguageBackbone, require_image_prompts
from kshot.classifiers.base import ClassifierFactory, Task
from kshot.classifiers.coop import checked_depth
from kshot.classifiers.linear import LinearProbe
from kshot.classifiers.wrapper import Wrapper
from kshot.classifiers.zero_shot import TextPrompt
from kshot.errors import UserError


class VPT(Wrapper):
    """Appends prompts P_0 ... P_{J-1} to the tokens of the first J image blocks (VPT-deep, the paper's equation 5).

    With ``head: CoOp`` of the same depth this is IVLP, independent vision-language prompting (Rasheed et al. 2022,
    arXiv:2212.03640), on which PromptSRC builds.

    Args:
        backbone: its image tower must take prompts.
        task: for the head.
        prompt_length: tokens a block.
        depth: J, the image blocks that get prompts of their own; 1 is VPT-shallow; None takes 9, or all blocks of a
            smaller tower.
        head: what tells the classes apart; None takes TextPrompt, or LinearProbe without a text tower.

    Raises:
        UserError: the image tower takes no prompts or has fewer blocks; a head in closed form.
    """

    prompts_images = True

    def __init__(
        self,
        backbone: Backbone,
        task: Task,
        prompt_length: int = 4,
        depth: int | None = None,
        head: ClassifierFactory | None = None,
    ) -> None:
        who = type(self).__name__
        require_image_prompts(backbone, who)
        if prompt_length < 1:
            raise UserError(f"{who}: prompt_length is {prompt_length}, and must be at least 1.")
        depth = checked_depth(who, depth, backbone.image_blocks, "image")
        head = head or (TextPrompt if isinstance(backbone, VisionLanguageBackbone) else LinearProbe)
        super().__init__(backbone, task, head)
        if self.inner.closed_form:
            raise UserError(
                f"{who} is trained by gradient steps, and {type(self.inner).__name__} has a closed form: use "
                "LinearProbe, or NearestClassMean with trainable: true."
            )
        if self.inner.prompts_images:
            raise UserError(f"{who}: {type(self.inner).__name__} has image prompts of its own: use it without {who}.")
        self.image_prompts = nn.Parameter(torch.randn(depth, prompt_length, backbone.image_width) * 0.02)

    def encode_image(self, image: Tensor) -> Tensor:
        return self.backbone.encode_image(image, list(self.image_prompts))
