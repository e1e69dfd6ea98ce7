"""Images in a zip or tar file, read where they lie: nothing is unpacked, and no member leaves the archive.

Each image is read by its place in the file, without a handle that threads or processes would share.
"""

import io
import tarfile
import zipfile
import zlib
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from kshot.data.digests import digest_of
from kshot.data.images import CLIPS, Decoding, UnreadableImageError, opened, read_image
from kshot.data.listing import IMAGE_SUFFIXES, Listing, kind_of, reads_as_image, time_of, tool_made
from kshot.data.splits import check_path
from kshot.errors import UserError, first_line
from kshot.files import may_be_read

ARCHIVES = (".zip", ".tar")
COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst")
MOST_MEMBERS = 2_000_000
MOST_BYTES = 2**28  # of one image
_BEGINNING = 2**16  # bytes, of which the format of an image can be told
UNREADABLE = (OSError, ValueError, LookupError, zlib.error)  # what reading a stored file may raise
_HEADER = 30  # bytes of a zip file's own header before a member, and before its name


class Member(NamedTuple):
    """Where a member lies.

    Attributes:
        offset: of its content in a tar file; of the header before it in a zip file.
        stored: bytes in the archive.
        size: bytes once unpacked.
        crc: CRC-32 of these; None in a tar file, which has none.
        packed: whether it is deflated.
    """

    offset: int
    stored: int
    size: int
    crc: int | None = None
    packed: bool = False


class StoredImages(ABC):
    """Images whose files are stored in something else."""

    @abstractmethod
    def called(self, path: str) -> Path:
        """What messages call an image."""

    @abstractmethod
    def stored(self, path: str) -> bytes:
        """Gives the file of an image; raises what it may where it cannot."""

    def open(self, path: str, draft: bool = False, decoding: Decoding = CLIPS) -> Image.Image:
        """Gives the image of a row by ``read_image``."""
        return read_image(self.called(path), draft, decoding, io.BytesIO(self.content(path)))

    def raw(self, path: str) -> AbstractContextManager[Image.Image]:
        """Opens the image of a row by ``opened``; raises UnreadableImageError at once where there is no file."""
        return opened(self.called(path), io.BytesIO(self.content(path)))

    def size(self, path: str) -> int:
        """Gives the number of bytes; raises what it may where it cannot."""
        return len(self.stored(path))

    def beginning(self, path: str, count: int) -> bytes:
        """Gives the first bytes; raises what it may where it cannot."""
        return self.stored(path)[:count]

    def content(self, path: str) -> bytes:
        """Gives the file of an image; raises UnreadableImageError for one that is missing, too large or damaged."""
        try:
            return self.stored(path)
        except UNREADABLE as error:
            reason = first_line(error)
            raise UnreadableImageError(f"cannot read the image {str(self.called(path))!r}: {reason}") from None

    def digests(self, paths: Sequence[str]) -> list[str]:
        """Digests the files of rows by ``digest_of``; an empty text for one that cannot be read."""
        found = []
        for path in paths:
            try:
                found.append(digest_of(self.content(path)))
            except UnreadableImageError:
                found.append("")
        return found

    def close(self) -> None:  # noqa: B027  most hold nothing
        """Lets go of what ``stored`` gets again."""


@dataclass(frozen=True)
class ArchiveImages(StoredImages):
    """Images in an archive by their path in it."""

    file: Path
    members: Mapping[str, Member] = field(compare=False, repr=False)

    def called(self, path: str) -> Path:
        return self.file / path

    def member(self, path: str) -> Member:
        """Where an image lies; raises ValueError for one that there is not."""
        member = self.members.get(path)
        if member is None:
            raise ValueError("the archive has no such member")
        return member

    def size(self, path: str) -> int:
        return self.member(path).size

    def beginning(self, path: str, count: int) -> bytes:
        return read_member(self.file, self.member(path), count)[:count]

    def stored(self, path: str) -> bytes:
        member = self.member(path)
        if max(member.size, member.stored) > MOST_BYTES:
            raise ValueError(f"more than {MOST_BYTES:,} bytes")
        content = read_member(self.file, member)
        if len(content) != member.size or (member.crc is not None and zlib.crc32(content) != member.crc):
            raise ValueError("the archive is damaged here")
        return content


def read_member(archive: Path, member: Member, most: int | None = None) -> bytes:
    """Reads what a member holds, or its first bytes; raises zlib.error or OSError."""
    with archive.open("rb") as file:
        file.seek(member.offset)
        if member.crc is not None:
            header = file.read(_HEADER)
            file.seek(sum(int.from_bytes(header[at : at + 2], "little") for at in (26, 28)), 1)  # name and extras
        stored = file.read(member.stored if most is None else min(most, member.stored))
    most = member.size if most is None else most
    return zlib.decompressobj(-zlib.MAX_WBITS).decompress(stored, most + 1) if member.packed else stored


@may_be_read()
def list_archive(file: Path) -> Listing:
    """Lists an archive as ``list_folder`` does a folder; raises UserError for none, or paths that leave it."""
    if file.name.lower().endswith(COMPRESSED):
        raise UserError(f"{file}: a compressed tar file has to be unpacked, or packed again as .tar or .zip")
    if not file.is_file():
        raise UserError(f"{file}: not a file")
    images: dict[str, Member] = {}
    folders: set[str] = set()
    left_out: Counter[str] = Counter()
    time = time_of(str(file))
    try:
        for number, (name, member) in enumerate((_zipped if file.suffix.lower() == ".zip" else _tarred)(file)):
            if number == MOST_MEMBERS:
                raise UserError(f"{file}: more than {MOST_MEMBERS:,} members")
            path = check_path(name.rstrip("/") or "/", str(file))
            if any(map(tool_made, path.split("/"))) and path != ".":
                continue
            if member == "folder":
                folders.add(path)
            elif isinstance(member, str):
                left_out[member] += 1
            elif path.lower().endswith(IMAGE_SUFFIXES) or _is_image(file, member):
                images[path] = member
            else:
                left_out[kind_of(path)] += 1
    except (zipfile.BadZipFile, tarfile.TarError, EOFError, ValueError, NotImplementedError) as error:
        raise UserError(f"{file}: not a {file.suffix} archive ({first_line(error)})") from None
    for path in (*images, *folders):
        while (path := path.rpartition("/")[0]) and path not in folders:
            folders.add(path)
    folders.discard(".")
    return Listing(tuple(sorted(images)), tuple(sorted(folders)), (), left_out, {str(file): time}, images)


def _is_image(file: Path, member: Member) -> bool:
    try:
        return reads_as_image(io.BytesIO(read_member(file, member, _BEGINNING)))
    except (OSError, zlib.error):
        return False


def _zipped(file: Path) -> Iterator[tuple[str, Member | str]]:
    with zipfile.ZipFile(file) as archive:
        for info in archive.infolist():
            if info.is_dir():
                yield info.filename, "folder"
            elif info.flag_bits & 1:
                yield info.filename, "encrypted"
            elif info.compress_type not in {zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED}:
                yield info.filename, "packed in another way than deflate"
            else:
                packed = info.compress_type == zipfile.ZIP_DEFLATED
                yield info.filename, Member(info.header_offset, info.compress_size, info.file_size, info.CRC, packed)


def _tarred(file: Path) -> Iterator[tuple[str, Member | str]]:
    with tarfile.open(file, "r:") as archive:
        for info in archive:
            archive.members = []  # type: ignore[attr-defined]  # which would hold them all
            if info.isdir():
                yield info.name, "folder"
            elif info.isfile() and not info.issparse():
                yield info.name, Member(info.offset_data, info.size, info.size)
            else:
                yield info.name, "links"
