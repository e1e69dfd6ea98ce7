"""Files of the first format give what they gave when they were written; the fixtures are never renewed."""

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from command_line import predict, refused
from PIL import Image
from sklearn.datasets import load_digits

FIXTURES = Path(__file__).parent / "fixtures" / "format_1"
EXPECTED = json.loads((FIXTURES / "expected.json").read_text())
NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
REMADE = {"pranc": "frozen basis"}  # its basis became balanced, and is another one
WITH_LAST = ("coop", "promptsrc")


@pytest.fixture(scope="module")
def scans(tmp_path_factory) -> Path:
    folder, images = tmp_path_factory.mktemp("scans"), load_digits().images
    for i in range(8):
        Image.fromarray(np.round(images[100 + 37 * i] * (255 / 16)).astype("uint8")).save(folder / f"{i}.png")
    return folder


def predicted(name: str, suffix: str, scans: Path, tmp_path: Path) -> list[dict[str, str]]:
    """What a file says of the scans, in a directory as a run has it."""
    run = tmp_path / "run"
    weights = run / ("tuned.safetensors" if suffix == "safetensors" else "checkpoints/last.ckpt")
    weights.parent.mkdir(parents=True)
    shutil.copy(FIXTURES / f"{name}.yaml", run / "config.yaml")
    shutil.copy(FIXTURES / f"{name}.{suffix}", weights)
    predict(weights, "--images", scans, "--top_k", "10", "--out", tmp_path / "out.csv")
    return list(csv.DictReader((tmp_path / "out.csv").open()))


def arguments(command: str, name: str, tmp_path: Path, suffix: str = "safetensors") -> list[str]:
    config, file = FIXTURES / f"{name}.yaml", FIXTURES / f"{name}.{suffix}"
    quiet = ["--run.root", str(tmp_path / "runs"), "--trainer.enable_progress_bar", "false"]
    return [command, "--config", str(config), "--ckpt_path", str(file), *quiet]


@pytest.mark.parametrize("name", [name for name in EXPECTED if name not in REMADE])
def test_predictions_are_what_they_were(name, scans, tmp_path):
    for row, expected in zip(
        predicted(name, "safetensors", scans, tmp_path), EXPECTED[name]["probabilities"], strict=True
    ):
        found = {row[f"label_{i}"]: float(row[f"probability_{i}"]) for i in range(1, 11)}
        assert [found[c] for c in NAMES] == pytest.approx(expected, abs=2e-5)


@pytest.mark.parametrize("name", WITH_LAST)
def test_the_file_to_resume_from_is_measured_and_not_resumed(name, scans, tmp_path, capsys):
    for row, expected in zip(predicted(name, "ckpt", scans, tmp_path), EXPECTED[name]["probabilities"], strict=True):
        found = {row[f"label_{i}"]: float(row[f"probability_{i}"]) for i in range(1, 11)}
        assert [found[c] for c in NAMES] == pytest.approx(expected, abs=2e-5)
    line = refused(capsys, arguments("fit", name, tmp_path, "ckpt"))
    assert "has format 1, and this version resumes from format 3" in line


@pytest.mark.parametrize(("name", "why"), REMADE.items())
def test_what_changed_its_meaning_is_refused_in_one_line(name, why, tmp_path, capsys):
    assert why in refused(capsys, arguments("test", name, tmp_path))
