"""Full fine-tuning: trains the backbone's own parameters in place."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from kshot.adapters.base import Adapter, select
from kshot.backbones.base import Backbone
from kshot.slots import adapters_off


@dataclass(frozen=True)
class FullTuning(Adapter):
    """Trains every parameter whose name matches a target: ``*`` all, ``image.*`` the image tower.

    Here targets are patterns on parameter names (``image.transformer.resblocks.0.ln_1.weight``), not on slots.
    """

    def inject(self, backbone: Backbone, targets: Sequence[str]) -> None:
        chosen = select(dict(backbone.named_tower_parameters()), targets, f"parameters of {backbone.name}")
        for parameter in chosen.values():
            parameter.requires_grad_(True)
        backbone.trainable_towers = True
        backbone.add_module("initial_values", InitialValues(list(chosen.values())))


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
