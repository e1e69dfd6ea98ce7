"""LoRA equals PEFT's."""

import oracle
import pytest
import torch
from peft import LoraConfig

from kshot.adapters import LoRA


@pytest.mark.parametrize("path", ["auto", "factorised", "materialised"])
@pytest.mark.parametrize("settings", [{"rank": 4}, {"rank": 4, "alpha": 9}, {"rank": 6, "rank_stabilised": True}])
def test_equals_peft(settings, path):
    adapter = LoRA(**settings, path=path)
    mine = oracle.ours(adapter, double=True)
    config = LoraConfig(
        r=adapter.rank,
        lora_alpha=settings.get("alpha", adapter.rank),
        use_rslora=adapter.rank_stabilised,
        target_modules=list(oracle.SHAPES),
    )
    model = oracle.theirs(config)
    oracle.randomise(p for p in mine.parameters() if p.requires_grad)
    pairs = []
    for name in oracle.SHAPES:
        ours, theirs = oracle.layer(mine, name), model.base_model.model.get_submodule(name)
        pairs += [(ours.A, theirs.lora_A["default"].weight), (ours.B, theirs.lora_B["default"].weight)]
    with torch.no_grad():
        for a, b in pairs:
            b.copy_(a)
    oracle.agree(mine, model)
    for a, b in pairs:
        assert oracle.relative(a.grad, b.grad) <= 1e-7
    oracle.merged_agree(mine, model)
