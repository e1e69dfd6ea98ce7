"""The code on the documentation pages runs, and what it defines works through ``class_path``."""

import json
import pkgutil
import re
import shlex
import sys
import warnings
from contextlib import suppress
from pathlib import Path

import pytest
import towers
from messy import scans

from kshot.cli import main
from kshot.data.catalogue import load_split

ROOT = Path(__file__).parents[1]
SOME = ["--data.eval_batch_size", "16", "--trainer.limit_test_batches", "1"]  # of the test images
SOME += ["--run.calibrate", "false", "--data.views", "1"]


@pytest.fixture
def my_package(tmp_path, monkeypatch) -> Path:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "extending.md").read_text(), re.DOTALL)
    assert len(blocks) == 4
    (tmp_path / "my_package.py").write_text("\n".join(blocks))
    monkeypatch.syspath_prepend(tmp_path)
    sys.modules.pop("my_package", None)
    yield tmp_path
    sys.modules.pop("my_package", None)


@pytest.mark.parametrize(
    ("options", "method", "trainable"),
    [
        (["--model.adapter", "my_package.RowScale"], "TextPrompt + RowScale", 6 * (3 * 192 + 768 + 192)),
        (["--model.classifier", "my_package.CosineHead", "--model.adapter", "null"], "CosineHead", 10 * 128),
        (
            [
                *["--model.backbone", "my_package.OneLayer", "--model.classifier", "LinearProbe"],
                *["--model.adapter.rank", "2", "--model.targets", "[image.0.fc1]"],
            ],
            "LinearProbe + LoRA",
            2 * (3 + 8) + 10 * 9,
        ),
    ],
)
def test_the_examples_work_by_class_path(my_package, options, method, trainable, monkeypatch):
    monkeypatch.chdir(my_package)
    main(["fit", "--config", "clip_16shot.yaml", "--trainer.max_epochs", "2", "--data.shots", "2", *SOME, *options])
    result = json.loads(next(my_package.rglob("result.json")).read_text())
    assert result["method"] == method
    assert result["trainable_parameters"] == trainable


def test_the_tour_names_what_exists():
    text = (ROOT / "docs" / "tour.md").read_text()
    names = set(re.findall(r"`(kshot(?:\.\w+)+)`", text))
    assert len(names) > 20
    for name in names:
        assert pkgutil.resolve_name(name) is not None
    files = {p.name for p in [*(ROOT / "src").rglob("*.py"), ROOT / "main.py"]}
    assert set(re.findall(r"\b(\w+\.py)\b", text)) <= files
    for method in re.findall(r"`([a-z]+_[a-z_]+)`", text):
        assert any(f"def {method}(" in p.read_text() for p in (ROOT / "src").rglob("*.py")), method
    assert len(text.split("Without the command line")[0].splitlines()) <= 50, "one screen"


def test_the_program_of_the_tour_runs(capsys):
    (program,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "tour.md").read_text(), re.DOTALL)
    trainer = "make_trainer(max_epochs=1"
    assert trainer in program
    program = program.replace(trainer, f"{trainer}, limit_test_batches=1")  # a hundred of the scans
    exec(compile(program, "tour.md", "exec"), {})
    lines = capsys.readouterr().out.strip().splitlines()
    assert [line.rsplit(" ", 1)[0] for line in lines] == ["CoOp", "TextPrompt + LoRA"]


NOTEBOOKS = sorted((ROOT / "docs" / "notebooks").glob("*.ipynb"))


@pytest.mark.parametrize("file", NOTEBOOKS, ids=lambda file: file.stem)
def test_a_notebook_runs(file, tmp_path, monkeypatch):
    """Its cells in order, in a namespace of their own; a notebook is plain JSON, and is kept without outputs."""
    monkeypatch.chdir(tmp_path)
    cells = [cell for cell in json.loads(file.read_text())["cells"] if cell["cell_type"] == "code"]
    assert cells
    assert not [cell for cell in cells if cell["outputs"]]
    values: dict = {}
    whole, some = "shots=4)", 'shots=4, options={"data.views": 1, "trainer.limit_test_batches": 1})'
    cells[0]["source"] = ["".join(cells[0]["source"]).replace(whole, some)]
    assert some in cells[0]["source"][0]
    for number, cell in enumerate(cells):
        exec(compile("".join(cell["source"]), f"{file.name}, cell {number}", "exec"), values)
    assert values["again"].predict(values["scans"])[0].label == "zero"


def test_there_is_a_notebook():
    assert NOTEBOOKS


def test_the_readme_goes_from_a_fit_to_a_table(tmp_path, monkeypatch):
    """The lines of README.md alone, on a folder as it describes one, and a tiny CLIP."""
    monkeypatch.chdir(tmp_path)
    scans(tmp_path / "messy")
    with suppress(SystemExit):
        main(["data", "split", "messy", "--out", "messy/split.json"])
    program, elsewhere = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    options = {"model.backbone.model": str(towers.folder_of("clip")), "data.views": 1}
    run = f'["clip_16shot.yaml", "methods/gda.yaml"], data="messy/split.json", options={options}'
    given = {
        '"clip_16shot.yaml", data="photos/"': run,
        '["a.jpg", "new/"]': '"messy/001.three"',
    }
    for lines, quick in given.items():
        assert lines in program
        program = program.replace(lines, quick)
    values: dict = {}
    exec(program, values)
    assert len(values["found"]) > 10
    assert {each.label for each in values["found"] if not each.error} <= {"three", "five", "eight", "nine"}
    assert list(values["table"].columns[:3]) == ["path", "label_1", "probability_1"]

    run = values["run"].directory
    with suppress(SystemExit):
        main(["export", str(run), "--format", "onnx", "--out", "written"])
    for line, quick in {"runs/clip_16shot/001/export/onnx": "written", "a.jpg": values["found"][0].path}.items():
        assert line in elsewhere
        elsewhere = elsewhere.replace(line, quick)
    exec(elsewhere, values)
    assert values["probabilities"].sum() == pytest.approx(1, abs=1e-5)
    assert values["probabilities"].max() == pytest.approx(values["found"][0].probability, abs=0.1)  # another resize


def shown_after(command: str) -> tuple[list[str], list[str]]:
    """The words of a command in README.md after ``python main.py``, and the indented lines that it shows below."""
    blocks = re.findall(r"(?:^ {4}.*\n)+", (ROOT / "README.md").read_text(), re.MULTILINE)
    (at,) = [i for i, block in enumerate(blocks) if block.startswith(f"    python main.py {command}")]
    return shlex.split(blocks[at])[2:], [line.removeprefix("    ") for line in blocks[at + 1].splitlines()]


@pytest.fixture(scope="module")
def folder_of_the_readme(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("readme")
    scans(root / "photos")
    return root


def test_the_readme_shows_what_check_and_split_say(folder_of_the_readme, monkeypatch, capsys):
    monkeypatch.chdir(folder_of_the_readme)
    for command, code in (("data check photos/", 1), ("data split photos/ --out", 0)):
        words, lines = shown_after(command)
        with pytest.raises(SystemExit) as end:
            main(words)
        assert end.value.code == code
        assert [line.rstrip() for line in capsys.readouterr().out.splitlines()] == lines
    assert load_split("split.json")[0].class_names == ("three", "five", "eight", "nine")


@pytest.mark.slow  # as the README's first command
def test_the_readme_shows_the_accuracy_on_the_divided_folder(folder_of_the_readme, monkeypatch, capsys):
    monkeypatch.chdir(folder_of_the_readme)
    with suppress(SystemExit):  # it may be there
        main(["data", "split", "photos/", "--out", "split.json"])
    words, lines = shown_after("fit --config clip_16shot.yaml --data.dataset split.json --data.template")
    capsys.readouterr()
    main([*words, "--trainer.enable_progress_bar", "false"])
    said = capsys.readouterr()
    assert "same bytes" not in said.err
    assert lines[0] in said.out
    for line in lines[2:]:
        name, value = line.split("│")[1:3]
        found = re.search(rf"│{name}│ +([0-9.]+)%", said.out)
        assert abs(float(found[1]) - float(value.strip().rstrip("%"))) < 4, "two of 56 images, on any machine"


def test_a_run_on_the_messy_folder_warns_of_copies_once(folder_of_the_readme, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(folder_of_the_readme)
    words = ["fit", "--config", "clip_16shot.yaml", "--data.dataset", "photos", "--config", "methods/class_mean.yaml"]
    words += ["--data.shots", "4", "--data.skip_unreadable", "true", "--run.root", str(tmp_path)]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        main([*words, *SOME])
    said = capsys.readouterr().err + "".join(f"{each.message}\n" for each in caught)
    assert said.count("test images have the same bytes as one that was drawn") == 1
    assert said.count("class names of photos") == 1


def test_links_in_the_pages_lead_somewhere():
    for page in [ROOT / "README.md", *(ROOT / "docs").glob("*.md"), ROOT / "data_splits" / "README.md"]:
        for target in re.findall(r"\]\((?!http)([^)#]+)\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_the_readme_names_every_method_config():
    table = (ROOT / "README.md").read_text().split("| `methods/NAME.yaml` |")[1].split("\n\n")[0]
    named = set(re.findall(r"`(\w+)`", table))
    assert named == {config.stem for config in (ROOT / "configs" / "methods").glob("*.yaml")}


def test_the_page_on_methods_has_every_config():
    page = (ROOT / "docs" / "methods.md").read_text().split("## Measured")[0]
    rows = {name for line in page.splitlines() if line.startswith("| `") for name in re.findall(r"`(\w+)`", line[:99])}
    assert {config.stem for config in (ROOT / "configs" / "methods").glob("*.yaml")} <= rows


def test_the_page_on_seeing_shows_what_compare_says_and_its_program_runs(tmp_path, monkeypatch, capsys):
    text = (ROOT / "docs" / "seeing.md").read_text()
    commands = [shlex.split(line)[2:] for line in re.findall(r"^ {4}(python main\.py (?:fit|compare) .*)$", text, re.M)]
    monkeypatch.chdir(tmp_path)
    for words in commands:
        capsys.readouterr()
        with suppress(SystemExit):
            main([*words, *["--trainer.enable_progress_bar", "false"] * (words[0] == "fit")])
    found = [line.split() for line in capsys.readouterr().out.splitlines()]
    shown = [line.split() for line in re.search(r"ends with.*?\n\n((?: {4}.*\n)+)", text)[1].splitlines()]
    assert found[0] == shown[0]
    for mine, there in zip(found[2:4], shown[2:4], strict=True):
        assert mine[:2] == there[:2]
        assert float(mine[2].rstrip("%")) == pytest.approx(float(there[2].rstrip("%")), abs=2)
    (program,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    exec(compile(program, "seeing.md", "exec"), {})
    assert re.match(r"\d+ errors, the first: \d+ \w+ as \w+", capsys.readouterr().out)
