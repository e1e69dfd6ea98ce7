"""Decoding, the evaluation transform against torchvision's, and augmentation."""

import random

import numpy as np
import pytest
import torch
from data_fixtures import rows_of, save_image
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torchvision.transforms import CenterCrop, Compose, InterpolationMode, PILToTensor, RandomResizedCrop, Resize

from kshot.backbones import Preprocessing
from kshot.data.images import ArrayImages, FileImages, UnreadableImageError, to_rgb
from kshot.data.loading import EpochSampler
from kshot.data.parts import Part
from kshot.data.transforms import CropFlip, evaluation_view, limit_size, to_tensor
from kshot.errors import UserError


def noise(width, height, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


@given(st.integers(1, 90), st.integers(1, 90), st.integers(1, 48))
def test_the_evaluation_view_is_clips(width, height, size):
    image = noise(width, height)
    reference = Compose([Resize(size, InterpolationMode.BICUBIC), CenterCrop(size), PILToTensor()])
    result = evaluation_view(image, Preprocessing(size))
    assert result.dtype == torch.uint8
    assert result.shape == (3, size, size)
    assert torch.equal(result, reference(image))


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "I;16", "I", "F"])
def test_every_mode_becomes_rgb(mode):
    image = Image.new(mode, (6, 5))
    assert (to_rgb(image).mode, to_rgb(image).size) == ("RGB", (6, 5))


def test_sixteen_bits_are_scaled_and_not_clipped(tmp_path):
    Image.fromarray(np.array([[0, 0x8000, 0xFFFF]], dtype=np.uint16)).save(tmp_path / "x.png")
    assert [p[0] for p in np.asarray(FileImages(tmp_path).open("x.png"))[0]] == [0, 128, 255]


class TestUnreadable:
    @pytest.fixture
    def folder(self, tmp_path):
        save_image(tmp_path / "good.png")
        (tmp_path / "text.png").write_text("no image at all")
        (tmp_path / "empty.jpg").write_bytes(b"")
        for name in ("cut.png", "cut.jpg"):
            content = save_image(tmp_path / name, size=(64, 64)).read_bytes()
            (tmp_path / name).write_bytes(content[: len(content) // 2])
        return tmp_path

    @pytest.mark.parametrize("name", ["text.png", "empty.jpg", "cut.png", "cut.jpg"])
    @pytest.mark.parametrize("draft", [False, True])
    def test_names_the_file(self, folder, name, draft):
        with pytest.raises(UserError, match=f"cannot read the image '.*{name}': ") as error:
            FileImages(folder).open(name, draft)
        assert "\n" not in str(error.value)
        FileImages(folder).open("good.png", draft)

    def test_missing(self, folder):
        with pytest.raises(UserError, match=r"no such image: '.*none.png'"):
            FileImages(folder).open("none.png")

    def test_index_out_of_range(self):
        with pytest.raises(UserError, match="there is no image 3: the data set has 2"):
            ArrayImages(lambda: [1, 2], lambda _: noise(2, 2)).open("3")

    def test_message_survives_a_worker_process(self):
        text = "Caught UnreadableImageError in DataLoader worker process 0.\nOriginal Traceback:\n  File x\n"
        error = UnreadableImageError(f"{text}kshot.data.images.UnreadableImageError: cannot read 'x'\n")
        assert str(error) == "cannot read 'x'"


class TestCropFlip:
    def test_a_view_depends_on_seed_index_and_view_only(self):
        images = ArrayImages(lambda: [noise(40, 30), noise(40, 30)], lambda image: image)
        rows = [row._replace(path=str(i)) for i, row in enumerate(rows_of({0: 2}))]
        part = Part(images, rows, Preprocessing(16), augment=CropFlip(), seed=1)
        random.seed(5)
        torch.manual_seed(5)
        states = random.getstate(), torch.get_rng_state()
        first = part.__getitems__([(0, 0), (0, 1), (1, 0), (0, 0)]).image
        assert random.getstate() == states[0]
        assert torch.equal(torch.get_rng_state(), states[1])
        assert torch.equal(first[0], first[3])
        # the two images are equal: what differs is the view
        assert not torch.equal(first[0], first[1])
        assert not torch.equal(first[0], first[2])
        again = Part(images, rows, Preprocessing(16), augment=CropFlip(), seed=1)
        assert torch.equal(again.__getitems__([(1, 0)]).image[0], first[2])
        other = Part(images, rows, Preprocessing(16), augment=CropFlip(), seed=2)
        assert not torch.equal(other.__getitems__([(0, 0)]).image[0], first[0])

    def test_without_crop_and_flip_it_is_resizing(self):
        image = noise(32, 32)
        view = CropFlip(scale=(1, 1), ratio=(1, 1), flip=0)(image, Preprocessing(16), random.Random(0))
        assert torch.equal(view, evaluation_view(image, Preprocessing(16)))
        flipped = CropFlip(scale=(1, 1), ratio=(1, 1), flip=1)(image, Preprocessing(16), random.Random(0))
        assert torch.equal(flipped.flip(2), view)

    @given(st.integers(1, 300), st.integers(1, 300), st.integers())
    def test_crops_lie_inside(self, width, height, seed):
        left, top, w, h = CropFlip().crop(width, height, random.Random(seed))
        assert 0 <= left < left + w <= width
        assert 0 <= top < top + h <= height

    @pytest.mark.parametrize("ratio", [(3 / 4, 4 / 3), (1 / 4, 4)])
    def test_crops_are_distributed_as_torchvisions(self, ratio):
        augment, stream = CropFlip(ratio=ratio), random.Random(0)
        ours = np.array([augment.crop(100, 80, stream) for _ in range(4000)], dtype=float)
        torch.manual_seed(0)
        empty = torch.empty(3, 80, 100)
        theirs = [RandomResizedCrop.get_params(empty, augment.scale, augment.ratio) for _ in range(4000)]
        theirs = np.array([(left, top, w, h) for top, left, h, w in theirs], dtype=float)
        standard_error = theirs.std(0) / 4000**0.5
        assert (np.abs(ours.mean(0) - theirs.mean(0)) < 6 * standard_error).all()
        assert np.allclose(ours.std(0), theirs.std(0), rtol=0.07)

    def test_half_are_mirrored(self):
        gradient = Image.fromarray(np.tile(np.arange(64, dtype=np.uint8), (64, 1))).convert("RGB")
        views = [CropFlip()(gradient, Preprocessing(8), random.Random(i)) for i in range(400)]
        mirrored = sum(bool(view[0, 0, 0] > view[0, 0, -1]) for view in views)
        assert 150 < mirrored < 250

    @pytest.mark.parametrize(
        "settings", [{"scale": (0, 1)}, {"scale": (0.5, 0.2)}, {"scale": (0.5, 2)}, {"ratio": (2, 1)}, {"flip": 1.5}]
    )
    def test_settings_without_a_meaning(self, settings):
        with pytest.raises(UserError, match=f"{next(iter(settings))} must be"):
            CropFlip(**settings)


class TestPart:
    def test_memory_is_bounded_when_augmenting(self):
        images = ArrayImages(lambda: [noise(400, 200), noise(20, 10)], lambda image: image)
        rows = [row._replace(path=str(i)) for i, row in enumerate(rows_of({0: 2}))]
        part = Part(images, rows, Preprocessing(16), augment=CropFlip())
        assert [a.shape for a in part.arrays] == [(32, 64, 3), (10, 20, 3)]

    def test_limit_size_keeps_small_images(self):
        image = noise(20, 10)
        assert limit_size(image, 10, Image.Resampling.BICUBIC) is image
        assert limit_size(noise(1000, 3), 1, Image.Resampling.BICUBIC).size == (333, 1)

    @pytest.mark.parametrize("lazy", [False, True])
    def test_unreadable_images_stop_or_are_left_out(self, tmp_path, lazy):
        rows = rows_of({0: 3, 1: 2})
        for i, row in enumerate(rows):
            save_image(tmp_path / row.path, seed=i)
        (tmp_path / rows[1].path).write_text("broken")
        with pytest.raises(UserError, match=f"{rows[1].path}.*"):
            Part(FileImages(tmp_path), rows, Preprocessing(8), lazy=lazy).__getitems__([(1, 0)])
        with pytest.warns(UserWarning, match=f"1 of 5 images are left out: .*{rows[1].path}") as caught:
            part = Part(FileImages(tmp_path), rows, Preprocessing(8), lazy=lazy, skip_unreadable=True)
        assert len(caught) == 1
        assert (len(part), part.labels.tolist()) == (4, [0, 0, 1, 1])
        expected = evaluation_view(FileImages(tmp_path).open(rows[2].path), Preprocessing(8))
        assert torch.equal(part.__getitems__([(1, 0)]).image[0], expected)

    def test_an_unreadable_training_image_says_what_can_be_done(self, tmp_path):
        with pytest.raises(UserError, match=r"leave such images out with --data.skip_unreadable true"):
            Part(FileImages(tmp_path), rows_of({0: 1}), Preprocessing(8))

    @pytest.mark.parametrize("lazy", [False, True])
    def test_nothing_left(self, tmp_path, lazy):
        with pytest.raises(UserError, match="none of the 2 images can be read: no such image"):
            Part(FileImages(tmp_path), rows_of({0: 2}), Preprocessing(8), lazy=lazy, skip_unreadable=True)


class TestEpochSampler:
    def test_every_position_once_and_another_order_each_epoch(self):
        sampler = EpochSampler(range(20), seed=1, views=1)
        orders = []
        for epoch in range(3):
            sampler.set_epoch(epoch)
            orders.append([position for position, _ in sampler])
            assert sorted(orders[-1]) == list(range(20))
        assert orders[0] != orders[1] != orders[2]
        sampler.set_epoch(1)
        assert [position for position, _ in sampler] == orders[1]
        assert list(EpochSampler(range(20), seed=2, views=1)) != list(EpochSampler(range(20), seed=1, views=1))

    @pytest.mark.parametrize(("views", "expected"), [(1, [0, 0, 0, 0]), (3, [0, 1, 2, 0]), (0, [0, 1, 2, 3])])
    def test_views(self, views, expected):
        sampler = EpochSampler(range(2), seed=1, views=views)
        seen = []
        for epoch in range(4):
            sampler.set_epoch(epoch)
            seen += {view for _, view in sampler}
        assert seen == expected


def test_to_tensor_shape():
    assert to_tensor(noise(7, 5)).shape == (3, 5, 7)
