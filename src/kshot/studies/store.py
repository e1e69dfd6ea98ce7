"""What a study's directory says of the whole: study.json and plan.jsonl, which any worker reads."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from kshot import __version__
from kshot.errors import UserError, first_line
from kshot.files import write_atomically, write_text
from kshot.studies.claims import HEADER, PLAN, make_folders
from kshot.studies.plan import Planned
from kshot.studies.study import Study, said

FORMAT = 1


@dataclass(frozen=True)
class Header:
    """What study.json says; ``directory`` is where its runs are at home, and relative paths are meant from."""

    format: int
    kshot: str
    torch: str
    name: str
    file: str
    directory: str
    axes: Mapping[str, Sequence[Any]]
    base: Sequence[str]
    options: Mapping[str, Any]


def library() -> str:
    """The release of torch, whatever it was built for."""
    return torch.__version__.partition("+")[0]


def write_study(directory: Path, study: Study, runs: Iterable[Planned]) -> None:
    """Writes the files of a study that begins or goes on.

    Raises:
        UserError: the disk refuses.
    """
    make_folders(directory)
    axes = {axis: [value.label for value in values] for axis, values in study.axes.items()}
    header = Header(
        FORMAT, __version__, library(), study.name, str(study.file), str(Path.cwd()), axes, study.base, study.options
    )
    write_text(directory / HEADER, json.dumps(vars(header), indent=1, ensure_ascii=False, default=str) + "\n")
    lines = (
        json.dumps({"id": r.id, "group": r.group, "axes": r.axes, "words": r.words}, ensure_ascii=False, default=str)
        for r in runs
    )
    write_atomically(directory / PLAN, lambda file: write_lines(file, lines))


def write_lines(path: Path, lines: Iterable[str]) -> None:
    """Writes lines one after the other, of which there may be very many."""
    with path.open("w", encoding="utf-8", newline="\n") as file:
        file.writelines(f"{line}\n" for line in lines)


def read_header(directory: Path) -> Header:
    """Reads study.json, and refuses what this process cannot go on with.

    Raises:
        UserError: there is none, or one of another format, or of another release of kshot or torch.
    """
    file = directory / HEADER
    try:
        told = json.loads(file.read_text(encoding="utf-8"))
        if told["format"] != FORMAT:
            raise UserError(
                f"{file} has the format {told['format']!r:.50}, and this kshot reads {FORMAT}: use another --out."
            )
        header = Header(**{name: told[name] for name in Header.__dataclass_fields__})
    except OSError as error:
        raise UserError(
            f"{directory} is no study: {file.name} {(error.strerror or first_line(error)).lower()}."
        ) from error
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file} is damaged: delete it, and the next sweep writes it anew; results stay.") from error
    begun, here = (header.kshot, header.torch), (__version__, library())
    if begun != here:
        raise UserError(
            f"{directory} was begun by kshot {begun[0]} with torch {begun[1]}, and this is kshot {here[0]} with torch "
            f"{here[1]}: its results would not be comparable. Install those, or choose another --out."
        )
    return header


def read_plan(directory: Path, only: Mapping[str, frozenset[str]] | None = None) -> list[Planned]:
    """Reads plan.jsonl, or the runs in it that have one of the labels of each axis.

    Raises:
        UserError: there is none, or it is damaged.
    """
    file = directory / PLAN
    try:
        with file.open(encoding="utf-8") as lines:
            runs = [Planned(**json.loads(line)) for line in lines]
    except OSError as error:
        raise UserError(f"{file}: {(error.strerror or first_line(error)).lower()}: run sweep first.") from error
    except (ValueError, TypeError) as error:
        raise UserError(f"{file} is damaged: run sweep again, which writes it anew; results stay.") from error
    return [run for run in runs if has(run.axes, only or {})]


def read_record(file: Path) -> dict[str, Any]:
    """Reads what was published of a run; raises UserError where the file is damaged."""
    try:
        record: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        return {"id": record["id"], "axes": record["axes"], "seconds": float(record["seconds"])} | record
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file} is damaged: delete it, and the next sweep does this run again.") from error


def has(axes: Mapping[str, Any], only: Mapping[str, frozenset[str]]) -> bool:
    """Whether a run has one of the labels of each axis."""
    return all(said(axes.get(axis)) in labels for axis, labels in only.items())
