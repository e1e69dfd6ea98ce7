"""Fits five methods in one process, and in two with half the batch each, and writes what rank 0 found.

``python tests/several_devices.py FOLDER SCANS WORD ...`` writes one.pt and two.pt, {method: {"tuned": tensors,
"figures": ..., "counts": ..., "ranks": ..., "steps": ...}}, tested on a folder of scans; at last two processes run the
command line of the words.
"""

from __future__ import annotations

import os
import sys
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import open_clip  # noqa: F401  which each child would import, as the next two
import sklearn.datasets  # noqa: F401
import torch
import torch._dynamo
from processes import in_children

from kshot.lean import load_lightning

load_lightning()

from kshot import cli  # noqa: E402
from kshot.adapters import AdaLoRA, LoRA, RandLoRA  # noqa: E402
from kshot.backbones import OpenClip  # noqa: E402
from kshot.classifiers import CoOp, PromptSRC  # noqa: E402
from kshot.data import CropFlip, FewShotDataModule  # noqa: E402
from kshot.run import Tested, build, evaluate, fit, make_trainer  # noqa: E402

BATCH = 12  # of all processes together; 20 shots leave a short last batch, which is dropped
SLOTS = ["image.4.*", "text.1.[qv]"]
CASES: dict[str, dict[str, Any]] = {
    "LoRA": {"adapter": LoRA(rank=2), "targets": SLOTS, "lr": 2.0},
    "AdaLoRA": {
        "adapter": AdaLoRA(initial_rank=3, target_rank=1, initial_steps=1, final_steps=2, every=1),
        "targets": SLOTS,
        "lr": 50.0,
    },
    "RandLoRA": {"adapter": RandLoRA(rank=16), "targets": SLOTS, "lr": 0.05},
    "CoOp": {"classifier": partial(CoOp, context_length=4), "lr": 0.3},
    "PromptSRC": {
        "classifier": partial(PromptSRC, depth=2, templates=["{}"], average_mean=2.0, average_std=1.0),
        "lr": 0.02,
    },
}


def run(settings: dict[str, Any], processes: int, scans: str) -> dict[str, Any]:
    settings = dict(settings)
    # SGD, because the first steps of Adam divide a gradient near zero by itself, which no rounding survives
    optimizer = partial(torch.optim.SGD, lr=settings.pop("lr"), momentum=0.9)
    data = FewShotDataModule(
        "digits", shots=2, batch_size=BATCH // processes, eval_batch_size=100, augment=CropFlip(flip=0.0), views=3
    )
    module = build(OpenClip("kshot:glyph_clip"), data, optimizer=optimizer, **settings)
    before = {name: tensor.detach().clone() for name, tensor in module.tuned_state().items()}
    options = {"accelerator": "cpu", "devices": processes, "strategy": "ddp"} if processes > 1 else {}
    trainer = make_trainer(max_epochs=4, limit_val_batches=0, **options)
    fit(module, data, trainer)
    steps = trainer.global_step
    tested = Tested({"test": {}})
    if scans:
        data = FewShotDataModule(scans, shots=1, eval_batch_size=8)
        data.use_preprocessing(module.backbone.preprocessing)
        tested = evaluate(module, data, trainer)
    state = {name: tensor.detach().clone() for name, tensor in module.tuned_state().items()}
    ranks = {name: rank for shared in module.shared for name, rank in shared.ranks(module.layers).items()}
    floating = {name: tensor for name, tensor in before.items() if tensor.is_floating_point()}
    return {
        "moved": max(float((state[name] - tensor).abs().max()) for name, tensor in floating.items()),
        "tuned": state,
        "figures": tested.sets["test"],
        "counts": tested.counts,
        "ranks": ranks,
        "steps": steps,
        "kept_tokens": module.kept_tokens,
    }


def main(out: Path, scans: str) -> None:
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    found = {name: run(settings, processes, scans if name == "LoRA" else "") for name, settings in CASES.items()}
    if os.environ.get("RANK", "0") == "0":
        torch.save(found, out)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    folder, scans, words = Path(sys.argv[1]), sys.argv[2], sys.argv[3:]
    for name, count in (("one", 1), ("two", 2)):  # each encodes its images itself
        in_children(count, partial(main, folder / f"{name}.pt", scans), KSHOT_CACHE=str(folder / name))
    in_children(2, partial(cli.main, words), KSHOT_CACHE=str(folder / "words"))
