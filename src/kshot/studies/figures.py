"""The figures of a report: accuracy against shots, differences, ranks, costs, calibration and forecasts."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape

from kshot.seeing.figures import short, text
from kshot.studies.axes import SOFT, Drawing, apart, line, marker, percent, scale, ticks, width_of
from kshot.studies.statistics import Ranks

Point = tuple[float, float, float]  # shots (inf: all images), mean, half an interval (NaN: none)
Forecast = tuple[float, float, float, float, str]  # forecast, low, high, truth, and words for the run
LONGEST = 24  # characters of a contender's name in a figure


@dataclass(frozen=True)
class Curve:
    """A contender in a figure against shots.

    Attributes:
        name: of the contender.
        style: which colour, marker and dashes.
        points: shots, mean and half an interval.
        published: shots and values, drawn dashed with hollow markers.
    """

    name: str
    style: int
    points: list[Point]
    published: list[tuple[float, float]] = field(default_factory=list)


def curves(
    title: str,
    given: Sequence[Curve],
    size: tuple[float, float],
    labels: bool = False,
    bounds: tuple[float, float] | None = None,
) -> Drawing:
    """Values against shots on a logarithmic axis; intervals beyond the axis are cut at its edge.

    With ``labels``, each curve has its name at its end. ``bounds`` of the axis are by default those of the values.
    """
    names = [short(curve.name, LONGEST) for curve in given]
    width, height = size
    left, top, bottom = 46.0, 10.0, 38.0
    right = 12 + (max(map(width_of, names), default=0) + 12 if labels else 0)
    shots = sorted({x for curve in given for x, *_ in (*curve.points, *curve.published)})
    low, high = bounds or limits(given)
    y = scale(low, high, height - bottom, top)
    x = places(shots, left + 14, width - right - 10)
    body = frame(left, top, width - right, height - bottom, low, high, y)
    last = -math.inf
    for k in shots:
        name = "all" if k == math.inf else f"{k:g}"
        if x[k] - last > width_of(name) / 2 + 9:
            body.append(text(x[k], height - bottom + 16, name, "middle", SOFT))
            last = x[k] + width_of(name) / 2
    body.append(text((left + width - right) / 2, height - 6, "images a class", "middle", SOFT))
    for i, curve in enumerate(given):
        shift = (i - (len(given) - 1) / 2) * min(2.4, 18 / max(1, len(given)))
        at = [(x[k] + shift, y(mean)) for k, mean, _ in curve.points]
        if curve.published:
            dashed = [(x[k] + shift, y(value)) for k, value in curve.published]
            body.append(line(curve.style, dashed, ' stroke-dasharray="4 4" stroke-opacity=".7"'))
            body += [
                marker(curve.style, px, py, f"{curve.name}, published: {value:.1%}", hollow=True)
                for (px, py), (_, value) in zip(dashed, curve.published, strict=True)
            ]
        body.append(line(curve.style, at))
        for (px, py), (k, mean, half) in zip(at, curve.points, strict=True):
            if not math.isnan(half):
                body.append(bar(curve.style, px, y(min(mean + half, high)), y(max(mean - half, low))))
            extra = "" if math.isnan(half) else f" ± {half:.1%}"
            body.append(marker(curve.style, px, py, f"{curve.name}, {k:g} shots: {mean:.1%}{extra}"))
    if labels:
        ends = [y(curve.points[-1][1]) for curve in given]
        for curve, name, end, place in zip(given, names, ends, apart(ends, 13, top, height - bottom), strict=True):
            tip = (x[curve.points[-1][0]] + 9, end)
            body.append(
                line(curve.style, [tip, (width - right + 4, place)], ' stroke-opacity=".45" style="stroke-width:1"')
            )
            body.append(text(width - right + 7, place + 4, name, "start", f' class="f{curve.style}"'))
    return Drawing(title, width, height, body)


def bar(style: int | None, x: float, top: float, bottom: float) -> str:
    """The bar of an interval."""
    return line(style, [(x, top), (x, bottom)], ' stroke-opacity=".55" style="stroke-width:1.3"')


def limits(given: Sequence[Curve]) -> tuple[float, float]:
    """The range of an axis: all means, and intervals as far as they do not more than double it."""
    means = [y for curve in given for _, y, _ in curve.points] + [y for c in given for _, y in c.published]
    low, high = min(means), max(means)
    room = max((high - low) / 2, 0.02)
    ends = [(m - h, m + h) for curve in given for _, m, h in curve.points if not math.isnan(h)]
    low = max(low - room, min([low, *(end for end, _ in ends)])) - 0.006
    high = min(high + room, max([high, *(end for _, end in ends)])) + 0.006
    return max(low, 0.0), min(high, 1.0) if max(means) <= 1 else high


def places(shots: Sequence[float], start: float, end: float) -> dict[float, float]:
    """Where shots lie, by their logarithm; all images one doubling further."""
    known = [math.log2(k) for k in shots if 0 < k < math.inf]
    beyond = max(known, default=0.0) + 1
    at = {k: math.log2(k) if 0 < k < math.inf else beyond for k in shots}
    low, high = min(at.values(), default=0), max(at.values(), default=0)
    if low == high:
        return dict.fromkeys(at, (start + end) / 2)
    to = scale(low, high, start, end)
    return {k: to(value) for k, value in at.items()}


def frame(left: float, top: float, right: float, bottom: float, low: float, high: float, y: object) -> list[str]:
    """Lines across a figure at round values, with their numbers."""
    assert callable(y)
    body = []
    for tick in ticks(low, high, max(3, int((bottom - top) / 32))):
        body.append(f'<path class="line" d="M{left:g} {y(tick):.1f}H{right:.1f}"/>')
        body.append(text(left - 6, y(tick) + 4, percent(tick), "end", SOFT))
    return body


@dataclass(frozen=True)
class Strip:
    """A line of a figure of intervals.

    Attributes:
        name: of the contender.
        style: its colour and marker; None beyond those that have one.
        mean: what is shown.
        half: half the t-interval over seeds, thick; NaN: none.
        wide: the interval for new data sets, thin; None: none.
        dots: each data set's, as ticks.
    """

    name: str
    style: int | None
    mean: float
    half: float = math.nan
    wide: tuple[float, float] | None = None
    dots: Sequence[float] = ()


def strips(title: str, given: Sequence[Strip], axis: str, zero: bool) -> Drawing:
    """Intervals below each other; with ``zero``, differences in points about a line at 0.

    Without, the axis is as wide as the means need, or twice that, and intervals beyond it are cut.
    """
    names = [short(strip.name, LONGEST) for strip in given]
    width, row, top = 430.0, 24.0, 8.0
    left, right = max(map(width_of, names)) + 14, width - 16
    ends = [strip.mean for strip in given] + [0.0] * zero + [dot for strip in given for dot in strip.dots]
    low, high = min(ends), max(ends)
    room = max(high - low, 0.02) / 2
    far = [v for s in given for v in (*(s.wide or ()), s.mean - s.half, s.mean + s.half) if not math.isnan(v)]
    low, high = max(low - room, min([low, *far])) - 0.004, min(high + room, max([high, *far])) + 0.004
    x, bottom = scale(low, high, left, right), top + row * len(given)
    body = []
    for tick in ticks(low, high, 6):
        style = "dash" if zero and tick == 0 else "line"
        body.append(f'<path class="{style}" d="M{x(tick):.1f} {top}V{bottom}"/>')
        body.append(text(x(tick), bottom + 15, points(tick) if zero else percent(tick), "middle", SOFT))
    for i, (strip, name) in enumerate(zip(given, names, strict=True)):
        y = top + row * (i + 0.5)
        body.append(text(left - 10, y + 4, name, "end"))
        body += [f'<path class="lo" style="stroke-width:1" d="M{x(dot):.1f} {y + 4:.1f}v6"/>' for dot in strip.dots]
        for (start, end), thick in (
            (strip.wide or (math.nan,) * 2, 1.2),
            ((strip.mean - strip.half, strip.mean + strip.half), 4),
        ):
            if not math.isnan(start):
                span = [(x(min(max(end_, low), high)), y) for end_ in (start, end)]
                look = f' stroke-opacity="{0.4 if thick > 2 else 0.9}" style="stroke-width:{thick}"'
                body.append(line(strip.style, span, look))
        said = f"{strip.name}: {100 * strip.mean:+z.1f} points" if zero else f"{strip.name}: {strip.mean:.1%}"
        body.append(marker(strip.style, x(strip.mean), y, said))
    body.append(text((left + right) / 2, bottom + 32, axis, "middle", SOFT))
    return Drawing(title, width, bottom + 40, body)


def points(value: float) -> str:
    """A tick of differences."""
    return f"{100 * value:+.10g}" if value else "0"


def critical(title: str, names: Sequence[str], found: Ranks, styles: Mapping[str, int]) -> Drawing:
    """Mean ranks on a line, best left; bars join those that cannot be told apart (Demšar 2006, figure 1)."""
    order = sorted(range(len(names)), key=lambda i: found.mean[i])
    half = -(-len(order) // 2)
    longest = max(width_of(short(name, LONGEST)) + 34 for name in names)
    width, axis = 2 * longest + 240, 50.0
    x = scale(1, len(names), longest + 10, width - longest - 10)
    bars = axis + 14 + 9 * len(found.groups)
    body = [f'<path class="ink" d="M{x(1):.1f} {axis}H{x(len(names)):.1f}"/>']
    for rank in range(1, len(names) + 1):
        body.append(f'<path class="ink" d="M{x(rank):.1f} {axis}v-5"/>')
        if len(names) <= 12 or rank % 2:
            body.append(text(x(rank), axis - 9, rank, "middle", SOFT))
    span = min(x(1 + found.distance), width - 4)
    body.append(f'<path class="ink" d="M{x(1):.1f} 19v-6v3H{span:.1f}v-3v6"/>')
    body.append(text(x(1), 10, f"critical distance {found.distance:.2f} ranks", "start", SOFT))
    for i, group in enumerate(found.groups):
        ends = [x(found.mean[j]) for j in (group[0], group[-1])]
        y = axis + 11 + 9 * i
        body.append(f'<path class="ink" style="stroke-width:3.5" d="M{ends[0] - 3:.1f} {y}H{ends[1] + 3:.1f}"/>')
    for place, i in enumerate(order):
        first = place < half
        y = bars + 18 * ((place if first else len(order) - 1 - place) + 1)
        end, side = (longest, "end") if first else (width - longest, "start")
        at, mean = x(found.mean[i]), f"{found.mean[i]:.2f}"
        body.append(f'<path class="line" d="M{at:.1f} {axis}V{y:.1f}H{end:.1f}"/>')
        style = f' class="f{styles[names[i]]}"' if names[i] in styles else ""
        name = short(names[i], LONGEST)
        said = f"{name}  {mean}" if first else f"{mean}  {name}"
        body.append(text(end - 4 if first else end + 4, y + 4, said, side, style))
    return Drawing(title, width, bars + 18 * half + 14, body)


def front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Which points no other beats in cost (less) and value (more) at once, the cheapest first."""
    best, found = -math.inf, []
    for i in sorted(range(len(points)), key=lambda i: (points[i][0], -points[i][1])):
        if points[i][1] > best:
            best = points[i][1]
            found.append(i)
    return found


def costs(
    title: str, names: Sequence[str], points: Sequence[tuple[float, float]], axis: str, styles: Mapping[str, int]
) -> Drawing:
    """Value against a cost on a logarithmic axis, zero left of a gap, with the Pareto front as a stair."""
    width, height, left, top, bottom = 380.0, 270.0, 46.0, 12.0, 40.0
    right = width - 14
    paid = [cost for cost, _ in points if cost > 0]
    free = len(paid) < len(points)
    low, high = (math.log10(min(paid)), math.log10(max(paid))) if paid else (0.0, 1.0)
    low, high = (low - 0.5, high + 0.5) if high - low < 1 else (low - 0.15, high + 0.15)
    start = left + (44 if free else 6)
    to, values = scale(low, high, start + 10, right), [value for _, value in points]
    spread = max(max(values) - min(values), 0.01)
    bounds = max(0.0, min(values) - spread * 0.12), max(values) + spread * 0.12
    y = scale(*bounds, height - bottom, top)
    body = frame(left, top, right, height - bottom, *bounds, y)
    at = [(to(math.log10(cost)) if cost > 0 else left + 18, y(value)) for cost, value in points]
    for power in range(math.ceil(low), math.floor(high) + 1):
        step = max(1, round((high - low) / 5))
        if paid and power % step == 0:
            body.append(text(to(power), height - bottom + 16, power_of_ten(power), "middle", SOFT))
            body.append(f'<path class="line" d="M{to(power):.1f} {height - bottom}v-5"/>')
    if free:
        body.append(text(left + 18, height - bottom + 16, "0", "middle", SOFT))
        body.append(f'<path class="dash" d="M{start - 4:.1f} {top}V{height - bottom}"/>')
    best = front(points)
    stair = "".join(f"H{at[i][0]:.1f}V{at[i][1]:.1f}" for i in best[1:])
    body.append(
        f'<path class="lo" style="stroke-width:1.2" d="M{at[best[0]][0]:.1f} {at[best[0]][1]:.1f}{stair}H{right}"/>'
    )
    for name, (cost, value), (px, py) in zip(names, points, at, strict=True):
        body.append(marker(styles.get(name), px, py, f"{name}: {value:.1%} at {cost:,.4g} {axis}"))
    body += named([short(name, LONGEST) for name in names], at, best, (left, right, top, height - bottom))
    body.append(text((left + right) / 2, height - 6, axis, "middle", SOFT))
    return Drawing(title, width, height, body)


def power_of_ten(power: int) -> str:
    """A tick of a logarithmic axis."""
    units = {0: "", 3: " k", 6: " M", 9: " G"}
    if -3 <= power < 12:
        base = max(0, power // 3 * 3)
        return f"{10.0 ** (power - base):g}{units[base]}"
    return f"1e{power}"


def named(
    names: Sequence[str],
    at: Sequence[tuple[float, float]],
    first: Sequence[int],
    box: tuple[float, float, float, float],
) -> list[str]:
    """Names beside points, those of the front first, where they hide neither a point nor a name; else none."""
    left, right, top, bottom = box
    taken = [(x - 5, y - 5, x + 5, y + 5) for x, y in at]
    body = []
    for i in [*first, *(i for i in range(len(names)) if i not in first)]:
        (x, y), wide = at[i], width_of(names[i])
        for dx, dy, anchor in (
            (8, 4, "start"),
            (-8, 4, "end"),
            (0, -9, "middle"),
            (0, 16, "middle"),
            (8, -7, "start"),
            (-8, -7, "end"),
            (8, 15, "start"),
            (-8, 15, "end"),
        ):
            begin = x + dx - {"start": 0, "middle": wide / 2, "end": wide}[anchor]
            mine = (begin, y + dy - 9, begin + wide, y + dy + 2)
            inside = mine[0] >= left and mine[2] <= right + 10 and mine[1] >= top - 10 and mine[3] <= bottom
            if inside and not any(overlap(mine, other) for j, other in enumerate(taken) if j != i):
                taken.append(mine)
                body.append(text(x + dx, y + dy, names[i], anchor, ' class="halo"'))
                break
    return body


def overlap(a: tuple[float, float, float, float], b: tuple[float, float, float, float]) -> bool:
    """Whether two boxes share a point."""
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def forecasts(title: str, given: Sequence[Forecast]) -> Drawing:
    """Truth against what was forecast, with its interval; a cross where it does not hold the truth."""
    left, top, side = 62.0, 10.0, 300.0
    low = max(0.0, min(min(f, truth) for f, _, _, truth, _ in given) - 0.03)
    high = min(1.0, max(max(f, truth) for f, _, _, truth, _ in given) + 0.03)
    x, y = scale(low, high, left, left + side), scale(low, high, top + side, top)
    body = frame(left, top, left + side, top + side, low, high, y)
    body += [text(x(tick), top + side + 16, percent(tick), "middle", SOFT) for tick in ticks(low, high, 6)]
    body.append(f'<path class="dash" d="M{left} {top + side}L{left + side} {top}"/>')
    faint = max(0.15, min(0.7, 20 / len(given)))
    for middle, start, end, truth, words in given:
        held = start <= truth <= end
        ends = [(x(max(start, low)), y(truth)), (x(min(end, high)), y(truth))]
        shown = f' stroke-opacity="{faint:.2f}" style="stroke-width:1.2"'
        body.append(line(0 if held else 1, ends, shown))
        said = f"{words}: forecast {middle:.1%} ({start:.1%} to {end:.1%}), was {truth:.1%}"
        if held:
            body.append(f'<circle class="f0" fill-opacity=".7" cx="{x(middle):.1f}" cy="{y(truth):.1f}" r="2.6">')
        else:
            body.append(f'<path class="l1" d="M{x(middle) - 3:.1f} {y(truth) - 3:.1f}l6 6m0-6l-6 6">')
        body.append(f"<title>{escape(said)}</title>{'</circle>' if held else '</path>'}")
    body.append(text(left + side / 2, top + side + 34, "forecast from the shots", "middle", SOFT))
    turned = f'{SOFT} transform="rotate(-90 10 {top + side / 2})"'
    body.append(text(10, top + side / 2, "measured on test images", "middle", turned))
    return Drawing(title, left + side + 16, top + side + 42, body)
