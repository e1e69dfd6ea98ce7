"""Runs all methods after each other on one backbone, once forwards and once backwards, and some alone; prints JSON.

``python tests/many_runs.py``: {method: {"shared": figures, "backwards": figures, "fresh": figures}}, figures being
digests and accuracies. Of any two methods each is the first once, so that what one leaves to the other shows; what any
run would leave shows in those that have a process of their own.
Every process is forked from one that has imported what a run needs, built a backbone, and run nothing.
"""

from __future__ import annotations

import gc
import hashlib
import inspect
import json
import os
import sys
import tempfile
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import PIL.Image
import torch
import torch._dynamo  # which the first optimizer of a process imports, for a second

from kshot.lean import load_lightning

load_lightning()

import towers  # noqa: E402
from data_fixtures import digit_folder  # noqa: E402

import kshot.adapters  # noqa: E402
import kshot.classifiers  # noqa: E402
from kshot.adapters import Adapter, FullTuning  # noqa: E402
from kshot.backbones import Backbone  # noqa: E402
from kshot.classifiers import Classifier, CoOp, DePT, LinearProbe, PromptSRC, TextPrompt  # noqa: E402
from kshot.data import CropFlip, FewShotDataModule  # noqa: E402
from kshot.features import FeatureStore  # noqa: E402
from kshot.run import build, evaluate, fit, make_trainer  # noqa: E402

ADAPTER_SETTINGS: dict[str, dict[str, Any]] = {
    "AdaLoRA": {"initial_rank": 3, "target_rank": 2, "initial_steps": 1, "final_steps": 1, "every": 1},
    "NOLA": {"bases": 32, "save_bits": 8},
    "PRANC": {"coefficients": 60},
    "VeRA": {"rank": 40},
    "AutoLoRA": {"max_rank": 3},
}
HEAD_SETTINGS: dict[str, dict[str, Any]] = {
    "CLIPAdapter": {"ratio": [0.2, 0.6]},
    "LPPlusPlus": {"iterations": 20},
    "PromptSRC": {"average_mean": 1.0, "average_std": 1.0, "templates": ["a photo of a {}.", "{}"]},
}


ALONE = ("LoRA", "AdaLoRA", "RandLoRA", "LinearProbe", "CoOp", "PromptSRC", "TipAdapterF", "GDA")  # one of each kind


def exported(package: Any, kind: type) -> list[type]:
    found = vars(package).values()
    return [c for c in found if inspect.isclass(c) and issubclass(c, kind) and not inspect.isabstract(c)]


def cases() -> dict[str, dict[str, Any]]:
    """Settings of every method by name, adapters in both towers, and some that combine."""
    found: dict[str, dict[str, Any]] = {}
    for kind in exported(kshot.adapters, Adapter):
        targets = ["*.ln_?.*"] if kind is FullTuning else ["image.1.*", "text.0.[qv]"]
        found[kind.__name__] = {"adapter": kind(**ADAPTER_SETTINGS.get(kind.__name__, {})), "targets": targets}
    for head in exported(kshot.classifiers, Classifier):
        found[head.__name__] = {"classifier": partial(head, **HEAD_SETTINGS.get(head.__name__, {}))}
    lora = kshot.adapters.LoRA(rank=2, dropout=0.3)
    found["LinearProbe + LoRA"] = {"classifier": LinearProbe, "adapter": lora, "targets": ["image.*"], "head_lr": 0.01}
    found["CoOp + LoRA"] = {"classifier": partial(CoOp, context_length=4), "adapter": lora, "targets": ["*.[qv]"]}
    found["DePT (PromptSRC)"] = {"classifier": partial(DePT, base=partial(PromptSRC, depth=2, templates=["{}"]))}
    found["BitFit"] = {"classifier": TextPrompt, "adapter": FullTuning(only="bias"), "targets": ["image.*"]}
    return found


def data_for(scans: Path, **settings: Any) -> FewShotDataModule:
    sizes = {"shots": 2, "batch_size": 3, "eval_batch_size": 16}
    return FewShotDataModule(str(scans), **sizes, augment=CropFlip(flip=0.0), views=2, **settings)


def figures(backbone: Backbone, data: FewShotDataModule, settings: dict[str, Any], store: Any = None) -> dict[str, Any]:
    """One short run, tested on 16 images."""
    optimizer = partial(torch.optim.AdamW, lr=2e-3)
    module = build(backbone, data, optimizer=optimizer, **settings)
    fit(module, data, make_trainer(max_epochs=2 if "AdaLoRA" in str(settings) else 1, limit_val_batches=0), store=store)
    digest, state = hashlib.sha256(), module.tuned_state()
    for name, tensor in sorted(state.items()):
        digest.update(name.encode() + tensor.detach().cpu().double().numpy().tobytes())
    tested = evaluate(module, data, make_trainer(limit_test_batches=1), store=store)
    module.detach()
    return {"tuned": digest.hexdigest(), "tensors": len(state), "sets": tested.sets}


def in_child(work: Any) -> Any:
    """What a forked process finds."""
    read, write = os.pipe()
    gc.freeze()  # a child that searches what is here for garbage copies all of it
    child = os.fork()
    if not child:
        os.close(read)
        with os.fdopen(write, "w") as out:
            json.dump(work(), out)
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as inp:
        text = inp.read()
    os.waitpid(child, 0)
    return json.loads(text) if text else None


def all_in_one(backbone: Backbone, scans: Path) -> dict[str, Any]:
    data = data_for(scans)
    store = FeatureStore(backbone)
    before = {name: tensor.clone() for name, tensor in backbone.state_dict().items()}
    found: dict[str, Any] = {}
    for name, settings in cases().items():
        found[name] = figures(backbone, data, settings, store)
        after = backbone.state_dict()
        same = before.keys() == after.keys() and all(torch.equal(after[n], before[n]) for n in before)
        found[name]["untouched"] = same and not any(p.requires_grad for p in backbone.parameters())
    return found


def nothing_shared(backbone: Backbone, scans: Path, chosen: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Runs that decode and encode for themselves."""
    return {name: figures(backbone, data_for(scans, store_gb=0), settings) for name, settings in chosen.items()}


def main() -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    PIL.Image.init()  # as the first image does
    with tempfile.TemporaryDirectory() as folder:
        towers.use_folder(Path(folder))
        scans = digit_folder(Path(folder) / "scans", train=4, val=2, test=6)
        backbone = towers.build("clip")
        shared = in_child(lambda: all_in_one(backbone, scans))
        some = {name: settings for name, settings in cases().items() if name in ALONE}
        backwards = in_child(partial(nothing_shared, backbone, scans, dict(reversed(cases().items()))))
        fresh = {}
        for name, settings in some.items():
            fresh |= in_child(partial(nothing_shared, backbone, scans, {name: settings})) or {}
    found = {"shared": shared, "backwards": backwards, "fresh": fresh}
    json.dump({name: {how: (each or {}).get(name) for how, each in found.items()} for name in cases()}, sys.stdout)


if __name__ == "__main__":
    main()
