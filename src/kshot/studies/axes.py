"""What the figures of a report share: scales, markers that differ also in grey, and labels that keep apart."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

from kshot.errors import UserError
from kshot.seeing.figures import ALONE, STYLE, svg, text

MOST = 8  # series that can be told apart
COLOURS = ("0b62b8", "c4520a", "12805c", "a4316f", "6b4fb3", "8a6d00", "0f7f93", "4a4f57")
ON_DARK = ("6db3ff", "ff9a57", "4cc79a", "ec86bd", "b39cf5", "d9bb3a", "4fc6db", "b4bac3")
DASHES = ("", "7 3", "2 2", "9 3 2 3", "5 2", "1 3", "12 4", "4 4")
SERIES = (
    "".join(
        f".l{i}{{stroke:var(--s{i},#{hue});fill:none;stroke-width:1.8}}.f{i}{{fill:var(--s{i},#{hue})}}"
        for i, hue in enumerate(COLOURS)
    )
    + ".other{fill:var(--soft,#6a717a)}.lo{stroke:var(--soft,#6a717a);fill:none;stroke-width:1.8}"
    + ".ink{stroke:var(--ink,#1c1f23);fill:none}"
)
LIGHT, DARK = ("".join(f"--s{i}:#{hue};" for i, hue in enumerate(hues)) for hues in (COLOURS, ON_DARK))
HALO = ".halo{paint-order:stroke;stroke:var(--paper,#fff);stroke-width:3px}"  # keeps lines off a name
PAGE = f"""{STYLE}{SERIES}{HALO}@media(prefers-color-scheme:dark){{:root{{{DARK}}}}}@media print{{:root{{{LIGHT}}}}}"""
SOFT = ' class="soft"'


@dataclass(frozen=True)
class Drawing:
    """A figure without its frame, so that several can stand on one sheet.

    Attributes:
        title: what it shows, for those who hear it, and for the name of its panel.
        width, height: in pixels.
        body: elements of SVG.
    """

    title: str
    width: float
    height: float
    body: list[str]

    def svg(self) -> str:
        """As an SVG for a page, which has the styles."""
        return svg(self.width, self.height, self.body, self.title)


def file_of(figure: str) -> str:
    """A figure as a file of its own, with the styles that a page has once."""
    dark = f"@media(prefers-color-scheme:dark){{svg{{{DARK}--paper:#15181b}}}}"
    return figure.replace("</title>", f"</title><style>{STYLE}{SERIES}{HALO}{ALONE}{dark}</style>", 1) + "\n"


def pdf_of(figure: str) -> bytes:
    """A figure as PDF, by svglib and reportlab; raises UserError where they are not installed."""
    try:
        from reportlab.graphics import renderPDF
        from svglib.svglib import svg2rlg
    except ImportError as error:
        raise UserError("without PDF files: they need pip install 'kshot[report]'.") from error
    import io

    styles = f"{STYLE}{SERIES}text{{font-family:Helvetica;font-size:11px}}"
    plain = re.sub(r"var\(--\w+,\s*(#\w+)\)", r"\1", styles).replace("font:11px system-ui,sans-serif;", "")
    drawn = re.sub(r"<title>.*?</title>", "", figure).replace(">", f"><style>{plain}</style>", 1)
    return bytes(renderPDF.drawToString(svg2rlg(io.StringIO(drawn))))


def sheet(title: str, drawings: Sequence[Drawing], columns: int, legend: Drawing | None = None) -> Drawing:
    """Figures of one size beside and below each other, each under its title, below a legend."""
    wide, high = max(d.width for d in drawings), max(d.height for d in drawings) + 22
    columns = min(columns, len(drawings))
    top = legend.height + 6 if legend else 0.0
    body = ['<g transform="translate(8 0)">', *legend.body, "</g>"] if legend else []
    for i, drawing in enumerate(drawings):
        x, y = i % columns * (wide + 16), top + i // columns * high
        body.append(f'<g transform="translate({x:g} {y + 18:g})">')
        body += [text(8, -4, drawing.title, "start", ' style="font-weight:600"'), *drawing.body, "</g>"]
    width = max(columns * (wide + 16) - 16, legend.width + 16 if legend else 0)
    return Drawing(title, width, top + -(-len(drawings) // columns) * high, body)


def legend(names: Sequence[str], width: float) -> Drawing:
    """Names beside their markers, in rows."""
    body, x, y = [], 0.0, 14.0
    for i, name in enumerate(names):
        wide = 44 + width_of(name)
        if x and x + wide > width:
            x, y = 0.0, y + 18
        body += [line(i, [(x, y - 4), (x + 24, y - 4)]), marker(i, x + 12, y - 4), text(x + 30, y, name)]
        x += wide
    return Drawing("Legend", width, y + 6, body)


def swatch(style: int) -> str:
    """The line and the marker of a series, to stand in a line of text."""
    return f'<svg viewBox="0 0 26 12" width="26" height="12" aria-hidden="true">{line(style, [(1, 6), (25, 6)])}' + (
        f"{marker(style, 13, 6)}</svg>"
    )


def width_of(words: str, size: float = 11) -> float:
    """About how wide a line of text is, in pixels."""
    return sum(1.0 if letter.isupper() or ord(letter) > 0x2E80 else 0.56 for letter in words) * size * 0.98


def ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Round numbers in a range, at most so many."""
    if not high > low:
        return [low]
    rough = (high - low) / most
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * m for m in (1, 2, 2.5, 5, 10, 20) if power * m >= rough * 0.999)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]


def percent(value: float) -> str:
    """A tick in per cent."""
    return f"{100 * value:.10g} %"


def scale(low: float, high: float, start: float, end: float) -> Callable[[float], float]:
    """A linear map of [low, high] to pixels."""
    return lambda value: start + (value - low) / ((high - low) or 1) * (end - start)


def kind(style: int | None, what: str) -> str:
    """The class of a line (``l``) or of a filled shape (``f``) of a series; of none of the series, the soft one."""
    return f"{what}{style}" if style is not None else {"l": "lo", "f": "other"}[what]


def line(style: int | None, points: Sequence[tuple[float, float]], more: str = "") -> str:
    """A line in the colour and the dashes of a series."""
    dashes = DASHES[style] if style is not None else ""
    dash = f' stroke-dasharray="{dashes}"' if dashes and not more else ""
    path = "L".join(f"{x:.1f} {y:.1f}" for x, y in points)
    return f'<path class="{kind(style, "l")}" d="M{path}"{dash}{more}/>'


def marker(style: int | None, x: float, y: float, said: str = "", hollow: bool = False) -> str:
    """The marker of a series: a shape of its own, which tells it apart in grey."""
    shapes = (
        "M-4 0a4 4 0 1 0 8 0a4 4 0 1 0 -8 0Z",
        "M-3.6 -3.6H3.6V3.6H-3.6Z",
        "M0 -4.8L4.4 3.4H-4.4Z",
        "M0 -5.2L4.6 0L0 5.2L-4.6 0Z",
        "M0 4.8L4.4 -3.4H-4.4Z",
        "M-1.5 -4.5H1.5V-1.5H4.5V1.5H1.5V4.5H-1.5V1.5H-4.5V-1.5H-1.5Z",
        "M-5 -2H5V2H-5Z",
        "M-2 -5H2V5H-2Z",
    )
    shape = shapes[style] if style is not None else "M-3 0a3 3 0 1 0 6 0a3 3 0 1 0 -6 0Z"
    look = f'class="{kind(style, "l")}" style="stroke-width:1.4"' if hollow else f'class="{kind(style, "f")}"'
    title = f"<title>{escape(said)}</title>" if said else ""
    return f'<path {look} transform="translate({x:.1f} {y:.1f})" d="{shape}">{title}</path>'


def apart(wanted: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Places for labels near the wanted ones, at least a gap apart where the room allows, in the same order."""
    order = sorted(range(len(wanted)), key=wanted.__getitem__)
    gap = min(gap, (high - low) / max(1, len(wanted) - 1))
    blocks: list[list[float]] = []  # middle, and number of labels
    for i in order:
        blocks.append([wanted[i], 1])
        while len(blocks) > 1 and blocks[-1][0] - blocks[-2][0] < gap * (blocks[-1][1] + blocks[-2][1]) / 2:
            middle, n = blocks.pop()
            before, m = blocks.pop()
            half = gap * (n + m - 1) / 2
            joined = (before * m + middle * n) / (m + n)
            blocks.append([min(max(joined, low + half), high - half), m + n])
    places = [middle + gap * (j - (n - 1) / 2) for middle, n in blocks for j in range(int(n))]
    found = [0.0] * len(wanted)
    for i, place in zip(order, places, strict=True):
        found[i] = min(max(place, low), high)
    return found
