"""A run as its directory holds it, ready to use: the data set that it was trained on may be gone."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from kshot.building import backbone_of, method_of
from kshot.checkpoint import HEADER, AtomicCheckpoints
from kshot.config import Tree, read_command_line, read_config
from kshot.data.prediction import PredictionData, of_run
from kshot.errors import UserError
from kshot.module import FewShotModule
from kshot.run import build
from kshot.seeing.hub import located
from kshot.settings import OPTIONS, settings

WEIGHTS, CONFIG, RESULT = "tuned.safetensors", "config.yaml", "result.json"  # of a run directory


@dataclass(frozen=True)
class OpenRun:
    """A finished run.

    Attributes:
        directory: of the run.
        module: fitted, on the CPU, in evaluation mode.
        images: how it reads images, with its class names and templates.
        settings: of its config.yaml, whole.
        header: of its checkpoint.
        result: of its result.json; empty where it has none.
    """

    directory: Path
    module: FewShotModule
    images: PredictionData
    settings: Tree
    header: dict[str, Any]
    result: dict[str, Any]


def open_run(path: Path | str, *options: str) -> OpenRun:
    """Opens a run on this machine, whatever it was trained on.

    Args:
        path: the run directory, a checkpoint in it, or ``hf://ORG/NAME`` on Hugging Face's hub.
        options: words of a command line that are laid over its config, as where the backbone's weights are now:
            ``"--model.backbone.weights", "vits14.safetensors"``.

    Raises:
        UserError: it is no run directory, or one of a version that this one cannot read; its files do not fit each
            other; or the backbone's weights are not there.
    """
    directory, weights = parts_of_run(located(path))
    here = ["--trainer.accelerator", "auto", "--trainer.devices", "1", "--trainer.strategy", "auto"]
    words = ["predict", "--config", str(directory / CONFIG), "--ckpt_path", str(weights), *here, *options]
    _, tree = settings(read_command_line(words, list(OPTIONS)))
    checkpoint = AtomicCheckpoints().load_checkpoint(weights)
    header = checkpoint.get(HEADER, {})
    images = of_run(header, tree["data"]["init_args"])
    if images is None:
        raise UserError(f"{weights} has format {header.get('format', 1)}, which tells no class names: test it.")
    module = build(backbone_of(tree), images, int(tree.get("seed_everything", 1)), **method_of(tree))
    module.on_load_checkpoint(checkpoint)
    with torch.no_grad():
        module.load_state_dict(checkpoint["state_dict"], strict=False)
    result = directory / RESULT
    told = json.loads(result.read_text(encoding="utf-8")) if result.is_file() else {}
    return OpenRun(directory, module.eval(), images, tree, header, told)


def parts_of_run(path: Path) -> tuple[Path, Path]:
    """The directory and the checkpoint of a run; raises UserError for what is none."""
    if not path.exists():
        raise UserError(f"There is no run {path}.")
    directory = path
    if path.is_file():
        directory = next((each for each in path.parents if (each / CONFIG).is_file()), path.parent)
    weights = path if path.is_file() else directory / WEIGHTS
    if path.is_dir() and (directory / CONFIG).is_file() and not weights.is_file():
        weights = Path(read_config(directory / CONFIG).get("ckpt_path") or weights)  # what a run of test measured
    missing = [file.name for file in (directory / CONFIG, weights) if not file.is_file()]
    if missing:
        raise UserError(f"{path} is no finished run: it has no {' and no '.join(missing)}.")
    return directory, weights
