"""Backbones with a text tower: prompts that share a prefix, in as many parts as a memory budget asks for."""

from __future__ import annotations

import ctypes
import functools
import logging
import sys
from abc import abstractmethod
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from kshot.backbones.base import Backbone
from kshot.errors import UserError
from kshot.files import memory_of_machine

logger = logging.getLogger("kshot")

# Values that a block of the text tower keeps for the backward pass: a token's, in units of its width, and a pair of
# tokens', in each head (benchmarks/prompts.py compares the estimate with the memory that is taken).
ACTIVATIONS, SCORES = 21, 3


class VisionLanguageBackbone(Backbone):
    """A backbone with a text tower."""

    text_width: int  # of a token embedding
    text_blocks: int
    text_heads: int  # of attention, in a block
    context_length: int  # positions that a prompt can take
    supports_prompts: bool  # False when the text tower takes no embeddings in place of tokens
    text_memory: int | None = None  # bytes that its activations may take; None for a quarter of the device's memory
    chunks: int = 1  # how many parts the last prompts were divided into to keep within that
    said: frozenset[str] = frozenset()  # what was logged about it

    def detach(self) -> None:
        super().detach()
        for name in ("chunks", "said"):
            vars(self).pop(name, None)

    @property
    @abstractmethod
    def logit_scale(self) -> Tensor:
        """The frozen inverse temperature, exp already applied: a scalar.

        A model's own logits may have a bias beside it (SigLIP's). It is the same for all classes, so that neither
        softmax nor cross-entropy nor their gradients know of it: logits here go without.
        """

    @property
    def projection(self) -> Tensor | None:
        """The last map of the image tower as a matrix, (width, feature_dim), frozen; None where that is none."""
        return None

    @abstractmethod
    def token_ids(self, text: str) -> list[int]:
        """Tokens of a text without start, end and padding."""

    @abstractmethod
    def tokenize(self, texts: Sequence[str]) -> Tensor:
        """Padded tokens with start and end, (N, context_length), int64; raises UserError for one that is too long."""

    @abstractmethod
    def embed_tokens(self, tokens: Tensor) -> Tensor:
        """Frozen token embeddings, (..., text_width), without positions."""

    @abstractmethod
    def end_of_text(self, tokens: Tensor) -> Tensor:
        """Position of the token at which each row of (N, L) is pooled, (N,)."""

    def encode_embeddings(self, prefix: Tensor, suffix: Tensor, end: Tensor, deep: Tensor | None = None) -> Tensor:
        """Text features, (G, C, feature_dim), not normalised to unit length, of prompts that share a prefix.

        They are encoded in as many parts as the memory budget asks for; with a gradient, each of several parts is
        computed again in the backward pass instead of being kept.

        Args:
            prefix: (G, P, text_width) embeddings of the shared first tokens, start token included, in G groups.
            suffix: (G, C, S, text_width) embeddings of what differs by class, padding included.
            end: (C,) position of the end token in the whole prompt, in P ... P+S-1; on the CPU, so that no device is
                waited for.
            deep: (J - 1, n, text_width) tokens that take the places 1 ... n, which lie in the prefix, before block
                2 ... J (Khattak et al. 2022, arXiv:2210.03117).
        """
        if torch.compiler.is_compiling():
            return self.encode_part(prefix, suffix, end, deep)
        learned = any(t is not None and t.requires_grad for t in (prefix, suffix, deep))
        gradient = torch.is_grad_enabled() and (learned or bool(self.trainable("text")))
        groups, classes = self.part_size(prefix, suffix, gradient)
        if groups >= len(suffix) and classes >= suffix.shape[1]:
            with self.passing("text"):
                return self.encode_part(prefix, suffix, end, deep)

        def encode(*part: Any) -> Tensor:
            return_freed_memory(prefix.device)
            with self.passing("text"):
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
            message = (
                f"Text tower: {groups * classes:,} prompts in {chunks} parts of {size_of[0] * size_of[1]:,}, to keep "
                f"within {budget / 1e9:.3g} GB (model.backbone.text_memory_gb)."
            )
            if message not in self.said:  # training and validation take turns
                self.said |= {message}
                logger.info(message)
        self.chunks = chunks
        return size_of

    @abstractmethod
    def encode_tokens(self, tokens: Tensor) -> Tensor:
        """Text features, (N, feature_dim), of padded tokens, (N, context_length), at the least exact cost."""


def projected(features: Tensor, projection: Tensor) -> Tensor:
    """Features, (B, D), times the matrix of a projection, (D, D'), in the wider dtype and at least float32."""
    dtype = torch.promote_types(torch.promote_types(features.dtype, projection.dtype), torch.float32)
    with torch.autocast(features.device.type, enabled=False):
        return features.to(dtype) @ projection.to(dtype)


def require_text(backbone: Backbone, who: str) -> VisionLanguageBackbone:
    """The backbone as one with a text tower; raises UserError where it has none, or other features."""
    if not isinstance(backbone, VisionLanguageBackbone):
        raise UserError(
            f"{who} needs a text tower, and {backbone.name} has none: use an OpenClip backbone, or the classifier "
            "LinearProbe, LogisticProbe, NearestClassMean or VPT."
        )
    if backbone.features != "default":
        raise UserError(
            f"{who} compares images with texts, and features: {backbone.features} of {backbone.name} have no texts to "
            "compare with: use features: default, or the classifier LinearProbe, LogisticProbe or NearestClassMean."
        )
    return backbone


def require_prompts(backbone: Backbone, who: str) -> VisionLanguageBackbone:
    """The backbone as one whose text tower takes learned embeddings; raises UserError where it does not."""
    text = require_text(backbone, who)
    if not text.supports_prompts:
        raise UserError(
            f"{who} learns prompt embeddings, which the text tower of {text.name} cannot take: it is not causal, pools "
            "elsewhere than at the end token, or its tokenizer has no start token."
        )
    return text


def return_freed_memory(device: torch.device) -> None:
    """Hands memory that was freed back to the system.

    glibc keeps what lies between small blocks that live on, and over the many parts of a step that is a quarter of all
    activations. Accelerators have allocators of their own.
    """
    if device.type == "cpu" and sys.platform == "linux":
        with suppress(AttributeError):  # other C libraries have no such call
            ctypes.CDLL(None).malloc_trim(0)


@functools.cache  # the limits of a container lie in files, and reading them takes as long as a small block
def memory_of(device: torch.device) -> int:
    """Bytes of memory that a device has in all; 8 GB where the system does not tell."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return memory_of_machine() or 8 * 10**9
