"""The command line end to end, in-process: fit → test → resume → predict, and its processes and help."""

import csv
import io
import json
import logging
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
from command_line import (
    FIT,
    QUICK,
    ROOT,
    TINY_VIT,
    TWO,
    UNTESTED,
    WHOLE,
    assert_same_figures,
    cut_fit,
    fit,
    photos,
    predict,
    refused,
    run_test,
    tiny_clip,
)
from data_fixtures import digit_folder
from processes import finished
from safetensors.torch import load_file

from kshot import commands
from kshot.cli import main
from kshot.module import FewShotModule
from kshot.surroundings import told_to_stderr


def test_fit_leaves_a_complete_record(fitted):
    result = json.loads((fitted / "result.json").read_text())
    for name in (
        "config.yaml",
        "metrics.csv",
        "per_class.csv",
        "split.json",
        "tuned.safetensors",
        "checkpoints/last.ckpt",
    ):
        assert (fitted / name).is_file(), name
    assert result["trainable_parameters"] == sum(
        8 * (i + o) for _ in range(6) for i, o in ((192, 192), (192, 192), (192, 192), (192, 768), (768, 192))
    )
    assert (
        result["checkpoint_bytes"]
        == (fitted / "tuned.safetensors").stat().st_size
        < 4 * result["trainable_parameters"] * 1.1
    )
    assert result["split"]["counts"] == {"train": 20, "val": 20, "test": 539}
    assert result["split"]["digest"] == json.loads((fitted / "split.json").read_text())["digest"]
    rows = list(csv.DictReader((fitted / "per_class.csv").open()))
    assert [row["class_name"] for row in rows][:2] == ["zero", "one"]
    mean = sum(float(row["accuracy"]) for row in rows) / 10
    assert mean == pytest.approx(result["acc_class_mean"], abs=1e-5)
    assert set(result["seconds"]) == {"start", "fit", "test"}
    assert result["peak_memory_bytes"] > 1e8
    assert 0 <= result["ece"] <= 1


def test_the_same_seed_gives_the_same_weights_and_no_run_overwrites_another(fitted, tmp_path):
    again = fit(tmp_path, *UNTESTED)
    stamp = {p: p.stat().st_mtime_ns for p in again.rglob("*")}
    other = fit(tmp_path, *UNTESTED, "--seed_everything", "2")
    assert again != other
    assert {p: p.stat().st_mtime_ns for p in again.rglob("*")} == stamp
    weights = [load_file(d / "tuned.safetensors") for d in (fitted, again, other)]
    assert all(torch.equal(weights[0][k], weights[1][k]) for k in weights[0])
    assert not all(torch.equal(weights[0][k], weights[2][k]) for k in weights[0])


def test_the_manifest_of_a_run_is_accepted_as_input(fitted, tmp_path):
    again = fit(tmp_path, *tiny_clip(), *UNTESTED, "--data.manifest", str(fitted / "split.json"))
    assert (again / "split.json").read_bytes() == (fitted / "split.json").read_bytes()


@pytest.mark.parametrize("file", ["tuned.safetensors", "checkpoints/last.ckpt"])
def test_test_from_a_checkpoint_gives_the_accuracy_of_fit(fitted, file, tmp_path):
    main(
        [
            "test",
            "--config",
            str(fitted / "config.yaml"),
            "--ckpt_path",
            str(fitted / file),
            "--run.root",
            str(tmp_path),
        ]
    )
    (directory,) = tmp_path.glob("*/*")
    ours, theirs = (json.loads((d / "result.json").read_text()) for d in (directory, fitted))
    assert_same_figures(ours, theirs)
    assert ours["acc"] == theirs["acc"]
    assert ours["zero_shot_acc"] == theirs["zero_shot_acc"]
    assert directory.parent.name == "clip_16shot"


def test_checkpoints_load_without_unpickling_code_and_hold_no_frozen_weight(fitted):
    checkpoint = torch.load(fitted / "checkpoints" / "last.ckpt", weights_only=True)
    assert set(checkpoint["state_dict"]) == set(load_file(fitted / "tuned.safetensors"))
    assert all(".adapters." in name for name in checkpoint["state_dict"])
    assert (fitted / "checkpoints" / "last.ckpt").stat().st_size < 3e6


def test_a_checkpoint_rebuilds_its_module_in_a_script(fitted):
    module = FewShotModule.load_from_checkpoint(fitted / "checkpoints" / "last.ckpt", map_location="cpu")
    assert module.method == "TextPrompt + LoRA"
    tuned = load_file(fitted / "tuned.safetensors")
    assert all(torch.equal(value, tuned[name]) for name, value in module.tuned_state().items())
    assert module(torch.zeros(1, 3, 32, 32)).shape == (1, 10)


def test_the_command_line_wins_over_the_checkpoint(fitted, capsys, tmp_path):
    line = refused(capsys, [
        *["test", "--config", "clip_16shot.yaml", "--model.adapter.rank", "3", "--run.root", str(tmp_path)],
        *["--ckpt_path", str(fitted / "checkpoints" / "last.ckpt")],
    ])  # fmt: skip
    assert "model.adapter.rank 8, and the config 3" in line
    assert list(tmp_path.iterdir()) == []


def test_validate_reports_the_few_shot_validation_accuracy(fitted, tmp_path, capsys):
    main(
        [
            *["validate", "--config", str(fitted / "config.yaml"), "--ckpt_path", str(fitted / "tuned.safetensors")],
            *["--run.root", str(tmp_path)],
        ]
    )
    assert "val/acc" in capsys.readouterr().out


def test_predict_labels_a_folder_and_a_list(fitted, tmp_path):
    folder = photos(tmp_path / "photos")
    found = tmp_path / "found.csv"
    predict(fitted, "--images", folder, "--top_k", "3", "--out", found)
    rows = list(csv.DictReader(found.open()))
    assert [row["path"] for row in rows] == sorted(str(p) for p in folder.rglob("*.png"))
    for row in rows:
        probabilities = [float(row[f"probability_{i}"]) for i in (1, 2, 3)]
        assert probabilities == sorted(probabilities, reverse=True)
        assert 0 < sum(probabilities) <= 1.0001
    ranked = [f"{word}_{i}" for i in (1, 2, 3) for word in ("label", "probability")]
    assert list(rows[0]) == ["path", *ranked, "unknown"]
    one = tmp_path / "one.csv"
    predict(fitted, "--images", *sorted(folder.rglob("*.png"))[:2], "--out", one)
    assert len(one.read_text().splitlines()) == 3


def test_a_resumed_run_ends_with_the_same_bits(tmp_path, monkeypatch):
    options = ["--trainer.max_epochs", "4", "--run.save_every", "0", "--data.batch_size", "8", *UNTESTED, *tiny_clip()]
    options += ["--model.adapter.dropout", "0.3"]
    whole = fit(tmp_path / "whole", *options)
    cut = cut_fit(monkeypatch, 2, tmp_path / "cut", *options)
    assert not (cut / "tuned.safetensors").exists()
    main([*FIT, *QUICK, *options, "--ckpt_path", str(cut / "checkpoints" / "last.ckpt")])
    a, b = (load_file(d / "tuned.safetensors") for d in (whole, cut))
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)
    losses = [
        [row["train/loss"] for row in csv.DictReader((d / "metrics.csv").open()) if row["train/loss"]]
        for d in (whole, cut)
    ]
    assert losses[0] == losses[1]


@pytest.fixture(scope="module")
def whole_runs(tmp_path_factory, few_scans) -> Callable[[str], tuple[Path, list[str]]]:
    """A run of a method with phases that nothing interrupts, made once, and its options."""

    @cache
    def whole(method: str) -> tuple[Path, list[str]]:
        options = ["--config", f"methods/{method}.yaml", "--trainer.max_epochs", "6", "--run.save_every", "0"]
        options += ["--data.batch_size", "3", *few_scans, *tiny_clip(), "--model.targets", "[image.*]"]
        options += ["--model.adapter.search_steps", "3"] * (method == "autolora")
        return fit(tmp_path_factory.mktemp("whole"), *options), options

    return whole


@pytest.mark.parametrize(("method", "cut_at"), [("adalora", 1), ("adalora", 5), ("autolora", 2)])
def test_methods_with_phases_resume_to_the_same_bits(method, cut_at, whole_runs, tmp_path, monkeypatch):
    """AdaLoRA before and after its ranks are fixed; AutoLoRA after its search, which is not repeated."""
    whole, options = whole_runs(method)
    cut = cut_fit(monkeypatch, cut_at, tmp_path / "cut", *options)
    if method == "autolora":
        monkeypatch.setattr("kshot.adapters.autolora.hypergradient", lambda *_: pytest.fail("searched again"))
    main([*FIT, *QUICK, *options, "--ckpt_path", str(cut / "checkpoints" / "last.ckpt")])
    a, b = (load_file(d / "tuned.safetensors") for d in (whole, cut))
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)
    results = [json.loads((d / "result.json").read_text()) for d in (whole, cut)]
    assert results[0]["ranks"] == results[1]["ranks"]
    ranks = results[0]["ranks"].values()
    assert len(ranks) == 12
    assert (sum(ranks) == 8 * 12) if method == "adalora" else (1 <= min(ranks) <= max(ranks) <= 8)
    tested = run_test(whole, tmp_path / "tested")
    assert tested["acc"] == results[0]["acc"]


@pytest.mark.parametrize("bits", [16, 8, 4])
def test_nola_stores_few_bits_and_tests_what_it_stored(bits, tmp_path, few_scans):
    options = ["--config", "methods/nola.yaml", "--model.adapter.save_bits", str(bits), "--trainer.max_epochs", "3"]
    directory = fit(tmp_path, *options, *few_scans, *tiny_clip())
    result = json.loads((directory / "result.json").read_text())
    assert result["acc_unrounded"] is not None
    coefficients = 10 * 2 * 1024
    stored = load_file(directory / "tuned.safetensors")
    assert abs(sum(t.nbytes for t in stored.values()) - coefficients * bits / 8) <= 10 * 2 * 4
    assert_same_figures(run_test(directory, tmp_path / "tested"), result)


@pytest.mark.parametrize("method", ["vera", "randlora", "nola", "pranc"])
def test_coefficients_of_another_basis_are_refused(method, tmp_path, capsys, few_scans):
    directory = fit(
        tmp_path, "--config", f"methods/{method}.yaml", "--trainer.max_epochs", "1", *few_scans, *tiny_clip()
    )
    size = (directory / "tuned.safetensors").stat().st_size
    result = json.loads((directory / "result.json").read_text())
    assert size < 4 * result["trainable_parameters"] + 15_000, "no basis in the file"
    line = refused(capsys, [
        *["test", "--config", str(directory / "config.yaml"), "--run.root", str(tmp_path / "none")],
        *["--ckpt_path", str(directory / "tuned.safetensors"), "--model.adapter.seed", "2"],
    ])  # fmt: skip
    assert "model.adapter.seed 1, and the config 2" in line
    assert not (tmp_path / "none").exists()


def test_a_run_counted_in_steps_leaves_its_last_step(tmp_path):
    steps = ["--trainer.max_epochs", "null", "--trainer.max_steps", "5", "--run.save_every", "1000"]
    directory = fit(tmp_path, *steps, *UNTESTED, *tiny_clip())
    assert torch.load(directory / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == 5


def test_a_full_disk_costs_neither_the_previous_checkpoint_nor_a_traceback(tmp_path, monkeypatch, capsys):
    save, saved = torch.save, []

    def full(obj, file, *rest, **options):
        saved.append(file)
        if len(saved) > 1:
            Path(file).write_bytes(b"half")
            raise OSError(28, "No space left on device")
        save(obj, file, *rest, **options)

    monkeypatch.setattr(torch, "save", full)
    line = refused(capsys, [
        *[*FIT, *QUICK, *tiny_clip(), "--run.root", str(tmp_path), "--run.save_every", "0"],
    ])  # fmt: skip
    assert "No space left" in line
    assert "the one there before is kept" in line
    (last,) = tmp_path.rglob("last.ckpt")
    assert torch.load(last, weights_only=True)["epoch"] == 0
    assert not list(tmp_path.rglob("*.partial"))


def test_a_disk_too_full_for_the_split_gets_one_line(tmp_path, monkeypatch, capsys):
    write = Path.write_bytes

    def full(self, content):
        if "split.json" in self.name:
            raise OSError(28, "No space left on device")
        write(self, content)

    monkeypatch.setattr(Path, "write_bytes", full)
    line = refused(capsys, ["fit", "--config", "clip_16shot.yaml", *QUICK, *tiny_clip(), "--run.root", str(tmp_path)])
    assert "split.json" in line
    assert "No space left" in line
    assert not list(tmp_path.rglob("*.partial"))


def test_feature_caching_changes_nothing_but_the_time(tmp_path):
    common = ["--config", "methods/coop.yaml", "--trainer.max_epochs", "3", *UNTESTED, *tiny_clip()]
    runs = [fit(tmp_path, *common, "--model.cache_features", flag) for flag in ("true", "false")]
    weights = [load_file(d / "tuned.safetensors") for d in runs]
    assert all(torch.allclose(weights[0][k], weights[1][k], atol=1e-6) for k in weights[0])


STOPPING = json.dumps([{"class_path": "EarlyStopping", "init_args": {"monitor": "val/acc", "mode": "max"}}])


@pytest.mark.parametrize(
    ("options", "epochs"),
    [
        ([], 0),
        (["--trainer.check_val_every_n_epoch", "2"], 1),
        (["--trainer.val_check_interval", "1.0"], 2),
        (["--trainer.callbacks", STOPPING], 2),
    ],
)
def test_validation_in_training_waits_until_something_is_decided_by_it(options, epochs, tmp_path):
    rows = list(csv.DictReader((fit(tmp_path, *options, *UNTESTED, *tiny_clip()) / "metrics.csv").open()))
    assert sum(bool(row.get("val/acc")) for row in rows) == epochs


def test_the_log_is_written_for_the_length_of_a_run_and_left_as_it_was(monkeypatch, capsys):
    log, own = logging.getLogger("kshot"), logging.StreamHandler(io.StringIO())
    monkeypatch.setattr(log, "handlers", [own])
    read = commands.read_command_line

    def tells(*given):
        log.info("told")
        return read(*given)

    monkeypatch.setattr(commands, "read_command_line", tells)
    for _ in range(2):
        with pytest.raises(SystemExit):
            main([*FIT, "--print_config"])
        log.info("nobody asked")
        assert capsys.readouterr().err == "told\n"
        assert log.handlers == [own]
    assert own.stream.getvalue() == 2 * "told\n"


def test_words_come_once_where_a_library_logs_without_a_name(capsys, monkeypatch):
    """Which makes a handler that would write them again."""
    monkeypatch.setattr(logging.root, "handlers", [])
    with told_to_stderr():
        logging.warning("of a library")
        logging.getLogger("kshot").info("of kshot")
    assert sorted(capsys.readouterr().err.split("\n")) == ["", "of a library", "of kshot"]
    assert logging.root.handlers == []


def test_the_words_of_the_process_are_left_alone(tmp_path, monkeypatch):
    """A launcher starts other processes by them."""
    words = ["main.py", *FIT, "--x"]
    monkeypatch.setattr(sys, "argv", words)
    seen = []
    monkeypatch.setattr(FewShotModule, "on_train_epoch_start", lambda self: seen.append(list(sys.argv)))
    fit(tmp_path, *UNTESTED, *tiny_clip())
    assert seen == 2 * [words]


def test_recorded_views_are_encoded_once_each(tmp_path, tmp_path_factory, monkeypatch):
    from kshot.backbones import OpenClip

    encoded, encode = [], OpenClip.encode_normalised

    def count(self, image):
        encoded.append(len(image))
        return encode(self, image)

    monkeypatch.setattr(OpenClip, "encode_normalised", count)
    monkeypatch.setenv("KSHOT_CACHE", str(tmp_path_factory.mktemp("cache")))
    options = ["--config", "methods/coop.yaml", "--trainer.max_epochs", "6", "--data.augment", "CropFlip"]
    fit(tmp_path, *options, "--data.views", "3", *UNTESTED, *tiny_clip())
    assert sum(encoded) == 3 * 20 + 2  # three views of 20 shots, 2 images of the step that is tried


def test_image_only_backbone_trains_adapter_and_head(tmp_path):
    directory = fit(tmp_path, "--config", "methods/linear_probe.yaml", "--model.adapter", "LoRA", *TINY_VIT)
    result = json.loads((directory / "result.json").read_text())
    assert result["zero_shot_acc"] is None
    assert result["method"] == "LinearProbe + LoRA"
    assert result["head_start"]["from"] == "ridge"
    assert result["head_start"]["scale"] > 0


@pytest.mark.slow  # .ci/run runs it by itself
def test_the_readme_command_ends_with_the_table(tmp_path):
    command = [sys.executable, "main.py", "fit", "--config", "clip_16shot.yaml", "--run.root", str(tmp_path)]
    done = finished(command, timeout=300, cwd=ROOT)
    for line in ("zero-shot accuracy", "adapted accuracy", "trainable parameters", "seconds", "results"):
        assert line in done.stdout
    result = json.loads(next(tmp_path.rglob("result.json")).read_text())
    assert result["zero_shot_acc"] >= 0.6
    assert result["acc"] >= 0.94
    assert "Epoch 39" in done.stdout + done.stderr  # the progress bar


@pytest.mark.parametrize(
    "launcher",
    [
        [],
        pytest.param(  # what it gives its processes is given in test_several_devices.py
            ["-m", "torch.distributed.run", "--nproc_per_node", "2"], marks=pytest.mark.slow
        ),
    ],
)
def test_several_processes_leave_one_run_and_one_table(launcher, tmp_path):
    folder = digit_folder(tmp_path / "scans", train=2, test=7)
    arguments = [*FIT, *TWO, *WHOLE, "--model.targets", '["image.5.*"]', "--run.root", str(tmp_path / "runs")]
    arguments += ["--data.dataset", str(folder)]
    done = finished([sys.executable, *launcher, str(ROOT / "main.py"), *arguments], cwd=tmp_path)
    assert done.stdout.count("adapted accuracy") == 1
    (directory,) = (tmp_path / "runs").glob("*/*")
    assert json.loads((directory / "result.json").read_text())["tested"] == {"test": 21}
    assert torch.load(directory / "checkpoints" / "last.ckpt", weights_only=True)["epoch"] == 1


def test_prediction_is_refused_on_several_devices(fitted, tmp_path, capsys):
    arguments = ["predict", "--run", str(fitted), "--images", str(photos(tmp_path, 1)), *TWO[:6]]
    assert "predict writes one file, and runs on one device" in refused(capsys, arguments)


@pytest.mark.gpu
@pytest.mark.parametrize("method", ["lora", "coop", "class_mean"])
def test_methods_run_on_a_gpu(method, tmp_path):
    directory = fit(tmp_path, "--config", f"methods/{method}.yaml", "--trainer.accelerator", "gpu")
    result = json.loads((directory / "result.json").read_text())
    assert result["device"] != "cpu"
    assert result["acc"] > 0.5


def test_an_unknown_command_names_those_there_are(capsys):
    line = refused(capsys, ["fitt", "--config", "clip_16shot.yaml"])
    for command in ("fit", "validate", "test", "predict"):
        assert command in line


def test_short_help_needs_no_torch(capsys):
    done = finished([sys.executable, "-X", "importtime", "main.py", "--help"], cwd=ROOT)
    assert "fit" in done.stdout
    loaded = {line.rsplit("|", 1)[-1].strip().partition(".")[0] for line in done.stderr.splitlines()}
    assert "kshot" in loaded
    assert not loaded & {"torch", "numpy", "lightning", "jsonargparse"}
    main([])
    assert "usage:" in capsys.readouterr().out


@pytest.mark.parametrize("command", ["fit", "predict"])
def test_full_help_lists_options(command, capsys):
    with pytest.raises(SystemExit) as exit_code:
        main([command, "--help"])
    assert exit_code.value.code == 0
    out = capsys.readouterr().out
    assert ("--run.root" in out) == (command == "fit")
    assert ("--images" in out) == ("--run RUN" in out) == (command == "predict")
