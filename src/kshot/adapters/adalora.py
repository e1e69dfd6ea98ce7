"""AdaLoRA (Zhang et al. 2023, arXiv:2303.10512): ΔW = s B (E ⊙ A), with ranks from one shared budget."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from kshot.adapters.base import Shared, SlotAdapter, generator_for, require_rank
from kshot.errors import UserError
from kshot.layers import Factors, LowRankLayer
from kshot.slots import Slot


@dataclass(frozen=True)
class AdaLoRA(SlotAdapter):
    """Low-rank adaptation in the form of an SVD, whose least important triplets are pruned while it trains.

    Args:
        initial_rank: r0 of every matrix at the start.
        target_rank: average rank of a matrix at the end.
        alpha: the scale is s = alpha / (r0 + 1e-5), before and after pruning; None takes alpha = r0, so s ≈ 1.
        initial_steps: t_i, steps before the first pruning; None takes a tenth of the run.
        final_steps: t_f, last steps, with fixed ranks; None takes four tenths of the run.
        every: ΔT, steps from one pruning to the next; None takes a hundredth of the run.
        beta1: β₁, smoothing of the sensitivity.
        beta2: β₂, smoothing of its uncertainty.
        orthogonality: γ, weight of the term that keeps A and B orthogonal.
        squared: the term sums squared norms, as the paper has it, instead of norms, as its code and PEFT have it.

    Raises:
        UserError: a setting outside its range.
    """

    initial_rank: int = 12
    target_rank: int = 8
    alpha: float | None = None
    initial_steps: int | None = None
    final_steps: int | None = None
    every: int | None = None
    beta1: float = 0.85
    beta2: float = 0.85
    orthogonality: float = 0.1
    squared: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require("initial_rank", self.initial_rank >= 1, "be at least 1")
        self.require("target_rank", 1 <= self.target_rank <= self.initial_rank, "lie between 1 and initial_rank")
        self.require("alpha", math.isfinite(self.scale) and self.scale > 0, "be a positive number")
        self.require("initial_steps", self.initial_steps is None or self.initial_steps >= 0, "not be negative")
        self.require("final_steps", self.final_steps is None or self.final_steps >= 0, "not be negative")
        self.require("every", self.every is None or self.every >= 1, "be at least 1")
        self.require("beta1", 0 < self.beta1 < 1, "lie between 0 and 1")
        self.require("beta2", 0 < self.beta2 < 1, "lie between 0 and 1")
        self.require("orthogonality", 0 <= self.orthogonality < math.inf, "be a number of at least 0")

    @property
    def scale(self) -> float:
        """The factor s."""
        return (self.initial_rank if self.alpha is None else self.alpha) / (self.initial_rank + 1e-5)

    def prepare(self, slots: Mapping[str, Slot]) -> RankBudget:  # noqa: ARG002  layers join as they are made
        return RankBudget(self)

    def wrap(self, slot: Slot, shared: RankBudget) -> AdaLoRALayer:
        require_rank(type(self).__name__, self.initial_rank, slot)
        shared.layers[slot.name] = AdaLoRALayer(slot, self.initial_rank, self.scale)
        return shared.layers[slot.name]


class AdaLoRALayer(LowRankLayer):
    """``y + s drop(x) (E ⊙ A)ᵀ Bᵀ``; A, (r, in), and B, (out, r), start at N(0, 0.02²), E, (r, 1), at zero."""

    def __init__(self, slot: Slot, rank: int, scale: float) -> None:
        super().__init__(slot)
        self.rank, self.scale = rank, scale
        generator = generator_for(slot.name)
        self.A = nn.Parameter(0.02 * torch.randn(rank, slot.in_features, generator=generator))
        self.E = nn.Parameter(torch.zeros(rank, 1))
        self.B = nn.Parameter(0.02 * torch.randn(slot.out_features, rank, generator=generator))

    def factors(self) -> list[Factors]:
        return [Factors(self.B, self.scale * self.E * self.A)]

    def fit_shapes(self, saved: Mapping[str, Tensor]) -> None:
        """Takes on the rank that pruning left of the initial one."""
        rank = saved["E"].numel() if "E" in saved else self.rank
        if rank <= self.rank:
            resize(self.A, self.A.new_zeros(rank, self.slot.in_features))
            resize(self.E, self.E.new_zeros(rank, 1))
            resize(self.B, self.B.new_zeros(self.slot.out_features, rank))


class RankBudget(Shared):
    """Scores all triplets (B[:, k], E[k], A[k, :]), prunes the lowest to a falling budget, and removes them in the end.

    A pruned triplet has E[k] = 0. It goes on training and returns when its score rises again, until the pattern is
    fixed, t_f steps before the end.

    Attributes:
        layers: all layers, by slot.
        importance: Ī, smoothed sensitivity of every element of every A, E and B, in one row.
        uncertainty: Ū, smoothed deviation of the sensitivity from Ī.
    """

    importance: Tensor
    uncertainty: Tensor

    def __init__(self, settings: AdaLoRA) -> None:
        super().__init__()
        self.settings = settings
        self.layers: dict[str, AdaLoRALayer] = {}
        self.steps = self.initial_steps = self.final_steps = 0
        self.every = 1
        self.register_buffer("importance", torch.zeros(0), persistent=False)
        self.register_buffer("uncertainty", torch.zeros(0), persistent=False)

    @property
    def ranks(self) -> dict[str, int]:
        """The ranks that layers have, by slot; pruning lowers them when it ends."""
        return {name: len(layer.E) for name, layer in self.layers.items()}

    def parameters_of_layers(self) -> list[nn.Parameter]:
        """A, E, B, A, E, B, ..."""
        return [p for layer in self.layers.values() for p in (layer.A, layer.E, layer.B)]

    def penalty(self) -> Tensor | None:
        """γ/(2L) Σ (‖A Aᵀ − I‖ + ‖Bᵀ B − I‖) over all L layers, in Frobenius norms (paper's equation 4)."""
        if self.settings.orthogonality == 0:
            return None
        same: dict[torch.Size, list[Tensor]] = {}
        for layer in self.layers.values():
            for rows in (layer.A, layer.B.mT):
                same.setdefault(rows.shape, []).append(rows)
        total = next(iter(self.layers.values())).A.new_zeros(())
        with torch.autocast(total.device.type, enabled=False):
            for shape, group in same.items():
                rows = torch.stack(group)
                error = rows @ rows.mT - torch.eye(shape[0], dtype=rows.dtype, device=rows.device)
                norms = torch.linalg.vector_norm(error, dim=(1, 2))
                total = total + (norms.square() if self.settings.squared else norms).sum()
        return self.settings.orthogonality / (2 * len(self.layers)) * total

    def plan(self, steps: int) -> None:
        given = self.settings
        self.steps = steps
        self.initial_steps = steps // 10 if given.initial_steps is None else given.initial_steps
        self.final_steps = 4 * steps // 10 if given.final_steps is None else given.final_steps
        self.every = max(1, steps // 100) if given.every is None else given.every
        if self.initial_steps + self.final_steps >= steps:
            raise UserError(
                f"AdaLoRA: the budget phases initial_steps, {self.initial_steps}, and final_steps, {self.final_steps}, "
                f"leave no step to prune in: the run has {steps} steps."
            )

    def budget(self, step: int) -> int:
        """b(t), triplets of all layers that are left after step t (paper's equation 12)."""
        start, end = self.initial_steps, self.steps - self.final_steps
        initial = sum(self.ranks.values())
        target = self.settings.target_rank * len(self.layers)
        if step <= start:
            return initial
        return int((initial - target) * (1 - (min(step, end) - start) / (end - start)) ** 3 + target)

    @torch.no_grad()
    def after_step(self, step: int, optimizers: Sequence[Optimizer]) -> None:
        end = self.steps - self.final_steps
        if step < end:
            self.observe()
        if step == end or (self.initial_steps < step < end and step % self.every == 0):
            kept = self.prune(self.budget(step))
            if step == end:
                self.compact(kept, optimizers)

    def observe(self) -> None:
        """Smooths sensitivities I = |p ∂L/∂p| and their uncertainty (paper's equations 8 to 10)."""
        parameters = self.parameters_of_layers()
        values = torch.cat([p.flatten() for p in parameters])
        gradients = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in parameters])
        sensitivity = (values * gradients).abs_().nan_to_num_(0.0, posinf=0.0)  # inf: a step that scaling left out
        if not len(self.importance):
            self.importance, self.uncertainty = torch.zeros_like(sensitivity), torch.zeros_like(sensitivity)
        self.importance.lerp_(sensitivity, 1 - self.settings.beta1)
        self.uncertainty.lerp_(sensitivity.sub_(self.importance).abs_(), 1 - self.settings.beta2)

    def scores(self) -> list[Tensor]:
        """S of every triplet, (r,) a layer: the element's score Ī Ū of E, and its means over A and B (equation 7)."""
        parameters = self.parameters_of_layers()
        elements = (self.importance * self.uncertainty).split([p.numel() for p in parameters])
        a, e, b = ([s.view(p.shape) for s, p in zip(elements[i::3], parameters[i::3], strict=True)] for i in range(3))
        return [e_l.flatten() + (a_l.mean(1) + b_l.mean(0)) for a_l, e_l, b_l in zip(a, e, b, strict=True)]

    def prune(self, budget: int) -> list[Tensor]:
        """Sets E to 0 where scores are lowest; gives what is kept, (r,) booleans a layer."""
        layers = list(self.layers.values())
        surplus = sum(self.ranks.values()) - budget
        if surplus <= 0 or not len(self.importance):  # nothing to prune, or nothing known to prune by
            return [torch.ones_like(layer.E[:, 0], dtype=torch.bool) for layer in layers]
        scores = self.scores()
        threshold = torch.cat(scores).kthvalue(surplus).values
        kept = [~(score <= threshold) for score in scores]
        for layer, keep in zip(layers, kept, strict=True):
            layer.E.masked_fill_(~keep[:, None], 0)
        return kept

    def compact(self, kept: Sequence[Tensor], optimizers: Sequence[Optimizer]) -> None:
        """Removes pruned triplets for good, with what optimizers know of them; the output stays what it is."""
        for layer, keep in zip(self.layers.values(), kept, strict=True):
            for parameter, dim in ((layer.A, 0), (layer.E, 0), (layer.B, 1)):
                shrink(parameter, dim, keep.nonzero().flatten(), optimizers)
        self.importance, self.uncertainty = self.importance.new_zeros(0), self.uncertainty.new_zeros(0)

    def training_state(self) -> dict[str, Any]:
        return {"importance": self.importance, "uncertainty": self.uncertainty}

    def load_training_state(self, state: Mapping[str, Any]) -> None:
        self.importance = state["importance"].to(self.importance.device)
        self.uncertainty = state["uncertainty"].to(self.uncertainty.device)


def shrink(parameter: nn.Parameter, dim: int, index: Tensor, optimizers: Sequence[Optimizer]) -> None:
    """Keeps some rows or columns of a parameter, of its gradient and of all that optimizers keep in its shape."""
    shape, gradient = parameter.shape, parameter.grad
    resize(parameter, parameter.data.index_select(dim, index))
    parameter.grad = None if gradient is None else gradient.index_select(dim, index)
    for optimizer in optimizers:
        state = optimizer.state.get(parameter, {})
        alike = {name: v for name, v in state.items() if isinstance(v, Tensor) and v.shape == shape}
        state.update({name: v.index_select(dim, index) for name, v in alike.items()})


def resize(parameter: nn.Parameter, data: Tensor) -> None:
    """Gives a parameter data of another shape, and no gradient; it stays the parameter that optimizers know."""
    parameter.grad = None
    # Autograd expects the old shape as long as an old graph lives, unless the dtype changes.
    parameter.data = data.to(torch.float16 if data.dtype == torch.float32 else torch.float32)
    parameter.data = data
