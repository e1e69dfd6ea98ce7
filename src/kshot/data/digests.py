"""Digests of image files, by which a run that goes on notices that one was overwritten.

A core digests about 4,000 photos of 110 kB a second. Those of many files are kept by path, size and time of change, in
one file of the cache folder; where that is broken or cannot be written, they are computed again.
"""

import hashlib
import json
import os
import stat
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from kshot.errors import UserError
from kshot.files import cache_folder, file_content, make_folder, write_atomically

NAME = "image_digests.json"
FEW = 500  # files that are digested as quickly as the cache is read
MOST = 100_000  # entries that are kept, the newest, in about 12 MB


def digest_of(content: bytes) -> str:
    """Gives the first 16 hexadecimal digits of the SHA-256."""
    return hashlib.sha256(content).hexdigest()[:16]


def file_digests(files: Sequence[Path]) -> list[str]:
    """Gives the ``digest_of`` each file, and an empty text where it cannot be read."""
    if len(files) <= FEW or os.environ.get("KSHOT_CACHE") == "":
        return [_digest(file, {}) for file in files]
    kept = _read_cache()
    before = len(kept)
    found = [_digest(file, kept) for file in files]
    if len(kept) > before:
        _write_cache(kept)
    return found


def _digest(file: Path, kept: dict[str, Any]) -> str:
    try:
        entry = file.stat()
        if not stat.S_ISREG(entry.st_mode):  # a pipe would be waited for
            return ""
        key = f"{entry.st_size} {entry.st_mtime_ns} {entry.st_ctime_ns} {file.absolute()}"
        if key not in kept:
            with file.open("rb") as content:
                kept[key] = hashlib.file_digest(content, "sha256").hexdigest()[:16]
        return str(kept[key])
    except (OSError, ValueError):  # ValueError: a NUL in the name
        return ""


def _read_cache() -> dict[str, Any]:
    try:
        checksum, kept = json.loads(file_content(cache_folder() / NAME))
        return dict(kept) if checksum == digest_of(json.dumps(kept).encode()) else {}
    except (UserError, ValueError, TypeError, RuntimeError):  # RuntimeError: no home folder, or nested too deeply
        return {}


def _write_cache(kept: dict[str, Any]) -> None:
    newest = dict(list(kept.items())[-MOST:])
    content = json.dumps([digest_of(json.dumps(newest).encode()), newest])
    with suppress(UserError, RuntimeError):
        folder = make_folder(cache_folder())
        write_atomically(folder / NAME, lambda path: path.write_text(content, encoding="ascii"))
