"""``python main.py results``: the runs of a study, or of a folder, chosen, put into tables and written to files."""

from __future__ import annotations

import argparse
import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from kshot.errors import UserError, nearest_first
from kshot.files import amount
from kshot.seeing.runs import warn
from kshot.showing import Parser, show
from kshot.studies.index import KEYS, Condition, Index, opened
from kshot.studies.pivot import PER_CENT, Pivot, pivoted, shown
from kshot.studies.tables import Table, Text, write_table, writer_of

FILTER = re.compile(r"""\s*([^\s=!<>~,"']+)(!=|<=|>=|=|<|>|~)((?:"[^"]*"|'[^']*'|[^\s"'])+)(?=\s|$)\s*""")
VALUE = re.compile(r"""(?:"[^"]*"|'[^']*'|[^,"'])+""")
READ = ("acc", "ece", "seconds", "state", "run")  # columns of a table that is read, after what the runs differ in
STATES = ("done", "failed", "open")
PRINTED = 200  # rows


def run_results(words: Sequence[str]) -> int:
    """Prints or writes the runs of a study that pass all filters, or means of them; returns 0.

    Raises:
        UserError: no such study, column or format, or a filter that cannot be read.
    """
    given = parser().parse_args(list(words))
    if given.out is not None:
        writer_of(given.out)
    if given.pivot and not 2 <= len(given.pivot) <= 3:
        raise UserError("--pivot takes ROWS COLUMNS, or ROWS COLUMNS VALUE: --pivot method shots acc.")
    if given.pivot and (given.columns or given.sort):
        raise UserError("--pivot says itself what is in rows and columns: leave out --columns and --sort.")
    index = opened(given.study)
    where = conditions(given.where, index)
    for line in (*index.notes, *unheard(index, where)):
        warn(line)
    if given.pivot:
        rows, columns, value = (*given.pivot, "acc")[:3]
        print_pivot(given, pivoted(index, rows.split(","), columns.split(","), value, where))
    else:
        print_runs(given, index, where)
    return 0


def parser() -> Parser:
    """The options."""
    parser = Parser(prog="main.py results", description="Filter, pivot and export the runs of a study or of a folder.")
    parser.add_argument("study", type=Path, help="folder of a study, such as studies/digits, or of any runs")
    parser.add_argument(
        *("--where", "-w"),
        nargs="+",
        action="extend",
        default=[],
        metavar="FILTER",
        help="such as 'method=lora,ridge shots>=4 acc>90%% state!=failed backbone~vit'; ~ is for a part of a word, in "
        "any case; a value with a space or comma stands in quotes",
    )
    parser.add_argument(
        "--columns", metavar="A,B", help="what is shown, by default what the runs differ in, or all of it"
    )
    parser.add_argument("--sort", metavar="A,B", help="columns to sort by, by default the order of the plan")
    parser.add_argument("--reverse", action="store_true", help="the largest first")
    parser.add_argument("--pivot", nargs="+", metavar="COLUMN", help="ROWS COLUMNS [VALUE]: means over seeds, of acc")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write it: .csv, .parquet, .tex or .md")
    parser.add_argument("--json", action="store_true", help="JSON instead of a table")
    return parser


def print_runs(given: argparse.Namespace, index: Index, where: Sequence[Condition]) -> None:
    """Lists runs as rows."""
    whole = given.out is not None or given.json
    columns = given.columns.split(",") if given.columns else list(index.columns) if whole else differing(index, where)
    found = index.select(columns, where, given.sort.split(",") if given.sort else (), given.reverse)
    states = Counter(state for (state,) in index.select(["state"], where))
    told = ", ".join(f"{states[state]:,} {state}" for state in STATES if states[state])
    title = f"{len(found):,} runs in {given.study}" + (f": {told}" if told else "")
    if given.json:
        print(json.dumps([dict(zip(columns, run, strict=True)) for run in found], indent=1, ensure_ascii=False))
    if given.out is None and not given.json:
        print(title)
        show("", [[cell(*each) for each in zip(columns, run, strict=True)] for run in found[:PRINTED]], columns)
        if len(found) > PRINTED:
            print(f"... and {len(found) - PRINTED:,} more: --out FILE.csv has all of them")
    if given.out is not None:
        read = [[Text(cell(*each)) for each in zip(columns, run, strict=True)] for run in found]
        write_table(given.out, Table(columns, found, columns, read))
        warn(f"{title}, written to {given.out}")


def print_pivot(given: argparse.Namespace, pivot: Pivot) -> None:
    """Prints or writes a table of means, and says what has to be said about it."""
    table = pivot.table()
    if given.json:
        print(json.dumps(pivot.plain(), indent=1, ensure_ascii=False))
    if given.out is None and not given.json:
        print(f"{pivot.value} in {given.study}")
        show("", [[each.words for each in row] for row in table.read], table.read_header)
    if given.out is not None:
        write_table(given.out, table)
        warn(f"{len(pivot.cells):,} means of {pivot.value} in {given.study}, written to {given.out}")
    for line in pivot.notes:
        (warn if given.json or given.out is not None else print)(line)


def differing(index: Index, where: Sequence[Condition]) -> list[str]:
    """The columns of what is compared in which runs differ, and of what is found."""
    names = list(dict.fromkeys([*KEYS, *index.axes]))
    runs = index.select([*names, "state"], where)
    counts = [len(set(values)) for values in zip(*runs, strict=True)] or [0] * (len(names) + 1)
    several = {name for name, count in zip([*names, "state"], counts, strict=True) if count > 1}
    return [name for name in names if name in several | {"method"}] + [n for n in READ if n != "state" or n in several]


def conditions(texts: Sequence[str], index: Index) -> list[Condition]:
    """Filters as they are given; raises UserError for one that cannot be read, and for a column that is not there."""
    found: list[Condition] = []
    for text in texts:
        at = 0
        while at < len(text.rstrip()):
            match = FILTER.match(text, at)
            if match is None:
                raise UserError(
                    f"--where: {text[at:].strip()!r:.200} is no filter: COLUMN=VALUE without spaces, such as shots>=4, "
                    "method=lora,ridge or method='TextPrompt + LoRA'; there are = != < <= > >= ~."
                )
            name, how, values = match.groups()
            index.term(name)
            found.append((name, how, compared(name, how, [unquoted(value) for value in VALUE.findall(values)])))
            at = match.end()
    return found


def compared(name: str, how: str, given: list[str]) -> list[Any]:
    """The values of a filter: text, and numbers where it may be one."""
    if how == "~":
        return [",".join(given)]
    numbers = [number(each) for each in given]
    if how in ("=", "!="):
        return [*given, *(each for each in numbers if each is not None)]
    if len(given) != 1:
        raise UserError(f"--where: {name}{how} is compared with one value, not with {','.join(given)!r:.200}.")
    if name in PER_CENT and (numbers[0] is None or not -1 <= numbers[0] <= 1):
        raise UserError(
            f"--where: {name} is a share between 0 and 1, not {given[0]!r:.60}: {name}{how}0.9 or {name}{how}90%."
        )
    return [given[0] if numbers[0] is None else numbers[0]]


def number(text: str) -> float | int | None:
    """A number, also in per cent; None for other words."""
    if not re.fullmatch(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?%?", text):
        return None
    if text.endswith("%"):
        return float(text[:-1]) / 100
    return int(text) if re.fullmatch(r"[-+]?\d{1,18}", text) else float(text)


def unquoted(text: str) -> str:
    """A value without the quotes that it stands in."""
    return text[1:-1] if text[0] in "\"'" and text[-1] == text[0] else text


def unheard(index: Index, where: Sequence[Condition]) -> Iterator[str]:
    """A line for each value of a filter that no run has."""
    for name, how, values in where:
        if how in ("=", "!=") and name != "state":
            known = {shown(value) for value in index.values(name)}
            for value in values:
                if isinstance(value, str) and value not in known and number(value) is None:
                    yield f"No run has {name}={value}. {nearest_first(value, known)}"


def cell(column: str, value: Any) -> str:
    """A value in words: shares in per cent, bytes in megabytes, large numbers with commas."""
    if not isinstance(value, (int, float)):
        return shown(value)
    if column in PER_CENT:
        return f"{value:.1%}"
    if column.endswith("bytes"):
        return amount(value)
    if column.endswith("parameters"):
        return f"{value:,}"
    return f"{value:,.1f}" if column.startswith("seconds") else shown(value)
