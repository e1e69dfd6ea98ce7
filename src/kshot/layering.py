"""Settings laid over each other by the places that they stand in, and what is wrong with them in one line."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Iterator, Sequence
from typing import Any

from jsonargparse import ArgumentError, ArgumentParser

from kshot.classifiers import Classifier
from kshot.config import Tree, load_word, walk
from kshot.errors import UserError, nearest_first
from kshot.places import (
    REQUIRED,
    Place,
    Places,
    alternatives,
    arguments_of,
    imported,
    is_path,
    named,
    options_of,
    public_path,
    subclasses,
)

BUILDER = "lightning.pytorch.cli.instantiate_module"  # what LightningCLI writes into checkpoints
SPEC = {"class_path", "init_args", "dict_kwargs"}  # keys of a class and its settings


class UnknownOptionError(UserError):
    """A name that is no option of what it was given to.

    Attributes:
        path: the full name.
    """

    def __init__(self, owner: str, name: str, path: str, known: Sequence[str]) -> None:
        super().__init__(f"{owner} has no option {name!r}. {nearest_first(name, known)}")
        self.path = path


def lay_all(places: Places, old: Tree, new: Tree, where: str, owner: str, more: bool = False) -> Tree:
    """Settings by name, laid over those before; ``name+`` adds to a list.

    Args:
        places: by name.
        old: laid before.
        new: as read.
        where: what they belong to, empty at the top.
        owner: the class that has them, for messages.
        more: whether names that are not among the places are let through.

    Raises:
        UserError: a class that a place does not take, an option that a class does not have.
    """
    result = dict(old)
    for key, value in new.items():
        name = key.removesuffix("+")
        inner = f"{where}.{name}".lstrip(".")
        if name not in places and not more:
            raise UnknownOptionError(owner, name, inner, list(places))
        place, before = places.get(name, Place()), result.get(name)
        if key == name:
            result[name] = lay(place, before, value, inner)
        else:
            both = [before or [], lay(place, None, value, inner)]
            result[name] = [each for part in both for each in (part if isinstance(part, list) else [part])]
    return result


def lay(place: Place, old: Any, new: Any, where: str) -> Any:
    """A value laid over an older one.

    Settings of the same class are merged. A class that replaces another keeps those settings that it has a name for,
    such as the learning rate; but a classifier starts from its own defaults, so that CoOp's depth is not PromptSRC's.

    Args:
        place: where both stand.
        old: the older value, laid before; None without any.
        new: as read, a word of the command line or plain YAML.
        where: the place's name, for messages.

    Raises:
        UserError: a class that the place does not take, an option that a class does not have.
    """
    if place.group is not None:
        if not isinstance(new, dict):
            raise UserError(f"{where} is {new!r}, and must be a mapping of settings.")
        return lay_all(arguments_of(place.group)[0], old or {}, new, where, place.group.__name__)
    read = load_word(new) if isinstance(new, str) else new
    word = isinstance(read, str) and (is_path(read) or not place.text)  # that may name a class
    several = place.items
    if several and isinstance(read, dict) and isinstance(old, list) and "class_path" not in read:
        result: Any = [*old[:-1], lay(several, old[-1] if old else None, read, where)]  # of a list, its last
    elif place.bases and (isinstance(read, dict) or word):
        result = lay_class(place, old, read, where)
    elif several and isinstance(read, list):
        result = [lay(several, None, each, where) for each in read]
    elif several and several.bases and (isinstance(read, dict) or word):
        result = [lay(several, None, read, where)]
    elif several and isinstance(read, dict) and "class_path" not in read:
        result = {key: lay(several, None, each, f"{where}.{key}") for key, each in read.items()}
    else:
        check_plain(place, read, where, word)
        result = new
    return result


def check_plain(place: Place, read: Any, where: str, word: bool) -> None:
    """Refuses a class in a place that takes none, and a path that jsonargparse would import there."""
    for each in walk(read):
        inside = load_word(each) if isinstance(each, str) else None
        if any(isinstance(part, dict) and "class_path" in part for part in (each, *walk(inside))):
            raise UserError(f"{where} takes no class, and is given {each!r:.200}.")
    if word and place.calls:
        if read.partition(".")[0] != "kshot" or not callable(imported(read, f"{where} takes a function")):
            raise UserError(f"{where} takes a function, and from a config only one of kshot's own, not {read!r}.")
    elif word and not place.text and is_path(read) and place.hint is not Any:
        raise UserError(mismatch(place, read, where))


def lay_class(place: Place, old: Any, new: Any, where: str) -> Tree:
    """A class and its settings, laid over those before."""
    own = new if isinstance(new, dict) else {"class_path": new}
    if "class_path" not in own and not own.keys() <= SPEC:
        own = {"init_args": own}  # settings alone, for the class that is there
    arguments, extra = own.get("init_args") or {}, own.get("dict_kwargs") or {}
    if not (own.keys() <= SPEC and isinstance(arguments, dict) and isinstance(extra, dict)):
        wrong = sorted(own.keys() - SPEC) or [key for key in sorted(own) if not isinstance(own[key], dict)]
        raise UserError(
            f"{where}.{wrong[0]}: a class is given as class_path, with a mapping init_args of its settings."
        )
    check_plain(Place(), extra, f"{where}.dict_kwargs", word=False)
    before = named(old["class_path"], place.bases, where) if isinstance(old, dict) else None
    if "class_path" in own:
        if not isinstance(own["class_path"], str):
            raise UserError(f"{where}.class_path is {own['class_path']!r}, and must be the name of a class.")
        chosen = named(own["class_path"], place.bases, where)
    else:
        chosen = before or (place.default if isinstance(place.default, type) else place.bases[0])
        if inspect.isabstract(chosen):
            known = list(subclasses(place.bases))
            raise UserError(f"{where} needs a class first, such as --{where} {known[0]}. {nearest_first('', known)}")
    places, more = options_of(chosen, place.given)
    kept: Tree = {}
    if before is chosen:
        kept, extra = old["init_args"], old.get("dict_kwargs", {}) | extra
    elif not (isinstance(chosen, type) and issubclass(chosen, Classifier)):
        kept = what_fits(places, old["init_args"], where) if before else {}
    elif chosen is not place.default:  # or jsonargparse lays its settings over those of the default class
        kept = {
            n: p.default for n, p in places.items() if p.default is None or isinstance(p.default, (float, int, str))
        }
    laid = lay_all(places, kept, arguments, where, chosen.__name__, more)
    return {"class_path": public_path(chosen), "init_args": laid} | ({"dict_kwargs": extra} if extra else {})


def what_fits(places: Places, arguments: Tree, where: str) -> Tree:
    """Those settings of another class that a class has a name for and takes."""
    kept = {}
    for name, value in arguments.items():
        if name in places and accepts(places[name], value):
            try:
                kept[name] = lay(places[name], None, value, f"{where}.{name}")
            except UserError:
                continue
    return kept


def check_stored(settings: Tree, kind: type) -> None:
    """Refuses settings in a checkpoint that name what no place takes, before Lightning builds a module of them.

    Args:
        settings: a checkpoint's ``hyper_parameters``.
        kind: of the module.

    Raises:
        UserError: names the setting.
    """
    builder = settings.get("_instantiator", BUILDER)
    if builder != BUILDER:
        raise UserError(f"The checkpoint's settings are to be built by {builder!r:.200}, and not by {BUILDER}.")
    own = {name: value for name, value in settings.items() if not name.startswith("_")}
    spec = {"class_path": settings.get("_class_path", public_path(kind)), "init_args": own}
    lay(Place(bases=(kind,)), None, spec, "hyper_parameters")


# ------------------------------------------------------------------------------------------------ what is wrong


def accepts(place: Place, value: Any) -> bool:
    """Whether a plain value is of a place's type; True for classes, which are laid by other rules."""
    if place.hint is Any or isinstance(value, dict):
        return True
    parser = ArgumentParser(exit_on_error=False)
    try:
        parser.add_argument("--value", type=place.hint)
        parser.parse_object({"value": value})
    except (ArgumentError, TypeError):
        return False
    except ValueError:  # a type that jsonargparse has no rule for
        return True
    return True


def mismatch(place: Place, value: Any, where: str) -> str:
    """One line for a value of the wrong type."""
    wanted = [
        "null" if part is type(None) else part.__name__ if isinstance(part, type) else str(part).replace("typing.", "")
        for part in alternatives(place.hint)
    ]
    return f"{where}: Expected {' or '.join(wanted)}. Got value: {value}"


def inside(place: Place, value: Any, where: str) -> tuple[Places, Tree]:
    """The options of the class that is in a place, and their values."""
    if place.group is not None:
        return arguments_of(place.group)[0], value or {}
    if not place.bases or not isinstance(value, dict):
        return {}, {}
    return options_of(named(value["class_path"], place.bases, where), place.given)[0], value["init_args"]


def complaints(places: Places, tree: Tree, where: str = "") -> Iterator[str]:
    """What is missing or of the wrong type, one line each, in a tree that was laid."""
    for name, place in places.items():
        inner = f"{where}.{name}".lstrip(".")
        if name not in tree and place.default is REQUIRED:
            yield (
                f"{inner} is missing: start from an experiment, such as --config clip_16shot.yaml, "
                "and lay a method over it, such as --config methods/lora.yaml."
            )
        yield from complaints(*inside(place, tree.get(name), inner), inner)
        if name in tree and not accepts(place, tree[name]):
            yield mismatch(place, tree[name], inner)


def options_below(places: Places, tree: Tree, where: str = "") -> Iterator[tuple[str, Place]]:
    """All options that the classes in a tree have, by full name."""
    for name, place in places.items():
        inner = f"{where}.{name}".lstrip(".")
        yield inner, place
        yield from options_below(*inside(place, tree.get(name), inner), inner)


def nearest_option(name: str, known: Sequence[str]) -> str:
    """The option that is most likely meant, by the last part of its name: max_epochs for epochs."""
    wanted = name.rpartition(".")[2]

    def distance(option: str) -> tuple[bool, bool, float]:
        last = option.rpartition(".")[2]
        return last != wanted, not last.endswith(f"_{wanted}"), -difflib.SequenceMatcher(None, wanted, last).ratio()

    return min(known, key=distance)
