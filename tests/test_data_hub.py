"""Data sets of the Hugging Face hub, with a stand-in for its library, which is not installed for the tests."""

import io
import logging
import pickle
import sys
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image as Pillow

from kshot.data import FewShotDataModule, protocols
from kshot.data.catalogue import load_split
from kshot.errors import UserError


class Image:
    def __init__(self, decode=True):
        self.decode = decode


class ClassLabel:
    def __init__(self, names):
        self.names = names


class Value:
    pass


class Dataset:
    def __init__(self, features, columns):
        self.features, self.columns = features, columns

    def cast_column(self, column, feature):
        return Dataset(self.features | {column: feature}, self.columns)

    def __getitem__(self, key):
        if isinstance(key, str):
            return self.columns[key]
        (image,) = [column for column, kind in self.features.items() if isinstance(kind, Image)]
        assert self.features[image].decode is False, "the library may not decode"
        return {column: values[key] for column, values in self.columns.items()}


def part(count, labels=None, first=0, **features):
    images = []
    for i in range(count):
        pixels = np.random.default_rng(first + i).integers(0, 256, (14, 20, 3), dtype=np.uint8)
        stored = io.BytesIO()
        Pillow.fromarray(pixels).save(stored, "PNG")
        images.append({"bytes": stored.getvalue(), "path": None})
    columns = {"img": images, "label": labels or [i % 2 for i in range(count)]}
    return Dataset({"img": Image(), "label": ClassLabel(["cat", "sea_lion"])} | features, columns)


SETS = {
    "me/pets": {"train": part(10), "validation": part(4, first=50), "test": part(6, first=90)},
    "me/no-test": {"train": part(10), "valid": part(4, first=50), "unsupervised": part(3)},
    "me/hidden": {"train": part(10), "test": part(4, labels=[-1] * 4)},
    "me/twice": {"train": part(4), "training": part(4)},
    "me/only-test": {"test": part(4)},
    "me/words": {"train": part(4, labels=["b", "a", "b", "a"], label=Value())},
    "me/two-images": {"train": part(4, other=Image())},
    "me/no-label": {"train": Dataset({"img": Image()}, {})},
    "me/fine": {"train": part(4, kind=ClassLabel(["x"]))},
}


@pytest.fixture(autouse=True)
def asked(monkeypatch):
    module = ModuleType("datasets")
    asked = []

    def load_dataset(path, name, download_config):
        asked.append((path, name, download_config.local_files_only))
        if path not in SETS:
            raise ConnectionError(f"Couldn't reach {path}\nTraceback ...")
        return SETS[path]

    module.load_dataset, module.Image = load_dataset, Image
    module.DownloadConfig = lambda local_files_only: SimpleNamespace(local_files_only=local_files_only)
    module.load_from_disk = lambda path: SETS["me/pets"]
    monkeypatch.setitem(sys.modules, "datasets", module)
    return asked


def opened(name, **settings):
    return FewShotDataModule(f"hf:{name}", **{"shots": 2, "image_size": 8} | settings)


def test_parts_names_and_images(asked):
    data = opened("me/pets")
    assert data.class_names == ["cat", "sea lion"]
    assert data.dataset_name == "me-pets"
    assert data.split_info()["counts"] == {"train": 4, "val": 4, "test": 6}
    data.setup("fit")
    data.check_test_files()
    data.setup("test")
    assert asked
    assert all(local for _, _, local in asked)
    batch = next(iter(data.test_dataloader()))
    assert (batch.image.shape, batch.label.tolist()) == ((6, 3, 8, 8), [0, 1, 0, 1, 0, 1])
    source = pickle.loads(pickle.dumps(data.part("test").source))
    assert torch.equal(
        torch.tensor(np.asarray(source.open("test/5"))),
        torch.tensor(np.asarray(data.part("test").source.open("test/5"))),
    )
    assert len(set(data.image_digests.values())) == 8
    with pytest.raises(UserError, match=r"cannot read the image 'hf:me/pets/test/6': list index out of range"):
        source.open("test/6")


def test_download_and_configurations(asked):
    opened("me/pets:fine", download=True)
    assert asked[0] == ("me/pets", "fine", False)


def test_validation_takes_the_place_of_a_test_part(caplog):
    caplog.set_level("INFO", "kshot")
    data = opened("me/no-test")
    assert data.split_info()["counts"] == {"train": 4, "val": 0, "test": 4}
    data.setup("test")
    assert data.part("test").paths == [f"valid/{i}" for i in range(4)]
    assert "'unsupervised' goes unused" in caplog.text


def test_a_part_without_labels_is_left_out():
    assert opened("me/hidden").split_info()["counts"] == {"train": 4, "val": 2, "test": 4}
    assert opened("me/hidden", shots=None, test_share=None).split_info()["counts"]["train"] == 10


def test_labels_may_be_words():
    assert load_split("hf:me/words")[0].class_names == ("a", "b")


def test_the_usual_label_is_taken():
    assert load_split("hf:me/fine")[0].class_names == ("cat", "sea_lion")


def test_what_save_to_disk_wrote(tmp_path, asked):
    (tmp_path / "dataset_dict.json").touch()
    assert opened(tmp_path).class_names == ["cat", "sea lion"]
    assert asked == []


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("me/twice", "'train' and 'training' are both for train"),
        ("me/only-test", "has no labelled training part, only 'test'"),
        ("me/two-images", "needs one column of images and one of labels"),
        ("me/no-label", "needs one column of images and one of labels"),
        ("me/none", r"hf:me/none: cannot be opened \(Couldn't reach me/none\); fetch what is missing with --data.down"),
    ],
)
def test_refusals(name, message):
    with pytest.raises(UserError, match=message) as error:
        opened(name)
    assert "\n" not in str(error.value)


def test_a_share_is_for_data_sets_without_parts():
    with pytest.raises(UserError, match="parts of its own"):
        opened("me/pets", test_share=0.5)


def test_without_the_library(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match=r"hf:me/pets is read by the library datasets: pip install 'kshot\[hf\]'"):
        opened("me/pets")


def test_copies_in_a_data_set_of_the_hub(caplog, monkeypatch):
    train, test = part(6), part(6, first=90)
    test.columns["img"][4] = train.columns["img"][1]
    monkeypatch.setitem(SETS, "me/copied", {"train": train, "test": test})
    with caplog.at_level(logging.INFO, "kshot"):
        FewShotDataModule("hf:me/copied", shots=3, image_size=8).check_test_files()
    assert "1 of 6 test images have the same bytes" in caplog.text
    assert "hf:me/copied/test/4 is hf:me/copied/train/1" in caplog.text
    caplog.clear()
    monkeypatch.setattr(protocols, "MOST_READ", 4)
    with caplog.at_level(logging.INFO, "kshot"):
        FewShotDataModule("hf:me/copied", shots=3, image_size=8).check_test_files()
    assert "of 6 test images only 4 are compared with those that were drawn" in caplog.text
    assert "same bytes" not in caplog.text


def test_deep_images_get_the_white_of_the_training_images(monkeypatch):
    train = part(6)
    for i, image in enumerate(train.columns["img"]):
        stored = io.BytesIO()
        Pillow.fromarray(np.full((14, 20), 4000 - i, np.uint16)).save(stored, "PNG")
        image["bytes"] = stored.getvalue()
    monkeypatch.setitem(SETS, "me/scans", {"train": train, "test": part(4)})
    data = opened("me/scans")
    data.setup("fit")
    assert data.part("train").decoding.white == 4095
