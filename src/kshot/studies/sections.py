"""The sections of a report that compare: accuracy against shots, means, differences and ranks."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from typing import Any

import numpy as np

from kshot.seeing import page
from kshot.seeing.figures import short
from kshot.seeing.statistics import holm
from kshot.studies import figures
from kshot.studies.axes import MOST, Drawing, legend, sheet, swatch
from kshot.studies.figures import Curve, Strip, curves, strips
from kshot.studies.grid import METRICS, Grid, Ground, baseline_of, common_ground, counted, differences, mean_on
from kshot.studies.published import known, published
from kshot.studies.statistics import DRAWS, FEWEST_SETS, LEVEL, Paired, mean_interval, paired, ranks, too_few
from kshot.studies.tables import Table, Text

MAIN, SMALL = (460.0, 310.0), (330.0, 220.0)  # pixels of a panel
MOST_STRIPS = 30  # lines of a figure of intervals


@dataclass
class Report:
    """What a report is made of; its sections add the files.

    Attributes:
        grid: the runs.
        ground: what most contenders share.
        baseline: whom others are compared with.
        chosen: whether the user named the baseline.
        figures: SVG by the name of its file.
        tables: likewise.
    """

    grid: Grid
    ground: Ground
    baseline: str
    chosen: bool
    figures: dict[str, str] = field(default_factory=dict)
    tables: dict[str, Table] = field(default_factory=dict)

    @property
    def styles(self) -> dict[str, int]:
        """Colours and markers: of the best that share most runs, then of others, and always of the baseline."""
        others = [who for who in self.grid.contenders if who not in self.ground.contenders]
        best = [*self.ground.contenders, *others][:MOST]
        shown = best if self.baseline in best else [*best[:-1], self.baseline]
        return {who: i for i, who in enumerate(shown)}

    def drawn(self, name: str, drawing: Drawing, kind: str = "keep grow") -> str:
        """Keeps a figure as a file, and gives it for a page."""
        self.figures[name] = drawing.svg()
        return f'<div class="{kind}" style="max-width:{1.2 * drawing.width:.0f}px">{self.figures[name]}</div>'

    def panels(self, name: str, title: str, drawings: Sequence[Drawing], columns: int, names: bool = True) -> str:
        """Keeps figures as one file, and gives them for a page one by one, below the names of the contenders."""
        over = legend(list(self.styles), MAIN[0]) if names else None
        self.figures[name] = sheet(title, drawings, columns, over).svg()
        each = (f"<figure><figcaption>{escape(d.title)}</figcaption>{d.svg()}</figure>" for d in drawings)
        return f'{self.legend() if names else ""}<div class="panels">{"".join(each)}</div>'

    def legend(self) -> str:
        """The names of contenders beside their markers."""
        each = (f"<span>{swatch(style)} {escape(who)}</span>" for who, style in self.styles.items())
        return f'<p class="legend">{"".join(each)}</p>'

    def tabled(self, name: str, table: Table) -> str:
        """Keeps a table as files, and gives it for a page."""
        self.tables[name] = table
        header = [(words, i >= table.left) for i, words in enumerate(table.read_header)]
        return f'<div class="wide">{page.table(header, [[cell(text) for text in row] for row in table.read])}</div>'


def begin(grid: Grid, baseline: str | None) -> Report:
    """A report about a grid, before its sections; raises UserError where there is no such baseline."""
    ground = common_ground(grid)
    return Report(grid, ground, baseline_of(grid, ground, baseline), baseline is not None)


def soft(words: str) -> str:
    """A paragraph of small print."""
    return f'<p class="soft">{escape(words)}</p>' if words else ""


def cell(text: Text) -> str:
    """A cell on a page, its interval in small; names break at underscores."""
    mean, plus, half = escape(text.words).replace("_", "_<wbr>").partition(" ± ")
    return (f"<b>{mean}</b>" if text.bold else mean) + (f"<small> ±&nbsp;{half}</small>" if plus else "")


def texts(words: Iterable[str]) -> list[Text]:
    """Cells to be read."""
    return [Text(each) for each in words]


def points_of(grid: Grid, who: str, name: str | None) -> list[figures.Point]:
    """Means and intervals of a contender by shots: on a data set, or on the average of all for None."""
    found = []
    for k in grid.shots:
        if name is None:
            whole = grid.average(who, k)
            mean, half = (whole.mean, whole.half) if whole else (math.nan, math.nan)
        else:
            mean, half = mean_interval(list(grid.values(who, name, k).values()) or [math.nan])
        if not math.isnan(mean):
            found.append((math.inf if k is None else float(k), float(mean), float(half)))
    return found


def against_shots(report: Report) -> str:
    """Accuracy against shots: on average, then on each data set."""
    grid, what, lines = report.grid, METRICS[report.grid.metric], len(report.grid.shots) > 1
    names: list[str | None] = [None, *grid.sets] if len(grid.sets) > 1 else list(grid.sets)
    drawings: list[Drawing] = []
    sources: dict[str, str] = {}
    for name in names:
        given = []
        for who, style in report.styles.items():
            points, told = points_of(grid, who, name), published(grid, who, name, known())
            if points:
                given.append(Curve(who, style, points, told.points if told else []))
                sources |= {who: told.source} if told else {}
        title = f"Mean of {len(grid.sets)} data sets" if name is None else name
        if given and lines:
            drawings.append(curves(title, given, SMALL if drawings else MAIN, labels=not drawings))
        elif given:
            drawings.append(strips(title, [Strip(c.name, c.style, *c.points[0][1:]) for c in given], what, zero=False))
    said = f"{what.capitalize()} with 95 % t-intervals over seeds, cut at the edge of a panel; one seed has none."
    if len(grid.contenders) > len(report.styles):
        said += f" The figures have {len(report.styles)} of {len(grid.contenders)} contenders, the tables all."
    if None in names:
        said += " The mean is of contenders that have all data sets, over seeds that all sets have; "
        said += "its interval is for these data sets."
    main, *others = drawings
    head = f'<p class="name">{escape(main.title)}</p>{report.drawn("accuracy", main)}'
    notes = soft(said) + "".join(soft(f"Dashed, {who}: {source}.") for who, source in sources.items())
    by = report.panels("accuracy_by_data_set", what, others, 3, lines) if others else ""
    title = f"<h2>{escape(what[0].upper() + what[1:])} against shots</h2>"
    return f'{title}<div class="two"><div>{head}</div><div>{notes}</div></div>{by}'


def interval(mean: float, half: float) -> str:
    """A mean in per cent with half its interval."""
    return f"{100 * mean:.1f}" + ("" if math.isnan(half) else f" ± {100 * half:.1f}")


def means(report: Report) -> str:
    """Tables of means, on average and on each data set."""
    grid, blocks = report.grid, []
    shots = [math.inf if k is None else float(k) for k in grid.shots]
    header = ["all" if k is None else str(k) for k in grid.shots]
    for name in [None, *grid.sets] if len(grid.sets) > 1 else grid.sets:
        cells = {who: {k: (m, h) for k, m, h in points_of(grid, who, name)} for who in grid.contenders}
        cells = {who: mine for who, mine in cells.items() if mine}
        best = {k: max((mine[k][0] for mine in cells.values() if k in mine), default=math.nan) for k in shots}
        title = "Mean of all data sets" if name is None else name
        if not cells:
            blocks.append(soft(f"{title}: no contender has all data sets at any number of shots."))
            continue
        values: list[list[Any]] = []
        read = []
        for who, mine in cells.items():
            values.append([who, *(plain(each) for k in shots for each in mine.get(k, (math.nan, math.nan)))])
            told = (Text(interval(*mine[k]), mine[k][0] == best[k]) if k in mine else Text("–") for k in shots)
            read.append([Text(who), *told])
        columns = ["contender", *(f"{k} shots{half}" for k in header for half in ("", ", half the interval"))]
        table = Table(columns, values, ["contender", *header], read)
        html = report.tabled("means" if name is None else f"means_{name}", table)
        folded = f"<details><summary>{escape(title)}</summary>{html}</details>"
        blocks.append(folded if blocks else f'<p class="name">{escape(title)}</p>{html}')
    said = (
        f"{METRICS[grid.metric].capitalize()} in %, by images a class: mean ± half the 95 % t-interval over seeds. The "
        "highest mean of a column is bold, which alone does not make it better than the next. A dash: runs are missing."
    )
    return f"<h2>Means</h2>{soft(said)}{''.join(blocks)}"


def plain(value: float) -> float | None:
    """A number for a file; None for NaN."""
    return None if math.isnan(value) else value


def against_baseline(report: Report) -> str:
    """Paired differences from the baseline on identical splits."""
    grid, base = report.grid, report.baseline
    found: dict[str, Paired] = {}
    pairs, unlike = {}, 0
    for who in grid.contenders:
        if who != base:
            values, pairs[who], others = differences(grid, base, who)
            unlike += others
            found |= {who: paired(values)} if values else {}
    head = "<h2>Paired differences</h2>"
    if len(grid.contenders) == 1:
        return head + soft("There is one contender.")
    by = (
        ""
        if report.chosen
        else ", the best of those that share most runs: chosen by these same figures, which favours it"
    )
    notes = [
        f"Differences from {base}{by}. In points, on identical splits only (data set, shots, seed and images are the "
        "same), each the mean over the shots of a seed."
    ]
    if unlike:
        notes.append(f"{unlike:,} pairs are left out: their splits differ or are not told.")
    if not found:
        return head + "".join(map(soft, [*notes, "No two runs share a split."]))
    sets = max(len(each.sets) for each in found.values())
    listed = list(found.items())[:MOST_STRIPS]
    given = [
        Strip(who, report.styles.get(who), each.mean, each.half, told_span(each.low, each.high), dots_of(each))
        for who, each in listed
    ]
    figure = report.drawn("differences", strips(f"Difference from {base}", given, f"points above {short(base)}", True))
    thin = f"; thin: bootstrap over data sets and seeds ({DRAWS:,} draws)" if sets >= FEWEST_SETS else ""
    ticks = "; small ticks: each data set" if sets > 1 else ""
    notes.append(f"Thick: 95 % t-interval over seeds, for these data sets, one contender at a time{thin}{ticks}.")
    if len(found) > len(listed):
        notes.append(f"The figure has the first {len(listed)} of {len(found)} contenders.")
    weak = too_few(sets, len(found))
    notes.append(weak or "Wilcoxon's p is over data sets, corrected for the number of contenders (Holm).")
    clear = [who for who, each in found.items() if each.told]
    verdict = f"<p>On these data sets, the t-interval leaves 0 out for {escape(', '.join(clear)) or 'none'}.</p>"
    table = report.tabled("differences", differences_table(found, pairs, sets))
    by_set: list[list[Any]] = [
        [who, name, mean, plain(half)] for who, each in found.items() for name, (mean, half) in each.sets.items()
    ]
    read = [texts((who, name, f"{100 * m:+z.1f}" + (f" ± {100 * h:.1f}" if h else ""))) for who, name, m, h in by_set]
    columns = ["contender", "data set", "difference"]
    report.tables["differences_by_data_set"] = Table([*columns, "half the interval"], by_set, columns, read, 2)
    return f'{head}<div class="two"><div>{figure}</div><div>{"".join(map(soft, notes))}{verdict}</div></div>{table}'


def dots_of(found: Paired) -> list[float]:
    """The differences of several data sets."""
    return [mean for mean, _ in found.sets.values()] if len(found.sets) > 1 else []


def told_span(low: float, high: float) -> tuple[float, float] | None:
    """An interval; None where there is none."""
    return None if math.isnan(low) else (low, high)


def differences_table(found: Mapping[str, Paired], pairs: Mapping[str, int], sets: int) -> Table:
    """Differences with intervals, and with Wilcoxon's test where there are data sets enough for it."""
    corrected = dict(zip(found, holm([each.p for each in found.values()]), strict=True))
    enough = sets >= FEWEST_SETS
    names = ["difference", "these data sets", *(["new data sets", "Wilcoxon's p (Holm)"] * enough), "sets won", "pairs"]
    columns = [
        "difference",
        "half the t-interval",
        "bootstrap from",
        "to",
        "p",
        "p (Holm)",
        "sets",
        "sets won",
        "pairs",
    ]
    values, read = [], []
    for who, each in found.items():
        n, won = len(each.sets), sum(mean > 0 for mean, _ in each.sets.values())
        far = [plain(each.half), plain(each.low), plain(each.high)]
        values.append([who, each.mean, *far, each.p, corrected[who], n, won, pairs[who]])
        p = "too few" if too_few(n, len(found)) else f"{corrected[who]:.3g}"
        new = [span(each.low, each.high), p] * enough
        told = [f"{100 * each.mean:+z.1f}", span(each.mean - each.half, each.mean + each.half), *new]
        read.append(texts((who, *told, f"{won} of {n}", f"{pairs[who]:,}")))
    return Table(["contender", *columns], values, ["contender", *names], read)


def span(low: float, high: float) -> str:
    """An interval in points."""
    return "–" if math.isnan(low) else f"{100 * low:+z.1f} to {100 * high:+z.1f}"


def ranking(report: Report) -> str:
    """Mean ranks over data sets with their critical distance."""
    grid, ground = report.grid, report.ground
    head, sets = "<h2>Ranks</h2>", list(dict.fromkeys(draw[0] for draw in ground.draws))
    if len(ground.contenders) < 3 or len(sets) < 2:
        have = f"{counted(len(ground.contenders), 'contender')} on {counted(len(sets), 'data set')}"
        return head + soft(f"Ranks take three contenders on two data sets that all of them have; here are {have}.")
    values = np.array([[mean_on(grid, ground, who, name) for who in ground.contenders] for name in sets])
    found = ranks(values)
    order = [(ground.contenders[i], float(found.mean[i])) for i in np.argsort(found.mean, kind="stable")]
    header, read = ["contender", "mean rank"], [texts((who, f"{rank:.2f}")) for who, rank in order]
    report.tables["ranks"] = Table(header, order, header, read)
    figure = figures.critical("Mean ranks", ground.contenders, found, report.styles)
    said = (
        f"Mean ranks over {len(sets)} data sets of the mean over shots and seeds, 1 is best; bars join what Nemenyi's "
        f"test cannot tell apart at 5 %. Friedman's test that all are alike: p = {found.p:.2g}. {ground.sentence()}"
    )
    weak = f" With {len(sets)} data sets it finds only large differences." if len(sets) < 10 else ""
    if found.p > 1 - LEVEL:
        weak += " As Friedman's test does not tell the contenders apart, ranks say nothing."
    return (
        head + report.drawn("ranks", figure, "keep grow" if figure.width <= 480 else "wide large") + soft(said + weak)
    )
