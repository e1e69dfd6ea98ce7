"""Several devices share a part as one device would see it, and loaders start no processes in vain."""

import os
import re
import signal
from types import SimpleNamespace

import lightning.pytorch as pl
import pytest
import torch
from data_fixtures import Recorder, collected, digits, fitted, parted_folder, same, save_image, trainer
from hypothesis import given
from hypothesis import strategies as st

from kshot.data import CropFlip, FewShotDataModule
from kshot.data.images import FileImages
from kshot.data.loading import EpochSampler, PartLoader, lost_worker
from kshot.errors import UserError


def on_device(module, rank, devices):
    module.trainer = SimpleNamespace(global_rank=rank, world_size=devices)
    return module


def batches_of(sampler, batch_size, epoch):
    sampler.set_epoch(epoch)
    keys = list(sampler)
    assert len(keys) == len(sampler)
    return [keys[i : i + batch_size] for i in range(0, len(keys), batch_size)]


class TestEpochSampler:
    @given(st.integers(1, 60), st.integers(1, 9), st.integers(1, 5), st.integers(0, 3), st.integers(0, 3))
    def test_the_devices_together_see_what_one_sees(self, count, batch_size, devices, views, epoch):
        one = batches_of(EpochSampler(range(count), 5, views, batch_size * devices), batch_size * devices, epoch)
        shares = [
            batches_of(EpochSampler(range(count), 5, views, batch_size, rank, devices), batch_size, epoch)
            for rank in range(devices)
        ]
        if count < devices:  # refused by the data module
            return
        assert {len(batches) for batches in shares} == {len(one)}
        for step, whole in enumerate(one):
            parts = [batches[step] for batches in shares]
            assert sorted(key for part in parts for key in part) == sorted(whole)
            sizes = {len(part) for part in parts}
            assert max(sizes) - min(sizes) <= (count < batch_size * devices)
            assert 1 <= min(sizes) <= max(sizes) <= batch_size

    @given(st.integers(1, 60), st.integers(1, 70))
    def test_one_device_drops_a_short_batch_unless_it_is_the_only_one(self, count, batch_size):
        sizes = [len(batch) for batch in batches_of(EpochSampler(range(count), 1, 1, batch_size), batch_size, 0)]
        assert sizes == ([batch_size] * (count // batch_size) or [count])


class TestTraining:
    @pytest.mark.parametrize(
        ("devices", "batch_size", "shots"), [(2, 4, 4), (2, 8, 4), (3, 3, 3), (3, 8, 4), (4, 3, 1), (2, 32, 4)]
    )
    @pytest.mark.parametrize("augment", [None, CropFlip()])
    def test_the_union_of_the_batches_is_the_doubled_batch(self, devices, batch_size, shots, augment):
        settings = {"shots": shots, "augment": augment, "views": 2}
        one = fitted(batch_size=batch_size * devices, **settings).train_dataloader()
        shares = [
            on_device(fitted(batch_size=batch_size, **settings), rank, devices).train_dataloader()
            for rank in range(devices)
        ]
        for epoch in range(3):
            for loader in (one, *shares):
                loader.sampler.set_epoch(epoch)
            steps = list(zip(one, *shares, strict=True))
            assert len(steps) == len(one) == max(1, 10 * shots // (batch_size * devices))
            for whole, *parts in steps:
                index = torch.cat([part.index for part in parts])
                order = [index.tolist().index(position) for position in whole.index.tolist()]
                assert len(order) == len(index)
                assert torch.equal(torch.cat([part.image for part in parts])[order], whole.image)
                assert torch.equal(torch.cat([part.label for part in parts])[order], whole.label)

    def test_features_are_shared_alike(self):
        features = torch.randn(1, 40, 5)
        seen = []
        for rank in range(2):
            module = on_device(fitted(), rank, 2)
            module.keep_features("train", features)
            batch = collected(module.train_dataloader(), epoch=1)
            assert torch.equal(batch.features, features[0, batch.index])
            seen += batch.index.tolist()
        assert len(seen) == len(set(seen)) == 32

    def test_all_devices_search_on_the_same_halves(self):
        one, two = fitted(), on_device(fitted(), 1, 2)
        for alone, shared in zip(one.train_halves(), two.train_halves(), strict=True):
            assert same(next(alone), next(shared))


class TestEvaluation:
    @pytest.mark.parametrize("devices", [1, 2, 3, 4])
    @pytest.mark.parametrize("batch_size", [1, 2, 128])
    def test_each_image_is_seen_once(self, tmp_path, devices, batch_size):
        parted_folder(tmp_path, {"a": 4, "b": 3})
        settings = {"shots": 2, "image_size": 8, "eval_batch_size": batch_size}
        seen = {"val": [], "test": [], "predict": []}
        for rank in range(devices):
            module = on_device(FewShotDataModule(str(tmp_path), **settings), rank, devices)
            module.images = [str(tmp_path / "train")]
            for stage in ("validate", "test", "predict"):
                module.setup(stage)
            for part, indexes in seen.items():
                batches = list(getattr(module, f"{part}_dataloader")())
                assert all(len(batch.label) <= batch_size for batch in batches)
                indexes += [index for batch in batches for index in batch.index.tolist()]
        assert {part: sorted(indexes) for part, indexes in seen.items()} == {
            "val": list(range(4)),
            "test": list(range(7)),
            "predict": list(range(7)),
        }

    def test_every_test_set_is_shared(self, tmp_path):
        parted_folder(tmp_path, {"a": 3, "b": 2, "c": 3})
        sizes = []
        for rank in range(2):
            module = on_device(FewShotDataModule(str(tmp_path), shots=1, image_size=8, protocol="base-to-new"), rank, 2)
            module.setup("test")
            sizes.append([len(collected(loader).label) for loader in module.test_dataloader()])
            assert module.test_sizes() == {"base": 5, "new": 3}
        assert sizes == [[3, 2], [2, 1]]

    def test_features_are_computed_of_all_images_on_each_device(self):
        for rank in range(2):
            module = on_device(fitted(), rank, 2)
            module.setup("test")
            for part, count in (("train", 40), ("val", 40), ("test", 539)):
                assert collected(module.eval_order_dataloader(part)).index.tolist() == list(range(count))


class TestTooFewImages:
    def module(self, root, devices, **settings):
        return on_device(FewShotDataModule(str(root), **{"shots": 1, "image_size": 8} | settings), devices - 1, devices)

    def test_one_line_names_part_and_numbers(self, tmp_path):
        parted_folder(tmp_path, {"a": 1, "b": 1, "c": 1})
        module = self.module(tmp_path, 4)
        module.images = [str(tmp_path / "test" / "a")]
        for stage in ("fit", "test", "predict"):
            module.setup(stage)
        for part, message in (
            (
                "train",
                "3 training images cannot be shared by 4 devices: give more images, or set --trainer.devices to 3",
            ),
            ("val", "3 validation images cannot be shared by 4 devices: "),
            ("test", "3 test images cannot be shared by 4 devices: "),
            ("predict", "1 predict images cannot be shared by 4 devices: .* to 1 or less"),
        ):
            with pytest.raises(UserError, match=message) as error:
                getattr(module, f"{part}_dataloader")()
            assert "\n" not in str(error.value)

    def test_as_many_as_devices_will_do(self, tmp_path):
        parted_folder(tmp_path, {"a": 1, "b": 1, "c": 1})
        seen = []
        for rank in range(3):
            module = on_device(self.module(tmp_path, 3), rank, 3)
            module.setup("fit")
            seen += [
                collected(loader).index.tolist() for loader in (module.train_dataloader(), module.val_dataloader())
            ]
        assert sorted(seen) == [[0], [0], [1], [1], [2], [2]]

    def test_a_half_of_the_classes(self, tmp_path):
        parted_folder(tmp_path, {"a": 2, "b": 2, "c": 1})
        module = self.module(tmp_path, 2, protocol="base-to-new")
        module.setup("test")
        with pytest.raises(UserError, match="1 test/new images cannot be shared by 2 devices"):
            module.test_dataloader()


class TestWorkers:
    def test_none_for_kept_features(self):
        module = fitted(num_workers=2)
        module.setup("test")
        before = module.train_dataloader()
        assert (before.num_workers, before.persistent_workers) == (2, True)
        for part in ("train", "val", "test"):
            module.keep_features(part, torch.randn(1, len(module.part(part)), 5))
        for loader in (
            module.train_dataloader(),
            module.val_dataloader(),
            module.test_dataloader(),
            module.eval_order_dataloader("test"),
        ):
            assert (loader.num_workers, loader.persistent_workers) == (0, False)
        assert collected(before, 0).features.shape == (40, 5)  # made before there were features
        assert before._iterator is None
        assert before.num_workers == 0

    def test_they_stay_for_features_beside_images(self):
        module = fitted(num_workers=1)
        module.keep_features("train", frozen=torch.randn(1, 40, 5))
        loader = module.train_dataloader()
        assert loader.num_workers == 1
        batch = collected(loader, 0)
        assert batch.image.shape == (40, 3, 16, 16)
        assert torch.equal(batch.frozen, module.part("train").frozen[0, batch.index])

    def test_freed_images_are_decoded_before_they_start(self):
        module = fitted(num_workers=2)
        expected = collected(fitted().train_dataloader(), 0)
        module.part("train").keep(free=True)
        loader = module.train_dataloader()
        iterator = iter(loader)
        assert len(module.part("train").arrays) == 40
        assert next(iterator).image.shape == (8, 3, 16, 16)
        assert same(collected(loader, 0), expected)

    def test_only_parts_read_again_and_again_keep_them(self, tmp_path):
        module = fitted(num_workers=1)
        module.images = [str(save_image(tmp_path / "x.png"))]
        module.setup("test")
        module.setup("predict")
        assert module.train_dataloader().persistent_workers
        assert module.val_dataloader().persistent_workers
        for once in (module.test_dataloader(), module.predict_dataloader(), module.eval_order_dataloader("train")):
            assert not once.persistent_workers


class TestLostWorkers:
    @pytest.fixture
    def root(self, tmp_path, monkeypatch):
        """A data set whose images kill the process that loads them, when it was started for loading."""
        true = FileImages.open

        def deadly(images, path, *args, **options):
            if torch.utils.data.get_worker_info() is not None:
                os.kill(os.getpid(), signal.SIGKILL)
            return true(images, path, *args, **options)

        monkeypatch.setattr(FileImages, "open", deadly)
        return parted_folder(tmp_path / "pets", {"a": 3, "b": 3})

    def told(self, error):
        message = str(error.value)
        assert "\n" not in message
        assert re.match(r"A process that loads images has died \(.*memory.*num_workers 0", message)
        assert error.value.__cause__ is None

    @pytest.mark.parametrize("workers", [1, 2])
    def test_one_line_names_the_way_out(self, root, workers):
        module = FewShotDataModule(str(root), shots=1, image_size=8, num_workers=workers, eval_batch_size=1)
        module.setup("test")
        with pytest.raises(UserError) as error:
            list(module.test_dataloader())
        self.told(error)
        module.num_workers = 0
        assert len(collected(module.test_dataloader()).label) == 6

    @pytest.mark.filterwarnings("ignore")
    def test_through_the_trainer(self, root, tmp_path):
        module = FewShotDataModule(str(root), shots=1, image_size=16, num_workers=1)
        with pytest.raises(UserError) as error:
            trainer(tmp_path, 1).test(Recorder(), datamodule=module, verbose=False)
        self.told(error)

    @pytest.mark.parametrize(
        ("error", "lost"),
        [
            (RuntimeError("DataLoader worker (pid(s) 7, 8) exited unexpectedly"), True),
            (RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. "), True),
            (ConnectionResetError(104, "Connection reset by peer"), True),
            (EOFError(), True),
            (FileNotFoundError(2, "No such file or directory"), True),
            (FileNotFoundError("Caught FileNotFoundError in DataLoader worker process 0.\nOriginal"), False),
            (RuntimeError("Caught RuntimeError in DataLoader worker process 0.\nOriginal"), False),
            (OSError(24, "Too many open files"), False),
            (RuntimeError("shapes"), False),
        ],
        ids=repr,
    )
    def test_what_means_that_it_is_lost(self, error, lost):
        found = lost_worker(error)
        assert (found is not None) == lost
        assert "\n" not in str(found)

    def test_other_errors_stay(self, root, monkeypatch):
        def broken(*_, **__):
            raise RuntimeError("of a decoder")

        monkeypatch.setattr(FileImages, "open", broken)
        for workers in (0, 1):
            module = FewShotDataModule(str(root), shots=1, image_size=8, num_workers=workers)
            module.setup("test")
            with pytest.raises(RuntimeError, match="of a decoder"):
                list(module.test_dataloader())


class Positions(pl.LightningModule):
    def predict_step(self, batch):
        assert batch.image.shape[1:] == (3, 16, 16)
        return batch.index.tolist()


@pytest.mark.filterwarnings("ignore")
class TestLightning:
    @pytest.mark.parametrize(("rank", "devices"), [(0, 1), (0, 2), (1, 2)])
    def test_prediction_keeps_the_share(self, tmp_path, monkeypatch, rank, devices):
        """Lightning builds prediction loaders anew."""
        for i in range(7):
            save_image(tmp_path / f"{i}.png", seed=i)
        monkeypatch.setattr("kshot.data.prediction.share", lambda part, _: (rank, devices))
        module = digits(eval_batch_size=2)
        module.images = [str(tmp_path)]
        batches = trainer(tmp_path, 1).predict(Positions(), datamodule=module)
        assert [index for batch in batches for index in batch] == list(range(rank, 7, devices))

    def test_training_keeps_the_share(self, tmp_path, monkeypatch):
        monkeypatch.setattr("kshot.data.datamodule.share", lambda part, _: (1, 2))
        recorder = Recorder()
        trainer(tmp_path, 2).fit(recorder, datamodule=digits(batch_size=6))
        expected = on_device(fitted(batch_size=6), 1, 2).train_dataloader()
        assert isinstance(expected, PartLoader)
        for epoch in range(2):
            batches = [batch for e, batch in recorder.seen["train"] if e == epoch]
            expected.sampler.set_epoch(epoch)
            assert all(same(a, b) for a, b in zip(batches, expected, strict=True))
            assert len(batches) == 3
