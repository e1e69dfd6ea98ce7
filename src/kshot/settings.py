"""The settings of each command, what a command line makes of them, and their help."""

from __future__ import annotations

import difflib
import inspect
import json
import re
import shlex
import textwrap
from collections.abc import Iterator
from dataclasses import replace
from enum import Enum
from typing import Any

from jsonargparse import ArgumentParser
from lightning.pytorch.trainer import Trainer
from torch.optim.lr_scheduler import LRScheduler

from kshot.available import PARTS_OF_TRAINER, check, class_name
from kshot.choice import SearchOptions
from kshot.config import CommandLine, Tree
from kshot.data.datamodule import FewShotDataModule
from kshot.errors import UserError, nearest_first
from kshot.layering import UnknownOptionError, lay, lay_all, listed, options_below
from kshot.module import FewShotModule
from kshot.optim import WHOLE_RUN, AdamW
from kshot.places import REQUIRED, Place, Places, arguments_of, named, place_of, public_path, subclasses
from kshot.record import RunOptions

LINKED = ("class_names", "templates")  # of the model, which the data set knows
CHECKPOINT = (str | None, None, "A run's tuned.safetensors or checkpoints/last.ckpt.")
OPTIONS: dict[str, dict[str, tuple[Any, Any, str]]] = {  # of each command alone, with type, default and help
    "fit": {
        "ckpt_path": (str | None, None, "A run's checkpoints/last.ckpt to go on from."),
        "budget": (str | None, None, "Choose the method on the shots alone within this time: 30s, 5m, 1h."),
        "candidates": (list[str] | None, None, "What to choose from, as words of a command line; by default, many."),
        "search": (SearchOptions | None, None, "Choose settings on the shots alone, by ranges of options."),
    },
    "validate": {"ckpt_path": CHECKPOINT},
    "test": {"ckpt_path": CHECKPOINT},
    "import": {
        "file": (
            str | None,
            None,
            "A released file, such as CoOp's model.pth.tar-200 or lora_weights.pt, or a folder of PEFT.",
        ),
        "out": (str | None, None, "Where to write; by default beside the file, as FILE.safetensors."),
    },
}
PREDICTS = {"images", "top_k", "abstain_error", "abstain_by"}  # of a command that takes no experiment any more
PASSED_OVER = PREDICTS | {"weights_only", "verbose", "return_predictions"}  # in configs saved by earlier versions
SHOWN = {  # of other libraries' classes, what the short help lists
    "trainer": ("max_epochs", "accelerator", "devices", "precision", "max_time"),
    "model.optimizer": ("lr", "weight_decay", "momentum"),
}
GENERAL = {
    "config": "a YAML file, or one in configs/; later ones are laid over earlier ones",
    "print_config": "print all settings, and run nothing",
    "help-all": "list all options, Lightning's among them",
    "seed_everything": "seed of everything but the data",
}
INDENT = " " * 8
NESTED = """
The options of a class follow its name: --model.adapter LoRA --model.adapter.rank 4,
--model.classifier CoOp --model.classifier.depth 9, --data.augment CropFlip --data.augment.flip 0.
--model.adapter.help LoRA, --model.optimizer.help torch.optim.AdamW and so on list them."""
MEANT = {  # an option, and what else people call it: other libraries' names, and those that papers use
    "seed_everything": "seed random_seed manual_seed",
    "config": "method recipe cfg config_file yaml experiment",
    "ckpt_path": "resume resume_from resume_from_checkpoint ckpt checkpoint load load_from",
    "model.backbone.model": "backbone arch architecture model_name encoder pretrained_model clip_model",
    "model.backbone.image_size": "img_size image_size resolution input_size crop_size size",
    "model.adapter.rank": "r lora_r lora_rank rank",
    "model.adapter.alpha": "lora_alpha alpha",
    "model.adapter.dropout": "lora_dropout dropout dropout_rate",
    "model.adapter": "peft adapter_type lora",
    "model.targets": "target_modules lora_targets target",
    "model.classifier": "head trainer_name",
    "model.classifier.context_length": "n_ctx nctx ctx_len num_tokens",
    "model.classifier.init_words": "ctx_init init_text",
    "model.optimizer": "optim opt optimiser",
    "model.optimizer.lr": "lr learning_rate base_lr init_lr max_lr",
    "model.optimizer.weight_decay": "weight_decay wd decay l2",
    "model.optimizer.momentum": "momentum",
    "model.schedule": "scheduler lr_scheduler sched lr_schedule",
    "model.schedule.warmup_steps": "warmup warmup_steps num_warmup_steps warmup_iters",
    "model.schedule.warmup_epochs": "warmup_epochs warmup_epoch",
    "data.dataset": "data_set dataset_name data_name",
    "data.root": "data_root data_dir data_path dataset_root datasets root",
    "data.shots": "shot num_shots n_shots n_shot k_shot k num_shot few_shot images_per_class",
    "data.batch_size": "batch bs train_batch_size per_device_train_batch_size batchsize",
    "data.eval_batch_size": "test_batch_size val_batch_size eval_bs",
    "data.num_workers": "workers n_workers loader_workers jobs",
    "data.augment": "augmentation aug transform transforms augmentations",
    "data.template": "templates prompt prompts prompt_template",
    "data.test_share": "data.test test_split test_size holdout test_fraction",
    "data.class_names": "classes classnames labels",
    "trainer.max_epochs": "epochs epoch num_epochs n_epochs num_train_epochs max_epoch",
    "trainer.max_steps": "steps iterations iters num_steps max_iters n_iters max_iterations",
    "trainer.devices or --trainer.accelerator": "device gpus gpu num_gpus n_gpus n_gpu ngpu gpu_id cuda use_cuda cpu",
    "trainer.precision": "amp fp16 bf16 fp32 half dtype mixed_precision autocast",
    "trainer.gradient_clip_val": "clip grad_clip clip_grad max_grad_norm clip_grad_norm gradient_clip",
    "trainer.accumulate_grad_batches": "accumulate accum grad_accum accumulation_steps gradient_accumulation_steps",
    "trainer.check_val_every_n_epoch": "eval_every val_every eval_interval eval_freq validate_every",
    "trainer.max_time": "time time_limit timeout",
    "trainer.logger": "log wandb tensorboard log_to report_to",
    "trainer.fast_dev_run": "debug dry_run smoke_test",
    "run.root": "output dir out_dir output_dir outdir save_dir log_dir logdir results_dir work_dir workdir save_path",
    "run.name": "exp_name experiment_name exp run_name tag",
}


def settings(line: CommandLine) -> tuple[Places, Tree]:
    """The places for a command's settings, and the settings of a command line, with which it may be built.

    Raises:
        UserError: an option that does not exist, a class or a value that its place does not take, one that is missing,
            and what this machine does not have.
    """
    places, tree = laid(line)
    missing = needed(places, tree, line)
    if missing is not None:
        raise UserError(missing)
    if "print_config" not in line.flags:
        check(tree["model"]["init_args"], tree["trainer"])
    return places, tree


def laid(line: CommandLine) -> tuple[Places, Tree]:
    """The places for a command's settings, and the settings of a command line laid over each other.

    An adapter over a config without one trains with that config's optimizer, made for prompts or a head. It stays so,
    and ``line.notes`` tells it unless an optimizer was chosen later, or its rate is the adapter's own.
    """
    places = {
        "seed_everything": place_of(bool | int, 1),
        "model": Place(FewShotModule, bases=(FewShotModule,), given=frozenset(LINKED)),
        "data": Place(FewShotDataModule, bases=(FewShotDataModule,)),
        "trainer": Place(Trainer, group=Trainer),
        "run": place_of(RunOptions),
        **{name: place_of(kind, default) for name, (kind, default, _) in OPTIONS[line.command].items()},
    }
    others = PASSED_OVER.union(*OPTIONS.values()) - set(places)
    tree: Tree = {"trainer": {}, "run": {}} | {name: lay(places[name], None, {}, name) for name in ("model", "data")}
    rates = ""  # the config whose optimizer it is, where that was chosen for a method without an adapter
    for config, layer in line.layers:
        own = {name: value for name, value in layer.items() if config is None or name not in others}
        before = tree["model"]["init_args"].get("optimizer")
        try:
            tree = lay_all(places, tree, own, "", line.command)
        except UserError as error:
            said = no_option(error, places, tree) if isinstance(error, UnknownOptionError) else str(error)
            raise UserError(said if config is None else f"{config}: {said}") from error
        model = tree["model"]["init_args"]
        if model.get("optimizer") != before:
            rates = config if config and not isinstance(model.get("adapter"), dict) else ""
    model = tree["model"]["init_args"]
    optimizer = model.get("optimizer") or {}
    left_open = optimizer.get("class_path") == public_path(AdamW) and optimizer["init_args"].get("lr") is None
    if rates and isinstance(model.get("adapter"), dict) and not left_open:
        line.notes.append(
            f"{class_name(model['adapter'])} trains with the optimizer of {rates}, which has no adapter: "
            f"{class_name(optimizer)}, lr {optimizer['init_args'].get('lr')}. Another: --model.optimizer.lr."
        )
    schedule = model.get("schedule")
    if (
        isinstance(schedule, dict)
        and "T_max" in arguments_of(named(schedule["class_path"], (LRScheduler,), "model.schedule"))[0]
    ):
        schedule["init_args"].setdefault("T_max", WHOLE_RUN)
    for name, kind in PARTS_OF_TRAINER.items():
        for spec in listed(tree["trainer"].get(name)):
            if isinstance(spec, dict):
                state_words(spec, kind)
    return places, tree


def state_words(spec: Tree, kind: type) -> None:
    """States the words that a class has as members of an Enum by default, which no config holds: Timer's interval."""
    for name, place in arguments_of(named(spec["class_path"], (kind,), ""))[0].items():
        if place.text and isinstance(place.default, Enum):
            spec["init_args"].setdefault(name, place.default.value)


def plain(name: str) -> str:
    """A name as it is compared with others: ``batch_size`` for ``Batch-Size``."""
    return name.lower().replace("-", "_").replace("init_args.", "")


def no_option(error: UnknownOptionError, places: Places, tree: Tree) -> str:
    """What to say of an option that does not exist: the one that it is like on its own level, or that is meant."""
    level, _, last = error.name.rpartition(".")
    command = next((command for command, own in {**OPTIONS, "predict": PREDICTS}.items() if error.name in own), None)
    if command is not None:
        return f"There is no option '--{error.name}' of {error.owner}: it is one of {command}."
    refused = f"{error.owner} has no option {last!r}." if level else f"There is no option '--{last}'."
    options = {option: place for option, place, _ in options_below(places, tree)}
    place, same = options.get(level, Place()), last.replace("-", "_")
    owners = [name for name, kind in subclasses(place.bases).items() if same in arguments_of(kind, place.given)[0]]
    beside = {plain(name): f"{level}.{name}".lstrip(".") for name in error.known}
    called = {option.rpartition(".")[2]: option for option in reversed(options)}
    called |= {word: option for option, words in MEANT.items() for word in words.split()}
    word, like = plain(last), beside if level else called | beside
    near = difflib.get_close_matches(word, like, n=1)
    likely = (
        beside.get(word)
        or called.get(plain(error.name))
        or (None if owners else called.get(word) or (like[near[0]] if near else None))
    )
    if owners and not likely:
        return f"{refused} It is one of {', '.join(owners[:4])}: choose by --{level}."
    if not likely:
        return f"{refused} {nearest_first(last, error.known)}"
    if level and likely in beside.values():
        return f"{refused} Did you mean {likely.rpartition('.')[2]!r}? In full: --{likely}."
    return f"{refused} Did you mean --{likely}?"


def needed(places: Places, tree: Tree, line: CommandLine) -> str | None:
    """What to say of the first option that lacks a value; None where all have what they need."""
    lacking = next((name for name, _, value in options_below(places, tree) if value is REQUIRED), None)
    if lacking in ("model.backbone", "data.dataset"):
        given = line.configs
        words = [word for config in (given or ["methods/lora.yaml"]) for word in ("--config", config)]
        why = (
            f"{given[-1]} is part of an experiment, to be laid over a whole one"
            if given
            else "start from an experiment"
        )
        return f"{lacking} is missing: {why}, such as --config clip_16shot.yaml {shlex.join(words)}."
    return lacking and f"{lacking} is missing, and has no default: give --{lacking} a value."


def add_options(parser: ArgumentParser, command: str) -> None:
    """Adds a command's own options, and those of its run, to a parser."""
    for name, (kind, default, text) in OPTIONS[command].items():
        parser.add_argument(f"--{name}", type=kind, default=default, help=text)
    parser.add_class_arguments(RunOptions, "run")


def help_text(line: CommandLine) -> str:
    """Kshot's own options on two screens, all with ``--help-all``, or a class's with ``--model.adapter.help LoRA``."""
    parser = ArgumentParser(prog=f"python main.py {line.command}", add_help=False)
    if line.help_for is not None:
        (key, name), (places, tree) = line.help_for, laid(line)
        place = next((place for option, place, _ in options_below(places, tree) if option == key), None)
        if place is None:
            beside = [option for option, _, _ in options_below(places, tree) if option.count(".") == key.count(".")]
            raise UserError(f"There is no option --{key}. {nearest_first(key, beside)}")
        if not place.bases:
            raise UserError(f"--{key} takes no class.")
        parser.add_class_arguments(named(name, place.bases, key), key, skip=set(place.given), fail_untyped=False)
        return str(parser.format_help())
    if "help-all" not in line.flags:
        return "\n".join(own_options(line))
    parser.add_argument("--config", "-c", help=GENERAL["config"])
    parser.add_argument("--print_config", action="store_true", help=GENERAL["print_config"])
    parser.add_argument("--seed_everything", type=bool | int, default=1, help=GENERAL["seed_everything"])
    add_options(parser, line.command)
    parser.add_class_arguments(FewShotModule, "model", skip=set(LINKED), sub_configs=True)
    parser.add_class_arguments(FewShotDataModule, "data")
    parser.add_class_arguments(Trainer, "trainer", fail_untyped=False)
    return f"{parser.format_help()}\n{NESTED}"


def own_options(line: CommandLine) -> Iterator[str]:
    """The options of kshot and the most used of other libraries, by class, with the values that they have so far."""
    start: Tree = {"model": {"classifier": {}, "adapter": "LoRA", "optimizer": {}}}
    places, tree = laid(replace(line, layers=[(None, start), *line.layers]))
    texts = {name: text for name, (_, _, text) in OPTIONS[line.command].items()} | GENERAL
    groups: dict[str, list[str]] = {
        "": [row(name, "", GENERAL[name]) for name in ("config", "print_config", "help-all")],
        **{name: [] for name in ("run", "data", "model")},
    }
    for name, place, value in options_below(places, tree):
        level, _, last = name.rpartition(".")
        kind = named(value["class_path"], place.bases, name) if place.bases and isinstance(value, dict) else place.group
        texts |= {f"{name}.{each}": text for each, text in described(kind).items()}
        if last in SHOWN.get(level, [last]) and name not in ("model", "data", "trainer", "run"):
            default = json.dumps(kind or value, default=lambda each: getattr(each, "__name__", "needed")).strip('"')
            groups.setdefault(level, []).append(row(name, default, texts.get(name, "")))
            kinds = sorted(n for n, each in subclasses(place.bases).items() if each.__module__.startswith("kshot."))
            groups[level] += textwrap.wrap(", ".join(kinds), 92, initial_indent=INDENT, subsequent_indent=INDENT)
    yield f"usage: python main.py {line.command} --config NAME [--config METHOD ...] [options]"
    for level, rows in groups.items():
        yield from ["", *([f"{level}:"] if level else []), *rows]
    yield NESTED


def row(name: str, default: str, text: str) -> str:
    """A line of help, at most 100 columns wide."""
    start = f"  --{name:<29} {default:<12} "
    return (start + textwrap.shorten(re.sub(r":\w+:|`", "", text), 100 - len(start), placeholder=" ...")).rstrip()


def described(kind: type | None) -> dict[str, str]:
    """What a class says of its arguments, from the docstrings in Google's style of the class and its __init__."""
    texts = [inspect.getdoc(each) or "" for each in (kind, getattr(kind, "__init__", None)) if kind and each]
    arguments = "\n".join(text.partition("\nAttributes:")[0] for text in texts)
    found = re.findall(r"^ {4}(\w+)(?: ?\([^)\n]*\))?: *(\S.*(?:\n {5,}.*)*)", arguments, re.MULTILINE)
    return dict(found)
