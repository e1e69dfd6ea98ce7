"""Opening a run from its directory alone."""

import shutil

import pytest
import torch
from command_line import UNTESTED, fit

from kshot.data import FewShotDataModule
from kshot.errors import UserError
from kshot.opening import open_run


@pytest.fixture(scope="module")
def lora(tmp_path_factory):
    return fit(tmp_path_factory.mktemp("runs"), *UNTESTED)


@pytest.mark.parametrize("method", ["methods/coop.yaml", "methods/gda.yaml"])
def test_an_open_run_says_what_test_measures(tmp_path, few_scans, method):
    directory = fit(tmp_path, "--config", method, "--trainer.limit_test_batches", "1.0", *few_scans)
    moved = tmp_path / "elsewhere"
    shutil.move(directory, moved)
    opened = open_run(moved)
    data = opened.result
    assert opened.images.class_names == ["one", "two", "zero"]
    digits = FewShotDataModule(few_scans[1], shots=2)
    digits.use_preprocessing(opened.module.backbone.preprocessing)
    digits.setup("test")
    part = digits.part("test")
    with torch.inference_mode():
        right = opened.module(part.images([(i, 0) for i in range(len(part))])).argmax(-1) == part.labels
    assert float(right.double().mean()) == pytest.approx(data["acc"])


def test_a_checkpoint_in_a_run_opens_it(lora):
    assert open_run(lora / "tuned.safetensors").directory == lora
    assert open_run(lora / "checkpoints" / "last.ckpt").module.method == "TextPrompt + LoRA"


def test_what_is_no_run_is_refused(lora, tmp_path):
    with pytest.raises(UserError, match=r"There is no run .*nowhere"):
        open_run(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"is no finished run: it has no config.yaml and no tuned.safetensors"):
        open_run(tmp_path)
    shutil.copy(lora / "config.yaml", tmp_path)
    with pytest.raises(UserError, match=r"is no finished run: it has no tuned.safetensors"):
        open_run(tmp_path)
