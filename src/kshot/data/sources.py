"""Where the images of a catalogue data set come from: files, torchvision's array data sets, scikit-learn."""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from kshot.data.images import ArrayImages, FileImages, ImageSource
from kshot.data.splits import Row, Split, make_split, stratify
from kshot.errors import UserError

ARRAYS = {"train": "train", "val": "train", "test": "test"}  # which array of a torchvision data set a part indexes
VAL_PERCENT = 20


class Source(ABC):
    """Opens the images of a data set."""

    @abstractmethod
    def images(self, part: str, root: Path, candidates: Sequence[Path], sample: str, download: bool) -> ImageSource:
        """Opens one part: arrays below the root, or files below that of the candidate folders which has the sample.

        Raises:
            UserError: the images are not there.
        """


@dataclass(frozen=True)
class ImageFiles(Source):
    """Image files as their authors distribute them.

    Attributes:
        url: where a user finds them.
        torchvision: data set class in torchvision that downloads the same files, if there is one.
    """

    url: str = ""
    torchvision: str | None = None

    def images(self, part: str, root: Path, candidates: Sequence[Path], sample: str, download: bool) -> ImageSource:
        """Takes the first folder that has the sample, or, so that the message names the image, that exists."""
        folder = _with(sample, candidates)
        if folder is None and download and self.torchvision:
            open_torchvision(self.torchvision, root, self.url, download=True)
            folder = _with(sample, candidates)
        folder = folder or next((candidate for candidate in candidates if candidate.is_dir()), None)
        if folder is None:
            looked = " and in ".join(repr(str(candidate)) for candidate in candidates)
            where = f"; they come from {self.url}" if self.url else ""
            offer = ", or with --data.download true" if self.torchvision else ""
            raise UserError(f"no {part} images: looked for {sample!r} in {looked}{where}{offer}")
        return FileImages(folder)


@dataclass(frozen=True)
class TorchvisionArrays(Source):
    """A torchvision data set with fixed training and test arrays; 20 % of the training images are for validation.

    Attributes:
        torchvision: name of the data set class.
        url: where it comes from.
        train: arguments that choose the training images.
        test: arguments that choose the test images.
        labels: attribute with the labels; ``_samples`` holds (path, label) pairs.
        class_names: in label order; empty: those of the data set.
        folder: below the data root.
    """

    torchvision: str
    url: str
    train: Mapping[str, Any] = field(default_factory=lambda: {"train": True})
    test: Mapping[str, Any] = field(default_factory=lambda: {"train": False})
    labels: str = "targets"
    class_names: tuple[str, ...] = ()
    folder: str = "."

    def open(self, root: Path, array: str, download: bool) -> Any:
        """Opens the training or the test array as a sequence of (PIL image, label), as ``open_torchvision`` does."""
        arguments = self.train if array == "train" else self.test
        return open_torchvision(self.torchvision, root / self.folder, self.url, download, **arguments)

    def split(self, name: str, root: Path, download: bool) -> Split:
        """Makes the split; its digest is that of the training and then the test labels as little-endian int64."""
        arrays = {array: self.open(root, array, download) for array in ("train", "test")}
        names = self.class_names or tuple(arrays["train"].classes)
        digest = hashlib.sha256()
        rows: dict[str, list[Row]] = {}
        for array, dataset in arrays.items():
            values = getattr(dataset, self.labels)
            if self.labels == "_samples":
                values = [label for _, label in values]
            labels = np.asarray(values, dtype="<i8")
            digest.update(labels.tobytes())
            rows[array] = [Row(str(i), int(label), names[label]) for i, label in enumerate(labels)]
        parts = stratify(rows["train"], (VAL_PERCENT, 0))
        parts["test"] = rows["test"]
        file = f"torchvision.datasets.{self.torchvision}"
        return make_split(name, parts, file=file, sha256=digest.hexdigest(), image_root=dict(ARRAYS), item_kind="index")

    def images(self, part: str, root: Path, candidates: Sequence[Path], sample: str, download: bool) -> ImageSource:
        """Opens the array that the part indexes."""
        del candidates, sample
        return ArrayImages(self.open(root, ARRAYS[part], download), _first_of_pair)


@dataclass(frozen=True)
class SklearnDigits(Source):
    """The 1,797 handwritten digits of 8 x 8 pixels that come with scikit-learn."""

    def images(self, part: str, root: Path, candidates: Sequence[Path], sample: str, download: bool) -> ImageSource:
        """Loads all; every part indexes the same array."""
        from sklearn.datasets import load_digits

        del part, root, candidates, sample, download
        return ArrayImages(load_digits().images, _grey_levels_16)


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


def _with(sample: str, candidates: Sequence[Path]) -> Path | None:
    return next((folder for folder in candidates if (folder / sample).is_file()), None)


def _first_of_pair(pair: tuple[Image.Image, int]) -> Image.Image:
    return pair[0]


def _grey_levels_16(values: np.ndarray) -> Image.Image:
    return Image.fromarray(np.round(values * (255 / 16)).astype(np.uint8))
