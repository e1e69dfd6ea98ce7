"""Files that mean harm, or are broken in a way that costs time or memory: each with the command that meets it.

Every maker writes into a folder of its own and gives the words of a command line; what would be executed creates
``PWNED`` there. Used by tests/test_hostile.py and benchmarks/reliability.py.
"""

import gzip
import io
import json
import os
import pickle
import struct
import zipfile
import zlib
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import torch
from PIL import Image

import kshot

FIT = ["fit", "--config", "clip_16shot.yaml", "--trainer.max_epochs", "1", "--data.shots", "1"]
TEST = ["test", "--config", "clip_16shot.yaml"]


class Payload:
    """Touches a file when it is unpickled."""

    def __init__(self, canary: Path) -> None:
        self.canary = str(canary)

    def __reduce__(self):
        return os.system, (f"touch '{self.canary}'",)


def image(path: Path, size: tuple[int, int] = (32, 32)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, tuple(zlib.crc32(str(path).encode()).to_bytes(4, "big")[:3])).save(path)
    return path


def folder(root: Path) -> Path:
    """Two classes of three images, with a test part."""
    for part in ("train", "test"):
        for name in ("cat", "dog"):
            for i in range(3):
                image(root / part / name / f"{i}.png")
    return root


def checkpoint(name: str, content: bytes):
    def make(here: Path) -> list[str]:
        path = here / name
        path.write_bytes(content(here) if callable(content) else content)
        return [*TEST, "--ckpt_path", str(path)]

    return make


def config(content: str | bytes):
    def make(here: Path) -> list[str]:
        text = content.replace("CANARY", str(here / "PWNED")) if isinstance(content, str) else content
        (here / "bad.yaml").write_bytes(text.encode() if isinstance(text, str) else text)
        return [*FIT, "--config", str(here / "bad.yaml")]

    return make


def data(write):
    """``write`` puts something beside or into a folder of images; the data set is what it returns, or that folder."""

    def make(here: Path) -> list[str]:
        root = folder(here / "images")
        return [*FIT, "--data.dataset", str(write(root) or root)]

    return make


def split(rows: object, name: str = "split.json"):
    def write(root: Path) -> Path:
        (root / name).write_text(rows if isinstance(rows, str) else json.dumps(rows))
        return root / name

    return data(write)


def torch_file(value) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def bomb(here: Path) -> bytes:
    """A checkpoint whose parts swell a thousandfold."""
    buffer = io.BytesIO()
    with (
        zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive,
        archive.open("archive/data.pkl", "w") as file,
    ):
        for _ in range(300):
            file.write(bytes(1 << 22))
    return buffer.getvalue()


def blanks(root: Path) -> Path:
    path = root / "split.json.gz"
    path.write_bytes(400 * gzip.compress(b" " * (1 << 22)))  # a file may have many members
    return path


def fifo(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    os.mkfifo(path)
    return path


def png_bomb(root: Path) -> None:
    """Small files that say they have 60,000 x 60,000 pixels."""
    for path in root.glob("*/cat/*.png"):
        content = bytearray(path.read_bytes())
        content[16:24] = struct.pack(">II", 60_000, 60_000)
        path.write_bytes(content)


def loop(root: Path) -> None:
    (root / "train" / "cat" / "again").symlink_to(root / "train")


def zero_shot_run(here: Path) -> Path:
    """The directory of a run that trains nothing."""
    options = {"run.root": here / "runs", "run.test": False}
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        run = kshot.fit(["clip_16shot.yaml", "methods/zero_shot.yaml"], shots=1, progress=False, options=options)
    return run.directory


def class_of(place: str, path: str, arguments: str = "{}"):
    """A config with a class, and its arguments, at a place such as ``model.schedule``; ``[]`` after it makes a list."""
    group, _, name = place.partition(".")
    given = f"{{class_path: {path}, init_args: {arguments}}}"
    given = f"[{given}]" if name.endswith("[]") else given
    return config(f"{group}: {{{name.removesuffix('[]')}: {given}}}\n")


def training(*rows: object):
    """A split file with these rows to train on."""
    return split({"train": rows, "val": [], "test": ROW})


COMMAND = "{command: \"touch 'CANARY'\"}"
ALIASES = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join(['*' + before] * 9)}]\n" for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)
ROW = [["train/cat/0.png", 0, "cat"], ["train/dog/0.png", 1, "dog"]]
WHOLE = {"train": ROW, "val": [], "test": ROW}

MAKERS = {
    "checkpoint: pickle that runs a command": checkpoint("a.ckpt", lambda h: pickle.dumps(Payload(h / "PWNED"))),
    "checkpoint: torch file that runs a command": checkpoint("a.ckpt", lambda h: torch_file(Payload(h / "PWNED"))),
    "checkpoint: command in its header": checkpoint(
        "a.ckpt", lambda h: torch_file({"state_dict": {}, "kshot": Payload(h / "PWNED")})
    ),
    "checkpoint: swells when read": checkpoint("a.ckpt", bomb),
    "checkpoint: huge tensor of one number": checkpoint(
        "a.ckpt", lambda h: torch_file({"state_dict": {"a": torch.zeros(1).expand(1 << 20, 1 << 20)}})
    ),
    "checkpoint: a list for a state": checkpoint("a.ckpt", lambda h: torch_file({"state_dict": [1, 2]})),
    "checkpoint: a number": checkpoint("a.ckpt", lambda h: torch_file(3)),
    "checkpoint: text": checkpoint("a.ckpt", b"hello"),
    "checkpoint: empty": checkpoint("a.ckpt", b""),
    "safetensors: a header of 2^60 bytes": checkpoint("a.safetensors", struct.pack("<Q", 1 << 60) + b"{}"),
    "safetensors: nested header": checkpoint(
        "a.safetensors", struct.pack("<Q", 200_000) + b"[" * 100_000 + b"]" * 100_000
    ),
    "safetensors: empty": checkpoint("a.safetensors", b""),
    "checkpoint: a named pipe": lambda h: [*TEST, "--ckpt_path", str(fifo(h / "a.ckpt"))],
    "checkpoint: a device": lambda h: [*TEST, "--ckpt_path", "/dev/zero"],
    "checkpoint: a folder": lambda h: [*TEST, "--ckpt_path", str(h)],
    "weights: pickle that runs a command": lambda h: [
        *TEST, "--config", "methods/linear_probe.yaml",
        "--model.backbone", "Timm", "--model.backbone.model", "test_vit",
        "--model.backbone.weights", str(checkpoint("w.pt", lambda h: torch_file(Payload(h / "PWNED")))(h)[-1]),
    ],
    "import: pickle that runs a command": lambda h: [
        "import", "--config", "recipes/coop.yaml", "--model.backbone", "OpenClip",
        "--model.backbone.model", "kshot:glyph_clip", "--data.dataset", "digits",
        "--file", checkpoint("model.pth.tar-5", lambda h: torch_file({"state_dict": Payload(h / "PWNED")}))(h)[-1],
    ],
    "config: aliases that multiply": config(ALIASES),
    "config: a Python object": config("model: !!python/object/apply:os.system [\"touch 'CANARY'\"]\n"),
    "config: nested": config("a: " + "[" * 20_000 + "]" * 20_000),
    "config: two megabytes": config("# " + "x" * 2_000_000 + "\nmodel: {}\n"),
    "config: UTF-16": config("data: {shots: 1}\n".encode("utf-16")),
    "config: NUL bytes": config(b"data: {shots: 1\0}\n"),
    "config: a command as schedule": class_of("model.schedule", "os.system", COMMAND),
    "config: a command as adapter": class_of("model.adapter", "os.system", COMMAND),
    "config: a process as optimizer": class_of("model.optimizer", "subprocess.Popen", "{args: [touch, CANARY]}"),
    "config: eval as a callback": class_of("trainer.callbacks[]", "builtins.eval", "{source: \"open('CANARY','w')\"}"),
    "config: a function of a library as logger": class_of("trainer.logger", "torch.hub.load", "{repo_or_dir: x/y}"),
    "config: a module of Python as augmentation": class_of("data.augment", "pty.spawn", "{argv: [touch, CANARY]}"),
    "split: a label of a thousand million": training(["train/cat/0.png", 1_000_000_000, "cat"]),
    "split: a path that leaves its folder": training(["../../../../etc/passwd", 0, "cat"], ROW[1]),
    "split: an absolute path": training(["/etc/passwd", 0, "cat"], ROW[1]),
    "split: nested": split("[" * 100_000 + "]" * 100_000),
    "split: a label that is no number": training(["train/cat/0.png", float("nan"), "cat"]),
    "split: a number of a million digits": split(f'{{"train": [["a.png", {"9" * 1_000_000}, "cat"]]}}'),
    "split: gzip of 1.6 GB of blanks": data(blanks),
    "CSV: a field of 20 MB": split("path,label\n" + "x" * 20_000_000 + ",cat\n", "split.csv"),
    "CSV: NUL bytes": split("path,label\ntrain/cat/0.png\0,cat\n", "split.csv"),
    "CSV: a named pipe": data(lambda root: fifo(root / "split.csv")),
    "images: PostScript under another name": data(
        lambda root: (root / "train" / "cat" / "0.png").write_text(
            f"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n({root.parent / 'PWNED'}) (w) file closefile\nshowpage\n"
        ) and None
    ),
    "images: 3.6 thousand million pixels": data(png_bomb),
    "images: a named pipe": data(lambda root: fifo(root / "train" / "cat" / "0.jpg") and None),
    "images: a device": data(lambda root: (root / "train" / "cat" / "zero.png").symlink_to("/dev/zero")),
    "images: a folder that holds itself": data(loop),
    "predict: a named pipe": lambda h: [
        "predict", "--run", str(zero_shot_run(h)), "--images", str(fifo(h / "a.png")),
    ],
    "run.name that leaves the folder of runs": lambda h: [*FIT, "--run.name", "../../PWNED"],
}  # fmt: skip
HARMLESS = {  # what a run may go on from: nothing of it is taken, or it is passed over with a word
    "images: a named pipe",
    "images: a device",
    "images: a folder that holds itself",
}
