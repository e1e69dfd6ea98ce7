"""Ranges of settings that a search draws from (``--search``): what may stand there, and that each end may be run."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kshot.config import CommandLine, Tree, read_command_line, read_word, word_of
from kshot.errors import UserError, nearest_first
from kshot.layering import options_below
from kshot.places import Place, Places, alternatives
from kshot.settings import OPTIONS, settings

KEYS = ("low", "high", "log", "step")
MOST = 100_000  # of the values that are counted of a range


@dataclass(frozen=True)
class Range:
    """The values of one option.

    Attributes:
        name: of the option, in full.
        choices: values as words; empty for numbers from ``low`` to ``high``.
        low, high: of numbers, both among them.
        log: whether their logarithms are spread evenly.
        step: between neighbours; None for any number.
        whole: whether they are integers.
    """

    name: str
    choices: tuple[str, ...] = ()
    low: float = 0.0
    high: float = 0.0
    log: bool = False
    step: float | None = None
    whole: bool = False

    def word(self, value: Any) -> str:
        """A value as the command line takes it: numbers to 4 digits, as far as the ends allow."""
        if self.choices:
            return str(value)
        return str(int(value)) if self.whole else repr(min(self.high, max(self.low, float(f"{value:.4g}"))))

    @property
    def values(self) -> list[Any]:
        """All of them, where they can be counted and are at most :data:`MOST`; else none."""
        if self.choices or self.step is None:
            return list(self.choices)
        count = steps_in(self.low, self.high, self.step) + 1
        found = [min(self.high, self.low + i * self.step) for i in range(count)] if count <= MOST else []
        return [int(each) for each in found] if self.whole else found

    @property
    def ends(self) -> list[str]:
        """The words to try before anything starts."""
        return list(self.choices) or [self.word(self.low), self.word(self.high)]


def checked_ranges(given: Mapping[str, Any], line: CommandLine, places: Places, tree: Tree) -> list[Range]:
    """The ranges of a search, of which each end is a setting that the command line could have.

    Args:
        given: by option.
        line: the command line, whose own options are not searched for.
        places: for its settings.
        tree: its settings.

    Raises:
        UserError: one that is no range, of no option, of the data, of an option that is given as well, or whose end is
            refused.
    """
    if not given:
        raise UserError(
            "search.ranges is empty, and needs an option with its values: model.optimizer.lr: [1e-3, 1e-2]."
        )
    known = {name: place for name, place, _ in options_below(places, tree)}
    found = []
    for name, spec in given.items():
        if not name.startswith(("model.", "trainer.")) and name != "data.batch_size":
            raise UserError(
                f"search.ranges: {name!r:.200} stays as it is in a search, which may change options of model, trainer "
                f"and data.batch_size. {nearest_first(name, [n for n in known if n.startswith('model.')])}"
            )
        if any(key == name for key, _ in line.words):
            raise UserError(f"search.ranges: {name} is given as an option as well, --{name}: leave one of them out.")
        if name not in known:  # says what is meant
            end = spec[0] if isinstance(spec, list) and spec else spec.get("low", 1) if isinstance(spec, dict) else spec
            try_word(line, name, word_of(end))
        found.append(range_of(name, spec, known.get(name, Place())))
        for word in found[-1].ends:
            try_word(line, name, word)
    return found


def range_of(name: str, spec: Any, place: Place) -> Range:
    """A range as it was given; raises UserError where it is none."""
    where, spec = f"search.ranges: {name}", read_word(spec)
    if isinstance(spec, dict):
        return numbers_of(name, spec, place, where)
    if not isinstance(spec, list):
        raise UserError(
            f"{where} is {spec!r:.200}, and must be a list of values, or numbers such as {{low: 1e-5, high: 1e-2}}."
        )
    words = [word_of(value) for value in spec]
    if not words or len(set(words)) < len(words):
        raise UserError(f"{where} is {spec!r:.200}, and must list values, each once.")
    return Range(name, tuple(words))


def numbers_of(name: str, spec: Mapping[str, Any], place: Place, where: str) -> Range:
    """A range of numbers, which are whole where the option takes no others; raises UserError where it is none."""
    for key in spec:
        if key not in KEYS:
            raise UserError(f"{where}: a range has no {key!r:.200}. {nearest_first(str(key), KEYS)}")
    for key in ("low", "high"):
        if key not in spec:
            raise UserError(f"{where} has no {key}: a range of numbers needs low and high.")
    low, high = (number(spec[key], f"{where}: {key}") for key in ("low", "high"))
    log, given = spec.get("log", False), spec.get("step")
    step = None if given is None else number(given, f"{where}: step")
    kinds = alternatives(place.hint)
    integers = all(each == int(each) for each in (low, high, step or 1.0))
    whole = float not in kinds and (int in kinds or integers)
    for wrong, what in (
        (not isinstance(log, bool), f": log is {log!r:.200}, and must be true or false"),
        (low >= high, f": low is {spec['low']} and high {spec['high']}, and low must be the smaller one"),
        (log and low <= 0, f": low is {spec['low']}, and a range with log must begin above 0"),
        (log and step is not None, " has log and a step: leave one of them out"),
        (whole and not integers, f" takes whole numbers, and is given {dict(spec)}"),
        (step is not None and not 0 < step <= high - low, f": step is {given}, and must be above 0 to high - low"),
    ):
        if wrong:
            raise UserError(f"{where}{what}.")
    if whole and step is None:
        step = 1.0
    if step is not None:
        high = low + step * steps_in(low, high, step)
    return Range(name, (), low, high, log, step, whole)


def steps_in(low: float, high: float, step: float) -> int:
    """How many whole steps there are in a range."""
    return math.floor((high - low) / step + 1e-9)


def number(value: Any, where: str) -> float:
    """A finite number; raises UserError for anything else."""
    try:
        found = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        found = math.nan
    if not math.isfinite(found):
        raise UserError(f"{where} is {value!r:.200}, and must be a number.")
    return found


def try_word(line: CommandLine, name: str, word: str) -> None:
    """Raises UserError where an option would be refused with a value."""
    try:
        settings(read_command_line([*unsearched(line), f"--{name}={word}"], list(OPTIONS)))
    except UserError as error:
        raise UserError(f"search.ranges: {error}") from error


def unsearched(line: CommandLine) -> list[str]:
    """The words of a command line without its search."""
    kept = [(key, value) for key, value in line.words if key.partition(".")[0] != "search"]
    return [line.command, *(f"--{key}={value}" for key, value in kept), "--search=null"]


def spelt(ranges: Sequence[Range]) -> dict[str, Any]:
    """Ranges in plain data, for a record."""
    numbers = {r.name: {key: getattr(r, key) for key in KEYS if getattr(r, key)} for r in ranges if not r.choices}
    return {r.name: list(r.choices) if r.choices else numbers[r.name] for r in ranges}
