"""Features of images by the untouched backbone: computed once a run, or once a process, in place of images."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from lightning.fabric.utilities import move_data_to_device
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from kshot.backbones import Backbone
from kshot.classifiers import Shots
from kshot.data.parts import Batch

Module = Any  # a FewShotModule, which imports this file
Data = Any  # a FewShotDataModule, or None
Encode = Callable[[Batch], Tensor]


class FeatureStore(Callback):
    """Features that many runs of a process on one backbone share; a callback of the trainer of each.

    Args:
        backbone: that all of these runs adapt; a run on another one is refused.
    """

    def __init__(self, backbone: Backbone) -> None:
        self.backbone = backbone
        self.features: dict[tuple[str, ...], Tensor] = {}

    def get(self, backbone: Backbone, key: tuple[str, ...], compute: Callable[[], Tensor]) -> Tensor:
        """The features of a key, computed the first time."""
        assert backbone is self.backbone, "a store belongs to one backbone"
        if key not in self.features:
            self.features[key] = compute()
        return self.features[key]

    def setup(self, trainer: Trainer, pl_module: Module, stage: str) -> None:
        """Lets test batches carry features that are there already."""
        data: Data = getattr(trainer, "datamodule", None)
        if stage == "test" and data is not None:
            place(pl_module, trainer)
            for part in data.test_parts:
                features = untouched_features(pl_module, data, trainer, part, 1)
                data.keep_features(part, features if pl_module.has_frozen_images else None, features)


def store_of(trainer: Trainer) -> FeatureStore | None:
    """The store that a run shares with others, if it does."""
    return next((c for c in trainer.callbacks if isinstance(c, FeatureStore)), None)  # type: ignore[attr-defined]


def place(module: Module, trainer: Trainer) -> None:
    """Moves a module to the trainer's device and precision, as the trainer will itself."""
    trainer.precision_plugin.convert_module(module)
    module.to(trainer.strategy.root_device)


def keep_features(module: Module, data: Data, trainer: Trainer) -> None:
    """Lets batches carry features of the untouched image tower, where the run needs them again and again."""
    views = data.train_views()  # 0 when every epoch has views of its own
    if not module.cache_features:
        return
    frozen, free = module.has_frozen_images, store_of(trainer) is None
    if views and (frozen or "teacher" in module.classifier.needs):
        features = untouched_features(module, data, trainer, "train", views)
        data.keep_features("train", features if frozen else None, features, free=free and frozen)
    if frozen and data.draw.val and trainer.limit_val_batches != 0:
        features = untouched_features(module, data, trainer, "val", 1)
        data.keep_features("val", features, features, free=free)


def untouched_shots(module: Module, data: Data, trainer: Trainer, part: str) -> Shots:
    """Features of a part by the untouched backbone, all recorded views, with its labels, on the module's device."""
    views = (data.train_views() or 1) if part == "train" else 1
    features = untouched_features(module, data, trainer, part, views).to(module.device)
    return Shots(features, data.part(part).labels.to(module.device))


def untouched_features(module: Module, data: Data, trainer: Trainer, part: str, views: int) -> Tensor:
    """Features, (V, N, D), of some views of a part by the untouched backbone, on the CPU."""
    backbone: Backbone = module.backbone

    def encode(batch: Batch) -> Tensor:
        assert batch.image is not None
        return backbone.encode_image(batch.image)

    def compute() -> Tensor:
        with backbone.unadapted():
            return torch.stack([encoded(module, data, trainer, part, view, encode).cpu() for view in range(views)])

    store = store_of(trainer)
    if store is None:
        return compute()
    return store.get(backbone, (data.part_key(part), str(views), str(trainer.precision)), compute)


def encoded(module: Module, data: Data, trainer: Trainer, part: str, view: int, encode: Encode) -> Tensor:
    """Features, (N, D), in at least float32, of one view of a part, on the module's device."""
    was_training = module.training
    module.eval()
    features = []
    with torch.inference_mode(False), torch.no_grad(), trainer.precision_plugin.forward_context():
        for batch in data.eval_order_dataloader(part, view):
            some = encode(move_data_to_device(batch, module.device))
            features.append(some.to(torch.promote_types(some.dtype, torch.float32)))
    module.train(was_training)
    return torch.cat(features)
