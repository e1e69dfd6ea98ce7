"""LoRA-XS (Bałazy et al. 2024, arXiv:2405.17604): ΔW = s U_r R Σ_r V_rᵀ, of which R, (r, r), alone is trained."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from kshot.adapters.base import Shared, generator_for
from kshot.adapters.lora import LoRA
from kshot.adapters.svd import fingerprint, svd_of
from kshot.layers import LowRankLayer
from kshot.products import Factors
from kshot.slots import Slot


@dataclass(frozen=True)
class LoRAXS(LoRA):
    """LoRA with an extremely small number of parameters: rank² for each slot.

    Args:
        init_std: standard deviation of the values that R starts from; the published start is 1e-5, and 0 changes
            nothing at step 0.
        save_factors: put the frozen factors into the checkpoint, r (in + out) numbers for each slot: it then loads even
            where singular vectors are found otherwise. Without them, such a checkpoint is refused.
    """

    rate: ClassVar[float] = 2e-2
    rate_width: ClassVar[int | None] = None

    init_std: float = 0.0
    save_factors: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require("init_std", 0 <= self.init_std < math.inf, "be zero or a positive number")

    def prepare(self, slots: Mapping[str, Slot]) -> Shared | None:
        super().prepare(slots)
        if self.save_factors:
            return None
        prints = {name: fingerprint(svd_of(slot.weight), self.rank) for name, slot in slots.items()}
        return Shared(described={"svd": prints})

    def wrap(self, slot: Slot, shared: Any) -> LoRAXSLayer:  # type: ignore[override]  # noqa: ARG002  a sibling of LoRA's
        return LoRAXSLayer(slot, self.rank, self.scale, self.init_std, self.save_factors)


class LoRAXSLayer(LowRankLayer):
    """``y + (x Aᵀ) (s B R)ᵀ`` with frozen B = U_r, (out, r), and A = Σ_r V_rᵀ, (r, in): x need not be kept for R."""

    A: Tensor
    B: Tensor

    def __init__(self, slot: Slot, rank: int, scale: float, init_std: float, save_factors: bool) -> None:
        super().__init__(slot)
        self.scale = scale
        u, s, vt = svd_of(slot.weight)
        self.register_buffer("A", s[:rank, None] * vt[:rank], persistent=save_factors)
        self.register_buffer("B", u[:, :rank].clone(), persistent=save_factors)  # not a view of all of U
        self.R = nn.Parameter(init_std * torch.randn(rank, rank, generator=generator_for(slot.name)))

    def factors(self) -> list[Factors]:
        return [Factors(self.B @ (self.scale * self.R), self.A)]
