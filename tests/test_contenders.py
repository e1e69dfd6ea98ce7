"""Which contender is chosen, where what takes steps was judged on fewer images than the closed forms."""

import numpy as np
import pytest
import torch

from kshot.auto import SEVERAL_LAYERS, Search
from kshot.choice import Trial
from kshot.config import read_command_line
from kshot.contenders import LEAD, SPREAD, aligned, clearly, falls_behind
from kshot.folds import HeldOut
from kshot.settings import OPTIONS, settings

IMAGES, CLASSES, FEW = 40, 2, 10


def held_out(right: list[int], images: int) -> HeldOut:
    """Logits that are right about some of the first images."""
    label, index = torch.arange(images) % CLASSES, torch.arange(images)
    said = torch.where(torch.isin(index, torch.tensor(right)), label, 1 - label)
    return HeldOut(torch.eye(CLASSES).double()[said], label, index, 15.0, 20.0, 4)


@pytest.fixture
def search():
    line = read_command_line(["fit", "--config", "auto.yaml", "--data.shots", "2"], list(OPTIONS))
    search = Search(line, settings(line)[1])
    search.plan = torch.arange(IMAGES) % 4, range(4)
    search.trials = [Trial(words) for words in ("good", "lucky", "steps")]
    search.closed, search.whole = ["good", "lucky"], ["steps"]
    search.found = {"good": held_out(list(range(1, 37)), IMAGES), "lucky": held_out(list(range(30)), IMAGES)}
    return search


def test_a_poor_contender_of_few_images_does_not_decide_by_these_alone(search):
    search.found["steps"] = held_out(list(range(5)), FEW)
    choice = search.best()
    assert choice.words == "good"
    assert choice.why == "36 of 40 held-out shots right (lucky: 30)"
    assert choice.calibration["forecast"]["optimism"] < 0.03


def test_what_takes_steps_is_chosen_where_it_beats_the_best_closed_form_on_its_images(search):
    search.found["steps"] = held_out(list(range(FEW)), FEW)
    choice = search.best()
    assert choice.words == "steps"
    assert choice.why.startswith("10 of 10 held-out shots right")


@pytest.mark.parametrize(
    ("right", "soft", "text", "chosen"),
    [(8, True, False, "steps"), (8, False, False, "good"), (8, True, True, "good"), (4, True, False, "good")],
)
def test_what_goes_on_from_a_closed_form_stays_ahead_unless_it_falls_behind(search, right, soft, text, chosen):
    """The best closed form is right about 9 of the first 10 images; text among what it learnt from speaks for it."""
    search.found["steps"], search.soft = held_out(list(range(1, 1 + right)), FEW), {"steps"} if soft else set()
    search.with_text = {"good"} if text else set()
    choice = search.best()
    assert choice.words == chosen
    assert choice.why.endswith("which is no clear difference") is (chosen == "steps")


@pytest.mark.parametrize(("right", "chosen"), [(6, "steps"), (2, "text")])
def test_it_stays_ahead_of_what_else_trains_as_well(search, right, chosen):
    """On the ten images by which both are judged, something that trains with texts is right about nine."""
    search.trials.append(Trial("text"))
    search.found |= {"steps": held_out(list(range(1, 1 + right)), FEW), "text": held_out(list(range(1, 10)), FEW)}
    search.found["good"] = held_out(list(range(20, IMAGES)), IMAGES)
    search.closed, search.whole, search.soft = ["good"], ["steps", "text"], {"steps"}
    assert search.best().words == chosen


@pytest.mark.parametrize(("wins", "losses", "images"), [(0, 1, 20), (3, 6, 60), (9, 9, 40), (0, 4, 12), (20, 26, 700)])
def test_falling_behind_is_a_negative_mean_of_what_is_believed_in_the_end(wins, losses, images):
    """Of two normal estimates of a lead, the mean weighted by their precisions."""
    ours, theirs = held_out(list(range(wins)), images), held_out(list(range(wins, wins + losses)), images)
    measured, variance = (wins - losses) / (images + 2), (wins + losses + 1) / (images + 2) ** 2
    mean = np.average([LEAD, measured], weights=[SPREAD**-2, 1 / variance])
    assert falls_behind({"a": ours, "b": theirs}, "a", "b") is bool(mean < 0)


@pytest.mark.parametrize(("losses", "behind"), [(4, False), (5, True)])
def test_two_standard_deviations_are_no_chance(losses, behind):
    ours, theirs = held_out([], FEW), held_out(list(range(losses)), FEW)
    assert falls_behind({"a": ours, "b": theirs}, "a", "b") is behind


@pytest.mark.parametrize(("wins", "losses", "clear"), [(1, 0, False), (2, 0, True), (6, 3, False), (7, 3, True)])
def test_clearly_better_is_more_than_a_standard_deviation_of_chance(wins, losses, clear):
    ours, theirs = held_out(list(range(wins)), IMAGES), held_out(list(range(wins, wins + losses)), IMAGES)
    assert clearly({"a": ours, "b": theirs}, "a", "b") is clear


@pytest.mark.parametrize(("more", "kept"), [(0, True), (1, True), (4, False)])
def test_several_layers_stay_where_nothing_is_clearly_better(search, more, kept):
    search.whole = []
    search.trials.append(Trial(SEVERAL_LAYERS))
    search.closed.append(SEVERAL_LAYERS)
    search.found[SEVERAL_LAYERS] = held_out(list(range(1, 37 - more)), IMAGES)
    choice = search.best()
    assert (choice.words == SEVERAL_LAYERS) is kept
    assert choice.why.endswith("which is no clear difference") is (more == 1)
    if kept:
        assert choice.calibration["forecast"]["optimism"] == 0, "it was not chosen for its score"


def test_logits_are_put_in_order():
    found = HeldOut(torch.arange(4.0)[:, None], torch.zeros(4), torch.tensor([7, 1, 5, 3]), 1.0, 1.0, 1)
    assert aligned(found, torch.tensor([1, 5, 7])).flatten().tolist() == [1.0, 2.0, 0.0]
