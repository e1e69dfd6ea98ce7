"""Files that mean harm, or do it: each is refused in one line, quickly and in little memory, and nothing is run."""

import errno
import gzip
import json
import os
import resource
import subprocess
import time
from pathlib import Path

import many_runs
import numpy as np
import pytest
from data_fixtures import image_folder, save_image, split_file
from PIL import Image

from kshot.data import FewShotDataModule
from kshot.data.catalogue import load_split
from kshot.data.entries import DatasetEntry
from kshot.data.images import FileImages, fault
from kshot.data.manifest import read_manifest
from kshot.data.readers import image_files, images_below
from kshot.errors import UserError
from kshot.files import file_content

A = ["a/1.png", 0, "a"]


def refused(call, *given, **settings) -> str:
    started = time.process_time()
    with pytest.raises(UserError) as error:
        call(*given, **settings)
    assert time.process_time() - started < 5
    message = str(error.value)
    assert "\n" not in message
    assert len(message) < 1000
    return message


class TestImages:
    EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n"

    @pytest.fixture
    def no_program(self, monkeypatch):
        def started(*_, **__):
            raise AssertionError("a program was started")

        monkeypatch.setattr(subprocess, "Popen", started)
        monkeypatch.setattr(os, "posix_spawn", started)

    @pytest.mark.parametrize("content", [EPS, b"\xc5\xd0\xd3\xc6" + bytes(28) + EPS, b"%PDF-1.4\n", b"%!PS\n"])
    @pytest.mark.parametrize("draft", [False, True])
    def test_postscript_reaches_no_program(self, tmp_path, no_program, content, draft):
        (tmp_path / "x.png").write_bytes(content)
        assert "cannot read the image" in refused(FileImages(tmp_path).open, "x.png", draft)

    def test_nor_in_the_files_of_torchvision(self, tmp_path, no_program, monkeypatch):
        (tmp_path / "x.ppm").write_bytes(self.EPS)
        monkeypatch.setattr("torchvision.datasets.GTSRB.__init__", lambda self, *_, **__: None)
        monkeypatch.setattr("torchvision.datasets.GTSRB._samples", [(str(tmp_path / "x.ppm"), 0)], raising=False)
        entry = DatasetEntry(kind="arrays", torchvision="GTSRB", labels="_samples", by_split=True)
        assert "cannot read the image" in refused(entry.images(tmp_path, "test", ()).open, "0")

    @pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM"])
    def test_the_formats_of_the_field_are_read_whatever_the_suffix(self, tmp_path, kind):
        Image.new("RGB", (6, 4), (250, 0, 0)).save(tmp_path / "x.jpg", format=kind)
        image = FileImages(tmp_path).open("x.jpg")
        assert (image.mode, image.size) == ("RGB", (6, 4))
        assert image.getpixel((2, 2))[0] > 240

    @pytest.mark.parametrize("size", [(10_000, 10_000), (20_000, 20_000)])
    def test_decompression_bombs(self, tmp_path, size, recwarn):
        Image.new("1", size).save(tmp_path / "x.png")
        assert "exceeds limit" in refused(FileImages(tmp_path).open, "x.png")
        assert len(recwarn) == 0

    @pytest.mark.parametrize("size", [(100_000, 2), (1, 60_000)])
    def test_lines(self, tmp_path, size):
        Image.new("RGB", size).save(tmp_path / "x.png")
        assert f"{size[0]} x {size[1]} pixels" in refused(FileImages(tmp_path).open, "x.png")

    def test_sixteen_bits_take_little_memory(self, tmp_path):
        Image.fromarray(np.full((2, 3), 40_000, dtype=np.uint16)).save(tmp_path / "x.png")
        assert FileImages(tmp_path).open("x.png").getpixel((0, 0)) == (156, 156, 156)

    def test_pipes_devices_folders_and_loops_are_not_opened(self, tmp_path):
        os.mkfifo(tmp_path / "pipe.png")
        (tmp_path / "loop.png").symlink_to("loop.png")
        (tmp_path / "zero.png").symlink_to("/dev/zero")
        (tmp_path / "folder.png").mkdir()
        (tmp_path / "empty.png").touch()
        open_image = FileImages(tmp_path).open
        for name in ("pipe.png", "zero.png", "folder.png"):
            assert refused(open_image, name).endswith(f"{name}': not a file")
        assert "loop.png': too many levels of symbolic links" in refused(open_image, "loop.png")
        assert "empty.png': it is empty" in refused(open_image, "empty.png")
        assert "nul" in refused(open_image, "a\0b.png").lower()

    def test_no_permission(self, tmp_path, monkeypatch):
        path = save_image(tmp_path / "x.png")
        assert fault(path) == ""
        monkeypatch.setattr(os, "access", lambda *_: False)  # chmod does not stop root
        assert fault(path).endswith("x.png': permission denied")


class TestLists:
    def test_labels_far_away(self, tmp_path):
        path = split_file(tmp_path / "s.json", train=[A, ["b.png", 1_000_000_000, "b"]])
        assert "without a gap, but 1 is missing" in refused(load_split, str(path))
        path = split_file(tmp_path / "s.json", train=[["b.png", 10**4000, "b"]])
        assert "0 is missing" in refused(load_split, str(path))
        (tmp_path / "s.csv").write_text(f"path,label,split\na.png,0,train\nb.png,{'9' * 17},train\n")
        assert "1 is missing" in refused(load_split, str(tmp_path / "s.csv"))
        (tmp_path / "s.csv").write_text(f"path,label,split\na.png,{'9' * 5000},train\n")
        assert "is no class name" in refused(load_split, str(tmp_path / "s.csv"))

    @pytest.mark.parametrize(
        "content",
        [
            b"[" * 1_000_000,
            b'{"train":' * 100_000,
            b"[" * 900 + b"]" * 900,
            b'{"train": ' + b"[" * 900 + b"]" * 900 + b', "val": [], "test": []}',
            b'{"train": [' + b"[" * 900 + b"]" * 900 + b'], "val": [], "test": []}',
            b"1" * 1_000_000,
            b"\x00" * 1000,
            b"\xff\xfe[\x00",
            b'{"train": [["a.png", 0, "\\ud800"]], "val": [], "test": []}',
            b'{"train": [["\\ud800.png", 0, "a"]], "val": [], "test": []}',
            b'{"train": [["a\\u0000.png", 0, "a"]], "val": [], "test": []}',
            b'{"train": [["a.png", 0, "a\\nb"]], "val": [], "test": []}',
            b'{"train": [["a.png", 0, "  "]], "val": [], "test": []}',
            b'{"train": [["a.png", NaN, "a"]], "val": [], "test": []}',
            b'{"train": [["a.png", 1e999, "a"]], "val": [], "test": []}',
            json.dumps({"train": [["a" * 1_000_000, 0]], "val": [], "test": []}).encode(),
            json.dumps({"train": [["../" + "a" * 1_000_000, 0, "a"]], "val": [], "test": []}).encode(),
            json.dumps({"train": [["a.png", 0, "a" * 1_000_000]], "val": [], "test": []}).encode(),
        ],
        ids=range(18),
    )
    def test_split_files(self, tmp_path, content):
        (tmp_path / "s.json").write_bytes(content)
        refused(load_split, str(tmp_path / "s.json"))
        (tmp_path / "s.json.gz").write_bytes(gzip.compress(content))
        refused(load_split, str(tmp_path / "s.json.gz"))

    @pytest.mark.parametrize(
        "text",
        [
            "path,label\n" + "a" * 200_000 + ",a\n",
            "path,label\n" + "," * 1_000_000,
            ",".join(["path", "label", *(f"c{i}" for i in range(100_000))]) + "\n" + "x\n" * 100_000,
            "path,label\na\0b.png,a\n",
            "path,label,split\na.png,a\0b,train\n",
            'path,label,split\na.png,"a\nb",train\n',
            'path,label\n"a.png,a\n' * 10,
            "\0" * 1000,
        ],
        ids=range(8),
    )
    def test_csv_files(self, tmp_path, text):
        (tmp_path / "s.csv").write_text(text)
        refused(load_split, str(tmp_path / "s.csv"))

    def test_manifests(self, tmp_path):
        split, _ = load_split("digits")
        path = tmp_path / "m.json"
        for content in (b"[" * 1_000_000, b"\xff", b'{"schema": "' + b"x" * 100_000 + b'"}'):
            path.write_bytes(content)
            refused(read_manifest, path, split)
        os.mkfifo(tmp_path / "pipe.json")
        assert refused(read_manifest, tmp_path / "pipe.json", split).endswith("pipe.json: not a file")

    def test_what_is_no_file(self, tmp_path):
        for name in ("s.csv", "s.json", "s.json.gz"):
            os.mkfifo(tmp_path / name)
            assert refused(load_split, str(tmp_path / name)).endswith(f"{name}: not a file")
            (tmp_path / f"zero-{name}").symlink_to("/dev/zero")
            assert refused(load_split, str(tmp_path / f"zero-{name}")).endswith(f"{name}: not a file")
        (tmp_path / "loop.csv").symlink_to("loop.csv")
        assert "unknown data set" in refused(load_split, str(tmp_path / "loop.csv"))
        assert "unknown data set" in refused(load_split, "a\0b")
        assert "file name too long" in refused(load_split, "x" * 300)

    @pytest.mark.parametrize("name", ["s.json", "s.csv"])
    def test_no_permission(self, tmp_path, monkeypatch, name):
        (tmp_path / name).write_text("")

        def denied(self, *_, **__):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(self))

        monkeypatch.setattr(Path, "open", denied)
        assert refused(load_split, str(tmp_path / name)).endswith(f"{name}: may not be read (permission denied)")


LARGE = {
    "blanks.json.gz": lambda: gzip.compress(b" " * 1_000_000, 1) * 1500,
    "lists.json": lambda: b'{"train": [' + b"[]," * 3_000_000 + b"0]}",
    "many.json": lambda: b"[" + b"[]," * 20_000_000 + b"0]",
    "strings.json": lambda: b"[" + b'"ab",' * 3_000_000 + b"0]",
    "long.json": lambda: b'"' + b"a" * 200_000_000 + b'"',
    "lines.csv": lambda: b"path,label\n" + b",\n" * 20_000_000,
    "short.csv": lambda: b"path,label\n" + b",\n" * 1_000_000,
}


def test_large_files_take_little_time_and_memory(tmp_path):
    for name, content in LARGE.items():
        (tmp_path / name).write_bytes(content())

    def read() -> tuple[list, int]:
        """Seconds and messages, and by how many kB memory grew: in a child, which has its own peak."""
        before, found = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, []
        for name in LARGE:
            start, message = time.process_time(), "accepted"
            try:
                load_split(str(tmp_path / name))
            except UserError as error:
                message = str(error)
            found.append((time.process_time() - start, message))
        return found, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before

    found, grown = many_runs.in_child(read)
    assert grown < 500_000
    for name, (seconds, message) in zip(LARGE, found, strict=True):
        assert message.startswith(str(tmp_path / name))
        assert seconds < (60 if name == "short.csv" else 5), message  # that one has the rows of a large data set


class TestFolders:
    @pytest.fixture
    def root(self, tmp_path):
        return image_folder(tmp_path / "pets", {"cat": 3, "dog": 3})

    def test_only_files_count(self, root):
        os.mkfifo(root / "cat" / "pipe.png")
        (root / "cat" / "zero.png").symlink_to("/dev/zero")
        (root / "cat" / "up").symlink_to(root)
        (root / "cat" / "nowhere.png").symlink_to("nowhere")
        (root / "cat" / "folder.png").mkdir()
        assert images_below(root / "cat") == ["00.png", "01.png", "02.png"]

    def test_loops(self, root):
        (root / "loop").symlink_to("loop")
        load_split(str(root))
        (root / "cat" / "loop.png").symlink_to("loop.png")
        assert "loop.png: may not be read (too many levels" in refused(load_split, str(root))

    def test_hidden_folders_are_passed_over_at_any_depth(self, root):
        for hidden in (".ipynb_checkpoints", "__MACOSX", "more/.thumbs"):
            save_image(root / "cat" / hidden / "00.png")
        save_image(root / "cat" / "more" / "x.png")
        assert images_below(root / "cat") == ["00.png", "01.png", "02.png", "more/x.png"]

    def test_names_that_are_not_utf_8(self, root):
        (root / "cat" / "00.png").rename(root / "cat" / os.fsdecode(b"\xff.png"))
        assert "cat/\\udcff.png' must be a relative path" in refused(load_split, str(root))
        (root / "cat" / os.fsdecode(b"\xff.png")).unlink()
        (root / "dog").rename(root / os.fsdecode(b"\xfe"))
        assert "must be a relative path" in refused(load_split, str(root))

    @pytest.mark.parametrize("name", [b"\xff", b"a\nb"])
    def test_names_of_data_sets(self, root, name):
        folder = root.rename(root.parent / os.fsdecode(name))
        assert "the name of a data set must have no control characters" in refused(load_split, str(folder))
        (folder / "s.csv").write_text("path,label\n" + "".join(f"cat/0{i}.png,cat\n" for i in range(3)))
        assert "the name of a data set must have no control characters" in refused(load_split, str(folder / "s.csv"))

    def test_depth(self, tmp_path, monkeypatch):
        folder = tmp_path / "a" / "x"
        folder.mkdir(parents=True)
        monkeypatch.chdir(folder)
        for _ in range(1500):
            Path("d").mkdir()
            os.chdir("d")
        monkeypatch.undo()
        try:
            assert "no images in the class folder 'x'" in refused(load_split, str(tmp_path / "a"))
        finally:
            subprocess.run(["rm", "-rf", str(folder)], check=True)

    @pytest.mark.parametrize(("function", "folder"), [("scandir", "cat"), ("scandir", "pets"), ("stat", "cat")])
    def test_no_permission(self, root, monkeypatch, function, folder):
        true = getattr(os, function)

        def denied(path, *given, **settings):
            if str(path).endswith(folder):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
            return true(path, *given, **settings)

        monkeypatch.setattr(os, function, denied)
        message = refused(load_split, str(root))
        assert message.endswith("may not be read (permission denied)")
        assert str(root) in message
        refused(image_files, [str(root if folder == "pets" else root / folder)])

    def test_no_permission_for_the_images(self, root, monkeypatch):
        module = FewShotDataModule(str(root), shots=1, image_size=8)

        def denied(path, *_, **__):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

        monkeypatch.setattr(os, "stat", denied)
        assert "may not be read (permission denied)" in refused(module.setup, "fit")


def test_a_file_of_just_the_size(tmp_path, monkeypatch):
    monkeypatch.setattr("kshot.files.MOST_BYTES", 10)
    (tmp_path / "x").write_bytes(b"0123456789")
    assert file_content(tmp_path / "x") == b"0123456789"
    (tmp_path / "x").write_bytes(b"0123456789a")
    assert "more than 10 bytes" in refused(file_content, tmp_path / "x")
