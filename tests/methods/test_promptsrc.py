"""PromptSRC: its loss against plain formulas on the untouched library, its aggregation in closed form."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
import towers
from open_clip import OPENAI_IMAGENET_TEMPLATES
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
    teacher_of,
    trained,
    unit,
)

from kshot.adapters import FullTuning, LoRA
from kshot.classifiers import VPT, CoOp, PromptSRC
from kshot.classifiers.base import GaussianAverage
from kshot.errors import UserError
from kshot.templates import named_templates

LABEL = torch.tensor([3, 0, 1])
FORMS = [("clip", 2), ("clip", 1), ("clip_custom_all", 2), ("custom_text_eos", 2)]
SENTENCES = ("a photo of a {}.", "{} in the rain", "a small drawing of the old {}, a kind of thing.")


def frozen_of(name, images, backbone):
    """Image features of the untouched library."""
    with torch.no_grad():
        return towers.original(name).encode_image((images - backbone.mean) / backbone.std)


def frozen_text(name, templates, names=NAMES[:4]):
    """t⁰ by the formula: unit length only after the mean over templates."""
    backbone, original = towers.backbone(name), towers.original(name)
    with torch.no_grad():
        each = [original.encode_text(backbone.tokenize([t.format(n) for n in names])) for t in templates]
    return unit(sum(each) / len(each))


def plain(given, name, images):
    """Prompted text features, image features and logits of the library with the tokens put in."""
    original, backbone = towers.original(name), given.backbone
    tokens = prompt_tokens(backbone, len(given.context), given.task.class_names)
    text = prompted_text(original, tokens, given.context, [] if given.deep is None else given.deep)
    features = prompted_image(original, images, list(given.image_prompts), backbone.mean, backbone.std)
    return text, features, plain_logits(original, features, text)


class TestLoss:
    @pytest.mark.parametrize(
        ("name", "depth", "weights"),
        [
            *((name, depth, (25.0, 10.0, 1.0)) for name, depth in FORMS),
            *(("clip", 2, weights) for weights in ((25.0, 0.0, 0.0), (0.0, 10.0, 0.0), (0.0, 0.0, 1000.0))),
        ],
    )
    def test_is_that_of_the_formula(self, name, depth, weights):
        own = dict(zip(("text_weight", "image_weight", "logit_weight"), weights, strict=True))
        given = disturb(made(PromptSRC, name, depth=depth, templates=SENTENCES, **own))
        images = towers.images(given.backbone)
        v0, t0 = unit(frozen_of(name, images, given.backbone)), frozen_text(name, SENTENCES)
        text, features, z = plain(given, name, images)
        p0 = plain_logits(towers.original(name), v0, t0).softmax(-1)
        expected = {
            "cross_entropy": F.cross_entropy(z, LABEL),
            "text_consistency": weights[0] * (unit(text) - t0).abs().sum() / (4 * 24),
            "image_consistency": weights[1] * (unit(features) - v0).abs().sum() / (3 * 24),
            "logit_consistency": weights[2] * (p0 * (p0.log() - z.softmax(-1).log())).sum() / (3 * 4),
        }
        terms = given.losses(encode(given, images), LABEL, frozen_of(name, images, given.backbone))
        assert terms.keys() == expected.keys()
        for term, weight in zip(terms, (1.0, *weights), strict=True):
            if weight == 0:
                assert terms[term] == 0
            else:
                assert expected[term] > 0
                assert towers.relative(terms[term], expected[term]) <= 2e-5, term
        same_gradients(sum(terms.values()), sum(expected.values()), list(trained(given).values()), 2e-5)

    def test_the_published_weights_are_the_defaults(self):
        given = made(PromptSRC)
        assert (given.text_weight, given.image_weight, given.logit_weight) == (25, 10, 1)

    def test_regularisers_are_0_where_prompted_and_frozen_agree(self):
        given = made(PromptSRC, templates=SENTENCES)
        v0 = torch.randn(3, 24)
        terms = given.terms(3 * v0, 7 * given.teacher_text(), LABEL, v0)
        for name in ("text_consistency", "image_consistency", "logit_consistency"):
            assert abs(float(terms[name])) <= 1e-6, name

    def test_without_regularisers_and_averaging_it_is_ivlp(self):
        ivlp = disturb(made(VPT, depth=2, head=partial(CoOp, init_words="a photo of a", depth=2)))
        given = made(PromptSRC, depth=2, text_weight=0.0, image_weight=0.0, logit_weight=0.0, average_mean=None)
        state = {n.removeprefix("inner."): t for n, t in saved(ivlp).items()}
        assert given.load_state_dict(state, strict=False).unexpected_keys == []
        assert trained(given).keys() == state.keys()
        assert not any("average" in group for group in given.param_groups())
        images = towers.images(given.backbone)
        frozen = frozen_of("clip", images, given.backbone)
        losses = [sum(c.losses(encode(c, images), LABEL, frozen).values()) for c in (given, ivlp)]
        assert torch.equal(*losses)
        for c, loss in zip((given, ivlp), losses, strict=True):
            loss.backward()
            assert all(p.grad.abs().max() > 0 for p in trained(c).values())
        inner = trained(ivlp).items()
        assert all(torch.equal(trained(given)[n.removeprefix("inner.")].grad, p.grad) for n, p in inner)
        with torch.no_grad():
            assert torch.equal(given(encode(given, images)), ivlp(encode(ivlp, images)))

    def test_bfloat16_autocast(self):
        given = disturb(made(PromptSRC, templates=SENTENCES))
        images = towers.images(given.backbone)
        frozen = frozen_of("clip", images, given.backbone)
        exact = given.losses(encode(given, images), LABEL, frozen)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            terms = given.losses(encode(given, images), LABEL, frozen.bfloat16())
        for name, value in terms.items():
            assert value.dtype == torch.float32
            assert towers.relative(value, exact[name]) <= 0.1


class TestFrozen:
    def test_text_is_the_mean_of_sixty_sentences_not_normalised_before(self):
        name = "clip"
        given = made(PromptSRC, name)
        sixty = [str(template("{}")) for template in OPENAI_IMAGENET_TEMPLATES[:60]]
        expected = frozen_text(name, sixty)
        assert towers.relative(unit(given.teacher_text()), expected) <= 1e-5
        with torch.no_grad():
            tokens = [given.backbone.tokenize([t.format(n) for n in NAMES[:4]]) for t in sixty]
            first = unit(sum(unit(towers.original(name).encode_text(t)) for t in tokens))
        assert towers.relative(first, expected) > 1e-4

    @pytest.mark.parametrize(
        ("adapter", "targets"),
        [(None, []), (LoRA(rank=2), ["*"]), (FullTuning(), ["image.*", "text.transformer.*"])],
        ids=["none", "LoRA", "full"],
    )
    def test_both_are_of_the_untouched_towers(self, adapter, targets):
        """Whenever the losses ask for the text: before the first step, or as a run is resumed."""
        given = made(PromptSRC, templates=SENTENCES)
        if adapter is not None:
            adapter.attach(given.backbone, targets)
        disturb(given)
        images = towers.images(given.backbone)
        expected = frozen_of("clip", images, given.backbone)
        assert towers.relative(teacher_of(given, images), expected) <= 1e-5
        assert towers.relative(encode(given, images), expected) > 1e-2
        assert given.teacher is None
        given.losses(encode(given, images), LABEL, expected)
        assert towers.relative(unit(given.teacher), frozen_text("clip", SENTENCES)) <= 1e-5
        assert not given.teacher.requires_grad

    def test_text_follows_the_class_names(self):
        given = made(PromptSRC, templates=SENTENCES)
        images = towers.images(given.backbone)
        for names in (NAMES[:4], NAMES[4:8], NAMES):
            given.set_class_names(names)
            terms = given.losses(encode(given, images), LABEL, teacher_of(given, images))
            assert all(torch.isfinite(term) for term in terms.values())
            assert towers.relative(unit(given.teacher), frozen_text("clip", SENTENCES, names)) <= 1e-5

    def test_it_is_not_saved(self):
        given = made(PromptSRC, templates=SENTENCES)
        given.teacher_text()
        assert saved(given).keys() == {"image_prompts", "context", "deep"}

    def test_evaluation_uses_the_prompts_alone_and_serves_other_classes(self):
        given = disturb(made(PromptSRC, templates=SENTENCES))
        images = towers.images(given.backbone)
        with torch.no_grad():
            for names in (NAMES[:4], NAMES):
                given.set_class_names(names)
                assert towers.relative(given(encode(given, images)), plain(given, "clip", images)[2]) <= 1e-5


class TestTemplates:
    def test_named_ensembles(self):
        eighty = tuple(str(template("{}")) for template in OPENAI_IMAGENET_TEMPLATES)
        assert named_templates("imagenet80") == eighty
        assert len(set(eighty)) == 80
        assert named_templates("imagenet60") == eighty[:60]
        assert named_templates("imagenet60")[-1] == "itap of the {}."
        seven = named_templates("imagenet7")
        assert len(set(seven)) == 7
        assert set(seven) < set(eighty)
        assert {"itap of a {}.", "art of the {}.", "a photo of the small {}."} < set(seven)

    def test_sentences_are_taken_as_they_are(self):
        assert named_templates("{} in the rain") == ("{} in the rain",)
        assert named_templates(["{} in the rain", "a {}"]) == ("{} in the rain", "a {}")

    @pytest.mark.parametrize("name", ["imagenet", "imagenet8", "imagenet81", "a photo of a cat", ""])
    def test_an_unknown_name(self, name):
        with pytest.raises(UserError) as error:
            made(PromptSRC, templates=name)
        assert repr(name) in str(error.value)
        for known in ("imagenet7", "imagenet60", "imagenet80"):
            assert known in str(error.value)
        assert "\n" not in str(error.value)

    @pytest.mark.parametrize(
        "sentences", [["a photo"], ["a {}", "a photo"], ["a {} on a {}"], ["a {name}"], ["{"], [], "a {} on a {}"]
    )
    def test_sentences_without_one_place_for_the_name(self, sentences):
        with pytest.raises(UserError) as error:
            made(PromptSRC, templates=sentences)
        assert "{}" in str(error.value)
        assert "\n" not in str(error.value)


class TestAggregation:
    def test_every_prompt_is_averaged_with_the_gaussian_of_the_settings(self):
        """The callback that averages has tests of its own."""
        for settings, expected in (
            ({}, GaussianAverage(30.0, 30.0)),
            ({"average_mean": 6, "average_std": 10}, GaussianAverage(6, 10)),
            ({"average_mean": None}, None),
        ):
            groups = made(PromptSRC, templates=SENTENCES, **settings).param_groups()
            assert [group.get("average") for group in groups] == [expected] * 2

    @pytest.mark.parametrize("std", [0.0, -1.0, float("nan")])
    def test_a_bad_deviation(self, std):
        with pytest.raises(UserError, match="and must be positive"):
            made(PromptSRC, average_std=std)
