"""Data sets: what is known about each, who opens its images, and what turns a name, folder or file into a split."""

import hashlib
import os
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, partial
from importlib.util import find_spec
from operator import itemgetter
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image

from kshot.data.archives import ARCHIVES, COMPRESSED, ArchiveImages, Member, list_archive
from kshot.data.hub_sets import PREFIX, HubImages, split_from_hub
from kshot.data.images import ArrayImages, FileImages, ImageSource, read_image
from kshot.data.listing import meant_around, tool_made
from kshot.data.names import Names, named
from kshot.data.readers import NO_SHARE, TABLES, read_split_zhou, split_from_folder, split_from_listing
from kshot.data.splits import TEST_SHARE, Row, Split, listed, make_split, stratify
from kshot.data.tables import split_from_table
from kshot.errors import UserError, nearest_first
from kshot.files import may_be_read, packaged_folder
from kshot.templates import DEFAULT_TEMPLATE

ARRAYS = {"train": "train", "val": "train", "test": "test"}  # which array of a torchvision data set a part indexes


@dataclass(frozen=True, kw_only=True)
class DatasetEntry:
    """What is known about a data set. A new one is one table in ``data_splits/catalogue.toml``.

    Attributes:
        kind: image files as their authors distribute them; torchvision's training and test arrays, where 20 % of the
            training images are for validation; or the digits that come with scikit-learn.
        split: file in ``data_splits/``; empty for arrays, which have their own parts.
        folder: of the data set, below the data root.
        image_root: folder below that to which the paths of the split refer.
        aliases: other folders below the data root to which they may refer, such as torchvision's.
        url: where a user finds the files.
        torchvision: data set class in torchvision that downloads the same files, if there is one.
        by_split: whether its argument that chooses an array is ``split``, not ``train``.
        labels: its attribute with the labels; ``_samples`` holds (path, label) pairs.
        class_names: of arrays, in label order; empty: those that torchvision says.
        template: sentence for a class name.
        hint: what to say besides where images are missing.
    """

    kind: Literal["files", "arrays", "digits"] = "files"
    split: str = ""
    folder: str = "."
    image_root: str = "."
    aliases: Sequence[str] = ()
    url: str = ""
    torchvision: str = ""
    by_split: bool = False
    labels: str = "targets"
    class_names: Sequence[str] = ()
    template: str = DEFAULT_TEMPLATE
    hint: str = field(default="", compare=False, repr=False)

    def read_split(self, name: str, root: str | Path, download: bool) -> Split:
        """Reads the split, which gets the name; raises UserError when labels that come with the images are missing.

        The digest of arrays is that of the training and then the test labels as little-endian int64.
        """
        if self.kind != "arrays":
            return read_split_zhou(packaged_folder("data_splits") / self.split, name, self.image_root)
        digest = hashlib.sha256()
        rows: dict[str, list[Row]] = {}
        names = self.class_names
        for array in ("train", "test"):
            dataset = self.open_array(root, array, download)
            values = getattr(dataset, self.labels)
            labels = np.asarray([v[1] for v in values] if self.labels == "_samples" else values, dtype="<i8")
            digest.update(labels.tobytes())
            names = names or dataset.classes
            if labels.size and not 0 <= labels.min() <= labels.max() < len(names):
                raise UserError(f"{name}: labels from {labels.min()} to {labels.max()} for {len(names)} classes")
            rows[array] = [Row(str(i), int(label), names[label]) for i, label in enumerate(labels)]
        parts = stratify(rows["train"], (20, 0)) | {"test": rows["test"]}
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
            return ArrayImages(_digits, _grey_levels_16)
        if self.kind == "arrays":
            load = partial(self._pictures, root, ARRAYS[part], download)
            return ArrayImages(load, _file_of_sample if self.labels == "_samples" else itemgetter(0))
        candidates = [Path(root, below) for below in (f"{self.folder}/{self.image_root}", *self.aliases)]
        sample = rows[0].path
        having = [folder for folder in candidates if (folder / sample).is_file()]
        if not having and download and self.torchvision:
            self._torchvision(root, download=True)
            having = [folder for folder in candidates if (folder / sample).is_file()]
        folder = next(iter(having or filter(Path.is_dir, candidates)), None)
        if folder is None:
            looked = " and in ".join(repr(str(candidate)) for candidate in candidates)
            where = f"; they come from {self.url}" if self.url else ""
            offer = ", or with --data.download true" if self.torchvision else ""
            raise UserError(f"no {part} images: looked for {sample!r} in {looked}{where}{offer}{self.hint}")
        return FileImages(folder)

    def open_array(self, root: str | Path, array: str, download: bool) -> Any:
        """Opens the training or the test array as a sequence of (PIL image, label)."""
        chosen = {"split": array} if self.by_split else {"train": array == "train"}
        return self._torchvision(Path(root, self.folder), download, **chosen)

    def _pictures(self, root: str | Path, array: str, download: bool) -> Any:
        dataset = self.open_array(root, array, download)
        return dataset._samples if self.labels == "_samples" else dataset

    def _torchvision(self, root: str | Path, download: bool, **arguments: Any) -> Any:
        from torchvision import datasets

        name, where = self.torchvision, repr(str(root))
        try:
            return getattr(datasets, name)(Path(root), download=download, **arguments)
        except Exception as error:  # a broken file may raise anything
            reason = " ".join(str(error).split())
            if download:
                raise UserError(f"{name} could not be downloaded to {where} from {self.url}: {reason}") from None
            offer = f"it comes from {self.url}, or with --data.download true"
            raise UserError(f"no {name} in {where}: {offer} ({reason})") from None


@dataclass(frozen=True, kw_only=True)
class ArchiveEntry(DatasetEntry):
    """An archive with images, which is its ``folder``; ``members`` say where they lie in it."""

    members: Mapping[str, Member] = field(compare=False, repr=False)

    def images(self, root: str | Path, part: str, rows: Sequence[Row], download: bool = False) -> ImageSource:  # noqa: ARG002
        return ArchiveImages(Path(self.folder), self.members)


@dataclass(frozen=True, kw_only=True)
class HubEntry(DatasetEntry):
    """A data set of the Hugging Face hub, which is its ``folder``, and the column of its images."""

    column: str

    def images(self, root: str | Path, part: str, rows: Sequence[Row], download: bool = False) -> ImageSource:  # noqa: ARG002
        return HubImages(self.folder.removeprefix(PREFIX), self.column, download)


def _file_of_sample(sample: tuple[str, int]) -> Image.Image:
    return read_image(Path(sample[0]))  # torchvision would open files of any format


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


_TABLES = tomllib.loads((packaged_folder("data_splits") / "catalogue.toml").read_text("utf-8"))
CATALOGUE = {name: DatasetEntry(**table) for name, table in _TABLES.items()}


@may_be_read()
def load_split(
    dataset: str,
    root: str | Path = "data",
    class_names: Names | None = None,
    download: bool = False,
    test_share: float | None = TEST_SHARE,
    listing: Any = None,
) -> tuple[Split, DatasetEntry]:
    """Finds out what a data set consists of. Image files stay untouched.

    A catalogue name wins over a folder of the same name; ``./name`` means the folder. Folders and files are looked for
    from the working directory and below the data root. Raises UserError when there is no such data set, it breaks a
    rule of its reader, or names are not as many as the classes or read the same.

    Args:
        dataset: catalogue name, folder, archive, table or split file, or ``hf:NAME`` of the Hugging Face hub.
        root: the data root.
        class_names: names instead of the source's, which may read the same then: in label order, or by the source's.
        download: fetch array data sets that are missing; their labels are in the same files as the images.
        test_share: of a class, for testing, where the images are in no parts; None for none.
        listing: of the split that was read before.
    """
    if dataset not in CATALOGUE:
        return _given(dataset, Path(root), class_names, download, test_share, listing)
    if test_share != TEST_SHARE:
        raise UserError(f"{dataset}: {NO_SHARE}")
    own = next((str(path) for path in (Path(dataset), Path(root, dataset)) if path.is_dir()), "")
    own = f"./{own}" if own == dataset else own
    hint = f"; your own folder is meant by --data.dataset {own}" if own else ""
    try:
        split = CATALOGUE[dataset].read_split(dataset, root, download)
    except UserError as error:
        raise UserError(f"{error}{hint}") from None
    return named(split, class_names), replace(CATALOGUE[dataset], hint=hint)


def _given(
    dataset: str, root: Path, class_names: Names | None, download: bool, test_share: float | None, listing: Any
) -> tuple[Split, DatasetEntry]:
    if dataset.startswith(PREFIX):
        split, column = split_from_hub(dataset.removeprefix(PREFIX), download, test_share)
        return named(split, class_names, codes=True), HubEntry(folder=dataset, column=column)
    path = next((p for p in (Path(dataset), root / dataset) if dataset and p.exists()), None)
    if path is None:
        raise UserError(
            f"unknown data set {dataset!r}, or a folder, CSV or split file that is neither here nor in {str(root)!r}. "
            f"{nearest_first(dataset, CATALOGUE, shown=20)}"
        )
    names = os.listdir(path) if path.is_dir() else []  # noqa: PTH208  names are what is asked for
    lists = sorted(name for name in names if name.startswith("split_zhou_") and name.endswith((".json", ".json.gz")))
    if len(lists) > 1:
        raise UserError(f"{path}: has {listed(lists)}: give one of them")
    path = path.joinpath(*lists)  # as CoOp keeps it beside the images
    beside = str(path.resolve().parent)
    if path.is_dir():
        split = split_from_folder(path, test_share, listing)
        if len(split.class_names) == 1:
            raise UserError(f"{_one_class(path, split)}; {meant_around(path)}")
        return named(split, class_names, path, codes=True), DatasetEntry(folder=str(path.resolve()))
    if path.name.lower().endswith((*ARCHIVES, *COMPRESSED)):
        files = listing if listing is not None and listing.holds(path) else list_archive(path)
        split = split_from_listing(files, str(path), path.stem, test_share)
        if len(split.class_names) == 1:
            raise UserError(_one_class(path, split))
        return named(split, class_names, codes=True), ArchiveEntry(folder=str(path.resolve()), members=files.members)
    if path.suffix.lower() in TABLES:
        in_order = None if isinstance(class_names, Mapping) else class_names
        split = split_from_table(path, in_order, test_share)
        return named(split, class_names, codes=True), DatasetEntry(folder=beside, aliases=(".",))
    if not path.name.endswith((".json", ".json.gz")):
        raise UserError(
            f"{path}: a data set is a catalogue name, a folder, or a .csv, .tsv, .parquet, .json, .zip or .tar file"
        )
    if test_share != TEST_SHARE:
        raise UserError(f"{path}: {NO_SHARE}")
    split = read_split_zhou(path)
    if split.item_kind == "index":
        raise UserError(f"{path}: the rows have an index instead of a file, which only catalogue data sets may")
    # The images may lie in a folder beside the file, such as images/ or jpg/.
    below = sorted(each.path for each in os.scandir(beside) if each.is_dir() and not tool_made(each.name))
    return named(split, class_names), DatasetEntry(aliases=(beside, *below))


def _one_class(path: Path, split: Split) -> str:
    return f"{path}: one class, {split.class_names[0]!r}, and so nothing to tell apart"
