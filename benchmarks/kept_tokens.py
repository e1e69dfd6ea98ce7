"""What keeping tokens saves where adapters sit on the last blocks alone: steps with and without ``cache_features``.

    python benchmarks/kept_tokens.py

Compared, in turns within one process, are whole runs of kshot's own module, data and trainer that differ in
``model.cache_features`` alone: LoRA on the last blocks of ViT-B/32 with random weights, zero-shot class features, a
generated folder of images in one view each. An epoch is its steps, without validation; the first of a run does not
count. ``fill`` is what a run spends once, before its first epoch, on the tokens of every image. The losses of all steps
must agree. The target for two of twelve blocks is a ratio of at least 3.
"""

import argparse
import logging
import statistics
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from feature_cache import Clock, filling, generate
from side_by_side import RESULTS, machine, our_clip, print_table, write_csv
from torch.optim import SGD

from kshot.adapters import LoRA
from kshot.backbones import Backbone
from kshot.data.datamodule import FewShotDataModule
from kshot.run import build, fit, make_trainer
from kshot.surroundings import settle_chatter

TARGET = {2: 3.0}


def timed(backbone: Backbone, folder: str, blocks: int, options: argparse.Namespace, kept: bool) -> tuple[Clock, int]:
    """One run, and the bytes of tokens that it kept; the backbone is given back untouched."""
    data = FewShotDataModule(folder, shots=options.shots, batch_size=options.batch, store_gb=0)
    targets = [f"image.{i}.[qkv]" for i in range(backbone.image_blocks - blocks, backbone.image_blocks)]
    settings = {"adapter": LoRA(rank=8), "targets": targets, "optimizer": partial(SGD, lr=1.0)}
    module = build(backbone, data, cache_features=kept, **settings)
    clock = Clock()
    precision = {"fp32": "32-true", "bf16": "bf16-mixed"}[options.dtype]
    fit(module, data, make_trainer([clock], max_epochs=options.epochs, limit_val_batches=0, precision=precision))
    module.detach()
    wanted = {"tokens" if kept else "images"}
    assert clock.inputs == wanted, f"batches carried {clock.inputs}, not {wanted}"
    return clock, sum((module.kept_tokens or {"kept": {}})["kept"].values())


def compare(backbone: Backbone, folder: str, blocks: int, options: argparse.Namespace) -> dict[str, object]:
    clocks: dict[bool, list[Clock]] = {False: [], True: []}
    size = 0
    for _ in range(options.rounds):
        for kept in (False, True):
            clock, size = timed(backbone, folder, blocks, options, kept)
            clocks[kept].append(clock)
    steps = len(clocks[True][0].losses)
    every, fewer = (
        statistics.median(t for c in clocks[kept] for t in c.epochs[1:]) * options.epochs / steps
        for kept in (False, True)
    )
    losses = [torch.tensor([c.losses for c in clocks[kept]]).double() for kept in (False, True)]
    return {
        "model": options.model, "blocks": f"{blocks} of {backbone.image_blocks}", "dtype": options.dtype,
        "batch": options.batch, "steps": steps, "images_s": round(every, 4), "tokens_s": round(fewer, 4),
        "ratio": round(every / fewer, 2), "fill_s": round(filling(clocks), 3),
        "kB an image": round(size / 1000 / options.shots / 10, 1),
        "loss_first": round(losses[0][0, 0].item(), 4), "loss_last": round(losses[0][0, -1].item(), 4),
        "loss_diff": (losses[0] - losses[1]).abs().max().item(),
    }  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="ViT-B-32", help="an architecture of open_clip")
    parser.add_argument(
        "--blocks", type=int, nargs="+", default=[2, 4], help="last blocks of the image tower with LoRA"
    )
    parser.add_argument("--shots", type=int, default=8, help="images a class; there are ten classes")
    parser.add_argument("--batch", type=int, default=32, help="images a step")
    parser.add_argument("--size", type=int, default=224, help="side of the generated images")
    parser.add_argument("--epochs", type=int, default=3, help="of a run")
    parser.add_argument("--rounds", type=int, default=2, help="runs of each kind, in turns")
    parser.add_argument("--dtype", choices=["fp32", "bf16"], default="fp32", help="precision of the runs")
    parser.add_argument("--threads", type=int, default=1, help="of torch on a CPU")
    parser.add_argument("--out", type=Path, default=RESULTS / "kept_tokens.csv")
    options = parser.parse_args(arguments)
    if options.epochs < 2:
        parser.error("an epoch after the first is timed: give at least 2")
    torch.set_num_threads(options.threads)
    logging.disable(logging.WARNING)  # that weights are random
    settle_chatter()
    print(machine())
    with tempfile.TemporaryDirectory() as folder:
        generate(Path(folder), options.shots, options.size)
        backbone = our_clip(options.model)
        rows = [compare(backbone, folder, blocks, options) for blocks in options.blocks]
    print_table("a step of LoRA on the last blocks, from images and from kept tokens", rows)
    for blocks, row in zip(options.blocks, rows, strict=True):
        if blocks in TARGET:
            reached = "reached" if float(str(row["ratio"])) >= TARGET[blocks] else "missed"
            print(f"\n{row['blocks']} blocks: {row['ratio']}, target >= {TARGET[blocks]:g}: {reached}")
    write_csv(options.out, rows)


if __name__ == "__main__":
    main()
