"""The index of a study and the command 'results', against the files by pandas, scipy and readers of others."""

import csv
import itertools
import json
import os
import random
import re
import shutil
import sqlite3
from pathlib import Path

import many_runs
import numpy as np
import pandas as pd
import pytest
import scipy.stats
from command_line import refused
from markdown_it import MarkdownIt
from processes import in_children

import kshot
from kshot.cli import main
from kshot.seeing.runs import row_of
from kshot.studies import index as indexing
from kshot.studies.index import opened, rows
from kshot.studies.pivot import pivoted
from kshot.studies.results import conditions

NAMES = ['a,b "c"', "it's | 50% & $x_1$ {#} ~^\\", "=1+1", "[été] 数字", "*a* <b> `c`"]


def result(seed: int, **given) -> dict:
    """A result of a run with figures drawn from a seed."""
    draw = random.Random(seed)
    names = ("acc", "acc_class_mean", "f1_macro", "ece", "ece_before", "brier", "zero_shot_acc")
    told = {"method": "M", "dataset": "d", "seed": seed, "split": {"shots": 4, "digest": f"sha256:{seed}"}}
    return told | {name: draw.random() for name in names} | {"seconds": {"fit": 1.5, "test": 0.25}, "steps": 7} | given


def line(id: str, axes: dict) -> str:
    return json.dumps({"id": id, "axes": axes, "words": ["--data.shots=4"]}) + "\n"


def put(path: Path, told: dict) -> None:
    """As a worker publishes: whole, in the place of what is there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.partial")
    beside.write_text(json.dumps(told))
    beside.replace(path)


def finish(study: Path, id: str, axes: dict, seed: int, number: str = "001", **given) -> None:
    put(study / "runs" / id / number / "result.json", result(seed, **given))
    put(study / "done" / f"{id}.json", {"id": id, "axes": axes, "run": f"runs/{id}/{number}"})


def fail(study: Path, id: str, axes: dict) -> None:
    put(study / "failed" / f"{id}.json", {"id": id, "axes": axes, "reason": "out of memory", "finished": "2026-11-26"})


def grid(study: Path, axes: dict, left=lambda labels: False) -> pd.DataFrame:
    """Writes a study, in which all is done but what is left; the same as a table of pandas."""
    cells = [dict(zip(axes, labels, strict=True)) for labels in itertools.product(*axes.values())]
    (study / "runs").mkdir(parents=True)
    (study / "plan.jsonl").write_text("".join(line(f"r{i}", labels) for i, labels in enumerate(cells)))
    for i, labels in enumerate(cells):
        if not left(labels):
            finish(study, f"r{i}", labels, i)
    return pd.DataFrame([labels | {"acc": result(i)["acc"], "ece": result(i)["ece"]} for i, labels in enumerate(cells)])


def run(*words) -> None:
    with pytest.raises(SystemExit) as end:
        main(["results", *map(str, words)])
    assert end.value.code == 0


@pytest.fixture(scope="module")
def real(tmp_path_factory) -> Path:
    """Four true runs as a study of six: one has failed, one is open."""
    study, told = tmp_path_factory.mktemp("studies") / "digits", {}
    for i, (method, seed) in enumerate(itertools.product(("class_mean", "ridge"), (1, 2))):
        options = {"data.split_seed": seed, "data.views": 2, "run.root": str(study / "runs"), "run.name": f"r{i}"}
        options |= {"trainer.limit_test_batches": 1, "data.eval_batch_size": 16}
        config = ["clip_16shot.yaml", f"methods/{method}.yaml"]
        directory = kshot.fit(config, data="digits", shots=2, progress=False, options=options).directory
        axes = told[f"r{i}"] = {"method": method, "shots": 2, "seed": seed}
        put(
            study / "done" / f"r{i}.json", {"id": f"r{i}", "axes": axes, "run": str(Path(directory).relative_to(study))}
        )
    told |= {"r4": {"method": "lora", "shots": 2, "seed": 1}, "r5": {"method": "lora", "shots": 2, "seed": 2}}
    fail(study, "r4", told["r4"])
    (study / "plan.jsonl").write_text("".join(line(id, axes) for id, axes in told.items()))
    return study


@pytest.fixture
def study(tmp_path) -> Path:
    """Eight runs of two axes; six are done, one has failed, one is open."""
    study = tmp_path / "study"
    grid(
        study,
        {"method": ["a", "b"], "seed": [1, 2, 3, 4]},
        lambda labels: labels["method"] == "b" and labels["seed"] > 2,
    )
    fail(study, "r6", {"method": "b", "seed": 3})
    return study


@pytest.fixture
def reads(monkeypatch) -> list[str]:
    """The results that are read."""
    seen = []
    read = indexing.result_of
    monkeypatch.setattr(indexing, "result_of", lambda path: seen.append(path.parent.name) or read(path))
    return seen


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    axes = {
        "method": ["lora", "LoRA x, y", "ridge"],
        "shots": [1, 4, 16],
        "model.lr": [0.1, 2e-3, "auto"],
        "seed": [1, 2],
    }
    study = tmp_path_factory.mktemp("wide") / "s"
    frame = grid(study, axes, lambda labels: labels["shots"] == 16 and labels["seed"] == 2)
    frame["state"] = np.where((frame.shots == 16) & (frame.seed == 2), "open", "done")
    frame.loc[frame.state == "open", ["acc", "ece"]] = np.nan
    return opened(study), frame


@pytest.fixture(scope="module")
def odd(tmp_path_factory):
    study = tmp_path_factory.mktemp("odd") / "s"
    return study, grid(study, {"method": NAMES, "shots": [1, 2], "seed": [1, 2]})


class TestRows:
    def test_rows_are_what_the_runs_wrote(self, real):
        found = pd.DataFrame(rows(real)).set_index("id")
        assert found.state.tolist() == ["done"] * 4 + ["failed", "open"]
        assert found.method.tolist() == ["class_mean"] * 2 + ["ridge"] * 2 + ["lora"] * 2
        assert found.reason.dropna().tolist() == ["out of memory"]
        files = sorted(real.glob("runs/*/*/result.json"))
        flat = pd.concat([pd.json_normalize(json.loads(file.read_text())) for file in files], ignore_index=True)
        done = found[found.state == "done"].reset_index()
        same = [
            "acc",
            "acc_class_mean",
            "f1_macro",
            "ece",
            "ece_before",
            "brier",
            "zero_shot_acc",
            "backbone",
            "dataset",
        ]
        same += [
            "protocol",
            "steps",
            "trainable_parameters",
            "total_parameters",
            "checkpoint_bytes",
            "peak_memory_bytes",
        ]
        same += ["device", "git_commit", "finished"]
        inside = {
            "shots": "split.shots",
            "split": "split.digest",
            "seconds_fit": "seconds.fit",
            "kshot": "versions.kshot",
        }
        inside |= {"seconds_calibrate": "seconds.calibrate", "seconds_test": "seconds.test"}
        inside |= {"forecast": "forecast.accuracy", "forecast_low": "forecast.low", "forecast_high": "forecast.high"}
        for name, place in {name: name for name in same}.items() | inside.items():
            assert done[name].tolist() == flat[place].tolist(), name
        total = flat[[name for name in flat if name.startswith("seconds.")]].sum(axis=1)
        assert done.seconds.tolist() == pytest.approx(total.tolist())
        assert [str(real / place / "result.json") for place in done.run] == [str(file) for file in files]
        assert found[found.state != "done"].acc.isna().all()

    def test_a_folder_of_runs_has_the_same_rows_as_the_list_of_runs(self, real):
        found = rows(real / "runs")
        for row in found:
            listed = row_of(real / "runs" / row["run"])
            same = (row["method"], row["dataset"], row["shots"], row["acc"], row["finished"])
            assert same == (listed.method, listed.data, listed.shots, listed.acc, listed.finished)
        assert len(found) == 4
        assert {row["method"] for row in found} == {"NearestClassMean", "Ridge"}
        assert not (real / "runs" / "index.sqlite").exists()
        assert rows(real / "runs" / "r0" / "001")[0]["acc"] == found[0]["acc"]

    def test_any_option_may_be_an_axis(self, tmp_path):
        values = [0.001, 2**70, True, None, "é,'\"", "2"]
        grid(tmp_path / "s", {'odd "axis"': values, "Method": ["x"]})
        found = rows(tmp_path / "s")
        assert [row['odd "axis"'] for row in found] == [0.001, str(2**70), "true", None, "é,'\"", "2"]
        assert {(row["Method"], row["method"]) for row in found} == {("x", "M")}

    def test_of_auto_and_of_base_to_new(self, tmp_path):
        more = {"auto": {"words": "--config methods/gda.yaml"}, "summary": {"harmonic_mean": 0.5}, "acc": float("nan")}
        finish(tmp_path, "r", {}, 1, **more)
        (row,) = rows(tmp_path)
        assert (row["auto"], row["harmonic_mean"], row["acc"]) == ("--config methods/gda.yaml", 0.5, None)


class TestUpdate:
    def test_only_what_is_new_is_read(self, study, reads):
        first = rows(study)
        assert sorted(reads) == ["r0", "r1", "r2", "r3", "r4", "r5"]
        content = (study / "index.sqlite").read_bytes()
        assert rows(study) == first
        assert len(reads) == 6
        assert (study / "index.sqlite").read_bytes() == content
        finish(study, "r7", {"method": "b", "seed": 4}, 70)
        assert rows(study)[7]["acc"] == result(70)["acc"]
        assert reads[6:] == ["r7"]

    def test_a_record_that_is_another_or_gone(self, study, reads):
        rows(study)
        reads.clear()
        finish(study, "r0", {"method": "a", "seed": 1}, 50, "002")
        (study / "done" / "r1.json").unlink()
        found = rows(study)
        assert (found[0]["acc"], found[0]["run"], found[1]["state"]) == (result(50)["acc"], "runs/r0/002", "open")
        assert reads == ["r0"]

    def test_what_failed_and_then_was_done_is_done(self, study):
        assert rows(study)[6]["reason"] == "out of memory"
        finish(study, "r6", {"method": "b", "seed": 3}, 60)
        row = rows(study)[6]
        assert (row["state"], row["reason"], row["acc"]) == ("done", None, result(60)["acc"])

    def test_a_plan_with_an_axis_more_needs_no_result_again(self, study, reads):
        rows(study)
        reads.clear()
        plan = [json.loads(each) for each in (study / "plan.jsonl").read_text().splitlines()]
        more = [line(each["id"], each["axes"] | {"backbone": "small"}) for each in plan]
        (study / "plan.jsonl").write_text("".join([*more, line("r8", {"method": "a", "seed": 1, "backbone": "large"})]))
        found = rows(study)
        assert [row["backbone"] for row in found] == ["small"] * 8 + ["large"]
        assert (found[8]["state"], reads) == ("open", [])

    def test_runs_that_the_plan_no_longer_has_are_left_out_and_told(self, study, capsys):
        lines = (study / "plan.jsonl").read_text().splitlines(keepends=True)
        (study / "plan.jsonl").write_text("".join(lines[2:]))
        assert [row["id"] for row in rows(study)] == [f"r{i}" for i in range(2, 8)]
        assert "left out: 2 runs in" in capsys.readouterr().err
        rows(study)
        assert "left out: 2 runs in" in capsys.readouterr().err, "said each time"

    def test_without_a_plan_there_are_the_runs_that_are_there(self, study):
        planned = rows(study)
        (study / "plan.jsonl").unlink()
        (study / "study.json").write_text("{}")
        assert rows(study) == planned[:7]
        (study / "done" / "r0.json").unlink()
        assert rows(study) == planned[1:7]

    def test_what_cannot_be_read_counts_as_failed_until_it_can(self, study, capsys):
        (study / "done" / "r0.json").write_text("{")
        (study / "runs" / "r1" / "001" / "result.json").write_text("[1]")
        rows(study)
        shutil.rmtree(study / "runs" / "r2")
        (study / "plan.jsonl").open("a").write("no json\n")
        found = rows(study)
        assert [row["state"] for row in found[:4]] == ["failed", "failed", "failed", "done"]
        assert "done/r0.json cannot be read" in found[0]["reason"]
        assert "is no result that this kshot reads" in found[1]["reason"]
        assert "is not there" in found[2]["reason"]
        said = capsys.readouterr().err
        assert "more such lines" in said
        finish(study, "r0", {"method": "a", "seed": 1}, 0)
        put(study / "runs" / "r1" / "001" / "result.json", result(1))
        assert [row["state"] for row in rows(study)[:4]] == ["done", "done", "failed", "done"]

    def test_an_index_says_what_one_made_anew_says(self, tmp_path):
        """Whatever happens to the files between two looks."""
        study, draw, axes = tmp_path / "s", random.Random(0), {f"r{i}": {"method": f"m{i}"} for i in range(12)}
        states = set()
        (study / "runs").mkdir(parents=True)
        for step in range(40):
            for id in draw.sample(sorted(axes), 3):
                what = draw.choice(["done", "failed", "gone", "no run", "plan"])
                if what == "done":
                    finish(study, id, axes[id], step, f"{step:03d}")
                elif what == "failed":
                    fail(study, id, axes[id])
                elif what == "gone":
                    (study / "done" / f"{id}.json").unlink(missing_ok=True)
                elif what == "no run":
                    shutil.rmtree(study / "runs" / id, ignore_errors=True)
                else:
                    kept = draw.sample(sorted(axes), 10)
                    (study / "plan.jsonl").write_text("".join(line(id, axes[id]) for id in kept))
            if (study / "plan.jsonl").exists():
                found = rows(study)
                states |= {row["state"] for row in found}
                kept_index = (study / "index.sqlite").rename(tmp_path / "index")
                assert rows(study) == found
                kept_index.replace(study / "index.sqlite")
        assert states == {"done", "failed", "open"}


class TestKept:
    @pytest.mark.parametrize("how", ["nothing", "half", "noise", "text", "of another format", "another table"])
    def test_an_index_that_is_none_is_made_anew(self, study, how, reads):
        expected, file = rows(study), study / "index.sqlite"
        content = file.read_bytes()
        if how == "of another format":
            connection = sqlite3.connect(file)
            connection.execute("UPDATE meta SET value = '[0]' WHERE name = 'format'")
            connection.execute("UPDATE runs SET acc = 7")
            connection.commit()
            connection.close()
        elif how == "another table":
            file.unlink()
            connection = sqlite3.connect(file)
            connection.execute("CREATE TABLE t (a)")
            connection.close()
        else:
            noise = content[:4096] + random.Random(0).randbytes(len(content) - 4096)
            file.write_bytes(
                {"nothing": b"", "half": content[: len(content) // 2], "noise": noise, "text": b"?" * 9000}[how]
            )
        reads.clear()
        assert rows(study) == expected
        assert len(reads) == 6
        assert rows(study) == expected
        assert len(reads) == 6, "and is kept"

    def test_where_it_cannot_be_kept_it_is_in_memory_and_said(self, study, capsys):
        expected = rows(study)
        (study / "index.sqlite").unlink()
        (study / "index.sqlite").mkdir()
        capsys.readouterr()
        assert rows(study) == expected
        (said,) = capsys.readouterr().err.splitlines()
        assert said.startswith("The index is kept in memory only: Could not write")
        assert [path.name for path in study.iterdir() if "partial" in path.name] == []

    @pytest.mark.skipif(not hasattr(os, "setuid"), reason="needs users")
    def test_a_folder_that_may_not_be_written(self, study, tmp_path):
        for place in (study, *study.rglob("*")):
            place.chmod(0o555 if place.is_dir() else 0o444)
        outer = [place for place in study.parents if place.stat().st_uid == os.getuid() and place.parent != place]
        before = [place.stat().st_mode for place in outer]
        for place in outer:
            place.chmod(0o755)

        def work():
            if os.getuid() == 0:
                os.setgroups([])
                os.setgid(65534)
                os.setuid(65534)
            index = opened(study)
            return [index.notes, index.select(["state"])]

        try:
            notes, states = many_runs.in_child(work)
        finally:
            for place, mode in zip(outer, before, strict=True):
                place.chmod(mode)
            for place in (study, *study.rglob("*")):
                place.chmod(0o755)
        assert len(notes) == 1
        assert "in memory only" in notes[0]
        assert states == [["done"]] * 6 + [["failed"], ["open"]]
        assert not (study / "index.sqlite").exists()

    def test_processes_that_read_and_update_at_once(self, tmp_path):
        """Three look again and again while one of them, and this one, publish runs: nobody sees anything but runs."""
        study, count = tmp_path / "s", 60
        labels = [{"method": f"m{i}"} for i in range(count)]
        (study / "runs").mkdir(parents=True)
        (study / "plan.jsonl").write_text("".join(line(f"r{i}", each) for i, each in enumerate(labels)))

        def look():
            mine, seen = int(os.environ["RANK"]), 0
            for i in range(mine, count, 3):
                finish(study, f"r{i}", labels[i], i)
                index = opened(study)
                assert index.notes == []
                done = index.select(["id", "acc"], [("state", "=", ["done"])])
                assert all(acc == result(int(id[1:]))["acc"] for id, acc in done)
                assert len(done) > seen
                seen = len(done)

        in_children(3, look)
        assert [row["acc"] for row in rows(study)] == [result(i)["acc"] for i in range(count)]


class TestFilters:
    @pytest.mark.parametrize(
        ("text", "expected"),
        [
            ("method=lora", lambda f: f.method == "lora"),
            ("method=lora,ridge shots>=4", lambda f: f.method.isin(["lora", "ridge"]) & (f.shots >= 4)),
            ("method='LoRA x, y'", lambda f: f.method == "LoRA x, y"),
            ('method="LoRA x, y",ridge', lambda f: f.method != "lora"),
            ("method~lora", lambda f: f.method != "ridge"),
            ("method!=lora  shots!=4,16", lambda f: (f.method != "lora") & (f.shots == 1)),
            ("model.lr=0.002", lambda f: f["model.lr"] == 2e-3),
            ("model.lr=2e-3", lambda f: f["model.lr"] == 2e-3),
            ("model.lr<=0.1", lambda f: f["model.lr"] != "auto"),
            ("model.lr=auto", lambda f: f["model.lr"] == "auto"),
            ("acc>0.4", lambda f: f.acc > 0.4),
            ("acc<40% shots<16", lambda f: (f.acc < 0.4) & (f.shots < 16)),
            ("acc!=2", lambda f: f.acc.notna()),
            ("state=done method<m", lambda f: (f.state == "done") & (f.method < "m")),
            ("state=open", lambda f: f.state == "open"),
        ],
    )
    def test_filters_keep_what_pandas_keeps(self, wide, text, expected):
        index, frame = wide
        found = index.select(["id"], conditions([text], index))
        assert [id for (id,) in found] == [f"r{i}" for i in frame.index[expected(frame)]]
        assert 0 < len(found) < len(frame)

    @pytest.mark.parametrize(("sort", "reverse"), [("acc", False), ("acc", True), ("shots,ece", False)])
    def test_sorted_as_pandas_does(self, wide, sort, reverse):
        index, frame = wide
        found = [id for (id,) in index.select(["id"], sort=sort.split(","), reverse=reverse)]
        expected = frame.sort_values(sort.split(","), ascending=not reverse, na_position="last", kind="stable").index
        assert found == [f"r{i}" for i in expected]

    def test_words_of_the_command(self, wide, capsys, tmp_path):
        study = tmp_path / "s"
        grid(study, {"method": ["a", "b"], "seed": [1, 2]})
        run(study, "--where", "method=a", "seed>1", "--json", "--columns", "method,seed,acc")
        assert json.loads(capsys.readouterr().out) == [{"method": "a", "seed": 2, "acc": result(1)["acc"]}]
        run(study, "--where", "method=aa,b")
        said = capsys.readouterr()
        assert "No run has method=aa. Did you mean 'a'?" in said.err
        assert "2 runs in" in said.out
        run(study, "--sort", "acc", "--reverse", "--columns", "acc")
        best = sorted((result(i)["acc"] for i in range(4)), reverse=True)
        assert capsys.readouterr().out.split()[-4:] == [f"{acc:.1%}" for acc in best]

    def test_a_long_table_is_cut_and_says_so(self, tmp_path, capsys):
        grid(tmp_path / "s", {"seed": list(range(203))}, lambda labels: True)
        run(tmp_path / "s")
        said = capsys.readouterr().out.splitlines()
        assert said[0] == f"203 runs in {tmp_path / 's'}: 203 open"
        assert said[-1] == "... and 3 more: --out FILE.csv has all of them"
        assert len(said) == 203

    def test_mistakes(self, study, capsys):
        def wrong(*words):
            return refused(capsys, ["results", str(study), *words])

        assert "There is no column 'shot'. Did you mean 'shots'?" in wrong("--where", "shot>1")
        assert "There is no column 'metod'. Did you mean 'method'?" in wrong("--pivot", "metod", "seed")
        assert "There is no column 'ac'" in wrong("--columns", "ac")
        assert "There is no column 'ac'" in wrong("--sort", "ac")
        assert "'>= 4' is no filter: COLUMN=VALUE without spaces" in wrong("--where", "seed=1 >= 4")
        assert "'method' is no filter" in wrong("--where", "method")
        assert "'method=\"a' is no filter" in wrong("--where", 'method="a')
        assert "seed>= is compared with one value, not with '1,2'" in wrong("--where", "seed>=1,2")
        assert "acc is a share between 0 and 1, not '90': acc>=0.9 or acc>=90%" in wrong("--where", "acc>=90")
        assert "ends in none of .csv, .parquet, .tex, .md" in wrong("--out", "table.xlsx")
        assert "--pivot takes ROWS COLUMNS" in wrong("--pivot", "method")
        assert "leave out --columns" in wrong("--pivot", "method", "seed", "--columns", "acc")
        assert "'split' holds words, such as 'sha256:" in wrong("--pivot", "method", "seed", "split")
        assert "There is no study and no folder of runs" in refused(capsys, ["results", str(study / "no")])
        assert "required: study" in refused(capsys, ["results"])


class TestPivot:
    def test_cells_are_those_of_pandas_and_intervals_those_of_scipy(self, tmp_path):
        frame = grid(tmp_path / "s", {"method": ["b", "a", "c"], "shots": [16, 1, 4], "seed": [1, 2, 3, 4, 5]})
        pivot = pivoted(opened(tmp_path / "s"), ["method"], ["shots"], "acc")
        mean, sem = (
            frame.pivot_table(index="method", columns="shots", values="acc", aggfunc=how) for how in ("mean", "sem")
        )
        assert (pivot.rows, pivot.columns) == ([("b",), ("a",), ("c",)], [(1,), (4,), (16,)])
        for ((method,), (shots,)), cell in pivot.cells.items():
            low, high = scipy.stats.t.interval(0.95, 4, mean.loc[method, shots], sem.loc[method, shots])
            assert (cell.mean, cell.seeds, cell.whole) == (pytest.approx(mean.loc[method, shots]), 5, True)
            assert cell.half == pytest.approx((high - low) / 2)
            assert cell.best == (mean[shots].idxmax() == method), "methods are compared at the same number of shots"
        turned = pivoted(opened(tmp_path / "s"), ["shots"], ["method"], "ece")
        less = frame.pivot_table(index="shots", columns="method", values="ece")
        assert all(cell.best == (less.loc[k].idxmin() == m) for ((k,), (m,)), cell in turned.cells.items())

    def test_data_sets_are_averaged_within_a_seed(self, tmp_path):
        axes = {"method": ["a", "b"], "dataset": ["d", "e", "f"], "seed": [1, 2, 3]}
        frame = grid(tmp_path / "s", axes)
        pivot = pivoted(opened(tmp_path / "s"), ["method"], ["protocol"], "acc")
        by_seed = frame.groupby(["method", "seed"]).acc.mean()
        for method in axes["method"]:
            cell, given = pivot.cells[(method,), (None,)], by_seed[method]
            low, high = scipy.stats.t.interval(0.95, 2, given.mean(), given.sem())
            assert (cell.mean, cell.half) == (pytest.approx(given.mean()), pytest.approx((high - low) / 2))
        assert "each mean is over dataset (3), too" in pivot.notes

    def test_what_is_missing_is_said_and_is_no_best(self, study):
        pivot = pivoted(opened(study), ["dataset"], ["method"], "acc")
        a, b = (pivot.cells[("d",), (name,)] if ("d",) in pivot.rows else None for name in ("a", "b"))
        assert (a.seeds, a.whole, a.best) == (4, True, False)
        assert (b.seeds, b.whole) == (2, False)
        assert "missing: 1 failed, 1 open" in pivot.notes

    def test_a_cell_of_other_data_sets_than_the_one_beside_is_marked(self, tmp_path):
        study = tmp_path / "s"
        axes = {"method": ["a", "b", "c"], "dataset": ["d", "e"], "seed": [1, 2]}
        frame = grid(study, axes)
        lines = (study / "plan.jsonl").read_text().splitlines(keepends=True)
        dropped = frame.index[(frame.method == "b") & (frame.dataset == "e")]
        (study / "plan.jsonl").write_text("".join(each for i, each in enumerate(lines) if i not in dropped))
        pivot = pivoted(opened(study), ["method"], ["backbone"], "acc")
        assert {m: cell.whole for ((m,), _), cell in pivot.cells.items()} == {"a": True, "b": False, "c": True}
        means = frame.groupby("method").acc.mean()
        best = "a" if means["a"] > means["c"] else "c"
        assert [m for ((m,), _), cell in pivot.cells.items() if cell.best] == [best]
        texts = [[cell.words for cell in row] for row in pivot.table().read]
        assert [row[-1].endswith(" *") for row in texts] == [False, True, False]

    def test_one_seed_has_no_interval_and_other_numbers_of_seeds_are_shown(self, tmp_path):
        frame = grid(
            tmp_path / "s",
            {"method": ["a", "b", "c"], "seed": [1, 2, 3]},
            lambda labels: labels["method"] == "b" and labels["seed"] > 1,
        )
        lines = (tmp_path / "s" / "plan.jsonl").read_text().splitlines(keepends=True)
        (tmp_path / "s" / "plan.jsonl").write_text("".join(lines[:4] + lines[6:]))
        pivot = pivoted(opened(tmp_path / "s"), ["method"], ["shots"], "acc")
        words = [row[1].words for row in pivot.table().read]
        assert words[1] == f"{100 * frame.acc[3]:.1f} (n=1)"
        half = scipy.stats.sem(frame.acc[:3]) * scipy.stats.t.ppf(0.975, 2)
        assert words[0] == f"{100 * frame.acc[:3].mean():.1f} ± {100 * half:.1f}"
        assert pivot.notes[0].endswith("n=3 where no other is told")

    def test_runs_that_differ_in_nothing_count_once(self, tmp_path):
        for i, seed in enumerate((1, 1, 2)):
            put(tmp_path / "runs" / f"{i}" / "001" / "result.json", result(seed) | {"acc": 0.1 * i})
        pivot = pivoted(opened(tmp_path / "runs"), ["method"], ["shots"], "acc")
        (cell,) = pivot.cells.values()
        assert (cell.mean, cell.seeds) == (pytest.approx((0.05 + 0.2) / 2), 2)
        assert any(note.startswith("1 times several runs differ in nothing") for note in pivot.notes)

    def test_the_command(self, study, capsys):
        run(study, "--pivot", "method", "shots", "--json")
        found = json.loads(capsys.readouterr().out)
        assert [cell["method"] for cell in found if cell["mean"]] == ["a", "b"]
        run(study, "--where", "state=done", "--pivot", "method,seed", "shots", "ece")
        said = capsys.readouterr().out
        assert f"{100 * result(0)['ece']:.1f}" in said
        assert "missing" not in said


class TestFiles:
    def test_csv(self, odd, tmp_path):
        study, frame = odd
        run(study, "--out", tmp_path / "t.csv")
        with (tmp_path / "t.csv").open(newline="", encoding="utf-8") as file:
            found = list(csv.DictReader(file))
        safe = [f"'{name}" if name.startswith("=") else name for name in frame.method]
        assert [row["method"] for row in found] == safe
        assert [float(row["acc"]) for row in found] == frame.acc.tolist(), "to the last bit"
        assert list(found[0]) == list(opened(study).columns)
        assert {row["reason"] for row in found} == {""}

    def test_parquet(self, odd, tmp_path):
        study, frame = odd
        run(study, "--out", tmp_path / "t.parquet")
        found = pd.read_parquet(tmp_path / "t.parquet")
        pd.testing.assert_frame_equal(found[["method", "shots", "seed", "acc", "ece"]], frame, check_dtype=False)
        assert found.shots.dtype == np.int64
        run(study, "--where", "shots>99", "--out", tmp_path / "t.parquet")
        assert len(pd.read_parquet(tmp_path / "t.parquet")) == 0

    def test_a_pivot_as_csv_and_parquet(self, odd, tmp_path):
        study, frame = odd
        expected = frame.pivot_table(index="method", columns="shots", values="acc", sort=False)
        for name in ("t.csv", "t.parquet"):
            run(study, "--pivot", "method", "shots", "--out", tmp_path / name)
        found = pd.read_csv(tmp_path / "t.csv")
        assert list(found) == ["method", *(f"shots {k}{what}" for k in (1, 2) for what in ("", " half", " n"))]
        np.testing.assert_allclose(found[["shots 1", "shots 2"]], expected.to_numpy(), rtol=1e-12)
        pd.testing.assert_frame_equal(found.iloc[:, 1:], pd.read_parquet(tmp_path / "t.parquet").iloc[:, 1:])

    def test_markdown_is_read_back_by_another(self, odd, tmp_path):
        study, frame = odd
        run(study, "--pivot", "method", "shots", "--out", tmp_path / "t.md")
        tokens = MarkdownIt("commonmark").enable("table").parse((tmp_path / "t.md").read_text(encoding="utf-8"))
        assert tokens[0].type == "table_open"
        assert tokens[-1].type == "table_close"
        cells = [token for token in tokens if token.type == "inline"]
        text = ["".join(child.content for child in cell.children) for cell in cells]
        assert text[:3] == ["method", "shots 1", "shots 2"]
        assert text[3::3] == NAMES
        mean = frame.pivot_table(index="method", columns="shots", values="acc", sort=False)
        bold = [any(child.type == "strong_open" for child in cell.children) for cell in cells[3:]]
        expected = [[False, *(mean.loc[name, k] == mean[k].max() for k in (1, 2))] for name in NAMES]
        assert bold == [each for row in expected for each in row]

    def test_latex(self, odd, tmp_path):
        study, _ = odd
        run(study, "--pivot", "method", "shots", "--out", tmp_path / "t.tex")
        text = (tmp_path / "t.tex").read_text(encoding="utf-8")
        begin, *body, end, _ = text.split("\n")[1:]
        assert (begin, end) == (r"\begin{tabular}{lrr}", r"\end{tabular}")
        assert [each for each in body if not each.endswith(r" \\")] == [r"\toprule", r"\midrule", r"\bottomrule"]
        lines = [each.removesuffix(r" \\") for each in body if each.endswith(r" \\")]
        cells = [re.split(r"(?<!\\) & ", each) for each in lines]
        assert [len(row) for row in cells] == [3] * 6
        known = {r"\textbackslash{}": "\\", r"\textasciitilde{}": "~", r"\textasciicircum{}": "^", r"\textbar{}": "|"}
        known |= {r"\textless{}": "<", r"\textgreater{}": ">", "{[}": "[", "{*}": "*"}
        known |= {f"\\{sign}": sign for sign in "&%$#_{}"}
        macro = re.compile("|".join(map(re.escape, known)))
        for (name, *_), expected in zip(cells[1:], NAMES, strict=True):
            assert macro.sub(lambda found: known[found[0]], name) == expected
            assert not set(macro.sub("", name)) & set("&%$#_{}~^\\[*<>|"), "all of it is escaped"
        assert sum(r"\textbf{" in each for row in cells for each in row) == 2
        assert r" $\pm$ " in cells[1][1]

    def test_a_file_is_replaced_and_said(self, odd, tmp_path, capsys):
        study, _ = odd
        (tmp_path / "t.md").write_text("old")
        run(study, "--columns", "method,acc", "--where", "method~50%", "--out", tmp_path / "t.md")
        assert "4 runs in" in (said := capsys.readouterr()).err
        assert said.out == ""
        assert (tmp_path / "t.md").read_text().count("\n") == 6
