"""The package of docs/extending.md, built and installed: its short names work in YAML, and load only when asked for."""

import json
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
from command_line import FIT, QUICK, refused
from data_fixtures import image_folder

import kshot
from kshot.cli import main
from kshot.data.catalogue import CATALOGUE

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """Where pip has installed it."""
    page, source = (ROOT / "docs" / "extending.md").read_text(), tmp_path_factory.mktemp("source")
    (source / "my_package.py").write_text("\n".join(re.findall(r"```python\n(.*?)```", page, re.DOTALL)))
    (toml,) = re.findall(r"```toml\n(.*?)```", page, re.DOTALL)
    (source / "pyproject.toml").write_text(toml)
    target = tmp_path_factory.mktemp("site")
    options = ["--quiet", "--no-index", "--no-deps", "--no-build-isolation", "--target", str(target)]
    subprocess.run([sys.executable, "-m", "pip", "install", *options, str(source)], check=True, timeout=300)
    return target


@pytest.fixture
def package(installed, tmp_path, monkeypatch) -> Path:
    """A working directory beside which it is installed."""
    monkeypatch.syspath_prepend(installed)
    monkeypatch.chdir(tmp_path)
    CATALOGUE.__dict__.pop("plugged", None)
    yield tmp_path
    sys.modules.pop("my_package", None)
    CATALOGUE.__dict__.pop("plugged", None)


def result(place: Path) -> dict:
    return json.loads(next(place.rglob("result.json")).read_text())


def test_short_names_work_in_yaml(package):
    (package / "mine.yaml").write_text(
        "model: {init_args: {adapter: {class_path: RowScale, init_args: {start: 0.1}}, classifier: CosineHead}}\n"
    )
    image_folder(package / "data" / "tiles", {"red": 10, "blue": 10})
    assert "my_package" not in sys.modules
    main([*FIT, "--config", "mine.yaml", *QUICK, "--data.dataset", "tiles"])
    assert result(package)["method"] == "CosineHead + RowScale"
    assert result(package)["dataset"] == "tiles"
    (directory,) = package.glob("runs/*/*")
    assert "class_path: my_package.RowScale" in (directory / "config.yaml").read_text()
    assert kshot.load(directory).predict("data/tiles")[0].label in ("red", "blue")


def test_a_backbone_by_its_short_name(package):
    main([*FIT, "--config", "methods/linear_probe.yaml", *QUICK, "--model.backbone", "OneLayer"])
    assert result(package)["backbone"] == "one-layer"


def test_names_are_listed_and_loaded_when_they_are_asked_for(package, capsys):
    assert "tiles" in kshot.datasets()
    assert "Did you mean 'RowScale'?" in refused(capsys, [*FIT, "--model.adapter", "RowScales"])
    assert "my_package" not in sys.modules
    assert CATALOGUE["tiles"].template == "a photo of a {} tile."
    assert "my_package" in sys.modules
    assert refused(capsys, [*FIT, "--data.dataset", "tiles"]).startswith("error: tiles: no images")


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ("my_package:nothing", "The plug-in Odd = my_package:nothing of kshot.adapters does not load (AttributeError"),
        ("no_package:Odd", "does not load (ModuleNotFoundError"),
        ("my_package:CosineHead", "the plug-in Odd = my_package:CosineHead is none."),
        ("my_package:TILES", "the plug-in Odd = my_package:TILES is none."),
    ],
)
def test_a_plug_in_that_is_none_gets_one_line(value, said, package, capsys, monkeypatch):
    point = metadata.EntryPoint("Odd", value, "kshot.adapters")
    monkeypatch.setattr("kshot.places.entry_points", lambda group: [point] if group == "kshot.adapters" else [])
    assert said in refused(capsys, [*FIT, "--model.adapter", "Odd"])


@pytest.mark.parametrize("value", ["my_package:RowScale", "my_package:CosineHead"])
def test_a_data_set_that_is_no_table_gets_one_line(value, package, capsys, monkeypatch):
    point = metadata.EntryPoint("odd", value, "kshot.datasets")
    monkeypatch.setattr("kshot.data.catalogue.entry_points", lambda group: [point])
    assert "The plug-in odd of kshot.datasets is no table" in refused(capsys, [*FIT, "--data.dataset", "odd"])
