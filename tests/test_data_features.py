"""Features that batches carry instead of images or beside them, and the key that they are kept by."""

import json
import pickle

import pytest
import torch
from data_fixtures import collected, digits, fitted, image_folder, parted_folder, same, save_image

from kshot.backbones import Preprocessing
from kshot.data import CropFlip, FewShotDataModule
from kshot.data.images import FileImages
from kshot.data.parts import Tokens
from kshot.errors import UserError


class TestFeatures:
    @pytest.mark.parametrize(("settings", "views"), [({}, 1), ({"augment": CropFlip(), "views": 3}, 3)])
    def test_features_take_the_place_of_images(self, settings, views):
        module = fitted(**settings)
        assert module.train_views() == views
        images = [collected(module.eval_order_dataloader("train", view)) for view in range(views)]
        for batch in images:
            assert batch.index.tolist() == list(range(40))
        expected = [collected(module.train_dataloader(), epoch) for epoch in range(4)]
        module.keep_features("train", torch.stack([batch.image.flatten(1).float() for batch in images]))
        for epoch, batch in enumerate(expected):
            kept = collected(module.train_dataloader(), epoch)
            assert kept.image is None
            assert torch.equal(kept.features, batch.image.flatten(1).float())
            assert torch.equal(kept.label, batch.label)
            assert torch.equal(kept.index, batch.index)
        for view, batch in enumerate(images):
            kept = collected(module.eval_order_dataloader("train", view))
            assert torch.equal(kept.features, batch.image.flatten(1).float())
        module.forget_features()
        assert all(same(collected(module.train_dataloader(), epoch), batch) for epoch, batch in enumerate(expected))

    def test_tokens_take_the_place_of_images(self):
        module = fitted(augment=CropFlip(), views=3, num_workers=1)
        states, part = torch.randn(40, 3, 4, 5).transpose(0, 1), module.part("train")  # as they come, image by image
        module.keep_features("train", tokens=Tokens(states, 7), free=True)
        loader = module.train_dataloader()
        for epoch in (0, 1, 5):
            loader.sampler.set_epoch(epoch)
            for batch in loader:
                assert (batch.image, batch.features, batch.frozen) == (None, None, None)
                assert batch.tokens.blocks == 7
                assert torch.equal(batch.tokens.states, states[epoch % 3, batch.index])
                assert torch.equal(batch.label, part.labels[batch.index])
        assert loader.num_workers == 0
        assert part.arrays == [], "nothing is decoded for them"
        module.forget_features()
        assert next(iter(module.train_dataloader())).tokens is None

    def test_validation_features(self):
        module = fitted()
        features = torch.randn(1, 40, 5)
        module.keep_features("val", features)
        batch = collected(module.val_dataloader())
        assert batch.image is None
        assert torch.equal(batch.features, features[0])
        assert batch.label.tolist() == [row.label for row in module.draw.val]

    def test_features_stay_when_lightning_sets_up_again(self):
        module = fitted()
        module.keep_features("train", torch.randn(1, 40, 5))
        module.setup("fit")
        assert next(iter(module.train_dataloader())).features.shape == (8, 5)

    def test_endless_views_cannot_be_replaced(self):
        module = fitted(augment=CropFlip())
        assert module.train_views() == 0
        with pytest.raises(ValueError, match="needs \\(0, 40, D\\)"):
            module.keep_features("train", torch.randn(1, 40, 5))
        with pytest.raises(ValueError, match="needs \\(0, 40, D\\)"):
            module.keep_features("train", torch.randn(0, 40, 5))

    @pytest.mark.parametrize("shape", [(40, 5), (2, 40, 5), (1, 39, 5)])
    def test_wrong_shapes(self, shape):
        with pytest.raises(ValueError, match="needs \\(1, 40, D\\)"):
            fitted().keep_features("train", torch.zeros(shape))
        with pytest.raises(ValueError, match="for val, which needs \\(1, 40, D\\)"):
            fitted().keep_features("val", torch.zeros(shape))
        with pytest.raises(ValueError, match="needs \\(1, 40, L, width\\)"):
            fitted().keep_features("val", tokens=Tokens(torch.zeros(*shape, 2), 1))


class TestTestParts:
    """Test images are decoded when they are asked for, and with features kept they are not."""

    @pytest.fixture
    def pets(self, tmp_path):
        parted_folder(tmp_path / "pets", {"a": 3, "b": 2, "c": 4})
        pets = FewShotDataModule(str(tmp_path / "pets"), shots=2, image_size=8, protocol="base-to-new")
        pets.setup("test")
        return pets

    def test_names(self, pets):
        assert pets.test_parts == ["test/base", "test/new"]
        assert digits().test_parts == ["test"]

    def test_no_image_is_decoded(self, pets, monkeypatch):
        images = [collected(pets.eval_order_dataloader(part)) for part in pets.test_parts]
        for part, batch in zip(pets.test_parts, images, strict=True):
            pets.keep_features(part, batch.image.flatten(1).float()[None])
        monkeypatch.setattr(FileImages, "open", None)
        for loader, batch in zip(pets.test_dataloader(), images, strict=True):
            kept = collected(loader)
            assert kept.image is None
            assert torch.equal(kept.features, batch.image.flatten(1).float())
            assert torch.equal(kept.label, batch.label)
            assert torch.equal(kept.index, batch.index)
        monkeypatch.undo()
        pets.forget_features()
        assert all(same(collected(a), b) for a, b in zip(pets.test_dataloader(), images, strict=True))

    def test_frozen_features_beside_images(self, pets):
        frozen = torch.randn(1, 5, 6)
        pets.keep_features("test/base", frozen=frozen)
        base, new = map(collected, pets.test_dataloader())
        assert base.image.shape == (5, 3, 8, 8)
        assert base.features is None
        assert torch.equal(base.frozen, frozen[0])
        assert new.frozen is None
        pets.forget_features()
        assert collected(pets.test_dataloader()[0]).frozen is None

    def test_they_close_with_the_part(self, pets):
        pets.keep_features("test/base", torch.randn(1, 5, 6))
        pets.teardown("test")
        with pytest.raises(RuntimeError, match="test/base part opens with"):
            pets.keep_features("test/base", torch.randn(1, 5, 6))
        pets.setup("test")
        assert pets.part("test/base").features is None

    @pytest.mark.parametrize("shape", [(1, 4, 6), (2, 5, 6), (5, 6)])
    def test_wrong_shapes(self, pets, shape):
        for name in ("features", "frozen"):
            with pytest.raises(ValueError, match=r"for test/base, which needs \(1, 5, D\)"):
                pets.keep_features("test/base", **{name: torch.zeros(shape)})

    def test_sizes(self, pets, tmp_path):
        assert pets.test_sizes() == {"base": 5, "new": 4}
        assert pets.split_info()["counts"]["test"] == 9
        (tmp_path / "pets" / "test" / "c" / "00.png").write_text("broken")
        settings = {"shots": 2, "image_size": 8, "protocol": "base-to-new", "skip_unreadable": True}
        broken = FewShotDataModule(str(tmp_path / "pets"), **settings)
        with pytest.raises(RuntimeError, match="opens with"):
            broken.test_sizes()
        with pytest.warns(UserWarning, match="1 of 4 images are left out"):
            broken.setup("test")
        assert broken.test_sizes() == {"base": 5, "new": 3}


class TestFreedImages:
    @pytest.mark.parametrize("settings", [{}, {"augment": CropFlip(), "views": 2}])
    def test_they_are_decoded_again_when_asked_for(self, settings):
        module = fitted(**settings)
        expected = [collected(module.train_dataloader(), epoch) for epoch in range(3)]
        part = module.part("train")
        assert len(part.arrays) == 40
        features = torch.randn(module.train_views(), 40, 5)
        module.keep_features("train", features, free=True)
        assert part.arrays == []
        kept = collected(module.train_dataloader(), 1)
        assert torch.equal(kept.features, features[1 % len(features), kept.index])
        assert part.arrays == []
        module.forget_features()
        assert part.arrays == []
        assert all(same(collected(module.train_dataloader(), e), batch) for e, batch in enumerate(expected))
        assert len(part.arrays) == 40

    def test_those_left_out_stay_left_out(self, tmp_path):
        image_folder(tmp_path, {"cat": 10, "dog": 10})
        module = FewShotDataModule(str(tmp_path), shots=5, image_size=8, skip_unreadable=True)
        (tmp_path / module.draw.train[3].path).write_text("broken")
        with pytest.warns(UserWarning, match="1 of 10 images are left out"):
            module.setup("fit")
        expected = collected(module.eval_order_dataloader("train"))
        module.part("train").keep(free=True)
        assert same(collected(module.eval_order_dataloader("train")), expected)

    def test_nothing_holds_the_array_that_they_came_from(self):
        """Whole data sets are in memory for decoding only."""
        assert len(pickle.dumps(fitted(shots=1).part("val"))) < 100_000  # all of the digits have 900 kB

    def test_test_images_have_nothing_to_free(self):
        module = digits()
        module.setup("test")
        module.keep_features("test", frozen=torch.randn(1, 539, 2), free=True)
        assert collected(module.test_dataloader()).image.shape == (539, 3, 16, 16)


class TestImageSize:
    def test_it_comes_from_the_backbone(self):
        module = digits(image_size=None)
        module.use_preprocessing(Preprocessing(12))
        module.use_preprocessing(Preprocessing(12))
        module.setup("fit")
        assert next(iter(module.train_dataloader())).image.shape[-2:] == (12, 12)

    def test_another_one_was_given(self):
        module = digits(image_size=16)
        module.use_preprocessing(Preprocessing(16))
        with pytest.raises(UserError) as error:
            module.use_preprocessing(Preprocessing(12))
        assert str(error.value) == "data.image_size is 16, the backbone takes 12: set it on the backbone."
        assert module.image_size == 16


class TestKeys:
    """What tells rows of features apart: the context of a part, and a key of each image and view."""

    @pytest.fixture
    def root(self, tmp_path):
        parted_folder(tmp_path / "pets", {"a": 3, "b": 2, "c": 4})
        parted_folder(tmp_path / "cars", {"d": 3, "e": 2})
        return tmp_path

    def module(self, root, dataset="pets", **settings):
        known = {"shots": 2, "image_size": 8, "augment": CropFlip(), "views": 2}
        return FewShotDataModule(dataset, **known | {"root": str(root)} | settings)

    def rows(self, module, name, view=0):
        """Context, and key by path."""
        module.setup("test" if name.startswith("test") else "fit")
        part = module.part(name)
        return json.dumps(part.context(), sort_keys=True), dict(zip(part.paths, part.row_keys(view), strict=True))

    @pytest.mark.parametrize("part", ["train", "val", "test"])
    def test_equal_ones_agree_whatever_decides_no_pixel(self, root, part):
        expected = self.rows(self.module(root), part)
        assert all(len(key) == 16 and int(key, 16) >= 0 for key in expected[1].values())
        other = {
            "batch_size": 3,
            "eval_batch_size": 5,
            "num_workers": 2,
            "template": "my {}",
            "class_names": list("xyz"),
            "skip_unreadable": True,
        }
        assert self.rows(self.module(root, **other), part) == expected

    @pytest.mark.parametrize(
        "settings",
        [
            {"image_size": 9},
            {"augment": CropFlip(flip=0)},
            {"augment": CropFlip(scale=(0.5, 1))},
            {"augment": None},
            {"fit": "pad"},
            {"exif": False},
            {"background": [0, 0, 0]},
            {"white": 255},
        ],
        ids=str,
    )
    def test_each_setting_counts_in_the_context(self, root, settings):
        parts = ["train"] if "augment" in settings else ["train", "val", "test"]
        for part in parts:
            assert self.rows(self.module(root, **settings), part)[0] != self.rows(self.module(root), part)[0], part

    def test_seed_position_and_view_of_a_random_view(self, root):
        whole = {"shots": None, "sampler": "nested"}
        first, second = (self.module(root, **whole, split_seed=seed) for seed in (1, 2))
        assert sorted(first.draw.train) == sorted(second.draw.train)
        views = [self.rows(first, "train", view)[1] for view in (0, 1)] + [self.rows(second, "train")[1]]
        for path in views[0]:
            assert len({keys[path] for keys in views}) == 3
        plain = [self.rows(self.module(root, **whole, split_seed=seed, augment=None), "train") for seed in (1, 2)]
        assert plain[0] == plain[1], "an evaluation image is the same whatever the draw"
        assert plain[0][0] == self.rows(self.module(root), "test")[0], "and whatever the part"

    def test_equal_keys_of_a_view_mean_equal_pixels(self, root):
        """Of two draws, keys agree where position, seed and image agree, and then the pixels do."""
        one, two = self.module(root, shots=1), self.module(root, shots=2)
        keys = [list(self.rows(each, "train", 1)[1].values()) for each in (one, two)]
        equal = [(i, j) for i, a in enumerate(keys[0]) for j, b in enumerate(keys[1]) if a == b]
        for i, j in equal:
            assert i == j
            assert torch.equal(one.part("train").images([(i, 1)]), two.part("train").images([(j, 1)]))
        assert equal, "the first image of coop-v1 is the same for every number of shots"

    @pytest.mark.parametrize("part", ["train", "val", "test"])
    def test_the_bytes_count_and_not_where_they_lie(self, root, part):
        parted_folder(root / "elsewhere" / "pets", {"a": 3, "b": 2, "c": 4})
        here, there = self.module(root), self.module(root, str(root / "elsewhere" / "pets"))
        expected = self.rows(here, part)
        assert self.rows(there, part) == expected
        path = here.part(part).paths[0]
        save_image(root / "elsewhere" / "pets" / path, seed=999)
        changed = self.rows(self.module(root, str(root / "elsewhere" / "pets")), part)[1]
        assert {name for name in changed if changed[name] != expected[1][name]} == {path}

    def test_a_random_view_of_an_image_that_cannot_be_digested_has_no_key(self, root):
        module = self.module(root)
        module.setup("fit")
        module.part("train").digests[1] = ""
        assert [bool(key) for key in module.part("train").row_keys()] == [True, False, True, True, True, True]
