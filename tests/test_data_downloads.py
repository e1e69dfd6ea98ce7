"""``data download``: sources in turn, resume, checksums, harmful archives; and what the catalogue says of sources."""

import gzip
import hashlib
import io
import json
import random
import tarfile
import threading
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from command_line import refused
from test_data_command import checked, ended, folder, save, scene, told

from kshot.cli import main
from kshot.data import downloads
from kshot.data.catalogue import CATALOGUE
from kshot.data.downloads import found_at
from kshot.data.entries import Archive, DatasetEntry


class Server(ThreadingHTTPServer):
    """Serves files with Range, and misbehaves as told."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files: dict[str, bytes] = {}
        self.cut: list[int] = []  # bytes after which the next answers break off
        self.ranges, self.asked = True, []

    def url(self, name: str) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/{name}"


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        server, name = self.server, self.path[1:]
        start = int((self.headers.get("Range") or "bytes=0-")[6:-1])
        server.asked.append((name, start))
        content = server.files.get(name)
        if content is None:
            self.send_error(404)
            return
        ranged = server.ranges and "Range" in self.headers
        if ranged and start >= len(content):
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{len(content)}")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        body = content[start:] if ranged else content
        self.send_response(206 if ranged else 200)
        self.send_header("Content-Length", str(len(body)))
        if ranged:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.end_headers()
        self.wfile.write(body[: server.cut.pop(0)] if server.cut else body)
        self.close_connection = True

    def log_message(self, *_):
        pass


@pytest.fixture
def server(monkeypatch):
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with Server() as served:
        thread = threading.Thread(target=served.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        yield served
        served.shutdown()


def zipped(**members: bytes) -> bytes:
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return data.getvalue()


def tarred(members: dict[str, bytes], mode: str = "w:gz", *extra: tarfile.TarInfo) -> bytes:
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode=mode) as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
        for info in extra:
            archive.addfile(info)
    return data.getvalue()


NOISE = random.Random(0).randbytes(400_000)


@pytest.fixture
def toy(monkeypatch, server):
    """Offers a data set ``toy`` that gives ``toy/pixels`` by an archive ``toy.zip`` at the sources given."""

    def offer(content: bytes, urls: list[str] = ("toy.zip",), md5: str | None = None, **more) -> None:
        server.files[urls[-1]] = content
        md5 = hashlib.md5(content).hexdigest() if md5 is None else md5
        archive = Archive(**{"urls": [server.url(url) for url in urls], "gives": ["toy"], "md5": md5} | more)
        monkeypatch.setitem(CATALOGUE.own, "toy", DatasetEntry(kind="folders", folder="toy", archives=[archive]))

    return offer


def left(root: Path) -> list[str]:
    return sorted(path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file())


def harmful(kind: str) -> tuple[str, bytes]:
    link = tarfile.TarInfo("toy/link")
    link.type, link.linkname = tarfile.SYMTYPE, "/etc"
    if kind == "zip link":
        info = zipfile.ZipInfo("toy/link")
        info.external_attr = 0o120777 << 16
        data = io.BytesIO()
        with zipfile.ZipFile(data, "w") as archive:
            archive.writestr(info, "/etc")
        return "toy.zip", data.getvalue()
    device = tarfile.TarInfo("toy/device")
    device.type = tarfile.CHRTYPE
    return {
        "tar link": ("toy.tgz", tarred({"toy/x": b""}, "w:gz", link)),
        "tar device": ("toy.tar", tarred({"toy/x": b""}, "w", device)),
        "tar leaves": ("toy.tar", tarred({"../x": b"x"}, "w")),
        "tar absolute": ("toy.tar", tarred({"/tmp/x": b"x"}, "w")),
        "zip leaves": ("toy.zip", zipped(**{"toy/../../x": b"x"})),
        "zip backslash": ("toy.zip", zipped(**{"toy\\..\\x": b"x"})),
        "zip bomb": ("toy.zip", zipped(**{"toy/x": bytes(300_000), "toy/y": bytes(300_000)})),
        "gz bomb": ("toy.gz", gzip.compress(bytes(600_000))),
        "cut short": ("toy.zip", zipped(**{"toy/x": NOISE})[:-50]),
        "cut short tar": ("toy.tgz", tarred({"toy/x": NOISE})[:-5000]),
        "no archive": ("toy.tar", b"hello" * 1000),
        "lacks it": ("toy.zip", zipped(**{"other/x": b"x"})),
        "other kind": ("toy.rar", b"Rar!"),
    }[kind]  # fmt: skip


class TestDownload:
    def test_it_is_fetched_verified_and_unpacked_once(self, capsys, tmp_path, server, toy):
        toy(zipped(**{"toy/pixels": NOISE, "readme": b"x"}))
        done = told(capsys, "download", "toy", "--root", tmp_path)
        assert done["here"] == str(tmp_path / "toy")
        assert done["files"][0]["verified"] == "md5"
        assert left(tmp_path) == ["toy/pixels"]
        assert (tmp_path / "toy" / "pixels").read_bytes() == NOISE
        assert told(capsys, "download", "toy", "--root", tmp_path)["files"] == []
        assert len(server.asked) == 1
        code, out = ended(capsys, "download", "toy", "--root", tmp_path)
        assert code == 0
        assert f"toy is there: {tmp_path}/toy" in out
        assert f"Train with --data.dataset toy --data.root {tmp_path}" in out

    def test_from_the_server_to_a_run(self, capsys, tmp_path, server, toy, monkeypatch):
        monkeypatch.chdir(tmp_path)
        images = folder(tmp_path / "made", {"cat": 8, "dog": 8})
        members = {f"toy/{file.relative_to(images)}": file.read_bytes() for file in images.rglob("*.png")}
        toy(tarred(members), ["toy.tgz"])
        told(capsys, "download", "toy")
        assert checked(capsys, "data/toy", "--shots", 4) == {}
        told(capsys, "split", "data/toy", "--out", "data/toy.json")
        fit = ["fit", "--config", "clip_16shot.yaml", "--data.dataset", "toy.json", "--data.shots", "2"]
        main([*fit, "--trainer.max_steps", "2", "--trainer.enable_progress_bar", "false"])
        (result,) = Path("runs").glob("*/*/result.json")
        assert json.loads(result.read_text())["test_images"] == {"test": 4}

    @pytest.mark.parametrize("ranges", [True, False])
    def test_a_lost_connection_is_gone_on_with(self, capsys, tmp_path, server, toy, ranges):
        toy(zipped(**{"toy/pixels": NOISE}))
        server.cut, server.ranges = [150_000], ranges
        told(capsys, "download", "toy", "--root", tmp_path)
        assert server.asked == [("toy.zip", 0), ("toy.zip", 150_000)]
        assert (tmp_path / "toy" / "pixels").read_bytes() == NOISE

    def test_an_interrupted_download_is_gone_on_with_and_never_looks_finished(self, capsys, tmp_path, server, toy):
        toy(zipped(**{"toy/pixels": NOISE}))
        server.cut = [100_000, 0, 50_000, 0, 0]
        line = refused(capsys, ["data", "download", "toy", "--root", str(tmp_path)])
        assert "connection was lost after 100 kB of 400 kB" in line
        assert left(tmp_path) == [".toy.zip.partial"]
        assert found_at("toy", tmp_path) == ""
        refused(capsys, ["data", "download", "toy", "--root", str(tmp_path)])
        assert (tmp_path / ".toy.zip.partial").stat().st_size == 150_000
        server.cut = []
        told(capsys, "download", "toy", "--root", tmp_path)
        assert server.asked[-1] == ("toy.zip", 150_000)
        assert left(tmp_path) == ["toy/pixels"]

    def test_sources_are_tried_in_turn(self, capsys, tmp_path, server, toy):
        toy(zipped(**{"toy/pixels": NOISE}), ["gone/toy.zip", "wrong/toy.zip", "right/toy.zip"])
        server.files["wrong/toy.zip"] = NOISE
        done = told(capsys, "download", "toy", "--root", tmp_path)
        assert done["files"][0]["source"] == server.url("right/toy.zip")
        assert [name for name, _ in server.asked] == ["gone/toy.zip", "wrong/toy.zip", "right/toy.zip"]

    def test_a_wrong_checksum_leaves_nothing(self, capsys, tmp_path, server, toy):
        toy(zipped(**{"toy/pixels": NOISE}), md5="0" * 32)
        line = refused(capsys, ["data", "download", "toy", "--root", str(tmp_path)])
        assert "the checksum is wrong" in line
        assert server.url("toy.zip") in line
        assert left(tmp_path) == []

    @pytest.mark.parametrize("size", [1000, 500_000])
    def test_a_beginning_of_another_file_is_given_up(self, capsys, tmp_path, server, toy, size):
        toy(zipped(**{"toy/pixels": NOISE}))
        (tmp_path / ".toy.zip.partial").write_bytes(bytes(size))
        told(capsys, "download", "toy", "--root", tmp_path)
        assert (tmp_path / "toy" / "pixels").read_bytes() == NOISE

    def test_an_empty_folder_is_not_the_data_set_and_a_full_one_is_left_alone(self, capsys, tmp_path, server, toy):
        toy(zipped(**{"toy/pixels": NOISE, "more/x": b"x"}), gives=["more", "toy"])
        (tmp_path / "toy").mkdir()
        save(scene(0), tmp_path / "more" / "mine.png")
        told(capsys, "download", "toy", "--root", tmp_path)
        assert left(tmp_path) == ["more/mine.png", "toy/pixels"]

    def test_all_of_it_was_there(self, capsys, tmp_path, server, toy):
        content = zipped(**{"toy/pixels": NOISE})
        toy(content)
        (tmp_path / ".toy.zip.partial").write_bytes(content)
        told(capsys, "download", "toy", "--root", tmp_path)
        assert server.asked == [("toy.zip", len(content))]

    @pytest.mark.parametrize(
        ("name", "content", "kept"),
        [
            ("toy.tar", tarred({"toy/pixels": NOISE}, "w"), "toy/pixels"),
            ("toy.tar.gz", tarred({"./toy/pixels": NOISE}), "toy/pixels"),
            ("toy.tgz", tarred({"toy/pixels": NOISE}), "toy/pixels"),
            ("pixels.gz", gzip.compress(NOISE), "toy/pixels"),
            ("pixels", NOISE, "toy/pixels"),
        ],
    )
    def test_kinds_of_files(self, capsys, tmp_path, server, toy, name, content, kept):
        toy(content, [name], **{} if name.startswith("toy") else {"gives": ["pixels"], "into": "toy"})
        told(capsys, "download", "toy", "--root", tmp_path)
        assert left(tmp_path) == [kept]
        assert (tmp_path / kept).read_bytes() == NOISE

    def test_an_archive_in_an_archive(self, capsys, tmp_path, server, toy):
        toy(zipped(**{"a/b.tar.gz": tarred({"toy/pixels": NOISE})}), inner=["a/b.tar.gz"])
        told(capsys, "download", "toy", "--root", tmp_path)
        assert left(tmp_path) == ["toy/pixels"]

    def test_several_archives_in_an_archive(self, capsys, tmp_path, server, toy):
        inner = {f"z/{name}.gz": gzip.compress(name.encode()) for name in ("a", "b", "c")}
        toy(zipped(**inner), inner=["z/a.gz", "z/c.gz"], gives=["a", "c"], into="toy")
        told(capsys, "download", "toy", "--root", tmp_path)
        assert left(tmp_path) == ["toy/a", "toy/c"]
        assert (tmp_path / "toy" / "c").read_bytes() == b"c"

    @pytest.mark.parametrize(
        ("kind", "what"),
        [
            ("zip link", "has the link"), ("tar link", "has the link"), ("tar device", "link or device"),
            ("tar leaves", "without '..'"), ("tar absolute", "relative path"), ("zip leaves", "without '..'"),
            ("zip backslash", "backslash"), ("zip bomb", "swells"), ("gz bomb", "swells"),
            ("cut short", "not an archive"), ("cut short tar", "not an archive"), ("no archive", "not an archive"),
            ("lacks it", "has no 'toy'"), ("other kind", "not a zip"),
        ],
    )  # fmt: skip
    def test_archives_that_mean_harm(self, capsys, tmp_path, server, toy, monkeypatch, kind, what):
        name, content = harmful(kind)
        monkeypatch.setattr(downloads, "LEAST_BOUND", 500_000)
        toy(content, [name])
        root = tmp_path / "deep" / "root"
        assert what in refused(capsys, ["data", "download", "toy", "--root", str(root)])
        assert [name for name in left(tmp_path) if not name.endswith(".partial")] == []

    def test_names(self, capsys, tmp_path):
        assert "Did you mean 'dtd'" in refused(capsys, ["data", "download", "dtdd", "--root", str(tmp_path)])
        line = refused(capsys, ["data", "download", "ucf101", "--root", str(tmp_path)])
        assert "cannot be downloaded for you" in line
        assert "ucf101/UCF-101-midframes" in line
        assert told(capsys, "download", "digits", "--root", tmp_path)["here"] == "comes with scikit-learn"
