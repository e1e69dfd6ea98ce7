"""A study on one self-contained page of HTML: no script, nothing from elsewhere, for phones, wide screens and paper."""

from __future__ import annotations

import shlex
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from kshot import __version__
from kshot.files import packaged_folder
from kshot.seeing.page import definitions, document
from kshot.studies import axes
from kshot.studies.costs import calibrated, foretold, paying, result_in
from kshot.studies.grid import METRICS, Row, counted, mean_on
from kshot.studies.sections import Report, against_baseline, against_shots, means, ranking, soft

NAMED = 12  # cells that are listed of one reason
STYLE = """
.grow svg{width:100%}.large svg{min-width:520px}
.panels{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,300px),1fr));gap:1rem 1.2rem;
margin:.6rem 0}.panels svg{width:100%}.panels figcaption,p.name{font-size:.95rem;font-weight:600;margin:.5rem 0 .1rem}
.legend{display:flex;flex-wrap:wrap;gap:.1rem 1rem;font-size:.86rem;margin:.6rem 0}
.legend span{overflow-wrap:anywhere}.legend svg{display:inline-block}
td b{font-weight:700}td small{color:var(--soft);white-space:nowrap}
td:first-child{min-width:6.5rem;overflow-wrap:break-word}
summary{padding:.3rem 0;font-weight:600;font-size:.95rem}li{overflow-wrap:anywhere}
pre{white-space:pre-wrap;overflow-wrap:anywhere;background:var(--card);padding:.6rem .8rem;border-radius:8px;
font-size:.85rem}
@media(max-width:480px){td small{display:block}}
@media print{.grow svg{max-width:130mm}.panels{grid-template-columns:1fr 1fr}.three{grid-template-columns:repeat(3,1fr)}
.large svg{max-width:160mm}
.panels svg{max-width:100%}}
"""


def page(report: Report, rows: Sequence[Row], study: Mapping[str, Any], folder: Path, command: str) -> str:
    """The page of a report; its figures and tables are added to the report on the way.

    Args:
        report: what is compared.
        rows: all runs of the study, also those that failed or are open.
        study: what study.json says.
        folder: of the study.
        command: that makes this page.
    """
    name = str(study.get("name") or folder.name)
    blocks = [
        f"<h1>{escape(name)}</h1>",
        soft(subtitle(report, rows)),
        cards(report, rows),
        *map(soft, report.grid.notes),
        f"<h2>What was compared</h2>{compared(report, study)}{lacking(rows)}",
        against_shots(report),
        means(report),
        against_baseline(report),
        ranking(report),
        paying(report),
        calibrated(report, folder),
        foretold(report),
        f"<h2>How it was made</h2>{surroundings(rows, folder)}",
        f"<pre>{escape(made_by(study, command))}</pre>",
        soft(f"Written by kshot {__version__}; figures as SVG and PDF and tables as CSV and TeX lie beside this page."),
    ]
    return document(name, blocks, axes.PAGE + STYLE)


def subtitle(report: Report, rows: Sequence[Row]) -> str:
    """What was compared on what, in a line."""
    backbones = sorted({str(row.get("backbone")) for row in rows if row.get("backbone")})
    parts = [f"{counted(len(report.grid.contenders), 'contender')} on {', '.join(report.grid.sets)}"]
    parts += [", ".join(backbones)] if backbones else []
    return "; ".join(parts)


def cards(report: Report, rows: Sequence[Row]) -> str:
    """The figures that count."""
    count = Counter(str(row.get("state")) for row in rows)
    best = report.ground.contenders[0]
    value = mean_on(report.grid, report.ground, best, None)
    spent = sum(row["seconds"] for row in rows if isinstance(row.get("seconds"), (int, float)))
    more = ", ".join(f"{count[state]:,} {state}" for state in ("failed", "open") if count[state])
    given = [
        (
            f"{value:.1%}",
            f"mean {METRICS[report.grid.metric]} of {best}, the best of {len(report.ground.contenders)} on common runs",
        ),
        (f"{count['done']:,}", "runs finished" + (f"; {more}" if more else ", all of the study")),
        (clock(spent), "of run time together"),
    ]
    each = (f"<div><b>{escape(value)}</b><small>{escape(what)}</small></div>" for value, what in given)
    return f'<div class="cards">{"".join(each)}</div>'


def clock(seconds: float) -> str:
    """A time in its own unit."""
    for unit, size in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds:.3g} seconds"


def compared(report: Report, study: Mapping[str, Any]) -> str:
    """The axes of a study."""
    listed = {name: ", ".join(map(str, labels)) for name, labels in (study.get("axes") or {}).items()}
    seeds = sorted({str(seed) for runs in report.grid.runs.values() for seed in runs}, key=lambda s: (len(s), s))
    rows = {
        "method": ", ".join(report.grid.contenders),
        "dataset": ", ".join(report.grid.sets),
        "shots": ", ".join("all" if k is None else str(k) for k in report.grid.shots),
        "seed": ", ".join(seeds),
    } | listed
    if study.get("base"):
        rows["base"] = ", ".join(map(str, study["base"]))
    for name, value in (study.get("options") or {}).items():
        rows[name] = str(value)
    return definitions(rows.items())


def lacking(rows: Sequence[Row]) -> str:
    """Runs that failed, by reason, and those that were not made."""
    failed: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        if row.get("state") == "failed":
            failed[str(row.get("reason") or "no reason told")].append(row)
    waiting = [row for row in rows if row.get("state") not in ("done", "failed")]
    blocks = [f"<li>{escape(reason)}<br><small>{escape(listed(each))}</small></li>" for reason, each in failed.items()]
    total = sum(map(len, failed.values()))
    html = f"<p>{total:,} {'run' if total == 1 else 'runs'} failed:</p><ul>{''.join(blocks)}</ul>" if failed else ""
    if waiting:
        html += f"<p>{len(waiting):,} not made yet: <small>{escape(listed(waiting))}</small></p>"
    return html or "<p>No run is missing.</p>"


def listed(rows: Sequence[Row]) -> str:
    """Cells by name, a few of them."""
    words = [
        f"{row.get('method')} on {row.get('dataset')}, {row.get('shots')} shots, seed {row.get('seed')}"
        for row in rows[:NAMED]
    ]
    return "; ".join(words) + (f"; and {len(rows) - NAMED:,} more" if len(rows) > NAMED else "")


def surroundings(rows: Sequence[Row], folder: Path) -> str:
    """Versions, commits and devices of all finished runs."""
    done = [row for row in rows if row.get("state") == "done"]
    kinds = {(row.get("kshot"), row.get("git_commit"), row.get("device")): row for row in done}
    versions: dict[str, set[str]] = defaultdict(set)
    for row in kinds.values():
        for name, version in (result_in(folder, row).get("versions") or {}).items():
            versions[name].add(str(version))
    finished = sorted(str(row["finished"]) for row in done if row.get("finished"))
    facts = {
        "devices": values(row.get("device") for row in done),
        "kshot": values(row.get("kshot") for row in done),
        "commits": values(row.get("git_commit") for row in done),
        "versions": ", ".join(f"{name} {' and '.join(sorted(each))}" for name, each in versions.items()),
        "finished": f"{finished[0]} to {finished[-1]}" if finished else "",
    }
    html = definitions((name, value) for name, value in facts.items() if value)
    mixed = [name for name, each in versions.items() if len(each) > 1]
    return html + soft(f"Not all runs had the same {', '.join(mixed)}." if mixed else "")


def values(given: Iterable[Any]) -> str:
    """Values with how often they are, where there are several."""
    count = Counter(str(value) for value in given if value is not None)
    return ", ".join(f"{value} ({n:,} runs)" if len(count) > 1 else value for value, n in count.most_common())


def made_by(study: Mapping[str, Any], command: str) -> str:
    """The commands from the grid to this page; a study that kshot carries by its name in configs/."""
    file = Path(str(study.get("file") or ""))
    if file.is_relative_to(configs := packaged_folder("configs")):
        file = file.relative_to(configs)
    return "\n".join([*([f"python main.py sweep --config {shlex.quote(str(file))}"] * ("file" in study)), command])
