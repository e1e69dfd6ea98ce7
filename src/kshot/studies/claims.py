"""Who runs what: any number of processes share the runs of a study by files alone, on any file system they share.

A claim is a file that only one process can create. Its owner counts up a number in it; whoever watches judges by its
own clock how long the number has stood still, so that clocks which differ do not matter. A claim that stands still is
taken away by renaming it, which one of several does. An owner that was only asleep finds its claim gone, and publishes
nothing. What is published is whole or not there, and the first one stays.
"""

from __future__ import annotations

import errno
import json
import os
import secrets
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from kshot.errors import UserError, first_line
from kshot.files import make_folder, unfinished

BEAT = 5.0  # seconds between two counts of an owner
PATIENCE = 60.0  # seconds for which a claim may stand still
DIGITS = 10  # of the count, which is written over in place
NO_LINKS = {errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK}  # of FAT, some of FUSE and SMB
HEADER, PLAN = "study.json", "plan.jsonl"  # what a study's directory says of the whole
FOLDERS = ("claims", "deaths", "done", "failed", "logs", "runs")


class Claim:
    """A run that this process has for itself, until it is released or taken away."""

    def __init__(self, path: Path, worker: str, beat: float) -> None:
        self.path, self.token, self.beats, self.beat = path, secrets.token_hex(8), 0, beat
        self.file = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY)
        head = b'{"beats": "'
        self.at = len(head)
        told = json.dumps({"worker": worker, "token": self.token})[1:]
        try:
            os.write(self.file, head + b"0" * DIGITS + f'", {told}\n'.encode())
            os.fsync(self.file)
        except OSError:  # a full disk: what is there is nobody's
            os.close(self.file)
            path.unlink(missing_ok=True)
            raise
        self.ended = threading.Event()
        self.thread = threading.Thread(target=self._keep, name=f"claim on {path.name}", daemon=True)
        self.thread.start()

    def _keep(self) -> None:
        while not self.ended.wait(self.beat):
            self.beats += 1
            with suppress(OSError):  # the next one may arrive
                os.pwrite(self.file, f"{self.beats:0{DIGITS}d}".encode(), self.at)
                os.fsync(self.file)

    def held(self) -> bool:
        """Whether it is still this process's."""
        return token_in(content_of(self.path)) == self.token

    def release(self) -> None:
        """Gives it back; what another has taken away stays that other's."""
        self.ended.set()
        self.thread.join()
        with suppress(OSError):  # a disk that refuses this leaves a claim that stands still
            if self.held():
                self.path.unlink()
        os.close(self.file)


class Claims:
    """The claims on a study's runs, as one worker takes and watches them.

    Args:
        study: the directory.
        worker: what this process is called.
        beat: seconds between two signs of life of a claim of this process.
        patience: seconds without one, after which another's counts as dead. All workers of a study have the same.
    """

    def __init__(self, study: Path, worker: str, beat: float = BEAT, patience: float = PATIENCE) -> None:
        self.study, self.worker, self.beat, self.patience = study, worker, beat, patience
        self.watched: dict[str, tuple[bytes, float, float]] = {}  # content, seconds it has stood still, last look

    def take(self, run: str) -> Claim | None:
        """Claims a run; None where another has it.

        Raises:
            UserError: the folder cannot be written.
        """
        try:
            return Claim(self.study / "claims" / run, self.worker, self.beat)
        except FileExistsError:
            return None
        except OSError as error:
            raise cannot_write(self.study, error) from error

    def is_dead(self, run: str) -> bool:
        """Looks at another's claim, again and again: whether it has stood still too long, and is taken away now.

        A look counts for one beat at most, so that a watcher which slept itself takes nothing away when it wakes.
        """
        content, now = content_of(self.study / "claims" / run), time.monotonic()
        before, still, last = self.watched.get(run, (None, 0.0, now))
        still = still + min(now - last, self.beat) if content == before else 0.0
        self.watched[run] = (content, still, now)
        if still < self.patience:
            return False
        del self.watched[run]
        return self.take_away(run, token_in(content))

    def take_away(self, run: str, token: str, died: bool = True) -> bool:
        """Takes a worker's claim away, which one of several that try does, and counts the death if it was one."""
        claim, grave = self.study / "claims" / run, self.study / "deaths" / f"{run}.{self.deaths(run) + 1}"
        try:
            claim.rename(grave)
        except FileNotFoundError:
            return False
        except OSError as error:
            raise cannot_write(self.study, error) from error
        if token_in(content_of(grave)) == token:
            if not died:
                grave.unlink(missing_ok=True)
            return True
        with suppress(OSError):  # given back and claimed anew between the look and this: its owner has it back
            os.link(grave, claim)
        grave.unlink(missing_ok=True)
        return False

    def deaths(self, run: str) -> int:
        """How many workers died of a run so far."""
        return sum(1 for _ in (self.study / "deaths").glob(f"{run}.*"))

    def bury(self, worker: str, died: bool = True) -> None:
        """Takes away all claims of a worker that is known to be dead, or was ended by the one who started it."""
        for run in claimed(self.study):
            content = content_of(self.study / "claims" / run)
            if f'"worker": {json.dumps(worker)}'.encode() in content:
                self.take_away(run, token_in(content), died)


def content_of(path: Path) -> bytes:
    """What a claim holds; nothing where there is none."""
    try:
        return path.read_bytes()
    except OSError:
        return b""


def token_in(content: bytes) -> str:
    """The word by which a claim differs from all others; nothing in one that is not whole."""
    try:
        return str(json.loads(content)["token"])
    except (ValueError, KeyError, TypeError):
        return ""


def publish(folder: Path, run: str, record: dict[str, Any]) -> bool:
    """Writes ``folder/run.json``, whole or not at all; False where there is one already, which stays.

    Raises:
        UserError: the folder cannot be written.
    """
    final = folder / f"{run}.json"
    beside = unfinished(final)
    try:
        with beside.open("x", encoding="utf-8") as file:
            file.write(json.dumps(record, ensure_ascii=False) + "\n")
            file.flush()
            os.fsync(file.fileno())
        try:
            os.link(beside, final)
        except FileExistsError:
            return False
        except OSError as error:
            if error.errno not in NO_LINKS:
                raise
            if final.exists():
                return False
            beside.rename(final)
        return True
    except OSError as error:
        raise cannot_write(folder.parent, error) from error
    finally:
        with suppress(OSError):
            beside.unlink(missing_ok=True)


def published(folder: Path) -> set[str]:
    """The runs that have a record in a folder."""
    if not folder.is_dir():
        return set()
    return {name[:-5] for name in os.listdir(folder) if name.endswith(".json") and name[0] != "."}  # noqa: PTH208


def over(study: Path) -> set[str]:
    """The runs of a study that are done or failed."""
    return published(study / "done") | published(study / "failed")


def claimed(study: Path) -> set[str]:
    """The runs of a study that somebody has claimed.

    Raises:
        OSError: the study has no folder of claims.
    """
    return set(os.listdir(study / "claims"))  # noqa: PTH208  names are what is asked for


def make_folders(study: Path) -> None:
    """Makes the folders of a study; raises UserError where that is refused."""
    for name in FOLDERS:
        make_folder(study / name)


def cannot_write(study: Path, error: OSError) -> UserError:
    """What to say where a study's folder refuses; what is there already stays as it is."""
    why = (error.strerror or first_line(error)).lower()
    return UserError(f"{study} cannot be written ({why}): put that right, and the same sweep goes on; nothing is lost.")
