"""Temperatures and thresholds, against scikit-learn, a search, and counting by hand."""

import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.optimize import minimize_scalar

from kshot.calibration import RATES, SPREAD, Calibration, calibrate, score, stored_calibration, thresholds
from kshot.errors import UserError


def noisy_logits(images=300, classes=5, seed=0, size=4.0):
    generator = torch.Generator().manual_seed(seed)
    label = torch.randint(classes, (images,), generator=generator)
    signal = F.one_hot(label, classes) + torch.randn(images, classes, generator=generator, dtype=torch.float64)
    return size * signal, label


def test_the_temperature_is_the_most_probable_one():
    logits, label = noisy_logits()
    found = calibrate(logits, label, learnt=3.0, folds=4)

    def loss(log_temperature):
        scaled = logits / math.exp(log_temperature)
        return float(F.cross_entropy(scaled, label, reduction="sum")) + log_temperature**2 / (2 * SPREAD**2)

    expected = math.exp(minimize_scalar(loss, bounds=(-5, 5), method="bounded", options={"xatol": 1e-9}).x)
    assert found.temperature == pytest.approx(expected, rel=1e-4)
    assert found.temperature > 1
    assert (found.held_out, found.learnt, found.folds) == (300, 3.0, 4)
    assert torch.equal(found.logits(logits), logits / found.temperature)


def test_scores_rise_with_certainty():
    logits = torch.tensor([[2.0, 0.0, 0.0], [5.0, 0.0, 0.0]], dtype=torch.float64)
    assert torch.equal(score("probability", logits), logits.softmax(-1)[:, 0])
    assert score("energy", logits).tolist() == pytest.approx(np.logaddexp.reduce(logits.numpy(), axis=1).tolist())


def test_a_threshold_answers_as_many_as_its_rate_allows():
    scores = torch.tensor([0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1])
    right = torch.tensor([True, True, True, True, False, True, True, False, False])
    found = thresholds(scores, right)
    assert set(found) <= {f"{rate:g}" for rate in RATES}
    # (w + 1/2) / (n + 1): four right ones show 0.1, and seven with one wrong 0.1875
    assert found["0.1"] == {"threshold": pytest.approx(0.6), "answered": pytest.approx(4 / 9, abs=1e-4)}
    assert found["0.2"] == {"threshold": pytest.approx(0.3), "answered": pytest.approx(7 / 9, abs=1e-4)}
    assert "0.05" not in found


def test_equal_scores_are_answered_together():
    right = torch.tensor([True] * 5 + [False] * 5)
    assert thresholds(torch.full((10,), 0.5), right) == {}


def test_certain_and_right_answers_show_as_much_as_their_number():
    found = thresholds(torch.linspace(0.1, 1, 60), torch.ones(60, dtype=torch.bool))
    assert set(found) == {"0.01", "0.02", "0.05", "0.1", "0.2"} - {"0.01"} | ({"0.01"} if 0.5 / 61 <= 0.01 else set())
    assert found["0.05"]["answered"] == 1.0


def test_a_rate_takes_the_nearest_stricter_threshold_or_says_what_there_is():
    logits, label = noisy_logits()
    found = calibrate(logits, label, 3.0, 4)
    strict, loose = (found.abstain["probability"][rate]["threshold"] for rate in ("0.1", "0.2"))
    assert strict > loose
    assert found.threshold("probability", 0.15) == strict
    with pytest.raises(UserError, match=r"no threshold of probability for an error rate of 0.0001: the least is"):
        found.threshold("probability", 1e-4)
    with pytest.raises(UserError, match="not calibrated"):
        Calibration().threshold("energy", 0.1)


def test_a_file_gives_it_back():
    found = calibrate(*noisy_logits(), 3.0, 4)
    assert stored_calibration(json.loads(json.dumps(found.plain()))) == found
    assert stored_calibration(None) == Calibration()
    assert torch.equal(Calibration().logits(torch.ones(2)), torch.ones(2))
