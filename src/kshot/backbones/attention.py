"""Multi-head self-attention over the slots q, k, v and o, in place of the three forms that libraries use."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kshot.slots import Projection

# In bfloat16 on a CPU, torch's fused kernel is 2.7 to 7 times slower than two plain products forward and backward, and
# 1.3 to 2 times slower forward alone, at lengths 17 to 577 (benchmarks/attention.py); in float32 it is the faster one.
# The limit bounds memory for the scores.
LONGEST_UNFUSED = 1024

# What our module takes over from open_clip's and timm's, by its name there; and what projections replace.
TAKEN = {"ln_q": "q_norm", "ln_k": "k_norm", "head_scale": "head_scale", "ln_inner": "inner_norm"}
TAKEN |= {"q_norm": "q_norm", "k_norm": "k_norm", "norm": "inner_norm"}
REPLACED = ("in_proj_weight", "in_proj_bias", "out_proj", "qkv", "proj")


class PackedText(NamedTuple):
    """How class prompts that share a prefix lie in one list of tokens: first all prefixes, then all suffixes.

    A causal tower gives a shared prefix the same states in every class, so it is run once for each group.
    """

    groups: int  # one, or one for each image when prompts depend on the image
    prefix: int  # tokens in a prefix
    classes: int
    suffix: int  # tokens in a suffix, padding included


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, dropout: float = 0.0) -> Tensor:
    """Scaled dot-product attention, (..., L, width of a head), with an additive mask that broadcasts to (..., L, L)."""
    if q.device.type != "cpu" or q.dtype != torch.bfloat16 or k.shape[-2] > LONGEST_UNFUSED:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
    if mask is not None:
        scores = scores + mask
    return F.dropout(scores.softmax(-1).to(v.dtype), dropout, training=dropout > 0) @ v


class Attention(nn.Module):
    """Self-attention whose projections are slots, in the place of a module of PyTorch, open_clip or timm.

    Args:
        original: the library's module; what this one holds is taken out of it.
        qkv: the fused projection with parts q, k, v.
        o: the output projection.
        dropout: of the attention weights, in training.
        output_dropout: of the projected output, in training.

    Attributes:
        q_norm: norm of each head's queries, or identity; ``k_norm`` likewise of its keys.
        head_scale: factor a head, (heads, 1, 1), or None.
        inner_norm: norm before the output projection, or identity.
        true_blocks: whether True in a boolean mask blocks a position (PyTorch, open_clip) or allows it (timm).
        gives_pair: whether the library's blocks expect a second output, the weights, which is None here.
    """

    def __init__(
        self, original: Any, qkv: Projection, o: Projection, dropout: float = 0.0, output_dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.qkv, self.o, self.heads = qkv, o, int(original.num_heads)
        self.dropout, self.output_dropout = dropout, output_dropout
        self.q_norm, self.k_norm, self.inner_norm = nn.Identity(), nn.Identity(), nn.Identity()
        self.head_scale: nn.Parameter | None = None
        self.true_blocks = hasattr(original, "in_proj_weight")
        self.gives_pair = isinstance(original, nn.MultiheadAttention)
        for name, ours in TAKEN.items():
            if hasattr(original, name):
                setattr(self, ours, getattr(original, name))
        for name in (*TAKEN, *REPLACED):
            if hasattr(original, name):
                setattr(original, name, None)
        self.original = original

    def heads_of(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Projects (B, L, width) to q, k, v, each (B, heads, L, width of a head)."""
        q, k, v = (y.unflatten(-1, (self.heads, -1)).transpose(-3, -2) for y in self.qkv.split(x))
        return self.q_norm(q), self.k_norm(k), v

    def join(self, x: Tensor) -> Tensor:
        """Joins heads, (B, heads, L, width of a head), and projects them to (B, L, width)."""
        if self.head_scale is not None:
            x = x * self.head_scale
        out = self.o(self.inner_norm(x.transpose(-3, -2).flatten(-2)))
        return F.dropout(out, self.output_dropout, self.training)

    def forward(self, x: Tensor, key: Any = None, value: Any = None, attn_mask: Any = None, **_: Any) -> Any:
        """Attends within each sequence of (B, L, width); key and value, where a block gives them, are x as well.

        The mask is additive or boolean; it broadcasts to (B, heads, L, L), or is (B·heads, L, L).
        """
        assert key is None or (key is x and value is x), "self-attention only"
        q, k, v = self.heads_of(x)
        if attn_mask is not None:
            if attn_mask.dtype == torch.bool:
                blocked = attn_mask if self.true_blocks else ~attn_mask
                attn_mask = torch.zeros_like(attn_mask, dtype=q.dtype).masked_fill_(blocked, float("-inf"))
            attn_mask = attn_mask.to(q.dtype)
            if attn_mask.ndim == 3:
                attn_mask = attn_mask.unflatten(0, (-1, self.heads))
        out = self.join(attend(q, k, v, attn_mask, self.dropout if self.training else 0.0))
        return (out, None) if self.gives_pair else out

    def packed(self, x: Tensor, layout: PackedText) -> Tensor:
        """Attends causally within prompts packed as :class:`PackedText`, (tokens, width), at no cost for padding keys.

        A suffix token sees its group's prefix and the earlier tokens of its own suffix. The scores against the prefix
        are one product for all classes, so that keys and values of the prefix are never repeated.
        """
        g, p, c, s = layout
        q, k, v = (y.squeeze(0).transpose(0, 1) for y in self.heads_of(x.unsqueeze(0)))  # (tokens, heads, width)
        (qp, qs), (kp, ks), (vp, vs) = (y.split([g * p, g * c * s]) for y in (q, k, v))
        qp, kp, vp = (y.unflatten(0, (g, p)).transpose(1, 2) for y in (qp, kp, vp))  # (g, heads, p, width)
        prefix = attend(qp, kp, vp, causal(p, x.device, q.dtype))
        qs, ks, vs = (y.unflatten(0, (g, c, s)) for y in (qs, ks, vs))  # (g, c, s, heads, width)
        qs = qs * q.shape[-1] ** -0.5
        to_prefix = qs.flatten(1, 2).transpose(1, 2) @ kp.transpose(-2, -1)  # (g, heads, c·s, p)
        to_prefix = to_prefix.unflatten(2, (c, s)).transpose(1, 2)  # (g, c, heads, s, p)
        ks, vs = ks.transpose(2, 3), vs.transpose(2, 3)  # (g, c, heads, s, width)
        to_suffix = qs.transpose(2, 3) @ ks.transpose(-2, -1) + causal(s, x.device, q.dtype)
        weights = torch.cat([to_prefix, to_suffix], -1).softmax(-1).to(v.dtype)
        of_prefix = weights[..., :p].transpose(1, 2).flatten(2, 3) @ vp  # (g, heads, c·s, width)
        suffix = of_prefix.unflatten(2, (c, s)).transpose(1, 2) + weights[..., p:] @ vs
        prefix = prefix.transpose(1, 2).reshape(g * p, self.heads, -1)
        suffix = suffix.transpose(2, 3).reshape(g * c * s, self.heads, -1)
        return self.join(torch.cat([prefix, suffix]).transpose(0, 1).unsqueeze(0)).squeeze(0)


def causal(length: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """(length, length), -inf above the diagonal."""
    return torch.full((length, length), float("-inf"), device=device, dtype=dtype).triu_(1)
