"""Settings laid over each other by the places that they stand in; what does not belong there gets one line."""

from __future__ import annotations

import inspect
import math
import os
import re
import typing
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from functools import cache
from typing import Any

from jsonargparse import ArgumentError, ArgumentParser
from torch import cuda

from kshot.classifiers import Classifier
from kshot.config import Tree, read_word, walk
from kshot.errors import UserError, nearest_first
from kshot.places import (
    REQUIRED,
    Place,
    Places,
    alternatives,
    arguments_of,
    is_path,
    named,
    public_path,
    subclasses,
)

DURATION = ("weeks", "days", "hours", "minutes", "seconds")
BUILDER = "lightning.pytorch.cli.instantiate_module"  # by which Lightning opens a checkpoint again
Rule = tuple[Callable[[Any], Any], str]  # what holds of a value, and what completes "is 0, and must ..."
SPEC: Tree = {"class_path": str, "init_args": dict | None, "dict_kwargs": dict | None}  # a class and its settings
PLAIN = {bool, int, float, str, type(None), list, tuple, dict}  # what a config holds
INF, MANY = math.inf, 2**31
POSITIVE: Rule = (lambda x: 0 < x < INF, "be a positive number, such as 1e-3")
FROM_0: Rule = (lambda x: 0 <= x < INF, "be finite, and 0 or more")
FROM_1: Rule = (lambda x: 1 <= x < MANY, "be 1 or more, and below two billions")
FEW: Rule = (lambda x: x < MANY, "be below two billions")  # its least is told where it is used
ENDS: Rule = (lambda x: 1 <= x < MANY or x == -1, "be 1 or more, or -1 where max_epochs or max_steps ends the run")
SHARE: Rule = (lambda x: 0 <= x <= 1 or (x > 1 and x % 1 == 0), "be a share from 0 to 1.0, or a number of batches")
SOME: Rule = (lambda x: x != 0 and SHARE[0](x), "be a share above 0 and up to 1.0, or a number of batches")
NUMBERS = {  # what numbers must be, by the full names of their options
    "data.batch_size": FEW,
    "data.eval_batch_size": FEW,
    "data.num_workers": (lambda x: x <= 256, "be at most 256 processes"),
    "data.split_seed": (lambda x: 0 <= x < 2**63, f"lie in 0 to {2**63 - 1}"),
    "data.views": FEW,
    "model.backbone.text_memory_gb": (lambda x: x < INF, "be a finite number of GB"),
    "model.head_lr": POSITIVE,
    "model.optimizer.lr": POSITIVE,
    "model.optimizer.weight_decay": FROM_0,
    "model.schedule.T_max": (lambda x: 0 <= x < INF, "be a number of steps from 1 on, or 0 for all of the run"),
    "model.schedule.step_size": FROM_1,
    "run.save_every": FROM_0,
    "search.trials": FROM_1,
    "seed_everything": (lambda x: 0 <= x < 2**32, f"lie in 0 to {2**32 - 1}"),
    "trainer.accumulate_grad_batches": FROM_1,
    "trainer.check_val_every_n_epoch": FROM_0,
    "trainer.devices": (
        lambda x: 1 <= x <= max(2, os.cpu_count() or 1, cuda.device_count()) or (x == -1 and cuda.is_available()),
        "be a number of devices that this machine has, or auto",
    ),
    "trainer.fast_dev_run": FROM_0,
    "trainer.gradient_clip_val": FROM_0,
    "trainer.limit_predict_batches": SOME,
    "trainer.limit_test_batches": SOME,
    "trainer.limit_train_batches": SOME,
    "trainer.limit_val_batches": SHARE,
    "trainer.log_every_n_steps": FROM_0,
    "trainer.max_epochs": ENDS,
    "trainer.max_steps": ENDS,
    "trainer.min_epochs": FROM_1,
    "trainer.num_nodes": FROM_1,
    "trainer.num_sanity_val_steps": (lambda x: -1 <= x < INF, "be 0 or more, or -1 for all"),
    "trainer.overfit_batches": SHARE,
    "trainer.val_check_interval": SOME,
    **{f"trainer.max_time.{unit}": (lambda x: 0 <= x <= 10000, "lie in 0 to 10000") for unit in DURATION},
}
WORDS: dict[str, Rule] = {  # and words
    "ckpt_path": (str.strip, "be the name of a file"),
    "data.dataset": (str.strip, "be a data set, a folder or a file"),
    "data.manifest": (str.strip, "be the name of a file"),
    "data.root": (str.strip, "be the name of a folder"),
    "file": (str.strip, "be the name of a file"),
    "run.name": (
        lambda x: all(part.strip(". ") and part.isprintable() and len(part) < 200 for part in re.split(r"[/\\]", x)),
        "be the name of a folder below run.root",
    ),
    "run.root": (lambda x: x.strip() and x.isprintable(), "be the name of a folder"),
    "trainer.devices": (re.compile(r"auto|-?\d[\d, ]*").fullmatch, "be a number of devices, or auto"),
    "trainer.max_time": (
        re.compile(r"\d{1,4}(:\d\d?){3}").fullmatch,
        "be days, hours, minutes and seconds, such as 00:02:30:00",
    ),
}


class UnknownOptionError(UserError):
    """A class or a command has no option of a name: ``name`` in full, ``known`` are those that it has."""

    def __init__(self, owner: str, name: str, known: Iterable[str]) -> None:
        last = name.rpartition(".")[2]
        super().__init__(f"{owner} has no option {last!r}. {nearest_first(last, known)}")
        self.owner, self.name, self.known = owner, name, list(known)


def lay_all(places: Places, old: Tree, new: Tree, where: str, owner: str, more: bool = False) -> Tree:
    """Settings by name, of the class ``owner``, laid over those before; ``name+`` adds to a list.

    Raises:
        UserError: what :func:`lay` refuses, and a name that is no place's unless ``more`` are let through.
    """
    result = dict(old)
    for key, value in new.items():
        name = key.removesuffix("+")
        inner = f"{where}.{name}".lstrip(".")
        if name not in places and not more:
            raise UnknownOptionError(owner, inner, places)
        place, before = places.get(name, Place()), result.get(name)
        if key == name:
            result[name] = lay(place, before, value, inner)
        else:
            result[name] = [*listed(before), *listed(lay(place.items or place, None, value, inner))]
    return result


def listed(value: Any) -> list[Any]:
    """What an option holds: nothing, one, or several."""
    return value if isinstance(value, list) else [] if value is None else [value]


def lay(place: Place, old: Any, new: Any, where: str) -> Any:
    """A value, as a word of the command line or plain YAML, laid over an older one or None.

    Settings of the same class are merged. A class that replaces another keeps those settings that it has a name for,
    such as the learning rate; but a classifier starts from its own defaults, so that CoOp's depth is not PromptSRC's.

    Raises:
        UserError: a class or a value that the place does not take, an option that a class does not have.
    """
    read, several = read_word(new), place.items
    nameless = isinstance(read, dict) and "class_path" not in read
    chooses = isinstance(read, dict) or (
        isinstance(read, str) and (is_path(read) or not place.text or read in subclasses(place.bases))
    )
    if place.group and isinstance(read, dict):
        before = old if isinstance(old, dict) else {}
        return lay_all(arguments_of(place.group)[0], before, read, where, place.group.__name__)
    if several and nameless and isinstance(old, list):  # settings of the last in a list
        return [*old[:-1], lay(several, old[-1] if old else None, read, where)]
    if place.bases and chooses:
        return lay_class(place, old, read, where)
    if several and (isinstance(read, list) or (several.bases and chooses)):
        return [lay(several, None, each, f"{where}[{i}]") for i, each in enumerate(listed(read))]
    if several and nameless:
        return {key: lay(several, None, each, f"{where}.{key}") for key, each in read.items()}
    return plain_value(place, new, where)


def plain_value(place: Place, value: Any, where: str) -> Any:
    """A value as a config states it, in the type of its place: ``"4"`` is 4 for a number.

    Raises:
        UserError: it is not of that type, or one for which jsonargparse would import or read something.
    """
    word = read_word(value)
    for each in walk(word):
        if any(isinstance(part, dict) and "class_path" in part for part in walk(read_word(each))):
            raise UserError(f"{where} takes no class, and is given {each!r:.200}.")
    if place.group and not place.text and (isinstance(word, str) or place.hint is place.group):  # no name of a file
        raise UserError(f"{where} is {value!r}, and must be a mapping of settings.")
    if place.calls and isinstance(word, str) and (is_path(word) or os.path.isfile(word)):  # noqa: PTH113  of any length
        raise UserError(f"{where} takes a function, which a config cannot give: not {word!r}.")
    check_range(where, value)
    if Any in alternatives(place.hint):
        return word
    if holds_as_it_is(place.hint, value) and not (isinstance(value, str) and word is not value):
        return stated(value)
    try:
        read = parser_of(place.hint).parse_object({"value": value}).value
    except (ArgumentError, TypeError) as error:
        names = [name for part in alternatives(place.hint) for name in names_of(part)]
        raise UserError(f"{where}: Expected {' or '.join(dict.fromkeys(names))}. Got value: {value}") from error
    except ValueError:  # a type that jsonargparse has no rule for
        return word
    return stated(read) if all(type(each) in PLAIN for each in walk(read)) else value


def stated(value: Any) -> Any:
    """A value with lists for tuples and words for keys, at every depth, as a config states them."""
    if isinstance(value, dict):
        return {str(name): stated(each) for name, each in value.items()}
    return [stated(each) for each in value] if isinstance(value, (list, tuple)) else value


def holds_as_it_is(hint: Any, value: Any) -> bool:
    """Whether a value is of one of the types of an annotation, to the letter."""
    for kind in alternatives(hint):
        if kind is Any or type(value) is kind:
            return True
        if typing.get_origin(kind) is typing.Literal and any(
            each == value and type(each) is type(value) for each in typing.get_args(kind)
        ):
            return True
        if typing.get_origin(kind) is tuple and isinstance(value, tuple) and len(value) == len(typing.get_args(kind)):
            return all(map(holds_as_it_is, typing.get_args(kind), value))
    return False


@cache
def parser_of(hint: Any) -> ArgumentParser:
    """What reads a value of a type; raises ValueError for one that jsonargparse has no rule for."""
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--value", type=hint)
    return parser


def names_of(hint: Any) -> list[str]:
    """What a type is called in a refusal: ``int``, ``null``, or all words of a choice."""
    if typing.get_origin(hint) is typing.Literal:
        return [str(each) for each in typing.get_args(hint)]
    name = hint.__name__ if isinstance(hint, type) else str(hint).replace("typing.", "")
    return ["null" if name == "NoneType" else name]


def check_range(where: str, value: Any) -> None:
    """Raises UserError for a number or a word that no rule of its option allows, and for a zero byte in any."""
    if isinstance(value, str) and "\0" in value:
        raise UserError(f"{where} is {value!r:.200}, and must hold no zero byte.")
    read, number = read_word(value), None
    with suppress(ValueError, TypeError):  # no number, or one that YAML does not know as such: 1e-3 and nan
        number = None if isinstance(read, bool) else float(read if isinstance(read, (int, float)) else value)
    for rules, given, shown in ((NUMBERS, number, f"{value}"), (WORDS, value, f"{value!r:.200}")):
        holds, what = rules.get(where, (bool, ""))
        if what and isinstance(given, (float, str)) and not holds(given):
            raise UserError(f"{where} is {shown}, and must {what}.")


def lay_class(place: Place, old: Any, new: Any, where: str) -> Tree:
    """A class and its settings, laid over those before; null, what a class decides itself, is not another's."""
    own = new if isinstance(new, dict) else {"class_path": new}
    if "class_path" not in own and not own.keys() <= SPEC.keys():
        own = {"init_args": own}  # settings alone, for the class that is there
    for key, value in own.items():
        if not isinstance(value, SPEC.get(key, ())):
            raise UserError(f"{where}.{key} is {value!r:.200}: a class is given as class_path and its init_args.")
    arguments, extra = own.get("init_args") or {}, own.get("dict_kwargs") or {}
    plain_value(Place(), extra, f"{where}.dict_kwargs")
    before = named(old["class_path"], place.bases, where) if isinstance(old, dict) else None
    if "class_path" in own:
        chosen = named(own["class_path"], place.bases, where)
    else:
        chosen = before or (place.default if isinstance(place.default, type) else place.bases[0])
        if inspect.isabstract(chosen):
            known = list(subclasses(place.bases))
            raise UserError(f"{where} needs a class first, such as --{where} {known[0]}. {nearest_first('', known)}")
    places, more = arguments_of(chosen, place.given)
    kept: Tree = {}
    if before is chosen:
        kept, extra = old["init_args"], old.get("dict_kwargs", {}) | extra
    elif issubclass(chosen, Classifier):  # written out, or jsonargparse keeps the default classifier's
        plain = (float, int, str, type(None))
        kept = {name: each.default for name, each in places.items() if isinstance(each.default, plain)}
    elif before:
        for name, value in old["init_args"].items():
            with suppress(UserError):  # the class has no such name, or does not take the value
                kept |= {} if value is None else lay_all(places, {}, {name: value}, where, chosen.__name__)
    laid = lay_all(places, kept, arguments, where, chosen.__name__, more)
    return {"class_path": public_path(chosen), "init_args": laid} | ({"dict_kwargs": extra} if extra else {})


def check_stored(settings: Tree, kind: type) -> None:
    """Refuses a checkpoint's ``hyper_parameters`` of which Lightning would build more than a module of this kind.

    Raises:
        UserError: names the setting.
    """
    builder = settings.get("_instantiator", BUILDER)
    if builder != BUILDER:
        raise UserError(f"The checkpoint's settings are to be built by {builder!r:.200}, and not by {BUILDER}.")
    own = {name: value for name, value in settings.items() if not name.startswith("_")}
    spec = {"class_path": settings.get("_class_path", public_path(kind)), "init_args": own}
    lay(Place(bases=(kind,)), None, spec, "hyper_parameters")


def options_below(places: Places, tree: Tree, where: str = "") -> Iterator[tuple[str, Place, Any]]:
    """All options that the classes in a tree have: full name, place, and value, ``REQUIRED`` where it is missing."""
    for name, place in places.items():
        inner, value = f"{where}.{name}".lstrip("."), tree.get(name, place.default)
        yield inner, place, value
        if isinstance(value, dict) and (place.group or place.bases):
            chosen = place.group or named(value["class_path"], place.bases, inner)
            own = value if place.group else value["init_args"]
            yield from options_below(arguments_of(chosen, place.given)[0], own, inner)


def written_out(places: Places, tree: Tree) -> Tree:
    """Settings with the defaults of what is not given, at every depth; a default that no config can hold stays out."""
    found = {name: _stated(place) for name, place in places.items()} | tree
    found = {name: value for name, value in found.items() if value is not REQUIRED}
    return {name: _with_defaults(places.get(name, Place()), value) for name, value in found.items()}


def _stated(place: Place) -> Any:
    """The default of a place as a config states it, or REQUIRED."""
    if place.bases and isinstance(place.default, type):
        return {"class_path": public_path(place.default), "init_args": {}}
    if any(type(each) not in PLAIN for each in walk(place.default)):
        return REQUIRED
    with suppress(UserError):  # of a default that its own annotation does not take
        return plain_value(place, place.default, "")
    return place.default


def _with_defaults(place: Place, value: Any) -> Any:
    if isinstance(value, list) and place.items is not None:
        return [_with_defaults(place.items, each) for each in value]
    if not isinstance(value, dict):
        return value
    if place.bases and "class_path" in value:
        chosen = named(value["class_path"], place.bases, "")
        return value | {"init_args": written_out(arguments_of(chosen, place.given)[0], value["init_args"])}
    if place.group:
        return written_out(arguments_of(place.group)[0], value)
    return value if place.items is None else {key: _with_defaults(place.items, each) for key, each in value.items()}
