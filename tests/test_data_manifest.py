"""Manifests: exact bytes, round trip, and refusal of what was changed."""

import dataclasses
import hashlib
import json
from pathlib import Path

import pytest
from data_fixtures import parted_folder, save_image, split_of

from kshot.data import FewShotDataModule
from kshot.data.catalogue import load_split
from kshot.data.manifest import (
    first_changed,
    manifest_bytes,
    manifest_images,
    read_manifest,
    with_images,
    write_manifest,
)
from kshot.data.sampling import SAMPLERS, draw, draw_digest
from kshot.data.splits import Row
from kshot.errors import UserError
from kshot.files import write_atomically


def write(path, split, drawn):
    """As FewShotDataModule does, whose test is in test_data_datamodule.py."""
    content = manifest_bytes(split, drawn)
    write_atomically(path, lambda file: write_manifest(file, content))


@pytest.mark.parametrize(
    ("dataset", "shots", "size", "sha256"),
    [
        ("dtd", 1, 5641, "3312ea537cb6706ec45a19fedbdf2c9fde1482cc532e66bd79c877abacbb9fe7"),
        ("dtd", 16, 46198, "751390579a6a4447362cf63cbc0d22d4a9d193e28adea782b17b7a0da311330e"),
        ("eurosat", 16, 12549, "f67aadba59a3784be8e13a21f90c8e61b23047395283ff9d8df1cdd35174b5ba"),
        ("caltech101", 16, 94617, "03f636c68e06b68ba78a4e90712390b24289aa39483d3854975830fd3e7a8d9f"),
    ],
)
def test_bytes(dataset, shots, size, sha256):
    split, _ = load_split(dataset)
    content = manifest_bytes(split, draw(split, shots, 1))
    assert len(content) == size
    assert hashlib.sha256(content).hexdigest() == sha256


@pytest.fixture
def split():
    return split_of({0: 8, 1: 9}, {0: 6, 1: 6})


@pytest.mark.parametrize(
    ("shots", "sampler"),
    [(shots, sampler) for shots in (1, 8, None) for sampler in SAMPLERS] + [(None, "percent:12.5")],
)
def test_round_trip(tmp_path, split, shots, sampler):
    drawn = draw(split, shots, 5, sampler)
    (tmp_path / "new").mkdir()
    write(tmp_path / "new" / "m.json", split, drawn)
    data = json.loads((tmp_path / "new" / "m.json").read_text())
    assert data["protocol"] == sampler
    assert data["sampler"]["order"] == (["val", "train"] if sampler == "cliplora" else ["train", "val"])
    val_shots = {"lpp": shots, "tip": None}.get(sampler, shots and min(shots, 4))
    assert (data["sampler"]["shots"], data["sampler"]["val_shots"]) == (shots, val_shots)
    assert read_manifest(tmp_path / "new" / "m.json", split) == drawn
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["m.json"]


def test_array_rows_are_numbers(tmp_path):
    split, _ = load_split("digits")
    drawn = draw(split, 2)
    write(tmp_path / "m.json", split, drawn)
    data = json.loads((tmp_path / "m.json").read_text())
    assert data["item_kind"] == "index"
    assert type(data["train"][0][0]) is int
    assert read_manifest(tmp_path / "m.json", split) == drawn


class TestImages:
    DIGESTS = {"train/0/é.png": "0123456789abcdef", "7": ""}  # noqa: RUF012

    def test_they_come_last_and_nothing_else_changes(self, tmp_path, split):
        drawn = draw(split, 2)
        plain = manifest_bytes(split, drawn)
        assert with_images(plain, {}) == plain
        content = with_images(plain, self.DIGESTS)
        data = json.loads(content)
        assert list(data)[-1] == "images"
        assert data.pop("images") == self.DIGESTS
        assert data == json.loads(plain)
        assert content.startswith(plain[:-3])
        write_manifest(tmp_path / "m.json", content)
        assert manifest_images(tmp_path / "m.json") == self.DIGESTS
        assert read_manifest(tmp_path / "m.json", split) == drawn

    def test_older_ones_have_none(self, tmp_path, split):
        write(tmp_path / "m.json", split, draw(split, 2))
        assert manifest_images(tmp_path / "m.json") == {}

    @pytest.mark.parametrize("images", [[], {"a": 1}, None, "x"])
    def test_others_are_refused(self, tmp_path, split, images):
        data = json.loads(manifest_bytes(split, draw(split, 2))) | {"images": images}
        write_manifest(tmp_path / "m.json", json.dumps(data, indent=1).encode() + b"\n")
        with pytest.raises(UserError, match="'images' must be digests by path") as error:
            manifest_images(tmp_path / "m.json")
        assert "\n" not in str(error.value)

    def test_a_bit_that_has_changed(self, tmp_path, split):
        path = tmp_path / "m.json"
        write_manifest(path, with_images(manifest_bytes(split, draw(split, 2)), self.DIGESTS))
        whole = path.read_bytes()
        read_manifest(path, split)
        for place in range(len(whole)):
            path.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << place % 8]) + whole[place + 1 :])
            with pytest.raises(UserError) as error:
                read_manifest(path, split)
            assert "\n" not in str(error.value)

    def test_the_first_that_changed(self):
        now = {"a": "1", "b": "2", "c": "3"}
        assert first_changed(now, now) is None
        assert first_changed({}, now) is None
        assert first_changed({"c": "0", "b": "2"}, now) == "c"
        assert first_changed({"c": "0", "b": "0", "d": "4"}, now) == "b"


def test_no_validation_images(tmp_path):
    split = split_of({0: 3})
    write(tmp_path / "m.json", split, draw(split, 1))
    assert (tmp_path / "m.json").read_text().count('\n "val": [\n ],\n "seal": ') == 1
    assert read_manifest(tmp_path / "m.json", split).val == ()


class TestRefusal:
    @pytest.fixture
    def path(self, tmp_path, split):
        write(tmp_path / "m.json", split, draw(split, 2))
        return tmp_path / "m.json"

    def edit(self, path, change):
        data = json.loads(path.read_text())
        change(data)
        del data["seal"]
        write_manifest(path, json.dumps(data, indent=1).encode() + b"\n")

    def test_rows_out_of_order(self, path, split):
        self.edit(path, lambda data: data["train"].reverse())
        with pytest.raises(UserError, match="the rows have the digest sha256:"):
            read_manifest(path, split)

    @pytest.mark.parametrize("part", ["train", "val"])
    def test_a_test_image_even_with_the_right_digest(self, path, split, part):
        def smuggle(data):
            data[part][0] = list(split.test[0])
            data["digest"] = draw_digest(*([Row(*row) for row in data[p]] for p in ("train", "val")))

        self.edit(path, smuggle)
        with pytest.raises(UserError, match=f"'test/0/0.png', 0, 'class 0'.* is not one of the {part} rows"):
            read_manifest(path, split)

    def test_another_source(self, path, split):
        with pytest.raises(
            UserError, match=r"drawn from 'toy.json' with SHA-256 000000000000..., but 'toy.json' has ff"
        ):
            read_manifest(path, dataclasses.replace(split, sha256="f" * 64))

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda data: data.update(schema="fewshot-manifest/2"), "but 'fewshot-manifest/2'"),
            (lambda data: data.pop("val"), "'val' must be there and be a list"),
            (lambda data: data.update(source="x"), "'source' must be there and be a dict"),
            (lambda data: data["sampler"].update(seed="1"), "'sampler' must have a whole seed"),
            (lambda data: data["train"].append(["x", 0]), r"\['x', 0\] is not one of the train rows"),
            (lambda data: data["train"].append([["x"], [0], "a"]), "is not one of the train rows"),
        ],
    )
    def test_wrong_schema(self, path, split, change, message):
        self.edit(path, change)
        with pytest.raises(UserError, match=message) as error:
            read_manifest(path, split)
        assert "\n" not in str(error.value)

    def test_an_edit_by_hand(self, path, split):
        path.write_text(path.read_text().replace("class 0", "class 1"))
        with pytest.raises(UserError, match="damaged or edited"):
            read_manifest(path, split)

    @pytest.mark.parametrize("content", ["[]", "{}"])
    def test_other_json(self, tmp_path, split, content):
        (tmp_path / "x.json").write_text(content)
        with pytest.raises(UserError, match="not a manifest of the schema"):
            read_manifest(tmp_path / "x.json", split)

    def test_no_json_and_no_file(self, tmp_path, split):
        (tmp_path / "x.json").write_text("{")
        with pytest.raises(UserError, match="not JSON"):
            read_manifest(tmp_path / "x.json", split)
        with pytest.raises(UserError, match=r"none.json: may not be read \(no such file"):
            read_manifest(tmp_path / "none.json", split)

    def test_cannot_write(self, tmp_path, split):
        (tmp_path / "file").write_text("")
        with pytest.raises(UserError, match=r"Could not write .*m\.json") as error:
            write(tmp_path / "file" / "m.json", split, draw(split, 1))
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("error", "raised"),
    [(KeyboardInterrupt(), KeyboardInterrupt), (OSError(28, "No space left on device"), UserError)],
)
def test_a_broken_write_leaves_the_old_file(tmp_path, split, monkeypatch, error, raised):
    path = tmp_path / "m.json"
    write(path, split, draw(split, 1))
    before = path.read_bytes()

    def stop(file, content):
        with file.open("wb") as half:
            half.write(content[: len(content) // 2])
        raise error

    monkeypatch.setattr(Path, "write_bytes", stop)
    with pytest.raises(raised) as stopped:
        write(path, split, draw(split, 2))
    assert "\n" not in str(stopped.value)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_non_ascii_is_escaped():
    split = dataclasses.replace(split_of({0: 2}), train=(Row("é.png", 0, "é"),), class_names=("é",))
    content = manifest_bytes(split, draw(split, 1))
    assert b"\\u00e9.png" in content
    assert draw(split, 1).digest == "sha256:" + hashlib.sha256("train\té.png\t0\n".encode()).hexdigest()


def test_another_image_under_the_same_path_is_refused_by_its_name(tmp_path):
    root = parted_folder(tmp_path / "pets", {"a": 3, "b": 3})
    first = FewShotDataModule(str(root), shots=2, image_size=8)
    first.setup("fit")
    first.write_manifest(tmp_path / "split.json")
    again = FewShotDataModule(str(root), shots=2, image_size=8, manifest=str(tmp_path / "split.json"))
    again.setup("fit")
    assert again.image_digests == first.image_digests
    for part, rows in (("train", first.draw.train), ("val", first.draw.val)):
        file = root / rows[-1].path
        before = file.read_bytes()
        save_image(file, seed=999)
        changed = FewShotDataModule(str(root), shots=2, image_size=8, manifest=str(tmp_path / "split.json"))
        with pytest.raises(UserError, match=f"{part}/.* is another image than .*split.json was drawn with"):
            changed.setup("fit")
        file.write_bytes(before)
