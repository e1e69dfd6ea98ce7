"""What is wrong with the images of a data set: broken files, duplicates, leaks; and a division that has no leaks.

Equal files are found by their SHA-256. Near-duplicates, such as a copy in another size or compression, are found by the
difference hash of N. Krawetz, "Kind of Like That", 2013 (hackerfactor.com): the image is shrunk to 9 x 8 grey pixels,
and each of 64 bits says whether a pixel is brighter than its right neighbour. Two images are alike when at most
:data:`BITS` bits differ and their 16 x 16 colour miniatures differ by at most :data:`LEVELS` of 255 on average, and at
most :data:`SHARE` of their contrast; these rules tell apart what the hash cannot, such as plain or dark images. Below
:data:`LEAST` pixels only bytes are compared.

Of 644 satellite photos of 224 pixels, 99 % were found again at half the size and JPEG quality 70, but a third with 2 %
cut off each side, and a fifth when made brighter by 5 %; of 32-pixel images few that were compressed again.
"""

import hashlib
import multiprocessing
import os
import random
import re
import signal
import threading
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageDraw

from kshot.data.images import FORMATS, FileImages, ImageSource, UnreadableImageError, fault, orientation, read_image
from kshot.data.sampling import VAL_SHOTS, draw
from kshot.data.splits import PARTS, Row, Split, listed, part_sizes
from kshot.errors import UserError, first_line

BITS = 8  # that may differ in the hashes of near-duplicates
LEVELS = 4.0  # that their miniatures may differ by on average
SHARE = 0.25  # of the mean deviation from the mean colour, or one level where that is less
LEAST = 16  # pixels of the shorter side, below which the hash says nothing
TINY = 32  # pixels of the shorter side, below which an image is tiny
WINDOW = 128  # neighbours in brightness that an image is compared with, among those that share a piece of the hash
DRAFT = 512  # shorter side from which a JPEG is read in an eighth of its size
CELL = 112  # pixels of a picture on a contact sheet
MOST_CELLS = 120


class Seen(NamedTuple):
    """What was seen of an image file.

    Attributes:
        problem: missing, empty, truncated or unreadable; nothing for an image that can be read.
        why: the problem in words.
        size: width and height in pixels.
        grey: whether it has no colours.
        rotated: whether its EXIF data say that it is stored rotated or mirrored.
        digest: of its bytes, or of the pixels of an image that is no file.
        hash: its difference hash.
        miniature: 16 x 16 RGB pixels.
    """

    problem: str = ""
    why: str = ""
    size: tuple[int, int] = (0, 0)
    grey: bool = False
    rotated: bool = False
    digest: str = ""
    hash: int = 0
    miniature: bytes = b""


@dataclass(frozen=True)
class Finding:
    """One kind of finding: the images, in groups where they are alike, and whether training fails or leaks by it."""

    kind: str
    fails: bool
    groups: Sequence[Sequence[int]] = ()
    text: str = ""


def look(file: Path) -> Seen:
    """Reads an image file; never raises for what is wrong with it."""
    if wrong := fault(file):
        missing = wrong.startswith("no such image")
        return Seen("missing" if missing else "empty" if wrong.endswith("it is empty") else "unreadable", wrong)
    size, rotated = (0, 0), False
    with suppress(Exception), warnings.catch_warnings():  # of what is broken read_image tells
        warnings.simplefilter("ignore")  # about EXIF data, and about sizes that read_image refuses
        with Image.open(file, formats=FORMATS) as header:
            size, rotated = header.size, orientation(header) != 1
    try:
        image = read_image(file, draft=min(size) >= DRAFT)
        with file.open("rb") as content:
            digest = hashlib.file_digest(content, "sha256").hexdigest()
    except (UnreadableImageError, OSError) as error:
        why = first_line(error)
        return Seen("truncated" if "truncated" in why else "unreadable", why, size, rotated=rotated)
    return _described(image, size if min(size) else image.size, rotated, digest)


def _look_in(source: ImageSource, path: str) -> Seen:
    try:
        image = source.open(path)
    except UnreadableImageError as error:
        return Seen("unreadable", str(error))
    return _described(image, image.size, False, source.digests([path])[0])


def _described(image: Image.Image, size: tuple[int, int], rotated: bool, digest: str) -> Seen:
    miniature = image.resize((16, 16), Image.Resampling.BOX)
    pixels = np.asarray(miniature).astype(np.int16)
    levels = np.asarray(image.convert("L").resize((9, 8), Image.Resampling.BOX))
    code = int.from_bytes(np.packbits(levels[:, :-1] > levels[:, 1:]).tobytes(), "big")
    grey = bool((pixels.max(-1) - pixels.min(-1)).max() <= 1)
    return Seen("", "", size, grey, rotated, digest, code, miniature.tobytes())


def look_at_all(images: Sequence[tuple[ImageSource, str]], workers: int = 0) -> Iterator[Seen]:
    """Looks at images by source and path, in order; files in so many processes, or in this one for 0."""
    if workers < 1 or not all(isinstance(source, FileImages) for source, _ in images):
        for source, path in images:
            yield look(source.folder / path) if isinstance(source, FileImages) else _look_in(source, path)
        return
    files = [source.folder / path for source, path in images if isinstance(source, FileImages)]
    with multiprocessing.Pool(workers, _begin_worker) as pool:
        yield from pool.imap(look, files, chunksize=32)


def _begin_worker() -> None:
    """Leaves Ctrl-C to the process that asked, which ends its workers by SIGTERM, and ends with it if it is killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    if parent := multiprocessing.parent_process():
        parent.join()
        os._exit(1)


def equal_groups(seen: Sequence[Seen]) -> list[list[int]]:
    """Groups images with the same bytes."""
    groups: dict[str, list[int]] = defaultdict(list)
    for i, each in enumerate(seen):
        if each.digest:
            groups[each.digest].append(i)
    return [group for group in groups.values() if len(group) > 1]


def alike_groups(seen: Sequence[Seen]) -> list[list[int]]:
    """Groups images that are equal or near-duplicates, and what is so by way of others.

    The hash is cut into ``BITS + 1`` pieces; hashes that differ in at most ``BITS`` bits share one of them. Only images
    that share a piece are compared, neighbours in brightness first and at most :data:`WINDOW`, so that the time grows
    with the number of images also where all have the same hash.
    """
    first = {each.digest: i for i, each in reversed(list(enumerate(seen))) if each.digest}
    parent = [first.get(each.digest, i) for i, each in enumerate(seen)]

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    chosen = np.array(sorted(i for i in first.values() if min(seen[i].size) >= LEAST), dtype=np.int64)
    for a, b in _alike_pairs([seen[i] for i in chosen]):
        parent[root(int(chosen[b]))] = root(int(chosen[a]))
    groups: dict[int, list[int]] = defaultdict(list)
    for i in range(len(seen)):
        groups[root(i)].append(i)
    return sorted(group for group in groups.values() if len(group) > 1)


def _alike_pairs(seen: Sequence[Seen]) -> Iterator[tuple[int, int]]:
    if len(seen) < 2:
        return
    codes = np.array([each.hash for each in seen], dtype=np.uint64)
    pixels = np.frombuffer(b"".join(each.miniature for each in seen), np.uint8).reshape(len(seen), -1)
    brightness = pixels.mean(1)
    colours = pixels.reshape(len(seen), -1, 3).astype(np.float32)
    contrast = np.abs(colours - colours.mean(1, keepdims=True)).mean((1, 2))
    bound = np.minimum(LEVELS, np.maximum(1, SHARE * contrast))
    earlier: list[np.uint64] = []
    for piece in np.array_split(np.arange(64), BITS + 1):
        mask = np.uint64(sum(1 << int(bit) for bit in piece))
        order = np.lexsort((brightness, codes & mask))
        keys = (codes & mask)[order]
        for step in range(1, min(len(seen), WINDOW + 1)):
            share = keys[step:] == keys[:-step]
            if not share.any():
                break
            a, b = order[:-step][share], order[step:][share]
            apart = codes[a] ^ codes[b]
            new = np.abs(brightness[a] - brightness[b]) <= LEVELS  # no less than the miniatures differ
            for other in earlier:  # those that share an earlier piece were compared there
                new &= (apart & other) != 0
            a, b, apart = a[new], b[new], apart[new]
            near = np.unpackbits(apart.view(np.uint8).reshape(-1, 8), axis=1).sum(1) <= BITS
            a, b = a[near], b[near]
            for start in range(0, len(a), 4096):  # bounds the memory of the differences
                x, y = a[start : start + 4096], b[start : start + 4096]
                alike = np.abs(pixels[x].astype(np.int16) - pixels[y]).mean(1) <= bound[x]
                yield from zip(x[alike].tolist(), y[alike].tolist(), strict=True)
        earlier.append(mask)


def relation(group: Sequence[int], images: Sequence[tuple[str, Row]]) -> str:
    """Says what alike images have to do with each other: within a class, across classes or across parts."""
    if len({images[i][0] for i in group}) > 1:
        return "across parts"
    return "across classes" if len({images[i][1].label for i in group}) > 1 else "within a class"


def findings(images: Sequence[tuple[str, Row]], seen: Sequence[Seen]) -> list[Finding]:
    """Finds what is wrong with a data set, worst first; ``images`` are part and row of what was seen."""
    found = [
        Finding(problem, True, [[i] for i, each in enumerate(seen) if each.problem == problem])
        for problem in ("missing", "empty", "truncated", "unreadable")
    ]
    equal = equal_groups(seen)
    sets = {frozenset(group) for group in equal}
    near = [group for group in alike_groups(seen) if frozenset(group) not in sets]
    for where in ("across parts", "across classes", "within a class"):
        for kind, groups in (("duplicates", equal), ("near-duplicates", near)):
            chosen = [group for group in groups if relation(group, images) == where]
            found.append(Finding(f"{kind} {where}", where == "across parts", chosen))
    read = [(i, each) for i, each in enumerate(seen) if not each.problem]
    found.append(Finding(f"tiny (below {TINY} pixels)", False, [[i] for i, each in read if min(each.size) < TINY]))
    found.append(Finding("grey", False, [[i] for i, each in read if each.grey]))
    found.append(Finding("rotated by EXIF", False, [[i] for i, each in read if each.rotated]))
    return [each for each in found if each.groups]


def class_table(split: Split) -> list[dict[str, Any]]:
    """Counts the images of every class by part, and says what prompts call it where that is not its name."""
    counts = {part: Counter(row.label for row in getattr(split, part)) for part in PARTS}
    rows = []
    for label, (name, said) in enumerate(zip(split.class_names, split.said, strict=True)):
        prompt = {"prompt": said} if split.prompt_names else {}
        rows.append({"label": label, "class": name} | prompt | {part: counts[part][label] for part in PARTS})
    return rows


def training(split: Split, shots: int, seed: int) -> tuple[dict[str, Any], list[Finding]]:
    """Says what training with k shots would use of a data set, and what makes it fail."""
    counts = Counter(row.label for row in split.train)
    below = {name: counts[i] for i, name in enumerate(split.class_names) if counts[i] < shots}
    chosen = draw(split, shots, seed, allow_fewer=True)
    used = {"shots": shots, "train": len(chosen.train), "val": len(chosen.val), "test": len(split.test), "below": below}
    used["text"] = (
        f"Training with {shots} shots uses {used['train']} of {len(split.train)} training images and {used['val']} of "
        f"{len(split.val)} validation images (at most {VAL_SHOTS} a class), and tests on {used['test']}."
    )
    if not below:
        return used, []
    few = ", ".join(f"{name!r} has {count}" for name, count in list(below.items())[:5])
    text = f"{few}{', ...' if len(below) > 5 else ''}; --data.allow_fewer true takes what there is"
    return used, [Finding(f"too few images for {shots} shots", True, text=text)]


def divide(
    rows: Sequence[Row], alike: Sequence[Sequence[int]], shares: Sequence[int], seed: int
) -> dict[str, list[Row]]:
    """Divides rows into train, val and test, class by class, with alike images in one part.

    Groups come first, the largest before the others, then single images; each goes where its classes still lack most.
    The sizes of parts are :func:`~kshot.data.splits.part_sizes` as far as groups allow. Rows keep their order.

    Args:
        rows: of all images; the division depends on their order and on the seed alone.
        alike: positions of rows that must not be divided, disjoint.
        shares: percentages of train, val and test.
        seed: of the order in which images are taken.

    Raises:
        UserError: a class cannot have training and test images without a leak.
    """
    _, val, test = shares
    names = {row.label: row.class_name for row in rows}
    lacking = {label: part_sizes(n, val, test) for label, n in Counter(row.label for row in rows).items()}
    grouped = {i for group in alike for i in group}
    units = [list(group) for group in alike] + [[i] for i in range(len(rows)) if i not in grouped]
    random.Random(f"divide/{seed}").shuffle(units)
    part_of: dict[int, str] = {}
    for unit in sorted(units, key=len, reverse=True):
        need = {part: sum(lacking[rows[i].label][part] for i in unit) for part in ("train", "test", "val")}
        part = max(need, key=need.__getitem__)
        part_of |= dict.fromkeys(unit, part)
        for i in unit:
            lacking[rows[i].label][part] -= 1
    parts = {part: [row for i, row in enumerate(rows) if part_of[i] == part] for part in PARTS}
    for part in ("train", "test") if test else ("train",):
        if without := names.keys() - {row.label for row in parts[part]}:
            classes = listed([names[label] for label in sorted(without)])
            raise UserError(f"no {part} images for the class {classes}: it has too few that are not alike")
    return parts


def contact_sheet(cells: Iterable[tuple[str, Callable[[], Image.Image]]]) -> Image.Image:
    """Draws titled pictures in rows of ten, at most :data:`MOST_CELLS`; one that cannot be read is a crossed box."""
    shown = list(cells)[:MOST_CELLS]
    across = min(10, max(1, len(shown)))
    height = CELL + 14
    sheet = Image.new("RGB", (across * CELL, max(1, -(-len(shown) // across)) * height), "white")
    pen = ImageDraw.Draw(sheet)
    for i, (title, picture) in enumerate(shown):
        left, top = i % across * CELL, i // across * height
        box = (left + 2, top + 2, left + CELL - 3, top + CELL - 3)
        try:
            image = picture()
            image.thumbnail((CELL - 4, CELL - 4))
            sheet.paste(image, box[:2])
        except UnreadableImageError:
            pen.rectangle(box, outline="red")
            pen.line(box, fill="red")
        pen.text((left + 2, top + CELL - 1), re.sub(r"[^ -~]", "?", title)[:18], fill="black")
    return sheet


def pictures(
    found: Sequence[Finding], images: Sequence[tuple[str, Row]], sources: Mapping[str, ImageSource]
) -> Iterator[tuple[str, Callable[[], Image.Image]]]:
    """Chooses what a contact sheet shows: the images of findings, or the first of every class where there are none."""
    groups = [(each.kind, group) for each in found for group in each.groups]
    firsts = {row.label: i for i, (_, row) in reversed(list(enumerate(images)))}
    for title, group in groups or [(images[i][1].class_name, [i]) for _, i in sorted(firsts.items())]:
        for i in group:
            part, row = images[i]
            yield title, partial(sources[part].open, row.path)
