"""PiSSA equals PEFT's, and starts at the frozen model to the bit."""

import oracle
import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig
from reference_tower import trained_numbers

from kshot.adapters import LoRA, PiSSA, pissa
from kshot.adapters.pissa import PiSSALayer
from kshot.adapters.svd import SVD, svd_of
from kshot.errors import UserError

SETTINGS = [{"rank": 4}, {"rank": 4, "alpha": 9}, {"rank": 6, "rank_stabilised": True}]


def peft_model(adapter):
    """PEFT's, which starts from a decomposition in single precision that is none of its own."""
    decompose = torch.linalg.svd

    def exact(weight, **options):
        return [t.to(weight.dtype) for t in decompose(weight.double(), **options)]

    config = LoraConfig(
        r=adapter.rank,
        lora_alpha=adapter.rank if adapter.alpha is None else adapter.alpha,
        use_rslora=adapter.rank_stabilised,
        init_lora_weights="pissa",
        target_modules=list(oracle.SHAPES),
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.linalg, "svd", exact)
        return oracle.theirs(config)


@pytest.mark.parametrize("path", ["auto", "factorised", "materialised"])
@pytest.mark.parametrize("settings", SETTINGS)
def test_equals_peft(settings, path):
    """Singular pairs have a sign of their own in each library, so PEFT's factors are replaced by ours."""
    adapter = PiSSA(**settings, path=path)
    mine, model = oracle.ours(adapter, double=True), peft_model(adapter)
    oracle.randomise(p for p in mine.parameters() if p.requires_grad)
    pairs = []
    for name in oracle.SHAPES:
        ours, theirs = oracle.layer(mine, name), model.base_model.model.get_submodule(name)
        with torch.no_grad():
            theirs.base_layer.weight.copy_(ours.slot.weight - adapter.scale * ours.B0 @ ours.A0)
        pairs += [(ours.A, theirs.lora_A["default"].weight), (ours.B, theirs.lora_B["default"].weight)]
    with torch.no_grad():
        for a, b in pairs:
            b.copy_(a)
    oracle.agree(mine, model)
    for a, b in pairs:
        assert oracle.relative(a.grad, b.grad) <= 1e-7
    oracle.merged_agree(mine, model)


@pytest.mark.parametrize("path", ["factorised", "materialised"])
def test_equals_the_dense_formula(path):
    """In float64: x (W + s (B A - B₀A₀))ᵀ + b."""
    mine = oracle.ours(PiSSA(rank=4, alpha=9, path=path), ["image.0.fc1"], double=True)
    projection, layer = mine.fc1, oracle.layer(mine, "fc1").double()
    oracle.randomise(layer.parameters())
    x = torch.randn(3, 7, 24, dtype=torch.float64, requires_grad=True)
    upstream = torch.randn(3, 7, 96, dtype=torch.float64)
    tensors = [x, layer.A, layer.B]
    weight = projection.weight + 9 / 4 * (layer.B @ layer.A - layer.B0 @ layer.A0)
    expected, given = F.linear(x, weight, projection.bias), projection(x)
    torch.testing.assert_close(given, expected, rtol=1e-12, atol=1e-12)
    wanted = torch.autograd.grad((expected * upstream).sum(), tensors)
    for a, b in zip(torch.autograd.grad((given * upstream).sum(), tensors), wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


class TestStart:
    @pytest.mark.parametrize("settings", SETTINGS)
    def test_equals_peft(self, settings):
        adapter = PiSSA(**settings)
        mine, model = oracle.ours(adapter, double=True), peft_model(adapter)
        for name in oracle.SHAPES:
            ours, theirs = oracle.layer(mine, name), model.base_model.model.get_submodule(name)
            product = theirs.lora_B["default"].weight @ theirs.lora_A["default"].weight
            assert oracle.relative(ours.B @ ours.A, product) <= 1e-6
            rest = ours.slot.weight - adapter.scale * ours.B @ ours.A
            assert oracle.relative(rest, theirs.base_layer.weight) <= 1e-6

    def test_shares_the_singular_values_between_the_factors(self):
        layer = oracle.layer(oracle.ours(PiSSA(rank=5, alpha=2)), "fc2")
        values = torch.linalg.svdvals(layer.slot.weight)
        expected = torch.diag(values[:5] / (2 / 5))
        torch.testing.assert_close(layer.B.T @ layer.B, expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(layer.A @ layer.A.T, expected, rtol=1e-5, atol=1e-5)
        rest = torch.linalg.svdvals(layer.slot.weight - layer.scale * layer.B @ layer.A)
        torch.testing.assert_close(rest[:19], values[5:], rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize("path", ["factorised", "materialised"])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_no_bit_changes(self, dtype, path):
        """In bfloat16, W x + s B A x - s B₀A₀ x would differ from W x by its own rounding."""
        mine, x = oracle.ours(PiSSA(rank=24, path=path)), torch.randn(5, 24)
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            assert torch.equal(mine.run(x), oracle.Plain()(x))
        for name in oracle.SHAPES:
            assert torch.equal(oracle.layer(mine, name).effective_weight(), oracle.Plain().get_submodule(name).weight)

    def test_both_factors_train_at_once(self):
        mine = oracle.ours(PiSSA(rank=4))
        oracle.step(mine.run)
        for name in oracle.SHAPES:
            layer = oracle.layer(mine, name)
            assert {n for n, p in layer.named_parameters() if p.grad is not None and p.grad.abs().max() > 0} == {
                "A",
                "B",
            }

    def test_neither_factor_is_decayed(self):
        assert PiSSALayer.undecayed == {"A", "B"}


class TestCheckpoint:
    def test_is_a_plain_lora_of_twice_the_rank(self):
        mine, plain = oracle.ours(PiSSA(rank=4, alpha=9)), oracle.ours(LoRA(rank=8, alpha=18))
        oracle.randomise(p for p in mine.parameters() if p.requires_grad)
        saved = mine.state_dict()
        for name in oracle.SHAPES:
            layer = oracle.layer(plain, name)
            own = {key.split(".")[-1]: v for key, v in saved.items() if key.startswith(f"{name}.adapters.")}
            with torch.no_grad():
                layer.A.copy_(torch.cat([own["A"], own["A0"]]))
                layer.B.copy_(torch.cat([own["B"], -own["B0"]], 1))
        for a, b in zip(oracle.step(mine.run), oracle.step(plain.run), strict=True):
            assert oracle.relative(a, b) <= 1e-5

    def test_needs_no_decomposition(self, monkeypatch):
        """As when the r-th and the next singular value coincide, so that either pair may come first."""

        def exchanged(weight):
            order = [0, 1, 2, 4, 3, *range(5, 24)]
            u, s, vt = svd_of(weight)
            return SVD(u[:, order], s[order], vt[order])

        mine, x = oracle.ours(PiSSA(rank=4)), torch.randn(5, 24)
        oracle.randomise(p for p in mine.parameters() if p.requires_grad)
        monkeypatch.setattr(pissa, "svd_of", exchanged)
        other = oracle.ours(PiSSA(rank=4))
        other.load_state_dict({n: p for n, p in mine.state_dict().items() if n.endswith((".A", ".B"))}, strict=False)
        assert oracle.relative(other.run(x), mine.run(x)) > 0.01
        other.load_state_dict(mine.state_dict())
        assert torch.equal(other.run(x), mine.run(x))


@pytest.mark.parametrize(("rank", "count"), [(16, 2_359_296), (32, 4_718_592)])
def test_number_of_parameters(rank, count):
    assert trained_numbers(PiSSA(rank=rank)) == count


def test_rank_above_the_smaller_side():
    with pytest.raises(UserError, match=r"PiSSA: rank 25 .* 24.* image\.0\.fc1"):
        oracle.ours(PiSSA(rank=25), ["image.0.fc1"])
