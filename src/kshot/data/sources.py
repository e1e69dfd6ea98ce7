"""Data sets: who says what belongs where, and who opens the images: files, torchvision's arrays, scikit-learn."""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from kshot.data.images import ArrayImages, FileImages, ImageSource
from kshot.data.readers import read_split_zhou
from kshot.data.splits import Row, Split, make_split, stratify
from kshot.errors import UserError
from kshot.files import packaged_folder
from kshot.templates import DEFAULT_TEMPLATE

ARRAYS = {"train": "train", "val": "train", "test": "test"}  # which array of a torchvision data set a part indexes
VAL_PERCENT = 20


@dataclass(frozen=True)
class DatasetEntry(ABC):
    """What is known about a data set. A new one is one table in ``data_splits/catalogue.toml``.

    Attributes:
        split: file in ``data_splits/``; empty where the source has its own parts.
        image_root: folder below the data set's to which the paths of the split refer.
        template: sentence for a class name.
    """

    split: str = field(default="", kw_only=True)
    image_root: str = field(default=".", kw_only=True)
    template: str = field(default=DEFAULT_TEMPLATE, kw_only=True)

    def read_split(self, name: str, root: Path, download: bool) -> Split:  # noqa: ARG002  arrays lie below the root
        """Reads the split under the name of the data set.

        Raises:
            UserError: labels that come with the images are not there.
        """
        return read_split_zhou(packaged_folder("data_splits") / self.split, name, self.image_root)

    @abstractmethod
    def images(self, root: str | Path, part: str, rows: Sequence[Row], download: bool = False) -> ImageSource:
        """Opens the images of a part: train, val or test.

        Args:
            root: the data root.
            part: of the split.
            rows: of the part; the first tells which candidate folder is the right one.
            download: fetch what is missing, where torchvision can.

        Raises:
            UserError: the images are not there.
        """


@dataclass(frozen=True)
class ImageFiles(DatasetEntry):
    """Image files as their authors distribute them.

    Attributes:
        folder: of the data set, below the data root.
        aliases: other folders below the data root to which paths may refer, such as torchvision's.
        url: where a user finds the files.
        torchvision: data set class in torchvision that downloads the same files, if there is one.
    """

    folder: str = "."
    aliases: Sequence[str] = ()
    url: str = ""
    torchvision: str = ""

    def images(self, root: str | Path, part: str, rows: Sequence[Row], download: bool = False) -> ImageSource:
        """Takes the first folder that has the first image, or, so that the message names the image, that exists."""
        candidates = [Path(root, below) for below in (f"{self.folder}/{self.image_root}", *self.aliases)]
        sample = rows[0].path
        having = [folder for folder in candidates if (folder / sample).is_file()]
        if not having and download and self.torchvision:
            open_torchvision(self.torchvision, Path(root), self.url, download=True)
            having = [folder for folder in candidates if (folder / sample).is_file()]
        folder = next(iter(having or filter(Path.is_dir, candidates)), None)
        if folder is None:
            looked = " and in ".join(repr(str(candidate)) for candidate in candidates)
            where = f"; they come from {self.url}" if self.url else ""
            offer = ", or with --data.download true" if self.torchvision else ""
            raise UserError(f"no {part} images: looked for {sample!r} in {looked}{where}{offer}")
        return FileImages(folder)


@dataclass(frozen=True)
class TorchvisionArrays(DatasetEntry):
    """A torchvision data set with fixed training and test arrays; 20 % of the training images are for validation.

    Attributes:
        torchvision: name of the data set class.
        url: where it comes from.
        by_split: whether the argument that chooses an array is ``split``, not ``train``.
        labels: attribute with the labels; ``_samples`` holds (path, label) pairs.
        class_names: in label order; empty: those of the data set.
        folder: below the data root.
    """

    torchvision: str
    url: str
    by_split: bool = False
    labels: str = "targets"
    class_names: Sequence[str] = ()
    folder: str = "."

    def arguments(self, array: str) -> dict[str, Any]:
        """Gives the arguments that choose the training or the test array."""
        return {"split": array} if self.by_split else {"train": array == "train"}

    def open(self, root: Path, array: str, download: bool) -> Any:
        """Opens the training or the test array as a sequence of (PIL image, label), as ``open_torchvision`` does."""
        return open_torchvision(self.torchvision, root / self.folder, self.url, download, **self.arguments(array))

    def read_split(self, name: str, root: Path, download: bool) -> Split:
        """Makes the split; its digest is that of the training and then the test labels as little-endian int64."""
        digest = hashlib.sha256()
        rows: dict[str, list[Row]] = {}
        names = self.class_names
        for array in ("train", "test"):
            dataset = self.open(root, array, download)
            values = getattr(dataset, self.labels)
            labels = np.asarray([v[1] for v in values] if self.labels == "_samples" else values, dtype="<i8")
            digest.update(labels.tobytes())
            names = names or dataset.classes
            rows[array] = [Row(str(i), int(label), names[label]) for i, label in enumerate(labels)]
        parts = stratify(rows["train"], (VAL_PERCENT, 0)) | {"test": rows["test"]}
        file = f"torchvision.datasets.{self.torchvision}"
        return make_split(name, parts, file=file, sha256=digest.hexdigest(), image_root=ARRAYS, item_kind="index")

    def images(self, root: str | Path, part: str, rows: Sequence[Row], download: bool = False) -> ImageSource:  # noqa: ARG002
        return ArrayImages(partial(self.open, Path(root), ARRAYS[part], download), itemgetter(0))


@dataclass(frozen=True)
class SklearnDigits(DatasetEntry):
    """The 1,797 handwritten digits of 8 x 8 pixels that come with scikit-learn; every part indexes all of them."""

    def images(self, root: str | Path, part: str, rows: Sequence[Row], download: bool = False) -> ImageSource:  # noqa: ARG002
        return ArrayImages(_digits, _grey_levels_16)


def open_torchvision(name: str, root: Path, url: str, download: bool, **arguments: Any) -> Any:
    """Opens a torchvision data set by the name of its class; the URL is for the message.

    Raises:
        UserError: it is not there, or cannot be downloaded.
    """
    from torchvision import datasets

    try:
        return getattr(datasets, name)(root, download=download, **arguments)
    except (RuntimeError, OSError) as error:
        reason = " ".join(str(error).split())
        if download:
            raise UserError(f"{name} could not be downloaded to {str(root)!r} from {url}: {reason}") from None
        raise UserError(
            f"no {name} in {str(root)!r}: it comes from {url}, or with --data.download true ({reason})"
        ) from None


def _digits() -> Any:
    from sklearn.datasets import load_digits

    return load_digits().images


def _grey_levels_16(values: np.ndarray) -> Image.Image:
    return Image.fromarray(np.round(values * (255 / 16)).astype(np.uint8))
