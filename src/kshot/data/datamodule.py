"""The data of one few-shot run for Lightning: shots to train on, and test parts that open only for testing."""

import copy
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from torch import Tensor
from torch.utils.data import DataLoader

from kshot.data import protocols
from kshot.data.images import CLIPS, Decoding, ImageSource, decoding_of, faults_of, white_of
from kshot.data.loading import EpochSampler, endless, halves, share
from kshot.data.manifest import (
    first_changed,
    manifest_bytes,
    manifest_images,
    read_manifest,
    with_images,
    write_manifest,
)
from kshot.data.parts import Batch, Key, Part
from kshot.data.prediction import PredictionData, check_least
from kshot.data.sampling import draw
from kshot.data.splits import TEST_SHARE, Row
from kshot.data.transforms import Augment
from kshot.errors import UserError
from kshot.files import write_atomically
from kshot.templates import check_templates


class FewShotDataModule(PredictionData):
    """The images of one few-shot run: k per class to train on, and whole test parts to judge by.

    Parts are called train, val, predict, and as ``test_parts`` says. On several devices each one sees its own share of
    a part: at a training step they see together what one would see with their joint batch size; of the images that
    are judged by, each is seen once. The Trainer is made with ``use_distributed_sampler=False``.

    Args:
        dataset: catalogue name (digits, dtd, ...), folder, archive, table or split file, or hf:NAME of Hugging Face.
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
        fit: crop, pad or squash evaluation images that are not square; null for what the weights were trained with.
        exif: turn photos upright by EXIF; null for yes in a user's own images, no in those of the catalogue.
        background: colour under transparent images; null for white under own ones, what is hidden in the catalogue's.
        white: value that is white in images of more than 8 bits; null to find it in the training images.
        augment: random views of the training images; null for the evaluation transform.
        views: number of views that repeat over the epochs; null for a new view in each epoch.
        template: sentence for a class name, with {} for the name, or several; null for the data set's own.
        class_names: names in label order instead of the data set's own, or some by folder. Targets keep theirs.
        test_share: of a class, for testing, in a folder or list without parts; null for none.
        manifest: file with the images to use instead of drawing them, to the byte where it has their digests; shots,
            split_seed and sampler of the draw are then the manifest's.
        allow_fewer: take all images of a class that has fewer than shots.
        skip_unreadable: leave out images that cannot be read instead of stopping.
        store_gb: most that features and decoded images of this and other runs may take on disk; 0 keeps none.
        keep_decoded: keep decoded evaluation images as well, for image towers that train.
        download: fetch what is missing, where torchvision can.

    Attributes:
        class_names: words of the classes trained on, in label order; there after __init__, like the next five.
        templates: sentences with one ``{}`` each.
        test_sets: in the order of their loaders; the first has the classes trained on.
        test_parts: names of their parts.
        draw: training and validation rows of these classes; the digest is that of the draw over all classes.
        dataset_name: id of the data set.
        image_size: may be set until ``setup``.
        images, predict_paths: of :class:`~kshot.data.prediction.PredictionData`.
        image_digests: of the images drawn from all classes, digests of their bytes by path, once a part is open.

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
        protocol: protocols.ProtocolName = "all-to-all",
        targets: list[str] | None = None,
        batch_size: int = 32,
        eval_batch_size: int = 128,
        num_workers: int = 0,
        image_size: int | None = None,
        fit: Literal["crop", "pad", "squash"] | None = None,
        exif: bool | None = None,
        background: list[int] | None = None,
        white: float | None = None,
        augment: Augment | None = None,
        views: int | None = None,
        template: str | list[str] | None = None,
        class_names: list[str] | dict[str, str] | None = None,
        test_share: float | None = TEST_SHARE,
        manifest: str | None = None,
        allow_fewer: bool = False,
        skip_unreadable: bool = False,
        store_gb: float = 4.0,
        keep_decoded: bool = False,
        download: bool = False,
    ) -> None:
        super().__init__(
            split_seed=split_seed,
            eval_batch_size=eval_batch_size,
            num_workers=num_workers,
            image_size=image_size,
            fit=fit,
            exif=exif,
            background=background,
            white=white,
            skip_unreadable=skip_unreadable,
        )
        protocols.check_protocol(protocol, targets)
        self.protocol, self.root, self.batch_size = protocol, root, batch_size
        self.augment, self.views, self.download, self.test_share = augment, views, download, test_share
        self.store_bytes, self.keep_decoded = int(max(0, store_gb) * 1e9), keep_decoded
        check_least(self, "batch_size", "views")

        where: dict[str, Any] = {"root": root, "download": download}
        split, self._source = protocols.read_source(dataset, class_names=class_names, test_share=test_share, **where)
        self.dataset_name, self._passed_over = split.name, dict(split.left_out)
        if not split.train:
            raise UserError(f"{split.name}: there are no training images, so it may only be among data.targets")
        protocols.point_out_numbers(dataset, split, "give --data.class_names")
        sentences = [template] if isinstance(template, str) else template or [self._source.entry.template]
        self.templates = list(check_templates(sentences))
        drawn = read_manifest(manifest, split) if manifest else draw(split, shots, split_seed, sampler, allow_fewer)
        self._drawn, self._manifest = drawn, manifest_bytes(split, drawn)
        self._given, self._digests_before = manifest, manifest_images(manifest) if manifest else {}
        # Classes are left out after drawing from all of them: a run on half of them has the images of the whole run.
        trained = next(iter(protocols.class_groups(protocol, split).values()))
        train, val = (protocols.restrict(rows, trained) for rows in (drawn.train, drawn.val))
        self.draw = replace(drawn, train=train, val=val)
        if not train:
            raise UserError(f"{split.name}: there are no training images")

        if self._source.catalogued:
            self.found_white = CLIPS.white
        self._held_out = protocols.held_out(protocol, split, self._source, split.said, self.templates)
        for target in targets or ():
            self._held_out += protocols.held_out_target(protocol, target, self._held_out, **where)
        self.test_sets = [held.test_set for held in self._held_out]
        self.test_parts = [held.part for held in self._held_out]
        self.class_names = list(self.test_sets[0].class_names)

        self.image_digests: dict[str, str] = {}

    def prepare_data(self) -> None:
        """Downloads image files, once per machine, where that was asked for."""
        if self.download:
            self._source.entry.images(self.root, "train", self.draw.train, download=True)

    def setup(self, stage: str) -> None:
        """Opens what a stage needs; a part that is open stays as it is. Training and validation images are decoded.

        For a trainer they are when they are asked for: features of them may be there.

        Raises UserError when ``image_size`` is not set, or images are missing or unreadable.
        """
        if stage == "fit" and "train" not in self._parts:
            views = {"augment": self.augment, "views": self.train_views(), "seed": self.split_seed}
            self._parts["train"] = self._shots("train", self.draw.train, **views)
        if stage in {"fit", "validate"} and self.draw.val and "val" not in self._parts:
            self._parts["val"] = self._shots("val", self.draw.val)
        if stage == "test" and self.test_parts[0] not in self._parts:
            tests = list(protocols.reopened(self._held_out))
            self._parts |= {h.part: self._open(images, rows, h.part, h.source, lazy=True) for h, images, rows in tests}
        super().setup(stage)

    def teardown(self, stage: str) -> None:
        """Closes the test parts again after testing."""
        if stage == "test":
            for part in self.test_parts:
                self._parts.pop(part, None)

    def check_test_files(self) -> None:
        """Looks, before a run that ends with a test, whether all test images are files that may be read; decodes none.

        Warns of copies of the drawn images among them. Raises UserError with the number and the first of those that are
        not, with ``skip_unreadable`` only when none is; and when there are no test images, or a source has changed.
        """
        for held, images, rows in protocols.reopened(self._held_out):
            count, first = faults_of(images, [row.path for row in rows])
            if count and not (self.skip_unreadable and count < len(rows)):
                of = f"{count} of {len(rows)} test images of {held.source.name} cannot be read"
                raise UserError(f"{of}, the first: {first}")
            protocols.point_out_copies(images, rows, self._source, (*self.draw.train, *self.draw.val))

    def train_dataloader(self) -> DataLoader[Batch]:
        """Shuffles the training part by ``EpochSampler``."""
        part = self.part("train")
        return self._epochs(part, range(len(part)), *share(part, self.trainer))

    def train_halves(self) -> tuple[Iterator[Batch], Iterator[Batch]]:
        """Endless batches of two disjoint ``halves`` of the training part; all devices get the same ones."""
        part = self.part("train")
        first, second = halves(part.labels, self.class_names, self.split_seed)
        return endless(self._epochs(part, first)), endless(self._epochs(part, second))

    def fold(self, positions: Sequence[int]) -> "FewShotDataModule":
        """The same data with only some images to train on, by their positions in the training part, which is open."""
        other, part = copy.copy(self), self.part("train").subset(positions)
        other.draw = replace(self.draw, train=self._rows(part))
        other._parts = {**self._parts, "train": part}
        return other

    def open_judged(self) -> None:
        """Opens the part ``judged``: the training images in their order as the evaluation transform shows them."""
        if "judged" not in self._parts:
            rows = self._rows(self.part("train"))
            images = self._source.entry.images(self.root, "train", rows, self.download)
            digests = [self.image_digests[row.path] for row in rows]
            self._parts["judged"] = self._open(images, rows, "judged", self._source, digests=digests, lazy=True)

    def _rows(self, part: Part) -> tuple[Row, ...]:
        drawn = {row.path: row for row in self.draw.train}
        return tuple(drawn[path] for path in part.paths)

    def val_dataloader(self) -> DataLoader[Batch] | list[DataLoader[Batch]]:
        """Goes through the validation shots; an empty list when there are none."""
        return self._judged("val", persistent=True) if self.draw.val else []

    def test_dataloader(self) -> DataLoader[Batch] | list[DataLoader[Batch]]:
        """Goes through the whole test part; a list in the order of ``test_sets`` where there are several."""
        # Each is gone through once: the workers of one need not outlive it while the others are read.
        loaders: list[DataLoader[Batch]] = [self._judged(part) for part in self.test_parts]
        return loaders if len(loaders) > 1 else loaders[0]

    def eval_order_dataloader(self, part: str, view: int = 0) -> DataLoader[Batch]:
        """Goes through one view of all images of a part in index order, on each device, for computing features."""
        return self.once_dataloader(part, [(position, view) for position in range(len(self.part(part)))])

    def once_dataloader(self, part: str, keys: Sequence[Key]) -> DataLoader[Batch]:
        """Goes through some views of images of a part, holding none of them; views of an image are best together."""
        whole = self.eval_batch_size - self.eval_batch_size % len({view for _, view in keys})
        return self._loader(self.part(part), whole or self.eval_batch_size, list(keys), once=True)

    def train_views(self) -> int:
        """Gives the number of different views of a training image: 1 without augmentation, 0 for endless."""
        return 1 if self.augment is None else self.views or 0

    def keep_features(self, part: str, *features: Tensor | None, **how: Any) -> None:
        """``Part.keep`` for features, or tokens, in the order of ``eval_order_dataloader``."""
        self.part(part).keep(*features, **how)

    def forget_features(self) -> None:
        """Lets the batches of all parts carry images again, and nothing else."""
        for part in self._parts.values():
            part.features, part.frozen, part.tokens, part.known, part.idle = None, None, None, None, False

    def test_sizes(self) -> dict[str, int]:
        """Gives the number of images that could be read by name of the test set; there after ``setup("test")``."""
        return {each.name: len(self.part(part)) for each, part in zip(self.test_sets, self.test_parts, strict=True)}

    def left_out(self) -> dict[str, int]:
        """Gives the number of images that ``skip_unreadable`` left out, by name of the open part, where it did."""
        return {name: part.left_out for name, part in self._parts.items() if part.left_out}

    def split_info(self) -> dict[str, Any]:
        """Says in plain data which images the run is about; before ``setup`` less ``images_sha256`` and ``white``."""
        digests = [self.image_digests.get(row.path) for row in (*self.draw.train, *self.draw.val)]
        images = None if None in digests else hashlib.sha256(" ".join(map(str, digests)).encode()).hexdigest()
        sources = {held.source.name: held.source.sha256 for held in self._held_out}
        test = sum(held.images for held in self._held_out)
        return {
            "dataset": self.dataset_name,
            "protocol": self.protocol,
            "targets": {name: sha256 for name, sha256 in sources.items() if name != self.dataset_name},
            **{key: getattr(self.draw, key) for key in ("sampler", "shots", "val_shots", "seed", "digest")},
            "source": self._source.file,
            "source_sha256": self._source.sha256,
            "images_sha256": images,
            "counts": {"train": len(self.draw.train), "val": len(self.draw.val), "test": test},
            "left_out": self._passed_over,
            "white": self.white or self.found_white,
        }

    def write_manifest(self, path: str | Path) -> None:
        """Writes the manifest of the draw, with the image digests; raises UserError when it cannot be written."""
        write_atomically(Path(path), lambda file: write_manifest(file, with_images(self._manifest, self.image_digests)))

    def _shots(self, part: str, rows: Sequence[Row], **views: Any) -> Part:
        images = self._source.entry.images(self.root, part, rows, self.download)
        paths = [row.path for row in (self._drawn.train if part == "train" else self._drawn.val)]
        self.image_digests |= dict(zip(paths, images.digests(paths), strict=True))
        changed = first_changed(self._digests_before, self.image_digests)
        if changed is not None:
            raise UserError(
                f"{changed} is another image than {self._given} was drawn with: put that one back, or draw anew."
            )
        digests = [self.image_digests[row.path] for row in rows]
        return self._open(images, rows, part, self._source, digests=digests, **views)

    def _open(self, images: ImageSource, rows: Sequence[Row], part: str, source: Any, **settings: Any) -> Part:
        opened = super()._open(images, rows, part, source, **settings)
        if self.keep_decoded:
            opened.keep_decoded(self.store_bytes)
        return opened

    def _decoding(self, source: protocols.Source | None) -> Decoding:
        own = source is None or not source.catalogued
        if own and self.white is None and self.found_white is None:
            self.found_white = white_of(self._source.entry, self.root, self.draw.train)
        white = self.found_white if own else CLIPS.white
        return decoding_of(own, self.exif, self.background, self.white or white)

    def _epochs(self, part: Part, positions: Sequence[int], rank: int = 0, devices: int = 1) -> DataLoader[Batch]:
        order = EpochSampler(positions, self.split_seed, self.train_views(), self.batch_size, rank, devices)
        return self._loader(part, self.batch_size, order, persistent=True)
