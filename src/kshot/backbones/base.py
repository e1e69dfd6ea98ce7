"""What every backbone offers: image features and named slots; frozen until something is attached, and again after."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn

from kshot.backbones import towers
from kshot.backbones.identity import is_own, plain_attributes, values_sha256
from kshot.backbones.preprocessing import Preprocessing
from kshot.backbones.tokens import PARTS
from kshot.backbones.unfuse import restore
from kshot.errors import UserError
from kshot.slots import AdapterLayer, Slot, adapters_off, projections_of


class Backbone(nn.Module, ABC):
    """An image encoder that takes RGB images and owns their normalisation.

    Everything in it starts frozen and in evaluation mode; only what is attached, or unfrozen by name, ever trains.

    Args:
        name: architecture and weights, as the config names them.
        preprocessing: of the images that its weights were trained on.
        feature_dim: width of an image feature.
        features: which tokens it is of, where there is a choice; texts and learned tokens go with ``default`` alone.

    Attributes:
        image_size: side of the square images it takes, in pixels.
        mean: of the three colours, (1, 3, 1, 1); ``std`` likewise.
    """

    mean: Tensor
    std: Tensor
    weight_sha256: str = ""  # of the weights as loaded; checkpoints carry it
    image_blocks: int = 0  # of the image tower, that learned tokens can enter; 0 when it takes none
    image_width: int = 0  # of its tokens

    def __init__(self, name: str, preprocessing: Preprocessing, feature_dim: int, features: str = "default") -> None:
        super().__init__()
        self.name, self.preprocessing, self.feature_dim = name, preprocessing, feature_dim
        self.image_size, self.features = preprocessing.size, features
        self.shared = nn.ModuleList()  # what the layers of an attached method share
        self.initial_values: nn.Module | None = None  # of parameters that are unfrozen, by name
        self.is_unadapted = False
        self.wise_alpha = 1.0  # of what is unfrozen; layers have their own
        self.is_between = False  # moved there for a pass
        self.register_buffer("mean", torch.tensor(preprocessing.mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(preprocessing.std).view(1, 3, 1, 1), persistent=False)

    def freeze(self, towers: nn.Module) -> None:
        """Ends construction: freezes the towers."""
        towers.requires_grad_(False)
        self.eval()

    def settings(self) -> dict[str, Any]:
        """What decides its features beside the weights, in plain data, for headers of checkpoints."""
        return {"features": self.features, "preprocessing": asdict(self.preprocessing)}

    @abstractmethod
    def encode_normalised(self, image: Tensor) -> Tensor:
        """Image features, (B, feature_dim), of normalised images, (B, 3, H, W)."""

    @property
    def tower(self) -> Any:
        """The image tower of open_clip or timm, without a head that stands beside it; None for one of another kind."""
        return None

    def head(self, pooled: Tensor) -> Tensor:
        """Image features, (B, feature_dim), of what the tower makes of its last tokens, (B, D)."""
        return pooled

    def encode_prompted(self, image: Tensor, tokens: Sequence[Tensor]) -> Tensor:
        """Features of normalised images with learned tokens, as :meth:`encode_image`, in a tower with blocks."""
        return self.head(towers.pooled(self.tower, self.last_state(image, tokens)))

    def last_state(self, image: Tensor, tokens: Sequence[Tensor]) -> Tensor:
        """Tokens, (B, L, width), behind the last block, of normalised images with learned tokens."""
        if self.tower is None:
            raise NotImplementedError(f"the image tower of {self.name} takes no learned tokens")
        tokens = [*map(towers.norm_before(self.tower), tokens[:1]), *tokens[1:]]
        runs = towers.runs_of(self.tower, self.image_size)
        return towers.run_prompted(runs, towers.embedded(self.tower, image), tokens)

    def encode_unprojected(self, image: Tensor, tokens: Sequence[Tensor]) -> Tensor:
        """What the last projection is put on, (B, width), as :meth:`encode_image`; for a tower with one."""
        raise NotImplementedError(f"the image tower of {self.name} ends with no projection")

    def encode_image(self, image: Tensor, tokens: Sequence[Tensor] = (), unprojected: bool = False) -> Tensor:
        """Image features, (B, feature_dim), not normalised to unit length.

        Args:
            image: (B, 3, image_size, image_size), uint8, or floats in [0, 1].
            tokens: learned ones, (n, image_width) for each of the first blocks; those of the first stand behind the
                tokens of the image, those of a later block replace them (Jia et al. 2022, arXiv:2203.12119).
            unprojected: gives (B, width) from before the last projection instead, of a tower with one.
        """
        image = self.normalised(image)
        with self.passing("image"):
            if unprojected:
                return self.encode_unprojected(image, tokens)
            return self.encode_prompted(image, tokens) if tokens else self.encode_normalised(image)

    def normalised(self, image: Tensor) -> Tensor:
        """Images as :meth:`encode_image` takes them, by the mean and deviation of the weights."""
        dtype = torch.promote_types(self.mean.dtype, torch.float32)
        image = image.to(dtype).div_(255) if image.dtype == torch.uint8 else image.to(dtype)
        return (image - self.mean).div_(self.std).to(self.mean.dtype)

    def leading_blocks(self) -> int:
        """The number of first blocks of the image tower that all that is attached or unfrozen leaves as they are.

        Nothing before them is changed either, so that the tokens behind them are those of the untouched tower: 0 where
        anything is, or the tower cannot be entered behind a block. Features of four blocks need the last four states.
        """
        if self.tower is None or not towers.enterable(self.tower):
            return 0
        count = len(towers.blocks_of(self.tower))
        trained = [name for name, p in self.named_tower_parameters() if name.startswith("image.") and p.requires_grad]
        changed = [towers.first_effect(name, count) for name in (*trained, *self.layers("image"))]
        return min([count + 1 - self._states, *changed])

    @property
    def _states(self) -> int:
        """How many of the last states of the image tower its features are made of."""
        return 1 if self.features == "default" else max(1, PARTS[self.features][0])

    def encode_start(self, image: Tensor, blocks: int) -> Tensor:
        """Tokens, (B, L, width), behind the first blocks, of images as :meth:`encode_image` takes them.

        Args:
            image: (B, 3, image_size, image_size).
            blocks: at most :meth:`leading_blocks`.
        """
        runs = towers.runs_of(self.tower, self.image_size)[:blocks]
        return towers.run_on(runs, towers.embedded(self.tower, self.normalised(image)), 1)[0]

    def encode_rest(self, tokens: Tensor, blocks: int) -> Tensor:
        """Image features, (B, feature_dim), from tokens, (B, L, width), that :meth:`encode_start` gave."""
        with self.passing("image"):
            states = towers.run_on(towers.runs_of(self.tower, self.image_size)[blocks:], tokens, self._states)
            if self.features != "default":
                return towers.probed_states(self.tower, states, self.features)
            return self.head(towers.pooled(self.tower, states[-1]))

    def passing(self, tower: str = "") -> Any:
        """A pass through a tower, or both: what its adapter layers make together is made at the start."""
        if torch.compiler.is_compiling() or not len(self.shared):
            return self.between()
        return self._passing(tower)

    @contextmanager
    def _passing(self, tower: str) -> Iterator[None]:
        layers = {name: layer for name, layer in self.layers(tower).items() if layer.slot.projection.runs_layers}
        methods: list[Any] = list(self.shared)
        for shared in methods:
            shared.begin_pass(layers)
        try:
            with self.between():
                yield
        finally:
            for shared in methods:
                shared.end_pass(layers)

    def interpolate(self, alpha: float) -> None:
        """Evaluates with W + alpha (W' - W) from now on, W' what is trained and W what it started from; trains with W'.

        That is so of adapter layers and of parameters that are unfrozen (WiSE-FT, arXiv:2109.01903).
        """
        self.wise_alpha = alpha
        for layer in self.layers().values():
            layer.wise_alpha = alpha

    def between(self) -> Any:
        """Runs with unfrozen parameters where :meth:`interpolate` puts them for evaluation."""
        moves = self.wise_alpha != 1 and self.initial_values is not None and not self.training
        return self._between() if moves and not self.is_between and not self.is_unadapted else nullcontext()

    @contextmanager
    def _between(self) -> Iterator[None]:
        trained = self._move_between()
        self.is_between = True
        try:
            yield
        finally:
            self.is_between = False
            for parameter, value in trained:
                parameter.data = value

    @torch.inference_mode(False)
    @torch.no_grad()
    def _move_between(self) -> list[tuple[nn.Parameter, Tensor]]:
        """Moves unfrozen parameters to where evaluation has them; returns what they were."""
        initial = {} if self.initial_values is None else dict(self.initial_values.named_buffers())
        moved = [(p, initial[key_of(n)]) for n, p in self.named_tower_parameters() if key_of(n) in initial]
        trained = [(parameter, parameter.data) for parameter, _ in moved]
        for parameter, start in moved:
            parameter.data = torch.lerp(start, parameter.data, self.wise_alpha)
        return trained

    def slots(self) -> dict[str, Slot]:
        """All slots by canonical name, ``<tower>.<block>.<q|k|v|o|fc1|fc2>``.

        Gated MLPs (SwiGLU) that keep gate and input apart have ``fc1_g`` and ``fc1_x`` instead of ``fc1``; the pattern
        ``*.fc*`` takes all.
        """
        slots = [projection.slot(part) for projection in projections_of(self) for part in projection.sizes]
        return {slot.name: slot for slot in slots}

    def fused_slots(self) -> dict[str, Slot]:
        """Projections of several parts as one slot each, ``<tower>.<block>.qkv``: one matrix of all their rows."""
        fused = [projection.slot(projection.whole) for projection in projections_of(self) if len(projection.sizes) > 1]
        return {slot.name: slot for slot in fused}

    def layers(self, tower: str = "") -> dict[str, AdapterLayer]:
        """The attached adapter layers by slot; of one tower, ``image`` or ``text``, where it is named."""
        chosen = [p for p in projections_of(self) if p.place.startswith(tower)]
        return {layer.slot.name: layer for p in chosen for layer in p.layers().values()}

    @abstractmethod
    def named_tower_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """All parameters but adapters', under names that begin with ``image.`` or ``text.``."""

    def trainable(self, tower: str) -> list[nn.Parameter]:
        """What trains in a tower, ``image`` or ``text``, adapters included."""
        if not any(p.requires_grad for p in self.parameters()):
            return []
        own = [p for name, p in self.named_tower_parameters() if name.startswith(f"{tower}.") and p.requires_grad]
        layers = [p for layer in self.layers(tower).values() for p in layer.parameters() if p.requires_grad]
        return list({id(p): p for p in own + layers}.values())  # layers may share a tensor

    def image_sha256(self) -> str:
        """SHA-256 over all that decides features of the untouched image tower: its present values, and how it is built.

        Modules count by their classes and plain attributes, so that equal weights in another architecture differ.
        """
        with self.unadapted():
            parameters = [pair for pair in self.named_tower_parameters() if pair[0].startswith("image.")]
            built = [(n, type(m).__qualname__, plain_attributes(m)) for n, m in self.named_modules() if n and is_own(n)]
            values = values_sha256([*parameters, *(pair for pair in self.named_buffers() if is_own(pair[0]))])
        return hashlib.sha256(f"{values} {self.settings()} {built}".encode()).hexdigest()

    def unfreeze(self, names: Sequence[str]) -> None:
        """Lets some of the towers' own parameters train, and keeps the values that they start from."""
        named = dict(self.named_tower_parameters())
        self.initial_values = self.initial_values or nn.Module()
        kept = dict(self.initial_values.named_buffers())
        for name in names:
            named[name].requires_grad_(True)
            if key_of(name) not in kept:
                self.initial_values.register_buffer(key_of(name), named[name].detach().clone(), persistent=False)

    @contextmanager
    def unadapted(self) -> Iterator[None]:
        """Runs as the backbone was before anything was attached: the zero-shot row of every table, and teachers."""
        if self.is_unadapted:  # contexts nest
            yield
            return
        with adapters_off(self):
            self._swap_initial()
            self.is_unadapted = True
            try:
                yield
            finally:
                self._swap_initial()
                self.is_unadapted = False

    def _swap_initial(self) -> None:
        if self.initial_values is None:
            return
        initial = dict(self.initial_values.named_buffers())
        for name, parameter in self.named_tower_parameters():
            if key_of(name) in initial:
                trained, parameter.data = parameter.data, initial[key_of(name)]
                self.initial_values.register_buffer(key_of(name), trained, persistent=False)

    def detach(self) -> None:
        """Takes off whatever is attached: the backbone is what it was when it was built, to the bit."""
        for projection in projections_of(self):
            projection.adapters.clear()
            projection.held = None
        self.shared = nn.ModuleList()
        self._swap_initial()
        self.initial_values, self.wise_alpha = None, 1.0
        for _, parameter in self.named_tower_parameters():
            parameter.requires_grad_(False)
            parameter.grad = None
        self.eval()

    def settle(self) -> None:
        """Leaves unfrozen parameters for good where evaluation has them."""
        if self.wise_alpha != 1:
            self._move_between()
            self.initial_values = None

    def restore_library(self) -> None:
        """Puts the library's own modules back where projections took their place; nothing is attached any more."""
        self.shared = nn.ModuleList()
        self.initial_values, self.wise_alpha = None, 1.0
        restore(self)
        self.requires_grad_(False)

    def train(self, mode: bool = True) -> Backbone:
        """Switches adapters; the frozen towers stay in evaluation mode unless a method trains their own parameters.

        Leading blocks of the image tower, which no method changes, stay in it even then.
        """
        super().train(mode and self.initial_values is not None)
        if self.training:
            for module in towers.leading_modules(self.tower, self.leading_blocks()):
                module.eval()
        for module in self.modules():
            if isinstance(module, AdapterLayer):
                module.train(mode)
        return self


def key_of(name: str) -> str:
    """A parameter's name as the name of a buffer."""
    return name.replace(".", "/")


def require_image_prompts(backbone: Backbone, who: str) -> None:
    """Raises UserError unless learned tokens can enter the image tower."""
    if backbone.features != "default":
        raise UserError(
            f"{who} puts learned tokens into the image tower, which takes them with features: default only."
        )
    if not backbone.image_blocks:
        raise UserError(
            f"{who} puts learned tokens into the image tower, which that of {backbone.name} cannot take: use a plain "
            "vision transformer (no ResNet, no rotary positions)."
        )


def check_image_size(image_size: int, patch: int, name: str) -> None:
    """Raises UserError unless the patches tile the image."""
    if image_size < patch or image_size % patch:
        below, above = max(patch, image_size // patch * patch), (max(image_size, 0) // patch + 1) * patch
        raise UserError(
            f"image_size {image_size} is not a multiple of the patch size {patch} of {name}: use "
            f"{below if below == above else f'{below} or {above}'}."
        )
