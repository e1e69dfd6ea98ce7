"""PiSSA (Meng et al. 2024, arXiv:2404.02948): LoRA that starts at, and trains, the principal part of the weight."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from kshot.adapters.lora import LoRA, LoRALayer
from kshot.adapters.svd import svd_of
from kshot.products import Factors
from kshot.slots import Slot


@dataclass(frozen=True)
class PiSSA(LoRA):
    """Principal singular values and vectors adaptation: W' = W - s B₀A₀ + s B A, started at s B₀A₀ = U_r Σ_r V_rᵀ.

    The settings are LoRA's. The paper takes alpha = rank and no dropout.
    """

    rate: ClassVar[float] = 5e-4

    def wrap(self, slot: Slot, shared: Any) -> PiSSALayer:  # noqa: ARG002  shares nothing
        return PiSSALayer(slot, self.rank, self.scale)


class PiSSALayer(LoRALayer):
    """B, (out, r), starts at B₀ = U_r (Σ_r / s)^½ and A, (r, in), at A₀ = (Σ_r / s)^½ V_rᵀ (equations 2 and 3).

    The frozen weight keeps its principal part, and ΔW = s (B A - B₀A₀) takes it out: other adapters, and the model
    without any, stay right. A checkpoint holds A₀ and B₀ too, so it is a plain LoRA of rank 2r, s [B, -B₀] [A; A₀],
    that needs no decomposition.
    """

    undecayed: ClassVar[frozenset[str]] = frozenset({"A", "B"})  # decay would pull the principal part to zero
    A0: Tensor
    B0: Tensor

    def __init__(self, slot: Slot, rank: int, scale: float) -> None:
        super().__init__(slot, rank, scale)
        u, s, vt = svd_of(slot.weight)
        root = (s[:rank] / scale).sqrt()
        self.register_buffer("A0", root[:, None] * vt[:rank])
        self.register_buffer("B0", u[:, :rank] * root)
        self.A = nn.Parameter(self.A0.clone())
        self.B = nn.Parameter(self.B0.clone())

    def factors(self) -> list[Factors]:
        """B A - B₀A₀ = (B - B₀) A + B₀ (A - A₀): exactly zero at the start, and small terms that bfloat16 resolves."""
        return [Factors(self.scale * (self.B - self.B0), self.A), Factors(self.scale * self.B0, self.A - self.A0)]
