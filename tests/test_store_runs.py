"""Runs that read what earlier ones encoded or decoded: the same figures, and no image opened for them."""

import json
import logging
import os
import re
import shutil
from collections import Counter
from functools import partial
from pathlib import Path

import lightning.pytorch as pl
import many_runs
import pytest
import several_stores
import torch
import towers
from command_line import assert_same_figures
from data_fixtures import parted_folder, save_image
from studies import apart, ended

import kshot.classifiers
import kshot.data.digests
from kshot.adapters import AdaLoRA, FullTuning, LoRA
from kshot.backbones import OpenClip
from kshot.classifiers import (
    GDA,
    VPT,
    Classifier,
    CLIPAdapter,
    CoOp,
    LinearProbe,
    LogisticProbe,
    MaPLe,
    NearestClassMean,
    ProLIP,
    PromptSRC,
    TextPrompt,
    TipAdapterF,
)
from kshot.data import CropFlip, FewShotDataModule
from kshot.data.images import FileImages
from kshot.errors import UserError
from kshot.features import FeatureStore, store_of
from kshot.run import build, evaluate, fit, make_trainer
from kshot.store import contents, root_folder

HEADS = many_runs.exported(kshot.classifiers, Classifier)
# one for each set of what a classifier may need of the images (shots, val, features before the projection) with steps
# and without, and all that train in the image tower
KINDS = [TextPrompt, GDA, LogisticProbe, CoOp, LinearProbe, ProLIP, CLIPAdapter, TipAdapterF, PromptSRC, MaPLe, VPT]
IMAGES = {"train": 4, "val": 4, "test": 6}  # a class has
CLASSES = ("ant", "boat", "clock")


@pytest.fixture
def backbone(tiny):
    return tiny


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    """Photos in folders, which no test changes."""
    root, seed = tmp_path_factory.mktemp("images") / "photos", 0
    for part, count in IMAGES.items():
        for name in CLASSES:
            for i in range(count):
                save_image(root / part / name / f"{i:02}.bmp", seed := seed + 1)
    for folder in (root, *root.rglob("*/")):
        os.utime(folder, (1e9, 1e9))  # what has just changed is listed again
    return root


@pytest.fixture
def root(photos, tmp_path, monkeypatch) -> Path:
    """A copy of them that a test may change, and an empty store."""
    monkeypatch.setenv("KSHOT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(logging.getLogger("kshot"), "level", logging.INFO)
    return shutil.copytree(photos, tmp_path / "photos")


@pytest.fixture(scope="module")
def filled(photos, tiny_clip, tmp_path_factory) -> Path:
    """A cache with the features of all of them, which no test changes."""
    cache = tmp_path_factory.mktemp("filled")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KSHOT_CACHE", str(cache))
        figures(tiny_clip, photos, classifier=LogisticProbe)
    return cache


@pytest.fixture
def seen(monkeypatch):
    """Counts images that are opened and images that are encoded."""
    count, opened = Counter(), FileImages.open
    encode, unprojected = OpenClip.encode_normalised, OpenClip.encode_unprojected

    def open_one(self, path, *rest, **options):
        count["opened"] += 1
        return opened(self, path, *rest, **options)

    def encode_some(self, image):
        count["encoded"] += len(image)
        return encode(self, image)

    monkeypatch.setattr(FileImages, "open", open_one)

    def encode_unprojected(self, image, tokens):
        count["encoded"] += len(image) * (not tokens)
        return unprojected(self, image, tokens)

    monkeypatch.setattr(OpenClip, "encode_normalised", encode_some)
    monkeypatch.setattr(OpenClip, "encode_unprojected", encode_unprojected)
    return count


def data_of(root, **settings):
    return FewShotDataModule(str(root), **{"shots": 3, "batch_size": 4, "eval_batch_size": 5} | settings)


def figures(backbone, root, seen=None, trainer=None, data=None, **settings):
    """What a run comes to, and how many images it opened and encoded beyond its trial step."""
    data = data or {}
    module_data, store = data_of(root, **data), FeatureStore(backbone)
    optimizer = partial(torch.optim.SGD, lr=0.01)
    module = build(backbone, module_data, optimizer=optimizer, **settings)
    if seen is not None:
        seen.clear()
    run = make_trainer(max_epochs=2, **{"limit_val_batches": 0} | (trainer or {}))
    fit(module, module_data, run, store=store)
    tested = evaluate(module, module_data, run, store=store)
    state = {name: tensor.clone() for name, tensor in module.tuned_state().items()}
    trial = 2 * module.takes_steps
    module.detach()
    counts = None if seen is None else (seen["opened"], seen["encoded"] - trial)
    return {"sets": tested.sets, "per_class": tested.per_class, "state": state}, counts, store


def same(one, two):
    assert str(one["sets"]) == str(two["sets"])
    assert str(one["per_class"]) == str(two["per_class"])
    assert one["state"].keys() == two["state"].keys()
    assert all(torch.equal(tensor, two["state"][name]) for name, tensor in one["state"].items())


def settings_of(head, backbone, root):
    """Settings of a run with a classifier, whether its image tower is frozen, and how many images it needs."""
    settings = {"classifier": partial(head, **many_runs.HEAD_SETTINGS.get(head.__name__, {}))}
    probe = build(backbone, data_of(root), **settings)
    needs = probe.classifier.needs
    probe.detach()
    judged = "val" in needs or ("shots" in needs and not probe.takes_steps)  # a start of what trains judges nothing
    images = 18 + 9 * (probe.takes_steps or "shots" in needs) + 9 * judged
    return settings | {"data": {"batch_size": 9}}, probe.has_frozen_images, images


@pytest.mark.parametrize("head", KINDS, ids=lambda head: head.__name__)
def test_a_second_run_opens_no_image_where_nothing_trains_in_the_image_tower(head, backbone, root, seen):
    settings, frozen, images = settings_of(head, backbone, root)
    first, before, _ = figures(backbone, root, seen, **settings)
    second, after, _ = figures(backbone, root, seen, **settings)
    same(first, second)
    if frozen:
        assert before == (images, images), "each once"
        assert after == (0, 0)
    else:
        assert after[0] >= 18 + 9, "prompts in the image tower need the images"
        assert after[1] < before[1], "but not the untouched tower"


@pytest.mark.parametrize("head", [head for head in HEADS if head not in KINDS], ids=lambda head: head.__name__)
def test_every_other_classifier_reads_each_image_once(head, backbone, photos, filled, tmp_path, monkeypatch, seen):
    """That it finds the same is what test_run.py asserts, of every method."""
    monkeypatch.setenv("KSHOT_CACHE", str(shutil.copytree(filled, tmp_path / "cache")))
    settings, frozen, images = settings_of(head, backbone, photos)
    _, counts, store = figures(backbone, photos, seen, **settings)
    assert frozen
    assert counts == (0, 0)
    assert (dict(store.encoded), sum(store.read.values())) == ({}, images)


def test_a_run_that_reads_equals_one_without_a_store(backbone, root, seen):
    settings = {"classifier": partial(CoOp, context_length=2), "data": {"augment": CropFlip(), "views": 2}}
    plain, alone, _ = figures(backbone, root, seen, **settings | {"data": settings["data"] | {"store_gb": 0}})
    assert contents() == []
    first, before, _ = figures(backbone, root, seen, **settings)
    second, after, store = figures(backbone, root, seen, **settings)
    same(plain, first)
    same(plain, second)
    assert alone == before == (9 + 18, 2 * 9 + 18), "an image is opened once for both of its views"
    assert after == (0, 0)
    assert (dict(store.encoded), store.read) == ({}, {"train": 18, "test": 18})


def test_the_validation_shots_too(backbone, root, seen):
    settings = {"classifier": LinearProbe, "trainer": {"limit_val_batches": 1.0}}
    first, before, _ = figures(backbone, root, seen, **settings)
    second, after, _ = figures(backbone, root, seen, **settings)
    same(first, second)
    assert (before, after) == ((9 + 9 + 18,) * 2, (0, 0))


def test_validate_reads_them(backbone, root, seen):
    data, module = data_of(root), build(backbone, data_of(root), classifier=TextPrompt)
    data.use_preprocessing(backbone.preprocessing)
    found = [make_trainer().validate(module, datamodule=data, verbose=False) for _ in range(2)]
    assert found[0] == found[1]
    assert seen["encoded"] == 9


@pytest.mark.parametrize(
    "adapter", [LoRA(rank=2), AdaLoRA(initial_rank=3, target_rank=2), FullTuning(only="bias")], ids=str
)
def test_a_tower_that_trains_is_encoded_anew_and_the_zero_shot_row_is_read(adapter, backbone, root, seen):
    settings = {"classifier": TextPrompt, "adapter": adapter, "targets": ["image.*"]}
    frozen = figures(backbone, root, classifier=TextPrompt, data={"store_gb": 0})[0]
    first, before, _ = figures(backbone, root, seen, **settings)
    second, after, _ = figures(backbone, root, seen, **settings)
    same(first, second)
    steps = 2 * (9 // 4) * 4
    assert before == (9 + 18, steps + 18 + 18), "for the adapted and for the untouched tower"
    assert after == (9 + 18, steps + 18)
    assert first["sets"]["test"]["zero_shot_acc"] == frozen["sets"]["test"]["acc"]


def test_rows_of_other_batches_differ_in_their_last_bits(backbone):
    """As docs/store.md says."""
    image = torch.randint(0, 256, (24, 3, backbone.image_size, backbone.image_size), dtype=torch.uint8)
    with torch.no_grad():
        whole = backbone.encode_image(image)
        for size in (1, 3, 5, 16):
            parts = torch.cat([backbone.encode_image(some) for some in image.split(size)])
            assert (parts - whole).abs().max() <= 5e-6 * whole.abs().max()


class TestNothingStale:
    """What decides features decides whether they are read."""

    def counts(self, backbone, root, seen, **data):
        return figures(backbone, root, seen, classifier=NearestClassMean, data=data)[1]

    def test_other_weights(self, root, seen):
        backbone = towers.backbone("clip")
        assert self.counts(backbone, root, seen) == (36, 36)
        assert self.counts(towers.build("clip"), root, seen) == (0, 0), "wherever they were loaded"
        with torch.no_grad():
            next(p for name, p in backbone.named_tower_parameters() if name == "image.conv1.weight").data[
                0, 0, 0, 0
            ] += 1e-6
        assert self.counts(backbone, root, seen) == (36, 36)

    def test_weights_of_the_text_tower_do_not_count(self, root, seen):
        backbone = towers.backbone("clip")
        self.counts(backbone, root, seen)
        next(p for name, p in backbone.named_tower_parameters() if name.startswith("text.")).data.add_(1e-3)
        assert self.counts(backbone, root, seen) == (0, 0)

    def test_equal_weights_in_another_build(self):
        plain, other = towers.backbone("clip"), towers.build("clip")
        assert plain.image_sha256() == other.image_sha256()
        other.clip.visual.transformer.resblocks[0].ln_1.eps *= 2
        assert plain.image_sha256() != other.image_sha256()
        last = OpenClip(str(towers.folder_of("clip")), features="mean")
        assert last.weight_sha256 == plain.weight_sha256
        assert last.image_sha256() != plain.image_sha256()
        mean = towers.backbone("clip")
        mean.mean += 1e-3
        assert mean.image_sha256() != plain.image_sha256()

    @pytest.mark.parametrize("method", [each for each in many_runs.cases() if each != "TextPrompt"])
    def test_what_is_attached_or_merged_does_not_count(self, method, backbone):
        expected = backbone.image_sha256()
        data = FewShotDataModule("digits", shots=1)
        module = build(backbone, data, **many_runs.cases()[method])
        assert backbone.image_sha256() == expected
        module.train()
        with torch.no_grad():
            for parameter in module.trained().values():
                parameter.add_(0.1)
        with kshot.holding.merged(module.classifier):
            assert backbone.image_sha256() == expected
        module.detach()
        assert backbone.image_sha256() == expected

    @pytest.mark.parametrize("precision", ["bf16-mixed", "64-true"])
    def test_other_precisions(self, root, seen, precision):
        options = {"classifier": NearestClassMean}
        figures(towers.backbone("clip"), root, seen, **options)
        for expected in ((36, 36), (0, 0)):
            backbone = towers.backbone("clip")
            found = figures(backbone, root, seen, trainer={"precision": precision}, **options)
            assert found[1] == expected

    def test_an_image_that_was_overwritten(self, backbone, root, seen, monkeypatch):
        """By as many bytes, with its time put back; and digests are those that the cache keeps."""
        monkeypatch.setattr(kshot.data.digests, "FEW", 0)
        assert self.counts(backbone, root, seen) == (36, 36)
        file = root / "test" / "boat" / "03.bmp"
        before = file.stat()
        save_image(file, seed=999)
        os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
        assert file.stat().st_size == before.st_size
        assert self.counts(backbone, root, seen) == (1, 1), "the others are read"
        assert self.counts(backbone, root, seen) == (0, 0)

    def test_an_image_that_changes_between_its_digest_and_its_decoding(self, backbone, root, seen, monkeypatch):
        """Its features are those of other bytes than the digest's: they are used, as they would be, and not kept."""
        settled = kshot.data.parts.Part.row_keys
        file = root / "test" / "boat" / "03.bmp"
        before = file.read_bytes()

        def late(self, view=0):
            keys = settled(self, view)
            if self.name == "test":
                save_image(file, seed=999)
            return keys

        with monkeypatch.context() as patch:
            patch.setattr(kshot.data.parts.Part, "row_keys", late)
            self.counts(backbone, root, seen)
        assert sum(row["rows"] for row in contents()) == 35
        file.write_bytes(before)
        store = figures(backbone, root, classifier=NearestClassMean)[2]
        assert dict(store.encoded) == {"test": 1}

    def test_another_draw_reads_the_images_that_it_shares(self, backbone, root, seen):
        paths = [{row.path for row in data_of(root, split_seed=seed).draw.train} for seed in (1, 2)]
        self.counts(backbone, root, seen)
        new = len(paths[1] - paths[0])
        assert 0 < new < 9
        opened, encoded = self.counts(backbone, root, seen, split_seed=2)
        assert opened == encoded
        val = [{row.path for row in data_of(root, split_seed=seed).draw.val} for seed in (1, 2)]
        assert encoded == new + len(val[1] - val[0])


def test_a_damaged_file_costs_a_line_and_is_made_anew(backbone, root, seen, caplog):
    first, before, _ = figures(backbone, root, seen, classifier=NearestClassMean)
    files = sorted(root_folder().rglob("*.safetensors"))
    damaged = bytearray(files[0].read_bytes())
    damaged[-3] ^= 1
    files[0].write_bytes(damaged)
    caplog.clear()
    second, after, _ = figures(backbone, root, seen, classifier=NearestClassMean)
    same(first, second)
    assert 0 < after[0] == after[1] < before[0]
    assert [str(files[0]) in message for message in caplog.messages].count(True) == 1
    assert figures(backbone, root, seen, classifier=NearestClassMean)[1] == (0, 0)


@pytest.mark.parametrize("lost", ["train", "test"])
class TestUnreadable:
    def broken(self, root, backbone, lost):
        """An image that cannot be read, in the draw or in the test."""
        rows = data_of(root).draw.train if lost == "train" else None
        path = root / (rows[4].path if rows else "test/boat/03.bmp")
        path.write_bytes(b"broken")
        return path

    def test_it_is_named_before_anything_is_encoded_or_left_out(self, lost, backbone, root, seen):
        figures(backbone, root, classifier=NearestClassMean)
        path = self.broken(root, backbone, lost)
        with pytest.raises(UserError, match=path.name):
            figures(backbone, root, seen, classifier=NearestClassMean)
        if lost == "train":
            assert seen["encoded"] == 0
        backbone.detach()

    def test_it_is_left_out_each_time_and_no_other_is_opened(self, lost, backbone, root, seen):
        self.broken(root, backbone, lost)
        settings = {"classifier": LogisticProbe, "data": {"skip_unreadable": True}}
        with pytest.warns(UserWarning, match="1 of .* images are left out"):
            first = figures(backbone, root, seen, **settings)[0]
        with pytest.warns(UserWarning, match="1 of .* images are left out"):
            second, after, _ = figures(backbone, root, seen, **settings)
        same(first, second)
        assert after == (1, 0)

    def test_of_random_views_too(self, lost, backbone, root, seen):
        self.broken(root, backbone, lost)
        data = {"skip_unreadable": True, "augment": CropFlip(), "views": 2}
        settings = {"classifier": LinearProbe, "data": data}
        with pytest.warns(UserWarning, match="images are left out"):
            first = figures(backbone, root, seen, **settings)[0]
        with pytest.warns(UserWarning, match="images are left out"):
            second, after, _ = figures(backbone, root, seen, **settings)
        same(first, second)
        assert after[1] == 0
        if lost == "test":
            assert after[0] == 1


class TestTest:
    def test_one_new_image_is_opened_alone(self, backbone, root, seen):
        figures(backbone, root, classifier=TextPrompt)
        save_image(root / "test" / "boat" / "new.bmp", seed=77)
        found, counts, store = figures(backbone, root, seen, classifier=TextPrompt)
        assert counts == (1, 1)
        assert (dict(store.encoded), store.read) == ({"test": 1}, {"test": 18})
        plain = figures(backbone, root, classifier=TextPrompt, data={"store_gb": 0})[0]
        assert found["sets"]["test"] == pytest.approx(plain["sets"]["test"], abs=1e-6), "encoded in other batches"

    @pytest.mark.parametrize("limit", [2, 0.5, 1])
    def test_a_limit_takes_the_same_images_whatever_is_kept(self, backbone, root, limit):
        settings = {"classifier": TextPrompt, "trainer": {"limit_test_batches": limit}}
        figures(backbone, root, classifier=TextPrompt)
        save_image(root / "test" / "ant" / "05.bmp", seed=900)  # the first of the second batch
        plain = figures(backbone, root, data={"store_gb": 0}, **settings)
        found = figures(backbone, root, **settings)
        same(found[0], plain[0])
        assert sum(found[2].encoded.values()) == (0 if limit == 1 else 5)

    def test_each_test_set(self, backbone, root, seen):
        for part in IMAGES:
            parted_folder(root, {"drum": 6}, (part,))
        settings = {"classifier": partial(CoOp, context_length=2), "data": {"protocol": "base-to-new"}}
        first, _, _ = figures(backbone, root, seen, **settings)
        second, after, store = figures(backbone, root, seen, **settings)
        same(first, second)
        assert after == (0, 0)
        assert {name: count for name, count in store.read.items() if name != "train"} == {
            "test/base": 12,
            "test/new": 12,
        }

    def test_loaders_of_a_users_own_need_none(self, backbone, root):
        data = data_of(root)
        module = build(backbone, data, classifier=TextPrompt)
        data.setup("test")
        trainer = make_trainer()
        (found,) = trainer.test(module, data.test_dataloader(), verbose=False)
        assert 0 <= found["test/acc"] <= 1
        assert store_of(trainer).encoded == {}


class TestDecoded:
    """Decoded evaluation images, on request."""

    def counts(self, backbone, root, seen, **data):
        settings = {"classifier": TextPrompt, "adapter": LoRA(rank=2), "targets": ["image.1.q"]}
        return figures(backbone, root, seen, **settings, data={"keep_decoded": True} | data)

    @pytest.mark.parametrize("workers", [0, 2])
    def test_a_second_run_opens_none(self, backbone, root, seen, workers):
        plain, _, _ = self.counts(backbone, root, seen, keep_decoded=False)
        first, before, _ = self.counts(backbone, root, seen, num_workers=workers)
        second, after, _ = self.counts(backbone, root, seen, num_workers=workers)
        same(plain, first)
        same(plain, second)
        assert before[0] == (27 if workers == 0 else 9), "what processes open is not counted here"
        assert after[0] == 0
        kept = [row for row in contents() if row["kind"] == "images"]
        assert sum(row["rows"] for row in kept) == 27

    def test_they_are_the_same_pixels(self, backbone, root, seen):
        self.counts(backbone, root, seen)
        data, plain = (data_of(root, keep_decoded=keep) for keep in (True, False))
        for each in (data, plain):
            each.use_preprocessing(backbone.preprocessing)
            each.setup("test")
        seen.clear()
        pixels = [torch.cat([batch.image for batch in each.test_dataloader()]) for each in (data, plain)]
        assert torch.equal(*pixels)
        assert seen["opened"] == 18, "by the plain one alone"
        assert pixels[0].dtype == torch.uint8

    def test_those_that_find_no_room_are_not_kept(self, backbone, root, seen, caplog):
        self.counts(backbone, root, seen, store_gb=1e-5)
        assert [row for row in contents() if row["kind"] == "images"] == []
        assert "Decoded images of test are not kept" in caplog.text


class TestMemory:
    """Decoded images are held where steps take them again, and nowhere else."""

    @pytest.mark.parametrize(
        ("settings", "held"),
        [
            ({"classifier": NearestClassMean}, 0),
            ({"classifier": LinearProbe}, 0),
            ({"classifier": LinearProbe, "cache_features": False}, 9),
            ({"classifier": TextPrompt, "adapter": LoRA(rank=1), "targets": ["image.0.q"]}, 9),
            ({"classifier": TextPrompt, "adapter": LoRA(rank=1), "targets": ["text.0.q"]}, 0),
        ],
    )
    def test_held(self, settings, held, backbone, root):
        most = []

        class Watch(pl.Callback):
            def on_train_batch_start(self, trainer, *_):
                most.append(len(trainer.datamodule.opened("train").arrays))

            def on_fit_end(self, trainer, *_):
                most.append(len(trainer.datamodule.opened("train").arrays))

        data = data_of(root, augment=CropFlip(), views=2)
        module = build(backbone, data, **settings)
        fit(module, data, make_trainer(max_epochs=1, limit_val_batches=0, callbacks=[Watch()]))
        module.detach()
        assert set(most) == {held}


def test_the_folder_is_listed_once(backbone, root, monkeypatch):
    listed, scan = Counter(), os.scandir

    def watched(path="."):
        listed[str(path)] += str(path).startswith(str(root))
        return scan(path)

    monkeypatch.setattr(os, "scandir", watched)
    figures(backbone, root, classifier=NearestClassMean)
    found = {path: count for path, count in listed.items() if count}
    assert found == {str(folder): 1 for folder in (root, *root.rglob("*/"))}


def test_two_devices_share_what_is_to_be_encoded(root):
    work = apart(several_stores.work, root, root.parent, str(towers.folder_of("clip")))
    assert ended(work) == 0
    (alone, _), mistake = torch.load(root.parent / "one0.pt")
    found = [torch.load(root.parent / f"two{rank}.pt") for rank in range(2)]
    first, second = zip(*(runs for runs, _ in found), strict=True)
    assert [each["encoded"] for each in first] == [10 + 9, 8 + 9], "5 and 4 images in two views, and 9 test images each"
    assert [each["encoded"] for each in second] == [0, 0]
    assert [mistake for _, mistake in found] == 2 * [mistake], "nobody waits for the one that met it"
    assert "cannot read the image" in mistake
    for one, two in zip(first, second, strict=True):
        assert one["sets"] == two["sets"]
        assert one["sets"]["test"]["acc"] == pytest.approx(alone["sets"]["test"]["acc"])
        assert torch.equal(one["features"], two["features"])
        torch.testing.assert_close(one["features"], alone["features"])
    assert torch.equal(first[0]["features"], first[1]["features"])


def test_the_command_line_tells_and_shows_and_clears(tmp_path, monkeypatch, capsys, few_scans):
    from kshot.cli import main

    monkeypatch.setenv("KSHOT_CACHE", str(tmp_path / "cache"))
    words = [
        "fit",
        "--config",
        "clip_16shot.yaml",
        "--config",
        "methods/class_mean.yaml",
        "--data.shots",
        "2",
        *few_scans,
    ]
    words += ["--trainer.enable_progress_bar", "false", "--run.root", str(tmp_path / "runs")]
    words += ["--run.calibrate", "false"]  # which sees the shots once more, as evaluation does
    results = []
    for number in (1, 2):
        main(words)
        out, err = capsys.readouterr()
        folder = tmp_path / "runs" / "clip_16shot+class_mean" / f"00{number}"
        results.append(json.loads((folder / "result.json").read_text()))
        assert err.count("are read from") == number - 1
    first, second = (result.pop("features") for result in results)
    assert first == {"encoded": {"test": 18, "train": 60, "val": 6}, "read": {"test": 0, "train": 0, "val": 0}}
    assert second == {"encoded": {}, "read": {"test": 18, "train": 60, "val": 6}}
    assert re.search(r"features +│ 0 encoded by the untouched tower, 84 read", out)
    assert_same_figures(*results[:2])
    for words, wanted in ((["--json"], "kshot:glyph_clip"), ([], "CropFlip"), (["--clear"], "freed"), ([], "0 bytes")):
        with pytest.raises(SystemExit, match="0"):
            main(["data", "store", *words])
        assert wanted in capsys.readouterr().out
    assert contents() == []
