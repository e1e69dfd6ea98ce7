"""Random bases: the documented bits, whatever the machine, the slice or the settings around the call."""

import hashlib
import json
import math
import random
import statistics
import struct
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kshot.adapters import random_basis
from kshot.adapters.random_basis import (
    GENERATOR,
    basis,
    checksum,
    describe,
    permutation,
    require_memory,
    values,
    words,
)
from kshot.errors import UserError

DISTRIBUTIONS = ["uniform", "normal", "ternary", "sign"]
MANY = 1 << 20
WHOLE = 200_000  # several chunks of every distribution

# Of seed 1 and the stream "test". They may change only together with GENERATOR.
GOLDEN = {
    "uniform": [
        *(-0.41964900493621826, 0.672312319278717, 0.5330742001533508, 0.14961424469947815),
        *(1.6011589765548706, 1.2789862155914307, 1.3660160303115845, -0.4029419720172882),
    ],
    "normal": [
        *(-0.46480485796928406, -0.3084981441497803, 0.5694178342819214, 0.5074657797813416),
        *(0.06018207594752312, 0.39585497975349426, 2.584584951400757, 0.1084747314453125),
    ],
    "ternary": [0.0, 0.0, 0.0, 0.0, 1.7320507764816284, 1.7320507764816284, 1.7320507764816284, 0.0],
    "sign": [1.0, 1.0, 1.0, 1.0, -1.0, 1.0, -1.0, -1.0],
}
GOLDEN_ORDER = [0, 7, 3, 2, 1, 5, 6, 4]


def float32(number):
    return struct.unpack("<f", struct.pack("<f", number))[0]


def same(a, b):
    """Equal in dtype, shape and every value."""
    return a.dtype == b.dtype and torch.equal(a, b)


def key_of(seed, stream):
    return struct.unpack("<Q", hashlib.sha256(f"{seed}/{stream}".encode()).digest()[:8])[0]


def splitmix(key, start, count):
    """The raw stream in Python's own integers, one state after the other."""
    found, state = [], (key + start * 0x9E3779B97F4A7C15) % 2**64
    for _ in range(count):
        state = (state + 0x9E3779B97F4A7C15) % 2**64
        z = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) % 2**64
        found.append(z ^ (z >> 31))
    return found


def parts(seed, stream, bits, count):
    """The first parts of the words, from the low end up, as unsigned numbers."""
    raw = splitmix(key_of(seed, stream), 0, -(-count * bits // 64))
    return [word >> low & (2**bits - 1) for word in raw for low in range(0, 64, bits)][:count]


def as_signed(number, bits):
    return number - 2**bits if number >> (bits - 1) else number


# --- the raw stream ---


def test_published_vectors_of_splitmix64(monkeypatch):
    published = [
        *(6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431),
        16408922859458223821,
    ]
    assert splitmix(1234567, 0, 5) == published
    monkeypatch.setattr(random_basis, "_key", lambda seed, stream: 1234567)
    assert [w % 2**64 for w in words(0, "", 0, 5).tolist()] == published


@pytest.mark.parametrize("seed", [0, 1, 2**63 - 1])
@pytest.mark.parametrize("start", [0, 5, 2**40 + 3, 2**64 - 2])
def test_words_are_splitmix64_from_a_hashed_key(seed, start):
    found = words(seed, "nola.image.3.q.A", start, 100)
    assert found.dtype == torch.int64
    assert [w % 2**64 for w in found.tolist()] == splitmix(key_of(seed, "nola.image.3.q.A"), start, 100)


def test_words_across_chunks():
    start = random_basis._CHUNK_ON_CPU - 3
    assert [w % 2**64 for w in words(1, "test", 0, start + 6)[start:].tolist()] == splitmix(key_of(1, "test"), start, 6)


# --- the mappings, one by one in Python ---


def test_uniform_mapping():
    odd = [2 * as_signed(h >> 8, 24) + 1 for h in parts(3, "u", 32, 501)]
    assert values(3, "u", "uniform", 0, 501).tolist() == [float32(n / 2**24 * float32(math.sqrt(3))) for n in odd]


def test_normal_mapping():
    inverse = statistics.NormalDist().inv_cdf
    size = math.sqrt(math.fsum(inverse((k + 0.5) / 2**16) ** 2 for k in range(2**16)) / 2**16)
    quantiles = [inverse((as_signed(q, 16) + 2**15 + 0.5) / 2**16) / size for q in parts(3, "n", 16, 501)]
    assert values(3, "n", "normal", 0, 501).tolist() == pytest.approx(quantiles, rel=2**-24)


def test_normal_table_does_not_depend_on_the_last_bits_of_the_logarithm():
    table = random_basis._normal_table()
    digest = hashlib.sha256(struct.pack("<65536f", *table.tolist())).hexdigest()
    assert digest == "8babbcaf96568f10165a1eab530c0e5c92d04de96761b6dbb3dadfa94baba37f"
    assert table.double().pow(2).mean().item() == pytest.approx(1, abs=1e-8)
    assert same(table, -table.flip(0))
    assert 4.32 < table.max() < 4.33
    # no quantile lies so near the middle between two float32 numbers that 1e-13 of it could change the rounding
    inverse = statistics.NormalDist().inv_cdf
    upper = [inverse((k + 0.5) / 2**16) for k in range(2**15, 2**16)]
    size = math.sqrt(math.fsum(q * q for q in upper) / 2**15)
    for error in (1 - 1e-13, 1 + 1e-13):
        assert same(table[2**15 :], torch.tensor([q / size * error for q in upper], dtype=torch.float32))


@pytest.mark.parametrize("sparsity", [2, 3, 6.0, 65_536])
def test_ternary_mapping(sparsity):
    t = round(2**32 / sparsity)
    ks = [as_signed(h, 32) for h in parts(3, "t", 32, 501)]
    signs = [(k >= 2**31 - t) - (k < t - 2**31) for k in ks]
    found = values(3, "t", "ternary", 0, 501, sparsity=sparsity)
    assert found.tolist() == [sign * float32(math.sqrt(sparsity / 2)) for sign in signs]


def test_sign_mapping():
    assert values(3, "s", "sign", 0, 501).tolist() == [2.0 * bit - 1 for bit in parts(3, "s", 1, 501)]


@pytest.mark.parametrize("count", [0, 1, 2, 501, 5000])
@pytest.mark.parametrize("start", [0, 7])
def test_permutation_mapping(count, start):
    """Numbers in the order of their halves."""
    halves = [as_signed(h, 32) for h in parts(3, "p", 32, 2 * start + count)[2 * start :]]
    found = permutation(3, "p", start, count)
    assert found.dtype == torch.int64
    assert found.tolist() == sorted(range(count), key=halves.__getitem__)


def test_equal_halves_stay_in_order(monkeypatch):
    monkeypatch.setattr(random_basis, "words", lambda *_: torch.tensor([2**32 * (i % 3) for i in range(50_000)]))
    found = permutation(1, "x", 0, 100_000)
    halves = [i // 2 % 3 if i % 2 else 0 for i in range(100_000)]
    assert found.tolist() == sorted(range(100_000), key=halves.__getitem__)


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_golden_values(distribution):
    assert GENERATOR == "kshot-splitmix64-1"
    assert values(1, "test", distribution, 0, 8).tolist() == GOLDEN[distribution]


def test_golden_words_and_permutation():
    assert [w % 2**64 for w in words(1, "test", 0, 3).tolist()] == [
        *(0x31AF3728E0FCD22F, 0x0B0E7EC027650624, 0x5E84A54A7653B599),
    ]
    assert permutation(1, "test", 0, 8).tolist() == GOLDEN_ORDER


# --- any slice, any setting ---

MAKERS = {
    "words": lambda start, count, **more: words(7, "x", start, count, **more),
    "uniform": lambda start, count, **more: values(7, "x", "uniform", start, count, **more),
    "normal": lambda start, count, **more: values(7, "x", "normal", start, count, **more),
    "ternary": lambda start, count, **more: values(7, "x", "ternary", start, count, **more),
    "sign": lambda start, count, **more: values(7, "x", "sign", start, count, **more),
}


@pytest.fixture(scope="module")
def wholes():
    return {name: make(0, WHOLE) for name, make in MAKERS.items()}


@pytest.mark.parametrize("name", MAKERS)
@settings(max_examples=40)
@given(cuts=st.lists(st.integers(0, WHOLE), min_size=2, max_size=5))
def test_any_chunk_is_the_slice_of_the_whole(wholes, name, cuts):
    cuts = sorted(cuts)
    chunks = [MAKERS[name](a, b - a) for a, b in pairwise(cuts)]
    assert same(torch.cat(chunks), wholes[name][cuts[0] : cuts[-1]])


@pytest.mark.parametrize("name", MAKERS)
def test_the_chunk_length_changes_nothing(wholes, name, monkeypatch):
    monkeypatch.setattr(random_basis, "_CHUNK_ON_CPU", 1 << 12)
    assert same(MAKERS[name](0, WHOLE), wholes[name])


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("start", [0, 1, 64])
def test_nothing_asked_nothing_made(name, start):
    assert MAKERS[name](start, 0).shape == (0,)


@pytest.mark.parametrize("name", MAKERS)
def test_surroundings_change_nothing(name, wholes):
    threads = torch.get_num_threads()
    try:
        for n in (1, 2):
            torch.set_num_threads(n)
            assert same(MAKERS[name](0, WHOLE), wholes[name])
    finally:
        torch.set_num_threads(threads)
    expected = wholes[name][:1000]
    for context in (torch.inference_mode(), torch.autocast("cpu", torch.bfloat16), torch.device("meta")):
        random_basis._normal_table.cache_clear()
        random_basis._sign_table.cache_clear()
        with context:
            found = MAKERS[name](0, 1000)
        assert same(found, expected)
        assert not found.is_inference()
        assert not found.requires_grad
        assert same(MAKERS[name](0, 1000), expected)  # from the tables that the context left


@pytest.mark.parametrize("name", MAKERS)
def test_the_default_dtype_changes_nothing(name, wholes):
    random_basis._normal_table.cache_clear()
    random_basis._sign_table.cache_clear()
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        assert same(MAKERS[name](0, 1000), wholes[name][:1000])
    finally:
        torch.set_default_dtype(default)


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_a_dtype_is_a_cast_at_the_end(distribution, dtype):
    assert same(values(1, "test", distribution, 3, 500, dtype=dtype), values(1, "test", distribution, 3, 500).to(dtype))


@pytest.mark.parametrize("name", MAKERS)
def test_global_random_states_are_left_alone(name):
    before = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()  # noqa: NPY002  the global one
    MAKERS[name](0, 1000)
    assert same(before[0], torch.get_rng_state())
    assert (before[1] == np.random.get_state()[1]).all()  # noqa: NPY002
    assert before[2] == random.getstate()


@pytest.mark.gpu
@pytest.mark.parametrize("name", MAKERS)
def test_cuda_gives_the_bits_of_the_cpu(name, wholes, monkeypatch):
    assert same(MAKERS[name](0, WHOLE, device="cuda").cpu(), wholes[name])
    assert same(MAKERS[name](77, 12_345, device="cuda").cpu(), wholes[name][77 : 77 + 12_345])
    monkeypatch.setattr(random_basis, "_CHUNK_ELSEWHERE", 1 << 12)
    assert same(MAKERS[name](0, WHOLE, device="cuda").cpu(), wholes[name])
    with torch.device("cuda"), torch.autocast("cuda"):
        assert same(MAKERS[name](0, WHOLE), wholes[name])


# --- statistics: bounds of five standard errors on fixed seeds ---


@pytest.mark.parametrize(
    ("distribution", "fourth", "eighth"),
    [("uniform", 9 / 5, 9), ("normal", 3, 105), ("ternary", 3, 27), ("sign", 1, 1)],
)
def test_moments(distribution, fourth, eighth):
    x = values(11, "moments", distribution, 0, MANY).double()
    error = 5 / math.sqrt(MANY)
    assert abs(x.mean()) < error
    assert abs(x.pow(2).mean() - 1) <= error * math.sqrt(fourth - 1) + 1e-7
    assert abs(x.pow(3).mean()) < error * 4  # the sixth moment of N(0, 1) is 15
    # the table of quantiles ends at 4.33, which takes 0.0008 from the fourth moment
    assert abs(x.pow(4).mean() - fourth) <= error * math.sqrt(eighth - fourth**2) + 1e-3


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_neighbours_streams_and_seeds_are_uncorrelated(distribution):
    x = values(11, "a", distribution, 0, MANY)
    others = {
        "the next": values(11, "a", distribution, 1, MANY),
        "the next but one": values(11, "a", distribution, 2, MANY),
        "the next word": values(11, "a", distribution, 64, MANY),
        "another stream": values(11, "b", distribution, 0, MANY),
        "another seed": values(12, "a", distribution, 0, MANY),
    }
    for other, y in others.items():
        assert not torch.equal(x, y)
        assert abs((x.double() * y.double()).mean()) < 5 / math.sqrt(MANY), other


def chi_square(found, probabilities):
    """Within five standard deviations of its mean."""
    counts = found.bincount(minlength=len(probabilities)).double()
    expected = torch.tensor(probabilities, dtype=torch.float64) * len(found)
    freedom = len(probabilities) - 1
    return abs(((counts - expected) ** 2 / expected).sum() - freedom) < 5 * math.sqrt(2 * freedom)


@pytest.mark.parametrize("sparsity", [2.5, 6.0, 64])
def test_ternary_frequencies(sparsity):
    signs = values(11, "f", "ternary", 0, MANY, sparsity=sparsity).sign()
    assert chi_square(signs.long() + 1, [1 / sparsity, 1 - 2 / sparsity, 1 / sparsity])


def test_a_sparsity_of_two_leaves_no_zeros():
    signs = values(11, "f", "ternary", 0, MANY, sparsity=2).sign()
    assert signs.abs().min() == 1
    assert chi_square((signs.long() + 1) // 2, [0.5, 0.5])


def test_a_permutation_is_one_and_looks_random():
    found = permutation(11, "f", 0, MANY)
    assert torch.equal(found.sort().values, torch.arange(MANY))
    place = found / MANY - 0.5  # uniform, of variance 1/12
    for other in (torch.arange(MANY) / MANY - 0.5, place.roll(1), permutation(11, "f", MANY, MANY) / MANY - 0.5):
        assert abs((place.double() * other.double()).mean()) < 5 / 12 / math.sqrt(MANY)
    assert float((found == torch.arange(MANY)).sum()) <= 10  # one is expected


@pytest.mark.gpu
def test_cuda_permutes_as_the_cpu():
    assert same(permutation(7, "x", 3, WHOLE, device="cuda").cpu(), permutation(7, "x", 3, WHOLE))


@pytest.mark.parametrize("distribution", ["uniform", "normal"])
def test_deciles_are_equally_probable(distribution):
    x = values(11, "d", distribution, 0, MANY)
    inverse = statistics.NormalDist().inv_cdf
    edges = [inverse(p / 10) if distribution == "normal" else (p / 5 - 1) * math.sqrt(3) for p in range(1, 10)]
    assert chi_square(torch.bucketize(x, torch.tensor(edges)), [0.1] * 10)


# --- tensors, checksums and headers ---


def test_a_basis_is_filled_row_by_row():
    flat = values(1, "test", "normal", 0, 24)
    assert same(basis(1, "test", "normal", (2, 3, 4)), flat.view(2, 3, 4))
    assert same(basis(1, "test", "ternary", [5], sparsity=2), values(1, "test", "ternary", 0, 5, sparsity=2))
    assert basis(1, "test", "sign", ()).shape == ()
    assert basis(1, "test", "sign", (0, 3)).shape == (0, 3)


def test_a_basis_can_be_used_with_gradients_after_inference_mode():
    with torch.inference_mode():
        frozen = basis(1, "test", "normal", (2, 3))
    weight = torch.ones(2, requires_grad=True)
    (weight @ frozen).sum().backward()
    assert torch.allclose(weight.grad, frozen.sum(1))


def test_checksum_is_of_the_first_sixteen_float32_values():
    x = basis(1, "test", "normal", (8, 8))
    expected = "sha256:" + hashlib.sha256(np.asarray(x.view(-1)[:16], dtype="<f4").tobytes()).hexdigest()[:16]
    assert checksum(x) == expected == "sha256:afaaaf491c2cb52c"
    assert checksum(x[:2].double()) == expected
    assert checksum(x.t()) != expected
    assert checksum(x.t().contiguous().t().requires_grad_()) == expected
    assert checksum(x[:0]) == "sha256:" + hashlib.sha256(b"").hexdigest()[:16]


def test_a_description_suffices_to_make_the_basis_again():
    x = basis(5, "nola.A", "ternary", (4, 6), sparsity=3.0)
    info = json.loads(json.dumps(describe(5, "nola.A", "ternary", x.shape, sparsity=3.0)))
    assert (info.pop("generator"), info.pop("start")) == (GENERATOR, 0)
    expected = info.pop("checksum")
    assert checksum(basis(**info)) == expected
    assert "sparsity" not in describe(5, "nola.A", "sign", (4, 6))


# --- what a user can get wrong ---


@pytest.mark.parametrize("seed", [-1, 2**63, 1.0, True, "1", None])
@pytest.mark.parametrize("make", [words, permutation])
def test_impossible_seeds(make, seed):
    with pytest.raises(UserError, match=r"^seed is .*, and must be a whole number from 0 to 2\^63 - 1\.$"):
        make(seed, "test", 0, 1)


@pytest.mark.parametrize("sparsity", [1.99, 0, -6, math.nan, math.inf, 65_537])
def test_impossible_sparsities(sparsity):
    with pytest.raises(UserError, match=r"^sparsity is .*, and must be a number from 2 to 65,536\.$"):
        values(1, "test", "ternary", 0, 1, sparsity=sparsity)


def test_memory_is_refused_above_half_of_the_machine(monkeypatch):
    monkeypatch.setattr(random_basis, "memory_of_machine", lambda: 25_300_000_000)
    require_memory(12_650_000_000, "NOLA", "lower bases or rank")
    with pytest.raises(UserError) as caught:
        require_memory(604_000_000_000, "NOLA", "lower bases or rank")
    assert str(caught.value) == (
        "NOLA: its basis would take 604 GB, and this machine has 25.3 GB, of which it may take half: "
        "lower bases or rank."
    )


def test_memory_is_not_checked_where_it_is_unknown(monkeypatch):
    with pytest.raises(UserError):
        require_memory(2**70, "NOLA", "lower bases or rank")
    monkeypatch.setattr(random_basis, "memory_of_machine", lambda: None)
    require_memory(2**70, "NOLA", "lower bases or rank")
