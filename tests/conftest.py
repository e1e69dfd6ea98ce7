"""Settings of all tests: offline, one thread, and tiny models that are written once a session."""

import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before huggingface_hub is imported: no test waits for a network
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import command_line
import pytest
import torch
import towers

from kshot.backbones import OpenClip
from kshot.data import FewShotDataModule

torch.set_num_threads(1)


def pytest_xdist_auto_num_workers(config):
    """A pool of processes pays for many files; one or a few start at once without it."""
    files = [name for name in config.args if ".py" in name]
    return 0 if 0 < len(files) <= 3 else None


LONG = ("test_several_devices", "test_run", "test_cli", "test_benchmarks", "test_cli_configs", "test_ends", "test_docs")


def pytest_collection_modifyitems(items):
    """A file is one process's, so that what it shares is made once; long ones come first, lest one be waited for."""
    items.sort(key=lambda item: LONG.index(item.path.stem) if item.path.stem in LONG else len(LONG))


@pytest.fixture(scope="session", autouse=True)
def _tower_folder(tmp_path_factory):
    """Where the tiny models of :mod:`towers` are written."""
    towers.use_folder(tmp_path_factory.mktemp("towers"))


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory):
    """No test reads or writes the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KSHOT_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(autouse=True)
def _seeded():
    """Every test starts from the same global random state, and with nothing compiled."""
    torch.manual_seed(0)
    if "torch._dynamo" in sys.modules:  # it gives up on code that many tests compiled before
        torch.compiler.reset()


@pytest.fixture(scope="module")
def glyph_clip() -> OpenClip:
    """The small CLIP that comes with kshot."""
    return OpenClip("kshot:glyph_clip")


@pytest.fixture
def backbone(glyph_clip):
    """The same, with nothing attached when the test begins, nor when the next one does."""
    yield glyph_clip
    glyph_clip.detach()


@pytest.fixture
def data() -> FewShotDataModule:
    """Two shots of each digit, 20 images, and 539 test scans."""
    return FewShotDataModule("digits", shots=2)


@pytest.fixture(scope="session")
def fitted(tmp_path_factory) -> Path:
    """The directory of a short run of the default config, tested on all scans; nobody writes into it."""
    return command_line.fit(tmp_path_factory.mktemp("runs"), *command_line.WHOLE)
