"""Files that mean harm run nothing, leave their folder nowhere, and are answered soon and in little memory."""

import resource
import time

import pytest
from hostile import HARMLESS, MAKERS

from kshot.cli import main


@pytest.mark.parametrize("name", MAKERS)
def test_a_hostile_file(name, tmp_path, monkeypatch, capsys):
    here, work = tmp_path / "here", tmp_path / "work"
    here.mkdir()
    work.mkdir()
    words = MAKERS[name](here)
    monkeypatch.chdir(work)
    before, clock = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    try:
        main(words)
        code = 0
    except SystemExit as end:
        code = end.code
    seconds = time.process_time() - clock
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert not (here / "PWNED").exists(), "it ran"
    assert not list(tmp_path.glob("PWNED*"))
    lines = capsys.readouterr().err.strip().splitlines()
    if name not in HARMLESS:
        assert code == 2
        assert len(lines) == 1
        assert lines[0].startswith("error: ")
        assert not (work / "runs").exists()
    assert seconds < 30  # about one is usual: what it can cost are minutes
    assert grown < 500_000
