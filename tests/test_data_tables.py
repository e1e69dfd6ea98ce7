"""Tables of images in every dialect: separators, quotes, names of columns, spellings of parts, paths."""

import hashlib

import pyarrow as pa
import pytest
from data_fixtures import image_folder
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet

from kshot.data import FewShotDataModule
from kshot.data.catalogue import load_split
from kshot.data.splits import Row, json_rows
from kshot.data.tables import split_from_table
from kshot.errors import UserError

ROWS = [("x/1.png", "cat", "train"), ("x/2.png", "dog", "train"), ("x/3.png", "cat", "test"), ("x/4.png", "dog", "val")]

FILE = "x.parquet"


def table(tmp_path, text, name="items.csv", encoding="utf-8"):
    (tmp_path / name).write_text(text, encoding=encoding)
    return tmp_path / name


def expected(split):
    assert split.train == (Row("x/1.png", 0, "cat"), Row("x/2.png", 1, "dog"))
    assert split.test == (Row("x/3.png", 0, "cat"),)
    assert split.val == (Row("x/4.png", 1, "dog"),)


@pytest.mark.parametrize("separator", [",", ";", "\t", "|"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
@pytest.mark.parametrize("quote", ["", '"'])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_dialects(tmp_path, separator, encoding, quote, end):
    lines = [separator.join(f"{quote}{cell}{quote}" for cell in row) for row in [("path", "label", "split"), *ROWS]]
    path = tmp_path / "items.csv"
    path.write_bytes((end.join(lines) + end).encode(encoding))
    expected(split_from_table(path))
    (tmp_path / "items.tsv").write_bytes(path.read_bytes())
    expected(load_split(str(tmp_path / "items.tsv"))[0])


@pytest.mark.parametrize("path", ["path", "File", "filename", "file_name", "IMAGE", "image path", "filepath", "img"])
@pytest.mark.parametrize("label", ["label", "Class", "category", "target", "class_name", "className"])
@pytest.mark.parametrize("split", ["split", "Part", "set", "subset", "fold"])
def test_columns(tmp_path, path, label, split):
    lines = [f"id,{split},{label},{path}"] + [f"{i},{part},{name},{file}" for i, (file, name, part) in enumerate(ROWS)]
    expected(split_from_table(table(tmp_path, "\n".join(lines))))


def test_parts_in_any_spelling(tmp_path):
    parts = {"train": "TRAINING", "test": "Eval", "val": "dev"}
    lines = ["path,label,split"] + [f"{file},{name},{parts[part]}" for file, name, part in ROWS]
    expected(split_from_table(table(tmp_path, "\n".join(lines))))


def test_numbers_with_names_beside_them(tmp_path):
    text = "image,class_id,class_name,split\n1.png,1,sea,train\n2.png,0,land,train\n"
    assert split_from_table(table(tmp_path, text)).class_names == ("land", "sea")


@pytest.mark.parametrize("other", ["./a.jpg", "a.jpg", ".//a.jpg", "././a.jpg"])
def test_one_image_in_two_parts_is_found_however_it_is_written(tmp_path, other):
    path = table(tmp_path, f"path,label,split\na.jpg,x,train\n{other},x,test\n")
    with pytest.raises(UserError, match=r"'a.jpg' is in train and in test"):
        split_from_table(path)


def test_paths_keep_their_case(tmp_path):
    path = table(tmp_path, "path,label,split\nb//A.jpg,x,train\nb/a.jpg,x,test\n")
    assert split_from_table(path).train[0].path == "b/A.jpg"


def test_codes_and_mappings(tmp_path):
    path = table(tmp_path, "path,label,split\n1.png,1.cat,train\n2.png,2.dog,train\n")
    assert load_split(str(path))[0].said == ("cat", "dog")
    assert load_split(str(path), class_names={"2.dog": "hound"})[0].said == ("cat", "hound")


def test_a_table_beside_images_is_pointed_out(tmp_path):
    image_folder(tmp_path, {".": 3})
    path = table(tmp_path, "path,label\n00.png,a\n01.png,b\n", "labels.csv")
    with pytest.raises(UserError, match=r"no class folders in it, only images; if .*labels.csv lists them, give that"):
        load_split(str(tmp_path))
    assert load_split(str(path), test_share=None)[0].class_names == ("a", "b")


def test_without_parts_the_share_counts(tmp_path):
    image_folder(tmp_path, {"a": 10, "b": 10})
    text = "path,label\n" + "".join(f"{c}/{i:02}.png,{c}\n" for c in "ab" for i in range(10))
    path = table(tmp_path, text)
    data = FewShotDataModule(str(path), shots=10, image_size=8, test_share=None)
    data.setup("fit")
    assert len(data.part("train")) == 20
    assert FewShotDataModule(str(path), shots=1, test_share=0.5).split_info()["counts"]["test"] == 10


class TestParquet:
    def written(self, folder, **changes):
        columns = dict(zip(("Image", "label", "split"), zip(*ROWS, strict=True), strict=True)) | {"more": [None] * 4}
        parquet.write_table(pa.table({name: list(cells) for name, cells in (columns | changes).items()}), folder / FILE)
        return folder / FILE

    def test_is_read_like_a_csv_file(self, tmp_path):
        split, _ = load_split(str(self.written(tmp_path)))
        expected(split)
        assert split.sha256 == hashlib.sha256((tmp_path / FILE).read_bytes()).hexdigest()

    def test_labels_may_be_numbers(self, tmp_path):
        assert split_from_table(self.written(tmp_path, label=[0, 1, 0, 1])).class_names == ("0", "1")
        with pytest.raises(UserError, match="line 3: label '' is none"):
            split_from_table(self.written(tmp_path, label=[0, 1, None, 1]))

    def test_another_file(self, tmp_path):
        (tmp_path / FILE).write_bytes(b"")
        with pytest.raises(UserError, match=r"not a Parquet file \("):
            split_from_table(tmp_path / FILE)


@given(st.lists(st.tuples(st.text(max_size=8), st.integers(0, 99), st.text(max_size=8))))
def test_rows_are_written_as_json_writes_them(values):
    import json

    assert json_rows([Row(*row) for row in values], "path") == [json.dumps(list(row)) for row in values]
