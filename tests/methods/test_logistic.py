"""The probe by L-BFGS against scikit-learn, and the search of C against a walk on paper."""

import math

import pytest
import torch
import towers
from sklearn.linear_model import LogisticRegression

from kshot.classifiers import LogisticProbe, Shots, Task
from kshot.classifiers.logistic import search
from kshot.errors import UserError

NAMES = ("cat", "dog", "yellow bird", "very small old car")
TASK = Task(NAMES)


def shots(label=(0, 1, 2, 3) * 4, views=1, seed=1, spread=1.0):
    centres = torch.randn(4, 24, generator=torch.Generator().manual_seed(0))
    noise = torch.randn(views, len(label), 24, generator=torch.Generator().manual_seed(seed))
    return Shots(centres[list(label)] + spread * noise, torch.tensor(label))


def fitted(train, val=None, task=TASK, name="clip", **settings):
    given = LogisticProbe(towers.backbone(name), task, **settings)
    given.fit(train, val)
    return given


def directly(train, c, normalize=False):
    features, label = train.every_view
    features = features / features.norm(dim=-1, keepdim=True) if normalize else features
    return LogisticRegression(C=c, max_iter=1000).fit(features.double().numpy(), label.numpy())


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("c", [0.01, 1.0, 30.0])
def test_equals_scikit_learn(c, normalize):
    train, queries = shots(views=2), torch.randn(9, 24) * 4
    given, model = fitted(train, C=c, normalize=normalize), directly(train, c, normalize)
    scaled = queries / queries.norm(dim=-1, keepdim=True) if normalize else queries
    expected = torch.from_numpy(model.predict_proba(scaled.double().numpy())).float()
    torch.testing.assert_close(given(queries).softmax(-1), expected, rtol=0, atol=1e-5)
    assert float(given.C) == pytest.approx(c)
    assert given.needs == {"shots"}


def test_equals_scikit_learn_at_the_chosen_c():
    train, val, queries = shots(spread=3.0), shots(seed=2, spread=3.0), torch.randn(9, 24) * 4
    given = fitted(train, val)
    assert given.needs == {"shots", "val"}
    features, label = val.every_view

    def right(log_c):
        return int((directly(train, 10**log_c).predict(features.double().numpy()) == label.numpy()).sum())

    scores = {log_c: right(log_c) for log_c in (6.0, 4.0, 2.0, 0.0, -2.0, -4.0, -6.0)}
    assert len(set(scores.values())) > 1
    assert math.log10(float(given.C)) == pytest.approx(search(right), abs=1e-5)
    expected = torch.from_numpy(directly(train, float(given.C)).predict_proba(queries.double().numpy())).float()
    torch.testing.assert_close(given(queries).softmax(-1), expected, rtol=0, atol=1e-5)


def test_the_walk_of_the_search():
    asked = []

    def right(log_c):  # best at 1.3
        asked.append(log_c)
        return -round(1e6 * abs(log_c - 1.3))

    best = search(right)
    assert asked[:7] == [6, 4, 2, 0, -2, -4, -6]
    # of [1, 3], [1, 2] the left end is better, of [1, 1.5] the right, of [1.25, 1.5], [1.25, 1.375] the left,
    # of [1.25, 1.3125], [1.28125, 1.3125] the right, and of [1.296875, 1.3125], the eighth, the left
    assert asked[7:] == [1, 3, 1.5, 1.25, 1.375, 1.3125, 1.28125, 1.296875]  # 2 is known already
    assert best == 1.296875


def test_of_equals_the_search_takes_the_largest_of_the_grid_and_then_the_lower_end():
    assert search(lambda _: 3) == 5.0
    assert search(lambda log_c: int(log_c >= 1)) == 5.0
    assert search(lambda log_c: int(log_c <= -2)) == -3.0


@pytest.mark.parametrize("label", [(0, 1) * 6, (1, 0, 0, 0, 1, 0)])
def test_two_classes(label):
    train, queries = shots(label), torch.randn(9, 24) * 4
    given = fitted(train, task=Task(NAMES[:2]), C=0.5)
    expected = torch.from_numpy(directly(train, 0.5).predict_proba(queries.double().numpy())).float()
    assert given(queries).shape == (9, 2)
    torch.testing.assert_close(given(queries).softmax(-1), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("label", [(0, 1, 3) * 4, (1, 3) * 4])
def test_a_class_without_images_is_never_guessed(label):
    train, queries = shots(label), torch.randn(9, 24) * 4
    given = fitted(train, shots(seed=2))
    probability, model = given(queries).softmax(-1), directly(train, float(given.C))
    expected = torch.from_numpy(model.predict_proba(queries.double().numpy())).float()
    seen = model.classes_.tolist()
    torch.testing.assert_close(probability[:, seen], expected, rtol=0, atol=1e-5)
    assert probability[:, [c for c in range(4) if c not in seen]].max() == 0
    assert torch.isfinite(given(queries)).all()


def test_images_of_a_single_class():
    with pytest.raises(UserError, match="LogisticProbe: all training images are of one class"):
        fitted(shots((2, 2, 2)), C=1.0)


def test_works_without_a_text_tower():
    train = shots()
    given = fitted(Shots(torch.cat([train.features, train.features[..., :8]], -1), train.label), name="vit", C=1.0)
    assert given.weight.shape == (4, 32)
    assert torch.equal(given(torch.cat([train.features[0], train.features[0, :, :8]], -1)).argmax(-1), train.label)


def test_what_is_learnt_and_saved():
    given = fitted(shots(), C=1.0)
    saved = {n: t.numel() for n, t in given.state_dict().items() if not n.startswith("backbone.")}
    assert saved == {"weight": 4 * 24, "bias": 4, "C": 1}
    assert saved["weight"] + saved["bias"] == 4 * (24 + 1)


@pytest.mark.parametrize("c", [0.0, -1.0, math.nan, math.inf])
def test_bad_c(c):
    with pytest.raises(UserError, match=f"^LogisticProbe: C is {c}, and must be above 0") as error:
        LogisticProbe(towers.backbone(), TASK, C=c)
    assert "\n" not in str(error.value)
