"""``python main.py report``: a study as a page, its figures as SVG and PDF, its tables as CSV and LaTeX."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from kshot import __version__
from kshot.errors import UserError, first_line
from kshot.files import make_folder, may_be_read, write_atomically, write_text
from kshot.showing import Parser
from kshot.studies import axes
from kshot.studies.claims import HEADER
from kshot.studies.grid import METRICS, grid_of
from kshot.studies.index import rows
from kshot.studies.page import page
from kshot.studies.sections import begin
from kshot.studies.tables import write_table

MARK = "report.json"  # in a folder that a report wrote: its files


def run_report(words: Sequence[str]) -> int:
    """Writes the report of a study and prints where it lies; returns 0.

    Raises:
        UserError: words that there are not, no such study, nothing finished, or something else where it would lie.
    """
    parser = Parser(prog="main.py report", description="A study as a page, with figures and tables as files.")
    parser.add_argument("study", type=Path, metavar="STUDY", help="its folder, such as studies/digits, or one of runs")
    parser.add_argument("--out", type=Path, help="folder of the report (default: STUDY/report)")
    parser.add_argument("--metric", choices=METRICS, default="acc", help="what is compared (default: acc)")
    parser.add_argument("--baseline", metavar="NAME", help="compare with this contender (default: the best)")
    given = parser.parse_args(list(words))
    study, runs = study_of(given.study)
    out = given.out or given.study / "report"
    check_free(out)
    report = begin(grid_of(runs, study.get("axes") or {}, given.metric), given.baseline)
    html = page(report, runs, study, given.study, shlex.join(["python", "main.py", "report", *words]))
    with replaced(out) as folder:
        write_text(folder / "index.html", html)
        notes = write_figures(folder, report.figures)
        for name, table in report.tables.items():
            for ending in (".csv", ".tex"):
                write_table(folder / f"{file_name(name)}{ending}", table)
    for note in notes:
        print(note, file=sys.stderr)
    print(out / "index.html")
    return 0


def study_of(folder: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """What a study says of itself, nothing for a folder of runs, and its runs.

    Raises:
        UserError: there is none, or it cannot be read.
    """
    file, study = folder / HEADER, {}
    if file.is_file():
        try:
            study = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UserError(f"{file} cannot be read ({first_line(error)}).") from error
    if not isinstance(study, dict) or not isinstance(study.get("axes", {}), dict):
        raise UserError(f"{file} is no study that this kshot reads.")
    return study, rows(folder)


def write_figures(folder: Path, figures: Mapping[str, str]) -> list[str]:
    """Writes figures as SVG and PDF; returns why there are no PDF files, or nothing."""
    for name, figure in figures.items():
        write_text(folder / f"{name}.svg", axes.file_of(figure))
    try:
        for name, figure in figures.items():
            content = axes.pdf_of(figure)
            write_atomically(folder / f"{name}.pdf", partial(Path.write_bytes, data=content))
    except UserError as error:
        return [str(error)]
    return []


def file_name(name: str) -> str:
    """A name that every file system takes."""
    return re.sub(r"[^\w.+-]+", "_", name)[:100]


def check_free(out: Path) -> None:
    """Raises UserError where a folder holds what no report wrote."""
    if not out.exists():
        return
    mine: Any = None
    with may_be_read():
        there = {path.name for path in out.iterdir()} if out.is_dir() else {out.name}
        if MARK in there:
            try:
                mine = json.loads((out / MARK).read_text(encoding="utf-8"))["files"]
            except (ValueError, KeyError, TypeError):
                mine = None
    foreign = sorted(there - {MARK, *mine} if isinstance(mine, list) else there)
    if foreign:
        what = f"holds what no report wrote ({', '.join(foreign[:3])}{', …' if len(foreign) > 3 else ''})"
        raise UserError(f"{out} {what}, and stays as it is: give another --out.")


@contextmanager
def replaced(out: Path) -> Iterator[Path]:
    """Gives a folder beside ``out`` that takes its place at the end, with the list of its files."""
    make_folder(out.parent)
    beside, old = (out.with_name(f".{out.name}.{word}") for word in ("partial", "old"))
    for path in (beside, old):
        shutil.rmtree(path, ignore_errors=True)
    make_folder(beside)
    try:
        yield beside
        files = sorted(path.name for path in beside.iterdir())
        write_text(beside / MARK, json.dumps({"kshot": __version__, "files": files}, indent=1) + "\n")
        with may_be_read():
            if out.exists():
                check_free(out)
                out.rename(old)
            beside.rename(out)
    finally:
        shutil.rmtree(beside, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)
