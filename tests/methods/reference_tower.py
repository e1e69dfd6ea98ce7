"""The tower that numbers of parameters are counted on: twelve blocks of CLIP ViT-B/32, its fused qkv one matrix."""

import torch

from kshot.adapters import SlotAdapter
from kshot.slots import Projection

BLOCK = {"qkv": (2304, 768), "o": (768, 768), "fc1": (3072, 768), "fc2": (768, 3072)}  # (out, in)


def trained_numbers(adapter: SlotAdapter) -> int:
    """How many numbers a method trains on all 48 matrices; their weights are on the meta device."""
    slots = {}
    for block in range(12):
        for part, (out, into) in BLOCK.items():
            rows = dict.fromkeys("qkv", out // 3) if part == "qkv" else {part: out}
            weight, bias = torch.empty(out, into, device="meta"), torch.empty(out, device="meta")
            slot = Projection(weight, bias, rows, f"image.{block}").slot(part)
            slots[slot.name] = slot
    shared = adapter.prepare(slots)
    modules = [adapter.wrap(slot, shared) for slot in slots.values()] + ([] if shared is None else [shared])
    trained = {id(p): p for module in modules for p in module.parameters() if p.requires_grad}
    return sum(p.numel() for p in trained.values())
