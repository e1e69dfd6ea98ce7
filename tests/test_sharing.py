"""Model cards, and runs on a hub that answers on loopback."""

import json
import shutil
import sys

import pytest
import torch
import yaml
from command_line import WHOLE, fit, refused
from fake_hub import TOKEN, fake_hub
from huggingface_hub import ModelCard, constants

from kshot.cli import main
from kshot.errors import UserError
from kshot.opening import open_run
from kshot.predictions import read
from kshot.seeing.card import card
from kshot.seeing.hub import check_kinds, located, without_paths
from kshot.seeing.runs import result_of


@pytest.fixture(scope="module")
def tested(tmp_path_factory):
    return fit(tmp_path_factory.mktemp("runs"), "--config", "methods/gda.yaml", *WHOLE)


@pytest.fixture
def hub(monkeypatch, tmp_path):
    with fake_hub() as server:
        template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, server.endpoint)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)  # made of the address at its import
        monkeypatch.setattr(constants, "ENDPOINT", server.endpoint)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        for name in ("HTTP_PROXY", "http_proxy", "HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"):
            monkeypatch.delenv(name, raising=False)
        yield server


def images(module):
    generator = torch.Generator().manual_seed(0)
    size = module.backbone.image_size
    return torch.randint(0, 256, (3, 3, size, size), dtype=torch.uint8, generator=generator)


def test_what_was_pushed_opens_elsewhere_and_answers_the_same(tested, hub, capsys):
    main_ends(["push", str(tested), "me/digits", "--license", "apache-2.0", "--private"])
    assert 'kshot.load("hf://me/digits")' in capsys.readouterr().out
    asked = hub.created[0]  # of which the library's releases have told in two ways
    assert asked.get("private") or asked.get("visibility") == "private"
    assert set(hub.repositories["me/digits"]) == {"README.md", "config.yaml", "result.json", "tuned.safetensors"}
    there, here = open_run("hf://me/digits"), open_run(tested)
    assert there.directory != here.directory
    assert there.header == here.header
    with torch.inference_mode():
        torch.testing.assert_close(there.module(images(there.module)), here.module(images(here.module)), rtol=0, atol=0)
    again = len(hub.asked)
    assert located("hf://me/digits@main").is_dir()
    assert not [line for line in hub.asked[again:] if line.startswith("GET") and "/resolve/" in line], "it is kept"


def main_ends(words):
    with pytest.raises(SystemExit) as end:
        main(words)
    assert end.value.code == 0


def test_a_repository_that_is_there_stays_as_it_is(tested, hub, capsys):
    hub.repositories["me/digits"] = {"README.md": b"mine"}
    assert "me/digits is there already" in refused(capsys, ["push", str(tested), "me/digits"])
    assert hub.repositories["me/digits"] == {"README.md": b"mine"}


def test_who_is_not_logged_in_is_told_so(tested, hub, capsys, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "another")
    assert "log in first" in refused(capsys, ["push", str(tested), "me/digits"])
    assert hub.repositories == {}


def test_predictions_go_along_only_where_that_is_asked_for(tested, hub, tmp_path):
    main_ends(["push", str(tested), "me/all", "--predictions"])
    assert hub.repositories["me/all"]["predictions.parquet"] == (tested / "predictions.parquet").read_bytes()
    main_ends(["show", "hf://me/all", "--out", str(tmp_path / "page"), "--map", "none", "--errors", "2"])
    assert "GDA on digits" in (tmp_path / "page" / "index.html").read_text()


def test_no_path_of_this_machine_leaves_it(tested, hub, tmp_path, capsys):
    moved = tmp_path / "run"
    shutil.copytree(tested, moved)
    config = yaml.safe_load((moved / "config.yaml").read_text())
    config["data"]["init_args"]["root"] = "/home/someone/data"
    (moved / "config.yaml").write_text(yaml.safe_dump(config))
    main_ends(["push", str(moved), "me/digits"])
    assert "/home/someone/data" in capsys.readouterr().err, "it is said what is left out"
    sent = hub.repositories["me/digits"]
    assert not [name for name, content in sent.items() if b"someone" in content or str(tmp_path).encode() in content]
    assert yaml.safe_load(sent["config.yaml"])["data"]["init_args"]["root"] == "data"


def test_absolute_paths_of_any_system_lose_their_folders():
    kept = [
        "kept/as/it.is",
        "image.*.q",
        "a / b",
        "hf-hub:org/name",
        "https://a.b/c/d",
        "and/or",
        "1/2 of it",
        "../a/b",
    ]
    given = {"a": ["/x/y", "~/p/q.pt", "C:\\u\\v", "/my photos/of cats/", "/data", *kept], "b": {"c": 3}}
    assert without_paths(given) == {"a": ["y", "q.pt", "v", "of cats", "data", *kept], "b": {"c": 3}}
    said = "/home/me/photos has changed: see '/home/me/a.csv', (~/b/c) and C:\\d\\e."
    assert without_paths(said) == "photos has changed: see 'a.csv', (c) and e."


@pytest.fixture
def trap(tmp_path, monkeypatch):
    """A module of the machine that notices when it is imported."""
    (tmp_path / "trapped_module.py").write_text("raise SystemError('code was run')\n")
    monkeypatch.syspath_prepend(tmp_path)
    yield "trapped_module"
    assert "trapped_module" not in sys.modules


@pytest.mark.parametrize("place", ["classifier", "callbacks", "short"])
def test_loading_imports_nothing_that_a_config_names(tested, hub, trap, place):
    config = yaml.safe_load((tested / "config.yaml").read_text())
    if place == "classifier":
        config["model"]["init_args"]["classifier"] = {"class_path": f"{trap}.Head", "init_args": {}}
    elif place == "short":
        config["model"]["init_args"]["adapter"] = f"{trap}.Tuning"
    else:
        config["trainer"]["callbacks"] = [{"class_path": f"{trap}.Callback"}]
    files = {name: (tested / name).read_bytes() for name in ("tuned.safetensors", "result.json")}
    hub.repositories["someone/bad"] = files | {"config.yaml": yaml.safe_dump(config).encode()}
    with pytest.raises(UserError, match=rf"names {trap}\.\w+, which is not kshot's"):
        open_run("hf://someone/bad")


def test_only_what_a_run_is_made_of_is_fetched(tested, hub):
    files = {name: (tested / name).read_bytes() for name in ("tuned.safetensors", "result.json", "config.yaml")}
    hub.repositories["someone/run"] = files | {"kshot.py": b"raise SystemError", "last.ckpt": b"x", "setup.py": b"x"}
    fetched = located("hf://someone/run")
    assert sorted(file.name for file in fetched.iterdir()) == sorted(files)
    assert not [line for line in hub.asked if "kshot.py" in line or "last.ckpt" in line]


def test_a_damaged_file_from_the_hub_is_noticed(tested, hub):
    files = {name: (tested / name).read_bytes() for name in ("tuned.safetensors", "result.json", "config.yaml")}
    weights = bytearray(files["tuned.safetensors"])
    weights[-5] ^= 1
    hub.repositories["someone/run"] = files | {"tuned.safetensors": bytes(weights)}
    with pytest.raises(UserError, match="damaged"):
        open_run("hf://someone/run")


def test_what_is_not_there_gets_one_line(hub, tmp_path, capsys):
    hub.repositories["someone/other"] = {"model.safetensors": b"x"}
    with pytest.raises(UserError, match="is no run of kshot"):
        located("hf://someone/other")
    with pytest.raises(UserError, match=r"hf://no/body could not be fetched"):
        located("hf://no/body")
    with pytest.raises(UserError, match="is no address of a run"):
        located("hf://only-one")
    assert "is no name of a repository" in refused(capsys, ["push", str(tmp_path), "one"])
    assert "is no finished run" in refused(capsys, ["push", str(tmp_path), "me/run"])


def test_a_hub_out_of_reach_gets_one_line(monkeypatch, tmp_path, tested, capsys):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert "could not be pushed" in refused(capsys, ["push", str(tested), "me/digits"])
    with pytest.raises(UserError, match="could not be fetched, and is not in the cache"):
        located("hf://me/digits")


def test_configs_name_what_is_kshots_own():
    check_kinds({"a": "kshot.adapters.LoRA", "b": ["vit_small_patch14_dinov2.lvd142m", "image.3.q", "x.json"]}, "x")
    for bad in ("os.path", "subprocess.Popen", "__main__.X", "numpy.ndarray"):
        with pytest.raises(UserError, match="which is not kshot's"):
            check_kinds({"a": [{"b": bad}]}, "x")


class TestCard:
    def test_the_hub_reads_its_header(self, tested):
        read_back = ModelCard(card(result_of(tested), read(tested), "mit", "cc-by-4.0")).data
        assert (read_back.license, read_back.library_name) == ("mit", "kshot")
        (result,) = read_back.eval_results
        assert result.metric_value == pytest.approx(result_of(tested)["acc"], abs=1e-4)
        assert result.dataset_name == "digits"

    def test_it_tells_what_the_run_was(self, tested):
        result = result_of(tested)
        told = card(result, read(tested), "", "cc-by-4.0")
        for part in (
            result["split"]["digest"],
            "2 a class (coop-v1)",
            "95 % interval",
            "ECE",
            "cc-by-4.0",
            "not stated",
        ):
            assert part in told

    def test_names_break_no_table(self, tested):
        result = result_of(tested) | {"dataset": "a|b <script>\n---"}
        told = card(result, read(tested))
        assert "a\\|b &lt;script> ---" in told
        assert ModelCard(told).data.library_name == "kshot"

    def test_a_run_that_was_not_tested_has_one(self, tested):
        told = card(json.loads((tested / "result.json").read_text()) | {"acc": None}, None)
        assert "| accuracy | not tested |" in told
        assert ModelCard(told).data.eval_results is None
