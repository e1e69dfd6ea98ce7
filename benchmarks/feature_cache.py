"""What keeping the features of a frozen image tower saves: a CoOp epoch with and without ``model.cache_features``.

    python benchmarks/feature_cache.py

Compared, in turns within one process, are whole runs of kshot's own module, data and trainer that differ in
``cache_features`` alone: ViT-B/32 with random weights on a generated folder of images, and the small CLIP that kshot
carries on handwritten digits. An epoch is its steps, its validation included; the first epoch of a run does not count.
``fill`` is what a run spends once, before its first epoch, on encoding every image: the time that it takes to prepare
beyond that of a run without; ``epochs to repay`` is how many epochs win this back. The losses of all steps must agree.
The target for ViT-B/32 is a ratio of at least 5.
"""

import argparse
import logging
import statistics
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from lightning.pytorch import Callback
from PIL import Image
from side_by_side import RESULTS, machine, now, our_clip, print_table, write_csv
from torch.optim import SGD

from kshot.backbones import Backbone
from kshot.classifiers import CoOp
from kshot.data.datamodule import FewShotDataModule
from kshot.data.parts import Batch
from kshot.run import build, fit, make_trainer
from kshot.surroundings import settle_chatter

TARGET = 5.0
NAMES = ("ant", "boat", "clock", "drum", "eagle", "fork", "grape", "hat", "iron", "jar")


class Clock(Callback):
    """Times epochs and what comes before them, and keeps the losses and the shape of what the batches carry."""

    def __init__(self) -> None:
        self.epochs: list[float] = []
        self.losses: list[float] = []
        self.inputs: set[str] = set()

    def setup(self, trainer, pl_module, stage):  # noqa: ARG002  runs before the module's own, which prepare the run
        self.started = now()

    def on_train_start(self, trainer, pl_module):  # noqa: ARG002  Lightning's signature
        self.preparing = now() - self.started

    def on_train_epoch_start(self, trainer, pl_module):  # noqa: ARG002  Lightning's signature
        self.started = now()

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):  # noqa: ARG002  Lightning's signature
        self.losses.append(float(outputs["loss"]))
        self.inputs.add(carried(batch))

    def on_validation_batch_start(self, trainer, pl_module, batch, batch_idx, dataloader_idx=0):  # noqa: ARG002  Lightning's signature
        self.inputs.add(carried(batch))

    def on_train_epoch_end(self, trainer, pl_module):  # noqa: ARG002  validation is over by then
        self.epochs.append(now() - self.started)


def carried(batch: Batch) -> str:
    return "features" if batch.features is not None else "tokens" if batch.tokens is not None else "images"


def generate(folder: Path, shots: int, size: int) -> None:
    """Images of noise in a colour of the class, ``folder/<part>/<class>/<i>.png``."""
    noise = np.random.default_rng(0)
    for part, count in (("train", shots), ("val", 4), ("test", 1)):
        for name in NAMES:
            (folder / part / name).mkdir(parents=True)
            colour = noise.integers(0, 192, 3)
            for i in range(count):
                pixels = colour + noise.integers(0, 64, (size, size, 3))
                Image.fromarray(pixels.astype(np.uint8)).save(folder / part / name / f"{i}.png")


def timed(backbone: Backbone, dataset: str, shots: int, epochs: int, cached: bool) -> Clock:
    """One run; the backbone stays frozen, so that the next run finds it as it was."""
    data = FewShotDataModule(dataset, shots=shots, batch_size=32, store_gb=0)  # each run encodes for itself
    optimizer = partial(SGD, lr=2e-3, momentum=0.9, weight_decay=5e-4)
    coop = partial(CoOp, context_length=16)
    module = build(backbone, data, classifier=coop, optimizer=optimizer, cache_features=cached)
    clock = Clock()
    fit(module, data, make_trainer([clock], max_epochs=epochs))
    module.detach()
    wanted = {"features"} if cached else {"images"}
    assert clock.inputs == wanted, f"batches carried {clock.inputs}, not {wanted}"
    return clock


def filling(clocks: dict[bool, list[Clock]]) -> float:
    """Seconds that runs with kept features spend on them before their first epoch."""
    without, kept = (statistics.median(c.preparing for c in clocks[cached]) for cached in (False, True))
    return kept - without


def compare(case: str, backbone: Backbone, dataset: str, options: argparse.Namespace, epochs: int) -> dict[str, object]:
    clocks: dict[bool, list[Clock]] = {False: [], True: []}
    for _ in range(options.rounds):
        for cached in (False, True):
            clocks[cached].append(timed(backbone, dataset, options.shots, epochs, cached))
    every, kept = (statistics.median(t for c in clocks[cached] for t in c.epochs[1:]) for cached in (False, True))
    fill = filling(clocks)
    losses = [torch.tensor([c.losses for c in clocks[cached]]).double() for cached in (False, True)]
    return {
        "case": case, "epochs": epochs, "rounds": options.rounds, "steps": losses[0].shape[1],
        "encoded_s": round(every, 4), "cached_s": round(kept, 4), "ratio": round(every / kept, 1),
        "fill_s": round(fill, 3), "epochs to repay": round(fill / (every - kept), 2),
        "loss_first": round(losses[0][0, 0].item(), 4), "loss_last": round(losses[0][0, -1].item(), 4),
        "loss_diff": (losses[0] - losses[1]).abs().max().item(),
    }  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=["folder", "digits"], help="run one of the two cases")
    parser.add_argument("--model", default="ViT-B-32", help="an architecture of open_clip, for the folder of images")
    parser.add_argument("--shots", type=int, default=8, help="images a class; there are ten classes")
    parser.add_argument("--size", type=int, default=224, help="side of the generated images")
    parser.add_argument("--epochs", type=int, default=2, help="of a run on the folder")
    parser.add_argument("--digits-epochs", type=int, default=6, help="of a run on the digits")
    parser.add_argument("--rounds", type=int, default=2, help="runs of each kind, in turns")
    parser.add_argument("--threads", type=int, default=1, help="of torch on a CPU")
    parser.add_argument("--out", type=Path, default=RESULTS / "feature_cache.csv")
    options = parser.parse_args(arguments)
    if min(options.epochs, options.digits_epochs) < 2:
        parser.error("an epoch after the first is timed: give at least 2")
    torch.set_num_threads(options.threads)
    logging.disable(logging.WARNING)  # that weights are random
    settle_chatter()
    print(machine())
    rows = []
    if options.only != "digits":
        with tempfile.TemporaryDirectory() as folder:
            generate(Path(folder), options.shots, options.size)
            backbone = our_clip(options.model)
            rows.append(compare(f"{options.model}, folder", backbone, folder, options, options.epochs))
    if options.only != "folder":
        backbone = our_clip("kshot:glyph_clip")
        rows.append(compare("glyph_clip, digits", backbone, "digits", options, options.digits_epochs))
    print_table("a CoOp epoch with images encoded in every step and with cached features", rows)
    if options.only != "digits":
        value = rows[0]["ratio"]
        print(f"\n{options.model}: {value}, target >= {TARGET:g}: {'reached' if value >= TARGET else 'missed'}")
    write_csv(options.out, rows)


if __name__ == "__main__":
    main()
