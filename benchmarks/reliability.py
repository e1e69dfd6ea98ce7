"""What becomes of runs that are killed, of files that are damaged and of inputs that mean harm.

    python benchmarks/reliability.py --page docs/reliability.md

A run here is a short fit of a method on the digits, in a forked process of its own; one that nothing disturbs is what
others are compared with. Parts: ``ends`` (a signal at a random moment, then the resumed run, or a new one where there
was nothing to resume), ``disk`` (the n-th writing of a file fails, for every n), ``bits`` (one flipped bit in a file
that is read again), ``hostile`` (tests/hostile.py), ``together`` (many starts in one folder, many resumes of one run),
and ``repeats`` (workers, processes). ``--share 0.1`` tries a tenth.
"""

import argparse
import contextlib
import csv
import io
import json
import os
import random
import re
import resource
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file
from side_by_side import RESULTS, machine, write_csv

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from hostile import HARMLESS, MAKERS

import kshot.commands  # noqa: F401  all that a run imports is there before a process is forked
from kshot.adapters.svd import _memory, svd_of
from kshot.checkpoint import AtomicCheckpoints
from kshot.cli import main as kshot_main
from kshot.data.catalogue import load_split
from kshot.data.manifest import read_manifest
from kshot.errors import UserError

METHODS = ("lora", "adalora", "autolora", "promptsrc", "coop", "dept")
SIGNALS = {signal.SIGKILL: 50, signal.SIGTERM: 20, signal.SIGINT: 20}
NOTES = ("Features of images that were encoded before", "An extra fit on")
CODES = {signal.SIGTERM: 143, signal.SIGINT: 130}
FIT = ["fit", "--config", "clip_16shot.yaml", "--data.shots", "4", "--trainer.max_epochs", "5", "--run.save_every", "0"]
FIT += ["--trainer.enable_progress_bar", "false", "--trainer.limit_test_batches", "1"]
PARTS = ("ends", "disk", "bits", "hostile", "together", "repeats")


class Ended:
    """How a process ended: exit code, or minus the signal, what it wrote on standard error, time and memory."""

    def __init__(self, child: int, log: Path, started: float) -> None:
        _, status, used = os.wait4(child, 0)
        self.code = os.waitstatus_to_exitcode(status)
        self.lines = log.read_text(errors="replace").strip().splitlines()
        self.seconds, self.kilobytes = time.monotonic() - started, used.ru_maxrss
        self.cpu = used.ru_utime + used.ru_stime

    @property
    def said(self) -> list[str]:
        """What it wrote, but for notes of what a run reads and does, which tell nothing of its end."""
        return [line for line in self.lines if not line.startswith(NOTES)]

    @property
    def one_line(self) -> bool:
        return len(self.said) == 1 and self.said[0].startswith("error: ")


def start(words: list[str], folder: Path, before: Callable[[], object] | None = None) -> tuple[int, Path, float]:
    """Starts a command line in a process and a folder of its own."""
    folder.mkdir(parents=True, exist_ok=True)
    log, started = folder / f"err.{time.monotonic_ns()}", time.monotonic()
    child = os.fork()
    if child:
        return child, log, started
    code = 1
    try:
        os.chdir(folder)
        with log.open("w") as err, contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(err):
            os.dup2(err.fileno(), 2)
            try:
                if before is not None:
                    before()
                kshot_main(words)
                code = 0
            except SystemExit as end:
                code = end.code if isinstance(end.code, int) else 1
            except BaseException as error:
                print(f"{type(error).__name__}: {error}", file=err)
    finally:
        os._exit(code)


def ran(words: list[str], folder: Path, before: Callable[[], object] | None = None) -> Ended:
    return Ended(*start(words, folder, before))


def method(name: str) -> list[str]:
    return [*FIT, "--config", f"methods/{name}.yaml"]


def directory_in(folder: Path) -> Path | None:
    return next(iter(sorted(folder.glob("runs/*/*"))), None)


def result_of(directory: Path) -> tuple[object, ...]:
    """What must come out again to the bit: tensors, accuracy, and a row an epoch."""
    tensors = load_file(directory / "tuned.safetensors")
    state = tuple((name, bytes(tensors[name].contiguous().view(torch.uint8).numpy().data)) for name in sorted(tensors))
    with (directory / "metrics.csv").open() as file:
        rows = [sorted(row.items()) for row in csv.DictReader(file)]
    return state, json.loads((directory / "result.json").read_text())["acc"], rows


def finished(name: str, folder: Path) -> tuple[object, ...]:
    """A run that began in a folder, gone on with if it can be, or begun anew."""
    directory = directory_in(folder)
    if directory is not None and (directory / "result.json").is_file():
        return result_of(directory)
    resumes = directory is not None and (directory / "checkpoints" / "last.ckpt").is_file()
    words = ["fit", "--resume", str(directory)] if resumes else [*method(name), "--run.name", "again"]
    end = ran(words, folder)
    assert end.code == 0, end.lines
    found = directory if resumes else next(folder.glob("runs/again/*"))
    assert found is not None
    return result_of(found)


def undisturbed(names: tuple[str, ...], work: Path) -> dict[str, tuple[tuple[object, ...], float]]:
    """Results and seconds of runs that nothing disturbs."""
    found = {}
    for name in names:
        end = ran(method(name), work / "whole" / name)
        assert end.code == 0, end.lines
        directory = directory_in(work / "whole" / name)
        assert directory is not None
        found[name] = result_of(directory), end.seconds
    return found


def ends(work: Path, share: float, chance: random.Random) -> Iterator[dict[str, object]]:
    names = METHODS if share >= 1 else METHODS[:2]
    whole = undisturbed(names, work)
    for number, tries in SIGNALS.items():
        counts = dict.fromkeys(("tried", "as they should", "resumed or anew", "same result"), 0)
        for i in range(max(1, round(tries * share))):
            name, folder = names[i % len(names)], work / f"{number}" / str(i)
            child, log, started = start(method(name), folder)
            time.sleep(chance.uniform(0, whole[name][1]))
            os.kill(child, number)
            end = Ended(child, log, started)
            counts["tried"] += 1
            told = number == signal.SIGKILL or (end.code == CODES[number] and len(end.said) == 1)
            counts["as they should"] += end.code in (0, -number) or told
            counts["resumed or anew"] += not (directory_in(folder) or Path()).joinpath("result.json").is_file()
            counts["same result"] += finished(name, folder) == whole[name][0]
            if end.code not in (0, -number) and not told:
                print(number, end.code, end.lines[-3:])
        yield row(f"{number.name} at a random moment", counts["tried"], counts["as they should"], counts["same result"])


def disk(work: Path, share: float, chance: random.Random) -> Iterator[dict[str, object]]:
    del chance
    tried = told = same = 0
    whole = undisturbed(("lora",), work)["lora"][0]
    for nth in range(1, 100, 1 if share >= 1 else 4):
        folder = work / f"disk{nth}"
        end = ran(method("lora"), folder, lambda nth=nth: fill_disk_at(nth))
        if end.code == 0:
            break
        tried += 1
        told += end.code == 2 and end.one_line and not list(folder.rglob("*.partial"))
        same += finished("lora", folder) == whole
    yield row("a full disk at each writing of a file", tried, told, same)


def fill_disk_at(nth: int) -> None:
    """Lets the n-th file that is made safe on the disk, and all after it, fail as on a full one."""
    count, sync = iter(range(1, 10**6)), os.fsync

    def full(file: int) -> None:
        if next(count) >= nth:
            raise OSError(28, "No space left on device")
        sync(file)

    os.fsync = full


def bits(work: Path, share: float, chance: random.Random) -> Iterator[dict[str, object]]:
    end = ran(method("pissa"), work / "bits")
    assert end.code == 0, end.lines
    directory = directory_in(work / "bits")
    assert directory is not None
    split, _ = load_split("digits")
    readers: dict[Path, Callable[[], object]] = {
        directory / name: partial(AtomicCheckpoints().load_checkpoint, directory / name)
        for name in ("tuned.safetensors", "checkpoints/last.ckpt")
    }
    readers[directory / "split.json"] = partial(read_manifest, directory / "split.json", split)
    for path, read in readers.items():
        refused = sum(1 for _ in flips(path, round(125 * share), chance) if refuses(read, path))
        yield row(f"one flipped bit in {path.name}", max(1, round(125 * share)), refused, refused)
    weight = torch.randn(256, 257, generator=torch.Generator().manual_seed(0))
    found = svd_of(weight)
    (kept,) = (path for path in (work / "cache" / "svd").iterdir() if load_file(path)["vt"].shape == (256, 257))
    tries = remade = same = 0
    for damaged in flips(kept, round(125 * share), chance):
        _memory.clear()
        again = svd_of(weight)
        tries, remade = tries + 1, remade + (kept.read_bytes() != damaged)
        same += all(torch.equal(a, b) for a, b in zip(found, again, strict=True))
    yield row("one flipped bit in a cached decomposition, which is made anew", tries, remade, same)


def flips(path: Path, tries: int, chance: random.Random) -> Iterator[bytes]:
    """Flips one bit of a file, again and again another one; puts the file back at the end."""
    whole = path.read_bytes()
    for _ in range(max(1, tries)):
        place, damaged = chance.randrange(8 * len(whole)), bytearray(whole)
        damaged[place // 8] ^= 1 << place % 8
        path.write_bytes(damaged)
        yield bytes(damaged)
    path.write_bytes(whole)


def refuses(read: Callable[[], object], path: Path) -> bool:
    try:
        read()
    except UserError as error:
        return path.name in str(error) and "\n" not in str(error)
    return False


def hostile(work: Path, share: float, chance: random.Random) -> Iterator[dict[str, object]]:
    names = list(MAKERS) if share >= 1 else chance.sample(list(MAKERS), max(1, round(len(MAKERS) * share)))
    told = safe = 0
    base = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for i, name in enumerate(names):
        here = work / "hostile" / str(i) / "here"
        here.mkdir(parents=True)
        end = ran(MAKERS[name](here), here.parent / "work")
        ran_nothing = not list(here.parent.rglob("PWNED*"))
        good = name in HARMLESS or (end.code == 2 and end.one_line and end.cpu < 5)
        if not (good and ran_nothing and end.kilobytes - base < 500_000):
            print(name, end.code, round(end.cpu, 1), end.kilobytes - base, end.lines[-2:])
        told += good
        safe += ran_nothing and end.kilobytes - base < 500_000
    yield row("a hostile file", len(names), told, safe)


def together(work: Path, share: float, chance: random.Random) -> Iterator[dict[str, object]]:
    del chance
    whole = undisturbed(("coop",), work)["coop"][0]
    folder, tries = work / "starts", max(2, round(8 * share))
    children = [start(method("coop"), folder) for _ in range(tries)]
    codes = [Ended(*child).code for child in children]
    results = [result_of(each) for each in folder.glob("runs/*/*")]
    same = sum(found == whole for found in results) if len(results) == tries else 0
    yield row("starts at one moment in one folder", tries, codes.count(0), same)
    folder = work / "resumes"
    ran(method("coop"), folder, stop_after_two_epochs)
    directory = directory_in(folder)
    assert directory is not None
    children = [start(["fit", "--resume", str(directory)], folder) for _ in range(tries)]
    found = [Ended(*child) for child in children]
    told = sum(end.code == 0 or (end.code == 2 and end.one_line) for end in found)
    yield row("resumes of one run at one moment", tries, told, tries if result_of(directory) == whole else 0)


def stop_after_two_epochs() -> None:
    from kshot.module import FewShotModule

    begin = FewShotModule.on_train_epoch_start

    def stop(self: FewShotModule) -> None:
        if self.current_epoch == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        begin(self)

    FewShotModule.on_train_epoch_start = stop  # type: ignore[method-assign]


def repeats(work: Path, share: float, chance: random.Random) -> Iterator[dict[str, object]]:
    del chance
    names = METHODS if share >= 1 else METHODS[:1]
    whole = undisturbed(names, work)
    for what, options in (("again", []), ("with two loader processes", ["--data.num_workers", "2"])):
        same = 0
        for name in names:
            folder = work / f"{what} {name}"
            end = ran([*method(name), *options], folder)
            directory = directory_in(folder)
            same += end.code == 0 and directory is not None and result_of(directory) == whole[name][0]
        yield row(f"the same run {what}", len(names), len(names), same)


def row(case: str, tried: int, told: int, held: int) -> dict[str, object]:
    found = {"case": case, "tried": tried, "ended as it should": told, "same result, or safe": held}
    print(" | ".join(str(value) for value in found.values()), flush=True)
    return found


def write_page(page: Path, rows: list[dict[str, object]], command: str) -> None:
    """Puts the table between the marks of a page."""
    lines = [f"`{command}` on {machine()}:", "", "| " + " | ".join(rows[0]) + " |", "|" + "---|" * len(rows[0])]
    lines += ["| " + " | ".join(str(value) for value in each.values()) + " |" for each in rows]
    text = page.read_text(encoding="utf-8")
    table = "<!-- table -->\n" + "\n".join(lines) + "\n<!-- end of table -->"
    page.write_text(
        re.sub(r"<!-- table -->.*<!-- end of table -->", lambda _: table, text, flags=re.S), encoding="utf-8"
    )


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--share", type=float, default=1.0, help="of the numbers that are tried")
    parser.add_argument("--seed", type=int, default=1, help="of the moments and bits")
    parser.add_argument("--out", type=Path, default=RESULTS / "reliability.csv")
    parser.add_argument("--check", action="store_true", help="fail where a count is not that of the tries")
    parser.add_argument("--page", type=Path, help="a page between whose marks the table goes")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    chance, rows = random.Random(options.seed), []
    before = os.environ.get("KSHOT_CACHE")
    try:
        for part in options.parts:
            with tempfile.TemporaryDirectory() as work:
                os.environ["KSHOT_CACHE"] = str(Path(work, "cache"))
                rows += list(globals()[part](Path(work), options.share, chance))
    finally:
        os.environ.pop("KSHOT_CACHE") if before is None else os.environ.update(KSHOT_CACHE=before)
    write_csv(options.out, rows)
    if options.check and any(len(set(list(each.values())[1:])) > 1 for each in rows):
        raise SystemExit("A run did not end as it should, or with another result.")
    if options.page is not None:
        write_page(options.page, rows, f"python benchmarks/reliability.py --seed {options.seed}")


if __name__ == "__main__":
    main()
