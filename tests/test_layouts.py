"""Contract of adapters on layouts: LoRA on every block layout in both towers, every method on two image towers."""

import pytest
import torch
import towers
from cases import (
    FEW,
    FIRST_CASES,
    SLOT_CASES,
    adapted,
    attach,
    check_library,
    check_untouched,
    layers_of,
    library_of,
    loss_of,
    merged,
    perturb,
    plain,
    trained,
)
from towers import LAYOUTS

from kshot.backbones import Backbone
from kshot.backbones.identity import sha256_of
from kshot.errors import UserError
from kshot.slots import merge, projections_of, unmerge

TWO = [("clip", "image"), ("vit_no_bias", "image")]  # fused with a bias, and without
EVERY = [("lora", *tower) for tower in towers.distinct_towers()]
EVERY += [(label, *tower) for label in FIRST_CASES for tower in TWO if (label, *tower) not in EVERY]


def tried(label: str, name: str, tower: str) -> Backbone:
    """LoRA on all slots of a tower, another method on a few, which have all shapes that there are."""
    targets = ("*.*",) if label == "lora" else FEW
    return adapted(label, name, tuple(target.replace("*", tower, 1) for target in targets))


@pytest.mark.parametrize(("label", "name", "tower"), EVERY)
class TestEveryLayout:
    def test_step_0_changes_nothing(self, label, name, tower):
        before = towers.untouched(name, tower)
        backbone, allowed = tried(label, name, tower), SLOT_CASES[label][1].start
        for training in (True, False):
            backbone.train(training)
            for given in (towers.encode(backbone, tower), merged(backbone, tower)):
                assert torch.equal(given, before) if allowed == 0 else towers.relative(given, before) <= allowed

    def test_every_tensor_gets_a_gradient_within_two_steps(self, label, name, tower):
        backbone = adapted(label, name, (f"{tower}.*",)).train()
        optimizer = torch.optim.SGD(trained(backbone).values(), lr=0.1)
        reached = set()
        for _ in range(2):
            optimizer.zero_grad()
            loss_of(backbone, tower).backward()
            for key, layer in layers_of(backbone).items():
                for n, p in layer.named_parameters():
                    if p.requires_grad and p.grad is not None and p.grad.abs().max() > 0:
                        assert torch.isfinite(p.grad).all()
                        reached.add(f"{key}: {n}")
            optimizer.step()
        wanted = {
            f"{key}: {n}" for key, v in layers_of(backbone).items() for n, p in v.named_parameters() if p.requires_grad
        }
        assert set(layers_of(backbone)) == {s for s in backbone.slots() if s.startswith(tower)}
        assert wanted - reached == set()

    def test_merged_equals_unmerged_and_leaves_the_weights(self, label, name, tower, monkeypatch):
        backbone = tried(label, name, tower)
        stored = {key: slot.weight.clone() for key, slot in backbone.slots().items()}
        before = plain(backbone, tower)
        perturb(backbone)
        backbone.eval()
        unmerged = towers.encode(backbone, tower)
        assert unmerged.requires_grad
        assert towers.relative(unmerged, before) > 1e-3
        mergeable = [layer for layer in layers_of(backbone).values() if layer.mergeable]
        with monkeypatch.context() as patch:
            for layer in mergeable:
                patch.setattr(layer, "change", lambda *_: pytest.fail("not merged"))
            assert towers.relative(merged(backbone, tower), unmerged) <= 1e-5
        assert all(torch.equal(slot.weight, stored[key]) for key, slot in backbone.slots().items())
        assert all(projection.held is None for projection in projections_of(backbone))
        for mode in (True, False):
            backbone.train(mode)
            assert towers.relative(towers.encode(backbone, tower), unmerged) <= 1e-5
            assert towers.relative(plain(backbone, tower), unmerged) <= 1e-5

    def test_three_steps_leave_frozen_weights_bit_identical(self, label, name, tower):
        backbone = tried(label, name, tower).train()
        frozen = dict(backbone.named_tower_parameters())
        before, loss = {n: p.clone() for n, p in frozen.items()}, []
        hashed = label == "lora" and name in ("clip", "vit")  # which only repeats what is asked of each tensor
        digest = sha256_of(without_adapters(backbone)) if hashed else None
        optimizer = torch.optim.AdamW(trained(backbone).values(), lr=0.01, weight_decay=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            value = loss_of(backbone, tower)
            value.backward()
            optimizer.step()
            loss.append(value.item())
        assert loss[-1] < loss[0]
        assert all(p.grad is None and not p.requires_grad for p in frozen.values())
        assert [n for n, p in frozen.items() if not torch.equal(p, before[n])] == []
        assert not hashed or sha256_of(without_adapters(backbone)) == digest

    def test_bfloat16_autocast(self, label, name, tower):
        backbone = tried(label, name, tower)
        perturb(backbone, 0.03)
        exact, frozen = merged(backbone.eval(), tower), towers.untouched(name, tower)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            theirs = towers.relative(plain(towers.backbone(name), tower), frozen)
            assert towers.relative(merged(backbone, tower), exact) <= max(0.05, 3 * theirs)
            backbone.train()
            assert towers.relative(towers.encode(backbone, tower), exact) <= max(0.05, 3 * theirs)
            loss_of(backbone, tower).backward()
        grads = [p.grad for layer in layers_of(backbone).values() for p in layer.parameters() if p.requires_grad]
        reached = [g for g in grads if g is not None]
        assert reached
        assert all(g.dtype == torch.float32 and torch.isfinite(g).all() for g in reached)
        assert all(p.dtype == torch.float32 for p in backbone.parameters())

    def test_explicit_merging_folds_in_and_comes_out_exactly(self, label, name, tower):
        backbone = tried(label, name, tower)
        perturb(backbone)
        backbone.eval()
        if not all(layer.mergeable for layer in layers_of(backbone).values()):
            with pytest.raises(UserError, match="depends on its input") as error:
                merge(backbone)
            assert "\n" not in str(error.value)
            return
        unmerged, before = towers.encode(backbone, tower), plain(backbone, tower)
        untouched = towers.untouched(name, tower)
        state = {n: v.clone() for n, v in backbone.state_dict().items()}
        merge(backbone)
        assert towers.relative(towers.encode(backbone, tower), unmerged) <= 1e-5
        with pytest.raises(UserError, match="merged already"):
            merge(backbone)
        with backbone.unadapted():
            assert torch.equal(plain(backbone, tower), untouched)
        assert towers.relative(plain(backbone, tower), unmerged) <= 1e-5
        unmerge(backbone)
        assert state.keys() == backbone.state_dict().keys()
        assert all(torch.equal(v, state[n]) for n, v in backbone.state_dict().items())
        assert torch.equal(plain(backbone, tower), before)

    def test_merging_for_good_leaves_the_librarys_own_model(self, label, name, tower):
        backbone = tried(label, name, tower)
        perturb(backbone)
        backbone.eval()
        if not all(layer.mergeable for layer in layers_of(backbone).values()):
            with pytest.raises(UserError, match="depends on its input"):
                merge(backbone, keep=False)
            assert backbone.layers()
            return
        expected, modules = plain(backbone, tower), towers.original(name)
        merge(backbone, keep=False)
        check_library(backbone, name, modules)
        assert towers.relative(plain(backbone, tower), expected) <= 1e-5
        assert trained(backbone) == {}
        assert backbone.slots() == {}
        modules.load_state_dict(library_of(backbone).state_dict(), strict=True)
        if tower == "image":
            images = (towers.images(backbone) - backbone.mean) / backbone.std
            given = modules.encode_image(images) if LAYOUTS[name].library == "open_clip" else modules(images)
        else:
            given = modules.encode_text(towers.texts(backbone))
        assert towers.relative(given, expected) <= 1e-5

    def test_unadapted_is_exact_and_restores(self, label, name, tower):
        before = towers.untouched(name, tower)
        backbone = tried(label, name, tower)
        perturb(backbone)
        after, values = plain(backbone, tower), {n: p.clone() for n, p in trained(backbone).items()}
        with backbone.unadapted():
            assert torch.equal(plain(backbone, tower), before)
            assert torch.equal(merged(backbone, tower), before)
            assert torch.equal(towers.encode(backbone, tower), before)
        assert torch.equal(plain(backbone, tower), after)
        assert not torch.equal(after, before)
        assert all(torch.equal(p, values[n]) for n, p in trained(backbone).items())

    def test_detaching_leaves_what_was_built(self, label, name, tower):
        fresh, backbone = towers.backbone(name), tried(label, name, tower)
        optimizer = torch.optim.SGD(trained(backbone).values(), lr=0.1)
        loss_of(backbone.train(), tower).backward()
        optimizer.step()
        merged(backbone, tower)
        backbone.detach()
        assert torch.equal(plain(backbone, tower), plain(fresh, tower))
        check_untouched(backbone, fresh)
        if any(name.startswith(tower) for name in backbone.slots()):
            attach(label, backbone)  # and takes the next method
            assert layers_of(backbone)


def without_adapters(backbone: Backbone) -> torch.nn.Module:
    """What is frozen of a backbone, as a module to hash."""
    module = torch.nn.Module()
    for i, (_, parameter) in enumerate(backbone.named_tower_parameters()):
        module.register_buffer(str(i), parameter.detach())
    return module


@pytest.mark.parametrize("name", [n for n in LAYOUTS if LAYOUTS[n].prompts])
def test_learned_prompts_run_on_a_model_that_was_merged_for_good(name):
    backbone = adapted("lora", name)
    perturb(backbone)
    width = backbone.text_width
    prefix, deep = 0.1 * torch.randn(2, 4, width), 0.1 * torch.randn(1, 2, width)
    suffix, end = 0.1 * torch.randn(2, 3, 5, width), torch.tensor([5, 8, 6])
    with torch.no_grad():
        expected = [backbone.encode_embeddings(prefix, suffix, end, more) for more in (None, deep)]
        merge(backbone, keep=False)
        given = [backbone.encode_embeddings(prefix, suffix, end, more) for more in (None, deep)]
    for a, b in zip(given, expected, strict=True):
        assert towers.relative(a, b) <= 1e-5
