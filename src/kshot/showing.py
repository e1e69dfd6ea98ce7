"""What commands that take no experiment have in common: the reader of their words, and tables on standard output."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Sequence
from typing import Any, NoReturn

from rich.box import HEAVY_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from kshot.errors import UserError


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, as the other commands do, and takes no abbreviations."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{self.prog.removeprefix('main.py ')}: {message}; --help says what there is.")


def show(title: str, rows: Iterable[Iterable[object]], header: Sequence[str] = ()) -> None:
    """Prints a table on standard output, without lines where that is no terminal."""
    box = HEAVY_HEAD if sys.stdout.isatty() else None
    table = Table(title=title, title_justify="left", box=box, pad_edge=box is not None, show_header=bool(header))
    for column in header:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*(Text(str(cell)) for cell in row))  # Text: a path in brackets is no markup
    console = Console(width=None if box else 1000)  # lines in a file are not broken
    with console.capture() as shown:
        console.print(table)
    print(*(line.rstrip() for line in shown.get().splitlines()), sep="\n")
