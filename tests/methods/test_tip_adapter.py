"""Tip-Adapter and Tip-Adapter-F against plain forms of their formula and of their search."""

import math

import pytest
import torch
import torch.nn.functional as F
import towers
from torch.utils._python_dispatch import TorchDispatchMode

from kshot.adapters import LoRA
from kshot.classifiers import Shots, Task, TextPrompt, TipAdapter, TipAdapterF, tip_adapter
from kshot.classifiers.base import closed_form
from kshot.errors import UserError
from kshot.holding import merged

NAMES = ("cat", "dog", "yellow bird", "very small old car")
TASK = Task(NAMES)


def unit(x):
    return x / x.square().sum(-1, keepdim=True).sqrt()


def shots(label=(0, 1, 2, 3, 0, 1, 2, 3), views=3, seed=1, spread=1.0):
    """Features around one centre a class."""
    centres = torch.randn(4, 24, generator=torch.Generator().manual_seed(0))
    noise = torch.randn(views, len(label), 24, generator=torch.Generator().manual_seed(seed))
    return Shots(centres[list(label)] + spread * noise, torch.tensor(label))


def formula(classifier, keys, label, queries, alpha, beta):
    """Logits in float64, image by image and key by key."""
    text, tau = classifier.encode().double(), float(classifier.backbone.logit_scale)
    z = tau * unit(queries.double()) @ unit(text).T
    for row, f in zip(z, unit(queries.double()), strict=True):
        for key, c in zip(keys.double(), label.tolist(), strict=True):
            row[c] += alpha * math.exp(-beta * (1 - float(f @ key)))
    return z


def accuracy(classifier, given, alpha, beta):
    with torch.no_grad():
        classifier.alpha.fill_(alpha)
        classifier.beta.fill_(beta)
        features, label = given.every_view
        return int((classifier(features).argmax(-1) == label).sum())


def found_by_trying(classifier, val, alphas, betas):
    """The first best pair, β in the outer loop, by the classifier's own logits."""
    with merged(classifier):  # the text tower runs once
        scores = {(b, a): accuracy(classifier, val, a, b) for b in betas for a in alphas}
    return max(scores, key=scores.__getitem__), scores


class TestTipAdapter:
    @pytest.mark.parametrize(("alpha", "beta"), [(1.17, 1.0), (3.0, 5.5), (0.4, 20.0)])
    def test_is_the_formula(self, alpha, beta):
        given, train = TipAdapter(towers.backbone(), TASK, alpha, beta), shots()
        given.fit(train, None)
        keys = unit(train.features.mean(0))
        assert towers.relative(given.keys, keys) <= 1e-6
        assert towers.relative(given.keys, unit(unit(train.features).mean(0))) > 1e-2
        assert given.values.dtype == torch.long
        queries = torch.randn(5, 24)
        expected = formula(given, keys, train.label, queries, alpha, beta)
        assert towers.relative(given(queries), expected) <= 1e-5
        assert towers.relative(given(queries), TextPrompt(towers.backbone(), TASK)(queries)) > 1e-3

    def test_integer_labels_are_one_hot_values(self):
        given, train = TipAdapter(towers.backbone(), TASK, 2.0, 3.0), shots()
        given.fit(train, None)
        queries, values = torch.randn(5, 24), F.one_hot(train.label, 4).float()
        cache = torch.exp(-3.0 * (1 - unit(queries) @ given.keys.T)) @ values
        expected = TextPrompt(towers.backbone(), TASK)(queries) + 2.0 * cache
        torch.testing.assert_close(given(queries), expected, rtol=1e-6, atol=1e-6)

    @pytest.mark.parametrize("kind", [TipAdapter, TipAdapterF])
    @pytest.mark.parametrize("templates", [("a photo of a {}.",), ("a photo of a {}.", "{} in the rain")])
    def test_alpha_zero_is_zero_shot(self, kind, templates):
        task = Task(NAMES, templates)
        given = kind(towers.backbone(), task, alpha=0.0, beta=1.0)
        given.fit(shots(), None)
        queries = torch.randn(5, 24)
        assert torch.equal(given(queries), TextPrompt(towers.backbone(), task)(queries))

    def test_own_templates(self):
        given = TipAdapter(towers.backbone(), TASK, 0.0, 1.0, templates="imagenet7")
        queries = torch.randn(5, 24)
        assert torch.equal(given(queries), TextPrompt(towers.backbone(), TASK, "imagenet7")(queries))


class TestSearch:
    @pytest.mark.parametrize("label", [(0, 1, 2, 3) * 2, (0, 0, 0, 2, 1, 0)])
    def test_finds_what_trying_every_pair_finds(self, label, monkeypatch):
        """With one chunk and with many; with classes of unequal size and one without images."""
        val, found = shots((0, 1, 2, 3) * 5, views=1, seed=2, spread=1.5), []
        for at_once in (2**24, 100):
            monkeypatch.setattr(tip_adapter, "AT_ONCE", at_once)
            given = TipAdapter(towers.backbone(), TASK, alpha_range=12.0, beta_range=9.0)
            given.fit(shots(label, spread=1.5), val)
            found.append((float(given.beta), float(given.alpha)))
        alphas = [0.1 + i * (12.0 - 0.1) / 20 for i in range(20)]
        betas = [0.1 + i * (9.0 - 0.1) / 200 for i in range(200)]
        expected, scores = found_by_trying(given, val, alphas, betas)
        for pair in found:
            assert pair == pytest.approx(expected, rel=1e-6)
        assert len(set(scores.values())) > 3
        assert scores[expected] > min(scores.values())

    def test_the_first_of_equals_is_kept(self):
        given = TipAdapter(towers.backbone(), TASK)
        train = shots(spread=0.0)
        given.fit(train, Shots(torch.zeros(1, 4, 24), torch.zeros(4, dtype=torch.long)))
        assert (float(given.alpha), float(given.beta)) == pytest.approx((0.1, 0.1))

    @pytest.mark.parametrize("fixed", ["alpha", "beta"])
    def test_what_is_given_stays(self, fixed):
        given = TipAdapter(towers.backbone(), TASK, **{fixed: 2.5}, alpha_range=12.0)
        assert given.needs == {"shots", "val"}
        val = shots((0, 1, 2, 3) * 5, views=1, seed=2, spread=1.5)
        given.fit(shots(spread=1.5), val)
        found = float(given.beta), float(given.alpha)
        alphas = [2.5] if fixed == "alpha" else given.alphas
        betas = [2.5] if fixed == "beta" else given.betas
        assert found == pytest.approx(found_by_trying(given, val, alphas, betas)[0], rel=1e-6)

    def test_nothing_is_chosen_when_both_are_given(self):
        given = TipAdapter(towers.backbone(), TASK, 1.5, 2.5)
        assert given.needs == {"shots"}
        given.fit(shots(), shots(seed=2))
        assert (float(given.alpha), float(given.beta)) == (1.5, 2.5)

    def test_keys_do_not_depend_on_validation_shots(self):
        fitted = [TipAdapter(towers.backbone(), TASK) for _ in range(2)]
        for seed, given in enumerate(fitted):
            given.fit(shots(), shots(seed=5 + seed, views=1))
        assert torch.equal(fitted[0].keys, fitted[1].keys)

    def test_memory_is_bounded(self, monkeypatch):
        """No tensor of (β, images, keys) or (β, α, images, classes): none larger than the given bound, or an input."""
        monkeypatch.setattr(tip_adapter, "AT_ONCE", 4000)
        given = TipAdapter(towers.backbone(), TASK)
        largest = 0

        class Watch(TorchDispatchMode):
            def __torch_dispatch__(self, func, types, args=(), kwargs=None):
                nonlocal largest
                result = func(*args, **(kwargs or {}))
                for each in result if isinstance(result, (tuple, list)) else [result]:
                    largest = max(largest, each.numel() if isinstance(each, torch.Tensor) else 0)
                return result

        given.fit(shots((0, 1, 2, 3) * 25, views=1), None)
        val = shots((0, 1, 2, 3) * 20, views=1)
        with merged(given), torch.no_grad(), Watch():  # the text tower has run
            given.select(val)
        assert 1000 < largest <= 4000


class TestTipAdapterF:
    def test_keys_are_all_that_trains(self):
        given = TipAdapterF(towers.backbone(), TASK)
        assert given.keys.shape == (0, 24)
        assert not closed_form(given)
        given.fit(shots(), None)  # before there is an optimizer
        (keys,) = [p for p in given.parameters() if p.requires_grad]
        assert keys is given.keys
        assert keys.numel() == 8 * 24
        saved = {n for n in given.state_dict() if not n.startswith("backbone.")}
        assert saved == {"keys", "values", "alpha", "beta"}

    def test_starts_as_the_closed_form(self):
        fixed, trained = TipAdapter(towers.backbone(), TASK, 1.17, 1.0), TipAdapterF(towers.backbone(), TASK)
        queries = torch.randn(5, 24)
        for given in (fixed, trained):
            given.fit(shots(), shots(seed=2))
        assert torch.equal(trained(queries), fixed(queries))
        assert trained.needs == {"shots", "val"}
        assert closed_form(fixed)
        assert not closed_form(trained)

    def test_trains_as_a_linear_layer_without_bias(self):
        given, train = TipAdapterF(towers.backbone(), TASK, initial_alpha=2.0, initial_beta=3.0), shots()
        given.fit(train, None)
        linear = torch.nn.Linear(24, 8, bias=False)
        linear.weight.data.copy_(unit(train.features.mean(0)))
        ours = torch.optim.AdamW([given.keys], lr=1e-2, eps=1e-4)
        theirs = torch.optim.AdamW(linear.parameters(), lr=1e-2, eps=1e-4)
        zero_shot, values = TextPrompt(towers.backbone(), TASK), F.one_hot(train.label, 4).float()
        for step in range(4):
            features = train.features[step % 3]
            ours.zero_grad()
            sum(given.losses(features, train.label).values()).backward()
            ours.step()
            theirs.zero_grad()
            affinity = linear(F.normalize(features, dim=-1))
            z = zero_shot(features) + 2.0 * ((-1) * (3.0 - 3.0 * affinity)).exp() @ values
            F.cross_entropy(z, train.label).backward()
            theirs.step()
        torch.testing.assert_close(given.keys, linear.weight, rtol=1e-4, atol=1e-5)
        assert float((given.keys.detach().norm(dim=-1) - 1).abs().max()) > 1e-3  # not normalised again

    def test_searches_after_training_with_the_trained_keys(self):
        given = TipAdapterF(towers.backbone(), TASK, alpha_range=12.0)
        val = shots((0, 1, 2, 3) * 5, views=1, seed=2, spread=1.5)
        given.fit(shots(spread=1.5), val)
        assert (float(given.alpha), float(given.beta)) == (pytest.approx(1.17), 1.0)
        with torch.no_grad():
            given.keys.add_(0.2 * torch.randn_like(given.keys))
        given.select(val)
        found = float(given.beta), float(given.alpha)
        assert found == pytest.approx(found_by_trying(given, val, given.alphas, given.betas)[0], rel=1e-6)

    @pytest.mark.parametrize("kind", [TipAdapter, TipAdapterF])
    def test_a_fresh_model_takes_on_the_number_of_keys(self, kind):
        first, second = (kind(towers.backbone(), TASK, 1.0, 2.0) for _ in range(2))
        first.fit(shots(), None)
        saved = {n: t for n, t in first.state_dict().items() if not n.startswith("backbone.")}
        assert second(torch.randn(5, 24)).shape == (5, 4)  # an empty cache: zero-shot
        for name in ("keys", "values"):  # as a checkpoint does, see kshot.checkpoint
            getattr(second, name).data = torch.zeros_like(saved[name])
        assert second.load_state_dict(saved, strict=False).unexpected_keys == []
        queries = torch.randn(5, 24)
        assert torch.equal(second(queries), first(queries))

    def test_trains_with_adapters_in_both_towers(self):
        backbone = towers.backbone()
        given = TipAdapterF(backbone, TASK)
        LoRA(rank=2).attach(backbone, ["*"])
        given.fit(shots(), None)
        sum(given.losses(backbone.encode_image(towers.images(backbone, 4)), torch.arange(4)).values()).backward()
        trained = [given.keys, *backbone.trainable("image"), *backbone.trainable("text")]
        # the half of LoRA that starts at zero gets the gradient first
        assert all(p.grad is not None for p in trained)
        assert all(any(p.grad.abs().max() > 0 for p in backbone.trainable(tower)) for tower in ("image", "text"))
        assert given.keys.grad.abs().max() > 0


@pytest.mark.parametrize("kind", [TipAdapter, TipAdapterF])
@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"alpha": -1.0}, "alpha is -1.0, and must be at least 0"),
        ({"alpha": math.nan}, "alpha is nan"),
        ({"beta": 0.0}, "beta is 0.0, and must be above 0"),
        ({"alpha_range": 0.1}, "alpha_range is 0.1, and must be above 0.1"),
        ({"beta_range": math.inf}, "beta_range is inf"),
        ({"initial_alpha": 0.0}, "initial_alpha is 0.0"),
        ({"initial_beta": -2.0}, "initial_beta is -2.0"),
    ],
)
def test_bad_settings(kind, settings, expected):
    if kind is TipAdapter and "initial" in expected:
        return
    with pytest.raises(UserError, match=f"^{kind.__name__}: {expected}") as error:
        kind(towers.backbone(), TASK, **settings)
    assert "\n" not in str(error.value)
