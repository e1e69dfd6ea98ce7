"""The schedules against their closed forms, and that only what trains is optimised."""

import math
from collections import defaultdict
from functools import partial

import lightning.pytorch as pl
import pytest
import torch
from torch.optim import lr_scheduler

from kshot.adapters import DoRA, FullTuning, HydraLoRA, LoRA, LoRAXS, PiSSA, VeRA
from kshot.backbones import OpenClip
from kshot.classifiers import CoOp, LinearProbe, NearestClassMean, TextPrompt
from kshot.errors import UserError
from kshot.module import FewShotModule
from kshot.optim import WHOLE_RUN, AdamW, DasslCosine, WarmupCosine, make_optimizer, scheduling, watches
from kshot.prepare import planned_steps, try_step
from kshot.run import make_trainer

NAMES = ["zero", "one", "two"]


def sgd(*rates: float) -> torch.optim.Optimizer:
    """An optimizer with one parameter group for each rate."""
    return torch.optim.SGD([{"params": [torch.nn.Parameter(torch.zeros(1))], "lr": rate} for rate in rates])


def rates(optimizer, schedule, steps: int) -> list[list[float]]:
    """The rates of all groups at each of so many steps."""
    taken = []
    for _ in range(steps):
        taken.append([group["lr"] for group in optimizer.param_groups])
        optimizer.step()
        schedule.step()
    return taken


@pytest.mark.parametrize(("total", "warmup", "floor"), [(10, 0, 0.0), (20, 5, 0.0), (7, 3, 0.1)])
def test_warmup_cosine(total, warmup, floor):
    optimizer = sgd(0.2)
    schedule = WarmupCosine(optimizer, total_steps=total, steps_per_epoch=5, warmup_steps=warmup, floor=floor)
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


@pytest.mark.parametrize(("steps", "epochs", "together"), [(0, 1.0, 7), (3, 0.0, 3), (3, 0.5, 7), (2, 2.0, 16)])
def test_warmup_in_epochs_adds_to_that_in_steps(steps, epochs, together):
    runs = []
    for options in ({"warmup_steps": steps, "warmup_epochs": epochs}, {"warmup_steps": together}):
        optimizer = sgd(0.2)
        runs.append(rates(optimizer, WarmupCosine(optimizer, 40, 7, **options), 40))
    assert runs[0] == runs[1]


PUBLISHED = [(200, 2e-3), (50, 2e-3), (10, 2e-3), (5, 3.5e-3), (2, 2.6e-3)]


class Composed(torch.optim.lr_scheduler.LRScheduler):
    """Dassl's composition: a constant rate for some epochs, then what another scheduler says, which starts then."""

    def __init__(self, optimizer, then, warmup_epochs: int, constant: float) -> None:
        self.then, self.warmup_epochs, self.constant = then, warmup_epochs, constant
        super().__init__(optimizer)

    def get_lr(self):
        warm = self.last_epoch >= self.warmup_epochs
        return list(self.then.base_lrs) if warm else [self.constant for _ in self.base_lrs]

    def step(self, epoch=None):
        if self.last_epoch >= self.warmup_epochs:
            self.then.step()
        else:
            super().step()


@pytest.mark.parametrize(("epochs", "eta"), PUBLISHED)
def test_dassl_cosine_is_the_published_formula_and_the_composed_schedule(epochs, eta):
    each = 3
    optimizer = sgd(eta)
    taken = rates(optimizer, DasslCosine(optimizer, epochs * each, each), epochs * each)
    reference = sgd(eta)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(reference, T_max=epochs)
    composed = rates(reference, Composed(reference, cosine, 1, 1e-5), epochs)
    for step, (rate,) in enumerate(taken):
        e = step // each
        expected = 1e-5 if e == 0 else 0.5 * eta * (1 + math.cos(math.pi * (e - 1) / epochs))
        assert rate == pytest.approx(expected, abs=1e-12)
        assert rate == pytest.approx(composed[e][0], abs=1e-12)
    assert taken[each] == [eta]  # all of it right after the warm-up


@pytest.mark.parametrize(("epochs", "eta", "last"), [(5, 3.5e-3, 1.2e-3), (10, 2e-3, 1.9e-4)])
def test_the_last_rates_of_maple_and_cocoop(epochs, eta, last):
    optimizer = sgd(eta)
    taken = rates(optimizer, DasslCosine(optimizer, epochs, 1), epochs)
    assert taken[-1][0] == pytest.approx(last, rel=0.01)
    stock = sgd(eta)
    parts = [
        torch.optim.lr_scheduler.ConstantLR(stock, 1e-5 / eta, 1),
        torch.optim.lr_scheduler.CosineAnnealingLR(stock, epochs - 1),
    ]
    other = rates(stock, torch.optim.lr_scheduler.SequentialLR(stock, parts, [1]), epochs)
    assert other[0] == pytest.approx(taken[0])
    assert other[-1][0] < 0.7 * taken[-1][0]  # a cosine over the epochs that are left is another one


def test_every_group_warms_up_at_the_same_rate_and_then_takes_its_own():
    optimizer = sgd(3.5e-3, 6.5 * 3.5e-3)
    taken = rates(optimizer, DasslCosine(optimizer, total_steps=20, steps_per_epoch=2), 20)
    assert taken[:2] == [[1e-5, 1e-5]] * 2
    assert all(b == pytest.approx(6.5 * a, abs=1e-12) for a, b in taken[2:])
    assert [group["initial_lr"] for group in optimizer.param_groups] == [3.5e-3, 6.5 * 3.5e-3]


@pytest.mark.parametrize("total", [10, 9])
def test_a_last_epoch_that_is_cut_short_counts(total):
    optimizer = sgd(1.0)
    schedule = DasslCosine(optimizer, total, steps_per_epoch=4, warmup_epochs=0)
    taken = [rate for (rate,) in rates(optimizer, schedule, total)]
    assert taken[4] == taken[7] == pytest.approx(0.5 * (1 + math.cos(math.pi / 3)))
    assert taken[8] == pytest.approx(0.5 * (1 + math.cos(2 * math.pi / 3)))


@pytest.mark.parametrize("schedule", [partial(WarmupCosine, warmup_steps=3), partial(DasslCosine, warmup_epochs=2)])
def test_a_schedule_goes_on_from_its_state(schedule):
    optimizer = sgd(0.1, 0.4)
    whole = rates(optimizer, schedule(optimizer, total_steps=24, steps_per_epoch=4), 24)
    first = sgd(0.1, 0.4)
    begun = schedule(first, total_steps=24, steps_per_epoch=4)
    assert rates(first, begun, 13) == whole[:13]
    second = sgd(0.1, 0.4)
    resumed = schedule(second, total_steps=24, steps_per_epoch=4)
    second.load_state_dict(first.state_dict())
    resumed.load_state_dict(begun.state_dict())
    assert rates(second, resumed, 11) == whole[13:]


@pytest.mark.parametrize(
    ("schedule", "message"),
    [
        (partial(WarmupCosine, warmup_steps=-1), "WarmupCosine: warmup_steps is -1, and must be 0 or more"),
        (partial(WarmupCosine, warmup_epochs=-0.5), "warmup_epochs is -0.5"),
        (partial(WarmupCosine, warmup_epochs=math.nan), "warmup_epochs is nan"),
        (partial(WarmupCosine, floor=1.5), r"floor is 1.5, and must lie in \[0, 1\]"),
        (partial(WarmupCosine, floor=-0.1), "floor is -0.1"),
        (partial(DasslCosine, warmup_epochs=-1), "DasslCosine: warmup_epochs is -1"),
        (partial(DasslCosine, warmup_lr=-1e-5), "warmup_lr is -1e-05"),
        (partial(DasslCosine, warmup_lr=math.inf), "warmup_lr is inf"),
    ],
)
def test_bad_settings_of_a_schedule_get_one_line(schedule, message):
    with pytest.raises(UserError, match=message):
        schedule(sgd(0.1), total_steps=10, steps_per_epoch=2)


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
    assert module.takes_steps == (not closed)
    trained = {id(p) for p in module.parameters() if p.requires_grad}
    if closed:
        assert not trained
    else:
        try_step(module, make_trainer(), steps=10)
        optimizer = module.optimizer_for()
        assert {id(p) for group in optimizer.param_groups for p in group["params"]} == trained
    saved = module.tuned_state()
    assert sum(value.numel() for value in saved.values()) < 200_000
    assert trained == {id(module.get_parameter(name)) for name in saved if name != "classifier.means"}
    assert module.has_frozen_images == (adapter is None)


def test_every_trainable_tensor_without_a_gradient_is_found():
    module = FewShotModule(
        OpenClip("kshot:glyph_clip"), LinearProbe, NAMES, adapter=LoRA(rank=2), targets=["*.0.[qkv]"]
    )
    with pytest.raises(
        Exception, match=r"6 trainable tensors get no gradient, among them classifier\.backbone\.clip\.trans"
    ):
        try_step(module, make_trainer(), steps=10)


class TestRoles:
    """Parameter groups: what weight decay spares, and the head's own rate."""

    def groups(self, **options) -> list[dict]:
        start = {"targets": ["image.0.*"], "optimizer": partial(torch.optim.AdamW, lr=1e-3, weight_decay=0.1)}
        classifier = options.pop("classifier", TextPrompt)
        module = FewShotModule(OpenClip("kshot:glyph_clip"), classifier, NAMES, **start | options)
        self.names = {id(p): n.rsplit(".", 1)[-1] for n, p in module.named_parameters()}
        return module.optimizer_for().param_groups

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
        ("options", "expected"),
        [
            ({}, {2e-3: {"A", "B"}, 1e-3: {"weight", "bias"}}),  # the tower is 192 wide
            ({"adapter": PiSSA(rank=2)}, {5e-4: {"A", "B"}, 1e-3: {"weight", "bias"}}),
            ({"adapter": VeRA(rank=2)}, {1e-2: {"lambda_b", "lambda_d"}, 1e-3: {"weight", "bias"}}),
            ({"head_lr": 0.5}, {2e-3: {"A", "B"}, 0.5: {"weight", "bias"}}),
            ({"optimizer": partial(AdamW, lr=7e-3)}, {7e-3: {"A", "B", "weight", "bias"}}),
            ({"optimizer": torch.optim.AdamW}, {1e-3: {"A", "B", "weight", "bias"}}),
            ({"optimizer": partial(torch.optim.SGD, lr=0.1)}, {0.1: {"A", "B", "weight", "bias"}}),
        ],
        ids=["lora", "pissa", "vera", "head", "given", "torch", "sgd"],
    )
    def test_a_rate_that_is_left_open_is_the_adapters_own(self, options, expected):
        groups = self.groups(**{"adapter": LoRA(rank=2), "optimizer": AdamW, "classifier": LinearProbe} | options)
        found = defaultdict(set)
        for group in groups:
            found[group["lr"]] |= {self.names[id(p)] for p in group["params"]}
            assert not {"rate", "lr_factor"} & group.keys()
        assert found == expected

    def test_rates_of_matrices_fall_with_the_width_of_the_tower(self):
        assert LoRA().default_lr(384) == LoRA().default_lr(768) * 2 == 1e-3
        assert PiSSA().default_lr(384) == DoRA().default_lr(384) == 2.5e-4
        assert LoRAXS().default_lr(384) == 2e-2, "its numbers meet singular vectors, not features"
        assert VeRA().default_lr(384) == VeRA().default_lr(768) == 1e-2
        assert LoRA().default_lr(0) == LoRA.rate, "a tower that tells no width"
        assert FullTuning().default_lr(384) == 5e-5
        assert [FullTuning(only).default_lr(384) for only in ("bias", "norm")] == [1e-2, 3e-2]


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
            self.planned = planned_steps(self.trainer)
            return torch.optim.SGD(self.parameters(), lr=0.1)

        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(1))

    trainer = pl.Trainer(
        logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, **options
    )
    loader = torch.utils.data.DataLoader(torch.zeros(batches, 1))
    trainer.fit(module := Counts(), loader)
    assert trainer.global_step == module.planned


def scheduled(factory, epochs: int = 6, validates_every: int = 0, lr: float = 1.0) -> list[float]:
    """The rate after each epoch of two steps of a run whose loss and accuracy never get better."""

    class Stuck(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.weight, self.rates = torch.nn.Parameter(torch.ones(1)), []

        def training_step(self, batch, batch_idx):
            self.log("train/loss", torch.ones(()), on_step=False, on_epoch=True)
            return 0 * self.weight.sum()

        def validation_step(self, batch, batch_idx):
            self.log("val/acc", 0.5)

        def configure_optimizers(self):
            optimizer = make_optimizer(partial(torch.optim.SGD, lr=lr), [{"params": [self.weight]}])
            steps = planned_steps(self.trainer)
            found = scheduling(factory, optimizer, [steps], 2, validates_every)
            return {"optimizer": optimizer, "lr_scheduler": found}

        def on_train_epoch_start(self):
            self.rates.append(self.optimizers().param_groups[0]["lr"])

    trainer = make_trainer(max_epochs=epochs, check_val_every_n_epoch=max(1, validates_every))
    loader = torch.utils.data.DataLoader(torch.zeros(2, 1))
    trainer.fit(module := Stuck(), loader, loader if validates_every else None)
    return module.rates


def test_torchs_own_schedules_run():
    cosine = scheduled(partial(lr_scheduler.CosineAnnealingLR, T_max=12))
    assert cosine == pytest.approx([(1 + math.cos(math.pi * e / 6)) / 2 for e in range(6)])
    assert scheduled(partial(lr_scheduler.CosineAnnealingLR, T_max=WHOLE_RUN)) == cosine
    assert scheduled(partial(lr_scheduler.StepLR, step_size=4)) == pytest.approx([1, 1, 0.1, 0.1, 0.01, 0.01])
    linear = scheduled(partial(lr_scheduler.LinearLR, start_factor=0.2, total_iters=4))
    assert linear == pytest.approx([0.2, 0.6, 1, 1, 1, 1])
    cycle = scheduled(partial(lr_scheduler.OneCycleLR, max_lr=2.0))
    assert max(cycle) <= 2
    assert cycle[0] == pytest.approx(2 / 25)
    assert cycle[-1] < 0.5


@pytest.mark.parametrize(("every", "expected"), [(0, [1, 1, 1, 0.1, 0.1, 0.01]), (1, [1, 1, 1, 0.1, 0.1, 0.01])])
def test_a_plateau_is_that_of_accuracy_or_else_of_the_loss(every, expected):
    plateau = partial(lr_scheduler.ReduceLROnPlateau, mode="min", patience=1)
    assert scheduled(plateau, 6, every) == pytest.approx(expected)
    assert scheduled(plateau, 8, 2 * every)[:6] == pytest.approx([1] * 6 if every else expected)
    optimizer = sgd(1.0)
    found = scheduling(plateau, optimizer, [10], 2, every)
    assert (found["monitor"], found["scheduler"].mode) == (("val/acc", "max") if every else ("train/loss", "min"))
    assert watches(plateau)
    assert not watches(WarmupCosine)
    assert not watches(None)


def test_an_optimizer_that_refuses_its_settings_gets_one_line():
    with pytest.raises(UserError, match=r"model\.optimizer: SGD refuses its settings: Invalid momentum value: -1"):
        make_optimizer(partial(torch.optim.SGD, momentum=-1), [{"params": [torch.nn.Parameter(torch.ones(1))]}])
