"""MaPLe against open_clip's own two towers with the learned and the projected tokens put in by hooks."""

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
    trained,
)

from kshot.classifiers import MaPLe
from kshot.errors import UserError

LABEL = torch.tensor([3, 0, 1])


def plain(given, name, images, words):
    """Logits by the formula, with ``words`` kept between the learned tokens and the class name."""
    original, backbone, names = towers.original(name), given.backbone, given.task.class_names
    text_prompts = [given.context, *([] if given.deep is None else given.deep)]
    tokens = prompt_tokens(backbone, len(given.context), names, words)
    text = prompted_text(original, tokens, text_prompts[0], text_prompts[1:])
    projected = [p @ w.weight.T + w.bias for p, w in zip(text_prompts, given.project, strict=True)]
    return plain_logits(original, prompted_image(original, images, projected, backbone.mean, backbone.std), text)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({}, "of a"),
        ({"depth": 1}, "of a"),
        ({"context_length": 3}, "a"),
        ({"context_length": None}, ""),
        ({"context_length": 3, "init_words": None, "depth": 2}, ""),
    ],
)
@pytest.mark.parametrize("name", ["clip", "clip_layer_scale", "clip_custom_all", "custom_text_eos"])
def test_equals_the_library_with_tokens_put_in_to_both_towers(name, settings, words):
    given = disturb(made(MaPLe, name, **settings))
    images = towers.images(given.backbone).requires_grad_()
    expected = plain(given, name, images, words)
    with torch.no_grad():
        assert towers.relative(given(encode(given, images)), expected) <= 1e-5
    inputs = trained(given)
    depth = settings.get("depth") or 2
    assert len(inputs) == (2 if depth > 1 else 1) + 2 * depth
    same_gradients(given(encode(given, images)), expected, [images, *inputs.values()])
    terms = given.losses(encode(given, images), LABEL)
    assert terms.keys() == {"cross_entropy"}
    assert towers.relative(terms["cross_entropy"], F.cross_entropy(expected, LABEL)) <= 1e-5


def test_starts():
    given = made(MaPLe)
    table = towers.original("clip").token_embedding.weight
    assert torch.equal(given.context, table[given.backbone.token_ids("a photo")])
    assert given.deep.shape == (1, 2, 32)
    random = made(MaPLe, context_length=60, init_words=None)
    for tokens in (random.context, random.deep):
        assert float(tokens.detach().std()) == pytest.approx(0.02, rel=0.1)
    with torch.no_grad():  # without deep prompts the sentence is whole at the start: "a photo of a cat."
        text = towers.original("clip").encode_text(given.backbone.tokenize([f"a photo of a {n}." for n in NAMES[:4]]))
        assert towers.relative(made(MaPLe, depth=1).encode(), text) <= 1e-5
    assert [(p.in_features, p.out_features) for p in given.project] == [(32, 32)] * 2


def test_deep_projections_start_as_clones_of_one(monkeypatch):
    """The authors' ``compound_prompt_projections`` are clones of one layer; the first block has another."""
    monkeypatch.setitem(towers.LAYOUTS, "four_blocks", towers.clip({"layers": 4}, {"layers": 4}, image_blocks=4))
    first, *deep = made(MaPLe, "four_blocks").project
    assert len(deep) == 3
    for projection in deep[1:]:
        assert torch.equal(projection.weight, deep[0].weight)
        assert torch.equal(projection.bias, deep[0].bias)
        assert projection.weight is not deep[0].weight
    assert not torch.equal(first.weight, deep[0].weight)
    bound = 32**-0.5  # torch's default for a linear layer
    for projection in (first, deep[0]):
        for tensor in (projection.weight, projection.bias):
            assert 0.5 * bound < float(tensor.detach().abs().max()) <= bound


def test_towers_of_different_widths_and_the_count(monkeypatch):
    wide = towers.clip({"width": 48, "layers": 4}, {"width": 40, "layers": 3, "heads": 4}, image_blocks=4)
    monkeypatch.setitem(towers.LAYOUTS, "wide_image", wide)
    given = disturb(made(MaPLe, "wide_image"))
    expected = 3 * 2 * 40 + 3 * (40 * 48 + 48)
    assert sum(p.numel() for p in trained(given).values()) == expected
    images = towers.images(given.backbone)
    given_logits = given(encode(given, images))
    same_gradients(given_logits, plain(given, "wide_image", images, "of a"), list(trained(given).values()))


@pytest.mark.parametrize(("image", "text"), [(1, 2), (2, 1), (3, 10), (10, 3), (12, 12)])
def test_nothing_means_nine_blocks_or_all_of_the_smaller_tower(image, text, monkeypatch):
    layout = towers.clip({"layers": image}, {"layers": text}, image_blocks=image)
    monkeypatch.setitem(towers.LAYOUTS, f"blocks_{image}_{text}", layout)
    assert len(made(MaPLe, f"blocks_{image}_{text}").project) == min(9, image, text)


def test_other_classes_keep_what_was_learned():
    given, fresh = disturb(made(MaPLe)), disturb(made(MaPLe, names=NAMES))
    images = towers.images(given.backbone)
    with torch.no_grad():
        before = given(encode(given, images))
        given.set_class_names(NAMES)
        assert torch.equal(given(encode(given, images)), fresh(encode(fresh, images)))
        given.set_class_names(NAMES[:4])
        assert torch.equal(given(encode(given, images)), before)
    saved = {n for n in given.state_dict() if not n.startswith("backbone.")}
    assert saved == {"context", "deep", *(f"project.{j}.{part}" for j in range(2) for part in ("weight", "bias"))}


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"depth": 3}, "depth is 3, and the text tower has 2 blocks"),
        ({"depth": 0}, "depth is 0"),
        ({"context_length": 5}, "4 tokens, but context_length is 5"),
        ({"context_length": 2, "init_words": "hippopotamuses swim"}, "but context_length is 2"),  # part of a word
        ({"context_length": 72, "init_words": None}, "'very small old car'"),
    ],
)
def test_bad_settings(settings, expected):
    with pytest.raises(UserError) as error:
        made(MaPLe, **settings)
    assert str(error.value).startswith("MaPLe: ")
    assert expected in str(error.value)
    assert "\n" not in str(error.value)


def test_an_image_tower_with_fewer_blocks_than_the_depth(monkeypatch):
    monkeypatch.setitem(towers.LAYOUTS, "deep_text_only", towers.clip(text={"layers": 4}))
    with pytest.raises(UserError, match="MaPLe: depth is 3, and the image tower has 2 blocks: give 1 to 2"):
        made(MaPLe, "deep_text_only", depth=3)


@pytest.mark.parametrize("name", ["vit", "resnet", "not_causal"])
def test_towers_that_take_no_tokens(name):
    with pytest.raises(UserError) as error:
        made(MaPLe, name)
    assert str(error.value).startswith("MaPLe ")
    assert "\n" not in str(error.value)
