"""Tables of images: CSV in its dialects, and Parquet; one image a row, columns by their usual names."""

import csv
import hashlib
import io
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from kshot.data.layouts import part_of
from kshot.data.readers import NO_SHARE, divided, list_content
from kshot.data.splits import PARTS, TEST_SHARE, Row, Split, check_path, make_split, shown
from kshot.errors import UserError
from kshot.files import file_content

_PATHS = ("path", "file", "image", "img", "filename", "filepath", "imagename", "imagepath", "imgname", "imgpath")
COLUMNS = {  # by what they hold, the likeliest name first; all are compared without blanks, - and _
    "path": _PATHS,
    "label": ("label", "class", "category", "target", "labels", "classid", "labelid", "classname", "labelname"),
    "split": ("split", "part", "set", "subset", "fold", "partition", "usage"),
    "class_name": ("classname", "labelname"),
}
SEPARATORS = ",;\t|"
Table = list[tuple[int, dict[str, str]]]  # number of the line, and its cells by what they hold


def split_from_table(
    path: str | Path, classes: Sequence[str] | None = None, test_share: float | None = TEST_SHARE
) -> Split:
    """Reads a CSV, TSV or Parquet file with a row an image: columns with its path and label, and maybe part and class.

    ``COLUMNS`` are their names, in any case. Paths are relative to the file's folder or to the data root. Labels are
    integers 0 to C-1, or class names, which are then numbered in sorted order. ``classes`` are other names in label
    order. Parts are spelled in any way; without them the images are ``divided``. The digest is the file's.

    Raises UserError for no such file, a column that is missing, a value that is wrong (with its line number), fewer
    ``classes`` than labels, or a rule of ``make_split`` that is broken.
    """
    path = Path(path)
    if path.suffix.lower() == ".parquet":
        content = file_content(path)
        header, lines = _parquet(path, content)
    else:
        content = list_content(path, f"{SEPARATORS}\n\r")
        header, lines = _csv(path, content)
    texts = sorted({line["label"] for _, line in lines})
    numbered = all(re.fullmatch(r"[0-9]{1,18}", text) for text in texts)
    labels = {text: int(text) if numbered else position for position, text in enumerate(texts)}
    parts: dict[str, list[Row]] = {part: [] for part in PARTS}
    for number, line in lines:
        where = f"{path}, line {number}"
        place = check_path(line["path"], where)
        text, part = line["label"], part_of(line.get("split", "train"))
        if not text or part is None:
            wrong = "label" if part else "split"
            raise UserError(f"{where}: {wrong} {shown(line[wrong])} is none; split is train, val or test")
        label = labels[text]
        if classes is not None and label >= len(classes):
            raise UserError(f"{where}: label {label}, but there are {len(classes)} class names")
        itself = str(label) if numbered else text
        class_name = classes[label] if classes is not None else line.get("class_name") or itself
        parts[part].append(Row(place, label, class_name))
    notes = []
    if "split" not in header:
        rows = sorted(parts["train"], key=lambda row: (row.label, row.path))
        parts, note = divided(rows, test_share, str(path)) if rows else (parts, "")
        notes.append(note)
    elif test_share != TEST_SHARE:
        raise UserError(f"{path}: {NO_SHARE}")
    # The name carries the folder, as many tables are called items.csv or labels.csv.
    name = f"{path.resolve().parent.name}-{path.stem}"
    split = make_split(name, parts, file=path.name, sha256=hashlib.sha256(content).hexdigest())
    return replace(split, notes=tuple(notes))


def _columns(names: Sequence[str], path: Path) -> dict[str, int]:
    """Positions of the columns by what they hold; raises UserError without a path or a label."""
    header = [re.sub(r"[\s_-]", "", name.lower()) for name in names]
    found = {
        what: header.index(name)
        for what, known in COLUMNS.items()
        if (name := next((name for name in known if name in header), None)) is not None
    }
    for what in ("path", "label"):
        if what not in found:
            usual = ", ".join(COLUMNS[what][:4])
            wanted = "the header must have path,label[,split][,class_name]"
            raise UserError(f"{path}: no column {what!r} ({usual}, ...); {wanted}")
    return found


def _csv(path: Path, content: bytes) -> tuple[dict[str, int], Table]:
    try:
        text = io.TextIOWrapper(io.BytesIO(content), "utf-8-sig", newline="")
        first = text.readline()
        text.seek(0)
        reader = csv.reader(text, delimiter=max(SEPARATORS, key=first.count))
        columns = _columns(next(reader, []), path)
        return columns, [
            (reader.line_num, {name: line[i].strip() if i < len(line) else "" for name, i in columns.items()})
            for line in reader
            if line
        ]
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path}: not a CSV file ({error})") from None


def _parquet(path: Path, content: bytes) -> tuple[dict[str, int], Table]:
    from pyarrow import parquet

    try:
        file = parquet.ParquetFile(io.BytesIO(content))
        columns = _columns(file.schema_arrow.names, path)
        chosen = {what: file.schema_arrow.names[i] for what, i in columns.items()}
        values: dict[str, list[Any]] = file.read(columns=sorted(set(chosen.values()))).to_pydict()
    except (OSError, ValueError) as error:  # pyarrow's own are both
        raise UserError(f"{path}: not a Parquet file ({' '.join(str(error).split())[:200]})") from None
    cells = {
        what: ["" if value is None else str(value).strip() for value in values[name]] for what, name in chosen.items()
    }
    rows = [dict(zip(cells, row, strict=True)) for row in zip(*cells.values(), strict=True)]
    return columns, list(enumerate(rows, 1))
