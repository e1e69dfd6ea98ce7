"""Predictions as rows of a file: CSV, JSON lines, Parquet; and images sorted into folders by what was predicted."""

from __future__ import annotations

import csv
import io
import json
import math
import os
import re
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, BinaryIO, Protocol

from kshot.answering import Prediction
from kshot.data.images import fault
from kshot.errors import UserError
from kshot.files import is_formula, make_folder

UNSURE = "_unsure"  # the folder of what is abstained from
ROWS = 4096  # that are written to Parquet at once
Row = dict[str, Any]


def columns(k: int, abstains: bool) -> dict[str, Any]:
    """What a row has: ``path,label_1,probability_1,...,unknown``, and ``abstain`` where that is asked for."""
    ranked = {f"{word}_{i + 1}": kind for i in range(k) for word, kind in (("label", str), ("probability", float))}
    return {"path": str, **ranked, "unknown": float} | ({"abstain": bool} if abstains else {})


def row_of(prediction: Prediction, abstains: bool) -> Row:
    """A prediction by :func:`columns`."""
    row: Row = {"path": prediction.path}
    for i, (label, probability) in enumerate(zip(prediction.labels, prediction.probabilities, strict=True), 1):
        row |= {f"label_{i}": label, f"probability_{i}": probability}
    return row | {"unknown": prediction.unknown} | ({"abstain": prediction.abstain} if abstains else {})


class Predictions(list[Prediction]):
    """What a run says of some images, in their order."""

    def frame(self) -> Any:
        """A pandas.DataFrame with a row an image: ``path, label_1, probability_1, ..., unknown, abstain, error``.

        Raises:
            UserError: pandas is not installed.
        """
        try:
            import pandas as pd  # type: ignore[import-untyped, import-not-found, unused-ignore]
        except ModuleNotFoundError:
            raise UserError("A DataFrame is made by pandas: pip install pandas, or take the list as it is.") from None
        return pd.DataFrame([row_of(each, abstains=True) | {"error": each.error} for each in self])


class Table(Protocol):
    """Takes rows one by one."""

    def add(self, row: Mapping[str, Any]) -> None:
        """Writes a row."""


class CsvRows:
    """Rows as CSV, in the bytes that names of files have; nothing in a cell is a formula to a spreadsheet."""

    def __init__(self, file: BinaryIO, columns: Mapping[str, type]) -> None:
        self.file, self.columns = file, columns

    def __enter__(self) -> CsvRows:
        self.write(self.columns)
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def add(self, row: Mapping[str, Any]) -> None:
        self.write([cell(name, row[name]) for name in self.columns])

    def write(self, cells: Iterable[str]) -> None:
        """Writes a line."""
        line = io.StringIO(newline="")
        csv.writer(line).writerow(cells)
        self.file.write(line.getvalue().encode("utf-8", "surrogateescape"))


def cell(name: str, value: Any) -> str:
    """A cell of CSV: a path that looks like a formula begins with ``./``, another text with an apostrophe."""
    if isinstance(value, bool):
        return "yes" if value else ""
    if isinstance(value, float):
        return f"{value:.6f}" if math.isfinite(value) else ""
    text = str(value)
    if is_formula(text):
        return f"./{text}" if name == "path" else f"'{text}"
    return text


class JsonRows:
    """Rows as JSON, one a line; a name in no known encoding has its bytes as Python's surrogate escapes."""

    def __init__(self, file: BinaryIO, columns: Mapping[str, type]) -> None:
        self.file, self.columns = file, columns

    def __enter__(self) -> JsonRows:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def add(self, row: Mapping[str, Any]) -> None:
        plain = {name: round(value, 6) if isinstance(value, float) else value for name, value in row.items()}
        try:
            line = json.dumps(plain, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            line = json.dumps(plain).encode()
        self.file.write(line + b"\n")


class ParquetRows:
    r"""Rows as Parquet, some thousand at a time; a name in no known encoding has ``\xe9`` for a byte."""

    def __init__(self, file: BinaryIO, columns: Mapping[str, type]) -> None:
        import pyarrow as arrow
        from pyarrow import parquet

        kinds = {str: arrow.string(), float: arrow.float64(), bool: arrow.bool_()}
        self.arrow, self.schema = arrow, arrow.schema([(name, kinds[kind]) for name, kind in columns.items()])
        self.writer, self.rows = parquet.ParquetWriter(file, self.schema), list[Row]()

    def __enter__(self) -> ParquetRows:
        return self

    def __exit__(self, *error: object) -> None:
        self.flush()
        self.writer.close()

    def add(self, row: Mapping[str, Any]) -> None:
        known = {n: v.encode("utf-8", "backslashreplace").decode() if isinstance(v, str) else v for n, v in row.items()}
        self.rows.append(known)
        if len(self.rows) == ROWS:
            self.flush()

    def flush(self) -> None:
        """Writes the rows so far."""
        self.writer.write_table(self.arrow.Table.from_pylist(self.rows, self.schema))
        self.rows = []


class Copies:
    """Copies of images in a folder of each class, and of what is abstained from in ``_unsure``; none replaces another.

    Raises:
        UserError: the folder has something in it, or cannot be written.
    """

    def __init__(self, folder: Path) -> None:
        if os.path.lexists(folder) and not (folder.is_dir() and not any(folder.iterdir())):
            raise UserError(f"--copy-to {folder}: there is something already: choose another folder.")
        self.folder, self.folders = folder, dict[str, Path]()

    def add(self, prediction: Prediction) -> None:
        """Copies an image."""
        source, into = Path(prediction.path), self.folder_of(UNSURE if prediction.abstain else prediction.label)
        place, number = into / source.name, 1
        while os.path.lexists(place):
            number += 1
            place = into / f"{source.stem}_{number}{source.suffix}"
        try:
            shutil.copy2(source, place)
        except OSError as error:
            said = f"{place} cannot be written: {(error.strerror or str(error)).lower()}."
            raise UserError(fault(source) or said) from error

    def folder_of(self, name: str) -> Path:
        """The folder of a class, whose name may be none that a file system takes."""
        if name not in self.folders:
            safe = re.sub(r'[\x00-\x1f/\\:*?"<>|]', "_", name).strip(". ")[:80] or "_"
            taken, number, wanted = {each.name.lower() for each in self.folders.values()}, 1, safe
            while wanted.lower() in taken:
                number += 1
                wanted = f"{safe}_{number}"
            self.folders[name] = make_folder(self.folder / wanted)
        return self.folders[name]


WRITERS: dict[str, Any] = {"csv": CsvRows, "jsonl": JsonRows, "parquet": ParquetRows}
