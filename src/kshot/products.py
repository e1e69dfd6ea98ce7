"""The product of a frozen weight with low-rank terms beside it, forward and backward in as few passes as can be."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class Factors(NamedTuple):
    """One low-rank term, up · down."""

    up: Tensor  # (out, k), scale included
    down: Tensor  # (k, in)


class Term(NamedTuple):
    """A low-rank term on a block of the output's rows."""

    rows: slice  # the block: those of ``up``
    factors: Factors
    added: bool  # whether its product is to be added, or the weight holds it already and only gradients are taken


def sum_of_products(terms: Sequence[Factors]) -> Tensor:
    """Σ up · down, (out, in)."""
    if len(terms) == 1:
        return terms[0].up @ terms[0].down
    return torch.cat([t.up for t in terms], 1) @ torch.cat([t.down for t in terms])


def low_rank_product(x: Tensor, weight: Tensor, bias: Tensor | None, terms: Sequence[Term]) -> Tensor:
    """``y = x Wᵀ + b`` with low-rank terms, (..., out), in the dtype of x, to which all else is cast."""
    factors = [t.to(x.dtype) for term in terms for t in term.factors]
    blocks = tuple((term.rows, term.added) for term in terms)
    bias = None if bias is None else bias.to(x.dtype)
    y: Tensor = LowRankProduct.apply(x, weight.to(x.dtype), bias, blocks, *factors)
    return y


class LowRankProduct(torch.autograd.Function):
    """:func:`low_rank_product` in one dtype.

    No (out, in) gradient of a frozen weight is formed, x is kept only if a ``down`` or the weight trains, and what the
    terms add to the output and to the gradient of x is accumulated in place (benchmarks/adapters.py).
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        blocks: tuple[tuple[slice, bool], ...],
        *factors: Tensor,
    ) -> Tensor:
        """Returns y, (..., out), for x, (..., in), and up, down, up, down, ..."""
        flat = x.reshape(-1, x.shape[-1])
        ups, downs = factors[::2], factors[1::2]
        train_ups, train_downs = ctx.needs_input_grad[4::2], ctx.needs_input_grad[5::2]
        y = flat @ weight.T if bias is None else torch.addmm(bias, flat, weight.T)
        down = downs[0] if len(downs) == 1 else torch.cat(downs)
        sizes = [len(d) for d in downs]
        h = flat @ down.T if any(train_ups) or any(added for _, added in blocks) else None
        if h is not None:
            for (rows, added), up, part in zip(blocks, ups, h.split(sizes, 1), strict=True):
                if added:
                    y[:, rows].addmm_(part, up.T)
        keep_x = ctx.needs_input_grad[1] or any(train_downs)
        ctx.save_for_backward(flat if keep_x else None, h if any(train_ups) else None, weight, down, *ups)
        ctx.blocks, ctx.sizes, ctx.shape = blocks, sizes, x.shape
        return y.view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        """Gradients of x, W and the factors."""
        flat, h, weight, down, *ups = ctx.saved_tensors
        g = gradient.reshape(-1, gradient.shape[-1])
        to_x, to_weight = ctx.needs_input_grad[:2]
        train_ups, train_downs = ctx.needs_input_grad[4::2], ctx.needs_input_grad[5::2]
        through = [  # (T, k): the gradient as the inner size of each term sees it
            g[:, rows] @ up if (to_x and added) or train else None
            for (rows, added), up, train in zip(ctx.blocks, ups, train_downs, strict=True)
        ]
        dx = g @ weight if to_x else None
        if dx is not None:
            added = [i for i, (_, added) in enumerate(ctx.blocks) if added]
            if len(added) == len(ups):  # the rule: one product for all terms
                dx.addmm_(torch.cat([t for t in through if t is not None], 1), down)
            else:
                downs = down.split(ctx.sizes)
                for i in added:
                    dx.addmm_(through[i], downs[i])
        factors: list[Tensor | None] = []
        parts = h.split(ctx.sizes, 1) if h is not None else [None] * len(ups)
        for (rows, _), part, seen, train_up, train_down in zip(
            ctx.blocks, parts, through, train_ups, train_downs, strict=True
        ):
            factors += [
                g[:, rows].T @ part if train_up and part is not None else None,
                seen.T @ flat if train_down and seen is not None else None,
            ]
        dweight = g.T @ flat if to_weight else None
        return (dx.view(ctx.shape) if dx is not None else None, dweight, None, None, *factors)
