"""Every script in ``benchmarks`` runs for one tiny round and writes its rows; ``side_by_side.py`` is shared."""

import csv
import logging
import math
import re
import runpy
import shutil
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1] / "benchmarks"
CLIP = ["--model", "kshot:glyph_clip"]


@pytest.fixture
def run(monkeypatch, tmp_path):
    """Runs a script in this process; the rows of the CSV files that it wrote, by name."""
    monkeypatch.chdir(FOLDER.parent)
    monkeypatch.syspath_prepend(FOLDER)

    def start(script: str, *arguments: str) -> dict[str, list[dict[str, str]]]:
        main = runpy.run_path(str(FOLDER / f"{script}.py"))["main"]
        main(list(arguments))
        return {file.stem: list(csv.DictReader(file.open(newline=""))) for file in tmp_path.glob("*.csv")}

    yield start
    logging.disable(logging.NOTSET)  # scripts silence what libraries say


def test_every_script_has_a_test():
    scripts = {file.stem for file in FOLDER.glob("*.py")} - {"side_by_side"}
    tested = {name.removeprefix("test_").split("__")[0] for name in globals() if name.startswith("test_")}
    assert scripts <= tested


def positive(row: dict[str, str], *names: str) -> bool:
    return all(math.isfinite(float(row[name])) and float(row[name]) > 0 for name in names)


TINY = ["--quick", "--seconds", "0", "--least", "1", "--in-process"]


def test_adapters__against_peft(run, tmp_path):
    pytest.importorskip("peft")
    methods = ["AdaLoRA-12", "HydraLoRA 8x3"]  # with work after a step, and one that PEFT has not
    parts = ["--part", "peft", "open_clip", "--images", "1"]
    rows = run("adapters", *TINY, *parts, "--methods", "LoRA-32", "--dtype", "bfloat16", "--out", str(tmp_path))
    assert [row["part"] for row in rows["adapters"]] == ["peft", "open_clip"]
    assert all(positive(row, "ours/peft", "peft_ms", "kshot_frozen_ms") for row in rows["adapters"])
    parts = ["--part", "open_clip", "--images", "1"]
    rows = run("adapters", *TINY, *parts, "--methods", *methods, "--dtype", "float32", "--out", str(tmp_path))
    assert {row["method"] for row in rows["adapters"]} == {"LoRA-32", *methods}
    assert all(positive(row, "ours_ms") for row in rows["adapters"])


def test_adapters__quick_and_plain_forms(run, tmp_path):
    rows = run("adapters", *TINY, "--part", "forms", "--out", str(tmp_path))["adapters_fast_paths"]
    assert len(rows) == 4
    assert all(positive(row, "plain/quick") for row in rows)
    assert all(float(row["difference"]) < 1e-5 for row in rows if row["method"].startswith(("HydraLoRA", "SVFT")))


@pytest.mark.slow
def test_adapters__compiled(run, tmp_path):
    rows = run(
        "adapters", *TINY, "--part", "compile", "--methods", "LoRA-32", "--backend", "eager", "--out", str(tmp_path)
    )["adapters_fast_paths"]
    assert [(row["state"], row["compile"], row["export"]) for row in rows] == [
        ("adapted, training", "ok", "ok"),
        ("merged, evaluation", "ok", "ok"),
    ]


ROUNDS = ["fp32 train", "fp32 eval", "bf16 train", "bf16 eval"]


@pytest.mark.parametrize("case", ["glyph_clip image", "glyph_clip text"])
def test_attention__towers(run, tmp_path, case):
    out = tmp_path / "attention.csv"
    rows = run("attention", "--only", case, "--batch", "1", "--seconds", "0", "--out", str(out))["attention"]
    assert [f"{row['dtype']} {row['step']}" for row in rows] == ROUNDS
    assert all(positive(row, "unfused/fused", "lora/fused") for row in rows)
    assert all(float(row["feature_diff"]) < (1e-5 if row["dtype"] == "fp32" else 0.05) for row in rows)


def test_attention__lengths(run, tmp_path):
    given = ["--lengths", "5", "--tokens", "10", "--heads", "1", "--seconds", "0"]
    rows = run("attention", "--only", "lengths", *given, "--out", str(tmp_path / "attention.csv"))["attention_lengths"]
    assert [f"{row['dtype']} {row['step']}" for row in rows] == ROUNDS
    assert all(positive(row, "sdpa/explicit", "rule") for row in rows)


def test_text_tower(run, tmp_path):
    given = ["--classes", "2", "--context", "2", "--dtype", "bf16", "--seconds", "0"]
    rows = run("text_tower", *CLIP, *given, "--out", str(tmp_path / "text_tower.csv"))["text_tower"]
    assert [row["case"] for row in rows] == ["CoOp step", "zero-shot"]
    assert all(positive(row, "full/kshot", "short/kshot") for row in rows)


def test_feature_cache(run, tmp_path):
    given = ["--shots", "1", "--size", "32", "--digits-epochs", "2", "--rounds", "1"]
    rows = run("feature_cache", *CLIP, *given, "--out", str(tmp_path / "feature_cache.csv"))["feature_cache"]
    assert len(rows) == 2
    assert all(positive(row, "encoded_s", "cached_s", "ratio") for row in rows)
    assert all(float(row["loss_diff"]) < 1e-5 for row in rows)


def test_kept_tokens(run, tmp_path):
    given = ["--shots", "1", "--batch", "5", "--size", "32", "--epochs", "2", "--rounds", "1", "--blocks", "1"]
    rows = run("kept_tokens", *CLIP, *given, "--out", str(tmp_path / "kept_tokens.csv"))["kept_tokens"]
    assert [row["blocks"] for row in rows] == ["1 of 6"]
    assert positive(rows[0], "images_s", "tokens_s", "ratio", "kB an image")
    assert float(rows[0]["loss_diff"]) < 1e-5


def test_predictions(run, tmp_path):
    given = ["--images", "300", "--classes", "3", "200"]
    rows = run("predictions", *given, "--out", str(tmp_path / "predictions.csv"))["predictions"]
    assert [row["classes"] for row in rows] == ["3", "200"]
    assert all(positive(row, "bytes_memory", "bytes_disk") for row in rows)


def test_prompts(run, tmp_path):
    given = ["--quick", "--seconds", "0", "--in-process"]
    rows = run("prompts", *CLIP, *given, "--out", str(tmp_path / "prompts.csv"))["prompts"]
    assert list(dict.fromkeys(row["part"] for row in rows)) == ["coop", "cocoop", "promptsrc", "memory", "many"]
    assert all(positive(row, "slow/quick") for row in rows if row["slow_s"])
    assert all(int(row["chunks"]) > 1 for row in rows if row["part"] == "many")


def test_reliability(run, tmp_path):
    page = tmp_path / "page.md"
    shutil.copy(FOLDER.parent / "docs" / "reliability.md", page)
    out = ["--out", str(tmp_path / "reliability.csv"), "--page", str(page)]
    rows = run("reliability", "--parts", "hostile", "--share", "0.02", *out)["reliability"]
    assert [(row["tried"], row["ended as it should"], row["same result, or safe"]) for row in rows] == [("1",) * 3]
    assert page.read_text().count("\n| a hostile file | 1 | 1 | 1 |") == 1


RUN = ["--", "--trainer.max_epochs", "1", "--data.eval_batch_size", "64"]
SHORT = [*RUN, "--data.views", "1", "--trainer.limit_test_batches", "1", "--run.calibrate", "false"]


def test_few_shot(run, tmp_path, capsys):
    given = ["--methods", "class_mean", "--shots", "1", "--seeds", "1", "--out", str(tmp_path / "few_shot.csv")]
    rows = run("few_shot", "--one-method", *given, *SHORT)["few_shot"]
    assert len(rows) == 1
    assert positive(rows[0], "acc", "peak_memory_mb")
    assert run("few_shot", *given)["few_shot"] == rows  # the row is there: no process is started
    assert "| class_mean |" in capsys.readouterr().out


@pytest.mark.slow
def test_few_shot__by_processes_of_their_own(run, tmp_path, capsys):
    """As the table of the README is made."""
    given = ["--methods", "class_mean", "--shots", "1", "--seeds", "1", "2", "--out", str(tmp_path / "few_shot.csv")]
    rows = run("few_shot", *given, *SHORT)["few_shot"]
    assert [row["seed"] for row in rows] == ["1", "2"]
    assert re.search(r"\| class_mean \| \d\d\.\d ± \d+\.\d \| 0 \|", capsys.readouterr().out)


def test_base_to_new(run, tmp_path):
    page = tmp_path / "page.md"
    shutil.copy(FOLDER.parent / "docs" / "methods.md", page)
    given = ["--methods", "coop", "--seeds", "1", "--page", str(page), "--out", str(tmp_path / "base_to_new.csv")]
    rows = run("base_to_new", "--one-method", *given, *SHORT, "--data.shots", "1")["base_to_new"]
    assert len(rows) == 1
    assert positive(rows[0], "base", "new", "zero_shot_new")
    run("base_to_new", *given)
    table = page.read_text().split("<!-- base to new -->\n")[1].split("\n<!-- end of base to new -->")[0]
    assert table.splitlines()[2].startswith("| coop | ")


def test_methods(run, tmp_path):
    page, out = tmp_path / "page.md", ["--out", str(tmp_path / "methods.csv")]
    shutil.copy(FOLDER.parent / "docs" / "methods.md", page)
    row = ["--methods", "class_mean", "--seeds", "1", *out]
    run("few_shot", "--one-method", "--label", "methods_digits", "--shots", "16", *row, *SHORT)
    run("methods", "--cases", "digits", *row, "--page", str(page))
    assert "**digits**" in page.read_text().split("<!-- table -->")[1].split("<!-- end of table -->")[0]


def test_defaults(run, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("kshot.optim.STEPS", 2)
    given = ["--cases", "digits", "--shots", "1", "--seeds", "1", "--out", str(tmp_path / "defaults.csv")]
    methods = ["class_mean", "ridge", "linear_probe", "lora"]
    rows = run("defaults", *given, "--methods", *methods)["defaults"]
    assert [(row["method"], row["steps"], row["lr"]) for row in rows] == [
        *[("class_mean", "0", ""), ("ridge", "0", ""), ("linear_probe", "2", "0.001"), ("lora", "2", "0.002")],
    ]
    assert all(positive(row, "acc", "fit_seconds") for row in rows)
    best = max(rows[:2], key=lambda row: float(row["acc"]))
    above = [100 * (float(row["acc"]) - float(best["acc"])) for row in rows[2:]]
    line = f"| digits | 1 | {100 * float(best['acc']):.1f} ({best['method']}) | {above[0]:+.1f} | {above[1]:+.1f} |"
    assert line in capsys.readouterr().out
    assert run("defaults", *given, "--methods", *methods)["defaults"] == rows  # they are there: nothing is measured


def test_choose(run, tmp_path):
    given = ["--in-process", "--only", "digits+clip", "--seeds", "1", "--out", str(tmp_path / "choose.csv")]
    small = [*given, "--methods", "class_mean", "ridge_layers", "auto_30s", "--shots", "1", "2"]
    rows = run("choose", *small, *RUN, "--candidates", '["--config methods/ridge.yaml"]')["choose"]
    cells = [("class_mean", "1"), ("ridge_layers", "1"), ("class_mean", "2"), ("ridge_layers", "2")]
    assert [(row["method"], row["shots"]) for row in rows] == [*cells, ("auto_30s", "1"), ("auto_30s", "2")]
    assert all(positive(row, "acc", "ece", "brier", "seconds") for row in rows)
    assert all(positive(row, "forecast", "low", "high") for row in rows if row["shots"] == "2")
    assert [row["chosen"] for row in rows if row["chosen"]] == ["--config methods/ridge.yaml"] * 2
    assert run("choose", *small, *RUN)["choose"] == rows  # no row is made again


def test_choose__report(run, tmp_path, capsys):
    def row(method: str, shots: int, seed: int, acc: float, **given: object) -> dict[str, object]:
        told = {"forecast": 0.8, "low": 0.7, "high": 0.9, "ece": 0.05, "ece_before": 0.1, "brier": 0.2, "seconds": 36}
        return {"pair": "digits+clip", "method": method, "shots": shots, "seed": seed, "acc": acc} | told | given

    rows = [row("ridge", 4, 1, 0.8), row("ridge", 4, 2, 0.92), row("lora", 4, 1, 0.95), row("auto_5m", 4, 1, 0.79)]
    rows += [row("gda", 16, 1, 0.9), row("auto_5m", 16, 1, 0.92), row("gda", 1, 1, 0.2, forecast="", low="", high="")]
    with (tmp_path / "choose.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    run("choose", "--report", "--out", str(tmp_path / "choose.csv"), "--stage-out", str(tmp_path / "stage.csv"))
    said = capsys.readouterr().out
    assert "| ridge |  |  | 86.0 |  |  | 36 |" in said
    assert "| lora |  |  | 95.0 (1) |  |  | 36 |" in said
    assert "the best any method in hindsight, points | -1.0 in the mean | -7.0 in the mean, -16.0 at worst" in said
    assert "the best closed form in hindsight, points | -2.0 at worst | +0.5 in the mean, -1.0 at worst" in said
    assert "| digits+clip | 6 | -8.0 | 8.3 | 50% | 0.100 | 0.050 |" in said
    assert "| ECE after the temperature, auto | 0.060 | 0.050 | 2 rows |" in said
    assert said.strip().endswith("7 rows; 0.1 hours of fitting and choosing.")


def test_choose__stage(run, tmp_path):
    given = ["--stage-shots", "2", "--width", "64", "--views", "2", "--stage-out", str(tmp_path / "stage.csv")]
    rows = run("choose", "--in-process", "--stage", "3", *given)["stage"]
    assert [(row["classes"], row["shots"], row["width"]) for row in rows] == [("3", "2", "64")]
    assert all(positive(row, "seconds", "start_mb", "peak_mb") for row in rows)


def test_data(run, tmp_path):
    tiny = [
        "--files",
        "40",
        "--images",
        "40",
        "--model",
        "kshot:glyph_clip",
        "--workers",
        "0",
        "--rounds",
        "1",
        "--in-process",
    ]
    rows = run("data", *tiny, "--classes", "2", "--views", "2", "--out", str(tmp_path / "data.csv"))["data"]
    assert [row["part"] for row in rows] == ["listing", "first pass", "second pass", "digest", "fit", "memory"]
    assert all(positive(row, "kshot", "value") for row in rows if row["part"] in {"first pass", "second pass", "fit"})


LIBRARIES = [("open_clip", CLIP[1]), pytest.param("timm", "test_vit", marks=pytest.mark.slow)]


@pytest.mark.parametrize(("library", "model"), LIBRARIES)
def test_predict__beside_plain_loops(library, model, run, tmp_path):
    models = {"open_clip": [], "timm": []} | {library: [model]}
    given = ["--open-clip", *models["open_clip"], "--timm", *models["timm"], "--out", str(tmp_path / "predict.csv")]
    rows = run("predict", *given, "--images", "8", "--batch", "4", "--rounds", "1", "--workers", "1", "--in-process")[
        "predict"
    ]
    assert [row["library"] for row in rows] == [library]
    names = ("wall_kshot", "wall_plain", "wall_ratio", "core_ratio", "start", "start_core")
    assert all(positive(row, *names) for row in rows)


def test_results(run, tmp_path):
    rows = run("results", "--runs", "60", "--rounds", "1", "--out", str(tmp_path / "results.csv"))["results"]
    assert [row["part"] for row in rows][:3] == ["index made", "opened, up to date", "filter"]
    assert len(rows) == 7
    assert all(row["runs"] == "60" and positive(row, "seconds") for row in rows)


def test_sweep(run, tmp_path):
    few = ["--shots", "1", "--seeds", "1", "--samples", "1", "--nothing", "8", "--cells", "50", "--in-process"]
    rows = run("sweep", *few, "--out", str(tmp_path / "sweep.csv"))["sweep"]
    assert [(row["part"], row["runs"]) for row in rows] == [
        ("mixed", "4"),
        ("closed forms", "4"),
        ("scheduling", "8"),
        ("planner", "50"),
    ]
    assert all(positive(row, "ratio", "steady_ratio", "alone_cpu_s", "sweep_cpu_s") for row in rows[:2])
    assert positive(rows[2], "ms_a_run")
    assert positive(rows[3], "planning_s", "peak_mb")
