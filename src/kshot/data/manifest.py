"""Manifests: a draw as a file that is the same byte for byte wherever it is written."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kshot.data.readers import list_content, parsed_json
from kshot.data.sampling import PERCENT, SAMPLERS, FewShotDraw, draw_digest
from kshot.data.splits import Row, Split, json_rows, shown
from kshot.errors import UserError
from kshot.sealing import BLANK, check_seal, seal

SCHEMA = "fewshot-manifest/1"
_TYPES = {
    **dict.fromkeys(("dataset", "protocol", "digest"), str),
    **dict.fromkeys(("source", "sampler", "image_root", "counts"), dict),
    **dict.fromkeys(("classnames", "train", "val"), list),
}


def manifest_bytes(split: Split, draw: FewShotDraw) -> bytes:
    """Serialises a draw canonically: ASCII JSON, one header key per line, one row per line, LF line ends.

    Array data sets have ``"item_kind": "index"`` after ``image_root`` and rows ``[index, label, class name]``.
    """
    header: dict[str, Any] = {
        "schema": SCHEMA,
        "dataset": split.name,
        "protocol": draw.sampler,
        "source": {"file": split.file, "sha256": split.sha256},
        "sampler": {
            "name": "python-random-mt19937",
            "seed": draw.seed,
            "shots": draw.shots,
            "val_shots": draw.val_shots,
            "repeat": False,
            "order": list(SAMPLERS.get(draw.sampler, PERCENT).order),
        },
        "image_root": dict(split.image_root),
        **({"item_kind": "index"} if split.item_kind == "index" else {}),
        "classnames": list(split.class_names),
        "counts": {"train": len(draw.train), "val": len(draw.val), "test": len(split.test)},
        "digest": draw.digest,
    }
    blocks = [f' "{key}": {json.dumps(value)}' for key, value in header.items()]
    for part, rows in (("train", draw.train), ("val", draw.val)):
        lines = [f"\n  {text}" for text in json_rows(rows, split.item_kind)]
        blocks.append(f' "{part}": [' + ",".join(lines) + "\n ]")
    return ("{\n" + ",\n".join(blocks) + "\n}\n").encode("ascii")


def with_images(manifest: bytes, images: Mapping[str, str]) -> bytes:
    """Adds the digests of images by path, one per line, to a manifest; without any it stays as it is."""
    lines = [f"\n  {json.dumps(path)}: {json.dumps(digest)}" for path, digest in images.items()]
    block = ',\n "images": {' + ",".join(lines) + "\n }\n}\n"
    return manifest.removesuffix(b"\n}\n") + block.encode("ascii") if images else manifest


def write_manifest(path: Path, content: bytes) -> None:
    """Writes a manifest with a digest of the whole file as its last key."""
    path.write_bytes(content.removesuffix(b"\n}\n") + f',\n "seal": "{BLANK}"\n}}\n'.encode("ascii"))
    seal(path)


def manifest_images(path: str | Path) -> dict[str, str]:
    """Reads the digests of a manifest, none from an older one; raises UserError when it is no manifest."""
    path = Path(path)
    images = _parsed(path).get("images", {})
    if not isinstance(images, dict) or not all(isinstance(digest, str) for digest in images.values()):
        raise UserError(f"{path}: 'images' must be digests by path")
    return images


def manifest_examples(path: Path) -> dict[str, str]:
    """Reads a training image of each class by the class's name, in label order; raises UserError for no manifest."""
    data = _parsed(path)
    paths = {str(name): str(path) for path, _, name in reversed(data["train"])}
    return {str(name): paths[str(name)] for name in data["classnames"] if str(name) in paths}


def first_changed(before: Mapping[str, str], now: Mapping[str, str]) -> str | None:
    """Finds the first image, in the order of now, that had another digest before; None when there is none."""
    return next((path for path, digest in now.items() if before.get(path, digest) != digest), None)


def read_manifest(path: str | Path, split: Split) -> FewShotDraw:
    """Reads a manifest and checks it against the split that it was drawn from.

    The rows in the file count, not the sampler: Python promises the same ``random.sample`` for no two versions. Raises
    UserError for no manifest, one of another source, one edited since it was written, or rows of another part.
    """
    path = Path(path)
    data = _parsed(path)
    source, sampler = data["source"], data["sampler"]
    if source.get("sha256") != split.sha256:
        drawn_from = f"{shown(source.get('file'))} with SHA-256 {str(source.get('sha256'))[:12]}..."
        raise UserError(f"{path}: drawn from {drawn_from}, but {split.file!r} has {split.sha256[:12]}...")
    left_over = split.train if SAMPLERS.get(data["protocol"], PERCENT).val_part == "train" else ()
    train = _rows(data["train"], "train", split.train, split, path)
    val = _rows(data["val"], "val", (*split.val, *left_over), split, path)
    digest = draw_digest(train, val)
    if digest != data["digest"]:
        raise UserError(f"{path}: the rows have the digest {digest[:19]}..., not {data['digest'][:19]}... as it says")
    shots, val_shots = sampler.get("shots"), sampler.get("val_shots")
    return FewShotDraw(train, val, shots, val_shots, sampler["seed"], data["protocol"], digest)


def _parsed(path: Path) -> dict[str, Any]:
    sealed = path.is_file() and check_seal(path)
    data = parsed_json(list_content(path, ",:[{"), path)
    found = data.get("schema") if isinstance(data, dict) else type(data).__name__
    if found != SCHEMA:
        raise UserError(f"{path}: not a manifest of the schema {SCHEMA!r} but {shown(found)}")
    if not sealed and ("seal" in data or "images" in data):  # an older one has neither
        raise UserError(f"{path} is damaged: its digest is gone. Take another copy of it.")
    for key, kind in _TYPES.items():
        if not isinstance(data.get(key), kind):
            raise UserError(f"{path}: {key!r} must be there and be a {kind.__name__}")
    seed, *shots = (data["sampler"].get(key) for key in ("seed", "shots", "val_shots"))
    if type(seed) is not int or any(type(value) is not int for value in shots if value is not None):
        raise UserError(f"{path}: 'sampler' must have a whole seed, shots and val_shots")
    return dict(data)


def _rows(values: list[Any], part: str, choice: tuple[Row, ...], split: Split, path: Path) -> tuple[Row, ...]:
    kind = int if split.item_kind == "index" else str
    known = {json.dumps([kind(row.path), row.label]): row for row in choice}
    rows = []
    for value in values:
        row = known.get(json.dumps(value[:2])) if isinstance(value, list) and len(value) == 3 else None
        if row is None:
            # Above all it must not be a test image.
            raise UserError(f"{path}: {shown(value)} is not one of the {part} rows of {split.file!r}")
        rows.append(row)
    return tuple(rows)
