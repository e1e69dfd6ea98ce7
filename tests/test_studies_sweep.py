"""The command: it plans, starts workers, shows how far they are, and goes on wherever it was ended."""

import json
import os
import signal
import sys
import tempfile
import time
from pathlib import Path

import pytest
import studies
from rich.console import Console
from studies import HEAD, Forked, Lines, ended, forked, outcome, planned, records
from test_studies_worker import wait_for

from kshot.cli import main
from kshot.errors import UserError
from kshot.studies import engine_local, engines, sweep
from kshot.studies.engines import EngineSettings
from kshot.studies.progress import Progress, spoken
from kshot.studies.store import read_plan
from kshot.studies.sweep import run_sweep
from kshot.studies.worker import work

FOUR = HEAD + "grid: {method: [class_mean, ridge], shots: [1, 2]}"


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    """A working directory with a study of four runs, whose workers are children of this process."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(engines.ENGINES, "local", "studies")
    monkeypatch.setattr(sweep, "EVERY", 0.05)
    (tmp_path / "four.yaml").write_text(FOUR)
    return tmp_path


def test_a_dry_run_tells_what_there_is_to_do_and_begins_nothing(here, capsys):
    assert run_sweep(["--config", "four.yaml", "--dry-run"]) == 0
    told = capsys.readouterr().out
    assert "4 runs in studies/four" in told
    assert "0 done, 0 failed, 4 open" in told
    assert "on digits: 4 runs" in told
    assert told.count("not known before the first run") == 3
    assert [path.name for path in here.iterdir()] == ["four.yaml"]


def test_a_sweep_runs_all_and_a_second_one_skips_all(here, capsys, monkeypatch):
    assert run_sweep(["--config", "four.yaml", "--workers", "2"]) == 0
    assert "4 of 4 done, 0 running, 0 failed: studies/four" in capsys.readouterr().out
    study = here / "studies" / "four"
    assert len(outcome(study)) == 4
    assert {record["run"].split("/")[0] for record in records(study).values()} == {"runs"}
    header = json.loads((study / "study.json").read_text())
    assert header["axes"] == {"method": ["class_mean", "ridge"], "shots": [1, 2]}
    assert (header["format"], header["name"], header["directory"]) == (1, "four", str(here))
    monkeypatch.setattr(engines, "start", lambda *_: pytest.fail("nothing is open"))
    assert run_sweep(["--config", "four.yaml"]) == 0
    (here / "four.yaml").write_text(FOUR.replace("[1, 2]", "[1, 2, 4]"))
    assert run_sweep(["--config", "four.yaml", "--dry-run"]) == 0
    told = capsys.readouterr().out
    assert "4 done, 0 failed, 2 open" in told
    assert "not known" not in told, "costs, memory and disk of the runs that are done are known"


def test_failed_runs_are_told_by_reason_and_tried_again_when_asked(here, capsys):
    broken = "grid: {method: [ridge, gda], data.dataset: [photos], shots: [1, 2]}\n"
    for name in ("cat", "dog"):
        (here / "photos" / name).mkdir(parents=True)
        for number in range(12):
            (here / "photos" / name / f"{number}.png").write_bytes(b"no image")
    (here / "four.yaml").write_text(HEAD + broken)
    assert run_sweep(["--config", "four.yaml", "--only", "method=gda"]) == 1
    told = capsys.readouterr().out
    assert "0 of 2 done, 0 running, 2 failed" in told
    (line,) = [line for line in told.splitlines() if line.startswith("failed: ")]
    assert line.startswith("failed: method gda, data.dataset photos, shots 1 and 1 more: ")
    study = here / "studies" / "four"
    first = records(study, "failed")
    assert len(first) == 2
    assert run_sweep(["--config", "four.yaml", "--only", "method=gda"]) == 1
    assert records(study, "failed") == first, "a failed run is not run again unasked"
    (study / "deaths" / f"{next(iter(first))}.1").touch()
    (study / "deaths" / f"{next(iter(first))}.2").touch()
    (study / "deaths" / f"{next(iter(first))}.3").touch()
    assert run_sweep(["--config", "four.yaml", "--only", "method=gda", "--retry"]) == 1
    again = records(study, "failed")
    assert again.keys() == first.keys()
    assert all("died" not in record["reason"] for record in again.values())
    assert {record["worker"] for record in again.values()}.isdisjoint(r["worker"] for r in first.values())


class Slow(Forked):
    """Workers whose runs only take a while, and make another folder each time."""

    @staticmethod
    def work(study, **settings):
        def execute(words):
            time.sleep(0.05)
            options = dict(word[2:].partition("=")[::2] for word in words)
            runs = Path(options["run.root"], options["run.name"])
            runs.mkdir(parents=True, exist_ok=True)
            return Path(tempfile.mkdtemp(dir=runs))

        work(study, execute=execute, **settings)


def test_ctrl_c_ends_the_workers_and_says_how_to_go_on(here, capsys, monkeypatch):
    started = []

    class Pressed(Slow):
        def poll(self):
            wait_for(lambda: any((here / "studies" / "four" / "done").glob("*.json")))
            started.extend(self.children)
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(5)

    monkeypatch.setattr(studies, "start", Pressed)
    with pytest.raises(SystemExit) as end:
        main(["sweep", "--config", "four.yaml", "--retry"])
    assert end.value.code == 130
    assert capsys.readouterr().err.splitlines()[-1] == (
        "interrupted. Go on with: python main.py sweep --config four.yaml"
    )
    assert started
    for child in started:
        with pytest.raises(ProcessLookupError):
            os.kill(child, 0)
    monkeypatch.setattr(studies, "start", Slow)
    assert run_sweep(["--config", "four.yaml"]) == 0
    assert len(records(here / "studies" / "four")) == 4


def test_two_sweeps_at_once_neither_lose_nor_double_a_run(here, monkeypatch):
    monkeypatch.setattr(studies, "start", Slow)
    child = forked(lambda: sys.exit(run_sweep(["--config", "four.yaml", "--workers", "2"])))
    assert run_sweep(["--config", "four.yaml", "--workers", "1"]) == 0
    assert ended(child) == 0
    study = here / "studies" / "four"
    assert sorted(records(study)) == sorted(run.id for run in read_plan(study))
    assert len(list(study.glob("runs/*/*"))) == 4, "a run was done twice"


def test_a_planner_that_is_killed_leaves_workers_that_finish(tmp_path, monkeypatch, capsys):
    """The planner gets SIGKILL, its worker, a program, goes on, and a second sweep has nothing left to do."""
    (tmp_path / "four.yaml").write_text(FOUR)
    monkeypatch.chdir(tmp_path)
    planner = forked(lambda: run_sweep(["--config", "four.yaml", "--workers", "1"]))
    done = tmp_path / "studies" / "four" / "done"
    wait_for(lambda: list(done.glob("*.json")))
    os.kill(planner, signal.SIGKILL)
    assert ended(planner) == -signal.SIGKILL
    wait_for(lambda: len(list(done.glob("*.json"))) == 4)
    (worker,) = {record["worker"] for record in records(done.parent).values()}
    number = int(worker.split("-")[-2])
    wait_for(lambda: not Path(f"/proc/{number}").exists() or "zombie" in Path(f"/proc/{number}/status").read_text())
    monkeypatch.setattr(engines, "start", lambda *_: pytest.fail("nothing is open"))
    capsys.readouterr()
    assert run_sweep(["--config", "four.yaml"]) == 0
    assert "4 done, 0 failed, 0 open" in capsys.readouterr().out


def test_a_store_of_another_version_is_refused_before_planning(here, monkeypatch):
    file = planned(here, FOUR, "four") / "study.json"
    file.write_text(file.read_text().replace('"format": 1', '"format": 2'))
    monkeypatch.setattr(sweep, "Planner", lambda _: pytest.fail("planned"))
    with pytest.raises(UserError, match="has the format 2, and this kshot reads 1: use another --out"):
        run_sweep(["--config", "four.yaml"])


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--workers", "0"], "--workers is 0, and must be 1 or more"),
        (["--only", "method"], "--only takes an axis and its labels"),
        (["--only", "method=lora"], "--only: the axis method has no 'lora'. There are: class_mean, ridge."),
        (["--only", "shot=1"], "--only: the grid has no axis 'shot'. Did you mean 'shots'?"),
        (["--engine-option", "address"], "--engine-option takes NAME=VALUE"),
        (["--engine", "kubernetes"], "invalid choice: 'kubernetes'"),
        (["--configs", "x"], "unrecognized arguments"),
    ],
)
def test_mistakes_in_words(here, words, said):
    with pytest.raises(UserError) as told:
        run_sweep(["--config", "four.yaml", *words])
    assert said in str(told.value)
    assert not (here / "studies").exists()


def test_a_folder_that_may_not_be_written_is_told(here):
    (here / "studies").write_text("a file is in the way")
    with pytest.raises(UserError, match="cannot be made"):
        run_sweep(["--config", "four.yaml"])


def test_an_engine_that_is_not_installed_is_told(tmp_path, monkeypatch):
    monkeypatch.setitem(engines.ENGINES, "ray", "no_such_library.engine")
    with pytest.raises(UserError, match=r"The engine ray needs no_such_library: pip install 'kshot\[ray\]'"):
        engines.start("ray", tmp_path, EngineSettings(1))


# ------------------------------------------------------------------------------------------------------- progress


def test_the_table_and_the_time_left(tmp_path):
    directory = planned(tmp_path, FOUR)
    progress = Progress(directory, read_plan(directory))
    assert progress.time_left() == "not known before the first run"
    work(directory, execute=Lines(directory, {"ridge": UserError("no")}), only={"shots": frozenset({"1"})})
    for file, seconds in zip(sorted((directory / "done").iterdir()), (30.0,), strict=True):
        file.write_text(json.dumps(json.loads(file.read_text()) | {"seconds": seconds}))
    claim = directory / "claims" / next(run.id for run in read_plan(directory) if run.axes["shots"] == 2)
    claim.touch()
    progress.workers = 2
    progress.look()
    assert progress.line() == "1 of 4 done, 1 running, 1 failed, 30 s left"  # one of known cost, one as usual, by two
    console = Console(width=80, record=True, file=(tmp_path / "shown").open("w"))
    console.print(progress.table("two workers"))
    rows = [line.replace("│", " ").split() for line in console.export_text().splitlines()]
    assert ["class_mean", "1", "1"] in rows
    assert ["ridge", "1", "1"] in rows
    claim.unlink()


def test_a_damaged_record_is_told(tmp_path):
    directory = planned(tmp_path, FOUR)
    work(directory, execute=Lines(directory), only={"method": frozenset({"ridge"})})
    file = min((directory / "done").iterdir())
    file.write_text(file.read_text()[:30])
    with pytest.raises(UserError, match=f"{file.name} is damaged: delete it"):
        Progress(directory, read_plan(directory))
    file.unlink()
    assert len(Progress(directory, read_plan(directory)).open) == 3


@pytest.mark.parametrize(
    ("seconds", "said"), [(0.2, "0 s"), (89, "89 s"), (95, "2 min"), (5000, "83 min"), (1e4, "2.8 h")]
)
def test_a_time_in_words(seconds, said):
    assert spoken(seconds) == said


# ---------------------------------------------------------------------------------------------------- local engine


@pytest.fixture
def local(tmp_path, monkeypatch):
    """Starts the local engine with a small program in the place of its workers."""
    directory = planned(tmp_path, FOUR)
    started = []

    def start(program: str, **settings) -> engine_local.Local:
        head = f"import os, sys, time\nstudy, name = {str(directory)!r}, sys.argv[1]\n"
        monkeypatch.setattr(engine_local, "command", lambda _, __, name: [sys.executable, "-c", head + program, name])
        engine = engine_local.start(directory, EngineSettings(4, **settings))
        started.append(engine)
        return engine

    yield directory, start
    for engine in started:
        engine.stop()


def test_workers_of_the_machine_are_pinned_and_end_when_they_are_asked_to(local):
    directory, start = local
    engine = start("print(os.environ['OMP_NUM_THREADS'], flush=True)\ntime.sleep(600)", workers=2, threads=3, cpu=True)
    assert engine.told == "2 processes of 3 threads"
    assert engine.poll() == 2
    wait_for(lambda: [log.read_text() for log in (directory / "logs").iterdir()] == ["3\n", "3\n"])
    children = [child.process for child in engine.children]
    engine.stop()
    assert [child.returncode for child in children] == [-15, -15]
    assert engine.poll() == 0


def test_a_worker_that_was_killed_is_buried_and_replaced(local):
    directory, start = local
    claim = """
open(f'{study}/claims/{name}', 'w').write('{"worker": "%s", "token": "t"}' % name)
time.sleep(600)"""
    engine = start(claim, workers=1, cpu=True)
    wait_for(lambda: [path for path in (directory / "claims").iterdir() if path.read_text()])
    first = engine.children[0]
    os.kill(first.process.pid, signal.SIGKILL)
    first.process.wait()
    assert engine.poll() == 1
    assert engine.children[0].process.pid != first.process.pid
    assert [path.name for path in (directory / "deaths").iterdir()] == [f"{first.name}.1"]


def test_workers_that_die_without_ending_a_run_are_given_up(local):
    _, start = local
    engine = start("print('no memory')\nsys.exit(9)", workers=1, cpu=True)
    with pytest.raises(UserError, match=r"Workers die without ending a run, the last with status 9: no memory"):
        wait_for(lambda: engine.poll() == 0)


def test_a_worker_that_is_refused_ends_the_sweep_with_its_words(local):
    _, start = local
    engine = start("print('error: studies cannot be written')\nsys.exit(2)", workers=1, cpu=True)
    with pytest.raises(UserError, match=r"^studies cannot be written$"):
        wait_for(lambda: engine.poll() == 0)


@pytest.mark.parametrize(
    ("cores", "memory", "gpus", "settings", "count"),
    [
        (8, 64e9, 0, {}, 8),
        (8, 64e9, 0, {"threads": 3}, 2),
        (8, 5e9, 0, {}, 2),
        (8, 5e9, 0, {"memory": 1e9}, 5),
        (1, 1e9, 0, {}, 1),
        (16, 64e9, 2, {}, 2),
        (16, 64e9, 2, {"memory": 8e9}, 16),
        (32, 64e9, 2, {"memory": 10e9}, 12),
        (16, 64e9, 2, {"memory": 70e9}, 2),
    ],
)
def test_as_many_workers_as_the_machine_carries(monkeypatch, cores, memory, gpus, settings, count):
    monkeypatch.setattr(engine_local.os, "sched_getaffinity", lambda _: set(range(cores)))
    monkeypatch.setattr(engine_local, "memory_of_machine", lambda: memory)
    card = type("Card", (), {"total_memory": 80e9})
    monkeypatch.setattr(engine_local.torch.cuda, "get_device_properties", lambda _: card)
    assert engine_local.fitting(EngineSettings(100, **settings), gpus) == count
