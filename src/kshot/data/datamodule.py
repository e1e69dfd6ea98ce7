"""The data of one few-shot run for Lightning: shots to train on, and a test part that opens only for testing."""

import dataclasses
import itertools
import random
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader

from kshot.data.catalogue import CATALOGUE, load_split, open_images
from kshot.data.images import Augment, FileImages
from kshot.data.manifest import manifest_bytes, read_manifest
from kshot.data.parts import Batch, EpochSampler, LazyImages, Part, StoredImages
from kshot.data.protocols import ProtocolName, TestSet, as_in_source, check_protocol, class_groups, restrict
from kshot.data.sampling import draw
from kshot.data.splits import Row, Split, check_distinct, display_name, images_below
from kshot.errors import UserError
from kshot.files import write_atomically

_Arguments = tuple[str, str, list[str] | None, bool]  # of load_split


class FewShotDataModule(LightningDataModule):
    """The images of one few-shot run: k per class to train on, and whole test parts to judge by.

    The rows of a test part are forgotten after reading and read again by ``setup("test")``, so that nothing that
    trains can see them.

    Args:
        dataset: catalogue name (digits, dtd, ...), folder of class folders, CSV file or split file.
        root: folder with the data sets.
        shots: training images per class; null for all.
        split_seed: seed of the draw, of the order and of the views; independent of seed_everything.
        sampler: coop-v1 (CoOp's images), nested (1-shot images are among the 2-shot images) or cliplora (CLIP-LoRA's
            images), all with at most 4 validation images per class; coop-v1's training images with 4 validation images
            of those left over (coop-v1+val), with shots (lpp) or all validation images (tip); percent:P (P % of every
            class of both parts, with shots null).
        protocol: all-to-all; base-to-new (train on the first half of the classes, test on each half); cross-dataset
            (test on targets as well); domain-generalisation (the same, on targets with classes of the data set).
        targets: data sets to test on besides, each anything that dataset takes.
        batch_size: images per training step.
        eval_batch_size: images per step of validation, test and prediction.
        num_workers: processes that load images; 0 loads in the main process.
        image_size: side of the images in pixels; null where the command line takes it from the backbone.
        augment: random views of the training images; null for the evaluation transform.
        views: number of views that repeat over the epochs; null for a new view in each epoch.
        template: sentence for a class name, with {} for the name, or several; null for the data set's own.
        class_names: names of all classes in label order instead of the data set's own. Targets keep theirs.
        manifest: file with the images to use instead of drawing them; shots, split_seed and sampler of the draw are
            then the manifest's.
        allow_fewer: take all images of a class that has fewer than shots.
        skip_unreadable: leave out images that cannot be read instead of stopping.
        download: fetch what is missing, where torchvision can.

    Attributes:
        class_names: words of the classes trained on, in label order; there after __init__, like the next four.
        templates: sentences with one ``{}`` each.
        test_sets: in the order of their loaders; the first has the classes trained on.
        draw: training and validation rows of these classes; the digest is that of the draw over all classes.
        dataset_name: id of the data set.
        image_size: may be set until ``setup``.
        images: files and folders for prediction, set before ``setup("predict")``.
        predict_paths: the files that these are, in index order.
        skipped: per part, the images left out by ``skip_unreadable``.

    Raises:
        UserError: anything that is wrong and can be known without opening images.
    """

    def __init__(
        self,
        dataset: str,
        root: str = "data",
        *,
        shots: int | None = 16,
        split_seed: int = 1,
        sampler: str = "coop-v1",
        protocol: ProtocolName = "all-to-all",
        targets: list[str] | None = None,
        batch_size: int = 32,
        eval_batch_size: int = 128,
        num_workers: int = 0,
        image_size: int | None = None,
        augment: Augment | None = None,
        views: int | None = None,
        template: str | list[str] | None = None,
        class_names: list[str] | None = None,
        manifest: str | None = None,
        allow_fewer: bool = False,
        skip_unreadable: bool = False,
        download: bool = False,
    ) -> None:
        super().__init__()
        for name, value, least in (
            ("batch_size", batch_size, 1),
            ("eval_batch_size", eval_batch_size, 1),
            ("num_workers", num_workers, 0),
            ("image_size", image_size, 1),
            ("views", views, 1),
        ):
            if value is not None and value < least:
                raise UserError(f"{name} must be at least {least}, not {value}")
        check_protocol(protocol, targets)
        self.protocol = protocol
        self.root = root
        self.split_seed = split_seed
        self.batch_size = batch_size
        self.eval_batch_size = eval_batch_size
        self.num_workers = num_workers
        self.image_size = image_size
        self.augment = augment
        self.views = views
        self.skip_unreadable = skip_unreadable
        self.download = download

        arguments = (dataset, root, class_names, download)
        split, self._entry = load_split(*arguments)
        self.dataset_name = split.name
        if class_names is not None:
            if len(class_names) != len(split.class_names):
                raise UserError(f"{len(class_names)} class_names for the {len(split.class_names)} of {split.name}")
            check_distinct(class_names, "class_names")
        else:
            _point_out_numbers(dataset, split, "give --data.class_names")
        self.templates = [template] if isinstance(template, str) else template or [self._entry.template]
        for sentence in self.templates:
            if sentence.count("{}") != 1:
                raise UserError(f"the template {sentence!r} must have {{}} once, where the class name goes")
        drawn = read_manifest(manifest, split) if manifest else draw(split, shots, split_seed, sampler, allow_fewer)
        self._manifest = manifest_bytes(split, drawn)
        # Classes are left out after drawing from all of them: a run on half of them has the images of the whole run.
        trained = next(iter(class_groups(protocol, split).values()))
        train, val = (restrict(rows, trained) for rows in (drawn.train, drawn.val))
        self.draw = dataclasses.replace(drawn, train=train, val=val)
        if not train:
            raise UserError(f"{split.name}: there are no training images")
        self._counts = {"train": len(train), "val": len(val), "test": 0}

        self.test_sets: list[TestSet] = []
        self._closed: dict[str, tuple[_Arguments, str]] = {}  # by name: what reads it again, and its digest
        self._test_on(split, arguments, class_names or split.class_names, self.templates)
        self.class_names = list(self.test_sets[0].class_names)
        for target in targets or ():
            self._add_target(target)

        self.images: list[str] = []
        self.predict_paths: list[str] = []
        self.skipped: dict[str, int] = {}
        self._parts: dict[str, Part] = {}

    def prepare_data(self) -> None:
        """Downloads image files, once per machine, where that was asked for."""
        if self.download:
            open_images(self._entry, self.root, "train", self.draw.train, download=True)

    def setup(self, stage: str) -> None:
        """Opens what a stage needs; a part that is open stays as it is.

        Args:
            stage: fit (decodes training and validation images), validate (validation images), test or predict (decode
                nothing in advance).

        Raises:
            UserError: ``image_size`` is not set, or images are missing or unreadable.
        """
        if self.image_size is None:
            raise UserError("image_size is not set: give --data.image_size, or set it before setup")
        if stage == "fit" and "train" not in self._parts:
            self._parts["train"] = self._stored("train", self.draw.train, self.augment)
        if stage in {"fit", "validate"} and self.draw.val and "val" not in self._parts:
            self._parts["val"] = self._stored("val", self.draw.val, None)
        if stage == "test" and self._test_parts[0] not in self._parts:
            opened = [part for name in self._closed for part in self._opened(name, self.image_size)]
            self._parts.update(zip(self._test_parts, opened, strict=True))
        if stage == "predict":
            self._setup_predict(self.image_size)
        self.skipped = {part: images.skipped for part, images in self._parts.items()}

    def teardown(self, stage: str) -> None:
        """Closes the test parts again after testing."""
        if stage == "test":
            for part in self._test_parts:
                self._parts.pop(part, None)

    def train_dataloader(self) -> DataLoader[Batch]:
        """Shuffles the training part; epoch e depends on ``split_seed`` and e only.

        A last short batch is dropped, unless it is the only one.
        """
        part = self._part("train")
        return self._epochs(part, range(len(part)))

    def train_halves(self) -> tuple[Iterator[Batch], Iterator[Batch]]:
        """Endless batches of two disjoint halves of the training part, each with half of every class.

        Raises:
            UserError: a class has one image, so that there is nothing to split.
        """
        part = self._part("train")
        halves: tuple[list[int], list[int]] = ([], [])
        for label, name in enumerate(self.class_names):
            members = (part.labels == label).nonzero().flatten().tolist()
            if len(members) == 1:
                raise UserError(
                    f"The class {name!r} has one training image, and a search needs half of each class to judge by: "
                    "use --data.shots 2 or more, or an adapter that searches nothing, such as LoRA."
                )
            random.Random(f"{self.split_seed}/halves/{label}").shuffle(members)
            halves[0].extend(members[(len(members)) // 2 :])
            halves[1].extend(members[: len(members) // 2])
        return endless(self._epochs(part, halves[0])), endless(self._epochs(part, halves[1]))

    def eval_order_train_dataloader(self, view: int = 0) -> DataLoader[Batch]:
        """Goes through one view of all training images in index order, for computing features."""
        part = self._part("train")
        keys = [(position, view) for position in range(len(part))]
        return self._loader(part, self.eval_batch_size, sampler=keys)

    def val_dataloader(self) -> DataLoader[Batch] | list[DataLoader[Batch]]:
        """Goes through the validation shots; an empty list when there are none."""
        return self._loader(self._part("val"), self.eval_batch_size) if self.draw.val else []

    def test_dataloader(self) -> DataLoader[Batch] | list[DataLoader[Batch]]:
        """Goes through the whole test part; a list in the order of ``test_sets`` where there are several.

        Raises:
            RuntimeError: before ``setup("test")``.
        """
        # Each is gone through once: the workers of one need not outlive it while the others are read.
        once = {"persistent_workers": False}
        loaders = [self._loader(self._part(part), self.eval_batch_size, **once) for part in self._test_parts]
        return loaders if len(loaders) > 1 else loaders[0]

    def predict_dataloader(self) -> DataLoader[Batch]:
        """Goes through ``predict_paths``; labels are -1."""
        return self._loader(self._part("predict"), self.eval_batch_size)

    def train_images(self) -> int:
        """Gives the number of training images that could be read; there after ``setup("fit")``."""
        return len(self._part("train"))

    def train_views(self) -> int:
        """Gives the number of different views of a training image: 1 without augmentation, 0 for endless."""
        return 1 if self.augment is None else self.views or 0

    def replace_train_inputs(self, features: Tensor) -> None:
        """Lets training batches carry features instead of images.

        Args:
            features: (V, N, D) float, V = ``train_views()``, N images in the order of
                ``eval_order_train_dataloader``.

        Raises:
            ValueError: the shape is another one, or the views are endless.
        """
        self._fitting("train", features, self.train_views()).features = features

    def replace_val_inputs(self, features: Tensor) -> None:
        """Lets validation batches carry features instead of images.

        Args:
            features: (N, D) float, N images in the order of ``val_dataloader``.

        Raises:
            ValueError: the shape is another one.
        """
        self._fitting("val", features[None], 1).features = features[None]

    def keep_frozen_features(self, features: Tensor) -> None:
        """Lets training batches carry features by the untouched backbone in ``frozen``, beside what they carry.

        Args:
            features: (V, N, D) float, as for ``replace_train_inputs``.

        Raises:
            ValueError: the shape is another one, or the views are endless.
        """
        self._fitting("train", features, self.train_views()).frozen = features

    def split_info(self) -> dict[str, Any]:
        """Says in plain data which images the run is about."""
        return {
            "dataset": self.dataset_name,
            "protocol": self.protocol,
            "targets": {name: sha256 for name, (_, sha256) in self._closed.items() if name != self.dataset_name},
            "sampler": self.draw.sampler,
            "shots": self.draw.shots,
            "val_shots": self.draw.val_shots,
            "seed": self.draw.seed,
            "digest": self.draw.digest,
            "source_sha256": self._closed[self.dataset_name][1],
            "counts": dict(self._counts),
        }

    def write_manifest(self, path: str | Path) -> None:
        """Writes the manifest of the draw.

        Raises:
            UserError: the file cannot be written.
        """
        write_atomically(Path(path), lambda file: file.write_bytes(self._manifest))

    @property
    def _test_parts(self) -> list[str]:
        return ["test"] if self.protocol == "all-to-all" else [f"test/{test_set.name}" for test_set in self.test_sets]

    def _test_on(
        self, split: Split, arguments: _Arguments, class_names: Sequence[str], templates: Sequence[str]
    ) -> None:
        groups = class_groups(self.protocol, split)
        for group, labels in groups.items():
            count = sum(row.label in labels for row in split.test)
            if not count and self.protocol != "all-to-all":
                whose = f" of the {group} classes" if len(groups) > 1 else ""
                raise UserError(f"{split.name}: there are no test images{whose}")
            self._counts["test"] += count
            names = tuple(display_name(class_names[label]) for label in labels)
            self.test_sets.append(TestSet(group, names, tuple(templates)))
        self._closed[split.name] = arguments, split.sha256

    def _add_target(self, target: str) -> None:
        arguments = (target, self.root, None, self.download)
        split, entry = load_split(*arguments)
        if split.name in self._closed:
            raise UserError(
                f"targets: {target!r} is called {split.name!r}, as another data set of this run is: give each one "
                f"once, without the source {self.dataset_name!r}"
            )
        if self.protocol == "domain-generalisation":
            self._test_on(split, arguments, as_in_source(split, self.class_names), self.templates)
        else:
            _point_out_numbers(target, split, "give the target as a CSV or split file with names")
            self._test_on(split, arguments, split.class_names, [entry.template])

    def _opened(self, name: str, image_size: int) -> list[Part]:
        arguments, sha256 = self._closed[name]
        split, entry = load_split(*arguments)
        if split.sha256 != sha256:
            raise UserError(f"{split.name} has changed since the training images were drawn")
        if not split.test:
            raise UserError(f"{split.name}: there are no test images")
        source = open_images(entry, self.root, "test", split.test, self.download)
        groups = [restrict(split.test, labels) for labels in class_groups(self.protocol, split).values()]
        return [LazyImages(source, rows, image_size, self.skip_unreadable) for rows in groups]

    def _stored(self, part: str, rows: tuple[Row, ...], augment: Augment | None) -> StoredImages:
        assert self.image_size is not None  # setup has checked it
        source = open_images(self._entry, self.root, part, rows, self.download)
        return StoredImages(
            source, rows, self.image_size, augment=augment, seed=self.split_seed, skip_unreadable=self.skip_unreadable
        )

    def _setup_predict(self, image_size: int) -> None:
        if not self.images:
            raise UserError("no images to predict: give files or folders")
        files: list[Path] = []
        for path in map(Path, self.images):
            if not path.exists():
                raise UserError(f"no such image or folder: {str(path)!r}")
            files += images_below(path) if path.is_dir() else [path]
        if not files:
            raise UserError(f"no image found in {', '.join(map(repr, self.images))}")
        rows = [Row(str(file), -1, "") for file in files]
        part = LazyImages(FileImages(Path()), rows, image_size, self.skip_unreadable)
        self._parts["predict"] = part
        self.predict_paths = part.paths

    def _part(self, part: str) -> Part:
        if part not in self._parts:
            stage = {"train": "fit", "val": "validate"}.get(part, part.split("/")[0])
            raise RuntimeError(f"the {part} part opens with setup({stage!r})")
        return self._parts[part]

    def _fitting(self, part: str, features: Tensor, views: int) -> Part:
        images = self._part(part)
        if features.ndim != 3 or tuple(features.shape[:2]) != (views, len(images)):
            expected = f"({views}, {len(images)}, D)"
            raise ValueError(f"features of shape {tuple(features.shape)} for {part}, which needs {expected}")
        return images

    def _epochs(self, part: Part, positions: Sequence[int]) -> DataLoader[Batch]:
        order = EpochSampler(positions, self.split_seed, self.train_views())
        return self._loader(part, self.batch_size, sampler=order, drop_last=len(positions) >= self.batch_size)

    def _loader(self, part: Part, batch_size: int, **options: Any) -> DataLoader[Batch]:
        return DataLoader(
            dataset=part,
            batch_size=batch_size,  # by keyword: Lightning builds prediction loaders anew from what it sees
            num_workers=self.num_workers,
            collate_fn=_as_is,
            pin_memory=torch.cuda.is_available(),
            generator=torch.Generator().manual_seed(self.split_seed),  # or each epoch draws from the global state
            **{"persistent_workers": self.num_workers > 0} | options,
        )


def _point_out_numbers(dataset: str, split: Split, advice: str) -> None:
    if dataset not in CATALOGUE and all(name.isdecimal() for name in split.class_names):
        called = f"the classes of {split.name} are called {split.class_names[0]!r} and so on"
        warnings.warn(f"{called}: methods with prompts need words, {advice}", stacklevel=3)


def endless(loader: DataLoader[Batch]) -> Iterator[Batch]:
    """Epoch after epoch, each in an order and with views of its own."""
    for epoch in itertools.count():
        cast(EpochSampler, loader.sampler).set_epoch(epoch)
        yield from loader


def _as_is(batch: Any) -> Any:
    return batch  # parts stack their batches themselves
