"""Features of chosen tokens: against the libraries' own layers and a hand-written reference, in runs, and refusals."""

import json
from pathlib import Path

import open_clip
import pytest
import torch
import towers
from command_line import TINY_VIT, fit, refused, run_test

from kshot.adapters import LoRA
from kshot.backbones import OpenClip, Timm
from kshot.backbones.open_clip import WEIGHTS
from kshot.backbones.tokens import PARTS
from kshot.classifiers import VPT, CoOp, DePT, LinearProbe, MaPLe, Task, TextPrompt, TipAdapter
from kshot.errors import UserError
from kshot.slots import projections_of

GLYPH = WEIGHTS / "glyph_clip"
FOUR = {  # towers with as many blocks as features can join
    "vit": towers.vit(depth=4),
    "dinov2": towers.vit("vit_small_patch14_reg4_dinov2", depth=4),
    "dinov3": towers.vit("vit_small_patch16_dinov3", depth=4),
}
towers.PUBLISHED.update({f"four_{name}": layout for name, layout in FOUR.items()})


def normalised(backbone, count=2):
    return (towers.images(backbone, count) - backbone.mean) / backbone.std


def dinov2s(layers, blocks, mean):
    """DINOv2's ``create_linear_input`` (dinov2/eval/linear.py): class tokens of blocks, then the mean of patches."""
    output = torch.cat([first[:, 0] for _, first in layers[-blocks:]] if blocks else [layers[-1][0].mean(1)], -1)
    return torch.cat((output, layers[-1][0].mean(1)), -1) if blocks and mean else output


@pytest.mark.parametrize("features", PARTS)
@pytest.mark.parametrize("name", FOUR)
def test_equals_timms_intermediate_layers(name, features):
    backbone = Timm(f"local-dir:{towers.folder_of(f'four_{name}')}", image_size=48, features=features)
    assert backbone.settings()["features"] == features
    image, original = normalised(backbone), towers.original(f"four_{name}")
    options = {
        "indices": 4,
        "return_prefix_tokens": True,
        "norm": True,
        "output_fmt": "NLC",
        "intermediates_only": True,
    }
    with torch.no_grad():
        expected = dinov2s(original.forward_intermediates(image, **options), *PARTS[features])
        given = backbone.encode_image(towers.images(backbone, 2))
    assert given.shape == (2, backbone.feature_dim)
    assert backbone.feature_dim == sum(PARTS[features]) * original.embed_dim
    assert towers.relative(given, expected) < 1e-5


@pytest.mark.parametrize("features", PARTS)
def test_equals_get_intermediate_layers_and_a_hand_written_pass(features):
    backbone = Timm("test_vit", weights="random", image_size=32, features=features)
    vit, image = backbone.vit, normalised(backbone)
    with torch.no_grad():
        layers = vit.get_intermediate_layers(image, n=4, return_prefix_tokens=True, norm=True)
        x, states = vit.norm_pre(vit._pos_embed(vit.patch_embed(image))), []
        for block in vit.blocks:
            x = block(x)
            states.append(vit.norm(x))
        by_hand = dinov2s([(y[:, 1:], y[:, :1]) for y in states], *PARTS[features])
        given = backbone.encode_image(towers.images(backbone, 2))
    assert torch.equal(given, dinov2s(layers, *PARTS[features]))
    assert torch.equal(given, by_hand)


@pytest.fixture(scope="module")
def visual() -> torch.nn.Module:
    """The library's image tower of the small CLIP."""
    return open_clip.create_model(f"local-dir:{GLYPH}").eval().visual


@pytest.mark.parametrize("features", PARTS)
def test_open_clip_equals_its_intermediates_and_a_hand_written_pass(visual, features):
    backbone = OpenClip("kshot:glyph_clip", features=features)
    assert backbone.feature_dim == sum(PARTS[features]) * 192
    image = normalised(backbone)
    with torch.no_grad():
        found = visual.forward_intermediates(
            image, normalize_intermediates=True, intermediates_only=True, output_fmt="NLC", output_extra_tokens=True
        )
        layers = list(zip(found["image_intermediates"], found["image_intermediates_prefix"], strict=True))
        x, states = visual._embeds(image), []
        for block in visual.transformer.resblocks:
            x = block(x)
            states.append(visual.ln_post(x))
        given = backbone.encode_image(towers.images(backbone, 2))
    for expected in (layers, [(y[:, 1:], y[:, :1]) for y in states]):
        assert towers.relative(given, dinov2s(expected, *PARTS[features])) < 1e-5


def test_the_class_token_of_open_clip_is_what_it_projects():
    default, token = OpenClip("kshot:glyph_clip"), OpenClip("kshot:glyph_clip", features="cls")
    image = towers.images(default)
    with torch.no_grad():
        projected = token.encode_image(image) @ token.clip.visual.proj
        assert towers.relative(projected, default.encode_image(image)) < 1e-5


def test_a_tower_of_timm_in_open_clip():
    backbone = OpenClip(str(towers.folder_of("siglip")), features="mean")
    original = towers.original("siglip").visual.trunk
    image = normalised(backbone)
    with torch.no_grad():
        expected = original.forward_intermediates(image, norm=True, output_fmt="NLC", intermediates_only=True)[-1].mean(
            1
        )
        assert towers.relative(backbone.encode_image(towers.images(backbone, 2)), expected) < 1e-5


def test_the_default_is_what_it_was():
    for name in ("clip", "vit_dinov2"):
        assert towers.backbone(name).features == "default"
    assert torch.equal(
        Timm(f"local-dir:{towers.folder_of('vit')}").encode_image(towers.images(towers.backbone("vit"))),
        towers.encode(towers.backbone("vit"), "image"),
    )


def test_adapters_reach_all_chosen_tokens():
    backbone = Timm("test_vit", weights="random", image_size=32, features="last4+mean")
    before = backbone.encode_image(towers.images(backbone))
    LoRA(rank=2).attach(backbone, ["*.q", "*.fc2"])
    for layer in backbone.layers().values():
        for parameter in layer.parameters():
            torch.nn.init.normal_(parameter)
    after = backbone.encode_image(towers.images(backbone))
    assert (after - before).abs().amin(0).max() > 0
    after.square().sum().backward()
    assert all(p.grad is not None for p in backbone.trainable("image"))
    with backbone.unadapted():
        assert torch.equal(backbone.encode_image(towers.images(backbone)), before)
    assert projections_of(backbone)


class TestRefusals:
    @pytest.mark.parametrize("head", [TextPrompt, CoOp, TipAdapter, MaPLe, DePT, VPT])
    def test_what_compares_with_texts_or_prompts_the_image_tower(self, head):
        backbone = OpenClip("kshot:glyph_clip", features="cls")
        with pytest.raises(UserError, match="features: ") as error:
            head(backbone, Task(["cat", "dog"], ["a {}"]))
        assert "default" in str(error.value)
        assert "\n" not in str(error.value)

    def test_vpt_on_a_vision_transformer(self):
        with pytest.raises(UserError, match=r"VPT puts learned tokens .* with features: default only"):
            VPT(Timm("test_vit", weights="random", features="mean"), Task(["cat", "dog"], ["a {}"]))

    @pytest.mark.parametrize(
        ("name", "features", "expected"),
        [
            ("vit", "last4", "joins 4 blocks, and .* has 2"),
            ("vit_no_bias", "cls", "needs a class token, which .* has not: use mean"),
            ("vit", "patches", "'patches' is none of default, cls, mean"),
        ],
    )
    def test_timm(self, name, features, expected):
        with pytest.raises(UserError, match=expected):
            Timm(f"local-dir:{towers.folder_of(name)}", features=features)

    def test_pool_belongs_to_the_default(self):
        with pytest.raises(UserError, match="pool: avg says how features: default are pooled, and features is cls"):
            Timm("test_vit", weights="random", pool="avg", features="cls")

    @pytest.mark.parametrize(("name", "features"), [("resnet", "mean"), ("clip", "last4")])
    def test_open_clip(self, name, features):
        with pytest.raises(UserError, match=f"features: {features}"):
            OpenClip(str(towers.folder_of(name)), features=features)


PROBE = ("--model.classifier", "LinearProbe", "--model.adapter", "null")


@pytest.fixture(scope="module")
def probe(tmp_path_factory, few_scans) -> Path:
    """The directory of a run of CLIP; nobody writes into it."""
    root = tmp_path_factory.mktemp("probe")
    return fit(root, *few_scans, "--model.backbone.features", "last4+mean", *PROBE)


class TestRuns:
    @pytest.mark.parametrize("backbone", ["clip", "vit"])
    def test_a_probe_of_four_blocks(self, backbone, probe, tmp_path, few_scans):
        vit = [*TINY_VIT, "--model.backbone.image_size", "32", "--model.backbone.features", "last4+mean"]
        directory = probe if backbone == "clip" else fit(tmp_path, *few_scans, *vit, *PROBE)
        result = json.loads((directory / "result.json").read_text())
        width = 192 if backbone == "clip" else 64
        assert result["trainable_parameters"] == 3 * (5 * width + 1)
        assert run_test(directory, tmp_path / "again")["acc"] == result["acc"]

    def test_a_checkpoint_of_other_features_does_not_fit(self, probe, tmp_path, capsys):
        words = ["test", "--config", str(probe / "config.yaml"), "--ckpt_path", str(probe / "tuned.safetensors")]
        line = refused(capsys, [*words, "--model.backbone.features", "mean", "--run.root", str(tmp_path)])
        assert "model.backbone.features last4+mean, and" in line

    def test_a_text_classifier_is_refused_in_one_line(self, tmp_path, capsys):
        words = ["fit", "--config", "clip_16shot.yaml", "--run.root", str(tmp_path), "--model.backbone.features", "cls"]
        assert "have no texts to compare with" in refused(capsys, words)


def test_a_linear_probe_takes_any():
    for features, parts in PARTS.items():
        backbone = OpenClip("kshot:glyph_clip", features=features)
        head = LinearProbe(backbone, Task(["cat", "dog"], ["a {}"]))
        assert head(backbone.encode_image(towers.images(backbone))).shape == (3, 2)
        assert sum(parts) * 192 == backbone.feature_dim
