"""A run predicts from its own files alone: the data set that it was trained on is not looked into, and may be gone."""

import copy
import json
import shutil
import sys
from functools import partial
from pathlib import Path

import many_runs
import numpy as np
import pytest
import towers
from command_line import predict, refused
from data_fixtures import image_folder, parted_folder, save_image
from PIL import Image

from kshot import classifiers
from kshot.adapters import NOLA, LoRA
from kshot.checkpoint import AtomicCheckpoints, packed, write_tensors
from kshot.classifiers import Classifier, Task
from kshot.classifiers.base import closed_form
from kshot.cli import main
from kshot.data import FewShotDataModule
from kshot.data.prediction import PredictionData, of_run
from kshot.errors import UserError
from kshot.header import header_of
from kshot.module import FewShotModule
from kshot.run import build, fit, make_trainer
from kshot.sealing import check_seal

NAMES = {"001.Black cat": 10, "002.dog": 10, "003.sea_lion": 10}
HEARD: list[tuple[str, str]] | None = None  # events while a test listens


def hear(event: str, arguments: tuple) -> None:
    if HEARD is not None and event in ("open", "os.scandir", "os.listdir"):
        HEARD.append((event, str(arguments[0])))


@pytest.fixture(scope="module", autouse=True)
def _hearing():
    sys.addaudithook(hear)


@pytest.fixture
def heard(monkeypatch) -> list:
    """What is opened and listed from now on."""
    events: list = []
    monkeypatch.setattr(sys.modules[__name__], "HEARD", events)
    return events


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Path:
    """A folder of images to train on, and one to label, which no test changes."""
    root = tmp_path_factory.mktemp("alone")
    image_folder(root / "photos", NAMES)
    image_folder(root / "new", {"x": 5})
    return root


@pytest.fixture
def here(store, tmp_path, monkeypatch) -> Path:
    """A working directory with links to both, of which that to the training images can be taken away."""
    monkeypatch.chdir(tmp_path)
    for name in ("photos", "new"):
        Path(name).symlink_to(store / name)
    return tmp_path


def fitted(*options: str, name: str = "run", test: str = "false") -> Path:
    """A short run on a tiny CLIP."""
    main(
        [
            *["fit", "--config", "clip_16shot.yaml", *options, "--run.name", name, "--run.test", test],
            *["--model.backbone.model", str(towers.folder_of("clip")), "--data.views", "1"],
            *(["--data.dataset", "photos"] if "--data.dataset" not in options else []),
            *["--data.shots", "2", "--trainer.max_epochs", "2", "--trainer.enable_progress_bar", "false"],
        ]
    )
    return Path("runs", name, "001")


@pytest.fixture(scope="module")
def finished_run(store, tmp_path_factory) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("finished"))
        Path("photos").symlink_to(store / "photos")
        return fitted().resolve()


@pytest.fixture
def run(finished_run, here) -> Path:
    """A run in the working directory, with its data set beside it."""
    return shutil.copytree(finished_run, Path("runs/run/001"))


def predicted(run: Path, out: str, *options: str, weights: str = "tuned.safetensors", images: str = "new") -> bytes:
    """The CSV of predictions by a run."""
    predict(run / weights, "--images", images, "--out", out, *options)
    return Path(out).read_bytes()


HEADS = many_runs.exported(classifiers, Classifier)
ALIKE = ("CoCoOp", "DePT", "KgCoOp", "MaPLe", "PromptSRC", "TaskRes")  # with layers: as CoOp, VPT and LinearProbe
CASES = [(head, None) for head in HEADS]
CASES += [(head, LoRA(rank=2)) for head in HEADS if head.__name__ not in ALIKE]
CASES += [(classifiers.TextPrompt, NOLA(bases=32, save_bits=8))]  # which packs what it saves


def labels(module: FewShotModule, data: PredictionData, weights: Path | None = None) -> bytes:
    """What a model says of the new images, a line each."""
    data.images = ["new"]
    data.use_preprocessing(module.backbone.preprocessing)
    found = make_trainer().predict(module, datamodule=data, ckpt_path=weights)
    rows = [row for positions, probabilities, *_ in found for row in zip(positions, probabilities, strict=True)]
    each = [f"{data.predict_paths[i]} {dict(zip(data.class_names, p.tolist(), strict=True))}" for i, p in rows]
    return "\n".join(each).encode()


@pytest.mark.parametrize(("head", "adapter"), CASES, ids=lambda each: getattr(each, "__name__", type(each).__name__))
def test_every_classifier_labels_the_same_when_all_but_its_file_is_gone(head, adapter, here):
    settings: dict = {"classifier": partial(head, **many_runs.HEAD_SETTINGS.get(head.__name__, {}))}
    if adapter is not None:
        settings |= {"adapter": copy.deepcopy(adapter), "targets": ["image.*.[qv]"]}
    backbone = towers.backbone("clip")
    data = FewShotDataModule("photos", shots=2, batch_size=4)
    if adapter is not None and closed_form(head(backbone, Task(("a", "b"), ("{}",)))):
        with pytest.raises(UserError, match="takes no gradient step"):
            build(backbone, data, **settings)
        return
    module = build(backbone, data, **settings)
    fit(module, data, make_trainer(max_epochs=1, limit_val_batches=0))
    write_tensors(Path("tuned.safetensors"), packed(module), header_of(module))
    before = labels(module, data)
    assert b"Black cat" in before
    module.detach()
    Path("photos").unlink()

    header = AtomicCheckpoints().load_checkpoint("tuned.safetensors")["kshot"]
    alone = of_run(header, {"dataset": "photos", "eval_batch_size": 128})
    again = build(towers.backbone("clip"), alone, **settings)
    assert labels(again, alone, Path("tuned.safetensors")) == before


@pytest.mark.parametrize("method", ["lora", "coop", "tip_adapter_f", "zero_shot"])
def test_no_image_of_the_data_set_is_opened_or_listed(method, here, heard):
    run = fitted("--config", f"methods/{method}.yaml")
    heard.clear()
    before = predicted(run, "before.csv")
    seen = [(event, path) for event, path in heard if "photos" in Path(path).parts]
    assert seen == [("os.scandir", "photos")], "the names of the class folders"
    last = predicted(run, "last.csv", weights="checkpoints/last.ckpt") if method in ("lora", "coop") else before
    Path("photos").unlink()
    assert predicted(run, "after.csv") == before == last


def test_the_weights_may_lie_elsewhere(run):
    before = predicted(run, "before.csv")
    Path("photos").unlink()
    Path("away").mkdir()
    for file in ("config.yaml", "tuned.safetensors"):
        (run / file).rename(Path("away", file))
    assert predicted(Path("away"), "after.csv") == before


@pytest.mark.parametrize("weights", ["tuned.safetensors", "checkpoints/last.ckpt"])
def test_a_checkpoint_is_read_once(weights, run, monkeypatch):
    read: list[Path] = []
    monkeypatch.setattr("kshot.checkpoint.check_seal", lambda file: read.append(file) or check_seal(file))
    predicted(run, "out.csv", weights=weights)
    assert read == [run / weights]


def test_a_file_to_resume_from_is_read_once(run, monkeypatch):
    read: list[Path] = []
    monkeypatch.setattr("kshot.checkpoint.check_seal", lambda file: read.append(file) or check_seal(file))
    main(["fit", "--resume", str(run), "--trainer.max_epochs", "3"])
    assert read == [run / "checkpoints" / "last.ckpt"]


@pytest.mark.parametrize("depth", [0, 1])
def test_other_class_folders_are_pointed_out_and_the_run_keeps_its_names(depth, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    save_image(tmp_path / "new" / "1.png")
    classes = parted_folder(tmp_path / "photos", {"cat": 3, "dog": 3}) if depth else None
    if not depth:
        image_folder(tmp_path / "photos", {"cat": 10, "dog": 10})
    run = fitted()
    before = predicted(run, "before.csv")
    assert "has changed" not in capsys.readouterr().err
    where = tmp_path / "photos" / "train" if depth else tmp_path / "photos"
    (where / "cat").rename(where / "zebra")
    assert predicted(run, "after.csv") == before
    at = "train/" if depth else ""
    said = f"photos has changed since the run was trained: '{at}cat' went and '{at}zebra' came. Predicted are"
    assert f"{said} the classes of the run: 'cat', 'dog'." in capsys.readouterr().err
    assert classes is None or classes.is_dir()


def test_other_names_of_the_same_folders_are_pointed_out(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    image_folder(tmp_path / "photos", {"a": 10, "b": 10})
    save_image(tmp_path / "new" / "1.png")
    run = fitted("--data.class_names", "{a: cat, b: dog}")
    before = predicted(run, "before.csv")
    assert b"cat" in before
    assert "has changed" not in capsys.readouterr().err
    run.joinpath("config.yaml").write_text(
        run.joinpath("config.yaml").read_text().replace("class_names:\n      a: cat\n      b: dog", "class_names: null")
    )
    (tmp_path / "photos" / "classes.yaml").write_text("{a: tiger, b: dog}")
    assert predicted(run, "after.csv") == before
    assert "its classes are 'tiger', 'dog'. Predicted are" in capsys.readouterr().err


def test_another_order_in_a_list_is_pointed_out(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    image_folder(tmp_path / "images", {"a": 10, "b": 10})
    save_image(tmp_path / "new" / "1.png")
    rows = [f"images/{name}/{i:02}.png,{label},{name}" for label, name in enumerate("ab") for i in range(10)]
    (tmp_path / "list.csv").write_text("\n".join(["path,label,class_name", *rows]))
    run = fitted("--data.dataset", "list.csv")
    before = predicted(run, "before.csv")
    assert "has changed" not in capsys.readouterr().err
    exchanged = [f"{path},{1 - int(label)},{name}" for path, label, name in (row.split(",") for row in rows)]
    (tmp_path / "list.csv").write_text("\n".join(["path,label,class_name", *exchanged]))
    assert predicted(run, "after.csv") == before
    assert "list.csv has changed since the run was trained: its classes are 'b', 'a'." in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (
            ["--data.class_names", "[x, y, z]"],
            "data.class_names says other than the checkpoint, which was trained with",
        ),
        (["--data.class_names", "{002.dog: wolf}"], "data.class_names says other than the checkpoint"),
        (["--data.template", "a scan of {}."], "data.template says other than the checkpoint"),
    ],
)
def test_other_names_and_sentences_are_refused(options, expected, run, capsys):
    assert expected in refused(capsys, ["predict", "--run", str(run), "--images", "new", *options])


def test_base_to_new_predicts_the_classes_that_it_was_trained_on(here):
    names = ["--data.class_names", "[cat, dog, lion]", "--data.protocol", "base-to-new"]
    run = fitted(*names)
    Path("photos").unlink()
    header = predicted(run, "out.csv").splitlines()
    assert b"label_3" not in header[0]
    assert b"lion" not in b"".join(header)


def test_weights_in_a_file_that_is_gone_get_one_line(run, here, capsys):
    shutil.copytree(run, run.parents[1] / "whole" / "001")
    config = run / "config.yaml"
    config.write_text(config.read_text().replace(str(towers.folder_of("clip")), str(here / "gone")))
    line = refused(capsys, ["predict", "--run", str(run), "--images", "new"])
    assert str(here / "gone") in line
    assert "--model.backbone.model PATH" in line
    before = predicted(run, "after.csv", "--model.backbone.model", str(towers.folder_of("clip")))
    assert before == predicted(run.parents[1] / "whole" / "001", "before.csv")


def deep(path: Path, top: int, seed: int) -> None:
    """Writes a scan of 16 bits with values up to ``top``."""
    path.parent.mkdir(parents=True, exist_ok=True)
    values = np.random.default_rng(seed).integers(0, top + 1, (20, 24), dtype=np.uint16)
    values[0, 0] = top
    Image.fromarray(values).save(path)


def test_deep_images_have_the_white_of_training(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for c, name in enumerate(("cat", "dog")):
        for i in range(10):
            deep(tmp_path / "scans" / name / f"{i}.png", 4000, 10 * c + i)
    deep(tmp_path / "new" / "1.png", 900, 99)  # which alone would tell of 10 bits
    run = fitted("--data.dataset", "scans", test="true")
    assert json.loads((run / "result.json").read_text())["split"]["white"] == 4095
    before = predicted(run, "before.csv")
    for part in ("cat", "dog"):
        for file in (tmp_path / "scans" / part).iterdir():
            file.unlink()
    assert predicted(run, "after.csv") == before
    assert predicted(run, "other.csv", "--data.white", "1023") != before


def test_another_data_set_of_the_same_classes_is_tested_with_the_white_of_training(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for c, name in enumerate(("cat", "dog")):
        for i in range(10):
            deep(tmp_path / "scans" / name / f"{i}.png", 4000, 10 * c + i)
            deep(tmp_path / "other" / name / f"{i}.png", 900, 50 + 10 * c + i)
    run = fitted("--data.dataset", "scans")
    test = ["test", "--config", str(run / "config.yaml"), "--ckpt_path", str(run / "tuned.safetensors")]
    for name, options in {"asked": ["--data.white", "4095"], "kept": [], "less": ["--data.white", "1023"]}.items():
        main([*test, "--data.dataset", "other", "--run.name", name, *options])
    found = [json.loads(Path("runs", n, "001", "result.json").read_text()) for n in ("asked", "kept", "less")]
    assert [each["split"]["white"] for each in found] == [4095, 4095, 1023]
    assert found[0]["ece"] == found[1]["ece"] != found[2]["ece"]
