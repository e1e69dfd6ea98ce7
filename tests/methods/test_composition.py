"""Every prompt method with every weight-tuning method: what trains, what is measured and what is kept."""

from functools import partial

import pytest
import torch
import towers
from plain_prompts import NAMES, disturb, trained
from test_adapters import METHODS, SLOT_CASES

from kshot.adapters import FullTuning, unadapted
from kshot.checkpoint import HEADER
from kshot.classifiers import VPT, CoCoOp, CoOp, DePT, KgCoOp, MaPLe, PromptSRC
from kshot.data import Batch
from kshot.module import FewShotModule

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
FIRST = [
    next(label for label, (k, _) in SLOT_CASES.items() if k is kind) for kind in {k for k, _ in SLOT_CASES.values()}
]
ADAPTERS = sorted([*FIRST, *(label for label in METHODS if label not in SLOT_CASES)])
LABEL = torch.tensor([3, 0, 1, 2, 2, 1])


def module_of(prompts: str, adapter: str) -> FewShotModule:
    """The two methods together on both towers of a tiny CLIP, the same each time."""
    backbone, method = towers.backbone(), METHODS[adapter]()
    torch.manual_seed(3)
    # The embedding of words is not among what full tuning can train by learned prompts, which take its place.
    targets = ["image.*", "text.transformer.*", "text.ln_final.*"] if isinstance(method, FullTuning) else ["*"]
    return FewShotModule(backbone, PROMPTS[prompts], NAMES[:4], adapter=method, targets=targets)


@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize("prompts", PROMPTS)
class TestEveryPair:
    def test_every_tensor_is_trained(self, prompts, adapter):
        module = module_of(prompts, adapter)
        tensors = trained(module)
        assert {n.startswith("classifier.backbone.") for n in tensors} == {True, False}
        module.preflight(steps=4)  # raises when no gradient reaches one
        disturb(module, 0.05).train()  # away from zeros that hide gradients
        before = {n: p.detach().clone() for n, p in module.named_parameters()}
        loss = module.loss_of(Batch(towers.images(module.backbone, 6), LABEL, LABEL))
        loss.backward()
        assert torch.isfinite(loss)
        assert [n for n, p in tensors.items() if p.grad is None or not p.grad.abs().max() > 0] == []
        module.make_optimizer(list(tensors.values())).step()
        after = dict(module.named_parameters())
        assert {n for n in before if not torch.equal(before[n], after[n])} == tensors.keys()
        assert all(torch.isfinite(p).all() for p in tensors.values())

    def test_what_is_kept_is_small_and_rebuilds_it(self, prompts, adapter):
        module, fresh = module_of(prompts, adapter), module_of(prompts, adapter)
        images = towers.images(module.backbone, 6)
        module.preflight(steps=4)
        disturb(module, 0.05).eval()
        state = {n: t.clone() for n, t in module.tuned_state().items()}
        assert trained(module).keys() <= state.keys()
        inside = {n for n in state.keys() - trained(module).keys() if n.startswith("classifier.backbone.")}
        assert {n for n in inside if ".adapters." not in n and ".shared." not in n} == set()
        fresh.on_load_checkpoint({"state_dict": dict(state), HEADER: module.header()})
        assert fresh.load_state_dict(state, strict=False).unexpected_keys == []
        with torch.no_grad():
            logits = module(images)
            assert logits.shape == (6, 4)
            assert torch.isfinite(logits).all()
            assert towers.relative(fresh.eval()(images), logits) <= 1e-5
            with unadapted(module.backbone):
                untouched = module.backbone.encode_image(images)
            expected = towers.original("clip").encode_image((images - module.backbone.mean) / module.backbone.std)
            assert towers.relative(untouched, expected) <= 1e-5


def test_a_batch_is_moved_whole():
    """A search takes batches by itself; the features of the untouched backbone move with the images."""
    module = module_of("PromptSRC", "autolora")
    batch = Batch(torch.zeros(2, 24), LABEL[:2], LABEL[:2], torch.zeros(2, 24))
    moved = module.to("meta").on_device(batch)
    assert {t.device.type for t in (moved.input, moved.label, moved.frozen)} == {"meta"}
