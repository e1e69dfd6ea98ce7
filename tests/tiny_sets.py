"""Every data set of the catalogue in a tiny form: its true folders, lists and file formats, with a few made pictures.

A new entry needs words here only where its folders or lists have a form of their own: :data:`FOLDERS`, :data:`LISTS`,
:data:`ARRAYS`.
"""

import bz2
import gzip
import io
import itertools
import json
import pickle
import struct
from pathlib import PurePosixPath

import numpy as np
from PIL import Image
from scipy.io import savemat

from kshot.data.catalogue import CATALOGUE, load_split
from kshot.data.entries import DatasetEntry
from kshot.data.splits import PARTS, display_name

Files = dict[str, bytes]  # by path below the data root
COUNTS = {"train": 5, "val": 1, "test": 2}  # images of a class

# Class folders, and what prompts say of them, in label order.
IMAGENET = {"n01440764": "tench", "n01498041": "stingray", "n01531178": "goldfinch", "n03773504": "missile"}
IMAGENET |= {"n04008634": "missile"}  # two classes of CLIP's list have this name
FOLDERS = {
    "imagenet": IMAGENET,
    "imagenetv2": {"0": "tench", "6": "stingray", "11": "goldfinch", "657": "missile", "744": "missile"},
    "imagenet_sketch": IMAGENET,
    "imagenet_a": {"n01498041": "stingray", "n01531178": "goldfinch"},
    "imagenet_r": {"n01531178": "goldfinch", "n03773504": "missile"},
    "imagenette": {"n01440764": "tench", "n02979186": "cassette player"},
    "country211": {"AD": "Andorra", "FR": "France", "ZW": "Zimbabwe"},
    "caltech256": {"001.ak47": "ak47", "101.head-phones": "head phones", "145.motorbikes-101": "motorbikes"},
}
PART_FOLDERS = {  # of those with parts
    "voc2007": {"train": "train", "test": "test"},
    "imagenet": {"train": "train", "test": "val"},
    "imagenette": {"train": "train", "test": "val"},
    "country211": {"train": "train", "val": "valid", "test": "test"},
}

# Classes with what prompts say; a line of a list for image i of a class; and where the image lies.
LISTS = {
    "food101": ({"apple_pie": "apple pie", "sushi": "sushi"}, "{c}/{i}", "{c}/{i}.jpg"),
    "fgvc_aircraft": ({"727-200": "727-200", "Boeing 717": "Boeing 717"}, "{i:07} {c}", "{i:07}.jpg"),
    "sun397": (
        {"abbey": "abbey", "apartment_building/outdoor": "outdoor apartment building"},
        "/a/{c}/sun_{i}.jpg",
        "a/{c}/sun_{i}.jpg",
    ),
    "resisc45": (
        {"airplane": "airplane", "golf_course": "golf course"},
        "{c}_{i:03}.jpg",
        "{c}/{c}_{i:03}.jpg",
    ),
    "cub200": (
        {"001.Black_footed_Albatross": "Black footed Albatross", "002.Laysan_Albatross": "Laysan Albatross"},
        "{i} {c}/Bird_{i}.jpg",
        "{c}/Bird_{i}.jpg",
    ),
}


def picture(seed: int, size: int = 40, kind: str = "PNG") -> bytes:
    """A picture with a few soft areas, unlike those of other seeds."""
    content = io.BytesIO()
    coarse = Image.fromarray(np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8))
    coarse.resize((size, size), Image.Resampling.BICUBIC).save(content, kind)
    return content.getvalue()


def pixels(count: int, side: int, seed: int = 0) -> np.ndarray:
    """Grey values, (count, side, side), each image unlike the others."""
    coarse = np.random.default_rng(seed).integers(0, 256, (count, side, side), dtype=np.uint8)
    soft = [Image.fromarray(each[:6, :6]).resize((side, side), Image.Resampling.BICUBIC) for each in coarse]
    return np.stack([np.asarray(each) for each in soft])


def tiny_split(name: str) -> tuple[dict[str, list], list[str]]:
    """The first images of the first three classes of a split that comes with kshot, and the names of these."""
    split = load_split(name)[0]
    rows = {
        part: [
            row for label in range(3) for row in [r for r in getattr(split, part) if r.label == label][: COUNTS[part]]
        ]
        for part in PARTS
    }
    return rows, [display_name(each) for each in split.class_names[:3]]


def file_set(name: str, layout: str) -> tuple[Files, list[str]]:
    """The files of an entry with image files in one of its layouts, and the class names that prompts say."""
    entry = CATALOGUE[name]
    number = itertools.count(1000 * [*CATALOGUE].index(name))
    if entry.kind == "folders":
        folders = FOLDERS.get(name, {"cat": "cat", "dog": "dog"})
        parts = PART_FOLDERS.get(name, {"": ""})
        below = {
            f"{layout}/{folder}/{each}/{i}.jpg": picture(next(number))
            for part, folder in parts.items()
            for each in folders
            for i in range(COUNTS.get(part, 10))
        }
        return clean(below), list(folders.values())
    if entry.lists:
        lists, images, names = listed_images(name)
        files = {str(PurePosixPath(layout).parent / file): content for file, content in lists.items()}
        return clean(files | {f"{layout}/{image}": picture(next(number)) for image in images}), names
    rows, names = tiny_split(name)
    return clean({f"{layout}/{row.path}": picture(next(number)) for part in PARTS for row in rows[part]}), names


def listed_images(name: str) -> tuple[Files, list[str], list[str]]:
    """The authors' lists of an entry, the images in them and the class names."""
    classes, line, path = LISTS[name]
    lists: dict[str, list[str]] = {}
    images, numbers = [], itertools.count(1)
    for part in PARTS:
        for each in classes if part in CATALOGUE[name].lists or (part != "val" and name == "cub200") else ():
            for i in itertools.islice(numbers, COUNTS[part]):
                images.append(path.format(c=each, i=i))
                if name == "cub200":
                    lists.setdefault("images.txt", []).append(line.format(c=each, i=i))
                    lists.setdefault("train_test_split.txt", []).append(f"{i} {int(part == 'train')}")
                else:
                    (file,) = CATALOGUE[name].lists[part]
                    lists.setdefault(file, []).append(line.format(c=each, i=i))
    return {file: "\n".join(lines).encode() + b"\n" for file, lines in lists.items()}, images, list(classes.values())


def split_of_coop(name: str) -> bytes:
    """A file in CoOp's format of the images of an entry that has the authors' lists."""
    _, images, names = listed_images(name)
    half = len(images) // len(names) // 2 or 1
    rows = [[image, i % len(names), names[i % len(names)]] for i, image in enumerate(images)]
    parts = {"train": rows[: 2 * half], "val": rows[2 * half : 3 * half], "test": rows[3 * half :]}
    return json.dumps(parts).encode()


def clean(files: Files) -> Files:
    """Paths in their shortest form."""
    return {str(PurePosixPath(path)): content for path, content in files.items()}


def array_set(name: str) -> tuple[Files, list[str]]:
    """The files of an entry that torchvision reads, with three classes of its own, and the names of these."""
    from torchvision import datasets

    entry = CATALOGUE[name]
    names = list(entry.class_names) or getattr(getattr(datasets, entry.torchvision), "classes", ())
    files, own = ARRAYS[entry.torchvision](entry)
    return clean(files), [display_name(each) for each in own or names[:3]]


def labels_of(part: str) -> np.ndarray:
    return np.arange(3).repeat(COUNTS[part])


def idx(values: np.ndarray, kind: int = 8) -> bytes:
    header = struct.pack(f">BBBB{values.ndim}I", 0, 0, kind, values.ndim, *values.shape)
    return header + values.astype({8: "u1", 12: ">i4"}[kind]).tobytes()


def mnist(entry: DatasetEntry, prefix: str = "", test: str = "t10k") -> tuple[Files, list[str]]:
    """MNIST's format."""
    files = {}
    for part, called in (("train", f"{prefix}train"), ("test", f"{prefix}{test}")):
        labels = labels_of(part)
        folder = f"{entry.archives[0].into}/{called}"
        files[f"{folder}-images-idx3-ubyte"] = idx(pixels(len(labels), 28, len(part)))
        if entry.torchvision == "QMNIST":
            files[f"{folder}-labels-idx2-int"] = idx(np.pad(labels[:, None], ((0, 0), (0, 7))), 12)
        else:
            files[f"{folder}-labels-idx1-ubyte"] = idx(labels)
    return files, []


def cifar(entry: DatasetEntry) -> tuple[Files, list[str]]:
    """CIFAR's pickles."""
    fine = entry.torchvision == "CIFAR100"
    folder, key = entry.archives[0].gives[0], "fine_labels" if fine else "labels"
    train = ["train"] if fine else [f"data_batch_{i}" for i in range(1, 6)]
    files = {}
    for i, batch in enumerate([*train, "test" if fine else "test_batch"]):
        labels = labels_of("train" if i < len(train) else "test")
        data = np.stack([pixels(len(labels), 32, 10 * i + c).reshape(len(labels), -1) for c in range(3)], 1)
        files[f"{folder}/{batch}"] = pickle.dumps({"data": data.reshape(len(labels), -1), key: labels.tolist()})
    meta = {"fine_label_names" if fine else "label_names": ["apple", "sea_lion", "truck"]}
    return files | {f"{folder}/{'meta' if fine else 'batches.meta'}": pickle.dumps(meta)}, [
        "apple",
        "sea lion",
        "truck",
    ]


def svhn(entry: DatasetEntry) -> tuple[Files, list[str]]:
    """Matlab files, where the digit 0 is called 10."""
    files = {}
    for part in ("train", "test"):
        labels, content = labels_of(part), io.BytesIO()
        data = np.stack([pixels(len(labels), 32, len(part) + c) for c in range(3)], 1).transpose(2, 3, 1, 0)
        savemat(content, {"X": data, "y": np.where(labels == 0, 10, labels)[:, None]})
        files[f"{entry.folder}/{part}_32x32.mat"] = content.getvalue()
    return files, []


def stl10(entry: DatasetEntry) -> tuple[Files, list[str]]:
    """Plain bytes."""
    folder = entry.archives[0].gives[0]
    names = ["airplane", "bird", "car"]
    files = {f"{folder}/class_names.txt": "\n".join(names).encode(), f"{folder}/unlabeled_X.bin": b""}
    for part in ("train", "test"):
        labels = labels_of(part)
        data = np.stack([pixels(len(labels), 96, len(part) + c) for c in range(3)], 1)
        files[f"{folder}/{part}_X.bin"] = data.tobytes()
        files[f"{folder}/{part}_y.bin"] = (labels + 1).astype("u1").tobytes()
    return files, names


def usps(entry: DatasetEntry) -> tuple[Files, list[str]]:
    """The format of LIBSVM, packed by bzip2; labels from 1."""
    files = {}
    for part, file in (("train", "usps.bz2"), ("test", "usps.t.bz2")):
        labels = labels_of(part)
        rows = pixels(len(labels), 16, len(part)).reshape(len(labels), -1) / 127.5 - 1
        lines = [
            f"{label + 1} " + " ".join(f"{k}:{value:.4f}" for k, value in enumerate(row, 1)) + "\n"
            for label, row in zip(labels, rows, strict=True)
        ]
        files[f"{entry.folder}/{file}"] = bz2.compress("".join(lines).encode())
    return files, []


def gtsrb(_: DatasetEntry) -> tuple[Files, list[str]]:
    """PPM files, and a table of the test images."""
    files, table = {}, ["Filename;Width;Height;Roi.X1;Roi.Y1;Roi.X2;Roi.Y2;ClassId"]
    for part in ("train", "test"):
        for i, label in enumerate(labels_of(part)):
            place = f"Training/{label:05}" if part == "train" else "Final_Test/Images"
            files[f"gtsrb/GTSRB/{place}/{i:05}.ppm"] = picture(100 * len(part) + i, kind="PPM")
            table += [f"{i:05}.ppm;40;40;0;0;40;40;{label}"] * (part == "test")
    return files | {"gtsrb/GT-final_test.csv": "\n".join(table).encode()}, []


def rendered_sst2(_: DatasetEntry) -> tuple[Files, list[str]]:
    """Class folders in folders of parts."""
    names = ["negative", "positive"]
    places = [(p, n, i) for p in ("train", "valid", "test") for n in names for i in range(5)]
    return {f"rendered-sst2/{p}/{n}/{i}.png": picture(k) for k, (p, n, i) in enumerate(places)}, names


def fer2013(_: DatasetEntry) -> tuple[Files, list[str]]:
    """A table with the pixels in words."""
    rows = ["emotion,pixels,Usage"]
    for part, usage in (("train", "Training"), ("test", "PrivateTest")):
        labels = labels_of(part)
        for label, image in zip(labels, pixels(len(labels), 48, len(part)), strict=True):
            rows.append(f"{label},{' '.join(map(str, image.ravel()))},{usage}")
    return {"fer2013/fer2013.csv": "\n".join(rows).encode()}, []


ARRAYS = {
    **dict.fromkeys(("MNIST", "FashionMNIST", "KMNIST"), mnist),
    "EMNIST": lambda entry: mnist(entry, "emnist-balanced-", "test"),
    "QMNIST": lambda entry: mnist(entry, "qmnist-", "test"),
    **dict.fromkeys(("CIFAR10", "CIFAR100"), cifar),
    "SVHN": svhn,
    "STL10": stl10,
    "USPS": usps,
    "GTSRB": gtsrb,
    "RenderedSST2": rendered_sst2,
    "FER2013": fer2013,
}


def packed(members: Files, name: str) -> bytes:
    """An archive of the kind that the name says, with these members; a single file as it is or packed."""
    from test_data_downloads import tarred, zipped

    if name.endswith(".zip"):
        return zipped(**members)
    if name.endswith((".tar", ".tar.gz", ".tgz")):
        return tarred(members, "w" if name.endswith(".tar") else "w:gz")
    (content,) = members.values()
    return gzip.compress(content) if name.endswith(".gz") else content
