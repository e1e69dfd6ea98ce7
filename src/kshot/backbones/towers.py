"""Vision transformers of open_clip and timm taken apart: what comes before their blocks, the blocks, what follows."""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import zip_longest
from typing import Any, cast

import torch
from torch import Tensor, nn

from kshot.backbones.tokens import joined

# Names, as backbones have them, of slots and parameters in a block, and of what follows the last one.
BLOCK = re.compile(r"image\.(?:(?:trunk\.|transformer\.)?(?:res)?blocks\.)?(\d+)\.")
AFTER = re.compile(r"image\.(?:trunk\.)?(?:ln_post|proj|norm|fc_norm|attn_pool|attn_pool_contrastive|head)\b")
Run = Callable[[Tensor], Tensor]


def prompt_shape(vit: Any) -> tuple[int, int]:
    """Blocks of a timm tower that learned tokens can enter and their width; (0, 0) for no plain vision transformer.

    Rotary positions are given to all tokens but the first few, so that tokens without a position have no place there.
    """
    from timm.models.vision_transformer import VisionTransformer

    return (len(vit.blocks), vit.embed_dim) if isinstance(vit, VisionTransformer) else (0, 0)


def enterable(tower: Any) -> bool:
    """Whether features are known to follow from a tower's tokens by its blocks and :func:`pooled` alone.

    They are not of towers whose features or blocks are made otherwise: ResNets, CoCa, subclasses that timm changes.
    """
    if hasattr(tower, "_embeds"):
        return not tower.output_tokens
    from timm.models.eva import Eva
    from timm.models.vision_transformer import VisionTransformer

    return type(tower) in (VisionTransformer, Eva)


def blocks_of(tower: Any) -> nn.ModuleList:
    """The blocks of a tower."""
    return cast(nn.ModuleList, tower.transformer.resblocks if hasattr(tower, "_embeds") else tower.blocks)


def embedded(tower: Any, image: Tensor) -> Tensor:
    """Tokens, (B, L, width), before the first block, of normalised images."""
    if hasattr(tower, "_embeds"):
        return cast(Tensor, tower._embeds(image))  # ends with ln_pre, which treats tokens alike
    x = tower._pos_embed(tower.patch_embed(image))
    if isinstance(x, tuple):  # of a tower with rotary positions, which drops patches in there
        return cast(Tensor, tower.norm_pre(x[0]))
    return cast(Tensor, tower.norm_pre(tower.patch_drop(x)))


def norm_before(tower: Any) -> nn.Module:
    """The norm, or identity, with which :func:`embedded` ends."""
    return cast(nn.Module, tower.ln_pre if hasattr(tower, "_embeds") else tower.norm_pre)


def runs_of(tower: Any, size: int) -> list[Run]:
    """The blocks of a tower as functions of tokens alone, for images of ``size`` times ``size`` pixels."""
    blocks = list(blocks_of(tower))
    if getattr(tower, "rope", None) is None:
        return cast(list[Run], blocks)
    side = size // tower.patch_embed.patch_size[0]
    rope = tower.rope.get_embed(shape=[side, side])
    return [partial(block, rope=rope[i] if tower.rope_mixed else rope) for i, block in enumerate(blocks)]


def run_prompted(blocks: Sequence[Run], x: Tensor, prompts: Sequence[Tensor]) -> Tensor:
    """Runs blocks on tokens, (B, L, width), with prompts behind them; returns the L tokens without prompts.

    There are prompts, (n, width), for each of the first blocks; after these, the states of the last ones stay.
    """
    length = x.shape[1]
    for block, prompt in zip_longest(blocks, prompts):
        if prompt is not None:
            x = torch.cat([x[:, :length], prompt.to(x.dtype).expand(x.shape[0], -1, -1)], 1)
        x = block(x)
    return x[:, :length]


def run_on(blocks: Sequence[Run], x: Tensor, last: int) -> list[Tensor]:
    """Runs blocks on tokens, (B, L, width); the ``last`` states, of which the first may be the tokens themselves."""
    states = deque([x], last)
    for block in blocks:
        x = block(x)
        states.append(x)
    return list(states)


def pooled(tower: Any, x: Tensor) -> Tensor:
    """What a tower makes of its last state, (B, L, width): (B, D)."""
    if hasattr(tower, "_embeds"):
        pooled, _ = tower._pool(x)
        return cast(Tensor, pooled if tower.proj is None else pooled @ tower.proj)
    return cast(Tensor, tower.forward_head(tower.norm(x)))


def probed_states(tower: Any, states: Sequence[Tensor], features: str) -> Tensor:
    """:func:`kshot.backbones.tokens.joined` of the last states of a tower, (B, L, width) each."""
    norm, first = (tower.ln_post, 1) if hasattr(tower, "_embeds") else (tower.norm, tower.num_prefix_tokens)
    normed = [norm(x) for x in states]
    return joined([x[:, first:] for x in normed], [x[:, :first] for x in normed], features)


def first_effect(name: str, blocks: int) -> int:
    """The block of a tower of so many ``blocks`` in which a slot or a parameter, by its name, has an effect first.

    ``blocks`` for one that follows them all; 0 for one that comes before, or whose place is not known.
    """
    inside = BLOCK.match(name)
    return int(inside[1]) if inside else blocks if AFTER.match(name) else 0


def leading_modules(tower: Any, blocks: int) -> Iterator[nn.Module]:
    """The first blocks of a tower, and what comes before them; none for 0 blocks."""
    if blocks:
        yield from blocks_of(tower)[:blocks]
        holder = ("transformer",) if hasattr(tower, "_embeds") else ("blocks",)
        yield from (
            each for name, each in tower.named_children() if name not in holder and not AFTER.match(f"image.{name}")
        )
