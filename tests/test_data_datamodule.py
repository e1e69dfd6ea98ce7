"""FewShotDataModule: loaders, the closed test part, features instead of images, and Lightning."""

import copy
import json
import os
import pickle
import re
from collections import Counter
from pathlib import Path

import pytest
import torch
from data_fixtures import (
    Recorder,
    collected,
    digits,
    fitted,
    image_folder,
    joined,
    parted_folder,
    same,
    save_image,
    split_file,
    trainer,
)
from lightning.pytorch.callbacks import Callback
from PIL import Image

from kshot.backbones import Preprocessing
from kshot.data import Batch, CropFlip, FewShotDataModule
from kshot.data.images import FileImages
from kshot.data.transforms import evaluation_view
from kshot.errors import UserError


class TestInit:
    def test_what_is_known_without_images(self):
        module = FewShotDataModule("dtd", root="nowhere", shots=2)
        assert module.class_names[:2] == ["banded", "blotchy"]
        assert module.templates == ["{} texture."]
        assert module.dataset_name == "dtd"
        assert len(module.draw.train) == 94
        assert module.image_size is None
        assert FewShotDataModule("ucf101").class_names[0] == "Apply Eye Makeup"

    def test_info(self):
        module = digits(split_seed=3, sampler="nested")
        info = module.split_info()
        assert info == {
            "dataset": "digits",
            "protocol": "all-to-all",
            "targets": {},
            "sampler": "nested",
            "shots": 4,
            "val_shots": 4,
            "seed": 3,
            "digest": module.draw.digest,
            "source": "digits.json",
            "source_sha256": info["source_sha256"],
            "images_sha256": None,
            "counts": {"train": 40, "val": 40, "test": 539},
            "left_out": {},
            "white": 65535.0,
        }
        json.dumps(info)

    def test_names_and_templates_may_be_replaced(self):
        names = [f"number_{i}" for i in range(10)]
        module = digits(class_names=names, template=["a {}.", "the {}."])
        assert module.class_names[3] == "number 3"
        assert module.templates == ["a {}.", "the {}."]
        assert digits(template="my {}").templates == ["my {}"]

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"dataset": "digit"}, "Did you mean 'digits'"),
            ({"shots": 0}, "shots must be at least 1"),
            ({"shots": 500}, "'zero' has .*--data.allow_fewer true"),
            ({"sampler": "nestd"}, "Did you mean 'nested'"),
            ({"template": "a photo"}, "must have {} once"),
            ({"template": ["a {}", "{} {}"]}, "'{} {}' must have {} once"),
            ({"class_names": ["a"]}, "1 class_names for the 10 of digits"),
            ({"class_names": list("abcdefghiA")}, "'a' and 'A' read the same"),
            ({"manifest": "none.json"}, r"none.json: may not be read \(no such file"),
            ({"batch_size": 0}, "batch_size must be at least 1"),
            ({"eval_batch_size": 0}, "eval_batch_size must be at least 1"),
            ({"num_workers": -1}, "num_workers must be at least 0"),
            ({"views": 0}, "views must be at least 1"),
            ({"image_size": 0}, "image_size must be at least 1"),
        ],
    )
    def test_mistakes(self, settings, message):
        with pytest.raises(UserError, match=message) as error:
            FewShotDataModule(**{"dataset": "digits"} | settings)
        assert "\n" not in str(error.value)

    def test_numbers_as_names_are_pointed_out(self, tmp_path):
        image_folder(tmp_path, {"0": 4, "1": 4})
        with pytest.warns(UserWarning, match=r"are called '0' and so on: .* give --data.class_names"):
            FewShotDataModule(str(tmp_path), shots=1)

    def test_manifest_takes_the_place_of_the_draw(self, tmp_path):
        written = digits(shots=2, split_seed=9)
        written.write_manifest(tmp_path / "m.json")
        module = digits(shots=4, manifest=str(tmp_path / "m.json"))
        assert module.draw == written.draw
        assert module.split_info() == written.split_info()
        with pytest.raises(UserError, match=r"drawn from 'digits.json'"):
            FewShotDataModule("dtd", manifest=str(tmp_path / "m.json"))


class TestTraining:
    def test_batches(self):
        module = fitted()
        loader = module.train_dataloader()
        batch = next(iter(loader))
        assert isinstance(batch, Batch)
        assert (batch.image.dtype, batch.image.shape) == (torch.uint8, (8, 3, 16, 16))
        assert batch.label.dtype == batch.index.dtype == torch.int64
        everything = collected(loader, epoch=0)
        assert sorted(everything.index.tolist()) == list(range(40))
        assert [module.draw.train[i].label for i in everything.index] == everything.label.tolist()

    @pytest.mark.parametrize(("batch_size", "sizes"), [(16, [16, 16]), (40, [40]), (64, [40])])
    def test_a_short_batch_is_dropped_unless_it_is_the_only_one(self, batch_size, sizes):
        loader = fitted(batch_size=batch_size).train_dataloader()
        assert len(loader) == len(sizes)
        assert [len(batch.label) for batch in loader] == sizes

    def test_an_epoch_depends_on_seed_and_number_only(self):
        loader = fitted(augment=CropFlip()).train_dataloader()
        epochs = [collected(loader, epoch) for epoch in range(3)]
        torch.manual_seed(99)
        resumed = collected(fitted(augment=CropFlip()).train_dataloader(), epoch=2)
        assert same(resumed, epochs[2])
        assert not same(epochs[1], epochs[2])
        manifest_independent = collected(fitted(augment=CropFlip(), split_seed=2).train_dataloader(), epoch=2)
        assert not torch.equal(manifest_independent.index, epochs[2].index)

    def test_loading_leaves_the_global_generator_alone(self):
        module = fitted()
        torch.manual_seed(0)
        state = torch.get_rng_state()
        list(module.train_dataloader())
        list(module.val_dataloader())
        assert torch.equal(torch.get_rng_state(), state)

    def test_views_repeat(self):
        loader = fitted(augment=CropFlip(), views=2).train_dataloader()
        by_index = []
        for epoch in range(3):
            batch = collected(loader, epoch)
            by_index.append(batch.image[batch.index.argsort()])
        assert torch.equal(by_index[0], by_index[2])
        assert not torch.equal(by_index[0], by_index[1])

    @pytest.mark.parametrize("augment", [None, CropFlip()])
    def test_workers_change_nothing(self, augment):
        alone, two = (fitted(augment=augment, num_workers=n).train_dataloader() for n in (0, 2))
        for epoch in (0, 1):  # the second epoch reaches workers that live on
            assert same(collected(alone, epoch), collected(two, epoch))

    def test_val_is_in_order_and_may_be_none(self, tmp_path):
        module = fitted()
        batch = collected(module.val_dataloader())
        assert batch.index.tolist() == list(range(40))
        assert batch.label.tolist() == [row.label for row in module.draw.val]
        for part in ("train", "test"):
            image_folder(tmp_path, {"cat": 3, "dog": 3}, part)
        module = FewShotDataModule(str(tmp_path), shots=2, image_size=8)
        module.setup("fit")
        module.setup("validate")
        assert module.val_dataloader() == []

    def test_setup_decodes_once(self):
        module = fitted()
        part = module.part("train")
        module.setup("fit")
        assert module.part("train") is part

    def test_image_size_is_needed_and_may_come_late(self):
        module = digits(image_size=None)
        with pytest.raises(UserError, match="image_size is not set"):
            module.setup("fit")
        module.image_size = 12
        module.setup("fit")
        assert next(iter(module.train_dataloader())).image.shape[-2:] == (12, 12)

    def test_unreadable_images(self, tmp_path):
        image_folder(tmp_path, {"cat": 10, "dog": 10})
        module = FewShotDataModule(str(tmp_path), shots=5, image_size=8, allow_fewer=True)
        broken = [module.draw.train[0].path, *(row.path for row in module.draw.val[:2])]
        for path in broken:
            (tmp_path / path).write_text("broken")
        with pytest.raises(UserError, match=broken[0]):
            module.setup("fit")
        module.skip_unreadable = True
        with pytest.warns(UserWarning, match="images are left out"):
            module.setup("fit")
        assert (len(module.part("train")), len(module.part("val"))) == (9, len(module.draw.val) - 2)
        assert len(collected(module.train_dataloader()).label) == 9


class TestGuard:
    def test_test_images_open_for_testing_only(self):
        module = fitted()
        with pytest.raises(RuntimeError, match=r"the test part opens with setup\('test'\)"):
            module.test_dataloader()
        module.setup("test")
        batch = collected(module.test_dataloader())
        assert batch.index.tolist() == list(range(539))
        module.teardown("test")
        with pytest.raises(RuntimeError, match="opens with"):
            module.test_dataloader()

    def test_no_attribute_reaches_a_test_row_before(self, tmp_path):
        split = split_file(
            tmp_path / "s.json",
            train=[["a/train.png", 0, "a"]],
            val=[["a/val.png", 0, "a"]],
            test=[["a/secret.png", 0, "a"]],
        )
        for name in ("train", "val", "secret"):
            save_image(tmp_path / "a" / f"{name}.png")
        module = FewShotDataModule(str(split), shots=1, image_size=8)
        module.setup("fit")
        seen, todo = set(), [module]
        while todo:
            item = todo.pop()
            if id(item) in seen:
                continue
            seen.add(id(item))
            assert "secret" not in (repr(item) if isinstance(item, str | bytes) else "")
            todo += vars(item).values() if hasattr(item, "__dict__") else []
            todo += item.values() if isinstance(item, dict) else []
            todo += list(item) if isinstance(item, list | tuple | set) else []
        module.setup("test")
        assert module.part("test").paths == ["a/secret.png"]

    def test_a_source_that_changed_meanwhile(self, tmp_path):
        image_folder(tmp_path, {"cat": 10, "dog": 10})
        module = FewShotDataModule(str(tmp_path), shots=2, image_size=8)
        save_image(tmp_path / "cat" / "new.png")
        with pytest.raises(UserError, match="has changed since the training images were drawn"):
            module.setup("test")

    def test_no_test_images(self, tmp_path):
        (tmp_path / "s.csv").write_text("path,label,split\n1.png,a,train\n")
        module = FewShotDataModule(str(tmp_path / "s.csv"), shots=1, image_size=8)
        with pytest.raises(UserError, match="there are no test images"):
            module.setup("test")

    @pytest.mark.parametrize("workers", [0, 2])
    def test_a_broken_test_image_is_named_in_one_line(self, tmp_path, workers):
        for part in ("train", "test"):
            image_folder(tmp_path, {"cat": 3, "dog": 3}, part)
        (tmp_path / "test" / "dog" / "01.png").write_text("broken")
        settings = {"shots": 1, "image_size": 8, "num_workers": workers}
        module = FewShotDataModule(str(tmp_path), **settings)
        module.setup("test")
        with pytest.raises(UserError, match=r"cannot read the image '.*01.png'") as error:
            list(module.test_dataloader())
        assert "\n" not in str(error.value)
        module = FewShotDataModule(str(tmp_path), skip_unreadable=True, **settings)
        with pytest.warns(UserWarning, match="1 of 6 images are left out"):
            module.setup("test")
        assert collected(module.test_dataloader()).label.tolist() == [0, 0, 0, 1, 1]
        assert module.test_sizes() == {"test": 5}


class TestCheckTestFiles:
    """What is wrong with test images shows before training, as far as a look at their folders tells."""

    @pytest.fixture
    def root(self, tmp_path, monkeypatch):
        parted_folder(tmp_path / "pets", {"cat": 2, "dog": 3})
        parted_folder(tmp_path / "cars", {"car": 2, "van": 2}, ("train", "test"))
        monkeypatch.setattr(FileImages, "open", None)  # no image is decoded
        return tmp_path

    def module(self, root, **settings):
        return FewShotDataModule("pets", root=str(root), shots=1, image_size=8, **settings)

    def test_all_is_well(self, root):
        for settings in ({}, {"protocol": "base-to-new"}, {"protocol": "cross-dataset", "targets": ["cars", "digits"]}):
            module = self.module(root, **settings)
            module.check_test_files()
            with pytest.raises(RuntimeError, match="opens with"):
                module.test_sizes()  # and none is left open

    @pytest.mark.parametrize("how", ["no such image", "it is empty", "not a file", "permission denied"])
    @pytest.mark.parametrize("protocol", ["all-to-all", "base-to-new", "cross-dataset"])
    def test_number_and_first(self, root, how, protocol, monkeypatch):
        list_file(root)
        source, targets = ("cars", ["list.csv"]) if protocol == "cross-dataset" else ("list.csv", None)
        settings = {"root": str(root), "shots": 1, "image_size": 8, "protocol": protocol, "targets": targets}
        module = FewShotDataModule(source, **settings)
        module.check_test_files()
        spoilt = [root / "pets" / "test" / "dog" / f"{name}.png" for name in ("01", "02")]
        for path in spoilt if how != "permission denied" else ():
            path.unlink()
            if how == "it is empty":
                path.touch()
            elif how == "not a file":
                path.mkdir()
        if how == "permission denied":  # chmod does not stop root
            true = os.access
            monkeypatch.setattr(os, "access", lambda path, mode: path not in spoilt and true(path, mode))
        with pytest.raises(UserError) as error:
            module.check_test_files()
        message = str(error.value)
        assert "\n" not in message
        assert re.match(r"2 of \d test images of .*-list cannot be read, the first: .*dog/01.png'", message)
        assert how in message

    def test_what_is_left_out_anyway(self, root):
        list_file(root)
        module = FewShotDataModule("list.csv", root=str(root), shots=1, image_size=8, skip_unreadable=True)
        images = sorted((root / "pets" / "test").rglob("*.png"))
        for image in images[1:]:
            image.unlink()
        module.check_test_files()
        images[0].unlink()
        with pytest.raises(UserError, match=r"5 of 5 test images of .*-list cannot be read"):
            module.check_test_files()

    @pytest.mark.parametrize("target", ["dtd", "missing.json"])
    def test_a_target_without_images(self, root, target):
        split_file(root / "missing.json", test=[["nowhere/x.png", 0, "a"], ["nowhere/y.png", 0, "a"]])
        module = self.module(root, protocol="cross-dataset", targets=[target])
        with pytest.raises(UserError, match=r"no test images: looked for|2 of 2 test images of missing") as error:
            module.check_test_files()
        assert "\n" not in str(error.value)

    def test_a_source_that_changed(self, root):
        module = self.module(root)
        (root / "pets" / "test" / "cat" / "00.png").unlink()
        with pytest.raises(UserError, match="pets has changed since"):
            module.check_test_files()

    def test_it_is_cheap(self, tmp_path, monkeypatch):
        """A look at the entry of each test image; read are those of the size of a drawn one."""
        folder, stat, read = tmp_path / "many", Path.stat, Path.open
        for part, sizes in (("train", (2, 2)), ("test", (2, *range(3, 22)))):
            for c in "ab":
                (folder / part / c).mkdir(parents=True)
                for i, size in enumerate(sizes):
                    (folder / part / c / f"{i}.png").write_bytes(c.encode() * size)
        module = FewShotDataModule(str(folder), shots=1, image_size=8)
        looked, opened = Counter(), Counter()

        def count(seen, call, file, *given, **options):
            if file.parent.parent == folder / "test":
                seen[file] += 1
            return call(file, *given, **options)

        monkeypatch.setattr(Path, "stat", lambda *given, **options: count(looked, stat, *given, **options))
        monkeypatch.setattr(Path, "open", lambda *given, **options: count(opened, read, *given, **options))
        monkeypatch.setattr(Image, "open", lambda *_, **__: pytest.fail("decoded"))
        module.check_test_files()
        assert len(looked) == 40
        assert looked.total() <= 3 * 40
        assert set(opened) == {folder / "test" / c / "0.png" for c in "ab"}
        assert max(opened.values()) <= 2


def list_file(root):
    """The pets as a CSV file, whose digest does not depend on what is there."""
    rows = [f"{p.relative_to(root)},{p.parts[-2]},{p.parts[-3]}" for p in sorted((root / "pets").rglob("*.png"))]
    (root / "list.csv").write_text("\n".join(["path,label,split", *rows]))


class TestPredict:
    def test_files_and_folders(self, tmp_path):
        paths = [save_image(tmp_path / name, seed=i) for i, name in enumerate(("b/2.png", "b/c/1.JPEG", "a.png"))]
        (tmp_path / "b" / "notes.txt").write_text("")
        module = digits()
        module.images = [str(paths[2]), str(tmp_path / "b")]
        module.setup("predict")
        assert module.predict_paths == [str(paths[2]), str(paths[0]), str(paths[1])]
        batch = collected(module.predict_dataloader())
        assert batch.label.tolist() == [-1, -1, -1]
        assert batch.index.tolist() == [0, 1, 2]
        from PIL import Image

        assert torch.equal(batch.image[1], evaluation_view(Image.open(paths[0]), Preprocessing(16)))

    def test_mistakes(self, tmp_path):
        module = digits()
        for images, message in (
            ([], "no images to predict"),
            ([str(tmp_path / "none")], "no such image or folder: '.*none'"),
            ([str(tmp_path)], "no image found in '"),
        ):
            module.images = images
            with pytest.raises(UserError, match=message):
                module.setup("predict")

    def test_unreadable_images(self, tmp_path):
        good = save_image(tmp_path / "good.png")
        (tmp_path / "bad.png").write_text("broken")
        module = digits(skip_unreadable=True)
        module.images = [str(tmp_path)]
        with pytest.warns(UserWarning, match="1 of 2 images are left out"):
            module.setup("predict")
        assert module.predict_paths == [str(good)]


@pytest.mark.filterwarnings("ignore")
class TestLightning:
    def test_fit_and_test(self, tmp_path):
        module, recorder = digits(augment=CropFlip()), Recorder()
        run = trainer(tmp_path, 2)
        run.fit(recorder, datamodule=module)
        for epoch in range(2):
            batches = [batch for e, batch in recorder.seen["train"] if e == epoch]
            expected = list(self.epoch_loader(epoch))
            assert len(batches) == len(expected) == 5
            assert all(same(a, b) for a, b in zip(batches, expected, strict=True))
        assert recorder.seen["val"] >= 80
        assert recorder.seen["test"] == 0
        run.test(recorder, datamodule=module, verbose=False)
        assert recorder.seen["test"] == 539

    def epoch_loader(self, epoch):
        loader = fitted(augment=CropFlip()).train_dataloader()
        loader.sampler.set_epoch(epoch)
        return loader

    def test_a_resumed_run_is_bit_identical(self, tmp_path):
        class Save(Callback):
            def on_train_epoch_end(self, trainer, pl_module):
                if trainer.current_epoch == 0:
                    trainer.save_checkpoint(tmp_path / "first.ckpt")

        whole = Recorder()
        start = copy.deepcopy(whole.state_dict())
        trainer(tmp_path, 3, [Save()]).fit(whole, datamodule=digits(augment=CropFlip()))
        resumed = Recorder()
        run = trainer(tmp_path, 3)
        run.fit(resumed, datamodule=digits(augment=CropFlip()), ckpt_path=tmp_path / "first.ckpt")
        assert len(resumed.seen["train"]) == 10
        assert torch.equal(resumed.layer.weight, whole.layer.weight)
        assert not torch.equal(start["layer.weight"], whole.layer.weight)

    def test_without_validation_images(self, tmp_path):
        for part in ("train", "test"):
            image_folder(tmp_path, {"cat": 3, "dog": 3}, part)
        recorder = Recorder()
        module = FewShotDataModule(str(tmp_path), shots=2, image_size=16)
        trainer(tmp_path, 1).fit(recorder, datamodule=module)
        assert len(recorder.seen["train"]) == 1
        assert recorder.seen["val"] == 0


@pytest.mark.parametrize("part", ["train", "val", "test"])
def test_parts_can_be_sent_to_spawned_workers(part):
    module = fitted(augment=CropFlip())
    module.setup("test")
    images = module.part(part)
    key = [(3, 1)]
    assert same(pickle.loads(pickle.dumps(images)).__getitems__(key), images.__getitems__(key))


class TestHalves:
    """Disjoint halves of the shots, for methods that search before they train."""

    @pytest.mark.parametrize("shots", [2, 3, 8])
    def test_they_are_disjoint_stratified_and_complete(self, shots):
        module = fitted(shots=shots, batch_size=4)
        seen = []
        for half, batches in zip(module.train_halves(), (5 * shots, 5 * shots), strict=True):
            drawn = joined(next(half) for _ in range(2 * batches))
            seen.append(dict(zip(drawn.index.tolist(), drawn.label.tolist(), strict=True)))
        first, second = seen
        assert not set(first) & set(second)
        assert set(first) | set(second) == set(range(10 * shots))
        for half, count in ((first, shots - shots // 2), (second, shots // 2)):
            assert sorted(half.values()) == sorted(list(range(10)) * count)

    def test_they_depend_on_the_seed_alone(self):
        def first(seed):
            return torch.cat([next(half).index for half in fitted(shots=4, split_seed=seed).train_halves()])

        assert torch.equal(first(1), first(1))
        assert not torch.equal(first(1), first(2))

    def test_each_epoch_has_its_own_order_and_views(self):
        module = fitted(shots=4, batch_size=20, augment=CropFlip(), views=2)
        half, _ = module.train_halves()
        a, b = next(half), next(half)
        assert set(a.index.tolist()) == set(b.index.tolist())
        assert not torch.equal(a.index, b.index)
        order_a, order_b = a.index.argsort(), b.index.argsort()
        assert not torch.equal(a.image[order_a], b.image[order_b])

    def test_one_shot_cannot_be_split(self):
        with pytest.raises(UserError, match=r"'zero' has one training image.*--data\.shots 2") as error:
            fitted(shots=1).train_halves()
        assert "\n" not in str(error.value)
