"""Held-out logits: folds by class, twins that share frozen weights, and answers against fits by hand."""

from functools import partial

import pytest
import torch

from kshot.adapters import LoRA
from kshot.classifiers import GDA, CoOp, LinearProbe, NearestClassMean, Ridge, Shots, TextPrompt
from kshot.classifiers.leaving_out import spectrum
from kshot.data import CropFlip, FewShotDataModule
from kshot.features import FeatureStore, place
from kshot.folds import FOLDS, HeldOut, Judge, fold_settings, folds_for, joined, shorten, stratified_folds, twin_of
from kshot.run import build, evaluate, fit, make_trainer, set_length


@pytest.fixture
def shots():
    """Three scans of each digit, in two views."""
    return FewShotDataModule("digits", shots=3, augment=CropFlip(flip=0.0), views=2, batch_size=8)


def judged_by(backbone, data, **settings):
    """A judge, and a module that has learnt nothing."""
    module = build(backbone, data, **settings)
    trainer = make_trainer([FeatureStore(backbone)], max_epochs=1)
    data.trainer = trainer
    data.setup("fit")
    place(module, trainer)
    return Judge(data, trainer, module, fold_settings({"max_epochs": 1})), module


class TestFolds:
    def test_each_fold_has_its_share_of_every_class(self):
        label = torch.tensor([0] * 16 + [1] * 7 + [2] * 2 + [3])
        fold = stratified_folds(label, 4, seed=1)
        for c, count in ((0, 16), (1, 7), (2, 2)):
            sizes = fold[label == c].bincount(minlength=4)
            assert sizes.sum() == count
            assert sizes.max() - sizes.min() <= 1
        assert fold[-1] == -1
        assert torch.equal(fold, stratified_folds(label, 4, seed=1))
        assert not torch.equal(fold, stratified_folds(label, 4, seed=2))

    def test_an_answer_always_sees_every_class(self):
        label = torch.tensor([0, 0, 1, 1, 1, 2])
        fold = stratified_folds(label, 3, seed=0)
        for number in range(3):
            assert set(label[fold != number].tolist()) == {0, 1, 2}

    @pytest.mark.parametrize(
        ("each", "classes", "expected"),
        [(1, 10, (0, 0)), (2, 10, (2, 2)), (3, 5, (3, 3)), (16, 10, (4, 4)), (16, 43, (4, 3)), (16, 1000, (4, 1))],
    )
    def test_as_many_as_hold_enough_out(self, each, classes, expected):
        assert folds_for(torch.arange(classes).repeat(each)) == expected


def test_a_twin_learns_apart_and_shares_what_is_frozen(backbone, shots):
    module = build(backbone, shots, adapter=LoRA(rank=2), targets=["image.0.*"])
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    twin = twin_of(module)
    fit(twin, shots, make_trainer(max_epochs=1, limit_val_batches=0))
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())
    assert any(not torch.equal(p, before[name]) for name, p in twin.trained().items())
    mine = {id(p) for p in module.backbone.parameters() if not p.requires_grad}
    theirs = {id(p) for p in twin.backbone.parameters() if not p.requires_grad}
    assert mine == theirs
    assert {id(p) for p in twin.trained().values()}.isdisjoint(id(p) for p in module.trained().values())
    module.detach()


@pytest.mark.parametrize("kind", [Ridge, GDA, NearestClassMean], ids=lambda kind: kind.__name__)
def test_a_closed_form_is_found_again_without_the_held_out(kind, backbone, shots):
    judge, module = judged_by(backbone, shots, classifier=kind)
    fold = stratified_folds(judge.label, 3, seed=1)
    found = judge.out_of_fold(module, fold, range(2))
    assert (found.folds, found.learnt, found.shots) == (2, 2.0, 3.0)
    assert sorted(found.index.tolist()) == (fold < 2).nonzero()[:, 0].tolist()
    for number in range(2):
        seen, held = fold != number, fold == number
        alone = kind(backbone, module.classifier.task)
        alone.fit(Shots(judge.train.features[:, seen], judge.label[seen]), None)
        expected = alone(judge.judged[held]).double()
        where = torch.isin(found.index, held.nonzero()[:, 0])
        torch.testing.assert_close(found.logits[where], expected, rtol=1e-5, atol=1e-5)
    module.detach()


def test_what_is_held_out_is_seen_as_evaluation_sees_it(backbone, shots):
    judge, module = judged_by(backbone, shots, classifier=NearestClassMean)
    plain = FewShotDataModule("digits", shots=3)
    plain.use_preprocessing(backbone.preprocessing)
    plain.setup("fit")
    images = torch.cat([batch.image for batch in plain.eval_order_dataloader("train")])
    with torch.no_grad():
        torch.testing.assert_close(judge.judged, backbone.encode_image(images), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(judge.judged, judge.train.features[0], atol=1e-3)
    module.detach()


def test_a_trained_answer_is_a_run_on_the_other_shots(backbone, shots):
    """The same as a fit of a data module with the other shots alone, whose views stay what they are."""
    judge, module = judged_by(backbone, shots, adapter=LoRA(rank=2), targets=["image.*.q"])
    fold = stratified_folds(judge.label, 3, seed=1)
    found = judge.out_of_fold(module, fold, range(1))
    seen, held = (fold != 0).nonzero()[:, 0], (fold == 0).nonzero()[:, 0]
    twin, data = twin_of(module), shots.fold(seen.tolist())
    assert [data.part("train").paths[i] for i in range(3)] == [shots.part("train").paths[i] for i in seen[:3].tolist()]
    fit(twin, data, make_trainer(max_epochs=1, limit_val_batches=0))
    images = shots.part("judged").images([(i, 0) for i in held.tolist()])
    with torch.no_grad():
        expected = twin.eval()(images).double()
    torch.testing.assert_close(found.logits, expected, rtol=1e-4, atol=1e-4)
    module.detach()


def test_a_subset_keeps_each_view(backbone, shots):
    shots.use_preprocessing(backbone.preprocessing)
    shots.setup("fit")
    part = shots.part("train")
    some = part.subset([5, 2, 7]).subset([2, 0])
    assert some.paths == [part.paths[7], part.paths[5]]
    assert some.row_keys(1) == [part.row_keys(1)[7], part.row_keys(1)[5]]
    assert torch.equal(some.images([(0, 1), (1, 0)]), part.images([(7, 1), (5, 0)]))


def test_what_learns_nothing_is_judged_on_all(backbone, shots):
    judge, module = judged_by(backbone, shots, classifier=TextPrompt)
    found = judge.out_of_fold(module, torch.zeros(30, dtype=torch.int64), range(0))
    assert (found.folds, found.learnt, len(found.label)) == (0, 3.0, 30)
    module.detach()


def test_nothing_is_held_out_of_one_image_a_class(backbone):
    data = FewShotDataModule("digits", shots=1)
    judge, module = judged_by(backbone, data, classifier=Ridge)
    count, which = folds_for(judge.label)
    assert judge.out_of_fold(module, stratified_folds(judge.label, max(2, count), 1), range(which)) is None
    module.detach()


def test_texts_are_encoded_once_for_all_folds(backbone, shots, monkeypatch):
    judge, module = judged_by(backbone, shots, classifier=Ridge)
    encoded, encode = [], TextPrompt.encode
    monkeypatch.setattr(TextPrompt, "encode", lambda self: encoded.append(1) or encode(self))
    judge.out_of_fold(module, stratified_folds(judge.label, 3, 1), range(3))
    assert len(encoded) == 1
    module.detach()


def test_closed_forms_take_the_shots_of_a_fold_apart_once(backbone, shots, monkeypatch):
    taken = []
    monkeypatch.setattr("kshot.classifiers.base.spectrum", lambda f: taken.append(f.shape[1]) or spectrum(f))
    judge, module = judged_by(backbone, shots, classifier=Ridge)
    fold = stratified_folds(judge.label, 3, 1)
    judge.out_of_fold(module, fold, range(2))
    module.detach()
    judge.owner = build(backbone, shots, classifier=GDA)
    place(judge.owner, judge.trainer)
    judge.out_of_fold(judge.owner, fold, range(1, 3))
    assert taken == [20, 20, 20]  # two folds, and the third, of which the first answer knew nothing
    judge.owner.detach()


@pytest.mark.parametrize("head", [LinearProbe, partial(CoOp, context_length=2)], ids=["LinearProbe", "CoOp"])
def test_the_main_run_is_left_as_it_was(head, backbone, shots):
    """Answers on folds change neither the module nor what its test finds."""
    judge, module = judged_by(backbone, shots, classifier=head)
    unfitted = twin_of(module)
    fit(module, shots, make_trainer(max_epochs=1, limit_val_batches=0), store=judge.trainer.callbacks[0])
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    tested = evaluate(module, shots, make_trainer(limit_test_batches=1)).sets
    judge.out_of_fold(unfitted, stratified_folds(judge.label, 3, 1), range(1))
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())
    assert evaluate(module, shots, make_trainer(limit_test_batches=1)).sets == tested
    module.detach()


def test_lots_of_images_are_joined():
    first = HeldOut(torch.zeros(2, 3), torch.tensor([0, 1]), torch.tensor([4, 5]), 2.0, 4.0, 1)
    second = HeldOut(torch.ones(3, 3), torch.tensor([2, 1, 0]), torch.tensor([1, 2, 3]), 3.0, 4.0, 3)
    both = joined(first, second)
    assert both.index.tolist() == [4, 5, 1, 2, 3]
    assert both.label.tolist() == [0, 1, 2, 1, 0]
    assert (both.folds, both.learnt, both.shots) == (4, 2.75, 4.0)
    assert FOLDS == 4


def test_trainers_of_folds_keep_no_files_and_validate_nothing():
    given = {"max_epochs": 3, "logger": True, "callbacks": [1], "precision": "64-true", "check_val_every_n_epoch": 0}
    assert fold_settings(given) == {
        **{"max_epochs": 3, "precision": "64-true"},
        **{"limit_val_batches": 0, "check_val_every_n_epoch": 1},
    }


def test_short_rounds_take_a_part_of_the_steps():
    for given, part, expected in (({"max_epochs": 40}, 4, (10, -1)), ({"max_epochs": 2, "max_steps": 99}, 4, (1, 24))):
        trainer = make_trainer(**given)
        shorten(trainer, part)
        assert (trainer.max_epochs, trainer.max_steps) == expected


def test_an_answer_without_a_length_takes_as_many_epochs_as_a_run(backbone, shots, monkeypatch):
    """The length follows from all shots; a limit of time is none."""
    judge, module = judged_by(backbone, shots, classifier=LinearProbe)
    seen = []
    monkeypatch.setattr("kshot.folds.fit", lambda twin, data, trainer, store: seen.append(trainer.max_epochs))
    judge.settings, judge.seconds = fold_settings({}), 60
    whole = make_trainer()
    set_length(whole, shots)
    fold = stratified_folds(judge.label, 3, 1)
    judge.out_of_fold(module, fold, range(1))
    judge.part = 4
    judge.out_of_fold(module, fold, range(1))
    assert seen == [whole.max_epochs, whole.max_epochs // 4]
    module.detach()
