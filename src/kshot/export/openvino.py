"""``openvino``: the program of a run for OpenVINO."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from kshot.errors import UserError, first_line
from kshot.export.check import Answers
from kshot.export.needed import needed
from kshot.export.program import program_of
from kshot.export.written import INPUT, OUTPUTS, Wanted, facts_of
from kshot.opening import OpenRun

FILE = "model.xml"


def write(run: OpenRun, folder: Path, wanted: Wanted) -> Answers:
    """``model.xml`` and ``model.bin``: input ``image``, outputs ``logits`` and ``probabilities``; facts as ``kshot``.

    Raises:
        UserError: OpenVINO is not installed, or cannot have the program.
    """
    ov = needed("openvino")
    try:
        model = ov.convert_model(program_of(run, wanted.dtype))
    except Exception as error:  # it raises what it likes
        raise UserError(f"OpenVINO cannot have this run: {first_line(error)}") from error
    for port, name in zip((*model.inputs, *model.outputs), ("image", "logits", "probabilities"), strict=True):
        port.get_tensor().set_names({name})
    model.set_rt_info(json.dumps(facts_of(run) | {"input": INPUT, "outputs": OUTPUTS}, ensure_ascii=False), "kshot")
    ov.save_model(model, str(folder / FILE), compress_to_fp16=False)
    compiled = ov.compile_model(str(folder / FILE), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return lambda image: torch.from_numpy(compiled({"image": image.numpy()})["logits"].copy())
