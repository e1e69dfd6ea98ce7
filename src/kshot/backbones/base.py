"""What every backbone offers: image features, named slots and, for vision-language models, a text tower."""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import sys
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from kshot.errors import UserError
from kshot.layers import AdapterLayer
from kshot.slots import Slot

logger = logging.getLogger("kshot")

# Values that a block of the text tower keeps for the backward pass: a token's, in units of its width, and a pair of
# tokens', in each head (benchmarks/prompts.py compares the estimate with the memory that is taken).
ACTIVATIONS, SCORES = 21, 3


class Backbone(nn.Module, ABC):
    """An image encoder that takes RGB images and owns their normalisation.

    Everything in it starts frozen and in evaluation mode; only adapters and what a method unfreezes ever train.

    Attributes:
        name: architecture and weights, as the config names them.
        image_size: side of the square images it takes, in pixels.
        feature_dim: width of an image feature.
        weight_sha256: digest of the weights as loaded; checkpoints carry it.
        image_blocks: blocks of the image tower that learned tokens can enter; 0 when it takes none.
        image_width: width of its tokens.
    """

    mean: Tensor
    std: Tensor
    trainable_towers = False
    image_blocks: int = 0
    image_width: int = 0

    def __init__(
        self, name: str, image_size: int, feature_dim: int, mean: Sequence[float], std: Sequence[float]
    ) -> None:
        super().__init__()
        self.name, self.image_size, self.feature_dim = name, image_size, feature_dim
        self.weight_sha256 = ""
        self._slots: dict[str, Slot] = {}
        self.shared = nn.ModuleList()  # what the layers of a method share; methods put it here
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1), persistent=False)

    def freeze(self, towers: nn.Module, slots: dict[str, Slot]) -> None:
        """Ends construction: freezes the towers and publishes their slots."""
        towers.requires_grad_(False)
        self._slots = slots
        self.eval()

    @abstractmethod
    def encode_normalised(self, image: Tensor) -> Tensor:
        """Image features, (B, feature_dim), of normalised images, (B, 3, H, W)."""

    def encode_prompted(self, image: Tensor, prompts: Sequence[Tensor]) -> Tensor:
        """The same with learned tokens, as :meth:`encode_image`; for a tower with ``image_blocks``."""
        raise NotImplementedError(f"the image tower of {self.name} takes no learned tokens")

    def encode_image(self, image: Tensor, prompts: Sequence[Tensor] = ()) -> Tensor:
        """Image features, not normalised to unit length.

        Args:
            image: (B, 3, image_size, image_size), uint8, or floats in [0, 1].
            prompts: learned tokens, (n, image_width) for each of the first blocks; those of the first stand behind the
                tokens of the image, those of a later block replace them (Jia et al. 2022, arXiv:2203.12119).

        Returns:
            (B, feature_dim).
        """
        image = image.float() / 255 if image.dtype == torch.uint8 else image
        image = (image - self.mean) / self.std
        return self.encode_prompted(image, prompts) if prompts else self.encode_normalised(image)

    def slots(self) -> dict[str, Slot]:
        """All slots by canonical name, ``<tower>.<block>.<q|k|v|o|fc1|fc2>``.

        Gated MLPs (SwiGLU) that keep gate and input apart have ``fc1_g`` and ``fc1_x`` instead of ``fc1``; the pattern
        ``*.fc*`` takes all.
        """
        return dict(self._slots)

    def fused_slots(self) -> dict[str, Slot]:
        """Projections of several parts as one slot each, ``<tower>.<block>.qkv``: one matrix of all their rows."""
        fused = {}
        for name, slot in self._slots.items():
            if len(slot.projection.sizes) > 1:
                whole = slot.projection.whole
                fused_name = name.removesuffix(slot.part) + whole
                fused[fused_name] = Slot(fused_name, slot.projection, whole)
        return fused

    @abstractmethod
    def named_tower_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """All parameters but adapters', under names that begin with ``image.`` or ``text.``."""

    def trainable(self, tower: str) -> list[nn.Parameter]:
        """What trains in a tower, ``image`` or ``text``, adapters included."""
        own = [p for name, p in self.named_tower_parameters() if name.startswith(f"{tower}.") and p.requires_grad]
        adapted = {id(s.projection): s.projection for name, s in self._slots.items() if name.startswith(f"{tower}.")}
        layers = [p for projection in adapted.values() for p in projection.sources()]
        return list({id(p): p for p in own + layers}.values())  # layers may share a tensor

    def settled(self, tower: str) -> bool:
        """True while a tower gives the same features whenever it is asked, so that they may be kept.

        It does not while a gradient is wanted of it, while dropout is active in its adapters, or while they are off.
        """
        projections = [slot.projection for name, slot in self._slots.items() if name.startswith(f"{tower}.")]
        adapted = [p for p in projections if p.adapters]
        if torch.is_grad_enabled() and self.trainable(tower):
            return False
        return all(p.enabled and not any(layer.training for layer in p.adapters.values()) for p in adapted)

    def train(self, mode: bool = True) -> Backbone:
        """Switches adapters; the frozen towers stay in evaluation mode unless a method trains them as a whole."""
        super().train(mode and self.trainable_towers)
        for module in self.modules():
            if isinstance(module, AdapterLayer):
                module.train(mode)
        return self


class VisionLanguageBackbone(Backbone):
    """A backbone with a text tower.

    Attributes:
        text_width: width of a token embedding.
        text_blocks: blocks of the text tower.
        text_heads: attention heads of one.
        context_length: positions that a prompt can take.
        supports_prompts: False when the text tower takes no embeddings in place of tokens.
        text_memory: bytes that the activations of the text tower may take; None for a quarter of the device's memory.
        chunks: how many parts the last prompts were divided into to keep within that.
    """

    text_width: int
    text_blocks: int
    text_heads: int
    context_length: int
    supports_prompts: bool
    text_memory: int | None = None
    chunks: int = 1
    said: frozenset[str] = frozenset()  # what was logged about it

    @property
    @abstractmethod
    def logit_scale(self) -> Tensor:
        """The frozen inverse temperature, exp already applied: a scalar."""

    @abstractmethod
    def token_ids(self, text: str) -> list[int]:
        """Tokens of a text without start, end and padding."""

    @abstractmethod
    def tokenize(self, texts: Sequence[str]) -> Tensor:
        """Padded tokens with start and end, (N, context_length), int64.

        Raises:
            UserError: a text does not fit; it is named with its number of tokens.
        """

    @abstractmethod
    def embed_tokens(self, tokens: Tensor) -> Tensor:
        """Frozen token embeddings, (..., text_width), without positions."""

    @abstractmethod
    def end_of_text(self, tokens: Tensor) -> Tensor:
        """Position of the token at which each row of (N, L) is pooled, (N,)."""

    def encode_embeddings(self, prefix: Tensor, suffix: Tensor, end: Tensor, deep: Tensor | None = None) -> Tensor:
        """Text features of prompts that share a prefix, in as many parts as the memory budget asks for.

        With a gradient, each of several parts is computed again in the backward pass instead of being kept.

        Args:
            prefix: (G, P, text_width) embeddings of the shared first tokens, start token included, in G groups.
            suffix: (G, C, S, text_width) embeddings of what differs by class, padding included.
            end: (C,) position of the end token in the whole prompt, in P ... P+S-1.
            deep: (J - 1, n, text_width) tokens that take the places 1 ... n, which lie in the prefix, before block
                2 ... J (Khattak et al. 2022, arXiv:2210.03117).

        Returns:
            (G, C, feature_dim), not normalised to unit length.
        """
        if torch.compiler.is_compiling():
            return self.encode_part(prefix, suffix, end, deep)
        learned = [t for t in (prefix, suffix, deep) if t is not None and t.requires_grad]
        gradient = torch.is_grad_enabled() and bool(learned or self.trainable("text"))
        groups, classes = self.part_size(prefix, suffix, gradient)
        if groups >= len(suffix) and classes >= suffix.shape[1]:
            return self.encode_part(prefix, suffix, end, deep)

        def encode(*part: Any) -> Tensor:
            return_freed_memory(prefix.device)
            return self.encode_part(*part)

        rows, order = [], end.argsort(stable=True)  # prompts of like length together: a part ends with its longest
        for g in range(0, len(suffix), groups):
            parts = []
            for chosen in order.split(classes):
                longest = int(end[chosen].max()) + 1 - prefix.shape[1]
                own = suffix[g : g + groups, chosen.to(suffix.device), :longest]
                part = (prefix[g : g + groups], own, end[chosen], deep)
                parts.append(checkpoint(encode, *part, use_reentrant=False) if gradient else encode(*part))
            rows.append(torch.cat(parts, 1)[:, order.argsort().to(suffix.device)])
        return torch.cat(rows)

    @abstractmethod
    def encode_part(self, prefix: Tensor, suffix: Tensor, end: Tensor, deep: Tensor | None) -> Tensor:
        """:meth:`encode_embeddings` at once."""

    def part_size(self, prefix: Tensor, suffix: Tensor, gradient: bool) -> tuple[int, int]:
        """Groups and classes that are encoded at once, so that their activations keep within ``text_memory``.

        Several groups only with all their classes. What is chosen is logged, each choice once.
        """
        (groups, p, width), (classes, s) = prefix.shape, suffix.shape[1:3]
        device = prefix.device.type
        size = torch.get_autocast_dtype(device).itemsize if torch.is_autocast_enabled(device) else prefix.itemsize
        kept = (ACTIVATIONS * width + SCORES * self.text_heads * (p + s)) * (self.text_blocks if gradient else 1)
        token, budget = kept * size, self.text_memory or memory_of(prefix.device) // 4
        fit = budget // token  # tokens
        most = max(1, min(groups, fit // (p + classes * s))), max(1, min(classes, (fit - p) // s))
        parts = [-(-n // m) for n, m in zip((groups, classes), most, strict=True)]
        size_of = -(-groups // parts[0]), -(-classes // parts[1])  # parts of one size, or nearly
        chunks = parts[0] * parts[1]
        if chunks > 1:
            again = ", each computed again in the backward pass" if gradient else ""
            message = (
                f"Text tower: {groups * classes:,} prompts in {chunks} parts of {size_of[0] * size_of[1]:,}{again}, to "
                f"keep within {budget / 1e9:.3g} GB (model.backbone.text_memory_gb)."
            )
            if message not in self.said:  # training and validation take turns
                self.said |= {message}
                logger.info(message)
        self.chunks = chunks
        return size_of

    @abstractmethod
    def encode_tokens(self, tokens: Tensor) -> Tensor:
        """Text features, (N, feature_dim), of padded tokens, (N, context_length), at the least exact cost."""


def require_text(backbone: Backbone, who: str) -> VisionLanguageBackbone:
    """The backbone, if it has a text tower.

    Raises:
        UserError: it has none.
    """
    if not isinstance(backbone, VisionLanguageBackbone):
        raise UserError(
            f"{who} needs a text tower, and {backbone.name} has none: use an OpenClip backbone, or the classifier "
            "LinearProbe, LogisticProbe, NearestClassMean or VPT."
        )
    return backbone


def require_prompts(backbone: Backbone, who: str) -> VisionLanguageBackbone:
    """The backbone, if its text tower takes learned embeddings.

    Raises:
        UserError: it does not.
    """
    text = require_text(backbone, who)
    if not text.supports_prompts:
        raise UserError(
            f"{who} learns prompt embeddings, which the text tower of {text.name} cannot take: it is not causal, pools "
            "elsewhere than at the end token, or its tokenizer has no start token."
        )
    return text


def require_image_prompts(backbone: Backbone, who: str) -> None:
    """Makes sure that learned tokens can enter the image tower.

    Raises:
        UserError: they cannot.
    """
    if not backbone.image_blocks:
        raise UserError(
            f"{who} puts learned tokens into the image tower, which that of {backbone.name} cannot take: use a plain "
            "vision transformer (no ResNet, no rotary positions)."
        )


def run_prompted(blocks: Iterable[nn.Module], x: Tensor, prompts: Sequence[Tensor]) -> Tensor:
    """Runs blocks on tokens, (B, L, width), with prompts behind them; returns the L tokens without prompts.

    Args:
        blocks: of the tower.
        x: (B, L, width).
        prompts: (n, width) for each of the first blocks; after these, the states of the last ones stay.
    """
    length = x.shape[1]
    for block, prompt in zip_longest(blocks, prompts):
        if prompt is not None:
            x = torch.cat([x[:, :length], prompt.to(x.dtype).expand(len(x), -1, -1)], 1)
        x = block(x)
    return x[:, :length]


def return_freed_memory(device: torch.device) -> None:
    """Hands memory that was freed back to the system.

    glibc keeps what lies between small blocks that live on, and over the many parts of a step that is a quarter of all
    activations. Accelerators have allocators of their own.
    """
    if device.type == "cpu" and sys.platform == "linux":
        with suppress(AttributeError):  # other C libraries have no such call
            ctypes.CDLL(None).malloc_trim(0)


def memory_of(device: torch.device) -> int:
    """Bytes of memory that a device has in all."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    if not hasattr(os, "sysconf"):  # Windows does not say
        return 8 * 10**9
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def sha256_of(model: nn.Module) -> str:
    """SHA-256 over names, shapes and values of a model's state, independent of device and of module order."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        value = tensor.detach().cpu().contiguous()
        digest.update(f"{name} {tuple(value.shape)} {value.dtype}\n".encode())
        digest.update(
            value.view(torch.uint8).numpy().data if value.ndim else value.reshape(1).view(torch.uint8).numpy()
        )
    return digest.hexdigest()


def check_image_size(image_size: int, patch: int, name: str) -> None:
    """Raises UserError unless the patches tile the image."""
    if image_size < patch or image_size % patch:
        below, above = max(patch, image_size // patch * patch), (image_size // patch + 1) * patch
        raise UserError(
            f"image_size {image_size} is not a multiple of the patch size {patch} of {name}: use {below} or {above}."
        )
