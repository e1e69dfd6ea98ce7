"""The authors' own lists, CoOp's split files beside the images, ImageNet's words, and folders of a data set by name."""

import gzip
import importlib.resources
import json
from pathlib import Path

import pytest
import tiny_sets
import torchvision
from command_line import refused
from data_fixtures import rows_of
from open_clip import IMAGENET_CLASSNAMES
from test_data_catalogue_runs import write
from test_data_command import ended, told

from kshot.data import FewShotDataModule
from kshot.data.catalogue import CATALOGUE, load_split
from kshot.data.official import imagenet_names, split_from_lists, with_names
from kshot.data.splits import PARTS, make_split
from kshot.errors import UserError

INFO = importlib.resources.files("timm.data") / "_info"


def lines_of(name: str) -> list[str]:
    return (INFO / name).read_text().split()


class TestLists:
    @pytest.mark.parametrize("name", ["food101", "fgvc_aircraft"])
    def test_they_are_read_as_torchvision_does(self, name, tmp_path):
        layout = CATALOGUE[name].layouts[-1]  # torchvision's
        files, names = tiny_sets.file_set(name, layout)
        base = Path(layout).parent
        files[f"{base}/variants.txt"] = "\n".join(names).encode()
        for part in ("train", "test"):  # what torchvision reads of Food-101
            lines = files.get(f"{base}/meta/{part}.txt", b"").decode().split()
            classes = {line.partition("/")[0]: [] for line in lines}
            tables = {each: [line for line in lines if line.startswith(f"{each}/")] for each in classes}
            files[f"{base}/meta/{part}.json"] = json.dumps(tables).encode()
        write(tmp_path, files)
        split, entry = load_split(name, tmp_path)
        folder = entry.images(tmp_path, "train", split.train).folder
        drawn = {"train": split.train, "val": split.val, "test": split.test}
        if name == "food101":
            drawn = {"train": (*split.train, *split.val), "test": split.test}
        for part, rows in drawn.items():
            theirs = getattr(torchvision.datasets, entry.torchvision)(tmp_path, split=part)
            wanted = zip(map(str, theirs._image_files), theirs._labels, strict=True)
            found = [(str(folder / row.path), row.label, row.class_name) for row in rows]
            assert sorted(found) == sorted((file, label, theirs.classes[label]) for file, label in wanted)

    def test_the_class_of_a_scene_is_said_as_coop_does(self, tmp_path):
        write(tmp_path, tiny_sets.file_set("sun397", "sun397/SUN397")[0])
        split = load_split("sun397", tmp_path)[0]
        assert split.class_names == ("abbey", "outdoor apartment_building")
        assert split.train[-1].path.startswith("a/apartment_building/outdoor/sun_")

    def test_birds_are_divided_by_a_column(self, tmp_path):
        write(tmp_path, tiny_sets.file_set("cub200", "CUB_200_2011/images")[0])
        split = load_split("cub200", tmp_path)[0]
        assert [len(split.train), len(split.val), len(split.test)] == [8, 2, 4]  # 20 % of 5 for validation
        numbers = {part: {int(row.path[:-4].rpartition("_")[2]) for row in getattr(split, part)} for part in PARTS}
        assert numbers["train"] | numbers["val"] == set(range(1, 11))
        assert numbers["test"] == set(range(11, 15))
        assert split.class_names == ("001.Black_footed_Albatross", "002.Laysan_Albatross")
        assert split.said == ("Black_footed_Albatross", "Laysan_Albatross")

    @pytest.mark.parametrize(
        ("content", "what"),
        [
            (b"a/1\nb\n", "train.txt, line 2: 'b' is not what toy lists"),
            (b"a/1\na/../../1\n", "without '..'"),
            (b"a/1\n\xff\xfe/\xff\\x\n", "backslashes"),
            (b"", "there is no image in it"),
        ],
    )
    def test_lines_that_are_none(self, tmp_path, content, what):
        (tmp_path / "train.txt").write_bytes(content)
        lists = {"train": ["train.txt"], "test": ["train.txt"]}
        with pytest.raises(UserError, match=what):
            split_from_lists("toy", tmp_path, lists, "(?P<path>(?P<class>[^/]+)/.+)", "{path}", ".")

    def test_lists_side_by_side_have_as_many_lines(self, tmp_path):
        (tmp_path / "a.txt").write_text("a/1\na/2\n")
        (tmp_path / "b.txt").write_text("1\n")
        line = "(?P<path>(?P<class>a)/.+) (?P<train>1)"
        with pytest.raises(UserError, match=r"a.txt and b.txt have different numbers of lines"):
            split_from_lists("toy", tmp_path, {"all": ["a.txt", "b.txt"]}, line, "{path}", ".")

    def test_the_digest_is_that_of_the_lists(self, tmp_path):
        files = tiny_sets.file_set("fgvc_aircraft", "fgvc_aircraft/images")[0]
        write(tmp_path, files)
        first = load_split("fgvc_aircraft", tmp_path)[0]
        file = "fgvc_aircraft/images_variant_val.txt"
        write(tmp_path, {file: files[file] + b"\n "})
        second = load_split("fgvc_aircraft", tmp_path)[0]
        assert first.val == second.val
        assert first.sha256 != second.sha256


class TestSplitsBesideImages:
    @pytest.mark.parametrize("place", ["food-101/{}", "food-101/{}.gz", "food-101/images/{}"])
    def test_where_coop_puts_them_or_data_import(self, place, tmp_path):
        files, _ = tiny_sets.file_set("food101", "food-101/images")
        content = tiny_sets.split_of_coop("food101")
        place = place.format("split_zhou_Food101.json")
        write(tmp_path, files | {place: gzip.compress(content) if place.endswith(".gz") else content})
        split, entry = load_split("food101", tmp_path)
        assert split.file == "split_zhou_Food101.json"
        assert {part: [[*row] for row in getattr(split, part)] for part in PARTS} == json.loads(content)
        assert entry.images(tmp_path, "train", split.train).folder == tmp_path / "food-101" / "images"
        assert "is not the one that CoOp has" in split.notes[0]

    def test_coops_own_is_known_by_its_draw(self, tmp_path, monkeypatch):
        monkeypatch.setattr("kshot.data.sampling.draw_digest", lambda *_: f"sha256:{CATALOGUE['food101'].draw}0123")
        files, _ = tiny_sets.file_set("food101", "food-101/images")
        write(tmp_path, files | {"food-101/split_zhou_Food101.json": tiny_sets.split_of_coop("food101")})
        assert load_split("food101", tmp_path)[0].notes == ()

    @pytest.mark.parametrize("name", ["food101", "sun397"])
    def test_without_one_the_lists_are_another_split_and_that_is_said(self, name, tmp_path, caplog):
        entry = CATALOGUE[name]
        write(tmp_path, tiny_sets.file_set(name, entry.layouts[0])[0])
        with caplog.at_level("INFO", "kshot"):
            data = FewShotDataModule(name, str(tmp_path), shots=2)
        assert data.split_info()["source"] == " + ".join(file for files in entry.lists.values() for file in files)
        (line,) = [message for message in caplog.messages if "another split than CoOp's" in message]
        assert line.startswith(f"{name}: there is no {entry.split}")

    def test_what_is_missing_and_where_it_is_to_be_had(self, tmp_path, capsys):
        words = ["--data.dataset", "sun397", "--data.root", str(tmp_path)]
        line = refused(capsys, ["fit", "--config", "clip_16shot.yaml", *words])
        for part in ("split_zhou_SUN397.json or Training_01.txt", "https://drive.google.com/", f"{tmp_path}/sun397"):
            assert part in line

    def test_an_imported_one_is_found_by_the_name_of_its_data_set(self, tmp_path, capsys):
        root = tmp_path / "data"
        file = tmp_path / "split_zhou_Food101.json"
        file.write_bytes(tiny_sets.split_of_coop("food101"))
        write(root, tiny_sets.file_set("food101", "food-101/images")[0])
        told(capsys, "import", file, "--root", root)
        assert load_split("food101", root)[0].file == file.name

    def test_torchvision_fetches_the_images_and_their_lists(self, tmp_path, monkeypatch):
        files, _ = tiny_sets.file_set("food101", "food-101/images")
        asked = []
        monkeypatch.setattr(
            torchvision.datasets, "Food101", lambda root, download: asked.append(download) or write(root, files)
        )
        with pytest.raises(UserError, match=r"data\.download true"):
            load_split("food101", tmp_path)
        assert load_split("food101", tmp_path, download=True)[0].train
        assert asked == [True]


class TestImageNet:
    def test_words_by_id_are_those_of_timms_and_open_clips_label(self):
        names = imagenet_names(Path("none"))
        for data_set in ("imagenet_a", "imagenet_r"):
            pairs = zip(lines_of(f"{data_set}_synsets.txt"), lines_of(f"{data_set}_indices.txt"), strict=True)
            for wordnet, label in pairs:
                assert names[wordnet] == names[label] == IMAGENET_CLASSNAMES[int(label)]
        assert [*names][:1000] == sorted([*names][:1000])

    def test_labels_are_those_of_torchvisions_folders(self, tmp_path):
        write(tmp_path, tiny_sets.file_set("imagenet", "imagenet/images")[0])
        split, entry = load_split("imagenet", tmp_path)
        folder = entry.images(tmp_path, "train", split.train).folder
        for part, below in (("train", "train"), ("test", "val")):
            theirs = torchvision.datasets.ImageFolder(str(folder / below)).samples
            assert [(str(folder / row.path), row.label) for row in getattr(split, part)] == theirs
        assert split.val == ()

    def test_folders_by_number_are_in_the_order_of_numbers(self, tmp_path):
        write(tmp_path, tiny_sets.file_set("imagenetv2", "imagenetv2-matched-frequency-format-val")[0])
        split = load_split("imagenetv2", tmp_path)[0]
        assert split.class_names == ("0", "6", "11", "657", "744")
        assert all(row.path.split("/")[0] == split.class_names[row.label] for row in split.test)
        assert (split.train, split.val, len(split.test)) == ((), (), 50)

    def test_two_classes_of_one_name_are_said(self, tmp_path):
        write(tmp_path, tiny_sets.file_set("imagenet_sketch", "sketch")[0])
        notes = load_split("imagenet_sketch", tmp_path)[0].notes
        assert "imagenet_sketch: 'n03773504', 'n04008634' are all called 'missile'" in notes

    def test_coops_file_of_names_counts(self, tmp_path):
        write(tmp_path, tiny_sets.file_set("imagenet_a", "imagenet-adversarial/imagenet-a")[0])
        ids = lines_of("imagenet_synsets.txt")
        file = tmp_path / "imagenet-adversarial" / "classnames.txt"
        file.write_text("".join(f"{each} the {i}th\n" for i, each in enumerate(ids)))
        split = load_split("imagenet_a", tmp_path)[0]
        assert (split.class_names, split.said) == (("n01498041", "n01531178"), ("the 6th", "the 11th"))
        file.write_text("n01498041 ray\n")
        with pytest.raises(UserError, match=r"classnames.txt: "):
            load_split("imagenet_a", tmp_path)

    def test_another_folder_is_refused(self, tmp_path):
        write(tmp_path, {"imagenet-a/cat/1.jpg": b"", "imagenet-a/n01498041/1.jpg": b""})
        with pytest.raises(UserError, match="imagenet_a: has no class 'cat'; its folders are called 'n01440764'"):
            load_split("imagenet_a", tmp_path)

    def test_names_that_are_given_lie_over_its_own(self, tmp_path):
        write(tmp_path, tiny_sets.file_set("imagenet_a", "imagenet-a")[0])
        split = load_split("imagenet_a", tmp_path, class_names={"n01531178": "a small bird"})[0]
        assert split.said == ("stingray", "a small bird")

    def test_a_domain_is_for_testing(self, tmp_path, capsys):
        write(tmp_path, tiny_sets.file_set("imagenet_r", "imagenet-r")[0])
        code, out = ended(capsys, "check", "imagenet_r", "--root", tmp_path)
        assert code == 0
        assert "No image is for training: target of domain-generalisation from imagenet" in out
        assert "Testing can begin." in out
        (tmp_path / "imagenet-r" / "n01531178" / "0.jpg").write_bytes(b"x")
        code, out = ended(capsys, "check", "imagenet_r", "--root", tmp_path)
        assert code == 1
        assert "Testing would fail" in out
        with pytest.raises(UserError, match=r"no training images, so it may only be among data\.targets"):
            FewShotDataModule("imagenet_r", str(tmp_path), shots=2)
        first = told(capsys, "info", "imagenet_r", "--root", tmp_path)["table"][0]
        assert first == {"label": 0, "class": "n01531178", "prompt": "goldfinch", "train": 0, "val": 0, "test": 10}


def test_labels_follow_the_order_of_names():
    parts = {part: rows_of({0: 2, 1: 1, 2: 1}, part) for part in PARTS}
    split = make_split("toy", parts, file="toy", sha256="")
    named = with_names(split, {"class 2": "two", "class 7": "seven", "class 0": "none", "class 1": "one"})
    assert named.class_names == ("class 2", "class 0", "class 1")
    assert named.said == ("two", "none", "one")
    for part in PARTS:
        assert [(row.path, named.class_names[row.label]) for row in getattr(named, part)] == [
            (row.path, row.class_name) for row in parts[part]
        ]


def test_emnist_is_turned(tmp_path):
    files, _ = tiny_sets.array_set("emnist")
    write(tmp_path, files)
    split, entry = load_split("emnist", tmp_path)
    stored = tiny_sets.pixels(6, 28, len("test"))
    image = entry.images(tmp_path, "test", split.test).open(split.test[1].path)
    assert image.getpixel((3, 20)) == (int(stored[1][3][20]),) * 3
    assert split.class_names == ("digit 0", "digit 1", "digit 2")
