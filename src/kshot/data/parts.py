"""The parts of a data set as torch data sets that hand over whole batches."""

import random
import warnings
from collections.abc import Sequence
from dataclasses import KW_ONLY, InitVar, dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from kshot.backbones import Preprocessing
from kshot.data.images import CLIPS, Decoding, ImageSource, UnreadableImageError
from kshot.data.splits import Row
from kshot.data.transforms import Augment, evaluation_view, kernel_of, limit_size
from kshot.errors import UserError

Key = tuple[int, int]  # position in the part, view


class Batch(NamedTuple):
    """What a data loader yields.

    Attributes:
        image: (B, 3, S, S) uint8; None where features are kept.
        label: (B,) int64, -1 where unknown.
        index: (B,) int64 position in the part.
        features: (B, D) by this run's image tower, where they are kept.
        frozen: (B, D) by the untouched backbone, where they are kept.
    """

    image: Tensor | None
    label: Tensor
    index: Tensor  # type: ignore[assignment]  # hides tuple.index, which nobody looks for in a batch
    features: Tensor | None = None
    frozen: Tensor | None = None


@dataclass(eq=False, repr=False)
class Part(Dataset[Batch]):
    """Images with labels, and the features that are kept of them.

    A key is a position and a view; the same key gives the same view in every run and process. A data loader asks for
    all keys of a batch at once, so that stacking is done here.

    Images are decoded once and kept as uint8 in memory: without ``augment`` the evaluation images, 3 * image_size²
    bytes each; with it in their own shape, the shorter side limited to 2 * image_size: about 0.6 MB for a 4:3 photo at
    224 pixels. The limit costs sharpness only in crops below a quarter of the area.

    Args:
        source: opens the images of the rows.
        preprocessing: of the evaluation images; augmented ones take its size and interpolation.
        name: of the part, for messages.
        augment: makes the views; None for the evaluation transform.
        decoding: how stored pixels become RGB.
        views: number of different views of an image that repeat; 0 for endless.
        lazy: decode images when they are asked for, and keep none: for parts that are read once.
        skip_unreadable: leave out what cannot be read instead of raising. All is read in advance for it, since a batch
            must not come out short.

    Attributes:
        paths: of the images, by position.
        labels: (N,) int64.
        left_out: number of images that cannot be read.
        features: (V, N, D) for V views, once kept; loaders that exist already hand them out.
        frozen: the same for ``Batch.frozen``.

    Raises:
        UnreadableImageError: an image cannot be read; of a lazy part, when it is asked for.
        UserError: none can.
    """

    source: ImageSource
    rows: InitVar[Sequence[Row]]
    preprocessing: Preprocessing
    _: KW_ONLY
    decoding: Decoding = CLIPS
    name: str = "train"
    augment: Augment | None = None
    views: int = 1
    seed: int = 1
    lazy: bool = False
    skip_unreadable: InitVar[bool] = False
    arrays: list[np.ndarray] = field(default_factory=list, init=False)
    features: Tensor | None = field(default=None, init=False)
    frozen: Tensor | None = field(default=None, init=False)

    def __post_init__(self, rows: Sequence[Row], skip_unreadable: bool) -> None:
        kept = rows if self.lazy and not skip_unreadable else self._readable(rows, skip_unreadable)
        if not self.lazy:
            self.source.close()
        self.left_out = len(rows) - len(kept)
        self.paths = [row.path for row in kept]
        self.labels = torch.tensor([row.label for row in kept], dtype=torch.int64)

    def load(self) -> None:
        """Decodes now what is decoded once; a data loader asks for it before it starts processes."""
        if not self.lazy and not self.arrays:
            self.arrays = [self._decoded(path) for path in self.paths]
            self.source.close()

    def keep(self, features: Tensor | None = None, frozen: Tensor | None = None, free: bool = False) -> None:
        """Lets batches carry features: of this run in the place of images, of the untouched backbone beside them.

        Both are (V, N, D) on the CPU; None leaves them as they are. With ``free`` decoded images are dropped until they
        are asked for. Raises ValueError for another shape, and for endless views.
        """
        for given in (features, frozen):
            if given is not None and (given.ndim, *given.shape[:2]) != (3, self.views or -1, len(self)):
                expected = f"({self.views}, {len(self)}, D)"
                raise ValueError(f"features of shape {tuple(given.shape)} for {self.name}, which needs {expected}")
        self.features = self.features if features is None else features
        self.frozen = self.frozen if frozen is None else frozen
        if free:
            self.arrays = []

    def __len__(self) -> int:
        return len(self.labels)

    def __getitems__(self, keys: Sequence[Key]) -> Batch:
        index, view = torch.tensor(keys, dtype=torch.int64).unbind(1)
        features, frozen = (
            None if kept is None else kept[view % self.views, index] for kept in (self.features, self.frozen)
        )
        image = self.images(keys) if features is None else None
        return Batch(image, self.labels[index], index, features, frozen)

    def images(self, keys: Sequence[Key]) -> Tensor:
        """Makes views of images, uint8 (B, 3, S, S)."""
        self.load()
        arrays = [self._decoded(self.paths[i]) if self.lazy else self.arrays[i] for i, _ in keys]
        if self.augment is None:
            return torch.from_numpy(np.stack(arrays))
        views = []
        for array, (position, view) in zip(arrays, keys, strict=True):
            stream = random.Random(f"{self.seed}/{position}/{view}")
            views.append(self.augment(Image.fromarray(array), self.preprocessing, stream))
        return torch.stack(views)

    def _decoded(self, path: str) -> np.ndarray:
        image = self.source.open(path, decoding=self.decoding)
        if self.augment is None:
            return evaluation_view(image, self.preprocessing).numpy()
        return np.array(limit_size(image, 2 * self.preprocessing.size, kernel_of(self.preprocessing)))

    def _readable(self, rows: Sequence[Row], skip: bool) -> list[Row]:
        kept: list[Row] = []
        first = ""
        for row in rows:
            try:
                if self.lazy:
                    self.source.open(row.path, True, self.decoding)
                else:
                    self.arrays.append(self._decoded(row.path))
            except UnreadableImageError as error:
                if not skip:
                    raise UnreadableImageError(
                        f"{error}; leave such images out with --data.skip_unreadable true"
                    ) from None
                first = first or str(error)
            else:
                kept.append(row)
        if rows and not kept:
            raise UserError(f"none of the {len(rows)} images can be read: {first}")
        if first:
            warnings.warn(f"{len(rows) - len(kept)} of {len(rows)} images are left out: {first}", stacklevel=6)
        return kept
