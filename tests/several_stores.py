"""A probe in one process, and in two; what each encoded, found, and met in a broken data set."""

from __future__ import annotations

import os
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import torch
from processes import in_children

from kshot.lean import load_lightning

load_lightning()

from lightning.pytorch import Callback  # noqa: E402

from kshot.backbones import OpenClip  # noqa: E402
from kshot.classifiers import LinearProbe  # noqa: E402
from kshot.data import CropFlip, FewShotDataModule  # noqa: E402
from kshot.errors import UserError  # noqa: E402
from kshot.features import FeatureStore  # noqa: E402
from kshot.run import build, evaluate, fit, make_trainer  # noqa: E402


class Features(Callback):
    """Keeps the features that the training part carries."""

    found = torch.empty(0)

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Keeps."""
        del pl_module
        self.found = trainer.datamodule.part("train").features.clone()


def main(folder: Path, out: str, model: str) -> None:
    processes, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    options: dict[str, Any] = {"accelerator": "cpu", "devices": processes, "limit_val_batches": 0}
    options |= {"strategy": "ddp"} if processes > 1 else {}
    backbone, watch = OpenClip(model), Features()

    def run() -> dict[str, Any]:
        store = FeatureStore(backbone)
        data = FewShotDataModule(
            str(folder), shots=3, batch_size=8 // processes, eval_batch_size=5, augment=CropFlip(), views=2
        )
        sgd = partial(torch.optim.SGD, lr=0.1)
        module = build(backbone, data, classifier=LinearProbe, optimizer=sgd)
        trainer = make_trainer(max_epochs=2, callbacks=[watch], **options)
        fit(module, data, trainer, store=store)
        sets = evaluate(module, data, trainer, store=store).sets
        return {"sets": sets, "encoded": sum(store.encoded.values()), "features": watch.found}

    def at_one_moment() -> None:
        if processes > 1:
            torch.distributed.barrier()

    runs = [run(), run()]
    at_one_moment()
    broken = folder / FewShotDataModule(str(folder), shots=3).draw.train[1].path
    content = broken.read_bytes()
    at_one_moment()
    if rank == 0:
        broken.write_bytes(b"broken")
    at_one_moment()
    mistake = ""
    try:
        run()
    except UserError as error:
        mistake = str(error)
    at_one_moment()
    if rank == 0:
        broken.write_bytes(content)
    torch.save((runs, mistake), f"{out}{rank}.pt")


def work(images: Path, folder: Path, model: str) -> None:
    """Writes one0.pt, two0.pt and two1.pt into the folder, of a CLIP in a folder of its own."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    in_children(1, partial(main, images, str(folder / "one"), model), KSHOT_CACHE="")
    in_children(2, partial(main, images, str(folder / "two"), model), KSHOT_CACHE=str(folder / "cache"))
