"""``onnx``: the program of a run for onnxruntime, with class names and preprocessing inside."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import torch

from kshot.backbones.hub import muted
from kshot.errors import UserError, first_line
from kshot.export.check import Answers
from kshot.export.needed import needed
from kshot.export.program import program_of
from kshot.export.written import INPUT, OUTPUTS, Wanted, facts_of
from kshot.opening import OpenRun

FILE = "model.onnx"


def write(run: OpenRun, folder: Path, wanted: Wanted) -> Answers:
    """``model.onnx``: input ``image``, outputs ``logits`` and ``probabilities``, for any number of images.

    Its metadata hold :func:`~kshot.export.written.facts_of` the run, as JSON under each name. With ``int8`` the weights
    of its products are stored in 8 bits, and inputs of products are rounded to 8 bits as they come.

    Raises:
        UserError: a package is not installed, or there is no such opset.
    """
    onnx, ort = needed("onnx", "onnxscript", "onnxruntime"), needed("onnxruntime")
    file = folder / FILE
    with muted(logging.WARNING):
        try:
            made = torch.onnx.export(
                program_of(run, wanted.dtype),
                dynamo=True,
                opset_version=wanted.opset,
                input_names=["image"],
                output_names=["logits", "probabilities"],
                verbose=False,
            )
        except Exception as error:  # the exporter and the converter of opsets raise what they like
            reason = f"torch cannot write this run as onnx of opset {wanted.opset}: {first_line(error)}"
            raise UserError(reason) from error
        assert made is not None
        made.save(file, external_data=sum(t.nbytes for t in run.module.backbone.parameters()) > LARGEST)
        if wanted.int8:
            quantise(file)
    opset = label(onnx, file, facts_of(run))
    if opset != wanted.opset:
        raise UserError(f"torch writes this run as onnx of opset {opset}, and not of {wanted.opset}: --opset {opset}.")
    session = ort.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    return lambda image: torch.from_numpy(session.run(["logits"], {"image": image.numpy()})[0])


LARGEST = 1_900_000_000  # bytes of tensors inside the file, which may have 2 GiB; else they lie in model.onnx.data


def label(onnx: Any, file: Path, facts: dict[str, Any]) -> int:
    """Writes what to know of a model into its metadata, and calls its free dimension ``batch``; gives its opset."""
    model = onnx.load(str(file), load_external_data=False)
    said = facts | {"input": INPUT, "outputs": OUTPUTS}
    onnx.helper.set_model_props(model, {name: as_text(value) for name, value in said.items()})
    for each in (*model.graph.input, *model.graph.output):
        each.type.tensor_type.shape.dim[0].dim_param = "batch"
    onnx.save(model, str(file))
    return int(next(each.version for each in model.opset_import if each.domain in ("", "ai.onnx")))


def as_text(value: Any) -> str:
    """A fact as metadata take it: words as they are, anything else as JSON."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def quantise(file: Path) -> None:
    """Stores the weights of products in 8 bits, one scale for each of their columns."""
    quantization = needed("onnxruntime.quantization")
    beside = file.with_name("whole.onnx")
    file.rename(beside)
    quantization.quantize_dynamic(str(beside), str(file), per_channel=True, weight_type=quantization.QuantType.QInt8)
    beside.unlink()
