"""2SFS against the authors' two loops on the library's own model, and its two stages in one run."""

import csv
import json
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
import towers
from cases import perturb
from command_line import FIT, QUICK, UNTESTED, assert_same_figures, cut_fit, fit, refused, run_test
from lightning.pytorch.strategies import DDPStrategy
from safetensors.torch import load_file
from torch.optim.lr_scheduler import CosineAnnealingLR
from torch.utils.data import DataLoader

from kshot.adapters import FullTuning, LoRA
from kshot.classifiers import VPT, Task, TextPrompt, TwoStage
from kshot.classifiers.two_stage import follow_step, stages_of
from kshot.cli import main
from kshot.data.parts import Batch
from kshot.errors import UserError
from kshot.holding import merged
from kshot.module import FewShotModule
from kshot.optim import DasslCosine, WarmupCosine, make_schedule, staged_schedule
from kshot.prepare import check_devices
from kshot.run import make_trainer

NAMES = ("cat", "dog", "yellow bird", "very small old car")
LABEL = torch.tensor([0, 1, 2, 3, 0])
METHOD = ("--config", "methods/2sfs.yaml")
LR, DECAY, FLOOR = 1e-2, 0.1, 0.005


def adamw(params):
    return torch.optim.AdamW(params, lr=LR, weight_decay=DECAY)


def cosine(optimizer, total_steps, steps_per_epoch):
    return WarmupCosine(optimizer, total_steps, steps_per_epoch, floor=FLOOR)


def module_of(**settings) -> FewShotModule:
    settings = {"adapter": FullTuning(only="norm"), "targets": ["*"]} | settings
    return FewShotModule(towers.backbone(), TwoStage, NAMES, optimizer=adamw, schedule=cosine, **settings)


def reference(backbone, steps: int) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Norms and class weights after two loops with an optimizer and a schedule each, in double precision."""
    model = towers.original("clip").double().requires_grad_(False)
    image = ((towers.images(backbone, len(LABEL)).double() - backbone.mean) / backbone.std).double()
    tokens = backbone.tokenize([f"a photo of a {name}." for name in NAMES])
    norms = [p for m in model.modules() if isinstance(m, torch.nn.LayerNorm) for p in m.parameters()]
    first = int(0.6 * steps)
    scale = model.logit_scale.exp()

    def train(parameters, loss_of, count):
        optimizer = adamw(parameters)
        schedule = CosineAnnealingLR(optimizer, count, eta_min=FLOOR * LR)
        for _ in range(count):
            optimizer.zero_grad()
            loss_of().backward()
            optimizer.step()
            schedule.step()

    def cross_entropy(f, w):
        return F.cross_entropy(scale * F.normalize(f, dim=-1) @ F.normalize(w, dim=-1).T, LABEL)

    for p in norms:
        p.requires_grad_(True)
    train(norms, lambda: cross_entropy(model.encode_image(image), model.encode_text(tokens)), first)
    for p in norms:
        p.requires_grad_(False)
    head = F.normalize(model.encode_text(tokens), dim=-1).clone().requires_grad_()
    train([head], lambda: cross_entropy(model.encode_image(image), head), steps - first)
    return {name: p.detach() for name, p in model.named_parameters() if ".ln_" in name or "ln_" in name}, head.detach()


@pytest.mark.parametrize("steps", [10, 7])
def test_one_run_is_the_authors_two_loops(steps):
    module = module_of()
    norms, head = reference(module.backbone, steps)
    batch = Batch(towers.images(module.backbone, len(LABEL)), LABEL, torch.arange(len(LABEL)))
    trainer = make_trainer(max_epochs=steps, precision="64-true", limit_val_batches=0)
    trainer.fit(module, DataLoader([batch], batch_size=None))
    assert towers.relative(module.classifier.head, head) <= 1e-6
    ours = {name: p for name, p in module.backbone.clip.named_parameters() if name in norms}
    start = dict(towers.original("clip").named_parameters())
    assert len(ours) == len(norms) == 2 * (2 * 4 + 3)
    for name, p in ours.items():
        assert towers.relative(p, norms[name]) <= 1e-6, name
        assert not torch.equal(p.float(), start[name].float()), name


def test_a_stage_leaves_the_other_alone():
    """In the first there is no head to train; in the second no gradient reaches the towers."""
    module = module_of()
    given, image = module.classifier, towers.images(module.backbone, 5)
    assert stages_of(given, 10) == (6, 4)
    assert given.head.shape == (0, 24)
    module.loss_of(Batch(image, LABEL, LABEL)).backward()
    assert all(p.grad is not None for p in module.backbone.trainable("image") + module.backbone.trainable("text"))
    module.zero_grad()
    follow_step(given, 5)
    assert len(given.head) == 0
    follow_step(given, 6)
    text = F.normalize(given.encode(), dim=-1)
    torch.testing.assert_close(given.head.detach(), text)
    module.loss_of(Batch(image, LABEL, LABEL)).backward()
    assert [name for name, p in module.trained().items() if p.grad is not None] == ["classifier.head"]
    before = given.head.detach().clone()
    perturb(module.backbone)
    follow_step(given, 7)
    assert torch.equal(given.head, before)


def test_behind_learned_tokens():
    """They train in the first stage, as the adapter does."""
    given = VPT(towers.backbone(), Task(NAMES), head=TwoStage)
    FullTuning(only="norm").attach(given.backbone, ["*"])
    assert stages_of(given, 10) == (6, 4)
    for step, trains in ((5, True), (6, False)):
        given.zero_grad()
        follow_step(given, step)
        image = towers.images(given.backbone, 5)
        features = given.backbone.encode_image(image, given.image_tokens())
        sum(given.losses(features, LABEL).values()).backward()
        assert (given.image_prompts.grad is not None) is trains
        assert (given.inner.head.grad is None) is trains


@pytest.mark.parametrize(("steps", "stages"), [(1, (1, 0)), (2, (1, 1)), (5, (3, 2)), (4800, (2880, 1920))])
def test_the_steps_of_each(steps, stages):
    given = module_of().classifier
    assert stages_of(given, steps) == stages_of(given, steps) == stages


def test_without_anything_that_trains_in_the_towers(caplog):
    module = module_of(adapter=None)
    with caplog.at_level("INFO", logger="kshot"):
        assert stages_of(module.classifier, 8) == stages_of(module.classifier, 8) == (8,)
    assert [r.message for r in caplog.records] == [
        "Nothing in the towers trains: all 8 steps are those of TwoStage's second stage."
    ]
    features = torch.randn(5, 24)
    assert towers.relative(module.classifier(features), TextPrompt(towers.backbone(), Task(NAMES))(features)) <= 1e-5


def test_the_head_starts_from_the_text_without_dropout_and_where_training_stands():
    """And training goes on with dropout, whatever share of the change evaluation takes."""
    module = module_of(adapter=LoRA(rank=2, dropout=0.5, wise_alpha=0.3), targets=["text.*"])
    perturb(module.backbone, 0.3)
    given = module.classifier.train()
    torch.manual_seed(0)
    given.start_head()
    module.set_wise(1.0)
    expected = F.normalize(given.eval().encode(), dim=-1)
    torch.testing.assert_close(given.head.detach(), expected.detach())
    assert {layer.dropout for layer in module.layers.values()} == {0.5}


@pytest.mark.parametrize("where", ["plain", "merged"])
def test_other_classes_are_told_apart_by_their_text_beside_those_of_the_head(where):
    module = module_of()
    given, features = module.classifier, torch.randn(5, 24)
    stages_of(given, 2)
    follow_step(given, 1)
    perturb(module.backbone, 0.2)
    with torch.no_grad():
        given.head.add_(0.1 * torch.randn(given.head.shape))
    module.eval()
    names = ("tree", "dog", "sea horse", "cat")
    text = TextPrompt(module.backbone, Task(names)).encode()
    expected = torch.stack([text[0], given.head[1], text[2], given.head[0]])
    scale = module.backbone.logit_scale
    with torch.no_grad():
        before = given(features)
        if where == "merged":
            with merged(given):
                given.set_class_names(names)
                found = given(features)
        else:
            given.set_class_names(names)
            found = given(features)
        torch.testing.assert_close(found, scale * F.cosine_similarity(features[:, None], expected[None], dim=-1))
        given.set_class_names(NAMES[::-1])
        torch.testing.assert_close(given(features), before.flip(1))
        given.set_class_names(NAMES)
        assert torch.equal(given(features), before)


@pytest.mark.parametrize(
    "factory", [cosine, WarmupCosine, DasslCosine, lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 2)]
)
def test_a_schedule_starts_anew_in_each_stage(factory):
    """The rates of two groups, step by step, are those of a run for each stage."""

    def rates(make, count):
        parameters = [torch.nn.Parameter(torch.zeros(1)) for _ in range(2)]
        optimizer = torch.optim.SGD([{"params": [p], "lr": lr} for p, lr in zip(parameters, (0.1, 2.0), strict=True)])
        schedule, found = make(optimizer), []
        for _ in range(count):
            found.append([group["lr"] for group in optimizer.param_groups])
            optimizer.step()
            schedule.step()
        return torch.tensor(found)

    staged = rates(lambda optimizer: staged_schedule(factory, optimizer, (6, 4), 2), 10)
    alone = [rates(lambda optimizer, n=n: make_schedule(factory, optimizer, n, 2), n) for n in (6, 4)]
    torch.testing.assert_close(staged, torch.cat(alone))


class TestRefusals:
    @pytest.mark.parametrize("first", [0.0, 1.0, -0.5, float("nan")])
    def test_shares(self, first):
        with pytest.raises(UserError, match=r"^TwoStage: first is .*, and must lie between 0 and 1\.$"):
            TwoStage(towers.backbone(), Task(NAMES), first)

    def test_several_devices(self):
        module = module_of()
        two = SimpleNamespace(world_size=2, strategy=DDPStrategy())
        with pytest.raises(UserError, match="trains other tensors in each stage") as error:
            check_devices(module, two, stages_of(module.classifier, 10))
        assert "\n" not in str(error.value)

    def test_an_adapter_that_plans_for_all_steps(self, tmp_path, capsys):
        words = ["fit", "--config", "clip_16shot.yaml", *METHOD, "--config", "methods/adalora.yaml"]
        line = refused(capsys, [*words, "--run.root", str(tmp_path)])
        assert "TwoStage + AdaLoRA trains the adapter in its first stage alone, and AdaLoRA plans for all steps" in line
        assert not list(tmp_path.iterdir())


def test_a_resumed_run_ends_with_the_same_bits(tmp_path, monkeypatch, few_scans):
    """Twelve steps, the seventh the last of the first stage: cut before it, in the epoch after it, and later."""
    options = [*METHOD, "--trainer.max_epochs", "6", "--run.save_every", "0", "--data.batch_size", "3", *few_scans]
    whole = fit(tmp_path / "whole", *options, *UNTESTED)
    cut = cut_fit(monkeypatch, 2, tmp_path / "cut", *options, *UNTESTED)
    last, start = cut / "checkpoints" / "last.ckpt", FewShotModule.on_train_epoch_start
    resume = [*FIT, *QUICK, *options, *UNTESTED, "--ckpt_path", str(last)]
    for cut_at, rows in ((4, 0), (5, 3), (None, 3)):
        saved = torch.load(last, weights_only=True)
        assert saved["epoch"] + 1 == {4: 2, 5: 4, None: 5}[cut_at], "cut where it was told to be"
        assert len(saved["state_dict"]["classifier.head"]) == rows

        def power_cut(module, cut_at=cut_at):
            if module.current_epoch == cut_at:
                raise RuntimeError("power cut")
            start(module)

        monkeypatch.setattr(FewShotModule, "on_train_epoch_start", power_cut)
        if cut_at is None:
            main(resume)
        else:
            with pytest.raises(RuntimeError, match="power cut"):
                main(resume)
    a, b = (load_file(d / "tuned.safetensors") for d in (whole, cut))
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)
    losses = [
        [row["train/loss"] for row in csv.DictReader((d / "metrics.csv").open()) if row["train/loss"]]
        for d in (whole, cut)
    ]
    assert losses[0] == losses[1]


def test_base_to_new_and_its_file(tmp_path):
    directory = fit(tmp_path, *METHOD, "--trainer.max_epochs", "3", "--data.protocol", "base-to-new")
    result = json.loads((directory / "result.json").read_text())
    assert result["method"] == "TwoStage + FullTuning"
    assert list(result["test_sets"]) == ["base", "new"]
    saved = load_file(directory / "tuned.safetensors")
    assert saved["classifier.head"].shape == (5, 128)
    assert result["trainable_parameters"] == sum(t.numel() for t in saved.values())
    assert_same_figures(run_test(directory, tmp_path / "again"), result)
