"""What a run asks for and this machine does not have, or would wait for without an end, is refused in one line."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from lightning.fabric.plugins.environments import (
    LSFEnvironment,
    MPIEnvironment,
    SLURMEnvironment,
    TorchElasticEnvironment,
)
from lightning.pytorch.accelerators import AcceleratorRegistry
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import Logger
from lightning.pytorch.strategies import (
    DDPStrategy,
    DeepSpeedStrategy,
    SingleDeviceStrategy,
    Strategy,
    StrategyRegistry,
    XLAStrategy,
)
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from kshot.config import Tree
from kshot.errors import UserError, nearest_first
from kshot.layering import DURATION, listed
from kshot.making import made
from kshot.places import Place, named

PARTS_OF_TRAINER = {"callbacks": Callback, "logger": Logger}
LAUNCHERS = (TorchElasticEnvironment, SLURMEnvironment, LSFEnvironment, MPIEnvironment)


def check(model: Tree, trainer: Tree) -> None:
    """Raises UserError for what is not there: accelerators, devices, strategies, callbacks, loggers, targets."""
    registered = AcceleratorRegistry.available_accelerators()
    able = ["auto", *(name for name in sorted(registered) if AcceleratorRegistry[name]["accelerator"].is_available())]
    able += ["gpu"] if {"cuda", "mps"} & set(able) else []
    chosen, strategy = trainer.get("accelerator", "auto"), trainer.get("strategy", "auto")
    if isinstance(chosen, str) and chosen not in able:
        raise UserError(f"trainer.accelerator is {chosen}, and on this machine it may be {' or '.join(able)}.")
    registered_strategies = {name: StrategyRegistry[name] for name in StrategyRegistry.available_strategies()}
    if isinstance(strategy, dict):
        kind = named(strategy["class_path"], (Strategy,), "trainer.strategy")
        check_strategy(kind, class_name(strategy), strategy.get("init_args") or {})
    elif strategy in registered_strategies:
        found = registered_strategies[strategy]
        check_strategy(found["strategy"], strategy, found["init_params"])
    elif isinstance(strategy, str) and strategy != "auto":
        known = ["auto", "single_device", *(name for name in registered_strategies if name.startswith("ddp"))]
        raise UserError(f"trainer.strategy: there is no {strategy!r}. {nearest_first(strategy, known)}")
    if isinstance(trainer.get("devices"), list) and "gpu" not in able:
        raise UserError(f"trainer.devices is {trainer['devices']}, and only GPUs are numbered: give how many, or auto.")
    nodes = str(trainer.get("num_nodes"))
    launched = "MASTER_ADDR" in os.environ or any(kind.detect() for kind in LAUNCHERS)
    if nodes.isdecimal() and int(nodes) > 1 and not launched and not trainer.get("plugins"):
        raise UserError(
            f"trainer.num_nodes is {nodes}, and nothing says where the others are, for which this one would wait: "
            f"start all by torchrun --nnodes {nodes} or SLURM, or set MASTER_ADDR, MASTER_PORT and NODE_RANK on each."
        )
    duration = trainer.get("max_time")
    if isinstance(duration, list) or (isinstance(duration, dict) and not set(duration) <= set(DURATION)):
        raise UserError(f"trainer.max_time takes {', '.join(DURATION)}, and is given {duration}.")
    if model.get("adapter") and model.get("targets", True) == []:
        raise UserError(f"model.targets is empty, and {class_name(model['adapter'])} would change nothing: *.[qkv]?")
    for name, kind in PARTS_OF_TRAINER.items():
        for each in listed(trainer.get(name)):
            if isinstance(each, dict):
                check_part(f"trainer.{name}", kind, each)


def check_strategy(kind: type, name: str, settings: Mapping[str, Any]) -> None:
    """Raises UserError for a way to use several devices other than DDP, by its class, name and settings.

    Where each device has a part of the backbone, a step of one waits for the others: test images, divided without
    doubling one, and features that a store has of some make these steps unequal, and merging needs whole weights.
    Processes that Lightning forks or spawns take what they learnt with them.
    """
    if not issubclass(kind, (SingleDeviceStrategy, DDPStrategy)) or issubclass(kind, (DeepSpeedStrategy, XLAStrategy)):
        raise UserError(
            f"trainer.strategy is {name}, and each device needs the whole backbone, with whose weights adapters are "
            "merged: --trainer.strategy ddp. Less memory take --trainer.precision bf16-true, and a smaller "
            "--data.batch_size with more --trainer.accumulate_grad_batches."
        )
    if settings.get("start_method", "popen") != "popen":
        raise UserError(
            f"trainer.strategy is {name}, whose processes would end with what they learnt: --trainer.strategy ddp."
        )


def check_part(where: str, kind: type, spec: Tree) -> None:
    """Builds a callback or a logger on trial; raises UserError with what it refuses, lacks, or watches in vain."""
    monitor = spec["init_args"].get("monitor") or "val/acc"
    if monitor != "val/acc" and not monitor.startswith("train/"):
        raise UserError(f"{where}: {class_name(spec)} watches {monitor!r}; a run logs val/acc and train/loss.")
    try:
        made(Place(bases=(kind,)), spec)
    except (ImportError, TypeError, ValueError, MisconfigurationException) as error:
        said = str(error).strip().splitlines()[-1].strip()
        raise UserError(f"{where}: {class_name(spec)} cannot be made: {said:.300}") from error


def class_name(value: Tree) -> str:
    """The last part of a class_path."""
    return str(value["class_path"].rpartition(".")[2])
