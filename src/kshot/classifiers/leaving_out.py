"""Answers of a closed form about shots that it did not learn from, without finding it again from the rest."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

ROUNDS = 8  # at most so many answers from a part of the shots are found, to choose by


def judgeable(label: Tensor) -> Tensor:
    """Which images, (N,), can be held out: those whose class has another."""
    return label.bincount()[label] > 1


def turns(label: Tensor) -> Tensor:
    """How many images of the same class stand before each, (N,)."""
    found = torch.zeros_like(label)
    for c in label.unique():
        members = (label == c).nonzero()[:, 0]
        found[members] = torch.arange(len(members))
    return found


def rounds(label: Tensor) -> list[Tensor]:
    """Which images, (N,), are held out together: one of each class that has another, or an eighth of each.

    All classes lose alike. Where one image alone is held out its class is the smallest of all, and seems unlikely: of
    few images so much so that choices go wrong.
    """
    turn = torch.where(judgeable(label), turns(label) % ROUNDS, -1)
    return [turn == number for number in range(ROUNDS) if (turn == number).any()]


def held_out(label: Tensor, scores: Callable[[Tensor], Tensor]) -> Tensor:
    """Scores, (..., N, C), of :func:`judgeable` images by answers that were found without their :func:`rounds`.

    Args:
        label: (N,).
        scores: gives those, (..., n, C), of n images, which (N,) bool mark, by an answer from the others.
    """
    lots = [(held, scores(held)) for held in rounds(label)]
    index = torch.cat([held.nonzero()[:, 0] for held, _ in lots])
    found: Tensor = torch.cat([each for _, each in lots], -2)[..., index.argsort(), :]
    return found


class Basis(NamedTuple):
    """Orthonormal eigenvectors Q of ``XᵀX``, (D, R); of fewer rows than columns as ``Xᵀ T``, which is never multiplied.

    Attributes:
        turn: Q, or T, (M, R).
        rows: X, (M, D); None where ``turn`` is Q.
    """

    turn: Tensor
    rows: Tensor | None

    def inside(self, points: Tensor) -> Tensor:
        """``x Q``, (..., R), of points, (..., D)."""
        return points @ self.turn if self.rows is None else points @ self.rows.T @ self.turn

    def outside(self, points: Tensor) -> Tensor:
        """``c Qᵀ``, (..., D), of points in the basis, (..., R)."""
        return points @ self.turn.T if self.rows is None else points @ self.turn.T @ self.rows


def directions(rows: Tensor) -> tuple[Basis, Tensor, Tensor]:
    """Eigenvectors Q of ``XᵀX``, its eigenvalues, (R,), and X Q, (M, R), by the smaller of its two products.

    Args:
        rows: X, (M, D), in float64. Where M <= D, directions in which nothing lies are left out.
    """
    if len(rows) > rows.shape[1]:
        values, basis = torch.linalg.eigh(rows.T @ rows)
        return Basis(basis, None), values.clamp(min=0), rows @ basis
    values, vectors = torch.linalg.eigh(rows @ rows.T)
    present = values > 1e-12 * values.sum()
    values, vectors = values[present], vectors[:, present]
    return Basis(vectors / values.sqrt(), rows), values, vectors * values.sqrt()


def downdated(diagonals: Tensor, removed: Tensor, right: Tensor) -> Tensor:
    """``(diag(d) - UᵀU)⁻¹ Y`` for each d, (S, R, C): what least squares give once some rows are taken out of them.

    By the identity of Woodbury where there are fewer rows than directions.

    Args:
        diagonals: d, (S, R), of the whole.
        removed: U, (M, R).
        right: Y, (R, C).
    """
    if len(removed) >= len(right):
        lost = removed.T @ removed
        return torch.stack([torch.linalg.solve(torch.diag(d) - lost, right) for d in diagonals])
    found = []
    for d in diagonals:
        shrunk, each = right / d[:, None], removed / d
        inner = torch.eye(len(removed), dtype=d.dtype) - each @ removed.T
        found.append(shrunk + each.T @ torch.linalg.solve(inner, removed @ shrunk))
    return torch.stack(found)
