"""Figures as SVG, by hand: a page stays small, sharp in print, and follows the colours of a dark screen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

import numpy as np

from kshot.calibration import BINS

MOST_CLASSES = 60  # of a matrix that can be read
NUMBERED = 20  # classes up to which cells have their numbers
STYLE = """
text{font:11px system-ui,sans-serif;fill:var(--ink,#1c1f23)}
.soft{fill:var(--soft,#6a717a)}.line{stroke:var(--line,#c9ced4);fill:none}.good{fill:var(--good,#2166c4)}
.bad{fill:var(--bad,#d4550f)}.dash{stroke:var(--soft,#6a717a);stroke-dasharray:4 4;fill:none}
"""
ALONE = """@media(prefers-color-scheme:dark){svg{--ink:#e7eaee;--soft:#9aa3ad;--line:#434a52;--good:#69a7ff;
--bad:#ff9350;background:#15181b}}"""


def svg(width: float, height: float, body: Sequence[str], title: str) -> str:
    """An SVG of a size in pixels, which scales; its title is what a screen reader says."""
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}" width="{width:g}" '
        f'role="img" aria-label="{escape(title)}"><title>{escape(title)}</title>{"".join(body)}</svg>'
    )


def file_of(figure: str) -> str:
    """A figure as a file of its own, with the styles that a page has once."""
    return figure.replace("</title>", f"</title><style>{STYLE}{ALONE}</style>", 1) + "\n"


def text(x: float, y: float, words: object, anchor: str = "start", more: str = "") -> str:
    """A line of text."""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{more}>{escape(str(words))}</text>'


def short(name: str, most: int = 18) -> str:
    """A name of at most so many characters."""
    return name if len(name) <= most else name[: most - 1] + "…"


def confusion(counts: np.ndarray, names: Sequence[str]) -> tuple[str, str]:
    """Counts of images, (C, C), by what they are (rows) and what they were taken for; and a note on what is left out.

    Of more than :data:`MOST_CLASSES` classes those with the most errors, as what they are or what they are taken for.
    """
    note, kept = "", list(range(len(names)))
    if len(names) > MOST_CLASSES:
        wrong = counts - np.diag(np.diag(counts))
        kept = sorted(np.argsort(-(wrong.sum(0) + wrong.sum(1)), kind="stable")[:MOST_CLASSES].tolist())
        note = f"Of {len(names):,} classes, the {MOST_CLASSES} with the most errors."
    sums = np.maximum(counts.sum(1), 1)
    cell = 30 if len(kept) <= NUMBERED else 13
    size = 11 if cell == 30 else 9
    labels = [short(names[i]) for i in kept]
    left = top = 14 + 0.58 * size * max((len(label) for label in labels), default=0)
    body = [f'<rect class="line" x="{left}" y="{top}" width="{cell * len(kept)}" height="{cell * len(kept)}"/>']
    font = f' style="font-size:{size}px"'
    for i, label in enumerate(labels):
        middle = i * cell + cell / 2
        body.append(text(left - 5, top + middle + size / 3, label, "end", font))
        turned = f' transform="rotate(-90 {left + middle + size / 3:.1f} {top - 5:.1f})"'
        body.append(text(left + middle + size / 3, top - 5, label, "start", font + turned))
    for i, row in enumerate(kept):
        for j, column in enumerate(kept):
            count = int(counts[row, column])
            if not count:
                continue
            share, x, y = count / sums[row], left + j * cell, top + i * cell
            kind = "good" if row == column else "bad"
            opacity = 0.12 + 0.88 * share if row == column else 0.25 + 0.75 * share**0.5
            said = f"{names[row]} taken for {names[column]}: {count} of {sums[row]}"
            body.append(
                f'<rect class="{kind}" x="{x:.1f}" y="{y:.1f}" width="{cell}" height="{cell}" '
                f'fill-opacity="{opacity:.2f}"><title>{escape(said)}</title></rect>'
            )
            if cell == 30:
                colour = ' style="fill:#fff"' if opacity > 0.6 else ""
                body.append(text(x + cell / 2, y + cell / 2 + 4, count, "middle", colour))
    edge = cell * len(kept)
    body.append(text(left + edge / 2, top + edge + 16, "taken for (columns), being (rows)", "middle", ' class="soft"'))
    return svg(left + edge + 8, top + edge + 24, body, "Confusion matrix"), note


def reliability(bins: Sequence[Mapping[str, Any]]) -> str:
    """How often answers are right by how sure they are, over the number of images in each bin.

    ``bins`` are those of result.json: images, their mean confidence and their accuracy.
    """
    left, top, side, low = 62, 12, 260, 60
    images = max((each["images"] for each in bins), default=1)
    body = [f'<rect class="line" x="{left}" y="{top}" width="{side}" height="{side}"/>']
    for tick in range(0, 101, 25):
        at = side * tick / 100
        body.append(text(left - 6, top + side - at + 4, f"{tick} %", "end", ' class="soft"'))
        body.append(text(left + at, top + side + low + 16, f"{tick} %", "middle", ' class="soft"'))
    body.append(f'<path class="dash" d="M{left} {top + side}L{left + side} {top}"/>')
    points = []
    for each in bins:
        x = left + side * min(int(each["confidence"] * BINS), BINS - 1) / BINS
        height, wide = side * each["accuracy"], side / BINS
        said = f"{each['images']} images, {each['confidence']:.1%} sure, {each['accuracy']:.1%} right"
        many = max(1.0, low * each["images"] / images)
        body += [
            f'<rect class="good" fill-opacity=".75" x="{x + 0.75:.1f}" y="{top + side - height:.1f}" '
            f'width="{wide - 1.5:.1f}" height="{height:.1f}"><title>{escape(said)}</title></rect>',
            f'<rect class="soft" x="{x + 0.75:.1f}" y="{top + side + 2}" width="{wide - 1.5:.1f}" '
            f'height="{many:.1f}" fill-opacity=".6"><title>{escape(said)}</title></rect>',
        ]
        points.append((left + side * each["confidence"], top + side - height))
    body += [f'<circle class="bad" cx="{x:.1f}" cy="{y:.1f}" r="3.5"/>' for x, y in points]
    body.append(
        text(left + side / 2, top + side + low + 34, "how sure (bars below: images)", "middle", ' class="soft"')
    )
    turned = f' class="soft" transform="rotate(-90 10 {top + side / 2})"'
    body.append(text(10, top + side / 2, "how often right", "middle", turned))
    return svg(left + side + 20, top + side + low + 42, body, "Reliability diagram")


def colour(label: int, classes: int) -> str:
    """The colour of a class: hues evenly apart, neighbours unlike each other."""
    step = 137.508 if classes > 12 else 360 / max(1, classes)
    return f"hsl({label * step % 360:.0f} 65% {(58, 46)[label % 2]}%)"


def feature_map(places: np.ndarray, label: np.ndarray, right: np.ndarray, names: Sequence[str]) -> str:
    """Images as points, places (N, 2) in [0, 1], coloured by class, (N,) int; a cross where the answer is wrong."""
    side, edge = 460, 12
    body = [f'<rect class="line" x="1" y="1" width="{side - 2}" height="{side - 2}"/>']
    for (x, y), mine, good in zip((edge + places * (side - 2 * edge)).tolist(), label.tolist(), right, strict=True):
        said, hue = f"<title>{escape(names[mine])}</title>", colour(mine, len(names))
        if good:
            body.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{hue}" fill-opacity=".75">{said}</circle>')
        else:
            cross = f"M{x - 4:.1f} {y - 4:.1f}l8 8m0-8l-8 8"
            body.append(f'<path d="{cross}" stroke="{hue}" stroke-width="2.4" fill="none">{said}</path>')
    there = sorted(set(label.tolist()))
    shown = there if len(there) <= 40 else []
    for i, mine in enumerate(shown):
        x, y = 6 + i % 4 * side / 4, side + 16 + i // 4 * 17
        body.append(f'<circle cx="{x + 4:.1f}" cy="{y - 4:.1f}" r="4.5" fill="{colour(mine, len(names))}"/>')
        body.append(text(x + 13, y, short(names[mine], 15)))
    return svg(side, side + 8 + 17 * -(-len(shown) // 4), body, "Feature map")
