"""CLIP-Adapter against its formula, and several ratios against each on its own."""

import math

import pytest
import torch
import torch.nn.functional as F
import towers

from kshot.classifiers import CLIPAdapter, Shots, Task, TextPrompt
from kshot.classifiers.clip_adapter import Bottlenecks
from kshot.errors import UserError

NAMES = ("cat", "dog", "yellow bird", "very small old car")
TASK = Task(NAMES)


def made(seed=0, task=TASK, **settings):
    torch.manual_seed(seed)
    return CLIPAdapter(towers.backbone(), task, **settings)


def batches(count):
    generator = torch.Generator().manual_seed(5)
    for _ in range(count):
        label = torch.randint(0, 4, (6,), generator=generator)
        yield 3 * torch.randn(6, 24, generator=generator) + F.one_hot(label, 24) * 4, label


def train(given, steps=4):
    optimizer = torch.optim.AdamW([p for p in given.parameters() if p.requires_grad], lr=1e-2)
    for features, label in batches(steps):
        optimizer.zero_grad()
        sum(given.losses(features, label).values()).backward()
        optimizer.step()
    return given


def adapted(x, ratio, down, up):
    return ratio * F.relu(F.relu(x @ down.T) @ up.T) + (1 - ratio) * x


@pytest.mark.parametrize("text_ratio", [0.0, 0.4])
def test_is_the_formula_on_raw_features(text_ratio):
    given = train(made(ratio=0.3, text_ratio=text_ratio)).eval()
    features = torch.randn(5, 24) * torch.tensor([[0.1], [1.0], [5.0], [20.0], [2.0]])
    text = given.encode()
    image = adapted(features, 0.3, given.image_adapter.down[0], given.image_adapter.up[0])
    if text_ratio:
        text = adapted(text, text_ratio, given.text_adapter.down[0], given.text_adapter.up[0])
    scale = given.backbone.logit_scale
    expected = scale * F.cosine_similarity(image[:, None], text[None], dim=-1)
    torch.testing.assert_close(given(features), expected, rtol=1e-5, atol=1e-4)
    assert towers.relative(given(features), TextPrompt(towers.backbone(), TASK)(features)) > 1e-3


@pytest.mark.parametrize("templates", [("a photo of a {}.",), ("a photo of a {}.", "{} in the rain")])
def test_ratio_zero_is_zero_shot(templates):
    task = Task(NAMES, templates)
    given, features = made(task=task, ratio=0.0), torch.randn(5, 24)
    assert torch.equal(given(features), TextPrompt(towers.backbone(), task)(features))


@pytest.mark.parametrize(("width", "count"), [(512, 131_072), (1024, 524_288)])
def test_parameter_count(width, count):
    assert sum(p.numel() for p in Bottlenecks(width, width // 4, [0.2]).parameters()) == count


def test_all_that_trains():
    given = made()
    trained = {n: p.numel() for n, p in given.named_parameters() if p.requires_grad}
    assert trained == {"image_adapter.down": 6 * 24, "image_adapter.up": 6 * 24}
    assert len([p for p in made(text_ratio=0.1).parameters() if p.requires_grad]) == 4


def test_initial_weights_are_those_of_linear_layers():
    given = made(seed=3, ratio=[0.2, 0.4])
    torch.manual_seed(3)
    down, up = torch.nn.Linear(24, 6, bias=False), torch.nn.Linear(6, 24, bias=False)
    for r in range(2):
        assert torch.equal(given.image_adapter.down[r], down.weight)
        assert torch.equal(given.image_adapter.up[r], up.weight)


def test_side_by_side_each_ratio_trains_as_it_would_alone():
    ratios = [0.2, 0.5, 1.0]
    together = train(made(ratio=ratios, text_ratio=0.3))
    features = torch.randn(5, 24)
    for r, ratio in enumerate(ratios):
        alone = train(made(ratio=ratio, text_ratio=0.3))
        for name in ("image_adapter", "text_adapter"):
            one, several = getattr(alone, name), getattr(together, name)
            torch.testing.assert_close(several.down[r], one.down[0], rtol=1e-4, atol=1e-6)
            torch.testing.assert_close(several.up[r], one.up[0], rtol=1e-4, atol=1e-6)
        together.chosen.fill_(r)
        torch.testing.assert_close(together(features), alone(features), rtol=1e-4, atol=1e-4)


def test_the_loss_is_the_sum_over_ratios():
    together, (features, label) = made(ratio=[0.2, 0.7]), next(batches(1))
    alone = [made(ratio=r).losses(features, label)["cross_entropy"] for r in (0.2, 0.7)]
    torch.testing.assert_close(together.losses(features, label)["cross_entropy"], sum(alone))


def test_the_best_ratio_is_kept():
    given = train(made(ratio=[0.0, 0.4, 1.0]), steps=20)
    given.chosen.fill_(1)
    queries = 3 * torch.randn(20, 24)
    truth = given(queries).argmax(-1)  # the second is right everywhere
    others = given.candidates(queries, given.encode(), slice(None)).argmax(-1)
    assert all((others[r] != truth).any() for r in (0, 2))
    given.chosen.fill_(0)
    given.select(Shots(queries[None], truth))
    assert given.chosen.tolist() == [1]
    assert torch.equal(given(queries).argmax(-1), truth)


def test_the_first_of_equals_is_kept():
    given, queries = made(ratio=[1.0, 0.3, 0.3]), torch.randn(1, 20, 24)
    given.chosen.fill_(1)
    truth = given(queries[0]).argmax(-1)
    given.select(Shots(queries, truth))
    assert given.chosen.tolist() == [1]


@pytest.mark.parametrize(("ratio", "needs"), [(0.2, set()), ([0.2], set()), ([0.2, 0.3], {"val"})])
def test_chooses_only_among_several(ratio, needs):
    assert made(ratio=ratio).needs == needs


def test_weights_stay_when_the_classes_change():
    given, features = train(made(text_ratio=0.2)), torch.randn(5, 24)
    other = train(made(text_ratio=0.2))
    given.set_class_names(("house", *NAMES))
    torch.testing.assert_close(given(features)[:, 1:], other(features))


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"ratio": 1.2}, "ratio is 1.2, and must be from 0 to 1"),
        ({"ratio": [0.2, -0.1]}, "ratio is -0.1"),
        ({"ratio": math.nan}, "ratio is nan"),
        ({"ratio": []}, "ratio is an empty list"),
        ({"text_ratio": 2.0}, "text_ratio is 2.0"),
        ({"reduction": 0}, "reduction is 0, and must be from 1 to 24"),
        ({"reduction": 25}, "reduction is 25"),
    ],
)
def test_bad_settings(settings, expected):
    with pytest.raises(UserError, match=f"^CLIPAdapter: {expected}") as error:
        made(**settings)
    assert "\n" not in str(error.value)
