"""Copies of a module to fit on some of the shots: what they share, and that the original learns nothing from them."""

import pytest
import torch

from kshot.adapters import LoRA
from kshot.backbones import OpenClip
from kshot.classifiers import Ridge, Shots
from kshot.folds import twin_of
from kshot.module import FewShotModule


@pytest.fixture(scope="module")
def backbone():
    return OpenClip("kshot:glyph_clip")


def test_a_closed_form_shares_the_backbone_and_learns_for_itself(backbone):
    module = FewShotModule(backbone, class_names=["a", "b"], classifier=Ridge)
    twin = twin_of(module)
    assert twin.backbone is backbone
    assert twin.classifier.backbone is backbone
    before = {name: value.clone() for name, value in module.state_dict().items()}
    twin.classifier.fit(Shots(torch.randn(1, 4, backbone.feature_dim), torch.tensor([0, 0, 1, 1])), None)
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    assert any(not torch.equal(value, before[name]) for name, value in twin.state_dict().items())


def test_what_takes_steps_has_its_own_adapter_and_shares_the_rest(backbone):
    module = FewShotModule(backbone, class_names=["a", "b"], adapter=LoRA(rank=2), targets=["image.0.q"])
    try:
        twin = twin_of(module)
        assert twin.backbone is not backbone
        assert twin.backbone.tokenizer is backbone.tokenizer
        theirs = dict(module.named_parameters())
        for name, parameter in twin.named_parameters():
            assert (parameter is theirs[name]) is not parameter.requires_grad, name
    finally:
        backbone.detach()
