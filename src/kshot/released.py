"""What files of MaPLe, PromptSRC and Tip-Adapter hold, under this toolkit's names."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from kshot.classifiers import MaPLe, PromptSRC, TipAdapter, TipAdapterF
from kshot.errors import UserError

if TYPE_CHECKING:
    from kshot.module import FewShotModule

LEARNER = "prompt_learner."
DEEP = re.compile(r"(image|text)_encoder\.transformer\.resblocks\.(\d+)\.VPT_shallow")


def checked(name: str, value: Any) -> Tensor:
    """A tensor of a file in float32; raises UserError when it is none of finite floating-point numbers."""
    if not isinstance(value, Tensor) or not value.is_floating_point():
        raise UserError(f"{name} is no tensor of floating-point numbers.")
    if not torch.isfinite(value).all():
        raise UserError(f"{name} holds values that are not finite.")
    return value.detach().float().clone()


def fitting(found: Mapping[str, Tensor], model: FewShotModule, what: str) -> dict[str, Tensor]:
    """Tensors by their names in the classifier, as names in the model; raises UserError where a shape differs."""
    own = dict(model.classifier.named_parameters())
    for name, tensor in found.items():
        if name not in own or own[name].shape != tensor.shape:
            here = tuple(own[name].shape) if name in own else "none"
            raise UserError(
                f"{what}: {name} is {tuple(tensor.shape)}, and the config's {here}: set its context_length, "
                "prompt_length and depth, and name the backbone that it was trained with."
            )
    return {f"classifier.{name}": tensor for name, tensor in found.items()}


def require_kind(model: FewShotModule, kinds: tuple[type, ...], what: str, config: str) -> None:
    """Raises UserError unless the config's classifier is one of these."""
    if type(model.classifier) not in kinds:
        name = type(model.classifier).__name__
        raise UserError(f"it is of {what}, and the config's classifier is {name}: {what}'s files go with {config}.")


def rows(state: Mapping[str, Any], names: list[str]) -> Tensor:
    """Tensors of one shape as rows of one."""
    found = [checked(name, state.get(name)) for name in names]
    if len({each.shape for each in found}) > 1:
        raise UserError(f"{names[0]} and those after it are of several shapes.")
    return torch.stack(found)


def maple_tensors(state: Mapping[str, Any], model: FewShotModule) -> dict[str, Tensor]:
    """MaPLe's prompts and projections, of which its code keeps the first apart from the deep ones."""
    require_kind(model, (MaPLe,), "MaPLe", "--config recipes/maple.yaml")
    own = {name.removeprefix(LEARNER): value for name, value in state.items() if name.startswith(LEARNER)}
    deep = sum(1 for name in own if name.startswith("compound_prompts_text."))
    found = {"context": checked("ctx", own.get("ctx"))}
    if deep:
        found["deep"] = rows(own, [f"compound_prompts_text.{i}" for i in range(deep)])
    for i in range(deep + 1):
        there = f"compound_prompt_projections.{i - 1}" if i else "proj"
        for kind in ("weight", "bias"):
            found[f"project.{i}.{kind}"] = checked(f"{there}.{kind}", own.get(f"{there}.{kind}"))
    return fitting(found, model, "MaPLe")


def promptsrc_tensors(state: Mapping[str, Any], model: FewShotModule) -> dict[str, Tensor]:
    """PromptSRC's prompts, of which its code keeps those after the first in the blocks that they enter."""
    require_kind(model, (PromptSRC,), "PromptSRC", "--config recipes/promptsrc.yaml")
    blocks: dict[str, list[int]] = {"image": [], "text": []}
    for name in state:
        if known := DEEP.fullmatch(name):
            blocks[known[1]].append(int(known[2]))
    for tower, numbers in blocks.items():
        if sorted(numbers) != list(range(1, len(numbers) + 1)):
            raise UserError(
                f"its prompts of the {tower} tower are in the blocks {sorted(numbers)}, not in the first ones."
            )
    names = {t: [f"{t}_encoder.transformer.resblocks.{i}.VPT_shallow" for i in sorted(blocks[t])] for t in blocks}
    found = {"context": checked("ctx", state.get(f"{LEARNER}ctx"))}
    found["image_prompts"] = rows(state, ["image_encoder.VPT", *names["image"]])
    if names["text"]:
        found["deep"] = rows(state, names["text"])
    return fitting(found, model, "PromptSRC")


def tip_tensors(keys: Tensor, values: Any, model: FewShotModule) -> dict[str, Tensor]:
    """Tip-Adapter's cache: keys, (D, N), or (N, D) of Tip-Adapter-F, and values, (N, C), one-hot.

    α and β, which its code prints but does not save, are the config's.
    """
    require_kind(model, (TipAdapter, TipAdapterF), "Tip-Adapter", "--config methods/tip_adapter.yaml")
    classifier: Any = model.classifier
    trained = type(classifier) is TipAdapterF
    settings = classifier.init_args
    if settings.get("alpha") is None or settings.get("beta") is None:
        raise UserError("alpha and beta are not in such a file: give --model.classifier.alpha and .beta as printed.")
    values = checked("values", values)
    classes, width = len(classifier.task.class_names), classifier.backbone.feature_dim
    if values.ndim != 2 or values.shape[1] != classes or not torch.equal(values.sum(1), torch.ones(len(values))):
        raise UserError(f"its values are {tuple(values.shape)}, and the config has {classes} classes.")
    found = checked("keys", keys)
    found = found if trained else found.T.contiguous()
    if found.shape != (len(values), width):
        raise UserError(
            f"its keys are {tuple(keys.shape)} for {len(values)} values, and {model.backbone.name} has features of "
            f"{width}: keys of Tip-Adapter go with TipAdapter, best_F files with TipAdapterF."
        )
    tensors = {"keys": found, "values": values.argmax(1), "alpha": classifier.alpha, "beta": classifier.beta}
    return {f"classifier.{name}": tensor.clone() for name, tensor in tensors.items()}
