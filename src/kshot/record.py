"""What a run leaves behind: its directory, result.json, per-class accuracies, and the closing table.

Every file is the whole one or none: the disk may be full.
"""

from __future__ import annotations

import math
import platform
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.loggers.logger import Logger

from kshot import __version__, predictions
from kshot.calibration import Calibration
from kshot.classifiers import LinearProbe
from kshot.data.sampling import FewShotDraw
from kshot.errors import UserError
from kshot.features import of_run, version
from kshot.files import amount, write_csv

LIBRARIES = ("torch", "lightning", "open_clip_torch", "timm", "torchvision", "torchmetrics", "jsonargparse")


@dataclass
class RunOptions:
    """Where a run keeps its files, and whether fit ends with a test.

    Args:
        root: folder of all runs.
        name: folder of this kind of run; by default the names of its configs.
        save_every: seconds between files to resume from, written at ends of epochs.
        test: test after fit.
        calibrate: after a fit, find the temperature of probabilities, and what accuracy to expect, by held-out shots;
            a method that takes steps is fitted once more for it, on three quarters of the shots.
    """

    root: str = "runs"
    name: str | None = None
    save_every: float = 10.0
    test: bool = True
    calibrate: bool = True


def new_directory(root: Path, name: str) -> Path:
    """Makes ``root/name/NNN``, the next number that is free; an existing directory is never taken.

    Raises UserError where the folder cannot be made.
    """
    parent = root / name
    try:
        parent.mkdir(parents=True, exist_ok=True)
        number = max((int(p.name) for p in parent.iterdir() if p.name.isdigit()), default=0)
        while True:
            number += 1
            directory = parent / f"{number:03d}"
            with suppress(FileExistsError):  # another process took it
                directory.mkdir()
                return directory
    except OSError as error:
        raise UserError(f"Runs cannot be kept in {parent} ({error}): choose another --run.root.") from error


@contextmanager
def owned(directory: Path) -> Iterator[None]:
    """Has a run directory for this process alone.

    Raises:
        UserError: another one writes there.
    """
    try:
        import fcntl  # not on Windows
    except ModuleNotFoundError:
        yield
        return
    with ExitStack() as stack:
        try:
            lock = stack.enter_context((directory / ".lock").open("a"))
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # gone with the process, however that ends
        except BlockingIOError as error:
            raise UserError(f"{directory} is being written by another process: wait, or start a new run.") from error
        except OSError as error:
            raise UserError(f"The run directory {directory} cannot be written ({error}).") from error
        yield


def loggers(directory: Path) -> list[Logger]:
    """TensorBoard's log, when it is installed."""
    try:
        distribution("tensorboard")
    except PackageNotFoundError:
        return []
    from lightning.pytorch.loggers import TensorBoardLogger

    return [TensorBoardLogger(directory, name="", version="tensorboard")]


@cache  # of the code that is loaded, whatever becomes of the checkout
def git_commit() -> str | None:
    """The commit of the checkout that kshot runs from, with ``-dirty`` when files differ; None outside a checkout."""
    folder = str(Path(__file__).parent)
    command = ["git", "-C", folder, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        described = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return described.stdout.strip() or None


def versions() -> dict[str, str]:
    """Versions of kshot, Python and the libraries that decide results."""
    found = {"kshot": __version__, "python": platform.python_version(), **dict.fromkeys(LIBRARIES, "absent")}
    for library in LIBRARIES:
        with suppress(PackageNotFoundError):
            found[library] = version(library)
    return found


def peak_memory_bytes() -> int | None:
    """Most memory held so far: on the accelerator when there is one, else by the process; None where none tells."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return int(torch.cuda.max_memory_allocated())
    try:
        import resource  # not on Windows
    except ModuleNotFoundError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # kilobytes on Linux, bytes on macOS


def write_per_class(path: Path, names: Mapping[str, Sequence[str]], accuracy: Mapping[str, Sequence[float]]) -> None:
    """Writes ``test_set,label,class_name,accuracy`` rows from classes and accuracies by test set.

    The cell of a class without images, whose accuracy is not a number, is empty.
    """
    rows: list[Sequence[Any]] = [("test_set", "label", "class_name", "accuracy")]
    for test_set, classes in names.items():
        for label, (name, each) in enumerate(zip(classes, accuracy[test_set], strict=True)):
            rows.append((test_set, label, name, "" if math.isnan(each) else f"{each:.6f}"))
    write_csv(path, rows)


def selection(draw: FewShotDraw) -> str:
    """What decided hyper-parameters: ``fewshot-val``, ``percent-val``, or ``full-val`` for all validation images."""
    if draw.val_shots is not None:
        return "fewshot-val"
    return "percent-val" if draw.sampler.startswith("percent") else "full-val"


def result(module: Any, data: Any, trainer: Any, tested: Any, directory: Path) -> dict[str, Any]:
    """What result.json tells of a FewShotModule and its test on a FewShotDataModule: one row of every table."""
    first: dict[str, float] = next(iter(tested.sets.values()), {})  # of the classes trained on; of none, where untested
    tuned = directory / "tuned.safetensors"
    rates = [group.get("initial_lr", group["lr"]) for o in trainer.optimizers for group in o.param_groups]
    adapter = None if module.adapter is None else module.adapter.settings()
    ranks = {name: rank for shared in module.shared for name, rank in shared.ranks(module.layers).items()}
    return {
        "method": module.method,
        "adapter": adapter and adapter | {"lr": next(reversed(rates), None)},  # a head's rate comes first
        "ranks": ranks or None,
        "head_start": next((part.started for part in module.modules() if isinstance(part, LinearProbe)), None),
        "backbone": module.backbone.name,
        "backbone_sha256": module.backbone.weight_sha256,
        "dataset": data.dataset_name,
        "split": data.split_info(),
        "seed": module.run_seed,
        "protocol": data.protocol,
        **{name: first.get(name) for name in ("acc", "acc_class_mean", "f1_macro", "ece", "ece_before", "brier")},
        "zero_shot_acc": first.get("zero_shot_acc"),
        "test_sets": tested.sets,
        "reliability": tested.reliability,
        **told_ahead(module.calibration),
        "tested": tested.counts,
        "test_images": tested.sizes,
        "left_out": tested.left_out,
        "features": features_of(trainer),
        "kept_tokens": module.kept_tokens,
        "summary": summary(data.protocol, tested.sets),
        "zero_shot_summary": summary(data.protocol, tested.sets, "zero_shot_acc"),
        "per_class": "per_class.csv" if first else None,
        "predictions": predictions.FILE if tested.answers else None,
        "selection": selection(data.draw) if "val" in module.classifier.needs else "none",
        "steps": trainer.global_step,
        "trainable_parameters": sum(p.numel() for p in module.parameters() if p.requires_grad),
        "total_parameters": sum(p.numel() for p in module.parameters()),
        "checkpoint_bytes": tuned.stat().st_size if tuned.is_file() else None,
        "peak_memory_bytes": peak_memory_bytes(),
        "text_parts": getattr(module.backbone, "chunks", None),
        "precision": str(trainer.precision),
        "device": str(torch.cuda.get_device_name() if module.device.type == "cuda" else module.device.type),
        "versions": versions(),
        "git_commit": git_commit(),
    }


def features_of(trainer: Any) -> dict[str, dict[str, int]]:
    """How many views of images the untouched image tower encoded for a run, and how many were there, by part."""
    store = of_run(trainer)
    return {name: dict(sorted(counts.items())) for name, counts in (("encoded", store.encoded), ("read", store.read))}


def harmonic_mean(base: float, new: float) -> float:
    """H = 2 b n / (b + n) of the accuracies on base and new classes (Xian et al. 2017; Zhou et al. 2022)."""
    return 2 * base * new / (base + new) if base + new else 0.0


def summary(protocol: str, tested: Mapping[str, Mapping[str, float]], metric: str = "acc") -> dict[str, float]:
    """The one figure in which a protocol ends, by name; nothing for all-to-all.

    ``tested`` are results by test set, the classes trained on first, and ``metric`` is ``acc`` or ``zero_shot_acc``.
    """
    values = [results[metric] for results in tested.values() if metric in results]
    if len(values) < 2:
        return {}
    if protocol == "base-to-new":
        return {"harmonic_mean": harmonic_mean(values[0], values[1])}
    return {"targets_mean": sum(values[1:]) / len(values[1:])}


def base_to_new_over_runs(runs: Sequence[tuple[float, float]]) -> dict[str, float]:
    """Mean accuracy on base and on new classes over runs of both, and H in both ways that tables give it.

    The harmonic mean of the averages is what the field prints in its average rows; the average of the runs' own
    harmonic means is lower.
    """
    base, new = (sum(values) / len(runs) for values in zip(*runs, strict=True))
    return {
        "base": base,
        "new": new,
        "h_of_averages": harmonic_mean(base, new),
        "average_of_h": sum(harmonic_mean(*run) for run in runs) / len(runs),
    }


def print_result(result: Mapping[str, Any], directory: Path) -> None:
    """Prints the closing table of a run on standard output."""
    from rich.console import Console

    Console(soft_wrap=not sys.stdout.isatty()).print(result_table(result, directory))


def result_table(result: Mapping[str, Any], directory: Path) -> Any:
    """The closing table of a run, for rich to print."""
    from rich.table import Table

    title = f"{result['method']} on {result['dataset']}"
    table = Table(title=title, show_header=False, title_justify="left")
    for row in (*table_rows(result), ("results", str(directory))):
        table.add_row(*row)
    return table


def told_ahead(calibration: Calibration) -> dict[str, Any]:
    """A calibration and its forecast beside each other; None for what there is not."""
    told = calibration.plain()
    forecast = told.pop("forecast")
    return {"calibration": told if calibration.held_out else None, "forecast": forecast}


def rows_ahead(result: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """What the closing table tells of a forecast, of what more images would be worth, and of probabilities."""
    forecast, calibration = result.get("forecast"), result.get("calibration")
    if forecast:
        yield "forecast", f"{forecast['accuracy']:.1%} (95 % interval {forecast['low']:.1%} to {forecast['high']:.1%})"
        more = list(forecast["curve"].items())[1:]
        if more:
            yield "with more", ", ".join(f"{value:.1%} by {shots}" for shots, value in more) + " images a class"
    if calibration and result["ece"] is not None:
        before = f"{result['ece_before']:.1%} before the temperature {calibration['temperature']:.3g}"
        yield "calibration error", f"{result['ece']:.1%} ({before})"


def table_rows(result: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """What the closing table tells of a result, by name."""

    def shown(adapted: float, before: float | None) -> str:
        return f"{adapted:.1%}" + (f" (zero-shot {before:.1%})" if before is not None else "")

    zero_shot, peak = result["zero_shot_acc"], result["peak_memory_bytes"]
    if result["acc"] is None:
        yield "accuracy", "not tested: all images are for training"
    else:
        without = "needs features that texts compare with"
        yield "zero-shot accuracy", without if zero_shot is None else f"{zero_shot:.1%}"
        yield "adapted accuracy", f"{result['acc']:.1%}"
    yield from rows_ahead(result)
    if len(result["test_sets"]) > 1:
        for name, each in result["test_sets"].items():
            yield f"  {name}", shown(each["acc"], each.get("zero_shot_acc"))
        for name, value in result["summary"].items():
            yield f"  {name.replace('_', ' ')}", shown(value, result["zero_shot_summary"].get(name))
    for name, count in result["tested"].items():
        if count < result["test_images"][name]:
            yield "cut short", f"{count} of {result['test_images'][name]} images of {name} (limit_test_batches)"
    for part, count in result["left_out"].items():
        yield "left out", f"{count} unreadable images of {part}"
    encoded, read = (sum(result["features"][name].values()) for name in ("encoded", "read"))
    if encoded or read:
        yield "features", f"{encoded:,} encoded by the untouched tower, {read:,} read (data store)"
    yield "trainable parameters", f"{result['trainable_parameters']:,} of {result['total_parameters']:,}"
    adapter, ranks = result["adapter"] or {}, list((result["ranks"] or {}).values())
    told = ["alpha", "scale", "lr"] + ["wise_alpha"] * (adapter.get("wise_alpha", 1) != 1)
    size = [f"{name} {adapter[name]:.4g}" for name in told if adapter.get(name) is not None]
    if size:  # what decides the size of an update, together
        yield "update", ", ".join(size)
    if ranks:
        yield "ranks", f"{min(ranks)} to {max(ranks)}, mean {sum(ranks) / len(ranks):.1f}"
    yield "seconds", ", ".join(f"{name} {value:.1f}" for name, value in result["seconds"].items())
    if peak is not None:
        yield "peak memory", amount(peak)
