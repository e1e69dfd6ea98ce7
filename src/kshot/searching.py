"""Choosing the settings of a method on the shots alone, in ranges (``--search``); Optuna proposes what to try.

Settings are judged as ``--budget`` judges candidates, and what is chosen is fitted as an ordinary run. What was judged
is kept beside the runs, so that a search that was killed, or is given more trials, goes on.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kshot.adapters.base import derived_seed
from kshot.auto import SHORT, Search
from kshot.choice import Choice, SearchOptions, Trial
from kshot.classifiers.base import closed_form
from kshot.config import CommandLine, Tree, read_word
from kshot.errors import UserError, first_line
from kshot.files import make_folder
from kshot.folds import HeldOut, Judge, divided, joined
from kshot.forecast import ahead, optimism_of
from kshot.header import header_of
from kshot.judging import accuracy, log_loss
from kshot.module import FewShotModule
from kshot.places import Places
from kshot.ranges import Range, checked_ranges, spelt
from kshot.record import RunOptions

OF_STEPS = ("model.optimizer", "model.schedule", "model.head_lr", "trainer.", "data.batch_size")  # what they change
CONFIGURED = ""  # the words of no change
logger = logging.getLogger("kshot")


@dataclass
class Tried(Trial):
    """What became of some settings.

    Attributes:
        values: what they were worth, round by round (:func:`worth`); the last one counts where all were gone through.
        right: which held-out shots were, by position, packed into hexadecimal digits.
    """

    values: list[float] = field(default_factory=list)
    right: str = ""

    @property
    def hits(self) -> Tensor:
        """(M,) bool, which held-out shots were right, by position."""
        bits = np.unpackbits(np.frombuffer(bytes.fromhex(self.right), np.uint8), count=self.held_out)
        return torch.from_numpy(bits.astype(bool))


def search(line: CommandLine, places: Places, tree: Tree) -> tuple[CommandLine, Choice]:
    """The command line of the best settings of a fit with ranges, and how they were chosen, on the shots alone.

    Raises:
        UserError: a range is refused, Optuna is not there, or the method cannot be fitted with any setting.
    """
    if tree.get("budget") is not None:
        raise UserError("--budget chooses a method, and --search its settings: leave one of them out.")
    try:
        import optuna  # noqa: F401
    except ModuleNotFoundError:
        raise UserError("--search proposes settings by Optuna: pip install 'kshot[search]'.") from None
    asked = SearchOptions(**{name: read_word(value) for name, value in tree["search"].items()})
    return Tuning(line, tree, asked, checked_ranges(asked.ranges, line, places, tree)).run()


class Tuning(Search):
    """Goes through settings of one method, the configured ones first.

    What takes steps goes through three rounds: a quarter of the steps on one fold, all steps on it, all folds. After
    each round what is not among the better half of what came to it so far is pruned (asynchronous successive halving,
    arXiv:1810.05934). Settings differ by chance of Optuna's sampler alone, which is seeded anew for each.
    """

    def __init__(self, line: CommandLine, tree: Tree, asked: SearchOptions, ranges: list[Range]) -> None:
        super().__init__(line, tree | {"candidates": [CONFIGURED]})
        self.name, self.asked, self.ranges = "search", asked, ranges
        options = tree["run"]
        self.folder = Path(options.get("root") or RunOptions.root, options.get("name") or line.name)
        self.file: Path | None = None
        self.tried: dict[str, Tried] = {}  # in this search, by words
        self.known: dict[str, Tried] = {}  # by the file

    def run(self) -> tuple[CommandLine, Choice]:
        """Tries what was asked for, and chooses."""
        self.read(CONFIGURED)
        with self.module(CONFIGURED) as (module, judge):
            method, steps = module.method, module.takes_steps
            self.plan = divided(judge.label, self.data.split_seed)
            module.meet(self.data)
            self.file = self.folder / f"search-{self.digest(module)}.jsonl"
        moved = [each for each in self.ranges if steps or not each.name.startswith(OF_STEPS)]
        idle = ", ".join(each.name for each in self.ranges if each not in moved)
        notes = [f"search: {method} takes no step, and {idle} changes nothing of it."] if idle else []
        if moved and not self.plan[1]:
            notes.append("search: no class has two images, and none can be held out to judge by.")
        self.ranges = moved if self.plan[1] else []
        if self.ranges:
            self.known = read_tried(self.file)
            self.judged(CONFIGURED)
            self.go_through()
            chosen = self.best_of_tried()
        else:
            chosen = Choice(CONFIGURED, "nothing was searched for: the settings are the configured ones")
        chosen.search = {"ranges": spelt(self.ranges), "trials": self.asked.trials, "sampler": self.asked.sampler}
        chosen.seconds = round(sum(each.seconds for each in self.tried.values()), 2)
        logger.info("search: %s, for %s.", chosen.words or "as configured", chosen.why)
        line = self.answer(chosen.words)
        line.notes += notes
        return line, chosen

    def digest(self, module: FewShotModule) -> str:
        """What a judgement depends on, beside the settings that are tried: the file of another search is another."""
        tree = {name: self.trees[CONFIGURED][name] for name in ("model", "data", "trainer")}
        about = header_of(module), tree, spelt(self.ranges), self.asked.sampler
        return hashlib.sha256(json.dumps(about, sort_keys=True, default=str).encode()).hexdigest()[:12]

    def go_through(self) -> None:
        """Asks for settings and tells what they were worth; all there are, where these are no more than the trials."""
        import optuna

        halving = optuna.pruners.SuccessiveHalvingPruner(1, 2, 0)
        kind = {"tpe": optuna.samplers.TPESampler, "random": optuna.samplers.RandomSampler}[self.asked.sampler]
        spaces = {each.name: distribution(each) for each in self.ranges}
        values = [each.values for each in self.ranges]
        every = list(product(*values)) if 0 < math.prod(map(len, values)) <= self.asked.trials else []
        with quiet():
            study = optuna.create_study(pruner=halving, direction="maximize")
            for each in every:
                study.enqueue_trial(dict(zip(spaces, each, strict=True)))
            for number in range(len(every) or self.asked.trials):
                study.sampler = kind(seed=derived_seed(self.seed, f"search/{number}") % 2**32)
                asked = study.ask(spaces)
                words = [f"--{each.name} {shlex.quote(each.word(asked.params[each.name]))}" for each in self.ranges]
                tried = self.judged(" ".join(words), asked)
                ended = optuna.trial.TrialState
                if tried.accuracy is not None:
                    study.tell(asked, tried.values[-1])
                else:
                    study.tell(asked, state=ended.PRUNED if tried.state.startswith("pruned") else ended.FAIL)

    # ------------------------------------------------------------------------------------------------- judgements

    def judged(self, words: str, asked: Any = None) -> Tried:
        """Judges settings round by round, unless they were before, and says what they are worth to who asked."""
        known = self.tried.get(words) or self.known.get(words)
        if known is not None:
            for step, value in enumerate(known.values[: len(known.values) - (known.accuracy is not None)], 1):
                pruned(asked, step, value)
            self.tried[words] = known
            return known
        tried = self.tried[words] = Tried(words)
        with self.timed(tried), refusing_what_is_too_large():
            self.read(words)
            with self.module(words) as (module, judge):
                tried.method = module.method
                for step, (found, last) in enumerate(self.rounds(words, module, judge), 1):
                    tried.values.append(worth(found))
                    if last:
                        self.note(tried, found)
                        right = found.logits.argmax(-1) == found.label
                        tried.right = np.packbits(right[found.index.argsort()].numpy()).tobytes().hex()
                    elif pruned(asked, step, tried.values[-1]):
                        share = accuracy(found.logits, found.label)
                        tried.state = (
                            f"pruned after round {step}, with {share:.1%} of {len(found.label)} held-out shots"
                        )
                        break
        self.keep(tried)
        return tried

    def rounds(self, words: str, module: FewShotModule, judge: Judge) -> Iterator[tuple[HeldOut, bool]]:
        """Held-out logits round by round, and whether these are the last; see :class:`Tuning`."""
        assert self.plan is not None, "a judge divided the shots"
        fold, which = self.plan
        self.forms |= {words} if closed_form(module.classifier) else set()
        first, rest = (which[:1], which[1:]) if module.takes_steps else (which, which[:0])
        if module.takes_steps:
            judge.part = SHORT
            yield held_out(judge, module, fold, first), False
            judge.part = 1
        found = held_out(judge, module, fold, first)
        if rest:
            yield found, False
            found = joined(found, held_out(judge, module, fold, rest))
        yield found, True

    def keep(self, tried: Tried) -> None:
        """Adds what became of settings to the file, as one line; raises UserError where the disk refuses."""
        assert self.file is not None, "the search has begun"
        make_folder(self.folder)
        line = json.dumps(asdict(tried), ensure_ascii=False) + "\n"
        try:
            with self.file.open("ab") as file:
                file.write(line.encode())
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise UserError(f"{self.file} cannot be written: {first_line(error)}.") from error

    # ----------------------------------------------------------------------------------------------------- the end

    def best_of_tried(self) -> Choice:
        """The best of what came through all rounds; of equals the first.

        Raises:
            UserError: nothing did.
        """
        whole = [each for each in self.tried.values() if each.accuracy is not None]
        if not whole:
            some = next(iter(self.tried.values()))
            raise UserError(f"search: no settings can be fitted; as configured it is {some.state}.")
        best = max(whole, key=lambda each: each.values[-1])
        if best.words not in self.found:  # it was judged before this process began
            self.read(best.words)
            with self.module(best.words) as (module, judge):
                self.found[best.words] = [found for found, _ in self.rounds(best.words, module, judge)][-1]
        beside = [each.hits for each in whole if each.held_out == best.held_out]
        told = ahead(self.found[best.words], optimism_of(torch.stack(beside)), self.growth(best.words))
        why = f"{int(best.hits.sum())} of {best.held_out} held-out shots right"
        own = self.tried[CONFIGURED]
        if best is not own:
            why += f" (as configured: {int(own.hits.sum())})" if own.accuracy is not None else ""
        why += f"; {len(whole)} of {len(self.tried)} settings came through all rounds"
        trials = [
            {name: value for name, value in asdict(each).items() if name != "right"} for each in self.tried.values()
        ]
        return Choice(best.words, why, calibration=told.plain(), trials=trials)


def held_out(judge: Judge, module: FewShotModule, fold: Tensor, which: range) -> HeldOut:
    """Logits of some folds; raises UserError where they are not finite."""
    found = judge.out_of_fold(module, fold, which)
    assert found is not None, "there are folds"
    if not found.logits.isfinite().all():
        raise UserError("its logits are not finite")
    return found


def worth(found: HeldOut) -> float:
    """One number for held-out logits, greater where more of them are right, and among equals where the loss is less."""
    right = float((found.logits.argmax(-1) == found.label).sum())
    return (right + 1 / (1 + log_loss(found.logits, found.label))) / len(found.label)


def pruned(asked: Any, step: int, value: float) -> bool:
    """Reports what a round was worth to who asked, and hears whether there is no further one."""
    if asked is None:
        return False
    asked.report(value, step)
    return bool(asked.should_prune())


def distribution(each: Range) -> Any:
    """A range in Optuna's words."""
    import optuna

    if each.choices:
        return optuna.distributions.CategoricalDistribution(each.choices)
    if each.whole:
        return optuna.distributions.IntDistribution(int(each.low), int(each.high), each.log, int(each.step or 1))
    return optuna.distributions.FloatDistribution(each.low, each.high, each.log, each.step)


def read_tried(file: Path) -> dict[str, Tried]:
    """What a search has judged so far, by words; a line that was cut off by a kill is taken away."""
    if not file.is_file():
        return {}
    content = file.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if whole != content:
        os.truncate(file, len(whole))
    found: dict[str, Tried] = {}
    for line in whole.decode().splitlines():
        tried = Tried(**json.loads(line))
        found.setdefault(tried.words, tried)
    return found


@contextmanager
def refusing_what_is_too_large() -> Iterator[None]:
    """Takes settings that do not fit into the device's memory for a user's mistake."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise UserError(f"it takes too much memory ({first_line(error)})") from error


@contextmanager
def quiet() -> Iterator[None]:
    """Lets Optuna warn, and tell nothing else."""
    import optuna

    level = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        yield
    finally:
        optuna.logging.set_verbosity(level)
