"""Choosing on the shots alone: what is tried, judged and told, and that the answer is an ordinary run."""

import json
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from kshot import auto, folds
from kshot.auto import SEVERAL_LAYERS, Search, choose
from kshot.building import stated
from kshot.checkpoint import read_tensors
from kshot.choice import seconds_of
from kshot.cli import main
from kshot.commands import run
from kshot.config import read_command_line
from kshot.errors import UserError
from kshot.settings import OPTIONS, settings

CLOSED = ["--config methods/zero_shot.yaml", "--config methods/ridge.yaml", "--config methods/gda.yaml"]
QUIET = ["--trainer.enable_progress_bar", "false", "--data.views", "1", "--trainer.max_epochs", "4"]
SHORT_TEST = {"trainer.limit_test_batches": 1, "data.eval_batch_size": 64}


def words(budget="60s", shots=3, candidates=CLOSED, **options):
    given = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    chosen = [] if candidates is None else ["--candidates", json.dumps(list(candidates))]
    start = ["fit", "--config", "clip_16shot.yaml", "--budget", budget, "--data.shots", str(shots), *QUIET]
    return [*start, *chosen, *given]


def chosen_by(arguments):
    line = read_command_line(arguments, list(OPTIONS))
    return choose(line, settings(line)[1])


def result_of(root: Path) -> dict:
    (file,) = root.glob("*/*/result.json")
    return json.loads(file.read_text())


@pytest.fixture(scope="module")
def automatic(tmp_path_factory):
    """The folder of a run with a budget, and what it printed."""
    root = tmp_path_factory.mktemp("auto")
    run(words(shots=4, **{"run.root": root}, **SHORT_TEST))
    return next(root.glob("*/*"))


def test_the_answer_is_an_ordinary_run(automatic, tmp_path):
    result = json.loads((automatic / "result.json").read_text())
    assert automatic.parent.name == "clip_16shot"
    assert result["method"] in {"Ridge", "GDA", "Average (Ridge, GDA)", "Average (GDA, Ridge)"}
    again = ["test", "--config", automatic / "config.yaml", "--ckpt_path", automatic / "tuned.safetensors"]
    run([str(word) for word in (*again, "--run.root", tmp_path, *QUIET[:2])])
    tested = result_of(tmp_path)
    for name in ("acc", "ece", "ece_before", "brier", "forecast", "calibration"):
        assert tested[name] == result[name], name
    alone = shlex.split(result["auto"]["words"])
    base = ["fit", "--config", "clip_16shot.yaml", "--data.shots", "4", *QUIET]
    base += [f"--{name}={value}" for name, value in SHORT_TEST.items()]
    run([*base, *alone, "--run.root", str(tmp_path / "alone"), "--run.calibrate", "false"])
    assert result_of(tmp_path / "alone")["acc"] == result["acc"]


def test_the_record_tells_what_was_tried_and_why(automatic):
    told = json.loads((automatic / "result.json").read_text())["auto"]
    assert told == json.loads((automatic / "auto.json").read_text())
    assert [trial["words"] for trial in told["trials"]] == CLOSED
    assert {trial["state"] for trial in told["trials"]} == {"judged"}
    assert all(0 <= trial["accuracy"] <= 1 and trial["held_out"] == 40 for trial in told["trials"])
    assert "of 40 held-out shots right" in told["why"]
    assert told["budget"] == 60
    assert 0 < told["seconds"] < 60
    assert told["calibration"]["folds"] == 4
    assert told["calibration"]["forecast"]["optimism"] >= 0


def test_a_resumed_run_keeps_its_choice(tmp_path):
    steps = "--config methods/linear_probe.yaml"
    run(words(candidates=[steps], **{"run.root": tmp_path, "run.test": "false"}))
    (folder,) = tmp_path.glob("*/*")
    before, told = read_tensors(folder / "tuned.safetensors"), (folder / "auto.json").read_text()
    assert json.loads(told)["calibration"]["held_out"] > 0
    (folder / "tuned.safetensors").unlink()
    run(["fit", "--resume", str(folder), *QUIET[:2], "--run.test", "true"])
    result = json.loads((folder / "result.json").read_text())
    assert result["auto"] == json.loads(told)
    assert result["forecast"] == result["auto"]["calibration"]["forecast"]
    after = read_tensors(folder / "tuned.safetensors")
    assert after[1] == before[1]
    assert all(torch.equal(after[0][name], tensor) for name, tensor in before[0].items())


def test_no_validation_or_test_image_is_opened():
    line = read_command_line(words(), list(OPTIONS))
    search = Search(line, settings(line)[1])
    search.run()
    assert set(search.data._parts) - {"val"} == {"train", "judged"}
    (judge,) = search.judges.values()
    assert set(judge.trainer.callbacks[0].read) == {"train", "judged"}


class TestBudget:
    @pytest.mark.parametrize(
        ("text", "seconds"), [("30s", 30), ("5m", 300), ("1h", 3600), ("1h30m", 5400), ("45", 45), (" 2M ", 120)]
    )
    def test_times(self, text, seconds):
        assert seconds_of(text) == seconds

    @pytest.mark.parametrize("text", ["", "0s", "five", "5 m", "-3s", "1d", "30s5m", "0"])
    def test_other_words_are_refused(self, text):
        with pytest.raises(UserError, match="30s, 5m or 1h"):
            seconds_of(text)

    def test_what_is_too_short_for_a_second_candidate_answers_with_the_first(self, monkeypatch):
        monkeypatch.setattr(auto, "seconds_of", lambda _: 1e-6)
        _, choice = chosen_by(words())
        assert choice.words == CLOSED[0]
        assert [trial["state"] for trial in choice.trials][1:] == ["left out: the budget was spent"] * 2

    def test_training_that_takes_too_long_is_left_out(self):
        long = "--config methods/linear_probe.yaml --trainer.max_epochs 100000"
        _, choice = chosen_by([w for w in words(budget="12s", candidates=[CLOSED[1], long]) if w not in QUIET[-2:]])
        assert choice.words == CLOSED[1]
        assert "does not fit into the budget" in choice.trials[1]["state"]


class TestCandidates:
    def test_one_that_is_refused_is_told_and_passed_over(self):
        wrong = "--config methods/ridge.yaml --model.classifier.strength -1"
        _, choice = chosen_by(words(candidates=[wrong, CLOSED[1]]))
        assert choice.words == CLOSED[1]
        assert "strength" in choice.trials[0]["state"]
        assert choice.trials[0]["accuracy"] is None

    def test_none_that_fits_is_one_line(self, capsys):
        with pytest.raises(SystemExit) as end:
            main(words(candidates=["--config methods/ridge.yaml --model.classifier.strength -1"]))
        assert end.value.code == 2
        (said,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
        assert "No candidate can be fitted" in said
        assert "strength" in said

    def test_data_stays_what_it_is(self):
        _, choice = chosen_by(words(candidates=[CLOSED[1], "--config methods/gda.yaml --data.shots 16"]))
        assert "--data.shots" in choice.trials[1]["words"]
        assert choice.trials[1]["accuracy"] is not None, "options that were given win"
        _, choice = chosen_by(words(candidates=[CLOSED[1], "--config methods/gda.yaml --data.augment null"]))
        assert choice.trials[1]["state"] == "refused: a candidate may change nothing of the data but their batch_size"

    def test_each_is_judged_with_its_own_batches(self, monkeypatch):
        """ProLIP takes all shots in a step."""
        seen, fit = [], folds.fit
        monkeypatch.setattr(
            folds, "fit", lambda twin, data, *a, **k: seen.append(data.batch_size) or fit(twin, data, *a, **k)
        )
        short = [f"--config methods/{name}.yaml --trainer.max_epochs 4" for name in ("prolip", "task_res")]
        _, choice = chosen_by(words(shots=2, candidates=short))
        assert all(trial["accuracy"] is not None for trial in choice.trials)
        assert seen[:2] == [65536, 32]

    def test_other_features_have_a_backbone_of_their_own(self):
        other = "--config methods/ridge.yaml --model.backbone.features last4 --model.classifier.text false"
        line = read_command_line(words(candidates=[CLOSED[1], other]), list(OPTIONS))
        search = Search(line, settings(line)[1])
        search.run()
        first, second = search.judges.values()
        assert second.judged.shape[1] == 4 * 192 != first.judged.shape[1]

    def test_the_better_half_of_what_takes_steps_goes_on(self):
        rates = ("1e-3", "1e-2", "1e-9", "2e-9")
        start = "--config methods/linear_probe.yaml --model.classifier.head_start zero"
        steps = [f"{start} --model.optimizer.lr {rate}" for rate in rates]
        _, choice = chosen_by(words(shots=4, candidates=[CLOSED[0], *steps]))
        states = {trial["words"]: trial for trial in choice.trials}
        went_on = [each for each in steps if "left out" not in states[each]["state"]]
        assert len(went_on) == 1
        assert went_on[0] in steps[:2]
        assert states[went_on[0]]["held_out"] == 40
        assert all(states[each]["held_out"] == 10 for each in steps if each not in went_on)

    def test_each_has_the_features_that_it_takes(self):
        """ProLIP's are from before the projection, and others' on the same backbone are not."""
        prolip = "--config methods/prolip.yaml"
        for candidates in ([CLOSED[1], prolip], [prolip, CLOSED[1]]):
            _, choice = chosen_by(
                words(shots=2, candidates=candidates, **{"data.batch_size": 64, "data.augment": "null"})
            )
            assert [trial["state"] for trial in choice.trials if "prolip" not in trial["words"]] == ["judged"]
            assert all(trial["accuracy"] > 0.3 for trial in choice.trials), choice.trials

    def test_what_went_no_further_is_not_joined_with_later_rounds(self, monkeypatch):
        monkeypatch.setattr(Search, "left", property(lambda self: 1e3 if not self.late else next(self.late)))
        line = read_command_line(
            words(shots=4, candidates=[CLOSED[1], "--config methods/linear_probe.yaml"]), list(OPTIONS)
        )
        search = Search.__new__(Search)
        search.late = None
        search.__init__(line, settings(line)[1])
        trained = [trial for trial in search.trials if search.first(trial)]
        short = search.found[trained[0].words]
        search.late = iter([0.0] + [1e3] * 99)  # no time for all steps, and then plenty
        search.go_on(trained)
        assert search.whole == []
        assert search.found[trained[0].words] is short

    def test_what_trains_may_win(self):
        better = "--config methods/linear_probe.yaml --model.optimizer.lr 1e-2 --model.optimizer.weight_decay 0"
        nonsense = {"data.class_names": json.dumps(["qz" * (i + 1) for i in range(10)])}
        line, choice = chosen_by(words("10m", 4, ["--config methods/zero_shot.yaml", better], **nonsense))
        assert choice.words == better
        assert choice.calibration["folds"] == 4
        assert ("config", "methods/linear_probe.yaml") in line.words


class TestOneShot:
    def test_the_text_decides_where_it_tells_the_shots_apart(self):
        candidates = [*CLOSED, "--config methods/class_mean_text.yaml"]
        _, choice = chosen_by(words(shots=1, candidates=candidates))
        assert choice.words == candidates[-1]
        assert choice.calibration is None
        nonsense = {"data.class_names": json.dumps(["qz" * (i + 1) for i in range(10)])}
        _, choice = chosen_by(words(shots=1, candidates=candidates, **nonsense))
        assert choice.words == CLOSED[1]
        assert choice.why.endswith("the text is right about 10% of them")
        _, choice = chosen_by(words(shots=1, candidates=[*candidates, SEVERAL_LAYERS], **nonsense))
        assert choice.words == SEVERAL_LAYERS

    def test_a_backbone_without_text(self):
        tiny = ["--model.backbone.model", "test_vit", "--model.backbone.weights", "random"]
        tiny += ["--model.backbone.image_size", "null"]
        arguments = ["fit", "--config", "dinov2_vits14_16shot.yaml", "--budget", "60s", "--data.shots", "1", *tiny]
        _, choice = chosen_by([*arguments, *QUIET, "--candidates", json.dumps(CLOSED)])
        assert choice.words == CLOSED[1]
        assert "needs a text tower" in choice.trials[0]["state"]

    @pytest.mark.parametrize(("left", "chosen"), [(1e3, 1), (0.1, 0)])
    def test_what_goes_on_from_ridge_while_features_change_is_taken_where_there_is_time(
        self, left, chosen, monkeypatch
    ):
        monkeypatch.setattr(Search, "left", property(lambda self: left if self.soft else 1e3))
        monkeypatch.setattr(Search, "within", lambda self, judge, seconds, answer: answer())
        adapted = "--config methods/lora.yaml --model.classifier LinearProbe --model.targets [image.*.q]"
        text, probe = "--config methods/lora.yaml --model.targets [image.*.q]", "--config methods/linear_probe.yaml"
        candidates = [CLOSED[1], adapted, text, probe]
        nonsense = {"data.class_names": json.dumps(["qz" * (i + 1) for i in range(10)])}
        _, choice = chosen_by(words(shots=1, candidates=candidates, **nonsense))
        assert choice.words == candidates[chosen]
        assert {trial["state"] for trial in choice.trials} == {"not judged: no class has two images"}


def folder(root: Path, counts: dict[str, int], same: bool = False) -> Path:
    chance = np.random.default_rng(0)
    for number, (name, count) in enumerate(counts.items()):
        (root / name).mkdir(parents=True)
        for i in range(count):
            noise = np.random.default_rng(i) if same else chance
            pixels = noise.integers(0, 80, (32, 32, 3)) + (0 if same else 40 * number)
            Image.fromarray(pixels.astype(np.uint8)).save(root / name / f"{i}.png")
    return root


@pytest.mark.parametrize(
    ("counts", "same"),
    [
        ({"one": 9, "two": 9, "three": 2}, False),
        ({"one": 8, "two": 8}, True),
        ({"one": 30, "two": 4}, False),
    ],
    ids=["one image of a class", "the same images under two labels", "unequal classes"],
)
def test_odd_folders_end_well(counts, same, tmp_path):
    root = folder(tmp_path / "images", counts, same)
    options = {"data.dataset": root, "run.root": tmp_path / "runs", "data.allow_fewer": "true"}
    run(words(shots=8, candidates=[*CLOSED, "--config methods/kernel_ridge.yaml"], **options))
    result = result_of(tmp_path / "runs")
    assert 0 <= result["acc"] <= 1
    if same:
        assert result["forecast"]["accuracy"] < 0.8
    if result["forecast"]:
        assert result["forecast"]["low"] <= result["forecast"]["accuracy"] <= result["forecast"]["high"]


def test_members_are_stated_without_what_decides_nothing():
    spec = {"class_path": "kshot.classifiers.Ridge", "init_args": {"strength": None, "text": False}}
    assert stated(spec) == {"class_path": "Ridge", "init_args": {"text": False}}
    assert stated({"class_path": "kshot.classifiers.GDA"}) == {"class_path": "GDA"}
