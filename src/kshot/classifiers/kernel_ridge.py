"""ProKeR: kernel ridge regression on what the text leaves (Bendou et al. 2025, arXiv:2501.11175)."""

import math
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from kshot.backbones.base import Backbone
from kshot.classifiers.base import Shots, Task, exact
from kshot.classifiers.blend import UNJUDGED, WithText, beats_chance, of_text, require_finite
from kshot.classifiers.leaving_out import judgeable, rounds, turns
from kshot.errors import require
from kshot.judging import best_of, best_scale
from kshot.mahalanobis import exact_unit

SHARPNESS = (1.0, 3.0, 10.0)
STRENGTHS = (0.01, 0.1, 1.0)
ALONE = (3.0, 0.1)  # β and λ where nothing can be judged
MANY = 8192  # images beyond which the answer is computed in float32: 16,000 need 1 GB for K then, and as much to solve
FEW = 1024  # images by which β, λ and the text are chosen, dealt out over the classes; or EACH of every class
EACH = 4


class KernelRidge(WithText):
    """``z = s (p + k(f, X) A)`` with ``A = (K + λ I)⁻¹ (Y - P)`` and ``k(x, x') = exp(-β (1 - xᵀ x'))``.

    p are the zero-shot probabilities of an image and P those of the shots X, so that the kernel corrects the text where
    shots are near, and leaves it alone elsewhere; without text p is the share of each class. β, λ, and whether the text
    enters, are the best on images that are held out, one of each class at a time, by accuracy, then log loss: the
    residuals of those in a round B are ``([(K + λ I)⁻¹]_BB)⁻¹ A_B``, so that nothing is fitted again. s is the inverse
    temperature that suits these predictions. X are the means over the recorded views of unit-length features, (N, D),
    and of unit length themselves.

    Args:
        sharpness: β; None chooses it.
        strength: λ; None chooses it.
        text: start from the text; None chooses it, where the backbone has a text tower.
        templates: as :class:`~kshot.classifiers.TextPrompt`.

    Attributes:
        keys: X, (N, D).
        coefficients: A, (N, C).
        prior: (C,), what takes the place of p without text.
        chosen: β, s, and 1 where the text enters, else 0.
    """

    keys: Tensor
    coefficients: Tensor
    prior: Tensor
    chosen: Tensor
    bound = "each coefficient of its kernel belongs to a training class"

    def __init__(
        self,
        backbone: Backbone,
        task: Task,
        sharpness: float | None = None,
        strength: float | None = None,
        text: bool | None = None,
        templates: Sequence[str] | str | None = None,
    ) -> None:
        super().__init__(backbone, task, text, templates)
        for name, value in (("sharpness", sharpness), ("strength", strength)):
            holds = value is None or 0 < value < math.inf
            require("KernelRidge", name, value, holds, "be above 0, or null to choose it")
        self.sharpness, self.strength, self.text = sharpness, strength, text
        classes = len(task.class_names)
        self.register_buffer("keys", torch.zeros(0, backbone.feature_dim))
        self.register_buffer("coefficients", torch.zeros(0, classes))
        self.register_buffer("prior", torch.full((classes,), 1 / classes))
        self.register_buffer("chosen", torch.tensor([1.0, 1.0, float(self.prompt is not None)]))

    def forward(self, features: Tensor) -> Tensor:
        f, keys, coefficients, prior, chosen = exact(features, self.keys, self.coefficients, self.prior, self.chosen)
        beta, scale, text = chosen
        with torch.autocast(f.device.type, enabled=False):
            moved = kernel(F.normalize(f, dim=-1) @ keys.T, beta) @ coefficients
        if self.prompt is not None:
            prior = torch.where(text > 0, self.prompt(features).softmax(-1), prior)
        logits: Tensor = scale * (prior + moved)
        return logits

    @torch.inference_mode(False)  # a state may be loaded over these later
    @torch.no_grad()
    def fit(self, train: Shots, val: Shots | None) -> None:  # noqa: ARG002  the shots decide
        require_finite(self, train)
        x, label = F.normalize(exact_unit(train.features).mean(0), dim=-1), train.label.cpu()
        classes = len(self.prior)
        y = F.one_hot(label, classes).double()
        start = {False: y.mean(0).expand_as(y)}
        if self.prompt is not None:
            start[True] = of_text(self.prompt, train).softmax(-1)
        some = dealt(label, max(FEW, EACH * classes))
        judged = judgeable(label[some])
        if judged.any():
            texts = [True] if self.text else list(start)
            betas, lambdas = ([v] if v else o for v, o in ((self.sharpness, SHARPNESS), (self.strength, STRENGTHS)))

            left = torch.cat([(y - start[text])[some] for text in texts], 1)
            similar = x[some] @ x[some].T

            def left_out() -> Iterator[tuple[tuple[float, float, bool], Tensor]]:
                for beta in betas:
                    gram = kernel(similar.clone(), beta)
                    for strength in lambdas:
                        residuals = without(inverted(gram, strength), left, label[some]).split(classes, 1)
                        for text, residual in zip(texts, residuals, strict=True):
                            yield (beta, strength, text), (y[some] - residual)[judged]

            (beta, strength, text), logits = best_of(left_out(), label[some][judged])
            scale = best_scale(logits, label[some][judged])
        else:
            beta, strength, scale = self.sharpness or ALONE[0], self.strength or ALONE[1], UNJUDGED
            text = self.prompt is not None and (bool(self.text) or beats_chance(start[True], label))
        x = x if len(x) <= MANY else x.float()
        a = torch.cholesky_solve((y - start[text]).to(x), factor(kernel(x @ x.T, beta), strength))
        self.keys, self.coefficients = x.to(self.keys), a.to(self.coefficients)
        self.prior.copy_(y.mean(0))
        self.chosen.copy_(torch.tensor([beta, scale, float(text)]))


def kernel(similar: Tensor, beta: Tensor | float) -> Tensor:
    """``exp(-β (1 - x kᵀ))``, (B, N), of the cosines ``x kᵀ``, in whose place it is put."""
    return similar.sub_(1).mul_(beta).exp_()


def factor(gram: Tensor, strength: float) -> Tensor:
    """The lower Cholesky factor of ``K + λ I``, (N, N), from a K with ones on its diagonal, on which λ is left."""
    gram.diagonal().fill_(1 + strength)
    lower: Tensor = torch.linalg.cholesky(gram)
    return lower


def inverted(gram: Tensor, strength: float) -> Tensor:
    """``(K + λ I)⁻¹``, (N, N)."""
    return torch.cholesky_inverse(factor(gram, strength))


def without(inverse: Tensor, target: Tensor, label: Tensor) -> Tensor:
    """Residuals, (N, C), of images by answers without their :func:`rounds`: ``[G⁻¹]_BB⁻¹ [G⁻¹ R]_B`` of each round B.

    Args:
        inverse: G⁻¹, (N, N).
        target: R, (N, C).
        label: (N,).
    """
    found = inverse @ target
    for held in rounds(label):
        at = held.nonzero()[:, 0]
        found[at] = torch.linalg.solve(inverse[at[:, None], at], found[at])
    return found


def dealt(label: Tensor, most: int) -> Tensor:
    """Indices of at most ``most`` images, the first of every class, then the second, and so on."""
    return turns(label).argsort(stable=True)[:most].sort().values
