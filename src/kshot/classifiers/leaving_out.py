"""Answers of a closed form about shots that it did not learn from, without finding it again from the rest."""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from kshot.mahalanobis import AT_ONCE, exact_unit, half_gram

ROUNDS = 8  # at most so many answers from a part of the shots are found, to choose by


def judgeable(label: Tensor) -> Tensor:
    """Which images, (N,), can be held out: those whose class has another."""
    return label.bincount()[label] > 1


def turns(label: Tensor) -> Tensor:
    """How many images of the same class stand before each, (N,)."""
    count, order = label.bincount(), label.argsort(stable=True)
    first = (count.cumsum(0) - count).repeat_interleave(count)
    return torch.empty_like(label).index_copy_(0, order, torch.arange(len(label)) - first)


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
    judged, found = judgeable(label), None
    for held in rounds(label):
        each = scores(held)
        if found is None:  # filled in place: of many classes each copy is large
            found = each.new_empty(*each.shape[:-2], int(judged.sum()), each.shape[-1])
        found[..., held[judged], :] = each
    assert found is not None, "some image can be held out"
    return found


class Basis(NamedTuple):
    """Orthonormal eigenvectors Q of ``XᵀX``, (D, R); of fewer rows than columns as ``Xᵀ T``, which is never multiplied.

    Attributes:
        turn: Q, or T, (M, R).
        rows: X, (M, D); None where ``turn`` is Q.
    """

    turn: Tensor
    rows: Tensor | None

    def outside(self, points: Tensor) -> Tensor:
        """``c Qᵀ``, (..., D), of points in the basis, (..., R)."""
        return points @ self.turn.T if self.rows is None else points @ self.turn.T @ self.rows


class Spectrum(NamedTuple):
    """Shots in the directions of their scatter, in which both ridge regression and Gaussians are divisions.

    Attributes:
        mean: x̄, (D,), of their unit-length features.
        basis: Q, R directions of the centred features.
        rows: the centred features in it, (V, N, R).
        spread: eigenvalues of their scatter, the mean over the views, (R,): ``Σ_i mean_v x xᵀ``.
    """

    mean: Tensor
    basis: Basis
    rows: Tensor
    spread: Tensor


def spectrum(features: Tensor) -> Spectrum:
    """Takes shots apart by the smaller of two matrices, D x D or VN x VN, in float64.

    Features are turned to float64 and centred a block at a time, so that no copy of all is made where there are more
    images than directions. Where there are fewer, directions in which nothing lies are left out.

    Args:
        features: (V, N, D).
    """
    views, images, width = features.shape
    parts = features.flatten(0, 1).split(AT_ONCE)
    mean = torch.stack([exact_unit(part).sum(0) for part in parts]).sum(0) / (views * images)
    if views * images > width:
        scatter = torch.zeros(width, width, dtype=mean.dtype)
        for part in parts:
            rows = exact_unit(part) - mean
            scatter += half_gram(rows.T)
        values, turn = torch.linalg.eigh(scatter)
        inside = torch.empty(views * images, width, dtype=mean.dtype)
        for part, into in zip(parts, inside.split(AT_ONCE), strict=True):
            torch.matmul(exact_unit(part) - mean, turn, out=into)
        basis, values = Basis(turn, None), values.clamp(min=0)
    else:
        rows = exact_unit(features.flatten(0, 1)) - mean
        values, vectors = torch.linalg.eigh(half_gram(rows))
        present = values > 1e-12 * values.sum()
        values, vectors = values[present], vectors[:, present]
        basis, inside = Basis(vectors / values.sqrt(), rows), vectors * values.sqrt()
    return Spectrum(mean, basis, inside.view(views, images, -1), values / views)


def of_removed(diagonals: Tensor, removed: Tensor, right: Tensor) -> Iterator[Tensor]:
    """``U (diag(d) - UᵀU)⁻¹ Y``, (M, C), for each d: what least squares say of rows that are taken out of them.

    Args:
        diagonals: d, (S, R), of the whole.
        removed: U, (M, R).
        right: Y, (R, C).
    """
    if len(removed) >= len(right):
        lost = removed.T @ removed
        for d in diagonals:
            yield removed @ torch.linalg.solve(torch.diag(d) - lost, right)
        return
    for d in diagonals:  # (I - U D⁻¹ Uᵀ)⁻¹ U D⁻¹ Y
        each = removed / d
        inner = (each @ removed.T).neg_()
        inner.diagonal().add_(1)
        yield torch.linalg.solve(inner, each @ right)


def downdated(diagonal: Tensor, removed: Tensor, right: Tensor) -> Tensor:
    """``(diag(d) - UᵀU)⁻¹ Y``, (R, C): what least squares give once some rows are taken out of them.

    By the identity of Woodbury where there are fewer rows than directions.

    Args:
        diagonal: d, (R,), of the whole.
        removed: U, (M, R).
        right: Y, (R, C).
    """
    if len(removed) >= len(right):
        found: Tensor = torch.linalg.solve(torch.diag(diagonal) - removed.T @ removed, right)
        return found
    shrunk, each = right / diagonal[:, None], removed / diagonal
    inner = (each @ removed.T).neg_()
    inner.diagonal().add_(1)
    return shrunk.addmm_(each.T, torch.linalg.solve(inner, removed @ shrunk))
