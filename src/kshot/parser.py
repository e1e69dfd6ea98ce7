"""How a command line is read: configs by name, and one line for each mistake."""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import jsonargparse._typehints
from jsonargparse import ActionConfigFile, Namespace
from lightning.pytorch.cli import LightningArgumentParser
from lightning.pytorch.trainer import Trainer

from kshot.adapters import Adapter
from kshot.backbones import Backbone
from kshot.classifiers import Classifier
from kshot.data.datamodule import FewShotDataModule
from kshot.errors import nearest_first
from kshot.files import packaged_folder
from kshot.module import FewShotModule
from kshot.results import RunOptions

KINDS: dict[str, type] = {"backbone": Backbone, "adapter": Adapter, "classifier": Classifier}


def forget_other_classifier(parser_or_action: Any, before: Any, value: Any) -> None:
    """Starts a classifier that takes the place of another from its own defaults.

    jsonargparse lets a class that replaces another keep all settings that it has a name for. That suits optimizers and
    adapters (learning rate, rank), but a CoOp's ``depth`` or ``context_length`` must not become PromptSRC's.
    """
    if before and "init_args" in before and class_named(value["class_path"]) is not class_named(before["class_path"]):
        if issubclass(class_named(value["class_path"]) or object, Classifier):
            before["init_args"] = Namespace()
        else:
            KEEP_WHAT_FITS(parser_or_action, before, value)


def class_named(path: str) -> type | None:
    """The class of a full path, or of a short name that kshot defines; None for any other name."""
    if "." in path:
        module, _, name = path.rpartition(".")
        return getattr(sys.modules.get(module), name, None)
    return next((c for kind in KINDS.values() for c in subclasses(kind) if c.__name__ == path), None)


KEEP_WHAT_FITS = jsonargparse._typehints.discard_init_args_on_class_path_change
jsonargparse._typehints.discard_init_args_on_class_path_change = forget_other_classifier


class Parser(LightningArgumentParser):
    """Reports a mistake in one line."""

    def parse_args(self, args: Any = None, *rest: Any, **options: Any) -> Any:
        """Parses; ``null`` for an option of a nested class arrives here as "None" (jsonargparse 4.53) and is mended."""
        if args is not None:
            args = [re.sub(r"^(--[\w.]+)=None$", r"\1=null", a) if isinstance(a, str) else a for a in args]
        return super().parse_args(args, *rest, **options)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Prints what is wrong, where and what would be right, and exits with code 2."""
        del ex
        print(f"error: {explain(message)}", file=sys.stderr)
        raise SystemExit(2)


def explain(message: str) -> str:
    """Condenses jsonargparse's tree of reasons to the innermost one, with the nearest names that exist."""
    key = re.findall(r"NestedArg\(key='([\w.]+)'", message) or re.findall(r'Parser key "([\w.]+)"', message)
    where = key[-1] if key else "the configuration"
    unknown = re.findall(r"Problem with given class_path '([\w.]+)':\s*Option '([\w.]+)' is not accepted", message)
    if unknown:
        path, option = unknown[-1]
        module, _, name = path.rpartition(".")
        options = options_of(getattr(sys.modules.get(module), name, object))
        return f"{name} has no option {option!r}. {nearest_first(option, options)}"
    bad_class = re.findall(r"Expected a dot import path string: ([\w.:-]+)", message) or re.findall(
        r"Problem with given class_path '([\w.]+)'(?::\s*(?:No module|Import|module|Not a|\[?'?No))", message
    )
    if bad_class:
        kinds = [k for k in re.findall(r'Parser key "(\w+)"', message) if k in KINDS] or [
            w for w in KINDS if w in where
        ]
        if kinds:
            known = [c.__name__ for c in subclasses(KINDS[kinds[-1]])]
            return f"Unknown {kinds[-1]} {bad_class[-1]!r}. {nearest_first(bad_class[-1], known)}"
        return f"Unknown class {bad_class[-1]!r} for {where}."
    value = re.findall(r"(Expected a[^\n]*?Got value: [^\n]*)", message)
    if value:
        inner = re.findall(r'Parser key "([\w.]+)"', message)
        return f"{inner[-1] if inner else where}: {value[-1]}"
    option = re.findall(r"[Uu]nrecognized arguments?: (--[\w.]+)|Option '([\w.]+)' is not accepted", message)
    if option:
        name = next(filter(None, option[-1]))
        classes = [
            FewShotModule,
            FewShotDataModule,
            RunOptions,
            Trainer,
            *(c for k in KINDS.values() for c in subclasses(k)),
        ]
        every = {o for c in classes for o in options_of(c)} | {"ckpt_path", "images", "top_k", "out", "config"}
        return f"Unknown option {name!r}. {nearest_first(name.lstrip('-').rsplit('.', 1)[-1], every, shown=3)}"
    lines = [line.strip(" -") for line in message.splitlines() if line.strip(" -")]
    inner_lines = [
        line for line in lines if not line.startswith(("Given value", "Subtypes", "Errors", "Does not validate"))
    ]
    return re.sub(r'^Parser key "config": ', "", " ".join(inner_lines))[:600]


def subclasses(base: type) -> list[type]:
    """All concrete subclasses that kshot defines."""
    found: list[type] = []
    children: list[type] = base.__subclasses__()
    for child in children:
        if not inspect.isabstract(child) and child.__module__.startswith("kshot."):
            found.append(child)
        found += subclasses(child)
    return found


def options_of(target: Callable[..., Any]) -> list[str]:
    """Names of the arguments that a user can give to a class."""
    return [p for p in inspect.signature(target).parameters if p not in ("self", "backbone", "task")]


class ConfigByName(ActionConfigFile):
    """Reads ``--config NAME`` as a path first, then as ``configs/NAME`` and ``configs/NAME.yaml``."""

    def __call__(self, parser: Any, cfg: Any, values: Any, option_string: str | None = None) -> None:
        if isinstance(values, str) and "\n" not in values and ":" not in values and not Path(values).is_file():
            folder = packaged_folder("configs")
            candidates = [folder / values, folder / f"{values}.yaml"]
            found = next((c for c in candidates if c.is_file()), None)
            if found is None:
                known = [str(p.relative_to(folder)) for p in sorted(folder.rglob("*.yaml"))]
                parser.error(
                    f"There is no config {values!r}, neither here nor in configs/. {nearest_first(values, known)}"
                )
            values = str(found)
        super().__call__(parser, cfg, values, option_string)
