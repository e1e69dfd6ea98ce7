"""SVFT equals dense products in double precision, on every path, and knows which singular pairs it stands on."""

import hashlib
from contextlib import nullcontext

import oracle
import pytest
import torch
import torch.nn.functional as F
from oracle import same
from reference_tower import trained_numbers

from kshot.adapters import SVFT, svft
from kshot.adapters.svd import SVD, svd_of
from kshot.adapters.svft import Band, Positions, SingularProduct
from kshot.errors import UserError
from kshot.holding import merged, stored_as
from kshot.slots import Projection

SQUARE = "image.0.o"
PATTERNS = {
    "plain": {"pattern": "plain"},
    "plain_gate": {"pattern": "plain", "gate": True},
    "band_1": {"pattern": "banded", "band": 1},
    "band_3_gate": {"pattern": "banded", "band": 3, "gate": True},
    "band_23": {"pattern": "banded", "band": 23},
    "random": {"pattern": "random"},
    "random_37": {"pattern": "random", "entries": 37, "start": "reference"},
    "top_k": {"pattern": "top_k", "entries": 30},
}
each_pattern = pytest.mark.parametrize("label", PATTERNS)
each_path = pytest.mark.parametrize("path", ["materialised", "svd"])


def targets(label):
    return [SQUARE] if label == "top_k" else oracle.TARGETS


def trained(model):
    return [p for p in model.parameters() if p.requires_grad]


def layers_of(backbone):
    return {
        n: s.projection.layers()[s.part]
        for n, s in (backbone.slots() | backbone.fused_slots()).items()
        if s.part in s.projection.layers()
    }


def single(settings, out=10, into=6, weight=None, name="image.0.p"):
    """One slot of a projection of its own, and its layer."""
    weight = torch.randn(out, into, generator=torch.Generator().manual_seed(3)) if weight is None else weight
    projection = Projection(weight, torch.linspace(-1, 1, len(weight)), {"p": len(weight)}, name.removesuffix(".p"))
    slot = projection.slot("p")
    layer = settings.wrap(slot, settings.prepare({name: slot}))
    layer.path = settings.path
    slot.attach(layer)
    return projection, layer


def positions(settings, layer):
    """(row, column) of each trained value, from the definition."""
    n = len(layer.s)
    if settings.pattern in ("random", "top_k"):
        return [divmod(int(p), n) for p in layer.omega.flat]
    band = 0 if settings.pattern == "plain" else settings.band
    offsets = sorted(range(-band, band + 1), key=lambda d: (abs(d), -d))
    return [(j - d, j) for d in offsets for j in range(n) if 0 <= j - d < n]


def core(settings, layer, values, gate):
    """M, (n, n), entry by entry."""
    m = torch.zeros(len(layer.s), len(layer.s), dtype=values.dtype)
    for (row, column), value in zip(positions(settings, layer), values, strict=True):
        m[row, column] = value
    return m if gate is None else m / (1 + torch.exp(-gate))


class TestDenseReference:
    """Outputs, all gradients and merged weights of the block in float64."""

    @each_path
    @each_pattern
    def test_equals_it(self, label, path):
        settings = SVFT(**PATTERNS[label], path=path)
        mine = oracle.ours(settings, targets(label)).double()
        oracle.randomise(trained(mine))
        leaves, weights = [], {}
        for name in oracle.SHAPES:
            projection = mine.get_submodule(name)
            weights[name] = projection.weight
            if oracle.SLOT_OF[name] in targets(label):
                layer = oracle.layer(mine, name)
                own = [p.detach().clone().requires_grad_() for p in layer.sources()]
                leaves += list(zip(own, layer.sources(), strict=True))
                m = core(settings, layer, own[0], own[1] if len(own) > 1 else None)
                assert len(own[0]) == len(set(positions(settings, layer)))
                base = layer.u @ torch.diag(layer.s) @ layer.vt if path == "svd" else projection.weight
                assert oracle.relative(base, projection.weight) <= 1e-6
                weights[name] = base + layer.u @ m @ layer.vt
        linear = {n: lambda x, n=n, w=w: F.linear(x, w, mine.get_submodule(n).bias) for n, w in weights.items()}
        expected = oracle.step(lambda x: oracle.block(x, linear), dtype=torch.float64)
        given = oracle.step(mine.run, dtype=torch.float64)
        for a, b in zip(given, expected, strict=True):
            assert oracle.relative(a, b) <= 1e-10
        for theirs, ours in leaves:
            assert oracle.relative(ours.grad, theirs.grad) <= 1e-10
        for name, weight in weights.items():
            assert oracle.relative(mine.get_submodule(name).effective_weight(), weight) <= 1e-6

    @each_pattern
    def test_the_pullback_is_the_adjoint(self, label):
        settings = SVFT(**PATTERNS[label])
        _, layer = single(settings, *((6, 6) if label == "top_k" else (30, 26)))
        oracle.randomise(layer.double().parameters())
        g = torch.randn(layer.slot.weight.shape, dtype=torch.float64)
        expected = torch.autograd.grad(layer.delta(), layer.sources(), g)
        for a, b in zip(layer.pullback(g), expected, strict=True):
            assert a.shape == b.shape
            assert oracle.relative(a, b) <= 1e-10

    @pytest.mark.parametrize("bias", [True, False])
    @pytest.mark.parametrize(
        "omega", [Band(4, 0), Band(4, 1), Band(4, 3), Positions(4, torch.tensor([1, 6, 7, 15]))], ids=str
    )
    def test_gradcheck(self, omega, bias):
        def leaf(*shape):
            return torch.randn(shape, dtype=torch.float64, requires_grad=True)

        u, s, vt = leaf(5, 4).detach(), leaf(4).detach(), leaf(4, 3).detach()
        b = leaf(5) if bias else None
        assert torch.autograd.gradcheck(
            lambda x, m, b: SingularProduct.apply(x, m, b, omega, u, s, vt), (leaf(2, 3, 3), leaf(omega.size), b)
        )


class TestPaths:
    @each_pattern
    def test_agree_in_float32(self, label):
        results, adapter = {}, SVFT(**PATTERNS[label], path="materialised")
        for path in ("materialised", "svd", "auto"):
            mine = oracle.ours(SVFT(**PATTERNS[label], path=path), targets(label))
            oracle.randomise(trained(mine))
            results[path] = [*oracle.step(mine.run), torch.cat([p.grad.flatten() for p in trained(mine)])]
        mine = oracle.ours(adapter, targets(label)).eval()
        oracle.randomise(trained(mine))
        x = torch.randn(2, 20, 24, generator=torch.Generator().manual_seed(2))
        with merged(mine), torch.no_grad():
            assert oracle.relative(mine.run(x), results["materialised"][0]) <= 1e-5
        for path in ("svd", "auto"):
            for a, b in zip(results[path], results["materialised"], strict=True):
                assert oracle.relative(a, b) <= 1e-5

    @each_path
    def test_with_dropout_there_is_one(self, path):
        outcomes = []
        for chosen in ("auto", path):
            mine = oracle.ours(SVFT(dropout=0.5, path=chosen))
            oracle.randomise(trained(mine))
            torch.manual_seed(4)
            outcomes.append(oracle.step(mine.run))
        for a, b in zip(*outcomes, strict=True):
            assert torch.equal(a, b)
        calm = oracle.step(mine.eval().run)[0]
        assert oracle.relative(outcomes[0][0], calm) > 0.01

    @pytest.mark.parametrize(
        ("out", "into", "tokens", "path"),
        [
            (20, 20, 40, "svd"),
            (20, 20, 41, "materialised"),
            (80, 20, 10**6, "svd"),
            (20, 80, 10**6, "svd"),
            (60, 20, 10**6, "svd"),
            (30, 20, 120, "svd"),  # between: up to 2 ρ d / (2 - ρ) tokens for sides of the ratio ρ
            (30, 20, 121, "materialised"),
        ],
    )
    def test_the_cheapest_one(self, out, into, tokens, path):
        _, layer = single(SVFT(), out, into)
        assert layer.choose(tokens) == path
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert layer.choose(tokens) == "materialised"
            layer.slot.projection.double()  # which autocast leaves alone
            assert layer.choose(tokens) == path
        layer.path = "materialised"
        assert layer.choose(1) == "materialised"

    def test_beside_rows_that_need_the_frozen_product_it_saves_nothing(self):
        few, all_rows = oracle.ours(SVFT(), ["image.0.[qv]"]), oracle.ours(SVFT(), ["image.0.[qkv]"])
        (a, *_), (b, *_) = layers_of(few).values(), layers_of(all_rows).values()
        assert [layer.choose(40) for layer in (a, b)] == ["materialised", "svd"]
        assert [layer.choose(10) for layer in (a, b)] == ["svd", "svd"]

    def test_in_the_singular_basis_the_input_is_not_kept(self):
        mine = oracle.ours(SVFT(pattern="banded", path="svd"), ["image.0.fc2"])
        x, kept = torch.randn(50, 96, requires_grad=True), []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t.shape), t)[1], lambda t: t):
            mine.fc2(x).sum().backward()
        assert [shape for shape in kept if shape[0] == 50] == [(50, 24)]
        assert x.grad is not None

    @each_path
    def test_a_mixed_precision_run_keeps_factors_in_its_own(self, path):
        projection, layer = single(SVFT(path=path), 12, 8)
        found, x = [], torch.randn(5, 8)
        for kept in (True, False):
            layer.zero_grad()
            with (
                stored_as(projection, torch.bfloat16) if kept else nullcontext(),
                torch.autocast("cpu", torch.bfloat16),
            ):
                y = projection(x)
                assert (layer.frozen(torch.bfloat16)[0].dtype == torch.bfloat16) == kept
                y.float().sum().backward()
            assert y.dtype == torch.bfloat16
            assert layer.values.grad.dtype == torch.float32
            found.append((y, layer.values.grad.clone()))
        assert layer.lowered is None
        for a, b in zip(*found, strict=True):
            assert torch.equal(a, b)


class TestStart:
    def test_at_zero_no_bit_changes_but_by_rounding_in_the_singular_basis(self):
        x = torch.randn(5, 24)
        for gate in (True, False):
            assert torch.equal(oracle.ours(SVFT(path="materialised", gate=gate)).run(x), oracle.Plain()(x))
        assert 0 < oracle.relative(oracle.ours(SVFT(path="svd")).run(x), oracle.Plain()(x)) <= 2e-6

    @pytest.mark.parametrize("settings", [{}, {"pattern": "banded", "band": 4}, {"pattern": "random"}], ids=str)
    def test_the_published_one_is_another_model(self, settings):
        _, layer = single(SVFT(**settings, start="reference"), 300, 250)
        assert layer.gate.shape == ()
        assert layer.gate.item() == 0
        assert float(layer.delta().detach().norm()) == pytest.approx(0.5**0.5, rel=0.12)
        assert float(layer.values.detach().std()) == pytest.approx((2 / len(layer.values)) ** 0.5, rel=0.12)
        assert "gate" in layer.undecayed

    def test_drawn_values_depend_on_seed_and_slot_alone(self):
        def drawn(seed, name):
            torch.manual_seed(seed)
            return single(SVFT(start="reference"), name=name)[1].values

        assert torch.equal(drawn(1, "image.0.q"), drawn(1, "image.0.q"))
        assert not torch.equal(drawn(1, "image.0.q"), drawn(2, "image.0.q"))
        assert not torch.equal(drawn(1, "image.0.q"), drawn(1, "image.0.k"))


class TestPatterns:
    @pytest.mark.parametrize(
        ("settings", "count"),
        [
            ({}, 36_864),
            ({"gate": True}, 36_912),
            ({"start": "reference"}, 36_912),
            ({"pattern": "banded", "band": 1}, 110_496),
            ({"pattern": "banded"}, 184_032),
            ({"pattern": "random"}, 184_032),
            ({"pattern": "banded", "band": 8}, 623_232),
            ({"pattern": "random", "entries": 100}, 4_800),
        ],
        ids=str,
    )
    def test_number_of_parameters(self, settings, count):
        assert trained_numbers(SVFT(**settings)) == count

    def test_a_random_one_is_the_same_everywhere(self):
        """The positions of the largest words, as signed numbers, of the stream named after the slot."""

        def largest(seed, name):
            key = int.from_bytes(hashlib.sha256(f"{seed}/svft.{name}".encode()).digest()[:8], "little")

            def word(i):
                z = (key + (i + 1) * 0x9E3779B97F4A7C15) % 2**64
                z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 % 2**64
                z = (z ^ z >> 27) * 0x94D049BB133111EB % 2**64
                return (z ^ z >> 31 ^ 2**63) - 2**63

            return sorted(sorted(range(81), key=word)[-8:])

        state, found = torch.get_rng_state(), []
        for seed, name in [(1, "image.0.p"), (2, "image.0.p"), (1, "image.1.p")]:
            _, layer = single(SVFT(pattern="random", entries=8, seed=seed), 12, 9, name=name)
            assert layer.omega.flat.tolist() == largest(seed, name)
            found.append(tuple(layer.omega.flat.tolist()))
        assert len(set(found)) == 3
        assert torch.equal(torch.get_rng_state(), state)

    def test_all_positions_at_random_are_all_positions(self):
        _, layer = single(SVFT(pattern="random", entries=36), 9, 6)
        assert layer.omega.flat.tolist() == list(range(36))

    def test_top_k_takes_the_most_alike_whatever_their_sign(self):
        _, layer = single(SVFT(pattern="top_k", entries=11), 7, 7)
        alike = (layer.u.double().T @ layer.vt.double().T).flatten()
        best = sorted(range(49), key=lambda p: -abs(float(alike[p])))[:11]
        assert layer.omega.flat.tolist() == sorted(best)
        assert alike[layer.omega.flat].min() < 0 < alike[layer.omega.flat].max()

    @pytest.mark.parametrize(
        ("settings", "target", "message"),
        [
            ({"pattern": "top_k"}, "image.0.fc1", r"top_k .* square .* image\.0\.fc1 .* 96 x 24"),
            ({"pattern": "banded", "band": 24}, SQUARE, r"band is 24, .* below 24.* image\.0\.o"),
            ({"pattern": "random", "band": 24}, SQUARE, r"band is 24, .* below 24.* image\.0\.o"),
            ({"pattern": "random", "entries": 577}, SQUARE, r"entries is 577, .* image\.0\.o has 576"),
            ({"path": "factorised"}, SQUARE, r"path is factorised"),
        ],
        ids=str,
    )
    def test_what_a_slot_does_not_have(self, settings, target, message):
        with pytest.raises(UserError, match=message) as error:
            oracle.ours(SVFT(**settings), [target])
        assert "\n" not in str(error.value)


def mirrored(weight):
    """A decomposition with the opposite sign for every second pair, as another library may find it."""
    u, s, vt = svd_of(weight)
    signs = 1.0 - 2 * (torch.arange(len(s)) % 2)
    return SVD(u * signs, s, signs[:, None] * vt)


def turned(weight):
    """A decomposition with the last two pairs turned into each other: as good where their singular values are equal."""
    u, s, vt = (t.clone() for t in svd_of(weight))
    turn = torch.tensor([[0.6, -0.8], [0.8, 0.6]])
    u[:, -2:] @= turn
    vt[-2:] = turn.T @ vt[-2:]
    return SVD(u, s, vt)


def with_values(*singular):
    """A weight, (9, n), of these singular values."""
    generator = torch.Generator().manual_seed(5)
    u = torch.linalg.qr(torch.randn(9, 9, generator=generator, dtype=torch.float64))[0][:, : len(singular)]
    v = torch.linalg.qr(torch.randn(len(singular), len(singular), generator=generator, dtype=torch.float64))[0]
    return (u * torch.tensor(singular, dtype=torch.float64) @ v.T).float()


class TestCheckpoint:
    def test_it_holds_the_values_and_names_the_pairs(self, monkeypatch):
        mine = oracle.ours(SVFT(pattern="banded"))
        assert {n.split(".")[-1] for n in mine.state_dict() if ".adapters." in n} == {"values"}
        found = mine.shared[0].fingerprint()["svd"]
        assert found.keys() == set(oracle.TARGETS)
        assert oracle.ours(SVFT()).shared[0].fingerprint() == {"svd": found}
        monkeypatch.setattr(svft, "svd_of", mirrored)
        other = oracle.ours(SVFT()).shared[0].fingerprint()["svd"]
        assert not any(same(other[name], found[name]) for name in found)

    def test_positions_are_stored(self):
        mine = oracle.ours(SVFT(pattern="random", entries=30))
        oracle.randomise(trained(mine))
        other, x = oracle.ours(SVFT(pattern="random", entries=30, seed=2)), torch.randn(5, 24)
        other.load_state_dict(mine.state_dict())
        assert torch.equal(other.run(x), mine.run(x))

    def test_with_factors_it_means_the_same_everywhere(self, monkeypatch):
        settings = SVFT(pattern="banded", save_factors=True, path="svd")
        mine, x = oracle.ours(settings), torch.randn(5, 24)
        oracle.randomise(trained(mine))
        saved = {name: tensor.clone() for name, tensor in mine.state_dict().items()}
        assert len(mine.shared) == 0
        assert {n.split(".")[-1] for n in saved if ".adapters." in n} == {"values", "u", "s", "vt"}
        monkeypatch.setattr(svft, "svd_of", mirrored)
        other = oracle.ours(settings)
        other.load_state_dict({n: p for n, p in saved.items() if n.endswith(".values")}, strict=False)
        assert oracle.relative(other.run(x), mine.run(x)) > 0.01
        other.load_state_dict(saved)
        assert torch.equal(other.run(x), mine.run(x))
        monkeypatch.undo()
        oracle.ours(settings).load_state_dict({n: p + 1 for n, p in saved.items()})
        svd_of(mine.fc1.weight)  # fails if loading had written into the cache

    @pytest.mark.parametrize("singular", [(3, 2, 1, 1), (3, 2, 0, 0)])
    def test_pairs_that_may_turn_into_each_other(self, singular, monkeypatch):
        weight = with_values(*singular)
        for pattern in ("banded", "random"):
            with pytest.raises(UserError, match=r"image\.0\.p .* save_factors") as error:
                single(SVFT(pattern=pattern, band=1, save_factors=False), weight=weight)
            assert "\n" not in str(error.value)
            for choice in (None, True):
                _, layer = single(SVFT(pattern=pattern, band=1, save_factors=choice), weight=weight)
                assert {"u", "s", "vt"} <= layer.state_dict().keys()
        assert "u" not in single(SVFT(), weight=weight)[1].state_dict()
        assert "u" not in single(SVFT(pattern="banded", band=1), weight=with_values(4, 3, 2, 1))[1].state_dict()
        _, layer = single(SVFT(), weight=weight)
        slots = {"image.0.p": layer.slot}
        known = SVFT().prepare(slots).fingerprint()["svd"]["image.0.p"]
        monkeypatch.setattr(svft, "svd_of", turned)
        assert oracle.relative(torch.linalg.multi_dot([(d := turned(weight)).u, d.s.diag(), d.vt]), weight) <= 1e-5
        assert not same(SVFT().prepare(slots).fingerprint()["svd"]["image.0.p"], known)

    @each_path
    def test_a_weight_without_full_rank(self, path):
        weight = with_values(3, 2, 0, 0)
        projection, layer = single(SVFT(path=path), weight=weight)
        x = torch.randn(6, 4)
        assert oracle.relative(projection(x), F.linear(x, weight, projection.bias)) <= 2e-6
        oracle.randomise(layer.parameters())
        y = projection(x)
        y.square().sum().backward()
        assert layer.values.grad.isfinite().all()
        assert layer.values.grad.abs().min() > 0, "directions that the weight ignores can be learnt too"
        with merged(projection), torch.no_grad():
            assert oracle.relative(projection.eval()(x), y) <= 1e-5
