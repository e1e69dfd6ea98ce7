"""HydraLoRA equals its definition, token by token and head by head, and with one head LoRA."""

import oracle
import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig
from reference_tower import trained_numbers

from kshot.adapters import HydraLoRA, LoRA
from kshot.errors import UserError
from kshot.slots import merge

SETTINGS = [{"rank": 4, "heads": 3}, {"rank": 2, "heads": 5, "alpha": 7.0}, {"rank": 3, "heads": 2, "alpha": 1.0}]


def trained(module):
    return [p for p in module.parameters() if p.requires_grad]


def loop(backbone, name, scale):
    """y = W x + b + s Σ_j ω_j(x) B_j A x, one token and one head at a time."""
    projection, layer = backbone.get_submodule(name), oracle.layer(backbone, name)

    def run(x):
        outputs = []
        for token in x.flatten(0, -2):
            y = projection.weight @ token + projection.bias
            weights = torch.exp(layer.G @ token)
            for weight, head in zip(weights / weights.sum(), layer.B, strict=True):
                y = y + scale * weight * (head @ (layer.A @ token))
            outputs.append(y)
        return torch.stack(outputs).view(*x.shape[:-1], -1)

    return run


@pytest.mark.parametrize("settings", SETTINGS)
def test_equals_the_loop(settings):
    adapter = HydraLoRA(**settings)
    mine = oracle.ours(adapter, double=True)
    oracle.randomise(trained(mine))
    scale = settings.get("alpha", settings["rank"]) / settings["rank"]
    assert adapter.scale == scale
    runs = [mine.run, lambda x: oracle.block(x, {n: loop(mine, n, scale) for n in oracle.SHAPES})]
    found = []
    for run in runs:
        mine.zero_grad()
        found.append([*oracle.step(run, dtype=torch.float64), *(p.grad.clone() for p in trained(mine))])
    assert len(found[0]) == 2 + 4 * 3
    for a, b in zip(*found, strict=True):
        assert b.abs().max() > 0
        assert oracle.relative(a, b) <= 1e-12


@pytest.mark.parametrize("tokens", [(7,), (2, 7), (2, 3, 7)])
def test_any_number_of_leading_dimensions(tokens):
    mine = oracle.ours(HydraLoRA(rank=2), ["image.0.k"], double=True)
    oracle.randomise(trained(mine))
    x = torch.randn(*tokens, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    flat = mine.qkv(x.reshape(-1, 24))
    assert mine.qkv(x).shape == (*tokens, 72)
    assert oracle.relative(mine.qkv(x).reshape(-1, 72), flat) <= 1e-12
    frozen = F.linear(x, mine.qkv.weight, mine.qkv.bias)
    changed = (mine.qkv(x) - frozen).flatten(0, -2).abs().amax(0)
    assert changed[:24].max() == changed[48:].max() == 0
    assert changed[24:48].min() > 0


def test_dropout_is_one_mask_on_the_input_of_a_alone():
    adapter = HydraLoRA(rank=4, heads=3, alpha=8.0, dropout=0.5)
    mine = oracle.ours(adapter, ["image.0.fc1"], double=True)
    oracle.randomise(trained(mine))
    layer = oracle.layer(mine, "fc1")
    x = torch.randn(30, 24, dtype=torch.float64)
    torch.manual_seed(8)
    given = mine.fc1(x)
    torch.manual_seed(8)
    kept = F.dropout(x, 0.5)
    omega = F.softmax(x @ layer.G.T, 1)
    expected = F.linear(x, mine.fc1.weight, mine.fc1.bias)
    expected = expected + 2 * torch.einsum("tn,nor,tr->to", omega, layer.B, kept @ layer.A.T)
    assert oracle.relative(given, expected) <= 1e-12
    mine.eval()
    assert torch.equal(mine.fc1(x), mine.fc1(x))


def test_one_head_is_lora():
    mine, lora = (
        oracle.ours(a(rank=4, alpha=9.0, **more), double=True) for a, more in ((HydraLoRA, {"heads": 1}), (LoRA, {}))
    )
    model = oracle.theirs(LoraConfig(r=4, lora_alpha=9, target_modules=list(oracle.SHAPES)))
    ours, others = [], {"LoRA": [], "PEFT": []}
    for name in oracle.SHAPES:
        hydra, single = oracle.layer(mine, name), oracle.layer(lora, name)
        assert torch.equal(hydra.A, single.A)
        assert torch.equal(hydra.B[0], single.B)
        oracle.randomise([hydra.A, hydra.B])
        theirs = model.base_model.model.get_submodule(name)
        ours += [hydra.A, hydra.B]
        others["LoRA"] += [single.A, single.B]
        others["PEFT"] += [theirs.lora_A["default"].weight, theirs.lora_B["default"].weight]
    outputs = oracle.step(mine.run, dtype=torch.float64)
    for parameters, run in zip(others.values(), (lora.run, model), strict=True):
        with torch.no_grad():
            for source, target in zip(ours, parameters, strict=True):
                target.copy_(source.view_as(target))
        for a, b in zip(outputs, oracle.step(run, dtype=torch.float64), strict=True):
            assert oracle.relative(a, b) <= 1e-7
        for source, target in zip(ours, parameters, strict=True):
            assert oracle.relative(source.grad.view_as(target), target.grad) <= 1e-7
    for name in oracle.SHAPES:
        assert oracle.layer(mine, name).G.grad.abs().max() <= 1e-6


def test_initial_distribution():
    mine = oracle.ours(HydraLoRA(rank=16, heads=12))
    for name, (out, into) in oracle.SHAPES.items():
        layer, bound = oracle.layer(mine, name), into**-0.5
        assert layer.B.shape == (12, out, 16)
        assert layer.B.abs().max() == 0
        for drawn, rows in ((layer.A, 16), (layer.G, 12)):
            assert drawn.shape == (rows, into)
            assert 0.95 * bound < drawn.abs().max() <= bound
            assert float(drawn.detach().std()) == pytest.approx(bound / 3**0.5, rel=0.1)
        assert not torch.equal(layer.A[:12], layer.G)


def test_is_never_merged():
    mine = oracle.ours(HydraLoRA(rank=4))
    oracle.randomise(trained(mine))
    frozen = {name: mine.get_submodule(name).weight.clone() for name in oracle.SHAPES}
    for refuse in (lambda: merge(mine), lambda: oracle.layer(mine, "fc2").effective_weight()):
        with pytest.raises(UserError, match=r"HydraLoRA on image\.0\.\w+ depends on its input") as error:
            refuse()
        assert "\n" not in str(error.value)
    assert all(torch.equal(mine.get_submodule(name).weight, w) for name, w in frozen.items())
    x = torch.randn(2, 5, 24)
    with torch.no_grad():
        assert oracle.relative(mine.eval().run(x), mine.train().run(x)) <= 1e-6
        assert oracle.relative(mine.run(x), oracle.block(x, {n: loop(mine, n, 1.0) for n in oracle.SHAPES})) <= 1e-5


def test_the_router_is_exact_under_autocast_and_is_not_decayed():
    """Its softmax runs in float32; a bfloat16 one would be 0.4 % off."""
    mine = oracle.ours(HydraLoRA(rank=1, heads=2), ["image.0.fc1"])
    layer, seen = oracle.layer(mine, "fc1"), []
    assert layer.undecayed == {"G"}
    softmax = torch.Tensor.softmax
    with pytest.MonkeyPatch.context() as patch, torch.autocast("cpu", dtype=torch.bfloat16):
        patch.setattr(torch.Tensor, "softmax", lambda *a, **k: seen.append(softmax(*a, **k)) or seen[-1])
        assert mine.fc1(torch.randn(6, 24)).dtype == torch.bfloat16
    assert [s.dtype for s in seen] == [torch.float32]
    assert float((seen[0].sum(1) - 1).detach().abs().max()) <= 1e-6


@pytest.mark.parametrize(("rank", "heads", "count"), [(4, 4, 1_843_200), (8, 3, 2_700_288)])
def test_number_of_parameters(rank, heads, count):
    assert trained_numbers(HydraLoRA(rank=rank, heads=heads)) == count


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank": 25}, r"HydraLoRA: rank 25 .* 24.* image\.0\.fc1"),
        ({"path": "materialised"}, r"HydraLoRA: path is materialised, and must be one of auto, factorised"),
    ],
)
def test_what_a_slot_cannot_have(settings, message):
    with pytest.raises(UserError, match=message):
        oracle.ours(HydraLoRA(**settings), ["image.0.fc1"])
