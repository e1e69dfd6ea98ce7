"""Nothing is remembered: whoever writes into an adapted model, by whatever way, sees it in the next forward pass."""

import copy
import pickle
from collections.abc import Callable
from functools import cache

import pytest
import torch
import towers
from cases import (
    FEW,
    FIRST_CASES,
    METHODS,
    SLOT_CASES,
    adapted,
    attach,
    check_untouched,
    each_first_case,
    loss_of,
    merged,
    perturb,
    plain,
    trained,
)

from kshot import holding, slots
from kshot.backbones import Backbone

IMAGE = tuple(target.replace("*.", "image.", 1) for target in FEW)
LABELS = [*FIRST_CASES, "svft_svd", "nola_layer", "pranc_hashes", "fulltuning"]


def small(label: str) -> Backbone:
    """A method on a few slots of the image tower of a small backbone; LoRA on that of CLIP."""
    targets = ("image.*",) if label == "fulltuning" else IMAGE
    return adapted(label, "clip" if label == "lora" else "vit", targets)


def values_for(backbone: Backbone) -> dict[str, torch.Tensor]:
    """Other values for all that trains."""
    generator = torch.Generator().manual_seed(21)
    found = {n: p.detach() for n, p in trained(backbone).items()}
    return {n: p + 0.05 * torch.randn(p.shape, generator=generator) for n, p in found.items()}


def everything(backbone: Backbone) -> list[torch.Tensor]:
    """Features in training and in evaluation, merged ones, and all gradients, of the image tower."""
    found = [plain(backbone.eval(), "image"), merged(backbone, "image")]
    backbone.train().zero_grad()
    features = towers.encode(backbone, "image")
    features.square().sum().backward()
    return [*found, features.detach(), *(p.grad.clone() for p in trained(backbone).values() if p.grad is not None)]


def write(backbone: Backbone, values: dict[str, torch.Tensor], how: str) -> Backbone:
    """Writes values into all that trains."""
    parameters = trained(backbone)
    ordered = [values[n] for n in parameters]
    if how == "copy":
        with torch.no_grad():
            for parameter, value in zip(parameters.values(), ordered, strict=True):
                parameter.copy_(value)
    elif how == "data":
        for parameter, value in zip(parameters.values(), ordered, strict=True):
            parameter.data = value.clone()
    elif how == "data in place":
        for parameter, value in zip(parameters.values(), ordered, strict=True):
            parameter.data.copy_(value)
    elif how == "vector":
        torch.nn.utils.vector_to_parameters(torch.cat([v.flatten() for v in ordered]), parameters.values())
    elif how in ("load", "load, assigned"):
        state = {n: v.clone() for n, v in values.items()}
        backbone.load_state_dict(state, strict=False, assign=how.endswith("assigned"))
    elif how == "optimizer":
        optimizer = torch.optim.SGD(parameters.values(), lr=1.0, fused=True)
        for parameter, value in zip(parameters.values(), ordered, strict=True):
            parameter.grad = parameter.detach() - value
        optimizer.step()
    elif how == "copied":
        backbone = copy.deepcopy(backbone, {id(t): t for t in [getattr(backbone, "tokenizer", None)]})
        write(backbone, values, "data")
    elif how == "pickled":
        backbone = pickle.loads(pickle.dumps(backbone))
        write(backbone, values, "data")
    return backbone


@pytest.mark.parametrize("label", LABELS)
def test_the_next_pass_is_right_after_every_way_to_write(label):
    reference = small(label)
    values = values_for(reference)
    expected = everything(write(reference, values, "copy"))
    first = everything(small(label))
    assert not torch.equal(first[0], expected[0])
    for how in ("data", "data in place", "vector", "load", "load, assigned", "optimizer", "copied", "pickled"):
        backbone = small(label)
        assert all(torch.equal(a, b) for a, b in zip(everything(backbone), first, strict=True)), "two are alike"
        with holding.merged(backbone):
            again = write(backbone, values, how) if how in ("copied", "pickled") else backbone
        if again is backbone:
            write(backbone, values, how)
        given = everything(again)
        for a, b in zip(given, expected, strict=True):
            close = towers.relative(a, b) <= 1e-5 if how == "optimizer" else torch.equal(a, b)  # p - (p - v) rounds
            assert close or b.abs().max() == 0, how
        if again is not backbone:
            unmoved = everything(backbone)
            assert all(torch.equal(a, b) for a, b in zip(unmoved, first, strict=True)), "the copy shares something"


@pytest.mark.parametrize("label", LABELS)
def test_inference_mode_leaves_nothing_behind(label):
    """Attached in it, run in it, detached in it; and trained outside."""
    name = "clip" if label == "lora" else "vit"
    expected = everything(adapted(label, name, ("image.*",)))
    with torch.inference_mode():
        backbone = towers.build(name)
        attach(label, backbone, ("image.*",))
        inside = [towers.encode(backbone.eval(), "image"), merged(backbone, "image")]
    assert not any(t.is_inference() for t in [*backbone.parameters(), *backbone.buffers()])
    for a, b in zip(everything(backbone), expected, strict=True):
        assert torch.equal(a, b)
    assert all(towers.relative(y, expected[0]) <= 1e-5 for y in inside)
    with torch.inference_mode():
        backbone.detach()
        attach(label, backbone, ("image.*",))
    loss_of(backbone.train(), "image").backward()
    torch.optim.SGD(trained(backbone).values(), lr=0.1).step()
    backbone.detach()
    fresh = towers.backbone(name)
    assert torch.equal(plain(backbone, "image"), plain(fresh, "image"))
    check_untouched(backbone, fresh)


def two_steps(backbone: Backbone, method: str, seed: int) -> list[torch.Tensor]:
    """What a method learns in two steps, and a feature of it."""
    torch.manual_seed(seed)
    attach(method, backbone, FEW if method in SLOT_CASES else ("*",))
    optimizer = torch.optim.AdamW(trained(backbone.train()).values(), lr=0.01)
    for tower in ("image", "text"):
        optimizer.zero_grad()
        loss_of(backbone, tower).backward()
        optimizer.step()
    return [*(p.detach().clone() for p in trained(backbone).values()), merged(backbone.eval(), "text")]


@pytest.fixture(scope="module")
def alone() -> Callable[[str, int], list[torch.Tensor]]:
    """What a method learns on a backbone of its own; found once for each method and seed."""
    return cache(lambda method, seed: two_steps(towers.backbone(), method, seed))


@pytest.mark.parametrize("label", LABELS)
def test_one_backbone_serves_one_run_after_the_other(label, alone):
    """Each with the numbers of a fresh one, whatever was attached before."""
    shared = towers.backbone()
    for method, seed in (("dora", 1), (label, 2), ("fulltuning", 3), (label, 4), (label, 2)):
        given, expected = two_steps(shared, method, seed), alone(method, seed)
        assert all(torch.equal(a, b) for a, b in zip(given, expected, strict=True))
        shared.detach()
    check_untouched(shared, towers.backbone())


def test_parameters_have_one_name_each_and_keep_it():
    """Whoever shares a tensor with other layers holds it as a part of its own; the first name is the one of old."""
    for label in METHODS:
        backbone = adapted(label)
        names = list(trained(backbone))
        assert len({id(p) for p in trained(backbone).values()}) == len(names)
        if label in SLOT_CASES:
            assert all(".adapters." in n for n in names)
            assert all(n.count(".") == n.partition(".adapters.")[0].count(".") + 3 for n in names)
    backbone = towers.backbone()
    METHODS["pranc"]().__class__(coefficients=9, scope="global").attach(backbone, ["*"])
    assert list(trained(backbone)) == ["shared.0.alpha"]


class TestPrecision:
    """Everything in half precision, single-precision adapters on half-precision weights, and double precision."""

    @pytest.mark.parametrize(
        ("setting", "dropout"),
        [
            ("bfloat16", 0.3),
            ("float16", 0.0),
            ("float64", 0.0),
            ("float32 on bfloat16", 0.0),
            ("float32 on bfloat16", 0.3),
        ],
    )
    @each_first_case
    def test_forward_backward_and_merging(self, label, setting, dropout):
        """LoRA in both towers, the others, whose layers are the same in both, in one."""
        backbone, dtype = towers.backbone(), getattr(torch, setting.split()[-1])
        apart = setting.startswith("float32")
        if apart:
            backbone.to(dtype)
        attach(label, backbone, FEW, dropout=dropout)
        if not apart:
            backbone.to(dtype)
        perturb(backbone, 0.03)
        own = torch.float32 if apart else dtype
        assert {p.dtype for p in trained(backbone).values()} == {own}
        for tower in ("image", "text") if label == "lora" else ("image",):
            backbone.train().zero_grad()
            features = towers.encode(backbone, tower)
            assert features.dtype == dtype
            features.float().square().mean().backward()
            found = [p.grad for p in backbone.trainable(tower)]
            assert all(g.dtype == own and torch.isfinite(g).all() for g in found)
            assert any(g.abs().max() > 0 for g in found)
            exact = plain(backbone.eval(), tower)
            given = merged(backbone, tower)
            assert given.dtype == exact.dtype == dtype
            assert towers.relative(given, exact) <= (1e-12 if dtype == torch.float64 else 0.08)
        if all(layer.mergeable for layer in backbone.layers().values()):
            with holding.merged(backbone):
                assert {p.held.dtype for p in slots.projections_of(backbone) if p.layers()} == {dtype}
            slots.merge(backbone, keep=False)
            assert {p.dtype for p in backbone.parameters()} == {dtype}
            assert towers.relative(plain(backbone, tower), exact) <= (1e-12 if dtype == torch.float64 else 0.08)

    @pytest.mark.parametrize("label", SLOT_CASES)
    def test_every_path(self, label):
        """The output is that of single precision, to the rounding of half precision."""
        frozen = towers.untouched("clip", "image")
        rounded = towers.relative(plain(towers.backbone().bfloat16(), "image"), frozen)
        for path in next(iter(adapted(label, targets=("image.0.o",)).layers().values())).paths:
            for mixed in (False, True):
                backbone = adapted(label, targets=IMAGE, path=path)
                perturb(backbone, 0.03)
                expected = plain(backbone, "image")
                if mixed:  # all but the layers
                    own = {
                        id(t) for layer in backbone.layers().values() for t in [*layer.parameters(), *layer.buffers()]
                    }
                    for tensor in (*backbone.parameters(), *backbone.buffers()):
                        if id(tensor) not in own:
                            tensor.data = tensor.data.bfloat16()
                else:
                    backbone.bfloat16()
                given = plain(backbone, "image")
                assert given.dtype == torch.bfloat16
                assert towers.relative(given, expected) <= max(0.05, 3 * rounded), (path, mixed)

    def test_detaching_and_full_tuning_keep_the_precision(self):
        backbone, fresh = towers.backbone().bfloat16(), towers.backbone().bfloat16()
        attach("fulltuning", backbone)
        loss_of(backbone.train(), "image").backward()
        torch.optim.SGD(trained(backbone).values(), lr=0.5).step()
        assert not torch.equal(plain(backbone, "image"), plain(fresh, "image"))
        with backbone.unadapted():
            assert torch.equal(plain(backbone, "image"), plain(fresh, "image"))
        backbone.detach()
        check_untouched(backbone, fresh)

    def test_a_mixed_precision_run_stores_frozen_weights_once(self):
        for label in FIRST_CASES:
            backbone = adapted(label, targets=("image.*",)).train()
            perturb(backbone, 0.03)
            found = []
            for kept in (True, False):
                backbone.zero_grad()
                with torch.autocast("cpu", torch.bfloat16):
                    if kept:
                        with holding.stored_as(backbone, torch.bfloat16):
                            loss_of(backbone, "image").backward()
                    else:
                        loss_of(backbone, "image").backward()
                found.append(torch.cat([p.grad.flatten() for p in backbone.trainable("image")]))
            assert towers.relative(*found) <= 1e-6, label
