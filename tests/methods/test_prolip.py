"""ProLIP against its formula in double precision, and its features from before the projection in whole runs."""

import json
import math
from functools import partial

import pytest
import torch
import towers
from command_line import assert_same_figures, cut_fit, fit, refused
from safetensors.torch import load_file

from kshot.classifiers import VPT, DePT, ProLIP, Shots, Task, TextPrompt
from kshot.cli import main
from kshot.errors import UserError

TASK = Task(("cat", "dog", "yellow bird", "very small old car"))
PROJECTED = ["clip", "clip_custom_all", "custom_text", "not_causal"]


def features(count: int = 5) -> torch.Tensor:
    return torch.randn(count, 32, generator=torch.Generator().manual_seed(1))


def moved(**settings) -> ProLIP:
    given = ProLIP(towers.backbone(), TASK, **settings)
    with torch.no_grad():
        given.weight.add_(0.1 * torch.randn(given.weight.shape, generator=torch.Generator().manual_seed(2)))
    return given


@pytest.mark.parametrize("name", PROJECTED)
def test_starts_as_zero_shot(name):
    given, zero_shot = (kind(towers.backbone(name), TASK) for kind in (ProLIP, TextPrompt))
    image = towers.images(given.backbone)
    with torch.no_grad():
        unprojected = given.backbone.encode_image(image, (), True)
        assert unprojected.shape == (3, 32)
        assert towers.relative(given(unprojected), zero_shot(zero_shot.backbone.encode_image(image))) <= 1e-5


def test_the_loss_and_its_gradient_are_the_formula():
    given, x, label = moved(strength=0.3), features(4), torch.tensor([0, 1, 2, 3])
    start = given.backbone.clip.visual.proj.detach().double()
    text = TextPrompt(towers.backbone(), TASK).encode().detach().double()
    weight = given.weight.detach().double().requires_grad_()
    f = x.double() @ weight
    f, t = f / f.norm(dim=1, keepdim=True), text / text.norm(dim=1, keepdim=True)
    z = math.exp(float(given.backbone.clip.logit_scale)) * f @ t.T
    cross_entropy = -(z - z.logsumexp(1, keepdim=True))[range(4), label].mean()
    constraint = 0.3 * ((weight - start) ** 2).sum()
    losses = given.losses(x, label)
    assert losses.keys() == {"cross_entropy", "constraint"}
    torch.testing.assert_close(losses["cross_entropy"].double(), cross_entropy, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(losses["constraint"].double(), constraint, rtol=1e-5, atol=1e-6)
    (expected,) = torch.autograd.grad(cross_entropy + constraint, weight)
    (gradient,) = torch.autograd.grad(sum(losses.values()), given.weight)
    assert towers.relative(gradient, expected) <= 1e-5


@pytest.mark.parametrize(
    ("label", "expected"),
    [([0, 1, 2, 3], 1.0), ([0, 1, 2, 3] * 4, 0.25), ([0, 0, 0, 1, 2], 3 / 5), ([3, 3, 3], 1 / 3)],
)
def test_the_strength_is_one_over_the_shots_of_a_class(label, expected):
    """On the average over the classes that have any, however many views there are."""
    given = ProLIP(towers.backbone(), TASK)
    assert given.penalty == 0
    given.fit(Shots(torch.randn(3, len(label), 32), torch.tensor(label)), None)
    assert float(given.penalty) == pytest.approx(expected)
    given = ProLIP(towers.backbone(), TASK, strength=2.0)
    given.fit(Shots(torch.randn(3, len(label), 32), torch.tensor(label)), None)
    assert given.penalty == 2


def test_the_penalty_holds_the_projection():
    away = []
    for strength in (0.0, 1.0, 100.0):
        given = ProLIP(towers.backbone(), TASK, strength)
        optimizer = torch.optim.Adam([given.weight], lr=1e-2)
        for _ in range(50):
            optimizer.zero_grad()
            sum(given.losses(features(4), torch.arange(4)).values()).backward()
            optimizer.step()
        away.append(float((given.weight - given.backbone.projection).detach().norm()))
    assert away[0] > 2 * away[1] > 4 * away[2]


def test_behind_learned_tokens():
    """VPT with it as head projects what the prompted tower gives."""
    given, plain = (VPT(towers.backbone(), TASK, head=head) for head in (ProLIP, TextPrompt))
    assert "unprojected" in given.needs
    assert "unprojected" not in plain.needs
    plain.load_state_dict({n: t for n, t in given.state_dict().items() if n != "inner.weight"}, strict=False)
    image = towers.images(given.backbone)
    with torch.no_grad():
        logits = [c(c.backbone.encode_image(image, c.image_tokens(), "unprojected" in c.needs)) for c in (given, plain)]
    assert towers.relative(*logits) <= 1e-5


class TestRefusals:
    @pytest.mark.parametrize("name", ["resnet", "siglip"])
    def test_towers_without_the_matrix(self, name):
        with pytest.raises(UserError, match=r"^ProLIP trains the matrix .* of .*tiny_\w+ ends with none: use") as error:
            ProLIP(towers.backbone(name), TASK)
        assert "\n" not in str(error.value)

    @pytest.mark.parametrize("strength", [-1.0, float("nan"), float("inf")])
    def test_strengths(self, strength):
        with pytest.raises(UserError, match=r"^ProLIP: strength is .*, and must be at least 0\.$"):
            ProLIP(towers.backbone(), TASK, strength)

    def test_around_it(self):
        with pytest.raises(UserError, match=r"DePT needs a base that learns prompts, .* not ProLIP"):
            DePT(towers.backbone(), TASK, base=ProLIP)
        with pytest.raises(UserError, match=r"DePT needs a base that learns prompts, .* not VPT"):
            DePT(towers.backbone(), TASK, base=partial(VPT, head=ProLIP))

    def test_other_tokens(self, tmp_path, capsys):
        words = ["fit", "--config", "clip_16shot.yaml", "--config", "methods/prolip.yaml", "--run.root", str(tmp_path)]
        line = refused(capsys, [*words, "--model.backbone.features", "cls"])
        assert "ProLIP compares images with texts" in line


METHOD = ("--config", "methods/prolip.yaml")


def result_of(directory):
    return json.loads((directory / "result.json").read_text())


def test_runs_share_no_features_with_those_of_other_classifiers(tmp_path, monkeypatch, few_scans):
    """Features are kept for all 300 steps, found again by a later run, and never taken for projected ones."""
    monkeypatch.setenv("KSHOT_CACHE", str(tmp_path / "cache"))
    first = result_of(fit(tmp_path / "runs", *METHOD, *few_scans, "--trainer.max_epochs", "20"))
    probe = result_of(
        fit(tmp_path / "runs", "--config", "methods/task_res.yaml", *few_scans, "--trainer.max_epochs", "1")
    )
    again = result_of(fit(tmp_path / "runs", *METHOD, *few_scans, "--trainer.max_epochs", "20"))
    for result in (first, probe):
        assert result["features"]["encoded"]["train"] > 0
        assert result["features"]["read"].get("train", 0) == 0
    assert again["features"]["encoded"] == {}
    assert again["features"]["read"]["train"] == first["features"]["encoded"]["train"]
    assert_same_figures(again, first)
    assert first["zero_shot_acc"] == probe["zero_shot_acc"], "its row is that of projected features"


def test_with_an_adapter_the_zero_shot_row_stays(tmp_path, few_scans):
    """Then images take the place of features, and the untouched tower is run beside."""
    options = ["--model.adapter", "LoRA", "--model.targets", "[image.5.q]", "--trainer.max_epochs", "2", *few_scans]
    given = result_of(fit(tmp_path, *METHOD, *options))
    alone = result_of(fit(tmp_path, "--config", "methods/zero_shot.yaml", *few_scans))
    assert given["method"] == "ProLIP + LoRA"
    assert given["zero_shot_acc"] == alone["zero_shot_acc"]


def test_new_classes_are_those_of_their_text(tmp_path):
    result = result_of(fit(tmp_path, *METHOD, "--trainer.max_epochs", "20", "--data.protocol", "base-to-new"))
    assert list(result["test_sets"]) == ["base", "new"]
    assert 0 < result["summary"]["harmonic_mean"] <= 1
    assert result["trainable_parameters"] == 192 * 128


def test_a_resumed_run_asks_the_shots_no_more(tmp_path, monkeypatch, few_scans):
    """λ comes from the file, and the bits are those of a run that was never cut."""
    options = [*METHOD, "--trainer.max_epochs", "6", "--run.save_every", "0", "--run.test", "false", *few_scans]
    whole = fit(tmp_path / "whole", *options)
    cut = cut_fit(monkeypatch, 3, tmp_path / "cut", *options)
    monkeypatch.setattr(ProLIP, "fit", lambda *_: pytest.fail("asked again"))
    main(["fit", "--resume", str(cut)])
    a, b = (load_file(d / "tuned.safetensors") for d in (whole, cut))
    assert a.keys() == b.keys() == {"classifier.weight", "classifier.penalty"}
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert a["classifier.penalty"] == 0.5
