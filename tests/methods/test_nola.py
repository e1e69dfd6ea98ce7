"""NOLA equals PEFT's LoRA with the combined factors; all layers are combined together, once a pass."""

import copy
import gc
import json
import pickle
import weakref

import oracle
import pytest
import torch
import towers
from peft import LoraConfig
from reference_tower import trained_numbers
from torch.utils._python_dispatch import TorchDispatchMode

from kshot.adapters import NOLA, nola, random_basis
from kshot.adapters.nola import pack, unpack
from kshot.adapters.random_basis import basis
from kshot.checkpoint import read_tensors, write_tensors
from kshot.errors import UserError
from kshot.holding import merged

SMALL = {"bases": 16, "rank": 3}
OWNERS = ["shared", "layer"]


def matrices(layer, adapter):
    """A0, (r, in), A_k, (K, r, in), and B_k, (K, out, r), of a layer of the block, drawn here, in float64."""
    slot, k, r = layer.slot, adapter.bases, adapter.rank
    scale = (3 * k) ** -0.5  # of U(-1, 1) / √K
    first = (
        basis(adapter.seed, f"nola.{slot.name}.A0", "uniform", (r, slot.in_features)) / (3 * slot.in_features) ** 0.5
    )
    if adapter.basis == "shared":
        a = basis(adapter.seed, "nola.A", "uniform", (k, 96, r))[:, : slot.in_features]
        b = basis(adapter.seed, "nola.B", "uniform", (k, 96, r))[:, : slot.out_features]
    else:
        a = basis(adapter.seed, f"nola.{slot.name}.A", "uniform", (k, slot.in_features, r))
        b = basis(adapter.seed, f"nola.{slot.name}.B", "uniform", (k, slot.out_features, r))
    return first.double(), scale * a.transpose(1, 2).double(), scale * b.double()


def trained(backbone):
    return {n: p for n, p in backbone.named_parameters() if p.requires_grad}


def layers(backbone):
    return [oracle.layer(backbone, name) for name in oracle.SHAPES]


@pytest.mark.parametrize("path", ["auto", "factorised", "materialised"])
@pytest.mark.parametrize("owner", OWNERS)
def test_equals_peft(owner, path):
    adapter = NOLA(**SMALL, alpha=7, basis=owner, path=path)
    mine = oracle.ours(adapter, double=True)
    model = oracle.theirs(LoraConfig(r=3, lora_alpha=7, target_modules=list(oracle.SHAPES)))
    oracle.randomise(trained(mine).values())
    known = {}
    for name in oracle.SHAPES:
        ours, theirs = oracle.layer(mine, name), model.base_model.model.get_submodule(name)
        first, a, b = matrices(ours, adapter)
        known[name] = a, b
        with torch.no_grad():
            theirs.lora_A["default"].weight.copy_(first + torch.einsum("k,kri->ri", ours.alpha.double(), a))
            theirs.lora_B["default"].weight.copy_(torch.einsum("k,kor->or", ours.beta.double(), b))
    oracle.agree(mine, model)
    for name, (a, b) in known.items():
        ours, theirs = oracle.layer(mine, name), model.base_model.model.get_submodule(name)
        to_a, to_b = theirs.lora_A["default"].weight.grad, theirs.lora_B["default"].weight.grad
        assert oracle.relative(ours.alpha.grad, torch.einsum("kri,ri->k", a, to_a)) <= 1e-6
        assert oracle.relative(ours.beta.grad, torch.einsum("kor,or->k", b, to_b)) <= 1e-6
    oracle.merged_agree(mine, model)


@pytest.mark.parametrize("owner", OWNERS)
def test_equals_the_dense_formula(owner):
    """In float64: ΔW = s (Σ_k β_k B_k) (A0 + Σ_k α_k A_k), with its gradients."""
    adapter = NOLA(**SMALL, alpha=7, basis=owner)
    mine = oracle.ours(adapter, double=True)
    oracle.randomise(trained(mine).values())
    for layer in layers(mine):
        first, a, b = matrices(layer, adapter)
        down = first + torch.einsum("k,kri->ri", layer.alpha, a)
        expected = 7 / 3 * torch.einsum("k,kor->or", layer.beta, b) @ down
        upstream = torch.randn(expected.shape, dtype=torch.float64)
        assert oracle.relative(layer.delta(), expected) <= 1e-7  # the drawn numbers and their scales are float32
        own = [layer.alpha, layer.beta]
        wanted = torch.autograd.grad(expected, own, upstream)
        for found, right in zip(torch.autograd.grad(layer.delta(), own, upstream), wanted, strict=True):
            assert oracle.relative(found, right) <= 1e-7


def test_paths_agree_under_dropout():
    steps = []
    for path in ("factorised", "materialised"):
        mine = oracle.ours(NOLA(**SMALL, dropout=0.4, path=path))
        oracle.randomise(trained(mine).values())
        torch.manual_seed(3)
        steps.append([*oracle.step(mine.run), *(p.grad for p in trained(mine).values())])
    for a, b in zip(*steps, strict=True):
        assert oracle.relative(a, b) <= 1e-5


class Products(TorchDispatchMode):
    """Counts products with a basis of K matrices."""

    def __init__(self, bases):
        super().__init__()
        self.bases, self.count = bases, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.overloadpacket is torch.ops.aten.mm and any(self.bases in t.shape for t in args):
            self.count += 1
        return function(*args, **(kwargs or {}))


class TestTogether:
    @pytest.mark.parametrize("owner", OWNERS)
    def test_equals_each_layer_by_itself(self, owner):
        """In a pass, outside of one, and by plain operations."""
        mine = oracle.ours(NOLA(**SMALL, basis=owner), double=True)
        oracle.randomise(trained(mine).values())
        (shared,) = mine.shared
        for name in oracle.SHAPES:
            layer = oracle.layer(mine, name)
            with mine.passing("image"):
                assert layer.made is not None
                (together,) = layer.factors()
            assert layer.made is None
            (alone,) = layer.factors()
            up, down = shared.B.combine_one(layer.index, layer.beta), shared.A.combine_one(layer.index, layer.alpha).T
            assert up.shape == (layer.slot.out_features, 3)
            assert down.shape == (3, layer.slot.in_features)
            own = [layer.alpha, layer.beta]
            upstream = torch.randn_like(up), torch.randn_like(down)
            wanted = torch.autograd.grad((up, down), own, upstream)
            for found in (together, alone):
                for a, b in zip(found, (up, layer.A0 + down), strict=True):
                    assert oracle.relative(a, b) <= 1e-13
                for a, b in zip(torch.autograd.grad(found, own, upstream), wanted, strict=True):
                    assert oracle.relative(a, b) <= 1e-13

    @pytest.mark.parametrize("path", ["factorised", "materialised"])
    def test_one_product_a_side_serves_all_layers_of_a_pass(self, path):
        mine = oracle.ours(NOLA(bases=17, rank=3, path=path))
        with Products(17) as forward:
            loss = mine.run(torch.randn(5, 24)).square().sum()
        assert forward.count == 2
        with Products(17) as backward:
            loss.backward()
        assert backward.count == 2
        with Products(17) as merging, merged(mine):
            assert merging.count == 2
            mine.run(torch.randn(5, 24))
            assert merging.count == 2, "made for nobody"

    @pytest.mark.parametrize("tower", ["image", "text"])
    def test_towers_make_their_own(self, tower):
        """Also where the text tower runs in parts, each of which is computed again in the backward pass."""
        backbone = towers.backbone("clip")
        NOLA(bases=17, rank=2).attach(backbone, ["*"])
        oracle.randomise(trained(backbone).values())
        backbone.train()
        found = []
        for budget in (None, 1):
            backbone.text_memory, _ = budget, backbone.zero_grad()
            with Products(17) as products:
                towers.encode(backbone, tower).square().sum().backward()
            assert all(layer.made is None for layer in backbone.layers().values())
            found.append({n: p.grad for n, p in trained(backbone).items() if p.grad is not None})
            parts = backbone.chunks if tower == "text" else 1
            assert products.count == (4 if parts == 1 else 6 * parts)
        assert (backbone.chunks > 1) == (tower == "text")
        names = {n for n in trained(backbone) if ("visual" in n) == (tower == "image")}
        assert found[0].keys() == found[1].keys() == names
        assert all(oracle.relative(g, found[0][n]) <= 1e-4 for n, g in found[1].items())

    def test_an_error_amid_a_pass_leaves_nothing(self):
        mine = oracle.ours(NOLA(**SMALL))
        with pytest.raises(RuntimeError, match="stop"), mine.passing():
            raise RuntimeError("stop")
        assert all(layer.made is None for layer in layers(mine))

    def test_micro_batches_add_up(self):
        mine = oracle.ours(NOLA(**SMALL), double=True)
        oracle.randomise(trained(mine).values())
        x = torch.randn(6, 24, dtype=torch.float64)
        mine.run(x).square().sum().backward()
        wanted = {n: p.grad.clone() for n, p in trained(mine).items()}
        mine.zero_grad()
        for part in x.split(2):
            mine.run(part).square().sum().backward()
        for name, p in trained(mine).items():
            assert oracle.relative(p.grad, wanted[name]) <= 1e-12

    def test_backward_runs_as_often_as_it_is_asked(self):
        mine = oracle.ours(NOLA(**SMALL))
        oracle.randomise(trained(mine).values())
        loss = mine.run(torch.randn(5, 24)).square().sum()
        once = torch.autograd.grad(loss, list(trained(mine).values()), retain_graph=True)
        again = torch.autograd.grad(loss, list(trained(mine).values()))
        assert all(torch.equal(a, b) for a, b in zip(once, again, strict=True))

    def test_a_tower_that_the_loss_does_not_reach_gets_no_gradient(self):
        def gradients(targets):
            backbone = towers.backbone("clip")
            NOLA(bases=8, rank=2).attach(backbone, targets)
            oracle.randomise(p for n, p in trained(backbone).items() if "text" in n or "transformer.res" in n)
            towers.encode(backbone.train(), "image").square().sum().backward()
            return backbone.layers()

        both, alone = gradients(["*"]), gradients(["image.*"])
        assert {slot for slot, layer in both.items() if layer.beta.grad is None} == both.keys() - alone.keys()
        assert len(both) == 2 * len(alone)
        for slot, layer in alone.items():
            assert oracle.relative(both[slot].beta.grad, layer.beta.grad) <= 1e-5

    def test_runs_in_float32_under_autocast(self):
        results = []
        for enabled in (False, True):
            mine = oracle.ours(NOLA(**SMALL))
            oracle.randomise(trained(mine).values())
            layer = oracle.layer(mine, "fc1")
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
                (found,) = layer.factors()
                results.append(
                    [
                        *found,
                        *torch.autograd.grad(found, [layer.alpha, layer.beta], [torch.ones_like(t) for t in found]),
                    ]
                )
        for a, b in zip(*results, strict=True):
            assert a.dtype == torch.float32
            assert torch.equal(a, b)

    def test_can_be_copied_pickled_and_freed(self):
        mine = oracle.ours(NOLA(**SMALL))
        oracle.randomise(trained(mine).values())
        x = torch.randn(5, 24)
        y = mine.run(x)
        for copied in (copy.deepcopy(mine), pickle.loads(pickle.dumps(mine))):
            assert torch.equal(copied.run(x), y)
            oracle.randomise(trained(copied).values(), seed=5)
            assert not torch.equal(copied.run(x), y)
            assert torch.equal(mine.run(x), y)
        gone = weakref.ref(mine.shared[0])
        del mine, copied, y
        gc.collect()
        assert gone() is None


class TestOwnBases:
    """``basis="layer"``."""

    @pytest.mark.parametrize("chunk", [1, 100, 700, 10**6])
    def test_do_not_depend_on_how_they_are_made(self, monkeypatch, chunk):
        adapter = NOLA(bases=11, rank=3, basis="layer")
        kept = oracle.ours(adapter, double=True)
        monkeypatch.setattr(nola, "KEPT", 0)
        monkeypatch.setattr(nola, "CHUNK", chunk)
        made = oracle.ours(adapter, double=True)
        assert len(list(kept.shared[0].buffers())) == 8
        assert list(made.shared[0].buffers()) == []
        state, results = torch.get_rng_state(), []
        for mine in (kept, made):
            oracle.randomise(trained(mine).values())
            results.append([*oracle.step(mine.run, dtype=torch.float64), *(p.grad for p in trained(mine).values())])
        assert torch.equal(torch.get_rng_state(), state)
        for a, b in zip(*results, strict=True):
            assert oracle.relative(a, b) <= 1e-12

    def test_of_each_layer_differ(self):
        shared = oracle.ours(NOLA(**SMALL, basis="layer"), ["image.0.q", "image.0.k"]).shared[0]
        drawn = list(shared.buffers())
        assert [b.shape for b in drawn] == [(16, 72)] * 4
        assert all(not torch.equal(a, b) for i, a in enumerate(drawn) for b in drawn[:i])

    def test_are_kept_up_to_a_gibibyte(self, monkeypatch):
        for bytes_kept, number in ((4 * 16 * 3 * 48 * 2, 4), (4 * 16 * 3 * 48 * 2 - 1, 0)):
            monkeypatch.setattr(nola, "KEPT", bytes_kept)
            shared = oracle.ours(NOLA(**SMALL, basis="layer"), ["image.0.q", "image.0.k"]).shared[0]
            assert len(list(shared.buffers())) == number

    @pytest.mark.filterwarnings("ignore:Dynamo does not know")  # the hash of a stream's name, which runs uncompiled
    def test_run_compiled_when_they_are_made_anew(self, monkeypatch):
        monkeypatch.setattr(nola, "KEPT", 0)
        mine = oracle.ours(NOLA(**SMALL, basis="layer"), ["image.0.o"])
        oracle.randomise(trained(mine).values())
        x = torch.randn(5, 24)
        assert oracle.relative(torch.compile(mine.proj, backend="eager")(x), mine.proj(x)) <= 1e-5


class TestStart:
    def test_official(self):
        mine = oracle.ours(NOLA(bases=16, rank=4))
        for layer in layers(mine):
            assert torch.equal(layer.alpha, torch.zeros(16))
            assert torch.equal(layer.beta, torch.zeros(16))
            bound = layer.slot.in_features**-0.5
            assert layer.A0.shape == (4, layer.slot.in_features)
            assert 0.9 * bound < layer.A0.abs().max() <= bound * (1 + 1e-6)
            assert float(layer.A0.std()) == pytest.approx(bound / 3**0.5, rel=0.15)
        assert not torch.equal(layers(mine)[0].A0, layers(mine)[1].A0)

    def test_vit_moves_the_weight_by_a_third_of_one_over_bases(self):
        """‖ΔW‖ ≈ 1 / (3 K), 3e-4 at K = 1024, from U(±1/√(in r)) and U(±1/√(r out))."""
        mine = oracle.ours(NOLA(bases=1024, rank=1, start="vit"))
        for layer in layers(mine):
            assert torch.equal(layer.alpha, torch.full((1024,), 1 / 1024))
            assert layer.delta().norm().item() == pytest.approx(1 / 3 / 1024, rel=0.35)
        side, width = mine.shared[0].A, 24
        assert side.scales[0] * side.matrices.abs().max() == pytest.approx(width**-0.5, rel=1e-3)

    def test_randlora_has_entries_of_variance_1(self):
        mine = oracle.ours(NOLA(bases=1024, rank=1, start="randlora"))
        for layer in layers(mine):
            (up, down), size = layer.factors()[0], 1024**-0.5
            assert up.std().item() == pytest.approx(size, rel=0.3)
            assert down.std().item() == pytest.approx(size, rel=0.3)

    @pytest.mark.parametrize("owner", OWNERS)
    def test_depends_on_the_seed_of_the_basis_alone(self, owner):
        def built(seed, run_seed):
            torch.manual_seed(run_seed)
            mine = oracle.ours(NOLA(**SMALL, basis=owner, seed=seed))
            return [layer.A0 for layer in layers(mine)] + list(mine.shared[0].buffers())

        first, again, other = built(1, 1), built(1, 2), built(2, 1)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
        assert not any(torch.equal(a, b) for a, b in zip(first, other, strict=True))


@pytest.mark.parametrize("owner", OWNERS)
def test_bases_are_described_and_not_stored(owner):
    mine = oracle.ours(NOLA(**SMALL, basis=owner))
    assert {n.split(".")[-1] for n in mine.state_dict() if ".adapters." in n} == {"alpha", "beta"}
    assert not any(n.startswith("shared") for n in mine.state_dict())
    described = mine.shared[0].fingerprint()
    assert json.loads(json.dumps(described)) == described
    assert described["A"]["shape"] == [16, 96 if owner == "shared" else 24, 3]
    first = next(mine.shared[0].A.buffers())
    assert described["A"]["checksum"] == random_basis.checksum(first)
    for other in ({"seed": 2}, {"bases": 17}, {"rank": 4}):
        there = oracle.ours(NOLA(**SMALL | {"basis": owner} | other)).shared[0].fingerprint()
        assert there["A"] != described["A"]
        assert there["B"] != described["B"]


def test_a_shared_basis_that_does_not_fit_into_memory(monkeypatch):
    monkeypatch.setattr(random_basis, "memory_of_machine", lambda: 70_000)
    oracle.ours(NOLA(bases=16, rank=2))
    with pytest.raises(UserError, match=r"^NOLA: .*36.9 kB.*lower bases or rank\.$"):
        oracle.ours(NOLA(bases=16, rank=3))


def test_rank_above_the_smaller_side():
    with pytest.raises(UserError, match=r"rank 25 .* 24.* image\.0\.o"):
        oracle.ours(NOLA(rank=25))


class TestStored:
    @pytest.mark.parametrize("bits", [32, 16, 8, 4])
    @pytest.mark.parametrize("count", [1, 16, 333])
    def test_what_was_rounded_comes_back_to_the_bit(self, tmp_path, bits, count):
        mine = oracle.ours(NOLA(bases=count, rank=3, save_bits=bits))
        oracle.randomise(trained(mine).values(), 3.0)
        with torch.no_grad():
            layers(mine)[0].alpha.zero_()
        before = {n: p.detach().clone() for n, p in trained(mine).items()}
        for layer in layers(mine):
            layer.load_state_dict(layer.from_stored(layer.stored()))
        for index, layer in enumerate(layers(mine)):
            write_tensors(tmp_path / f"{index}.safetensors", layer.stored(), {})
            read, _ = read_tensors(tmp_path / f"{index}.safetensors")
            back = layer.from_stored(read)
            assert back.keys() == {"alpha", "beta"}
            for name, value in back.items():
                assert value.dtype == torch.float32
                assert torch.equal(value, getattr(layer, name))
        levels = {32: float("inf"), 16: 2**11, 8: 2 * 127, 4: 2 * 7}[bits]
        for name, p in trained(mine).items():
            error, largest = (p - before[name]).abs().max(), before[name].abs().max()
            assert error <= largest / levels * (1 + 1e-5)
            assert p.abs().max() == largest or bits == 16
        changed = [n for n, p in trained(mine).items() if not torch.equal(p, before[n])]
        assert bool(changed) == (bits < 32 and (bits == 16 or count > 1))

    def test_many_scales_are_stable(self):
        generator = torch.Generator().manual_seed(0)
        for _ in range(300):
            x = torch.randn(9, generator=generator) * 10 ** float(torch.randn((), generator=generator) * 6)
            for bits in (8, 4):
                first = pack("x", x, bits)
                rounded = unpack("x", first)
                assert torch.equal(unpack("x", pack("x", rounded, bits)), rounded)
                peak = x.abs().max()
                levels = nola.LEVELS[bits]
                assert torch.allclose(rounded, (x * levels / peak).round() * peak / levels, rtol=1e-5, atol=0)

    def test_takes_as_many_bytes_as_it_says(self):
        x = torch.randn(1024)
        sizes = {b: sum(t.numel() * t.element_size() for t in pack("x", x, b).values()) for b in (32, 16, 8, 4)}
        assert sizes == {32: 4096, 16: 2048, 8: 1028, 4: 516}

    def test_loads_whatever_the_bits(self):
        writer, reader = (layers(oracle.ours(NOLA(**SMALL, save_bits=b)))[0] for b in (4, 32))
        oracle.randomise(writer.parameters())
        found = reader.from_stored(writer.stored())
        assert torch.equal(found["alpha"], unpack("alpha", pack("alpha", writer.alpha.detach(), 4)))


@pytest.mark.parametrize("settings", [{}, {"rank": 1}, {"basis": "layer"}])
def test_numbers_of_the_reference_tower(settings):
    assert trained_numbers(NOLA(bases=1024, **settings)) == 98_304
