"""What may stand in each place of a config: the classes of the kind that a type annotation names, and nothing else.

Nothing is called here, and nothing is imported but the modules in which named classes lie.
"""

from __future__ import annotations

import collections.abc
import importlib
import importlib.util
import inspect
import sys
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, is_dataclass
from enum import Enum
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any

from torch import Tensor

from kshot.errors import UserError, first_line, nearest_first

REQUIRED: Any = object()  # the default of an argument without one
SEQUENCES = (list, tuple, set, collections.abc.Iterable, collections.abc.Sequence)


@dataclass
class Place:
    """What may stand in one place of a config."""

    hint: Any = Any  # its type annotation
    default: Any = None  # of the argument
    bases: tuple[type, ...] = ()  # the kinds of classes that it takes
    group: type | None = None  # a plain record, or another class whose settings stand here without its name
    given: frozenset[str] = frozenset()  # arguments of the class that the run gives, not the config
    factory: bool = False  # whether it takes what makes an object, once those are given
    items: Place | None = None  # what a list holds here, or a mapping
    text: bool = False  # whether a plain word is a value
    calls: bool = False  # whether any callable is a value


Places = Mapping[str, Place]


def place_of(hint: Any, default: Any = None) -> Place:
    """What a type annotation takes."""
    place = Place(hint, default)
    for part in alternatives(hint):
        kind, inside = typing.get_origin(part) or part, [a for a in typing.get_args(part) if a is not ...]
        if kind is str or kind is typing.Literal:
            place.text = True
        elif kind in SEQUENCES and inside:
            place.items = place_of(typing.Union[tuple(inside)])  # noqa: UP007  of a list of types
        elif kind in (dict, collections.abc.Mapping) and inside:
            place.items = place_of(inside[1])
        elif typing.Protocol in getattr(kind, "__bases__", ()):  # a factory: the run gives what its call takes
            hints = typing.get_type_hints(kind.__call__)
            place.bases, place.given = (*place.bases, hints.pop("return")), frozenset(hints)
            place.factory = True
        elif kind is collections.abc.Callable and inside and is_kind(inside[-1]):
            place.bases, place.factory = (*place.bases, inside[-1]), True
        elif kind in (type, collections.abc.Callable, types.ModuleType):
            place.calls = True
        elif isinstance(kind, type) and is_dataclass(kind):
            place.group = kind
        elif is_kind(kind):
            place.bases = (*place.bases, kind)
    return place


def alternatives(hint: Any) -> tuple[Any, ...]:
    """The members of a union, which Python flattens; or a type alone."""
    return typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)


def is_kind(hint: Any) -> bool:
    """True for a class that has subclasses to choose from: none of Python's own, no tensor, no plain record."""
    if not isinstance(hint, type) or is_dataclass(hint) or issubclass(hint, (Enum, Tensor)):
        return False
    return hint.__module__ != "torch" and hint.__module__.partition(".")[0] not in sys.stdlib_module_names


@cache
def arguments_of(target: type, given: frozenset[str] = frozenset()) -> tuple[Places, bool]:
    """The arguments of a class but for those given, and whether it takes others that are not named."""
    found: dict[str, Place] = {}
    more = False
    for function in (vars(c)["__init__"] for c in target.__mro__ if "__init__" in vars(c) and c is not object):
        _, *parameters = inspect.signature(function).parameters.values()
        for p in parameters:
            if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD) and p.name not in given:
                found.setdefault(p.name, place_of_argument(function, p))
        more = any(p.kind is p.VAR_KEYWORD for p in parameters)
        if not more:  # otherwise the rest are those of the next class
            break
    return found, more


def place_of_argument(function: Callable[..., Any], parameter: inspect.Parameter) -> Place:
    """What an argument takes; where its annotation names what is not there at run time, it may be anything called."""
    default = REQUIRED if parameter.default is parameter.empty else parameter.default
    if parameter.annotation is parameter.empty:
        return Place(default=default)
    holder = types.SimpleNamespace(__annotations__={"it": parameter.annotation})
    names = vars(typing) | vars(collections.abc) | inspect.unwrap(function).__globals__  # some are seldom imported
    try:
        hint = typing.get_type_hints(holder, names)["it"]
        return place_of(typing.Optional[hint] if default is None else hint, default)  # noqa: UP045
    except (NameError, AttributeError, TypeError):
        return Place(default=default, text=True, calls=True)


def named(name: str, bases: tuple[type, ...], where: str) -> type:
    """The class that a full path, or the name alone of one that is loaded, stands for at a place in a config.

    Raises:
        UserError: it is no subclass of one of the bases.
    """
    kinds = " or ".join(base.__name__ for base in bases)
    takes = f"{where} takes {'an' if kinds[0] in 'AEIOU' else 'a'} {kinds}"
    if is_path(name):
        found = imported(name, takes)
        if isinstance(found, type) and issubclass(found, bases) and not inspect.isabstract(found):
            return found
        raise UserError(f"{takes}, and {name} is none.")
    known = subclasses(bases)
    if name in known:
        return known[name]
    points = plugged_in(bases)
    if name not in points:
        raise UserError(f"{where}: there is no {kinds} {name!r:.200}. {nearest_first(name, [*known, *points])}")
    found = loaded(points[name])
    if isinstance(found, type) and issubclass(found, bases) and not inspect.isabstract(found):
        return found
    raise UserError(f"{takes}, and the plug-in {name} = {points[name].value} is none.")


def plugged_in(bases: Sequence[type]) -> dict[str, EntryPoint]:
    """What installed packages bring of these kinds, by short name: entry points of ``kshot.adapters`` and so on."""
    groups = {".".join(base.__module__.split(".")[:2]) for base in bases}
    return {point.name: point for group in sorted(groups) for point in entry_points(group=group)}


def loaded(point: EntryPoint) -> Any:
    """What an entry point names; raises UserError where it does not load."""
    try:
        return point.load()
    except Exception as error:  # a module may raise anything
        why = f"{type(error).__name__}: {first_line(error)}"
        raise UserError(f"The plug-in {point.name} = {point.value} of {point.group} does not load ({why}).") from error


def subclasses(bases: Sequence[type]) -> dict[str, type]:
    """Classes of these kinds that are loaded and can be built, by name; kshot's own come before another's namesake.

    Such as those that torch.export makes of every module that it follows, with the name and the module of its class.
    """
    found: dict[str, type] = {}
    family = list(bases)
    for each in family:
        children: list[type] = each.__subclasses__()
        family += children  # while it is walked
        name, own = each.__name__, each.__module__.partition(".")[0] == "kshot" and is_there(each)
        hidden = inspect.isabstract(each) or (each in bases and children and not own) or name.startswith("_")
        if not hidden and (name not in found or own):
            found[name] = each
    return found


def is_there(target: type) -> bool:
    """Whether a class is what its module has under its name."""
    return getattr(sys.modules.get(target.__module__), target.__qualname__, None) is target


def public_path(target: type) -> str:
    """The shortest path that gives a class: ``torch.optim.AdamW``."""
    parts = target.__module__.split(".")
    paths = [".".join(parts[:end]) for end in range(1, len(parts) + 1)]
    module = next((m for m in paths if getattr(sys.modules.get(m), target.__name__, None) is target), target.__module__)
    return f"{module}.{target.__qualname__}"


def is_path(text: str) -> bool:
    """True for what may be the path of a class, ``a.b``."""
    parts = text.split(".")
    return len(parts) > 1 and all(part.isidentifier() for part in parts)


def imported(path: str, takes: str) -> Any:
    """What a dotted path names, importing its module; the standard library's holds no class for a config.

    The working directory is looked into last, and only for a name that no installed package has.
    ``takes`` begins the UserError for what is not there or does not load: the place and what it takes.
    """
    parts = path.split(".")
    if not is_path(path) or "__main__" in parts[1:]:
        raise UserError(f"{takes}, and {path!r} is no name of a class.")
    if parts[0] in sys.stdlib_module_names and parts[0] != "__main__":
        raise UserError(f"{takes}, and {path} belongs to Python itself.")
    here = str(Path.cwd())
    if parts[0] not in sys.modules and here not in sys.path and importlib.util.find_spec(parts[0]) is None:
        sys.path.append(here)  # a user's own classes lie where the user stands
        importlib.invalidate_caches()
    for end in range(len(parts) - 1, 0, -1):
        name = ".".join(parts[:end])
        try:
            module = importlib.import_module(name)
        except ModuleNotFoundError as error:
            if f"{name}.".startswith(f"{error.name}."):
                continue  # perhaps a class inside a module
            raise UserError(f"{takes}, and {name} needs {error.name}, which is not installed.") from error
        except Exception as error:  # a module may raise anything
            why = f"{type(error).__name__}: {first_line(error)}"
            raise UserError(f"{takes}, and {name} does not load ({why}).") from error
        found: Any = module
        for part in parts[end:]:  # a class in a class, but nothing of a module that this one imports
            found = getattr(found, part, None) if found is module or isinstance(found, type) else None
        if found is None:
            near = nearest_first(parts[-1], [key for key, value in vars(module).items() if isinstance(value, type)])
            raise UserError(f"{takes}, and {name} has no {'.'.join(parts[end:])!r}. {near}")
        return found
    raise UserError(f"{takes}, and there is no module {parts[0]!r}.")
