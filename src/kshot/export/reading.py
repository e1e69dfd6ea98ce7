"""A LoRA of PEFT as tensors under this toolkit's names: the way back from ``export --format peft``."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from kshot.adapters import LoRA
from kshot.backbones import Backbone
from kshot.backbones.attention import Attention
from kshot.checkpoint import named_layers
from kshot.errors import UserError, first_line
from kshot.export import transformers_names
from kshot.foreign import targets_of
from kshot.module import FewShotModule
from kshot.products import Factors
from kshot.released import checked
from kshot.slots import Projection

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
FACTOR = re.compile(r"base_model\.model\.(.+)\.lora_([AB])\.weight")


def peft_tensors(folder: Path, model: FewShotModule) -> tuple[dict[str, Tensor], dict[str, str]]:
    """What PEFT wrote of a LoRA for the model of a config, whose LoRA may have a larger rank: as ``released_tensors``.

    Raises:
        UserError: it is no LoRA of PEFT, or belongs to another backbone, rank or targets than the config's.
    """
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        content = load_file(folder / WEIGHTS)
        sha256 = hashlib.sha256((folder / WEIGHTS).read_bytes()).hexdigest()
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(f"{folder} is no folder of PEFT's {CONFIG} and {WEIGHTS}: {first_line(error)}.") from error
    kind = str(config.get("peft_type"))
    if kind != "LORA" or config.get("use_dora"):
        raise UserError(
            f"{folder} is {'DoRA' if config.get('use_dora') else kind} of PEFT, of which LoRA alone is read."
        )
    changes = changes_of(content, config, model.backbone)
    layers = {layer.slot.name: (name, layer) for name, layer in named_layers(model).items()}
    rank = max((len(down) for _, down in changes.values()), default=0)
    adapter = model.adapter
    targets = json.dumps(targets_of(changes, model.backbone))
    needs = f"set --model.adapter LoRA --model.adapter.rank {rank} --model.targets '{targets}'"
    if type(adapter) is not LoRA or adapter.rank < rank or layers.keys() != changes.keys():
        own = "no adapter" if adapter is None else f"{type(adapter).__name__} on {len(layers)} slots"
        raise UserError(
            f"{folder} is a LoRA of rank {rank} on {len(changes)} slots, and the config has {own}: {needs}."
        )
    tensors = {}
    for slot, (up, down) in changes.items():
        name, layer = layers[slot]
        more = adapter.rank - len(down)
        found = {"A": F.pad(down, (0, 0, 0, more)), "B": F.pad(up / adapter.scale, (0, more))}
        for letter, value in found.items():
            if value.shape != layer.get_parameter(letter).shape:
                raise UserError(
                    f"{folder}: {letter} of {slot} is {tuple(value.shape)}, and {model.backbone.name} takes "
                    f"{tuple(layer.get_parameter(letter).shape)}: name the backbone that it was trained with."
                )
            tensors[f"{name}.{letter}"] = value.contiguous()
    return tensors, {"file": folder.name, "sha256": sha256}


def changes_of(content: Mapping[str, Tensor], config: Mapping[str, Any], backbone: Backbone) -> dict[str, Factors]:
    """The change of each slot as one product, scale included, without columns of zeros; slots of none are left out.

    Raises:
        UserError: a tensor is none of LoRA's, or of a module that the backbone has not.
    """
    names, found = slots_by_module(backbone), {}
    pairs: dict[str, dict[str, Tensor]] = {}
    for key, value in content.items():
        known = FACTOR.fullmatch(key)
        if known is None:
            raise UserError(f"PEFT's file holds {key}, which is none of LoRA's factors.")
        pairs.setdefault(known[1], {})[known[2]] = checked(key, value)
    for module, pair in pairs.items():
        if module not in names or pair.keys() != {"A", "B"}:
            raise UserError(f"PEFT's file adapts {module}, and {backbone.name} has no such module to adapt.")
        rank = len(pair["A"])
        alpha = matched(config.get("alpha_pattern") or {}, module, config.get("lora_alpha", 8))
        scale = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
        slots = names[module]
        sizes = [rows for _, rows in slots]
        if sum(sizes) != len(pair["B"]):
            raise UserError(f"PEFT's file has {len(pair['B'])} rows for {module}, and {backbone.name} {sum(sizes)}.")
        for (slot, _), up in zip(slots, pair["B"].split(sizes), strict=True):
            used = up.any(0)
            if used.any():
                found[slot] = Factors(scale * up[:, used], pair["A"][used])
    return found


def matched(patterns: Mapping[str, Any], module: str, otherwise: Any) -> Any:
    """What PEFT's patterns say of a module."""
    return next((v for key, v in patterns.items() if re.match(rf"(.*\.)?({key})$", module)), otherwise)


def slots_by_module(backbone: Backbone) -> dict[str, list[tuple[str, int]]]:
    """The slots, with their rows, of each module, by its names in the library and in Transformers."""
    found = {}
    for path, module in backbone.named_modules():
        if isinstance(module, Projection):
            parent, _, own = path.partition(".")[2].rpartition(".")
            attention = backbone.get_submodule(path.rpartition(".")[0])
            name = f"{parent}.{own}"
            if isinstance(attention, Attention) and attention.true_blocks:
                name = parent if own == "qkv" else f"{parent}.base_layer.out_proj"
            elif isinstance(attention, Attention) and own == "o":
                name = f"{parent}.proj"
            found[name] = [(f"{module.place}.{part}", rows) for part, rows in module.sizes.items()]
    rows = {slot: size for slots in list(found.values()) for slot, size in slots}
    try:
        named = transformers_names.slot_names(backbone)
    except UserError:  # which has it not
        named = {}
    return found | {name: [(slot, rows[slot])] for slot, name in named.items()}
