"""Factories of tiny models: every block layout that the backbones claim to read, written to local folders.

A new layout is one more entry of :data:`LAYOUTS`; the contract tests then run on it.
"""

import copy
import io
import json
import logging
import pickle
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from kshot.backbones import Backbone, OpenClip, Timm

END_OF_TEXT = 49407  # of CLIP's tokenizer
ALL_PARTS = ("q", "k", "v", "o", "fc1", "fc2")


@dataclass(frozen=True)
class Layout:
    """One tiny model.

    Attributes:
        library: ``open_clip`` or ``timm``.
        config: what is laid over the library's tiny default configuration.
        image_blocks: blocks with slots in the image tower.
        text_blocks: likewise in the text tower; 0 without one.
        prompts: whether the text tower takes embeddings.
    """

    library: str
    config: dict[str, Any] = field(default_factory=dict)
    image_blocks: int = 2
    text_blocks: int = 0
    prompts: bool = False

    @property
    def towers(self) -> list[str]:
        """The towers that have slots."""
        return ["image"] * bool(self.image_blocks) + ["text"] * bool(self.text_blocks)


def clip(image: dict | None = None, text: dict | None = None, prompts: bool = True, image_blocks: int = 2, **top: Any):
    """A tiny open_clip model with changes to its image and text configuration."""
    vision = {"image_size": 32, "patch_size": 8, "width": 32, "layers": 2, "head_width": 16} | (image or {})
    language = {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2} | (text or {})
    config = {"embed_dim": 24, "vision_cfg": vision, "text_cfg": language, **top}
    return Layout("open_clip", config, image_blocks=image_blocks, text_blocks=2, prompts=prompts)


def vit(architecture: str = "vit_tiny_patch16_224", image_blocks: int = 2, **arguments: Any) -> Layout:
    """A tiny timm model: an architecture with other sizes."""
    tiny = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
    return Layout("timm", {"architecture": architecture, "arguments": tiny | arguments}, image_blocks=image_blocks)


CUSTOM = {"qk_norm": True, "scale_heads": True, "scale_attn_inner": True, "scale_attn": True, "scale_fc": True}
LAYOUTS: dict[str, Layout] = {
    # nn.MultiheadAttention, as in CLIP
    "clip": clip(),
    "clip_quick_gelu": clip(quick_gelu=True),
    "clip_layer_scale": clip({"ls_init_value": 0.5}, {"ls_init_value": 0.5}),
    # open_clip's own Attention, also the layout of open_clip 4
    "clip_custom": clip({"block_type": "custom"}, {"block_type": "custom"}),
    "clip_custom_all": clip(CUSTOM, CUSTOM),
    # the text tower as a module of its own, and its other ways to pool
    "custom_text": clip(text={"proj_bias": True}, custom_text=True),
    "custom_text_no_projection": clip(text={"proj_type": "none", "width": 24}, custom_text=True),
    "eos": clip(text={"pool_type": "eos", "eos_id": END_OF_TEXT}),
    "custom_text_eos": clip(text={"pool_type": "eos", "eos_id": END_OF_TEXT}, custom_text=True),
    # text towers that take no learned embeddings: not causal (SigLIP), a class token (CoCa)
    "not_causal": clip(text={"no_causal_mask": True}, custom_text=True, prompts=False),
    "class_token": clip(text={"embed_cls": True}, custom_text=True, prompts=False),
    "siglip": clip(
        {"timm_model_name": "test_vit", "timm_pool": "map", "timm_proj": "none"},
        {"no_causal_mask": True, "pool_type": "last", "proj_bias": True},
        prompts=False,
        image_blocks=6,
        custom_text=True,
        embed_dim=64,
        init_logit_bias=-10.0,
    ),
    "resnet": clip({"layers": [1, 1, 1, 1], "width": 8, "patch_size": None}, image_blocks=0),
    # timm's plain attention
    "vit": vit(),
    "vit_qk_norm": vit(qk_norm=True, scale_attn_norm=True, scale_mlp_norm=True, init_values=0.5),
    "vit_no_bias": vit(qkv_bias=False, class_token=False, global_pool="avg"),
    "vit_dinov2": vit("vit_small_patch14_reg4_dinov2"),
    "vit_dinov2_swiglu": vit("vit_giant_patch14_dinov2"),
    # rotary and gated attention, changed by its projections alone
    "vit_dinov3": vit("vit_small_patch16_dinov3"),
    "vit_dinov3_bias": vit("vit_small_patch16_dinov3_qkvb"),
    "vit_dinov3_swiglu": vit("vit_small_plus_patch16_dinov3"),
    "eva02": vit("eva02_tiny_patch14_224"),
    "eva02_apart": vit("eva02_base_patch14_224"),  # q, k and v are layers of their own
}
ONE_BLOCK = {"clip_one_block": clip({"layers": 1}, {"layers": 1}, image_blocks=1)}  # whose programs are dear
RANDOM_IN_TRAINING = {  # what is random once a tower trains as a whole
    "vit_attn_drop": vit(attn_drop_rate=0.5),
    "vit_proj_drop": vit(proj_drop_rate=0.5),
    "vit_drop_path": vit(drop_path_rate=0.5),
    "clip_patch_dropout": clip({"patch_dropout": 0.5}),
}
WITH_TEXT = [name for name, layout in LAYOUTS.items() if layout.text_blocks]
WITH_PROMPTS = [name for name, layout in LAYOUTS.items() if layout.prompts]
IMAGE_ONLY = [name for name, layout in LAYOUTS.items() if not layout.text_blocks]
TOWERS = [(name, tower) for name, layout in LAYOUTS.items() for tower in layout.towers]


def distinct_towers() -> list[tuple[str, str]]:
    """The towers, without image towers that an earlier layout has in the same form."""
    seen, distinct = set(), []
    for name, tower in TOWERS:
        config = LAYOUTS[name].config
        form = str(
            (config.get("vision_cfg"), config.get("quick_gelu"), config.get("architecture"), config.get("arguments"))
        )
        if tower == "text" or form not in seen:
            distinct.append((name, tower))
        if tower == "image":
            seen.add(form)
    return distinct


SIZES = {"width", "heads", "layers", "vocab_size", "hf_tokenizer_name", "hf_model_name"}
POOLED_IMAGES = {"attentional_pool", "attn_pooler_heads", "output_tokens"}  # of CoCa, whose image tower must have them
# Stand-ins for tokenizers on the hub: the first ids of the vocabulary, and what is put around a text.
SPECIAL = {
    "bert": (["[PAD]", "[UNK]", "[CLS]", "[SEP]"], "[CLS] $A [SEP]"),
    "roberta": (["<s>", "<pad>", "</s>", "<unk>"], "<s> $A </s>"),
    "nllb": (["<s>", "<pad>", "</s>", "<unk>", "eng_Latn"], "eng_Latn $A </s>"),
    "t5": (["<pad>", "</s>", "<unk>"], "$A </s>"),
}
WORDS = ("a", "photo", "of", "the", "cat", "dog", "yellow", "bird", "small", "in", "rain", "x", ".")
PUBLISHED: dict[str, Layout] = {}  # tiny text towers of published architectures, as far as families() made them


def tokenizer_kind(text: dict[str, Any]) -> str:
    """Which of SPECIAL stands in for the tokenizer of a text configuration; ``simple``: open_clip's own."""
    name = text.get("hf_tokenizer_name", "").lower()
    kinds = {"siglip": "t5", "mt5": "t5", "nllb": "nllb", "roberta": "roberta", "xlm": "roberta", "bert": "bert"}
    return next((kind for part, kind in kinds.items() if part in name), "other") if name else "simple"


@cache
def families() -> dict[str, str]:
    """Each kind of text tower among open_clip's published models: the first model of the kind, and its tokenizer.

    Kinds differ in anything of the text configuration but sizes. Fills PUBLISHED, under the model's name and, where the
    tokenizer lies on a hub, under ``<model>@hub`` with the true one.
    """
    import open_clip

    first: dict[str, str] = {}
    for model in dict.fromkeys(model for model, _ in open_clip.list_pretrained()):
        config = open_clip.get_model_config(model)
        text = config["text_cfg"]
        form = {key: value for key, value in text.items() if key not in SIZES}
        form |= {"custom": config.get("custom_text", False) or "hf_model_name" in text}
        form |= {"coca": "multimodal_cfg" in config, "tokenizer": tokenizer_kind(text), "hf": text.get("hf_model_name")}
        first.setdefault(json.dumps(form, sort_keys=True), model)
    kinds = {model: tokenizer_kind(open_clip.get_model_config(model)["text_cfg"]) for model in first.values()}
    for model, kind in kinds.items():
        PUBLISHED[model] = shrunk(open_clip.get_model_config(model))
        if kind != "simple":
            PUBLISHED[f"{model}@hub"] = PUBLISHED[model]
    return kinds


def shrunk(config: dict[str, Any]) -> Layout:
    """A published configuration with tiny towers; tokenizer, context, mask and pooling stay."""
    small, vision, text = {"width": 32, "heads": 2, "layers": 2}, config["vision_cfg"], config["text_cfg"]
    config |= {"embed_dim": 32}  # the width, as it must be without a projection
    kept = {key: vision[key] for key in POOLED_IMAGES & vision.keys()}
    top = {key: value for key, value in config.items() if key not in ("vision_cfg", "text_cfg")}
    if "multimodal_cfg" in top:
        top["multimodal_cfg"] |= small
    causal = not text.get("no_causal_mask") and not text.get("embed_cls") and "hf_model_name" not in text
    return clip(kept, text | small, prompts=causal, **top)


def fetch_tokenizer(folder: Path, model: str) -> int:
    """Writes the tokenizer of a published model; returns the size of its vocabulary."""
    import open_clip

    tokenizer = open_clip.get_tokenizer(model)
    tokenizer.save_pretrained(folder)
    return len(tokenizer.tokenizer)


def write_tokenizer(folder: Path, kind: str) -> int:
    """Writes a tokenizer of words, in the form that the hub's have; returns the size of its vocabulary."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    special, template = SPECIAL[kind]
    words = {word: i for i, word in enumerate([*special, *WORDS])}
    inner = Tokenizer(models.WordLevel(words, unk_token=next(w for w in special if "unk" in w.lower())))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    around = [(word, words[word]) for word in template.split() if word in special]
    inner.post_processor = processors.TemplateProcessing(single=template, special_tokens=around)
    names = {"pad_token": next(w for w in special if "pad" in w.lower()), "unk_token": inner.model.unk_token}
    PreTrainedTokenizerFast(tokenizer_object=inner, sep_token=template.split()[-1], **names).save_pretrained(folder)
    return len(words)


def write_text_model(folder: Path, name: str, vocabulary: int) -> str:
    """Writes the configuration of a tiny text tower of transformers; returns where."""
    sizes = {"vocab_size": vocabulary, "pad_token_id": 1, "max_position_embeddings": 128}
    if "nllb" in name:
        sizes |= {"d_model": 32, "encoder_layers": 2, "encoder_attention_heads": 2, "encoder_ffn_dim": 64}
        sizes |= {"decoder_layers": 1, "decoder_attention_heads": 2, "decoder_ffn_dim": 64}
    else:
        sizes |= {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    kind = "m2m_100" if "nllb" in name else "xlm-roberta" if "xlm" in name else "roberta"
    (folder / "text_model").mkdir()
    (folder / "text_model" / "config.json").write_text(json.dumps({"model_type": kind, **sizes}))
    return str(folder / "text_model")


_folder: list[Path] = []


def use_folder(folder: Path) -> None:
    """Says where to write models."""
    _folder[:] = [folder]


def rough(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Random values for every weight, so that no bias, norm or scale hides behind its initial zero or one."""
    generator = torch.Generator().manual_seed(7)
    values = {}
    for name, value in sorted(state.items()):
        noise = torch.randn(value.shape, generator=generator) if value.is_floating_point() else None
        if noise is None or name.endswith(
            ("logit_scale", "logit_bias", "running_var", "running_mean", "periods", "rope.freqs")
        ):
            values[name] = value.clone()
        elif value.ndim >= 2 and "embed" not in name and "norm" not in name:
            values[name] = 1.5 * noise / value.shape[1:].numel() ** 0.5
        else:
            values[name] = value + 0.3 * noise
    return values


@cache
def model_folder(name: str, root: Path) -> Path:
    """Writes a layout's configuration and weights, once."""
    layout, folder = (LAYOUTS | ONE_BLOCK | RANDOM_IN_TRAINING | PUBLISHED)[name], root / f"tiny_{name}"
    folder.mkdir()
    if layout.library == "open_clip":
        import open_clip

        statistics, config = {"mean": [0.48, 0.46, 0.41], "std": [0.27, 0.26, 0.28]}, copy.deepcopy(layout.config)
        text = config["text_cfg"]
        if "hf_tokenizer_name" in text:
            model, _, hub = name.partition("@")
            text["vocab_size"] = (
                fetch_tokenizer(folder, model) if hub else write_tokenizer(folder, tokenizer_kind(text))
            )
        if "hf_model_name" in text:
            text["hf_model_name"] = write_text_model(folder, text["hf_model_name"], text["vocab_size"])
        description = {"model_cfg": config, "preprocess_cfg": statistics}
        (folder / "open_clip_config.json").write_text(json.dumps(description))
        weights = folder / "open_clip_model.safetensors"
        logging.disable(logging.WARNING)  # "no weights found": they are about to be written
        model = open_clip.create_model(f"local-dir:{folder}", load_weights=False, pretrained_text=False)
        logging.disable(logging.NOTSET)
    else:
        import timm

        arguments = layout.config["arguments"]
        size = arguments["img_size"]
        description = {
            "architecture": layout.config["architecture"],
            "num_classes": 0,
            "model_args": arguments,
            "pretrained_cfg": {"input_size": [3, size, size], "num_classes": 0, "mean": [0.5] * 3, "std": [0.5] * 3},
        }
        (folder / "config.json").write_text(json.dumps(description))
        weights = folder / "model.safetensors"
        model = timm.create_model(f"local-dir:{folder}", pretrained=False, num_classes=0)
    save_file({key: value.contiguous() for key, value in rough(model.state_dict()).items()}, weights)
    return folder


def folder_of(name: str) -> Path:
    """The folder of a layout."""
    return model_folder(name, _folder[0])


def original(name: str) -> Any:
    """A fresh copy of the untouched model of the library, with the same weights, in evaluation mode."""
    return copy.deepcopy(_original(name, _folder[0]))


@cache
def _original(name: str, root: Path) -> Any:
    folder = model_folder(name, root)
    if (folder / "open_clip_config.json").exists():
        import open_clip

        return open_clip.create_model(f"local-dir:{folder}").eval()
    import timm

    pool = {"global_pool": "token"} if "dinov3" in name else {}  # the backbone's default, read from the folder's name
    return timm.create_model(
        f"local-dir:{folder}", pretrained=True, num_classes=0, dynamic_img_size=True, **pool
    ).eval()


def build(name: str) -> Backbone:
    """A backbone of the layout, built as a user builds it."""
    folder = folder_of(name)
    if (folder / "open_clip_config.json").exists():
        return OpenClip(str(folder))
    # a name with DINOv2 gets 224 pixels, which are 784 tokens here; fewer, and still not what its positions are for
    return Timm(f"local-dir:{folder}", image_size=48 if "dinov2" in name else None)


@cache
def _mould(name: str, root: Path) -> tuple[bytes, dict[int, Any]]:
    """A layout's backbone pickled, apart from its tensors and its tokenizer, which are beside it."""
    del root
    model, apart, content = build(name), {}, io.BytesIO()
    tokenizer = getattr(model, "tokenizer", None)

    def put_apart(value: Any) -> int | None:
        if not isinstance(value, Tensor) and (value is None or value is not tokenizer):
            return None
        apart[id(value)] = value
        return id(value)

    pickler = pickle.Pickler(content)
    pickler.persistent_id = put_apart
    pickler.dump(model)
    return content.getvalue(), apart


def copied(value: Tensor) -> Tensor:
    """A parameter or buffer with values of its own."""
    own = value.detach().clone()
    return nn.Parameter(own, value.requires_grad) if isinstance(value, nn.Parameter) else own


def backbone(name: str = "clip") -> Backbone:
    """A fresh copy of a layout's backbone, which a test may change; in a quarter of the time of ``copy.deepcopy``.

    No test changes the tokenizer, whose tables would be most of the work.
    """
    content, apart = _mould(name, _folder[0])
    copies = {key: copied(value) if isinstance(value, Tensor) else value for key, value in apart.items()}
    unpickler = pickle.Unpickler(io.BytesIO(content))
    unpickler.persistent_load = copies.__getitem__
    return unpickler.load()


def images(model: Backbone, count: int = 3, seed: int = 1) -> Tensor:
    """Random images in [0, 1] of a backbone's size."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(count, 3, model.image_size, model.image_size, generator=generator)


def texts(model: Any, sentences: tuple[str, ...] = ("a photo of a cat.", "a drawing of two dogs.", "rain")) -> Tensor:
    """Tokens of sentences that differ in length."""
    return model.tokenize(sentences)


def encode(model: Any, tower: str) -> Tensor:
    """The features of a tower of a backbone, for fixed inputs."""
    return model.encode_image(images(model)) if tower == "image" else model.encode_tokens(texts(model))


def untouched(name: str, tower: str) -> Tensor:
    """The same of a backbone of the layout that nothing was ever attached to, without gradients."""
    return _untouched(name, tower, _folder[0]).clone()


@cache
def _untouched(name: str, tower: str, root: Path) -> Tensor:
    del root
    with torch.no_grad():
        return encode(backbone(name), tower)


def relative(actual: Tensor, expected: Tensor) -> float:
    """Largest difference, relative to the largest expected value."""
    assert actual.shape == expected.shape
    actual, expected = actual.detach().double(), expected.detach().double()
    assert torch.isfinite(actual).all()
    assert torch.isfinite(expected).all()
    return float((actual - expected).abs().max() / expected.abs().max())
