"""All that kshot relies on in other libraries without their having promised it, in one list, with a test each."""

import ast
import inspect
from functools import cache, partial
from pathlib import Path

import open_clip
import pytest
import timm
import torch
from jsonargparse import ArgumentParser
from torch.optim.lr_scheduler import CosineAnnealingLR

import kshot
from kshot.optim import ScheduleFactory, built_by

ROOT = Path(kshot.__file__).parent

PRIVATE = {  # names with an underscore in src
    "_embeds": "open_clip's image tower up to its blocks, between which prompts are put",
    "_pos_embed": "timm's image tower up to its blocks",
    "_samples": "torchvision's GTSRB and others: paths and labels, which it gives in no other way",
    "_utils": "torch: what a pickled tensor is rebuilt by, for released files that torch.load does not read",
    "_rebuild_tensor": "the same",
}
UNDOCUMENTED = {  # names without one
    "jsonargparse: a factory is partial(builder, class, **settings)": "kshot.optim.built_by finds the class in it",
    "importlib.metadata: what the first finder raises ends a search": "kshot.lean: a start in half the time",
    "open_clip: visual.ln_pre, _pool, proj, output_tokens; text.attn_mask": "kshot.backbones.towers and open_clip",
    "timm: norm_pre, patch_drop, rope, rope_mixed, forward_head, q_bias": "kshot.backbones.towers and unfuse",
}
WRITTEN = {  # attributes of foreign modules that src sets
    "hub.py: constants.HF_HUB_OFFLINE": "for as long as weights are loaded: a hub out of reach costs no minute",
}


@cache
def trees() -> dict[Path, list[ast.AST]]:
    """The nodes of every file of src."""
    return {file: list(ast.walk(ast.parse(file.read_text(encoding="utf-8")))) for file in ROOT.rglob("*.py")}


def names_with_underscores() -> set[str]:
    """Private names of other libraries in src: imported, or read from an object and defined nowhere in src."""
    nodes = [node for each in trees().values() for node in each]
    own = {n.name for n in nodes if isinstance(n, (ast.FunctionDef, ast.ClassDef))}
    own |= {n.attr for n in nodes if isinstance(n, ast.Attribute) and isinstance(n.ctx, ast.Store)}
    own |= {n.id for n in nodes if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
    own |= {"_asdict", "_replace", "_exit"}  # documented: of named tuples, and of os
    found = {n.attr for n in nodes if isinstance(n, ast.Attribute)} - own
    found = {name for name in found if name.startswith("_") and not name.startswith("__")}
    for node in nodes:
        if isinstance(node, ast.ImportFrom) and node.module and not node.module.startswith(("kshot", "__future__")):
            paths = [f"{node.module}.{alias.name}" for alias in node.names]
            found |= {path for path in paths if any(part.startswith("_") for part in path.split("."))}
    return found


def test_no_private_name_but_those_of_the_list():
    assert names_with_underscores() == set(PRIVATE)


def test_nothing_of_another_library_is_replaced():
    """No module of ours assigns to an attribute of a foreign module or class."""
    for file, nodes in trees().items():
        foreign = {
            alias.asname or alias.name.split(".")[0]
            for node in nodes
            if isinstance(node, (ast.Import, ast.ImportFrom))
            for alias in node.names
            if not (getattr(node, "module", None) or alias.name).startswith("kshot")
        }
        for node in nodes:
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
                holder = node
                while isinstance(holder, ast.Attribute):
                    holder = holder.value
                if isinstance(holder, ast.Name) and holder.id in foreign:
                    assert f"{file.name}: {ast.unparse(node)}" in WRITTEN, f"line {node.lineno}"


def test_the_class_lies_in_the_factory_of_a_config(monkeypatch):
    monkeypatch.setenv("JSONARGPARSE_DEPRECATION_WARNINGS", "off")
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--schedule", type=ScheduleFactory)
    spec = {"class_path": "torch.optim.lr_scheduler.CosineAnnealingLR", "init_args": {"T_max": 5}}
    factory = parser.instantiate_classes(parser.parse_object({"schedule": spec})).schedule
    assert isinstance(factory, partial)
    assert built_by(factory) is CosineAnnealingLR
    assert built_by(partial(partial(CosineAnnealingLR, T_max=1), eta_min=0.1)) is CosineAnnealingLR


def test_open_clip_towers_have_the_parts_between_which_prompts_go():
    vision = {"layers": 1, "width": 64, "head_width": 64, "image_size": 32, "patch_size": 16}
    text = {"layers": 1, "width": 64, "heads": 1, "vocab_size": 50}
    clip = open_clip.CLIP(64, vision, text)
    visual, image = clip.visual.eval(), torch.rand(2, 3, 32, 32)
    x = visual._embeds(image)
    for block in visual.transformer.resblocks:
        x = block(x)
    pooled, _ = visual._pool(x)
    torch.testing.assert_close(pooled @ visual.proj, visual(image))
    assert "self.ln_pre" in inspect.getsource(type(visual)._embeds)
    assert clip.attn_mask.shape[0] == clip.attn_mask.shape[1]


def test_timm_towers_have_the_parts_between_which_prompts_go():
    vit = timm.create_model("test_vit", num_classes=0).eval()
    image = torch.rand(2, 3, *vit.patch_embed.img_size)
    x = vit.norm_pre(vit.patch_drop(vit._pos_embed(vit.patch_embed(image))))
    for block in vit.blocks:
        x = block(x)
    torch.testing.assert_close(vit.norm(x), vit.forward_features(image))


@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated")
def test_torch_rebuilds_tensors_by_the_name_that_files_hold():
    tensor = torch.arange(6.0).view(2, 3)
    assert torch.equal(torch._utils._rebuild_tensor(tensor.storage(), 0, (2, 3), (3, 1)), tensor)
