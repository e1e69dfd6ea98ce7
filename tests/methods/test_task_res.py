"""TaskRes against its formula."""

import math

import pytest
import torch
import torch.nn.functional as F
import towers

from kshot.classifiers import Task, TaskRes, TextPrompt
from kshot.errors import UserError

NAMES = ("cat", "dog", "yellow bird", "very small old car")
TASK = Task(NAMES)


def test_starts_as_zero_shot():
    given, features = TaskRes(towers.backbone(), TASK), torch.randn(5, 24)
    assert towers.relative(given(features), TextPrompt(towers.backbone(), TASK)(features)) <= 1e-6


@pytest.mark.parametrize("templates", [("a photo of a {}.",), ("a photo of a {}.", "{} in the rain")])
@pytest.mark.parametrize("scale", [0.5, 1.0])
def test_is_the_formula_of_the_authors(scale, templates):
    """The residual is added to what the text tower gives, the mean of an ensemble, and normalised only afterwards."""
    given, features = TaskRes(towers.backbone(), Task(NAMES, templates), scale), torch.randn(5, 24) * 7
    with torch.no_grad():
        given.residual.normal_()
        original = towers.original("clip")
        each = [original.encode_text(given.backbone.tokenize([t.format(n) for n in NAMES])) for t in templates]
    text = sum(each) / len(each)
    assert float((text.norm(dim=-1) - 1).abs().max()) > 0.1  # so that it matters that t is not normalised first
    residual = given.residual.detach().clone().requires_grad_()
    changed = text + scale * residual
    expected = given.backbone.logit_scale * F.cosine_similarity(features[:, None], changed[None], dim=-1)
    torch.testing.assert_close(given(features), expected, rtol=1e-5, atol=1e-4)
    upstream = torch.randn(5, 4)
    (gradient,) = torch.autograd.grad((given(features) * upstream).sum(), given.residual)
    (plain,) = torch.autograd.grad((expected * upstream).sum(), residual)
    assert towers.relative(gradient, plain) <= 1e-5


def test_the_residual_is_all_that_trains():
    given = TaskRes(towers.backbone(), TASK)
    (residual,) = [p for p in given.parameters() if p.requires_grad]
    assert residual.shape == (4, 24)
    assert residual.abs().max() == 0


def test_learns_what_the_text_does_not_say():
    given, features = TaskRes(towers.backbone(), TASK), torch.randn(12, 24)
    label = (given(features).argmax(-1) + 1) % 4  # so that the text is always wrong
    optimizer = torch.optim.Adam([given.residual], lr=0.3)
    for _ in range(60):
        optimizer.zero_grad()
        sum(given.losses(features, label).values()).backward()
        optimizer.step()
    assert torch.equal(given(features).argmax(-1), label)


@pytest.mark.parametrize("scale", [0.0, -1.0, math.nan, math.inf])
def test_bad_scale(scale):
    with pytest.raises(UserError, match=f"^TaskRes: scale is {scale}, and must be above 0") as error:
        TaskRes(towers.backbone(), TASK, scale)
    assert "\n" not in str(error.value)
