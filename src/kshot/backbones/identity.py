"""What a model is: digests over its tensors, and over how it is built."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

PASSING = frozenset({"training", "held", "lowered", "enabled"})  # attributes of modules that a run changes for a while


def is_own(name: str) -> bool:
    """Whether a module or tensor of a backbone was there before anything was attached."""
    return ".adapters" not in name and name.split(".")[0] not in ("shared", "initial_values")


def plain_attributes(module: nn.Module) -> dict[str, Any]:
    """What a module is set to by plain values, but for its mode."""
    kinds = (bool, int, float, str, tuple, type(None))
    found = {name: value for name, value in vars(module).items() if isinstance(value, kinds)}
    return {name: found[name] for name in sorted(found) if not name.startswith("_") and name not in PASSING}


def sha256_of(model: nn.Module) -> str:
    """SHA-256 over names, shapes and values of a model's state, independent of device and of module order."""
    return values_sha256(sorted(model.state_dict().items()))


def values_sha256(named: Iterable[tuple[str, Tensor]]) -> str:
    """SHA-256 over names, shapes and values of tensors in their order."""
    digest = hashlib.sha256()
    for name, tensor in named:
        value = tensor.detach().cpu().contiguous()
        digest.update(f"{name} {tuple(value.shape)} {value.dtype}\n".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
