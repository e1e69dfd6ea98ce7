"""Splits: which image belongs to which part and class, and what must hold for every split."""

import posixpath
import random
import re
import reprlib
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from json.encoder import encode_basestring_ascii as quoted
from typing import Any, Literal, NamedTuple

from kshot.errors import UserError

PARTS = ("train", "val", "test")
STRATIFY_SEED = 1  # of every split that we make ourselves: fixed, so that a folder always gives the same parts

VAL_PERCENT = 20  # of a class, for validation, where the images are in no parts yet
TEST_SHARE = 0.3  # of a class, for testing

_UNWRITABLE = r"[\x00-\x1f\ud800-\udfff]"  # control characters, and what stands for bytes that are not UTF-8

ItemKind = Literal["path", "index"]


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


@dataclass(frozen=True)
class Split:
    """Who belongs where, and the digest of the source that says so.

    Attributes:
        name: id of the data set.
        class_names: name of label 0, 1, ... as the source writes them.
        file: name of the source, without ``.gz``.
        sha256: hexadecimal digest of the source's uncompressed bytes.
        image_root: per part, the folder below the data set's folder to which paths refer; for array data sets the
            array of the source that indices refer to.
        item_kind: whether ``Row.path`` is a path or an index.
        prompt_names: the names as prompts say them, where they are not the source's; else empty.
        left_out: number of files of the source that are no images, by kind, such as ``.txt``.
        notes: what the reader found or decided, and its user should know, each for a line of the log.
        listing: of the source's files, where it is a folder: handed to the reader again, it need not list them twice.
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
    prompt_names: tuple[str, ...] = field(default=(), compare=False)
    left_out: Mapping[str, int] = field(default_factory=dict, compare=False)
    notes: tuple[str, ...] = field(default=(), compare=False)
    listing: Any = field(default=None, compare=False, repr=False)

    @property
    def said(self) -> tuple[str, ...]:
        """Names in label order as prompts say them, underscores kept."""
        return self.prompt_names or self.class_names


def display_name(class_name: str) -> str:
    """Gives the words of a class name as they stand in a prompt: underscores become spaces."""
    return class_name.replace("_", " ")


def words(class_name: str) -> str:
    """Gives a class name as CLIP's tokenizer sees it: lower case, single blanks, Unicode's form NFC."""
    return " ".join(unicodedata.normalize("NFC", display_name(class_name)).lower().split())


def listed(names: Sequence[str]) -> str:
    """Lists names for a message, at most five of them: ``'a', 'b' and 3 more``."""
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(map(repr, names[:5])) + more


def shown(value: Any) -> str:
    """Shows a value in a message, shortened where a file may hold anything."""
    short = reprlib.Repr()
    short.maxstring = short.maxother = 120
    return short.repr(value)


def check_distinct(class_names: Sequence[str], where: str) -> None:
    """Raises UserError for names that are none, or have the same ``words``: their logits were equal."""
    seen: dict[str, str] = {}
    for name in class_names:
        read = words(name)
        if not read or len(name) > 300 or re.search(_UNWRITABLE, name):
            raise UserError(f"{where}: {shown(name)} is no class name: it must have words, and no control characters")
        if read in seen:
            raise UserError(f"{where}: the class names {seen[read]!r} and {name!r} read the same in a prompt")
        seen[read] = name


def check_path(path: str, where: str) -> str:
    """Gives a path in its shortest form, so that ``./a.jpg`` and ``a.jpg`` are one image.

    Raises UserError for a path that is empty or absolute, or has ``..``, a backslash, drive or control character. Such
    a path could leave the image root, or mean different things on different systems, as one that is not UTF-8.
    """
    leaves = path.startswith("/") or ".." in path.split("/") or re.match("[A-Za-z]:", path)
    if not path or leaves or "\\" in path or re.search(_UNWRITABLE, path):
        raise UserError(
            f"{where}: {shown(path)} must be a relative path with '/', without '..' and backslashes, and in UTF-8"
        )
    return posixpath.normpath(path)


def check_paths(paths: Sequence[str], where: str) -> None:
    """``check_path`` for many paths that lie below a checked folder, and are in their shortest form."""
    if re.search(_UNWRITABLE + r"|\\", "/".join(paths)):
        for path in paths:
            check_path(path, where)


def make_split(
    name: str,
    parts: Mapping[str, Sequence[Row]],
    *,
    file: str,
    sha256: str,
    image_root: Mapping[str, str] | None = None,
    item_kind: ItemKind = "path",
) -> Split:
    """Makes a split; raises UserError when labels are not 0 to C-1, a label has two names, or an image two parts."""
    if re.search(_UNWRITABLE, f"{name}{file}"):
        raise UserError(f"{shown(name)}: the name of a data set must have no control characters, and be in UTF-8")
    roots = dict(image_root or dict.fromkeys(PARTS, "."))
    names: dict[int, str] = {}
    place: dict[tuple[str, str], str] = {}
    for part in PARTS:
        for row in parts[part]:
            if names.setdefault(row.label, row.class_name) != row.class_name:
                raise UserError(f"{file}: label {row.label} is both {names[row.label]!r} and {row.class_name!r}")
            # The same image for training and for testing makes the accuracy worthless.
            if (other := place.setdefault((roots[part], row.path), part)) != part:
                raise UserError(f"{file}: {row.path!r} is in {other} and in {part}")
    if not names:
        raise UserError(f"{file}: there is no image in it")
    for expected, label in enumerate(sorted(names)):
        if label != expected:
            wrong = f"{label} is negative" if label < 0 else f"{expected} is missing"
            raise UserError(f"{file}: labels must be 0 to C-1 without a gap, but {wrong}")
    class_names = tuple(names[label] for label in range(len(names)))
    train, val, test = (tuple(parts[part]) for part in PARTS)
    return Split(name, train, val, test, class_names, file, sha256, roots, item_kind)


def json_rows(rows: Sequence[Row], item_kind: ItemKind) -> list[str]:
    """Serialises rows as they stand in split files and in manifests, where an index is a number."""
    # As json.dumps writes a list, which would build an encoder for each of 100,000 rows.
    if item_kind == "index":
        return [f"[{int(row.path)}, {row.label}, {quoted(row.class_name)}]" for row in rows]
    return [f"[{quoted(row.path)}, {row.label}, {quoted(row.class_name)}]" for row in rows]


def split_bytes(parts: Mapping[str, Sequence[Row]], item_kind: ItemKind = "path") -> bytes:
    """Serialises parts in the shape of a ``split_zhou`` file, one row per line: the same rows, the same bytes."""
    blocks = [f'"{part}": [\n' + ",\n".join(json_rows(parts[part], item_kind)) + "\n]" for part in PARTS]
    return ("{" + ",\n".join(blocks) + "}\n").encode("ascii")


def by_label(rows: Sequence[Row]) -> dict[int, list[int]]:
    """Gives the positions of each label's rows, labels in order of first appearance."""
    positions: dict[int, list[int]] = {}
    for position, row in enumerate(rows):
        positions.setdefault(row.label, []).append(position)
    return positions


def part_sizes(count: int, val_percent: int, test_percent: int) -> dict[str, int]:
    """Says how many of some images each part gets.

    Validation gets its percentage rounded down, testing its own rounded, but at least 1 unless it is 0, and training
    the rest, which may be none.
    """
    val = count * val_percent // 100
    test = max(1, (count * test_percent + 50) // 100) if test_percent else 0
    return {"train": count - val - test, "val": val, "test": test}


def stratify(rows: Sequence[Row], percents: tuple[int, int]) -> dict[str, list[Row]]:
    """Splits rows class by class into train, val and test, given the percentages of validation and test.

    Each class is shuffled by its own stream, so that its parts do not depend on which other classes there are; sizes
    are those of ``part_sizes``. The rows keep their order within a part. Raises UserError for a class with too few
    images to train and to test.
    """
    part_of: dict[int, str] = {}
    for positions in by_label(rows).values():
        class_name, n = rows[positions[0]].class_name, len(positions)
        train, val, test = part_sizes(n, *percents).values()
        if train < 1:
            raise UserError(f"class {class_name!r} has {n} image, but a split into training and test needs at least 2")
        shuffled = random.Random(f"{STRATIFY_SEED}/{class_name}").sample(positions, n)
        part_of |= dict.fromkeys(shuffled[:val], "val") | dict.fromkeys(shuffled[val : val + test], "test")
    return {part: [row for i, row in enumerate(rows) if part_of.get(i, "train") == part] for part in PARTS}
