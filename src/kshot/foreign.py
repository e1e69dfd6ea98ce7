"""Files that others released, CoOp's and CLIP-LoRA's here, as tensors; nothing that they pickle is run."""

from __future__ import annotations

import hashlib
import io
import json
import math
import pickle
import re
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from kshot.adapters import LoRA
from kshot.backbones.base import Backbone
from kshot.backbones.language import require_prompts
from kshot.checkpoint import HEADER, counted, named_layers, write_tensors
from kshot.classifiers import CoOp, KgCoOp
from kshot.errors import UserError, first_line
from kshot.files import make_folder
from kshot.header import header_of
from kshot.released import checked, maple_tensors, promptsrc_tensors, tip_tensors

if TYPE_CHECKING:
    from kshot.module import FewShotModule


Reader = Callable[[Path, "FewShotModule"], tuple[dict[str, Tensor], dict[str, str]]]


class Inert:
    """Stands for every class, function and object of a file that is no tensor; does nothing, whatever it is told."""

    dump_patches = False  # torch asks the classes in its files of old

    def __init__(*args: Any, **options: Any) -> None:  # also of the class itself, which a file may take for an object
        pass

    def __call__(self, *_: Any, **__: Any) -> Inert:
        return Inert()

    __setstate__ = __setitem__ = append = extend = add = __init__


class TensorUnpickler(pickle.Unpickler):
    """Rebuilds tensors and plain containers. A file chooses by name what is called: here from this list alone."""

    def find_class(self, module: str, name: str) -> Any:
        """What a name in the file stands for; functions are made anew, so that a file can change none of ours."""
        if module == "torch._utils" and name in ("_rebuild_tensor", "_rebuild_tensor_v2"):
            return lambda storage, offset, size, stride, *_: torch._utils._rebuild_tensor(storage, offset, size, stride)
        if module == "torch._utils" and name in ("_rebuild_parameter", "_rebuild_parameter_with_state"):
            return lambda data, *_: data
        return OrderedDict if (module, name) == ("collections", "OrderedDict") else Inert


class TensorPickle:
    """As a module for ``torch.load``, in the place of Python's ``pickle``."""

    Unpickler = TensorUnpickler

    @staticmethod
    def load(file: Any, **options: Any) -> Any:
        return TensorUnpickler(file, **options).load()


def read_released(path: Path) -> tuple[Any, str]:
    """The tensors and plain containers of a file of ``torch.save``, zipped or not, and the file's SHA-256.

    Raises:
        UserError: there is no such file, or it is none of ``torch.save``.
    """
    if not path.is_file():
        raise UserError(f"There is no file {path}.")
    try:
        data = path.read_bytes()
        file = io.BytesIO(data)  # torch takes the oldest of its formats, tar, from files on disk alone
        if zipfile.is_zipfile(file):
            with zipfile.ZipFile(file) as archive:
                if any(name.endswith("constants.pkl") for name in archive.namelist()):
                    raise UserError(f"{path} is a TorchScript program, not tensors.")
        file.seek(0)
        with warnings.catch_warnings(action="ignore"):
            contents = torch.load(file, map_location="cpu", pickle_module=TensorPickle, weights_only=False)
    except UserError:
        raise
    except Exception as error:  # a broken file may raise anything in a reader
        raise UserError(f"{path} is no file of torch.save that can be read: {first_line(error)}") from error
    return contents, hashlib.sha256(data).hexdigest()


def import_released(model: FewShotModule, file: str | None, out: str | None, read: Reader | None = None) -> Path:
    """Turns a released file into a checkpoint of a model, which it must fit; says where it is.

    Args:
        model: of a config.
        file: what was released.
        out: where to write; None for beside the file.
        read: as :func:`released_tensors`, which it is by default.

    Raises:
        UserError: there is no such file, it does not fit, or what is to be written exists.
    """
    if file is None:
        raise UserError(
            "import needs --file: what others released, such as CoOp's model.pth.tar-200, or a folder of PEFT."
        )
    path = Path(out or f"{file.rstrip('/')}.safetensors")
    if path.suffix != ".safetensors":
        raise UserError(f"--out is {path}, and must end with .safetensors.")
    if path.exists():
        raise UserError(f"{path} exists already: choose another --out.")
    tensors, origin = (read or released_tensors)(Path(file), model)
    make_folder(path.parent)
    header = header_of(model) | {"split": None, "training": None, "imported": origin}  # no file says of which shots
    model.on_load_checkpoint({"state_dict": dict(tensors), HEADER: header})
    write_tensors(path, tensors, header)
    parameters = sum(tensor.numel() for tensor in tensors.values())
    print(f"{model.method} from {file} (tensors {len(tensors)}, parameters {parameters:,}): {path}")
    return path


def released_tensors(path: Path, model: FewShotModule) -> tuple[dict[str, Tensor], dict[str, str]]:
    """What a released file holds for the model of a config: tensors in float32, by their names in the model.

    It is a file of CoOp (``state_dict`` with ``ctx``, or that dictionary alone), MaPLe or PromptSRC (a whole model's),
    CLIP-LoRA (``weights`` and ``metadata``) or Tip-Adapter (keys, with values beside it). With the tensors come its
    name and SHA-256, for the header.

    Raises:
        UserError: it is no such file, or belongs to another backbone, method or setting than the config's.
    """
    read, sha256 = read_released(path)
    contents = read if isinstance(read, dict) else {}
    state, weights, metadata = contents.get("state_dict", contents), contents.get("weights"), contents.get("metadata")
    try:
        if isinstance(read, Tensor):
            tensors = tip_tensors(read, values_beside(path), model)
        elif isinstance(state, dict) and "image_encoder.VPT" in state:
            tensors = promptsrc_tensors(state, model)
        elif isinstance(state, dict) and "prompt_learner.proj.weight" in state:
            tensors = maple_tensors(state, model)
        elif isinstance(weights, dict) and isinstance(metadata, dict):
            tensors = clip_lora_tensors(weights, metadata, model)
        elif isinstance(state, dict) and "ctx" in state:
            tensors = coop_tensors(state, model)
        else:
            keys = ", ".join(map(str, list(state if isinstance(state, dict) else contents)[:6]))
            raise UserError(
                "neither of CoOp (state_dict with ctx), MaPLe, PromptSRC or Tip-Adapter nor of CLIP-LoRA (weights, "
                "metadata): it holds "
                f"{keys or 'nothing of that kind'}."
            )
    except UserError as error:  # of the contents, which know no file
        raise UserError(f"{path.name}: {error}") from None
    return tensors, {"file": path.name, "sha256": sha256}


def values_beside(path: Path) -> Any:
    """The values of Tip-Adapter's cache: ``values_16shots.pt`` beside ``keys_16shots.pt`` or ``best_F_16shots.pt``."""
    name = re.sub(r"^(keys|best_F)_", "values_", path.name)
    if name == path.name:
        raise UserError("it is a tensor alone: Tip-Adapter's files are called keys_16shots.pt and best_F_16shots.pt.")
    return read_released(path.with_name(name))[0]


def coop_tensors(state: Mapping[str, Any], model: FewShotModule) -> dict[str, Tensor]:
    """CoOp's context, (M, d) or (C, M, d); where the class name stood in training, a file does not say."""
    classifier = model.classifier
    others = [key for key in state if key not in ("ctx", "token_prefix", "token_suffix")]
    if others or not isinstance(classifier, CoOp) or type(classifier) not in (CoOp, KgCoOp):
        what = f"it also holds {others[0]}, so it is none of CoOp" if others else "it holds a context of CoOp"
        raise UserError(
            f"{what}, and the config's classifier is {type(classifier).__name__}: CoOp's files go with --config "
            "recipes/coop.yaml."
        )
    context = checked("ctx", state["ctx"])
    text = require_prompts(model.backbone, type(classifier).__name__)
    if context.ndim not in (2, 3):
        raise UserError(f"ctx is {tuple(context.shape)}, which is no context of CoOp.")
    specific, (length, width) = context.ndim == 3, context.shape[-2:]
    own_length, own_width = classifier.context.shape[-2:]
    if specific != classifier.class_specific:
        raise UserError(
            f"ctx is {tuple(context.shape)}, {'one context a class' if specific else 'one for all classes'}: set "
            f"--model.classifier.class_specific {str(specific).lower()}."
        )
    if width != own_width:
        raise UserError(
            f"ctx is of a text tower {width} wide, and that of {text.name} is {own_width} wide: name the backbone "
            "that it was trained with."
        )
    if length != own_length:
        raise UserError(
            f"ctx has {length} context tokens, and the config {own_length}: set --model.classifier.context_length "
            f"{length} --model.classifier.init_words null."
        )
    names = classifier.task.class_names
    if specific and len(context) != len(names):
        raise UserError(f"ctx is of {len(context)} classes, and the config of {len(names)}.")
    tokens = text.tokenize([f"{'X ' * length}{name}." for name in names])
    if not alike(state.get("token_prefix"), text, tokens[:1, :1]):
        raise UserError(f"it was trained with other weights than {text.name}: their start tokens differ.")
    if specific and not alike(state.get("token_suffix"), text, tokens[:, 1 + length :]):
        raise UserError(f"it holds a context for each of {len(names)} classes, but not for those of the config.")
    return {"classifier.context": context}


def alike(saved: Any, text: Any, tokens: Tensor) -> bool:
    """Whether saved token embeddings are a backbone's of these tokens, to half precision; True where none are saved."""
    if not isinstance(saved, Tensor):
        return True
    with torch.no_grad():
        own = text.embed_tokens(tokens.to(text.mean.device)).float().cpu()
    saved = saved[: len(own)].float()
    return saved.shape == own.shape and bool((saved - own).abs().max() <= 0.01 * own.abs().max())


# What CLIP-LoRA's code calls a position, in blocks of either tower; "all" of ViT-L/14's 24 it takes to be the first 21.
POSITIONS: dict[str, Sequence[int]] = {
    **{"top": [11], "top1": [11], "top2": [10, 11], "top3": [9, 10, 11]},
    **{"bottom": range(4), "mid": range(4, 8), "up": range(8, 12), "half-bottom": range(6), "half-up": range(6, 12)},
}
SIZES = {"text": (12,), "image": (12, 24)}  # numbers of blocks that it has positions for
TOWERS = {"text": ["text"], "vision": ["image"], "both": ["text", "image"]}  # in the order of its layers
PARTS = {"q_proj": "q", "k_proj": "k", "v_proj": "v", "proj": "o"}


def clip_lora_tensors(
    weights: Mapping[str, Any], metadata: Mapping[str, Any], model: FewShotModule
) -> dict[str, Tensor]:
    """CLIP-LoRA's factors, A (r, in) and B (out, r) of each projection, whose change is α/√r B A."""
    rank, alpha = metadata.get("r"), metadata.get("alpha")
    if not isinstance(rank, int) or not isinstance(alpha, int | float) or rank < 1:
        raise UserError(f"no file of CLIP-LoRA: its metadata give r {rank!r} and alpha {alpha!r}.")
    adapter, needs = model.adapter, f"--model.adapter LoRA --model.adapter.rank {rank} --model.adapter.alpha {alpha:g} "
    needs += "--model.adapter.rank_stabilised true"
    if type(adapter) is not LoRA:
        here = "no adapter" if adapter is None else type(adapter).__name__
        raise UserError(f"it holds factors of LoRA, and the config has {here}: set {needs}.")
    scale = alpha / math.sqrt(rank)
    if adapter.rank != rank or not math.isclose(adapter.scale, scale, rel_tol=1e-6):
        raise UserError(
            f"it has rank {rank} and scale {scale:.4g}, and the config's LoRA has rank {adapter.rank} and scale "
            f"{adapter.scale:.4g}: set {needs}."
        )
    found = slots_of(weights, metadata, model.backbone)
    layers = {layer.slot.name: (name, layer) for name, layer in named_layers(model).items()}
    reasons = counted(
        {
            "that the file adapts alone": [name for name in found if name not in layers],
            "that the config adapts alone": [name for name in layers if name not in found],
        }
    )
    if reasons:
        targets = json.dumps(targets_of(found, model.backbone))
        raise UserError(f"the adapted slots differ: {'; '.join(reasons)}: set --model.targets '{targets}'.")
    tensors = {}
    for slot, factors in found.items():
        name, layer = layers[slot]
        for letter, key in (("A", "w_lora_A"), ("B", "w_lora_B")):
            factor = checked(f"{key} of {slot}", factors.get(key) if isinstance(factors, dict) else None)
            own = layer.get_parameter(letter)
            if factor.shape != own.shape:
                raise UserError(
                    f"{key} of {slot} is {tuple(factor.shape)}, and {model.backbone.name} takes {tuple(own.shape)}: "
                    "name the backbone that it was trained with."
                )
            tensors[f"{name}.{letter}"] = factor
    return tensors


def slots_of(weights: Mapping[str, Any], metadata: Mapping[str, Any], backbone: Backbone) -> dict[str, Any]:
    """What CLIP-LoRA saved, by the names of a backbone's slots: it numbers the adapted blocks, text tower first."""
    encoder, position = str(metadata.get("encoder")), str(metadata.get("position"))
    if encoder not in TOWERS or (position != "all" and position not in POSITIONS):
        raise UserError(f"no file of CLIP-LoRA: its metadata give encoder {encoder!r}, position {position!r}.")
    blocks = {tower: blocks_of(tower, backbone) for tower in TOWERS[encoder]}
    unknown = [tower for tower, number in blocks.items() if number not in SIZES[tower]]
    if position != "all" and unknown:
        raise UserError(
            f"it adapts the blocks {position!r}, which CLIP-LoRA defines for towers of 12 blocks (and ViT-L/14), "
            f"and the {unknown[0]} tower of {backbone.name} has {blocks[unknown[0]]}."
        )
    if position == "all" and blocks.get("image") == 24 and len(weights) == sum(blocks.values()) - 3:
        blocks["image"] = 21
    chosen = [
        (t, b) for t, number in blocks.items() for b in (range(number) if position == "all" else POSITIONS[position])
    ]
    if list(weights) != [f"layer_{i}" for i in range(len(chosen))]:
        raise UserError(
            f"it adapts {len(weights)} blocks, and encoder {encoder!r}, position {position!r} of {backbone.name} "
            f"are {len(chosen)}: name the backbone that it was trained with."
        )
    found = {}
    for (tower, block), layer in zip(chosen, weights.values(), strict=True):
        for key, factors in (layer if isinstance(layer, dict) else {}).items():
            if key not in PARTS:
                raise UserError(f"no file of CLIP-LoRA: it adapts {key!r}, none of {', '.join(PARTS)}.")
            found[f"{tower}.{block}.{PARTS[key]}"] = factors
    return found


def blocks_of(tower: str, backbone: Backbone) -> int:
    """The number of a tower's blocks that have slots."""
    return len({name.split(".")[1] for name in backbone.slots() if name.startswith(f"{tower}.")})


def targets_of(slots: Collection[str], backbone: Backbone) -> list[str]:
    """Patterns that choose slots of which all blocks have the same parts."""
    parts = "[" + "".join(p for p in PARTS.values() if any(name.endswith(f".{p}") for name in slots)) + "]"
    patterns = []
    for tower in ("text", "image"):
        blocks = sorted({int(name.split(".")[1]) for name in slots if name.startswith(f"{tower}.")})
        whole = len(blocks) == blocks_of(tower, backbone)
        patterns += [f"{tower}.*.{parts}"] * bool(blocks) if whole else [f"{tower}.{b}.{parts}" for b in blocks]
    return patterns
