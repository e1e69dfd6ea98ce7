"""AutoLoRA (Zhang et al. 2024, arXiv:2403.09113): ranks found by a bilevel search over ΔW = s (B ⊙ softmax(a)) A."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from kshot.adapters.base import Layers, SearchProblem, Shared, SlotAdapter, kaiming_uniform
from kshot.layers import LowRankLayer
from kshot.products import Factors
from kshot.slots import Slot


@dataclass(frozen=True)
class AutoLoRA(SlotAdapter):
    """Low-rank adaptation with a rank of its own for every matrix.

    A search on two halves of the shots learns how much each of k rank-one terms should count; those that count for at
    least the average make the rank, and LoRA of these ranks is trained from its initial values on all shots.

    Args:
        max_rank: k, rank of every matrix in the search.
        alpha: the scale is s = alpha / k in the search and alpha / rank afterwards.
        search_steps: steps of the search; None takes half of the run's, as a half of the shots has half the batches.
        search_lr: Adam's learning rate for a.
        rank_rule: softmax counts softmax(a)_j ≥ 1/k (paper), raw counts a_j / Σ a ≥ 1/k (the authors' code).
        first_order: takes the gradient of a at the weights as they are, without looking ahead (DARTS with ξ = 0): two
            passes a step instead of five.
    """

    rate: ClassVar[float] = 4e-3
    rate_width: ClassVar[int | None] = 192

    max_rank: int = 8
    alpha: float = 16.0
    search_steps: int | None = None
    search_lr: float = 1e-3
    rank_rule: Literal["softmax", "raw"] = "softmax"
    first_order: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require("max_rank", self.max_rank >= 1, "be at least 1")
        self.require("alpha", 0 < self.alpha < math.inf, "be a positive number")
        self.require("search_steps", self.search_steps is None or self.search_steps >= 1, "be at least 1")
        self.require("search_lr", 0 < self.search_lr < math.inf, "be a positive number")
        self.require_known("rank_rule")

    def prepare(self, slots: Mapping[str, Slot]) -> RankSearch:
        self.require_rank(self.max_rank, slots)
        return RankSearch(self, slots)

    def wrap(self, slot: Slot, shared: RankSearch) -> AutoLoRALayer:  # noqa: ARG002  it finds its layers by their slots
        return AutoLoRALayer(slot, self.max_rank, self.alpha)


class AutoLoRALayer(LowRankLayer):
    """In the search ``y + s (drop(x) Aᵀ) (B ⊙ softmax(a))ᵀ`` with a, (k,), from 1; then LoRA."""

    undecayed = frozenset({"a"})
    a: nn.Parameter | None  # how much each term counts; None after the search
    searched: Tensor | None  # the last a, for the record; None before

    def __init__(self, slot: Slot, rank: int, alpha: float) -> None:
        super().__init__(slot)
        self.max_rank, self.alpha = rank, alpha
        self.A = nn.Parameter(kaiming_uniform(slot.name, rank, slot.in_features))
        self.B = nn.Parameter(torch.zeros(slot.out_features, rank))
        self.a = nn.Parameter(torch.ones(rank))
        self.register_buffer("searched", None)

    def factors(self) -> list[Factors]:
        scale = self.alpha / len(self.A)
        return [Factors(self.B * (scale if self.a is None else scale * self.a.softmax(0)), self.A)]

    @torch.inference_mode(False)  # what is made here will train
    def settle(self, down: Tensor, up: Tensor) -> None:
        """Ends the search: LoRA with A = down, (r, in), and B = up, (out, r)."""
        if self.a is not None:
            self.searched, self.a = self.a.detach().clone(), None
        self.A, self.B = nn.Parameter(down.detach().clone()), nn.Parameter(up.detach().clone())

    def from_stored(self, saved: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Takes on the rank of a file from after the search, which holds no a."""
        rank = len(saved["A"]) if "A" in saved else 0
        if "a" not in saved and 1 <= rank <= self.max_rank:
            self.settle(self.A.new_zeros(rank, self.slot.in_features), self.B.new_zeros(self.slot.out_features, rank))
        return dict(saved)


def rank_of(a: Tensor, rule: str) -> int:
    """The rank that an a, (k,), stands for: its entries of at least average weight."""
    a = a.detach().double()
    weight = a.softmax(0) if rule == "softmax" else a / a.sum()
    return max(1, int((weight >= (1 - 1e-6) / len(a)).sum()))  # equal entries all count, however they are rounded


class RankSearch(Shared):
    """Algorithm 1 of the paper: steps on a by validation loss, on the weights by training loss, in turn; then ranks."""

    def __init__(self, settings: AutoLoRA, slots: Mapping[str, Slot]) -> None:
        super().__init__(slots)
        self.settings = settings

    def ranks(self, layers: Layers) -> dict[str, int]:
        return {layer.slot.name: len(layer.A) for layer in self.own(layers)}

    def search(self, problem: SearchProblem) -> None:
        layers = [layer for layer in self.own(problem.layers) if layer.a is not None]
        if not layers:
            return
        a = [layer.a for layer in layers]
        weights = [w for w in problem.parameters if all(w is not other for other in a)]
        initial = [w.detach().clone() for w in weights]
        dropout = layers[0].dropout
        for layer in layers:
            layer.dropout = 0.0  # losses are compared, which must differ by weights and not by masks
        inner = problem.optimizer(weights)
        outer = torch.optim.Adam(a, lr=self.settings.search_lr, betas=(0.5, 0.999))
        rates = {id(w): group["lr"] for group in inner.param_groups for w in group["params"]}
        eta = None if self.settings.first_order else [rates[id(w)] for w in weights]
        for _ in range(self.settings.search_steps or max(1, problem.steps // 2)):
            train_loss = partial(problem.loss, next(problem.train))
            val_loss = partial(problem.loss, next(problem.val))
            step(outer, a, hypergradient(train_loss, val_loss, weights, a, eta))
            step(inner, weights, gradients(train_loss(), weights))
        assign(weights, initial)
        for layer in layers:
            rank = rank_of(layer.a, self.settings.rank_rule)
            layer.settle(layer.A[:rank], layer.B[:, :rank])
            layer.dropout = dropout


def hypergradient(
    train_loss: Callable[[], Tensor],
    val_loss: Callable[[], Tensor],
    weights: Sequence[Tensor],
    a: Sequence[Tensor],
    eta: Sequence[float] | None,
) -> list[Tensor]:
    """∇_a L_val(w − η ∇_w L_train(w, a), a), its second derivative by a finite difference (DARTS, equations 6 to 8).

    The weights w are moved for it and put back to the bit.

    Args:
        train_loss: L_train at the present values.
        val_loss: L_val at the present values.
        weights: w.
        a: what the losses depend on beside w.
        eta: η of each weight; None stays at w, which leaves ∇_a L_val(w, a).
    """
    if eta is None:
        return gradients(val_loss(), a)
    start = [w.detach().clone() for w in weights]
    assign(weights, [w - e * g for w, e, g in zip(start, eta, gradients(train_loss(), weights), strict=True)])
    found = gradients(val_loss(), [*a, *weights])
    direct, v = found[: len(a)], [e * g for e, g in zip(eta, found[len(a) :], strict=True)]  # η ∇_w' L_val
    epsilon = 0.01 / max(1e-12, nn.utils.get_total_norm(v).item())
    assign(weights, [w + epsilon * d for w, d in zip(start, v, strict=True)])
    above = gradients(train_loss(), a)
    assign(weights, [w - epsilon * d for w, d in zip(start, v, strict=True)])
    below = gradients(train_loss(), a)
    assign(weights, start)
    return [d - (p - m) / (2 * epsilon) for d, p, m in zip(direct, above, below, strict=True)]


def gradients(loss: Tensor, tensors: Sequence[Tensor]) -> list[Tensor]:
    """Of a loss; zeros where it does not depend on a tensor."""
    return list(torch.autograd.grad(loss, tensors, allow_unused=True, materialize_grads=True))


def step(optimizer: Optimizer, parameters: Sequence[Tensor], given: Sequence[Tensor]) -> None:
    """One step with the given gradients, none of which is left behind."""
    for parameter, gradient in zip(parameters, given, strict=True):
        parameter.grad = gradient
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


@torch.no_grad()
def assign(tensors: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    """Copies values into tensors."""
    for tensor, value in zip(tensors, values, strict=True):
        tensor.copy_(value)
