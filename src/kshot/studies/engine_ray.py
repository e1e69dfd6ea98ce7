"""Workers of a study on a Ray cluster: an actor each, as many as its nodes hold, a new one for each that dies.

Ray lives in a process of its own beside the sweep: what it changes in a process, its messages, and its end when the
cluster goes away, stay there. That process tells the sweep in lines of JSON how its workers are, and ends with it.
"""

from __future__ import annotations

import json
import logging
import os
import secrets
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import suppress
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from queue import Empty, SimpleQueue

from kshot.errors import UserError, first_line, nearest_first
from kshot.studies.engines import GRACE, MEMORY, EngineSettings
from kshot.studies.ray_keeper import Asked

REACH = 60.0  # seconds in which a cluster must answer
OPTIONS = ("address", "gpus_per_worker")
log = logging.getLogger(__name__)


def start(study: Path, settings: EngineSettings) -> Ray:
    """Starts workers on a cluster: of the option ``address``, or of this machine alone.

    Raises:
        UserError: Ray is not installed, an option is wrong, or nothing listens at the address.
    """
    if find_spec("ray") is None:
        raise UserError("The engine ray needs Ray: pip install 'kshot[ray]'.")
    for name in settings.options:
        if name not in OPTIONS:
            raise UserError(f"The engine ray has no option {name!r}. {nearest_first(name, OPTIONS)}")
    gpus = share_of_gpu(settings.options.get("gpus_per_worker"), settings.cpu)
    address = settings.options.get("address", os.environ.get("RAY_ADDRESS", ""))
    check_address(address)
    workers = min(settings.runs, settings.workers or settings.runs)
    memory = (settings.cpu and settings.memory) or MEMORY
    return Ray(Asked(str(study.absolute()), address, workers, settings.threads, gpus, memory, settings.only))


def share_of_gpu(given: str | None, cpu: bool) -> float | None:
    """GPUs of a worker, from the option; raises UserError for a number that Ray does not take."""
    if given is None:
        return 0.0 if cpu else None
    try:
        share = float(given)
    except ValueError:
        share = -1.0
    if not (0 <= share < 1 or (share.is_integer() and share > 0)):
        raise UserError(f"gpus_per_worker is a share of one, as 0.25, or whole ones, and is given {given!r:.100}.")
    return share


def check_address(address: str) -> None:
    """Looks whether something listens at an address; raises UserError if not, or if it is none."""
    if address in ("", "auto"):
        return
    host, _, port = address.rpartition(":")
    if not host or "/" in host or not port.isdecimal():
        raise UserError(f"address is HOST:PORT or auto, and is given {address!r:.200}: sweep on a node of the cluster.")
    try:
        socket.create_connection((host, int(port)), timeout=5).close()
    except (OSError, OverflowError) as error:
        raise UserError(f"The Ray cluster {address} is out of reach ({first_line(error).lower()}).") from None


class Ray:
    """The process that speaks to Ray, as the sweep sees it; an :class:`~kshot.studies.engines.Engine`."""

    def __init__(self, asked: Asked) -> None:
        environment = os.environ | {"RAY_USAGE_STATS_ENABLED": "0"}
        if not asked.address:  # a key of its own, lest Ray leaves one in the user's home
            environment |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
        self.where = f"Ray cluster {asked.address or 'of this machine'}"
        self.told = f"workers on the {self.where}"
        self.log = Path(asked.study) / "logs" / f"ray-{socket.gethostname()}-{os.getpid()}.log"
        with self.log.open("w", encoding="utf-8") as file:
            self.process = subprocess.Popen(
                [
                    sys.executable,
                    "-c",
                    "from kshot.studies.ray_keeper import drive; drive()",
                    json.dumps(asdict(asked)),
                ],
                stdin=subprocess.PIPE,  # which is closed when the sweep ends, however that happens
                stdout=subprocess.PIPE,
                stderr=file,
                env=environment,
                text=True,
                start_new_session=True,  # Ctrl-C is for the sweep, which then ends this
            )
        self.workers, self.begun = 0, time.monotonic()
        self.reached = self.over = False
        self.lines: SimpleQueue[str] = SimpleQueue()
        self.listener = threading.Thread(target=self.listen, daemon=True)
        self.listener.start()

    def listen(self) -> None:
        """Keeps the lines of the process."""
        for line in self.process.stdout or ():
            self.lines.put(line)

    def poll(self) -> int:
        """How many work; tells what the process told.

        Raises:
            UserError: the cluster is out of reach or gone, or no node of it takes a run.
        """
        ended = self.process.poll() is not None
        if ended:
            self.listener.join()
        with suppress(Empty):
            while True:
                self.hear(self.lines.get_nowait())
        if ended and not self.over:
            raise UserError(
                f"The {self.where} is gone: finished runs stay, and the same sweep goes on. See {self.log}."
            )
        if not ended and not self.reached and time.monotonic() - self.begun > REACH:
            self.kill()
            raise UserError(f"The {self.where} does not answer for {REACH:.0f} seconds: see {self.log}.")
        return 0 if ended else max(1, self.workers)

    def hear(self, line: str) -> None:
        """Takes in a line of the process; raises UserError where it tells of one."""
        try:
            told = json.loads(line)
        except ValueError:  # of a library that printed
            return
        self.reached = True
        self.over = "over" in told
        if "error" in told:
            raise UserError(told["error"])
        if "note" in told:
            log.warning("%s", told["note"])
        if "workers" in told:
            self.workers, self.told = told["workers"], f"{told['workers']} on {told['nodes']} nodes of the {self.where}"

    def stop(self) -> None:
        """Ends all workers: each gives back what it holds, or is killed after a while."""
        with suppress(OSError):
            if self.process.stdin:
                self.process.stdin.close()
        try:
            self.process.wait(GRACE + 10)
        except subprocess.TimeoutExpired:
            self.kill()

    def kill(self) -> None:
        """Ends the process, and a cluster of its own with it."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
