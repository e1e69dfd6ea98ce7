"""How settings are read and laid over each other, and that a config builds what its places take and runs no code."""

import gc
import json
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch import Trainer
from test_cli import refused
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR, OneCycleLR, ReduceLROnPlateau

from kshot.adapters import Adapter, LoRA
from kshot.classifiers import Classifier, ClassifierFactory, CoOp
from kshot.cli import main
from kshot.config import find_config, load_yaml, read_command_line, read_config, read_word
from kshot.errors import UserError
from kshot.layering import check_stored, lay, plain_value
from kshot.module import FewShotModule
from kshot.optim import DasslCosine, WarmupCosine, make_schedule
from kshot.places import Place, arguments_of, imported, named, place_of, subclasses
from kshot.settings import OPTIONS, settings

ROOT = Path(__file__).parents[1]
FIT = ["fit", "--config", "clip_16shot.yaml"]
MARK = "harm"  # the file that code from a config would leave


def printed(capsys, *options: str) -> dict[str, Any]:
    """The settings that a command line comes to."""
    with pytest.raises(SystemExit) as end:
        main([*FIT, *options, "--print_config"])
    assert end.value.code == 0
    return yaml.safe_load(capsys.readouterr().out)


def in_model(tree: dict[str, Any], name: str) -> Any:
    return tree["model"]["init_args"][name]


# ---------------------------------------------------------------------------------------------------- no code


def call(path: str, /, **arguments: Any) -> dict[str, Any]:
    return {"class_path": path, "init_args": arguments}


TOUCH = f"touch {MARK}"
WRITE = f"open({MARK!r}, 'w')"
RUN_CODE = {
    "os.system": call("os.system", command=TOUCH),
    "posix.system": call("posix.system", command=TOUCH),
    "exec": call("builtins.exec", source=WRITE),
    "eval": call("builtins.eval", source=WRITE),
    "open": call("builtins.open", file=MARK, mode="w"),
    "Popen": call("subprocess.Popen", args=["touch", MARK]),
    "run": call("subprocess.run", args=["touch", MARK]),
    "Path": call("pathlib.Path", path=MARK),
    "partial": call("functools.partial", func="os.system") | {"dict_kwargs": {"command": TOUCH}},
    "through another module": call("torch.os.system", command=TOUCH),
    "through an attribute": call("kshot.cli.sys.exit"),
    "a function of a library": call("torch.hub.load", repo_or_dir="x", model="y", source="local"),
    "a function": call("shutil.copy", src="config.yaml", dst=MARK),
    "a class of another kind": call("torch.utils.data.DataLoader", dataset=[]),
    "instances that are called": call("timeit.Timer", stmt=WRITE),
    "a module run as a program": call("pip.__main__.main"),
    "settings alone": {"dict_kwargs": {"class_path": "os.system", "init_args": {"command": TOUCH}}},
}  # fmt: skip
PLACES = {
    "model": ("model",),
    "data": ("data",),
    "backbone": ("model", "init_args", "backbone"),
    "classifier": ("model", "init_args", "classifier"),
    "adapter": ("model", "init_args", "adapter"),
    "optimizer": ("model", "init_args", "optimizer"),
    "schedule": ("model", "init_args", "schedule"),
    "augment": ("data", "init_args", "augment"),
    "a number": ("data", "init_args", "shots"),
    "a list of words": ("model", "init_args", "targets"),
    "callbacks": ("trainer", "callbacks"),
    "logger": ("trainer", "logger"),
    "strategy": ("trainer", "strategy"),
    "accelerator": ("trainer", "accelerator"),
    "profiler": ("trainer", "profiler"),
    "plugins": ("trainer", "plugins"),
    "max_time": ("trainer", "max_time"),
    "run": ("run", "name"),
    "seed": ("seed_everything",),
    "checkpoint": ("ckpt_path",),
}


def over(place: tuple[str, ...], value: Any) -> dict[str, Any]:
    for key in reversed(place):
        value = {key: value}
    return value


def hostile(folder: Path, tree: dict[str, Any]) -> Path:
    file = folder / "config.yaml"
    file.write_text(json.dumps(tree), encoding="utf-8")
    return file


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    return tmp_path


@pytest.mark.parametrize("place", PLACES.values(), ids=PLACES)
def test_no_place_runs_code(place, here):
    for value in RUN_CODE.values():
        config = str(hostile(here, over(place, value)))
        with pytest.raises(UserError) as refusal:
            settings(read_command_line([*FIT, "--config", config], ["fit"]))
        assert place[-1] in str(refusal.value)
        assert [p.name for p in here.iterdir()] == ["config.yaml"], value


@pytest.mark.parametrize("command", ["fit", "validate", "test", "import"])
@pytest.mark.parametrize("name", ["os.system", "exec", "Popen", "partial"])
def test_no_command_runs_code(name, command, capsys, here):
    config = hostile(here, over(PLACES["schedule"], RUN_CODE[name]))
    assert "schedule" in refused(capsys, [command, *FIT[1:], "--config", str(config)])
    assert [p.name for p in here.iterdir()] == ["config.yaml"]


DEEP = {
    "a function of a schedule": over(PLACES["schedule"], call("LambdaLR", lr_lambda="os.system")),
    "a list of functions": over(PLACES["schedule"], call("LambdaLR", lr_lambda=["os.system"])),
    "a call in a schedule": over(PLACES["schedule"], call("LambdaLR", lr_lambda=RUN_CODE["os.system"])),
    "schedules in a schedule": over(
        PLACES["schedule"], call("torch.optim.lr_scheduler.ChainedScheduler", schedulers=[RUN_CODE["Popen"]])
    ),
    "a callback's function": over(
        PLACES["callbacks"], [call("lightning.pytorch.callbacks.LambdaCallback", on_fit_start="os.getpid")]
    ),
    "a callback's call": over(
        PLACES["callbacks"], [call("lightning.pytorch.callbacks.LambdaCallback", on_fit_start=RUN_CODE["Popen"])]
    ),
    "the second of two callbacks": over(
        PLACES["callbacks"], [call("lightning.pytorch.callbacks.Timer", duration="00:01:00:00"), RUN_CODE["os.system"]]
    ),
    "dict_kwargs of an optimizer": over(
        PLACES["optimizer"], {"class_path": "torch.optim.SGD", "dict_kwargs": {"lr": RUN_CODE["os.system"]}}
    ),
    "dict_kwargs, deep": over(
        PLACES["adapter"], {"class_path": "LoRA", "dict_kwargs": {"x": [{"y": RUN_CODE["exec"]}]}}
    ),
    "a rate": over(PLACES["optimizer"], call("torch.optim.SGD", lr=RUN_CODE["os.system"])),
    "a rate by a path": over(PLACES["optimizer"], call("torch.optim.SGD", lr="os.system")),
    "the base of a classifier": over(PLACES["classifier"], call("DePT", base=RUN_CODE["os.system"])),
    "the head of a classifier": over(PLACES["classifier"], call("VPT", head=RUN_CODE["exec"])),
    "the head of the base": over(PLACES["classifier"], call("DePT", base=call("VPT", head=RUN_CODE["exec"]))),
    "YAML in a word": over(PLACES["schedule"], json.dumps(RUN_CODE["os.system"])),
    "YAML in a word, spelt otherwise": over(
        PLACES["a list of words"], [json.dumps(RUN_CODE["os.system"]).replace("class_path", "class\\u005fpath")]
    ),
    "a config in a file": over(PLACES["schedule"], "other.yaml"),
    "a logger's settings": over(
        PLACES["logger"], [{"class_path": "CSVLogger", "init_args": {"save_dir": RUN_CODE["os.system"]}}]
    ),
}  # fmt: skip


@pytest.mark.parametrize("tree", DEEP.values(), ids=DEEP)
def test_nothing_deeper_runs_code(tree, capsys, here):
    refused(capsys, [*FIT, "--config", str(hostile(here, tree))])
    assert not (here / MARK).exists()


@pytest.mark.parametrize(
    "option",
    [
        *(
            f"--model.{name}={json.dumps(RUN_CODE['os.system'])}"
            for name in ("schedule", "optimizer", "adapter", "targets")
        ),
        "--model.schedule=os.system",
        "--model.optimizer=builtins.exec",
        "--model.classifier=subprocess.Popen",
        f"--trainer.callbacks+={json.dumps(RUN_CODE['os.system'])}",
        "--trainer.strategy=subprocess.Popen",
        "--trainer.profiler=os.system",
        f"--model.schedule.dict_kwargs={json.dumps({'x': RUN_CODE['os.system']})}",
        f"--model={json.dumps(RUN_CODE['os.system'])}",
    ],
)
def test_no_option_runs_code(option, capsys, here):
    refused(capsys, [*FIT, option])
    assert not (here / MARK).exists()


@pytest.mark.parametrize("name", ["optimizer", "schedule", "classifier", "adapter", "targets", "head_lr"])
def test_settings_in_a_checkpoint_run_no_code(name):
    check_stored({"class_names": ["a"], "_class_path": "kshot.module.FewShotModule"}, FewShotModule)
    for value in RUN_CODE.values():
        with pytest.raises(UserError, match=name):
            check_stored({name: value}, FewShotModule)
    with pytest.raises(UserError, match="to be built by"):
        check_stored({"_instantiator": "os.system"}, FewShotModule)
    with pytest.raises(UserError, match="takes a FewShotModule"):
        check_stored({"_class_path": "os.system", "command": TOUCH}, FewShotModule)


def test_python_objects_are_no_yaml(capsys, here):
    file = here / "config.yaml"
    file.write_text(f"model: !!python/object/apply:os.system ['{TOUCH}']\n")
    assert "no valid YAML" in refused(capsys, [*FIT, "--config", str(file)])
    assert not (here / MARK).exists()


def test_a_module_of_python_is_not_even_imported(here):
    for name in ("antigravity.X", "this.s", "idlelib.idle.X"):
        with pytest.raises(UserError, match="belongs to Python itself"):
            imported(name, "model.adapter takes an Adapter")
    assert not {"antigravity", "this", "idlelib"} & set(sys.modules)


def test_a_class_of_ones_own_is_found_where_one_stands(here, capsys):
    (here / "mine_at_hand.py").write_text(
        "from kshot.adapters import LoRA\nfrom lightning.pytorch import Callback\nimport os\n"
        "class Mine(LoRA):\n    pass\n"
        "class Seen(Callback):\n    def __init__(self, often: int = 3):\n        self.often = often\n"
        "class Broken:\n    pass\n"
        "def careless(often: int = 3) -> Callback:\n    os.system('touch harm')\n"
    )
    tree = printed(capsys, "--model.adapter", "mine_at_hand.Mine", "--trainer.callbacks+", "mine_at_hand.Seen",
                   "--trainer.callbacks.often", "5")  # fmt: skip
    assert in_model(tree, "adapter")["init_args"]["rank"] == 8, "what fits is kept"
    assert tree["trainer"]["callbacks"] == [{"class_path": "mine_at_hand.Seen", "init_args": {"often": 5}}]
    for path, expected in {
        "mine_at_hand.Mime": "Did you mean 'Mine'?",
        "mine_at_hand.Broken": "takes an Adapter",
        "mine_at_hand.os.system": "has no 'os.system'",
        "mine_nowhere.Mine": "there is no module 'mine_nowhere'",
    }.items():
        assert expected in refused(capsys, [*FIT, "--model.adapter", path])
    assert "takes a Callback" in refused(capsys, [*FIT, "--trainer.callbacks", "mine_at_hand.careless"])
    assert not (here / MARK).exists()


def test_a_module_that_does_not_load_gets_one_line(here, capsys):
    (here / "mine_broken.py").write_text("1 / 0\n")
    (here / "mine_lacking.py").write_text("import no_such_package\n")
    assert "ZeroDivisionError" in refused(capsys, [*FIT, "--model.adapter", "mine_broken.X"])
    assert "needs no_such_package, which is not installed" in refused(
        capsys, [*FIT, "--model.adapter", "mine_lacking.X"]
    )


SHADOWS = ("tensorboard", "wandb", "deepspeed", "timm", "pathlib", "lightning", "transformer_engine", "psutil")


def test_a_file_at_hand_or_beside_the_program_shadows_nothing(tmp_path):
    """Neither where the user stands nor in the folder of main.py."""
    (tmp_path / "main.py").write_bytes((ROOT / "main.py").read_bytes())
    for name in SHADOWS:
        (tmp_path / f"{name}.py").write_text(f"open({str(tmp_path / MARK)!r}, 'w')\n")
    command = [sys.executable, "main.py", *FIT, "--trainer.max_epochs", "1", "--data.shots", "1"]
    command += ["--data.views", "1", "--run.calibrate", "false", *["--data.eval_batch_size", "16"]]
    command += ["--trainer.limit_test_batches", "1"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / MARK).exists()
    assert (tmp_path / "runs" / "clip_16shot" / "001" / "result.json").is_file()


# ---------------------------------------------------------------------------------------------------- reading

BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{chr(98 + i)}: &{chr(98 + i)} [{', '.join(9 * [f'*{chr(97 + i)}'])}]\n" for i in range(8)
)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "holds no settings"),
        (b"# nothing\n", "holds no settings"),
        (b"- model\n", "is no mapping"),
        (b"word\n", "is no mapping"),
        (b"data: {init_args: {shots: 4, shots: 8}}\n", "the key 'shots' stands twice"),
        (b"data: {}\ndata: {}\n", "the key 'data' stands twice"),
        (b"data: {1: 2}\n", "the key '1' is no word"),
        (b"data: &d {init_args: {shots: 4}}\nmodel: {<<: *d}\n", "the key '<<' is no word"),
        (b"a: &a [*a]\n", "more than 50,000 values"),
        (BOMB.encode(), "more than 50,000 values"),
        (b"a: " + 3000 * b"[", "too deeply"),
        (b"x" * 1_000_001, "may have 1,000,000"),
        ("seed_everything: 1\n".encode("utf-16"), "is in UTF-16: save it as UTF-8"),
        ("seed_everything: 1\n".encode("utf-16-be"), "no valid YAML"),
        ("run: {name: é}\n".encode("latin-1"), "cannot be read as UTF-8"),
        (b"model: [\n", "no valid YAML"),
    ],
)
def test_a_config_that_is_none_gets_one_line(content, expected, capsys, here):
    (here / "c.yaml").write_bytes(content)
    line = refused(capsys, [*FIT, "--config", "c.yaml"])
    assert "c.yaml" in line
    assert expected in line
    assert len(line) < 500


def test_a_byte_order_mark_is_passed_over(here):
    (here / "c.yaml").write_bytes("seed_everything: 3\n".encode("utf-8-sig"))
    assert read_config(Path("c.yaml")) == {"seed_everything": 3}


def test_words_that_look_like_yaml_stay_words():
    assert read_word("{}") == "{}"
    assert read_word("{a, b}") == "{a, b}"
    assert read_word("a photo of a {}.") == "a photo of a {}."
    assert read_word("{a: 1}") == {"a": 1}
    assert load_yaml("on: a\n2024-01-01: b".replace("on", "x")) == {"x": "a", "2024-01-01": "b"}


def test_a_command_line_is_taken_apart():
    line = read_command_line(["fit", "-c", "methods/lora", "--data.shots=4", "--run.name", "-1", "-h"], ["fit"])
    assert (line.configs, line.flags) == (["methods/lora"], {"help"})
    assert line.layers[1:] == [(None, {"data": {"shots": "4"}}), (None, {"run": {"name": "-1"}})]
    assert line.without("config") == ["--data.shots", "4", "--run.name", "-1"]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["fit", "data.shots", "4"], "'data.shots' is no option"),
        (["fit", "--data.shots"], "--data.shots needs a value"),
        (["fit", "--data.shots", "--run.test", "false"], "--data.shots needs a value"),
        (["fit", "--data..shots", "4"], "is no option"),
        (["fit", "--config"], "--config needs a value"),
        (["Fit"], "Did you mean 'fit'?"),
    ],
)
def test_words_that_are_no_options(words, expected):
    with pytest.raises(UserError, match=re.escape(expected)):
        read_command_line(words, ["fit", "test"])


def test_configs_are_found_by_path_first(here):
    assert find_config("methods/lora").name == "lora.yaml"
    (here / "methods").mkdir()
    (here / "methods" / "lora").write_text("x: 1")
    assert find_config("methods/lora") == Path("methods/lora")


# ---------------------------------------------------------------------------------------------------- layering


def test_later_settings_win_whatever_their_spelling(capsys):
    options = [
        "--model.init_args.adapter.init_args.rank",
        "3",
        "--model.adapter.alpha",
        "2",
        "--data.init_args.shots",
        "2",
    ]
    tree = printed(capsys, *options, "--model.adapter.rank=5")
    assert in_model(tree, "adapter")["init_args"] | {"path": ""} == {
        "rank": 5, "alpha": 2.0, "rank_stabilised": False, "dropout": 0.0, "path": "", "wise_alpha": 1.0,
    }  # fmt: skip
    assert tree["data"]["init_args"]["shots"] == 2


def test_null_takes_an_adapter_away_and_a_later_one_brings_its_own(capsys):
    assert in_model(printed(capsys, "--model.adapter", "null"), "adapter") is None
    options = ["--model.adapter.rank", "3", "--model.adapter", "DoRA"]
    assert in_model(printed(capsys, *options), "adapter")["init_args"]["rank"] == 3
    options.insert(2, "--model.adapter=null")
    assert in_model(printed(capsys, *options), "adapter")["init_args"]["rank"] == LoRA().rank


def test_settings_of_a_class_alone_start_from_the_default_class(capsys):
    tree = printed(
        capsys, "--model.schedule", "null", "--model.schedule", "DasslCosine", "--model.schedule.warmup_lr", "1"
    )
    assert in_model(tree, "schedule")["init_args"] == {"warmup_epochs": 1, "warmup_lr": 1.0}
    line = refused(capsys, ["fit", "--model.adapter.rank", "3"])
    assert "model.adapter needs a class first" in line


@pytest.mark.parametrize("name", ["Mine", "FewShotModule"])
def test_a_subclass_that_is_loaded_takes_no_name_from_its_base(name):
    """A user's own, or one of the classes that torch.export makes, which have the names of those that they follow."""
    made = type(name, (FewShotModule,), {"__module__": FewShotModule.__module__, "__init__": lambda self, *_: None})
    line = read_command_line(["fit", "--config", "clip_16shot.yaml"], list(OPTIONS))
    assert settings(line)[1]["model"]["class_path"] == "kshot.module.FewShotModule"
    assert subclasses([FewShotModule])["FewShotModule"] is FewShotModule
    assert ("Mine" in subclasses([FewShotModule])) == (made.__name__ == "Mine")
    del made
    gc.collect()  # no other test meets it
    assert list(subclasses([FewShotModule])) == ["FewShotModule"]


def test_words_for_text_stay_as_given(capsys):
    tree = printed(capsys, "--run.name", "001", "--data.template", "{}")
    assert tree["run"]["name"] == "001"
    assert tree["data"]["init_args"]["template"] == "{}"
    tree = printed(capsys, "--data.template", '["a {}", "the {}"]')
    assert tree["data"]["init_args"]["template"] == ["a {}", "the {}"]


def test_the_default_class_leaves_nothing_to_another(capsys, here):
    (here / "c.yaml").write_text(
        "model: {init_args: {classifier: {class_path: DePT, init_args: {base: {class_path: PromptSRC}}}}}"
    )
    base = in_model(printed(capsys, "--config", "c.yaml"), "classifier")["init_args"]["base"]
    assert base["init_args"]["init_words"] == "a photo of a"


@pytest.mark.parametrize(
    "options",
    [
        ["--config", "methods/dept.yaml"],
        ["--trainer.callbacks", "[{class_path: EarlyStopping, init_args: {monitor: val/acc}}, Timer]"],
        ["--model.adapter", "null", "--data.augment", "null"],
    ],
)
def test_all_settings_are_written_out_and_given_again_come_to_the_same(options, capsys, here):
    first = printed(capsys, *options)
    (here / "all.yaml").write_text(yaml.safe_dump(first))
    assert printed(capsys, "--config", "all.yaml") == first

    def lacking(places: dict[str, Place], tree: dict[str, Any], where: str) -> list[str]:
        inner = [
            each
            for name, value in tree.items()
            for spec in (value if isinstance(value, list) else [value])
            if isinstance(spec, dict) and "class_path" in spec
            for each in lacking_in_class(spec, f"{where}.{name}", (places[name].items or places[name]).given)
        ]
        return [f"{where}.{name}" for name in places.keys() - tree.keys()] + inner

    def lacking_in_class(spec: dict[str, Any], where: str, given: frozenset[str]) -> list[str]:
        return lacking(arguments_of(imported(spec["class_path"], where), given)[0], spec["init_args"], where)

    assert lacking_in_class(first["model"], "model", frozenset({"class_names", "templates"})) == []
    assert lacking_in_class(first["data"], "data", frozenset()) == []
    assert lacking(arguments_of(Trainer)[0], first["trainer"], "trainer") == []


def test_an_optimizer_has_its_own_defaults(capsys):
    """Not those of the default one, whose eps is 1e-8."""
    assert (
        in_model(printed(capsys, "--model.optimizer", "torch.optim.Adagrad"), "optimizer")["init_args"]["eps"] == 1e-10
    )


def test_a_saved_config_of_another_command_is_taken(capsys, here):
    (here / "saved.yaml").write_text("top_k: 3\nimages: null\nckpt_path: null\nweights_only: null\nverbose: true\n")
    assert "top_k" not in printed(capsys, "--config", "saved.yaml")
    assert "'--top_k'" in refused(capsys, [*FIT, "--top_k", "3"])


MISTAKES = {
    "--model.optimizer.lr nan": "model.optimizer.lr is nan, and must be a positive number",
    "--model.optimizer.lr many": "model.optimizer.lr: Expected float or null. Got value: many",
    "--trainer.max_epoch 3": "Did you mean 'max_epochs'?",
    "--lr 3": "Did you mean --model.optimizer.lr?",
    "--epochs 3": "Did you mean --trainer.max_epochs?",
    "--shots 3": "Did you mean --data.shots?",
    "--model.classifier.C 3": "TextPrompt has no option 'C'",
    "--model.backbone.imagesize 3": "Did you mean 'image_size'?",
    "--model.class_names [a]": "FewShotModule has no option 'class_names'",
    "--model.classifier.task x": "has no option 'task'",
    "--model.optimizer.params x": "has no option 'params'",
    "--model.optimizer.optimizer x": "has no option 'optimizer'",
    "--model.optimizer SGDD": "Did you mean 'SGD'?",
    "--model.schedule Warmup": "Did you mean 'WarmupCosine'?",
    "--trainer.callbacks+ EarlyStoping": "Did you mean 'EarlyStopping'?",
    "--trainer 3": "trainer is '3'",
    "--trainer.max_epochs many": "trainer.max_epochs: Expected int or null. Got value: many",
    "--data.shots many": "data.shots: Expected int or null. Got value: many",
    "--run.test maybe": "run.test: Expected bool. Got value: maybe",
    "--model.adapter {class_path: LoRA, rank: 3}": "model.adapter.rank",
    "--model.adapter {class_path: 3}": "model.adapter.class_path is 3",
    "--model.adapter.help LoRAA": "Did you mean 'LoRA'?",
    "--model.adaptr.help LoRA": "Did you mean 'model.adapter'?",
    "--data.shots.help LoRA": "takes no class",
}


@pytest.mark.parametrize(("options", "expected"), MISTAKES.items())
def test_a_mistake_names_the_key_and_what_is_right(options, expected, capsys, here):
    words = options.split(" ", 1)
    assert expected in refused(capsys, [*FIT, *words])
    assert list(here.iterdir()) == []


@pytest.mark.parametrize("config", ["methods/lora.yaml", None])
def test_what_is_missing_is_named(config, capsys, here):
    line = refused(capsys, ["fit", *(["--config", config] if config else [])])
    assert "model.backbone is missing" in line
    assert "--config clip_16shot.yaml" in line


# ---------------------------------------------------------------------------------------------------- places


def test_what_annotations_take():
    assert place_of(Adapter | None).bases == (Adapter,)
    factory = place_of(ClassifierFactory | None)
    assert (factory.bases, factory.given) == ((Classifier,), {"backbone", "task"})
    schedule = torch.optim.lr_scheduler.LRScheduler
    assert place_of(Callable[[torch.optim.Optimizer], schedule]).bases == (schedule,)
    assert place_of(Callable[[int], float]).calls
    assert place_of(list[Adapter]).items.bases == (Adapter,)
    assert place_of(str | Path).text
    assert not place_of(float | torch.Tensor | None).bases


def test_arguments_of_a_class_include_those_it_passes_on():
    class Mine(LoRA):
        def __init__(self, own: int = 1, **rest: Any) -> None:
            super().__init__(**rest)

    places, more = arguments_of(Mine)
    assert next(iter(places)) == "own"
    assert "rank" in places
    assert not more
    assert arguments_of(LambdaLR)[0]["lr_lambda"].calls


def test_an_annotation_that_is_not_there_takes_no_class():
    class Mine:
        def __init__(self, x: "NotThere") -> None: ...  # noqa: F821

    place = arguments_of(Mine)[0]["x"]
    assert not place.bases
    assert lay(place, None, "a word", "x") == "a word"
    for path in ("os.system", "kshot.files.packaged_folder"):
        with pytest.raises(UserError, match="x takes a function, which a config cannot give"):
            lay(place, None, path, "x")
    with pytest.raises(UserError, match="x takes no class"):
        plain_value(Place(), [{"class_path": "a.B"}], "x")


def test_a_plain_record_takes_settings_and_no_file(here):
    @dataclass
    class Record:
        size: int = 1

    (here / "c.yaml").write_text("size: 3")
    place = place_of(Record | bool)
    assert lay(place, {"size": 2}, {"size": "4"}, "x") == {"size": 4}
    assert lay(place, None, "true", "x") is True
    for value, expected in {"./c.yaml": "must be a mapping", "many": "must be a mapping", "3.5": "Expected"}.items():
        with pytest.raises(UserError, match=expected):
            lay(place, None, value, "x")
    with pytest.raises(UserError, match="x takes a function, which a config cannot give"):  # jsonargparse would read it
        lay(Place(text=True, calls=True), None, "./c.yaml", "x")


def test_a_function_is_no_class_not_even_one_of_kshot():
    with pytest.raises(UserError, match=r"takes an Optimizer, and kshot\.optim\.make_optimizer is none"):
        named("kshot.optim.make_optimizer", (torch.optim.Optimizer,), "model.optimizer")
    assert named("CoOp", (Classifier,), "model.classifier") is CoOp
    assert named("kshot.classifiers.CoOp", (Classifier,), "model.classifier") is CoOp


# ---------------------------------------------------------------------------------------------------- schedules


@pytest.fixture
def optimizer():
    return torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)


def test_a_schedule_gets_what_its_class_takes(optimizer):
    assert isinstance(make_schedule(partial(CosineAnnealingLR, T_max=10), optimizer, 10, 5), CosineAnnealingLR)
    assert make_schedule(partial(OneCycleLR, max_lr=1.0), optimizer, 10, 5).total_steps == 10
    assert make_schedule(partial(DasslCosine, warmup_epochs=0), optimizer, 10, 5).epochs == 2
    assert isinstance(make_schedule(WarmupCosine, optimizer, 10, 5), WarmupCosine)


@pytest.mark.parametrize(
    ("factory", "expected"),
    [(partial(ReduceLROnPlateau, factor=2.0), "Factor should be < 1"), (CosineAnnealingLR, "T_max")],
)
def test_a_schedule_that_cannot_be_built_gets_one_line(factory, expected, optimizer):
    with pytest.raises(UserError, match=expected):
        make_schedule(factory, optimizer, 10, 5)


def test_help_names_what_the_readme_promises(capsys):
    with pytest.raises(SystemExit) as end:
        main(["fit", "--help"])
    assert end.value.code == 0
    out = capsys.readouterr().out
    for option in ("--data.shots", "--model.adapter", "--model.optimizer.lr", "--trainer.max_epochs", "--run.root"):
        assert option in out
    lines = out.splitlines()
    assert len(lines) <= 100, "two screens"
    assert max(map(len, lines)) <= 100
    assert "--trainer.profiler" not in out
    groups = [line for line in lines if line.endswith(":") and not line.startswith(" ")]
    assert groups == ["run:", "data:", "model:", "model.classifier:", "model.adapter:", "model.optimizer:", "trainer:"]
    assert re.search(r"--data.shots +16 +training images per class", out)
    with pytest.raises(SystemExit):
        main(["fit", "--help-all"])
    whole = capsys.readouterr().out
    assert "--trainer.profiler" in whole
    assert "--data.shots" in whole
    with pytest.raises(SystemExit):
        main([*FIT, "--data.shots", "3", "--config", "methods/coop.yaml", "--help"])
    out = capsys.readouterr().out
    assert re.search(r"--data.shots +3 ", out)
    assert re.search(r"--model.classifier +CoOp ", out)
    assert re.search(r"--model.optimizer.momentum +0.9 ", out)
    assert "\nmodel.adapter:" not in out
    with pytest.raises(SystemExit):
        main([*FIT, "--model.adapter.help", "LoRA"])
    assert "--model.adapter.rank" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["fit", "--model.adapter.help", "LoRA"])
