"""Files: a failed write costs nothing, and folders are where they are said to be."""

import errno
import os
from pathlib import Path

import pytest

import kshot.files
from kshot import files as module
from kshot.errors import UserError
from kshot.files import cache_folder, make_folder, packaged_folder, write_atomically


def files(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def one_line(error) -> str:
    message = str(error.value)
    assert message
    assert "\n" not in message
    return message


class TestAtomicWrite:
    def test_writes_where_there_is_a_folder(self, tmp_path):
        path = tmp_path / "a" / "b" / "last.ckpt"
        with pytest.raises(UserError, match="Could not write"):
            write_atomically(path, lambda file: file.write_bytes(b"new"))
        assert not (tmp_path / "a").exists(), "whoever took it away does not get it back"
        make_folder(path.parent)
        make_folder(path.parent)
        write_atomically(path, lambda file: file.write_bytes(b"new"))
        assert path.read_bytes() == b"new"
        write_atomically(path, lambda file: file.write_bytes(b"newer"))
        assert path.read_bytes() == b"newer"
        assert files(path.parent) == ["last.ckpt"]

    def test_the_old_file_stands_until_the_new_one_is_whole(self, tmp_path):
        path = tmp_path / "last.ckpt"
        path.write_bytes(b"old")

        def write(file):
            assert file.parent == path.parent  # a rename between disks is no rename
            file.write_bytes(b"new")
            assert path.read_bytes() == b"old"

        write_atomically(path, write)
        assert path.read_bytes() == b"new"

    @pytest.mark.parametrize("before", [None, b"old"])
    @pytest.mark.parametrize(
        "error",
        [OSError(28, "No space left on device"), RuntimeError("PytorchStreamWriter failed writing file data/0")],
    )
    def test_a_full_disk(self, tmp_path, before, error):
        path = tmp_path / "last.ckpt"
        if before:
            path.write_bytes(before)

        def write(file):
            file.write_bytes(b"half of it")
            raise error

        with pytest.raises(UserError) as raised:
            write_atomically(path, write)
        message = one_line(raised)
        assert str(path) in message
        assert str(error) in message
        assert ("kept" in message) == (before is not None)
        assert files(tmp_path) == (["last.ckpt"] if before else [])
        if before:
            assert path.read_bytes() == before

    @pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError, SystemExit])
    def test_any_other_interruption(self, tmp_path, error):
        path = tmp_path / "last.ckpt"
        path.write_bytes(b"old")

        def write(file):
            file.write_bytes(b"half of it")
            raise error

        with pytest.raises(error):
            write_atomically(path, write)
        assert files(tmp_path) == ["last.ckpt"]
        assert path.read_bytes() == b"old"

    def test_a_folder_that_cannot_be_made(self, tmp_path):
        (tmp_path / "file").write_bytes(b"")
        with pytest.raises(UserError) as raised:
            write_atomically(tmp_path / "file" / "last.ckpt", lambda file: file.write_bytes(b"new"))
        assert "last.ckpt" in one_line(raised)

    def test_a_write_of_nothing(self, tmp_path):
        with pytest.raises(UserError, match="there was none before"):
            write_atomically(tmp_path / "last.ckpt", lambda file: None)
        assert files(tmp_path) == []

    def test_a_name_that_no_disk_takes(self, tmp_path):
        with pytest.raises(UserError) as raised:
            write_atomically(tmp_path / ("x" * 300), lambda file: file.write_bytes(b"new"))
        assert os.strerror(errno.ENAMETOOLONG) in one_line(raised)

    def test_a_folder_without_access(self, tmp_path, monkeypatch):
        def refused(*_, **__):
            raise PermissionError(errno.EACCES, "Permission denied")

        monkeypatch.setattr(Path, "stat", refused)  # what a folder without x does; chmod does not stop root
        monkeypatch.setattr(Path, "replace", refused)
        with pytest.raises(UserError) as raised:
            write_atomically(tmp_path / "last.ckpt", lambda file: file.write_bytes(b"new"))
        assert "Permission denied" in one_line(raised)

    def test_readable_for_whom_the_user_says(self, tmp_path):
        before = os.umask(0o027)
        try:
            write_atomically(tmp_path / "split.json", lambda file: file.write_bytes(b"new"))
        finally:
            os.umask(before)
        assert (tmp_path / "split.json").stat().st_mode & 0o777 == 0o640


class TestPackagedFolder:
    @pytest.mark.parametrize(("name", "one"), [("configs", "clip_16shot.yaml"), ("data_splits", "digits.json")])
    def test_carried(self, name, one):
        assert (packaged_folder(name) / one).is_file()

    @pytest.mark.parametrize("layout", ["checkout", "wheel"])
    def test_both_layouts(self, tmp_path, monkeypatch, layout):
        package = tmp_path / ("src/kshot" if layout == "checkout" else "site-packages/kshot")
        expected = (tmp_path if layout == "checkout" else package) / "configs"
        (tmp_path / "configs").mkdir()
        expected.mkdir(parents=True, exist_ok=True)
        monkeypatch.setattr(module, "__file__", str(package / "files.py"))
        assert packaged_folder("configs") == expected


class TestCacheFolder:
    @pytest.mark.parametrize(
        ("variables", "expected"),
        [
            ({"KSHOT_CACHE": "/scratch/k", "XDG_CACHE_HOME": "/x"}, "/scratch/k"),
            ({"KSHOT_CACHE": "~/k"}, "/home/me/k"),
            ({"XDG_CACHE_HOME": "/x"}, "/x/kshot"),
            ({"KSHOT_CACHE": "", "XDG_CACHE_HOME": ""}, "/home/me/.cache/kshot"),
            ({}, "/home/me/.cache/kshot"),
        ],
    )
    def test_where(self, monkeypatch, variables, expected):
        for name in ("KSHOT_CACHE", "XDG_CACHE_HOME"):
            monkeypatch.delenv(name, raising=False)
        for name, value in ({"HOME": "/home/me"} | variables).items():
            monkeypatch.setenv(name, value)
        assert cache_folder() == Path(expected)


def test_memory_of_the_machine_may_be_unknown(monkeypatch, tmp_path):
    assert kshot.files.memory_of_machine() > 10**8
    monkeypatch.setattr(kshot.files, "Path", lambda *_: tmp_path / "missing")
    for unknown in (lambda name: -1 if name == "SC_PHYS_PAGES" else 4096, lambda name: int("no such name")):
        monkeypatch.setattr(kshot.files.os, "sysconf", unknown)
        assert kshot.files.memory_of_machine() is None
    monkeypatch.delattr(kshot.files.os, "sysconf")
    assert kshot.files.memory_of_machine() is None


@pytest.mark.parametrize(
    ("size", "text"),
    [
        *((0, "0 bytes"), (999, "999 bytes"), (1000, "1 kB"), (999_600, "1 MB"), (2_540_000_000, "2.54 GB")),
        *((604e9, "604 GB"), (1.5e15, "1.5 PB"), (4e21, "4,000 EB")),
    ],
)
def test_amounts(size, text):
    assert kshot.files.amount(size) == text
