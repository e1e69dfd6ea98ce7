"""Studies on Slurm: what is submitted, by programs in Slurm's place; pre-emption, in a job as submitit runs it."""

import json
import os
import re
import signal
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path

import processes
import pytest
from studies import HEAD, apart, ended, outcome, planned, records
from submitit.core.submission import process_job

from kshot.errors import UserError
from kshot.studies import engine_slurm
from kshot.studies.engines import EngineSettings, start
from kshot.studies.worker import LOST_DEVICE, work

GRID = "grid: {method: [ridge, coop], dataset: [digits], shots: [1, 2]}\n"
MAIN = Path(__file__).parents[1] / "main.py"


@pytest.fixture(name="slurm")
def _slurm(tmp_path, monkeypatch):
    """A folder of programs that answer as Slurm's do: ``queue`` is what squeue prints, ``scripts`` what sbatch got."""
    folder = tmp_path / "slurm"
    folder.mkdir()
    programs = {
        "sbatch": 'n=$(ls {0} | grep -c script); cp "$1" {0}/script$n; env > {0}/environment; echo job 4$n',
        "squeue": 'test "$*" = "--me --array --noheader --format=%i" && cat {0}/queue',
        "scontrol": 'echo "$@" >> {0}/requeued',
        "srun": "exit 1",
    }
    for name, text in programs.items():
        file = folder / name
        file.write_text("#!/bin/sh\n" + text.format(folder) + "\n")
        file.chmod(stat.S_IRWXU)
    (folder / "queue").write_text("")
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    return folder


def scripts(slurm):
    return [file.read_text() for file in sorted(slurm.glob("script*"))]


def test_an_array_is_submitted_with_what_was_asked_for(tmp_path, slurm, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS")
    study = planned(tmp_path, HEAD + GRID)
    options = {"partition": "gpu", "time": "1:30:00", "gpus": "1", "mem": "8G"}
    engine = start("slurm", study, EngineSettings(runs=4, workers=3, threads=2, options=options))
    (script,) = scripts(slurm)
    asked = set(re.findall(r"^#SBATCH (.+)$", script, flags=re.MULTILINE))
    assert asked >= {
        *("--array=0-2%3", "--time=90", "--partition=gpu", "--gpus-per-node=1", "--mem=8G", "--cpus-per-task=2"),
        *("--job-name=kshot-tiny", "--requeue", "--signal=USR2@90"),
    }
    assert "--cpus-per-task=2" in re.search(r"^srun .*$", script, flags=re.MULTILINE)[0]
    assert "OMP_NUM_THREADS=2\n" in (slurm / "environment").read_text()
    assert "OMP_NUM_THREADS" not in os.environ, "the sweep's own environment stays"
    assert (engine.poll(), engine.told) == (3, "3 jobs on Slurm (40)")


def test_the_same_sweep_submits_only_what_lacks(tmp_path, slurm, caplog, monkeypatch):
    monkeypatch.setattr(engine_slurm, "ASK", 0.0)
    caplog.set_level("INFO", "kshot")
    study, settings = planned(tmp_path, HEAD + GRID), EngineSettings(runs=4, workers=3)
    start("slurm", study, settings).stop()
    assert "3 jobs go on without the sweep, which may be called again; 'scancel 40' ends them." in caplog.text
    (slurm / "queue").write_text("40_0\n40_1\n40_2\n17\n")
    caplog.clear()
    again = start("slurm", study, settings)
    assert len(scripts(slurm)) == 1
    assert "3 of the study's jobs are queued or run already (40): no more are submitted." in caplog.text
    assert again.poll() == 3
    (slurm / "queue").write_text("40_1\n17\n")
    assert again.poll() == 1
    third = start("slurm", study, settings)
    assert "1 of the study's jobs are queued or run already (40): 2 more are submitted." in caplog.text
    assert "--array=0-1%2" in scripts(slurm)[1]
    (slurm / "queue").write_text("")
    assert third.poll() == 0


def test_a_sweep_need_not_wait(tmp_path, slurm):
    study = planned(tmp_path, HEAD + GRID)
    engine = start("slurm", study, EngineSettings(runs=4, options={"wait": "no"}))
    assert engine.poll() == 0
    assert "--array=0-3%4" in scripts(slurm)[0], "no more jobs than runs"


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"time": "soon"}, "time=soon: it is minutes"),
        ({"cluster": "pbs"}, "cluster=pbs: it is slurm, or local"),
        ({"wait": "maybe"}, "wait=maybe: it is yes or no"),
        ({"cluster": "local", "partition": "gpu"}, "cluster=local takes no partition"),
        ({"cluster": "local", "gpus": "a100:1"}, "gpus=a100:1: it is a whole number"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_wrong_options_are_told_in_a_line(tmp_path, slurm, options, told):
    with pytest.raises(UserError, match=re.escape(told)):
        start("slurm", planned(tmp_path, HEAD + GRID), EngineSettings(runs=4, options=options))
    assert not scripts(slurm)


def test_what_slurm_refuses_is_told_in_its_words(tmp_path, slurm):
    (slurm / "sbatch").write_text("#!/bin/sh\necho 'sbatch: error: invalid partition specified: gpu' >&2; exit 1\n")
    with pytest.raises(UserError, match=r"^Slurm refuses the jobs: .*invalid partition specified: gpu"):
        start("slurm", planned(tmp_path, HEAD + GRID), EngineSettings(runs=4, options={"partition": "gpu"}))


def test_no_slurm_is_told_in_a_line(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match=r"no Slurm on this machine \(no sbatch\).*cluster=local"):
        start("slurm", planned(tmp_path, HEAD + GRID), EngineSettings(runs=4))


def test_a_missing_extra_is_told_in_a_line(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "submitit", None)
    with pytest.raises(UserError, match=r"pip install 'kshot\[slurm\]'"):
        start("slurm", planned(tmp_path, HEAD + GRID), EngineSettings(runs=4))


def as_a_job(folder, number="40", **more):
    """The environment of a job of an array with one task, as Slurm sets it."""
    names = {"JOB_ID": "41", "ARRAY_JOB_ID": number, "ARRAY_TASK_ID": "0", "JOB_NAME": "kshot-tiny", "NTASKS": "1"}
    names |= {"PROCID": "0", "LOCALID": "0", "NODEID": "0", "NNODES": "1", "JOB_NUM_NODES": "1", "NTASKS_PER_NODE": "1"}
    os.environ.update({f"SLURM_{name}": value for name, value in names.items()})
    os.environ.update({"SUBMITIT_EXECUTOR": "slurm", "SLURM_JOB_NODELIST": "localhost", **more})
    process_job(folder)


def pre_empted(study, slurm):
    """A job that hears Slurm's signals while its first run trains."""

    def tell():
        while not list(study.glob("runs/*/001/metrics.csv")):
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGTERM)  # which comes first, and is only a warning
        os.kill(os.getpid(), signal.SIGUSR2)

    threading.Thread(target=tell, daemon=True).start()
    with pytest.raises(SystemExit):
        as_a_job(study / "logs" / "slurm")
    assert (slurm / "requeued").read_text() == "requeue 40_0\n"
    assert not list((study / "claims").iterdir())
    assert not records(study)
    assert not records(study, "failed")
    assert not list((study / "deaths").iterdir())


def test_a_job_that_is_pre_empted_gives_its_run_back_and_is_queued_again(tmp_path, slurm):
    text = HEAD + "grid: {method: [coop], dataset: [digits], shots: [1, 2], trainer.max_epochs: [30]}\n"
    study, whole = planned(tmp_path, text), planned(tmp_path, text, "whole")
    start("slurm", study, EngineSettings(runs=2, workers=2))
    folder = study / "logs" / "slurm"
    assert ended(apart(pre_empted, study, slurm)) == 0
    assert ended(apart(as_a_job, folder)) == 0
    assert (folder / "40_0_0_result.pkl").exists()
    assert ended(apart(work, whole)) == 0
    assert len(outcome(whole)) == 2
    assert outcome(study) == outcome(whole)


def test_a_job_whose_gpu_is_lost_is_queued_again(tmp_path, slurm, monkeypatch):
    study = planned(tmp_path, HEAD + GRID)
    start("slurm", study, EngineSettings(runs=4, workers=2))

    def lost(*args, **more):
        raise SystemExit(LOST_DEVICE)

    monkeypatch.setattr(engine_slurm, "work", lost)

    def of_a_job():
        with pytest.raises(SystemExit):
            as_a_job(study / "logs" / "slurm")

    processes.in_children(1, of_a_job)
    assert (slurm / "requeued").read_text() == "requeue 40_0\n"


def test_a_job_that_is_refused_says_why(tmp_path, slurm, monkeypatch):
    study = planned(tmp_path, HEAD + GRID)
    engine = start("slurm", study, EngineSettings(runs=4, workers=1))
    header = json.loads((study / "study.json").read_text())
    (study / "study.json").write_text(json.dumps(header | {"torch": "1.0"}))
    log = study / "logs" / "slurm" / "40_0_log.err"

    def refused():
        with log.open("w") as file:
            os.dup2(file.fileno(), 2)
        sys.stderr = os.fdopen(2, "w", closefd=False)
        os.environ.update({"SUBMITIT_EXECUTOR": "slurm", "SLURM_JOB_ID": "40"})
        with pytest.raises(SystemExit):
            process_job(log.parent)

    processes.in_children(1, refused)
    monkeypatch.setattr(engine_slurm, "ASK", 0.0)
    with pytest.raises(UserError, match=r"was begun by kshot .* with torch 1\.0"):
        engine.poll()


@pytest.mark.slow
def test_the_local_executor_runs_a_study_and_a_sweep_that_is_called_again_submits_nothing(tmp_path):
    (tmp_path / "tiny.yaml").write_text(HEAD + GRID + "leave_out: []\n")
    command = [sys.executable, str(MAIN), "sweep", "--config", "tiny.yaml", "--engine", "slurm", "--workers", "2"]
    command += ["--engine-option", "cluster=local"]
    with (tmp_path / "log").open("w") as log:  # a file: the jobs hold it open
        submitted = subprocess.run([*command, "wait=no"], cwd=tmp_path, stdout=log, stderr=log, timeout=120)
    assert submitted.returncode == 1, "runs are open"
    assert "2 jobs are submitted" in (tmp_path / "log").read_text()
    assert "2 jobs go on without the sweep" in (tmp_path / "log").read_text()
    again = processes.finished(command, cwd=tmp_path)
    assert "2 of the study's jobs are queued or run already" in again.stderr
    assert "no more are submitted" in again.stderr
    assert "4 of 4 done" in again.stdout
    whole = planned(tmp_path, HEAD + GRID, "whole")
    processes.in_children(1, lambda: work(whole))
    assert outcome(tmp_path / "studies" / "tiny") == outcome(whole)
