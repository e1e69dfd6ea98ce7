"""The sections of a report that compare: accuracy against shots, means, differences and ranks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape

import numpy as np

from kshot.seeing.page import table
from kshot.seeing.statistics import holm
from kshot.studies import figures
from kshot.studies.axes import MOST, Drawing, legend, sheet
from kshot.studies.figures import Curve, Strip, curves, strips
from kshot.studies.grid import METRICS, Grid, Ground, baseline_of, common_ground, counted, differences
from kshot.studies.published import published
from kshot.studies.published import table as known
from kshot.studies.statistics import DRAWS, FEWEST_SETS, LEVEL, Paired, mean_interval, paired, ranks, too_few

MAIN, SMALL = (560.0, 360.0), (330.0, 220.0)  # pixels of a panel
MOST_STRIPS = 30  # lines of a figure of intervals
Table = list[list[str]]  # the header first, cells as plain text


@dataclass
class Report:
    """What a report is made of.

    Attributes:
        grid: the runs.
        ground: what most contenders share.
        baseline: whom others are compared with.
        chosen: whether the user named the baseline.
        figures: drawings for files, by name.
        drawn: figures that are SVG already, by name.
        tables: for files, by name.
    """

    grid: Grid
    ground: Ground
    baseline: str
    chosen: bool
    figures: dict[str, Drawing] = field(default_factory=dict)
    drawn: dict[str, str] = field(default_factory=dict)
    tables: dict[str, Table] = field(default_factory=dict)

    @property
    def shown(self) -> list[str]:
        """Contenders with a colour: the best ones, and the baseline."""
        best = self.grid.contenders[:MOST]
        return best if self.baseline in best else [*best[: MOST - 1], self.baseline]

    @property
    def styles(self) -> dict[str, int]:
        """Colours and markers by contender."""
        return {name: i for i, name in enumerate(self.shown)}


def soft(words: str) -> str:
    """A paragraph of small print."""
    return f'<p class="soft">{escape(words)}</p>' if words else ""


def drawn(drawing: Drawing, kind: str = "keep grow") -> str:
    """A figure on a page, under its title where it is one of several."""
    return f'<div class="{kind}">{drawing.svg()}</div>'


def panel(drawing: Drawing) -> str:
    """A figure among others."""
    return f"<figure><figcaption>{escape(drawing.title)}</figcaption>{drawing.svg()}</figure>"


def points_of(grid: Grid, who: str, name: str | None) -> list[figures.Point]:
    """Means and intervals of a contender by shots: on a data set, or on average."""
    found = []
    for k in grid.shots:
        if name is None:
            whole = grid.average(who, k)
            mean, half = (whole.mean, whole.half) if whole else (math.nan, math.nan)
        else:
            values = list(grid.values(who, name, k).values())
            mean, half = mean_interval(values) if values else (math.nan, math.nan)
        if not math.isnan(mean):
            found.append((math.inf if k is None else float(k), float(mean), float(half)))
    return found


def against_shots(report: Report) -> str:
    """Accuracy against shots: on average, then each data set."""
    grid, what = report.grid, METRICS[report.grid.metric]
    names: list[str | None] = [None, *grid.sets] if len(grid.sets) > 1 else list(grid.sets)
    rows, sources = known(), {}
    drawings = []
    for name in names:
        given = []
        for who, style in report.styles.items():
            points, told = points_of(grid, who, name), published(grid, who, name, rows)
            if told:
                sources[who] = told.source
            if points:
                given.append(Curve(who, style, points, told.points if told else []))
        title = f"Mean of {len(grid.sets)} data sets" if name is None else name
        if given:
            first = not drawings
            drawings.append(panel_of(title, given, len(grid.shots) > 1, first, what))
    said = f"{what.capitalize()} with 95 % t-intervals over seeds; lines without bars have one seed."
    if len(grid.contenders) > len(report.shown):
        left = len(grid.contenders) - len(report.shown)
        said += f" Of {len(grid.contenders)} contenders the {len(report.shown)} best are drawn; the tables have {left} more."
    if None in names:
        said += " An average is drawn where a contender has all data sets; its interval is for these data sets."
    main, *others = drawings
    names_drawn = legend(report.shown, MAIN[0])
    report.figures["accuracy"] = main
    if others:
        report.figures["accuracy_by_data_set"] = sheet(what, others, 3, names_drawn if len(grid.shots) > 1 else None)
    by = f'<div class="panels">{"".join(map(panel, others))}</div>' if others else ""
    sourced = "".join(soft(f"Dashed, {who}: {source}.") for who, source in sources.items())
    head = drawn(legend(report.shown, MAIN[0])) if others and len(grid.shots) > 1 else ""
    title = f'<p class="name">{escape(main.title)}</p>'
    return f"<h2>{what[0].upper() + what[1:]} against shots</h2>{title}{drawn(main)}{soft(said)}{sourced}{head}{by}"


def panel_of(title: str, given: Sequence[Curve], lines: bool, main: bool, what: str) -> Drawing:
    """A panel: curves, or intervals below each other where there is one number of shots."""
    if lines:
        return curves(title, given, MAIN if main else SMALL, labels=main)
    rows = [Strip(curve.name, curve.style, *curve.points[0][1:]) for curve in given]
    return strips(title, rows, what, zero=False)


def interval(mean: float, half: float) -> str:
    """A mean in per cent with half its interval."""
    return "" if math.isnan(mean) else f"{100 * mean:.1f}" + ("" if math.isnan(half) else f" ± {100 * half:.1f}")


def means(report: Report) -> str:
    """Tables of means, on average and of each data set."""
    grid = report.grid
    blocks = []
    for name in [None, *grid.sets] if len(grid.sets) > 1 else grid.sets:
        header = ["contender", *("all" if k is None else f"{k}" for k in grid.shots)]
        cells = {who: dict((x, (m, h)) for x, m, h in points_of(grid, who, name)) for who in grid.contenders}
        shots = [math.inf if k is None else float(k) for k in grid.shots]
        best = {k: max((c[k][0] for c in cells.values() if k in c), default=math.nan) for k in shots}
        plain, rich = [header], []
        for who, mine in cells.items():
            words = [interval(*mine.get(k, (math.nan, math.nan))) for k in shots]
            if any(words):
                plain.append([who, *words])
                rich.append(
                    [
                        escape(who),
                        *(
                            cell(word, mine[k][0] == best[k]) if word else "–"
                            for k, word in zip(shots, words, strict=True)
                        ),
                    ]
                )
        title = "Mean of all data sets" if name is None else name
        if len(plain) == 1:
            blocks.append(soft(f"{title}: no contender has all data sets at any number of shots."))
            continue
        report.tables["means" if name is None else f"means_{name}"] = plain
        html = f'<div class="wide">{table([(h, bool(i)) for i, h in enumerate(header)], rich)}</div>'
        first = not blocks
        blocks.append(
            f'<p class="name">{escape(title)}</p>{html}'
            if first
            else f"<details><summary>{escape(title)}</summary>{html}</details>"
        )
    said = (
        f"{METRICS[grid.metric].capitalize()} in %, by images a class: mean ± half the 95 % t-interval over seeds; the "
        "highest mean of a column is bold, which alone does not make it better than the next. A dash: not all runs are there."
    )
    return f"<h2>Means</h2>{soft(said)}{''.join(blocks)}"


def cell(words: str, bold: bool) -> str:
    """A cell with its interval in small."""
    mean, plus, half = words.partition(" ± ")
    return (f"<b>{mean}</b>" if bold else mean) + (f"<small> ±&nbsp;{half}</small>" if plus else "")


def against_baseline(report: Report) -> str:
    """Paired differences to the baseline on identical splits."""
    grid, base = report.grid, report.baseline
    found: dict[str, Paired] = {}
    pairs, apart = {}, 0
    for who in grid.contenders:
        if who != base:
            values, pairs[who], other = differences(grid, base, who)
            apart += other
            if values:
                found[who] = paired(values)
    said = f"Differences from {base}" + (
        "." if report.chosen else ", the best of those that share most runs, itself chosen by these figures."
    )
    said += " In points, on identical splits only (same data set, shots, seed and images), the mean over shots of each seed."
    notes = [said]
    if apart:
        notes.append(f"{apart:,} pairs are left out: their splits differ, or are not told.")
    if not found:
        return f"<h2>Paired differences</h2>{''.join(map(soft, [*notes, 'No two runs share a split.']))}"
    corrected = dict(zip(found, holm([each.p for each in found.values()]), strict=True))
    header = ["contender", "difference", "these data sets", "new data sets", "sets won", "Wilcoxon's p (Holm)", "pairs"]
    rows: Table = []
    for who, each in found.items():
        few = bool(too_few(len(each.sets), len(found)))
        won = sum(mean > 0 for mean, _ in each.sets.values())
        rows.append([
            who, f"{100 * each.mean:+.1f}", span(each.mean - each.half, each.mean + each.half), span(each.low, each.high),
            f"{won} of {len(each.sets)}", "too few" if few else f"{corrected[who]:.3g}", f"{pairs[who]:,}",
        ])  # fmt: skip
    report.tables["differences"] = [header, *rows]
    by_set = [["contender", "data set", "difference", "half a t-interval"]]
    by_set += [
        [who, name, f"{100 * m:+.2f}", number(100 * h)]
        for who, each in found.items()
        for name, (m, h) in each.sets.items()
    ]
    report.tables["differences_by_data_set"] = by_set
    listed = list(found.items())[:MOST_STRIPS]
    lines = [
        Strip(who, report.styles.get(who), each.mean, each.half, None if math.isnan(each.low) else (each.low, each.high),
              [mean for mean, _ in each.sets.values()] if len(each.sets) > 1 else ())
        for who, each in listed
    ]  # fmt: skip
    report.figures["differences"] = figure = strips(
        f"Difference from {base}", lines, f"points above {short_name(base)}", zero=True
    )
    sets = max(len(each.sets) for each in found.values())
    several = "; small ticks below: each data set" if sets > 1 else ""
    wide = f"; thin: bootstrap over data sets and seeds ({DRAWS:,} draws)" if sets >= FEWEST_SETS else ""
    notes.append(
        f"Thick: 95 % t-interval over seeds, for these data sets, not corrected for the number of contenders{wide}{several}."
    )
    if len(found) > len(listed):
        notes.append(f"The figure has the first {len(listed)} of {len(found)} contenders.")
    notes.append(
        too_few(sets, len(found))
        or "Wilcoxon's signed-rank test is over data sets, its p-values corrected for the number of contenders (Holm)."
    )
    clear = [who for who, each in found.items() if each.told]
    verdict = f"On these data sets, the interval leaves 0 out for {', '.join(clear) or 'none'}."
    html = table([(h, bool(i)) for i, h in enumerate(header)], [[escape(word) for word in row] for row in rows])
    return f'<h2>Paired differences</h2>{drawn(figure)}{"".join(map(soft, notes))}<p>{escape(verdict)}</p><div class="wide">{html}</div>'


def short_name(name: str) -> str:
    """A name for an axis."""
    return name if len(name) <= figures.LONGEST else name[: figures.LONGEST - 1] + "…"


def number(value: float) -> str:
    """Two digits after the point; nothing for NaN."""
    return "" if math.isnan(value) else f"{value:.2f}"


def span(low: float, high: float) -> str:
    """An interval in points."""
    return "–" if math.isnan(low) else f"{100 * low:+.1f} to {100 * high:+.1f}"


def ranking(report: Report) -> str:
    """Mean ranks over data sets with their critical distance."""
    grid, ground = report.grid, report.ground
    head, sets = "<h2>Ranks</h2>", list(dict.fromkeys(draw[0] for draw in ground.draws))
    if len(ground.contenders) < 3 or len(sets) < 2:
        have = f"{counted(len(ground.contenders), 'contender')} on {counted(len(sets), 'data set')}"
        return head + soft(f"Ranks take three contenders and two data sets that all of them have; here are {have}.")
    values = np.array([[mean_on(grid, ground, who, name) for who in ground.contenders] for name in sets])
    found = ranks(values)
    report.figures["ranks"] = figure = figures.critical("Mean ranks", ground.contenders, found, report.styles)
    order = np.argsort(found.mean, kind="stable")
    report.tables["ranks"] = [
        ["contender", "mean rank"],
        *([ground.contenders[i], f"{found.mean[i]:.3f}"] for i in order),
    ]
    said = (
        f"Mean ranks over {len(sets)} data sets of the mean over shots and seeds, 1 is best; bars join what Nemenyi's test "
        f"cannot tell apart at 5 %. Friedman's test that all are alike: p = {found.p:.2g}. {ground.sentence()}"
    )
    weak = f" With {len(sets)} data sets this test finds only large differences." if len(sets) < 10 else ""
    if found.p > 1 - LEVEL:
        weak += " As Friedman's test does not tell the contenders apart, the ranks say nothing."
    return head + drawn(figure, "keep wide large") + soft(said + weak)


def mean_on(grid: Grid, ground: Ground, who: str, name: str | None, metric: str = "") -> float:
    """The mean of a contender over the common ground, on a data set or on all (each draw weighs the same)."""
    rows = [grid.runs[who, each, k][seed] for each, k, seed in ground.draws if name in (None, each)]
    values = [row[metric or grid.metric] for row in rows]
    return float(np.mean(values)) if all(isinstance(value, (int, float)) for value in values) else math.nan


def begin(grid: Grid, baseline: str | None) -> Report:
    """A report about a grid, before its sections."""
    ground = common_ground(grid)
    return Report(grid, ground, baseline_of(grid, ground, baseline), baseline is not None)
