"""What a run does around its steps, for every method alike: preparing, averaging, merging, files to resume from."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback, Checkpoint, TQDMProgressBar
from torch import Tensor

from kshot.classifiers.base import GaussianAverage, TextClassifier
from kshot.errors import UserError
from kshot.holding import merged, stored_as
from kshot.metrics import MetricsFile
from kshot.prepare import choose, low_precision, prepare

Module = Any  # a FewShotModule, which imports this file


class Fitting(Callback):
    """Prepares a fit before there is an optimizer, refuses what is not finite, and frees at the end what was kept.

    Whether all is finite it asks at ends of epochs, before a file to resume from is written, so that no step waits for
    the device. Of several devices each asks for itself: gradients are shared, and with them what is not finite.
    """

    def __init__(self) -> None:
        self.open = ExitStack()
        self.bad_step: Tensor | None = None  # the first whose loss was not finite, or -1; on the device

    def setup(self, trainer: Trainer, pl_module: Module, stage: str) -> None:
        """Tries one step, keeps features, starts what starts from the shots."""
        if stage == "fit":
            prepare(pl_module, getattr(trainer, "datamodule", None), trainer)

    def on_fit_start(self, trainer: Trainer, pl_module: Module) -> None:
        """Stores frozen weights in the precision of the run, and holds class features that nothing trains."""
        dtype = low_precision(trainer)
        if dtype is not None:
            self.open.enter_context(stored_as(pl_module.backbone, dtype))
        for part in pl_module.modules():
            if isinstance(part, TextClassifier) and not pl_module.backbone.trainable("text"):
                with trainer.precision_plugin.forward_context(), torch.enable_grad():
                    text = part.encode()
                if not text.requires_grad:
                    part.held = text
                    self.open.callback(setattr, part, "held", None)

    def on_train_batch_end(self, trainer: Trainer, pl_module: Module, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Looks at the loss, without waiting for it."""
        del pl_module, batch, batch_idx
        bad = torch.where(torch.isfinite(outputs["loss"].detach()), -1, trainer.global_step)
        self.bad_step = bad if self.bad_step is None else torch.where(self.bad_step < 0, bad, self.bad_step)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: Module) -> None:  # noqa: ARG002  Lightning's signature
        """Raises UserError that names the first step whose loss was not finite."""
        step = -1 if self.bad_step is None else int(self.bad_step)
        groups = [group for optimizer in trainer.optimizers for group in optimizer.param_groups]
        finite = [torch.isfinite(p.detach()).all() for group in groups for p in group["params"]]
        if step >= 0 or (finite and not torch.stack(finite).all()):
            what = f"The loss is not finite at step {step}" if step >= 0 else "What was trained is not finite"
            raise UserError(
                f"{what}: lower model.optimizer.lr, or compute in --trainer.precision 32-true or bf16-mixed."
            )

    def on_fit_end(self, trainer: Trainer, pl_module: Module) -> None:
        """Lets the classifier choose what is left to choose, and frees what was kept."""
        self.open.close()
        data: Any = getattr(trainer, "datamodule", None)
        if data is not None:
            choose(pl_module, data, trainer)
            data.forget_features()

    def on_exception(self, trainer: Trainer, pl_module: Module, exception: BaseException) -> None:
        """Frees what was kept, so that no later run on the same data is given features of this one."""
        del pl_module, exception
        self.open.close()
        data: Any = getattr(trainer, "datamodule", None)
        if data is not None:
            data.forget_features()


class Merged(Callback):
    """Runs validation and prediction merged; :class:`~kshot.evaluate.Evaluation` does so for each test set.

    User's own callbacks come first, so that weights which one swaps in are the ones that are merged.
    """

    def __init__(self) -> None:
        self.open = ExitStack()

    def _enter(self, trainer: Trainer, pl_module: Module) -> None:
        with trainer.precision_plugin.forward_context():
            self.open.enter_context(merged(pl_module.classifier))

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: Module) -> None:
        """Enters."""
        self._enter(trainer, pl_module)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: Any) -> None:  # noqa: ARG002  Lightning's signature
        """Leaves."""
        self.open.close()

    def on_predict_epoch_start(self, trainer: Trainer, pl_module: Module) -> None:
        """Enters."""
        self._enter(trainer, pl_module)

    def on_predict_epoch_end(self, trainer: Trainer, pl_module: Any) -> None:  # noqa: ARG002  Lightning's signature
        """Leaves."""
        self.open.close()

    def on_exception(self, trainer: Trainer, pl_module: Any, exception: BaseException) -> None:
        """Leaves."""
        del trainer, pl_module, exception
        self.open.close()


class WeightAverage(Callback):
    """Ends a fit with the mean of the trained tensors over its epochs, where a parameter group asks for one.

    A running mean in float32 with :class:`~kshot.classifiers.base.GaussianAverage`'s weights, kept as logarithms, since
    a run may end far from their peak. A tensor whose shape changes during the run starts anew. The file to resume from
    holds the last epoch and the mean; whoever measures it gets the mean.

    Attributes:
        means: so far, by name, empty before the first epoch.
        log_weights: log Σ_e w_e so far, by name.
    """

    def __init__(self) -> None:
        self.means: dict[str, Tensor] = {}
        self.log_weights: dict[str, float] = {}
        self.loaded = False
        self.wanted: GaussianAverage | None = None

    @torch.no_grad()
    def add(self, gaussian: GaussianAverage, epoch: int, tensors: Mapping[str, Tensor]) -> None:
        """Counts in the tensors at the end of an epoch, counted from 1."""
        log_weight = -((epoch - gaussian.mean) ** 2) / (2 * gaussian.std**2)
        for name, tensor in tensors.items():
            value, before = tensor.detach().float(), self.means.get(name)
            if before is None or before.shape != value.shape:
                self.means[name], self.log_weights[name] = value.clone(), log_weight
                continue
            total = float(np.logaddexp(self.log_weights[name], log_weight))
            self.means[name] = torch.lerp(before.to(value.device), value, math.exp(log_weight - total))
            self.log_weights[name] = total

    @torch.no_grad()
    def take(self, pl_module: Module) -> None:
        """Puts the mean in the place of the trained tensors."""
        trained = pl_module.trained()
        for name, mean in self.means.items():
            trained[name].copy_(mean)

    def on_fit_start(self, trainer: Trainer, pl_module: Module) -> None:  # noqa: ARG002  Lightning's signature
        """Looks for a group that asks for a mean."""
        wanted = [group["average"] for group in pl_module.param_groups() if group.get("average") is not None]
        self.wanted = wanted[0] if wanted else None

    def on_train_epoch_end(self, trainer: Trainer, pl_module: Module) -> None:
        """Counts the epoch in."""
        if self.wanted is not None:
            self.add(self.wanted, trainer.current_epoch + 1, pl_module.trained())

    def on_fit_end(self, trainer: Trainer, pl_module: Module) -> None:  # noqa: ARG002  Lightning's signature
        """Takes the mean, once: what is done to the tensors afterwards stays. A resumed fit may have no step left."""
        self.take(pl_module)

    def _take_loaded(self, trainer: Trainer, pl_module: Module) -> None:
        if self.loaded and trainer.state.fn != "fit":
            self.take(pl_module)
            self.loaded = False

    on_test_start = on_validation_start = on_predict_start = _take_loaded

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain data."""
        return {"means": dict(self.means), "log_weights": dict(self.log_weights)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on from a state, or takes its mean where nothing goes on."""
        self.means, self.log_weights = dict(state_dict["means"]), dict(state_dict["log_weights"])
        self.loaded = True


class ResumeFile(Checkpoint):
    """Keeps one file to resume from, ``checkpoints/last.ckpt``, written at ends of epochs, with the metrics so far.

    Args:
        seconds: least time between two files; the last epoch is always written.

    Attributes:
        folder: where to write; set once the run directory exists, until then nothing is written.
        metrics: the run's, which go on from those of a file.
    """

    def __init__(self, seconds: float) -> None:
        self.folder: Path | None = None
        self.metrics = MetricsFile()
        self.seconds = seconds
        self.written = time.monotonic()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: Any) -> None:  # noqa: ARG002  Lightning's signature
        """Writes the file when it is due, for which all devices listen to the first one's clock."""
        last = (
            0 < (trainer.max_epochs or 0) <= trainer.current_epoch + 1 or 0 < trainer.max_steps <= trainer.global_step
        )
        found = trainer.callback_metrics  # on all devices alike: means over all of them are computed by this
        due = last or time.monotonic() - self.written >= self.seconds
        folder, due = trainer.strategy.broadcast((self.folder, due))
        if folder is not None and due:
            # Lightning logs an epoch after this hook: a file without its losses would lose them for a resumed run.
            losses = {name: float(value) for name, value in found.items() if name.startswith("train/")}
            self.metrics.log_metrics({"epoch": trainer.current_epoch} | losses, step=trainer.global_step - 1)
            trainer.save_checkpoint(folder / "last.ckpt")
            self.written = time.monotonic()

    def state_dict(self) -> dict[str, Any]:
        """The metrics, as plain data."""
        return {"rows": {key: dict(row) for key, row in self.metrics.rows.items()}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on with the metrics of a file."""
        self.metrics.rows = {key: dict(row) for key, row in state_dict.get("rows", {}).items()}


class Progress(TQDMProgressBar):
    """One bar a stage, without Lightning's version of the log."""

    def get_metrics(self, trainer: Trainer, pl_module: Any) -> dict[str, Any]:
        """Metrics beside the bar."""
        return {name: value for name, value in super().get_metrics(trainer, pl_module).items() if name != "v_num"}
