"""Workers of a study as an array of jobs on a Slurm cluster, by submitit.

The jobs outlive the sweep. The same sweep, called again, looks at the study's folder and at the queue, and submits only
what lacks. A job that is pre-empted, or whose time is over, gives its run back and is queued again.
"""

from __future__ import annotations

import logging
import math
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kshot.cli import Ended
from kshot.errors import UserError, first_line, nearest_first
from kshot.studies.claims import over
from kshot.studies.engine_local import fitting
from kshot.studies.engines import EngineSettings, thread_variables
from kshot.studies.store import read_plan
from kshot.studies.worker import LOST_DEVICE, read_only, work

WORKERS = 8  # jobs on a cluster where no number is asked for
ASK = 20.0  # seconds between two questions to a cluster's queue
HOURS = "4:00:00"  # a job's time where none is asked for
TIMES = 1000  # that a job is queued again because its time was over
CLUSTERS = ("slurm", "local")
OWN = ("cluster", "gpus", "time", "wait")  # options that are not handed on to sbatch by their own names
log = logging.getLogger(__name__)


def start(study: Path, settings: EngineSettings) -> Slurm:
    """Submits the jobs that lack, and looks after them and those of an earlier sweep.

    Options: ``time`` of a job as Slurm writes it, ``gpus`` of a job, ``wait=no`` to end the sweep at once,
    ``cluster=local`` to try the jobs on this machine; any other is handed on to sbatch: ``partition=gpu``.

    Raises:
        UserError: submitit or Slurm is not there, an option is wrong, or Slurm refuses the jobs.
    """
    cluster = settings.options.get("cluster", CLUSTERS[0])
    if cluster not in CLUSTERS:
        raise UserError(f"cluster={cluster}: it is slurm, or local for jobs on this machine.")
    if settings.options.get("wait", "yes") not in ("yes", "no"):
        raise UserError(f"wait={settings.options['wait']}: it is yes or no.")
    return Slurm(study.absolute(), settings, cluster)


class Slurm:
    """The jobs of a study, in Slurm's queue; an :class:`~kshot.studies.engines.Engine`."""

    def __init__(self, study: Path, settings: EngineSettings, cluster: str) -> None:
        self.study, self.settings, self.cluster = study, settings, cluster
        self.folder = study / "logs" / cluster  # of submitit's files
        self.submitted: list[Any] = []
        executor = self.executor()
        self.queued, self.asked = self.ask(), time.monotonic()
        wanted = settings.workers or (WORKERS if cluster == "slurm" else fitting(settings, 0))
        lack = min(wanted, settings.runs) - len(self.queued)
        if self.queued:
            more = f"{lack} more are submitted" if lack > 0 else "no more are submitted"
            log.info("%s of the study's jobs are queued or run already (%s): %s.", len(self.queued), self.ids(), more)
        if lack > 0:
            self.submit(executor, lack)

    @property
    def told(self) -> str:
        """What the workers are, for the table."""
        where = "Slurm" if self.cluster == "slurm" else "this machine"
        return f"{len(self.queued)} jobs on {where} ({self.ids()})"

    def ids(self) -> str:
        """The jobs, an array by its number."""
        return ", ".join(sorted({job.partition("_")[0] for job in self.queued})) or "none"

    # ------------------------------------------------------------------------------------------------- submitting

    def executor(self) -> Any:
        """What submits jobs; raises UserError where there is nothing that could, or an option is wrong."""
        try:
            import submitit
        except ModuleNotFoundError as error:
            raise UserError("The engine slurm needs submitit: pip install 'kshot[slurm]'.") from error
        options = self.settings.options
        limit = minutes(options.get("time", HOURS))
        if self.cluster == "local":
            for name in options:
                if name not in OWN:
                    raise UserError(f"cluster=local takes no {name}. {nearest_first(name, OWN)}")
            executor: Any = submitit.LocalExecutor(self.folder, max_num_timeout=TIMES)
            executor.update_parameters(timeout_min=limit, gpus_per_node=whole(options.get("gpus", "0"), "gpus"))
            return executor
        for program in ("sbatch", "srun", "squeue"):
            if shutil.which(program) is None:
                raise UserError(
                    f"There is no Slurm on this machine (no {program}): sweep on a login node, or try the jobs here by "
                    "--engine-option cluster=local."
                )
        executor = submitit.SlurmExecutor(self.folder, max_num_timeout=TIMES)
        more: dict[str, Any] = {name.replace("-", "_"): value for name, value in options.items() if name not in OWN}
        if "gpus" in options:
            more["gpus_per_node"] = options["gpus"]
        cpus = more.setdefault("cpus_per_task", str(self.settings.threads))
        more.setdefault("requeue", True)  # some clusters ask for it
        executor.update_parameters(
            job_name=f"kshot-{self.study.name}",
            time=limit,
            srun_args=[f"--cpus-per-task={cpus}"],  # which srun no longer takes from sbatch
            additional_parameters=more,
        )
        return executor

    def submit(self, executor: Any, count: int) -> None:
        """Submits jobs, of which each is a worker; raises UserError where Slurm refuses them."""
        from submitit.helpers import environment_variables

        job = Job(str(self.study), self.settings.threads, self.settings.only)
        try:
            with environment_variables(**thread_variables(self.settings.threads)), executor.batch():
                self.submitted = [executor.submit(job) for _ in range(count)]
        except Exception as error:  # of submitit, and of what Slurm says
            raise UserError(f"Slurm refuses the jobs: {first_line(error)[:400]}") from error
        self.queued |= {job.job_id for job in self.submitted}
        log.info("%s jobs are submitted (%s).", count, self.ids())

    # ---------------------------------------------------------------------------------------------- looking after

    def ask(self) -> set[str]:
        """The jobs of this study that are queued or run, those of earlier sweeps as well."""
        ending = "_submitted.pkl"
        known = {file.name.removesuffix(ending) for file in self.folder.glob(f"*{ending}")}
        known = {job for job in known if not (self.folder / f"{job}_0_result.pkl").exists()}
        if not known:
            return known
        if self.cluster == "local":
            for job in self.submitted:
                job.done()  # which notices those that ended
            processes = answer("ps", "-ww", "-o", "pid=,args=", "-p", ",".join(known))
            return {line.split()[0] for line in processes.splitlines() if str(self.folder) in line}
        return known & set(answer("squeue", "--me", "--array", "--noheader", "--format=%i").split())

    def poll(self) -> int:
        """How many jobs are queued or run; 0 where the sweep is not to wait for them.

        Raises:
            UserError: none is left, and the last one was refused what it needs.
        """
        if self.settings.options.get("wait") == "no":
            return 0
        if self.cluster == "local" or time.monotonic() - self.asked >= ASK:
            try:
                self.queued = self.ask()
            except UserError as error:  # a controller that restarts
                log.warning("%s", error)
            self.asked = time.monotonic()
        if not self.queued and self.open():
            self.tell_refusal()
        return len(self.queued)

    def open(self) -> int:
        """How many runs are neither done nor failed."""
        ended = over(self.study)
        return sum(planned.id not in ended for planned in read_plan(self.study, read_only(self.settings.only)))

    def tell_refusal(self) -> None:
        """Raises UserError where jobs of this sweep ended with a refusal, with its words."""
        for job in self.submitted:
            file = self.folder / f"{job.job_id}_0_log.err"
            lines = file.read_text(encoding="utf-8", errors="replace").split("\n") if file.exists() else []
            for line in lines:
                if line.startswith("error: "):
                    raise UserError(line.removeprefix("error: "))

    def stop(self) -> None:
        """Leaves the jobs alone, which end when nothing is left to do, and says so."""
        if self.queued and self.open():
            ending = "scancel" if self.cluster == "slurm" else "kill"
            ids = self.ids().replace(",", "")
            log.info(
                "%s jobs go on without the sweep, which may be called again; '%s %s' ends them.",
                len(self.queued),
                ending,
                ids,
            )


@dataclass(frozen=True)
class Job:
    """A worker, as submitit calls it on a node.

    Args:
        study: its directory.
        threads: of the processor.
        only: of :class:`~kshot.studies.engines.EngineSettings`.
    """

    study: str
    threads: int
    only: tuple[str, ...]

    def __call__(self) -> None:
        """Works until the study is over; at the signal of pre-emption gives the run back, and is queued again."""
        import submitit
        import torch

        torch.set_num_threads(self.threads)
        number = signal.Signals[f"SIG{submitit.JobEnvironment.USR_SIG}"]
        queue_again: Any = signal.getsignal(number)

        def end(number: int, frame: object) -> None:
            del frame
            signal.signal(number, signal.SIG_IGN)
            raise Ended(number)

        try:
            signal.signal(number, end)
            work(Path(self.study), only=read_only(self.only))
        except Ended:
            queue_again(number, None)  # and exits
        except SystemExit as error:
            if error.code != LOST_DEVICE:
                raise
            queue_again(number, None)
        except UserError as error:
            print(f"error: {error}", file=sys.stderr, flush=True)
            raise SystemExit(2) from error

    def checkpoint(self) -> Any:
        """What is queued again: the same, since the study's folder says how far it is."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self)


def answer(*words: str) -> str:
    """What a program prints, also where it ends with an error; raises UserError if it does not end, or is not there."""
    try:
        return subprocess.run(words, capture_output=True, text=True, timeout=60, check=False).stdout
    except (OSError, subprocess.TimeoutExpired) as error:
        raise UserError(f"{words[0]} does not answer: {first_line(error)}") from error


def minutes(text: str) -> int:
    """A time as Slurm writes it, in minutes: ``90``, ``1:30:00``, ``2-12``; raises UserError for any other.

    Examples:
        >>> [minutes(text) for text in ("90", "90:30", "1:30:00", "2-12", "1-0:30", "1-0:30:00")]
        [90, 91, 90, 3600, 1470, 1470]
    """
    found = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", text)
    if found is None:
        raise UserError(f"time={text:.50}: it is minutes, hours:minutes:seconds or days-hours.")
    days, *parts = (None if part is None else int(part) for part in found.groups())
    given = [part for part in parts if part is not None]
    units = (60, 1, 1 / 60) if days is not None or len(given) == 3 else (1, 1 / 60)
    total = (days or 0) * 24 * 60 + sum(part * unit for part, unit in zip(given, units, strict=False))
    return max(1, math.ceil(total - 1e-9))


def whole(text: str, name: str) -> int:
    """A whole number; raises UserError for any other."""
    if not text.isdecimal():
        raise UserError(f"{name}={text:.50}: it is a whole number.")
    return int(text)
