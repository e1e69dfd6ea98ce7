"""What the text tower's packing and its parts save in the prompt methods, and whether the memory estimate holds.

    OMP_NUM_THREADS=1 python benchmarks/prompts.py

Five parts, each with random weights, and all that is compared by time in turns within one process, in CPU time. The
*straightforward* form is the usual one: every prompt is assembled to the model's 77 positions and goes through
open_clip's own, untouched text transformer.

* coop: a step of CoOp (forward, backward, SGD) with cached image features, against the straightforward form, which
  encodes the images too. Targets: 15 times as fast, a fifth of the memory.
* cocoop: a step of CoCoOp with all images at once, against the straightforward form with one image after the other and
  the gradient accumulated, in images per second; both have the image features at hand. Target: 5 times as fast.
* promptsrc: epochs of PromptSRC with the teacher's features kept, against epochs that run it in every step.
* memory: the estimate by which the backbone divides prompts, over the memory that a step takes; between 1.0 and 1.3 in
  float32.
* many: a step of CoCoOp over 32,000 prompts in parts, which must keep within 6 GB in all (takes twenty minutes); and
  that parts give the result of the undivided form.

Losses and gradients of the compared forms must agree to 1e-5 of their largest value; the run stops if they do not.
Memory is measured in a process of its own for each row: the peak of resident memory (VmHWM) during the step, less what
is resident before it, after a small step that makes torch set up what it needs once. malloc is told to give freed
blocks back at once (MALLOC_MMAP_THRESHOLD_), so that what is measured is what is held and not how memory was cut up;
the 6 GB are the peak of a whole process with malloc as it is.
Other work on the machine changes none of this and CPU time little: by the caches that are shared, a few percent.
"""

import argparse
import contextlib
import copy
import csv
import json
import logging
import math
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from feature_cache import NAMES, Clock, filling, generate
from side_by_side import (
    RESULTS,
    clip_of,
    difference,
    interleave,
    machine,
    now,
    our_clip,
    peak_megabytes,
    print_table,
    ratio,
    resident,
    write_csv,
)
from text_tower import class_names
from torch import Tensor, nn

from kshot.backbones import OpenClip
from kshot.classifiers import CoCoOp, CoOp, PromptSRC, Task
from kshot.data.datamodule import FewShotDataModule
from kshot.data.transforms import CropFlip
from kshot.holding import stored_as
from kshot.run import build, fit, make_trainer
from kshot.surroundings import settle_chatter

PARTS = ("coop", "cocoop", "promptsrc", "memory", "many")
AGREE = 1e-5
RANGE = "1.0 to 1.3"
GIVE_BACK = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
COLUMNS = (
    "part", "case", "classes", "images", "dtype", "rounds", "slow_s", "quick_s", "slow/quick", "±", "target",
    "slow_MB", "quick_MB", "estimate_MB", "memory ratio", "memory target", "chunks", "loss_diff", "gradient_diff",
    "note",
)  # fmt: skip
Row = dict[str, object]


def names_of(count: int) -> tuple[str, ...]:
    """Names of Caltech101, or of ImageNet where there are more classes."""
    if count <= 100:
        return class_names(count)
    from open_clip import IMAGENET_CLASSNAMES

    return tuple(IMAGENET_CLASSNAMES[:count])


class Setting:
    """A prompt method with kshot's form and the straightforward form of its step.

    Args:
        kind: CoOp or CoCoOp.
        model: an architecture of open_clip with CLIP's text tower.
        classes: number of classes.
        images: images of a step.
        context: learned tokens of CoOp; CoCoOp has the four of "a photo of a".
        gigabytes: the budget of the text tower; None takes the default.
        class_specific: one context a class, so that prompts share nothing but their start.
        straightforward: whether to hold open_clip's model too.
        features: whether the features come from images, or are drawn.
    """

    def __init__(
        self,
        kind: str,
        model: str,
        classes: int,
        images: int,
        context: int = 16,
        gigabytes: float | None = None,
        class_specific: bool = False,
        straightforward: bool = True,
        features: bool = True,
    ) -> None:
        torch.manual_seed(0)
        self.backbone = our_clip(model, gigabytes)
        task = Task(names_of(classes))
        shared = (
            partial(CoCoOp)
            if kind == "CoCoOp"
            else partial(CoOp, context_length=context, class_specific=class_specific)
        )
        self.head: CoOp = shared(self.backbone, task)
        self.label = torch.arange(images) % classes
        side = self.backbone.image_size
        self.image = torch.randint(0, 256, (images, 3, side, side), dtype=torch.uint8)
        with torch.no_grad():
            drawn = torch.randn(images, self.backbone.feature_dim)
            self.features = self.backbone.encode_image(self.image) if features else drawn
        self.optimizer = self.sgd(self.head)
        if straightforward:
            torch.manual_seed(0)  # gives open_clip's model the same weights
            self.clip = clip_of(model)
            self.context = nn.Parameter(self.head.context.detach().clone())
            self.meta_net = copy.deepcopy(getattr(self.head, "meta_net", None))
            words = " ".join(["X"] * len(self.context))
            self.tokens = self.backbone.tokenize([f"{words} {name}." for name in task.class_names])
            self.plain = nn.ModuleList([nn.ParameterList([self.context]), self.meta_net or nn.Identity()])
            self.plain_optimizer = self.sgd(self.plain)

    @staticmethod
    def sgd(module: nn.Module) -> torch.optim.SGD:
        return torch.optim.SGD([p for p in module.parameters() if p.requires_grad], lr=2e-3, momentum=0.9)

    def step(self, images: slice = slice(None), chunk: int | None = None) -> Tensor:
        """Kshot's step on some of the images, ``chunk`` of them at once; returns the loss."""
        features, label = self.features[images], self.label[images]
        chunk, losses = chunk or len(label), []
        self.optimizer.zero_grad()
        for start in range(0, len(label), chunk):
            part = slice(start, start + chunk)
            loss = self.head.losses(features[part], label[part])["cross_entropy"] * len(label[part]) / len(label)
            loss.backward()
            losses.append(loss.detach())
        self.optimizer.step()
        return torch.stack(losses).sum()

    def plain_text(self, context: Tensor) -> Tensor:
        """Class features, (C, D), through open_clip's own transformer at the model's full length."""
        clip, tokens = self.clip, self.tokens
        x = clip.token_embedding(tokens)
        x = torch.cat([x[:, :1], context.expand(len(tokens), -1, -1), x[:, 1 + len(context) :]], 1)
        x = clip.ln_final(clip.transformer(x + clip.positional_embedding, attn_mask=clip.attn_mask))
        return x[torch.arange(len(x)), tokens.argmax(-1)] @ clip.text_projection

    def plain_logits(self, features: Tensor, context: Tensor) -> Tensor:
        text = F.normalize(self.plain_text(context), dim=-1)
        return self.clip.logit_scale.exp() * F.normalize(features, dim=-1) @ text.T

    def plain_coop(self) -> Tensor:
        """The straightforward step of CoOp, the images encoded without gradient."""
        self.plain_optimizer.zero_grad()
        with torch.no_grad():
            image = (self.image.float() / 255 - self.backbone.mean) / self.backbone.std
            features = self.clip.encode_image(image)
        loss = F.cross_entropy(self.plain_logits(features, self.context), self.label)
        loss.backward()
        self.plain_optimizer.step()
        return loss.detach()

    def plain_cocoop(self, images: slice) -> Tensor:
        """The straightforward step of CoCoOp, image after image."""
        self.plain_optimizer.zero_grad()
        losses = []
        for feature, label in zip(self.features[images], self.label[images], strict=True):
            context = self.context + self.meta_net(F.normalize(feature, dim=-1))
            logits = self.plain_logits(feature[None], context)
            loss = F.cross_entropy(logits, label[None]) / len(self.label[images])
            loss.backward()
            losses.append(loss.detach())
        self.plain_optimizer.step()
        return torch.stack(losses).sum()

    def gradient(self, plain: bool = False) -> Tensor:
        """Of everything that the method trains, after a step."""
        if not plain:
            trained = [self.head.context, *(p for n, p in self.head.named_parameters() if n.startswith("meta_net."))]
        else:
            trained = [self.context, *(self.meta_net.parameters() if self.meta_net else ())]
        return torch.cat([p.grad.flatten() for p in trained])

    def compare(self, ours: Callable[[], Tensor], plain: Callable[[], Tensor]) -> Row:
        """Differences of loss and gradient between the two forms' first steps.

        Raises:
            SystemExit: they are not the same.
        """
        a, b = ours(), plain()
        return agreement((a, self.gradient()), (b, self.gradient(plain=True)))

    def parts(self) -> int:
        """In how many parts a step of CoCoOp encodes the prompts of all images."""
        self.head.images_together(self.features)
        return self.backbone.chunks

    def estimate(self, gradient: bool = True) -> int:
        """Bytes of the smallest budget at which the backbone does not divide the prompts."""
        prefix, suffix = self.head.prompts()
        low, high = 1, 2**44
        while low < high:
            self.backbone.text_memory = (low + high) // 2
            groups, classes = self.backbone.part_size(prefix, suffix, gradient)
            if groups >= len(suffix) and classes >= suffix.shape[1]:
                high = self.backbone.text_memory
            else:
                low = self.backbone.text_memory + 1
        self.backbone.text_memory = None
        return low


def agreement(given: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> Row:
    loss, gradient = (difference(a, b)[1] for a, b in zip(given, expected, strict=True))
    if not max(loss, gradient) <= AGREE:
        sys.exit(f"The two forms differ: loss by {loss:.2g}, gradient by {gradient:.2g} of the largest value.")
    return {"loss_diff": loss, "gradient_diff": gradient}


def filled(**values: object) -> Row:
    """A row with all columns."""
    return dict.fromkeys(COLUMNS, "") | values


def compared(slow: list[float], quick: list[float], share: float = 1.0) -> Row:
    """Times and their ratio.

    Args:
        slow: seconds of the slow form, by round.
        quick: of the quick form.
        share: images that the slow form worked on over those of the quick form.
    """
    value, spread = ratio([s / share for s in slow], quick)
    return {
        "rounds": len(slow), "slow_s": round(statistics.median(slow) / share, 3),
        "quick_s": round(statistics.median(quick), 3), "slow/quick": round(value, 2), "±": round(spread, 2),
    }  # fmt: skip


# ---------------------------------------------------------------------------------------------- in their own process


def measured(options: argparse.Namespace, what: str, **arguments: Any) -> dict[str, Any]:
    """What a worker of this script prints, or for a try finds in this process."""
    if options.in_process:
        return WORKERS[what](options.model, **arguments)
    environment = os.environ | ({} if what == "many" else GIVE_BACK)
    worker = json.dumps({"what": what, "model": options.model, "threads": options.threads, **arguments})
    ran = subprocess.run(
        [sys.executable, __file__, "--worker", worker], env=environment, stdout=subprocess.PIPE, text=True, check=True
    )
    return json.loads(ran.stdout.splitlines()[-1])


def step_memory(model: str, form: str, classes: int, images: int) -> dict[str, Any]:
    """Megabytes that a step of CoOp takes in one form."""
    setting, small = (
        Setting("CoOp", model, *size, straightforward=form == "plain") for size in ((classes, images), (2, 2))
    )
    (small.plain_coop if form == "plain" else small.step)()
    return {"MB": peak_megabytes(setting.plain_coop if form == "plain" else setting.step)}


def text_memory(model: str, classes: int, dtype: str, gradient: bool, class_specific: bool) -> dict[str, Any]:
    """Megabytes that kshot's text tower takes, with the backward pass or for evaluation, and what is expected."""
    setting = Setting(
        "CoOp", model, classes, 2, gigabytes=1e6, class_specific=class_specific, straightforward=False, features=False
    )  # a budget that divides nothing
    low = dtype == "bfloat16"
    autocast = torch.autocast("cpu", torch.bfloat16) if low else contextlib.nullcontext()
    stored = stored_as(setting.backbone, torch.bfloat16) if low else contextlib.nullcontext()  # as in a run

    def encode(head: CoOp) -> None:
        features = head.encode()
        if gradient:
            features.sum().backward()

    with stored, autocast, torch.set_grad_enabled(gradient):
        encode(CoOp(setting.backbone, Task(names_of(2)), 16))  # so that torch sets up what it needs once
        megabytes = peak_megabytes(lambda: encode(setting.head))
        return {"MB": megabytes, "estimate": setting.estimate(gradient) / 1e6}


def many_prompts(model: str, classes: int, images: int, gigabytes: float) -> dict[str, Any]:
    """One step of CoCoOp over so many prompts that they go in parts: the peak of the whole process."""
    setting = Setting("CoCoOp", model, classes, images, gigabytes=gigabytes, straightforward=False, features=False)
    start = now()
    loss = setting.step()
    return {
        "seconds": now() - start, "peak": resident("VmHWM") / 1e6, "chunks": setting.parts(), "loss": loss.item(),
    }  # fmt: skip


WORKERS = {"step": step_memory, "text": text_memory, "many": many_prompts}


# ---------------------------------------------------------------------------------------------------------- the parts


def coop(options: argparse.Namespace) -> list[Row]:
    classes, images = (20, 2) if options.quick else (100, 32)
    setting = Setting("CoOp", options.model, classes, images)
    same = setting.compare(setting.step, setting.plain_coop)
    times = interleave({"slow": setting.plain_coop, "quick": setting.step}, options.seconds, least=3, warm_up=0)
    del setting
    slow, quick = (
        measured(options, "step", form=form, classes=classes, images=images)["MB"] for form in ("plain", "kshot")
    )
    note = "slow: 77 positions, images encoded in every step"
    row = filled(part="coop", case="CoOp step, 16 tokens", classes=classes, images=images, dtype="float32", note=note)
    row |= compared(times["slow"], times["quick"]) | same
    row |= {"slow_MB": round(slow), "quick_MB": round(quick), "memory ratio": round(slow / quick, 2)}
    return [row | {"target": 15, "memory target": 5}]


def cocoop(options: argparse.Namespace) -> list[Row]:
    sizes = ((3, 4, 2),) if options.quick else ((10, 32, 8), (100, 32, 1))
    return [row for size in sizes for row in cocoop_steps(options, *size)]


def cocoop_steps(options: argparse.Namespace, classes: int, images: int, some: int) -> list[Row]:
    """Steps of all images at once, and of some of them one after the other in either form."""
    setting = Setting("CoCoOp", options.model, classes, images, features=False)
    few = slice(0, some)
    same = setting.compare(lambda: setting.step(few), lambda: setting.plain_cocoop(few))
    calls = {
        "slow": lambda: setting.plain_cocoop(few),
        "single": lambda: setting.step(few, chunk=1),
        "quick": setting.step,
    }
    times = interleave(calls, options.seconds, least=3, warm_up=0)
    base = filled(part="cocoop", classes=classes, images=images, dtype="float32", chunks=setting.parts())
    plain, single = (compared(times[name], times["quick"], some / images) for name in ("slow", "single"))
    timed = f"one image after the other, timed on {some}"
    return [
        base | plain | same | {"case": "CoCoOp step", "target": 5, "note": f"slow: 77 positions, {timed}"},
        base | single | {"case": "CoCoOp step, own form", "note": f"slow: {timed}"},
    ]


def many(options: argparse.Namespace) -> list[Row]:
    return [parts_agree(options.model), many_step(options)]


def parts_agree(model: str) -> Row:
    """Undivided and in many parts, on a case that fits either way."""
    classes, images = 10, 8
    results = []
    for gigabytes in (None, 0.02):
        setting = Setting("CoCoOp", model, classes, images, gigabytes=gigabytes, straightforward=False, features=False)
        results.append((setting.step(), setting.gradient()))
    chunks = setting.parts()
    assert chunks > 1, "the small budget divides nothing"
    base = filled(part="many", case="in parts, same result", classes=classes, images=images, dtype="float32")
    return base | agreement(results[1], results[0]) | {"chunks": chunks}


def many_step(options: argparse.Namespace) -> Row:
    """A step over very many prompts."""
    classes, images, gigabytes = (10, 8, 0.02) if options.quick else (1000, 32, 3.0)
    found = measured(options, "many", classes=classes, images=images, gigabytes=gigabytes)
    assert math.isfinite(found["loss"])
    base = filled(part="many", case="CoCoOp step in parts", classes=classes, images=images, dtype="float32", rounds=1)
    return base | {
        "quick_s": round(found["seconds"], 1), "quick_MB": round(found["peak"]), "chunks": found["chunks"],
        "memory ratio": round(6000 / found["peak"], 2), "memory target": 1,
        "note": f"text_memory_gb: {gigabytes:g}; MB of the whole process, and 6 GB over them",
    }  # fmt: skip


def promptsrc(options: argparse.Namespace) -> list[Row]:
    shots, epochs = 1, 2 if options.quick else 3
    backbone = our_clip(options.model)
    clocks: dict[bool, list[Clock]] = {False: [], True: []}
    calls: dict[bool, list[int]] = {}
    with tempfile.TemporaryDirectory() as folder:
        generate(Path(folder), shots, backbone.image_size)
        for _ in range(1 if options.quick else 2):
            for kept in (False, True):
                clock, counts = fit_promptsrc(backbone, folder, shots, epochs, kept)
                clocks[kept].append(clock)
                calls[kept] = counts
    assert calls[True] == [0] * epochs, f"the teacher ran in training: {calls[True]}"
    assert all(calls[False]), "the teacher did not run"
    every, keep = ([t for c in clocks[kept] for t in c.epochs[1:]] for kept in (False, True))
    losses = [torch.tensor([c.losses for c in clocks[kept]]).double() for kept in (False, True)]
    steps = losses[0].shape[1] // epochs
    fill = filling(clocks)
    base = filled(part="promptsrc", case="PromptSRC epoch", classes=len(NAMES), images=shots * len(NAMES))
    base |= compared(every, keep) | {"dtype": "float32", "loss_diff": difference(*losses)[1]}
    note = f"slow: teacher in each of {steps} steps ({calls[False][0]} calls an epoch); kept: {calls[True][0]} calls, "
    return [base | {"note": note + f"{fill:.1f} s once before the first epoch"}]


class Calls(Clock):
    """Counts how often the untouched image tower runs in an epoch."""

    def __init__(self, backbone: OpenClip) -> None:
        super().__init__()
        self.counts: list[int] = []
        self.backbone, self.encode = backbone, backbone.encode_image

    def on_train_epoch_start(self, trainer, pl_module):
        super().on_train_epoch_start(trainer, pl_module)
        self.counts.append(0)
        self.backbone.encode_image = self.counted

    def counted(self, image, prompts=(), *rest):
        self.counts[-1] += not len(prompts)
        return self.encode(image, prompts, *rest)

    def on_train_end(self, trainer, pl_module):  # noqa: ARG002  Lightning's signature
        del self.backbone.encode_image


def fit_promptsrc(backbone: OpenClip, folder: str, shots: int, epochs: int, kept: bool) -> tuple[Clock, list[int]]:
    """One run; the backbone stays frozen, so that the next run finds it as it was."""
    data = FewShotDataModule(folder, shots=shots, batch_size=5, augment=CropFlip(), views=1)
    promptsrc, optimizer = partial(PromptSRC, templates="imagenet7"), partial(torch.optim.SGD, lr=1e-3)
    module = build(backbone, data, classifier=promptsrc, optimizer=optimizer, cache_features=kept)
    clock = Calls(backbone)
    fit(module, data, make_trainer([clock], max_epochs=epochs, accelerator="cpu", limit_val_batches=0))
    module.detach()
    return clock, clock.counts


def memory(options: argparse.Namespace) -> list[Row]:
    few, many_classes = (5, 10) if options.quick else (100, 1000)
    cases = [(few, dtype, gradient, False) for dtype in ("float32", "bfloat16") for gradient in (True, False)]
    cases += [
        (few, "float32", True, True),
        (many_classes, "float32", True, False),
        (many_classes, "bfloat16", True, False),
    ]
    rows = []
    for classes, dtype, gradient, specific in cases:
        found = measured(options, "text", classes=classes, dtype=dtype, gradient=gradient, class_specific=specific)
        case = ("a context a class, " if specific else "") + ("training" if gradient else "evaluation")
        row = filled(part="memory", case=f"CoOp, {case}", classes=classes, dtype=dtype)
        row |= {"quick_MB": round(found["MB"], 1), "estimate_MB": round(found["estimate"], 1)}
        row |= {"memory ratio": round(found["estimate"] / found["MB"], 2), "note": "estimate over measured"}
        rows.append(row | ({"memory target": RANGE} if gradient and dtype == "float32" else {}))
    return rows


RUN = dict(zip(PARTS, (coop, cocoop, promptsrc, memory, many), strict=True))


def with_others(path: Path, rows: list[Row]) -> list[Row]:
    """The rows, and those of other parts that the file has from the same machine, in the order of the parts."""
    fresh = {row["part"] for row in rows}
    kept: list[Row] = []
    if path.is_file():
        with path.open(newline="") as file:
            kept = [dict(r) for r in csv.DictReader(file) if r["part"] not in fresh and r.pop("machine") == machine()]
    return sorted(kept + rows, key=lambda row: PARTS.index(str(row["part"])))


def missed(row: Row) -> bool:
    """Whether a row misses a target of its own."""
    share, target = row["memory ratio"], row["memory target"]
    if target == RANGE:
        return not 1.0 <= float(str(share)) <= 1.3
    wanted = [(row["slow/quick"], row["target"]), (share, target)]
    return any(aim != "" and float(str(value)) < float(str(aim)) for value, aim in wanted)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", nargs="+", choices=PARTS, default=list(PARTS), help="what to measure")
    parser.add_argument("--quick", action="store_true", help="tiny cases, to see that everything runs")
    parser.add_argument("--model", default="ViT-B-16-quickgelu", help="an architecture of open_clip")
    parser.add_argument("--seconds", type=float, default=60.0, help="time for a case; at least three rounds are run")
    parser.add_argument("--threads", type=int, default=1, help="of torch")
    parser.add_argument("--out", type=Path, default=None, help="CSV; default: results/prompts.csv unless --quick")
    parser.add_argument("--in-process", action="store_true", help="measure memory in this process: quick and not exact")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    logging.disable(logging.WARNING)  # that weights are random, and in how many parts prompts run
    if options.worker:
        given = json.loads(options.worker)
        torch.set_num_threads(given.pop("threads"))
        print(json.dumps(WORKERS[given.pop("what")](**given)))
        return
    torch.set_num_threads(options.threads)
    settle_chatter()
    print(machine())
    rows = []
    for part in options.part:
        found = RUN[part](options)
        used = [name for name in COLUMNS if any(row[name] != "" for row in found)]
        print_table(part, [{name: row[name] for name in used} for row in found])
        rows += found
    if not options.quick:
        below = [f"{row['part']}, {row['case']}, {row['classes']} classes" for row in rows if missed(row)]
        print("\nall reach their targets" if not below else "\noff the target:\n" + "\n".join(below))
    if options.out or not options.quick:
        path = options.out or RESULTS / "prompts.csv"
        write_csv(path, with_others(path, rows))


if __name__ == "__main__":
    main()
