"""What a run leaves behind: its directory, result.json, per-class accuracies, predictions, and the closing table."""

from __future__ import annotations

import csv
import json
import platform
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kshot import __version__
from kshot.errors import UserError

LIBRARIES = ("torch", "lightning", "open_clip_torch", "timm", "torchvision", "torchmetrics", "jsonargparse")


@dataclass
class RunOptions:
    """Where a run keeps its files, and whether fit ends with a test.

    Args:
        root: folder of all runs.
        name: folder of this kind of run; by default the names of its configs.
        save_every: seconds between files to resume from, written at ends of epochs.
        test: test after fit.
    """

    root: str = "runs"
    name: str | None = None
    save_every: float = 10.0
    test: bool = True


def new_directory(root: Path, name: str) -> Path:
    """Makes ``root/name/NNN``, the next number that is free; an existing directory is never taken.

    Raises:
        UserError: the folder cannot be made.
    """
    parent = root / name
    try:
        parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"Runs cannot be kept in {parent} ({error}): choose another --run.root.") from error
    number = max((int(p.name) for p in parent.iterdir() if p.name.isdigit()), default=0)
    while True:
        number += 1
        try:
            (parent / f"{number:03d}").mkdir()
        except FileExistsError:  # another process took it
            continue
        return parent / f"{number:03d}"


def git_commit() -> str | None:
    """The commit of the checkout that kshot runs from, with ``-dirty`` when files differ; None outside a checkout."""
    folder = Path(__file__).parent
    try:
        described = subprocess.run(
            ["git", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return described.stdout.strip() or None


def versions() -> dict[str, str]:
    """Versions of kshot, Python and the libraries that decide results."""
    found = {"kshot": __version__, "python": platform.python_version()}
    for library in LIBRARIES:
        try:
            found[library] = version(library)
        except PackageNotFoundError:
            found[library] = "absent"
    return found


def peak_memory_bytes() -> int:
    """Most memory held so far: on the accelerator when there is one, else by the process."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return int(torch.cuda.max_memory_allocated())
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # kilobytes on Linux, bytes on macOS


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Writes indented JSON."""
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def write_per_class(path: Path, sets: Iterable[tuple[str, Sequence[str], Sequence[float]]]) -> None:
    """Writes ``test_set,label,class_name,accuracy`` rows from names of test sets, their classes and accuracies."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["test_set", "label", "class_name", "accuracy"])
        for test_set, class_names, accuracy in sets:
            for label, name in enumerate(class_names):
                writer.writerow([test_set, label, name, f"{accuracy[label]:.6f}"])


def harmonic_mean(base: float, new: float) -> float:
    """H = 2 b n / (b + n) of the accuracies on base and new classes (Xian et al. 2017; Zhou et al. 2022)."""
    return 2 * base * new / (base + new) if base + new else 0.0


def summary(protocol: str, tested: Mapping[str, Mapping[str, float]], metric: str = "acc") -> dict[str, float]:
    """The one figure in which a protocol ends, by name; nothing for all-to-all.

    Args:
        protocol: of the data.
        tested: results by test set, the classes trained on first.
        metric: ``acc`` or ``zero_shot_acc``.
    """
    values = [results[metric] for results in tested.values() if metric in results]
    if len(values) < 2:
        return {}
    if protocol == "base-to-new":
        return {"harmonic_mean": harmonic_mean(values[0], values[1])}
    return {"targets_mean": sum(values[1:]) / len(values[1:])}


def base_to_new_over_runs(runs: Sequence[tuple[float, float]]) -> dict[str, float]:
    """Mean base and new accuracy over runs, and H in both ways that tables give it.

    The harmonic mean of the averages is what the field prints in its average rows; the average of the runs' own
    harmonic means is lower.

    Args:
        runs: accuracies on base and new classes of each run.
    """
    base, new = (sum(values) / len(runs) for values in zip(*runs, strict=True))
    return {
        "base": base,
        "new": new,
        "h_of_averages": harmonic_mean(base, new),
        "average_of_h": sum(harmonic_mean(*run) for run in runs) / len(runs),
    }


def write_predictions(
    path: Path, paths: Sequence[str], batches: Iterable[tuple[Tensor, Tensor]], class_names: Sequence[str], top_k: int
) -> None:
    """Writes ``path,label_1,probability_1,...`` rows, best first.

    Args:
        path: the CSV file.
        paths: of the images, by position.
        batches: positions, (B,), and probabilities, (B, classes).
        class_names: in label order.
        top_k: labels a row, at most the number of classes.
    """
    k = min(top_k, len(class_names))
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["path", *(f"{word}_{i + 1}" for i in range(k) for word in ("label", "probability"))])
        for positions, probabilities in batches:
            values, labels = probabilities.topk(k, dim=-1)
            for position, ranked, probability in zip(positions.tolist(), labels.tolist(), values.tolist(), strict=True):
                cells = [
                    x for label, p in zip(ranked, probability, strict=True) for x in (class_names[label], f"{p:.6f}")
                ]
                writer.writerow([paths[position], *cells])


def print_table(title: str, rows: Sequence[tuple[str, str]]) -> None:
    """Prints a two-column table on standard output."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, show_header=False, title_justify="left")
    for name, value in rows:
        table.add_row(name, value, style="" if value else "dim")
    Console(soft_wrap=not sys.stdout.isatty()).print(table)


def megabytes(size: float) -> str:
    """A size in MB, three digits."""
    return f"{size / 1e6:.3g} MB" if size < 1e9 else f"{size / 1e9:.3g} GB"
