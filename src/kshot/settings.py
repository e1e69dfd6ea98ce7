"""The settings of each command, what a command line makes of them, and their help."""

from __future__ import annotations

import difflib
from contextlib import suppress
from typing import Any

from jsonargparse import ArgumentParser, set_parsing_settings
from lightning.pytorch.trainer import Trainer

import kshot.optim  # noqa: F401  its classes have short names once imported
from kshot.config import CommandLine, Tree
from kshot.data.datamodule import FewShotDataModule
from kshot.errors import UserError
from kshot.layering import lay, lay_all, options_below
from kshot.module import FewShotModule
from kshot.places import Place, Places, named, place_of
from kshot.record import RunOptions

LINKED = ("class_names", "templates")  # of the model, which the data set knows
CHECKPOINT = (str | None, None, "A run's tuned.safetensors or checkpoints/last.ckpt.")
OPTIONS: dict[str, dict[str, tuple[Any, Any, str]]] = {  # of each command alone, with type, default and help
    "fit": {"ckpt_path": (str | None, None, "A run's checkpoints/last.ckpt to go on from.")},
    "validate": {"ckpt_path": CHECKPOINT},
    "test": {"ckpt_path": CHECKPOINT},
    "predict": {
        "ckpt_path": CHECKPOINT,
        "images": (list[str] | str | None, None, "A folder, an image, or a list of them."),
        "top_k": (int, 5, "Labels a row, best first."),
        "out": (str | None, None, "CSV file; by default in the run directory."),
    },
    "import": {
        "file": (str | None, None, "What CoOp or CLIP-LoRA released, such as model.pth.tar-200 or lora_weights.pt."),
        "out": (str | None, None, "Where to write; by default beside the file, as FILE.safetensors."),
    },
}
PASSED_OVER = {"weights_only", "verbose", "return_predictions"}  # in configs saved by earlier versions
SAFE: Tree = {"import_path_denylist": [], "instantiate_subclass_spec_in_any": False}  # jsonargparse, too, runs no code
NESTED = """
The options of a class follow its name: --model.adapter LoRA --model.adapter.rank 4, --model.optimizer.lr 1e-3,
--model.classifier CoOp --model.classifier.depth 9, --data.augment CropFlip --data.augment.flip 0. They are listed by
--model.adapter.help LoRA, --model.optimizer.help torch.optim.AdamW and so on."""


def settings(line: CommandLine) -> tuple[Places, Tree]:
    """The places for a command's settings, and the settings of a command line laid over each other.

    Raises:
        UserError: an option that does not exist, a class or a value that its place does not take.
    """
    for setting, value in SAFE.items():
        with suppress(TypeError):  # a release without it has kshot.layering alone, which refuses before
            set_parsing_settings(**{setting: value})
    places = {
        "seed_everything": place_of(bool | int),
        "model": Place(FewShotModule, bases=(FewShotModule,), given=frozenset(LINKED)),
        "data": Place(FewShotDataModule, bases=(FewShotDataModule,)),
        "trainer": Place(Trainer, group=Trainer),
        "run": place_of(RunOptions),
        **{name: place_of(kind) for name, (kind, _, _) in OPTIONS[line.command].items()},
    }
    others = PASSED_OVER.union(*OPTIONS.values()) - set(places)
    tree: Tree = {"trainer": {}, "run": {}} | {name: lay(places[name], None, {}, name) for name in ("model", "data")}
    for config, layer in line.layers:
        if config is None:
            option = next(iter(layer)).removesuffix("+")
            if option not in places:
                raise no_option(option, places, tree)
            tree = lay_all(places, tree, layer, "", line.command)
            continue
        try:
            own = {name: value for name, value in layer.items() if name not in others}
            tree = lay_all(places, tree, own, "", line.command)
        except UserError as error:
            raise UserError(f"{config}: {error}") from error
    return places, tree


def no_option(name: str, places: Places, tree: Tree) -> UserError:
    """What to raise for an option that does not exist, with the one most likely meant."""
    wanted = name.rpartition(".")[2]

    def distance(option: str) -> tuple[bool, bool, float]:
        last = option.rpartition(".")[2]
        return last != wanted, not last.endswith(f"_{wanted}"), -difflib.SequenceMatcher(None, wanted, last).ratio()

    nearest = min((option for option, _, _ in options_below(places, tree)), key=distance)
    return UserError(f"There is no option '--{name}'. Did you mean --{nearest}?")


def needed(places: Places, tree: Tree) -> str | None:
    """What to say of the first option that lacks a value; None where all have what they need."""
    lacking = (name for name, _, lacks in options_below(places, tree) if lacks)
    advice = "start from an experiment, such as --config clip_16shot.yaml, and lay a method over it, such as"
    return next((f"{name} is missing: {advice} --config methods/lora.yaml." for name in lacking), None)


def add_options(parser: ArgumentParser, command: str) -> None:
    """Adds a command's own options, and those of its run, to a parser."""
    for name, (kind, default, text) in OPTIONS[command].items():
        parser.add_argument(f"--{name}", type=kind, default=default, help=text)
    parser.add_class_arguments(RunOptions, "run")


def help_text(line: CommandLine) -> str:
    """All options of a command, or of one class with ``--model.adapter.help LoRA``."""
    parser = ArgumentParser(prog=f"python main.py {line.command}", add_help=False)
    if line.help_for is not None:
        (key, name), (places, tree) = line.help_for, settings(line)
        place = next((place for option, place, _ in options_below(places, tree) if option == key), None)
        if place is None:
            raise no_option(key, places, tree)
        if not place.bases:
            raise UserError(f"--{key} takes no class.")
        parser.add_class_arguments(named(name, place.bases, key), key, skip=set(place.given), fail_untyped=False)
        return str(parser.format_help())
    parser.add_argument("--config", "-c", help="A YAML file, or the name of one in configs/; may be repeated.")
    parser.add_argument("--print_config", action="store_true", help="Print all settings, and run nothing.")
    parser.add_argument("--seed_everything", type=bool | int, default=1, help="Seed of everything but the data.")
    add_options(parser, line.command)
    parser.add_class_arguments(FewShotModule, "model", skip=set(LINKED), sub_configs=True)
    parser.add_class_arguments(FewShotDataModule, "data")
    parser.add_class_arguments(Trainer, "trainer", fail_untyped=False)
    return f"{parser.format_help()}\n{NESTED}"
