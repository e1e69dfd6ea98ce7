"""PromptSRC: its loss against plain formulas on the untouched library, its aggregation in closed form."""

import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
import towers
from open_clip import OPENAI_IMAGENET_TEMPLATES
from plain_prompts import (
    NAMES,
    disturb,
    made,
    plain_logits,
    prompt_tokens,
    prompted_image,
    prompted_text,
    same_gradients,
    trained,
    unit,
)

from kshot.adapters import FullTuning, LoRA
from kshot.classifiers import VPT, CoOp, PromptSRC
from kshot.classifiers.promptsrc import GaussianAverage
from kshot.classifiers.zero_shot import named_templates
from kshot.data import Batch
from kshot.errors import UserError
from kshot.module import FewShotModule

LABEL = torch.tensor([3, 0, 1])
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
    original, backbone, coop = towers.original(name), given.backbone, given.inner
    tokens = prompt_tokens(backbone, len(coop.context), given.task.class_names)
    text = prompted_text(original, tokens, coop.context, [] if coop.deep is None else coop.deep)
    features = prompted_image(original, images, list(given.image_prompts), backbone.mean, backbone.std)
    return text, features, plain_logits(original, features, text)


class TestLoss:
    @pytest.mark.parametrize("weights", [(25.0, 10.0, 1.0), (25.0, 0.0, 0.0), (0.0, 10.0, 0.0), (0.0, 0.0, 1000.0)])
    @pytest.mark.parametrize(
        ("name", "depth"), [("clip", 2), ("clip", 1), ("clip_custom_all", 2), ("custom_text_eos", 2)]
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
        terms = given.losses(given.encode_image(images), LABEL, frozen_of(name, images, given.backbone))
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
        terms = given.terms(3 * v0, 7 * given.frozen_text, LABEL, v0)
        for name in ("text_consistency", "image_consistency", "logit_consistency"):
            assert abs(float(terms[name])) <= 1e-6, name

    def test_without_regularisers_and_averaging_it_is_ivlp(self):
        ivlp = disturb(made(VPT, depth=2, head=partial(CoOp, init_words="a photo of a", depth=2)))
        given = made(PromptSRC, depth=2, text_weight=0.0, image_weight=0.0, logit_weight=0.0, average_mean=None)
        state = {n: t for n, t in ivlp.state_dict().items() if not n.startswith("backbone.")}
        assert given.load_state_dict(state, strict=False).unexpected_keys == []
        assert trained(given).keys() == trained(ivlp).keys() == state.keys()
        assert given.averaging is None
        images = towers.images(given.backbone)
        frozen = frozen_of("clip", images, given.backbone)
        losses = [sum(c.losses(c.encode_image(images), LABEL, frozen).values()) for c in (given, ivlp)]
        assert torch.equal(*losses)
        for c, loss in zip((given, ivlp), losses, strict=True):
            loss.backward()
            assert all(p.grad.abs().max() > 0 for p in trained(c).values())
        assert all(torch.equal(trained(given)[n].grad, p.grad) for n, p in trained(ivlp).items())
        with torch.no_grad():
            assert torch.equal(given(given.encode_image(images)), ivlp(ivlp.encode_image(images)))

    def test_bfloat16_autocast(self):
        given = disturb(made(PromptSRC, templates=SENTENCES))
        images = towers.images(given.backbone)
        frozen = frozen_of("clip", images, given.backbone)
        exact = given.losses(given.encode_image(images), LABEL, frozen)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            terms = given.losses(given.encode_image(images), LABEL, frozen.bfloat16())
        for name, value in terms.items():
            assert value.dtype == torch.float32
            assert towers.relative(value, exact[name]) <= 0.1


class TestFrozen:
    @pytest.mark.parametrize("name", ["clip", "custom_text_eos"])
    def test_text_is_the_mean_of_sixty_sentences_not_normalised_before(self, name):
        given = made(PromptSRC, name)
        sixty = [str(template("{}")) for template in OPENAI_IMAGENET_TEMPLATES[:60]]
        expected = frozen_text(name, sixty)
        assert towers.relative(given.frozen_text, expected) <= 1e-5
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
        classifier = partial(PromptSRC, templates=SENTENCES)
        module = FewShotModule(towers.backbone(), classifier, NAMES[:4], adapter=adapter, targets=targets)
        disturb(module)
        module.preflight(4)
        assert towers.relative(module.classifier.frozen_text, frozen_text("clip", SENTENCES)) <= 1e-5
        images = towers.images(module.backbone)
        batch, expected = Batch(images, LABEL, LABEL), frozen_of("clip", images, module.backbone)
        assert towers.relative(module.frozen_features_of(batch), expected) <= 1e-5
        assert towers.relative(module.features_of(batch), expected) > 1e-2
        given = torch.randn(3, 24)
        assert torch.equal(module.frozen_features_of(batch._replace(frozen=given)), given)
        a, b = (module.losses(batch._replace(frozen=f)) for f in (None, expected))
        assert all(towers.relative(a[term], b[term]) <= 1e-5 for term in a)

    def test_it_is_not_saved(self):
        given = made(PromptSRC)
        saved = {n for n in given.state_dict() if not n.startswith("backbone.")}
        assert saved == {"image_prompts", "inner.context", "inner.deep"}

    def test_evaluation_uses_the_prompts_alone_and_serves_other_classes(self):
        given = disturb(made(PromptSRC, templates=SENTENCES))
        images = towers.images(given.backbone)
        with torch.no_grad():
            for names in (NAMES[:4], NAMES):
                given.set_class_names(names)
                assert towers.relative(given(given.encode_image(images)), plain(given, "clip", images)[2]) <= 1e-5


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


def gaussian(mean: float, std: float, epochs: range) -> torch.Tensor:
    """Weights of the epochs, summed to 1 in double precision whatever their size."""
    exponents = [-((e - mean) ** 2) / (2 * std**2) for e in epochs]
    return torch.tensor([x - max(exponents) for x in exponents], dtype=torch.float64).softmax(0)


class TestGaussianAverage:
    @pytest.mark.parametrize(
        ("mean", "std", "epochs"), [(15, 1, 20), (6, 10, 20), (30, 30, 50), (45, 5, 50), (2.5, 0.7, 4)]
    )
    def test_weights_sum_to_one_and_peak_at_the_mean(self, mean, std, epochs):
        average = GaussianAverage(mean, std)
        for e in range(1, epochs + 1):
            average.add(e, {"w": F.one_hot(torch.tensor(e - 1), epochs).double()})
        weights = average.mean()["w"]
        assert float(weights.sum()) == pytest.approx(1, abs=1e-6)
        assert abs(int(weights.argmax()) + 1 - mean) <= 0.5
        torch.testing.assert_close(weights.double(), gaussian(mean, std, range(1, epochs + 1)), rtol=1e-5, atol=1e-7)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize(("mean", "std"), [(3.0, 2.0), (8.0, 1.0), (1.0, 0.5)])
    def test_is_the_closed_form_over_a_trajectory_in_float32(self, mean, std, dtype):
        average, steps = GaussianAverage(mean, std), torch.randn(8, 3, 5).to(dtype)
        parameter = torch.nn.Parameter(torch.zeros(3, 5, dtype=dtype))
        for e in range(1, 9):
            with torch.no_grad():
                parameter.copy_(steps[e - 1])  # the average must not follow later changes in place
            average.add(e, {"w": parameter})
        expected = (gaussian(mean, std, range(1, 9)).view(-1, 1, 1) * steps.double()).sum(0)
        assert average.mean()["w"].dtype == torch.float32
        assert not average.mean()["w"].requires_grad
        assert towers.relative(average.mean()["w"], expected) <= 1e-6

    @pytest.mark.parametrize(("mean", "std"), [(15, 1), (30, 1), (50, 0.5)])
    def test_a_run_that_ends_long_before_the_peak(self, mean, std):
        """As with a recipe's mean and a shorter run, or a test of last.ckpt early in a run."""
        average, steps = GaussianAverage(mean, std), 0.02 * torch.randn(3, 6)
        for e in (1, 2, 3):
            average.add(e, {"w": steps[e - 1]})
            expected = (gaussian(mean, std, range(1, e + 1)).view(-1, 1) * steps[:e].double()).sum(0)
            assert towers.relative(average.mean()["w"], expected) <= 1e-5

    def test_only_the_epochs_that_were_run_count(self):
        average, steps = GaussianAverage(6, 2), torch.randn(9, 4)
        for e in (4, 5, 8):
            average.add(e, {"w": steps[e]})
        weights = torch.tensor([math.exp(-((e - 6) ** 2) / 8) for e in (4, 5, 8)], dtype=torch.float64)
        expected = (weights.view(-1, 1) * steps[[4, 5, 8]].double()).sum(0) / weights.sum()
        assert towers.relative(average.mean()["w"], expected) <= 1e-6
        assert GaussianAverage(6, 2).mean() == {}

    def test_a_tensor_that_changes_its_shape_starts_anew(self):
        average, values = GaussianAverage(2, 3), torch.randn(4, 6)
        for e, width in ((1, 6), (2, 6), (3, 4), (4, 4)):
            average.add(e, {"w": values[e - 1, :width], "still": values[e - 1]})
        w3, w4 = gaussian(2, 3, range(3, 5))
        assert towers.relative(average.mean()["w"], w3 * values[2, :4] + w4 * values[3, :4]) <= 1e-6
        whole = (gaussian(2, 3, range(1, 5)).view(-1, 1) * values).sum(0)
        assert towers.relative(average.mean()["still"], whole) <= 1e-6

    def test_state_round_trip_on_disk(self, tmp_path):
        straight, steps = GaussianAverage(3, 1), torch.randn(6, 5)
        resumed = GaussianAverage(3, 1)
        for e in range(1, 7):
            straight.add(e, {"w": steps[e - 1]})
            resumed.add(e, {"w": steps[e - 1]})
            torch.save(resumed.state(), tmp_path / "state.pt")
            resumed = GaussianAverage(3, 1)
            resumed.load_state(torch.load(tmp_path / "state.pt", weights_only=True))
        assert torch.equal(straight.mean()["w"], resumed.mean()["w"])
        a, b = straight.mean()["w"].clone(), straight.state()
        resumed.load_state(b)
        resumed.add(7, {"w": steps[0]})
        assert torch.equal(straight.mean()["w"], a)

    @pytest.mark.parametrize("std", [0.0, -1.0, float("nan")])
    def test_a_bad_deviation(self, std):
        with pytest.raises(UserError, match="and must be positive"):
            made(PromptSRC, average_std=std)
