"""Attention rollout against the attention that the libraries' own models compute."""

from functools import partial

import pytest
import torch
from towers import build, folder_of, original

from kshot.adapters import LoRA
from kshot.backbones import Timm
from kshot.classifiers import VPT, LinearProbe
from kshot.errors import UserError
from kshot.holding import merged
from kshot.module import FewShotModule
from kshot.seeing.rollout import rollout


def module_of(name, **settings):
    return FewShotModule(build(name), class_names=["a", "b"], **({"classifier": LinearProbe} | settings)).eval()


def images(count=2, size=32):
    return torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


def attention_of_library(name, module, image):
    """The mean attention of the heads of each block, (B, L, L), of the library's own model."""
    model, found = original(name), []
    vit = getattr(model, "visual", model)
    if hasattr(vit, "blocks"):
        for block in vit.blocks:
            block.attn.fused_attn = False
            block.attn.attn_drop.register_forward_pre_hook(lambda _, given: found.append(given[0].mean(1)))
    else:
        for block in vit.transformer.resblocks:
            block.attn.register_forward_pre_hook(
                lambda attn, given: found.append(attn.__class__.forward(attn, *[given[0]] * 3, need_weights=True)[1])
            )
    with torch.no_grad():
        vit(module.backbone.normalised(image))
    return found


@pytest.mark.parametrize(
    ("name", "pooled"),
    [
        ("clip", lambda rows: rows[:, 0]),
        ("clip_quick_gelu", lambda rows: rows[:, 0]),
        ("vit", lambda rows: rows[:, 0]),
        ("vit_qk_norm", lambda rows: rows[:, 0]),
        ("vit_no_bias", lambda rows: rows.mean(1)),  # the mean of its patches, and no class token
        ("vit_dinov2", lambda rows: rows[:, 0]),  # with registers
    ],
)
def test_it_is_the_product_over_the_librarys_attention(name, pooled):
    module = module_of(name)
    image, reach = images(size=module.backbone.image_size), None
    side = module.backbone.image_size // 8
    for attention in attention_of_library(name, module, image):
        mixed = 0.5 * attention + 0.5 * torch.eye(attention.shape[-1])
        reach = mixed if reach is None else mixed @ reach
    expected = pooled(reach)[:, -(side**2) :]
    expected = (expected / expected.amax(1, keepdim=True)).reshape(2, side, side)
    torch.testing.assert_close(rollout(module, image), expected, rtol=1e-4, atol=1e-5)


def test_it_leaves_nothing_behind():
    module, image = module_of("vit"), images()
    before = module(image)
    rollout(module, image)
    assert torch.equal(module(image), before)
    assert not [each for each in module.modules() if each._forward_pre_hooks or each._forward_hooks]


def test_probed_features_are_rolled_out_from_what_they_join():
    """``cls+mean`` joins both, so that it is a sum of the two."""
    found = {}
    for features in ("cls", "mean", "cls+mean"):
        backbone = Timm(f"local-dir:{folder_of('vit')}", features=features)
        module = FewShotModule(backbone, class_names=["a", "b"], classifier=LinearProbe).eval()
        found[features] = rollout(module, images(1))
    both = torch.stack([found["cls"].flatten(), found["mean"].flatten()], 1)
    shares = torch.linalg.lstsq(both, found["cls+mean"].flatten()).solution
    assert (shares > 0.05).all()
    torch.testing.assert_close(both @ shares, found["cls+mean"].flatten(), rtol=1e-4, atol=1e-5)


def test_an_adapter_changes_it_as_its_merged_weights_do():
    module = module_of("vit", adapter=LoRA(rank=2), targets=["image.*"])
    before = rollout(module, images())
    with torch.no_grad():
        for parameter in module.trained().values():
            parameter.add_(torch.randn_like(parameter))
    after = rollout(module, images())
    assert (after - before).abs().max() > 0.01
    with merged(module.classifier):
        torch.testing.assert_close(rollout(module, images()), after, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("depth", [1, 2])
def test_learned_tokens_carry_what_they_took_up_until_others_take_their_place(depth):
    """Over all tokens by plain products: where a block has tokens of its own, the rows of those before are nothing."""
    module = module_of("vit", classifier=partial(VPT, prompt_length=3, depth=depth))
    with torch.no_grad():
        module.classifier.image_prompts.mul_(100)
    seen, image = [], images(1)
    for block in module.backbone.vit.blocks:
        q_and_k = block.attn.heads_of

        def noting(x, q_and_k=q_and_k):
            q, k, v = q_and_k(x)
            seen.append((q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5).softmax(-1).mean(1)[0])
            return q, k, v

        block.attn.heads_of = noting
    module.encode_image(image)
    attention = [each.detach() for each in seen]
    for block in module.backbone.vit.blocks:
        del block.attn.heads_of
    whole = torch.eye(20)
    for i, each in enumerate(attention):
        if i < depth:
            whole[17:] = 0
        whole = (0.5 * each + 0.5 * torch.eye(20)) @ whole
    expected = whole[0, 1:17]
    torch.testing.assert_close(
        rollout(module, image)[0], (expected / expected.max()).reshape(4, 4), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("name", ["vit_dinov3", "eva02", "resnet"])
def test_other_blocks_are_refused(name):
    with pytest.raises(UserError, match="has no blocks of plain attention"):
        rollout(module_of(name), images())


def test_pooling_by_attention_is_refused():
    module = module_of("siglip")
    with pytest.raises(UserError, match="pools by map: rollout is for a class token or the mean of the patches"):
        rollout(module, torch.zeros(1, 3, module.backbone.image_size, module.backbone.image_size))
