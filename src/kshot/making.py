"""Objects of settings that were laid and checked: of each class that they name, at every depth, made once."""

from __future__ import annotations

import typing
from collections.abc import Mapping
from contextlib import suppress
from functools import partial
from typing import Any

from kshot.config import Tree
from kshot.layering import holds_as_it_is, parser_of
from kshot.places import Place, Places, alternatives, arguments_of, named


def made(place: Place, value: Any) -> Any:
    """What a setting stands for at its place.

    A class with its settings becomes an object, or, where the run gives some of its arguments, a partial that lacks
    these alone. What a config cannot hold, such as a tuple or a member of an Enum, is made of what it holds instead.
    """
    if isinstance(value, dict) and place.bases and "class_path" in value:
        kind = named(value["class_path"], place.bases, "")
        settings = made_all(arguments_of(kind, place.given)[0], value.get("init_args", {}))
        settings |= value.get("dict_kwargs", {})
        return partial(kind, **settings) if place.factory else kind(**settings)
    if isinstance(value, dict) and place.group:
        return place.group(**made_all(arguments_of(place.group)[0], value))
    if place.items is not None and isinstance(value, dict):
        kinds = [each for each in alternatives(place.hint) if typing.get_origin(each) in (dict, Mapping)]
        numbered = any(typing.get_args(each)[0] is int for each in kinds)  # which no config has for keys
        return {int(name) if numbered else name: made(place.items, each) for name, each in value.items()}
    if place.items is not None and isinstance(value, list):
        return contained(place.hint, [made(place.items, each) for each in value])
    if not holds_as_it_is(place.hint, value):
        with suppress(ValueError):  # a type that jsonargparse has no rule for
            return parser_of(place.hint).parse_object({"value": value}).value
    return value


def made_all(places: Places, settings: Tree) -> dict[str, Any]:
    """Arguments by name."""
    return {name: made(places.get(name, Place()), value) for name, value in settings.items()}


def contained(hint: Any, items: list[Any]) -> Any:
    """Items in what a type annotation takes: a list, unless that is a tuple or a set alone."""
    kinds = {typing.get_origin(each) or each for each in alternatives(hint)}
    kind = next((kind for kind in (list, tuple, set) if kind in kinds), list)
    return kind(items)
