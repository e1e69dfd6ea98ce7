"""A study as a report: its figures show what the runs reached, and it claims no more than they can tell."""

import csv
import itertools
import json
import math
import re
import shutil
import sys
from xml.etree import ElementTree

import numpy as np
import pytest
from command_line import refused
from pages import Page
from scipy import stats
from sklearn.calibration import calibration_curve
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.weightstats import DescrStatsW

from kshot.cli import main
from kshot.config import packaged_folder
from kshot.errors import UserError
from kshot.studies import figures
from kshot.studies.axes import MOST, apart, marker, pdf_of, ticks
from kshot.studies.costs import pooled
from kshot.studies.grid import common_ground, contender_of, differences, grid_of
from kshot.studies.published import ELEVEN, known, published

SVG = "{http://www.w3.org/2000/svg}"
CLIP = "ViT-B-16-quickgelu/openai"


def row(method, dataset, shots, seed, acc, **more):
    plain = {"method": method, "dataset": dataset, "shots": shots, "seed": seed, "acc": acc, "state": "done"}
    same = {"backbone": CLIP, "protocol": "all-to-all", "split": f"sha256:{dataset} {shots} {seed}"}
    return plain | same | more


def result(of, **more):
    """What result.json says of a row."""
    told = {name: of[name] for name in ("method", "dataset", "backbone", "protocol", "seed", "acc")}
    bins = [{"images": 30, "confidence": 0.5, "accuracy": 0.4}, {"images": 70, "confidence": 0.9, "accuracy": 0.8}]
    return told | {
        "split": {"shots": of["shots"], "digest": of["split"]},
        **{"ece": 0.05, "ece_before": 0.1, "reliability": {"test": bins}, "device": "cpu"},
        **{"peak_memory_bytes": 10**9, "checkpoint_bytes": 5000, "seconds": {"fit": 1.5, "test": 0.5}},
        "trainable_parameters": of.get("trainable_parameters", 0),
        "forecast": {"accuracy": of["acc"] + 0.02, "low": of["acc"] - 0.01, "high": of["acc"] + 0.05},
        **{"versions": {"kshot": "0.1.0", "torch": "2.14.1"}, "git_commit": "abc", "finished": "2026-11-26T13:00:00"},
    }  # fmt: skip


def make_study(folder, rows, failed=(), unmade=(), **header):
    """A study's folder with these runs."""
    axes = {name: list(dict.fromkeys(r[name] for r in rows)) for name in ("method", "dataset", "shots", "seed")}
    header = {
        "name": folder.name,
        "file": str(packaged_folder("configs") / "studies/mine.yaml"),
        "axes": axes,
        "base": [],
        "options": {},
    } | header
    for name in ("done", "failed"):
        (folder / name).mkdir(parents=True)
    (folder / "study.json").write_text(json.dumps(header))
    plan = []
    for i, each in enumerate([*rows, *(r for r, _ in failed), *unmade]):
        cell = {name: each[name] for name in header["axes"]}
        plan.append(json.dumps({"id": f"r{i}", "axes": cell}))
        if i < len(rows):
            run = folder / "runs" / f"r{i}" / "001"
            run.mkdir(parents=True)
            (run / "result.json").write_text(json.dumps(result(each)))
            record = {"id": f"r{i}", "axes": cell, "run": f"runs/r{i}/001"}
            (folder / "done" / f"r{i}.json").write_text(json.dumps(record))
        elif i < len(rows) + len(failed):
            record = {"id": f"r{i}", "axes": cell, "reason": failed[i - len(rows)][1]}
            (folder / "failed" / f"r{i}.json").write_text(json.dumps(record))
    (folder / "plan.jsonl").write_text("\n".join(plan))
    return folder


def some_rows(methods=("ridge", "gda", "coop"), sets=("digits", "dtd"), shots=(1, 4), seeds=(1, 2, 3)):
    rng = np.random.default_rng(1)
    return [
        row(m, d, k, s, 0.5 + 0.1 * i + 0.05 * math.log2(k) - 0.2 * j + float(rng.normal(0, 0.01)))
        for (i, m), (j, d), k, s in itertools.product(enumerate(methods), enumerate(sets), shots, seeds)
    ]


def report(study, *words):
    with pytest.raises(SystemExit) as end:
        main(["report", str(study), *map(str, words)])
    assert end.value.code == 0


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    rows = some_rows()
    lost = [(row("coop", "digits", 8, 1, 0), "Not finite: <b>lower</b> the rate."), (row("gda", "dtd", 8, 1, 0), "x")]
    study = make_study(tmp_path_factory.mktemp("made") / "mine", rows, lost, [row("ridge", "dtd", 8, 2, 0)])
    report(study)
    return rows, study / "report", Page((study / "report" / "index.html").read_text(encoding="utf-8"))


def table_of(folder, name):
    with (folder / f"{name}.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


class TestPage:
    def test_it_is_of_one_piece(self, made):
        _, _, page = made
        assert page.addresses == []
        assert not {"script", "link", "iframe", "object"} & page.count.keys()
        assert "url(" not in page.content
        assert "@import" not in page.content
        titles = {"Accuracy against shots", "Means", "Paired differences", "Ranks", "Costs", "Calibration", "Forecasts"}
        assert titles <= set(page.words)

    def test_every_figure_is_a_file_that_stands_alone(self, made):
        _, folder, _ = made
        names = {file.stem for file in folder.glob("*.svg")}
        whole = {"accuracy", "accuracy_by_data_set", "differences", "ranks", "costs", "calibration", "forecast"}
        assert whole <= names | {"costs"}  # costs are all the same here
        assert {f"reliability_{i}" for i in (1, 2, 3)} <= names
        for name in names:
            figure = ElementTree.parse(folder / f"{name}.svg").getroot()
            assert figure.find(f"{SVG}style") is not None
            used = {c for e in figure.iter() for c in e.get("class", "").split()}
            assert all(re.search(rf"\.{c}\b", figure.find(f"{SVG}style").text) for c in used), used

    def test_means_are_those_of_the_runs(self, made):
        rows, folder, page = made
        of = {(r["method"], r["dataset"], r["shots"], r["seed"]): r["acc"] for r in rows}
        for line in table_of(folder, "means_digits"):
            values = [
                r["acc"] for r in rows if (r["method"], r["dataset"], r["shots"]) == (line["contender"], "digits", 4)
            ]
            low, high = DescrStatsW(values).tconfint_mean()
            assert float(line["4 shots"]) == pytest.approx(np.mean(values))
            assert float(line["4 shots, half the interval"]) == pytest.approx((high - low) / 2)
            assert f" ±\xa0{50 * (high - low):.1f}" in page.words
        for line in table_of(folder, "means"):
            seeds = [np.mean([of[line["contender"], name, 1, s] for name in ("digits", "dtd")]) for s in (1, 2, 3)]
            low, high = DescrStatsW(seeds).tconfint_mean()
            assert float(line["1 shots"]) == pytest.approx(np.mean(seeds))
            assert float(line["1 shots, half the interval"]) == pytest.approx((high - low) / 2)

    def test_the_best_of_a_column_is_bold(self, made):
        rows, _, page = made
        best = np.mean([r["acc"] for r in rows if (r["method"], r["shots"]) == ("coop", 4)])
        assert f"<b>{100 * best:.1f}</b>" in page.content
        other = np.mean([r["acc"] for r in rows if (r["method"], r["shots"]) == ("gda", 4)])
        assert f"<b>{100 * other:.1f}</b>" not in page.content

    def test_what_is_missing_has_a_name(self, made):
        _, _, page = made
        words = " ".join(" ".join(page.words).split())
        assert "2 runs failed" in words
        assert "Not finite: <b>lower</b> the rate." in words
        assert "coop on digits, 8 shots, seed 1" in words
        assert "1 not made yet: ridge on dtd, 8 shots, seed 2" in words

    def test_it_says_how_it_was_made(self, made):
        _, folder, page = made
        words = "".join(page.words)
        assert "python main.py sweep --config studies/mine.yaml" in words
        assert f"python main.py report {folder.parent}" in words
        assert "kshot 0.1.0, torch 2.14.1" in words

    def test_two_data_sets_tell_nothing_about_others(self, made):
        _, folder, page = made
        assert "2 data sets are too few for Wilcoxon's test" in "".join(page.words)
        assert "new data sets" not in "".join(page.words)
        assert {line["bootstrap from"] for line in table_of(folder, "differences")} == {""}

    def test_a_name_is_no_markup(self, tmp_path):
        rows = some_rows(("<i>&", 'a"b')) + some_rows(("c",))
        report(make_study(tmp_path / "s<u>", rows))
        page = Page((tmp_path / "s<u>" / "report" / "index.html").read_text(encoding="utf-8"))
        assert "i" not in page.count
        assert "u" not in page.count
        for file in (tmp_path / "s<u>" / "report").glob("*.svg"):
            ElementTree.parse(file)

    @pytest.mark.parametrize(
        "rows",
        [
            some_rows(("ridge",), ("digits",), (4,), (1,)),
            some_rows([f"method {i}" for i in range(MOST + 4)], ELEVEN, (4,), (1, 2)),
            [row("ridge", "digits", None, 1, 0.5), row("gda", "digits", 4, 1, 0.4)],
            [row("ridge", "digits", 4, None, 0.0), row("gda", "digits", 4, None, 0.0)],
            [row("a", "x", 1, 1, 0.5), row("b", "y", 2, 1, 0.5)],
        ],
        ids=["one run", "many methods", "all images", "no seed, nothing right", "nothing in common"],
    )
    def test_any_shape_of_a_study_is_drawn(self, rows, tmp_path):
        report(make_study(tmp_path / "s", rows))
        page = Page((tmp_path / "s" / "report" / "index.html").read_text(encoding="utf-8"))
        assert "NaN" not in page.content
        assert "nan" not in re.sub(r"[^\d.\s-]*nan[a-z]", "", page.content.replace("finance", ""))


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    rng = np.random.default_rng(5)
    sets, cost = [f"set{i}" for i in range(8)], {"ridge": 0, "gda": 10, "coop": 2000, "lora": 40_000}
    effect = {(m, d): 0.5 + 0.03 * i + rng.normal(0, 0.02) for i, m in enumerate(cost) for d in sets}
    rows = [
        row(m, d, k, s, float(effect[m, d] + rng.normal(0, 0.01)), trainable_parameters=cost[m])
        for m, d, k, s in itertools.product(cost, sets, (2, 4), (1, 2, 3))
    ]
    lost = rows.pop(0)
    study = make_study(tmp_path_factory.mktemp("many") / "many", rows, [(lost, "lost")])
    report(study, "--baseline", "ridge")
    return rows, study / "report", (study / "report" / "index.html").read_text(encoding="utf-8")


class TestManySets:
    """Eight data sets, of which one lacks a run, and whose runs cost what their methods do."""

    def of(self, rows, *where):
        return [r["acc"] for r in rows if all(r[name] == value for name, value in where)]

    def test_differences_are_tested_over_data_sets(self, many):
        rows, folder, _ = many
        left = [r for r in rows if (r["dataset"], r["shots"], r["seed"]) != ("set0", 2, 1)]
        raw = {}
        table = {line["contender"]: line for line in table_of(folder, "differences")}
        for who in ("gda", "coop", "lora"):
            by = {}
            for d, seed in {(r["dataset"], r["seed"]) for r in rows}:
                mine, base = (self.of(left, ("method", m), ("dataset", d), ("seed", seed)) for m in (who, "ridge"))
                by[d, seed] = np.mean(np.subtract(mine, base))
            each = [np.mean([by[d, s] for s in (1, 2, 3)]) for d in sorted({d for d, _ in by})]
            raw[who] = stats.wilcoxon(each).pvalue
            seeds = [np.mean([value for (_, seed), value in by.items() if seed == s]) for s in (1, 2, 3)]
            low, high = DescrStatsW(seeds).tconfint_mean()
            line = table[who]
            assert float(line["difference"]) == pytest.approx(np.mean(seeds))
            assert float(line["half the t-interval"]) == pytest.approx((high - low) / 2)
            assert float(line["p"]) == pytest.approx(raw[who])
            assert float(line["bootstrap from"]) < float(line["difference"]) < float(line["to"])
            assert (line["sets"], line["pairs"]) == ("8", "47")
            assert int(line["sets won"]) == sum(value > 0 for value in each)
        corrected = multipletests(list(raw.values()), method="holm")[1]
        assert [float(table[who]["p (Holm)"]) for who in raw] == pytest.approx(corrected.tolist())

    def test_ranks_are_over_what_all_share(self, many):
        rows, folder, content = many
        methods = ["ridge", "gda", "coop", "lora"]
        left = [r for r in rows if (r["dataset"], r["shots"], r["seed"]) != ("set0", 2, 1)]
        values = [[np.mean(self.of(left, ("method", m), ("dataset", f"set{i}"))) for m in methods] for i in range(8)]
        mean = stats.rankdata(-np.array(values), axis=1).mean(0)
        found = {line["contender"]: float(line["mean rank"]) for line in table_of(folder, "ranks")}
        assert [found[m] for m in methods] == pytest.approx(mean.tolist())
        assert "Over the 47 of 48 draws (8 data sets, 3 seeds) that are shared by 4 contenders." in content

    def test_costs_are_those_of_the_runs(self, many):
        _, folder, content = many
        found = {line["contender"]: line for line in table_of(folder, "costs")}
        assert {who: float(line["trained parameters"]) for who, line in found.items()} == {
            "ridge": 0, "gda": 10, "coop": 2000, "lora": 40_000
        }  # fmt: skip
        assert {line["seconds a run"] for line in found.values()} == {"2.0"}
        figure = (folder / "costs.svg").read_text(encoding="utf-8")
        assert re.search(r"lora: \d\d\.\d% at 4e\+04 trained parameters", figure)
        assert "seconds a run" not in figure  # the same for all
        assert '<td class="n">40,000</td>' in content

    def test_calibration_is_before_and_after(self, many):
        _, folder, _ = many
        before, after = (folder / "calibration.svg").read_text(encoding="utf-8").split("After the temperature")
        assert "ridge, 4 shots: 10.0% ± 0.0%" in before
        assert "ridge, 4 shots: 5.0% ± 0.0%" in after

    def test_reliability_adds_the_runs(self, many):
        _, folder, _ = many
        figure = (folder / "reliability_1.svg").read_text(encoding="utf-8")
        assert "3360 images, 90.0% sure, 80.0% right" in figure  # 48 runs of 70

    def test_it_says_what_can_be_told(self, many):
        _, folder, content = many
        corrected = [float(line["p (Holm)"]) for line in table_of(folder, "differences")]
        assert all(f'<td class="n">{p:.3g}</td>' in content for p in corrected)
        assert "Wilcoxon's p is over data sets" in content.replace("&#x27;", "'")
        assert "bootstrap over data sets and seeds" in content


class TestRefusals:
    def test_no_study(self, capsys, tmp_path):
        assert "no folder" in refused(capsys, ["report", str(tmp_path / "none")])
        (tmp_path / "empty").mkdir()
        assert "no run is finished" in refused(capsys, ["report", str(tmp_path / "empty")])
        assert list((tmp_path / "empty").iterdir()) == []

    def test_a_baseline_that_there_is_not(self, capsys, made, tmp_path):
        _, folder, _ = made
        line = refused(capsys, ["report", str(folder.parent), "--baseline", "rigde", "--out", str(tmp_path / "o")])
        assert "Did you mean 'ridge'?" in line
        assert not (tmp_path / "o").exists()

    def test_a_metric_that_no_run_has(self, capsys, made, tmp_path):
        _, folder, _ = made
        words = ["report", str(folder.parent), "--metric", "f1_macro", "--out", str(tmp_path / "o")]
        assert "none of 36 finished runs has 'f1_macro'" in refused(capsys, words)

    def test_a_damaged_study(self, capsys, made, tmp_path):
        shutil.copytree(made[1].parent, tmp_path / "s")
        (tmp_path / "s" / "study.json").write_text("{")
        assert "study.json cannot be read" in refused(capsys, ["report", str(tmp_path / "s")])

    def test_foreign_files_stay(self, capsys, made, tmp_path):
        _, folder, _ = made
        out = tmp_path / "o"
        words = ["report", str(folder.parent), "--out", str(out)]
        report(*words[1:])
        (out / "index.html").write_text("old")
        report(*words[1:])  # a report replaces one
        assert "<h1>mine</h1>" in (out / "index.html").read_text()
        (out / "notes.txt").write_text("mine")
        (out / "index.html").write_text("old")
        assert "(notes.txt)" in refused(capsys, words)
        assert (out / "index.html").read_text() == "old"
        (out / "report.json").unlink()
        assert "holds what no report wrote" in refused(capsys, words)
        assert [path.name for path in tmp_path.iterdir()] == ["o"]

    def test_a_file_in_its_place_stays(self, capsys, made, tmp_path):
        (tmp_path / "o").write_text("mine")
        refused(capsys, ["report", str(made[1].parent), "--out", str(tmp_path / "o")])
        assert (tmp_path / "o").read_text() == "mine"

    def test_shots_that_are_no_numbers(self):
        with pytest.raises(UserError, match="labels 'few'"):
            grid_of([row("a", "x", "few", 1, 0.5)], {})


class TestGrid:
    def test_what_varies_names_a_contender(self):
        axes = {
            "method": ["lora"],
            "model.adapter.rank": [2, 4],
            "backbone": ["b"],
            "seed": [1, 2],
            "data.shots": [1, 2],
        }
        rows = [row("lora", "x", 1, 1, 0.1 * rank, **{"model.adapter.rank": rank}) for rank in (2, 4)]
        assert grid_of(rows, axes).contenders == ["lora · rank 4", "lora · rank 2"]
        assert contender_of(rows[0], []) == "lora"

    def test_protocols_are_not_mixed(self):
        rows = [row("a", "x", 1, 1, 0.5), row("a", "x", 1, 1, 0.9, protocol="base-to-new")]
        assert grid_of(rows, {}).sets == ["x (all-to-all)", "x (base-to-new)"]

    def test_runs_that_do_not_tell_are_left_out_and_counted(self):
        grid = grid_of([row("a", "x", 1, 1, 0.5), row("a", "x", 1, 2, None), row("a", "x", 1, 3, math.nan)], {})
        assert grid.notes == ["2 finished runs have no acc: left out."]
        assert list(grid.values("a", "x", 1)) == [1]

    def test_a_mean_takes_all_data_sets(self):
        rows = [row("a", "x", 1, 1, 0.2), row("a", "y", 1, 1, 0.4), row("b", "y", 1, 1, 0.9)]
        grid = grid_of(rows, {})
        assert grid.average("a", 1).mean == pytest.approx(0.3)
        assert grid.average("b", 1) is None

    def test_easy_cells_lift_nobody(self):
        rows = [row("a", "hard", 1, 1, 0.3), row("b", "hard", 1, 1, 0.2), row("b", "easy", 1, 1, 0.9)]
        assert grid_of([*rows, row("c", "easy", 1, 1, 0.95)], {}).contenders[-1] == "b"

    def test_the_common_ground_is_shared_and_nearly_the_largest(self):
        shares = []
        for trial in range(30):
            rng = np.random.default_rng(trial)
            has = rng.random((6, 12)) < rng.uniform(0.5, 0.95)
            drawn = {(f"m{i}", j) for i, j in zip(*np.nonzero(has), strict=True)}
            ground = common_ground(grid_of([row(who, "x", 1, seed, 0.5) for who, seed in sorted(drawn)], {}))
            seeds = [seed for _, _, seed in ground.draws]
            assert all((who, seed) in drawn for who in ground.contenders for seed in seeds)
            assert ground.left_out == {
                who: sum((who, seed) in drawn for seed in seeds)
                for who in {who for who, _ in drawn} - {*ground.contenders}
            }
            sets = (list(s) for n in range(1, 7) for s in itertools.combinations(range(6), n))
            best = max(len(s) * int(has[s].all(0).sum()) for s in sets)
            shares.append(len(ground.contenders) * len(seeds) / best)
        assert min(shares) >= 0.6
        assert np.mean(shares) >= 0.97

    def test_a_failure_here_and_there_leaves_most_to_compare(self):
        rows = [row(f"m{i}", "x", 1, seed, i / 10) for i in range(5) for seed in range(20) if seed != i]
        ground = common_ground(grid_of([*rows, row("m9", "x", 1, 19, 0.9)], {}))
        assert ground.contenders == ["m4", "m3", "m2", "m1", "m0"]
        assert len(ground.draws) == 15
        assert ground.left_out == {"m9": 1}
        assert ground.sentence().startswith(
            "Over the 15 of 20 draws (1 data set, 15 seeds) that are shared by 5 contenders."
        )

    def test_differences_are_on_identical_splits_only(self):
        rows = [row(m, "x", k, s, 0.1 * s + k / 100 + (m == "b") * 0.02) for m in "ab" for k in (1, 2) for s in (1, 2)]
        values, pairs, unlike = differences(grid_of(rows, {}), "a", "b")
        assert values == {"x": {1: pytest.approx(0.02), 2: pytest.approx(0.02)}}
        assert (pairs, unlike) == (4, 0)
        rows[-1] |= {"split": "sha256:other", "acc": 0.9}
        rows[-2] |= {"split": None, "acc": 0.9}  # seed 1 at 2 shots, and the other of its pair does not tell either
        next(r for r in rows if (r["method"], r["shots"], r["seed"]) == ("a", 2, 1))["split"] = None
        values, pairs, unlike = differences(grid_of(rows, {}), "a", "b")
        assert (pairs, unlike) == (2, 2)
        assert values == {"x": {1: pytest.approx(0.02), 2: pytest.approx(0.02)}}


def shapes(drawing, what):
    root = ElementTree.fromstring(drawing.svg())
    return [e for e in root.iter() if what in e.get("class", "").split()]


class TestFigures:
    def test_markers_lie_where_values_are(self):
        points = [(1.0, 0.2, 0.05), (2.0, 0.4, math.nan), (8.0, 0.6, 0.1)]
        drawing = figures.curves("x", [figures.Curve("a", 0, points)], (400, 300))
        at = [tuple(map(float, re.findall(r"[\d.]+", e.get("transform")))) for e in shapes(drawing, "f0")]
        (x1, y1), (x2, y2), (x3, y3) = at
        assert (x3 - x1) == pytest.approx(3 * (x2 - x1), abs=0.3)  # two doublings further, on a logarithmic axis
        assert (y1 - y3) == pytest.approx(2 * (y1 - y2), abs=0.3)
        bars = [e.get("d") for e in shapes(drawing, "l0") if e.get("stroke-opacity") == ".55"]
        assert len(bars) == 2
        top, bottom = (float(y) for _, y in re.findall(r"([\d.]+) ([\d.]+)", bars[1]))
        per_point = (y1 - y3) / 0.4
        assert (top, bottom) == (
            pytest.approx(y3 - 0.1 * per_point, abs=0.3),
            pytest.approx(y3 + 0.1 * per_point, abs=0.3),
        )

    def test_a_strip_spans_its_interval(self):
        strips = [figures.Strip("a", 0, 0.02, 0.01, (-0.02, 0.05), [0.0, 0.04]), figures.Strip("b", None, -0.03)]
        drawing = figures.strips("x", strips, "points", zero=True)
        thin, thick = [
            [float(x) for x, _ in re.findall(r"([\d.]+) ([\d.]+)", e.get("d"))] for e in shapes(drawing, "l0")
        ]
        middle = float(re.search(r"[\d.]+", shapes(drawing, "f0")[0].get("transform"))[0])
        assert sum(thick) / 2 == pytest.approx(middle, abs=0.2)
        assert (thin[1] - thin[0]) / (thick[1] - thick[0]) == pytest.approx(3.5, abs=0.02)
        zero = float(re.search(r"M([\d.]+)", shapes(drawing, "dash")[0].get("d"))[1])
        assert (middle - zero) / (thick[1] - thick[0]) == pytest.approx(1, abs=0.02)

    def test_no_two_series_share_a_shape(self):
        assert len({re.search(r' d="(.*?)"', marker(i, 0, 0))[1] for i in range(MOST)}) == MOST

    def test_the_front_is_what_nobody_beats(self):
        points = np.random.default_rng(2).random((40, 2)).round(1).tolist()
        best = {tuple(p) for p in points if not any(c <= p[0] and v >= p[1] and [c, v] != p for c, v in points)}
        assert {tuple(points[i]) for i in figures.front(points)} == best

    def test_a_cost_of_nothing_has_its_place(self):
        drawing = figures.costs("x", ["free", "dear"], [(0, 0.5), (1e6, 0.7)], "numbers", {"free": 0, "dear": 1})
        free, dear = (float(re.search(r"[\d.]+", shapes(drawing, f"f{i}")[0].get("transform"))[0]) for i in (0, 1))
        gap = float(re.search(r"M([\d.]+)", shapes(drawing, "dash")[0].get("d"))[1])
        assert free < gap < dear

    def test_labels_keep_apart(self):
        wanted = [10, 11, 12, 50, 99, 100]
        found = apart(wanted, 8, 0, 100)
        assert found == sorted(found)
        assert min(np.diff(found)) >= 8 - 1e-9
        assert min(found) >= 0
        assert max(found) <= 100
        assert found[3] == 50

    @pytest.mark.parametrize(("low", "high"), [(0.1, 0.93), (0.601, 0.604), (-0.4, 0.02), (3, 8000)])
    def test_ticks_are_round_and_within(self, low, high):
        found = ticks(low, high)
        assert 2 <= len(found) <= 7
        assert low <= min(found)
        assert max(found) <= high
        assert len({round(step, 9) for step in np.diff(found)}) == 1

    def test_reliability_is_that_of_all_answers_together(self):
        rng = np.random.default_rng(4)
        sure = rng.random(900) * 0.999
        right = rng.random(900) < sure

        def bins(of):
            edges = (sure[of] * 15).astype(int)
            each = [(edges == b, sure[of], right[of]) for b in sorted(set(edges))]
            return [{"images": int(m.sum()), "confidence": s[m].mean(), "accuracy": r[m].mean()} for m, s, r in each]

        found = pooled([bins(slice(0, 200)), bins(slice(200, 900))])
        accuracy, confidence = calibration_curve(right, sure, n_bins=15)
        assert [b["accuracy"] for b in found] == pytest.approx(accuracy.tolist())
        assert [b["confidence"] for b in found] == pytest.approx(confidence.tolist())
        assert sum(b["images"] for b in found) == 900

    def test_forecasts_are_counted(self, made):
        _, folder, _ = made
        whole = table_of(folder, "forecast")[-1]
        assert (whole["contender"], whole["runs"]) == ("all", "36")
        assert float(whole["intervals that hold"]) == 1.0
        assert float(whole["forecast − truth"]) == pytest.approx(0.02)

    def test_forecasts_that_do_not_hold_are_crosses(self):
        runs = [(0.5, 0.4, 0.6, 0.55, "held"), (0.5, 0.4, 0.6, 0.7, "missed"), (0.5, 0.4, 0.6, 0.6, "edge")]
        drawing = figures.forecasts("x", runs)
        said = [e.findtext(f"{SVG}title") for e in shapes(drawing, "l1") if e.find(f"{SVG}title") is not None]
        assert [words.partition(":")[0] for words in said] == ["missed"]


class TestPublished:
    ROW = row("clip_lora", "dtd", 4, 1, 0.6)

    def drawn(self, rows, name="dtd", axes=None, metric="acc"):
        grid = grid_of(rows, axes or {}, metric)
        return published(grid, grid.contenders[0], name, known())

    def test_a_repeated_cell_has_its_value(self):
        found = self.drawn([self.ROW, self.ROW | {"shots": 3}])
        assert found.points == [(4.0, 0.638)]
        assert "arXiv:2405.18541" in found.source

    @pytest.mark.parametrize(
        "change",
        [
            {"backbone": "ViT-B-32/openai"},
            {"protocol": "base-to-new"},
            {"method": "lora"},
            {"dataset": "digits"},
            {"shots": 3},
        ],
        ids=str,
    )
    def test_anything_else_has_none(self, change):
        other = self.ROW | change
        assert self.drawn([other], other["dataset"]) is None

    def test_other_settings_have_none(self):
        rows = [self.ROW | {"rank": rank} for rank in (2, 4)]
        assert self.drawn(rows, axes={"rank": [2, 4]}) is None
        assert self.drawn([self.ROW], axes={"backbone": [CLIP, "b"]}) is not None

    def test_an_average_takes_all_eleven(self):
        rows = [self.ROW | {"dataset": name} for name in ELEVEN]
        assert self.drawn(rows, None).points == [(4.0, 0.774)]
        assert self.drawn(rows[1:], None) is None
        assert self.drawn([*rows, self.ROW | {"dataset": "digits"}], None) is None

    def test_averages_are_those_of_their_rows(self):
        for entry in known():
            values, whole = entry["values"], entry["values"]["average"]
            if values.keys() == {"average"}:
                continue
            assert values.keys() - {"average"} == ELEVEN
            means = np.mean([values[name] for name in ELEVEN], 0)
            if entry["metric"] == "acc":  # the harmonic mean of averages is no average of harmonic means
                assert means == pytest.approx(whole, abs=0.06), entry["recipe"]

    def test_recipes_say_the_same(self):
        names = {"EuroSAT": "eurosat", "DTD": "dtd", "Aircraft": "fgvc_aircraft", "ImageNet": "imagenet"}
        names["mean over 11 data sets"] = "average"
        compared = 0
        for entry in known():
            file = packaged_folder("configs") / "recipes" / f"{entry['recipe']}.yaml"
            if len(entry["shots"]) < 5 or not file.is_file():
                continue
            text = file.read_text(encoding="utf-8").replace("\n#", " ")
            for said, name in names.items():
                found = re.search(rf"{said}((?: \d\d\.\d){{5}})", text)
                if found and name in entry["values"]:
                    assert [float(v) for v in found[1].split()] == pytest.approx(entry["values"][name], abs=0.051)
                    compared += 1
        assert compared >= 20

    def test_they_are_drawn_with_their_source(self, tmp_path):
        rows = [self.ROW | {"shots": k, "seed": s, "acc": 0.5 + k / 100} for k in (1, 4) for s in (1, 2)]
        report(make_study(tmp_path / "s", rows))
        content = (tmp_path / "s" / "report" / "index.html").read_text(encoding="utf-8")
        assert "clip_lora, published: 54.3%" in content
        assert "Dashed, clip_lora: Zanella &amp; Ben Ayed 2024" in content


class TestFiles:
    def test_a_figure_becomes_a_pdf(self):
        drawing = figures.curves("x", [figures.Curve("a", 0, [(1.0, 0.2, 0.1), (2.0, 0.3, 0.1)])], (400, 300))
        content = pdf_of(drawing.svg())
        assert content.startswith(b"%PDF-")
        assert re.search(rb"/MediaBox \[ ?0 0 (\d+)", content)[1] == b"300"  # 400 pixels are 300 points

    def test_without_its_library_one_line_says_so(self, made, tmp_path, capsys, monkeypatch):
        monkeypatch.setitem(sys.modules, "svglib.svglib", None)
        capsys.readouterr()
        report(made[1].parent, "--out", tmp_path / "o")
        assert capsys.readouterr().err.splitlines() == ["without PDF files: they need pip install 'kshot[report]'."]
        assert not list((tmp_path / "o").glob("*.pdf"))
        assert (tmp_path / "o" / "accuracy.svg").is_file()

    def test_tables_are_in_latex_too(self, made):
        _, folder, _ = made
        text = (folder / "means.tex").read_text(encoding="utf-8")
        assert text.count(r"$\pm$") == 6
        assert text.count(r"\textbf{") == 2
        assert {file.stem for file in folder.glob("*.tex")} == {file.stem for file in folder.glob("*.csv")}

    def test_the_baseline_is_named(self, made, tmp_path):
        rows, folder, _ = made
        report(folder.parent, "--out", tmp_path / "o", "--baseline", "ridge")
        line = next(line for line in table_of(tmp_path / "o", "differences") if line["contender"] == "coop")
        mean = {m: np.mean([r["acc"] for r in rows if r["method"] == m]) for m in ("coop", "ridge")}
        assert float(line["difference"]) == pytest.approx(mean["coop"] - mean["ridge"])
        assert "favours" not in (tmp_path / "o" / "index.html").read_text(encoding="utf-8")
        assert "favours" in (folder / "index.html").read_text(encoding="utf-8")
