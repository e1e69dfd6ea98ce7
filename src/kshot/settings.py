"""The settings of each command, what a command line makes of them, and their help."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

from jsonargparse import ArgumentParser, set_parsing_settings
from lightning.pytorch.trainer import Trainer

import kshot.optim  # noqa: F401  its classes have short names once imported
from kshot.config import CommandLine, Tree
from kshot.data.datamodule import FewShotDataModule
from kshot.errors import UserError
from kshot.layering import UnknownOptionError, lay_all, nearest_option, options_below
from kshot.module import FewShotModule
from kshot.places import REQUIRED, Place, Places, named, place_of
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
NESTED = """
The options of a class follow its name: --model.adapter LoRA --model.adapter.rank 4, --model.optimizer.lr 1e-3,
--model.classifier CoOp --model.classifier.depth 9, --data.augment CropFlip --data.augment.flip 0. They are listed by
--model.adapter.help LoRA, --model.optimizer.help torch.optim.AdamW and so on."""


def settings(line: CommandLine) -> tuple[dict[str, Place], Tree]:
    """The places for a command's settings, and the settings of a command line laid over each other.

    Raises:
        UserError: an option that does not exist, a class that its place does not take.
    """
    places = {
        "seed_everything": place_of(bool | int),
        "model": Place(FewShotModule, REQUIRED, bases=(FewShotModule,), given=frozenset(LINKED)),
        "data": Place(FewShotDataModule, REQUIRED, bases=(FewShotDataModule,)),
        "trainer": Place(group=Trainer),
        "run": Place(group=RunOptions),
        **{name: place_of(kind) for name, (kind, _, _) in OPTIONS[line.command].items()},
    }
    others = PASSED_OVER.union(*OPTIONS.values()) - set(places)
    refuse_code()
    tree: Tree = {}
    for config, layer in line.layers:
        known = layer.keys() - others if config is not None else layer  # a config saved by another command has its own
        try:
            tree = lay_all(places, tree, {name: layer[name] for name in layer if name in known}, "", "A config")
        except UnknownOptionError as error:
            if config is None and "." not in error.path:
                raise UserError(no_option(error.path, dict(options_below(places, tree)))) from error
            raise UserError(f"{error}" if config is None else f"{config}: {error}") from error
    for name in ("model", "data"):
        tree.setdefault(name, lay_all(places, {}, {name: {}}, "", "A config")[name])
    return places, tree


def no_option(name: str, known: Places) -> str:
    """One line about an option that does not exist, with the one that is most likely meant."""
    return f"There is no option '--{name}'. Did you mean --{nearest_option(name, list(known))}?"


def refuse_code() -> None:
    """Lets jsonargparse, too, import nothing of Python's own for a config and build nothing where no type asks for it.

    :mod:`kshot.layering` has refused such settings before; releases without these settings have that alone.
    """
    with suppress(TypeError):
        set_parsing_settings(import_path_denylist=[])
    with suppress(TypeError):
        set_parsing_settings(instantiate_subclass_spec_in_any=False)


def add_options(parser: ArgumentParser, command: str) -> None:
    """Adds a command's own options to a parser."""
    for name, (kind, default, text) in OPTIONS[command].items():
        parser.add_argument(f"--{name}", type=kind, default=default, help=text)


def help_text(line: CommandLine) -> str:
    """All options of a command, or of one class with ``--model.adapter.help LoRA``."""
    parser = ArgumentParser(prog=f"python main.py {line.command}", add_help=False)
    if line.help_for is not None:
        key, name = line.help_for
        known = dict(options_below(*settings(line)))
        if key not in known or not known[key].bases:
            raise UserError(f"--{key} takes no class." if key in known else no_option(key, known))
        chosen = named(name, known[key].bases, key)
        parser.add_class_arguments(chosen, key, skip=set(known[key].given), fail_untyped=False)
        return str(parser.format_help())
    parser.add_argument("--config", "-c", help="A YAML file, or the name of one in configs/; may be repeated.")
    parser.add_argument("--print_config", action="store_true", help="Print all settings, and run nothing.")
    add_options(parser, line.command)
    parser.add_argument("--seed_everything", type=bool | int, default=1, help="Seed of everything but the data.")
    parser.add_class_arguments(FewShotModule, "model", skip=set(LINKED), sub_configs=True)
    parser.add_class_arguments(FewShotDataModule, "data")
    parser.add_class_arguments(RunOptions, "run")
    parser.add_class_arguments(Trainer, "trainer", fail_untyped=False)
    return f"{parser.format_help()}\n{NESTED}"
