"""Small checkpoints: trainable tensors only, written so that a full disk never costs the previous one."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from kshot.errors import UserError, first_line

HEADER = "kshot"  # key of the checkpoint's description, in both kinds of file


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Writes beside a file and renames, so that the file is either the old one or the new one.

    Raises:
        UserError: the disk refused; what was there before is untouched.
    """
    beside = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(beside)
        with beside.open("rb+") as file:
            os.fsync(file.fileno())
        beside.replace(path)
    except (OSError, RuntimeError, SafetensorError) as error:  # torch's and safetensors' ways to report a full disk
        before = "the one there before is kept" if path.exists() else "there was none before"
        raise UserError(
            f"Could not write {path} ({first_line(error)}); {before}. If the disk is full, free some and resume."
        ) from error
    finally:
        with suppress(OSError):
            beside.unlink(missing_ok=True)


class AtomicCheckpoints(TorchCheckpointIO):
    """Lightning's checkpoint files, written atomically, and safetensors files read as checkpoints of weights."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        """Writes a checkpoint."""
        del storage_options
        write_atomically(Path(path), lambda file: torch.save(checkpoint, file))

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = True) -> dict[str, Any]:
        """Reads a checkpoint without ever unpickling code.

        Raises:
            UserError: no such file, or not a checkpoint.
        """
        del weights_only
        file = Path(path)
        if not file.is_file():
            raise UserError(f"There is no checkpoint {file}.")
        try:
            if file.suffix == ".safetensors":
                import lightning.pytorch as pl

                tensors, header = read_tensors(file)
                return {"state_dict": tensors, HEADER: header, "pytorch-lightning_version": pl.__version__}
            loaded: dict[str, Any] = torch.load(file, map_location=map_location or "cpu", weights_only=True)
        except UserError:
            raise
        except Exception as error:  # a broken file may raise anything in a reader
            raise UserError(f"{file} is no checkpoint that can be read safely: {first_line(error)}") from error
        return loaded


def write_tensors(path: Path, tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> None:
    """Writes a safetensors file with its description in the header."""
    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    write_atomically(path, lambda file: save_file(contiguous, file, metadata={HEADER: json.dumps(header)}))


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Reads what :func:`write_tensors` wrote.

    Raises:
        UserError: the file holds no such description.
    """
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata() or {}
        if HEADER not in metadata:
            raise UserError(f"{path} was not written by kshot: its header names no method.")
        return {name: file.get_tensor(name) for name in file.keys()}, json.loads(metadata[HEADER])  # noqa: SIM118  no mapping


def check_fits(
    header: Mapping[str, Any], own: Mapping[str, Any], saved: Mapping[str, Tensor], wanted: Mapping[str, Tensor]
) -> None:
    """Refuses a checkpoint of another model, method or task.

    Raises:
        UserError: says what differs.
    """
    if header.get("backbone_sha256") != own["backbone_sha256"]:
        theirs = str(header.get("backbone_sha256"))[:12]
        raise UserError(
            f"The checkpoint belongs to the backbone {header.get('backbone')} (weights {theirs}), and the config names "
            f"{own['backbone']} (weights {own['backbone_sha256'][:12]})."
        )
    if header.get("method") != own["method"]:
        raise UserError(f"The checkpoint was trained by {header.get('method')}, and the config says {own['method']}.")
    if header.get("class_names") != own["class_names"]:
        names = header.get("class_names") or []
        raise UserError(
            f"The checkpoint tells {len(names)} classes apart ({', '.join(names[:3])}, ...), and the config "
            f"{len(own['class_names'])} ({', '.join(own['class_names'][:3])}, ...)."
        )
    reasons = [
        f"{len(names)} {word}, such as {names[0]}"
        for word, names in (("missing", sorted(wanted.keys() - saved)), ("unknown", sorted(saved.keys() - wanted)))
        if names
    ]
    for name in sorted(saved.keys() & wanted.keys()):
        if saved[name].shape != wanted[name].shape:
            reasons.append(f"{name} is {tuple(saved[name].shape)} there and {tuple(wanted[name].shape)} here")
            break
    if reasons:
        raise UserError(f"The checkpoint's tensors do not fit the config's adapter and targets: {'; '.join(reasons)}.")
