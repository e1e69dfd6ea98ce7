"""Choosing settings in ranges on the shots alone: what is tried, pruned, kept and told, and what is refused."""

import json
import shlex
import sys

import pytest
import torch
import torch.nn.functional as F
import towers
from command_line import refused
from sklearn.linear_model import Ridge

from kshot import folds
from kshot.checkpoint import read_tensors
from kshot.choice import SearchOptions
from kshot.commands import run
from kshot.config import read_command_line, word_of
from kshot.folds import HeldOut, stratified_folds
from kshot.forecast import optimism_of
from kshot.places import place_of
from kshot.ranges import checked_ranges, range_of
from kshot.searching import Tuning, read_tried, search, worth
from kshot.settings import OPTIONS, settings

QUIET = ["--trainer.enable_progress_bar=false", "--data.views=1", "--trainer.accelerator=cpu"]
STRENGTHS = [1e-4, 1e-2, 1.0, 100.0]
RIDGE = {"model.classifier.strength": STRENGTHS}
RATES = {"model.optimizer.lr": {"low": 1e-5, "high": 1e-1, "log": True}}
SHORT_TEST = ["--trainer.limit_test_batches=1", "--data.eval_batch_size=16"]


def words(root, ranges, method="ridge", shots=4, *others, **options):
    asked = json.dumps({"ranges": ranges, **options})
    start = ["fit", "--config=clip_16shot.yaml", f"--config=methods/{method}.yaml", f"--data.shots={shots}", *QUIET]
    return [*start, "--trainer.max_epochs=4", f"--run.root={root}", f"--search={asked}", *others]


def probing(root, ranges=RATES, *others, shots=2, **options):
    """The words of a search of a linear probe on a tower of two blocks, which is enough where nothing hangs on it."""
    tiny = f"--model.backbone.model={towers.folder_of('clip')}"
    return words(root, ranges, "linear_probe", shots, tiny, *others, **options)


def searched(arguments):
    line = read_command_line(arguments, list(OPTIONS))
    return search(line, *settings(line))


def tuning_of(arguments):
    line = read_command_line(arguments, list(OPTIONS))
    places, tree = settings(line)
    asked = SearchOptions(**tree["search"])
    return Tuning(line, tree, asked, checked_ranges(asked.ranges, line, places, tree))


def told(choice):
    """What was tried, but for the seconds that it took."""
    return [{name: value for name, value in trial.items() if name != "seconds"} for trial in choice.trials]


@pytest.fixture
def judgements(monkeypatch):
    """The words of all settings that are judged, not remembered."""
    seen, keep = [], Tuning.keep
    monkeypatch.setattr(Tuning, "keep", lambda self, tried: seen.append(tried.words) or keep(self, tried))
    return seen


class TestFound:
    def test_all_settings_are_tried_where_there_are_few_and_the_best_is_found(self, tmp_path):
        """By ridge regression of scikit-learn on the same folds."""
        tuning = tuning_of(words(tmp_path, RIDGE, "ridge", 4, "--model.classifier.text=false"))
        _, choice = tuning.run()
        assert [trial["words"] for trial in choice.trials[1:]] == [
            f"--model.classifier.strength {s}" for s in STRENGTHS
        ]
        (judge,) = tuning.judges.values()
        seen, held = (F.normalize(each.double(), dim=-1) for each in (judge.train.features[0], judge.judged))
        fold = stratified_folds(judge.label, 4, tuning.data.split_seed)
        hits = torch.stack([hits_of(seen, held, judge.label, fold, strength) for strength in STRENGTHS])
        right = hits.sum(1).tolist()
        assert [round(40 * trial["accuracy"]) for trial in choice.trials[1:]] == right
        assert len(set(right)) > 1, "nothing to choose from"
        best = max([*right, round(40 * choice.trials[0]["accuracy"])])
        assert choice.why.startswith(f"{best} of 40 held-out shots right")
        configured = tuning.tried[""].hits
        assert round(optimism_of(torch.stack([configured, *hits])), 4) == choice.calibration["forecast"]["optimism"] > 0

    def test_a_sampler_comes_near_to_the_best_of_many(self, tmp_path):
        """A coarse and a fine search of the same range, of which only a part is tried."""
        every = [10.0**e for e in range(-6, 7, 2)]
        _, exhaustive = searched(words(tmp_path, {"model.classifier.strength": every}))
        log = {"model.classifier.strength": {"low": 1e-6, "high": 1e6, "log": True}}
        _, sampled = searched(words(tmp_path, log, trials=8, sampler="tpe"))
        assert len(sampled.trials) == 9
        best, worst = (f(t["values"][-1] for t in exhaustive.trials) for f in (max, min))
        assert worst < best - 0.1
        assert max(t["values"][-1] for t in sampled.trials) > best - 0.03

    def test_the_answer_is_an_ordinary_run_that_tells_the_search(self, tmp_path):
        run([*words(tmp_path, {"model.classifier.strength": [100.0, 1.0]}), *SHORT_TEST])
        (file,) = tmp_path.glob("*/*/result.json")
        result, folder = json.loads(file.read_text()), file.parent
        auto = result["auto"]
        assert folder.parent.name == "clip_16shot+ridge"
        assert auto["search"]["ranges"] == {"model.classifier.strength": ["100.0", "1.0"]}
        assert [trial["state"] for trial in auto["trials"]] == ["judged"] * 3
        assert "held-out shots right" in auto["why"]
        assert "right" not in auto["trials"][0]
        assert result["forecast"] == auto["calibration"]["forecast"]
        assert result["forecast"]["optimism"] >= 0
        alone = [word for word in words(tmp_path / "alone", {}) if not word.startswith("--search")]
        run([*alone[:3], *shlex.split(auto["words"]), *alone[3:], "--run.calibrate=false", "--run.test=false"])
        (again,) = (tmp_path / "alone").glob("*/*/tuned.safetensors")
        before, after = (read_tensors(path)[0] for path in (folder / "tuned.safetensors", again))
        shared = before.keys() & after.keys()
        assert any("classifier" in name for name in shared)
        assert all(torch.equal(before[name], after[name]) for name in shared)

    def test_no_validation_or_test_image_is_opened(self, tmp_path):
        tuning = tuning_of(words(tmp_path, RIDGE))
        tuning.run()
        assert set(tuning.data._parts) - {"val"} == {"train", "judged"}
        (judge,) = tuning.judges.values()
        assert set(judge.trainer.callbacks[0].read) == {"train", "judged"}

    def test_accuracy_counts_first_and_then_the_loss(self):
        label = torch.tensor([0, 1, 0, 1])

        def found(*margins):
            logits = torch.tensor(margins)[:, None] * F.one_hot(label)
            return worth(HeldOut(logits.double(), label, torch.arange(4), 1, 2, 2))

        assert found(1, 1, 1, -9) > found(9, 9, -1, -1)
        assert found(9, 9, 9, -1) > found(1, 9, 9, -1) > found(1, 9, 9, -9)
        assert found(9, 9, 9, 9) > found(1, 9, 9, -1)


def hits_of(seen, held, label, fold, strength):
    """Which images are right by ridge regressions of those in other folds."""
    right = torch.zeros(len(label), dtype=torch.bool)
    for out in (fold == number for number in range(4)):
        x, y = seen[~out].numpy(), F.one_hot(label[~out]).double().numpy()
        power = ((x - x.mean(0)) ** 2).sum() / len(x)
        found = Ridge(alpha=strength * power).fit(x, y).predict(held[out].numpy())
        right[out] = torch.from_numpy(found.argmax(-1)) == label[out]
    return right


class TestGoingOn:
    @pytest.fixture(scope="class")
    def whole(self, tmp_path_factory):
        root = tmp_path_factory.mktemp("whole")
        choice = searched(probing(root, trials=2))[1]
        (file,) = root.glob("*/search-*.jsonl")
        return choice, [json.loads(line)["words"] for line in file.read_text().splitlines()]

    @pytest.mark.parametrize(
        "kept", [pytest.param(1, marks=pytest.mark.slow), 2, pytest.param(3, marks=pytest.mark.slow)]
    )
    def test_a_killed_search_ends_as_an_undisturbed_one(self, kept, tmp_path, whole, judgements, monkeypatch):
        choice, made = whole
        keep = Tuning.keep
        with monkeypatch.context() as patch:
            patch.setattr(Tuning, "keep", lambda s, tried: keep(s, tried) if len(judgements) < kept else stop())
            patch.setattr(Tuning, "best_of_tried", stop)
            with pytest.raises(KeyboardInterrupt):
                searched(probing(tmp_path, trials=2))
        (file,) = tmp_path.glob("*/search-*.jsonl")
        assert len(read_tried(file)) == kept
        with file.open("ab") as cut:
            cut.write(b'{"words": "--model.optim')  # by a power cut
        judgements.clear()
        again = searched(probing(tmp_path, trials=2))[1]
        assert judgements == made[kept:]
        assert told(again) == told(choice)
        assert (again.words, again.why, again.calibration) == (choice.words, choice.why, choice.calibration)
        assert [json.loads(line)["words"] for line in file.read_text().splitlines()] == made

    def test_the_same_seed_proposes_the_same_and_another_seed_other(self, tmp_path, whole, judgements):
        """With fewer trials, and then with more, which go on from those before."""
        one, two = (searched(probing(tmp_path, trials=trials))[1] for trials in (1, 2))
        assert told(one) == told(whole[0])[:2]
        assert told(two) == told(whole[0])
        assert judgements == whole[1]
        other = searched(probing(tmp_path, RATES, "--seed_everything=2", trials=1))[1]
        assert {trial["words"] for trial in other.trials} & set(whole[1]) == {""}

    def test_other_settings_have_a_file_of_their_own(self, tmp_path):
        one = {"model.classifier.strength": [1.0]}
        for others in ((), ("--model.classifier.text=false",)):
            searched(words(tmp_path, one, "ridge", 2, *others))
        searched(words(tmp_path, one, "ridge", 3))
        assert len(list(tmp_path.glob("*/search-*.jsonl"))) == 3


def stop(*_):
    raise KeyboardInterrupt


class TestRounds:
    START = "--model.classifier.head_start=zero"

    def test_what_is_not_of_the_better_half_goes_no_further(self, tmp_path):
        """Asynchronous successive halving by hand: of a round, the best half of the values that there are so far."""
        rates = {"model.optimizer.lr": [1e-2, 1e-9, 3e-9, 2e-9, 3e-2]}
        _, choice = searched(words(tmp_path, rates, "linear_probe", 2, self.START))
        rounds, ended = ([], []), {"judged": 0, "pruned": 0}
        for trial in choice.trials[1:]:
            for step, value in enumerate(trial["values"][:2]):
                rounds[step].append(value)
                goes_on = value >= sorted(rounds[step], reverse=True)[max(0, len(rounds[step]) // 2 - 1)]
                assert goes_on == (len(trial["values"]) > step + 1), trial
                if not goes_on:
                    assert trial["state"].startswith(f"pruned after round {step + 1}, with ")
            assert (trial["accuracy"] is None) == (len(trial["values"]) < 3) == (trial["state"] != "judged")
            ended[trial["state"][:6]] += 1
        assert min(ended.values()) > 0
        assert len(choice.trials[0]["values"]) == 3, "the configured settings go through all"

    def test_rounds_take_a_quarter_of_the_steps_then_all_on_a_fold_then_all_folds(self, tmp_path, monkeypatch):
        seen, shots, fit = [], [], folds.fit

        def counted(twin, data, trainer, **options):
            fit(twin, data, trainer, **options)
            seen.append(trainer.current_epoch)
            shots.append(len(data.draw.train))

        monkeypatch.setattr(folds, "fit", counted)
        _, choice = searched(probing(tmp_path, {"model.optimizer.lr": [1e-2]}, shots=4))
        assert [trial["held_out"] for trial in choice.trials] == [40, 40], "each shot once"
        assert seen == [1, 4, 4, 4, 4] * 2
        assert shots == [30] * 10

    def test_settings_that_fail_are_told_and_passed_over(self, tmp_path):
        run([*words(tmp_path, {"model.classifier.strength": [-1, 1.0]}, shots=2), *SHORT_TEST])
        (file,) = tmp_path.glob("*/*/result.json")
        failed, judged = json.loads(file.read_text())["auto"]["trials"][1:]
        assert "refused" in failed["state"]
        assert "strength" in failed["state"]
        assert failed["accuracy"] is None
        assert judged["state"] == "judged"

    def test_what_is_not_finite_is_passed_over(self, tmp_path):
        rates = {"model.optimizer.lr": [1e38, 1e-3]}
        _, choice = searched(probing(tmp_path, rates, "--model.optimizer=SGD"))
        assert "not finite" in choice.trials[1]["state"]
        assert choice.words != "--model.optimizer.lr 1e+38"

    def test_what_takes_too_much_memory_is_passed_over(self, tmp_path, monkeypatch):
        build = Tuning.module

        def crowded(self, words):
            if words.endswith("100.0"):
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB.")
            return build(self, words)

        monkeypatch.setattr(Tuning, "module", crowded)
        _, choice = searched(words(tmp_path, {"model.classifier.strength": [100.0, 1.0]}, "ridge", 2))
        states = [trial["state"] for trial in choice.trials]
        assert states == [
            "judged",
            "refused: it takes too much memory (CUDA out of memory. Tried to allocate 9 GiB.)",
            "judged",
        ]

    def test_none_that_fits_is_one_line(self, tmp_path, capsys):
        decays = {"model.optimizer.weight_decay": [1.0, 2.0]}
        rate = ["--model.optimizer=SGD", "--model.optimizer.lr=1e38"]
        said = refused(capsys, probing(tmp_path, decays, *rate))
        assert "no settings can be fitted" in said
        assert "not finite" in said


class TestNothingToSearch:
    def test_one_shot_is_fitted_as_configured(self, tmp_path):
        line, choice = searched(words(tmp_path, RIDGE, shots=1))
        assert (choice.words, choice.trials, choice.calibration) == ("", [], None)
        assert "no class has two images" in line.notes[0]

    def test_what_takes_no_step_has_no_rate(self, tmp_path):
        line, choice = searched(words(tmp_path, RATES, "class_mean"))
        assert choice.trials == []
        assert line.notes == ["search: NearestClassMean takes no step, and model.optimizer.lr changes nothing of it."]
        assert (
            searched(words(tmp_path, RATES | {"model.classifier.strength": [1.0]}, shots=2))[1].search["ranges"].keys()
            == RIDGE.keys()
        )


LOW = '{"ranges": {"model.optimizer.lr": %s}}'
REFUSED = {
    LOW % '{"low": 1e-2, "high": 1e-3}': ("low is 1e-2 and high 1e-3", "the smaller one"),
    LOW % '{"low": 1e-2, "high": 1e-2}': ("low is 1e-2 and high 1e-2", "the smaller one"),
    LOW % '{"low": 0, "high": 1, "log": true}': ("low is 0", "begin above 0"),
    LOW % '{"low": 0.0, "high": 1}': ("model.optimizer.lr is 0.0", "positive number"),
    LOW % '{"low": 1e-3, "high": 1, "log": "yes"}': ("log is 'yes'", "true or false"),
    LOW % '{"low": 1e-3, "high": 1, "log": true, "step": 0.1}': ("log and a step", "leave one"),
    LOW % '{"low": 1e-3, "high": 1, "step": 2}': ("step is 2", "high - low"),
    LOW % '{"low": 1e-3}': ("has no high", "low and high"),
    LOW % '{"low": 1e-3, "hi": 1}': ("no 'hi'", "Did you mean 'high'"),
    LOW % '{"low": "much", "high": 1}': ("low is 'much'", "a number"),
    LOW % '{"low": 1e-3, "high": .inf}': ("high is inf", "a number"),
    LOW % "0.1": ("is 0.1", "a list of values"),
    LOW % "[]": ("is []", "list values"),
    LOW % "[0.1, 0.1]": ("is [0.1, 0.1]", "each once"),
    LOW % "[0.1, fast]": ("model.optimizer.lr", "Got value: fast"),
    '{"ranges": {}}': ("search.ranges is empty", "model.optimizer.lr"),
    '{"trials": 3}': ("search.ranges is missing", "give --search.ranges"),
    '{"ranges": {"model.optimizer.rate": [1, 2]}}': ("has no option 'rate'", "There are"),
    '{"ranges": {"model.adapter.rnak": [1, 2]}}': ("LoRA has no option 'rnak'", "Did you mean 'rank'?"),
    '{"ranges": {"model.adapter.rank": {"low": 1.5, "high": 4}}}': ("takes whole numbers", "1.5"),
    '{"ranges": {"model.adapter.rank": [0, 4]}, "sampler": "grid"}': ("search.sampler", "tpe or random"),
    '{"ranges": {"lr": [1, 2]}}': ("'lr' stays as it is", "model, trainer"),
    '{"ranges": {"data.shots": [1, 2]}}': ("'data.shots' stays as it is", "data.batch_size"),
    '{"ranges": {"trainer.max_epochs": [1, 2]}}': ("trainer.max_epochs is given as an option as well", "leave one"),
    '{"ranges": {"model.adapter.rank": [2, 4]}, "trials": 0}': ("search.trials is 0", "1 or more"),
    '{"ranges": {"model.adapter.rank": [2, 4]}, "trails": 3}': ("no option 'trails'", "Did you mean 'trials'?"),
    "20": ("search: Expected SearchOptions", "20"),
}


@pytest.mark.parametrize("asked", REFUSED)
def test_what_is_no_range_gets_one_line_before_anything_starts(asked, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(Tuning, "__init__", None)
    start = ["fit", "--config=clip_16shot.yaml", f"--run.root={tmp_path}", "--trainer.max_epochs=4"]
    line = refused(capsys, [*start, f"--search={asked}"])
    for part in REFUSED[asked]:
        assert part in line
    assert not list(tmp_path.iterdir())


def test_a_budget_and_a_search_are_refused(tmp_path, capsys):
    assert "leave one of them out" in refused(capsys, words(tmp_path, RIDGE, "ridge", 4, "--budget=5m"))


def test_several_devices_are_refused(tmp_path, capsys):
    two = ["--trainer.devices=2", "--trainer.strategy=ddp"]
    assert "judges on one device: --trainer.devices 1" in refused(capsys, words(tmp_path, RIDGE, "ridge", 4, *two))


def test_without_optuna_a_line_says_what_installs_it(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    assert "pip install 'kshot[search]'" in refused(capsys, words(tmp_path, RIDGE))


@pytest.mark.parametrize(
    ("spec", "hint", "count", "ends"),
    [
        ({"low": 2, "high": 9, "step": 3}, int, 3, ["2", "8"]),
        ({"low": 1, "high": 4}, int, 4, ["1", "4"]),
        ({"low": 1, "high": 4}, float, 0, ["1.0", "4.0"]),
        ({"low": "1e-5", "high": "1e-2", "log": True}, float | None, 0, ["1e-05", "0.01"]),
        ({"low": 0, "high": 1, "step": 0.25}, float, 5, ["0.0", "1.0"]),
        ([None, "a b", 3], str, 3, ["null", "a b", "3"]),
    ],
)
def test_ranges_have_the_numbers_of_their_option(spec, hint, count, ends):
    found = range_of("x", spec, place_of(hint))
    assert len(found.values) == count
    assert found.ends == ends
    assert [found.word(value) for value in found.values] == [word_of(v) for v in found.values]
