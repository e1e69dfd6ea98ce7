"""One block of four linear layers, as plain modules for PEFT and as projections for kshot, with the same weights.

PEFT's support of ``nn.MultiheadAttention`` is LoRA alone, so methods are compared on plain linear layers, in double
precision, in which no processor's way to sum up matters.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kshot.adapters import Adapter
from kshot.backbones import Backbone, Preprocessing
from kshot.header import TOLERANCE, first_difference
from kshot.slots import AdapterLayer, Projection, merge, unmerge

SHAPES = {"qkv": (72, 24), "proj": (24, 24), "fc1": (96, 24), "fc2": (24, 96)}  # (out, in)
SLOT_OF = {"qkv": "image.0.qkv", "proj": "image.0.o", "fc1": "image.0.fc1", "fc2": "image.0.fc2"}
TARGETS = list(SLOT_OF.values())


class Plain(nn.Module):
    """The block of ``nn.Linear`` layers that PEFT adapts: target_modules are the keys of SHAPES."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        for name, (out, into) in SHAPES.items():
            linear = nn.Linear(into, out)
            with torch.no_grad():
                linear.weight.copy_(torch.randn(out, into, generator=generator) / into**0.5)
                linear.bias.copy_(0.1 * torch.randn(out, generator=generator))
            self.add_module(name, linear)

    def forward(self, x: Tensor) -> Tensor:
        return block(x, {name: self.get_submodule(name) for name in SHAPES})


class Ours(Backbone):
    """The same block with slots; call ``run(x)`` on (..., 24)."""

    def __init__(self, plain: Plain) -> None:
        super().__init__("block", Preprocessing(8, (0.5,) * 3, (0.5,) * 3), 24)
        parts = {"qkv": dict.fromkeys("qkv", 24), "proj": {"o": 24}, "fc1": {"fc1": 96}, "fc2": {"fc2": 24}}
        for name, rows in parts.items():
            linear = copy.deepcopy(plain.get_submodule(name))
            self.add_module(name, Projection(linear.weight, linear.bias, rows, "image.0"))
        self.freeze(self)

    def encode_normalised(self, image: Tensor) -> Tensor:
        raise NotImplementedError

    def named_tower_parameters(self):
        yield from ((f"image.{n}", p) for n, p in self.named_parameters() if ".adapters." not in n)

    def run(self, x: Tensor) -> Tensor:
        with self.passing("image"):
            return block(x, {name: self.get_submodule(name) for name in SHAPES})


def block(x: Tensor, layers: Mapping[str, Callable[[Tensor], Tensor]]) -> Tensor:
    """Uses all four layers, so that every gradient is different."""
    q, k, v = layers["qkv"](x).chunk(3, dim=-1)
    x = x + layers["proj"](torch.tanh(q) * k + v)
    return x + layers["fc2"](F.gelu(layers["fc1"](x)))


def ours(adapter: Adapter, targets: Iterable[str] = TARGETS, double: bool = False) -> Ours:
    """The adapted block, in training mode."""
    backbone = Ours(Plain())
    adapter.attach(backbone, list(targets))
    return backbone.double().train() if double else backbone.train()


def theirs(config: Any) -> Any:
    """PEFT's model of the plain block in double precision; ``config`` has ``target_modules=list(SHAPES)``."""
    from peft import get_peft_model

    return get_peft_model(Plain(), config).double()


def layer(backbone: Backbone, name: str) -> AdapterLayer:
    """Our layer on one of the four matrices, by PEFT's name of it."""
    slot = (backbone.slots() | backbone.fused_slots())[SLOT_OF[name]]
    return slot.projection.layers()[slot.part]


def randomise(parameters: Iterable[Tensor], amount: float = 0.3, seed: int = 1) -> None:
    """Adds noise to trainable tensors, so that nothing hides behind an initial zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in parameters:
            parameter.add_(amount * torch.randn(parameter.shape, generator=generator).to(parameter))


def relative(a: Tensor, b: Tensor) -> float:
    """Largest difference as a share of the largest value."""
    assert a.shape == b.shape, (a.shape, b.shape)
    return float(
        (a.detach().double() - b.detach().double()).abs().max() / b.detach().double().abs().max().clamp(min=1e-30)
    )


def same(a: float, b: float) -> bool:
    """Whether a checkpoint takes two fingerprints for those of one basis."""
    return first_difference(a, b, tolerance=TOLERANCE) is None


def step(
    run: Callable[[Tensor], Tensor], tokens: int = 40, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """Runs forward and backward on fixed numbers; gives output and input gradient, and leaves parameter gradients."""
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(2, tokens // 2, 24, generator=generator).to(dtype).requires_grad_()
    upstream = torch.randn(2, tokens // 2, 24, generator=generator).to(dtype)
    y = run(x)
    (y * upstream).sum().backward()
    return y.detach(), x.grad


def agree(backbone: Ours, model: Any, tolerance: float = 1e-7) -> None:
    """Compares outputs and input gradients in float64; those of parameters are left on both for the caller."""
    for module in (backbone, model):
        for parameter in module.parameters():
            parameter.grad = None
    steps = (step(run, dtype=torch.float64) for run in (backbone.run, model))
    for a, b in zip(*steps, strict=True):
        assert relative(a, b) <= tolerance


def merged_agree(backbone: Ours, model: Any, tolerance: float = 1e-7) -> None:
    """Compares merged weights with those that PEFT leaves after ``merge_and_unload``; frozen ones stay."""
    before = {name: backbone.get_submodule(name).weight.clone() for name in SHAPES}
    merge(backbone)
    plain = copy.deepcopy(model).merge_and_unload()
    for name in SHAPES:
        assert relative(backbone.get_submodule(name).held, plain.get_submodule(name).weight) <= tolerance
    unmerge(backbone)
    assert all(torch.equal(backbone.get_submodule(name).weight, before[name]) for name in SHAPES)
