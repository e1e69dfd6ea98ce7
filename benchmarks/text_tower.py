"""What kshot saves in the text tower: a CoOp step and a zero-shot encoding, against the ways that are usual.

    python benchmarks/text_tower.py

Compared, in turns within one process, on the text tower alone, with the same random weights:

* full: all positions of every prompt through open_clip's own transformer, as CoOp and its descendants do;
* short: the same, cut after the longest prompt;
* kshot: cut, and the prefix that all classes share (start token and context) run once.

A step is a forward pass over all classes and a backward pass to a learned context; nothing else has a gradient. Class
names are the 100 of Caltech101 in the split that kshot carries. The target is full / kshot >= 8. Differences are those
from ``full``, relative to the largest value. Memory is the peak in one run less what the process held before it.
"""

import argparse
import contextlib
import gzip
import json
import logging
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
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
    write_csv,
)
from torch import Tensor

from kshot.classifiers import CoOp, Task
from kshot.files import packaged_folder
from kshot.holding import stored_as

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
WAYS = ("full", "short", "kshot")
TARGET = 8.0


def class_names(count: int) -> tuple[str, ...]:
    path = packaged_folder("data_splits") / "split_zhou_Caltech101.json.gz"
    rows = json.loads(gzip.decompress(path.read_bytes()))["train"]
    names = dict(sorted({label: name.replace("_", " ") for _, label, name in rows}.items()))
    assert count <= len(names), f"there are {len(names)} class names"
    return tuple(names.values())[:count]


class Towers:
    """Three ways through the same text tower.

    Attributes:
        coop: holds the context and kshot's way.
        clip: open_clip's own model, untouched.
    """

    def __init__(self, model: str, classes: int, context: int, dtype: str) -> None:
        self.autocast = (lambda: torch.autocast(DEVICE, torch.bfloat16)) if dtype == "bf16" else contextlib.nullcontext
        torch.manual_seed(0)
        self.clip = clip_of(model).to(DEVICE)
        torch.manual_seed(0)
        self.backbone = our_clip(model).to(DEVICE)
        names = class_names(classes)
        self.coop = CoOp(self.backbone, Task(names), context_length=context).to(DEVICE)
        self.tokens = self.backbone.tokenize([f"a photo of a {name}." for name in names]).to(DEVICE)
        self.padded = self.backbone.tokenize([f"{' '.join('X' * context)} {name}." for name in names]).to(DEVICE)

    def run(self, embeddings: Tensor, tokens: Tensor) -> Tensor:
        """open_clip's ``encode_text`` from embeddings on, at the length that they have."""
        clip, length = self.clip, embeddings.shape[1]
        x = embeddings + clip.positional_embedding[:length]
        x = clip.ln_final(clip.transformer(x, attn_mask=clip.attn_mask[:length, :length]))
        return x[torch.arange(len(x), device=DEVICE), tokens.argmax(-1)] @ clip.text_projection

    def coop_features(self, way: str) -> Tensor:
        if way == "kshot":
            return self.coop.encode()
        tokens, context = self.padded, self.coop.context
        length = tokens.shape[1] if way == "full" else int(tokens.argmax(-1).max()) + 1
        embeddings = self.clip.token_embedding(tokens[:, :length])
        context = context.expand(len(tokens), -1, -1)
        return self.run(torch.cat([embeddings[:, :1], context, embeddings[:, 1 + context.shape[1] :]], 1), tokens)

    def coop_step(self, way: str) -> tuple[Tensor, Tensor]:
        """Features and the gradient of the context."""
        with self.autocast():
            features = self.coop_features(way)
        towards = torch.randn(features.shape, generator=torch.Generator().manual_seed(1)).to(DEVICE)
        (gradient,) = torch.autograd.grad((features.float() * towards).sum(), [self.coop.context])
        return features, gradient

    @torch.no_grad()
    def zero_shot(self, way: str) -> tuple[Tensor, None]:
        with self.autocast():
            if way == "kshot":
                return self.backbone.encode_tokens(self.tokens), None
            length = self.tokens.shape[1] if way == "full" else int(self.tokens.argmax(-1).max()) + 1
            return self.run(self.clip.token_embedding(self.tokens[:, :length]), self.tokens), None

    def call(self, kind: str) -> Callable[[str], tuple[Tensor, Tensor | None]]:
        return self.zero_shot if kind == "zero-shot" else self.coop_step


def compare(options: argparse.Namespace, kind: str, classes: int) -> dict[str, object]:
    towers = Towers(options.model, classes, options.context, options.dtype)
    call = towers.call(kind)
    towers.zero_shot("short")  # so that no way pays for what torch sets up once
    outputs: dict[str, tuple[Tensor, Tensor | None]] = {}
    with stored_as(towers.backbone, DTYPES[options.dtype]):  # as in a run
        megabytes = {way: round(peak_megabytes(lambda way=way: outputs.update({way: call(way)}))) for way in WAYS}
        times = interleave({way: lambda way=way: call(way) for way in WAYS}, options.seconds, least=2, warm_up=0)
    tokens = towers.tokens if kind == "zero-shot" else towers.padded
    row: dict[str, object] = {
        "case": kind, "classes": classes, "dtype": options.dtype, "longest": int(tokens.argmax(-1).max()) + 1,
        "rounds": len(times["full"]),
    }  # fmt: skip
    row |= {f"{way}_ms": milliseconds(times[way]) for way in WAYS}
    row |= {f"{way}/kshot": round(ratio(times[way], times["kshot"])[0], 2) for way in ("full", "short")}
    for way in ("short", "kshot"):
        (features, gradient), (f, g) = outputs["full"], outputs[way]
        row[f"{way}_feature_diff"] = difference(f, features)[1]
        row[f"{way}_gradient_diff"] = math.nan if gradient is None or g is None else difference(g, gradient)[1]
    return row | {f"{way}_MB": value for way, value in megabytes.items()}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="ViT-B-32", help="an architecture of open_clip with CLIP's text tower")
    parser.add_argument("--classes", nargs="+", type=int, default=[50, 100], help="numbers of classes of a CoOp step")
    parser.add_argument("--context", type=int, default=16, help="learned tokens")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32", help="bf16: autocast")
    parser.add_argument("--seconds", type=float, default=10.0, help="time for a case; at least two rounds are run")
    parser.add_argument("--threads", type=int, default=1, help="of torch on a CPU")
    parser.add_argument("--out", type=Path, default=RESULTS / "text_tower.csv")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    logging.disable(logging.WARNING)  # that weights are random
    print(machine())
    rows = [compare(options, "CoOp step", classes) for classes in options.classes]
    rows.append(compare(options, "zero-shot", max(options.classes)))
    print_table(
        f"text tower of {options.model}, {options.context} context tokens (target: full / kshot >= {TARGET:g})", rows
    )
    missed = [f"{r['case']}, {r['classes']} classes: {r['full/kshot']}" for r in rows if r["full/kshot"] < TARGET]
    print("\nall reach the target" if not missed else "\nbelow the target:\n" + "\n".join(missed))
    write_csv(options.out, rows)


if __name__ == "__main__":
    main()
