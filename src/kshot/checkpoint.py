"""Small checkpoints: trainable tensors only, each file with its digest, written so that a full disk costs none."""

from __future__ import annotations

import json
import pickle
import warnings
import zipfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch import Trainer
from safetensors import safe_open
from torch import Tensor, nn

from kshot.calibration import stored_calibration
from kshot.classifiers import Classifier, PromptSRC
from kshot.errors import UserError, first_line
from kshot.files import write_atomically
from kshot.header import FORMAT, check_fits, check_same_run, header_of
from kshot.mahalanobis import PREFIX, stated, stored_mahalanobis
from kshot.sealing import add_zip_comment, check_seal, save_sealed, seal
from kshot.slots import AdapterLayer

HEADER = "kshot"  # key of the checkpoint's description, in both kinds of file
TRAINING = "kshot_training"  # key of what only a resumed run needs
FIRST_SEALED = 3  # format from which every file carries a digest


class AtomicCheckpoints(TorchCheckpointIO):
    """Lightning's checkpoint files, written atomically, and safetensors files read as checkpoints of weights."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: tuple[str, dict[str, Any]] | None = None

    def look_at(self, path: Any) -> dict[str, Any]:
        """Reads a checkpoint that is loaded later, for which it is kept. Raises as :meth:`load_checkpoint`."""
        self.seen = str(path), self.load_checkpoint(path)
        return plain_copy(self.seen[1])

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        del storage_options

        def write(file: Path) -> None:
            torch.save(checkpoint, file)
            add_zip_comment(file)
            seal(file)

        write_atomically(Path(path), write)

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = True) -> dict[str, Any]:
        """Reads a checkpoint without ever unpickling code, or takes the one that was looked at, once.

        Raises:
            UserError: no such file, not a checkpoint, or one of which a bit has changed.
        """
        del weights_only
        (seen, loaded), self.seen = self.seen or ("", {}), None
        if seen == str(path):
            return plain_copy(loaded)
        file = Path(path)
        if not file.is_file():
            raise UserError(f"There is no checkpoint {file}.")
        try:
            sealed = check_seal(file)
            if file.suffix == ".safetensors":
                tensors, header = read_tensors(file)
                loaded = {"state_dict": tensors, HEADER: header, "pytorch-lightning_version": lightning.__version__}
            else:
                loaded = read_archive(file, map_location)
            written = loaded.get(HEADER, {}).get("format", 1)
        except UserError:
            raise
        except Exception as error:  # a broken file may raise anything in a reader
            reason = f"{type(error).__name__}: {first_line(error)}"
            raise UserError(f"{file} is no checkpoint that can be read ({reason}).") from error
        if written not in range(1, FORMAT + 1):
            raise UserError(f"{file} has format {written!r}, and this version reads up to {FORMAT}: update kshot.")
        if not sealed and written >= FIRST_SEALED:
            raise UserError(f"{file} is damaged: its digest is gone. Take another copy of it.")
        return loaded


def plain_copy(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """A checkpoint whose entries and tensors may be put under other names without a change of this one."""
    return {**checkpoint, "state_dict": dict(checkpoint["state_dict"])}


def write_tensors(path: Path, tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> None:
    """Writes a safetensors file with its description, and its digest, in the header."""
    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    told = json.dumps({**header, "dtypes": dtypes_of(tensors)})
    write_atomically(path, lambda file: save_sealed(contiguous, file, {HEADER: told}))


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Reads what :func:`write_tensors` wrote; raises UserError when the file holds no such description."""
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata() or {}
        if HEADER not in metadata:
            raise UserError(f"{path} was not written by kshot: its header names no method.")
        return {name: file.get_tensor(name) for name in file.keys()}, json.loads(metadata[HEADER])  # noqa: SIM118  no mapping


def read_archive(path: Path, map_location: Any = None) -> dict[str, Any]:
    """Reads what ``torch.save`` wrote of tensors and plain values; raises UserError for what swells when it is read."""
    size = path.stat().st_size
    with suppress(zipfile.BadZipFile), zipfile.ZipFile(path) as archive:
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
            raise UserError(f"{path} is compressed, which torch.save does not do: it is no checkpoint.")
    try:
        with warnings.catch_warnings(action="ignore"):  # of how it was pickled
            loaded: dict[str, Any] = torch.load(path, map_location=map_location or "cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise UserError(f"{path} is no checkpoint: it holds something else than tensors and plain values.") from error
    state = loaded.get("state_dict") if isinstance(loaded, dict) else None
    if not isinstance(state, dict):
        raise UserError(f"{path} is no checkpoint: it holds no state_dict.")
    if not all(isinstance(tensor, Tensor) and tensor.nbytes <= size for tensor in state.values()):
        raise UserError(f"{path} is no checkpoint: its state_dict holds other than tensors, or larger ones than it.")
    return loaded


def packed(module: Any) -> dict[str, Tensor]:
    """What a FewShotModule tuned, as the small file holds it: methods may store fewer bits, or leave out zeros.

    Beside it stands where the shots lie, if that is known (:class:`~kshot.mahalanobis.Mahalanobis`).
    """
    state: dict[str, Tensor] = module.tuned_state()
    for name, layer in named_layers(module).items():
        stored = layer.stored()
        if stored is not None:
            for own, _ in layer.named_parameters():
                state.pop(f"{name}.{own}", None)
            state |= {f"{name}.{own}": tensor for own, tensor in stored.items()}
    return state | stated(module.mahalanobis)


def unpacked(saved: Mapping[str, Tensor], module: Any) -> dict[str, Tensor]:
    """Tuned tensors from what :func:`packed` gave, or from themselves; layers take on shapes that training decided."""
    state = {name: tensor for name, tensor in saved.items() if not name.startswith(PREFIX)}
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
        UserError: it is one of another backbone, method, basis or task, or holds other tensors.
    """
    header, own = checkpoint.get(HEADER, {}), header_of(module)
    check_fits(header, own)
    tell_of_wise_alpha(header, own)
    from_first_format(checkpoint, module.classifier)
    check_numbers(checkpoint["state_dict"], header.get("dtypes"))
    module.calibration = stored_calibration(header.get("calibration"))
    module.mahalanobis = stored_mahalanobis(checkpoint["state_dict"], len(module.classifier.task.class_names))
    saved = checkpoint["state_dict"] = unpacked(checkpoint["state_dict"], module)
    take_on_rows(saved, module)
    check_tensors(saved, module.tuned_state())
    for shared, state in zip(module.shared, checkpoint.get(TRAINING, []), strict=False):  # none in the small file
        shared.load_state_dict(state, strict=False)


def tell_of_wise_alpha(header: Mapping[str, Any], own: Mapping[str, Any]) -> None:
    """Warns where a file was measured at another share of its change than it is to be now."""
    there, here = (((each.get("model") or {}).get("adapter") or {}).get("wise_alpha", 1.0) for each in (header, own))
    if there != here:
        warnings.warn(
            f"The checkpoint's run evaluated at wise_alpha {there}, and this one does at {here}, as its config says.",
            stacklevel=2,
        )


def dtypes_of(tensors: Mapping[str, Tensor]) -> list[str]:
    """The kinds of numbers that tensors hold, for the header of their file."""
    return sorted({str(tensor.dtype).removeprefix("torch.") for tensor in tensors.values()})


def check_numbers(saved: Mapping[str, Tensor], dtypes: Sequence[str] | None) -> None:
    """Raises UserError for a tensor of other numbers than the run had that wrote it, and for one that is not finite."""
    for name, tensor in saved.items():
        (kind,) = dtypes_of({name: tensor})
        if dtypes is not None and kind not in dtypes:
            raise UserError(f"The checkpoint's {name} is of {kind}, and its run had {' and '.join(dtypes)}.")
        if not tensor.isfinite().all():
            raise UserError(f"The checkpoint's {name} holds values that are not finite.")


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


def check_resumable(checkpoint: Mapping[str, Any], path: Any, module: Any, trainer: Trainer) -> None:
    """Raises UserError for a file that a run cannot go on from.

    That is one of weights alone, of an earlier format, of a run with other settings, or of a longer run.
    """
    header = checkpoint.get(HEADER, {})
    if "optimizer_states" not in checkpoint:
        raise UserError(f"{path} holds weights only; to resume, give checkpoints/last.ckpt of a run.")
    if header.get("format", 1) != FORMAT:
        raise UserError(
            f"{path} has format {header.get('format', 1)}, and this version resumes from format {FORMAT}: it can be "
            "tested."
        )
    own = header_of(module)
    check_fits(header, own)
    check_same_run(header, own, path)
    for name, done, most in (
        ("max_epochs", checkpoint["epoch"] + 1, trainer.max_epochs),
        ("max_steps", checkpoint["global_step"], trainer.max_steps),
    ):
        if most is not None and 0 <= most < done:
            raise UserError(f"{path} is of a run that has come to {done}, beyond --trainer.{name} {most}.")


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
