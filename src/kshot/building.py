"""Parts of a run from the settings of a command line, one at a time: each is made once, by whoever needs it."""

from __future__ import annotations

from typing import Any

from lightning.pytorch.trainer import Trainer

from kshot.backbones import Backbone
from kshot.config import Tree
from kshot.data import FewShotDataModule
from kshot.data.prediction import PredictionData
from kshot.folds import fold_settings
from kshot.making import made, made_all
from kshot.module import FewShotModule
from kshot.places import Place, arguments_of, named
from kshot.record import RunOptions
from kshot.settings import LINKED


def data_of(tree: Tree) -> FewShotDataModule:
    """The data set of a command line's settings."""
    data: FewShotDataModule = made(Place(bases=(FewShotDataModule,)), tree["data"])
    return data


def backbone_of(tree: Tree) -> Backbone:
    """The backbone of a command line's settings."""
    backbone: Backbone = made(Place(bases=(Backbone,)), tree["model"]["init_args"]["backbone"])
    return backbone


def reading_of(tree: Tree) -> Tree:
    """How a command line's settings of a data set say that images are read, beside its settings as they are."""
    given, places = tree["data"]["init_args"], arguments_of(PredictionData)[0]
    own = {name: place for name, place in places.items() if name not in ("class_names", "templates", "found_white")}
    return {**given, **{name: made(place, given.get(name, place.default)) for name, place in own.items()}}


def kind_of(tree: Tree) -> type[FewShotModule]:
    """The class of module that a command line's settings name."""
    return named(tree["model"]["class_path"], (FewShotModule,), "model")


def method_of(tree: Tree) -> dict[str, Any]:
    """What makes a :class:`~kshot.module.FewShotModule` of a backbone and a data set, by its arguments."""
    given = {name: value for name, value in tree["model"]["init_args"].items() if name != "backbone"}
    kind: Any = kind_of(tree)
    return made_all(arguments_of(kind, frozenset(LINKED))[0], given)


def trainer_settings(given: Tree) -> dict[str, Any]:
    """What a trainer takes of a command line's settings of one, or of some of them."""
    return made_all(arguments_of(Trainer)[0], given)


def settings_of_folds(tree: Tree) -> dict[str, Any]:
    """What a trainer of a fit to some of the shots takes of a command line's settings."""
    return trainer_settings(fold_settings(tree["trainer"]))


def options_of(tree: Tree) -> RunOptions:
    """Where a command line's settings keep runs."""
    return RunOptions(**made_all(arguments_of(RunOptions)[0], tree["run"]))


def drawn(data: Tree) -> Tree:
    """Settings of the data but for how many images a step takes."""
    return {name: value for name, value in data["init_args"].items() if name != "batch_size"}


def stated(spec: Tree) -> Tree:
    """A class with those of its settings that decide something."""
    given = {name: value for name, value in spec.get("init_args", {}).items() if value is not None}
    return {"class_path": spec["class_path"].rpartition(".")[2], **({"init_args": given} if given else {})}
