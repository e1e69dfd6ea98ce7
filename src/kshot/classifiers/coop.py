"""CoOp: learned context tokens (Zhou et al. 2021, arXiv:2109.01134)."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from kshot.backbones.base import Backbone, require_prompts
from kshot.classifiers.base import Classifier, Task, cosine_logits
from kshot.errors import UserError
from kshot.memo import Memo


class CoOp(Classifier):
    """``p(y=c|x) = softmax_c(τ cos(f, g([V, name_c])))`` with learned context V (the paper's equation 3).

    Args:
        backbone: must have a text tower that takes embeddings.
        task: its class names; templates are not used.
        context_length: M, the number of context tokens; None takes 16, or the length of ``init_words``.
        class_specific: learn one context a class instead of one for all.
        position: where the class name stands: after, amid or before the context.
        init_words: start from the embeddings of these words, instead of N(0, 0.02²).

    Raises:
        UserError: no such text tower; ``init_words`` and ``context_length`` contradict each other; a prompt that does
            not fit; a class name without tokens.
    """

    def __init__(
        self,
        backbone: Backbone,
        task: Task,
        context_length: int | None = None,
        class_specific: bool = False,
        position: Literal["end", "middle", "front"] = "end",
        init_words: str | None = None,
    ) -> None:
        super().__init__(backbone, task)
        text = require_prompts(backbone, "CoOp")
        words = text.token_ids(init_words) if init_words else []
        if init_words and not words:
            raise UserError(f"CoOp: init_words {init_words!r} hold no token.")
        if words and context_length not in (None, len(words)):
            raise UserError(
                f"CoOp: init_words {init_words!r} are {len(words)} tokens, but context_length is {context_length}: "
                "give one of the two."
            )
        length = len(words) or (16 if context_length is None else context_length)
        if length < 1:
            raise UserError(f"CoOp: context_length is {context_length}, and must be at least 1.")
        if words:
            context = text.embed_tokens(torch.tensor(words)).detach().clone()
        else:
            context = torch.randn(length, text.text_width) * 0.02
        classes = len(task.class_names)
        self.context = nn.Parameter(context.repeat(classes, 1, 1) if class_specific else context)
        self.class_specific, self.position = class_specific, position
        self.set_class_names(task.class_names)

    def set_class_names(self, class_names: tuple[str, ...]) -> None:
        """Rebuilds the frozen parts of the prompts for other classes; the context stays.

        Raises:
            UserError: the context is class-specific and bound to other classes.
        """
        text = require_prompts(self.backbone, "CoOp")
        if self.class_specific and len(class_names) != len(self.context):
            raise UserError(
                f"CoOp: a class-specific context of {len(self.context)} classes cannot serve {len(class_names)} others."
            )
        length = self.context.shape[-2]
        # "X" stands in for the context; it is one token. The full stop is part of the sentence, as in the paper's code.
        placeholder = " ".join(["X"] * length)
        tokens = text.tokenize([f"{placeholder} {name}." for name in class_names])
        self.end = text.end_of_text(tokens)
        self.name_lengths = [len(text.token_ids(name)) for name in class_names]
        for name, tokens_of_name in zip(class_names, self.name_lengths, strict=True):
            if tokens_of_name == 0:
                raise UserError(f"CoOp: the tokenizer finds no token in the class name {name!r}.")
        rest = tokens[:, 1 + length : int(self.end.max()) + 1]
        device = self.context.device
        with torch.no_grad():
            start, rest_embeddings = text.embed_tokens(tokens[:1, :1].to(device)), text.embed_tokens(rest.to(device))
        self.register_buffer("start", start, persistent=False)  # (1, 1, width)
        self.register_buffer("rest", rest_embeddings, persistent=False)  # (C, name, full stop, end and padding, width)
        self.task = Task(tuple(class_names), self.task.templates)
        self._memo: Memo[Tensor] = Memo()

    def prompts(self) -> tuple[Tensor, Tensor]:
        """Shared prefix, (1, P, width), and what differs by class, (1, C, S, width), in the order of ``position``."""
        start, rest = self.get_buffer("start"), self.get_buffer("rest")
        classes, length = len(rest), self.context.shape[-2]
        before = {"end": length, "middle": length // 2, "front": 0}[self.position]
        context = self.context if self.class_specific else self.context.expand(classes, -1, -1)
        first, second = context[:, :before], context[:, before:]
        if before == length:
            suffix = rest
        else:
            suffix = torch.stack(
                [torch.cat([rest[c, :n], second[c], rest[c, n:]]) for c, n in enumerate(self.name_lengths)]
            )
        if self.class_specific:
            return start, torch.cat([first, suffix], 1).unsqueeze(0)
        return torch.cat([start, self.context[None, :before]], 1), suffix.unsqueeze(0)

    def encode(self) -> Tensor:
        """Class features, (C, D)."""
        prefix, suffix = self.prompts()
        return require_prompts(self.backbone, "CoOp").encode_embeddings(prefix, suffix, self.end)[0]

    def forward(self, features: Tensor) -> Tensor:
        text = require_prompts(self.backbone, "CoOp")
        if torch.is_grad_enabled() or not text.settled("text"):
            prototypes = self.encode()
        else:
            prototypes = self._memo.get([self.context, *text.trainable("text")], self.encode)
        return cosine_logits(features, prototypes, text.logit_scale)
