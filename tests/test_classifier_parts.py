"""What classifiers are made of, alone, and the plainest of them against references of their formulas."""

import copy
import inspect
from contextlib import nullcontext
from functools import partial

import pytest
import torch
import torch.nn.functional as F
import towers
from sklearn.neighbors import NearestCentroid
from test_classifiers import NAMES, SENTENCES, TASK, count_encodes, disturb, features_of, made, unit

from kshot.adapters import FullTuning, LoRA
from kshot.classifiers import (
    VPT,
    CLIPAdapter,
    CoCoOp,
    CoOp,
    DePT,
    LinearProbe,
    LPPlusPlus,
    NearestClassMean,
    PromptSRC,
    Shots,
    Task,
    TaskRes,
    TextPrompt,
)
from kshot.classifiers.base import GaussianAverage, closed_form, exact, exact_linear, title_of
from kshot.errors import UserError
from kshot.holding import merged


class TestPrecision:
    def test_the_widest_dtype_and_at_least_float32(self):
        for dtypes, expected in (
            ([torch.bfloat16], torch.float32),
            ([torch.float16, torch.bfloat16], torch.float32),
            ([torch.float32, torch.bfloat16], torch.float32),
            ([torch.bfloat16, torch.float64], torch.float64),
        ):
            assert {t.dtype for t in exact(*(torch.zeros(2, dtype=d) for d in dtypes))} == {expected}

    def test_a_linear_layer_is_computed_so_under_autocast(self):
        layer, x = torch.nn.Linear(64, 3), torch.randn(5, 64)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            exactly, rounded = exact_linear(layer, x), exact_linear(layer, x.bfloat16())
            assert exact_linear(copy.deepcopy(layer).double(), x).dtype == torch.float64
        assert exactly.dtype == rounded.dtype == torch.float32
        torch.testing.assert_close(exactly, layer(x))
        torch.testing.assert_close(rounded, layer(x.bfloat16().float()))


class TestFunctions:
    def test_titles(self):
        backbone = towers.backbone()
        assert title_of(CoOp(backbone, TASK)) == "CoOp"
        assert title_of(PromptSRC(backbone, TASK)) == "PromptSRC"
        assert title_of(DePT(backbone, TASK, base=partial(VPT, head=CoOp))) == "DePT (VPT (CoOp))"

    def test_groups_of_composed_methods(self):
        average = GaussianAverage(3, 2)
        given = made(DePT, {"base": partial(PromptSRC, templates=SENTENCES, average_mean=3, average_std=2)})
        inner = given.inner
        assert [(g.get("head", False), g.get("lr_factor", 1.0), g.get("average")) for g in given.param_groups()] == [
            (False, 1.0, average),
            (True, 1.0, average),
            (True, 6.5, None),
        ]
        assert given.param_groups()[0]["params"] == [inner.image_prompts]
        assert {id(p) for p in given.param_groups()[1]["params"]} == {id(inner.context), id(inner.deep)}
        given = made(VPT, {"head": partial(CLIPAdapter, ratio=[0.1, 0.2])})
        assert given.needs == {"val"}
        assert [g.get("head", False) for g in given.param_groups()] == [False, True]


class TestTextIsHeld:
    @pytest.mark.parametrize(
        ("kind", "settings"),
        [
            (TextPrompt, {}),
            (CoOp, {"context_length": 2}),
            (CLIPAdapter, {"text_ratio": 0.2}),
            (TaskRes, {}),
            (LPPlusPlus, {"iterations": 2}),
            (VPT, {"head": CoOp}),
            (DePT, {"base": partial(VPT, head=CoOp)}),
        ],
        ids=lambda v: v.__name__ if inspect.isclass(v) else "",
    )
    def test_within_merged_the_text_tower_runs_once(self, kind, settings, monkeypatch):
        classifier = disturb(made(kind, settings, adapter=LoRA(rank=2)))
        calls, features = count_encodes(monkeypatch, classifier.backbone), features_of(classifier)
        with torch.no_grad():
            outside = [classifier(features) for _ in range(2)]
            assert torch.equal(*outside)
            assert len(calls) == 2
            with merged(classifier):
                assert len(calls) == 3
                for _ in range(3):
                    assert towers.relative(classifier(features), outside[0]) <= 1e-5
                assert len(calls) == 3
                classifier.set_class_names(classifier.task.class_names)
                assert len(calls) == 4
                assert towers.relative(classifier(features), outside[0]) <= 1e-5
                assert len(calls) == 4
            disturb(classifier)
            assert towers.relative(classifier(features), outside[0]) > 1e-3
            assert len(calls) == 5

    def test_text_that_depends_on_the_image_is_not_held(self):
        classifier = disturb(made(CoCoOp, {"reduction": 4}))
        features = features_of(classifier)
        with torch.no_grad():
            expected = classifier(features)
            with merged(classifier):
                assert classifier.held is None
                assert torch.equal(classifier(features), expected)

    @pytest.mark.parametrize(
        ("kind", "settings", "learns"),
        [
            (TextPrompt, {}, False),
            (TaskRes, {}, False),
            (CLIPAdapter, {"text_ratio": 0.2}, False),
            (CoOp, {"context_length": 2}, True),
        ],
    )
    def test_only_text_that_trains_carries_a_gradient(self, kind, settings, learns):
        """A run holds the others also while it trains."""
        classifier = made(kind, settings).train()
        assert classifier.encode().requires_grad == learns
        LoRA(rank=2).attach(classifier.backbone, ["image.*"])
        assert classifier.encode().requires_grad == learns
        with torch.no_grad():
            classifier.held = classifier.hold()
        classifier.losses(features_of(classifier), torch.arange(6) % 4)["cross_entropy"]
        classifier.backbone.detach()
        LoRA(rank=2).attach(classifier.backbone, ["text.*"])
        assert classifier.encode().requires_grad

    @pytest.mark.parametrize("adapter", [LoRA(rank=2), FullTuning()], ids=["LoRA", "FullTuning"])
    @pytest.mark.parametrize("where", ["plain", "merged"])
    def test_unadapted_reaches_what_is_held(self, adapter, where):
        """Logits of the untouched backbone inside ``unadapted``, of the adapted one outside."""
        original = TextPrompt(towers.backbone(), TASK)
        features = features_of(original)
        classifier = TextPrompt(towers.backbone(), TASK).eval()
        adapter.attach(classifier.backbone, ["text.*"])
        disturb(classifier)
        with torch.no_grad(), merged(classifier) if where == "merged" else nullcontext():
            adapted, expected = classifier(features), original(features)
            assert towers.relative(adapted, expected) > 1e-3
            for _ in range(2):
                with classifier.backbone.unadapted():
                    assert torch.equal(classifier(features), expected)
                assert torch.equal(classifier(features), adapted)


class TestTextPrompt:
    @pytest.mark.parametrize("name", towers.WITH_TEXT)
    def test_is_the_scaled_cosine_of_the_library(self, name):
        classifier, original = made(TextPrompt, {}, name=name), towers.original(name)
        backbone = classifier.backbone
        images = towers.images(backbone)
        tokens = backbone.tokenize([f"a photo of a {n}." for n in NAMES[:4]])
        with torch.no_grad():
            image = unit(original.encode_image((images - backbone.mean) / backbone.std))
            expected = original.logit_scale.exp() * image @ unit(original.encode_text(tokens)).T
            assert towers.relative(classifier(backbone.encode_image(images)), expected) <= 1e-5

    def test_an_ensemble_is_the_mean_of_normalised_features(self):
        templates = ("a photo of a {}.", "{} in the rain", "a small drawing of the old {}, a kind of thing.")
        classifier = made(TextPrompt, {}, Task(NAMES[:4], templates))
        original, features = towers.original("clip"), features_of(classifier)
        with torch.no_grad():
            each = [
                unit(original.encode_text(classifier.backbone.tokenize([t.format(n) for n in NAMES[:4]])))
                for t in templates
            ]
            expected = original.logit_scale.exp() * unit(features) @ unit(sum(each) / 3).T
            assert towers.relative(classifier(features), expected) <= 1e-5
            assert towers.relative(made(TextPrompt, {})(features), expected) > 1e-3

    def test_own_templates_come_first(self):
        task = Task(NAMES[:4], ("a photo of a {}.",))
        given = made(TextPrompt, {"templates": ["{} in the rain"]}, task)
        expected = made(TextPrompt, {}, Task(NAMES[:4], ("{} in the rain",)))
        features = features_of(given)
        assert torch.equal(given(features), expected(features))

    def test_a_class_name_that_does_not_fit(self):
        with pytest.raises(UserError, match="tokens"):
            made(TextPrompt, {}, Task(("cat", " ".join(["dog"] * 80))))


class TestNearestClassMean:
    def test_agrees_with_nearest_centroid_on_separate_classes(self):
        given = NearestClassMean(towers.backbone(), Task(NAMES[:5]))
        centres = 3 * torch.randn(5, 24)
        label = torch.arange(5).repeat_interleave(8)
        features = centres[label] + torch.randn(40, 24)
        given.fit(Shots(features[None], label), None)
        reference = NearestCentroid().fit(unit(features).numpy(), label.numpy())
        queries = centres.repeat(20, 1) + torch.randn(100, 24)
        assert given(queries).argmax(-1).tolist() == reference.predict(unit(queries).numpy()).tolist()
        torch.testing.assert_close(given.means, unit(torch.tensor(reference.centroids_)).float())

    def test_agrees_with_nearest_centroid_of_unit_length_everywhere(self):
        given = NearestClassMean(towers.backbone(), Task(NAMES))
        label = torch.tensor([*range(10), *range(10), 3, 3, 7])
        features = torch.randn(len(label), 24) * torch.rand(len(label), 1) * 9
        given.fit(Shots(features[None], label), None)
        means = torch.stack([unit(features)[label == c].mean(0) for c in range(10)])
        reference = NearestCentroid().fit(unit(means).numpy(), range(10))
        queries = torch.randn(200, 24)
        assert given(queries).argmax(-1).tolist() == reference.predict(unit(queries).numpy()).tolist()
        torch.testing.assert_close(given(queries), 20 * unit(queries) @ unit(means).T, rtol=1e-5, atol=1e-5)

    def test_scale_and_state(self):
        given, label = NearestClassMean(towers.backbone(), TASK, scale=5.0), torch.arange(4)
        features = torch.randn(4, 24)
        given.fit(Shots(features[None], label), None)
        torch.testing.assert_close(given(features).diagonal(), torch.full((4,), 5.0))
        assert "means" in given.state_dict()
        assert closed_form(given)
        assert not [p for p in given.parameters() if p.requires_grad]

    def test_trainable_means_start_where_the_closed_form_ends(self):
        features, label = torch.randn(12, 24), torch.arange(4).repeat(3)
        fixed, head = (NearestClassMean(towers.backbone(), TASK, trainable=t) for t in (False, True))
        for given in (fixed, head):
            given.fit(Shots(features[None], label), None)
        assert torch.equal(fixed.means, head.means)
        assert torch.equal(fixed(features), head(features))
        assert not closed_form(head)
        assert [p for p in head.parameters() if p.requires_grad] == [head.means]
        head.losses(features, label)["cross_entropy"].backward()
        torch.optim.SGD([head.means], lr=1.0).step()
        assert head.losses(features, label)["cross_entropy"] < fixed.losses(features, label)["cross_entropy"]


class TestLinearProbe:
    @pytest.mark.parametrize("normalize", [True, False])
    def test_one_step_equals_the_formula(self, normalize):
        given = LinearProbe(towers.backbone(), TASK, normalize=normalize)
        features, label = torch.randn(5, 24) * 3, torch.tensor([0, 3, 1, 1, 2])
        assert given(features).abs().max() == 0
        with torch.no_grad():
            given.head.weight.normal_()
            given.head.bias.normal_()
        weight, bias = given.head.weight.detach().double().clone(), given.head.bias.detach().double().clone()
        sum(given.losses(features, label).values()).backward()
        torch.optim.SGD(given.head.parameters(), lr=0.5).step()
        x = (unit(features) * 24**0.5 if normalize else features).double()
        z = x @ weight.T + bias
        residual = (z.softmax(-1) - F.one_hot(label, 4)) / 5
        torch.testing.assert_close(given.head.weight.double(), weight - 0.5 * residual.T @ x, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(given.head.bias.double(), bias - 0.5 * residual.sum(0), rtol=1e-5, atol=1e-5)
