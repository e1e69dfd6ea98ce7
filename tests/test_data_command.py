"""``data``: what is listed, found wrong, divided, imported and downloaded, through the command line."""

import gzip
import hashlib
import io
import json
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import tiny_sets
from command_line import refused
from data_fixtures import split_file
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from kshot.cli import main
from kshot.data import checking
from kshot.data.catalogue import CATALOGUE, load_split
from kshot.data.checking import Seen, alike_groups, divide
from kshot.data.splits import PARTS, Row, Split, check_distinct, split_bytes
from kshot.data_command import names_apart
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
        assert rows.keys() == CATALOGUE.keys()
        sizes = {"train": 2820, "val": 1128, "test": 1692}
        dtd = CATALOGUE["dtd"]
        facts = {"url": dtd.url, "by_hand": "", "licence": "", "citation": dtd.citation}
        protocols = {"protocols": "all-to-all, base-to-new, cross-dataset"}
        here = {"here": f"{tmp_path}/dtd/dtd/images"}
        assert rows["dtd"] == {"name": "dtd", "classes": 47} | sizes | here | facts | protocols
        assert rows["imagenet"]["protocols"].endswith("cross-dataset, domain-generalisation")
        assert rows["imagenet_a"]["protocols"].startswith("target of domain-generalisation")
        assert rows["digits"]["here"] == "comes with scikit-learn"
        assert rows["eurosat"]["here"] == rows["mnist"]["here"] == ""

    def test_plain_lines_where_there_is_no_terminal(self, capsys, tmp_path):
        code, out = ended(capsys, "list", "--root", tmp_path)
        assert code == 0
        assert re.search(r"^dtd +47 +2820 +1128 +1692$", out, re.M)
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
        assert known["CoOp's split"].startswith("split_zhou_Food101.json: https://drive.google.com/")
        assert "1335b39cac3cec67" in known["CoOp's split"]
        assert known["archives"] == [
            "http://data.vision.ee.ethz.ch/cvl/food-101.tar.gz md5 85eeb15f3717b99a5da872d97d918f87"
        ]
        assert f"goes to {tmp_path}/food-101" in known["missing"]

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
from kshot.lean import load_lightning
load_lightning()  # as main does; without it this import takes three times as long
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
        for names in (["sea__lion", "Sea lion", "dog"], ["cafe\u0301", "café", "dog"]):
            with pytest.raises(UserError, match="read the same"):
                check_distinct(names, "here")

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

    def test_each_image_is_decoded_once(self, capsys, tmp_path, monkeypatch):
        """Beside that only its header is read; 10,000 images then take less than a minute."""
        folder(tmp_path, {"cat": 30, "dog": 30})
        opened, decoded, header, read = Counter(), Counter(), Image.open, checking.read_image
        monkeypatch.setattr(Image, "open", lambda file, **how: opened.update([Path(file)]) or header(file, **how))
        monkeypatch.setattr(checking, "read_image", lambda file, **how: decoded.update([file]) or read(file, **how))
        ended(capsys, "check", tmp_path)
        assert len(decoded) == len(opened) == 60
        assert set(decoded.values()) == {1}
        assert set(opened.values()) == {2}


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

    def test_comparisons_are_bounded_where_all_hashes_are_equal(self, monkeypatch):
        plain = [Seen(size=(64, 64), digest=str(i), miniature=bytes([i % 250] * 768)) for i in range(1000)]
        compared, bits = [], np.unpackbits
        monkeypatch.setattr(np, "unpackbits", lambda rows, **how: compared.append(len(rows)) or bits(rows, **how))
        groups = alike_groups(plain)
        assert len(groups) == 1  # one level apart, one after the other
        assert 0 < sum(compared) <= len(plain) * checking.WINDOW
        assert len(compared) <= (checking.BITS + 1) * checking.WINDOW

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

    @settings(max_examples=60)
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

    def test_a_file_that_comes_with_kshot_needs_no_import(self, capsys, tmp_path, monkeypatch):
        """Its first images alone, as if no more of it came."""
        parts, _ = tiny_sets.tiny_split("dtd")
        for row in [row for rows in parts.values() for row in rows]:
            file = tmp_path / "dtd" / "images" / row.path
            file.parent.mkdir(parents=True, exist_ok=True)
            file.touch()
        file = tmp_path / CATALOGUE["dtd"].split
        file.write_bytes(gzip.compress(split_bytes(parts)))
        monkeypatch.setattr("kshot.data.entries.packaged_folder", lambda _: tmp_path)
        assert told(capsys, "import", file, "--root", tmp_path)["dataset"] == "dtd"
        assert not list((tmp_path / "dtd" / "images").glob("*.json"))

    def test_other_files(self, capsys, tmp_path):
        file = tmp_path / "s.json"
        file.write_text("[]")
        assert "one object with the lists" in refused(capsys, ["data", "import", str(file)])
        assert "index" in refused(capsys, ["data", "import", str(split_file(file, train=[[0, 0, "a"]]))])
        assert "none.json" in refused(capsys, ["data", "import", str(tmp_path / "none.json")])


def test_names_that_read_the_same_are_told_apart_in_a_split_file():
    """As ImageNet's two missiles, which CLIP's own list has."""
    named = ("missile", "Missile", "a_tench")
    split = Split("s", (), (), (), ("n1", "n2", "n3"), "", "", {}, prompt_names=named)
    assert names_apart(split) == ["missile (n1)", "Missile (n2)", "a_tench"]
    check_distinct(names_apart(split), "a split file")
