"""Exports answer as the run does, in the other library alone; what cannot be exact is refused in one line."""

import json
import os
import subprocess
import sys
from pathlib import Path

import cases
import pytest
import torch
import towers
from command_line import UNTESTED, fit, refused
from safetensors.torch import load_file, save_file

from kshot.adapters import DoRA, FullTuning, HydraLoRA, LoRA, RandLoRA, VeRA
from kshot.checkpoint import read_tensors, write_tensors
from kshot.classifiers import CoCoOp, CoOp, LinearProbe, PromptSRC, TextPrompt
from kshot.cli import main
from kshot.data.prediction import PredictionData
from kshot.errors import UserError
from kshot.export import command, merged
from kshot.export.check import answers_of, compare, probe_of
from kshot.export.command import export
from kshot.export.head import head_of
from kshot.export.reading import peft_tensors
from kshot.export.written import Wanted
from kshot.module import FewShotModule
from kshot.opening import OpenRun

NAMES = ["cat", "yellow dog", "old car"]
NOWHERE = {"data": {"class_path": "FewShotDataModule", "init_args": {"dataset": "nowhere"}}}
TRANSFORMERS = Wanted(layout="transformers")
EXACT = 1e-5
INSTEAD = "export --format merged, torch or onnx instead"


def run_of(name="clip", adapter=None, classifier=None, targets=("*",)) -> OpenRun:
    """A run on a tiny model in which nothing that trains is at its start."""
    backbone = towers.backbone(name)
    classifier = classifier or (TextPrompt if hasattr(backbone, "tokenize") else LinearProbe)
    module = FewShotModule(backbone, classifier, NAMES, adapter=adapter, targets=targets)
    cases.perturb(module)
    images = PredictionData(NAMES, ["a photo of a {}."])
    images.use_preprocessing(backbone.preprocessing)
    return OpenRun(Path("run"), module.eval(), images, NOWHERE, {}, {})


def case_of(label: str):
    kind, case = cases.SLOT_CASES[label]
    return kind(**case.settings)


def exported(run: OpenRun, form: str, folder: Path, wanted: Wanted = command.DEFAULTS) -> Path:
    """Exports and asks for agreement to 1e-5 of the largest logit."""
    out, checked = export(run, form, folder, wanted, 40)
    assert checked.relative <= EXACT, checked
    assert checked.agreement == 1
    assert "noise" in checked.images
    return out


# ------------------------------------------------------------------------------------------------ every method

MERGED_REFUSED = {"hydralora": "depends on its input"}
PEFT_REFUSED = {"hydralora": "depends on its input", "pranc": "full rank", "svft": "full rank"}
MHA = {"dora": "PEFT has LoRA alone", "randlora": "PEFT has LoRA alone"}  # in open_clip's attention
FUSED = {"randlora": "q, k and v are one matrix"}  # in timm's
PEFT = [("clip", "native", MHA), ("clip", "transformers", {}), ("vit_dinov2", "native", FUSED)]


@pytest.mark.parametrize("layout", ["native", "transformers"])
@cases.each_first_case
def test_every_method_merges_or_says_why_not(label, layout, tmp_path):
    run = run_of(adapter=case_of(label))
    before = answers_of(run, images := probe_of(run, 8).images)
    if label in MERGED_REFUSED:
        with pytest.raises(UserError, match=MERGED_REFUSED[label]):
            export(run, "merged", tmp_path / "out", Wanted(layout=layout))
        assert not list(tmp_path.iterdir())
        return
    exported(run, "merged", tmp_path / "out", Wanted(layout=layout))
    assert torch.equal(answers_of(run, images), before), "the run was changed"


@pytest.mark.parametrize(("name", "layout", "more"), PEFT, ids=["open_clip", "transformers", "timm"])
@cases.each_first_case
def test_every_method_is_an_adapter_of_peft_or_says_why_not(label, name, layout, more, tmp_path):
    targets = ["*.[qv]", "*.fc2"] if (name, layout) == ("clip", "native") else ["*.[qv]", "*.o", "*.fc2"]
    run = run_of(name, case_of(label), targets=targets)
    reason = (PEFT_REFUSED | more).get(label)
    if reason is None:
        exported(run, "peft", tmp_path / "out", Wanted(layout=layout))
        return
    with pytest.raises(UserError, match=reason):
        export(run, "peft", tmp_path / "out", Wanted(layout=layout))
    assert not list(tmp_path.iterdir())


def has_text(program: torch.export.ExportedProgram) -> bool:
    return any(part in name for name in program.state_dict for part in ("token_embedding", ".clip.transformer."))


@pytest.mark.parametrize(("label", "head"), [("nola", LinearProbe), ("svft", PromptSRC)])
def test_a_program_holds_what_no_library_has(label, head, tmp_path):
    """A matrix as head, and prompts in the image tower; HydraLoRA's and that of CoOp are read without kshot below."""
    run = run_of(adapter=case_of(label), classifier=head, targets=["image.1.[qo]"])
    assert not has_text(torch.export.load(exported(run, "torch", tmp_path / "out") / "model.pt2"))


def test_a_program_has_the_text_tower_where_prompts_depend_on_the_image(tmp_path):
    run = run_of("clip_one_block", classifier=CoCoOp)
    assert has_text(torch.export.load(exported(run, "torch", tmp_path / "out") / "model.pt2"))
    merged_head(run, tmp_path / "merged", None)


def merged_head(run: OpenRun, folder: Path, kind: str | None) -> None:
    """A head is a matrix beside the towers, or a program of its own."""
    out, head = exported(run, "merged", folder), head_of(run)
    assert (head and head.kind) == kind
    assert (out / "head.pt2").exists() == (head is None)


CLASSIFIERS = {"CoOp": CoOp, "PromptSRC": PromptSRC, "LinearProbe": LinearProbe}


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_heads_go_with_the_towers(name, tmp_path):
    run = run_of(classifier=CLASSIFIERS[name])
    if name == "PromptSRC":
        with pytest.raises(UserError, match=r"learned tokens into the image tower.*torch or onnx"):
            export(run, "merged", tmp_path / "merged")
        return
    merged_head(run, tmp_path / "merged", "cosine")


# ------------------------------------------------------------------------------------------------ layouts

NAMED = ["clip_quick_gelu", "clip_custom", "custom_text_eos", "vit_dinov2"]
UNNAMED = {
    "clip_layer_scale": "no place for transformer.resblocks.0.ls_1.gamma",
    "custom_text": "ends both towers with a projection",
    "not_causal": "text tower of Transformers' CLIPModel gives other features",
    "siglip": "no place for visual.trunk.cls_token",
    "resnet": "neither CLIP, SigLIP nor DINOv2",
    "vit": "neither CLIP, SigLIP nor DINOv2",
    "vit_dinov2_swiglu": "gated MLPs",
}


@pytest.mark.parametrize(
    "name", ["clip_custom_all", "class_token", "siglip", "resnet", "vit_dinov3_bias", "eva02_apart"]
)
def test_other_layouts_merge_into_their_own_library(name, tmp_path):
    exported(run_of(name, LoRA(rank=2) if name != "resnet" else None), "merged", tmp_path / "out")


@pytest.mark.parametrize("name", NAMED)
def test_models_that_transformers_has(name, tmp_path):
    run = run_of(name, LoRA(rank=2))
    out = exported(run, "merged", tmp_path / "out", TRANSFORMERS)
    seen = json.loads((out / "preprocessor_config.json").read_text())
    assert seen["crop_size"]["height"] == run.module.backbone.image_size


@pytest.mark.parametrize("name", UNNAMED)
def test_models_that_transformers_has_not_are_refused(name, tmp_path):
    with pytest.raises(UserError, match=UNNAMED[name]):
        export(run_of(name), "merged", tmp_path / "out", TRANSFORMERS)


def test_siglip_by_the_names_of_transformers(tmp_path):
    import open_clip
    from timm.models import register_model
    from timm.models.vision_transformer import VisionTransformer

    from kshot.backbones import OpenClip

    @register_model
    def vit_tiny_siglip(pretrained=False, **given):
        del pretrained
        kept = {k: v for k, v in given.items() if k in ("num_classes", "img_size", "global_pool", "drop_rate")}
        return VisionTransformer(
            **{"img_size": 32, "global_pool": "map"} | kept,
            **{"patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "class_token": False},
        )

    folder = tmp_path / "tiny"
    folder.mkdir()
    layout = towers.clip(
        {"timm_model_name": "vit_tiny_siglip", "timm_pool": "map", "timm_proj": "none"},
        {"no_causal_mask": True, "pool_type": "last", "proj_bias": True, "context_length": 16},
        custom_text=True,
        embed_dim=32,
        init_logit_bias=-10.0,
    )
    told = {"model_cfg": layout.config, "preprocess_cfg": {"mean": [0.5] * 3, "std": [0.5] * 3}}
    (folder / "open_clip_config.json").write_text(json.dumps(told))
    model = open_clip.create_model(f"local-dir:{folder}", load_weights=False)
    save_file(towers.rough(model.state_dict()), folder / "open_clip_model.safetensors")
    backbone = OpenClip(str(folder))
    module = FewShotModule(backbone, TextPrompt, NAMES, adapter=LoRA(rank=2), targets=["*"])
    cases.perturb(module)
    images = PredictionData(NAMES, ["a {}."])
    run = OpenRun(Path("run"), module.eval(), images, NOWHERE, {}, {})
    exported(run, "merged", tmp_path / "out", TRANSFORMERS)
    exported(run, "peft", tmp_path / "peft", TRANSFORMERS)


@pytest.mark.parametrize(
    ("name", "adapter", "targets", "kind"),
    [
        ("vit_dinov2", RandLoRA(rank=3), ["*.qkv", "*.fc?"], "RANDLORA"),
        ("vit_dinov2", VeRA(rank=8), ["*.qkv", "*.o"], "VERA"),
        ("vit_dinov2", DoRA(rank=2, alpha=4), ["*.[qv]"], "LORA"),  # k keeps its length
        ("vit_dinov2", DoRA(rank=2), ["*.qkv"], "LORA"),
        ("vit_dinov2", LoRA(rank=2, wise_alpha=0.4), ["*.qkv", "*.fc1"], "LORA"),
    ],
)
def test_methods_that_peft_has_are_its_own(name, adapter, targets, kind, tmp_path):
    run = run_of(name, adapter, targets=targets)
    out = exported(run, "peft", tmp_path / "out")
    config = json.loads((out / "adapter_config.json").read_text())
    assert config["peft_type"] == kind
    assert bool(config.get("use_dora")) == isinstance(adapter, DoRA)
    if adapter.wise_alpha == 1:
        comes_back(run, out, run_of(name, adapter, targets=targets))


def comes_back(run, out, back):
    """What was exported answers in another run as it did in its own."""
    tensors, told = peft_tensors(out, back.module)
    assert told["file"] == "out"
    back.module.load_state_dict(tensors, strict=False)
    heads = {n: v for n, v in run.module.tuned_state().items() if n.startswith("classifier.") and ".adapters." not in n}
    back.module.load_state_dict({n: v for n, v in heads.items() if "backbone" not in n}, strict=False)
    images = probe_of(run, 8).images
    found, expected = answers_of(back, images), answers_of(run, images)
    assert float((found - expected).abs().max() / expected.abs().max()) <= EXACT


@pytest.mark.parametrize(("kind", "seed"), [(VeRA, 2), (RandLoRA, 2)])
def test_random_matrices_of_another_seed_are_refused(kind, seed, tmp_path):
    out = exported(run_of("vit_dinov2", kind(rank=3), targets=["*.qkv"]), "peft", tmp_path / "out")
    with pytest.raises(UserError, match=rf"_A is not what --model.adapter.seed {seed} gives here"):
        peft_tensors(out, run_of("vit_dinov2", kind(rank=3, seed=seed), targets=["*.qkv"]).module)
    with pytest.raises(UserError, match=rf"set --model.adapter {kind.__name__} --model.adapter.rank 3"):
        peft_tensors(out, run_of("vit_dinov2", kind(rank=4), targets=["*.qkv"]).module)
    save_file({"base_model.model.blocks.0.x": torch.zeros(1)}, out / "adapter_model.safetensors")
    with pytest.raises(UserError, match=f"which is nothing of {kind.__name__}"):
        peft_tensors(out, run_of("vit_dinov2", kind(rank=3), targets=["*.qkv"]).module)


def test_ranks_may_differ_and_towers_are_told_apart(tmp_path):
    """open_clip calls the text blocks what the image blocks end with."""
    run = run_of(adapter=LoRA(rank=2), targets=["text.*.[qkv]", "image.0.v", "text.1.fc1"])
    exported(run, "peft", tmp_path / "out")


@pytest.mark.parametrize(
    ("adapter", "targets", "wanted", "reason"),
    [
        (None, ["*"], command.DEFAULTS, "has no adapter for PEFT"),
        (FullTuning(), ["*"], command.DEFAULTS, "has no adapter for PEFT"),
        (LoRA(rank=2), ["image.*.o"], command.DEFAULTS, "twice: export --layout transformers"),
        (RandLoRA(rank=3), ["*.q", "*.fc1"], TRANSFORMERS, None),
        (DoRA(rank=2, wise_alpha=0.5), ["*.q"], TRANSFORMERS, "wise_alpha is not 1"),
    ],
)
def test_what_peft_cannot_have_is_refused(adapter, targets, wanted, reason, tmp_path):
    run = run_of(adapter=adapter, targets=targets)
    if reason is None:
        exported(run, "peft", tmp_path / "out", wanted)
        return
    with pytest.raises(UserError, match=reason):
        export(run, "peft", tmp_path / "out", wanted)


def test_lossy_takes_the_nearest_lora_and_says_how_far_it_is(tmp_path):
    run = run_of(adapter=case_of("svft"), targets=["image.*.q"])
    found = []
    for rank in (1, 8, 32):
        out, checked = export(run, "peft", tmp_path / str(rank), Wanted(lossy=True, rank=rank))
        found.append(checked.relative)
        assert json.loads((out / "export.json").read_text())["check"]["relative"] == checked.relative
    assert found[0] > found[1] > found[2]
    assert found[2] <= EXACT, "of full rank it is exact"


# ------------------------------------------------------------------------------------------------ the output test


def test_an_export_that_answers_otherwise_is_refused_and_leaves_nothing(tmp_path, monkeypatch):
    run = run_of(adapter=LoRA(rank=2))
    frozen = merged.library_backbone
    monkeypatch.setattr(merged, "library_backbone", lambda run: frozen(run, adapted=False))
    with pytest.raises(UserError, match=r"is not the run: On 40 images of noise .* logits differ .* --lossy"):
        export(run, "merged", tmp_path / "out", count=40)
    assert not list(tmp_path.iterdir())
    _, checked = export(run, "merged", tmp_path / "out", Wanted(lossy=True), 40)
    assert checked.relative > 0.01


def test_the_figures_of_the_output_test_are_what_they_say():
    run = run_of()
    probe = probe_of(run, 3)._replace(label=torch.tensor([0, 1, 2]))
    expected, found = (
        torch.tensor([[4.0, 0, 0], [0, 4, 0], [0, 0, 4]]),
        torch.tensor([[4.0, 0, 0], [3, 0, 0], [0, 0, 4]]),
    )
    checked = compare(run, expected, lambda image: found[: len(image)], probe)
    assert (checked.logits, checked.relative) == (4, 1)
    assert checked.agreement == checked.accuracy == pytest.approx(2 / 3)
    assert checked.accuracy_of_run == 1
    change = found.softmax(-1) - expected.softmax(-1)
    assert checked.probabilities == pytest.approx(float(change.abs().max()))


# ------------------------------------------------------------------------------------------------ without kshot

START = """
import gc, json, os, sys, traceback
gc.disable()
sys.modules["kshot"] = None
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file, save_file
torch.set_grad_enabled(False)
def answers(features, file):
    with safe_open(file, "pt") as f:
        kind, weight, bias = f.metadata()["kind"], f.get_tensor("weight"), f.get_tensor("bias")
    return (F.normalize(features, dim=-1) if kind == "cosine" else features) @ weight.T + bias
os.chdir(sys.argv[1])
for folder, (base, code) in json.load(open("readers.json")).items():
    images, told = load_file(f"{folder}.images")["images"], json.load(open(folder + "/export.json"))["preprocessing"]
    mean, std = (torch.tensor(told[k]).view(1, 3, 1, 1) for k in ("mean", "std"))
    space = {**globals(), "x": (images - mean) / std}
    try:
        exec(code, space)
        save_file({"logits": space["logits"].contiguous()}, f"{folder}.logits")
    except Exception:
        open(f"{folder}.error", "w").write(traceback.format_exc())
"""
READERS = {
    "open_clip": """
import open_clip
model = open_clip.create_model("local-dir:" + folder).eval()
model.load_state_dict(load_file(folder + "/open_clip_model.safetensors"), strict=True)
logits = answers(model.encode_image(x), folder + "/head.safetensors")
""",
    "timm": """
import timm
model = timm.create_model("local-dir:" + folder, pretrained=True).eval()
model.load_state_dict(load_file(folder + "/model.safetensors"), strict=True)
logits = answers(model(x), folder + "/head.safetensors")
""",
    "transformers": """
from transformers import AutoModel
model, told = AutoModel.from_pretrained(folder, output_loading_info=True)
assert not told["missing_keys"] and not told["unexpected_keys"]
features = model.eval().get_image_features(pixel_values=x)
logits = answers(getattr(features, "pooler_output", features), folder + "/head.safetensors")
""",
    "peft": """
import open_clip
from peft import PeftModel
model = PeftModel.from_pretrained(open_clip.create_model("local-dir:" + base), folder).eval()
logits = answers(model.encode_image(x), folder + "/head.safetensors")
""",
    "torch": """
program = torch.export.load(folder + "/model.pt2").module()
logits = program(images)["logits"]
assert program(images[:1])["probabilities"].shape == (1, 3)
""",
    "onnx": """
import onnxruntime
session = onnxruntime.InferenceSession(folder + "/model.onnx")
logits, probabilities = (torch.from_numpy(y) for y in session.run(None, {"image": images.numpy()}))
assert (probabilities - logits.softmax(-1)).abs().max() < 1e-5
""",
}
FORMS = {
    "open_clip": "merged",
    "timm": "merged",
    "transformers": "merged",
    "peft": "peft",
    "torch": "torch",
    "onnx": "onnx",
}


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """A folder with an export for each reader and its logits of eight images, of one process without kshot.

    Beside it the runs that were exported, by reader.
    """
    folder, runs, told = tmp_path_factory.mktemp("alone"), {}, {}
    for reader, form in FORMS.items():
        name = {"timm": "vit_dinov2", "onnx": "clip_one_block"}.get(reader, "clip")
        run = run_of(name, LoRA(rank=2), targets=["*.[qv]", "*.fc2"])
        if reader in ("torch", "onnx"):
            run = run_of(name, HydraLoRA(rank=2), CoOp if reader == "torch" else None, ["image.*.q"])
        runs[reader] = run
        exported(run, form, folder / reader, Wanted(layout="transformers" if reader == "transformers" else "native"))
        save_file({"images": probe_of(run, 8).images.float() / 255}, folder / f"{reader}.images")
        told[reader] = (run.module.backbone.name.removeprefix("local-dir:"), READERS[reader])
    (folder / "readers.json").write_text(json.dumps(told))
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", START, str(folder)]
    subprocess.run(command, capture_output=True, timeout=300, env=environment, check=True)
    return folder, runs


@pytest.mark.parametrize("reader", READERS)
def test_a_process_without_kshot_predicts_the_same(reader, alone):
    folder, run = alone[0], alone[1][reader]
    error = folder / f"{reader}.error"
    assert not error.exists(), error.read_text()
    found, expected = load_file(folder / f"{reader}.logits")["logits"], answers_of(run, probe_of(run, 8).images)
    assert float((found - expected).abs().max() / expected.abs().max()) <= EXACT


def test_a_program_says_what_it_is_and_has_no_text_tower(alone):
    told = {"kshot.json": ""}
    assert not has_text(torch.export.load(alone[0] / "torch" / "model.pt2", extra_files=told))
    assert json.loads(told["kshot.json"])["classes"] == NAMES


def test_an_onnx_file_says_what_it_is(alone):
    ort = pytest.importorskip("onnxruntime")
    folder, runs = alone
    session = ort.InferenceSession(str(folder / "onnx/model.onnx"))
    assert [each.shape[0] for each in (*session.get_inputs(), *session.get_outputs())] == ["batch"] * 3
    told = session.get_modelmeta().custom_metadata_map
    assert json.loads(told["classes"]) == NAMES
    assert json.loads(told["preprocessing"])["mean"] == list(runs["onnx"].module.backbone.preprocessing.mean)


# ------------------------------------------------------------------------------------------------ the command


@pytest.fixture(scope="module")
def lora(tmp_path_factory):
    return fit(tmp_path_factory.mktemp("runs"), *UNTESTED)


def test_the_command_tries_what_it_wrote_on_the_test_images(lora, tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        main(["export", str(lora), "--format", "merged", "--images", "60"])
    assert end.value.code == 0
    said = capsys.readouterr().out
    assert f"TextPrompt + LoRA as merged, 13.9 MB: {lora / 'export' / 'merged'}" in said
    assert "On 60 test images of digits, float32: logits differ by at most" in said
    assert "100.00% of the labels are the same. Accuracy" in said
    report = json.loads((lora / "export" / "merged" / "export.json").read_text())
    assert report["check"]["accuracy"] == report["check"]["accuracy_of_run"]
    assert report["classes"][0] == "zero"
    before = {file: file.stat().st_mtime_ns for file in lora.rglob("*")}
    line = refused(capsys, ["export", str(lora), "--format", "merged"])
    assert "exists already, and nothing is overwritten" in line
    assert {file: file.stat().st_mtime_ns for file in lora.rglob("*")} == before
    words = ["--format", "merged", "--dtype", "float16", "--json", "--images", "60", "--out", str(tmp_path / "o")]
    with pytest.raises(SystemExit):
        main(["export", str(lora), *words])
    told = json.loads(capsys.readouterr().out)
    assert 1e-7 < told["relative"] < 0.01


def test_onnx_in_8_bits_states_its_accuracy(lora, tmp_path, capsys):
    pytest.importorskip("onnxruntime")
    words = ["export", str(lora), "--format", "onnx", "--dtype", "int8", "--out", str(tmp_path / "int8"), "--json"]
    words += ["--images", "100"]
    with pytest.raises(SystemExit):
        main(words)
    told = json.loads(capsys.readouterr().out)
    assert abs(told["accuracy"] - told["accuracy_of_run"]) < 0.05
    assert 1e-4 < told["relative"] < 0.1
    assert (tmp_path / "int8" / "model.onnx").stat().st_size < 5e6
    assert {file.name for file in (tmp_path / "int8").iterdir()} == {"model.onnx", "export.json"}


def newer(folder: Path, run: Path) -> list[str]:
    tensors, header = read_tensors(run / "tuned.safetensors")
    write_tensors(folder / "tuned.safetensors", tensors, header | {"format": 99})
    (folder / "config.yaml").write_bytes((run / "config.yaml").read_bytes())
    return [str(folder)]


def moved(folder: Path, run: Path) -> list[str]:
    text = (run / "config.yaml").read_text().replace("kshot:glyph_clip", "local-dir:gone/glyph")
    (folder / "config.yaml").write_text(text)
    (folder / "tuned.safetensors").write_bytes((run / "tuned.safetensors").read_bytes())
    return [str(folder)]


def unwritable(folder: Path, run: Path) -> list[str]:
    (folder / "file").write_text("")
    return [str(run), "--out", str(folder / "file" / "out")]


MISTAKES = {
    "none": (lambda folder, run: [str(folder)], "is no finished run: it has no config.yaml"),
    "nowhere": (lambda folder, run: [str(folder / "x")], "There is no run"),
    "newer": (newer, "has format 99, and this version reads up to 3: update kshot"),
    "moved": (moved, "weights of the run's backbone are not in gone/glyph any more: say where they are, as --weights"),
    "unwritable": (unwritable, "/file cannot be made: file exists"),
    "int8": (lambda folder, run: [str(run), "--dtype", "int8"], "--dtype int8 is of --format onnx"),
    "word": (lambda folder, run: [str(run), "--fast"], "export: unrecognized arguments: --fast; --help says"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_mistakes_get_one_line_and_write_nothing(case, lora, tmp_path, capsys):
    words, message = MISTAKES[case]
    given = words(tmp_path, lora)
    before = sorted(tmp_path.rglob("*"))
    line = refused(capsys, ["export", *given, "--format", "torch" if case != "int8" else "merged"])
    assert message in line
    assert sorted(tmp_path.rglob("*")) == before


def test_weights_that_were_moved_are_taken_from_where_they_are(lora, tmp_path, capsys):
    moved(tmp_path, lora)
    words = ["export", str(tmp_path), "--format", "merged", "--weights", "kshot:glyph_clip", "--images", "20"]
    with pytest.raises(SystemExit) as end:
        main(words)
    assert end.value.code == 0
    assert "100.00% of the labels" in capsys.readouterr().out


def test_a_package_that_is_missing_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(UserError, match=r"^onnx is not installed: pip install 'kshot\[export\]'\.$"):
        export(run_of(), "onnx", tmp_path / "out")
    assert not list(tmp_path.iterdir())


# ------------------------------------------------------------------------------------------------ and back


@pytest.mark.parametrize(
    ("name", "layout"),
    [("clip", "native"), ("clip", "transformers"), ("vit_dinov2", "native"), ("vit_qk_norm", "native")],
)
@pytest.mark.parametrize("label", ["lora", "pissa", "autolora"])
def test_a_lora_of_peft_comes_back(name, layout, label, tmp_path):
    targets = ["*.[qv]", "*.fc2"]
    run = run_of(name, case_of(label), targets=targets)
    out = exported(run, "peft", tmp_path / "out", Wanted(layout=layout))
    back = run_of(name, LoRA(rank=5, alpha=3), targets=targets)  # of a larger rank, and with a scale of its own
    comes_back(run, out, back)


@pytest.mark.parametrize(
    ("adapter", "targets", "message"),
    [
        (LoRA(rank=1), ["image.*.[qv]"], r"rank 2 on 4 slots, .* set --model.adapter LoRA --model.adapter.rank 2"),
        (LoRA(rank=2), ["*.q"], r"config has LoRA on 4 slots: .*--model.targets '\[\"image.\*.\[qv\]\"\]'"),
        (None, [], "the config has no adapter"),
    ],
)
def test_a_lora_that_does_not_fit_is_refused(adapter, targets, message, tmp_path):
    run = run_of(adapter=LoRA(rank=2), targets=["image.*.[qv]"])
    out = exported(run, "peft", tmp_path / "out")
    with pytest.raises(UserError, match=message):
        peft_tensors(out, run_of(adapter=adapter, targets=targets).module)
    with pytest.raises(UserError, match="is no folder of PEFT's"):
        peft_tensors(tmp_path, run.module)
    with pytest.raises(UserError, match="has no such module"):
        peft_tensors(out, run_of("vit_qk_norm", LoRA(rank=2)).module)


def test_the_command_reads_a_folder_of_peft(lora, tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["export", str(lora), "--format", "peft", "--out", str(tmp_path / "peft"), "--images", "20"])
    capsys.readouterr()
    main(
        [
            "import",
            "--config",
            "clip_16shot.yaml",
            "--file",
            str(tmp_path / "peft"),
            "--out",
            str(tmp_path / "b.safetensors"),
        ]
    )
    assert "TextPrompt + LoRA from" in capsys.readouterr().out
    there, here = (read_tensors(file)[0] for file in (lora / "tuned.safetensors", tmp_path / "b.safetensors"))
    assert there.keys() == here.keys()
    for name in there:
        torch.testing.assert_close(here[name], there[name])
