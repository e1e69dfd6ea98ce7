"""Contract of adapters: every method on every block layout, in both towers.

A new method is tested as soon as it is imported; it needs an entry in CASES where its defaults do not fit a tiny model,
and for the closed form of its number of parameters.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import towers
from towers import LAYOUTS

from kshot.adapters import Adapter, FullTuning, LoRA, SlotAdapter, unadapted
from kshot.backbones import Backbone
from kshot.backbones.base import sha256_of
from kshot.errors import UserError
from kshot.layers import AdapterLayer
from kshot.slots import merge, unmerge


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
    "HydraLoRA": [{"rank": 0}, {"heads": 0}, {"alpha": 0.0}, {"alpha": float("nan")}, {"dropout": 1.0}],
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
each_first_case = pytest.mark.parametrize(  # on every layout, one case a method is enough
    "label", [next(label for label, (k, _) in SLOT_CASES.items() if k is kind) for kind in concrete(SlotAdapter)]
)
each_tower = pytest.mark.parametrize(("name", "tower"), towers.distinct_towers())
each_method = pytest.mark.parametrize("method", METHODS)


def adapted(label: str, name: str = "clip", targets: tuple[str, ...] = ("*",)) -> Backbone:
    backbone = towers.backbone(name)
    kind, case = SLOT_CASES[label]
    kind(**case.settings).inject(backbone, targets)
    return backbone


def layers_of(backbone: Backbone) -> dict[str, AdapterLayer]:
    """Adapter layers by slot."""
    return {
        key: slot.projection.layers()[slot.part]
        for key, slot in backbone.slots().items()
        if slot.part in slot.projection.layers()
    }


def trained(backbone: Backbone) -> dict[str, torch.nn.Parameter]:
    return {n: p for n, p in backbone.named_parameters() if p.requires_grad}


def perturb(backbone: Backbone, amount: float = 0.1) -> None:
    """Moves every trainable value, so that nothing hides behind an initial zero."""
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for parameter in trained(backbone).values():
            parameter.add_(amount * torch.randn(parameter.shape, generator=generator))


def loss_of(backbone: Backbone, tower: str) -> torch.Tensor:
    features = towers.encode(backbone, tower)
    target = torch.randn(features.shape, generator=torch.Generator().manual_seed(5))
    return (features.float() - target).square().mean()


def merged(backbone: Backbone, tower: str) -> torch.Tensor:
    with torch.no_grad():
        return towers.encode(backbone, tower)


@each_first_case
@each_tower
class TestEveryLayout:
    def test_step_0_changes_nothing(self, label, name, tower):
        before = merged(towers.backbone(name), tower)
        backbone, allowed = adapted(label, name), SLOT_CASES[label][1].start
        for training in (True, False):
            backbone.train(training)
            for given in (towers.encode(backbone, tower), merged(backbone, tower)):
                assert torch.equal(given, before) if allowed == 0 else towers.relative(given, before) <= allowed

    def test_every_tensor_gets_a_gradient_within_two_steps(self, label, name, tower):
        backbone = adapted(label, name, (f"{tower}.*",)).train()
        optimizer = torch.optim.SGD(trained(backbone).values(), lr=0.1)
        reached = set()
        for _ in range(2):
            optimizer.zero_grad()
            loss_of(backbone, tower).backward()
            for key, layer in layers_of(backbone).items():
                for n, p in layer.named_parameters():
                    if p.requires_grad and p.grad is not None and p.grad.abs().max() > 0:
                        assert torch.isfinite(p.grad).all()
                        reached.add(f"{key}: {n}")
            optimizer.step()
        wanted = {
            f"{key}: {n}" for key, v in layers_of(backbone).items() for n, p in v.named_parameters() if p.requires_grad
        }
        assert set(layers_of(backbone)) == {s for s in backbone.slots() if s.startswith(tower)}
        assert wanted - reached == set()

    def test_merged_equals_unmerged_and_leaves_the_weights(self, label, name, tower, monkeypatch):
        backbone = adapted(label, name)
        stored = {key: slot.weight.clone() for key, slot in backbone.slots().items()}
        before = merged(backbone, tower)
        perturb(backbone)
        backbone.eval()
        unmerged = towers.encode(backbone, tower)
        assert unmerged.requires_grad
        assert towers.relative(unmerged, before) > 1e-3
        mergeable = [layer for layer in layers_of(backbone).values() if layer.mergeable]
        with monkeypatch.context() as patch:
            for layer in mergeable:
                patch.setattr(layer, "forward", lambda *_: pytest.fail("not merged"))
            assert towers.relative(merged(backbone, tower), unmerged) <= 1e-5
        assert all(torch.equal(slot.weight, stored[key]) for key, slot in backbone.slots().items())
        backbone.train()
        assert towers.relative(towers.encode(backbone, tower), unmerged) <= 1e-5
        with torch.no_grad():
            assert towers.relative(towers.encode(backbone, tower), unmerged) <= 1e-5

    def test_three_steps_leave_frozen_weights_bit_identical(self, label, name, tower):
        backbone = adapted(label, name).train()
        frozen = dict(backbone.named_tower_parameters())
        before, loss = {n: p.clone() for n, p in frozen.items()}, []
        digest = sha256_of(without_adapters(backbone))
        optimizer = torch.optim.AdamW(trained(backbone).values(), lr=0.01, weight_decay=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            value = loss_of(backbone, tower)
            value.backward()
            optimizer.step()
            loss.append(value.item())
        assert loss[-1] < loss[0]
        assert all(p.grad is None and not p.requires_grad for p in frozen.values())
        assert [n for n, p in frozen.items() if not torch.equal(p, before[n])] == []
        assert sha256_of(without_adapters(backbone)) == digest

    def test_bfloat16_autocast(self, label, name, tower):
        backbone = adapted(label, name)
        perturb(backbone, 0.03)
        exact, plain = merged(backbone.eval(), tower), merged(towers.backbone(name), tower)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            theirs = towers.relative(merged(towers.backbone(name), tower), plain)
            assert towers.relative(merged(backbone, tower), exact) <= max(0.05, 3 * theirs)
            backbone.train()
            assert towers.relative(towers.encode(backbone, tower), exact) <= max(0.05, 3 * theirs)
            loss_of(backbone, tower).backward()
        grads = [p.grad for layer in layers_of(backbone).values() for p in layer.parameters() if p.requires_grad]
        reached = [g for g in grads if g is not None]
        assert reached
        assert all(g.dtype == torch.float32 and torch.isfinite(g).all() for g in reached)
        assert all(p.dtype == torch.float32 for p in backbone.parameters())

    def test_explicit_merging_folds_in_and_comes_out_exactly(self, label, name, tower):
        backbone = adapted(label, name)
        perturb(backbone)
        backbone.eval()
        if not all(layer.mergeable for layer in layers_of(backbone).values()):
            with pytest.raises(UserError, match="depends on its input") as error:
                merge(backbone)
            assert "\n" not in str(error.value)
            return
        unmerged, before = towers.encode(backbone, tower), merged(backbone, tower)
        untouched = merged(towers.backbone(name), tower)
        state = {n: v.clone() for n, v in backbone.state_dict().items()}
        merge(backbone)
        assert towers.relative(towers.encode(backbone, tower), unmerged) <= 1e-5
        with pytest.raises(UserError, match="merged already"):
            merge(backbone)
        with unadapted(backbone):
            assert torch.equal(merged(backbone, tower), untouched)
        assert towers.relative(merged(backbone, tower), unmerged) <= 1e-5
        unmerge(backbone)
        assert state.keys() == backbone.state_dict().keys()
        assert all(torch.equal(v, state[n]) for n, v in backbone.state_dict().items())
        assert torch.equal(merged(backbone, tower), before)
        merge(backbone, keep=False)
        assert towers.relative(towers.encode(backbone, tower), unmerged) <= 1e-5
        assert set(dict(backbone.named_tower_parameters())) == set(dict(towers.backbone(name).named_tower_parameters()))
        assert trained(backbone) == {}

    def test_unadapted_is_exact_and_restores(self, label, name, tower):
        before = merged(towers.backbone(name), tower)
        backbone = adapted(label, name)
        perturb(backbone)
        after, values = merged(backbone, tower), {n: p.clone() for n, p in trained(backbone).items()}
        with unadapted(backbone):
            assert torch.equal(merged(backbone, tower), before)
            assert torch.equal(towers.encode(backbone, tower), before)
        assert torch.equal(merged(backbone, tower), after)
        assert not torch.equal(after, before)
        assert all(torch.equal(p, values[n]) for n, p in trained(backbone).items())


def without_adapters(backbone: Backbone) -> torch.nn.Module:
    """What is frozen of a backbone, as a module to hash."""
    module = torch.nn.Module()
    for i, (_, parameter) in enumerate(backbone.named_tower_parameters()):
        module.register_buffer(str(i), parameter.detach())
    return module


@each_case
class TestEveryMethod:
    @pytest.mark.parametrize("part", towers.ALL_PARTS)
    @pytest.mark.parametrize("tower", ["image", "text"])
    def test_only_matched_slots_train(self, label, tower, part):
        target = f"{tower}.1.{part}"
        backbone = adapted(label, "clip", (target,))
        other = {"image": "text", "text": "image"}[tower]
        assert list(layers_of(backbone)) == [target]
        own = {id(p) for p in layers_of(backbone)[target].parameters() if p.requires_grad}
        assert own
        assert {id(p) for p in trained(backbone).values()} == own == {id(p) for p in backbone.trainable(tower)}
        assert backbone.trainable(other) == []
        untouched = merged(towers.backbone("clip"), other)
        perturb(backbone)
        assert torch.equal(merged(backbone, other), untouched)
        assert not torch.equal(merged(backbone, tower), merged(towers.backbone("clip"), tower))

    @pytest.mark.parametrize("name", ["clip", "clip_custom", "vit", "vit_dinov2"])
    def test_fused_projections_are_one_matrix(self, label, name):
        kind, case = SLOT_CASES[label]
        before = merged(towers.backbone(name), "image")
        backbone = adapted(label, name, ("image.*.qkv", "image.*.fc2"))
        fused = {n: s for n, s in backbone.fused_slots().items() if n.startswith("image")}
        assert list(fused) == ["image.0.qkv", "image.1.qkv"]
        with torch.no_grad():
            assert towers.relative(towers.encode(backbone.train(), "image"), before) <= case.start
        for slot in fused.values():
            layer = slot.projection.layers()["qkv"]
            own = sum(p.numel() for p in layer.parameters() if p.requires_grad)
            assert own == case.count(kind(**case.settings), slot.in_features, slot.out_features)
            assert slot.out_features == 3 * slot.in_features
        perturb(backbone)
        unmerged = towers.encode(backbone.eval(), "image")
        assert towers.relative(unmerged, before) > 1e-3
        assert towers.relative(merged(backbone, "image"), unmerged) <= 1e-5
        loss_of(backbone, "image").backward()
        assert all(p.grad is not None for p in backbone.trainable("image"))

    def test_rows_take_one_adapter(self, label):
        backbone = towers.backbone()
        kind, case = SLOT_CASES[label]
        for targets in (["image.0.qkv", "image.0.q"], ["image.*.v", "image.1.qkv"]):
            with pytest.raises(UserError, match="the same rows") as error:
                kind(**case.settings).inject(backbone, targets)
            assert "\n" not in str(error.value)
            assert trained(backbone) == {}
        kind(**case.settings).inject(backbone, ["image.0.q", "image.1.qkv"])
        for target in ("image.0.q", "image.0.qkv", "image.1.k", "image.1.qkv"):
            with pytest.raises(UserError, match="the same rows"):
                LoRA(rank=1).inject(backbone, [target])
        LoRA(rank=1).inject(backbone, ["image.0.[kv]"])
        assert towers.relative(merged(backbone.eval(), "image"), towers.encode(backbone, "image")) <= 1e-5

    @pytest.mark.parametrize("dropout", [0.0, 0.3])
    def test_every_path_gives_the_same(self, label, dropout):
        """Outputs, input gradients and parameter gradients of each path, with equal random draws for dropout."""
        kind, case = SLOT_CASES[label]
        results = {}
        for path in ("auto", *next(iter(layers_of(adapted(label)).values())).paths):
            torch.manual_seed(3)
            backbone = towers.backbone()
            kind(**case.settings | {"path": path, "dropout": dropout}).inject(
                backbone, ["image.*.qkv", "image.*.[of]*"]
            )
            perturb(backbone)
            backbone.train()
            torch.manual_seed(4)
            loss_of(backbone, "image").backward()
            torch.manual_seed(4)
            grads = {n: p.grad for n, p in trained(backbone).items()}
            results[path] = towers.encode(backbone, "image").detach(), grads
        output, grads = results.pop("auto")
        for path, (y, found) in results.items():
            assert towers.relative(y, output) <= 1e-5, path
            for n, g in grads.items():
                assert float((found[n] - g).abs().max()) <= 2e-5 * float(max(v.abs().max() for v in grads.values())), n

    def test_an_unknown_path(self, label):
        kind, case = SLOT_CASES[label]
        layers = layers_of(adapted(label))
        missing = {"factorised", "materialised", "svd"} - set(next(iter(layers.values())).paths)
        for path in missing:
            with pytest.raises(UserError, match=rf"path is {path}, and must be one of auto, ") as error:
                kind(**case.settings | {"path": path}).inject(towers.backbone(), ["*"])
            assert "\n" not in str(error.value)

    def test_micro_batches_add_up(self, label):
        """Gradients of two halves, one after the other and with both graphs alive, are those of the whole."""
        backbone = adapted(label, targets=("image.*",)).train()
        perturb(backbone)
        image = towers.images(backbone, 4)
        target = torch.randn(4, backbone.feature_dim, generator=torch.Generator().manual_seed(5))

        def loss(part):
            return (backbone.encode_image(image[part]) - target[part]).square().sum()

        def grads():
            found = {n: p.grad.clone() for n, p in trained(backbone).items() if p.grad is not None}
            backbone.zero_grad()
            return found

        loss(slice(0, 4)).backward()
        whole = grads()
        loss(slice(0, 2)).backward()
        loss(slice(2, 4)).backward()
        in_turn = grads()
        first, second = loss(slice(0, 2)), loss(slice(2, 4))
        first.backward()
        second.backward()
        together = grads()
        assert whole
        largest = max(float(g.abs().max()) for g in whole.values())
        for found in (in_turn, together):
            assert found.keys() == whole.keys()
            assert all(float((found[n] - g).abs().max()) <= 2e-5 * largest for n, g in whole.items())

    def test_compiles_whole_and_exports(self, label):
        """Training through torch.compile without a graph break; torch.export of the adapted and the merged model."""
        backbone = adapted(label, "vit", ("image.0.qkv", "image.1.*"))
        perturb(backbone)
        image = towers.images(backbone)

        class Encoder(torch.nn.Module):
            def __init__(self):
                super().__init__()
                self.backbone = backbone

            def forward(self, x):
                return self.backbone.encode_image(x)

        encoder = Encoder()
        backbone.train()
        expected = encoder(image)
        expected.square().sum().backward()
        wanted = {n: p.grad.clone() for n, p in trained(backbone).items()}
        backbone.zero_grad()
        torch.compiler.reset()
        given = torch.compile(encoder, backend="aot_eager", fullgraph=True)(image)
        given.square().sum().backward()
        assert towers.relative(given, expected) <= 1e-5
        largest = max(float(g.abs().max()) for g in wanted.values())
        assert all(float((p.grad - wanted[n]).abs().max()) <= 2e-5 * largest for n, p in trained(backbone).items())
        backbone.eval()
        with torch.no_grad():
            exported = torch.export.export(encoder, (image,)).module()
            assert towers.relative(exported(image), expected) <= 1e-5
            if all(layer.mergeable for layer in layers_of(backbone).values()):
                merge(backbone)
                exported = torch.export.export(encoder, (image,)).module()
                assert towers.relative(exported(image), expected) <= 1e-5

    def test_several_patterns_and_overlaps_attach_once(self, label):
        backbone = adapted(label, "clip", ("image.*.q", "image.0.*", "text.1.fc?"))
        expected = {"image.1.q", "text.1.fc1", "text.1.fc2", *(f"image.0.{p}" for p in towers.ALL_PARTS)}
        assert set(layers_of(backbone)) == expected

    @pytest.mark.parametrize("name", ["clip", "vit_dinov3"])
    def test_number_of_parameters(self, label, name):
        kind, case = SLOT_CASES[label]
        assert case.count is not None, "give the closed form in CASES"
        settings, backbone = kind(**case.settings), adapted(label, name)
        for key, layer in layers_of(backbone).items():
            slot = backbone.slots()[key]
            expected = case.count(settings, slot.in_features, slot.out_features)
            assert sum(p.numel() for p in layer.parameters() if p.requires_grad) == expected, key

    def test_adapters_switch_modes_and_towers_do_not(self, label):
        backbone = adapted(label)
        for mode in (True, False, True):
            backbone.train(mode)
            inside = {n for layer in layers_of(backbone).values() for n in map(id, layer.modules())}
            assert all(layer.training == mode for layer in layers_of(backbone).values())
            assert not any(m.training for m in backbone.modules() if id(m) not in inside)

    def test_the_merged_weight_follows_every_change(self, label):
        backbone, state = adapted(label).eval(), None
        first = merged(backbone, "image")
        for change in ("in place", "optimizer", "load", "load, assigned"):
            if change == "in place":
                perturb(backbone)
                state = {n: p.detach().clone() for n, p in backbone.state_dict().items()}
                after = towers.encode(backbone, "image").detach()
            elif change == "optimizer":
                loss_of(backbone, "image").backward()
                torch.optim.AdamW([p for p in trained(backbone).values() if p.grad is not None], lr=0.05).step()
            else:
                backbone.load_state_dict(state, assign=change.endswith("assigned"))
            given = merged(backbone, "image")
            assert towers.relative(given, towers.encode(backbone, "image")) <= 1e-5, change
            assert towers.relative(given, first) > 1e-3, change
            assert (towers.relative(given, after) <= 1e-5) == (change != "optimizer"), change

    def test_a_fused_optimizer_is_noticed_too(self, label):
        backbone = adapted(label).eval()
        perturb(backbone)
        for _ in range(2):
            before = merged(backbone, "image")
            loss_of(backbone, "image").backward()
            parameters = [p for p in trained(backbone).values() if p.grad is not None]
            torch.optim.AdamW(parameters, lr=0.05, fused=True).step()
            assert towers.relative(towers.encode(backbone.train(), "image"), before) > 1e-3
            backbone.eval()
            assert towers.relative(merged(backbone, "image"), towers.encode(backbone, "image")) <= 1e-5

    def test_initial_values_depend_on_seed_and_slot_alone(self, label):
        def start(seed, targets, drawn=0):
            torch.manual_seed(seed)
            torch.rand(drawn)
            state = torch.get_rng_state()
            backbone = adapted(label, "clip", targets)
            assert torch.equal(torch.get_rng_state(), state), "the global random state was used"
            found = layers_of(backbone)
            return {key: {n: p.detach().clone() for n, p in found[key].named_parameters()} for key in found}

        everything, few = start(3, ("*",)), start(3, ("text.1.o", "image.0.fc1"), drawn=100)
        assert set(few) == {"text.1.o", "image.0.fc1"}
        for key, tensors in few.items():
            assert all(torch.equal(t, everything[key][n]) for n, t in tensors.items()), key
        if SLOT_CASES[label][1].random:
            other = start(4, ("*",))
            moving = [n for n, t in everything["image.0.q"].items() if not torch.equal(t, other["image.0.q"][n])]
            assert moving
            for n in moving:
                assert not torch.equal(everything["image.0.q"][n], everything["image.0.k"][n])
                assert not torch.equal(everything["image.0.q"][n], everything["image.1.q"][n])
                assert not torch.equal(everything["image.0.q"][n], everything["text.0.q"][n])

    def test_saved_rebuilt_loaded(self, label):
        backbone = adapted(label)
        perturb(backbone)
        small = {n: v for n, v in backbone.state_dict().items() if n in trained(backbone)}
        torch.manual_seed(99)
        again = adapted(label)
        result = again.load_state_dict(small, strict=False)
        assert result.unexpected_keys == []
        for tower in ("image", "text"):
            assert torch.equal(merged(again, tower), merged(backbone, tower))

    @pytest.mark.parametrize("target", ["image.0.w", "text.*.fc3", "visual.*", "", "image.7.q"])
    def test_a_pattern_without_match(self, label, target):
        backbone = towers.backbone()
        kind, case = SLOT_CASES[label]
        with pytest.raises(UserError) as error:
            kind(**case.settings).inject(backbone, ["image.*", target])
        message = str(error.value)
        assert "\n" not in message
        assert repr(target) in message
        assert "image.0.q" in message
        assert layers_of(backbone) == {}, "half of it was attached"
        assert trained(backbone) == {}


@pytest.mark.parametrize(("kind", "settings"), [(c, s) for c in ADAPTERS for s in BAD.get(c.__name__, [])])
def test_bad_settings(kind, settings):
    with pytest.raises(UserError) as error:
        kind(**settings)
    message = str(error.value)
    assert "\n" not in message
    assert kind.__name__ in message
    assert next(iter(settings)) in message


@each_method
def test_settings_are_frozen(method):
    adapter = METHODS[method]()
    with pytest.raises(AttributeError):
        adapter.anything = 1


class TestLoRA:
    def test_rank_above_the_smaller_side(self):
        backbone = towers.backbone()
        with pytest.raises(UserError, match=r"rank 33 .* 32.* image\.0\.q"):
            LoRA(rank=33).inject(backbone, ["image.0.q"])
        LoRA(rank=32).inject(backbone, ["image.0.q"])

    @pytest.mark.parametrize(
        ("settings", "scale"),
        [
            ({"rank": 4}, 1.0),
            ({"rank": 4, "alpha": 8}, 2.0),
            ({"rank": 4, "alpha": 1}, 0.25),
            ({"rank": 4, "rank_stabilised": True}, 2.0),
            ({"rank": 16, "alpha": 1, "rank_stabilised": True}, 0.25),
        ],
    )
    def test_scale(self, settings, scale):
        assert LoRA(**settings).scale == pytest.approx(scale)

    @pytest.mark.parametrize(
        "settings", [{"rank": 3}, {"rank": 3, "alpha": 7}, {"rank": 4, "alpha": 3, "rank_stabilised": True}]
    )
    @pytest.mark.parametrize("part", towers.ALL_PARTS)
    def test_equals_the_dense_reference(self, settings, part):
        """Outputs, and gradients of parameters and input, of x (W + s B A)ᵀ + b in float64."""
        backbone = towers.backbone()
        adapter, key = LoRA(**settings), f"image.0.{part}"
        adapter.inject(backbone, [key])
        slot, layer = backbone.slots()[key], layers_of(backbone)[key]
        perturb(backbone, 0.5)
        backbone.double()
        x = torch.randn(2, 5, slot.in_features, dtype=torch.float64, requires_grad=True)
        projection = slot.projection
        upstream = torch.randn(2, 5, projection.out_features, dtype=torch.float64)
        weight = projection.weight.clone()
        rows = projection.rows(part)
        scale = settings.get("alpha", 3) / (
            settings["rank"] ** 0.5 if "rank_stabilised" in settings else settings["rank"]
        )
        delta = scale * layer.B @ layer.A
        dense = torch.cat([weight[: rows.start], weight[rows] + delta, weight[rows.stop :]])
        expected = F.linear(x, dense, projection.bias)
        wanted = torch.autograd.grad((expected * upstream).sum(), [x, layer.A, layer.B])
        for mode in (True, False):
            backbone.train(mode)
            given = projection(x)
            torch.testing.assert_close(given, expected, rtol=1e-12, atol=1e-12)
            found = torch.autograd.grad((given * upstream).sum(), [x, layer.A, layer.B])
            for a, b in zip(found, wanted, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)
        with torch.no_grad():
            torch.testing.assert_close(projection(x), expected, rtol=1e-12, atol=1e-12)
            torch.testing.assert_close(layer.effective_weight(), slot.weight + delta, rtol=1e-12, atol=1e-12)

    def test_initial_distribution(self):
        backbone = towers.backbone()
        LoRA(rank=32).inject(backbone, ["*"])
        for layer in layers_of(backbone).values():
            bound = layer.slot.in_features**-0.5
            assert layer.A.shape == (32, layer.slot.in_features)
            assert layer.B.shape == (layer.slot.out_features, 32)
            assert layer.B.abs().max() == 0
            assert 0.95 * bound < layer.A.abs().max() <= bound
            assert float(layer.A.std()) == pytest.approx(bound / 3**0.5, rel=0.1)

    def test_dropout_in_training_only(self):
        backbone = towers.backbone()
        LoRA(rank=2, dropout=0.5).inject(backbone, ["image.*"])
        perturb(backbone, 0.3)
        backbone.eval()
        calm = towers.encode(backbone, "image")
        assert torch.equal(towers.encode(backbone, "image"), calm)
        backbone.train()
        assert not torch.equal(towers.encode(backbone, "image"), towers.encode(backbone, "image"))
        assert not torch.equal(merged(backbone, "image"), merged(backbone, "image"))

    def test_dropout_is_on_the_low_rank_path_alone_and_keeps_the_mean(self):
        backbone = towers.backbone()
        LoRA(rank=2, dropout=0.5).inject(backbone, ["image.0.fc1"])
        slot, layer = backbone.slots()["image.0.fc1"], layers_of(backbone)["image.0.fc1"]
        x = torch.randn(1, 32)
        many = x.expand(20000, 32)
        assert torch.equal(slot.projection.train()(many)[0], F.linear(many, slot.weight, slot.bias)[0])
        perturb(backbone, 0.5)
        backbone.train()
        change = slot.projection(many) - F.linear(many, slot.weight, slot.bias)
        torch.testing.assert_close(change.mean(0), F.linear(x, layer.B @ layer.A)[0], rtol=0.1, atol=0.1)
        assert change.std(0).min() > 0


class TestFullTuning:
    @pytest.mark.parametrize(
        ("name", "target"), [("clip", "*"), ("clip", "image.*"), ("custom_text", "text.*"), ("vit", "*")]
    )
    def test_trains_what_is_named(self, name, target):
        backbone = towers.backbone(name)
        before = {n: p.clone() for n, p in backbone.named_tower_parameters()}
        FullTuning().inject(backbone, [target])
        backbone.train()
        chosen = {n for n, p in backbone.named_tower_parameters() if p.requires_grad}
        assert chosen == {n for n in before if target == "*" or n.startswith(target[:-1])}
        assert not any(n.startswith("initial_values") for n in backbone.state_dict())
        towers_trained = [t for t in LAYOUTS[name].towers if any(n.startswith(t) for n in chosen)]
        optimizer = torch.optim.SGD(trained(backbone).values(), lr=0.1)
        sum(loss_of(backbone, t) for t in towers_trained).backward()
        without = [n for n, p in backbone.named_tower_parameters() if p.requires_grad and not p.grad.abs().max() > 0]
        assert [n for n in without if "k_bias" not in n] == []
        optimizer.step()
        changed = {n for n, p in backbone.named_tower_parameters() if not torch.equal(p, before[n])}
        assert changed == chosen

    @pytest.mark.parametrize("name", [n for n in LAYOUTS if LAYOUTS[n].image_blocks])
    @pytest.mark.parametrize("only", ["bias", "norm"])
    def test_biases_or_norms_alone(self, only, name):
        backbone = towers.backbone(name)
        FullTuning(only=only).inject(backbone, ["image.*"])
        chosen = {n for n, p in backbone.named_tower_parameters() if p.requires_grad}
        assert chosen
        assert all(n.startswith("image.") for n in chosen)
        every = {n: p for n, p in backbone.named_tower_parameters() if n.startswith("image.")}
        if only == "bias":
            assert chosen == {n for n in every if n.endswith("bias")}
        else:
            assert all(every[n].ndim <= 1 for n in chosen), "norms have scales and shifts"
            assert all("norm" in n or "ln" in n or "mlp.ffn_ln" in n for n in chosen), chosen
            assert {n for n in every if "norm1.weight" in n or "ln_1.weight" in n} <= chosen
        backbone.train()
        loss_of(backbone, "image").backward()
        reached = {n for n, p in every.items() if p.grad is not None}
        assert reached == chosen

    def test_starts_where_the_original_is(self):
        before = merged(towers.backbone(), "image")
        backbone = towers.backbone()
        FullTuning().inject(backbone, ["*"])
        assert torch.equal(merged(backbone, "image"), before)
        assert towers.relative(towers.encode(backbone.train(), "image"), before) <= 1e-5

    @pytest.mark.parametrize("tower", ["image", "text"])
    def test_unadapted_is_exact_nests_and_survives_errors(self, tower):
        before = merged(towers.backbone(), tower)
        backbone = towers.backbone()
        FullTuning().inject(backbone, ["*"])
        loss_of(backbone, tower).backward()
        torch.optim.SGD(trained(backbone).values(), lr=0.1).step()
        values = {n: p.clone() for n, p in trained(backbone).items()}
        after = merged(backbone, tower)
        assert towers.relative(after, before) > 1e-3
        with unadapted(backbone):
            assert torch.equal(merged(backbone, tower), before)
            with unadapted(backbone):
                assert torch.equal(merged(backbone, tower), before)
            assert torch.equal(merged(backbone, tower), before)
        with pytest.raises(RuntimeError, match="stop"), unadapted(backbone):
            raise RuntimeError("stop")
        assert torch.equal(merged(backbone, tower), after)
        assert all(torch.equal(p, values[n]) and p.requires_grad for n, p in trained(backbone).items())

    def test_works_together_with_lora(self):
        before = merged(towers.backbone(), "image")
        backbone = towers.backbone()
        LoRA(rank=2).inject(backbone, ["image.*"])
        FullTuning().inject(backbone, ["image.*ln_*"])
        perturb(backbone)
        after = merged(backbone, "image")
        assert towers.relative(after, towers.encode(backbone, "image")) <= 1e-5
        with unadapted(backbone):
            assert torch.equal(merged(backbone, "image"), before)
        assert torch.equal(merged(backbone, "image"), after)

    def test_a_pattern_without_match(self):
        with pytest.raises(UserError, match=r"'image\.0\.q' matches none") as error:
            FullTuning().inject(towers.backbone(), ["image.0.q"])
        assert "\n" not in str(error.value)
        assert "image.class_embedding" in str(error.value)


@each_case
def test_unadapted_survives_errors(label):
    backbone = adapted(label)
    perturb(backbone)
    after = merged(backbone, "text")
    with pytest.raises(RuntimeError, match="stop"), unadapted(backbone):
        raise RuntimeError("stop")
    assert torch.equal(merged(backbone, "text"), after)
