"""The catalogue, and what turns one of its names, a folder or a file into a split and what opens its images."""

import os
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any

from kshot.data.archives import ARCHIVES, COMPRESSED, ArchiveImages, Member, list_archive
from kshot.data.entries import Archive, DatasetEntry
from kshot.data.hub_sets import PREFIX, HubImages, split_from_hub
from kshot.data.images import ImageSource
from kshot.data.listing import meant_around, tool_made
from kshot.data.names import Names, named
from kshot.data.readers import NO_SHARE, TABLES, read_split_zhou, split_from_folder, split_from_listing
from kshot.data.splits import TEST_SHARE, Row, Split, listed
from kshot.data.tables import split_from_table
from kshot.errors import UserError, nearest_first
from kshot.files import may_be_read, packaged_folder
from kshot.places import loaded


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


def entry_of(table: Mapping[str, Any]) -> DatasetEntry:
    """Makes an entry of a table of the catalogue; raises TypeError for a key that is none."""
    archives = [Archive(**archive) for archive in table.get("archives", ())]
    return DatasetEntry(**{**table, "archives": archives})


class Catalogue(Mapping[str, DatasetEntry]):
    """Data sets by name: kshot's own, and tables of installed packages, by entry points of ``kshot.datasets``."""

    def __init__(self, tables: Mapping[str, Any]) -> None:
        self.own = {name: entry_of(table) for name, table in tables.items()}

    @cached_property
    def plugged(self) -> dict[str, EntryPoint]:
        """Those of packages, whose names are not kshot's."""
        return {p.name: p for p in entry_points(group="kshot.datasets") if p.name not in self.own}

    def __getitem__(self, name: str) -> DatasetEntry:
        if name in self.own:
            return self.own[name]
        table = loaded(self.plugged[name])
        try:
            return entry_of(table)
        except (TypeError, AttributeError) as error:
            raise UserError(f"The plug-in {name} of kshot.datasets is no table of a data set ({error}).") from error

    def __contains__(self, name: object) -> bool:
        return name in self.own or name in self.plugged

    def __iter__(self) -> Iterator[str]:
        return iter([*self.own, *self.plugged])

    def __len__(self) -> int:
        return len(self.own) + len(self.plugged)


CATALOGUE = Catalogue(tomllib.loads((packaged_folder("data_splits") / "catalogue.toml").read_text("utf-8")))


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
        split = CATALOGUE[dataset].read_split(dataset, root, download, listing)
    except UserError as error:
        raise UserError(f"{error}{hint}") from None
    return split if class_names is None else named(split, class_names), replace(CATALOGUE[dataset], hint=hint)


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
            f"{nearest_first(dataset, CATALOGUE, shown=40)}"
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
