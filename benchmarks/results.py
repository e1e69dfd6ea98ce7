"""What it costs to ask 100,000 runs: seconds to make the index, to find it up to date, and to filter and pivot.

    python benchmarks/results.py

(A minute or two.) The study is made for it in a temporary folder, of 0.5 GB: each run has its own record and line of
the plan, and a ``result.json`` that it shares with others, behind a link. Seconds are those on the wall, the median of
the rounds, with files in the page cache; every query opens the study anew, and so looks at each record. ``cpu`` are
this process's, and ``megabytes`` what it holds at most, beyond what it held before.
"""

import argparse
import itertools
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

import numpy as np
from side_by_side import RESULTS, machine, peak_megabytes, print_table, write_csv

from kshot.studies.index import opened, rows
from kshot.studies.results import run_results

SHARED = 1000  # results
GRID = {
    "method": [f"method_{i:02d}" for i in range(20)],
    "dataset": [f"dataset_{i:02d}" for i in range(25)],
    "shots": [1, 2, 4, 8, 16],
    "model.adapter.rank": [1, 2, 4, 8],
    "seed": list(range(1, 11)),
}


def result(generator: np.random.Generator) -> dict[str, object]:
    """A result of the size of a true one."""
    names = ("acc", "acc_class_mean", "f1_macro", "ece", "ece_before", "brier", "zero_shot_acc")
    figures = dict(zip(names, generator.uniform(size=len(names)).tolist(), strict=True))
    bins = [{"images": 40, "confidence": 0.4321, "accuracy": 0.4567} for _ in range(12)]
    about = {"method": "M", "dataset": "d", "backbone": "b", "protocol": "all-to-all", "seed": 1, "steps": 400}
    split = {
        "shots": 4,
        "digest": f"sha256:{generator.bytes(32).hex()}",
        "counts": {"train": 40, "val": 40, "test": 539},
    }
    sizes = {"trainable_parameters": 3072, "total_parameters": 3_463_041, "checkpoint_bytes": 18_412}
    more = {
        "seconds": {"start": 0.1, "fit": 0.2, "test": 0.3},
        "finished": "2026-11-26T13:39:46+00:00",
        "device": "cpu",
    }
    ahead = {"forecast": {"accuracy": 0.9, "low": 0.8, "high": 0.95, "curve": {"4": 0.9, "8": 0.91}}}
    versions = dict.fromkeys(("kshot", "python", "torch", "lightning", "open_clip_torch", "timm"), "1.2.3")
    return (
        about | figures | {"split": split, "reliability": {"test": bins}, "versions": versions} | sizes | more | ahead
    )


def made(study: Path, runs: int) -> None:
    """Writes a study, all of whose runs are finished."""
    generator = np.random.default_rng(0)
    for name in ("done", "runs", "shared"):
        (study / name).mkdir(parents=True)
    for i in range(min(SHARED, runs)):
        (study / "shared" / f"{i}" / "001").mkdir(parents=True)
        (study / "shared" / f"{i}" / "001" / "result.json").write_text(json.dumps(result(generator), indent=2))
    with (study / "plan.jsonl").open("w") as plan:
        for i, labels in enumerate(itertools.islice(itertools.product(*GRID.values()), runs)):
            name, axes = f"{i:016x}", dict(zip(GRID, labels, strict=True))
            words = [f"--config=methods/{axes['method']}.yaml", f"--data.shots={axes['shots']}", "--run.root=runs"]
            plan.write(json.dumps({"id": name, "axes": axes, "words": words}) + "\n")
            record = {"id": name, "axes": axes, "run": f"runs/{name}/001", "seconds": 0.6, "worker": "w"}
            (study / "done" / f"{name}.json").write_text(json.dumps(record))
            (study / "runs" / name).symlink_to(Path("..", "shared", str(i % min(SHARED, runs))))


def queries(study: Path) -> dict[str, Callable[[], object]]:
    """What is asked, by name."""

    def asked(*words: str) -> Callable[[], object]:
        def ask() -> None:
            with redirect_stdout(StringIO()):
                run_results([str(study), *words])

        return ask

    return {
        "opened, up to date": lambda: opened(study),
        "filter": asked("--where", "method=method_03 shots>=4 dataset=dataset_01,dataset_07 state=done"),
        "filter and sort": asked("--where", "acc>=99%", "--sort", "acc", "--columns", "method,dataset,shots,acc"),
        "pivot of some": asked("--where", "dataset=dataset_01", "--pivot", "method", "shots"),
        "pivot of all": asked("--pivot", "method", "shots", "acc"),
        "all rows": lambda: rows(study),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=100_000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=RESULTS / "results.csv")
    options = parser.parse_args(arguments)
    print(machine())
    found: list[dict[str, object]] = []

    def measure(name: str, call: Callable[[], object], rounds: int) -> None:
        clocks = []
        for _ in range(rounds):
            wall, cpu = time.perf_counter(), time.process_time()
            call()
            clocks.append((time.perf_counter() - wall, time.process_time() - cpu))
        seconds, core = (round(statistics.median(each), 3) for each in zip(*clocks, strict=True))
        memory = round(peak_megabytes(call))
        found.append({"part": name, "runs": options.runs, "seconds": seconds, "cpu": core, "megabytes": memory})

    with tempfile.TemporaryDirectory() as folder:
        study = Path(folder) / "study"
        made(study, options.runs)

        def build() -> None:
            (study / "index.sqlite").unlink(missing_ok=True)
            opened(study)

        measure("index made", build, 1)
        for name, call in queries(study).items():
            measure(name, call, options.rounds)
        size = (study / "index.sqlite").stat().st_size
    print_table(f"what runs cost to ask; the index has {size / 1e6:.1f} MB", found)
    write_csv(options.out, found)


if __name__ == "__main__":
    main()
