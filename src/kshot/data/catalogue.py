"""The data sets known by name, and the one function that turns a name, folder, CSV or split file into a split."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from kshot.data.images import ImageSource
from kshot.data.readers import read_split_zhou, split_from_csv, split_from_folder
from kshot.data.sources import ImageFiles, SklearnDigits, Source, TorchvisionArrays
from kshot.data.splits import Row, Split, check_distinct
from kshot.errors import UserError, nearest_first
from kshot.files import packaged_folder
from kshot.templates import DEFAULT_TEMPLATE


@dataclass(frozen=True)
class DatasetEntry:
    """What is known about a data set. A new one is one entry in ``CATALOGUE``.

    Attributes:
        folder: of the data set, below the data root.
        split: file in ``data_splits/``; None where the source has its own parts.
        image_root: folder below ``folder`` to which the paths of the split refer.
        aliases: other folders below the data root to which they may refer, such as torchvision's.
        template: sentence for a class name.
        source: opens the images.
    """

    folder: str = "."
    split: str | None = None
    image_root: str = "."
    aliases: tuple[str, ...] = ()
    template: str = DEFAULT_TEMPLATE
    source: Source = field(default_factory=ImageFiles)


_COOP_GUIDE = "https://github.com/KaiyangZhou/CoOp/blob/main/DATASETS.md"
_BY_SPLIT = ({"split": "train"}, {"split": "test"})
_NUMBER = 'a photo of the number: "{}".'
_NUMBERS = tuple("0123456789")
_GTSRB = """
    speed limit 20 km/h; speed limit 30 km/h; speed limit 50 km/h; speed limit 60 km/h; speed limit 70 km/h;
    speed limit 80 km/h; end of speed limit 80 km/h; speed limit 100 km/h; speed limit 120 km/h; no overtaking;
    no overtaking by trucks; right of way at next intersection; priority road; yield; stop; no vehicles; no trucks;
    no entry; general caution; dangerous curve left; dangerous curve right; double curve; bumpy road; slippery road;
    road narrows on the right; road work; traffic signals; pedestrians; children crossing; bicycles crossing;
    beware of ice or snow; wild animals crossing; end of all speed and passing limits; turn right ahead;
    turn left ahead; ahead only; go straight or right; go straight or left; keep right; keep left; roundabout;
    end of no overtaking; end of no overtaking by trucks
"""

CATALOGUE: dict[str, DatasetEntry] = {
    "digits": DatasetEntry(split="digits.json", template="a photo of the digit {}.", source=SklearnDigits()),
    # CoOp's data sets: folders as in its guide, torchvision's folders as aliases.
    "caltech101": DatasetEntry(
        folder="caltech-101",
        split="split_zhou_Caltech101.json.gz",
        image_root="101_ObjectCategories",
        aliases=("caltech101/101_ObjectCategories",),
        source=ImageFiles("https://data.caltech.edu/records/mzrjq-6wc02", "Caltech101"),
    ),
    "dtd": DatasetEntry(
        folder="dtd",
        split="split_zhou_DescribableTextures.json.gz",
        image_root="images",
        aliases=("dtd/dtd/images",),
        template="{} texture.",
        source=ImageFiles("https://www.robots.ox.ac.uk/~vgg/data/dtd/", "DTD"),
    ),
    "eurosat": DatasetEntry(
        folder="eurosat",
        split="split_zhou_EuroSAT.json.gz",
        image_root="2750",
        aliases=("eurosat/EuroSAT_RGB", "EuroSAT_RGB"),
        template="a centered satellite photo of {}.",
        source=ImageFiles("https://github.com/phelber/EuroSAT", "EuroSAT"),
    ),
    "oxford_flowers": DatasetEntry(
        folder="oxford_flowers",
        split="split_zhou_OxfordFlowers.json.gz",
        image_root="jpg",
        aliases=("flowers-102/jpg",),
        template="a photo of a {}, a type of flower.",
        source=ImageFiles("https://www.robots.ox.ac.uk/~vgg/data/flowers/102/", "Flowers102"),
    ),
    "oxford_pets": DatasetEntry(
        folder="oxford_pets",
        split="split_zhou_OxfordPets.json.gz",
        image_root="images",
        aliases=("oxford-iiit-pet/images",),
        template="a photo of a {}, a type of pet.",
        source=ImageFiles("https://www.robots.ox.ac.uk/~vgg/data/pets/", "OxfordIIITPet"),
    ),
    "stanford_cars": DatasetEntry(
        folder="stanford_cars",
        split="split_zhou_StanfordCars.json.gz",
        source=ImageFiles(_COOP_GUIDE),  # the original host is gone, and torchvision refuses to download
    ),
    "ucf101": DatasetEntry(
        folder="ucf101",
        split="split_zhou_UCF101.json.gz",
        image_root="UCF-101-midframes",
        template="a photo of a person doing {}.",
        source=ImageFiles(_COOP_GUIDE),
    ),
    # Data sets that torchvision downloads.
    "cifar10": DatasetEntry(source=TorchvisionArrays("CIFAR10", "https://www.cs.toronto.edu/~kriz/cifar.html")),
    "cifar100": DatasetEntry(source=TorchvisionArrays("CIFAR100", "https://www.cs.toronto.edu/~kriz/cifar.html")),
    "mnist": DatasetEntry(
        template=_NUMBER,
        source=TorchvisionArrays("MNIST", "https://yann.lecun.com/exdb/mnist/", class_names=_NUMBERS),
    ),
    "fashion_mnist": DatasetEntry(
        source=TorchvisionArrays("FashionMNIST", "https://github.com/zalandoresearch/fashion-mnist"),
    ),
    "svhn": DatasetEntry(
        template=_NUMBER,
        source=TorchvisionArrays(
            "SVHN",
            "http://ufldl.stanford.edu/housenumbers/",
            *_BY_SPLIT,
            labels="labels",
            class_names=_NUMBERS,
            folder="svhn",  # torchvision puts its two files straight into the root
        ),
    ),
    "stl10": DatasetEntry(
        source=TorchvisionArrays("STL10", "https://cs.stanford.edu/~acoates/stl10/", *_BY_SPLIT, labels="labels"),
    ),
    "gtsrb": DatasetEntry(
        template='a zoomed in photo of a "{}" traffic sign.',
        source=TorchvisionArrays(
            "GTSRB",
            "https://benchmark.ini.rub.de/gtsrb_dataset.html",
            *_BY_SPLIT,
            labels="_samples",
            class_names=tuple(" ".join(name.split()) for name in _GTSRB.split(";")),
        ),
    ),
}


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

    Returns:
        The split, and the entry by which ``open_images`` finds its images.

    Raises:
        UserError: there is no such data set, it breaks a rule of its reader, or names are not as many as the classes or
            read the same.
    """
    split, entry = _read(dataset, Path(root), class_names, download)
    if class_names is not None and len(class_names) != len(split.class_names):
        raise UserError(f"{len(class_names)} class_names for the {len(split.class_names)} of {split.name}")
    check_distinct(class_names or split.class_names, "class_names" if class_names else split.file)
    return split, entry


def _read(dataset: str, root: Path, class_names: Sequence[str] | None, download: bool) -> tuple[Split, DatasetEntry]:
    entry = CATALOGUE.get(dataset)
    if entry is not None:
        if isinstance(entry.source, TorchvisionArrays):
            return entry.source.split(dataset, root, download), entry
        assert entry.split is not None  # the contract of the catalogue, which has a test
        return read_split_zhou(packaged_folder("data_splits") / entry.split, dataset, entry.image_root), entry
    path = next((p for p in (Path(dataset), root / dataset) if dataset and p.exists()), None)
    if path is None:
        raise UserError(
            f"unknown data set {dataset!r}, or a folder, CSV or split file that is neither here nor in {str(root)!r}. "
            f"{nearest_first(dataset, CATALOGUE, shown=20)}"
        )
    here = str(path.resolve().parent)
    if path.is_dir():
        return split_from_folder(path), DatasetEntry(folder=str(path.resolve()))
    if path.suffix.lower() == ".csv":
        return split_from_csv(path, class_names), DatasetEntry(folder=here, aliases=(".",))
    if not path.name.endswith((".json", ".json.gz")):
        raise UserError(f"{path}: a data set is a catalogue name, a folder, or a .csv, .json or .json.gz file")
    split = read_split_zhou(path)
    if split.item_kind == "index":
        raise UserError(f"{path}: the rows have an index instead of a file, which only catalogue data sets may")
    return split, DatasetEntry(aliases=(here,))


def open_images(
    entry: DatasetEntry, root: str | Path, part: str, rows: Sequence[Row], download: bool = False
) -> ImageSource:
    """Opens the images of a part: train, val or test.

    The first of its rows tells which candidate folder is the right one. What is missing is fetched where that is asked
    for and torchvision can.

    Raises:
        UserError: the images are not there.
    """
    root = Path(root)
    candidates = [root / entry.folder / entry.image_root, *(root / alias for alias in entry.aliases)]
    return entry.source.images(part, root, candidates, rows[0].path, download)
