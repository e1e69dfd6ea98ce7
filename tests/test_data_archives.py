"""Zip and tar files as data sets: read in place, as the folder that was packed, and bounded."""

import os
import pickle
import tarfile
import threading
import zipfile

import numpy as np
import pytest
import torch
from data_fixtures import image_folder
from messy import messy
from PIL import Image

from kshot.data import FewShotDataModule, archives
from kshot.data.archives import ArchiveImages, Member, list_archive
from kshot.data.catalogue import load_split
from kshot.errors import UserError


def zipped(root, file, packing=zipfile.ZIP_DEFLATED, dirs=True):
    with zipfile.ZipFile(file, "w", packing) as archive:
        for path in sorted(root.rglob("*")):
            if (dirs and path.is_dir()) or path.is_file():
                archive.write(path, path.relative_to(root))
    return file


def tarred(root, file):
    with tarfile.open(file, "w") as archive:
        archive.add(root, ".")
    return file


PACKERS = {
    "deflated.zip": zipped,
    "stored.zip": lambda root, file: zipped(root, file, zipfile.ZIP_STORED, dirs=False),
    "x.tar": tarred,
}


@pytest.fixture
def photos(tmp_path):
    return image_folder(tmp_path / "photos", {"a sea": 10, "лес": 10})


def opened(path, **settings):
    return FewShotDataModule(str(path), **{"shots": 4, "image_size": 8} | settings)


@pytest.mark.parametrize("name", PACKERS)
def test_an_archive_is_as_its_folder(tmp_path, photos, name):
    packed = opened(PACKERS[name](photos, tmp_path / name))
    plain = opened(photos)
    assert packed.draw == plain.draw
    for data in (packed, plain):
        data.setup("fit")
        data.check_test_files()
        data.setup("test")
    assert packed.image_digests == plain.image_digests
    for part in ("train", "val", "test"):
        first, second = (data.part(part).images([(i, 0) for i in range(4)]) for data in (packed, plain))
        assert torch.equal(first, second)
    assert packed.dataset_name == name.partition(".")[0]


@pytest.mark.parametrize("name", PACKERS)
def test_deep_images_are_as_bright_as_in_their_folder(tmp_path, photos, name):
    for i, file in enumerate(sorted(photos.rglob("*.png"))):
        values = np.random.default_rng(i).integers(0, 4000, (8, 8), dtype=np.uint16)
        Image.fromarray(values).save(file)
    packed, plain = opened(PACKERS[name](photos, tmp_path / name)), opened(photos)
    for data in (packed, plain):
        data.setup("fit")
        data.setup("test")
        assert data.split_info()["white"] == 4095
    for part in ("train", "val", "test"):
        first, second = (data.part(part).images([(i, 0) for i in range(4)]) for data in (packed, plain))
        assert torch.equal(first, second)
    assert first.max() > 200


@pytest.mark.parametrize("name", ["deflated.zip", "x.tar"])
def test_a_messy_archive(tmp_path, name):
    made = messy(tmp_path)
    data = opened(PACKERS[name](made.root, tmp_path / name), shots=None)
    assert data.class_names == made.said
    counts, left_out = data.split_info()["counts"], data.split_info()["left_out"]
    linked = {"deflated.zip": 1, "x.tar": 2}[name]  # the image in a linked folder; zip has packed the linked image
    assert counts == made.counts | {"train": made.counts["train"] - linked}
    assert {kind: left_out[kind] for kind in (".heic", ".txt", ".md")} == {".heic": 1, ".txt": 2, ".md": 1}


@pytest.mark.parametrize("name", ["deflated.zip", "x.tar"])
def test_workers_threads_and_pickles(tmp_path, photos, name):
    data = opened(PACKERS[name](photos, tmp_path / name), num_workers=2)
    data.setup("test")
    (loader,) = [data.test_dataloader()]
    assert sum(len(batch.label) for batch in loader) == 6
    source = data.part("test").source
    paths = data.part("test").paths
    expected = [source.open(path).tobytes() for path in paths]
    again = pickle.loads(pickle.dumps(source))
    found = {}

    def read(number):
        found[number] = [again.open(path).tobytes() for path in paths * 5]

    threads = [threading.Thread(target=read, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(found[number] == expected * 5 for number in range(4))


def test_an_archive_is_listed_once(tmp_path, photos, monkeypatch):
    file = zipped(photos, tmp_path / "x.zip")
    os.utime(file, (1e9, 1e9))
    data = opened(file)
    monkeypatch.setattr("kshot.data.catalogue.list_archive", None)
    data.setup("test")
    zipped(image_folder(photos, {"more": 3}), file)
    monkeypatch.undo()
    with pytest.raises(UserError, match="has changed since"):
        data.check_test_files()


def test_images_without_a_suffix(tmp_path, photos):
    for path in photos.rglob("*.png"):
        path.rename(path.with_suffix(""))
    (photos / "a sea" / "notes").write_text("BM and no more")
    for name in ("deflated.zip", "x.tar"):
        files = list_archive(PACKERS[name](photos, tmp_path / name))
        assert (len(files.images), dict(files.left_out)) == (20, {"without suffix": 1})


class TestRefusals:
    def refused(self, path):
        with pytest.raises(UserError) as error:
            load_split(str(path))
        assert "\n" not in str(error.value)
        return str(error.value)

    @pytest.mark.parametrize("member", ["../out/x.png", "/etc/x.png", "a/../../x.png", "C:/x.png"])
    @pytest.mark.parametrize("kind", ["zip", "tar"])
    def test_members_that_leave_the_archive(self, tmp_path, member, kind):
        file = tmp_path / f"x.{kind}"
        if kind == "zip":
            with zipfile.ZipFile(file, "w") as archive:
                archive.writestr(member, b"")
        else:
            with tarfile.open(file, "w") as archive:
                archive.addfile(tarfile.TarInfo(member))
        assert "must be a relative path" in self.refused(file)

    def test_links_are_not_followed(self, tmp_path, photos):
        (photos / "a sea" / "passwd.png").symlink_to("/etc/passwd")
        files = list_archive(tarred(photos, tmp_path / "x.tar"))
        assert dict(files.left_out) == {"links": 1}
        assert len(files.images) == 20

    @pytest.mark.parametrize("name", ["x.tar.gz", "x.TGZ", "x.tar.xz"])
    def test_compressed_tar_files(self, tmp_path, name):
        (tmp_path / name).touch()
        assert "has to be unpacked, or packed again" in self.refused(tmp_path / name)

    @pytest.mark.parametrize("name", ["x.zip", "x.tar"])
    @pytest.mark.parametrize("content", [b"", b"PK\5\6" + bytes(18), b"no archive" * 1000, bytes(10_240)])
    def test_what_is_no_archive(self, tmp_path, name, content):
        (tmp_path / name).write_bytes(content)
        message = self.refused(tmp_path / name)
        assert "archive" in message or "no class folders" in message

    def test_cut_short(self, tmp_path, photos):
        for name in ("deflated.zip", "x.tar"):
            file = PACKERS[name](photos, tmp_path / name)
            file.write_bytes(file.read_bytes()[:-9000] if name == "deflated.zip" else file.read_bytes()[:3000])
            self.refused(file)

    def test_a_pipe(self, tmp_path):
        os.mkfifo(tmp_path / "x.zip")
        assert self.refused(tmp_path / "x.zip").endswith("x.zip: not a file")

    def test_too_many_members(self, tmp_path, photos, monkeypatch):
        monkeypatch.setattr(archives, "MOST_MEMBERS", 5)
        assert "more than 5 members" in self.refused(zipped(photos, tmp_path / "x.zip"))

    def test_one_class(self, tmp_path):
        root = image_folder(tmp_path / "x", {"cat": 3})
        assert self.refused(zipped(root, tmp_path / "x.zip")).endswith("one class, 'cat', and so nothing to tell apart")


class TestMembers:
    def test_damage_is_found(self, tmp_path, photos):
        file = zipped(photos, tmp_path / "x.zip", zipfile.ZIP_STORED)
        images = ArchiveImages(file, list_archive(file).members)
        path = "a sea/00.png"
        whole = images.content(path)
        content = bytearray(file.read_bytes())
        content[content.index(whole) + 40] ^= 1
        file.write_bytes(content)
        with pytest.raises(UserError, match=r"x.zip/a sea/00.png': the archive is damaged here"):
            images.open(path)
        assert images.digests([path, "none"]) == ["", ""]

    def test_a_bomb(self, tmp_path, monkeypatch):
        """What unpacks to more than it says is not unpacked; neither is what says to be large."""
        with zipfile.ZipFile(tmp_path / "x.zip", "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("a/x.png", bytes(50_000_000))
        members = list_archive(tmp_path / "x.zip").members
        lying = {"a/x.png": members["a/x.png"]._replace(size=1000)}
        with pytest.raises(UserError, match="damaged here"):
            ArchiveImages(tmp_path / "x.zip", lying).open("a/x.png")
        monkeypatch.setattr(archives, "MOST_BYTES", 1_000_000)
        with pytest.raises(UserError, match="more than 1,000,000 bytes"):
            ArchiveImages(tmp_path / "x.zip", members).open("a/x.png")

    def test_what_cannot_be_read(self, tmp_path):
        file = tmp_path / "x.zip"
        with zipfile.ZipFile(file, "w", zipfile.ZIP_LZMA) as archive:
            archive.writestr("a/x.png", b"x")
        assert dict(list_archive(file).left_out) == {"packed in another way than deflate": 1}
        content = bytearray(file.read_bytes())
        content[content.index(b"PK\1\2") + 8] |= 1
        file.write_bytes(content)
        assert dict(list_archive(file).left_out) == {"encrypted": 1}

    def test_broken_streams(self, tmp_path):
        (tmp_path / "x.zip").write_bytes(b"\xff" * 200)
        images = ArchiveImages(tmp_path / "x.zip", {"x": Member(0, 50, 60, 1, True)})
        with pytest.raises(UserError, match="cannot read the image"):
            images.open("x")
        (tmp_path / "x.zip").unlink()
        with pytest.raises(UserError, match="cannot read the image"):
            images.open("x")


def test_unreadable_members_may_be_skipped(tmp_path, photos):
    (photos / "a sea" / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    file = zipped(photos, tmp_path / "x.zip")
    with pytest.raises(UserError, match=r"--data.skip_unreadable true"):
        opened(file, shots=None, test_share=None).setup("fit")
    data = opened(file, shots=None, test_share=None, skip_unreadable=True)
    with pytest.warns(UserWarning, match="1 of 21 images are left out"):
        data.setup("fit")
    assert len(data.part("train")) == 20
