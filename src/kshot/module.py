"""The LightningModule: freezes, injects, trains what a method trains, and keeps checkpoints small."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, cast

import lightning.pytorch as pl
import torch
from lightning.pytorch.core.mixins.hparams_mixin import _given_hyperparameters
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from torchmetrics.classification import MulticlassAccuracy

from kshot import __version__
from kshot.adapters import Adapter, SearchProblem, Shared, unadapted
from kshot.adapters.base import derived_seed
from kshot.backbones import Backbone, VisionLanguageBackbone
from kshot.checkpoint import HEADER, TRAINING, check_origin, check_tensors
from kshot.classifiers import Classifier, ClassifierFactory, Shots, Task, TextPrompt
from kshot.classifiers.base import cosine_logits
from kshot.classifiers.zero_shot import TextFeatures
from kshot.data.parts import Batch
from kshot.data.protocols import TestSet
from kshot.errors import UserError
from kshot.layers import AdapterLayer
from kshot.meter import Meter
from kshot.optim import OptimizerFactory, ScheduleFactory

if TYPE_CHECKING:
    from kshot.data.datamodule import FewShotDataModule

Encoder = Callable[[Tensor], Tensor]


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
        head_lr: learning rate of the classifier's own tensors, prompts in the image tower excepted; None takes the
            optimizer's.
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
        self.accuracy = MulticlassAccuracy(len(class_names), average="micro")  # of the validation shots

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
        """What is trained, in a few words: ``CoOp``, ``TextPrompt + LoRA``, ``DePT (PromptSRC) + LoRA``."""
        parts = [self.classifier.title] + ([type(self.adapter).__name__] if self.adapter else [])
        return " + ".join(parts)

    @property
    def closed_form(self) -> bool:
        """True when no gradient step is taken: the classifier has a closed form, or there is nothing to train."""
        return self.classifier.closed_form or not any(p.requires_grad for p in self.parameters())

    def has_frozen_images(self) -> bool:
        """True when nothing in the image tower trains, so that features can be kept."""
        return not self.backbone.trainable("image") and not self.classifier.prompts_images

    # ------------------------------------------------------------------------------------------------ features, losses

    def features_of(self, batch: Batch) -> Tensor:
        """Image features, (B, D): those of the batch, or computed from its images."""
        if batch.input.ndim == 2:
            return batch.input
        if self.has_frozen_images():
            with torch.no_grad():
                return self.classifier.encode_image(batch.input)
        return self.classifier.encode_image(batch.input)

    def frozen_features_of(self, batch: Batch) -> Tensor | None:
        """Image features, (B, D), of the untouched backbone, where the classifier learns from them."""
        if not self.classifier.learns_from_frozen or batch.frozen is not None:
            return batch.frozen
        with unadapted(self.backbone), torch.no_grad():
            return self.backbone.encode_image(batch.input)

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        """The classifier's terms and the adapter's penalty."""
        frozen = self.frozen_features_of(batch)
        terms = self.classifier.losses(self.features_of(batch), batch.label, frozen)
        for shared in self.shared:
            penalty = shared.penalty()
            if penalty is not None:
                terms["penalty"] = penalty
        return terms

    def loss_of(self, batch: Batch) -> Tensor:
        """The training loss of a batch: a scalar."""
        return sum(self.losses(batch).values(), torch.zeros((), device=self.device))

    def forward(self, image: Tensor) -> Tensor:
        """Logits, (B, classes), of images, (B, 3, H, W), uint8 or in [0, 1]."""
        logits: Tensor = self.classifier(self.classifier.encode_image(image))
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
        if data is not None:
            self.check_validation(data)
            self.check_classes(data)
            self.classifier.reserve(data.train_images())
        with unadapted(self.backbone), torch.no_grad():
            self.classifier.observe_frozen()
        if self.closed_form:
            return
        for shared in self.shared:
            shared.plan(steps)
            if shared.searches and data is not None:
                data.train_halves()
        if self.schedule_factory is not None:  # settings that it refuses are refused before anything is written
            optimizer = self.make_optimizer(list(self.trained().values()))
            self.schedule_factory(optimizer=optimizer, total_steps=max(1, steps), steps_per_epoch=1)
        noise = torch.Generator().manual_seed(0)
        size = self.backbone.image_size
        image = torch.randint(0, 256, (2, 3, size, size), dtype=torch.uint8, generator=noise).to(self.device)
        label = torch.arange(2, device=self.device) % len(self.classifier.task.class_names)
        batch = Batch(image, label, label)
        with torch.random.fork_rng(), torch.enable_grad():
            self.loss_of(batch).backward()
        untouched = [name for name, p in self.named_parameters() if p.requires_grad and p.grad is None]
        self.zero_grad(set_to_none=True)
        if untouched:
            raise UserError(
                f"{len(untouched)} trainable tensors get no gradient, among them {untouched[0]}: nothing downstream of "
                f"them enters the loss of {self.method}. Narrow targets to what the classifier uses."
            )

    def check_validation(self, data: FewShotDataModule) -> None:
        """Raises UserError when the classifier has nothing to choose its hyper-parameters by."""
        if self.classifier.selects and not data.draw.val:
            raise UserError(
                f"{type(self.classifier).__name__} chooses hyper-parameters on validation images, and "
                f"{data.dataset_name} has none: give values instead of null, or draw some of its training images: "
                "--data.sampler coop-v1+val."
            )

    def check_classes(self, data: FewShotDataModule) -> None:
        """Raises UserError when the data is to be tested on classes that the classifier cannot serve."""
        bound, own = self.classifier.class_bound, self.classifier.task.class_names
        for test_set in data.test_sets:
            if bound and test_set.class_names != own:
                raise UserError(
                    f"{type(self.classifier).__name__} cannot be tested on the classes of {test_set.name!r} "
                    f"(data.protocol: {data.protocol}): {bound}."
                )

    @property
    def selection(self) -> str:
        """What decided hyper-parameters: ``none``, ``fewshot-val``, ``percent-val``, or ``full-val`` for all."""
        if not self.classifier.selects or self._trainer is None:
            return "none"
        data = cast("FewShotDataModule", self.trainer.datamodule)  # type: ignore[attr-defined]  # Lightning's own
        if data.draw.val_shots is not None:
            return "fewshot-val"
        return "percent-val" if data.draw.sampler.startswith("percent") else "full-val"

    # ------------------------------------------------------------------------------------------------ training

    def setup(self, stage: str) -> None:
        """Makes room for what has a size of its own for each image, before there is an optimizer."""
        data = cast("FewShotDataModule | None", getattr(self.trainer, "datamodule", None))
        if stage == "fit" and data is not None:
            self.classifier.reserve(data.train_images())

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """The optimizer over trainable parameters, and the schedule over the run's own number of steps."""
        parameters = list(self.trained().values())
        if not parameters:
            return None
        optimizer = self.make_optimizer(parameters)
        if self.schedule_factory is None:
            return optimizer
        self.trainer.fit_loop.setup_data()  # or a run counted in steps knows nothing of its epochs yet
        steps = int(self.trainer.estimated_stepping_batches)
        each = max(1, math.ceil(self.trainer.num_training_batches / self.trainer.accumulate_grad_batches))
        schedule = self.schedule_factory(optimizer=optimizer, total_steps=steps, steps_per_epoch=each)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def make_optimizer(self, parameters: Sequence[nn.Parameter]) -> Optimizer:
        """The optimizer over some of the parameters.

        They are grouped by role: weight decay spares what does not start from no change, a head may have its own rate,
        and a method may set the rate of its parts in multiples of the optimizer's.
        """
        layers = self.adapter_layers().values()
        spared = {id(p) for v in layers for name, p in v.named_parameters(recurse=False) if name in v.undecayed}
        head = {id(p) for p in self.classifier.head_parameters()}
        factors = {id(p): factor for p, factor in self.classifier.rate_factors().items()}
        groups: dict[tuple[bool, bool, float], list[nn.Parameter]] = {}
        for p in parameters:
            own_rate = self.head_lr is not None and id(p) in head
            groups.setdefault((id(p) in spared, own_rate, factors.get(id(p), 1.0)), []).append(p)
        params: list[Any] = [
            {"params": group, "rate_factor": factor}
            | ({"weight_decay": 0.0} if undecayed else {})
            | ({"lr": self.head_lr} if own_rate else {})
            for (undecayed, own_rate, factor), group in groups.items()
        ]
        optimizer = self.optimizer_factory(params=params)
        for settings in optimizer.param_groups:
            settings["lr"] *= settings.pop("rate_factor")
        return optimizer

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
                optimizer=lambda chosen: self.make_optimizer(list(chosen)),
                parameters=list(self.trained().values()),
                steps=int(self.trainer.estimated_stepping_batches),
            )
            torch.manual_seed(derived_seed(self.run_seed, "search"))
            with self.trainer.precision_plugin.forward_context():
                replaced = shared.search(problem)
            if replaced:
                self.trainer.strategy.setup_optimizers(self.trainer)

    def on_device(self, batch: Batch) -> Batch:
        """The batch where this module is."""
        frozen = None if batch.frozen is None else batch.frozen.to(self.device)
        return batch._replace(input=batch.input.to(self.device), label=batch.label.to(self.device), frozen=frozen)

    def keep_features(self, data: FewShotDataModule) -> None:
        """Gives the classifier the features it starts from, and replaces a frozen tower's images by their features."""
        keep = self.classifier.closed_form or (
            self.cache_features and self.has_frozen_images() and not self.closed_form
        )
        start = self.classifier.from_features and (self.classifier.closed_form or self.trainer.ckpt_path is None)
        views = data.train_views()  # 0 when every epoch has views of its own
        if self.classifier.learns_from_frozen and self.cache_features and views:
            with unadapted(self.backbone):
                data.keep_frozen_features(self.encode_views(data, views, self.backbone.encode_image).features.cpu())
        train = self.encode_views(data, views if keep and views else 1) if (keep and views) or start else None
        val = self.validation_shots(data) if keep or start else None
        if train is not None and start:
            self.classifier.fit_features(train, val)
        if train is not None and keep and views:
            data.replace_train_inputs(train.features.cpu())
        if val is not None and keep:
            data.replace_val_inputs(val.features[0].cpu())

    def encode_views(self, data: FewShotDataModule, views: int, encode: Encoder | None = None) -> Shots:
        """Features of recorded views of the training images, by the classifier or by another encoder."""
        encoded = [self.encode_all(data.eval_order_train_dataloader(view), encode) for view in range(views)]
        return Shots(torch.stack([features for features, _ in encoded]), encoded[0][1])

    def validation_shots(self, data: FewShotDataModule) -> Shots | None:
        """Features of the validation images, one view each; None without any."""
        loader = data.val_dataloader()
        if not loader:
            return None
        features, label = self.encode_all(loader)
        return Shots(features.unsqueeze(0), label)

    @torch.no_grad()
    def encode_all(self, loader: Any, encode: Encoder | None = None) -> tuple[Tensor, Tensor]:
        """Features, (N, D), and labels, (N,), of everything in a loader, on this module's device.

        Args:
            loader: yields batches.
            encode: of images; None takes the classifier's, or the features that a batch holds.
        """
        was_training = self.training
        self.eval()
        features, labels = [], []
        with self.trainer.precision_plugin.forward_context():
            for batch in loader:
                here = self.on_device(batch)
                features.append((encode(here.input) if encode else self.features_of(here)).float())
                labels.append(here.label)
        self.train(was_training)
        return torch.cat(features), torch.cat(labels)

    def on_train_epoch_end(self) -> None:
        """Counts the epoch into the average of the tensors, where the method has one."""
        if self.classifier.averaging is not None:
            self.classifier.averaging.add(self.current_epoch + 1, self.trained())

    def trained(self) -> dict[str, nn.Parameter]:
        """Trainable tensors by name."""
        return {name: p for name, p in self.named_parameters() if p.requires_grad}

    @torch.no_grad()
    def take_average(self) -> None:
        """Puts the average over the epochs in the place of the trained tensors, where the method has one."""
        if self.classifier.averaging is not None:
            trained = self.trained()
            for name, mean in self.classifier.averaging.mean().items():
                trained[name].copy_(mean)

    def on_fit_end(self) -> None:
        """Takes the average, and chooses what is left to choose on the validation shots."""
        self.take_average()
        data = cast("FewShotDataModule | None", getattr(self.trainer, "datamodule", None))
        if self.classifier.selects and not self.classifier.closed_form and data is not None:
            val = self.validation_shots(data)
            assert val is not None, "check_validation has seen to it"
            self.classifier.select(val)

    def on_train_epoch_start(self) -> None:
        """Makes the chance in an epoch depend on the seed and the epoch alone, so that a resumed run is the same."""
        torch.manual_seed(derived_seed(self.run_seed, self.current_epoch))

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:  # noqa: ARG002  Lightning's signature
        """One step on a few images.

        Raises:
            UserError: the loss is not finite.
        """
        terms = self.losses(batch)
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

    def on_validation_start(self) -> None:
        """Takes the average in a validation of its own; within a fit the last tensors are validated."""
        if self.trainer.state.fn == "validate":
            self.take_average()

    def on_predict_start(self) -> None:
        """Takes the average."""
        self.take_average()

    def validation_step(self, batch: Batch, batch_idx: int) -> None:  # noqa: ARG002  Lightning's signature
        """Counts correct validation shots."""
        _, logits = self.logits_of(batch)
        self.accuracy(logits, batch.label)
        self.log("val/acc", self.accuracy, prog_bar=True, batch_size=len(batch.label))

    def on_test_start(self) -> None:
        """Takes on the averaged tensors, and begins with the first test set."""
        self.take_average()
        data = getattr(self.trainer, "datamodule", None)
        task = self.classifier.task
        self.test_sets = [TestSet("test", task.class_names, task.templates)] if data is None else list(data.test_sets)
        self.tested: dict[str, dict[str, float]] = {}
        self.per_class: dict[str, list[float]] = {}
        self.open_test_set(0)

    def open_test_set(self, number: int) -> None:
        """Serves the classes of a test set, and prepares its zero-shot row: text features of the untouched backbone."""
        self.test_set = self.test_sets[number]
        self.serve(self.test_set)
        names, templates, backbone = self.test_set.class_names, self.test_set.templates, self.backbone
        self.meter = Meter(len(names)).to(self.device)
        self.zero_shot_text: Tensor | None = None
        if isinstance(backbone, VisionLanguageBackbone):
            with unadapted(backbone), torch.no_grad():
                self.zero_shot_text = TextFeatures(backbone, names, templates).encode()

    def serve(self, test_set: TestSet) -> None:
        """Lets the classifier tell the classes of a test set apart."""
        if Task(test_set.class_names, test_set.templates) != self.classifier.task:
            self.classifier.set_class_names(test_set.class_names, test_set.templates)

    def close_test_set(self) -> None:
        """Keeps the results of a test set."""
        results, self.per_class[self.test_set.name] = self.meter.results()
        self.tested[self.test_set.name] = results

    def test_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:  # noqa: ARG002  Lightning's signature
        """Counts what is right with the adapted and with the untouched backbone."""
        if self.test_sets[dataloader_idx].name != self.test_set.name:
            self.close_test_set()
            self.open_test_set(dataloader_idx)
        features, logits = self.logits_of(batch)
        zero_shot = None
        if self.zero_shot_text is not None:
            if not self.has_frozen_images():
                with unadapted(self.backbone):
                    features = self.backbone.encode_image(batch.input)
            scale = cast(VisionLanguageBackbone, self.backbone).logit_scale
            zero_shot = cosine_logits(features, self.zero_shot_text, scale)
        self.meter.update(logits, batch.label, zero_shot)

    def on_test_epoch_end(self) -> None:
        """Logs the results: of the classes trained on as ``test/acc``, of other test sets as ``test/NAME/acc``."""
        self.close_test_set()
        for number, test_set in enumerate(self.test_sets):
            prefix = "test" if number == 0 else f"test/{test_set.name}"
            self.log_dict({f"{prefix}/{name}": value for name, value in self.tested[test_set.name].items()})
        self.serve(self.test_sets[0])  # the classes trained on again

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
        averaging = self.classifier.averaging
        checkpoint[TRAINING] = {
            "shared": [shared.training_state() for shared in self.shared],
            "average": None if averaging is None else averaging.state(),
        }

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
        inside = {k.removeprefix("classifier."): v for k, v in saved.items() if k.startswith("classifier.")}
        self.classifier.fit_shapes(inside)
        check_tensors(saved, self.tuned_state())
        training = checkpoint.get(TRAINING)  # none in the small file
        if training is not None:
            for shared, state in zip(self.shared, training["shared"], strict=True):
                shared.load_training_state(state)
            if self.classifier.averaging is not None and training["average"] is not None:
                self.classifier.averaging.load_state(training["average"])
