"""A run as its directory holds it, ready to use: the data set that it was trained on may be gone."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from kshot import __version__
from kshot.backbones import Backbone
from kshot.building import backbone_of, data_of, method_of, reading_of
from kshot.callbacks import WeightAverage
from kshot.checkpoint import HEADER, AtomicCheckpoints
from kshot.config import Tree, read_command_line, read_config, read_word
from kshot.data.prediction import PredictionData, of_run
from kshot.errors import UserError
from kshot.module import FewShotModule
from kshot.run import build
from kshot.seeing.hub import located
from kshot.settings import OPTIONS, settings

WEIGHTS, CONFIG, RESULT = "tuned.safetensors", "config.yaml", "result.json"  # of a run directory
HERE = ("--trainer.accelerator", "auto", "--trainer.devices", "1", "--trainer.strategy", "auto")
LOCAL = ("/", "\\", ".safetensors", ".bin", ".pt", ".pth", "local-dir:")  # what tells a path from a name of weights


@dataclass(frozen=True)
class OpenRun:
    """A finished run.

    Attributes:
        directory: of the run.
        module: fitted, on the CPU, in evaluation mode.
        images: how it reads images, with its class names and templates.
        settings: of its config.yaml, whole, and what was laid over them.
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

    A checkpoint of the first format tells no class names: those of its data set are taken, which must be there.

    Args:
        path: the run directory, a folder of runs, of which the last finished one is taken, a checkpoint in a run, or
            ``hf://ORG/NAME`` on Hugging Face's hub.
        options: words of a command line that are laid over its config, as where the backbone's weights are now:
            ``"--model.backbone.weights", "vits14.safetensors"``.

    Raises:
        UserError: it is no run directory, or one of a version that this one cannot read; its files do not fit each
            other; or the backbone's weights are not there.
    """
    directory, weights = parts_of_run(located(path))
    checkpoint = AtomicCheckpoints().load_checkpoint(weights)  # first: a config of a later version may say more
    header = checkpoint.get(HEADER, {})
    try:
        _, tree = settings(
            read_command_line(["test", "--config", str(directory / CONFIG), *HERE, *options], [*OPTIONS])
        )
        backbone = backbone_here(tree, directory)
    except UserError as error:
        if header.get("kshot", __version__) == __version__:
            raise
        raise UserError(f"{error} The run is of kshot {header['kshot']}, and this is {__version__}.") from error
    images = of_run(header, reading_of(tree)) or data_of(tree)
    module = build(backbone, images, int(read_word(tree.get("seed_everything", 1))), **method_of(tree))
    module.on_load_checkpoint(checkpoint)
    with torch.no_grad():
        module.load_state_dict(checkpoint["state_dict"], strict=False)
    take_average(module, checkpoint)
    return OpenRun(directory, module.eval(), images, tree, header, result_of(directory))


def take_average(module: FewShotModule, checkpoint: Mapping[str, Any]) -> None:
    """Puts the mean over the epochs, where a file to resume from has one, in the place of the last epoch's tensors."""
    average = WeightAverage()
    state = checkpoint.get("callbacks", {}).get(average.state_key)
    if state:
        average.load_state_dict(state)
        average.take(module)


def result_of(directory: Path) -> dict[str, Any]:
    """What result.json of a run tells; nothing where there is none."""
    file = directory / RESULT
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}


def backbone_here(tree: Tree, directory: Path) -> Backbone:
    """The backbone of a run; raises UserError that says how to name its weights where they are not where they were."""
    given = tree["model"]["init_args"]["backbone"].get("init_args", {})
    try:
        return backbone_of(tree)
    except UserError as error:
        for name, value in given.items():
            if isinstance(value, str) and any(mark in value for mark in LOCAL) and not value.startswith("hf-hub:"):
                place = Path(value.removeprefix("local-dir:")).expanduser()
                if not place.exists():
                    raise UserError(
                        f"The backbone of {directory} was read from {value}, which is not there: say where it is now, "
                        f"with --model.backbone.{name} PATH."
                    ) from error
        raise


def parts_of_run(path: Path) -> tuple[Path, Path]:
    """The directory and the checkpoint of a run, or of the last finished one of a folder of runs.

    Raises:
        UserError: it is neither.
    """
    if not path.exists():
        raise UserError(f"There is no run {path}.")
    if path.is_file():
        directory = next((each for each in path.parents if (each / CONFIG).is_file()), path.parent)
        weights = path
    else:
        finished = [each for each in path.glob("[0-9]*") if (each / WEIGHTS).is_file() and each.name.isdigit()]
        inside = path if (path / CONFIG).is_file() or not finished else max(finished, key=lambda each: int(each.name))
        directory, weights = inside, inside / WEIGHTS
    if path.is_dir() and (directory / CONFIG).is_file() and not weights.is_file():
        weights = Path(read_config(directory / CONFIG).get("ckpt_path") or weights)  # what a run of test measured
    missing = [file.name for file in (directory / CONFIG, weights) if not file.is_file()]
    if missing:
        raise UserError(f"{path} is no finished run: it has no {' and no '.join(missing)}.")
    return directory, weights
