"""The data sets known by name, and the one function that turns a name, folder, CSV or split file into a split."""

import tomllib
from collections.abc import Sequence
from pathlib import Path

from kshot.data.readers import read_split_zhou, split_from_csv, split_from_folder
from kshot.data.sources import DatasetEntry, ImageFiles, SklearnDigits, TorchvisionArrays
from kshot.data.splits import Split, check_distinct
from kshot.errors import UserError, nearest_first
from kshot.files import packaged_folder

_KINDS: dict[str, type[DatasetEntry]] = {"files": ImageFiles, "arrays": TorchvisionArrays, "digits": SklearnDigits}


_TABLES = tomllib.loads((packaged_folder("data_splits") / "catalogue.toml").read_text("utf-8"))
CATALOGUE = {name: _KINDS[table.pop("kind")](**table) for name, table in _TABLES.items()}


def load_split(
    dataset: str, root: str | Path = "data", class_names: Sequence[str] | None = None, download: bool = False
) -> tuple[Split, DatasetEntry]:
    """Finds out what a data set consists of. Image files stay untouched.

    A catalogue name wins over a folder of the same name; ``./name`` means the folder. Folders and files are looked for
    from the working directory and below the data root.

    Args:
        dataset: catalogue name, folder, CSV file or split file.
        root: the data root.
        class_names: names in label order instead of the source's, which may read the same then.
        download: fetch array data sets that are missing; their labels are in the same files as the images.

    Raises:
        UserError: there is no such data set, it breaks a rule of its reader, or names are not as many as the classes or
            read the same.
    """
    entry = CATALOGUE.get(dataset)
    if entry is None:
        split, entry = _given(dataset, Path(root), class_names)
    else:
        split = entry.read_split(dataset, Path(root), download)
    if class_names is not None and len(class_names) != len(split.class_names):
        raise UserError(f"{len(class_names)} class_names for the {len(split.class_names)} of {split.name}")
    check_distinct(class_names or split.class_names, "class_names" if class_names else split.file)
    return split, entry


def _given(dataset: str, root: Path, class_names: Sequence[str] | None) -> tuple[Split, DatasetEntry]:
    path = next((p for p in (Path(dataset), root / dataset) if dataset and p.exists()), None)
    if path is None:
        raise UserError(
            f"unknown data set {dataset!r}, or a folder, CSV or split file that is neither here nor in {str(root)!r}. "
            f"{nearest_first(dataset, CATALOGUE, shown=20)}"
        )
    here = str(path.resolve().parent)
    if path.is_dir():
        return split_from_folder(path), ImageFiles(folder=str(path.resolve()))
    if path.suffix.lower() == ".csv":
        return split_from_csv(path, class_names), ImageFiles(folder=here, aliases=(".",))
    if not path.name.endswith((".json", ".json.gz")):
        raise UserError(f"{path}: a data set is a catalogue name, a folder, or a .csv, .json or .json.gz file")
    split = read_split_zhou(path)
    if split.item_kind == "index":
        raise UserError(f"{path}: the rows have an index instead of a file, which only catalogue data sets may")
    return split, ImageFiles(aliases=(here,))
