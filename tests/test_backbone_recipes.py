"""``configs/backbones``: features, logits and preprocessing of each beside the library's own model, random weights.

Quick tests load tiny models of each kind under the published names, in the way that published weights are loaded; slow
ones build the true architectures. Tokenizers that lie on a hub have stand-ins of a few words, and their embeddings as
many rows: what is checked of them is how they are called, not the words that they know.
"""

import logging

import numpy as np
import open_clip
import pytest
import timm
import torch
import towers
import yaml
from command_line import BACKBONES, FOLDER, QUICK, refused
from open_clip import factory
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image

from kshot.adapters import LoRA
from kshot.backbones import OpenClip, Timm
from kshot.classifiers import Task, TextPrompt
from kshot.cli import main
from kshot.data.transforms import evaluation_view

SETTINGS = {
    config: yaml.safe_load((FOLDER / config).read_text())["model"]["init_args"]["backbone"] for config in BACKBONES
}
WITH_TEXT = [config for config, settings in SETTINGS.items() if settings["class_path"] == "OpenClip"]
IMAGE_ONLY = [config for config in BACKBONES if config not in WITH_TEXT]
TRUNKS = {"vit_base_patch16_siglip_224": "test_vit", "vit_pe_core_base_patch16_224": "vit_pe_core_tiny_patch16_384"}
IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CLIPS = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
HALF = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)
PREPROCESSING = {  # size, resize, interpolation, statistics, as the authors of the weights publish them
    "openai_b16": (224, "shortest", "bicubic", CLIPS),
    "pe_core_b16": (224, "squash", "bilinear", HALF),
    "siglip2_b16": (224, "squash", "bicubic", HALF),
    "metaclip2_h14": (224, "shortest", "bicubic", CLIPS),
    "dinov2_reg_s14": (224, "shortest", "bicubic", IMAGENET),
    "dinov2_reg_b14": (224, "shortest", "bicubic", IMAGENET),
    "dinov3_s16": (256, "shortest", "bicubic", IMAGENET),
    "dinov3_b16": (256, "shortest", "bicubic", IMAGENET),
}
SENTENCES = ["a photo of a cat.", "a photo of a yellow bird.", "a small dog in the rain."]


def stem(config):
    return config.removeprefix("backbones/").removesuffix(".yaml")


def larger_ones_are_slow(configs):
    larger = ("dinov2_reg_b14", "dinov3_b16")
    return [pytest.param(c, marks=[pytest.mark.slow] * (stem(c) in larger), id=stem(c)) for c in configs]


def own_tokenizer(config, folder):
    """The configuration of a model, with a stand-in for a tokenizer on a hub."""
    text = config["text_cfg"]
    if "hf_tokenizer_name" in text:
        folder.mkdir()
        text["vocab_size"] = towers.write_tokenizer(folder, towers.tokenizer_kind(text))
        text["hf_tokenizer_name"] = str(folder)
    return config


def tiny(config):
    """A configuration with tiny towers of the same kinds; pooling, projections, context and activations stay."""
    vision = config["vision_cfg"]
    config["text_cfg"] |= {"width": 32, "heads": 2, "layers": 2}
    if "timm_model_name" in vision:
        vision["timm_model_name"] = TRUNKS[vision["timm_model_name"]]
        vision["image_size"] = timm.get_pretrained_cfg(vision["timm_model_name"]).input_size[-1]
        if vision["timm_proj"] == "none":
            config["embed_dim"] = 64  # the width of that trunk
    else:
        vision |= {"layers": 2, "width": 2 * vision.get("head_width", 64), "image_size": 4 * vision["patch_size"]}
    return config


@pytest.fixture
def published(tmp_path, monkeypatch):
    """Lets a recipe's name and tag stand for a tiny model with weights in a file; gives the settings."""

    def publish(config):
        settings = SETTINGS[config]["init_args"]
        name = settings["model"]
        small = tiny(own_tokenizer(open_clip.get_model_config(name), tmp_path / "tokenizer"))
        monkeypatch.setitem(factory._MODEL_CONFIGS, name, small)
        logging.disable(logging.WARNING)  # "no weights": they are about to be written
        weights = tmp_path / "weights.pt"
        torch.save(towers.rough(open_clip.create_model(name).state_dict()), weights)
        logging.disable(logging.NOTSET)
        monkeypatch.setattr(factory, "download_pretrained", lambda *_, **__: str(weights))
        return settings

    return publish


def normalised(backbone):
    return (towers.images(backbone, 2) - backbone.mean) / backbone.std


def check_against(library, backbone, image):
    """Features of both towers, and logits, are those of the library's model, ``library()``, which may be asked once."""
    tokens = backbone.tokenize(SENTENCES)
    with torch.no_grad():
        mine = [backbone.encode_image(image), backbone.encode_tokens(tokens), backbone.logit_scale]
        prompts = TextPrompt(backbone, Task(("cat", "yellow bird"), ("a photo of a {}.",)))
        logits = prompts(mine[0])
        model = library()
        scaled = (image - backbone.mean) / backbone.std
        assert towers.relative(mine[0], model.encode_image(scaled)) < 1e-5
        assert towers.relative(mine[1], model.encode_text(tokens)) < 1e-5
        expected, _ = model.get_logits(scaled, tokens[:2])
        bias = 0.0 if model.logit_bias is None else float(model.logit_bias)
        assert towers.relative(logits, expected - bias) < 1e-5
        assert torch.allclose(logits.softmax(-1), expected.softmax(-1), atol=1e-5)
    return bias


def check_preparation(config, backbone, transform):
    """Images are prepared as the weights were trained, ``transform`` being the library's."""
    _, resize, interpolation, (mean, std) = PREPROCESSING[stem(config)]
    mine = backbone.preprocessing
    assert (mine.resize, mine.interpolation, mine.crop, tuple(mine.mean), tuple(mine.std)) == (
        resize, interpolation, 1.0, mean, std
    )  # fmt: skip
    for shape in ((300, 500), (500, 301), (40, 90)):
        picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8))
        view = (evaluation_view(picture, mine)[None] / 255 - backbone.mean) / backbone.std
        assert torch.allclose(view[0], transform(picture), atol=1e-6)


@pytest.mark.parametrize("config", WITH_TEXT, ids=stem)
def test_a_clip_like_is_the_librarys_own_model_and_its_preparation(config, published):
    name = SETTINGS[config]["init_args"]["model"]
    true = open_clip.get_model_config(name)
    settings = published(config)
    backbone = OpenClip(**settings)
    library = open_clip.create_model(name, pretrained=settings["pretrained"], require_pretrained=True)
    bias = check_against(library.eval, backbone, towers.images(backbone, 2))
    assert (bias != 0) == (stem(config) == "siglip2_b16")
    assert backbone.supports_prompts == (stem(config) != "siglip2_b16")
    assert bool(backbone.image_blocks) == (stem(config) != "pe_core_b16")  # with rotary positions
    assert backbone.context_length == true["text_cfg"]["context_length"]
    assert true["vision_cfg"]["image_size"] == PREPROCESSING[stem(config)][0]
    check_preparation(config, backbone, image_transform_v2(PreprocessCfg(**library.visual.preprocess_cfg), False))


@pytest.mark.parametrize("config", larger_ones_are_slow(IMAGE_ONLY))
def test_an_image_backbone_is_the_librarys_class_token_and_its_preparation(config):
    settings, size = SETTINGS[config]["init_args"], PREPROCESSING[stem(config)][0]
    backbone = Timm(**{**settings, "weights": "random"})
    assert backbone.image_size == size
    how = timm.data.resolve_data_config(args={"input_size": (3, size, size)}, model=backbone.vit)
    check_preparation(config, backbone, timm.data.create_transform(**how, is_training=False))
    image = towers.images(backbone, 1)
    original = timm.create_model(settings["model"], num_classes=0, dynamic_img_size=True).eval()
    LoRA(rank=1).attach(backbone, ["image.*.[qkv]", "image.*.fc?"])  # which changes nothing yet
    assert len(backbone.layers()) == 5 * 12
    with torch.no_grad():
        given, scaled = backbone.encode_image(image), (image - backbone.mean) / backbone.std
        backbone.detach()
        backbone.restore_library()
        original.load_state_dict(backbone.vit.state_dict())
        expected = original.forward_features(scaled)[:, 0]
        assert towers.relative(given, expected) < 1e-5
    assert backbone.feature_dim == expected.shape[1]
    assert original.num_prefix_tokens == 5  # a class token and four registers


@pytest.mark.slow  # gigabytes of random weights
@pytest.mark.parametrize("config", WITH_TEXT, ids=stem)
def test_a_clip_like_of_the_true_architecture_is_the_librarys_own_model(config, tmp_path, monkeypatch):
    name = SETTINGS[config]["init_args"]["model"]
    true = own_tokenizer(open_clip.get_model_config(name), tmp_path / "tokenizer")
    monkeypatch.setitem(factory._MODEL_CONFIGS, name, true)
    backbone = OpenClip(name, "random")
    image = towers.images(backbone, 1)
    slots = len(backbone.slots())

    def library():
        backbone.restore_library()  # the library's own modules with the same weights: there is room for them once
        return backbone.clip

    check_against(library, backbone, image)
    assert slots == 6 * (true["vision_cfg"].get("layers", 12) + true["text_cfg"]["layers"])
    assert backbone.image_size == PREPROCESSING[stem(config)][0]


@pytest.mark.parametrize("config", WITH_TEXT, ids=stem)
def test_a_run_with_the_recipe_laid_over_an_experiment(config, published, tmp_path, few_scans):
    published(config)
    options = [*QUICK, *few_scans, "--data.shots", "1", "--trainer.max_epochs", "1"]
    options += ["--model.backbone.image_size", "64"] * (stem(config) == "pe_core_b16")  # of 384 for the smallest trunk
    main(["fit", "--config", "clip_16shot.yaml", "--config", config, *options, "--run.root", str(tmp_path / "runs")])
    (directory,) = tmp_path.glob("runs/*/*")
    assert directory.parent.name == f"clip_16shot+{stem(config)}"
    assert (directory / "result.json").is_file()


@pytest.mark.parametrize(
    ("config", "method", "reason"),
    [
        ("backbones/siglip2_b16.yaml", "methods/coop.yaml", "it is not causal"),
        ("backbones/pe_core_b16.yaml", "methods/vpt.yaml", "no rotary positions"),
    ],
)
def test_what_a_recipe_says_cannot_be_is_refused(config, method, reason, published, capsys, tmp_path):
    published(config)
    arguments = ["fit", "--config", "clip_16shot.yaml", "--config", config, "--config", method]
    assert reason in refused(capsys, [*arguments, *QUICK, "--run.root", str(tmp_path / "runs")])
