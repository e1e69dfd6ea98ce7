"""Tokens behind blocks that nothing changes: which these are, by autograd; features from there; whole runs."""

import logging
from functools import partial

import pytest
import torch
import towers
from lightning.pytorch import Callback, Trainer
from torch.optim import SGD

from kshot import kept_tokens
from kshot.adapters import AdaLoRA, FullTuning, HydraLoRA, LoRA, RandLoRA
from kshot.adapters.base import Shared
from kshot.backbones import OpenClip, Timm
from kshot.backbones.tokens import PARTS
from kshot.backbones.towers import blocks_of
from kshot.callbacks import ResumeFile
from kshot.classifiers import VPT, CoOp, LinearProbe, NearestClassMean
from kshot.data import CropFlip, FewShotDataModule
from kshot.run import build, evaluate, fit, make_trainer


@pytest.fixture(params=[name for name, tower in towers.distinct_towers() if tower == "image"])
def layout(request):
    """Every layout of an image tower, in float32."""
    return towers.backbone(request.param)


def moved(backbone, *targets):
    """LoRA on some slots, with random factors, so that a block that is left out would be missed."""
    LoRA(rank=2).attach(backbone, list(targets))
    for layer in backbone.layers().values():
        for parameter in layer.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
    return backbone


class Counting(Shared):
    """Notes the passes that it hears of."""

    def __init__(self):
        super().__init__()
        self.passes = []

    def begin_pass(self, layers):
        self.passes.append(sorted(layers))


class TestFeatures:
    """``encode_rest(encode_start(image))`` beside one pass, behind every block."""

    def test_equal_the_librarys_own_pass_to_the_bit(self, layout):
        image = towers.images(layout)
        with torch.no_grad():
            whole = layout.encode_image(image)
            for blocks in range(len(blocks_of(layout.tower)) + 1):
                assert torch.equal(layout.encode_rest(layout.encode_start(image, blocks), blocks), whole)

    @pytest.mark.parametrize("name", ["clip", "siglip", "vit", "vit_dinov3", "eva02"])
    def test_equal_it_in_mixed_precision_and_keep_the_dtype_of_the_states(self, name):
        backbone = towers.backbone(name)
        image, states = towers.images(backbone), []
        block = blocks_of(backbone.tower)[0]
        hook = block.register_forward_hook(lambda _, __, out: states.append(out))
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            whole = backbone.encode_image(image)
            tokens = backbone.encode_start(image, 1)
            assert torch.equal(backbone.encode_rest(tokens, 1), whole)
        hook.remove()
        assert tokens.dtype == states[0].dtype
        assert torch.equal(tokens, states[0])

    @pytest.mark.parametrize("features", PARTS)
    @pytest.mark.parametrize("name", ["glyph", "test_vit"])
    def test_equal_it_for_chosen_tokens(self, name, features):
        if name == "glyph":
            backbone = OpenClip("kshot:glyph_clip", features=features)
        else:
            backbone = Timm(name, weights="random", image_size=32, features=features)
        self.are_equal(backbone, features)

    def test_equal_it_for_chosen_tokens_of_a_rotary_tower(self):
        folder = f"local-dir:{towers.folder_of('vit_dinov3')}"
        self.are_equal(Timm(folder, features="cls+mean"), "cls+mean")

    def are_equal(self, backbone, features):
        image, most = towers.images(backbone), backbone.leading_blocks()
        assert most == len(blocks_of(backbone.tower)) + 1 - max(1, PARTS[features][0])
        with torch.no_grad():
            whole = backbone.encode_image(image)
            for blocks in (0, most):
                assert torch.equal(backbone.encode_rest(backbone.encode_start(image, blocks), blocks), whole)

    def test_of_rotary_positions_that_differ_by_block(self):
        backbone = Timm("vit_small_patch16_rope_mixed_224", weights="random", image_size=32)
        with torch.no_grad():
            whole = backbone.encode_image(towers.images(backbone))
            assert torch.equal(backbone.encode_rest(backbone.encode_start(towers.images(backbone), 5), 5), whole)

    @pytest.mark.parametrize("name", ["clip", "vit_dinov3_swiglu"])
    def test_and_gradients_are_those_of_adapters_behind(self, name):
        backbone = moved(towers.backbone(name), "image.1.*")
        image, found = towers.images(backbone), []
        for whole in (True, False):
            features = (
                backbone.encode_image(image) if whole else backbone.encode_rest(backbone.encode_start(image, 1), 1)
            )
            features.square().sum().backward()
            found.append((features.detach(), [p.grad for p in backbone.trainable("image")]))
            for parameter in backbone.trainable("image"):
                parameter.grad = None
        (features, gradients), (same, others) = found
        assert torch.equal(features, same)
        assert all(torch.equal(a, b) for a, b in zip(gradients, others, strict=True))
        shared = Counting()
        backbone.shared.append(shared)
        backbone.encode_rest(backbone.encode_start(image, 1), 1)
        assert shared.passes == [sorted(backbone.layers())], "what layers make together is made once, behind the tokens"
        backbone.shared = torch.nn.ModuleList()
        with backbone.unadapted(), torch.no_grad():
            before = backbone.encode_image(image)
            assert torch.equal(backbone.encode_rest(backbone.encode_start(image, 1), 1), before)
        assert not torch.allclose(before, features)


def first_with_a_graph(backbone) -> int:
    """The blocks whose outcome needs no gradient: what the names of trained tensors must agree with."""
    needs, hooks = [], []
    for block in blocks_of(backbone.tower):
        hooks.append(block.register_forward_pre_hook(lambda _, inputs: needs.append(inputs[0].requires_grad)))
        hooks.append(block.register_forward_hook(lambda _, __, out: needs.append(out.requires_grad)))
    backbone.encode_image(towers.images(backbone, 1))
    for hook in hooks:
        hook.remove()
    return 0 if needs[0] else sum(not each for each in needs[1::2])


class TestLeadingBlocks:
    """How many blocks are left as they are, beside what autograd sees."""

    def test_of_each_tensor_that_may_train(self, layout):
        seen = set()
        for name, parameter in layout.named_tower_parameters():
            if not name.startswith("image."):
                continue
            parameter.requires_grad_(True)
            expected, found = first_with_a_graph(layout), layout.leading_blocks()
            parameter.requires_grad_(False)
            assert found == expected, name
            seen.add(found)
        assert seen == set(range(len(blocks_of(layout.tower)) + 1)), "before, in each block, and after"

    def test_of_each_slot(self, layout):
        for name in layout.slots():
            if name.startswith("image."):
                LoRA(rank=1).attach(layout, [name])
                expected, found = first_with_a_graph(layout), layout.leading_blocks()
                layout.detach()
                assert found == expected == int(name.split(".")[1])

    def test_an_adapter_that_no_longer_trains_counts_as_well(self):
        """It changes what follows, also where the untouched backbone is asked for."""
        backbone = moved(towers.backbone("clip"), "image.1.q")
        backbone.requires_grad_(False)
        assert backbone.leading_blocks() == 1

    def test_towers_that_cannot_be_entered_have_none(self):
        assert towers.backbone("resnet").leading_blocks() == 0
        towers.families()
        coca = towers.backbone(next(name for name in towers.PUBLISHED if name.startswith("coca")))
        assert coca.leading_blocks() == 0
        assert Timm("vit_tiny_patch16_224", weights="random", image_size=32).leading_blocks() == 12
        assert Timm("deit_tiny_distilled_patch16_224", weights="random", image_size=32).leading_blocks() == 0

    @pytest.mark.parametrize("name", towers.RANDOM_IN_TRAINING)
    def test_they_stay_in_evaluation_mode_where_later_ones_train_as_a_whole(self, name):
        backbone = towers.backbone(name)
        last = [n for n, _ in backbone.named_tower_parameters() if "blocks.1." in n and n.startswith("image.")]
        backbone.unfreeze(last)
        backbone.train()
        first, second = blocks_of(backbone.tower)
        assert not any(module.training for module in first.modules())
        assert all(module.training for module in second.modules())
        with torch.no_grad():
            states = [backbone.encode_start(towers.images(backbone), 1) for _ in range(2)]
        assert torch.equal(*states)
        backbone.unfreeze([n for n, _ in backbone.named_tower_parameters() if "blocks.0." in n])
        backbone.train()
        assert first.training


class Watch(Callback):
    """Notes losses, what batches carry, and how many images pass through the first block of the image tower."""

    def __init__(self, backbone):
        self.losses, self.carried, self.images = [], set(), 0
        self.hook = blocks_of(backbone.tower)[0].register_forward_pre_hook(self.count)

    def count(self, _, inputs):
        self.images += len(inputs[0])

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.losses.append(outputs["loss"].item())
        self.carried |= {("train", name) for name in ("image", "tokens") if getattr(batch, name) is not None}

    def on_validation_batch_start(self, trainer, pl_module, batch, batch_idx, dataloader_idx=0):
        self.carried |= {("val", name) for name in ("image", "tokens") if getattr(batch, name) is not None}


def digits(**settings):
    """20 training images in two views, 20 validation images, 539 test scans."""
    options = {"shots": 2, "batch_size": 10, "eval_batch_size": 20, "augment": CropFlip(flip=0.0), "views": 2}
    return FewShotDataModule("digits", sampler="coop-v1", store_gb=0, **(options | settings))


def run(backbone, data, epochs=3, lr=0.05, trainer=(), **settings):
    """A fit on a backbone that is given back untouched: tensors, note on tokens, what was watched, and figures."""
    module = build(backbone, data, optimizer=partial(SGD, lr=lr, momentum=0.9), **settings)
    watch = Watch(backbone)
    trainer = make_trainer([watch], max_epochs=epochs, limit_test_batches=1, **dict(trainer))
    fit(module, data, trainer)
    fitted, tested = watch.images, evaluate(module, data, trainer)
    watch.hook.remove()
    tuned = {name: tensor.detach().clone() for name, tensor in module.tuned_state().items()}
    module.detach()
    return {
        "tuned": tuned,
        "losses": torch.tensor(watch.losses),
        "carried": watch.carried,
        "figures": tested.sets["test"],
        "images": (fitted, watch.images - fitted),
        "note": module.kept_tokens,
    }


def same(kept, whole, tolerance=1e-4):
    """Whether two runs found the same, to rounding; what was learnt moved much further than that."""
    assert kept["figures"] == pytest.approx(whole["figures"], abs=tolerance)
    assert torch.allclose(kept["losses"], whole["losses"], atol=tolerance)
    assert kept["tuned"].keys() == whole["tuned"].keys()
    for name, tensor in kept["tuned"].items():
        assert torch.allclose(tensor.float(), whole["tuned"][name].float(), atol=tolerance), name
    return float((whole["losses"][0] - whole["losses"][-1]).abs()) > 20 * tolerance


LAST = ["image.1.*"]
ADA = AdaLoRA(initial_rank=3, target_rank=1, initial_steps=2, final_steps=2, every=1)
MEANS = partial(NearestClassMean, trainable=True)
RUNS = {
    "LoRA": ("siglip", {"adapter": LoRA(rank=2, dropout=0.2), "targets": ["image.4.[qv]", "image.5.*"]}),
    "both towers": ("clip", {"adapter": LoRA(rank=2), "targets": ["image.1.[qv]", "text.*.[qv]"]}),
    "CoOp + RandLoRA": ("clip", {"adapter": RandLoRA(rank=8), "targets": LAST, "classifier": CoOp}),
    "AdaLoRA": ("clip", {"adapter": ADA, "targets": LAST}),
    "the last block": ("clip", {"adapter": FullTuning(), "targets": ["image.transformer.resblocks.1.*"]}),
    "HydraLoRA": ("clip_custom", {"adapter": HydraLoRA(), "targets": LAST}),
    "DINOv2": ("vit_dinov2", {"adapter": LoRA(), "targets": LAST, "classifier": LinearProbe}),
    "DINOv3": ("vit_dinov3", {"adapter": LoRA(), "targets": LAST, "classifier": MEANS}),
    "four blocks": ("test_vit", {"adapter": LoRA(), "targets": ["image.5.*"], "classifier": LinearProbe}),
    "random layers": (
        "vit_proj_drop",
        {"adapter": FullTuning(), "targets": ["image.norm.*"], "classifier": LinearProbe},
    ),
}


def made(name):
    if name == "test_vit":
        torch.manual_seed(0)
        return Timm(name, weights="random", image_size=32, features="last4")
    if name == "vit_dinov2":
        return Timm(f"local-dir:{towers.folder_of(name)}", image_size=32)
    return towers.backbone(name)


class TestRuns:
    """Fits with and without ``model.cache_features``."""

    @pytest.mark.parametrize("case", RUNS)
    def test_are_the_same_and_run_the_first_blocks_once_for_every_view(self, case):
        name, settings = RUNS[case]
        found = []
        for kept in (True, False):
            backbone = made(name)
            found.append(run(backbone, digits(image_size=backbone.image_size), cache_features=kept, **settings))
        kept, whole = found
        assert same(kept, whole), "the loss went nowhere"
        assert kept["carried"] == {("train", "tokens"), ("val", "tokens")}
        assert whole["carried"] == {("train", "image"), ("val", "image")}
        once, noise = 2 * 20 + 20, 2  # all views; images of the step that is tried
        shots = 2 * 20 * (settings.get("classifier") in (MEANS, LinearProbe))  # which start from their features
        assert kept["images"][0] == shots + noise + once + 1  # an image that tells the size of tokens
        assert whole["images"][0] == shots + noise + 3 * (20 + 20)
        assert kept["images"][1] == whole["images"][1] == 20  # test images, for this run and the zero-shot row
        assert set(kept["note"]["kept"]) == {"train", "val"}
        assert kept["note"]["not_kept"] == {}
        assert whole["note"] is None

    @pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "64-true"])
    def test_in_other_precisions(self, precision):
        settings = {"adapter": LoRA(rank=2), "targets": ["image.1.*"], "trainer": {"precision": precision}}
        kept, whole = (run(made("clip"), digits(), cache_features=each, **settings) for each in (True, False))
        assert same(kept, whole, 1e-4 if precision == "64-true" else 2e-2) or precision != "64-true"
        states = {"bf16-mixed": 2, "bf16-true": 2, "64-true": 8}[precision]
        assert kept["note"]["kept"]["train"] == 40 * 17 * 32 * states

    def test_of_a_teacher(self):
        """It goes on from the tokens as well, with nothing attached."""
        teachers = []

        class Near(LinearProbe):
            def __init__(self, *given, **settings):
                super().__init__(*given, **settings)
                self.needs = frozenset({"teacher"})

            def losses(self, features, label, teacher=None):
                teachers.append(teacher.clone())
                return {"near": (features - teacher).square().sum(-1).mean(), **super().losses(features, label)}

        settings = {"adapter": LoRA(rank=2), "targets": ["image.1.*"], "classifier": partial(Near, head_start="zero")}
        kept, whole = (
            run(made("vit_dinov3"), digits(image_size=32), cache_features=each, **settings) for each in (True, False)
        )
        assert same(kept, whole)
        half = len(teachers) // 2
        assert torch.allclose(torch.cat(teachers[:half])[2:], torch.cat(teachers[half:])[2:], atol=1e-5)

    def test_that_put_tokens_into_the_tower_keep_none(self):
        settings = {"classifier": partial(VPT, depth=1), "adapter": LoRA(), "targets": ["image.1.*"]}
        found = run(made("clip"), digits(), **settings)
        assert found["carried"] == {("train", "image"), ("val", "image")}
        assert found["note"] is None

    def test_without_a_frozen_first_block_keep_none(self):
        found = run(made("clip"), digits(), adapter=LoRA(), targets=["image.0.q", "image.1.q"])
        assert found["carried"] == {("train", "image"), ("val", "image")}
        assert found["note"] is None

    def test_whose_views_do_not_repeat_keep_those_of_validation_alone(self):
        settings = {"adapter": LoRA(), "targets": ["image.1.q"]}
        endless = run(made("clip"), digits(views=None), epochs=2, **settings)
        assert endless["note"]["not_kept"] == {
            "train": "every epoch has its own views; --data.views N repeats N of them"
        }
        few = run(made("clip"), digits(views=3), **settings)
        assert few["note"]["not_kept"] == {"train": "none of 3 views is seen twice in 3 epochs"}
        for found in (endless, few):
            assert found["carried"] == {("train", "image"), ("val", "tokens")}
        more = run(made("clip"), digits(views=3), epochs=4, **settings)
        assert more["note"]["not_kept"] == {}

    @pytest.mark.parametrize(
        ("room", "devices", "parts"),
        [(1.5, 1, ("train", "val")), (1.4, 1, ("train",)), (0.6, 1, ("val",)), (0.4, 1, ()), (1.5, 2, ("val",))],
    )
    def test_keep_to_a_quarter_of_the_memory_and_say_what_they_leave(self, room, devices, parts, monkeypatch, caplog):
        train = 40 * 17 * 32 * 4  # bytes of two views of 20 images; of validation, half of it
        monkeypatch.setattr(kept_tokens, "memory_of", lambda _: int(4 * room * train))
        monkeypatch.setattr(kept_tokens, "AT_ONCE", train // 3)  # in several rounds
        monkeypatch.setattr(Trainer, "num_devices", devices)  # of one machine, each with tokens of its own
        with caplog.at_level(logging.INFO, "kshot"):
            found = run(made("clip"), digits(), adapter=LoRA(), targets=["image.1.q"])
        assert found["note"] | {"not_kept": {}} == {
            "blocks": 1,
            "of": 2,
            "kept": {part: train // (1 + (part == "val")) for part in parts},
            "not_kept": {},
        }
        assert found["carried"] == {(part, "tokens" if part in parts else "image") for part in ("train", "val")}
        said = [line for line in caplog.messages if line.startswith("Tokens of ")]
        assert [("not kept" not in line) for line in said] == [part in parts for part in ("train", "val")]
        refused = set(found["note"]["not_kept"].values())
        assert all("are left of a quarter of the memory" in reason for reason in refused)

    def test_resume_to_the_bit(self, tmp_path):
        def fitted(epochs, **options):
            data = digits()
            module = build(made("clip"), data, adapter=LoRA(rank=2), targets=["image.1.*"])
            writes = ResumeFile(0)
            writes.folder = tmp_path
            fit(module, data, make_trainer([writes], max_epochs=epochs), **options)
            assert set(module.kept_tokens["kept"]) == {"train", "val"}
            return module.tuned_state()

        whole = fitted(4)
        fitted(3)
        resumed = fitted(4, ckpt_path=tmp_path / "last.ckpt")
        assert all(torch.equal(tensor, resumed[name]) for name, tensor in whole.items())

    def test_leave_nothing_behind_and_the_backbone_as_it_was(self):
        backbone = made("clip")
        data, lora = digits(), {"adapter": LoRA(), "targets": ["image.1.q"]}
        image = towers.images(backbone)
        before = backbone.encode_image(image)
        assert run(backbone, data, **lora)["carried"] == {("train", "tokens"), ("val", "tokens")}
        assert torch.equal(backbone.encode_image(image), before)
        again = run(backbone, data, cache_features=False, **lora)
        assert again["carried"] == {("train", "image"), ("val", "image")}
