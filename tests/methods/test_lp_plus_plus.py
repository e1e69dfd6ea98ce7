"""LP++ against a plain training loop by autograd, its step sizes against closed forms."""

import math

import pytest
import torch
import torch.nn.functional as F
import towers

from kshot.classifiers import LPPlusPlus, Shots, Task
from kshot.classifiers.lp_plus_plus import alpha_rate_of, weight_rate
from kshot.errors import UserError

NAMES = ("cat", "dog", "yellow bird", "very small old car")
TASK = Task(NAMES)


def unit(x):
    return x / x.square().sum(-1, keepdim=True).sqrt()


def shots(label=(0, 1, 2, 3) * 3, views=1, seed=1, spread=1.0):
    centres = torch.randn(4, 24, generator=torch.Generator().manual_seed(0))
    noise = torch.randn(views, len(label), 24, generator=torch.Generator().manual_seed(seed))
    return Shots(centres[list(label)] + spread * noise, torch.tensor(label))


def fitted(train, val=None, seed=0, **settings):
    given = LPPlusPlus(towers.backbone(), TASK, **({"select": False} | settings))
    torch.manual_seed(seed)
    given.fit(train, val)
    return given


def by_autograd(train, text, iterations, momentum, fresh):
    """W, b and α by torch's SGD, in float64; α's gradient is added up unless ``fresh``."""
    torch.manual_seed(0)
    bias = torch.nn.Linear(24, 4).bias.detach().double().requires_grad_()
    f, t = unit(train.features[0].double()), unit(text.double())
    per_class = [f[train.label == c] for c in range(4)]
    weight = torch.stack([x.sum(0) for x in per_class]).requires_grad_()
    start = 250 * torch.stack([(x @ t[c]).mean() for c, x in enumerate(per_class)]).mean()
    alpha = start.repeat(4).requires_grad_()
    rate = 4 * len(f) / torch.linalg.matrix_norm(f, 2) ** 2
    alpha_rate = len(f) / (4 * max(float((f @ t[c]).square().sum()) for c in range(4)))
    optimizer = torch.optim.SGD([weight, bias], lr=float(rate), momentum=momentum)
    for i in range(iterations):
        optimizer.zero_grad()
        if fresh:
            alpha.grad = None
        F.cross_entropy(f @ weight.T + bias + (f @ t.T) * alpha, train.label).backward()
        optimizer.step()
        if i % 10 == 9:
            with torch.no_grad():
                alpha -= alpha_rate * alpha.grad
    return weight.detach(), bias.detach(), alpha.detach()


class TestStepSizes:
    def test_of_the_weights(self):
        f = torch.tensor([[3.0, 0.0], [0.0, 2.0], [0.0, 0.0], [4.0, 0.0]])  # FᵀF = diag(25, 4)
        assert weight_rate(f) == pytest.approx(4 * 4 / 25)
        assert weight_rate(torch.tensor([[1.0, 1.0], [1.0, 1.0]])) == pytest.approx(4 * 2 / 4)  # eigenvalues 0 and 4

    def test_of_alpha(self):
        similarity = torch.tensor([[0.5, 0.1, 0.0], [0.5, -0.9, 0.2], [0.5, 0.3, 0.2]])  # columns: 0.75, 0.91, 0.08
        assert alpha_rate_of(similarity) == pytest.approx(3 / (4 * 0.91))


@pytest.mark.parametrize("momentum", [0.9, 0.0])
@pytest.mark.parametrize("alpha_grad", ["accumulate", "fresh"])
@pytest.mark.parametrize("iterations", [1, 9, 10, 35])
def test_equals_a_plain_loop(iterations, alpha_grad, momentum):
    given = fitted(shots(), iterations=iterations, alpha_grad=alpha_grad, momentum=momentum)
    expected = by_autograd(shots(), given.encode(), iterations, momentum, alpha_grad == "fresh")
    for ours, theirs in zip((given.weight, given.bias, given.alpha), expected, strict=True):
        assert towers.relative(ours, theirs) <= 1e-4
    f, t = unit(torch.randn(5, 24)), unit(given.encode())
    z = f @ given.weight.T + given.bias + (f @ t.T) * given.alpha
    torch.testing.assert_close(given(7 * f), z, rtol=1e-5, atol=1e-4)


def test_accumulated_and_fresh_gradients_part_at_the_first_step_of_alpha():
    for iterations, same in ((9, True), (10, False), (30, False)):
        both = [fitted(shots(spread=3.0), iterations=iterations, alpha_grad=g).alpha for g in ("accumulate", "fresh")]
        assert torch.equal(*both) == same, iterations


def test_views_are_images_of_their_own_but_do_not_lengthen_the_start():
    one, label = shots(), shots().label
    twice = fitted(Shots(one.features.repeat(2, 1, 1), label), iterations=25)
    once = fitted(one, iterations=25)
    for name in ("weight", "bias", "alpha"):
        assert towers.relative(getattr(twice, name), getattr(once, name)) <= 1e-4
    two = fitted(shots(views=2), iterations=25)
    assert towers.relative(two.weight, once.weight) > 1e-2


def right_of(given, val):
    features, label = val.every_view
    return int((given(features).argmax(-1) == label).sum())


def test_keeps_the_best_iterate():
    train, queries = shots(spread=2.0), torch.randn(1, 300, 24)
    seventh = fitted(train, iterations=7)
    val = Shots(queries, seventh(queries[0]).argmax(-1))  # so that the seventh is right everywhere
    scores = [right_of(fitted(train, iterations=i), val) for i in range(1, 21)]
    assert [i for i, score in enumerate(scores, 1) if score == 300] == [7]
    given = fitted(train, val, iterations=20, select=True)
    for name in ("weight", "bias", "alpha"):
        assert torch.equal(getattr(given, name), getattr(seventh, name))


def test_keeps_the_latest_of_equals():
    train, val = shots(spread=0.2), shots(seed=2, spread=0.2)
    given, last = fitted(train, val, iterations=20, select=True), fitted(train, iterations=20)
    assert right_of(last, val) == right_of(fitted(train, iterations=15), val) == 12
    assert torch.equal(given.weight, last.weight)


def test_what_is_learnt_and_saved():
    given = fitted(shots(), iterations=2)
    saved = {n: t.numel() for n, t in given.state_dict().items() if not n.startswith("backbone.")}
    assert saved == {"weight": 4 * 24, "bias": 4, "alpha": 4}
    assert sum(saved.values()) == 4 * (24 + 2)


def test_learns_the_shots():
    given, train = fitted(shots()), shots()
    features, label = train.every_view
    assert torch.equal(given(features).argmax(-1), label)


def test_a_class_without_images():
    given = fitted(shots((0, 1, 2, 0, 1, 2)), iterations=30)
    logits = given(torch.randn(5, 24))
    assert torch.isfinite(logits).all()


def test_features_of_any_length_are_the_same():
    train = shots()
    longer = Shots(train.features * (torch.rand(1, 12, 1) * 5 + 0.1), train.label)
    assert towers.relative(fitted(longer, iterations=20).weight, fitted(train, iterations=20).weight) <= 1e-4


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"iterations": 0}, "iterations is 0, and must be at least 1"),
        ({"momentum": 1.0}, "momentum is 1.0, and must be from 0 to below 1"),
        ({"momentum": math.nan}, "momentum is nan"),
        ({"alpha_grad": "new"}, "alpha_grad is 'new', and must be 'accumulate' or 'fresh'"),
    ],
)
def test_bad_settings(settings, expected):
    with pytest.raises(UserError, match=f"^LPPlusPlus: {expected}") as error:
        LPPlusPlus(towers.backbone(), TASK, **settings)
    assert "\n" not in str(error.value)


def test_needs_a_text_tower():
    with pytest.raises(UserError, match="LPPlusPlus needs a text tower"):
        LPPlusPlus(towers.backbone("vit"), TASK)
