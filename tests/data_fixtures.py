"""Generated data for the tests of kshot.data."""

import json
from pathlib import Path

import lightning.pytorch as pl
import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_digits

from kshot.data import Batch, FewShotDataModule
from kshot.data.splits import Row, Split, make_split


def save_image(path: Path, seed: int = 0, size: tuple[int, int] = (20, 14)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def image_folder(root: Path, classes: dict[str, int], part: str = "") -> Path:
    for c, (name, count) in enumerate(classes.items()):
        for i in range(count):
            save_image(root / part / name / f"{i:02}.png", seed=100 * c + i + len(part))
    return root


def digit_folder(root: Path, words: tuple[str, ...] = ("zero", "one", "two"), **parts: int) -> Path:
    """Scans of handwritten digits in folders of parts and classes; ``train=4`` gives each class four to train on."""
    digits = load_digits()
    for label, word in enumerate(words):
        images = iter(digits.images[digits.target == label])
        for part, count in parts.items():
            folder = root / part / word
            folder.mkdir(parents=True)
            for i in range(count):
                Image.fromarray((next(images) * (255 / 16)).astype(np.uint8)).save(folder / f"{i:02}.png")
    return root


def split_file(path: Path, **parts: list) -> Path:
    path.write_text(json.dumps({part: parts.get(part, []) for part in ("train", "val", "test")}))
    return path


def parted_folder(root: Path, classes: dict[str, int], parts: tuple[str, ...] = ("train", "val", "test")) -> Path:
    for part in parts:
        image_folder(root, classes, part)
    return root


def rows_of(counts: dict[int, int], part: str = "train") -> list[Row]:
    return [Row(f"{part}/{label}/{i}.png", label, f"class {label}") for label, n in counts.items() for i in range(n)]


def split_of(train: dict[int, int], val: dict[int, int] | None = None) -> Split:
    parts = {
        "train": rows_of(train),
        "val": rows_of(val or {}, "val"),
        "test": rows_of(dict.fromkeys(train, 2), "test"),
    }
    return make_split("toy", parts, file="toy.json", sha256="0" * 64)


def digits(**settings):
    return FewShotDataModule("digits", **{"shots": 4, "image_size": 16, "batch_size": 8} | settings)


def fitted(**settings):
    module = digits(**settings)
    module.setup("fit")
    return module


def collected(loader, epoch=None):
    if epoch is not None:
        loader.sampler.set_epoch(epoch)
    batches = list(loader)
    return joined(batches)


def joined(batches):
    fields = zip(*batches, strict=True)
    return Batch(*(None if values[0] is None else torch.cat(values) for values in fields))


def same(first, second):
    pairs = [(a, b) for a, b in zip(first, second, strict=True) if a is not None or b is not None]
    assert len(pairs) >= 3
    return all(torch.equal(a, b) for a, b in pairs)


class Recorder(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(3 * 16 * 16, 10)
        self.seen = {"train": [], "val": 0, "test": 0}

    def training_step(self, batch):
        assert isinstance(batch, Batch)
        self.seen["train"].append((self.current_epoch, batch))
        return torch.nn.functional.cross_entropy(self.layer(batch.image.flatten(1) / 255), batch.label)

    def validation_step(self, batch):
        self.seen["val"] += len(batch.label)

    def test_step(self, batch):
        self.seen["test"] += len(batch.label)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def trainer(tmp_path, epochs, callbacks=()):
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    return pl.Trainer(
        max_epochs=epochs, accelerator="cpu", default_root_dir=tmp_path, callbacks=list(callbacks), **quiet
    )
