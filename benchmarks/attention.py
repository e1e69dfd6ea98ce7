"""What it costs to take attention apart into slots: kshot's projections against the library's own attention.

    python benchmarks/attention.py

(Four minutes on one idle core; two with ``--batch 4``.)

Compared in each case, in turns within one process, with the same random weights, all frozen:

* fused: the model as open_clip or timm builds it, untouched;
* un-fused: the same after kshot has replaced its attention and MLP layers by projections with named slots;
* LoRA: un-fused, with a LoRA of rank 8 on q and v (a training step alone; in evaluation it is merged).

A training step is a forward pass and a backward pass to the input (and to the LoRA); an evaluation is a forward pass
without gradients. The target is un-fused / fused <= 1.03.

In bf16 on a CPU both parts of the library's attention are slow: ``nn.MultiheadAttention`` hands its input projection
transposed tokens, for which torch (2.15) copies the weight and calls ``bmm``, and the fused kernel is slow itself.

The second table times the two ways to compute attention itself by sequence length, torch's
``scaled_dot_product_attention`` against two plain products. It justifies the rule in
``kshot.backbones.attention.attend``; ``rule`` is the time of what it chooses over the time of the faster of the two.
"""

import argparse
import contextlib
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

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
    print_table,
    ratio,
    write_csv,
)
from torch import Tensor, nn

from kshot.adapters import LoRA
from kshot.backbones import Backbone, Timm
from kshot.backbones.attention import LONGEST_UNFUSED, attend
from kshot.holding import merged, stored_as

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
TARGET = 1.03
DINO = "vit_small_patch14_dinov2"
Tower = Callable[[Tensor], Tensor]
# Input; fused, un-fused, with LoRA; the LoRA's tensors; the backbones behind the last two towers.
Case = tuple[Tensor, Tower, Tower, Tower, list[Tensor], list[Backbone]]


def towers_of_clip(model: str, batch: int, text: bool) -> Case:
    """An image tower on images, or the transformer of a text tower on embedded prompts of full length."""

    def transformer(clip: nn.Module) -> Tower:
        return lambda x: clip.transformer(x, attn_mask=clip.attn_mask)

    torch.manual_seed(0)
    original = clip_of(model).to(DEVICE)
    built = []
    for adapted in (False, True):
        torch.manual_seed(0)
        backbone = our_clip(model)
        if adapted:
            LoRA(rank=8).attach(backbone, ["text.*.[qv]" if text else "image.*.[qv]"])
        built.append(backbone.to(DEVICE))
    trained = built[1].trainable("text" if text else "image")
    if text:
        x = torch.randn(batch, built[0].context_length, built[0].text_width)
        return x, transformer(original), *(transformer(b.clip) for b in built), trained, built
    x = torch.randn(batch, 3, built[0].image_size, built[0].image_size)
    return x, original.encode_image, *(b.encode_normalised for b in built), trained, built


def towers_of_timm(model: str, size: int, batch: int) -> Case:
    """An image tower; its layer scales are set to 1, or random weights would hide any difference between blocks."""
    import timm

    def build(make: Callable[[], nn.Module]) -> nn.Module:
        torch.manual_seed(0)
        built = make().eval().requires_grad_(False)
        for name, parameter in built.named_parameters():
            if name.endswith(".gamma"):
                nn.init.ones_(parameter)
        return built.to(DEVICE)

    original = build(lambda: timm.create_model(model, num_classes=0, dynamic_img_size=True))
    plain, adapted = (build(lambda: Timm(model, "random", size)) for _ in range(2))
    LoRA(rank=8).attach(adapted, ["image.*.[qv]"])
    x, built = torch.randn(batch, 3, size, size), [plain, adapted.to(DEVICE)]
    return x, original, *(b.encode_normalised for b in built), adapted.trainable("image"), built


def cases(batch: int) -> dict[str, Callable[[], Case]]:
    return {
        f"ViT-B-32 image 224, batch {batch}": lambda: towers_of_clip("ViT-B-32", batch, text=False),
        f"ViT-B-32 text 77, batch {batch}": lambda: towers_of_clip("ViT-B-32", batch, text=True),
        f"{DINO} 112, batch {batch}": lambda: towers_of_timm(DINO, 112, batch),
        f"glyph_clip image 32, batch {2 * batch}": lambda: towers_of_clip("kshot:glyph_clip", 2 * batch, text=False),
        f"glyph_clip text 40, batch {2 * batch}": lambda: towers_of_clip("kshot:glyph_clip", 2 * batch, text=True),
    }


def autocast(dtype: str) -> contextlib.AbstractContextManager[object]:
    return torch.autocast(DEVICE, torch.bfloat16) if dtype == "bf16" else contextlib.nullcontext()


@contextlib.contextmanager
def as_in_a_run(kind: str, backbones: list[Backbone], dtype: str) -> Iterator[None]:
    """Keeps what a run keeps: frozen weights in the dtype of training steps, merged ones in evaluation."""
    with contextlib.ExitStack() as stack:
        with autocast(dtype):
            for backbone in backbones:
                stack.enter_context(stored_as(backbone, DTYPES[dtype]) if kind == "train" else merged(backbone))
        yield


def compare_towers(name: str, case: Case, dtype: str, seconds: float) -> list[dict[str, object]]:
    """A row for the training step and one for evaluation."""
    x, fused, unfused, lora, trained, backbones = case
    x = x.to(DEVICE).requires_grad_()
    with torch.no_grad():
        towards = torch.randn_like(fused(x))

    def step(tower: Tower, extra: list[Tensor]) -> list[Tensor]:
        with autocast(dtype):
            features = tower(x)
        return [features, *torch.autograd.grad((features.float() * towards).sum(), [x, *extra])]

    @torch.no_grad()
    def evaluate(tower: Tower) -> Tensor:
        with autocast(dtype):
            return tower(x)

    rows = []
    for kind, calls in {
        "train": {
            "fused": lambda: step(fused, []),
            "unfused": lambda: step(unfused, []),
            "lora": lambda: step(lora, trained),
        },
        "eval": {
            "fused": lambda: evaluate(fused),
            "unfused": lambda: evaluate(unfused),
            "lora": lambda: evaluate(lora),
        },
    }.items():
        with as_in_a_run(kind, backbones, dtype):
            a, b, _ = (call() for call in calls.values())  # now all are warm
            times = interleave(calls, seconds if kind == "train" else seconds / 2, warm_up=0)
        _, features = difference(b[0], a[0]) if kind == "train" else difference(b, a)
        gradient = difference(b[1], a[1])[1] if kind == "train" else math.nan
        cost, spread = ratio(times["unfused"], times["fused"])
        rows.append({
            "case": name, "dtype": dtype, "step": kind, "rounds": len(times["fused"]),
            "fused_ms": milliseconds(times["fused"]), "unfused_ms": milliseconds(times["unfused"]),
            "unfused/fused": round(cost, 4), "±": round(spread, 4),
            "lora/fused": round(ratio(times["lora"], times["fused"])[0], 4),
            "feature_diff": features, "gradient_diff": gradient,
        })  # fmt: skip
    return rows


def explicit(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Two plain products, as in ``attend``."""
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
    if mask is not None:
        scores = scores + mask
    return scores.softmax(-1).to(v.dtype) @ v


def compare_lengths(lengths: list[int], tokens: int, heads: int, seconds: float) -> list[dict[str, object]]:
    """The two ways over sequence lengths, with as many sequences as give about ``tokens`` tokens."""
    rows = []
    for dtype, torch_dtype in DTYPES.items():
        for length in lengths:
            batch = max(1, tokens // length)
            shape = (batch, length, heads, 64)
            q, k, v = (
                torch.randn(shape, device=DEVICE, dtype=torch_dtype).transpose(1, 2).requires_grad_() for _ in "qkv"
            )
            towards = torch.randn_like(q)

            for kind in ("train", "eval"):

                def run(attention: Callable[..., Tensor], train: bool = kind == "train") -> Tensor:
                    with torch.set_grad_enabled(train):
                        y = attention(q, k, v, None)  # noqa: B023  called within this round of the loop
                    return torch.autograd.grad(y, [q, k, v], towards)[0] if train else y  # noqa: B023

                calls = {"sdpa": lambda: run(F.scaled_dot_product_attention), "explicit": lambda: run(explicit)}
                largest, _ = difference(calls["explicit"](), calls["sdpa"]())
                times = interleave(calls, seconds, least=5, warm_up=2)
                value, spread = ratio(times["sdpa"], times["explicit"])
                uses_sdpa = same_path(q, k, v)
                rows.append({
                    "dtype": dtype, "length": length, "batch": batch, "heads": heads, "step": kind,
                    "sdpa_ms": milliseconds(times["sdpa"]), "explicit_ms": milliseconds(times["explicit"]),
                    "sdpa/explicit": round(value, 3), "±": round(spread, 3),
                    "chosen": "sdpa" if uses_sdpa else "explicit",
                    "rule": round(max(1.0, value if uses_sdpa else 1 / value), 3), "max_diff": largest,
                })  # fmt: skip
    return rows


def same_path(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """True when ``attend`` calls torch's fused kernel for these tensors."""
    from unittest.mock import patch

    with patch.object(F, "scaled_dot_product_attention", side_effect=F.scaled_dot_product_attention) as spy:
        attend(q[:1, :1].detach(), k[:1, :1].detach(), v[:1, :1].detach())
    return bool(spy.called)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=6.0, help="time for one case, dtype and training step")
    parser.add_argument(
        "--only", default="", help="run the cases whose name contains this; 'lengths' for the second table"
    )
    parser.add_argument(
        "--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES), help="precisions of the first table"
    )
    parser.add_argument("--batch", type=int, default=16, help="of the first table; the small CLIP takes twice as many")
    parser.add_argument("--lengths", nargs="+", type=int, default=[17, 50, 197, 257, 577], help="of the second table")
    parser.add_argument("--tokens", type=int, default=1600, help="tokens in a batch of the second table")
    parser.add_argument("--heads", type=int, default=12, help="heads of 64 in the second table")
    parser.add_argument("--threads", type=int, default=1, help="of torch on a CPU")
    parser.add_argument("--out", type=Path, default=RESULTS / "attention.csv", help="the second table: ..._lengths.csv")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    logging.disable(logging.WARNING)  # that weights are random
    print(machine())
    rows = []
    for name, build in cases(options.batch).items():
        if options.only in name:
            case = build()
            for dtype in options.dtypes:
                rows += compare_towers(name, case, dtype, options.seconds)
    if rows:
        print_table(f"un-fused against fused (target <= {TARGET}); differences relative to the largest value", rows)
        missed = [
            f"{r['case']} {r['dtype']} {r['step']}: {r['unfused/fused']} ± {r['±']}"
            for r in rows
            if r["unfused/fused"] > TARGET
        ]
        print("\nall within the target" if not missed else "\nabove the target:\n" + "\n".join(missed))
        write_csv(options.out, rows)
    if options.only in "lengths":
        rows = compare_lengths(options.lengths, options.tokens, options.heads, options.seconds / 8)
        print_table(
            f"scaled_dot_product_attention against two products (explicit up to {LONGEST_UNFUSED} in bf16 on a CPU)",
            rows,
        )
        write_csv(options.out.with_name(f"{options.out.stem}_lengths.csv"), rows)


if __name__ == "__main__":
    main()
