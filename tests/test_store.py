"""Rows on disk: what is read is what was written, whoever writes, dies or damages beside it."""

import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kshot import store as module
from kshot.store import Store, clear, contents

MUCH = 10**9
NUMBERS = st.integers(0, 2**64 - 1)
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.uint8]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """An empty store, whose root it gives."""
    monkeypatch.setenv("KSHOT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(logging.getLogger("kshot"), "level", logging.INFO)
    monkeypatch.setattr(module, "_refused", set())
    return tmp_path / "cache" / "store"


def key(number: int) -> str:
    return f"{number * 0x9E3779B97F4A7C15 % 2**64:016x}"


def filled(numbers, context="x", **others) -> Store:
    """A store of rows (number, number + 1) by the key of a number."""
    store = Store("features", {"of": context}, **{"most": MUCH} | others)
    numbers = list(numbers)
    rows = torch.tensor([[n, n + 1] for n in numbers], dtype=torch.float32)
    assert store.write([key(n) for n in numbers], rows)
    return store


def found(store, numbers):
    return [None if row is None else int(row[0]) for row in store.find([key(n) for n in numbers])]


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    writes=st.lists(
        st.dictionaries(st.integers(0, 2**64 - 1), st.integers(0, 255), min_size=1, max_size=6), max_size=5
    ),
    others=st.lists(st.integers(0, 2**64 - 1), max_size=4),
    dtype=st.sampled_from(DTYPES),
    shape=st.sampled_from([(3,), (1,), (2, 3, 4)]),
)
def test_read_after_write(writes, others, dtype, shape):
    clear()
    expected, value = {}, torch.arange(256).to(dtype)
    stores = [Store("features", {"of": "hypothesis"}, MUCH) for _ in range(2)]
    for i, written in enumerate(writes):
        rows = {k: v for k, v in written.items() if k not in expected}
        if rows:
            tensor = torch.stack([value[v].expand(shape) for v in rows.values()])
            assert stores[i % 2].write([f"{k:016x}" for k in rows], tensor)
            expected |= rows
    asked = [*expected, *others]
    for number, row in zip(asked, stores[0].find([f"{k:016x}" for k in asked]), strict=True):
        if number not in expected:
            assert row is None
            continue
        assert (row.dtype, tuple(row.shape)) == (dtype, shape)
        assert torch.equal(row, value[expected[number]].expand(shape))


def test_bits_are_those_that_were_written():
    rows = torch.randn(50, 16)
    rows[0, :3] = torch.tensor([float("nan"), float("inf"), -0.0])
    store = Store("features", {}, MUCH)
    store.write([key(i) for i in range(50)], rows)
    again = torch.stack(Store("features", {}, MUCH).find([key(i) for i in range(50)]))
    assert torch.equal(again.view(torch.int32), rows.view(torch.int32))


def test_contexts_and_kinds_keep_apart():
    store = filled(range(3))
    assert found(store, [0, 5, 2]) == [0, None, 2]
    assert found(Store("features", {"of": "y"}, MUCH), [0]) == [None]
    assert found(Store("images", {"of": "x"}, MUCH), [0]) == [None]
    assert found(Store("features", {"of": "x"}, 0), [0]) == [None], "0 keeps nothing"


def test_a_file_under_another_context_is_not_read(cache):
    store, other = filled(range(3)), Store("features", {"of": "y"}, MUCH)
    (file,) = store.folder.iterdir()
    other.folder.mkdir()
    file.rename(other.folder / file.name)
    assert found(other, range(3)) == [None] * 3


def test_an_empty_key_is_neither_written_nor_found():
    store = Store("features", {}, MUCH)
    assert store.write(["", key(1)], torch.ones(2, 2))
    assert [row is not None for row in store.find(["", key(1), key(0)])] == [False, True, False]
    assert not store.write([""], torch.ones(1, 2))


def test_rows_are_mapped_and_not_copied():
    store = filled(range(2))
    first, second = store.find([key(0), key(1)])
    assert first.untyped_storage().data_ptr() == second.untyped_storage().data_ptr()
    maps = Path("/proc/self/maps")
    if maps.is_file():
        (file,) = store.folder.iterdir()
        assert file.name in maps.read_text()


def test_a_flipped_bit_anywhere_is_refused_and_made_anew(caplog):
    store = filled(range(40))
    (file,) = store.folder.iterdir()
    whole = file.read_bytes()
    for place in [*range(0, 8), *range(8, len(whole), 97), len(whole) - 1]:
        clear()
        caplog.clear()
        store.folder.mkdir(parents=True)
        changed = store.folder / f"{place}.safetensors"
        changed.write_bytes(whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1 :])
        assert found(store, range(40)) == [None] * 40, place
        assert not changed.exists()
        (line,) = caplog.messages
        assert str(changed) in line
        assert "\n" not in line
    assert filled(range(40)).folder == store.folder
    assert found(store, range(40)) == list(range(40))


@pytest.mark.parametrize("content", [b"", b"x", b"\xff" * 100, b'{"a": 1}', "cut", "unsealed"])
def test_what_is_no_file_of_ours_is_deleted(content, caplog):
    store = filled(range(5))
    (file,) = store.folder.iterdir()
    whole = file.read_bytes()
    if content == "unsealed":
        content = whole.replace(b"kshot-sha256:", b"nobod-sha256:")
    file.unlink()
    broken = store.folder / "broken.safetensors"
    broken.write_bytes(whole[: len(whole) // 2] if content == "cut" else content)
    assert found(store, range(5)) == [None] * 5
    assert not broken.exists()
    assert len(caplog.messages) == 1


def test_the_digest_is_checked_once_a_process_and_file(monkeypatch):
    checked, check = [], module.check_seal
    monkeypatch.setattr(module, "check_seal", lambda file: checked.append(file) or check(file))
    filled(range(5))
    for _ in range(3):
        assert found(Store("features", {"of": "x"}, MUCH), range(5)) == list(range(5))
    assert len(checked) == 1


class TestCap:
    def test_files_used_longest_ago_go_first(self, caplog):
        stores = {name: filled(range(100), name) for name in "abc"}
        size = sum(file.stat().st_size for file in stores["a"].folder.iterdir())
        for age, name in ((3000, "a"), (2000, "b"), (1000, "c")):
            for file in stores[name].folder.iterdir():
                os.utime(file, (time.time() - age,) * 2)
        assert found(Store("features", {"of": "a"}, MUCH), [7]) == [7]  # which notes that it is used
        filled(range(100), "d", most=3 * size + 100)
        left = {name for name in "abcd" if found(Store("features", {"of": name}, MUCH), [7]) == [7]}
        assert left == {"a", "c", "d"}
        (line,) = caplog.messages
        assert "used longest ago" in line
        assert sum(row["bytes"] for row in contents()) <= 3 * size + 100

    def test_what_is_larger_than_all_may_be_is_not_written(self, caplog):
        store = Store("features", {}, 1000)
        assert not store.write([key(0)], torch.zeros(1, 500))
        assert not store.write([key(1)], torch.zeros(1, 500))
        assert len(caplog.messages) == 1
        assert contents() == []

    def test_what_a_killed_process_left_goes(self, cache):
        store = filled(range(3))
        old, new = store.folder / ".x.1.partial", store.folder / ".y.2.partial"
        for file, age in ((old, 7200), (new, 0)):
            file.write_bytes(b"x")
            os.utime(file, (time.time() - age,) * 2)
        filled([9])
        assert not old.exists()
        assert new.exists()


def test_many_small_files_are_joined_and_nothing_is_lost():
    for number in range(module.MANY + 5):
        store = filled([number])
    assert len(list(store.folder.iterdir())) == 5
    assert found(store, range(module.MANY + 5)) == list(range(module.MANY + 5))


def test_a_file_that_is_joined_by_another_process_meanwhile(monkeypatch):
    for number in range(3):
        store = filled([number])
    before, files = module._files(store.folder), module._files
    monkeypatch.setattr(module, "MANY", 1)
    store._join()  # as another process does after this one has listed the files
    lists = iter([before])
    monkeypatch.setattr(module, "_files", lambda folder: next(lists, None) or files(folder))
    assert found(store, range(3)) == [0, 1, 2]
    assert len(files(store.folder)) == 1


@pytest.mark.parametrize("where", ["", "/proc/nowhere", "~nobody-of-this-name/x", "file"])
def test_nowhere_to_keep_them(where, monkeypatch, tmp_path, caplog):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("KSHOT_CACHE", str(tmp_path / "file") if where == "file" else where)
    store = Store("features", {}, MUCH)
    for _ in range(2):
        assert not store.write([key(0)], torch.zeros(1, 2))
        assert store.find([key(0)]) == [None]
    assert len(caplog.messages) == (1 if where in ("/proc/nowhere", "file") else 0)
    assert contents() == []
    assert clear() == 0


def test_a_full_disk_costs_a_line(monkeypatch, caplog):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("kshot.files.os.fsync", full)
    store = Store("features", {}, MUCH)
    for number in range(3):
        assert not store.write([key(number)], torch.zeros(1, 2))
    assert "No space left" in caplog.text
    assert len(caplog.messages) == 1
    assert list(store.folder.iterdir()) == []


def test_what_is_kept_can_be_seen_and_deleted(cache):
    filled(range(3), "a")
    filled(range(3, 7), "a")
    filled(range(5), "b")
    rows = {json.loads(row["context"])["of"]: row for row in contents()}
    assert {name: (row["kind"], row["files"], row["rows"]) for name, row in rows.items()} == {
        "a": ("features", 2, 7),
        "b": ("features", 1, 5),
    }
    there = sum(file.stat().st_size for file in cache.rglob("*") if file.is_file())
    assert sum(row["bytes"] for row in rows.values()) == there
    assert clear() == there
    assert contents() == []
    assert not cache.exists()


WRITER = """
import os, sys, torch
from kshot.store import Store
key = lambda n: f"{n * 0x9E3779B97F4A7C15 % 2**64:016x}"
def write(first):
    for turn in range(int(sys.argv[1])):
        numbers = range(first + 10 * turn, first + 10 * turn + 10)
        store = Store("features", {"of": "x"}, 10**9)
        store.write([key(n) for n in numbers], torch.tensor([[n, n + 1] for n in numbers]).float())
        for n, row in zip(numbers, store.find([key(n) for n in numbers])):
            assert row is not None and int(row[0]) == n
        print(turn, flush=True)
print("started", flush=True)
sys.stdin.readline()
mine, *others = map(int, sys.argv[2:])
for first in others:
    if not os.fork():
        mine, others = first, []
        break
write(mine)
sys.exit(any([os.wait()[1] for _ in others]))
"""


def writers(turns: int, *firsts: int) -> subprocess.Popen:
    """Processes that have loaded what they need, one for each first number, and write once a line is given to them."""
    command = [sys.executable, "-c", WRITER, str(turns), *map(str, firsts)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "started\n"
    return process


def test_processes_may_write_the_same_and_other_rows_at_one_moment(caplog):
    turns = module.MANY + 8  # joined meanwhile
    process = writers(turns, 0, 0, 5000)
    assert process.communicate("\n", timeout=200)[0].count("\n") == 3 * turns
    assert process.returncode == 0
    store = Store("features", {"of": "x"}, MUCH)
    numbers = [*range(10 * turns), *range(5000, 5000 + 10 * turns)]
    assert found(store, numbers) == numbers
    assert caplog.messages == []
    assert not list(store.folder.glob(".*"))


def test_a_killed_writer_leaves_nothing_that_is_read(caplog):
    process = writers(100_000, 0)
    process.stdin.write("\n")
    process.stdin.flush()
    turns = int(process.stdout.readline())
    timer = threading.Timer(0.3, process.send_signal, [signal.SIGKILL])
    timer.start()
    for line in process.stdout:
        turns = int(line)
    process.wait(timeout=100)
    timer.join()
    assert process.returncode == -signal.SIGKILL
    store = Store("features", {"of": "x"}, MUCH)
    numbers = list(range(10 * (turns + 3)))
    rows = found(store, numbers)
    assert rows[: 10 * (turns + 1)] == numbers[: 10 * (turns + 1)]
    assert all(row in (None, number) for row, number in zip(rows, numbers, strict=True))
    assert caplog.messages == []


def test_half_a_write_is_never_read():
    """Whatever of a file a killed process had written lies under a name that nobody reads."""
    store = filled(range(50))
    (file,) = store.folder.iterdir()
    whole = file.read_bytes()
    for size in range(0, len(whole), 101):
        (store.folder / f".{file.name}.{size}.partial").write_bytes(whole[:size])
    file.unlink()
    assert found(store, range(50)) == [None] * 50
