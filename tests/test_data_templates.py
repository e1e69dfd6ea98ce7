"""Sentences for class names, given or known by name."""

import subprocess
import sys

import pytest

from kshot.data.entries import DatasetEntry
from kshot.errors import UserError
from kshot.templates import DEFAULT_TEMPLATE, IMAGENET_7, check_templates, named_templates


def test_the_default_is_that_of_a_data_set_without_its_own():
    assert DEFAULT_TEMPLATE == DatasetEntry().template == "a photo of a {}."
    assert check_templates([DEFAULT_TEMPLATE]) == (DEFAULT_TEMPLATE,)


def test_sentences_are_taken_as_they_are():
    assert check_templates(["{} in the rain", "a {}"]) == ("{} in the rain", "a {}")
    assert named_templates("{} in the rain") == ("{} in the rain",)
    assert named_templates(["{} in the rain", "a {}"]) == ("{} in the rain", "a {}")


@pytest.mark.parametrize("check", [check_templates, named_templates])
@pytest.mark.parametrize("wrong", ["a photo", "", "a {} on a {}", "a {name}", "{", "a {} {name}", "{} }", "{0} {}"])
def test_one_place_for_the_name(check, wrong):
    with pytest.raises(UserError, match=r"must have {} once, where the class name goes") as error:
        check(["a {}", wrong])
    assert repr(wrong) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("check", [check_templates, named_templates])
def test_no_sentence(check):
    with pytest.raises(UserError, match=r"with {} where the class name goes"):
        check([])


def test_ensembles():
    from open_clip import OPENAI_IMAGENET_TEMPLATES

    eighty = tuple(str(template("{}")) for template in OPENAI_IMAGENET_TEMPLATES)
    assert named_templates("imagenet80") == eighty == check_templates(eighty)
    assert named_templates("imagenet60") == eighty[:60]
    assert named_templates("imagenet7") == IMAGENET_7 == check_templates(IMAGENET_7)
    assert set(IMAGENET_7) < set(eighty)


@pytest.mark.parametrize("name", ["imagenet", "imagenet8", "a photo of a cat", ""])
def test_an_unknown_ensemble(name):
    with pytest.raises(UserError, match=r"imagenet7.*imagenet60|imagenet60.*imagenet7") as error:
        named_templates(name)
    assert f"templates: {name!r} has no {{}} for the class name, nor is it an ensemble" in str(error.value)
    assert "\n" not in str(error.value)


def test_the_file_is_light():
    loaded = "import sys, kshot.templates; print('torch' in sys.modules, 'open_clip' in sys.modules)"
    ended = subprocess.run([sys.executable, "-c", loaded], capture_output=True, text=True, check=True)
    assert ended.stdout.split() == ["False", "False"]
