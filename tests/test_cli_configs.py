"""Every config: it is read, it runs, and methods layer over experiments."""

import contextlib
import io
import json
import re
from pathlib import Path

import pytest
import towers
import yaml
from command_line import (
    BACKBONES,
    EXPERIMENTS,
    FOLDER,
    METHODS,
    QUICK,
    TINY_VIT,
    refused,
)

from kshot import adapters
from kshot.cli import main


@pytest.mark.parametrize("config", EXPERIMENTS)
def test_every_config_parses(config, capsys):
    with pytest.raises(SystemExit) as exit_code:
        main(["fit", "--config", config, "--print_config"])
    assert exit_code.value.code == 0
    assert "class_path: " in capsys.readouterr().out


def printed(*configs: str) -> dict:
    """All settings of configs that are laid over each other."""
    words, out = [word for config in configs for word in ("--config", config)], io.StringIO()
    with contextlib.redirect_stdout(out), pytest.raises(SystemExit) as exit_code:
        main(["fit", *words, "--print_config"])
    assert exit_code.value.code == 0
    return yaml.safe_load(out.getvalue())


@pytest.fixture(scope="module")
def experiments() -> dict[str, tuple[str, str]]:
    """The experiment of each kind of backbone: its name, and its settings in words, which no test changes."""
    names = {"OpenClip": "clip_16shot.yaml", "Timm": "dinov2_vits14_16shot.yaml"}
    return {kind: (name, json.dumps(printed(name))) for kind, name in names.items()}


@pytest.mark.parametrize("config", BACKBONES)
def test_every_backbone_layers_over_an_experiment_and_says_nothing_else(config, experiments):
    given = yaml.safe_load((FOLDER / config).read_text())
    (settings,) = given["model"]["init_args"].values()
    name, words = experiments[settings["class_path"]]
    before, after = json.loads(words), printed(name, config)
    backbone = after["model"]["init_args"].pop("backbone")
    assert backbone["class_path"].endswith(settings["class_path"])
    assert backbone["init_args"] | settings["init_args"] == backbone["init_args"]
    before["model"]["init_args"].pop("backbone")
    assert after == before


@pytest.mark.parametrize("config", EXPERIMENTS)
def test_every_experiment_runs_with_a_small_backbone(config, tmp_path, few_scans):
    text = "OpenClip" in (FOLDER / config).read_text()
    small = ["model", str(towers.folder_of("clip")), "pretrained", "null", "image_size", "null"]
    if not text:
        small = ["model", "test_vit", "weights", "random", "image_size", "32"]
    overrides = [f"--model.backbone.{a}" if i % 2 == 0 else a for i, a in enumerate(small)]
    main(
        [
            *["fit", "--config", config, *overrides, *few_scans, "--data.num_workers", "0"],
            *["--data.shots", "2", "--data.batch_size", "8", "--data.eval_batch_size", "8"],
            *["--trainer.fast_dev_run", "true", "--trainer.precision", "32-true", "--run.root", str(tmp_path)],
        ]
    )
    assert list(tmp_path.iterdir()) == []  # a fast_dev_run leaves nothing behind


WITHOUT_GRADIENT = {
    "average",
    "zero_shot",
    "class_mean",
    "tip_adapter",
    "lp_plus_plus",
    "linear_probe_lbfgs",
    "class_mean_text",
    "gda",
    "kernel_ridge",
    "ridge",
}


WEIGHT_TUNING = [m for m in METHODS if "adapter: null" not in (FOLDER / m).read_text()]


@pytest.mark.parametrize(
    ("method", "head"), [(m, ("LinearProbe", "NearestClassMean")[i % 2]) for i, m in enumerate(WEIGHT_TUNING)]
)
def test_every_weight_tuning_method_layers_over_an_image_backbone(method, head, tmp_path, few_scans):
    trainable = ["--model.classifier.trainable", "true"] if head == "NearestClassMean" else []
    steps = "3" if "adalora" in method else "1"  # enough for it to prune in
    main(
        [
            *["fit", "--config", "dinov2_vits14_16shot.yaml", "--config", method, *QUICK, *TINY_VIT],
            *["--model.backbone.image_size", "32", "--model.classifier", head, *trainable, *few_scans],
            *["--run.root", str(tmp_path), "--trainer.max_epochs", steps],
        ]
    )
    (directory,) = tmp_path.glob("*/*")
    result = json.loads((directory / "result.json").read_text())
    assert result["method"].startswith(f"{head} + ")
    settings = {name: value for name, value in result["adapter"].items() if name not in ("lr", "scale")}
    adapter = getattr(adapters, result["method"].removeprefix(f"{head} + "))(**settings)
    if "lr: null" in (FOLDER / method).read_text() or "optimizer" not in (FOLDER / method).read_text():
        assert result["adapter"]["lr"] == pytest.approx(adapter.default_lr(64)), "its own, on a tower 64 wide"
    assert result["trainable_parameters"] > 0


NO_TEXT_NEEDED = {"average", "class_mean", "gda", "kernel_ridge", "linear_probe", "linear_probe_lbfgs", "ridge", "vpt"}


@pytest.mark.parametrize("method", [m for m in METHODS if m not in WEIGHT_TUNING])
def test_every_other_method_runs_on_an_image_backbone_or_says_why_not(method, tmp_path, capsys, few_scans):
    arguments = ["fit", "--config", "dinov2_vits14_16shot.yaml", "--config", method, *QUICK, *TINY_VIT, *few_scans]
    arguments += ["--model.backbone.image_size", "32", "--run.root", str(tmp_path), "--trainer.max_epochs", "1"]
    arguments += ["--data.eval_batch_size", "64"]  # of which an untrained backbone tells some
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
