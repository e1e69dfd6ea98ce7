"""Listing a folder: which files below it are images, and what else there is. Each folder is read once.

What tools leave behind is passed over without a word; all else that is no image is counted.
"""

import os
import re
import time
import warnings
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from PIL import Image

from kshot.data.images import FORMATS
from kshot.data.splits import listed
from kshot.files import may_be_read

IMAGE_SUFFIXES = (
    *(".jpg", ".jpeg", ".jfif", ".jpe", ".png", ".apng", ".bmp", ".gif", ".webp", ".tif", ".tiff"),
    *(".ppm", ".pgm", ".pbm", ".pnm"),
)  # taken for images without a look inside
MOST_LINKS = 3  # linked folders on the way to an image: the root, a part and a class
_TOOL_MADE = (
    *("__macosx", "@eadir", "@__thumb", "@tmp", "#recycle", "#snapshot", "$recycle.bin", "system volume information"),
    *("lost+found", "__pycache__", "thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r"),
)  # by macOS, Synology's and QNAP's servers, Windows, Linux and Python
_UNSURE = 2_000_000_000  # nanoseconds in which a change need not show in the time of a folder


@dataclass(frozen=True, eq=False)
class Listing:
    """What lies below a folder.

    Attributes:
        images: sorted POSIX paths below it.
        folders: the same of folders.
        files: names of other files in the folder itself, sorted.
        left_out: number of files that are no images, by kind: ``.txt``, ``without suffix``, ``broken links``, ...
        times: of the last change of every folder, or of the archive, in nanoseconds, by its path.
        members: of an archive, where its images lie.
    """

    images: tuple[str, ...]
    folders: tuple[str, ...]
    files: tuple[str, ...]
    left_out: Mapping[str, int]
    times: Mapping[str, int]
    members: Mapping[str, Any] = field(default_factory=dict, repr=False)

    def holds(self, root: Path) -> bool:
        """Whether the listing is of this folder or archive, and no file has come or gone since then."""
        try:
            return str(root) in self.times and all(
                before == os.stat(folder).st_mtime_ns  # noqa: PTH116  thousands of folders
                for folder, before in self.times.items()
            )
        except OSError:
            return False


def tool_made(name: str) -> bool:
    """Whether a file or folder is hidden, or of those that systems and tools make for themselves."""
    return name.startswith((".", "~$")) or name.lower().startswith(_TOOL_MADE)


@may_be_read()
def meant_around(folder: Path) -> str:
    """Advice for a folder that is one class itself: the folder around it, where that has several."""
    around = folder.resolve().parent
    beside = sorted(each.name for each in os.scandir(around) if each.is_dir() and not tool_made(each.name))
    return f"did you mean {around}, with {listed(beside)}?" if len(beside) > 1 else "give one folder per class"


def kind_of(name: str) -> str:
    """Gives the suffix of a file, by which it is counted where it is no image."""
    suffix = re.search(r"\.[a-z0-9]{1,8}$", name.lower())
    return suffix[0] if suffix else "without suffix"


def counted(left_out: Mapping[str, int]) -> str:
    """Words for what was left out: ``12 .heic, 3 .txt``, the most first."""
    return ", ".join(f"{n:,} {kind}" for kind, n in sorted(left_out.items(), key=lambda item: (-item[1], item[0])))


@may_be_read()
def list_folder(root: Path) -> Listing:
    """Lists a folder, sub-folders and linked folders included; a link to a folder that it lies in is not followed.

    A file with a suffix of ``IMAGE_SUFFIXES`` is an image, and so is any other that can be read as one. Raises
    UserError for a folder that may not be read.
    """
    images: list[str] = []
    folders: list[str] = []
    files: list[str] = []
    left_out: Counter[str] = Counter()
    times: dict[str, int] = {}
    pending: list[tuple[str, str, tuple[str, ...]]] = [("", os.path.realpath(root), ())]
    while pending:
        below, real, links = pending.pop()
        folder = f"{root}/{below}".rstrip("/") if below else str(root)
        times[folder] = time_of(folder)
        with os.scandir(folder) as entries:
            for entry in entries:
                name = entry.name
                if tool_made(name):
                    continue
                kind = _kind(entry)
                if kind == "folder" and not entry.is_symlink():
                    folders.append(below + name)
                    pending.append((f"{below}{name}/", f"{real}/{name}", links))
                elif kind == "folder":
                    target, inside = os.path.realpath(entry.path), (*links, real)
                    if len(links) == MOST_LINKS or any(f"{each}/".startswith(f"{target}/") for each in inside):
                        left_out["links to folders around them"] += 1
                        continue
                    folders.append(below + name)
                    pending.append((f"{below}{name}/", target, inside))
                elif kind == "file" and (name.lower().endswith(IMAGE_SUFFIXES) or reads_as_image(entry.path)):
                    images.append(below + name)
                else:
                    left_out[kind_of(name) if kind == "file" else kind] += 1
                    if kind == "file" and not below:
                        files.append(name)
    return Listing(tuple(sorted(images)), tuple(sorted(folders)), tuple(sorted(files)), left_out, times)


def time_of(path: str) -> int:
    """The time of the last change in nanoseconds; -1, which holds for nothing, where it was a moment ago."""
    changed = os.stat(path).st_mtime_ns  # noqa: PTH116  thousands of folders
    return changed if changed < time.time_ns() - _UNSURE else -1


def _kind(entry: os.DirEntry[str]) -> str:
    try:
        if entry.is_dir():
            return "folder"
        if entry.is_file():
            return "file"
    except OSError:  # a link to itself
        if entry.name.lower().endswith(IMAGE_SUFFIXES):
            raise
        return "broken links"
    return "broken links" if entry.is_symlink() and not os.path.exists(entry.path) else "pipes and devices"  # noqa: PTH110


def reads_as_image(file: str | BinaryIO) -> bool:
    """Whether Pillow can read the beginning of a file in one of the ``FORMATS``."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(file, formats=FORMATS):
                return True
    except Image.DecompressionBombError:
        return True  # and is refused by its own name later
    except Exception:  # a decoder may raise anything
        return False
