"""Generated data for the tests of kshot.data."""

import json
from pathlib import Path

import numpy as np
from PIL import Image

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
