"""Optimizers and learning-rate schedules as a YAML names them: a class and its settings, without run-time arguments."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from itertools import accumulate
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, ReduceLROnPlateau, SequentialLR

from kshot.errors import UserError, first_line, require

STEPS = 90  # of a run whose epochs have one step
WHOLE_RUN = 0  # as T_max of torch's CosineAnnealingLR, which refuses 0: all steps of the run


class OptimizerFactory(Protocol):
    """Any class of ``torch.optim`` but for its parameters."""

    def __call__(self, params: Iterable[nn.Parameter]) -> Optimizer:
        """Builds the optimizer."""
        ...


class AdamW(torch.optim.AdamW):
    """torch's AdamW, whose learning rate may be left to what it trains.

    Args:
        params: tensors, or groups of them.
        lr: None takes each adapter's own by the width of the tower (``Adapter.default_lr``), and 1e-3 for all else.
        weight_decay: times the learning rate, the share that a step takes off.
        options: torch's.
    """

    def __init__(self, params: Any, lr: float | None = None, weight_decay: float = 0.01, **options: Any) -> None:
        super().__init__(params, lr=1e-3 if lr is None else lr, weight_decay=weight_decay, **options)
        self.left_open = lr is None


class ScheduleFactory(Protocol):
    """A schedule but for its optimizer, the number of steps and of steps an epoch, which the run knows.

    Build it by :func:`make_schedule`: torch's own classes take the optimizer alone.
    """

    def __call__(self, optimizer: Optimizer, total_steps: int, steps_per_epoch: int) -> LRScheduler:
        """Builds the schedule; it is stepped once per optimizer step."""
        ...


def make_schedule(
    factory: ScheduleFactory, optimizer: Optimizer, total_steps: int, steps_per_epoch: int
) -> LRScheduler:
    """Builds a schedule with what its class takes of the optimizer, the steps and the steps an epoch.

    Args:
        factory: a class, a function, or either but for these arguments.
        optimizer: whose rates it sets.
        total_steps: optimizer steps in the run.
        steps_per_epoch: optimizer steps in an epoch.

    Raises:
        UserError: the class refuses its settings.
    """
    target = built_by(factory)
    known = {"total_steps": total_steps, "steps_per_epoch": steps_per_epoch}
    named = inspect.signature(target).parameters
    if not any(p.kind is p.VAR_KEYWORD for p in named.values()):
        known = {name: value for name, value in known.items() if name in named}
    if getattr(factory, "keywords", {}).get("T_max") == WHOLE_RUN:
        known["T_max"] = total_steps
    try:
        return factory(optimizer=optimizer, **known)
    except (TypeError, ValueError, ZeroDivisionError) as error:
        name = getattr(target, "__name__", str(target))
        raise UserError(f"model.schedule: {name} refuses its settings: {first_line(error)}.") from error


def staged_schedule(
    factory: ScheduleFactory, optimizer: Optimizer, stages: Sequence[int], steps_per_epoch: int
) -> LRScheduler:
    """A schedule for each stage of a run, one after the other.

    Args:
        factory: of :func:`make_schedule`, as the optimizer and the last.
        optimizer: whose rates it sets.
        stages: optimizer steps of each.
        steps_per_epoch: optimizer steps in an epoch.

    Raises:
        UserError: the class refuses its settings.
    """
    parts = [make_schedule(factory, optimizer, max(1, steps), steps_per_epoch) for steps in stages]
    return parts[0] if len(parts) == 1 else SequentialLR(optimizer, parts, list(accumulate(stages[:-1])))


def scheduling(
    factory: ScheduleFactory,
    optimizer: Optimizer,
    stages: Sequence[int],
    steps_per_epoch: int,
    validates_every: int = 0,
) -> dict[str, Any]:
    """What Lightning is told of a schedule: it is stepped with the optimizer, or by what an epoch measured.

    ReduceLROnPlateau watches ``val/acc``, which is to rise, or ``train/loss`` in a run that does not validate; its
    ``mode`` follows from that, and its ``patience`` counts these measurements.

    Args:
        factory: of :func:`make_schedule`, as the next and the fourth.
        optimizer: whose rates it sets.
        stages: optimizer steps of each stage of the run; what watches goes through them all.
        steps_per_epoch: optimizer steps in an epoch.
        validates_every: epochs from one validation to the next; 0 for a run without.

    Raises:
        UserError: the class refuses its settings.
    """
    if not watches(factory):
        schedule = staged_schedule(factory, optimizer, stages, steps_per_epoch)
        return {"scheduler": schedule, "interval": "step"}
    monitor, mode = ("val/acc", "max") if validates_every else ("train/loss", "min")
    plateau: Any = factory
    schedule = make_schedule(partial(plateau, mode=mode), optimizer, sum(stages), steps_per_epoch)
    when = {"interval": "epoch", "frequency": max(1, validates_every)}
    return {"scheduler": schedule, "reduce_on_plateau": True, "monitor": monitor, **when}


def watches(factory: Callable[..., Any] | None) -> bool:
    """Whether a schedule waits for measurements, as ReduceLROnPlateau does; a run with one should validate."""
    target = None if factory is None else built_by(factory)
    return isinstance(target, type) and issubclass(target, ReduceLROnPlateau)


def built_by(factory: Callable[..., Any]) -> Callable[..., Any]:
    """What a factory calls in the end; Lightning, opening a checkpoint, has jsonargparse's with the class first."""
    while isinstance(factory, partial):
        factory = next((each for each in factory.args if isinstance(each, type)), factory.func)
    return factory


class WarmupCosine(LambdaLR):
    """Linear warm-up, then half a cosine (SGDR without restarts, Loshchilov & Hutter 2017), per optimizer step.

    Args:
        optimizer: its learning rates are the peaks.
        total_steps: optimizer steps in the run.
        steps_per_epoch: optimizer steps in an epoch.
        warmup_steps: steps before the peak; the first of w runs at peak / (w + 1).
        warmup_epochs: epochs before the peak, in addition to these steps.
        floor: final rate as a fraction of the peak.

    Raises:
        UserError: a negative warm-up, a floor outside [0, 1].
    """

    def __init__(
        self,
        optimizer: Optimizer,
        total_steps: int,
        steps_per_epoch: int,
        warmup_steps: int = 0,
        warmup_epochs: float = 0.0,
        floor: float = 0.0,
    ) -> None:
        require("WarmupCosine", "warmup_steps", warmup_steps, warmup_steps >= 0, "be 0 or more")
        require("WarmupCosine", "warmup_epochs", warmup_epochs, 0 <= warmup_epochs < math.inf, "be 0 or more")
        require("WarmupCosine", "floor", floor, 0 <= floor <= 1, "lie in [0, 1]")
        warmup = warmup_steps + round(warmup_epochs * steps_per_epoch)

        def factor(step: int) -> float:
            if step < warmup:
                return (step + 1) / (warmup + 1)
            progress = min(1.0, (step - warmup) / max(1, total_steps - warmup))
            return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress))

        super().__init__(optimizer, factor)


class DasslCosine(LRScheduler):
    """The schedule of CoOp and its successors, as the toolbox Dassl composes it; constant within an epoch.

    In epoch e of E, after w epochs of warm-up, with each parameter group's own rate η::

        warmup_lr                              for e < w
        η (1 + cos(π (e - w) / E)) / 2         for e ≥ w

    The cosine spans E epochs, not E - w, so that the rate does not reach 0.

    Args:
        optimizer: its learning rates are η.
        total_steps: optimizer steps in the run.
        steps_per_epoch: optimizer steps in an epoch.
        warmup_epochs: w.
        warmup_lr: rate of every group while it warms up, whatever its η.

    Raises:
        UserError: a negative warm-up.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        total_steps: int,
        steps_per_epoch: int,
        warmup_epochs: int = 1,
        warmup_lr: float = 1e-5,
    ) -> None:
        require("DasslCosine", "warmup_epochs", warmup_epochs, warmup_epochs >= 0, "be 0 or more")
        require("DasslCosine", "warmup_lr", warmup_lr, 0 <= warmup_lr < math.inf, "be 0 or more")
        self.steps_per_epoch, self.epochs = steps_per_epoch, math.ceil(total_steps / steps_per_epoch)
        self.warmup_epochs, self.warmup_lr = warmup_epochs, warmup_lr
        super().__init__(optimizer)

    def get_lr(self) -> list[float | Tensor]:
        """The rates of the groups at the present step."""
        epoch = self.last_epoch // self.steps_per_epoch - self.warmup_epochs  # torch counts steps as epochs
        if epoch < 0:
            return [self.warmup_lr for _ in self.base_lrs]
        return [0.5 * eta * (1 + math.cos(math.pi * epoch / self.epochs)) for eta in self.base_lrs]


def epochs_for(steps: int) -> int:
    """Epochs of a run for which no length is given: as many as make 90 √n steps, where an epoch has n.

    Fixed epochs shrink to one step each at one shot and take hours where there are many classes; fixed steps see an
    image of many classes once. With 32 images a step, one shot of 7 classes, 16 of them, 16 of 43 and 16 of 1,000 come
    to 90, 52, 20 and 4 epochs.
    """
    return max(1, round(STEPS / math.sqrt(steps)))


def make_optimizer(
    factory: OptimizerFactory,
    groups: Sequence[Mapping[str, Any]],
    head_lr: float | None = None,
    only: Collection[nn.Parameter] | None = None,
    fused: bool = True,
) -> Optimizer:
    """The optimizer over groups of parameters, in torch's fused form where there is one.

    Args:
        factory: makes it.
        groups: each with ``params``; ``weight_decay`` is its own, ``rate`` its learning rate where the optimizer leaves
            that open, ``lr_factor`` multiplies it, and ``head`` lets it take ``head_lr``.
        head_lr: None for the optimizer's.
        only: leave out all other parameters.
        fused: False where the fused form cannot be used.

    Raises:
        UserError: the optimizer refuses its settings.
    """
    wanted = None if only is None else {id(p) for p in only}
    chosen = []
    for group in groups:
        params = [p for p in group["params"] if p.requires_grad and (wanted is None or id(p) in wanted)]
        own = {key: value for key, value in group.items() if key in ("weight_decay", "rate", "lr_factor")}
        own |= {"lr": head_lr} if group.get("head") and head_lr is not None else {}
        chosen += [{"params": params} | own] if params else []
    build: Callable[..., Optimizer] = factory
    try:
        optimizer = build(params=[dict(group) for group in chosen])
    except (TypeError, ValueError) as error:
        name = getattr(built_by(build), "__name__", "it")
        raise UserError(f"model.optimizer: {name} refuses its settings: {first_line(error)}.") from error
    options = optimizer.defaults
    if fused and "fused" in options and not any(options.get(name) for name in ("fused", "foreach", "differentiable")):
        with suppress(RuntimeError, TypeError):  # a device or a dtype without a fused form
            optimizer = build(params=[dict(group) for group in chosen], fused=True)
    for settings in optimizer.param_groups:
        own_rate = settings.pop("rate", None)
        if own_rate is not None and getattr(optimizer, "left_open", False):
            settings["lr"] = own_rate
        settings["lr"] *= settings.pop("lr_factor", 1.0)
    return optimizer
