"""DePT: its second head against the plain formula, and the base method as it is without it."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
import towers
from plain_prompts import NAMES, disturb, made, trained

from kshot.adapters import LoRA, unadapted
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
    MaPLe,
    NearestClassMean,
    PromptSRC,
    TaskRes,
)
from kshot.errors import UserError
from kshot.module import FewShotModule

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
    state = {f"inner.{n}": t for n, t in alone.state_dict().items() if not n.startswith("backbone.")}
    assert given.load_state_dict(state, strict=False).unexpected_keys == []
    return given, alone


def inputs_of(classifier):
    """Image features, and those of the untouched backbone where they are learned from."""
    images = towers.images(classifier.backbone, 5)
    with unadapted(classifier.backbone), torch.no_grad():
        frozen = classifier.backbone.encode_image(images)
    return classifier.encode_image(images), frozen if classifier.learns_from_frozen else None


def losses_of(classifier):
    features, frozen = inputs_of(classifier)
    return classifier.losses(features, LABEL, frozen)


@every_base
def test_the_loss_is_that_of_the_formula(base):
    given, alone = pair(base, balance=0.3)
    with torch.no_grad():
        f, frozen = inputs_of(alone)
        text = alone.text_features(f)
        own = torch.stack([text[b, y] if text.ndim == 3 else text[y] for b, y in enumerate(LABEL)])
        both = torch.cat([own * given.text_gain + given.text_shift, f * given.image_gain + given.image_shift])
        transfer = F.cross_entropy(both @ given.head.weight.T + given.head.bias, torch.cat([LABEL, LABEL]))
        base_terms = alone.losses(f, LABEL, frozen)
        terms = losses_of(given)
    assert terms.keys() == {*base_terms, "transfer"}
    for name, value in base_terms.items():
        assert towers.relative(terms[name], 0.7 * value) <= 1e-5, name
    assert towers.relative(terms["transfer"], 0.3 * transfer) <= 1e-5


@every_base
def test_gradients_are_those_of_the_formula(base):
    given, alone = pair(base, balance=0.3)
    f, frozen = inputs_of(alone)
    text = alone.text_features(f)
    own = torch.stack([text[b, y] if text.ndim == 3 else text[y] for b, y in enumerate(LABEL)])
    tensors = {n: p.detach().clone().requires_grad_() for n, p in trained(given).items() if n in OWN}
    both = torch.cat(
        [own * tensors["text_gain"] + tensors["text_shift"], f * tensors["image_gain"] + tensors["image_shift"]]
    )
    transfer = F.cross_entropy(both @ tensors["head.weight"].T + tensors["head.bias"], torch.cat([LABEL, LABEL]))
    (0.7 * sum(alone.losses(f, LABEL, frozen).values()) + 0.3 * transfer).backward()
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
    given, alone = pair(base)
    assert given.class_bound == alone.class_bound is not None
    with pytest.raises(UserError, match="DePT cannot serve classes"):
        given.set_class_names(NAMES)
    assert given.task == given.inner.task


def test_cwt_starts_as_the_identity():
    given = made(DePT, base=BASES["CoOp"])
    f = inputs_of(given)[0]
    assert torch.equal(given.adjusted(f), f)
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
@pytest.mark.parametrize("adapter", [None, LoRA(rank=2)], ids=["", "LoRA"])
def test_two_rates_in_the_optimizer(base, adapter):
    """The base, and an adapter, at the rate of the config; the second head at 6.5 times that."""
    sgd = partial(torch.optim.SGD, lr=2e-3, momentum=0.9, weight_decay=5e-4)
    dept = partial(DePT, base=BASES[base])
    module = FewShotModule(towers.backbone(), dept, NAMES[:4], optimizer=sgd, adapter=adapter, targets=["*.q"])
    optimizer = module.make_optimizer(list(trained(module).values()))
    own = {id(p) for name, p in trained(module.classifier).items() if name in OWN}
    assert len(own) == 6
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    assert rates.keys() == {id(p) for p in trained(module).values()}
    for p in trained(module).values():
        assert rates[id(p)] == pytest.approx(6.5 * 2e-3 if id(p) in own else 2e-3)
    assert sum({id(p) for p in group["params"]} == own for group in optimizer.param_groups) == 1
    if adapter is None:
        assert len(optimizer.param_groups) == 2
    assert all(group["momentum"] == 0.9 for group in optimizer.param_groups)


@every_base
def test_a_head_rate_concerns_what_dept_adds(base):
    """``model.head_lr`` is the rate of the classifier's own tensors but for prompts in the image tower."""
    module = FewShotModule(
        towers.backbone(),
        partial(DePT, base=BASES[base]),
        NAMES[:4],
        optimizer=partial(torch.optim.SGD, lr=2e-3),
        head_lr=1e-2,
    )
    optimizer = module.make_optimizer(list(trained(module).values()))
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    for name, p in trained(module.classifier).items():
        expected = 6.5 * 1e-2 if name in OWN else 2e-3 if name == "inner.image_prompts" else 1e-2
        assert rates[id(p)] == pytest.approx(expected), name


def test_a_step_moves_the_second_head_by_its_rate():
    module = FewShotModule(
        towers.backbone(),
        partial(DePT, base=BASES["CoOp"], rate_factor=4.0),
        NAMES[:4],
        optimizer=partial(torch.optim.SGD, lr=0.1),
    )
    sum(losses_of(module.classifier).values()).backward()
    before = {n: p.detach().clone() for n, p in trained(module.classifier).items()}
    module.make_optimizer(list(trained(module).values())).step()
    for name, p in trained(module.classifier).items():
        rate = 0.4 if name in OWN else 0.1
        torch.testing.assert_close(p.detach(), before[name] - rate * p.grad)


@every_base
def test_traits_are_those_of_the_base(base):
    given, alone = pair(base)
    for trait in ("prompts_images", "learns_from_frozen", "class_bound", "from_features", "selects", "closed_form"):
        assert getattr(given, trait) == getattr(alone, trait), trait
    assert (given.averaging is None) == (alone.averaging is None)
    saved = {n for n in given.state_dict() if not n.startswith("backbone.")}
    assert saved == {*OWN, *(f"inner.{n}" for n in alone.state_dict() if not n.startswith("backbone."))}


@pytest.mark.parametrize("classes", [3, 10])
def test_the_number_of_parameters_added(classes):
    given, alone = (made(k, names=NAMES[:classes]) for k in (partial(DePT, base=BASES["CoOp"]), BASES["CoOp"]))
    added = sum(p.numel() for p in trained(given).values()) - sum(p.numel() for p in trained(alone).values())
    assert added == 4 * 24 + classes * 24 + classes


@pytest.mark.parametrize(
    "base", [LinearProbe, LogisticProbe, NearestClassMean, partial(VPT, head=LinearProbe)], ids=["L", "LR", "N", "VPT"]
)
def test_a_base_that_compares_with_no_text(base):
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
