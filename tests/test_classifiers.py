"""Contract of classifiers, and each against a plain reference of its formula."""

import inspect
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import towers
from sklearn.neighbors import NearestCentroid

import kshot.classifiers
from kshot.adapters import FullTuning, LoRA, unadapted
from kshot.classifiers import Classifier, CoOp, LinearProbe, NearestClassMean, Shots, Task, TextPrompt
from kshot.errors import UserError

NAMES = ("cat", "dog", "yellow bird", "x", "very small old car", "tree", "sea horse", "house", "pen", "cup")
TASK = Task(NAMES[:4])
SETTINGS: dict[str, list[dict[str, Any]]] = {
    "CLIPAdapter": [{}, {"ratio": [0.2, 0.6], "reduction": 2, "text_ratio": 0.3}],
    "CoOp": [
        {"context_length": 3},
        {"context_length": 3, "position": "middle"},
        {"context_length": 3, "position": "front"},
        {"context_length": 2, "class_specific": True},
        {"context_length": 3, "class_specific": True, "position": "middle"},
        {"init_words": "a photo of a"},
    ],
    "LPPlusPlus": [{"iterations": 20}, {"iterations": 20, "alpha_grad": "fresh", "select": False}],
    "LinearProbe": [{}, {"normalize": False}],
    "LogisticProbe": [{}, {"C": 0.3, "normalize": True}],
    "NearestClassMean": [{}, {"trainable": True}],
    "TipAdapter": [{}, {"alpha": 1.0, "beta": 5.5}],
    "TipAdapterF": [{}, {"alpha": 1.0, "beta": 5.5}],
}


def exported() -> list[type[Classifier]]:
    """Every classifier that a config can name."""
    things = [getattr(kshot.classifiers, name) for name in kshot.classifiers.__all__]
    return [t for t in things if inspect.isclass(t) and issubclass(t, Classifier) and not inspect.isabstract(t)]


EVERY = [(kind, settings) for kind in exported() for settings in SETTINGS.get(kind.__name__, [{}])]
every = pytest.mark.parametrize(
    ("kind", "settings"), EVERY, ids=[f"{k.__name__}-{'-'.join(map(str, s.values()))}" for k, s in EVERY]
)


def shots_of(backbone, classes: int, each: int = 3, views: int = 2, seed: int = 3) -> Shots:
    """Random features of a few images a class, in groups by class."""
    generator = torch.Generator().manual_seed(seed)
    label = torch.arange(classes).repeat(each)
    centre = torch.randn(classes, backbone.feature_dim, generator=generator)[label]
    return Shots(centre + torch.randn(views, len(label), backbone.feature_dim, generator=generator), label)


def prepared(classifier, val: Any = None):
    """Takes a classifier as far as the module does before the first batch."""
    train = shots_of(classifier.backbone, len(classifier.task.class_names))
    classifier.reserve(len(train.label))
    with unadapted(classifier.backbone):
        classifier.observe_frozen()
    if classifier.from_features:
        classifier.fit_features(train, val)
    return classifier


def made(kind, settings, task=TASK, name="clip"):
    backbone = towers.backbone(name)
    val = shots_of(backbone, len(task.class_names), each=2, views=1, seed=4)
    return prepared(kind(backbone, task, **settings), val)


def disturb(classifier):
    """Takes what trains away from where it starts."""
    with torch.no_grad():
        for parameter in classifier.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return classifier


def own_state(classifier) -> dict[str, torch.Tensor]:
    """What a checkpoint holds of a classifier."""
    return {name: t.clone() for name, t in classifier.state_dict().items() if not name.startswith("backbone.")}


def features_of(classifier, count=6):
    return torch.randn(count, classifier.backbone.feature_dim, generator=torch.Generator().manual_seed(2))


def logits_of(classifier, count=6):
    """Logits of images, so that what a classifier does in the image tower counts."""
    return classifier(classifier.encode_image(towers.images(classifier.backbone, count)))


def losses_of(classifier, label):
    """The terms of the loss of images."""
    images, frozen = towers.images(classifier.backbone, len(label)), None
    if classifier.learns_from_frozen:
        with unadapted(classifier.backbone), torch.no_grad():
            frozen = classifier.backbone.encode_image(images)
    return classifier.losses(classifier.encode_image(images), label, frozen)


def unit(x):
    return x / x.square().sum(-1, keepdim=True).sqrt()


def count_encodes(monkeypatch, backbone) -> list[str]:
    """Notes every use of the text tower of a backbone."""
    calls = []
    encode = backbone.encode_embeddings
    monkeypatch.setattr(backbone, "encode_embeddings", lambda *a: calls.append("encode") or encode(*a))
    return calls


class Untouchable:
    """Stands for shots that must not be looked at."""

    def __getattribute__(self, name):
        raise AssertionError(f"looked at .{name}")


class TestEvery:
    @every
    @pytest.mark.parametrize("classes", [2, 10])
    def test_logits(self, kind, settings, classes):
        classifier = made(kind, settings, Task(NAMES[:classes]))
        features = features_of(classifier)
        logits = classifier(features)
        assert logits.shape == (6, classes)
        assert logits.dtype == torch.float32
        assert torch.isfinite(logits).all()
        with torch.no_grad():
            torch.testing.assert_close(classifier.eval()(features), logits)
            each = torch.cat([classifier(f[None]) for f in features])
        torch.testing.assert_close(each, logits, msg="logits depend on the rest of the batch")

    @every
    def test_losses_are_finite_and_reach_every_parameter(self, kind, settings):
        classifier = made(kind, settings).train()
        terms = losses_of(classifier, torch.tensor([0, 1, 2, 3, 0, 1]))
        assert terms
        loss = sum(terms.values())
        assert loss.shape == ()
        assert torch.isfinite(loss)
        trainable = {n: p for n, p in classifier.named_parameters() if p.requires_grad}
        assert not (classifier.closed_form and trainable)
        assert not any("backbone." in n for n in trainable)
        assert {p.dtype for p in trainable.values()} <= {torch.float32}
        if trainable:
            loss.backward()
            without = [n for n, p in trainable.items() if p.grad is None or not p.grad.abs().max() > 0]
            assert without == []

    @every
    def test_gradient_reaches_image_features_and_adapters(self, kind, settings):
        backbone = towers.backbone()
        LoRA(rank=2).inject(backbone, ["*"])
        classifier = kind(backbone, TASK, **settings)
        if classifier.closed_form:
            return
        disturb(prepared(classifier)).train()
        sum(losses_of(classifier, torch.arange(4)).values()).backward()
        for tower in ("image", "text") if classifier.compares_text else ("image",):
            assert all(p.grad is not None and p.grad.abs().max() > 0 for p in backbone.trainable(tower)), tower

    @every
    def test_bfloat16_autocast(self, kind, settings):
        classifier = made(kind, settings)
        features = features_of(classifier)
        exact = classifier(features)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits = classifier(features.bfloat16())
            terms = classifier.losses(features.bfloat16(), torch.arange(6) % 4, features.bfloat16())
        assert logits.dtype == torch.float32
        assert {t.dtype for t in terms.values()} == {torch.float32}
        torch.testing.assert_close(logits, exact, rtol=0.1, atol=0.05 * float(exact.detach().abs().max()) + 1e-3)

    @every
    def test_a_saved_state_gives_the_same_logits(self, kind, settings):
        first, second = disturb(made(kind, settings)), kind(towers.backbone(), TASK, **settings)
        with torch.no_grad():
            expected = logits_of(first)
            logits_of(second)  # so that what is kept must be given up
            saved = own_state(first)
            second.fit_shapes(saved)
            missing, unexpected = second.load_state_dict(saved, strict=False)
            assert torch.equal(logits_of(second), expected)
        assert unexpected == []
        assert all(name.startswith("backbone.") for name in missing)
        assert not any("backbone" in name for name in saved)

    @every
    def test_training_leaves_the_backbone_as_it_is(self, kind, settings):
        classifier = kind(towers.backbone(), TASK, **settings)
        before = {name: t.clone() for name, t in classifier.backbone.state_dict().items()}
        val = shots_of(classifier.backbone, 4, each=2, views=1, seed=4)
        prepared(classifier, val).train()
        trainable = [p for p in classifier.parameters() if p.requires_grad]
        if trainable:
            optimizer = torch.optim.AdamW(trainable, lr=1e-3)
            start = sum(losses_of(classifier, torch.arange(4)).values())
            for _ in range(2):
                optimizer.zero_grad()
                sum(losses_of(classifier, torch.arange(4)).values()).backward()
                optimizer.step()
            assert sum(losses_of(classifier, torch.arange(4)).values()) < start
        if classifier.selects and not classifier.closed_form:
            classifier.eval().select(val)
        after = classifier.backbone.state_dict()
        assert before.keys() == after.keys()
        assert all(torch.equal(before[name], after[name]) for name in before)

    @every
    def test_other_classes_are_served_or_refused_with_the_reason(self, kind, settings):
        classifier = disturb(made(kind, settings)).eval()
        with torch.no_grad():
            before = logits_of(classifier)
            if classifier.class_bound:
                for names in (NAMES, NAMES[3::-1]):
                    with pytest.raises(UserError) as error:
                        classifier.set_class_names(names)
                    assert classifier.class_bound in str(error.value)
                    assert kind.__name__ in str(error.value)
                    assert "\n" not in str(error.value)
                classifier.set_class_names(NAMES[:4])
            else:
                classifier.set_class_names(NAMES[3::-1])
                torch.testing.assert_close(logits_of(classifier), before.flip(1), rtol=1e-4, atol=1e-4)
                classifier.set_class_names(NAMES, ["{} in the rain"])
                assert classifier.task == Task(NAMES, ("{} in the rain",))
                assert logits_of(classifier).shape == (6, 10)
                classifier.set_class_names(NAMES[:4], TASK.templates)
            assert classifier.task == TASK
            assert torch.equal(logits_of(classifier), before)

    @every
    def test_validation_shots_are_looked_at_only_to_choose(self, kind, settings):
        classifier = kind(towers.backbone(), TASK, **settings)
        if not classifier.from_features:
            with pytest.raises(NotImplementedError, match="gradient"):
                classifier.fit_features(shots_of(classifier.backbone, 4), None)
        elif classifier.selects and classifier.closed_form:
            with pytest.raises(AssertionError, match="looked at"):
                prepared(classifier, Untouchable())
        else:
            prepared(classifier, Untouchable())

    @every
    def test_features_of_any_precision(self, kind, settings):
        logits = {}
        for dtype in (torch.float32, torch.float64, torch.bfloat16):
            torch.manual_seed(0)
            classifier = kind(towers.backbone(), TASK, **settings)
            if not classifier.from_features:
                return
            train, val = shots_of(classifier.backbone, 4), shots_of(classifier.backbone, 4, 2, 1, seed=4)
            rounded = [Shots(s.features.bfloat16().to(dtype), s.label) for s in (train, val)]
            classifier.reserve(len(train.label))
            classifier.fit_features(*rounded)
            logits[dtype] = classifier(features_of(classifier))
        torch.testing.assert_close(logits[torch.float64], logits[torch.float32])
        torch.testing.assert_close(logits[torch.bfloat16], logits[torch.float32])

    @every
    def test_image_only_backbones_work_or_are_refused_in_one_line(self, kind, settings):
        try:
            classifier = made(kind, settings, name="vit")
        except UserError as error:
            message = str(error)
        else:
            assert not classifier.compares_text
            assert logits_of(classifier).shape == (6, 4)
            return
        assert "\n" not in message
        assert kind.__name__ in message
        assert "text tower" in message


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


class TestTextFeaturesAreKept:
    @pytest.mark.parametrize(("kind", "settings"), [(TextPrompt, {}), (CoOp, {"context_length": 2})])
    def test_nothing_is_computed_twice_in_evaluation(self, kind, settings, monkeypatch):
        backbone = towers.backbone()
        LoRA(rank=2).inject(backbone, ["text.*"])
        classifier = kind(backbone, TASK, **settings).eval()
        calls, features = count_encodes(monkeypatch, backbone), features_of(classifier)
        with torch.no_grad():
            first = classifier(features)
            for _ in range(3):
                assert torch.equal(classifier(features), first)
            assert len(calls) == 1
            for parameter in backbone.trainable("text"):
                parameter.add_(0.1)
            second = classifier(features)
            assert len(calls) == 2
            assert not torch.equal(second, first)
            if kind is CoOp:
                classifier.context.add_(0.1)
                assert not torch.equal(classifier(features), second)
                assert len(calls) == 3

    def test_frozen_text_is_encoded_once_even_in_training(self, monkeypatch):
        backbone = towers.backbone()
        LoRA(rank=2).inject(backbone, ["image.*"])
        classifier = TextPrompt(backbone, TASK).train()
        calls = count_encodes(monkeypatch, backbone)
        for _ in range(3):
            classifier(features_of(classifier))
        assert len(calls) == 1

    @pytest.mark.parametrize(("kind", "settings"), [(TextPrompt, {}), (CoOp, {"context_length": 2})])
    @pytest.mark.parametrize("fused", [False, True])
    def test_what_is_kept_follows_the_optimizer(self, kind, settings, fused):
        backbone = towers.backbone()
        LoRA(rank=2).inject(backbone, ["text.*"])
        classifier = kind(backbone, TASK, **settings)
        features = features_of(classifier)
        optimizer = torch.optim.AdamW([p for p in classifier.parameters() if p.requires_grad], lr=0.1, fused=fused)
        for _ in range(3):
            with torch.no_grad():
                before = classifier.eval()(features)
            optimizer.zero_grad()
            sum(classifier.train().losses(features, torch.arange(6) % 4).values()).backward()
            optimizer.step()
            with torch.no_grad():
                after = classifier.eval()(features)
            assert towers.relative(after, before) > 1e-3
            assert towers.relative(after, classifier(features)) <= 1e-5

    @pytest.mark.parametrize(("kind", "settings"), [(TextPrompt, {}), (CoOp, {"context_length": 2})])
    def test_what_dropout_made_in_training_is_not_kept_for_evaluation(self, kind, settings):
        backbone = towers.backbone()
        LoRA(rank=2, dropout=0.5).inject(backbone, ["text.*"])
        with torch.no_grad():
            for parameter in backbone.trainable("text"):
                parameter.add_(0.3)
        classifier = kind(backbone, TASK, **settings)
        features = features_of(classifier)
        with torch.no_grad():
            classifier.train()(features)
            kept = classifier.eval()(features)
        assert towers.relative(kept, classifier(features)) <= 1e-5

    @pytest.mark.parametrize("adapter", [LoRA(rank=2), FullTuning()], ids=["LoRA", "FullTuning"])
    @pytest.mark.parametrize("first", ["adapted", "unadapted"])
    def test_unadapted_reaches_what_is_kept(self, adapter, first):
        """Logits of the untouched backbone inside ``unadapted``, of the adapted one outside, whichever comes first."""
        original = TextPrompt(towers.backbone(), TASK)
        features = features_of(original)
        backbone = towers.backbone()
        adapter.inject(backbone, ["text.*"])
        with torch.no_grad():
            for parameter in backbone.trainable("text"):
                parameter.add_(0.1 * torch.randn_like(parameter))
        classifier = TextPrompt(backbone, TASK).eval()
        adapted = classifier(features).detach()
        with torch.no_grad():
            expected = original(features)
            assert towers.relative(adapted, expected) > 1e-3
            if first == "adapted":
                classifier(features)
            with unadapted(backbone):
                assert torch.equal(classifier(features), expected)
            assert towers.relative(classifier(features), adapted) <= 1e-5
            with unadapted(backbone):
                assert torch.equal(classifier(features), expected)


class TestNearestClassMean:
    def test_agrees_with_nearest_centroid_on_separate_classes(self):
        given = NearestClassMean(towers.backbone(), Task(NAMES[:5]))
        centres = 3 * torch.randn(5, 24)
        label = torch.arange(5).repeat_interleave(8)
        features = centres[label] + torch.randn(40, 24)
        given.fit_features(Shots(features[None], label), None)
        reference = NearestCentroid().fit(unit(features).numpy(), label.numpy())
        queries = centres.repeat(20, 1) + torch.randn(100, 24)
        assert given(queries).argmax(-1).tolist() == reference.predict(unit(queries).numpy()).tolist()
        torch.testing.assert_close(given.means, unit(torch.tensor(reference.centroids_)).float())

    def test_agrees_with_nearest_centroid_of_unit_length_everywhere(self):
        given = NearestClassMean(towers.backbone(), Task(NAMES))
        label = torch.tensor([*range(10), *range(10), 3, 3, 7])
        features = torch.randn(len(label), 24) * torch.rand(len(label), 1) * 9
        given.fit_features(Shots(features[None], label), None)
        means = torch.stack([unit(features)[label == c].mean(0) for c in range(10)])
        reference = NearestCentroid().fit(unit(means).numpy(), range(10))
        queries = torch.randn(200, 24)
        assert given(queries).argmax(-1).tolist() == reference.predict(unit(queries).numpy()).tolist()
        torch.testing.assert_close(given(queries), 20 * unit(queries) @ unit(means).T, rtol=1e-5, atol=1e-5)

    def test_scale_and_state(self):
        given, label = NearestClassMean(towers.backbone(), TASK, scale=5.0), torch.arange(4)
        features = torch.randn(4, 24)
        given.fit_features(Shots(features[None], label), None)
        torch.testing.assert_close(given(features).diagonal(), torch.full((4,), 5.0))
        assert "means" in given.state_dict()
        assert given.closed_form
        assert not [p for p in given.parameters() if p.requires_grad]

    def test_trainable_means_start_where_the_closed_form_ends(self):
        features, label = torch.randn(12, 24), torch.arange(4).repeat(3)
        fixed, head = (NearestClassMean(towers.backbone(), TASK, trainable=t) for t in (False, True))
        for given in (fixed, head):
            given.fit_features(Shots(features[None], label), None)
        assert torch.equal(fixed.means, head.means)
        assert torch.equal(fixed(features), head(features))
        assert not head.closed_form
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
