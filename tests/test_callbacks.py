"""What a run does around its steps, each alone: kept features, chance by epoch, averages, files, not-finite losses."""

import math
from functools import partial

import pytest
import torch
import towers
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import WeightAveraging

from kshot.adapters import FullTuning, LoRA
from kshot.adapters.base import Shared
from kshot.backbones import OpenClip
from kshot.callbacks import ResumeFile, WeightAverage
from kshot.classifiers import CoOp, DePT, LinearProbe, PromptSRC, TextPrompt, TipAdapterF
from kshot.classifiers.base import GaussianAverage
from kshot.data import CropFlip, FewShotDataModule
from kshot.errors import UserError
from kshot.features import encoded
from kshot.holding import merged
from kshot.run import build, evaluate, fit, make_trainer
from kshot.slots import projections_of


@pytest.fixture
def backbone(tiny):
    return tiny


@pytest.fixture
def data(data) -> FewShotDataModule:
    """Four steps an epoch."""
    data.batch_size = 5
    return data


class Watch(Callback):
    """Calls a function at every training batch."""

    def __init__(self, look):
        self.look, self.seen = look, []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.seen.append(self.look(trainer, pl_module, batch))


class TestChance:
    def draws(self, backbone, data, seed=1):
        watch = Watch(lambda *_: torch.rand(()).item())
        module = build(backbone, data, seed=seed, classifier=LinearProbe)
        fit(module, data, make_trainer(max_epochs=3, limit_val_batches=0, callbacks=[watch]))
        return watch.seen

    def test_every_epoch_has_its_own_and_every_run_the_same(self, backbone, data):
        first = self.draws(backbone, data)
        assert len(first) == len(set(first)) == 12
        assert self.draws(backbone, data) == first
        assert not set(self.draws(backbone, data, seed=2)) & set(first)


class Counting(Shared):
    """Notes the steps that it is told of."""

    def __init__(self):
        super().__init__()
        self.planned, self.steps = [], []

    def plan(self, steps):
        self.planned.append(steps)

    def after_step(self, step, layers):
        gradients = [p.grad is not None for layer in layers.values() for p in layer.parameters()]
        self.steps.append((step, all(gradients) and bool(gradients)))


@pytest.mark.parametrize(("accumulate", "steps"), [(1, 8), (2, 4), (3, 4)])
def test_methods_hear_of_each_optimizer_step_counted_from_1(backbone, data, accumulate, steps):
    module = build(backbone, data, adapter=LoRA(rank=1), targets=["image.1.q"])
    shared = Counting()
    backbone.shared.append(shared)
    fit(module, data, make_trainer(max_epochs=2, limit_val_batches=0, accumulate_grad_batches=accumulate))
    assert shared.planned == [steps]
    assert shared.steps == [(step, True) for step in range(1, steps + 1)]
    module.detach()


class TestFeatures:
    def carried(self, backbone, data, **settings):
        watch = Watch(
            lambda _, module, batch: tuple(x is not None for x in (batch.image, batch.features, batch.frozen))
        )
        module = build(backbone, data, **settings)
        fit(module, data, make_trainer(max_epochs=1, limit_val_batches=0, callbacks=[watch]))
        module.detach()
        return set(watch.seen)

    def test_batches_carry_what_the_run_needs(self, backbone, data):
        coop = partial(CoOp, context_length=2)
        assert self.carried(backbone, data, classifier=coop) == {(False, True, True)}
        assert self.carried(backbone, data, classifier=coop, cache_features=False) == {(True, False, False)}
        assert self.carried(backbone, data, classifier=partial(PromptSRC, templates=["{}"])) == {(True, False, True)}
        lora = LoRA(rank=1)
        assert self.carried(backbone, data, adapter=lora, targets=["image.0.q"]) == {(True, False, False)}
        assert self.carried(backbone, data, adapter=lora, targets=["text.0.q"]) == {(False, True, True)}

    def test_endless_views_keep_nothing(self, backbone):
        data = FewShotDataModule("digits", shots=2, batch_size=5, augment=CropFlip())
        assert self.carried(backbone, data, classifier=LinearProbe) == {(True, False, False)}

    def test_features_are_dropped_after_the_run_and_images_come_back(self, backbone, data):
        self.carried(backbone, data, classifier=LinearProbe)
        assert self.carried(backbone, data, classifier=LinearProbe, cache_features=False) == {(True, False, False)}

    def test_features_are_encoded_in_evaluation_mode(self, backbone, data):
        """Full tuning puts whole towers into training mode; what is kept or chosen by must not see their dropout."""
        module = build(backbone, data, adapter=FullTuning(), targets=["image.*"])
        block = backbone.clip.visual.transformer.resblocks[0]
        block.attn.output_dropout = 0.5
        data.setup("fit")
        module.train()
        assert block.training
        first, second = (encoded(module, data, make_trainer(), "val", 0, module.features_of) for _ in range(2))
        assert torch.equal(first, second)
        assert module.training
        block.attn.output_dropout = 0.0
        module.detach()

    @pytest.mark.parametrize(
        ("precision", "dtype"),
        [("bf16-mixed", torch.float32), ("bf16-true", torch.float32), ("64-true", torch.float64)],
    )
    def test_features_are_kept_in_float32_or_what_is_wider(self, data, precision, dtype):
        watch = Watch(lambda trainer, *_: trainer.datamodule.part("train").features.dtype)
        module = build(towers.backbone("clip"), data, classifier=LinearProbe)
        options = {"precision": precision, "limit_val_batches": 0, "callbacks": [watch]}
        fit(module, data, make_trainer(max_epochs=1, **options))
        assert set(watch.seen) == {dtype}

    def test_text_that_nothing_trains_is_encoded_once_a_fit(self, backbone, data, monkeypatch):
        calls, encode = [], OpenClip.encode_part
        monkeypatch.setattr(OpenClip, "encode_part", lambda self, *a: calls.append(1) or encode(self, *a))
        for targets, fewest, most in ((["image.1.q"], 1, 3), (["text.0.q"], 8, 12)):
            module = build(backbone, data, adapter=LoRA(rank=1), targets=targets)
            calls.clear()
            fit(module, data, make_trainer(max_epochs=2, limit_val_batches=0))
            assert fewest <= len(calls) <= most, targets  # a step each where it trains; and the trial step
            module.detach()

    def test_starts_come_from_the_untouched_backbone(self, backbone, data):
        module = build(backbone, data, classifier=TipAdapterF, adapter=LoRA(rank=1), targets=["image.1.*"])
        with torch.no_grad():
            for layer in backbone.layers().values():
                layer.B.fill_(1.0)
        keys = []
        watch = Watch(lambda _, module, batch: keys.append(module.classifier.keys.detach().clone()))
        fit(module, data, make_trainer(max_epochs=1, limit_val_batches=0, callbacks=[watch]))
        module.detach()
        data.setup("fit")
        with torch.no_grad():
            batches = list(data.eval_order_dataloader("train"))
            plain = torch.cat([backbone.encode_image(batch.image) for batch in batches])
        torch.testing.assert_close(keys[0], torch.nn.functional.normalize(plain, dim=-1))


class TestWeightAverage:
    @pytest.mark.parametrize(("mean", "std"), [(2.0, 1.0), (30.0, 30.0), (500.0, 0.5)])
    def test_is_the_gaussian_mean_over_epochs(self, mean, std):
        epochs = torch.randn(6, 3, generator=torch.Generator().manual_seed(0))
        average = WeightAverage()
        for epoch, values in enumerate(epochs, 1):
            average.add(GaussianAverage(mean, std), epoch, {"a": values})
        exponents = [-((e - mean) ** 2) / (2 * std**2) for e in range(1, 7)]
        weights = torch.tensor([math.exp(x - max(exponents)) for x in exponents]).double()
        expected = (weights[:, None] * epochs.double()).sum(0) / weights.sum()
        torch.testing.assert_close(average.means["a"].double(), expected, rtol=1e-5, atol=1e-6)

    def test_a_tensor_of_another_shape_starts_anew(self):
        average = WeightAverage()
        for epoch, values in enumerate((torch.ones(2), torch.full((3,), 5.0), torch.full((3,), 7.0)), 1):
            average.add(GaussianAverage(2.5, 1.0), epoch, {"a": values})
        weights = torch.tensor([math.exp(-((e - 2.5) ** 2) / 2) for e in (2, 3)])
        torch.testing.assert_close(average.means["a"], ((5 * weights[0] + 7 * weights[1]) / weights.sum()).expand(3))

    def test_a_resumed_run_is_validated_and_goes_on_with_its_last_epoch(self, backbone, data, tmp_path):
        head = partial(PromptSRC, average_mean=2.0, average_std=1.0, templates=["{}"], depth=1)

        class PowerCut(Callback):
            def on_train_epoch_start(self, trainer, pl_module):
                if trainer.current_epoch == 2:
                    raise RuntimeError("power cut")

        def run(*callbacks, **options):
            module = build(backbone, data, classifier=head, optimizer=partial(torch.optim.SGD, lr=0.02))
            fit(module, data, make_trainer(max_epochs=3, callbacks=callbacks), **options)
            return {name: p.detach().clone() for name, p in module.trained().items()}

        keep = ResumeFile(0.0)
        keep.folder = tmp_path
        whole = run()
        with pytest.raises(RuntimeError, match="power cut"):
            run(PowerCut(), keep)
        sanity = {"num_sanity_val_steps": 1}  # validates what was loaded, before the first step
        module = build(backbone, data, classifier=head, optimizer=partial(torch.optim.SGD, lr=0.02))
        fit(module, data, make_trainer(max_epochs=3, **sanity), ckpt_path=tmp_path / "last.ckpt")
        assert all(torch.equal(p.detach(), whole[name]) for name, p in module.trained().items())

    def test_a_run_ends_with_the_mean_of_all_that_trains(self, backbone, data):
        epochs = []

        class Note(Callback):
            def on_train_epoch_end(self, trainer, pl_module):
                epochs.append({name: p.detach().clone() for name, p in pl_module.trained().items()})

        head = partial(DePT, base=partial(PromptSRC, average_mean=2.0, average_std=1.0, templates=["{}"], depth=1))
        module = build(backbone, data, classifier=head, adapter=LoRA(rank=1), targets=["image.0.q"])
        fit(module, data, make_trainer(max_epochs=3, limit_val_batches=0, callbacks=[Note()]))
        weights = torch.tensor([math.exp(-((e - 2) ** 2) / 2) for e in (1, 2, 3)])
        assert any("adapters" in name for name in module.trained())
        for name, value in module.trained().items():
            expected = sum(w * epoch[name] for w, epoch in zip(weights, epochs, strict=True)) / weights.sum()
            torch.testing.assert_close(value.detach(), expected, rtol=1e-4, atol=1e-6, msg=name)
        module.detach()

    def test_other_methods_end_with_their_last_epoch(self, backbone, data):
        module = build(backbone, data, classifier=partial(PromptSRC, average_mean=None, templates=["{}"], depth=1))
        assert not any("average" in group and group["average"] for group in module.param_groups())

    def test_a_file_to_resume_from_is_measured_by_its_mean(self, backbone, data, tmp_path):
        head = partial(PromptSRC, average_mean=1.0, average_std=1.0, templates=["{}"], depth=1)
        module = build(backbone, data, classifier=head)
        keep = ResumeFile(0.0)
        keep.folder = tmp_path
        trainer = make_trainer(max_epochs=2, limit_val_batches=0, callbacks=[keep])
        fit(module, data, trainer)
        mean = {name: p.detach().clone() for name, p in module.trained().items()}
        again = build(backbone, data, classifier=head)
        evaluate(again, data, make_trainer(limit_test_batches=1), ckpt_path=tmp_path / "last.ckpt")
        for name, value in again.trained().items():
            torch.testing.assert_close(value.detach(), mean[name])
        saved = torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"]
        assert any(not torch.equal(saved[name], mean[name]) for name in mean), "the file holds the last epoch"


def test_validation_sees_weights_that_another_callback_swaps_in(backbone, data):
    """Lightning's WeightAveraging writes through .data before validation; what runs merged must follow."""
    seen = []

    class Look(Callback):
        def on_validation_batch_end(self, trainer, pl_module, outputs, batch, batch_idx, dataloader_idx=0):
            with torch.no_grad():
                given = pl_module.classifier(pl_module.features_of(batch))
                held = [p.held for p in projections_of(pl_module)]
                for p in projections_of(pl_module):
                    p.held = None
                pl_module.classifier.held, text = None, pl_module.classifier.held
                plain = pl_module.classifier(pl_module.features_of(batch))
                pl_module.classifier.held = text
                for p, weight in zip(projections_of(pl_module), held, strict=True):
                    p.held = weight
            seen.append(float((given - plain).abs().max()))

    average = WeightAveraging(avg_fn=lambda a, b, n: 0.5 * a + 0.5 * b)
    adam = partial(torch.optim.Adam, lr=0.05)
    module = build(backbone, data, adapter=LoRA(rank=2), targets=["image.*", "text.*"], optimizer=adam)
    fit(module, data, make_trainer(max_epochs=2, callbacks=[average, Look()]))
    assert seen
    assert max(seen) < 1e-3
    module.detach()


def test_an_error_amid_training_gives_up_what_was_held(backbone, data, monkeypatch):
    module = build(backbone, data, adapter=LoRA(rank=1), targets=["image.*"])
    held = []

    def stop(self, batch, batch_idx):
        held.extend([self.classifier.held is not None, *(p.lowered is not None for p in projections_of(backbone))])
        raise ZeroDivisionError

    monkeypatch.setattr(type(module), "training_step", stop)
    with pytest.raises(ZeroDivisionError):
        fit(module, data, make_trainer(max_epochs=1, precision="bf16-mixed", limit_val_batches=0))
    assert held
    assert all(held)
    assert module.classifier.held is None
    assert all(p.lowered is None for p in projections_of(backbone))
    module.detach()


def test_validation_merges_in_the_precision_of_the_run(backbone, data, monkeypatch):
    seen, hold = [], TextPrompt.hold
    monkeypatch.setattr(TextPrompt, "hold", lambda self: seen.append(torch.is_autocast_enabled("cpu")) or hold(self))
    module = build(backbone, data, adapter=LoRA(rank=1), targets=["image.1.q"])
    fit(module, data, make_trainer(max_epochs=1, precision="bf16-mixed"))
    module.detach()
    assert seen == [True]


@pytest.mark.parametrize(
    "targets",
    [
        "*",
        "image.*",
    ],
)
def test_an_error_amid_validation_leaves_nothing_held(backbone, data, monkeypatch, targets):
    module = build(backbone, data, adapter=LoRA(rank=1), targets=[targets])
    monkeypatch.setattr(type(module), "validation_step", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        fit(module, data, make_trainer(max_epochs=1))
    assert all(p.held is None for p in projections_of(module))
    assert module.classifier.held is None


def test_a_loss_that_is_not_finite_ends_the_run_before_a_file_is_written(backbone, data, tmp_path):
    keep = ResumeFile(0.0)
    keep.folder = tmp_path
    module = build(backbone, data, classifier=LinearProbe, optimizer=partial(torch.optim.SGD, lr=float("inf")))
    with pytest.raises(UserError, match=r"not finite at step 2: lower model\.optimizer\.lr"):
        fit(module, data, make_trainer(max_epochs=2, limit_val_batches=0, callbacks=[keep]))
    assert list(tmp_path.iterdir()) == []


def test_a_last_step_that_leaves_no_number_is_noticed(backbone, data, tmp_path):
    """Its loss was finite."""
    keep, data.batch_size = ResumeFile(0.0), 20
    keep.folder = tmp_path
    module = build(backbone, data, classifier=LinearProbe, optimizer=partial(torch.optim.SGD, lr=float("inf")))
    with pytest.raises(UserError, match=r"What was trained is not finite: lower model\.optimizer\.lr"):
        fit(module, data, make_trainer(max_epochs=1, limit_val_batches=0, callbacks=[keep]))
    assert list(tmp_path.iterdir()) == []


def test_nothing_waits_for_the_device_in_a_step(backbone, data):
    """Counts reads of a tensor's value, each of which would be a wait on an accelerator, in whole training batches.

    A text tower that trains reads lengths of its sentences, which lie on the CPU wherever the run is: it is left out.
    """
    from torch.utils._python_dispatch import TorchDispatchMode

    class Reads(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            name = str(func)
            self.count += "_local_scalar_dense" in name or "is_nonzero" in name or "aten.nonzero" in name
            return func(*args, **(kwargs or {}))

    found = {}
    cases = {
        "LoRA": {"adapter": LoRA(rank=1), "targets": ["image.*.q"]},
        "CoOp": {"classifier": partial(CoOp, context_length=2)},
        "PromptSRC": {"classifier": partial(PromptSRC, templates=["{}"])},
        "DePT": {"classifier": DePT},
    }
    for name, settings in cases.items():
        mode = Reads()

        class Around(Callback):
            def on_train_batch_start(self, trainer, pl_module, batch, batch_idx, mode=mode):
                mode.__enter__()

            def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx, mode=mode):
                mode.__exit__(None, None, None)

        module = build(backbone, data, optimizer=partial(torch.optim.SGD, lr=1e-3), **settings)
        fit(module, data, make_trainer(max_epochs=1, limit_val_batches=0, callbacks=[Around()]))
        found[name] = mode.count
        module.detach()
    assert found == dict.fromkeys(cases, 0)


class TestResumeFile:
    def test_is_written_when_due_and_at_the_end(self, backbone, data, tmp_path):
        keep = ResumeFile(1e9)
        keep.folder = tmp_path
        module = build(backbone, data, classifier=LinearProbe)
        fit(module, data, make_trainer(max_epochs=3, limit_val_batches=0, callbacks=[keep]))
        assert torch.load(tmp_path / "last.ckpt", weights_only=True)["epoch"] == 2

    def test_time_counts_from_the_last_file(self, backbone, data, tmp_path, monkeypatch):
        """Epochs of six seconds, files at least ten seconds apart, and one at the end."""
        clock, saved = [0.0], []
        monkeypatch.setattr("kshot.callbacks.time.monotonic", lambda: clock[0])
        monkeypatch.setattr(Trainer, "save_checkpoint", lambda self, _: saved.append(self.current_epoch))

        class Epoch(Callback):
            def on_train_epoch_start(self, trainer, pl_module):
                clock[0] += 6

        keep = ResumeFile(10.0)
        keep.folder = tmp_path
        module = build(backbone, data, classifier=LinearProbe)
        fit(module, data, make_trainer(max_epochs=6, limit_val_batches=0, callbacks=[Epoch(), keep]))
        assert saved == [1, 3, 5]

    def test_nothing_is_written_without_a_folder(self, backbone, data, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        module = build(backbone, data, classifier=LinearProbe)
        fit(module, data, make_trainer(max_epochs=1, limit_val_batches=0, callbacks=[ResumeFile(0.0)]))
        assert list(tmp_path.iterdir()) == []


def test_frozen_weights_are_stored_in_the_precision_of_the_run_and_given_up(backbone, data):
    watch = Watch(lambda _, module, batch: {p.lowered[0].dtype for p in projections_of(module) if p.lowered})
    module = build(backbone, data, adapter=LoRA(rank=1), targets=["image.*"])
    fit(module, data, make_trainer(max_epochs=1, precision="bf16-mixed", limit_val_batches=0, callbacks=[watch]))
    assert watch.seen[0] == {torch.bfloat16}
    assert all(p.lowered is None for p in projections_of(module))
    module.detach()


def test_a_run_without_an_end_is_refused(backbone, data):
    with pytest.raises(UserError, match="no end"):
        fit(build(backbone, data, classifier=LinearProbe), data, make_trainer(max_epochs=-1, max_time="00:00:00:05"))


def test_merged_is_open_in_prediction(backbone, data):
    module = build(backbone, data, classifier=TextPrompt, adapter=LoRA(rank=1), targets=["image.*"])
    seen = []

    class Look(Callback):
        def on_predict_batch_start(self, trainer, pl_module, batch, batch_idx, dataloader_idx=0):
            seen.append(pl_module.classifier.held is not None)

    data.setup("test")
    loader = data.test_dataloader()
    make_trainer(callbacks=[Look()], limit_predict_batches=1).predict(module, loader)
    assert seen == [True]
    assert module.classifier.held is None
    with merged(module.classifier):
        assert module.classifier.held is not None
    module.detach()
