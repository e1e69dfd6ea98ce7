"""``python main.py runs``: what runs there are, by what they wrote down themselves."""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from kshot.errors import UserError, first_line
from kshot.showing import Parser, show

RESULT = "result.json"
SHARES = ("acc", "acc_class_mean", "f1_macro", "ece", "ece_before", "zero_shot_acc")
COUNTS = ("steps", "trainable_parameters", "total_parameters", "checkpoint_bytes", "peak_memory_bytes")
AGO = {"m": "minutes", "h": "hours", "d": "days", "w": "weeks"}


@dataclass(frozen=True)
class Run:
    """A row of the list; None for what a run does not tell.

    Attributes:
        run: its directory.
        method, data, protocol, backbone: by name.
        shots: a class.
        acc, zero_shot_acc: in [0, 1], on the classes trained on.
        finished: when, in UTC; of runs that do not tell, when the file was written last.
    """

    run: str
    method: str
    data: str
    protocol: str
    backbone: str
    shots: int | None
    seed: int | None
    acc: float | None
    zero_shot_acc: float | None
    finished: str


def run_runs(words: Sequence[str]) -> int:
    """Lists runs that pass all filters, the latest last; returns 0.

    Raises:
        UserError: words that there are not, no such folder, or a time that is none.
    """
    parser = Parser(prog="main.py runs", description="List runs by what they wrote down.")
    parser.add_argument("root", nargs="?", type=Path, default=Path("runs"), help="folder of runs (default: runs)")
    parser.add_argument("--method", help="part of its name, such as lora")
    parser.add_argument("--data", help="part of its name")
    parser.add_argument("--shots", type=int, help="a class")
    parser.add_argument("--min-acc", type=float, metavar="P", help="at least this accuracy, in per cent")
    parser.add_argument("--since", type=moment, metavar="WHEN", help="2026-11-20, or 90m, 12h, 7d, 2w ago")
    parser.add_argument("--sort", choices=("when", "acc", "method", "data", "shots"), default="when")
    parser.add_argument("--json", action="store_true", help="JSON instead of a table")
    given = parser.parse_args(list(words))
    if not given.root.is_dir():
        raise UserError(f"There is no folder of runs {given.root}.")
    kept = [run for run in runs_in(given.root) if passes(run, given)]
    key = "finished" if given.sort == "when" else given.sort
    kept.sort(key=lambda run: ((value := getattr(run, key)) is not None, value))
    if given.json:
        print(json.dumps([asdict(run) for run in kept], indent=1))
        return 0
    rows = [
        (r.run, r.method, r.data, told(r.shots), percent(r.acc), percent(r.zero_shot_acc), r.finished[:16])
        for r in kept
    ]
    show(
        f"{len(kept)} runs in {given.root}", rows, ("run", "method", "data", "shots", "acc", "zero-shot", "when (UTC)")
    )
    return 0


def percent(value: float | None) -> str:
    """A share in per cent; a dash for none."""
    return "-" if value is None else f"{value:.1%}"


def told(value: Any) -> str:
    """A value; a dash for none."""
    return "-" if value is None else str(value)


def moment(text: str) -> str:
    """A time as results have it, from a date or from how long ago it was."""
    ago = re.fullmatch(r"(\d{1,4})([mhdw])", text)
    try:
        then = datetime.now(UTC) - timedelta(**{AGO[ago[2]]: int(ago[1])}) if ago else datetime.fromisoformat(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no time: 2026-11-20, or 90m, 12h, 7d, 2w ago") from None
    return then.astimezone(UTC).isoformat(timespec="seconds")


def passes(run: Run, given: argparse.Namespace) -> bool:
    """Whether a run passes all filters; one that does not tell passes none about it."""
    return (
        (given.method is None or given.method.lower() in run.method.lower())
        and (given.data is None or given.data.lower() in run.data.lower())
        and (given.shots is None or run.shots == given.shots)
        and (given.min_acc is None or (run.acc is not None and 100 * run.acc >= given.min_acc))
        and (given.since is None or run.finished >= given.since)
    )


def run_folders(root: Path, warn: Callable[[str], None]) -> Iterator[Path]:
    """The folders of all finished runs below a folder, or itself; ``warn`` is told what cannot be looked into."""
    for place, folders, files in os.walk(root, onerror=lambda error: warn(f"left out: {error}")):
        folders.sort()
        if RESULT in files:
            folders.clear()
            yield Path(place)


def runs_in(root: Path) -> Iterator[Run]:
    """All finished runs below a folder, or in it; a line on standard error for each that cannot be read."""
    for directory in run_folders(root, warn):
        try:
            yield row_of(directory)
        except UserError as error:
            warn(f"left out: {error}")


def warn(line: str) -> None:
    """Says a line on standard error."""
    print(line, file=sys.stderr)


def result_of(directory: Path) -> dict[str, Any]:
    """What a run says of itself.

    Raises:
        UserError: it is no finished run, or its result cannot be read.
    """
    file = directory / RESULT
    if not file.is_file():
        what = "is no finished run: it has no" if directory.is_dir() else "is not there: there is no"
        raise UserError(f"{directory} {what} {RESULT}.")
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{file} cannot be read ({first_line(error)}).") from error
    if not isinstance(found, dict) or not all(isinstance(found.get(name), str) for name in ("method", "dataset")):
        raise UserError(f"{file} is no result that this kshot reads.")
    return found


def told_by(found: Mapping[str, Any]) -> dict[str, Any]:
    """A result as a flat row: the same columns for all runs, None for what a run does not tell.

    ``acc`` and what is like it lie in [0, 1]; ``seconds`` is the sum over the parts of a run; ``split`` is its digest,
    and ``auto`` what ``--budget`` chose.
    """
    names = ("split", "summary", "forecast", "auto", "seconds", "versions")
    split, summary, forecast, auto, seconds, versions = (inner(found, name) for name in names)
    took = [each for each in seconds.values() if number(each) is not None]
    row = {name: text(found.get(name)) for name in ("method", "dataset", "backbone", "protocol")}
    row |= {"shots": number(split.get("shots")), "seed": number(found.get("seed"))}
    row |= {name: number(found.get(name)) for name in (*SHARES, "brier", *COUNTS)}
    row |= {name: number(summary.get(name)) for name in ("harmonic_mean", "targets_mean")}
    ahead = (("forecast", "accuracy"), ("forecast_low", "low"), ("forecast_high", "high"))
    row |= {name: number(forecast.get(of)) for name, of in ahead}
    row |= {f"seconds_{part}": number(seconds.get(part)) for part in ("fit", "calibrate", "test")}
    row |= {"seconds": sum(took) if took else None, "auto": text(auto.get("words")), "split": text(split.get("digest"))}
    row |= {"device": text(found.get("device")), "kshot": text(versions.get("kshot"))}
    return row | {"git_commit": text(found.get("git_commit")), "finished": text(found.get("finished"))}


def inner(found: Mapping[str, Any], name: str) -> dict[str, Any]:
    """A mapping in a result; an empty one where there is none."""
    return value if isinstance(value := found.get(name), dict) else {}


def number(value: Any) -> Any:
    """A number as it is; None for anything else."""
    return value if isinstance(value, (int, float)) and not isinstance(value, bool) else None


def text(value: Any) -> str | None:
    """Words as they are; None for anything else, and for none."""
    return value if isinstance(value, str) and value else None


def written(directory: Path) -> str:
    """When the result of a run was written, by its file."""
    return datetime.fromtimestamp((directory / RESULT).stat().st_mtime, UTC).isoformat(timespec="seconds")


def row_of(directory: Path) -> Run:
    """The row of a run; raises UserError as :func:`result_of` does."""
    row = told_by(result_of(directory))
    return Run(
        str(directory),
        row["method"] or "",
        data=row["dataset"] or "-",
        protocol=row["protocol"] or "-",
        backbone=row["backbone"] or "-",
        shots=row["shots"],
        seed=row["seed"],
        acc=row["acc"],
        zero_shot_acc=row["zero_shot_acc"],
        finished=row["finished"] or written(directory),
    )
