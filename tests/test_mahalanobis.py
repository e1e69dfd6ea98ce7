"""How near images lie to the shots: against scikit-learn and scipy in float64, through folds, files and predictions."""

import csv
import json
from functools import partial
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import test_folds
import torch
import torch.nn.functional as F
from command_line import photos, predict, refused, run_test
from data_fixtures import digit_folder
from safetensors.torch import load_file
from scipy.spatial.distance import cdist
from sklearn.covariance import EmpiricalCovariance, shrunk_covariance

from kshot import mahalanobis as at_hand
from kshot.adapters import LoRA
from kshot.calibration import RATES, Calibration, calibrate
from kshot.checkpoint import AtomicCheckpoints, packed, read_tensors, round_trip, unpacked, write_tensors
from kshot.classifiers import GDA, VPT, LinearProbe, ProLIP, TextPrompt
from kshot.cli import main
from kshot.data import FewShotDataModule
from kshot.errors import UserError
from kshot.folds import HeldOut, joined, stratified_folds, twin_of
from kshot.forecast import ahead, look_around
from kshot.mahalanobis import DIRECTIONS, PREFIX, mahalanobis, stated, stored_mahalanobis
from kshot.optim import AdamW
from kshot.run import fit, make_trainer

FIT = ["fit", "--config", "clip_16shot.yaml"]
QUICK = ["--trainer.enable_progress_bar", "false", "--trainer.limit_test_batches", "1", "--data.views", "1"]


def drawn(classes, each, width, seed=0):
    """Features of classes whose images vary more in some directions, and their labels."""
    chance = torch.Generator().manual_seed(seed)
    label = torch.arange(classes).repeat_interleave(each)
    scale = torch.linspace(2, 0.2, width)
    spread = scale * torch.randn(len(label), width, generator=chance)
    return 3 + torch.randn(classes, width, generator=chance)[label] + spread, label


def reference(features, label, queries):
    """Negative squared distances by the libraries' covariance, shrinkage and distance."""
    x, y = (F.normalize(each.double(), dim=-1).numpy() for each in (features, queries))
    label = label.numpy()
    there = np.unique(label)
    mean = np.stack([x[label == c].mean(0) for c in there])
    free, width = len(x) - len(there), x.shape[1]
    apart = x - mean[np.searchsorted(there, label)]
    within = EmpiricalCovariance(assume_centered=True).fit(apart).covariance_ * len(x) / free
    values, vectors = np.linalg.eigh(shrunk_covariance(within, width / (free + width)))
    rest = width - max(DIRECTIONS, len(there))
    if rest > 0:
        values[:rest] = values[:rest].mean()
    precision = vectors / values @ vectors.T
    return -(cdist(y, mean, "mahalanobis", VI=precision).min(1) ** 2)


@pytest.mark.parametrize(
    ("classes", "each", "width"),
    [(5, 4, 40), (5, 16, 40), (3, 2, 8), (40, 2, 60), (6, 16, 80), (6, 16, 200), (70, 3, 100)],
    ids=["few", "many", "tiny", "narrow", "more than 64", "wide", "many classes"],
)
def test_distances_are_those_of_the_libraries(classes, each, width):
    features, label = drawn(classes, each, width)
    queries = torch.cat([features[:7], drawn(classes, 2, width, seed=1)[0], torch.randn(5, width)])
    found = mahalanobis(features, label)
    np.testing.assert_allclose(found.score(queries).numpy(), reference(features, label, queries), rtol=2e-4)
    assert all(tensor.dtype == torch.float32 for tensor in found)
    assert len(found.basis) <= min(len(label) - classes, max(DIRECTIONS, classes), width - 1)
    torch.testing.assert_close(found.basis @ found.basis.T, torch.eye(len(found.basis)), rtol=0, atol=1e-4)


def test_classes_without_shots_have_no_mean():
    features, label = drawn(5, 6, 20)
    gaps = torch.tensor([1, 2, 5, 8, 9])[label]
    found = mahalanobis(features, gaps)
    assert len(found.mean) == 5
    assert torch.equal(found.score(features), mahalanobis(features, label).score(features))


def test_without_two_images_of_a_class_that_differ_the_covariance_is_the_identity():
    features, label = drawn(6, 1, 12)
    queries = drawn(6, 3, 12, seed=2)[0]
    expected = -(cdist(*(F.normalize(each.double(), dim=-1).numpy() for each in (queries, features))).min(1) ** 2)
    for repeats in (1, 3):  # the same image again says nothing either
        found = mahalanobis(features.repeat(repeats, 1), label.repeat(repeats))
        np.testing.assert_allclose(found.score(queries).numpy(), expected, rtol=1e-4)


@pytest.mark.parametrize("width", [30, 130], ids=["by directions", "by images"])
def test_many_images_are_taken_in_parts(width, monkeypatch):
    features, label = drawn(10, 12, width)
    whole = mahalanobis(features, label).score(features)
    monkeypatch.setattr(at_hand, "AT_ONCE", 7)
    torch.testing.assert_close(mahalanobis(features, label).score(features), whole, rtol=1e-5, atol=0)


def test_a_run_in_low_precision_measures_in_float32():
    features, label = drawn(5, 8, 40)
    found = mahalanobis(features, label)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(found.score(features), found.score(features.double()), rtol=1e-6, atol=0)
        assert found.score(features.bfloat16()).dtype == torch.float32


def test_the_size_of_a_feature_says_nothing():
    features, label = drawn(5, 8, 40)
    size = torch.rand(len(label), 1) + 0.5
    expected = mahalanobis(features, label).score(features)
    torch.testing.assert_close(mahalanobis(features * size, label).score(features), expected, rtol=1e-4, atol=0)


def test_features_that_are_not_finite_are_refused():
    features, label = drawn(3, 4, 10)
    features[2, 3] = torch.inf
    with pytest.raises(UserError, match="not finite"):
        mahalanobis(features, label)


class TestThresholds:
    def test_looser_rates_answer_more_and_lower(self):
        """Wrong answers lie further off, by a noise that lets every rate be met somewhere."""
        chance = torch.Generator().manual_seed(3)
        label = torch.randint(4, (600,), generator=chance)
        wrong = torch.rand(600, generator=chance) < 0.3
        logits = 5 * F.one_hot(torch.where(wrong, (label + 1) % 4, label), 4).double()
        far = 10 + 20 * wrong + 8 * torch.randn(600, generator=chance, dtype=torch.float64)
        far[::50] = torch.nan
        found = calibrate(logits, label, 3.0, 4, -far).abstain["mahalanobis"]
        assert list(found) == [f"{rate:g}" for rate in RATES]
        cells = list(found.values())
        assert all(a["threshold"] > b["threshold"] for a, b in pairwise(cells))
        assert all(a["answered"] < b["answered"] for a, b in pairwise(cells))
        for rate, cell in found.items():
            answered = -far >= cell["threshold"] - 1e-6
            assert float(answered.sum()) == pytest.approx(cell["answered"] * 588, abs=0.1)
            assert float(wrong[answered].double().mean()) <= float(rate)

    def test_nothing_measured_gives_none_and_says_so(self):
        logits, label = torch.eye(4).double(), torch.arange(4)
        assert "mahalanobis" not in calibrate(logits, label, 3.0, 4).abstain
        none = calibrate(logits, label, 3.0, 4, torch.full((4,), torch.nan))
        with pytest.raises(UserError, match=r"no threshold of mahalanobis .*: 4 held-out shots show no rate up to 0.2"):
            none.threshold("mahalanobis", 0.05)
        with pytest.raises(UserError, match="not calibrated"):
            Calibration().threshold("mahalanobis", 0.05)

    def test_lots_of_images_are_joined(self):
        lots = [
            HeldOut(torch.zeros(2, 3), torch.zeros(2), torch.arange(2), 2.0, 4.0, 1, near)
            for near in (torch.tensor([1.0, 2.0]), torch.tensor([3.0, 4.0]), None)
        ]
        assert joined(*lots[:2]).mahalanobis.tolist() == [1, 2, 3, 4]
        assert joined(*lots[1:]).mahalanobis is None


@pytest.fixture
def shots():
    """Four scans of each digit."""
    return FewShotDataModule("digits", shots=4, augment=None, batch_size=16)


def judged_by(backbone, data, **settings):
    """A judge, a module that has learnt nothing, and the shots as evaluation sees them."""
    judge, module = test_folds.judged_by(backbone, data, **settings)
    data.open_judged()
    return judge, module, data.part("judged").images([(i, 0) for i in range(40)])


def near(features, label, held):
    """What libraries say of held-out images by the others."""
    return reference(features[~held], label[~held], features[held])


class TestOutOfFold:
    @pytest.mark.parametrize("head", [GDA, LinearProbe], ids=["closed form", "steps"])
    def test_a_frozen_tower_is_measured_as_it_is(self, head, backbone, shots):
        judge, module, images = judged_by(backbone, shots, classifier=head)
        fold = stratified_folds(judge.label, 4, seed=1)
        found = judge.out_of_fold(module, fold, range(2))
        with torch.no_grad():
            features = backbone.encode_image(images)
        for number in range(2):
            held = fold == number
            where = torch.isin(found.index, held.nonzero()[:, 0])
            np.testing.assert_allclose(found.mahalanobis[where], near(features, judge.label, held), rtol=1e-3)
        assert set(ahead(found).abstain) == {"probability", "energy", "mahalanobis"}

    def test_features_before_the_projection_where_the_classifier_takes_these(self, backbone, shots):
        judge, module, images = judged_by(backbone, shots, classifier=ProLIP)
        fold = stratified_folds(judge.label, 4, seed=1)
        found = judge.out_of_fold(module, fold, range(1))
        with torch.no_grad():
            features = backbone.encode_image(images, (), True)
        assert features.shape[1] != backbone.feature_dim
        np.testing.assert_allclose(found.mahalanobis, near(features, judge.label, fold == 0), rtol=1e-3)

    def test_what_learns_nothing_is_measured_on_folds(self, backbone, shots):
        judge, module, images = judged_by(backbone, shots, classifier=TextPrompt)
        fold = stratified_folds(judge.label, 4, seed=1)
        found = judge.out_of_fold(module, fold, range(2))
        with torch.no_grad():
            features = backbone.encode_image(images)
        assert (found.folds, len(found.label)) == (0, 40)
        assert torch.equal(found.mahalanobis.isnan(), fold > 1)
        np.testing.assert_allclose(found.mahalanobis[fold == 0], near(features, judge.label, fold == 0), rtol=1e-3)
        assert ahead(found).held_out == 40

    @pytest.mark.parametrize(
        "method",
        [{"adapter": LoRA(rank=2), "targets": ["image.*.[qv]"]}, {"classifier": partial(VPT, prompt_length=2)}],
        ids=["LoRA", "VPT"],
    )
    def test_a_tuned_tower_is_measured_by_its_own_features(self, method, backbone, shots, monkeypatch):
        judge, module, images = judged_by(backbone, shots, optimizer=partial(AdamW, lr=0.02), **method)
        fold, fits = stratified_folds(judge.label, 4, seed=1), []
        monkeypatch.setattr("kshot.folds.fit", lambda *run, **given: fits.append(run) or fit(*run, **given))
        found, held = judge.out_of_fold(module, fold, range(1)), fold == 0
        assert len(fits) == 1
        twin = twin_of(module)
        fit(twin, shots.fold((~held).nonzero()[:, 0].tolist()), make_trainer(max_epochs=1, limit_val_batches=0))
        with torch.no_grad():
            tuned, untouched = twin.eval().encode_image(images), backbone.encode_image(images)
        np.testing.assert_allclose(found.mahalanobis, near(tuned, judge.label, held), rtol=2e-3)
        assert not np.allclose(found.mahalanobis, near(untouched, judge.label, held), rtol=0.02)
        fit(module, shots, judge.trainer)
        around = look_around(module, shots, judge.trainer)
        with torch.no_grad():
            own = module.eval().encode_image(images)
        np.testing.assert_allclose(around.score(own), reference(own, judge.label, own), rtol=2e-3)
        assert not np.allclose(around.score(own), reference(untouched, judge.label, own), rtol=0.02)

    def test_it_is_found_once_for_all_answers_on_the_same_features(self, backbone, shots, monkeypatch):
        judge, module, _ = judged_by(backbone, shots, classifier=GDA)
        found = []
        monkeypatch.setattr("kshot.folds.mahalanobis", lambda *given: found.append(given) or mahalanobis(*given))
        for _ in range(3):
            judge.out_of_fold(module, stratified_folds(judge.label, 4, 1), range(4))
        assert len(found) == 4


def refit(folder: Path, *options: str) -> Path:
    """A run of GDA on four shots a digit."""
    main([*FIT, "--config", "methods/gda.yaml", "--data.shots", "4", *QUICK, "--run.root", str(folder), *options])
    (directory,) = folder.glob("*/*")
    return directory


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    return refit(tmp_path_factory.mktemp("near"))


def predicted(run: Path, folder: Path, *options: str, by: str = "mahalanobis") -> list[str]:
    return ["predict", "--run", str(run), "--images", str(folder), "--abstain-by", by, *options]


class TestFiles:
    def test_predictions_abstain_by_what_the_file_holds(self, run, backbone, tmp_path, capsys):
        folder, away = photos(tmp_path / "photos"), tmp_path / "away"
        away.mkdir()
        for name in ("config.yaml", "tuned.safetensors"):
            (away / name).write_bytes((run / name).read_bytes())
        digit_folder(folder / "scans", train=3)
        tensors, header = read_tensors(away / "tuned.safetensors")
        rate, cell = next(iter(header["calibration"]["abstain"]["mahalanobis"].items()))
        predict(*predicted(away, folder, "--abstain-error", rate, "--out", str(tmp_path / "out.csv"))[2:])
        rows = {row["path"]: row["abstain"] for row in csv.DictReader((tmp_path / "out.csv").open())}

        data = FewShotDataModule("digits", shots=1)
        data.use_preprocessing(backbone.preprocessing)
        data.images = [str(folder)]
        data.setup("predict")
        (batch,) = data.predict_dataloader()
        with torch.no_grad():
            scores = stored_mahalanobis(tensors, 10).score(backbone.encode_image(batch.image))
        expected = ["yes" if score < cell["threshold"] else "" for score in scores.tolist()]
        assert rows == dict(zip(data.predict_paths, expected, strict=True))
        assert set(expected) == {"yes", ""}
        assert capsys.readouterr().out.count(f", of which {expected.count('yes')} are marked") == 1

    def test_a_prediction_gives_the_score_of_each_image(self, backbone, shots):
        judge, module, images = judged_by(backbone, shots, adapter=LoRA(rank=2), targets=["image.*.q"])
        shots.setup("test")
        quiet = make_trainer(limit_predict_batches=1)
        loader = shots.test_dataloader()
        without = quiet.predict(module, loader)[0]
        assert without[3].isnan().all()
        assert without[3].shape == without[2].shape
        module.mahalanobis = judge.mahalanobis()
        batch = next(iter(loader))
        with torch.no_grad():
            features = module.eval().encode_image(batch.image)
            own = module.encode_image(images)
        _, probabilities, energy, score = make_trainer(limit_predict_batches=1).predict(module, loader)[0]
        assert torch.equal(probabilities, without[1])
        assert torch.equal(energy, without[2])
        np.testing.assert_allclose(score, reference(own, judge.label, features), rtol=1e-2)

    def test_the_file_is_small_and_measures_as_it_did(self, run, tmp_path):
        tensors = load_file(run / "tuned.safetensors")
        own = {name: tensor for name, tensor in tensors.items() if name.startswith(PREFIX)}
        assert {name.removeprefix(PREFIX): tensor.shape[0] for name, tensor in own.items()} == {
            **{"mean": 10, "basis": 30, "deviation": 31},
        }
        ours, theirs = json.loads((run / "result.json").read_text()), run_test(run, tmp_path)
        assert ours["acc"] == theirs["acc"]
        assert ours["calibration"] == theirs["calibration"]

    def test_a_file_from_before_is_tested_and_says_what_it_does_not_hold(self, run, tmp_path, capsys):
        tensors, header = read_tensors(run / "tuned.safetensors")
        old = tmp_path / "old"
        old.mkdir()
        (old / "config.yaml").write_bytes((run / "config.yaml").read_bytes())
        del header["calibration"]["abstain"]["mahalanobis"]
        kept = {name: tensor for name, tensor in tensors.items() if not name.startswith(PREFIX)}
        write_tensors(old / "tuned.safetensors", kept, header)
        assert run_test(old, tmp_path / "runs")["acc"] == json.loads((run / "result.json").read_text())["acc"]
        folder = photos(tmp_path / "photos", 2)
        line = refused(capsys, predicted(old, folder, "--abstain-error", "0.2"))
        assert "Nothing tells where the shots lie" in line
        out = str(tmp_path / "out.csv")
        predict(*predicted(old, folder, "--abstain-error", "0.2", "--out", out, by="probability")[2:])

    def test_a_rate_that_was_not_found_is_refused_in_one_line(self, run, tmp_path, capsys):
        line = refused(capsys, predicted(run, photos(tmp_path / "photos", 1), "--abstain-error", "1e-5"))
        assert "There is no threshold of mahalanobis for an error rate of 1e-05: the least is" in line

    def test_a_run_that_is_not_calibrated_keeps_nothing(self, tmp_path):
        tensors = load_file(refit(tmp_path, "--run.calibrate", "false", "--run.test", "false") / "tuned.safetensors")
        assert not [name for name in tensors if name.startswith(PREFIX)]

    def test_a_chosen_method_keeps_it_too(self, tmp_path):
        words = ["--config methods/ridge.yaml", "--config methods/gda.yaml"]
        choice = ["--budget", "60s", "--candidates", json.dumps(words), "--run.root", str(tmp_path)]
        main([*FIT, *choice, "--data.shots", "4", *QUICK, "--run.test", "false"])
        (file,) = tmp_path.rglob("tuned.safetensors")
        tensors, header = read_tensors(file)
        assert stored_mahalanobis(tensors, 10) is not None
        assert header["calibration"]["abstain"]["mahalanobis"]

    def test_a_module_takes_it_from_its_file_and_gives_it_back(self, backbone, shots, tmp_path):
        judge, module, _ = judged_by(backbone, shots, adapter=LoRA(rank=2), targets=["image.*.q"])
        module.mahalanobis = judge.mahalanobis()
        assert not [name for name in module.tuned_state() if name.startswith(PREFIX)]
        assert unpacked(packed(module), module).keys() == module.tuned_state().keys()
        assert not round_trip(module)
        write_tensors(tmp_path / "tuned.safetensors", packed(module), {})
        read = AtomicCheckpoints().load_checkpoint(tmp_path / "tuned.safetensors")["state_dict"]
        again = stored_mahalanobis(read, 10)
        assert all(torch.equal(a, b) for a, b in zip(again, module.mahalanobis, strict=True))


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("mean", lambda t: None),
        ("other", lambda t: torch.zeros(3)),
        ("mean", lambda t: t[0]),
        ("mean", lambda t: t[:0]),
        ("mean", lambda t: t.repeat(3, 1)),
        ("mean", lambda t: t.double()),
        ("basis", lambda t: t[:, 1:]),
        ("basis", lambda t: t[1:]),
        ("deviation", lambda t: -t),
        ("deviation", lambda t: t[:, None]),
    ],
)
def test_tensors_that_do_not_fit_are_refused_in_one_line(name, change):
    tensors = stated(mahalanobis(*drawn(5, 4, 12)))
    assert stored_mahalanobis(tensors | {"classifier.head.weight": torch.zeros(2)}, 5) is not None
    assert stored_mahalanobis({"classifier.head.weight": torch.zeros(2)}, 5) is None
    changed = change(tensors.pop(PREFIX + name, None))
    tensors |= {} if changed is None else {PREFIX + name: changed}
    with pytest.raises(UserError, match="do not fit each other") as refusal:
        stored_mahalanobis(tensors, 5)
    assert "\n" not in str(refusal.value)
