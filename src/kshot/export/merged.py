"""``merged``: the library's own model with everything that was learnt folded into its weights."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from kshot.backbones import Backbone, OpenClip, Timm
from kshot.backbones.hub import quiet_loading
from kshot.backbones.open_clip import loaded_open_clip, resolve
from kshot.errors import UserError
from kshot.export import transformers_names
from kshot.export.check import Answers
from kshot.export.head import write_head
from kshot.export.written import Wanted, facts_of
from kshot.opening import OpenRun
from kshot.slots import merge

Encode = Callable[[Tensor], Tensor]  # features, (B, D), of normalised images


def write(run: OpenRun, folder: Path, wanted: Wanted) -> Answers:
    """The towers as their library, or Transformers, has them, and what makes logits of their features.

    Raises:
        UserError: no weights of the library express the run.
    """
    check_plain(run)
    backbone, facts = library_backbone(run), facts_of(run)
    encode, head = write_towers(backbone, folder, facts, wanted), write_head(run, folder)
    return lambda image: head(encode(normalised(image, facts)))


def write_towers(backbone: Backbone, folder: Path, facts: Mapping[str, Any], wanted: Wanted) -> Encode:
    """Writes the towers in the wanted layout; gives the image encoder that their library loads."""
    if wanted.layout == "transformers":
        return transformers_names.write(backbone, folder, facts, wanted.dtype)
    if isinstance(backbone, OpenClip):
        return write_open_clip(backbone, folder, facts, wanted.dtype)
    assert isinstance(backbone, Timm)
    return write_timm(backbone, folder, facts, wanted.dtype)


def check_plain(run: OpenRun) -> None:
    """Raises UserError where features are not what the library's image tower gives for an image."""
    module, backbone = run.module, run.module.backbone
    other, advice = "", "export --format torch or onnx instead, where the program does it"
    if not isinstance(backbone, (OpenClip, Timm)):
        other = f"the backbone is a {type(backbone).__name__}, which is neither of open_clip nor of timm"
    elif module.classifier.image_tokens():
        other = f"{module.method} puts learned tokens into the image tower, which no weight of the library expresses"
    elif backbone.features != "default" or "unprojected" in module.classifier.needs:
        which = backbone.features if backbone.features != "default" else "before the last projection"
        other = f"its features are {which}, and the library's image tower gives its own"
    if other:
        raise UserError(f"{run.directory}: {other}: {advice}.")


def library_backbone(run: OpenRun, adapted: bool = True) -> Backbone:
    """A copy of a run's backbone with the library's own modules and names, merged or as it was before the run."""
    backbone: Any = run.module.backbone
    memo = {id(backbone.tokenizer): backbone.tokenizer} if isinstance(backbone, OpenClip) else {}
    found: Backbone = copy.deepcopy(backbone, memo)
    if not adapted:
        found.detach()
    try:
        merge(found, keep=False)
    except UserError as error:
        raise UserError(f"{error} Export it with --format torch or onnx, where the program computes it.") from None
    return found.eval()


def normalised(image: Tensor, facts: Mapping[str, Any]) -> Tensor:
    """Images in [0, 1] by the mean and deviation that a file tells."""
    mean, std = (torch.tensor(facts["preprocessing"][key]).view(1, 3, 1, 1) for key in ("mean", "std"))
    return (image - mean) / std


def plain_state(model: torch.nn.Module, dtype: torch.dtype) -> dict[str, Tensor]:
    """The state of a model as files take it: each tensor by itself, floats in a dtype."""
    state = model.state_dict().items()
    return {name: (t.to(dtype) if t.is_floating_point() else t).clone().contiguous() for name, t in state}


def write_open_clip(backbone: OpenClip, folder: Path, facts: Mapping[str, Any], dtype: torch.dtype) -> Encode:
    """A folder that ``open_clip.create_model("local-dir:FOLDER")`` loads."""
    open_clip, name = loaded_open_clip(), backbone.name
    known = name if name.startswith(("kshot:", "hf-hub:", "local-dir:")) or Path(name).is_dir() else name.split("/")[0]
    source = resolve(known)
    with quiet_loading(hub=source.startswith("hf-hub:")):
        config = copy.deepcopy(open_clip.get_model_config(source))
    config["vision_cfg"]["image_size"] = backbone.image_size
    file = config.get("text_cfg", {}).get("tokenizer_kwargs", {}).get("bpe_path")
    if file is not None and source.startswith("local-dir:"):
        shutil.copy(Path(source.removeprefix("local-dir:")) / file, folder / Path(file).name)
    seen = facts["preprocessing"]
    kept = {"mean": seen["mean"], "std": seen["std"], "interpolation": seen["interpolation"]}
    kept |= {"resize_mode": seen["resize"], "fill_color": list(seen["fill"])}
    told = json.dumps({"model_cfg": config, "preprocess_cfg": kept}, indent=2)
    (folder / "open_clip_config.json").write_text(told, encoding="utf-8")
    save_file(plain_state(backbone.clip, dtype), folder / "open_clip_model.safetensors")
    with quiet_loading(hub=False):
        model: Any = open_clip.create_model(f"local-dir:{folder}").eval()
    encode: Encode = model.encode_image
    return encode


def write_timm(backbone: Timm, folder: Path, facts: Mapping[str, Any], dtype: torch.dtype) -> Encode:
    """A folder that ``timm.create_model("local-dir:FOLDER", pretrained=True)`` loads."""
    import timm
    from timm.models import save_for_hf

    vit, seen = backbone.vit, facts["preprocessing"]
    options: dict[str, Any] = {"dynamic_img_size": True, "global_pool": vit.global_pool}
    shown = {key: list(seen[key]) for key in ("mean", "std")} | {"interpolation": seen["interpolation"]}
    crop_mode = {"shortest": "center", "longest": "border", "squash": "squash"}[seen["resize"]]
    config = {**vit.pretrained_cfg, "input_size": (3, seen["size"], seen["size"]), "crop_pct": seen["crop"]}
    config |= {**shown, "crop_mode": crop_mode, "fixed_input_size": False, "num_classes": vit.num_classes}
    vit.pretrained_cfg = config
    save_for_hf(vit.to(dtype), folder, model_config=config, model_args=options, safe_serialization=True)
    with quiet_loading(hub=False):
        model: Any = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    encode: Encode = model
    return encode
