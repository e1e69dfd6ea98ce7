"""Files of MaPLe, PromptSRC and Tip-Adapter, as their code writes them, give the numbers that are in them."""

import pytest
import torch
import towers

from kshot.classifiers import CoOp, MaPLe, PromptSRC, TipAdapter, TipAdapterF
from kshot.errors import UserError
from kshot.foreign import released_tensors
from kshot.module import FewShotModule

NAMES = ["cat", "yellow bird", "old car"]


def module_of(classifier, **options) -> FewShotModule:
    return FewShotModule(towers.backbone(), lambda backbone, task: classifier(backbone, task, **options), NAMES)


def maple_state(depth: int = 2) -> dict:
    """MultiModalPromptLearner in the state of the whole model, some of whose other entries are here."""
    state = {"ctx": torch.randn(2, 32), "proj.weight": torch.randn(32, 32), "proj.bias": torch.randn(32)}
    for i in range(depth - 1):
        state |= {f"compound_prompts_text.{i}": torch.randn(2, 32)}
        state |= {f"compound_prompt_projections.{i}.weight": torch.randn(32, 32)}
        state |= {f"compound_prompt_projections.{i}.bias": torch.randn(32)}
    state |= {"token_prefix": torch.randn(3, 1, 32), "token_suffix": torch.randn(3, 74, 32)}
    others = {"image_encoder.conv1.weight": torch.randn(4), "logit_scale": torch.ones([])}
    return {f"prompt_learner.{name}": value for name, value in state.items()} | others


def promptsrc_state(depth: int = 2) -> dict:
    """VLPromptLearner in the state of the whole model: prompts of later blocks lie in these."""
    state = {"prompt_learner.ctx": torch.randn(4, 32), "image_encoder.VPT": torch.randn(4, 32)}
    for tower in ("image", "text"):
        state |= {f"{tower}_encoder.transformer.resblocks.{i}.VPT_shallow": torch.randn(4, 32) for i in range(1, depth)}
    return state | {"prompt_learner.token_prefix": torch.randn(3, 1, 32), "text_encoder.ln_final.bias": torch.randn(32)}


def written(folder, name: str, contents):
    torch.save(contents, folder / name)
    return folder / name


def test_maple(tmp_path):
    state, module = maple_state(), module_of(MaPLe, depth=2)
    tensors, _ = released_tensors(written(tmp_path, "model.pth.tar-5", {"state_dict": state}), module)
    module.load_state_dict(tensors, strict=False)
    assert tensors.keys() == module.tuned_state().keys()
    first, second = module.classifier.image_tokens()
    own = {name.removeprefix("prompt_learner."): value for name, value in state.items()}
    torch.testing.assert_close(first, own["ctx"] @ own["proj.weight"].T + own["proj.bias"])
    deep = own["compound_prompts_text.0"]
    weight, bias = (own[f"compound_prompt_projections.0.{kind}"] for kind in ("weight", "bias"))
    torch.testing.assert_close(second, deep @ weight.T + bias)
    assert torch.equal(module.classifier.deep[0], deep)


def test_promptsrc(tmp_path):
    state, module = promptsrc_state(), module_of(PromptSRC, depth=2)
    tensors, _ = released_tensors(written(tmp_path, "model.pth.tar-50", {"state_dict": state}), module)
    assert tensors.keys() == module.tuned_state().keys()
    module.load_state_dict(tensors, strict=False)
    classifier = module.classifier
    assert torch.equal(classifier.image_prompts[0], state["image_encoder.VPT"])
    assert torch.equal(classifier.image_prompts[1], state["image_encoder.transformer.resblocks.1.VPT_shallow"])
    assert torch.equal(classifier.deep[0], state["text_encoder.transformer.resblocks.1.VPT_shallow"])
    assert torch.equal(classifier.context, state["prompt_learner.ctx"])


@pytest.mark.parametrize("classifier", [TipAdapter, TipAdapterF])
def test_tip_adapter(classifier, tmp_path):
    keys, label = torch.nn.functional.normalize(torch.randn(6, 24), dim=-1), torch.tensor([0, 0, 1, 1, 2, 2])
    values = torch.nn.functional.one_hot(label).half()
    written(tmp_path, "values_2shots.pt", values)
    trained = classifier is TipAdapterF
    file = written(tmp_path, "best_F_2shots.pt" if trained else "keys_2shots.pt", keys if trained else keys.T)
    module = module_of(classifier, alpha=2.0, beta=3.0)
    tensors, _ = released_tensors(file, module)
    assert tensors.keys() == module.tuned_state().keys()
    for name in ("keys", "values"):
        getattr(module.classifier, name).data = tensors[f"classifier.{name}"]
    image = towers.images(module.backbone)
    with torch.no_grad():
        features = module.encode_image(image)
        f = torch.nn.functional.normalize(features, dim=-1)
        cache = (-(3.0 - 3.0 * f @ keys.T)).exp() @ values.float()  # as the released code has it
        plain = module_of(classifier, alpha=0.0, beta=3.0)(image)
        torch.testing.assert_close(module(image), plain + 2.0 * cache)


REFUSED = {
    "kind": (
        lambda folder: written(folder, "m.pt", maple_state()),
        CoOp,
        {},
        "of MaPLe, and .* is CoOp: .*recipes/maple",
    ),
    "depth": (
        lambda folder: written(folder, "m.pt", maple_state()),
        MaPLe,
        {"depth": 1},
        "deep is .* the config's none",
    ),
    "length": (
        lambda folder: written(folder, "m.pt", promptsrc_state()),
        PromptSRC,
        {"prompt_length": 2, "depth": 2},
        r"image_prompts is \(2, 4, 32\), and the config's \(2, 2, 32\): set its",
    ),
    "alpha": (
        lambda folder: (
            written(folder, "values_2shots.pt", torch.eye(3)) and written(folder, "keys_2shots.pt", torch.eye(3))
        ),
        TipAdapter,
        {},
        r"alpha and beta are not in such a file: give --model\.classifier\.alpha",
    ),
    "values": (
        lambda folder: written(folder, "keys_2shots.pt", torch.eye(3)),
        TipAdapter,
        {},
        "no file .*values_2shots",
    ),
    "name": (
        lambda folder: written(folder, "cache.pt", torch.eye(3)),
        TipAdapter,
        {},
        "a tensor alone: Tip-Adapter's files",
    ),
    "classes": (
        lambda folder: (
            written(folder, "values_2shots.pt", torch.eye(4)) and written(folder, "keys_2shots.pt", torch.eye(24))
        ),
        TipAdapter,
        {"alpha": 1.0, "beta": 1.0},
        r"values are \(4, 4\), and the config has 3 classes",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_files_that_do_not_fit_are_refused(case, tmp_path):
    make, classifier, options, message = REFUSED[case]
    with pytest.raises(UserError, match=message):
        released_tensors(make(tmp_path), module_of(classifier, **options))
