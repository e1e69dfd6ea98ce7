"""Readers: a split from a file in CoOp's format, or from a folder of images."""

import hashlib
import json
import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from kshot.data.layouts import laid_out
from kshot.data.listing import Listing, counted, list_folder, meant_around
from kshot.data.splits import (
    PARTS,
    TEST_SHARE,
    VAL_PERCENT,
    Row,
    Split,
    by_label,
    check_path,
    check_paths,
    make_split,
    shown,
    split_bytes,
    stratify,
)
from kshot.errors import UserError
from kshot.files import file_content, may_be_read

MOST_VALUES = 6_000_000  # in a list of images, where each takes memory; ImageNet's has five million
TABLES = (".csv", ".tsv", ".parquet")
NO_SHARE = "it has parts of its own, which data.test_share cannot change: leave it out"
logger = logging.getLogger("kshot")


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
        path = check_path(path, where)
    elif path < 0:
        raise UserError(f"{where}: the index {path} is negative")
    return Row(str(path), label, class_name)


def split_from_folder(root: str | Path, test_share: float | None = TEST_SHARE, listing: Any = None) -> Split:
    """Makes a split of a folder of images in one of the layouts of ``kshot.data.layouts``.

    Without parts the images are divided by ``divided`` over the sorted paths; parts are taken as they are. Labels
    follow the sorted folder names. The digest is that of the folder's ``split_bytes``. ``listing`` is that of an
    earlier split, taken where it still holds.

    Raises UserError for no such folder, what ``laid_out`` refuses, or a rule of ``make_split`` that is broken.
    """
    root = Path(root)
    if not root.is_dir():
        raise UserError(f"{root}: {'not a folder' if root.exists() else 'no such folder'}")
    files = listing if listing is not None and listing.holds(root) else list_folder(root)
    if files.images and not any("/" in image for image in files.images):
        tables = [name for name in files.files if name.lower().endswith(TABLES)]
        advice = f"if {root / tables[0]} lists them, give that" if tables else meant_around(root)
        raise UserError(f"{root}: no class folders in it, only images; {advice}")
    return split_from_listing(files, str(root), root.resolve().name, test_share)


def split_from_listing(files: Listing, called: str, name: str, test_share: float | None = TEST_SHARE) -> Split:
    """``split_from_folder`` for what was listed of a folder or an archive; messages call it ``called``."""
    layout = laid_out(files.images, files.folders, called)
    labels = {folder: label for label, folder in enumerate(layout.parts["train"])}
    parts: dict[str, list[Row]] = {part: [] for part in PARTS}
    for part, classes in layout.parts.items():
        for folder, images in classes.items():
            check_path(folder, called)
            check_paths(images, called)
            parts[part] += [Row(path, labels[folder], folder) for path in images]
    notes = list(layout.notes)
    if files.left_out:
        notes.append(f"left out of {called}/: {counted(files.left_out)}")
    if not layout.parted:
        parts, note = divided(parts["train"], test_share, called)
        notes.append(note)
    elif test_share != TEST_SHARE:
        raise UserError(f"{called}: {NO_SHARE}")
    split = make_split(name, parts, file=name, sha256=hashlib.sha256(split_bytes(parts)).hexdigest())
    return replace(split, left_out=dict(files.left_out), notes=tuple(notes), listing=files)


def divided(rows: Sequence[Row], test_share: float | None, called: str) -> tuple[dict[str, list[Row]], str]:
    """Divides labelled images that are in no parts, class by class: 20 % for validation, ``test_share`` for testing.

    With None all are for training. Returns the parts, and what was done in words. Raises UserError for a share that is
    no whole percentage from 1 to 70, or a class with too few images.
    """
    if test_share is None:
        return stratify(rows, (0, 0)), f"{called}: all {len(rows):,} images are for training, and none for testing"
    percent = round(100 * test_share)
    if not 1 <= percent <= 70 or abs(percent - 100 * test_share) > 1e-6:
        raise UserError(f"test_share must be from 0.01 to 0.7 in steps of 0.01, or null, not {test_share}")
    parts = stratify(rows, (VAL_PERCENT, percent))
    fewest = min(by_label(parts["train"]).values(), key=len)
    row = parts["train"][fewest[0]]
    left, val, test = (sum(each.label == row.label for each in parts[part]) for part in PARTS)
    of = f"of the {left + val + test} images of {row.class_name!r} {left} are left for training"
    share = f"{100 - VAL_PERCENT - percent} % for training, {VAL_PERCENT} % for validation, {percent} % for testing"
    return parts, f"{called}: there are no parts, so its images were split, {share}: {of} ({val} and {test} are not)"


def images_below(folder: Path) -> list[str]:
    """Finds the image files below a folder by ``list_folder``; says in the log what else there is."""
    files = list_folder(folder)
    if files.left_out:
        logger.info("left out of %s/: %s", folder, counted(files.left_out))
    return list(files.images)


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
