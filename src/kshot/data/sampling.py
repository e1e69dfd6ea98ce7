"""k-shot sampling: pure functions of rows, shots and seed, whatever the state of the global random generators."""

import hashlib
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from kshot.data.splits import Row, Split, display_name
from kshot.errors import UserError, nearest_first

VAL_SHOTS = 4  # CoOp's cap on validation shots


@dataclass(frozen=True)
class FewShotDraw:
    """The images of one run.

    Attributes:
        train: training rows, in the order of drawing.
        val: validation rows.
        shots: training images per class, None for all.
        val_shots: validation images per class, None for all.
        seed: of the draw.
        sampler: name of the rule.
        digest: ``sha256:`` and the digest of ``draw_digest``.
    """

    train: tuple[Row, ...]
    val: tuple[Row, ...]
    shots: int | None
    val_shots: int | None
    seed: int
    sampler: str
    digest: str


Drawn = tuple[list[Row], list[Row]]
Sampler = Callable[[Sequence[Row], Sequence[Row], int, int, int], Drawn]  # train, val, shots, val_shots, seed


def coop_v1(train: Sequence[Row], val: Sequence[Row], shots: int, val_shots: int, seed: int) -> Drawn:
    """Draws as CoOp does: one stream over the classes in order of first appearance, training before validation.

    A class with fewer images gives all of them, and then takes nothing from the stream. Shots are not nested.
    """
    stream = random.Random(seed)

    def of_part(rows: Sequence[Row], count: int) -> list[Row]:
        drawn: list[Row] = []
        for members in _by_label(rows).values():
            drawn += stream.sample(members, count) if len(members) >= count else members
        return drawn

    return of_part(train, shots), of_part(val, val_shots)


def nested(train: Sequence[Row], val: Sequence[Row], shots: int, val_shots: int, seed: int) -> Drawn:
    """Draws the first images of each class's own permutation.

    The 1-shot images are among the 2-shot images, and so on; the images of a class depend on no other class.
    """

    def of_part(part: str, rows: Sequence[Row], count: int) -> list[Row]:
        drawn: list[Row] = []
        for label, members in sorted(_by_label(rows).items()):
            order = list(members)
            random.Random(f"{seed}/{part}/{label}").shuffle(order)
            drawn += order[:count]
        return drawn

    return of_part("train", train, shots), of_part("val", val, val_shots)


SAMPLERS: dict[str, Sampler] = {"coop-v1": coop_v1, "nested": nested}


def draw_digest(train: Sequence[Row], val: Sequence[Row]) -> str:
    """Hashes a draw: SHA-256 over the lines ``part TAB path TAB label LF``, training rows first."""
    lines = [f"{part}\t{row.path}\t{row.label}\n" for part, rows in (("train", train), ("val", val)) for row in rows]
    return "sha256:" + hashlib.sha256("".join(lines).encode()).hexdigest()


def draw(
    split: Split, shots: int | None, seed: int = 1, sampler: str = "coop-v1", allow_fewer: bool = False
) -> FewShotDraw:
    """Draws the training and validation images of a run.

    Args:
        split: where from.
        shots: training images per class, None for all images of both parts. Validation gets at most 4 per class.
        seed: of the draw.
        sampler: a name in ``SAMPLERS``.
        allow_fewer: take all images of a class that has fewer than ``shots``.

    Raises:
        UserError: ``shots`` is below 1, the sampler is unknown, or a class has fewer images than ``shots``.
    """
    if sampler not in SAMPLERS:
        raise UserError(f"unknown sampler {sampler!r}. {nearest_first(sampler, SAMPLERS)}")
    if shots is None:
        digest = draw_digest(split.train, split.val)
        return FewShotDraw(split.train, split.val, None, None, seed, sampler, digest)
    if shots < 1:
        raise UserError(f"shots must be at least 1, or null for all images, not {shots}")
    sizes = {label: len(members) for label, members in _by_label(split.train).items()}
    short = {label: sizes.get(label, 0) for label in range(len(split.class_names)) if sizes.get(label, 0) < shots}
    if short and not allow_fewer:
        shown = ", ".join(f"{display_name(split.class_names[label])!r} has {n}" for label, n in list(short.items())[:5])
        more = f", and {len(short) - 5} more classes have too few" if len(short) > 5 else ""
        raise UserError(
            f"{split.name}: {shots} shots asked for, but {shown}{more}; take what there is with --data.allow_fewer true"
        )
    val_shots = min(shots, VAL_SHOTS)
    train, val = SAMPLERS[sampler](split.train, split.val, shots, val_shots, seed)
    return FewShotDraw(tuple(train), tuple(val), shots, val_shots, seed, sampler, draw_digest(train, val))


def _by_label(rows: Sequence[Row]) -> dict[int, list[Row]]:
    groups: dict[int, list[Row]] = {}
    for row in rows:
        groups.setdefault(row.label, []).append(row)
    return groups
