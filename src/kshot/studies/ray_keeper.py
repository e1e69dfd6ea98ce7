"""The process that keeps a study's workers on a Ray cluster; :mod:`kshot.studies.engine_ray` starts it.

Its standard input ends when the sweep does, and on its standard output it tells how the workers are, in lines of JSON.
"""

from __future__ import annotations

import json
import logging
import os
import secrets
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from kshot.cli import Ended, ending_on_signals
from kshot.errors import UserError, first_line
from kshot.studies.claims import Claims
from kshot.studies.engines import GRACE, thread_variables

LOOK = 0.5  # seconds between two looks at the cluster
SETTLE = 3.0  # seconds by which a worker may be missed before its node is
DEATHS = 10  # of workers on a node, after which it is left alone
OBJECTS = 80_000_000  # bytes of the store of objects of a cluster of our own, which holds none; Ray's smallest


@dataclass(frozen=True)
class Asked:
    """What is asked of the cluster.

    Attributes:
        study: the directory of the study, by which all nodes find it.
        address: ``host:port`` or ``auto`` of a cluster; nothing for one on this machine, which ends with the sweep.
        workers: at most.
        threads: of a worker, and so Ray's CPUs.
        gpus: of a worker; None for one where a node has any.
        memory: bytes that a worker needs of its node.
        only: of :class:`~kshot.studies.engines.EngineSettings`.
    """

    study: str
    address: str
    workers: int
    threads: int
    gpus: float | None
    memory: float
    only: tuple[str, ...]


def drive() -> None:
    """Keeps workers on the cluster until nothing is left to do, or the sweep that started this process is gone."""
    words = json.loads(sys.argv[1])
    asked, ended = Asked(**words | {"only": tuple(words["only"])}), threading.Event()

    def listen() -> None:
        sys.stdin.read()
        ended.set()

    threading.Thread(target=listen, daemon=True).start()
    try:
        with cluster(asked):
            Keeper(asked).keep(ended)
            say(over=True)
    except UserError as error:
        say(error=str(error))


def say(**what: Any) -> None:
    """Tells the sweep something, if it is there."""
    with suppress(BrokenPipeError):
        print(json.dumps(what), flush=True)


@contextmanager
def cluster(asked: Asked) -> Iterator[None]:
    """Joins the cluster, or starts one on this machine of which nothing stays; raises UserError where that fails."""
    import ray

    with ExitStack() as ending:
        if asked.address:
            where: dict[str, Any] = {"address": asked.address}
        else:
            own = tempfile.TemporaryDirectory(prefix="ray", dir="/tmp", ignore_cleanup_errors=True)  # short: of sockets
            cores = max(os.cpu_count() or 1, asked.threads)
            where = {"address": "local", "num_cpus": cores, "include_dashboard": False, "object_store_memory": OBJECTS}
            where["_temp_dir"] = ending.enter_context(own)
        try:
            ray.init(**where, log_to_driver=False, logging_level=logging.ERROR)
        except Exception as error:  # of a dozen kinds
            raise UserError(f"Ray {asked.address or 'on this machine'}: {first_line(error)[:400]}") from error
        ending.callback(ray.shutdown)
        yield


class Actor:
    """A worker on a node."""

    def pid(self) -> int:
        """The number of its process there."""
        return os.getpid()

    def work(self, asked: Asked, name: str) -> tuple[str, str]:
        """Works; says whether the study is ``over``, it was ``refused``, and why, or asked to have ``ended``."""
        import torch

        from kshot.studies.worker import read_only, work

        torch.set_num_threads(asked.threads)
        try:
            with ending_on_signals():
                work(Path(asked.study), name=name, only=read_only(asked.only))
        except UserError as error:
            return "refused", str(error)
        except Ended:
            return "ended", "it was ended by a signal"
        return "over", ""


def interrupt(pid: int) -> None:
    """Asks a worker on the node where this runs to end."""
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGTERM)


@dataclass
class Place:
    """A part of a node that holds one worker after the other.

    Attributes:
        node: its id.
        gpus: of the worker.
        name: of the worker.
        actor, pid, work: Ray's handles of the worker, of the number of its process, and of what it will say in the end.
        since: when it died.
    """

    node: str
    gpus: float
    name: str = ""
    actor: Any = None
    pid: Any = None
    work: Any = None
    since: float = 0.0


class Keeper:
    """The workers on a cluster."""

    def __init__(self, asked: Asked) -> None:
        import ray

        self.ray, self.asked, self.study = ray, asked, Path(asked.study)
        self.hosts: dict[str, str] = {}  # names of nodes that are there, by their ids
        self.deaths: Counter[str] = Counter()  # of workers, by node
        self.left = set[str]()  # nodes that are left alone
        self.free: list[Place] = []
        self.busy: list[Place] = []
        self.dead: list[Place] = []  # whose workers died just now
        self.over = False
        self.reason = "there is none with what a worker needs."

    def keep(self, ended: threading.Event) -> None:
        """Looks after nodes and workers until none has anything to do; raises UserError where none could work."""
        while not ended.wait(LOOK):
            alive = {node["NodeID"]: node for node in self.ray.nodes() if node["Alive"]}
            self.meet(alive)
            self.settle(alive)
            while self.free and not self.over and len(self.busy) < self.asked.workers:
                self.start(self.free.pop(0))
            say(workers=len(self.busy), nodes=len({place.node for place in self.busy}))
            if not self.busy and not self.dead:
                if self.over:
                    return
                raise UserError(f"No node of the Ray cluster takes a run: {self.reason}")
        self.end()

    def meet(self, alive: dict[str, Any]) -> None:
        """Makes places on new nodes, and tells of those that are gone."""
        for node in self.hosts.keys() - alive.keys():
            say(note=f"The node {self.hosts.pop(node)} is lost: others take its runs.")
        for node in alive.keys() - self.hosts.keys():
            made = self.places(alive[node])
            self.hosts[node] = f"{alive[node]['NodeManagerHostname']} ({alive[node]['NodeManagerAddress']})"
            self.free += made
        self.free = [place for place in self.free if place.node in alive]

    def places(self, node: dict[str, Any]) -> list[Place]:
        """What a node has room for."""
        has = node["Resources"]
        gpus = min(1.0, has.get("GPU", 0.0)) if self.asked.gpus is None else self.asked.gpus
        room = int(has.get("CPU", 0) / self.asked.threads)
        if gpus:
            room = min(room, int(has.get("GPU", 0) / gpus + 1e-6))
        room = min(room, max(1, int(has.get("memory", 0) / self.asked.memory)))
        return [Place(node["NodeID"], gpus) for _ in range(room)]

    def start(self, place: Place) -> None:
        """Starts a worker in a place."""
        host = self.hosts[place.node].partition(" ")[0]
        place.name = f"{host}-{place.node[:4]}-{secrets.token_hex(2)}"
        place.actor = (
            self.ray.remote(Actor)
            .options(
                num_cpus=self.asked.threads,
                num_gpus=place.gpus,
                scheduling_strategy=self.at(place.node),
                runtime_env={"env_vars": thread_variables(self.asked.threads)},
            )
            .remote()
        )
        place.pid, place.work = place.actor.pid.remote(), place.actor.work.remote(self.asked, place.name)
        self.busy.append(place)

    def at(self, node: str) -> Any:
        """Ray's way to say: on this node."""
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        return NodeAffinitySchedulingStrategy(node, soft=False)

    def settle(self, alive: dict[str, Any]) -> None:
        """Looks after workers that ended: one that died is buried, and another takes its place if its node is there."""
        for place in list(self.busy):
            if not self.ray.wait([place.work], timeout=0)[0]:
                continue
            self.busy.remove(place)
            how, why = self.outcome(place)
            self.ray.kill(place.actor)
            Claims(self.study, "").bury(place.name)
            if how == "over":
                self.over = True
            elif how == "refused":
                self.refuse(place, why)
            else:
                self.reason, place.since = f"workers die, the last: {why}", time.monotonic()
                self.dead.append(place)
        for place in list(self.dead):
            if time.monotonic() - place.since >= SETTLE or place.node not in alive:
                self.dead.remove(place)
                if place.node in alive:
                    self.replace(place)

    def outcome(self, place: Place) -> tuple[str, str]:
        """What became of a worker that ended: ``over``, ``ended``, ``died`` or ``refused``, and why."""
        errors = self.ray.exceptions
        try:
            return cast("tuple[str, str]", self.ray.get(place.work))
        except Exception as error:  # of Ray, or of a node, as of one without kshot
            died = isinstance(error, (errors.RayActorError, errors.ActorUnschedulableError, errors.NodeDiedError))
            refused = not died or getattr(error, "actor_init_failed", False)
            return "refused" if refused else "died", str(error).strip().splitlines()[-1][:300]

    def refuse(self, place: Place, why: str) -> None:
        """Leaves a node alone, and says why, once."""
        self.reason = why
        if place.node not in self.left and place.node in self.hosts:
            say(note=f"The node {self.hosts[place.node]} takes no run: {why}")
        self.left.add(place.node)
        self.free = [other for other in self.free if other.node != place.node]

    def replace(self, place: Place) -> None:
        """Makes room for another worker where one died, unless many did on this node."""
        self.deaths[place.node] += 1
        if self.deaths[place.node] >= DEATHS:
            self.refuse(place, f"{DEATHS} workers died there; {self.reason}")
        elif place.node not in self.left:
            say(note=f"A worker on {self.hosts[place.node]} died, and another takes its place.")
            self.free.append(place)

    def end(self) -> None:
        """Asks all workers to end, and kills those that do not."""
        begun, until = [], time.monotonic() + GRACE
        for place in self.busy:
            if self.ray.wait([place.pid], timeout=0)[0]:
                with suppress(self.ray.exceptions.RayError):
                    asking = self.ray.remote(interrupt).options(
                        num_cpus=0, max_retries=0, scheduling_strategy=self.at(place.node)
                    )
                    asking.remote(self.ray.get(place.pid))
                    begun.append(place.work)
        if begun:
            self.ray.wait(begun, num_returns=len(begun), timeout=max(0.0, until - time.monotonic()))
        for place in self.busy:
            self.ray.kill(place.actor)
            Claims(self.study, "").bury(place.name)
