"""What images look like that weights were trained on: stated by a backbone, done by the data module."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from kshot.errors import UserError

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
RESIZE = ("shortest", "longest", "squash")
INTERPOLATION = ("nearest", "box", "bilinear", "hamming", "bicubic", "lanczos")  # of Pillow
FITS = {"crop": "shortest", "pad": "longest", "squash": "squash"}
TIMM = {"center": "shortest", "border": "longest", "squash": "squash"}  # its crop_mode


@dataclass(frozen=True)
class Preprocessing:
    """The preprocessing that belongs to weights; the defaults are CLIP's.

    An RGB image is resized, its centre is cropped, and colours become (value / 255 - mean) / std.

    Attributes:
        size: side of the square image, in pixels.
        mean: of the three colours; ``std`` likewise.
        interpolation: one of ``INTERPOLATION``, antialiased.
        resize: what becomes ``size / crop`` pixels long: the shortest side, the longest, or both (``squash``).
        crop: share of that length that the crop keeps.
        fill: colour beside an image that is smaller than the crop, three values in 0 ... 255.

    Raises:
        UserError: a value that has no meaning here.
    """

    size: int = 224
    mean: tuple[float, ...] = CLIP_MEAN
    std: tuple[float, ...] = CLIP_STD
    interpolation: str = "bicubic"
    resize: str = "shortest"
    crop: float = 1.0
    fill: tuple[int, ...] = (0, 0, 0)

    def __post_init__(self) -> None:
        for name, known in (("interpolation", INTERPOLATION), ("resize", RESIZE)):
            if getattr(self, name) not in known:
                raise UserError(f"preprocessing: {name} {getattr(self, name)!r} is none of {', '.join(known)}.")
        if not 0 < self.crop < math.inf:
            raise UserError(f"preprocessing: crop is a positive share, not {self.crop}.")

    @classmethod
    def of_open_clip(cls, config: Mapping[str, Any], size: int) -> Preprocessing:
        """What open_clip's ``image_transform_v2`` makes of a ``preprocess_cfg``."""
        bilinear = config.get("interpolation") == "bilinear"  # it takes bicubic for anything else
        return cls(
            size,
            colours(config.get("mean") or CLIP_MEAN),
            colours(config.get("std") or CLIP_STD),
            "bilinear" if bilinear else "bicubic",
            config.get("resize_mode") or "shortest",
            fill=colours(config.get("fill_color") or 0),
        )

    @classmethod
    def of_timm(cls, config: Mapping[str, Any], size: int) -> Preprocessing:
        """What timm's ``create_transform`` makes of a ``resolve_model_data_config`` in evaluation."""
        resize, mean = TIMM.get(config["crop_mode"], "shortest"), colours(config["mean"])
        fill = tuple(round(255 * value) for value in mean) if resize == "longest" else (0, 0, 0)
        return cls(size, mean, colours(config["std"]), config["interpolation"], resize, config["crop_pct"], fill)

    def fitted(self, fit: str | None) -> Preprocessing:
        """The same for images of another shape: ``crop`` to the centre, ``pad`` with the mean colour, ``squash``.

        What is padded or squashed is seen whole. None leaves the weights' own. Raises UserError for anything else.
        """
        if fit is not None and fit not in FITS:
            raise UserError(f"fit must be one of {', '.join(FITS)}, or null for the weights' own, not {fit!r}")
        if fit is None or FITS[fit] == self.resize:
            return self
        fill = tuple(round(255 * value) for value in self.mean) if fit == "pad" else (0, 0, 0)
        return replace(self, resize=FITS[fit], crop=self.crop if fit == "crop" else 1.0, fill=fill)

    @property
    def pixels(self) -> Preprocessing:
        """The same without mean and deviation, which change no pixel: a backbone applies them itself."""
        return replace(self, mean=CLIP_MEAN, std=CLIP_STD)

    def resized(self, width: int, height: int) -> tuple[int, int]:
        """Width and height, before the crop, of an image of ``width`` times ``height`` pixels; rounded as torchvision.

        No side gets less than one pixel, where the libraries would fail.
        """
        side = math.floor(self.size / self.crop)
        if self.resize == "squash":
            return side, side
        if self.resize == "longest":
            ratio = max(width / side, height / side)
            return max(1, round(width / ratio)), max(1, round(height / ratio))
        return (side, int(side * height / width)) if width <= height else (int(side * width / height), side)


def colours(value: Any) -> tuple[Any, ...]:
    """Three values, of which one may stand for all."""
    given = tuple(value) if isinstance(value, list | tuple) else (value,)
    return given * 3 if len(given) == 1 else given
