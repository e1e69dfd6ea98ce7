"""Layouts: which class and which part the images of a folder or archive belong to, told by their paths alone."""

import re
from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

from kshot.data.splits import listed, words
from kshot.errors import UserError

SPELLINGS = {
    **dict.fromkeys(("train", "training", "trn", "trainval"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "dev"), "val"),
    **dict.fromkeys(("test", "testing", "tst", "eval", "evaluation"), "test"),
}
LONGEST = 60  # characters of a folder's name that may mean a part
Classes = dict[str, Sequence[str]]  # sorted paths of images by class folder


@lru_cache(1000)
def part_of(name: str) -> str | None:
    """Gives the part that a folder or a value of a column means, in any spelling: ``01_Training``, ``val2017``."""
    if len(name) > LONGEST:
        return None
    found = re.fullmatch(r"[\W\d_]*([a-z]+?)[\W\d_]*(?:set|data|images|imgs|split|part)?[\W\d_]*", name.lower())
    return SPELLINGS.get(found[1]) if found else None


@dataclass
class Layout:
    """Images by part and class.

    Attributes:
        parts: sorted paths by class folder by part; all under train where there are no parts.
        parted: whether there are parts.
        notes: what was found or decided, each for a line of the log.
    """

    parts: dict[str, Classes]
    parted: bool
    notes: list[str]


class Tree:
    """Images and folders by their paths."""

    def __init__(self, images: Iterable[str], folders: Iterable[str]) -> None:
        self.images = sorted(images)
        self.children: dict[str, list[str]] = {}
        for folder in sorted(folders):
            self.children.setdefault(folder.rpartition("/")[0], []).append(folder)

    def below(self, folder: str) -> list[str]:
        """The images below a folder; the sorted ones of a folder follow each other."""
        if not folder:
            return self.images
        first, end = (bisect_left(self.images, folder + after) for after in "/0")  # 0 comes after /
        return self.images[first:end]

    def full(self, folder: str) -> list[str]:
        """The folders in a folder that have images."""
        return [each for each in self.children.get(folder, ()) if self.below(each)]

    def loose(self, folder: str) -> int:
        """The number of images in a folder itself."""
        return len(self.below(folder)) - sum(len(self.below(each)) for each in self.children.get(folder, ()))

    def entered(self, folder: str, part: str | None = None) -> str:
        """Where choices lie: in the folder, or deeper where an archive or a move has put one folder around them all.

        In the folder of a part that is only another folder of this part.
        """
        while len(inside := self.full(folder)) == 1 and part_of(last(inside[0])) == part:
            around = len(self.full(inside[0]))
            if not around or (
                around == 1 and (self.loose(folder) or self.loose(inside[0]))
            ):  # a class with sub-folders
                break
            folder = inside[0]
        return folder


def last(path: str) -> str:
    """The last name of a path."""
    return path.rpartition("/")[2]


def laid_out(images: Iterable[str], folders: Iterable[str], called: str) -> Layout:
    """Finds the layout: ``CLASS/images``, ``PART/CLASS/images`` or ``CLASS/PART/images``, at any depth.

    Folders of one part may be spelled in any way. Training alone counts as images without parts; with validation and no
    test part, validation images are for testing, as CoOp does with ImageNet. A class of another part is that of the
    same name in training, or of the same words.

    Raises UserError for two folders of one part, no training part, no or empty class folders, or a class that training
    lacks.
    """
    tree = Tree(images, folders)
    notes: list[str] = []
    top = tree.entered("")
    if top:
        notes.append(f"{called}: the class folders lie deeper, in {called}/{top}")
    where = f"{called}/{top}".removesuffix("/")
    # A class may be called "train" as well: only a folder of folders is a part.
    parts = _by_part([folder for folder in tree.full(top) if part_of(last(folder)) and tree.full(folder)], where)
    if parts and "train" not in parts:
        have = listed(sorted(map(last, parts.values())))
        raise UserError(f"{where}: has {have} but no 'train' folder; without parts give root/class/images")
    if parts:
        found = {part: _classes(tree, tree.entered(folder, part), called) for part, folder in parts.items()}
    else:
        found = _parts_of_classes(tree, top, _classes(tree, top, called), where)
        if len(found) > 1:
            notes.append(f"{where}: each class folder has its own parts")
    used = [image for classes in found.values() for those in classes.values() for image in those]
    if len(used) < len(tree.images):
        rest = sorted(set(tree.images) - set(used))
        places = sorted({f"{called}/{image}".rpartition("/")[0] for image in rest})
        notes.append(f"{called}: {len(rest)} images have no class and go unused: in {listed(places)}")
    return Layout(_matched(found, where, notes), len(found) > 1, notes)


def _by_part(folders: Sequence[str], where: str) -> dict[str, str]:
    parts: dict[str, str] = {}
    for folder in folders:
        part = str(part_of(last(folder)))
        if part in parts:
            raise UserError(f"{where}: {last(parts[part])!r} and {last(folder)!r} are both for {part}: keep one")
        parts[part] = folder
    return parts


def _classes(tree: Tree, folder: str, called: str) -> Classes:
    where = f"{called}/{folder}".removesuffix("/")
    found: Classes = {last(each): tree.below(each) for each in tree.children.get(folder, ())}
    if not found:
        raise UserError(f"{where}: no class folders in it; images go into one folder per class")
    if empty := [name for name, images in found.items() if not images]:
        raise UserError(f"{where}: no images in the class folder {listed(empty)}")
    return found


def _parts_of_classes(tree: Tree, top: str, classes: Classes, where: str) -> dict[str, Classes]:
    inner: dict[str, dict[str, str]] = {}
    for name in classes:
        folder = f"{top}/{name}".removeprefix("/")
        inside = tree.full(folder)
        if inside and not tree.loose(folder) and all(part_of(last(each)) for each in inside):
            inner[name] = _by_part(inside, f"{where}/{name}")
    example = next((name for name, parts in inner.items() if "train" in parts and len(parts) > 1), None)
    if example is None:
        return {"train": classes}
    if lacking := [name for name in classes if "train" not in inner.get(name, {})]:
        raise UserError(f"{where}: the class folder {example!r} has parts in it, but {listed(lacking)} no 'train'")
    found: dict[str, Classes] = {}
    for name, parts in inner.items():
        for part, folder in parts.items():
            found.setdefault(part, {})[name] = tree.below(folder)
    return found


def _matched(found: Mapping[str, Classes], where: str, notes: list[str]) -> dict[str, Classes]:
    parts = dict(found)
    trained = parts["train"]
    same: dict[str, list[str]] = {}
    for name in trained:
        same.setdefault(words(name), []).append(name)
    for part in parts.keys() - {"train"}:
        own = {name: [name] if name in trained else same.get(words(name), []) for name in parts[part]}
        if unknown := [name for name, those in own.items() if len(those) != 1]:
            raise UserError(f"{where}: no training images of the class {listed(unknown)}, which {part} has")
        taken: dict[str, str] = {}
        for name, (other,) in own.items():
            if taken.setdefault(other, name) != name:
                raise UserError(f"{where}: the {part} folders {taken[other]!r} and {name!r} read the same in a prompt")
        parts[part] = {own[name][0]: images for name, images in parts[part].items()}
    if "val" in parts and "test" not in parts:
        parts["test"] = parts.pop("val")
        notes.append(f"{where}: there is no test part, so the validation images are for testing")
    elif "test" in parts and (absent := [name for name in trained if name not in parts["test"]]):
        notes.append(f"{where}: no test images of the class {listed(absent)}, which get no accuracy of their own")
    return parts
