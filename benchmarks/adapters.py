"""What the weight-tuning methods cost in a training step: kshot against PEFT, quick forms against plain ones, compiled.

    python benchmarks/adapters.py --part peft
    python benchmarks/adapters.py --part open_clip

(An hour each on one core at 32 and 128 images; ``--images 32`` takes a quarter of it.)

``peft``: ViT-B/32 of timm, all four matrices of every block adapted. Compared, in turns within one process and with the
same random weights: PEFT's step, kshot's step, and for both the frozen model as timm and as kshot build it. A step is a
forward pass on random images, a backward pass, an AdamW step and the method's own work (AdaLoRA's penalty and allocator
in every step). A frozen model runs forward and backward down to its first block, as an adapted one does. Targets: ours
/ PEFT <= 1, and the overhead over the frozen model at most half of PEFT's for DoRA, VeRA and RandLoRA. Bases and
trained tensors are float32 on both sides (PEFT's RandLoRA would draw its bases in bfloat16 and cast them in every call).

``open_clip``: the same for the image tower of CLIP ViT-B/32, whose ``nn.MultiheadAttention`` PEFT adapts by LoRA alone:
``note`` is what it says to the other methods. Methods that PEFT has not at all are measured too. Targets: 25 % over the
frozen model, 70 % for RandLoRA.

Memory is the peak in a step together with all that the process holds for it (weights, bases, optimizer, kept casts),
each in a process of its own.
"""

import argparse
import csv
import ctypes
import gc
import importlib
import logging
import math
import re
import statistics
import warnings
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from side_by_side import (
    RESULTS,
    difference,
    interleave,
    machine,
    milliseconds,
    peak_megabytes,
    print_table,
    ratio,
    resident,
)
from torch import Tensor, nn

from kshot.adapters import Adapter
from kshot.backbones import OpenClip, Timm
from kshot.backbones.base import Backbone

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
KEY = ("part", "backbone", "method", "images", "dtype")  # a new row takes the place of the one with the same key
STEPS = 10_000  # length of the run that AdaLoRA plans for: all that is measured lies within its pruning
TARGETS = ("image.*.qkv", "image.*.o", "image.*.fc?")
SIDES = ("library", "kshot", "theirs", "ours")  # the frozen models, the adapted models


@dataclass(frozen=True)
class Method:
    """A method with equal settings on both sides.

    Attributes:
        ours: module and class within ``kshot.adapters``.
        settings: of ours.
        theirs: PEFT's class and settings; None where it has no such method.
    """

    ours: str
    settings: dict[str, Any] = field(default_factory=dict)
    theirs: tuple[str, dict[str, Any]] | None = None

    def adapter(self) -> Adapter:
        """Our settings object."""
        module, name = self.ours.split(".")
        return getattr(importlib.import_module(f"kshot.adapters.{module}"), name)(**self.settings)

    def exists(self) -> bool:
        try:
            self.adapter()
        except (ImportError, AttributeError):
            return False
        return True


def lora(**settings: Any) -> tuple[str, dict[str, Any]]:
    return "LoraConfig", {"r": 32, "lora_alpha": 32} | settings


BUDGET = {"init_r": 12, "target_r": 8, "lora_alpha": 12, "tinit": 0, "tfinal": STEPS // 2, "deltaT": 1}
METHODS = {
    "LoRA-32": Method("lora.LoRA", {"rank": 32}, lora()),
    "PiSSA-32": Method("pissa.PiSSA", {"rank": 32}, lora(init_lora_weights="pissa_niter_4")),
    "DoRA-32": Method("dora.DoRA", {"rank": 32}, lora(use_dora=True)),
    "AdaLoRA-12": Method(
        "adalora.AdaLoRA",
        {"initial_rank": 12, "target_rank": 8, "initial_steps": 0, "final_steps": STEPS // 2, "every": 1},
        ("AdaLoraConfig", BUDGET | {"total_step": STEPS, "orth_reg_weight": 0.1}),
    ),
    "VeRA-256": Method("vera.VeRA", {"rank": 256}, ("VeraConfig", {"r": 256})),
    "RandLoRA-6": Method("randlora.RandLoRA", {"rank": 6, "alpha": 60}, ("RandLoraConfig", {"r": 6, "randlora_alpha": 60})),
    "full tuning": Method("full.FullTuning"),
    "LoRA-XS-32": Method("lora_xs.LoRAXS", {"rank": 32}),
    "SVFT plain": Method("svft.SVFT"),
    "SVFT band 2": Method("svft.SVFT", {"pattern": "banded", "band": 2}),
    "HydraLoRA 8x3": Method("hydralora.HydraLoRA", {"rank": 8, "heads": 3}),
    "NOLA K=1024": Method("nola.NOLA", {"rank": 1, "coefficients": 1024}),
    "PRANC hashed": Method("pranc.PRANC", {"coefficients": 1000}),
    "AutoLoRA search": Method("autolora.AutoLoRA", {"max_rank": 8}),
}  # fmt: skip
IN_PEFT = [name for name, method in METHODS.items() if method.theirs or name == "full tuning"]


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


def timm_vit(name: str) -> nn.Module:
    import timm

    return timm.create_model(name, num_classes=0)


def clip_vit(name: str) -> nn.Module:
    import open_clip

    return open_clip.create_model(name).visual


IN_TIMM = r"vit\.blocks\.\d+\.(attn\.(qkv|proj)|mlp\.(fc1|fc2))"
IN_CLIP = r"vit\.transformer\.resblocks\.\d+\.(attn|mlp\.(c_fc|c_proj))"
TOWERS = {
    "timm ViT-B/32": Tower(
        lambda: timm_vit("vit_base_patch32_224"),
        lambda: Timm("vit_base_patch32_224", "random"),
        "patch_embed",
        IN_TIMM,
    ),
    "timm ViT-Ti/16": Tower(
        lambda: timm_vit("vit_tiny_patch16_224"),
        lambda: Timm("vit_tiny_patch16_224", "random"),
        "patch_embed",
        IN_TIMM,
    ),
    "open_clip ViT-B/32": Tower(lambda: clip_vit("ViT-B-32"), lambda: OpenClip("ViT-B-32", "random"), "conv1", IN_CLIP),
    "open_clip ViT-S/32-alt": Tower(
        lambda: clip_vit("ViT-S-32-alt"), lambda: OpenClip("ViT-S-32-alt", "random"), "conv1", IN_CLIP
    ),
}

# -------------------------------------------------------------------------------------------------- steps


class WithLoss(nn.Module):
    """A tower that gives its loss itself, as PEFT asks for where a method adds a penalty to it."""

    def __init__(self, vit: nn.Module, encode: Callable[[Tensor], Tensor] | None = None) -> None:
        super().__init__()
        self.vit, self.encode = vit, encode or vit.forward

    def forward(self, images: Tensor) -> argparse.Namespace:
        features = self.encode(images)
        return argparse.Namespace(features=features.detach(), loss=features.float().square().mean())


def frozen(model: WithLoss, stem: str) -> WithLoss:
    """Lets gradients run back to where the first block begins, as they do to the first adapter, and no further."""
    module = next(m for name, m in model.requires_grad_(False).eval().named_modules() if name.endswith(stem))
    module.register_forward_hook(lambda _, inputs, output: output.requires_grad_())
    return model


def peft_model(tower: Tower, method: Method) -> nn.Module:
    """PEFT's model in training mode; raises what PEFT raises."""
    import peft

    if method.theirs is None:  # full tuning
        return WithLoss(tower.library()).train()
    name, settings = method.theirs
    config = getattr(peft, name)(target_modules=tower.targets, **settings)
    model = peft.get_peft_model(WithLoss(tower.library()), config).train()
    for shared in (m for m in model.modules() if type(m).__name__ == "BufferDict"):
        for key, base in shared.items():
            shared[key] = base.float()
    return model


class Training:
    """One side of a comparison; a call is one training step and gives the features.

    Args:
        side: one of SIDES.
        tower: is built anew, with the same weights whatever the side.
        method: what adapts it.
        images: of a batch.
        dtype: bfloat16 runs under autocast.

    Attributes:
        trained: how many numbers train.
    """

    def __init__(self, side: str, tower: Tower, method: Method, images: int, dtype: str) -> None:
        torch.manual_seed(0)
        self.x = torch.randn(images, 3, tower.size, tower.size, device=DEVICE)
        torch.manual_seed(1)
        self.shared = []
        if side == "library":
            self.model = frozen(WithLoss(tower.library()), tower.stem)
        elif side == "theirs":
            self.model = peft_model(tower, method)
        else:
            backbone = tower.ours()
            self.model = WithLoss(backbone, backbone.encode_normalised)
            if side == "kshot":
                frozen(self.model, tower.stem)
            else:
                method.adapter().inject(backbone, ["image.*"] if method.ours == "full.FullTuning" else TARGETS)
                backbone.train()
                self.shared = list(backbone.shared)
        self.model.to(DEVICE)
        for shared in self.shared:
            shared.plan(STEPS)
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.trained = sum(p.numel() for p in parameters)
        self.optimizer = torch.optim.AdamW(parameters, lr=1e-5) if parameters else None
        self.allocate = getattr(getattr(self.model, "base_model", None), "update_and_allocate", None)
        self.dtype, self.steps = dtype, 0

    def __call__(self) -> Tensor:
        with torch.autocast(DEVICE, torch.bfloat16, enabled=self.dtype == "bfloat16"):
            output = self.model(self.x)
            penalties = [p for shared in self.shared if (p := shared.penalty()) is not None]
        sum(penalties, output.loss).backward()
        self.steps += 1
        if self.optimizer is not None:
            self.optimizer.step()
            for shared in self.shared:
                shared.after_step(self.steps, [self.optimizer])
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
    """The peak of a step with all that is held for it; run in a process that has built nothing else."""
    quiet(threads)
    import open_clip
    import peft
    import timm  # noqa: F401  what libraries take themselves does not count

    before = held_bytes()
    step = Training(side, TOWERS[tower], METHODS[method], images, dtype)
    step()
    return (held_bytes() - before) / 1e6 + peak_megabytes(step)


def megabytes_apart(*given: Any) -> int:
    """:func:`megabytes` in a process of its own, rounded."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
        return round(process.submit(megabytes, *given).result())


# -------------------------------------------------------------------------------------------------- against PEFT


def compare(part: str, tower: str, method: str, images: int, dtype: str, options: argparse.Namespace) -> dict[str, Any]:
    """The row of one method: ours, PEFT's where it runs, and both over the frozen models."""
    steps, note = {}, ""
    for side in SIDES:
        if side == "theirs" and method not in IN_PEFT:
            note = "PEFT has no such method"
            continue
        try:
            steps[side] = Training(side, TOWERS[tower], METHODS[method], images, dtype)
            features = steps[side]()  # at its first step no method changes the model
        except Exception as error:
            if side != "theirs":
                raise
            note = f"PEFT: {type(error).__name__}: {' '.join(str(error).split())[:160]}"
            steps.pop(side, None)
            continue
        if side == "library":
            expected = features
        apart = difference(features, expected)[1]
        assert apart < (1e-3 if dtype == "float32" else 0.1), f"{side} differs by {apart}: not the same weights"
    trained = {side: step.trained for side, step in steps.items()}
    times = interleave(steps, options.seconds, least=options.least)
    del steps

    def over(a: str, b: str) -> float:
        return round(100 * (ratio(times[a], times[b])[0] - 1), 1) if a in times else math.nan

    row: dict[str, Any] = {
        "part": part, "backbone": tower, "method": method, "images": images, "dtype": dtype,
        "rounds": len(times["ours"]), "library_frozen_ms": milliseconds(times["library"]),
        "kshot_frozen_ms": milliseconds(times["kshot"]),
        "peft_ms": milliseconds(times["theirs"]) if "theirs" in times else math.nan,
        "ours_ms": milliseconds(times["ours"]),
    }  # fmt: skip
    row["ours/peft"], row["±"] = map(rounded, ratio(times["ours"], times["theirs"]) if "theirs" in times else NONE)
    row["peft_over_library_%"], row["ours_over_kshot_%"] = over("theirs", "library"), over("ours", "kshot")
    row["ours_over_library_%"] = over("ours", "library")
    row["overhead_peft/ours"] = rounded(overheads(times)) if "theirs" in times else math.nan
    for side, name in (("theirs", "peft"), ("ours", "ours")):
        given = (side, tower, method, images, dtype, options.threads)
        row[f"{name}_MB"] = megabytes_apart(*given) if side in times else math.nan
    row["peft_trained"], row["ours_trained"] = trained.get("theirs", math.nan), trained["ours"]
    return row | {"note": note}


NONE = (math.nan, math.nan)


def rounded(value: float) -> float:
    return round(value, 3)


def overheads(times: dict[str, list[float]]) -> float:
    """How many times as much PEFT adds to the library's frozen model as we add to ours, in seconds: medians."""
    added = {
        side: statistics.median(a - b for a, b in zip(times[side], times[base], strict=True))
        for side, base in (("theirs", "library"), ("ours", "kshot"))
    }
    return added["theirs"] / added["ours"]


# -------------------------------------------------------------------------------------------------- rows and files


def results_file(stem: str, folder: Path) -> Path:
    """The file of this device: one name for CPUs, one for each kind of GPU."""
    device = "_" + re.sub(r"\W+", "_", torch.cuda.get_device_name()).lower() if CUDA else ""
    return folder / f"{stem}{device}.csv"


def keep(path: Path, row: dict[str, Any]) -> None:
    """Puts a row into a file, in the place of the one with the same key, so that parts can be run one by one."""
    rows = list(csv.DictReader(path.open(newline=""))) if path.is_file() else []
    new = {name: str(value) for name, value in (row | {"machine": machine()}).items()}
    names = [key for key in KEY if key in new]
    places = [i for i, old in enumerate(rows) if all(old.get(key) == new[key] for key in names)]
    rows[places[0] if places else len(rows) :] = [new, *rows[places[0] + 1 :]] if places else [new]
    columns = list(dict.fromkeys(name for r in rows for name in r if name != "machine")) + ["machine"]
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns, restval="")
        writer.writeheader()
        writer.writerows(rows)


def quiet(threads: int) -> None:
    torch.set_num_threads(threads)
    logging.disable(logging.WARNING)  # that weights are random
    warnings.filterwarnings("ignore")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--images", nargs="+", type=int, default=[32, 128], help="of a batch")
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=list(DTYPES), help="bfloat16: autocast")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--seconds", type=float, default=60.0, help="time for one comparison")
    parser.add_argument("--least", type=int, default=3, help="rounds that are run whatever they take")
    parser.add_argument("--threads", type=int, default=1, help="of torch on a CPU")
    parser.add_argument("--quick", action="store_true", help="tiny models, two rounds: only shows that all runs")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the tables")
    options = parser.parse_args()
    quiet(options.threads)
    print(machine())
    for images in options.images:
        for part in options.part:
            tower = TOWER_OF[part][options.quick]
            rows = []
            for method in options.methods:
                if not METHODS[method].exists() or (part == "peft" and method not in IN_PEFT):
                    continue
                for dtype in options.dtype:
                    rows.append(compare(part, tower, method, images, dtype, options))
                    print({k: v for k, v in rows[-1].items() if k not in ("part", "backbone")}, flush=True)
                    keep(results_file("adapters", options.out), rows[-1])
            print_table(
                f"{tower}, {images} images",
                [{k: v for k, v in r.items() if k not in ("part", "backbone")} for r in rows],
            )


TOWER_OF = {"peft": ("timm ViT-B/32", "timm ViT-Ti/16"), "open_clip": ("open_clip ViT-B/32", "open_clip ViT-S/32-alt")}
PARTS = list(TOWER_OF)

if __name__ == "__main__":
    main()
