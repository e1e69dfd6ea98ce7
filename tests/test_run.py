"""Build, fit, evaluate, detach without the command line; many runs on one backbone, each as in a process of its own."""

import copy
import json
import sys
from functools import partial
from pathlib import Path

import many_runs
import pytest
import torch
from lightning.pytorch import Callback
from processes import finished

from kshot.adapters import AutoLoRA, FullTuning, LoRA
from kshot.backbones import OpenClip
from kshot.callbacks import ResumeFile
from kshot.classifiers import CLIPAdapter, CoOp, LinearProbe, NearestClassMean, TextPrompt
from kshot.data import CropFlip, FewShotDataModule
from kshot.errors import UserError
from kshot.features import FeatureStore
from kshot.header import header_of
from kshot.prepare import try_step
from kshot.run import build, evaluate, fit, make_trainer


@pytest.fixture(scope="module")
def runs() -> dict:
    """Every method, after those before it and after those behind it, by a process that keeps to one thread."""
    script = Path(many_runs.__file__)
    return json.loads(finished([sys.executable, str(script)], timeout=480).stdout)


@pytest.mark.parametrize("method", many_runs.cases())
def test_a_run_after_others_equals_one_before_them(method, runs):
    """And one of each kind equals that of a fresh process."""
    shared, backwards, fresh = (runs[method][how] for how in ("shared", "backwards", "fresh"))
    assert shared.pop("untouched"), "detach gave another backbone back"
    assert backwards["tensors"] > 0 or method == "TextPrompt"
    assert shared == backwards
    assert (fresh is None) == (method not in many_runs.ALONE)
    assert fresh in (None, shared)


@pytest.mark.parametrize("where", ["disk", "memory"])
def test_images_are_decoded_and_encoded_once_for_many_runs(backbone, few_scans, monkeypatch, tmp_path, where):
    data = FewShotDataModule(few_scans[1], shots=2)
    monkeypatch.setenv("KSHOT_CACHE", str(tmp_path) if where == "disk" else "")
    encoded, encode = [], OpenClip.encode_normalised
    monkeypatch.setattr(OpenClip, "encode_normalised", lambda self, x: encoded.append(len(x)) or encode(self, x))
    store = FeatureStore(backbone)
    for head in (LinearProbe, partial(CoOp, context_length=2), NearestClassMean):
        module = build(backbone, data, classifier=head)
        fit(module, data, make_trainer(max_epochs=1, limit_val_batches=0), store=store)
        evaluate(module, data, make_trainer(), store=store)
        module.detach()
    noise = 2 * 2  # the trial step of the two that take steps
    assert sum(encoded) == 6 + 6 + 18 + noise  # shots, validation shots for class means, test scans


def test_a_store_belongs_to_one_backbone(backbone, data):
    module = build(backbone, data, classifier=NearestClassMean)
    with pytest.raises(AssertionError, match="one backbone"):
        fit(module, data, make_trainer(max_epochs=1), store=FeatureStore(copy.deepcopy(backbone)))
    module.detach()


def test_what_is_attached_must_be_detached_first(backbone, data):
    module = build(backbone, data, adapter=LoRA(rank=1), targets=["image.0.q"])
    with pytest.raises(UserError, match="detach"):
        build(backbone, data)
    assert module.detach() is backbone
    build(backbone, data, adapter=FullTuning(only="bias"), targets=["image.*"])
    with pytest.raises(UserError, match="detach"):
        build(backbone, data)
    backbone.detach()


def test_a_build_that_is_refused_leaves_nothing_behind(backbone, data):
    before = {name: tensor.clone() for name, tensor in backbone.state_dict().items()}
    for settings in (
        {"adapter": LoRA(rank=1), "targets": ["image.0.q", "no.such.slot"]},
        {"adapter": LoRA(rank=1), "classifier": NearestClassMean},
        {"adapter": LoRA(rank=10_000), "targets": ["image.0.q"]},
    ):
        with pytest.raises(UserError):
            build(backbone, data, **settings)
        assert not backbone.layers()
        assert all(torch.equal(tensor, before[name]) for name, tensor in backbone.state_dict().items())
    build(backbone, data, classifier=TextPrompt)


def test_a_search_needs_halves(backbone, data):
    module = build(backbone, data, adapter=AutoLoRA(max_rank=2), targets=["image.0.q"])
    loader = data.train_dataloader if data.setup("fit") is None else None
    with pytest.raises(UserError, match="two halves"):
        make_trainer(max_epochs=1).fit(module, loader())
    module.detach()


def test_the_same_after_a_refused_run(backbone, data):
    """A run that ends in an error leaves features, held values and open contexts to nobody."""
    module = build(backbone, data, adapter=LoRA(rank=1), targets=["image.0.q"])

    def stop():
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        fit(module, data, make_trainer(max_epochs=1, limit_val_batches=0), on_prepared=stop)
    assert module.classifier.held is None
    probe = build(module.detach(), data, classifier=LinearProbe)
    with pytest.raises(RuntimeError, match="stop"):
        fit(probe, data, make_trainer(max_epochs=1, limit_val_batches=0), on_prepared=stop)
    assert next(iter(data.train_dataloader())).features is None
    module = build(backbone, data, adapter=LoRA(rank=1), targets=["image.0.q"])
    fit(module, data, make_trainer(max_epochs=1, limit_val_batches=0))
    assert module.classifier.held is None
    module.detach()


@pytest.mark.parametrize(
    ("options", "steps", "each"),
    [
        ({"max_epochs": 2}, 8, 4),
        ({"max_epochs": 2, "accumulate_grad_batches": 3}, 4, 2),  # of 3 batches and of the last one
        ({"max_epochs": -1, "max_steps": 6}, 6, 4),
    ],
)
def test_a_schedule_is_planned_and_stepped_in_optimizer_steps(backbone, data, options, steps, each):
    told, rates = [], []

    def schedule(optimizer, total_steps, steps_per_epoch):
        told.append((total_steps, steps_per_epoch))
        return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))

    class Rates(Callback):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            rates.append(optimizer.param_groups[0]["lr"])

    data.batch_size = 5
    sgd = partial(torch.optim.SGD, lr=1.0)
    module = build(backbone, data, classifier=LinearProbe, optimizer=sgd, schedule=schedule)
    fit(module, data, make_trainer(limit_val_batches=0, callbacks=[Rates()], **options))
    assert told[-1] == (steps, each)
    assert rates == [1 / (1 + step) for step in range(steps)]


def test_a_file_says_which_images_it_was_trained_on(backbone, data, tmp_path):
    keep = ResumeFile(0.0)
    keep.folder = tmp_path
    module = build(backbone, data, classifier=LinearProbe)
    fit(module, data, make_trainer(max_epochs=1, limit_val_batches=0, callbacks=[keep]))
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)["kshot"]
    assert saved["split"] == header_of(module)["split"] == data.split_info()


@pytest.mark.parametrize("where", ["disk", "memory"])
def test_a_store_tells_images_and_precisions_apart(backbone, monkeypatch, tmp_path, where):
    monkeypatch.setenv("KSHOT_CACHE", str(tmp_path) if where == "disk" else "")
    encoded, encode, counts, drawn = [], OpenClip.encode_normalised, [], []
    monkeypatch.setattr(OpenClip, "encode_normalised", lambda self, x: encoded.append(len(x)) or encode(self, x))
    store = FeatureStore(backbone)
    for seed, precision in ((1, "32-true"), (2, "32-true"), (1, "bf16-mixed"), (1, "32-true")):
        data = FewShotDataModule("digits", shots=2, split_seed=seed)
        trainer = make_trainer(max_epochs=1, limit_val_batches=0, precision=precision)
        fit(build(backbone, data, classifier=LinearProbe), data, trainer, store=store)
        counts.append(sum(encoded))
        drawn.append({row.path for row in data.draw.train})
        encoded.clear()
        assert not any(isinstance(callback, FeatureStore) for callback in trainer.callbacks), "lent for the fit alone"
    assert counts == [20 + 2, len(drawn[1] - drawn[0]) + 2, 20 + 2, 2]  # and the trial step
    assert counts[1] > 2


def test_a_closed_form_sees_every_view_of_the_shots_and_the_validation_shots(backbone, monkeypatch):
    data = FewShotDataModule("digits", shots=2, augment=CropFlip(flip=0.0), views=3)
    seen, start = [], NearestClassMean.fit
    monkeypatch.setattr(NearestClassMean, "fit", lambda self, *shots: seen.extend(shots) or start(self, *shots))
    fit(build(backbone, data, classifier=NearestClassMean), data, make_trainer(max_epochs=1))
    assert [tuple(shots.features.shape) for shots in seen] == [(3, 20, 128), (1, 20, 128)]
    drawn = (data.draw.train, data.draw.val)
    assert [shots.label.tolist() for shots in seen] == [[row.label for row in rows] for rows in drawn]
    view = torch.cat([batch.image for batch in data.eval_order_dataloader("train", 2)])
    with torch.no_grad():
        torch.testing.assert_close(seen[0].features[2], backbone.encode_image(view))


def test_what_is_chosen_after_training_is_chosen_by_what_was_trained(backbone, data, monkeypatch):
    seen = []
    monkeypatch.setattr(CLIPAdapter, "select", lambda self, val: seen.append(val))
    head, sgd = partial(CLIPAdapter, ratio=[0.2, 0.6]), partial(torch.optim.SGD, lr=1.0)
    module = build(backbone, data, classifier=head, adapter=LoRA(rank=1), targets=["image.5.*"], optimizer=sgd)
    fit(module, data, make_trainer(max_epochs=3, limit_val_batches=0))
    (val,) = seen
    image = torch.cat([batch.image for batch in data.eval_order_dataloader("val")])
    with torch.no_grad():
        torch.testing.assert_close(val.features[0], module.eval().encode_image(image), rtol=1e-4, atol=1e-4)
    assert val.label.tolist() == [row.label for row in data.draw.val]
    frozen = module.detach().encode_image(image)
    assert (val.features[0] - frozen).abs().max() > 1e-2


def test_the_trial_step_leaves_nothing_behind(backbone, data):
    module = build(backbone, data, adapter=LoRA(rank=1, dropout=0.5), targets=["image.5.q"])
    state = torch.get_rng_state()
    try_step(module, make_trainer(max_epochs=1), 4)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(p.grad is None for p in module.parameters())
    module.detach()
