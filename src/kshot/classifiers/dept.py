"""DePT: decoupled prompt tuning (Zhang et al. 2023, arXiv:2309.07439), around any other prompt method."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kshot.backbones.base import Backbone
from kshot.backbones.language import require_text
from kshot.classifiers.base import Around, ClassifierFactory, Task, TextClassifier, closed_form, exact, exact_linear
from kshot.classifiers.coop import CoOp
from kshot.classifiers.vpt import VPT
from kshot.errors import UserError, require


class DePT(Around):
    """Adds a channel-adjusted transfer (CAT) head, which keeps what is special to the training classes.

    With ``cwT(u) = γ ⊙ u + β`` for each modality (the paper's equation 4), text features t_y of the images' own classes
    and X = [cwT(t_y); cwT(f)], both not normalised::

        L = (1 - λ) CE(z_base, y) + λ CE(X Wᵀ + b, [y; y]) + further terms of the base
        z = (1 - λ) z_base + λ (cwT(f) Wᵀ + b)      for the training classes and subsets of them
        z = z_base                                  for any other classes

    As in the paper's code, further terms keep their weight: KgCoOp's knowledge, PromptSRC's regularisers.

    Args:
        base: the prompt method, VPT before one included; what compares with no text is refused.
        balance: λ.
        rate_factor: learning rate of the CAT head over the optimizer's.

    Attributes:
        innermost: the base, or the head of a base that puts learned tokens before it.
        trained_on: names of the training classes.
        rows: of W for the present classes, (C,); None where these are other classes.
    """

    rows: Tensor | None

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
        if not isinstance(self.innermost, TextClassifier) or closed_form(self.inner) or "unprojected" in self.needs:
            raise UserError(
                f"DePT needs a base that learns prompts, such as CoOp or PromptSRC, not {type(self.inner).__name__}."
            )
        require("DePT", "balance", balance, 0 <= balance <= 1, "lie in [0, 1]")
        require("DePT", "rate_factor", rate_factor, rate_factor > 0, "be positive")
        self.balance, self.rate_factor = balance, rate_factor
        width = backbone.feature_dim
        self.text_gain, self.image_gain = (nn.Parameter(torch.ones(width)) for _ in range(2))  # γ
        self.text_shift, self.image_shift = (nn.Parameter(torch.zeros(width)) for _ in range(2))  # β
        self.head = nn.Linear(width, len(task.class_names))
        self.trained_on = task.class_names
        self.register_buffer("rows", torch.arange(len(task.class_names)), persistent=False)

    @property
    def innermost(self) -> Any:  # a TextClassifier, but for what the constructor refuses
        return self.inner.inner if isinstance(self.inner, VPT) else self.inner

    def losses(self, features: Tensor, label: Tensor, teacher: Tensor | None = None) -> dict[str, Tensor]:
        text: Tensor = self.innermost.text_features(features)
        terms: dict[str, Tensor] = self.innermost.terms(features, text, label, teacher)
        scaled = {name: (1 - self.balance) * term for name, term in terms.items() if name == "cross_entropy"}
        own = text[label] if text.ndim == 2 else text[torch.arange(len(label), device=label.device), label]
        adjusted = [adjust(own, self.text_gain, self.text_shift), self.adjusted_images(features)]
        transfer = F.cross_entropy(exact_linear(self.head, torch.cat(adjusted)), label.repeat(2))
        return terms | scaled | {"transfer": self.balance * transfer}

    def forward(self, features: Tensor) -> Tensor:
        logits: Tensor = self.inner(features)
        if self.rows is None:
            return logits
        transfer = exact_linear(self.head, self.adjusted_images(features))
        return (1 - self.balance) * logits + self.balance * transfer[:, self.rows]

    def adjusted_images(self, features: Tensor) -> Tensor:
        """CwT of image features, (B, D)."""
        return adjust(features, self.image_gain, self.image_shift)

    @torch.inference_mode(False)
    def set_class_names(self, class_names: Sequence[str], templates: Sequence[str] | None = None) -> None:
        super().set_class_names(class_names, templates)
        names, known = self.task.class_names, self.trained_on
        rows = [known.index(name) for name in names if name in known]
        if names == known:  # names may be there twice
            rows = list(range(len(known)))
        self.rows = torch.tensor(rows, device=self.text_gain.device) if len(rows) == len(names) else None

    def param_groups(self) -> list[dict[str, Any]]:
        own = [self.text_gain, self.image_gain, self.text_shift, self.image_shift, *self.head.parameters()]
        return [*self.inner.param_groups(), {"params": own, "head": True, "lr_factor": self.rate_factor}]


def adjust(x: Tensor, gain: Tensor, shift: Tensor) -> Tensor:
    """CwT of features, (B, D)."""
    x, gain, shift = exact(x, gain, shift)
    return x * gain + shift
