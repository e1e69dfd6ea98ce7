"""CoOp against open_clip's own text tower with the learned tokens put in by hooks, and against plain assemblies."""

import pytest
import torch
import torch.nn.functional as F
import towers
from plain_prompts import (
    NAMES,
    disturb,
    features_of,
    made,
    plain_logits,
    prompt_tokens,
    prompted_text,
    same_gradients,
    trained,
    unit,
)

from kshot.classifiers import CoOp, TextPrompt
from kshot.errors import UserError

POSITIONS = ("end", "middle", "front")
EMPTIED = ("", "  ", "\t", "\x07", "\ufeff", "&nbsp;")  # the tokenizer cleans away what is not to be seen
BRACKETED = (
    "kite (bird of prey)",
    "Mexican hairless dog (xoloitzcuintli)",
    "ram (adult male sheep)",
    "impala (antelope)",
    "military hat (bearskin or shako)",
    "cherimoya (custard apple)",
)  # of ImageNet


def refusal(*arguments, **settings) -> str:
    """The one line with which a CoOp is refused."""
    with pytest.raises(UserError) as error:
        made(CoOp, *arguments, **settings)
    assert "\n" not in str(error.value)
    return str(error.value)


class TestContext:
    @pytest.mark.parametrize("name", towers.WITH_PROMPTS)
    def test_a_phrase_as_context_is_that_phrase_as_a_template(self, name):
        template = made(TextPrompt, name)
        learned = made(CoOp, name, context_length=4)
        features = features_of(template)
        with torch.no_grad():
            assert towers.relative(learned(features), template(features)) > 1e-3
            ids = torch.tensor(learned.backbone.token_ids("a photo of a"))
            learned.context.copy_(learned.backbone.embed_tokens(ids))
            assert towers.relative(learned(features), template(features)) <= 1e-5
        assert towers.relative(learned(features), template(features)) <= 1e-5

    @pytest.mark.parametrize("class_specific", [False, True])
    def test_init_words_are_the_initial_value(self, class_specific):
        given = made(CoOp, init_words="a photo of a", class_specific=class_specific)
        table = towers.original("clip").token_embedding.weight
        expected = table[given.backbone.token_ids("a photo of a")]
        assert torch.equal(given.context, expected.expand(4, -1, -1) if class_specific else expected)
        assert given.context.untyped_storage().data_ptr() != given.backbone.clip.token_embedding.weight.data_ptr()
        features = features_of(given)
        assert towers.relative(given(features), made(TextPrompt)(features)) <= 1e-5

    def test_random_initial_values(self):
        given = made(CoOp, context_length=60, depth=2)
        for tokens in (given.context, given.deep):
            assert tokens.shape[-2:] == (60, 32)
            assert float(tokens.detach().std()) == pytest.approx(0.02, rel=0.1)
            assert abs(float(tokens.detach().mean())) < 0.003
        assert made(CoOp).context.shape == (16, 32)
        assert made(CoOp, context_length=5, class_specific=True).context.shape == (4, 5, 32)

    def test_words_and_the_right_length_agree(self):
        assert made(CoOp, init_words="a photo of a", context_length=4).context.shape == (4, 32)

    def test_only_what_is_learned_is_saved(self):
        for depth, names in ((1, {"context"}), (2, {"context", "deep"})):
            given = made(CoOp, context_length=2, depth=depth)
            assert {n for n in given.state_dict() if not n.startswith("backbone.")} == names
            assert trained(given).keys() == names

    @pytest.mark.parametrize("classes", [2, 4])
    def test_the_number_of_parameters_is_that_of_the_formula(self, classes):
        width = 32
        for settings, expected in (
            ({}, 16 * width),
            ({"context_length": 4}, 4 * width),
            ({"init_words": "a photo of a"}, 4 * width),
            ({"class_specific": True}, 16 * width * classes),
            ({"context_length": 3, "depth": 2}, 2 * 3 * width),
            ({"context_length": 3, "depth": None}, 2 * 3 * width),
        ):
            given = made(CoOp, names=NAMES[:classes], **settings)
            assert sum(p.numel() for p in trained(given).values()) == expected, settings


class TestAssembly:
    @pytest.mark.parametrize("class_specific", [False, True])
    @pytest.mark.parametrize("length", [1, 3, 4])
    @pytest.mark.parametrize("position", POSITIONS)
    def test_equals_a_plain_assembly(self, position, length, class_specific):
        given = made(CoOp, context_length=length, position=position, class_specific=class_specific)
        with torch.no_grad():
            given.context.normal_()
        backbone, original = given.backbone, towers.original("clip")
        table, first = original.token_embedding.weight, {"end": length, "middle": length // 2, "front": 0}[position]
        rows, ends = [], []
        for c, name in enumerate(NAMES[:4]):
            context = given.context[c] if class_specific else given.context
            word, stop = table[backbone.token_ids(name)], table[backbone.token_ids(".")]
            start, end = table[[towers.END_OF_TEXT - 1]], table[[towers.END_OF_TEXT]]
            parts = torch.cat([start, context[:first], word, context[first:], stop, end])
            ends.append(len(parts) - 1)
            rows.append(F.pad(parts, (0, 0, 0, 77 - len(parts))))
        x = torch.stack(rows) + original.positional_embedding
        x = original.ln_final(original.transformer(x, attn_mask=original.attn_mask))
        expected = plain_logits(original, features_of(given), x[torch.arange(4), ends] @ original.text_projection)
        assert given.end.tolist() == ends
        with torch.no_grad():
            assert towers.relative(given(features_of(given)), expected) <= 1e-5
        same_gradients(given(features_of(given)), expected, [given.context])

    def test_positions_differ_and_share_the_end(self):
        each = [made(CoOp, context_length=4, position=p) for p in POSITIONS]
        context, outputs = torch.randn(4, 32), []
        for classifier in each:
            with torch.no_grad():
                classifier.context.copy_(context)
                outputs.append(classifier(features_of(classifier)))
            assert torch.equal(classifier.end, each[0].end)
        for a, b in ((0, 1), (0, 2), (1, 2)):
            assert towers.relative(outputs[a], outputs[b]) > 1e-3

    @pytest.mark.parametrize("name", ["Mr.", "what?", "t-shirt", "R2-D2", "Cat"])
    @pytest.mark.parametrize("position", POSITIONS)
    def test_names_with_punctuation_keep_all_their_tokens_together(self, name, position):
        """The class name stands whole between the halves of the context, whatever its last character is."""
        given = made(CoOp, names=(name, "dog"), context_length=2, position=position)
        with torch.no_grad():
            given.context.fill_(9.0)
            prefix, suffix = given.prompts()
        prompt = torch.cat([prefix[0], suffix[0, 0]])[: int(given.end[0]) + 1]
        is_context = (prompt == 9.0).all(-1).tolist()
        word = given.backbone.embed_tokens(torch.tensor(given.backbone.token_ids(name)))
        first = is_context.index(True)
        at = {"end": first + 2, "middle": first + 1, "front": 1}[position]
        assert sum(is_context) == 2
        assert is_context[at - 1] == (position != "front")
        merged = position == "end" or not name[-1].isalnum()  # punctuation may join the full stop in one token
        inside = len(word) - 1 if merged else len(word)
        assert torch.equal(prompt[at : at + inside], word[:inside])
        if position != "end":
            assert is_context[at + len(word)]

    @pytest.mark.parametrize("position", POSITIONS)
    def test_a_closing_bracket_takes_the_full_stop_along(self, position):
        """Six names of ImageNet end in a bracket, which the tokenizer joins with the full stop."""
        given = made(CoOp, names=BRACKETED, context_length=4, position=position)
        with torch.no_grad():
            given.context.normal_()
        original, encode = towers.original("clip"), given.backbone.token_ids
        table, before = original.token_embedding.weight, {"end": 4, "middle": 2, "front": 0}[position]
        rows, ends = [], []
        for name in BRACKETED:
            block = encode(f"{name}.")
            assert len(block) == len(encode(name))
            assert block[-1:] == encode(").")
            parts = [table[[towers.END_OF_TEXT - 1]], given.context[:before], table[block], given.context[before:]]
            parts = torch.cat([*parts, table[[towers.END_OF_TEXT]]])
            ends.append(len(parts) - 1)
            rows.append(F.pad(parts, (0, 0, 0, 77 - len(parts))))
        x = torch.stack(rows) + original.positional_embedding
        x = original.ln_final(original.transformer(x, attn_mask=original.attn_mask))
        text = x[torch.arange(6), ends] @ original.text_projection
        assert given.end.tolist() == ends
        assert towers.relative(unit(given.encode()), unit(text)) <= 1e-5


class TestDepth:
    @pytest.mark.parametrize("depth", [1, 2, None])
    @pytest.mark.parametrize("name", towers.WITH_PROMPTS)
    def test_equals_the_library_with_tokens_put_in_before_its_blocks(self, name, depth):
        given = disturb(made(CoOp, name, context_length=3, depth=depth))
        original, features = towers.original(name), features_of(given).requires_grad_()
        deep = [] if depth == 1 else list(given.deep)
        assert len(deep) == (depth or 2) - 1
        text = prompted_text(original, prompt_tokens(given.backbone, 3), given.context, deep)
        expected = plain_logits(original, features, text)
        with torch.no_grad():
            assert towers.relative(given(features), expected) <= 1e-5
        same_gradients(given(features), expected, [features, *trained(given).values()])

    @pytest.mark.parametrize("depth", [2, 3, 5])
    def test_states_go_on_after_the_last_block_with_tokens_of_its_own(self, depth, monkeypatch):
        monkeypatch.setitem(towers.LAYOUTS, "deep_text", towers.clip(text={"layers": 5}))
        given = disturb(made(CoOp, "deep_text", context_length=2, depth=depth))
        original, features = towers.original("deep_text"), features_of(given)
        tokens = prompt_tokens(given.backbone, 2)
        expected = plain_logits(original, features, prompted_text(original, tokens, given.context, given.deep))
        same_gradients(given(features), expected, [given.context, *trained(given).values()])
        if depth < 5:  # tokens put in again after J would be another method
            again = prompted_text(original, tokens, given.context, [*given.deep, given.deep[-1]])
            assert towers.relative(plain_logits(original, features, again), expected) > 1e-3

    def test_nothing_means_nine_blocks_or_all(self, monkeypatch):
        monkeypatch.setitem(towers.LAYOUTS, "ten_blocks", towers.clip(text={"layers": 10}))
        assert made(CoOp, "ten_blocks", context_length=2, depth=None).deep.shape == (8, 2, 32)
        assert made(CoOp, context_length=2, depth=None).deep.shape == (1, 2, 32)

    @pytest.mark.parametrize("depth", [1, 2])
    def test_parts_within_a_memory_budget_give_the_same(self, depth):
        whole, parts = (disturb(made(CoOp, names=NAMES, context_length=3, depth=depth)) for _ in range(2))
        parts.backbone.text_memory = 200_000
        features = features_of(whole)
        for classifier in (whole, parts):
            classifier(features).square().sum().backward()
        assert whole.backbone.chunks == 1
        assert parts.backbone.chunks > 1
        assert towers.relative(parts(features), whole(features)) <= 1e-5
        for a, b in zip(trained(parts).values(), trained(whole).values(), strict=True):
            assert towers.relative(a.grad, b.grad) <= 1e-5


class TestOtherClasses:
    @pytest.mark.parametrize(("position", "depth"), [*((p, 1) for p in POSITIONS), ("end", 2)])
    def test_the_context_stays(self, position, depth):
        settings = {"context_length": 3, "position": position, "depth": depth}
        given, features = disturb(made(CoOp, **settings)), features_of(made(CoOp))
        with torch.no_grad():
            before, context = given(features), given.context.clone()
            given.set_class_names(NAMES)
            logits = given(features)
            assert logits.shape == (6, 10)
            assert torch.equal(given.context, context)
            assert given.task.class_names == NAMES
            fresh = disturb(made(CoOp, names=NAMES, **settings))
            assert torch.equal(fresh(features), logits)
            torch.testing.assert_close(logits[:, :4], before, rtol=1e-5, atol=1e-4)
            given.set_class_names(NAMES[:4])
            assert torch.equal(given(features), before)

    @pytest.mark.parametrize("position", POSITIONS)
    @pytest.mark.parametrize("bad", ["dog " * 80, "\x07"])
    def test_a_refused_name_leaves_everything_as_it_was(self, bad, position):
        given = disturb(made(CoOp, context_length=3, position=position))
        features, task = features_of(given), given.task
        with torch.no_grad():
            before = given(features)
        with pytest.raises(UserError):
            given.set_class_names(["a very long name", "cow", bad])
        assert given.task == task
        assert towers.relative(given(features), before) <= 1e-5
        with torch.no_grad():
            assert torch.equal(given(features), before)

    def test_a_class_specific_context_is_bound_to_its_classes(self):
        given = made(CoOp, context_length=2, class_specific=True)
        features, before = features_of(given), given.task
        for names in (NAMES, NAMES[3::-1], NAMES[4:8]):
            with pytest.raises(UserError) as error:
                given.set_class_names(names)
            assert str(error.value).startswith("CoOp cannot serve classes that it was not trained on (")
            assert "a class-specific context was learnt for each training class" in str(error.value)
            assert "\n" not in str(error.value)
            assert given.task == before
        given.set_class_names(NAMES[:4])
        assert given(features).shape == (6, 4)


class TestRefusals:
    @pytest.mark.parametrize(
        ("settings", "expected"),
        [
            ({"init_words": "a photo of a", "context_length": 5}, "4 tokens, but context_length is 5: give one of"),
            ({"init_words": "a photo of a", "context_length": 2}, "4 tokens, but context_length is 2: give one of"),
            ({"init_words": "hippopotamuses", "context_length": 1}, "tokens, but context_length is 1"),
            ({"context_length": 0}, "context_length is 0"),
            ({"context_length": -2}, "context_length is -2"),
            ({"init_words": "  "}, "no token"),
            ({"init_words": "\x07"}, "no token"),
            ({"depth": 0}, "depth is 0, and the text tower has 2 blocks: give 1 to 2"),
            ({"depth": -1}, "depth is -1"),
            ({"depth": 3}, "depth is 3, and the text tower has 2 blocks: give 1 to 2"),
            ({"depth": 2, "class_specific": True}, "depth 2 needs a shared context"),
            ({"depth": 2, "position": "middle"}, "depth 2 needs a shared context before the class name"),
            ({"depth": None, "position": "front"}, "depth 2 needs a shared context before the class name"),
        ],
    )
    def test_bad_settings(self, settings, expected):
        line = refusal(**settings)
        assert expected in line
        assert line.startswith("CoOp: ")

    def test_a_prompt_that_is_too_long_names_the_class_and_its_tokens(self):
        made(CoOp, names=("cat", "very small old car"), context_length=70)
        line = refusal(names=("cat", "very small old car"), context_length=71)
        assert "'very small old car' has 4 tokens" in line
        assert "takes 78" in line
        assert "reads 77" in line

    @pytest.mark.parametrize("position", POSITIONS)
    def test_a_prompt_may_take_all_77_positions(self, position):
        name = "dog " * 55 + "dog"  # with 56 tokens, the full stop, start, end and 18 of context
        given = disturb(made(CoOp, names=("cat", name), context_length=18, position=position))
        assert given.end.tolist() == [21, 76]
        with torch.no_grad():
            assert torch.isfinite(given(features_of(given))).all()
        line = refusal(names=("cat", name), context_length=19, position=position)
        assert "56 tokens" in line
        assert "19 of context" in line
        assert "takes 78" in line

    @pytest.mark.parametrize("name", EMPTIED)
    def test_a_class_name_that_the_tokenizer_empties(self, name):
        line = refusal(names=("cat", name), context_length=2)
        assert f"no token in the class name {name!r}" in line

    def test_image_only_backbones(self):
        line = refusal("vit")
        assert "CoOp needs a text tower" in line
