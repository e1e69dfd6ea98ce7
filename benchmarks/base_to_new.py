"""Base-to-new: trained on the first half of the classes, tested on each half; the table in docs/methods.md.

    python benchmarks/base_to_new.py

Every run is an ordinary ``kshot fit --data.protocol base-to-new`` on the digits (zero to four, five to nine) with the
carried CLIP, 16 shots, seeds 1-3; what follows ``--`` is handed to each of them. Rows are appended, and a row that is
there already is not run again. H is given in both ways that tables use: of the averages over seeds, and as the average
of each seed's H.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from few_shot import append, machine, parse, rows_of

DOC = Path(__file__).parents[1] / "docs" / "methods.md"
METHODS = [
    "zero_shot", "coop", "cocoop", "kgcoop", "maple", "vpt", "ivlp", "promptsrc", "dept", "clip_adapter", "lora",
    "prolip", "2sfs",
]  # fmt: skip
FIELDS = (
    "label", "method", "seed", "base", "new", "zero_shot_base", "zero_shot_new", "trainable_parameters", "fit_seconds",
    "split", "machine", "git_commit",
)  # fmt: skip


def missing(out: Path, label: str, method: str, seeds: list[int]) -> list[int]:
    """Seeds that have no row yet."""
    done = {row["seed"] for row in rows_of(out) if (row["label"], row["method"]) == (label, method)}
    return [seed for seed in seeds if str(seed) not in done]


def run_method(method: str, seeds: list[int], extra: list[str], out: Path, label: str) -> None:
    """Runs one method's seeds in this process and appends a row for each."""
    from kshot.commands import run

    for seed in seeds:
        with tempfile.TemporaryDirectory() as folder:
            arguments = ["fit", "--config", "clip_16shot.yaml", "--config", f"methods/{method}.yaml"]
            arguments += ["--data.protocol", "base-to-new", "--data.split_seed", str(seed)]
            arguments += ["--seed_everything", str(seed), "--data.store_gb", "0"]  # each run encodes for itself
            cli = run([*arguments, "--run.root", folder, "--trainer.enable_progress_bar", "false", *extra])
            result = json.loads((cli.directory / "result.json").read_text())
        base, new = result["test_sets"]["base"], result["test_sets"]["new"]
        row = {
            "label": label, "method": method, "seed": seed, "base": base["acc"], "new": new["acc"],
            "zero_shot_base": base["zero_shot_acc"], "zero_shot_new": new["zero_shot_acc"], "machine": machine(),
            "trainable_parameters": result["trainable_parameters"], "fit_seconds": result["seconds"]["fit"],
            "split": result["split"]["digest"][7:23], "git_commit": result["git_commit"],
        }  # fmt: skip
        append(out, FIELDS, row)


def table(rows: list[dict[str, str]], label: str) -> str:
    """The table in Markdown."""
    from kshot.record import base_to_new_over_runs

    lines = ["| method | base | new | H of averages | average of H | trainable |", "|---|---|---|---|---|---|"]
    for method in dict.fromkeys(row["method"] for row in rows if row["label"] == label):
        found = [row for row in rows if (row["label"], row["method"]) == (label, method)]
        runs = [(float(row["base"]), float(row["new"])) for row in found]
        means = base_to_new_over_runs(runs)
        cells = []
        for i, part in enumerate(("base", "new")):
            spread = statistics.stdev(100 * run[i] for run in runs) if len(runs) > 1 else 0.0
            cells.append(f"{100 * means[part]:.1f} ± {spread:.1f}")
        cells += [f"{100 * means[name]:.1f}" for name in ("h_of_averages", "average_of_h")]
        lines.append(f"| {method} | " + " | ".join(cells) + f" | {int(found[0]['trainable_parameters']):,} |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", default=METHODS)
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "base_to_new.csv")
    parser.add_argument("--label", default="digits", help="of the rows; the table of this one stands in the page")
    parser.add_argument("--page", type=Path, default=DOC, help="the page, which has markers around the table")
    parser.add_argument("--one-method", action="store_true", help=argparse.SUPPRESS)
    options, extra = parse(parser, arguments)
    for method in options.methods:
        seeds = missing(options.out, options.label, method, options.seeds)
        if options.one_method:
            run_method(method, seeds, extra, options.out, options.label)
            return
        if not seeds:
            continue
        command = [sys.executable, __file__, "--one-method", "--methods", method, "--label", options.label]
        command += ["--seeds", *map(str, options.seeds), "--out", str(options.out), "--", *extra]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=os.environ)
    text = table(rows_of(options.out), options.label)
    if options.label == "digits":
        before, rest = options.page.read_text(encoding="utf-8").split("<!-- base to new -->\n", 1)
        _, after = rest.split("<!-- end of base to new -->\n", 1)
        page = f"{before}<!-- base to new -->\n{text}\n<!-- end of base to new -->\n{after}"
        options.page.write_text(page, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
