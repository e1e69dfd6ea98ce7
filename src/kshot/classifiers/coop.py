"""CoOp: learned context tokens (Zhou et al. 2021, arXiv:2109.01134), shallow or deep."""

from typing import Literal

import torch
from torch import Tensor, nn

from kshot.backbones.base import Backbone
from kshot.backbones.language import require_prompts
from kshot.classifiers.base import Task, TextClassifier
from kshot.classifiers.zero_shot import require_tokens
from kshot.errors import UserError, require

PUBLISHED_DEPTH = 9  # blocks with prompts of their own in MaPLe and PromptSRC


class CoOp(TextClassifier):
    """``p(y=c|x) = softmax_c(τ cos(f, g([V, name_c])))`` with learned context V (the paper's equation 3).

    Args:
        context_length: M, the number of context tokens; None takes 16, or the length of ``init_words``.
        class_specific: learn one context a class instead of one for all.
        position: where the class name stands: after, amid or before the context.
        init_words: start from the embeddings of these words, instead of N(0, 0.02²); of another number of tokens than
            ``context_length`` they are refused.
        depth: text blocks that get context tokens of their own, the input counted as the first (Khattak et al. 2022,
            arXiv:2210.03117, section 3.2), for a shared context before the class name; None takes 9, or all blocks of a
            smaller tower.

    Attributes:
        context: V, (M, text width), or (C, M, text width) where it is class-specific.
        deep: (depth - 1, M, text width) of the later blocks; None at a depth of 1.
        end: (C,) position of the end token, on the CPU.
    """

    deep: nn.Parameter | None
    start: Tensor
    rest: Tensor
    keeps_words = False  # whether init words beyond the context length stay in the prompt as they are

    def __init__(
        self,
        backbone: Backbone,
        task: Task,
        context_length: int | None = None,
        class_specific: bool = False,
        position: Literal["end", "middle", "front"] = "end",
        init_words: str | None = None,
        depth: int | None = 1,
    ) -> None:
        super().__init__(backbone, task)
        who = type(self).__name__
        text = require_prompts(backbone, who)
        words, tokens = (init_words or "").split(), text.token_ids(init_words or "")
        if init_words is not None and not tokens:
            raise UserError(f"{who}: init_words {init_words!r} hold no token.")
        length = context_length if context_length is not None else len(tokens) or 16
        require(who, "context_length", length, length >= 1, "be at least 1")
        known = position in ("end", "middle", "front")
        require(who, "position", repr(position), known, "be 'end', 'middle' or 'front'")
        kept = self.keeps_words and length <= len(tokens) == len(words)
        if tokens and length != len(tokens) and not kept:
            raise UserError(
                f"{who}: init_words {init_words!r} are {len(tokens)} tokens, but context_length is {length}: give one "
                "of the two, and null for the other."
            )
        self.fixed_words = words[length:]
        depth = checked_depth(who, depth, text.text_blocks, "text")
        if depth > 1 and (class_specific or position != "end"):
            raise UserError(f"{who}: depth {depth} needs a shared context before the class name (position: end).")
        if tokens:
            context = text.embed_tokens(torch.tensor(tokens[:length], device=text.mean.device)).detach().clone()
        else:
            context = torch.randn(length, text.text_width) * 0.02
        self.context = nn.Parameter(context.repeat(len(task.class_names), 1, 1) if class_specific else context)
        deep = nn.Parameter(torch.randn(depth - 1, length, text.text_width) * 0.02) if depth > 1 else None
        self.register_parameter("deep", deep)
        self.class_specific, self.position = class_specific, position
        self.bound = "a class-specific context was learnt for each training class" if class_specific else ""
        self.prepare_classes()

    def prepare_classes(self) -> None:
        """Builds the frozen parts of the prompts; the context stays."""
        text, names, length = self.backbone, self.task.class_names, self.context.shape[-2]
        name_lengths = [require_tokens(text, name) for name in names]
        # "X" stands in for the context; it is one token. The full stop is part of the sentence, as in the paper's code.
        sentences = [" ".join([*["X"] * length, *self.fixed_words, f"{name}."]) for name in names]
        for name, own, sentence in zip(names, name_lengths, sentences, strict=True):
            needed = len(text.token_ids(sentence)) + 2
            if needed > text.context_length:
                raise UserError(
                    f"{type(self).__name__}: the class {name!r} has {own} tokens, and with {length} of context, start "
                    f"and end its prompt takes {needed}; {text.name} reads {text.context_length}: shorten the name or "
                    "the context."
                )
        tokens = text.tokenize(sentences)
        self.name_lengths = name_lengths
        self.end = text.end_of_text(tokens)
        rest = tokens[:, 1 + length : int(self.end.max()) + 1]
        same = int((rest == rest[:1]).all(0).long().cumprod(0).sum())
        self.same = min(same, int(self.end.min()) - 1 - length)  # tokens with which every rest begins
        tokens, rest = tokens.to(text.mean.device), rest.to(text.mean.device)
        with torch.no_grad():  # (1, 1, width), and (C, name, full stop, end and padding, width)
            self.register_buffer("start", text.embed_tokens(tokens[:1, :1]), persistent=False)
            self.register_buffer("rest", text.embed_tokens(rest), persistent=False)

    def prompts(self) -> tuple[Tensor, Tensor]:
        """Shared prefix, (1, P, width), and what differs by class, (1, C, S, width), in the order of ``position``."""
        start, rest, own = self.start, self.rest, self.context.to(self.rest.dtype)
        classes, length = len(rest), own.shape[-2]
        before = {"end": length, "middle": length // 2, "front": 0}[self.position]
        if before == length and not self.class_specific:
            return self.shared_prompts(own.unsqueeze(0))
        context = own.expand(classes, -1, -1)
        first, second = context[:, :before], context[:, before:]
        suffixes = [torch.cat([rest[c, :n], second[c], rest[c, n:]]) for c, n in enumerate(self.name_lengths)]
        suffix = torch.stack(suffixes)
        if self.class_specific:
            return start, torch.cat([first, suffix], 1).unsqueeze(0)
        return torch.cat([start, own[None, :before]], 1), suffix.unsqueeze(0)

    def shared_prompts(self, context: Tensor) -> tuple[Tensor, Tensor]:
        """Prefix, (G, P, width), and suffix, (G, C, S, width), of contexts, (G, M, width), before the class name."""
        groups, common = context.shape[0], self.rest[:1, : self.same]
        prefix = torch.cat([self.start.expand(groups, -1, -1), context, common.expand(groups, -1, -1)], 1)
        return prefix, self.rest[:, self.same :].expand(groups, -1, -1, -1)

    def encode(self) -> Tensor:
        return self.backbone.encode_embeddings(*self.prompts(), self.end, self.deep)[0]


def checked_depth(who: str, depth: int | None, blocks: int, tower: str) -> int:
    """The blocks that get prompts of their own: None stands for 9, or all of a smaller tower, and more are refused."""
    if depth is None:
        return min(PUBLISHED_DEPTH, blocks)
    if not 1 <= depth <= blocks:
        raise UserError(f"{who}: depth is {depth}, and the {tower} tower has {blocks} blocks: give 1 to {blocks}.")
    return depth
