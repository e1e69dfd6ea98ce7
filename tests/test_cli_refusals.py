"""The command line refuses mistakes in one line, and writes nothing."""

from pathlib import Path

import pytest
import torch
import towers
from command_line import (
    FIT,
    QUICK,
    ROOT,
    TINY_VIT,
    fit,
    photos,
    predict,
    refused,
)

from kshot.cli import main

REFUSALS = {
    "--model.backbone OpenCip": "Did you mean 'OpenClip'?",
    "--model.backbone.model kshot:glyph": "Did you mean 'kshot:glyph_clip'?",
    "--model.backbone.model ViT-B-17": "Did you mean 'ViT-B-16'?",
    "--model.backbone.model ViT-B-16": "no weights named",
    "--model.backbone.model ViT-B-16 --model.backbone.pretrained openai": "use model: ViT-B-16-quickgelu",
    "--model.backbone.model ViT-B-16 --model.backbone.pretrained opnai": "Did you mean 'openai'?",
    "--model.backbone.image_size 33": "use 32 or 40",
    "--data.image_size 64": "set it on the backbone",
    "--model.adapter LoRAA": "Did you mean 'LoRA'?",
    "--model.adapter.rnak 3": "Did you mean 'rank'?",
    "--model.adapter.rank many": "Got value: many",
    "--model.adapter.rank 0": "must be at least 1",
    "--model.adapter.rank 1000": "larger than the smaller side, 192, of the slot image.0.q",
    "--model.adapter.alpha -2": "alpha is -2.0, and must be a positive number",
    "--model.adapter.alpha .nan": "alpha is nan, and must be a positive number",
    "--model.adapter.path svd": "path is svd, and must be one of auto, factorised, materialised",
    "--model.targets [image.0.qkv,image.0.q]": "are the same rows",
    "--config methods/adalora.yaml --model.adapter.target_rank 20": "target_rank is 20",
    "--config methods/adalora.yaml --model.adapter.initial_steps 900": "the run has 200 steps",
    "--config methods/autolora.yaml --data.shots 1": "has one training image",
    "--config methods/nola.yaml --model.adapter.bases 900000000": "lower bases or rank",
    "--config methods/nola.yaml --model.adapter.save_bits 5": "save_bits",
    "--config methods/lora_xs.yaml --model.adapter.rank 193": "the smaller side, 192, of the slot image.0.q",
    "--config methods/svft.yaml --model.adapter.pattern top_k": "needs square weights, and image.0.fc1",
    "--config methods/vera.yaml --model.adapter.seed -1": "seed is -1",
    "--config methods/pranc.yaml --model.adapter.coefficients 0": "coefficients is 0",
    "--model.classifier CoOpp": "Did you mean 'CoOp'?",
    "--model.targets [image.*.qq]": "image.0.q, image.0.k",
    "--data.dataset digts": "Did you mean 'digits'?",
    "--data.dataset no/such/folder": "no/such/folder",
    "--data.shots 500": "--data.allow_fewer true",
    "--data.shots 0": "shots",
    "--data.template hello": "{}",
    "--data.shot 3": "Did you mean 'shots'?",
    "--fooo 3": "'--fooo'",
    "--config studies/digits.yaml": "is a study of many runs: python main.py sweep --config studies/digits.yaml",
    "--trainer.strategy nope": "trainer.strategy: there is no 'nope'",
    "--trainer.devices 0": "trainer.devices is 0, and must be",
    "--trainer.accelerator tpu": "trainer.accelerator is tpu, and on this machine it may be",
    "--trainer.precision 12": "trainer.precision: Expected",
    "--ckpt_path best": "There is no checkpoint best",
    "--ckpt_path nope.ckpt": "There is no checkpoint nope.ckpt",
    "--config clip_16shoot": "Did you mean 'clip_16shot.yaml'?",
    "--config methods/linear_probe.yaml --model.adapter LoRA --model.targets [text.2.o] --data.shots 1": "no gradient",
    "--config methods/coop.yaml --model.classifier.init_words photo": "give one of the two",
    "--config methods/coop.yaml --model.classifier.context_length 60": "the class 'zero' has 1 tokens, and with 60",
    "--config methods/coop.yaml --model.classifier.class_specific true --data.protocol base-to-new": "class-specific",
    "--config methods/promptsrc.yaml --model.classifier.depth 9": "the text tower has 3 blocks: give 1 to 3",
    "--config methods/maple.yaml --model.classifier.context_length 5": "give one of the two",
    "--config methods/dept.yaml --model.classifier.base LinearProbe": "DePT needs a base that learns prompts",
    "--config methods/dept.yaml --model.classifier.balance 2": "balance is 2.0, and must lie in [0, 1]",
    "--config methods/vpt.yaml --model.classifier.head NearestClassMean": "has a closed form: use LinearProbe",
    "--config methods/zero_shot.yaml --model.classifier.templates imagenet8": "Did you mean 'imagenet80'?",
    "--model.backbone.text_memory_gb 0": "not a positive number",
    "--model.schedule.floor 2": "floor",
    "--model.classifier NearestClassMean": "NearestClassMean + LoRA would leave LoRA untrained",
    " ".join(TINY_VIT): "TextPrompt needs a text tower",
}


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        *(([*FIT, *options.split()], expected) for options, expected in REFUSALS.items()),
        (["predict", "--run", "runs"], "--images"),
        (["predict", "--images", "x"], "--run"),
        (["predict", "--run", "runs", "--images", "no/such"], "no/such"),
        (["predict", "--run", "no/run", "--images", str(ROOT / "main.py")], "There is no run no/run"),
        (["predict", "--run", "no/run", "--images", str(ROOT / "main.py"), "--out", "x.txt"], "ends in none of .csv"),
    ],
)
def test_a_mistake_gets_one_line_and_writes_nothing(arguments, expected, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert expected in refused(capsys, arguments)
    assert list(tmp_path.iterdir()) == []


def test_folders_with_mistakes(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("cat", "dog"):
        photos(tmp_path / "animals" / name, 8)
    data = [*FIT, "--data.dataset", "animals", "--data.shots", "1", "--trainer.max_epochs", "1"]
    (tmp_path / "animals" / "bird").mkdir()
    assert "bird" in refused(capsys, data)
    (tmp_path / "animals" / "bird").rmdir()
    photos(tmp_path / "animals" / "DOG", 4)
    assert "DOG" in refused(capsys, data)
    for path in (tmp_path / "animals" / "DOG").rglob("*.png"):
        path.unlink()
    for path in sorted((tmp_path / "animals" / "DOG").rglob("*"), reverse=True):
        path.rmdir()
    (tmp_path / "animals" / "DOG").rmdir()
    for path in (tmp_path / "animals").rglob("*.png"):
        path.write_bytes(path.read_bytes()[:60])
    assert ".png" in refused(capsys, data)
    assert not (tmp_path / "runs").exists()


def test_a_checkpoint_of_another_backbone_or_method_is_refused(fitted, capsys, tmp_path):
    checkpoint = ["--ckpt_path", str(fitted / "tuned.safetensors"), "--run.root", str(tmp_path)]
    other = ["--model.backbone.model", str(towers.folder_of("clip"))]
    assert "belongs to the backbone kshot:glyph_clip" in refused(capsys, ["test", *FIT[1:], *checkpoint, *other])
    method = ["--config", "methods/coop.yaml"]
    assert "and the config says CoOp" in refused(capsys, ["test", *FIT[1:], *method, *checkpoint])
    assert "weights only" in refused(capsys, [*FIT, *checkpoint])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", ["test", "validate"])
@pytest.mark.parametrize("method", ["lora", "class_mean"])
def test_measuring_what_was_never_trained_is_refused(command, method, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments = [command, "--config", "clip_16shot.yaml", "--config", f"methods/{method}.yaml"]
    assert "has learnt nothing yet" in refused(capsys, arguments)
    assert list(tmp_path.iterdir()) == []


def test_zero_shot_needs_no_checkpoint(tmp_path):
    folder = photos(tmp_path / "photos", 2)
    main(["test", *FIT[1:], "--config", "methods/zero_shot.yaml", *QUICK, "--run.root", str(tmp_path / "runs")])
    run = fit(tmp_path / "fits", "--config", "methods/zero_shot.yaml")
    predict(run, "--images", folder, "--out", tmp_path / "found.csv")
    assert len((tmp_path / "found.csv").read_text().splitlines()) == 3


def test_a_place_that_cannot_be_written_gets_one_line(fitted, capsys, tmp_path):
    (tmp_path / "file").write_text("in the way")
    assert "choose another --run.root" in refused(capsys, [*FIT, *QUICK, "--run.root", str(tmp_path / "file")])
    images = ["--images", str(photos(tmp_path / "photos", 1)), "--out", str(tmp_path / "file" / "out.csv")]
    line = refused(capsys, ["predict", "--run", str(fitted), *images])
    assert f"{tmp_path / 'file'} cannot be made" in line
    assert not (tmp_path / "runs").exists()


def test_a_pickle_is_not_executed(capsys, tmp_path):
    class Harm:
        def __reduce__(self):
            return Path.touch, (tmp_path / "harm",)

    torch.save({"state_dict": {}, "x": Harm()}, tmp_path / "evil.ckpt")
    line = refused(capsys, ["test", *FIT[1:], "--ckpt_path", str(tmp_path / "evil.ckpt")])
    assert "something else than tensors and plain values" in line
    assert not (tmp_path / "harm").exists()


def test_a_mistake_in_a_config_names_its_file(tmp_path, capsys):
    file = tmp_path / "mine.yaml"
    file.write_text("model: {init_args: {no_such: 1}}")
    said = "FewShotModule has no option 'no_such'. There are: "
    assert refused(capsys, [*FIT, "--config", str(file)]).startswith(f"error: {file}: {said}")
    assert refused(capsys, [*FIT, "--model.no_such", "1"]).startswith(f"error: {said}")
