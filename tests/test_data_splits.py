"""Split files, folders and CSV files, and everything that can be wrong with them."""

import gzip
import hashlib

import pytest
from data_fixtures import image_folder, rows_of, save_image, split_file
from hypothesis import given
from hypothesis import strategies as st

from kshot.data.catalogue import load_split
from kshot.data.readers import read_split_zhou, split_from_folder
from kshot.data.splits import Row, display_name, split_bytes, stratify
from kshot.data.tables import split_from_table as split_from_csv
from kshot.errors import UserError

A, B = ["a/1.jpg", 0, "a"], ["b/1.jpg", 1, "b_b"]


def parts_of(split):
    return {"train": split.train, "val": split.val, "test": split.test}


class TestSplitFile:
    @pytest.mark.parametrize("packed", [False, True])
    def test_reads_rows_names_and_digest_of_the_plain_bytes(self, tmp_path, packed):
        plain = split_file(tmp_path / "s.json", train=[B, A], test=[["a/2.jpg", 0, "a"]])
        content = plain.read_bytes()
        path = plain
        if packed:
            path = tmp_path / "s.json.gz"
            path.write_bytes(gzip.compress(content, mtime=0))
        split = read_split_zhou(path, "toy", "images")
        assert split.train == (Row("b/1.jpg", 1, "b_b"), Row("a/1.jpg", 0, "a"))
        assert split.class_names == ("a", "b_b")
        assert split.file == "s.json"
        assert split.sha256 == hashlib.sha256(content).hexdigest()
        assert split.image_root == {"train": "images", "val": "images", "test": "images"}
        assert split.item_kind == "path"

    def test_underscores_become_spaces_only_for_display(self):
        assert display_name("Apply_Eye_Makeup") == "Apply Eye Makeup"

    def test_integer_rows_are_indices(self, tmp_path):
        split = read_split_zhou(split_file(tmp_path / "s.json", train=[[7, 0, "a"]], test=[[8, 0, "a"]]))
        assert split.item_kind == "index"
        assert split.train[0].path == "7"

    @pytest.mark.parametrize(
        "bad", ["../a.jpg", "a/../../b.jpg", "/etc/passwd", "a\\b.jpg", "C:/a.jpg", "", "a\tb.jpg"]
    )
    def test_refuses_paths_that_leave_the_root(self, tmp_path, bad):
        with pytest.raises(UserError, match="must be a relative path") as error:
            read_split_zhou(split_file(tmp_path / "s.json", train=[A, [bad, 0, "a"]]))
        assert "train row 1" in str(error.value)

    def test_dots_inside_names_are_fine(self, tmp_path):
        assert read_split_zhou(split_file(tmp_path / "s.json", train=[["a/b..c.jpg", 0, "a"]])).train

    @pytest.mark.parametrize(
        ("train", "message"),
        [
            ([A, ["c.jpg", 2, "c"]], "without a gap, but 1 is missing"),
            ([["c.jpg", -1, "c"], A], "-1 is negative"),
            ([A, ["c.jpg", 0, "c"]], "label 0 is both 'a' and 'c'"),
            ([A, [3, 1, "b"]], "some rows name files and some have an index"),
            ([["c.jpg", "0", "b"]], "is not \\[path, label, class name\\]"),
            ([["c.jpg", True, "b"]], "is not \\[path, label, class name\\]"),
            ([["c.jpg", 0]], "is not \\[path, label, class name\\]"),
            ([[-1, 0, "a"]], "index -1 is negative"),
            ([], "there is no image in it"),
        ],
    )
    def test_refuses_wrong_rows(self, tmp_path, train, message):
        with pytest.raises(UserError, match=message) as error:
            read_split_zhou(split_file(tmp_path / "s.json", train=train))
        assert "\n" not in str(error.value)

    @pytest.mark.parametrize("other", ["b b", "B_B"])
    def test_names_that_read_the_same(self, tmp_path, other):
        path = split_file(tmp_path / "s.json", train=[["c.jpg", 0, other], B])
        with pytest.raises(UserError, match=f"s.json: .*'{other}' and 'b_b' read the same") as error:
            load_split(str(path))
        assert "\n" not in str(error.value)
        assert load_split(str(path), class_names=["x", "y"])[0].class_names == (other, "b_b")

    def test_refuses_a_test_image_among_the_training_images(self, tmp_path):
        with pytest.raises(UserError, match=r"'a/1.jpg' is in train and in test"):
            read_split_zhou(split_file(tmp_path / "s.json", train=[A], test=[A]))

    @pytest.mark.parametrize(
        ("name", "content", "message"),
        [
            ("s.json", b"{", "not JSON"),
            ("s.json", b"[]", "one object with the lists"),
            ("s.json", b'{"train": [], "val": []}', "one object with the lists"),
            ("s.json.gz", b"{}", "not a gzip file"),
            ("s.json.gz", gzip.compress(b'{"train": []}' * 50, mtime=0)[:-12], "not a gzip file"),
            ("s.json.gz", gzip.compress(b"", mtime=0)[:10] + b"\xff" * 20, "not a gzip file"),
        ],
    )
    def test_refuses_other_files(self, tmp_path, name, content, message):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=message):
            read_split_zhou(tmp_path / name)

    def test_missing_file(self, tmp_path):
        with pytest.raises(UserError, match=r"none.json: may not be read \(no such file"):
            read_split_zhou(tmp_path / "none.json")


class TestStratify:
    @given(st.dictionaries(st.integers(0, 5), st.integers(2, 40), min_size=1))
    def test_shares_per_class(self, counts):
        parts = stratify(rows_of(counts), (20, 30))
        for label, n in counts.items():
            sizes = {part: sum(row.label == label for row in rows) for part, rows in parts.items()}
            assert sizes["val"] == n // 5
            assert sizes["test"] == max(1, (3 * n + 5) // 10)
            assert sum(sizes.values()) == n
            assert sizes["train"] >= 1
        assert sorted(row for rows in parts.values() for row in rows) == sorted(rows_of(counts))

    def test_a_class_does_not_depend_on_the_others(self):
        alone = stratify(rows_of({1: 20}), (20, 30))
        together = stratify(rows_of({0: 7, 1: 20, 2: 30}), (20, 30))
        assert alone == {part: [row for row in rows if row.label == 1] for part, rows in together.items()}

    def test_the_seed_matters(self, monkeypatch):
        first = stratify(rows_of({0: 30}), (20, 30))
        monkeypatch.setattr("kshot.data.splits.STRATIFY_SEED", 2)
        assert stratify(rows_of({0: 30}), (20, 30)) != first

    def test_one_image_is_too_few(self):
        with pytest.raises(UserError, match="'class 1' has 1 image, but"):
            stratify(rows_of({0: 5, 1: 1}), (20, 30))


class TestFolder:
    def test_classes_only(self, tmp_path):
        split = split_from_folder(image_folder(tmp_path / "pets", {"dog": 10, "cat": 10}))
        assert split.name == "pets"
        assert split.class_names == ("cat", "dog")
        assert {part: len(rows) for part, rows in parts_of(split).items()} == {"train": 10, "val": 4, "test": 6}
        assert all(row.path.startswith(f"{row.class_name}/") for row in split.train)

    def test_the_same_folder_gives_the_same_split_elsewhere(self, tmp_path):
        here = split_from_folder(image_folder(tmp_path / "x" / "pets", {"dog": 10, "cat": 10}))
        there = split_from_folder(image_folder(tmp_path / "y" / "pets", {"cat": 10, "dog": 10}))
        assert here == there

    def test_the_digest_is_that_of_the_split_as_a_file(self, tmp_path):
        folder = image_folder(tmp_path / "pets", {"dog": 4, "cat": 4})
        split = split_from_folder(folder)
        content = split_bytes(parts_of(split))
        (tmp_path / "s.json").write_bytes(content)
        assert split.sha256 == hashlib.sha256(content).hexdigest() == read_split_zhou(tmp_path / "s.json").sha256
        save_image(folder / "dog" / "new.png")
        assert split_from_folder(folder).sha256 != split.sha256

    def test_parts_are_taken_as_they_are(self, tmp_path):
        for part, count in (("train", 3), ("val", 2), ("test", 4)):
            image_folder(tmp_path, {"cat": count, "dog": count}, part)
        split = split_from_folder(tmp_path)
        assert [len(split.train), len(split.val), len(split.test)] == [6, 4, 8]
        assert split.train[0] == Row("train/cat/00.png", 0, "cat")

    def test_without_val_there_are_no_validation_images(self, tmp_path):
        for part in ("train", "test"):
            image_folder(tmp_path, {"cat": 3}, part)
        assert split_from_folder(tmp_path).val == ()

    def test_a_class_may_be_called_train(self, tmp_path):
        assert split_from_folder(image_folder(tmp_path, {"train": 3, "bus": 3})).class_names == ("bus", "train")

    def test_finds_upper_case_suffixes_and_sub_folders_and_ignores_the_rest(self, tmp_path):
        image_folder(tmp_path, {"cat": 3})
        save_image(tmp_path / "cat" / "more" / "X.JPG")
        (tmp_path / "cat" / "notes.txt").write_text("no image")
        (tmp_path / ".ipynb_checkpoints").mkdir()
        save_image(tmp_path / "cat" / "._00.png")
        rows = sorted(row.path for rows in parts_of(split_from_folder(tmp_path)).values() for row in rows)
        assert rows == ["cat/00.png", "cat/01.png", "cat/02.png", "cat/more/X.JPG"]

    def test_errors(self, tmp_path):
        with pytest.raises(UserError, match="none: no such folder"):
            split_from_folder(tmp_path / "none")
        with pytest.raises(UserError, match="no class folders in it"):
            split_from_folder(tmp_path)
        save_image(tmp_path / "file.png")
        with pytest.raises(UserError, match="not a folder"):
            split_from_folder(tmp_path / "file.png")
        image_folder(tmp_path, {"cat": 3, "Cat_": 3})
        (tmp_path / "empty").mkdir()
        with pytest.raises(UserError, match="no images in the class folder 'empty'"):
            split_from_folder(tmp_path)

    def test_names_that_read_the_same(self, tmp_path):
        image_folder(tmp_path, {"sea_lake": 3, "Sea lake": 3})
        with pytest.raises(UserError, match="'Sea lake' and 'sea_lake' read the same"):
            load_split(str(tmp_path))
        assert len(load_split(str(tmp_path), class_names=["x", "y"])[0].class_names) == 2

    @pytest.mark.parametrize("have", ["test", "val"])
    def test_nothing_goes_without_training_images(self, tmp_path, have):
        with pytest.raises(UserError, match=f"has '{have}' but no 'train' folder"):
            split_from_folder(image_folder(tmp_path, {"cat": 3}, have))

    def test_a_test_class_without_training_images(self, tmp_path):
        image_folder(tmp_path, {"cat": 2}, "train")
        image_folder(tmp_path, {"cat": 2, "dog": 2}, "test")
        with pytest.raises(UserError, match="no training images of the class 'dog'"):
            split_from_folder(tmp_path)


class TestCsv:
    def write(self, tmp_path, text, encoding="utf-8"):
        path = tmp_path / "items.csv"
        path.write_text(text, encoding=encoding)
        return path

    def test_numbers_and_given_names(self, tmp_path):
        path = self.write(tmp_path, "split,label,path\ntrain,1,x/1.png\nvalid,0,x/2.png\ntest,0,x/3.png\n")
        split = split_from_csv(path, classes=["grass", "field"])
        assert split.train == (Row("x/1.png", 1, "field"),)
        assert split.val == (Row("x/2.png", 0, "grass"),)
        assert split.class_names == ("grass", "field")
        assert split.name == f"{tmp_path.name}-items"
        assert split.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
        assert split_from_csv(path).class_names == ("0", "1")

    def test_words_are_numbered_in_sorted_order(self, tmp_path):
        path = self.write(
            tmp_path, "Path, Label\n" + "".join(f"{c}{i}.png,{c}\n" for i in range(10) for c in "ba"), "utf-8-sig"
        )
        split = split_from_csv(path)
        assert split.class_names == ("a", "b")
        assert [len(split.train), len(split.val), len(split.test)] == [10, 4, 6]

    def test_class_name_column(self, tmp_path):
        split = split_from_csv(
            self.write(tmp_path, "path,label,class_name,split\n1.png,0,sea,train\n2.png,1,land,test\n")
        )
        assert split.class_names == ("sea", "land")

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("path,split\n1.png,train\n", "no column 'label'"),
            ("", "no column 'path'"),
            ("path,label,split\n1.png,0,train\n2.png,0,tset\n", "line 3: split 'tset' is none"),
            ("path,label\n1.png,\n", "line 2: label '' is none"),
            ("path,label,split\n../1.png,0,train\n", "line 2: '../1.png' must be a relative path"),
            ("path,label,split\n1.png,0,train\n2.png,2,train\n", "1 is missing"),
            ("path,label,class_name,split\n1.png,0,a,train\n2.png,0,b,train\n", "label 0 is both 'a' and 'b'"),
            ("path,label,split\n1.png,0,train\n1.png,0,test\n", "'1.png' is in train and in test"),
            ("path,label,split\n", "there is no image in it"),
        ],
    )
    def test_errors(self, tmp_path, text, message):
        with pytest.raises(UserError, match=message) as error:
            split_from_csv(self.write(tmp_path, text))
        assert "\n" not in str(error.value)

    def test_number_of_names(self, tmp_path):
        path = self.write(tmp_path, "path,label,split\n1.png,0,train\n2.png,1,train\n")
        with pytest.raises(UserError, match="3 class_names for the 2 of "):
            load_split(str(path), class_names=["a", "b", "c"])
        with pytest.raises(UserError, match="line 3: label 1, but there are 1 class names"):
            split_from_csv(path, classes=["a"])

    def test_no_such_file_and_no_text(self, tmp_path):
        with pytest.raises(UserError, match=r"none.csv: may not be read \(no such file"):
            split_from_csv(tmp_path / "none.csv")
        (tmp_path / "b.csv").write_bytes(b"\xff\xfe\x00")
        with pytest.raises(UserError, match="not a CSV file"):
            split_from_csv(tmp_path / "b.csv")
