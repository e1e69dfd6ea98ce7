"""From a stored image to an RGB image of 8 bits: one rule for each kind of pixels (docs/images.md)."""

import logging
import math
import os
import stat
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import numpy as np
from PIL import ExifTags, Image

from kshot.data.digests import digest_of, file_digests
from kshot.data.splits import Row
from kshot.errors import UserError

logger = logging.getLogger("kshot")

# No others: Pillow hands PostScript, whatever the file is called, to a program that runs it.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
LONGEST = 4096  # times the shorter side: resizing a longer image to a given shorter side takes seconds
NEVER_DEEP = frozenset({".jpg", ".jpeg", ".webp", ".bmp", ".gif"})  # suffixes of formats with 8 bits a value
DEPTHS = (8, 10, 12, 14, 16, 24, 32)  # bits of values as scanners and cameras write them
TRANSPARENT = frozenset({"RGBA", "RGBa", "LA", "La", "PA"})
UPRIGHT = {  # what undoes each orientation of EXIF
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


@dataclass(frozen=True)
class Decoding:
    """How stored pixels become RGB; the defaults are CLIP's own rule.

    Attributes:
        exif: turn photos upright by their EXIF orientation.
        background: colour under transparent images; None shows the colours that transparency hides.
        white: the value that is white in images of more than 8 bits; None when it is not known.

    Raises:
        UserError: a background that is no colour, or a white that is not positive.
    """

    exif: bool = False
    background: tuple[int, ...] | None = None
    white: float | None = 65535.0

    def __post_init__(self) -> None:
        colour = self.background
        if colour is not None and not (len(colour) == 3 and all(0 <= value <= 255 for value in colour)):
            raise UserError(f"background must be three values in 0 ... 255, not {list(colour)}")
        if self.white is not None and not 0 < self.white < math.inf:
            raise UserError(f"white must be a positive number, not {self.white}")


CLIPS = Decoding()


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


@contextmanager
def opened(file: Path, content: BinaryIO | None = None) -> Iterator[Image.Image]:
    """Opens an image file, or the content that it would have, of which only the header is read at first.

    Raises UnreadableImageError for what is missing, truncated, too large or long, or in none of the ``FORMATS``; also
    for what fails while it is open.
    """
    if content is None and (wrong := fault(file)):
        raise UnreadableImageError(wrong)
    try:
        with unwarned(), Image.open(content or file, formats=FORMATS) as image:
            check_shape(image)
            check_size(image)
            yield image
    except MemoryError:
        raise
    except Exception as error:  # a broken file may raise anything in a decoder: SyntaxError, struct.error, ...
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UnreadableImageError(f"cannot read the image {str(file)!r}: {reason}") from None


def unwarned() -> AbstractContextManager[Any]:
    """Lets Pillow not warn of what is refused; in the main thread alone, for filters are those of all threads."""
    if threading.current_thread() is not threading.main_thread():
        return nullcontext()
    return warnings.catch_warnings(action="ignore", category=Image.DecompressionBombWarning)


def check_size(image: Image.Image) -> None:
    """Raises ValueError for an image of which Pillow warns."""
    pixels, most = image.width * image.height, Image.MAX_IMAGE_PIXELS
    if most is not None and pixels > most:
        raise ValueError(f"its size of {pixels:,} pixels exceeds limit of {most:,}")


def check_shape(image: Image.Image) -> None:
    """Raises ValueError for an image that takes seconds to resize."""
    if max(image.size) > LONGEST * min(image.size):
        raise ValueError(f"{image.width} x {image.height} pixels, but a side may have {LONGEST} of the other")


def read_image(
    file: Path, draft: bool = False, decoding: Decoding = CLIPS, content: BinaryIO | None = None
) -> Image.Image:
    """Decodes what ``opened`` opens to 8-bit RGB; a draft of a JPEG has an eighth of each side. Raises as it does."""
    with opened(file, content) as image:
        if draft:
            image.draft("RGB", (1, 1))
        return to_rgb(image, decoding)


@dataclass(frozen=True)
class FileImages:
    """Image files below a folder."""

    folder: Path = Path()

    def open(self, path: str, draft: bool = False, decoding: Decoding = CLIPS) -> Image.Image:
        """Gives the image of a row by ``read_image``."""
        return read_image(self.folder / path, draft, decoding)

    def called(self, path: str) -> Path:
        """What messages call an image."""
        return self.folder / path

    def raw(self, path: str) -> AbstractContextManager[Image.Image]:
        """Opens the image of a row by ``opened``."""
        return opened(self.folder / path)

    def size(self, path: str) -> int:
        """Gives the number of bytes; raises OSError or ValueError for what is no file."""
        entry = (self.folder / path).stat()
        if not stat.S_ISREG(entry.st_mode):  # a pipe would be waited for
            raise ValueError("not a file")
        return entry.st_size

    def beginning(self, path: str, count: int) -> bytes:
        """Gives the first bytes; raises OSError or ValueError where they cannot be read."""
        with (self.folder / path).open("rb") as file:
            return file.read(count)

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

    def open(self, path: str, draft: bool = False, decoding: Decoding = CLIPS) -> Image.Image:  # noqa: ARG002  for none
        """Gives an image as 8-bit RGB; raises UnreadableImageError for an index that there is not."""
        if self.items is None:
            self.items = self.load()
        if int(path) >= len(self.items):
            raise UnreadableImageError(f"there is no image {path}: the data set has {len(self.items)}")
        return to_rgb(self.convert(self.items[int(path)]), decoding)

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

    def open(self, path: str, draft: bool = False, decoding: Decoding = CLIPS) -> Image.Image:
        """Gives the image of a row; raises UnreadableImageError where it cannot be read."""

    def digests(self, paths: Sequence[str]) -> list[str]:
        """Digests images; an empty text for one that cannot be read."""

    def close(self) -> None:
        """Lets go of what ``open`` gets again."""


def to_rgb(image: Image.Image, decoding: Decoding = CLIPS) -> Image.Image:
    """Converts an image to 8-bit RGB; raises ValueError for deep values when it is not known which is white."""
    image.load()  # formats may tell of orientation and transparency at their end
    turn = UPRIGHT.get(orientation(image)) if decoding.exif else None
    if is_deep(image):
        image = scaled(image, decoding.white)
    elif decoding.background is not None and (image.mode in TRANSPARENT or "transparency" in image.info):
        under = Image.new("RGBA", image.size, (*decoding.background, 255))
        image = Image.alpha_composite(under, image.convert("RGBA"))
    if image.mode != "RGB":  # which convert would copy
        image = image.convert("RGB")
    return image if turn is None else image.transpose(turn)


def orientation(image: Image.Image) -> int:
    """How a camera was held, 1 ... 8 of EXIF; 1, upright, where nothing legible is said."""
    try:
        return int(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # a broken entry may raise anything, and the pixels are there
        return 1


def is_deep(image: Image.Image) -> bool:
    """Whether values have more than 8 bits, or are floats: greyscale of 16 or 32 bits."""
    return image.mode == "F" or image.mode.startswith("I")


def scaled(image: Image.Image, white: float | None) -> Image.Image:
    """Makes 8-bit greyscale of deep values: 255 times value / white, rounded, within 0 ... 255."""
    if white is None:
        raise ValueError("it has more than 8 bits, and which value is white is not known: set --data.white")
    values = np.nan_to_num(np.asarray(image, dtype=np.float32)).clip(0, white)
    return Image.fromarray(np.rint(values * 255 / white).astype(np.uint8))


def decoding_of(own: bool, exif: bool | None, background: Sequence[int] | None, white: float | None) -> Decoding:
    """How a user's own images, or those of the catalogue, become RGB by the options of a data module.

    Without options the user's own are turned upright and lie on white, and the catalogue's are read as CLIP reads them.
    """
    if background is None and own:
        background = (255, 255, 255)
    return Decoding(own if exif is None else exif, None if background is None else tuple(background), white)


def white_of(entry: Any, root: str, rows: Sequence[Row]) -> float | None:
    """Finds by its training images which value is white in a data set's images of more than 8 bits, and logs it.

    It is that of 16 bits where no training image has more than 8, and None where none is there to tell.
    """
    try:
        images = entry.images(root, "train", rows)
    except UserError:  # a run may be tested, or predict, where the images that it was trained on are not
        return None
    if isinstance(images, ArrayImages):
        return CLIPS.white
    read, largest = largest_value(images, [row.path for row in rows])
    if largest is None:
        return CLIPS.white if read else None
    white = next((top for top in (1.0, *(2.0**bits - 1 for bits in DEPTHS)) if largest <= top), largest)
    logger.info(
        f"Images of more than 8 bits: {white:.10g} is white (the training images go up to {largest:.10g}); "
        "data.white sets another."
    )
    return white


def largest_value(images: Any, paths: Sequence[str]) -> tuple[bool, float | None]:
    """Whether any image that may have more than 8 bits can be read, and the largest value of those that have.

    ``images`` are files, or files in something else, which ``raw`` opens.
    """
    doubtful = [path for path in paths if Path(path).suffix.lower() not in NEVER_DEEP]
    read, largest = not doubtful, None
    for path in doubtful:
        with suppress(UnreadableImageError), images.raw(path) as image:  # said where the image is asked for
            read = True
            if is_deep(image):
                values = np.asarray(image, dtype=np.float64)
                largest = max(largest or 0.0, float(values[np.isfinite(values)].max(initial=0)))
    return read, largest


def faults_of(images: ImageSource, paths: Sequence[str]) -> tuple[int, str]:
    """Number of files that cannot be read, as far as their folders tell, and what is wrong with the first."""
    files = [images.folder / path for path in paths] if isinstance(images, FileImages) else []
    wrong = list(filter(None, map(fault, files)))
    return len(wrong), next(iter(wrong), "")
