"""The runs of a study, or of any folder of runs, as one table that is quick to ask.

A study's table lies in ``index.sqlite``. It is made from ``plan.jsonl``, ``done/``, ``failed/`` and the runs'
``result.json``, brought up to date whenever it is opened, and made anew where it is missing or of another kind. A file
is never written into: a process reads all of it, and puts a new one in its place when something has changed. So any
number of processes may read and update it, on file systems without locks too; who comes last wins, and what he did not
know the next one adds.
"""

from __future__ import annotations

import json
import os
import sqlite3
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from kshot.errors import UserError, first_line, nearest_first
from kshot.files import write_atomically
from kshot.seeing.runs import inner, result_of, run_folders, told_by, warn, written
from kshot.studies.claims import HEADER, PLAN

FORMAT = 1
FILE, RESULTS, RUNS = "index.sqlite", ("failed", "done"), "runs"  # done counts where both are there
KEYS = ("method", "dataset", "backbone", "protocol", "shots", "seed")  # what is compared
TOLD = tuple(told_by({}))  # what a run tells
OWN = ("id", "stamp", "state", "axes", "run", "reason")
MANY = 5000  # results whose reading is announced
SHOWN = 3  # lines of one kind
Condition = tuple[str, str, Sequence[Any]]  # a column, an operator, values
COMPARED = {"<": "<", "<=": "<=", ">": ">", ">=": ">="}


def rows(study: Path) -> list[dict[str, Any]]:
    """All runs of a study, in the order of its plan, or of a folder of runs; None where a run does not tell.

    Columns: ``id``, ``state`` (done, failed, open), what is compared and each axis of the study by its name, figures in
    the units of ``result.json``, ``run`` (the directory, relative to the study) and ``reason`` of a failure.

    Raises:
        UserError: there is no such folder.
    """
    index = opened(study)
    for note in index.notes:
        warn(note)
    return [dict(zip(index.columns, row, strict=True)) for row in index.select(index.columns)]


class Index:
    """A table of runs.

    Attributes:
        connection: to the tables ``plan`` (id, position, axes) and ``runs`` (what was found), in memory.
        axes: of the study, by name, in their order; none for a folder of runs.
        columns: of a row, by name, in their order.
        notes: what could not be read or kept, a line each.
    """

    def __init__(self, connection: sqlite3.Connection, notes: list[str]) -> None:
        self.connection, self.notes = connection, notes
        self.axes: list[str] = json.loads(meta(connection)["axes"])
        axis = {name: f"plan.a{i}" for i, name in enumerate(self.axes)}
        found = {name: f"runs.{name}" for name in (*TOLD, "run", "reason")}
        both = {name: f"coalesce({axis[name]}, {found[name]})" for name in KEYS if name in axis}
        self.terms = {"id": "plan.id", "state": "coalesce(runs.state, 'open')"}
        self.terms |= {name: found[name] for name in KEYS} | axis | found | both
        self.columns = tuple(self.terms)

    def select(
        self, columns: Sequence[str], where: Sequence[Condition] = (), sort: Sequence[str] = (), reverse: bool = False
    ) -> list[tuple[Any, ...]]:
        """Some columns of the runs that meet all conditions, in the order of the plan or sorted, unknown values last.

        Raises:
            UserError: there is no such column.
        """
        conditions, values = [condition(self.term(name), how, given) for name, how, given in where], []
        for _, given in conditions:
            values += given
        which = f"WHERE {' AND '.join(text for text, _ in conditions)}" if conditions else ""
        down = "DESC" if reverse else "ASC"
        order = ", ".join([f"{t} IS NULL, {t} {down}" for t in map(self.term, sort)] + ["plan.position"])
        what = ", ".join(map(self.term, columns))
        asked = f"SELECT {what} FROM plan LEFT JOIN runs ON runs.id = plan.id {which} ORDER BY {order}"
        return self.connection.execute(asked, values).fetchall()

    def values(self, column: str) -> list[Any]:
        """What a column holds, each once."""
        asked = f"SELECT DISTINCT {self.term(column)} FROM plan LEFT JOIN runs ON runs.id = plan.id"
        return [value for (value,) in self.connection.execute(asked) if value is not None]

    def term(self, name: str) -> str:
        """A column in SQL; raises UserError where there is none of that name."""
        if name not in self.terms:
            raise UserError(f"There is no column {name!r:.200}. {nearest_first(name, self.terms, len(self.terms))}")
        return self.terms[name]


def condition(term: str, how: str, given: Sequence[Any]) -> tuple[str, list[Any]]:
    """A condition in SQL, with its values; a run that does not tell meets none.

    ``=`` and ``!=`` take several values; ``~`` is for a part of a text, in any case; others compare numbers with
    numbers and text with text.
    """
    if how in ("=", "!="):
        return f"{term} {'NOT ' * (how == '!=')}IN ({', '.join('?' * len(given))})", list(given)
    if how == "~":
        return f"instr(lower({term}), lower(?)) > 0", [str(given[0])]
    kinds = "'text'" if isinstance(given[0], str) else "'integer', 'real'"
    return f"(typeof({term}) IN ({kinds}) AND {term} {COMPARED[how]} ?)", [given[0]]


def opened(folder: Path) -> Index:
    """The table of a study, as its files are now, or of a folder of runs, which is kept nowhere.

    Raises:
        UserError: there is no such folder.
    """
    if not folder.is_dir():
        raise UserError(f"There is no study and no folder of runs {folder}.")
    notes: list[str] = []
    if not is_study(folder):
        connection = empty()
        add(connection, found_runs(folder, notes.append))
        plan_of_runs(connection)
        return Index(connection, shortened(notes))
    connection = kept(folder / FILE) or empty()
    if brought_up_to_date(connection, folder, notes.append):
        content = connection.serialize()
        try:
            write_atomically(folder / FILE, lambda file: file.write_bytes(content))
        except UserError as error:
            notes.append(f"The index is kept in memory only: {error}")
    outside = int(meta(connection)["outside"])
    if outside:
        notes.append(f"left out: {outside:,} runs in {folder} that its plan no longer has")
    return Index(connection, shortened(notes))


def is_study(folder: Path) -> bool:
    """Whether a folder is laid out as a study's."""
    return (folder / PLAN).is_file() or (folder / HEADER).is_file()


def shortened(notes: list[str]) -> list[str]:
    """Some lines, and how many there are more."""
    return notes[:SHOWN] + [f"... and {len(notes) - SHOWN:,} more such lines"] * (len(notes) > SHOWN)


def kept(file: Path) -> sqlite3.Connection | None:
    """The table in a file; None where there is none that this kshot has written whole."""
    connection = sqlite3.connect(":memory:")
    try:
        connection.deserialize(
            file.read_bytes() or b"?"
        )  # of nothing it makes no database, and no sqlite3.Error either
        if connection.execute("PRAGMA quick_check").fetchall() == [("ok",)] and meta(connection)["format"] == kind():
            return connection
    except (OSError, sqlite3.Error, KeyError):
        pass
    connection.close()
    return None


def kind() -> str:
    """What a table of this kshot says of its format."""
    return json.dumps([FORMAT, *OWN, *TOLD])


def empty() -> sqlite3.Connection:
    """A table of no runs."""
    connection = sqlite3.connect(":memory:")
    connection.execute("CREATE TABLE meta (name TEXT PRIMARY KEY, value TEXT)")
    connection.execute("CREATE TABLE plan (position INTEGER PRIMARY KEY, id TEXT)")
    connection.execute(f"CREATE TABLE runs (id TEXT PRIMARY KEY, {', '.join([*OWN[1:], *TOLD])}) WITHOUT ROWID")
    told(connection, format=kind(), axes="[]", plan="", outside="0")
    return connection


def meta(connection: sqlite3.Connection) -> dict[str, str]:
    """What a table says of itself."""
    return dict(connection.execute("SELECT name, value FROM meta"))


def told(connection: sqlite3.Connection, **values: str) -> None:
    """Has a table say something of itself."""
    connection.executemany("INSERT OR REPLACE INTO meta VALUES (?, ?)", values.items())


def brought_up_to_date(connection: sqlite3.Connection, study: Path, note: Callable[[str], None]) -> bool:
    """Reads what is new in a study's files, and forgets what is gone; whether anything was."""
    here, before = stamps(study), dict(connection.execute("SELECT id, stamp FROM runs"))
    there = set(os.listdir(study / RUNS)) if (study / RUNS).is_dir() else set()  # noqa: PTH208  names are enough
    new = set() if here == before else {id for id, stamp in here.items() if before.get(id) != stamp}
    lost = {(id,) for id in here.keys() - there}  # of which only those that were done had a folder
    asked = "SELECT id FROM runs WHERE state = 'done' AND id = ?"
    new |= {id for each in lost for (id,) in connection.execute(asked, each)}
    if len(new) >= MANY:
        warn(f"Reading {len(new):,} results of {study} ...")
    gone = before.keys() - here.keys()
    connection.executemany("DELETE FROM runs WHERE id = ?", ((id,) for id in gone))
    add(connection, (published(study, id, here[id], note) for id in here if id in new))
    plan = str(stamp_of(study / PLAN))
    replan = plan != meta(connection)["plan"]
    if replan or ((new or gone) and not (study / PLAN).is_file()):
        if (study / PLAN).is_file():
            make_plan(connection, planned(study / PLAN, note))
        else:
            plan_of_runs(connection)
        told(connection, plan=plan)
        replan = True
    if new or gone or replan:
        (outside,) = connection.execute("SELECT count(*) FROM runs WHERE id NOT IN (SELECT id FROM plan)").fetchone()
        told(connection, outside=str(outside))
    connection.commit()
    return bool(new or gone or replan)


def stamps(study: Path) -> dict[str, int]:
    """What each run's record is known by: another number for another state, file, size or time."""
    found = {}
    for state in RESULTS:
        try:
            entries = os.scandir(study / state)
        except FileNotFoundError:
            continue
        with entries:
            for entry in entries:
                name, end = entry.name[:-5], entry.name[-5:]
                if end == ".json" and name[:1] != ".":
                    try:
                        stat = entry.stat()
                    except FileNotFoundError:  # gone since
                        continue
                    found[name] = hash((state == "done", stat.st_mtime_ns, stat.st_size, stat.st_ino))
    return found


def stamp_of(file: Path) -> int | None:
    """The same of one file; None where there is none."""
    try:
        stat = file.stat()
    except FileNotFoundError:
        return None
    return hash((stat.st_mtime_ns, stat.st_size, stat.st_ino))


def published(study: Path, id: str, stamp: int, note: Callable[[str], None]) -> dict[str, Any]:
    """The row of a run that was published, by its record and, where it is done, its result.

    A run whose files cannot be read counts as failed, and is looked at again each time.
    """
    done, record = study / "done" / f"{id}.json", {}
    state = "done" if done.is_file() else "failed"
    try:
        record = json.loads((study / state / f"{id}.json").read_text(encoding="utf-8"))
        about = {"id": id, "stamp": stamp, "state": state, "axes": json.dumps(dict(record["axes"]))}
        if state == "failed":
            return about | {"reason": record.get("reason"), "finished": record.get("finished")}
        row = told_by(result_of(study / record["run"]))
        return about | row | {"run": record["run"], "finished": row["finished"] or record.get("finished")}
    except (OSError, ValueError, LookupError, TypeError, UserError) as error:
        record_file = study / state / f"{id}.json"
        why = str(error) if isinstance(error, UserError) else f"{record_file} cannot be read ({first_line(error)})."
        note(f"{why} The run counts as failed.")
        axes = inner(record, "axes") if isinstance(record, dict) else {}
        return {"id": id, "stamp": None, "state": "failed", "axes": json.dumps(axes), "reason": why}


def found_runs(folder: Path, note: Callable[[str], None]) -> Iterator[dict[str, Any]]:
    """The rows of all finished runs below a folder, or of the one that it is, by their paths from there."""
    for directory in run_folders(folder, note):
        try:
            row = told_by(result_of(directory))
        except UserError as error:
            note(f"left out: {error}")
            continue
        path = directory.relative_to(folder).as_posix()
        more = {"id": path, "run": path, "state": "done", "axes": "{}"}
        yield row | more | {"finished": row["finished"] or written(directory)}


def add(connection: sqlite3.Connection, found: Iterable[Mapping[str, Any]]) -> None:
    """Writes rows of runs, in the place of those of the same id."""
    names = [*OWN, *TOLD]
    asked = f"INSERT OR REPLACE INTO runs ({', '.join(names)}) VALUES ({', '.join('?' * len(names))})"
    connection.executemany(asked, ([plain(row.get(name)) for name in names] for row in found))


def planned(file: Path, note: Callable[[str], None]) -> Iterator[tuple[str, dict[str, Any]]]:
    """The runs of a plan: id, and labels by axis."""
    with file.open(encoding="utf-8", errors="backslashreplace") as lines:
        for number, line in enumerate(lines, 1):
            try:
                run = json.loads(line)
                yield str(run["id"]), dict(run["axes"])
            except (ValueError, LookupError, TypeError) as error:
                note(f"left out: line {number} of {file}, which cannot be read ({first_line(error)})")


def plan_of_runs(connection: sqlite3.Connection) -> None:
    """Makes the plan that all runs which are there would have had."""
    found = connection.execute("SELECT id, axes FROM runs ORDER BY id").fetchall()
    make_plan(connection, ((id, json.loads(axes)) for id, axes in found))


def make_plan(connection: sqlite3.Connection, runs: Iterable[tuple[str, dict[str, Any]]]) -> None:
    """Writes the plan anew."""
    whole = dict(runs)
    axes = list(dict.fromkeys(name for labels in whole.values() for name in labels))
    connection.execute("DROP TABLE plan")
    names = ["position INTEGER PRIMARY KEY", "id TEXT", *(f"a{i}" for i in range(len(axes)))]
    connection.execute(f"CREATE TABLE plan ({', '.join(names)})")
    rows = ([i, id, *(plain(labels.get(name)) for name in axes)] for i, (id, labels) in enumerate(whole.items()))
    connection.executemany(f"INSERT INTO plan VALUES (?, ?{', ?' * len(axes)})", rows)
    told(connection, axes=json.dumps(axes))


def plain(value: Any) -> Any:
    """A value as the table has it: numbers and text as they are, ``true``, and others as JSON."""
    if isinstance(value, str):
        return value.encode("utf-8", "backslashreplace").decode()  # names of files need be no UTF-8
    if value is None or isinstance(value, float) or (type(value) is int and abs(value) < 2**63):
        return value
    return json.dumps(value)
