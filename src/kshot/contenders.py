"""Answers beside each other, on the images that were held out of all of them."""

from __future__ import annotations

import math
from collections.abc import Container, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from kshot.folds import HeldOut
from kshot.judging import best_of

Contenders = Mapping[str, HeldOut]  # by words
LEAD, SPREAD = 0.03, 0.04  # of what goes on from a closed form, over those without text: docs/choosing.md


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


def apart(contenders: Contenders, words: str, other: str) -> tuple[int, int, int]:
    """About how many images one contender alone is right, about how many another one alone, and of how many."""
    logits, label = shared({each: contenders[each] for each in (words, other)})
    ours, theirs = (logits[each].argmax(-1) == label for each in (words, other))
    return int((ours & ~theirs).sum()), int((theirs & ~ours).sum()), len(label)


def clearly(contenders: Contenders, words: str, other: str) -> bool:
    """Whether a contender is better than another by more than one standard deviation of what chance would do.

    Among b + c images about which one of them alone is right, b - c has the deviation ``sqrt(b + c)`` if they are
    equally good (McNemar 1947).
    """
    alone, beaten, _ = apart(contenders, words, other)
    return alone - beaten > math.sqrt(alone + beaten)


def falls_behind(contenders: Contenders, words: str, other: str) -> bool:
    """Whether a contender is behind another one, after all that held-out images say against what is known before.

    Its lead in accuracy is taken for normal, :data:`LEAD` ± :data:`SPREAD` before. n images add ``(b - c) / (n + 2)``
    with the variance ``(b + c + 1) / (n + 2)²``: half an image stands in each cell of the table of both (Agresti and
    Min 2005). More than two standard deviations are no chance, whatever was known.
    """
    alone, beaten, images = apart(contenders, words, other)
    believed = (images + 2) * (beaten - alone) > LEAD / SPREAD**2 * (alone + beaten + 1)
    return believed or beaten - alone > 2 * math.sqrt(alone + beaten)


def of_closed(closed: Contenders, stays: str) -> str:
    """The best of what takes no steps, by words; one of them stays unless the best is clearly better."""
    best = first_of(closed)
    return stays if stays in closed and not clearly(closed, best, stays) else best


def ahead_of(contenders: Contenders, closed: str, trained: Container[str], soft: Container[str]) -> Contenders:
    """What trains and is ahead of the best of what does not, on images held out of both; or that, if nothing is.

    What goes on from a closed form while features change under it (``soft``) is ahead unless it :func:`falls_behind`,
    also of what else trains: few images judge badly.
    """
    best = contenders[closed]
    pairs = {words: {closed: best, words: found} for words, found in contenders.items() if words in trained}
    ahead = {
        words: contenders[words]
        for words, pair in pairs.items()
        if first_of(pair) == words or (words in soft and not falls_behind(pair, words, closed))
    }
    of_soft = {words: found for words, found in ahead.items() if words in soft}
    if of_soft and not falls_behind(ahead, first_of(of_soft), first_of(ahead)):
        return of_soft
    return ahead or {closed: best}


def reason(words: str, logits: Mapping[str, Tensor], label: Tensor) -> tuple[str, Tensor]:
    """Why a contender was taken, in a sentence, and about which images each is right, (contenders, N)."""
    right = torch.stack([each.argmax(-1) == label for each in logits.values()])
    counts = dict(zip(logits, right.sum(1).tolist(), strict=True))
    second = max((other for other in counts if other != words), key=lambda other: counts[other], default=None)
    why = f"{counts[words]} of {len(label)} held-out shots right" + (f" ({second}: {counts[second]})" if second else "")
    return why + (", which is no clear difference" if second and counts[second] > counts[words] else ""), right


def averaged(several: Sequence[HeldOut]) -> HeldOut:
    """The mean probabilities of answers about the same images."""
    logits = torch.stack([each.logits.log_softmax(-1) for each in several]).logsumexp(0) - math.log(len(several))
    return replace(several[0], logits=logits)


def aligned(found: HeldOut, positions: Tensor) -> Tensor:
    """Logits of the images at some positions, in their order."""
    return found.logits[rows_at(found, positions)]


def rows_at(found: HeldOut, positions: Tensor) -> Tensor:
    """The rows of the images at some positions."""
    order = found.index.argsort()
    return order[torch.searchsorted(found.index[order], positions)]
