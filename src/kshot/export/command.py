"""``python main.py export RUN --format FORMAT``: writes a run for other libraries, tries it, and says what differs."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from kshot.data_command import positive
from kshot.errors import UserError, first_line
from kshot.export.check import EXACT, Checked, answers_of, compare, probe_of
from kshot.export.written import Wanted, facts_of
from kshot.files import amount, make_folder, unfinished
from kshot.opening import OpenRun, open_run
from kshot.showing import Parser
from kshot.surroundings import settle_chatter, told_to_stderr

FORMATS = {  # the module that writes each, and what it is
    "merged": "a model of open_clip, timm or Transformers with everything folded into its weights",
    "peft": "an adapter that peft loads onto the untouched model",
    "torch": "a program of torch.export, from images to probabilities",
    "onnx": "the same program for onnxruntime",
    "openvino": "the same program for OpenVINO",
}
MODULES = {"torch": "program"}  # where it is not called as the format
REPORT = "export.json"
DEFAULTS = Wanted()


@told_to_stderr()
def run_export(words: Sequence[str]) -> int:
    """Runs ``export``; returns 0.

    Raises:
        UserError: words that there are not, a run that cannot be opened or written so, or a target that is there.
    """
    given = parser().parse_args(list(words))
    settle_chatter()
    dtype = {"float32": torch.float32, "float16": torch.float16, "int8": torch.float32}[given.dtype]
    wanted = Wanted(given.layout, dtype, given.dtype == "int8", given.lossy, given.rank, given.opset)
    check_wanted(given.format, wanted)
    run = open_elsewhere(Path(given.run), given.weights)
    out, checked = export(run, given.format, given.out, wanted, given.images)
    if given.json:
        print(json.dumps({"out": str(out), "format": given.format} | checked.plain(), indent=1))
        return 0
    size = sum(file.stat().st_size for file in out.rglob("*") if file.is_file())
    print(f"{run.module.method} as {given.format}, {amount(size)}: {out}")
    print(told(checked, given.dtype))
    return 0


def parser() -> argparse.ArgumentParser:
    """The words of the command."""
    about = "; ".join(f"{name}: {what}" for name, what in FORMATS.items())
    found: argparse.ArgumentParser = Parser(prog="main.py export", description=f"Formats: {about}.")
    found.add_argument("run", metavar="RUN", help="a run's directory or checkpoint")
    found.add_argument("--format", required=True, choices=list(FORMATS))
    found.add_argument("--out", type=Path, metavar="FOLDER", help="a new folder (default: RUN/export/FORMAT)")
    layouts = ("native", "transformers")
    found.add_argument("--layout", choices=layouts, default="native", help="whose names weights have (merged, peft)")
    kinds = ("float32", "float16", "int8")
    found.add_argument("--dtype", choices=kinds, default="float32", help="of the tensors; int8: of onnx's weights")
    found.add_argument("--lossy", action="store_true", help="write what is not exact, too, and say by how much")
    found.add_argument("--rank", type=positive, default=16, help="of peft's approximation, with --lossy (default: 16)")
    found.add_argument("--opset", type=positive, default=18, help="of onnx (default: 18)")
    found.add_argument("--weights", metavar="PATH", help="where the backbone's weights are now, if they were moved")
    found.add_argument("--images", type=positive, default=256, help="test images that it is tried on (default: 256)")
    found.add_argument("--json", action="store_true", help="JSON instead of a sentence")
    return found


def export(
    run: OpenRun, form: str, out: Path | None = None, wanted: Wanted = DEFAULTS, count: int = 256
) -> tuple[Path, Checked]:
    """Writes a run in a format to a new folder, which is there as a whole or not at all, and tries what was written.

    Args:
        run: is not changed.
        form: one of ``FORMATS``.
        out: the folder; None takes ``RUN/export/FORMAT``.
        wanted: of the format.
        count: images that it is tried on.

    Returns:
        the folder, and what the output test found.

    Raises:
        UserError: it cannot be written so, is not exact, or may not be written.
    """
    check_wanted(form, wanted)
    name = form if wanted.layout == "native" else f"{form}-{wanted.layout}"
    kind = "int8" if wanted.int8 else str(wanted.dtype).removeprefix("torch.")
    target = out or run.directory / "export" / (name if kind == "float32" else f"{name}-{kind}")
    writer: Any = importlib.import_module(f"kshot.export.{MODULES.get(form, form)}")
    with new_folder(target) as folder:
        answers = writer.write(run, folder, wanted)
        probe = probe_of(run, count)
        checked = compare(run, answers_of(run, probe.images), answers, probe)
        exact = kind == "float32" and not wanted.lossy
        if exact and not checked.relative <= EXACT:
            raise UserError(f"What was written is not the run: {told(checked, kind)} --lossy writes it all the same.")
        report = {"format": form, "layout": wanted.layout, "dtype": kind, "lossy": wanted.lossy} | facts_of(run)
        text = json.dumps(report | {"check": checked.plain()}, indent=2, ensure_ascii=False) + "\n"
        (folder / REPORT).write_text(text, encoding="utf-8")
    return target, checked


def told(checked: Checked, kind: str) -> str:
    """What the output test found, in a sentence."""
    said = (
        f"On {checked.images}, {kind}: logits differ by at most {checked.logits:.2g} ({checked.relative:.2g} of the "
        f"largest), probabilities by {checked.probabilities:.2g}; {checked.agreement:.2%} of the labels are the same."
    )
    if checked.accuracy is None or checked.accuracy_of_run is None:
        return said
    return f"{said} Accuracy {checked.accuracy:.2%}, the run's {checked.accuracy_of_run:.2%}."


def check_wanted(form: str, wanted: Wanted) -> None:
    """Raises UserError for options that a format has not."""
    wrong = ""
    if wanted.int8 and form != "onnx":
        wrong = "--dtype int8 is of --format onnx"
    elif wanted.layout != "native" and form not in ("merged", "peft"):
        wrong = f"--layout is of --format merged and peft: {form} has no names of weights"
    if wrong:
        raise UserError(f"export: {wrong}.")


def open_elsewhere(path: Path, weights: str | None) -> OpenRun:
    """Opens a run; raises UserError that asks for the backbone's weights where they are not what they were."""
    words: list[str] = []
    if weights is not None:
        tree = config_of(path)
        kind = str(tree["class_path"]).rpartition(".")[2]
        named = {"Timm": "weights", "OpenClip": "pretrained"}.get(kind)
        if named is None:
            raise UserError(f"--weights is of a backbone of open_clip or timm, and {path} has {kind}.")
        if kind == "OpenClip" and tree["init_args"].get("pretrained") is None:
            named = "model"
        words = [f"--model.backbone.{named}", weights]
    else:
        tree = config_of(path)
        for place in moved(tree):
            raise UserError(
                f"The weights of the run's backbone are not in {place} any more: say where they are, as --weights PATH."
            )
    return open_run(path, *words)


def config_of(path: Path) -> dict[str, Any]:
    """The backbone in a run's config.yaml, as it stands there."""
    from kshot.config import read_config
    from kshot.opening import CONFIG, parts_of_run

    directory, _ = parts_of_run(path)
    backbone = read_config(directory / CONFIG).get("model", {}).get("init_args", {}).get("backbone")
    if not isinstance(backbone, dict) or "class_path" not in backbone:
        raise UserError(f"{directory / CONFIG} names no backbone.")
    return {"init_args": {}} | backbone


def moved(backbone: dict[str, Any]) -> Iterator[str]:
    """Files and folders that a backbone's settings name, and which are not there."""
    for name in ("weights", "pretrained", "model"):
        value = str(backbone["init_args"].get(name) or "")
        place = Path(value.removeprefix("local-dir:")).expanduser()
        is_path = value.startswith("local-dir:") or (name != "model" and (place.suffix or os.sep in value))
        if is_path and not place.exists():
            yield str(place)


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """A folder to write to, which gets its name when all is written; on a failure nothing of it is left.

    Raises:
        UserError: there is something of that name, or the disk refuses.
    """
    if os.path.lexists(target):
        raise UserError(f"{target} exists already, and nothing is overwritten: choose another --out.")
    beside = unfinished(target)
    try:
        make_folder(target.parent)
        beside.mkdir()
        yield beside
        beside.rename(target)
    except OSError as error:
        raise UserError(f"{target} cannot be written: {first_line(error)}.") from error
    finally:
        shutil.rmtree(beside, ignore_errors=True)
