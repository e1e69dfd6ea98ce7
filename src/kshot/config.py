"""How settings are read: the words of a command line and YAML files, as plain dictionaries. Loads no torch."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]

from kshot.errors import UserError, first_line, nearest_first
from kshot.files import packaged_folder

MOST_BYTES = 1_000_000  # of a config file
MOST_VALUES = 50_000  # of a config once its aliases are written out
FLAGS = ("help", "help-all", "print_config")  # options without a value
SHORT = {"-c": "--config", "-h": "--help"}
PROGRAMS = {  # commands that take no experiment, by the function that runs their words and gives the exit status
    "data": "kshot.data_command:run_data",
    "doctor": "kshot.doctor:run_doctor",
    "predict": "kshot.predicting:run_predict",
    "runs": "kshot.seeing.runs:run_runs",
    "compare": "kshot.seeing.compare:run_compare",
    "results": "kshot.studies.results:run_results",
    "report": "kshot.studies.report:run_report",
    "show": "kshot.seeing.show:run_show",
    "push": "kshot.seeing.hub:run_push",
    "export": "kshot.export.command:run_export",
    "sweep": "kshot.studies.sweep:run_sweep",
    "worker": "kshot.studies.worker:run_worker",
}
Tree = dict[str, Any]


@dataclass
class CommandLine:
    """A command line, taken apart."""

    command: str
    layers: list[tuple[str | None, Tree]] = field(default_factory=list)  # with the name of a config; None for an option
    words: list[tuple[str, str]] = field(default_factory=list)  # options and their values as given
    flags: set[str] = field(default_factory=set)
    help_for: tuple[str, str] | None = None  # of --model.adapter.help LoRA
    notes: list[str] = field(default_factory=list)  # what may not be meant; settings finds it, the command prints it

    @property
    def configs(self) -> list[str]:
        """The names of configs as given."""
        return [value for key, value in self.words if key == "config"]

    @property
    def name(self) -> str:
        """What a run of it is called: the names of its configs."""
        return "+".join(Path(config).stem for config in self.configs) or self.command

    def without(self, *keys: str) -> list[str]:
        """The words after the command but for some options."""
        return [word for key, value in self.words if key not in keys for word in (f"--{key}", value)]


def read_command_line(words: Sequence[str], commands: Sequence[str]) -> CommandLine:
    """Takes the words after ``python main.py`` apart, and reads the configs among them.

    Raises:
        UserError: no such command or config, a word that is no option, an option without its value.
    """
    if not words or words[0] not in commands:
        given = words[0] if words else ""
        raise UserError(f"There is no command {given!r}. {nearest_first(given, [*commands, *PROGRAMS], shown=20)}")
    line, rest = CommandLine(words[0]), iter(words[1:])
    for word in rest:
        name, equals, value = word.partition("=")
        key = SHORT.get(name, name).removeprefix("--")
        if key == name or not all(key.split(".")):
            raise UserError(f"{word!r} is no option: options start with --, as in --data.shots 4.")
        if key in FLAGS and equals:
            raise UserError(f"--{key} takes no value, and is given {value!r:.200}.")
        if key in FLAGS:
            line.flags |= {key, "help"} if key == "help-all" else {key}
            continue
        if not equals:
            value = next(rest, "--")
            if value.startswith("--"):
                raise UserError(f"--{key} needs a value after it.")
        line.words.append((key, value))
        if key == "config":
            config = read_config(find_config(value))
            if "grid" in config:
                raise UserError(f"--config {value} is a study of many runs: python main.py sweep --config {value}.")
            line.layers.append((value, config))
        elif key.endswith(".help"):
            line.help_for = key.removesuffix(".help"), value
        else:
            layer: Any = value
            for part in reversed(key.split(".")):
                layer = {part: layer}
            line.layers.append((None, layer))
    return line


def words_of(options: Mapping[str, Any] | None, more: Mapping[str, Any]) -> list[str]:
    """Options as words of a command line, from those by name and those with two underscores for a dot.

    Examples:
        >>> words_of({"model.adapter.rank": 4}, {"data__class_names": ["cat", "dog"], "shots": None})
        ['--model.adapter.rank=4', '--data.class_names=["cat", "dog"]', '--data.shots=null']
    """
    short = {"data": "data.dataset", "shots": "data.shots"}
    given = [*(options or {}).items(), *((name.replace("__", "."), value) for name, value in more.items())]
    return [f"--{short.get(name, name)}={word_of(value)}" for name, value in given]


def word_of(value: Any) -> str:
    """A value as a command line has it: words as they are, others as JSON, which is YAML."""
    return os.fspath(value) if isinstance(value, (str, os.PathLike)) else json.dumps(value, default=os.fspath)


def find_config(name: str) -> Path:
    """A config by its path, or else ``configs/NAME`` or ``configs/NAME.yaml``; raises UserError if there is none."""
    folder = packaged_folder("configs")
    for candidate in (Path(name), folder / name, folder / f"{name}.yaml"):
        if os.path.isfile(candidate):  # noqa: PTH113  of any length
            return candidate
    known = [p.relative_to(folder).as_posix() for p in folder.rglob("*.yaml")]
    raise UserError(f"There is no config {name!r:.200}, neither here nor in configs/. {nearest_first(name, known)}")


def read_config(file: Path) -> Tree:
    """The settings in a YAML file; raises UserError if it is none of plain values, or holds nothing or too much."""
    try:
        content = file.read_bytes()
        if len(content) > MOST_BYTES:
            raise UserError(f"The config {file} has {len(content):,} bytes, and may have {MOST_BYTES:,}.")
        tree = load_yaml(content.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        found = "is in UTF-16" if b"\0" in content[:4] else f"cannot be read as UTF-8 ({first_line(error)})"
        raise UserError(f"The config {file} {found}: save it as UTF-8.") from error
    except OSError as error:
        raise UserError(f"The config {file} cannot be read: {first_line(error)}.") from error
    except yaml.YAMLError as error:
        raise UserError(f"The config {file} is no valid YAML: {' '.join(str(error).split())[:300]}.") from error
    if not isinstance(tree, dict):
        what = "holds no settings" if tree is None else "is no mapping of settings"
        raise UserError(f"The config {file} {what}: it must start with keys such as model: or data:.")
    return tree


def load_yaml(text: str) -> Any:
    """Plain values from YAML; raises YAMLError at tags, merge keys, a key twice, and aliases of too much."""
    try:
        value = yaml.load(text, Loader=Loader)
    except RecursionError as error:
        raise yaml.YAMLError("it is nested too deeply") from error
    if sum(1 for _ in zip(walk(value), range(MOST_VALUES), strict=False)) == MOST_VALUES:
        raise yaml.YAMLError(f"it holds more than {MOST_VALUES:,} values")
    return value


def walk(value: Any) -> Iterator[Any]:
    """A value and everything inside it; without an end where an alias holds itself."""
    waiting = [value]
    while waiting:
        value = waiting.pop()
        yield value
        if isinstance(value, dict):
            waiting += value.values()
        elif isinstance(value, (list, tuple)):
            waiting += value


def read_word(text: Any) -> Any:
    """What a word stands for as YAML: itself where it is none, no YAML or only names, as in ``{}`` and ``{a, b}``."""
    return text if not isinstance(text, str) or stays_word(text) else _as_yaml(text)


@lru_cache(maxsize=4096)
def stays_word(text: str) -> bool:
    """Whether a word stands for itself, as most do; a config asks for the same ones again and again."""
    return bool(_as_yaml(text) == text)


def _as_yaml(text: str) -> Any:
    try:
        value = load_yaml(text)
    except yaml.YAMLError:
        return text
    return text if isinstance(value, dict) and all(v is None for v in value.values()) else value


class Loader(yaml.SafeLoader):  # type: ignore[misc]
    """YAML of plain values; dates stay words, and ``2e-3`` is read later as its option's type."""

    yaml_implicit_resolvers = {  # noqa: RUF012  PyYAML's own attribute
        first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:timestamp"]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> Tree:
        """A mapping whose keys are words, each once; a merge key, whose aliases multiply while it is read, is none."""
        seen: set[str] = set()
        for key, _ in node.value:
            if key.tag != "tag:yaml.org,2002:str" or key.value in seen:
                reason = f"the key {key.value!r} " + ("stands twice" if key.value in seen else "is no word")
                raise yaml.constructor.ConstructorError(None, None, reason, key.start_mark)
            seen.add(key.value)
        return dict(super().construct_mapping(node, deep))
