"""Class names: what the user gives, what folders are called, and what the tokenizer can tell apart."""

import logging

import pytest
from data_fixtures import image_folder, split_file

from kshot.data import FewShotDataModule
from kshot.data.names import without_codes
from kshot.errors import UserError


@pytest.fixture
def numbers(tmp_path):
    return image_folder(tmp_path / "set", {str(i): 4 for i in range(1, 13)})


def names(folder, **settings):
    return FewShotDataModule(str(folder), shots=1, **settings).class_names


class TestCodes:
    @pytest.mark.parametrize(
        ("folders", "said"),
        [
            (["001.Black_footed_Albatross", "002.Laysan_Albatross"], ["Black footed Albatross", "Laysan Albatross"]),
            (["n02084071-dog", "n02121808-cat"], ["dog", "cat"]),
            (["01 - sea", "02 - land"], ["sea", "land"]),
            (["001.dog", "cat"], ["001.dog", "cat"]),
            (["3_series", "5_series"], ["3 series", "5 series"]),
            (["2012_Acura", "2012_Audi"], ["2012 Acura", "2012 Audi"]),
            (["1_2", "2_3"], ["1 2", "2 3"]),
            (["1a", "2b"], ["1a", "2b"]),
        ],
    )
    def test_are_taken_off_where_every_class_has_one(self, tmp_path, folders, said):
        assert names(image_folder(tmp_path, dict.fromkeys(folders, 2))) == said

    def test_the_draw_keeps_the_names_of_the_folders(self, tmp_path):
        image_folder(tmp_path, {"1.dog": 2, "2.cat": 2})
        data = FewShotDataModule(str(tmp_path), shots=1)
        assert {row.class_name for row in data.draw.train} == {"1.dog", "2.cat"}

    def test_of_a_split_file_stay(self, tmp_path):
        file = split_file(tmp_path / "s.json", train=[["a.png", 0, "1.dog"], ["b.png", 1, "2.cat"]])
        assert names(file) == ["1.dog", "2.cat"]

    def test_one_class_keeps_its_own(self):
        assert without_codes(["1.dog"]) == ["1.dog"]


class TestGiven:
    def test_a_mapping(self, numbers, caplog):
        caplog.set_level(logging.INFO, "kshot")
        said = names(numbers, class_names={"2": "two", "10": "ten_", "1": "one"})
        assert said[:4] == ["one", "ten ", "11", "12"]
        assert "class names of set:\n  1 -> one\n  10 -> ten \n  2 -> two" in caplog.messages

    def test_a_list_is_shown(self, numbers, caplog):
        caplog.set_level(logging.INFO, "kshot")
        said = names(numbers, class_names=[f"number {i}" for i in range(1, 13)])
        assert said[1] == "number 2"
        (table,) = [message for message in caplog.messages if message.startswith("class names of set:")]
        assert table.splitlines()[2] == "  10 -> number 2"  # which shows the mistake
        assert table.splitlines()[-1] == "  and 4 more"

    @pytest.mark.parametrize(
        ("given", "message"),
        [
            ({"13": "x"}, r"class_names: set has no class '13'. Did you mean '3'\? There are: 3, 1"),
            ({"1": "same", "2": "Same"}, "'same' and 'Same' read the same"),
            ({"1": " "}, "' ' is no class name"),
            (["a"], "1 class_names for the 12 of set"),
        ],
    )
    def test_mistakes(self, numbers, given, message):
        with pytest.raises(UserError, match=message):
            names(numbers, class_names=given)

    def test_numbers_without_names_are_pointed_out(self, numbers):
        with pytest.warns(UserWarning, match="called '1' and so on"):
            names(numbers)

    @pytest.mark.parametrize(
        ("file", "text"),
        [
            ("classes.yaml", "1: one\n2: two\n"),
            ("classes.yml", "{'1': one, '2': two}"),
            ("classes.txt", "1 one\n2\ttwo\n" + "".join(f"{i} {i}\n" for i in range(3, 13))),
        ],
    )
    def test_a_file_in_the_folder(self, numbers, file, text):
        (numbers / file).write_text(text)
        said = names(numbers)
        assert (said[0], said[4]) == ("one", "two")
        assert names(numbers, class_names={"1": "first"})[0] == "first"

    @pytest.mark.parametrize(
        "text",
        ["one\ntwo\n", "- one\n- two", "a one\nb two\n", "﻿one\r\ntwo\r\n"],
        ids=["lines", "list", "pairs", "bom"],
    )
    def test_in_label_order(self, tmp_path, text):
        image_folder(tmp_path, {"a": 2, "b": 2})
        (tmp_path / ("classes.yaml" if text.startswith("-") else "classes.txt")).write_text(text)
        assert names(tmp_path) == ["one", "two"]

    @pytest.mark.parametrize("text", ["dog\ncat\n", "1 dog\n2 cat\n"])
    def test_a_list_of_the_folders_themselves(self, tmp_path, text):
        image_folder(tmp_path, {"cat": 2, "dog": 2})
        (tmp_path / "classes.txt").write_text(text)
        assert names(tmp_path) == ["cat", "dog"]

    @pytest.mark.parametrize(
        ("file", "text", "message"),
        [
            ("classes.txt", "one\n", "1 lines for 2 classes"),
            ("classes.yaml", "one", "must map folders to names"),
            ("classes.yaml", "a: [x]", "must map folders to names"),
            ("classes.yaml", "a: &x [*x]", "cannot be read"),
            ("classes.yaml", "- [a\n", "cannot be read"),
            ("classes.yaml", "c: x", "classes.yaml: .* has no class 'c'"),
            ("classes.yaml", "!!python/object/apply:os.abort []", "0 names in .* for the 2 of"),
            ("classes.yaml", "[" * 100_000, "cannot be read"),
            ("classes.yaml", "#" * 5_000_000, "more than 4,194,304 bytes"),
            ("classes.txt", "\udcff", "cannot be read"),
        ],
    )
    def test_files_with_mistakes(self, tmp_path, file, text, message):
        image_folder(tmp_path, {"a": 2, "b": 2})
        (tmp_path / file).write_bytes(text.encode(errors="surrogateescape"))
        with pytest.raises(UserError, match=message) as error:
            names(tmp_path)
        assert "\n" not in str(error.value)
        assert file in str(error.value)


@pytest.mark.parametrize(
    "others",
    [
        ("sea__lion", "sea_lion"),
        ("Golden_Retriever", "golden retriever"),
        ("caf\u00e9", "cafe\u0301"),
        ("a  b", "a b "),
    ],
)
def test_names_that_the_tokenizer_cannot_tell_apart(tmp_path, others):
    image_folder(tmp_path, dict.fromkeys((*others, "else"), 2))
    with pytest.raises(UserError, match="read the same in a prompt") as error:
        names(tmp_path)
    assert all(repr(name) in str(error.value) for name in others)


def test_a_mapping_on_the_command_line(tmp_path, monkeypatch, caplog):
    from kshot.cli import main

    image_folder(tmp_path / "set", {"1": 4, "02": 4})
    monkeypatch.chdir(tmp_path)
    for given in ('{"1": grass, "02": field}', "{1: grass, '02': field}"):
        main(["fit", "--config", "clip_16shot.yaml", "--config", "methods/zero_shot.yaml", "--data.dataset", "set",
              "--data.shots", "1", "--trainer.enable_progress_bar", "false", "--data.class_names", given])  # fmt: skip
        assert "class names of set:\n  02 -> field\n  1 -> grass" in caplog.messages
        caplog.clear()
