"""What a run says of any images, one after the other: memory is that of a few batches, whatever their number."""

from __future__ import annotations

import glob
import io
import math
import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from kshot.calibration import SCORES
from kshot.data.images import Decoding, UnreadableImageError, check_shape, read_image, to_rgb
from kshot.data.parts import Batch
from kshot.data.readers import image_files
from kshot.data.transforms import evaluation_view
from kshot.errors import UserError, first_line, require
from kshot.features import place
from kshot.holding import merged, stored_as
from kshot.opening import OpenRun
from kshot.prepare import low_precision
from kshot.run import make_trainer

AHEAD = 2  # batches that are read while one is computed
MOST_THREADS = 8  # that read images where nobody says how many

Named = tuple[str, Any]  # an image, and what it is called


class Prediction(NamedTuple):
    """What a run says of one image.

    Attributes:
        path: of the file, or the position of an image that is none.
        labels: the likeliest classes, best first; none where the image cannot be read.
        probabilities: of these, calibrated by the run's temperature.
        unknown: how unlike the run's classes it is, the higher the more: the free energy ``-log Σ exp z`` of the
            calibrated logits (Liu et al. 2020, arXiv:2010.03759). It compares images of one run.
        abstain: whether it is too unsure for the rate of errors that was asked for.
        error: why the image cannot be read; empty where it can.
    """

    path: str
    labels: tuple[str, ...] = ()
    probabilities: tuple[float, ...] = ()
    unknown: float = float("nan")
    abstain: bool = False
    error: str = ""

    @property
    def label(self) -> str:
        """The likeliest class; empty where the image cannot be read."""
        return self.labels[0] if self.labels else ""

    @property
    def probability(self) -> float:
        """Of the likeliest class; not a number where the image cannot be read."""
        return self.probabilities[0] if self.probabilities else float("nan")


class Answers:
    """A run that is open, on a device, with all computed that its answers have in common.

    Threads may share it: they read images side by side, and compute one batch after the other.

    Args:
        opened: the run; its module is moved and held merged.

    Attributes:
        notes: what is other than in the run, in sentences.
    """

    def __init__(self, opened: OpenRun) -> None:
        self.opened, self.module, self.notes = opened, opened.module, list[str]()
        given = opened.settings["trainer"]
        if str(given.get("devices", 1)) not in ("1", "auto"):
            raise UserError("predict writes one file, and runs on one device: --trainer.devices 1.")
        precision = given.get("precision") or "32-true"
        trainer = make_trainer(accelerator=given.get("accelerator", "auto"))
        if trainer.strategy.root_device.type == "cpu" and str(precision).startswith("16"):
            self.notes.append(f"The run computes in {precision}, which a CPU does not: it answers in 32-true.")
            precision = "32-true"
        self.trainer = make_trainer(accelerator=given.get("accelerator", "auto"), precision=precision)
        place(self.module, self.trainer)
        self.module.eval()
        self.lock, self.open = threading.Lock(), ExitStack()
        self.reading = opened.images.reading()
        self.hold()

    def hold(self) -> None:
        """Computes what all answers have in common: effective weights, class features, weights in 16 bits."""
        self.open.close()
        dtype = low_precision(self.trainer)
        if dtype is not None:
            self.open.enter_context(stored_as(self.module.backbone, dtype))
        with self.trainer.precision_plugin.forward_context():
            self.open.enter_context(merged(self.module.classifier))

    @property
    def class_names(self) -> tuple[str, ...]:
        """Of the classes that are told apart, in label order."""
        return self.module.classifier.task.class_names

    def abstaining(self, by: str, rate: float | None) -> tuple[str, float] | None:
        """A score, and the least of it that is answered at a rate of errors; None where no rate is asked for.

        Raises:
            UserError: the shots show no such rate, or nothing tells where they lie.
        """
        if rate is None:
            return None
        if by == "mahalanobis" and self.module.mahalanobis is None:
            raise UserError(
                "Nothing tells where the shots lie, by which mahalanobis abstains: tuned.safetensors does, but of no "
                "earlier version, nor of --run.calibrate false. Fit again, or abstain by probability or energy."
            )
        return by, self.module.calibration.threshold(by, rate)

    def predictions(
        self,
        images: Iterable[Named],
        *,
        top_k: int = 5,
        abstain: tuple[str, float] | None = None,
        workers: int | None = None,
        batch_size: int | None = None,
    ) -> Iterator[Prediction]:
        """What it says of images, in their order, as they come.

        Args:
            images: with what they are called; of the kinds that :func:`rgb_of` takes.
            top_k: labels an image, or as many as there are.
            abstain: one of :data:`~kshot.calibration.SCORES`, and the least of it that is answered.
            workers: threads that read images; None takes as many as there are cores, and at most 8.
            batch_size: images that are computed together; None takes the run's ``data.eval_batch_size``.

        Raises:
            UserError: something that is no image is among them.
        """
        require("predict", "top_k", top_k, top_k >= 1, "be 1 or more")
        names, k = self.class_names, min(top_k, len(self.class_names))
        by, least = abstain or ("probability", -math.inf)
        for paths, views in self.batches(images, workers, batch_size):
            there = [i for i, view in enumerate(views) if not isinstance(view, str)]
            pairs = zip(paths, views, strict=True)
            found = [Prediction(path, error=view if isinstance(view, str) else "") for path, view in pairs]
            if there:
                batch = batch_of(torch.stack([view for view in views if not isinstance(view, str)]), there)
                index, probabilities, energy, near = self.step(self.module.predict_step, batch, 0)
                values, labels = probabilities.topk(k, dim=-1)
                scores = dict(zip(SCORES, (values[:, 0], energy, near), strict=True))
                low = ~(scores[by] >= least)  # what is not a number is not answered
                rows = (index.tolist(), labels.tolist(), values.tolist(), (-energy).tolist(), low.tolist())
                for i, ranked, sure, unknown, below in zip(*rows, strict=True):
                    said = tuple(names[label] for label in ranked)
                    found[i] = Prediction(paths[i], said, tuple(sure), unknown, below)
            yield from found

    def features(self, images: Iterable[Named], workers: int | None = None) -> Tensor:
        """Image features, (N, D) in float32, as the run computes them; raises UserError for an unreadable image."""
        found = [self.encoded(views) for views in self.views(images, workers)]
        return torch.cat(found) if found else torch.empty(0, self.module.backbone.feature_dim)

    def encoded(self, views: Tensor) -> Tensor:
        """Image features, (B, D) in float32 on the CPU, of what the backbone sees, (B, 3, S, S)."""
        features: Tensor = self.step(self.module.features_of, batch_of(views, range(len(views))))
        return features.float().cpu().clone()  # outside of inference mode, so that it may stand in a graph

    def views(self, images: Iterable[Named], workers: int | None = None) -> Iterator[Tensor]:
        """What the backbone sees of images, (B, 3, S, S) in uint8; raises UserError for one that cannot be read."""
        for _, views in self.batches(images, workers):
            wrong = next((view for view in views if isinstance(view, str)), None)
            if wrong is not None:
                raise UserError(wrong)
            yield torch.stack([view for view in views if not isinstance(view, str)])

    def step(self, what: Callable[..., Any], batch: Batch, *more: Any) -> Any:
        """Something of a batch, in the precision of the run."""
        device = self.module.device
        with self.lock, torch.inference_mode(), self.trainer.precision_plugin.forward_context():
            return what(batch._replace(image=batch.image.to(device, non_blocking=True)), *more)  # type: ignore[union-attr]

    def batches(
        self, images: Iterable[Named], workers: int | None = None, batch_size: int | None = None
    ) -> Iterator[tuple[list[str], list[Tensor | str]]]:
        """What images are called, and their views, or what keeps one from being read, a batch at a time."""
        size = self.opened.images.eval_batch_size if batch_size is None else batch_size
        require("predict", "batch_size", size, size >= 1, "be 1 or more")
        require("predict", "workers", workers, workers is None or 0 <= workers <= 256, "be from 0 to 256")
        preprocessing, decoding = self.reading

        def read(named: Named) -> Tensor | str:
            try:
                return evaluation_view(rgb_of(*named, decoding), preprocessing)
            except UnreadableImageError as error:
                return str(error)

        yield from read_ahead(iter(images), read, size, cores() if workers is None else workers)


def named(images: Any) -> Iterator[Named]:
    """Images with what they are called: files by their paths, with those of folders and patterns, others by number.

    ``images`` is one of them, or an iterable, of which no more is taken at a time than is read.
    """
    whole = isinstance(images, (Tensor, np.ndarray)) and images.ndim > 3
    one = isinstance(images, (str, bytes, bytearray, os.PathLike, Image.Image, Tensor, np.ndarray)) and not whole
    for position, image in enumerate([images] if one else images):
        if isinstance(image, (str, os.PathLike)):
            yield from ((str(path), path) for path in files_of(os.fspath(image)))
        else:
            yield str(position), image


def files_of(word: str) -> list[Path]:
    """The files that a word names, sorted: itself, the images below a folder, or what matches ``*.png``.

    Raises:
        UserError: a folder without an image, or a pattern that nothing matches.
    """
    if os.path.isdir(word):  # noqa: PTH112  of any length
        return image_files([word])
    if glob.has_magic(word) and not os.path.exists(word):  # noqa: PTH110  likewise
        found = sorted(glob.glob(word, recursive=True))  # noqa: PTH207  of any place
        if not found:
            raise UserError(f"no image or folder matches {word!r}")
        return [file for match in found for file in (image_files([match]) if os.path.isdir(match) else [Path(match)])]  # noqa: PTH112
    return [Path(word)]


def read_ahead(
    images: Iterator[Named], read: Callable[[Named], Tensor | str], size: int, threads: int
) -> Iterator[tuple[list[str], list[Tensor | str]]]:
    """Groups of names with what was read, in order; threads read :data:`AHEAD` groups in advance, and no more."""
    groups = iter(lambda: list(islice(images, size)), [])
    if not threads:
        for group in groups:
            yield [name for name, _ in group], [read(each) for each in group]
        return
    pool = ThreadPoolExecutor(threads, thread_name_prefix="kshot-images")
    waiting: deque[tuple[list[str], list[Any]]] = deque()
    try:
        for group in groups:
            waiting.append(([name for name, _ in group], [pool.submit(read, each) for each in group]))
            if len(waiting) > AHEAD:
                names, futures = waiting.popleft()
                yield names, [future.result() for future in futures]
        while waiting:
            names, futures = waiting.popleft()
            yield names, [future.result() for future in futures]
    finally:
        pool.shutdown(cancel_futures=True)


def cores() -> int:
    """Threads to read images by: one a core that this process may use, and at most :data:`MOST_THREADS`."""
    there = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(there, MOST_THREADS)


def batch_of(image: Tensor, index: Sequence[int]) -> Batch:
    """A batch of views, (B, 3, S, S), without labels."""
    image = image.pin_memory() if torch.cuda.is_available() else image
    return Batch(image, torch.full((len(image),), -1), torch.tensor(index))


def rgb_of(name: str, image: Any, decoding: Decoding) -> Image.Image:
    """An image as 8-bit RGB.

    Args:
        name: for messages.
        image: the path of a file, its bytes, an image of Pillow, or what :func:`picture_of` takes.
        decoding: how stored pixels become RGB.

    Raises:
        UnreadableImageError: it cannot be read.
        UserError: it is no image.
    """
    if isinstance(image, (str, os.PathLike)):
        return read_image(Path(image), decoding=decoding)
    if isinstance(image, (bytes, bytearray)):
        return read_image(Path(name), False, decoding, io.BytesIO(image))
    picture = image if isinstance(image, Image.Image) else picture_of(image)
    try:
        check_shape(picture)
        return to_rgb(picture, decoding)
    except Exception as error:  # of a file that Pillow has open, a decoder may raise anything
        raise UnreadableImageError(f"cannot read the image {name}: {first_line(error)}") from None


def picture_of(image: Any) -> Image.Image:
    """An image of an array, (H, W), (H, W, 1), (H, W, 3) or (H, W, 4), or a tensor with the channels first.

    Values are uint8, or floats in [0, 1], or bool; an (H, W) of uint16 is a deep image.

    Raises:
        UserError: it is neither, or of another shape or another range.
    """
    if isinstance(image, Tensor):
        plain = image.detach().cpu()
        plain = plain.float() if plain.dtype == torch.bfloat16 else plain
        values = (plain.movedim(0, -1) if plain.ndim == 3 else plain).numpy()
    elif isinstance(image, np.ndarray):
        values = image
    else:
        raise UserError(
            f"{type(image).__name__} is no image: give paths, images of Pillow, arrays (H, W, 3) or tensors (3, H, W)."
        )
    values = values[..., 0] if values.ndim == 3 and values.shape[-1] == 1 else values
    if values.ndim not in (2, 3) or not values.size or (values.ndim == 3 and values.shape[-1] not in (3, 4)):
        raise UserError(f"An array is an image as (H, W, 3), a tensor as (3, H, W), and here is {tuple(image.shape)}.")
    if values.dtype.kind == "f":
        if not (np.isfinite(values).all() and values.min() >= 0 and values.max() <= 1):
            raise UserError("An image of floats has values in [0, 1], and this one has others: divide by 255?")
        values = np.rint(values * 255).astype(np.uint8)
    elif values.dtype == bool:
        values = values.astype(np.uint8) * 255
    elif values.dtype != np.uint8 and not (values.dtype == np.uint16 and values.ndim == 2):
        raise UserError(f"An image of integers has uint8 values, and this one {values.dtype}.")
    return Image.fromarray(np.ascontiguousarray(values))
