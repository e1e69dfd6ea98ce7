"""kshot from Python: the same as the command line, from whatever images, in threads, and leaving nothing behind."""

import csv
import doctest
import json
import logging
import os
import random
import shutil
import signal
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from command_line import photos, predict
from PIL import Image

import kshot
from kshot import api, config
from kshot.backbones import Preprocessing
from kshot.cli import main
from kshot.data.transforms import evaluation_view
from kshot.errors import UserError

QUICK = {"run.calibrate": False, "data.views": 1, "trainer.limit_test_batches": 1, "data.eval_batch_size": 16}
LORA = QUICK | {"trainer.max_epochs": 1, "model.adapter.rank": 2}


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("api")


@pytest.fixture
def here(place, monkeypatch) -> Path:
    monkeypatch.chdir(place)
    return place


@pytest.fixture(scope="module")
def run(place) -> kshot.Run:
    """A run of LoRA, by the API."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        made = kshot.fit("clip_16shot.yaml", shots=2, progress=False, options=LORA)
    return kshot.load(place / made.directory)


@pytest.fixture(scope="module")
def folder(place) -> Path:
    return photos(place / "photos", 7)


def state() -> dict:
    """What a process has for itself."""
    return {
        "python": random.getstate(),
        "numpy": str(np.random.get_state()),  # noqa: NPY002
        "torch": torch.random.get_rng_state().tolist(),
        "environment": dict(os.environ),
        "argv": list(sys.argv),
        "warnings": list(warnings.filters),
        "loggers": [(n, logging.getLogger(n).level) for n in ("", "kshot", "lightning.pytorch", "lightning.fabric")],
        "handlers": [list(logging.getLogger(n).handlers) for n in ("", "kshot")],
        "signals": [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)],
        "path": list(sys.path),
        "directory": Path.cwd(),
    }


def test_the_example_of_a_user_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    file = Path(__file__).with_name("user_example.py")
    exec(compile(file.read_text(), str(file), "exec"), {})


def test_the_examples_of_the_documentation_hold(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    kshot.fit(
        ["clip_16shot.yaml", "methods/class_mean.yaml"],
        shots=2,
        progress=False,
        options=QUICK | {"run.name": "clip_16shot"},
    )
    done = [doctest.testmod(module) for module in (api, config)]
    assert [each.failed for each in done] == [0, 0]
    assert sum(each.attempted for each in done) > 20


def test_python_and_the_command_line_agree(run, here, folder):
    out = here / "agree.csv"
    predict(run.directory, "--images", folder, "--out", out, "--top-k", "3")
    rows = list(csv.DictReader(out.open()))
    found = run.predict(folder, top_k=3)
    assert [row["path"] for row in rows] == [each.path for each in found] == sorted(map(str, folder.rglob("*.png")))
    for row, each in zip(rows, found, strict=True):
        assert [row[f"label_{i}"] for i in (1, 2, 3)] == list(each.labels)
        assert [row[f"probability_{i}"] for i in (1, 2, 3)] == [f"{p:.6f}" for p in each.probabilities]
        assert row["unknown"] == f"{each.unknown:.6f}"


def test_a_fit_writes_what_the_command_line_writes(run, here):
    words = [f"--{name}={json.dumps(value)}" for name, value in LORA.items()]
    main(["fit", "--config", "clip_16shot.yaml", "--data.shots=2", "--trainer.enable_progress_bar=false", *words])
    other = kshot.load("runs/clip_16shot")
    assert other.directory != run.directory
    assert {p.name for p in other.directory.iterdir()} == {p.name for p in run.directory.iterdir()}
    assert (other.directory / "config.yaml").read_text() == (run.directory / "config.yaml").read_text()
    assert other.result["acc"] == run.result["acc"]
    ours, theirs = (each.model.tuned_state() for each in (run, other))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def kinds(file: Path) -> dict:
    """The same image in every way that one can be given."""
    array = np.asarray(Image.open(file).convert("RGB"))
    tensor = torch.from_numpy(array.copy()).movedim(2, 0)
    return {
        "text": str(file),
        "path": file,
        "bytes": file.read_bytes(),
        "Pillow": Image.open(file),
        "array": array,
        "floats": array.astype(np.float64) / 255,
        "tensor": tensor,
        "float tensor": tensor.float() / 255,
        "with opacity": np.concatenate([array, np.full_like(array[..., :1], 255)], -1),
        "not contiguous": np.asfortranarray(array),
    }


def test_an_image_is_the_same_however_it_is_given(run, folder):
    file = sorted(folder.rglob("*.png"))[0]
    given = kinds(file)
    found = run.predict(list(given.values()))
    assert [each.path for each in found] == [str(file), str(file), *map(str, range(2, len(given)))]
    for kind, each in zip(given, found, strict=True):
        assert each[1:] == found[0][1:], kind
    for image in given.values():  # alone
        assert run.predict(image)[0].labels == found[0].labels
    batch = np.stack([given["array"]] * 3)
    assert [each.labels for each in run.predict(batch)] == [found[0].labels] * 3
    pixels = run.pixels(file)
    assert torch.equal(pixels[0], evaluation_view(Image.open(file), Preprocessing(run.model.backbone.image_size)))


def test_grey_and_deep_and_odd_arrays(run):
    grey = np.arange(48 * 64, dtype=np.uint8).reshape(48, 64)
    same = run.predict([grey, grey[..., None], np.stack([grey] * 3, -1), torch.from_numpy(grey), grey / 255.0])
    assert len({each[1:] for each in same}) == 1
    assert run.predict(grey > 99)[0].labels
    deep = kshot.load(run.directory, data__white=4095)
    bright = (grey.astype(np.uint16) * 16).clip(max=4095)
    assert deep.predict(bright)[0].labels == run.predict(np.rint(bright / 4095 * 255).astype(np.uint8))[0].labels


@pytest.mark.parametrize(
    ("image", "said"),
    [
        (
            np.zeros((3, 32, 32), np.uint8),
            r"an image as \(H, W, 3\), a tensor as \(3, H, W\), and here is \(3, 32, 32\)",
        ),
        (torch.zeros(32, 32, 3), r"a tensor as \(3, H, W\), and here is \(32, 32, 3\)"),
        (np.zeros((0, 4, 3), np.uint8), r"here is \(0, 4, 3\)"),
        (np.full((4, 4, 3), 200.0), r"values in \[0, 1\], and this one has others: divide by 255"),
        (np.full((4, 4, 3), np.nan), r"values in \[0, 1\]"),
        (np.zeros((4, 4, 3), np.int64), "uint8 values, and this one int64"),
        ([7], "int is no image: give paths"),
        ([None], "NoneType is no image"),
    ],
    ids=("channels first", "channels last", "empty", "to 255", "not finite", "int64", "a number", "None"),
)
def test_what_is_no_image_gets_one_line(image, said, run):
    with pytest.raises(UserError, match=said):
        run.predict(image if isinstance(image, list) else [image])


def odd_files(folder: Path) -> dict[str, Path]:
    """Files of odd kinds, all of which show something."""
    noise = np.random.default_rng(3)
    colours = Image.fromarray(noise.integers(0, 256, (48, 64, 3), dtype=np.uint8))
    clear = Image.fromarray(noise.integers(0, 256, (48, 64, 4), dtype=np.uint8), "RGBA")
    exif = Image.Exif()
    exif[0x0112] = 6
    made = {
        "transparent.png": (clear, {}),
        "palette.gif": (colours.quantize(16), {}),
        "palette.png": (clear.quantize(16), {}),
        "cmyk.jpg": (colours.convert("CMYK"), {}),
        "grey with opacity.png": (clear.convert("LA"), {}),
        "one bit.png": (colours.convert("1"), {}),
        "phone.jpg": (colours, {"exif": exif}),
        "long.png": (Image.fromarray(noise.integers(0, 256, (1, 3000, 3), dtype=np.uint8)), {}),
        "jpeg.jfif": (colours, {"format": "JPEG"}),
        "without suffix": (colours, {"format": "JPEG"}),
        "another.txt": (colours, {"format": "PNG"}),
        "sixteen bits.tif": (Image.fromarray(noise.integers(0, 4000, (48, 64), dtype=np.uint16)), {}),
    }
    for name, (image, options) in made.items():
        image.save(folder / name, **options)
    return {name: folder / name for name in made}


def test_odd_files_are_read_alike_from_disk_from_bytes_and_open(run, tmp_path):
    deep = kshot.load(run.directory, data__white=4095)
    files = odd_files(tmp_path)
    ways = {
        "path": list(files.values()),
        "bytes": [file.read_bytes() for file in files.values()],
        "Pillow": [Image.open(file) for file in files.values()],
    }
    found = {way: deep.predict(images) for way, images in ways.items()}
    for way, each in found.items():
        assert [one.error for one in each] == [""] * len(files), way
        assert [one[1:] for one in each] == [one[1:] for one in found["path"]], way
    upright = Image.open(files["phone.jpg"]).transpose(Image.Transpose.ROTATE_270)
    turned, straight = found["path"][list(files).index("phone.jpg")], deep.predict(np.asarray(upright))[0]
    assert turned.labels == straight.labels
    assert turned.probabilities == pytest.approx(straight.probabilities, abs=1e-5)


def test_a_table_has_a_row_an_image(run, folder, monkeypatch):
    found = run.predict([folder, "none.png"], top_k=2)
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "pandas", None)
        with pytest.raises(UserError, match="pip install pandas"):
            found.frame()
    table = found.frame()
    names = ["path", "label_1", "probability_1", "label_2", "probability_2", "unknown", "abstain", "error"]
    assert list(table.columns) == names
    assert list(table["path"]) == [each.path for each in found]
    assert table["probability_2"].tolist()[:-1] == [each.probabilities[1] for each in found[:-1]]
    assert table["label_1"].isna().tolist() == [False] * 7 + [True]


def test_unreadable_images_are_passed_over_and_told(run, folder, tmp_path):
    (tmp_path / "empty.png").touch()
    (tmp_path / "broken.png").write_text("broken")
    good = sorted(folder.rglob("*.png"))[0]
    half = Image.open(good)
    half.save(tmp_path / "half.png")
    (tmp_path / "half.png").write_bytes((tmp_path / "half.png").read_bytes()[:900])
    long = Image.new("RGB", (5000, 1))
    files = [tmp_path / name for name in ("empty.png", "broken.png", "half.png", "none.png")]
    found = run.predict([*files, Image.open(files[2]), long, b"", good])
    said = ["it is empty", "cannot identify", "half.png", "no such image", "cannot read", "4096", "cannot", ""]
    assert [part in each.error for part, each in zip(said, found, strict=True)] == [True] * 8
    assert [each.label == "" for each in found] == [True] * 7 + [False]
    assert np.isnan(found[0].probability)
    with pytest.raises(UserError, match="it is empty"):
        run.features(files)


def test_the_model_gives_the_logits_and_the_features_of_the_answers(run, folder):
    pixels = run.pixels(folder)
    with torch.no_grad():
        logits = run.model(pixels)
        features = run.model.encode_image(pixels)
    assert not run.model.training
    probabilities = run.model.calibration.logits(logits).softmax(-1)
    for row, each in zip(probabilities, run.predict(folder, top_k=1), strict=True):
        assert row.max().item() == pytest.approx(each.probability, abs=1e-6)
        assert run.class_names[row.argmax()] == each.label
    assert torch.allclose(run.features(folder), features, atol=1e-5)
    assert torch.nn.Linear(128, 2)(run.features(folder)).sum().backward() is None, "a probe can learn from them"
    moved = run.model.to(torch.float64)
    assert torch.allclose(moved(pixels).float(), logits, atol=1e-3)
    run.model.to(torch.float32)


def test_threads_share_a_run(run, folder):
    files = sorted(folder.rglob("*.png"))
    alone = [run.predict(file)[0] for file in files]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda file: run.predict(file)[0], files * 4))
    assert [each.labels for each in together] == [each.labels for each in alone] * 4
    for one, other in zip(alone * 4, together, strict=True):
        assert one.probabilities == pytest.approx(other.probabilities, abs=1e-6)


def test_images_are_read_as_they_are_asked_for(run, folder):
    file, taken = sorted(folder.rglob("*.png"))[0], 0

    def endless():
        nonlocal taken
        while True:
            taken += 1
            yield file

    stream = run.stream(endless(), batch_size=4, workers=2)
    for _ in range(6):
        next(stream)
    assert taken <= 4 * 4, "two batches ahead of the second"
    stream.close()


@pytest.mark.parametrize("workers", [0, 1, 5])
@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_neither_workers_nor_batches_change_an_answer(workers, batch_size, run, folder):
    found = run.predict(folder, workers=workers, batch_size=batch_size)
    for each, other in zip(found, run.predict(folder), strict=True):
        assert (each.path, each.labels) == (other.path, other.labels)
        assert each.probabilities == pytest.approx(other.probabilities, abs=1e-5)


def test_nothing_of_the_process_is_changed(here, folder):
    before = state()
    with ThreadPoolExecutor(2) as pool:  # in threads, where no signal is heard
        options = QUICK | {"run.name": "threads"}
        configs = ["clip_16shot.yaml", "methods/class_mean.yaml"]
        runs = list(pool.map(lambda seed: kshot.fit(configs, shots=seed, options=options, progress=False), (1, 2)))
        found = list(pool.map(lambda run: kshot.load(run.directory).predict(folder), runs))
    kshot.fit(configs, shots=1, options=options, progress=False)
    for name, value in state().items():
        assert value == before[name], name
    assert len({run.directory for run in runs}) == 2
    assert [len(each) for each in found] == [7, 7]
    assert runs[0].result["split"]["shots"] == 1


def test_a_run_tells_its_result_and_measures_again(run, here):
    assert run.result["acc"] == json.loads((run.directory / "result.json").read_text())["acc"]
    assert "adapted accuracy" in run.report()
    assert str(run.directory) in run.report().replace("\n", "") or run.directory.name in run.report()
    tested = run.test(**{"trainer__limit_test_batches": 1, "run__root": "tests"})
    assert tested["acc"] == run.result["acc"]
    assert len(list(Path("tests").rglob("result.json"))) == 1


def test_a_run_is_its_directory_alone(run, tmp_path, monkeypatch, folder):
    shutil.copytree(run.directory, tmp_path / "away")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "away" / "result.json").unlink()
    away = kshot.load("away")
    assert away.predict(folder) == run.predict(folder)
    assert away.result == {}
    with pytest.raises(UserError, match="away was not tested"):
        away.report()


def test_mistakes_get_one_line(run, here, tmp_path):
    for what, said in {
        "nowhere": "There is no run nowhere",
        tmp_path: "is no finished run: it has no config.yaml and no tuned.safetensors",
    }.items():
        with pytest.raises(UserError, match=said):
            kshot.load(what)
    with pytest.raises(UserError, match=r"There is no config 'clip_16shoot'.*Did you mean"):
        kshot.fit("clip_16shoot")
    with pytest.raises(UserError, match=r"has no option 'shot'"):
        kshot.fit("clip_16shot.yaml", data__shot=3)
    with pytest.raises(UserError, match="There is no threshold of probability"):
        run.predict([], abstain_error=0.02)
    with pytest.raises(UserError, match="top_k is 0"):
        run.predict([], top_k=0)
    assert run.predict([]) == []
    assert run.features([]).shape == (0, 128)


def test_an_absent_name_is_said_as_python_says_it():
    with pytest.raises(AttributeError, match="'kshot' has no attribute 'fitt'"):
        kshot.fitt  # noqa: B018
    assert {"fit", "load", "methods", "datasets", "UserError"} <= set(dir(kshot))


def test_methods_are_configs_and_say_what_they_are():
    found = kshot.methods()
    assert len(found) > 30
    assert all(text and not text.startswith("#") for text in found.values())
    assert "Hu et al. 2021" in found["methods/lora.yaml"]


def head_run(place: Path, method: str, classes: tuple[str, ...], name: str, **more) -> kshot.Run:
    """A run on some classes of coloured scans."""
    options = QUICK | {"run.name": name, "data.test_share": None, "run.test": False, "data.augment": None} | more
    for i, (colour, value) in enumerate({"red": (220, 30, 30), "green": (30, 220, 30), "blue": (30, 30, 220)}.items()):
        if colour in classes:
            noise = np.random.default_rng(i)
            for number in range(4):
                (place / name / colour).mkdir(parents=True, exist_ok=True)
                pixels = (np.array(value) + noise.integers(-30, 30, (32, 32, 3))).clip(0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(place / name / colour / f"{number}.png")
    return kshot.fit(
        ["clip_16shot.yaml", f"methods/{method}.yaml"], data=place / name, shots=4, progress=False, options=options
    )


@pytest.mark.parametrize("method", ["zero_shot", "class_mean", "class_mean_text", "gda", "ridge", "kernel_ridge"])
def test_a_class_is_added_as_if_it_had_been_there(method, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    whole = head_run(tmp_path, method, ("blue", "green", "red"), "whole")
    part = head_run(tmp_path, method, ("blue", "green"), "part")
    files = sorted((tmp_path / "whole").rglob("*.png"))
    before = {p: p.read_bytes() for p in part.directory.iterdir() if p.is_file()}
    before_added = part.predict(files)
    assert "The class 'red' was added: " in part.add_class("red", tmp_path / "whole" / "red")
    assert {p: p.read_bytes() for p in part.directory.iterdir() if p.is_file()} == before
    assert part.class_names == ("blue", "green", "red") == whole.class_names
    assert "red" not in before_added[-1].labels
    with torch.no_grad():
        logits, expected = (each.model(each.pixels(files)) for each in (part, whole))
    if method not in ("zero_shot", "class_mean_text"):  # the text knows no colours
        assert logits.argmax(-1).tolist() == expected.argmax(-1).tolist() == [0] * 4 + [1] * 4 + [2] * 4
    if method in ("gda", "ridge"):  # the scale depends on which images are held out together, and so on their order
        ours, theirs = ({n: getattr(r.model.classifier, n) for n in ("weight", "bias")} for r in (part, whole))
        assert all(torch.allclose(ours[name], theirs[name], atol=1e-4) for name in ours)
    elif method != "kernel_ridge":
        assert torch.allclose(logits, expected, atol=1e-3)
    with pytest.raises(UserError, match="is 'red', which the run has already"):
        part.add_class("red", files)


def test_a_class_that_cannot_be_added_gets_one_line(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    learnt = head_run(tmp_path, "linear_probe", ("blue", "green"), "learnt", **{"trainer.max_epochs": 1})
    with pytest.raises(UserError, match="LinearProbe cannot take a class more without training: heads that compare"):
        learnt.add_class("cat", np.zeros((32, 32, 3), np.uint8))
    ridge = head_run(tmp_path, "ridge", ("blue", "green"), "part")
    with pytest.raises(UserError, match="no image of the class 'cat'"):
        ridge.add_class("cat", [])
    shutil.rmtree(tmp_path / "part")
    with pytest.raises(UserError, match=r"Ridge takes a class more by its own shots too, and unknown data set"):
        ridge.add_class("cat", np.zeros((32, 32, 3), np.uint8))
    assert ridge.predict(np.zeros((32, 32, 3), np.uint8))[0].labels, "it answers as before"
