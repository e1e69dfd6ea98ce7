"""A digest of a file inside the file: what kshot writes and reads again is refused when one bit of it has changed.

A writer leaves :data:`BLANK` where its format takes text. :func:`seal` puts the SHA-256 of the file with its blank
there, and :func:`check_seal` compares: the digest covers every bit of the file but itself.
"""

from __future__ import annotations

import hashlib
import mmap
import os
from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from kshot.errors import UserError

MARK = b"kshot-sha256:"
BLANK = MARK.decode() + 64 * "0"
CHUNK = 1 << 20  # bytes that are read at a time


def place_of(file: Path) -> int:
    """Where the 64 digits of a file's digest, or of its blank, begin; 0 where there is none."""
    with file.open("rb") as opened:
        if not os.fstat(opened.fileno()).st_size:  # which cannot be mapped
            return 0
        with mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as content:
            found = content.find(MARK)
    return 0 if found < 0 else found + len(MARK)


def digest_of(file: Path, start: int) -> bytes:
    """The SHA-256 of a file whose digits from ``start`` on count as zeros, as 64 digits."""
    found, at = hashlib.sha256(), 0
    with file.open("rb") as opened:
        while chunk := opened.read(CHUNK):
            first, last = max(start - at, 0), min(start + 64 - at, len(chunk))
            if first < last:
                chunk = chunk[:first] + (last - first) * b"0" + chunk[last:]
            found.update(chunk)
            at += len(chunk)
    return found.hexdigest().encode()


def seal(file: Path) -> None:
    """Puts a file's digest in the place of its blank."""
    start = place_of(file)
    digest = digest_of(file, start)
    with file.open("rb+") as opened:
        opened.seek(start)
        opened.write(digest)


def save_sealed(tensors: dict[str, Tensor], file: Path, metadata: Mapping[str, str] | None = None) -> None:
    """Writes contiguous tensors as safetensors, with their digest in the header."""
    save_file(tensors, file, metadata={**(metadata or {}), "kshot_seal": BLANK})
    seal(file)


def check_seal(file: Path) -> bool:
    """Whether a file carries a digest.

    Raises:
        UserError: it does, and its content is another.
    """
    start = place_of(file)
    if not start:
        return False
    with file.open("rb") as opened:
        opened.seek(start)
        same = opened.read(64) == digest_of(file, start)
    if not same:
        raise UserError(f"{file} is damaged or edited: its content is not that of its own digest. Take another copy.")
    return True


def add_zip_comment(file: Path) -> None:
    """Appends a blank to a zip file without a comment, such as one of ``torch.save``, as its comment."""
    with file.open("rb+") as opened:
        opened.seek(-2, 2)  # the length of the comment is the last thing in it
        assert opened.read() == b"\0\0"
        opened.seek(-2, 2)
        opened.write(len(BLANK).to_bytes(2, "little") + BLANK.encode())
