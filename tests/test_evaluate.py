"""The evaluator alone: metrics against scikit-learn and torchmetrics, the zero-shot row, each image counted once."""

from functools import partial

import pytest
import torch
from data_fixtures import parted_folder
from sklearn.metrics import balanced_accuracy_score, f1_score
from torchmetrics.functional.classification import multiclass_calibration_error

from kshot.adapters import FullTuning, LoRA
from kshot.callbacks import Fitting, Merged, WeightAverage
from kshot.classifiers import CoOp, LinearProbe
from kshot.data import FewShotDataModule
from kshot.evaluate import Evaluation, Meter
from kshot.features import FeatureStore
from kshot.run import build, evaluate, make_trainer
from kshot.slots import projections_of


class TestMeter:
    def test_figures_are_those_of_scikit_learn(self):
        generator = torch.Generator().manual_seed(3)
        logits, label = 3 * torch.randn(200, 5, generator=generator), torch.randint(0, 5, (200,), generator=generator)
        meter = Meter(5, zero_shot=True)
        for some, truth in zip(logits.split(64), label.split(64), strict=True):
            meter.update(some, truth, -some)
        figures, per_class, count = meter.results()
        guess = logits.argmax(1)
        assert count == 200
        assert figures["acc"] == pytest.approx((guess == label).double().mean().item())
        assert figures["acc_class_mean"] == pytest.approx(balanced_accuracy_score(label, guess))
        assert figures["f1_macro"] == pytest.approx(f1_score(label, guess, average="macro"))
        assert figures["zero_shot_acc"] == pytest.approx(((-logits).argmax(1) == label).double().mean().item())
        expected = multiclass_calibration_error(logits.softmax(1), label, 5, n_bins=15)
        assert figures["ece"] == pytest.approx(expected.item(), abs=1e-6)
        for c in range(5):
            assert per_class[c] == pytest.approx((guess[label == c] == c).double().mean().item())

    def test_a_class_without_images_has_no_figure(self):
        """It may be guessed all the same; scikit-learn's balanced accuracy leaves it out, too."""
        logits = torch.eye(4)[torch.tensor([0, 3, 1, 3, 0, 1])]
        label = torch.tensor([0, 0, 1, 1, 1, 1])  # none of 2 and 3
        meter = Meter(4)
        meter.update(logits, label, None)
        figures, per_class, _ = meter.results()
        assert per_class[:2] == [0.5, 0.5]
        assert all(value != value for value in per_class[2:])
        with pytest.warns(UserWarning, match="y_pred contains classes not in y_true"):
            assert figures["acc_class_mean"] == pytest.approx(balanced_accuracy_score(label, logits.argmax(1)))
        assert figures["f1_macro"] == pytest.approx(f1_score(label, logits.argmax(1), average="macro", labels=[0, 1]))
        assert figures["acc"] == pytest.approx(0.5)

    def test_a_single_class_has_one_figure(self):
        meter = Meter(1, zero_shot=True)
        meter.update(torch.tensor([[-3.0], [0.0], [2.0]]), torch.zeros(3, dtype=torch.long), torch.zeros(3, 1))
        figures, per_class, _ = meter.results()
        assert per_class == [1.0]
        assert figures["acc_class_mean"] == figures["f1_macro"] == figures["zero_shot_acc"] == 1.0

    def test_a_confidence_of_one_lies_in_the_last_bin(self):
        """One bin holds 1.0, wrong, and 0.97, right: |1/2 - 0.985|; apart they would give 0.515."""
        logits = torch.tensor([[0.0, 1e4], [torch.tensor(0.97 / 0.03).log().item(), 0.0]])
        meter = Meter(2)
        meter.update(logits, torch.tensor([0, 0]), None)
        assert meter.results()[0]["ece"] == pytest.approx(0.485, abs=1e-4)

    def test_without_a_text_tower_there_is_no_zero_shot_row(self):
        meter = Meter(1)  # a single class is always right
        meter.update(torch.zeros(3, 2), torch.zeros(3, dtype=torch.long), None)
        assert "zero_shot_acc" not in meter.results()[0]


@pytest.fixture(scope="module")
def frozen(glyph_clip) -> dict[str, float]:
    """Figures of the untouched backbone on 128 test scans."""
    data = FewShotDataModule("digits", shots=2)
    return evaluate(build(glyph_clip, data), data, make_trainer(limit_test_batches=1)).sets["test"]


def disturbed(module, amount: float = 0.5):
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in module.trained().values():
            parameter.add_(amount * torch.randn(parameter.shape, generator=generator))
    return module


@pytest.mark.parametrize(
    "settings",
    [
        {"adapter": LoRA(rank=2), "targets": ["image.*"]},
        {"adapter": LoRA(rank=2), "targets": ["text.*"]},
        {"adapter": FullTuning(), "targets": ["*"]},
        {"classifier": partial(CoOp, context_length=2)},
    ],
    ids=["image", "text", "full", "CoOp"],
)
def test_the_zero_shot_row_is_that_of_the_untouched_backbone(backbone, data, frozen, settings):
    assert frozen["acc"] == frozen["zero_shot_acc"] > 0.65
    module = disturbed(build(backbone, data, **settings))
    tested = evaluate(module, data, make_trainer(limit_test_batches=1))
    assert tested.sets["test"]["zero_shot_acc"] == frozen["zero_shot_acc"]
    assert tested.sets["test"]["acc"] < 0.6
    assert tested.counts == {"test": 128}
    module.detach()


def test_an_image_that_is_not_counted_is_noticed(backbone, data, monkeypatch):
    module = build(backbone, data)
    monkeypatch.setattr(FewShotDataModule, "test_sizes", lambda self: {"test": 540})
    with pytest.raises(RuntimeError, match="539 of 540 images of test"):
        evaluate(module, data, make_trainer())
    cut_short = evaluate(module, data, make_trainer(limit_test_batches=2))
    assert (cut_short.counts, cut_short.sizes) == ({"test": 256}, {"test": 540})


def test_test_sets_run_merged_and_leave_nothing_held(backbone, data, monkeypatch):
    module, seen = disturbed(build(backbone, data, adapter=LoRA(rank=1), targets=["image.*", "text.*"])), []
    step = type(module).test_step

    def watched(self, *given):
        adapted = [p for p in projections_of(self) if p.adapters]
        seen.append((self.classifier.held is not None, all(p.held is not None for p in adapted)))
        return step(self, *given)

    monkeypatch.setattr(type(module), "test_step", watched)
    evaluate(module, data, make_trainer(limit_test_batches=2))
    assert seen == [(True, True)] * 2
    assert module.classifier.held is None
    assert all(p.held is None for p in projections_of(module))
    module.detach()


def test_an_error_amid_a_test_set_leaves_nothing_held(backbone, data, monkeypatch):
    module = build(backbone, data, adapter=LoRA(rank=1), targets=["image.*"])
    monkeypatch.setattr(type(module), "test_step", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        evaluate(module, data, make_trainer())
    assert all(p.held is None for p in projections_of(module))
    module.detach()


def test_several_test_sets_are_served_in_turn_and_the_first_again_at_the_end(backbone):
    data = FewShotDataModule("digits", shots=2, protocol="base-to-new")
    module = build(backbone, data, classifier=partial(CoOp, context_length=2))
    trainer = make_trainer()
    tested = evaluate(module, data, trainer)
    assert list(tested.sets) == ["base", "new"]
    for logged, name in (("test/acc", "base"), ("test/zero_shot_acc", "base"), ("test/new/acc", "new")):
        figure = logged.rpartition("/")[2]
        assert trainer.callback_metrics[logged] == pytest.approx(tested.sets[name][figure]), logged
    assert sum(tested.counts.values()) == 539
    assert [len(accuracies) for accuracies in tested.per_class.values()] == [5, 5]
    assert module.classifier.task.class_names == ("zero", "one", "two", "three", "four")


def test_the_zero_shot_row_of_a_target_has_its_own_sentences(backbone, frozen, tmp_path):
    parted_folder(tmp_path / "pets", {"cat": 1, "dog": 1})
    settings = {"protocol": "cross-dataset", "targets": ["digits"], "template": "a bad drawing of the {}."}
    data = FewShotDataModule("pets", str(tmp_path), shots=1, **settings)
    module = disturbed(build(backbone, data, adapter=LoRA(rank=2), targets=["*"]))
    tested = evaluate(module, data, make_trainer(limit_test_batches=1))
    assert tested.sets["digits"]["zero_shot_acc"] == frozen["zero_shot_acc"]
    assert tested.counts == {"pets": 2, "digits": 128}
    module.detach()


@pytest.mark.parametrize(
    ("stage", "kinds"),
    [
        ("fit", {FeatureStore, Fitting}),
        ("validate", {FeatureStore, WeightAverage, Merged}),
        ("test", {FeatureStore, WeightAverage, Evaluation}),
    ],
)
def test_each_stage_has_the_callbacks_that_it_needs(stage, kinds, backbone, data):
    module, trainer = build(backbone, data, classifier=LinearProbe), make_trainer(limit_val_batches=0)
    trainer.state.fn = stage
    module.trainer = trainer
    assert {type(callback) for callback in module.configure_callbacks()} == kinds
    trainer.callbacks.append(FeatureStore(backbone))
    assert {type(callback) for callback in module.configure_callbacks()} == kinds - {FeatureStore}, "one is enough"
