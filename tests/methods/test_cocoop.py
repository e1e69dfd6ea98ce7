"""CoCoOp against prompts that are assembled and encoded one image and one class at a time, at full length."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
import towers
from plain_prompts import (
    NAMES,
    disturb,
    encode,
    features_of,
    made,
    plain_logits,
    prompt_tokens,
    prompted_text,
    same_gradients,
    trained,
    unit,
)

from kshot.adapters import LoRA
from kshot.classifiers import VPT, CoCoOp, CoOp
from kshot.errors import UserError


def plain(given, features, name="clip"):
    """Logits by the formula: every image's own context through the library's text tower."""
    original, names = towers.original(name), given.task.class_names
    down, up = (x for x in given.meta_net if isinstance(x, torch.nn.Linear))
    hidden = torch.clamp(unit(features) @ down.weight.T + down.bias, min=0)
    shift = hidden @ up.weight.T + up.bias
    tokens, rows = prompt_tokens(given.backbone, len(given.context), names), []
    for image, pi in zip(features, shift, strict=True):
        rows.append(plain_logits(original, image[None], prompted_text(original, tokens, given.context + pi)))
    return torch.cat(rows)


@pytest.mark.parametrize("settings", [{"reduction": 4}, {"context_length": 2, "init_words": None, "reduction": 3}])
@pytest.mark.parametrize("name", towers.WITH_PROMPTS)
def test_equals_a_plain_computation_image_by_image(name, settings):
    given = disturb(made(CoCoOp, name, **settings))
    features = features_of(given, 3).requires_grad_()
    expected = plain(given, features, name)
    with torch.no_grad():
        assert towers.relative(given(features), expected) <= 1e-5
    inputs = trained(given)
    assert len(inputs) == 5
    same_gradients(given(features), expected, [features, *inputs.values()])


def test_the_loss_is_the_cross_entropy():
    given, label = disturb(made(CoCoOp, reduction=4)), torch.tensor([3, 0, 1])
    features = features_of(given, 3)
    terms = given.losses(features, label)
    assert terms.keys() == {"cross_entropy"}
    assert towers.relative(terms["cross_entropy"], F.cross_entropy(plain(given, features), label)) <= 1e-5


def test_a_meta_net_of_zeros_is_coop():
    given, coop = made(CoCoOp, reduction=4), made(CoOp, init_words="a photo of a")
    features = features_of(given)
    with torch.no_grad():
        assert towers.relative(given(features), coop(features)) > 1e-4
        for parameter in given.meta_net.parameters():
            parameter.zero_()
        assert towers.relative(given(features), coop(features)) <= 1e-5


@pytest.mark.parametrize("gradient", [True, False])
def test_a_batch_is_its_images_one_by_one(gradient):
    given = disturb(made(CoCoOp, reduction=4))
    features = features_of(given, 7)
    with torch.set_grad_enabled(gradient):
        together = given(features)
        assert towers.relative(torch.cat([given(f[None]) for f in features]), together) <= 1e-5
        assert towers.relative(given(features.flip(0)), together.flip(0)) <= 1e-5
    assert towers.relative(given.text_features(features)[0], given.text_features(features)[1]) > 1e-3


def test_the_meta_net_reads_normalised_features():
    given = disturb(made(CoCoOp, reduction=4))
    features = features_of(given)
    expected = given.context + given.meta_net(unit(features)).unsqueeze(1)
    assert towers.relative(given.contexts(features), expected) <= 1e-6
    assert towers.relative(given(features * torch.linspace(0.01, 90, 6)[:, None]), given(features)) <= 1e-5


@pytest.mark.parametrize("images", [1, 5])
def test_parts_within_a_memory_budget_give_the_same(images):
    whole, parts = (disturb(made(CoCoOp, names=NAMES, reduction=4)) for _ in range(2))
    for budget in (250_000, 1_500_000):  # less, and more, than the prompts of one image
        parts.backbone.text_memory = budget
        features = features_of(whole, images)
        encode, sizes = parts.backbone.encode_part, []
        parts.backbone.encode_part = lambda p, s, *rest: sizes.append(tuple(s.shape[:2])) or encode(p, s, *rest)  # noqa: B023
        for classifier in (whole, parts):
            classifier.zero_grad()
            classifier(features).square().sum().backward()
        del parts.backbone.encode_part
        assert len(sizes) > 1 or (images == 1 and budget > 1e6)
        assert all(g == 1 or c == len(NAMES) for g, c in sizes)
        assert towers.relative(parts(features), whole(features)) <= 1e-5
        for a, b in zip(trained(parts).values(), trained(whole).values(), strict=True):
            assert towers.relative(a.grad, b.grad) <= 1e-5
        with torch.no_grad():
            assert towers.relative(parts(features), whole(features)) <= 1e-5


class TestGroups:
    """A step whose prompts do not fit together takes a few images at a time, and computes nothing twice."""

    LABEL = torch.tensor([3, 0, 9, 1, 2])

    def step(self, classifier, budget, scale=1.0, **given):
        """Loss, gradients by name, and calls of the text tower's blocks forward and backward."""
        classifier.backbone.text_memory = budget
        features = given.get("features", features_of(classifier, 5)).to(classifier.context.dtype)
        calls, encode = [], classifier.backbone.encode_part
        classifier.backbone.encode_part = lambda p, s, *rest: calls.append(tuple(s.shape[:2])) or encode(p, s, *rest)
        classifier.zero_grad()
        loss = classifier.losses(features, self.LABEL)["cross_entropy"]
        forward = list(calls)
        (scale * loss).backward()
        del classifier.backbone.encode_part
        return loss.detach(), {n: p.grad for n, p in trained(classifier).items()}, forward, calls[len(forward) :]

    def budget(self, classifier, images):
        """Bytes in which the prompts of some images fit together, and of one more do not."""
        part_size, sizes = classifier.backbone.part_size, []
        classifier.backbone.part_size = lambda *a, **k: sizes.append((a, k)) or part_size(*a, **k)
        classifier.images_together(features_of(classifier, 5))
        del classifier.backbone.part_size
        (arguments, named), least = sizes[0], 1
        while True:
            classifier.backbone.text_memory = least
            if part_size(*arguments, **named) == (images, len(classifier.rest)):
                return least
            least = int(least * 1.1) + 1

    @pytest.mark.parametrize(("images", "expected"), [(1, [1] * 5), (2, [2, 2, 1]), (3, [3, 2]), (5, [5])])
    def test_equal_the_whole_step(self, images, expected):
        given = disturb(made(CoCoOp, names=NAMES, reduction=4)).double()
        LoRA(rank=2).attach(given.backbone, ["text.*"])
        given = disturb(given).double()
        budget = self.budget(given, images)
        whole = self.step(given, None, scale=0.3)
        parts = self.step(given, budget, scale=0.3)
        assert [g for g, _ in parts[2]] == expected
        assert {c for _, c in parts[2]} == {len(NAMES)}
        assert parts[3] == whole[3] == []  # nothing runs again in the backward pass
        assert towers.relative(parts[0], whole[0]) <= 1e-12
        assert len(whole[1]) > 5
        for name, gradient in whole[1].items():
            assert gradient.abs().max() > 0, name
            assert towers.relative(parts[1][name], gradient) <= 1e-10, name

    @pytest.mark.parametrize("targets", [["image.*"], ["*"]])
    def test_gradients_go_on_into_the_image_tower(self, targets):
        """Through the features, which tokens in the image tower or an adapter make learnable."""
        given = made(VPT, names=NAMES, head=partial(CoCoOp, reduction=4))
        LoRA(rank=2).attach(given.backbone, targets)
        disturb(given).double()
        images, results = towers.images(given.backbone, 5).double(), []
        budget = self.budget(given.inner, 2)
        for text_memory in (None, budget):
            given.backbone.text_memory = text_memory
            given.zero_grad()
            given.losses(encode(given, images), self.LABEL)["cross_entropy"].backward()
            results.append({name: p.grad for name, p in trained(given).items()})
        for name, gradient in results[0].items():
            assert gradient.abs().max() > 0, name
            assert towers.relative(results[1][name], gradient) <= 1e-10, name

    def test_under_bfloat16_autocast(self):
        given = disturb(made(CoCoOp, names=NAMES, reduction=4))
        LoRA(rank=2).attach(given.backbone, ["text.*"])
        disturb(given)
        _, exact, *_ = self.step(given, None)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            budget = self.budget(given, 2)
            whole, parts = self.step(given, None), self.step(given, budget)
        assert [g for g, _ in parts[2]] == [2, 2, 1]
        assert towers.relative(parts[0], whole[0]) <= 1e-2
        assert {g.dtype for g in parts[1].values()} == {torch.float32}
        flat = [torch.cat([g.flatten() for g in gradients.values()]) for gradients in (exact, whole[1], parts[1])]
        assert (flat[2] - flat[0]).norm() <= 1.5 * (flat[1] - flat[0]).norm()

    def test_not_where_gradients_are_scaled_or_one_image_does_not_fit(self):
        given = disturb(made(CoCoOp, names=NAMES, reduction=4))
        features, budget = features_of(given, 5), self.budget(given, 2)
        given.backbone.text_memory = budget
        assert given.images_together(features) == 2
        with torch.no_grad():
            assert given.images_together(features) == 5
        with torch.autocast("cpu", dtype=torch.float16):
            given.backbone.text_memory = budget // 2
            assert given.images_together(features) == 5
        whole, parts = self.step(given, None), self.step(given, 1)
        assert set(parts[2]) == {(1, 1)}
        assert len(parts[3]) == len(parts[2]) == 5 * len(NAMES)  # computed again: one image does not fit
        assert towers.relative(parts[0], whole[0]) <= 1e-5
        for name, gradient in whole[1].items():
            assert towers.relative(parts[1][name], gradient) <= 1e-4, name

    def test_it_says_so_once(self, caplog):
        caplog.set_level("INFO", "kshot")
        given = disturb(made(CoCoOp, names=NAMES, reduction=4))
        budget = self.budget(given, 2)
        caplog.clear()
        given.backbone.said = frozenset()
        for _ in range(2):
            self.step(given, budget)
        (message,) = [r.getMessage() for r in caplog.records]
        assert "50 prompts in 3 parts of 20" in message


def test_starts_and_counts():
    given = made(CoCoOp)
    table = towers.original("clip").token_embedding.weight
    assert torch.equal(given.context, table[given.backbone.token_ids("a photo of a")])
    down, _, up = given.meta_net
    assert (down.in_features, down.out_features) == (24, 24 // 16)
    assert (up.in_features, up.out_features) == (24 // 16, 32)
    for reduction in (1, 5, 24):
        hidden = 24 // reduction
        count = sum(p.numel() for p in trained(made(CoCoOp, reduction=reduction)).values())
        assert count == 4 * 32 + (24 * hidden + hidden) + (hidden * 32 + 32)


def test_other_classes_keep_context_and_net():
    given = disturb(made(CoCoOp, reduction=4))
    features = features_of(given, 2)
    with torch.no_grad():
        given.set_class_names(NAMES)
        assert given(features).shape == (2, 10)
        assert towers.relative(given(features), plain(given, features)) <= 1e-5


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"reduction": 0}, "reduction is 0, and must lie between 1 and the feature width 24"),
        ({"reduction": 25}, "reduction is 25"),
        ({"context_length": 3}, "4 tokens, but context_length is 3"),
    ],
)
def test_bad_settings(settings, expected):
    with pytest.raises(UserError) as error:
        made(CoCoOp, **settings)
    assert str(error.value).startswith("CoCoOp: ")
    assert expected in str(error.value)
    assert "\n" not in str(error.value)
