"""What listing, a first and a second pass over images, a second fit, and the memory of many shots cost.

    python benchmarks/data.py

- listing: kshot's list of a folder of empty files beside ``os.walk``, both in one process.
- first pass: kshot's test part beside torchvision's ``ImageFolder`` with the same transform, batches and processes;
  generated photos of 500 x 375 pixels in JPEG, 224 pixels a side. Images per CPU second of all processes, in turns.
- second pass: the same part when the features of its images are in the store: digests, look-up, and all batches.
  Beside it the first pass, which encodes nothing yet.
- fit: a closed-form head on all of these images by the command line, twice, each time in a new process; seconds of fit
  and test on the wall, without the start.
- memory: the most that a process holds while it goes once through random views of 16 images a class, beyond what it
  holds before, as a run does whose features are kept; and what holding the decoded images instead takes.

Targets: 100,000 files in less than 1 s; a first pass of at least 1.0; a second pass of at least 20; a second fit in at
most 3 s.
"""

import argparse
import json
import logging
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from side_by_side import RESULTS, machine, our_clip, peak_megabytes, print_table, write_csv
from torch.utils.data import DataLoader
from torchvision import datasets, transforms

from kshot.backbones import Preprocessing
from kshot.classifiers import NearestClassMean
from kshot.cli import main as command_line
from kshot.commands import settle_chatter
from kshot.data import CropFlip, FewShotDataModule
from kshot.data.listing import list_folder
from kshot.features import FeatureStore
from kshot.record import git_commit
from kshot.run import build, make_trainer

MAIN = Path(__file__).parents[1] / "main.py"
PARTS = ("listing", "passes", "fit", "memory")


def seconds(call: Callable[[], object]) -> float:
    """CPU seconds of this process and of those that it started and that have ended: others share the cores."""
    start = sum(os.times()[:4])
    call()
    return sum(os.times()[:4]) - start


def in_turns(rounds: int, *calls: Callable[[], object]) -> list[float]:
    """Median seconds of some calls that are made in turns, after one turn that does not count."""
    taken = [[seconds(call) for call in calls] for _ in range(rounds + 1)][1:]
    return [statistics.median(column) for column in zip(*taken, strict=True)]


def photos(root: Path, classes: int, parts: dict[str, int], size: tuple[int, int]) -> int:
    """Photos of smooth noise, ``root/<part>/<class>/<i>.jpg``, each of other bytes; their number."""
    noise, count = np.random.default_rng(0), 0
    pictures = []
    for _ in range(32):
        small = Image.fromarray(noise.integers(0, 256, (24, 32, 3), dtype=np.uint8))
        file = root / "picture.jpg"
        small.resize(size, Image.Resampling.BICUBIC).save(file, quality=90)
        pictures.append(file.read_bytes())
    file.unlink()
    for part, each in parts.items():
        for label in range(classes):
            folder = root / part / f"class {label:04}"
            folder.mkdir(parents=True)
            for i in range(each):
                (folder / f"{i:03}.jpg").write_bytes(pictures[count % 32] + count.to_bytes(4))  # behind its end
                count += 1
    return count


def row(part: str, case: str, count: int, what: str, ours: float, beside: str, theirs: float, target: str) -> dict:
    ratio = round(ours / theirs, 3) if theirs else float("nan")
    named = {"part": part, "case": case, "count": count, "measured": what, "kshot": round(ours, 3)}
    return named | {"beside": beside, "value": round(theirs, 3), "ratio": ratio, "target": target}


def listing(options: argparse.Namespace) -> list[dict]:
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder, "images")
        for label in range(folders := max(1, options.files // 100)):
            (root / f"class {label:05}").mkdir(parents=True)
            for i in range(options.files // folders):
                (root / f"class {label:05}" / f"{i:03}.jpg").touch()
        assert len(list_folder(root).images) == options.files
        ours, theirs = in_turns(options.rounds, lambda: list_folder(root), lambda: list(os.walk(root)))
    return [row("listing", "empty files", options.files, "seconds", ours, "os.walk", theirs, "below 1 s")]


def passes(options: argparse.Namespace, root: Path) -> list[dict]:
    side, workers, batch = 224, options.workers, 64

    def opened() -> FewShotDataModule:
        data = FewShotDataModule(str(root), shots=1, num_workers=workers, eval_batch_size=batch)
        data.use_preprocessing(Preprocessing(side))
        data.setup("test")
        return data

    resize = transforms.Resize(side, transforms.InterpolationMode.BICUBIC)
    transform = transforms.Compose([resize, transforms.CenterCrop(side), transforms.PILToTensor()])
    library = datasets.ImageFolder(str(root / "test"), transform)
    theirs, ours = DataLoader(library, batch, num_workers=workers), opened()
    first = torch.cat([batch.image for batch in ours.eval_order_dataloader("test")])
    assert (torch.cat([image for image, _ in theirs]).int() - first.int()).abs().max() <= 1
    count = len(first)
    del first

    taken = in_turns(
        options.rounds, lambda: list(map(len, ours.eval_order_dataloader("test"))), lambda: list(map(len, theirs))
    )
    rates = [count / each for each in taken]
    found = [row("first pass", f"{workers} workers", count, "images/s", rates[0], "ImageFolder", rates[1], "1.0 times")]

    backbone = our_clip(options.model)
    data = FewShotDataModule(str(root), shots=1, eval_batch_size=batch)
    module, trainer = build(backbone, data, classifier=NearestClassMean), make_trainer()
    trainer.test(module, datamodule=data, verbose=False)

    def second() -> None:
        again, store = FewShotDataModule(str(root), shots=1, eval_batch_size=batch), FeatureStore(backbone)
        again.use_preprocessing(backbone.preprocessing)
        store.tower = tower  # once a run, whatever the number of images
        begun.append(time.process_time())
        again.setup("test")
        rows = store.find(module, again, trainer, "test", 1).rows[0]
        again.keep_features("test", torch.stack(rows)[None])
        assert sum(len(batch.features) for batch in again.test_dataloader()) == count
        begun.append(time.process_time())

    begun: list[float] = []
    tower_s = seconds(backbone.image_sha256)
    tower = backbone.image_sha256()
    for _ in range(options.rounds + 1):
        second()
    rate = count / statistics.median(b - a for a, b in zip(begun[2::2], begun[3::2], strict=True))
    found.append(
        row("second pass", f"{options.model} features", count, "images/s", rate, "first pass", rates[0], "20 times")
    )
    found.append(row("digest", f"{options.model} weights", 1, "seconds a run", tower_s, "", 0, ""))
    return found


def fits(options: argparse.Namespace, root: Path, count: int) -> list[dict]:
    weights = [] if ":" in options.model else ["--model.backbone.pretrained", "random"]
    taken = []
    with tempfile.TemporaryDirectory() as folder:
        for number in (1, 2):
            command = ["fit", "--config", "clip_16shot.yaml", "--config", "methods/class_mean.yaml"]
            command += ["--model.backbone.model", options.model, *weights, "--data.dataset", str(root)]
            command += ["--data.shots", "null", "--data.augment", "null", "--data.views", "null", "--run.root", folder]
            command += ["--run.name", "x", "--trainer.enable_progress_bar", "false"]
            os.environ["KSHOT_CACHE"] = str(Path(folder, "cache"))
            if options.in_process:
                command_line(command)
            else:
                subprocess.run([sys.executable, str(MAIN), *command], check=True, stdout=subprocess.DEVNULL)
            result = json.loads(Path(folder, "x", f"00{number}", "result.json").read_text())
            taken.append(result["seconds"]["fit"] + result["seconds"]["test"])
            encoded = sum(result["features"]["encoded"].values())
            assert encoded == (count if number == 1 else 0), f"{encoded} of {count} images were encoded"
    return [
        row("fit", f"class means, {options.model}", count, "seconds", taken[1], "the first time", taken[0], "below 3 s")
    ]


def memory(options: argparse.Namespace) -> list[dict]:
    """Each kind in a process of its own, since memory that one has freed would hide what the next takes."""
    found = []
    ten = max(2, options.classes // 10)
    for kind, classes in (("stream", options.classes), ("held", ten)):
        if options.in_process:
            found.append(child(kind, classes, options.views))
            continue
        command = [sys.executable, __file__, "--child", kind, "--classes", str(classes), "--views", str(options.views)]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        found.append(float(done.stdout.split()[-1]))
    case = f"{options.classes} classes, 16 shots, {options.views} views"
    return [row("memory", case, 16 * options.classes, "MB", found[0], f"held, {ten} classes", found[1], "")]


def child(kind: str, classes: int, views: int) -> float:
    """The most megabytes that a pass over random views of 16 images a class takes."""
    with tempfile.TemporaryDirectory() as folder:
        photos(Path(folder), classes, {"train": 16, "test": 1}, (400, 300))
        data = FewShotDataModule(folder, shots=16, augment=CropFlip(), views=views, image_size=224)

        def go() -> None:
            if kind == "held":
                data.setup("fit")
                return
            data.trainer = make_trainer()
            data.setup("fit")
            part = data.opened("train")
            part.settle(hold=False)
            keys = [(i, view) for i in range(len(part)) for view in range(views)]
            for batch in data.once_dataloader("train", keys):
                assert batch.image is not None

        logging.disable(logging.WARNING)
        return peak_megabytes(go)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--files", type=int, default=100_000, help="to be listed, 100 a folder")
    parser.add_argument("--images", type=int, default=2000, help="photos, in 20 classes, 80 %% for testing")
    parser.add_argument("--model", default="ViT-B-32", help="an architecture of open_clip, with random weights")
    parser.add_argument("--workers", type=int, default=2, help="processes that load images")
    parser.add_argument("--classes", type=int, default=1000, help="of the run whose memory is measured")
    parser.add_argument("--views", type=int, default=10, help="of each of its images")
    parser.add_argument("--rounds", type=int, default=3, help="passes and lists of each kind, in turns")
    parser.add_argument("--out", type=Path, default=RESULTS / "data.csv")
    parser.add_argument("--in-process", action="store_true", help="fits and memory in this process: quick, not exact")
    parser.add_argument("--child", choices=["stream", "held"], help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    settle_chatter()
    if options.child:
        print(child(options.child, options.classes, options.views))
        return
    commit = git_commit()
    print(machine())
    logging.disable(logging.WARNING)  # that weights are random
    rows: list[dict] = listing(options) if "listing" in options.parts else []
    with tempfile.TemporaryDirectory() as folder:
        before = os.environ.get("KSHOT_CACHE")
        os.environ["KSHOT_CACHE"] = str(Path(folder, "cache"))
        try:
            each = max(5, options.images // 20)
            parts = {"train": each // 5 - each // 25, "val": each // 25, "test": each - each // 5}
            root = Path(folder, "photos")
            root.mkdir()
            count = photos(root, 20, parts, (500, 375))
            rows += passes(options, root) if "passes" in options.parts else []
            rows += fits(options, root, count) if "fit" in options.parts else []
        finally:
            os.environ.pop("KSHOT_CACHE") if before is None else os.environ.update(KSHOT_CACHE=before)
    rows += memory(options) if "memory" in options.parts else []
    print_table("Images: listing, passes, fits, memory", rows)
    write_csv(options.out, [each | {"commit": commit} for each in rows])


if __name__ == "__main__":
    main()
