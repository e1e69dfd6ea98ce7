"""Where a linear head starts: at a head in closed form, softly."""

import math
from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F
import towers
from scipy.optimize import brentq, minimize_scalar

from kshot.adapters import LoRA
from kshot.backbones import OpenClip
from kshot.callbacks import ResumeFile
from kshot.classifiers import GDA, VPT, LinearProbe, Ridge, Shots, Task
from kshot.data.datamodule import FewShotDataModule
from kshot.errors import UserError
from kshot.judging import scale_of_loss
from kshot.run import build, fit, make_trainer

NAMES = ("cat", "dog", "yellow bird", "very small old car")
LABEL = torch.tensor([0, 0, 1, 1, 1, 2, 2, 3, 3, 3, 3])


def shots(label=LABEL, views=2, apart=2.0):
    generator = torch.Generator().manual_seed(1)
    centre = apart * torch.randn(int(label.max()) + 1, 24, generator=generator)[label]
    return Shots(3 * (centre + torch.randn(views, len(label), 24, generator=generator)), label)


def started(given, classes=4, **settings):
    head = LinearProbe(towers.backbone(), Task(NAMES[:classes]), **settings)
    head.fit(given, None)
    return head


@pytest.fixture
def backbone():
    return OpenClip("kshot:glyph_clip")


@pytest.fixture(scope="module")
def data():
    return FewShotDataModule("digits", shots=2)


def loss_of(logits, label, scale):
    return float(F.cross_entropy(scale * logits, label))


class TestScaleOfLoss:
    @pytest.mark.parametrize("share", [0.9, 0.5, 0.1])
    def test_reaches_the_loss_as_a_root_finder_does(self, share):
        logits = torch.randn(50, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        label = logits.argmax(-1)
        expected = brentq(lambda s: loss_of(logits, label, s) - share * math.log(5), 1e-3, 1e3)
        assert scale_of_loss(logits, label, share * math.log(5)) == pytest.approx(expected, rel=1e-4)

    def test_takes_the_best_where_no_scale_reaches_it(self):
        generator = torch.Generator().manual_seed(0)
        logits = torch.randn(50, 5, dtype=torch.float64, generator=generator)
        label = torch.where(torch.rand(50, generator=generator) < 0.6, logits.argmax(-1), torch.arange(50) % 5)
        best = minimize_scalar(lambda s: loss_of(logits, label, s), bounds=(1e-3, 50), method="bounded")
        assert best.fun > 0.3 * math.log(5)
        assert scale_of_loss(logits, label, 0.3 * math.log(5)) == pytest.approx(best.x, rel=1e-3)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize(("start", "kind"), [("ridge", Ridge), ("gda", GDA)])
def test_the_start_is_the_head_in_closed_form_times_the_scale(start, kind, normalize):
    given = shots()
    if not normalize:  # a head on features of any length can be the same only where all are as long
        given = replace(given, features=5 * F.normalize(given.features, dim=-1))
    head = started(given, head_start=start, head_scale=2.5, normalize=normalize)
    closed = kind(towers.backbone(), Task(NAMES), text=False)
    closed.fit(given, None)
    features = given.features.flatten(0, 1)
    expected = 2.5 / closed.scale * closed(features)
    torch.testing.assert_close(head(features), expected, rtol=1e-4, atol=1e-4)
    assert head.started == {"from": start, "scale": 2.5}


def alone(backbone, start):
    return LinearProbe(backbone, Task(NAMES), head_start=start)


def under_lora(backbone, start):
    head = LinearProbe(backbone, Task(NAMES), head_start=start)
    LoRA(rank=1).attach(backbone, ["image.0.q"])
    return head


def beside_text_lora(backbone, start):
    head = LinearProbe(backbone, Task(NAMES), head_start=start)
    LoRA(rank=1).attach(backbone, ["text.0.q"])
    return head


def in_vpt(backbone, start):
    return VPT(backbone, Task(NAMES), depth=1, head=partial(LinearProbe, head_start=start))


@pytest.mark.parametrize("start", ["ridge", "gda"])
@pytest.mark.parametrize(("make", "share"), [(alone, 0.03), (beside_text_lora, 0.03), (under_lora, 0.8), (in_vpt, 0.8)])
def test_it_leaves_the_shots_a_share_of_the_loss_of_a_guess(start, make, share):
    given = shots(apart=4.0)
    head = make(towers.backbone(), start)
    head.fit(given, None)
    features, label = given.every_view
    assert head.losses(features, label)["cross_entropy"].item() == pytest.approx(share * math.log(4), rel=1e-3)
    assert (head(features).argmax(-1) == label).float().mean() > 0.9


@pytest.mark.parametrize("start", ["ridge", "gda"])
@pytest.mark.parametrize(
    ("label", "apart", "classes"),
    [
        (torch.arange(4), 1.0, 4),  # one shot
        (torch.tensor([0, 1, 1, 1, 1, 1, 2, 3]), 1.0, 4),  # classes of very unequal size
        (torch.tensor([0, 0, 2, 2]), 1.0, 4),  # classes without an image
        (torch.zeros(3, dtype=torch.long), 1.0, 1),  # one class
        (torch.tensor([0, 0, 1, 1]), 0.0, 2),  # noise
    ],
    ids=["one-shot", "unequal", "empty", "one-class", "noise"],
)
def test_it_is_finite_whatever_the_shots(start, label, apart, classes):
    given = shots(label, apart=apart)
    head = started(given, classes, head_start=start)
    loss = head.losses(*given.every_view)["cross_entropy"]
    assert head(given.features[0]).isfinite().all()
    assert loss.isfinite()
    assert loss <= math.log(classes) + 1e-6
    loss.backward()
    assert all(p.grad.isfinite().all() for p in head.head.parameters())


def test_images_that_are_all_the_same():
    given = shots()
    same = replace(given, features=given.features[:1, :1].expand(2, len(LABEL), 24))
    for start in ("ridge", "gda"):
        logits = started(same, head_start=start)(same.features[0])
        torch.testing.assert_close(logits, logits[:1].expand_as(logits))
        assert logits.isfinite().all()


def test_zero_needs_no_shots():
    head = LinearProbe(towers.backbone(), Task(NAMES), head_start="zero")
    assert head.needs == frozenset()
    assert head(shots().features[0]).abs().max() == 0
    assert LinearProbe(towers.backbone(), Task(NAMES)).needs == {"shots"}


@pytest.mark.parametrize("settings", [{"head_start": "text"}, {"head_scale": 0.0}, {"head_scale": math.inf}])
def test_refusals(settings):
    with pytest.raises(UserError, match=rf"LinearProbe: {next(iter(settings))} is .*, and must be"):
        LinearProbe(towers.backbone(), Task(NAMES), **settings)


class TestRuns:
    def starts(self, monkeypatch):
        found, start = [], LinearProbe.fit
        monkeypatch.setattr(LinearProbe, "fit", lambda self, *shots: found.append(self) or start(self, *shots))
        return found

    @pytest.mark.parametrize(
        ("settings", "share"), [({"adapter": LoRA(rank=1), "targets": ["image.5.q"]}, 0.8), ({}, 0.03)]
    )
    def test_a_run_starts_the_head_and_goes_on_without(self, backbone, data, monkeypatch, tmp_path, settings, share):
        found, losses = self.starts(monkeypatch), []
        keep = ResumeFile(0.0)
        keep.folder = tmp_path
        settings = settings | {"classifier": LinearProbe, "optimizer": partial(torch.optim.SGD, lr=1e-9)}
        module = build(backbone, data, **settings)
        monkeypatch.setattr(type(module), "on_train_batch_end", lambda self, out, *rest: losses.append(out["loss"]))
        fit(module, data, make_trainer(max_epochs=1, limit_val_batches=0, callbacks=[keep]))
        assert found == [module.classifier]
        assert losses[0].item() == pytest.approx(share * math.log(10), rel=0.02)  # the shots are one batch, of one view
        before = module.classifier.head.weight.clone()
        backbone = module.detach()
        module = build(backbone, data, **settings)
        trainer = make_trainer(max_epochs=2, limit_val_batches=0)
        fit(module, data, trainer, ckpt_path=tmp_path / "last.ckpt")
        assert len(found) == 1, "a resumed run starts anew"
        torch.testing.assert_close(module.classifier.head.weight, before, rtol=1e-4, atol=1e-7)
        assert trainer.global_step == 2

    def test_a_head_inside_another_classifier_starts_too(self, backbone, data, monkeypatch):
        found = self.starts(monkeypatch)
        module = build(backbone, data, classifier=partial(VPT, depth=1, head=LinearProbe))
        fit(module, data, make_trainer(max_epochs=1, limit_val_batches=0))
        assert found == [module.classifier.inner]
