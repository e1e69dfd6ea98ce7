"""Studies that tests plan and run: short ones on the digits, and some whose runs only write a line."""

import csv
import json
import multiprocessing
import os
import signal
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from kshot.studies.plan import Planned, Planner
from kshot.studies.store import write_study
from kshot.studies.study import read_study
from kshot.studies.worker import read_only, work

QUICK = (  # options of runs that take tenths of a second
    "options: {trainer.accelerator: cpu, data.eval_batch_size: 16, trainer.limit_test_batches: 1, data.views: 2, "
    "run.calibrate: false}\n"
)
HEAD = "base: [clip_16shot.yaml]\n" + QUICK


def plan(folder: Path, text: str, name: str = "tiny") -> list[Planned]:
    """The plan of a study file with this text."""
    file = folder / f"{name}.yaml"
    file.write_text(text)
    return Planner(read_study(str(file))).runs()


def planned(folder: Path, text: str, name: str = "tiny") -> Path:
    """The directory of a study that is planned, and has not begun."""
    runs = plan(folder, text, name)
    directory = folder / "studies" / name
    write_study(directory, read_study(str(folder / f"{name}.yaml")), runs)
    return directory


def records(directory: Path, folder: str = "done") -> dict[str, dict]:
    """What was published, by run."""
    return {file.stem: json.loads(file.read_text()) for file in (directory / folder).glob("*.json")}


def outcome(directory: Path) -> dict[str, tuple[dict, dict, list]]:
    """Of each finished run what must not depend on who ran it, and when: accuracies, tuned tensors, classes."""
    found = {}
    for run, record in records(directory).items():
        folder = directory / record["run"]
        result = json.loads((folder / "result.json").read_text())
        kept = {name: result[name] for name in ("acc", "f1_macro", "ece", "steps", "split", "seed", "method")}
        tensors = {name: tensor.numpy().tobytes() for name, tensor in load_file(folder / "tuned.safetensors").items()}
        with (folder / "per_class.csv").open(newline="") as file:
            found[run] = (kept, tensors, list(csv.reader(file)))
    return found


class Lines:
    """Does runs by writing a line each; ``fails`` are raised for the words of a run that hold a key."""

    def __init__(self, directory: Path, fails: dict[str, BaseException] | None = None) -> None:
        self.directory, self.fails, self.seen = directory, fails or {}, []

    def __call__(self, words: Sequence[str]) -> Path:
        options = dict(word[2:].partition("=")[::2] for word in words if word.startswith("--"))
        self.seen.append(options)
        for key, error in self.fails.items():
            if any(key in word for word in words):
                raise error
        folder = Path(options["run.root"], options["run.name"], "001")
        folder.mkdir(parents=True, exist_ok=True)
        return folder


def forked(work: Callable[[], Any]) -> int:
    """Does the work in a child of this process, which has loaded what it needs; gives its number."""
    child = os.fork()
    if not child:
        code = 1
        try:
            work()
            code = 0
        except SystemExit as end:
            code = int(end.code or 0)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    return child


CLEAN = multiprocessing.get_context("forkserver")
CLEAN.set_forkserver_preload(["kshot.studies.worker"])


def apart(work: Callable[..., Any], *given: Any) -> Any:
    """Does the work in a child of a process that has loaded what it needs, and run nothing.

    Where gradients were once taken beside other devices, autograd refuses to work in forked children.
    """
    process = CLEAN.Process(target=moved, args=(dict(os.environ), Path.cwd(), work, given))
    process.start()
    return process


def moved(environment: dict[str, str], directory: Path, work: Callable[..., Any], given: Sequence[Any]) -> None:
    """Does the work where, and with what, the process is that asks for it."""
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(directory)
    work(*given)


def ended(child: Any) -> int:
    """Waits for a child; its exit status, below 0 for a signal."""
    if isinstance(child, int):
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    child.join()
    return child.exitcode


class Forked:
    """An engine for tests, whose workers are children of this process, which is quick."""

    told = "children"
    work = staticmethod(work)

    def __init__(self, study: Path, settings: Any) -> None:
        self.only = read_only(settings.only)
        self.children = [
            forked(lambda: self.work(study, only=self.only, beat=0.1, patience=2.0))
            for _ in range(settings.workers or 1)
        ]

    def poll(self) -> int:
        self.children = [child for child in self.children if os.waitpid(child, os.WNOHANG)[0] == 0]
        return len(self.children)

    def stop(self) -> None:
        for child in self.children:
            os.kill(child, signal.SIGKILL)
            ended(child)
        self.children = []


start = Forked
