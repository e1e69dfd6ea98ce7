"""What a classifier makes of image features: a matrix where it is one, else a program."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from kshot.export.program import traced
from kshot.export.written import facts_of
from kshot.holding import merged
from kshot.opening import OpenRun

MATRIX, PROGRAM = "head.safetensors", "head.pt2"
SAME = 1e-5  # of logits over their largest, between a classifier and the matrix that was read off it
KINDS = ("linear", "cosine")


class Head(NamedTuple):
    """``z = x Wᵀ + b`` of features x, or of features of unit length where the kind is cosine."""

    kind: str
    weight: Tensor
    bias: Tensor

    def logits(self, features: Tensor) -> Tensor:
        """(B, classes) from features, (B, D)."""
        x = F.normalize(features, dim=-1) if self.kind == "cosine" else features
        return x @ self.weight.T + self.bias


@torch.no_grad()
def head_of(run: OpenRun) -> Head | None:
    """The matrix that a classifier is, found by asking it, so that it holds for each of them; None where it is none.

    Its answers to the unit vectors are the columns of W, that to zero is b; others tell of which kind it is.
    """
    classifier, width = run.module.classifier, run.module.backbone.feature_dim
    noise = torch.randn(64, width, generator=torch.Generator().manual_seed(0))
    noise *= torch.logspace(-1, 1, 64)[:, None]
    with merged(run.module):
        answers = classifier(noise).float()
        bias = classifier(torch.zeros(1, width)).float()[0]
        weight = torch.cat([classifier(some).float() - bias for some in torch.eye(width).split(64)]).T.contiguous()
    for kind in KINDS:
        head = Head(kind, weight, bias)
        if (head.logits(noise) - answers).abs().max() <= SAME * answers.abs().max():
            return head
    return None


class HeadProgram(nn.Module):
    """A classifier as a function of features."""

    def __init__(self, classifier: Any) -> None:
        super().__init__()
        self.classifier = classifier

    def forward(self, features: Tensor) -> Tensor:
        """Logits, (B, classes) float32, of features, (B, D)."""
        logits: Tensor = self.classifier(features).float()
        return logits


def write_head(run: OpenRun, folder: Path) -> Any:
    """Writes ``head.safetensors`` or ``head.pt2``; gives what is read back from it, from features to logits."""
    told, head = json.dumps(facts_of(run)), head_of(run)
    if head is None:
        with merged(run.module):
            program = traced(HeadProgram(run.module.classifier), torch.zeros(2, run.module.backbone.feature_dim))
        torch.export.save(program, folder / PROGRAM, extra_files={"kshot.json": told})
        return torch.export.load(folder / PROGRAM).module()
    save_file({"weight": head.weight, "bias": head.bias}, folder / MATRIX, {"kind": head.kind, "kshot": told})
    return read_head(folder / MATRIX).logits


def read_head(path: Path) -> Head:
    """The matrix in a file."""
    with safe_open(path, framework="pt") as file:
        return Head(file.metadata()["kind"], file.get_tensor("weight"), file.get_tensor("bias"))
