"""Every catalogue entry keeps the contract; names, folders, CSV and split files are all found."""

import hashlib
import inspect
import re
import struct
import tomllib
from pathlib import Path

import numpy as np
import pytest
import torchvision
from data_fixtures import image_folder, rows_of, save_image, split_file
from PIL import Image

from kshot.data import entries
from kshot.data.catalogue import CATALOGUE, entry_of, load_split
from kshot.data.entries import DatasetEntry
from kshot.data.splits import PARTS, Row, check_distinct, split_bytes, stratify
from kshot.errors import UserError
from kshot.files import packaged_folder

every_entry = pytest.mark.parametrize("name", CATALOGUE)
SHIPPED = [name for name, entry in CATALOGUE.items() if entry.split and not entry.split_from]
ARRAYS = [name for name, entry in CATALOGUE.items() if entry.kind == "arrays"]

# SHA-256 of the uncompressed files and numbers of classes, training, validation and test images
PUBLISHED = {
    "caltech101": ("52ce83205ff8ff8a1a18119aad6376120ae35c36e783a984bc560cbf10e73fa5", 100, 4128, 1649, 2465),
    "dtd": ("f26ebeccd2b58e68d70f07a0dc39fe49bf7b69024bac34396b954dfd87969c38", 47, 2820, 1128, 1692),
    "eurosat": ("541503a77d0b26b735d85ec7a3e672804fe0aa466c2e5f07da772cc6c0af8ad2", 10, 13500, 5400, 8100),
    "oxford_flowers": ("2f50c42fc1a17ca13c271cb4269b1347bdb43d2be672e34f74a4e4cbfbcca794", 102, 4093, 1633, 2463),
    "oxford_pets": ("d7f3ffe65b3919f95132e51422894ae18686b83c331fd8c0adcdc3dc2de6301e", 37, 2944, 736, 3669),
    "stanford_cars": ("40acee7aa65c8e4727a32d90e884b7c3f8960b523422317e163f7af65432959d", 196, 6509, 1635, 8041),
    "ucf101": ("d78cb834f7c5792ceaff2c5ee2d7c76a9e4086e48a3a6b01232989d29cbefdd8", 101, 7639, 1898, 3783),
}


class TestTables:
    """The schema of ``data_splits/catalogue.toml``."""

    @every_entry
    def test_entry(self, name):
        entry = CATALOGUE[name]
        assert entry.template.count("{}") == 1
        assert entry.classes > 1
        assert len(entry.sizes) in (0, 3)
        assert len(entry.citation) > 20
        assert entry.archives or entry.by_hand or name == "digits"
        assert entry.url.startswith("http") or name == "digits"
        assert bool(entry.split_from) == (bool(entry.split) and name not in SHIPPED)
        assert bool(entry.split or entry.lists) == (entry.kind in {"files", "digits"})
        assert bool(entry.lists) == bool(entry.line)
        assert set(entry.lists) in (set(), {"all"}, {"train", "test"}, set(PARTS))
        assert re.fullmatch("([0-9a-f]{16})?", entry.draw)
        assert len(entry.class_names) in (0, entry.classes)
        assert isinstance(entry.names, str) or len(entry.names) in (0, entry.classes)
        for folder in entry.layouts:
            assert not folder.startswith("/")
            assert ".." not in folder
        if entry.torchvision:
            signature = inspect.signature(getattr(torchvision.datasets, entry.torchvision))
            signature.bind("root", **({"download": True} if entry.archives else {}), **entry.arguments)

    @every_entry
    def test_archives(self, name):
        unchecked = {"fgvc-aircraft-2013b.tar.gz", "imagenetv2-matched-frequency.tar.gz"}  # nobody publishes a checksum
        unchecked |= {"ImageNet-Sketch.zip", "Partitions.zip"}
        for archive in CATALOGUE[name].archives:
            assert archive.gives
            assert all(re.fullmatch(r"https?://[^ ]+", url) for url in archive.urls)
            assert {url.rsplit("/", 1)[1] for url in archive.urls} == {archive.name}
            checksum = archive.sha256 or archive.md5
            assert re.fullmatch("[0-9a-f]{32}|[0-9a-f]{64}", checksum) or archive.name in unchecked
            for path in (archive.into, *archive.inner, *archive.gives):
                assert not path.startswith("/")
                assert ".." not in path

    def test_a_key_that_is_none_is_refused(self):
        table = {"citation": "x", "archives": [{"urls": ["http://x/y"], "gives": ["y"]}]}
        assert entry_of(table).archives[0].name == "y"
        with pytest.raises(TypeError, match="licnce"):
            entry_of(table | {"licnce": "MIT"})
        with pytest.raises(TypeError, match="md6"):
            entry_of(table | {"archives": [{"urls": ["http://x/y"], "gives": ["y"], "md6": "0"}]})

    def test_the_example_of_the_documentation_is_one(self):
        text = (Path(__file__).parents[1] / "docs" / "datasets.md").read_text()
        (example,) = re.findall(r"```toml\n(.*?)```", text, re.DOTALL)
        ((name, table),) = tomllib.loads(example).items()
        assert entry_of(table).archives[0].places(Path("data")) == [Path("data/leaves")]
        assert name not in CATALOGUE
        assert f"{len(CATALOGUE)} of them" in (Path(__file__).parents[1] / "README.md").read_text()

    def test_what_papers_use_is_there(self):
        coop = "imagenet caltech101 oxford_pets stanford_cars oxford_flowers food101 fgvc_aircraft sun397 dtd eurosat"
        assert [*CATALOGUE][1:12] == [*coop.split(), "ucf101"]
        assert [name for name, entry in CATALOGUE.items() if entry.parts] == [
            *("imagenetv2", "imagenet_sketch", "imagenet_a", "imagenet_r")
        ]
        randlora = "stanford_cars dtd eurosat gtsrb mnist resisc45 sun397 svhn cifar10 cifar100 imagenet stl10 food101"
        randlora += " caltech101 caltech256 fgvc_aircraft oxford_flowers oxford_pets cub200 country211 ucf101 voc2007"
        assert len(set(randlora.split()) & CATALOGUE.keys()) == 22

    @pytest.mark.parametrize("name", SHIPPED)
    def test_counts_are_those_of_the_split(self, name):
        split, entry = load_split(name)
        assert entry.classes == len(split.class_names)
        assert [*entry.sizes] == [len(split.train), len(split.val), len(split.test)]

    def test_checksums_are_torchvisions(self):
        texts = "".join(file.read_text() for file in Path(torchvision.datasets.__file__).parent.glob("*.py"))
        others = {"cub200", "resisc45", "imagenet_a", "imagenet_r"}  # which torchvision does not have
        for name, entry in CATALOGUE.items():
            assert all(archive.md5 in texts for archive in entry.archives) or name in others


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_split(name, tmp_path):
    split, _ = load_split(name, root=tmp_path)
    check_distinct(split.class_names, name)
    assert split.name == name
    for rows in (split.train, split.val, split.test):
        assert {row.label for row in rows} == set(range(len(split.class_names)))
    if name in PUBLISHED:
        sizes = (len(split.class_names), len(split.train), len(split.val), len(split.test))
        assert (split.sha256, *sizes) == PUBLISHED[name]


@pytest.mark.parametrize("name", ARRAYS)
def test_torchvision_arguments(name, monkeypatch, tmp_path):
    source = CATALOGUE[name]
    check_distinct(source.class_names, name)
    signature = inspect.signature(getattr(torchvision.datasets, source.torchvision))
    monkeypatch.setattr(torchvision.datasets, source.torchvision, signature.bind)
    train, test = (source.open_array(tmp_path, array, False) for array in ("train", "test"))
    assert train.arguments != test.arguments
    given = train.arguments.get("kwargs", {}) | train.arguments
    assert given.get("download", False) is False
    assert ("download" in given) == bool(source.archives)
    assert source.url.startswith("http")


@pytest.mark.parametrize("name", ARRAYS)
def test_missing_arrays_say_where_they_come_from(name, tmp_path):
    with pytest.raises(UserError) as error:
        load_split(name, root=tmp_path)
    message = str(error.value)
    for part in (str(tmp_path), CATALOGUE[name].url):
        assert part in message
    assert ("--data.download true" in message) == bool(CATALOGUE[name].archives)
    assert "\n" not in message


@pytest.mark.parametrize("name", PUBLISHED)
def test_missing_images_say_where_they_were_looked_for(name, tmp_path):
    split, entry = load_split(name, tmp_path)
    with pytest.raises(UserError) as error:
        entry.images(tmp_path, "train", split.train)
    message = str(error.value)
    for part in (str(tmp_path / entry.folder), split.train[0].path, entry.url, *entry.aliases):
        assert part in message
    assert ("--data.download true" in message) == bool(entry.torchvision)
    assert "\n" not in message


@pytest.mark.parametrize("name", PUBLISHED)
def test_images_are_found_in_every_known_layout(name, tmp_path):
    split, entry = load_split(name, tmp_path)
    for i, folder in enumerate([f"{entry.folder}/{entry.image_root}", *entry.aliases]):
        root = tmp_path / str(i)
        (root / entry.folder / entry.image_root).mkdir(parents=True)  # an empty one must not win
        save_image(root / folder / split.test[0].path, size=(9, 5))
        assert entry.images(root, "test", split.test).open(split.test[0].path).size == (9, 5)


def test_digits_json_is_made_from_scikit_learn():
    from sklearn.datasets import load_digits

    names = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
    rows = [Row(str(i), int(label), names[label]) for i, label in enumerate(load_digits().target)]
    parts = stratify(rows, (20, 30))
    content = split_bytes({part: parts[part] for part in PARTS}, "index")
    assert (packaged_folder("data_splits") / "digits.json").read_bytes() == content


def test_digits_images():
    split, entry = load_split("digits")
    assert split.class_names[3] == "three"
    assert [len(split.train), len(split.val), len(split.test)] == [903, 355, 539]
    images = entry.images("data", "train", split.train)
    from sklearn.datasets import load_digits

    digits = load_digits()
    for row in split.test[:20]:
        assert digits.target[int(row.path)] == row.label
        pixels = np.asarray(images.open(row.path))
        assert pixels.shape == (8, 8, 3)
        assert np.abs(pixels[..., 1] / 255 - digits.images[int(row.path)] / 16).max() < 0.5 / 255 + 1e-9


def test_digits_are_read_once_and_cannot_be_changed(monkeypatch):
    read, loadtxt = [], np.loadtxt
    monkeypatch.setattr(np, "loadtxt", lambda *given, **how: read.append(given) or loadtxt(*given, **how))
    entries._digits.cache_clear()
    sources = [CATALOGUE["digits"].images("data", part, []) for part in PARTS]
    for source in sources:
        source.close()
        source.open("0")
    assert len(read) == 1
    with pytest.raises(ValueError, match="read-only"):
        sources[0].items[0][:] = 0


def write_idx(path, values):
    values = np.asarray(values, dtype=np.uint8)
    header = struct.pack(f">I{values.ndim}I", 0x800 + values.ndim, *values.shape)
    path.write_bytes(header + values.tobytes())


@pytest.mark.parametrize(
    ("name", "folder", "third"), [("mnist", "MNIST", "2"), ("fashion_mnist", "FashionMNIST", "Pullover")]
)
def test_mnist_files(name, folder, third, tmp_path):
    raw = tmp_path / folder / "raw"
    raw.mkdir(parents=True)
    labels = {"train": np.arange(100) % 10, "t10k": np.arange(20) % 10}
    for part, values in labels.items():
        images = np.full((len(values), 28, 28), 0) + np.arange(len(values))[:, None, None]
        write_idx(raw / f"{part}-images-idx3-ubyte", images)
        write_idx(raw / f"{part}-labels-idx1-ubyte", values)
    split, entry = load_split(name, tmp_path)
    assert split.class_names[2] == third
    assert [len(split.train), len(split.val), len(split.test)] == [80, 20, 20]
    assert all(int(row.path) % 10 == row.label for rows in (split.train, split.val, split.test) for row in rows)
    content = np.concatenate([labels["train"], labels["t10k"]]).astype("<i8").tobytes()
    assert split.sha256 == hashlib.sha256(content).hexdigest()
    assert split.file == f"torchvision.datasets.{folder}"
    for part, row in (("val", split.val[3]), ("test", split.test[3])):
        image = entry.images(tmp_path, part, [row]).open(row.path)
        assert (image.mode, image.size, image.getpixel((5, 5))[0]) == ("RGB", (28, 28), int(row.path))


def test_gtsrb_files(tmp_path):
    base = tmp_path / "gtsrb"
    for label in range(43):
        for i in range(5):
            save_image(base / "GTSRB" / "Training" / f"{label:05}" / f"{i}.ppm", seed=label)
    lines = ["Filename;Width;Height;Roi.X1;Roi.Y1;Roi.X2;Roi.Y2;ClassId"]
    for i, label in enumerate((14, 2)):
        save_image(base / "GTSRB" / "Final_Test" / "Images" / f"{i}.ppm")
        lines.append(f"{i}.ppm;20;14;0;0;20;14;{label}")
    (base / "GT-final_test.csv").write_text("\n".join(lines) + "\n")
    split, entry = load_split("gtsrb", tmp_path)
    assert [len(split.train), len(split.val), len(split.test)] == [43 * 4, 43, 2]
    assert [row.class_name for row in split.test] == ["stop", "speed limit 50 km/h"]
    assert entry.images(tmp_path, "test", split.test).open("1").size == (20, 14)


def test_download_is_torchvisions(tmp_path, monkeypatch):
    split, entry = load_split("dtd", tmp_path)
    (tmp_path / "dtd" / "images").mkdir(parents=True)  # an empty folder is no reason not to download

    def fake(root, download):
        assert download
        save_image(root / "dtd" / "dtd" / "images" / split.train[0].path, size=(7, 5))

    monkeypatch.setattr(torchvision.datasets, "DTD", fake)
    assert entry.images(tmp_path, "train", split.train, download=True).open(split.train[0].path).size == (7, 5)


def test_failed_download(tmp_path, monkeypatch):
    def offline(*_, **__):
        raise OSError("no\nnetwork")

    monkeypatch.setattr(torchvision.datasets, "CIFAR10", offline)
    with pytest.raises(UserError, match=r"CIFAR10 could not be downloaded .*: no network"):
        load_split("cifar10", tmp_path, download=True)


class TestLoadSplit:
    def test_unknown_name(self, tmp_path):
        with pytest.raises(
            UserError, match=r"unknown data set 'digit', or a folder, CSV or split file .*'digits'"
        ) as error:
            load_split("digit", tmp_path)
        assert "ucf101" in str(error.value)

    def test_empty_name(self, tmp_path):
        with pytest.raises(UserError, match="unknown data set ''"):
            load_split("", tmp_path)

    @pytest.mark.parametrize("below_root", [True, False])
    def test_folder(self, tmp_path, below_root):
        image_folder(tmp_path / "pets", {"cat": 4, "dog": 4})
        split, entry = load_split("pets" if below_root else str(tmp_path / "pets"), tmp_path)
        assert split.name == "pets"
        assert entry.images("elsewhere", "test", split.test).open(split.test[0].path).size == (20, 14)

    def test_a_catalogue_name_wins_over_a_folder(self, tmp_path, monkeypatch):
        image_folder(tmp_path / "digits", {"cat": 4, "dog": 4})
        monkeypatch.chdir(tmp_path)
        assert len(load_split("digits")[0].class_names) == 10
        assert len(load_split("./digits")[0].class_names) == 2

    @pytest.mark.parametrize("images", ["beside", "root"])
    @pytest.mark.parametrize("kind", ["csv", "json"])
    def test_files_name_images_beside_them_or_below_the_root(self, tmp_path, kind, images):
        lists, root = tmp_path / "lists", tmp_path / "root"
        lists.mkdir()
        save_image((lists if images == "beside" else root) / "x" / "1.png", size=(8, 4))
        if kind == "csv":
            path = lists / "s.csv"
            path.write_text("path,label,split\nx/1.png,a,train\nx/2.png,a,test\n")
        else:
            path = split_file(lists / "s.json", train=[["x/1.png", 0, "a"]], test=[["x/2.png", 0, "a"]])
        split, entry = load_split(str(path), root)
        assert entry.images(root, "train", split.train).open("x/1.png").size == (8, 4)

    def test_other_files(self, tmp_path):
        path = save_image(tmp_path / "x.png")
        with pytest.raises(UserError, match=r"a data set is a catalogue name, a folder, or a .csv"):
            load_split(str(path))

    def test_indices_are_for_the_catalogue(self, tmp_path):
        path = split_file(tmp_path / "s.json", train=[[0, 0, "a"]])
        with pytest.raises(UserError, match="only catalogue data sets may"):
            load_split(str(path))

    def test_names_that_read_the_same_are_no_error_when_others_are_given(self, tmp_path):
        image_folder(tmp_path / "x", {"sea_lake": 3, "sea lake": 3})
        with pytest.raises(UserError, match="read the same"):
            load_split(str(tmp_path / "x"))
        assert load_split(str(tmp_path / "x"), class_names=["a", "b"])


def test_a_folder_without_the_sample_still_names_the_image(tmp_path):
    (tmp_path / "x").mkdir()
    entry = DatasetEntry(folder="x")
    row = rows_of({0: 1})[0]
    images = entry.images(tmp_path, "train", [row])
    with pytest.raises(UserError, match=r"no such image: .*0.png"):
        images.open(row.path)


def test_grey_levels_cover_the_range():
    image = entries._grey_levels_16(np.array([[0.0, 8.0, 16.0]]))
    assert isinstance(image, Image.Image)
    assert list(np.asarray(image)[0]) == [0, 128, 255]
