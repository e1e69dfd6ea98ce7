"""RandLoRA equals PEFT's up to the order of the random columns, and its quick forms equal the textbook formula."""

import copy
import json
import pickle
from contextlib import nullcontext

import oracle
import pytest
import torch
import torch.nn.functional as F
from peft import RandLoraConfig
from reference_tower import BLOCK, trained_numbers

from kshot.adapters import RandLoRA, random_basis
from kshot.adapters.randlora import Rows, ScaledBasis, scaled
from kshot.errors import UserError
from kshot.holding import stored_as
from kshot.slots import Projection


def peft_pair(adapter):
    """Our block and PEFT's, with PEFT's bases in both: column (j, k) of ours is column k n + j of theirs."""
    mine = oracle.ours(adapter, double=True)
    config = RandLoraConfig(r=adapter.rank, randlora_alpha=adapter.alpha, target_modules=list(oracle.SHAPES))
    model = oracle.theirs(config)
    shared, base, pairs = mine.shared[0], model.base_model, []
    for name in ("randlora_A", "randlora_B"):  # PEFT may draw them in bfloat16
        getattr(base, name)["default"] = getattr(base, name)["default"].double()
    larger, terms, rank = shared.B.shape
    flat = base.randlora_B["default"][:larger, :terms].flatten(1)
    with torch.no_grad():
        shared.A.copy_(base.randlora_A["default"][:, 0, :24])
        shared.B.copy_(flat.view(larger, rank, terms).transpose(1, 2))
    for name in oracle.SHAPES:
        ours, theirs = oracle.layer(mine, name), base.model.get_submodule(name)
        pairs += [(ours.Lambda, theirs.randlora_lambda["default"].T), (ours.Gamma, theirs.randlora_gamma["default"])]
    return mine, model, pairs


@pytest.mark.parametrize("path", ["auto", "factorised", "materialised"])
@pytest.mark.parametrize("rank", [4, 5])  # 5 does not divide 24: the last of five terms is of no full use
def test_equals_peft(rank, path):
    mine, model, pairs = peft_pair(RandLoRA(rank=rank, alpha=3, zero="lambda", path=path))
    for ours, theirs in pairs:
        assert oracle.relative(ours, theirs) <= 1e-7, "another start"
    oracle.randomise((p for p in mine.parameters() if p.requires_grad), 0.1)
    with torch.no_grad():
        for ours, theirs in pairs:
            theirs.copy_(ours)
    oracle.agree(mine, model)
    for name in oracle.SHAPES:
        ours, theirs = oracle.layer(mine, name), model.base_model.model.get_submodule(name)
        assert oracle.relative(ours.Lambda.grad, theirs.randlora_lambda["default"].grad.T) <= 1e-7
        assert oracle.relative(ours.Gamma.grad, theirs.randlora_gamma["default"].grad) <= 1e-7
    oracle.merged_agree(mine, model)


SETTINGS = [
    {"rank": 4},
    {"rank": 5, "alpha": 2.0},
    {"rank": 24, "basis": "normal"},
    {"rank": 4, "basis": "ternary", "sparsity": 14.0},  # 14 % non-zeros: products of compressed rows
]


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("name", list(oracle.SHAPES))
class TestEqualsTheTextbook:
    """In float64: ΔW = s Σ_jk B_Djk Λ_jk A_kc Γ_jc, transposed where out < in."""

    def both(self, name, settings, **more):
        mine = oracle.ours(RandLoRA(**settings, **more), double=True)
        layer, shared = oracle.layer(mine, name), mine.shared[0]
        oracle.randomise(layer.parameters())
        out, into = oracle.SHAPES[name]
        b = shared.B[: max(out, into), : len(layer.Gamma)]
        scale = settings.get("alpha", 10.0) / settings["rank"]
        delta = scale * torch.einsum("Djk,jk,kc,jc->Dc", b, layer.Lambda, shared.A[:, : min(out, into)], layer.Gamma)
        return mine, layer, delta if out >= into else delta.T

    def test_weight_and_its_adjoint(self, name, settings):
        _, layer, delta = self.both(name, settings)
        gradient = torch.randn(delta.shape, dtype=torch.float64)
        wanted = torch.autograd.grad(delta, layer.sources(), gradient)
        plain = torch.autograd.grad(layer.delta(), layer.sources(), gradient)
        with torch.no_grad():
            found = layer.pullback(gradient)
            assert oracle.relative(layer.build(torch.float64), delta) <= 1e-12
            assert oracle.relative(layer.delta(), delta) <= 1e-12
        for a, b, c in zip(found, plain, wanted, strict=True):
            assert oracle.relative(a, c) <= 1e-10
            assert oracle.relative(b, c) <= 1e-10

    @pytest.mark.parametrize("path", ["factorised", "materialised"])
    def test_output_and_gradients(self, name, settings, path):
        mine, layer, delta = self.both(name, settings, path=path)
        projection = mine.get_submodule(name)
        x = torch.randn(3, 7, oracle.SHAPES[name][1], dtype=torch.float64, requires_grad=True)
        upstream = torch.randn(3, 7, oracle.SHAPES[name][0], dtype=torch.float64)
        tensors = [x, layer.Lambda, layer.Gamma]
        expected, given = F.linear(x, projection.weight + delta, projection.bias), projection(x)
        assert oracle.relative(given, expected) <= 1e-12
        wanted = torch.autograd.grad((expected * upstream).sum(), tensors)
        for a, b in zip(torch.autograd.grad((given * upstream).sum(), tensors), wanted, strict=True):
            assert oracle.relative(a, b) <= 1e-10


@pytest.mark.parametrize("name", ["fc1", "fc2"])
def test_dropout_is_on_the_input_of_the_change(name):
    """Whatever the path: y + drop(x) ΔWᵀ."""
    for path in ("factorised", "materialised"):
        mine = oracle.ours(RandLoRA(rank=4, dropout=0.4, path=path), double=True)
        projection, layer = mine.get_submodule(name), oracle.layer(mine, name)
        oracle.randomise(layer.parameters())
        x = torch.randn(3, 7, projection.in_features, dtype=torch.float64)
        torch.manual_seed(3)
        given = projection(x)
        torch.manual_seed(3)
        expected = F.linear(x, projection.weight, projection.bias) + F.dropout(x, 0.4) @ layer.delta().T
        assert oracle.relative(given, expected) <= 1e-12


def test_gradient_of_the_scaled_basis():
    tensors = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in ((4, 3), (4, 5))]
    base = torch.randn(3, 5, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda *two: ScaledBasis.apply(*two, base), tensors)


def test_the_factorised_path_keeps_one_tensor_of_the_size_of_its_factor():
    """Plain differentiation of Â would keep two more; here only Â itself waits, for the gradient of x."""
    mine = oracle.ours(RandLoRA(rank=4, path="factorised"), ["image.0.o"])
    layer, frozen = oracle.layer(mine, "proj"), {mine.shared[0].B.data_ptr(), mine.proj.weight.data_ptr()}

    def kept(run):
        found = {}
        with torch.autograd.graph.saved_tensors_hooks(lambda t: found.setdefault(t.data_ptr(), t), lambda t: t):
            run()
        return [t.shape for t in found.values() if t.numel() == 24 * 24 and t.data_ptr() not in frozen]

    assert len(kept(lambda: scaled(*layer.small()))) == 1
    assert kept(lambda: ScaledBasis.apply(*layer.small())) == []
    assert len(kept(lambda: mine.proj(torch.randn(30, 24, requires_grad=True)))) == 1


def test_forms_the_weight_once_a_pass(monkeypatch):
    mine = oracle.ours(RandLoRA(rank=4, path="materialised"))
    built = []
    original = type(oracle.layer(mine, "fc1")).build
    monkeypatch.setattr(
        type(oracle.layer(mine, "fc1")), "build", lambda self, dtype: built.append(1) or original(self, dtype)
    )
    oracle.step(mine.run)
    assert len(built) == 4


@pytest.mark.parametrize("path", ["factorised", "materialised"])
def test_a_mixed_precision_run_keeps_the_basis_in_its_own(path):
    mine, found = oracle.ours(RandLoRA(rank=4, path=path)), []
    shared = mine.shared[0]
    for kept in (True, False):
        mine.zero_grad()
        with stored_as(mine, torch.bfloat16) if kept else nullcontext(), torch.autocast("cpu", dtype=torch.bfloat16):
            pointers = {shared.flat(rows, 6, torch.bfloat16).data_ptr() for rows in (96, 72)}
            assert len(pointers) == (1 if kept else 2)
            found.append([*oracle.step(mine.run), *(p.grad for p in mine.parameters() if p.requires_grad)])
            assert shared.flat(96, 6, torch.float32).data_ptr() == shared.B.data_ptr()
    assert shared.lowered is None
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)


class TestCosts:
    def layers(self, **settings):
        weights = {n: torch.empty(shape, device="meta") for n, shape in BLOCK.items()}
        slots = {n: Projection(w, None, {n: len(w)}).slot(n) for n, w in weights.items()}
        adapter = RandLoRA(**settings)
        shared = adapter.prepare(slots)
        return {name: adapter.wrap(slot, shared) for name, slot in slots.items()}

    def test_of_a_block_of_the_reference_tower(self):
        """The figures of the specification: 21.2 M a token factorised; 7.08 M and 10.9 G once materialised."""
        costs = [layer.costs(1000) for layer in self.layers().values()]
        passes = 20 * sum(out * into for out, into in BLOCK.values())
        assert sum(f for f, _ in costs) == pytest.approx(1000 * 21.2e6, rel=0.01)
        assert sum(m for _, m in costs) - passes == pytest.approx(1000 * 7.08e6 + 10.9e9, rel=0.01)

    @pytest.mark.parametrize(("name", "tokens"), [("o", 389), ("fc1", 889), ("fc2", 889), ("qkv", 778)])
    def test_break_even(self, name, tokens):
        """2 d D / (D + 3 d) tokens, and a little for the passes over the weight."""
        layer = self.layers()[name]
        assert layer.choose(tokens) == "factorised"
        assert layer.choose(tokens + 1) == "materialised"

    def test_a_named_path_is_taken(self):
        layer = self.layers()["o"]
        layer.path = "factorised"
        assert layer.choose(10**6) == "factorised"


class TestStart:
    @pytest.mark.parametrize(("zero", "lambdas", "gammas"), [("gamma", 1 / 6, 0.0), ("lambda", 0.0, 1 / 24)])
    def test_one_vector_is_zero(self, zero, lambdas, gammas):
        layer = oracle.layer(oracle.ours(RandLoRA(rank=4, zero=zero)), "fc2")
        assert layer.Lambda.shape == (6, 4)
        assert layer.Gamma.shape == (6, 24)
        assert torch.equal(layer.Lambda, torch.full((6, 4), lambdas))
        assert torch.equal(layer.Gamma, torch.full((6, 24), gammas))

    def test_a_rank_above_the_number_of_terms_sets_the_start(self):
        layer = oracle.layer(oracle.ours(RandLoRA(rank=12)), "fc2")
        assert torch.equal(layer.Lambda, torch.full((2, 12), 1 / 12))

    def test_the_change_has_full_rank_after_a_step(self):
        mine = oracle.ours(RandLoRA(rank=4))
        optimizer = torch.optim.SGD([p for p in mine.parameters() if p.requires_grad], lr=1.0)
        oracle.step(mine.run)
        optimizer.step()
        for name in oracle.SHAPES:
            assert torch.linalg.matrix_rank(oracle.layer(mine, name).delta()) == 24


class TestBasis:
    def test_has_variance_1(self):
        for settings in ({}, {"basis": "normal"}, {"basis": "ternary"}):
            shared = oracle.ours(RandLoRA(rank=6, **settings)).shared[0]
            assert float(shared.B.std()) == pytest.approx(1, rel=0.05)
            assert abs(float(shared.B.mean())) < 0.05
        uniform = oracle.ours(RandLoRA(rank=6)).shared[0].B
        assert 1.7 < uniform.abs().max() <= 3**0.5

    @pytest.mark.parametrize("sparsity", [2.0, 6.0, 20.0])
    def test_ternary_has_as_many_zeros_as_asked(self, sparsity):
        shared = oracle.ours(RandLoRA(rank=6, basis="ternary", sparsity=sparsity)).shared[0]
        assert float((shared.B != 0).float().mean()) == pytest.approx(2 / sparsity, rel=0.15)
        assert sorted(shared.B.unique().tolist()) == pytest.approx(
            [v * (sparsity / 2) ** 0.5 for v in ([-1, 1] if sparsity == 2 else [-1, 0, 1])]
        )

    @pytest.mark.parametrize(("sparsity", "compressed"), [(14.0, True), (13.0, False)])
    def test_rare_entries_are_multiplied_alone(self, monkeypatch, sparsity, compressed):
        mine = oracle.ours(RandLoRA(rank=6, basis="ternary", sparsity=sparsity, path="materialised"))
        assert len(mine.shared[0].rows) == (6 if compressed else 0)  # of 72, 24 and 96 rows, and their transposes
        used, original = [], Rows.times
        monkeypatch.setattr(Rows, "times", lambda *given: used.append(1) or original(*given))
        oracle.step(mine.run)
        assert len(used) == (8 if compressed else 0)
        oracle.step(mine.double().run, dtype=torch.float64)
        assert len(used) == (8 if compressed else 0), "rows are of single precision"

    @pytest.mark.parametrize("settings", SETTINGS)
    def test_can_be_copied_and_pickled_in_use(self, settings):
        mine = oracle.ours(RandLoRA(**settings, path="materialised"))
        oracle.randomise(p for p in mine.parameters() if p.requires_grad)
        wanted, _ = oracle.step(mine.run)
        for again in (copy.deepcopy(mine), pickle.loads(pickle.dumps(mine))):
            assert again.shared[0].B is not mine.shared[0].B
            assert torch.equal(oracle.step(again.run)[0], wanted)

    def test_takes_the_largest_sides_of_layers_not_of_sides(self):
        shared = oracle.ours(RandLoRA(rank=5)).shared[0]
        assert shared.A.shape == (5, 24)
        assert shared.B.shape == (96, 5, 5)
        shared = oracle.ours(RandLoRA(rank=5), ["image.0.qkv"]).shared[0]
        assert shared.B.shape == (72, 5, 5)

    def test_of_the_reference_tower_takes_9_megabytes(self):
        shapes = {n: t.shape for n, t in next(iter(TestCosts().layers().values())).bases.named_buffers()}
        assert shapes == {"A": (6, 768), "B": (3072, 128, 6)}
        assert 4 * sum(s.numel() for s in shapes.values()) == 9_455_616

    def test_depends_on_its_own_seed_alone(self):
        torch.manual_seed(1)
        first = oracle.ours(RandLoRA()).shared[0]
        torch.manual_seed(2)
        again, other = oracle.ours(RandLoRA()).shared[0], oracle.ours(RandLoRA(seed=2)).shared[0]
        assert torch.equal(first.A, again.A)
        assert torch.equal(first.B, again.B)
        assert not torch.equal(first.A, other.A)
        assert not torch.equal(first.B, other.B)

    def test_is_described_and_not_stored(self):
        mine = oracle.ours(RandLoRA(basis="ternary"))
        assert {n.split(".")[-1] for n in mine.state_dict() if ".adapters." in n} == {"Lambda", "Gamma"}
        assert not any(n.startswith("shared") for n in mine.state_dict())
        described = mine.shared[0].fingerprint()
        assert json.loads(json.dumps(described)) == described
        assert described["B"]["shape"] == [96, 4, 6]
        assert described["B"]["sparsity"] == 6.0
        assert described["B"]["checksum"] == random_basis.checksum(mine.shared[0].B)
        assert mine.bfloat16().shared[0].fingerprint() == described, "a cast is no other basis"
        others = [{"seed": 2}, {"basis": "normal"}, {"sparsity": 5.0}, {"rank": 7}]
        for other in others:
            there = oracle.ours(RandLoRA(**{"basis": "ternary"} | other)).shared[0].fingerprint()
            assert there["A"] != described["A"]
            assert there["B"] != described["B"]

    def test_that_does_not_fit_into_memory(self, monkeypatch):
        monkeypatch.setattr(random_basis, "memory_of_machine", lambda: 10_000)
        oracle.ours(RandLoRA(), ["image.0.o"])
        with pytest.raises(UserError, match=r"^RandLoRA: .*9.79 kB.*smaller matrices\.$"):
            oracle.ours(RandLoRA())


def test_rank_above_the_smaller_side():
    with pytest.raises(UserError, match=r"rank 25 .* 24.* image\.0\.o"):
        oracle.ours(RandLoRA(rank=25))


@pytest.mark.parametrize(
    ("rank", "numbers"),
    [(6, 4_755_456), (8, 3_575_808), (10, 2_875_488), (16, 1_806_336), (32, 921_600), (64, 479_232)],
)
def test_numbers_of_the_reference_tower(rank, numbers):
    assert trained_numbers(RandLoRA(rank=rank)) == numbers
