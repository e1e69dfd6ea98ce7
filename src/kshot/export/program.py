"""A run as one program from images to logits and probabilities, and ``torch``: its file that torch alone loads."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.export.graph_signature import InputKind

from kshot.export.check import Answers
from kshot.export.written import INPUT, OUTPUTS, Wanted, facts_of
from kshot.holding import merged
from kshot.opening import OpenRun
from kshot.slots import projections_of

FILE = "model.pt2"
STATE = (InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT_TENSOR)


class Deployed(nn.Module):
    """What users of a program see: logits as the run computes them, and probabilities by its temperature."""

    def __init__(self, module: Any) -> None:
        super().__init__()
        self.module = module

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        """Logits and probabilities, (B, classes) float32, of images, (B, 3, H, W), floats in [0, 1]."""
        logits: Tensor = self.module(image).float()
        return {"logits": logits, "probabilities": self.module.calibration.logits(logits).softmax(-1)}


def program_of(run: OpenRun, dtype: torch.dtype = torch.float32) -> ExportedProgram:
    """A run as a program of torch for any number of images: adapters merged, class features computed.

    The tensors in it are those that it uses: a text tower is there only where prompts depend on the image.
    """
    backbone: Any = run.module.backbone
    module = copy.deepcopy(run.module, {id(each): each for each in [getattr(backbone, "tokenizer", None)]})
    module.backbone.settle()
    size = backbone.image_size
    with merged(module), torch.no_grad():
        backbone = module.backbone.to(dtype)  # the classifier computes in float32
        for projection in projections_of(backbone):
            if projection.held is not None:
                projection.held = projection.held.to(dtype)
        return traced(Deployed(module), torch.zeros(2, 3, size, size))


def traced(module: nn.Module, example: Tensor) -> ExportedProgram:
    """A module as a program for any number of rows of its input; tensors that it does not use are left out."""
    with torch.no_grad():
        program = torch.export.export(module, (example,), dynamic_shapes=({0: Dim("batch", min=1)},))
    return pruned(program)


def pruned(program: ExportedProgram) -> ExportedProgram:
    """The program without the tensors that it does not use."""
    nodes = [node for node in program.graph.nodes if node.op == "placeholder"]
    specs = program.graph_signature.input_specs
    for node, spec in zip(nodes, list(specs), strict=True):
        if spec.kind in STATE and not node.users:
            program.graph.erase_node(node)
            specs.remove(spec)
            for kept in (program.state_dict, program.constants):
                cast("dict[str, Any]", kept).pop(str(spec.target), None)
    program.graph_module.recompile()
    return program


def write(run: OpenRun, folder: Path, wanted: Wanted) -> Answers:
    """``model.pt2``, which ``torch.export.load`` opens, with what to know of it in the extra file ``kshot.json``."""
    program = program_of(run, wanted.dtype)
    told = json.dumps(facts_of(run) | {"inputs": INPUT, "outputs": OUTPUTS})
    torch.export.save(program, folder / FILE, extra_files={"kshot.json": told})
    loaded = torch.export.load(folder / FILE).module()
    return lambda image: loaded(image)["logits"]
