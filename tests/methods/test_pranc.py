"""PRANC equals sums over explicit bases in double precision, however the basis is made."""

import math
import warnings

import oracle
import pytest
import torch
import torch.nn.functional as F
from reference_tower import trained_numbers

from kshot.adapters import PRANC, pranc
from kshot.adapters.pranc import Combination, DenseLayer
from kshot.adapters.random_basis import basis, words
from kshot.holding import merged

DENSE = ["uniform", "normal", "sign"]
VARIANTS = {
    "hashed": {"coefficients": 30},
    "three_hashes": {"coefficients": 30, "hashes": 3, "scale": 0.7},
    **{name: {"coefficients": 5, "basis": name, "scale": 1.3} for name in DENSE},
}
each_variant = pytest.mark.parametrize("variant", VARIANTS)
each_scope = pytest.mark.parametrize("scope", ["layer", "global"])


def trained(model):
    return [p for p in model.parameters() if p.requires_grad]


def explicit(settings, shapes):
    """P_1 ... P_K of each slot, (K, out, in), float64: from the definition, all of them at once."""
    total, start, found = sum(out * into for out, into in shapes.values()), 0, {}
    for name, (out, into) in sorted(shapes.items()):
        whole = settings.scope == "global"
        stream, length = ("pranc", total) if whole else (f"pranc.{name}", out * into)
        k, first = settings.coefficients, start if whole else 0
        mine = slice(first, first + out * into)
        if settings.basis == "hashed":
            p = torch.zeros(k, out * into, dtype=torch.float64)
            for h in range(settings.hashes):
                drawn = words(settings.seed, stream, h * length + first, -(-out * into // 2)).tolist()
                halves = [signed(word >> low & 2**32 - 1) for word in drawn for low in (0, 32)][: out * into]
                for number, position in enumerate(sorted(range(out * into), key=halves.__getitem__)):
                    p[(first + number) % k, position] += 1
        else:
            p = basis(settings.seed, stream, settings.basis, (k, length))[:, mine].double() / math.sqrt(3 * into)
        found[name] = p.view(k, out, into)
        start += out * into
    return found


def signed(half):
    return half - 2**32 if half >= 2**31 else half


@pytest.mark.parametrize("kept", [True, False], ids=["kept", "made_anew"])
@each_scope
@each_variant
def test_equals_the_explicit_sum(variant, scope, kept, monkeypatch):
    """Outputs, gradients and merged weights of the block in float64."""
    if not kept:
        monkeypatch.setattr(pranc, "KEPT", 0)
        monkeypatch.setattr(pranc, "CHUNK", 4000)
    settings = PRANC(**VARIANTS[variant], scope=scope)
    mine = oracle.ours(settings).double()
    oracle.randomise(trained(mine))
    assert len(trained(mine)) == (1 if scope == "global" else 4)
    bases = explicit(settings, {oracle.SLOT_OF[n]: shape for n, shape in oracle.SHAPES.items()})
    leaves = [p.detach().clone().requires_grad_() for p in trained(mine)]
    weights = {}
    for n, alpha in zip(oracle.SHAPES, leaves if scope == "layer" else leaves * 4, strict=True):
        change = settings.scale * torch.einsum("k,koi->oi", alpha, bases[oracle.SLOT_OF[n]])
        weights[n] = mine.get_submodule(n).weight + change
    linear = {n: lambda x, n=n, w=w: F.linear(x, w, mine.get_submodule(n).bias) for n, w in weights.items()}
    expected = oracle.step(lambda x: oracle.block(x, linear), dtype=torch.float64)
    for a, b in zip(oracle.step(mine.run, dtype=torch.float64), expected, strict=True):
        assert oracle.relative(a, b) <= 1e-10
    for ours, theirs in zip(trained(mine), leaves, strict=True):
        assert oracle.relative(ours.grad, theirs.grad) <= 1e-10
    for n, weight in weights.items():
        assert oracle.relative(mine.get_submodule(n).effective_weight(), weight) <= 1e-10


@each_scope
@each_variant
def test_the_pullback_is_the_adjoint(variant, scope, monkeypatch):
    monkeypatch.setattr(pranc, "KEPT", 0)
    mine = oracle.ours(PRANC(**VARIANTS[variant], scope=scope)).double()
    oracle.randomise(trained(mine))
    for n in oracle.SHAPES:
        layer = oracle.layer(mine, n)
        g = torch.randn(layer.slot.weight.shape, dtype=torch.float64)
        expected = torch.autograd.grad(layer.delta(), layer.sources(), g)
        for a, b in zip(layer.pullback(g), expected, strict=True):
            assert oracle.relative(a, b) <= 1e-10


def test_gradcheck(monkeypatch):
    monkeypatch.setattr(pranc, "KEPT", 0)
    layer = oracle.layer(oracle.ours(PRANC(coefficients=4, basis="normal"), ["image.0.o"]).double(), "proj")
    alpha = layer.coefficients()
    oracle.randomise([alpha])

    def first_rows(alpha):
        with torch.no_grad():
            layer.alpha.copy_(alpha)
        return Combination.apply(layer, alpha)[:2]

    assert torch.autograd.gradcheck(first_rows, alpha.detach().clone().requires_grad_())


class TestDenseBasis:
    @each_scope
    @pytest.mark.parametrize("name", DENSE)
    def test_the_same_bits_in_pieces_of_any_size(self, name, scope, monkeypatch):
        settings, results = PRANC(coefficients=7, basis=name, scope=scope), []
        for kept, chunk in [(1 << 30, 1), (0, 1), (0, 2 * 24 * 96), (0, 5 * 24 * 96 - 1), (0, 10**9)]:
            monkeypatch.setattr(pranc, "KEPT", kept)
            monkeypatch.setattr(pranc, "CHUNK", chunk)
            layer = oracle.layer(oracle.ours(settings), "fc1")
            oracle.randomise(layer.sources())
            pieces = [p for _, p in layer.pieces()]
            assert kept or all(p.numel() <= max(chunk, 24 * 96) for p in pieces)
            gradient = torch.linspace(-1, 2, 24 * 96).view(96, 24)
            results.append((len(pieces), torch.cat(pieces), layer.delta().detach(), layer.pullback(gradient)[0]))
        assert [count for count, *_ in results] == [1, 7, 4, 2, 1]
        for _, p, delta, gradient in results[1:]:
            assert torch.equal(p, results[0][1])
            assert oracle.relative(delta, results[0][2]) <= 1e-6
            assert oracle.relative(gradient, results[0][3]) <= 1e-5

    @pytest.mark.parametrize("name", DENSE)
    def test_variance(self, name):
        layer = oracle.layer(oracle.ours(PRANC(coefficients=40, basis=name)), "fc2")
        (piece,) = [layer.scale * p for _, p in layer.pieces()]
        assert float(piece.std()) == pytest.approx(1 / math.sqrt(3 * 96), rel=0.01)
        assert abs(float(piece.mean())) < 1e-3
        bound = float(piece.abs().max()) * math.sqrt(96)
        assert {"uniform": 0.99 < bound <= 1, "normal": bound > 2, "sign": bound == pytest.approx(3**-0.5)}[name]
        correlation = piece @ piece.T / (piece.shape[1] * piece.var())
        assert oracle.relative(correlation, torch.eye(40)) < 0.12

    @each_scope
    def test_a_large_one_is_nowhere_and_made_once_a_pass(self, scope, monkeypatch):
        monkeypatch.setattr(pranc, "KEPT", 4 * 9 * 24 * 24 - 1)
        mine = oracle.ours(PRANC(coefficients=9, basis="sign", scope=scope), ["image.0.o"])
        assert list(oracle.layer(mine, "proj").buffers()) == []
        made, original = [], DenseLayer.made
        monkeypatch.setattr(DenseLayer, "made", lambda *given: made.append(1) or original(*given))
        mine.run(torch.randn(5, 24))
        assert len(made) == 1

    def test_dropout_needs_no_basis_in_memory_either(self, monkeypatch):
        monkeypatch.setattr(pranc, "KEPT", 0)
        mine = oracle.ours(PRANC(coefficients=6, basis="normal", dropout=0.5))
        oracle.randomise(trained(mine))
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t.numel()), t)[1], lambda t: t):
            y = mine.run(torch.randn(5, 24))
        assert max(kept) <= 24 * 96
        y.square().sum().backward()
        assert all(p.grad.abs().min() > 0 for p in trained(mine))

    def test_a_slow_one_is_announced(self):
        with pytest.warns(UserWarning, match=r"1\.7e\+11 random numbers; basis: hashed"):
            trained_numbers(PRANC(basis="uniform"))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            trained_numbers(PRANC())
            trained_numbers(PRANC(basis="uniform", coefficients=100))


class TestHashedBasis:
    @each_scope
    def test_every_weight_has_one_coefficient_a_hash(self, scope):
        for hashes in (1, 4):
            mine = oracle.ours(PRANC(coefficients=11, hashes=hashes, scope=scope))
            with torch.no_grad():
                for alpha in trained(mine):
                    alpha.fill_(1.0)
            for n in oracle.SHAPES:
                assert torch.equal(oracle.layer(mine, n).delta(), torch.full(oracle.SHAPES[n], float(hashes)))
                assert oracle.layer(mine, n).index.dtype == torch.int32

    @each_scope
    @pytest.mark.parametrize("coefficients", [7, 1000, 2000])
    def test_coefficients_have_the_same_share(self, scope, coefficients):
        """As the authors' permutation gives it: as many weights as any other, or one less, by each hash."""
        mine = oracle.ours(PRANC(coefficients=coefficients, hashes=2, scope=scope))
        picked = [oracle.layer(mine, n).index for n in oracle.SHAPES]
        for index in picked if scope == "layer" else [torch.cat(picked, 1)]:
            for row in index:
                shares = torch.bincount(row, minlength=coefficients)
                assert len(shares) == coefficients
                assert shares.max() - shares.min() <= 1
                assert shares.min() == len(row) // coefficients

    @each_scope
    def test_weights_are_picked_at_random(self, scope):
        """Neighbours, and the same weight by two hashes, take equal coefficients as rarely as chance says."""
        mine = oracle.ours(PRANC(coefficients=8, hashes=2, scope=scope))
        first, second = oracle.layer(mine, "fc1").index
        for a, b in ((first[1:], first[:-1]), (first[24:], first[:-24]), (first, second)):
            assert float((a == b).float().mean()) == pytest.approx(1 / 8, abs=0.03)

    def test_long_sums_lose_nothing(self):
        """2,304 numbers of one sign fall on one coefficient; in float32 the last digits would be lost."""
        layer = oracle.layer(oracle.ours(PRANC(coefficients=1)), "fc1")
        gradient = torch.rand(96, 24)
        assert layer.pullback(gradient)[0].item() == gradient.double().sum().float().item()


class TestStart:
    @each_scope
    @each_variant
    def test_no_bit_changes(self, variant, scope):
        mine, x = oracle.ours(PRANC(**VARIANTS[variant], scope=scope)), torch.randn(5, 24)
        assert torch.equal(mine.run(x), oracle.Plain()(x))
        assert all(p.abs().max() == 0 for p in trained(mine))

    @each_variant
    def test_the_basis_depends_on_its_own_seed_and_the_slot_alone(self, variant):
        def change(name="fc1", targets=oracle.TARGETS, **more):
            layer = oracle.layer(oracle.ours(PRANC(**VARIANTS[variant], **more), targets), name)
            with torch.no_grad():
                layer.coefficients().copy_(torch.linspace(-1, 2, len(layer.coefficients())))
            return layer.delta().detach()

        torch.manual_seed(1)
        first = change()
        torch.manual_seed(2)
        assert torch.equal(change(), first)
        assert torch.equal(change(targets=["image.0.fc1"]), first)
        assert oracle.relative(change(seed=2), first) > 0.1
        assert oracle.relative(change("fc2").T, first) > 0.1


class TestGlobalScope:
    def test_one_tensor_for_all_layers(self):
        mine = oracle.ours(PRANC(coefficients=30, scope="global"))
        (alpha,) = trained(mine)
        assert alpha is mine.shared[0].alpha
        assert all(oracle.layer(mine, n).sources() == [alpha] for n in oracle.SHAPES)
        assert [n for n, p in mine.named_parameters() if p.requires_grad] == ["shared.0.alpha"]
        assert mine.trainable("image") == [alpha]

    def test_saved_and_loaded(self):
        first, again, x = *(oracle.ours(PRANC(coefficients=30, scope="global")) for _ in range(2)), torch.randn(5, 24)
        oracle.randomise(trained(first))
        before = again.eval().run(x)
        for assign in (False, True):
            again.load_state_dict(first.state_dict(), assign=assign)
            assert torch.equal(again.run(x), first.eval().run(x))
        assert not torch.equal(again.run(x), before)
        with merged(again), torch.no_grad():
            assert oracle.relative(again.run(x), first.train().run(x)) <= 1e-5

    @pytest.mark.parametrize("variant", ["three_hashes", "uniform"])
    def test_compiled(self, variant):
        targets = ["image.0.qkv", "image.0.fc2"]
        mine, compiled = (oracle.ours(PRANC(**VARIANTS[variant], scope="global"), targets) for _ in range(2))
        for model in (mine, compiled):
            oracle.randomise(trained(model))
        expected = oracle.step(mine.run)
        given = oracle.step(torch.compile(compiled.run, backend="aot_eager"))
        for a, b in zip(given, expected, strict=True):
            assert oracle.relative(a, b) <= 1e-5
        assert oracle.relative(trained(compiled)[0].grad, trained(mine)[0].grad) <= 1e-5


class TestCheckpoint:
    @pytest.mark.parametrize(
        ("settings", "count"),
        [
            ({}, 48_000),
            ({"hashes": 2}, 48_000),
            ({"coefficients": 10_000, "scope": "global"}, 10_000),
            ({"coefficients": 10, "basis": "normal"}, 480),
        ],
        ids=str,
    )
    def test_number_of_parameters(self, settings, count):
        assert trained_numbers(PRANC(**settings)) == count

    @each_scope
    @each_variant
    def test_it_holds_the_coefficients_alone(self, variant, scope):
        """So that 48,000 take 192 kB; what all layers hold has one name among the parameters."""
        mine = oracle.ours(PRANC(**VARIANTS[variant], scope=scope))
        frozen = oracle.Ours(oracle.Plain()).state_dict()
        assert all(n.endswith(".alpha") for n in mine.state_dict() if n not in frozen)
        stored = {n: p for n, p in mine.named_parameters() if n not in frozen}
        layers = 1 if scope == "global" else 4
        assert sum(v.nbytes for v in stored.values()) == 4 * layers * VARIANTS[variant]["coefficients"]

    @each_scope
    @each_variant
    def test_it_names_the_basis(self, variant, scope):
        def fingerprint(targets=oracle.TARGETS, **more):
            return oracle.ours(PRANC(**VARIANTS[variant] | {"scope": scope} | more), targets).shared[0].fingerprint()

        first = fingerprint()
        assert first == fingerprint()
        assert first["pranc"]["generator"] == "kshot-splitmix64-1"
        assert first["pranc"]["seed"] == 1
        assert first["pranc"]["distribution"] == {"hashed": "permutation", "three_hashes": "permutation"}.get(
            variant, variant
        )
        others = [{"seed": 2}, {"coefficients": 6}, {"scope": "global" if scope == "layer" else "layer"}]
        others += [{"hashes": 2}] if variant == "hashed" else [{"basis": "hashed", "hashes": 1}]
        for other in others:
            assert fingerprint(**other) != first, other
        if scope == "global":
            assert fingerprint(["image.0.qkv", "image.0.o", "image.0.fc1"]) != first
