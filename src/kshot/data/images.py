"""From a stored image to a uint8 tensor: opening, CLIP's evaluation transform, augmentation."""

import math
import random
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from kshot.errors import UserError


class UnreadableImageError(UserError):
    """An image that cannot be opened; the message names it."""

    def __init__(self, message: str) -> None:
        # A DataLoader worker raises it again from the text of its traceback; the message has to stay one line.
        last = message.rstrip().rsplit("\n", 1)[-1]
        super().__init__(last.removeprefix(f"{__name__}.{type(self).__name__}: "))


class ImageSource(ABC):
    """Opens the images of a part by the ``path`` of their rows."""

    @abstractmethod
    def open(self, path: str) -> Image.Image:
        """Decodes one image to 8-bit RGB; raises UnreadableImageError for what is missing, truncated or no image."""

    def check(self, path: str) -> None:
        """Finds out as cheaply as possible whether ``open`` would succeed, and raises as it does."""
        self.open(path)

    def close(self) -> None:  # noqa: B027  most hold nothing
        """Lets go of what is in memory, such as a whole data set; ``open`` gets it again."""


@dataclass(frozen=True)
class FileImages(ImageSource):
    """Image files below a folder. EXIF orientation is ignored, as in CLIP's own preprocessing."""

    folder: Path

    def open(self, path: str, draft: bool = False) -> Image.Image:
        """Reads the whole file; a draft of a JPEG has an eighth of each side."""
        file = self.folder / path
        try:
            with Image.open(file) as image:
                if draft:
                    image.draft("RGB", (1, 1))
                return to_rgb(image)
        except FileNotFoundError:
            raise UnreadableImageError(f"no such image: {str(file)!r}") from None
        except MemoryError:
            raise
        except Exception as error:  # a broken file may raise anything in a decoder: SyntaxError, struct.error, ...
            reason = " ".join(str(error).split()) or type(error).__name__
            raise UnreadableImageError(f"cannot read the image {str(file)!r}: {reason}") from None

    def check(self, path: str) -> None:
        self.open(path, draft=True)


class ArrayImages(ImageSource):
    """Images that a sequence holds by index: ``load`` opens it, and ``convert`` makes an image of an item."""

    def __init__(self, load: Callable[[], Sequence[Any]], convert: Callable[[Any], Image.Image]) -> None:
        self.load, self.convert = load, convert
        self.items: Sequence[Any] | None = load()

    def open(self, path: str) -> Image.Image:
        if self.items is None:
            self.items = self.load()
        index = int(path)
        if index >= len(self.items):
            raise UnreadableImageError(f"there is no image {index}: the data set has {len(self.items)}")
        return to_rgb(self.convert(self.items[index]))

    def check(self, path: str) -> None:
        """Knows arrays to be readable."""

    def close(self) -> None:
        self.items = None


def to_rgb(image: Image.Image) -> Image.Image:
    """Converts to 8-bit RGB; 16-bit greyscale is scaled, where PIL alone would clip it to white."""
    if image.mode.startswith("I"):
        values = np.asarray(image).astype(np.int64)
        image = Image.fromarray((values >> 8 if values.max(initial=0) > 255 else values).clip(0, 255).astype(np.uint8))
    return image.convert("RGB")


def evaluation_transform(image_size: int) -> Callable[[Image.Image], Tensor]:
    """Makes CLIP's preprocessing, a picklable function from an image to a uint8 tensor (3, image_size, image_size).

    That is: shorter side to ``image_size`` (bicubic, antialiased), centre crop; normalising is left to the backbone,
    which owns mean and deviation. The image is converted to RGB first: the result is the same for RGB and greyscale,
    and palette images get resized in colours instead of palette indices.
    """
    from torchvision.transforms import v2

    resize, crop = v2.Resize(image_size, v2.InterpolationMode.BICUBIC), v2.CenterCrop(image_size)
    transform: Callable[[Image.Image], Tensor] = v2.Compose([to_rgb, resize, crop, to_tensor])
    return transform


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
        """Makes one view, a uint8 tensor (3, image_size, image_size), of an RGB image of any size.

        The stream is the only source of randomness; the caller seeds it from (seed, index, view).
        """


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
