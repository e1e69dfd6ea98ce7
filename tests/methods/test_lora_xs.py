"""LoRA-XS equals PEFT's LoRA with the same factors, and knows which singular pairs it stands on."""

import oracle
import pytest
import torch
from oracle import same
from peft import LoraConfig
from reference_tower import trained_numbers

from kshot.adapters import LoRAXS, lora_xs
from kshot.adapters.svd import SVD, svd_of
from kshot.errors import UserError


def mirrored(weight):
    """A decomposition with the opposite sign for every second pair, as another library may find it."""
    u, s, vt = svd_of(weight)
    signs = 1.0 - 2 * (torch.arange(len(s)) % 2)
    return SVD(u * signs, s, signs[:, None] * vt)


def trained(backbone):
    return [p for p in backbone.parameters() if p.requires_grad]


@pytest.mark.parametrize("path", ["auto", "factorised", "materialised"])
@pytest.mark.parametrize("settings", [{"rank": 4}, {"rank": 4, "alpha": 9}, {"rank": 6, "rank_stabilised": True}])
def test_equals_peft(settings, path):
    """dL/dR = U_rᵀ · dL/d(lora_B), by the chain rule."""
    adapter = LoRAXS(**settings, path=path)
    mine = oracle.ours(adapter, double=True)
    config = LoraConfig(
        r=adapter.rank,
        lora_alpha=settings.get("alpha", adapter.rank),
        use_rslora=adapter.rank_stabilised,
        target_modules=list(oracle.SHAPES),
    )
    model = oracle.theirs(config)
    oracle.randomise(trained(mine))
    layers = {name: (oracle.layer(mine, name), model.base_model.model.get_submodule(name)) for name in oracle.SHAPES}
    with torch.no_grad():
        for ours, theirs in layers.values():
            theirs.lora_A["default"].weight.copy_(ours.A)
            theirs.lora_B["default"].weight.copy_(ours.B @ ours.R)
    oracle.agree(mine, model)
    for ours, theirs in layers.values():
        assert oracle.relative(ours.R.grad, ours.B.T @ theirs.lora_B["default"].weight.grad) <= 1e-7
    oracle.merged_agree(mine, model)


@pytest.mark.parametrize("path", ["factorised", "materialised"])
def test_gradient_in_float64(path):
    """dR = s U_rᵀ G Aᵀ with G = gᵀ x."""
    mine = oracle.ours(LoRAXS(rank=4, alpha=9, path=path), ["image.0.fc1"], double=True)
    projection, layer = mine.fc1, oracle.layer(mine, "fc1").double()
    oracle.randomise(layer.parameters())
    x, g = torch.randn(20, 24, dtype=torch.float64), torch.randn(20, 96, dtype=torch.float64)
    (projection(x) * g).sum().backward()
    torch.testing.assert_close(layer.R.grad, 9 / 4 * layer.B.T @ g.T @ x @ layer.A.T, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", oracle.SHAPES)
def test_the_frozen_factors_are_the_principal_part(name):
    layer = oracle.layer(oracle.ours(LoRAXS(rank=5)), name)
    values = torch.linalg.svdvals(layer.slot.weight)[:5]
    torch.testing.assert_close(layer.B.T @ layer.B, torch.eye(5), rtol=0, atol=1e-5)
    torch.testing.assert_close(layer.B.T @ layer.slot.weight, layer.A, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(layer.A @ layer.A.T, torch.diag(values.square()), rtol=1e-4, atol=1e-4)
    assert [n for n, _ in layer.named_parameters()] == ["R"]
    assert layer.B.untyped_storage().nbytes() == 4 * layer.B.numel(), "a view keeps all of U in memory"


class TestStart:
    def test_at_zero_no_bit_changes(self):
        mine, x = oracle.ours(LoRAXS(rank=4)), torch.randn(5, 24)
        assert torch.equal(mine.run(x), oracle.Plain()(x))
        assert all(p.abs().max() == 0 for p in trained(mine))

    def test_the_published_one(self):
        mine, x = oracle.ours(LoRAXS(rank=24, init_std=1e-5)), torch.randn(5, 24)
        assert 1e-7 < oracle.relative(mine.run(x), oracle.Plain()(x)) < 1e-4
        values = torch.cat([p.detach().flatten() for p in trained(mine)])
        assert float(values.std()) == pytest.approx(1e-5, rel=0.1)
        assert abs(float(values.mean())) < 1e-6
        assert len({p[0, 0].item() for p in trained(mine)}) == 4


def test_the_input_is_not_kept():
    """Only h = x Aᵀ, (tokens, rank), is: fc2's input is the widest tensor of a block."""
    mine = oracle.ours(LoRAXS(rank=4), ["image.0.fc2"])
    x, kept = torch.randn(50, 96, requires_grad=True), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t.shape), t)[1], lambda t: t):
        mine.fc2(x).sum().backward()
    assert x.grad is not None
    assert torch.Size([50, 4]) in kept
    assert not [shape for shape in kept if shape[0] == 50 and shape[1] > 4]


class TestCheckpoint:
    def test_without_factors_it_holds_the_core_and_names_the_pairs(self, monkeypatch):
        mine = oracle.ours(LoRAXS(rank=4))
        assert {n.split(".")[-1] for n in mine.state_dict() if ".adapters." in n} == {"R"}
        (pairs,) = mine.shared
        found = pairs.fingerprint()["svd"]
        assert found.keys() == set(oracle.TARGETS)
        again, other = oracle.ours(LoRAXS(rank=4)), oracle.ours(LoRAXS(rank=5))
        assert again.shared[0].fingerprint() == {"svd": found}
        assert not any(same(other.shared[0].fingerprint()["svd"][name], found[name]) for name in found)
        monkeypatch.setattr(lora_xs, "svd_of", mirrored)
        other = oracle.ours(LoRAXS(rank=4))
        assert not any(same(other.shared[0].fingerprint()["svd"][name], found[name]) for name in found)

    def test_with_factors_it_means_the_same_everywhere(self, monkeypatch):
        mine, x = oracle.ours(LoRAXS(rank=24, save_factors=True)), torch.randn(5, 24)
        oracle.randomise(trained(mine))
        saved = {name: tensor.clone() for name, tensor in mine.state_dict().items()}
        assert len(mine.shared) == 0
        assert {n.split(".")[-1] for n in saved if ".adapters." in n} == {"A", "B", "R"}
        monkeypatch.setattr(lora_xs, "svd_of", mirrored)
        other = oracle.ours(LoRAXS(rank=24, save_factors=True))
        other.load_state_dict({n: p for n, p in saved.items() if n.endswith(".R")}, strict=False)
        assert oracle.relative(other.run(x), mine.run(x)) > 0.01
        other.load_state_dict(saved)
        assert torch.equal(other.run(x), mine.run(x))
        monkeypatch.undo()
        svd_of(mine.fc1.weight)  # fails if loading had written into the cache
        oracle.ours(LoRAXS(rank=24, save_factors=True)).load_state_dict({n: p + 1 for n, p in saved.items()})
        svd_of(mine.fc1.weight)


@pytest.mark.parametrize(("rank", "count"), [(16, 12_288), (25, 30_000), (32, 49_152), (64, 196_608)])
def test_number_of_parameters(rank, count):
    assert trained_numbers(LoRAXS(rank=rank)) == count


def test_rank_above_the_smaller_side():
    with pytest.raises(UserError, match=r"LoRAXS: rank 25 .* 24.* image\.0\.fc1"):
        oracle.ours(LoRAXS(rank=25), ["image.0.fc1"])
