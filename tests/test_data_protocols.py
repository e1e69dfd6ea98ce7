"""Protocols: which classes are trained on, what is tested, and what cannot be asked for."""

import json

import lightning.pytorch as pl
import pytest
import torch
from data_fixtures import parted_folder, save_image, split_file, split_of

from kshot import data
from kshot.data import Batch, CropFlip, FewShotDataModule
from kshot.data.catalogue import CATALOGUE, load_split
from kshot.data.entries import DatasetEntry
from kshot.data.protocols import as_in_source, check_protocol, class_groups, restrict
from kshot.data.splits import Row
from kshot.errors import UserError

PETS = {"Ant": 3, "black_bear": 3, "cat": 3, "dog": 3, "emu": 3}


@pytest.fixture
def root(tmp_path):
    """A data root with pets, another data set of other classes, and a domain with some of the pets."""
    parted_folder(tmp_path / "pets", PETS)
    parted_folder(tmp_path / "vehicles", {"bike": 2, "car": 4}, ("train", "test"))
    parted_folder(tmp_path / "sketch", {"Dog": 1, "ant": 2}, ("train", "test"))
    return tmp_path


def module(root, protocol="all-to-all", **settings):
    known = {"root": str(root), "shots": 2, "image_size": 8, "batch_size": 4}
    return FewShotDataModule("pets", **known | {"protocol": protocol} | settings)


def labels_of(loader):
    return torch.cat([batch.label for batch in loader]).tolist()


class TestHalves:
    @pytest.mark.parametrize(
        ("dataset", "base", "new"),
        [
            ("caltech101", 1549, 916),
            ("oxford_pets", 1881, 1788),
            ("stanford_cars", 4002, 4039),
            ("oxford_flowers", 1053, 1410),
            ("dtd", 864, 828),
            ("eurosat", 4200, 3900),
            ("ucf101", 1934, 1849),
        ],
    )
    def test_published_counts(self, dataset, base, new):
        split, _ = load_split(dataset)
        groups = class_groups("base-to-new", split)
        halves = {name: restrict(split.test, labels) for name, labels in groups.items()}
        assert {name: len(rows) for name, rows in halves.items()} == {"base": base, "new": new}
        classes = len(split.class_names)
        assert len(groups["base"]) == -(-classes // 2)
        for name, rows in halves.items():
            assert {row.label for row in rows} == set(range(len(groups[name])))
            for row in rows:
                assert row.class_name == split.class_names[groups[name][row.label]]

    def test_one_class_has_no_halves(self):
        with pytest.raises(UserError, match="toy: protocol base-to-new halves the classes, and there is one"):
            class_groups("base-to-new", split_of({0: 3}))
        assert class_groups("base-to-new", split_of({0: 3, 1: 3})) == {"base": range(1), "new": range(1, 2)}

    def test_other_protocols_have_all_classes(self):
        split = split_of({0: 1, 1: 1, 2: 1})
        assert class_groups("all-to-all", split) == {"test": range(3)}
        assert class_groups("cross-dataset", split) == class_groups("domain-generalisation", split) == {"toy": range(3)}

    def test_restrict_keeps_the_order(self):
        rows = [Row("a", 3, "x"), Row("b", 0, "y"), Row("c", 2, "z"), Row("d", 3, "x")]
        assert restrict(rows, range(2, 4)) == (Row("a", 1, "x"), Row("c", 0, "z"), Row("d", 1, "x"))


class TestAllToAll:
    def test_one_test_set(self, root):
        pets = module(root)
        names = ("Ant", "black bear", "cat", "dog", "emu")
        assert pets.test_sets == [data.TestSet("test", names, ("a photo of a {}.",))]
        pets.setup("test")
        assert labels_of(pets.test_dataloader()) == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3, 4, 4, 4]

    def test_info(self, root):
        info = module(root).split_info()
        assert (info["protocol"], info["targets"], info["sampler"]) == ("all-to-all", {}, "coop-v1")
        assert (info["shots"], info["val_shots"]) == (2, 2)

    def test_samplers_by_name(self, root):
        info = module(root, shots=None, sampler="percent:66").split_info()
        assert (info["sampler"], info["shots"], info["counts"]["train"]) == ("percent:66", None, 10)
        info = module(root, sampler="tip").split_info()
        assert (info["sampler"], info["val_shots"], info["counts"]["val"]) == ("tip", None, 15)


class TestBaseToNew:
    def test_classes_and_test_sets(self, root):
        pets = module(root, "base-to-new", template="the {}.")
        assert pets.class_names == ["Ant", "black bear", "cat"]
        assert pets.test_sets == [
            data.TestSet("base", ("Ant", "black bear", "cat"), ("the {}.",)),
            data.TestSet("new", ("dog", "emu"), ("the {}.",)),
        ]
        info = pets.split_info()
        assert info["counts"] == {"train": 6, "val": 6, "test": 15}
        assert (info["protocol"], info["targets"]) == ("base-to-new", {})
        json.dumps(info)

    def test_names_given_are_those_of_both_halves(self, root):
        pets = module(root, "base-to-new", class_names=list("abcde"))
        assert pets.class_names == ["a", "b", "c"]
        assert pets.test_sets[1].class_names == ("d", "e")
        with pytest.raises(UserError, match="3 class_names for the 5 of pets"):
            module(root, "base-to-new", class_names=list("abc"))

    @pytest.mark.parametrize("sampler", ["coop-v1", "cliplora", "nested"])
    def test_the_shots_are_those_of_the_whole_run(self, root, sampler, tmp_path):
        whole, half = (module(root, p, sampler=sampler) for p in ("all-to-all", "base-to-new"))
        assert half.draw.train == tuple(row for row in whole.draw.train if row.label < 3)
        assert half.draw.val == tuple(row for row in whole.draw.val if row.label < 3)
        assert half.draw.digest == whole.draw.digest == whole.split_info()["digest"]
        whole.write_manifest(tmp_path / "whole.json")
        half.write_manifest(tmp_path / "half.json")
        assert (tmp_path / "whole.json").read_bytes() == (tmp_path / "half.json").read_bytes()

    def test_manifests_serve_either_protocol(self, root, tmp_path):
        whole, half = (module(root, p, split_seed=7) for p in ("all-to-all", "base-to-new"))
        whole.write_manifest(tmp_path / "whole.json")
        half.write_manifest(tmp_path / "half.json")
        manifests = {name: str(tmp_path / f"{name}.json") for name in ("whole", "half")}
        assert module(root, "base-to-new", manifest=manifests["whole"]).draw == half.draw
        assert module(root, "base-to-new", manifest=manifests["whole"]).split_info() == half.split_info()
        assert module(root, manifest=manifests["half"]).draw == whole.draw

    def test_no_new_class_is_seen_in_training(self, root):
        pets = module(root, "base-to-new", augment=CropFlip(), shots=3)
        pets.setup("fit")
        base = {row.path for row in pets.draw.train}
        assert {path.split("/")[1] for path in base} == {"Ant", "black_bear", "cat"}
        loader = pets.train_dataloader()
        for epoch in range(3):
            loader.sampler.set_epoch(epoch)
            for batch in loader:
                assert set(batch.label.tolist()) <= {0, 1, 2}
        assert sorted(labels_of(pets.eval_order_dataloader("train"))) == [0] * 3 + [1] * 3 + [2] * 3
        assert sorted(labels_of(pets.val_dataloader())) == [0] * 3 + [1] * 3 + [2] * 3
        for half in pets.train_halves():
            drawn = [next(half) for _ in range(4)]
            assert set(torch.cat([batch.label for batch in drawn]).tolist()) == {0, 1, 2}

    def test_loaders_in_order_and_closed_again(self, root):
        pets = module(root, "base-to-new")
        pets.setup("test")
        base, new = pets.test_dataloader()
        assert labels_of(base) == [0, 0, 0, 1, 1, 1, 2, 2, 2]
        assert labels_of(new) == [0, 0, 0, 1, 1, 1]
        whole = module(root)
        whole.setup("test")
        images = torch.cat([batch.image for batch in whole.test_dataloader()])
        assert torch.equal(torch.cat([batch.image for loader in (base, new) for batch in loader]), images)
        assert pets.test_sizes() == {"base": 9, "new": 6}
        pets.teardown("test")
        with pytest.raises(RuntimeError, match=r"the test/base part opens with setup\('test'\)"):
            pets.test_dataloader()
        pets.setup("test")
        assert len(pets.test_dataloader()) == 2

    def test_labels_out_of_order(self, tmp_path):
        """The halves are of the labels, not of the order in which the file names them."""
        parts = {part: [[f"{part}/{c}.png", c, f"class {c}"] for c in (4, 1, 3, 0, 2)] for part in ("train", "test")}
        for rows in parts.values():
            for path, c, _ in rows:
                save_image(tmp_path / path, seed=c)
        path = split_file(tmp_path / "s.json", **parts)
        pets = FewShotDataModule(str(path), protocol="base-to-new", shots=1, image_size=8)
        assert [row.label for row in pets.draw.train] == [1, 0, 2]
        pets.setup("test")
        assert [labels_of(loader) for loader in pets.test_dataloader()] == [[1, 0, 2], [1, 0]]

    @pytest.mark.parametrize(
        ("tested", "message"),
        [((0, 1), "s: there are no test images of the new classes"), ((2,), "there are no test images of the base cl")],
    )
    def test_a_half_without_test_images(self, tmp_path, tested, message):
        rows = {
            "train": [[f"{c}.png", c, f"class {c}"] for c in range(3)],
            "test": [[f"test{c}.png", c, f"class {c}"] for c in tested],
        }
        path = split_file(tmp_path / "s.json", **rows)
        with pytest.raises(UserError, match=message):
            FewShotDataModule(str(path), protocol="base-to-new", shots=1)
        FewShotDataModule(str(path), shots=1)  # it may be trained on all the same

    def test_a_base_half_without_training_images(self, tmp_path):
        parts = {"train": [["2.png", 1, "b"]], "test": [["0.png", 0, "a"], ["1.png", 1, "b"]]}
        path = split_file(tmp_path / "s.json", **parts)
        with pytest.raises(UserError, match="s: there are no training images"):
            FewShotDataModule(str(path), protocol="base-to-new", shots=None)


class TestCrossDataset:
    def test_test_sets(self, root):
        pets = module(
            root, "cross-dataset", targets=["vehicles", "digits"], template="my {}", class_names=list("abcde")
        )
        assert pets.class_names == list("abcde")
        source, vehicles, digits = pets.test_sets
        assert source == data.TestSet("pets", tuple("abcde"), ("my {}",))
        assert vehicles == data.TestSet("vehicles", ("bike", "car"), ("a photo of a {}.",))
        assert (digits.name, digits.class_names[3], digits.templates) == (
            "digits",
            "three",
            (CATALOGUE["digits"].template,),
        )

    def test_loaders(self, root):
        pets = module(root, "cross-dataset", targets=["vehicles", "digits"])
        pets.setup("fit")
        assert set(labels_of(pets.train_dataloader())) <= set(range(5))
        with pytest.raises(RuntimeError, match="the test/pets part opens"):
            pets.test_dataloader()
        pets.setup("test")
        loaders = pets.test_dataloader()
        assert [len(labels_of(loader)) for loader in loaders] == [15, 6, 539]
        assert labels_of(loaders[1]) == [0, 0, 1, 1, 1, 1]
        assert len(labels_of(pets.train_dataloader())) == 8
        pets.teardown("test")
        assert set(pets._parts) == {"train", "val"}

    def test_info(self, root):
        pets = module(root, "cross-dataset", targets=["vehicles", "digits"])
        info = pets.split_info()
        assert info["protocol"] == "cross-dataset"
        assert info["targets"] == {name: load_split(name, root)[0].sha256 for name in ("vehicles", "digits")}
        assert info["source_sha256"] == load_split("pets", root)[0].sha256
        assert info["counts"] == {"train": 10, "val": 10, "test": 15 + 6 + 539}
        assert info["digest"] == module(root).split_info()["digest"]
        json.dumps(info)

    def test_csv_and_split_files_are_targets(self, root):
        (root / "list.csv").write_text("path,label,split\nvehicles/test/car/00.png,car,test\n")
        path = split_file(root / "s.json", test=[["vehicles/test/bike/00.png", 0, "bike"]])
        pets = module(root, "cross-dataset", targets=["list.csv", str(path)])
        pets.setup("test")
        assert [len(labels_of(loader)) for loader in pets.test_dataloader()] == [15, 1, 1]

    def test_no_attribute_reaches_a_test_row_before(self, root):
        save_image(root / "secret.png")
        split_file(root / "s.json", test=[["secret.png", 0, "a"]])
        pets = module(root, "cross-dataset", targets=["s.json"])
        pets.setup("fit")
        seen, todo = set(), [pets]
        while todo:
            item = todo.pop()
            if id(item) in seen:
                continue
            seen.add(id(item))
            assert "secret" not in (repr(item) if isinstance(item, str | bytes) else "")
            todo += vars(item).values() if hasattr(item, "__dict__") else []
            todo += item.values() if isinstance(item, dict) else []
            todo += list(item) if isinstance(item, list | tuple | set) else []
        assert len(seen) > 100
        pets.setup("test")
        assert pets.part("test/s").paths == ["secret.png"]

    @pytest.mark.parametrize(
        ("targets", "message"),
        [
            (["pets"], "targets: 'pets' is called 'pets', as another data set of this run is"),
            (["./pets"], "targets: './pets' is called 'pets'"),
            (["digits", "digits"], "'digits' is called 'digits', .*: give each one once, without the source 'pets'"),
            (["digit"], "unknown data set 'digit'.*Did you mean 'digits'"),
            (["cifar10"], "no CIFAR10 in "),
            (["empty.csv"], "-empty: there are no test images"),
            (["only-train.json"], "only-train: there are no test images"),
            (["test-only"], "test-only: has 'test' but no 'train' folder"),
        ],
    )
    def test_mistakes_before_any_image_is_opened(self, root, targets, message, monkeypatch):
        (root / "empty.csv").write_text("path,label,split\nx.png,car,train\n")
        split_file(root / "only-train.json", train=[["x.png", 0, "a"]])
        parted_folder(root / "test-only", {"a": 1}, ("test",))
        monkeypatch.setattr(DatasetEntry, "images", None)
        with pytest.raises(UserError, match=message) as error:
            module(root, "cross-dataset", targets=targets)
        assert "\n" not in str(error.value)

    def test_missing_images_show_at_the_test_only(self, root):
        split_file(root / "s.json", test=[["x.png", 0, "a"]])
        pets = module(root, "cross-dataset", targets=["s.json", "dtd"])
        pets.setup("fit")
        with pytest.raises(UserError, match="no test images: looked for"):
            pets.setup("test")
        with pytest.raises(RuntimeError, match="opens with"):
            pets.test_dataloader()  # and none is left open

    def test_a_target_that_changed_meanwhile(self, root):
        pets = module(root, "cross-dataset", targets=["vehicles"])
        save_image(root / "vehicles" / "test" / "car" / "new.png")
        with pytest.raises(UserError, match="vehicles has changed since"):
            pets.setup("test")

    def test_numbers_as_names_are_pointed_out(self, root):
        parted_folder(root / "numbers", {"0": 1, "1": 1}, ("train", "test"))
        with pytest.warns(UserWarning, match="classes of numbers are called '0' .* give the target as a CSV"):
            module(root, "cross-dataset", targets=["numbers"])

    def test_unreadable_images_are_counted_by_test_set(self, root):
        (root / "vehicles" / "test" / "car" / "00.png").write_text("broken")
        pets = module(root, "cross-dataset", targets=["vehicles"], skip_unreadable=True)
        with pytest.warns(UserWarning, match="1 of 6 images are left out"):
            pets.setup("test")
        assert pets.test_sizes() == {"pets": 15, "vehicles": 5}

    def test_workers(self, root):
        pets = module(root, "cross-dataset", targets=["vehicles"], num_workers=1)
        pets.setup("test")
        loaders = pets.test_dataloader()
        assert [len(labels_of(loader)) for loader in loaders] == [15, 6]
        assert not any(loader.persistent_workers for loader in loaders)


class TestDomainGeneralisation:
    def test_source_spelling_target_order_source_templates(self, root):
        pets = module(root, "domain-generalisation", targets=["sketch"], template=["my {}", "the {}"])
        source, sketch = pets.test_sets
        assert source.class_names == ("Ant", "black bear", "cat", "dog", "emu")
        assert sketch == data.TestSet("sketch", ("dog", "Ant"), ("my {}", "the {}"))
        pets.setup("test")
        assert [labels_of(loader) for loader in pets.test_dataloader()][1] == [0, 1, 1]
        assert pets.split_info()["targets"].keys() == {"sketch"}

    def test_underscores_and_names_given(self):
        target = split_of({0: 1, 1: 1})  # class 0, class 1
        assert as_in_source(target, ["CLASS 1", "other", "Class 0"]) == ["Class 0", "CLASS 1"]

    def test_other_classes(self, root):
        with pytest.raises(UserError) as error:
            module(root, "domain-generalisation", targets=["sketch", "vehicles"])
        assert str(error.value) == (
            "vehicles: protocol domain-generalisation tests on classes of the source only, and it has no "
            "'bike', 'car'; other classes are for protocol cross-dataset"
        )
        with pytest.raises(UserError, match="'zero', 'one', 'two', 'three', 'four' and 5 more; other"):
            module(root, "domain-generalisation", targets=["digits"])

    def test_names_given_to_the_source_count(self, root):
        with pytest.raises(UserError, match="no 'Dog', 'ant'"):
            module(root, "domain-generalisation", targets=["sketch"], class_names=list("abcde"))


class TestOptions:
    @pytest.mark.parametrize("protocol", ["all-to-all", "base-to-new"])
    def test_targets_where_there_are_none(self, protocol):
        with pytest.raises(UserError) as error:
            check_protocol(protocol, ["dtd"])
        assert str(error.value) == (
            f"protocol {protocol} tests on no other data set: leave out data.targets, or set --data.protocol to "
            "cross-dataset or domain-generalisation"
        )
        check_protocol(protocol, None)

    @pytest.mark.parametrize("protocol", ["cross-dataset", "domain-generalisation"])
    @pytest.mark.parametrize("targets", [None, []])
    def test_no_targets(self, root, protocol, targets):
        with pytest.raises(
            UserError, match=rf"protocol {protocol} needs .* set --data.targets, as in '\[dtd, eurosat\]'"
        ):
            module(root, protocol, targets=targets)

    def test_unknown_protocol(self, root):
        with pytest.raises(UserError, match=r"unknown protocol 'base-to-old'. Did you mean 'base-to-new'"):
            module(root, "base-to-old")


class TestFrozenFeatures:
    """Features of the untouched backbone beside the inputs, for methods that are taught by it."""

    @pytest.mark.parametrize(("augment", "views"), [(None, 1), (CropFlip(), 3)])
    @pytest.mark.parametrize("replaced", [False, True])
    def test_rows_by_view_and_index(self, root, augment, views, replaced):
        pets = module(root, "base-to-new", augment=augment, views=views)
        pets.setup("fit")
        loader = pets.train_dataloader()
        assert next(iter(loader)).frozen is None
        features = torch.randn(views, 6, 5)
        pets.keep_features("train", frozen=features)
        if replaced:
            pets.keep_features("train", torch.randn(views, 6, 7))
        for epoch in range(views + 1):
            loader.sampler.set_epoch(epoch)
            for batch in loader:
                carried = batch.features if replaced else batch.image
                assert carried.shape[1:] == ((7,) if replaced else (3, 8, 8))
                assert (batch.image is None) == replaced
                assert torch.equal(batch.frozen, features[epoch % views, batch.index])
        for half in pets.train_halves():
            batch = next(half)
            assert torch.equal(batch.frozen, features[0, batch.index])
        assert next(iter(pets.val_dataloader())).frozen is None
        part = pets.part("train")
        assert torch.equal(part.__getitems__([(2, views - 1)]).frozen[0], features[views - 1, 2])

    @pytest.mark.parametrize("shape", [(10, 5), (2, 10, 5), (1, 9, 5), (0, 10, 5)])
    def test_wrong_shapes(self, root, shape):
        pets = module(root)
        pets.setup("fit")
        with pytest.raises(ValueError, match=r"for train, which needs \(1, 10, D\)"):
            pets.keep_features("train", frozen=torch.zeros(shape))

    def test_endless_views_have_no_features_to_keep(self, root):
        pets = module(root, augment=CropFlip())
        pets.setup("fit")
        with pytest.raises(ValueError, match=r"which needs \(0, 10, D\)"):
            pets.keep_features("train", frozen=torch.zeros(1, 10, 5))

    def test_batches_travel(self):
        from lightning.fabric.utilities import move_data_to_device

        batch = Batch(torch.zeros(2, 3), torch.zeros(2).long(), torch.arange(2))
        assert batch.frozen is None
        assert isinstance(move_data_to_device(batch, "cpu"), Batch)
        moved = move_data_to_device(batch._replace(frozen=torch.ones(2, 4)), "cpu")
        assert torch.equal(moved.frozen, torch.ones(2, 4))
        assert move_data_to_device(batch, "cpu").frozen is None


class Recorder(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(3 * 8 * 8, 5)
        self.seen: dict[int, list[int]] = {}

    def training_step(self, batch):
        return torch.nn.functional.cross_entropy(self.layer(batch.image.flatten(1) / 255), batch.label)

    def test_step(self, batch, batch_idx, dataloader_idx=0):
        self.seen.setdefault(dataloader_idx, []).extend(batch.label.tolist())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.mark.filterwarnings("ignore")
def test_lightning_tests_in_order(root):
    pets = module(root, "domain-generalisation", targets=["sketch"])
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    run = pl.Trainer(max_epochs=1, accelerator="cpu", default_root_dir=root, enable_checkpointing=False, **quiet)
    recorder = Recorder()
    run.fit(recorder, datamodule=pets)
    run.test(recorder, datamodule=pets, verbose=False)
    assert {index: len(labels) for index, labels in recorder.seen.items()} == {0: 15, 1: 3}
    assert recorder.seen[1] == [0, 1, 1]
