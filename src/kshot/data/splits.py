"""Splits: which image belongs to which part and class, read from a split file, a folder or a CSV file."""

import csv
import gzip
import hashlib
import io
import json
import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from kshot.errors import UserError, nearest_first

PARTS = ("train", "val", "test")
IMAGE_SUFFIXES = frozenset([".jpg", ".jpeg", ".png", ".bmp", ".gif", ".ppm", ".pgm", ".tif", ".tiff", ".webp"])
STRATIFY_SEED = 1  # of every split that we make ourselves: fixed, so that a folder always gives the same parts
_PART_SPELLINGS = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}
_SHOWN = 5  # names listed in a message before it says how many more


class Row(NamedTuple):
    """One image: where it is and what it shows.

    Attributes:
        path: POSIX path below the image root of its part; for array data sets the index as a decimal string.
        label: position of the class in the label order.
        class_name: name as the source writes it, underscores kept.
    """

    path: str
    label: int
    class_name: str


ItemKind = Literal["path", "index"]


@dataclass(frozen=True)
class Split:
    """Who belongs where, and the digest of the source that says so.

    Attributes:
        name: id of the data set.
        train: rows that shots are drawn from.
        val: rows that validation shots are drawn from; may be empty.
        test: rows for evaluation only.
        class_names: name of label 0, 1, ... as the source writes them.
        file: name of the source, without ``.gz``.
        sha256: hexadecimal digest of the source's uncompressed bytes.
        image_root: per part, the folder below the data set's folder to which paths refer; for array data sets the
            array of the source that indices refer to.
        item_kind: whether ``Row.path`` is a path or an index.
    """

    name: str
    train: tuple[Row, ...]
    val: tuple[Row, ...]
    test: tuple[Row, ...]
    class_names: tuple[str, ...]
    file: str
    sha256: str
    image_root: Mapping[str, str]
    item_kind: ItemKind = "path"


def display_name(class_name: str) -> str:
    """Gives the words of a class name as they stand in a prompt: underscores become spaces."""
    return class_name.replace("_", " ")


def listed(names: Sequence[str]) -> str:
    """Lists names for a message, at most five of them: ``'a', 'b' and 3 more``."""
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(repr(name) for name in names[:_SHOWN]) + more


def check_distinct(class_names: Sequence[str], where: str) -> None:
    """Refuses class names that read the same in a prompt: the logits of two such classes would be equal.

    Raises:
        UserError: two names agree after ``display_name``, ignoring case.
    """
    seen: dict[str, str] = {}
    for name in class_names:
        words = display_name(name).casefold()
        if words in seen:
            raise UserError(f"{where}: the class names {seen[words]!r} and {name!r} read the same in a prompt")
        seen[words] = name


def make_split(
    name: str,
    parts: Mapping[str, Sequence[Row]],
    *,
    file: str,
    sha256: str,
    image_root: Mapping[str, str] | None = None,
    item_kind: ItemKind = "path",
    allow_duplicates: bool = False,
) -> Split:
    """Puts rows together to a split and checks what every split must keep.

    Raises:
        UserError: labels are not 0 to C-1, a label has two names, two labels have one name, or an image of the test
            part is in another part as well.
    """
    roots = dict(image_root or dict.fromkeys(PARTS, "."))
    names: dict[int, str] = {}
    place: dict[tuple[str, str], str] = {}
    for part in PARTS:
        for row in parts[part]:
            if names.setdefault(row.label, row.class_name) != row.class_name:
                raise UserError(f"{file}: label {row.label} is both {names[row.label]!r} and {row.class_name!r}")
            if place.setdefault((roots[part], row.path), part) != part:
                # The same image for training and for testing makes the accuracy worthless.
                raise UserError(f"{file}: {row.path!r} is in {place[roots[part], row.path]} and in {part}")
    if not names:
        raise UserError(f"{file}: there is no image in it")
    if sorted(names) != list(range(len(names))):
        missing = sorted(set(range(max(names) + 1)) - set(names))
        wrong = f"{missing[0]} is missing" if missing else f"{min(names)} is negative"
        raise UserError(f"{file}: labels must be 0 to C-1 without a gap, but {wrong}")
    class_names = tuple(names[label] for label in range(len(names)))
    if not allow_duplicates:
        check_distinct(class_names, file)
    train, val, test = (tuple(parts[part]) for part in PARTS)
    return Split(name, train, val, test, class_names, file, sha256, roots, item_kind)


def split_bytes(parts: Mapping[str, Sequence[Row]], item_kind: ItemKind = "path") -> bytes:
    """Serialises parts in the shape of a ``split_zhou`` file, one row per line: the same rows, the same bytes."""
    blocks = []
    for part in PARTS:
        rows = [
            json.dumps([int(r.path) if item_kind == "index" else r.path, r.label, r.class_name]) for r in parts[part]
        ]
        blocks.append(f'"{part}": [\n' + ",\n".join(rows) + "\n]")
    return ("{" + ",\n".join(blocks) + "}\n").encode("ascii")


def stratify(rows: Sequence[Row], percents: tuple[int, int], seed: int = STRATIFY_SEED) -> dict[str, list[Row]]:
    """Splits rows class by class into train, val and test.

    Each class is shuffled by its own stream, so that the parts of a class do not depend on which other classes there
    are. Sizes per class: the percentage rounded down for validation; rounded, but at least 1 unless the percentage is
    0, for test; the rest for training. The rows keep their order within a part.

    Args:
        rows: images of all classes; their order does not matter for who goes where only if it is sorted.
        percents: of validation and of test.
        seed: another seed, another split.

    Raises:
        UserError: a class has too few images to have one for training and one for testing.
    """
    val_percent, test_percent = percents
    part_of: dict[int, str] = {}
    members: dict[int, list[int]] = {}
    for position, row in enumerate(rows):
        members.setdefault(row.label, []).append(position)
    for positions in members.values():
        class_name, n = rows[positions[0]].class_name, len(positions)
        val = n * val_percent // 100
        test = max(1, (n * test_percent + 50) // 100) if test_percent else 0
        if n - val - test < 1:
            raise UserError(f"class {class_name!r} has {n} image, but a split into training and test needs at least 2")
        shuffled = random.Random(f"{seed}/{class_name}").sample(positions, n)
        part_of.update(dict.fromkeys(shuffled[:val], "val"))
        part_of.update(dict.fromkeys(shuffled[val : val + test], "test"))
    parts: dict[str, list[Row]] = {part: [] for part in PARTS}
    for position, row in enumerate(rows):
        parts[part_of.get(position, "train")].append(row)
    return parts


def check_path(path: str, where: str) -> None:
    """Refuses paths that could leave the image root, or that mean different things on different systems.

    Raises:
        UserError: the path is empty or absolute, or holds ``..``, a backslash, a drive letter or a control character.
    """
    if not path or path.startswith("/") or ".." in path.split("/") or re.match(r"[A-Za-z]:|.*[\\\x00-\x1f]", path):
        raise UserError(f"{where}: {path!r} must be a relative path with '/', without '..' and backslashes")


def read_split_zhou(
    path: str | Path, name: str | None = None, image_root: str = ".", allow_duplicates: bool = False
) -> Split:
    """Reads a split in CoOp's format: ``{"train": [[path, label, class name], ...], "val": ..., "test": ...}``.

    Args:
        path: ``.json`` or ``.json.gz``; rows of an array data set have an integer instead of the path.
        name: id of the data set; default: the file's name without suffixes.
        image_root: folder below the data set's folder to which the paths refer.
        allow_duplicates: accept class names that read the same.

    Raises:
        UserError: the file does not exist or is no such file, or its content breaks a rule of ``make_split``.
    """
    path = Path(path)
    content = _read(path)
    if path.suffix == ".gz":
        try:
            content = gzip.decompress(content)
        except (OSError, EOFError, ValueError) as error:
            raise UserError(f"{path}: not a gzip file ({error})") from None
    file = path.name.removesuffix(".gz")
    try:
        data = json.loads(content)
    except ValueError as error:
        raise UserError(f"{path}: not JSON ({error})") from None
    if not isinstance(data, dict) or not all(isinstance(data.get(part), list) for part in PARTS):
        raise UserError(f"{path}: a split file is one object with the lists 'train', 'val' and 'test'")
    parts = {part: [_row(values, f"{path}, {part} row {i}") for i, values in enumerate(data[part])] for part in PARTS}
    kinds = {type(values[0]) for part in PARTS for values in data[part]}
    if len(kinds) > 1:
        raise UserError(f"{path}: some rows name files and some have an index")
    return make_split(
        name or file.removesuffix(".json"),
        parts,
        file=file,
        sha256=hashlib.sha256(content).hexdigest(),
        image_root=dict.fromkeys(PARTS, image_root),
        item_kind="index" if kinds == {int} else "path",
        allow_duplicates=allow_duplicates,
    )


def split_from_folder(
    root: str | Path, rename: Mapping[str, str] | None = None, allow_duplicates: bool = False
) -> Split:
    """Makes a split of a folder of images: ``root/class/*.jpg`` or ``root/{train,val,test}/class/*.jpg``.

    The first form is divided 50/20/30 by ``stratify`` over the sorted paths. The second is taken as it is; without a
    ``val`` folder there are no validation images. Labels follow the sorted folder names. The digest is that of the
    folder's ``split_bytes``, with the folders' own names.

    Args:
        root: the folder.
        rename: folder name -> words, for folder names that are no words.
        allow_duplicates: accept class names that read the same.

    Raises:
        UserError: no such folder, no class folder, a class folder without images, no test part, a test or validation
            class that training lacks, or a rule of ``make_split`` is broken.
    """
    root = Path(root)
    if not root.is_dir():
        raise UserError(f"{root}: {'not a folder' if root.exists() else 'no such folder'}")
    # A class may be called "train" as well: only a folder of folders is a part.
    part_folders = {
        _PART_SPELLINGS[folder.name]: folder
        for folder in _folders(root)
        if folder.name in _PART_SPELLINGS and _folders(folder)
    }
    if not part_folders:
        rows = _folder_rows(root, root, {folder.name: label for label, folder in enumerate(_folders(root))})
        parts = stratify(rows, (20, 30))
    else:
        for part in ("train", "test"):
            if part not in part_folders:
                have = listed(sorted(folder.name for folder in part_folders.values()))
                raise UserError(f"{root}: has {have} but no {part!r} folder; without parts give root/class/images")
        labels = {folder.name: label for label, folder in enumerate(_folders(part_folders["train"]))}
        parts = {part: [] for part in PARTS}
        for part, folder in part_folders.items():
            parts[part] = _folder_rows(folder, root, labels)
    digest = hashlib.sha256(split_bytes(parts)).hexdigest()
    if rename:
        known = {row.class_name for rows in parts.values() for row in rows}
        for wrong in sorted(set(rename) - known):
            raise UserError(f"{root}: no class folder {wrong!r} to rename. {nearest_first(wrong, known)}")
        parts = {p: [r._replace(class_name=rename.get(r.class_name, r.class_name)) for r in parts[p]] for p in PARTS}
    name = root.resolve().name
    return make_split(name, parts, file=name, sha256=digest, allow_duplicates=allow_duplicates)


def split_from_csv(path: str | Path, classes: Sequence[str] | None = None, allow_duplicates: bool = False) -> Split:
    """Reads a CSV file with the columns ``path``, ``label`` and, optionally, ``split`` and ``class_name``.

    Labels are integers 0 to C-1, or class names, which are then numbered in sorted order. Without a ``split`` column
    (``train``, ``val`` or ``test``) the images are divided 50/20/30 by ``stratify``.

    Args:
        path: the file; its paths are relative to its folder or to the data root.
        classes: names in label order; default: the ``class_name`` column, or the labels themselves.
        allow_duplicates: accept class names that read the same.

    Raises:
        UserError: no such file, a column is missing, a value is wrong (with its line number), the number of
            ``classes`` is not that of the labels, or a rule of ``make_split`` is broken.
    """
    path = Path(path)
    content = _read(path)
    try:
        reader = csv.DictReader(io.StringIO(content.decode("utf-8-sig"), newline=""))
        header = [column.strip().lower() for column in reader.fieldnames or []]
        reader.fieldnames = header
        lines = [(reader.line_num, {k: (v or "").strip() for k, v in line.items() if k in header}) for line in reader]
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path}: not a CSV file ({error})") from None
    for column in ("path", "label"):
        if column not in header:
            raise UserError(f"{path}: no column {column!r}; the header must have path,label[,split][,class_name]")
    texts = {line["label"] for _, line in lines}
    numbered = bool(texts) and all(re.fullmatch(r"[0-9]+", text) for text in texts)
    labels = {text: int(text) if numbered else label for label, text in enumerate(sorted(texts))}
    if classes is not None and len(set(labels.values())) != len(classes):
        raise UserError(f"{path}: {len(classes)} class names for {len(set(labels.values()))} labels")
    parts: dict[str, list[Row]] = {part: [] for part in PARTS}
    for number, line in lines:
        where = f"{path}, line {number}"
        check_path(line["path"], where)
        part = _PART_SPELLINGS.get(line.get("split", "train").lower())
        if not line["label"] or part is None:
            wrong = "label" if part else "split"
            raise UserError(f"{where}: {wrong} {line[wrong]!r} is none; split is train, val or test")
        label = labels[line["label"]]
        if classes is not None and label >= len(classes):
            raise UserError(f"{where}: label {label}, but there are {len(classes)} class names")
        itself = str(label) if numbered else line["label"]
        class_name = classes[label] if classes is not None else line.get("class_name") or itself
        parts[part].append(Row(line["path"], label, class_name))
    if "split" not in header:
        rows = sorted(parts["train"], key=lambda row: (row.label, row.path))
        parts = stratify(rows, (20, 30))
    # The name carries the folder, as many CSV files are called items.csv or labels.csv.
    name = f"{path.resolve().parent.name}-{path.stem}"
    digest = hashlib.sha256(content).hexdigest()
    return make_split(name, parts, file=path.name, sha256=digest, allow_duplicates=allow_duplicates)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: {(error.strerror or str(error)).lower()}") from None


def _row(values: Any, where: str) -> Row:
    if not (
        isinstance(values, list)
        and len(values) == 3
        and type(values[0]) in {str, int}
        and type(values[1]) is int
        and isinstance(values[2], str)
    ):
        raise UserError(f"{where}: {values!r} is not [path, label, class name]")
    if isinstance(values[0], str):
        check_path(values[0], where)
    elif values[0] < 0:
        raise UserError(f"{where}: the index {values[0]} is negative")
    return Row(str(values[0]), values[1], values[2])


def _folders(root: Path) -> list[Path]:
    hidden = (".", "__MACOSX")  # left behind by notebooks and archives
    return sorted((p for p in root.iterdir() if p.is_dir() and not p.name.startswith(hidden)), key=lambda p: p.name)


def images_below(folder: Path) -> list[Path]:
    """Finds the image files below a folder, sub-folders included, sorted by their POSIX paths."""
    found = (p for p in folder.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES and p.is_file())
    visible = (p for p in found if not p.name.startswith("."))
    return sorted(visible, key=lambda p: p.relative_to(folder).as_posix())


def _folder_rows(folder: Path, root: Path, labels: Mapping[str, int]) -> list[Row]:
    classes = _folders(folder)
    if not classes:
        raise UserError(f"{folder}: no class folders in it; images go into one folder per class")
    if unknown := [c.name for c in classes if c.name not in labels]:
        raise UserError(f"{folder}: no training images of the class {listed(unknown)}")
    found = {c: images_below(c) for c in classes}
    if empty := [c.name for c, images in found.items() if not images]:
        raise UserError(f"{folder}: no images in the class folder {listed(empty)}")
    rows = [Row(p.relative_to(root).as_posix(), labels[c.name], c.name) for c, images in found.items() for p in images]
    for row in rows:
        check_path(row.path, str(folder))
    return rows
