"""Where data sets of the catalogue lie, and fetching, verifying and unpacking them."""

import gzip
import hashlib
import http.client
import lzma
import shutil
import stat
import tarfile
import tempfile
import urllib.error
import urllib.request
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, cast

from kshot.data.catalogue import CATALOGUE
from kshot.data.entries import Archive, is_there
from kshot.data.splits import check_path
from kshot.errors import UserError, first_line
from kshot.files import amount, make_folder

TRIES = 3  # of a source whose connection is lost, as long as each brings something
PATIENCE = 30.0  # seconds for an answer
MOST_RATIO, LEAST_BOUND = 20, 10**9  # an archive may swell to so many times its size, a small one to a gigabyte
MOST_MEMBERS = 2_000_000
BROKEN = (zipfile.BadZipFile, tarfile.TarError, EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile, RuntimeError)

Progress = Callable[[str, int, int | None], None]  # file, bytes that are there, bytes in all where known


def found_at(name: str, root: Path) -> str:
    """Says where a data set of the catalogue lies; nothing where it is not on this machine."""
    entry = CATALOGUE[name]
    if entry.kind == "digits":
        return "comes with scikit-learn"
    if entry.kind == "arrays" and entry.archives:
        places = [place for archive in entry.archives for place in archive.places(root)]
        return str(places[0].parent) if all(map(is_there, places)) else ""
    return str(entry.folder_there(root) or "")


def download(name: str, root: Path, progress: Progress) -> list[dict[str, Any]]:
    """Fetches what a data set lacks below a data root, and says of each file where it came from.

    What was fetched of a file when the process ended is gone on with. Images get their place by a rename when the file
    is verified and unpacked; what is there already stays as it is.

    Raises:
        UserError: no source has the file, none that passes its checksum, or an archive is broken or means harm.
    """
    done = []
    for archive in CATALOGUE[name].archives:
        if all(map(is_there, archive.places(root))):
            done.append({"file": archive.name, "source": "already there", "verified": "", "bytes": 0})
            continue
        make_folder(root / archive.into)
        partial = root / archive.into / f".{archive.name}.partial"
        url = fetch(archive, partial, progress)
        size = partial.stat().st_size
        with tempfile.TemporaryDirectory(
            prefix=f".{name}.", dir=root / archive.into, ignore_cleanup_errors=True
        ) as folder:
            _keep(archive, _content(archive, partial, Path(folder)), root)
        partial.unlink(missing_ok=True)
        checked = "sha256" if archive.sha256 else "md5" if archive.md5 else "no checksum is published"
        done.append({"file": archive.name, "source": url, "verified": checked, "bytes": size})
    return done


def fetch(archive: Archive, partial: Path, progress: Progress) -> str:
    """Fetches a file from the first source that has it intact, going on with what is there; returns the source.

    Raises:
        UserError: none has; what failed at each is said, and what was fetched is kept unless it is wrong.
    """
    reasons = []
    for url in archive.urls:
        for _ in range(TRIES):
            before = _size(partial)
            try:
                _fetch_from(url, partial, archive.name, progress)
            except (OSError, http.client.HTTPException, ValueError) as error:
                reason = f"{url}: {first_line(error)}"
                if _size(partial) != before:
                    continue  # it brought something: the next try brings the rest
                break
            if _intact(archive, partial):
                return url
            reason = f"{url}: the checksum is wrong"
            partial.unlink()
            if not before:
                break  # the whole file came from here
        reasons.append(reason)
    raise UserError(f"{archive.name} could not be downloaded: {'; '.join(reasons)}")


def _size(file: Path) -> int:
    return file.stat().st_size if file.exists() else 0


def _fetch_from(url: str, partial: Path, name: str, progress: Progress) -> None:
    there = _size(partial)
    request = urllib.request.Request(url, headers={"User-Agent": "kshot"})
    if there:
        request.add_header("Range", f"bytes={there}-")
    try:
        answer = urllib.request.urlopen(request, timeout=PATIENCE)
    except urllib.error.HTTPError as error:
        if error.code != 416:
            raise
        if (error.headers.get("Content-Range") or "").removeprefix("bytes */") == str(there):
            return  # all of it is there
        partial.unlink()  # more than there is: it is another file
        raise OSError("it is shorter than what was fetched before, which is given up") from None
    with answer:
        resumed = answer.status == 206 and (answer.headers.get("Content-Range") or "").startswith(f"bytes {there}-")
        there = there if resumed else 0
        length = answer.headers.get("Content-Length")
        total = there + int(length) if length else None
        if total and total - there > (free := shutil.disk_usage(partial.parent).free):
            raise OSError(f"{amount(total - there)} to fetch, and {amount(free)} free on the disk")
        with partial.open("ab" if resumed else "wb") as file:
            while block := answer.read(1 << 18):
                file.write(block)
                there += len(block)
                progress(name, there, total)
        if total is not None and there != total:
            raise OSError(f"the connection was lost after {amount(there)} of {amount(total)}")


def _intact(archive: Archive, file: Path) -> bool:
    kind = "sha256" if archive.sha256 else "md5"
    if not (expected := getattr(archive, kind)):
        return True
    with file.open("rb") as content:
        found = hashlib.file_digest(content, lambda: hashlib.new(kind, usedforsecurity=False)).hexdigest()
    return bool(found == expected)


def _content(archive: Archive, file: Path, folder: Path) -> Path:
    """Unpacks what was fetched into a folder, and gives the folder that has what is kept."""
    if list(archive.gives) == [archive.name]:
        file.rename(folder / archive.name)
        return folder
    unpack(file, folder / "outer", archive.name)
    if not archive.inner:
        return folder / "outer"
    for inner in archive.inner:
        unpack(folder / "outer" / inner, folder / "inner", inner.rpartition("/")[2])
    return folder / "inner"


def _keep(archive: Archive, content: Path, root: Path) -> None:
    for give, place in zip(archive.gives, archive.places(root), strict=True):
        if not (content / give).exists():
            raise UserError(f"{archive.name} has no {give!r}: it is not the file that is meant")
        if not is_there(place):
            make_folder(place.parent)
            try:
                (content / give).rename(place)
            except OSError as error:
                raise UserError(f"{place} could not be made: {first_line(error)}") from None


def unpack(file: Path, folder: Path, name: str) -> None:
    """Unpacks a zip, tar, tar.gz, tgz or gz file into a folder; ``name`` says which it is.

    Raises:
        UserError: it is broken, has a link, device or a path that leaves the folder, or swells beyond its bounds.
    """
    make_folder(folder)
    bound = max(LEAST_BOUND, MOST_RATIO * file.stat().st_size)
    try:
        for count, (member, content) in enumerate(_members(file, name)):
            check_path(member, name)
            place = folder / member
            make_folder(place.parent)
            with place.open("xb") as target:
                bound -= _copy(content, target, bound)
            if bound < 0 or count >= MOST_MEMBERS:
                raise UserError(f"{name}: swells beyond what an archive of images does, and is not unpacked")
    except BROKEN as error:
        raise UserError(f"{name}: not an archive that can be read ({first_line(error)})") from None
    except OSError as error:
        raise UserError(f"{name}: could not be unpacked ({(error.strerror or first_line(error)).lower()})") from None


def _copy(content: IO[bytes], target: IO[bytes], most: int) -> int:
    written = 0
    while written <= most and (block := content.read(1 << 20)):
        written += target.write(block)
    return written


def _members(file: Path, name: str) -> Iterator[tuple[str, IO[bytes]]]:
    """Gives the paths and contents of the files in an archive; folders come with their files."""
    if name.endswith(".zip"):
        with zipfile.ZipFile(file) as archive:
            for info in archive.infolist():
                if stat.S_ISLNK(info.external_attr >> 16):
                    raise UserError(f"{name}: has the link {info.filename!r}, and is not unpacked")
                if not info.is_dir():
                    with archive.open(info) as content:
                        yield info.filename, content
    elif name.endswith((".tar", ".tar.gz", ".tgz")):
        with tarfile.open(file) as tar:
            for member in tar:
                if not (member.isfile() or member.isdir()):
                    raise UserError(f"{name}: has the link or device {member.name!r}, and is not unpacked")
                if stored := tar.extractfile(member):  # none for a folder
                    yield member.name, stored
    elif name.endswith(".gz"):
        with gzip.open(file) as packed:
            yield name.removesuffix(".gz"), cast(IO[bytes], packed)
    else:
        raise UserError(f"{name}: not a zip, tar, tar.gz, tgz or gz file")
