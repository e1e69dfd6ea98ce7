"""The parts of a data set as torch data sets that hand over whole batches."""

import copy
import logging
import random
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import KW_ONLY, InitVar, asdict, dataclass, field
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from kshot.backbones import Preprocessing
from kshot.data.digests import digest_of
from kshot.data.images import CLIPS, Decoding, ImageSource, UnreadableImageError
from kshot.data.splits import Row
from kshot.data.transforms import Augment, evaluation_view, kernel_of, limit_size
from kshot.errors import UserError
from kshot.files import amount
from kshot.store import Store

Key = tuple[int, int]  # position in the part, view
logger = logging.getLogger("kshot")
KEPT_AT_ONCE = 1024  # decoded images that are written to one file


class Tokens(NamedTuple):
    """Tokens behind the first blocks of an image tower.

    Attributes:
        states: (B, L, width), or (V, N, L, width) of V views of N images, in the dtype in which they were computed.
        blocks: the number of these blocks.
    """

    states: Tensor
    blocks: int


class Batch(NamedTuple):
    """What a data loader yields.

    Attributes:
        image: (B, 3, S, S) uint8; None where features or tokens are kept.
        label: (B,) int64, -1 where unknown.
        index: (B,) int64 position in the part.
        features: (B, D) by this run's image tower, where they are kept.
        frozen: (B, D) by the untouched backbone, where they are kept.
        tokens: of the images, where they are kept.
    """

    image: Tensor | None
    label: Tensor
    index: Tensor  # type: ignore[assignment]  # hides tuple.index, which nobody looks for in a batch
    features: Tensor | None = None
    frozen: Tensor | None = None
    tokens: Tokens | None = None


@dataclass(eq=False, repr=False)
class Part(Dataset[Batch]):
    """Images with labels, and the features that are kept of them.

    A key is a position and a view; the same key gives the same view in every run and process. A data loader asks for
    all keys of a batch at once, so that stacking is done here.

    Images for steps are decoded once and kept as uint8 in memory: without ``augment`` the evaluation images, 3 *
    image_size² bytes each; with it in their own shape, the shorter side limited to 2 * image_size: about 0.6 MB for a
    4:3 photo at 224 pixels. The limit costs sharpness only in crops below a quarter of the area.

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
        wait: read nothing until ``settle``.
        digests: of the images' bytes by position; by default they are asked of the source when they are needed.

    Attributes:
        kept: where decoded evaluation images are kept for later runs, if they are.
        paths: of the images, by position.
        labels: (N,) int64.
        left_out: number of images that cannot be read.
        features: (V, N, D) for V views, once kept; loaders that exist already hand them out.
        frozen: the same for ``Batch.frozen``.
        tokens: the same for ``Batch.tokens``.
        known: (N,) bool, of which images both have rows; None for all.
        idle: no step asks for images: features are to come, or there are no steps.
        places: of a subset, the positions in the whole part, which decide what its random views are.

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
    skip_unreadable: bool = False
    wait: InitVar[bool] = False
    digests: Sequence[str] | None = None
    kept: Store | None = field(default=None, init=False)
    left_out: int = field(default=0, init=False)
    arrays: list[np.ndarray] = field(default_factory=list, init=False)
    features: Tensor | None = field(default=None, init=False)
    frozen: Tensor | None = field(default=None, init=False)
    tokens: Tokens | None = field(default=None, init=False)
    known: Tensor | None = field(default=None, init=False)
    idle: bool = field(default=False, init=False)
    places: Sequence[int] | None = field(default=None, init=False)

    def __post_init__(self, rows: Sequence[Row], wait: bool) -> None:
        self.paths = [row.path for row in rows]
        self.labels = torch.tensor([row.label for row in rows], dtype=torch.int64)
        self.settled = self.lazy and not self.skip_unreadable
        if not wait:
            self.settle()

    def settle(self, known: Sequence[bool] = (), hold: bool = True) -> None:
        """Finds out, once, which images can be read; with ``hold`` what is decoded for it stays in memory.

        ``known`` says by position which can be, because features of the same bytes are there. Raises as the class does.
        """
        if self.settled:
            return
        wrong: dict[int, str] = {}
        if not (known and all(known)):
            if hold and not self.lazy:
                wrong = self._decode_all()
            elif self.skip_unreadable:
                unknown = [i for i in range(len(self.paths)) if not (known and known[i])]
                wrong = dict(each for each in map(self._fault, unknown) if each[1])
        kept = [i for i in range(len(self.paths)) if i not in wrong]
        if self.paths and not kept:
            raise UserError(f"none of the {len(self.paths)} images can be read: {next(iter(wrong.values()))}")
        if wrong:
            said = f"{len(wrong)} of {len(self.paths)} images are left out: {next(iter(wrong.values()))}"
            warnings.warn(said, stacklevel=5)
        self.left_out, self.paths, self.labels = len(wrong), [self.paths[i] for i in kept], self.labels[kept]
        self.digests = None if self.digests is None else [self.digests[i] for i in kept]
        self.settled = True
        if not self.lazy:
            self.source.close()

    def subset(self, positions: Sequence[int]) -> "Part":
        """Some of the images as a part of their own, with the views and pixels that they have in this one."""
        self.settle()
        some, places = copy.copy(self), self.places or range(len(self))
        some.paths, some.places = [self.paths[i] for i in positions], [places[i] for i in positions]
        some.labels = self.labels[torch.tensor(positions)]
        some.digests = None if self.digests is None else [self.digests[i] for i in positions]
        some.arrays = [self.arrays[i] for i in positions] if self.arrays else []
        some.features = some.frozen = some.tokens = some.known = None
        return some

    def load(self) -> None:
        """Decodes now what is decoded once; a data loader asks for it before it starts processes."""
        self.settle()
        if not self.lazy and not self.arrays:
            self._decode_all()
            self.source.close()

    def keep(
        self,
        features: Tensor | None = None,
        frozen: Tensor | None = None,
        *,
        tokens: Tokens | None = None,
        free: bool = False,
        known: Tensor | None = None,
    ) -> None:
        """Lets batches carry features or tokens in the place of images, and features of the untouched backbone beside.

        Features are (V, N, D) and tokens (V, N, L, width), on the CPU; None leaves them as they are. With ``free``
        decoded images are dropped until they are asked for. ``known``, (N,), says which images have features; None for
        all. A batch with another one carries images. Raises ValueError for another shape, and for endless views.
        """
        for given, more in ((features, "D"), (frozen, "D"), (tokens and tokens.states, "L, width")):
            dimensions = 2 + len(more.split())
            if given is not None and (given.ndim, *given.shape[:2]) != (dimensions, self.views or -1, len(self)):
                expected = f"({self.views}, {len(self)}, {more})"
                raise ValueError(f"features of shape {tuple(given.shape)} for {self.name}, which needs {expected}")
        self.features = self.features if features is None else features
        self.frozen = self.frozen if frozen is None else frozen
        self.tokens = self.tokens if tokens is None else tokens
        self.known = None if known is None or known.all() else known
        self.arrays = [] if free else self.arrays

    def keep_decoded(self, most: int) -> None:
        """Keeps decoded evaluation images in a store of ``most`` bytes for later runs, where all find room there."""
        if (need := 3 * self.preprocessing.size**2 * len(self.paths)) > most:
            too = f"{amount(need)}, and data.store_gb allows {amount(most)}"
            logger.info("Decoded images of %s are not kept: they take %s.", self.name, too)
        elif self.augment is None:
            self.kept = Store("images", self.context(), most)

    @property
    def opens_images(self) -> bool:
        """Whether any batch carries images."""
        return (self.features is None and self.tokens is None) or self.known is not None

    def context(self) -> dict[str, Any]:
        """All that decides the pixels of a view beside its key, in plain data."""
        found = {"preprocessing": asdict(self.preprocessing), "decoding": asdict(self.decoding)}
        if self.augment is not None:
            kind = type(self.augment)
            found["augment"] = {"class": f"{kind.__module__}.{kind.__qualname__}", **asdict(cast(Any, self.augment))}
        return found

    def row_keys(self, view: int = 0) -> list[str]:
        """Tells by 16 hexadecimal digits what each image looks like in a view; empty for one that cannot be digested.

        A random view depends on seed, position and view; an evaluation image on its bytes alone.
        """
        if self.digests is None:
            self.digests = self.source.digests(self.paths)
        if self.augment is None:
            return list(self.digests)
        drawn = enumerate(self.digests)
        return [digest and digest_of(f"{digest}/{self._chance(i, view)}".encode()) for i, digest in drawn]

    def unchanged(self, positions: Sequence[int]) -> list[bool]:
        """Says of images whether their bytes are still those that ``row_keys`` were made of."""
        assert self.digests is not None
        now = self.source.digests([self.paths[i] for i in positions])
        return [digest == self.digests[i] for i, digest in zip(positions, now, strict=True)]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitems__(self, keys: Sequence[Key]) -> Batch:
        index, view = torch.tensor(keys, dtype=torch.int64).unbind(1)
        there = self.known is None or bool(self.known[index].all())
        features, frozen = (
            kept[view % self.views, index] if kept is not None and there else None
            for kept in (self.features, self.frozen)
        )
        tokens = self.tokens and self.tokens._replace(states=self.tokens.states[view % self.views, index])
        image = self.images(keys) if features is None and tokens is None else None
        return Batch(image, self.labels[index], index, features, frozen, tokens)

    def images(self, keys: Sequence[Key]) -> Tensor:
        """Makes views of images, uint8 (B, 3, S, S); each image is decoded at most once for all of them."""
        positions = list(dict.fromkeys(position for position, _ in keys))
        stored = [None] * len(positions) if self.arrays else self._stored(positions)
        arrays = {
            i: self.arrays[i] if self.arrays else self._decoded(i) if row is None else row
            for i, row in zip(positions, stored, strict=True)
        }
        if self.augment is None:
            return torch.from_numpy(np.stack([arrays[position] for position, _ in keys]))
        views = []
        for position, view in keys:
            stream = random.Random(self._chance(position, view))
            views.append(self.augment(Image.fromarray(arrays[position]), self.preprocessing, stream))
        return torch.stack(views)

    def keeping(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """The same batches, of which the images that were decoded for them are written to ``kept``, many at a time."""
        if self.kept is None or self.arrays or not self.opens_images:
            yield from batches
            return
        keys = self.row_keys()
        missing = [row is None for row in self.kept.find(keys)]
        some: list[tuple[int, Tensor]] = []
        try:
            for batch in batches:
                if batch.image is not None:
                    pairs = zip(batch.index.tolist(), batch.image, strict=True)
                    some += [(i, image.clone()) for i, image in pairs if missing[i]]
                if len(some) >= KEPT_AT_ONCE:
                    self._keep_images(some)
                    some = []
                yield batch
        finally:
            if some:
                self._keep_images(some)

    def _keep_images(self, images: Sequence[tuple[int, Tensor]]) -> None:
        positions, keys = [i for i, _ in images], self.row_keys()
        same = self.unchanged(positions)
        assert self.kept is not None
        self.kept.write(
            [keys[i] if ok else "" for i, ok in zip(positions, same, strict=True)],
            torch.stack([image for _, image in images]),
        )

    def _stored(self, positions: Sequence[int]) -> list[Any]:
        """Decoded images that are kept, as arrays, and None for the others."""
        if self.kept is None:
            return [None] * len(positions)
        keys = self.row_keys()
        return [row if row is None else row.numpy() for row in self.kept.find([keys[i] for i in positions])]

    def _chance(self, position: int, view: int) -> str:
        return f"{self.seed}/{position if self.places is None else self.places[position]}/{view}"

    def _decoded(self, position: int) -> np.ndarray:
        try:
            image = self.source.open(self.paths[position], decoding=self.decoding)
        except UnreadableImageError as error:
            if self.lazy or self.skip_unreadable:
                raise
            raise UnreadableImageError(f"{error}; leave such images out with --data.skip_unreadable true") from None
        if self.augment is None:
            return evaluation_view(image, self.preprocessing).numpy()
        return np.array(limit_size(image, 2 * self.preprocessing.size, kernel_of(self.preprocessing)))

    def _fault(self, position: int) -> tuple[int, str]:
        try:
            if self.lazy:
                self.source.open(self.paths[position], True, self.decoding)
            else:
                self._decoded(position)
        except UnreadableImageError as error:
            return position, str(error)
        return position, ""

    def _decode_all(self) -> dict[int, str]:
        """Decodes all images into memory; what is wrong with those that are skipped, by position."""
        arrays, wrong, new = [], {}, []
        for position, row in enumerate(self._stored(range(len(self.paths)))):
            try:
                arrays.append(self._decoded(position) if row is None else row)
            except UnreadableImageError as error:
                if not self.skip_unreadable or self.settled:
                    raise
                wrong[position] = str(error)
                continue
            if self.kept is not None and row is None:
                new.append((position, torch.from_numpy(arrays[-1])))
        for start in range(0, len(new), KEPT_AT_ONCE):
            self._keep_images(new[start : start + KEPT_AT_ONCE])
        self.arrays = arrays
        return wrong
