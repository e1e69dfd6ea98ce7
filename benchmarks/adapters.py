"""What the weight-tuning methods cost in a training step: against PEFT, against their plain forms, and compiled.

    python benchmarks/adapters.py --part peft --images 32

``peft``: ViT-B/32 of timm, all four matrices of every block adapted. Compared, in turns within one process and with the
same random weights: PEFT's step, kshot's step, and for both the frozen model as timm and as kshot build it. A step is a
forward pass on random images, a backward pass, an AdamW step and the method's own work (AdaLoRA's penalty, and its
allocator in every step). A frozen model runs forward and backward down to its first block, as an adapted one does.
Targets: ours/peft <= 1, and at most half of PEFT's overhead over the frozen model for DoRA, VeRA and RandLoRA. What
trains and random bases are float32 on both sides (left alone, PEFT draws RandLoRA's bases in bfloat16, and casts all of
them in every call of every layer).

``open_clip``: the same for the image tower of CLIP ViT-B/32, on whose ``nn.MultiheadAttention`` PEFT has LoRA alone:
``note`` is what it says to other methods. Methods that PEFT has not at all are measured too. Targets: at most 25 % over
the frozen model, 70 % for RandLoRA.

Memory is the peak of a step together with all that is held for it (weights, bases, optimizer state, kept casts), each
in a process of its own.

``forms``: what four methods do of their own, forward and backward, at 1600 tokens, against the form that their authors
publish; ``beyond frozen`` is the same ratio after the frozen product, which SVFT has in it, was taken off both.

``compile``: torch.compile and torch.export of a small adapted model in training and of a merged one in evaluation,
against the same model run eagerly.

(On one core, a row of ``peft`` takes a minute at 32 images and several at 128, a row of ``compile`` a minute.)
"""

import argparse
import contextlib
import csv
import ctypes
import gc
import logging
import math
import re
import shutil
import statistics
import warnings
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from side_by_side import (
    RESULTS,
    clip_of,
    difference,
    interleave,
    machine,
    milliseconds,
    our_clip,
    peak_megabytes,
    print_table,
    ratio,
    resident,
)
from torch import Tensor, nn

from kshot.adapters import (
    NOLA,
    PRANC,
    SVFT,
    AdaLoRA,
    Adapter,
    AutoLoRA,
    DoRA,
    FullTuning,
    HydraLoRA,
    LoRA,
    LoRAXS,
    PiSSA,
    RandLoRA,
    SlotAdapter,
    VeRA,
)
from kshot.backbones import Timm
from kshot.backbones.base import Backbone
from kshot.holding import stored_as
from kshot.slots import AdapterLayer, Projection, merge

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
DTYPES = ("float32", "bfloat16")
TARGETS = ("image.*.qkv", "image.*.o", "image.*.fc?")
SIDES = ("library", "kshot", "theirs", "ours")  # the frozen models, the adapted models
STEPS = 10_000  # length of the run that AdaLoRA plans for: all that is measured lies within its pruning
KEY = ("part", "backbone", "method", "images", "dtype", "state")  # a row replaces the one that has the same of these
Config = tuple[str, dict[str, Any]]


def lora(**settings: Any) -> Config:
    """PEFT's class for LoRA and what is derived from it."""
    return "LoraConfig", {"r": 32, "lora_alpha": 32} | settings


BUDGET = AdaLoRA(initial_steps=0, final_steps=STEPS // 2, every=1)
PEFT_BUDGET = {"init_r": 12, "target_r": 8, "lora_alpha": 12, "tinit": 0, "tfinal": STEPS // 2, "deltaT": 1}
METHODS: dict[str, tuple[Adapter, Config | None]] = {  # equal settings: ours, and those of PEFT where it has the method
    "LoRA-32": (LoRA(rank=32), lora()),
    "PiSSA-32": (PiSSA(rank=32), lora(init_lora_weights="pissa_niter_4")),
    "DoRA-32": (DoRA(rank=32), lora(use_dora=True)),
    "AdaLoRA-12": (BUDGET, ("AdaLoraConfig", PEFT_BUDGET | {"total_step": STEPS, "orth_reg_weight": 0.1})),
    "VeRA-256": (VeRA(rank=256), ("VeraConfig", {"r": 256})),
    "RandLoRA-6": (RandLoRA(rank=6, alpha=60), ("RandLoraConfig", {"r": 6, "randlora_alpha": 60})),
    "full tuning": (FullTuning(), None),
    "LoRA-XS-32": (LoRAXS(rank=32), None),
    "SVFT plain": (SVFT(), None),
    "SVFT band 2": (SVFT(pattern="banded", band=2), None),
    "HydraLoRA 8x3": (HydraLoRA(rank=8, heads=3), None),
    "NOLA K=1024": (NOLA(rank=1, bases=1024), None),
    "PRANC hashed": (PRANC(coefficients=1000), None),
    "AutoLoRA search": (AutoLoRA(max_rank=8), None),
}
IN_PEFT = [name for name, (_, config) in METHODS.items() if config or name == "full tuning"]


@dataclass(frozen=True)
class Tower:
    """An image tower.

    Attributes:
        library: builds it as its library does.
        ours: builds it as kshot does.
        stem: ends the name of the module whose output goes to the first block.
        targets: what PEFT adapts, as a regular expression on names in the library.
        size: of images.
    """

    library: Callable[[], nn.Module]
    ours: Callable[[], Backbone]
    stem: str
    targets: str
    size: int = 224


def of_timm(name: str, size: int = 224) -> Tower:
    import timm

    return Tower(
        lambda: timm.create_model(name, num_classes=0),
        lambda: Timm(name, "random"),
        "patch_embed",
        r"vit\.blocks\.\d+\.(attn\.(qkv|proj)|mlp\.(fc1|fc2))",
        size,
    )


def of_open_clip(name: str, size: int = 224) -> Tower:
    def library() -> nn.Module:
        clip = clip_of(name)
        clip.visual.holder = [clip]  # so that its text tower takes the memory that it takes in ours
        return clip.visual

    return Tower(
        library,
        lambda: our_clip(name),
        "conv1",
        r"vit\.transformer\.resblocks\.\d+\.(attn|mlp\.(c_fc|c_proj))",
        size,
    )


TOWERS: dict[str, Callable[[], Tower]] = {
    "timm ViT-B/32": lambda: of_timm("vit_base_patch32_224"),
    "timm test_vit": lambda: of_timm("test_vit", 160),
    "open_clip ViT-B/32": lambda: of_open_clip("ViT-B-32"),
    "open_clip glyph_clip": lambda: of_open_clip("kshot:glyph_clip", 32),
}
TOWER_OF = {  # by part: to be measured, to be tried quickly
    "peft": ("timm ViT-B/32", "timm test_vit"),
    "open_clip": ("open_clip ViT-B/32", "open_clip glyph_clip"),
}

# ------------------------------------------------------------------------------------------------ steps


class Encoder(nn.Module):
    """One of our backbones as a module that takes images."""

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(self, images: Tensor) -> Tensor:
        with self.backbone.passing("image"):
            return self.backbone.encode_normalised(images)


class WithLoss(nn.Module):
    """A tower that gives its loss itself, as PEFT asks for where a method adds a penalty to it."""

    def __init__(self, vit: nn.Module) -> None:
        super().__init__()
        self.vit = vit

    def forward(self, images: Tensor) -> argparse.Namespace:
        features = self.vit(images)
        classes = torch.arange(len(features), device=features.device) % features.shape[1]
        return argparse.Namespace(features=features.detach(), loss=F.cross_entropy(features.float(), classes))


def frozen(model: WithLoss, stem: str) -> WithLoss:
    """Lets gradients run back to where the first block begins, as they do to the first adapter, and no further."""
    module = next(m for name, m in model.requires_grad_(False).eval().named_modules() if name.endswith(stem))
    module.register_forward_hook(lambda *given: given[-1].requires_grad_())
    return model


def adapted(tower: Tower, adapter: Adapter) -> Backbone:
    """Our backbone in training mode."""
    backbone = tower.ours()
    adapter.attach(backbone, ["image.*"] if isinstance(adapter, FullTuning) else TARGETS)
    return backbone.train()


def adapted_by_peft(tower: Tower, config: Config | None) -> nn.Module:
    """PEFT's model in training mode, or without a method the library's own to tune in full; raises what PEFT raises."""
    import peft

    model = WithLoss(tower.library())
    if config is None:
        return model.train()
    name, settings = config
    wrapped = peft.get_peft_model(model, getattr(peft, name)(target_modules=tower.targets, **settings)).train()
    for bases in (m for m in wrapped.modules() if type(m).__name__ == "BufferDict"):
        for key, base in bases.items():
            bases[key] = base.float()
    return wrapped


class Training:
    """One side of a comparison. A call is one training step and gives the features from before it.

    Args:
        side: one of SIDES.
        tower: is built anew, with the same weights whatever the side.
        method: a key of METHODS.
        images: of a batch.
        dtype: bfloat16 runs under autocast.

    Attributes:
        trained: how many numbers train.
    """

    def __init__(self, side: str, tower: Tower, method: str, images: int, dtype: str) -> None:
        torch.manual_seed(0)
        self.images = torch.randn(images, 3, tower.size, tower.size, device=DEVICE)
        torch.manual_seed(1)
        adapter, config = METHODS[method]
        self.shared: list[Any] = []
        self.layers: dict[str, AdapterLayer] = {}
        self.model: nn.Module
        if side == "library":
            self.model = frozen(WithLoss(tower.library()), tower.stem)
        elif side == "kshot":
            self.model = frozen(WithLoss(Encoder(tower.ours())), tower.stem)
        elif side == "theirs":
            self.model = adapted_by_peft(tower, config)
        else:
            backbone = adapted(tower, adapter)
            self.shared, self.layers = list(backbone.shared), backbone.layers()
            self.model = WithLoss(Encoder(backbone))
        self.model.to(DEVICE)
        for shared in self.shared:
            shared.plan(STEPS)
        parameters = trained_of(self.model)
        self.trained = sum(p.numel() for p in parameters)
        self.optimizer = torch.optim.AdamW(parameters, lr=1e-5) if parameters else None
        self.allocate = getattr(getattr(self.model, "base_model", None), "update_and_allocate", None)
        self.bfloat16, self.steps = dtype == "bfloat16", 0
        self.open = contextlib.ExitStack()
        if self.bfloat16:  # as a run does: a library's model has nothing to be stored
            self.open.enter_context(stored_as(self.model, torch.bfloat16))

    def __call__(self) -> Tensor:
        with torch.autocast(DEVICE, torch.bfloat16, enabled=self.bfloat16):
            output = self.model(self.images)
            penalties = [p for shared in self.shared if (p := shared.penalty(self.layers)) is not None]
        sum(penalties, output.loss).backward()
        self.steps += 1
        if self.optimizer is not None:
            self.optimizer.step()
            for shared in self.shared:
                shared.after_step(self.steps, self.layers)
            if self.allocate is not None:
                self.allocate(self.steps)
            self.optimizer.zero_grad()
        return output.features


def held_bytes() -> int:
    """What the process, or on a GPU torch, holds now."""
    gc.collect()
    if CUDA:
        return torch.cuda.memory_allocated()
    ctypes.CDLL(None).malloc_trim(0)
    return resident("VmRSS")


def megabytes(side: str, tower: str, method: str, images: int, dtype: str, threads: int) -> float:
    """The peak of a step with all that is held for it, in a process that has built nothing else."""
    quiet(threads)
    import open_clip  # noqa: F401  what libraries take by themselves does not count
    import peft  # noqa: F401
    import timm  # noqa: F401

    before = held_bytes()
    step = Training(side, TOWERS[tower](), method, images, dtype)
    step()
    return (held_bytes() - before) / 1e6 + peak_megabytes(step)


def megabytes_apart(in_process: bool, *given: Any) -> float:
    """:func:`megabytes` in a process of its own, or for a try in this one, rounded."""
    if in_process:
        return round(megabytes(*given), 1)
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
        return round(process.submit(megabytes, *given).result())


# ------------------------------------------------------------------------------------------------ against PEFT


def compare(part: str, tower: str, method: str, images: int, dtype: str, options: argparse.Namespace) -> dict[str, Any]:
    """The row of one method: ours, PEFT's where it runs, and both over the frozen models."""
    steps: dict[str, Callable[[], Tensor]] = {}
    trained, note = {}, "" if method in IN_PEFT else "PEFT has no such method"
    for side in SIDES:
        if side == "theirs" and method not in IN_PEFT:
            continue
        try:
            step = Training(side, TOWERS[tower](), method, images, dtype)
            features = step()  # at its first step no method has changed the model
        except Exception as error:  # PEFT's refusals are of many types
            if side != "theirs":
                raise
            note = f"PEFT: {one_line(error)}"
            continue
        steps[side], trained[side] = step, step.trained
        if side == "library":
            expected = features
        apart = difference(features, expected)[1]
        assert apart < (1e-3 if dtype == "float32" else 0.1), f"{side}: other weights, features differ by {apart}"
    times = interleave(steps, options.seconds, least=options.least, warm_up=0)
    ms = {side: milliseconds(times[side]) if side in times else math.nan for side in SIDES}

    def against(a: str, b: str) -> tuple[float, float]:
        return ratio(times[a], times[b]) if a in times and b in times else (math.nan, math.nan)

    def over(a: str, b: str) -> float:
        return round(100 * (against(a, b)[0] - 1), 1)

    value, spread = against("ours", "theirs")
    row: dict[str, Any] = {
        "part": part, "backbone": tower, "method": method, "images": images, "dtype": dtype,
        "rounds": len(times["ours"]), "library_frozen_ms": ms["library"], "kshot_frozen_ms": ms["kshot"],
        "peft_ms": ms["theirs"], "ours_ms": ms["ours"], "ours/peft": round(value, 3), "±": round(spread, 3),
        "peft_over_library_%": over("theirs", "library"), "ours_over_kshot_%": over("ours", "kshot"),
        "ours_over_library_%": over("ours", "library"), "overhead_peft/ours": round(overheads(times), 2),
    }  # fmt: skip
    del steps, step
    for side, name in (("theirs", "peft"), ("ours", "ours")):
        given = (side, tower, method, images, dtype, options.threads)
        row[f"{name}_MB"] = megabytes_apart(options.in_process, *given) if side in times else math.nan
    return row | {"peft_trained": trained.get("theirs", math.nan), "ours_trained": trained["ours"], "note": note}


def overheads(times: dict[str, list[float]]) -> float:
    """How many times the seconds that we add to our frozen model PEFT adds to the library's: medians over rounds."""
    if "theirs" not in times:
        return math.nan
    theirs, ours = (
        statistics.median(a - b for a, b in zip(times[side], times[base], strict=True))
        for side, base in (("theirs", "library"), ("ours", "kshot"))
    )
    return theirs / ours


def run_towers(parts: Sequence[str], options: argparse.Namespace) -> None:
    """Parts ``peft`` and ``open_clip``, small batches first."""
    for images in options.images:
        for part in parts:
            tower, rows = TOWER_OF[part][options.quick], []
            for method in options.methods:
                if part == "peft" and method not in IN_PEFT:
                    continue
                for dtype in options.dtype:
                    row = compare(part, tower, method, images, dtype, options)
                    rows.append({name: v for name, v in row.items() if name not in ("part", "backbone", "images")})
                    print(rows[-1], flush=True)
                    keep(results_file("adapters", options.out), row)
            if rows:
                print_table(f"{tower}, {images} images", rows)


# ------------------------------------------------------------------------------------------------ quick and plain forms


class Size(NamedTuple):
    """What the forms run on: tokens, and the layers of some transformer blocks of a width."""

    tokens: int
    blocks: int
    width: int

    def shapes(self) -> dict[str, tuple[int, int]]:
        """(out, in) of the four matrices of a block."""
        w = self.width
        return {"qkv": (3 * w, w), "o": (w, w), "fc1": (4 * w, w), "fc2": (w, 4 * w)}


VIT_B = Size(tokens=1600, blocks=12, width=768)


@dataclass
class Form:
    """Two ways to compute the same, forward and backward; each gives what is compared.

    Attributes:
        quick: kshot's.
        plain: the straightforward one.
        at_least: times that the quick one should be quicker.
        note: what is measured.
        share: of the plain form's work that ``plain`` does.
        frozen: the frozen product that both have in them.
    """

    quick: Callable[[], Iterable[Tensor]]
    plain: Callable[[], Iterable[Tensor]]
    at_least: float
    note: str
    share: float = 1.0
    frozen: Callable[[], object] | None = None


def layers_of(adapter: SlotAdapter, size: Size) -> tuple[list[AdapterLayer], Any]:
    """Layers on the four matrices of each block, which have the same random weights, and what they share."""
    torch.manual_seed(0)
    weights = {part: torch.randn(shape, device=DEVICE) / shape[1] ** 0.5 for part, shape in size.shapes().items()}
    slots = {}
    for block in range(size.blocks):
        for part, weight in weights.items():
            bias = torch.zeros(len(weight), device=DEVICE)
            slot = Projection(weight, bias, {part: len(weight)}, f"image.{block}").slot(part)
            slots[slot.name] = slot
    shared = adapter.prepare(slots)
    layers = [adapter.wrap(slot, shared).to(DEVICE) for slot in slots.values()]
    for slot, layer in zip(slots.values(), layers, strict=True):
        slot.attach(layer)
    stir([p for layer in layers for p in layer.parameters()])
    return layers, shared


def stir(parameters: Iterable[Tensor]) -> None:
    """Moves what trains, so that nothing hides behind an initial zero."""
    torch.manual_seed(2)
    with torch.no_grad():
        for parameter in parameters:
            parameter.add_(0.02 * torch.randn_like(parameter))


def trained_of(layer: nn.Module) -> list[nn.Parameter]:
    return [p for p in layer.parameters() if p.requires_grad]


def inputs(layers: Sequence[AdapterLayer], tokens: int) -> list[tuple[Tensor, Tensor]]:
    """Tokens that need a gradient, and the gradient of the output, for each layer."""
    torch.manual_seed(3)
    return [
        (
            torch.randn(tokens, layer.slot.in_features, device=DEVICE, requires_grad=True),
            torch.randn(tokens, layer.slot.out_features, device=DEVICE),
        )
        for layer in layers
    ]


def both_ways(run: Callable[[AdapterLayer, Tensor], Tensor], layers: Sequence[AdapterLayer], tokens: int) -> Any:
    """Runs every layer forward and backward; gives outputs and gradients of tokens and of what trains."""
    given = inputs(layers, tokens)

    def call() -> list[Tensor]:
        found = []
        for layer, (x, g) in zip(layers, given, strict=True):
            y = run(layer, x)
            found += [y, *torch.autograd.grad(y, [x, *trained_of(layer)], g)]
        return found

    return call


def form_of_hydralora(size: Size) -> Form:
    adapter = HydraLoRA(rank=8, heads=3)
    layers, _ = layers_of(adapter, size._replace(blocks=1))
    y = {len(layer.slot.weight): torch.zeros(size.tokens, len(layer.slot.weight), device=DEVICE) for layer in layers}

    def plain(layer: Any, x: Tensor) -> Tensor:
        omega, out = F.linear(x, layer.G).softmax(-1), y[layer.slot.out_features]
        for j, head in enumerate(layer.B):
            out = out + omega[:, j : j + 1] * F.linear(F.linear(x, layer.A), head) * adapter.scale
        return out

    return Form(
        both_ways(lambda layer, x: layer(x, y[layer.slot.out_features]), layers, size.tokens),
        both_ways(plain, layers, size.tokens),
        3,
        "the change of a block's four layers; plain: a loop over heads, each with a product with A of its own",
    )


def form_of_svft(size: Size) -> Form:
    layers, _ = layers_of(SVFT(), size._replace(blocks=1))

    def plain(layer: Any, x: Tensor) -> Tensor:
        weight = layer.u @ ((layer.s + layer.values)[:, None] * layer.vt)
        return F.linear(x, weight, layer.slot.bias)

    def frozen_product() -> None:
        for layer, (x, g) in zip(layers, inputs(layers, size.tokens), strict=True):
            torch.autograd.grad(F.linear(x, layer.slot.weight, layer.slot.bias), x, g)

    return Form(
        both_ways(lambda layer, x: layer.slot.projection(x), layers, size.tokens),
        both_ways(plain, layers, size.tokens),
        2,
        "all of a block's four layers; plain: the weight is put together from its three factors in every call",
        frozen=frozen_product,
    )


class Regenerated(torch.autograd.Function):
    """Σ_k c_k P_k with a basis that is drawn again in the forward and in the backward pass."""

    @staticmethod
    def forward(ctx: Any, coefficients: Tensor, seed: int, size: int) -> Tensor:
        ctx.drawn = lambda: uniform(seed, len(coefficients), size)
        return coefficients @ ctx.drawn()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return ctx.drawn() @ gradient, None, None


def uniform(seed: int, count: int, size: int) -> Tensor:
    """(count, size) numbers by torch's own generator."""
    generator = torch.Generator(DEVICE).manual_seed(seed)
    return torch.empty(count, size, device=DEVICE).uniform_(-1, 1, generator=generator)


def form_of_nola(size: Size) -> Form:
    layers, shared = layers_of(NOLA(rank=1, bases=1024), size)
    sides = [(p, n) for v in layers for p, n in ((v.alpha, v.slot.in_features), (v.beta, v.slot.out_features))]
    towards = [(torch.randn(v.slot.out_features, 1), torch.randn(1, v.slot.in_features)) for v in layers]

    def quick() -> list[Tensor]:
        made = [factor for factors in shared.combine(layers) for factor in factors]
        return list(torch.autograd.grad(made, [p for p, _ in sides], [g.to(DEVICE) for pair in towards for g in pair]))

    def plain() -> list[Tensor]:
        made = [Regenerated.apply(p, seed, entries) for seed, (p, entries) in enumerate(sides)]
        flat = [g.flatten().to(DEVICE) for up, down in towards for g in (down, up)]
        return list(torch.autograd.grad(made, [p for p, _ in sides], flat))

    return Form(
        quick,
        plain,
        20,
        f"the factors of {len(layers)} layers, K = 1024, r = 1; plain: a basis a layer, drawn anew in every pass",
    )


def form_of_pranc(size: Size) -> Form:
    count, drawn = 1000, 10
    layers, _ = layers_of(PRANC(coefficients=count), size._replace(blocks=1))
    layer: Any = max(layers, key=lambda v: v.slot.weight.numel())
    gradient = torch.randn_like(layer.slot.weight)
    entries, alpha = gradient.numel(), torch.randn(count, device=DEVICE)

    @torch.no_grad()
    def quick() -> list[Tensor]:
        return [layer.build(torch.float32), *layer.pullback(gradient)]

    def plain() -> list[Tensor]:
        delta = gradient.new_zeros(entries)
        for k in range(drawn):
            delta.addcmul_(uniform(k, 1, entries)[0], alpha[k])
        return [delta, torch.stack([uniform(k, 1, entries)[0] @ gradient.flatten() for k in range(drawn)])]

    return Form(
        quick,
        plain,
        50,
        f"the change of fc1 and its gradient, K = {count}; plain: P_k drawn anew in both passes, {drawn} of them timed "
        f"and taken {count // drawn} times",
        share=drawn / count,
    )


FORMS: dict[str, Callable[[Size], Form]] = {
    "NOLA, shared basis": form_of_nola,
    "HydraLoRA, grouped": form_of_hydralora,
    "SVFT, singular basis": form_of_svft,
    "PRANC, hashed": form_of_pranc,
}
SAME_NUMBERS = ("HydraLoRA, grouped", "SVFT, singular basis")  # the others have other random bases


def run_forms(options: argparse.Namespace) -> None:
    """Part ``forms``."""
    rows = []
    for name, make in FORMS.items():
        form = make(Size(64, 1, 64) if options.quick else VIT_B)
        pairs = zip(form.quick(), form.plain(), strict=True)
        apart = max(difference(a, b)[1] for a, b in pairs) if name in SAME_NUMBERS else math.nan
        calls: dict[str, Callable[[], object]] = {"quick": form.quick, "plain": form.plain}
        if form.frozen is not None:
            calls["frozen"] = form.frozen
        times = interleave(calls, options.seconds / 2, least=options.least)
        times["plain"] = [seconds / form.share for seconds in times["plain"]]
        value, spread = ratio(times["plain"], times["quick"])
        beyond = math.nan
        if "frozen" in times:
            rest = {
                k: statistics.median(a - b for a, b in zip(times[k], times["frozen"], strict=True))
                for k in ("plain", "quick")
            }
            beyond = rest["plain"] / rest["quick"]
        row = {
            "part": "forms", "method": name, "dtype": "float32", "rounds": len(times["quick"]),
            "quick_ms": milliseconds(times["quick"]), "plain_ms": milliseconds(times["plain"]),
            "plain/quick": round(value, 2), "±": round(spread, 2), "beyond frozen": round(beyond, 2),
            "at least": form.at_least, "difference": apart, "note": form.note,
        }  # fmt: skip
        rows.append({k: v for k, v in row.items() if k not in ("part", "dtype")})
        keep(results_file("adapters_fast_paths", options.out), row)
    print_table("plain against quick forms", rows)


# ------------------------------------------------------------------------------------------------ compiled


def run_compiled(options: argparse.Namespace) -> None:
    """Part ``compile``."""
    name, rows = "timm test_vit", []
    backend = options.backend or ("inductor" if CUDA or shutil.which("c++") or shutil.which("g++") else "aot_eager")
    for method in options.methods:
        for state in ("adapted, training", "merged, evaluation"):
            row = {"part": "compile", "backbone": name, "method": method, "dtype": "float32", "state": state}
            row |= compiled(TOWERS[name](), METHODS[method][0], state, backend, options)
            print(row, flush=True)
            rows.append({k: v for k, v in row.items() if k not in ("part", "backbone", "dtype")})
            keep(results_file("adapters_fast_paths", options.out), row)
    print_table(f"{name}: torch.compile with {backend}, torch.export", rows)


def compiled(tower: Tower, adapter: Adapter, state: str, backend: str, options: argparse.Namespace) -> dict[str, Any]:
    """What compiling and exporting change in time and in numbers, or why they fail."""
    torch.manual_seed(1)
    backbone = adapted(tower, adapter)
    trained = trained_of(backbone)
    stir(trained)
    model = Encoder(backbone).to(DEVICE)
    images = torch.randn(16, 3, tower.size, tower.size, device=DEVICE)
    train, note = state.endswith("training"), ""
    if not train:
        backbone.eval()
        try:
            merge(backbone)
        except Exception as error:  # it depends on its input
            note = f"not merged: {one_line(error)}"

    def run(encode: Callable[[Tensor], Tensor], images: Tensor = images) -> list[Tensor]:
        with torch.set_grad_enabled(train):
            features = encode(images)
            classes = torch.arange(len(features), device=features.device)
            return (
                [features, *torch.autograd.grad(F.cross_entropy(features, classes), trained)] if train else [features]
            )

    expected = run(model)

    def apart(found: list[Tensor], expected: list[Tensor] = expected) -> float:
        return max(difference(a, b)[1] for a, b in zip(found, expected, strict=True))

    torch._dynamo.reset()
    row: dict[str, Any] = {"backend": backend}
    fast = torch.compile(model, backend=backend, fullgraph=True)
    try:
        row["difference"] = apart(run(fast))
        times = interleave({"eager": lambda: run(model), "compiled": lambda: run(fast)}, options.seconds / 6)
        row |= {"eager_ms": milliseconds(times["eager"]), "compiled_ms": milliseconds(times["compiled"])}
        row["compiled/eager"] = round(ratio(times["compiled"], times["eager"])[0], 3)
        row["compile"] = "ok"
    except Exception as error:
        row["compile"] = one_line(error)
    try:
        with torch.set_grad_enabled(train):
            batch = {0: torch.export.Dim.DYNAMIC}
            exported = torch.export.export(model, (images,), dynamic_shapes=({**batch},)).module()
        row["export_difference"] = max(
            apart(run(exported)[:1], expected[:1]), apart(run(exported, images[:3])[:1], run(model, images[:3])[:1])
        )
        row["export"] = "ok"
    except Exception as error:
        row["export"] = one_line(error)
    return row | {"note": note}


# ------------------------------------------------------------------------------------------------ rows and files


def one_line(error: Exception) -> str:
    """Type and beginning of an error's message."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def results_file(stem: str, folder: Path) -> Path:
    """One file for CPUs, one for each kind of GPU."""
    device = "_" + re.sub(r"\W+", "_", torch.cuda.get_device_name()).lower() if CUDA else ""
    return folder / f"{stem}{device}.csv"


def keep(path: Path, row: dict[str, Any]) -> None:
    """Puts a row into a file, in the place of the one with the same key, so that parts can be run one by one."""
    new = {name: str(value) for name, value in (row | {"machine": machine()}).items()}
    rows = list(csv.DictReader(path.open(newline=""))) if path.is_file() else []
    place = next((i for i, old in enumerate(rows) if all(old.get(k, "") == new.get(k, "") for k in KEY)), len(rows))
    rows[place : place + 1] = [new]
    columns = list(dict.fromkeys(name for r in rows for name in r if name != "machine"))
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [*columns, "machine"], restval="")
        writer.writeheader()
        writer.writerows(rows)


def quiet(threads: int) -> None:
    """Sets the number of threads, and silences what libraries say about random weights and the like."""
    torch.set_num_threads(threads)
    logging.disable(logging.WARNING)
    warnings.filterwarnings("ignore")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = [*TOWER_OF, "forms", "compile"]
    parser.add_argument("--part", nargs="+", choices=parts, default=parts)
    parser.add_argument("--images", nargs="+", type=int, default=[32, 128], help="of a batch")
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=list(DTYPES), help="bfloat16: autocast")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--seconds", type=float, default=60.0, help="time for a comparison")
    parser.add_argument("--least", type=int, default=3, help="rounds that are run whatever they take")
    parser.add_argument("--threads", type=int, default=1, help="of torch on a CPU")
    parser.add_argument("--quick", action="store_true", help="tiny models: shows that all runs")
    parser.add_argument("--backend", help="of torch.compile; default: inductor, or aot_eager without a C++ compiler")
    parser.add_argument("--in-process", action="store_true", help="measure memory in this process: quick and not exact")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the tables")
    options = parser.parse_args(arguments)
    quiet(options.threads)
    print(machine())
    run_towers([part for part in options.part if part in TOWER_OF], options)
    if "forms" in options.part:
        run_forms(options)
    if "compile" in options.part:
        run_compiled(options)


if __name__ == "__main__":
    main()
