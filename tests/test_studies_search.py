"""Studies whose runs search: which ranges are whose, that a killed worker's search goes on, and what is refused."""

import json
import shutil
from dataclasses import replace

import pytest
import towers
from studies import HEAD, outcome, records

from kshot.config import read_command_line
from kshot.errors import UserError
from kshot.searching import Tuning
from kshot.settings import OPTIONS
from kshot.settings import settings as resolve
from kshot.studies.plan import Planner
from kshot.studies.search import searching
from kshot.studies.store import write_study
from kshot.studies.study import read_study
from kshot.studies.sweep import run_sweep
from kshot.studies.worker import work

GRID = "grid: {method: [class_mean, linear_probe, lora], shots: [2, 3]}\n"
RANGES = "ranges: {model.adapter.rank: [2, 4], model.classifier.normalize: [true, false]}\n"


def study_of(folder, text, trials=0, name="searched"):
    file = folder / f"{name}.yaml"
    file.write_text(text)
    return searching(read_study(str(file)), trials)


def plan(folder, text, trials=0):
    """The runs by method and shots, and the notes."""
    planner = Planner(study_of(folder, text, trials))
    return {tuple(run.axes.values()): run for run in planner.runs()}, planner.notes


def search_of(run):
    """What the words of a run search for."""
    return resolve(read_command_line(["fit", *run.words], list(OPTIONS)))[1].get("search")


class TestPlan:
    def test_a_run_searches_the_ranges_that_it_has(self, tmp_path):
        runs, notes = plan(tmp_path, HEAD + GRID + RANGES + "search: {trials: 7}")
        asked = {cell: search_of(run) for cell, run in runs.items()}
        assert {cell: found and list(found["ranges"]) for cell, found in asked.items()} == {
            (method, shots): ranges
            for shots in (2, 3)
            for method, ranges in {
                "class_mean": None,
                "linear_probe": ["model.classifier.normalize"],
                "lora": ["model.adapter.rank"],
            }.items()
        }
        assert asked["lora", 2]["trials"] == 7
        assert notes == [
            "model.adapter.rank is searched where a run has it, which is not so for method class_mean; "
            "method linear_probe.",
            "model.classifier.normalize is searched where a run has it, which is not so for method class_mean; "
            "method lora.",
        ]
        assert search_of(plan(tmp_path, HEAD + GRID + RANGES, trials=3)[0]["lora", 2])["trials"] == 3

    def test_ids_say_what_is_searched(self, tmp_path):
        def ids(text, trials):
            return {cell: run.id for cell, run in plan(tmp_path, text, trials)[0].items()}

        plain = ids(HEAD + GRID, None)
        assert ids(HEAD + GRID + RANGES, None) == plain, "unless they are searched, ranges change no run"
        searched = ids(HEAD + GRID + RANGES, 0)
        same = {cell for cell in plain if plain[cell] == searched[cell]}
        assert same == {("class_mean", 2), ("class_mean", 3)}
        assert not set(searched.values()) & set(ids(HEAD + GRID + RANGES, 5).values()) - set(plain.values())
        spelt = RANGES.replace("[2, 4]", '["2", 4]')
        assert ids(HEAD + GRID + spelt, 0) == searched


REFUSED = {
    "ranges: {model.adapter.rnak: [2, 4]}": ("no run of the grid has an option 'model.adapter.rnak'", "rank'?"),
    "ranges: {model.adapter.rank: [2, 2.5]}": ("method lora", "model.adapter.rank: Expected int"),
    "ranges: {model.adapter.rank: {low: 4, high: 2}}": ("method lora", "low is 4 and high 2"),
    "ranges: {data.shots: [1, 2]}": ("'data.shots' stays as it is", "data.batch_size"),
    "ranges: {data.eval_batch_size: [1, 2]}": ("'data.eval_batch_size' stays as it is", "data.batch_size"),
    "ranges: {trainer.accelerator: [cpu, auto]}": ("trainer.accelerator is given as an option as well", "leave one"),
    "ranges: [model.adapter.rank]": ("ranges is ['model.adapter.rank']", "a mapping"),
    "ranges: {}": ("has no ranges to search", "model.optimizer.lr"),
    "": ("has no ranges to search", "model.optimizer.lr"),
    "search: {trials: 3}": ("a search needs ranges beside it", "model.optimizer.lr"),
    "ranges: {model.adapter.rank: [2, 4]}\nsearch: 3": ("search is 3", "search: {trials: 20}"),
    "ranges: {model.adapter.rank: [2, 4]}\nsearch: {trails: 3}": ("no option 'trails'", "Did you mean 'trials'?"),
    "ranges: {model.adapter.rank: [2, 4]}\nsearch: {trials: none}": ("search.trials", "Expected int"),
}


@pytest.mark.parametrize("text", REFUSED)
def test_what_cannot_be_searched_is_refused_before_anything_starts(text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "searched.yaml").write_text(HEAD + GRID + text)
    with pytest.raises(UserError) as error:
        run_sweep(["--config", "searched.yaml", "--search"])
    for part in REFUSED[text]:
        assert part in str(error.value)
    assert str(error.value).count("\n") == 0
    assert [path.name for path in tmp_path.iterdir()] == ["searched.yaml"]


def test_ranges_that_are_left_alone_are_told(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "searched.yaml").write_text(HEAD + GRID + RANGES)
    run_sweep(["--config", "searched.yaml", "--dry-run"])
    assert "The ranges in searched.yaml are left alone: --search" in capsys.readouterr().out
    run_sweep(["--config", "searched.yaml", "--search", "4", "--dry-run"])
    told = capsys.readouterr().out
    assert "model.adapter.rank is searched where a run has it" in told
    assert "left alone" not in told


TWO = HEAD.replace("data.views: 2", "data.views: 1, trainer.max_epochs: 4") + (
    "grid: {method: [ridge, linear_probe], shots: [2]}\n"
    "ranges: {model.optimizer.lr: {low: 1e-4, high: 1e-1, log: true}, model.classifier.strength: [0.1, 9]}\n"
)


def begun(folder):
    """A study of two runs that search, which is planned."""
    folder.mkdir()
    tiny = f"options: {{model.backbone.model: {json.dumps(str(towers.folder_of('clip')))}, "
    study = study_of(folder, TWO.replace("options: {", tiny), trials=1)
    write_study(folder / "study", study, Planner(study).runs())
    return folder / "study"


def choices(directory):
    """What each run chose, and why."""
    results = [json.loads((directory / r["run"] / "result.json").read_text()) for r in records(directory).values()]
    return {result["method"]: (result["auto"]["words"], result["auto"]["why"]) for result in results}


def test_a_killed_worker_loses_no_trial_and_the_study_ends_as_an_undisturbed_one(tmp_path, monkeypatch):
    judged, keep, last = [], Tuning.keep, 3

    def kept(self, tried):
        keep(self, tried)
        judged.append(tried.words)
        if len(judged) == last:
            raise KeyboardInterrupt

    whole = begun(tmp_path / "whole")
    killed = shutil.copytree(whole, tmp_path / "killed")
    assert work(whole) == 2
    monkeypatch.setattr(Tuning, "keep", kept)
    with pytest.raises(KeyboardInterrupt):
        work(killed)
    assert len(records(killed)) == 1
    assert work(killed) == 1
    assert len(judged) == len(set(judged)) + 1 == 2 * 2, "each trial once, and two as configured"
    assert outcome(killed) == outcome(whole)
    assert choices(killed) == choices(whole)
    assert choices(whole).keys() == {"Ridge", "LinearProbe"}


def test_a_search_of_0_trials_or_less_is_none(tmp_path):
    with pytest.raises(UserError, match="--search is -3, and must be a number of trials"):
        run_sweep(["--config", "x.yaml", "--search", "-3"])
    study = study_of(tmp_path, HEAD + GRID + RANGES, None)
    assert study.search is None
    assert replace(study, ranges=None) == study_of(tmp_path, HEAD + GRID, None)
