"""The doctor says what is there, asks hubs for a few seconds at most, and notices when a small run fails."""

import json
import urllib.error

import pytest

from kshot import doctor
from kshot.errors import UserError


@pytest.fixture
def online(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr(doctor, "HUBS", ("https://one.invalid", "https://two.invalid"))
    monkeypatch.setattr(doctor, "PATIENCE", 60.0)


def test_it_says_what_is_there_and_that_a_small_run_works(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert doctor.run_doctor(["--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert list(found) == ["versions", "machine", "caches", "disk", "hubs", "self-test"]
    assert found["versions"]["torch"]
    assert found["machine"]["memory"].endswith("GB")
    assert str(tmp_path) in found["disk"]
    assert found["self-test"]["result"] == "ok"
    assert float(found["self-test"]["seconds"]) > 0
    assert all("HF_HUB_OFFLINE" in answer for answer in found["hubs"].values())
    assert list(tmp_path.iterdir()) == []


def test_a_small_run_that_fails_is_told(capsys, monkeypatch):
    def fails(*_):
        raise RuntimeError("no kernel image\nand more")

    monkeypatch.setattr(doctor, "small_run", fails)
    assert doctor.run_doctor() == 1
    assert "failed: RuntimeError: no kernel image\n" in capsys.readouterr().out


def test_a_dead_hub_is_not_waited_for(online, monkeypatch, unanswered):
    monkeypatch.setattr(doctor, "PATIENCE", 0.5)
    assert set(doctor.hubs().values()) == {"no answer within 0.5 s"}
    assert not unanswered


def test_hubs_answer_or_do_not(online, monkeypatch):
    def answer(request, timeout):
        if "one" in request.full_url:
            raise urllib.error.HTTPError(request.full_url, 404, "not here", {}, None)
        raise urllib.error.URLError("no route")

    monkeypatch.setattr("urllib.request.urlopen", answer)
    one, two = doctor.hubs().values()
    assert one == "answers"
    assert "no route" in two


def test_a_cache_is_measured_without_its_links(tmp_path):
    (tmp_path / "blobs").mkdir()
    (tmp_path / "blobs" / "a").write_bytes(b"12345")
    (tmp_path / "link").symlink_to(tmp_path / "blobs" / "a")
    assert doctor.size_of(tmp_path) == 5


def test_it_takes_nothing_else():
    with pytest.raises(UserError, match="doctor takes --json and nothing else, not --jsn"):
        doctor.run_doctor(["--jsn"])
