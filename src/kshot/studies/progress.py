"""How far a study is: what is done, running, failed and open, and how long the rest will take."""

from __future__ import annotations

import json
import shutil
import statistics
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from rich.table import Table

from kshot.files import amount, memory_of_machine
from kshot.studies.claims import claimed, published
from kshot.studies.plan import Planned
from kshot.studies.store import read_record

SAMPLES = 20  # finished runs whose memory and disk are looked at
Kind = tuple[str, str]  # method and group of runs that cost about the same


class Progress:
    """The state of some runs of a study, from its files.

    Args:
        study: the directory, which need not be there yet.
        runs: that are asked about.
    """

    def __init__(self, study: Path, runs: Sequence[Planned]) -> None:
        self.study, self.runs = study, {run.id: run for run in runs}
        self.open = dict(self.runs)
        self.records: dict[str, dict[str, dict[str, Any]]] = {"done": {}, "failed": {}}
        self.costs: dict[Kind, list[float]] = defaultdict(list)  # seconds of finished runs
        self.running: set[str] = set()
        self.workers = 1
        self.look()

    def look(self) -> None:
        """Reads what was published since the last look."""
        for folder, found in self.records.items():
            for run in published(self.study / folder) & self.open.keys():
                found[run] = read_record(self.study / folder / f"{run}.json")
                if folder == "done":
                    self.costs[kind(self.open[run])].append(found[run]["seconds"])
                del self.open[run]
        with suppress(FileNotFoundError, NotADirectoryError):
            self.running = self.open.keys() & claimed(self.study)

    def seconds_left(self) -> float | None:
        """Seconds of one worker for all open runs, by the mean cost of their kind; None where none is known."""
        means = {each: statistics.fmean(costs) for each, costs in self.costs.items()}
        if not means:
            return None
        usual = statistics.fmean(means.values())
        return sum(means.get(kind(run), usual) for run in self.open.values())

    def time_left(self) -> str:
        """The time for all open runs in words."""
        seconds = self.seconds_left()
        return "not known before the first run" if seconds is None else spoken(seconds / max(1, self.workers))

    def line(self) -> str:
        """All in one line."""
        done, failed = (len(records) for records in self.records.values())
        left = f", {self.time_left()} left" if self.costs and self.open else ""
        return f"{done} of {len(self.runs)} done, {len(self.running)} running, {failed} failed{left}"

    def table(self, told: str) -> Table:
        """All by method, or by what else the first axis is, for rich to show."""
        counts: dict[str, list[int]] = defaultdict(lambda: [0, 0, 0, 0])
        for run, planned in self.runs.items():
            state = next((i for i, found in enumerate(self.records.values()) if run in found), 3)
            counts[row(planned)][2 if run in self.running else (0, 1, 2, 3)[state]] += 1
        table = Table(title=f"{self.study} · {told}", title_justify="left", caption=self.line(), caption_justify="left")
        table.add_column("method")
        for name in ("done", "failed", "running", "open"):
            table.add_column(name, justify="right")
        for name, numbers in counts.items():
            table.add_row(name, *(str(number) if number else "" for number in numbers))
        return table

    def plan(self, seconds: float) -> Iterator[str]:
        """What there is to do, and what it takes, as lines."""
        done, failed = (len(records) for records in self.records.values())
        yield f"{len(self.runs):,} runs in {self.study}, planned in {seconds:.1f} s."
        yield f"{done:,} done, {failed:,} failed, {len(self.open):,} open."
        if failed:
            yield "What has failed is run again with --retry."
        groups: dict[str, int] = defaultdict(int)
        for run in self.open.values():
            groups[run.group] += 1
        for group, count in groups.items():
            yield f"  {group}: {count:,} runs"
        total = self.seconds_left()
        yield f"time: {'not known before the first run' if total is None else f'{spoken(total)} of one worker'}"
        memory, disk = self.sizes()
        free = shutil.disk_usage(
            next(p for p in (self.study.absolute(), *self.study.absolute().parents) if p.exists())
        ).free
        machine = memory_of_machine()
        yield f"memory: {told(memory)} a worker, and this machine has {told(machine)}"
        yield f"disk: {told(disk and disk * len(self.open))} for what is open, and {amount(free)} are free"

    def sizes(self) -> tuple[float | None, float | None]:
        """Most memory and mean disk of some finished runs, in bytes; None where there is none."""
        memory, disk = [], []
        for record in list(self.records["done"].values())[-SAMPLES:]:
            directory = self.study / record["run"]
            with suppress(OSError, ValueError):
                result = json.loads((directory / "result.json").read_text(encoding="utf-8"))
                memory.append(result.get("peak_memory_bytes") or 0)
                disk.append(sum(file.stat().st_size for file in directory.rglob("*") if file.is_file()))
        return (max(memory), statistics.fmean(disk)) if disk else (None, None)

    def tell_end(self) -> int:
        """Prints how it ended, failed runs by their reasons, and gives the exit status."""
        print(f"{self.line()}: {self.study}")
        reasons: dict[str, list[str]] = defaultdict(list)
        for run, record in self.records["failed"].items():
            reasons[record["reason"]].append(
                ", ".join(f"{axis} {label}" for axis, label in self.runs[run].axes.items())
            )
        for reason, cells in reasons.items():
            more = f" and {len(cells) - 1} more" if len(cells) > 1 else ""
            print(f"failed: {cells[0]}{more}: {reason}")
        return 1 if reasons or self.open else 0


def kind(run: Planned) -> Kind:
    """What runs of about the same cost have in common: method, backbone and data set."""
    return row(run), run.group


def row(run: Planned) -> str:
    """The method of a run, or the label of another first axis."""
    return str(run.axes.get("method", next(iter(run.axes.values()), "")))


def told(size: float | None) -> str:
    """Bytes in words."""
    return "not known before the first run" if size is None else amount(size)


def spoken(seconds: float) -> str:
    """A time in words: ``40 s``, ``12 min``, ``3.5 h``."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
