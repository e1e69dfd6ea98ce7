"""Turns the attention and MLP layers of open_clip and timm blocks into projections with named slots, and back.

The function of a block stays what it was, to rounding, in training and in evaluation mode.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, cast

import torch
from torch import Tensor, nn

from kshot.backbones.attention import TAKEN, Attention
from kshot.errors import UserError
from kshot.slots import Projection

QKV = ("q", "k", "v")
MLP = {"c_fc": "fc1", "c_proj": "fc2"}  # open_clip's names; timm's are those of the slots


def fused_qkv(weight: Tensor, bias: Tensor | None, place: str) -> Projection:
    """A projection with parts q, k, v from a fused (3·width, in) weight."""
    return Projection(weight, bias, dict.fromkeys(QKV, weight.shape[0] // 3), place)


def unfuse_mlp(mlp: nn.Module, place: str) -> None:
    """Replaces the linear layers of an MLP."""
    for name, module in list(mlp.named_children()):
        if isinstance(module, nn.Linear):
            setattr(mlp, name, Projection.from_linear(module, MLP.get(name, name), place))


def unfuse_open_clip(blocks: Iterable[nn.Module], tower: str) -> None:
    """Un-fuses open_clip's residual blocks, with ``nn.MultiheadAttention`` or open_clip's own ``Attention``."""
    for i, block in enumerate(blocks):
        attention: Any = block.attn
        place = f"{tower}.{i}"
        qkv = fused_qkv(attention.in_proj_weight, attention.in_proj_bias, place)
        o = Projection.from_linear(attention.out_proj, "o", place)
        if isinstance(attention, nn.MultiheadAttention):
            if not attention.batch_first:
                raise UserError(f"Block {i} of the {tower} tower is not batch first; adapters need batch-first blocks.")
            block.attn = Attention(attention, qkv, o, attention.dropout)
        else:
            if attention.logit_scale is not None:
                raise UserError(f"Block {i} of the {tower} tower has scaled cosine attention, which has no slots here.")
            block.attn = Attention(attention, qkv, o, attention.attn_drop.p, attention.out_drop.p)
        unfuse_mlp(block.get_submodule("mlp"), place)


def unfuse_timm(blocks: Iterable[nn.Module], tower: str) -> None:
    """Un-fuses timm's blocks: plain attention as a whole, special kinds (rotary, gated) by their projections alone."""
    from timm.layers import Attention as TimmAttention

    for i, block in enumerate(blocks):
        attention: Any = block.attn
        place = f"{tower}.{i}"
        qkv: nn.Linear | None = getattr(attention, "qkv", None)
        if qkv is not None:
            bias: Tensor | None = qkv.bias
            if getattr(attention, "q_bias", None) is not None:  # EVA and DINOv3 keep q and v biases apart, k has none
                bias = torch.cat([attention.q_bias, attention.k_bias, attention.v_bias])
                attention.q_bias = attention.k_bias = attention.v_bias = None
            attention.qkv = fused_qkv(qkv.weight, bias, place)
        else:
            for part in QKV:
                linear = getattr(attention, f"{part}_proj")
                setattr(attention, f"{part}_proj", Projection.from_linear(linear, part, place))
        attention.proj = Projection.from_linear(attention.proj, "o", place)
        if type(attention) is TimmAttention and getattr(attention, "gate", None) is None:
            drops = attention.attn_drop.p, attention.proj_drop.p
            block.attn = Attention(attention, attention.qkv, attention.proj, *drops)
        unfuse_mlp(block.get_submodule("mlp"), place)


def library_of(attention: Attention) -> nn.Module:
    """The library's module in whose place one of ours stands, with the present weights under its own names."""
    original = attention.original
    for there, here in TAKEN.items():
        if hasattr(original, there):
            setattr(original, there, getattr(attention, here))
    if hasattr(original, "in_proj_weight"):
        original.in_proj_weight, original.in_proj_bias = attention.qkv.weight, attention.qkv.bias
        original.out_proj = linear_of(attention.o)
    else:
        original.qkv, original.proj = linear_of(attention.qkv), linear_of(attention.o)
    return cast(nn.Module, original)


def linear_of(projection: Projection) -> nn.Linear:
    """A plain linear layer with the weights of a projection."""
    linear = nn.Linear(projection.in_features, projection.out_features, projection.bias is not None, device="meta")
    linear.weight = projection.weight
    linear.bias = projection.bias  # type: ignore[assignment]  # torch says so for a layer without
    return linear


def restore(model: nn.Module) -> None:
    """Puts the library's own modules back, under their own names, with the weights that projections hold now."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, Attention):
                setattr(parent, name, library_of(child))
            elif isinstance(child, Projection) and not isinstance(parent, Attention):
                linear = linear_of(child)
                if name == "qkv" and child.bias is not None and hasattr(parent, "q_bias"):
                    q, k, v = child.bias.detach().clone().chunk(3)
                    parent.q_bias, parent.v_bias = (nn.Parameter(b, requires_grad=False) for b in (q, v))
                    parent.k_bias = k
                    linear.register_parameter("bias", None)
                setattr(parent, name, linear)
