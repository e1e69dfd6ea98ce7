"""Tuning of the towers' own parameters: all, biases or norms, with the untouched model always at hand."""

import pytest
import torch
import towers
from cases import check_library, check_untouched, library_of, loss_of, merged, perturb, plain, trained
from towers import LAYOUTS

from kshot.adapters import FullTuning, LoRA
from kshot.errors import UserError
from kshot.slots import merge


class TestFullTuning:
    @pytest.mark.parametrize(
        ("name", "target"), [("clip", "*"), ("clip", "image.*"), ("custom_text", "text.*"), ("vit", "*")]
    )
    def test_trains_what_is_named(self, name, target):
        backbone = towers.backbone(name)
        before = {n: p.clone() for n, p in backbone.named_tower_parameters()}
        FullTuning().attach(backbone, [target])
        backbone.train()
        chosen = {n for n, p in backbone.named_tower_parameters() if p.requires_grad}
        assert chosen == {n for n in before if target == "*" or n.startswith(target[:-1])}
        assert not any(n.startswith("initial_values") for n in backbone.state_dict())
        towers_trained = [t for t in LAYOUTS[name].towers if any(n.startswith(t) for n in chosen)]
        optimizer = torch.optim.SGD(trained(backbone).values(), lr=0.1)
        sum(loss_of(backbone, t) for t in towers_trained).backward()
        without = [n for n, p in backbone.named_tower_parameters() if p.requires_grad and not p.grad.abs().max() > 0]
        assert [n for n in without if "k_bias" not in n] == []
        optimizer.step()
        changed = {n for n, p in backbone.named_tower_parameters() if not torch.equal(p, before[n])}
        assert changed == chosen

    @pytest.mark.parametrize("name", [n for n in LAYOUTS if LAYOUTS[n].image_blocks])
    @pytest.mark.parametrize("only", ["bias", "norm"])
    def test_biases_or_norms_alone(self, only, name):
        backbone = towers.backbone(name)
        FullTuning(only=only).attach(backbone, ["image.*"])
        chosen = {n for n, p in backbone.named_tower_parameters() if p.requires_grad}
        assert chosen
        assert all(n.startswith("image.") for n in chosen)
        every = {n: p for n, p in backbone.named_tower_parameters() if n.startswith("image.")}
        if only == "bias":
            assert chosen == {n for n in every if n.endswith("bias")}
        else:
            assert all(every[n].ndim <= 1 for n in chosen), "norms have scales and shifts"
            assert all("norm" in n or "ln" in n or "mlp.ffn_ln" in n for n in chosen), chosen
            assert {n for n in every if "norm1.weight" in n or "ln_1.weight" in n} <= chosen
        backbone.train()
        loss_of(backbone, "image").backward()
        reached = {n for n, p in every.items() if p.grad is not None}
        assert reached == chosen

    def test_starts_where_the_original_is(self):
        before = towers.untouched("clip", "image")
        backbone = towers.backbone()
        FullTuning().attach(backbone, ["*"])
        assert torch.equal(merged(backbone, "image"), before)
        assert towers.relative(towers.encode(backbone.train(), "image"), before) <= 1e-5

    @pytest.mark.parametrize("tower", ["image", "text"])
    def test_unadapted_is_exact_nests_and_survives_errors(self, tower):
        before = towers.untouched("clip", tower)
        backbone = towers.backbone()
        FullTuning().attach(backbone, ["*"])
        loss_of(backbone, tower).backward()
        torch.optim.SGD(trained(backbone).values(), lr=0.1).step()
        values = {n: p.clone() for n, p in trained(backbone).items()}
        after = merged(backbone, tower)
        assert towers.relative(after, before) > 1e-3
        with backbone.unadapted():
            assert torch.equal(merged(backbone, tower), before)
            with backbone.unadapted():
                assert torch.equal(merged(backbone, tower), before)
            assert torch.equal(merged(backbone, tower), before)
        with pytest.raises(RuntimeError, match="stop"), backbone.unadapted():
            raise RuntimeError("stop")
        assert torch.equal(merged(backbone, tower), after)
        assert all(torch.equal(p, values[n]) and p.requires_grad for n, p in trained(backbone).items())

    def test_works_together_with_lora(self):
        before = towers.untouched("clip", "image")
        backbone = towers.backbone()
        LoRA(rank=2).attach(backbone, ["image.*"])
        FullTuning().attach(backbone, ["image.*ln_*"])
        perturb(backbone)
        after = merged(backbone, "image")
        assert towers.relative(after, towers.encode(backbone, "image")) <= 1e-5
        with backbone.unadapted():
            assert torch.equal(merged(backbone, "image"), before)
        assert torch.equal(merged(backbone, "image"), after)

    @pytest.mark.parametrize("path", ["factorised", "materialised"])
    def test_a_weight_and_its_adapter_train_together(self, path):
        """Each gets the gradient that one dense weight gives."""
        backbone, key = towers.backbone().double(), "image.transformer.resblocks.0.mlp.c_fc.weight"
        LoRA(rank=2, path=path).attach(backbone, ["image.0.fc1"])
        FullTuning().attach(backbone, [key])
        backbone.double()
        perturb(backbone)
        loss_of(backbone.train(), "image").backward()
        found = [p.grad.clone() for p in backbone.trainable("image")]
        merge(backbone, keep=False)
        weight = dict(backbone.named_tower_parameters())[key].requires_grad_()
        loss_of(backbone, "image").backward()
        assert len(found) == 3
        assert towers.relative(found[0], weight.grad) <= 1e-6  # the loss is float32

    def test_several_attachments_keep_the_first_values(self):
        fresh, backbone = towers.backbone(), towers.backbone()
        for only in ("norm", "bias"):
            FullTuning(only=only).attach(backbone, ["image.*"])
            perturb(backbone)
        assert any(n.endswith("ln_1.weight") for n in trained(backbone))
        assert any(n.endswith("c_fc.bias") for n in trained(backbone))
        with torch.inference_mode(), backbone.unadapted():
            assert torch.equal(plain(backbone, "image"), plain(fresh, "image"))
        backbone.detach()
        check_untouched(backbone, fresh)

    @pytest.mark.parametrize("name", ["clip", "clip_custom_all", "vit", "eva02", "vit_dinov3_bias"])
    def test_merging_for_good_leaves_the_librarys_own_model(self, name):
        backbone = towers.backbone(name)
        FullTuning().attach(backbone, ["image.*"])
        perturb(backbone)
        expected, library = plain(backbone, "image"), towers.original(name)
        merge(backbone, keep=False)
        assert trained(backbone) == {}
        check_library(backbone, name, library)
        assert towers.relative(plain(backbone, "image"), expected) <= 1e-6
        library.load_state_dict(library_of(backbone).state_dict(), strict=True)

    def test_a_pattern_without_match(self):
        with pytest.raises(UserError, match=r"'image\.0\.q' matches none") as error:
            FullTuning().attach(towers.backbone(), ["image.0.q"])
        assert "\n" not in str(error.value)
        assert "image.class_embedding" in str(error.value)
