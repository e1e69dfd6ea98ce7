"""``python main.py predict``: what it takes, what it writes, and what it leaves as it was."""

import csv
import io
import json
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from command_line import UNTESTED, fit, photos, predict, refused
from pyarrow import parquet
from safetensors import safe_open
from test_parser import PLACES, RUN_CODE, over

from kshot import answering, predicting, sealing
from kshot.answering import Prediction
from kshot.checkpoint import HEADER
from kshot.errors import UserError
from kshot.files import new_file
from kshot.opening import CONFIG, WEIGHTS
from kshot.writing import Copies, CsvRows, JsonRows, cell

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def run(tmp_path_factory, few_scans) -> Path:
    return fit(tmp_path_factory.mktemp("runs"), *few_scans, *UNTESTED, "--run.calibrate", "true", "--data.shots", "4")


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    photos(tmp_path / "photos", 5)
    return Path("photos")


def paths(text: str | bytes) -> list[str]:
    """The first column of a CSV."""
    text = text.decode("utf-8", "surrogateescape") if isinstance(text, bytes) else text
    return [row["path"] for row in csv.DictReader(io.StringIO(text))]


def read(file: str) -> list[dict[str, str]]:
    """The rows of a CSV."""
    return list(csv.DictReader(io.StringIO(Path(file).read_text())))


def test_the_answer_is_printed_and_all_else_is_told_apart(run, folder, capsys):
    predict(run, "--images", folder)
    said = capsys.readouterr()
    assert paths(said.out) == sorted(map(str, folder.rglob("*.png")))
    assert said.out.splitlines()[0].startswith("path,label_1,probability_1,label_2,")
    assert "5 images labelled in" in said.err
    assert [p.name for p in Path().iterdir()] == ["photos"]


def test_files_folders_patterns_and_standard_input(run, folder, capsys, monkeypatch):
    files = sorted(map(str, folder.rglob("*.png")))
    predict(run, "--images", files[3], "photos/sub1", "photos/*/[02].png")
    assert paths(capsys.readouterr().out) == [files[3], *files[3:], *files[:2]]
    for end in (b"\n", b"\0", b"\r\n"):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(end.join(map(os.fsencode, files[:3])) + end)))
        predict(run, "--images", "-", files[4])
        assert paths(capsys.readouterr().out) == [*files[:3], files[4]]


def test_paths_are_read_in_blocks_of_any_length():
    names = [f"a folder/{'x' * (i % 97)}{i}.png" for i in range(5000)]
    for end in ("\n", "\0"):
        content = io.BytesIO(end.join(names).encode())
        assert [str(path) for path in predicting.paths_from(content)] == names
    assert list(predicting.paths_from(io.BytesIO(b""))) == []
    assert [os.fsencode(path) for path in predicting.paths_from(io.BytesIO(b"caf\xe9.png\n"))] == [b"caf\xe9.png"]


def test_json_lines_say_the_same_as_csv(run, folder):
    predict(run, "--images", folder, "--out", "a.csv", "--top-k", "2")
    predict(run, "--images", folder, "--out", "a.jsonl", "--top-k", "2")
    rows = read("a.csv")
    lines = [json.loads(line) for line in Path("a.jsonl").read_text().splitlines()]
    assert [list(line) for line in lines] == [list(row) for row in rows]
    for row, line in zip(rows, lines, strict=True):
        assert row["label_1"] == line["label_1"]
        assert float(row["probability_2"]) == line["probability_2"]


def test_parquet_says_the_same_as_csv(run, folder):
    predict(run, "--images", folder, "--out", "a.csv", "--abstain-error", "0.2")
    predict(run, "--images", folder, "--out", "a.parquet", "--abstain-error", "0.2")
    rows = read("a.csv")
    found = parquet.read_table("a.parquet").to_pylist()
    assert [list(each) for each in found] == [list(row) for row in rows]
    assert [each["path"] for each in found] == [row["path"] for row in rows]
    assert [cell("x", each["probability_1"]) for each in found] == [row["probability_1"] for row in rows]
    assert [cell("x", each["abstain"]) for each in found] == [row["abstain"] for row in rows]


def test_unreadable_files_are_listed_and_passed_over(run, folder, capsys):
    for i in range(25):
        (folder / f"broken {i:02}.png").write_text("broken")
    (folder / "empty.png").touch()
    predict(run, "--images", folder, "--out", "a.csv")
    assert len(paths(Path("a.csv").read_text())) == 5
    lines = capsys.readouterr().err.splitlines()
    assert "26 images cannot be read, and are left out:" in lines
    assert sum("cannot read the image 'photos/broken" in line for line in lines) == predicting.SHOWN
    assert f"  ... and {26 - predicting.SHOWN} more" in lines
    line = refused(capsys, ["predict", "--run", str(run), "--images", "photos/empty.png", "--out", "b.csv"])
    assert "none of the 1 images can be read: cannot read the image 'photos/empty.png': it is empty" in line
    assert not Path("b.csv").exists()


ODD = ("=cmd|' C calc'!A0.png", "-2+3.png", "@x.png", "+1.png", 'quo"te, and\nnew line.png', "ü.png", "'.png")


def test_names_are_harmless_to_spreadsheets_and_still_lead_to_their_files(run, folder):
    image = next(folder.rglob("*.png"))
    odd = [*ODD, os.fsdecode(b"caf\xe9.png")]
    for name in odd:
        shutil.copy(image, name)
    predict(run, "--images", *(f"./{name}" if name.startswith("-") else name for name in odd), "--out", "out/a.csv")
    content = Path("out/a.csv").read_bytes()
    named = paths(content)
    assert [Path(path).name for path in named] == odd
    assert all(Path(path).is_file() for path in named)
    assert not [path for path in named if path.startswith(("=", "+", "-", "@"))]
    predict(run, "--images", *(f"./{name}" if name.startswith("-") else name for name in odd), "--out", "out/a.jsonl")
    lines = [json.loads(line)["path"] for line in Path("out/a.jsonl").read_bytes().splitlines()]
    assert [Path(path).name for path in lines] == odd


@pytest.mark.parametrize("text", ["=1+1", "@SUM(A1)", "-x", "+x", "\tx", "\rx", "＝1"])
def test_a_label_that_is_a_formula_is_written_as_text(text):
    assert cell("label_1", text) == f"'{text}"


@pytest.mark.parametrize("text", ["-1", "+1.5", "cat", "a=b", ""])
def test_other_labels_stay_as_they_are(text):
    assert cell("label_1", text) == text


def test_what_is_too_unsure_is_marked(run, folder):
    predict(run, "--images", folder, "--out", "a.csv", "--abstain-error", "0.2", "--top-k", "1")
    thresholds = json.loads(safe_open(run / WEIGHTS, "pt").metadata()[HEADER])["calibration"]["abstain"]
    rows = read("a.csv")
    least = thresholds["probability"]["0.2"]["threshold"]
    assert [row["abstain"] == "yes" for row in rows] == [float(row["probability_1"]) < least for row in rows]
    predict(run, "--images", folder, "--out", "b.csv", "--abstain_error", "0.2", "--abstain-by", "energy")
    least = thresholds["energy"]["0.2"]["threshold"]
    rows = read("b.csv")
    assert [row["abstain"] == "yes" for row in rows] == [-float(row["unknown"]) < least for row in rows]


def test_images_are_copied_into_folders_of_their_classes(run, folder, capsys):
    (folder / "sub0" / "1.png").write_bytes((folder / "sub1" / "1.png").read_bytes())  # a name twice
    (folder / "broken.png").write_text("broken")
    predict(run, "--images", folder, "--out", "a.jsonl", "--copy-to", "sorted/here")
    rows = [json.loads(line) for line in Path("a.jsonl").read_text().splitlines()]
    copies = sorted(p for p in Path("sorted/here").rglob("*") if p.is_file())
    assert len(copies) == len(rows) == 6
    for row in rows:
        same = [p for p in copies if p.read_bytes() == Path(row["path"]).read_bytes()]
        assert {p.parent.name for p in same} == {row["label_1"]}
    arguments = ["predict", "--run", str(run), "--images", "photos", "--copy-to", "sorted/here"]
    assert "--copy-to sorted/here: there is something already" in refused(capsys, arguments)
    assert sorted(p for p in Path("sorted/here").rglob("*") if p.is_file()) == copies


def test_folders_of_copies_have_names_that_a_file_system_takes(folder):
    image = next(folder.rglob("*.png"))
    copies = Copies(Path("copies"))
    for label in ("a/b", "a:b", "..", "", "x" * 300, "Cat", "cat", "ü"):
        copies.add(Prediction(str(image), (label,), (1.0,)))
    copies.add(Prediction(str(image), ("cat",), (0.1,), abstain=True))
    names = {p.name for p in Path("copies").iterdir()}
    assert names == {"a_b", "a_b_2", "_", "__2", "x" * 80, "Cat", "cat_2", "ü", "_unsure"}
    assert all((p / image.name).is_file() for p in Path("copies").iterdir())


def test_nothing_is_overwritten(run, folder, capsys):
    Path("a.csv").write_text("mine")
    Path("link.csv").symlink_to("nowhere")
    for name in ("a.csv", "link.csv"):
        line = refused(capsys, ["predict", "--run", str(run), "--images", "photos", "--out", name])
        assert f"{name} exists already" in line
    assert Path("a.csv").read_text() == "mine"
    assert not Path("nowhere").exists()


def test_a_file_is_there_whole_or_not_at_all(tmp_path):
    def interrupted():
        with new_file(tmp_path / "a.csv") as file:
            file.write(b"some")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert list(tmp_path.iterdir()) == []
    with new_file(tmp_path / "b" / "a.csv") as file:
        file.write(b"all")
    assert (tmp_path / "b" / "a.csv").read_bytes() == b"all"
    with pytest.raises(UserError, match="no space left on device"), new_file(tmp_path / "c.csv"):
        raise OSError(28, "No space left on device")


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_permission_gets_one_line(run, folder, capsys):
    Path("locked").mkdir(mode=0o500)
    line = refused(capsys, ["predict", "--run", str(run), "--images", "photos", "--out", "locked/a.csv"])
    assert "Could not write locked/a.csv: permission denied" in line


def rewritten(run: Path, place: Path, **more: object) -> Path:
    """A copy of a run whose weights say something else."""
    copy = Path(shutil.copytree(run, place))
    with safe_open(copy / WEIGHTS, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  no mapping
        header = json.loads(file.metadata()[HEADER])
    sealing.save_sealed(tensors, copy / WEIGHTS, {HEADER: json.dumps(header | more)})
    return copy


def test_runs_that_cannot_be_opened_get_one_line(run, folder, capsys):
    newer = rewritten(run, Path("newer"), format=99, kshot="9.9")
    (newer / CONFIG).write_text("what: comes\n")
    later = rewritten(run, Path("later"), kshot="9.9")
    (later / CONFIG).write_text((later / CONFIG).read_text() + "whatever: comes\n")
    Path("empty").mkdir()
    for path, said in {
        "newer": "has format 99, and this version reads up to 3: update kshot.",
        "later": "The run is of kshot 9.9, and this is ",
        "empty": "empty is no finished run: it has no config.yaml and no tuned.safetensors.",
        "nowhere": "There is no run nowhere.",
        "photos": "photos is no finished run",
    }.items():
        assert said in refused(capsys, ["predict", "--run", path, "--images", "photos", "--out", "a.csv"])
    assert not Path("a.csv").exists()


@pytest.mark.parametrize("number", range(len(PLACES)), ids=PLACES.keys())
def test_the_config_of_a_run_runs_no_code(number, run, folder, capsys):
    """Every place with some of what would run code, and all of that somewhere: test_parser.py has each with each."""
    bad, place = Path(shutil.copytree(run, "bad")), list(PLACES.values())[number]
    codes = [*RUN_CODE.values()] * 4
    for value in codes[3 * number % len(RUN_CODE) :][:3]:
        (bad / CONFIG).write_text(yaml.safe_dump(over(place, value)))
        line = refused(capsys, ["predict", "--run", "bad", "--images", "photos"])
        assert place[-1] in line or "missing" in line
    assert sorted(p.name for p in Path().iterdir()) == ["bad", "photos"]


def test_the_last_run_of_a_folder_of_runs_is_taken(run, folder, capsys):
    Path("runs").mkdir()
    for number in ("001", "002", "010"):
        shutil.copytree(run, Path("runs", number))
    Path("runs", "010", WEIGHTS).unlink()  # not finished
    taken = answering_runs(folder, "runs")
    assert taken == [Path("runs/002")]


def answering_runs(folder: Path, run: str) -> list[Path]:
    """The directories that a prediction opens."""
    taken = []
    real = predicting.open_run
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(predicting, "open_run", lambda *given: taken.append(opened := real(*given)) or opened)
        predict(Path(run), "--images", folder, "--out", "x.csv")
    return [opened.directory for opened in taken]


def test_memory_does_not_grow_with_the_images(run):
    answers = answering.Answers(predicting.open_run(run))
    taken = 0

    def stream():
        nonlocal taken
        for i in range(90):
            taken += 1
            yield str(i), np.full((1000, 1000, 3), i, np.uint8)

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for number, _ in enumerate(answers.predictions(stream(), batch_size=4, workers=2)):
        assert taken <= number + 4 * (answering.AHEAD + 2)
    assert taken == number + 1 == 90
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 150_000  # kB, and the images have 270,000


def test_a_reader_that_has_enough_ends_it_without_a_traceback(run, folder):
    command = [sys.executable, str(ROOT / "main.py"), "predict", "--run", str(run), "--images", *["photos"] * 60]
    process = subprocess.Popen([*command, "--batch-size", "16"], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.readline()
    process.stdout.close()
    told = process.stderr.read().decode()
    process.stderr.close()
    assert process.wait(timeout=200) in (0, 141)
    assert "Traceback" not in told
    assert "Error" not in told


def test_a_run_of_a_gpu_in_16_bits_answers_on_a_cpu(run, folder, capsys):
    copy = Path(shutil.copytree(run, "gpu"))
    text = (copy / CONFIG).read_text()
    text = text.replace("accelerator: auto", "accelerator: cuda").replace("precision: null", "precision: 16-mixed")
    assert "precision: 16-mixed" in text
    (copy / CONFIG).write_text(text)
    predict(run, "--images", folder, "--out", "a.csv")
    capsys.readouterr()
    predict(copy, "--images", folder, "--out", "b.csv", "--trainer.accelerator", "cpu")
    assert "computes in 16-mixed, which a CPU does not: it answers in 32-true" in capsys.readouterr().err
    assert Path("a.csv").read_bytes() == Path("b.csv").read_bytes()


def test_a_class_is_added_by_the_command_line(folder, tmp_path, capsys, few_scans):
    run = fit(tmp_path / "runs", "--config", "methods/class_mean.yaml", *few_scans, *UNTESTED)
    predict(run, "--images", folder, "--add-class", "noise", folder, "--out", "a.csv", "--top-k", "1")
    assert {row["label_1"] for row in read("a.csv")} == {"noise"}
    assert "The class 'noise' was added: its mean is that of 5 images" in capsys.readouterr().err


def test_rows_are_written_as_they_come():
    for kind in (CsvRows, JsonRows):
        file, columns = io.BytesIO(), {"path": str, "unknown": float}
        with kind(file, columns) as table:
            before = len(file.getvalue())
            table.add({"path": "x", "unknown": 1.0})
            assert len(file.getvalue()) > before
