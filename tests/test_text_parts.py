"""Prompts that are encoded in parts, to keep within a memory budget, against the same prompts encoded at once."""

import logging
import re
from functools import partial
from pathlib import Path

import pytest
import torch
import towers
from cases import attach, each_first_case, layers_of, perturb

import kshot.backbones.language
from kshot.adapters import LoRA
from kshot.backbones import OpenClip
from kshot.backbones.language import memory_of
from kshot.classifiers import CoCoOp, CoOp, KgCoOp, MaPLe, PromptSRC, Task, TextPrompt
from kshot.errors import UserError

NAMES = ("cat", "yellow bird", "x", "very small old car", "sea horse")
TASK = Task(NAMES, ("a photo of a {}.", "{} in the rain"))
LABEL = torch.tensor([0, 3, 4, 1])
ONE = 1  # byte: one class of one group at a time


def text_lora(backbone, task, **settings):
    """TextPrompt above a text tower with adapters."""
    classifier = TextPrompt(backbone, task)
    LoRA(rank=2, **settings).attach(backbone, ["text.*"])
    return classifier


HEADS = {
    "CoOp": partial(CoOp, context_length=3),
    "CoOp, middle": partial(CoOp, context_length=3, position="middle"),
    "CoOp, front": partial(CoOp, context_length=3, position="front"),
    "CoOp, a context a class": partial(CoOp, context_length=2, class_specific=True),
    "CoOp, a context a class, middle": partial(CoOp, context_length=3, class_specific=True, position="middle"),
    "CoOp, deep": partial(CoOp, context_length=3, depth=2),
    "CoCoOp": partial(CoCoOp, reduction=4),
    "MaPLe": MaPLe,
    "PromptSRC": partial(PromptSRC, templates="imagenet7"),
    "KgCoOp": KgCoOp,
    "TextPrompt + LoRA": text_lora,
}
each_head = pytest.mark.parametrize("head", HEADS)
Outcome = tuple[torch.Tensor, dict[str, torch.Tensor]]


def made(head):
    """A classifier in training mode, away from where it starts."""
    classifier = (HEADS[head] if isinstance(head, str) else head)(towers.backbone(), TASK)
    perturb(classifier)
    return classifier.train()


def outcome(classifier, budget: int | None) -> Outcome:
    """Logits of a few images, and the gradients of the loss by name."""
    backbone = classifier.backbone
    backbone.text_memory = budget
    images = towers.images(backbone, len(LABEL))
    with backbone.unadapted(), torch.no_grad():
        teacher = backbone.encode_image(images)
    features = backbone.encode_image(images, classifier.image_tokens())
    classifier.zero_grad()
    label = LABEL % len(classifier.task.class_names)
    sum(classifier.losses(features, label, teacher).values()).backward()
    return classifier(features).detach(), {n: p.grad for n, p in classifier.named_parameters() if p.requires_grad}


def undivided(classifier) -> tuple[Outcome, list[int]]:
    """The outcome at once, and budgets that divide the prompts: into two parts or little more, more, and all."""
    backbone, asked = classifier.backbone, []
    part_size = backbone.part_size
    backbone.part_size = lambda *given: asked.append(given) or part_size(*given)
    expected = outcome(classifier, None)
    del backbone.part_size
    assert backbone.chunks == 1
    least = 1
    while True:
        backbone.text_memory = least
        if all(backbone.part_size(*given)[0] and backbone.chunks == 1 for given in asked):
            return expected, [least // 2, least // 8, ONE]
        least *= 2


def assert_same(given: Outcome, expected: Outcome, tolerance: float = 1e-5) -> None:
    assert towers.relative(given[0], expected[0]) <= tolerance
    assert given[1].keys() == expected[1].keys()
    largest = max(g.abs().max() for g in expected[1].values())
    for name, gradient in expected[1].items():
        allowed = tolerance * (gradient.abs().max() + 1e-2 * largest)
        assert (given[1][name] - gradient).abs().max() <= allowed, name


@each_head
def test_parts_give_the_same_logits_and_gradients(head):
    """In two parts, and each prompt by itself; where there are several groups, in parts of a whole group as well."""
    classifier = made(head)
    expected, budgets = undivided(classifier)
    if head != "CoCoOp":
        del budgets[1]
    assert all(g is not None and g.abs().max() > 0 for g in expected[1].values())
    chunks = []
    for budget in budgets:
        assert_same(outcome(classifier, budget), expected)
        chunks.append(classifier.backbone.chunks)
    assert 1 < chunks[0] < chunks[-1] == len(NAMES) * (len(LABEL) if head == "CoCoOp" else 1)


@pytest.mark.parametrize("head", ["CoOp, deep", "CoCoOp", "TextPrompt + LoRA"])
def test_under_bfloat16_autocast(head):
    """Parts know no head: learned tokens of one group, deeper ones, several groups, and adapters in the tower."""
    classifier = made(head)
    with torch.autocast("cpu", torch.bfloat16):
        expected, budgets = undivided(classifier)
        for budget in budgets[::2]:
            assert_same(outcome(classifier, budget), expected, 2e-2)
            assert classifier.backbone.chunks > 1


@pytest.mark.parametrize("head", ["CoOp", "CoCoOp", "TextPrompt + LoRA"])
def test_in_evaluation_nothing_is_prepared_for_a_backward_pass(head, monkeypatch):
    classifier = made(head).eval()
    backbone = classifier.backbone
    features = backbone.encode_image(towers.images(backbone, 4)).detach()
    with torch.no_grad():
        expected = classifier.text_features(features)
        backbone.text_memory = ONE
        monkeypatch.setattr(
            kshot.backbones.language, "checkpoint", lambda *_, **__: pytest.fail("kept for the gradient")
        )
        assert towers.relative(classifier.text_features(features), expected) <= 1e-5
    assert backbone.chunks >= len(NAMES)


def test_frozen_prompts_need_no_backward_pass(monkeypatch):
    classifier = TextPrompt(towers.backbone(), TASK)
    expected = classifier.encode()
    classifier.backbone.text_memory = ONE
    monkeypatch.setattr(kshot.backbones.language, "checkpoint", lambda *_, **__: pytest.fail("nothing is learnt"))
    assert towers.relative(classifier.encode(), expected) <= 1e-5
    assert classifier.backbone.chunks == len(NAMES)


def forms(label):
    """TextPrompt above an adapted text tower, with each layer's own path and with what can be folded in folded in."""
    for forced in (False, True):
        backbone = towers.backbone()
        classifier = TextPrompt(backbone, Task(NAMES[:4]))
        attach(label, backbone, ("text.*",))
        perturb(backbone)
        free = [v for v in layers_of(backbone).values() if v.path == "auto" and len(v.paths) > 1]
        if forced and not free:
            return
        for layer in free if forced else []:
            layer.path = "materialised"
        yield classifier.train()


@each_first_case
def test_every_adapter_is_recomputed_as_it_was(label):
    for classifier in forms(label):
        expected, budgets = undivided(classifier)
        reached = {n: g for n, g in expected[1].items() if g is not None}
        assert reached
        given = outcome(classifier, budgets[0])
        assert classifier.backbone.chunks > 1
        assert {n for n, g in given[1].items() if g is not None} == set(reached)
        assert towers.relative(given[0], expected[0]) <= 1e-5
        # A gradient is a sum over tokens, and sums over a method's fixed matrices multiply its rounding.
        assert_same((given[0], {n: given[1][n] for n in reached}), (expected[0], reached), 5e-5)


def test_dropout_is_the_same_when_computed_again(monkeypatch):
    classifier = made(partial(text_lora, dropout=0.3))
    results = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        results.append(outcome(classifier, ONE))
    assert torch.equal(results[0][0], results[1][0])
    assert all(torch.equal(g, results[1][1][n]) for n, g in results[0][1].items())
    assert not torch.equal(results[0][0], results[2][0])
    monkeypatch.setattr(kshot.backbones.language, "checkpoint", lambda call, *given, use_reentrant: call(*given))
    torch.manual_seed(1)
    kept = outcome(classifier, ONE)
    assert_same(results[0], kept, 1e-6)


@pytest.mark.parametrize("head", ["CoOp", "CoCoOp", "TextPrompt + LoRA"])
def test_parts_keep_less_for_the_backward_pass(head):
    classifier = made(head)
    features = classifier.backbone.encode_image(towers.images(classifier.backbone, 4)).detach()
    own = {t.untyped_storage().data_ptr() for t in (*classifier.parameters(), *classifier.buffers())}

    def kept(budget):
        found = {}
        classifier.backbone.text_memory = budget

        def note(tensor):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own:
                found[storage.data_ptr()] = (storage.nbytes(), tensor)  # held, so that no other takes its place
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
            classifier.text_features(features)
        return sum(size for size, _ in found.values())

    at_once = kept(None)
    assert kept(ONE) < at_once / 2
    assert classifier.backbone.chunks > 1


class TestTheMessage:
    def messages(self, caplog):
        found = [r.getMessage() for r in caplog.records if "text_memory_gb" in r.getMessage()]
        caplog.clear()
        return found

    def test_a_budget_that_fits_says_nothing(self, caplog):
        caplog.set_level(logging.INFO, "kshot")
        classifier = made("CoOp")
        outcome(classifier, None)
        outcome(classifier, 10**9)
        assert classifier.backbone.chunks == 1
        assert self.messages(caplog) == []

    def test_each_division_is_named_once(self, caplog):
        caplog.set_level(logging.INFO, "kshot")
        classifier = made("CoOp")
        _, (few, _, _) = undivided(classifier)
        caplog.clear()
        classifier = made("CoOp")
        for _ in range(3):
            outcome(classifier, few)
        (message,) = self.messages(caplog)
        assert "\n" not in message
        chunks = classifier.backbone.chunks
        assert re.search(rf"\b{len(NAMES)} prompts in {chunks} parts of {-(-len(NAMES) // chunks)}\b", message)
        assert "model.backbone.text_memory_gb" in message
        outcome(classifier, ONE)
        (message,) = self.messages(caplog)
        assert f"in {len(NAMES)} parts of 1" in message
        for _ in range(2):  # training and evaluation in turns, as in a run
            outcome(classifier, few)
            with torch.no_grad():
                classifier.encode()
            assert classifier.backbone.chunks == 1
        assert self.messages(caplog) == []


def test_the_default_is_a_quarter_of_the_memory(monkeypatch):
    classifier = made("CoOp")
    prefix, suffix = classifier.prompts()
    _, budgets = undivided(classifier)
    backbone = classifier.backbone
    backbone.text_memory = budgets[0]
    divided = backbone.part_size(prefix, suffix, True)
    backbone.text_memory = None
    monkeypatch.setattr(kshot.backbones.language, "memory_of", lambda _: 4 * budgets[0] + 3)
    assert backbone.part_size(prefix, suffix, True) == divided
    monkeypatch.setattr(kshot.backbones.language, "memory_of", lambda _: 8 * budgets[0])
    assert backbone.part_size(prefix, suffix, True) == (1, len(NAMES))


def test_numbers_of_half_the_size_need_half_the_memory():
    classifier = made("CoOp")
    _, budgets = undivided(classifier)
    with torch.autocast("cpu", torch.bfloat16):
        assert undivided(classifier)[1][0] == budgets[0] // 2


@pytest.mark.skipif(not Path("/proc/meminfo").is_file(), reason="needs Linux")
def test_the_memory_of_a_cpu_is_the_machines():
    total = int(re.search(r"MemTotal:\s+(\d+) kB", Path("/proc/meminfo").read_text())[1]) * 1024
    assert memory_of(torch.device("cpu")) == pytest.approx(total, rel=0.05)


def test_the_memory_is_asked_once_and_not_in_every_encoding(monkeypatch):
    asked = []
    monkeypatch.setattr(kshot.backbones.language, "memory_of_machine", lambda: asked.append("asked") or 10**9)
    backbone = OpenClip("kshot:glyph_clip")
    tokens = backbone.tokenize(["a photo of a cat.", "a photo of a dog."])
    memory_of.cache_clear()
    try:
        for _ in range(3):
            backbone.encode_tokens(tokens)
    finally:
        memory_of.cache_clear()  # of what was not so
    assert asked == ["asked"]


def test_the_option_is_in_gigabytes():
    assert OpenClip("kshot:glyph_clip", text_memory_gb=0.25).text_memory == 250_000_000
    assert OpenClip("kshot:glyph_clip").text_memory is None


@pytest.mark.parametrize("value", [0, -1.0, float("nan"), float("inf")])
def test_no_memory_is_refused_in_one_line(value):
    with pytest.raises(UserError) as error:
        OpenClip("kshot:glyph_clip", text_memory_gb=value)
    message = str(error.value)
    assert "\n" not in message
    assert "text_memory_gb" in message
    assert "positive" in message
