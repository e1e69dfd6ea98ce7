"""The lowest versions that pyproject.toml allows run the README's first command (``-m lowest``: gigabytes)."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def lowest() -> list[str]:
    """``name==version`` of every dependency, at its lower bound."""
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    found = [re.fullmatch(r"([\w.-]+)(\[[\w,]+\])?>=([\d.]+)(,<[\d.]+)?", each) for each in listed]
    assert all(found), "a dependency without a lower bound"
    return [f"{m[1]}{m[2] or ''}=={m[3]}" for m in found if m]


def test_every_dependency_has_a_lower_bound_and_the_moving_ones_an_upper_one():
    assert "torch==2.6" in lowest()
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    bounded = {re.split(r"[\[>=<]", each)[0] for each in listed if "<" in each}
    assert {"torch", "torchvision", "open_clip_torch", "timm", "lightning", "jsonargparse"} <= bounded


@pytest.mark.lowest
def test_the_lowest_versions_run_the_first_command(tmp_path):
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "venv"], check=True)
    python = tmp_path / "venv" / "bin" / "python"
    older = "numpy<2"  # what scikit-learn 1.3 was built for
    subprocess.run([python, "-m", "pip", "install", "--quiet", *lowest(), older], check=True)
    subprocess.run([python, "-m", "pip", "install", "--quiet", "--no-deps", "-e", ROOT], check=True)
    command = [python, ROOT / "main.py", "fit", "--config", "clip_16shot.yaml", "--trainer.max_epochs", "3"]
    done = subprocess.run([*command, "--run.root", tmp_path / "runs"], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "adapted accuracy" in done.stdout
