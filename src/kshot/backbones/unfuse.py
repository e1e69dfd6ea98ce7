"""Turns the attention and MLP layers of open_clip and timm blocks into projections with named slots.

The function of a block stays what it was, to rounding, in training and in evaluation mode.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from kshot.backbones.attention import Attention, DropInAttention
from kshot.errors import UserError
from kshot.slots import Projection, Slot

QKV = ("q", "k", "v")


def fused_qkv(weight: Tensor, bias: Tensor | None) -> Projection:
    """A projection with parts q, k, v from a fused (3·width, in) weight."""
    return Projection(weight, bias, dict.fromkeys(QKV, weight.shape[0] // 3))


def publish(slots: dict[str, Slot], prefix: str, projection: Projection) -> Projection:
    """Names every part of a projection ``<prefix>.<part>``."""
    for part in projection.sizes:
        slots[f"{prefix}.{part}"] = Slot(f"{prefix}.{part}", projection, part)
    return projection


def unfuse_mlp(mlp: nn.Module, prefix: str, names: dict[str, str]) -> dict[str, Slot]:
    """Replaces the linear layers of an MLP; ``names`` maps a library's names to fc1 and fc2."""
    slots: dict[str, Slot] = {}
    for child, module in list(mlp.named_children()):
        if isinstance(module, nn.Linear):
            projection = publish(slots, prefix, Projection.from_linear(module, names.get(child, child)))
            setattr(mlp, child, projection)
    return slots


def unfuse_open_clip(blocks: Iterable[nn.Module], tower: str) -> dict[str, Slot]:
    """Un-fuses open_clip's residual blocks, with ``nn.MultiheadAttention`` or open_clip's own ``Attention``."""
    slots: dict[str, Slot] = {}
    for i, block in enumerate(blocks):
        attention: Any = block.attn
        qkv = fused_qkv(attention.in_proj_weight, attention.in_proj_bias)
        o = Projection.from_linear(attention.out_proj, "o")
        if isinstance(attention, nn.MultiheadAttention):
            if not attention.batch_first:
                raise UserError(f"Block {i} of the {tower} tower is not batch first; adapters need batch-first blocks.")
            block.attn = DropInAttention(qkv, o, attention.num_heads, dropout=attention.dropout)
        else:
            if attention.logit_scale is not None:
                raise UserError(
                    f"Block {i} of the {tower} tower uses scaled cosine attention, which has no slots here."
                )
            block.attn = Attention(
                qkv,
                o,
                attention.num_heads,
                attention.ln_q,
                attention.ln_k,
                attention.head_scale,
                attention.ln_inner,
                dropout=attention.attn_drop.p,
                output_dropout=attention.out_drop.p,
                true_blocks=True,
            )
        publish(slots, f"{tower}.{i}", qkv)
        publish(slots, f"{tower}.{i}", o)
        slots |= unfuse_mlp(block.get_submodule("mlp"), f"{tower}.{i}", {"c_fc": "fc1", "c_proj": "fc2"})
    return slots


def unfuse_timm(blocks: Iterable[nn.Module], tower: str) -> dict[str, Slot]:
    """Un-fuses timm's blocks: plain attention as a whole, special kinds (rotary, gated) by their projections alone."""
    from timm.layers import Attention as TimmAttention

    slots: dict[str, Slot] = {}
    for i, block in enumerate(blocks):
        attention: Any = block.attn
        qkv: nn.Linear | None = getattr(attention, "qkv", None)
        if qkv is not None:
            bias: Tensor | None = qkv.bias
            if getattr(attention, "q_bias", None) is not None:  # EVA and DINOv3 keep q and v biases apart, k has none
                bias = torch.cat([attention.q_bias, attention.k_bias, attention.v_bias])
                attention.q_bias = attention.k_bias = attention.v_bias = None
            projection = publish(slots, f"{tower}.{i}", fused_qkv(qkv.weight, bias))
            attention.qkv = projection
        else:
            for part in QKV:
                linear = getattr(attention, f"{part}_proj")
                setattr(attention, f"{part}_proj", publish(slots, f"{tower}.{i}", Projection.from_linear(linear, part)))
        attention.proj = publish(slots, f"{tower}.{i}", Projection.from_linear(attention.proj, "o"))
        if type(attention) is TimmAttention and getattr(attention, "gate", None) is None:
            block.attn = Attention(
                attention.qkv,
                attention.proj,
                attention.num_heads,
                attention.q_norm,
                attention.k_norm,
                inner_norm=getattr(attention, "norm", None),
                dropout=attention.attn_drop.p,
                output_dropout=attention.proj_drop.p,
            )
        slots |= unfuse_mlp(block.get_submodule("mlp"), f"{tower}.{i}", {})
    return slots
