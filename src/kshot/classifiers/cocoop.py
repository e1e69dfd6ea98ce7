"""CoCoOp: a context for each image (Zhou et al. 2022, arXiv:2203.05557)."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from kshot.backbones.base import Backbone
from kshot.classifiers.base import Task, exact, exact_linear
from kshot.classifiers.coop import CoOp
from kshot.errors import require


class CoCoOp(CoOp):
    """CoOp whose context is shifted by a small net of the image: ``V_b = V + 1 h(f̂_b)ᵀ`` (the paper's equation 3).

    The prompts of all images of a batch run together where the backbone's memory budget allows it. Where it allows
    those of a few images, a step takes the images in groups, see :class:`ByGroups`; where not even one image's fit, the
    backbone divides them.

    Args:
        context_length: M; None takes the length of ``init_words``, or 16.
        init_words: start of V.
        reduction: width of the image features over that of the meta-net's hidden layer.
    """

    def __init__(
        self,
        backbone: Backbone,
        task: Task,
        context_length: int | None = None,
        init_words: str | None = "a photo of a",
        reduction: int = 16,
    ) -> None:
        super().__init__(backbone, task, context_length, init_words=init_words)
        width = backbone.feature_dim
        fits = 1 <= reduction <= width
        require("CoCoOp", "reduction", reduction, fits, f"lie between 1 and the feature width {width}")
        down, up = nn.Linear(width, width // reduction), nn.Linear(width // reduction, self.context.shape[-1])
        self.meta_net = nn.Sequential(down, nn.ReLU(), up)

    def hold(self) -> Tensor | None:
        return None  # every image has text features of its own

    def contexts(self, features: Tensor) -> Tensor:
        """V_b, (B, M, text width)."""
        down, _, up = self.meta_net
        (features,) = exact(features)
        shift = exact_linear(up, F.relu(exact_linear(down, F.normalize(features, dim=-1))))
        return (self.context + shift.unsqueeze(1)).to(self.rest.dtype)

    def text_features(self, features: Tensor) -> Tensor:
        """Class features, (B, C, D), one set an image."""
        return self.backbone.encode_embeddings(*self.shared_prompts(self.contexts(features)), self.end)

    def losses(self, features: Tensor, label: Tensor, teacher: Tensor | None = None) -> dict[str, Tensor]:
        together = self.images_together(features)
        if together >= len(features):
            return super().losses(features, label, teacher)
        trained = [p for p in self.parameters() if p.requires_grad]
        loss: Tensor = ByGroups.apply(self, together, label, features, *trained)
        return {"cross_entropy": loss}

    def images_together(self, features: Tensor) -> int:
        """How many images a step of training takes at once, so that the prompts of each are encoded in one part."""
        device, images = features.device.type, len(features)
        if not torch.is_grad_enabled() or torch.compiler.is_compiling():
            return images
        if torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) == torch.float16:
            return images  # gradients are scaled after the loss, and would underflow before
        with torch.no_grad():
            prompts = self.shared_prompts(self.context.to(self.rest.dtype).expand(images, -1, -1))
        together, classes = self.backbone.part_size(*prompts, True)
        return together if classes == len(self.rest) else images


class ByGroups(torch.autograd.Function):
    """The mean loss of a batch, and its gradients, group of images by group: nothing is kept, or computed twice."""

    @staticmethod
    def forward(ctx: Any, classifier: CoCoOp, size: int, label: Tensor, features: Tensor, *trained: Tensor) -> Tensor:
        """The loss, from features, (B, D), and all tensors that it may depend on."""
        own = features.detach().requires_grad_()
        sources = [own, *trained]
        gradients: list[Tensor | None] = [None] * len(sources)
        losses = []
        for start in range(0, len(label), size):
            group = slice(start, start + size)
            with torch.enable_grad():
                mean = super(CoCoOp, classifier).losses(own[group], label[group])["cross_entropy"]
                loss = mean * (len(label[group]) / len(label))
            losses.append(loss.detach())
            for i, found in enumerate(torch.autograd.grad(loss, sources, allow_unused=True)):
                before = gradients[i]
                gradients[i] = found if found is None or before is None else before + found
        ctx.gradients = gradients
        return torch.stack(losses).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, scale: Tensor) -> tuple[Any, ...]:
        """The gradients that the forward pass found, scaled."""
        return (None, None, None, *(None if g is None else g * scale.to(g.dtype) for g in ctx.gradients))
