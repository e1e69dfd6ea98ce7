"""Prompt methods with weight-tuning methods through the command line: fit, test, and resume after a power cut."""

import json
from pathlib import Path

import pytest
import torch
import towers
from command_line import assert_same_figures
from safetensors.torch import load_file

from kshot.cli import main
from kshot.mahalanobis import PREFIX
from kshot.module import FewShotModule

BASE = ("--config", "clip_16shot.yaml")
QUICK = (  # after the config of the method, which has a number of epochs of its own
    *("--trainer.max_epochs", "2", "--trainer.enable_progress_bar", "false", "--run.save_every", "0"),
    *("--data.shots", "2", "--data.batch_size", "2", "--data.views", "2"),
)
UNCALIBRATED = ("--run.calibrate", "false")  # one composition is enough for what all calibrate by
LORA = "--model.adapter LoRA --model.adapter.rank 2 --model.adapter.dropout 0.2"
CASES = {
    "DePT (PromptSRC)": (
        "--config methods/dept.yaml --model.classifier.base PromptSRC --model.classifier.base.average_mean 1",
        {"classifier.head.weight", "classifier.inner.image_prompts", "classifier.inner.context"},
    ),
    "MaPLe + LoRA": (
        f"--config methods/maple.yaml {LORA} --model.targets ['*.q','*.v']",
        {"classifier.context", "classifier.project.0.weight"},
    ),
    "PromptSRC + AdaLoRA": (
        "--config methods/promptsrc.yaml --model.classifier.average_mean 1 --model.targets ['*.q','*.v'] "
        "--model.adapter AdaLoRA --model.adapter.initial_rank 3 --model.adapter.target_rank 2 "
        "--model.adapter.initial_steps 1 --model.adapter.final_steps 2 --model.adapter.every 1",
        {"classifier.image_prompts", "classifier.deep"},
    ),
}


def run(command: str, case: str, root: Path, *options: str) -> Path:
    """Runs a command line and returns its run directory."""
    backbone = ("--model.backbone.model", str(towers.folder_of("clip")))
    quick = QUICK if case == "PromptSRC + AdaLoRA" else (*QUICK, *UNCALIBRATED)
    main([command, *BASE, *backbone, *CASES[case][0].split(), *quick, "--run.root", str(root), *options])
    (directory,) = root.glob("*/*")
    return directory


@pytest.mark.parametrize("case", CASES)
def test_fit_test_and_resume(case, tmp_path, monkeypatch, few_scans):
    whole = run("fit", case, tmp_path / "whole", *few_scans)
    result, tuned = json.loads((whole / "result.json").read_text()), load_file(whole / "tuned.safetensors")
    assert result["method"] == case
    assert tuned.keys() > CASES[case][1]
    assert ("+" in case) == any(".adapters." in name for name in tuned)
    assert all(".adapters." in name or not name.startswith("classifier.backbone.") for name in tuned)
    learnt = [tensor for name, tensor in tuned.items() if not name.startswith(PREFIX)]
    assert sum(t.numel() for t in learnt) < 1.1 * result["trainable_parameters"]

    start = FewShotModule.on_train_epoch_start

    def power_cut(module):
        if module.current_epoch == 1:
            raise RuntimeError("power cut")
        start(module)

    with monkeypatch.context() as patch:
        patch.setattr(FewShotModule, "on_train_epoch_start", power_cut)
        with pytest.raises(RuntimeError, match="power cut"):
            run("fit", case, tmp_path / "cut", *few_scans)
    (last,) = tmp_path.glob("cut/*/*/checkpoints/last.ckpt")
    again = run("fit", case, tmp_path / "cut", *few_scans, "--ckpt_path", str(last), "--run.test", "false")
    resumed = load_file(again / "tuned.safetensors")
    assert tuned.keys() == resumed.keys()
    assert [name for name in tuned if not torch.equal(tuned[name], resumed[name])] == []

    tested = run("test", case, tmp_path / "tested", *few_scans, "--ckpt_path", str(whole / "tuned.safetensors"))
    assert_same_figures(json.loads((tested / "result.json").read_text()), result)
