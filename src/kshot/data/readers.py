"""Readers: a split from a file in CoOp's format, from a folder of images or from a CSV file."""

import csv
import hashlib
import io
import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kshot.data.splits import PARTS, Row, Split, check_path, listed, make_split, shown, split_bytes, stratify
from kshot.errors import UserError
from kshot.files import file_content, may_be_read

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".ppm", ".pgm", ".tif", ".tiff", ".webp")
PERCENTS = (20, 30)  # of validation and test, where the images are in no parts yet
MOST_VALUES = 6_000_000  # in a list of images, where each takes memory; ImageNet's has five million
_HIDDEN = (".", "__MACOSX")  # left behind by notebooks and archives
_COLUMNS = ("path", "label", "split", "class_name")
_PART_SPELLINGS = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}


def list_content(path: Path, separators: str) -> bytes:
    """Reads a file with a list of images; raises UserError when it cannot be read, or is too large to be one."""
    content = file_content(path)
    if sum(content.count(mark.encode()) for mark in separators) > MOST_VALUES:
        raise UserError(f"{path}: more than {MOST_VALUES:,} values, which no list of images has")
    return content


def parsed_json(content: bytes, path: Path) -> Any:
    """Parses the content of a file; raises UserError when it is not JSON."""
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not JSON ({error})") from None


def read_split_zhou(path: str | Path, name: str | None = None, image_root: str = ".") -> Split:
    """Reads a split in CoOp's format: ``{"train": [[path, label, class name], ...], "val": ..., "test": ...}``.

    Rows of an array data set have an integer instead of the path. Raises UserError when there is no such file, or its
    content breaks a rule of ``make_split``.

    Args:
        path: ``.json`` or ``.json.gz``.
        name: id of the data set; default: the file's name without suffixes.
        image_root: folder below the data set's folder to which the paths refer.
    """
    path = Path(path)
    content = list_content(path, ",:[{")
    data = parsed_json(content, path)
    if not isinstance(data, dict) or not all(isinstance(data.get(part), list) for part in PARTS):
        raise UserError(f"{path}: a split file is one object with the lists 'train', 'val' and 'test'")
    parts = {part: [_row(values, f"{path}, {part} row {i}") for i, values in enumerate(data[part])] for part in PARTS}
    kinds = {type(values[0]) for part in PARTS for values in data[part]}
    if len(kinds) > 1:
        raise UserError(f"{path}: some rows name files and some have an index")
    file = path.name.removesuffix(".gz")
    return make_split(
        name or file.removesuffix(".json"),
        parts,
        file=file,
        sha256=hashlib.sha256(content).hexdigest(),
        image_root=dict.fromkeys(PARTS, image_root),
        item_kind="index" if kinds == {int} else "path",
    )


def _row(values: Any, where: str) -> Row:
    types = [type(value) for value in values] if isinstance(values, list) else []
    if types not in ([str, int, str], [int, int, str]):
        raise UserError(f"{where}: {shown(values)} is not [path, label, class name]")
    path, label, class_name = values
    if isinstance(path, str):
        check_path(path, where)
    elif path < 0:
        raise UserError(f"{where}: the index {path} is negative")
    return Row(str(path), label, class_name)


def split_from_csv(path: str | Path, classes: Sequence[str] | None = None) -> Split:
    """Reads a CSV file with the columns ``path``, ``label`` and, optionally, ``split`` and ``class_name``.

    Paths are relative to the file's folder or to the data root. Labels are integers 0 to C-1, or class names, which are
    then numbered in sorted order. ``classes`` are other names in label order. Without a ``split`` column (``train``,
    ``val`` or ``test``) the images are divided 50/20/30 by ``stratify``.

    Raises UserError for no such file, a column that is missing, a value that is wrong (with its line number), fewer
    ``classes`` than labels, or a rule of ``make_split`` that is broken.
    """
    path = Path(path)
    content = list_content(path, ",\n\r")
    try:
        reader = csv.reader(io.TextIOWrapper(io.BytesIO(content), "utf-8-sig", newline=""))
        header = [column.strip().lower() for column in next(reader, [])]
        columns: dict[str, int] = {name: header.index(name) for name in _COLUMNS if name in header}
        lines = [
            (reader.line_num, {name: line[i].strip() if i < len(line) else "" for name, i in columns.items()})
            for line in reader
            if line
        ]
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path}: not a CSV file ({error})") from None
    for column in ("path", "label"):
        if column not in header:
            raise UserError(f"{path}: no column {column!r}; the header must have path,label[,split][,class_name]")
    texts = sorted({line["label"] for _, line in lines})
    numbered = all(re.fullmatch(r"[0-9]{1,18}", text) for text in texts)
    labels = {text: int(text) if numbered else position for position, text in enumerate(texts)}
    parts: dict[str, list[Row]] = {part: [] for part in PARTS}
    for number, line in lines:
        where = f"{path}, line {number}"
        check_path(line["path"], where)
        text, part = line["label"], _PART_SPELLINGS.get(line.get("split", "train").lower())
        if not text or part is None:
            wrong = "label" if part else "split"
            raise UserError(f"{where}: {wrong} {shown(line[wrong])} is none; split is train, val or test")
        label = labels[text]
        if classes is not None and label >= len(classes):
            raise UserError(f"{where}: label {label}, but there are {len(classes)} class names")
        itself = str(label) if numbered else text
        class_name = classes[label] if classes is not None else line.get("class_name") or itself
        parts[part].append(Row(line["path"], label, class_name))
    if "split" not in header:
        parts = stratify(sorted(parts["train"], key=lambda row: (row.label, row.path)), PERCENTS)
    # The name carries the folder, as many CSV files are called items.csv or labels.csv.
    name = f"{path.resolve().parent.name}-{path.stem}"
    return make_split(name, parts, file=path.name, sha256=hashlib.sha256(content).hexdigest())


def split_from_folder(root: str | Path) -> Split:
    """Makes a split of a folder of images: ``root/class/*.jpg`` or ``root/{train,val,test}/class/*.jpg``.

    The first form is divided 50/20/30 by ``stratify`` over the sorted paths. The second is taken as it is; without a
    ``val`` folder there are no validation images. Labels follow the sorted folder names. The digest is that of the
    folder's ``split_bytes``.

    Raises UserError for no such folder, no class folder, a class folder without images, no test part, a class that
    training lacks, or a rule of ``make_split`` that is broken.
    """
    root = Path(root)
    if not root.is_dir():
        raise UserError(f"{root}: {'not a folder' if root.exists() else 'no such folder'}")
    # A class may be called "train" as well: only a folder of folders is a part.
    folders = {_PART_SPELLINGS[p.name]: p for p in _folders(root) if p.name in _PART_SPELLINGS and _folders(p)}
    if lacking := [part for part in ("train", "test") if part not in folders and folders]:
        have = listed(sorted(folder.name for folder in folders.values()))
        raise UserError(f"{root}: has {have} but no {lacking[0]!r} folder; without parts give root/class/images")
    labels = {folder.name: label for label, folder in enumerate(_folders(folders.get("train", root)))}
    if folders:
        parts = {part: _folder_rows(folders[part], root, labels) if part in folders else [] for part in PARTS}
    else:
        parts = stratify(_folder_rows(root, root, labels), PERCENTS)
    name = root.resolve().name
    return make_split(name, parts, file=name, sha256=hashlib.sha256(split_bytes(parts)).hexdigest())


def _folders(root: Path) -> list[Path]:
    return sorted((p for p in root.iterdir() if p.is_dir() and not p.name.startswith(_HIDDEN)), key=lambda p: p.name)


def _folder_rows(folder: Path, root: Path, labels: Mapping[str, int]) -> list[Row]:
    found = {c: images_below(c) for c in _folders(folder)}
    if not found:
        raise UserError(f"{folder}: no class folders in it; images go into one folder per class")
    if unknown := [c.name for c in found if c.name not in labels]:
        raise UserError(f"{folder}: no training images of the class {listed(unknown)}")
    if empty := [c.name for c, images in found.items() if not images]:
        raise UserError(f"{folder}: no images in the class folder {listed(empty)}")
    rows = []
    for c, images in found.items():
        below = c.relative_to(root).as_posix()
        rows += [Row(f"{below}/{image}", labels[c.name], c.name) for image in images]
    for row in rows:
        check_path(row.path, str(folder))
    return rows


def images_below(folder: Path) -> list[str]:
    """Finds the image files below a folder, sub-folders included: sorted POSIX paths below it."""
    found = []
    pending = [""]
    while pending:
        below = pending.pop()
        with os.scandir(folder / below) as entries:
            for entry in entries:
                if entry.name.startswith(_HIDDEN):
                    continue
                if entry.is_dir(follow_symlinks=False):
                    pending.append(f"{below}{entry.name}/")
                elif entry.name.lower().endswith(IMAGE_SUFFIXES) and entry.is_file():
                    found.append(below + entry.name)
    return sorted(found)


@may_be_read()
def image_files(paths: Sequence[str]) -> list[Path]:
    """Lists files, and the image files below folders, in the order given; raises UserError when one is missing."""
    if not paths:
        raise UserError("no images to predict: give files or folders")
    files: list[Path] = []
    for path in map(Path, paths):
        if not path.exists():
            raise UserError(f"no such image or folder: {str(path)!r}")
        files += [path / image for image in images_below(path)] if path.is_dir() else [path]
    if not files:
        raise UserError(f"no image found in {', '.join(map(repr, paths))}")
    return files
