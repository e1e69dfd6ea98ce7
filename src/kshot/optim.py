"""Optimizers and learning-rate schedules as a YAML names them: a class and its settings, without run-time arguments."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Protocol

from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler


class OptimizerFactory(Protocol):
    """Any class of ``torch.optim`` but for its parameters."""

    def __call__(self, params: Iterable[nn.Parameter]) -> Optimizer:
        """Builds the optimizer."""
        ...


class ScheduleFactory(Protocol):
    """A schedule but for its optimizer and the number of steps, which the run knows."""

    def __call__(self, optimizer: Optimizer, total_steps: int) -> LRScheduler:
        """Builds the schedule; it is stepped once per optimizer step."""
        ...


class WarmupCosine(LambdaLR):
    """Linear warm-up, then half a cosine (SGDR without restarts, Loshchilov & Hutter 2017), per optimizer step.

    Args:
        optimizer: its learning rates are the peaks.
        total_steps: optimizer steps in the run.
        warmup_steps: steps before the peak; the first runs at peak / (warmup_steps + 1).
        floor: final rate as a fraction of the peak.
    """

    def __init__(self, optimizer: Optimizer, total_steps: int, warmup_steps: int = 0, floor: float = 0.0) -> None:
        def factor(step: int) -> float:
            if step < warmup_steps:
                return (step + 1) / (warmup_steps + 1)
            progress = min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))
            return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress))

        super().__init__(optimizer, factor)
