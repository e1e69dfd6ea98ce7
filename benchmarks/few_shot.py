"""Accuracy of methods over shots and seeds, as one CSV row a run and one table: the numbers in README.md.

    python benchmarks/few_shot.py --config clip_16shot.yaml --methods zero_shot linear_probe coop lora

Every run is an ordinary ``kshot fit``; what follows ``--`` is handed to each of them. Each method runs in a process of
its own, so that peak memory is that method's. Rows are appended, and a row that is there already is not run again.
"""

import argparse
import csv
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

FIELDS = (
    "config", "dataset", "backbone", "method", "shots", "seed", "acc", "zero_shot_acc", "ece", "trainable_parameters",
    "checkpoint_bytes", "fit_seconds", "test_seconds", "peak_memory_mb", "split", "machine", "git_commit",
)  # fmt: skip
ONCE = ("zero_shot",)  # does not depend on the shots


def machine() -> str:
    """Processor and number of cores used, or the accelerator."""
    import platform

    import torch

    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    model = next((line for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line), "")
    return f"{model.split(':')[-1].strip() or platform.machine()}, {torch.get_num_threads()} threads"


def missing(out: Path, label: str, method: str, shots: list[int], seeds: list[int]) -> list[tuple[int, int]]:
    """Shots and seeds that have no row yet."""
    found = [row for row in rows_of(out) if (row["config"], row["method"]) == (label, method)]
    done = {(int(row["shots"]), int(row["seed"])) for row in found}
    cells = [(k, s) for k in shots for s in seeds]
    if method in ONCE:
        return [] if done.intersection(cells) else cells[:1]
    return [cell for cell in cells if cell not in done]


def run_method(config: str, method: str, cells: list[tuple[int, int]], extra: list[str], out: Path, label: str) -> None:
    """Runs one method's cells in this process and appends a row for each."""
    from kshot.commands import run

    for shots, seed in cells:
        with tempfile.TemporaryDirectory() as folder:
            arguments = ["fit", "--config", config, "--config", f"methods/{method}.yaml", "--data.shots", str(shots)]
            arguments += ["--data.split_seed", str(seed), "--seed_everything", str(seed), "--run.root", folder]
            arguments += ["--data.store_gb", "0"]  # seconds are of runs that encode for themselves
            cli = run([*arguments, "--trainer.enable_progress_bar", "false", *extra])
            result = json.loads((cli.directory / "result.json").read_text())
        row = {name: result.get(name) for name in FIELDS}
        row |= {
            "config": label, "method": method, "shots": shots, "seed": seed, "machine": machine(),
            "fit_seconds": result["seconds"]["fit"], "test_seconds": result["seconds"]["test"],
            "peak_memory_mb": round(result["peak_memory_bytes"] / 1e6), "split": result["split"]["digest"][7:23],
        }  # fmt: skip
        append(out, FIELDS, row)


def append(out: Path, fields: tuple[str, ...], row: dict[str, object]) -> None:
    """Appends a row to a CSV file, which gets a header when it is new."""
    fresh = not out.exists()
    with out.open("a", newline="") as file:
        writer = csv.DictWriter(file, fields)
        if fresh:
            writer.writeheader()
        writer.writerow(row)


def parse(parser: argparse.ArgumentParser, given: Sequence[str] | None) -> tuple[argparse.Namespace, list[str]]:
    """The script's own options, and what follows ``--`` for every run."""
    own, extra = (list(sys.argv[1:] if given is None else given), [])
    if "--" in own:
        at = own.index("--")
        own, extra = own[:at], own[at + 1 :]
    return parser.parse_args(own), extra


def rows_of(out: Path) -> list[dict[str, str]]:
    """The rows written so far."""
    if not out.exists():
        return []
    with out.open(newline="") as file:
        return list(csv.DictReader(file))


def print_table(rows: list[dict[str, str]], label: str) -> None:
    """Prints mean ± sample standard deviation of the accuracy over seeds, and what the largest run cost."""
    rows = [row for row in rows if row["config"] == label]
    shots = sorted({int(row["shots"]) for row in rows if row["method"] not in ONCE})
    by_cell: dict[tuple[str, int], list[dict[str, str]]] = defaultdict(list)
    for row in rows:
        by_cell[row["method"], int(row["shots"])].append(row)
    print(f"\n{label}: accuracy in %, mean ± sd over seeds\n")
    print("| method | " + " | ".join(map(str, shots)) + " | parameters | fit s | MB |")
    print("|---|" + "---|" * (len(shots) + 3))
    for method in dict.fromkeys(row["method"] for row in rows):
        cells = []
        for k in shots:
            found = by_cell[method, k] or (
                by_cell[method, min(s for m, s in by_cell if m == method)] if method in ONCE else []
            )
            accuracy = [100 * float(row["acc"]) for row in found]
            spread = f" ± {statistics.stdev(accuracy):.1f}" if len(accuracy) > 1 and method not in ONCE else ""
            cells.append(f"{statistics.mean(accuracy):.1f}{spread}" if accuracy else "–")
        largest = max((row for row in rows if row["method"] == method), key=lambda row: int(row["shots"]))
        cost = [r for r in rows if r["method"] == method and r["shots"] == largest["shots"]]
        seconds = statistics.mean(float(r["fit_seconds"]) for r in cost)
        memory = max(int(r["peak_memory_mb"]) for r in cost)
        parameters = f"{int(largest['trainable_parameters']):,}"
        print(f"| {method} | " + " | ".join(cells) + f" | {parameters} | {seconds:.1f} | {memory} |")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="clip_16shot.yaml")
    parser.add_argument("--methods", nargs="+", default=["zero_shot", "class_mean", "linear_probe", "coop", "lora"])
    parser.add_argument("--shots", nargs="+", type=int, default=[1, 2, 4, 8, 16])
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "few_shot.csv")
    parser.add_argument("--label", help="name of this table; by default the config's")
    parser.add_argument("--one-method", action="store_true", help=argparse.SUPPRESS)
    options, extra = parse(parser, arguments)
    label = options.label or Path(options.config).stem
    options.out.parent.mkdir(parents=True, exist_ok=True)
    for method in options.methods:
        cells = missing(options.out, label, method, options.shots, options.seeds)
        if options.one_method:
            run_method(options.config, method, cells, extra, options.out, label)
            return
        if not cells:
            continue
        command = [sys.executable, __file__, "--one-method", "--config", options.config, "--methods", method]
        command += ["--shots", *map(str, options.shots), "--seeds", *map(str, options.seeds)]
        command += ["--out", str(options.out), "--label", label, "--", *extra]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=os.environ)
    print_table(rows_of(options.out), label)


if __name__ == "__main__":
    main()
