"""The LightningModule: freezes, injects, trains what a method trains, and keeps checkpoints small."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

import lightning.pytorch as pl
import torch
from lightning.pytorch.core.mixins.hparams_mixin import _given_hyperparameters
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor
from torch.optim import AdamW
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassCalibrationError, MulticlassF1Score

from kshot import __version__
from kshot.adapters import Adapter, SlotAdapter, unadapted
from kshot.adapters.base import derived_seed
from kshot.backbones import Backbone, VisionLanguageBackbone
from kshot.checkpoint import HEADER, check_fits
from kshot.classifiers import Classifier, ClassifierFactory, Task, TextPrompt
from kshot.classifiers.base import cosine_logits
from kshot.classifiers.zero_shot import TextFeatures
from kshot.errors import UserError
from kshot.optim import OptimizerFactory, ScheduleFactory
from kshot.slots import AdapterLayer

if TYPE_CHECKING:
    from kshot.data.datamodule import Batch, FewShotDataModule


class FewShotModule(pl.LightningModule):
    """Adapts a frozen backbone to a task from a few images a class.

    Args:
        backbone: the frozen model.
        classifier: from features to logits.
        class_names: linked from the data set.
        templates: linked from the data set.
        adapter: a weight-tuning method, or none.
        targets: patterns that choose what the adapter changes, ``image.*.[qv]``.
        optimizer: for the trainable parameters.
        schedule: of the learning rate, per step; None keeps it constant.
        cache_features: run an image tower that nothing trains once per image and keep the features.

    Raises:
        UserError: a part refuses another, such as a text classifier a backbone without text tower.
    """

    def __init__(
        self,
        backbone: Backbone,
        classifier: ClassifierFactory = TextPrompt,
        class_names: Sequence[str] = (),
        templates: Sequence[str] = ("a photo of a {}.",),
        adapter: Adapter | None = None,
        targets: Sequence[str] = ("*.[qkv]",),
        optimizer: OptimizerFactory = AdamW,
        schedule: ScheduleFactory | None = None,
        cache_features: bool = True,
    ) -> None:
        super().__init__()
        if _given_hyperparameters.get() is not None:  # the command line's plain config; in a script these are modules
            self.save_hyperparameters()
        self.strict_loading = False  # only trainable tensors are saved; on_load_checkpoint compares the names itself
        task = Task(tuple(class_names), tuple(templates))
        self.adapter = adapter
        if adapter is not None:
            adapter.inject(backbone, list(targets))
        self.classifier: Classifier = classifier(backbone=backbone, task=task)
        if adapter is not None and self.classifier.closed_form:
            raise UserError(
                f"{type(self.classifier).__name__} has a closed form and takes no gradient step: {self.method} would "
                f"leave {type(adapter).__name__} untrained: use LinearProbe or TextPrompt, or adapter: null."
            )
        self.optimizer_factory, self.schedule_factory = optimizer, schedule
        self.cache_features = cache_features
        self.run_seed = torch.initial_seed()
        self.preflight_done = False
        classes = len(class_names)
        self.accuracy = MulticlassAccuracy(classes, average="micro")  # of the validation shots
        self.test_metrics = MetricCollection(
            {
                "acc": MulticlassAccuracy(classes, average="micro"),
                "acc_class_mean": MulticlassAccuracy(classes, average="macro"),
                "f1_macro": MulticlassF1Score(classes, average="macro"),
            }
        )
        self.class_accuracy = MulticlassAccuracy(classes, average="none")
        self.calibration = MulticlassCalibrationError(classes, n_bins=15)
        self.zero_shot_accuracy = MulticlassAccuracy(classes, average="micro")

    @property
    def backbone(self) -> Backbone:
        """The backbone, which the classifier owns."""
        return self.classifier.backbone

    @property
    def method(self) -> str:
        """What is trained, in one word or two: ``LoRA``, ``CoOp``, ``CoOp + LoRA``, ``TextPrompt``."""
        parts = [type(self.classifier).__name__] + ([type(self.adapter).__name__] if self.adapter else [])
        return " + ".join(parts)

    @property
    def closed_form(self) -> bool:
        """True when no gradient step is taken: the classifier has a closed form, or there is nothing to train."""
        return self.classifier.closed_form or not any(p.requires_grad for p in self.parameters())

    def has_frozen_images(self) -> bool:
        """True when nothing in the image tower trains, so that features can be kept."""
        return not self.backbone.trainable("image")

    # ------------------------------------------------------------------------------------------------ features, losses

    def features_of(self, batch: Batch) -> Tensor:
        """Image features, (B, D): those of the batch, or computed from its images."""
        if batch.input.ndim == 2:
            return batch.input
        if self.has_frozen_images():
            with torch.no_grad():
                return self.backbone.encode_image(batch.input)
        return self.backbone.encode_image(batch.input)

    def losses(self, features: Tensor, label: Tensor) -> dict[str, Tensor]:
        """The classifier's terms and the adapter's penalty."""
        terms = self.classifier.losses(features, label)
        if isinstance(self.adapter, SlotAdapter):
            penalty = self.adapter.penalty([m for m in self.modules() if isinstance(m, AdapterLayer)])
            if penalty is not None:
                terms["penalty"] = penalty
        return terms

    def forward(self, image: Tensor) -> Tensor:
        """Logits, (B, classes), of images, (B, 3, H, W), uint8 or in [0, 1]."""
        logits: Tensor = self.classifier(self.backbone.encode_image(image))
        return logits

    def preflight(self) -> None:
        """Runs one step on noise and checks that a gradient reaches every trainable tensor.

        Raises:
            UserError: names the tensors that nothing would train.
        """
        self.preflight_done = True
        if self.closed_form:
            return
        noise = torch.Generator().manual_seed(0)
        size = self.backbone.image_size
        image = torch.randint(0, 256, (2, 3, size, size), dtype=torch.uint8, generator=noise).to(self.device)
        label = torch.arange(2, device=self.device) % len(self.classifier.task.class_names)
        with torch.random.fork_rng(), torch.enable_grad():
            features = self.backbone.encode_image(image)
            sum(self.losses(features, label).values(), torch.zeros((), device=self.device)).backward()
        untouched = [name for name, p in self.named_parameters() if p.requires_grad and p.grad is None]
        self.zero_grad(set_to_none=True)
        if untouched:
            raise UserError(
                f"{len(untouched)} trainable tensors get no gradient, among them {untouched[0]}: nothing downstream of "
                f"them enters the loss of {self.method}. Narrow targets to what the classifier uses."
            )

    # ------------------------------------------------------------------------------------------------ training

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """The optimizer over trainable parameters, and the schedule over the run's own number of steps."""
        parameters = [p for p in self.parameters() if p.requires_grad]
        if not parameters:
            return None
        optimizer = self.optimizer_factory(params=parameters)
        if self.schedule_factory is None:
            return optimizer
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = self.schedule_factory(optimizer=optimizer, total_steps=steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_fit_start(self) -> None:
        """Checks the gradients, keeps the features of a frozen tower, and solves what has a closed form."""
        if not self.preflight_done:
            self.preflight()
        data = cast("FewShotDataModule | None", getattr(self.trainer, "datamodule", None))
        if data is not None:
            self.keep_features(data)
        self.train()  # Lightning trains in the modes it finds, and the backbone was built in evaluation mode
        if self.closed_form:
            self.trainer.should_stop = True

    def keep_features(self, data: FewShotDataModule) -> None:
        """Replaces the images of a frozen tower by their features, view by view, and solves a closed form from them."""
        closed = self.classifier.closed_form
        if not closed and (self.closed_form or not self.cache_features or not self.has_frozen_images()):
            return
        views = data.train_views()  # 0 when every epoch has views of its own
        encoded = [self.encode_all(data.eval_order_train_dataloader(view)) for view in range(views or int(closed))]
        if closed:
            self.classifier.fit_features(torch.cat([f for f, _ in encoded]), torch.cat([label for _, label in encoded]))
        if views:
            data.replace_train_inputs(torch.stack([f for f, _ in encoded]).cpu())
        validation = data.val_dataloader()
        if validation:
            data.replace_val_inputs(self.encode_all(validation)[0].cpu())

    @torch.no_grad()
    def encode_all(self, loader: Any) -> tuple[Tensor, Tensor]:
        """Features, (N, D), and labels, (N,), of everything in a loader, on this module's device."""
        was_training = self.training
        self.eval()
        features, labels = [], []
        with self.trainer.precision_plugin.forward_context():
            for batch in loader:
                features.append(self.features_of(batch._replace(input=batch.input.to(self.device))).float())
                labels.append(batch.label.to(self.device))
        self.train(was_training)
        return torch.cat(features), torch.cat(labels)

    def on_train_epoch_start(self) -> None:
        """Makes the chance in an epoch depend on the seed and the epoch alone, so that a resumed run is the same."""
        torch.manual_seed(derived_seed(self.run_seed, self.current_epoch))

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:  # noqa: ARG002  Lightning's signature
        """One step on a few images.

        Raises:
            UserError: the loss is not finite.
        """
        terms = self.losses(self.features_of(batch), batch.label)
        loss = sum(terms.values(), torch.zeros((), device=self.device))
        if not torch.isfinite(loss):
            raise UserError(
                f"The loss is {loss.item()} at step {self.global_step}: lower model.optimizer.lr, or compute in "
                "--trainer.precision 32-true or bf16-mixed."
            )
        self.log("train/loss", loss, prog_bar=True, on_step=False, on_epoch=True, batch_size=len(batch.label))
        if len(terms) > 1:
            named = {f"train/{name}": value.detach() for name, value in terms.items()}
            self.log_dict(named, on_step=False, on_epoch=True, batch_size=len(batch.label))
        return loss

    # ------------------------------------------------------------------------------------------------ evaluation

    def logits_of(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Features and float32 logits of a batch."""
        features = self.features_of(batch)
        return features, cast(Tensor, self.classifier(features)).float()

    def validation_step(self, batch: Batch, batch_idx: int) -> None:  # noqa: ARG002  Lightning's signature
        """Counts correct validation shots."""
        _, logits = self.logits_of(batch)
        self.accuracy(logits, batch.label)
        self.log("val/acc", self.accuracy, prog_bar=True, batch_size=len(batch.label))

    def on_test_start(self) -> None:
        """Prepares the zero-shot row: text features of the untouched backbone."""
        backbone = self.backbone
        self.zero_shot_text: Tensor | None = None
        if isinstance(backbone, VisionLanguageBackbone):
            task = self.classifier.task
            with unadapted(backbone), torch.no_grad():
                self.zero_shot_text = TextFeatures(backbone, task.class_names, task.templates).encode()

    def test_step(self, batch: Batch, batch_idx: int) -> None:  # noqa: ARG002  Lightning's signature
        """Counts what is right with the adapted and with the untouched backbone."""
        features, logits = self.logits_of(batch)
        self.test_metrics.update(logits, batch.label)
        self.class_accuracy.update(logits, batch.label)
        # torchmetrics puts a confidence of exactly 1 into a bin of its own (its issue 3510): stay just below.
        self.calibration.update(logits.softmax(-1).clamp(max=1 - 1e-6), batch.label)
        if self.zero_shot_text is not None:
            if not self.has_frozen_images():
                with unadapted(self.backbone):
                    features = self.backbone.encode_image(batch.input)
            scale = cast(VisionLanguageBackbone, self.backbone).logit_scale
            self.zero_shot_accuracy.update(cosine_logits(features, self.zero_shot_text, scale), batch.label)

    def on_test_epoch_end(self) -> None:
        """Logs the test results."""
        self.log_dict({f"test/{name}": value for name, value in self.test_metrics.compute().items()})
        self.log("test/ece", self.calibration.compute())
        if self.zero_shot_text is not None:
            self.log("test/zero_shot_acc", self.zero_shot_accuracy.compute())
        self.per_class = self.class_accuracy.compute().tolist()
        for metric in (self.test_metrics, self.class_accuracy, self.calibration, self.zero_shot_accuracy):
            metric.reset()

    def predict_step(self, batch: Batch, batch_idx: int) -> tuple[Tensor, Tensor]:  # noqa: ARG002  Lightning's signature
        """Positions, (B,), and class probabilities, (B, classes)."""
        _, logits = self.logits_of(batch)
        return batch.index.cpu(), logits.softmax(-1).cpu()

    # ------------------------------------------------------------------------------------------------ checkpoints

    def tuned_state(self) -> dict[str, Tensor]:
        """Everything that is not the frozen backbone: trainable tensors and what a closed form found."""
        frozen = {name for name, p in self.named_parameters() if not p.requires_grad}
        frozen |= {
            name
            for name, _ in self.named_buffers()
            if name.startswith("classifier.backbone.") and ".adapters." not in name
        }
        return {name: value for name, value in self.state_dict().items() if name not in frozen}

    def header(self) -> dict[str, Any]:
        """What a checkpoint says of itself, and what a loaded one is compared with."""
        data = getattr(self._trainer, "datamodule", None) if self._trainer is not None else None
        return {
            "method": self.method,
            "backbone": self.backbone.name,
            "backbone_sha256": self.backbone.weight_sha256,
            "class_names": list(self.classifier.task.class_names),
            "split": data.split_info() if data is not None else None,
            "kshot": __version__,
        }

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Leaves the frozen weights out."""
        checkpoint["state_dict"] = self.tuned_state()
        checkpoint[HEADER] = self.header()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuses a checkpoint of another backbone, method or task."""
        warnings.filterwarnings(
            "ignore", message="Found keys that are in the model state dict but not in the checkpoint"
        )
        check_fits(checkpoint.get(HEADER, {}), self.header(), checkpoint["state_dict"], self.tuned_state())
