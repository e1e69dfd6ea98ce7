"""Whether adapters at their defaults end below the heads in closed form, on four data sets, at 1 to 16 shots.

    OMP_NUM_THREADS=1 python benchmarks/defaults.py --data ../shared/data --weights vits14.safetensors

The default config without text, configs/dinov2_vits14_16shot.yaml: on satellite scenes (rsscn7), traffic signs (gtsrb)
and clothes (fashion_mnist) with a trained ViT-S/14, on digits with the carried CLIP. Heads in closed form see the same
views. One process, in which runs share the backbone and its features; rows are appended, and one that is there already
is not measured again. The table gives the best head of the closed forms, and by how many points each adapter is above
it, in the mean over the seeds that both have.
"""

import argparse
import statistics
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import yaml
from few_shot import append, machine, rows_of

from kshot import adapters, classifiers
from kshot.backbones import Backbone, OpenClip, Timm
from kshot.data.datamodule import FewShotDataModule
from kshot.data.transforms import CropFlip
from kshot.features import FeatureStore
from kshot.files import packaged_folder
from kshot.optim import AdamW, WarmupCosine
from kshot.record import git_commit
from kshot.run import build, evaluate, fit, make_trainer, set_length

CONFIG = "dinov2_vits14_16shot"
CLOSED = ["class_mean", "ridge", "gda"]
ADAPTERS = ["lora", "dora", "vera", "randlora", "svft", "pissa", "nola", "lora_xs", "hydralora", "adalora"]
METHODS = [*CLOSED, "linear_probe", *ADAPTERS]
SHOTS = [1, 2, 4, 8, 16]
UNMIRRORED = {"scale": (0.7, 1.0), "flip": 0.0}  # signs and digits mean something else in a mirror
CASES = {"rsscn7": {}, "gtsrb": UNMIRRORED, "fashion_mnist": {}, "digits": UNMIRRORED}
FIELDS = (
    "case", "backbone", "size", "method", "shots", "seed", "start", "acc", "ece", "steps", "lr", "head_scale",
    "fit_seconds", "split", "precision", "machine", "git_commit",
)  # fmt: skip


def settings_of(method: str, start: str) -> dict[str, Any]:
    """What FewShotModule takes, from the method's file over the default one."""
    configs = [packaged_folder("configs") / f"{name}.yaml" for name in (CONFIG, f"methods/{method}")]
    default, own = (yaml.safe_load(file.read_text(encoding="utf-8"))["model"]["init_args"] for file in configs)
    spec = own.get("classifier", default["classifier"])
    settings = {**spec.get("init_args", {})} | ({"text": False} if method in ("ridge", "gda") else {})
    if spec["class_path"] == "LinearProbe":
        settings["head_start"] = start
    found: dict[str, Any] = {"classifier": partial(getattr(classifiers, spec["class_path"]), **settings)}
    if method in CLOSED:
        return found
    spec = {**default, **own}["adapter"]
    if spec is not None:
        found["adapter"] = getattr(adapters, spec["class_path"])(**spec.get("init_args", {}))
        found["targets"] = own.get("targets", default["targets"])
    optimizer = own.get("optimizer", default["optimizer"])
    schedule = partial(WarmupCosine, **default["schedule"]["init_args"])
    return found | {"optimizer": partial(AdamW, **optimizer["init_args"]), "schedule": schedule}


def measure(
    backbone: Backbone, case: str, method: str, shots: int, seed: int, options: argparse.Namespace
) -> dict[str, Any]:
    """One row: trained and tested as ``kshot fit`` would."""
    data = data_of(case, shots, seed, options)
    store = FeatureStore(backbone)
    module = build(backbone, data, seed=seed, **settings_of(method, options.start))
    trainer = make_trainer(max_epochs=1, precision=options.precision, limit_val_batches=0)
    if module.takes_steps:
        set_length(trainer, data)
    begun = time.time()
    fit(module, data, trainer, store=store)
    seconds = time.time() - begun
    steps, rates = trainer.global_step, [g["initial_lr"] for o in trainer.optimizers for g in o.param_groups]
    tested = next(iter(evaluate(module, data, make_trainer(precision=options.precision), store=store).sets.values()))
    scale = getattr(module.classifier, "started", {}).get("scale", "")
    module.detach()
    return {
        "case": case, "backbone": backbone.name, "size": backbone.image_size, "method": method, "shots": shots,
        "seed": seed, "start": options.start if steps else "", "acc": tested["acc"], "ece": tested["ece"],
        "steps": steps, "lr": rates[-1] if rates else "", "head_scale": scale, "fit_seconds": round(seconds, 3),
        "split": data.draw.digest[7:23], "precision": options.precision, "machine": machine(),
        "git_commit": git_commit(),
    }  # fmt: skip


def data_of(case: str, shots: int, seed: int, options: argparse.Namespace) -> FewShotDataModule:
    """The data of the default config, drawn by a seed."""
    config = yaml.safe_load((packaged_folder("configs") / f"{CONFIG}.yaml").read_text(encoding="utf-8"))
    given = config["data"]["init_args"]
    augment = CropFlip(**given["augment"]["init_args"] | CASES[case])
    name = case if case == "digits" else str(options.data / case)
    given |= {"dataset": name, "shots": shots, "split_seed": seed, "augment": augment, "eval_batch_size": 64}
    return FewShotDataModule(**given)


def table(rows: Sequence[dict[str, str]], start: str) -> Iterator[str]:
    """Lines of Markdown: by case and shots the best closed form, and what each adapter has above it."""
    cells: dict[tuple[str, str, int], dict[int, float]] = {}
    for row in rows:
        if row["start"] in ("", start):
            key = row["case"], row["method"], int(row["shots"])
            cells.setdefault(key, {})[int(row["seed"])] = 100 * float(row["acc"])
    measured = [method for method in METHODS if any(key[1] == method for key in cells)]
    others = [method for method in measured if method not in CLOSED]
    yield f"| data | shots | best closed form | {' | '.join(others)} |"
    yield "|---" * (3 + len(others)) + "|"
    for case in CASES:
        for shots in SHOTS:
            heads = {m: cells[case, m, shots] for m in CLOSED if (case, m, shots) in cells}
            if not heads:
                continue
            best = max(heads, key=lambda head: statistics.mean(heads[head].values()))
            shown = [f"{statistics.mean(heads[best].values()):.1f} ({best})"]
            for method in others:
                own = cells.get((case, method, shots), {})
                shared = [own[seed] - heads[best][seed] for seed in own if seed in heads[best]]
                shown.append(f"{statistics.mean(shared):+.1f}" if shared else "")
            yield f"| {case} | {shots} | " + " | ".join(shown) + " |"


def main(given: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder with rsscn7, gtsrb and fashion_mnist")
    parser.add_argument("--weights", type=Path, help="ViT-S/14 weights for timm")
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=list(CASES))
    parser.add_argument("--methods", nargs="+", default=METHODS, choices=METHODS)
    parser.add_argument("--shots", nargs="+", type=int, default=SHOTS)
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument("--start", default="ridge", help="head_start of the linear heads")
    parser.add_argument("--size", type=int, default=112, help="side of the images of the ViT in pixels")
    parser.add_argument("--precision", default="bf16-mixed")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "defaults.csv")
    options = parser.parse_args(given)
    if set(options.cases) - {"digits"} and None in (options.data, options.weights):
        parser.error("all cases but digits need --data and --weights")
    for case in options.cases:
        wanted = [(m, k, s) for k in options.shots for s in options.seeds for m in options.methods]
        done = {(r["case"], r["method"], int(r["shots"]), int(r["seed"]), r["start"]) for r in rows_of(options.out)}
        lacking = [c for c in wanted if not {(case, *c, options.start), (case, *c, "")} & done]
        if not lacking:
            continue
        backbone: Backbone = OpenClip("kshot:glyph_clip")
        if case != "digits":
            backbone = Timm("vit_small_patch14_dinov2.lvd142m", weights=options.weights, image_size=options.size)
        for method, shots, seed in lacking:
            row = measure(backbone, case, method, shots, seed, options)
            append(options.out, FIELDS, row)
            print(f"{case} {method} {shots} shots, seed {seed}: {100 * row['acc']:.1f} % in {row['steps']} steps")
    print("\n".join(table(rows_of(options.out), options.start)))


if __name__ == "__main__":
    main()
