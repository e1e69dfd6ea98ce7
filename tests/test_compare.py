"""Lists of runs and their comparison, against scipy and by brute force."""

import itertools
import json
import os
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from command_line import WHOLE, fit, refused
from scipy.stats import binomtest, multinomial

from kshot.calibration import Calibration
from kshot.cli import main
from kshot.errors import UserError
from kshot.predictions import FILE, Answers, read, write
from kshot.seeing.compare import compared, paired
from kshot.seeing.runs import row_of
from kshot.seeing.statistics import difference, holm, mcnemar, wilson


class TestStatistics:
    @pytest.mark.parametrize(
        ("won", "lost"), [(0, 0), (1, 0), (5, 0), (7, 2), (2, 7), (30, 30), (400, 350), (9000, 8700)]
    )
    def test_mcnemar_is_the_binomial_test_of_scipy(self, won, lost):
        expected = binomtest(won, won + lost).pvalue if won + lost else 1.0
        assert mcnemar(won, lost) == pytest.approx(expected, rel=1e-8)

    @pytest.mark.parametrize(("right", "images"), [(0, 7), (7, 7), (3, 7), (495, 539), (1, 10_000)])
    def test_wilson_is_that_of_scipy(self, right, images):
        expected = binomtest(right, images).proportion_ci(method="wilson")
        assert wilson(right, images) == pytest.approx((expected.low, expected.high), abs=1e-12)

    def test_no_images_tell_nothing(self):
        assert wilson(0, 0) == (0.0, 1.0)
        assert difference(0, 0, 0)[0] < -0.8

    @pytest.mark.parametrize("chances", [(0.2, 0.1), (0.05, 0.02), (0.3, 0.3)])
    def test_the_interval_of_a_difference_holds_what_it_promises(self, chances):
        """Its chance of holding the true difference, over all outcomes of 40 images."""
        n, (b, c) = 40, chances
        outcomes = [(i, j) for i in range(n + 1) for j in range(n + 1 - i)]
        chance = multinomial.pmf([(i, j, n - i - j) for i, j in outcomes], n, (b, c, 1 - b - c))
        holds = [low <= b - c <= high for low, high in (difference(i, j, n) for i, j in outcomes)]
        assert 0.94 < chance[np.array(holds)].sum() < 0.995

    def test_an_interval_is_around_the_difference_and_turns_with_it(self):
        low, high = difference(30, 10, 200)
        assert low < 0.1 < high
        assert difference(10, 30, 200) == pytest.approx((-high, -low))

    def test_holm_is_the_closed_test_by_bonferroni(self):
        generator = np.random.default_rng(0)
        for _ in range(20):
            p = (generator.uniform(size=5) ** 3).tolist()
            subsets = [s for r in range(1, 6) for s in itertools.combinations(range(5), r)]
            expected = [max(min(1, len(s) * min(p[j] for j in s)) for s in subsets if i in s) for i in range(5)]
            assert holm(p) == pytest.approx(expected)
        assert holm([]) == []


def answers_of(directory, guesses, labels, images, names=("a", "b", "c"), **about):
    """Writes a tested run that made these guesses."""
    directory.mkdir(parents=True)
    answers = Answers()
    logits = torch.nn.functional.one_hot(torch.tensor(guesses), len(names)).float()
    answers.add(torch.arange(len(labels)), torch.tensor(labels), logits, Calibration(), None)

    part = SimpleNamespace(paths=[f"{image}.png" for image in images], row_keys=lambda: list(images))
    write(directory / FILE, {"test": (answers.whole(), part)}, {"test": list(names)})
    right = [g == t for g, t in zip(guesses, labels, strict=True)]
    result = {"method": directory.name, "dataset": "d", "acc": sum(right) / len(right), "split": {"shots": 4}}
    (directory / "result.json").write_text(json.dumps(result | about))
    return directory


class TestCompare:
    def test_differences_are_those_of_the_images(self, tmp_path):
        generator = np.random.default_rng(1)
        labels = generator.integers(0, 3, 200)
        one, two = (np.where(generator.uniform(size=200) < p, labels, (labels + 1) % 3) for p in (0.7, 0.85))
        images = [f"i{i}" for i in range(200)]
        order = generator.permutation(200)  # the second run went through them otherwise
        first = answers_of(tmp_path / "one", one.tolist(), labels.tolist(), images)
        shuffled = [images[i] for i in order]
        second = answers_of(tmp_path / "two", two[order].tolist(), labels[order].tolist(), shuffled)
        found = compared([first, second])
        won, lost = int(((two == labels) & (one != labels)).sum()), int(((one == labels) & (two != labels)).sum())
        row = found["runs"][1]
        assert (row["won"], row["lost"], found["images"], found["notes"]) == (won, lost, 200, [])
        assert row["difference"] == pytest.approx((two == labels).mean() - (one == labels).mean())
        assert row["p"] == pytest.approx(binomtest(won, won + lost).pvalue)
        assert found["runs"][0]["accuracy"] == pytest.approx((one == labels).mean())
        raw = []
        for each in sorted(found["classes"], key=lambda each: each["class_name"]):
            mine = labels == "abc".index(each["class_name"])
            assert each["images"] == mine.sum()
            assert each["accuracy"] == pytest.approx([(one == labels)[mine].mean(), (two == labels)[mine].mean()])
            b = int(((two == labels) & (one != labels))[mine].sum())
            c = int(((one == labels) & (two != labels))[mine].sum())
            raw.append(binomtest(b, b + c).pvalue)
        by_name = {each["class_name"]: each["p"] for each in found["classes"]}
        assert [by_name[name] for name in "abc"] == [[pytest.approx(p)] for p in holm(raw)]
        changes = [abs(each["accuracy"][1] - each["accuracy"][0]) for each in found["classes"]]
        assert changes == sorted(changes, reverse=True)

    def test_of_several_runs_p_values_are_corrected(self, tmp_path):
        labels, images = [0] * 40, [str(i) for i in range(40)]
        runs = [answers_of(tmp_path / f"r{n}", [1] * n + [0] * (40 - n), labels, images) for n in (10, 4, 0)]
        found = compared(runs)
        assert [row["p"] for row in found["runs"][1:]] == pytest.approx(holm([mcnemar(6, 0), mcnemar(10, 0)]))

    def test_only_images_that_all_share_are_compared_and_it_is_said(self, tmp_path, capsys):
        one = answers_of(tmp_path / "one", [0, 1, 1, 2], [0, 1, 2, 2], ["w", "x", "y", "z"])
        two = answers_of(tmp_path / "two", [1, 1, 0], [1, 2, 0], ["x", "y", "v"])
        with pytest.raises(SystemExit) as end:
            main(["compare", str(one), str(two)])
        assert end.value.code == 0
        said = capsys.readouterr()
        assert "tested on 4, 3 images; compared are the 2 that all share" in said.err
        assert "2 images of test" in said.out

    def test_copies_of_an_image_are_paired_one_by_one(self, tmp_path):
        one = answers_of(tmp_path / "one", [0, 1, 0], [0, 0, 0], ["x", "x", "y"])
        two = answers_of(tmp_path / "two", [0, 0, 0], [0, 0, 0], ["x", "y", "x"])
        found = compared([one, two])
        assert (found["images"], found["runs"][1]["won"], found["runs"][1]["lost"]) == (3, 1, 0)

    def test_classes_may_be_numbered_otherwise_but_must_be_the_same(self, tmp_path):
        one = answers_of(tmp_path / "one", [0, 1], [0, 1], ["x", "y"])
        two = answers_of(tmp_path / "two", [1, 0], [1, 0], ["x", "y"], names=("b", "a"))
        assert compared([one, two])["runs"][1]["accuracy"] == 1
        other = answers_of(tmp_path / "three", [0, 1], [0, 1], ["x", "y"], names=("a", "z"))
        with pytest.raises(UserError, match=r"y.png \(digest y\) is 'b' in first and 'z' in second"):
            paired([read(one), read(other)], ["first", "second"])

    def test_what_cannot_be_compared_gets_one_line(self, tmp_path, capsys):
        one = answers_of(tmp_path / "one", [0, 1], [0, 1], ["x", "y"])
        two = answers_of(tmp_path / "two", [0, 1], [0, 1], ["u", "v"])
        assert "of which none is in all" in refused(capsys, ["compare", str(one), str(two)])
        assert "needs two runs" in refused(capsys, ["compare", str(one)])
        assert "there is no result.json" in refused(capsys, ["compare", str(one), str(tmp_path / "nowhere")])
        assert "is no finished run" in refused(capsys, ["compare", str(one), str(tmp_path)])
        (two / FILE).unlink()
        assert "has no predictions.parquet" in refused(capsys, ["compare", str(one), str(two)])
        (two / "result.json").write_text("{")
        assert "cannot be read" in refused(capsys, ["compare", str(one), str(two)])

    def test_two_real_runs(self, tmp_path, capsys):
        runs = [fit(tmp_path, "--config", f"methods/{name}.yaml", *WHOLE) for name in ("gda", "zero_shot")]
        capsys.readouterr()
        with pytest.raises(SystemExit):
            main(["compare", *map(str, runs), "--json"])
        found = json.loads(capsys.readouterr().out)
        accuracy = [json.loads((run / "result.json").read_text())["acc"] for run in runs]
        assert [row["accuracy"] for row in found["runs"]] == pytest.approx(accuracy)
        assert found["runs"][1]["difference"] == pytest.approx(accuracy[1] - accuracy[0])
        assert len(found["classes"]) == 10


class TestRuns:
    @pytest.fixture
    def root(self, tmp_path):
        about = {"gda": ("GDA", "digits", 4, 0.9), "lora": ("TextPrompt + LoRA", "pets", 16, 0.95)}
        for name, (method, data, shots, acc) in about.items():
            run = answers_of(tmp_path / "runs" / name / "001", [0], [0], ["x"])
            told = {"method": method, "dataset": data, "split": {"shots": shots}, "acc": acc, "seed": 1}
            when = {"finished": "2026-11-20T08:00:00+00:00" if name == "gda" else "2026-11-26T08:00:00+00:00"}
            (run / "result.json").write_text(json.dumps(told | when))
        untested = tmp_path / "runs" / "old" / "007"
        untested.mkdir(parents=True)
        (untested / "result.json").write_text(json.dumps({"method": "CoOp", "dataset": "digits", "acc": None}))
        os.utime(untested / "result.json", (1_700_000_000, 1_700_000_000))
        return tmp_path / "runs"

    def listed(self, capsys, *words):
        with pytest.raises(SystemExit) as end:
            main(["runs", *map(str, words), "--json"])
        assert end.value.code == 0
        return [run["method"] for run in json.loads(capsys.readouterr().out)]

    @pytest.mark.parametrize(
        ("words", "expected"),
        [
            ([], ["CoOp", "GDA", "TextPrompt + LoRA"]),
            (["--method", "lora"], ["TextPrompt + LoRA"]),
            (["--data", "digit"], ["CoOp", "GDA"]),
            (["--shots", "4"], ["GDA"]),
            (["--min-acc", "92"], ["TextPrompt + LoRA"]),
            (["--since", "2026-11-21"], ["TextPrompt + LoRA"]),
            (["--since", "9999w"], ["CoOp", "GDA", "TextPrompt + LoRA"]),
            (["--sort", "method"], ["CoOp", "GDA", "TextPrompt + LoRA"]),
            (["--sort", "acc", "--data", "s"], ["CoOp", "GDA", "TextPrompt + LoRA"]),
            (["--method", "lora", "--shots", "4"], []),
        ],
    )
    def test_filters(self, root, capsys, words, expected):
        assert self.listed(capsys, root, *words) == expected

    def test_the_table_and_what_is_left_out(self, root, capsys):
        (root / "gda" / "001" / "result.json").write_text("no json")
        with pytest.raises(SystemExit):
            main(["runs", str(root)])
        said = capsys.readouterr()
        assert "left out:" in said.err
        assert "2 runs in" in said.out
        (row,) = [line for line in said.out.splitlines() if "LoRA" in line]
        assert "95.0%" in row
        assert "pets" in row

    def test_a_run_that_tells_no_time_has_that_of_its_file(self, root):
        assert row_of(root / "old" / "007").finished == "2023-11-14T22:13:20+00:00"

    def test_mistakes(self, root, capsys):
        assert "There is no folder of runs" in refused(capsys, ["runs", str(root / "nowhere")])
        assert "'soon' is no time" in refused(capsys, ["runs", str(root), "--since", "soon"])
        assert "unrecognized arguments: --shot" in refused(capsys, ["runs", str(root), "--shot", "4"])

    def test_a_real_run_says_when_it_was_finished(self, tmp_path):
        run = fit(tmp_path, "--config", "methods/zero_shot.yaml")
        row = row_of(run)
        assert json.loads((run / "result.json").read_text())["finished"] == row.finished
        shutil.copytree(run, tmp_path / "copy")
        os.utime(tmp_path / "copy" / "result.json", (0, 0))
        assert row_of(tmp_path / "copy").finished == row.finished
        assert (row.method, row.shots, row.data) == ("TextPrompt", 2, "digits")
