"""The images that a run answered, found again in its data set: as pictures, and as what the model takes."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from kshot.backbones import Preprocessing
from kshot.data import FewShotDataModule
from kshot.data.images import UnreadableImageError
from kshot.data.transforms import evaluation_view
from kshot.errors import UserError
from kshot.predictions import Answered

SIDE = 176  # of a picture on a page, at twice the pixels of a phone's column
WARM = np.array([255, 94, 0], dtype=np.float64)  # what attention is drawn in


class Pictures:
    """Images of a test set by their rows in what a run answered.

    Args:
        data: the run's data set, whose test part is opened.
        answered: which images, and what their bytes were.
        preprocessing: of the run's backbone; None where that is not there, and images are but to be looked at.

    Raises:
        UserError: the data set or its test part cannot be read, or has no such test set.
    """

    def __init__(self, data: FewShotDataModule, answered: Answered, preprocessing: Preprocessing | None) -> None:
        data.use_preprocessing(preprocessing or Preprocessing(size=data.image_size or SIDE))
        data.setup("test")
        parts = dict(zip((each.name for each in data.test_sets), data.test_parts, strict=True))
        if answered.name not in parts:
            raise UserError(f"{data.dataset_name} has no test set {answered.name}.")
        self.part, self.answered = data.opened(parts[answered.name]), answered
        self.known = {path.encode(errors="backslashreplace").decode(): path for path in self.part.paths}

    def open(self, row: int) -> Image.Image | None:
        """The image of a row, as RGB; None for one that is gone, is another one now, or cannot be read."""
        path = self.known.get(self.answered.path[row])
        if path is None or self.part.source.digests([path]) != [self.answered.image[row]]:
            return None
        try:
            return self.part.source.open(path, decoding=self.part.decoding)
        except UnreadableImageError:
            return None

    def seen(self, image: Image.Image) -> Tensor:
        """What the model takes of an image: uint8, (3, S, S)."""
        return evaluation_view(image, self.part.preprocessing)


def features_of(module: Any, pictures: Pictures, rows: Sequence[int], at_once: int = 64) -> tuple[list[int], Tensor]:
    """The rows whose images are there, and features of unit length of these, (n, D)."""
    kept, found, waiting = [], [], []
    for row in rows:
        image = pictures.open(row)
        if image is not None:
            kept.append(row)
            waiting.append(pictures.seen(image))
        if len(waiting) == at_once or (waiting and row == rows[-1]):
            with torch.inference_mode():
                found.append(module.encode_image(torch.stack(waiting)).float())
            waiting = []
    if waiting:  # behind the last one, which is gone
        with torch.inference_mode():
            found.append(module.encode_image(torch.stack(waiting)).float())
    return kept, torch.nn.functional.normalize(torch.cat(found), dim=-1) if found else torch.empty(0, 1)


def laid_out(features: Tensor, kind: str) -> np.ndarray:
    """Places of features, (N, D), in the plane, (N, 2) in [0, 1]: by t-SNE of scikit-learn, or by PCA.

    t-SNE starts from PCA, so that it is the same each time; the scale of either axis means nothing.
    """
    if kind == "tsne":
        from sklearn.manifold import TSNE

        perplexity = min(30.0, (len(features) - 1) / 3)
        places = TSNE(perplexity=perplexity, init="pca", random_state=0).fit_transform(features.numpy())
    else:
        centred = (features - features.mean(0)).double()
        _, _, axes = torch.linalg.svd(centred, full_matrices=False)
        places = (centred @ axes[:2].T).numpy()
        places = np.pad(places, ((0, 0), (0, 2 - places.shape[1])))
    low, high = places.min(0), places.max(0)
    return np.asarray((places - low) / np.maximum(high - low, 1e-12))


def overlaid(seen: Tensor, reach: Tensor) -> Image.Image:
    """What the model takes of an image, (3, S, S) uint8, and beside it the same in grey with attention, (h, w).

    From the least to the most attention of the image, grey becomes warm.
    """
    reach = (reach - reach.min()) / (reach.max() - reach.min()).clamp(min=1e-12)
    pixels = seen.permute(1, 2, 0).numpy()
    size = pixels.shape[1::-1]
    grid = Image.fromarray((255 * reach.numpy()).astype(np.uint8)).resize(size, Image.Resampling.BICUBIC)
    share = 0.75 * np.asarray(grid, dtype=np.float64)[..., None] / 255
    grey = 0.6 * pixels.mean(-1, keepdims=True).repeat(3, -1)
    warm = ((1 - share) * grey + share * WARM).round().astype(np.uint8)
    return Image.fromarray(np.concatenate([pixels, warm], 1))


def inlined(image: Image.Image, side: int = SIDE) -> str:
    """An image as a ``data:`` address, its shorter side at most ``side`` pixels: PNG where it is small, else JPEG."""
    scale = side / min(image.size)
    if scale < 1:
        longest = 4 * side  # of a panorama
        size = [max(1, min(longest, round(edge * scale))) for edge in image.size]
        image = image.resize((size[0], size[1]), Image.Resampling.LANCZOS)
    kind = "png" if min(image.size) <= 64 else "jpeg"
    content = io.BytesIO()
    image.save(content, kind, **({"quality": 82} if kind == "jpeg" else {}))
    return f"data:image/{kind};base64,{base64.b64encode(content.getvalue()).decode()}"
