"""Labels for any images, by what a run has learnt, as a CSV file."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from kshot.data.prediction import told_changes
from kshot.errors import UserError
from kshot.files import make_folder, write_csv
from kshot.surroundings import RESUME_FROM


def predict(cli: Any) -> None:
    """Labels the images that a command line names, by its checkpoint.

    Args:
        cli: a :class:`~kshot.commands.FewShotCLI`.

    Raises:
        UserError: there are no images, no checkpoint, no such threshold, or the file is there already.
    """
    config, data = cli.config, cli.datamodule
    images, out, rate, abstain = config["images"], config["out"], config["abstain_error"], None
    if not images:
        raise UserError("predict needs --images: a folder, an image, or a list of them.")
    if cli.trainer.world_size > 1:
        raise UserError("predict writes one file, and runs on one device: --trainer.devices 1.")
    path = cli.check_checkpoint()
    if rate is not None:
        by = config["abstain_by"]
        if by == "mahalanobis" and cli.model.mahalanobis is None:
            raise UserError(
                "Nothing tells where the shots lie, by which mahalanobis abstains: tuned.safetensors does, but of no "
                "earlier version, nor of --run.calibrate false. Fit again, or abstain by probability or energy."
            )
        abstain = by, cli.model.calibration.threshold(by, rate)
    if cli.alone is not None:
        folder = Path(path).parent
        folder = folder.parent if Path(path).parts[-2:] == RESUME_FROM else folder
        cli.line.notes += told_changes(config["data"]["init_args"], cli.alone.class_names, folder / "split.json")
    data.images = [images] if isinstance(images, str) else list(images)
    data.setup("predict")
    if out and Path(out).exists():
        raise UserError(f"{out} exists already: choose another --out.")
    if out:
        make_folder(Path(out).parent)
    cli.open_directory()
    found: Any = cli.trainer.predict(cli.model, datamodule=data, ckpt_path=path) or []
    if cli.directory is not None:
        file = Path(out or cli.directory / "predictions.csv")
        unsure = write_predictions(file, data.predict_paths, found, data.class_names, config["top_k"], abstain)
        said = f", of which {unsure} are marked as too unsure" if abstain else ""
        print(f"{len(data.predict_paths)} images labelled{said}: {file}")


def write_predictions(
    path: Path,
    paths: Sequence[str],
    batches: Iterable[tuple[Tensor, ...]],
    class_names: Sequence[str],
    top_k: int,
    abstain: tuple[str, float] | None = None,
) -> int:
    """Writes ``path,label_1,probability_1,...`` rows, best first, with ``top_k`` labels or as many as there are.

    Args:
        path: of the file.
        paths: of the images.
        batches: what :meth:`~kshot.module.FewShotModule.predict_step` gives, with positions of images in ``paths``.
        class_names: in label order.
        top_k: labels a row.
        abstain: a score, ``probability``, ``energy`` or ``mahalanobis``, and the least of it that is answered: rows end
            with a column ``abstain``, which says yes for what lies below.

    Returns:
        the number of images that are abstained from.
    """
    unsure = 0
    k = min(top_k, len(class_names))
    rows = [["path", *(f"{word}_{i + 1}" for i in range(k) for word in ("label", "probability"))]]
    rows[0] += ["abstain"] if abstain else []
    by, least = abstain or ("probability", -math.inf)
    for positions, probabilities, energy, near in batches:
        values, labels = probabilities.topk(k, dim=-1)
        scores = {"probability": values[:, 0], "energy": energy, "mahalanobis": near}
        low = ~(scores[by] >= least)  # what is not a number is not answered
        unsure += int(low.sum())
        each = (positions.tolist(), labels.tolist(), values.tolist(), low.tolist())
        for position, ranked, probability, below in zip(*each, strict=True):
            cells = [x for label, p in zip(ranked, probability, strict=True) for x in (class_names[label], f"{p:.6f}")]
            rows.append([paths[position], *cells, *(["yes" if below else ""] if abstain else [])])
    write_csv(path, rows)
    return unsure
