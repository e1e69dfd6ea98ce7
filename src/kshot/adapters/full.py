"""Fine-tuning of the backbone's own parameters in place: all of them, biases alone (BitFit), or norms alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from kshot.adapters.base import Adapter, select
from kshot.backbones.base import Backbone

NORMS = ("norm", "norm1d", "norm2d", "normfp32")  # how names of such classes end, also of libraries' own


@dataclass(frozen=True)
class FullTuning(Adapter):
    """Trains every parameter whose name matches a target: ``*`` all, ``image.*`` the image tower.

    Here targets are patterns on parameter names (``image.transformer.resblocks.0.ln_1.weight``), not on slots.

    Args:
        only: ``bias`` leaves all but biases frozen (BitFit, Ben Zaken et al. 2021, arXiv:2106.10199); ``norm`` all but
            scales and shifts of normalisation layers.
        wise_alpha: WiSE-FT, the share of the trained change that evaluation takes, from 0 to 1; 1 for all of it.
    """

    only: Literal["all", "bias", "norm"] = "all"
    wise_alpha: float = 1.0

    rate: ClassVar[float] = 1e-4
    rate_width: ClassVar[int | None] = 192

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_known("only")

    def default_lr(self, width: int) -> float:
        alone = {"bias": 1e-2, "norm": 3e-2}  # as many numbers as the tower is wide, that are summed over nothing
        return alone.get(self.only) or super().default_lr(width)

    @torch.inference_mode(False)
    def attach(self, backbone: Backbone, targets: Sequence[str]) -> None:
        named = dict(backbone.named_tower_parameters())
        if self.only == "bias":
            named = {name: p for name, p in named.items() if name.endswith("bias")}
        elif self.only == "norm":
            norms = [m for m in backbone.modules() if type(m).__name__.lower().endswith(NORMS)]
            of_norms = {id(p) for m in norms for p in m.parameters(recurse=False)}
            named = {name: p for name, p in named.items() if id(p) in of_norms}
        kind = "parameters" if self.only == "all" else f"{self.only} parameters"
        backbone.unfreeze(list(select(named, targets, f"{kind} of {backbone.name}")))
        backbone.wise_alpha = self.wise_alpha
