"""A run on one self-contained page of HTML: no script, nothing from elsewhere, for phones, wide screens and paper."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import PurePath
from typing import Any

import numpy as np

from kshot import __version__
from kshot.predictions import Answered
from kshot.seeing.compare import counted
from kshot.seeing.figures import STYLE as FIGURES
from kshot.seeing.statistics import wilson

Picture = tuple[str, bool, str, str]
WIDE = 20  # classes up to which the matrix has something beside it
OPEN = 30  # classes up to which the table is unfolded
PAIRS = 12  # most frequent confusions that are listed

STYLE = """
:root{color-scheme:light dark;--ink:#1c1f23;--soft:#6a717a;--line:#d5d9de;--good:#2166c4;--bad:#d4550f;--paper:#fff;
--card:#f5f6f8}
@media(prefers-color-scheme:dark){:root{--ink:#e7eaee;--soft:#9aa3ad;--line:#3a4047;--good:#69a7ff;--bad:#ff9350;
--paper:#15181b;--card:#1f2327}}
*{box-sizing:border-box}
body{margin:0 auto;max-width:1080px;padding:1.2rem 1rem 3rem;background:var(--paper);color:var(--ink);
font:16px/1.5 system-ui,-apple-system,"Segoe UI",sans-serif}
h1{font-size:1.6rem;line-height:1.2;margin:.2rem 0;overflow-wrap:anywhere}
h2{font-size:1.15rem;margin:2.2rem 0 .5rem;padding-top:.4rem;border-top:1px solid var(--line)}
p{margin:.4rem 0}p.soft{color:var(--soft)}small,p.soft{font-size:.86rem}
.cards{display:grid;grid-template-columns:repeat(auto-fill,minmax(150px,1fr));gap:.6rem;margin:1rem 0}
.cards div{background:var(--card);border-radius:8px;padding:.6rem .8rem}
.cards b{display:block;font-size:1.35rem;line-height:1.25;font-variant-numeric:tabular-nums}
.two{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,320px),1fr));gap:1.2rem 2rem;align-items:start}
.wide{overflow-x:auto;max-width:100%}
svg{max-width:100%;height:auto;display:block}
.large svg{min-width:640px}
table{border-collapse:collapse;width:100%;font-size:.9rem;font-variant-numeric:tabular-nums}
th,td{text-align:left;padding:.28rem .5rem .28rem 0;border-bottom:1px solid var(--line);vertical-align:top;
overflow-wrap:anywhere}
td:first-child{min-width:5.5rem}th.n{white-space:normal}th{font-weight:600;color:var(--soft)}.n{text-align:right;white-space:nowrap;overflow-wrap:normal;padding-left:.5rem}
.bar{display:block;height:5px;border-radius:3px;background:var(--good);min-width:1px}
.photos{display:grid;grid-template-columns:repeat(auto-fill,minmax(132px,1fr));gap:.8rem}
.pairs{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,240px),1fr));gap:.8rem}
figure{margin:0;min-width:0;break-inside:avoid}
.photos img{width:100%;aspect-ratio:1;object-fit:contain;background:var(--card);border-radius:6px}
.pairs img{width:100%;border-radius:6px}img.tiny{image-rendering:pixelated}
figcaption{font-size:.84rem;line-height:1.35;overflow-wrap:anywhere;margin-top:.2rem}
summary{cursor:pointer}
dl{display:grid;grid-template-columns:minmax(8rem,auto) 1fr;gap:.15rem 1rem;font-size:.9rem;margin:0}
dt{color:var(--soft)}dd{margin:0;overflow-wrap:anywhere}
figcaption small{display:block;color:var(--soft);white-space:nowrap;overflow:hidden;text-overflow:ellipsis}
@media(max-width:480px){table{font-size:.8rem}.n{padding-left:.2rem;padding-right:.3rem}}
@media print{:root{color-scheme:light;--ink:#000;--soft:#555;--line:#bbb;--good:#2166c4;--bad:#d4550f;--paper:#fff;
--card:#f1f2f4}
body{max-width:none;padding:0;font-size:10.5pt}h2{break-after:avoid}.keep,tr,.cards div{break-inside:avoid}
*{print-color-adjust:exact;-webkit-print-color-adjust:exact}.wide{overflow:visible}
svg{max-width:105mm}.large svg{min-width:0;max-width:120mm}dl{font-size:.8rem}
.photos{grid-template-columns:repeat(6,1fr)}.pairs{grid-template-columns:repeat(3,1fr)}
.cards{grid-template-columns:repeat(4,1fr)}
.two{grid-template-columns:1fr 1fr}}
@page{margin:14mm}
"""


@dataclass
class Seen:
    """What there is to show beside numbers.

    Attributes:
        confusion, reliability, feature_map: SVG; empty where there is none.
        errors: pictures as ``data:`` addresses, each with whether it is tiny, words, and the path of the image.
        attention: likewise.
        said: a sentence by figure, of what was left out or how it was made.
        notes: what could not be shown, and why.
    """

    confusion: str = ""
    reliability: str = ""
    feature_map: str = ""
    errors: list[Picture] = field(default_factory=list)
    attention: list[Picture] = field(default_factory=list)
    said: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def confusions(answered: Answered) -> np.ndarray:
    """Counts of images, (C, C), by what they are and what they were taken for."""
    counts = np.zeros((len(answered.class_names),) * 2, dtype=np.int64)
    np.add.at(counts, (answered.label, answered.guess), 1)
    return counts


def page(result: Mapping[str, Any], answered: Answered, seen: Seen) -> str:
    """The page of a run, by its result, its answers to one test set, and its figures."""
    title = f"{result['method']} on {result['dataset']}"
    counts = confusions(answered)
    blocks = [
        f"<h1>{escape(title)}</h1>",
        f'<p class="soft">{escape(subtitle(result, answered))}</p>',
        cards(result, answered),
        *(f'<p class="soft">{escape(note)}</p>' for note in seen.notes),
        f'<h2>Confusions</h2><div class="{"two" if len(counts) <= WIDE else ""}">'
        f'<div class="wide keep{"" if len(counts) <= WIDE else " large"}">{seen.confusion}'
        f"{soft(seen, 'confusion')}</div>"
        f"<div>{pairs(counts, answered)}</div></div>",
        gallery("The most confident errors", "photos", seen.errors, soft(seen, "errors")),
        f"<h2>By class</h2>{class_table(counts, answered)}",
        '<h2>Calibration</h2><div class="two">'
        f'<div class="keep">{seen.reliability}</div><div>{calibration(result, answered.name)}</div></div>',
        gallery("What it looks at", "pairs", seen.attention, soft(seen, "attention")),
        f'<h2>Features</h2><div class="keep">{seen.feature_map}{soft(seen, "map")}</div>' if seen.feature_map else "",
        f"<h2>The run</h2>{facts(result)}",
        f'<p class="soft">Written by kshot {escape(__version__)}.</p>',
    ]
    return document(title, blocks)


def document(title: str, blocks: Iterable[str], styles: str = FIGURES) -> str:
    """A whole page of blocks of HTML, with the style of pages and the ``styles`` of its figures."""
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>\n'
        '<meta name="viewport" content="width=device-width,initial-scale=1">\n'
        f"<style>{STYLE}{styles}</style></head>\n<body>\n" + "\n".join(filter(None, blocks)) + "\n</body></html>\n"
    )


def subtitle(result: Mapping[str, Any], answered: Answered) -> str:
    """What was trained on what, in a line."""
    split = result.get("split") or {}
    shots = f"{split['shots']} images a class" if split.get("shots") else f"{split.get('sampler', 'all')} images"
    on = "" if answered.name == "test" else f", tested on {answered.name}"
    when = f", {result['finished'][:10]}" if result.get("finished") else ""
    classes, protocol = len(answered.class_names), result.get("protocol")
    return f"{result.get('backbone')}, {classes} classes, {shots}, {protocol}{on}{when}"


def cards(result: Mapping[str, Any], answered: Answered) -> str:
    """The figures that count."""
    right, images = int(answered.right.sum()), len(answered.label)
    low, high = wilson(right, images)
    figures = (result.get("test_sets") or {}).get(answered.name, {})
    given = [(f"{right / images:.1%}", f"accuracy on {images:,} images; 95 % interval {low:.1%} to {high:.1%}")]
    if answered.zero_shot is not None:
        before = answered.zero_shot == answered.label
        test = counted(before, answered.right)
        given.append((f"{before.mean():.1%}", "zero-shot accuracy of the untouched backbone"))
        interval = f"95 % interval {test['low']:+.1%} to {test['high']:+.1%}, McNemar's p {test['p']:.2g}"
        changed = f"by adapting: {test['won']:,} images right that were wrong, {test['lost']:,} the other way; "
        given.append((f"{100 * test['difference']:+.1f} points", changed + interval))
    for name, what in (
        ("acc_class_mean", "mean accuracy of the classes"),
        ("f1_macro", "macro F1"),
        ("ece", "calibration error (ECE)"),
    ):
        if isinstance(figures.get(name), float):
            given.append((f"{figures[name]:.1%}", what))
    each = (f"<div><b>{escape(value)}</b><small>{escape(what)}</small></div>" for value, what in given)
    return f'<div class="cards">{"".join(each)}</div>'


def soft(seen: Seen, figure: str) -> str:
    """What is said about a figure."""
    return f'<p class="soft">{escape(seen.said[figure])}</p>' if seen.said.get(figure) else ""


def gallery(title: str, kind: str, pictures: Sequence[Picture], said: str) -> str:
    """Pictures with words below them."""
    if not pictures and not said:
        return ""
    each = (
        f'<figure><img{" class=tiny" if tiny else ""} alt="{escape(words)}" src="{address}">'
        f'<figcaption>{escape(words)}<small title="{escape(path)}">{escape(PurePath(path).name)}</small></figcaption>'
        "</figure>"
        for address, tiny, words, path in pictures
    )
    return f'<h2>{escape(title)}</h2>{said}<div class="{kind}">{"".join(each)}</div>'


def table(header: Sequence[tuple[str, bool]], rows: Iterable[Sequence[str]]) -> str:
    """A table of cells that are HTML; of each column whether it holds numbers."""
    kinds = [' class="n"' if number else "" for _, number in header]
    head = "".join(f"<th{kind}>{escape(name)}</th>" for kind, (name, _) in zip(kinds, header, strict=True))
    body = "".join(
        "<tr>" + "".join(f"<td{kind}>{cell}</td>" for kind, cell in zip(kinds, row, strict=True)) + "</tr>"
        for row in rows
    )
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def pairs(counts: np.ndarray, answered: Answered) -> str:
    """The most frequent confusions."""
    wrong = counts - np.diag(np.diag(counts))
    order = np.argsort(-wrong, axis=None, kind="stable")[:PAIRS]
    names, rows = answered.class_names, []
    for i, j in zip(*np.unravel_index(order, wrong.shape), strict=True):
        if wrong[i, j]:
            rows.append((escape(names[i]), escape(names[j]), f"{wrong[i, j]} of {counts[i].sum()}"))
    if not rows:
        return "<p>No image was taken for another class.</p>"
    return table((("most often, what is", False), ("was taken for", False), ("images", True)), rows)


def class_table(counts: np.ndarray, answered: Answered) -> str:
    """Accuracy of each class with its interval, the worst first; folded where there are many."""
    names, rows = answered.class_names, []
    sums, right = counts.sum(1), np.diag(counts)
    there = [i for i in range(len(names)) if sums[i]]
    for i in sorted(there, key=lambda i: right[i] / sums[i]):
        low, high = wilson(int(right[i]), int(sums[i]))
        share, taken = right[i] / sums[i], int(counts[:, i].sum())
        bar = f'{escape(names[i])}<span class="bar" style="width:{100 * share:.1f}%"></span>'
        sure = f"{right[i] / taken:.1%}" if taken else "-"
        rows.append((bar, str(sums[i]), f"{share:.1%}", f"{100 * low:.0f}–{100 * high:.0f} %", sure))
    header = (("class", False), ("images", True), ("right", True), ("95 % interval", True), ("precision", True))
    whole = table(header, rows)
    missing = len(names) - len(there)
    more = f'<p class="soft">{missing} classes have no test images.</p>' if missing else ""
    if len(rows) <= OPEN:
        return whole + more
    worst = table(header, rows[: OPEN // 2])
    return f"{worst}<details><summary>All {len(rows):,} classes</summary>{whole}</details>{more}"


def calibration(result: Mapping[str, Any], test_set: str) -> str:
    """What is known of probabilities."""
    figures, found = (result.get("test_sets") or {}).get(test_set, {}), result.get("calibration")
    rows = [
        ("calibration error (ECE)", figures.get("ece"), "{:.2%}"),
        ("before the temperature", figures.get("ece_before"), "{:.2%}"),
        ("Brier's score", figures.get("brier"), "{:.4f}"),
        ("temperature", (found or {}).get("temperature"), "{:.3g}"),
        ("found by held-out shots", (found or {}).get("held_out"), "{:,}"),
    ]
    told = "" if found else '<p class="soft">The run was not calibrated: the temperature is 1.</p>'
    return definitions((name, shape.format(value)) for name, value, shape in rows if value is not None) + told


def facts(result: Mapping[str, Any]) -> str:
    """What the run was."""
    split, versions = result.get("split") or {}, result.get("versions") or {}
    seconds = ", ".join(f"{name} {value:.1f}" for name, value in (result.get("seconds") or {}).items())
    rows = [
        ("backbone", f"{result.get('backbone')} (weights {str(result.get('backbone_sha256'))[:12]})"),
        ("trainable parameters", f"{result.get('trainable_parameters', 0):,} of {result.get('total_parameters', 0):,}"),
        ("draw", f"{split.get('sampler')}, seed {split.get('seed')}, {split.get('digest')}"),
        ("seed", str(result.get("seed"))),
        ("seconds", seconds),
        ("device", f"{result.get('device')}, precision {result.get('precision')}"),
        ("versions", ", ".join(f"{name} {value}" for name, value in versions.items())),
        ("commit", str(result.get("git_commit"))),
        *(("note", str(note)) for note in result.get("notes") or ()),
    ]
    return definitions(rows)


def definitions(rows: Iterable[tuple[str, str]]) -> str:
    """Names and what they are."""
    return f"<dl>{''.join(f'<dt>{escape(name)}</dt><dd>{escape(value)}</dd>' for name, value in rows)}</dl>"
