"""WiSE-FT: evaluation with W + α (W' - W), against weights interpolated by hand, for every mergeable method."""

import json
from functools import partial

import pytest
import torch
import towers
from cases import FEW, FIRST_CASES, METHODS, SLOT_CASES, adapted, layers_of, loss_of, merged, perturb, plain, trained
from command_line import assert_same_figures, fit, refused, run_test

from kshot.adapters import FullTuning, HydraLoRA, LoRA
from kshot.adapters.base import Adapter
from kshot.backbones import Backbone, OpenClip
from kshot.classifiers import CLIPAdapter, LinearProbe, Task, TextPrompt
from kshot.cli import main
from kshot.data import FewShotDataModule
from kshot.errors import UserError
from kshot.module import FewShotModule
from kshot.run import build, make_trainer
from kshot.run import fit as fit_module
from kshot.slots import merge

MERGEABLE = [label for label in [*FIRST_CASES, "fulltuning"] if label != "hydralora"]
each = pytest.mark.parametrize("label", MERGEABLE)
TOWERS = ("image", "text")


def dense(backbone: Backbone) -> dict[str, torch.Tensor]:
    """The weights of the towers, adapters folded in, under the library's own names."""
    merge(backbone, keep=False)
    return {name: p.detach().clone() for name, p in backbone.named_tower_parameters()}


def between(label: str, *alphas: float) -> list[dict[str, torch.Tensor]]:
    """Features of each of plain towers whose weights are W + α (W' - W), computed name by name, for each α."""
    start, end, found = dense(towers.backbone()), dense(moved(label, wise_alpha=1.0)), []
    plain_towers = towers.backbone()
    merge(plain_towers, keep=False)
    for alpha in alphas:
        with torch.no_grad():
            for name, p in plain_towers.named_tower_parameters():
                if not torch.equal(start[name], end[name]):
                    p.copy_(start[name].double() + alpha * (end[name].double() - start[name].double()))
        found.append({tower: plain(plain_towers, tower) for tower in TOWERS})
    return found


def moved(label: str, **settings) -> Backbone:
    """A method attached to both towers, as if it were trained."""
    backbone = adapted(label, targets=FEW, **settings) if label in SLOT_CASES else towers.backbone()
    if label == "fulltuning":
        FullTuning(**settings).attach(backbone, ["*"])
    perturb(backbone)
    return backbone.eval()


def test_every_method_that_can_be_merged_is_here():
    assert {type(METHODS[label]()) for label in MERGEABLE} | {HydraLoRA} == {type(make()) for make in METHODS.values()}


@each
def test_evaluation_is_in_between(label):
    """Unmerged, merged, and merged for good; as set, and as set after training."""
    alphas = (0.25, 0.7)
    for alpha, expected in zip(alphas, between(label, *alphas), strict=True):
        given, later = moved(label, wise_alpha=alpha), moved(label)
        later.interpolate(alpha)
        for tower in TOWERS:
            for backbone in (given, later):
                for found in (plain(backbone, tower), merged(backbone, tower)):
                    assert towers.relative(found, expected[tower]) <= 2e-5
        merge(given)
        merge(later, keep=False)
        for tower in TOWERS:
            for backbone in (given, later):
                assert towers.relative(plain(backbone, tower), expected[tower]) <= 2e-5


@each
def test_one_changes_no_bit_and_zero_is_the_frozen_model(label):
    as_ever, given, frozen = moved(label), moved(label, wise_alpha=1.0), towers.backbone()
    for tower in TOWERS:
        assert torch.equal(plain(as_ever, tower), plain(given, tower))
        given.interpolate(0.5)
        assert not torch.equal(plain(as_ever, tower), plain(given, tower))
        given.interpolate(1.0)
        assert torch.equal(plain(as_ever, tower), plain(given, tower))
        assert torch.equal(merged(as_ever, tower), merged(given, tower))
        given.interpolate(0.0)
        assert towers.relative(merged(given, tower), plain(frozen, tower)) <= 1e-6
        given.interpolate(1.0)


@each
def test_training_knows_nothing_of_it(label):
    results = []
    for alpha in (1.0, 0.3):
        backbone = moved(label, wise_alpha=alpha).train()
        loss = loss_of(backbone, "image") + loss_of(backbone, "text")
        loss.backward()
        results.append((loss.detach(), {n: p.grad for n, p in trained(backbone).items()}))
    (first, grads), (second, others) = results
    assert torch.equal(first, second)
    assert grads.keys() == others.keys()
    assert all(torch.equal(grads[n], others[n]) for n in grads)


@each
def test_evaluation_writes_nothing(label):
    backbone = moved(label, wise_alpha=0.3)
    before = {n: p.detach().clone() for n, p in backbone.named_parameters()}
    merged(backbone, "image")
    with torch.inference_mode():
        towers.encode(backbone, "text")
    with pytest.raises(RuntimeError, match="stop"), backbone.passing():
        raise RuntimeError("stop")
    with backbone.unadapted():
        assert torch.equal(plain(backbone, "image"), towers.untouched("clip", "image"))
    assert all(torch.equal(p, before[n]) for n, p in backbone.named_parameters())
    assert not any(p.is_inference() for p in backbone.parameters())


def test_a_whole_weight_and_its_adapter():
    """Both are taken by the same share: W + α (W₁ - W) + α ΔW, and so when it is merged for good."""
    key = "image.transformer.resblocks.0.mlp.c_fc.weight"

    def both():
        backbone = towers.backbone()
        LoRA(rank=2, wise_alpha=0.4).attach(backbone, ["image.0.fc1"])
        FullTuning(wise_alpha=0.4).attach(backbone, [key])
        perturb(backbone)
        return backbone.eval()

    start, backbone = dict(towers.backbone().named_tower_parameters())[key], both()
    (layer,), trained_weight = layers_of(backbone).values(), dict(backbone.named_tower_parameters())[key]
    expected = (start + 0.4 * (trained_weight - start) + 0.4 * layer.B @ layer.A).detach()
    given = plain(backbone, "image")
    assert torch.equal(given, plain(both(), "image"))
    merge(backbone, keep=False)
    torch.testing.assert_close(dict(backbone.named_tower_parameters())[key].detach(), expected, rtol=1e-5, atol=1e-6)
    assert towers.relative(plain(backbone, "image"), given) <= 1e-5


def test_in_mixed_precision():
    for label in ("lora", "dora", "fulltuning"):
        expected = between(label, 0.5)[0]["image"]
        with torch.autocast("cpu", torch.bfloat16):
            backbone = moved(label, wise_alpha=0.5)
            for found in (plain(backbone, "image"), merged(backbone, "image")):
                assert towers.relative(found.float(), expected) <= 0.1


def test_detached_it_is_forgotten():
    for label in ("lora", "fulltuning"):
        backbone = moved(label, wise_alpha=0.2)
        backbone.detach()
        assert backbone.wise_alpha == 1
        assert torch.equal(plain(backbone, "image"), towers.untouched("clip", "image"))


class TestRefusals:
    @pytest.mark.parametrize("alpha", [-0.1, 1.1, float("nan"), None, "half"])
    def test_out_of_range(self, alpha):
        for kind in (LoRA, FullTuning):
            with pytest.raises(UserError, match=r"^\w+: wise_alpha is .*, and must be a number from 0 .* to 1"):
                kind(wise_alpha=alpha)

    def test_a_change_that_no_weight_expresses(self):
        assert HydraLoRA(wise_alpha=1.0).wise_alpha == 1
        with pytest.raises(UserError, match=r"^HydraLoRA: wise_alpha is 0\.5, and must be 1: no weight lies between"):
            HydraLoRA(wise_alpha=0.5)

    @pytest.mark.parametrize(
        ("adapter", "expected"),
        [(None, "has no adapter"), (HydraLoRA(rank=1), "and must be 1"), (LoRA(rank=1), "to 1")],
    )
    def test_of_a_module(self, adapter: Adapter | None, expected):
        module = FewShotModule(towers.backbone(), TextPrompt, ["cat", "dog"], adapter=adapter)
        with pytest.raises(UserError, match=expected) as error:
            module.set_wise(1.5 if isinstance(adapter, LoRA) else 0.5)
        assert "\n" not in str(error.value)
        assert all(layer.wise_alpha == 1 for layer in module.layers.values())

    def test_null_on_the_command_line(self, tmp_path, capsys):
        words = ["fit", "--config", "clip_16shot.yaml", "--run.root", str(tmp_path)]
        line = refused(capsys, [*words, "--model.adapter.wise_alpha", "null"])
        assert "wise_alpha" in line
        assert "float" in line


@pytest.mark.parametrize("kind", [LoRA, FullTuning])
def test_a_module_says_what_it_evaluates_with(kind):
    targets = ["*"]
    module = FewShotModule(towers.backbone(), LinearProbe, ["cat", "dog"], adapter=kind(), targets=targets)
    perturb(module.backbone)
    image = towers.images(module.backbone)
    other = FewShotModule(towers.backbone(), LinearProbe, ["cat", "dog"], adapter=kind(wise_alpha=0.3), targets=targets)
    other.load_state_dict(module.tuned_state(), strict=False)
    module.set_wise(0.3)
    assert module.adapter == kind(wise_alpha=0.3)
    module.eval(), other.eval()
    with torch.no_grad():
        assert torch.equal(module.encode_image(image), other.encode_image(image))


def test_a_run_says_so_and_its_file_holds_what_was_trained(tmp_path, capsys):
    """The same weights as without it; the checkpoint evaluates at the share that the config says, and tells."""
    options = ["--trainer.max_epochs", "2", "--model.optimizer.lr", "1e-2"]
    whole = fit(tmp_path / "whole", *options)
    capsys.readouterr()
    half = fit(tmp_path / "half", *options, "--model.adapter.wise_alpha", "0.5")
    assert "lr 0.01, wise_alpha 0.5" in capsys.readouterr().out
    results = [json.loads((run / "result.json").read_text()) for run in (whole, half)]
    assert [r["adapter"]["wise_alpha"] for r in results] == [1.0, 0.5]
    assert results[0]["ece"] != results[1]["ece"], "or the test says nothing"
    assert_same_figures(run_test(half, tmp_path / "again"), results[1])
    words = ["test", "--config", str(whole / "config.yaml"), "--ckpt_path", str(whole / "tuned.safetensors")]
    with pytest.warns(UserWarning, match=r"evaluated at wise_alpha 1\.0, and this one does at 0\.5"):
        main([*words, "--model.adapter.wise_alpha", "0.5", "--run.root", str(tmp_path / "other")])
    (tested,) = (tmp_path / "other").glob("*/*/result.json")
    assert_same_figures(json.loads(tested.read_text()), results[1])


def test_what_is_chosen_after_training_is_chosen_as_evaluation_runs(monkeypatch):
    """With none of the change, on texts and images of the frozen towers."""
    backbone, data, seen = OpenClip("kshot:glyph_clip"), FewShotDataModule("digits", shots=1, eval_batch_size=16), {}
    text = TextPrompt(backbone, Task(tuple(data.class_names), tuple(data.templates))).encode().detach()
    monkeypatch.setattr(CLIPAdapter, "select", lambda self, val: seen.update(held=self.held, val=val.features[0]))
    adapter = FullTuning(only="norm", wise_alpha=0.0)
    module = build(
        backbone,
        data,
        classifier=partial(CLIPAdapter, ratio=[0.2, 0.6]),
        adapter=adapter,
        targets=["*"],
        optimizer=partial(torch.optim.AdamW, lr=0.05),
    )
    fit_module(module, data, make_trainer(max_epochs=2, limit_val_batches=0))
    assert towers.relative(seen["held"], text) <= 1e-5
    image = torch.cat([batch.image for batch in data.once_dataloader("val", [(i, 0) for i in range(3)])])
    with torch.no_grad(), backbone.unadapted():
        frozen = backbone.encode_image(image)
    assert towers.relative(seen["val"][:3], frozen) <= 1e-5
    assert towers.relative(backbone.train().encode_image(image), frozen) > 1e-3, "or nothing was trained"
