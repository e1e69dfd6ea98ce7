"""``python main.py predict``: labels for any images, by a run, as CSV, JSON lines, Parquet or sorted into folders."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from tqdm import tqdm  # type: ignore[import-untyped]

from kshot.adding import add_class
from kshot.answering import Answers, Named, Prediction, files_of, named
from kshot.calibration import SCORES
from kshot.data.prediction import told_changes
from kshot.errors import UserError, nearest_first, require
from kshot.files import may_be_read, new_file
from kshot.opening import open_run
from kshot.showing import Parser
from kshot.surroundings import settle_chatter, told_to_stderr
from kshot.writing import WRITERS, Copies, Table, columns, row_of

SHOWN = 20  # unreadable files that are named; others are counted


@told_to_stderr()
def run_predict(arguments: Sequence[str]) -> int:
    """Labels images by a run; options with a dot in them are laid over the run's config.

    Raises:
        UserError: no such run, images or option, no threshold for a rate of errors, or a file that is in the way.
    """
    settle_chatter()
    given, options = read_words(arguments)
    for name, value in (("top_k", given.top_k), ("batch_size", given.batch_size)):
        require("predict", name, value, value is None or value >= 1, "be 1 or more")
    kind = format_of(given)
    with may_be_read():
        images, total = named_words(given.images)
    try:
        with ExitStack() as stack:
            file = stack.enter_context(target(given.out))
            copies = None if given.copy_to is None else Copies(given.copy_to)
            opened = open_run(given.run, *options)
            answers = Answers(opened)
            added = [add_class(answers, name, list(named(folder))) for name, folder in given.add_class]
            for note in (*answers.notes, *changes(opened), *added):
                print(note, file=sys.stderr)
            abstain = answers.abstaining(given.abstain_by, given.abstain_error)
            found = answers.predictions(
                images, top_k=given.top_k, abstain=abstain, workers=given.workers, batch_size=given.batch_size
            )
            if str(opened.settings["trainer"].get("enable_progress_bar")).lower() != "false":
                found = tqdm(found, total=total, unit=" images", disable=None, leave=False, smoothing=0.05)
            k = min(given.top_k, len(answers.class_names))
            table = stack.enter_context(WRITERS[kind](file, columns(k, abstain is not None)))
            tell(given, *gone_through(found, table, copies, abstain is not None))
    except BrokenPipeError:  # whoever read has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    return 0


def read_words(arguments: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """The options of predict, however they are spelt, and those that are laid over the run's config."""
    parser = Parser(
        prog="main.py predict",
        description="Label any images by a run. An option with a dot in it is laid over the run's config: "
        "--trainer.accelerator cpu, --data.white 4095, --model.backbone.weights FILE.",
    )
    for name, settings in WORDS.items():
        parser.add_argument(name, **settings)
    spelt = [spelling(word) for word in arguments]
    given, rest = parser.parse_known_args(spelt)
    unknown = next((word for word in rest if word.startswith("-") and "." not in word.partition("=")[0]), None)
    if unknown is not None:
        name = unknown.partition("=")[0]
        raise UserError(f"predict: there is no option {name!r}. {nearest_first(name, WORDS)}")
    return given, rest


def spelling(word: str) -> str:
    """An option of predict as ``--top-k``, if it is ``--top_k``; other words as they are."""
    name, equals, value = word.partition("=")
    return name.replace("_", "-") + equals + value if name.startswith("--") and "." not in name else word


def format_of(given: argparse.Namespace) -> str:
    """The format that is asked for, by its name or the file's; raises UserError for one that there is not."""
    if given.format or given.out is None:
        return str(given.format or "csv")
    suffix = given.out.suffix.lower().removeprefix(".")
    if suffix not in WRITERS:
        raise UserError(f"--out {given.out}: its name ends in none of {', '.join(f'.{each}' for each in WRITERS)}.")
    return str(suffix)


def named_words(words: Sequence[str]) -> tuple[Iterator[Named], int | None]:
    """The images that words name, and their number, unknown where they come from standard input.

    Raises:
        UserError: a file or folder that is not there, or has no image.
    """
    files: list[list[Path] | None] = [None if word == "-" else files_of(word) for word in words]
    for word, found in zip(words, files, strict=True):
        if found == [Path(word)] and not os.path.lexists(word):
            raise UserError(f"no such image or folder: {word!r}")
    total = None if None in files else sum(len(found or ()) for found in files)

    def stream() -> Iterator[Named]:
        for found in files:
            yield from ((str(path), path) for path in (paths_from(sys.stdin.buffer) if found is None else found))

    return stream(), total


def paths_from(file: BinaryIO) -> Iterator[Path]:
    """Paths, a line each, or ended by NUL as ``find -print0`` writes them, in whatever encoding."""
    rest, end = b"", b""
    while block := file.read1(2**16) if hasattr(file, "read1") else file.read(2**16):
        end = end or (b"\0" if b"\0" in block else b"\n" if b"\n" in block else b"")
        *whole, rest = (rest + block).split(end) if end else [rest + block]
        yield from (Path(os.fsdecode(path.removesuffix(b"\r"))) for path in whole if path.strip())
    if rest.strip():
        yield Path(os.fsdecode(rest))


def changes(opened: Any) -> list[str]:
    """What has become of the classes of the run's own data set, where that is there."""
    if "class_names" not in opened.header:
        return []
    data, manifest = opened.settings["data"]["init_args"], opened.directory / "split.json"
    return told_changes(data, opened.images.class_names, manifest)


@contextmanager
def target(out: Path | None) -> Iterator[BinaryIO]:
    """Where the answer is written: a new file, or standard output."""
    if out is not None:
        with new_file(out) as file:
            yield file
        return
    yield sys.stdout.buffer
    sys.stdout.buffer.flush()


def gone_through(
    found: Iterable[Prediction], table: Table, copies: Copies | None, abstains: bool
) -> tuple[int, int, list[str], int, float]:
    """Writes each prediction down: how many images were labelled, how many are unsure, which cannot be read."""
    labelled, unsure, wrong, unread, clock = 0, 0, list[str](), 0, time.monotonic()
    for each in found:
        if each.error:
            unread += 1
            wrong += [each.error] * (len(wrong) < SHOWN)
            continue
        labelled, unsure = labelled + 1, unsure + each.abstain
        table.add(row_of(each, abstains))
        if copies is not None:
            copies.add(each)
    if unread and not labelled:
        raise UserError(f"none of the {unread} images can be read: {wrong[0]}")
    return labelled, unsure, wrong, unread, time.monotonic() - clock


def tell(given: argparse.Namespace, labelled: int, unsure: int, wrong: list[str], unread: int, seconds: float) -> None:
    """Says what was done, on standard error where the answer itself is on standard output."""
    if unread:
        print(f"{unread:,} images cannot be read, and are left out:", *wrong, sep="\n  ", file=sys.stderr)
        if unread > len(wrong):
            print(f"  ... and {unread - len(wrong):,} more", file=sys.stderr)
    said = f"{labelled:,} images labelled in {seconds:.1f} s ({labelled / max(seconds, 1e-9):,.0f} a second)"
    said += f", of which {unsure:,} are marked as too unsure" if given.abstain_error is not None else ""
    places = [str(place) for place in (given.out, given.copy_to) if place is not None]
    print(f"{said}: {', '.join(places)}" if places else said, file=sys.stdout if given.out else sys.stderr)


WORDS: dict[str, dict[str, Any]] = {
    "--run": {
        "required": True,
        "metavar": "RUN",
        "help": "the directory of a run, or a folder of runs: its last finished one",
    },
    "--images": {
        "required": True,
        "nargs": "+",
        "metavar": "IMAGES",
        "help": "files, folders, patterns such as 'photos/*.png', and - for paths from standard input, a line each",
    },
    "--out": {"type": Path, "metavar": "FILE", "help": "a new file: .csv, .jsonl, .parquet (default: print CSV)"},
    "--format": {"choices": list(WRITERS), "help": "of the answer (default: by the name of the file, or csv)"},
    "--top-k": {"type": int, "default": 5, "metavar": "K", "help": "labels an image, best first (default: 5)"},
    "--abstain-error": {"type": float, "metavar": "RATE", "help": "mark what is too unsure for a rate of errors: 0.05"},
    "--abstain-by": {
        "choices": SCORES,
        "default": SCORES[0],
        "help": "what tells how sure an answer is (default: probability); mahalanobis: how like the shots an image is",
    },
    "--add-class": {
        "nargs": 2,
        "action": "append",
        "default": [],
        "metavar": ("NAME", "FOLDER"),
        "help": "tell one class more apart, without training: heads that compare with text, class means, GDA, ridge",
    },
    "--copy-to": {"type": Path, "metavar": "DIR", "help": "copy each image into its class's folder in a new folder"},
    "--workers": {"type": int, "metavar": "N", "help": "threads that read images (default: one a core, at most 8)"},
    "--batch-size": {"type": int, "metavar": "N", "help": "images at once (default: the run's data.eval_batch_size)"},
}
