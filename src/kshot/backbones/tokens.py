"""Features worth probing: class token, mean of patches, or both joined, of the last block or the last four."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from kshot.errors import UserError

Features = Literal["default", "cls", "mean", "cls+mean", "last4", "last4+mean"]
PARTS = {
    "cls": (1, 0),
    "mean": (0, 1),
    "cls+mean": (1, 1),
    "last4": (4, 0),
    "last4+mean": (4, 1),
}  # class tokens, means


def probed(tower: Any, image: Tensor, features: str) -> Tensor:
    """Joined tokens, (B, n · width), of normalised images by a vision transformer of timm or open_clip.

    Of each block they are the states after the tower's final norm; an open_clip tower's projection is left out.
    """
    blocks = max(1, PARTS[features][0])
    options: dict[str, Any] = {"indices": blocks, "output_fmt": "NLC", "intermediates_only": True}
    if not hasattr(tower, "blocks"):
        found = tower.forward_intermediates(image, normalize_intermediates=True, output_extra_tokens=True, **options)
        return joined(found["image_intermediates"], found["image_intermediates_prefix"], features)
    if not tower.num_prefix_tokens:
        return joined(tower.forward_intermediates(image, norm=True, **options), [], features)
    layers = tower.forward_intermediates(image, norm=True, return_prefix_tokens=True, **options)
    return joined([patches for patches, _ in layers], [first for _, first in layers], features)


def joined(patches: Sequence[Tensor], first: Sequence[Tensor], features: str) -> Tensor:
    """Joins tokens of the last blocks as DINOv2's linear evaluation does (Oquab et al. 2023, arXiv:2304.07193, B.3).

    Args:
        patches: states of the patches, (B, N, width), by block; the last block last.
        first: of the tokens before them, (B, P, width), of which the first is the class token.
        features: ``cls``, ``last4``: the class token of one or four blocks; ``mean``: the mean of the patches of the
            last block; ``+mean``: both, the mean last.

    Returns:
        (B, n · width).
    """
    tokens, means = PARTS[features]
    return torch.cat([y[:, 0] for y in first[len(first) - tokens :]] + [patches[-1].mean(1)] * means, 1)


def width_of(features: str, default: int, name: str, tower: Any) -> int:
    """Gives the width of features.

    Args:
        features: the choice.
        default: width of the default features.
        name: of the model.
        tower: a vision transformer of timm or open_clip.

    Raises:
        UserError: there is no such choice, or the tower has no blocks, not enough, or no class token.
    """
    if features == "default":
        return default
    if features not in PARTS:
        raise UserError(f"features: {features!r} is none of default, {', '.join(PARTS)}.")
    blocks = getattr(tower, "blocks", getattr(getattr(tower, "transformer", None), "resblocks", None))
    pools = hasattr(tower, "ln_post") and tower.attn_pool is not None  # CoCa, whose final norm is that of its pooling
    if blocks is None or pools or not hasattr(tower, "forward_intermediates"):
        raise UserError(f"features: {features} is of the tokens of a plain vision transformer, which {name} has not.")
    tokens, means = PARTS[features]
    if len(blocks) < tokens:
        raise UserError(f"features: {features} joins {tokens} blocks, and {name} has {len(blocks)}.")
    if tokens and getattr(tower, "cls_token", None) is None and getattr(tower, "class_embedding", None) is None:
        raise UserError(f"features: {features} needs a class token, which {name} has not: use mean.")
    return (tokens + means) * int(tower.embed_dim if hasattr(tower, "blocks") else tower.transformer.width)
