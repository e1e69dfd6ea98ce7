"""CoCoOp against prompts that are assembled and encoded one image and one class at a time, at full length."""

import pytest
import torch
import torch.nn.functional as F
import towers
from plain_prompts import (
    NAMES,
    disturb,
    features_of,
    made,
    plain_logits,
    prompt_tokens,
    prompted_text,
    same_gradients,
    trained,
    unit,
)

from kshot.classifiers import CoCoOp, CoOp
from kshot.errors import UserError


def plain(given, features, name="clip"):
    """Logits by the formula: every image's own context through the library's text tower."""
    original, names = towers.original(name), given.task.class_names
    down, up = (x for x in given.meta_net if isinstance(x, torch.nn.Linear))
    hidden = torch.clamp(unit(features) @ down.weight.T + down.bias, min=0)
    shift = hidden @ up.weight.T + up.bias
    tokens, rows = prompt_tokens(given.backbone, len(given.context), names), []
    for image, pi in zip(features, shift, strict=True):
        rows.append(plain_logits(original, image[None], prompted_text(original, tokens, given.context + pi)))
    return torch.cat(rows)


@pytest.mark.parametrize("settings", [{"reduction": 4}, {"context_length": 2, "init_words": None, "reduction": 3}])
@pytest.mark.parametrize("name", towers.WITH_PROMPTS)
def test_equals_a_plain_computation_image_by_image(name, settings):
    given = disturb(made(CoCoOp, name, **settings))
    features = features_of(given, 3).requires_grad_()
    expected = plain(given, features, name)
    with torch.no_grad():
        assert towers.relative(given(features), expected) <= 1e-5
    inputs = trained(given)
    assert len(inputs) == 5
    same_gradients(given(features), expected, [features, *inputs.values()])


def test_the_loss_is_the_cross_entropy():
    given, label = disturb(made(CoCoOp, reduction=4)), torch.tensor([3, 0, 1])
    features = features_of(given, 3)
    terms = given.losses(features, label)
    assert terms.keys() == {"cross_entropy"}
    assert towers.relative(terms["cross_entropy"], F.cross_entropy(plain(given, features), label)) <= 1e-5


def test_a_meta_net_of_zeros_is_coop():
    given, coop = made(CoCoOp, reduction=4), made(CoOp, init_words="a photo of a")
    features = features_of(given)
    with torch.no_grad():
        assert towers.relative(given(features), coop(features)) > 1e-4
        for parameter in given.meta_net.parameters():
            parameter.zero_()
        assert towers.relative(given(features), coop(features)) <= 1e-5


@pytest.mark.parametrize("gradient", [True, False])
def test_a_batch_is_its_images_one_by_one(gradient):
    given = disturb(made(CoCoOp, reduction=4))
    features = features_of(given, 7)
    with torch.set_grad_enabled(gradient):
        together = given(features)
        assert towers.relative(torch.cat([given(f[None]) for f in features]), together) <= 1e-5
        assert towers.relative(given(features.flip(0)), together.flip(0)) <= 1e-5
    assert towers.relative(given.text_features(features)[0], given.text_features(features)[1]) > 1e-3


def test_the_meta_net_reads_normalised_features():
    given = disturb(made(CoCoOp, reduction=4))
    seen = []
    given.meta_net.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    features = features_of(given)
    logits = given(features)
    assert towers.relative(given(features * torch.linspace(0.01, 90, 6)[:, None]), logits) <= 1e-5
    for x in seen:
        assert towers.relative(x, unit(features)) <= 1e-6


@pytest.mark.parametrize("images", [1, 5])
def test_parts_within_a_memory_budget_give_the_same(images):
    whole, parts = (disturb(made(CoCoOp, names=NAMES, reduction=4)) for _ in range(2))
    for budget in (250_000, 1_500_000):  # less, and more, than the prompts of one image
        parts.backbone.text_memory = budget
        features = features_of(whole, images)
        encode, sizes = parts.backbone.encode_part, []
        parts.backbone.encode_part = lambda p, s, *rest: sizes.append(tuple(s.shape[:2])) or encode(p, s, *rest)  # noqa: B023
        for classifier in (whole, parts):
            classifier.zero_grad()
            classifier(features).square().sum().backward()
        del parts.backbone.encode_part
        assert len(sizes) > 1 or (images == 1 and budget > 1e6)
        assert all(g == 1 or c == len(NAMES) for g, c in sizes)
        assert towers.relative(parts(features), whole(features)) <= 1e-5
        for a, b in zip(trained(parts).values(), trained(whole).values(), strict=True):
            assert towers.relative(a.grad, b.grad) <= 1e-5
        with torch.no_grad():
            assert towers.relative(parts(features), whole(features)) <= 1e-5


def test_starts_and_counts():
    given = made(CoCoOp)
    table = towers.original("clip").token_embedding.weight
    assert torch.equal(given.context, table[given.backbone.token_ids("a photo of a")])
    down, _, up = given.meta_net
    assert (down.in_features, down.out_features) == (24, 24 // 16)
    assert (up.in_features, up.out_features) == (24 // 16, 32)
    for reduction in (1, 5, 24):
        hidden = 24 // reduction
        count = sum(p.numel() for p in trained(made(CoCoOp, reduction=reduction)).values())
        assert count == 4 * 32 + (24 * hidden + hidden) + (hidden * 32 + 32)


def test_other_classes_keep_context_and_net():
    given = disturb(made(CoCoOp, reduction=4))
    features = features_of(given, 2)
    with torch.no_grad():
        given.set_class_names(NAMES)
        assert given(features).shape == (2, 10)
        assert towers.relative(given(features), plain(given, features)) <= 1e-5
    assert given.class_bound is None


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"reduction": 0}, "reduction is 0, and must lie between 1 and the feature width 24"),
        ({"reduction": 25}, "reduction is 25"),
        ({"context_length": 3}, "4 tokens, but context_length is 3"),
    ],
)
def test_bad_settings(settings, expected):
    with pytest.raises(UserError) as error:
        made(CoCoOp, **settings)
    assert str(error.value).startswith("CoCoOp: ")
    assert expected in str(error.value)
    assert "\n" not in str(error.value)
