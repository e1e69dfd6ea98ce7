"""Contract of adapters: targets, paths, gradients, compilation, initial values and errors of every method."""

from itertools import zip_longest

import oracle
import pytest
import torch
import torch.nn.functional as F
import towers
from cases import (
    ADAPTERS,
    BAD,
    FIRST_CASES,
    METHODS,
    SLOT_CASES,
    adapted,
    each_case,
    each_method,
    layers_of,
    loss_of,
    merged,
    perturb,
    plain,
    trained,
)

from kshot.adapters import LoRA
from kshot.errors import UserError
from kshot.slots import merge

PARTS = [("lora", "image", part) for part in towers.ALL_PARTS] + [("lora", "text", "q")]
PARTS += [(label, "image", "fc1") for label in SLOT_CASES if label != "lora"]
PARTS += [(label, "text", "fc2") for label in SLOT_CASES]


@pytest.mark.parametrize(("label", "tower", "part"), PARTS)
def test_only_matched_slots_train(label, tower, part):
    """Patterns are matched by what all methods share: LoRA is tried on every part, each other on a part of a tower."""
    target = f"{tower}.1.{part}"
    backbone = adapted(label, "clip", (target,))
    other = {"image": "text", "text": "image"}[tower]
    assert list(layers_of(backbone)) == [target]
    own = {id(p) for p in layers_of(backbone)[target].parameters() if p.requires_grad}
    assert own
    assert {id(p) for p in trained(backbone).values()} == own == {id(p) for p in backbone.trainable(tower)}
    assert backbone.trainable(other) == []
    untouched = towers.untouched("clip", other)
    perturb(backbone)
    assert torch.equal(merged(backbone, other), untouched)
    assert not torch.equal(merged(backbone, tower), towers.untouched("clip", tower))


@each_case
class TestEveryMethod:
    def test_rows_take_one_adapter(self, label):
        backbone = towers.backbone()
        kind, case = SLOT_CASES[label]
        for targets in (["image.0.qkv", "image.0.q"], ["image.*.v", "image.1.qkv"]):
            with pytest.raises(UserError, match="the same rows") as error:
                kind(**case.settings).attach(backbone, targets)
            assert "\n" not in str(error.value)
            assert trained(backbone) == {}
        kind(**case.settings).attach(backbone, ["image.0.q", "image.1.qkv"])
        for target in ("image.0.q", "image.0.qkv", "image.1.k", "image.1.qkv"):
            with pytest.raises(UserError, match="the same rows"):
                LoRA(rank=1).attach(backbone, [target])
        LoRA(rank=1).attach(backbone, ["image.0.[kv]"])
        assert towers.relative(merged(backbone.eval(), "image"), towers.encode(backbone, "image")) <= 1e-5

    @pytest.mark.parametrize("dropout", [0.0, 0.3])
    def test_every_path_gives_the_same(self, label, dropout):
        """Outputs, input gradients and parameter gradients of each path, with equal random draws for dropout."""
        kind, case = SLOT_CASES[label]
        results = {}
        for path in ("auto", *paths_of(label)):
            torch.manual_seed(3)
            backbone = towers.backbone()
            targets = ["image.0.qkv", "image.1.[of]*"]
            kind(**case.settings | {"path": path, "dropout": dropout}).attach(backbone, targets)
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
        for path in {"factorised", "materialised", "svd"} - set(paths_of(label)):
            with pytest.raises(UserError, match=rf"path is {path}, and must be one of auto, ") as error:
                kind(**case.settings | {"path": path}).attach(towers.backbone(), ["*"])
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

    def test_several_patterns_and_overlaps_attach_once(self, label):
        backbone = adapted(label, "clip", ("image.*.q", "image.0.*", "text.1.fc?"))
        expected = {"image.1.q", "text.1.fc1", "text.1.fc2", *(f"image.0.{p}" for p in towers.ALL_PARTS)}
        assert set(layers_of(backbone)) == expected

    @pytest.mark.parametrize("name", ["clip", "vit_dinov3"])
    def test_number_of_parameters(self, label, name):
        kind, case = SLOT_CASES[label]
        assert case.count is not None, "give the closed form in CASES"
        settings, backbone = kind(**case.settings), adapted(label, name)
        slots = backbone.slots()
        for key, layer in layers_of(backbone).items():
            slot = slots[key]
            expected = case.count(settings, slot.in_features, slot.out_features)
            assert sum(p.numel() for p in layer.parameters() if p.requires_grad) == expected, key

    def test_adapters_switch_modes_and_towers_do_not(self, label):
        backbone = adapted(label)
        for mode in (True, False, True):
            backbone.train(mode)
            inside = {n for layer in layers_of(backbone).values() for n in map(id, layer.modules())}
            assert all(layer.training == mode for layer in layers_of(backbone).values())
            assert not any(m.training for m in backbone.modules() if id(m) not in inside)

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
        learnt = trained(backbone).keys()
        small = {n: v for n, v in backbone.state_dict().items() if n in learnt}
        torch.manual_seed(99)
        again = adapted(label)
        result = again.load_state_dict(small, strict=False)
        assert result.unexpected_keys == []
        for tower in ("image", "text"):
            assert torch.equal(merged(again, tower), merged(backbone, tower))

    def test_a_pattern_without_match(self, label):
        backbone = towers.backbone()
        kind, case = SLOT_CASES[label]
        for target in ("image.0.w", "text.*.fc3", "visual.*", "", "image.7.q"):
            with pytest.raises(UserError) as error:
                kind(**case.settings).attach(backbone, ["image.*", target])
            message = str(error.value)
            assert "\n" not in message
            assert repr(target) in message
            assert "image.0.q" in message
            assert layers_of(backbone) == {}, "half of it was attached"
            assert trained(backbone) == {}


def paths_of(label):
    """The ways to run a method's layer."""
    (layer,) = layers_of(adapted(label, targets=("image.0.o",))).values()
    return layer.paths


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


class Block(torch.nn.Module):
    """The adapted block of the oracle, for export."""

    def __init__(self, block):
        super().__init__()
        self.block = block

    def forward(self, x):
        return self.block.run(x)


# Those whose change of a weight depends on which of its sides is the longer: tried on a wide and on a narrow weight.
LONG = ("svft", "svft_svd", "pranc", "pranc_dense", "randlora", "randlora_factorised", "nola", "nola_layer")
PAIRS = list(zip_longest(LONG, [label for label in FIRST_CASES if label not in LONG]))


@pytest.mark.parametrize("labels", PAIRS, ids=str)
def test_compiles_whole_and_exports(labels):
    """Training through torch.compile without a graph break, torch.export of the adapted and of the merged model.

    Two methods share a block, and so what a compilation costs whatever is compiled.
    """
    mine, x = oracle.Ours(oracle.Plain()), torch.randn(2, 9, 24)
    for label, targets in zip(labels, (["image.0.qkv", "image.0.fc2"], ["image.0.o", "image.0.fc1"]), strict=True):
        if label is not None:
            kind, case = SLOT_CASES[label]
            kind(**case.settings).attach(mine, targets)
    perturb(mine.train())
    expected = mine.run(x)
    expected.square().sum().backward()
    wanted = {n: p.grad.clone() for n, p in trained(mine).items()}
    compiled = torch.compile(Block(mine), backend="aot_eager", fullgraph=True)
    largest = max(float(g.abs().max()) for g in wanted.values())
    mine.zero_grad()
    given = compiled(x)
    given.square().sum().backward()
    assert towers.relative(given, expected) <= 1e-5
    assert all(float((p.grad - wanted[n]).abs().max()) <= 2e-5 * largest for n, p in trained(mine).items())
    perturb(mine, 0.2)
    assert towers.relative(compiled(x), mine.run(x)) <= 1e-5, "what was traced is not what there is now"
    mine.eval()
    expected = mine.run(x)
    with torch.no_grad():
        exported = torch.export.export(Block(mine), (x,)).module()
        assert towers.relative(exported(x), expected) <= 1e-5
        if "lora" in labels:  # merged, all are the same
            merge(mine)
            exported = torch.export.export(Block(mine), (x,)).module()
            assert towers.relative(exported(x), expected) <= 1e-5


def test_a_tower_compiles_whole():
    """With a method whose layers are by themselves and one whose layers share bases, on fused projections and parts."""
    backbone = adapted("nola", "vit", ("image.0.qkv", "image.1.[kv]", "image.1.fc1"))
    LoRA(rank=2).attach(backbone, ["image.1.[qo]", "image.0.fc?"])
    perturb(backbone)
    image, expected = towers.images(backbone), towers.encode(backbone.train(), "image")
    given = torch.compile(backbone.encode_image, backend="aot_eager", fullgraph=True)(image)
    assert towers.relative(given, expected) <= 1e-5
    for y in (given, expected):
        backbone.zero_grad()
        y.square().sum().backward()
        grads = torch.cat([p.grad.flatten() for p in trained(backbone).values()])
        if y is given:
            found = grads
    assert towers.relative(found, grads) <= 1e-4


class TestLoRA:
    def test_rank_above_the_smaller_side(self):
        backbone = towers.backbone()
        with pytest.raises(UserError, match=r"rank 33 .* 32.* image\.0\.q"):
            LoRA(rank=33).attach(backbone, ["image.0.q"])
        LoRA(rank=32).attach(backbone, ["image.0.q"])

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
        adapter.attach(backbone, [key])
        slot, layer = backbone.slots()[key], layers_of(backbone)[key]
        perturb(backbone, 0.5)
        backbone.double()
        x = torch.randn(2, 5, slot.in_features, dtype=torch.float64, requires_grad=True)
        projection = slot.projection
        upstream = torch.randn(2, 5, projection.out_features, dtype=torch.float64)
        weight = projection.weight.clone()
        rows = projection.rows[part]
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
        LoRA(rank=32).attach(backbone, ["*"])
        for layer in layers_of(backbone).values():
            bound = layer.slot.in_features**-0.5
            assert layer.A.shape == (32, layer.slot.in_features)
            assert layer.B.shape == (layer.slot.out_features, 32)
            assert layer.B.abs().max() == 0
            assert 0.95 * bound < layer.A.abs().max() <= bound
            assert float(layer.A.std()) == pytest.approx(bound / 3**0.5, rel=0.1)

    def test_dropout_in_training_only(self):
        backbone = towers.backbone()
        LoRA(rank=2, dropout=0.5).attach(backbone, ["image.*"])
        perturb(backbone, 0.3)
        backbone.eval()
        calm = towers.encode(backbone, "image")
        assert torch.equal(towers.encode(backbone, "image"), calm)
        backbone.train()
        assert not torch.equal(towers.encode(backbone, "image"), towers.encode(backbone, "image"))
        assert not torch.equal(plain(backbone, "image"), plain(backbone, "image"))
        assert torch.equal(merged(backbone, "image"), merged(backbone, "image"))

    def test_dropout_is_on_the_low_rank_path_alone_and_keeps_the_mean(self):
        backbone = towers.backbone()
        LoRA(rank=2, dropout=0.5).attach(backbone, ["image.0.fc1"])
        slot, layer = backbone.slots()["image.0.fc1"], layers_of(backbone)["image.0.fc1"]
        x = torch.randn(1, 32)
        many = x.expand(20000, 32)
        assert torch.equal(slot.projection.train()(many)[0], F.linear(many, slot.weight, slot.bias)[0])
        perturb(backbone, 0.5)
        backbone.train()
        change = slot.projection(many) - F.linear(many, slot.weight, slot.bias)
        torch.testing.assert_close(change.mean(0), F.linear(x, layer.B @ layer.A)[0], rtol=0.1, atol=0.1)
        assert change.std(0).min() > 0


FUSED = [(label, "clip") for label in SLOT_CASES] + [(label, "vit") for label in FIRST_CASES]
FUSED += [("lora", name) for name in ("clip_custom", "vit_dinov2")]  # as in test_layouts.py: LoRA on every layout


@pytest.mark.parametrize(("label", "name"), FUSED)
def test_fused_projections_are_one_matrix(label, name):
    kind, case = SLOT_CASES[label]
    before = towers.untouched(name, "image")
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


@each_case
def test_unadapted_survives_errors(label):
    backbone = adapted(label, targets=("text.*",))
    perturb(backbone)
    after = merged(backbone, "text")
    with pytest.raises(RuntimeError, match="stop"), backbone.unadapted():
        raise RuntimeError("stop")
    assert torch.equal(merged(backbone, "text"), after)
