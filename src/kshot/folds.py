"""Logits of the shots by answers that did not see them: what a temperature, a forecast and a choice are made of."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from lightning.pytorch import Trainer
from torch import Tensor

from kshot.backbones import Backbone
from kshot.classifiers import Shots
from kshot.classifiers.base import TextClassifier
from kshot.data.datamodule import FewShotDataModule
from kshot.features import FeatureStore, encoded_keys, of_run, place, untouched_shots
from kshot.holding import merged
from kshot.mahalanobis import Mahalanobis, mahalanobis
from kshot.module import FewShotModule
from kshot.run import QUIET, fit, has_length, make_trainer, set_length

FOLDS = 4
OF_ONE_RUN = QUIET.keys() | {"callbacks", "plugins", "profiler", "default_root_dir", "enable_checkpointing"}
ENOUGH = 512  # images that are held out, after which no further fold is needed


@dataclass(frozen=True)
class HeldOut:
    """Logits of images by answers that were found without them.

    Attributes:
        logits: (M, C) in float64, on the CPU.
        label: (M,).
        index: (M,), positions in the training part.
        learnt: mean number of shots a class behind these answers.
        shots: mean number of shots a class behind an answer from all.
        folds: number of answers; 0 where nothing is learnt from the shots, so that all were unseen.
        mahalanobis: (M,), negative squared distances from the shots behind an answer, among the features that it was
            given (:meth:`~kshot.mahalanobis.Mahalanobis.score`); not a number where nobody measured.
    """

    logits: Tensor
    label: Tensor
    index: Tensor
    learnt: float
    shots: float
    folds: int
    mahalanobis: Tensor | None = None


def joined(first: HeldOut, second: HeldOut) -> HeldOut:
    """Logits of images that two lots of answers were about, each of their own."""
    total = first.folds + second.folds
    learnt = (first.folds * first.learnt + second.folds * second.learnt) / total
    logits, label, index = (
        torch.cat([getattr(first, name), getattr(second, name)]) for name in ("logits", "label", "index")
    )
    near = [each.mahalanobis for each in (first, second) if each.mahalanobis is not None]
    return HeldOut(logits, label, index, learnt, first.shots, total, torch.cat(near) if len(near) == 2 else None)


def stratified_folds(label: Tensor, count: int, seed: int) -> Tensor:
    """The fold of each image, (N,), so that each fold has the same share of every class, to one image.

    -1 marks an image that is the only one of its class: answers always learn from it.

    Args:
        label: (N,).
        count: number of folds, at least 2.
        seed: of the order within the classes.
    """
    chance = torch.Generator().manual_seed(seed)
    fold = torch.full_like(label, -1)
    for c in label.unique():
        members = (label == c).nonzero()[:, 0]
        turn = torch.arange(len(members)) + int(torch.randint(count, (1,), generator=chance))
        if len(members) > 1:
            fold[members[torch.randperm(len(members), generator=chance)]] = turn % count
    return fold


def folds_for(label: Tensor) -> tuple[int, int]:
    """How many folds to divide shots into, and how many of these suffice to be judged by; 0 where none can be made.

    At most :data:`FOLDS`, as many as the largest class has images, and as many as hold :data:`ENOUGH` images out.
    """
    count = min(FOLDS, int(label.bincount().max()))
    return (0, 0) if count < 2 else (count, min(count, -(-ENOUGH * count // len(label))))


def divided(label: Tensor, seed: int) -> tuple[Tensor, range]:
    """The fold of each shot, (N,), and the folds that suffice to be judged by; none where none can be made."""
    count, enough = folds_for(label)
    return stratified_folds(label, max(2, count), seed), range(enough)


def fold_settings(given: Mapping[str, Any]) -> dict[str, Any]:
    """What trainers of fits to some of the shots have in common with that of a run: no files, no validation."""
    kept = {name: value for name, value in given.items() if name not in OF_ONE_RUN}
    return kept | {"limit_val_batches": 0, "check_val_every_n_epoch": 1}


def twin_of(module: FewShotModule) -> FewShotModule:
    """A copy of a module, with values of its own for all that is learnt; what stays as it is, is shared.

    That is the whole backbone where nothing takes steps, and else its frozen weights and its tokenizer: a copy of a
    vocabulary takes longer than many a closed form.
    """
    backbone: Any = module.backbone
    if not module.takes_steps:
        return copy.deepcopy(module, {id(backbone): backbone})
    named = [*backbone.named_parameters(), *backbone.named_buffers()]
    own = [t for name, t in named if ".adapters." not in name and not name.startswith("shared.")]
    kept = [*(t for t in own if not t.requires_grad), getattr(backbone, "tokenizer", None)]
    return copy.deepcopy(module, {id(each): each for each in kept})


@dataclass
class Judge:
    """Finds what answers from some shots say of the others, which are seen as evaluation sees them.

    Args:
        data: the shots, open.
        trainer: gives device and precision, and carries the :class:`FeatureStore` of the backbone.
        owner: a module on that backbone, by which features are encoded; each of several in turn.
        settings: of the trainers of answers that take steps.
        part: such an answer takes one in so many of the steps that its run would take.
        seconds: after which it is stopped; None for never.
    """

    data: FewShotDataModule
    trainer: Trainer
    owner: Any = None
    settings: dict[str, Any] = field(default_factory=dict)
    part: int = 1
    seconds: int | None = None
    encoded: tuple[FewShotModule, list[Tensor]] | None = field(default=None, init=False)
    towers: dict[torch.dtype, str] = field(default_factory=dict, init=False)  # of twins, whose frozen weights are one's
    kept: dict[tuple[str, bool], Shots] = field(default_factory=dict, init=False)
    parts: dict[tuple[bool, tuple[int, ...]], Shots] = field(default_factory=dict, init=False)
    near: dict[tuple[bool, tuple[int, ...]], Tensor] = field(default_factory=dict, init=False)

    @property
    def limit(self) -> dict[str, Any]:
        """Of time, for a trainer."""
        return {} if self.seconds is None else {"max_time": {"seconds": self.seconds}}

    @property
    def backbone(self) -> Backbone:
        """The backbone."""
        return of_run(self.trainer).backbone

    @cached_property
    def label(self) -> Tensor:
        """(N,) of the shots."""
        return self.data.part("train").labels

    def shots(self, part: str) -> Shots:
        """Features of a part by the untouched backbone, all recorded views, as the owner's classifier takes them."""
        key = part, "unprojected" in self.owner.classifier.needs
        if key not in self.kept:
            if part == "judged":
                self.data.open_judged()
            self.kept[key] = untouched_shots(self.owner, self.data, self.trainer, part)
        return self.kept[key]

    @property
    def train(self) -> Shots:
        """Features of the shots."""
        return self.shots("train")

    @property
    def val(self) -> Shots | None:
        """Features of the validation images, where there are any."""
        return self.shots("val") if self.data.draw.val else None

    @property
    def judged(self) -> Tensor:
        """Features of the shots as evaluation sees them, (N, D)."""
        return self.shots("judged").features[0]

    def out_of_fold(self, unfitted: FewShotModule, fold: Tensor, which: Sequence[int]) -> HeldOut | None:
        """Logits of shots by answers that were found without them; None where none can be held out.

        Args:
            unfitted: a module that has learnt nothing, and stays so.
            fold: (N,), the fold of each shot.
            which: the folds to hold out, one after the other.
        """
        classes, label = len(self.label.unique()), self.label
        shots, every = len(label) / classes, torch.arange(len(label))
        held = [(fold == number).nonzero()[:, 0] for number in which]
        held = [some for some in held if len(some)]
        if not unfitted.takes_steps and "shots" not in unfitted.classifier.needs:
            near = torch.full(label.shape, torch.nan, dtype=torch.float64)
            for some in held:
                near[some] = self.nearness(some)
            return HeldOut(self.closed(unfitted, None, every), label, every, shots, shots, 0, near)
        if not held:
            return None
        answer = self.trained if unfitted.takes_steps else self.solved
        found = [answer(unfitted, every[~torch.isin(every, some)], some) for some in held]
        logits, near = (torch.cat(each) for each in zip(*found, strict=True))
        learnt = shots - sum(map(len, held)) / len(held) / classes
        index = torch.cat(held)
        return HeldOut(logits, label[index], index, learnt, shots, len(held), near)

    def solved(self, unfitted: FewShotModule, seen: Tensor, held: Tensor) -> tuple[Tensor, Tensor]:
        """Logits of held-out shots by a closed form of the others, and how near they lie to these."""
        return self.closed(unfitted, seen, held), self.nearness(held)

    def nearness(self, held: Tensor) -> Tensor:
        """How near held-out shots lie to the others for an untouched tower, (M,); found once for all answers."""
        key = "unprojected" in self.owner.classifier.needs, tuple(held.tolist())
        if key not in self.near:
            self.near[key] = near_the_others(self.judged, self.label, held)
        return self.near[key]

    def closed(self, unfitted: FewShotModule, seen: Tensor | None, held: Tensor) -> Tensor:
        """Logits of held-out shots by a closed form of the others; with None nothing is learnt."""
        twin = self.twin(unfitted)
        with torch.inference_mode(False), torch.no_grad(), self.trainer.precision_plugin.forward_context():
            for part, text in zip(texts_in(twin), self.texts(unfitted), strict=True):
                part.held = text
            if seen is not None:
                twin.classifier.fit(self.some(seen), self.val if "val" in twin.classifier.needs else None)
            logits: Tensor = twin.classifier(self.judged[held])
        return logits.double().cpu()

    def some(self, seen: Tensor) -> Shots:
        """Features of some of the shots, of which all closed forms that learn from these share what one has found."""
        key = "unprojected" in self.owner.classifier.needs, tuple(seen.tolist())
        if key not in self.parts:
            self.parts[key] = Shots(self.train.features[:, seen], self.train.label[seen])
        return self.parts[key]

    def texts(self, module: FewShotModule) -> list[Tensor]:
        """Class features of the texts in a module that trains nothing of them, encoded once."""
        if self.encoded is None or self.encoded[0] is not module:
            self.encoded = module, [part.encode() for part in texts_in(module)]
        return self.encoded[1]

    def trained(self, unfitted: FewShotModule, seen: Tensor, held: Tensor) -> tuple[Tensor, Tensor]:
        """Logits of held-out shots by a run on the others, and how near they lie to these for its own tower."""
        twin, data = self.twin(unfitted), self.data.fold(seen.tolist())
        store, trainer = FeatureStore(twin.backbone, False, self.towers), make_trainer(**self.settings, **self.limit)
        store.memory = of_run(self.trainer).memory
        if not has_length(self.settings):
            set_length(trainer, self.data)
        shorten(trainer, self.part)
        fit(twin, data, trainer, store=store)
        place(twin, self.trainer)  # which a trainer leaves on the CPU
        context = trainer.precision_plugin.forward_context()
        with torch.inference_mode(False), torch.no_grad(), context, merged(twin.classifier):
            features = self.seen_by(twin)
            logits: Tensor = twin.classifier(features[held])
        near = self.nearness(held) if twin.has_frozen_images else near_the_others(features, self.label, held)
        return logits.double().cpu(), near

    def seen_by(self, module: FewShotModule) -> Tensor:
        """Features of all shots as evaluation sees them, (N, D), as the classifier of a fitted module is given them."""
        if module.has_frozen_images:
            return self.judged.to(module.device)
        self.data.open_judged()
        keys = [(i, 0) for i in range(len(self.label))]
        return encoded_keys(module, self.data, self.trainer, "judged", keys, module.features_of)

    def mahalanobis(self) -> Mahalanobis:
        """Means and covariance of the shots among the features of the owner, which is fitted."""
        place(self.owner, self.trainer)
        context = self.trainer.precision_plugin.forward_context()
        with torch.inference_mode(False), torch.no_grad(), context, merged(self.owner.classifier):
            return mahalanobis(self.seen_by(self.owner), self.label)

    def twin(self, unfitted: FewShotModule) -> FewShotModule:
        """A copy to fit, where the trainer's run is."""
        twin = twin_of(unfitted)
        place(twin, self.trainer)
        return twin.eval()


def near_the_others(features: Tensor, label: Tensor, held: Tensor) -> Tensor:
    """Negative squared distances, (M,), of held-out images from the classes of all others, of features (N, D)."""
    seen = torch.ones(label.shape, dtype=torch.bool).index_fill(0, held, False)
    return mahalanobis(features[seen], label[seen]).score(features[held]).double().cpu()


def shorten(trainer: Trainer, part: int) -> None:
    """Lets a trainer take one in so many of its steps."""
    for loop, name in ((trainer.fit_loop, "max_epochs"), (trainer.fit_loop.epoch_loop, "max_steps")):
        whole = getattr(loop, name)
        if whole is not None and whole > 0:
            setattr(loop, name, max(1, whole // part))


def texts_in(module: FewShotModule) -> list[TextClassifier]:
    """The text classifiers in a module."""
    return [part for part in module.modules() if isinstance(part, TextClassifier)]
