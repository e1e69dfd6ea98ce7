"""Prompt methods with weight-tuning methods: what trains, what is measured and what rebuilds it."""

from functools import partial

import pytest
import torch
import towers
from cases import FEW, FIRST_CASES, METHODS, SLOT_CASES
from plain_prompts import TASK, disturb, encode, teacher_of, trained

from kshot.adapters import FullTuning
from kshot.classifiers import VPT, Classifier, CoCoOp, CoOp, DePT, KgCoOp, MaPLe, PromptSRC
from kshot.holding import merged

SENTENCES = ("a photo of a {}.", "{} in the rain")
PROMPTS = {
    "CoOp": partial(CoOp, context_length=2),
    "deep CoOp": partial(CoOp, context_length=2, depth=2),
    "CoCoOp": partial(CoCoOp, reduction=4),
    "KgCoOp": KgCoOp,
    "MaPLe": MaPLe,
    "VPT": partial(VPT, prompt_length=2),
    "IVLP": partial(VPT, head=partial(CoOp, context_length=2, depth=2)),
    "PromptSRC": partial(PromptSRC, templates=SENTENCES),
    "DePT": partial(DePT, base=partial(PromptSRC, templates=SENTENCES)),
}
ADAPTERS = sorted([*FIRST_CASES, *(label for label in METHODS if label not in SLOT_CASES)])
# Every prompt method with LoRA, and every weight-tuning method with the one that has all kinds of tensors.
PAIRS = [(prompts, "lora") for prompts in PROMPTS] + [("DePT", adapter) for adapter in ADAPTERS if adapter != "lora"]
LABEL = torch.tensor([3, 0, 1, 2, 2, 1])


def composed(prompts: str, adapter: str) -> Classifier:
    """The two methods together on both towers of a tiny CLIP, the same each time."""
    torch.manual_seed(3)
    classifier, method = PROMPTS[prompts](towers.backbone(), TASK), METHODS[adapter]()
    # The embedding of words is not among what full tuning can train by learned prompts, which take its place.
    full = isinstance(method, FullTuning)
    method.attach(classifier.backbone, ["image.*", "text.transformer.*", "text.ln_final.*"] if full else FEW)
    return classifier


@pytest.mark.parametrize(("prompts", "adapter"), PAIRS)
def test_pairs(prompts, adapter):
    classifier, fresh = composed(prompts, adapter), composed(prompts, adapter).eval()
    tensors, images = trained(classifier), towers.images(classifier.backbone, 6)
    assert {n.startswith("backbone.") for n in tensors} == {True, False}
    untouched = towers.original("clip").encode_image((images - classifier.backbone.mean) / classifier.backbone.std)

    # Every tensor is trained, and nothing else.
    disturb(classifier, 0.05).train()  # away from zeros that hide gradients
    before = {n: p.detach().clone() for n, p in classifier.named_parameters()}
    teacher = teacher_of(classifier, images)
    loss = sum(classifier.losses(encode(classifier, images), LABEL, teacher).values())
    loss.backward()
    assert torch.isfinite(loss)
    assert [n for n, p in tensors.items() if p.grad is None or not p.grad.abs().max() > 0] == []
    groups = [{"params": g["params"]} for g in classifier.param_groups()]
    groups.append({"params": [p for n, p in tensors.items() if n.startswith("backbone.")]})
    torch.optim.AdamW(groups, lr=1e-3).step()
    after = dict(classifier.named_parameters())
    assert {n for n in before if not torch.equal(before[n], after[n])} == tensors.keys()
    assert all(torch.isfinite(p).all() for p in tensors.values())

    # The trained tensors rebuild it, merged or not, and the untouched backbone is still inside.
    state = {n: t.detach().clone() for n, t in classifier.state_dict().items() if n in tensors}
    assert fresh.load_state_dict(state, strict=False).unexpected_keys == []
    with torch.no_grad():
        logits = classifier.eval()(encode(classifier, images))
        assert logits.shape == (6, 4)
        assert torch.isfinite(logits).all()
        assert towers.relative(fresh(encode(fresh, images)), logits) <= 1e-5
        with merged(fresh):
            assert towers.relative(fresh(encode(fresh, images)), logits) <= 1e-5
            assert towers.relative(teacher_of(fresh, images), untouched) <= 1e-5
        assert towers.relative(teacher_of(classifier, images), untouched) <= 1e-5
        classifier.backbone.detach()
        assert classifier.backbone.trainable("image") == classifier.backbone.trainable("text") == []
        assert torch.equal(classifier.backbone.encode_image(images), towers.backbone().encode_image(images))


def test_the_names_of_what_trains():
    """Checkpoints depend on them."""
    names = {p: sorted(n for n in trained(PROMPTS[p](towers.backbone(), TASK))) for p in PROMPTS}
    assert names["deep CoOp"] == ["context", "deep"]
    assert names["CoCoOp"] == ["context", *(f"meta_net.{i}.{p}" for i in (0, 2) for p in ("bias", "weight"))]
    assert names["MaPLe"] == ["context", "deep", *(f"project.{j}.{p}" for j in (0, 1) for p in ("bias", "weight"))]
    assert names["IVLP"] == ["image_prompts", "inner.context", "inner.deep"]
    assert names["PromptSRC"] == ["context", "deep", "image_prompts"]
    assert names["DePT"] == [
        *("head.bias", "head.weight", "image_gain", "image_shift"),
        *("inner.context", "inner.deep", "inner.image_prompts", "text_gain", "text_shift"),
    ]
