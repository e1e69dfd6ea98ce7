"""From an RGB image to a uint8 tensor: the preprocessing of the weights, and augmentation."""

import math
import random
from abc import ABC, abstractmethod
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from kshot.backbones import Preprocessing
from kshot.errors import UserError

MOST = 2**22  # pixels of an image that only its centre is taken of


def evaluation_view(image: Image.Image, preprocessing: Preprocessing) -> Tensor:
    """Resizes an RGB image and crops its centre as the weights want it; gives a uint8 tensor (3, size, size).

    The same bits as the transforms of open_clip and timm before normalising, which is left to the backbone.
    """
    size, kernel = preprocessing.size, kernel_of(preprocessing)
    width, height = preprocessing.resized(*image.size)
    if width * height > MOST and width > image.width:
        image = enlarged_centre(image, width, height, size, kernel)
    else:
        image = cropped(image.resize((width, height), kernel), size, size)
    if image.size != (size, size):
        view = Image.new("RGB", (size, size), preprocessing.fill)
        view.paste(image, ((size - image.width) // 2, (size - image.height) // 2))
        image = view
    return to_tensor(image)


def enlarged_centre(image: Image.Image, width: int, height: int, size: int, kernel: Image.Resampling) -> Image.Image:
    """The centre of a long image that is enlarged to ``width`` times ``height``, without all that is cropped away.

    Pillow enlarges rows first and columns then, each column for itself: columns outside the crop are dropped between
    the two, and the others made a few at a time.
    """
    image = cropped(image.resize((width, image.height), kernel), size, image.height)
    view = Image.new("RGB", (image.width, min(size, height)))
    for left in range(0, image.width, step := max(1, MOST // height)):
        strip = image.crop((left, 0, min(left + step, image.width), image.height))
        view.paste(cropped(strip.resize((strip.width, height), kernel), size, size), (left, 0))
    return view


def kernel_of(preprocessing: Preprocessing) -> Image.Resampling:
    """Pillow's name of an interpolation."""
    return Image.Resampling[preprocessing.interpolation.upper()]


def cropped(image: Image.Image, width: int, height: int) -> Image.Image:
    """The centre of an image where it is larger than a width or height, at the pixel where torchvision puts it."""
    width, height = min(image.width, width), min(image.height, height)
    if (width, height) == image.size:
        return image
    left, top = round((image.width - width) / 2), round((image.height - height) / 2)
    return image.crop((left, top, left + width, top + height))


def limit_size(image: Image.Image, shorter_side: int, kernel: Image.Resampling) -> Image.Image:
    """Shrinks an image until its shorter side is at most ``shorter_side`` pixels."""
    width, height = image.size
    scale = shorter_side / min(width, height)
    if scale >= 1:
        return image
    return image.resize((max(1, round(width * scale)), max(1, round(height * scale))), kernel)


def to_tensor(image: Image.Image) -> Tensor:
    """Turns an RGB image into a uint8 tensor (3, height, width)."""
    return torch.from_numpy(np.asarray(image).transpose(2, 0, 1).copy())


class Augment(ABC):
    """A random change of training images. Subclasses are frozen dataclasses of their settings."""

    @abstractmethod
    def __call__(self, image: Image.Image, preprocessing: Preprocessing, stream: random.Random) -> Tensor:
        """Makes one view, uint8 (3, size, size), of an RGB image; all chance comes from the stream."""


@dataclass(frozen=True)
class CropFlip(Augment):
    """Random resized crop and horizontal flip, as CLIP's adaptation methods train with; resized as the weights want it.

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

    def __call__(self, image: Image.Image, preprocessing: Preprocessing, stream: random.Random) -> Tensor:
        left, top, width, height = self.crop(image.width, image.height, stream)
        box = (left, top, left + width, top + height)
        # Cropping before resizing keeps pixels outside the crop out of the filter, as torchvision does.
        view = image.crop(box).resize((preprocessing.size, preprocessing.size), kernel_of(preprocessing))
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
