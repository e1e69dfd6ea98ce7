"""Claims: one holder at a time whatever clocks say, and what is published is whole, once."""

import errno
import json
import os
import threading
import time
from pathlib import Path

import pytest

from kshot.errors import UserError
from kshot.studies import claims as claiming
from kshot.studies.claims import Claims, make_folders, publish, published


@pytest.fixture
def study(tmp_path) -> Path:
    make_folders(tmp_path)
    return tmp_path


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


class Clock:
    """A watcher's own clock, which a test moves."""

    def __init__(self, monkeypatch) -> None:
        self.now = 1000.0
        monkeypatch.setattr(claiming.time, "monotonic", lambda: self.now)


def watch(watcher: Claims, clock: Clock, run: str, seconds: float) -> bool:
    """Looks once a beat for so long; whether the claim was found dead."""
    for _ in range(round(seconds / watcher.beat)):
        clock.now += watcher.beat
        if watcher.is_dead(run):
            return True
    return False


def test_of_many_that_claim_a_run_one_has_it(study):
    taken, start = [], threading.Barrier(8)

    def claim(number: int) -> None:
        mine = Claims(study, f"w{number}")
        start.wait()
        for run in range(30):
            found = mine.take(f"run{run}")
            if found is not None:
                taken.append((run, found))

    threads = [threading.Thread(target=claim, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(run for run, _ in taken) == list(range(30))
    for _, each in taken:
        assert each.held()
        each.release()
    assert names_in(study / "claims") == []


def test_a_living_claim_is_left_alone_and_a_dead_one_is_taken_by_one_watcher(study, monkeypatch):
    clock = Clock(monkeypatch)
    owner = Claims(study, "owner", beat=0.01).take("run")
    watchers = [Claims(study, f"w{i}", beat=1.0, patience=10.0) for i in range(2)]
    for _ in range(40):  # the owner beats between two looks
        beats = (study / "claims" / "run").read_bytes()
        until = time.time() + 20
        while (study / "claims" / "run").read_bytes() == beats and time.time() < until:
            time.sleep(0.002)
        clock.now += 1.0
        assert not any(watcher.is_dead("run") for watcher in watchers)
    owner.ended.set()  # it beats no more, as if it were killed
    owner.thread.join()
    assert not watch(watchers[0], clock, "run", 9)
    found = [watch(watcher, clock, "run", 11) for watcher in watchers]
    assert found == [True, False]
    assert not owner.held()
    assert [watcher.deaths("run") for watcher in watchers] == [1, 1]
    new = watchers[1].take("run")
    owner.release()  # the old owner wakes up, and gives back what is not its own any more
    assert new.held()
    new.release()


def test_clocks_of_the_day_that_differ_do_not_matter(study, monkeypatch):
    """Neither a claim nor its watcher looks at the time of day, nor at the times of files."""
    clock = Clock(monkeypatch)
    monkeypatch.setattr(claiming.time, "time", lambda: pytest.fail("the time of day"))
    owner = Claims(study, "owner", beat=1e6).take("run")
    for moved in (0, 4_000_000_000):
        os.utime(study / "claims" / "run", (moved, moved))
        assert not watch(Claims(study, "w", beat=1.0, patience=10.0), clock, "run", 9)
    owner.release()


def test_a_watcher_that_slept_takes_nothing_when_it_wakes(study, monkeypatch):
    clock, watcher = Clock(monkeypatch), Claims(study, "w", beat=1.0, patience=10.0)
    owner = Claims(study, "owner", beat=1e6).take("run")
    assert not watcher.is_dead("run")
    clock.now += 1e5  # both were asleep: the owner has had no moment to beat
    assert not watcher.is_dead("run")
    os.pwrite(owner.file, b"7", owner.at)
    assert not watch(watcher, clock, "run", 9)
    owner.release()


def test_a_claim_that_was_given_back_and_taken_anew_in_between_goes_back_to_its_owner(study):
    watcher, dead = Claims(study, "w"), "0123456789abcdef"
    owner = Claims(study, "owner").take("run")
    assert not watcher.take_away("run", dead)
    assert owner.held()
    assert watcher.deaths("run") == 0
    owner.release()
    assert not watcher.take_away("run", dead)


def test_a_dead_workers_claims_are_buried_by_its_name_alone(study):
    mine = [Claims(study, "one").take(f"a{i}") for i in range(2)]
    other = Claims(study, "one-more").take("b")
    Claims(study, "").bury("one")
    assert [claim.held() for claim in (*mine, other)] == [False, False, True]
    assert names_in(study / "deaths") == ["a0.1", "a1.1"]
    Claims(study, "").bury("one-more", died=False)
    assert not other.held()
    assert names_in(study / "deaths") == ["a0.1", "a1.1"], "one that was asked to end has not died"
    for claim in (*mine, other):
        claim.release()


def test_the_first_that_publishes_wins_and_what_is_there_is_whole(study):
    won, start = [], threading.Barrier(6)

    def tell(number: int) -> None:
        start.wait()
        for run in range(20):
            first = publish(study / "done", f"run{run}", {"worker": number, "long": "x" * 5000})
            won.extend([(f"run{run}", number)] * first)

    threads = [threading.Thread(target=tell, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found = {
        run: json.loads((study / "done" / f"{run}.json").read_text())["worker"] for run in published(study / "done")
    }
    assert found == dict(won)
    assert len(won) == 20
    assert len(names_in(study / "done")) == 20, "something was left beside"


def refusing(number: int, name: str):
    """What a system call does where the file system refuses."""

    def refuse(*given, **options):
        raise OSError(number, os.strerror(number), name)

    return refuse


def test_a_file_system_without_links_keeps_the_first_as_well(study, monkeypatch):
    monkeypatch.setattr(claiming.os, "link", refusing(errno.EPERM, "link"))
    assert publish(study / "done", "run", {"worker": 1})
    assert not publish(study / "done", "run", {"worker": 2})
    assert json.loads((study / "done" / "run.json").read_text()) == {"worker": 1}
    assert names_in(study / "done") == ["run.json"]


@pytest.mark.parametrize("call", ["fsync", "link", "write"])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS])
def test_a_full_or_a_read_only_disk_is_told_in_a_line_and_leaves_nothing_half(study, monkeypatch, call, number):
    publish(study / "done", "before", {"worker": 1})
    with monkeypatch.context() as patch:
        patch.setattr(claiming.os, call, refusing(number, call))
        if call != "write":
            with pytest.raises(UserError, match=r"cannot be written \((no space|read-only).*nothing is lost"):
                publish(study / "done", "run", {"worker": 1})
        if call != "link":
            with pytest.raises(UserError, match="cannot be written"):
                Claims(study, "w").take("run")
    assert names_in(study / "claims") == []
    assert names_in(study / "done") == ["before.json"]
    claim = Claims(study, "w").take("run")
    assert claim is not None
    claim.release()


def test_a_claim_that_was_cut_off_belongs_to_nobody(study, monkeypatch):
    """A machine that loses power may leave an empty file."""
    (study / "claims" / "run").write_bytes(b"")
    watcher = Claims(study, "w", beat=1.0, patience=10.0)
    assert watcher.take("run") is None
    assert watch(watcher, Clock(monkeypatch), "run", 13)
    watcher.take("run").release()
