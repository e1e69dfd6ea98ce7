"""Towers in bfloat16, everything that trains and every loss in float32, finite with a thousand classes."""

from functools import partial

import pytest
import torch
import towers

from kshot.classifiers import VPT, CLIPAdapter, CoOp, DePT, KgCoOp, MaPLe, PromptSRC, Task, TaskRes

SYLLABLES = ("ba", "do", "ki", "lu", "me", "no", "pa", "ru", "si", "to")
NAMES = tuple(a + b + c for a in SYLLABLES for b in SYLLABLES for c in SYLLABLES)
METHODS = {
    "CoOp": partial(CoOp, context_length=2),
    "KgCoOp": KgCoOp,
    "MaPLe": MaPLe,
    "VPT": VPT,
    "PromptSRC": partial(PromptSRC, templates=["a photo of a {}.", "{} in the rain"]),
    "DePT": partial(DePT, base=partial(CoOp, context_length=2)),
    "CLIPAdapter": CLIPAdapter,
    "TaskRes": TaskRes,
}


@pytest.mark.parametrize("name", METHODS)
def test_steps_with_a_thousand_classes_stay_finite(name):
    backbone = towers.backbone()
    with torch.no_grad():
        backbone.clip.logit_scale.fill_(4.6052)  # 100, as in the released weights
    classifier = METHODS[name](backbone, Task(NAMES))
    trained = {n: p for n, p in classifier.named_parameters() if p.requires_grad}
    assert {p.dtype for p in trained.values()} == {torch.float32}
    before = {n: p.detach().clone() for n, p in trained.items()}
    optimizer = torch.optim.SGD(trained.values(), lr=0.02, momentum=0.9, weight_decay=5e-4)
    images, label = towers.images(backbone, 8), torch.randint(0, 1000, (8,))
    first = None
    for _ in range(6):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            features = backbone.encode_image(images, classifier.image_tokens())
            teacher = backbone.encode_image(images).detach() if "teacher" in classifier.needs else None
            terms = classifier.losses(features, label, teacher)
        assert {term.dtype for term in terms.values()} == {torch.float32}
        loss = sum(terms.values())
        assert torch.isfinite(loss)
        first = loss.item() if first is None else first
        optimizer.zero_grad()
        loss.backward()
        assert {p.grad.dtype for p in trained.values()} == {torch.float32}
        optimizer.step()
    assert loss.item() < first
    assert all(torch.isfinite(p).all() and not torch.equal(p, before[n]) for n, p in trained.items())
