"""The worker of a study, which any engine starts: ``python -m kshot.studies STUDY``, or ``main.py worker STUDY``.

It takes one run after the other, in the order of backbones and data sets, by claims that keep others from it. Each is
an ordinary run, in this process, whose folder lies in the study's. A mistake in one is recorded, and the rest goes on.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import os
import secrets
import socket
import sys
import time
import traceback
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from kshot.commands import run as run_words
from kshot.errors import UserError, first_line, user_error_behind
from kshot.showing import Parser
from kshot.studies.claims import BEAT, PATIENCE, Claim, Claims, cannot_write, claimed, over, publish
from kshot.studies.plan import Planned
from kshot.studies.store import read_header, read_plan
from kshot.surroundings import RESUME_FROM
from kshot.warm import Warm

DEATHS = 3  # of workers, after which a run counts as failed
LOST_DEVICE = 3  # exit status of a worker whose GPU no longer answers it; its engine starts another
FULL = {errno.ENOSPC, errno.EDQUOT, errno.EROFS}
Execute = Callable[[Sequence[str]], Path]
Only = Mapping[str, frozenset[str]]


def ordinary() -> Execute:
    """What does the words of ordinary runs in this process, which lend each other the backbone."""
    warm = Warm()

    def execute(words: Sequence[str]) -> Path:
        directory = run_words(words, warm=warm).directory
        if directory is None:
            raise UserError("the run keeps nothing (trainer.fast_dev_run), and a study needs its results.")
        return directory

    return execute


def work(
    study: Path,
    *,
    name: str | None = None,
    only: Only | None = None,
    execute: Execute | None = None,
    beat: float = BEAT,
    patience: float = PATIENCE,
) -> int:
    """Works on a study until all of its runs are done or failed, and gives how many this worker ended.

    Args:
        study: directory of a study that was planned.
        name: of this worker, which no other has; by default made of host, process and chance.
        only: labels by axis; other runs are left alone.
        execute: what does the words of a run, and gives its directory; None for :func:`ordinary`.
        beat: of :class:`~kshot.studies.claims.Claims`.
        patience: of the same.

    Raises:
        UserError: the study is of other versions, or its disk is full or may not be written.
    """
    study = study.absolute()
    header = read_header(study)
    runs = read_plan(study, only)
    worker = Worker(study, name or worker_name(), execute or ordinary(), beat, patience)
    if not Path(header.directory).is_dir():
        raise UserError(
            f"{header.directory}, from where {study} was planned, is not on this machine: share it as well."
        )
    try:
        with contextlib.chdir(header.directory):
            return sum(worker.end(planned, claim) for planned, claim in worker.taken(runs))
    except OSError as error:  # of the study's own files: what a run raises is that run's
        raise cannot_write(study, error) from error


def worker_name() -> str:
    """A name that no other worker has."""
    return f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(2)}"


class Worker:
    """A worker on a study; see :func:`work`."""

    def __init__(self, study: Path, name: str, execute: Execute, beat: float, patience: float) -> None:
        self.study, self.name, self.execute = study, name, execute
        self.claims = Claims(study, name, beat, patience)
        self.log = study / "logs" / f"{name}.log"

    # ------------------------------------------------------------------------------------------------ which run

    def taken(self, runs: Sequence[Planned]) -> Iterator[tuple[Planned, Claim]]:
        """Claims run after run; those that others have claimed are looked at again in the end, until they are over."""
        ended = over(self.study)
        waiting: list[Planned] = []
        groups: dict[str, deque[Planned]] = {}
        for planned in runs:
            if planned.id not in ended:
                groups.setdefault(planned.group, deque()).append(planned)
        of = {planned.id: planned.group for queue in groups.values() for planned in queue}
        while groups or waiting:
            while groups:
                group = self.quietest(groups, of)
                for planned in iter_left(groups[group]):
                    claim = self.claims.take(planned.id)
                    if claim is None:
                        waiting.append(planned)
                    elif self.is_over(planned.id):
                        claim.release()
                    else:
                        yield planned, claim
                del groups[group]
            waiting = [planned for planned in waiting if not self.is_over(planned.id)]
            for planned in list(waiting):
                claim_file = self.study / "claims" / planned.id
                if not claim_file.exists() or self.claims.is_dead(planned.id):
                    waiting.remove(planned)
                    groups.setdefault(planned.group, deque()).append(planned)
            if waiting and not groups:
                time.sleep(min(1.0, self.claims.beat))

    def quietest(self, groups: Mapping[str, deque[Planned]], of: Mapping[str, str]) -> str:
        """The group that fewest workers are at; of equals the first."""
        busy = Counter(of[run] for run in claimed(self.study) if run in of)
        return min(groups, key=lambda group: busy[group])

    def is_over(self, run: str) -> bool:
        """Whether a run is done or failed."""
        return any((self.study / folder / f"{run}.json").exists() for folder in ("done", "failed"))

    # --------------------------------------------------------------------------------------------------- one run

    def end(self, planned: Planned, claim: Claim) -> bool:
        """Does a claimed run, and publishes what came of it, unless the claim was taken away in the meantime."""
        begun, reason, directory = time.monotonic(), None, None
        deaths = self.claims.deaths(planned.id)
        try:
            if deaths >= DEATHS:
                reason = (
                    f"its worker died {deaths} times: too little memory? The last words are in {self.study / 'logs'}"
                )
            else:
                reason, directory = self.attempt(planned)
            if not claim.held():  # this process was asleep for too long, and another has taken the run
                self.note(
                    f"{planned.id}: the claim was taken away while this worker stood still; nothing is published."
                )
                return False
            record: dict[str, Any] = {"id": planned.id, "axes": planned.axes}
            if directory is not None:
                record |= {"run": directory.relative_to(self.study).as_posix()}
            else:
                record |= {"reason": reason, "attempts": deaths + (deaths < DEATHS)}
            record |= {
                "seconds": round(time.monotonic() - begun, 3),
                "worker": self.name,
                "finished": datetime.now(UTC).isoformat(timespec="seconds"),
            }
            first = publish(self.study / ("failed" if directory is None else "done"), planned.id, record)
            if reason and "CUDA error" in reason:  # after which nothing works any more in this process
                raise SystemExit(LOST_DEVICE)
            return first
        finally:
            claim.release()

    def attempt(self, planned: Planned) -> tuple[str | None, Path | None]:
        """Runs, going on from where a dead worker left off where that is possible; gives a reason, or the directory."""
        own = ["--trainer.enable_progress_bar=false", f"--run.root={self.study / 'runs'}", f"--run.name={planned.id}"]
        with self.logged(planned):
            begun = self.begun(planned.id)
            if begun is not None:
                try:
                    return None, self.execute(["fit", "--resume", str(begun)])
                except UserError as error:
                    print(f"{begun} does not go on ({error}): it is run anew.", file=sys.stderr)
            try:
                return None, self.execute(["fit", *planned.words, *own])
            except (Exception, SystemExit) as error:
                self.refuse_a_full_disk(error)
                mistake = user_error_behind(error)
                if mistake is None:
                    traceback.print_exc()
                    return f"{type(error).__name__}: {first_line(error)}", None
                return " ".join(str(mistake).split()), None

    def begun(self, run: str) -> Path | None:
        """The last directory of a run, where it can go on from there."""
        directories = sorted(path for path in (self.study / "runs" / run).glob("*") if path.name.isdigit())
        last = directories[-1] if directories else Path()
        able = directories and last.joinpath(*RESUME_FROM).is_file() and not (last / "result.json").exists()
        return last if able else None

    def refuse_a_full_disk(self, error: BaseException) -> None:
        """Raises UserError where not the run is to blame, but the disk, on which the next one would fail as well."""
        behind: BaseException | None = error
        while behind is not None:
            if isinstance(behind, OSError) and behind.errno in FULL:
                raise cannot_write(self.study, behind) from error
            if "No space left on device" in str(behind):  # as torch and safetensors tell it
                raise cannot_write(self.study, OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))) from error
            behind = behind.__cause__ or behind.__context__

    @contextlib.contextmanager
    def logged(self, planned: Planned) -> Iterator[None]:
        """Sends what a run prints to this worker's log."""
        with self.log.open("a", encoding="utf-8", errors="backslashreplace") as log:
            print(f"\n== {planned.id} {dict(planned.axes)} {datetime.now(UTC):%F %T}", file=log, flush=True)
            with contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
                yield

    def note(self, line: str) -> None:
        """Writes a line to this worker's log."""
        with self.log.open("a", encoding="utf-8") as log:
            print(line, file=log)


def iter_left(queue: deque[Planned]) -> Iterator[Planned]:
    """Takes from a queue until it is empty."""
    while queue:
        yield queue.popleft()


def read_only(given: Sequence[str]) -> dict[str, frozenset[str]]:
    """Labels by axis from words such as ``method=gda,ridge``; raises UserError for others."""
    only: dict[str, frozenset[str]] = {}
    for word in given:
        axis, equals, labels = word.partition("=")
        if not equals or not axis or not labels:
            raise UserError(f"--only takes an axis and its labels, as in --only method=gda,ridge, and not {word!r}.")
        only[axis] = only.get(axis, frozenset()) | frozenset(labels.split(","))
    return only


def run_worker(words: Sequence[str]) -> int:
    """Reads the words after ``python main.py worker``, and works until the study is over."""
    parser = Parser(prog="main.py worker", description="Works on a study until all of its runs are over.")
    parser.add_argument("study", type=Path, help="its directory")
    parser.add_argument("--name", help="of this worker (default: made of host and process)")
    parser.add_argument("--threads", type=int, default=1, help="of the processor (default: 1)")
    parser.add_argument("--only", nargs="+", default=[], metavar="AXIS=LABEL", help="leave other runs alone")
    parser.add_argument("--beat", type=float, default=BEAT, help=argparse.SUPPRESS)
    parser.add_argument("--patience", type=float, default=PATIENCE, help=argparse.SUPPRESS)
    given = parser.parse_args(list(words))
    torch.set_num_threads(given.threads)
    only = read_only(given.only)
    work(given.study, name=given.name, only=only, beat=given.beat, patience=given.patience)
    return 0
