"""How near an image lies to the shots: the Mahalanobis distance to the nearest class (Lee et al. 2018, equation 2).

It is large for an image of none of the classes, about which a classifier may be sure all the same (arXiv:1807.03888).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from kshot.errors import UserError

PREFIX = "mahalanobis."  # of the tensors in a run's file
DIRECTIONS = 64  # at least so many have a variance of their own, or as many as there are classes
AT_ONCE = 2048  # images of which rows are computed in float64
BLOCK = 256  # columns of a product of which one half is wanted
LEAST = 1e-12  # squared distance of an image from its class, of unit-length features, that is more than rounding


class Mahalanobis(NamedTuple):
    """Class means under one covariance of unit-length features, in float32 on the CPU.

    With S the covariance within classes, of N images of C classes in D dimensions, and f = N - C,

        Σ = (f S + tr(S) I) / (f + D),

    the shrinkage of :class:`~kshot.classifiers.GDA` with the trace kept, so that distances by fewer shots compare with
    those by more. Beyond max(:data:`DIRECTIONS`, C) principal directions all share their mean variance (Tipping and
    Bishop 1999), so that what is stored is not much more than the means. Where no class has two images that differ,
    nothing tells how they vary, and Σ = I. Unit length is as Müller and Hein (2025, arXiv:2505.18032) take it.

    Attributes:
        mean: (C, D), Σ^(-1/2) μ of the classes with shots.
        basis: (R, D), orthonormal: the principal directions.
        deviation: (R + 1,), standard deviations along these, and last along every other direction.
    """

    mean: Tensor
    basis: Tensor
    deviation: Tensor

    def score(self, features: Tensor) -> Tensor:
        """``-min_c (x - μ_c)ᵀ Σ⁻¹ (x - μ_c)``, (B,), of image features, (B, D), on their device: low if unlike all."""
        mean, basis, deviation = (tensor.to(features.device) for tensor in self)
        with torch.autocast(features.device.type, enabled=False):
            white = whitened(F.normalize(features.to(mean), dim=-1), basis, deviation)
            nearest = mean[torch.cdist(white, mean).argmin(1)]
            return -(white - nearest).square().sum(1)


def mahalanobis(features: Tensor, label: Tensor) -> Mahalanobis:
    """Finds means and covariance of shots.

    Args:
        features: (N, D), as the classifier of a run is given them in evaluation.
        label: (N,); classes without images have no mean.

    Raises:
        UserError: a feature is not finite.
    """
    if not features.isfinite().all():
        raise UserError("Image features are not finite, and have no Mahalanobis distance.")
    (images, width), (found, own) = features.shape, label.cpu().unique(return_inverse=True)
    classes, mean = len(found), torch.zeros(len(found), width, dtype=torch.float64)
    parts = list(zip(features.cpu().split(AT_ONCE), own.split(AT_ONCE), strict=True))
    for rows, which in parts:
        mean.index_add_(0, which, exact_unit(rows))
    mean /= own.bincount()[:, None]
    if images < width:  # the smaller of two matrices with the same eigenvalues
        apart = exact_unit(features) - mean[own]
        gram = half_gram(apart)
    else:
        gram = torch.zeros(width, width, dtype=torch.float64)
        for rows, which in parts:
            apart = exact_unit(rows) - mean[which]
            gram += half_gram(apart.T)
    total, free = gram.trace(), images - classes
    if total <= LEAST * images:
        return Mahalanobis(mean.float(), torch.zeros(0, width), torch.ones(1))
    rank = min(free, max(DIRECTIONS, classes), width - 1)
    values, vectors = (each.flip(-1) for each in torch.linalg.eigh(gram))
    rank = int((values[:rank] > 1e-10 * values[0]).sum())
    values, basis = values[:rank], vectors.T[:rank]
    if images < width:
        basis = basis @ apart / values.sqrt()[:, None]
    spread = (values + total / free) / (free + width)
    rest = (total / free - spread.sum()) / (width - rank)
    deviation = torch.cat([spread, rest[None]]).sqrt()
    return Mahalanobis(whitened(mean, basis, deviation).float(), basis.float(), deviation.float())


def exact_unit(features: Tensor) -> Tensor:
    """Features, (..., D), at unit length in float64 on the CPU: not every device has float64."""
    return F.normalize(features.cpu().double(), dim=-1)


def half_gram(rows: Tensor) -> Tensor:
    """``X Xᵀ``, (M, M), on and below the diagonal, which is all that ``eigh`` reads, by half of the work."""
    found = rows.new_zeros(len(rows), len(rows))
    for start in range(0, len(rows), BLOCK):
        end = start + BLOCK
        torch.matmul(rows[start:], rows[start:end].T, out=found[start:, start:end])
    return found


def whitened(x: Tensor, basis: Tensor, deviation: Tensor) -> Tensor:
    """``Σ^(-1/2) x``, (B, D), of rows x."""
    along = x @ basis.T * (1 / deviation[:-1] - 1 / deviation[-1])
    return x / deviation[-1] + along @ basis


def nearness(found: Mahalanobis | None, features: Tensor) -> Tensor:
    """:meth:`Mahalanobis.score` of image features, (B, D); not numbers where nothing was found."""
    return features.new_full(features.shape[:1], torch.nan) if found is None else found.score(features)


def stated(found: Mahalanobis | None) -> dict[str, Tensor]:
    """The tensors of a run's file, by name; none where nothing was found."""
    return {} if found is None else {PREFIX + name: tensor for name, tensor in found._asdict().items()}


def stored_mahalanobis(tensors: Mapping[str, Tensor], classes: int) -> Mahalanobis | None:
    """What tensors of a run's file, by name, hold of it; None where they hold nothing, as those of older runs do.

    Raises:
        UserError: some are missing, unknown, of other numbers or of shapes that do not fit each other or the classes.
    """
    own = {name.removeprefix(PREFIX): tensor for name, tensor in tensors.items() if name.startswith(PREFIX)}
    if not own:
        return None
    if own.keys() == Mahalanobis.__annotations__.keys():
        found = Mahalanobis(**own)
        rank, width = len(found.deviation.flatten()) - 1, found.mean.shape[-1]
        shapes = [tuple(tensor.shape) for tensor in found]
        fit = shapes == [(len(found.mean), width), (rank, width), (rank + 1,)] and 0 < len(found.mean) <= classes
        if fit and all(tensor.dtype == torch.float32 for tensor in found) and (found.deviation > 0).all():
            return found
    said = ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in sorted(own.items()))
    raise UserError(f"The checkpoint's tensors for the Mahalanobis distance do not fit each other: {said}.")
