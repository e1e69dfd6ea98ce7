"""What a test answered to each image: one Parquet file a run, of which figures are made and by which runs are compared.

Parquet and nothing else: columns have types, lists of answers need no spelling, and every table library reads it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kshot.calibration import Calibration, score
from kshot.errors import UserError, first_line
from kshot.files import write_atomically

FILE, FORMAT = "predictions.parquet", 1
TOP = 10  # answers an image: about 120 bytes of memory for each, however many classes there are
ABOUT = b"kshot"  # key of the metadata


class Answers:
    """Answers to the images of one test set, gathered batch by batch where they were computed."""

    def __init__(self) -> None:
        self.some: list[dict[str, Tensor]] = []

    def add(
        self, index: Tensor, label: Tensor, logits: Tensor, calibration: Calibration, zero_shot: Tensor | None
    ) -> None:
        """Takes a batch: positions, (B,), labels, (B,), logits, (B, C), and zero-shot logits, (B, C), if there are."""
        logits = logits.float()
        guess = logits.argmax(-1, keepdim=True)  # of equal ones the same as accuracy takes
        others = logits.scatter(1, guess, -torch.inf).topk(min(TOP, logits.shape[1]) - 1).indices
        ranked = torch.cat([guess, others], 1)
        calibrated = calibration.logits(logits)
        probabilities = calibrated.softmax(-1)
        found = {
            "index": index.to(logits.device, torch.int32),
            "label": label.to(torch.int32),
            "answers": ranked.to(torch.int32),
            "probabilities": probabilities.gather(1, ranked),
            "label_probability": probabilities.gather(1, label[:, None])[:, 0],
            "energy": score("energy", calibrated),
        }
        self.some.append(found | ({} if zero_shot is None else {"zero_shot": zero_shot.argmax(-1).to(torch.int32)}))

    def whole(self, devices: int = 1) -> dict[str, Tensor]:
        """All answers by column, in the order of the images, on the CPU; those of all devices on each of them."""
        own = {name: torch.cat([each[name] for each in self.some]).cpu() for name in (self.some or [{}])[0]}
        parts: list[Any] = [own]
        if devices > 1:
            parts = [None] * devices
            torch.distributed.all_gather_object(parts, own)
        found = {name: torch.cat([part[name] for part in parts if part]) for name in next(filter(None, parts), {})}
        order = found["index"].argsort() if found else None
        return {name: column[order] for name, column in found.items()}


def write(path: Path, answers: Mapping[str, tuple[dict[str, Tensor], Any]], names: Mapping[str, Sequence[str]]) -> None:
    """Writes the answers of a run, each test set as a group of rows of its own.

    The columns are ``test_set``, ``index`` (of the image in its test set), ``path``, ``image`` (a digest of its bytes,
    or of its pixels where it is no file), ``label``, ``correct``, the :data:`TOP` likeliest ``answers`` with their
    calibrated ``probabilities``, ``label_probability``, ``energy`` (the negative one, ``log Σ exp z``) and, of models
    that read texts, the answer of ``zero_shot``. Numbers of classes count in ``class_names`` of the metadata.

    Args:
        path: of the file.
        answers: by test set, :meth:`Answers.whole` and these images as a part.
        names: of the classes by test set, in label order.

    Raises:
        UserError: it cannot be written.
    """
    import pyarrow as pa
    from pyarrow import parquet

    labels, shares = pa.list_(pa.int32()), pa.list_(pa.float32())
    types = {"test_set": pa.dictionary(pa.int32(), pa.string()), "index": pa.int32(), "path": pa.string()}
    types |= {"image": pa.string(), "label": pa.int32(), "correct": pa.bool_(), "answers": labels}
    types |= {"probabilities": shares, "label_probability": pa.float32(), "energy": pa.float32()}
    types["zero_shot"] = pa.int32()
    about = {"format": FORMAT, "class_names": {name: list(classes) for name, classes in names.items()}}
    schema = pa.schema(list(types.items()), metadata={ABOUT: json.dumps(about)})

    def save(file: Path) -> None:
        with parquet.ParquetWriter(file, schema, compression="zstd") as writer:
            for name, (found, part) in answers.items():
                writer.write_table(pa.table(columns_of(name, found, part), schema=schema))

    write_atomically(path, save)


def columns_of(name: str, found: Mapping[str, Tensor], part: Any) -> dict[str, Any]:
    """The columns of a test set, by name, as pyarrow takes them."""
    import pyarrow as pa

    rows = len(found["index"])
    columns: dict[str, Any] = {column: values.numpy() for column, values in found.items()}
    for column in ("answers", "probabilities"):
        ends = np.arange(rows + 1, dtype=np.int32) * columns[column].shape[1]
        columns[column] = pa.ListArray.from_arrays(pa.array(ends), pa.array(columns[column].ravel()))
    columns["path"] = [path.encode(errors="backslashreplace").decode() for path in part.paths]  # any bytes on disk
    columns["image"] = part.row_keys()
    columns["correct"] = (found["answers"][:, 0] == found["label"]).numpy()
    columns["test_set"] = pa.array([name] * rows).dictionary_encode()
    return {"zero_shot": [None] * rows} | columns


@dataclass(frozen=True, eq=False)
class Answered:
    """What a run answered to the N images of a test set; columns as :func:`write` has them.

    Attributes:
        name: of the test set.
        class_names: in label order.
        path, image: (N,) lists of text.
        index, label: (N,) int.
        answers, probabilities: (N, K), the likeliest first.
        zero_shot: (N,) int; None for a model that reads no texts.
    """

    name: str
    class_names: list[str]
    path: list[str]
    image: list[str]
    index: np.ndarray
    label: np.ndarray
    answers: np.ndarray
    probabilities: np.ndarray
    zero_shot: np.ndarray | None

    @property
    def guess(self) -> np.ndarray:
        """(N,) the likeliest class."""
        return np.asarray(self.answers[:, 0])

    @property
    def right(self) -> np.ndarray:
        """(N,) bool."""
        return np.asarray(self.guess == self.label)


def read(directory: Path, test_set: str | None = None) -> Answered:
    """Reads what a run answered to a test set; None for the first, which has the classes trained on.

    Raises:
        UserError: the run keeps no answers, or those of a newer version, or its file is damaged; no such test set.
    """
    import pyarrow as pa
    from pyarrow import compute, parquet

    path = directory / FILE
    if not path.is_file():
        raise UserError(
            f"{directory} has no {FILE}: it was not tested, or by an older kshot. Test it: python main.py test "
            f"--config {directory / 'config.yaml'} --ckpt_path {directory / 'tuned.safetensors'}"
        )
    try:
        file = parquet.ParquetFile(path)
        about = json.loads((file.schema_arrow.metadata or {}).get(ABOUT, b"{}"))
        if not 1 <= about.get("format", 0) <= FORMAT:
            newer = about.get("format", 0) > FORMAT
            raise UserError(
                f"{path} was written by a newer kshot (format {about['format']}, and this one reads {FORMAT})."
                if newer
                else f"{path} is no file of answers that kshot wrote."
            )
        names = about["class_names"]
        name = test_set or next(iter(names))
        if name not in names:
            raise UserError(f"{directory} was not tested on {name!r}. There are: {', '.join(names)}.")
        table = file.read()
        table = table.filter(compute.equal(table["test_set"].cast(pa.string()), name)).combine_chunks()
        if not len(table):
            raise UserError(f"{directory} holds no answers to images of {name}.")
        both = [table[name].combine_chunks() for name in ("answers", "probabilities")]
        ranked = [np.stack(each.to_numpy(zero_copy_only=False)) for each in both]
        zero_shot = table["zero_shot"]
        return Answered(
            name,
            list(names[name]),
            table["path"].to_pylist(),
            table["image"].to_pylist(),
            table["index"].to_numpy(),
            table["label"].to_numpy(),
            ranked[0],
            ranked[1],
            None if zero_shot.null_count else zero_shot.to_numpy(),
        )
    except (pa.ArrowException, OSError, KeyError, ValueError, TypeError) as error:
        raise UserError(f"{path} is damaged or cannot be read: {first_line(error)}") from error
