"""Workers on this machine: one process a GPU, or as many as cores and memory carry."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from kshot.errors import UserError
from kshot.files import memory_of_machine
from kshot.studies.claims import Claims, over
from kshot.studies.engines import GRACE, MEMORY, EngineSettings, command, thread_variables
from kshot.studies.worker import worker_name

CONTEXT = 0.6e9  # bytes that CUDA takes for a process
LIVES = 3  # times that workers may die one after the other without a run ended


@dataclass
class Child:
    """A worker's process, the number of its GPU, and its name."""

    process: subprocess.Popen[bytes]
    device: int | None
    name: str


class Local:
    """Worker processes that outlive neither a Ctrl-C nor the study, but the planner where it is killed."""

    def __init__(self, study: Path, settings: EngineSettings) -> None:
        self.study, self.settings = study, settings
        gpus = 0 if settings.cpu else torch.cuda.device_count()
        count = max(1, min(settings.workers or fitting(settings, gpus), settings.runs))
        self.deaths, self.over = 0, self.count_over()
        self.children = [self.child(i % gpus if gpus else None) for i in range(count)]
        where = f" on {gpus} GPU{'s' * (gpus > 1)}" if gpus else ""
        self.told = (
            f"{count} process{'es' * (count > 1)} of {settings.threads} thread{'s' * (settings.threads > 1)}{where}"
        )

    def child(self, device: int | None) -> Child:
        """Starts a worker, in a group of its own: a Ctrl-C in the terminal is the planner's, which then ends it."""
        name = worker_name()
        environment = os.environ | thread_variables(self.settings.threads)
        if device is not None:
            visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
            environment["CUDA_VISIBLE_DEVICES"] = (
                visible[device] if device < len(visible) and visible[0] else str(device)
            )
        with (self.study / "logs" / f"{name}.log").open("ab") as log:
            process = subprocess.Popen(
                command(self.study, self.settings, name),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=environment,
                start_new_session=True,
            )
        return Child(process, device, name)

    def poll(self) -> int:
        """How many work; one that was killed is buried, and another takes its place.

        Raises:
            UserError: one was refused what it needs, or they die without ending a run.
        """
        for child in list(self.children):
            status = child.process.poll()
            if status is None:
                continue
            self.children.remove(child)
            if status == 2:
                raise UserError(self.last_line(child).removeprefix("error: "))
            if status != 0:
                self.replace(child, status)
        return len(self.children)

    def replace(self, child: Child, status: int) -> None:
        """Starts a worker in a dead one's place, unless they die one after the other."""
        Claims(self.study, "").bury(child.name)
        over = self.count_over()
        self.deaths, self.over = (1 if over > self.over else self.deaths + 1), over
        if self.deaths > LIVES * max(1, len(self.children) + 1):
            how = f"by signal {-status}" if status < 0 else f"with status {status}"
            raise UserError(
                f"Workers die without ending a run, the last {how}: {self.last_line(child)} All of it is in "
                f"{self.study / 'logs' / child.name}.log."
            )
        self.children.append(self.child(child.device))

    def count_over(self) -> int:
        """How many runs are done or failed."""
        return len(over(self.study))

    def last_line(self, child: Child) -> str:
        """The last words of a worker."""
        text = (self.study / "logs" / f"{child.name}.log").read_text(encoding="utf-8", errors="replace").strip()
        return text.splitlines()[-1][:500] if text else "it said nothing."

    def stop(self) -> None:
        """Asks all workers to end, and kills those that do not."""
        for child in self.children:
            child.process.send_signal(signal.SIGTERM)
        until = time.monotonic() + GRACE
        for child in self.children:
            try:
                child.process.wait(max(0.0, until - time.monotonic()))
            except subprocess.TimeoutExpired:
                child.process.kill()
                child.process.wait()
            Claims(self.study, "").bury(child.name, died=False)
        self.children = []


def fitting(settings: EngineSettings, gpus: int) -> int:
    """How many workers this machine carries: by cores and memory; one a GPU before the need of a run is known."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    able = max(1, cores // settings.threads)
    if gpus:
        room = min(torch.cuda.get_device_properties(i).total_memory for i in range(gpus))
        each = int(0.9 * room // (settings.memory + CONTEXT)) if settings.memory else 1
        return max(gpus, min(gpus * each, able))
    memory = memory_of_machine()
    return able if memory is None else max(1, min(able, int(memory // (settings.memory or MEMORY))))


def start(study: Path, settings: EngineSettings) -> Local:
    """Starts workers on this machine.

    Raises:
        UserError: an option, of which this engine has none.
    """
    if settings.options:
        raise UserError(f"The engine local takes no --engine-option, and is given {', '.join(settings.options)}.")
    return Local(study, settings)
