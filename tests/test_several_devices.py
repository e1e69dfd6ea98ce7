"""Two processes on the CPU do what one does with the doubled batch; tests/test_cli.py starts them by launchers."""

import json
import os
import sys
from pathlib import Path

import pytest
import several_devices
import torch
from command_line import FIT, TWO, WHOLE
from data_fixtures import digit_folder
from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy, ModelParallelStrategy
from processes import finished

from kshot.adapters import AutoLoRA, LoRA
from kshot.backbones import OpenClip
from kshot.checkpoint import read_tensors
from kshot.classifiers import NearestClassMean
from kshot.data import FewShotDataModule
from kshot.errors import UserError
from kshot.mahalanobis import PREFIX
from kshot.predictions import read
from kshot.prepare import check_devices
from kshot.run import build

SCRIPT = Path(several_devices.__file__)
ALONE = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT")}


@pytest.fixture(scope="module")
def work(tmp_path_factory, few_scans) -> tuple[Path, str]:
    """Where the script worked, and what it printed."""
    folder, words = tmp_path_factory.mktemp("devices"), ("zero", "one", "two", "three", "four", "five", "six", "seven")
    scans = digit_folder(folder / "scans", (*words, "eight", "nine"), train=1, test=3)
    (scans / "test" / "nine" / "02.png").unlink()  # an odd number
    command = [*FIT, *TWO, *WHOLE, *few_scans, "--model.targets", "[image.5.*]", "--run.root", str(folder / "runs")]
    done = finished([sys.executable, str(SCRIPT), str(folder), str(scans), *command], env=ALONE)
    return folder, done.stdout


@pytest.fixture(scope="module")
def both(work) -> tuple[dict, dict]:
    return torch.load(work[0] / "one.pt"), torch.load(work[0] / "two.pt")


@pytest.mark.parametrize("method", several_devices.CASES)
def test_two_processes_equal_one_with_the_doubled_batch(method, both):
    one, two = (found[method] for found in both)
    assert one["moved"] > 0.01, "too little was trained to tell"
    assert one["steps"] == two["steps"] == 4
    assert one["kept_tokens"] == two["kept_tokens"]
    assert bool(one["kept_tokens"]) == (method in {"LoRA", "AdaLoRA", "RandLoRA"})  # on the image tower's fifth block
    assert one["counts"] == two["counts"] == ({"test": 29} if method == "LoRA" else {})
    assert one["ranks"] == two["ranks"]
    assert bool(one["ranks"]) == (method == "AdaLoRA")
    assert one["tuned"].keys() == two["tuned"].keys()
    for name, tensor in one["tuned"].items():
        torch.testing.assert_close(two["tuned"][name].double(), tensor.double(), rtol=0, atol=1e-5, msg=name)
    for name, figure in one["figures"].items():
        assert two["figures"][name] == pytest.approx(figure, abs=1e-4), name


def test_processes_of_a_launcher_leave_one_run_and_one_table(work):
    folder, said = work
    assert said.count("adapted accuracy") == 1
    (directory,) = (folder / "runs").glob("*/*")
    result, answered = json.loads((directory / "result.json").read_text()), read(directory)
    assert result["tested"] == {"test": 18}
    assert answered.index.tolist() == list(range(18)), "the answers of both, each once"
    assert answered.right.mean() == pytest.approx(result["acc"])


def test_files_of_several_devices_hold_what_was_trained_and_no_backbone(work):
    """LoRA on the last block's projections: factors, and of the resume file the optimizer's moments."""
    (directory,) = (work[0] / "runs").glob("*/*")
    trained = json.loads((directory / "result.json").read_text())["trainable_parameters"]
    tensors, _ = read_tensors(directory / "tuned.safetensors")
    factors = {name for name in tensors if not name.startswith(PREFIX)}
    assert factors
    assert all(".visual." in name and ".adapters." in name for name in factors)
    assert sum(tensors[name].numel() for name in factors) == trained
    resumed = torch.load(directory / "checkpoints" / "last.ckpt", weights_only=True)
    assert resumed["state_dict"].keys() == factors
    (optimizer,) = resumed["optimizer_states"]
    moments = [value for state in optimizer["state"].values() for value in state.values() if value.numel() > 1]
    assert sum(moment.numel() for moment in moments) == 2 * trained, "AdamW keeps two a parameter"
    weights = 4 * sum(p.numel() for p in OpenClip("kshot:glyph_clip").parameters())
    for name, numbers in (("tuned.safetensors", trained), ("checkpoints/last.ckpt", 3 * trained)):
        assert 4 * numbers < (directory / name).stat().st_size < 4 * numbers + 100_000 < weights, name


class Two:
    """A trainer of two devices."""

    world_size = 2
    strategy = DDPStrategy()


@pytest.mark.parametrize(
    "settings", [{"adapter": AutoLoRA(max_rank=2), "targets": ["image.0.q"]}, {"classifier": NearestClassMean}]
)
def test_what_several_devices_cannot_share_is_refused(settings):
    module = build(OpenClip("kshot:glyph_clip"), FewShotDataModule("digits", shots=2), **settings)
    with pytest.raises(UserError, match=r"--trainer\.devices 1") as error:
        check_devices(module, Two())
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("strategy", [FSDPStrategy(), ModelParallelStrategy()], ids=lambda each: type(each).__name__)
def test_a_trainer_that_divides_the_backbone_is_refused(strategy, monkeypatch):
    """In Python as on the command line, of which tests/test_mistakes.py holds the words."""
    module = build(OpenClip("kshot:glyph_clip"), FewShotDataModule("digits", shots=2), adapter=LoRA(rank=1))
    monkeypatch.setattr(Two, "strategy", strategy)
    with pytest.raises(UserError, match=r"needs the whole backbone.*--trainer\.strategy ddp"):
        check_devices(module, Two())
