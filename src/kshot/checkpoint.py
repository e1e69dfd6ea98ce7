"""Small checkpoints: trainable tensors only, written so that a full disk never costs the previous one."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.fabric.plugins import TorchCheckpointIO
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from kshot.classifiers import Classifier, PromptSRC
from kshot.errors import UserError, first_line
from kshot.files import write_atomically
from kshot.slots import AdapterLayer

FORMAT = 2  # 1: PromptSRC's context inside an inner classifier, and a file to resume from with averages of its own
HEADER = "kshot"  # key of the checkpoint's description, in both kinds of file
TRAINING = "kshot_training"  # key of what only a resumed run needs
INDIFFERENT = {"dropout", "path", "save_bits"}  # settings that change how a method trains or runs, not what it learnt


class AtomicCheckpoints(TorchCheckpointIO):
    """Lightning's checkpoint files, written atomically, and safetensors files read as checkpoints of weights."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        del storage_options
        write_atomically(Path(path), lambda file: torch.save(checkpoint, file))

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = True) -> dict[str, Any]:
        """Reads a checkpoint without ever unpickling code; raises UserError for no such file, or not a checkpoint."""
        del weights_only
        file = Path(path)
        if not file.is_file():
            raise UserError(f"There is no checkpoint {file}.")
        try:
            if file.suffix == ".safetensors":
                tensors, header = read_tensors(file)
                return {"state_dict": tensors, HEADER: header, "pytorch-lightning_version": lightning.__version__}
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
    """Reads what :func:`write_tensors` wrote; raises UserError when the file holds no such description."""
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata() or {}
        if HEADER not in metadata:
            raise UserError(f"{path} was not written by kshot: its header names no method.")
        return {name: file.get_tensor(name) for name in file.keys()}, json.loads(metadata[HEADER])  # noqa: SIM118  no mapping


def packed(module: Any) -> dict[str, Tensor]:
    """What a FewShotModule tuned, as the small file holds it: methods may store fewer bits, or leave out zeros."""
    state: dict[str, Tensor] = module.tuned_state()
    for name, layer in named_layers(module).items():
        stored = layer.stored()
        if stored is not None:
            for own, _ in layer.named_parameters():
                state.pop(f"{name}.{own}", None)
            state |= {f"{name}.{own}": tensor for own, tensor in stored.items()}
    return state


def unpacked(saved: Mapping[str, Tensor], module: Any) -> dict[str, Tensor]:
    """Tuned tensors from what :func:`packed` gave, or from themselves; layers take on shapes that training decided."""
    state = dict(saved)
    for name, layer in named_layers(module).items():
        own = {key.removeprefix(f"{name}."): state.pop(key) for key in list(state) if key.startswith(f"{name}.")}
        state |= {f"{name}.{key}": tensor for key, tensor in layer.from_stored(own).items()}
    return state


def named_layers(module: Any) -> dict[str, AdapterLayer]:
    """The adapter layers by module name."""
    return {name: layer for name, layer in module.named_modules() if isinstance(layer, AdapterLayer)}


def round_trip(module: Any) -> bool:
    """Gives a module the tensors that its small file holds, so that these are tested; whether that changed any."""
    before = {name: tensor.clone() for name, tensor in module.tuned_state().items()}
    after = unpacked(packed(module), module)
    module.load_state_dict(after, strict=False)
    return any(not torch.equal(before[name], tensor.to(before[name])) for name, tensor in after.items())


def accept(checkpoint: dict[str, Any], module: Any) -> None:
    """Makes a checkpoint one of this module, which takes on the shapes that training decided.

    Raises:
        UserError: it is one of another backbone, method, basis or task.
    """
    check_origin(checkpoint.get(HEADER, {}), module.header())
    from_first_format(checkpoint, module.classifier)
    saved = checkpoint["state_dict"] = unpacked(checkpoint["state_dict"], module)
    take_on_rows(saved, module)
    check_tensors(saved, module.tuned_state())
    for shared, state in zip(module.shared, checkpoint.get(TRAINING, []), strict=False):  # none in the small file
        shared.load_state_dict(state, strict=False)


def take_on_rows(saved: Mapping[str, Tensor], module: Any) -> None:
    """Gives tensors that have no rows yet, such as the keys of a cache, as many as those of a file have."""
    for name, tensor in module.tuned_state().items():
        there = saved.get(name)
        if there is not None and tensor.ndim and not len(tensor) and there.shape[1:] == tensor.shape[1:]:
            owner, _, own = name.rpartition(".")
            getattr(module.get_submodule(owner), own).data = tensor.new_zeros(there.shape)


def training_state(shared: nn.Module) -> dict[str, Tensor]:
    """What a resumed run needs of what layers share: its persistent buffers."""
    kept = shared.state_dict()
    return {name: buffer for name, buffer in shared.named_buffers() if name in kept}


def check_resumable(checkpoint: Mapping[str, Any], path: Any) -> None:
    """Raises UserError for weights alone, and for a file of an earlier version, whose optimizer had other groups."""
    if "optimizer_states" not in checkpoint:
        raise UserError(f"{path} holds weights only; to resume, give checkpoints/last.ckpt of a run.")
    written = checkpoint.get(HEADER, {}).get("format", 1)
    if written != FORMAT:
        raise UserError(
            f"{path} has format {written}, and this version resumes from format {FORMAT}: it can be tested."
        )


def from_first_format(checkpoint: dict[str, Any], classifier: Classifier) -> None:
    """Brings the tensors of a checkpoint of the first format under today's names."""
    if checkpoint.get(HEADER, {}).get("format", 1) != 1:
        return
    state = checkpoint["state_dict"]
    average = (checkpoint.pop(TRAINING, None) or {}).get("average")
    state |= average["means"] if average else {}
    for name, part in classifier.named_modules():
        if isinstance(part, PromptSRC):
            prefix = ".".join(filter(None, ("classifier", name))) + "."
            for key in [key for key in state if key.startswith(f"{prefix}inner.")]:
                state[prefix + key.removeprefix(f"{prefix}inner.")] = state.pop(key)


def check_origin(header: Mapping[str, Any], own: Mapping[str, Any]) -> None:
    """Raises UserError for a checkpoint of another backbone, method, setting, frozen basis or task: what differs."""
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
            f"{len(own['class_names'])} ({', '.join(own['class_names'][:3])}, ...). To test on other classes, keep the "
            "data set that it was trained on, and set --data.protocol cross-dataset --data.targets '[NAME]'."
        )
    for key, what in (("adapter", "adapter"), ("frozen", "frozen basis")):
        there = header.get(key)
        found = None if there is None else first_difference(there, json.loads(json.dumps(own[key])))
        if found is not None:
            raise UserError(f"The checkpoint's {what} has {found[0]} {found[1]}, and the config's has {found[2]}.")


def first_difference(there: Any, here: Any, where: str = "") -> tuple[str, Any, Any] | None:
    """Where two pieces of plain data differ first, and how; floats may differ by a ten-thousandth."""
    if isinstance(there, dict) and isinstance(here, dict):
        keys = sorted((there.keys() | here.keys()) - INDIFFERENT)
        pairs = [(there.get(key), here.get(key), f"{where}.{key}".lstrip(".")) for key in keys]
    elif isinstance(there, list) and isinstance(here, list) and len(there) == len(here):
        pairs = [(a, b, where) for a, b in zip(there, here, strict=True)]
    else:
        floats = isinstance(there, float) and isinstance(here, float)
        same = math.isclose(there, here, rel_tol=1e-4, abs_tol=1e-4) if floats else there == here
        return None if same else (where, there, here)
    return next(filter(None, (first_difference(*pair) for pair in pairs)), None)


def counted(names: Mapping[str, Sequence[str]]) -> list[str]:
    """How many names there are of each kind, and which the first is: ``3 missing, such as a``."""
    return [f"{len(some)} {kind}, such as {some[0]}" for kind, some in names.items() if some]


def check_tensors(saved: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    """Raises UserError for tensors that are missing, unknown or of another shape, and names one of each."""
    reasons = counted({"missing": sorted(wanted.keys() - saved), "unknown": sorted(saved.keys() - wanted)})
    for name in sorted(saved.keys() & wanted.keys()):
        if saved[name].shape != wanted[name].shape:
            reasons.append(f"{name} is {tuple(saved[name].shape)} there and {tuple(wanted[name].shape)} here")
            break
    if reasons:
        raise UserError(f"The checkpoint's tensors do not fit the config's adapter and targets: {'; '.join(reasons)}.")
