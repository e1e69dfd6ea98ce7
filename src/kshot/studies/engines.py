"""What starts the workers of a study: an engine is a module with one function, ``start(study, settings) -> Engine``.

An engine only starts and ends processes that run :func:`command`, or call :func:`kshot.studies.worker.work`; who does
which run is settled by claims. So several engines may work on one study at once.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol, cast

from kshot.errors import UserError, first_line, nearest_first

ENGINES = {
    "local": "kshot.studies.engine_local",
    "ray": "kshot.studies.engine_ray",
    "slurm": "kshot.studies.engine_slurm",
}


@dataclass(frozen=True)
class EngineSettings:
    """What a sweep asks of an engine.

    Attributes:
        runs: that are open, at most so many workers have something to do.
        workers: how many to start; None for as many as the engine finds fit.
        threads: of the processor, for each worker.
        only: words ``AXIS=LABEL[,LABEL]``; workers leave other runs alone.
        cpu: the study's runs are for the processor, whatever else there is.
        memory: bytes that a worker was seen to need, of the device that runs are for; None before the first run.
        options: the engine's own, by name, as given: ``--engine-option address=auto``.
    """

    runs: int
    workers: int | None = None
    threads: int = 1
    only: tuple[str, ...] = ()
    cpu: bool = False
    memory: float | None = None
    options: Mapping[str, str] = field(default_factory=dict)


class Engine(Protocol):
    """Workers that were started.

    Attributes:
        told: what they are, for the table: ``2 processes of 1 thread``.
    """

    told: str

    def poll(self) -> int:
        """How many workers there are, or will be; starts again those that died, and is called about once a second.

        Raises:
            UserError: they cannot work, with the reason of one.
        """

    def stop(self) -> None:
        """Ends all workers, so that their runs can go on later, and returns when they have ended."""


def start(name: str, study: Path, settings: EngineSettings) -> Engine:
    """Starts an engine by its name.

    Raises:
        UserError: there is no such engine, it is not installed, or it does not start.
    """
    if name not in ENGINES:
        raise UserError(f"There is no engine {name!r}. {nearest_first(name, ENGINES)}")
    try:
        module = importlib.import_module(ENGINES[name])
    except ModuleNotFoundError as error:
        raise UserError(
            f"The engine {name} needs {error.name}: pip install 'kshot[{name}]' ({first_line(error)})."
        ) from error
    return cast("Engine", module.start(study, settings))


def command(study: Path, settings: EngineSettings, name: str | None = None) -> list[str]:
    """The words that start a worker on any machine where this Python and the study are."""
    words = [sys.executable, "-m", "kshot.studies", str(study.absolute()), "--threads", str(settings.threads)]
    words += ["--name", name] if name else []
    return words + (["--only", *settings.only] if settings.only else [])


def thread_variables(threads: int) -> dict[str, str]:
    """Environment variables that keep the libraries of a worker to so many threads."""
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMEXPR_NUM_THREADS")
    return dict.fromkeys(names, str(threads))
