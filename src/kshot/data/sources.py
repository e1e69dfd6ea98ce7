"""Data sets: who says what belongs where, and who opens the images: files, torchvision's arrays, scikit-learn."""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
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


@dataclass(frozen=True, kw_only=True)
class DatasetEntry(ABC):
    """What is known about a data set. A new one is one table in ``data_splits/catalogue.toml``.

    Attributes:
        split: file in ``data_splits/``; empty where the source has its own parts.
        folder: of the data set, below the data root.
        image_root: folder below that to which the paths of the split refer.
        url: where a user finds the files.
        torchvision: data set class in torchvision that downloads the same files, if there is one.
        template: sentence for a class name.
    """

    split: str = ""
    folder: str = "."
    image_root: str = "."
    url: str = ""
    torchvision: str = ""
    template: str = DEFAULT_TEMPLATE

    def read_split(self, name: str, root: Path, download: bool) -> Split:  # noqa: ARG002  arrays lie below the root
        """Reads the split, which gets the name; raises UserError when labels that come with the images are missing."""
        return read_split_zhou(packaged_folder("data_splits") / self.split, name, self.image_root)

    @abstractmethod
    def images(self, root: str | Path, part: str, rows: Sequence[Row], download: bool = False) -> ImageSource:
        """Opens the images of a part: train, val or test; the first of its rows tells which folder is the right one.

        With ``download`` torchvision fetches what is missing, if it can. Raises UserError when images are not there.
        """

    def from_torchvision(self, root: str | Path, download: bool, **arguments: Any) -> Any:
        """Opens torchvision's data set; raises UserError when it is not there, or cannot be downloaded."""
        from torchvision import datasets

        name, where = self.torchvision, repr(str(root))
        try:
            return getattr(datasets, name)(Path(root), download=download, **arguments)
        except (RuntimeError, OSError) as error:
            reason = " ".join(str(error).split())
            if download:
                raise UserError(f"{name} could not be downloaded to {where} from {self.url}: {reason}") from None
            offer = f"it comes from {self.url}, or with --data.download true"
            raise UserError(f"no {name} in {where}: {offer} ({reason})") from None


@dataclass(frozen=True, kw_only=True)
class ImageFiles(DatasetEntry):
    """Image files as their authors distribute them.

    Attributes:
        aliases: other folders below the data root to which paths may refer, such as torchvision's.
    """

    aliases: Sequence[str] = ()

    def images(self, root: str | Path, part: str, rows: Sequence[Row], download: bool = False) -> ImageSource:
        """Takes the first folder that has the first image, or, so that the message names the image, that exists."""
        candidates = [Path(root, below) for below in (f"{self.folder}/{self.image_root}", *self.aliases)]
        sample = rows[0].path
        having = [folder for folder in candidates if (folder / sample).is_file()]
        if not having and download and self.torchvision:
            self.from_torchvision(root, download=True)
            having = [folder for folder in candidates if (folder / sample).is_file()]
        folder = next(iter(having or filter(Path.is_dir, candidates)), None)
        if folder is None:
            looked = " and in ".join(repr(str(candidate)) for candidate in candidates)
            where = f"; they come from {self.url}" if self.url else ""
            offer = ", or with --data.download true" if self.torchvision else ""
            raise UserError(f"no {part} images: looked for {sample!r} in {looked}{where}{offer}")
        return FileImages(folder)


@dataclass(frozen=True, kw_only=True)
class TorchvisionArrays(DatasetEntry):
    """A torchvision data set with fixed training and test arrays; 20 % of the training images are for validation.

    Attributes:
        by_split: whether the argument that chooses an array is ``split``, not ``train``.
        labels: attribute with the labels; ``_samples`` holds (path, label) pairs.
        class_names: in label order; empty: those of the data set.
    """

    by_split: bool = False
    labels: str = "targets"
    class_names: Sequence[str] = ()

    def arguments(self, array: str) -> dict[str, Any]:
        """Gives the arguments that choose the training or the test array."""
        return {"split": array} if self.by_split else {"train": array == "train"}

    def open(self, root: str | Path, array: str, download: bool) -> Any:
        """Opens the training or the test array as a sequence of (PIL image, label)."""
        return self.from_torchvision(Path(root, self.folder), download, **self.arguments(array))

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
        parts = stratify(rows["train"], (20, 0)) | {"test": rows["test"]}
        file = f"torchvision.datasets.{self.torchvision}"
        return make_split(name, parts, file=file, sha256=digest.hexdigest(), image_root=ARRAYS, item_kind="index")

    def images(self, root: str | Path, part: str, rows: Sequence[Row], download: bool = False) -> ImageSource:  # noqa: ARG002
        return ArrayImages(partial(self.open, root, ARRAYS[part], download), itemgetter(0))


class SklearnDigits(DatasetEntry):
    """The 1,797 handwritten digits of 8 x 8 pixels that come with scikit-learn; every part indexes all of them."""

    def images(self, root: str | Path, part: str, rows: Sequence[Row], download: bool = False) -> ImageSource:  # noqa: ARG002
        return ArrayImages(_digits, _grey_levels_16)


def _digits() -> Any:
    """The images, (1797, 8, 8), as ``sklearn.datasets.load_digits`` gives them, which would load all of SciPy."""
    package = find_spec("sklearn")
    assert package is not None, "scikit-learn is a dependency"
    file = Path((package.submodule_search_locations or [""])[0], "datasets", "data", "digits.csv.gz")
    return np.loadtxt(file, delimiter=",")[:, :-1].reshape(-1, 8, 8)


def _grey_levels_16(values: np.ndarray) -> Image.Image:
    return Image.fromarray(np.round(values * (255 / 16)).astype(np.uint8))
