"""An adapter of PEFT as tensors under this toolkit's names: the way back from ``export --format peft``."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from kshot.adapters import DoRA, LoRA, RandLoRA, VeRA
from kshot.adapters.dora import lengths
from kshot.backbones import Backbone
from kshot.backbones.attention import Attention
from kshot.checkpoint import named_layers
from kshot.errors import UserError, first_line
from kshot.export import transformers_names
from kshot.export.peft import randlora_bases, vera_pair
from kshot.foreign import targets_of
from kshot.module import FewShotModule
from kshot.released import checked
from kshot.slots import Projection

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
KINDS: dict[str, type] = {"LORA": LoRA, "DORA": DoRA, "VERA": VeRA, "RANDLORA": RandLoRA}
LOW_RANK = {"lora_A.weight": "A", "lora_B.weight": "B"}
LENGTHS = {"lora_magnitude_vector": "m", "lora_magnitude_vector.weight": "m"}
NAMES = {  # of a layer's tensors, by PEFT's
    "LORA": LOW_RANK,
    "DORA": LOW_RANK | LENGTHS,
    "VERA": {"vera_lambda_b": "lambda_b", "vera_lambda_d": "lambda_d"},
    "RANDLORA": {"randlora_lambda": "Lambda", "randlora_gamma": "Gamma"},
}
FROZEN = {"VERA": ("vera_A", "vera_B"), "RANDLORA": ("randlora_A", "randlora_B")}  # random, and the same for all layers
PREFIX = "base_model.model."
Layers = dict[str, dict[str, Tensor]]  # tensors by their names in a layer, by slot or by PEFT's module


def peft_tensors(folder: Path, model: FewShotModule) -> tuple[dict[str, Tensor], dict[str, str]]:
    """What PEFT wrote for the model of a config, whose LoRA may have a larger rank: as ``released_tensors``.

    Raises:
        UserError: it is no LoRA, DoRA, VeRA or RandLoRA of PEFT, or belongs to another backbone, rank or targets than
            the config's; or its random matrices are not those of the config's seed.
    """
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        content = load_file(folder / WEIGHTS)
        sha256 = hashlib.sha256((folder / WEIGHTS).read_bytes()).hexdigest()
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(f"{folder} is no folder of PEFT's {CONFIG} and {WEIGHTS}: {first_line(error)}.") from error
    kind = "DORA" if config.get("use_dora") else str(config.get("peft_type"))
    if kind not in KINDS:
        raise UserError(f"{folder} is {kind} of PEFT, of which LoRA, DoRA, VeRA and RandLoRA are read.")
    layers = {layer.slot.name: (name, layer) for name, layer in named_layers(model).items()}
    found = by_slot(layers_of(content, kind), config, model.backbone, layers)
    check_fit(folder, kind, config, found, model, {name: layer for name, (_, layer) in layers.items()})
    if kind in FROZEN:
        check_frozen(folder, kind, content, model, [layer for _, layer in layers.values()])
    tensors, adapter = {}, cast(Any, model.adapter)
    for slot, own in found.items():
        name, layer = layers[slot]
        sized = padded(own, adapter.rank, adapter.scale) if "A" in own else own
        for letter, value in sized.items():
            if value.shape != layer.get_parameter(letter).shape:
                raise UserError(
                    f"{folder}: {letter} of {slot} is {tuple(value.shape)}, and {model.backbone.name} takes "
                    f"{tuple(layer.get_parameter(letter).shape)}: name the backbone that it was trained with."
                )
            tensors[f"{name}.{letter}"] = value.contiguous()
    return tensors, {"file": folder.name, "sha256": sha256}


def padded(own: Mapping[str, Tensor], rank: int, scale: float) -> dict[str, Tensor]:
    """Factors of a rank, and without the scale that the adapter has."""
    more = rank - len(own["A"])
    return {**own, "A": F.pad(own["A"], (0, 0, 0, more)), "B": F.pad(own["B"] / scale, (0, more))}


def check_fit(
    folder: Path, kind: str, config: Mapping[str, Any], found: Layers, model: FewShotModule, layers: Mapping[str, Any]
) -> None:
    """Raises UserError where the config's adapter is not the file's; says which would be."""
    adapter: Any = model.adapter
    low_rank = kind in ("LORA", "DORA")
    rank = max((len(own["A"]) for own in found.values()), default=0) if low_rank else int(config["r"])
    size = {"rank": rank} | ({"alpha": float(config["randlora_alpha"])} if kind == "RANDLORA" else {})
    fits = type(adapter) is KINDS[kind] and layers.keys() == found.keys()
    if fits and (adapter.rank >= rank if low_rank else all(getattr(adapter, n) == v for n, v in size.items())):
        return
    own = "no adapter" if adapter is None else f"{type(adapter).__name__} on {len(layers)} slots"
    words = "".join(f" --model.adapter.{name} {value:g}" for name, value in size.items())
    targets = json.dumps(targets_of(found, model.backbone))
    name = KINDS[kind].__name__
    raise UserError(
        f"{folder} is a {name} of rank {rank} on {len(found)} slots, and the config has {own}: "
        f"set --model.adapter {name}{words} --model.targets '{targets}'."
    )


def check_frozen(
    folder: Path, kind: str, content: Mapping[str, Tensor], model: FewShotModule, layers: list[Any]
) -> None:
    """Raises UserError unless a file's random matrices are those that the config's seed gives."""
    adapter: Any = model.adapter
    own = vera_pair(layers) if kind == "VERA" else randlora_bases(adapter, layers)
    for name in FROZEN[kind]:
        value = content.get(f"base_model.{name}")
        if value is None:
            raise UserError(f"{folder} holds no {name}: PEFT must save it with save_projection.")
        if value.shape != own[name].shape or not torch.equal(value, own[name].to(value.dtype)):
            raise UserError(
                f"{folder}: {name} is not what --model.adapter.seed {adapter.seed} gives here: {KINDS[kind].__name__} "
                "comes back from what kshot exported, by the seed of its run; PEFT draws random numbers of its own."
            )


def layers_of(content: Mapping[str, Tensor], kind: str) -> Layers:
    """The tensors of a file by module and by their names in a layer; raises UserError at one of another method."""
    found: Layers = {}
    for key, value in content.items():
        if key.removeprefix("base_model.") in FROZEN.get(kind, ()):
            continue
        own = next((own for own in NAMES[kind] if key.startswith(PREFIX) and key.endswith(f".{own}")), None)
        if own is None:
            raise UserError(f"PEFT's file holds {key}, which is nothing of {KINDS[kind].__name__}.")
        module = key[len(PREFIX) : -len(own) - 1]
        found.setdefault(module, {})[NAMES[kind][own]] = checked(key, value)
    return found


def by_slot(modules: Layers, config: Mapping[str, Any], backbone: Backbone, wanted: Collection[str]) -> Layers:
    """The tensors by slot: a module of several is one slot where the config has it so, and else divided by its rows.

    Of LoRA, the scale is in B, and columns of zeros and slots without a change are left out.

    Raises:
        UserError: a module that the backbone has not, or of another size.
    """
    places, found = slots_by_module(backbone), {}
    for module, own in modules.items():
        names = {"A", "B"} if "A" in own or "B" in own else own.keys()
        if module not in places or not names <= own.keys():
            raise UserError(f"PEFT's file adapts {module}, and {backbone.name} has no such module to adapt.")
        projection, parts = places[module]
        whole = f"{projection.place}.{projection.whole}"
        if "A" not in own:
            name = f"{projection.place}.{parts[0]}" if len(parts) == 1 else whole
            found[name] = own | ({"Lambda": own["Lambda"].T} if "Lambda" in own else {})
            continue
        rank, sizes = len(own["A"]), [projection.sizes[part] for part in parts]
        if sum(sizes) != len(own["B"]):
            raise UserError(f"PEFT's file has {len(own['B'])} rows for {module}, and {backbone.name} {sum(sizes)}.")
        alpha = matched(config.get("alpha_pattern") or {}, module, config.get("lora_alpha", 8))
        own["B"] = own["B"] * (alpha / (math.sqrt(rank) if config.get("use_rslora") else rank))
        slots = {f"{projection.place}.{part}": projection.rows[part] for part in parts}
        if whole in wanted and len(parts) > 1:
            slots = {whole: slice(0, sum(sizes))}
        start = min(rows.start for rows in slots.values())
        for slot, rows in slots.items():
            mine = slice(rows.start - start, rows.stop - start)
            used = own["B"][mine].any(0)
            changed = {"A": own["A"][used], "B": own["B"][mine][:, used]}
            if "m" in own:
                changed["m"] = own["m"].flatten()[mine]
            longer = "m" in own and not torch.allclose(changed["m"], lengths(projection.weight[rows]), rtol=1e-6)
            if used.any() or longer:
                found[slot] = changed
    return found


def matched(patterns: Mapping[str, Any], module: str, otherwise: Any) -> Any:
    """What PEFT's patterns say of a module."""
    return next((v for key, v in patterns.items() if re.match(rf"(.*\.)?({key})$", module)), otherwise)


def slots_by_module(backbone: Backbone) -> dict[str, tuple[Projection, tuple[str, ...]]]:
    """The projection and its parts in each module, by its names in the library and in Transformers."""
    found: dict[str, tuple[Projection, tuple[str, ...]]] = {}
    for path, module in backbone.named_modules():
        if isinstance(module, Projection):
            parent, _, own = path.partition(".")[2].rpartition(".")
            attention = backbone.get_submodule(path.rpartition(".")[0])
            name = f"{parent}.{own}"
            if isinstance(attention, Attention) and attention.true_blocks:
                name = parent if own == "qkv" else f"{parent}.base_layer.out_proj"
            elif isinstance(attention, Attention) and own == "o":
                name = f"{parent}.proj"
            found[name] = module, tuple(module.sizes)
    of_slot = {
        f"{projection.place}.{part}": (projection, (part,)) for projection, parts in found.values() for part in parts
    }
    try:
        named = transformers_names.slot_names(backbone)
    except UserError:  # which has it not
        named = {}
    return found | {name: of_slot[slot] for slot, name in named.items()}
