"""Data sets of the Hugging Face hub, or saved by its library ``datasets``, which the extra ``hf`` installs."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from kshot.data.archives import StoredImages
from kshot.data.layouts import part_of
from kshot.data.readers import NO_SHARE, divided
from kshot.data.splits import PARTS, TEST_SHARE, Row, Split, listed, make_split, split_bytes
from kshot.data.tables import COLUMNS
from kshot.errors import UserError, first_line

PREFIX = "hf:"


@dataclass
class HubImages(StoredImages):
    """Images by their part, as the data set calls it, and index: ``validation/7``.

    Attributes:
        name: of the data set, after ``hf:``.
        column: with the images.
        download: what is missing.
    """

    name: str
    column: str
    download: bool = False
    _parts: Any = field(default=None, init=False, repr=False, compare=False)

    def called(self, path: str) -> Path:
        return Path(f"{PREFIX}{self.name}", path)

    def stored(self, path: str) -> bytes:
        if self._parts is None:
            self._parts = opened(self.name, self.download)
        part, _, index = path.rpartition("/")
        image = self._parts[part][int(index)][self.column]
        return bytes(image["bytes"]) if image["bytes"] is not None else Path(image["path"]).read_bytes()

    def close(self) -> None:
        self._parts = None


def opened(name: str, download: bool) -> Mapping[str, Any]:
    """Opens a data set with undecoded images: its parts by their names.

    ``name`` is that of the hub, or a folder that ``save_to_disk`` wrote, with ``:CONFIG`` where there are several
    configurations. Raises UserError when the library or the data set is missing.
    """
    try:
        import datasets  # type: ignore[import-not-found]
    except ModuleNotFoundError:
        raise UserError(f"{PREFIX}{name} is read by the library datasets: pip install 'kshot[hf]'") from None
    path, _, config = name.partition(":")
    try:
        if Path(path, "dataset_dict.json").is_file():
            parts = datasets.load_from_disk(path)
        else:
            fetching = datasets.DownloadConfig(local_files_only=not download)
            parts = datasets.load_dataset(path, config or None, download_config=fetching)
    except Exception as error:  # it runs into anything: no network, no such name, a broken file
        offer = "" if download else "; fetch what is missing with --data.download true"
        raise UserError(f"{PREFIX}{name}: cannot be opened ({first_line(error)}){offer}") from None
    # Undecoded, as the library would let Pillow open formats that are not safe.
    return {
        part: each.cast_column(_columns(each, name)[0], datasets.Image(decode=False)) for part, each in parts.items()
    }


def _columns(part: Any, name: str) -> tuple[str, str]:
    kinds = {column: type(kind).__name__ for column, kind in part.features.items()}
    images = [column for column, kind in kinds.items() if kind == "Image"]
    usual = [column for column in kinds if column.lower().replace("_", "") in COLUMNS["label"]]
    labels = [column for column, kind in kinds.items() if kind == "ClassLabel"] or usual
    if len(images) != 1 or not labels:
        raise UserError(f"{PREFIX}{name}: needs one column of images and one of labels, but has {kinds}")
    return images[0], next((column for column in labels if column in usual), labels[0])


def split_from_hub(name: str, download: bool, test_share: float | None) -> tuple[Split, str]:
    """Reads the labels of a data set; the images stay closed. Parts without labels are left out.

    Returns the split, whose digest is that of its ``split_bytes``, and the column of the images. Raises UserError as
    ``opened``, for two parts of one kind, and for none to train on.
    """
    called = f"{PREFIX}{name}"
    parts: dict[str, list[Row]] = {part: [] for part in PARTS}
    own: dict[str, str] = {}
    notes: list[str] = []
    column = ""
    for given, items in opened(name, download).items():
        column, label = _columns(items, name)
        labels = list(items[label])
        names = getattr(items.features[label], "names", None) or sorted(set(map(str, labels)))
        positions = {each: i for i, each in enumerate(names)}
        numbers = [
            each if isinstance(each, int) and each < len(names) else positions.get(str(each), -1) for each in labels
        ]
        part = part_of(given)
        if part is None or min(numbers, default=-1) < 0:
            notes.append(f"{called}: {given!r} goes unused, as it has no labels or is no part")
            continue
        if part in own:
            raise UserError(f"{called}: {own[part]!r} and {given!r} are both for {part}")
        own[part] = given
        parts[part] = [Row(f"{given}/{i}", number, names[number]) for i, number in enumerate(numbers)]
    if "train" not in own:
        raise UserError(f"{called}: has no labelled training part, only {listed(sorted(own.values()))}")
    if "val" in own and "test" not in own:
        parts["test"], parts["val"] = parts["val"], []
        notes.append(f"{called}: there is no test part, so the validation images are for testing")
    if len(own) == 1:
        parts, note = divided(parts["train"], test_share, called)
        notes.append(note)
    elif test_share != TEST_SHARE:
        raise UserError(f"{called}: {NO_SHARE}")
    digest = hashlib.sha256(split_bytes(parts)).hexdigest()
    short = name.replace("/", "-").replace(":", "-").strip("-.")
    split = make_split(short, parts, file=called, sha256=digest)
    return replace(split, notes=tuple(notes)), column
