"""The sections of a report beside accuracy: what it costs, whether probabilities are right, and forecasts."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from kshot.calibration import BINS
from kshot.errors import UserError
from kshot.files import amount
from kshot.seeing.figures import reliability
from kshot.seeing.runs import result_of
from kshot.studies import figures
from kshot.studies.figures import Curve, Forecast
from kshot.studies.grid import METRICS, Grid, mean_on
from kshot.studies.sections import SMALL, Report, points_of, soft, texts
from kshot.studies.tables import Table

MOST_POINTS = 800  # runs in the figure of forecasts
MOST_READ = 2_000  # result files whose reliability is read
DRAWN = ("trainable_parameters", "seconds", "peak_memory_bytes")  # costs with a figure
COSTS: dict[str, tuple[str, Callable[[float], str]]] = {  # by field of a row
    "trainable_parameters": ("trained parameters", lambda value: f"{value:,.0f}"),
    "seconds": ("seconds a run", lambda value: f"{value:,.3g}"),
    "peak_memory_bytes": ("bytes of memory at most", amount),
    "checkpoint_bytes": ("bytes of a checkpoint", amount),
}


def paying(report: Report) -> str:
    """Accuracy against costs, with those that nobody beats in both."""
    grid, ground, head = report.grid, report.ground, "<h2>Costs</h2>"
    names, value = ground.contenders, {who: mean_on(grid, ground, who, None) for who in ground.contenders}
    found = {key: {who: mean_on(grid, ground, who, None, key) for who in names} for key in COSTS}
    told = {key: each for key, each in found.items() if not any(map(math.isnan, each.values()))}
    if not told:
        return head + soft("The runs do not tell what they cost.")
    drawings = [
        figures.costs(words.capitalize(), names, [(told[key][who], value[who]) for who in names], words, report.styles)
        for key, (words, _) in COSTS.items()
        if key in told and key in DRAWN and len(set(told[key].values())) > 1
    ]
    header = ["contender", METRICS[grid.metric], *(COSTS[key][0] for key in told)]
    values = [[who, value[who], *(told[key][who] for key in told)] for who in names]
    read = [texts((who, f"{100 * value[who]:.1f}", *(COSTS[key][1](told[key][who]) for key in told))) for who in names]
    panels = report.panels("costs", "Accuracy against costs", drawings, 2, names=False) if drawings else ""
    said = (
        f"{ground.sentence()} The line is the Pareto front: nobody has more for less. A cost that is the same for all "
        "has no figure; a name without room is in the table. Seconds are of whole runs on the machines that made them. "
        "Memory is the most that the process had so far: where one makes many runs, that of the largest before."
    )
    return head + panels + soft(said) + report.tabled("costs", Table(header, values, header, read))


def with_metric(grid: Grid, metric: str) -> Grid:
    """The same runs by another figure of theirs; those without it are left out."""
    runs = {
        cell: kept
        for cell, rows in grid.runs.items()
        if (kept := {seed: row for seed, row in rows.items() if isinstance(row.get(metric), (int, float))})
    }
    return replace(grid, metric=metric, runs=runs)


def calibrated(report: Report, study: Path) -> str:
    """Errors of calibration before and after the temperature, and the reliability of all answers together."""
    whole = None if len(report.grid.sets) > 1 else report.grid.sets[0]
    drawings = []
    for metric, title in (("ece_before", "Before the temperature"), ("ece", "After the temperature")):
        grid = with_metric(report.grid, metric)
        given = [Curve(who, i, points) for who, i in report.styles.items() if (points := points_of(grid, who, whole))]
        drawings += [(title, given)] * bool(given)
    if not drawings:
        return "<h2>Calibration</h2>" + soft("No contender tells its calibration error on all data sets.")
    bounds = figures.limits([curve for _, given in drawings for curve in given])
    panels = [figures.curves(title, given, SMALL, bounds=bounds) for title, given in drawings]
    mean = "the mean of the data sets, " if whole is None else ""
    said = f"Expected calibration error in {BINS} bins, {mean}with 95 % t-intervals over seeds; lower is better."
    drawn = report.panels("calibration", "Calibration error", panels, 2)
    return f"<h2>Calibration</h2>{drawn}{soft(said)}{reliabilities(report, study)}"


def reliabilities(report: Report, study: Path) -> str:
    """Reliability diagrams of the drawn contenders, of all test answers of their runs."""
    each, blocks, read, there = MOST_READ // len(report.styles), [], 0, 0
    for who, style in report.styles.items():
        rows = [row for (name, *_), runs in report.grid.runs.items() if name == who for row in runs.values()]
        chosen = [rows[i] for i in np.unique(np.linspace(0, len(rows) - 1, min(each, len(rows))).astype(int))]
        told = [found["reliability"] for row in chosen if (found := result_in(study, row)).get("reliability")]
        if bins := pooled([next(iter(sets.values())) for sets in told]):
            read, there = read + len(told), there + len(rows)
            report.figures[f"reliability_{style + 1}"] = figure = reliability(bins)
            blocks.append(f"<figure><figcaption>{escape(who)}</figcaption>{figure}</figure>")
    said = (
        "How often answers are right by how sure they are, after the temperature, and how many of the first test set's "
        f"images are how sure (bars below): the answers of {read:,} runs of {there:,} together."
    )
    return f'<div class="panels three">{"".join(blocks)}</div>{soft(said)}' if blocks else ""


def result_in(study: Path, row: Mapping[str, Any]) -> dict[str, Any]:
    """What a run's result.json says; nothing where it cannot be read any more: the row has what counts."""
    try:
        return result_of(study / str(row.get("run")))
    except UserError:
        return {}


def pooled(given: Sequence[Sequence[Mapping[str, Any]]]) -> list[dict[str, float]]:
    """The bins of several reliability diagrams together: images added, confidence and accuracy weighted by them."""
    sums: dict[int, np.ndarray] = defaultdict(lambda: np.zeros(3))
    for bins in given:
        for each in bins:
            n = each["images"]
            sums[min(int(each["confidence"] * BINS), BINS - 1)] += [n, n * each["confidence"], n * each["accuracy"]]
    return [{"images": int(n), "confidence": c / n, "accuracy": a / n} for _, (n, c, a) in sorted(sums.items()) if n]


def foretold(report: Report) -> str:
    """What runs expected of themselves, against what they reached."""
    found: dict[str, list[Forecast]] = defaultdict(list)
    for (who, name, k), rows in report.grid.runs.items():
        for seed, row in rows.items():
            told = [row.get(key) for key in ("forecast", "forecast_low", "forecast_high", "acc")]
            if all(isinstance(value, (int, float)) for value in told):
                found[who].append((*map(float, told), f"{who} on {name}, {k} shots, seed {seed}"))  # type: ignore[arg-type]  # four numbers
    if not found:
        return ""
    every = [each for runs in found.values() for each in runs]
    judged = {who: judgement(found[who]) for who in report.grid.contenders if who in found} | {"all": judgement(every)}
    header = ["contender", "runs", "intervals that hold", "forecast − truth", "mean distance"]
    read = [
        texts((who, f"{n:,}", f"{held:.1%}", f"{100 * bias:+z.1f}", f"{100 * distance:.1f}"))
        for who, (n, held, bias, distance) in judged.items()
    ]
    n, held, *_ = judged["all"]
    said = (
        f"Each run's forecast from its shots alone with its 95 % interval: {held:.1%} of {n:,} intervals hold what was "
        "measured; crosses are those that do not. Runs on one data set are alike, so this share is less sure than the "
        "number of runs suggests."
    )
    if len(every) > MOST_POINTS:
        said += f" Drawn are {MOST_POINTS:,} of them, evenly from all."
    some = [every[i] for i in np.unique(np.linspace(0, len(every) - 1, MOST_POINTS).astype(int))]
    figure = report.drawn("forecast", figures.forecasts("Forecast against truth", some))
    table = report.tabled("forecast", Table(header, [[who, *each] for who, each in judged.items()], header, read))
    return f'<h2>Forecasts</h2><div class="two"><div>{figure}</div><div>{soft(said)}{table}</div></div>'


def judgement(given: Sequence[Forecast]) -> tuple[int, float, float, float]:
    """Runs, the share of intervals that hold the truth, the mean error, and the mean distance."""
    held = sum(low <= truth <= high for _, low, high, truth, _ in given) / len(given)
    errors = np.array([forecast - truth for forecast, _, _, truth, _ in given])
    return len(given), held, float(errors.mean()), float(np.abs(errors).mean())
