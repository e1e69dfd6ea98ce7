"""What a run asks for and this machine does not have, or would wait for without an end, is refused in one line."""

from __future__ import annotations

import os

from lightning.fabric.plugins.environments import (
    LSFEnvironment,
    MPIEnvironment,
    SLURMEnvironment,
    TorchElasticEnvironment,
)
from lightning.pytorch.accelerators import AcceleratorRegistry
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import Logger
from lightning.pytorch.strategies import StrategyRegistry
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from kshot.config import Tree
from kshot.errors import UserError, nearest_first
from kshot.layering import DURATION, listed
from kshot.making import made
from kshot.places import Place

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
    known = ["auto", *StrategyRegistry.available_strategies()]
    if isinstance(strategy, str) and strategy not in known:
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
