"""Tip-Adapter and Tip-Adapter-F: training images as a cache beside the text (Zhang et al. 2022, arXiv:2207.09519)."""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from kshot.backbones.base import Backbone
from kshot.classifiers.base import Shots, Task, closed_form, exact
from kshot.classifiers.zero_shot import TextPrompt
from kshot.errors import require

AT_ONCE = 2**24  # numbers in the largest tensor of the search: 64 MB


class TipAdapter(TextPrompt):
    """``z = τ f tᵀ + α exp(-β (1 - f Kᵀ)) Y``, all of unit length; nothing is trained.

    The keys K, (N, D), are the training images: the mean over the recorded views of their raw features, then
    normalised. The values Y are their labels, one-hot. ``α = 0`` is zero-shot, and so is a cache before :meth:`fit`.

    Args:
        alpha: weight of the cache; None searches it on the validation shots.
        beta: sharpness of the affinity; None searches it likewise.
        alpha_range: the search takes 20 values from 0.1 to below this one.
        beta_range: the search takes 200 values from 0.1 to below this one.
        templates: as :class:`TextPrompt`; the paper takes ``imagenet7`` for ImageNet.
    """

    keys: Tensor
    values: Tensor
    alpha: Tensor
    beta: Tensor
    bound = "each key of its cache is a training image with the label of a training class"

    def __init__(
        self,
        backbone: Backbone,
        task: Task,
        alpha: float | None = None,
        beta: float | None = None,
        alpha_range: float = 3.0,
        beta_range: float = 7.0,
        templates: Sequence[str] | str | None = None,
    ) -> None:
        super().__init__(backbone, task, templates)
        who = type(self).__name__
        require(who, "alpha", alpha, alpha is None or 0 <= alpha < math.inf, "be at least 0")
        require(who, "beta", beta, beta is None or 0 < beta < math.inf, "be above 0")
        require(who, "alpha_range", alpha_range, 0.1 < alpha_range < math.inf, "be above 0.1")
        require(who, "beta_range", beta_range, 0.1 < beta_range < math.inf, "be above 0.1")
        self.needs = frozenset({"shots", "val"} if alpha is None or beta is None else {"shots"})
        self.alphas = [alpha] if alpha is not None else [0.1 + i * (alpha_range - 0.1) / 20 for i in range(20)]
        self.betas = [beta] if beta is not None else [0.1 + i * (beta_range - 0.1) / 200 for i in range(200)]
        self.register_buffer("alpha", torch.tensor(0.0 if alpha is None else float(alpha)))  # 0 until it is chosen
        self.register_buffer("beta", torch.tensor(1.0 if beta is None else float(beta)))
        self.register_buffer("values", torch.zeros(0, dtype=torch.long))
        self.register_buffer("keys", torch.zeros(0, backbone.feature_dim))

    @torch.inference_mode(False)  # keys may train, and values stand in the graph
    @torch.no_grad()
    def fit(self, train: Shots, val: Shots | None) -> None:
        (features,) = exact(train.features)
        keys = F.normalize(features.mean(0), dim=-1).to(self.keys)
        self.keys = nn.Parameter(keys) if isinstance(self.keys, nn.Parameter) else keys
        self.values = train.label.to(self.values, copy=True)
        if closed_form(self) and "val" in self.needs and val is not None:
            self.select(val)

    def logits(self, features: Tensor, text: Tensor) -> Tensor:
        zero_shot = super().logits(features, text)
        f, keys = exact(features, self.keys)
        with torch.autocast(f.device.type, enabled=False):
            affinity = torch.exp(-self.beta * (1 - keys @ F.normalize(f, dim=-1).T))  # (N, B)
            cache = affinity.new_zeros(zero_shot.mT.shape).index_add(0, self.values, affinity)  # a product with Yᵀ
            return zero_shot + self.alpha * cache.T

    @torch.no_grad()
    def select(self, val: Shots) -> None:
        """Takes the α and β that are right most often; among equals the smallest β, then the smallest α."""
        views, label = val.every_view
        text = self.text_features(views)
        features, known = exact(views, self.keys)
        by_class = [known[self.values == c] for c in range(len(text))]
        chunk = max(1, AT_ONCE // (len(text) * max(1, *map(len, by_class))))
        right = torch.zeros(len(self.betas), len(self.alphas), dtype=torch.long, device=text.device)
        with torch.autocast(text.device.type, enabled=False):
            for some, truth in zip(features.split(chunk), label.split(chunk), strict=True):
                zero_shot, f = super().logits(some, text), F.normalize(some, dim=-1)
                # (keys of a class, C, B), so that a sum over the first takes the place of Y; exp makes the padding 0
                similarity = pad_sequence([keys @ f.T for keys in by_class], padding_value=-math.inf)
                for i, beta in enumerate(self.betas):
                    cache = ((similarity - 1) * beta).exp_().sum(0).T.contiguous()
                    guesses = [torch.add(zero_shot, cache, alpha=alpha).argmax(-1) for alpha in self.alphas]
                    right[i] += torch.stack([(guess == truth).sum() for guess in guesses])
        i, j = divmod(int(right.argmax()), len(self.alphas))
        self.alpha.fill_(self.alphas[j])
        self.beta.fill_(self.betas[i])


class TipAdapterF(TipAdapter):
    """Tip-Adapter whose keys are trained; they start from the cache and are not normalised again.

    Composes with adapters in either tower: the features of a batch then carry gradients, the keys stay their own.

    Args:
        initial_alpha: α in training, where ``alpha`` is to be searched.
        initial_beta: β in training, where ``beta`` is to be searched.
        settings: as :class:`TipAdapter`.
    """

    def __init__(
        self, backbone: Backbone, task: Task, initial_alpha: float = 1.17, initial_beta: float = 1.0, **settings: Any
    ) -> None:
        super().__init__(backbone, task, **settings)
        require("TipAdapterF", "initial_alpha", initial_alpha, 0 < initial_alpha < math.inf, "be above 0")
        require("TipAdapterF", "initial_beta", initial_beta, 0 < initial_beta < math.inf, "be above 0")
        if settings.get("alpha") is None:
            self.alpha.fill_(initial_alpha)
        if settings.get("beta") is None:
            self.beta.fill_(initial_beta)
        del self.keys
        self.keys = nn.Parameter(torch.zeros(0, backbone.feature_dim))
