"""Forecasts: the law of growth, intervals against statsmodels' formula by hand, optimism against simulation."""

import math

import pytest
import torch
import torch.nn.functional as F

from kshot.folds import HeldOut
from kshot.forecast import GROWTH, SPREAD, ahead, forecast, growth_of, optimism_of


def held_out(right, images=100, learnt=12.0, shots=16.0, folds=4, classes=4):
    """Logits that are right about the first images."""
    label = torch.arange(images) % classes
    guess = torch.where(torch.arange(images) < right, label, (label + 1) % classes)
    return HeldOut(3 * F.one_hot(guess, classes).double(), label, torch.arange(images), learnt, shots, folds)


def test_errors_shrink_as_the_law_says():
    found = forecast(held_out(80))
    assert found.accuracy == pytest.approx(1 - 0.2 * (12 / 16) ** GROWTH, abs=1e-4)
    assert found.curve["16"] == found.accuracy
    assert found.curve["24"] == pytest.approx(1 - 0.2 * (12 / 24) ** GROWTH, abs=1e-4)
    assert list(found.curve) == ["16", "18", "20", "24"]
    assert (found.held_out, found.optimism) == (100, 0.0)


def test_the_interval_is_agresti_and_coulls():
    found = forecast(held_out(80, learnt=16.0), optimism=0.05)
    size, z = 100 / SPREAD, 1.96
    centre = (0.75 * size + z * z / 2) / (size + z * z)
    half = z * math.sqrt(centre * (1 - centre) / (size + z * z))
    assert (found.accuracy, found.optimism) == (0.75, 0.05)
    assert (found.low, found.high) == (pytest.approx(centre - half, abs=1e-4), pytest.approx(centre + half, abs=1e-4))


def test_what_learns_nothing_has_no_curve():
    found = forecast(held_out(80, learnt=16.0, folds=0))
    assert found.accuracy == 0.8
    assert found.curve == {}


@pytest.mark.parametrize("right", [0, 100])
def test_none_and_all_right_stay_probabilities(right):
    found = forecast(held_out(right), optimism=0.1)
    assert 0 <= found.low < found.accuracy < 1 or right == 0
    assert 0 <= found.low <= found.accuracy <= found.high <= 1
    assert all(0 <= value <= 1 for value in found.curve.values())


def test_the_interval_holds_the_truth_as_often_as_it_says():
    """Shares of 60 images by chance alone, whose variance the interval takes to be larger."""
    generator = torch.Generator().manual_seed(1)
    inside = 0
    for _ in range(400):
        found = forecast(held_out(int(torch.rand(60, generator=generator).lt(0.7).sum()), images=60, learnt=16.0))
        inside += found.low <= 0.7 <= found.high
    assert 0.93 <= inside / 400 <= 0.995


def test_growth_is_half_of_what_was_seen():
    fewer, more = held_out(60, learnt=8.0), held_out(80, learnt=12.0)
    slope = math.log(0.4 / 0.2) / math.log(12 / 8)
    assert growth_of(fewer, more) == pytest.approx((min(1, slope) + GROWTH) / 2)
    assert growth_of(more, fewer) == GROWTH  # no more shots
    assert growth_of(held_out(90, learnt=8.0), held_out(80, learnt=12.0)) == GROWTH / 2  # errors that rose


def test_the_best_of_many_equal_answers_is_corrected():
    """Twenty answers that are right by chance, 70 %: the best seems better, and the correction takes most of it off."""
    generator = torch.Generator().manual_seed(0)
    seeming, corrected = [], []
    for _ in range(40):
        right = torch.rand(20, 80, generator=generator) < 0.7
        best = float(right.double().mean(1).max())
        seeming.append(best)
        corrected.append(best - optimism_of(right))
    mean = sum(corrected) / 40
    assert sum(seeming) / 40 > 0.77
    assert mean == pytest.approx(0.7, abs=0.03)
    assert optimism_of(right[:1]) == 0


def test_a_clear_winner_is_hardly_corrected():
    right = torch.zeros(3, 100, dtype=torch.bool)
    right[0, :95] = True
    right[1, :50] = True
    assert optimism_of(right) < 0.005


def test_answers_from_one_shot_give_a_forecast_and_no_temperature():
    few = ahead(held_out(50, learnt=1.0, shots=2.0, folds=2))
    assert few.temperature == 1
    assert few.held_out == 0
    assert few.forecast["accuracy"] == pytest.approx(1 - 0.5 * 0.5**GROWTH, abs=1e-4)
    more = ahead(held_out(50, learnt=3.0, shots=4.0))
    assert more.held_out == 100
    assert more.temperature != 1
    assert ahead(held_out(50, learnt=1.0, shots=1.0, folds=0)).held_out == 100  # nothing was learnt: all are unseen
