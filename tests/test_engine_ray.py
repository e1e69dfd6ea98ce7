"""Studies on Ray: what is refused in a line, and, marked slow, a cluster of two nodes of which one is lost."""

import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import processes
import pytest
from studies import HEAD, outcome, planned, records

from kshot.errors import UserError
from kshot.studies import engine_ray
from kshot.studies.engines import EngineSettings, start
from kshot.studies.worker import work

GRID = "grid: {method: [ridge, coop], dataset: [digits], shots: [1, 2], seed: [1, 2, 3], trainer.max_epochs: [200]}\n"
RUNS = 12
MAIN = Path(__file__).parents[1] / "main.py"


@pytest.fixture(name="installed")
def _installed(monkeypatch):
    """Ray counts as installed; nothing of it is loaded before the options are right."""
    monkeypatch.setattr(engine_ray, "find_spec", lambda name: name)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"adress": "auto"}, "no option 'adress'. Did you mean 'address'"),
        ({"address": "ray://head:10001"}, "address is HOST:PORT or auto"),
        ({"address": "head"}, "address is HOST:PORT or auto"),
        ({"address": "127.0.0.1:99999"}, "127.0.0.1:99999 is out of reach"),
        ({"gpus_per_worker": "1.5"}, "gpus_per_worker is a share of one"),
        ({"gpus_per_worker": "-1"}, "gpus_per_worker is a share of one"),
        ({"gpus_per_worker": "half"}, "gpus_per_worker is a share of one"),
        ({"gpus_per_worker": "inf"}, "gpus_per_worker is a share of one"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_wrong_options_are_told_in_a_line(tmp_path, installed, options, told):
    with pytest.raises(UserError, match=re.escape(told)):
        start("ray", tmp_path, EngineSettings(runs=4, options=options))


def test_a_cluster_where_nothing_listens_is_told_in_a_line(tmp_path, installed):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))  # and does not listen
        address = f"127.0.0.1:{other.getsockname()[1]}"
        with pytest.raises(UserError, match=rf"^The Ray cluster {address} is out of reach \(.*refused"):
            start("ray", tmp_path, EngineSettings(runs=4, options={"address": address}))


def test_a_missing_extra_is_told_in_a_line(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UserError, match=r"pip install 'kshot\[ray\]'"):
        start("ray", tmp_path, EngineSettings(runs=4))


class Cluster:
    """Nodes of a Ray cluster on this machine, each with a core, in process groups of their own."""

    def __init__(self, folder, monkeypatch):
        monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        monkeypatch.setenv("RAY_AUTH_MODE", "token")  # with one of its own: Ray writes none into the home of the user
        monkeypatch.setenv("RAY_AUTH_TOKEN", "0123456789abcdef" * 4)
        self.folder, self.nodes = Path(folder), []
        own = ["--head", "--port=0", f"--temp-dir={folder}", "--include-dashboard=false", "--disable-usage-stats"]
        self.address = re.search(r"--address='([^']+)'", self.add(*own))[1]

    def add(self, *words, **environment):
        """Starts a node; gives what it says."""
        words = words or [f"--address={self.address}"]
        ray = [sys.executable, "-c", "from ray.scripts.scripts import main; main()", "start", "--block"]
        more = ["--num-cpus=1", "--object-store-memory=80000000", "--include-log-monitor=false"]
        file = self.folder / f"node{len(self.nodes)}.log"
        with file.open("w") as log:
            where = {"cwd": self.folder, "env": os.environ | environment, "stdin": subprocess.DEVNULL}
            node = subprocess.Popen([*ray, *more, *words], stdout=log, stderr=log, start_new_session=True, **where)
        self.nodes.append(node)
        until = time.monotonic() + 300
        while "Ray runtime started" not in file.read_text():
            assert node.poll() is None, file.read_text()
            assert time.monotonic() < until, file.read_text()
            time.sleep(0.2)
        return file.read_text()

    def kill(self, node):
        """Takes a node away, with all that runs on it."""
        os.killpg(node.pid, signal.SIGKILL)
        node.wait()


@pytest.fixture(name="cluster")
def _cluster(monkeypatch):
    pytest.importorskip("ray")
    with tempfile.TemporaryDirectory(prefix="k", dir="/tmp", ignore_cleanup_errors=True) as folder:  # short: of sockets
        made = Cluster(folder, monkeypatch)
        try:
            yield made
        finally:
            for node in made.nodes:
                if node.poll() is None:
                    made.kill(node)


@pytest.fixture(name="whole", scope="module")
def _whole(tmp_path_factory):
    """What a study becomes that nothing disturbs."""
    study = planned(tmp_path_factory.mktemp("whole"), HEAD + GRID)
    processes.in_children(1, lambda: work(study))
    assert len(records(study)) == RUNS
    return outcome(study)


def sweeping(folder, *words):
    """A sweep of the study as a program, and the directory of the study."""
    (folder / "tiny.yaml").write_text(HEAD + GRID)
    command = [sys.executable, str(MAIN), "sweep", "--config", "tiny.yaml", *words]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, cwd=folder, start_new_session=True, **pipes), folder / "studies" / "tiny"


def until(holds, process, seconds=300):
    """Waits until something holds while a program runs."""
    end = time.monotonic() + seconds
    while not (found := holds()):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end
        time.sleep(0.05)
    return found


def owners(study):
    """Who has a claim on a run now."""
    texts = [file.read_text() for file in study.glob("claims/*")]
    return {found[1] for text in texts if (found := re.search(r'"worker": "([^"]+)"', text))}


def computed(study):
    """How often runs were brought to an end."""
    return len(list(study.glob("runs/*/*/result.json")))


@pytest.mark.slow
def test_a_lost_node_changes_nothing(tmp_path, cluster, whole):
    cluster.add()
    sweep, study = sweeping(tmp_path, "--engine", "ray", "--engine-option", f"address={cluster.address}")
    until(lambda: len(owners(study)) == 2 and records(study), sweep)
    cluster.kill(cluster.nodes[1])
    out, err = sweep.communicate(timeout=400)
    assert sweep.returncode == 0, err
    assert f"{RUNS} of {RUNS} done" in out
    assert re.search(r"^The node \S+ \(\S+\) is lost: others take its runs\.$", err, flags=re.MULTILINE), err
    assert outcome(study) == whole
    assert computed(study) <= RUNS + len(list(study.glob("deaths/*")))
    assert not owners(study)


@pytest.mark.slow
def test_a_node_with_another_version_takes_no_run_and_the_others_go_on(tmp_path, cluster, whole):
    path = os.pathsep.join([str(tmp_path / "site"), os.environ.get("PYTHONPATH", "")])
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text("import kshot\nkshot.__version__ = '0.0.1'\n")
    cluster.add(PYTHONPATH=path)
    sweep, study = sweeping(tmp_path, "--engine", "ray", "--engine-option", f"address={cluster.address}")
    _, err = sweep.communicate(timeout=400)
    assert sweep.returncode == 0, err
    (line,) = [line for line in err.splitlines() if "takes no run" in line]
    assert re.match(r"The node \S+ \(\S+\) takes no run: .* and this is kshot 0\.0\.1 ", line)
    assert outcome(study) == whole
    assert len({record["worker"] for record in records(study).values()}) == 1


@pytest.mark.slow
def test_two_engines_at_once_share_the_runs_and_a_worker_that_is_killed_is_replaced(tmp_path, cluster, whole):
    local, study = sweeping(tmp_path, "--workers", "1")
    ray, _ = sweeping(tmp_path, "--engine", "ray", "--engine-option", f"address={cluster.address}")
    until(lambda: len(owners(study)) == 2, ray)
    (actor,) = actors(cluster)
    os.kill(actor, signal.SIGKILL)
    out, err = ray.communicate(timeout=400)
    local_out, local_err = local.communicate(timeout=400)
    assert (ray.returncode, local.returncode) == (0, 0), err + local_err
    assert f"{RUNS} of {RUNS} done" in out
    assert f"{RUNS} of {RUNS} done" in local_out
    assert re.search(r"^A worker on \S+ \(\S+\) died, and another takes its place\.$", err, flags=re.MULTILINE), err
    assert outcome(study) == whole
    assert computed(study) <= RUNS + len(list(study.glob("deaths/*")))


def actors(cluster):
    """The processes of workers on this machine that belong to a cluster."""
    listed = subprocess.run(["ps", "-ww", "-eo", "pid=,ppid=,args="], capture_output=True, text=True).stdout
    processes = [line.split(None, 2) for line in listed.splitlines()]
    nodes = {pid for pid, _, args in processes if "/raylet " in args and str(cluster.folder) in args}
    return [int(pid) for pid, parent, args in processes if parent in nodes and args.startswith("ray::Actor")]


@pytest.mark.slow
def test_a_head_that_dies_ends_the_sweep_in_a_line_and_another_goes_on(tmp_path, cluster, whole):
    sweep, study = sweeping(tmp_path, "--engine", "ray", "--engine-option", f"address={cluster.address}")
    until(lambda: records(study), sweep)
    cluster.kill(cluster.nodes[0])
    _, err = sweep.communicate(timeout=400)
    assert sweep.returncode == 2
    assert re.search(
        rf"^error: The Ray cluster {cluster.address} is gone: .* Go on with: python main\.py sweep ", err
    ), err
    local, _ = sweeping(tmp_path, "--workers", "1")
    local.communicate(timeout=400)
    assert local.returncode == 0
    assert outcome(study) == whole


@pytest.mark.slow
def test_without_an_address_a_cluster_is_started_of_which_nothing_stays(tmp_path, whole, monkeypatch):
    pytest.importorskip("ray")
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    before = set(Path("/tmp").glob("ray*"))
    sweep, study = sweeping(tmp_path, "--engine", "ray", "--workers", "2")
    until(lambda: len(owners(study)) == 2, sweep)
    sweep.send_signal(signal.SIGINT)
    _, err = sweep.communicate(timeout=240)
    assert sweep.returncode == 130
    assert "Go on with: python main.py sweep --config tiny.yaml --engine ray --workers 2" in err
    assert not owners(study), "what was begun is given back"
    assert not list(study.glob("deaths/*"))
    sweep, study = sweeping(tmp_path, "--engine", "ray", "--workers", "2")
    _, err = sweep.communicate(timeout=400)
    assert sweep.returncode == 0, err
    assert outcome(study) == whole
    assert computed(study) == RUNS
    assert set(Path("/tmp").glob("ray*")) <= before
    assert not (home / ".ray").exists()
