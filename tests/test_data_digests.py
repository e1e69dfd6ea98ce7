"""Digests of the bytes of images: what they cover, who shows them, and the cache that they are kept in."""

import hashlib
import json
import os

import pytest
from data_fixtures import digits, parted_folder, save_image

from kshot.data import FewShotDataModule
from kshot.data import digests as module
from kshot.data.digests import digest_of, file_digests
from kshot.data.manifest import first_changed, manifest_images


def reference(path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


class TestRuns:
    @pytest.fixture
    def root(self, tmp_path):
        return parted_folder(tmp_path / "pets", {"cat": 3, "dog": 3})

    def fitted(self, root, **settings):
        data = FewShotDataModule(str(root), **{"shots": 2, "image_size": 8} | settings)
        data.setup("fit")
        return data

    def test_each_image_of_training_and_validation(self, root):
        data = self.fitted(root)
        rows = [*data.draw.train, *data.draw.val]
        assert data.image_digests == {row.path: reference(root / row.path) for row in rows}
        assert len(rows) == 8
        assert len(data.split_info()["images_sha256"]) == 64
        json.dumps(data.split_info())

    def test_they_are_unknown_before_images_are_opened(self, root):
        data = FewShotDataModule(str(root), shots=2, image_size=8)
        assert data.split_info()["images_sha256"] is None
        data.setup("test")
        data.setup("validate")
        assert data.split_info()["images_sha256"] is None

    @pytest.mark.parametrize("part", ["train", "val"])
    def test_an_overwritten_image_shows_and_is_named(self, root, part, tmp_path):
        before = self.fitted(root)
        before.write_manifest(tmp_path / "split.json")
        assert self.fitted(root).split_info() == before.split_info()
        path = getattr(before.draw, part)[1].path
        save_image(root / path, seed=99)
        after = self.fitted(root)
        assert after.draw == before.draw
        changed = {key for key, value in after.split_info().items() if value != before.split_info()[key]}
        assert changed == {"images_sha256"}
        assert first_changed(manifest_images(tmp_path / "split.json"), after.image_digests) == path

    def test_half_of_the_classes_have_the_manifest_of_all(self, root, tmp_path):
        for protocol in ("base-to-new", "all-to-all"):
            data = self.fitted(root, protocol=protocol)
            data.write_manifest(tmp_path / f"{protocol}.json")
        assert (tmp_path / "base-to-new.json").read_bytes() == (tmp_path / "all-to-all.json").read_bytes()
        assert len(manifest_images(tmp_path / "all-to-all.json")) == 8
        half = self.fitted(root, protocol="base-to-new").split_info()
        save_image(root / data.draw.train[-1].path, seed=99)  # of a new class
        assert self.fitted(root, protocol="base-to-new").split_info() == half
        assert self.fitted(root).split_info() != data.split_info()

    def test_a_test_image_does_not_count(self, root):
        before = self.fitted(root).split_info()
        save_image(root / "test" / "cat" / "00.png", seed=99)
        assert self.fitted(root).split_info() == before

    def test_a_manifest_with_digests_gives_the_same_draw(self, root, tmp_path):
        before = self.fitted(root, split_seed=5)
        before.write_manifest(tmp_path / "split.json")
        again = self.fitted(root, manifest=str(tmp_path / "split.json"))
        assert again.draw == before.draw
        assert again.split_info() == before.split_info()

    def test_what_is_left_out_has_none(self, root):
        data = FewShotDataModule(str(root), shots=2, image_size=8, skip_unreadable=True)
        path = data.draw.train[0].path
        (root / path).write_bytes(b"")
        with pytest.warns(UserWarning, match="left out"):
            data.setup("fit")
        assert data.image_digests[path] == digest_of(b"")
        assert data.split_info()["images_sha256"]

    def test_arrays(self):
        first, second = digits(), digits()
        for data in (first, second):
            data.setup("fit")
        assert first.split_info() == second.split_info()
        assert first.split_info()["images_sha256"]
        images = first._source.entry.images("data", "train", first.draw.train)
        index = first.draw.train[3].path
        assert first.image_digests[index] == digest_of(images.open(index).tobytes())
        images.items = images.items.copy()
        images.items[int(index)] *= 0.5
        assert images.digests([index]) != [first.image_digests[index]]
        assert images.digests(["5000"]) == [""]


class TestCache:
    @pytest.fixture
    def files(self, tmp_path, monkeypatch):
        monkeypatch.setenv("KSHOT_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(module, "FEW", 2)
        (tmp_path / "images").mkdir()
        files = [tmp_path / "images" / f"{i}.png" for i in range(4)]
        for i, file in enumerate(files):
            file.write_bytes(bytes([i]) * 100)
        return files

    def read(self, monkeypatch):
        """Lists the files whose bytes are digested."""
        read, true = [], hashlib.file_digest

        def watched(file, kind):
            read.append(file.name)
            return true(file, kind)

        monkeypatch.setattr(hashlib, "file_digest", watched)
        return read

    def test_they_are_read_once(self, files, tmp_path, monkeypatch):
        read = self.read(monkeypatch)
        expected = [reference(file) for file in files]
        assert file_digests(files) == expected
        assert len(read) == 4
        assert file_digests(files) == expected
        assert len(read) == 4
        assert [p.name for p in (tmp_path / "cache").iterdir()] == ["image_digests.json"]

    def test_few_are_not_kept(self, files, tmp_path, monkeypatch):
        read = self.read(monkeypatch)
        file_digests(files[:2])
        file_digests(files[:2])
        assert len(read) == 4
        assert not (tmp_path / "cache").exists()

    def test_what_changed_is_read_again(self, files, monkeypatch):
        file_digests(files)
        read = self.read(monkeypatch)
        stamp = files[0].stat()
        files[0].write_bytes(b"x" * 101)
        os.utime(files[0], ns=(stamp.st_atime_ns, stamp.st_mtime_ns))  # another size
        os.utime(files[1], ns=(1, 1))  # another time
        files[2].unlink()
        assert file_digests(files) == [reference(files[0]), reference(files[1]), "", reference(files[3])]
        assert read == [str(files[0]), str(files[1])]

    @pytest.mark.parametrize(
        "content",
        [
            b"",
            b"{",
            b"[]",
            b"[1, 2, 3]",
            b'["", {}]',
            b'["x", null]',
            b"[" * 100_000,
            b"\xff",
            "flip",
            "folder",
            "pipe",
        ],
        ids=range(11),
    )
    def test_a_broken_cache_is_made_again_in_silence(self, files, tmp_path, content, recwarn):
        expected = file_digests(files)
        cache = tmp_path / "cache" / "image_digests.json"
        whole = cache.read_bytes()
        if content == "flip":
            cache.write_bytes(whole.replace(expected[0].encode(), b"0" * 16))
        elif content in ("folder", "pipe"):
            cache.unlink()
            cache.mkdir() if content == "folder" else os.mkfifo(cache)
        else:
            cache.write_bytes(content)
        assert file_digests(files) == expected
        assert len(recwarn) == 0
        assert content == "folder" or cache.read_bytes() == whole

    @pytest.mark.parametrize("where", ["", "/proc/nowhere", "~nobody-of-this-name/x"])
    def test_nowhere_to_keep_them(self, files, monkeypatch, where):
        monkeypatch.setenv("KSHOT_CACHE", where)
        assert file_digests(files) == [reference(file) for file in files]

    def test_it_is_bounded(self, files, tmp_path, monkeypatch):
        monkeypatch.setattr(module, "MOST", 3)
        expected = file_digests(files)
        _, kept = json.loads((tmp_path / "cache" / "image_digests.json").read_text())
        assert list(kept.values()) == expected[1:]

    def test_no_file_is_waited_for(self, tmp_path):
        os.mkfifo(tmp_path / "pipe")
        (tmp_path / "loop").symlink_to("loop")
        assert file_digests([tmp_path / "pipe", tmp_path / "loop", tmp_path / "a\0b", tmp_path]) == [""] * 4
