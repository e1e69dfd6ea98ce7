"""DePT: decoupled prompt tuning (Zhang et al. 2023, arXiv:2309.07439), around any other prompt method."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kshot.backbones.base import Backbone, require_text
from kshot.classifiers.base import ClassifierFactory, Task
from kshot.classifiers.coop import CoOp
from kshot.classifiers.wrapper import Wrapper
from kshot.errors import UserError


class DePT(Wrapper):
    """Adds a channel-adjusted transfer (CAT) head, which keeps what is special to the training classes.

    With ``cwT(u) = γ ⊙ u + β`` for each modality (the paper's equation 4), text features t_y of the images' own classes
    and X = [cwT(t_y); cwT(f)], both not normalised::

        L = (1 - λ) L_base + λ CE(X Wᵀ + b, [y; y])
        z = (1 - λ) z_base + λ (cwT(f) Wᵀ + b)      for the training classes and subsets of them
        z = z_base                                  for any other classes

    Args:
        backbone: as the base method needs it.
        task: of the training classes, to which W belongs.
        base: the prompt method; all terms of its loss count as L_base.
        balance: λ.
        rate_factor: learning rate of the CAT head over the optimizer's.

    Raises:
        UserError: ``balance`` outside [0, 1]; a base that compares with no text.
    """

    def __init__(
        self,
        backbone: Backbone,
        task: Task,
        base: ClassifierFactory = CoOp,
        balance: float = 0.7,
        rate_factor: float = 6.5,
    ) -> None:
        require_text(backbone, "DePT")
        super().__init__(backbone, task, base)
        if not self.inner.compares_text or self.inner.closed_form:
            raise UserError(
                f"DePT needs a base that learns prompts, such as CoOp or PromptSRC, not {type(self.inner).__name__}."
            )
        if not 0 <= balance <= 1:
            raise UserError(f"DePT: balance is {balance}, and must lie in [0, 1].")
        if not rate_factor > 0:
            raise UserError(f"DePT: rate_factor is {rate_factor}, and must be positive.")
        self.balance, self.rate_factor = balance, rate_factor
        width = backbone.feature_dim
        self.text_gain, self.image_gain = (nn.Parameter(torch.ones(width)) for _ in range(2))  # γ
        self.text_shift, self.image_shift = (nn.Parameter(torch.zeros(width)) for _ in range(2))  # β
        self.head = nn.Linear(width, len(task.class_names))
        self.trained_on = task.class_names

    def own_parameters(self) -> list[nn.Parameter]:
        """γ, β, W and b."""
        return [self.text_gain, self.image_gain, self.text_shift, self.image_shift, *self.head.parameters()]

    def head_parameters(self) -> list[nn.Parameter]:
        return [*super().head_parameters(), *self.own_parameters()]

    def rate_factors(self) -> dict[nn.Parameter, float]:
        return self.inner.rate_factors() | dict.fromkeys(self.own_parameters(), self.rate_factor)

    def terms(self, features: Tensor, text: Tensor, label: Tensor, frozen: Tensor | None) -> dict[str, Tensor]:
        base = super().terms(features, text, label, frozen)
        own = text[label] if text.ndim == 2 else text[torch.arange(len(label), device=label.device), label]
        with torch.autocast(features.device.type, enabled=False):
            x = torch.cat([own.float() * self.text_gain + self.text_shift, self.adjusted(features)])
            transfer = F.cross_entropy(self.head(x), label.repeat(2))
        return {name: (1 - self.balance) * term for name, term in base.items()} | {"transfer": self.balance * transfer}

    def adjusted(self, features: Tensor) -> Tensor:
        """CwT of image features, (B, D)."""
        return features.float() * self.image_gain + self.image_shift

    def forward(self, features: Tensor) -> Tensor:
        logits = super().forward(features)
        weight: Tensor = self.head.weight
        bias: Tensor = self.head.bias
        if self.task.class_names != self.trained_on:
            if not set(self.task.class_names) <= set(self.trained_on):
                return logits
            rows = [self.trained_on.index(name) for name in self.task.class_names]
            weight, bias = weight[rows], bias[rows]
        with torch.autocast(features.device.type, enabled=False):
            transfer = F.linear(self.adjusted(features), weight, bias)
        return (1 - self.balance) * logits + self.balance * transfer
