"""The command line end to end, in-process: configs, fit → test → resume → predict, and every refusal."""

import csv
import json
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from kshot.cli import main
from kshot.files import packaged_folder
from kshot.module import FewShotModule

ROOT = Path(__file__).parents[1]
TINY_VIT = ["--model.backbone", "Timm", "--model.backbone.model", "test_vit", "--model.backbone.weights", "random"]
FOLDER = packaged_folder("configs")
CONFIGS = sorted(p.relative_to(FOLDER).as_posix() for p in FOLDER.rglob("*.yaml"))
METHODS = [name for name in CONFIGS if name.startswith("methods/")]
EXPERIMENTS = [name for name in CONFIGS if not name.startswith("methods/")]
QUICK = ["--trainer.max_epochs", "2", "--trainer.enable_progress_bar", "false", "--data.shots", "2"]
QUICK += ["--trainer.limit_test_batches", "1"]  # 128 of the 539 test scans
WHOLE = ["--trainer.limit_test_batches", "1.0"]


def fit(root: Path, *options: str) -> Path:
    """Runs a short fit of the default config and returns its directory."""
    before = set(root.glob("*/*"))
    main(["fit", "--config", "clip_16shot.yaml", *QUICK, "--run.root", str(root), *options])
    (new,) = set(root.glob("*/*")) - before
    return new


def refused(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> str:
    """Runs a command line that must fail with exit code 2, and returns its one line."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit_code:
        main(arguments)
    assert exit_code.value.code == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith("error: ")
    return lines[0]


@pytest.fixture(scope="module")
def fitted(tmp_path_factory) -> Path:
    return fit(tmp_path_factory.mktemp("runs"), *WHOLE)


def photos(folder: Path, count: int = 5) -> Path:
    generator = torch.Generator().manual_seed(0)
    for i in range(count):
        pixels = torch.randint(0, 256, (40 + i, 48, 3), dtype=torch.uint8, generator=generator)
        path = folder / f"sub{i % 2}" / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.numpy()).save(path)
    return folder


# ---------------------------------------------------------------------------------------------------- configs


@pytest.mark.parametrize("config", EXPERIMENTS)
def test_every_config_parses(config, capsys):
    with pytest.raises(SystemExit) as exit_code:
        main(["fit", "--config", config, "--print_config"])
    assert exit_code.value.code == 0
    assert "class_path: " in capsys.readouterr().out


@pytest.mark.parametrize("config", EXPERIMENTS)
def test_every_experiment_runs_with_a_small_backbone(config, tmp_path):
    text = "OpenClip" in (FOLDER / config).read_text()
    small = ["model", "kshot:glyph_clip", "pretrained", "null", "image_size", "null"]
    if not text:
        small = ["model", "test_vit", "weights", "random", "image_size", "null"]
    overrides = [f"--model.backbone.{a}" if i % 2 == 0 else a for i, a in enumerate(small)]
    main(
        [
            *["fit", "--config", config, *overrides, "--data.dataset", "digits", "--data.num_workers", "0"],
            *["--trainer.fast_dev_run", "true", "--trainer.precision", "32-true", "--run.root", str(tmp_path)],
        ]
    )
    assert list(tmp_path.iterdir()) == []  # a fast_dev_run leaves nothing behind


WITHOUT_GRADIENT = {"zero_shot", "class_mean", "tip_adapter", "lp_plus_plus", "linear_probe_lbfgs"}


@pytest.mark.parametrize("method", METHODS)
def test_every_method_layers_over_the_default(method, tmp_path):
    directory = fit(tmp_path, "--config", method, "--trainer.max_epochs", "2")
    assert directory.parent.name == f"clip_16shot+{Path(method).stem}"
    result = json.loads((directory / "result.json").read_text())
    assert 0 < result["acc"] <= 1
    assert result["zero_shot_acc"] > 0.55
    assert (result["trainable_parameters"] > 0) == (Path(method).stem not in WITHOUT_GRADIENT)
    if Path(method).stem != "zero_shot":
        assert run_test(directory, tmp_path / "tested")["acc"] == result["acc"]


WEIGHT_TUNING = [m for m in METHODS if "adapter: null" not in (FOLDER / m).read_text()]


@pytest.mark.parametrize(
    ("method", "head"), [(m, ("LinearProbe", "NearestClassMean")[i % 2]) for i, m in enumerate(WEIGHT_TUNING)]
)
def test_every_weight_tuning_method_layers_over_an_image_backbone(method, head, tmp_path):
    trainable = ["--model.classifier.trainable", "true"] if head == "NearestClassMean" else []
    main(
        [
            *["fit", "--config", "dinov2_vits14_16shot.yaml", "--config", method, *QUICK, *TINY_VIT],
            *["--model.backbone.image_size", "null", "--model.classifier", head, *trainable],
            *["--run.root", str(tmp_path), "--trainer.max_epochs", "3"],  # steps: enough for AdaLoRA to prune in
        ]
    )
    (directory,) = tmp_path.glob("*/*")
    result = json.loads((directory / "result.json").read_text())
    assert result["method"].startswith(f"{head} + ")
    assert result["adapter"]["lr"] > 0
    assert result["trainable_parameters"] > 0


NO_TEXT_NEEDED = {"class_mean", "linear_probe", "linear_probe_lbfgs", "vpt"}


@pytest.mark.parametrize("method", [m for m in METHODS if m not in WEIGHT_TUNING])
def test_every_other_method_runs_on_an_image_backbone_or_says_why_not(method, tmp_path, capsys):
    arguments = ["fit", "--config", "dinov2_vits14_16shot.yaml", "--config", method, *QUICK, *TINY_VIT]
    arguments += ["--model.backbone.image_size", "null", "--run.root", str(tmp_path), "--trainer.max_epochs", "1"]
    if Path(method).stem in NO_TEXT_NEEDED:
        main(arguments)
        (directory,) = tmp_path.glob("*/*")
        assert json.loads((directory / "result.json").read_text())["acc"] > 0
    else:
        assert "needs a text tower, and test_vit has none" in refused(capsys, arguments)
        assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["clip_16shot", "clip_16shot.yaml", str(FOLDER / "clip_16shot.yaml"), "methods/lora"])
def test_config_names_resolve_from_any_directory(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    first = [] if name.startswith("methods") is False else ["--config", "clip_16shot"]
    with pytest.raises(SystemExit):
        main(["fit", *first, "--config", name, "--print_config"])
    assert "kshot:glyph_clip" in capsys.readouterr().out


@pytest.mark.parametrize(
    "options",
    [
        ["--config", "methods/coop.yaml", "--config", "methods/promptsrc.yaml"],
        ["--config", "methods/coop.yaml", "--model.classifier", "PromptSRC"],
        ["--config", "methods/dept.yaml", "--model.classifier.base", "PromptSRC"],
    ],
)
def test_a_classifier_that_replaces_another_starts_from_its_own_defaults(options, capsys):
    with pytest.raises(SystemExit):
        main(["fit", "--config", "clip_16shot.yaml", *options, "--print_config"])
    chosen = capsys.readouterr().out.split("PromptSRC\n")[1]
    assert re.search(r"context_length: null\s+init_words: a photo of a\s+prompt_length: 4\s+depth: null", chosen)


def test_the_same_class_named_again_keeps_its_settings_and_other_kinds_keep_what_fits(capsys):
    options = ["--config", "methods/coop.yaml", "--model.classifier", "CoOp", "--model.optimizer", "torch.optim.Adam"]
    with pytest.raises(SystemExit):
        main(["fit", "--config", "clip_16shot.yaml", *options, "--print_config"])
    out = capsys.readouterr().out
    assert "context_length: 16" in out
    assert re.search(r"class_path: torch.optim.Adam\s+init_args:\s+lr: 0.002\n", out)


def test_a_local_file_wins_over_configs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    own = (FOLDER / "clip_16shot.yaml").read_text().replace("max_epochs: 40", "max_epochs: 7")
    Path("clip_16shot.yaml").write_text(own)
    with pytest.raises(SystemExit):
        main(["fit", "--config", "clip_16shot.yaml", "--print_config"])
    assert "max_epochs: 7" in capsys.readouterr().out


# ---------------------------------------------------------------------------------------------------- one run


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


def test_runs_never_overwrite_each_other(fitted, tmp_path):
    first = fit(tmp_path)
    stamp = {p: p.stat().st_mtime_ns for p in first.rglob("*")}
    second = fit(tmp_path)
    assert first != second
    assert {p: p.stat().st_mtime_ns for p in first.rglob("*")} == stamp


def test_the_same_seed_gives_the_same_weights_and_another_does_not(fitted, tmp_path):
    again, other = fit(tmp_path), fit(tmp_path, "--seed_everything", "2")
    weights = [load_file(d / "tuned.safetensors") for d in (fitted, again, other)]
    assert all(torch.equal(weights[0][k], weights[1][k]) for k in weights[0])
    assert not all(torch.equal(weights[0][k], weights[2][k]) for k in weights[0])


def test_the_manifest_of_a_run_is_accepted_as_input(fitted, tmp_path):
    again = fit(tmp_path, "--data.manifest", str(fitted / "split.json"))
    digests = [json.loads((d / "result.json").read_text())["split"]["digest"] for d in (fitted, again)]
    assert digests[0] == digests[1]


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
    assert "adapter has rank 8, and the config's has 3" in line
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
    common = ["predict", "--config", "clip_16shot.yaml", "--ckpt_path", str(fitted / "tuned.safetensors")]
    main([*common, "--images", str(folder), "--run.root", str(tmp_path / "runs"), "--top_k", "3"])
    (found,) = (tmp_path / "runs").rglob("predictions.csv")
    rows = list(csv.DictReader(found.open()))
    assert [row["path"] for row in rows] == sorted(str(p) for p in folder.rglob("*.png"))
    for row in rows:
        probabilities = [float(row[f"probability_{i}"]) for i in (1, 2, 3)]
        assert probabilities == sorted(probabilities, reverse=True)
        assert 0 < sum(probabilities) <= 1.0001
    assert list(rows[0]) == [f"{w}{i}" for i in ("", *"123") for w in (("label_", "probability_") if i else ("path",))]
    one = tmp_path / "one.csv"
    files = json.dumps([str(p) for p in sorted(folder.rglob("*.png"))[:2]])
    main([*common, "--images", files, "--out", str(one), "--run.root", str(tmp_path / "runs")])
    assert len(one.read_text().splitlines()) == 3


def test_a_resumed_run_ends_with_the_same_bits(tmp_path, monkeypatch):
    options = [
        "--trainer.max_epochs",
        "4",
        "--model.adapter.dropout",
        "0.3",
        "--run.save_every",
        "0",
        "--data.shots",
        "8",
    ]
    whole = fit(tmp_path / "whole", *options)
    start = FewShotModule.on_train_epoch_start

    def power_cut(self):
        if self.current_epoch == 2:
            raise RuntimeError("power cut")
        start(self)

    monkeypatch.setattr(FewShotModule, "on_train_epoch_start", power_cut)
    with pytest.raises(RuntimeError, match="power cut"):
        fit(tmp_path / "cut", *options)
    monkeypatch.undo()
    (cut,) = (tmp_path / "cut").glob("*/*")
    assert not (cut / "tuned.safetensors").exists()
    resumed = fit(tmp_path / "resumed", *options, "--ckpt_path", str(cut / "checkpoints" / "last.ckpt"))
    a, b = (load_file(d / "tuned.safetensors") for d in (whole, resumed))
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)
    losses = [
        [row["train/loss"] for row in csv.DictReader((d / "metrics.csv").open()) if row["train/loss"]]
        for d in (whole, resumed)
    ]
    assert losses[0][2:] == losses[1]


@pytest.mark.parametrize(("method", "cut_at"), [("adalora", 1), ("adalora", 5), ("autolora", 2)])
def test_methods_with_phases_resume_to_the_same_bits(method, cut_at, tmp_path, monkeypatch):
    """AdaLoRA before and after its ranks are fixed; AutoLoRA after its search, which is not repeated."""
    options = ["--config", f"methods/{method}.yaml", "--trainer.max_epochs", "6", "--run.save_every", "0"]
    options += ["--data.shots", "8", "--data.views", "2"]
    whole = fit(tmp_path / "whole", *options)
    start = FewShotModule.on_train_epoch_start

    def power_cut(self):
        if self.current_epoch == cut_at:
            raise RuntimeError("power cut")
        start(self)

    monkeypatch.setattr(FewShotModule, "on_train_epoch_start", power_cut)
    with pytest.raises(RuntimeError, match="power cut"):
        fit(tmp_path / "cut", *options)
    monkeypatch.undo()
    (cut,) = (tmp_path / "cut").glob("*/*")
    if method == "autolora":
        monkeypatch.setattr("kshot.adapters.autolora.hypergradient", lambda *_: pytest.fail("searched again"))
    resumed = fit(tmp_path / "resumed", *options, "--ckpt_path", str(cut / "checkpoints" / "last.ckpt"))
    a, b = (load_file(d / "tuned.safetensors") for d in (whole, resumed))
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)
    results = [json.loads((d / "result.json").read_text()) for d in (whole, resumed)]
    assert results[0]["ranks"] == results[1]["ranks"]
    ranks = results[0]["ranks"].values()
    assert len(ranks) == 30
    assert (sum(ranks) == 8 * 30) if method == "adalora" else (1 <= min(ranks) <= max(ranks) <= 8)
    tested = run_test(whole, tmp_path / "tested")
    assert tested["acc"] == results[0]["acc"]


def run_test(directory: Path, root: Path) -> dict:
    """Measures a finished run's small file in a run of its own."""
    config, weights = str(directory / "config.yaml"), str(directory / "tuned.safetensors")
    main(["test", "--config", config, "--ckpt_path", weights, "--run.root", str(root)])
    (tested,) = root.glob("*/*")
    return json.loads((tested / "result.json").read_text())


@pytest.mark.parametrize("bits", [16, 8, 4])
def test_nola_stores_few_bits_and_tests_what_it_stored(bits, tmp_path):
    options = ["--config", "methods/nola.yaml", "--model.adapter.save_bits", str(bits), "--trainer.max_epochs", "3"]
    directory = fit(tmp_path, *options)
    result = json.loads((directory / "result.json").read_text())
    assert result["acc_unrounded"] is not None
    coefficients = 30 * 2 * 1024
    stored = load_file(directory / "tuned.safetensors")
    assert abs(sum(t.nbytes for t in stored.values()) - coefficients * bits / 8) <= 30 * 2 * 4
    assert run_test(directory, tmp_path / "tested")["acc"] == result["acc"]


@pytest.mark.parametrize("method", ["vera", "randlora", "nola", "pranc"])
def test_coefficients_of_another_basis_are_refused(method, tmp_path, capsys):
    directory = fit(tmp_path, "--config", f"methods/{method}.yaml", "--trainer.max_epochs", "1")
    size = (directory / "tuned.safetensors").stat().st_size
    result = json.loads((directory / "result.json").read_text())
    assert size < 4 * result["trainable_parameters"] + 40_000, "no basis in the file"
    line = refused(capsys, [
        *["test", "--config", str(directory / "config.yaml"), "--run.root", str(tmp_path / "none")],
        *["--ckpt_path", str(directory / "tuned.safetensors"), "--model.adapter.seed", "2"],
    ])  # fmt: skip
    assert "seed 1, and the config's has 2" in line
    assert not (tmp_path / "none").exists()


def test_a_run_counted_in_steps_leaves_its_last_step(tmp_path):
    directory = fit(tmp_path, "--trainer.max_epochs", "null", "--trainer.max_steps", "5", "--run.save_every", "1000")
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
        *["fit", "--config", "clip_16shot.yaml", *QUICK, "--run.root", str(tmp_path), "--run.save_every", "0"],
    ])  # fmt: skip
    assert "No space left" in line
    assert "the one there before is kept" in line
    (last,) = tmp_path.rglob("last.ckpt")
    assert torch.load(last, weights_only=True)["epoch"] == 0
    assert not list(tmp_path.rglob("*.partial"))


def test_a_disk_too_full_for_the_split_gets_one_line(tmp_path, monkeypatch, capsys):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    line = refused(capsys, ["fit", "--config", "clip_16shot.yaml", *QUICK, "--run.root", str(tmp_path)])
    assert "split.json" in line
    assert "No space left" in line
    assert not list(tmp_path.rglob("*.partial"))


def test_feature_caching_changes_nothing_but_the_time(tmp_path):
    common = ["--config", "methods/coop.yaml", "--trainer.max_epochs", "3"]
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
    rows = list(csv.DictReader((fit(tmp_path, *options, "--run.test", "false") / "metrics.csv").open()))
    assert sum(bool(row.get("val/acc")) for row in rows) == epochs


def test_the_words_of_the_process_are_left_alone(tmp_path, monkeypatch):
    """A launcher starts other processes by them."""
    words = ["main.py", *FIT, "--x"]
    monkeypatch.setattr(sys, "argv", words)
    seen = []
    monkeypatch.setattr(FewShotModule, "on_train_epoch_start", lambda self: seen.append(list(sys.argv)))
    fit(tmp_path, "--run.test", "false")
    assert seen == 2 * [words]


def test_an_interrupted_run_ends_with_130(tmp_path, monkeypatch, capsys):
    def interrupt(self):
        raise KeyboardInterrupt

    monkeypatch.setattr(FewShotModule, "on_train_epoch_start", interrupt)
    monkeypatch.setattr("signal.signal", lambda *_: None)  # Lightning ignores further ones
    with pytest.raises(SystemExit) as end:
        fit(tmp_path)
    assert end.value.code == 130
    assert capsys.readouterr().err.splitlines()[-1] == "interrupted"


def test_recorded_views_are_encoded_once_each(tmp_path, monkeypatch):
    from kshot.backbones import OpenClip

    encoded, encode = [], OpenClip.encode_normalised

    def count(self, image):
        encoded.append(len(image))
        return encode(self, image)

    monkeypatch.setattr(OpenClip, "encode_normalised", count)
    fit(tmp_path, *["--config", "methods/coop.yaml", "--trainer.max_epochs", "6", "--data.augment", "CropFlip"],
        *["--data.views", "3", "--run.test", "false"])  # fmt: skip
    assert sum(encoded) == 3 * 20 + 2  # three views of 20 shots, 2 images of the step that is tried


def test_image_only_backbone_trains_adapter_and_head(tmp_path):
    directory = fit(tmp_path, "--config", "methods/linear_probe.yaml", "--model.adapter", "LoRA", *TINY_VIT)
    result = json.loads((directory / "result.json").read_text())
    assert result["zero_shot_acc"] is None
    assert result["method"] == "LinearProbe + LoRA"


# ---------------------------------------------------------------------------------------------------- refusals

FIT = ["fit", "--config", "clip_16shot.yaml"]


REFUSALS = {
    "--model.backbone OpenCip": "Did you mean 'OpenClip'?",
    "--model.backbone.model kshot:glyph": "Did you mean 'kshot:glyph_clip'?",
    "--model.backbone.model ViT-B-17": "Did you mean 'ViT-B-16'?",
    "--model.backbone.model ViT-B-16": "no weights named",
    "--model.backbone.model ViT-B-16 --model.backbone.pretrained openai": "use model: ViT-B-16-quickgelu",
    "--model.backbone.model ViT-B-16 --model.backbone.pretrained opnai": "Did you mean 'openai'?",
    "--model.backbone.image_size 33": "use 32 or 40",
    "--data.image_size 64": "set it on the backbone",
    "--model.adapter LoRAA": "Did you mean 'LoRA'?",
    "--model.adapter.rnak 3": "Did you mean 'rank'?",
    "--model.adapter.rank many": "Got value: many",
    "--model.adapter.rank 0": "must be at least 1",
    "--model.adapter.rank 1000": "larger than the smaller side, 192, of the slot image.0.q",
    "--model.adapter.alpha -2": "alpha is -2.0, and must be a positive number",
    "--model.adapter.alpha .nan": "alpha is nan, and must be a positive number",
    "--model.adapter.path svd": "path is svd, and must be one of auto, factorised, materialised",
    "--model.targets [image.0.qkv,image.0.q]": "are the same rows",
    "--config methods/adalora.yaml --model.adapter.target_rank 20": "target_rank is 20",
    "--config methods/adalora.yaml --model.adapter.initial_steps 900": "the run has 200 steps",
    "--config methods/autolora.yaml --data.shots 1": "has one training image",
    "--config methods/nola.yaml --model.adapter.bases 900000000": "lower bases or rank",
    "--config methods/nola.yaml --model.adapter.save_bits 5": "save_bits",
    "--config methods/lora_xs.yaml --model.adapter.rank 193": "the smaller side, 192, of the slot image.0.q",
    "--config methods/svft.yaml --model.adapter.pattern top_k": "needs square weights, and image.0.fc1",
    "--config methods/vera.yaml --model.adapter.seed -1": "seed is -1",
    "--config methods/pranc.yaml --model.adapter.coefficients 0": "coefficients is 0",
    "--model.classifier CoOpp": "Did you mean 'CoOp'?",
    "--model.targets [image.*.qq]": "image.0.q, image.0.k",
    "--data.dataset digts": "Did you mean 'digits'?",
    "--data.dataset no/such/folder": "no/such/folder",
    "--data.shots 500": "--data.allow_fewer true",
    "--data.shots 0": "shots",
    "--data.template hello": "{}",
    "--data.shot 3": "Did you mean 'shots'?",
    "--fooo 3": "'--fooo'",
    "--trainer.strategy nope": "trainer.strategy: there is no 'nope'",
    "--trainer.devices 0": "trainer.devices is 0, and must be",
    "--trainer.accelerator tpu": "trainer.accelerator is tpu, and on this machine it may be",
    "--trainer.precision 12": "trainer.precision: Expected",
    "--ckpt_path best": "There is no checkpoint best",
    "--ckpt_path nope.ckpt": "There is no checkpoint nope.ckpt",
    "--config clip_16shoot": "Did you mean 'clip_16shot.yaml'?",
    "--config methods/linear_probe.yaml --model.adapter LoRA --model.targets [text.2.o]": "no gradient",
    "--config methods/coop.yaml --model.classifier.init_words photo": "give one of the two",
    "--config methods/coop.yaml --model.classifier.context_length 60": "the class 'zero' has 1 tokens, and with 60",
    "--config methods/coop.yaml --model.classifier.class_specific true --data.protocol base-to-new": "class-specific",
    "--config methods/promptsrc.yaml --model.classifier.depth 9": "the text tower has 3 blocks: give 1 to 3",
    "--config methods/maple.yaml --model.classifier.context_length 5": "give one of the two",
    "--config methods/dept.yaml --model.classifier.base LinearProbe": "DePT needs a base that learns prompts",
    "--config methods/dept.yaml --model.classifier.balance 2": "balance is 2.0, and must lie in [0, 1]",
    "--config methods/vpt.yaml --model.classifier.head NearestClassMean": "has a closed form: use LinearProbe",
    "--config methods/zero_shot.yaml --model.classifier.templates imagenet8": "Did you mean 'imagenet80'?",
    "--model.backbone.text_memory_gb 0": "must be positive",
    "--model.schedule.floor 2": "floor",
    "--model.classifier NearestClassMean": "NearestClassMean + LoRA would leave LoRA untrained",
    " ".join(TINY_VIT): "TextPrompt needs a text tower",
}


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        *(([*FIT, *options.split()], expected) for options, expected in REFUSALS.items()),
        (["predict", "--config", "clip_16shot.yaml"], "--images"),
        (["predict", *FIT[1:], "--config", "methods/zero_shot.yaml", "--images", "no/such"], "no/such"),
    ],
)
def test_a_mistake_gets_one_line_and_writes_nothing(arguments, expected, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert expected in refused(capsys, arguments)
    assert list(tmp_path.iterdir()) == []


def test_folders_with_mistakes(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("cat", "dog"):
        photos(tmp_path / "animals" / name, 8)
    data = [*FIT, "--data.dataset", "animals", "--data.shots", "1", "--trainer.max_epochs", "1"]
    (tmp_path / "animals" / "bird").mkdir()
    assert "bird" in refused(capsys, data)
    (tmp_path / "animals" / "bird").rmdir()
    photos(tmp_path / "animals" / "DOG", 4)
    assert "DOG" in refused(capsys, data)
    for path in (tmp_path / "animals" / "DOG").rglob("*.png"):
        path.unlink()
    for path in sorted((tmp_path / "animals" / "DOG").rglob("*"), reverse=True):
        path.rmdir()
    (tmp_path / "animals" / "DOG").rmdir()
    for path in (tmp_path / "animals").rglob("*.png"):
        path.write_bytes(path.read_bytes()[:60])
    assert ".png" in refused(capsys, data)
    assert not (tmp_path / "runs").exists()


def test_a_checkpoint_of_another_backbone_or_method_is_refused(fitted, capsys, tmp_path):
    checkpoint = ["--ckpt_path", str(fitted / "tuned.safetensors"), "--run.root", str(tmp_path)]
    other = ["--model.backbone.model", "ViT-B-32", "--model.backbone.pretrained", "random", "--model.adapter.rank", "8"]
    assert "belongs to the backbone kshot:glyph_clip" in refused(capsys, ["test", *FIT[1:], *checkpoint, *other])
    method = ["--config", "methods/coop.yaml"]
    assert "and the config says CoOp" in refused(capsys, ["test", *FIT[1:], *method, *checkpoint])
    assert "weights only" in refused(capsys, [*FIT, *checkpoint])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", ["test", "validate", "predict"])
@pytest.mark.parametrize("method", ["lora", "class_mean"])
def test_measuring_what_was_never_trained_is_refused(command, method, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments = [command, "--config", "clip_16shot.yaml", "--config", f"methods/{method}.yaml"]
    images = ["--images", str(ROOT)] if command == "predict" else []
    assert "has learnt nothing yet" in refused(capsys, [*arguments, *images])
    assert list(tmp_path.iterdir()) == []


def test_zero_shot_needs_no_checkpoint(tmp_path):
    folder = photos(tmp_path / "photos", 2)
    common = [
        "--config",
        "clip_16shot.yaml",
        "--config",
        "methods/zero_shot.yaml",
        "--run.root",
        str(tmp_path / "runs"),
    ]
    main(["predict", *common, "--images", str(folder)])
    assert len(next((tmp_path / "runs").rglob("predictions.csv")).read_text().splitlines()) == 3


def test_a_place_that_cannot_be_written_gets_one_line(fitted, capsys, tmp_path):
    (tmp_path / "file").write_text("in the way")
    assert "choose another --run.root" in refused(capsys, [*FIT, *QUICK, "--run.root", str(tmp_path / "file")])
    common = ["--config", "clip_16shot.yaml", "--ckpt_path", str(fitted / "tuned.safetensors")]
    images = ["--images", str(photos(tmp_path / "photos", 1)), "--out", str(tmp_path / "file" / "out.csv")]
    line = refused(capsys, ["predict", *common, *images, "--run.root", str(tmp_path / "runs")])
    assert "Could not write" in line


def test_a_pickle_is_not_executed(capsys, tmp_path):
    class Harm:
        def __reduce__(self):
            return Path.touch, (tmp_path / "harm",)

    torch.save({"state_dict": {}, "x": Harm()}, tmp_path / "evil.ckpt")
    line = refused(capsys, ["test", *FIT[1:], "--ckpt_path", str(tmp_path / "evil.ckpt")])
    assert "cannot be read safely" in line or "no checkpoint that can be read safely" in line
    assert not (tmp_path / "harm").exists()


# ---------------------------------------------------------------------------------------------------- as a user


@pytest.mark.slow  # .ci/run runs it by itself
def test_the_readme_command_ends_with_the_table(tmp_path):
    command = [sys.executable, "main.py", "fit", "--config", "clip_16shot.yaml", "--run.root", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    for line in ("zero-shot accuracy", "adapted accuracy", "trainable parameters", "seconds", "results"):
        assert line in done.stdout
    result = json.loads(next(tmp_path.rglob("result.json")).read_text())
    assert result["zero_shot_acc"] >= 0.6
    assert result["acc"] >= 0.94
    assert "Epoch 39" in done.stdout + done.stderr  # the progress bar


TWO = ["--trainer.accelerator", "cpu", "--trainer.devices", "2", "--trainer.strategy", "ddp", *QUICK]
TWO[TWO.index("--trainer.enable_progress_bar") + 1] = "true"  # a bar on the first device alone asks for means


@pytest.mark.parametrize("launcher", [[], ["-m", "torch.distributed.run", "--nproc_per_node", "2"]])
def test_several_processes_leave_one_run_and_one_table(launcher, tmp_path):
    arguments = [*FIT, *TWO, *WHOLE, "--model.targets", '["image.5.*"]', "--run.root", str(tmp_path)]
    done = subprocess.run(
        [sys.executable, *launcher, str(ROOT / "main.py"), *arguments], cwd=tmp_path, capture_output=True, text=True,
        timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("adapted accuracy") == 1
    (directory,) = tmp_path.glob("*/*")
    assert json.loads((directory / "result.json").read_text())["tested"] == {"test": 539}
    assert torch.load(directory / "checkpoints" / "last.ckpt", weights_only=True)["epoch"] == 1


def test_prediction_is_refused_on_several_devices(tmp_path, capsys):
    arguments = [
        "predict",
        *FIT[1:],
        "--config",
        "methods/zero_shot.yaml",
        "--images",
        str(photos(tmp_path, 1)),
        *TWO[:6],
    ]
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
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "main.py", "--help"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "fit" in done.stdout
    assert time.perf_counter() - start < 5
    main([])
    assert "usage:" in capsys.readouterr().out


@pytest.mark.parametrize("command", ["fit", "predict"])
def test_full_help_lists_options(command, capsys):
    with pytest.raises(SystemExit) as exit_code:
        main([command, "--help"])
    assert exit_code.value.code == 0
    out = capsys.readouterr().out
    assert "--run.root" in out
    assert ("--images" in out) == (command == "predict")
