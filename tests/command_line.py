"""Tests go through the command line in their own process: short runs, refusals, images to predict."""

import json
from pathlib import Path

import pytest
import torch
import towers
from PIL import Image

from kshot.cli import main
from kshot.files import packaged_folder
from kshot.module import FewShotModule

ROOT = Path(__file__).parents[1]
TINY_VIT = ["--model.backbone", "Timm", "--model.backbone.model", "test_vit", "--model.backbone.weights", "random"]
FOLDER = packaged_folder("configs")
CONFIGS = sorted(p.relative_to(FOLDER).as_posix() for p in FOLDER.rglob("*.yaml") if p.parent.name != "studies")
METHODS = [name for name in CONFIGS if name.startswith("methods/")]
BACKBONES = [name for name in CONFIGS if name.startswith("backbones/")]
EXPERIMENTS = [name for name in CONFIGS if name not in {*METHODS, *BACKBONES}]
QUICK = ["--trainer.max_epochs", "2", "--trainer.enable_progress_bar", "false", "--data.shots", "2"]
QUICK += ["--data.views", "2"]  # recorded crops of the ten
QUICK += ["--run.calibrate", "false"]  # which fits once more; its own tests turn it on
QUICK += ["--data.eval_batch_size", "16", "--trainer.limit_test_batches", "1"]  # of the 539 test scans
WHOLE = ["--trainer.limit_test_batches", "1.0", "--data.eval_batch_size", "64"]
UNTESTED = ["--run.test", "false"]
TWO = ["--trainer.accelerator", "cpu", "--trainer.devices", "2", "--trainer.strategy", "ddp", *QUICK]
TWO[TWO.index("--trainer.enable_progress_bar") + 1] = "true"  # a bar on the first device alone asks for means
FIT = ["fit", "--config", "clip_16shot.yaml"]


def tiny_clip() -> list[str]:
    """Options for a CLIP of two blocks each 32 wide, on which a short run takes half of the time."""
    return ["--model.backbone.model", str(towers.folder_of("clip"))]


def fit(root: Path, *options: str) -> Path:
    """Runs a short fit of the default config and returns its directory.

    Configs that the options begin with come first: a method has a number of epochs of its own.
    """
    before = set(root.glob("*/*"))
    configs = next((i for i in range(0, len(options), 2) if options[i] != "--config"), len(options))
    main([*FIT, *options[:configs], *QUICK, "--run.root", str(root), *options[configs:]])
    (new,) = set(root.glob("*/*")) - before
    return new


def cut_fit(monkeypatch, epoch: int, root: Path, *options: str) -> Path:
    """Runs a fit that ends as by a power cut before an epoch, counted from 0, and returns its directory."""
    start = FewShotModule.on_train_epoch_start

    def power_cut(self):
        if self.current_epoch == epoch:
            raise RuntimeError("power cut")
        start(self)

    with monkeypatch.context() as patch:
        patch.setattr(FewShotModule, "on_train_epoch_start", power_cut)
        with pytest.raises(RuntimeError, match="power cut"):
            fit(root, *options)
    (cut,) = root.glob("*/*")
    return cut


def refused(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> str:
    """Runs a command line that must fail with exit code 2, and returns its one line."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit_code:
        main(arguments)
    assert exit_code.value.code == 2
    lines = capsys.readouterr().err.strip().splitlines()
    *notes, line = lines  # what was found on the way may be told before
    assert line.startswith("error: "), lines
    assert not [note for note in notes if note.startswith(("error:", "Traceback", " "))], lines
    return line


def predict(run: Path, *words: object) -> None:
    """Labels images by a run: ``predict(run, "--images", folder, "--out", file)``."""
    with pytest.raises(SystemExit) as end:
        main(["predict", "--run", str(run), *map(str, words)])
    assert end.value.code == 0


def photos(folder: Path, count: int = 5) -> Path:
    generator = torch.Generator().manual_seed(0)
    for i in range(count):
        pixels = torch.randint(0, 256, (40 + i, 48, 3), dtype=torch.uint8, generator=generator)
        path = folder / f"sub{i % 2}" / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.numpy()).save(path)
    return folder


def run_test(directory: Path, root: Path) -> dict:
    """Measures a finished run's small file in a run of its own."""
    config, weights = str(directory / "config.yaml"), str(directory / "tuned.safetensors")
    main(["test", "--config", config, "--ckpt_path", weights, "--run.root", str(root)])
    (tested,) = root.glob("*/*")
    return json.loads((tested / "result.json").read_text())


def assert_same_figures(ours: dict, theirs: dict) -> None:
    """Compares test sets: sums to rounding, as the order of images hangs on what was kept of them."""
    ours, theirs = ours["test_sets"], theirs["test_sets"]
    assert ours.keys() == theirs.keys()
    for name, figures in ours.items():
        assert figures == pytest.approx(theirs[name], rel=1e-5)
        assert figures["acc"] == theirs[name]["acc"]
