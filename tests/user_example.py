"""What a user writes: run by ``tests/test_api.py``, and read by mypy, which must know each type."""

from typing import Any, assert_type

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

import kshot

run = kshot.fit(["clip_16shot.yaml", "methods/class_mean.yaml"], data="digits", shots=2, progress=False)
assert_type(run, kshot.Run)

array = np.zeros((48, 64, 3), dtype=np.uint8)
found = run.predict([Image.fromarray(array), array, torch.from_numpy(array).movedim(2, 0)], top_k=3)
assert_type(found, kshot.Predictions)
assert_type(found[0], kshot.Prediction)
assert_type(found[0].labels, tuple[str, ...])
assert_type(found[0].label, str)
assert_type(found[0].probability, float)
assert [each.labels for each in found] == [found[0].labels] * 3

assert_type(run.model, nn.Module)
assert_type(run.features(array), Tensor)
assert_type(run.result, dict[str, Any])
assert_type(run.report(), str)
assert_type(kshot.methods(), dict[str, str])
assert_type(kshot.datasets(), list[str])
try:
    kshot.load("runs/nowhere")
except kshot.UserError as error:
    print(error)
