"""The data of one few-shot run for Lightning: shots to train on, and a test part that opens only for testing."""

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
from kshot.data.sampling import draw
from kshot.data.splits import Row, check_distinct, display_name, images_below
from kshot.errors import UserError
from kshot.files import write_atomically


class FewShotDataModule(LightningDataModule):
    """The images of one few-shot run: k per class to train on, and the whole test part to judge by.

    The rows of the test part are forgotten after reading and read again by ``setup("test")``, so that nothing that
    trains can see them.

    Args:
        dataset: catalogue name (digits, dtd, ...), folder of class folders, CSV file or split file.
        root: folder with the data sets.
        shots: training images per class; null for all. Validation gets at most 4 per class.
        split_seed: seed of the draw, of the order and of the views; independent of seed_everything.
        sampler: coop-v1 (CoOp's images) or nested (1-shot images are among the 2-shot images).
        batch_size: images per training step.
        eval_batch_size: images per step of validation, test and prediction.
        num_workers: processes that load images; 0 loads in the main process.
        image_size: side of the images in pixels; null where the command line takes it from the backbone.
        augment: random views of the training images; null for the evaluation transform.
        views: number of views that repeat over the epochs; null for a new view in each epoch.
        template: sentence for a class name, with {} for the name, or several; null for the data set's own.
        class_names: names in label order instead of the data set's own.
        manifest: file with the images to use instead of drawing them; shots, split_seed and sampler of the draw are
            then the manifest's.
        allow_fewer: take all images of a class that has fewer than shots.
        skip_unreadable: leave out images that cannot be read instead of stopping.
        download: fetch what is missing, where torchvision can.

    Attributes:
        class_names: words in label order; there after __init__, like the next three.
        templates: sentences with one ``{}`` each.
        draw: training and validation rows, with their digest.
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
        self._source = (dataset, root, class_names, download)
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

        split, self._entry = load_split(*self._source)
        self.dataset_name = split.name
        if class_names is not None:
            if len(class_names) != len(split.class_names):
                raise UserError(f"{len(class_names)} class_names for the {len(split.class_names)} of {split.name}")
            check_distinct(class_names, "class_names")
        elif dataset not in CATALOGUE and all(name.isdecimal() for name in split.class_names):
            warnings.warn(
                f"the classes of {split.name} are called {split.class_names[0]!r} and so on: methods with prompts need "
                "words, give --data.class_names",
                stacklevel=2,
            )
        self.class_names = [display_name(name) for name in class_names or split.class_names]
        self.templates = [template] if isinstance(template, str) else template or [self._entry.template]
        for sentence in self.templates:
            if sentence.count("{}") != 1:
                raise UserError(f"the template {sentence!r} must have {{}} once, where the class name goes")
        self.draw = read_manifest(manifest, split) if manifest else draw(split, shots, split_seed, sampler, allow_fewer)
        if not self.draw.train:
            raise UserError(f"{split.name}: there are no training images")
        self._manifest = manifest_bytes(split, self.draw)
        self._sha256 = split.sha256
        self._counts = {"train": len(self.draw.train), "val": len(self.draw.val), "test": len(split.test)}

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
        if stage == "test" and "test" not in self._parts:
            split, _ = load_split(*self._source)
            if split.sha256 != self._sha256:
                raise UserError(f"{split.name} has changed since the training images were drawn")
            if not split.test:
                raise UserError(f"{split.name}: there are no test images")
            source = open_images(self._entry, self.root, "test", split.test, self.download)
            self._parts["test"] = LazyImages(source, split.test, self.image_size, self.skip_unreadable)
        if stage == "predict":
            self._setup_predict(self.image_size)
        self.skipped = {part: images.skipped for part, images in self._parts.items()}

    def teardown(self, stage: str) -> None:
        """Closes the test part again after testing."""
        if stage == "test":
            self._parts.pop("test", None)

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

    def test_dataloader(self) -> DataLoader[Batch]:
        """Goes through the whole test part.

        Raises:
            RuntimeError: before ``setup("test")``.
        """
        return self._loader(self._part("test"), self.eval_batch_size)

    def predict_dataloader(self) -> DataLoader[Batch]:
        """Goes through ``predict_paths``; labels are -1."""
        return self._loader(self._part("predict"), self.eval_batch_size)

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
        self._replace("train", features, self.train_views())

    def replace_val_inputs(self, features: Tensor) -> None:
        """Lets validation batches carry features instead of images.

        Args:
            features: (N, D) float, N images in the order of ``val_dataloader``.

        Raises:
            ValueError: the shape is another one.
        """
        self._replace("val", features[None], 1)

    def split_info(self) -> dict[str, Any]:
        """Says in plain data which images the run is about."""
        return {
            "dataset": self.dataset_name,
            "sampler": self.draw.sampler,
            "shots": self.draw.shots,
            "seed": self.draw.seed,
            "digest": self.draw.digest,
            "source_sha256": self._sha256,
            "counts": dict(self._counts),
        }

    def write_manifest(self, path: str | Path) -> None:
        """Writes the manifest of the draw.

        Raises:
            UserError: the file cannot be written.
        """
        write_atomically(Path(path), lambda file: file.write_bytes(self._manifest))

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
            stage = {"train": "fit", "val": "validate"}.get(part, part)
            raise RuntimeError(f"the {part} part opens with setup({stage!r})")
        return self._parts[part]

    def _replace(self, part: str, features: Tensor, views: int) -> None:
        images = self._part(part)
        if features.ndim != 3 or tuple(features.shape[:2]) != (views, len(images)):
            expected = f"({views}, {len(images)}, D)"
            raise ValueError(f"features of shape {tuple(features.shape)} for {part}, which needs {expected}")
        images.features = features

    def _epochs(self, part: Part, positions: Sequence[int]) -> DataLoader[Batch]:
        order = EpochSampler(positions, self.split_seed, self.train_views())
        return self._loader(part, self.batch_size, sampler=order, drop_last=len(positions) >= self.batch_size)

    def _loader(self, part: Part, batch_size: int, **options: Any) -> DataLoader[Batch]:
        return DataLoader(
            dataset=part,
            batch_size=batch_size,  # by keyword: Lightning builds prediction loaders anew from what it sees
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            collate_fn=_as_is,
            pin_memory=torch.cuda.is_available(),
            generator=torch.Generator().manual_seed(self.split_seed),  # or each epoch draws from the global state
            **options,
        )


def endless(loader: DataLoader[Batch]) -> Iterator[Batch]:
    """Epoch after epoch, each in an order and with views of its own."""
    for epoch in itertools.count():
        cast(EpochSampler, loader.sampler).set_epoch(epoch)
        yield from loader


def _as_is(batch: Any) -> Any:
    return batch  # parts stack their batches themselves
