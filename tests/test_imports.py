"""Imports point one way, and the command line starts without loading torch."""

import ast
import json
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

import kshot

ROOT = Path(kshot.__file__).parent
MODULES = sorted(ROOT.rglob("*.py"))

# Parts of the package from the ground up: each imports only what stands before it, or lies in itself.
ORDER = (
    "errors", "judging", "calibration", "mahalanobis", "lean", "templates", "files", "sealing", "store", "products",
    "holding", "slots", "layers", "backbones", "adapters", "classifiers", "config", "places", "layering", "making",
    "available", "data", "optim", "header", "features", "kept_tokens", "prepare", "metrics", "callbacks",
    "checkpoint", "predictions", "evaluate", "module", "run", "folds", "forecast", "released", "foreign",
)  # fmt: skip
LIGHT = set(ORDER[: ORDER.index("classifiers") + 1])  # plain torch: no trainer, no command line


def part_of(file: Path) -> str:
    return file.relative_to(ROOT).with_suffix("").parts[0]


@cache
def imported(file: Path) -> list[str]:
    """Absolute names of everything a file imports, at whatever depth."""
    names = []
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file.name}:{node.lineno}: relative import"
            names += [f"{node.module}.{alias.name}" for alias in node.names]
    return names


def own(file: Path) -> set[str]:
    """The parts of kshot that a file imports."""
    return {name.split(".")[1] for name in imported(file) if name.startswith("kshot.")} - {"__version__"}


def identify(file: Path) -> str:
    return file.relative_to(ROOT).as_posix()


def test_the_package_is_there():
    assert {"slots.py", "errors.py", "cli.py", "commands.py"} <= {identify(f) for f in MODULES}
    assert own(ROOT / "commands.py"), "the reader of imports finds nothing"
    assert set(ORDER) <= {part_of(f) for f in MODULES}


@pytest.mark.parametrize("file", MODULES, ids=identify)
def test_imports_point_one_way(file):
    part = part_of(file)
    if part in ORDER:
        assert own(file) - set(ORDER[: ORDER.index(part) + 1]) == set()


def test_no_file_imports_itself_round_a_circle():
    parts = {f: ("kshot", *f.relative_to(ROOT).with_suffix("").parts) for f in MODULES}
    names = {f: ".".join(of_file).removesuffix(".__init__") for f, of_file in parts.items()}
    edges = {}
    for file, name in names.items():
        found = {n if n in names.values() else n.rpartition(".")[0] for n in imported(file) if n.startswith("kshot.")}
        edges[name] = (found & set(names.values())) - {name, "kshot"}
    while leaves := {name for name, found in edges.items() if not found}:
        edges = {name: found - leaves for name, found in edges.items() if name not in leaves}
    assert edges == {}, "a circle"


def test_no_file_is_too_long_to_be_read_alone():
    lengths = {identify(f): len(f.read_text().splitlines()) for f in MODULES}
    assert {name: length for name, length in lengths.items() if length > 350} == {}
    assert lengths["module.py"] <= 300


@pytest.mark.parametrize("file", [f for f in MODULES if part_of(f) in LIGHT], ids=identify)
def test_methods_know_neither_trainer_nor_command_line(file):
    heavy = {"lightning", "pytorch_lightning", "jsonargparse", "torchmetrics"}
    assert {name.split(".")[0] for name in imported(file)} & heavy == set()


def loaded_by(code: str) -> set[str]:
    script = f"import sys\n{code}\nprint(*sorted(sys.modules))"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=120)
    return set(result.stdout.split())


@pytest.mark.parametrize("code", ["import kshot", "import kshot.cli", "import kshot.errors", "import kshot.files"])
def test_starting_up_loads_no_torch(code):
    modules = loaded_by(code)
    assert "kshot" in modules
    assert modules & {"torch", "lightning", "jsonargparse", "numpy", "timm", "open_clip", "torchvision"} == set()


def test_short_help_loads_no_torch():
    modules = loaded_by("from kshot.cli import main\nmain(['--help'])")
    assert "torch" not in modules


STAGES = """
import contextlib, gc, json, sys
from kshot.cli import main
loaded = {}
import kshot.adapters, kshot.classifiers, kshot.backbones
loaded["methods"] = list(sys.modules)
with contextlib.suppress(SystemExit):
    main(["fit", "--config", "clip_16shot.yaml", "--print_config"])
assert gc.isenabled()
loaded["command"], frozen = list(sys.modules), gc.get_freeze_count()
main(sys.argv[2:])
loaded["run"] = list(sys.modules)
json.dump(loaded | {"frozen": frozen}, open(sys.argv[1], "w"))
import torchvision, scipy.signal
from importlib.metadata import version
assert version("torchvision") != "none"
import torch
from torchmetrics.classification import MulticlassCalibrationError
MulticlassCalibrationError(2)(torch.tensor([[0.1, 0.9]]), torch.tensor([1]))
"""


@pytest.fixture(scope="module")
def stages(tmp_path_factory) -> dict:
    """What a program has loaded with the methods, with the command line, and after a run."""
    folder = tmp_path_factory.mktemp("stages")
    command = ["fit", "--config", "clip_16shot.yaml", "--data.shots", "1", "--trainer.max_epochs", "1"]
    command += ["--trainer.enable_progress_bar", "false", "--run.root", str(folder)]
    command += ["--data.eval_batch_size", "16", "--trainer.limit_test_batches", "1"]
    subprocess.run([sys.executable, "-c", STAGES, str(folder / "loaded.json"), *command], check=True, timeout=240)
    return json.loads((folder / "loaded.json").read_text())


def test_methods_load_without_the_trainer(stages):
    assert "torch" in stages["methods"]
    assert {"lightning", "pytorch_lightning", "jsonargparse"} & set(stages["methods"]) == set()


def test_lightning_loads_without_what_it_would_load_in_vain(stages):
    """And all of that can be loaded afterwards, as the program does."""
    assert {"lightning", "torchmetrics", "kshot.commands"} <= set(stages["command"])
    assert {"transformers", "matplotlib", "scipy", "torchvision"} & set(stages["command"]) == set()
    assert stages["frozen"] > 100_000, "nobody need search them for garbage"


def test_a_run_loads_no_library_that_it_does_not_need(stages):
    assert {"open_clip", "lightning"} <= set(stages["run"])
    assert {"transformers", "matplotlib", "scipy", "sklearn"} & set(stages["run"]) == set()
