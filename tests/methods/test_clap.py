"""CLAP against its formula."""

import pytest
import torch
import torch.nn.functional as F
import towers

from kshot.classifiers import CLAP, Shots, Task, TaskRes, TextPrompt
from kshot.errors import UserError

TASK = Task(("cat", "dog", "yellow bird", "very small old car"))
LABEL = torch.tensor([0, 0, 1, 2, 2, 2])  # none of the last class


def shots():
    return Shots(torch.randn(3, len(LABEL), 24, generator=torch.Generator().manual_seed(1)), LABEL)


def fitted(**settings):
    classifier = CLAP(towers.backbone(), TASK, **settings)
    classifier.fit(shots(), None)
    return classifier


def test_starts_as_zero_shot():
    given, features = fitted(), torch.randn(5, 24)
    assert towers.relative(given(features), TextPrompt(towers.backbone(), TASK)(features)) <= 1e-6


def test_the_strength_is_what_the_text_knows_of_a_class():
    """The mean zero-shot probability of the true class over all views of its shots, whatever is trained already."""
    given = CLAP(towers.backbone(), TASK)
    with torch.no_grad():
        given.residual.normal_()
    given.fit(shots(), None)
    p = TextPrompt(towers.backbone(), TASK)(shots().features.flatten(0, 1)).softmax(-1).view(3, 6, 4)
    expected = [p[:, c == LABEL, c].mean() if c < 3 else torch.tensor(0.0) for c in range(4)]
    torch.testing.assert_close(given.strength, torch.stack(expected))


@pytest.mark.parametrize("weight", [1.0, 0.3])
def test_the_loss_is_the_formula(weight):
    given, features, label = fitted(weight=weight), torch.randn(4, 24), torch.tensor([0, 1, 2, 3])
    with torch.no_grad():
        given.residual.normal_()
    text = TextPrompt(towers.backbone(), TASK).encode().detach()
    w = (text + given.residual.detach()).requires_grad_()
    z = given.backbone.logit_scale.detach() * F.cosine_similarity(features[:, None], w[None], dim=-1)
    constraint = weight * sum(given.strength[c] * (w[c] - text[c]).square().sum() for c in range(4)) / 4
    losses = given.losses(features, label)
    torch.testing.assert_close(losses["cross_entropy"], F.cross_entropy(z, label))
    torch.testing.assert_close(losses["constraint"], constraint)
    (expected,) = torch.autograd.grad(F.cross_entropy(z, label) + constraint, w)
    (gradient,) = torch.autograd.grad(sum(losses.values()), given.residual)
    assert towers.relative(gradient, expected) <= 1e-5


def test_the_constraint_holds_what_the_text_knows():
    """After the same steps a class that the text knows has moved less than without it, one that it does not as far."""
    features = shots().features.flatten(0, 1)
    moved = {}
    for kind, settings in ((CLAP, {}), (TaskRes, {"scale": 1.0})):
        given = kind(towers.backbone(), TASK, **settings)
        if kind is CLAP:
            given.strength.copy_(torch.tensor([5.0, 5.0, 0.0, 0.0]))
        optimizer = torch.optim.SGD([given.residual], lr=0.05)
        for _ in range(20):
            optimizer.zero_grad()
            sum(given.losses(features, LABEL.repeat(3)).values()).backward()
            optimizer.step()
        moved[kind] = given.residual.detach().norm(dim=-1)
    assert (moved[CLAP][:2] < 0.8 * moved[TaskRes][:2]).all()
    assert (moved[CLAP][2:] > 0.8 * moved[TaskRes][2:]).all()


@pytest.mark.parametrize("weight", [0.0, -1.0, float("nan")])
def test_a_constraint_that_is_none(weight):
    with pytest.raises(UserError, match=r"^CLAP: weight is .*; without the constraint it is TaskRes"):
        CLAP(towers.backbone(), TASK, weight)
