"""Two processes on the CPU do what one does with the doubled batch; tests/test_cli.py starts them by launchers."""

import os
import sys
from pathlib import Path

import pytest
import several_devices
import torch
from processes import finished

from kshot.adapters import AutoLoRA
from kshot.backbones import OpenClip
from kshot.classifiers import NearestClassMean
from kshot.data import FewShotDataModule
from kshot.errors import UserError
from kshot.prepare import check_devices
from kshot.run import build

SCRIPT = Path(several_devices.__file__)
ALONE = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT")}


@pytest.fixture(scope="module")
def both(tmp_path_factory) -> tuple[dict, dict]:
    folder = tmp_path_factory.mktemp("devices")
    finished([sys.executable, str(SCRIPT), str(folder)], env=ALONE)
    return torch.load(folder / "one.pt"), torch.load(folder / "two.pt")


@pytest.mark.parametrize("method", several_devices.CASES)
def test_two_processes_equal_one_with_the_doubled_batch(method, both):
    one, two = (found[method] for found in both)
    assert one["moved"] > 0.01, "too little was trained to tell"
    assert one["steps"] == two["steps"] == 4
    assert one["kept_tokens"] == two["kept_tokens"]
    assert bool(one["kept_tokens"]) == (method in {"LoRA", "AdaLoRA", "RandLoRA"})  # on the image tower's fifth block
    assert one["counts"] == two["counts"] == ({"test": 539} if method == "LoRA" else {})
    assert one["ranks"] == two["ranks"]
    assert bool(one["ranks"]) == (method == "AdaLoRA")
    assert one["tuned"].keys() == two["tuned"].keys()
    for name, tensor in one["tuned"].items():
        torch.testing.assert_close(two["tuned"][name].double(), tensor.double(), rtol=0, atol=1e-5, msg=name)
    for name, figure in one["figures"].items():
        assert two["figures"][name] == pytest.approx(figure, abs=1e-4), name


class Two:
    """A trainer of two devices."""

    world_size = 2


@pytest.mark.parametrize(
    "settings", [{"adapter": AutoLoRA(max_rank=2), "targets": ["image.0.q"]}, {"classifier": NearestClassMean}]
)
def test_what_several_devices_cannot_share_is_refused(settings):
    module = build(OpenClip("kshot:glyph_clip"), FewShotDataModule("digits", shots=2), **settings)
    with pytest.raises(UserError, match=r"--trainer\.devices 1") as error:
        check_devices(module, Two())
    assert "\n" not in str(error.value)
