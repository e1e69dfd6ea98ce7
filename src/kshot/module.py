"""The LightningModule: builds a classifier on a frozen backbone, attaches an adapter, and takes training steps."""

from __future__ import annotations

import math
import warnings
from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import Any, cast

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.optim import Optimizer
from torchmetrics.classification import MulticlassAccuracy

from kshot.adapters.base import Adapter, Layers, Shared, derived_seed
from kshot.backbones import Backbone
from kshot.calibration import Calibration, score
from kshot.callbacks import Fitting, Merged, WeightAverage
from kshot.checkpoint import HEADER, TRAINING, AtomicCheckpoints, accept, dtypes_of, training_state
from kshot.classifiers import Classifier, ClassifierFactory, Task, TextPrompt
from kshot.classifiers.base import closed_form, require_steps, title_of, total
from kshot.classifiers.two_stage import follow_step, stages_of
from kshot.data.parts import Batch
from kshot.errors import UserError
from kshot.evaluate import Evaluation, comparable
from kshot.features import FeatureStore, store_of
from kshot.header import data_settings, header_of
from kshot.kept_tokens import begun, encoded_batch
from kshot.layering import check_stored
from kshot.mahalanobis import Mahalanobis, nearness
from kshot.optim import AdamW, OptimizerFactory, ScheduleFactory, make_optimizer, scheduling
from kshot.templates import DEFAULT_TEMPLATE


class FewShotModule(pl.LightningModule):
    """Adapts a frozen backbone to a task from a few images a class.

    Args:
        backbone: the frozen model; :meth:`detach` gives it back untouched.
        classifier: from features to logits; built before anything is attached to the backbone.
        class_names: linked from the data set.
        templates: linked from the data set.
        adapter: a weight-tuning method, or none.
        targets: patterns that choose what the adapter changes, ``image.*.[qv]``.
        optimizer: for the trainable parameters.
        schedule: of the learning rate, per step; None keeps it constant.
        head_lr: learning rate of the classifier's own tensors, prompts in the image tower excepted; None takes the
            optimizer's.
        cache_features: run an image tower that nothing trains once per image and keep the features; of one whose last
            blocks alone train, keep the tokens before them.

    Raises:
        UserError: a part refuses another, such as a text classifier a backbone without text tower.
    """

    @torch.inference_mode(False)  # what is built here will train
    def __init__(
        self,
        backbone: Backbone,
        classifier: ClassifierFactory = TextPrompt,
        class_names: Sequence[str] = (),
        templates: Sequence[str] = (DEFAULT_TEMPLATE,),
        adapter: Adapter | None = None,
        targets: Sequence[str] = ("*.[qkv]",),
        optimizer: OptimizerFactory = AdamW,
        schedule: ScheduleFactory | None = None,
        head_lr: float | None = None,
        cache_features: bool = True,
    ) -> None:
        super().__init__()
        self.strict_loading = False  # only trainable tensors are saved; on_load_checkpoint compares the names itself
        self.adapter, self.targets, self.cache_features, self.head_lr = adapter, targets, cache_features, head_lr
        self.optimizer_factory, self.schedule_factory = optimizer, schedule
        self.classifier: Classifier = classifier(backbone=backbone, task=Task(tuple(class_names), tuple(templates)))
        if adapter is not None:
            require_steps(self.classifier, self.method)
            adapter.attach(backbone, list(targets))
        self.run_seed = torch.initial_seed()
        self.calibration = Calibration()  # of what was learnt, by held-out shots
        self.mahalanobis: Mahalanobis | None = None  # where the shots lie among its features
        self.split: dict[str, Any] | None = None  # of the data that it runs on, for the header
        self.drawn_from: dict[str, Any] | None = None  # and how that gives it images
        self.kept_tokens: dict[str, Any] | None = None  # in its last fit
        self.accuracy = MulticlassAccuracy(max(2, len(class_names)), average="micro")  # of the validation shots

    @classmethod
    def load_from_checkpoint(cls, checkpoint_path: Any, *rest: Any, **options: Any) -> FewShotModule:
        """Rebuilds a module from a file to resume from, once its settings name nothing but classes of their kind."""
        check_stored(AtomicCheckpoints().load_checkpoint(checkpoint_path).get("hyper_parameters", {}), cls)
        return super().load_from_checkpoint(checkpoint_path, *rest, **options)

    def meet(self, data: Any) -> None:
        """Notes which images it is to be trained and measured on, and how a FewShotDataModule gives them."""
        self.split, self.drawn_from = data.split_info(), data_settings(data)

    def set_wise(self, alpha: float) -> None:
        """Evaluates at another ``adapter.wise_alpha`` from now on; raises UserError where there can be none."""
        if self.adapter is None:
            raise UserError(f"{self.method} has no adapter of which evaluation could take a share.")
        self.adapter = replace(cast(Any, self.adapter), wise_alpha=alpha)
        self.backbone.interpolate(alpha)

    def detach(self) -> Backbone:
        """Takes the adapter off, and gives the untouched backbone back; this module is not to be used any more."""
        self.backbone.detach()
        return self.backbone

    # ------------------------------------------------------------------------------------------------ what it is

    @property
    def backbone(self) -> Backbone:
        """The backbone, which the classifier holds."""
        return self.classifier.backbone

    @property
    def shared(self) -> list[Shared]:
        """What the adapter's layers share, with the method's hooks."""
        return [cast(Shared, module) for module in self.backbone.shared]

    @property
    def layers(self) -> Layers:
        """The adapter layers by slot."""
        return self.backbone.layers()

    @property
    def method(self) -> str:
        """What is trained, in a few words: ``CoOp``, ``TextPrompt + LoRA``, ``DePT (PromptSRC) + LoRA``."""
        return " + ".join([title_of(self.classifier)] + ([type(self.adapter).__name__] if self.adapter else []))

    def trained(self) -> dict[str, nn.Parameter]:
        """Trainable tensors by name."""
        return {name: p for name, p in self.named_parameters() if p.requires_grad}

    @property
    def takes_steps(self) -> bool:
        """False when the classifier has a closed form, or there is nothing to train."""
        return not closed_form(self.classifier) and any(p.requires_grad for p in self.parameters())

    @property
    def has_frozen_images(self) -> bool:
        """True when nothing in the image tower trains, so that features can be kept."""
        return not self.backbone.trainable("image") and not self.classifier.image_tokens()

    # ------------------------------------------------------------------------------------------------ computing

    def encode_image(self, image: Tensor) -> Tensor:
        """Image features, (B, D), as this run computes them."""
        return self.backbone.encode_image(image, self.classifier.image_tokens(), "unprojected" in self.classifier.needs)

    def features_of(self, batch: Batch) -> Tensor:
        """Image features, (B, D): those of the batch, or computed from its images or tokens."""
        return self._encoded(batch, self.classifier.image_tokens()) if batch.features is None else batch.features

    def frozen_features_of(self, batch: Batch) -> Tensor:
        """Image features, (B, D), of the untouched backbone."""
        if batch.frozen is not None:
            return batch.frozen
        with self.backbone.unadapted(), torch.no_grad():
            return self._encoded(batch)

    def _encoded(self, batch: Batch, tokens: Sequence[Tensor] = ()) -> Tensor:
        return encoded_batch(self.backbone, batch, tokens, "unprojected" in self.classifier.needs)

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        """The classifier's terms and the adapter's penalty."""
        teacher = self.frozen_features_of(batch) if "teacher" in self.classifier.needs else None
        terms = self.classifier.losses(self.features_of(batch), batch.label, teacher)
        for shared in self.shared:
            penalty = shared.penalty(self.layers)
            if penalty is not None:
                terms["penalty"] = penalty
        return terms

    def loss_of(self, batch: Batch) -> Tensor:
        """The training loss of a batch: a scalar."""
        return total(self.losses(batch))

    def forward(self, image: Tensor) -> Tensor:
        """Logits, (B, classes), of images, (B, 3, H, W), uint8 or in [0, 1]."""
        return cast(Tensor, self.classifier(self.encode_image(image)))

    # ------------------------------------------------------------------------------------------------ training

    def configure_callbacks(self) -> list[pl.Callback]:
        """What a stage does around its steps, whoever made the trainer; Lightning calls each of them at every hook."""
        store = [] if store_of(self.trainer) else [FeatureStore(self.backbone)]
        if self.trainer.state.fn == "test":
            return [*store, WeightAverage(), Evaluation()]
        if self.trainer.state.fn != "fit":
            return [*store, WeightAverage(), Merged()]
        averages = any(group.get("average") is not None for group in self.param_groups())
        judges = self.trainer.limit_val_batches != 0
        merging, averaging = [Merged()] * judges, [WeightAverage()] * averages
        return [*store, *merging, *averaging, Fitting()]  # in the order in which each leaves what the next finds

    def param_groups(self) -> list[dict[str, Any]]:
        """All that trains, in groups: the classifier's, the adapter's, and unfrozen parameters of the towers.

        Weight decay spares what does not start from no change.
        """
        groups = self.classifier.param_groups()
        spared = {id(p): p for v in self.layers.values() for n, p in v.named_parameters() if n in v.undecayed}
        named = {id(p) for group in groups for p in group["params"]} | spared.keys()
        others = [p for p in self.trained().values() if id(p) not in named]
        rate = {} if self.adapter is None else {"rate": self.adapter.default_lr(self.backbone.image_width)}
        return [*groups, {"params": others} | rate, {"params": list(spared.values()), "weight_decay": 0.0} | rate]

    def optimizer_for(self, parameters: Collection[nn.Parameter] | None = None, fused: bool = True) -> Optimizer:
        """The optimizer over all that trains, or over some of it."""
        return make_optimizer(self.optimizer_factory, self.param_groups(), self.head_lr, parameters, fused)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """The optimizer over trainable parameters, and the schedule over the run's own number of steps."""
        if not self.takes_steps:
            return None
        clips = bool(self.trainer.gradient_clip_val) and self.trainer.precision == "16-mixed"
        optimizer = self.optimizer_for(fused=not clips)  # fused ones unscale gradients when clipping is over
        if self.schedule_factory is None:
            return optimizer
        self.trainer.fit_loop.setup_data()  # or a run counted in steps knows nothing of its epochs yet
        stages = stages_of(self.classifier, int(self.trainer.estimated_stepping_batches))
        each = max(1, math.ceil(self.trainer.num_training_batches / self.trainer.accumulate_grad_batches))
        judged = self.trainer.limit_val_batches and self.split is not None and self.split["counts"]["val"]
        every = (self.trainer.check_val_every_n_epoch or 1) if judged else 0
        schedule: Any = scheduling(self.schedule_factory, optimizer, stages, each, every)
        return {"optimizer": optimizer, "lr_scheduler": schedule}

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        """One step, and what adapter and classifier do after it."""
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        for shared in self.shared:
            shared.after_step(self.trainer.global_step + 1, self.layers)
        follow_step(self.classifier, self.trainer.global_step + 1)

    def on_fit_start(self) -> None:
        """Trains in training mode: Lightning takes the modes that it finds, and a backbone is built for evaluation."""
        self.train()
        if not self.takes_steps:
            self.trainer.should_stop = True

    def on_train_epoch_start(self) -> None:
        """Makes the chance in an epoch depend on the seed and the epoch alone, so that a resumed run is the same."""
        torch.manual_seed(derived_seed(self.run_seed, self.current_epoch))

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:  # noqa: ARG002  Lightning's signature
        """One step on a few images."""
        terms = self.losses(batch)
        loss = total(terms)
        options: dict[str, Any] = {"on_step": False, "on_epoch": True, "sync_dist": self.trainer.world_size > 1}
        self.log("train/loss", loss, prog_bar=True, batch_size=len(batch.label), **options)
        if len(terms) > 1:
            named = {f"train/{name}": value.detach() for name, value in terms.items()}
            self.log_dict(named, batch_size=len(batch.label), **options)
        return loss

    # ------------------------------------------------------------------------------------------------ evaluation

    def validation_step(self, batch: Batch, batch_idx: int) -> None:  # noqa: ARG002  Lightning's signature
        """Counts correct validation shots."""
        self.accuracy(comparable(self.classifier(self.features_of(batch))), batch.label)
        self.log("val/acc", self.accuracy, prog_bar=True, batch_size=len(batch.label))

    def test_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> dict[str, Any]:  # noqa: ARG002  Lightning's signature
        """Image features, (B, D), and logits, (B, classes), for the test set that is open, and the batch as it ran."""
        features = self.features_of(batch := begun(self, batch))
        return {"features": features, "logits": self.classifier(features), "batch": batch}

    def predict_step(self, batch: Batch, batch_idx: int) -> tuple[Tensor, ...]:  # noqa: ARG002  Lightning's signature
        """Positions, (B,), calibrated class probabilities, (B, classes), negative energies and distances, (B,) each."""
        logits: Tensor = self.calibration.logits(self.classifier(features := self.features_of(batch)))
        near = nearness(self.mahalanobis, features)
        return batch.index.cpu(), logits.softmax(-1).cpu(), score("energy", logits).cpu(), near.cpu()

    # ------------------------------------------------------------------------------------------------ checkpoints

    def tuned_state(self) -> dict[str, Tensor]:
        """Everything that is not the frozen backbone: trainable tensors and what a closed form found."""
        kept = self.state_dict().keys()
        inside = {id(b) for name, b in self.backbone.named_buffers() if ".adapters." not in name}
        buffers = {n: b for n, b in self.named_buffers() if n in kept and id(b) not in inside}
        return {name: p.detach() for name, p in self.trained().items()} | buffers

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Leaves the frozen weights out."""
        checkpoint["state_dict"] = self.tuned_state()
        checkpoint[HEADER] = header_of(self) | {"dtypes": dtypes_of(checkpoint["state_dict"])}
        checkpoint[TRAINING] = [training_state(shared) for shared in self.shared]

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuses a checkpoint of another backbone, method, basis or task, and takes on the shapes of this one."""
        warnings.filterwarnings(  # Lightning misses the frozen weights, which are left out on purpose
            "ignore", message="Found keys that are in the model state dict but not in the checkpoint"
        )
        accept(checkpoint, self)
