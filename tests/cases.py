"""Every adapter with settings for tiny models, and what tests of adapters have in common.

A new method is tested as soon as it is imported; it needs an entry in CASES where its defaults do not fit a tiny model,
and for the closed form of its number of parameters.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import towers

from kshot import holding, slots
from kshot.adapters import Adapter, SlotAdapter
from kshot.backbones import Backbone


@dataclass(frozen=True)
class Case:
    """A method's settings for tiny models, and what is known of it.

    Attributes:
        settings: of the constructor.
        count: trainable numbers on one slot, from the paper's formula: (settings, inputs, outputs).
        start: largest relative change of the output at step 0; 0 asks for the same bits.
        random: whether initial values are drawn.
    """

    settings: dict[str, Any] = field(default_factory=dict)
    count: Callable[[Any, int, int], int] | None = None
    start: float = 0.0
    random: bool = True


CASES: dict[str, dict[str, Case]] = {
    "LoRA": {
        "lora": Case({"rank": 2}, lambda s, i, o: s.rank * (i + o)),
        "lora_stabilised": Case({"rank": 4, "alpha": 3, "rank_stabilised": True}, lambda s, i, o: s.rank * (i + o)),
    },
    "DoRA": {"dora": Case({"rank": 2, "alpha": 4}, lambda s, i, o: s.rank * (i + o) + o)},
    "PiSSA": {"pissa": Case({"rank": 2}, lambda s, i, o: s.rank * (i + o), random=False)},
    "LoRAXS": {
        "lora_xs": Case({"rank": 4}, lambda s, i, o: s.rank**2, random=False),
        "lora_xs_drawn": Case({"rank": 4, "init_std": 1e-5}, lambda s, i, o: s.rank**2, start=1e-4),
        "lora_xs_saved": Case({"rank": 4, "save_factors": True}, lambda s, i, o: s.rank**2, random=False),
    },
    "AdaLoRA": {"adalora": Case({"initial_rank": 3, "target_rank": 2}, lambda s, i, o: s.initial_rank * (i + o + 1))},
    "AutoLoRA": {"autolora": Case({"max_rank": 3}, lambda s, i, o: s.max_rank * (i + o + 1))},
    "HydraLoRA": {
        "hydralora": Case({"rank": 2, "alpha": 3}, lambda s, i, o: s.rank * i + s.heads * s.rank * o + s.heads * i)
    },
    "SVFT": {
        "svft": Case({"path": "materialised"}, lambda s, i, o: min(i, o), random=False),
        "svft_svd": Case({"path": "svd"}, lambda s, i, o: min(i, o), start=2e-6, random=False),
        "svft_banded": Case(
            {"pattern": "banded", "path": "materialised"}, lambda s, i, o: 5 * min(i, o) - 6, random=False
        ),
        "svft_random": Case(
            {"pattern": "random", "entries": 40, "gate": True}, lambda s, i, o: 41, random=False, start=2e-6
        ),
    },
    "PRANC": {
        "pranc": Case({"coefficients": 50}, lambda s, i, o: s.coefficients, random=False),
        "pranc_hashes": Case({"coefficients": 40, "hashes": 3}, lambda s, i, o: s.coefficients, random=False),
        "pranc_dense": Case({"coefficients": 8, "basis": "uniform"}, lambda s, i, o: s.coefficients, random=False),
    },
    "VeRA": {"vera": Case({"rank": 40}, lambda s, i, o: s.rank + o, random=False)},
    "RandLoRA": {
        "randlora": Case({"rank": 3}, lambda s, i, o: -(-min(i, o) // s.rank) * (s.rank + min(i, o)), random=False),
        "randlora_factorised": Case(
            {"rank": 8, "alpha": 4.0, "zero": "lambda", "path": "factorised"},
            lambda s, i, o: min(i, o) // s.rank * (s.rank + min(i, o)),
            random=False,
        ),
        "randlora_sparse": Case(
            {"rank": 8, "basis": "ternary", "sparsity": 16.0},
            lambda s, i, o: min(i, o) // s.rank * (s.rank + min(i, o)),
            random=False,
        ),
    },
    "NOLA": {
        "nola": Case({"bases": 20, "rank": 2, "save_bits": 8}, lambda s, i, o: 2 * s.bases, random=False),
        "nola_layer": Case({"bases": 20, "rank": 2, "basis": "layer"}, lambda s, i, o: 2 * s.bases, random=False),
        "nola_vit": Case({"bases": 64, "rank": 1, "start": "vit"}, lambda s, i, o: 2 * s.bases, 0.02, random=False),
    },
}
BAD: dict[str, list[dict[str, Any]]] = {
    "FullTuning": [{"only": "biases"}, {"wise_alpha": -0.5}],
    "LoRA": [
        {"rank": 0},
        {"rank": -1},
        {"alpha": 0.0},
        {"alpha": -1.0},
        {"alpha": float("nan")},
        {"alpha": float("inf")},
        {"dropout": 1.0},
        {"dropout": -0.1},
        {"dropout": float("nan")},
        {"wise_alpha": 1.5},
    ],
    "DoRA": [{"rank": 0}, {"alpha": 0.0}, {"alpha": -1.0}, {"alpha": float("inf")}, {"dropout": 1.0}],
    "PiSSA": [{"rank": 0}, {"alpha": 0.0}, {"alpha": float("nan")}, {"dropout": -0.1}],
    "LoRAXS": [
        {"rank": 0},
        {"alpha": -1.0},
        {"init_std": -1e-5},
        {"init_std": float("nan")},
        {"init_std": float("inf")},
    ],
    "AdaLoRA": [
        {"initial_rank": 0},
        {"target_rank": 0},
        {"target_rank": 13},
        {"alpha": 0.0},
        {"initial_steps": -1},
        {"final_steps": -1},
        {"every": 0},
        {"beta1": 1.0},
        {"beta2": 0.0},
        {"orthogonality": -0.1},
        {"orthogonality": float("inf")},
    ],
    "AutoLoRA": [
        {"max_rank": 0},
        {"alpha": float("inf")},
        {"search_steps": 0},
        {"search_lr": 0.0},
        {"rank_rule": "paper"},
    ],
    "HydraLoRA": [
        {"rank": 0},
        {"heads": 0},
        {"alpha": 0.0},
        {"alpha": float("nan")},
        {"dropout": 1.0},
        {"wise_alpha": 0.5},
    ],
    "SVFT": [
        {"pattern": "diagonal"},
        {"band": 0},
        {"entries": 9},
        {"entries": 0, "pattern": "random"},
        {"start": "one"},
        {"seed": -1},
        {"dropout": 1.0},
    ],
    "PRANC": [
        {"coefficients": 0},
        {"scope": "tower"},
        {"basis": "ternary"},
        {"hashes": 0},
        {"hashes": 2, "basis": "uniform"},
        {"scale": 0.0},
        {"scale": float("inf")},
        {"seed": -1},
        {"dropout": -0.1},
    ],
    "VeRA": [{"rank": 0}, {"initial": 0.0}, {"initial": float("nan")}, {"seed": -1}, {"dropout": 1.0}],
    "RandLoRA": [
        {"rank": 0},
        {"alpha": 0.0},
        {"alpha": float("inf")},
        {"basis": "sign"},
        {"sparsity": 1.5},
        {"sparsity": float("nan")},
        {"zero": "both"},
        {"seed": -1},
        {"dropout": -0.1},
    ],
    "NOLA": [
        {"bases": 0},
        {"rank": 0},
        {"alpha": 0.0},
        {"alpha": float("nan")},
        {"basis": "stored"},
        {"start": "zero"},
        {"save_bits": 2},
        {"seed": 2**63},
        {"dropout": 1.0},
    ],
}


def concrete(kind: type) -> list[type]:
    """The classes of kshot below a base class that can be made."""
    below = [c for sub in kind.__subclasses__() for c in [sub, *concrete(sub)]]
    own = [c for c in dict.fromkeys(below) if c.__module__.startswith("kshot.")]
    return [c for c in own if not inspect.isabstract(c)]


ADAPTERS = concrete(Adapter)
SLOT_CASES = {
    label: (kind, case)
    for kind in concrete(SlotAdapter)
    for label, case in CASES.get(kind.__name__, {kind.__name__.lower(): Case()}).items()
}
METHODS = {label: lambda kind=kind, case=case: kind(**case.settings) for label, (kind, case) in SLOT_CASES.items()}
METHODS |= {c.__name__.lower(): c for c in ADAPTERS if not issubclass(c, SlotAdapter)}

each_case = pytest.mark.parametrize("label", SLOT_CASES)
FIRST_CASES = [next(label for label, (k, _) in SLOT_CASES.items() if k is kind) for kind in concrete(SlotAdapter)]
each_first_case = pytest.mark.parametrize("label", FIRST_CASES)  # one a method is enough
each_method = pytest.mark.parametrize("method", METHODS)


FEW = ("*.0.[qo]", "*.1.fc2")  # a square part of a fused weight, a square weight and a narrow one, of both towers


def adapted(label: str, name: str = "clip", targets: tuple[str, ...] = ("*",), **more: Any) -> Backbone:
    """A backbone with a case attached."""
    backbone = towers.backbone(name)
    attach(label, backbone, targets, **more)
    return backbone


def attach(label: str, backbone: Backbone, targets: tuple[str, ...] = ("*",), **more: Any) -> None:
    """Attaches a case, with some other settings, or a method that is no slot adapter."""
    if label in SLOT_CASES:
        kind, case = SLOT_CASES[label]
        kind(**case.settings | more).attach(backbone, targets)
    else:
        METHODS[label]().attach(backbone, targets)


def layers_of(backbone: Backbone) -> dict[str, slots.AdapterLayer]:
    """Adapter layers by slot."""
    return backbone.layers()


def trained(backbone: Backbone) -> dict[str, torch.nn.Parameter]:
    """Trainable tensors by name."""
    return {n: p for n, p in backbone.named_parameters() if p.requires_grad}


def perturb(backbone: Backbone, amount: float = 0.1) -> None:
    """Moves every trainable value, so that nothing hides behind an initial zero."""
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for parameter in trained(backbone).values():
            parameter.add_(amount * torch.randn(parameter.shape, generator=generator).to(parameter))


def loss_of(backbone: Backbone, tower: str) -> torch.Tensor:
    """A loss of a tower's features."""
    features = towers.encode(backbone, tower)
    target = torch.randn(features.shape, generator=torch.Generator().manual_seed(5))
    return (features.float() - target).square().mean()


def plain(backbone: Backbone, tower: str) -> torch.Tensor:
    """Features of a tower, without gradients."""
    with torch.no_grad():
        return towers.encode(backbone, tower)


def merged(backbone: Backbone, tower: str) -> torch.Tensor:
    """Features of a tower while it is merged."""
    with holding.merged(backbone):
        return plain(backbone, tower)


def library_of(backbone: Backbone) -> torch.nn.Module:
    """The library's model inside a backbone."""
    return backbone.clip if hasattr(backbone, "clip") else backbone.vit


def check_library(backbone: Backbone, name: str, original: torch.nn.Module) -> None:
    """The modules, parameters and buffers are those of the library."""
    mine = library_of(backbone)
    for what in ("named_modules", "named_parameters", "named_buffers"):
        found, wanted = (dict(getattr(model, what)()) for model in (mine, original))
        assert found.keys() == wanted.keys(), what
        if what == "named_modules":
            assert [n for n, m in found.items() if not issubclass(type(wanted[n]), type(m))] == []
        else:
            assert {n: t.dtype for n, t in found.items()} == {n: t.dtype for n, t in wanted.items()}


def check_untouched(backbone: Backbone, fresh: Backbone) -> None:
    """Nothing tells one backbone from another that nothing was ever attached to."""
    for what in ("named_modules", "named_parameters", "named_buffers", "state_dict"):
        found, wanted = (dict(getattr(model, what)()) for model in (backbone, fresh))
        assert list(found) == list(wanted), what
    assert all(
        torch.equal(a, b) for a, b in zip(backbone.state_dict().values(), fresh.state_dict().values(), strict=True)
    )
    assert all(torch.equal(a, b) for a, b in zip(backbone.buffers(), fresh.buffers(), strict=True))
    assert not any(p.requires_grad or p.grad is not None for p in backbone.parameters())
    assert all(a.training == b.training for a, b in zip(backbone.modules(), fresh.modules(), strict=True))
    for a, b in zip(backbone.modules(), fresh.modules(), strict=True):
        left = {n for n, v in vars(a).items() if v is not None} - {n for n, v in vars(b).items() if v is not None}
        assert left <= {"chunks"}, "but for how many parts the last prompts were encoded in"
