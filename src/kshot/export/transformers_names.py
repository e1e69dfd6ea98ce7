"""The models of open_clip and timm under the names of Transformers: CLIP, SigLIP and DINOv2."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kshot.backbones import Backbone, OpenClip, Timm
from kshot.errors import UserError
from kshot.export.check import EXACT
from kshot.export.needed import needed

State = dict[str, Tensor]
BLOCK = {"norm1": "layer_norm1", "norm2": "layer_norm2", "ln_1": "layer_norm1", "ln_2": "layer_norm2"}
BLOCK |= {"mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2", "attn.proj": "self_attn.out_proj"}
BLOCK |= {"attn.out_proj": "self_attn.out_proj"}
QKV = ("q_proj", "k_proj", "v_proj")
SLOTS = {"q": "self_attn.q_proj", "k": "self_attn.k_proj", "v": "self_attn.v_proj", "o": "self_attn.out_proj"}
SLOTS |= {"fc1": "mlp.fc1", "fc2": "mlp.fc2"}


def kind_of(backbone: Backbone) -> str:
    """``clip``, ``siglip`` or ``dinov2``; raises UserError for a model that Transformers has not by these names."""
    if isinstance(backbone, Timm) and "dinov2" in str(backbone.vit.pretrained_cfg.get("architecture")):
        return "dinov2"
    visual = backbone.clip.visual if isinstance(backbone, OpenClip) else None
    if visual is not None and hasattr(visual, "transformer"):
        return "clip"
    if visual is not None and getattr(getattr(visual, "trunk", None), "attn_pool", None) is not None:
        return "siglip"
    raise UserError(
        f"{backbone.name} is neither CLIP, SigLIP nor DINOv2, which Transformers' names are known of: leave out "
        "--layout transformers."
    )


def slot_names(backbone: Backbone) -> dict[str, str]:
    """The module of Transformers that each slot of a backbone is."""
    names = {}
    for slot in backbone.slots():
        tower, block, part = slot.split(".")
        if part not in SLOTS:
            raise UserError(f"{backbone.name}: Transformers' models have no module like the slot {slot}.")
        if kind_of(backbone) == "dinov2":
            names[slot] = f"encoder.layer.{block}.{DINO[part]}"
        else:
            names[slot] = f"{'vision' if tower == 'image' else 'text'}_model.encoder.layers.{block}.{SLOTS[part]}"
    return names


DINO = {part: f"attention.{part}_proj" for part in "qkvo"} | {"fc1": "mlp.fc1", "fc2": "mlp.fc2"}


def write(backbone: Backbone, folder: Path, facts: Mapping[str, Any], dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    """A folder that ``AutoModel.from_pretrained`` loads, and how images are to look; gives its image encoder."""
    model = model_of(backbone)
    with without_bars():
        model.to(dtype).save_pretrained(folder)
        loaded, told = type(model).from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    write_processor(folder, facts["preprocessing"])
    assert not any(told.get(kind) for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), told
    loaded.eval()
    if isinstance(backbone, OpenClip):
        check_texts(backbone, loaded, facts["classes"], EXACT if dtype == torch.float32 else 0.05)
    return encoder_of(loaded)


@contextmanager
def without_bars() -> Iterator[None]:
    """Without Transformers' progress bars, which files of a second do not need."""
    logging = needed("transformers.utils.logging")
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def encoder_of(model: Any) -> Callable[[Tensor], Tensor]:
    """Features, (B, D), of normalised images by a model of Transformers."""

    def encode(image: Tensor) -> Tensor:
        return pooled(getattr(model, "get_image_features", model)(pixel_values=image))

    return encode


def pooled(found: Any) -> Tensor:
    """The features in what a model of Transformers gives: a tensor before version 5."""
    features: Tensor = found if isinstance(found, Tensor) else found.pooler_output
    return features


@torch.no_grad()
def check_texts(backbone: Any, model: Any, classes: Sequence[str], tolerance: float) -> None:
    """Raises UserError where a loaded model's text tower gives other features than the backbone's, of class names."""
    tokens = backbone.tokenize([f"a photo of a {name}." for name in classes])
    expected, found = backbone.clip.encode_text(tokens), pooled(model.get_text_features(input_ids=tokens))
    difference = float((found - expected).abs().max() / expected.abs().max())
    if not difference <= tolerance:
        raise UserError(
            f"{backbone.name}: the text tower of Transformers' {type(model).__name__} gives other features "
            f"({difference:.2g} of the largest)."
        )


def write_processor(folder: Path, seen: Mapping[str, Any]) -> None:
    """``preprocessor_config.json`` of a preprocessing, for what resizes the shortest side or squashes."""
    from PIL import Image

    side = int(seen["size"] / seen["crop"])
    squashed, size = seen["resize"] == "squash", {"height": seen["size"], "width": seen["size"]}
    told = {
        "image_processor_type": "CLIPImageProcessor",
        "do_resize": True,
        "size": {"height": side, "width": side} if squashed else {"shortest_edge": side},
        "resample": int(Image.Resampling[seen["interpolation"].upper()]),
        "do_center_crop": True,
        "crop_size": size,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(seen["mean"]),
        "image_std": list(seen["std"]),
        "do_convert_rgb": True,
    }
    if seen["resize"] != "longest":  # which that processor has not
        (folder / "preprocessor_config.json").write_text(json.dumps(told, indent=2), encoding="utf-8")


def model_of(backbone: Backbone) -> Any:
    """A model of Transformers with the weights of a backbone that is its library's own again.

    Raises:
        UserError: something in the model has no place there.
    """
    needed("transformers")
    found = {"clip": clip, "siglip": siglip, "dinov2": dinov2}[kind_of(backbone)](backbone)
    model, state, left = found
    if left:
        raise UserError(f"{backbone.name}: Transformers' {type(model).__name__} has no place for {sorted(left)[0]}.")
    own = model.state_dict()
    wrong = [name for name in own.keys() | state if name not in own or name not in state]
    wrong += [name for name in own.keys() & state if own[name].shape != state[name].shape]
    if wrong:
        raise UserError(f"{backbone.name}: Transformers' {type(model).__name__} differs in {sorted(wrong)[0]}.")
    model.load_state_dict(state, strict=True)
    return model.eval()


def act_of(module: nn.Module) -> str:
    """Transformers' name of an activation."""
    name = type(module).__name__
    if name == "QuickGELU":
        return "quick_gelu"
    tanh = name in ("GELUTanh", "GeluTanh") or getattr(module, "approximate", "none") == "tanh"
    if not (tanh or "GELU" in name.upper()):
        raise UserError(f"Transformers' models are not known to have the activation {name}.")
    return "gelu_pytorch_tanh" if tanh else "gelu"


def renamed_block(state: State, there: str, here: str) -> State:
    """Takes the tensors of a block out of a state, under Transformers' names."""
    found: State = {}
    for name in [name for name in state if name.startswith(f"{there}.")]:
        own = name.removeprefix(f"{there}.")
        module, _, kind = own.rpartition(".")
        if own in ("attn.in_proj_weight", "attn.in_proj_bias", "attn.qkv.weight", "attn.qkv.bias"):
            kind = own.replace("_", ".").rpartition(".")[2]
            parts = state.pop(name).chunk(3)
            found |= {f"{here}.self_attn.{p}.{kind}": t for p, t in zip(QKV, parts, strict=True)}
        elif BLOCK.get(module, module) in {*BLOCK.values(), "mlp.fc1", "mlp.fc2"}:
            found[f"{here}.{BLOCK.get(module, module)}.{kind}"] = state.pop(name)
    return found


def text_of(state: State, prefix: str, blocks: int) -> State:
    """Takes the text tower of open_clip out of a state, but for its last projection."""
    found: State = {}
    for i in range(blocks):
        found |= renamed_block(state, f"{prefix}transformer.resblocks.{i}", f"text_model.encoder.layers.{i}")
    names = {"token_embedding.weight": "embeddings.token_embedding.weight"}
    names |= {"positional_embedding": "embeddings.position_embedding.weight"}
    names |= {f"ln_final.{kind}": f"final_layer_norm.{kind}" for kind in ("weight", "bias")}
    return found | {f"text_model.{here}": state.pop(prefix + there) for there, here in names.items()}


def text_sizes(text: Any) -> dict[str, Any]:
    """The sizes of a text tower of open_clip for a configuration of Transformers."""
    block = text.transformer.resblocks[0]
    vocabulary, width = text.token_embedding.weight.shape
    return {
        "hidden_size": width,
        "intermediate_size": block.mlp.c_fc.out_features,
        "num_hidden_layers": len(text.transformer.resblocks),
        "num_attention_heads": block.attn.num_heads,
        "vocab_size": vocabulary,
        "max_position_embeddings": len(text.positional_embedding),
        "hidden_act": act_of(block.mlp.gelu),
        "layer_norm_eps": text.ln_final.eps,
    }


def clip(backbone: Any) -> tuple[Any, State, set[str]]:
    """``CLIPModel``, its state, and the names of what is left over."""
    from transformers import CLIPConfig, CLIPModel

    model, visual, text = backbone.clip, backbone.clip.visual, backbone._text
    state: State = {name: t.clone() for name, t in model.state_dict().items()}
    block, prefix = visual.transformer.resblocks[0], "text." if text is not model else ""
    last = text.token_embedding.weight.shape[0] - 1
    projection = state.pop(f"{prefix}text_projection", None)
    if projection is None or getattr(text, "text_projection", None) is None or not isinstance(visual.proj, Tensor):
        raise UserError(f"{backbone.name}: Transformers' CLIPModel ends both towers with a projection, this one not.")
    # 2 makes Transformers take the largest token, as CLIP does
    end = 2 if backbone._pool == "argmax" else int(getattr(text, "eos_id", last))
    config = CLIPConfig(
        projection_dim=projection.shape[1],
        text_config=text_sizes(text)
        | {"projection_dim": projection.shape[1], "bos_token_id": last - 1, "eos_token_id": end, "pad_token_id": 0},
        vision_config={
            "hidden_size": visual.transformer.width,
            "intermediate_size": block.mlp.c_fc.out_features,
            "num_hidden_layers": len(visual.transformer.resblocks),
            "num_attention_heads": block.attn.num_heads,
            "image_size": backbone.image_size,
            "patch_size": visual.patch_size[0],
            "projection_dim": projection.shape[1],
            "hidden_act": act_of(block.mlp.gelu),
            "layer_norm_eps": visual.ln_post.eps,
        },
    )
    found = {"logit_scale": state.pop("logit_scale"), "text_projection.weight": projection.T.contiguous()}
    found |= {"visual_projection.weight": state.pop("visual.proj").T.contiguous()}
    for i in range(len(visual.transformer.resblocks)):
        place = f"vision_model.encoder.layers.{i}"
        found |= renamed_block(state, f"visual.transformer.resblocks.{i}", place)
    names = {"conv1.weight": "embeddings.patch_embedding.weight", "class_embedding": "embeddings.class_embedding"}
    names |= {"positional_embedding": "embeddings.position_embedding.weight"}
    for there, here in (("ln_pre", "pre_layrnorm"), ("ln_post", "post_layernorm")):
        names |= {f"{there}.{kind}": f"{here}.{kind}" for kind in ("weight", "bias")}
    found |= {f"vision_model.{here}": state.pop(f"visual.{there}") for there, here in names.items()}
    found |= text_of(state, prefix, len(text.transformer.resblocks))
    return CLIPModel(config), found, set(state) - {"attn_mask", "text.attn_mask"}


def siglip(backbone: Any) -> tuple[Any, State, set[str]]:
    """``SiglipModel``, its state, and the names of what is left over."""
    from transformers import SiglipConfig, SiglipModel

    model, trunk, text = backbone.clip, backbone.clip.visual.trunk, backbone.clip.text
    state: State = {name: t.clone() for name, t in model.state_dict().items()}
    block = trunk.blocks[0]
    config = SiglipConfig(
        text_config=text_sizes(text) | {"projection_size": model.text.text_projection.out_features},
        vision_config={
            "hidden_size": trunk.embed_dim,
            "intermediate_size": block.mlp.fc1.out_features,
            "num_hidden_layers": len(trunk.blocks),
            "num_attention_heads": block.attn.num_heads,
            "image_size": backbone.image_size,
            "patch_size": trunk.patch_embed.patch_size[0],
            "hidden_act": act_of(block.mlp.act),
            "layer_norm_eps": trunk.norm.eps,
        },
    )
    found = {f"logit_{kind}": state.pop(f"logit_{kind}").reshape(1) for kind in ("scale", "bias")}
    found |= text_of(state, "text.", len(text.transformer.resblocks))
    for i in range(len(trunk.blocks)):
        found |= renamed_block(state, f"visual.trunk.blocks.{i}", f"vision_model.encoder.layers.{i}")
    found["vision_model.embeddings.position_embedding.weight"] = state.pop("visual.trunk.pos_embed")[0]
    found["vision_model.head.probe"] = state.pop("visual.trunk.attn_pool.latent")
    modules = {"patch_embed.proj": "embeddings.patch_embedding", "norm": "post_layernorm"}
    modules |= {"attn_pool.proj": "head.attention.out_proj", "attn_pool.norm": "head.layernorm"}
    modules |= {f"attn_pool.mlp.{fc}": f"head.mlp.{fc}" for fc in ("fc1", "fc2")}
    for kind in ("weight", "bias"):
        found[f"text_model.head.{kind}"] = state.pop(f"text.text_projection.{kind}")
        parts = [state.pop(f"visual.trunk.attn_pool.{part}.{kind}") for part in ("q", "kv")]
        found[f"vision_model.head.attention.in_proj_{kind}"] = torch.cat(parts)
        for there, here in modules.items():
            found[f"vision_model.{here}.{kind}"] = state.pop(f"visual.trunk.{there}.{kind}")
    return SiglipModel(config), found, set(state)


def dinov2(backbone: Any) -> tuple[Any, State, set[str]]:
    """``Dinov2Model`` or the one with registers, its state, and the names of what is left over."""
    from timm.layers import resample_abs_pos_embed
    from transformers import Dinov2Config, Dinov2Model, Dinov2WithRegistersConfig, Dinov2WithRegistersModel

    vit = backbone.vit
    if vit.global_pool != "token":
        what = f"gives its class token, and pool is {vit.global_pool}"
        raise UserError(f"{backbone.name}: Transformers' Dinov2Model {what}.")
    state: State = {name: t.clone() for name, t in vit.state_dict().items()}
    registers, block, side = vit.num_reg_tokens, vit.blocks[0], backbone.image_size // vit.patch_embed.patch_size[0]
    own = 0 if vit.no_embed_class else vit.num_prefix_tokens
    position = resample_abs_pos_embed(state.pop("pos_embed"), [side, side], num_prefix_tokens=own)
    if not own:
        position = torch.cat([torch.zeros_like(position[:, :1]), position], 1)
    gated = hasattr(block.mlp, "fc1_g") or type(block.mlp).__name__ in ("GluMlp", "SwiGLUPacked", "SwiGLU")
    sizes = {
        "hidden_size": vit.embed_dim,
        "num_hidden_layers": len(vit.blocks),
        "num_attention_heads": block.attn.num_heads,
        "image_size": backbone.image_size,
        "patch_size": vit.patch_embed.patch_size[0],
        "mlp_ratio": block.mlp.fc1.out_features // vit.embed_dim,
        "hidden_act": "gelu" if gated else act_of(block.mlp.act),
        "layer_norm_eps": vit.norm.eps,
    }
    if gated:
        raise UserError(f"{backbone.name}: gated MLPs are not known to Transformers' names here.")
    model: Any = Dinov2Model(Dinov2Config(**sizes))
    if registers:
        model = Dinov2WithRegistersModel(Dinov2WithRegistersConfig(**sizes, num_register_tokens=registers))
    found = {"embeddings.position_embeddings": position, "embeddings.cls_token": state.pop("cls_token")}
    found["embeddings.mask_token"] = torch.zeros(1, vit.embed_dim)
    if registers:
        found["embeddings.register_tokens"] = state.pop("reg_token")
    for i in range(len(vit.blocks)):
        there, here = f"blocks.{i}", f"encoder.layer.{i}"
        renamed = renamed_block(state, there, here)
        swaps = {"layer_norm": "norm", "self_attn.out_proj": "attention.o_proj", "self_attn.": "attention."}
        for name, tensor in renamed.items():
            for old, new in swaps.items():
                name = name.replace(old, new)  # noqa: PLW2901
            found[name] = tensor
        for n in ("1", "2"):
            found[f"{here}.layer_scale{n}.lambda1"] = state.pop(f"{there}.ls{n}.gamma")
    for kind in ("weight", "bias"):
        found[f"embeddings.patch_embeddings.projection.{kind}"] = state.pop(f"patch_embed.proj.{kind}")
        found[f"layernorm.{kind}"] = state.pop(f"norm.{kind}")
    return model, found, set(state)
