"""The temperature of few and of many held-out images, against SciPy's minimum of what it is defined by."""

import math

import pytest
import torch
import torch.nn.functional as F
from scipy.optimize import minimize_scalar

from kshot.calibration import SPREAD, calibrate


def drawn(images: int, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of which the softmax of ``scale`` times is how often each of 5 classes is right."""
    chance = torch.Generator().manual_seed(3)
    logits = torch.randn(images, 5, generator=chance).double() * 3
    return logits, torch.multinomial((scale * logits).softmax(-1), 1, generator=chance)[:, 0]


@pytest.mark.parametrize("images", [4, 40, 400])
@pytest.mark.parametrize("scale", [0.2, 1.0, 3.0])
def test_it_is_the_most_probable_one(images, scale):
    logits, label = drawn(images, scale)

    def loss(u: float) -> float:
        return float(F.cross_entropy(logits * math.exp(u), label, reduction="sum")) + (u / SPREAD) ** 2 / 2

    found = minimize_scalar(loss, bounds=(-5, 5), method="bounded", options={"xatol": 1e-9}).x
    assert calibrate(logits, label, 3, 1).temperature == pytest.approx(math.exp(-found), rel=1e-4)


def test_many_images_have_their_way():
    assert calibrate(*drawn(20_000, 0.3), 3, 1).temperature == pytest.approx(1 / 0.3, rel=0.03)


def test_ten_images_that_are_all_right_do_not_make_answers_certain():
    logits = 5 * torch.eye(10).double()
    assert 0.3 < calibrate(logits, torch.arange(10), 3, 1).temperature < 1
