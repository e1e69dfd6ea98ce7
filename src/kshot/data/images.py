"""From a stored image to a uint8 tensor: opening, CLIP's evaluation transform, augmentation."""

import math
import os
import random
import stat
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from kshot.data.digests import digest_of, file_digests
from kshot.errors import UserError

# No others: Pillow hands PostScript, whatever the file is called, to a program that runs it.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
LONGEST = 100  # times the shorter side: resizing a longer image to a given shorter side takes gigabytes


class UnreadableImageError(UserError):
    """An image that cannot be opened; the message names it."""

    def __init__(self, message: str) -> None:
        # A DataLoader worker raises it again from the text of its traceback; the message has to stay one line.
        last = message.rstrip().rsplit("\n", 1)[-1]
        super().__init__(last.removeprefix(f"{__name__}.{type(self).__name__}: "))


def fault(file: Path) -> str:
    """Says in one line what keeps an image file from being read, as far as its folder tells; empty for nothing."""
    reason = ""
    try:
        entry = file.stat()
        if not stat.S_ISREG(entry.st_mode):  # a pipe would be waited for
            reason = "not a file"
        elif not entry.st_size:
            reason = "it is empty"
        elif not os.access(file, os.R_OK):
            reason = "permission denied"
    except FileNotFoundError:
        return f"no such image: {str(file)!r}"
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        reason = (getattr(error, "strerror", None) or str(error)).lower()
    return f"cannot read the image {str(file)!r}: {reason}" if reason else ""


def read_image(file: Path, draft: bool = False, *, content: BinaryIO | None = None) -> Image.Image:
    """Decodes an image file, or its content, to 8-bit RGB; a draft of a JPEG has an eighth of each side.

    Raises UnreadableImageError for what is missing, truncated, too large, or in none of the ``FORMATS``.
    """
    if content is None and (wrong := fault(file)):
        raise UnreadableImageError(wrong)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(content or file, formats=FORMATS) as image:
                if max(image.size) > LONGEST * min(image.size):
                    raise ValueError(
                        f"{image.width} x {image.height} pixels, but a side may have {LONGEST} of the other"
                    )
                if draft:
                    image.draft("RGB", (1, 1))
                return to_rgb(image)
    except MemoryError:
        raise
    except Exception as error:  # a broken file may raise anything in a decoder: SyntaxError, struct.error, ...
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UnreadableImageError(f"cannot read the image {str(file)!r}: {reason}") from None


@dataclass(frozen=True)
class FileImages:
    """Image files below a folder. EXIF orientation is ignored, as in CLIP's own preprocessing."""

    folder: Path

    def open(self, path: str, draft: bool = False) -> Image.Image:
        """Gives the image of a row by ``read_image``."""
        return read_image(self.folder / path, draft)

    def digests(self, paths: Sequence[str]) -> list[str]:
        """Digests the files of rows by ``file_digests``."""
        return file_digests([self.folder / path for path in paths])

    def close(self) -> None:
        """Holds nothing."""


class ArrayImages:
    """Images of a sequence that ``load`` opens, by index; ``convert`` makes an image of an item."""

    def __init__(self, load: Callable[[], Sequence[Any]], convert: Callable[[Any], Image.Image]) -> None:
        self.load, self.convert = load, convert
        self.items: Sequence[Any] | None = load()

    def open(self, path: str, draft: bool = False) -> Image.Image:  # noqa: ARG002  nothing to gain by a draft
        """Gives an image as 8-bit RGB; raises UnreadableImageError for an index that there is not."""
        if self.items is None:
            self.items = self.load()
        if int(path) >= len(self.items):
            raise UnreadableImageError(f"there is no image {path}: the data set has {len(self.items)}")
        return to_rgb(self.convert(self.items[int(path)]))

    def digests(self, paths: Sequence[str]) -> list[str]:
        """Digests the 8-bit RGB pixels of images; an empty text for one that cannot be read."""
        found = []
        for path in paths:
            try:
                found.append(digest_of(self.open(path).tobytes()))
            except UnreadableImageError:
                found.append("")
        return found

    def close(self) -> None:
        """Lets go of the whole data set; ``open`` gets it again."""
        self.items = None


class ImageSource(Protocol):
    """Opens images: files, the items of an array, or the members of an archive."""

    def open(self, path: str, draft: bool = False) -> Image.Image:
        """Gives the image of a row; raises UnreadableImageError where it cannot be read."""

    def digests(self, paths: Sequence[str]) -> list[str]:
        """Digests images; an empty text for one that cannot be read."""

    def close(self) -> None:
        """Lets go of what ``open`` gets again."""


def to_rgb(image: Image.Image) -> Image.Image:
    """Converts to 8-bit RGB; 16-bit greyscale is scaled, where PIL alone would clip it to white."""
    if image.mode.startswith("I"):
        values = np.asarray(image).astype(np.int32)
        image = Image.fromarray((values >> 8 if values.max(initial=0) > 255 else values).clip(0, 255).astype(np.uint8))
    return image.convert("RGB")


def evaluation_view(image: Image.Image, image_size: int) -> Tensor:
    """Applies CLIP's preprocessing to an RGB image; gives a uint8 tensor (3, image_size, image_size).

    That is: shorter side to ``image_size`` (bicubic, antialiased), centre crop; normalising is left to the backbone,
    which owns mean and deviation.
    """
    from torchvision.transforms import InterpolationMode
    from torchvision.transforms.v2 import functional

    resized = functional.resize(image, [image_size], InterpolationMode.BICUBIC)
    return to_tensor(functional.center_crop(resized, [image_size]))


def limit_size(image: Image.Image, shorter_side: int) -> Image.Image:
    """Shrinks an image (bicubic) until its shorter side is at most ``shorter_side`` pixels."""
    width, height = image.size
    scale = shorter_side / min(width, height)
    if scale >= 1:
        return image
    return image.resize((max(1, round(width * scale)), max(1, round(height * scale))), Image.Resampling.BICUBIC)


def to_tensor(image: Image.Image) -> Tensor:
    """Turns an RGB image into a uint8 tensor (3, height, width)."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


class Augment(ABC):
    """A random change of training images. Subclasses are frozen dataclasses of their settings."""

    @abstractmethod
    def __call__(self, image: Image.Image, image_size: int, stream: random.Random) -> Tensor:
        """Makes one view, uint8 (3, image_size, image_size), of an RGB image; all chance comes from the stream."""


@dataclass(frozen=True)
class CropFlip(Augment):
    """Random resized crop (bicubic) and horizontal flip, as CLIP's adaptation methods train with.

    Attributes:
        scale: smallest and largest share of the image's area in the crop.
        ratio: smallest and largest width divided by height of the crop.
        flip: probability of a mirror image; 0 for characters and signs.

    Raises:
        UserError: a range is not ascending and positive, or a share or probability is above 1.
    """

    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: float = 0.5

    def __post_init__(self) -> None:
        if not 0 < self.scale[0] <= self.scale[1] <= 1:
            raise UserError(f"scale must be two ascending shares in (0, 1], not {self.scale}")
        if not 0 < self.ratio[0] <= self.ratio[1]:
            raise UserError(f"ratio must be two ascending positive numbers, not {self.ratio}")
        if not 0 <= self.flip <= 1:
            raise UserError(f"flip must be a probability, not {self.flip}")

    def __call__(self, image: Image.Image, image_size: int, stream: random.Random) -> Tensor:
        left, top, width, height = self.crop(image.width, image.height, stream)
        box = (left, top, left + width, top + height)
        # Cropping before resizing keeps pixels outside the crop out of the filter, as torchvision does.
        view = image.crop(box).resize((image_size, image_size), Image.Resampling.BICUBIC)
        if stream.random() < self.flip:
            view = view.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return to_tensor(view)

    def crop(self, width: int, height: int, stream: random.Random) -> tuple[int, int, int, int]:
        """Draws a crop of an image of ``width`` times ``height`` pixels: left, top, width, height."""
        low, high = (math.log(value) for value in self.ratio)
        for _ in range(10):  # most draws fit at once; a long image may refuse all
            area = width * height * stream.uniform(*self.scale)
            aspect = math.exp(stream.uniform(low, high))
            crop_width, crop_height = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if 0 < crop_width <= width and 0 < crop_height <= height:
                left, top = stream.randint(0, width - crop_width), stream.randint(0, height - crop_height)
                return left, top, crop_width, crop_height
        aspect = min(max(width / height, self.ratio[0]), self.ratio[1])
        crop_width, crop_height = min(width, round(height * aspect)), min(height, round(width / aspect))
        return (width - crop_width) // 2, (height - crop_height) // 2, crop_width, crop_height
