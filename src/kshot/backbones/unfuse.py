"""Turns the attention and MLP layers of open_clip and timm blocks into projections with named slots, and back.

The function of a block stays what it was, to rounding, in training and in evaluation mode.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from kshot.backbones.attention import Attention, DropInAttention, linear_of
from kshot.errors import UserError
from kshot.slots import Projection

QKV = ("q", "k", "v")


def fused_qkv(weight: Tensor, bias: Tensor | None, place: str) -> Projection:
    """A projection with parts q, k, v from a fused (3·width, in) weight."""
    return Projection(weight, bias, dict.fromkeys(QKV, weight.shape[0] // 3), place)


def unfuse_mlp(mlp: nn.Module, place: str, names: dict[str, str]) -> None:
    """Replaces the linear layers of an MLP; ``names`` maps a library's names to fc1 and fc2."""
    for child, module in list(mlp.named_children()):
        if isinstance(module, nn.Linear):
            setattr(mlp, child, Projection.from_linear(module, names.get(child, child), place))


def in_place_of(original: nn.Module, attention: Attention, taken: dict[str, str], emptied: Iterable[str]) -> Attention:
    """Lets an attention module stand for the library's, which keeps nothing of what the new one holds."""
    for name in (*taken, *emptied):
        setattr(original, name, None)
    attention.original, attention.taken = original, taken
    return attention


def unfuse_open_clip(blocks: Iterable[nn.Module], tower: str) -> None:
    """Un-fuses open_clip's residual blocks, with ``nn.MultiheadAttention`` or open_clip's own ``Attention``."""
    for i, block in enumerate(blocks):
        attention: Any = block.attn
        place = f"{tower}.{i}"
        qkv = fused_qkv(attention.in_proj_weight, attention.in_proj_bias, place)
        o = Projection.from_linear(attention.out_proj, "o", place)
        taken: dict[str, str] = {}
        if isinstance(attention, nn.MultiheadAttention):
            if not attention.batch_first:
                raise UserError(f"Block {i} of the {tower} tower is not batch first; adapters need batch-first blocks.")
            new: Attention = DropInAttention(qkv, o, attention.num_heads, dropout=attention.dropout)
        else:
            if attention.logit_scale is not None:
                raise UserError(
                    f"Block {i} of the {tower} tower uses scaled cosine attention, which has no slots here."
                )
            taken = {"ln_q": "q_norm", "ln_k": "k_norm", "head_scale": "head_scale", "ln_inner": "inner_norm"}
            new = Attention(
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
        block.attn = in_place_of(attention, new, taken, ("in_proj_weight", "in_proj_bias", "out_proj"))
        unfuse_mlp(block.get_submodule("mlp"), place, {"c_fc": "fc1", "c_proj": "fc2"})


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
            taken = {"q_norm": "q_norm", "k_norm": "k_norm"}
            taken |= {"norm": "inner_norm"} if hasattr(attention, "norm") else {}
            new = Attention(
                attention.qkv,
                attention.proj,
                attention.num_heads,
                attention.q_norm,
                attention.k_norm,
                inner_norm=getattr(attention, "norm", None),
                dropout=attention.attn_drop.p,
                output_dropout=attention.proj_drop.p,
            )
            block.attn = in_place_of(attention, new, taken, ("qkv", "proj"))
        unfuse_mlp(block.get_submodule("mlp"), place, {})


def restore(model: nn.Module) -> None:
    """Puts the library's own modules back, under their own names, with the weights that projections hold now."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, Attention):
                setattr(parent, name, child.as_library())
            elif isinstance(child, Projection) and not isinstance(parent, Attention):
                linear = linear_of(child)
                if name == "qkv" and child.bias is not None and hasattr(parent, "q_bias"):
                    q, k, v = child.bias.detach().clone().chunk(3)
                    parent.q_bias, parent.v_bias = (nn.Parameter(b, requires_grad=False) for b in (q, v))
                    parent.k_bias = k
                    linear.register_parameter("bias", None)
                setattr(parent, name, linear)
