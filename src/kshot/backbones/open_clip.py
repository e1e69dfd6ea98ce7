"""CLIP and its relatives through open_clip: any architecture, tag, hub repository or local folder."""

from __future__ import annotations

import importlib
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from kshot.backbones.attention import Attention, PackedText
from kshot.backbones.base import check_image_size
from kshot.backbones.hub import out_of_reach, quiet_loading
from kshot.backbones.identity import sha256_of
from kshot.backbones.language import VisionLanguageBackbone
from kshot.backbones.preprocessing import Preprocessing
from kshot.backbones.tokens import Features, probed, width_of
from kshot.backbones.towers import prompt_shape
from kshot.backbones.unfuse import unfuse_open_clip, unfuse_timm
from kshot.errors import UserError, first_line, nearest_first
from kshot.lean import without

WEIGHTS = Path(__file__).parents[1] / "weights"  # model folders that kshot carries


class OpenClip(VisionLanguageBackbone):
    """A vision-language model of open_clip.

    Args:
        model: an architecture (``ViT-B-16-quickgelu``), a hub repository (``hf-hub:org/name``), a folder that holds
            ``open_clip_config.json`` and weights, or ``kshot:glyph_clip``, the small model that kshot carries.
        pretrained: for an architecture: a tag (``openai``), a file of weights, or ``random``. For the other forms
            nothing, since they carry their weights.
        image_size: side of the input in pixels; None takes the model's own.
        text_memory_gb: memory that the activations of the text tower may take; more prompts than fit are encoded in
            parts. None takes a quarter of the device's memory.
        features: ``default`` are those that texts are compared with; others are of the image tower's tokens after its
            final norm and before its projection, for classifiers without texts: ``cls``, ``mean`` (of the patches),
            ``cls+mean`` of the last block, ``last4`` (class tokens of four blocks), ``last4+mean``.

    Raises:
        UserError: a setting that cannot be; weights that are not named, fit the model ill or are out of reach.
    """

    @torch.inference_mode(False)  # weights must be able to stand in the graph of what is attached
    def __init__(
        self,
        model: str,
        pretrained: str | None = None,
        image_size: int | None = None,
        text_memory_gb: float | None = None,
        features: Features = "default",
    ) -> None:
        open_clip = loaded_open_clip()
        if text_memory_gb is not None and not 0 < text_memory_gb < math.inf:
            raise UserError(f"text_memory_gb is {text_memory_gb}, not a positive number; null takes a quarter of all.")
        source = resolve(model)
        check_weights_named(model, source, pretrained)
        file = pretrained is not None and Path(pretrained).is_file()
        local = file or pretrained == "random" or source.startswith("local-dir:")
        with quiet_loading(hub=not local):
            try:
                config = open_clip.get_model_config(source)
                if "hf_model_name" in config["text_cfg"]:
                    loaded_open_clip(with_transformers=True)
                patch = config["vision_cfg"].get("patch_size")
                if image_size is not None and patch is not None:
                    check_image_size(image_size, patch, model)
                clip: Any = open_clip.create_model(
                    source,
                    pretrained=None if pretrained == "random" else pretrained,
                    force_image_size=image_size,
                    require_pretrained=pretrained != "random",
                    pretrained_image=False,
                    pretrained_text=False,
                )
            except UserError:
                raise
            except Exception as error:  # hubs and loaders raise what they like
                raise weights_error(model, source, pretrained, error) from error
            try:
                tokenizer = tokenizer_of(source, config)
            except Exception as error:  # likewise
                raise UserError(
                    f"The tokenizer of {model} could not be loaded ({first_line(error)}): it comes from the hub, so "
                    "run once with a network, or point HF_HUB_CACHE at a filled cache."
                ) from error
        visual, name = clip.visual, model if pretrained is None else f"{model}/{pretrained}"
        size = visual.image_size[0] if isinstance(visual.image_size, tuple | list) else visual.image_size
        width = width_of(features, config["embed_dim"], name, getattr(visual, "trunk", visual))
        super().__init__(name, Preprocessing.of_open_clip(visual.preprocess_cfg, size), width, features)
        self.weight_sha256 = sha256_of(clip)
        self.clip, self.tokenizer = clip, tokenizer
        text = self._text
        self.context_length = self.tokenizer.context_length
        self.supports_prompts = (
            getattr(text, "attn_mask", None) is not None
            and getattr(text, "cls_emb", None) is None
            and self._pool in ("argmax", "eos")
            and int(self.tokenizer(["X"])[0, 0]) != self.token_ids("X")[0]  # a start token stands before the context
        )
        self.text_width = text.token_embedding.weight.shape[1] if hasattr(text, "token_embedding") else 0
        self.text_memory = None if text_memory_gb is None else int(text_memory_gb * 1e9)
        if self.supports_prompts:
            self.text_blocks = len(text.transformer.resblocks)
            self.text_heads = text.transformer.resblocks[0].attn.num_heads
        if hasattr(visual, "transformer"):
            self.image_blocks, self.image_width = len(visual.transformer.resblocks), visual.transformer.width
            unfuse_open_clip(visual.transformer.resblocks, "image")
        elif hasattr(getattr(visual, "trunk", None), "blocks"):
            self.image_blocks, self.image_width = prompt_shape(visual.trunk)
            unfuse_timm(visual.trunk.blocks, "image")
        if hasattr(getattr(text, "transformer", None), "resblocks"):
            unfuse_open_clip(text.transformer.resblocks, "text")
        self.freeze(clip)

    @property
    def _text(self) -> Any:
        """The module that holds the text tower: the model itself, or its ``text``."""
        return getattr(self.clip, "text", self.clip)

    @property
    def _pool(self) -> str:
        return str(getattr(self._text, "text_pool_type", getattr(self._text, "pool_type", "")))

    @property
    def logit_scale(self) -> Tensor:
        return cast(Tensor, self.clip.logit_scale.detach().exp().reshape(()))

    def encode_normalised(self, image: Tensor) -> Tensor:
        if self.features != "default":
            return probed(self.tower, image, self.features)
        return cast(Tensor, self.clip.encode_image(image))

    @property
    def projection(self) -> Tensor | None:
        projection = getattr(self.clip.visual, "proj", None)
        return projection.detach() if isinstance(projection, Tensor) else None

    def encode_unprojected(self, image: Tensor, tokens: Sequence[Tensor]) -> Tensor:
        pooled, _ = self.tower._pool(self.last_state(image, tokens))
        return cast(Tensor, pooled)

    @property
    def tower(self) -> Any:
        return getattr(self.clip.visual, "trunk", self.clip.visual)

    def head(self, pooled: Tensor) -> Tensor:
        return cast(Tensor, self.clip.visual.head(pooled)) if hasattr(self.clip.visual, "trunk") else pooled

    def named_tower_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        for name, parameter in self.clip.named_parameters():
            if ".adapters." not in name and not name.startswith(("logit_scale", "logit_bias")):
                image = name.startswith("visual.")
                yield ("image." if image else "text.") + name.removeprefix("visual.").removeprefix("text."), parameter

    def token_ids(self, text: str) -> list[int]:
        if hasattr(self.tokenizer, "encode"):
            return list(self.tokenizer.encode(text))
        clean = self.tokenizer.clean_fn
        return list(self.tokenizer.tokenizer(clean(text), add_special_tokens=False)["input_ids"])

    def tokenize(self, texts: Sequence[str]) -> Tensor:
        added = 2 if hasattr(self.tokenizer, "encode") else self.tokenizer.tokenizer.num_special_tokens_to_add()
        for text in texts:
            needed = len(self.token_ids(text)) + added
            if needed > self.context_length:
                raise UserError(
                    f"The prompt {text!r} takes {needed} tokens, and {self.name} reads {self.context_length}: shorten "
                    "the class name or the template."
                )
        return cast(Tensor, self.tokenizer(list(texts)))

    def embed_tokens(self, tokens: Tensor) -> Tensor:
        return cast(Tensor, self._text.token_embedding(tokens))

    def end_of_text(self, tokens: Tensor) -> Tensor:
        if self._pool == "argmax":
            return tokens.argmax(-1)
        end = int(getattr(self._text, "text_eos_id", getattr(self._text, "eos_id", -1)))
        return tokens.eq(end).int().argmax(-1)

    def encode_tokens(self, tokens: Tensor) -> Tensor:
        if not self.supports_prompts:
            with self.passing("text"):
                return cast(Tensor, self.clip.encode_text(tokens.to(self.mean.device, non_blocking=True)))
        end = self.end_of_text(tokens)
        same = (tokens == tokens[:1]).all(0).long().cumprod(0).sum()  # tokens that all prompts begin with
        shared, longest = int(torch.minimum(same, end.min())), int(end.max()) + 1
        with self.between():
            embeddings = self.embed_tokens(tokens[:, :longest].to(self.mean.device, non_blocking=True))
        return self.encode_embeddings(embeddings[:1, :shared], embeddings[None, :, shared:], end)[0]

    def encode_part(self, prefix: Tensor, suffix: Tensor, end: Tensor, deep: Tensor | None) -> Tensor:
        text = self._text
        (groups, p, width), (classes, s) = prefix.shape, suffix.shape[1:3]
        positions = text.positional_embedding
        if not isinstance(text.transformer.resblocks[0].attn, Attention):
            return self._encode_apart(prefix, suffix, end, deep)
        x = torch.cat(
            [
                (prefix + positions[:p]).reshape(groups * p, width),
                (suffix + positions[p : p + s]).reshape(groups * classes * s, width),
            ]
        )  # (tokens, width): every layer but attention treats tokens alike, so a shared prefix is there once
        layout = PackedText(groups, p, classes, s)
        for i, block in enumerate(text.transformer.resblocks):
            if deep is not None and 1 <= i <= len(deep):
                own = with_tokens(x[: groups * p].view(groups, p, width), deep[i - 1])
                x = torch.cat([own.flatten(0, 1), x[groups * p :]])
            attended = cast(Attention, block.attn).packed(block.ln_1(x), layout)
            x = x + block.ls_1(getattr(block, "ln_attn", nn.Identity())(attended))
            x = x + block.ls_2(block.mlp(block.ln_2(x)))
        return self._pooled(x[groups * p :].view(groups, classes, s, width), end - p)

    def _encode_apart(self, prefix: Tensor, suffix: Tensor, end: Tensor, deep: Tensor | None) -> Tensor:
        """:meth:`encode_part` by the library's own blocks, which do not know that prompts share a prefix."""
        text, classes = self._text, suffix.shape[1]
        x = torch.cat([prefix.unsqueeze(1).expand(-1, classes, -1, -1), suffix], 2)  # (G, C, P + S, width)
        shape, mask = x.shape, text.attn_mask[: x.shape[2], : x.shape[2]]
        x = (x + text.positional_embedding[: shape[2]]).flatten(0, 1)
        for i, block in enumerate(text.transformer.resblocks):
            if deep is not None and 1 <= i <= len(deep):
                x = with_tokens(x, deep[i - 1])
            x = block(x, attn_mask=mask)
        return self._pooled(x.view(shape), end)

    def _pooled(self, x: Tensor, end: Tensor) -> Tensor:
        """Text features, (G, C, D), from final states, (G, C, L, width), taken at a position of each class, (C,)."""
        text, classes = self._text, x.shape[1]
        position = end.to(x.device, non_blocking=True)
        pooled = text.ln_final(x[:, torch.arange(classes, device=x.device), position])
        projection = text.text_projection
        if projection is None:
            return cast(Tensor, pooled)
        return cast(Tensor, projection(pooled) if isinstance(projection, nn.Linear) else pooled @ projection)


def with_tokens(x: Tensor, tokens: Tensor) -> Tensor:
    """States, (N, L, width), with learned tokens, (n, width), in the places 1 ... n."""
    return torch.cat([x[:, :1], tokens.to(x.dtype).expand(x.shape[0], -1, -1), x[:, 1 + len(tokens) :]], 1)


def loaded_open_clip(with_transformers: bool = False) -> Any:
    """The library, without the seconds that transformers take to load where no text tower is one of theirs."""
    with without("transformers"):
        library = importlib.import_module("open_clip")
    towers = importlib.import_module("open_clip.hf_model")
    if with_transformers and towers.transformers is None:
        importlib.reload(towers)
    return library


def resolve(model: str) -> str:
    """The name under which open_clip finds a model, ``local-dir:`` for folders; raises UserError if there is none."""
    if model.startswith("hf-hub:"):
        return model
    carried = {f"kshot:{folder.name}": folder for folder in sorted(WEIGHTS.iterdir()) if folder.is_dir()}
    if model.startswith("kshot:"):
        if model not in carried:
            raise UserError(f"kshot carries no model {model!r}. {nearest_first(model, carried)}")
        return f"local-dir:{carried[model]}"
    folder = Path(model.removeprefix("local-dir:")).expanduser()
    if model.startswith("local-dir:") or folder.is_dir():
        if not (folder / "open_clip_config.json").is_file():
            raise UserError(f"The folder {folder} holds no open_clip_config.json, so it is no open_clip model folder.")
        return f"local-dir:{folder}"
    source, names = model.replace("/", "-"), loaded_open_clip().list_models()
    if source not in names:
        raise UserError(
            f"Unknown open_clip architecture {model!r}, nor is there such a folder. {nearest_first(model, names)}"
        )
    return source


def check_weights_named(model: str, source: str, pretrained: str | None) -> None:
    """Raises UserError unless exactly one source of weights is named and its activation fits."""
    if source.startswith(("hf-hub:", "local-dir:")):
        if pretrained is not None:
            raise UserError(f"{model} carries its own weights: leave out pretrained={pretrained!r}.")
        return
    open_clip = loaded_open_clip()
    tags = open_clip.list_pretrained_tags_by_model(source)
    if pretrained is None:
        raise UserError(
            f"Backbone {model}: no weights named. Set pretrained to a tag ({', '.join(tags) or 'none published'}), a "
            "file, or 'random'."
        )
    if pretrained == "random" or Path(pretrained).is_file():
        return
    tag = open_clip.get_pretrained_cfg(source, pretrained)
    if not tag:
        raise UserError(
            f"{pretrained!r} is neither a file nor a tag of {model}. {nearest_first(pretrained, [*tags, 'random'])}"
        )
    wanted, has = bool(tag.get("quick_gelu")), bool(open_clip.get_model_config(source).get("quick_gelu"))
    if wanted != has:
        other = f"{model}-quickgelu" if wanted else model.removesuffix("-quickgelu")
        raise UserError(
            f"The weights {pretrained!r} were trained with {'QuickGELU' if wanted else 'GELU'}, and {model} computes "
            f"{'QuickGELU' if has else 'GELU'}: use model: {other}."
        )


def weights_error(model: str, source: str, pretrained: str | None, error: Exception) -> UserError:
    """One line for weights that could not be read or fetched."""
    if pretrained is not None and Path(pretrained).is_file():
        return UserError(f"The weights in {pretrained} do not fit {model}: {first_line(error)}")
    if source.startswith("local-dir:"):
        return UserError(f"The model folder {model} could not be loaded: {first_line(error)}")
    return UserError(out_of_reach(f"The weights of {model} ({pretrained or 'its own'})", "pretrained", error))


def tokenizer_of(source: str, config: dict[str, Any]) -> Any:
    """The tokenizer of a resolved model; a relative ``bpe_path`` in a model folder means a file in that folder."""
    path = config.get("text_cfg", {}).get("tokenizer_kwargs", {}).get("bpe_path")
    own = path is not None and source.startswith("local-dir:")
    options = {"bpe_path": str(Path(source.removeprefix("local-dir:")) / path)} if own else {}
    return loaded_open_clip().get_tokenizer(source, **options)
