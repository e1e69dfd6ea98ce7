"""What surrounds a run of the command line: where it goes on from, which messages it leaves out, what ended it."""

from __future__ import annotations

import logging
import os
import random
import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from PIL import Image

from kshot.data.loading import lost_worker
from kshot.errors import UserError, first_line

ONE_AT_A_TIME = threading.RLock()  # of what draws from the random state that all of a process shares
VARIABLES = ("PL_GLOBAL_SEED", "PL_SEED_WORKERS", "JSONARGPARSE_DEPRECATION_WARNINGS")  # that are set for libraries
LOGGERS = ("lightning.pytorch", "lightning.fabric")
RESUME_FROM = ("checkpoints", "last.ckpt")  # in a run directory


def mistake_behind(error: BaseException) -> UserError | None:
    """What a user can put right, where a library told of it in its own way."""
    if isinstance(error, MisconfigurationException):
        return UserError(f"trainer: {first_line(error)}")
    return lost_worker(error) if isinstance(error, RuntimeError) else None  # torch tells by a signal, at any moment


def with_resume(arguments: Sequence[str]) -> list[str]:
    """The words of a command line with ``--resume RUN`` written out: the run's own config, and its file to resume from.

    Raises:
        UserError: it is no run that can be resumed.
    """
    words = [part for word in arguments for part in (word.split("=", 1) if word.startswith("--resume=") else [word])]
    if "--resume" not in words[1:]:
        return words
    at = words.index("--resume")
    if words[0] != "fit" or at + 1 == len(words):
        raise UserError("--resume belongs to fit, and takes the directory of a run: fit --resume runs/clip_16shot/001.")
    config, file = Path(words[at + 1], "config.yaml"), Path(words[at + 1], *RESUME_FROM)
    for path in (config, file):
        if not path.is_file():
            raise UserError(f"--resume {words[at + 1]}: there is no {path}, from which a run could go on.")
    return ["fit", "--config", str(config), *words[1:at], *words[at + 2 :], "--ckpt_path", str(file)]


@contextmanager
def leaving_no_trace() -> Iterator[None]:
    """Gives a process back what libraries change in it, for one thread after the other."""
    with ONE_AT_A_TIME:
        python, arrays = random.getstate(), np.random.get_state()  # noqa: NPY002  the state that libraries draw from
        variables = {name: os.environ.get(name) for name in VARIABLES}
        levels = {name: logging.getLogger(name).level for name in LOGGERS}
        try:
            with torch.random.fork_rng(), warnings.catch_warnings():
                os.environ.setdefault(VARIABLES[-1], "off")
                yield
        finally:
            random.setstate(python)
            np.random.set_state(arrays)  # noqa: NPY002
            for name, level in levels.items():
                logging.getLogger(name).setLevel(level)
            for name, value in variables.items():
                if value is None:
                    os.environ.pop(name, None)
                else:
                    os.environ[name] = value


@contextmanager
def told_to_stderr() -> Iterator[None]:
    """Writes what kshot tells, from INFO on, to the standard error that there is now, until the end of the block."""
    log, handler = logging.getLogger("kshot"), logging.StreamHandler()
    level, root = log.level, logging.getLogger()
    others = logging.StreamHandler()  # a library that logs without a name makes one else, and all words come twice
    others.setLevel(logging.WARNING)
    others.addFilter(lambda record: record.name.partition(".")[0] != "kshot")
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    if not root.handlers:
        root.addHandler(others)
    try:
        yield
    finally:
        root.removeHandler(others)
        log.removeHandler(handler)
        log.setLevel(level)


def settle_chatter() -> None:
    """Silences messages that tell a user nothing to act on."""
    for name in LOGGERS:
        logging.getLogger(name).setLevel(logging.ERROR)
    for message in (
        ".*Total length of .list. across ranks is zero.*",  # a data set without validation images
        ".*does not have many workers.*",  # a few images in memory need none
        ".*this fit will run with no optimizer.*",  # what has a closed form needs none
        ".*LeafSpec.*",  # Lightning 2.6 on newer torch
        ".*module.s. in eval mode.*",  # frozen towers are meant to be
    ):
        warnings.filterwarnings("ignore", message=message)
    warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)  # such images are refused
    os.environ.setdefault(VARIABLES[-1], "off")  # Lightning 2.6 calls what jsonargparse 5 drops
