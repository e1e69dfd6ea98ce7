"""k-shot sampling: pure functions of rows, shots and seed, whatever the state of the global random generators."""

import hashlib
import math
import random
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction
from typing import Literal

from kshot.data.splits import Row, Split, by_label, display_name
from kshot.errors import UserError, nearest_first

VAL_SHOTS = 4  # CoOp's cap on validation shots


@dataclass(frozen=True)
class FewShotDraw:
    """The images of one run: rows in the order of drawing, and the ``draw_digest`` of these.

    ``shots`` and ``val_shots`` are training and validation images per class, None for all.
    """

    train: tuple[Row, ...]
    val: tuple[Row, ...]
    shots: int | None
    val_shots: int | None
    seed: int
    sampler: str
    digest: str


Asked = int | Fraction  # so many images of every class, or that share of it


@dataclass(frozen=True)
class Sampler:
    """A rule for drawing.

    By default it is CoOp's: one stream over the parts, and in each over the classes in order of first appearance. A
    class with fewer images gives all of them, and then takes nothing from the stream.

    Attributes:
        nested: draw the first images of each class's own permutation instead, which depends on no other class.
        val_shots: validation images per class at so many training images; None for the whole part.
        order: in which the parts are drawn.
        val_part: the part of the split that validation images are drawn from; of train, those left over.
    """

    nested: bool = False
    val_shots: Callable[[Asked], Asked | None] = lambda asked: min(asked, VAL_SHOTS)
    order: tuple[str, str] = ("train", "val")
    val_part: Literal["train", "val"] = "val"

    def __call__(self, train: Sequence[Row], val: Sequence[Row], asked: Asked, seed: int) -> dict[str, list[Row]]:
        """Draws training images as asked for, and what belongs to them for validation."""
        drawn = {"train": list(train), "val": list(val)}
        stream = random.Random(seed)
        for part in self.order:
            if part == "val" and self.val_part == "train":
                taken = set(drawn["train"])
                drawn["val"] = [row for row in train if row not in taken]
            count = asked if part == "train" else self.val_shots(asked)
            if count is not None:
                drawn[part] = self._chosen(drawn[part], count, stream, f"{seed}/{part}")
        return drawn

    def _chosen(self, rows: list[Row], asked: Asked, stream: random.Random, key: str) -> list[Row]:
        chosen: list[int] = []
        groups = by_label(rows)
        for label, members in sorted(groups.items()) if self.nested else groups.items():
            count = asked if isinstance(asked, int) else max(1, math.floor(asked * len(members) + Fraction(1, 2)))
            if self.nested:
                random.Random(f"{key}/{label}").shuffle(members)
                chosen += members[:count]
            else:
                chosen += stream.sample(members, count) if len(members) >= count else members
        return [rows[position] for position in chosen]


SAMPLERS = {
    "coop-v1": Sampler(),
    "coop-v1+val": Sampler(val_part="train"),  # for a data set without a validation part
    "nested": Sampler(nested=True),
    # One seed, but other images than CoOp's: arXiv 2405.18541 draws the validation images first.
    "cliplora": Sampler(order=("val", "train")),
    "lpp": Sampler(val_shots=lambda asked: asked),  # LP++, arXiv 2404.02285
    "tip": Sampler(val_shots=lambda _: None),  # Tip-Adapter, arXiv 2207.09519
}
PERCENT = Sampler(nested=True, val_shots=lambda asked: asked)  # percent:P, as in RandLoRA, arXiv 2502.00987


def draw_digest(train: Sequence[Row], val: Sequence[Row]) -> str:
    """Hashes a draw: SHA-256 over the lines ``part TAB path TAB label LF``, training rows first."""
    lines = [f"{part}\t{row.path}\t{row.label}\n" for part, rows in (("train", train), ("val", val)) for row in rows]
    return "sha256:" + hashlib.sha256("".join(lines).encode()).hexdigest()


def draw(
    split: Split, shots: int | None, seed: int = 1, sampler: str = "coop-v1", allow_fewer: bool = False
) -> FewShotDraw:
    """Draws the training and validation images of a run.

    Without ``shots`` these are all images of both parts, or P % of the images of every class, rounded, at least one, by
    the sampler percent:P. With ``allow_fewer`` a class that has fewer than ``shots`` gives all that it has. Raises
    UserError when ``shots`` is below 1, too many, or given with a percentage, or the sampler is unknown.
    """
    asked: Asked | None = shots
    if sampler.startswith("percent"):
        sampler, asked = _percentage(sampler)
        if shots is not None:
            raise UserError(f"sampler {sampler} takes a share of every class, not {shots} shots: set --data.shots null")
    elif sampler not in SAMPLERS:
        raise UserError(f"unknown sampler {sampler!r}. {nearest_first(sampler, [*SAMPLERS, 'percent:50'])}")
    elif shots is not None:
        _check_shots(split, shots, allow_fewer)
    train, val, wanted = split.train, split.val, None
    if asked is not None:
        rule = SAMPLERS.get(sampler, PERCENT)
        drawn, wanted = rule(split.train, split.val, asked, seed), rule.val_shots(asked)
        train, val = tuple(drawn["train"]), tuple(drawn["val"])
    val_shots = wanted if isinstance(wanted, int) else None
    return FewShotDraw(train, val, shots, val_shots, seed, sampler, draw_digest(train, val))


def _percentage(sampler: str) -> tuple[str, Fraction]:
    number = re.fullmatch(r"percent:([0-9]+(?:\.[0-9]+)?)", sampler)
    percent = Decimal(number[1]).normalize() if number else Decimal(0)
    if not 0 < percent <= 100:
        raise UserError(f"sampler {sampler!r}: percent: is followed by a number above 0, up to 100, as in percent:12.5")
    return f"percent:{percent:f}", Fraction(percent) / 100  # 50.0 is the same draw as 50, and so the same name


def _check_shots(split: Split, shots: int, allow_fewer: bool) -> None:
    if shots < 1:
        raise UserError(f"shots must be at least 1, or null for all images, not {shots}")
    sizes = Counter(row.label for row in split.train)
    short = [f"{display_name(n)!r} has {sizes[i]}" for i, n in enumerate(split.class_names) if sizes[i] < shots]
    if short and not allow_fewer:
        more = f", and {len(short) - 5} more classes have too few" if len(short) > 5 else ""
        raise UserError(
            f"{split.name}: {shots} shots asked for, but {', '.join(short[:5])}{more}; take what there is with "
            "--data.allow_fewer true"
        )
