"""VPT against the libraries' own image towers with the tokens put in by hooks."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
import towers
from plain_prompts import (
    NAMES,
    disturb,
    encode,
    made,
    plain_logits,
    prompt_tokens,
    prompted_image,
    prompted_text,
    same_gradients,
    saved,
    trained,
)

from kshot.classifiers import (
    VPT,
    CLIPAdapter,
    CoOp,
    LinearProbe,
    LogisticProbe,
    MaPLe,
    NearestClassMean,
    PromptSRC,
    Shots,
    TextPrompt,
    TipAdapter,
)
from kshot.errors import UserError

OPEN_CLIP = ["clip", "clip_quick_gelu", "clip_layer_scale", "clip_custom", "clip_custom_all", "custom_text"]
TIMM = ["vit", "vit_qk_norm", "vit_no_bias", "vit_dinov2", "vit_dinov2_swiglu"]
REFUSED = ["resnet", "vit_dinov3", "vit_dinov3_bias", "vit_dinov3_swiglu", "eva02", "eva02_apart"]
POOLED = {  # other ways from tokens to a feature, from which learned tokens must stay away
    "clip_avg": towers.clip({"pool_type": "avg"}),
    "clip_pool_then_norm": towers.clip({"pool_type": "avg", "final_ln_after_pool": True}),
    "clip_attentional": towers.clip({"attentional_pool": True, "attn_pooler_heads": 2}),
    "clip_no_pre_norm": towers.clip({"no_ln_pre": True}),
    "clip_of_timm": towers.clip({"timm_model_name": "test_vit", "timm_pool": "avg", "timm_proj": "linear"}),
    "vit_avg": towers.vit(global_pool="avg"),
    "vit_map": towers.vit(global_pool="map"),
    "vit_pre_norm": towers.vit(pre_norm=True),
}
LABEL = torch.tensor([3, 0, 1])


def plain_features(given, name, images):
    """Image features of the untouched library with the classifier's tokens put in."""
    prompts = list(given.image_prompts)
    return prompted_image(towers.original(name), images, prompts, given.backbone.mean, given.backbone.std)


def refusal(*arguments, **settings) -> str:
    with pytest.raises(UserError) as error:
        made(VPT, *arguments, **settings)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        *((name, {"depth": 2}) for name in (*OPEN_CLIP, "siglip", *TIMM, *POOLED)),
        *((name, {"depth": 1}) for name in ("clip", "siglip", "vit", "clip_attentional", "vit_map")),
        *((name, {"prompt_length": 1, "depth": None}) for name in ("clip", "vit")),
    ],
)
def test_image_features_equal_the_library_with_tokens_put_in(name, settings, monkeypatch):
    """Every layout before each block; in the first alone, and one token, for towers of either library."""
    monkeypatch.setattr(towers, "LAYOUTS", towers.LAYOUTS | POOLED)
    given = disturb(made(VPT, name, **settings))
    images = towers.images(given.backbone, 2).requires_grad_()
    expected = plain_features(given, name, images)
    with torch.no_grad():
        assert towers.relative(encode(given, images), expected) <= 1e-5
        assert towers.relative(given.backbone.encode_image(images), expected) > 1e-3
    same_gradients(encode(given, images), expected, [images, given.image_prompts])


@pytest.mark.parametrize("depth", [1, 2, 3, 5])
@pytest.mark.parametrize("kind", ["clip", "vit"])
def test_states_go_on_after_the_last_block_with_tokens_of_its_own(kind, depth, monkeypatch):
    layout = towers.clip({"layers": 5}, image_blocks=5) if kind == "clip" else towers.vit(depth=5, image_blocks=5)
    monkeypatch.setitem(towers.LAYOUTS, f"deep_{kind}", layout)
    given = disturb(made(VPT, f"deep_{kind}", depth=depth, prompt_length=3))
    assert given.image_prompts.shape == (depth, 3, 32)
    images = towers.images(given.backbone, 2)
    expected = plain_features(given, f"deep_{kind}", images)
    same_gradients(encode(given, images), expected, [given.image_prompts])
    if depth < 5:  # tokens put in again after J would be another method
        prompts = [*given.image_prompts, given.image_prompts[-1]]
        original, backbone = towers.original(f"deep_{kind}"), given.backbone
        assert towers.relative(prompted_image(original, images, prompts, backbone.mean, backbone.std), expected) > 1e-3


@pytest.mark.parametrize("name", ["clip", "custom_text_eos", "siglip", "not_causal"])
def test_text_prompts_are_the_head_where_there_is_a_text_tower(name):
    given = disturb(made(VPT, name, depth=2))
    assert type(given.inner) is TextPrompt
    original, images = towers.original(name), towers.images(given.backbone)
    with torch.no_grad():
        text = original.encode_text(given.backbone.tokenize([f"a photo of a {n}." for n in NAMES[:4]]))
        expected = plain_logits(original, plain_features(given, name, images), text)
        assert towers.relative(given(encode(given, images)), expected) <= 1e-5
    terms = given.losses(encode(given, images), LABEL)
    assert towers.relative(terms["cross_entropy"], F.cross_entropy(expected, LABEL)) <= 1e-5
    assert trained(given).keys() == {"image_prompts"}
    assert saved(given).keys() == {"image_prompts"}


@pytest.mark.parametrize("name", TIMM)
def test_a_linear_layer_is_the_head_where_there_is_none(name):
    given = disturb(made(VPT, name))
    assert type(given.inner) is LinearProbe
    images = towers.images(given.backbone)
    features = plain_features(given, name, images)
    head = given.inner.head
    expected = F.normalize(features, dim=-1) * 32**0.5 @ head.weight.T + head.bias
    with torch.no_grad():
        assert towers.relative(given(encode(given, images)), expected) <= 1e-5
    loss = given.losses(encode(given, images), LABEL)["cross_entropy"]
    same_gradients(loss, F.cross_entropy(expected, LABEL), list(trained(given).values()))
    assert trained(given).keys() == {"image_prompts", "inner.head.weight", "inner.head.bias"}
    with pytest.raises(UserError, match="one row of weights for each training class"):
        given.set_class_names(NAMES[4:8])


@pytest.mark.parametrize("name", ["clip", "vit"])
def test_trainable_class_means_as_the_head(name):
    given = disturb(made(VPT, name, head=partial(NearestClassMean, trainable=True)))
    assert given.needs == {"shots"}
    images, label = towers.images(given.backbone, 8), torch.arange(4).repeat(2)
    features = encode(given, images)
    given.fit(Shots(features.detach()[None], label), None)
    means = torch.stack([F.normalize(features, dim=-1)[label == c].mean(0) for c in range(4)])
    expected = 20 * F.normalize(features, dim=-1) @ F.normalize(means, dim=-1).T
    assert towers.relative(given(features), expected) <= 1e-5
    given.losses(features, label)["cross_entropy"].backward()
    assert all(p.grad.abs().max() > 0 for p in trained(given).values())
    with pytest.raises(UserError, match="its means are those of the training classes"):
        given.set_class_names(NAMES)


def test_ivlp_is_the_prompts_of_both_towers():
    given = disturb(made(VPT, depth=2, head=partial(CoOp, init_words="a photo of a", depth=2)))
    original, images = towers.original("clip"), towers.images(given.backbone)
    coop = given.inner
    text = prompted_text(original, prompt_tokens(given.backbone, 4), coop.context, coop.deep)
    expected = plain_logits(original, plain_features(given, "clip", images), text)
    with torch.no_grad():
        assert towers.relative(given(encode(given, images)), expected) <= 1e-5
    same_gradients(given(encode(given, images)), expected, [given.image_prompts, coop.context, coop.deep])
    assert trained(given).keys() == {"image_prompts", "inner.context", "inner.deep"}
    given.set_class_names(NAMES)
    assert given(encode(given, images)).shape == (3, 10)
    assert coop.task.class_names == NAMES


def test_a_head_bound_to_its_classes_binds_the_whole():
    given = made(VPT, head=partial(CoOp, context_length=2, class_specific=True))
    with pytest.raises(UserError, match="a class-specific context") as error:
        given.set_class_names(NAMES)
    assert "CoOp cannot serve" in str(error.value)
    assert given.task == given.inner.task


def test_initial_values():
    prompts = made(VPT, prompt_length=200, depth=2).image_prompts.detach()
    assert prompts.shape == (2, 200, 32)
    assert float(prompts.std()) == pytest.approx(0.02, rel=0.05)
    assert abs(float(prompts.mean())) < 0.001


def test_nothing_means_nine_blocks_or_all(monkeypatch):
    monkeypatch.setitem(towers.LAYOUTS, "ten_image_blocks", towers.clip({"layers": 10}, image_blocks=10))
    assert len(made(VPT, "ten_image_blocks").image_prompts) == 9
    assert len(made(VPT).image_prompts) == 2


@pytest.mark.parametrize(("name", "kind"), [*((name, VPT) for name in REFUSED), ("resnet", MaPLe)])
def test_towers_without_room_for_tokens(name, kind):
    with pytest.raises(UserError) as error:
        made(kind, name)
    line = str(error.value)
    assert line.startswith(f"{kind.__name__} puts learned tokens into the image tower, which that of ")
    assert towers.folder_of(name).name in line
    assert "\n" not in line


@pytest.mark.parametrize(
    ("head", "label"), [(LogisticProbe, "LogisticProbe"), (NearestClassMean, "NearestClassMean"), (TipAdapter, "Tip")]
)
def test_heads_in_closed_form(head, label):
    line = refusal(head=head)
    assert line.startswith("VPT is trained by gradient steps, and ")
    assert label in line
    assert "closed form" in line


@pytest.mark.parametrize("head", [MaPLe, partial(PromptSRC, templates=["a {}"]), VPT])
def test_heads_with_image_prompts_of_their_own(head):
    assert "has image prompts of its own: use it without VPT" in refusal(head=head)


@pytest.mark.parametrize("depth", [0, -1, 3])
def test_depth_beyond_the_blocks(depth):
    assert f"VPT: depth is {depth}, and the image tower has 2 blocks: give 1 to 2" in refusal(depth=depth)
    assert f"depth is {depth}" in refusal("vit", depth=depth)


@pytest.mark.parametrize("length", [0, -4])
def test_no_prompts(length):
    assert f"VPT: prompt_length is {length}, and must be at least 1" in refusal(prompt_length=length)


@pytest.mark.parametrize("head", [CLIPAdapter, LinearProbe])
def test_other_heads_learn_with_the_prompts(head):
    given = disturb(made(VPT, head=head, depth=2))
    sum(given.losses(encode(given, towers.images(given.backbone)), LABEL).values()).backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in trained(given).values())
    assert len(trained(given)) == 3


def test_bfloat16_autocast_keeps_prompts_in_float32():
    given = disturb(made(VPT, depth=2))
    images = towers.images(given.backbone)
    exact = encode(given, images).detach()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        features = encode(given, images)
        loss = given.losses(features, LABEL)["cross_entropy"]
    assert loss.dtype == torch.float32
    assert towers.relative(features, exact) <= 0.05
    loss.backward()
    assert given.image_prompts.grad.dtype == torch.float32
    assert torch.isfinite(given.image_prompts.grad).all()
