"""``python main.py sweep``: plans a study, starts workers, and shows how far they are."""

from __future__ import annotations

import argparse
import shlex
import time
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

from rich.console import Console
from rich.live import Live

from kshot.errors import UserError
from kshot.lean import without_collection
from kshot.showing import Parser
from kshot.studies import engines
from kshot.studies.claims import published
from kshot.studies.plan import Planned, Planner
from kshot.studies.progress import Progress
from kshot.studies.search import searching
from kshot.studies.store import HEADER, has, read_header, write_study
from kshot.studies.study import labels_of, read_study
from kshot.studies.worker import read_only
from kshot.surroundings import settle_chatter, told_to_stderr

EVERY = 1.0  # seconds between two looks
PLAIN_EVERY = 30.0  # seconds between two lines where there is no terminal


@told_to_stderr()
def run_sweep(words: Sequence[str]) -> int:
    """Runs what is open of a study; gives 0, or 1 where runs have failed.

    Raises:
        UserError: the study, an engine or the disk is refused.
    """
    settle_chatter()
    given = parse(words)
    begun = time.monotonic()
    study = searching(read_study(given.config), given.search)
    only = read_only(given.only)
    if only:
        labels_of({axis: sorted(labels) for axis, labels in only.items()}, study.axes, "--only")
    directory = given.out or Path("studies") / study.name
    if (directory / HEADER).is_file():
        read_header(directory)
    planner = Planner(study)
    with without_collection():  # many small things are made, and none of them is garbage
        runs = planner.runs()
    if study.ranges and not study.search:
        planner.notes.append(f"The ranges in {study.file} are left alone: --search chooses settings in them.")
    wanted = [run for run in runs if has(run.axes, only)]
    if given.retry and not given.dry_run:
        forget_failures(directory, wanted)
    progress = Progress(directory, wanted)
    for line in (*planner.notes, *progress.plan(time.monotonic() - begun)):
        print(line)
    if given.dry_run:
        return 0
    write_study(directory, study, runs)
    if progress.open:
        settings = engines.EngineSettings(
            runs=len(progress.open),
            workers=given.workers,
            threads=given.threads,
            only=tuple(given.only),
            cpu=str(study.options.get("trainer.accelerator")) == "cpu",
            memory=progress.sizes()[0],
            options=dict(pair.partition("=")[::2] for pair in given.engine_option),
        )
        try:
            watch(directory, given.engine, settings, progress)
        except BaseException as error:
            again = [word for word in words if word != "--retry"]
            error.add_note(f"Go on with: {shlex.join(['python', 'main.py', 'sweep', *again])}")
            raise
    return progress.tell_end()


def watch(directory: Path, engine: str, settings: engines.EngineSettings, progress: Progress) -> None:
    """Starts an engine, shows how far its workers are, and ends it in any case."""
    running = engines.start(engine, directory, settings)
    console = Console()
    try:
        with (
            Live(console=console, auto_refresh=False, transient=True) if console.is_terminal else nullcontext() as live
        ):
            said = time.monotonic()
            while True:
                progress.workers = running.poll()
                progress.look()
                if live is not None:
                    live.update(progress.table(running.told), refresh=True)
                elif time.monotonic() - said >= PLAIN_EVERY:
                    print(progress.line(), flush=True)
                    said = time.monotonic()
                if not progress.open or not progress.workers:
                    break
                time.sleep(EVERY)
    finally:
        running.stop()
    progress.look()


def forget_failures(directory: Path, runs: Sequence[Planned]) -> None:
    """Makes failed runs open ones again."""
    for run in published(directory / "failed") & {run.id for run in runs}:
        for grave in (directory / "deaths").glob(f"{run}.*"):
            grave.unlink(missing_ok=True)
        (directory / "failed" / f"{run}.json").unlink(missing_ok=True)


def parse(words: Sequence[str]) -> argparse.Namespace:
    """Reads the words after ``python main.py sweep``."""
    parser = Parser(
        prog="main.py sweep", description="Runs a study: a grid of methods, data sets, shots, seeds and more."
    )
    parser.add_argument("--config", "-c", required=True, metavar="STUDY", help="a study file, or one in configs/")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="its directory (default: studies/NAME)")
    parser.add_argument(
        "--engine", choices=sorted(engines.ENGINES), default="local", help="what starts workers (default: local)"
    )
    parser.add_argument(
        "--engine-option", nargs="+", default=[], metavar="NAME=VALUE", help="of the engine, as address=auto"
    )
    parser.add_argument("--workers", type=int, help="how many (default: one a GPU, or one a core)")
    parser.add_argument("--threads", type=int, default=1, help="of the processor for each worker (default: 1)")
    parser.add_argument(
        "--only", nargs="+", default=[], metavar="AXIS=LABEL", help="runs with these labels: method=gda,ridge"
    )
    parser.add_argument(
        "--search",
        nargs="?",
        type=int,
        const=0,
        metavar="TRIALS",
        help="choose settings in the file's ranges, run by run",
    )
    parser.add_argument("--retry", action="store_true", help="run again what has failed")
    parser.add_argument(
        "--dry-run", action="store_true", help="print the plan, its time, memory and disk, and run nothing"
    )
    given = parser.parse_args(list(words))
    if given.search is not None and given.search < 0:
        raise UserError(f"sweep: --search is {given.search}, and must be a number of trials from 1 on.")
    for name in ("workers", "threads"):
        if getattr(given, name) is not None and getattr(given, name) < 1:
            raise UserError(f"sweep: --{name} is {getattr(given, name)}, and must be 1 or more.")
    for pair in given.engine_option:
        if "=" not in pair:
            raise UserError(f"sweep: --engine-option takes NAME=VALUE, and is given {pair!r}.")
    return given
