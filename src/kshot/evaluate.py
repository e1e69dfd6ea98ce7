"""Measuring on test sets: metrics, the zero-shot row, one pass over each set."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn
from torchmetrics import Metric, MetricCollection, SumMetric
from torchmetrics.classification import (
    MulticlassAccuracy,
    MulticlassCalibrationError,
    MulticlassF1Score,
    MulticlassStatScores,
)

from kshot.backbones.language import projected
from kshot.calibration import BINS, Calibration
from kshot.classifiers.base import Task, cosine_logits
from kshot.classifiers.zero_shot import TextPrompt
from kshot.data.parts import Batch
from kshot.data.protocols import TestSet
from kshot.features import has_texts, of_run
from kshot.holding import merged
from kshot.predictions import Answers

Module = Any  # a FewShotModule, which imports this file


def comparable(logits: Tensor) -> Tensor:
    """Logits, (B, C), of two classes or more, which torchmetrics asks for: a single one has no rival that could win."""
    return logits if logits.shape[-1] > 1 else nn.functional.pad(logits, (0, 1), value=-torch.inf)


class Meter(nn.Module):
    """Accuracy, micro and class-mean, macro F1, calibration, and the accuracy of zero-shot on the same images.

    Means over classes are over those with images, as scikit-learn's balanced accuracy is. Calibration is that of
    probabilities after the temperature: the error over :data:`BINS` bins, also before it, and Brier's score, the mean
    of ``Σ_c (p_c - y_c)²``.

    Args:
        classes: of the test set.
        zero_shot: whether there are zero-shot logits.
        calibration: of the logits.
    """

    def __init__(self, classes: int, zero_shot: bool = False, calibration: Calibration | None = None) -> None:
        super().__init__()
        self.classes, self.calibration = classes, calibration or Calibration()
        classes = max(2, classes)  # what torchmetrics asks for; a single class is always right
        self.metrics = MetricCollection(
            {
                "acc": MulticlassAccuracy(classes, average="micro"),
                "acc_class_mean": MulticlassAccuracy(classes, average="macro"),
                "f1_macro": MulticlassF1Score(classes, average="macro"),
                "ece": MulticlassCalibrationError(classes, n_bins=BINS),
                "ece_before": MulticlassCalibrationError(classes, n_bins=BINS),
            },
            compute_groups=False,  # each is updated by itself
        )
        self.by_class = MulticlassStatScores(classes, average="none")
        self.zero_shot = MulticlassAccuracy(classes, average="micro") if zero_shot else None
        self.counted, self.reliability = SumMetric(), Reliability()

    def update(self, logits: Tensor, label: Tensor, zero_shot: Tensor | None) -> None:
        """Counts a batch: logits, (B, C), labels, (B,), and zero-shot logits, (B, C), where there is a text tower."""
        logits = comparable(logits)
        # torchmetrics puts a confidence of exactly 1 into a bin of its own (its issue 3510): stay just below.
        before, after = (z.softmax(-1).clamp(max=1 - 1e-6) for z in (logits, self.calibration.logits(logits)))
        given = {"ece": after, "ece_before": before}
        for name, metric in self.metrics.items():
            metric.update(given.get(name, logits), label)
        self.reliability.update(after, label)
        self.by_class.update(logits, label)
        self.counted.update(len(label))
        if self.zero_shot is not None and zero_shot is not None:
            self.zero_shot.update(comparable(zero_shot), label)

    def results(self) -> tuple[dict[str, float], list[float], int]:
        """The figures by name, the accuracy of each class, and the number of images; of all devices together.

        The accuracy of a class without images is not a number.
        """
        found = {name: float(value) for name, value in self.metrics.compute().items()}
        right, false, _, missed, images = self.by_class.compute().unbind(1)
        accuracy, there = right / images, images > 0
        if there.any() and not there.all():  # torchmetrics counts one without images as 0 where it was guessed
            found["acc_class_mean"] = float(accuracy[there].mean())
            found["f1_macro"] = float((2 * right / (2 * right + false + missed))[there].mean())
        if self.zero_shot is not None:
            found["zero_shot_acc"] = float(self.zero_shot.compute())
        found["brier"], _ = self.reliability.compute()
        return found, accuracy[: self.classes].tolist(), int(self.counted.compute())


class Reliability(Metric):
    """How often answers are right by how sure they are, in bins of equal width, and Brier's score.

    Attributes:
        bins: (3, :data:`BINS`): images, the sum of their confidences, and how many were right.
        squares: the sum of ``Σ_c (p_c - y_c)²`` over the images.
    """

    bins: Tensor
    squares: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("bins", torch.zeros(3, BINS), dist_reduce_fx="sum")
        self.add_state("squares", torch.zeros(()), dist_reduce_fx="sum")

    def update(self, probabilities: Tensor, label: Tensor) -> None:
        """Counts a batch: probabilities, (B, C), and labels, (B,)."""
        confidence, guess = probabilities.max(-1)
        bins = (confidence * BINS).long().clamp(max=BINS - 1)
        values = torch.stack([torch.ones_like(confidence), confidence, (guess == label).to(confidence)])
        self.bins.index_add_(1, bins, values.to(self.bins))
        self.squares += (probabilities - F.one_hot(label, probabilities.shape[1])).square().sum().to(self.squares)

    def compute(self) -> tuple[float, list[dict[str, float]]]:
        """The score, and of each bin with images their number, their mean confidence and their accuracy."""
        bins = [
            {"images": int(n), "confidence": round(float(c / n), 4), "accuracy": round(float(right / n), 4)}
            for n, c, right in self.bins.T
            if n > 0
        ]
        return float(self.squares / self.bins[0].sum()), bins


@dataclass
class Tested:
    """What a run was measured to be.

    Attributes:
        sets: figures by test set, the one with the classes trained on first.
        per_class: accuracy of each class by test set; not a number for a class without images.
        counts: images counted by test set.
        sizes: images that there are by test set; more than were counted where the trainer limits the batches.
        left_out: unreadable images by part.
        reliability: what bins of confidence hold, by test set.
        answers: to each image counted, and these images as a part, by test set; none without a FewShotDataModule.
    """

    sets: dict[str, dict[str, float]] = field(default_factory=dict)
    per_class: dict[str, list[float]] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)
    sizes: dict[str, int] = field(default_factory=dict)
    left_out: dict[str, int] = field(default_factory=dict)
    reliability: dict[str, list[dict[str, float]]] = field(default_factory=dict)
    answers: dict[str, tuple[dict[str, Tensor], Any]] = field(default_factory=dict, repr=False)


class Evaluation(Callback):
    """Goes through the test sets of a run one after the other.

    For each, the classifier serves its classes and runs merged; beside it stands the zero-shot row, by the untouched
    backbone and the data set's own sentences.

    Attributes:
        tested: what was found, of the test sets gone through so far.
    """

    def __init__(self) -> None:
        self.tested = Tested()
        self.open = ExitStack()
        self.current: TestSet | None = None

    def on_test_start(self, trainer: Trainer, pl_module: Module) -> None:
        """Lists the test sets."""
        data: Any = getattr(trainer, "datamodule", None)
        task = pl_module.classifier.task
        self.test_sets = [TestSet("test", *vars(task).values())] if data is None else list(data.test_sets)
        self.parts = [] if data is None else [data.part(part) for part in data.test_parts]
        if data is not None:
            self.tested.sizes, self.tested.left_out = data.test_sizes(), data.left_out()
        self.trained_on = task

    def on_test_batch_start(
        self, trainer: Trainer, pl_module: Module, batch: Batch, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Opens the test set of the batch, when it is another one."""
        del batch, batch_idx
        if self.current is not self.test_sets[dataloader_idx]:
            self._close(trainer)
            self._open(trainer, pl_module, self.test_sets[dataloader_idx])

    def _open(self, trainer: Trainer, pl_module: Module, test_set: TestSet) -> None:
        self.current, backbone, text = test_set, pl_module.backbone, None
        serve(pl_module, test_set)
        with torch.inference_mode(False), torch.no_grad(), trainer.precision_plugin.forward_context():
            if has_texts(backbone):
                with backbone.unadapted():
                    text = TextPrompt(backbone, Task(test_set.class_names, test_set.templates)).encode()
            self.open.enter_context(merged(pl_module.classifier))
        self.zero_shot_text, self.untouched = text, pl_module.has_frozen_images
        self.meter = Meter(len(test_set.class_names), text is not None, pl_module.calibration).to(pl_module.device)
        self.answers = Answers()

    def on_test_batch_end(
        self,
        trainer: Trainer,
        pl_module: Module,
        outputs: Any,
        batch: Batch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Counts what is right with the adapted and with the untouched backbone."""
        del batch_idx
        features, logits, zero_shot = outputs["features"], outputs["logits"], None
        if self.zero_shot_text is not None:
            if not self.untouched:
                with trainer.precision_plugin.forward_context():
                    features = pl_module.frozen_features_of(outputs["batch"])
            backbone = pl_module.backbone
            compared = (
                projected(features, backbone.projection) if "unprojected" in pl_module.classifier.needs else features
            )
            zero_shot = cosine_logits(compared, self.zero_shot_text, backbone.logit_scale)
        if self.parts and batch.frozen is None and (self.untouched or zero_shot is not None):
            of_run(trainer).note(self.parts[dataloader_idx], batch.index, features)
        self.meter.update(logits, batch.label, zero_shot)
        self.answers.add(batch.index, batch.label, logits, pl_module.calibration, zero_shot)

    def _close(self, trainer: Trainer) -> None:
        if self.current is None:
            return
        self.open.close()
        name, tested = self.current.name, self.tested
        if self.parts:
            number = self.test_sets.index(self.current)
            part = self.parts[number]
            of_run(trainer).note(part, torch.empty(0), torch.empty(0), last=True)
            answers = self.answers.whole(trainer.world_size)
            tested.answers[name] = answers, part.subset(answers["index"].tolist())
        tested.sets[name], tested.per_class[name], tested.counts[name] = self.meter.results()
        tested.reliability[name] = self.meter.reliability.compute()[1]
        limit = trainer.limit_test_batches  # a number of batches, or a share of them
        whole = isinstance(limit, float) and limit == 1.0
        counted, wanted = tested.counts[name], tested.sizes.setdefault(name, tested.counts[name])
        if whole and counted != wanted:
            raise RuntimeError(f"{counted} of {wanted} images of {name} were counted")
        self.current = None

    def on_test_epoch_end(self, trainer: Trainer, pl_module: Module) -> None:
        """Logs the results: of the classes trained on as ``test/acc``, of other test sets as ``test/NAME/acc``."""
        self._close(trainer)
        several = trainer.world_size > 1
        for number, (name, figures) in enumerate(self.tested.sets.items()):
            prefix = "test" if number == 0 else f"test/{name}"
            pl_module.log_dict({f"{prefix}/{figure}": value for figure, value in figures.items()}, sync_dist=several)
        serve(pl_module, TestSet("", self.trained_on.class_names, self.trained_on.templates))

    def on_exception(self, trainer: Trainer, pl_module: Any, exception: BaseException) -> None:
        """Leaves the test set."""
        del trainer, pl_module, exception
        self.open.close()


def serve(module: Module, test_set: TestSet) -> None:
    """Lets the classifier tell the classes of a test set apart.

    Raises:
        UserError: it is bound to other classes.
    """
    if Task(test_set.class_names, test_set.templates) != module.classifier.task:
        module.classifier.set_class_names(test_set.class_names, test_set.templates)
