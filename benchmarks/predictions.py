"""What it costs a test to keep what was answered to each image: seconds to gather and to write, and bytes.

    python benchmarks/predictions.py

(Seconds.) Logits are random, in batches of 128, on one thread.
"""

import argparse
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import torch
from side_by_side import RESULTS, machine, print_table, write_csv

from kshot.calibration import Calibration
from kshot.predictions import FILE, Answers, read, write

BATCH = 128


def measured(images: int, classes: int, folder: Path) -> dict[str, object]:
    """Seconds to gather, to write and to read the answers to images, and bytes of one in memory and on disk."""
    answers, gather, paths = Answers(), 0.0, [f"class_{i % classes:04d}/image_{i:08d}.jpg" for i in range(images)]
    digests = [f"{hash(path) & (2**64 - 1):016x}" for path in paths]
    for start in range(0, images, BATCH):
        index = torch.arange(start, min(images, start + BATCH))
        logits, label = torch.randn(len(index), classes), torch.randint(0, classes, (len(index),))
        clock = time.perf_counter()
        answers.add(index, label, logits, Calibration(2.0), logits)
        gather += time.perf_counter() - clock
    clock = time.perf_counter()
    whole = answers.whole()
    gather += time.perf_counter() - clock
    clock = time.perf_counter()
    part = SimpleNamespace(paths=paths, row_keys=lambda: digests)
    write(folder / FILE, {"test": (whole, part)}, {"test": [f"class {i}" for i in range(classes)]})
    writing = time.perf_counter() - clock
    clock = time.perf_counter()
    assert len(read(folder).label) == images
    reading = time.perf_counter() - clock
    memory = sum(column.numel() * column.element_size() for column in whole.values()) / images
    disk = (folder / FILE).stat().st_size / images
    seconds = {"gather_s": gather, "write_s": writing, "read_s": reading}
    sizes = {"bytes_memory": round(memory), "bytes_disk": round(disk)}
    return {"images": images, "classes": classes} | {name: round(s, 3) for name, s in seconds.items()} | sizes


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=50_000)
    parser.add_argument("--classes", type=int, nargs="+", default=[10, 100, 1000])
    parser.add_argument("--out", type=Path, default=RESULTS / "predictions.csv")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    print(machine())
    rows: list[dict[str, object]] = []
    for classes in options.classes:
        with tempfile.TemporaryDirectory() as folder:
            rows.append(measured(options.images, classes, Path(folder)))
    print_table("answers to images: seconds in all, and bytes an image", rows)
    write_csv(options.out, rows)


if __name__ == "__main__":
    main()
