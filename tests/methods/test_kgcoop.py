"""KgCoOp against its formula on the untouched library's text features."""

import pytest
import torch
import torch.nn.functional as F
import towers
from plain_prompts import (
    NAMES,
    disturb,
    features_of,
    made,
    plain_logits,
    prompt_tokens,
    prompted_text,
    same_gradients,
    trained,
    unit,
)

from kshot.adapters import FullTuning, LoRA
from kshot.classifiers import CoOp, KgCoOp, Task

LABEL = torch.tensor([3, 0, 1, 2, 2, 1])


def frozen_text(name="clip", names=NAMES[:4], templates=("a photo of a {}.",)):
    """The mean of the normalised features of the templates, by the untouched library."""
    backbone, original = towers.backbone(name), towers.original(name)
    with torch.no_grad():
        each = [unit(original.encode_text(backbone.tokenize([t.format(n) for n in names]))) for t in templates]
    return unit(torch.stack(each).mean(0))


@pytest.mark.parametrize("weight", [8.0, 0.3])
@pytest.mark.parametrize("name", ["clip", "clip_custom_all", "custom_text_eos"])
def test_the_loss_is_that_of_the_formula(name, weight):
    given = disturb(made(KgCoOp, name, weight=weight))
    features = features_of(given).requires_grad_()
    original = towers.original(name)
    text = prompted_text(original, prompt_tokens(given.backbone, 4), given.context)
    cosine = (unit(text) * frozen_text(name)).sum(-1)
    expected = F.cross_entropy(plain_logits(original, features, text), LABEL) + weight * (1 - cosine.mean())
    terms = given.losses(features, LABEL)
    assert terms.keys() == {"cross_entropy", "knowledge"}
    same_gradients(sum(terms.values()), expected, [features, given.context])
    assert towers.relative(terms["knowledge"], weight * (1 - cosine.mean())) <= 1e-5
    distance = (unit(text) - frozen_text(name)).square().sum(-1).mean()  # the paper's equation 6 is twice the term
    assert towers.relative(2 * terms["knowledge"], weight * distance) <= 1e-5


def test_weight_0_is_coop():
    given, coop = disturb(made(KgCoOp, weight=0.0)), disturb(made(CoOp, init_words="a photo of a"))
    features = features_of(given)
    losses = [sum(c.losses(features, LABEL).values()) for c in (given, coop)]
    assert torch.equal(losses[0], losses[1])
    gradients = [torch.autograd.grad(loss, c.context)[0] for loss, c in zip(losses, (given, coop), strict=True)]
    assert torch.equal(gradients[0], gradients[1])
    with torch.no_grad():
        assert torch.equal(given(features), coop(features))


def test_the_term_is_0_where_the_prompt_is_the_template():
    given = made(KgCoOp, init_words="a photo of a")
    assert abs(float(given.losses(features_of(given), LABEL)["knowledge"].detach())) <= 1e-5
    assert float(disturb(given).losses(features_of(given), LABEL)["knowledge"].detach()) > 1e-3


def test_the_teacher_follows_the_templates_of_the_data_set_or_its_own():
    templates, own = ("a photo of a {}.", "{} in the rain"), "a small drawing of the old {}, a kind of thing."
    given = KgCoOp(towers.backbone(), Task(NAMES[:4], templates))
    assert towers.relative(unit(given.teacher_text()), frozen_text(templates=templates)) <= 1e-5
    given = KgCoOp(towers.backbone(), Task(NAMES[:4], templates), templates=[own])
    assert towers.relative(unit(given.teacher_text()), frozen_text(templates=[own])) <= 1e-5
    given.set_class_names(NAMES, ["{} in the rain"])
    assert towers.relative(unit(given.teacher_text()), frozen_text(names=NAMES, templates=[own])) <= 1e-5


def test_the_teacher_is_made_once_and_again_for_other_classes():
    """The term is 0 wherever the prompt is the template, also after a change of the number of classes."""
    given = made(KgCoOp, init_words="a photo of a")
    for names in (NAMES[:4], NAMES[4:8], NAMES, NAMES[:4]):
        given.set_class_names(names)
        assert given.teacher is None
        label = torch.arange(6) % len(names)
        assert abs(float(given.losses(features_of(given), label)["knowledge"].detach())) <= 1e-5
        kept = given.teacher
        given.losses(features_of(given), label)
        assert given.teacher is kept
        assert kept.shape == (len(names), 24)


def test_the_teacher_is_not_rounded_by_autocast():
    given = made(KgCoOp)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        given.losses(features_of(given), LABEL)
    assert towers.relative(unit(given.teacher), frozen_text()) <= 1e-5


@pytest.mark.parametrize(
    ("adapter", "targets"), [(LoRA(rank=2), ["text.*"]), (FullTuning(), ["text.transformer.*"])], ids=["LoRA", "full"]
)
def test_the_teacher_is_the_untouched_tower(adapter, targets):
    """Even when the tower is already tuned as the run begins, as when it is resumed."""
    given = made(KgCoOp)
    adapter.attach(given.backbone, targets)
    disturb(given.backbone)
    given.losses(features_of(given), LABEL)
    assert towers.relative(unit(given.teacher), frozen_text()) <= 1e-5
    with torch.no_grad():
        tuned = given.backbone.encode_tokens(given.backbone.tokenize([f"a photo of a {n}." for n in NAMES[:4]]))
    assert towers.relative(unit(tuned), frozen_text()) > 1e-2


def test_only_the_context_is_trained_and_saved():
    given = made(KgCoOp)
    assert trained(given).keys() == {"context"}
    given.losses(features_of(given), LABEL)
    assert {n for n in given.state_dict() if not n.startswith("backbone.")} == {"context"}
    assert given.context.numel() == 4 * 32
