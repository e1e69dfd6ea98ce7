"""Prompt methods computed plainly: hooks put learned tokens into the untouched model of open_clip or timm."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import towers
from torch import Tensor

from kshot.classifiers import Task

NAMES = ("cat", "dog", "yellow bird", "very small old car", "tree", "sea horse", "house", "pen", "cup", "x")
TASK = Task(NAMES[:4])


def made(kind: Callable[..., Any], name: str = "clip", names: Sequence[str] = NAMES[:4], **settings: Any) -> Any:
    """A classifier on a tiny backbone, the same each time."""
    backbone = towers.backbone(name)
    torch.manual_seed(3)
    return kind(backbone, Task(tuple(names)), **settings)


def encode(classifier: Any, images: Tensor) -> Tensor:
    """Image features, with the tokens that the classifier puts into the image tower."""
    return classifier.backbone.encode_image(images, classifier.image_tokens())


def teacher_of(classifier: Any, images: Tensor) -> Tensor:
    """Image features of the untouched backbone."""
    with classifier.backbone.unadapted(), torch.no_grad():
        return classifier.backbone.encode_image(images)


def saved(classifier: Any) -> dict[str, Tensor]:
    """What a checkpoint holds of a classifier."""
    return {name: tensor for name, tensor in classifier.state_dict().items() if "backbone." not in name}


def trained(module: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """What trains, by name."""
    return {name: p for name, p in module.named_parameters() if p.requires_grad}


@torch.no_grad()
def disturb(module: torch.nn.Module, amount: float = 0.3) -> Any:
    """Takes what trains away from where it starts, in the same way each time."""
    generator = torch.Generator().manual_seed(11)
    for parameter in trained(module).values():
        parameter.add_(amount * torch.randn(parameter.shape, generator=generator))
    return module


def prompt_tokens(backbone: Any, length: int, names: Sequence[str] = NAMES[:4], words: str = "") -> Tensor:
    """Tokens of ``X X ... words name.``, (C, 77); X is one token and stands where a learned one goes."""
    return backbone.tokenize([" ".join([*["X"] * length, *words.split(), f"{name}."]) for name in names])


def prompted_text(model: Any, tokens: Tensor, context: Tensor, deep: Sequence[Tensor] = ()) -> Tensor:
    """Text features, (N, D), of tokens, (N, 77), with context, (n, w) or (N, n, w), in the places 1 ... n.

    The tokens of ``deep`` take these places before the second and later blocks; no position is added to them.
    """
    text = getattr(model, "text", model)

    def put(x: Tensor, prompt: Tensor) -> Tensor:
        n = prompt.shape[-2]
        return torch.cat([x[:, :1], prompt.expand(len(x), -1, -1), x[:, 1 + n :]], 1)

    with ExitStack() as hooks:
        embedding = text.token_embedding.register_forward_hook(lambda _, __, out: put(out, context))
        hooks.callback(embedding.remove)
        for prompt, block in zip(deep, list(text.transformer.resblocks)[1:], strict=False):
            hooks.enter_context(before(block, lambda x, prompt=prompt: put(x, prompt)))
        return model.encode_text(tokens)


def prompted_image(model: Any, image: Tensor, prompts: Sequence[Tensor], mean: Tensor, std: Tensor) -> Tensor:
    """Image features, (B, D), with prompts, (n, w) each, behind the tokens of the first blocks.

    The first go in before the norm that precedes the blocks; all are taken out again behind the last block.
    """
    visual = getattr(model, "visual", model)
    vit = getattr(visual, "trunk", visual)
    blocks, norm = (vit.transformer.resblocks, vit.ln_pre) if hasattr(vit, "ln_pre") else (vit.blocks, vit.norm_pre)
    n = prompts[0].shape[0]
    with ExitStack() as hooks:
        hooks.enter_context(before(norm, lambda x: torch.cat([x, prompts[0].expand(len(x), -1, -1)], 1)))
        for prompt, block in zip(prompts[1:], list(blocks)[1:], strict=False):
            replaced = lambda x, p=prompt: torch.cat([x[:, :-n], p.expand(len(x), -1, -1)], 1)  # noqa: E731
            hooks.enter_context(before(block, replaced))
        hooks.callback(blocks[-1].register_forward_hook(lambda _, __, out: out[:, :-n]).remove)
        image = (image - mean) / std
        return model.encode_image(image) if hasattr(model, "encode_image") else model(image)


@contextmanager
def before(module: torch.nn.Module, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Changes the first input of a module."""
    handle = module.register_forward_pre_hook(lambda _, inputs: (change(inputs[0]), *inputs[1:]))
    yield
    handle.remove()


def unit(x: Tensor) -> Tensor:
    return x / x.square().sum(-1, keepdim=True).sqrt()


def plain_logits(model: Any, features: Tensor, text: Tensor) -> Tensor:
    """(B, C) of features, (B, D), and text, (C, D) or (B, C, D)."""
    return model.logit_scale.exp() * (unit(features).unsqueeze(1) * unit(text)).sum(-1)


def same_gradients(ours: Tensor, theirs: Tensor, inputs: Sequence[Tensor], allowed: float = 1e-5) -> None:
    """Two forms of the same outputs give the same gradients, none of which is zero."""
    assert towers.relative(ours, theirs) <= allowed
    upstream = torch.randn(ours.shape, generator=torch.Generator().manual_seed(5))
    mine = torch.autograd.grad((ours * upstream).sum(), list(inputs))
    plain = torch.autograd.grad((theirs * upstream).sum(), list(inputs))
    for a, b in zip(mine, plain, strict=True):
        assert b.abs().max() > 0
        assert towers.relative(a, b) <= 2 * allowed


def features_of(classifier: Any, count: int = 6) -> Tensor:
    return torch.randn(count, classifier.backbone.feature_dim, generator=torch.Generator().manual_seed(2))
