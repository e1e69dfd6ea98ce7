"""Workers: each run once, whatever happens to those that do them."""

import errno
import json
import os
import random
import signal
import time
from pathlib import Path

import pytest
from studies import HEAD, Lines, apart, ended, forked, outcome, planned, records

from kshot.cli import main
from kshot.errors import UserError
from kshot.studies import store
from kshot.studies import worker as working
from kshot.studies.store import read_plan
from kshot.studies.worker import work

FOUR = HEAD + "grid: {method: [class_mean, ridge], shots: [1, 2]}"
QUICKLY = {"beat": 0.05, "patience": 1.0}


@pytest.fixture(scope="module")
def mixed(few_scans) -> str:
    """A study of methods that take steps and one that takes none, on three digits."""
    options = dict(zip(few_scans[::2], few_scans[1::2], strict=True))
    text = HEAD.replace("run.calibrate", "trainer.max_epochs: 2, run.save_every: 0, run.calibrate")
    text = text.replace(
        "{", "{" + ", ".join(f"{name[2:]}: {json.dumps(value)}" for name, value in options.items()) + ", "
    )
    return text + "grid: {method: [class_mean, coop, linear_probe], shots: [1, 2]}"


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, mixed) -> dict:
    """What comes of a mixed study that one worker does in peace."""
    directory = planned(tmp_path_factory.mktemp("calm"), mixed)
    assert work(directory) == 6
    assert records(directory, "failed") == {}
    return outcome(directory)


def wait_for(what, seconds: float = 120) -> None:
    until = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < until, "nothing happened"
        time.sleep(0.01)


def test_a_worker_does_every_run_once_and_a_second_one_none(tmp_path):
    directory = planned(tmp_path, FOUR)
    seen = Lines(directory)
    assert work(directory, execute=seen, name="one") == 4
    runs = read_plan(directory)
    assert [options["run.name"] for options in seen.seen] == [run.id for run in runs]
    assert {options["run.root"] for options in seen.seen} == {str(directory / "runs")}
    done = records(directory)
    assert done.keys() == {run.id for run in runs}
    for run in runs:
        own = done[run.id]
        assert (own["id"], own["axes"], own["run"], own["worker"]) == (run.id, run.axes, f"runs/{run.id}/001", "one")
        assert own["seconds"] >= 0
    assert list((directory / "claims").iterdir()) == []
    assert work(directory, execute=lambda _: pytest.fail("run twice")) == 0


def test_only_some_runs(tmp_path):
    directory = planned(tmp_path, FOUR)
    assert work(directory, execute=Lines(directory), only={"method": frozenset({"ridge"})}) == 2
    assert {record["axes"]["method"] for record in records(directory).values()} == {"ridge"}


def test_a_mistake_in_one_run_is_recorded_and_the_rest_goes_on(tmp_path):
    directory = planned(tmp_path, HEAD + "grid: {method: [class_mean, ridge, gda, kernel_ridge], shots: [1]}")
    wrapped = RuntimeError("jsonargparse says more")
    wrapped.__cause__ = UserError("rank is 0,\n and must be more")
    fails = {"/ridge": UserError("no\nimages"), "/gda": ZeroDivisionError("division\nby zero"), "class_mean": wrapped}
    assert work(directory, execute=Lines(directory, fails)) == 4
    reasons = {record["axes"]["method"]: record["reason"] for record in records(directory, "failed").values()}
    assert reasons == {
        "ridge": "no images",
        "gda": "ZeroDivisionError: division",
        "class_mean": "rank is 0, and must be more",
    }
    assert [record["axes"]["method"] for record in records(directory).values()] == ["kernel_ridge"]
    (log,) = (directory / "logs").iterdir()
    assert "ZeroDivisionError: division\nby zero" in log.read_text(), "the log has the traceback"


def test_what_a_run_prints_goes_to_the_log(tmp_path, capfd):
    directory = planned(tmp_path, HEAD + "grid: {method: [ridge], shots: [1]}")
    capfd.readouterr()
    assert work(directory, name="w") == 1
    assert "adapted accuracy" in (directory / "logs" / "w.log").read_text()
    assert capfd.readouterr() == ("", "")


def test_a_run_whose_workers_die_three_times_has_failed(tmp_path):
    directory = planned(tmp_path, FOUR)
    first = read_plan(directory)[0].id
    for _ in range(3):
        assert ended(forked(lambda: work(directory, execute=lambda _: os.kill(os.getpid(), 9), **QUICKLY))) == -9
        working.Claims(directory, "").take_away(first, token(directory, first))
    assert work(directory, execute=Lines(directory), **QUICKLY) == 4
    (failed,) = records(directory, "failed").values()
    assert (failed["id"], failed["attempts"]) == (first, 3)
    assert failed["reason"].startswith("its worker died 3 times")


def token(directory: Path, run: str) -> str:
    return json.loads((directory / "claims" / run).read_text())["token"]


def test_a_worker_that_was_paused_publishes_nothing_when_it_wakes(tmp_path):
    directory = planned(tmp_path, HEAD + "grid: {method: [ridge], shots: [1]}")
    go = tmp_path / "go"

    def slowly(words):
        wait_for(go.exists)
        return Lines(directory)(words)

    child = forked(lambda: work(directory, execute=slowly, name="sleeper", **QUICKLY))
    wait_for(lambda: any((directory / "claims").iterdir()))
    time.sleep(0.2)
    os.kill(child, signal.SIGSTOP)
    go.touch()
    assert work(directory, execute=Lines(directory), name="awake", **QUICKLY) == 1
    os.kill(child, signal.SIGCONT)
    assert ended(child) == 0
    (record,) = records(directory).values()
    assert record["worker"] == "awake"
    assert "the claim was taken away" in (directory / "logs" / "sleeper.log").read_text()
    assert list((directory / "claims").iterdir()) == []


def undying(directory: Path) -> None:
    """A worker that counts no deaths: chance may hit one run again and again."""
    working.DEATHS = 1000
    work(directory, **QUICKLY)


def disturbed(directory: Path, kills: int, workers: int, seed: int) -> int:
    """Lets workers do a study, kills some at random moments, and starts others; gives how many were killed."""
    chance, killed, living = random.Random(seed), 0, []

    def one():
        return apart(undying, directory)

    while len(records(directory)) < len(read_plan(directory)) and killed < kills:
        assert records(directory, "failed") == {}
        living += [one() for _ in range(workers - len(living))]
        time.sleep(chance.uniform(0.02, 1.0))
        child = living.pop(chance.randrange(len(living)))
        child.kill()
        status = ended(child)  # 0 of one that had ended already
        assert status in (0, -signal.SIGKILL)
        killed += status != 0
    living = living or [one()]
    assert [ended(child) for child in living] == [0] * len(living)
    return killed


@pytest.mark.parametrize(("kills", "workers"), [(4, 2), pytest.param(20, 3, marks=pytest.mark.slow)])
def test_workers_killed_at_random_moments_change_nothing(tmp_path, mixed, undisturbed, kills, workers):
    directory = planned(tmp_path, mixed)
    killed = 0
    for attempt in range(20):  # twenty kills are more than one small study takes
        killed += disturbed(directory, kills - killed, workers, seed=attempt)
        assert outcome(directory) == undisturbed
        assert records(directory, "failed") == {}
        published = [json.loads(line)["id"] for line in (directory / "plan.jsonl").read_text().splitlines()]
        assert sorted(records(directory)) == sorted(published)
        if killed >= kills:
            break
        directory = planned(tmp_path, mixed, f"again{attempt}")
    assert killed == kills


def test_a_run_goes_on_from_its_checkpoint_after_sigterm(tmp_path, mixed, undisturbed):
    """SIGTERM gives the claim back, counts as no death, and what was trained is not trained again."""
    directory = planned(tmp_path, mixed.replace("[class_mean, coop, linear_probe]", "[coop]"))
    child = apart(main, ["worker", str(directory)])
    wait_for(lambda: any(directory.glob("runs/*/001/checkpoints/last.ckpt")))
    child.terminate()
    assert ended(child) == 143
    assert list((directory / "claims").iterdir()) == list((directory / "deaths").iterdir()) == []
    before = len(records(directory))
    assert before < 2
    seen, ordinary = [], working.ordinary()
    assert work(directory, execute=lambda words: seen.append(words) or ordinary(words)) == 2 - before
    assert any("--resume" in words for words in seen)
    found = outcome(directory)
    assert len(found) == 2
    assert found == {run: undisturbed[run] for run in found}


def test_a_checkpoint_that_does_not_go_on_is_left_and_the_run_begun_anew(tmp_path, mixed, undisturbed):
    directory = planned(tmp_path, mixed.replace("[class_mean, coop, linear_probe]", "[linear_probe]"))
    run = read_plan(directory)[0].id
    begun = directory / "runs" / run / "001"
    (begun / "checkpoints").mkdir(parents=True)
    (begun / "checkpoints" / "last.ckpt").write_bytes(b"no checkpoint")
    (begun / "config.yaml").write_text("seed_everything: 1\n")
    assert work(directory) == 2
    assert records(directory)[run]["run"] == f"runs/{run}/002"
    assert outcome(directory)[run] == undisturbed[run]


@pytest.mark.parametrize("told", ["errno", "words"])
def test_a_full_disk_ends_the_worker_and_blames_no_run(tmp_path, told):
    directory = planned(tmp_path, FOUR)
    full = UserError("Could not write result.json")
    full.__cause__ = OSError(errno.ENOSPC, "full") if told == "errno" else RuntimeError("No space left on device")
    with pytest.raises(UserError, match=r"cannot be written \(.*nothing is lost"):
        work(directory, execute=Lines(directory, {"ridge": full}))
    assert records(directory, "failed") == {}
    assert len(records(directory)) == 2
    assert list((directory / "claims").iterdir()) == []
    assert work(directory, execute=Lines(directory)) == 2


def test_a_disk_that_is_full_for_the_log_is_told_as_well(tmp_path, monkeypatch):
    directory = planned(tmp_path, FOUR)

    def refuse(*_):
        raise OSError(errno.ENOSPC, "no space left on device")

    monkeypatch.setattr(working.Worker, "logged", refuse)
    with pytest.raises(UserError, match=r"cannot be written \(no space"):
        work(directory, execute=Lines(directory))
    assert list((directory / "claims").iterdir()) == []


def test_a_worker_whose_gpu_no_longer_answers_records_the_run_and_ends(tmp_path):
    directory = planned(tmp_path, FOUR)
    lost = RuntimeError("CUDA error: device-side assert triggered\nand more")
    with pytest.raises(SystemExit) as end:
        work(directory, execute=Lines(directory, {"ridge": lost}))
    assert end.value.code == working.LOST_DEVICE
    (record,) = records(directory, "failed").values()
    assert record["reason"] == "RuntimeError: CUDA error: device-side assert triggered"
    assert list((directory / "claims").iterdir()) == []


def test_a_machine_without_the_working_directory_is_refused(tmp_path):
    directory = planned(tmp_path, FOUR)
    file = directory / store.HEADER
    file.write_text(json.dumps(json.loads(file.read_text()) | {"directory": str(tmp_path / "elsewhere")}))
    with pytest.raises(UserError, match="is not on this machine: share it as well"):
        work(directory, execute=lambda _: pytest.fail("run"))


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("format", 7, "has the format 7, and this kshot reads 1"),
        ("kshot", "0.0.1", "was begun by kshot 0.0.1"),
        ("torch", "1.0.0", "with torch 1.0.0"),
        ("axes", None, "is damaged"),
    ],
)
def test_a_store_of_other_versions_is_refused_in_a_line(tmp_path, name, value, said):
    directory = planned(tmp_path, FOUR)
    header = json.loads((directory / store.HEADER).read_text()) | {name: value}
    if value is None:
        del header[name]
    (directory / store.HEADER).write_text(json.dumps(header))
    with pytest.raises(UserError) as told:
        work(directory, execute=lambda _: pytest.fail("run"))
    assert said in str(told.value)
    assert "\n" not in str(told.value)


def test_what_is_no_study_is_told(tmp_path):
    with pytest.raises(UserError, match=r"is no study: study\.json no such file"):
        work(tmp_path)
    directory = planned(tmp_path, FOUR)
    (directory / "plan.jsonl").write_text('{"id": "cut off')
    with pytest.raises(UserError, match=r"plan\.jsonl is damaged: run sweep again"):
        work(directory)


def test_workers_begin_with_different_groups_and_stay_in_theirs(tmp_path):
    text = "grid: {method: [class_mean], model.backbone.features: [default, last4+mean], shots: [1, 2, 4]}"
    directory = planned(tmp_path, HEAD + text)
    runs = read_plan(directory)
    other = working.Claims(directory, "other").take(runs[0].id)
    seen = Lines(directory)
    taker = working.Worker(directory, "me", seen, 0.1, 100.0)
    order = []
    for run, claim in taker.taken(runs):
        order.append(run.id)
        taker.end(run, claim)
        if len(order) == 5:
            other.release()
    assert order == [runs[i].id for i in (3, 4, 5, 1, 2, 0)]
