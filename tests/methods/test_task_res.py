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


@pytest.mark.parametrize("templates", [("a photo of a {}.",), ("a photo of a {}.", "{} in the rain")])
def test_starts_as_zero_shot(templates):
    task, features = Task(NAMES, templates), torch.randn(5, 24)
    given = TaskRes(towers.backbone(), task)
    assert towers.relative(given(features), TextPrompt(towers.backbone(), task)(features)) <= 1e-6


@pytest.mark.parametrize("scale", [0.5, 1.0])
def test_is_the_formula(scale):
    given, features = TaskRes(towers.backbone(), TASK, scale), torch.randn(5, 24) * 7
    with torch.no_grad():
        given.residual.normal_()
    text = given.text()
    assert float((text.norm(dim=-1) - 1).abs().max()) > 0.1  # so that it matters that t is normalised first
    changed = text / text.norm(dim=-1, keepdim=True) + scale * given.residual
    expected = given.backbone.logit_scale * F.cosine_similarity(features[:, None], changed[None], dim=-1)
    torch.testing.assert_close(given(features), expected, rtol=1e-5, atol=1e-4)


def test_the_residual_is_all_that_trains():
    given = TaskRes(towers.backbone(), TASK)
    (residual,) = [p for p in given.parameters() if p.requires_grad]
    assert residual.shape == (4, 24)
    assert residual.abs().max() == 0


def test_learns_what_the_text_does_not_say():
    given, features = TaskRes(towers.backbone(), TASK), torch.randn(12, 24)
    label = (given(features).argmax(-1) + 1) % 4  # so that the text is always wrong
    optimizer = torch.optim.Adam([given.residual], lr=0.05)
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
