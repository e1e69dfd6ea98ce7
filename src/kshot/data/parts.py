"""The parts of a data set as torch data sets that hand over whole batches."""

import random
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from kshot.data.images import (
    Augment,
    ImageSource,
    UnreadableImageError,
    evaluation_transform,
    limit_size,
)
from kshot.data.splits import Row
from kshot.errors import UserError

Key = tuple[int, int]  # position in the part, view


class Batch(NamedTuple):
    """What a data loader yields.

    Attributes:
        input: (B, 3, S, S) uint8 images, or (B, D) float features once they replaced the images.
        label: (B,) int64, -1 where unknown.
        index: (B,) int64 position in the part.
        frozen: (B, D) float features by the untouched backbone, for training batches where they are kept.
    """

    input: Tensor
    label: Tensor
    index: Tensor  # type: ignore[assignment]  # hides tuple.index, which nobody looks for in a batch
    frozen: Tensor | None = None


class Part(Dataset[Batch], ABC):
    """Images or features with labels.

    A key is a position, or a position and a view. A data loader asks for all keys of a batch at once, so that stacking
    is done here, by indexing where possible.

    Attributes:
        labels: (N,) int64.
        skipped: number of images that were left out because they cannot be read.
        features: (V, N, D) for V views, once they have replaced the images; loaders that exist already hand them out.
        frozen: (V, N, D), the same for ``Batch.frozen``.
    """

    features: Tensor | None = None
    frozen: Tensor | None = None

    def __init__(self, labels: Sequence[int] | Tensor, skipped: int = 0) -> None:
        self.labels = torch.as_tensor(labels, dtype=torch.int64)
        self.skipped = skipped

    @abstractmethod
    def inputs(self, keys: Sequence[Key]) -> Tensor:
        """Stacks the inputs of the keys: (B, ...)."""

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, key: int | Key) -> Batch:
        batch = self.__getitems__([key])
        frozen = None if batch.frozen is None else batch.frozen[0]
        return Batch(batch.input[0], batch.label[0], batch.index[0], frozen)

    def __getitems__(self, keys: Sequence[int | Key]) -> Batch:
        pairs = [(key, 0) if isinstance(key, int) else key for key in keys]
        index = torch.tensor([position for position, _ in pairs], dtype=torch.int64)
        view = torch.tensor([view for _, view in pairs], dtype=torch.int64)
        inputs = self.inputs(pairs) if self.features is None else self.features[view % len(self.features), index]
        frozen = None if self.frozen is None else self.frozen[view % len(self.frozen), index]
        return Batch(inputs, self.labels[index], index, frozen)


class StoredImages(Part):
    """Images that are decoded once and kept as uint8 in memory.

    Without ``augment`` the evaluation images are kept: 3 * image_size² bytes each. With it, the decoded images are, in
    their own shape, the shorter side limited to 2 * image_size: about 0.6 MB for a 4:3 photo at 224 pixels. The limit
    costs sharpness only in crops below a quarter of the area, and saves decoding in every epoch.

    Args:
        source: opens the rows.
        rows: the part.
        image_size: side of the inputs in pixels.
        augment: makes the views; None for the evaluation transform.
        seed: of the views.
        skip_unreadable: leave out what cannot be read instead of raising.

    Raises:
        UnreadableImageError: an image cannot be read.
        UserError: none can.
    """

    def __init__(
        self,
        source: ImageSource,
        rows: Sequence[Row],
        image_size: int,
        *,
        augment: Augment | None = None,
        seed: int = 1,
        skip_unreadable: bool = False,
    ) -> None:
        self.image_size = image_size
        self.augment = augment
        self.seed = seed
        transform = evaluation_transform(image_size)
        arrays: list[np.ndarray] = []
        tensors: list[Tensor] = []

        def keep(path: str) -> None:
            if augment is None:
                tensors.append(transform(source.open(path)))
            else:
                arrays.append(np.array(limit_size(source.open(path), 2 * image_size)))

        kept = _readable(rows, keep, skip_unreadable)
        self._arrays = arrays
        self._tensors = torch.stack(tensors) if tensors else torch.empty(0, 3, image_size, image_size).byte()
        super().__init__([row.label for row in kept], skipped=len(rows) - len(kept))

    def inputs(self, keys: Sequence[Key]) -> Tensor:
        """Gives (B, 3, S, S) uint8; the same key gives the same view in every run and process."""
        if self.augment is None:
            return self._tensors[[position for position, _ in keys]]
        views = []
        for position, view in keys:
            stream = random.Random(f"{self.seed}/{position}/{view}")
            views.append(self.augment(Image.fromarray(self._arrays[position]), self.image_size, stream))
        return torch.stack(views)


class LazyImages(Part):
    """Images that are decoded when they are asked for, for parts that are read once.

    With ``skip_unreadable`` all are read in advance as well, since a batch must not come out short.

    Raises:
        UserError: as ``StoredImages``, but without ``skip_unreadable`` only when the image is asked for.
    """

    def __init__(
        self, source: ImageSource, rows: Sequence[Row], image_size: int, skip_unreadable: bool = False
    ) -> None:
        kept = _readable(rows, source.check, skip=True) if skip_unreadable else list(rows)
        self.source = source
        self.paths = [row.path for row in kept]
        self.transform = evaluation_transform(image_size)
        super().__init__([row.label for row in kept], skipped=len(rows) - len(kept))

    def inputs(self, keys: Sequence[Key]) -> Tensor:
        """Decodes (B, 3, S, S) uint8."""
        return torch.stack([self.transform(self.source.open(self.paths[position])) for position, _ in keys])


class EpochSampler(Sampler[Key]):
    """Shuffles without replacement; epoch e depends on the seed and e only, so that a resumed run goes on as before.

    Args:
        positions: of the images.
        seed: of the order.
        views: number of views that repeat; 0: a new view in every epoch.
    """

    def __init__(self, positions: Sequence[int], seed: int, views: int) -> None:
        self.positions = positions
        self.seed = seed
        self.views = views
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Chooses the epoch of the next iteration; Lightning calls this by itself."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.positions)

    def __iter__(self) -> Iterator[Key]:
        order = list(self.positions)
        random.Random(f"{self.seed}/{self.epoch}").shuffle(order)
        view = self.epoch % self.views if self.views else self.epoch
        return iter([(position, view) for position in order])


def _readable(rows: Sequence[Row], read: Callable[[str], object], skip: bool) -> list[Row]:
    kept: list[Row] = []
    first = ""
    for row in rows:
        try:
            read(row.path)
        except UnreadableImageError as error:
            if not skip:
                raise UnreadableImageError(f"{error}; leave such images out with --data.skip_unreadable true") from None
            first = first or str(error)
        else:
            kept.append(row)
    if rows and not kept:
        raise UserError(f"none of the {len(rows)} images can be read: {first}")
    if first:
        warnings.warn(f"{len(rows) - len(kept)} of {len(rows)} images are left out: {first}", stacklevel=4)
    return kept
