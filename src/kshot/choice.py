"""What choosing a method comes to: what became of each candidate, and which was chosen and why."""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from kshot.errors import UserError
from kshot.files import write_text

BUDGET = re.compile(r"(?:(\d+)h)?(?:(\d+)m)?(?:(\d+)s?)?")


@dataclass
class SearchOptions:
    """What a search tries, on the shots alone.

    Args:
        ranges: by option, a list of values, or ``{low: 1e-5, high: 1e-2, log: true}``, or with a ``step``.
        trials: settings to try beside the configured one; fewer where there are no more.
        sampler: what proposes them: tpe learns from those before, random does not.
    """

    ranges: dict[str, Any]
    trials: int = 20
    sampler: Literal["tpe", "random"] = "tpe"


@dataclass
class Trial:
    """What became of a candidate.

    Attributes:
        words: of the candidate.
        method: its title.
        state: ``judged``, or why it was not, or not further.
        accuracy: on held-out shots; None where it was not judged.
        log_loss: on them, at the best temperature.
        held_out: their number.
        seconds: that it took.
    """

    words: str
    method: str = ""
    state: str = "judged"
    accuracy: float | None = None
    log_loss: float | None = None
    held_out: int = 0
    seconds: float = 0.0


@dataclass
class Choice:
    """What was chosen and why: ``auto`` in result.json.

    Attributes:
        words: of the answer.
        why: in a sentence.
        budget: seconds that were allowed; 0 where nothing limited them.
        seconds: that choosing took.
        calibration: of the answer, its forecast corrected for having chosen it, in plain data; None where nothing
            could be held out.
        trials: of all candidates, in plain data.
        search: what a search was asked, in plain data; None where methods were chosen from.
    """

    words: str
    why: str
    budget: float = 0.0
    seconds: float = 0.0
    calibration: dict[str, Any] | None = None
    trials: list[dict[str, Any]] = field(default_factory=list)
    search: dict[str, Any] | None = None


def kept(choice: Choice | None, directory: Path) -> Choice | None:
    """A choice that a run directory keeps from now on, or has kept since the run began."""
    file = directory / "auto.json"
    if choice is not None:
        write_text(file, json.dumps(asdict(choice), indent=2, ensure_ascii=False) + "\n")
    elif file.is_file():
        choice = Choice(**json.loads(file.read_text(encoding="utf-8")))
    return choice


def seconds_of(text: Any) -> float:
    """A budget such as ``30s``, ``5m``, ``1h30m``, or a number of seconds.

    Raises:
        UserError: it is none, or nothing.
    """
    found = BUDGET.fullmatch(str(text).strip().lower())
    hours, minutes, seconds = (int(part or 0) for part in found.groups()) if found else (0, 0, 0)
    total = 3600 * hours + 60 * minutes + seconds
    if not total:
        raise UserError(f"budget is {text!r}, and must be a time such as 30s, 5m or 1h.")
    return float(total)
