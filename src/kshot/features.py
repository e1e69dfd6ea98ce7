"""Features of images by the untouched backbone: each image is encoded once, for this run and for later ones."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from importlib import metadata
from itertools import chain
from typing import Any, NamedTuple

import PIL
import torch
import torch.distributed
from lightning.fabric.utilities import move_data_to_device
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from kshot import __version__
from kshot.backbones import Backbone
from kshot.backbones.language import VisionLanguageBackbone
from kshot.classifiers import Shots
from kshot.classifiers.base import closed_form
from kshot.data.parts import Batch, Key
from kshot.errors import UserError
from kshot.store import Store

AT_ONCE = 8192  # features that are written to one file

Module = Any  # a FewShotModule, which imports this file
Data = Any  # a FewShotDataModule, or None
Encode = Callable[[Batch], Tensor]
logger = logging.getLogger("kshot")
version = cache(metadata.version)  # of a library; what is loaded stays what it is, and each look reads a file


class Found(NamedTuple):
    """What is known of the features of a part.

    Attributes:
        store: where they are kept.
        keys: of the images by view and position.
        rows: (D,) each, or None for one that is to be encoded.
    """

    store: Store
    keys: list[list[str]]
    rows: list[list[Tensor | None]]

    @property
    def known(self) -> list[bool]:
        """By position, whether all views have features."""
        return [all(row is not None for row in rows) for rows in zip(*self.rows, strict=True)]


class FeatureStore(Callback):
    """Features by the untouched image tower of one backbone, on disk, and in memory where there is no room on disk.

    A callback of the trainer of each run that uses it; a run that is given none makes its own.

    Args:
        backbone: that all of these runs adapt; a run on another one is refused.
        tells: say once that there are features of before.
        towers: digests of the untouched image tower by its dtype, where nothing but the runs of kshot has the backbone:
            they leave it as it is. None looks at it anew in each stage.

    Attributes:
        encoded: views of images that were encoded, by part; ``read`` those whose features were there before.
    """

    def __init__(self, backbone: Backbone, tells: bool = True, towers: dict[torch.dtype, str] | None = None) -> None:
        self.backbone, self.tells, self.towers = backbone, tells, towers
        self.memory: dict[tuple[str, str], Tensor] = {}
        self.encoded: Counter[str] = Counter()
        self.read: dict[str, int] = {}
        self.tests: dict[str, Found] = {}
        self.fresh: list[tuple[Tensor, Tensor]] = []  # positions and features of a test set, as they come
        self.tower = ""

    def setup(self, trainer: Trainer, pl_module: Module, stage: str) -> None:
        """Lets the batches of a test, or a validation, carry features that are there already."""
        self.tower, self.fresh = "", []
        data: Data = getattr(trainer, "datamodule", None)
        if data is None or stage not in {"test", "validate"}:
            return
        place(pl_module, trainer)
        if stage == "validate" and pl_module.has_frozen_images and data.draw.val:
            features = untouched_features(pl_module, data, trainer, "val", 1)
            data.keep_features("val", features, features)
        elif stage == "test" and (pl_module.has_frozen_images or has_texts(pl_module.backbone)):
            for part in data.test_parts:
                self.tests[part] = self.find(pl_module, data, trainer, part, 1)
                rows = self.tests[part].rows[0]
                some = next((row for row in rows if row is not None), None)
                if some is not None:
                    filled = torch.stack([torch.full_like(some, torch.nan) if row is None else row for row in rows])
                    features, known = filled[None], torch.tensor(self.tests[part].known)
                    of_run = features if pl_module.has_frozen_images else None
                    data.keep_features(part, of_run, features, known=known)

    def find(self, module: Module, data: Data, trainer: Trainer, name: str, views: int) -> Found:
        """Looks for the features of a part; what of it can be read is known afterwards, and else raised."""
        assert module.backbone is self.backbone, "a store belongs to one backbone"
        part = data.opened(name)
        store = Store("features", self.context(part, module, trainer), data.store_bytes)
        found = self._find(store, part, views)
        if not part.settled:
            part.settle(found.known, hold=needs_pixels(module, data, trainer, name))
            if part.left_out:  # which moves the positions of others
                found = self._find(store, part, views)
        count = sum(row is not None for rows in found.rows for row in rows)
        if self.tells and count and not any(self.read.values()):
            logger.info("Features of images that were encoded before are read from %s.", store.folder or "memory")
        self.read.setdefault(name, count)
        return found

    def _find(self, store: Store, part: Any, views: int) -> Found:
        keys = [part.row_keys(view) for view in range(views)]
        rows = [store.find(each) for each in keys]
        if self.memory:
            for each, found in zip(keys, rows, strict=True):
                for i in (i for i, row in enumerate(found) if row is None):
                    found[i] = self.memory.get((store.context, each[i]))
        return Found(store, keys, rows)

    def context(self, part: Any, module: Module, trainer: Trainer) -> dict[str, Any]:
        """All that decides features beside the bytes of an image, in plain data."""
        towers = {} if self.towers is None else self.towers
        self.tower = self.tower or towers.get(self.backbone.mean.dtype) or self.backbone.image_sha256()
        towers[self.backbone.mean.dtype] = self.tower
        libraries = {name: version(name) for name in ("torch", "timm", "open_clip_torch", "numpy")}
        return {
            "backbone": self.backbone.name,
            "tower": self.tower,
            **({"unprojected": True} if "unprojected" in module.classifier.needs else {}),
            "pixels": part.context(),
            "precision": str(trainer.precision),
            "products": torch.get_float32_matmul_precision(),
            "device": torch.cuda.get_device_name() if module.device.type == "cuda" else module.device.type,
            "versions": {"kshot": __version__, "pillow": PIL.__version__} | libraries,
        }

    def add(self, part: Any, found: Found, keys: Sequence[Key], features: Tensor) -> None:
        """Keeps new features, (N, D), of views of a part's images whose bytes are what they were; counts them."""
        same = part.unchanged([position for position, _ in keys])
        names = [found.keys[view][i] if ok else "" for (i, view), ok in zip(keys, same, strict=True)]
        self.encoded[part.name] += len(keys)
        if not found.store.write(names, features):
            rows = {(found.store.context, name): row for name, row in zip(names, features.unbind(), strict=True)}
            self.memory |= {key: row for key, row in rows.items() if key[1]}

    def note(self, part: Any, positions: Tensor, features: Tensor, last: bool = False) -> None:
        """Keeps features, (B, D), that a test had to compute, many at a time; ``last`` writes what there is."""
        if len(positions):
            self.fresh.append((positions.cpu(), features.cpu()))
        if self.fresh and (last or sum(len(some) for some, _ in self.fresh) >= AT_ONCE):
            where, rows = (torch.cat(each) for each in zip(*self.fresh, strict=True))
            self.fresh = []
            self.add(part, self.tests[part.name], [(position, 0) for position in where.tolist()], rows)


def store_of(trainer: Trainer) -> FeatureStore | None:
    """The store of a run, once it is there."""
    return next((c for c in trainer.callbacks if isinstance(c, FeatureStore)), None)  # type: ignore[attr-defined]


def place(module: Module, trainer: Trainer) -> None:
    """Moves a module to the trainer's device and precision, as the trainer will itself."""
    trainer.precision_plugin.convert_module(module)
    device = trainer.strategy.root_device
    if module.device != device or any(t.device != device for t in chain(module.parameters(), module.buffers())):
        module.to(device)


def has_texts(backbone: Backbone) -> bool:
    """Whether features can be compared with texts, as the zero-shot row of a test does."""
    return isinstance(backbone, VisionLanguageBackbone) and backbone.features == "default"


def needs_pixels(module: Module, data: Data, trainer: Trainer, part: str) -> bool:
    """Whether steps take images of a part again and again, which are decoded once and held for them."""
    asked = module.takes_steps if part == "train" else part == "val" and judges(module, trainer)
    keeps = module.cache_features and module.has_frozen_images and (part != "train" or data.train_views())
    return asked and not keeps


def parts_to_start(module: Module, data: Data, trainer: Trainer) -> list[str]:
    """Parts with whose features a fit begins, by the classifier's own; none where it has none, or a run goes on."""
    needs, closed, resumes = module.classifier.needs, closed_form(module.classifier), trainer.ckpt_path is not None
    if "shots" not in needs or (resumes and not closed):
        return []
    return ["train", "val"] if data.draw.val and (closed or "val" in needs) else ["train"]


def judges(module: Module, trainer: Trainer) -> bool:
    """Whether a fit with steps is judged by the validation shots, between them or after them."""
    return module.takes_steps and ("val" in module.classifier.needs or trainer.limit_val_batches != 0)


def kept_parts(module: Module, data: Data, trainer: Trainer) -> dict[str, bool]:
    """Parts whose batches carry features of the untouched image tower, and whether in the place of images."""
    if not (module.takes_steps and module.cache_features):
        return {}
    frozen, found = module.has_frozen_images, {}
    if data.train_views() and (frozen or "teacher" in module.classifier.needs):  # 0: every epoch has its own views
        found["train"] = frozen
    if frozen and data.draw.val and judges(module, trainer):
        found["val"] = frozen
    return found


def look_up(module: Module, data: Data, trainer: Trainer) -> None:
    """Looks for all features that a fit will take, before anything else asks for its images.

    Images that it takes are known to be readable then, or raised.
    """
    featured = {*kept_parts(module, data, trainer), *parts_to_start(module, data, trainer)}

    def settle() -> None:
        for name in ("train", "val") if data.draw.val else ("train",):
            part, steps = data.opened(name), needs_pixels(module, data, trainer, name)
            part.idle = not steps
            if name in featured:
                of_run(trainer).find(module, data, trainer, name, views_of(data, name))
            else:
                part.settle([] if steps else [True] * len(part))  # nobody asks for those that no step takes

    shared(trainer, settle)


def keep_features(module: Module, data: Data, trainer: Trainer) -> None:
    """Lets batches carry features of the untouched image tower, where the run needs them again and again."""
    for part, instead in kept_parts(module, data, trainer).items():
        features = untouched_features(module, data, trainer, part, views_of(data, part))
        data.keep_features(part, features if instead else None, features, free=instead)


def views_of(data: Data, part: str) -> int:
    """The number of views of an image whose features are taken."""
    return (data.train_views() or 1) if part == "train" else 1


def untouched_shots(module: Module, data: Data, trainer: Trainer, part: str) -> Shots:
    """Features of a part by the untouched backbone, all recorded views, with its labels, on the module's device."""
    features = untouched_features(module, data, trainer, part, views_of(data, part)).to(module.device)
    return Shots(features, data.part(part).labels.to(module.device))


def of_run(trainer: Trainer) -> FeatureStore:
    """The store of a run, which its module gave to the trainer."""
    store = store_of(trainer)
    assert store is not None, "a FewShotModule brings a FeatureStore"
    return store


def untouched_features(module: Module, data: Data, trainer: Trainer, part: str, views: int) -> Tensor:
    """Features, (V, N, D), in at least float32, of some views of a part by the untouched backbone, on the CPU.

    What is not there yet is encoded, each image's views together; of several devices each encodes its share.
    """
    backbone, store = module.backbone, of_run(trainer)

    def encode(batch: Batch) -> Tensor:
        assert batch.image is not None
        features: Tensor = backbone.encode_image(batch.image, (), "unprojected" in module.classifier.needs)
        return features

    found = store.find(module, data, trainer, part, views)
    opened, rows = data.part(part), found.rows
    lacking = [(i, view) for i, row in enumerate(zip(*rows, strict=True)) for view in range(views) if row[view] is None]
    lacking = sorted(set().union(*shared(trainer, lacking)))
    own = set(sorted({position for position, _ in lacking})[trainer.global_rank :: trainer.world_size])
    mine = [key for key in lacking if key[0] in own]
    if len(lacking) > AT_ONCE:
        logger.info("%s views of %s %s images are encoded, once.", f"{len(lacking):,}", f"{len(opened):,}", part)

    def compute() -> list[tuple[list[Key], Tensor]]:
        if needs_pixels(module, data, trainer, part) and mine:
            opened.load()
        done = []
        at_once = AT_ONCE - AT_ONCE % views or views
        for start in range(0, len(mine), at_once):
            keys = mine[start : start + at_once]
            with backbone.unadapted():
                features = encoded_keys(module, data, trainer, part, keys, encode).cpu()
            store.add(opened, found, keys, features)
            done.append((keys, features))
        return done

    for done in shared(trainer, compute):
        for keys, features in done:
            for (position, view), row in zip(keys, features.unbind(), strict=True):
                rows[view][position] = row
    if not opened.lazy:
        opened.source.close()
    stacked = torch.stack([torch.stack([row for row in each if row is not None]) for each in rows])
    return stacked.to(torch.promote_types(stacked.dtype, torch.float32))


def shared(trainer: Trainer, found: Any) -> list[Any]:
    """What each device has, or computes; where one meets a user's mistake all raise it, so that none waits for it."""
    mistake = None
    try:
        found = found() if callable(found) else found
    except UserError as error:
        if trainer.world_size < 2:
            raise
        mistake = error
    if trainer.world_size < 2:
        return [found]
    every: list[Any] = [None] * trainer.world_size
    torch.distributed.all_gather_object(every, mistake or found)
    for each in every:
        if isinstance(each, UserError):
            raise each
    return every


def encoded(module: Module, data: Data, trainer: Trainer, part: str, view: int, encode: Encode) -> Tensor:
    """Features, (N, D), in at least float32, of one view of a part, on the module's device."""
    features = encoded_keys(module, data, trainer, part, [(i, view) for i in range(len(data.part(part)))], encode)
    return features.to(torch.promote_types(features.dtype, torch.float32))


def encoded_keys(
    module: Module, data: Data, trainer: Trainer, part: str, keys: Sequence[Key], encode: Encode
) -> Tensor:
    """Features, (N, D), as they are computed, of some views of images of a part, on the module's device."""
    was_training = module.training
    module.eval()
    batches: Iterable[Batch] = data.once_dataloader(part, keys)
    with torch.inference_mode(False), torch.no_grad(), trainer.precision_plugin.forward_context():
        features = [encode(move_data_to_device(batch, module.device)) for batch in batches]
    module.train(was_training)
    return torch.cat(features)
