"""The weights' own preprocessing against the transforms of open_clip and timm, and what a run makes of it."""

import json
import random
from dataclasses import replace

import numpy as np
import open_clip
import pytest
import timm
import torch
import towers
from data_fixtures import parted_folder
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image
from timm.data import create_transform, resolve_data_config
from torchvision.transforms import Compose, Normalize, ToTensor
from torchvision.transforms.functional import pil_to_tensor

from kshot.backbones import OpenClip, Preprocessing, Timm
from kshot.data import CropFlip, FewShotDataModule
from kshot.data.images import to_rgb
from kshot.data.transforms import MOST, evaluation_view
from kshot.errors import UserError

SIZES = ((1, 1), (3, 500), (500, 3), (40, 30), (31, 47), (32, 32), (33, 32))
MODES = ("L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16", "F", "1", "HSV", "I")
OPEN_CLIP = (
    {},  # CLIP
    {"resize_mode": "squash", "mean": (0.5,) * 3, "std": (0.5,) * 3},  # SigLIP
    {"resize_mode": "squash", "interpolation": "bilinear"},
    {"resize_mode": "longest", "fill_color": 128},
    {"resize_mode": "longest", "interpolation": "bilinear", "mean": 0.4, "std": 0.2},
    {"interpolation": "random"},
)
TIMM = (
    {"crop_pct": 1.0, "interpolation": "bicubic"},
    {"crop_pct": 0.9, "interpolation": "bicubic", "mean": (0.5,) * 3, "std": (0.5,) * 3},
    {"crop_pct": 0.875, "interpolation": "bilinear"},
    {"crop_pct": 0.95, "interpolation": "lanczos", "crop_mode": "squash"},
    {"crop_pct": 1.0, "interpolation": "bicubic", "crop_mode": "border"},
    {"crop_pct": 0.8, "interpolation": "nearest", "crop_mode": "border"},
)


def picture(width, height, mode="RGB", seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    if mode == "I;16":
        return Image.fromarray(pixels[..., 0].astype(np.uint16) * 257)
    if mode == "RGBA":
        image.putalpha(Image.fromarray(pixels[..., 1]))
        return image
    return image.convert("L").convert(mode) if mode in {"LA", "F", "I"} else image.convert(mode)


ODD = [picture(*size, mode, seed) for seed, (size, mode) in enumerate((s, "RGB") for s in SIZES)]
ODD += [picture(*size, mode, seed) for seed, mode in enumerate(MODES) for size in ((37, 23), (20, 61))]
ODD += [picture(2, 7, "1")]


def before_normalising(transform, mean, std):
    """A library's transform without its last two steps, so that it gives uint8."""
    *steps, last, normalise = transform.transforms
    assert isinstance(last, ToTensor) or "ToTensor" in type(last).__name__
    assert isinstance(normalise, Normalize)
    torch.testing.assert_close(torch.as_tensor(normalise.mean), torch.tensor(mean), rtol=0, atol=0)
    torch.testing.assert_close(torch.as_tensor(normalise.std), torch.tensor(std), rtol=0, atol=0)
    return Compose([*steps, pil_to_tensor])


def libraries_view(transform, image):
    """What the library makes of an image; None where it fails because a side gets no pixel."""
    try:
        return transform(image)
    except ValueError:
        return None


def checked_view(image, mine, theirs):
    """Our view of an image, once it equals the library's."""
    expected, view = libraries_view(theirs, to_rgb(image)), evaluation_view(to_rgb(image), mine)
    assert view.shape == (3, mine.size, mine.size)
    if expected is None:
        assert mine.resize == "longest"
        assert mine.size * min(image.size) < max(image.size)
    else:
        assert torch.equal(view, expected), image
    return view


def test_there_are_thirty_odd_images():
    assert len(ODD) == 30


@pytest.mark.parametrize("size", [32, 224])
@pytest.mark.parametrize("changes", OPEN_CLIP, ids=str)
def test_equals_open_clips_transform_to_the_bit(changes, size):
    config = PreprocessCfg(size=size, **changes)
    mine = Preprocessing.of_open_clip(vars(config), size)
    theirs = before_normalising(image_transform_v2(config, is_train=False), mine.mean, mine.std)
    for image in ODD:
        view = checked_view(image, mine, theirs)
        if image.mode == "L":  # which open_clip turns into RGB last
            assert torch.equal(view, theirs(image))


@pytest.mark.parametrize("size", [32, 224])
@pytest.mark.parametrize("changes", TIMM, ids=str)
def test_equals_timms_transform_to_the_bit(changes, size):
    config = resolve_data_config(changes, {"mean": (0.1, 0.2, 0.3)}) | {"input_size": (3, size, size)}
    mine = Preprocessing.of_timm(config, size)
    theirs = before_normalising(create_transform(**config, is_training=False), mine.mean, mine.std)
    for image in ODD:
        checked_view(image, mine, theirs)


@pytest.mark.parametrize("size", [(2100, 2), (2, 2100), (1101, 1), (1, 1101), (4001, 3), (3, 4001)])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear", "nearest"])
def test_what_is_cropped_before_it_is_resized_is_the_same(size, interpolation):
    mine = Preprocessing(64, interpolation=interpolation)
    width, height = mine.resized(*size)
    assert width * height > MOST, "the case tests nothing"
    image = picture(*size)
    whole = image.resize((width, height), Image.Resampling[interpolation.upper()])
    left, top = round((width - 64) / 2), round((height - 64) / 2)
    expected = pil_to_tensor(whole.crop((left, top, left + 64, top + 64)))
    assert torch.equal(evaluation_view(image, mine), expected)


def test_extreme_shapes_take_little_memory(monkeypatch):
    most, resize = [], Image.Image.resize

    def measured(image, size, *args):
        most.append(size[0] * size[1])
        return resize(image, size, *args)

    monkeypatch.setattr(Image.Image, "resize", measured)
    for size in ((4096, 1), (1, 4096)):
        assert evaluation_view(Image.new("RGB", size, (9, 8, 7)), Preprocessing(64))[:, 5, 5].tolist() == [9, 8, 7]
    assert max(most) <= MOST


class TestFit:
    def test_the_weights_own_by_default(self):
        own = Preprocessing(8, resize="longest", crop=0.9, fill=(1, 2, 3))
        assert own.fitted(None) is own
        assert own.fitted("pad") is own

    def test_a_wide_image_is_cropped_padded_or_squashed(self):
        image = Image.new("RGB", (90, 30), "red")
        image.paste("blue", (30, 0, 60, 30))
        own = Preprocessing(30, mean=(0.2, 0.4, 0.6))
        crop, pad, squash = (evaluation_view(image, own.fitted(fit)) for fit in ("crop", "pad", "squash"))
        assert {tuple(p) for p in crop.flatten(1).T.tolist()} == {(0, 0, 255)}
        assert pad[:, 0, 15].tolist() == [51, 102, 153], "the mean colour"
        assert (pad[:, 15, 2].tolist(), pad[:, 15, 15].tolist()) == ([255, 0, 0], [0, 0, 255])
        assert (squash[:, 2, 2].tolist(), squash[:, 28, 15].tolist()) == ([255, 0, 0], [0, 0, 255])

    def test_nothing_is_lost_of_what_is_padded_or_squashed(self):
        own = Preprocessing(30, crop=0.5)
        assert [own.fitted(fit).crop for fit in ("crop", "pad", "squash")] == [0.5, 1, 1]

    @pytest.mark.parametrize("fit", ["stretch", ""])
    def test_no_way_to_fit(self, fit):
        with pytest.raises(UserError, match="fit must be one of crop, pad, squash, or null"):
            FewShotDataModule("digits", fit=fit)


@pytest.mark.parametrize(
    "settings", [{"resize": "stretch"}, {"interpolation": "random"}, {"crop": 0}, {"crop": float("nan")}], ids=str
)
def test_values_without_a_meaning(settings):
    with pytest.raises(UserError, match=f"preprocessing: {next(iter(settings))} "):
        Preprocessing(**settings)


class TestBackbones:
    @pytest.mark.parametrize("name", ["ViT-B-16-SigLIP", "ViT-B-32"])
    def test_open_clip(self, name, monkeypatch):
        config = {"resize_mode": "squash", "interpolation": "bilinear"} if "SigLIP" in name else {}
        folder = towers.folder_of("clip")
        create = open_clip.create_model

        def with_config(*args, **options):
            model = create(*args, **options)
            model.visual.preprocess_cfg = model.visual.preprocess_cfg | config
            return model

        monkeypatch.setattr(open_clip, "create_model", with_config)
        given = OpenClip(str(folder)).preprocessing
        expected = ("squash", "bilinear") if config else ("shortest", "bicubic")
        assert (given.size, given.resize, given.interpolation, given.crop) == (32, *expected, 1.0)

    def test_open_clip_reads_the_config_of_a_folder(self, tmp_path):
        source = towers.folder_of("clip")
        config = json.loads((source / "open_clip_config.json").read_text())
        config["preprocess_cfg"] = config.get("preprocess_cfg", {}) | {"resize_mode": "longest", "fill_color": 7}
        (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
        for file in source.iterdir():
            if file.name != "open_clip_config.json":
                (tmp_path / file.name).symlink_to(file)
        given = OpenClip(str(tmp_path)).preprocessing
        assert (given.resize, given.fill) == ("longest", (7, 7, 7))

    def test_timm(self):
        given = Timm("test_vit", weights="random").preprocessing
        config = timm.data.resolve_model_data_config(timm.create_model("test_vit"))
        assert given == Preprocessing.of_timm(config, config["input_size"][-1])
        assert given.crop == config["crop_pct"] == 0.95
        assert Timm("test_vit", weights="random", image_size=32).preprocessing == replace(given, size=32)

    def test_settings_are_plain_data(self):
        for backbone in (OpenClip(str(towers.folder_of("clip"))), Timm("test_vit", weights="random", pool="avg")):
            settings = json.loads(json.dumps(backbone.settings()))
            assert settings["preprocessing"]["size"] == backbone.image_size
            assert settings["features"] == "default"
        assert settings["pool"] == "avg"


class TestRuns:
    def test_images_are_made_as_the_backbone_wants_them(self, tmp_path):
        root = parted_folder(tmp_path / "pets", {"a": 2, "b": 2})
        wanted = Preprocessing(12, resize="squash", interpolation="bilinear", mean=(0.5,) * 3)
        data = FewShotDataModule(str(root), shots=1)
        data.use_preprocessing(wanted)
        for stage in ("fit", "test"):
            data.setup(stage)
        for part, loader in (("train", data.train_dataloader()), ("test", data.test_dataloader())):
            path = root / data.part(part).paths[0]
            batch = next(iter(loader))
            view = batch.image[batch.index.tolist().index(0)]
            assert torch.equal(view, evaluation_view(Image.open(path).convert("RGB"), wanted))

    def test_augmentation_uses_the_same_interpolation(self):
        image, whole = picture(40, 30), CropFlip(scale=(1, 1), ratio=(4 / 3, 4 / 3), flip=0)
        for interpolation in ("bicubic", "bilinear"):
            wanted = Preprocessing(16, interpolation=interpolation, resize="squash")
            assert torch.equal(whole(image, wanted, random.Random(0)), evaluation_view(image, wanted))

    def test_keys_of_features_tell_preprocessings_apart(self, tmp_path):
        root, keys = parted_folder(tmp_path / "pets", {"a": 2, "b": 2}), set()
        wanted = [Preprocessing(12), Preprocessing(12, crop=0.9), Preprocessing(12, resize="squash")]
        wanted += [Preprocessing(12, interpolation="bilinear"), Preprocessing(12, mean=(0.5,) * 3)]
        for each in wanted:
            data = FewShotDataModule(str(root), shots=1)
            data.use_preprocessing(each)
            data.setup("test")
            keys.add(str(data.part("test").context()))
        assert len(keys) == 4, "mean and deviation are the backbone's business"
        options = [{"fit": "pad"}, {"fit": "squash"}, {"exif": False}, {"background": [0, 0, 0]}, {"white": 255}]
        for option in options:
            data = FewShotDataModule(str(root), shots=1, image_size=12, **option)
            data.setup("test")
            keys.add(str(data.part("test").context()))
        assert len(keys) == 8, "squash is squash, whoever wants it"

    def test_open_images_are_not_passed_off_as_those_of_another_backbone(self, tmp_path):
        data = FewShotDataModule(str(parted_folder(tmp_path / "pets", {"a": 2, "b": 2})), shots=1)
        data.use_preprocessing(Preprocessing(12))
        data.setup("fit")
        data.use_preprocessing(Preprocessing(12, mean=(0.5,) * 3))
        with pytest.raises(UserError, match=r"images are open by .*shortest.*, the backbone takes .*squash"):
            data.use_preprocessing(Preprocessing(12, resize="squash"))
