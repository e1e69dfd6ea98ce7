"""The LightningModule: freezes, injects, trains what a method trains, and keeps checkpoints small."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

import lightning.pytorch as pl
import torch
from lightning.pytorch.core.mixins.hparams_mixin import _given_hyperparameters
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.optim import AdamW
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassCalibrationError, MulticlassF1Score

from kshot import __version__
from kshot.adapters import Adapter, SearchProblem, Shared, unadapted
from kshot.adapters.base import derived_seed
from kshot.backbones import Backbone, VisionLanguageBackbone
from kshot.checkpoint import HEADER, TRAINING, check_origin, check_tensors
from kshot.classifiers import Classifier, ClassifierFactory, Task, TextPrompt
from kshot.classifiers.base import cosine_logits
from kshot.classifiers.zero_shot import TextFeatures
from kshot.errors import UserError
from kshot.layers import AdapterLayer
from kshot.optim import OptimizerFactory, ScheduleFactory

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
        head_lr: learning rate of the classifier's own tensors; None takes the optimizer's.
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
        head_lr: float | None = None,
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
                f"leave {type(adapter).__name__} untrained: use LinearProbe, TextPrompt or NearestClassMean with "
                "trainable: true, or adapter: null."
            )
        self.optimizer_factory, self.schedule_factory, self.head_lr = optimizer, schedule, head_lr
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
    def shared(self) -> list[Shared]:
        """What the adapter's layers share, with the method's hooks."""
        return [cast(Shared, module) for module in self.backbone.shared]

    def adapter_layers(self) -> dict[str, AdapterLayer]:
        """The adapter layers by module name."""
        return {name: module for name, module in self.named_modules() if isinstance(module, AdapterLayer)}

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
        for shared in self.shared:
            penalty = shared.penalty()
            if penalty is not None:
                terms["penalty"] = penalty
        return terms

    def loss_of(self, batch: Batch) -> Tensor:
        """The training loss of a batch: a scalar."""
        return sum(self.losses(self.features_of(batch), batch.label).values(), torch.zeros((), device=self.device))

    def forward(self, image: Tensor) -> Tensor:
        """Logits, (B, classes), of images, (B, 3, H, W), uint8 or in [0, 1]."""
        logits: Tensor = self.classifier(self.backbone.encode_image(image))
        return logits

    def preflight(self, steps: int, data: FewShotDataModule | None = None) -> None:
        """Plans the method's schedule, runs one step on noise, and checks that a gradient reaches what trains.

        Args:
            steps: optimizer steps in the run.
            data: of the run, already set up.

        Raises:
            UserError: names the tensors that nothing would train, or what does not fit into the run.
        """
        self.preflight_done = True
        if self.closed_form:
            return
        for shared in self.shared:
            shared.plan(steps)
            if shared.searches and data is not None:
                data.train_halves()
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
        optimizer = self.optimizer_factory(params=self.parameter_groups(parameters))
        if self.schedule_factory is None:
            return optimizer
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = self.schedule_factory(optimizer=optimizer, total_steps=steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def parameter_groups(self, parameters: Sequence[nn.Parameter]) -> Any:
        """The parameters by role: weight decay spares what does not start from no change, a head may have its rate."""
        layers = self.adapter_layers().values()
        spared = {id(p) for v in layers for name, p in v.named_parameters(recurse=False) if name in v.undecayed}
        inside = {id(p) for p in self.backbone.parameters()}
        groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
        for p in parameters:
            own_rate = self.head_lr is not None and id(p) not in inside
            groups.setdefault((id(p) in spared, own_rate), []).append(p)
        if list(groups) == [(False, False)]:
            return parameters
        return [
            {"params": group}
            | ({"weight_decay": 0.0} if undecayed else {})
            | ({"lr": self.head_lr} if own_rate else {})
            for (undecayed, own_rate), group in groups.items()
        ]

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        """One step, and what the method does after it."""
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        for shared in self.shared:
            shared.after_step(self.trainer.global_step + 1, [getattr(optimizer, "optimizer", optimizer)])

    def on_fit_start(self) -> None:
        """Checks the gradients, keeps a frozen tower's features, and solves or searches what comes before training."""
        data = cast("FewShotDataModule | None", getattr(self.trainer, "datamodule", None))
        if not self.preflight_done:
            self.preflight(int(self.trainer.estimated_stepping_batches), data)
        if data is not None:
            self.keep_features(data)
        self.train()  # Lightning trains in the modes it finds, and the backbone was built in evaluation mode
        if self.closed_form:
            self.trainer.should_stop = True
        elif data is not None and self.trainer.ckpt_path is None:
            self.search(data)

    def search(self, data: FewShotDataModule) -> None:
        """Lets the method decide what to train, on two halves of the shots; the run trains it from fresh values."""
        for shared in self.shared:
            if not shared.searches:
                continue
            train, val = (map(self.on_device, half) for half in data.train_halves())
            problem = SearchProblem(
                train,
                val,
                self.loss_of,
                optimizer=lambda chosen: self.optimizer_factory(params=self.parameter_groups(list(chosen))),
                parameters=[p for p in self.parameters() if p.requires_grad],
                steps=int(self.trainer.estimated_stepping_batches),
            )
            torch.manual_seed(derived_seed(self.run_seed, "search"))
            with self.trainer.precision_plugin.forward_context():
                replaced = shared.search(problem)
            if replaced:
                self.trainer.strategy.setup_optimizers(self.trainer)

    def on_device(self, batch: Batch) -> Batch:
        """The batch where this module is."""
        return batch._replace(input=batch.input.to(self.device), label=batch.label.to(self.device))

    def keep_features(self, data: FewShotDataModule) -> None:
        """Gives the classifier the features it starts from, and replaces a frozen tower's images by their features."""
        keep = self.classifier.closed_form or (
            self.cache_features and self.has_frozen_images() and not self.closed_form
        )
        start = self.classifier.from_features and (self.classifier.closed_form or self.trainer.ckpt_path is None)
        views = data.train_views() if keep else 0  # 0 also when every epoch has views of its own
        encoded = [self.encode_all(data.eval_order_train_dataloader(view)) for view in range(views or int(start))]
        if start:
            self.classifier.fit_features(torch.cat([f for f, _ in encoded]), torch.cat([label for _, label in encoded]))
        if views:
            data.replace_train_inputs(torch.stack([f for f, _ in encoded]).cpu())
        if not keep:
            return
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
                here = self.on_device(batch)
                features.append(self.features_of(here).float())
                labels.append(here.label)
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

    def stored_state(self) -> dict[str, Tensor]:
        """The same as the small file holds it: methods may store coefficients in fewer bits."""
        state = self.tuned_state()
        for name, layer in self.adapter_layers().items():
            stored = layer.stored()
            if stored is not None:
                for own, _ in layer.named_parameters():
                    state.pop(f"{name}.{own}", None)
                state |= {f"{name}.{own}": tensor for own, tensor in stored.items()}
        return state

    def header(self) -> dict[str, Any]:
        """What a checkpoint says of itself, and what a loaded one is compared with."""
        data = getattr(self._trainer, "datamodule", None) if self._trainer is not None else None
        return {
            "method": self.method,
            "backbone": self.backbone.name,
            "backbone_sha256": self.backbone.weight_sha256,
            "class_names": list(self.classifier.task.class_names),
            "adapter": None if self.adapter is None else self.adapter.settings(),
            "frozen": [shared.fingerprint() for shared in self.shared],
            "split": data.split_info() if data is not None else None,
            "kshot": __version__,
        }

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Leaves the frozen weights out."""
        checkpoint["state_dict"] = self.tuned_state()
        checkpoint[HEADER] = self.header()
        checkpoint[TRAINING] = [shared.training_state() for shared in self.shared]

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuses a checkpoint of another backbone, method, basis or task, and takes on the shapes of this one."""
        warnings.filterwarnings(
            "ignore", message="Found keys that are in the model state dict but not in the checkpoint"
        )
        header, saved = checkpoint.get(HEADER, {}), checkpoint["state_dict"]
        check_origin(header, self.header())
        for name, layer in self.adapter_layers().items():
            own = {key.removeprefix(f"{name}."): saved.pop(key) for key in list(saved) if key.startswith(f"{name}.")}
            own = layer.from_stored(own)
            layer.fit_shapes(own)
            saved |= {f"{name}.{key}": tensor for key, tensor in own.items()}
        check_tensors(saved, self.tuned_state())
        for shared, state in zip(self.shared, checkpoint.get(TRAINING, []), strict=False):  # none in the small file
            shared.load_training_state(state)
