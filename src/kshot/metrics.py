"""``metrics.csv``: one row an epoch, whatever was logged in it, also over interruptions."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.utilities import rank_zero_only

from kshot.files import write_csv

SECONDS = 1.0  # between two writings of the whole file


class MetricsFile(Logger):
    """Keeps a run's metrics, and writes them as a table; what a file to resume from holds goes on where it ended.

    Attributes:
        rows: by epoch, or by step for what is logged without an epoch; each has ``epoch`` or not, ``step``, and values.
        file: where to write; until it is set nothing is written.
    """

    def __init__(self) -> None:
        super().__init__()
        self.rows: dict[str, dict[str, float]] = {}
        self.file: Path | None = None
        self.written = 0.0

    @property
    def name(self) -> str:
        return "metrics"

    @property
    def version(self) -> str:
        return ""

    def log_hyperparams(self, *_: Any, **__: Any) -> None:
        """Does nothing: ``config.yaml`` has all settings."""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Adds to the row of an epoch."""
        key = f"epoch {metrics['epoch']:g}" if "epoch" in metrics else f"step {step}"
        self.rows.setdefault(key, {}).update(metrics, **({} if step is None else {"step": step}))

    @rank_zero_only
    def save(self) -> None:
        """Writes the file where it was not written a moment ago."""
        if time.monotonic() - self.written >= SECONDS:
            self.write()

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Writes the file."""
        del status
        self.write()

    def write(self) -> None:
        """Writes all rows; raises UserError where the disk refuses."""
        if self.file is None or not self.rows:
            return
        columns = ["epoch", "step", *sorted({name for row in self.rows.values() for name in row} - {"epoch", "step"})]
        write_csv(self.file, [columns, *([row.get(name, "") for name in columns] for row in self.rows.values())])
        self.written = time.monotonic()
