"""Pseudo-random frozen bases that are never stored: a seed and a name regenerate them bit for bit.

VeRA, RandLoRA, NOLA and PRANC train a few numbers against large random tensors. Those tensors must come out the same
after a reload, on any device, with any number of threads and under any release of torch, which torch's own generators
do not promise. Here word i of a stream is a pure function of (seed, stream, i), in exact integer arithmetic, so any
slice of a sequence can be made alone, and no global random state is read or written.

The raw stream, :data:`GENERATOR`, is SplitMix64 (Steele, Lea and Flood 2014) with a hashed starting state::

    key     = the first 8 bytes, little endian, of sha256(f"{seed}/{stream}")
    word(i) = mix(key + (i + 1) · 0x9E3779B97F4A7C15)                     modulo 2^64
    mix(z):   z = (z ^ z >> 30) · 0xBF58476D1CE4E5B9;  z = (z ^ z >> 27) · 0x94D049BB133111EB;  return z ^ z >> 31

Words are cut into halves, quarters or bits from the low end up. All streams walk one cycle of 2^64 states from places
that the hash scatters: two streams of n words share a word with probability about 2n / 2^64.

Functions take a ``seed``, 0 to 2^63 - 1 (UserError otherwise), and the name of a ``stream``, such as
``nola.image.3.q.A``: other names give unrelated words. ``start`` is the index of the first of ``count`` elements.
"""

from __future__ import annotations

import hashlib
import math
import statistics
import struct
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from typing import Any, Final, Literal

import torch
from torch import Tensor

from kshot.adapters.base import Shared
from kshot.errors import UserError
from kshot.files import amount, memory_of_machine

GENERATOR: Final = "kshot-splitmix64-1"
"""Name and version of the raw stream and of what is made of it. Any change of a bit is a new version."""

Distribution = Literal["uniform", "normal", "ternary", "sign"]

_GAMMA: Final = 0x9E3779B97F4A7C15
_ROUNDS: Final = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB))
_LAST_SHIFT: Final = 31
_LARGEST_SPARSITY: Final = 65_536  # rarer entries would need more than 32 bits for an exact enough probability

# Values made at a time. On a CPU the buffers of a chunk should stay in the second-level cache; elsewhere each chunk
# costs some twenty kernel launches, and should be long.
_CHUNK_ON_CPU: Final = 1 << 16
_CHUNK_ELSEWHERE: Final = 1 << 22


def words(seed: int, stream: str, start: int, count: int, device: torch.device | str = "cpu") -> Tensor:
    """Words of the raw stream, (count,), int64: the 64 bits of each in two's complement."""
    return _generate(seed, stream, start, count, 1, lambda raw: raw, torch.int64, device)


def values(
    seed: int,
    stream: str,
    distribution: Distribution,
    start: int,
    count: int,
    *,
    sparsity: float = 6.0,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Elements, (count,), of an endless sequence of mean 0 and variance 1: the same bits however it is cut.

    Each is computed in float32 with at most one rounding, and cast at the end:

    * ``uniform``, 2 a word: k, the upper 24 bits of a half in two's complement, gives (2k + 1) / 2^24 · float32(√3),
      symmetric about 0 and never 0.
    * ``normal``, 4 a word: k, a quarter in two's complement, gives the quantile of N(0, 1) at
      (k + 2^15 + ½) / 2^16, all of them divided by their root mean square, in float32. No value lies beyond ±4.33.
    * ``ternary``, 2 a word: with k a half in two's complement and t = round(2^32 / sparsity), +1 where k ≥ 2^31 - t,
      -1 where k < t - 2^31, else 0, times float32(√(sparsity / 2)). So +1 and -1 have the probability 1 / sparsity
      each; a sparsity of 2 leaves no zeros, and one outside 2 to 65,536 is a UserError.
    * ``sign``, 64 a word: +1 for a bit that is set, -1 for one that is not.
    """
    assert dtype.is_floating_point
    per_word, decode = _decoder(distribution, sparsity)
    return _generate(seed, stream, start, count, per_word, decode, dtype, device)


def basis(
    seed: int,
    stream: str,
    distribution: Distribution,
    shape: Sequence[int],
    *,
    sparsity: float = 6.0,
    device: torch.device | str = "cpu",
) -> Tensor:
    """A tensor of the given shape, float32, filled in row-major order from :func:`values`."""
    flat = values(seed, stream, distribution, 0, math.prod(shape), sparsity=sparsity, device=device)
    return flat.view(tuple(shape))


@torch.inference_mode(False)
def permutation(seed: int, stream: str, start: int, count: int, device: torch.device | str = "cpu") -> Tensor:
    """The numbers 0 ... count - 1 in random order, (count,), int64: that of half words as signed numbers.

    Equal ones, of which there are few, stay in their order. Words from ``start`` on are used, count / 2, rounded up.
    """
    halves = words(seed, stream, start, -(-count // 2), device).view(torch.int32)[:count]
    return halves.argsort(stable=True)


def checksum(tensor: Tensor) -> str:
    """A cheap proof that the same basis came out again: ``sha256:`` and the first 16 hexadecimal digits.

    It is of the first 16 values in row-major order, or of all where there are fewer, as little-endian float32.
    """
    first = tensor.detach().reshape(-1)[:16].to("cpu", torch.float32).tolist()
    return "sha256:" + hashlib.sha256(struct.pack(f"<{len(first)}f", *first)).hexdigest()[:16]


def describe(
    seed: int,
    stream: str,
    distribution: Distribution | Literal["permutation"],
    shape: Sequence[int],
    *,
    sparsity: float = 6.0,
    gain: float = 1.0,
) -> dict[str, Any]:
    """What a checkpoint's header says of a basis instead of storing it; ``gain`` is what its values are times."""
    if distribution == "permutation":
        first = words(seed, stream, 0, 16)
    else:
        first = values(seed, stream, distribution, 0, 16, sparsity=sparsity).mul_(gain)
    info = {"generator": GENERATOR, "seed": seed, "stream": stream, "distribution": distribution, "shape": list(shape)}
    info |= {"start": 0, "checksum": checksum(first)}  # the first element's place in the stream
    return info | ({"sparsity": sparsity} if distribution == "ternary" else {})


class FrozenBases(Shared):
    """Random A and B that all layers of a method share: buffers that no file holds, described in its header instead.

    Args:
        method: its name; in small letters, ``<method>.<name>`` is the stream of a tensor.
        seed: of both.
        shapes: by name.
        device: where to make them.
        advice: what the user can change where memory does not suffice, as for :func:`require_memory`.
        distribution: of :func:`values`, as is ``sparsity``.
        gain: standard deviation of the entries, given the shape.
    """

    A: Tensor
    B: Tensor

    def __init__(
        self,
        method: str,
        seed: int,
        shapes: Mapping[str, tuple[int, ...]],
        device: torch.device,
        advice: str,
        distribution: Distribution = "uniform",
        sparsity: float = 6.0,
        gain: Callable[[tuple[int, ...]], float] = lambda _: 1.0,
    ) -> None:
        super().__init__()
        require_memory(4 * sum(map(math.prod, shapes.values())), method, advice)
        for name, shape in shapes.items():
            given = seed, f"{method.lower()}.{name}", distribution, shape
            drawn = basis(*given, sparsity=sparsity, device=device).mul_(gain(shape))
            self.described[name] = describe(*given, sparsity=sparsity, gain=gain(shape))
            self.register_buffer(name, drawn, persistent=False)


def require_memory(bytes_needed: int, who: str, advice: str) -> None:
    """Refuses a basis that would take more than half of this machine's memory, where its size is known.

    Raises:
        UserError: names the method and what the user can change, as in ``NOLA`` and ``lower bases or rank``.
    """
    memory = memory_of_machine()
    if memory is not None and bytes_needed > memory / 2:
        raise UserError(
            f"{who}: its basis would take {amount(bytes_needed)}, and this machine has {amount(memory)}, "
            f"of which it may take half: {advice}."
        )


def _key(seed: int, stream: str) -> int:
    if not isinstance(seed, int) or isinstance(seed, bool) or not 0 <= seed < 2**63:
        raise UserError(f"seed is {seed!r}, and must be a whole number from 0 to 2^63 - 1.")
    return int.from_bytes(hashlib.sha256(f"{seed}/{stream}".encode()).digest()[:8], "little")


def _signed(word: int) -> int:
    """The number modulo 2^64 in two's complement, as int64 tensors take it."""
    return (word + 2**63) % 2**64 - 2**63


def _float32(number: float) -> float:
    return float(struct.unpack("<f", struct.pack("<f", number))[0])


@torch.inference_mode(False)  # so that the result is a plain tensor, which autograd can use later
def _generate(
    seed: int,
    stream: str,
    start: int,
    count: int,
    per_word: int,
    decode: Callable[[Tensor], Tensor],
    dtype: torch.dtype,
    device: torch.device | str,
) -> Tensor:
    """Makes elements a chunk of words at a time; ``decode``, (n,) to (n · per_word,), may overwrite the words."""
    assert start >= 0
    assert count >= 0
    assert sys.byteorder == "little"  # the decoders read the parts of a word through views
    key = _key(seed, stream)
    out = torch.empty(count, dtype=dtype, device=device)
    first, last = start // per_word, -(-(start + count) // per_word)
    longest = (_CHUNK_ON_CPU if out.device.type == "cpu" else _CHUNK_ELSEWHERE) // per_word
    size = min(longest, last - first)
    ramp = torch.arange(size, dtype=torch.int64, device=device).mul_(_signed(_GAMMA))
    raw, spare = torch.empty_like(ramp), torch.empty_like(ramp)
    for word in range(first, last, max(size, 1)):
        n = min(size, last - word)
        torch.add(ramp[:n], _signed(key + (word + 1) * _GAMMA), out=raw[:n])
        _mix(raw[:n], spare[:n])
        decoded = decode(raw[:n])
        skip = max(start - word * per_word, 0)
        at = word * per_word + skip - start
        part = decoded[skip : skip + count - at]
        out[at : at + len(part)] = part
    return out


def _mix(z: Tensor, spare: Tensor) -> None:
    """The finaliser, in place on int64: products wrap, and masks make the arithmetic right shifts logical."""
    for shift, factor in _ROUNDS:
        z.bitwise_xor_(_shifted(z, shift, spare)).mul_(_signed(factor))
    z.bitwise_xor_(_shifted(z, _LAST_SHIFT, spare))


def _shifted(z: Tensor, shift: int, out: Tensor) -> Tensor:
    """The logical right shift of int64 words, written to ``out``."""
    return torch.bitwise_right_shift(z, shift, out=out).bitwise_and_((1 << (64 - shift)) - 1)


def _decoder(distribution: Distribution, sparsity: float) -> tuple[int, Callable[[Tensor], Tensor]]:
    """How many values a word makes, and how to make them."""
    if distribution == "ternary":
        if not 2 <= sparsity <= _LARGEST_SPARSITY:
            raise UserError(f"sparsity is {sparsity}, and must be a number from 2 to {_LARGEST_SPARSITY:,}.")
        threshold = round(2**32 / sparsity)  # how many of the 2^32 halves give +1; as many give -1
        return 2, partial(_ternary, threshold=threshold, scale=_float32(math.sqrt(sparsity / 2)))
    return {"uniform": (2, _uniform), "normal": (4, _normal), "sign": (64, _sign)}[distribution]


def _uniform(raw: Tensor) -> Tensor:
    """Values of ``uniform``: 2k + 1 is exact in float32, so the product is the only rounding."""
    odd = raw.view(torch.int32).bitwise_right_shift_(7).bitwise_or_(1)  # 2k + 1 from the upper 24 bits k
    return odd.to(torch.float32).mul_(_float32(math.sqrt(3)) / 2**24)


def _normal(raw: Tensor) -> Tensor:
    index = raw.view(torch.int16).to(torch.int32).add_(2**15)
    return _normal_table().to(raw.device, non_blocking=True).index_select(0, index)


@cache
def _normal_table() -> Tensor:
    """The quantiles of ``normal`` in ascending order, (65536,), float32, on the CPU."""
    inverse = statistics.NormalDist().inv_cdf
    upper = [inverse((k + 0.5) / 2**16) for k in range(2**15, 2**16)]
    scale = math.sqrt(math.fsum(q * q for q in upper) / len(upper))
    half = torch.tensor([q / scale for q in upper], dtype=torch.float32, device="cpu")
    return torch.cat((-half.flip(0), half))


def _ternary(raw: Tensor, threshold: int, scale: float) -> Tensor:
    half = raw.view(torch.int32)
    plus, minus = half >= 2**31 - threshold, half < threshold - 2**31
    return (plus.view(torch.int8) - minus.view(torch.int8)).to(torch.float32).mul_(scale)


def _sign(raw: Tensor) -> Tensor:
    """Values of ``sign``, looked up byte by byte."""
    index = raw.view(torch.uint8).to(torch.int32)
    return _sign_table().to(raw.device, non_blocking=True).index_select(0, index).view(-1)


@cache
def _sign_table() -> Tensor:
    """The eight signs of each byte, the lowest bit first, (256, 8), float32, on the CPU."""
    signs = [[1.0 if byte >> bit & 1 else -1.0 for bit in range(8)] for byte in range(256)]
    return torch.tensor(signs, dtype=torch.float32, device="cpu")
