"""Parts of a run from settings: objects of classes, and what a config cannot hold."""

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import timedelta
from enum import Enum
from functools import partial
from typing import Any, Protocol

import pytest
import torch
from lightning.pytorch.callbacks import Timer

from kshot.adapters import Adapter, LoRA
from kshot.errors import UserError, user_error_behind
from kshot.layering import lay, written_out
from kshot.making import made
from kshot.optim import OptimizerFactory
from kshot.places import Place, place_of


class Size(Enum):
    small = "small"
    large = "large"


class Part:
    def __init__(
        self, size: Size = Size.small, pair: tuple[float, float] = (0, 1), inner: "Part | None" = None
    ) -> None:
        self.size, self.pair, self.inner = size, pair, inner


class PartFactory(Protocol):
    def __call__(self, inner: Part) -> Part: ...


@dataclass
class Record:
    parts: list[Part] | None = None
    names: set[str] | None = None
    by_epoch: dict[int, float] | None = None
    factory: PartFactory = Part


def laid(hint: Any, value: Any) -> Any:
    place = place_of(hint)
    return place, written_out({"x": place}, {"x": lay(place, None, value, "x")})["x"]


def test_each_class_at_every_depth_is_made_with_what_its_annotations_say():
    place, tree = laid(Part, {"class_path": f"{__name__}.Part", "init_args": {
        "size": "large", "pair": ["1", 2], "inner": {"class_path": f"{__name__}.Part", "init_args": {"pair": [3, 4]}},
    }})  # fmt: skip
    part = made(place, tree)
    assert (part.size, part.pair, part.inner.size, part.inner.pair) == (Size.large, (1.0, 2.0), Size.small, (3.0, 4.0))
    assert tree["init_args"]["pair"] == [1.0, 2.0], "a config has lists for tuples"


def test_a_record_and_its_containers():
    place, tree = laid(
        Record, {"parts": [{"class_path": f"{__name__}.Part"}], "names": ["a", "b"], "by_epoch": {"3": "1e-2"}}
    )
    record = made(place, tree)
    assert isinstance(record, Record)
    assert [type(part) for part in record.parts] == [Part]
    assert (record.names, record.by_epoch) == ({"a", "b"}, {3: 0.01})


def test_a_factory_lacks_what_the_run_gives():
    place, tree = laid(Record, {"factory": {"class_path": f"{__name__}.Part", "init_args": {"pair": [1, 2]}}})
    factory = made(place, tree).factory
    assert isinstance(factory, partial)
    inner = Part()
    assert factory(inner=inner).inner is inner
    assert factory(inner=inner).pair == (1.0, 2.0)
    place, tree = laid(OptimizerFactory, {"class_path": "torch.optim.AdamW", "init_args": {"betas": [0.8, 0.9]}})
    optimizer = made(place, tree)(params=[torch.nn.Parameter(torch.zeros(1))])
    assert optimizer.defaults["betas"] == (0.8, 0.9)


def test_dict_kwargs_go_to_the_constructor():
    place = place_of(Adapter)
    found = made(place, {"class_path": "kshot.adapters.LoRA", "init_args": {"rank": 2}, "dict_kwargs": {"alpha": 3.0}})
    assert found == LoRA(rank=2, alpha=3.0)


def test_a_words_own_class_of_another_library():
    place, tree = laid(Timer, {"class_path": "Timer", "init_args": {"duration": "00:01:00:00", "interval": "epoch"}})
    timer = made(place, tree)
    assert timer.time_remaining() == timedelta(hours=1).total_seconds()


@pytest.mark.parametrize(
    ("hint", "word", "stated"),
    [
        (int | None, "4", 4),
        (float, 1, 1.0),
        (float, "1e-3", 1e-3),
        (str | None, "12", "12"),
        (str | None, "null", None),
        (bool | int, "true", True),
        (bool | int, "3", 3),
        (Any, "[a, 1]", ["a", 1]),
        (Iterable[str], "[a, b]", ["a", "b"]),
        (tuple[int, int], "[1, 2]", [1, 2]),
        (dict[str, int] | None, {"minutes": "3"}, {"minutes": 3}),
    ],
)
def test_a_word_is_stated_in_the_type_of_its_place(hint, word, stated):
    found = lay(place_of(hint), None, word, "x")
    assert (found, type(found)) == (stated, type(stated))


def test_a_class_by_its_name_where_words_stand_too():
    place = place_of(Timer | str | None)
    assert lay(place, None, "Timer", "x")["class_path"] == "lightning.pytorch.callbacks.Timer"
    assert lay(place, None, "a word", "x") == "a word"


def test_what_a_constructor_refuses_comes_as_it_is():
    with pytest.raises(UserError, match="rank is -1"):
        made(place_of(Adapter), {"class_path": "kshot.adapters.LoRA", "init_args": {"rank": -1}})
    assert made(Place(), "word") == "word"


def test_a_mistake_behind_a_librarys_exception_is_found():
    wrapped = ValueError("union")
    wrapped.__cause__ = mistake = UserError("rank is -1")
    assert user_error_behind(wrapped) is mistake
    assert user_error_behind(ValueError("a fault")) is None
