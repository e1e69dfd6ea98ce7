"""Slots and projections on their own: one product, three ways for an adapter to run, exact merging."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from kshot.layers import AdapterLayer
from kshot.memo import Memo
from kshot.slots import Projection, Slot, adapters_off

PARTS = {"q": 4, "k": 4, "v": 6}


class Shift(AdapterLayer):
    """W' = W + D, added to the frozen output by the base class's own forward."""

    paths = ("factorised",)

    def __init__(self, slot, value=0.5):
        super().__init__(slot)
        self.D = nn.Parameter(torch.full(slot.weight.shape, value))

    def effective_weight(self):
        return self.slot.weight + self.D


class Replaced(Shift):
    """The same, run through its weight."""

    paths = ("materialised",)

    def forward(self, x, y):
        raise AssertionError("a materialised layer is not called")


class Gated(Shift):
    """Depends on its input."""

    mergeable = False
    paths = ("factorised",)

    def effective_weight(self):
        raise AssertionError("no single weight expresses this")

    def forward(self, x, y):
        return y + F.linear(x, self.D) * x.sum(-1, keepdim=True).tanh()


@pytest.fixture(params=[True, False], ids=["bias", "no_bias"])
def projection(request):
    return Projection(torch.randn(14, 5), torch.randn(14) if request.param else None, PARTS)


def slot_of(projection, part):
    return Slot(f"image.0.{part}", projection, part)


def attach(projection, part, kind=Shift, **settings):
    slot = slot_of(projection, part)
    slot.attach(kind(slot, **settings))
    return projection.adapters[part]


def dense(projection, x, **changes):
    """The reference: every part's rows by themselves, with a change D for some."""
    start, parts = 0, []
    for part, size in PARTS.items():
        weight = projection.weight[start : start + size] + changes.get(part, 0)
        parts.append(F.linear(x, weight, None if projection.bias is None else projection.bias[start : start + size]))
        start += size
    return parts


def test_parts_are_row_blocks_in_order(projection):
    x = torch.randn(2, 3, 5)
    outputs = projection.split(x)
    assert [tuple(y.shape) for y in outputs] == [(2, 3, 4), (2, 3, 4), (2, 3, 6)]
    for y, expected in zip(outputs, dense(projection, x), strict=True):
        torch.testing.assert_close(y, expected)
    torch.testing.assert_close(projection(x), F.linear(x, projection.weight, projection.bias))
    assert (projection.in_features, projection.out_features) == (5, 14)
    assert [projection.rows(p) for p in PARTS] == [slice(0, 4), slice(4, 8), slice(8, 14)]
    with pytest.raises(KeyError):
        projection.rows("o")


def test_weights_are_taken_without_a_copy_and_frozen():
    linear = nn.Linear(3, 4)
    projection = Projection.from_linear(linear, "o")
    assert projection.weight.data_ptr() == linear.weight.data_ptr()
    assert projection.bias.data_ptr() == linear.bias.data_ptr()
    assert not any(p.requires_grad for p in projection.parameters())


def test_slots_are_views(projection):
    for part, size in PARTS.items():
        slot = slot_of(projection, part)
        assert slot.weight.untyped_storage().data_ptr() == projection.weight.untyped_storage().data_ptr()
        assert torch.equal(slot.weight, projection.weight[projection.rows(part)])
        assert (slot.in_features, slot.out_features) == (5, size)
        if projection.bias is None:
            assert slot.bias is None
        else:
            assert slot.bias.untyped_storage().data_ptr() == projection.bias.untyped_storage().data_ptr()
            assert torch.equal(slot.bias, projection.bias[projection.rows(part)])
    with torch.no_grad():
        slot_of(projection, "k").weight.zero_()
    assert projection.weight[4:8].abs().max() == 0
    assert projection.weight[:4].abs().min() > 0


def test_a_slot_takes_one_layer(projection):
    attach(projection, "q")
    with pytest.raises(AssertionError, match="adapted already"):
        attach(projection, "q")


def test_one_product_for_all_frozen_parts(projection, monkeypatch):
    calls = []
    linear = F.linear
    monkeypatch.setattr("kshot.slots.F.linear", lambda *a: calls.append(a[1].shape) or linear(*a))
    projection.split(torch.randn(2, 5))
    assert calls == [(14, 5)]
    attach(projection, "q", Replaced)
    calls.clear()
    projection.split(torch.randn(2, 5))
    assert calls == [(14, 5)]


@pytest.mark.parametrize("kind", [Shift, Replaced])
@pytest.mark.parametrize("chosen", [("q",), ("v",), ("q", "v"), ("q", "k", "v")], ids="".join)
def test_adapted_parts_alone_change(projection, kind, chosen):
    layers = {p: attach(projection, p, kind, value=0.3 * (i + 1)) for i, p in enumerate(chosen)}
    x = torch.randn(7, 5)
    expected = dense(projection, x, **{p: layer.D for p, layer in layers.items()})
    for train in (True, False):
        projection.train(train)
        for y, e in zip(projection.split(x), expected, strict=True):
            torch.testing.assert_close(y, e)
        with torch.no_grad():
            for y, e in zip(projection.split(x), expected, strict=True):
                torch.testing.assert_close(y, e)
    weight = torch.cat([projection.weight[projection.rows(p)] + (layers[p].D if p in layers else 0) for p in PARTS])
    assert torch.equal(projection.effective_weight(), weight)


def test_gradients_reach_both_kinds_and_the_input():
    projection = Projection(torch.randn(14, 5, dtype=torch.float64), None, PARTS)
    q, v = attach(projection, "q", Shift).double(), attach(projection, "v", Replaced).double()
    x = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    target = torch.randn(3, 14, dtype=torch.float64)
    given = torch.autograd.grad((projection(x) * target).sum(), [x, q.D, v.D])
    weight = projection.weight + torch.cat([q.D, torch.zeros(4, 5), v.D])
    expected = torch.autograd.grad((x @ weight.T * target).sum(), [x, q.D, v.D])
    for a, b in zip(given, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_merging_computes_one_weight_once_and_leaves_the_stored_one_alone(projection, monkeypatch):
    layer = attach(projection, "k")
    stored = projection.weight.clone()
    projection.eval()
    computed = []
    effective = Shift.effective_weight
    monkeypatch.setattr(Shift, "effective_weight", lambda self: computed.append(1) or effective(self))
    x = torch.randn(2, 5)
    with torch.no_grad():
        first = projection(x)
        assert torch.equal(projection(x), first)
        assert len(computed) == 1
        layer.D.add_(1.0)
        second = projection(x)
        assert len(computed) == 2
        torch.testing.assert_close(second, torch.cat(dense(projection, x, k=layer.D), -1))
        layer.D.sub_(1.0)
        assert torch.equal(projection(x), first)
    assert torch.equal(projection.weight, stored)


def test_merged_weight_follows_the_frozen_one(projection):
    layer = attach(projection, "k")
    projection.eval()
    x = torch.randn(2, 5)
    with torch.no_grad():
        projection(x)
        projection.weight.mul_(2)
        torch.testing.assert_close(projection(x), torch.cat(dense(projection, x, k=layer.D), -1))


def test_what_depends_on_the_input_is_never_merged(projection):
    attach(projection, "q")
    layer = attach(projection, "v", Gated)
    projection.eval()
    x = torch.randn(3, 5)
    with torch.no_grad():
        q, k, v = projection.split(x)
    plain = dense(projection, x, q=projection.adapters["q"].D)
    torch.testing.assert_close(q, plain[0])
    torch.testing.assert_close(k, plain[1])
    torch.testing.assert_close(v, plain[2] + F.linear(x, layer.D) * x.sum(-1, keepdim=True).tanh())


def test_adapters_off_is_exact_nests_and_survives_errors(projection):
    x = torch.randn(2, 5)
    before = projection(x)
    attach(projection, "q")
    attach(projection, "v", Gated)
    model = nn.Sequential(projection)
    adapted = projection(x)
    assert not torch.equal(adapted, before)
    with adapters_off(model):
        assert torch.equal(projection(x), before)
        with adapters_off(model):
            assert torch.equal(projection(x), before)
        assert torch.equal(projection(x), before)
    assert torch.equal(projection(x), adapted)
    with pytest.raises(RuntimeError, match="stop"), adapters_off(model):
        raise RuntimeError("stop")
    assert torch.equal(projection(x), adapted)


class TestMemo:
    def test_computes_again_only_after_a_change(self):
        a, b, calls = torch.ones(2), nn.Parameter(torch.ones(2)), []
        memo = Memo()

        def compute():
            calls.append(1)
            return (a + b).sum().item()

        assert [memo.get([a, b], compute), memo.get([a, b], compute), len(calls)] == [4, 4, 1]
        with torch.no_grad():
            b.add_(1)
        assert [memo.get([a, b], compute), memo.get([a, b], compute), len(calls)] == [6, 6, 2]
        a.mul_(2)
        assert [memo.get([a, b], compute), len(calls)] == [8, 3]
        a = torch.zeros(2)
        assert [memo.get([a, b], compute), len(calls)] == [4, 4]

    def test_the_value_can_be_none_and_the_sources_none_at_all(self):
        calls, memo = [], Memo()
        memo.get([], lambda: calls.append(1))
        memo.get([], lambda: calls.append(1))
        assert len(calls) == 1

    def test_computes_outside_autograd_autocast_and_inference_mode(self):
        weight, memo = nn.Parameter(torch.randn(3, 3)), Memo()
        with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
            value = memo.get([weight], lambda: weight @ weight)
        assert value.dtype == torch.float32
        assert not value.requires_grad
        assert not value.is_inference()
        x = torch.ones(3, requires_grad=True)
        (value @ x).sum().backward()  # an inference tensor could not be saved for backward
        torch.testing.assert_close(x.grad, value.sum(0))

    @pytest.mark.parametrize(
        "make",
        [
            lambda p: torch.optim.SGD(p, 0.1, foreach=False),
            lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, foreach=True),
            lambda p: torch.optim.Adam(p, 0.1, foreach=True),
            lambda p: torch.optim.AdamW(p, 0.1, fused=True),
            lambda p: torch.optim.SGD(p, 0.1, fused=True),
        ],
        ids=["sgd", "sgd_foreach", "adam_foreach", "adamw_fused", "sgd_fused"],
    )
    def test_notices_every_kind_of_optimizer_step(self, make):
        weight, memo = nn.Parameter(torch.ones(3)), Memo()
        optimizer = make([weight])
        for _ in range(3):
            before = memo.get([weight], lambda: weight.detach().clone())
            weight.grad = torch.ones(3)
            optimizer.step()
            after = memo.get([weight], lambda: weight.detach().clone())
            assert torch.equal(after, weight)
            assert not torch.equal(after, before)

    def test_another_tensor_is_another_source_even_at_the_address_of_a_dead_one(self):
        memo = Memo()
        for i in range(200):
            source = torch.full((1,), float(i))
            assert memo.get([source], lambda source=source: source.item()) == i
            del source


def test_merged_weight_follows_a_replaced_parameter(projection):
    layer = attach(projection, "q")
    projection.eval()
    x = torch.randn(2, 5)
    for i in range(50):
        layer.D = None  # the old tensor dies first, so that the new one may take its place in memory
        layer.D = nn.Parameter(torch.full((4, 5), float(i)))
        with torch.no_grad():
            merged = projection(x)
            expected = torch.cat(dense(projection, x, q=layer.D), -1)
        torch.testing.assert_close(merged, expected, rtol=1e-4, atol=1e-4)
