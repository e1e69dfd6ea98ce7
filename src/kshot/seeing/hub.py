"""Runs on Hugging Face's hub: ``python main.py push``, and ``hf://ORG/NAME`` where a run directory may stand.

Both go through huggingface_hub. What is fetched are tensors, text and settings; nothing of it is run.
"""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]

from kshot.backbones.hub import quiet_loading
from kshot.config import read_config, walk
from kshot.errors import UserError, first_line
from kshot.files import amount
from kshot.predictions import FILE, read
from kshot.seeing.card import card
from kshot.seeing.runs import RESULT, result_of
from kshot.showing import Parser

PREFIX, CONFIG, WEIGHTS = "hf://", "config.yaml", "tuned.safetensors"
ADDRESS = re.compile(r"hf:/{1,2}([\w.-]+/[\w.-]+)(?:@([\w./-]+))?")  # a Path makes one slash of two
NAME = re.compile(r"[\w.-]+/[\w.-]+")
KINDS = {"kshot", "torch", "lightning"}  # packages whose classes a config from the hub may name
WHOLE = re.compile(r"(?:~|[A-Za-z]:)?[/\\][^/\\\s][^:]*$")  # text that is an absolute path and nothing else
FOLDERS = r"(?:~|[A-Za-z]:)?[/\\](?:[^\s/\\]+[/\\])*(?=[^\s/\\])"
WITHIN = re.compile(rf"(?<![\w/:.~]){FOLDERS}")  # what comes before the last part of one in a sentence
DOTTED = re.compile(r"([A-Za-z_]\w*)(?:\.[A-Za-z_]\w*)+")


def located(path: Path | str) -> Path:
    """The directory of a run: a path as it is, and ``hf://ORG/NAME``, or ``hf://ORG/NAME@REVISION``, once fetched.

    Raises:
        UserError: the address is none, the hub does not answer or has no such run, or its config names classes of other
            packages.
    """
    if not str(path).startswith("hf:/"):
        return Path(path)
    found = ADDRESS.fullmatch(str(path))
    if found is None:
        raise UserError(f"{path} is no address of a run: hf://ORG/NAME, or hf://ORG/NAME@REVISION.")
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    try:
        with quiet_loading(hub=True):
            allowed: list[str] = [WEIGHTS, CONFIG, RESULT, FILE]
            where: Any = {"revision": found[2], "endpoint": constants.ENDPOINT, "cache_dir": constants.HF_HUB_CACHE}
            folder = Path(snapshot_download(found[1], allow_patterns=allowed, **where))
    except (HfHubHTTPError, OSError, ValueError) as error:  # of a name, of the network, of what is in the cache alone
        raise UserError(f"{path} could not be fetched, and is not in the cache ({first_line(error)}).") from error
    if not (folder / WEIGHTS).is_file() or not (folder / CONFIG).is_file():
        raise UserError(f"{path} is no run of kshot: it has no {WEIGHTS} or no {CONFIG}.")
    check_kinds(read_config(folder / CONFIG), str(path))
    return folder


def check_kinds(config: Any, where: str) -> None:
    """Raises UserError for a config that names what lies in another package, which reading it would import."""
    for value in walk(config):
        found = DOTTED.fullmatch(value) if isinstance(value, str) else None
        if found and found[1] not in KINDS and (found[1][0] == "_" or importlib.util.find_spec(found[1]) is not None):
            raise UserError(f"The config of {where} names {value}, which is not kshot's: runs on the hub are kshot's.")


def run_push(words: Sequence[str]) -> int:
    """Puts a run on the hub, in a new repository with a model card; returns 0.

    Raises:
        UserError: words that there are not, what is no finished run, a repository that is there, or a hub that refuses.
    """
    parser = Parser(prog="main.py push", description="Put a run on Hugging Face's hub, in a new repository.")
    parser.add_argument("run", type=Path, help="a run directory")
    parser.add_argument("name", help="ORG/NAME of the new repository")
    parser.add_argument("--private", action="store_true", help="seen by you alone")
    parser.add_argument("--license", default="", help="of what was trained, as apache-2.0")
    parser.add_argument("--data-license", default="", help="of the images, for the card")
    parser.add_argument("--predictions", action="store_true", help="also what it answered, with the images' names")
    given = parser.parse_args(list(words))
    if NAME.fullmatch(given.name) is None:
        raise UserError(f"{given.name!r} is no name of a repository: ORG/NAME.")
    files = files_of(given.run, given.license, given.data_license, given.predictions, given.name)
    send(files, given.name, given.private)
    print(f"{len(files)} files, {amount(sum(map(len, files.values())))}: {', '.join(files)}")
    print(f'kshot.load("{PREFIX}{given.name}")')
    return 0


def files_of(run: Path, licence: str, data_licence: str, predictions: bool, name: str) -> dict[str, bytes]:
    """What of a run goes to the hub, by name: no image, no list of images, and no path of this machine.

    Raises:
        UserError: it is no finished run, or its config names classes of other packages.
    """
    result = result_of(run)
    for file in (WEIGHTS, CONFIG):
        if not (run / file).is_file():
            raise UserError(f"{run} is no finished run: it has no {file}.")
    config = read_config(run / CONFIG)
    check_kinds(config, str(run))
    paths = [value for value in walk(config) if isinstance(value, str) and WHOLE.match(value)]
    if paths:
        print(f"Of paths, {CONFIG} tells the last part alone: {', '.join(dict.fromkeys(paths))}", file=sys.stderr)
    answered = read(run) if (run / FILE).is_file() else None
    told = card(result, answered, licence, data_licence).replace("ORG/NAME", name)
    files = {
        "README.md": told.encode(),
        CONFIG: yaml.safe_dump(without_paths(config), sort_keys=False, allow_unicode=True).encode(),
        RESULT: (json.dumps(without_paths(result), indent=2, ensure_ascii=False) + "\n").encode(),
        WEIGHTS: (run / WEIGHTS).read_bytes(),
    }
    if predictions:
        if answered is None:
            raise UserError(f"{run} has no {FILE} to push: it was not tested, or by an older kshot.")
        files[FILE] = (run / FILE).read_bytes()
    return files


def without_paths(value: Any) -> Any:
    """Plain data with the last part of absolute paths in their places, be they all of a text or within it."""
    if isinstance(value, dict):
        return {key: without_paths(each) for key, each in value.items()}
    if isinstance(value, list):
        return [without_paths(each) for each in value]
    if not isinstance(value, str):
        return value
    return re.split(r"[/\\]", value.rstrip("/\\"))[-1] if WHOLE.match(value) else WITHIN.sub("", value)


def send(files: dict[str, bytes], name: str, private: bool) -> None:
    """Makes a repository of files, all in one commit.

    Raises:
        UserError: it is there already, nobody is logged in, or the hub does not answer.
    """
    from huggingface_hub import CommitOperationAdd, HfApi, constants
    from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError

    api, made = HfApi(endpoint=constants.ENDPOINT), False
    try:
        with quiet_loading(hub=True):
            api.create_repo(name, private=private, exist_ok=False)
            made = True
            operations = [CommitOperationAdd(path, content) for path, content in files.items()]
            api.create_commit(name, operations, commit_message="A run of kshot")
    except (HfHubHTTPError, LocalTokenNotFoundError, OSError, ValueError) as error:
        code = getattr(getattr(error, "response", None), "status_code", None)
        if code == 409:
            raise UserError(f"{name} is there already, and stays as it is: choose another name.") from error
        why = "log in first, with hf auth login or HF_TOKEN" if code == 401 else first_line(error)
        left = f"; {name} was made and is empty: delete it" if made else ""
        raise UserError(f"{name} could not be pushed: {why}{left}.") from error
