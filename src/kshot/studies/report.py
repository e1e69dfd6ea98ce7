"""``python main.py report``: a study as a page, its figures as SVG and PDF, its tables as CSV and LaTeX."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from kshot import __version__
from kshot.errors import UserError, first_line
from kshot.files import make_folder, may_be_read, write_atomically, write_csv, write_text
from kshot.showing import Parser
from kshot.studies import axes
from kshot.studies.grid import METRICS, grid_of
from kshot.studies.page import page
from kshot.studies.sections import begin

STUDY = "study.json"
MARK = "report.json"  # in a folder that a report wrote: its files


def run_report(words: Sequence[str]) -> int:
    """Writes the report of a study and prints where it lies; returns 0.

    Raises:
        UserError: words that there are not, no such study, nothing finished, or a folder of something else in its place.
    """
    parser = Parser(prog="main.py report", description="A study as a page, with figures and tables as files.")
    parser.add_argument("study", type=Path, metavar="STUDY", help="its folder, such as studies/digits")
    parser.add_argument("--out", type=Path, help="folder of the report (default: STUDY/report)")
    parser.add_argument("--metric", choices=METRICS, default="acc", help="what is compared (default: acc)")
    parser.add_argument("--baseline", metavar="NAME", help="compare with this contender (default: the best)")
    given = parser.parse_args(list(words))
    study, rows = study_of(given.study)
    out = given.out or given.study / "report"
    check_free(out)
    report = begin(grid_of(rows, study.get("axes") or {}, given.metric), given.baseline)
    html = page(report, rows, study, given.study, shlex.join(["python", "main.py", "report", *words]))
    with replaced(out) as folder:
        write_text(folder / "index.html", html)
        notes = write_figures(folder, report.figures, report.drawn)
        for name, table in report.tables.items():
            write_csv(folder / f"{file_name(name)}.csv", table)
            write_text(folder / f"{file_name(name)}.tex", latex(table))
    for note in notes:
        print(note, file=sys.stderr)
    print(out / "index.html")
    return 0


def study_of(folder: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """What a study says of itself, and its runs.

    Raises:
        UserError: it is none, or cannot be read.
    """
    file = folder / STUDY
    if not file.is_file():
        what = f"has no {STUDY}" if folder.is_dir() else "is not there"
        raise UserError(f"{folder} is no study: it {what}. A sweep makes one: python main.py sweep --config FILE.")
    try:
        study = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{file} cannot be read ({first_line(error)}).") from error
    if not isinstance(study, dict):
        raise UserError(f"{file} is no study that this kshot reads.")
    from kshot.studies.index import rows

    return study, rows(folder)


def write_figures(folder: Path, figures: dict[str, axes.Drawing], more: dict[str, str]) -> list[str]:
    """Writes figures as SVG and PDF; returns what is to be said, once."""
    whole = {name: drawing.svg() for name, drawing in figures.items()} | more
    notes: list[str] = []
    for name, figure in whole.items():
        write_text(folder / f"{name}.svg", axes.file_of(figure))
        if not notes:
            try:
                content = axes.pdf_of(figure)
            except UserError as error:
                notes.append(str(error))
                continue
            write_atomically(folder / f"{name}.pdf", lambda file, content=content: file.write_bytes(content))  # type: ignore[misc]
    return notes


def file_name(name: str) -> str:
    """A name that every file system takes."""
    return re.sub(r"[^\w.+-]+", "_", name)[:100]


def latex(table: Sequence[Sequence[str]]) -> str:
    """A table for LaTeX with booktabs."""
    signs = {c: f"\\{c}" for c in "&%$#_{}"} | {
        "~": r"\textasciitilde{}",
        "^": r"\textasciicircum{}",
        "\\": r"\textbackslash{}",
        "±": r"$\pm$",
        "−": "$-$",
        "–": "--",
        "·": r"$\cdot$",
    }
    rows = [" & ".join("".join(signs.get(c, c) for c in cell) for cell in row) + r" \\" for row in table]
    columns = "l" + "r" * (len(table[0]) - 1)
    return "\n".join(
        [
            rf"\begin{{tabular}}{{{columns}}}",
            r"\toprule",
            rows[0],
            r"\midrule",
            *rows[1:],
            r"\bottomrule",
            r"\end{tabular}",
            "",
        ]
    )


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
