"""Workers of a study as an array of jobs on a Slurm cluster, by submitit.

The jobs outlive the sweep: the same sweep, called again, looks at the study's folder and at the queue, and submits no
more than what lacks. A job that is pre-empted, or reaches its time, gives its run back and is queued again.
"""

from __future__ import annotations

import logging
import os
import re
import signal
import subprocess
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kshot.cli import Ended
from kshot.errors import UserError, first_line, nearest_first
from kshot.studies.engine_local import fitting
from kshot.studies.engines import EngineSettings, thread_variables

WORKERS = 8  # jobs at most where no number is asked for
ASK = 20.0  # seconds between two questions to the queue
MINUTES = 60  # of a job where no time is asked for
TIMES = 1000  # that a job is queued again when its time is over
OWN = ("cluster", "time", "gpus", "wait")  # options that are not simply sbatch's
CLUSTERS = ("slurm", "local")
log = logging.getLogger(__name__)


def start(study: Path, settings: EngineSettings) -> Slurm:
    """Submits as many jobs as lack, and looks after them and those of an earlier sweep.

    Raises:
        UserError: submitit or Slurm is not there, an option is wrong, or Slurm refuses the jobs.
    """
    try:
        import submitit  # noqa: F401
    except ModuleNotFoundError as error:
        raise UserError("The engine slurm needs submitit: pip install 'kshot[slurm]'.") from error
    cluster = settings.options.get("cluster", "slurm")
    if cluster not in CLUSTERS:
        raise UserError(f"cluster is slurm, or local to try the jobs on this machine. {nearest_first(cluster, CLUSTERS)}")
    return Slurm(study.absolute(), settings, cluster)
