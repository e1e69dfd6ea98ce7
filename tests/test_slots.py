"""Slots and projections on their own: one product, three ways for an adapter to run, exact merging."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from kshot.errors import UserError
from kshot.holding import merged, stored_as
from kshot.layers import FullRankLayer, LowRankLayer
from kshot.products import Factors
from kshot.slots import AdapterLayer, Projection, adapters_off, merge, unmerge

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
    return Projection(torch.randn(14, 5), torch.randn(14) if request.param else None, PARTS, "image.0")


class Thin(LowRankLayer):
    """A low-rank change."""

    def __init__(self, slot, rank=2):
        super().__init__(slot)
        self.up, self.down = (
            nn.Parameter(torch.randn(slot.out_features, rank)),
            nn.Parameter(torch.randn(rank, slot.in_features)),
        )

    def factors(self):
        return [Factors(self.up, self.down)]


class Full(FullRankLayer):
    """A change by the base class's own build and pullback."""

    def __init__(self, slot):
        super().__init__(slot)
        self.D = nn.Parameter(torch.randn(slot.weight.shape))

    def delta(self):
        return self.D.sin()


def attach(projection, part, kind=Shift, path="auto", **settings):
    slot = projection.slot(part)
    layer = kind(slot, **settings)
    layer.path = path
    slot.attach(layer)
    return layer


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
    assert [projection.rows[p] for p in PARTS] == [slice(0, 4), slice(4, 8), slice(8, 14)]
    with pytest.raises(KeyError):
        projection.rows["o"]


def test_weights_are_taken_without_a_copy_and_frozen():
    linear = nn.Linear(3, 4)
    projection = Projection.from_linear(linear, "o")
    assert projection.weight.data_ptr() == linear.weight.data_ptr()
    assert projection.bias.data_ptr() == linear.bias.data_ptr()
    assert not any(p.requires_grad for p in projection.parameters())


def test_slots_are_views(projection):
    for part, size in PARTS.items():
        slot = projection.slot(part)
        assert slot.name == f"image.0.{part}"
        assert slot.weight.untyped_storage().data_ptr() == projection.weight.untyped_storage().data_ptr()
        assert torch.equal(slot.weight, projection.weight[projection.rows[part]])
        assert (slot.in_features, slot.out_features) == (5, size)
        if projection.bias is None:
            assert slot.bias is None
        else:
            assert slot.bias.untyped_storage().data_ptr() == projection.bias.untyped_storage().data_ptr()
            assert torch.equal(slot.bias, projection.bias[projection.rows[part]])
    with torch.no_grad():
        projection.slot("k").weight.zero_()
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
    weight = torch.cat([projection.weight[projection.rows[p]] + (layers[p].D if p in layers else 0) for p in PARTS])
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


class TestMerged:
    def test_computes_one_weight_once_and_leaves_the_stored_one_alone(self, projection, monkeypatch):
        layer = attach(projection, "k")
        stored, computed, effective = projection.weight.clone(), [], Shift.effective_weight
        monkeypatch.setattr(Shift, "effective_weight", lambda self: computed.append(1) or effective(self))
        monkeypatch.setattr(Shift, "forward", lambda *_: pytest.fail("not merged"))
        x = torch.randn(2, 5)
        for value in (0.5, 1.5):
            with torch.no_grad():
                layer.D.fill_(value)
            with merged(projection):
                first = projection(x)
                assert torch.equal(projection(x), first)
                torch.testing.assert_close(first, torch.cat(dense(projection, x, k=layer.D), -1))
            assert projection.held is None
        assert len(computed) == 2
        assert torch.equal(projection.weight, stored)

    @pytest.mark.parametrize("change", ["data", "frozen", "replaced", "vector", "optimizer"])
    def test_outside_every_change_counts_at_once(self, projection, change):
        layer, x = attach(projection, "k"), torch.randn(2, 5)
        with merged(projection):
            before = projection(x)
        if change == "data":
            layer.D.data = torch.full((4, 5), 2.0)
        elif change == "frozen":
            projection.weight.data.mul_(2)
        elif change == "replaced":
            layer.D = nn.Parameter(torch.full((4, 5), 2.0))
        elif change == "vector":
            torch.nn.utils.vector_to_parameters(torch.full((20,), 2.0), layer.parameters())
        else:
            projection(x).sum().backward()
            torch.optim.AdamW(layer.parameters(), lr=0.5, fused=True).step()
        expected = torch.cat(dense(projection, x, k=layer.D), -1)
        with torch.no_grad():
            torch.testing.assert_close(projection(x), expected)
        with merged(projection):
            torch.testing.assert_close(projection(x), expected)
        assert not torch.allclose(before, expected)

    def test_nests_survives_errors_and_respects_adapters_off(self, projection):
        attach(projection, "q")
        x = torch.randn(2, 5)
        plain, adapted = F.linear(x, projection.weight, projection.bias), projection(x)
        with merged(projection):
            with merged(projection):
                torch.testing.assert_close(projection(x), adapted)
            assert projection.held is not None
            with adapters_off(projection):
                assert torch.equal(projection(x), plain)
        with pytest.raises(RuntimeError, match="stop"), merged(projection):
            raise RuntimeError("stop")
        assert projection.held is None

    def test_what_depends_on_the_input_is_never_merged(self, projection):
        attach(projection, "q")
        layer = attach(projection, "v", Gated)
        x = torch.randn(3, 5)
        with merged(projection):
            assert projection.held is None
            q, k, v = projection.split(x)
        plain = dense(projection, x, q=projection.adapters["q"].D)
        torch.testing.assert_close(q, plain[0])
        torch.testing.assert_close(k, plain[1])
        torch.testing.assert_close(v, plain[2] + F.linear(x, layer.D) * x.sum(-1, keepdim=True).tanh())

    def test_works_in_and_for_every_mode(self, projection):
        """Held in inference mode or under autocast, and used for training outside afterwards."""
        layer, x = attach(projection, "q"), torch.randn(2, 5)
        expected = projection(x)
        with torch.inference_mode(), merged(projection):
            assert not projection.held.is_inference()
            torch.testing.assert_close(projection(x), expected)
        with torch.autocast("cpu", torch.bfloat16), merged(projection):
            assert projection.held.dtype == torch.bfloat16
            torch.testing.assert_close(projection(x).float(), expected, atol=0.05, rtol=0.05)
        projection(x).sum().backward()
        assert layer.D.grad is not None

    @pytest.mark.parametrize("again", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
    def test_copies_start_outside(self, projection, again):
        attach(projection, "q")
        x = torch.randn(2, 5)
        expected = projection(x)
        with merged(projection), stored_as(projection, torch.bfloat16):
            other = again(projection)
            assert projection.held is not None
            assert projection.lowered is not None
        assert other.held is None
        assert other.lowered is None
        assert torch.equal(other(x), expected)
        with torch.no_grad():
            other.adapters["q"].D.zero_()
        assert torch.equal(other(x), F.linear(x, projection.weight, projection.bias))
        assert torch.equal(projection(x), expected)


class TestMerge:
    def test_keeps_or_folds(self, projection):
        layer, x = attach(projection, "k"), torch.randn(2, 5)
        expected, stored = projection(x), projection.weight.clone()
        merge(projection)
        torch.testing.assert_close(projection(x), expected)
        with pytest.raises(UserError, match="merged already"):
            merge(projection)
        assert torch.equal(projection.weight, stored)
        unmerge(projection)
        assert torch.equal(projection(x), expected)
        merge(projection, keep=False)
        torch.testing.assert_close(projection.weight[4:8], stored[4:8] + layer.D)
        assert not projection.adapters
        torch.testing.assert_close(projection(x), expected)
        assert not projection.weight.requires_grad

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
    def test_keeps_the_dtype(self, projection, dtype):
        """Also where what trains is of another one."""
        projection.to(dtype)
        attach(projection, "k", Thin)
        merge(projection)
        assert projection.held.dtype == dtype
        unmerge(projection)
        merge(projection, keep=False)
        assert projection.weight.dtype == dtype
        assert projection(torch.randn(2, 5, dtype=dtype)).dtype == dtype

    def test_refuses_what_no_weight_expresses_and_changes_nothing(self, projection):
        attach(projection, "q")
        attach(projection, "v", Gated)
        with pytest.raises(UserError, match=r"Gated on image\.0\.v depends on its input"):
            merge(projection, keep=False)
        assert set(projection.adapters) == {"q", "v"}


class TestStoredAs:
    def test_frozen_weights_are_cast_once(self, projection):
        x = torch.randn(2, 5)
        with torch.autocast("cpu", torch.bfloat16):
            expected = projection(x)
            with stored_as(nn.Sequential(projection), torch.bfloat16):
                weight, bias = projection.lowered
                assert weight.dtype == torch.bfloat16
                assert (bias is None) == (projection.bias is None)
                assert torch.equal(projection(x), expected)
        assert projection.lowered is None
        with stored_as(projection, torch.bfloat16):
            assert projection(x).dtype == torch.float32, "outside of autocast it is of no use"

    @pytest.mark.parametrize("why", ["it trains", "its bias trains", "double", "bfloat16"])
    def test_others_are_left_alone(self, why):
        projection = Projection(torch.randn(14, 5), torch.randn(14), PARTS)
        if why in ("it trains", "its bias trains"):
            (projection.weight if why == "it trains" else projection.bias).requires_grad_()
        else:
            projection.to({"double": torch.float64, "bfloat16": torch.bfloat16}[why])
        with stored_as(projection, torch.bfloat16):
            assert projection.lowered is None


class TestKindsOfChange:
    """Every way a layer can run, on one part or on the whole, beside others."""

    @pytest.mark.parametrize("paths", [("factorised",) * 2, ("materialised",) * 2, ("factorised", "materialised")])
    @pytest.mark.parametrize("mixed", [False, True])
    def test_agree_with_one_dense_product(self, paths, mixed):
        projection = Projection(torch.randn(14, 5).double(), torch.randn(14).double(), PARTS)
        layers = {p: attach(projection, p, Thin, path).double() for p, path in zip(("q", "v"), paths, strict=True)}
        if mixed:
            layers["k"] = attach(projection, "k", Full).double()
        parameters = [p for layer in layers.values() for p in layer.parameters()]
        x = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
        upstream = torch.randn(3, 14, dtype=torch.float64)
        given = projection(x)
        expected = torch.cat(dense(projection, x, **{p: layer.delta() for p, layer in layers.items()}), -1)
        torch.testing.assert_close(given, expected, rtol=1e-12, atol=1e-12)
        wanted = torch.autograd.grad((expected * upstream).sum(), [x, *parameters])
        found = torch.autograd.grad((given * upstream).sum(), [x, *parameters])
        for a, b in zip(found, wanted, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)

    @pytest.mark.parametrize("path", ["factorised", "materialised"])
    def test_a_weight_that_trains_gets_its_gradient_too(self, path):
        projection = Projection(torch.randn(14, 5).double(), None, PARTS)
        projection.weight.requires_grad_()
        layer, full = attach(projection, "k", Thin, path).double(), attach(projection, "q", Full).double()
        x, upstream = torch.randn(3, 5).double(), torch.randn(3, 14).double()
        (projection(x) * upstream).sum().backward()
        torch.testing.assert_close(projection.weight.grad, upstream.T @ x)
        torch.testing.assert_close(layer.up.grad, upstream[:, 4:8].T @ x @ layer.down.T)
        torch.testing.assert_close(full.D.grad, upstream[:, :4].T @ x * full.D.cos())

    def test_a_materialised_weight_that_changed_before_its_backward_pass_is_noticed(self):
        projection = Projection(torch.randn(14, 5), None, PARTS)
        layer = attach(projection, "qkv", Full)
        y = projection(torch.randn(3, 5))
        with torch.no_grad():
            layer.D.add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()


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
