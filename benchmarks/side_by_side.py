"""What the other benchmarks share: interleaved timing, paired ratios, and a CSV that names the machine.

On a CPU the clock is the process's own CPU time and torch gets one thread unless told otherwise: then the ratios hold
although other work shares the cores. On a GPU the clock is the wall's.
"""

import csv
import ctypes
import gc
import io
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from unittest.mock import patch

import torch

from kshot.backbones import OpenClip
from kshot.backbones.open_clip import resolve

RESULTS = Path(__file__).parent / "results"


def machine() -> str:
    """Processor or accelerator, number of threads and version of torch."""
    if torch.cuda.is_available():
        name = torch.cuda.get_device_name()
    else:
        info = Path("/proc/cpuinfo")
        lines = info.read_text().splitlines() if info.is_file() else []
        found = next((line.split(":")[-1].strip() for line in lines if line.startswith("model name")), "")
        name = f"{found or platform.machine()} ({os.cpu_count()} cores)"
    return f"{name}, {torch.get_num_threads()} threads, torch {torch.__version__}"


def printed_by(program: str, words: Sequence[str], in_process: bool = False) -> list[float]:
    """The numbers in the last line that a program prints, in a process of its own, or in this one: not exact."""
    if in_process:
        with patch.object(sys, "argv", ["-c", *words]), redirect_stdout(io.TextIOWrapper(io.BytesIO())) as out:
            exec(program, {})
            out.seek(0)
            said = out.read()
    else:
        command = [sys.executable, "-c", program, *words]
        said = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
    return [float(each) for each in said.splitlines()[-1].split()]


def clip_of(model: str) -> torch.nn.Module:
    """A model of open_clip as open_clip builds it, frozen, with random weights unless it carries its own."""
    import open_clip

    return open_clip.create_model(resolve(model)).eval().requires_grad_(False)


def our_clip(model: str, text_memory_gb: float | None = None) -> OpenClip:
    """The same as kshot builds it; from one seed, both get the same random weights."""
    return OpenClip(model, None if ":" in model else "random", text_memory_gb=text_memory_gb)


def now() -> float:
    """The clock: CPU seconds of this process, or wall seconds once the GPU is idle."""
    if not torch.cuda.is_available():
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def interleave(
    calls: dict[str, Callable[[], object]], seconds: float, least: int = 3, most: int = 200, warm_up: int = 1
) -> dict[str, list[float]]:
    """Seconds of each call by :func:`now`, taken in turns A B A B, with the order reversed from round to round.

    Args:
        calls: what to run, by name.
        seconds: after this time on the wall no new round begins.
        least: rounds that are run whatever they take.
        most: rounds at most.
        warm_up: rounds that do not count.
    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    begun = time.perf_counter()
    for i in range(most + warm_up):
        if i >= least + warm_up and time.perf_counter() - begun > seconds:
            break
        for name in list(calls)[:: 1 if i % 2 else -1]:
            start = now()
            calls[name]()
            if i >= warm_up:
                times[name].append(now() - start)
    return times


def ratio(a: list[float], b: list[float]) -> tuple[float, float]:
    """Median over rounds of a / b, each within its own round, and half the range between the quartiles over √rounds.

    Other work on the machine slows the two halves of a round alike, so this is steadier than a ratio of medians.
    """
    ratios = [x / y for x, y in zip(a, b, strict=True)]
    if len(ratios) < 3:
        return statistics.median(ratios), float("nan")
    low, _, high = statistics.quantiles(ratios, n=4)
    return statistics.median(ratios), (high - low) / 2 / len(ratios) ** 0.5


def peak_megabytes(call: Callable[[], object]) -> float:
    """The most memory that a call holds at once, beyond what the process holds before it; NaN where this is unknown."""
    if torch.cuda.is_available():
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        return (torch.cuda.max_memory_allocated() - before) / 1e6
    try:
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)  # hands freed memory back, or the call would take it unseen
        Path("/proc/self/clear_refs").write_text("5")  # sets the peak to what is held now
        before = resident("VmRSS")
        call()
        return (resident("VmHWM") - before) / 1e6
    except (OSError, AttributeError):
        return float("nan")


def resident(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def milliseconds(times: list[float]) -> float:
    """Median, rounded."""
    return round(1000 * statistics.median(times), 3)


def difference(a: torch.Tensor, b: torch.Tensor) -> tuple[float, float]:
    """Largest absolute difference, and the same as a share of the largest absolute value of b."""
    largest = (a.detach().double() - b.detach().double()).abs().max().item()
    return largest, largest / max(b.detach().double().abs().max().item(), 1e-300)


def write_csv(path: Path, rows: list[dict[str, object]]) -> None:
    """Writes the rows, each with the machine they were measured on."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [*rows[0], "machine"])
        writer.writeheader()
        writer.writerows(row | {"machine": machine()} for row in rows)
    print(f"\nwritten: {path}")


def print_table(title: str, rows: list[dict[str, object]]) -> None:
    """Prints rows as a Markdown table."""
    print(f"\n{title}\n\n| " + " | ".join(rows[0]) + " |\n|" + "---|" * len(rows[0]))
    for row in rows:
        print("| " + " | ".join(map(shown, row.values())) + " |")


def shown(value: object) -> str:
    if not isinstance(value, float):
        return str(value)
    return f"{value:.3g}" if abs(value) < 0.1 else f"{value:.3f}".rstrip("0").rstrip(".")
