"""Images with the bytes of another, wherever their files lie: found by size, beginning and digest."""

from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from kshot.data.archives import UNREADABLE
from kshot.data.images import UnreadableImageError

BEGINNING = 2**10  # bytes


def same_bytes(
    images: Any, paths: Sequence[str], others: Any, other_paths: Sequence[str]
) -> Iterator[tuple[Path, Path]]:
    """Finds the images that have the bytes of one of the others, each with that one, by what messages call them.

    Only those of the same size and beginning are read. What cannot be read is like no other.

    Args:
        images: where the images lie: FileImages, or StoredImages.
        paths: of the images there.
        others: where the others lie.
        other_paths: of the others there.
    """
    by_size: dict[int, list[str]] = {}
    for path in other_paths:
        with suppress(*UNREADABLE):
            by_size.setdefault(others.size(path), []).append(path)
    beginnings: dict[int, dict[bytes, list[str]]] = {}
    for path in paths:
        with suppress(*UNREADABLE, UnreadableImageError):
            size = images.size(path)
            if size not in by_size:
                continue
            if size not in beginnings:
                beginnings[size] = {}
                for other in by_size[size]:
                    with suppress(*UNREADABLE):
                        beginnings[size].setdefault(others.beginning(other, BEGINNING), []).append(other)
            alike = beginnings[size].get(images.beginning(path, BEGINNING), [])
            (digest,) = images.digests([path]) if alike else ("",)
            same = [other for other in alike if digest and others.digests([other]) == [digest]]
            yield from ((images.called(path), others.called(other)) for other in same[:1])
