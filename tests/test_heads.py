"""Heads in closed form, against scikit-learn, direct formulas in float64, and refits without an image."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import towers
from scipy.optimize import minimize_scalar
from sklearn import kernel_ridge, linear_model
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from test_classifiers import NAMES, TASK, count_encodes, made, shots_of

from kshot.classifiers import GDA, ClassMeanText, KernelRidge, NearestClassMean, Ridge, Shots, Task
from kshot.classifiers.blend import TEXT_WEIGHTS, beats_chance
from kshot.classifiers.gda import Gaussians, gda, precise
from kshot.classifiers.kernel_ridge import dealt, factor, inverted, without
from kshot.classifiers.kernel_ridge import kernel as similarity
from kshot.classifiers.leaving_out import ROUNDS, held_out, judgeable, rounds, spectrum
from kshot.classifiers.ridge import decompose, ridge
from kshot.errors import UserError
from kshot.judging import accuracy, best_of, best_scale, log_loss

BLENDS = (Ridge, GDA, KernelRidge)
LABEL = torch.tensor([0, 0, 0, 1, 1, 2, 2, 2, 2, 1, 0, 2])


def unit_features(label, views=3, width=7, seed=0, spread=0.8):
    """Views of images around a centre a class, of unit length, in float64."""
    generator = torch.Generator().manual_seed(seed)
    centre = torch.randn(int(label.max()) + 1, width, generator=generator, dtype=torch.float64)
    noise = torch.randn(views, len(label), width, generator=generator, dtype=torch.float64)
    return F.normalize(centre[label] + spread * noise, dim=-1)


def fitted(kind, shots, classes=4, name="clip", **settings):
    classifier = kind(towers.backbone(name), Task(NAMES[:classes]), **settings)
    classifier.fit(shots, None)
    return classifier.eval()


def with_text(kind, **settings):
    """A head for ten classes whose texts are ten directions."""
    classifier = kind(towers.backbone(), Task(NAMES), **settings)
    text = torch.eye(10, classifier.backbone.feature_dim)
    if classifier.prompt is not None:
        classifier.prompt.encode = lambda: text
    return classifier


def around_text(noise, each, views=1, seed=0):
    """Shots of ten classes around these directions."""
    generator = torch.Generator().manual_seed(seed)
    label = torch.arange(10).repeat(each)
    away = F.normalize(torch.randn(views, len(label), 24, generator=generator), dim=-1)
    return Shots(torch.eye(10, 24)[label] + noise * away, label)


def text_weight_of(classifier):
    return float(classifier.chosen[2] if isinstance(classifier, KernelRidge) else classifier.text_weight)


class TestRounds:
    def test_all_classes_lose_alike(self):
        label = torch.tensor([0] * 3 + [1] * 3 + [2] * 20 + [3])
        lots = rounds(label)
        assert len(lots) == ROUNDS
        assert torch.equal(torch.stack(lots).sum(0).bool(), judgeable(label))
        assert torch.stack(lots).sum(0).max() == 1
        assert [int(lot[label == 0].sum()) for lot in lots] == [1, 1, 1, 0, 0, 0, 0, 0]
        assert {int(lot[label == 2].sum()) for lot in lots} == {2, 3}

    def test_scores_come_in_the_order_of_the_images(self):
        label = torch.tensor([0, 1, 0, 1, 2, 0])
        found = held_out(label, lambda held: held.nonzero()[:, 0].double().expand(2, -1)[..., None])
        assert found[..., 0].tolist() == [[0.0, 1.0, 2.0, 3.0, 5.0]] * 2

    @pytest.mark.parametrize("kind", [Ridge, GDA, KernelRidge], ids=lambda kind: kind.__name__)
    def test_a_text_that_knows_nothing_loses_at_two_shots(self, kind):
        """Left out one by one, they would belong to the smallest class, and almost any text would seem better."""
        train = around_text(1.0, 2, views=3)
        classifier = with_text(kind)
        classifier.fit(Shots(train.features, (train.label + 3) % 10), None)
        assert text_weight_of(classifier) == 0


@pytest.mark.parametrize("width", [7, 60])  # fewer and more features than rows
class TestSpectrum:
    @pytest.mark.parametrize("together", [2, 5, 99])
    def test_equals_the_singular_values(self, width, together, monkeypatch):
        """However many rows are taken at once."""
        for name in ("classifiers.leaving_out.AT_ONCE", "mahalanobis.BLOCK"):
            monkeypatch.setattr(f"kshot.{name}", together)
        f = unit_features(LABEL, width=width)
        mean, basis, rows, spread = spectrum(3 * f)
        centred = f - f.mean((0, 1))
        torch.testing.assert_close(mean, f.mean((0, 1)), rtol=0, atol=1e-12)
        torch.testing.assert_close(basis.outside(rows), centred, rtol=0, atol=1e-12)
        values = torch.linalg.svdvals(centred.flatten(0, 1)).square() / 3
        torch.testing.assert_close(spread.flip(0)[:7], values[:7], rtol=0, atol=1e-12)
        lengths = torch.einsum("vnr,vnr->r", rows, rows) / 3
        torch.testing.assert_close(lengths, spread, rtol=0, atol=1e-12)

    def test_both_closed_forms_take_shots_apart_once(self, width, monkeypatch):
        calls = []
        monkeypatch.setattr("kshot.classifiers.base.spectrum", lambda f: calls.append(len(f)) or spectrum(f))
        shots = Shots(unit_features(LABEL, width=width), LABEL)
        ridge(shots, 3, None)
        gda(shots, 3)
        assert calls == [3]


@pytest.mark.parametrize("views", [1, 3])
def test_the_way_of_many_images_is_that_of_few(views, monkeypatch):
    """More images than directions, block by block, give what fewer give: the same features with zeros behind."""
    label = torch.arange(3).repeat(6)
    f = unit_features(label, views)
    few = Shots(F.pad(f, (0, 80)), label)
    monkeypatch.setattr("kshot.classifiers.leaving_out.AT_ONCE", 4)
    many = Shots(f, label)
    assert (few.spectrum.basis.rows is None, many.spectrum.basis.rows is None) == (False, True)
    for solve, times in ((lambda shots: ridge(shots, 3, None), 1), (lambda shots: gda(shots, 3), 87 / 7)):
        (w, b, z), (weight, bias, held) = solve(few), solve(many)
        torch.testing.assert_close(w[:, :7], times * weight, rtol=0, atol=1e-9)
        torch.testing.assert_close(w[:, 7:], torch.zeros(3, 80, dtype=w.dtype), rtol=0, atol=1e-9)
        torch.testing.assert_close(b, times * bias, rtol=0, atol=1e-9)
        torch.testing.assert_close(z, times * held, rtol=0, atol=1e-9)


class TestRidge:
    @pytest.mark.parametrize("strength", [0.01, 0.3])
    @pytest.mark.parametrize("width", [7, 60])  # fewer and more features than rows
    def test_equals_scikit_learn(self, strength, width):
        f = unit_features(LABEL, width=width)
        weight, bias = decompose(Shots(f, LABEL), 3).solution(strength)
        rows = f.flatten(0, 1)
        kappa = (rows - rows.mean(0)).square().sum(1).mean()
        y = F.one_hot(LABEL.repeat(3), 3).double()
        theirs = linear_model.Ridge(alpha=float(strength * kappa), solver="cholesky")
        theirs.fit(rows.numpy(), y.numpy(), sample_weight=np.full(len(rows), 1 / 3))
        np.testing.assert_allclose(weight.numpy(), theirs.coef_, atol=1e-10)
        np.testing.assert_allclose(bias.numpy(), theirs.intercept_, atol=1e-10)

    @pytest.mark.parametrize("views", [1, 3])
    @pytest.mark.parametrize("width", [7, 60])
    def test_what_is_held_out_is_judged_by_the_others(self, views, width):
        f, y = unit_features(LABEL, views, width), F.one_hot(LABEL, 3).double()
        _, _, found = ridge(Shots(f, LABEL), 3, 0.1)
        for held in rounds(LABEL):
            rows, targets = f[:, ~held].flatten(0, 1), y[~held].repeat(views, 1).numpy()
            kappa = float((rows - rows.mean(0)).square().sum(1).mean())
            model = linear_model.Ridge(alpha=0.1 * kappa, solver="cholesky")
            model.fit(rows.numpy(), targets, sample_weight=np.full(len(rows), 1 / views))
            expected = [model.predict(f[:, i].numpy()).mean(0) for i in held.nonzero()[:, 0]]
            np.testing.assert_allclose(found[held].numpy(), np.stack(expected), atol=1e-9)

    def test_the_strength_is_the_best_for_what_is_held_out(self):
        shots = Shots(unit_features(LABEL, width=24, spread=2.0).float(), LABEL)
        chosen = fitted(Ridge, shots, 3, text=False)
        found = {strength: ridge(shots, 3, strength)[2] for strength in (0.01, 0.03, 0.1, 0.3, 1.0)}
        worth = {s: (accuracy(z, LABEL), -log_loss(z, LABEL)) for s, z in found.items()}
        best = max(worth, key=worth.__getitem__)
        alone = fitted(Ridge, shots, 3, text=False, strength=best)
        assert len(set(worth.values())) > 1
        assert torch.equal(chosen.weight, alone.weight)
        assert float(chosen.scale) == pytest.approx(best_scale(found[best], LABEL))


class TestGDA:
    def test_equals_scikit_learn(self):
        """Linear discriminant analysis whose shrinkage is that of the paper: the same up to one factor."""
        label, width = torch.arange(4).repeat(5), 7
        f = unit_features(label, 1, width)
        ours = F.linear(f[0], *Gaussians.of(Shots(f, label), 4).solution())
        n = len(label)
        theirs = LinearDiscriminantAnalysis(solver="lsqr", shrinkage=width / (width + n - 1))
        theirs.fit(f[0].numpy(), label.numpy())
        logits = torch.from_numpy(theirs.decision_function(f[0].numpy())) * (1 - theirs.shrinkage) * width / n
        centred = [x - x.mean(1, keepdim=True) for x in (ours, logits)]
        # log π is not part of the factor, and equal classes make it a constant
        torch.testing.assert_close(centred[0], centred[1], rtol=0, atol=1e-9)

    @pytest.mark.parametrize("spread", [0.8, 1e-4])  # of the images of a class: all but one scatter is of their means
    def test_equals_the_formula_with_unequal_classes_and_views(self, spread):
        f, n, d = unit_features(LABEL, spread=spread), len(LABEL), 7
        weight, bias = Gaussians.of(Shots(f, LABEL), 3).solution()
        means = torch.stack([f[:, c == LABEL].mean((0, 1)) for c in range(3)])
        cov = (
            sum(torch.outer(x - means[y], x - means[y]) for v in f for x, y in zip(v, LABEL, strict=True)) / 3 / (n - 1)
        )
        precision = d * torch.linalg.inv((n - 1) * cov + cov.trace() * torch.eye(d).double())
        expected = f[0] @ (means @ precision).T
        expected += (LABEL.bincount().double() / n).log() - torch.einsum("cd,de,ce->c", means, precision, means) / 2
        found = F.linear(f[0], weight, bias)
        torch.testing.assert_close(found.softmax(-1), expected.softmax(-1), rtol=0, atol=1e-9)
        found, expected = (x - x.mean(1, keepdim=True) for x in (found, expected))
        assert towers.relative(found, expected) < 1e-9

    @pytest.mark.parametrize("views", [1, 3])
    @pytest.mark.parametrize("width", [7, 60])  # fewer and more features than rows
    @pytest.mark.parametrize("spread", [0.8, 1e-3, 1e-4])
    def test_what_is_held_out_is_judged_by_the_others(self, views, width, spread):
        f = unit_features(LABEL, views, width, spread=spread)
        _, _, found = gda(Shots(f, LABEL), 3)
        for held in rounds(LABEL):
            answer = Gaussians.of(Shots(f[:, ~held], LABEL[~held]), 3).solution()
            for i in held.nonzero()[:, 0].tolist():
                assert towers.relative(found[i], F.linear(f[:, i], *answer).mean(0)) < 1e-9

    def test_a_precision_is_that_of_the_whole_matrix(self):
        apart = torch.randn(5, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        mean = apart[:2] + 1
        expected = 9 * mean @ torch.linalg.inv(apart.T @ apart + 0.3 * torch.eye(9).double())
        torch.testing.assert_close(precise(mean, apart, torch.tensor(0.3, dtype=torch.float64)), expected)

    def test_new_classes_are_served_by_their_text(self):
        classifier = made(GDA, {"neighbours": 5})
        shots = F.normalize(classifier.rows.double(), dim=-1)
        classifier.set_class_names(NAMES[4:7])
        with torch.no_grad():
            text = F.normalize(classifier.prompt.encode().double(), dim=-1)
            found = classifier.hold().double()
        means, precisions = [], []
        for t in text:
            near = shots[(shots @ t).topk(5).indices]
            means.append(torch.cat([near, t.expand(16, -1)]).mean(0))
            scatter = (near - t).T @ (near - t)
            d = len(t)
            precisions.append(d * torch.linalg.inv(scatter + scatter.trace() / 4 * torch.eye(d).double()))
        means, precision = torch.stack(means), torch.stack(precisions).mean(0)
        assert towers.relative(found[:, :-1], means @ precision) < 1e-4

    @pytest.mark.parametrize("each", [1, 2])  # without one of two nothing varies within a class
    def test_few_shots_are_ridges(self, each):
        label = torch.arange(4).repeat(each)
        shots = Shots(unit_features(label, width=24).float(), label)
        ours, theirs = (fitted(kind, shots, text=False) for kind in (GDA, Ridge))
        assert torch.equal(ours.weight, theirs.weight)

    def test_equal_images_have_no_covariance(self):
        label = torch.arange(4).repeat(3)
        features = unit_features(torch.arange(4), 1, 24).float().repeat(1, 3, 1)
        classifier = fitted(GDA, Shots(features, label), text=False)
        assert torch.equal(classifier(features[0]).argmax(-1), label)


class TestKernelRidge:
    def test_equals_scikit_learn(self):
        shots = shots_of(towers.backbone(), 4)
        classifier = fitted(KernelRidge, shots, text=False, sharpness=3.0, strength=0.1)
        x = F.normalize(F.normalize(shots.features.double(), dim=-1).mean(0), dim=-1).numpy()
        y = F.one_hot(shots.label, 4).double().numpy()
        theirs = kernel_ridge.KernelRidge(alpha=0.1, kernel="precomputed").fit(
            np.exp(-3 * (1 - x @ x.T)), y - y.mean(0)
        )
        np.testing.assert_allclose(classifier.coefficients.numpy(), theirs.dual_coef_, atol=1e-5)
        expected = theirs.predict(np.exp(-3 * (1 - x @ x.T))) + y.mean(0)
        got = classifier(torch.from_numpy(x).float()).detach() / classifier.chosen[1]
        np.testing.assert_allclose(got.numpy(), expected, atol=1e-5)

    def test_what_is_held_out_is_judged_by_the_others(self):
        x = unit_features(LABEL, 1)[0]
        r = F.one_hot(LABEL, 3).double() - 0.2
        kernel = np.exp(-2 * (1 - (x @ x.T).numpy()))
        residual = without(inverted(similarity(x @ x.T, 2.0), 0.3), r, LABEL)
        for held in rounds(LABEL):
            model = kernel_ridge.KernelRidge(alpha=0.3, kernel="precomputed")
            model.fit(kernel[~held][:, ~held], r[~held].numpy())
            prediction = model.predict(kernel[held][:, ~held])
            np.testing.assert_allclose((r - residual)[held].numpy(), prediction, atol=1e-10)

    def test_of_many_images_some_decide(self, monkeypatch):
        """The first of every class, then the second."""
        label = torch.tensor([2, 2, 2, 0, 1, 1, 0])
        assert dealt(label, 5).tolist() == [0, 1, 3, 4, 5]
        assert dealt(label, 3).tolist() == [0, 3, 4]
        assert dealt(label, 99).tolist() == list(range(7))
        sizes = []
        monkeypatch.setattr("kshot.classifiers.kernel_ridge.FEW", 1)
        monkeypatch.setattr("kshot.classifiers.kernel_ridge.EACH", 2)
        monkeypatch.setattr(
            "kshot.classifiers.kernel_ridge.factor", lambda x, *a: sizes.append(len(x)) or factor(x, *a)
        )
        fitted(KernelRidge, shots_of(towers.backbone(), 3), 3)
        assert sizes == [6] * 9 + [9]


class TestClassMeanText:
    @pytest.mark.parametrize("text_weight", [1.0, 0.25, None])
    def test_equals_the_formula(self, text_weight):
        shots = Shots(unit_features(LABEL, 2, 24).float(), LABEL)
        classifier = fitted(ClassMeanText, shots, 3, text_weight=text_weight)
        t = F.normalize(classifier.encode().detach(), dim=-1)
        f = F.normalize(shots.features, dim=-1).mean(0)
        for c, n in enumerate((4, 3, 5)):
            expected = f[c == LABEL].mean(0) + (1 / n if text_weight is None else text_weight) * t[c]
            torch.testing.assert_close(classifier.text_features(f)[c], expected, rtol=0, atol=1e-6)

    def test_a_class_without_images_keeps_its_text(self):
        label = torch.tensor([0, 1, 0])
        classifier = fitted(ClassMeanText, Shots(unit_features(label, 1, 24).float(), label), 3)
        t = F.normalize(classifier.encode().detach(), dim=-1)
        torch.testing.assert_close(classifier.text_features(t)[2], t[2])


@pytest.mark.parametrize("kind", BLENDS)
class TestBlend:
    def test_a_text_that_knows_the_classes_helps(self, kind):
        train, test = around_text(3.0, 2, views=2), around_text(3.0, 40, seed=1)
        right = []
        for settings in ({}, {"text": False}):
            classifier = with_text(kind, **settings)
            classifier.fit(train, None)
            right.append(float((classifier(test.features[0]).argmax(-1) == test.label).float().mean()))
            assert text_weight_of(classifier) > 0 or settings
        assert right[0] > right[1] + 0.05

    def test_a_text_that_knows_nothing_loses(self, kind):
        shots = around_text(1.0, 4, views=2)
        label = (shots.label + 3) % 10
        classifier = with_text(kind)
        classifier.fit(Shots(shots.features, label), None)
        assert text_weight_of(classifier) == 0
        assert torch.equal(classifier(shots.features[0]).argmax(-1), label)

    @pytest.mark.parametrize("knows", [True, False])
    def test_at_one_shot_the_text_enters_if_it_beats_chance(self, kind, knows):
        shots = around_text(0.5, 1)
        label = shots.label if knows else (shots.label + 3) % 10
        classifier = with_text(kind)
        classifier.fit(Shots(shots.features, label), None)
        assert text_weight_of(classifier) == float(knows)
        assert torch.equal(classifier(shots.features[0]).argmax(-1), label)

    def test_probabilities_are_of_the_size_of_the_accuracy(self, kind):
        """On images like the shots: within 0.15 of it, where the raw scores of ridge would say 0.2."""
        label = torch.arange(4).repeat(8)
        both = unit_features(label.repeat(2), 1, 24, spread=1.5)
        train, test = Shots(both[:, :32].float(), label), Shots(both[:, 32:].float(), label)
        p = fitted(kind, train, text=False)(test.features[0]).softmax(-1)
        assert abs(float(p.max(-1).values.mean()) - float((p.argmax(-1) == label).float().mean())) < 0.15

    @pytest.mark.parametrize(
        "label", [[0, 0, 0], [0, 0, 0, 0, 1], [0, 1, 1, 2, 2, 2, 2, 2, 3]], ids=["one", "lone", "unequal"]
    )
    def test_classes_of_any_size(self, kind, label):
        label = torch.tensor(label)
        features = unit_features(label, 2, 24, spread=0.1).float()
        classifier = fitted(kind, Shots(features, label), int(label.max()) + 1)
        logits = classifier(features[0])
        assert torch.isfinite(logits).all()
        assert torch.equal(logits.argmax(-1), label)

    def test_equal_images_with_two_labels(self, kind):
        features = unit_features(torch.arange(3), 1, 24).float().repeat(1, 2, 1)
        classifier = fitted(kind, Shots(features, torch.tensor([0, 1, 2, 0, 2, 1])), 3, text=False)
        p = classifier(features[0]).softmax(-1)
        assert torch.isfinite(p).all()
        assert p[0].argmax() == 0

    def test_the_text_is_encoded_once_whatever_the_number_of_views(self, kind, monkeypatch):
        classifier = kind(towers.backbone(), TASK)
        calls = count_encodes(monkeypatch, classifier.backbone)
        classifier.fit(shots_of(classifier.backbone, 4, views=3), None)
        assert calls == ["encode"]

    def test_features_that_are_not_finite(self, kind):
        shots = shots_of(towers.backbone(), 4)
        shots.features[0, 3, 1] = float("nan")
        with pytest.raises(UserError, match=f"{kind.__name__}: features of the training images are not finite"):
            fitted(kind, shots)

    def test_without_a_text_tower(self, kind):
        shots = shots_of(towers.backbone("vit"), 4)
        classifier = fitted(kind, shots, name="vit")
        assert classifier.prompt is None
        assert float((classifier(shots.features[0]).argmax(-1) == shots.label).float().mean()) > 0.9
        with pytest.raises(UserError, match=f"{kind.__name__} needs a text tower"):
            kind(towers.backbone("vit"), TASK, text=True)


class TestJudging:
    def test_a_temperature_is_that_of_the_least_log_loss(self):
        generator = torch.Generator().manual_seed(0)
        z = torch.randn(400, 5, generator=generator, dtype=torch.float64) * 2
        label = torch.multinomial(z.softmax(-1), 1, generator=generator)[:, 0]
        found = minimize_scalar(
            lambda s: float(F.cross_entropy(z * 25 * math.exp(s), label, label_smoothing=1 / 402)), bounds=(-7, 7)
        )
        assert best_scale(z * 25, label) == pytest.approx(math.exp(found.x), rel=1e-3)
        assert log_loss(z * 25, label) == pytest.approx(found.fun, rel=1e-6)
        assert log_loss(z * 25, label) == pytest.approx(log_loss(z, label), rel=1e-6)

    def test_few_images_that_are_all_right_do_not_show_certainty(self):
        z = F.one_hot(torch.arange(4)).double()
        few = (z * best_scale(z, torch.arange(4))).softmax(-1)
        more = (z * best_scale(z.repeat(25, 1), torch.arange(4).repeat(25))).softmax(-1)
        assert few.max() < 0.95 < more.max() < 1

    def test_accuracy_decides_then_log_loss_then_the_order(self):
        label = torch.arange(4)
        right, sure = torch.eye(4, dtype=torch.float64), torch.eye(4, dtype=torch.float64)
        wrong = right.roll(1, 0)
        right[0] = torch.tensor([0.6, 0.5, 0, 0])
        assert best_of([("wrong", wrong), ("right", right), ("sure", sure), ("again", 3 * sure)], label)[0] == "sure"
        assert best_of([("sure", sure), ("right", right)], label)[0] == "sure"
        assert torch.equal(best_of([("right", right), ("wrong", wrong)], label)[1], right)

    def test_chance(self):
        label = torch.arange(10)
        assert beats_chance(torch.eye(10), label)
        assert not beats_chance(torch.eye(10).roll(1, 0), label)
        assert not beats_chance(F.one_hot(torch.tensor([0, 1, *[0] * 8]), 10).float(), label)  # 2 of 10 are luck


def test_zero_is_among_the_weights_of_the_text():
    assert TEXT_WEIGHTS[0] == 0


def test_ridge_beats_class_means_where_classes_share_directions():
    """What the heads are for: noise that all classes share is taken out."""
    generator = torch.Generator().manual_seed(0)
    label = torch.arange(6).repeat(16)
    centre = 0.4 * torch.randn(6, 24, generator=generator)
    shared = torch.randn(24, 24, generator=generator) * torch.logspace(0, -2, 24)

    def draw():
        return Shots((centre[label] + torch.randn(1, 96, 24, generator=generator) @ shared), label)

    train, test = draw(), draw()
    right = {}
    for kind in (Ridge, GDA, NearestClassMean):
        settings = {} if kind is NearestClassMean else {"text": False}
        classifier = fitted(kind, train, 6, **settings)
        right[kind] = float((classifier(test.features[0]).argmax(-1) == label).float().mean())
    assert min(right[Ridge], right[GDA]) > right[NearestClassMean] + 0.1
