"""What a test set is judged by."""

from __future__ import annotations

from torch import Tensor, nn
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassCalibrationError, MulticlassF1Score


class Meter(nn.Module):
    """Accuracy, micro and class-mean, macro F1, calibration, and the accuracy of zero-shot on the same images.

    Args:
        classes: of the test set.
    """

    def __init__(self, classes: int) -> None:
        super().__init__()
        classes = max(2, classes)  # what torchmetrics asks for; a single class is always right
        self.metrics = MetricCollection(
            {
                "acc": MulticlassAccuracy(classes, average="micro"),
                "acc_class_mean": MulticlassAccuracy(classes, average="macro"),
                "f1_macro": MulticlassF1Score(classes, average="macro"),
                "ece": MulticlassCalibrationError(classes, n_bins=15),
            },
            compute_groups=False,  # each is updated by itself
        )
        self.class_accuracy = MulticlassAccuracy(classes, average="none")
        self.zero_shot = MulticlassAccuracy(classes, average="micro")
        self.images = 0

    def update(self, logits: Tensor, label: Tensor, zero_shot: Tensor | None) -> None:
        """Counts a batch: logits, (B, C), labels, (B,), and zero-shot logits, (B, C), where there is a text tower."""
        for name, metric in self.metrics.items():
            # torchmetrics puts a confidence of exactly 1 into a bin of its own (its issue 3510): stay just below.
            metric.update(logits.softmax(-1).clamp(max=1 - 1e-6) if name == "ece" else logits, label)
        self.class_accuracy.update(logits, label)
        self.images += len(label)
        if zero_shot is not None:
            self.zero_shot.update(zero_shot, label)

    def results(self) -> tuple[dict[str, float], list[float]]:
        """The figures by name, and the accuracy of each class."""
        found = {name: float(value) for name, value in self.metrics.compute().items()}
        if self.zero_shot.update_called:
            found["zero_shot_acc"] = float(self.zero_shot.compute())
        return found, self.class_accuracy.compute().tolist()
