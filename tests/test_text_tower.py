"""The packed text tower against open_clip's own full-length computation: outputs, gradients, groups, refusals."""

import pytest
import torch
import towers
from torch import nn
from towers import WITH_PROMPTS, WITH_TEXT

from kshot.adapters import LoRA
from kshot.backbones import OpenClip
from kshot.classifiers import CoOp, Task, TextPrompt
from kshot.errors import UserError

LONG = " ".join(["photo"] * 70)
PROMPTS = {
    "equal lengths": ["a photo of a cat.", "a photo of a dog.", "a photo of a bat."],
    "different lengths": [
        "a photo of a cat.",
        "a photo of a very small yellow bird, a kind of animal.",
        "a photo of a x",
    ],
    "one prompt": ["a photo of a cat."],
    "all alike": ["a photo of a cat.", "a photo of a cat."],
    "one continues another": ["a photo of a", "a photo of a cat", "a photo of a cat in the rain"],
    "long shared prefix": [f"{LONG} {name}" for name in ("cat", "dog", "yellow bird", "x")],
    "nothing but the start token shared": ["cat", "a dog", "two birds in a tree"],
    "empty": ["", "cat"],
    "full length": [" ".join(["photo"] * 75), " ".join(["photo"] * 74 + ["cat"]), "cat"],
}
CAUSAL_LAYOUTS = pytest.mark.parametrize("name", WITH_PROMPTS)


def folded(name, backbone):
    """The library's own model with the adapters of a backbone folded into its weights."""
    original = towers.original(name)
    ours, theirs = getattr(backbone.clip, "text", backbone.clip), getattr(original, "text", original)
    with torch.no_grad():
        for mine, block in zip(ours.transformer.resblocks, theirs.transformer.resblocks, strict=True):
            block.attn.in_proj_weight.copy_(mine.attn.qkv.effective_weight())
            block.attn.out_proj.weight.copy_(mine.attn.o.effective_weight())
            block.mlp.c_fc.weight.copy_(mine.mlp.c_fc.effective_weight())
            block.mlp.c_proj.weight.copy_(mine.mlp.c_proj.effective_weight())
    return original.requires_grad_(False)


def with_text_adapters(name):
    backbone = towers.backbone(name)
    LoRA(rank=2).attach(backbone, ["text.*"])
    with torch.no_grad():
        for parameter in backbone.trainable("text"):
            parameter.add_(0.1 * torch.randn_like(parameter))
    return backbone


def straightforward(original, prefix, suffix, end):
    """Every prompt by itself at the model's full length, padded, through the library's blocks and causal mask."""
    text = getattr(original, "text", original)
    groups, classes = suffix.shape[:2]
    x = torch.cat([prefix[:, None].expand(-1, classes, -1, -1), suffix], 2).flatten(0, 1)
    x = nn.functional.pad(x, (0, 0, 0, 77 - x.shape[1])) + text.positional_embedding
    x = text.ln_final(text.transformer(x, attn_mask=text.attn_mask))
    x = x.unflatten(0, (groups, classes))[:, torch.arange(classes), end]
    if text.text_projection is None:
        return x
    return text.text_projection(x) if isinstance(text.text_projection, nn.Linear) else x @ text.text_projection


@CAUSAL_LAYOUTS
def test_tokens_equal_the_full_length_computation(name):
    backbone, original = towers.backbone(name), towers.original(name)
    for prompts, texts in PROMPTS.items():
        tokens = backbone.tokenize(texts)
        with torch.no_grad():
            expected = original.encode_text(tokens)
            assert towers.relative(backbone.eval().encode_tokens(tokens), expected) <= 1e-5, prompts
        assert towers.relative(backbone.train().encode_tokens(tokens), expected) <= 1e-5, prompts


@pytest.mark.parametrize("name", ["clip", "clip_custom_all", "custom_text_eos"])
def test_the_same_with_text_adapters(name):
    backbone = with_text_adapters(name)
    original, untouched = folded(name, backbone), towers.original(name)
    for prompts, texts in PROMPTS.items():
        tokens = backbone.tokenize(texts)
        with torch.no_grad():
            expected = original.encode_text(tokens)
            assert towers.relative(expected, untouched.encode_text(tokens)) > 1e-2, prompts
            assert towers.relative(backbone.encode_tokens(tokens), expected) <= 1e-5, prompts
        assert towers.relative(backbone.encode_tokens(tokens), expected) <= 1e-5, prompts


@pytest.mark.parametrize("name", ["not_causal", "class_token", "siglip"])
def test_adapters_reach_text_towers_without_prompts(name):
    backbone = with_text_adapters(name)
    tokens = towers.texts(backbone)
    with torch.no_grad():
        expected = folded(name, backbone).encode_text(tokens)
        assert towers.relative(backbone.encode_tokens(tokens), expected) <= 1e-5
    assert towers.relative(backbone.encode_tokens(tokens), expected) <= 1e-5


def test_tokens_of_prompts_in_any_order():
    backbone = towers.backbone()
    tokens = backbone.tokenize(PROMPTS["different lengths"])
    order = torch.tensor([2, 0, 1])
    assert towers.relative(backbone.encode_tokens(tokens[order]), backbone.encode_tokens(tokens)[order]) <= 1e-6


@pytest.mark.parametrize("name", ["clip", "eos", "custom_text_eos"])
def test_the_end_is_where_the_library_pools(name):
    backbone = towers.backbone(name)
    for prompts, texts in PROMPTS.items():
        tokens = backbone.tokenize(texts)
        expected = [row.index(towers.END_OF_TEXT) for row in tokens.tolist()]
        assert backbone.end_of_text(tokens).tolist() == expected, prompts
        assert [len(backbone.token_ids(t)) + 1 for t in texts] == expected, prompts


SHAPES = {  # groups, prefix, classes, suffix
    "one group": (1, 5, 3, 6),
    "groups": (2, 4, 3, 5),
    "start token alone": (2, 1, 2, 9),
    "one class": (3, 6, 1, 4),
    "one suffix token": (2, 7, 3, 1),
    "full length": (1, 17, 2, 60),
}


@pytest.mark.parametrize("adapted", [False, True], ids=["frozen", "adapted"])
@pytest.mark.parametrize("name", ["clip", "clip_custom_all", "custom_text"])
def test_gradients_equal_the_straightforward_form(name, adapted):
    backbone = with_text_adapters(name) if adapted else towers.backbone(name)
    original = folded(name, backbone)
    for shape, (groups, p, classes, s) in SHAPES.items():
        prefix = torch.randn(groups, p, backbone.text_width, requires_grad=True)
        suffix = torch.randn(groups, classes, s, backbone.text_width, requires_grad=True)
        end = p + torch.arange(classes) % s
        given = backbone.encode_embeddings(prefix, suffix, end)
        expected = straightforward(original, prefix, suffix, end)
        assert given.shape == (groups, classes, backbone.feature_dim), shape
        assert towers.relative(given, expected) <= 1e-5, shape
        upstream = torch.randn_like(expected)
        ours = torch.autograd.grad((given * upstream).sum(), [prefix, suffix])
        theirs = torch.autograd.grad((expected * upstream).sum(), [prefix, suffix])
        for a, b in zip(ours, theirs, strict=True):
            assert towers.relative(a, b) <= 1e-5, shape
        for c, last in enumerate(end.tolist()):  # what stands behind the end has no say
            assert ours[1][:, c, last - p + 1 :].abs().sum() == 0, shape
            assert ours[1][:, c, last - p].abs().min() > 0, shape


def test_adapter_gradients_equal_the_full_length_computation():
    backbone = with_text_adapters("clip")
    tokens = backbone.tokenize(PROMPTS["different lengths"])
    parameters = backbone.trainable("text")
    upstream = torch.randn(3, backbone.feature_dim)
    ours = torch.autograd.grad((backbone.encode_tokens(tokens) * upstream).sum(), parameters)
    theirs = torch.autograd.grad((backbone.clip.encode_text(tokens) * upstream).sum(), parameters)
    assert len(parameters) == 2 * 2 * 6
    for a, b in zip(ours, theirs, strict=True):
        assert towers.relative(a, b) <= 1e-5


@CAUSAL_LAYOUTS
def test_two_groups_equal_two_calls(name):
    backbone = towers.backbone(name)
    prefix, suffix = torch.randn(2, 4, backbone.text_width), torch.randn(2, 3, 5, backbone.text_width)
    end = torch.tensor([4, 8, 6])
    together = backbone.encode_embeddings(prefix, suffix, end)
    for g in range(2):
        alone = backbone.encode_embeddings(prefix[g : g + 1], suffix[g : g + 1], end)
        assert towers.relative(together[g : g + 1], alone) <= 1e-5
    assert towers.relative(together[0], together[1]) > 1e-2


@pytest.mark.parametrize("name", ["clip", "clip_custom_all"])
def test_bfloat16_autocast_is_as_close_as_the_library(name):
    backbone, original = towers.backbone(name), towers.original(name)
    tokens = backbone.tokenize(PROMPTS["different lengths"])
    with torch.no_grad():
        exact = original.encode_text(tokens)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            theirs = towers.relative(original.encode_text(tokens), exact)
            assert towers.relative(backbone.encode_tokens(tokens), exact) <= max(2 * theirs, 0.02)


@pytest.mark.parametrize("name", WITH_TEXT)
def test_towers_without_prompts_refuse_coop(name):
    backbone = towers.backbone(name)
    task = Task(("cat", "dog"))
    if towers.LAYOUTS[name].prompts:
        assert backbone.supports_prompts
        assert CoOp(backbone, task, context_length=2)(torch.randn(1, backbone.feature_dim)).shape == (1, 2)
        return
    assert backbone.supports_prompts is False
    with pytest.raises(UserError) as error:
        CoOp(backbone, task)
    message = str(error.value)
    assert "\n" not in message
    assert "CoOp" in message
    assert backbone.name in message


def test_a_prompt_that_is_too_long_is_named_with_its_count():
    backbone = towers.backbone()
    text = " ".join(["photo"] * 76)
    backbone.tokenize([" ".join(["photo"] * 75)])
    with pytest.raises(UserError) as error:
        backbone.tokenize(["a cat", text])
    message = str(error.value)
    assert "\n" not in message
    assert text in message
    assert "78 tokens" in message
    assert "77" in message
    with pytest.raises(UserError, match="takes 78"):
        CoOp(backbone, Task(("cat", "dog")), context_length=74)
    CoOp(backbone, Task(("cat", "dog")), context_length=73)


def sentences(backbone) -> list[str]:
    """Of different lengths, the longest one that fits among them."""
    tokenizer = backbone.tokenizer
    added = 2 if hasattr(tokenizer, "encode") else tokenizer.tokenizer.num_special_tokens_to_add()
    most = (backbone.context_length - added) // len(backbone.token_ids("photo"))
    return ["cat", "a photo of a cat.", "a photo of a small yellow bird in the rain", " ".join(["photo"] * most)]


FAMILIES = [
    *towers.families(),
    *(pytest.param(name, marks=pytest.mark.network) for name in towers.PUBLISHED if name.endswith("@hub")),
]


class TestPublishedFamilies:
    """Each kind of text tower that open_clip publishes, with its own tokenizer, context, mask and pooling.

    Tokenizers that lie on a hub are stood in for by one of words with the same special tokens, but for a run with a
    network.
    """

    @pytest.fixture(params=FAMILIES)
    def family(self, request, monkeypatch):
        if towers.PUBLISHED[request.param].config["text_cfg"].get("hf_tokenizer_name"):
            pytest.importorskip("transformers")
        if request.param.endswith("@hub"):
            monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        backbone = towers.backbone(request.param)
        backbone.family = request.param
        return backbone

    def test_text_features_are_the_librarys(self, family):
        import open_clip

        texts, original = sentences(family), towers.original(family.family)
        tokens = family.tokenize(texts)
        assert torch.equal(tokens, open_clip.get_tokenizer(f"local-dir:{towers.folder_of(family.family)}")(texts))
        assert tokens.shape == (4, family.context_length)
        with torch.no_grad():
            expected = original.encode_text(tokens)
            assert towers.relative(family.encode_tokens(tokens), expected) <= 1e-5
            for i in range(len(texts)):
                assert towers.relative(family.encode_tokens(tokens[i : i + 1]), expected[i : i + 1]) <= 1e-5

    def test_one_word_more_does_not_fit(self, family):
        text = sentences(family)[-1]
        with pytest.raises(UserError, match=rf"takes \d+ tokens, and .* reads {family.context_length}:"):
            family.tokenize([f"{text} photo"])

    def test_a_phrase_as_context_is_the_template_or_prompts_are_refused(self, family):
        task = Task(("cat", "dog", "small yellow bird"))
        features = torch.randn(3, family.feature_dim)
        template = TextPrompt(family, task)
        original = towers.original(family.family)
        with torch.no_grad():
            text = original.encode_text(family.tokenize([f"a photo of a {name}." for name in task.class_names]))
            cosine = nn.functional.normalize(features, dim=-1) @ nn.functional.normalize(text, dim=-1).T
            assert towers.relative(template(features), family.logit_scale * cosine) <= 1e-5
        if towers.PUBLISHED[family.family].prompts:
            phrase = CoOp(family, task, init_words="a photo of a")
            assert towers.relative(phrase(features), template(features)) <= 1e-5
            return
        assert not family.supports_prompts
        with pytest.raises(UserError) as error:
            CoOp(family, task)
        assert "\n" not in str(error.value)
        assert "CoOp" in str(error.value)


def test_a_tokenizer_without_a_start_token():
    pytest.importorskip("transformers")
    text = {"hf_tokenizer_name": "google/mt5-base", "pool_type": "eos", "eos_id": 1}  # of ViT-L-14-worldwide
    towers.PUBLISHED["no_start"] = towers.clip(text=text)
    backbone, original = towers.backbone("no_start"), towers.original("no_start")
    tokens = backbone.tokenize(["cat", "a photo of a small yellow bird", "a photo"])
    with torch.no_grad():
        assert towers.relative(backbone.encode_tokens(tokens), original.encode_text(tokens)) <= 1e-5
    with pytest.raises(UserError) as error:
        CoOp(backbone, Task(("cat", "dog")), context_length=2)
    assert "\n" not in str(error.value)
    assert "CoOp" in str(error.value)


def test_a_tokenizer_that_is_out_of_reach(tmp_path):
    pytest.importorskip("transformers")
    model = next(name for name, kind in towers.families().items() if kind == "bert")
    for file in towers.folder_of(model).iterdir():
        if "token" not in file.name:
            (tmp_path / file.name).write_bytes(file.read_bytes())
    with pytest.raises(UserError) as error:
        OpenClip(str(tmp_path))
    assert "\n" not in str(error.value)
    assert "tokenizer" in str(error.value)
