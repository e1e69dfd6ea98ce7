"""Tables as files: CSV and Parquet with values as they are, LaTeX and Markdown with text that nothing in it breaks."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kshot.errors import UserError
from kshot.files import is_formula, write_atomically, write_csv, write_text

TEX = {
    **{sign: f"\\{sign}" for sign in "&%$#_{}"},
    **{"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "±": r"$\pm$"},
    **{"<": r"\textless{}", ">": r"\textgreater{}", "|": r"\textbar{}"},
    **{"[": "{[}", "*": "{*}"},  # which mean something after \\\\
}
MARKDOWN = re.compile(r"([\\`*_{}\[\]<>#|~&$])")


@dataclass(frozen=True)
class Text:
    """A cell of a table to be read.

    Attributes:
        words: what it says.
        bold: whether it stands out.
    """

    words: str
    bold: bool = False


@dataclass(frozen=True)
class Table:
    """A table in both of its forms.

    Attributes:
        header: names of columns, as values.
        rows: of values: numbers, text, None.
        read_header: names of columns, to be read.
        read: rows to be read.
        left: how many columns are of words, from the left.
    """

    header: Sequence[str]
    rows: Sequence[Sequence[Any]]
    read_header: Sequence[str]
    read: Sequence[Sequence[Text]]
    left: int = 1


def write_table(path: Path, table: Table) -> None:
    """Writes a table in the format of the file's name, in the place of one that is there.

    Raises:
        UserError: a name of no known format, or the disk refuses.
    """
    writer_of(path)(path, table)


def writer_of(path: Path) -> Callable[[Path, Table], None]:
    """What writes a file of that name; raises UserError where nothing does."""
    writer = WRITERS.get(path.suffix.lower())
    if writer is None:
        raise UserError(f"--out {path}: its name ends in none of {', '.join(WRITERS)}.")
    return writer


def as_csv(path: Path, table: Table) -> None:
    """Values as CSV, floats to the last bit; nothing in a cell is a formula to a spreadsheet."""
    write_csv(path, ([csv_cell(cell) for cell in row] for row in (table.header, *table.rows)))


def csv_cell(value: Any) -> Any:
    """A value of CSV; a text that looks like a formula begins with an apostrophe."""
    return f"'{value}" if isinstance(value, str) and is_formula(value) else value


def as_parquet(path: Path, table: Table) -> None:
    """Values as Parquet: columns of whole numbers, of numbers, or of text where a value is one."""
    import pyarrow as arrow
    from pyarrow import parquet

    columns = []
    for values in zip(*table.rows, strict=True) if table.rows else ([] for _ in table.header):
        kinds = {type(value) for value in values} - {type(None)}
        if str in kinds:
            columns.append(arrow.array([None if v is None else str(v) for v in values], arrow.string()))
        else:
            columns.append(arrow.array(values, arrow.int64() if kinds == {int} else arrow.float64()))
    whole = arrow.Table.from_arrays(columns, names=list(table.header))
    write_atomically(path, lambda file: parquet.write_table(whole, file))


def as_latex(path: Path, table: Table) -> None:
    """A tabular of booktabs."""
    rest = len(table.read_header) - table.left
    lines = [r"% needs \usepackage{booktabs}", rf"\begin{{tabular}}{{{'l' * table.left}{'r' * rest}}}", r"\toprule"]
    lines += [latex_row(map(Text, table.read_header)), r"\midrule", *map(latex_row, table.read)]
    write_text(path, "\n".join([*lines, r"\bottomrule", r"\end{tabular}", ""]))


def latex_row(cells: Iterable[Text]) -> str:
    """A row of a tabular."""
    escaped = [(cell.bold, "".join(TEX.get(sign, sign) for sign in one_line(cell.words))) for cell in cells]
    return " & ".join(rf"\textbf{{{words}}}" if bold else words for bold, words in escaped) + r" \\"


def as_markdown(path: Path, table: Table) -> None:
    """A table of GitHub's Markdown."""
    line = ["---" if i < table.left else "---:" for i in range(len(table.read_header))]
    rows = [markdown_row(map(Text, table.read_header)), f"| {' | '.join(line)} |", *map(markdown_row, table.read)]
    write_text(path, "\n".join([*rows, ""]))


def markdown_row(cells: Iterable[Text]) -> str:
    """A row of Markdown."""
    escaped = [(cell.bold, MARKDOWN.sub(r"\\\1", one_line(cell.words))) for cell in cells]
    return f"| {' | '.join(f'**{words}**' if bold else words for bold, words in escaped)} |"


def one_line(words: str) -> str:
    """Text without line ends and other signs that are not seen."""
    return "".join(sign if sign.isprintable() else " " for sign in words)


WRITERS: dict[str, Callable[[Path, Table], None]] = {
    ".csv": as_csv,
    ".parquet": as_parquet,
    ".tex": as_latex,
    ".md": as_markdown,
}
