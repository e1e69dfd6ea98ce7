"""The carried model and the script that makes it."""

import json
import runpy
import sys
from pathlib import Path

import pytest
import torch

from kshot.backbones import OpenClip
from kshot.backbones.open_clip import WEIGHTS

ROOT = Path(__file__).parents[1]


def test_the_carried_folder_is_small_and_ordinary():
    folder = WEIGHTS / "glyph_clip"
    assert sum(file.stat().st_size for file in folder.iterdir()) < 8e6
    config = json.loads((folder / "open_clip_config.json").read_text())
    assert set(config) == {"model_cfg", "preprocess_cfg"}
    assert {file.name for file in folder.iterdir()} == {
        "open_clip_config.json",
        "open_clip_model.safetensors",
        "bpe_merges.txt.gz",
    }


def test_the_carried_model_knows_a_seven_from_a_question_mark():
    from PIL import Image, ImageDraw, ImageFont

    backbone = OpenClip("kshot:glyph_clip")
    font = ImageFont.load_default(30)
    images = []
    for sign in "7?":
        canvas = Image.new("L", (32, 32))
        ImageDraw.Draw(canvas).text((16, 16), sign, fill=255, font=font, anchor="mm")
        images.append(torch.tensor(list(canvas.tobytes()), dtype=torch.uint8).view(1, 32, 32).expand(3, -1, -1))
    with torch.no_grad():
        image = torch.nn.functional.normalize(backbone.encode_image(torch.stack(images)), dim=-1)
        tokens = backbone.tokenize(["a photo of the digit seven.", "a photo of the question mark."])
        text = torch.nn.functional.normalize(backbone.encode_tokens(tokens), dim=-1)
    assert (image @ text.T).argmax(1).tolist() == [0, 1]


@pytest.mark.slow
def test_the_training_script_makes_a_folder_that_loads(tmp_path, monkeypatch, capsys):
    arguments = [
        "--out",
        str(tmp_path / "clip"),
        "--steps",
        "20",
        "--images",
        "64",
        "--captions",
        "32",
        "--workers",
        "0",
    ]
    monkeypatch.setattr(sys, "argv", ["train_glyph_clip.py", *arguments])
    runpy.run_path(str(ROOT / "tools" / "train_glyph_clip.py"), run_name="__main__")
    assert "digits zero-shot" in capsys.readouterr().out
    backbone = OpenClip(str(tmp_path / "clip"))
    assert backbone.encode_image(torch.zeros(1, 3, 32, 32)).shape == (1, 128)
    carried = OpenClip("kshot:glyph_clip")
    assert backbone.clip.state_dict().keys() == carried.clip.state_dict().keys()
    merges = [(folder / "bpe_merges.txt.gz").read_bytes() for folder in (tmp_path / "clip", WEIGHTS / "glyph_clip")]
    assert merges[0] == merges[1]
