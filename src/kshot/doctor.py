"""``python main.py doctor``: what is installed, what this machine has, and whether a small run works on it."""

from __future__ import annotations

import json
import os
import platform
import shutil
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import torch
from huggingface_hub import constants

from kshot.adapters import LoRA
from kshot.backbones import OpenClip
from kshot.data.datamodule import FewShotDataModule
from kshot.errors import UserError, first_line
from kshot.files import amount, cache_folder, memory_of_machine
from kshot.record import versions
from kshot.run import build, evaluate, fit, make_trainer
from kshot.surroundings import settle_chatter, told_to_stderr

HUBS = (constants.ENDPOINT, "https://openaipublic.azureedge.net", "https://github.com")  # where weights come from
PATIENCE = 4.0  # seconds for all hubs together, looking up their names included


@told_to_stderr()
def run_doctor(arguments: Sequence[str] = ()) -> int:
    """Prints what it finds, with ``--json`` as JSON; returns 0, or 1 when the small run failed.

    Raises:
        UserError: another argument.
    """
    if [word for word in arguments if word != "--json"]:
        raise UserError(f"doctor takes --json and nothing else, not {' '.join(arguments)}.")
    settle_chatter()
    found = {
        "versions": versions(),
        "machine": machine(),
        "caches": caches(),
        "disk": {str(place): free(place) for place in (Path.cwd(), cache_folder())},
        "hubs": hubs(),
        "self-test": self_test(),
    }
    if "--json" in arguments:
        print(json.dumps(found, indent=2))
    else:
        for title, entries in found.items():
            print(title, *(f"  {name:<34} {value}" for name, value in entries.items()), sep="\n")
    return 0 if found["self-test"]["result"] == "ok" else 1


def machine() -> dict[str, str]:
    """The system, its processors and memory, and each accelerator with its own."""
    memory = memory_of_machine()
    found = {
        "system": platform.platform(),
        "cores": f"{os.cpu_count()}, of which torch uses {torch.get_num_threads()}",
        "memory": "unknown" if memory is None else amount(memory),
    }
    for i in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(i)
        found[f"cuda:{i}"] = f"{device.name}, {amount(device.total_memory)}"
    if torch.backends.mps.is_available():
        found["mps"] = "available"
    return found if len(found) > 3 else found | {"accelerators": "none: runs take the CPU"}


def caches() -> dict[str, str]:
    """Folders of what was downloaded or computed once, and their sizes; each may be deleted."""
    folders = (
        cache_folder(),
        Path(constants.HF_HUB_CACHE),
        Path(torch.hub.get_dir()),
        Path("~/.cache/clip").expanduser(),
    )
    return {str(folder): amount(size_of(folder)) if folder.is_dir() else "not there" for folder in folders}


def size_of(folder: Path) -> int:
    """Bytes of the files below a folder, each counted where it lies."""
    found = 0
    for place, _, names in os.walk(folder):
        for name in names:
            path = Path(place, name)
            with suppress(OSError):  # another process takes it away
                found += 0 if path.is_symlink() else path.stat().st_size
    return found


def free(place: Path) -> str:
    """What is free on the disk of a folder, which need not exist yet."""
    there = next(folder for folder in (place, *place.parents) if folder.exists())
    return f"{amount(shutil.disk_usage(there).free)} free"


def hubs() -> dict[str, str]:
    """Whether the places that weights come from answer, within :data:`PATIENCE` together."""
    if constants.HF_HUB_OFFLINE:
        return dict.fromkeys(HUBS, "not asked: HF_HUB_OFFLINE is set")
    found = dict.fromkeys(HUBS, f"no answer within {PATIENCE:g} s")
    threads = [threading.Thread(target=ask, args=(hub, found), daemon=True) for hub in HUBS]  # a name may take minutes
    for thread in threads:
        thread.start()
    end = time.monotonic() + PATIENCE
    for thread in threads:
        thread.join(max(0.0, end - time.monotonic()))
    return dict(found)


def ask(hub: str, found: dict[str, str]) -> None:
    """Writes down whether a hub answers, be it with an error of its own."""
    try:
        urllib.request.urlopen(urllib.request.Request(hub, method="HEAD"), timeout=PATIENCE).close()
    except urllib.error.HTTPError:
        pass
    except (OSError, ValueError) as error:
        found[hub] = f"does not answer: {first_line(error)}"
        return
    found[hub] = "answers"


def self_test() -> dict[str, str]:
    """Fits, saves nothing, and tests the carried model on noise of two classes: ``result`` is ok or what failed."""
    start = time.monotonic()
    try:
        with tempfile.TemporaryDirectory() as folder:
            result = small_run(Path(folder))
    except Exception as error:  # whatever it is, it is what was asked for
        result = f"failed: {type(error).__name__}: {first_line(error)}"
    return {"result": result, "seconds": f"{time.monotonic() - start:.1f}"}


def small_run(folder: Path) -> str:
    """Adapts the carried model to eight images; ``ok``, or what is wrong with the outcome."""
    from PIL import Image

    noise = torch.Generator().manual_seed(0)
    for i in range(16):
        pixels = torch.randint(0, 256, (32, 32, 3), dtype=torch.uint8, generator=noise)
        file = folder / ("left", "right")[i % 2] / f"{i}.png"
        file.parent.mkdir(exist_ok=True)
        Image.fromarray(pixels.numpy()).save(file)
    data = FewShotDataModule(str(folder), shots=2, allow_fewer=True, batch_size=4)
    module = build(OpenClip("kshot:glyph_clip"), data, adapter=LoRA(rank=2), targets=["image.5.*"])
    before = {name: value.clone() for name, value in module.tuned_state().items()}
    fit(module, data, make_trainer(max_epochs=2))
    tested = evaluate(module, data, make_trainer())
    moved = any(not torch.equal(value.cpu(), before[name]) for name, value in module.tuned_state().items())
    return "ok" if moved and all(tested.counts.values()) else "failed: nothing was trained, or nothing tested"
