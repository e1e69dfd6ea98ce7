"""DePT: its second head against the plain formula, and the base method as it is without it."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
import towers
from plain_prompts import NAMES, disturb, encode, made, saved, teacher_of, trained

from kshot.classifiers import (
    VPT,
    Classifier,
    CLIPAdapter,
    CoCoOp,
    CoOp,
    DePT,
    KgCoOp,
    LinearProbe,
    LogisticProbe,
    LPPlusPlus,
    MaPLe,
    NearestClassMean,
    PromptSRC,
    TaskRes,
)
from kshot.classifiers.base import own_parameters
from kshot.errors import UserError

LABEL = torch.tensor([3, 0, 1, 3, 2])
SENTENCES = ("a photo of a {}.", "{} in the rain")
BASES = {
    "CoOp": partial(CoOp, context_length=3),
    "CoOp-class-specific": partial(CoOp, context_length=3, class_specific=True),
    "CoCoOp": partial(CoCoOp, reduction=4),
    "KgCoOp": KgCoOp,
    "MaPLe": MaPLe,
    "VPT": partial(VPT, depth=2),
    "IVLP": partial(VPT, head=partial(CoOp, init_words="a photo of a", depth=2)),
    "PromptSRC": partial(PromptSRC, templates=SENTENCES),
    "CLIPAdapter": CLIPAdapter,
    "TaskRes": TaskRes,
}
every_base = pytest.mark.parametrize("base", BASES)
OWN = ("text_gain", "text_shift", "image_gain", "image_shift", "head.weight", "head.bias")


def pair(base: str, **settings) -> tuple[DePT, Classifier]:
    """DePT around a base, and the base by itself with the same tensors, away from where they start."""
    alone = disturb(made(BASES[base]))
    given = disturb(made(DePT, base=BASES[base], **settings))
    state = {f"inner.{n}": t for n, t in saved(alone).items()}
    assert given.load_state_dict(state, strict=False).unexpected_keys == []
    return given, alone


def inputs_of(classifier):
    """Image features, and those of the untouched backbone where they are learned from."""
    images = towers.images(classifier.backbone, 5)
    teacher = teacher_of(classifier, images) if "teacher" in classifier.needs else None
    return encode(classifier, images), teacher


def losses_of(classifier):
    features, teacher = inputs_of(classifier)
    return classifier.losses(features, LABEL, teacher)


def text_of(classifier, features):
    """Text features that the base compares with, those of VPT's head included."""
    return getattr(classifier, "inner", classifier).text_features(features)


def scaled(terms, balance):
    """The terms of a base as they enter: the cross-entropy alone is scaled."""
    return {name: (1 - balance) * term if name == "cross_entropy" else term for name, term in terms.items()}


@every_base
def test_the_loss_is_that_of_the_formula(base):
    given, alone = pair(base, balance=0.3)
    with torch.no_grad():
        f, frozen = inputs_of(alone)
        text = text_of(alone, f)
        own = torch.stack([text[b, y] if text.ndim == 3 else text[y] for b, y in enumerate(LABEL)])
        both = torch.cat([own * given.text_gain + given.text_shift, f * given.image_gain + given.image_shift])
        transfer = F.cross_entropy(both @ given.head.weight.T + given.head.bias, torch.cat([LABEL, LABEL]))
        base_terms = alone.losses(f, LABEL, frozen)
        terms = losses_of(given)
    assert terms.keys() == {*base_terms, "transfer"}
    for name, value in scaled(base_terms, 0.3).items():
        assert towers.relative(terms[name], value) <= 1e-5, name
    assert towers.relative(terms["transfer"], 0.3 * transfer) <= 1e-5


@every_base
def test_gradients_are_those_of_the_formula(base):
    given, alone = pair(base, balance=0.3)
    f, frozen = inputs_of(alone)
    text = text_of(alone, f)
    own = torch.stack([text[b, y] if text.ndim == 3 else text[y] for b, y in enumerate(LABEL)])
    tensors = {n: p.detach().clone().requires_grad_() for n, p in trained(given).items() if n in OWN}
    both = torch.cat(
        [own * tensors["text_gain"] + tensors["text_shift"], f * tensors["image_gain"] + tensors["image_shift"]]
    )
    transfer = F.cross_entropy(both @ tensors["head.weight"].T + tensors["head.bias"], torch.cat([LABEL, LABEL]))
    (sum(scaled(alone.losses(f, LABEL, frozen), 0.3).values()) + 0.3 * transfer).backward()
    sum(losses_of(given).values()).backward()
    plain = tensors | {f"inner.{n}": p for n, p in trained(alone).items()}
    assert plain.keys() == trained(given).keys()
    for name, p in trained(given).items():
        assert plain[name].grad.abs().max() > 0, name
        assert towers.relative(p.grad, plain[name].grad) <= 1e-4, name


@every_base
def test_balance_0_is_the_base(base):
    given, alone = pair(base, balance=0.0)
    a, b = losses_of(given), losses_of(alone)
    assert a.pop("transfer") == 0
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)
    sum(losses_of(given).values()).backward()
    sum(b.values()).backward()
    for name, p in trained(alone).items():
        assert torch.equal(trained(given)[f"inner.{name}"].grad, p.grad), name
    with torch.no_grad():
        assert towers.relative(given(inputs_of(given)[0]), alone(inputs_of(alone)[0])) <= 1e-6


@every_base
def test_logits_of_the_training_classes_are_fused(base):
    given, alone = pair(base, balance=0.7)
    with torch.no_grad():
        f = inputs_of(alone)[0]
        transfer = (f * given.image_gain + given.image_shift) @ given.head.weight.T + given.head.bias
        assert towers.relative(given(inputs_of(given)[0]), 0.3 * alone(f) + 0.7 * transfer) <= 1e-5
        assert towers.relative(given(inputs_of(given)[0]), alone(f)) > 1e-2


@pytest.mark.parametrize("base", [b for b in BASES if b not in ("CoOp-class-specific", "TaskRes")])
def test_logits_of_other_classes_are_those_of_the_base(base):
    given, alone = pair(base)
    with torch.no_grad():
        trained_on = given(inputs_of(given)[0])
        for names in (NAMES[4:8], NAMES, (*NAMES[:3], "zebra")):
            for classifier in (given, alone):
                classifier.set_class_names(names)
            logits = given(inputs_of(given)[0])
            assert logits.shape == (5, len(names))
            assert torch.equal(logits, alone(inputs_of(alone)[0]))
        given.set_class_names(NAMES[:4])
        assert torch.equal(given(inputs_of(given)[0]), trained_on)


@pytest.mark.parametrize("base", ["CoOp", "CoCoOp", "PromptSRC"])
@pytest.mark.parametrize("rows", [[2, 0], [3], [3, 2, 1, 0]])
def test_a_subset_of_the_training_classes_uses_its_rows(base, rows):
    """As on ImageNet-A and -R, which have 200 of the 1000 classes."""
    given, _ = pair(base)
    with torch.no_grad():
        whole = given(inputs_of(given)[0])
        given.set_class_names([NAMES[r] for r in rows])
        assert towers.relative(given(inputs_of(given)[0]), whole[:, rows]) <= 1e-5


def test_classes_of_the_same_name_keep_a_row_each():
    """ImageNet's list has "missile" and "sunglasses" twice."""
    names = ("cat", "missile", "dog", "missile")
    given = disturb(made(DePT, names=names, base=BASES["CoOp"], balance=1.0))
    with torch.no_grad():
        f = inputs_of(given)[0]
        expected = (f * given.image_gain + given.image_shift) @ given.head.weight.T + given.head.bias
        assert towers.relative(given(f), expected) <= 1e-5


@pytest.mark.parametrize("base", ["CoOp-class-specific", "TaskRes"])
def test_a_base_bound_to_its_classes_binds_the_whole(base):
    given, _ = pair(base)
    with pytest.raises(UserError, match=r"(CoOp|TaskRes) cannot serve classes"):
        given.set_class_names(NAMES)
    assert given.task == given.inner.task


def test_cwt_starts_as_the_identity():
    given = made(DePT, base=BASES["CoOp"])
    f = inputs_of(given)[0]
    assert torch.equal(given.adjusted_images(f), f)
    for name, value in (("text_gain", 1), ("image_gain", 1), ("text_shift", 0), ("image_shift", 0)):
        tensor = getattr(given, name)
        assert tensor.shape == (24,)
        assert (tensor == value).all()
    bound = 24**-0.5  # torch's default for a linear layer
    for tensor in (given.head.weight, given.head.bias):
        assert 0.3 * bound < float(tensor.detach().abs().max()) <= bound
    assert (given.balance, given.rate_factor) == (0.7, 6.5)
    assert type(made(DePT).inner) is CoOp


@every_base
def test_what_dept_adds_trains_at_a_rate_of_its_own(base):
    """The base keeps its groups, of which prompts in the image tower are not of the head."""
    given, alone = pair(base)
    *inner, own = given.param_groups()
    names = {id(p): name for name, p in trained(given).items()}
    assert {names[id(p)] for p in own.pop("params")} == set(OWN)
    assert own == {"head": True, "lr_factor": 6.5}
    alike = [{k: v for k, v in group.items() if k != "params"} for group in alone.param_groups()]
    assert [{k: v for k, v in group.items() if k != "params"} for group in inner] == alike
    of_inner = [names[id(p)] for group in inner for p in group["params"]]
    assert sorted(of_inner) == sorted(f"inner.{name}" for name in trained(alone))
    for group in inner:
        assert ("inner.image_prompts" in [names[id(p)] for p in group["params"]]) != group.get("head", False)
    assert len(own_parameters(given)) == len(of_inner) + len(OWN)


@every_base
def test_the_text_is_encoded_once_a_step(base, monkeypatch):
    given, _ = pair(base)
    calls, encode_embeddings = [], given.backbone.encode_embeddings
    features, teacher = inputs_of(given)
    given.losses(features, LABEL, teacher)  # teachers are made
    monkeypatch.setattr(given.backbone, "encode_embeddings", lambda *a: calls.append(1) or encode_embeddings(*a))
    given.losses(features, LABEL, teacher)
    assert len(calls) == 1


@every_base
def test_needs_and_state_are_those_of_the_base(base):
    given, alone = pair(base)
    assert given.needs == alone.needs
    assert len(given.image_tokens()) == len(alone.image_tokens())
    assert saved(given).keys() == {*OWN, *(f"inner.{n}" for n in saved(alone))}


def test_the_base_is_one_part_on_the_same_backbone():
    given = made(DePT, base=BASES["IVLP"])
    assert given.backbone is given.inner.backbone is given.inner.inner.backbone
    assert given.inner in list(given.children())
    assert given.innermost is given.inner.inner


@pytest.mark.parametrize("classes", [3, 10])
def test_the_number_of_parameters_added(classes):
    given, alone = (made(k, names=NAMES[:classes]) for k in (partial(DePT, base=BASES["CoOp"]), BASES["CoOp"]))
    added = sum(p.numel() for p in trained(given).values()) - sum(p.numel() for p in trained(alone).values())
    assert added == 4 * 24 + classes * 24 + classes


@pytest.mark.parametrize(
    "base",
    [LinearProbe, LogisticProbe, NearestClassMean, partial(VPT, head=LinearProbe), LPPlusPlus, DePT],
    ids=["L", "LR", "N", "VPT", "LP++", "DePT"],
)
def test_a_base_that_learns_no_prompts(base):
    with pytest.raises(UserError) as error:
        made(DePT, base=base)
    assert str(error.value).startswith("DePT needs a base that learns prompts, such as CoOp")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"balance": -0.1}, "balance is -0.1, and must lie in [0, 1]"),
        ({"balance": 1.1}, "balance is 1.1"),
        ({"balance": float("nan")}, "balance is nan"),
        ({"rate_factor": 0.0}, "rate_factor is 0.0, and must be positive"),
        ({"rate_factor": -6.5}, "rate_factor is -6.5"),
        ({"rate_factor": float("nan")}, "rate_factor is nan"),
    ],
)
def test_bad_settings(settings, expected):
    with pytest.raises(UserError) as error:
        made(DePT, **settings)
    assert str(error.value).startswith("DePT: ")
    assert expected in str(error.value)
    assert "\n" not in str(error.value)


def test_image_only_backbones():
    with pytest.raises(UserError, match="DePT needs a text tower"):
        made(DePT, "vit")
