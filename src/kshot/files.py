"""Files and folders: careful reading and writing, and where kshot's own things lie. Loads no torch."""

from __future__ import annotations

import csv
import gzip
import io
import os
import re
import secrets
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from safetensors import SafetensorError

from kshot.errors import UserError, first_line

FORMULA = tuple("=+-@\t\r＝＋－＠")  # what a spreadsheet takes for the beginning of a formula
MOST_BYTES = 2**26  # of a list of images; that of ImageNet's 1.3 million has as many


def unfinished(path: Path) -> Path:
    """A name beside a path for what is not whole yet, which no other process has, not even on another machine."""
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Writes beside a file and renames, so that the file is either the old one or the new one.

    ``write`` writes all of it to the path that it is given. Raises UserError when the disk refuses, or the folder is
    gone; what was there before is untouched then.
    """
    beside = unfinished(path)
    try:
        write(beside)
        with beside.open("rb+") as file:
            os.fsync(file.fileno())
        beside.replace(path)
    except (OSError, RuntimeError, SafetensorError) as error:  # torch's and safetensors' ways to report a full disk
        there = os.path.exists(path)  # noqa: PTH110  Path.exists raises for a name too long or a folder without access
        before = "the one there before is kept" if there else "there was none before"
        raise UserError(
            f"Could not write {path} ({first_line(error)}); {before}. If the disk is full, free some and resume."
        ) from error
    finally:
        with suppress(OSError):
            beside.unlink(missing_ok=True)


@contextmanager
def new_file(path: Path) -> Iterator[BinaryIO]:
    """A file to write, which is there whole at the end of the block, and not at all where that fails.

    Raises:
        UserError: there is one already, or it cannot be written.
    """
    if os.path.lexists(path):
        raise UserError(f"{path} exists already: choose another name.")
    make_folder(path.parent)
    beside = unfinished(path)
    try:
        with beside.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        beside.rename(path)
    except OSError as error:
        raise UserError(f"Could not write {path}: {(error.strerror or str(error)).lower()}.") from error
    finally:
        with suppress(OSError):
            beside.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Writes a file of text as it is, line ends included."""
    content = text.encode("utf-8", "surrogateescape")  # names of files need be no UTF-8
    write_atomically(path, lambda file: file.write_bytes(content))


def write_csv(path: Path, rows: Iterable[Sequence[Any]]) -> None:
    """Writes rows of cells, the names of the columns first."""
    text = io.StringIO(newline="")
    csv.writer(text).writerows(rows)
    write_text(path, text.getvalue())


def is_formula(text: str) -> bool:
    """Whether a spreadsheet would take the text of a cell for a formula, and so might run it; numbers are none."""
    return text.startswith(FORMULA) and re.fullmatch(r"[-+]?[0-9.]+", text) is None


def make_folder(path: Path, parents: bool = True) -> Path:
    """Makes a folder that may be there already, and those that it lies in; raises UserError where that is refused."""
    try:
        path.mkdir(parents=parents, exist_ok=True)
    except OSError as error:
        raise UserError(f"The folder {path} cannot be made: {(error.strerror or str(error)).lower()}.") from error
    return path


@contextmanager
def may_be_read() -> Iterator[None]:
    """Turns what the file system refuses into a UserError that names the file."""
    try:
        yield
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise UserError(f"{error.filename or 'a file'}: may not be read ({reason})") from None


@may_be_read()
def file_content(path: Path) -> bytes:
    """Reads a file, unpacked where its name ends in ``.gz``; raises UserError for more than ``MOST_BYTES``, or none."""
    if path.exists() and not path.is_file():  # a pipe would be waited for, and a device has no end
        raise UserError(f"{path}: not a file")
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            content = file.read(MOST_BYTES + 1)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise UserError(f"{path}: not a gzip file ({error})") from None
    if len(content) > MOST_BYTES:
        raise UserError(f"{path}: more than {amount(MOST_BYTES)}, which no list of images has")
    return content


def packaged_folder(name: str) -> Path:
    """Where configs or data_splits lie: inside the package in a wheel, in the repository's root in a checkout."""
    package = Path(__file__).resolve().parent
    installed = package / name
    return installed if installed.is_dir() else package.parents[1] / name


def cache_folder() -> Path:
    """Where to keep what can be computed again: ``$KSHOT_CACHE``, or ``kshot`` in ``$XDG_CACHE_HOME`` or ``~/.cache``.

    An empty variable counts as unset; the folder need not exist. Raises RuntimeError for a user without a home folder.
    """
    own, shared = os.environ.get("KSHOT_CACHE"), os.environ.get("XDG_CACHE_HOME")
    return Path(own or Path(shared or "~/.cache", "kshot")).expanduser()


def amount(size: float) -> str:
    """Bytes in three digits: ``604 GB``."""
    units = ("bytes", "kB", "MB", "GB", "TB", "PB", "EB")
    for unit in units[:-1]:
        if size < 999.5:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:,.0f} {units[-1]}"


def memory_of_machine() -> int | None:
    """Bytes of memory that this process may use: the machine's, or less in a container; None where nobody tells."""
    sizes = []
    with suppress(AttributeError, ValueError, OSError):  # no sysconf on Windows
        sizes.append(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    for limit in ("memory.max", "memory/memory.limit_in_bytes"):  # control groups, version 2 and 1
        with suppress(ValueError, OSError):  # "max" where there is no limit
            sizes.append(int(Path("/sys/fs/cgroup", limit).read_text()))
    return min((size for size in sizes if size > 0), default=None)
