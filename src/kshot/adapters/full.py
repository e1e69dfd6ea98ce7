"""Fine-tuning of the backbone's own parameters in place: all of them, biases alone (BitFit), or norms alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from kshot.adapters.base import Adapter, select
from kshot.backbones.base import Backbone
from kshot.slots import adapters_off


@dataclass(frozen=True)
class FullTuning(Adapter):
    """Trains every parameter whose name matches a target: ``*`` all, ``image.*`` the image tower.

    Here targets are patterns on parameter names (``image.transformer.resblocks.0.ln_1.weight``), not on slots.

    Args:
        only: ``bias`` leaves all but biases frozen (BitFit, Ben Zaken et al. 2021, arXiv:2106.10199); ``norm`` all but
            scales and shifts of normalisation layers.
    """

    only: Literal["all", "bias", "norm"] = "all"

    def inject(self, backbone: Backbone, targets: Sequence[str]) -> None:
        named = dict(backbone.named_tower_parameters())
        if self.only == "bias":
            named = {name: p for name, p in named.items() if name.endswith("bias")}
        elif self.only == "norm":
            of_norms = {id(p) for m in backbone.modules() if is_norm(m) for p in m.parameters(recurse=False)}
            named = {name: p for name, p in named.items() if id(p) in of_norms}
        kind = "parameters" if self.only == "all" else f"{self.only} parameters"
        chosen = select(named, targets, f"{kind} of {backbone.name}")
        for parameter in chosen.values():
            parameter.requires_grad_(True)
        backbone.trainable_towers = True
        backbone.add_module("initial_values", InitialValues(list(chosen.values())))


def is_norm(module: nn.Module) -> bool:
    """Whether a module normalises, by its class's name: libraries have norms of their own beside torch's."""
    return type(module).__name__.lower().endswith(("norm", "norm1d", "norm2d", "normfp32"))


class InitialValues(nn.Module):
    """Keeps the values that full tuning started from, so that the untouched model can still be run."""

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        super().__init__()
        self.parameters_of_backbone = parameters  # a list, so that they are not registered twice
        self.values: list[Tensor] = [p.detach().clone() for p in parameters]

    @contextmanager
    def restored(self) -> Iterator[None]:
        """Runs with the initial values in place of the trained ones."""
        trained = [p.detach().clone() for p in self.parameters_of_backbone]
        try:
            self._put(self.values)
            yield
        finally:
            self._put(trained)

    @torch.no_grad()
    def _put(self, values: list[Tensor]) -> None:
        for parameter, value in zip(self.parameters_of_backbone, values, strict=True):
            parameter.copy_(value)


@contextmanager
def unadapted(backbone: Backbone) -> Iterator[None]:
    """Runs a backbone as it was before any method changed it: the zero-shot row of every table."""
    with ExitStack() as stack:
        stack.enter_context(adapters_off(backbone))
        for module in backbone.modules():
            if isinstance(module, InitialValues):
                stack.enter_context(module.restored())
        yield
