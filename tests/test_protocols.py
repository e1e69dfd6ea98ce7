"""The four protocols end to end: classes are swapped, and what is bound to its classes says so before training."""

import csv
import json
from pathlib import Path

import pytest
import torch
from command_line import QUICK, assert_same_figures, fit, refused, tiny_clip
from data_fixtures import digit_folder
from PIL import Image
from safetensors.torch import load_file

from kshot.cli import main
from kshot.record import base_to_new_over_runs, harmonic_mean, summary

# one for each way to serve new classes: none to serve, prompts, a network over features, adapters; and two that cannot
SERVED = ["zero_shot", "cocoop", "promptsrc", "clip_adapter", "lora"]
BOUND = ["linear_probe", "tip_adapter_f"]
B2N = ["--data.protocol", "base-to-new"]
SOME = ["--data.eval_batch_size", "64"]  # images of each test set


def result_of(directory: Path) -> dict:
    return json.loads((directory / "result.json").read_text())


def pictures(folder: Path, classes: dict[str, int]) -> Path:
    """A data set of plain colours with noise, a class a grey level, in folders train and test."""
    generator = torch.Generator().manual_seed(0)
    for part in ("train", "test"):
        for name, level in classes.items():
            for i in range(3):
                pixels = (level + torch.randint(0, 20, (32, 32, 3), generator=generator)).byte()
                path = folder / part / name / f"{i}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(pixels.numpy()).save(path)
    return folder


@pytest.mark.parametrize("method", BOUND)
def test_what_is_bound_to_its_classes_is_refused_before_training(method, tmp_path, capsys):
    """Of every other classifier the contract of classifiers asks whether it is bound, and why."""
    arguments = ["fit", "--config", "clip_16shot.yaml", "--config", f"methods/{method}.yaml", *QUICK, *B2N]
    line = refused(capsys, [*arguments, "--run.root", str(tmp_path)])
    assert "cannot be tested on the classes of 'new' (data.protocol: base-to-new): " in line
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("method", SERVED)
def test_base_to_new(method, tmp_path):
    options = ["--config", f"methods/{method}.yaml", "--trainer.max_epochs", "1", *B2N]
    directory = fit(tmp_path, *options)
    result = result_of(directory)
    base, new = result["test_sets"]["base"], result["test_sets"]["new"]
    assert result["acc"] == base["acc"]
    assert result["summary"] == {"harmonic_mean": pytest.approx(harmonic_mean(base["acc"], new["acc"]))}
    assert 0.6 < result["zero_shot_summary"]["harmonic_mean"] <= 1
    assert result["split"]["counts"]["train"] == 10
    rows = list(csv.DictReader((directory / "per_class.csv").open()))
    assert [row["class_name"] for row in rows if row["test_set"] == "new"] == ["five", "six", "seven", "eight", "nine"]
    assert [row["label"] for row in rows] == 2 * list("01234")
    if method == "zero_shot":
        assert (base["acc"], new["acc"]) == (base["zero_shot_acc"], new["zero_shot_acc"])


@pytest.mark.parametrize("words", [("zero", "one"), ("zero", "one", "two")])
def test_a_half_of_one_class(words, tmp_path):
    """Of three classes the new one is alone, and of two each."""
    folder = digit_folder(tmp_path / "scans", words, train=2, val=2, test=3)
    options = ["--config", "methods/coop.yaml", "--data.dataset", str(folder), "--trainer.check_val_every_n_epoch", "1"]
    options += tiny_clip()
    result = result_of(fit(tmp_path / "runs", *options, *B2N))
    assert result["test_sets"]["new"]["acc"] == 1.0


def test_the_shots_and_the_manifest_are_those_of_the_whole_run(tmp_path):
    half, whole = fit(tmp_path / "half", *tiny_clip(), *B2N), fit(tmp_path / "whole", *tiny_clip())
    assert (half / "split.json").read_bytes() == (whole / "split.json").read_bytes()
    assert result_of(half)["split"]["digest"] == result_of(whole)["split"]["digest"]


def test_new_classes_do_not_touch_training(tmp_path):
    """Testing on new classes leaves the trained tensors as they were, and serves the base again afterwards."""
    coop = ["--config", "methods/coop.yaml", *tiny_clip(), *B2N]
    directory, alone = fit(tmp_path, *coop), fit(tmp_path, *coop, "--run.test", "false")
    first, second = (load_file(d / "tuned.safetensors") for d in (directory, alone))
    assert all(torch.equal(first[name], second[name]) for name in first)
    main(["test", "--config", str(directory / "config.yaml"), "--ckpt_path", str(directory / "tuned.safetensors"),
          "--run.root", str(tmp_path / "again")])  # fmt: skip
    (again,) = (tmp_path / "again").glob("*/*")
    assert_same_figures(result_of(again), result_of(directory))


def test_dept_fuses_its_heads_on_base_classes_alone(tmp_path):
    """With all the weight on the CAT head, the new classes are still told apart, by the prompts."""
    directory = fit(tmp_path, "--config", "methods/dept.yaml", *B2N, "--model.classifier.balance", "0.99", *SOME)
    result = result_of(directory)["test_sets"]["new"]
    assert result["acc"] > 0.5


def test_cross_dataset_and_domains(tmp_path):
    targets = [
        pictures(tmp_path / "shades", {"black_thing": 0, "grey_thing": 100, "white_thing": 220}),
        pictures(tmp_path / "few", {"Seven": 0, "three": 200}),
    ]
    listed = json.dumps([str(t) for t in targets])
    cross = fit(tmp_path / "runs", *tiny_clip(), "--data.protocol", "cross-dataset", "--data.targets", listed)
    result = result_of(cross)
    assert list(result["test_sets"]) == ["digits", "shades", "few"]
    means = [result["test_sets"][name]["acc"] for name in ("shades", "few")]
    assert result["summary"] == {"targets_mean": pytest.approx(sum(means) / 2)}
    assert result["acc"] == result["test_sets"]["digits"]["acc"]
    rows = list(csv.DictReader((cross / "per_class.csv").open()))
    assert [r["class_name"] for r in rows if r["test_set"] == "shades"] == ["black thing", "grey thing", "white thing"]
    # the same small file by another protocol
    arguments = ["test", "--config", str(cross / "config.yaml"), "--ckpt_path", str(cross / "tuned.safetensors")]
    arguments += ["--data.protocol", "domain-generalisation", "--data.targets", json.dumps([str(targets[1])])]
    main([*arguments, "--run.root", str(tmp_path / "domains")])
    (directory,) = (tmp_path / "domains").glob("*/*")
    domains = result_of(directory)
    assert domains["protocol"] == "domain-generalisation"
    assert domains["test_sets"]["digits"] == result["test_sets"]["digits"]
    rows = list(csv.DictReader((directory / "per_class.csv").open()))
    assert [r["class_name"] for r in rows if r["test_set"] == "few"] == ["seven", "three"]


REFUSALS = {
    "--data.protocol cross-dataset": "--data.targets",
    "--data.targets [dtd]": "--data.protocol",
    "--data.protocol domain-generalisation --data.targets [eurosat]": "has no 'Annual Crop Land'",
    "--data.protocol cross-dataset --data.targets [no/such]": "no/such",
    "--data.protocol base-to-nwe": "base-to-n",
    "--config methods/task_res.yaml --data.protocol cross-dataset --data.targets [eurosat]": "classes of 'eurosat'",
    "--data.sampler percent:50": "shots",
    "--data.sampler percent:500 --data.shots null": "percent",
}


@pytest.mark.parametrize(("options", "expected"), REFUSALS.items())
def test_a_mistake_gets_one_line(options, expected, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert expected in refused(capsys, ["fit", "--config", "clip_16shot.yaml", *options.split()])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("method", ["tip_adapter", "tip_adapter_f", "lp_plus_plus", "linear_probe_lbfgs"])
def test_choosing_needs_validation_images(method, capsys, tmp_path):
    folder = pictures(tmp_path / "shades", {"black": 0, "white": 220})  # parts, but no val
    arguments = ["fit", "--config", "clip_16shot.yaml", "--config", f"methods/{method}.yaml", *QUICK]
    arguments += ["--data.dataset", str(folder), "--run.root", str(tmp_path / "runs"), *tiny_clip()]
    line = refused(capsys, arguments)
    assert "chooses hyper-parameters on validation images, and shades has none" in line
    assert not (tmp_path / "runs").exists()
    main([*arguments, "--data.sampler", "coop-v1+val"])
    (directory,) = (tmp_path / "runs").glob("*/*")
    result = result_of(directory)
    assert (result["selection"], result["split"]["counts"]["val"]) == ("fewshot-val", 2)
    main([*arguments, "--data.manifest", str(directory / "split.json")])


@pytest.mark.parametrize(
    ("sampler", "shots", "selection", "val"),
    [
        ("coop-v1", "2", "fewshot-val", 20),
        ("lpp", "8", "fewshot-val", 80),
        ("tip", "2", "full-val", 355),
        ("percent:10", "null", "percent-val", 39),
    ],
)
def test_what_was_chosen_by_is_in_the_result(sampler, shots, selection, val, tmp_path):
    options = ["--config", "methods/tip_adapter.yaml", "--data.sampler", sampler, "--data.shots", shots]
    options += tiny_clip()
    result = result_of(fit(tmp_path, *options))
    assert result["selection"] == selection
    assert result["split"]["sampler"] == sampler
    assert result["split"]["counts"]["val"] == val


def test_both_ways_to_average_h():
    """CoOp's row of the CoCoOp paper: H of the averages is 71.66; the mean of the eleven H would be 70.83."""
    coop = [
        (76.47, 67.88), (98.00, 89.81), (93.67, 95.29), (78.12, 60.40), (97.60, 59.67), (88.33, 82.26), (40.44, 22.30),
        (80.60, 65.89), (79.44, 41.18), (92.19, 54.74), (84.69, 56.05),
    ]  # fmt: skip
    means = base_to_new_over_runs(coop)
    assert means["base"] == pytest.approx(82.69, abs=0.005)
    assert means["new"] == pytest.approx(63.22, abs=0.005)
    assert means["h_of_averages"] == pytest.approx(71.66, abs=0.005)
    assert means["average_of_h"] == pytest.approx(70.83, abs=0.005)


def test_one_test_set_has_no_summary():
    assert summary("all-to-all", {"test": {"acc": 0.5}}) == {}
    assert harmonic_mean(0.0, 0.0) == 0.0
