"""DoRA equals PEFT's, with a norm that costs little and rows that keep their length."""

import oracle
import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig
from reference_tower import trained_numbers
from torch import nn

from kshot.adapters import DoRA
from kshot.adapters.dora import DoRALayer, ScaledRows
from kshot.errors import UserError

SETTINGS = [{"rank": 4}, {"rank": 4, "alpha": 9}, {"rank": 6, "rank_stabilised": True}]
PATHS = ["auto", "factorised", "materialised"]


def pair(adapter):
    """Our adapted block and PEFT's with the same random values, and tensors that belong together."""
    mine = oracle.ours(adapter, double=True)
    config = LoraConfig(
        r=adapter.rank,
        lora_alpha=adapter.rank if adapter.alpha is None else adapter.alpha,
        lora_dropout=adapter.dropout,
        use_rslora=adapter.rank_stabilised,
        use_dora=True,
        target_modules=list(oracle.SHAPES),
    )
    model = oracle.theirs(config)
    oracle.randomise(p for p in mine.parameters() if p.requires_grad)
    pairs = []
    for name in oracle.SHAPES:
        ours, theirs = oracle.layer(mine, name), model.base_model.model.get_submodule(name)
        pairs += [(ours.A, theirs.lora_A["default"].weight), (ours.B, theirs.lora_B["default"].weight)]
        pairs += [(ours.m, theirs.lora_magnitude_vector["default"].weight)]
    with torch.no_grad():
        for a, b in pairs:
            b.copy_(a)
    return mine, model, pairs


def fc1(adapter=None, double=False) -> tuple[nn.Module, DoRALayer]:
    """One projection, (96, 24), with random trained values."""
    mine = oracle.ours(adapter or DoRA(rank=4, alpha=9), ["image.0.fc1"], double)
    layer = oracle.layer(mine, "fc1")
    oracle.randomise(layer.parameters())
    return mine.fc1, layer.double() if double else layer


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("settings", SETTINGS)
def test_equals_peft(settings, path):
    mine, model, pairs = pair(DoRA(**settings, path=path))
    oracle.agree(mine, model)
    for a, b in pairs:
        assert oracle.relative(a.grad, b.grad) <= 1e-7
    oracle.merged_agree(mine, model)


@pytest.mark.parametrize("path", PATHS)
def test_equals_peft_with_dropout(path):
    mine, model, pairs = pair(DoRA(rank=4, alpha=9, dropout=0.4, path=path))

    def seeded(run):
        return lambda x: (torch.manual_seed(5), run(x))[1]

    calm, _ = oracle.step(mine.eval().run, dtype=torch.float64)
    mine.zero_grad()
    ours, theirs = (oracle.step(seeded(run), dtype=torch.float64) for run in (mine.train().run, model.train()))
    assert oracle.relative(ours[0], calm) > 0.01
    for a, b in [*zip(ours, theirs, strict=True), *((a.grad, b.grad) for a, b in pairs)]:
        assert oracle.relative(a, b) <= 1e-7


@pytest.mark.parametrize("path", PATHS)
def test_compiled_form_agrees(path, monkeypatch):
    for dropout in (0.0, 0.4):
        adapter, found = DoRA(rank=4, alpha=9, path=path, dropout=dropout), []
        for compiling in (False, True):
            monkeypatch.setattr(torch.compiler, "is_compiling", lambda value=compiling: value)
            torch.manual_seed(5)
            mine, _, pairs = pair(adapter)
            found.append([*oracle.step(mine.run, dtype=torch.float64), *(a.grad for a, _ in pairs)])
        for a, b in zip(*found, strict=True):
            assert oracle.relative(a, b) <= 1e-5


@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("path", ["factorised", "materialised"])
def test_equals_the_dense_formula_with_a_constant_norm(path, biased):
    """In float64; the gradient through the norm would be another one."""
    projection, layer = fc1(DoRA(rank=4, alpha=9, path=path), double=True)
    if not biased:
        projection.bias = None
    x = torch.randn(3, 7, 24, dtype=torch.float64, requires_grad=True)
    upstream = torch.randn(3, 7, 96, dtype=torch.float64)
    tensors = [x, layer.A, layer.B, layer.m]
    v = projection.weight + 9 / 4 * layer.B @ layer.A
    torch.testing.assert_close(layer.norm(), v.norm(dim=1), rtol=1e-7, atol=0)

    def dense(norm):
        y = F.linear(x, (layer.m / norm)[:, None] * v, projection.bias)
        return y, torch.autograd.grad((y * upstream).sum(), tensors, retain_graph=True)

    expected, wanted = dense(layer.norm())
    given = projection(x)
    torch.testing.assert_close(given, expected, rtol=1e-12, atol=1e-12)
    for a, b in zip(torch.autograd.grad((given * upstream).sum(), tensors), wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)
    through = dense(v.norm(dim=1))[1]
    assert [oracle.relative(a, b) > 0.01 for a, b in zip(through, wanted, strict=True)] == [False, True, True, False]
    g = torch.einsum("bto,bti->oi", upstream, x)
    torch.testing.assert_close(wanted[3], (g * v).sum(1) / layer.norm(), rtol=1e-10, atol=1e-10)


class TestNorm:
    @pytest.mark.parametrize("amount", [0.01, 1.0, 30.0])
    def test_equals_the_direct_one(self, amount):
        projection, layer = fc1()
        oracle.randomise([layer.A, layer.B], amount)
        direct = (projection.weight + layer.scale * layer.B @ layer.A).norm(dim=1)
        assert not layer.norm().requires_grad
        torch.testing.assert_close(layer.norm(), direct.detach(), rtol=1e-6, atol=0)

    def test_of_a_change_that_takes_the_row_away(self):
        """Where V is zero, the three terms cancel to rounding of either sign."""
        projection, layer = fc1(DoRA(rank=24))
        with torch.no_grad():
            layer.A.copy_(torch.eye(24))
            layer.B.copy_(-projection.weight)
        lengths = projection.weight.norm(dim=1)
        torch.testing.assert_close(layer.norm(), 1e-3 * lengths, rtol=1, atol=0)
        assert (layer.norm() > 0).all()
        projection(torch.randn(5, 24)).square().sum().backward()
        assert all(torch.isfinite(p.grad).all() for p in layer.parameters())

    @pytest.mark.parametrize("path", ["factorised", "materialised"])
    def test_is_measured_once_a_pass(self, path, monkeypatch):
        projection, _ = fc1(DoRA(rank=4, path=path))
        measured, original = [], DoRALayer.norm
        monkeypatch.setattr(DoRALayer, "norm", lambda self: (measured.append(1), original(self))[1])
        projection(torch.randn(5, 24)).sum().backward()
        assert len(measured) == 1

    @pytest.mark.parametrize("name", ["A", "B", "weight"])
    def test_follows_a_change_of_either_factor_and_of_the_weight(self, name):
        projection, layer = fc1()
        before = layer.norm().clone()
        oracle.randomise([projection.weight if name == "weight" else getattr(layer, name)])
        direct = (projection.weight + layer.scale * layer.B @ layer.A).norm(dim=1).detach()
        torch.testing.assert_close(layer.norm(), direct, rtol=1e-6, atol=0)
        assert oracle.relative(before, direct) > 0.01

    def test_is_of_full_precision_under_autocast(self):
        _, layer = fc1()
        with torch.autocast("cpu", torch.bfloat16):
            under = layer.norm()
        assert torch.equal(under, fc1()[1].norm())


class TestStart:
    @pytest.mark.parametrize("rank", [1, 24])
    def test_no_bit_changes(self, rank):
        plain, x = oracle.Plain(), torch.randn(5, 24)
        with torch.no_grad():
            plain.proj.weight[3] = 0  # a row without direction
        mine = oracle.Ours(plain)
        DoRA(rank=rank, alpha=5).attach(mine, oracle.TARGETS)
        assert torch.equal(mine.train().run(x), plain(x))
        for name in oracle.SHAPES:
            layer = oracle.layer(mine, name)
            assert torch.equal(layer.m / layer.norm(), torch.ones_like(layer.m))
            assert torch.equal(layer.effective_weight(), plain.get_submodule(name).weight)
            assert layer.B.abs().max() == 0
            assert layer.A.abs().max() <= layer.slot.in_features**-0.5
            torch.testing.assert_close(layer.m, layer.slot.weight.norm(dim=1), rtol=1e-6, atol=1e-6)

    def test_the_magnitude_is_not_decayed(self):
        assert DoRALayer.undecayed == {"m"}
        assert DoRALayer.undecayed <= dict(fc1()[1].named_parameters()).keys()


@pytest.mark.parametrize("path", ["factorised", "materialised"])
def test_a_magnitude_of_zero(path):
    projection, layer = fc1(DoRA(rank=4, path=path))
    with torch.no_grad():
        layer.m[:5] = 0
    y = projection(torch.randn(7, 24))
    torch.testing.assert_close(y[:, :5], projection.bias[:5].expand(7, 5), rtol=1e-5, atol=1e-6)
    y.square().sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in layer.parameters())
    assert (layer.m.grad[:5] != 0).all()
    assert layer.B.grad[:5].abs().max() == 0


class TestScaledRows:
    @pytest.mark.parametrize("biased", [True, False])
    def test_gradients(self, biased):
        """On a slice, as the parts of a fused projection are."""
        whole = torch.randn(2, 3, 9, dtype=torch.float64, requires_grad=True)
        c = torch.randn(5, dtype=torch.float64, requires_grad=True)
        bias = torch.randn(5, dtype=torch.float64) if biased else None
        assert torch.autograd.gradcheck(lambda w, c: ScaledRows.apply(w[..., 2:7], c, bias), [whole, c])

    def test_sums_tokens_in_the_precision_of_the_magnitude(self):
        y, c = torch.ones(10001, 2, dtype=torch.bfloat16), torch.full((2,), 1.001, requires_grad=True)
        out = ScaledRows.apply(y.requires_grad_(), c, torch.full((2,), 0.5))
        assert out.dtype == torch.bfloat16
        out.sum().backward()
        assert c.grad.tolist() == [5000.5, 5000.5]
        assert torch.equal(y.grad, torch.full_like(y, 1.001))

    @pytest.mark.parametrize("bias", [None, torch.zeros(1)])
    def test_the_magnification_is_not_rounded(self, bias):
        """1.01 in bfloat16 is 1.0078, which would be wrong for a whole row at once."""
        y = (torch.rand(4000, 1) + 1).bfloat16()
        given = ScaledRows.apply(y, torch.tensor([1.01]), bias)
        assert float(given.double().mean() / y.double().mean()) == pytest.approx(1.01, abs=1e-3)

    def test_keeps_the_output_alone(self):
        projection, _ = fc1()
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t.numel()), t)[1], lambda t: t):
            projection(torch.randn(50, 24))
        assert kept.count(50 * 96) == 1
        assert max(kept) == 50 * 96


@pytest.mark.parametrize(("rank", "count"), [(16, 2_442_240), (32, 4_801_536)])
def test_number_of_parameters(rank, count):
    assert trained_numbers(DoRA(rank=rank)) == count


def test_rank_above_the_smaller_side():
    with pytest.raises(UserError, match=r"DoRA: rank 25 .* 24.* image\.0\.fc1"):
        oracle.ours(DoRA(rank=25), ["image.0.fc1"])
