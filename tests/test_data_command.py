"""``data``: what is listed, found wrong, divided, imported and downloaded, through the command line."""

import dataclasses
import gzip
import hashlib
import io
import json
import random
import re
import signal
import subprocess
import sys
import tarfile
import threading
import time
import urllib.parse
import zipfile
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torchvision
from command_line import refused
from data_fixtures import split_file
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from kshot.cli import main
from kshot.data import checking, downloads
from kshot.data.catalogue import CATALOGUE, load_split
from kshot.data.checking import Seen, alike_groups, divide
from kshot.data.downloads import Archive, Source, all_sources, found_at
from kshot.data.splits import PARTS, Row
from kshot.errors import UserError


def scene(seed: int, size: int = 64) -> Image.Image:
    """A picture with a few soft areas, as photos have."""
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((size, size), Image.Resampling.BICUBIC)


def save(image: Image.Image, path: Path, **options) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, **options)
    return path


def folder(root: Path, counts: dict[str, int], start: int = 0) -> Path:
    number = start
    for name, count in counts.items():
        for i in range(count):
            save(scene(number), root / name / f"{i:02}.png")
            number += 1
    return root


def parted(root: Path, train: int = 3, test: int = 2) -> Path:
    folder(root / "train", {"cat": train, "dog": train})
    folder(root / "test", {"cat": test, "dog": test}, start=1000)
    return root


def ended(capsys, *words: object) -> tuple[int, str]:
    """Runs ``data`` to its end, and returns exit code and standard output."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        main(["data", *map(str, words)])
    return end.value.code, capsys.readouterr().out


def told(capsys, *words: object, code: int = 0) -> dict:
    found, out = ended(capsys, *words, "--json")
    assert found == code, out
    return json.loads(out)


def checked(capsys, *words: object, code: int = 0) -> dict:
    """The findings of a check by kind: the groups of images, or the text."""
    found = told(capsys, "check", *words, code=code)
    assert found["result"] == ("fails" if code else "ok")
    return {each["kind"]: each["images"] or each["text"] for each in found["findings"]}


class TestList:
    def test_it_says_what_is_on_this_machine(self, capsys, tmp_path):
        save(scene(0), tmp_path / "dtd" / "dtd" / "images" / "banded" / "x.jpg")
        rows = {row["name"]: row for row in told(capsys, "list", "--root", tmp_path)}
        assert rows.keys() == CATALOGUE.keys() | all_sources().keys()
        assert rows["dtd"] == {"name": "dtd", "classes": 47, "kind": "files", "here": f"{tmp_path}/dtd/dtd/images"}
        assert rows["digits"]["here"] == "comes with scikit-learn"
        assert rows["eurosat"]["here"] == rows["mnist"]["here"] == ""

    def test_plain_lines_where_there_is_no_terminal(self, capsys, tmp_path):
        code, out = ended(capsys, "list", "--root", tmp_path)
        assert code == 0
        assert re.search(r"^dtd +47 +files$", out, re.M)
        assert out.isascii()
        assert "\x1b" not in out


class TestInfo:
    def test_a_catalogue_name(self, capsys, tmp_path):
        known = told(capsys, "info", "dtd", "--root", tmp_path)
        assert known["images"] == {"train": 2820, "val": 1128, "test": 1692}
        assert known["template"] == "{} texture."
        assert "f26ebeccd2b58e68d70f07a0dc39fe49bf7b69024bac34396b954dfd87969c38" in known["split"]
        assert known["table"][0] == {"label": 0, "class": "banded", "train": 60, "val": 24, "test": 36}
        assert "Describing Textures" in known["citation"]

    def test_what_is_not_here_is_told_all_the_same(self, capsys, tmp_path):
        known = told(capsys, "info", "cifar10", "--root", tmp_path)
        assert known["images"]["train"] == 50_000
        assert "no CIFAR10" in known["missing"]
        known = told(capsys, "info", "food101", "--root", tmp_path)
        assert known["template"] == "a photo of {}, a type of food."
        assert known["table"] == []

    def test_a_folder(self, capsys, tmp_path):
        root = parted(tmp_path / "photos[1]")
        known = told(capsys, "info", root)
        assert (known["classes"], known["images"]) == (2, {"train": 6, "val": 0, "test": 4})
        assert known["size"].endswith("kB")
        code, out = ended(capsys, "info", root)
        assert code == 0
        assert re.search(r"^1 +dog +3 +0 +2$", out, re.M)
        assert "photos[1]" in out


WAITS = """\
import os, sys, time
from kshot.cli import main
from kshot.data import checking
def look(file):
    os.write(2, f"{os.getpid()}\\n".encode())
    time.sleep(60)
checking.look = look
"""


class TestCheck:
    def test_nothing_is_found_in_good_images(self, capsys, tmp_path):
        assert checked(capsys, parted(tmp_path), "--shots", 3) == {}
        code, out = ended(capsys, "check", tmp_path, "--shots", 3)
        assert code == 0
        assert "Training with 3 shots uses 6 of 6 training images" in out
        assert out.endswith("Training can begin.\n")

    @pytest.mark.parametrize(
        ("content", "kind"), [(b"", "empty"), (b"no image", "unreadable"), (None, "truncated"), ("gone", "missing")]
    )
    def test_broken_files(self, capsys, tmp_path, content, kind):
        broken = parted(tmp_path) / "train" / "cat" / "00.png"
        given_ = [tmp_path, "--shots", 3]
        if content == "gone":
            rows = [["train/cat/gone.png", 0, "cat"], ["train/cat/01.png", 0, "cat"]]
            given_ = [split_file(tmp_path / "s.json", train=rows[::-1]), "--shots", 1]
        else:
            data = io.BytesIO()
            Image.effect_noise((64, 64), 90).save(data, "PNG")
            broken.write_bytes(data.getvalue()[: len(data.getvalue()) // 2] if content is None else content)
        found = checked(capsys, *given_, code=1)
        assert found == {kind: [["train: train/cat/gone.png" if content == "gone" else "train: train/cat/00.png"]]}
        assert "!" in ended(capsys, "check", *given_)[1]

    def test_tiny_grey_and_rotated_are_told_and_no_reason_to_fail(self, capsys, tmp_path):
        cat = parted(tmp_path) / "train" / "cat"
        save(scene(50, 31), cat / "00.png")
        save(scene(51).convert("L"), cat / "01.png")
        exif = Image.Exif()
        exif[0x0112] = 6
        (cat / "02.png").unlink()
        save(scene(52), cat / "02.jpg", exif=exif)
        assert checked(capsys, tmp_path, "--shots", 3) == {
            "tiny (below 32 pixels)": [["train: train/cat/00.png"]],
            "grey": [["train: train/cat/01.png"]],
            "rotated by EXIF": [["train: train/cat/02.jpg"]],
        }

    @pytest.mark.parametrize(
        ("copy", "where", "code"),
        [
            ("train/cat/x", "within a class", 0),
            ("train/dog/x", "across classes", 0),
            ("test/cat/x", "across parts", 1),
            ("test/dog/x", "across parts", 1),
        ],
    )
    def test_duplicates(self, capsys, tmp_path, copy, where, code):
        file = parted(tmp_path) / "train" / "cat" / "00.png"
        (tmp_path / f"{copy}.png").write_bytes(file.read_bytes())
        found = checked(capsys, tmp_path, "--shots", 3, code=code)
        part = copy.split("/")[0]
        assert {kind: sorted(*groups) for kind, groups in found.items()} == {
            f"duplicates {where}": sorted([f"{part}: {copy}.png", "train: train/cat/00.png"])
        }
        file.unlink()
        save(scene(0, 600), file.with_suffix(".jpg"))
        found = checked(capsys, tmp_path, "--shots", 3, code=code)
        assert list(found) == [f"near-duplicates {where}"]

    def test_a_copy_of_a_copy_is_one_finding(self, capsys, tmp_path):
        cat = parted(tmp_path) / "train" / "cat"
        (cat / "x.png").write_bytes((cat / "00.png").read_bytes())
        save(scene(0), cat / "y.jpg", quality=80)
        found = checked(capsys, tmp_path, "--shots", 3)
        assert [len(group) for group in found["near-duplicates within a class"]] == [3]
        assert [len(group) for group in found["duplicates within a class"]] == [2]

    def test_too_few_images(self, capsys, tmp_path):
        folder(parted(tmp_path) / "train" / "dog", {".": 5}, start=500)
        found = checked(capsys, tmp_path, "--shots", 4, code=1)
        assert found == {"too few images for 4 shots": "'cat' has 3; --data.allow_fewer true takes what there is"}
        known = told(capsys, "check", tmp_path, "--shots", 4, code=1)
        assert known["training"] | {"text": ""} == {
            "shots": 4, "train": 7, "val": 0, "test": 4, "below": {"cat": 3}, "text": ""
        }  # fmt: skip

    def test_names_that_read_the_same(self, capsys, tmp_path):
        root = folder(tmp_path, {"sea lake": 4, "sea_lake": 4})
        (text,) = checked(capsys, root, "--shots", 1, code=1).values()
        assert "read the same" in text
        finding = checking.equal_names(["sea__lion", "Sea lion", "cafe\u0301", "café", "dog"])
        assert finding.fails
        assert finding.text.count(";") == 1

    def test_a_leak_of_the_own_division_is_found_and_mended(self, capsys, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        root = folder(Path("photos"), {"cat": 10, "dog": 10})
        for i in range(10):
            (root / "cat" / f"copy{i}.png").write_bytes((root / "cat" / f"{i:02}.png").read_bytes())
        assert "duplicates across parts" in checked(capsys, root, "--shots", 2, code=1)
        assert told(capsys, "split", root, "--out", "split.json")["groups kept together"] == 10
        assert "duplicates across parts" not in checked(capsys, "split.json", "--shots", 2)

    def test_arrays_are_checked_too(self, capsys):
        found = checked(capsys, "digits")
        assert [*found] == ["tiny (below 32 pixels)", "grey"]
        assert len(found["grey"]) == 1797

    def test_what_is_not_there(self, capsys, tmp_path):
        assert "unknown data set 'phtos'" in refused(capsys, ["data", "check", "phtos", "--root", str(tmp_path)])
        assert "no train images" in refused(capsys, ["data", "check", "dtd", "--root", str(tmp_path)])
        image = str(save(scene(0), tmp_path / "x.png"))
        assert "a data set is a catalogue name" in refused(capsys, ["data", "check", image])
        assert "unrecognized arguments: --js" in refused(capsys, ["data", "check", image, "--js"])
        assert "is below 1" in refused(capsys, ["data", "check", image, "--shots", "0"])
        sheet = str(tmp_path / "none" / "x.png")
        assert "there is no folder" in refused(capsys, ["data", "check", str(tmp_path), "--contact-sheet", sheet])

    def test_processes_see_the_same(self, capsys, tmp_path):
        root = parted(tmp_path)
        (root / "train" / "cat" / "00.png").write_bytes(b"")
        one = told(capsys, "check", root, "--shots", 3, code=1)
        assert told(capsys, "check", root, "--shots", 3, "--workers", 2, code=1) == one

    @pytest.mark.skipif(not Path("/proc").is_dir(), reason="processes are counted in /proc")
    @pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
    def test_processes_end_with_the_one_that_asked(self, tmp_path, number):
        root = parted(tmp_path, train=40)
        command = [sys.executable, "-c", f"{WAITS}main(['data', 'check', {str(root)!r}, '--workers', '2'])"]
        process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
        workers = [int(process.stderr.readline()) for _ in range(2)]
        process.send_signal(number)
        process.wait(30)
        assert process.stderr.read() == ("interrupted.\n" if number == signal.SIGINT else "")
        end = time.monotonic() + 30
        while any(Path(f"/proc/{worker}").exists() for worker in workers):
            assert time.monotonic() < end
            time.sleep(0.1)

    @pytest.mark.parametrize("broken", [True, False])
    def test_contact_sheet(self, capsys, tmp_path, broken):
        root, sheet = parted(tmp_path / "photos"), tmp_path / "sheet.png"
        if broken:
            (root / "train" / "cat" / "00.png").write_bytes(b"")
        told(capsys, "check", root, "--shots", 3, "--contact-sheet", sheet, code=int(broken))
        with Image.open(sheet) as image:
            assert image.format == "PNG"
            assert image.size == ((1 if broken else 2) * checking.CELL, checking.CELL + 14)
        before = sheet.read_bytes()
        assert "nothing is overwritten" in refused(capsys, ["data", "check", str(root), "--contact-sheet", str(sheet)])
        assert sheet.read_bytes() == before

    def test_it_is_quick(self, capsys, tmp_path):
        folder(tmp_path, {"cat": 1000, "dog": 1000})
        start = time.process_time()
        ended(capsys, "check", tmp_path)
        assert time.process_time() - start < 10  # 10,000 images then take less than a minute


class TestNearDuplicates:
    def test_they_are_those_of_all_pairs(self):
        stream = np.random.default_rng(0)
        pixels = stream.integers(0, 4, (300, 768), dtype=np.uint8)
        codes = [int(stream.integers(0, 2**63)) for _ in range(60)]
        seen = []
        for i in range(300):
            code = codes[i % 60]
            for bit in stream.integers(0, 64, i % 6):
                code ^= 1 << int(bit)
            seen.append(Seen(size=(64, 64), digest=str(i), hash=code, miniature=pixels[i].tobytes()))
        found = {frozenset(pair) for pair in checking._alike_pairs(seen)}
        apart = [
            (a, b) for a in range(300) for b in range(a) if (seen[a].hash ^ seen[b].hash).bit_count() <= checking.BITS
        ]
        assert found <= {frozenset(pair) for pair in apart}
        groups = alike_groups([each._replace(miniature=bytes(768)) for each in seen])
        assert sorted(i for group in groups for i in group) == sorted({i for pair in apart for i in pair})

    def test_time_is_bounded_where_all_hashes_are_equal(self):
        plain = [Seen(size=(64, 64), digest=str(i), miniature=bytes([i % 250] * 768)) for i in range(5000)]
        start = time.process_time()
        groups = alike_groups(plain)
        assert time.process_time() - start < 10
        assert len(groups) == 1  # one level apart, one after the other

    def test_plain_images_of_other_colours_are_not_alike(self):
        plain = [Seen(size=(64, 64), digest=str(i), miniature=bytes([10 * i] * 768)) for i in range(20)]
        assert alike_groups(plain) == []


class TestSplit:
    def test_duplicates_stay_together_and_shares_hold(self, capsys, tmp_path):
        root = folder(tmp_path / "photos", {"cat": 20, "dog": 20})
        for i in range(3):
            save(scene(i), root / "cat" / f"small{i}.jpg", quality=85)
            (root / "dog" / f"copy{i}.png").write_bytes((root / "cat" / f"{i:02}.png").read_bytes())
        out = tmp_path / "split.json"
        counts = told(capsys, "split", root, "--out", out, "--shares", 60, 10, 30)
        assert counts["groups kept together"] == 3
        split = load_split(str(out))[0]
        for label, sizes in ((0, {"train": 14, "val": 2, "test": 7}), (1, {"train": 14, "val": 2, "test": 7})):
            for part, size in sizes.items():
                assert abs(sum(row.label == label for row in getattr(split, part)) - size) <= 2
        place = {row.path: part for part in PARTS for row in getattr(split, part)}
        assert len(place) == 46
        for i in range(3):
            names = (f"cat/{i:02}.png", f"cat/small{i}.jpg", f"dog/copy{i}.png")
            assert len({place[f"photos/{name}"] for name in names}) == 1
        assert not {"duplicates across parts", "near-duplicates across parts"} & {*checked(capsys, out, "--shots", 2)}

    def test_it_depends_on_the_seed_alone(self, capsys, tmp_path):
        root = folder(tmp_path / "photos", {"cat": 9, "dog": 9})
        for name, seed in (("a", 1), ("b", 1), ("c", 2)):
            told(capsys, "split", root, "--out", tmp_path / f"{name}.json", "--seed", seed)
        a, b, c = ((tmp_path / f"{name}.json").read_bytes() for name in "abc")
        assert a == b != c

    def test_a_run_takes_it(self, capsys, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        folder(Path("photos"), {"cat": 8, "dog": 8})
        (tmp_path / "photos" / "cat" / "broken.png").write_bytes(b"no image")
        code, out = ended(capsys, "split", "photos", "--out", "split.json")
        assert code == 0
        assert re.search(r"left out as unreadable +1", out)
        assert "--data.dataset split.json" in out
        fit = ["fit", "--config", "clip_16shot.yaml", "--config", "methods/linear_probe.yaml"]
        fit += ["--data.dataset", "split.json", "--data.shots", "2", "--trainer.max_steps", "2"]
        main([*fit, "--trainer.enable_progress_bar", "false"])
        (result,) = Path("runs").glob("*/*/result.json")
        assert json.loads(result.read_text())["test_images"] == {"test": 4}

    @pytest.mark.parametrize(
        ("words", "what"),
        [
            (["photos", "--out", "old.json"], "nothing is overwritten"),
            (["photos", "--out", "new.csv"], "ends in .json"),
            (["photos", "--out", "gone/new.json"], "there is no folder 'gone'"),
            (["photos", "--out", "twins/new.json"], "must lie below its folder"),
            (["photos", "--out", "new.json", "--shares", "50", "20", "20"], "make 100"),
            (["photos", "--out", "new.json", "--shares", "0", "0", "100"], "make 100"),
            (["photos", "--out", "new.json", "--shares", "a", "b", "c"], "invalid int value"),
            (["photos"], "required: --out"),
            (["digits", "--out", "new.json"], "is for image files"),
            (["nothing", "--out", "new.json"], "unknown data set"),
            (["twins", "--out", "new.json"], "too few that are not alike"),
        ],
    )
    def test_refusals(self, capsys, tmp_path, monkeypatch, words, what):
        monkeypatch.chdir(tmp_path)
        folder(Path("photos"), {"cat": 4, "dog": 4})
        for i in range(4):
            save(scene(i // 2 * i), Path("twins") / "cat" / f"{i}.png")
            save(scene(7), Path("twins") / "dog" / f"{i}.png")
        Path("old.json").write_text("{}")
        assert what in refused(capsys, ["data", "split", *words])
        assert Path("old.json").read_text() == "{}"
        assert not Path("new.json").exists()

    @settings(max_examples=60, deadline=None)
    @given(st.data())
    def test_division(self, data):
        sizes = data.draw(st.lists(st.integers(6, 30), min_size=1, max_size=5))
        rows = [Row(f"{label}/{i}", label, f"c{label}") for label, n in enumerate(sizes) for i in range(n)]
        members = data.draw(st.permutations(range(len(rows))))[: len(rows) // 3]
        groups = [list(members[i : i + 2]) for i in range(0, len(members) - 1, 2)]
        with suppress(UserError):
            parts = divide(rows, groups, (50, 20, 30), data.draw(st.integers(0, 9)))
            assert sorted(row for part in PARTS for row in parts[part]) == sorted(rows)
            place = {row: part for part in PARTS for row in parts[part]}
            assert all(len({place[rows[i]] for i in group}) == 1 for group in groups)
            for part in ("train", "test"):
                assert {row.label for row in parts[part]} == set(range(len(sizes)))

    def test_without_groups_sizes_are_those_of_a_folder(self):
        rows = [Row(f"{i}", 0, "c") for i in range(23)]
        parts = divide(rows, [], (50, 20, 30), 1)
        assert {part: len(parts[part]) for part in PARTS} == {"train": 12, "val": 4, "test": 7}


class TestImport:
    def rows(self, root: Path) -> dict[str, list]:
        folder(root, {"apple_pie": 3})
        names = sorted(file.name for file in (root / "apple_pie").iterdir())
        return {part: [[f"apple_pie/{name}", 0, "apple_pie"]] for part, name in zip(PARTS, names, strict=True)}

    @pytest.mark.parametrize("place", ["food-101/images", "elsewhere", "a/b", "."])
    def test_it_is_written_beside_its_images_and_found_there(self, capsys, tmp_path, place):
        root = tmp_path / "data"
        file = split_file(tmp_path / "split_zhou_Food101.json", **self.rows(root / place))
        packed = tmp_path / "split_zhou_Food101.json.gz"
        packed.write_bytes(gzip.compress(file.read_bytes()))
        known = told(capsys, "import", packed, "--root", root)
        target = root / place / "split_zhou_Food101.json"
        assert known["dataset"] == str(target)
        assert target.read_bytes() == file.read_bytes()
        assert known["sha256"] == hashlib.sha256(file.read_bytes()).hexdigest()
        told(capsys, "import", packed, "--root", root)  # the same file again is no mistake
        assert checked(capsys, target, "--root", root, "--shots", 1) == {}

    def test_what_is_missing_is_said(self, capsys, tmp_path):
        rows = self.rows(tmp_path / "food-101" / "images")
        file = split_file(
            tmp_path / "split_zhou_Food101.json", **rows | {"val": [["apple_pie/none.png", 0, "apple_pie"]]}
        )
        line = refused(capsys, ["data", "import", str(file), "--root", str(tmp_path)])
        assert "1 of 3 images are not in" in line
        assert "'apple_pie/none.png'" in line
        line = refused(capsys, ["data", "import", str(file), "--root", str(tmp_path / "none")])
        assert f"such as in '{tmp_path}/none/food-101/images'" in line

    def test_another_file_is_not_overwritten(self, capsys, tmp_path):
        rows = self.rows(tmp_path / "photos")
        file = split_file(tmp_path / "s.json", **rows)
        (tmp_path / "photos" / "s.json").write_text("mine")
        assert "nothing is overwritten" in refused(capsys, ["data", "import", str(file), "--root", str(tmp_path)])
        assert (tmp_path / "photos" / "s.json").read_text() == "mine"

    def test_a_file_that_comes_with_kshot_needs_no_import(self, capsys, tmp_path):
        split = load_split("dtd")[0]
        for row in (*split.train, *split.val, *split.test):
            file = tmp_path / "dtd" / "images" / row.path
            file.parent.mkdir(parents=True, exist_ok=True)
            file.touch()
        file = Path(__file__).parents[1] / "data_splits" / "split_zhou_DescribableTextures.json.gz"
        assert told(capsys, "import", file, "--root", tmp_path)["dataset"] == "dtd"
        assert not list((tmp_path / "dtd" / "images").glob("*.json"))

    def test_other_files(self, capsys, tmp_path):
        file = tmp_path / "s.json"
        file.write_text("[]")
        assert "one object with the lists" in refused(capsys, ["data", "import", str(file)])
        assert "index" in refused(capsys, ["data", "import", str(split_file(file, train=[[0, 0, "a"]]))])
        assert "none.json" in refused(capsys, ["data", "import", str(tmp_path / "none.json")])


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
        known = all_sources() | {"toy": Source(archives=[archive], layouts=["toy"])}
        monkeypatch.setattr(downloads, "all_sources", lambda: known)
        monkeypatch.setattr("kshot.data_command.all_sources", lambda: known)

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
        assert f"It is the folder {tmp_path}/toy" in out

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
        toy(zipped(**{"a/b.tar.gz": tarred({"toy/pixels": NOISE})}), inner="a/b.tar.gz")
        told(capsys, "download", "toy", "--root", tmp_path)
        assert left(tmp_path) == ["toy/pixels"]

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


def archive_of(archive: Archive, files: list[str]) -> bytes:
    """A small archive of the kind and layout that the catalogue says, with these files."""
    if archive.inner:
        inner = dataclasses.replace(archive, urls=[archive.inner], inner="")
        return zipped(**{archive.inner: archive_of(inner, files)})
    members = dict.fromkeys(files, b"x")
    if archive.name.endswith(".zip"):
        return zipped(**members)
    if ".t" in archive.name and not archive.name.endswith(".bz2"):
        return tarred(members, "w" if archive.name.endswith(".tar") else "w:gz")
    return gzip.compress(b"x") if archive.name.endswith(".gz") else b"x"


@pytest.mark.parametrize("name", [name for name, source in all_sources().items() if source.archives])
def test_every_download_of_the_catalogue_lands_where_it_is_looked_for(capsys, tmp_path, server, monkeypatch, name):
    source, entry = all_sources()[name], CATALOGUE.get(name)
    served = []
    for archive in source.archives:
        files = [f"{give}/x" if "." not in give else give for give in archive.gives]
        if entry and entry.split:
            row, below = load_split(name)[0].train[0], Path(entry.folder, entry.image_root)
            files = [(below / row.path).relative_to(archive.into).as_posix()]
        elif name not in CATALOGUE and source.layouts:
            files += [
                Path(layout, "c", "x").relative_to(archive.into).as_posix()
                for layout in source.layouts
                if Path(layout).is_relative_to(archive.into)
                and layout.startswith(str(Path(archive.into, archive.gives[0])))
            ]
        content = archive_of(archive, files)
        path = urllib.parse.urlparse(archive.urls[0]).path[1:]
        server.files[path] = content
        served.append(dataclasses.replace(archive, urls=[server.url(path)], md5=hashlib.md5(content).hexdigest()))
    known = all_sources() | {name: dataclasses.replace(source, archives=served)}
    monkeypatch.setattr(downloads, "all_sources", lambda: known)
    monkeypatch.setattr("kshot.data_command.all_sources", lambda: known)
    done = told(capsys, "download", name, "--root", tmp_path)
    assert done["here"]
    assert not [file for file in left(tmp_path) if "partial" in file]
    if entry and entry.split:
        split = load_split(name)[0]
        assert (entry.images(tmp_path, "train", split.train).folder / split.train[0].path).is_file()


class TestSources:
    """The schema of ``data_splits/sources.toml``."""

    @pytest.mark.parametrize("name", sorted(all_sources()))
    def test_entry(self, name):
        source = all_sources()[name]
        assert source.classes > 1
        assert len(source.images) in (0, 3)
        assert len(source.citation) > 20
        assert source.archives or source.by_hand or name == "digits"
        if name in CATALOGUE:  # nothing stands twice
            assert (source.url, source.template, source.layouts, source.split) == ("", "", (), "")
        else:
            assert source.url.startswith("https://")
            assert source.layouts
            assert bool(source.split) == bool(source.split_from)
            assert source.template.count("{}") == (1 if source.template else 0)
        for archive in source.archives:
            assert archive.gives
            assert all(re.fullmatch(r"https?://[^ ]+", url) for url in archive.urls)
            assert {url.rsplit("/", 1)[1] for url in archive.urls} == {archive.name}
            assert re.fullmatch(r"[0-9a-f]{32}", archive.md5) or (name == "fgvc_aircraft" and not archive.md5)
            for path in (archive.into, archive.inner or ".", *archive.gives):
                assert not path.startswith("/")
                assert ".." not in path

    def test_every_data_set_has_one(self):
        assert CATALOGUE.keys() <= all_sources().keys()
        coop = "imagenet caltech101 oxford_pets stanford_cars oxford_flowers food101 fgvc_aircraft sun397 dtd eurosat"
        assert [*all_sources()][:11] == [*coop.split(), "ucf101"]

    @pytest.mark.parametrize("name", [name for name, entry in CATALOGUE.items() if entry.split])
    def test_counts_are_those_of_the_split(self, name):
        split, source = load_split(name)[0], all_sources()[name]
        assert source.classes == len(split.class_names)
        assert [*source.images] == [len(split.train), len(split.val), len(split.test)]

    def test_checksums_and_sources_are_torchvisions(self):
        texts = [file.read_text() for file in Path(torchvision.datasets.__file__).parent.glob("*.py")]
        for name, source in all_sources().items():
            for archive in source.archives:
                if archive.md5:
                    assert any(archive.md5 in text for text in texts), name
