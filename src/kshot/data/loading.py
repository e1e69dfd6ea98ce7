"""Data loaders over a part, and who sees which of its images: the order of training, halves, and devices' shares."""

import itertools
import random
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import Any, cast

import torch
from lightning.pytorch import Trainer
from torch import Tensor
from torch.utils.data import DataLoader, Sampler

from kshot.data.parts import Batch, Key, Part
from kshot.errors import UserError, first_line


class EpochSampler(Sampler[Key]):
    """Shuffles without replacement; epoch e depends on the seed and e only, so that a resumed run goes on as before.

    At every step the devices together take the batch that one device with their joint batch size would take. A last
    short one of these is dropped, unless it is the only one, which the devices then share as evenly as it goes.

    A key is a position and the number of a view; 0 ``views`` give a new view in every epoch. ``batch_size`` is that
    of one device.
    """

    def __init__(
        self, positions: Sequence[int], seed: int, views: int, batch_size: int = 1, rank: int = 0, devices: int = 1
    ) -> None:
        self.positions = positions
        self.seed = seed
        self.views = views
        self.epoch = 0
        count, joint = len(positions), batch_size * devices
        self.mine = range(rank, count if count < joint else count - count % joint, devices)

    def set_epoch(self, epoch: int) -> None:  # Lightning calls this by itself
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.mine)

    def __iter__(self) -> Iterator[Key]:
        order = list(self.positions)
        random.Random(f"{self.seed}/{self.epoch}").shuffle(order)
        view = self.epoch % self.views if self.views else self.epoch
        return iter([(order[i], view) for i in self.mine])


class PartLoader(DataLoader[Batch]):
    """A data loader that starts no processes for features, and lets processes share what is decoded once.

    Raises UserError when a process that loads images has died.

    Attributes:
        once: whether the part is gone through once, so that decoded images need not be held.
    """

    once: bool = False

    def __iter__(self) -> Any:
        part = cast(Part, self.dataset)
        if not opens_images(part, self.once):
            self.num_workers = 0
        elif not self.once:
            part.load()
        return _told(part.keeping(super().__iter__()))


def opens_images(part: Part, once: bool) -> bool:
    """Whether a data loader of a part opens images; one that goes through it ``once`` is there to do so."""
    return part.opens_images and (once or not part.idle)


def part_loader(
    part: Part,
    batch_size: int,
    keys: Any,
    workers: int,
    seed: int,
    persistent: bool = False,
    once: bool = False,
) -> DataLoader[Batch]:
    """Makes the data loader of a part that asks for ``keys`` in order, or for a list of lists of them, its batches.

    ``persistent`` processes outlive an epoch.
    """
    workers = workers if opens_images(part, once) else 0
    batches = isinstance(keys, list) and bool(keys) and isinstance(keys[0], list)
    order = {"batch_sampler": keys} if batches else {"batch_size": batch_size, "sampler": keys}
    loader = PartLoader(
        dataset=part,
        **order,  # by keyword: Lightning builds prediction loaders anew from what it sees
        num_workers=workers,
        collate_fn=_as_is,
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator().manual_seed(seed),  # or each epoch draws from the global state
        persistent_workers=persistent and workers > 0,
    )
    loader.once = once
    return loader


def judged_keys(part: Part, positions: Sequence[int], batch_size: int, trainer: Trainer | None) -> list[Any]:
    """The keys of images that are judged by; where some have features, and all are wanted, batches of one kind.

    Where a trainer cuts a part short the order stays: which images are seen must not depend on what is kept.
    """
    keys = [(position, 0) for position in positions]
    if part.known is None or (trainer is not None and repr(trainer.limit_test_batches) != "1.0"):  # 1 is one batch
        return keys
    known = part.known.tolist()
    kinds = ([key for key in keys if known[key[0]] == there] for there in (True, False))
    return [kind[i : i + batch_size] for kind in kinds for i in range(0, len(kind), batch_size)]


def _as_is(batch: Any) -> Any:
    return batch  # parts stack their batches themselves


def _told(batches: Iterator[Batch]) -> Iterator[Batch]:
    try:
        yield from batches
    except (RuntimeError, OSError, EOFError) as error:
        lost = lost_worker(error)
        if lost is None:
            raise
        with suppress(RuntimeError):  # the death may be found before its signal comes, by which torch reports it again
            time.sleep(0.5)
        raise lost from None


def lost_worker(error: Exception) -> UserError | None:
    """Says what it means when a process of a data loader has died; None for an error of another kind.

    Torch reports it where a batch is drawn, and, by the signal of a child that ended, at any other moment; or a tensor
    is asked of a process that is gone.
    """
    reason = first_line(error)
    raised_in_it = reason.startswith("Caught ")
    gone = isinstance(error, ConnectionError | EOFError | FileNotFoundError) and not raised_in_it
    if not gone and not reason.startswith("DataLoader worker"):
        return None
    return UserError(
        f"A process that loads images has died ({reason.rstrip('.')}), most often because memory ran out: set "
        "--data.num_workers 0, or fewer, or free memory."
    )


def share(part: Part, trainer: Trainer | None) -> tuple[int, int]:
    """Gives rank and number of the devices that share a part; raises UserError when they are more than its images."""
    rank, devices = (trainer.global_rank, trainer.world_size) if trainer is not None else (0, 1)
    if len(part) < devices:
        kind = {"train": "training", "val": "validation"}.get(part.name, part.name)
        raise UserError(
            f"{len(part)} {kind} images cannot be shared by {devices} devices: give more images, or set "
            f"--trainer.devices to {max(1, len(part))} or less"
        )
    return rank, devices


def halves(labels: Tensor, class_names: Sequence[str], seed: int) -> tuple[list[int], list[int]]:
    """Divides the positions of labels, (N,), so that each half has half of every class; the first has the odd ones.

    Raises UserError for a class with one image.
    """
    first: list[int] = []
    second: list[int] = []
    for label, name in enumerate(class_names):
        members = (labels == label).nonzero().flatten().tolist()
        if len(members) == 1:
            raise UserError(
                f"The class {name!r} has one training image, and a search needs half of each class to judge by: "
                "use --data.shots 2 or more, or an adapter that searches nothing, such as LoRA."
            )
        random.Random(f"{seed}/halves/{label}").shuffle(members)
        first += members[len(members) // 2 :]
        second += members[: len(members) // 2]
    return first, second


def endless(loader: DataLoader[Batch]) -> Iterator[Batch]:
    """Epoch after epoch, each in an order and with views of its own."""
    for epoch in itertools.count():
        cast(EpochSampler, loader.sampler).set_epoch(epoch)
        yield from loader
