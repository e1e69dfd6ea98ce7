"""Tokens behind the first blocks of an image tower, where these are left as they are: computed once for all steps."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from lightning.pytorch import Trainer
from torch import Tensor

from kshot.backbones import Backbone
from kshot.backbones.language import memory_of
from kshot.backbones.towers import blocks_of
from kshot.data.parts import Batch, Tokens
from kshot.features import encoded_keys
from kshot.files import amount

SHARE = 4  # kept tokens take at most this part of the machine's memory: a quarter
AT_ONCE = 2**28  # bytes of tokens that are computed before they are put in their place

Module = Any  # a FewShotModule, which imports this file
Data = Any  # a FewShotDataModule
logger = logging.getLogger("kshot")


def leading_blocks(module: Module) -> int:
    """Blocks whose tokens all images keep while a module trains; 0 without any, or where all features are kept."""
    classifier = module.classifier
    entered = module.has_frozen_images or classifier.image_tokens() or "unprojected" in classifier.needs
    return 0 if entered else int(module.backbone.leading_blocks())


def encoded_batch(
    backbone: Backbone, batch: Batch, prompts: Sequence[Tensor] = (), unprojected: bool = False
) -> Tensor:
    """Image features, (B, D), of the images of a batch, or of their tokens, which no prompts can join any more."""
    if batch.tokens is not None:
        return backbone.encode_rest(*batch.tokens)
    assert batch.image is not None, "a batch has images, tokens or features"
    return backbone.encode_image(batch.image, prompts, unprojected)


def begun(module: Module, batch: Batch) -> Batch:
    """A batch of images with tokens in their place, from which this run and the untouched backbone both go on."""
    blocks = 0 if batch.image is None else leading_blocks(module)
    if batch.image is None or not blocks:
        return batch
    with torch.no_grad():
        return batch._replace(image=None, tokens=Tokens(module.backbone.encode_start(batch.image, blocks), blocks))


def keep_tokens(module: Module, data: Data, trainer: Trainer) -> dict[str, Any] | None:
    """Lets batches of a fit carry tokens in the place of images, where views repeat and memory allows it.

    What is kept takes at most a quarter of the machine's memory, which its devices share.

    Returns:
        In plain data: how many ``blocks`` ``of`` how many are left out of each step, the ``bytes`` that are ``kept`` by
        part, and why those of a part are not; None where no block is left as it is.
    """
    blocks = leading_blocks(module)
    if not blocks or not module.cache_features:
        return None
    size, whole = module.backbone.image_size, len(blocks_of(module.backbone.tower))
    blank = torch.zeros(1, 3, size, size, dtype=torch.uint8, device=module.device)
    with torch.no_grad(), trainer.precision_plugin.forward_context():
        like = module.backbone.encode_start(blank, blocks)
    room = memory_of(torch.device("cpu")) // SHARE // trainer.num_devices
    kept: dict[str, int] = {}
    not_kept: dict[str, str] = {}
    for name, views, vain in parts_of_steps(data, trainer):
        need = like.nbytes * views * len(data.part(name))
        too_many = f"they take {amount(need)}, and {amount(room)} are left of a quarter of the memory"
        why = vain or (too_many if need > room else "")
        if why:
            not_kept[name] = why
        else:
            states = states_of(module, data, trainer, name, views, like, blocks)
            data.keep_features(name, tokens=Tokens(states, blocks), free=True)
            kept[name], room = need, room - need
        said = f"not kept: {why}" if why else f"kept, in {amount(need)}"
        logger.info("Tokens of %s images behind %s of %s blocks are %s.", name, blocks, whole, said)
    return {"blocks": blocks, "of": whole, "kept": kept, "not_kept": not_kept}


def parts_of_steps(data: Data, trainer: Trainer) -> Iterator[tuple[str, int, str]]:
    """Parts that a fit goes through in steps, with the number of views, and why keeping these would be in vain."""
    views = data.train_views()
    steps = trainer.estimated_stepping_batches * trainer.accumulate_grad_batches
    epochs = steps / max(1, trainer.num_training_batches)
    vain = "" if epochs > views else f"none of {views} views is seen twice in {epochs:.3g} epochs"
    yield "train", views, vain if views else "every epoch has its own views; --data.views N repeats N of them"
    if data.draw.val and trainer.limit_val_batches != 0:
        yield "val", 1, ""


def states_of(module: Module, data: Data, trainer: Trainer, name: str, views: int, like: Tensor, blocks: int) -> Tensor:
    """Tokens, (V, N, L, width), of all views of a part, on the CPU; ``like``, (1, L, width), is one of them."""

    def encode(batch: Batch) -> Tensor:
        assert batch.image is not None
        tokens: Tensor = module.backbone.encode_start(batch.image, blocks)
        return tokens

    count = len(data.part(name))
    keys = [(position, view) for position in range(count) for view in range(views)]  # an image is decoded once
    kept = torch.empty(len(keys), *like.shape[1:], dtype=like.dtype)
    at_once = max(1, AT_ONCE // (like.nbytes * views)) * views
    for start in range(0, len(keys), at_once):
        some = keys[start : start + at_once]
        kept[start : start + len(some)] = encoded_keys(module, data, trainer, name, some, encode)
    by_image: Tensor = kept.unflatten(0, (count, views))
    return by_image.transpose(0, 1)
