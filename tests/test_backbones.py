"""Contract of backbones: the un-fused model is the original, frozen, with named slots on its own weights."""

import re
from collections import Counter

import pytest
import torch
import torchvision.transforms.v2.functional as VF
import towers
from towers import IMAGE_ONLY, LAYOUTS, TOWERS, WITH_TEXT

from kshot.adapters import FullTuning
from kshot.backbones import Backbone, OpenClip, Timm, VisionLanguageBackbone
from kshot.backbones.attention import Attention
from kshot.backbones.identity import sha256_of
from kshot.errors import UserError
from kshot.slots import Projection, merge

NAME = re.compile(r"^(image|text)\.\d+\.(q|k|v|o|fc1|fc2|fc1_g|fc1_x)$")


def original_output(model, tower, backbone):
    if tower == "text":
        return model.encode_text(towers.texts(backbone))
    normalised = (towers.images(backbone) - backbone.mean) / backbone.std
    return model.encode_image(normalised) if hasattr(model, "encode_image") else model(normalised)


def every_tower():
    """Towers with slots, and those without that must still run."""
    return [*TOWERS, *((name, "image") for name, layout in LAYOUTS.items() if not layout.image_blocks)]


@pytest.mark.parametrize(("name", "tower"), every_tower())
def test_unfused_equals_the_original(name, tower):
    backbone, original = towers.backbone(name), towers.original(name)
    assert isinstance(backbone, Backbone)
    for training in (False, True):
        backbone.train(training)
        original.train(training and name != "resnet")  # batch statistics belong to no frozen tower
        given = towers.encode(backbone, tower)
        assert not given.requires_grad
        assert towers.relative(given, original_output(original, tower, backbone)) <= 1e-5
        with torch.no_grad():
            assert towers.relative(towers.encode(backbone, tower), original_output(original, tower, backbone)) <= 1e-5
    assert given.shape[-1] == backbone.feature_dim
    assert float(given.std(0).mean()) > 1e-3, "a test of features that are all alike tests nothing"


@pytest.mark.parametrize(("name", "tower"), every_tower())
def test_unfused_is_as_close_in_bfloat16(name, tower):
    backbone, original = towers.backbone(name), towers.original(name)
    with torch.no_grad():
        exact = original_output(original, tower, backbone)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            theirs = towers.relative(original_output(original, tower, backbone), exact)
            ours = towers.relative(towers.encode(backbone, tower), exact)
    assert 0 < ours <= max(2 * theirs, 0.03)


@pytest.mark.parametrize("name", LAYOUTS)
def test_slots_have_canonical_names(name):
    layout, slots = LAYOUTS[name], towers.backbone(name).slots()
    assert [slot for slot in slots if not NAME.match(slot)] == []
    assert all(slot.name == key for key, slot in slots.items())
    blocks = {"image": layout.image_blocks, "text": layout.text_blocks}
    expected = {f"{t}.{i}.{part}" for t, n in blocks.items() for i in range(n) for part in towers.ALL_PARTS}
    gated = {name for slot in expected for name in ([f"{slot}_g", f"{slot}_x"] if slot.endswith("fc1") else [slot])}
    assert set(slots) in (expected, gated)


@pytest.mark.parametrize("name", LAYOUTS)
def test_slots_are_views_of_the_original_weights(name):
    backbone, theirs = towers.backbone(name), towers.original(name).state_dict()
    owned = {p.untyped_storage().data_ptr() for p in backbone.parameters()}
    slots = backbone.slots()
    assert bool(slots) == bool(LAYOUTS[name].towers)
    for key, slot in slots.items():
        tower, block, part = key.split(".")
        assert slot.weight.untyped_storage().data_ptr() == slot.projection.weight.untyped_storage().data_ptr()
        assert slot.weight.untyped_storage().data_ptr() in owned
        assert slot.weight.shape == (slot.out_features, slot.in_features)
        assert slot.projection in list(backbone.modules()), "a slot of a module that does not run"
        weight, bias = original_rows(theirs, tower, int(block), part)
        assert torch.equal(slot.weight, weight), key
        assert (slot.bias is None) == (bias is None), key
        if bias is not None:
            assert slot.bias.untyped_storage().data_ptr() == slot.projection.bias.untyped_storage().data_ptr()
            assert torch.equal(slot.bias, bias), key


def original_rows(state, tower, block, part):
    """A part's weight and bias in the library's own state, by the library's names."""
    prefixes = {"text": ("transformer.", "text.transformer."), "image": ("visual.transformer.", "visual.trunk.", "")}
    (base,) = {
        f"{prefix}{blocks}.{block}."
        for prefix in prefixes[tower]
        for blocks in ("resblocks", "blocks")
        if any(key.startswith(f"{prefix}{blocks}.{block}.") for key in state)
    }
    own = {key.removeprefix(base): value for key, value in state.items() if key.startswith(base)}
    if part in ("q", "k", "v"):
        if f"attn.{part}_proj.weight" in own:
            return own[f"attn.{part}_proj.weight"], own.get(f"attn.{part}_proj.bias")
        i = "qkv".index(part)
        weight = own.get("attn.in_proj_weight", own.get("attn.qkv.weight")).chunk(3)[i]
        if "attn.q_bias" in own:
            return weight, own[f"attn.{part}_bias"] if part != "k" else torch.zeros(len(weight))
        bias = own.get("attn.in_proj_bias", own.get("attn.qkv.bias"))
        return weight, None if bias is None else bias.chunk(3)[i]
    for theirs in {"o": ("attn.out_proj", "attn.proj"), "fc1": ("mlp.c_fc",), "fc2": ("mlp.c_proj",)}.get(part, ()):
        if f"{theirs}.weight" in own:
            return own[f"{theirs}.weight"], own.get(f"{theirs}.bias")
    return own[f"mlp.{part}.weight"], own.get(f"mlp.{part}.bias")


@pytest.mark.parametrize("name", LAYOUTS)
def test_no_projection_is_left_behind(name):
    """Every linear layer of a block is a slot: none stays where no adapter can reach it."""
    backbone = towers.backbone(name)
    blocks = {id(m) for m in backbone.modules() if hasattr(m, "attn") and hasattr(m, "mlp")}
    left = [
        n
        for block in backbone.modules()
        if id(block) in blocks
        for n, m in block.named_modules()
        if isinstance(m, torch.nn.Linear | torch.nn.MultiheadAttention) and any(True for _ in m.parameters())
    ]
    assert left == []
    assert Counter(id(s.projection) for s in backbone.slots().values()) == Counter(
        {id(m): len(m.sizes) for m in backbone.modules() if isinstance(m, Projection)}
    )


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_library_gets_its_own_modules_back(name):
    """Under its own names, with the weights that the adapters made, loadable without a word about kshot."""
    backbone, original = towers.backbone(name), towers.original(name)
    given = {t: towers.encode(backbone, t) for t in LAYOUTS[name].towers}
    merge(backbone, keep=False)
    assert backbone.slots() == {}
    ours = backbone.clip if isinstance(backbone, OpenClip) else backbone.vit
    original.load_state_dict(ours.state_dict(), strict=True)
    mine, theirs = dict(ours.named_modules()), dict(original.named_modules())
    assert mine.keys() == theirs.keys()
    assert all(isinstance(theirs[n], type(m)) for n, m in mine.items())
    for tower, expected in given.items():
        assert towers.relative(original_output(ours, tower, backbone), expected) <= 1e-5


@pytest.mark.parametrize("name", LAYOUTS)
def test_everything_is_frozen_and_stays_in_evaluation_mode(name):
    backbone = towers.backbone(name)
    assert [n for n, p in backbone.named_parameters() if p.requires_grad] == []
    assert backbone.trainable("image") == backbone.trainable("text") == []
    for mode in (True, False):
        assert backbone.train(mode) is backbone
        assert [n for n, m in backbone.named_modules() if m.training] == []


@pytest.mark.parametrize("name", LAYOUTS)
def test_tower_parameters_are_named_once_by_tower(name):
    backbone = towers.backbone(name)
    named = list(backbone.named_tower_parameters())
    assert len(dict(named)) == len(named)
    assert all(n.startswith(("image.", "text.")) for n, _ in named)
    assert not any(n.startswith(("text.text.", "image.image.")) for n, _ in named)
    left_out = {id(p) for p in backbone.parameters()} - {id(p) for _, p in named}
    scales = {id(p) for n, p in backbone.named_parameters() if n.endswith(("logit_scale", "logit_bias"))}
    assert left_out == scales
    has = {n.split(".")[0] for n, _ in named}
    assert has == ({"image", "text"} if isinstance(backbone, VisionLanguageBackbone) else {"image"})
    for key, slot in backbone.slots().items():
        (full,) = [n for n, p in named if p is slot.projection.weight]
        assert full.startswith(key.split(".")[0] + ".")


@pytest.mark.parametrize("name", ["clip", "vit"])
def test_state_is_loaded_bit_exactly_and_hashed(name):
    backbone, original = towers.backbone(name), towers.original(name)
    assert backbone.weight_sha256 == sha256_of(original) == towers.build(name).weight_sha256
    with torch.no_grad():
        next(p for n, p in original.named_parameters() if p.ndim == 2)[0, 0] += 1e-6
    assert sha256_of(original) != backbone.weight_sha256


def test_the_hash_sees_names_shapes_types_and_scalars():
    def one(**tensors):
        module = torch.nn.Module()
        for key, value in tensors.items():
            module.register_buffer(key, value)
        return sha256_of(module)

    zeros = torch.zeros(4)
    digests = {
        one(a=zeros), one(b=zeros), one(a=zeros.view(2, 2)), one(a=zeros.to(torch.int32)), one(a=torch.zeros(())),
        one(a=torch.ones(())), one(a=zeros.bfloat16()),
    }  # fmt: skip
    assert len(digests) == 7
    assert one(a=zeros, b=torch.ones(2)) == one(b=torch.ones(2), a=zeros)
    assert one(a=torch.arange(6.0).view(2, 3).T) == one(a=torch.arange(6.0).view(2, 3).T.contiguous())


@pytest.mark.parametrize("name", ["clip", "vit", "siglip"])
def test_images_are_normalised_by_the_backbone(name):
    backbone = towers.backbone(name)
    pixels = torch.randint(0, 256, (2, 3, backbone.image_size, backbone.image_size), dtype=torch.uint8)
    floats = pixels.float() / 255
    mean, std = backbone.mean.flatten().tolist(), backbone.std.flatten().tolist()
    expected = backbone.encode_normalised(VF.normalize(floats, mean, std))
    assert towers.relative(backbone.encode_image(pixels), expected) <= 1e-5
    assert torch.equal(backbone.encode_image(pixels), backbone.encode_image(floats))
    if name == "clip":
        torch.testing.assert_close(backbone.mean.flatten(), torch.tensor([0.48, 0.46, 0.41]))
        torch.testing.assert_close(backbone.std.flatten(), torch.tensor([0.27, 0.26, 0.28]))
    assert not {"mean", "std"} & set(backbone.state_dict())


@pytest.mark.parametrize("name", list(towers.RANDOM_IN_TRAINING))
def test_a_tower_that_trains_keeps_its_randomness(name):
    """Dropout and its relatives act as in the original once a method trains the whole tower."""
    backbone, original = towers.build(name), towers.original(name)
    FullTuning().attach(backbone, ["image.*"])
    outputs = []
    for training in (True, False):
        backbone.train(training)
        original.train(training)
        torch.manual_seed(3)
        given = towers.encode(backbone, "image")
        torch.manual_seed(3)
        assert towers.relative(given, original_output(original, "image", backbone)) <= 1e-5
        outputs.append(given)
    assert towers.relative(*outputs) > 1e-2, "nothing was random"


NOT_ALLOWED = torch.ones(5, 5, dtype=torch.bool).triu(1)  # True is where torch's own layer does not attend
MASKS = {
    "none": lambda heads: None,
    "additive": lambda heads: torch.randn(5, 5),
    "additive_each_head": lambda heads: torch.randn(heads, 5, 5),
    "boolean": lambda heads: NOT_ALLOWED,
    "boolean_each_head": lambda heads: NOT_ALLOWED.expand(heads, 5, 5),
}


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("batch", [1, 3])
def test_drop_in_attention_reads_every_mask_of_multihead_attention(batch, mask):
    original = torch.nn.MultiheadAttention(8, 2, batch_first=True)
    x, attn_mask = torch.randn(batch, 5, 8), MASKS[mask](batch * 2)
    expected = original(x, x, x, need_weights=False, attn_mask=attn_mask)[0]
    ours = Attention(
        original,
        Projection(original.in_proj_weight, original.in_proj_bias, dict.fromkeys("qkv", 8)),
        Projection.from_linear(original.out_proj, "o"),
    )
    torch.testing.assert_close(ours(x, x, x, need_weights=False, attn_mask=attn_mask)[0], expected)


@pytest.mark.parametrize("name", WITH_TEXT)
def test_text_interface(name):
    backbone = towers.backbone(name)
    assert isinstance(backbone, VisionLanguageBackbone)
    assert backbone.supports_prompts == LAYOUTS[name].prompts
    assert backbone.context_length == 77
    assert backbone.text_width == LAYOUTS[name].config["text_cfg"]["width"]
    expected = towers.original(name).logit_scale.exp()
    assert backbone.logit_scale.shape == ()
    assert not backbone.logit_scale.requires_grad
    torch.testing.assert_close(backbone.logit_scale, expected.detach().reshape(()))
    ids = backbone.token_ids("a photo of a cat")
    tokens = backbone.tokenize(["a photo of a cat"])
    assert tokens.shape == (1, 77)
    assert tokens.dtype == torch.int64
    assert tokens[0, 1 : 1 + len(ids)].tolist() == ids
    assert len(ids) == 5


@pytest.mark.parametrize("name", IMAGE_ONLY)
def test_image_only_backbones_offer_no_text(name):
    assert not isinstance(towers.backbone(name), VisionLanguageBackbone)


def one_line(error) -> str:
    message = str(error.value)
    assert message
    assert "\n" not in message
    return message


class TestErrors:
    @pytest.mark.parametrize(
        ("arguments", "expected"),
        [
            ({"model": "ViT-B-61"}, "ViT-B-16"),
            ({"model": "kshot:nothing"}, "kshot:glyph_clip"),
            ({"model": "ViT-B-16"}, "no weights named"),
            ({"model": "ViT-B-16", "pretrained": "opanai"}, "openai"),
            ({"model": "ViT-B-16", "pretrained": "openai"}, "ViT-B-16-quickgelu"),
            ({"model": "ViT-B-16-quickgelu", "pretrained": "laion2b_s34b_b88k"}, "nor a tag of ViT-B-16-quickgelu"),
            ({"model": "ViT-B-32", "pretrained": "random", "image_size": 100}, "use 96 or 128"),
            ({"model": "kshot:glyph_clip", "pretrained": "openai"}, "leave out pretrained"),
        ],
    )
    def test_open_clip(self, arguments, expected):
        with pytest.raises(UserError) as error:
            OpenClip(**arguments)
        assert expected in one_line(error)

    def test_open_clip_folder_without_a_model(self, tmp_path):
        with pytest.raises(UserError) as error:
            OpenClip(str(tmp_path))
        assert "open_clip_config.json" in one_line(error)

    def test_open_clip_folder_with_a_broken_file(self, tmp_path):
        config = (towers.folder_of("clip") / "open_clip_config.json").read_text()
        (tmp_path / "open_clip_config.json").write_text(config)
        (tmp_path / "open_clip_model.safetensors").write_bytes(b"nothing")
        with pytest.raises(UserError) as error:
            OpenClip(str(tmp_path))
        assert str(tmp_path) in one_line(error)

    def test_open_clip_folder_without_weights(self, tmp_path):
        config = (towers.folder_of("clip") / "open_clip_config.json").read_text()
        (tmp_path / "open_clip_config.json").write_text(config)
        with pytest.raises(UserError) as error:
            OpenClip(str(tmp_path))
        assert str(tmp_path) in one_line(error)

    def test_scaled_cosine_attention_is_refused(self, tmp_path):
        import json

        config = json.loads((towers.folder_of("clip") / "open_clip_config.json").read_text())
        config["model_cfg"]["vision_cfg"]["scaled_cosine_attn"] = True
        (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
        import open_clip
        from safetensors.torch import save_file

        save_file(
            open_clip.create_model(f"local-dir:{tmp_path}", load_weights=False).state_dict(),
            tmp_path / "open_clip_model.safetensors",
        )
        with pytest.raises(UserError) as error:
            OpenClip(str(tmp_path))
        assert "scaled cosine" in one_line(error)

    @pytest.mark.parametrize(
        ("arguments", "expected"),
        [
            ({"model": "vit_tiny_patch61_224"}, "vit_tiny_patch16_224"),
            ({"model": "vit_tiny_patch16_224", "weights": "nowhere.pt"}, "nowhere.pt"),
            ({"model": "test_vit", "weights": "random", "image_size": 40}, "use 32 or 48"),
            ({"model": "test_vit", "weights": "random", "image_size": 8}, "use 16."),
            ({"model": "resnet18", "weights": "random"}, "resnet18"),
            ({"model": "test_efficientnet", "weights": "random"}, "test_efficientnet"),
            ({"model": "test_convnext", "weights": "random"}, "test_convnext"),
            ({"model": "mixer_s32_224", "weights": "random"}, "mixer_s32_224"),
            ({"model": "test_vit", "weights": "random", "pool": "tokens"}, "pool"),
        ],
    )
    def test_timm(self, arguments, expected):
        with pytest.raises(UserError) as error:
            Timm(**arguments)
        assert expected in one_line(error)

    def test_timm_blocks_beside_each_other(self):
        name = "vit_small_patch16_18x2_224"
        towers.PUBLISHED[name] = towers.vit(name)
        with pytest.raises(UserError) as error:
            Timm(f"local-dir:{towers.folder_of(name)}")
        assert name in one_line(error)

    def test_timm_weights_that_do_not_fit(self):
        weights = towers.folder_of("vit_qk_norm") / "model.safetensors"
        with pytest.raises(UserError) as error:
            Timm("test_vit", weights=str(weights))
        assert "do not fit test_vit" in one_line(error)


class TestTimmDefaults:
    def test_dinov2_takes_224_pixels_uncropped_and_dinov3_its_token(self):
        dinov2 = Timm("vit_small_patch14_dinov2", weights="random")
        assert dinov2.image_size == 224
        given = dinov2.preprocessing
        assert (given.size, given.crop, given.resize, given.interpolation) == (224, 1.0, "shortest", "bicubic")
        assert Timm("vit_small_patch16_dinov3", weights="random").vit.global_pool == "token"

    def test_any_size_that_patches_tile(self):
        backbone = Timm("test_vit", weights="random", image_size=48)
        assert backbone.image_size == 48
        assert backbone.encode_image(torch.rand(2, 3, 48, 48)).shape == (2, 64)

    def test_pool(self):
        token = Timm("test_vit", weights="random", image_size=32, pool="token")
        average = Timm("test_vit", weights="random", image_size=32, pool="avg")
        image = torch.rand(1, 3, 32, 32)
        features = token.vit.forward_features((image - token.mean) / token.std)
        torch.testing.assert_close(token.encode_image(image), token.vit.fc_norm(features[:, 0]))
        features = average.vit.forward_features((image - average.mean) / average.std)
        torch.testing.assert_close(average.encode_image(image), average.vit.fc_norm(features[:, 1:].mean(1)))

    def test_weights_from_a_local_file(self):
        name = "vit_dinov2"
        reference = towers.backbone(name)
        with torch.no_grad():
            expected = towers.encode(reference, "image")
        folder = towers.folder_of(name)
        assert torch.equal(towers.encode(Timm(f"local-dir:{folder}", image_size=48), "image"), expected)


def test_open_clip_takes_another_image_size():
    backbone = OpenClip(str(towers.folder_of("clip")), image_size=48)
    assert backbone.image_size == 48
    assert backbone.encode_image(torch.rand(2, 3, 48, 48)).shape == (2, 24)


def test_the_carried_model_loads():
    backbone = OpenClip("kshot:glyph_clip")
    assert (backbone.image_size, backbone.feature_dim, backbone.context_length) == (32, 128, 40)
    assert len(backbone.slots()) == 6 * (6 + 3)
    tokens = backbone.tokenize(["the letter a"])
    torch.testing.assert_close(backbone.encode_tokens(tokens), backbone.clip.encode_text(tokens), rtol=1e-5, atol=1e-5)
