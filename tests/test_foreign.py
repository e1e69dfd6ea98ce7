"""Released files of CoOp and CLIP-LoRA: read without running them, equal to the formulas, refused where they misfit."""

import builtins
import hashlib
import io
import json
import math
import os
import pickle
import shlex
import subprocess
import sys
from collections import OrderedDict
from contextlib import suppress
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import towers
from safetensors import safe_open
from safetensors.torch import load_file

from kshot.adapters import DoRA, LoRA
from kshot.classifiers import CoCoOp, CoOp, LinearProbe, TextPrompt
from kshot.cli import main
from kshot.errors import UserError
from kshot.foreign import Inert, TensorPickle, read_released, released_tensors, slots_of
from kshot.module import FewShotModule

NAMES = ["cat", "yellow bird", "very small old car"]
DIGITS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
FORMATS = {
    "zip": {},
    "legacy": {"_use_new_zipfile_serialization": False},
    "protocol 5": {"pickle_protocol": 5},
}
CLIP_LORA = LoRA(rank=2, alpha=1, rank_stabilised=True)
QKV = ["*.[qkv]"]


# ---------------------------------------------------------------------------------------------------- files as released


def embeddings(names: list[str], length: int) -> torch.Tensor:
    """Token embeddings, (C, 77, d), of CoOp's placeholder sentences, by the library's own model."""
    tokens = towers.backbone().tokenize([" ".join(["X"] * length) + f" {name}." for name in names])
    return towers.original("clip").token_embedding(tokens).detach()


def coop_state(names: list[str], length: int = 4, specific: bool = False, dtype: torch.dtype = torch.float32) -> dict:
    """The state of CoOp's prompt learner."""
    embedded = embeddings(names, length)
    shape = (len(names), length, 32) if specific else (length, 32)
    state = {
        "ctx": 0.3 * torch.randn(shape),
        "token_prefix": embedded[:, :1],
        "token_suffix": embedded[:, 1 + length :],
    }
    return OrderedDict((name, value.to(dtype)) for name, value in state.items())


def write_coop(path: Path, state: dict, **options) -> Path:
    """What Dassl's save_checkpoint writes, with a live scheduler of a package that only the writer has."""
    module = ModuleType("dassl_of_the_writer")

    class ConstantWarmupScheduler(dict):
        def __init__(self, then) -> None:
            self.then = then

    ConstantWarmupScheduler.__module__, ConstantWarmupScheduler.__qualname__ = (
        module.__name__,
        "ConstantWarmupScheduler",
    )
    module.ConstantWarmupScheduler = ConstantWarmupScheduler
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(3))], lr=0.1, momentum=0.9)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 5)
    warmup = ConstantWarmupScheduler(cosine)
    warmup["epoch"], warmup["seen"] = 3, {1, 2}
    contents = {"state_dict": state, "epoch": 200, "optimizer": optimizer.state_dict(), "val_result": np.float64(83.5)}
    sys.modules[module.__name__] = module
    try:
        torch.save(contents | {"scheduler": {"successor": warmup, "last_epoch": 200}}, path, **options)
    finally:
        del sys.modules[module.__name__]
    return path


def clip_lora_file(layers: int = 4, params: str = "qkv", width: int = 32, **metadata) -> dict:
    """What CLIP-LoRA's save_lora writes."""
    meta = {"r": 2, "alpha": 1, "encoder": "both", "params": list(params), "position": "all"} | metadata
    names = {"q": "q_proj", "k": "k_proj", "v": "v_proj", "o": "proj"}
    layer = lambda: {  # noqa: E731  a new one each time
        names[p]: {"w_lora_A": torch.randn(meta["r"], width), "w_lora_B": torch.randn(width, meta["r"])} for p in params
    }
    return {"weights": {f"layer_{i}": layer() for i in range(layers)}, "metadata": meta}


def saved(path: Path, contents, **options) -> Path:
    torch.save(contents, path, **options)
    return path


def module_of(classifier=TextPrompt, adapter=None, targets=QKV, names=NAMES, **options) -> FewShotModule:
    def build(backbone, task):
        return classifier(backbone, task, **options)

    return FewShotModule(towers.backbone(), build, names, adapter=adapter, targets=targets)


# ---------------------------------------------------------------------------------------------------- reading


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_file_with_a_live_scheduler_of_an_unknown_package_is_read(form, dtype, tmp_path):
    state = coop_state(NAMES, dtype=dtype)
    path = write_coop(tmp_path / "model.pth.tar-200", state, **FORMATS[form])
    with pytest.raises(Exception, match="Weights only load failed"):
        torch.load(path, weights_only=True)
    contents, sha256 = read_released(path)
    assert sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert contents["state_dict"].keys() == state.keys()
    assert all(torch.equal(contents["state_dict"][name], value) for name, value in state.items())
    assert contents["epoch"] == 200
    assert isinstance(contents["scheduler"]["successor"], Inert)
    assert isinstance(contents["val_result"], Inert)
    assert "dassl_of_the_writer" not in sys.modules


def harms(marker: Path) -> dict:
    """Objects that run something when they are unpickled: by each way that a pickle knows."""
    touch = f"touch {marker}"

    class Calls:
        def __init__(self, function, *arguments) -> None:
            self.called = function, arguments

        def __reduce__(self):
            return self.called

    class Built:
        def __reduce__(self):
            return (OrderedDict, (), None, iter([]), iter([("x", Calls(os.system, touch))]))

    return {
        "system": Calls(os.system, touch),
        "eval": Calls(builtins.eval, f"__import__('os').system({touch!r})"),
        "exec": Calls(builtins.exec, f"open({str(marker)!r}, 'w')"),
        "class": Calls(subprocess.Popen, ["touch", str(marker)]),
        "method": Calls(Path.touch, marker),
        "nested": {"in": [(Calls(os.system, touch), Built())], Calls(os.system, touch): 1},
    }


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("harm", harms(Path()))
def test_nothing_that_a_file_pickles_is_run(harm, form, tmp_path):
    marker = tmp_path / "harm"
    contents = {"state_dict": coop_state(NAMES), "x": harms(marker)[harm]}
    path = saved(tmp_path / "evil.pt", contents, **FORMATS[form])
    read, _ = read_released(path)
    assert torch.equal(read["state_dict"]["ctx"], contents["state_dict"]["ctx"])
    assert not marker.exists()
    torch.load(path, weights_only=False)  # it would have
    assert marker.exists() or harm == "class"


def test_a_call_of_what_a_call_returned_does_nothing(tmp_path):
    marker = str(tmp_path / "harm").encode()
    get = b"c__builtin__\ngetattr\n(c__builtin__\n__import__\n(Vos\ntRVsystem\ntR"
    raw = b"(lp0\n" + get + b"(Vtouch " + marker + b"\ntRa."
    assert isinstance(TensorPickle.load(io.BytesIO(raw))[0], Inert)
    assert not (tmp_path / "harm").exists()
    pickle.loads(raw)  # it would have
    assert (tmp_path / "harm").exists()


@pytest.mark.parametrize("name", [b"torch._utils\n_rebuild_tensor_v2", b"collections\nOrderedDict", b"os\nsystem"])
def test_a_file_changes_no_function_or_class_of_ours(name):
    module, function = name.decode().split("\n")
    target = getattr(sys.modules[module], function)
    raw = b"c" + name + b"\n(N}V__doc__\nVchanged\nstb."  # BUILD with slot state sets attributes
    before = target.__doc__
    with suppress(TypeError, AttributeError):  # a built-in class takes no attribute
        TensorPickle.load(io.BytesIO(raw))
    assert target.__doc__ == before
    assert Inert.__doc__ != "changed"


@pytest.mark.parametrize("contents", [b"", b"PK\x03\x04 no archive", b"no pickle", pickle.dumps({"ctx": 1})])
def test_what_torch_did_not_save_gets_one_line(contents, tmp_path):
    path = tmp_path / "x.pt"
    path.write_bytes(contents)
    with pytest.raises(UserError, match=r"x\.pt is no file of torch\.save that can be read"):
        read_released(path)


def test_a_program_is_not_loaded(tmp_path):
    torch.jit.save(torch.jit.script(torch.nn.ReLU()), tmp_path / "clip.pt")
    with pytest.raises(UserError, match="TorchScript program"):
        read_released(tmp_path / "clip.pt")
    with pytest.raises(UserError, match="There is no file"):
        read_released(tmp_path / "none.pt")


# ---------------------------------------------------------------------------------------------------- equality


def reference_logits(context: torch.Tensor, names: list[str], images: torch.Tensor) -> torch.Tensor:
    """CoOp's logits by the library's own modules: prefix, context, suffix through the whole text tower."""
    clip, backbone, length = towers.original("clip"), towers.backbone(), context.shape[-2]
    embedded = embeddings(names, length)
    context = context.expand(len(names), -1, -1) if context.ndim == 2 else context
    tokens = backbone.tokenize([" ".join(["X"] * length) + f" {name}." for name in names])
    with torch.no_grad():
        x = torch.cat([embedded[:, :1], context, embedded[:, 1 + length :]], 1) + clip.positional_embedding
        x = clip.ln_final(clip.transformer(x, attn_mask=clip.attn_mask))
        text = x[torch.arange(len(names)), tokens.argmax(-1)] @ clip.text_projection
        image = clip.encode_image((images - backbone.mean) / backbone.std)
        return clip.logit_scale.exp() * F.normalize(image, dim=-1) @ F.normalize(text, dim=-1).T


def command(name: str, *options: str) -> list[str]:
    """A command line for the tiny CLIP on digits."""
    folder = str(towers.folder_of("clip"))
    return [name, "--config", "clip_16shot.yaml", "--model.backbone.model", folder, *options]


def header_of(path: Path) -> dict:
    with safe_open(path, framework="pt") as file:
        return json.loads(file.metadata()["kshot"])


def run_printed(out: str, root: Path) -> dict:
    """Runs the command that import printed, and returns the record of the run."""
    python, script, *arguments = shlex.split(out.strip().splitlines()[-1])
    assert (python, script, arguments[0]) == ("python", "main.py", "test")
    main([*arguments, "--run.root", str(root), "--trainer.limit_test_batches", "1"])
    (record,) = root.glob("*/*/result.json")
    return json.loads(record.read_text())


@pytest.mark.parametrize("specific", [False, True])
@pytest.mark.parametrize("bare", [False, True])
def test_an_imported_context_gives_coops_logits(specific, bare, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    state = coop_state(DIGITS, specific=specific, dtype=torch.float16)
    path = saved(tmp_path / "ctx.pt", state) if bare else write_coop(tmp_path / "model.pth.tar-200", state)
    options = ["--config", "methods/coop.yaml", "--model.classifier.context_length", "4"]
    options += ["--model.classifier.class_specific", str(specific).lower(), "--data.root", "there/are/no/images"]
    main(command("import", "--file", path.name, *options))
    out = capsys.readouterr().out
    written = tmp_path / f"{path.name}.safetensors"
    tensors = load_file(written)
    assert list(tensors) == ["classifier.context"]
    assert tensors["classifier.context"].dtype == torch.float32
    assert f"tensors 1, parameters {state['ctx'].numel():,}" in out
    header = header_of(written)
    assert header["imported"] == {"file": path.name, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
    assert header["method"] == "CoOp"
    assert header["split"] is None
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([path.name, written.name])  # no run directory
    module = module_of(CoOp, names=DIGITS, context_length=4, class_specific=specific).eval()
    module.load_state_dict(tensors, strict=False)
    images = towers.images(module.backbone, 5)
    torch.testing.assert_close(
        module(images).detach(), reference_logits(state["ctx"].float(), DIGITS, images), rtol=1e-4, atol=1e-4
    )
    if not bare:
        assert run_printed(out, tmp_path / "runs")["method"] == "CoOp"


@pytest.mark.parametrize(
    ("encoder", "params", "targets"),
    [
        ("both", "qkv", '["*.[qkv]"]'),
        ("text", "qv", '["text.*.[qv]"]'),
        ("vision", "qkvo", '["image.*.[qkvo]"]'),
    ],
)
def test_imported_factors_change_every_slot_as_clip_lora_does(encoder, params, targets, tmp_path, capsys):
    released = clip_lora_file(4 if encoder == "both" else 2, params, encoder=encoder)
    path = saved(tmp_path / "lora_weights.pt", released)
    options = ["--model.adapter.rank", "2", "--model.adapter.alpha", "1", "--model.adapter.rank_stabilised", "true"]
    written = tmp_path / "here.safetensors"
    arguments = command("import", f"--file={path}", "--out", str(written), "--model.targets", targets, *options)
    main(arguments)
    out = capsys.readouterr().out
    module = module_of(adapter=CLIP_LORA, targets=json.loads(targets), names=DIGITS)
    module.load_state_dict(load_file(written), strict=False)
    layers = {layer.slot.name: layer for layer in module.layers.values()}
    order = {"both": ["text", "image"], "text": ["text"], "vision": ["image"]}[encoder]
    blocks = [f"{tower}.{i}" for tower in order for i in range(2)]
    keys = {"q": "q_proj", "k": "k_proj", "v": "v_proj", "o": "proj"}
    assert set(layers) == {f"{block}.{p}" for block in blocks for p in params}
    for name, layer in layers.items():
        block, _, part = name.rpartition(".")
        factors = released["weights"][f"layer_{blocks.index(block)}"][keys[part]]
        expected = layer.slot.weight + 1 / math.sqrt(2) * factors["w_lora_B"] @ factors["w_lora_A"]
        torch.testing.assert_close(layer.effective_weight(), expected)
    if encoder == "both":
        assert run_printed(out, tmp_path / "runs")["adapter"]["rank"] == 2
        with pytest.raises(SystemExit):
            main(arguments)  # never over a file
        assert "exists already" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------------- which blocks


def backbone_of(text: int, image: int):
    """As much of a backbone as says which blocks it has."""
    names = [f"{t}.{b}.{p}" for t, n in (("text", text), ("image", image)) for b in range(n) for p in "qkvo"]
    return SimpleNamespace(name="ViT", slots=lambda: dict.fromkeys(names))


@pytest.mark.parametrize(
    ("position", "blocks"),
    [
        ("all", range(12)),
        ("top1", [11]),
        ("top2", [10, 11]),
        ("top3", [9, 10, 11]),
        ("bottom", [0, 1, 2, 3]),
        ("mid", [4, 5, 6, 7]),
        ("up", [8, 9, 10, 11]),
        ("half-bottom", range(6)),
        ("half-up", range(6, 12)),
    ],
)
@pytest.mark.parametrize("encoder", ["both", "text", "vision"])
def test_positions_are_those_of_the_released_code(position, blocks, encoder):
    chosen = {"both": ["text", "image"], "text": ["text"], "vision": ["image"]}[encoder]
    released = clip_lora_file(len(chosen) * len(blocks), "qv", encoder=encoder, position=position)
    found = slots_of(released["weights"], released["metadata"], backbone_of(12, 12))
    assert list(found) == [f"{tower}.{b}.{p}" for tower in chosen for b in blocks for p in "qv"]
    assert found[f"{chosen[-1]}.{blocks[-1]}.v"] is list(released["weights"].values())[-1]["v_proj"]


@pytest.mark.parametrize("vision", [24, 21])
def test_all_blocks_of_vit_l_are_24_or_the_21_that_the_released_code_adapts(vision):
    released = clip_lora_file(12 + vision, "q")
    found = list(slots_of(released["weights"], released["metadata"], backbone_of(12, 24)))
    assert len(found) == 12 + vision
    assert (found[11], found[12], found[-1]) == ("text.11.q", "image.0.q", f"image.{vision - 1}.q")


@pytest.mark.parametrize(
    ("sizes", "layers", "metadata", "message"),
    [
        (
            (2, 2),
            2,
            {"position": "up"},
            "'up', which CLIP-LoRA defines for towers of 12 blocks.*text tower of ViT has 2",
        ),
        ((24, 32), 8, {"position": "mid"}, "text tower of ViT has 24"),
        ((12, 32), 8, {"position": "mid"}, "image tower of ViT has 32"),
        ((12, 12), 36, {}, "adapts 36 blocks, and .* of ViT are 24: name the backbone"),
        ((12, 24), 24, {}, "adapts 24 blocks, and .* of ViT are 36: name the backbone"),
        ((12, 12), 24, {"encoder": "image"}, "encoder 'image'"),
        ((12, 12), 24, {"position": ["all"]}, "position"),
    ],
)
def test_blocks_that_a_backbone_lacks_are_refused(sizes, layers, metadata, message):
    released = clip_lora_file(layers, **metadata)
    with pytest.raises(UserError, match=message):
        slots_of(released["weights"], released["metadata"], backbone_of(*sizes))


# ---------------------------------------------------------------------------------------------------- refusals


def coop_with(**changes) -> dict:
    return coop_state(NAMES) | changes


COOP_REFUSALS = {
    "width": (lambda: coop_with(ctx=torch.zeros(4, 48)), {}, "48 wide, and that of .*tiny_clip is 32 wide"),
    "length": (
        coop_with,
        {"context_length": 16},
        "4 context tokens, and the config 16: set .*context_length 4",
    ),
    "specific": (lambda: coop_state(NAMES, specific=True), {}, r"one context a class: set .*class_specific true"),
    "shared": (coop_with, {"class_specific": True}, "one for all classes: set .*class_specific false"),
    "count": (lambda: coop_state(NAMES[:2], specific=True), {"class_specific": True}, "of 2 classes, .* of 3"),
    "order": (lambda: coop_state(NAMES[::-1], specific=True), {"class_specific": True}, "not for those of the config"),
    "nan": (lambda: coop_with(ctx=torch.full((4, 32), math.nan)), {}, "ctx holds values that are not finite"),
    "integers": (lambda: coop_with(ctx=torch.ones(4, 32).long()), {}, "no tensor of floating-point numbers"),
    "no tensor": (lambda: coop_with(ctx="ctx"), {}, "ctx is no tensor"),
    "flat": (lambda: coop_with(ctx=torch.zeros(32)), {}, "no context of CoOp"),
    "weights": (lambda: coop_with(token_prefix=torch.randn(3, 1, 32)), {}, "other weights than .*: their start tokens"),
    "cocoop": (lambda: coop_with(**{"meta_net.linear1.weight": torch.zeros(2, 24)}), {}, "also holds meta_net.linear1"),
}


@pytest.mark.parametrize("case", COOP_REFUSALS)
def test_a_context_that_does_not_fit_is_refused(case, tmp_path):
    state, options, message = COOP_REFUSALS[case]
    path = saved(tmp_path / "f.pt", {"state_dict": state()})
    with pytest.raises(UserError, match=message):
        released_tensors(path, module_of(CoOp, **{"context_length": 4} | options))


@pytest.mark.parametrize("classifier", [TextPrompt, LinearProbe, CoCoOp])
def test_a_context_needs_coop(classifier, tmp_path):
    path = saved(tmp_path / "f.pt", coop_state(NAMES))
    with pytest.raises(UserError, match=rf"classifier is {classifier.__name__}: .* recipes/coop\.yaml"):
        released_tensors(path, module_of(classifier))


LORA_REFUSALS = {
    "rank": (lambda: clip_lora_file(r=4), {}, r"rank 4 and scale 0\.5, .* --model.adapter.rank 4 .*alpha 1 "),
    "alpha": (
        lambda: clip_lora_file(alpha=2),
        {},
        r"scale 1\.414, and .* scale 0\.7071: set .*alpha 2 .*stabilised true",
    ),
    "plain": (clip_lora_file, {"adapter": LoRA(rank=2, alpha=1)}, r"scale 0\.5: set .*rank_stabilised true"),
    "dora": (clip_lora_file, {"adapter": DoRA(rank=2)}, "the config has DoRA: set --model.adapter LoRA"),
    "none": (clip_lora_file, {"adapter": None}, "the config has no adapter"),
    "fewer": (
        clip_lora_file,
        {"targets": ["image.*.[qkv]"]},
        r"6 that the file adapts alone, such as text\.0\.q: set --model.targets '\[\"text\.\*\.\[qkv\]\", \"image",
    ),
    "more": (
        lambda: clip_lora_file(2, "qv", encoder="vision"),
        {},
        r"8 that the config adapts alone, such as .*: set --model.targets '\[\"image\.\*\.\[qv\]\"\]'",
    ),
    "width": (
        lambda: clip_lora_file(width=48),
        {},
        r"w_lora_A of text\.0\.q is \(2, 48\), and .*tiny_clip takes \(2, 32\)",
    ),
    "part": (lambda: clip_lora_file() | {"weights": {f"layer_{i}": {"fc": 1} for i in range(4)}}, {}, "adapts 'fc'"),
    "no factors": (
        lambda: (
            clip_lora_file()
            | {"weights": {f"layer_{i}": dict.fromkeys(["q_proj", "k_proj", "v_proj"]) for i in range(4)}}
        ),
        {},
        "w_lora_A of text.0.q is no tensor",
    ),
    "no rank": (lambda: clip_lora_file() | {"metadata": {}}, {}, "no file of CLIP-LoRA: its metadata give r None"),
}


@pytest.mark.parametrize("case", LORA_REFUSALS)
def test_factors_that_do_not_fit_are_refused(case, tmp_path):
    released, options, message = LORA_REFUSALS[case]
    path = saved(tmp_path / "f.pt", released())
    with pytest.raises(UserError, match=message):
        released_tensors(path, module_of(**{"adapter": CLIP_LORA} | options))


def test_the_targets_that_a_refusal_names_are_right(tmp_path):
    path = saved(tmp_path / "f.pt", clip_lora_file(2, "vo", encoder="text"))
    with pytest.raises(UserError) as refusal:
        released_tensors(path, module_of(adapter=CLIP_LORA))
    targets = str(refusal.value).split("'")[1]
    assert len(released_tensors(path, module_of(adapter=CLIP_LORA, targets=json.loads(targets)))[0]) == 8


def test_a_file_of_neither_kind_says_what_it_holds(tmp_path):
    for contents in ({"model": 1, "epoch": 2}, {"state_dict": {"weight": torch.ones(1), "bias": torch.ones(1)}}, [1]):
        with pytest.raises(UserError, match=r"neither .* it holds (model, epoch|weight, bias|nothing of that kind)"):
            released_tensors(saved(tmp_path / "f.pt", contents), module_of())


def test_what_else_the_config_trains_is_missed(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    saved(tmp_path / "f.pt", coop_state(DIGITS))
    options = [
        "--config",
        "methods/coop.yaml",
        "--model.classifier.context_length",
        "4",
        "--model.classifier.depth",
        "2",
    ]
    for given, message in (
        (["--file", "f.pt", *options], "1 missing, such as classifier.deep"),
        (options, "import needs --file"),
        (["--file", "f.pt", "--out", "f.bin", *options], "must end with .safetensors"),
        (["--file", "g.pt", *options], "There is no file g.pt"),
    ):
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            main(command("import", *given))
        assert end.value.code == 2
        line = capsys.readouterr().err.strip()
        assert message in line
        assert "\n" not in line
    assert [p.name for p in tmp_path.iterdir()] == ["f.pt"]


def test_help_lists_the_command(capsys):
    with pytest.raises(SystemExit) as end:
        main(["import", "--help"])
    assert end.value.code == 0
    assert "--file" in capsys.readouterr().out
    main(["--help"])
    assert "import" in capsys.readouterr().out
