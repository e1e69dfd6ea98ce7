"""Folders as they are: every layout is read right, or refused in one line that says what was found."""

import json
import logging
import os
import tempfile
import time
import unicodedata
from pathlib import Path

import pytest
from command_line import refused
from data_fixtures import image_folder, save_image, split_file
from hypothesis import given, settings
from hypothesis import strategies as st
from messy import CAFE, litter, messy

from kshot.data import FewShotDataModule
from kshot.data.catalogue import load_split
from kshot.data.layouts import laid_out, part_of
from kshot.data.listing import list_folder
from kshot.data.readers import image_files
from kshot.errors import UserError


def opened(folder, **settings):
    return FewShotDataModule(str(folder), **{"shots": None, "image_size": 16} | settings)


def counts(folder, **settings):
    return opened(folder, **settings).split_info()["counts"]


@pytest.fixture
def said(caplog):
    caplog.set_level(logging.INFO, "kshot")
    return caplog


class TestMessy:
    def test_is_read_right(self, tmp_path, said):
        made = messy(tmp_path)
        data = opened(made.root)
        assert data.class_names == made.said
        info = data.split_info()
        assert info["counts"] == made.counts
        assert info["left_out"] == made.left_out
        json.dumps(info)
        data.setup("fit")
        data.check_test_files()
        data.setup("test")
        assert len(data.part("train")) == made.counts["train"]
        assert data.test_sizes() == {"test": made.counts["test"]}
        first, second = made.copy
        for part in (
            "the class folders lie deeper, in ",
            "left out of ",
            "2 .txt, 1 .heic, 1 .md",
            "no test images of the class '004.rare'",
            "001.Caf\u00e9_noir -> Caf\u00e9 noir",
            f"1 images have no class and go unused: in '{made.root}/photos'",
            "1 of 13 test images have the same bytes as one that was drawn",
            first,
            second,
        ):
            assert part in said.text
        assert len(said.messages) == len(set(said.messages)), "once each"

    def test_is_the_same_on_every_listing(self, tmp_path, monkeypatch):
        made = messy(tmp_path)
        first = load_split(str(made.root))[0]
        true = os.scandir

        class Backwards:
            def __init__(self, path):
                with true(path) as entries:
                    self.entries = sorted(entries, key=lambda entry: entry.name, reverse=True)

            def __enter__(self):
                return iter(self.entries)

            def __exit__(self, *_):
                pass

        monkeypatch.setattr(os, "scandir", Backwards)
        assert load_split(str(made.root))[0] == first

    def test_a_read_only_folder(self, tmp_path):
        made = messy(tmp_path)
        before = sorted(map(str, tmp_path.rglob("*")))
        folders = [tmp_path, *(each for each in tmp_path.rglob("*") if each.is_dir() and not each.is_symlink())]
        for folder in folders:
            folder.chmod(0o555)
        try:
            data = opened(made.root)
            data.setup("fit")
            data.check_test_files()
            assert sorted(map(str, tmp_path.rglob("*"))) == before
        finally:
            for folder in folders:
                folder.chmod(0o755)


@pytest.mark.parametrize(
    ("name", "part"),
    [
        *(
            (name, "train")
            for name in ("train", "Train", "TRAIN", "training", "trn", "01_train", "train2017", "Train-set")
        ),
        *((name, "val") for name in ("val", "valid", "Validation", "dev", "val_2")),
        *((name, "test") for name in ("test", "Testing", "TST", "eval", "3. Test", "test images", "testset")),
        *(
            (name, None)
            for name in ("cat", "tests", "bullet train", "", "2017", "validate me", "set", "device", "тест")
        ),
    ],
)
def test_spellings_of_parts(name, part):
    assert part_of(name) == part


class TestParts:
    @pytest.mark.parametrize(
        ("train", "val", "test"),
        [
            ("Train", "Val", "Test"),
            ("training", "validation", "testing"),
            ("TRAIN", "dev", "eval"),
            ("1 trn", "2 valid", "3 tst"),
        ],
    )
    @pytest.mark.parametrize("form", ["{part}/{name}", "{name}/{part}", "x/{part}/{name}", "{part}/{part}/{name}"])
    def test_any_spelling_in_any_place(self, tmp_path, train, val, test, form):
        for part, count in ((train, 3), (val, 2), (test, 4)):
            image_folder(tmp_path, {form.format(part=part, name=name): count for name in ("cat", "dog")})
        data = opened(tmp_path)
        assert data.class_names == ["cat", "dog"]
        assert data.split_info()["counts"] == {"train": 6, "val": 4, "test": 8}

    def test_validation_takes_the_place_of_a_test_part(self, tmp_path, said):
        image_folder(tmp_path, {f"{part}/{name}": 4 for part in ("train", "val") for name in "ab"})
        assert counts(tmp_path) == {"train": 8, "val": 0, "test": 8}
        assert "no test part, so the validation images are for testing" in said.text

    def test_training_alone_is_split(self, tmp_path, said):
        image_folder(tmp_path, {f"train/{name}": 10 for name in "ab"})
        assert counts(tmp_path) == {"train": 10, "val": 4, "test": 6}
        assert "its images were split" in said.text

    @pytest.mark.parametrize("form", ["{part}/{name}", "{name}/{part}"])
    def test_two_folders_of_one_part(self, tmp_path, form):
        image_folder(tmp_path, {form.format(part=p, name=n): 2 for p in ("train", "training", "test") for n in "ab"})
        with pytest.raises(UserError, match="'train' and 'training' are both for train: keep one"):
            opened(tmp_path)

    def test_a_class_without_its_parts(self, tmp_path):
        image_folder(tmp_path, {"cat/train": 2, "cat/test": 2, "dog": 2})
        with pytest.raises(UserError, match="'cat' has parts in it, but 'dog' no 'train'"):
            opened(tmp_path)

    def test_composed_and_decomposed_names_are_one_class(self, tmp_path):
        decomposed = unicodedata.normalize("NFD", CAFE)
        image_folder(tmp_path, {f"train/{CAFE}": 2, "train/tea": 2, f"test/{decomposed}": 2, "test/tea": 2})
        assert counts(tmp_path) == {"train": 4, "val": 0, "test": 4}
        image_folder(tmp_path, {f"train/{decomposed}": 2})
        with pytest.raises(UserError, match=r"read the same|no training images"):
            opened(tmp_path)


class TestLevels:
    @pytest.mark.parametrize("around", ["photos", "my-archive-1.2/data", "a/b/c"])
    def test_folders_around_the_classes_are_entered(self, tmp_path, said, around):
        image_folder(tmp_path / around, {"cat": 10, "dog": 10})
        data = opened(tmp_path)
        assert data.class_names == ["cat", "dog"]
        assert f"the class folders lie deeper, in {tmp_path}/{around}" in said.text

    def test_one_class_names_the_folder_that_is_meant(self, tmp_path):
        image_folder(tmp_path / "pets", {"cat": 4, "dog": 4})
        image_folder(tmp_path / "pets" / "cat", {"more": 3})
        with pytest.raises(UserError, match=r"one class, 'more', .*; did you mean .*/pets, with 'cat', 'dog'\?"):
            opened(tmp_path / "pets" / "cat")
        with pytest.raises(UserError, match="no class folders in it") as error:
            opened(tmp_path / "pets" / "dog")
        assert "did you mean" in str(error.value)

    def test_one_class_and_nothing_else(self, tmp_path):
        (tmp_path / "x").mkdir()
        with pytest.raises(
            UserError, match="one class, 'cat', and so nothing to tell apart; give one folder per class"
        ):
            opened(image_folder(tmp_path / "x", {"cat": 4}))


class TestFiles:
    def test_what_tools_made_is_passed_over(self, tmp_path):
        image_folder(tmp_path, {"cat": 3, "dog": 3})
        before = load_split(str(tmp_path))[0]
        for folder in (tmp_path / "cat", tmp_path / "dog"):
            litter(folder)
        (tmp_path / "$RECYCLE.BIN").mkdir()
        (tmp_path / ".git").mkdir()
        split = load_split(str(tmp_path))[0]
        assert split == before
        assert split.left_out == {}

    def test_what_pillow_reads_counts(self, tmp_path, said):
        image_folder(tmp_path, {"cat": 3, "dog": 3})
        for name in ("a.jfif", "b", "c.PNG", "d.JpEg", "e.jpg_large", "f.webp"):
            save_image(tmp_path / "x.png").rename(tmp_path / "cat" / name)
        (tmp_path / "cat" / "film.mov").write_bytes(b"\0" * 50)
        (tmp_path / "cat" / "BM.txt").write_text("BM but no bitmap")
        (tmp_path / "cat" / "LICENSE").write_text("P5 but no picture")
        data = opened(tmp_path)
        assert sum(data.split_info()["counts"].values()) == 12
        assert data.split_info()["left_out"] == {".mov": 1, ".txt": 1, "without suffix": 1}
        assert f"left out of {tmp_path}/: 1 .mov, 1 .txt, 1 without suffix" in said.messages

    def test_prediction_says_it_too(self, tmp_path, said):
        image_folder(tmp_path, {"cat": 2})
        (tmp_path / "cat" / "notes.txt").write_text("")
        assert len(image_files([str(tmp_path)])) == 2
        assert said.messages == [f"left out of {tmp_path}/: 1 .txt"]

    def test_links(self, tmp_path):
        image_folder(tmp_path / "store", {"a": 4, "b": 4})
        (tmp_path / "set").mkdir()
        (tmp_path / "set" / "a").symlink_to(tmp_path / "store" / "a")
        (tmp_path / "set" / "b").symlink_to("../store/b")
        assert sum(counts(tmp_path / "set").values()) == 8
        (tmp_path / "store" / "a" / "b").symlink_to("../b")
        (tmp_path / "store" / "b" / "a").symlink_to("../a")  # round in a circle
        assert sum(counts(tmp_path / "set").values()) == 8 + 8
        (tmp_path / "link").symlink_to("set")
        assert opened(tmp_path / "link").dataset_name == "set"

    def test_a_folder_is_listed_once(self, tmp_path, monkeypatch):
        made = messy(tmp_path)
        for folder, _, _ in os.walk(tmp_path):
            os.utime(folder, (1e9, 1e9))
        times = []
        true = os.scandir
        monkeypatch.setattr(os, "scandir", lambda path: times.append(str(path)) or true(path))
        data = opened(made.root)
        data.check_test_files()
        data.setup("test")
        assert len(times) == len(set(times))

    @pytest.mark.parametrize("old", [True, False])
    def test_a_changed_folder_is_noticed(self, tmp_path, old):
        image_folder(tmp_path, {"train/a": 2, "train/b": 2, "test/a": 2, "test/b": 2})
        if old:
            for folder, _, _ in os.walk(tmp_path):
                os.utime(folder, (1e9, 1e9))
        data = opened(tmp_path)
        save_image(tmp_path / "test" / "a" / "new.png")
        with pytest.raises(UserError, match="has changed since"):
            data.setup("test")

    def test_a_listing_of_another_folder_is_not_taken(self, tmp_path):
        first, second = (image_folder(tmp_path / name, {"a": 4, "b": 4}) for name in "xy")
        assert not list_folder(first).holds(second)

    def test_many_files(self, tmp_path):
        """A listing asks the system per folder, not per file."""
        image_folder(tmp_path, {"a": 2, "b": 2})
        for i in range(300):
            (tmp_path / "a" / f"{i}.jpg").touch()
        asked = []
        true = os.stat

        def counting(*given, **settings):
            asked.append(given)
            return true(*given, **settings)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(os, "stat", counting)
            assert len(list_folder(tmp_path).images) == 304
        assert len(asked) < 20


class TestShare:
    def test_the_split_says_what_it_did(self, tmp_path, said):
        image_folder(tmp_path, {"cat": 16, "dog": 20})
        assert counts(tmp_path) == {"train": 18, "val": 7, "test": 11}
        assert "50 % for training, 20 % for validation, 30 % for testing" in said.text
        assert "of the 16 images of 'cat' 8 are left for training" in said.text

    def test_all_images_for_training(self, tmp_path, said):
        image_folder(tmp_path, {"cat": 16, "dog": 16})
        data = opened(tmp_path, shots=16, test_share=None)
        assert data.split_info()["counts"] == {"train": 32, "val": 0, "test": 0}
        assert "all 32 images are for training, and none for testing" in said.text
        with pytest.raises(UserError, match=r"no test images, as data.test_share is null: all are for training"):
            data.check_test_files()

    def test_another_share(self, tmp_path):
        image_folder(tmp_path, {"cat": 20, "dog": 20})
        assert counts(tmp_path, test_share=0.1) == {"train": 28, "val": 8, "test": 4}

    @pytest.mark.parametrize("share", [0, 1, -0.1, 0.705, 0.333, 30])
    def test_no_share(self, tmp_path, share):
        image_folder(tmp_path, {"cat": 20, "dog": 20})
        with pytest.raises(UserError, match=r"test_share must be from 0.01 to 0.7"):
            opened(tmp_path, test_share=share)

    def test_only_where_there_are_no_parts(self, tmp_path):
        image_folder(tmp_path, {f"{part}/{name}": 4 for part in ("train", "test") for name in "ab"})
        table = tmp_path / "s.csv"
        table.write_text("path,label,split\n1.png,a,train\n")
        for dataset in (
            str(tmp_path),
            str(table),
            "digits",
            str(split_file(tmp_path / "s.json", train=[["a.png", 0, "a"]])),
        ):
            with pytest.raises(UserError, match=r"parts of its own, which data.test_share cannot change"):
                FewShotDataModule(dataset, shots=1, test_share=None)


class TestCatalogueNames:
    def test_a_folder_called_like_a_data_set(self, tmp_path, monkeypatch):
        image_folder(tmp_path / "eurosat", {"field": 4, "river": 4})
        monkeypatch.chdir(tmp_path)
        with pytest.raises(UserError, match=r"; your own folder is meant by --data.dataset ./eurosat$"):
            opened("eurosat").setup("fit")
        assert opened("./eurosat").class_names == ["field", "river"]
        image_folder(tmp_path / "data" / "cifar10", {"field": 4, "river": 4})
        with pytest.raises(UserError, match=r"your own folder is meant by --data.dataset data/cifar10$"):
            opened("cifar10")

    def test_a_split_file_of_coop_beside_the_images(self, tmp_path):
        image_folder(tmp_path / "pets" / "images", {"cat": 3, "dog": 3})
        (tmp_path / "pets" / "annotations").mkdir()
        rows = [[f"{name}/{i:02}.png", label, name] for label, name in enumerate(("cat", "dog")) for i in range(3)]
        file = split_file(tmp_path / "pets" / "split_zhou_Pets.json", train=rows[::3], test=rows[1::3])
        for dataset in (file, tmp_path / "pets"):
            data = opened(dataset)
            data.setup("fit")
            data.setup("test")
            assert data.split_info()["counts"] == {"train": 2, "val": 0, "test": 2}

    def test_two_split_files(self, tmp_path):
        image_folder(tmp_path / "images", {"cat": 3, "dog": 3})
        for name in "ab":
            split_file(tmp_path / f"split_zhou_{name}.json", train=[["cat/00.png", 0, "cat"]])
        with pytest.raises(UserError, match=r"split_zhou_a.json', 'split_zhou_b.json'.*give one of them"):
            opened(tmp_path)


letters = st.text("aZ09é_- .", min_size=1, max_size=6).filter(
    lambda name: name.strip(". ") and not name.startswith((".", "~"))
)


class TestProperties:
    @given(
        st.dictionaries(letters, st.sets(letters, min_size=2, max_size=5), min_size=2, max_size=4),
        st.randoms(use_true_random=False),
    )
    def test_order_does_not_matter_and_nothing_is_lost(self, classes, random):
        images = [f"{name}/{image}" for name, those in classes.items() for image in those]
        folders = list(classes)
        first = laid_out(images, folders, "x")
        random.shuffle(images)
        random.shuffle(folders)
        assert laid_out(images, folders, "x") == first
        assert {name: list(those) for name, those in first.parts["train"].items()} == {
            name: sorted(f"{name}/{image}" for image in those) for name, those in sorted(classes.items())
        }

    @given(st.dictionaries(letters, st.sets(letters, min_size=2, max_size=4), min_size=2, max_size=4))
    def test_parts_are_disjoint_and_complete(self, classes):
        parts = {"Train": 0, "dev": 1, "01-testing": 2}
        images = [f"{part}/{name}/{image}" for part in parts for name, those in classes.items() for image in those]
        folders = [*parts, *(f"{part}/{name}" for part in parts for name in classes)]
        found = laid_out(images, folders, "x").parts
        every = [image for named in found.values() for those in named.values() for image in those]
        assert sorted(every) == sorted(images)
        assert all(list(named) == sorted(classes) for named in found.values())


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 5)), max_size=6))
@settings(max_examples=30)
def test_links_in_any_direction_come_to_an_end(links):
    with tempfile.TemporaryDirectory() as name:
        root = Path(name, "root")
        folders = [root / each for each in ("a", "b", "a/c", "b/d", "b/d/e")]
        for number, folder in enumerate(folders):
            save_image(folder / "x.png", seed=number)
        for number, (place, target) in enumerate(links):
            (folders[place] / f"link {number}").symlink_to([*folders, root][target])
        files = list_folder(root)
        assert files.images == list_folder(root).images
        assert {f"{each.relative_to(root)}/x.png" for each in folders} <= set(files.images)
        assert len(set(files.images)) == len(files.images) < 1000
        assert all((root / image).is_file() for image in files.images)


@pytest.mark.parametrize("text", ["1" * 100_000 + "?", "a" + "1" * 100_000 + "b", "_" * 100_000])
def test_long_values_take_little_time(tmp_path, text):
    (tmp_path / "x.csv").write_text(f"path,label,split\n1.png,1{text},train\n2.png,2{text},{text}\n")
    started = time.process_time()
    with pytest.raises(UserError, match="is none; split is"):
        load_split(str(tmp_path / "x.csv"))
    (tmp_path / "x.csv").write_text(f"path,label,split\n1.png,1{text},train\n2.png,2{text},test\n")
    with pytest.raises(UserError, match="is no class name"):
        load_split(str(tmp_path / "x.csv"))
    assert time.process_time() - started < 30  # or minutes


def test_the_command_line_takes_a_messy_folder(tmp_path, monkeypatch, caplog):
    from kshot.cli import main

    made = messy(tmp_path)
    monkeypatch.chdir(tmp_path)
    command = [
        "fit",
        "--config",
        "clip_16shot.yaml",
        "--config",
        "methods/zero_shot.yaml",
        "--data.dataset",
        str(made.root),
    ]
    main([*command, "--data.shots", "2", "--trainer.enable_progress_bar", "false"])
    assert "left out of" in caplog.text
    (directory,) = (tmp_path / "runs").glob("*/001")
    result = json.loads((directory / "result.json").read_text())
    assert result["split"]["left_out"] == made.left_out
    assert result["tested"] == {"test": made.counts["test"]}
    lines = (directory / "per_class.csv").read_text().splitlines()
    assert lines[4] == "test,3,rare,"
    assert result["acc_class_mean"] == pytest.approx(
        sum(float(line.split(",")[3]) for line in lines[1:4]) / 3, abs=1e-5
    )


def test_the_command_line_trains_on_all_images(tmp_path, monkeypatch, capsys):
    from kshot.cli import main

    image_folder(tmp_path / "set", {"cat": 4, "dog": 4})
    monkeypatch.chdir(tmp_path)
    command = ["fit", "--config", "clip_16shot.yaml", "--config", "methods/class_mean.yaml", "--data.dataset", "set"]
    command += ["--data.shots", "4", "--data.test_share", "null", "--trainer.enable_progress_bar", "false"]
    main(command)
    (directory,) = (tmp_path / "runs").glob("*/*")
    assert (directory / "tuned.safetensors").is_file()
    assert not (directory / "per_class.csv").exists()
    assert json.loads((directory / "split.json").read_text())["counts"] == {"train": 8, "val": 0, "test": 0}
    result = json.loads((directory / "result.json").read_text())
    assert (result["acc"], result["test_sets"], result["per_class"]) == (None, {}, None)
    said = capsys.readouterr()
    (note,) = result["notes"]
    assert note in said.err
    assert "The same run with --data.test_share 0.3 estimates the accuracy." in note
    assert "not tested: all images are for training" in said.out
    main([*command, "--run.test", "false"])
    assert "estimates the accuracy" not in capsys.readouterr().err
    assert sorted(each.name for each in (tmp_path / "runs").glob("*/*")) == ["001", "002"]
    test = ["test", "--config", str(directory / "config.yaml"), "--ckpt_path", str(directory / "tuned.safetensors")]
    assert "no test images, as data.test_share is null" in refused(capsys, test)
    assert "In full: --data.test_share." in refused(capsys, [*command[:3], "--data.test", "null"])
