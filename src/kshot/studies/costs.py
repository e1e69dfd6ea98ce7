"""The sections of a report beside accuracy: what it costs, whether probabilities are right, and forecasts."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from kshot.calibration import BINS
from kshot.files import amount
from kshot.seeing.figures import reliability
from kshot.seeing.page import table
from kshot.studies import figures
from kshot.studies.axes import legend, sheet
from kshot.studies.figures import Curve, curves
from kshot.studies.grid import Grid
from kshot.studies.sections import MAIN, SMALL, Report, drawn, mean_on, panel, points_of, soft

MOST_READ = 2_000  # result files whose reliability is read
COSTS: dict[str, tuple[str, Callable[[float], str]]] = {  # by field of a row
    "trainable_parameters": ("trained parameters", lambda value: f"{value:,.0f}"),
    "seconds": ("seconds a run", lambda value: f"{value:,.3g}"),
    "peak_memory_bytes": ("bytes of memory at most", amount),
    "checkpoint_bytes": ("bytes of a checkpoint", amount),
}


def paying(report: Report) -> str:
    """Accuracy against costs, with those that nobody beats in both."""
    grid, ground = report.grid, report.ground
    names, value = ground.contenders, {who: mean_on(grid, ground, who, None) for who in ground.contenders}
    found = {field: {who: mean_on(grid, ground, who, None, field) for who in names} for field in COSTS}
    told = {field: each for field, each in found.items() if not any(map(math.isnan, each.values()))}
    head = "<h2>Costs</h2>"
    if not told:
        return head + soft("The runs do not tell what they cost.")
    drawings = [
        figures.costs(words.capitalize(), names, [(told[key][who], value[who]) for who in names], words, report.styles)
        for key, (words, _) in COSTS.items()
        if key in told and key != "checkpoint_bytes"
    ]
    if drawings:
        report.figures["costs"] = sheet("Accuracy against costs", drawings, 2)
    header = ["contender", "mean", *(COSTS[key][0] for key in told)]
    rows = [[who, f"{100 * value[who]:.1f}", *(COSTS[key][1](told[key][who]) for key in told)] for who in names]
    plain = [[who, f"{100 * value[who]:.2f}", *(f"{told[key][who]:.6g}" for key in told)] for who in names]
    report.tables["costs"] = [header, *plain]
    said = (
        f"{ground.sentence()} The line is the Pareto front: nobody has more for less. Names that have no room are in the "
        "table. Seconds are of whole runs on the machines that made them; memory is the peak of the process, which is that "
        "of its largest run so far where one process makes many."
    )
    html = table([(h, bool(i)) for i, h in enumerate(header)], [[escape(word) for word in row] for row in rows])
    return f'{head}<div class="panels">{"".join(map(panel, drawings))}</div>{soft(said)}<div class="wide">{html}</div>'


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
    head, drawings, least = "<h2>Calibration</h2>", [], None
    whole = None if len(report.grid.sets) > 1 else report.grid.sets[0]
    for metric, title in (("ece_before", "As the method says"), ("ece", "With the temperature of held-out shots")):
        grid = with_metric(report.grid, metric)
        given = [
            Curve(who, style, points) for who, style in report.styles.items() if (points := points_of(grid, who, whole))
        ]
        if given:
            drawings.append((title, given))
            least = grid
    if least is None:
        return head + soft("No contender with all data sets tells its calibration error.")
    bounds = figures.limits([curve for _, given in drawings for curve in given])
    panels = [curves(title, given, SMALL, bounds=bounds) for title, given in drawings]
    report.figures["calibration"] = sheet("Calibration error", panels, 2, legend(report.shown, MAIN[0]))
    said = "Expected calibration error (15 bins) with 95 % t-intervals over seeds; lower is better."
    if whole is None:
        said = said.replace("error (", "error, mean of the data sets (")
    html = head + drawn(legend(report.shown, MAIN[0])) + f'<div class="panels">{"".join(map(panel, panels))}</div>'
    return html + soft(said) + reliabilities(report, study)


def reliabilities(report: Report, study: Path) -> str:
    """Reliability diagrams of the drawn contenders, of all test answers of all their runs."""
    each = max(1, MOST_READ // len(report.shown))
    blocks, read = [], 0
    for who, style in report.styles.items():
        rows = [row for (name, *_), runs in report.grid.runs.items() if name == who for row in runs.values()]
        chosen = [rows[i] for i in np.unique(np.linspace(0, len(rows) - 1, min(each, len(rows))).astype(int))]
        results = [found for row in chosen if (found := result_of(study, row))]
        bins = pooled([next(iter((found.get("reliability") or {}).values()), []) for found in results])
        if bins:
            read += len(results)
            figure = reliability(bins)
            report.drawn[f"reliability_{style + 1}"] = figure
            blocks.append(f"<figure><figcaption>{escape(who)}</figcaption>{figure}</figure>")
    if not blocks:
        return ""
    said = (
        f"How often answers are right by how sure they are, after the temperature: all test answers of {read:,} runs."
    )
    return f'<div class="panels">{"".join(blocks)}</div>{soft(said)}'


def result_of(study: Path, row: Mapping[str, Any]) -> dict[str, Any]:
    """What a run's result.json says; empty where it is gone or no JSON: the row has what counts."""
    try:
        found = json.loads((study / str(row.get("run")) / "result.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def pooled(given: Sequence[Sequence[Mapping[str, Any]]]) -> list[dict[str, float]]:
    """The bins of several reliability diagrams together: images added, confidence and accuracy weighted by them."""
    sums: dict[int, np.ndarray] = defaultdict(lambda: np.zeros(3))
    for bins in given:
        for each in bins:
            n = each["images"]
            sums[min(int(each["confidence"] * BINS), BINS - 1)] += [n, n * each["confidence"], n * each["accuracy"]]
    return [{"images": n, "confidence": c / n, "accuracy": a / n} for _, (n, c, a) in sorted(sums.items()) if n]


def foretold(report: Report) -> str:
    """What runs expected of themselves, against what they reached."""
    found: dict[str, list[tuple[float, float, float, float, str]]] = defaultdict(list)
    for (who, name, k), rows in report.grid.runs.items():
        for seed, row in rows.items():
            told = [row.get(key) for key in ("forecast", "forecast_low", "forecast_high", "acc")]
            if all(isinstance(value, (int, float)) for value in told):
                found[who].append((*map(float, told), f"{who} on {name}, {k} shots, seed {seed}"))  # type: ignore[arg-type]
    if not found:
        return ""
    every = [each for runs in found.values() for each in runs]
    report.figures["forecast"] = figure = figures.forecasts("Forecast against truth", every)
    header = ["contender", "runs", "held", "forecast − truth", "mean distance"]
    rows_ = [[who, *judged(found[who])] for who in report.grid.contenders if who in found]
    report.tables["forecast"] = [header, *rows_, ["all", *judged(every)]]
    held = sum(low <= truth <= high for _, low, high, truth, _ in every)
    said = (
        f"Each run's forecast from its shots alone, with its 95 % interval: {held:,} of {len(every):,} intervals "
        f"({held / len(every):.1%}) hold what was measured; crosses are those that do not. Runs on one data set are alike, so "
        "the share is less sure than its number of runs suggests."
    )
    html = table(
        [(h, bool(i)) for i, h in enumerate(header)],
        [[escape(w) for w in row] for row in report.tables["forecast"][1:]],
    )
    return (
        f'<h2>Forecasts</h2><div class="two">{drawn(figure)}<div>{soft(said)}<div class="wide">{html}</div></div></div>'
    )


def judged(given: Sequence[tuple[float, float, float, float, str]]) -> list[str]:
    """Runs, share of intervals that hold the truth, mean error and mean distance in points."""
    held = sum(low <= truth <= high for _, low, high, truth, _ in given) / len(given)
    errors = np.array([forecast - truth for forecast, _, _, truth, _ in given])
    return [f"{len(given):,}", f"{held:.1%}", f"{100 * errors.mean():+.1f}", f"{100 * np.abs(errors).mean():.1f}"]
