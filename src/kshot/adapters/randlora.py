"""RandLoRA (Albert et al. 2025, arXiv:2502.00987): ΔW = s Σ_j B_j Λ_j A Γ_j of full rank, with frozen random A, B_j."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from kshot.adapters.base import RankAdapter
from kshot.adapters.random_basis import FrozenBases
from kshot.holding import Castable
from kshot.layers import FullRankLayer, weight_pass
from kshot.slots import Slot

SPARSE = 0.15  # share of non-zeros below which sparse products were measured quicker on a CPU


@dataclass(frozen=True)
class RandLoRA(RankAdapter):
    """Random-basis adaptation of full rank. A smaller rank trains *more*: n (r + d) numbers a layer with n = ⌈d / r⌉.

    Args:
        rank: r, of each term; d is the smaller side of a layer.
        alpha: the scale is s = alpha / rank; 10 as in the paper's table 8.
        basis: distribution of the entries of A and B, which have variance 1.
        sparsity: of ternary bases: an entry is not 0 with probability 2 / sparsity. √D is the paper's "very sparse"; a
            column of A that is empty then leaves that column of the weight as it was.
        zero: the vector that starts at zero: gamma, with Λ = 1 / max(n, r), as the paper's code; or lambda, with
            Γ = 1 / max(n, d), as PEFT.
        seed: of the frozen bases, apart from the run's.
    """

    rank: int = 6
    alpha: float = 10.0
    basis: Literal["uniform", "normal", "ternary"] = "uniform"
    sparsity: float = 6.0
    zero: Literal["gamma", "lambda"] = "gamma"
    seed: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_known("basis", "zero")
        self.require("sparsity", 2 <= self.sparsity <= 65_536, "lie in [2, 65536]")
        self.require("seed", 0 <= self.seed < 2**63, "lie in [0, 2^63)")

    def prepare(self, slots: Mapping[str, Slot]) -> RandomBases:
        super().prepare(slots)
        smaller = max(min(s.in_features, s.out_features) for s in slots.values())
        larger = max(max(s.in_features, s.out_features) for s in slots.values())
        shapes = {"A": (self.rank, smaller), "B": (larger, -(-smaller // self.rank), self.rank)}
        return RandomBases(self, shapes, next(iter(slots.values())).weight.device)

    def wrap(self, slot: Slot, shared: RandomBases) -> RandLoRALayer:
        return RandLoRALayer(slot, shared, self)


class Rows(NamedTuple):
    """A sparse matrix in compressed rows, as plain tensors: torch cannot copy its own kind."""

    starts: Tensor
    columns: Tensor
    values: Tensor
    shape: torch.Size

    @classmethod
    def of(cls, matrix: Tensor) -> Rows:
        """Leaves the zeros of a matrix out."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # torch says once that the layout is new
            sparse = matrix.to_sparse_csr()
        return cls(sparse.crow_indices(), sparse.col_indices(), sparse.values(), sparse.shape)

    def times(self, right: Tensor) -> Tensor:
        """The product with a matrix on the right."""
        return torch.sparse_csr_tensor(*self, check_invariants=False) @ right


class RandomBases(FrozenBases, Castable):
    """A, (r, d), and B, (D, n, r), for the largest d, D and n of all layers; each takes what it needs of them."""

    def __init__(self, settings: RandLoRA, shapes: Mapping[str, tuple[int, ...]], device: torch.device) -> None:
        advice, kind = "adapt slots of smaller matrices", (settings.basis, settings.sparsity)
        super().__init__("RandLoRA", settings.seed, shapes, device, advice, *kind)
        self.rare = settings.basis == "ternary" and 2 / settings.sparsity < SPARSE
        # Parts of B_flat in float32 without their zeros: by rows, terms, and whether they are transposed.
        self.rows: dict[tuple[int, int, bool], Rows] = {}

    def frozen_tensors(self) -> tuple[Tensor]:
        return (self.B,)

    def prepare_rows(self, rows: int, terms: int) -> None:
        """Leaves zeros out for a layer where they are many enough that products are quicker without them."""
        if self.rare and self.B.device.type == "cpu" and torch.backends.mkl.is_available():
            flat = self.flat(rows, terms, self.B.dtype)
            for transposed in (False, True):
                if (rows, terms, transposed) not in self.rows:
                    self.rows[rows, terms, transposed] = Rows.of(flat.T if transposed else flat)

    def flat(self, rows: int, terms: int, dtype: torch.dtype) -> Tensor:
        """B_flat, (D, n r): B_1 to B_n side by side."""
        (whole,) = self.frozen(dtype)
        part: Tensor = whole[:rows, :terms].flatten(1).to(dtype)
        return part

    def times(self, rows: int, terms: int, right: Tensor, transposed: bool = False) -> Tensor:
        """B_flat or its transpose, times a matrix, in that one's dtype; by non-zeros alone where that is quicker."""
        sparse = self.rows.get((rows, terms, transposed))
        if sparse is not None and (right.dtype, right.device) == (sparse.values.dtype, sparse.values.device):
            return sparse.times(right)
        left = self.flat(rows, terms, right.dtype)
        return (left.T if transposed else left) @ right


class RandLoRALayer(FullRankLayer):
    """With Â_(jk)c = Λ_jk s A_kc Γ_jc, (n r, d), and B_flat, (D, n r): ΔW = B_flat Â, or its transpose where out < in.

    Where the weight is not formed, for few tokens or dropout on the input, tokens go through the two factors in turn.
    """

    paths = ("materialised", "factorised")

    def __init__(self, slot: Slot, bases: RandomBases, settings: RandLoRA) -> None:
        super().__init__(slot)
        self.bases = bases
        self.scale = settings.scale
        self.tall = slot.out_features >= slot.in_features
        self.smaller, self.larger = sorted((slot.in_features, slot.out_features))
        r, n = settings.rank, -(-self.smaller // settings.rank)
        bases.prepare_rows(self.larger, n)
        lambdas, gammas = (0.0, 1 / max(n, self.smaller)) if settings.zero == "lambda" else (1 / max(n, r), 0.0)
        self.Lambda = nn.Parameter(torch.full((n, r), lambdas))
        self.Gamma = nn.Parameter(torch.full((n, self.smaller), gammas))

    def small(self) -> tuple[Tensor, Tensor, Tensor]:
        """What Â is made of: Λ, (n, r), Γ, (n, d), and s A, (r, d)."""
        return self.Lambda, self.Gamma, self.scale * self.bases.A[:, : self.smaller]

    def flat(self, dtype: torch.dtype) -> Tensor:
        """B_flat, (D, n r)."""
        return self.bases.flat(self.larger, len(self.Gamma), dtype)

    def delta(self) -> Tensor:
        delta = self.flat(self.Gamma.dtype) @ scaled(*self.small())
        return delta if self.tall else delta.T

    def build(self, dtype: torch.dtype) -> Tensor:
        delta = self.bases.times(self.larger, len(self.Gamma), scaled(*self.small()).to(dtype))
        return delta if self.tall else delta.T

    def pullback(self, gradient: Tensor) -> tuple[Tensor, Tensor]:
        right = gradient if self.tall else gradient.T
        to_small = self.bases.times(self.larger, len(self.Gamma), right, transposed=True)
        return pulled_back(to_small, *self.small())

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        form = scaled if torch.compiler.is_compiling() else ScaledBasis.apply
        small, large = form(*self.small()).to(y.dtype), self.flat(y.dtype)
        down, up = (small, large) if self.tall else (large.T, small.T)
        return y + F.linear(F.linear(self.dropped(x).to(y.dtype), down), up)

    def choose(self, tokens: int) -> str:
        if self.path != "auto":
            return self.path
        factorised, materialised = self.costs(tokens)
        return "materialised" if materialised < factorised else "factorised"

    def costs(self, tokens: int) -> tuple[int, int]:
        """Multiply-accumulates per step beyond the frozen product: factorised, materialised.

        Factorised, tokens pass two factors forward and backward, and meet again in the gradient of Â. Materialised,
        they meet in that of the weight alone; forming the weight and pulling its gradient back take a product each.
        """
        out, into, inner = self.slot.out_features, self.slot.in_features, self.Lambda.numel()
        factorised = tokens * inner * (2 * (out + into) + self.smaller)
        return factorised, out * into * (tokens + 2 * inner + weight_pass(self.Lambda.device))


def scaled(lambdas: Tensor, gammas: Tensor, base: Tensor) -> Tensor:
    """Â, (n r, d), from Λ, (n, r), Γ, (n, d), and s A, (r, d)."""
    return (lambdas[:, :, None] * base * gammas[:, None]).flatten(0, 1)


def pulled_back(gradient: Tensor, lambdas: Tensor, gammas: Tensor, base: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of Λ and Γ from that of Â."""
    product = gradient.unflatten(0, lambdas.shape) * base
    return (product * gammas[:, None]).sum(2), (product * lambdas[:, :, None]).sum(1)


class ScaledBasis(torch.autograd.Function):
    """:func:`scaled`, for which autograd would keep two tensors of the result's size."""

    @staticmethod
    def forward(ctx: Any, lambdas: Tensor, gammas: Tensor, base: Tensor) -> Tensor:
        ctx.save_for_backward(lambdas, gammas, base)
        return scaled(lambdas, gammas, base)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        return (*pulled_back(gradient, *ctx.saved_tensors), None)
