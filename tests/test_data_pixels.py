"""How stored pixels become RGB: orientation, deep values, floats, transparency, and what the options change."""

import json
import logging

import numpy as np
import pytest
import torch
import yaml
from command_line import FIT, WHOLE, fit, refused
from data_fixtures import digits, parted_folder
from PIL import ExifTags, Image, ImageOps

from kshot.data import FewShotDataModule
from kshot.data.catalogue import CATALOGUE
from kshot.data.images import Decoding, FileImages, UnreadableImageError, decoding_of, read_image, to_rgb, white_of
from kshot.data.splits import Row
from kshot.errors import UserError

CORNERS = np.arange(4 * 6 * 3, dtype=np.uint8).reshape(4, 6, 3)


def turned(path, orientation):
    """An image of CORNERS that says how the camera was held."""
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(CORNERS).save(path, exif=exif)
    return path


def deep(path, values, kind=np.uint16):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(values, dtype=kind)).save(path)
    return path


def own(root, deep_value=None, **options):
    """A data module of a folder of two classes; with a value, of deep images that go up to it."""
    folder = parted_folder(root / "own", {"a": 2, "b": 2})
    if deep_value is not None:
        for i, file in enumerate(sorted(folder.rglob("*.png"))):
            deep(file, np.full((8, 8), deep_value - i))
    return FewShotDataModule(str(folder), **{"shots": 1, "image_size": 8} | options)


class TestOrientation:
    @pytest.mark.parametrize("orientation", range(10))
    @pytest.mark.parametrize("kind", ["png", "jpg", "webp", "tiff"])
    def test_is_undone_as_pillow_does(self, tmp_path, orientation, kind):
        file = turned(tmp_path / f"x.{kind}", orientation)
        with Image.open(file) as image:
            expected = ImageOps.exif_transpose(image).convert("RGB")
        assert np.array_equal(read_image(file, decoding=Decoding(exif=True)), expected)
        stored = read_image(file)
        assert kind == "tiff" or stored.size == (6, 4), "CLIP's own rule; Pillow itself turns a TIFF"

    def test_broken_exif_is_no_reason_to_lose_an_image(self, tmp_path):
        file = turned(tmp_path / "x.jpg", 6)
        content = file.read_bytes()
        at = content.index(b"Exif\0\0") + 6
        file.write_bytes(content[:at] + b"\xff" * 12 + content[at + 12 :])
        assert read_image(file, decoding=Decoding(exif=True)).size == (6, 4)

    def test_own_images_are_turned_and_those_of_the_catalogue_are_not(self):
        assert decoding_of(True, None, None, 255).exif
        assert not decoding_of(False, None, None, 255).exif
        assert [decoding_of(mine, exif, None, 255).exif for mine in (True, False) for exif in (True, False)] == [
            True,
            False,
        ] * 2

    @pytest.mark.parametrize(("exif", "upright"), [(None, True), (True, True), (False, False)])
    def test_in_training_test_and_prediction(self, tmp_path, exif, upright):
        data = own(tmp_path, exif=exif)
        for file in (tmp_path / "own").rglob("*.png"):
            turned(file, 3)
        data.images = [str(tmp_path / "own" / "test")]
        straight = own(tmp_path / "other")
        for file in (tmp_path / "other" / "own").rglob("*.png"):
            Image.fromarray(CORNERS[::-1, ::-1] if upright else CORNERS).save(file)
        straight.images = [str(tmp_path / "other" / "own" / "test")]
        for part, stage in (("train", "fit"), ("test", "test"), ("predict", "predict")):
            data.setup(stage)
            straight.setup(stage)
            assert torch.equal(data.part(part).images([(0, 0)]), straight.part(part).images([(0, 0)]))

    def test_a_name_of_the_catalogue_is_read_as_stored(self):
        data = digits()
        data.setup("fit")
        assert data.part("train").decoding == Decoding()
        assert all(entry.kind for entry in CATALOGUE.values())


class TestDeepValues:
    @pytest.mark.parametrize(
        ("largest", "white"),
        [(200, 255), (256, 1023), (1023, 1023), (3977, 4095), (4096, 16383), (20_000, 65535), (65535, 65535)],
    )
    def test_white_is_of_the_fewest_bits_that_hold_the_training_images(self, tmp_path, largest, white, caplog):
        with caplog.at_level(logging.INFO, "kshot"):
            data = own(tmp_path, largest)
            data.setup("fit")
            data.setup("test")
        trained = max(np.asarray(Image.open(tmp_path / "own" / row.path)).max() for row in data.draw.train)
        if trained == largest:
            assert data.part("train").decoding.white == white
        assert data.part("test").decoding.white == data.part("train").decoding.white
        told = [r.message for r in caplog.records if "more than 8 bits" in r.message]
        assert len(told) == 1, "said once"
        assert "data.white sets another" in told[0]

    def test_one_rule_for_all_images(self, tmp_path):
        """A dark image stays dark beside a bright one, in each part."""
        data = own(tmp_path, 4000)
        for part in ("train", "test"):
            deep(next(iter(sorted((tmp_path / "own" / part / "b").iterdir()))), np.full((8, 8), 400))
        data = FewShotDataModule(str(tmp_path / "own"), shots=None, image_size=8)
        data.setup("fit")
        data.setup("test")
        for part in ("train", "test"):
            values = data.part(part).images([(i, 0) for i in range(len(data.part(part)))]).amax((1, 2, 3))
            assert int(values.max()) == 249
            assert int(values.min()) == 25

    def test_the_option_wins(self, tmp_path):
        data = own(tmp_path, 4000, white=8000.0)
        data.setup("fit")
        assert int(data.part("train").images([(0, 0)]).max()) in range(125, 129)

    def test_floats_of_at_most_one(self, tmp_path):
        data = own(tmp_path)
        files = []
        for file in sorted((tmp_path / "own").rglob("*.png")):
            files.append(deep(file.with_suffix(".tiff"), [[0.0, 0.5], [1.0, np.nan]], np.float32))
            file.unlink()
        data = FewShotDataModule(str(tmp_path / "own"), shots=1, image_size=8)
        data.setup("fit")
        assert data.part("train").decoding.white == 1
        image = FileImages().open(str(files[0]), decoding=data.part("train").decoding)
        assert np.asarray(image)[..., 0].tolist() == [[0, 128], [255, 0]]

    @pytest.mark.parametrize("kind", [np.uint16, np.int32, np.float32])
    def test_kinds_agree(self, kind):
        values = np.array([[0, 7, 2000, 4095, 5000]])
        image = to_rgb(Image.fromarray(values.astype(kind)), Decoding(white=4095))
        assert np.asarray(image)[0, :, 0].tolist() == [0, 0, 125, 255, 255]

    def test_negative_values_and_infinities(self):
        values = np.array([[-3, np.inf, -np.inf, np.nan, 0.5]], dtype=np.float32)
        image = to_rgb(Image.fromarray(values), Decoding(white=1))
        assert np.asarray(image)[0, :, 0].tolist() == [0, 255, 0, 0, 128]

    def test_only_files_that_may_be_deep_are_opened(self, tmp_path, monkeypatch):
        class Entry:
            def images(self, *_):
                return FileImages(tmp_path)

        rows = [Row(f"{i}.{kind}", 0, "") for i, kind in enumerate(("jpg", "JPEG", "webp", "bmp", "gif"))]
        monkeypatch.setattr(Image, "open", None)
        assert white_of(Entry(), "", rows) == 65535

    def test_without_the_training_images_nothing_is_guessed(self, tmp_path):
        data = own(tmp_path, 4000)
        for file in (tmp_path / "own" / "train").rglob("*.png"):
            file.write_bytes(b"")
        data.setup("test")
        with pytest.raises(UnreadableImageError, match=r"which value is white is not known: set --data\.white"):
            data.part("test").images([(0, 0)])
        data = FewShotDataModule(str(tmp_path / "own"), shots=1, image_size=8, white=4095)
        data.setup("test")
        assert int(data.part("test").images([(0, 0)]).max()) > 240

    @pytest.mark.parametrize("white", [0, -1, float("nan"), float("inf")])
    def test_a_white_without_a_meaning(self, white):
        with pytest.raises(UserError, match="white must be a positive number"):
            digits(white=white)


class TestTransparency:
    def image(self, kind):
        """The left half is opaque red; the right half hides green."""
        image = Image.new("RGBA", (4, 2), (255, 0, 0, 255))
        image.paste((0, 255, 0, 0), (2, 0, 4, 2))
        if kind == "LA":
            return image.convert("LA")
        if kind == "palette":
            palette = Image.new("P", (4, 2), 0)
            palette.putpalette([255, 0, 0, 0, 255, 0])
            palette.paste(1, (2, 0, 4, 2))
            palette.info["transparency"] = 1
            return palette
        if kind == "key":
            image = image.convert("RGB")
            image.info["transparency"] = (0, 255, 0)
        return image

    @pytest.mark.parametrize("kind", ["RGBA", "LA", "palette", "key"])
    def test_lies_on_the_background(self, tmp_path, kind):
        image = self.image(kind)
        image.save(tmp_path / "x.png", **({"transparency": image.info["transparency"]} if image.info else {}))
        for colour in ((255, 255, 255), (10, 20, 30)):
            read = read_image(tmp_path / "x.png", decoding=Decoding(background=colour))
            assert read.mode == "RGB"
            assert read.getpixel((3, 0)) == colour
            assert read.getpixel((0, 0)) == ((255, 0, 0) if kind != "LA" else (76, 76, 76))
        assert read_image(tmp_path / "x.png").getpixel((3, 0)) != (10, 20, 30), "CLIP's own rule"

    def test_half_transparent(self):
        read = to_rgb(Image.new("RGBA", (1, 1), (0, 0, 0, 51)), Decoding(background=(255, 255, 255)))
        assert read.getpixel((0, 0)) == (204, 204, 204)

    def test_white_under_own_images_and_nothing_under_the_catalogues(self):
        assert decoding_of(True, None, None, 255).background == (255, 255, 255)
        assert decoding_of(False, None, None, 255).background is None
        assert decoding_of(False, None, [1, 2, 3], 255).background == (1, 2, 3)

    def test_opaque_images_keep_their_bits(self):
        pixels = np.random.default_rng(0).integers(0, 256, (9, 7, 3), dtype=np.uint8)
        image = Image.fromarray(pixels).convert("RGBA")
        assert np.array_equal(np.asarray(to_rgb(image, Decoding(background=(255, 255, 255)))), pixels)

    @pytest.mark.parametrize("colour", [[1, 2], [0, 0, 256], [-1, 0, 0]])
    def test_no_colour(self, colour):
        with pytest.raises(UserError, match=r"background must be three values in 0 \.\.\. 255"):
            digits(background=colour)


def test_cmyk_is_pillows_conversion():
    image = Image.new("CMYK", (2, 2), (10, 200, 30, 40))
    assert to_rgb(image) == image.convert("RGB")


class TestCommandLine:
    """Rows F9 to F13 of a user's folder: what a run makes of it, from the words of a command line."""

    @pytest.fixture
    def folder(self, tmp_path):
        """Two classes of awkward images, three of each for training and two for the test."""
        for part, count in (("train", 3), ("test", 2)):
            for label in "ab":
                place = tmp_path / "photos" / part / label
                deep(place / "deep.png", np.full((9, 7), 4000 if label == "a" else 100))
                turned(place / "phone.jpg", 6)
                Image.new("RGBA", (20, 10), (255, 0, 0, 0)).save(place / "hole.png")
                if count == 3:
                    continue
                Image.new("RGB", (3000, 1), "blue").save(place / "line.png")
        return tmp_path / "photos"

    def run(self, folder, root, *options):
        words = ["--data.dataset", str(folder), "--data.shots", "null", "--data.augment", "null", *options]
        return fit(root, *words, *WHOLE, "--model.adapter", "null", "--model.classifier", "NearestClassMean")

    def test_a_folder_of_awkward_images(self, folder, tmp_path, caplog):
        with caplog.at_level(logging.INFO, "kshot"):
            directory = self.run(folder, tmp_path / "runs")
        assert json.loads((directory / "result.json").read_text())["acc"] == 5 / 8, "with all eight images read"
        told = {r.message for r in caplog.records if "more than 8 bits" in r.message}
        assert told == {
            "Images of more than 8 bits: 4095 is white (the training images go up to 4000); data.white sets another."
        }

    def test_options(self, folder, tmp_path):
        options = ["--data.fit", "pad", "--data.exif", "false", "--data.background", "[0, 0, 0]", "--data.white", "5e3"]
        config = yaml.safe_load((self.run(folder, tmp_path / "runs", *options) / "config.yaml").read_text())
        given = config["data"]["init_args"]
        assert [given[name] for name in ("fit", "exif", "background", "white")] == ["pad", False, [0, 0, 0], 5000.0]

    @pytest.mark.parametrize(
        ("options", "expected"),
        [
            (["--data.fit", "stretch"], "fit"),
            (["--data.exif", "auto"], "exif"),
            (["--data.background", "[1, 2]"], "background must be three values in 0 ... 255, not [1, 2]"),
            (["--data.white", "0"], "white must be a positive number, not 0"),
        ],
    )
    def test_refusals(self, capsys, options, expected):
        assert expected in refused(capsys, [*FIT, *options])

    def test_an_image_beyond_the_limits(self, folder, tmp_path, capsys):
        Image.new("1", (100_000, 2)).save(folder / "train" / "a" / "long.png")
        words = [*FIT, "--data.dataset", str(folder), "--data.shots", "null", "--run.root", str(tmp_path / "runs")]
        line = refused(capsys, words)
        assert "long.png': 100000 x 2 pixels, but a side may have 4096 of the other" in line
