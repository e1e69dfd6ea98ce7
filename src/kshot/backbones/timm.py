"""Vision transformers without a text tower through timm: ViT, DINOv2, DINOv3."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from kshot.backbones.base import Backbone, check_image_size
from kshot.backbones.hub import out_of_reach, quiet_loading
from kshot.backbones.identity import sha256_of
from kshot.backbones.preprocessing import Preprocessing
from kshot.backbones.tokens import Features, probed, width_of
from kshot.backbones.towers import prompt_shape
from kshot.backbones.unfuse import unfuse_timm
from kshot.errors import UserError, first_line, nearest_first


class Timm(Backbone):
    """A vision transformer of timm; features are its pooled token or tokens before any head.

    Args:
        model: a timm name, with or without a tag (``vit_small_patch14_dinov2.lvd142m``), ``hf-hub:org/name`` or
            ``local-dir:folder``.
        weights: ``pretrained`` fetches what the tag names, ``random`` leaves the initial values, anything else is a
            local file of weights (safetensors or torch).
        image_size: side of the input in pixels; None takes 224 for DINOv2, whose 518 few users want, and otherwise the
            model's own.
        pool: ``token`` or ``avg``; None takes ``token`` for DINOv3, as its authors' few-shot protocol does, and
            otherwise the model's own.
        features: ``default`` pools as ``pool`` says; others are of tokens after the final norm: ``cls``, ``mean`` (of
            the patches), ``cls+mean`` of the last block, ``last4`` (class tokens of four blocks), ``last4+mean``.

    Raises:
        UserError: unknown model, no transformer blocks, weights out of reach or unfit, image size off the patches,
            features that the model has not.
    """

    @torch.inference_mode(False)  # weights must be able to stand in the graph of what is attached
    def __init__(
        self,
        model: str,
        weights: str = "pretrained",
        image_size: int | None = None,
        pool: str | None = None,
        features: Features = "default",
    ) -> None:
        import timm

        if pool is not None and features != "default":
            raise UserError(f"pool: {pool} says how features: default are pooled, and features is {features}.")

        base = model.split(":")[-1].split("/")[-1].split(".")[0]
        if ":" not in model and not timm.is_model(base):
            raise UserError(f"Unknown timm model {model!r}. {nearest_first(base, timm.list_models())}")
        if image_size is None and "dinov2" in base:
            image_size = 224
        if pool is None and "dinov3" in base:
            pool = "token"
        options: dict[str, Any] = {"num_classes": 0, "dynamic_img_size": True}
        if weights not in ("pretrained", "random"):
            if not Path(weights).is_file():
                raise UserError(
                    f"weights: {weights!r} is neither 'pretrained', 'random' nor an existing file of weights for "
                    f"{model}."
                )
            options["pretrained_cfg_overlay"] = {"file": weights}
        if pool is not None:
            options["global_pool"] = pool
        try:
            with quiet_loading(hub=weights == "pretrained"):
                vit: Any = timm.create_model(model, pretrained=weights != "random", **options)
        except TypeError as error:
            raise UserError(f"{model} is no vision transformer with free image size ({first_line(error)}).") from error
        except Exception as error:  # hubs and loaders raise what they like
            if weights == "pretrained":
                raise UserError(out_of_reach(f"The weights of {model}", "weights", error)) from error
            raise UserError(f"The weights in {weights} do not fit {model}: {first_line(error)}") from error
        if not all(hasattr(block, "attn") and hasattr(block, "mlp") for block in getattr(vit, "blocks", [None])):
            raise UserError(f"{model} has no blocks of one attention and one MLP: choose a vision transformer of timm.")
        config = timm.data.resolve_model_data_config(vit)
        size = image_size or config["input_size"][-1]
        check_image_size(size, vit.patch_embed.patch_size[0], model)
        width = width_of(features, vit.num_features, model, vit)
        super().__init__(model, Preprocessing.of_timm(config, size), width, features)
        self.weight_sha256 = sha256_of(vit)
        self.vit = vit
        self.image_blocks, self.image_width = prompt_shape(vit)
        unfuse_timm(vit.blocks, "image")
        self.freeze(vit)

    def settings(self) -> dict[str, Any]:
        return {**super().settings(), "pool": self.vit.global_pool}

    def encode_normalised(self, image: Tensor) -> Tensor:
        if self.features != "default":
            return probed(self.vit, image, self.features)
        return cast(Tensor, self.vit(image))

    @property
    def tower(self) -> Any:
        return self.vit

    def named_tower_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        for name, parameter in self.vit.named_parameters():
            if ".adapters." not in name:
                yield f"image.{name}", parameter
