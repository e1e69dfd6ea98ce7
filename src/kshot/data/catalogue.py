"""The data sets known by name, and the one function that turns a name, folder, CSV or split file into a split."""

from collections.abc import Sequence
from pathlib import Path

from kshot.data.readers import read_split_zhou, split_from_csv, split_from_folder
from kshot.data.sources import DatasetEntry, ImageFiles, SklearnDigits, TorchvisionArrays
from kshot.data.splits import Split, check_distinct
from kshot.errors import UserError, nearest_first

_COOP_GUIDE = "https://github.com/KaiyangZhou/CoOp/blob/main/DATASETS.md"
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
    "digits": SklearnDigits(split="digits.json", template="a photo of the digit {}."),
    # CoOp's data sets: folders as in its guide, torchvision's folders as aliases.
    "caltech101": ImageFiles(
        split="split_zhou_Caltech101.json.gz",
        folder="caltech-101",
        image_root="101_ObjectCategories",
        aliases=("caltech101/101_ObjectCategories",),
        url="https://data.caltech.edu/records/mzrjq-6wc02",
        torchvision="Caltech101",
    ),
    "dtd": ImageFiles(
        split="split_zhou_DescribableTextures.json.gz",
        folder="dtd",
        image_root="images",
        aliases=("dtd/dtd/images",),
        url="https://www.robots.ox.ac.uk/~vgg/data/dtd/",
        torchvision="DTD",
        template="{} texture.",
    ),
    "eurosat": ImageFiles(
        split="split_zhou_EuroSAT.json.gz",
        folder="eurosat",
        image_root="2750",
        aliases=("eurosat/EuroSAT_RGB", "EuroSAT_RGB"),
        url="https://github.com/phelber/EuroSAT",
        torchvision="EuroSAT",
        template="a centered satellite photo of {}.",
    ),
    "oxford_flowers": ImageFiles(
        split="split_zhou_OxfordFlowers.json.gz",
        folder="oxford_flowers",
        image_root="jpg",
        aliases=("flowers-102/jpg",),
        url="https://www.robots.ox.ac.uk/~vgg/data/flowers/102/",
        torchvision="Flowers102",
        template="a photo of a {}, a type of flower.",
    ),
    "oxford_pets": ImageFiles(
        split="split_zhou_OxfordPets.json.gz",
        folder="oxford_pets",
        image_root="images",
        aliases=("oxford-iiit-pet/images",),
        url="https://www.robots.ox.ac.uk/~vgg/data/pets/",
        torchvision="OxfordIIITPet",
        template="a photo of a {}, a type of pet.",
    ),
    "stanford_cars": ImageFiles(
        split="split_zhou_StanfordCars.json.gz",
        folder="stanford_cars",
        url=_COOP_GUIDE,  # the original host is gone, and torchvision refuses to download
    ),
    "ucf101": ImageFiles(
        split="split_zhou_UCF101.json.gz",
        folder="ucf101",
        image_root="UCF-101-midframes",
        url=_COOP_GUIDE,
        template="a photo of a person doing {}.",
    ),
    # Data sets that torchvision downloads.
    "cifar10": TorchvisionArrays("CIFAR10", "https://www.cs.toronto.edu/~kriz/cifar.html"),
    "cifar100": TorchvisionArrays("CIFAR100", "https://www.cs.toronto.edu/~kriz/cifar.html"),
    "mnist": TorchvisionArrays("MNIST", "https://yann.lecun.com/exdb/mnist/", class_names=_NUMBERS, template=_NUMBER),
    "fashion_mnist": TorchvisionArrays("FashionMNIST", "https://github.com/zalandoresearch/fashion-mnist"),
    "svhn": TorchvisionArrays(
        "SVHN",
        "http://ufldl.stanford.edu/housenumbers/",
        by_split=True,
        labels="labels",
        class_names=_NUMBERS,
        folder="svhn",  # torchvision puts its two files straight into the root
        template=_NUMBER,
    ),
    "stl10": TorchvisionArrays("STL10", "https://cs.stanford.edu/~acoates/stl10/", by_split=True, labels="labels"),
    "gtsrb": TorchvisionArrays(
        "GTSRB",
        "https://benchmark.ini.rub.de/gtsrb_dataset.html",
        by_split=True,
        labels="_samples",
        class_names=tuple(" ".join(name.split()) for name in _GTSRB.split(";")),
        template='a zoomed in photo of a "{}" traffic sign.',
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
        The split, and the entry that opens its images.

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
