"""The schedule against its closed form, and that only what trains is optimised."""

import math
from functools import partial

import lightning.pytorch as pl
import pytest
import torch

from kshot.adapters import DoRA, HydraLoRA, LoRA, PiSSA
from kshot.backbones import OpenClip
from kshot.classifiers import CoOp, LinearProbe, NearestClassMean, TextPrompt
from kshot.commands import planned_steps
from kshot.module import FewShotModule
from kshot.optim import WarmupCosine

NAMES = ["zero", "one", "two"]


@pytest.mark.parametrize(("total", "warmup", "floor"), [(10, 0, 0.0), (20, 5, 0.0), (7, 3, 0.1)])
def test_warmup_cosine(total, warmup, floor):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.2)
    schedule = WarmupCosine(optimizer, total_steps=total, warmup_steps=warmup, floor=floor)
    for step in range(total + 1):
        if step < warmup:
            expected = 0.2 * (step + 1) / (warmup + 1)
        else:
            progress = (step - warmup) / (total - warmup)
            expected = 0.2 * (floor + (1 - floor) * (1 + math.cos(math.pi * progress)) / 2)
        assert optimizer.param_groups[0]["lr"] == pytest.approx(expected, abs=1e-12)
        optimizer.step()
        schedule.step()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.2 * floor, abs=1e-12)


@pytest.mark.parametrize(
    ("classifier", "adapter", "closed"),
    [
        (TextPrompt, None, True),
        (NearestClassMean, None, True),
        (LinearProbe, None, False),
        (CoOp, None, False),
        (TextPrompt, LoRA(rank=2), False),
        (CoOp, LoRA(rank=2), False),
    ],
)
def test_what_trains(classifier, adapter, closed):
    module = FewShotModule(OpenClip("kshot:glyph_clip"), classifier, NAMES, adapter=adapter)
    module.preflight(steps=10)
    assert module.closed_form == closed
    optimizer = module.configure_optimizers()
    trained = {id(p) for p in module.parameters() if p.requires_grad}
    if closed:
        assert optimizer is None
        assert not trained
    else:
        assert {id(p) for group in optimizer.param_groups for p in group["params"]} == trained
    saved = module.tuned_state()
    assert sum(value.numel() for value in saved.values()) < 200_000
    assert trained == {id(module.get_parameter(name)) for name in saved if name != "classifier.means"}
    assert module.has_frozen_images() == (adapter is None)


def test_every_trainable_tensor_without_a_gradient_is_found():
    module = FewShotModule(
        OpenClip("kshot:glyph_clip"), LinearProbe, NAMES, adapter=LoRA(rank=2), targets=["*.0.[qkv]"]
    )
    with pytest.raises(
        Exception, match=r"6 trainable tensors get no gradient, among them classifier\.backbone\.clip\.trans"
    ):
        module.preflight(steps=10)


def test_a_loss_that_is_not_finite_stops():
    module = FewShotModule(OpenClip("kshot:glyph_clip"), LinearProbe, NAMES)
    module.classifier.head.weight.data.fill_(float("nan"))
    from kshot.data import Batch
    from kshot.errors import UserError

    batch = Batch(torch.randn(2, 128), torch.tensor([0, 1]), torch.tensor([0, 1]))
    with pytest.raises(UserError, match="loss is nan"):
        module.training_step(batch, 0)


def test_a_frozen_text_tower_is_encoded_once_in_training(monkeypatch):
    calls, encode = [], OpenClip.encode_tokens

    def count(self, tokens):
        calls.append(len(tokens))
        return encode(self, tokens)

    monkeypatch.setattr(OpenClip, "encode_tokens", count)
    targets = ["image.*.q"]
    module = FewShotModule(OpenClip("kshot:glyph_clip"), TextPrompt, NAMES, adapter=LoRA(rank=2), targets=targets)
    optimizer = module.configure_optimizers()
    module.train()
    for _ in range(3):
        features = module.backbone.encode_image(torch.rand(2, 3, 32, 32))
        module.losses(features, torch.tensor([0, 1]))["cross_entropy"].backward()
        optimizer.step()
    assert calls == [3]


class TestRoles:
    """Parameter groups: what weight decay spares, and the head's own rate."""

    def groups(self, **options) -> list[dict]:
        module = FewShotModule(
            OpenClip("kshot:glyph_clip"),
            options.pop("classifier", TextPrompt),
            NAMES,
            targets=["image.0.*"],
            optimizer=partial(torch.optim.AdamW, lr=1e-3, weight_decay=0.1),
            **options,
        )
        self.names = {id(p): n.rsplit(".", 1)[-1] for n, p in module.named_parameters()}
        return module.configure_optimizers().param_groups

    def test_one_role_is_one_group(self):
        (group,) = self.groups(adapter=LoRA(rank=2))
        assert group["weight_decay"] == 0.1
        assert group["lr"] == 1e-3

    @pytest.mark.parametrize(
        ("adapter", "spared"), [(DoRA(rank=2), {"m"}), (PiSSA(rank=2), {"A", "B"}), (HydraLoRA(rank=2), {"G"})]
    )
    def test_decay_spares_what_zero_is_not_the_start_of(self, adapter, spared):
        groups = self.groups(adapter=adapter)
        undecayed = {self.names[id(p)] for g in groups if g["weight_decay"] == 0 for p in g["params"]}
        decayed = {self.names[id(p)] for g in groups if g["weight_decay"] == 0.1 for p in g["params"]}
        assert undecayed == spared
        assert decayed.isdisjoint(spared)

    def test_the_head_may_have_a_rate_of_its_own(self):
        groups = self.groups(adapter=LoRA(rank=2), classifier=LinearProbe, head_lr=0.5)
        rates = {g["lr"]: {self.names[id(p)] for p in g["params"]} for g in groups}
        assert rates == {1e-3: {"A", "B"}, 0.5: {"weight", "bias"}}


@pytest.mark.parametrize(
    ("options", "batches"),
    [
        ({"max_epochs": 3}, 5),
        ({"max_epochs": 3, "accumulate_grad_batches": 2}, 5),
        ({"max_epochs": 3, "max_steps": 4}, 5),
        ({"max_steps": 7}, 5),
        ({"max_epochs": 2, "limit_train_batches": 0.5}, 9),
        ({"max_epochs": 2, "limit_train_batches": 3}, 9),
        ({"max_epochs": 2, "limit_train_batches": 30}, 9),
    ],
)
def test_planned_steps_are_the_steps_that_are_run(options, batches):
    class Counts(pl.LightningModule):
        planned = None

        def training_step(self, batch, batch_idx):
            return self.weight.sum()

        def configure_optimizers(self):
            self.planned = self.trainer.estimated_stepping_batches
            return torch.optim.SGD(self.parameters(), lr=0.1)

        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(1))

    trainer = pl.Trainer(
        logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, **options
    )
    loader = torch.utils.data.DataLoader(torch.zeros(batches, 1))
    expected = planned_steps(trainer, len(loader))
    trainer.fit(module := Counts(), loader)
    assert expected == trainer.global_step == module.planned
