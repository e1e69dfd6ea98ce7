"""``peft``: the adapter of a run as PEFT's files, for the untouched model of open_clip, timm or Transformers."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from kshot.adapters import RandLoRA, VeRA
from kshot.adapters.dora import DoRALayer
from kshot.backbones import Backbone, Timm
from kshot.backbones.attention import Attention
from kshot.errors import UserError
from kshot.export import transformers_names
from kshot.export.check import Answers
from kshot.export.head import write_head
from kshot.export.merged import check_plain, library_backbone, normalised
from kshot.export.needed import needed
from kshot.export.written import Wanted, facts_of
from kshot.layers import LowRankLayer
from kshot.opening import OpenRun
from kshot.products import Factors
from kshot.slots import AdapterLayer, Projection

Tensors = dict[str, Tensor]
INSTEAD = "export --format merged, torch or onnx instead, or --lossy, which takes the nearest LoRA"


class Module(NamedTuple):
    """A linear map of the library as PEFT finds it.

    Attributes:
        projection: that it is, or is a part of.
        parts: whose rows it has, in their order.
        fused: an ``nn.MultiheadAttention``, in which PEFT adapts q, k and v together with the output projection.
        raw: a matrix that is no module of its own, which PEFT does not find.
    """

    projection: Projection
    parts: tuple[str, ...]
    fused: bool = False
    raw: bool = False

    def layers(self) -> list[AdapterLayer]:
        """The adapter layers on its rows."""
        found = self.projection.layers()
        return [found[part] for part in dict.fromkeys((*self.parts, self.projection.whole)) if part in found]

    @property
    def alone(self) -> AdapterLayer | None:
        """The one layer that has all of its rows, and no others; None where there is none."""
        layers, rows = self.layers(), sum(self.projection.sizes[part] for part in self.parts)
        return layers[0] if len(layers) == 1 and layers[0].slot.out_features == rows else None


def modules_of(backbone: Backbone, layout: str) -> dict[str, Module]:
    """The library's or Transformers' modules in which something is adapted, by their names there."""
    found: dict[str, Module] = {}
    for path, module in backbone.named_modules():
        name = path.partition(".")[2]
        if isinstance(module, Attention):
            fused, raw = module.gives_pair, module.true_blocks and not module.gives_pair
            found[name if module.true_blocks else f"{name}.qkv"] = Module(module.qkv, ("q", "k", "v"), fused, raw)
            found[f"{name}.{'out_proj' if module.true_blocks else 'proj'}"] = Module(module.o, ("o",))
        elif isinstance(module, Projection) and not isinstance(
            backbone.get_submodule(path.rpartition(".")[0]), Attention
        ):
            found[name] = Module(module, tuple(module.sizes))
    if layout == "transformers":
        of_slot = {f"{m.projection.place}.{part}": m.projection for m in found.values() for part in m.parts}
        names = transformers_names.slot_names(backbone)
        found = {name: Module(of_slot[slot], (slot.rpartition(".")[2],)) for slot, name in names.items()}
    adapted = {name: module for name, module in found.items() if module.layers()}
    for name, module in adapted.items():
        if layout == "native" and found.get(name.removesuffix(".out_proj"), module).fused and not module.fused:
            raise UserError(
                f"{backbone.name}: PEFT 0.21 adds what is adapted in {name}, of an nn.MultiheadAttention, twice: "
                "export --layout transformers, or --format merged."
            )
        if module.raw:
            raise UserError(f"{backbone.name}: PEFT finds no module for {name}: {INSTEAD.partition(', or')[0]}.")
    return adapted


def write(run: OpenRun, folder: Path, wanted: Wanted) -> Answers:
    """``adapter_config.json``, ``adapter_model.safetensors``, a card, and the head beside them.

    Raises:
        UserError: there is no adapter, or none that PEFT can have.
    """
    peft = needed("peft")
    check_plain(run)
    backbone = run.module.backbone
    if not backbone.layers():
        raise UserError(f"{run.directory}: {run.module.method} has no adapter for PEFT: export --format merged.")
    modules = modules_of(backbone, wanted.layout)
    with torch.no_grad():
        config, tensors = native(run, modules, wanted) or low_rank(run, modules, wanted)
    config |= {"target_modules": "|".join(map(re.escape, modules)), "inference_mode": True}
    kind = getattr(peft, config.pop("kind"))
    kind(**config, base_model_name_or_path=backbone.name).save_pretrained(folder)
    tensors = {f"base_model.{name}": t.to(wanted.dtype).contiguous().clone() for name, t in tensors.items()}
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    facts, head = facts_of(run), write_head(run, folder)
    (folder / "README.md").write_text(card(facts, wanted.layout, isinstance(backbone, Timm)), encoding="utf-8")
    encode = loaded(library_backbone(run, adapted=False), folder, wanted.layout)
    return lambda image: head(encode(normalised(image, facts)))


def loaded(backbone: Backbone, folder: Path, layout: str) -> Callable[[Tensor], Tensor]:
    """The image encoder that PEFT makes of an untouched backbone and a folder."""
    base: Any = backbone
    base = transformers_names.model_of(base) if layout == "transformers" else getattr(base, "clip", None) or base.vit
    model = needed("peft").PeftModel.from_pretrained(base, folder).eval()
    if layout == "transformers":
        return transformers_names.encoder_of(model)
    encode: Callable[[Tensor], Tensor] = model if isinstance(backbone, Timm) else model.encode_image
    return encode


def native(run: OpenRun, modules: Mapping[str, Module], wanted: Wanted) -> tuple[dict[str, Any], Tensors] | None:
    """Configuration and tensors of a method of PEFT's own other than LoRA; None where LoRA is what is to be written.

    Raises:
        UserError: the method has no form as LoRA, and PEFT's own is of other matrices.
    """
    adapter: Any = run.module.adapter
    layers = [layer for module in modules.values() for layer in module.layers()]
    dora = isinstance(layers[0], DoRALayer)
    if not (dora or isinstance(adapter, (VeRA, RandLoRA))):
        return None
    reason = ""
    if adapter.wise_alpha != 1:
        reason = "wise_alpha is not 1"
    elif any(module.fused for module in modules.values()):
        reason = "in an nn.MultiheadAttention PEFT has LoRA alone; --layout transformers has q, k and v apart"
    elif not dora and any(module.alone is None for module in modules.values()):
        reason = "q, k and v are one matrix there; --layout transformers has them apart, or adapt the slots *.qkv"
    if reason and (wanted.lossy or isinstance(adapter, VeRA)):
        return None
    if reason:
        raise UserError(f"PEFT cannot have {type(adapter).__name__} here: {reason}. Else {INSTEAD}.")
    if dora:
        return as_dora(modules)
    return as_vera(adapter, modules) if isinstance(adapter, VeRA) else as_randlora(adapter, modules)


def as_dora(modules: Mapping[str, Module]) -> tuple[dict[str, Any], Tensors]:
    """DoRA as PEFT has it; rows that nothing adapts keep their length."""
    config, tensors = as_lora({name: parts_of(module, None) for name, module in modules.items()}, modules)
    for name, module in modules.items():
        lengths = []
        for part in module.parts:
            rows = module.projection.rows[part]
            layer: Any = layer_of(module.projection, part)
            own = torch.linalg.vector_norm(module.projection.weight[rows], dim=1)
            lengths.append(own if layer is None else layer.m[within(layer, rows)])
        tensors[f"model.{name}.lora_magnitude_vector"] = torch.cat(lengths)
    return config | {"use_dora": True}, tensors


def as_vera(adapter: VeRA, modules: Mapping[str, Module]) -> tuple[dict[str, Any], Tensors]:
    """VeRA with its frozen pair in the file."""
    layers: dict[str, Any] = {name: module.alone for name, module in modules.items()}
    tensors = vera_pair(list(layers.values()))
    for name, layer in layers.items():
        tensors |= {f"model.{name}.vera_lambda_{which}": getattr(layer, f"lambda_{which}") for which in "bd"}
    return {"kind": "VeraConfig", "r": adapter.rank, "save_projection": True}, tensors


def vera_pair(layers: Sequence[Any]) -> Tensors:
    """The frozen pair of all layers, by PEFT's names."""
    pair = layers[0].pair
    return {"vera_A": pair.A, "vera_B": pair.B}


def randlora_bases(adapter: RandLoRA, layers: Sequence[Any]) -> Tensors:
    """The frozen bases of all layers by PEFT's names, as large as PEFT makes them.

    Raises:
        UserError: layers take parts of them in which PEFT orders them otherwise.
    """
    shapes = [(layer.slot.out_features, layer.slot.in_features) for layer in layers]
    smaller, larger = sorted(max(sides) for sides in zip(*shapes, strict=True))
    terms = {len(layer.Gamma) for layer in layers}
    if len(terms) > 1:  # PEFT lays the columns of B out by a layer's own number of terms
        raise UserError(
            f"PEFT cannot have RandLoRA here: matrices of other smaller sides share a basis, which it orders by each: "
            f"adapt those of one side, or {INSTEAD}."
        )
    bases, n, rank = layers[0].bases, terms.pop(), adapter.rank
    flat = bases.B[:, :n].transpose(1, 2).reshape(-1, n, rank)  # where the column of term j and rank k is k n + j
    tensors: Tensors = {"randlora_A": F.pad(bases.A, (0, smaller - bases.A.shape[1])).unsqueeze(1)}
    tensors["randlora_B"] = F.pad(flat, (0, 0, 0, -(-smaller // rank) - n, 0, larger - len(flat)))
    return tensors


def as_randlora(adapter: RandLoRA, modules: Mapping[str, Module]) -> tuple[dict[str, Any], Tensors]:
    """RandLoRA with its frozen bases in the file."""
    layers: dict[str, Any] = {name: module.alone for name, module in modules.items()}
    tensors = randlora_bases(adapter, list(layers.values()))
    for name, layer in layers.items():
        tensors |= {f"model.{name}.randlora_lambda": layer.Lambda.T, f"model.{name}.randlora_gamma": layer.Gamma}
    alpha = int(adapter.alpha) if float(adapter.alpha).is_integer() else adapter.alpha
    config = {"kind": "RandLoraConfig", "r": adapter.rank, "randlora_alpha": alpha, "save_projection": True}
    return config, tensors


def low_rank(run: OpenRun, modules: Mapping[str, Module], wanted: Wanted) -> tuple[dict[str, Any], Tensors]:
    """Configuration and tensors of LoRA, each matrix with a rank of its own."""
    del run
    rank = wanted.rank if wanted.lossy else None
    return as_lora({name: parts_of(module, rank) for name, module in modules.items()}, modules)


def as_lora(factors: Mapping[str, Factors], modules: Mapping[str, Module]) -> tuple[dict[str, Any], Tensors]:
    """The configuration and the tensors of the change ``up · down`` of each module: scales are in the factors."""
    ranks = {name: len(down) for name, (_, down) in factors.items()}
    factors = dict(factors)
    for name, module in modules.items():
        if module.fused:  # PEFT has the output projection with it, and in one rank
            width, rank = module.projection.in_features, ranks[name]
            factors[f"{name}.base_layer.out_proj"] = Factors(torch.zeros(width, rank), torch.zeros(rank, width))
    tensors: Tensors = {}
    for name, (up, down) in factors.items():
        tensors |= {f"model.{name}.lora_A.weight": down, f"model.{name}.lora_B.weight": up}
    common = max(ranks.values())
    others = {f"^{re.escape(name)}": rank for name, rank in ranks.items() if rank != common}
    config = {"kind": "LoraConfig", "r": common, "lora_alpha": common, "rank_pattern": others, "alpha_pattern": others}
    return config, tensors


def parts_of(module: Module, rank: int | None) -> Factors:
    """The change of a module as one product, (out, r) and (r, in): the downs of its parts above each other."""
    ups, downs = [], []
    for part in module.parts:
        layer, rows = layer_of(module.projection, part), module.projection.rows[part]
        if layer is not None:
            up, down = factors_of(layer, rank)
            ups.append(up[within(layer, rows)])
            downs.append(down)
        else:
            ups.append(torch.zeros(rows.stop - rows.start, 0))
            downs.append(torch.zeros(0, module.projection.in_features))
    if len(module.parts) > 1 and module.projection.whole in module.projection.layers():
        return Factors(torch.cat(ups), downs[0])
    return Factors(torch.block_diag(*ups), torch.cat(downs))


def layer_of(projection: Projection, part: str) -> AdapterLayer | None:
    """The layer that changes the rows of a part."""
    layers = projection.layers()
    return layers.get(part) or layers.get(projection.whole)


def within(layer: AdapterLayer, rows: slice) -> slice:
    """Rows of a projection among those of a layer."""
    start = layer.slot.rows.start
    return slice(rows.start - start, rows.stop - start)


def factors_of(layer: AdapterLayer, rank: int | None) -> Factors:
    """The change of a layer as evaluation has it, as one product; with a rank, the nearest one of a change of any rank.

    Raises:
        UserError: it is no product of thin factors, and no rank is given.
    """
    name = layer.slot.name
    if not layer.mergeable:
        advice = "export --format torch or onnx, where the program computes it"
        raise UserError(f"What is adapted in {name} depends on its input, and PEFT has nothing like it: {advice}.")
    sides = min(layer.slot.out_features, layer.slot.in_features)
    if isinstance(layer, LowRankLayer) and (layer.finish is None or (rank is None and isinstance(layer, DoRALayer))):
        terms = layer.factors()
        up, down = torch.cat([each.up for each in terms], 1), torch.cat([each.down for each in terms])
        up = up * layer.wise_alpha if layer.wise_alpha != 1 else up
        if len(down) <= sides:
            return Factors(up, down)
        delta = up @ down
        wide = delta.shape[0] < delta.shape[1]
        return Factors(torch.eye(sides), delta) if wide else Factors(delta, torch.eye(sides))
    if rank is None:
        raise UserError(f"The change of {name} has full rank, and PEFT no method like it: {INSTEAD}.")
    u, s, vt = torch.linalg.svd(layer.evaluated_weight() - layer.slot.weight, full_matrices=False)
    return Factors(u[:, :rank] * s[:rank], vt[:rank])


def card(facts: Mapping[str, Any], layout: str, timm: bool) -> str:
    """The model card."""
    base = {"transformers": "AutoModel.from_pretrained(BASE)", "native": "open_clip.create_model(BASE)"}[layout]
    if layout == "native" and timm:
        base = "timm.create_model(BASE, pretrained=True, num_classes=0, dynamic_img_size=True)"
    classes = ", ".join(map(str, facts["classes"]))
    seen = json.dumps(facts["preprocessing"])
    return f"""---
library_name: peft
tags: [few-shot, kshot]
---
# {facts["method"]} on {facts["backbone"]}

An adapter that kshot {facts["kshot"]} trained from a few images a class, for the untouched weights of
{facts["backbone"]}:

```python
model = PeftModel.from_pretrained({base}, FOLDER).eval()
```

Features of images become logits by `head.safetensors` (`weight`, `bias`; of features of unit length where its
metadata say `cosine`) or the program `head.pt2`; probabilities are `softmax(logits / {facts["temperature"]:g})`.

Classes: {classes}.

Images: {seen}.

How far its answers are from the run's stands in `export.json`.
"""
