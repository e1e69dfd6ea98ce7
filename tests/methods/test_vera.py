"""VeRA equals PEFT's."""

import json

import oracle
import pytest
import torch
import torch.nn.functional as F
from peft import VeraConfig
from reference_tower import trained_numbers

from kshot.adapters import VeRA, random_basis
from kshot.errors import UserError


def peft_pair(adapter, copy_vectors=True):
    """Our block and PEFT's, with PEFT's frozen pair in both."""
    mine = oracle.ours(adapter, double=True)
    config = VeraConfig(
        r=adapter.rank, d_initial=adapter.initial, save_projection=True, target_modules=list(oracle.SHAPES)
    )
    model = oracle.theirs(config)
    shared, pairs = mine.shared[0], []
    with torch.no_grad():
        shared.A.copy_(model.base_model.vera_A["default"])
        shared.B.copy_(model.base_model.vera_B["default"])
    for name in oracle.SHAPES:
        ours, theirs = oracle.layer(mine, name), model.base_model.model.get_submodule(name)
        pairs += [(ours.lambda_b, theirs.vera_lambda_b["default"]), (ours.lambda_d, theirs.vera_lambda_d["default"])]
    return mine, model, pairs


@pytest.mark.parametrize("path", ["auto", "factorised", "materialised"])
@pytest.mark.parametrize("rank", [7, 40])  # 40 is more than any of the sides of 24
def test_equals_peft(rank, path):
    mine, model, pairs = peft_pair(VeRA(rank=rank, path=path))
    for ours, theirs in pairs:
        assert torch.equal(ours, theirs), "another start"
    oracle.randomise(p for p in mine.parameters() if p.requires_grad)
    with torch.no_grad():
        for ours, theirs in pairs:
            theirs.copy_(ours)
    oracle.agree(mine, model)
    for ours, theirs in pairs:
        assert oracle.relative(ours.grad, theirs.grad) <= 1e-7
    oracle.merged_agree(mine, model)


@pytest.mark.parametrize("path", ["factorised", "materialised"])
@pytest.mark.parametrize("name", list(oracle.SHAPES))
def test_equals_the_dense_formula(name, path):
    """In float64: x (W + (λ_b ⊙ B) (λ_d ⊙ A))ᵀ + b."""
    mine = oracle.ours(VeRA(rank=9, path=path), double=True)
    projection, layer = mine.get_submodule(name), oracle.layer(mine, name)
    oracle.randomise(layer.parameters())
    out, into = oracle.SHAPES[name]
    x = torch.randn(3, 7, into, dtype=torch.float64, requires_grad=True)
    upstream = torch.randn(3, 7, out, dtype=torch.float64)
    tensors = [x, layer.lambda_b, layer.lambda_d]
    a, b = mine.shared[0].A[:, :into], mine.shared[0].B[:out]
    weight = projection.weight + (layer.lambda_b[:, None] * b) @ (layer.lambda_d[:, None] * a)
    expected, given = F.linear(x, weight, projection.bias), projection(x)
    torch.testing.assert_close(given, expected, rtol=1e-12, atol=1e-12)
    wanted = torch.autograd.grad((expected * upstream).sum(), tensors)
    for found, right in zip(torch.autograd.grad((given * upstream).sum(), tensors), wanted, strict=True):
        torch.testing.assert_close(found, right, rtol=1e-10, atol=1e-10)


def test_paths_agree_under_dropout():
    steps = []
    for path in ("factorised", "materialised"):
        mine = oracle.ours(VeRA(rank=9, dropout=0.4, path=path))
        oracle.randomise(p for p in mine.parameters() if p.requires_grad)
        torch.manual_seed(3)
        steps.append([*oracle.step(mine.run), *(p.grad for p in mine.parameters() if p.requires_grad)])
    calm = oracle.ours(VeRA(rank=9))
    oracle.randomise(p for p in calm.parameters() if p.requires_grad)
    assert oracle.relative(oracle.step(calm.run)[0], steps[0][0]) > 1e-2
    for a, b in zip(*steps, strict=True):
        assert oracle.relative(a, b) <= 1e-5


def test_backward_keeps_neither_the_input_nor_an_output():
    """Of the size of tokens, h = x Aᵀ alone; of the size of the factors, the running one and the shared B."""
    mine = oracle.ours(VeRA(rank=9, path="factorised"), ["image.0.fc1"])
    kept = {}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.setdefault(t.data_ptr(), t), lambda t: t):
        mine.fc1(torch.randn(50, 24))
    shared = mine.shared[0]
    sizes = sorted(t.numel() for t in kept.values() if t.data_ptr() not in (shared.A.data_ptr(), shared.B.data_ptr()))
    weights = [t for t in kept.values() if t.shape == (96, 24)]  # the frozen one, which exists anyway
    assert 50 * 24 not in sizes
    assert 50 * 96 not in sizes
    assert sizes.count(50 * 9) == 1
    assert sizes.count(96 * 9) == 1
    assert all(t.data_ptr() == mine.fc1.weight.data_ptr() for t in weights)


class TestBasis:
    def test_is_kaiming_uniform_with_gain_root_2(self):
        shared = oracle.ours(VeRA(rank=64)).shared[0]
        for tensor, shape, fan in ((shared.A, (64, 96), 96), (shared.B, (96, 64), 64)):
            bound = (6 / fan) ** 0.5
            assert tensor.shape == shape
            assert 0.99 * bound < tensor.abs().max() <= bound * (1 + 1e-6)
            assert float(tensor.std()) == pytest.approx(bound / 3**0.5, rel=0.03)
            assert abs(float(tensor.mean())) < 0.03 * bound
            assert len(tensor.unique()) > 0.99 * tensor.numel()

    def test_takes_the_largest_sides_of_the_targets_alone(self):
        shared = oracle.ours(VeRA(rank=5), ["image.0.q", "image.0.fc1"]).shared[0]
        assert shared.A.shape == (5, 24)
        assert shared.B.shape == (96, 5)

    def test_depends_on_its_own_seed_alone(self):
        torch.manual_seed(1)
        first = oracle.ours(VeRA(rank=5)).shared[0]
        torch.manual_seed(2)
        again, other = oracle.ours(VeRA(rank=5)).shared[0], oracle.ours(VeRA(rank=5, seed=2)).shared[0]
        assert torch.equal(first.A, again.A)
        assert torch.equal(first.B, again.B)
        assert not torch.equal(first.A, other.A)
        assert not torch.equal(first.B, other.B)

    def test_is_described_and_not_stored(self):
        mine = oracle.ours(VeRA(rank=5))
        assert {n.split(".")[-1] for n in mine.state_dict() if ".adapters." in n} == {"lambda_b", "lambda_d"}
        assert not any(n.startswith("shared") for n in mine.state_dict())
        described = mine.shared[0].fingerprint()
        assert json.loads(json.dumps(described)) == described == oracle.ours(VeRA(rank=5)).shared[0].fingerprint()
        assert described["A"]["shape"] == [5, 96]
        for other in (VeRA(rank=5, seed=2), VeRA(rank=6)):
            there = oracle.ours(other).shared[0].fingerprint()
            assert there["A"] != described["A"]
            assert there["B"] != described["B"]
        assert described["A"]["checksum"] == random_basis.checksum(mine.shared[0].A)
        assert mine.bfloat16().shared[0].fingerprint() == described, "a cast is no other basis"

    def test_that_does_not_fit_into_memory(self, monkeypatch):
        monkeypatch.setattr(random_basis, "memory_of_machine", lambda: 7000)
        oracle.ours(VeRA(rank=4))
        with pytest.raises(UserError, match=r"^VeRA: .*7.68 kB.*lower rank\.$"):
            oracle.ours(VeRA(rank=10))


@pytest.mark.parametrize(("rank", "numbers"), [(256, 95_232), (1024, 132_096)])
def test_numbers_of_the_reference_tower(rank, numbers):
    assert trained_numbers(VeRA(rank=rank)) == numbers
