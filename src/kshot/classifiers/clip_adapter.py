"""CLIP-Adapter: a bottleneck mixed into the features (Gao et al. 2021, arXiv:2110.04544)."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kshot.backbones.base import Backbone
from kshot.classifiers.base import Shots, Task, cosine_logits, exact
from kshot.classifiers.zero_shot import TextPrompt
from kshot.errors import require


class CLIPAdapter(TextPrompt):
    """``z = τ cos(r A(f) + (1 - r) f, t_c)`` with ``A(f) = ReLU(W₂ ReLU(W₁ f))``.

    A takes raw features, and the mixture is normalised only afterwards, as in the paper's code. Several ratios are
    trained side by side, on the same batches and from the same initial weights, each as it would be alone; the one that
    is right most often on the validation shots is kept, the first among equals.

    Args:
        ratio: r, or several to choose from; 0 is zero-shot.
        reduction: the bottleneck has D / reduction units.
        text_ratio: r of a second adapter, on the text features; 0 leaves it out.
        templates: as :class:`TextPrompt`.
    """

    chosen: Tensor

    def __init__(
        self,
        backbone: Backbone,
        task: Task,
        ratio: float | list[float] = 0.2,
        reduction: int = 4,
        text_ratio: float = 0.0,
        templates: Sequence[str] | str | None = None,
    ) -> None:
        super().__init__(backbone, task, templates)
        ratios = list(ratio) if isinstance(ratio, Sequence) else [ratio]
        require("CLIPAdapter", "ratio", "an empty list", bool(ratios), "hold at least one number from 0 to 1")
        for name, value in [("ratio", r) for r in ratios] + [("text_ratio", text_ratio)]:
            require("CLIPAdapter", name, value, 0 <= value <= 1, "be from 0 to 1")
        width = backbone.feature_dim
        fits = 1 <= reduction <= width
        require("CLIPAdapter", "reduction", reduction, fits, f"be from 1 to {width}, the feature width")
        self.needs = frozenset({"val"} if len(ratios) > 1 else ())
        self.image_adapter = Bottlenecks(width, width // reduction, ratios)
        self.text_adapter = Bottlenecks(width, width // reduction, [text_ratio] * len(ratios)) if text_ratio else None
        self.register_buffer("chosen", torch.zeros(1, dtype=torch.long))

    def candidates(self, features: Tensor, text: Tensor, which: Tensor | slice) -> Tensor:
        """Logits of some of the ratios, (R, B, C)."""
        images = self.image_adapter(features, which)
        texts = self.text_adapter(text, which) if self.text_adapter is not None else [text] * len(images)
        scale = self.backbone.logit_scale
        return torch.stack([cosine_logits(f, t, scale) for f, t in zip(images, texts, strict=True)])

    def logits(self, features: Tensor, text: Tensor) -> Tensor:
        return self.candidates(features, text, self.chosen)[0]

    def terms(self, features: Tensor, text: Tensor, label: Tensor, teacher: Tensor | None) -> dict[str, Tensor]:  # noqa: ARG002
        every = self.candidates(features, text, slice(None))
        return {"cross_entropy": torch.stack([F.cross_entropy(each, label) for each in every]).sum()}

    @torch.no_grad()
    def select(self, val: Shots) -> None:
        features, label = val.every_view
        right = (self.candidates(features, self.text_features(features), slice(None)).argmax(-1) == label).sum(-1)
        self.chosen.copy_(right.argmax())


class Bottlenecks(nn.Module):
    """``x' = r A(x) + (1 - r) x`` for several r, each with weights of its own that start alike.

    Args:
        width: D.
        hidden: units of the bottleneck.
        ratios: R of them.
    """

    ratio: Tensor

    def __init__(self, width: int, hidden: int, ratios: Sequence[float]) -> None:
        super().__init__()
        down, up = nn.Linear(width, hidden, bias=False), nn.Linear(hidden, width, bias=False)  # for initial values
        self.down = nn.Parameter(down.weight.detach().repeat(len(ratios), 1, 1))  # W₁, (R, hidden, D)
        self.up = nn.Parameter(up.weight.detach().repeat(len(ratios), 1, 1))  # W₂, (R, D, hidden)
        self.register_buffer("ratio", torch.tensor(ratios, dtype=torch.float32).view(-1, 1, 1))

    def forward(self, x: Tensor, which: Tensor | slice) -> Tensor:
        """(R', N, D) of x, (N, D), for some of the ratios."""
        x, down, up, ratio = exact(x, self.down[which], self.up[which], self.ratio[which])
        with torch.autocast(x.device.type, enabled=False):
            return ratio * F.relu(F.relu(x @ down.mT) @ up.mT) + (1 - ratio) * x
