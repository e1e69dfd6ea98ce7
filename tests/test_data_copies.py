"""Test images that have the bytes of a drawn one: in folders, archives, and data sets of the hub."""

import logging
import os
import shutil

import pytest
from data_fixtures import parted_folder, save_image
from test_data_archives import PACKERS

from kshot.data import FewShotDataModule, copies
from kshot.data.archives import ArchiveImages, list_archive
from kshot.data.copies import same_bytes
from kshot.data.images import ArrayImages, FileImages


def sources(folder, tmp_path) -> dict:
    """The same files as a folder, and in archives."""
    packed = [pack(folder, tmp_path / name) for name, pack in PACKERS.items()]
    return {"folder": FileImages(folder)} | {f.name: ArchiveImages(f, list_archive(f).members) for f in packed}


def apart(root, first: int = 0):
    """A folder with parts and no copies."""
    for number in range(12):
        part, name = ("train", "test")[number // 6], "ab"[number % 2]
        save_image(root / part / name / f"{number}.png", seed=first + number)
    return root


class TestSameBytes:
    NAMES = ("folder", *PACKERS)

    @pytest.fixture
    def places(self, tmp_path):
        same = bytes(3000)
        contents = {"a": same, "b": same[:-1] + b"x", "c": b"short", "x": same, "y": same[:-1] + b"y", "z": b"short"}
        folder = tmp_path / "files"
        folder.mkdir()
        for name, content in contents.items():
            (folder / f"{name}.png").write_bytes(content)
        return sources(folder, tmp_path)

    @pytest.mark.parametrize("other", NAMES)
    @pytest.mark.parametrize("one", NAMES)
    def test_equal_bytes_are_found_whatever_the_names(self, places, one, other):
        ours, theirs = [f"{name}.png" for name in ("x", "y", "z", "none")], ["c.png", "b.png", "a.png", "gone.png"]
        found = list(same_bytes(places[one], ours, places[other], theirs))
        assert [(a.name, b.name) for a, b in found] == [("x.png", "a.png"), ("z.png", "c.png")]
        assert found[0] == (places[one].called("x.png"), places[other].called("a.png"))

    def test_what_is_no_file_is_like_no_other(self, tmp_path):
        os.mkfifo(tmp_path / "pipe")
        (tmp_path / "folder").mkdir()
        (tmp_path / "empty").touch()
        names = ["pipe", "folder", "a\0b", "gone"]
        images = FileImages(tmp_path)
        assert list(same_bytes(images, names, images, [*names, "empty"])) == []

    @pytest.mark.parametrize("name", NAMES)
    def test_only_images_of_the_same_size_and_beginning_are_read(self, places, name, monkeypatch):
        read = []
        kind, images = type(places[name]), places[name]
        for what in ("beginning", "digests"):
            true = getattr(kind, what)
            monkeypatch.setattr(kind, what, lambda *a, what=what, true=true: read.append((what, a[1])) or true(*a))
        assert list(same_bytes(images, ["a.png"], images, ["c.png", "z.png"])) == []
        assert read == [], "other sizes"
        monkeypatch.setattr(copies, "BEGINNING", 3000)
        assert list(same_bytes(images, ["y.png"], images, ["b.png"])) == []
        assert [what for what, _ in read] == ["beginning"] * 2, "other beginnings"


@pytest.mark.parametrize("name", ["folder", *PACKERS])
def test_copies_of_drawn_images_are_pointed_out(tmp_path, name, caplog):
    folder = apart(tmp_path / "photos")
    file = folder if name == "folder" else PACKERS[name](folder, tmp_path / f"before-{name}")
    with caplog.at_level(logging.WARNING, "kshot"):
        FewShotDataModule(str(file), shots=3, image_size=8).check_test_files()
    assert "same bytes" not in caplog.text
    shutil.copy(folder / "train" / "a" / "2.png", folder / "test" / "b" / "again.png")
    file = folder if name == "folder" else PACKERS[name](folder, tmp_path / name)
    with caplog.at_level(logging.WARNING, "kshot"):
        FewShotDataModule(str(file), shots=3, image_size=8).check_test_files()
    said = (
        "1 of 7 test images have the same bytes as one that was drawn, which makes the accuracy too high; the first: "
    )
    assert said + f"{file / 'test/b/again.png'} is {file / 'train/a/2.png'}" in caplog.text


def test_a_target_in_an_archive_is_compared_too(tmp_path, caplog):
    folder = apart(tmp_path / "photos")
    target = apart(tmp_path / "other", first=50)
    shutil.copy(folder / "train" / "a" / "2.png", target / "test" / "b" / "again.png")
    packed = PACKERS["x.tar"](target, tmp_path / "target.tar")
    with caplog.at_level(logging.WARNING, "kshot"):
        protocol = {"protocol": "cross-dataset", "targets": [str(packed)]}
        FewShotDataModule(str(folder), shots=3, image_size=8, **protocol).check_test_files()
    assert f"{packed / 'test/b/again.png'} is {folder / 'train/a/2.png'}" in caplog.text


def test_arrays_are_not_looked_at(tmp_path, monkeypatch):
    folder = parted_folder(tmp_path / "other", {"zero": 2, "one": 2})
    monkeypatch.setattr(ArrayImages, "digests", None)
    protocol = {"protocol": "domain-generalisation", "targets": [str(folder)]}
    FewShotDataModule("digits", shots=1, image_size=8, **protocol).check_test_files()
