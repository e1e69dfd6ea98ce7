"""AdaLoRA (Zhang et al. 2023, arXiv:2303.10512): ΔW = s B (E ⊙ A), with ranks from one shared budget."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from kshot.adapters.base import Layers, Shared, SlotAdapter, generator_for
from kshot.errors import UserError
from kshot.layers import LowRankLayer
from kshot.products import Factors
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
    """

    rate: ClassVar[float] = 4e-3
    rate_width: ClassVar[int | None] = 192

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
        self.require("alpha", 0 < self.scale < math.inf, "be a positive number")
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

    def prepare(self, slots: Mapping[str, Slot]) -> RankBudget:
        self.require_rank(self.initial_rank, slots)
        return RankBudget(self, slots)

    def wrap(self, slot: Slot, shared: RankBudget) -> AdaLoRALayer:  # noqa: ARG002  it finds its layers by their slots
        return AdaLoRALayer(slot, self.initial_rank, self.scale)


class AdaLoRALayer(LowRankLayer):
    """``y + s drop(x) (E ⊙ A)ᵀ Bᵀ``; A, (r, in), and B, (out, r), start at N(0, 0.02²), E, (r, 1), at zero."""

    kept: Tensor  # (r,), False for triplets that were pruned for good; files hold the others alone

    def __init__(self, slot: Slot, rank: int, scale: float) -> None:
        super().__init__(slot)
        self.rank, self.scale = rank, scale
        generator = generator_for(slot.name)
        self.A = nn.Parameter(0.02 * torch.randn(rank, slot.in_features, generator=generator))
        self.E = nn.Parameter(torch.zeros(rank, 1))
        self.B = nn.Parameter(0.02 * torch.randn(slot.out_features, rank, generator=generator))
        self.register_buffer("kept", torch.ones(rank, dtype=torch.bool))

    def factors(self) -> list[Factors]:
        return [Factors(self.B, self.scale * self.E * self.A)]

    def stored(self) -> dict[str, Tensor]:
        return {"A": self.A.detach()[self.kept], "E": self.E.detach()[self.kept], "B": self.B.detach()[:, self.kept]}

    def from_stored(self, saved: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Puts what a file holds at its places among the initial triplets, the others being zero."""
        found = dict(saved)
        rank = found["E"].numel() if "E" in found else 0
        kept = found.setdefault("kept", torch.arange(self.rank) < rank)
        if rank < self.rank and kept.shape == (self.rank,) and kept.sum() == rank and found.keys() >= {"A", "B"}:
            for name, dim in (("A", 0), ("E", 0), ("B", 1)):
                shape = getattr(self, name).shape
                padded = found[name].new_zeros(shape)
                found[name] = padded.index_copy_(dim, kept.nonzero().flatten().to(padded.device), found[name])
        return found


class RankBudget(Shared):
    """Scores all triplets (B[:, k], E[k], A[k, :]), and prunes the lowest to a falling budget.

    A pruned triplet has E[k] = 0. It goes on training and returns when its score rises again, until the pattern is
    fixed, t_f steps before the end. From then on its E is set to 0 after every step.
    """

    importance: Tensor  # Ī, smoothed sensitivity of every element of every A, E and B, in one row, by slot
    uncertainty: Tensor  # Ū, smoothed deviation of the sensitivity from Ī, likewise

    def __init__(self, settings: AdaLoRA, slots: Mapping[str, Slot]) -> None:
        super().__init__(slots)
        self.settings = settings
        self.steps = self.initial_steps = self.final_steps = 0
        self.every = 1
        elements = settings.initial_rank * sum(s.in_features + 1 + s.out_features for s in slots.values())
        device = next(iter(slots.values())).weight.device
        self.register_buffer("importance", torch.zeros(elements, device=device))
        self.register_buffer("uncertainty", torch.zeros(elements, device=device))

    def ranks(self, layers: Layers) -> dict[str, int]:
        return {layer.slot.name: int(layer.kept.sum()) for layer in self.own(layers)}

    def penalty(self, layers: Layers) -> Tensor | None:
        """γ/(2L) Σ (‖A Aᵀ − I‖ + ‖Bᵀ B − I‖) over all L layers, in Frobenius norms (paper's equation 4).

        Pruned triplets count too, as they do in PEFT.
        """
        if self.settings.orthogonality == 0:
            return None
        same: dict[torch.Size, list[Tensor]] = {}
        for layer in self.own(layers):
            for rows in (layer.A, layer.B.mT):
                same.setdefault(rows.shape, []).append(rows)
        total = self.importance.new_zeros(())
        with torch.autocast(total.device.type, enabled=False):
            for shape, group in same.items():
                rows = torch.stack(group)
                error = rows @ rows.mT - torch.eye(shape[0], dtype=rows.dtype, device=rows.device)
                norms = torch.linalg.vector_norm(error, dim=(1, 2))
                total = total + (norms.square() if self.settings.squared else norms).sum()
        return self.settings.orthogonality / (2 * len(self.slots)) * total

    def plan(self, steps: int) -> None:
        given = self.settings
        self.steps = steps
        self.initial_steps = steps // 10 if given.initial_steps is None else given.initial_steps
        self.final_steps = 4 * steps // 10 if given.final_steps is None else given.final_steps
        self.every = max(1, steps // 100) if given.every is None else given.every
        last = steps - self.final_steps  # the step that fixes the pattern, by what was observed before it
        if self.initial_steps >= last or (last < 2 and given.target_rank < given.initial_rank):
            raise UserError(
                f"AdaLoRA: the budget phases initial_steps, {self.initial_steps}, and final_steps, {self.final_steps}, "
                f"leave no steps to score and prune in: the run has {steps} steps."
            )
        exact = torch.promote_types(self.importance.dtype, torch.float32)  # squares of sensitivities need its range
        self.importance, self.uncertainty = self.importance.to(exact), self.uncertainty.to(exact)

    def budget(self, step: int) -> int:
        """b(t), triplets of all layers that are left after step t (paper's equation 12)."""
        start, end = self.initial_steps, self.steps - self.final_steps
        initial, target = (r * len(self.slots) for r in (self.settings.initial_rank, self.settings.target_rank))
        if step <= start:
            return initial
        return int((initial - target) * (1 - (min(step, end) - start) / (end - start)) ** 3 + target)

    @torch.no_grad()
    def after_step(self, step: int, layers: Layers) -> None:
        own, end = self.own(layers), self.steps - self.final_steps
        if step < end:
            self.observe(own)
        if step == end or (self.initial_steps < step < end and step % self.every == 0):
            kept = self.prune(own, self.budget(step))
            if step == end:
                for layer, mask in zip(own, kept, strict=True):
                    layer.kept.copy_(mask)
                self.importance.zero_()
                self.uncertainty.zero_()
        elif step > end:
            for layer in own:
                layer.E.masked_fill_(~layer.kept[:, None], 0)

    def observe(self, own: Sequence[AdaLoRALayer]) -> None:
        """Smooths sensitivities I = |p ∂L/∂p| and their uncertainty (paper's equations 8 to 10)."""
        parameters = parameters_of(own)
        dtype = self.importance.dtype
        values = torch.cat([p.flatten() for p in parameters]).to(dtype)
        gradients = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in parameters])
        sensitivity = (values * gradients.to(dtype)).abs_()
        sensitivity.nan_to_num_(0.0, posinf=0.0)  # those of a step that gradient scaling left out
        self.importance.lerp_(sensitivity, 1 - self.settings.beta1)
        self.uncertainty.lerp_(sensitivity.sub_(self.importance).abs_(), 1 - self.settings.beta2)

    def scores(self, own: Sequence[AdaLoRALayer]) -> list[Tensor]:
        """S of every triplet, (r,) a layer: the element's score Ī Ū of E, and its means over A and B (equation 7)."""
        parameters = parameters_of(own)
        elements = (self.importance * self.uncertainty).split([p.numel() for p in parameters])
        a, e, b = ([s.view(p.shape) for s, p in zip(elements[i::3], parameters[i::3], strict=True)] for i in range(3))
        return [e_l.flatten() + (a_l.mean(1) + b_l.mean(0)) for a_l, e_l, b_l in zip(a, e, b, strict=True)]

    def prune(self, own: Sequence[AdaLoRALayer], budget: int) -> list[Tensor]:
        """Sets E to 0 where scores are lowest; gives what is kept, (r,) booleans a layer."""
        surplus, scores = self.settings.initial_rank * len(own) - budget, self.scores(own)
        threshold = torch.cat(scores).kthvalue(surplus).values if surplus > 0 else -math.inf
        kept = [~(score <= threshold) for score in scores]
        for layer, keep in zip(own, kept, strict=True):
            layer.E.masked_fill_(~keep[:, None], 0)
        return kept


def parameters_of(layers: Sequence[AdaLoRALayer]) -> list[nn.Parameter]:
    """A, E, B, A, E, B, ..."""
    return [p for layer in layers for p in (layer.A, layer.E, layer.B)]
