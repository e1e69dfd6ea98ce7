"""PromptSRC through the command line: the average is what a run ends with, and a power cut does not change it."""

import contextlib
import json
import math
import shutil
from pathlib import Path

import pytest
import torch
import towers
from command_line import assert_same_figures, predict
from data_fixtures import save_image
from plain_prompts import trained
from safetensors.torch import load_file

from kshot.cli import main
from kshot.module import FewShotModule

OPTIONS = (
    *("--config", "clip_16shot.yaml", "--config", "methods/promptsrc.yaml", "--trainer.enable_progress_bar", "false"),
    *(
        "--data.shots",
        "2",
        "--data.views",
        "2",
        "--trainer.max_epochs",
        "4",
        "--run.save_every",
        "0",
        "--run.calibrate",
        "false",
    ),
    *("--model.classifier.average_mean", "2", "--model.classifier.average_std", "1", "--model.optimizer.lr", "0.05"),
)


def run(command: str, root: Path, *options: str) -> Path:
    """Runs a command line and returns its run directory."""
    backbone = ("--model.backbone.model", str(towers.folder_of("clip")))
    main([command, *OPTIONS, *backbone, "--run.root", str(root), *options])
    (directory,) = root.glob("*/*")
    return directory


@pytest.fixture(scope="module")
def trajectory() -> list[dict[str, torch.Tensor]]:
    """The trained tensors at the end of each epoch of the whole run."""
    return []


@pytest.fixture(scope="module")
def whole(trajectory, tmp_path_factory) -> Path:
    note = FewShotModule.on_train_epoch_end

    def noting(module):
        trajectory.append({n: p.detach().clone() for n, p in trained(module).items()})
        note(module)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FewShotModule, "on_train_epoch_end", noting)
        return run("fit", tmp_path_factory.mktemp("whole"))


@pytest.fixture(scope="module")
def cut(tmp_path_factory) -> Path:
    start, root = FewShotModule.on_train_epoch_start, tmp_path_factory.mktemp("cut")

    def power_cut(module):
        if module.current_epoch == 2:
            raise RuntimeError("power cut")
        start(module)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FewShotModule, "on_train_epoch_start", power_cut)
        with pytest.raises(RuntimeError, match="power cut"):
            run("fit", root)
    (directory,) = root.glob("*/*")
    return directory


def test_a_run_ends_with_the_average_over_its_epochs(whole, trajectory):
    tuned = load_file(whole / "tuned.safetensors")
    assert len(trajectory) == 4
    weights = [math.exp(-((e - 2) ** 2) / 2) for e in (1, 2, 3, 4)]
    for name, tensor in tuned.items():
        expected = sum(w * step[name].double() for w, step in zip(weights, trajectory, strict=True)) / sum(weights)
        assert towers.relative(tensor, expected) <= 1e-6
    last = torch.load(whole / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    assert last.keys() == tuned.keys() == trajectory[-1].keys()
    for name, tensor in last.items():
        assert torch.equal(tensor, trajectory[-1][name])
        assert towers.relative(tuned[name], tensor) > 1e-3


def test_a_resumed_run_ends_with_the_same_bits(whole, cut, tmp_path):
    assert not (cut / "tuned.safetensors").exists()
    copy = shutil.copytree(cut, tmp_path / "cut" / "001")
    assert run("fit", tmp_path, "--ckpt_path", str(copy / "checkpoints" / "last.ckpt"), "--run.test", "false") == copy
    a, b = (load_file(d / "tuned.safetensors") for d in (whole, copy))
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("file", ["tuned.safetensors", "checkpoints/last.ckpt"])
def test_either_file_gives_the_result_of_the_run(whole, file, tmp_path):
    expected = json.loads((whole / "result.json").read_text())
    result = json.loads((run("test", tmp_path, "--ckpt_path", str(whole / file)) / "result.json").read_text())
    assert_same_figures(result, expected)


def test_either_file_gives_the_same_predictions(whole, tmp_path):
    predicted, image = [], save_image(tmp_path / "a.png")
    for file in ("tuned.safetensors", "checkpoints/last.ckpt"):
        out = tmp_path / f"{len(predicted)}.csv"
        predict(whole / file, "--images", image, "--out", out)
        predicted.append(out.read_text())
    assert predicted[0] == predicted[1]


def test_a_checkpoint_without_an_average_is_tested_or_refused_in_one_line(cut, tmp_path):
    """As left by a run with ``average_mean: null``."""
    checkpoint = torch.load(cut / "checkpoints" / "last.ckpt", weights_only=True)
    checkpoint["callbacks"] = {}
    torch.save(checkpoint, tmp_path / "last.ckpt")
    with contextlib.suppress(SystemExit):  # which the command line turns a UserError into, and no other error
        run("test", tmp_path / "runs", "--ckpt_path", str(tmp_path / "last.ckpt"))
