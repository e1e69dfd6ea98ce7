"""Answers beside each other, on the images that were held out of all of them."""

from __future__ import annotations

import math
from collections.abc import Container, Mapping

import torch
from torch import Tensor

from kshot.folds import HeldOut
from kshot.judging import best_of

Contenders = Mapping[str, HeldOut]  # by words


def shared(contenders: Contenders) -> tuple[dict[str, Tensor], Tensor]:
    """Logits of contenders about the images that were held out of all of them, and the labels of these."""
    common = torch.tensor(sorted(set.intersection(*(set(f.index.tolist()) for f in contenders.values()))))
    some = next(iter(contenders.values()))
    logits = {words: aligned(found, common) for words, found in contenders.items()}
    return logits, some.label[rows_at(some, common)]


def first_of(contenders: Contenders) -> str:
    """The best of contenders, by words, on the images that were held out of all of them."""
    logits, label = shared(contenders)
    return best_of(logits.items(), label)[0]


def clearly(contenders: Contenders, words: str, other: str) -> bool:
    """Whether a contender is better than another by more than one standard deviation of what chance would do.

    Among b + c images about which one of them alone is right, b - c has the deviation ``sqrt(b + c)`` if they are
    equally good (McNemar 1947).
    """
    logits, label = shared({each: contenders[each] for each in (words, other)})
    ours, theirs = (logits[each].argmax(-1) == label for each in (words, other))
    alone, beaten = int((ours & ~theirs).sum()), int((theirs & ~ours).sum())
    return alone - beaten > math.sqrt(alone + beaten)


def of_closed(closed: Contenders, stays: str) -> str:
    """The best of what takes no steps, by words; one of them stays unless the best is clearly better."""
    best = first_of(closed)
    return stays if stays in closed and not clearly(closed, best, stays) else best


def ahead_of(contenders: Contenders, closed: str, trained: Container[str], soft: Container[str]) -> Contenders:
    """What trains and is ahead of the best of what does not, on images held out of both; or that, if nothing is.

    What goes on from a closed form while features change under it (``soft``) is taken to be ahead unless it is clearly
    behind: few images judge badly, and on most data sets of docs/choosing.md it was ahead.
    """
    best = contenders[closed]
    pairs = {words: {closed: best, words: found} for words, found in contenders.items() if words in trained}
    return {
        words: contenders[words]
        for words, pair in pairs.items()
        if first_of(pair) == words or (words in soft and not clearly(pair, closed, words))
    } or {closed: best}


def aligned(found: HeldOut, positions: Tensor) -> Tensor:
    """Logits of the images at some positions, in their order."""
    return found.logits[rows_at(found, positions)]


def rows_at(found: HeldOut, positions: Tensor) -> Tensor:
    """The rows of the images at some positions."""
    order = found.index.argsort()
    return order[torch.searchsorted(found.index[order], positions)]
