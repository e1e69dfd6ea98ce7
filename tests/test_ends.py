"""How a run ends, and goes on: signals, mistakes, faults; one directory, one metrics file, each epoch once."""

import csv
import json
import os
import shutil
import signal
import threading
from functools import partial
from pathlib import Path

import pytest
import torch
from command_line import QUICK, assert_same_figures, fit, predict, refused, tiny_clip
from data_fixtures import parted_folder
from PIL import Image
from safetensors.torch import load_file

from kshot.cli import FAULT, main
from kshot.errors import UserError
from kshot.metrics import MetricsFile
from kshot.module import FewShotModule
from kshot.record import new_directory, owned

LONG = ["--trainer.max_epochs", "5", "--run.save_every", "0"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """A run of five epochs that nothing interrupts."""
    return fit(tmp_path_factory.mktemp("whole"), *LONG, *tiny_clip())


def cut(monkeypatch, root: Path, what, epoch: int = 3, *options: str) -> BaseException:
    """Runs a fit in whose epoch something happens; what it ended with."""
    start = FewShotModule.on_train_epoch_start

    def at_start(self):
        if self.current_epoch == epoch:
            what()
        start(self)

    with monkeypatch.context() as patch:
        patch.setattr(FewShotModule, "on_train_epoch_start", at_start)
        with pytest.raises((SystemExit, ZeroDivisionError)) as end:
            fit(root, *LONG, *tiny_clip(), *options)
    return end.value


def kill(number):
    return lambda: os.kill(os.getpid(), number)


def table(directory: Path) -> list[dict[str, str]]:
    with (directory / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


def same_end(whole: Path, other: Path) -> None:
    a, b = (load_file(each / "tuned.safetensors") for each in (whole, other))
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert table(other) == table(whole)
    results = [json.loads((each / "result.json").read_text()) for each in (whole, other)]
    assert results[0]["acc"] == results[1]["acc"]


@pytest.mark.parametrize(
    ("number", "code", "words"), [(signal.SIGINT, 130, "interrupted."), (signal.SIGTERM, 143, "ended by SIGTERM.")]
)
def test_a_signal_ends_with_its_code_and_the_command_that_goes_on(
    number, code, words, whole, tmp_path, monkeypatch, capsys
):
    handlers = [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)]
    end = cut(monkeypatch, tmp_path, kill(number))
    assert isinstance(end, SystemExit)
    assert end.code == code
    (directory,) = tmp_path.glob("*/*")
    line = capsys.readouterr().err.splitlines()[-1]
    assert line == f"{words} Go on with: python main.py fit --resume {directory}"
    assert [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)] == handlers
    assert not (directory / "result.json").exists()
    main(["fit", "--resume", str(directory)])
    assert list(tmp_path.glob("*/*")) == [directory]
    same_end(whole, directory)


@pytest.mark.parametrize("method", ["promptsrc", "tip_adapter_f"])
def test_a_run_that_ended_while_it_was_tested_needs_no_step_more(method, tmp_path, monkeypatch):
    """What follows the last step is done by who resumes: the mean over epochs is taken, what is left is chosen."""
    options = [*LONG, "--config", f"methods/{method}.yaml", "--trainer.max_epochs", "2", "--data.shots", "4"]
    options += tiny_clip()
    whole = fit(tmp_path / "whole", *options)
    with monkeypatch.context() as patch:
        patch.setattr(FewShotModule, "test_step", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
        with pytest.raises(SystemExit) as end:
            fit(tmp_path / "cut", *options)
    assert end.value.code == 143
    (directory,) = (tmp_path / "cut").glob("*/*")
    (directory / "tuned.safetensors").unlink()
    main(["fit", "--resume", str(directory)])
    same_end(whole, directory)


def test_a_signal_before_anything_is_written(tmp_path, monkeypatch, capsys):
    end = cut(monkeypatch, tmp_path, kill(signal.SIGTERM), 0)
    assert end.code == 143
    assert capsys.readouterr().err.splitlines()[-1] == "ended by SIGTERM."


def test_a_fault_of_ours_leaves_its_traceback_and_where_to_report_it(whole, tmp_path, monkeypatch):
    def fault():
        raise ZeroDivisionError("ours")

    end = cut(monkeypatch, tmp_path, fault)
    assert isinstance(end, ZeroDivisionError)
    (directory,) = tmp_path.glob("*/*")
    assert end.__notes__ == [f"Go on with: python main.py fit --resume {directory}", FAULT]
    monkeypatch.chdir(tmp_path)
    main(["fit", "--config", "clip_16shot.yaml", *QUICK, *LONG, *tiny_clip(), "--run.root", str(tmp_path / "elsewhere"),
          "--ckpt_path", str(directory / "checkpoints" / "last.ckpt")])  # fmt: skip
    assert not (tmp_path / "elsewhere").exists()
    same_end(whole, directory)


def test_a_finished_run_stays_as_it_is(whole, tmp_path):
    before = {path: path.read_bytes() for path in whole.rglob("*") if path.is_file()}
    main(["fit", "--resume", str(whole), "--trainer.max_epochs", "6", "--run.root", str(tmp_path)])
    assert {path: path.read_bytes() for path in whole.rglob("*") if path.is_file()} == before
    (longer,) = tmp_path.glob("*/*")
    assert table(longer)[:5] == table(whole)[:5]
    assert [row["epoch"] for row in table(longer)][:6] == list("012345")


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--trainer.max_epochs", "4"], "come to 5, beyond --trainer.max_epochs 4"),
        (["--data.batch_size", "7"], "data.batch_size 32, and this one has 7"),
        (["--data.shots", "1"], "data.shots 2, and this one has 1"),
        (["--data.split_seed", "2"], "data.split_seed 1, and this one has 2"),
        (["--data.augment", "null"], "data.augment"),
        (["--seed_everything", "2"], "seed_everything 1, and this one has 2"),
        (["--model.optimizer.lr", "0.0021"], "model.optimizer.lr None, and this one has 0.0021"),
        (["--model.optimizer", "SGD"], "model.optimizer"),
        (["--model.schedule", "null"], "model.schedule"),
        (["--model.head_lr", "0.1"], "model.head_lr None, and this one has 0.1"),
        (["--model.adapter.dropout", "0.1"], "model.adapter.dropout 0.0, and this one has 0.1"),
        (["--model.targets", "[text.*.q]"], "model.targets"),
        (["--data.template", "a {}"], "model.templates"),
    ],
)
def test_going_on_as_another_run_is_refused(options, named, whole, tmp_path, capsys):
    line = refused(capsys, ["fit", "--resume", str(whole), "--run.root", str(tmp_path), *options])
    assert named in line
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("words", [["--resume"], ["--resume", "nowhere"], ["--resume=nowhere"]])
def test_nothing_to_resume(words, capsys):
    assert "--resume" in refused(capsys, ["fit", *words])


@pytest.mark.parametrize("refused_by", ["mkdir", "open"])
def test_a_folder_that_may_not_be_written_gets_one_line(refused_by, tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, refused_by, refuse)
    write = partial(new_directory, name="name") if refused_by == "mkdir" else lambda root: owned(root).__enter__()
    with pytest.raises(UserError, match="Permission denied") as error:
        write(tmp_path)
    assert str(tmp_path) in str(error.value)
    assert "\n" not in str(error.value)


def test_two_processes_do_not_write_one_run(whole, tmp_path, capsys):
    with owned(tmp_path), pytest.raises(Exception, match="is being written by another process"), owned(tmp_path):
        pass
    with owned(tmp_path):
        pass


def test_elsewhere_than_in_the_main_thread_signals_are_left_alone():
    ends = []

    def run():
        with pytest.raises(SystemExit) as end:
            main(["fit", "--resume", "nowhere"])
        ends.append(end.value.code)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert ends == [2]


def test_a_directory_that_vanishes_ends_the_run_and_is_not_made_again(tmp_path, monkeypatch, capsys):
    end = cut(monkeypatch, tmp_path, lambda: [shutil.rmtree(each) for each in tmp_path.glob("*/*")], 2)
    assert end.code == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("error: ")
    assert str(tmp_path / "clip_16shot" / "001") in line
    assert "Go on with" not in line
    assert not list(tmp_path.glob("*/*"))


def test_an_overwritten_image_is_noticed_by_who_goes_on(tmp_path, monkeypatch, capsys):
    folder = parted_folder(tmp_path / "pets", {"cat": 2, "dog": 2})
    options = ["--data.dataset", str(folder), "--data.shots", "2"]
    cut(monkeypatch, tmp_path / "runs", kill(signal.SIGTERM), 3, *options)
    (directory,) = (tmp_path / "runs").glob("*/*")
    image = sorted((folder / "train" / "dog").iterdir())[0]
    whole = image.read_bytes()
    Image.new("RGB", (32, 32), (1, 2, 3)).save(image)
    line = refused(capsys, ["fit", "--resume", str(directory)])
    assert f"train/dog/{image.name} is another image" in line
    assert not (directory / "result.json").exists()
    image.write_bytes(whole)
    main(["fit", "--resume", str(directory)])
    assert (directory / "result.json").is_file()


def test_a_missing_test_image_is_told_before_anything_is_trained(tmp_path, capsys):
    folder = parted_folder(tmp_path / "pets", {"cat": 2, "dog": 2})
    parts = [path.relative_to(folder).parts for path in folder.rglob("*.png")] + [("test", "dog", "gone.png")]
    rows = [f"{part}/{label}/{name},{label},{part}" for part, label, name in parts]
    (folder / "all.csv").write_text("\n".join(["path,label,split", *rows]))
    common = ["--data.dataset", str(folder / "all.csv"), "--data.shots", "1", "--run.root", str(tmp_path / "runs")]
    line = refused(capsys, ["fit", "--config", "clip_16shot.yaml", *common])
    assert "1 of 5 test images" in line
    assert "gone.png" in line
    assert not (tmp_path / "runs").exists()


def test_a_test_that_is_cut_short_says_so(whole, tmp_path, capsys):
    main(["test", "--config", str(whole / "config.yaml"), "--ckpt_path", str(whole / "tuned.safetensors"),
          "--run.root", str(tmp_path), "--trainer.limit_test_batches", "1"])  # fmt: skip
    assert "16 of 539 images of test" in capsys.readouterr().out
    (directory,) = tmp_path.glob("*/*")
    result = json.loads((directory / "result.json").read_text())
    assert (result["tested"], result["test_images"]) == ({"test": 16}, {"test": 539})


def test_unreadable_images_are_left_out_with_a_word(tmp_path, capsys):
    folder = parted_folder(tmp_path / "pets", {"cat": 3, "dog": 3})
    sorted((folder / "test" / "dog").iterdir())[0].write_bytes(b"no image")
    main(["fit", "--config", "clip_16shot.yaml", *QUICK, *tiny_clip(), "--data.dataset", str(folder),
          "--data.skip_unreadable", "true", "--run.root", str(tmp_path / "runs")])  # fmt: skip
    (directory,) = (tmp_path / "runs").glob("*/*")
    assert json.loads((directory / "result.json").read_text())["left_out"] == {"test": 1}
    assert "1 unreadable images of test" in capsys.readouterr().out


def measured(directory: Path, root: Path, *options: str) -> dict:
    """What ``test`` finds of a run's small file."""
    files = ["--config", str(directory / "config.yaml"), "--ckpt_path", str(directory / "tuned.safetensors")]
    main(["test", *files, "--run.root", str(root), *options])
    (tested,) = root.glob("*/*")
    return json.loads((tested / "result.json").read_text())


def test_what_is_reported_is_what_the_file_gives(tmp_path):
    """Averaged over epochs and rounded to four bits, both."""
    options = ["--config", "methods/promptsrc.yaml", "--config", "methods/nola.yaml", "--model.adapter.save_bits", "4"]
    options += tiny_clip()
    directory = fit(tmp_path / "fit", *options, "--model.classifier.average_mean", "1")
    result = json.loads((directory / "result.json").read_text())
    assert_same_figures(measured(directory, tmp_path / "test"), result)
    assert result["acc_unrounded"] is not None


@pytest.mark.parametrize(
    ("method", "setting", "there", "here"),
    [
        ("coop", "position", "end", "front"),
        ("linear_probe", "normalize", "True", "false"),
        ("tip_adapter_f", "alpha", "None", "2.0"),
    ],
)
def test_a_classifier_of_other_settings_is_not_the_one_trained(method, setting, there, here, tmp_path, capsys):
    options = ["--config", f"methods/{method}.yaml", "--data.shots", "4", "--run.test", "false", *tiny_clip()]
    directory = fit(tmp_path / "fit", *options)
    files = ["--config", str(directory / "config.yaml"), "--ckpt_path", str(directory / "tuned.safetensors")]
    option = f"--model.classifier.{setting}"
    line = refused(capsys, ["test", *files, option, here, "--run.root", str(tmp_path / "none")])
    assert f"model.classifier.{setting} {there}, and the config {here.title() if here == 'false' else here}" in line
    assert not (tmp_path / "none").exists()


def test_labels_of_files_whose_names_are_no_utf8(whole, tmp_path):
    (tmp_path / "photos").mkdir()
    Image.new("RGB", (32, 32), (1, 2, 3)).save(tmp_path / "photos" / os.fsdecode(b"caf\xe9.png"))
    predict(whole, "--images", tmp_path / "photos", "--out", tmp_path / "found.csv")
    assert b"/caf\xe9.png," in (tmp_path / "found.csv").read_bytes()


class TestMetricsFile:
    def test_a_row_an_epoch(self, tmp_path):
        metrics = MetricsFile()
        metrics.log_metrics({"epoch": 0, "val/acc": 0.5}, step=3)
        metrics.log_metrics({"epoch": 0, "train/loss": 2.0}, step=4)
        metrics.log_metrics({"rate": 0.1}, step=4)
        metrics.save()
        assert list(tmp_path.iterdir()) == []
        metrics.file = tmp_path / "metrics.csv"
        metrics.save()
        metrics.log_metrics({"epoch": 1, "train/loss": 1.0}, step=8)
        metrics.save()
        assert len(table(tmp_path)) == 2, "written a moment ago"
        metrics.finalize("success")
        rows = [{name: value for name, value in row.items() if value} for row in table(tmp_path)]
        assert rows == [
            {"epoch": "0", "step": "4", "val/acc": "0.5", "train/loss": "2.0"},
            {"step": "4", "rate": "0.1"},
            {"epoch": "1", "step": "8", "train/loss": "1.0"},
        ]
