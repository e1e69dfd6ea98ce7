"""Choosing a method on the shots alone, within a budget of time (``--budget 5m``).

Candidates are words that could follow ``python main.py fit``; the chosen one is fitted as an ordinary run.
"""

from __future__ import annotations

import json
import logging
import math
import shlex
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor

from kshot.building import backbone_of, data_of, drawn, method_of, settings_of_folds, stated
from kshot.choice import Choice, Trial, seconds_of
from kshot.classifiers import LinearProbe
from kshot.classifiers.base import closed_form
from kshot.config import CommandLine, Tree, read_command_line
from kshot.contenders import ahead_of, averaged, first_of, of_closed, reason, shared
from kshot.errors import UserError
from kshot.features import FeatureStore, place
from kshot.folds import FOLDS, HeldOut, Judge, divided, joined, texts_in
from kshot.forecast import GROWTH, ahead, growth_of, optimism_of
from kshot.judging import accuracy, log_loss
from kshot.module import FewShotModule
from kshot.run import build, make_trainer
from kshot.settings import OPTIONS, settings

SEVERAL_LAYERS = (  # wins unless another is clearly better: the best closed form of most data sets of docs/choosing.md
    "--config methods/ridge.yaml --model.backbone.features last4+mean --model.classifier.text false"
)
CANDIDATES = (  # in order of cost; of equals the first is taken
    "--config methods/zero_shot.yaml",
    "--config methods/class_mean_text.yaml",
    "--config methods/class_mean.yaml",
    "--config methods/ridge.yaml",
    "--config methods/gda.yaml",
    "--config methods/kernel_ridge.yaml",
    SEVERAL_LAYERS,
    "--config methods/gda.yaml --model.backbone.features last4+mean --model.classifier.text false",
    "--config methods/clap.yaml",
    "--config methods/prolip.yaml",
    "--config methods/2sfs.yaml",
    "--config methods/coop.yaml",
    "--config methods/lora.yaml",
    "--config methods/lora.yaml --model.optimizer.lr 5e-4",
    "--config methods/lora.yaml --model.classifier LinearProbe --model.backbone.features last4+mean",
    "--config methods/randlora.yaml",
)
CHOOSING = ("budget", "candidates", "search")  # options that a chosen run has no more
SHORT = 4  # the first round of training takes this part of the steps
POOLED = 3  # at most so many closed forms are averaged
NOT_JUDGED = "not judged: no class has two images"
TRUSTED = 0.5  # where nothing can be held out, a text decides that is right about this share of the shots
Found = TypeVar("Found")
logger = logging.getLogger("kshot")


def choose(line: CommandLine, tree: Tree) -> tuple[CommandLine, Choice]:
    """The command line of the best candidate of a fit with a budget, and how it was chosen, on the shots alone.

    Raises:
        UserError: no candidate can be fitted; or the data or the backbone is refused.
    """
    return Search(line, tree).run()


class Search:
    """Goes through candidates in order of cost.

    Closed forms are judged on stratified folds of the shots, all on the same. What takes steps is judged by successive
    halving: a round of a quarter of the steps on one fold, of all steps for the better half, and of all folds for the
    better half of these.
    """

    def __init__(self, line: CommandLine, tree: Tree) -> None:
        self.line, self.started, self.name = line, time.monotonic(), "auto"
        self.budget = math.inf if tree.get("budget") is None else seconds_of(tree["budget"])
        self.seed, self.spec = int(tree.get("seed_everything", 1)), tree["data"]
        self.trials = [Trial(words) for words in tree.get("candidates") or CANDIDATES]
        self.trees: dict[str, Tree] = {}  # by words, as the next
        self.found: dict[str, HeldOut] = {}
        self.closed: list[str] = []  # what takes no step; of it the forms, which learn from the shots
        self.forms: set[str] = set()
        self.with_text: set[str] = set()  # what has learnt from texts
        self.soft: set[str] = set()  # what goes on from a closed form while features change under it
        self.whole: list[str] = []  # what was judged by as many steps as its run would take
        self.judges: dict[str, Judge] = {}  # by backbone
        self.data = data_of(tree)
        self.batch_size = self.data.batch_size  # where a candidate has none of its own
        self.plan: tuple[Tensor, range] | None = None  # folds of the shots, and which are held out

    @property
    def left(self) -> float:
        """Seconds of the budget that are left."""
        return self.budget - (time.monotonic() - self.started)

    def run(self) -> tuple[CommandLine, Choice]:
        """Tries what the budget allows, and chooses."""
        trained = []
        for trial in self.trials:
            if self.left <= 0 and self.found:
                trial.state = "left out: the budget was spent"
            elif self.first(trial):
                trained.append(trial)
        self.go_on(trained)
        chosen = self.best()
        chosen.budget, chosen.seconds = self.budget, round(self.budget - self.left, 2)
        chosen.trials = [asdict(trial) for trial in self.trials]
        logger.info("auto: %s, for %s.", chosen.words, chosen.why)
        return self.answer(chosen.words), chosen

    # ----------------------------------------------------------------------------------------------- command lines

    def words_with(self, words: str) -> list[str]:
        """The command line with a candidate between the configs and the options that were given."""
        given = [pair for pair in self.line.words if pair[0].partition(".")[0] not in CHOOSING]
        before, after = ([(k, v) for k, v in given if (k == "config") is which] for which in (True, False))
        spelt = [[word for key, value in pairs for word in (f"--{key}", value)] for pairs in (before, after)]
        return ["fit", *spelt[0], *shlex.split(words), *spelt[1], *(f"--{name}=null" for name in CHOOSING)]

    def answer(self, words: str) -> CommandLine:
        """The command line of a candidate, whose run bears the name of this one."""
        named = [] if any(key == "run.name" for key, _ in self.line.words) else ["--run.name", self.line.name]
        line = read_command_line([*self.words_with(words), *named], list(OPTIONS))
        line.flags |= self.line.flags
        return line

    # ----------------------------------------------------------------------------------------------- one candidate

    @contextmanager
    def module(self, words: str) -> Iterator[tuple[FewShotModule, Judge]]:
        """A candidate that has learnt nothing, and who judges it; its backbone is given back untouched."""
        tree = self.trees[words]
        judge = self.judge(tree)
        module = build(judge.backbone, self.data, self.seed, **method_of(tree))
        try:
            place(module, judge.trainer)
            judge.owner, judge.part, judge.seconds = module, 1, None
            self.data.batch_size = int(tree["data"]["init_args"].get("batch_size", self.batch_size))
            judge.settings = settings_of_folds(tree) if module.takes_steps else {}
            yield module, judge
        finally:
            judge.backbone.detach()

    def judge(self, tree: Tree) -> Judge:
        """Who judges candidates on a backbone, with the features of the shots; one for each."""
        key = json.dumps(tree["model"]["init_args"]["backbone"], sort_keys=True, default=str)
        if key not in self.judges:
            backbone = backbone_of(tree)
            self.data.use_preprocessing(backbone.preprocessing)
            trainer = make_trainer([FeatureStore(backbone)], **settings_of_folds(tree))
            if trainer.world_size > 1:
                raise UserError(f"{self.name} judges on one device: --trainer.devices 1; several may fit its choice.")
            self.data.trainer = trainer
            self.data.setup("fit")
            self.judges[key] = Judge(self.data, trainer)
        return self.judges[key]

    def first(self, trial: Trial) -> bool:
        """Judges a closed form, or something that takes steps by a first short round; says if that."""
        steps = False
        with self.timed(trial):
            self.read(trial.words)
            with self.module(trial.words) as (module, judge):
                trial.method = module.method
                if self.plan is None:
                    self.plan = divided(judge.label, self.data.split_seed)
                fold, which = self.plan
                steps, judge.part = module.takes_steps, SHORT
                if any(isinstance(part, LinearProbe) and part.starts_softly for part in module.modules()):
                    self.soft.add(trial.words)
                self.with_text |= {trial.words} if texts_in(module) else set()
                if not steps:
                    self.closed.append(trial.words)
                    self.forms |= {trial.words} if closed_form(module.classifier) else set()
                    self.note(trial, judge.out_of_fold(module, fold, which))
                elif which:
                    answer = partial(judge.out_of_fold, module, fold, range(1))
                    self.note(trial, self.within(judge, self.left / 12, answer))
                else:
                    trial.state = NOT_JUDGED
                    if trial.words in self.soft:  # how long it takes decides
                        every = torch.arange(len(judge.label))
                        self.within(judge, self.left / 12, partial(judge.trained, module, every, every[:1]))
        return steps and trial.words in self.found

    def read(self, words: str) -> None:
        """Reads the settings of a candidate; raises UserError where they are refused, or of other data."""
        _, tree = settings(read_command_line(self.words_with(words), list(OPTIONS)))
        if drawn(tree["data"]) != drawn(self.spec):
            raise UserError("a candidate may change nothing of the data but their batch_size")
        self.trees[words] = tree

    @contextmanager
    def timed(self, trial: Trial) -> Iterator[None]:
        """Times what is done for a candidate, writes down that it is refused, and says in a line what came of it."""
        clock = time.monotonic()
        try:
            yield
        except UserError as error:
            trial.state = f"refused: {error}"
            self.found.pop(trial.words, None)
            trial.accuracy = trial.log_loss = None
        trial.seconds = round(trial.seconds + time.monotonic() - clock, 2)
        what = trial.state
        if trial.accuracy is not None:
            what = f"{trial.accuracy:.1%} of {trial.held_out} held-out shots"
        name = f"{trial.method} ({trial.words or 'as configured'})" if trial.method else trial.words
        left = f", {max(0.0, self.left):.0f} s left" if math.isfinite(self.budget) else ""
        logger.info("%s: %s: %s; %.1f s%s", self.name, name, what, trial.seconds, left)

    def note(self, trial: Trial, found: HeldOut | None) -> None:
        """Writes down what the held-out logits of a candidate are worth."""
        if found is None:
            trial.state = NOT_JUDGED
            return
        if not found.logits.isfinite().all():
            raise UserError("its logits are not finite")
        self.found[trial.words], trial.held_out = found, len(found.label)
        trial.accuracy = round(accuracy(found.logits, found.label), 4)
        trial.log_loss = round(log_loss(found.logits, found.label), 4)

    def within(self, judge: Judge, seconds: float, answer: Callable[[], Found]) -> Found:
        """What a judge finds by steps, which may take some seconds.

        Raises:
            UserError: it takes longer.
        """
        judge.seconds, clock = max(1, math.ceil(seconds)), time.monotonic()
        found = answer()
        if time.monotonic() - clock >= judge.seconds:
            raise UserError(f"training does not fit into the budget, of which {max(0, self.left):.0f} s are left")
        return found

    # ---------------------------------------------------------------------------------------------- further rounds

    def go_on(self, trained: list[Trial]) -> None:
        """Gives the better half of what takes steps all of them, and the better half of these all folds."""
        fold, which = self.plan or (torch.empty(0), range(0))
        rounds = [which[:1], which[1:]] if len(which) > 1 else [which]
        for number, held in enumerate(rounds):
            better = sorted((t for t in trained if t.words in self.found), key=self.rank, reverse=True)
            trained = better[: math.ceil(len(better) / 2)]
            for trial in better[len(trained) :]:
                trial.state = f"left out: others were better in round {number + 1}"
            for trial in list(trained):
                cost = trial.seconds * (len(held) if number else SHORT)
                if 2 * cost > self.left:  # the run itself takes as long again
                    trial.state += f", in round {number + 1} alone: the next takes {cost:.0f} s"
                    trained.remove(trial)  # or later rounds would add to what a part of the steps was worth
                    continue
                with self.timed(trial), self.module(trial.words) as (module, judge):
                    answer = partial(judge.out_of_fold, module, fold, held)
                    found = self.within(judge, self.left / 2, answer)
                    assert found is not None
                    self.note(trial, joined(self.found[trial.words], found) if number else found)
                    self.whole.append(trial.words)

    def rank(self, trial: Trial) -> tuple[float, float]:
        """Accuracy first, then the log loss."""
        return trial.accuracy or 0.0, -(trial.log_loss or 0.0)

    # ----------------------------------------------------------------------------------------------------- the end

    def best(self) -> Choice:
        """The best of what was judged by as many steps as it will take; by a rule where nothing could be held out.

        Few images judge badly, and of many candidates one is lucky: :data:`SEVERAL_LAYERS` stays where no closed form
        is clearly better.

        Raises:
            UserError: no candidate can be fitted.
        """
        possible = [trial for trial in self.trials if not trial.state.startswith(("refused", "left out"))]
        if not possible:
            raise UserError(f"No candidate can be fitted: {self.trials[0].words} is {self.trials[0].state}.")
        if not self.plan or not self.plan[1]:
            return self.by_rule(possible)
        contenders = {t.words: self.found[t.words] for t in possible if t.words in {*self.whole, *self.closed}}
        contenders |= self.pools(contenders)
        if not contenders:
            return Choice(possible[0].words, "nothing else was judged within the budget")
        closed = {words: found for words, found in contenders.items() if words not in self.whole} or contenders
        first = of_closed(closed, SEVERAL_LAYERS)
        leading = ahead_of(contenders, first, self.whole, set() if first in self.with_text else self.soft)
        words = first_of(leading)
        why, right = reason(words, *shared({**closed, **leading}))
        flattered = 0.0 if words == SEVERAL_LAYERS else optimism_of(right)  # which is no choice by its score
        told = ahead(contenders[words], flattered, self.growth(words))
        return Choice(words, why, calibration=told.plain())

    def by_rule(self, possible: list[Trial]) -> Choice:
        """Where each class has one image: class means with the text if that is right about half of them.

        Else what goes on from ridge regression while features change, if there is time for it; or ridge regression, on
        several layers where that is a candidate.
        """
        texts = [accuracy(f.logits, f.label) for t in possible if (f := self.found.get(t.words))]
        known = max(texts, default=0.0)
        wanted = "ClassMeanText" if known >= TRUSTED else "Ridge"
        fitting = [trial for trial in possible if trial.method == wanted] or possible
        trial = next((t for t in fitting if t.words == SEVERAL_LAYERS), fitting[0])
        if wanted == "Ridge":
            there_is_time = (t for t in possible if t.words in self.soft and 2 * SHORT * t.seconds <= self.left)
            trial = next(there_is_time, trial)
        said = f"the text is right about {known:.0%} of them" if texts else "there is no text"
        return Choice(trial.words, f"the rule for one image a class, of which none can be held out: {said}")

    def pools(self, judged: dict[str, HeldOut]) -> dict[str, HeldOut]:
        """Averages of the best two, three, ... closed forms on one backbone, by words."""
        order = sorted(
            (t for t in self.trials if t.words in judged and t.words in self.forms), key=self.rank, reverse=True
        )
        if not order:
            return {}
        backbone = self.trees[order[0].words]["model"]["init_args"]["backbone"]
        same = [t.words for t in order if self.trees[t.words]["model"]["init_args"]["backbone"] == backbone]
        first, found = same[0], {}
        options = read_command_line(["fit", *shlex.split(first)], list(OPTIONS)).words
        kept = [(key, value) for key, value in options if key != "config" and not key.startswith("model.classifier")]
        rest = "".join(f"--{key} {shlex.quote(value)} " for key, value in kept)
        for size in range(2, min(POOLED, len(same)) + 1):
            members = [stated(self.trees[words]["model"]["init_args"]["classifier"]) for words in same[:size]]
            words = f"--config methods/average.yaml {rest}--model.classifier.members {shlex.quote(json.dumps(members))}"
            found[words] = averaged([judged[each] for each in same[:size]])
            self.with_text |= {words} if self.with_text.intersection(same[:size]) else set()
        return found

    def growth(self, words: str) -> float:
        """The exponent by which errors fall with shots: of a closed form by two folds beside four; or the usual one."""
        fold, which = self.plan or (torch.empty(0), range(0))
        if words not in self.forms or len(which) < FOLDS or self.left <= 0:
            return GROWTH
        for judge in self.judges.values():
            judge.parts.clear()  # nothing more is judged on the folds, and of many classes they are large
        with self.module(words) as (module, judge):
            halves = judge.out_of_fold(module, fold % 2, range(2))
        return GROWTH if halves is None else growth_of(halves, self.found[words])
