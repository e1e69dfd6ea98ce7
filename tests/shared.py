"""Fixtures of all tests: an own cache, the same random state for each, tiny models that are written once a session."""

import gc
import socket
import sys
import threading
from functools import partial
from pathlib import Path

import hypothesis
import pytest
import torch

from kshot.lean import load_lightning

load_lightning()

import command_line  # noqa: E402
import data_fixtures  # noqa: E402
import towers  # noqa: E402

import kshot.api  # noqa: E402  it and a study's worker run commands as they are, and are imported before
import kshot.studies.worker  # noqa: E402, F401
from kshot import commands  # noqa: E402
from kshot.backbones import OpenClip  # noqa: E402
from kshot.data import FewShotDataModule  # noqa: E402
from kshot.warm import Warm  # noqa: E402

torch.set_num_threads(1)
hypothesis.settings.register_profile("kshot", deadline=None)  # a busy machine is no fault
hypothesis.settings.load_profile("kshot")


def keep_what_is_there():
    """Takes what outlives a file for what stays to the end, which nobody searches for garbage again and again."""
    gc.collect()
    gc.freeze()


def pytest_collection_finish():
    keep_what_is_there()
    gc.set_threshold(50_000, 20, 20)  # within a file garbage is looked for rarely, and after each file at once


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport():
    """What a test that passed has printed, and by which names it is chosen, need not go to the process that counts."""
    report = yield
    if report.passed:
        report.sections, report.keywords = [], {}
    return report


@pytest.fixture(scope="module", autouse=True)
def _kept():
    """In a process that has run half of all files, one search for garbage took five seconds."""
    yield
    keep_what_is_there()


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


@pytest.fixture(scope="session", autouse=True)
def _warm_commands():
    """Command lines of a process share a backbone, which changes none of their results (test_warm.py)."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(commands, "run", partial(commands.run, warm=Warm()))
        yield


@pytest.fixture(autouse=True)
def _seeded():
    """Every test starts from the same global random state, and with nothing compiled."""
    torch.default_generator.manual_seed(0)  # torch.manual_seed notes where it was called for devices that there are not
    if "torch._dynamo" in sys.modules:  # it gives up on code that many tests compiled before
        torch.compiler.reset()


@pytest.fixture
def unanswered(monkeypatch):
    """Names that are asked for are answered when the test is over, as without a network; holds those answered before.

    The threads that asked end with the test.
    """
    over, asked, early, before = threading.Event(), [], [], threading.enumerate()

    def getaddrinfo(host, *_, **__):
        asked.append(host)
        if not over.wait(30):
            early.append(host)
        raise socket.gaierror("Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    yield early
    over.set()
    for thread in set(threading.enumerate()) - set(before):
        thread.join()
    assert asked


@pytest.fixture(scope="module")
def glyph_clip() -> OpenClip:
    """The small CLIP that comes with kshot."""
    return OpenClip("kshot:glyph_clip")


@pytest.fixture
def backbone(glyph_clip):
    """The same, with nothing attached when the test begins, nor when the next one does."""
    yield glyph_clip
    glyph_clip.detach()


@pytest.fixture(scope="module")
def tiny_clip() -> OpenClip:
    """A CLIP of two blocks each 32 wide: a run takes half of the time."""
    return towers.build("clip")


@pytest.fixture
def tiny(tiny_clip):
    """The same, as :func:`backbone` is."""
    yield tiny_clip
    tiny_clip.detach()


@pytest.fixture
def data() -> FewShotDataModule:
    """Two shots of each digit, 20 images, and 539 test scans."""
    return FewShotDataModule("digits", shots=2)


@pytest.fixture(scope="session")
def few_scans(tmp_path_factory) -> list[str]:
    """Options for three digits in a folder: a third of the images and texts of ``digits``, and 18 to test on."""
    root = data_fixtures.digit_folder(tmp_path_factory.mktemp("digits") / "scans", train=4, val=2, test=6)
    return ["--data.dataset", str(root), "--data.template", "a photo of the number: {}."]


@pytest.fixture(scope="session")
def fitted(tmp_path_factory) -> Path:
    """The directory of a short run of the default config, tested on 128 scans; nobody writes into it."""
    some = ["--data.eval_batch_size", "64", "--trainer.limit_test_batches", "2"]
    return command_line.fit(tmp_path_factory.mktemp("runs"), *some)
