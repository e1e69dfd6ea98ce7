"""Runs that share a backbone in one process are, to the bit, those of a process of their own."""

import json
import random
from itertools import chain, zip_longest
from pathlib import Path

import numpy as np
import pytest
import torch
from command_line import FIT, METHODS, TINY_VIT, run_test
from safetensors.torch import load_file
from test_cli_configs import WEIGHT_TUNING, WITHOUT_GRADIENT

from kshot.commands import run
from kshot.errors import UserError
from kshot.module import FewShotModule
from kshot.surroundings import leaving_no_trace
from kshot.warm import Warm

SHORT = ["--trainer.enable_progress_bar", "false", "--data.shots", "1", "--data.views", "1", "--data.batch_size", "3"]
SHORT += ["--trainer.max_epochs", "2", "--run.calibrate", "false"]  # two steps
SEARCH = {"autolora": ["--model.adapter.search_steps", "1", "--data.shots", "2"]}
KINDS = {
    *("lora", "randlora", "full", "autolora", "2sfs"),  # layers, drawn matrices, the backbone's own weights, a search
    *("zero_shot", "tip_adapter", "tip_adapter_f", "coop", "promptsrc"),  # nothing, features, prompts in both towers
}
OF_THE_MOMENT = ("seconds", "finished", "peak_memory_bytes")


def in_turns() -> list[str]:
    """All methods, each of those that train no adapter after one that does."""
    others = [method for method in METHODS if method not in WEIGHT_TUNING]
    return [method for method in chain(*zip_longest(WEIGHT_TUNING, others)) if method]


def one(root: Path, *words: str, warm: Warm | None = None, configs: tuple[str, ...] = ()) -> Path:
    """The directory of a short run, in this process as it is or with what is warm there."""
    named = [word for config in configs for word in ("--config", config)]
    arguments = [*FIT, *named, *SHORT, "--run.root", str(root), *words]
    if warm is not None:
        return run(arguments, warm=warm).directory
    with leaving_no_trace():
        return run(arguments).directory


def left_by(directory: Path) -> tuple[dict, dict]:
    """Tensors and result of a run, but for what is of the moment."""
    result = json.loads((directory / "result.json").read_text())
    return load_file(directory / "tuned.safetensors"), {k: v for k, v in result.items() if k not in OF_THE_MOMENT}


def assert_same(first: Path, second: Path) -> None:
    (ours, our_result), (theirs, their_result) = left_by(first), left_by(second)
    assert our_result == their_result
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert torch.equal(tensor.view(-1).view(torch.uint8), theirs[name].view(-1).view(torch.uint8)), name


@pytest.fixture(autouse=True)
def nothing_kept(monkeypatch):
    """Each run encodes its images itself."""
    monkeypatch.setenv("KSHOT_CACHE", "")


@pytest.fixture(scope="module")
def warm() -> Warm:
    return Warm()


@pytest.mark.parametrize("method", in_turns())
def test_a_warm_run_is_that_of_a_process_of_its_own(method, warm, few_scans, tmp_path):
    """Every method runs on what the one before gave back; one of each kind is compared with a run that shares nothing.

    Every class of kshot is compared so in tests/test_run.py.
    """
    name, words = Path(method).stem, [*few_scans, *SEARCH.get(Path(method).stem, [])]
    shared = one(tmp_path / "warm", *words, warm=warm, configs=(method,))
    assert warm.built == 1, "the run before has given its backbone back as it was"
    if name in KINDS:
        assert_same(shared, one(tmp_path / "alone", *words, configs=(method,)))
    assert shared.parent.name == f"clip_16shot+{name}"
    result = left_by(shared)[1]
    assert 0 < result["acc"] <= 1
    assert result["zero_shot_acc"] > 0.55
    assert (result["trainable_parameters"] > 0) == (name not in WITHOUT_GRADIENT)
    if (method in WEIGHT_TUNING or name in {*KINDS, "dept", "ivlp"}) and name != "zero_shot":  # others: test_alone.py
        assert run_test(shared, tmp_path / "tested")["acc"] == result["acc"]


@pytest.mark.parametrize("words", [[], ["--config", "methods/class_mean.yaml"]])
def test_a_warm_run_calibrates_as_another(words, few_scans, tmp_path):
    warm = Warm()
    more = [*few_scans, "--run.calibrate", "true", "--data.shots", "2", "--model.targets", "[image.5.q]", *words]
    one(tmp_path / "first", *more, warm=warm)
    shared = one(tmp_path / "warm", *more, warm=warm)
    assert left_by(shared)[1]["forecast"] is not None
    assert_same(shared, one(tmp_path / "alone", *more))
    assert (warm.built, warm.lendings) == (1, 1)


def test_each_seed_has_its_own_random_values(few_scans, tmp_path):
    warm, words = Warm(), [*few_scans, "--config", "methods/coop.yaml", "--model.classifier.init_words", "null"]
    words += ["--trainer.max_epochs", "1"]
    alone = {seed: one(tmp_path / "alone", *words, "--seed_everything", seed) for seed in ("1", "2")}
    for seed in ("1", "2", "1", "2"):
        assert_same(one(tmp_path / "warm", *words, "--seed_everything", seed, warm=warm), alone[seed])
    ours, theirs = (left_by(directory)[0] for directory in alone.values())
    assert not any(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert (warm.built, warm.lendings) == (2, 2)


def test_random_weights_are_shared_with_no_other_seed(few_scans, tmp_path):
    warm = Warm()
    words = [*few_scans, *TINY_VIT, "--config", "methods/class_mean.yaml"]
    found = [one(tmp_path, *words, "--seed_everything", seed, warm=warm) for seed in ("1", "2", "1", "1")]
    assert (warm.built, warm.lendings) == (3, 1)
    assert_same(found[3], one(tmp_path / "alone", *words))
    weights = [load_file(directory / "tuned.safetensors") for directory in found]
    same = [all(torch.equal(each[n], weights[0][n]) for n in each) for each in weights]
    assert same == [True, False, True, True]


def test_another_backbone_takes_the_place_of_the_first(few_scans, tmp_path):
    warm, words = Warm(), [*few_scans, "--config", "methods/class_mean.yaml"]
    given = {"first": [], "other": ["--model.backbone.features", "mean"]}
    alone = {name: one(tmp_path / "alone", *words, *more) for name, more in given.items()}
    for name in ("first", "other", "first", "first"):
        assert_same(one(tmp_path / "warm", *words, *given[name], warm=warm), alone[name])
    assert (warm.built, warm.lendings) == (3, 1)


class FaultError(Exception):
    pass


@pytest.fixture(scope="module")
def alone(few_scans, tmp_path_factory) -> Path:
    """A run that shares nothing."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KSHOT_CACHE", "")
        return one(tmp_path_factory.mktemp("alone"), *few_scans)


@pytest.mark.parametrize("changes", [False, True])
def test_a_run_that_fails_gives_the_backbone_back_or_loses_it(changes, alone, few_scans, tmp_path, monkeypatch):
    warm = Warm()

    def power_cut(self, *_):
        if changes:
            next(self.backbone.parameters()).data.add_(1)
        raise FaultError

    one(tmp_path, *few_scans, warm=warm)
    with monkeypatch.context() as patch:
        patch.setattr(FewShotModule, "training_step", power_cut)
        with pytest.raises(FaultError):
            one(tmp_path, *few_scans, warm=warm)
    assert (warm.kept is None) == changes
    with pytest.raises(UserError, match="takes no gradient step"):
        one(tmp_path, *few_scans, "--model.classifier", "Ridge", warm=warm)
    assert_same(one(tmp_path / "warm", *few_scans, warm=warm), alone)
    assert warm.built == 1 + changes


def test_a_backbone_in_another_precision_is_dropped(few_scans, tmp_path):
    warm, words = Warm(), [*few_scans, "--config", "methods/class_mean.yaml"]
    one(tmp_path, *words, "--trainer.precision", "64-true", warm=warm)
    assert warm.kept is None
    assert_same(one(tmp_path / "warm", *words, warm=warm), one(tmp_path / "alone", *words))


def test_a_warm_run_leaves_no_trace_in_its_process(few_scans, tmp_path, monkeypatch):
    monkeypatch.delenv("PL_GLOBAL_SEED", raising=False)
    warm, words = Warm(), [*few_scans, "--config", "methods/class_mean.yaml"]
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()  # noqa: NPY002
    one(tmp_path, *words, "--seed_everything", "3", warm=warm)
    assert before == (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())  # noqa: NPY002
    last = one(tmp_path, *words, "--seed_everything", "true", warm=warm)
    assert "seed_everything: 3" not in (last / "config.yaml").read_text()
