"""What a study saves over one process a run, and what planning and claiming cost.

    python benchmarks/sweep.py

``runs`` are 48 short runs on handwritten digits (4 methods x 4 shots x 3 seeds): all of ``main.py sweep``, its planner
and the start of its workers included, beside ``main.py fit`` with the words of some of them, each in a process of its
own. ``steady`` is what remains of a run in a long study: of the same words in a worker that has begun.
Costs are CPU seconds of all processes, so that the ratios hold although other work shares the cores; on a machine that
does nothing else they are those of runs per hour. Targets: 5 times the runs per hour, 50 times for closed forms alone.
``scheduling`` is planning, claiming and publishing with runs that do nothing: at most 20 ms a run. ``planner`` is
``sweep --dry-run`` of 100,000 cells: at most 10 s and 1 GB.
"""

import argparse
import gc
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import chdir
from functools import partial
from pathlib import Path

import torch
from side_by_side import RESULTS, machine, print_table, printed_by, write_csv

from kshot.studies.plan import Planned, Planner
from kshot.studies.store import read_plan, write_study
from kshot.studies.study import read_study
from kshot.studies.worker import Execute, ordinary, work

MAIN = str(Path(__file__).resolve().parents[1] / "main.py")
CASES = {  # methods, and how many times the runs per hour are wanted
    "mixed": (["class_mean", "ridge", "linear_probe", "coop"], 5),
    "closed forms": (["class_mean", "gda", "ridge", "kernel_ridge"], 50),
}
PLAN = """  # what it holds and takes, without what libraries do while the process ends
import sys, time
from kshot.lean import load_lightning
load_lightning()
from kshot.studies.sweep import run_sweep
megabytes = lambda: int(open("/proc/self/status").read().partition("VmHWM:")[2].split()[0]) / 1000
before, cpu, begun = megabytes(), time.process_time(), time.perf_counter()
run_sweep(sys.argv[1:])
print(before, megabytes(), time.process_time() - cpu, time.perf_counter() - begun)
"""
MANY = [*CASES["mixed"][0], "class_mean_text", "gda", "kernel_ridge", "kgcoop", "lora", "dora", "promptsrc", "maple"]
MANY += ["vera", "clip_adapter", "tip_adapter", "prolip", "task_res", "clap", "2sfs", "zero_shot", "pissa"]


def study(folder: Path, name: str, **axes: Sequence[object]) -> Path:
    """A study file on the digits; steps are few, as runs are to be short."""
    options = {"trainer.accelerator": "cpu", "trainer.max_epochs": 10}
    file = folder / f"{name}.yaml"
    file.write_text(json.dumps({"base": ["clip_16shot.yaml"], "options": options, "grid": axes}))
    return file


def cost(command: Sequence[str]) -> tuple[float, float]:
    """CPU seconds and wall seconds of a command and its children."""
    begun = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, env=os.environ | {"OMP_NUM_THREADS": "1"})
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0, command
    return used.ru_utime + used.ru_stime, time.perf_counter() - begun


def here(execute: Execute, words: Sequence[str]) -> float:
    """CPU seconds of a run in this process."""
    begun = time.process_time()
    execute(words)
    return time.process_time() - begun


def planned(folder: Path, file: Path) -> tuple[Path, list[Planned]]:
    read = read_study(str(file))
    runs = Planner(read).runs()
    write_study(folder / read.name, read, runs)
    return folder / read.name, runs


def compare(folder: Path, case: str, options: argparse.Namespace) -> dict[str, object]:
    """A sweep beside single processes."""
    methods, wanted = CASES[case]
    shots, seeds = [1, 2, 4, 8][: options.shots], list(range(1, options.seeds + 1))
    file = study(folder, case.replace(" ", "_"), method=methods, shots=shots, seed=seeds)
    directory, runs = planned(folder, file)
    if options.in_process:
        cpu, begun = time.process_time(), time.perf_counter()
        work(directory)
        swept = (time.process_time() - cpu, time.perf_counter() - begun)
    else:
        swept = cost([sys.executable, MAIN, "sweep", "--config", str(file), "--out", str(directory)])
    done = [json.loads(each.read_text()) for each in (directory / "done").iterdir()]
    assert len(done) == len(runs), f"{len(done)} of {len(runs)} runs were done"
    words = [["fit", *r.words, "--trainer.enable_progress_bar=false", f"--run.root={folder / 'alone'}"] for r in runs]
    execute = ordinary()
    torch.set_num_threads(1)  # as a worker has, which does not search what is here already for garbage either
    gc.freeze()
    steady = [here(execute, each) for each in (words[0], *words)][1:]  # the first loads what the others share
    sampled = words[:: max(1, len(runs) // options.samples)][: options.samples]
    alone = steady if options.in_process else [cost([sys.executable, MAIN, *each])[0] for each in sampled]
    each, one, remains = swept[0] / len(runs), statistics.fmean(alone), statistics.fmean(steady)
    return {
        "part": case, "runs": len(runs), "alone_cpu_s": round(one, 2), "sweep_cpu_s": round(each, 3),
        "sweep_wall_s": round(swept[1], 1), "ratio": round(one / each, 1), "target": wanted,
        "steady_cpu_s": round(remains, 3), "steady_ratio": round(one / remains, 1),
    }  # fmt: skip


def schedule(folder: Path, count: int) -> dict[str, object]:
    """Planning, claiming and publishing of runs that do nothing."""
    file = study(folder, "nothing", method=["ridge", "gda"], shots=[1, 2], seed=list(range(1, count // 4 + 1)))
    begun = time.perf_counter()
    directory, runs = planned(folder, file)
    ended = work(directory, execute=lambda words: Path(words[-2].partition("=")[2], words[-1].partition("=")[2], "001"))
    seconds = time.perf_counter() - begun
    assert ended == len(runs) == len(read_plan(directory))
    return {"part": "scheduling", "runs": len(runs), "ms_a_run": round(1000 * seconds / len(runs), 2), "target": 20}


def plan_many(folder: Path, options: argparse.Namespace) -> dict[str, object]:
    """A dry run of very many cells."""
    count = options.cells
    methods = MANY[: max(1, min(len(MANY), count // 25))]
    axes = {"shots": [1, 2, 4, 8, 16], "data.batch_size": [8, 16, 32, 64, 128]}
    seeds = list(range(1, count // (25 * len(methods)) + 1))
    file = study(folder, "many", method=methods, **axes, seed=seeds)
    words = ["--config", str(file), "--dry-run"]
    before, peak, cpu, wall = printed_by(PLAN, words, options.in_process)
    return {
        "part": "planner", "runs": 25 * len(methods) * len(seeds), "planning_s": round(wall, 2),
        "planning_cpu_s": round(cpu, 1), "libraries_mb": round(before), "peak_mb": round(peak),
        "target": "10 s, 1000 MB",
    }  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", nargs="+", default=["runs", "scheduling", "planner"])
    parser.add_argument("--shots", type=int, default=4, help="how many of 1, 2, 4, 8 images a class")
    parser.add_argument("--seeds", type=int, default=3, help="how many")
    parser.add_argument("--samples", type=int, default=8, help="runs that get a process of their own")
    parser.add_argument("--nothing", type=int, default=2000, help="runs that do nothing")
    parser.add_argument("--cells", type=int, default=100_000, help="of the plan")
    parser.add_argument("--in-process", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, default=RESULTS / "sweep.csv")
    options = parser.parse_args(arguments)
    print(machine())
    rows = []
    with tempfile.TemporaryDirectory() as place, chdir(place):
        folder = Path(place)
        parts = [partial(compare, folder, case, options) for case in CASES if "runs" in options.part]
        parts += [partial(schedule, folder, options.nothing)] * ("scheduling" in options.part)
        parts += [partial(plan_many, folder, options)] * ("planner" in options.part)
        for part in parts:
            rows.append(part())
            print_table(str(rows[-1]["part"]), rows[-1:])
    names = list(dict.fromkeys(name for row in rows for name in row))
    write_csv(options.out, [{name: row.get(name, "") for name in names} for row in rows])


if __name__ == "__main__":
    main()
