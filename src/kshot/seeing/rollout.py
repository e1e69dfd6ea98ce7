"""Attention rollout: how far each patch of an image reaches what its features are pooled of."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

from kshot.backbones import towers
from kshot.backbones.attention import Attention
from kshot.backbones.tokens import PARTS
from kshot.errors import UserError


@torch.no_grad()
def rollout(module: Any, image: Tensor) -> Tensor:
    """How much of each patch the attention of all blocks passes on to the pooled tokens (Abnar & Zuidema 2020).

    Each block mixes tokens by ``(Ā + I) / 2``, Ā the mean of its heads' attention and I its residual connection; the
    product over the blocks is taken from the tokens of the image to those that are pooled (arXiv:2005.00928, section
    3). Learned tokens start as nothing of the image, and are so again where a block brings new ones.

    Args:
        module: a fitted FewShotModule in evaluation mode.
        image: (B, 3, S, S), as its backbone takes them.

    Returns:
        (B, rows, columns) of the patches, each image's largest 1.

    Raises:
        UserError: the tower has other blocks than plain attention, or pools by attention.
    """
    backbone = module.backbone
    attentions, pooled, side = parts_of(backbone)
    prompts, seen = len(module.classifier.image_tokens()), list[Tensor]()
    with ExitStack() as hooks:
        for attention in attentions:
            hooks.enter_context(_Hook(attention, seen))
        module.encode_image(image)
    length = len(pooled)
    reach = torch.eye(length, dtype=seen[0].dtype, device=seen[0].device).expand(len(image), -1, -1)
    for block, passed in enumerate(seen):
        if block < prompts:
            learned = reach.new_zeros(len(image), passed.shape[-1] - length, length)
            reach = torch.cat([reach[:, :length], learned], 1)
        reach = (passed @ reach + reach) / 2
    weights = torch.tensor(pooled, dtype=reach.dtype, device=reach.device)
    patches = (weights @ reach[:, :length])[:, length - side**2 :]
    found: Tensor = (patches / patches.amax(1, keepdim=True)).unflatten(1, (side, side))
    return found


class _Hook:
    """Notes the attention of a module, (B, L, L), the mean of its heads, while it is entered."""

    def __init__(self, attention: Attention, seen: list[Tensor]) -> None:
        self.attention, self.seen = attention, seen

    def __enter__(self) -> None:
        self.handle = self.attention.register_forward_pre_hook(self.note)

    def note(self, attention: Any, given: Any) -> None:
        q, k, _ = attention.heads_of(given[0])
        scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
        self.seen.append(scores.float().softmax(-1).mean(1))

    def __exit__(self, *_: object) -> None:
        self.handle.remove()


def parts_of(backbone: Any) -> tuple[list[Attention], list[float], int]:
    """The attention of each block of an image tower, the weight of each token in what is pooled, and patches a side.

    Raises:
        UserError: as :func:`rollout`.
    """
    tower = backbone.tower
    blocks = list(towers.blocks_of(tower)) if tower is not None and towers.enterable(tower) else []
    attentions: list[Any] = [block.attn for block in blocks]
    if not attentions or not all(isinstance(each, Attention) for each in attentions):
        raise UserError(f"{backbone.name} has no blocks of plain attention, which alone can be rolled out.")
    own = hasattr(tower, "_embeds")  # open_clip's
    kind = {"tok": "token"}.get(tower.pool_type, tower.pool_type) if own else tower.global_pool
    if tower.attn_pool is not None or kind not in ("token", "avg") or getattr(tower, "pool_include_prefix", False):
        raise UserError(f"{backbone.name} pools by {kind}: rollout is for a class token or the mean of the patches.")
    patch = tower.patch_size if own else tower.patch_embed.patch_size
    first, side = 1 if own else tower.num_prefix_tokens, backbone.image_size // patch[0]
    tokens, means = PARTS.get(backbone.features, (int(kind == "token"), int(kind == "avg")))
    of_token, of_mean = (share / (bool(tokens) + bool(means)) for share in (bool(tokens), bool(means)))
    weights = [of_token, *[0.0] * (first - 1)] if first else []
    return attentions, [*weights, *[of_mean / side**2] * side**2], side
