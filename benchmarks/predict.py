"""Throughput of ``predict`` beside the loop that one would write with open_clip or timm, and how soon it starts.

    python benchmarks/predict.py

Compared, in turns within one process, are ``run.predict`` and a plain loop: torch's DataLoader over the same JPEG files
with the library's own transform and the same number of workers, the library's own model, the same class vectors,
softmax and the best five. Both begin with an open model. The weights are random, the files are generated photos of
500 x 375 pixels. ``wall`` is images a second as a user sees it, ``core`` the same by the CPU time of the process and of
the processes that it started, which other work on the machine hardly moves. Labels of both must agree. The target is a
ratio of at least 1. ``start`` are seconds of a fresh process from loaded libraries to the answer about one image, which
may be 4, and ``start_core`` those of the CPU among them.
"""

import argparse
import logging
import resource
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file
from side_by_side import RESULTS, machine, print_table, printed_by, ratio, write_csv
from torch.utils.data import DataLoader, Dataset

import kshot
from kshot.backbones.open_clip import resolve

TARGET, START = 1.0, 4.0
SIDE = 32  # of the noise that photos are enlarged from


class Files(Dataset):
    """Files as a library's own transform shows them."""

    def __init__(self, files: Sequence[Path], transform: Callable) -> None:
        self.files, self.transform = files, transform

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, i: int) -> torch.Tensor:
        return self.transform(Image.open(self.files[i]).convert("RGB"))


def photos(folder: Path, count: int) -> list[Path]:
    """JPEG files of coarse noise, in two classes of folders, as large as photos of a data set usually are."""
    noise, files = np.random.default_rng(0), []
    for i in range(count):
        pixels = noise.integers(0, 256, (SIDE * 3 // 4, SIDE, 3), dtype=np.uint8)
        file = folder / "ab"[i % 2] / f"{i:05}.jpg"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).resize((500, 375), Image.Resampling.BICUBIC).save(file, quality=90)
        files.append(file)
    return files


def weights_of(model: str, library: str, folder: Path) -> dict[str, object]:
    """The settings of a backbone with random weights that lie in a file, and so are the same for both."""
    import open_clip
    import timm

    torch.manual_seed(0)
    if library == "open_clip" and ":" in model:
        return {"model": model}
    whole = open_clip.create_model(model) if library == "open_clip" else timm.create_model(model, num_classes=0)
    file = folder / f"{model}.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in whole.state_dict().items()}, file)
    return {"model": model, "pretrained" if library == "open_clip" else "weights": str(file)}


def run_of(spec: dict[str, object], library: str, folder: Path) -> kshot.Run:
    """A run with class means on the generated photos."""
    kind, method = ("OpenClip", "zero_shot") if library == "open_clip" else ("Timm", "class_mean")
    options = {
        "model.backbone": {"class_path": kind, "init_args": spec},
        **{"run.root": folder / "runs", "run.test": False, "run.calibrate": False},
        **{"data.augment": None, "data.test_share": None, "data.store_gb": 0.0, "data.template": "a photo of a {}."},
    }
    configs = ["clip_16shot.yaml", f"methods/{method}.yaml"]
    return kshot.fit(configs, data=folder / "photos", shots=2, progress=False, options=options)


def plain_loop(
    spec: dict[str, object], library: str, run: kshot.Run, files: list[Path], batch: int, workers: int
) -> Callable[[], list[int]]:
    """The loop that one would write, as a function that gives the labels."""
    import open_clip
    import timm

    name, file = str(spec["model"]), spec.get("pretrained") or spec.get("weights")
    if library == "open_clip":
        model, _, transform = open_clip.create_model_and_transforms(resolve(name), pretrained=file)
        tokens = run.model.backbone.tokenize([f"a photo of a {each}." for each in run.class_names])
        with torch.inference_mode():
            rows = torch.nn.functional.normalize(model.encode_text(tokens), dim=-1) * model.logit_scale.exp()
        encode = model.encode_image
    else:
        size = run.model.backbone.image_size
        overlay = {"pretrained_cfg_overlay": {"file": file}, "num_classes": 0, "img_size": size}
        model = timm.create_model(name, pretrained=True, **overlay)
        config = timm.data.resolve_model_data_config(model) | {"input_size": (3, size, size)}
        transform = timm.data.create_transform(**config, is_training=False)
        rows, encode = 20 * run.model.classifier.means, model
    model.eval()

    def loop() -> list[int]:
        found: list[int] = []
        with torch.inference_mode():
            for image in DataLoader(Files(files, transform), batch_size=batch, num_workers=workers):
                logits = torch.nn.functional.normalize(encode(image), dim=-1) @ rows.T
                values, labels = logits.softmax(-1).topk(min(5, logits.shape[1]))
                found += labels[:, 0].tolist()
                del values
        return found

    return loop


def clocks() -> tuple[float, float]:
    """Wall seconds, and CPU seconds of this process and of those that it waited for."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return time.perf_counter(), sum(each.ru_utime + each.ru_stime for each in used)


def compare(library: str, model: str, workers: int, options: argparse.Namespace, folder: Path) -> dict[str, object]:
    """A row: both ways in turns."""
    spec = weights_of(model, library, folder)
    run, files = run_of(spec, library, folder), sorted((folder / "photos").rglob("*.jpg"))
    loop = plain_loop(spec, library, run, files, options.batch, workers)
    names = run.class_names

    def ours() -> list[int]:
        found = run.predict(files, workers=workers, batch_size=options.batch, progress=False)
        return [names.index(each.label) for each in found]

    calls, times = {"kshot": ours, "plain": loop}, {"kshot": [], "plain": []}
    said: dict[str, list[int]] = {}
    for i in range(options.rounds + 1):  # the first does not count
        for name in list(calls)[:: 1 if i % 2 else -1]:
            before = clocks()
            said[name] = calls[name]()
            if i:
                times[name].append([b - a for a, b in zip(before, clocks(), strict=True)])
    agree = sum(a == b for a, b in zip(*said.values(), strict=True)) / len(files)
    assert agree > 0.99, f"{agree:.1%} of the labels agree"
    row: dict[str, object] = {"library": library, "model": model, "workers": workers, "images": len(files)}
    for i, clock in enumerate(("wall", "core")):
        seconds = {name: [each[i] for each in rounds] for name, rounds in times.items()}
        row |= {f"{clock}_{name}": round(len(files) / statistics.median(some), 1) for name, some in seconds.items()}
        middle, spread = ratio(seconds["plain"], seconds["kshot"])
        row |= {f"{clock}_ratio": round(middle, 3), f"{clock}_spread": round(spread, 3)}
    return row | started(run, files[0], options.in_process)


STARTING = """
import sys, time, open_clip, timm, kshot.predicting
clocks = time.perf_counter(), time.process_time()
kshot.predicting.run_predict(sys.argv[1:])
print(time.perf_counter() - clocks[0], time.process_time() - clocks[1])
"""


def started(run: kshot.Run, file: Path, in_process: bool) -> dict[str, object]:
    """Seconds of a fresh process from loaded libraries to the answer about one image, on the wall and of the CPU."""
    wall, core = printed_by(STARTING, ["--run", str(run.directory), "--images", str(file)], in_process)
    return {"start": round(wall, 2), "start_core": round(core, 2)}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--open-clip", nargs="*", default=["kshot:glyph_clip", "ViT-B-32"], help="of open_clip")
    parser.add_argument("--timm", nargs="*", default=["vit_tiny_patch16_224"], help="of timm")
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 2])
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1, help="of torch")
    parser.add_argument("--in-process", action="store_true", help="measure the start in this process: not exact")
    parser.add_argument("--out", type=Path, default=RESULTS / "predict.csv")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    logging.disable(logging.WARNING)  # that weights are random
    print(machine())
    models = [("open_clip", each) for each in options.open_clip] + [("timm", each) for each in options.timm]
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        photos(Path(folder, "photos"), options.images)
        for library, model in models:
            for workers in options.workers:
                rows.append(compare(library, model, workers, options, Path(folder)))
                print(rows[-1], flush=True)
    print_table("images a second, and a loop's seconds over those of predict", rows)
    for row in rows:
        said = "reached" if float(str(row["core_ratio"])) >= TARGET else "missed"
        start = "reached" if float(str(row["start_core"])) <= START else "missed"
        print(
            f"{row['model']}, {row['workers']} workers: ratio {row['core_ratio']} of {TARGET:g}: {said}; {start}: start"
        )
    write_csv(options.out, rows)


if __name__ == "__main__":
    main()
