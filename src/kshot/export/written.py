"""What every format has in common: what is wanted, and what stands beside the tensors."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch

from kshot import __version__
from kshot.opening import OpenRun

INPUT = "image: (batch, 3, height, width) float32, RGB in [0, 1], resized and cropped as preprocessing says"
OUTPUTS = "logits: (batch, classes), as the run computes them; probabilities: softmax(logits / temperature)"


@dataclass(frozen=True)
class Wanted:
    """What a user asks for.

    Attributes:
        layout: whose names weights have: ``native``, the run's own library's, or ``transformers``.
        dtype: of the tensors.
        int8: quantise weights to 8 bits.
        lossy: write what is not exact, too.
        rank: of such an approximation.
        opset: of ONNX.
    """

    layout: str = "native"
    dtype: torch.dtype = torch.float32
    int8: bool = False
    lossy: bool = False
    rank: int = 16
    opset: int = 18


def facts_of(run: OpenRun) -> dict[str, Any]:
    """What a user of an export has to know, in plain data."""
    backbone = run.module.backbone
    return {
        "kshot": __version__,
        "run": str(run.directory),
        "method": run.module.method,
        "backbone": backbone.name,
        "classes": run.images.class_names,
        "temperature": run.module.calibration.temperature,
        "preprocessing": asdict(backbone.preprocessing.fitted(run.images.fit)),
    }
