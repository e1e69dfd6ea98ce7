"""One run without the command line: build, fit, evaluate, detach. Many may follow each other on one backbone."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, Trainer, seed_everything
from lightning.pytorch.callbacks import Checkpoint

from kshot.backbones import Backbone
from kshot.checkpoint import AtomicCheckpoints, check_resumable, round_trip
from kshot.data.datamodule import FewShotDataModule
from kshot.data.manifest import first_changed, manifest_images
from kshot.data.prediction import PredictionData
from kshot.errors import UserError
from kshot.evaluate import Evaluation, Tested
from kshot.features import FeatureStore
from kshot.module import FewShotModule
from kshot.optim import epochs_for

QUIET: dict[str, Any] = {
    "logger": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}
DEFAULTS: dict[str, Any] = {
    "devices": 1,
    "num_sanity_val_steps": 0,
    "use_distributed_sampler": False,  # the data module divides its parts itself, without doubling an image
    "log_every_n_steps": 1,
}


def build(backbone: Backbone, data: PredictionData, seed: int = 1, **settings: Any) -> FewShotModule:
    """Builds a module for a data set on an untouched backbone.

    Args:
        backbone: nothing may be attached to it.
        data: gives class names and templates, and takes the backbone's preprocessing.
        seed: of initial values and of chance in training.
        settings: of :class:`~kshot.module.FewShotModule`.

    Raises:
        UserError: something is attached already, or a setting is refused.
    """
    if backbone.layers() or backbone.initial_values is not None:
        raise UserError(f"Something is attached to {backbone.name} already: detach() it first.")
    data.use_preprocessing(backbone.preprocessing)
    seed_everything(seed, verbose=False)
    try:
        return FewShotModule(backbone, class_names=data.class_names, templates=data.templates, **settings)
    except Exception:
        backbone.detach()
        raise


def make_trainer(callbacks: Sequence[Callback] = (), **settings: Any) -> Trainer:
    """A quiet trainer for one run; settings are Lightning's."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    keeps_files = any(isinstance(callback, Checkpoint) for callback in callbacks)
    settings = QUIET | DEFAULTS | {"enable_checkpointing": keeps_files} | settings
    return Trainer(**settings, callbacks=list(callbacks), plugins=[AtomicCheckpoints()])


def has_length(given: Mapping[str, Any]) -> bool:
    """Whether settings of a trainer say how long it fits."""
    limits = {"max_epochs": None, "max_steps": -1, "max_time": None, "fast_dev_run": False}
    return any(given.get(name, unset) != unset for name, unset in limits.items())


def set_length(trainer: Trainer, data: FewShotDataModule) -> str:
    """Lets a trainer fit for :func:`~kshot.optim.epochs_for` its data; gives the sentence that tells it."""
    images, joint = len(data.draw.train), data.batch_size * trainer.world_size
    each = math.ceil(max(1, images // joint) / trainer.accumulate_grad_batches)
    trainer.fit_loop.max_epochs = epochs = epochs_for(each)
    return (
        f"No length is given: {images:,} images are trained on for {epochs * each:,} steps ({epochs} epochs). Another: "
        "--trainer.max_epochs or --trainer.max_steps."
    )


def fit(
    module: FewShotModule,
    data: FewShotDataModule,
    trainer: Trainer,
    *,
    store: FeatureStore | None = None,
    ckpt_path: str | Path | None = None,
    on_prepared: Callable[[], None] | None = None,
    finishing: bool = True,
) -> None:
    """Trains a module.

    Args:
        module: from :func:`build`.
        data: that it was built for.
        trainer: a fresh one.
        store: features that runs on this backbone share.
        ckpt_path: a file to resume from.
        on_prepared: called when the run is prepared and nothing was refused, before the first step.
        finishing: :func:`finish` afterwards.

    Raises:
        UserError: what does not fit, before the first step; or a loss that is not finite.
    """
    if ckpt_path is not None:
        check_resume(Path(ckpt_path), module, data, trainer)
    trainer.ckpt_path = ckpt_path  # as an argument of fit it is unknown until all is prepared
    try:
        with attached(trainer, store, None if on_prepared is None else Prepared(on_prepared)):
            trainer.fit(module, datamodule=data)
    finally:
        trainer.ckpt_path = None
    if finishing:
        finish(module)


def check_resume(path: Path, module: FewShotModule, data: FewShotDataModule, trainer: Trainer) -> None:
    """Raises UserError for a file that this run cannot go on from; names the image that has changed since it began."""
    files = trainer.strategy.checkpoint_io
    checkpoint = (files if isinstance(files, AtomicCheckpoints) else AtomicCheckpoints()).look_at(path)
    data.trainer = trainer  # as it will be in the fit: images are not decoded before their features are looked for
    data.setup("fit")  # which digests them
    module.meet(data)
    manifest = path.parent.parent / "split.json"
    changed = first_changed(manifest_images(manifest), data.image_digests) if manifest.is_file() else None
    if changed is not None:
        raise UserError(
            f"{changed} is another image than the run of {path} was trained on: put the one from before back, or start "
            "a new run."
        )
    check_resumable(checkpoint, path, module, trainer)
    module.on_load_checkpoint(checkpoint)


def finish(module: FewShotModule) -> bool:
    """Gives a fitted module the tensors that its small file holds; whether that changed any."""
    return round_trip(module)


def evaluate(
    module: FewShotModule,
    data: FewShotDataModule,
    trainer: Trainer,
    *,
    store: FeatureStore | None = None,
    ckpt_path: str | Path | None = None,
) -> Tested:
    """Measures a module on the test sets of its data; merged, each image counted once."""
    with attached(trainer, store):
        trainer.test(module, datamodule=data, ckpt_path=ckpt_path, verbose=False)
    return next(c.tested for c in trainer.callbacks if isinstance(c, Evaluation))  # type: ignore[attr-defined]


class Prepared(Callback):
    """Tells when a run is prepared and nothing was refused."""

    def __init__(self, tell: Callable[[], None]) -> None:
        self.tell = tell

    def on_fit_start(self, trainer: Trainer, pl_module: Any) -> None:  # noqa: ARG002  Lightning's signature
        """Tells."""
        self.tell()


@contextmanager
def attached(trainer: Trainer, *callbacks: Callback | None) -> Iterator[None]:
    """Gives a trainer callbacks for a while."""
    given = [callback for callback in callbacks if callback is not None]
    trainer.callbacks = [*given, *trainer.callbacks]  # type: ignore[attr-defined]
    try:
        yield
    finally:
        trainer.callbacks = [c for c in trainer.callbacks if c not in given]  # type: ignore[attr-defined]
