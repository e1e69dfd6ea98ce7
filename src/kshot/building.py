"""Parts of a run from the settings of a command line, one at a time, where a run shares some with others."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from jsonargparse import ArgumentParser
from lightning.pytorch.trainer import Trainer

from kshot.backbones import Backbone
from kshot.config import Tree
from kshot.data import FewShotDataModule
from kshot.data.prediction import PredictionData
from kshot.errors import user_error_behind
from kshot.folds import fold_settings
from kshot.module import FewShotModule
from kshot.settings import LINKED


def data_of(tree: Tree) -> FewShotDataModule:
    """The data set of a command line's settings."""
    data: FewShotDataModule = made("data", FewShotDataModule, tree["data"])
    return data


def backbone_of(tree: Tree) -> Backbone:
    """The backbone of a command line's settings."""
    backbone: Backbone = made("backbone", Backbone, tree["model"]["init_args"]["backbone"])
    return backbone


def made(name: str, base: type, spec: Any) -> Any:
    """An object of a class that settings name."""
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(base, name, fail_untyped=False)  # users' classes need no annotations
    return instantiated(parser, {name: spec})[name]


def instantiated(parser: ArgumentParser, settings: Tree) -> Any:
    """What a parser makes of settings; raises UserError where one is behind what it raises."""
    try:
        return parser.instantiate(parser.parse_object(settings))
    except Exception as error:  # jsonargparse may wrap a mistake in anything
        mistake = user_error_behind(error)
        if mistake is None:
            raise
        raise mistake from error


def reading_of(tree: Tree) -> Tree:
    """How a command line's settings of a data set say that images are read, beside its settings as they are."""
    given, parser = tree["data"]["init_args"], ArgumentParser(exit_on_error=False)
    known_to_header = {"class_names", "templates", "found_white"}
    parser.add_class_arguments(PredictionData, "data", skip=known_to_header, instantiate=False)
    own = {n: given[n] for n in inspect.signature(PredictionData).parameters if n in given.keys() - known_to_header}
    return {**given, **vars(instantiated(parser, {"data": own}).data)}


def method_of(tree: Tree) -> dict[str, Any]:
    """What makes a :class:`~kshot.module.FewShotModule` of a backbone and a data set, by its arguments."""
    given = {name: value for name, value in tree["model"]["init_args"].items() if name != "backbone"}
    parser = ArgumentParser(exit_on_error=False)
    left_out = {"backbone", *LINKED}
    parser.add_class_arguments(FewShotModule, "model", skip=left_out, instantiate=False, fail_untyped=False)
    return dict(vars(instantiated(parser, {"model": given}).model))


def settings_of_folds(tree: Tree) -> dict[str, Any]:
    """What a trainer of a fit to some of the shots takes of a command line's settings."""
    given: Mapping[str, Any] = tree["trainer"]
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(Trainer, "trainer", instantiate=False, fail_untyped=False)
    read = parser.parse_object({"trainer": fold_settings(given)}).trainer
    return {name: read[name] for name in fold_settings(given)}
