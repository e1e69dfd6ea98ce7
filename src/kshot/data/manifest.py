"""Manifests: a draw as a file that is the same byte for byte wherever it is written."""

import json
from pathlib import Path
from typing import Any

from kshot.data.sampling import PERCENT, SAMPLERS, FewShotDraw, draw_digest
from kshot.data.splits import Row, Split
from kshot.errors import UserError

SCHEMA = "fewshot-manifest/1"
GENERATOR = "python-random-mt19937"
_TYPES = {
    str: ("schema", "dataset", "protocol", "digest"),
    dict: ("source", "sampler", "image_root", "counts"),
    list: ("classnames", "train", "val"),
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
            "name": GENERATOR,
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
    lines = ["{"]
    lines += [f" {json.dumps(key)}: {json.dumps(value)}," for key, value in header.items()]
    for part, rows, end in (("train", draw.train, " ],"), ("val", draw.val, " ]")):
        lines.append(f' "{part}": [')
        values = ([int(r.path) if split.item_kind == "index" else r.path, r.label, r.class_name] for r in rows)
        texts = [f"  {json.dumps(value)}" for value in values]
        lines += [text + "," for text in texts[:-1]] + texts[-1:]
        lines.append(end)
    return ("\n".join(lines) + "\n}\n").encode("ascii")


def read_manifest(path: str | Path, split: Split) -> FewShotDraw:
    """Reads a manifest and checks it against the split that it was drawn from.

    The rows in the file count, not the sampler: Python promises the same ``random.sample`` for no two versions.

    Args:
        path: the manifest.
        split: the data set that the run is about.

    Raises:
        UserError: no such file, not a manifest, made from another source, edited since it was written, or with rows
            that are not training and validation rows of the split.
    """
    path = Path(path)
    try:
        data = json.loads(path.read_bytes())
    except OSError as error:
        raise UserError(f"{path}: cannot read the manifest: {error.strerror or error}") from None
    except ValueError as error:
        raise UserError(f"{path}: not JSON ({error})") from None
    _check_schema(data, path)
    source = data["source"]
    if source.get("sha256") != split.sha256:
        drawn_from = f"{source.get('file')!r} with SHA-256 {str(source.get('sha256'))[:12]}..."
        raise UserError(f"{path}: drawn from {drawn_from}, but {split.file!r} has {split.sha256[:12]}...")
    rule = SAMPLERS.get(data["protocol"], PERCENT)
    train = _rows(data["train"], "train", split.train, split, path)
    held_out = split.train if rule.val_part == "train" else ()
    val = _rows(data["val"], "val", (*split.val, *held_out), split, path)
    digest = draw_digest(train, val)
    if digest != data["digest"]:
        raise UserError(f"{path}: the rows have the digest {digest[:19]}..., not {data['digest'][:19]}... as it says")
    sampler = data["sampler"]
    return FewShotDraw(
        train, val, sampler["shots"], sampler.get("val_shots"), sampler["seed"], data["protocol"], digest
    )


def _check_schema(data: Any, path: Path) -> None:
    if not isinstance(data, dict) or data.get("schema") != SCHEMA:
        found = data.get("schema") if isinstance(data, dict) else type(data).__name__
        raise UserError(f"{path}: not a manifest of the schema {SCHEMA!r} but {found!r}")
    for key, kind in ((key, kind) for kind, keys in _TYPES.items() for key in keys):
        if not isinstance(data.get(key), kind):
            raise UserError(f"{path}: {key!r} must be there and be a {kind.__name__}")
    sampler = data["sampler"]
    whole = {key: type(sampler.get(key)) is int for key in ("seed", "shots", "val_shots")}
    if not whole["seed"] or not all(whole[key] or sampler.get(key) is None for key in ("shots", "val_shots")):
        raise UserError(f"{path}: 'sampler' must have a whole seed, shots and val_shots")


def _rows(values: list[Any], part: str, choice: tuple[Row, ...], split: Split, path: Path) -> tuple[Row, ...]:
    known = {(row.path, row.label): row for row in choice}
    kind = int if split.item_kind == "index" else str
    rows = []
    for value in values:
        well_formed = isinstance(value, list) and len(value) == 3 and type(value[0]) is kind
        row = known.get((str(value[0]), value[1])) if well_formed and type(value[1]) is int else None
        if row is None:
            # Above all it must not be a test image.
            raise UserError(f"{path}: {value!r} is not one of the {part} rows of {split.file!r}")
        rows.append(row)
    return tuple(rows)
