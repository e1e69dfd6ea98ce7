"""A digest of a file inside the file: what kshot writes and reads again is refused when one bit of it has changed.

A writer leaves :data:`BLANK` where its format takes text. :func:`seal` puts the SHA-256 of the file with its blank
there, and :func:`check_seal` compares: the digest covers every bit of the file but itself.
"""

from __future__ import annotations

import hashlib
import mmap
from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from kshot.errors import UserError

MARK = b"kshot-sha256:"
BLANK = MARK.decode() + 64 * "0"


def digest_of(content: mmap.mmap | bytes, start: int) -> str:
    """The SHA-256, in 64 hexadecimal digits, of a content whose digest from ``start`` on counts as zeros."""
    view = memoryview(content)
    found = hashlib.sha256(view[:start])
    found.update(64 * b"0")
    found.update(view[start + 64 :])
    view.release()
    return found.hexdigest()


def seal(file: Path) -> None:
    """Puts a file's digest in the place of its blank."""
    with file.open("rb+") as opened, mmap.mmap(opened.fileno(), 0) as content:
        start = content.find(BLANK.encode()) + len(MARK)
        content[start : start + 64] = digest_of(content, start).encode()


def save_sealed(tensors: dict[str, Tensor], file: Path, metadata: Mapping[str, str] | None = None) -> None:
    """Writes contiguous tensors as safetensors, with their digest in the header."""
    save_file(tensors, file, metadata={**(metadata or {}), "kshot_seal": BLANK})
    seal(file)


def check_seal(file: Path) -> bool:
    """Whether a file carries a digest.

    Raises:
        UserError: it does, and its content is another.
    """
    with file.open("rb") as opened:
        if not file.stat().st_size:  # which cannot be mapped
            return False
        with mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as content:
            start = content.find(MARK) + len(MARK)
            if start < len(MARK):
                return False
            same = content[start : start + 64] == digest_of(content, start).encode()
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
