"""The thin singular value decomposition W = U diag(s) Vᵀ of a frozen weight: computed once, the same everywhere.

A decomposition leaves the sign of each pair (u_j, v_j) open, and libraries choose differently. Here the entry of u_j of
the largest magnitude is positive, so that what is trained on top of a decomposition means the same on another machine.
:func:`fingerprint` tells whether it does.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections import OrderedDict
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load
from torch import Tensor

from kshot.errors import UserError
from kshot.files import cache_folder, make_folder, write_atomically
from kshot.sealing import check_seal, save_sealed

MEMORY = 1 << 30  # bytes of decompositions kept in memory: twice what all blocks of a ViT-B take
ON_DISK = 256 * 256  # elements from which a weight is faster read than decomposed


class SVD(NamedTuple):
    """A thin decomposition, float32, singular values descending, n = min(out, in)."""

    u: Tensor  # (out, n), orthonormal columns
    s: Tensor  # (n,)
    vt: Tensor  # (n, in), orthonormal rows


_memory: OrderedDict[str, SVD] = OrderedDict()  # by key, the least recently used first


def svd_of(weight: Tensor) -> SVD:
    """Decomposes a weight, or recalls its decomposition from memory or from ``cache_folder()/svd``.

    The caches go by the weight's values. A weight of few elements is not kept on disk, nor is any where the variable
    KSHOT_CACHE is empty or the folder cannot be used. Pairs of (almost) equal singular values are determined only up to
    a rotation among them, see :func:`relative_gap`; those of a singular value of zero are arbitrary.

    Args:
        weight: (out, in), any floating-point type; its values are rounded to float32 first.

    Returns:
        Tensors on the weight's device, without gradients. On the CPU they are the cache's own: clone what is to be
        changed. For a weight on the meta device, meta tensors.

    Raises:
        UserError: the weight holds values that are not finite.
    """
    assert weight.ndim == 2
    out, width = weight.shape
    if weight.is_meta:
        return _empty(out, width)
    with torch.inference_mode(False), torch.no_grad(), torch.autocast("cpu", enabled=False):
        values = weight.detach().to("cpu", torch.float32).contiguous()
        digest = hashlib.sha256(f"{out} {width}\n".encode())
        digest.update(values.numpy().data)
        key = digest.hexdigest()
        svd = _memory.get(key) or _from_disk(key, values)
        _memory[key] = svd
        _memory.move_to_end(key)
        while sum(t.nbytes for kept in _memory.values() for t in kept) > MEMORY:
            _memory.popitem(last=False)
        return SVD(*(t.to(weight.device) for t in svd))


def _empty(out: int, width: int) -> SVD:
    n = min(out, width)
    return SVD(*(torch.empty(shape, dtype=torch.float32, device="meta") for shape in ((out, n), (n,), (n, width))))


def _from_disk(key: str, values: Tensor) -> SVD:
    file = _file_of(key, values)
    if file is None:
        return _decompose(values)
    svd = _read(file, values)
    if svd is None:
        svd = _decompose(values)
        with suppress(UserError):  # a folder that cannot be written costs the next process a second
            make_folder(file.parent)
            write_atomically(file, partial(save_sealed, svd._asdict()))
    return svd


def _file_of(key: str, values: Tensor) -> Path | None:
    if values.numel() < ON_DISK or os.environ.get("KSHOT_CACHE") == "":
        return None
    with suppress(RuntimeError):  # no home folder
        return cache_folder() / "svd" / f"{key}.safetensors"
    return None


def _read(file: Path, values: Tensor) -> SVD | None:
    try:
        if not check_seal(file):
            return None
        svd = SVD(**load(file.read_bytes()))  # not mapped: the file may be cut while the tensors are in use
    except Exception:  # a broken file may raise anything in a reader
        return None
    pairs = zip(svd, _empty(*values.shape), strict=True)
    return svd if all((a.shape, a.dtype) == (b.shape, b.dtype) for a, b in pairs) else None


def _decompose(values: Tensor) -> SVD:
    if not values.isfinite().all():
        raise UserError(f"A weight of shape {tuple(values.shape)} holds values that are not finite in float32.")
    # Within float32, two libraries leave neighbouring pairs of a ViT's weights up to 1e-3 apart, and some signs with
    # them; from double precision they agree to the last digits, for 1.6 times the seconds.
    u, s, vt = (t.float() for t in torch.linalg.svd(values.double(), full_matrices=False))
    largest = u.gather(0, u.abs().argmax(0, keepdim=True))[0]  # after rounding, which makes ties of almost-ties
    signs = 1 - 2 * (largest < 0).float()
    return SVD((u * signs).contiguous(), s.contiguous(), (signs[:, None] * vt).contiguous())


def fingerprint(svd: SVD, rank: int | None = None) -> float:
    """One number that tells bases apart: f = Σ_j c_j g_j (p·u_j + q·v_j) / √r over the first r pairs, in double.

    p and q are fixed vectors of ±1, so each p·u_j is of order 1; c_j = 1/2 + frac(j (√5 - 1) / 2), j = 1 ... r, differs
    by at least 0.38 between neighbours; g_j = s_j² / (s_j² + 10⁻⁶ s_1²) leaves out pairs that are arbitrary because
    their singular value is zero. A flip of one pair, a rotation of two or another weight move f by about 1/√r to 1,
    rounding by less than 1e-8. Singular values count through g alone.

    Args:
        svd: of any weight; of a meta tensor, the fingerprint is nan.
        rank: r; None for all pairs.
    """
    if svd.s.is_meta:
        return math.nan
    with torch.inference_mode(False), torch.no_grad(), torch.autocast("cpu", enabled=False):
        u, s, vt = (t.detach().to("cpu", torch.float64) for t in (svd.u[:, :rank], svd.s[:rank], svd.vt[:rank]))
        pairs = torch.arange(1, len(s) + 1, dtype=torch.float64, device="cpu")
        c = 0.5 + (pairs * ((math.sqrt(5) - 1) / 2)).frac()
        g = s.square() / (s.square() + 1e-6 * s[0].square()).clamp_min(1e-300)  # 0 for a weight of zeros
        sums = _signs(u.shape[0], 0) @ u + vt @ _signs(vt.shape[1], 1 << 24)
        return float(c * g @ sums) / math.sqrt(len(s))


def _signs(count: int, start: int) -> Tensor:
    """A fixed sequence of ±1 that looks random, (count,) float64: an integer hash of start, start + 1, ..."""
    h = torch.arange(start, start + count, dtype=torch.int64, device="cpu")
    for shift, factor in ((16, 0x21F0AAAD), (15, 0x735A2D97)):  # below 2³¹, so that no product overflows
        h = (h ^ (h >> shift)) * factor % (1 << 32)
    return 1.0 - 2.0 * ((h ^ (h >> 15)) & 1).double()


def relative_gap(svd: SVD) -> float:
    """The smallest (s_j - s_{j+1}) / s_1: how well single pairs are determined.

    An error of relative size ε in the weight turns neighbouring pairs by up to ε / gap. The gap is inf for a single
    pair, 0 for a weight of zeros, and nan for meta tensors.
    """
    if len(svd.s) < 2:
        return math.inf
    if svd.s.is_meta:
        return math.nan
    s = svd.s.detach().to("cpu", torch.float64)
    return float((s[:-1] - s[1:]).min() / s[0].clamp_min(1e-300))
