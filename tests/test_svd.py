"""The decomposition that several methods start from: right, signed, computed once, and told apart by one number."""

import math
from pathlib import Path

import pytest
import torch
from oracle import same
from torch import Tensor

from kshot.adapters import svd as module
from kshot.adapters.svd import SVD, fingerprint, relative_gap, svd_of
from kshot.errors import UserError

BIG = (256, 260)  # large enough to be kept on disk
PROBE = [1, -1, -1, 1, -1, 1, -1, -1, 1, -1, 1, -1]
SHAPES = {"square": (48, 48), "wide": (24, 60), "tall": (60, 24), "row": (1, 7), "column": (7, 1), "one": (1, 1)}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """An empty cache for each test, in memory and on disk."""
    monkeypatch.setattr(module, "_memory", type(module._memory)())
    monkeypatch.setenv("KSHOT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "svd"


@pytest.fixture
def counted(monkeypatch):
    """Shapes decomposed so far."""
    shapes, decompose = [], torch.linalg.svd

    def count(matrix, *rest, **options):
        shapes.append(tuple(matrix.shape))
        return decompose(matrix, *rest, **options)

    monkeypatch.setattr(torch.linalg, "svd", count)
    return shapes


def forget() -> None:
    module._memory.clear()


def separated(out: int, width: int) -> Tensor:
    """A weight whose singular values are all well apart: 1, 0.9, 0.81, ..."""
    n = min(out, width)
    u, v = (torch.linalg.qr(torch.randn(size, n, dtype=torch.float64))[0] for size in (out, width))
    return (u * 0.9 ** torch.arange(n) @ v.T).float()


def check(svd: SVD, weight: Tensor, tolerance: float = 1e-6) -> None:
    """All that a decomposition promises."""
    values = weight.detach().double()
    n, scale = min(weight.shape), max(float(torch.linalg.matrix_norm(values, 2)), 1e-30)
    u, s, vt = (t.double() for t in svd)
    assert [tuple(t.shape) for t in svd] == [(weight.shape[0], n), (n,), (n, weight.shape[1])]
    for tensor in svd:
        assert tensor.dtype == torch.float32
        assert tensor.device == weight.device
        assert tensor.is_contiguous()
        assert not tensor.requires_grad
        assert not tensor.is_inference()
    assert ((u * s) @ vt - values).abs().max() <= tolerance * scale
    assert (s - torch.linalg.svdvals(values)).abs().max() <= tolerance * scale
    assert (u.T @ u - torch.eye(n)).abs().max() < 1e-6
    assert (vt @ vt.T - torch.eye(n)).abs().max() < 1e-6
    assert (svd.s[:-1] >= svd.s[1:]).all()
    largest = svd.u.abs().argmax(0)  # the first of equal ones
    assert (svd.u[largest, torch.arange(n)] > 0).all()


class TestDecomposition:
    @pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
    def test_random_weights(self, shape):
        weight = torch.randn(shape)
        check(svd_of(weight), weight)

    @pytest.mark.parametrize("shape", [(24, 60), (60, 24), (24, 24)])
    def test_single_pairs_against_double_precision(self, shape):
        weight = separated(*shape)
        u, _, vt = torch.linalg.svd(weight.double(), full_matrices=False)
        svd = svd_of(weight)
        signs = (svd.u.double() * u).sum(0).sign()
        torch.testing.assert_close(svd.u.double(), u * signs, atol=1e-6, rtol=0)
        torch.testing.assert_close(svd.vt.double(), signs[:, None] * vt, atol=1e-6, rtol=0)

    def test_the_transpose_has_the_same_pairs_up_to_the_sign_rule(self):
        weight = separated(30, 50)
        svd, other = svd_of(weight), svd_of(weight.T)
        signs = (svd.u * other.vt.T).sum(0).sign()
        torch.testing.assert_close(svd.u, other.vt.T * signs, atol=1e-6, rtol=0)
        torch.testing.assert_close(svd.vt, (other.u * signs).T, atol=1e-6, rtol=0)

    def test_of_equal_entries_the_first_is_positive(self):
        weight = torch.tensor([[0.0, 0.0], [-3.0, 1.0], [3.0, -1.0]])
        u = svd_of(weight).u[:, 0]
        torch.testing.assert_close(u, torch.tensor([0.0, 1.0, -1.0]) / math.sqrt(2))

    def test_rank_deficient_and_zero(self):
        low = torch.randn(40, 3) @ torch.randn(3, 30)
        check(svd_of(low), low)
        assert (svd_of(low).s[3:] < 1e-6 * svd_of(low).s[0]).all()
        check(svd_of(torch.zeros(5, 8)), torch.zeros(5, 8))

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
    def test_other_types(self, dtype):
        weight = torch.randn(20, 30).to(dtype)
        check(svd_of(weight), weight)
        assert svd_of(weight) == svd_of(weight.float())  # the same objects

    def test_views(self):
        weight = torch.randn(60, 80)
        for view in (weight[20:40], weight[:, 5:25], weight.T, weight[::2, ::3], weight[:1].expand(4, 80)):
            check(svd_of(view), view)
            forget()
            assert all(torch.equal(a, b) for a, b in zip(svd_of(view), svd_of(view.clone()), strict=True))

    def test_whatever_the_surroundings(self):
        weight = torch.nn.Parameter(separated(20, 30))
        expected = svd_of(weight)
        with torch.inference_mode():
            inference = weight.clone()
        around = [torch.inference_mode(), torch.autocast("cpu", torch.bfloat16), torch.enable_grad(), torch.no_grad()]
        for context in around:
            for value in (weight, inference):
                forget()
                with context:
                    svd = svd_of(value)
                    check(svd, weight.detach())
                    assert fingerprint(svd) == fingerprint(expected)
                assert all(torch.equal(a, b) for a, b in zip(svd, expected, strict=True))

    def test_another_default_type(self):
        weight = separated(20, 30)
        torch.set_default_dtype(torch.float64)
        try:
            check(svd_of(weight), weight)
        finally:
            torch.set_default_dtype(torch.float32)

    @pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
    def test_meta(self, shape, counted, cache):
        svd = svd_of(torch.empty(shape, device="meta", dtype=torch.bfloat16))
        assert all(t.is_meta and t.dtype == torch.float32 for t in svd)
        assert [t.shape for t in svd] == [t.shape for t in svd_of(torch.randn(shape))]
        assert math.isnan(fingerprint(svd))
        assert len(counted) == 1

    def test_real_weights_while_a_model_is_built_on_meta(self):
        weight = separated(*BIG)
        expected = svd_of(weight)
        for kept in (True, False):
            if not kept:
                forget()
            with torch.device("meta"):
                svd = svd_of(weight)
                assert fingerprint(svd) == fingerprint(expected)
                assert relative_gap(svd) == relative_gap(expected)
            check(svd, weight)

    @pytest.mark.parametrize("bad", [math.nan, math.inf])
    def test_not_finite(self, bad, cache):
        weight = torch.randn(BIG)
        weight[3, 4] = bad
        with pytest.raises(UserError, match=r"shape \(256, 260\)") as raised:
            svd_of(weight)
        assert "\n" not in str(raised.value)
        assert not cache.exists()

    def test_the_global_random_state_is_left_alone(self):
        weight = torch.randn(BIG)
        before = torch.get_rng_state()
        fingerprint(svd_of(weight))
        forget()
        svd_of(weight)
        assert torch.equal(torch.get_rng_state(), before)

    @pytest.mark.gpu
    def test_on_the_gpu(self):
        weight = separated(*BIG)
        svd = svd_of(weight.cuda())
        assert all(t.is_cuda for t in svd)
        assert all(torch.equal(a.cpu(), b) for a, b in zip(svd, svd_of(weight), strict=True))
        assert fingerprint(svd) == fingerprint(svd_of(weight))


class TestCache:
    def test_memory(self, counted):
        weight = torch.randn(20, 30)
        first = svd_of(weight)
        assert all(a is b for a, b in zip(first, svd_of(weight.clone()), strict=True))
        assert counted == [(20, 30)]

    def test_values_and_shape_decide(self, counted):
        weight = torch.randn(20, 30)
        svd_of(weight)
        svd_of(weight.view(30, 20))
        other = weight.clone()
        other[7, 7] += 1e-3
        check(svd_of(other), other)
        assert len(counted) == 3

    def test_the_least_recently_used_goes_first(self, monkeypatch, counted):
        a, b, c = (torch.randn(10, 10) for _ in range(3))
        monkeypatch.setattr(module, "MEMORY", 2 * 4 * (100 + 10 + 100))
        for weight in (a, b, a, c):  # c drives out b
            svd_of(weight)
        assert len(counted) == 3
        svd_of(a)
        assert len(counted) == 3
        svd_of(b)
        assert len(counted) == 4
        assert len(module._memory) == 2

    def test_one_too_large_for_memory(self, monkeypatch):
        monkeypatch.setattr(module, "MEMORY", 100)
        weight = torch.randn(10, 10)
        check(svd_of(weight), weight)
        assert not module._memory

    def test_disk(self, cache, counted):
        weight = torch.randn(BIG)
        first = svd_of(weight)
        (file,) = cache.iterdir()
        assert file.suffix == ".safetensors"
        forget()
        again = svd_of(weight)
        assert counted == [BIG]
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
        check(again, weight)
        assert all(a is b for a, b in zip(again, svd_of(weight), strict=True))

    def test_small_weights_are_not_written(self, cache):
        svd_of(torch.randn(255, 257))
        assert not cache.exists()

    @pytest.mark.parametrize("damage", ["empty", "cut", "noise", "shape", "type", "names", "folder"])
    def test_a_file_that_is_no_use(self, cache, counted, damage):
        from safetensors.torch import load_file, save_file

        weight = torch.randn(BIG)
        first = svd_of(weight)
        (file,) = cache.iterdir()
        whole, tensors = file.read_bytes(), load_file(file)
        contents = {"empty": b"", "cut": whole[: len(whole) // 2], "noise": b"\xff" * 1000}
        changes = {
            "shape": {"s": tensors["s"][:-1].clone()},
            "type": {"s": tensors["s"].double()},
            "names": {"v": tensors["vt"].clone()},
        }
        if damage in contents:
            file.write_bytes(contents[damage])
        elif damage in changes:
            save_file(tensors | changes[damage], file)
        else:
            file.unlink()
            file.mkdir()
        forget()
        again = svd_of(weight)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
        assert counted == [BIG] * 2
        if damage != "folder":
            assert file.read_bytes() == whole
            assert list(cache.iterdir()) == [file]

    def test_a_folder_that_cannot_be_written(self, tmp_path, monkeypatch):
        (tmp_path / "file").write_bytes(b"")
        monkeypatch.setenv("KSHOT_CACHE", str(tmp_path / "file"))
        weight = torch.randn(BIG)
        check(svd_of(weight), weight)

    def test_a_full_disk(self, cache, monkeypatch):
        def full(tensors, file, metadata=None):
            Path(file).write_bytes(b"half")
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(module, "save_sealed", full)
        weight = torch.randn(BIG)
        check(svd_of(weight), weight)
        assert list(cache.iterdir()) == []

    def test_a_bit_that_has_changed_costs_a_decomposition(self, cache, counted):
        weight = torch.randn(BIG)
        first = svd_of(weight)
        (file,) = cache.iterdir()
        whole = file.read_bytes()
        for place in (9, len(whole) // 2, len(whole) - 1):
            file.write_bytes(whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1 :])
            forget()
            again = svd_of(weight)
            assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
            assert file.read_bytes() == whole, "it is written anew"
        assert len(counted) == 4

    def test_no_home(self, monkeypatch):
        def homeless():
            raise RuntimeError("Could not determine home directory.")

        monkeypatch.setattr(module, "cache_folder", homeless)
        weight = torch.randn(BIG)
        check(svd_of(weight), weight)

    def test_switched_off(self, tmp_path, monkeypatch, counted):
        monkeypatch.setenv("KSHOT_CACHE", "")
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
        monkeypatch.chdir(tmp_path)
        weight = torch.randn(BIG)
        for _ in range(2):
            forget()
            svd_of(weight)
        assert len(counted) == 2
        assert list(tmp_path.iterdir()) == []


def flipped(svd: SVD, *pairs: int) -> SVD:
    u, s, vt = (t.clone() for t in svd)
    for j in pairs:
        u[:, j], vt[j] = -u[:, j], -vt[j]
    return SVD(u, s, vt)


def turned(svd: SVD, j: int, k: int, angle: float) -> SVD:
    u, s, vt = (t.clone() for t in svd)
    c, d = math.cos(angle), math.sin(angle)
    u[:, j], u[:, k] = c * svd.u[:, j] + d * svd.u[:, k], c * svd.u[:, k] - d * svd.u[:, j]
    vt[j], vt[k] = c * svd.vt[j] + d * svd.vt[k], c * svd.vt[k] - d * svd.vt[j]
    return SVD(u, s, vt)


class TestFingerprint:
    @pytest.fixture
    def weight(self):
        return torch.randn(64, 96)

    def test_the_formula(self, weight):
        svd = svd_of(weight)
        p, q = module._signs(64, 0), module._signs(96, 1 << 24)
        total = 0.0
        for j in range(8):
            g = svd.s[j].double() ** 2 / (svd.s[j].double() ** 2 + 1e-6 * svd.s[0].double() ** 2)
            c = 0.5 + math.fmod((j + 1) * (math.sqrt(5) - 1) / 2, 1)
            total += c * g * (p @ svd.u[:, j].double() + q @ svd.vt[j].double())
        assert fingerprint(svd, 8) == pytest.approx(float(total) / math.sqrt(8), rel=1e-12)

    def test_the_probe(self):
        """Fixed for good, as files carry what follows from it; without a visible pattern."""
        signs = module._signs(4096, 0)
        assert signs[:12].tolist() == PROBE
        assert set(signs.tolist()) == {-1.0, 1.0}
        assert torch.equal(module._signs(10, 5), module._signs(15, 0)[5:])
        assert torch.fft.rfft(signs).abs().max() < 4.5 * math.sqrt(4096)  # √(2 ln 2048) = 3.9 is usual for noise

    @pytest.mark.parametrize("rank", [1, 4, 16, None])
    def test_of_order_one(self, rank):
        values = [fingerprint(svd_of(torch.randn(64, 96)), rank) for _ in range(200)]
        assert 1 < math.sqrt(sum(v * v for v in values) / len(values)) < 2
        assert len({round(v, 4) for v in values}) > 190

    @pytest.mark.parametrize("rank", [4, 64])
    def test_every_flip_and_every_turn(self, weight, rank):
        svd = svd_of(weight)
        now = fingerprint(svd, rank)
        assert same(now, fingerprint(svd, rank))
        for j in range(rank):
            assert not same(now, fingerprint(flipped(svd, j), rank))
            assert not same(now, fingerprint(SVD(flipped(svd, j).u, svd.s, svd.vt), rank))
            assert not same(now, fingerprint(SVD(svd.u, svd.s, flipped(svd, j).vt), rank))
            if j + 1 < min(weight.shape):
                for angle in (0.1, math.pi / 4, math.pi / 2):
                    assert not same(now, fingerprint(turned(svd, j, j + 1, angle), rank))

    def test_pairs_beyond_the_rank_do_not_count(self, weight):
        svd = svd_of(weight)
        assert fingerprint(svd, 4) == fingerprint(flipped(svd, 4, 10), 4)
        assert fingerprint(svd, 64) == fingerprint(svd) == fingerprint(svd, 1000)

    def test_a_relative_change_of_a_millionth_leaves_it(self, weight):
        for scale in (1e-6, 1e-2):
            noisy = weight * (1 + scale * torch.randn_like(weight))
            for rank in (4, 16, None):
                left = same(fingerprint(svd_of(weight), rank), fingerprint(svd_of(noisy), rank))
                assert left == (scale == 1e-6)

    @pytest.mark.parametrize("shape", [(256, 256), (256, 768)])
    def test_another_way_to_compute_gives_the_same(self, shape):
        """The transpose takes another path through LAPACK, as another library would."""
        weight = torch.randn(shape)
        other = svd_of(weight.T)
        signs = 1 - 2 * (other.vt.T.gather(0, other.vt.T.abs().argmax(0)[None])[0] < 0).float()
        other = SVD(other.vt.T * signs, other.s, (other.u * signs).T)
        for rank in (1, 16, None):
            assert fingerprint(other, rank) == pytest.approx(fingerprint(svd_of(weight), rank), abs=1e-7)

    def test_arbitrary_pairs_do_not_count(self):
        svd = svd_of(torch.randn(40, 3) @ torch.randn(3, 30))
        assert same(fingerprint(svd), fingerprint(flipped(svd, 3, 7, 20)))
        assert not same(fingerprint(svd), fingerprint(flipped(svd, 2)))
        assert fingerprint(svd_of(torch.zeros(5, 8))) == 0

    def test_same(self):
        assert same(1.0, 1.00009)
        assert not same(1.0, 1.0002)
        assert same(0.0, 0.00009)
        assert not same(0.0, 0.0002)
        assert not same(1.0, -1.0)
        assert not same(math.nan, math.nan)


class TestRelativeGap:
    def test_by_hand(self):
        assert relative_gap(svd_of(torch.diag(torch.tensor([5.0, 4.0, 3.5, 1.0])))) == pytest.approx(0.1)
        assert relative_gap(svd_of(torch.eye(4))) == 0
        assert relative_gap(svd_of(torch.zeros(3, 4))) == 0

    def test_a_single_pair(self):
        assert relative_gap(svd_of(torch.randn(1, 7))) == math.inf

    def test_meta(self):
        assert math.isnan(relative_gap(svd_of(torch.empty(3, 4, device="meta"))))
