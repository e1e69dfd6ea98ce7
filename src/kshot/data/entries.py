"""What is known about a data set, and how that is read: a table of ``data_splits/catalogue.toml``, or a user's own."""

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, lru_cache, partial
from importlib.util import find_spec
from operator import itemgetter
from pathlib import Path, PurePosixPath
from typing import Any, Literal

import numpy as np
from PIL import Image

from kshot.data import sampling
from kshot.data.images import ArrayImages, FileImages, ImageSource, read_image
from kshot.data.official import imagenet_names, split_from_lists, with_names
from kshot.data.readers import read_split_zhou, split_from_folder
from kshot.data.splits import TEST_SHARE, VAL_PERCENT, Row, Split, make_split, stratify
from kshot.errors import UserError
from kshot.files import may_be_read, packaged_folder
from kshot.templates import DEFAULT_TEMPLATE

ARRAYS = {"train": "train", "val": "train", "test": "test"}  # which array of a torchvision data set a part indexes


@dataclass(frozen=True, kw_only=True)
class Archive:
    """A file to fetch: an archive, or a file that stays as it is.

    Attributes:
        urls: sources, tried in turn.
        gives: what of it is kept: paths inside the archive, or the file's own name; they get the same path below
            ``into``, a folder below the data root.
        md5: hexadecimal checksum; ``sha256`` likewise. Empty: none is published.
        inner: archives in the archive that have what is kept.
    """

    urls: Sequence[str]
    gives: Sequence[str]
    into: str = "."
    md5: str = ""
    sha256: str = ""
    inner: Sequence[str] = ()

    @property
    def name(self) -> str:
        """The last part of the first source."""
        return self.urls[0].rsplit("/", 1)[-1]

    def places(self, root: Path) -> list[Path]:
        """Where what it gives lies below a data root."""
        return [root / self.into / give for give in self.gives]


@dataclass(frozen=True, kw_only=True)
class DatasetEntry:
    """What is known about a data set; what is not known is empty.

    Attributes:
        kind: image files, whose parts stand in a list; folders of classes; torchvision's training and test arrays,
            where 20 % of the training images are for validation; or the digits that come with scikit-learn.
        split: file in CoOp's format, in ``data_splits/`` or, where it does not come with kshot, beside the images.
        split_from: where to get the latter.
        draw: first digits of the digest of CoOp's draw of 16 shots with seed 1, by which a split file is known.
        lists: the authors' own lists by part, beside the image folder, for where there is no ``split``: arguments of
            ``split_from_lists``, as ``line`` and ``path`` are.
        folder: of the data set, below the data root.
        image_root: folder below that with the images.
        aliases: other folders below the data root that may have them, such as torchvision's.
        parts: ``test`` where all images of the folders are for testing.
        names: of folders as prompts say them, each ``FOLDER NAME``, or ``imagenet``; empty: the folders' own.
        blank: regular expression for what becomes a blank in a class's name.
        url: page of the data set, where a user finds the files.
        torchvision: data set class in torchvision that downloads the same files, if there is one.
        arguments: more of its arguments.
        by_split: whether its argument that chooses an array is ``split``, not ``train``.
        labels: its attribute with the labels; ``_samples`` holds (path or pixels, label) pairs.
        transposed: whether rows and columns of its images have to be exchanged.
        class_names: of arrays, in label order; empty: those that torchvision says.
        template: sentence for a class name.
        classes: number of classes.
        sizes: numbers of images for training, validation and testing, as its authors or CoOp divided them.
        archives: what to fetch.
        by_hand: how to get it where nobody may fetch it for you.
        licence: of the images.
        citation: what to cite.
        hint: what to say besides where images are missing.
    """

    kind: Literal["files", "folders", "arrays", "digits"] = "files"
    split: str = ""
    split_from: str = ""
    draw: str = ""
    lists: Mapping[str, Sequence[str]] = field(default_factory=dict)
    line: str = ""
    path: str = "{path}"
    folder: str = "."
    image_root: str = "."
    aliases: Sequence[str] = ()
    parts: Literal["", "test"] = ""
    names: str | Sequence[str] = ()
    blank: str = ""
    url: str = ""
    torchvision: str = ""
    arguments: Mapping[str, str] = field(default_factory=dict)
    by_split: bool = False
    labels: str = "targets"
    transposed: bool = False
    class_names: Sequence[str] = ()
    template: str = DEFAULT_TEMPLATE
    classes: int = 0
    sizes: Sequence[int] = ()
    archives: Sequence[Archive] = field(default=(), repr=False)
    by_hand: str = field(default="", repr=False)
    licence: str = field(default="", repr=False)
    citation: str = field(default="", repr=False)
    hint: str = field(default="", compare=False, repr=False)

    @property
    def layouts(self) -> list[str]:
        """Folders below the data root that may have the images: CoOp's, then torchvision's."""
        return [PurePosixPath(self.folder, self.image_root).as_posix(), *self.aliases]

    def folder_there(self, root: Path) -> Path | None:
        """The first of these that has something in it."""
        return next(filter(is_there, (root / below for below in self.layouts)), None)

    @property
    def protocols(self) -> str:
        """What the data set is for."""
        domain = "domain-generalisation" if self.names == "imagenet" else ""
        if self.parts == "test":
            return f"target of {domain} from imagenet, and of cross-dataset"
        return ", ".join(filter(None, ("all-to-all", "base-to-new", "cross-dataset", domain)))

    def read_split(self, name: str, root: str | Path, download: bool, listing: Any = None) -> Split:
        """Reads the split, which gets the name; ``listing`` is that of one that was read before.

        The digest of arrays is that of the training and then the test labels as little-endian int64; of folders, that
        of ``split_bytes``. Raises UserError when what says the parts is missing or breaks a rule of its reader.
        """
        if self.kind == "arrays":
            return self._split_of_arrays(name, root, download)
        packaged = packaged_folder("data_splits") / self.split
        if self.split and packaged.is_file():
            return _packaged_split(packaged, name, self.image_root)
        split = self._split_there(name, Path(root), listing)
        if split is None and download and self._fetches:
            self._torchvision(root, download=True)
            split = self._split_there(name, Path(root), listing)
        if split is None:
            raise UserError(self._nothing_there(name, Path(root)))
        if self.blank:
            return with_names(
                split, {each: " ".join(re.sub(self.blank, " ", each).split()) for each in split.class_names}
            )
        return split

    def _split_there(self, name: str, root: Path, listing: Any) -> Split | None:
        """Reads what says the parts from below the root; None where nothing does."""
        folders = [root / below for below in self.layouts]
        if self.kind == "folders":
            folder = self.folder_there(root)
            return self._split_of_folders(name, folder, root, listing) if folder else None
        places = [place / f"{self.split}{packed}" for place in (root / self.folder, *folders) for packed in ("", ".gz")]
        file = next(filter(Path.is_file, places), None) if self.split else None
        first = next((files[0] for files in self.lists.values()), "")
        base = next((each.parent for each in folders if first and (each.parent / first).is_file()), None)
        if file is not None:
            split = read_split_zhou(file, name, self.image_root)
        elif base is not None:
            split = split_from_lists(name, base, self.lists, self.line, self.path, self.image_root)
        else:
            return None
        note = ""
        if self.split and file is None:
            note = f"there is no {self.split}, so the parts are those of {split.file}: another split than CoOp's"
        elif self.draw and sampling.draw(split, 16, allow_fewer=True).digest[7:23] != self.draw:
            note = f"{split.file} is not the one that CoOp has: 16 shots drawn with seed 1 are other images"
        return replace(split, notes=(*split.notes, f"{name}: {note}")) if note else split

    def _nothing_there(self, name: str, root: Path) -> str:
        folders = [root / below for below in self.layouts]
        if self.kind == "folders":
            return self._missing(f"{name}: no images", "folders of classes", folders)
        wanted = " or ".join([*filter(None, [self.split]), *(files[0] for files in [*self.lists.values()][:1])])
        to_get = f"; {self.split} is {self.split_from}, and goes to {root / self.folder}" if self.split_from else ""
        return self._missing(f"{name}: no list of its images", wanted, [each.parent for each in folders]) + to_get

    def _split_of_folders(self, name: str, folder: Path, root: Path, listing: Any) -> Split:
        split = replace(split_from_folder(folder, None if self.parts else TEST_SHARE, listing), name=name, file=name)
        if self.parts:
            notes = tuple(note for note in split.notes if "none for testing" not in note)
            split = replace(split, train=(), test=split.train, notes=(*notes, f"{name}: all images are for testing"))
        if self.names == "imagenet":
            return with_names(split, imagenet_names(root / self.folder))
        return with_names(split, dict(str(each).split(" ", 1) for each in self.names)) if self.names else split

    def _split_of_arrays(self, name: str, root: str | Path, download: bool) -> Split:
        digest = hashlib.sha256()
        rows: dict[str, list[Row]] = {}
        names = self.class_names
        for array in ("train", "test"):
            dataset = self.open_array(root, array, download)
            values = getattr(dataset, self.labels)
            labels = np.asarray([v[1] for v in values] if self.labels == "_samples" else values, dtype="<i8")
            labels = labels[:, 0] if labels.ndim == 2 else labels  # QMNIST's have the writer and more besides
            digest.update(labels.tobytes())
            names = names or dataset.classes
            if labels.size and not 0 <= labels.min() <= labels.max() < len(names):
                raise UserError(f"{name}: labels from {labels.min()} to {labels.max()} for {len(names)} classes")
            rows[array] = [Row(str(i), int(label), names[label]) for i, label in enumerate(labels)]
        parts = stratify(rows["train"], (VAL_PERCENT, 0)) | {"test": rows["test"]}
        file = f"torchvision.datasets.{self.torchvision}"
        return make_split(name, parts, file=file, sha256=digest.hexdigest(), image_root=ARRAYS, item_kind="index")

    @may_be_read()
    def images(self, root: str | Path, part: str, rows: Sequence[Row], download: bool = False) -> ImageSource:
        """Opens the images of a part: train, val or test.

        Of the folders where files may be, it is the first that has the first image, or, so that the message names the
        image, that exists. With ``download`` torchvision fetches what is missing, if it can. Raises UserError when
        images are not there.
        """
        if self.kind == "digits":
            return _Digits(_digits, _grey_levels_16)
        if self.kind == "arrays":
            load = partial(self._pictures, root, ARRAYS[part], download)
            picture = _picture_of_sample if self.labels == "_samples" else itemgetter(0)
            return ArrayImages(load, partial(_transposed, picture) if self.transposed else picture)
        candidates = [Path(root, below) for below in self.layouts]
        sample = rows[0].path
        having = [folder for folder in candidates if (folder / sample).is_file()]
        if not having and download and self._fetches:
            self._torchvision(root, download=True)
            having = [folder for folder in candidates if (folder / sample).is_file()]
        folder = next(iter(having or filter(Path.is_dir, candidates)), None)
        if folder is None:
            raise UserError(self._missing(f"no {part} images", repr(sample), candidates) + self.hint)
        return FileImages(folder)

    def open_array(self, root: str | Path, array: str, download: bool) -> Any:
        """Opens the training or the test array as a sequence of (PIL image, label)."""
        chosen = {"split": array} if self.by_split else {"train": array == "train"}
        return self._torchvision(Path(root, self.folder), download, **self.arguments, **chosen)

    @property
    def _fetches(self) -> bool:
        return bool(self.torchvision and self.archives)

    def _missing(self, what: str, looked_for: str, places: Sequence[Path]) -> str:
        looked = " and in ".join(repr(str(place)) for place in places)
        where = f"; they come from {self.url}" if self.url else ""
        offer = ", or with --data.download true" if self._fetches else ""
        offer = offer or (", or by data download" if self.archives else "")
        return f"{what}: looked for {looked_for} in {looked}{where}{offer}"

    def _pictures(self, root: str | Path, array: str, download: bool) -> Any:
        dataset = self.open_array(root, array, download)
        return dataset._samples if self.labels == "_samples" else dataset

    def _torchvision(self, root: str | Path, download: bool, **arguments: Any) -> Any:
        from torchvision import datasets

        name, where = self.torchvision, repr(str(root))
        if self._fetches:
            arguments["download"] = download
        try:
            return getattr(datasets, name)(Path(root), **arguments)
        except Exception as error:  # a broken file may raise anything
            reason = " ".join(str(error).split())
            if download and self._fetches:
                raise UserError(f"{name} could not be downloaded to {where} from {self.url}: {reason}") from None
            offer = ", or with --data.download true" if self._fetches else ""
            raise UserError(f"no {name} in {where}: it comes from {self.url}{offer} ({reason})") from None


def is_there(place: Path) -> bool:
    """Whether a file, or a folder with something in it, is there; what is hidden does not count."""
    return place.is_file() or (place.is_dir() and any(not path.name.startswith(".") for path in place.iterdir()))


def _picture_of_sample(sample: tuple[Any, int]) -> Image.Image:
    if isinstance(sample[0], str):
        return read_image(Path(sample[0]))  # torchvision would open files of any format
    return Image.fromarray(np.asarray(sample[0]))


def _transposed(picture: Any, item: Any) -> Image.Image:
    image: Image.Image = picture(item)
    return image.transpose(Image.Transpose.TRANSPOSE)


@lru_cache(maxsize=4)
def _packaged_split(file: Path, name: str, image_root: str) -> Split:
    """A split that kshot brings, which every run reads several times and nobody changes."""
    return read_split_zhou(file, name, image_root)


@cache
def _digits() -> Any:
    """The images, (1797, 8, 8), as ``sklearn.datasets.load_digits`` gives them, which would load all of SciPy.

    Their text takes a moment to read, and every part of a run asks for them; they are kept, and cannot be written.
    """
    package = find_spec("sklearn")
    assert package is not None, "scikit-learn is a dependency"
    file = Path((package.submodule_search_locations or [""])[0], "datasets", "data", "digits.csv.gz")
    images = np.loadtxt(file, delimiter=",")[:, :-1].reshape(-1, 8, 8)
    images.setflags(write=False)
    return images


def _grey_levels_16(values: np.ndarray) -> Image.Image:
    return Image.fromarray(np.round(values * (255 / 16)).astype(np.uint8))


class _Digits(ArrayImages):
    """The images of scikit-learn, which are the same in every run: each is digested once."""

    def digests(self, paths: Sequence[str]) -> list[str]:
        theirs = self.items is None or self.items is _digits()
        return [_digest_of_digit(path) for path in paths] if theirs else super().digests(paths)


@cache
def _digest_of_digit(path: str) -> str:
    return ArrayImages(_digits, _grey_levels_16).digests([path])[0]
