"""A run as a page: what stands on it is what the run answered, and it is whole, of one piece and safe."""

import base64
import io
import json
import re
import shutil
from pathlib import Path
from xml.etree import ElementTree

import data_fixtures
import numpy as np
import pytest
import torch
from command_line import WHOLE, fit, photos, refused
from pages import Page
from PIL import Image
from sklearn.decomposition import PCA
from sklearn.manifold import trustworthiness
from sklearn.metrics import confusion_matrix, precision_score

from kshot.cli import main
from kshot.errors import UserError
from kshot.predictions import Answered, read
from kshot.seeing import figures, show
from kshot.seeing.page import Seen, confusions, page
from kshot.seeing.pictures import inlined, laid_out, overlaid
from kshot.seeing.statistics import wilson

CAPTION = re.compile(r"<figcaption>(.*?)<small title=\"(.*?)\">")
QUICKLY = ["--map", "none", "--errors", "3", "--rollout", "0"]


def show_run(run, out, *words):
    with pytest.raises(SystemExit) as end:
        main(["show", str(run), "--out", str(out), *map(str, words)])
    assert end.value.code == 0
    return Page((out / "index.html").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def shown(fitted, tmp_path_factory):
    out = tmp_path_factory.mktemp("shown") / "page"
    return show_run(fitted, out, "--map-images", "60"), out


def test_the_page_is_of_one_piece(shown):
    page, out = shown
    assert sorted(file.name for file in out.iterdir()) == sorted(
        ["index.html", "card.md", "confusion.svg", "reliability.svg", "feature_map.svg", "errors.png", "attention.png"]
    )
    assert page.addresses
    assert all(address.startswith("data:image/") for address in page.addresses)
    assert page.count["h1"] == 1
    assert "script" not in page.count
    for needed in ("width=device-width", "@media print", "prefers-color-scheme:dark", "<!doctype html>"):
        assert needed in page.content
    assert not re.findall(r"https?://(?!www\.w3\.org/2000/svg)", page.content)


def test_its_numbers_are_those_of_the_answers(shown, fitted):
    page, answered, result = shown[0], read(fitted), json.loads((fitted / "result.json").read_text())
    assert page.cells[0] == f"{result['acc']:.1%}"
    low, high = wilson(int(answered.right.sum()), len(answered.label))
    assert f"95 % interval {low:.1%} to {high:.1%}" in page.content
    assert page.cells[1] == f"{result['zero_shot_acc']:.1%}"
    before = answered.zero_shot == answered.label
    won, lost = (answered.right & ~before).sum(), (before & ~answered.right).sum()
    assert f"{won} images right that were wrong, {lost} the other way" in page.content
    precision = precision_score(answered.label, answered.guess, average=None, labels=range(10))
    for label, name in enumerate(answered.class_names):
        mine = answered.label == label
        rows = [page.cells[i : i + 5] for i, cell in enumerate(page.cells) if cell == name]
        expected = [name, str(mine.sum()), f"{answered.right[mine].mean():.1%}"]
        (row,) = [row for row in rows if row[:3] == expected]
        assert row[4] == f"{precision[label]:.1%}"
    wrong = confusion_matrix(answered.label, answered.guess)
    np.fill_diagonal(wrong, 0)
    i, j = np.unravel_index(wrong.argmax(), wrong.shape)
    pair = [answered.class_names[i], answered.class_names[j], f"{wrong[i, j]} of {(answered.label == i).sum()}"]
    assert pair in [page.cells[k : k + 3] for k in range(len(page.cells))]


def test_the_matrix_is_that_of_scikit_learn(shown, fitted):
    answered = read(fitted)
    expected = confusion_matrix(answered.label, answered.guess)
    assert (confusions(answered) == expected).all()
    root = ElementTree.parse(shown[1] / "confusion.svg").getroot()
    told = [re.fullmatch(r"(\w+) taken for (\w+): (\d+) of (\d+)", t.text) for t in root.iter(f"{SVG}title")]
    found, names = np.zeros((10, 10), dtype=int), answered.class_names
    for row, column, count, total in (each.groups() for each in told if each):
        found[names.index(row), names.index(column)] = count
        assert int(total) == (answered.label == names.index(row)).sum()
    assert (found == expected).all()
    frame = next(each for each in root.iter(f"{SVG}rect") if each.get("class") == "line")
    for cell in (each for each in root.iter(f"{SVG}rect") if each.get("class") in ("good", "bad")):
        row, column = re.match(r"(\w+) taken for (\w+)", cell.find(f"{SVG}title").text).groups()
        place = [(float(cell.get(axis)) - float(frame.get(axis))) / 30 for axis in "xy"]
        assert place == pytest.approx([names.index(column), names.index(row)], abs=0.01)


SVG = "{http://www.w3.org/2000/svg}"


def test_the_diagram_has_the_bins_of_the_run(shown, fitted):
    result = json.loads((fitted / "result.json").read_text())["reliability"]["test"]
    root = ElementTree.parse(shown[1] / "reliability.svg").getroot()
    bars = [each for each in root.iter(f"{SVG}rect") if each.get("class") == "good"]
    heights = [float(each.get("height")) / 260 for each in bars]
    assert heights == pytest.approx([each["accuracy"] for each in result], abs=1e-3)
    for bar, each in zip(bars, result, strict=True):
        assert (
            float(bar.get("x")) - 1
            <= 62 + 260 * each["confidence"]
            <= float(bar.get("x")) + float(bar.get("width")) + 1
        )


def test_the_map_has_the_images_and_their_errors(shown, fitted):
    answered = read(fitted)
    rows = np.unique(np.linspace(0, len(answered.label) - 1, 60).round().astype(int))
    root = ElementTree.parse(shown[1] / "feature_map.svg").getroot()
    points = [e for e in root.iter(f"{SVG}circle") if e.find(f"{SVG}title") is not None]
    crosses = list(root.iter(f"{SVG}path"))
    assert len(points) == answered.right[rows].sum()
    assert len(crosses) == (~answered.right[rows]).sum()
    named = sorted(e.find(f"{SVG}title").text for e in points)
    assert named == sorted(answered.class_names[i] for i in answered.label[rows][answered.right[rows]])


def test_the_surest_errors_come_first(shown, fitted):
    answered = read(fitted)
    wrong = np.flatnonzero(~answered.right)
    order = wrong[np.argsort(-answered.probabilities[wrong, 0], kind="stable")][:24]
    said = CAPTION.findall(shown[0].content)
    assert len(said) == 24 + 6
    names, top = answered.class_names, answered.probabilities[:, 0]
    for row, (words, path) in zip(order, said, strict=False):
        label, guess = names[answered.label[row]], names[answered.guess[row]]
        assert words == f"{label}, taken for {guess} ({top[row]:.0%})"
        assert path == answered.path[row]
    assert said[24:] == said[:6], "their attention"
    with Image.open(shown[1] / "errors.png") as sheet:
        assert sheet.format == "PNG"
        assert np.asarray(sheet).std() > 10


def test_own_images_may_be_looked_at(fitted, tmp_path):
    files = sorted(photos(tmp_path / "mine", 2).rglob("*.png"))
    page = show_run(fitted, tmp_path / "page", "--map", "none", "--errors", "0", "--images", *files)
    said = CAPTION.findall(page.content)
    assert [path for _, path in said] == [str(file) for file in files]
    assert all(re.fullmatch(r"\w+ \(\d+%\)", words) for words, _ in said)
    assert not (tmp_path / "page" / "errors.png").exists()


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    """A run on a folder, and the folder."""
    root = tmp_path_factory.mktemp("own")
    scans = data_fixtures.digit_folder(root / "scans", train=4, val=2, test=6)
    words = ["--data.dataset", str(scans), "--data.template", "a photo of the number: {}."]
    return fit(root / "runs", "--config", "methods/zero_shot.yaml", *words, *WHOLE), scans


def moved(own, tmp_path) -> tuple[Path, Path]:
    """A copy of both."""
    run, scans = tmp_path / "run", tmp_path / "scans"
    shutil.copytree(own[0], run)
    shutil.copytree(own[1], scans)
    (run / "config.yaml").write_text((run / "config.yaml").read_text().replace(str(own[1]), str(scans)))
    return run, scans


def test_images_that_changed_since_are_not_shown(own, tmp_path, capsys):
    run, scans = moved(own, tmp_path)
    answered = read(run)
    wrong = np.flatnonzero(~answered.right)
    surest = wrong[answered.probabilities[wrong, 0].argmax()]
    (victim,) = [file for file in scans.rglob("*.png") if file.as_posix().endswith(answered.path[surest])]
    Image.new("RGB", (9, 9)).save(victim)
    page = show_run(run, tmp_path / "page", *QUICKLY)
    assert "1 of 3 images are gone or have changed since" in capsys.readouterr().err
    assert "gone or have changed since, and are not shown." in page.content
    assert answered.path[surest] not in page.content


def test_without_the_data_set_a_page_has_its_numbers(own, tmp_path, capsys):
    run, scans = moved(own, tmp_path)
    shutil.rmtree(scans)
    page = show_run(run, tmp_path / "page", *QUICKLY)
    assert "Without pictures of the test images:" in capsys.readouterr().err
    assert f"{read(run).right.mean():.1%}" in page.cells
    assert page.addresses == []
    at = tmp_path / "elsewhere"
    shutil.copytree(own[1], at)
    assert show_run(run, tmp_path / "again", *QUICKLY, "--data.dataset", at).addresses


def test_a_run_of_test_is_shown_by_what_it_measured(own, tmp_path, capsys):
    config, weights = str(own[0] / "config.yaml"), str(own[0] / "tuned.safetensors")
    main(["test", "--config", config, "--ckpt_path", weights, "--run.root", str(tmp_path / "tests")])
    (tested,) = (tmp_path / "tests").glob("*/*")
    capsys.readouterr()
    page = show_run(tested, tmp_path / "page", "--map", "none", "--errors", "2", "--rollout", "1")
    assert capsys.readouterr().err == ""
    assert len(page.addresses) == 3


def test_without_the_backbone_a_page_has_its_pictures(own, tmp_path, monkeypatch, capsys):
    def gone(*_):
        raise UserError("the weights are gone")

    monkeypatch.setattr(show, "open_run", gone)
    page = show_run(own[0], tmp_path / "page", "--errors", "3")
    assert "Without attention and features: the weights are gone" in capsys.readouterr().err
    assert len(page.addresses) == 3


def test_what_cannot_be_rolled_out_is_said(own, tmp_path, monkeypatch, capsys):
    def refuse(*_):
        raise UserError("it pools by map")

    monkeypatch.setattr(show, "rollout", refuse)
    show_run(own[0], tmp_path / "page", "--map", "pca", "--errors", "2")
    assert "Without attention: it pools by map" in capsys.readouterr().err
    assert not (tmp_path / "page" / "attention.png").exists()
    assert "principal components" in (tmp_path / "page" / "index.html").read_text()


def test_nothing_is_overwritten_and_nothing_half_is_left(own, tmp_path, monkeypatch, capsys):
    there = tmp_path / "there"
    there.mkdir()
    assert "is there already, and stays as it is" in refused(capsys, ["show", str(own[0]), "--out", str(there)])
    (tmp_path / "file").write_text("")
    assert "cannot be made" in refused(capsys, ["show", str(own[0]), "--out", str(tmp_path / "file" / "page")])
    assert "is no finished run" in refused(capsys, ["show", str(tmp_path)])
    assert "was not tested on 'x'" in refused(capsys, ["show", str(own[0]), "--test-set", "x"])
    monkeypatch.setattr(show, "page", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        main(["show", str(own[0]), "--out", str(tmp_path / "new"), *QUICKLY])
    assert sorted(each.name for each in tmp_path.iterdir()) == ["file", "there"]


def answered_by(guess, label, names):
    count = len(label)
    each = np.asarray(guess)[:, None]
    paths = [f"<img src=x onerror=alert(1)>{i}.png" for i in range(count)]
    zeros = np.ones((count, 1), dtype=np.float32)
    return Answered("test", names, paths, [""] * count, np.arange(count), np.asarray(label), each, zeros, None)


def test_no_name_becomes_markup():
    names = ["<script>alert(1)</script>", 'a"b&c']
    answered = answered_by([1, 1, 0], [0, 1, 0], names)
    result = {"method": "<b>M</b>", "dataset": "<i>", "backbone": "<u>", "protocol": "<p>", "split": {"shots": 2}}
    seen = Seen(*figures.confusion(confusions(answered), names))
    seen.feature_map = figures.feature_map(np.eye(3, 2), answered.label, answered.right, names)
    seen.errors, seen.notes = [("data:image/png;base64,", False, names[0], answered.path[0])], ["<script>"]
    found = Page(page(result, answered, seen))
    assert {"script", "b", "i", "u"} & (found.count.keys() - {"b"}) == set()
    assert "<script>alert(1)</script>" in found.words
    ElementTree.fromstring(figures.file_of(seen.confusion))


def test_of_many_classes_those_with_errors_are_drawn_and_it_is_said():
    label = np.arange(200).repeat(3)
    guess = label.copy()
    guess[(label >= 100) & (label < 130)] += 1
    answered = answered_by(guess, label, [f"class {i}" for i in range(200)])
    drawn, note = figures.confusion(confusions(answered), answered.class_names)
    assert note == "Of 200 classes, the 60 with the most errors."
    shown = {int(i) for i in re.findall(r">class (\d+)</text>", drawn)}
    assert len(shown) == 60
    assert set(range(100, 131)) <= shown
    content = page({"method": "M", "dataset": "d", "backbone": "b", "protocol": "p"}, answered, Seen(drawn))
    assert "All 200 classes" in content
    assert "<details>" in content


class TestLayout:
    @pytest.fixture
    def features(self):
        generator = torch.Generator().manual_seed(0)
        centres = torch.randn(3, 16, generator=generator)
        return torch.nn.functional.normalize(
            centres.repeat_interleave(30, 0) + 0.4 * torch.randn(90, 16, generator=generator), dim=-1
        )

    def test_pca_is_that_of_scikit_learn(self, features):
        found = laid_out(features, "pca")
        expected = PCA(2).fit_transform(features.double().numpy())
        expected = (expected - expected.min(0)) / np.ptp(expected, axis=0)
        for axis in range(2):
            mine, theirs = found[:, axis], expected[:, axis]
            assert min(abs(mine - theirs).max(), abs(mine - (1 - theirs)).max()) < 1e-6

    def test_tsne_keeps_neighbours_and_is_the_same_each_time(self, features):
        found = laid_out(features, "tsne")
        assert trustworthiness(features.numpy(), found, n_neighbors=5) > 0.9
        assert (found == laid_out(features, "tsne")).all()
        assert found.min() == 0
        assert found.max() == 1

    def test_features_of_one_number_lie_on_a_line(self):
        found = laid_out(torch.tensor([[0.0], [1.0], [2.0]]), "pca")
        assert sorted(found[:, 0]) == pytest.approx([0, 0.5, 1])
        assert (found[:, 1] == 0).all()


def test_attention_is_drawn_where_it_is():
    seen, reach = torch.full((3, 40, 40), 128, dtype=torch.uint8), torch.zeros(4, 4)
    reach[0, 3] = 1
    drawn = np.asarray(overlaid(seen, reach)).astype(int)
    assert drawn.shape == (40, 80, 3)
    assert (drawn[:, :40] == 128).all()
    redness = drawn[:, 40:, 0] - drawn[:, 40:, 2]
    assert np.unravel_index(redness.argmax(), redness.shape)[0] < 10
    assert np.unravel_index(redness.argmax(), redness.shape)[1] >= 30
    assert redness[30:, :10].max() == 0
    assert np.asarray(overlaid(seen, torch.ones(4, 4)))[:, 40:].std() == 0, "an even one is grey"


@pytest.mark.parametrize(("size", "expected"), [((8, 8), (8, 8)), ((400, 800), (100, 200)), ((50, 5000), (50, 5000))])
def test_pictures_are_made_small(size, expected):
    kind, _, content = inlined(Image.new("RGB", size), 100).partition(";base64,")
    assert kind == ("data:image/png" if min(expected) <= 64 else "data:image/jpeg")
    with Image.open(io.BytesIO(base64.b64decode(content))) as image:
        assert image.size == expected
