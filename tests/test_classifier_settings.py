"""What classifiers were built with: told in plain data for a checkpoint's header, and refused where it has no sense."""

import copy
import json
from functools import partial
from typing import Any

import pytest
import torch
import towers
from test_classifiers import SENTENCES, TASK, exported, made

from kshot.classifiers import (
    GDA,
    VPT,
    CLIPAdapter,
    CoOp,
    DePT,
    KgCoOp,
    LinearProbe,
    MaPLe,
    NearestClassMean,
    PromptSRC,
    TextPrompt,
)
from kshot.classifiers.base import settings_of
from kshot.errors import UserError
from kshot.places import arguments_of

# a value for each setting of any classifier that is not its default
OTHERS: dict[str, Any] = {
    **{
        "members": [GDA, NearestClassMean],
        "C": 0.5,
        "alpha": 2.0,
        "alpha_grad": "fresh",
        "alpha_range": 4.0,
        "average_mean": None,
        "average_std": 5.0,
    },
    **{"balance": 0.3, "base": partial(CoOp, context_length=3), "beta": 3.0, "beta_range": 5.0, "class_specific": True},
    **{"context_length": 3, "head": LinearProbe, "head_scale": 2.0, "head_start": "gda"},
    **{"image_weight": 1.0, "init_words": "a big drawing of"},
    **{"initial_alpha": 2.0, "initial_beta": 2.0, "iterations": 5, "logit_weight": 2.0, "momentum": 0.5},
    **{"position": "front", "prompt_length": 2, "rate_factor": 2.0, "ratio": [0.2, 0.3], "reduction": 2, "scale": 3.0},
    **{
        "select": False,
        "templates": SENTENCES,
        "text_ratio": 0.5,
        "first": 0.5,
        "neighbours": 5,
        "sharpness": 2.0,
        "strength": 0.5,
        "text": False,
        "text_weight": 3.0,
        "trainable": True,
        "weight": 2.0,
    },
}
GIVEN = frozenset({"backbone", "task"})


class TestSettings:
    @pytest.mark.parametrize(
        ("kind", "name"), [(kind, name) for kind in exported() for name in arguments_of(kind, GIVEN)[0]]
    )
    def test_changing_any_one_changes_what_is_told(self, kind, name):
        default = arguments_of(kind, GIVEN)[0][name].default
        value = not default if name == "normalize" else 1 + (default == 1) if name == "depth" else OTHERS[name]
        others = {"init_words": None} if name == "context_length" and kind is not MaPLe else {}
        backbone = towers.backbone()
        before, same = (settings_of(kind(backbone, TASK, **others)) for _ in range(2))
        told = settings_of(kind(backbone, TASK, **others, **{name: value}))
        assert before == same
        assert told != before
        assert json.loads(json.dumps(told)) == told
        if value is not None and not callable(value) and name != "members":
            assert told[name] == (list(value) if name == "templates" else value)

    def test_those_inside_are_told_with_their_class(self):
        backbone = towers.backbone()
        told = settings_of(DePT(backbone, TASK, base=partial(VPT, prompt_length=3, head=partial(CoOp, depth=2))))
        assert told == {
            **{"class": "DePT", "balance": 0.7, "rate_factor": 6.5},
            "inner": {
                **{"class": "VPT", "prompt_length": 3},
                "inner": {"class": "CoOp", "class_specific": False, "position": "end", "depth": 2},
            },
        }
        assert settings_of(VPT(backbone, TASK)) == settings_of(VPT(backbone, TASK, head=TextPrompt))

    def test_of_a_class_of_ones_own(self):
        class Bare(TextPrompt):
            pass

        class Own(LinearProbe):
            def __init__(self, backbone, task, width, kind=torch.float32, *, rate: float = 0.5, **others):
                super().__init__(backbone, task, **others)
                self.more = torch.nn.Parameter(torch.zeros(width))

        backbone = towers.backbone()
        with torch.inference_mode():
            own = Own(backbone, TASK, [1, 2], rate=0.1, normalize=False)
        told = {
            "class": "Own",
            "normalize": False,
            "head_start": "ridge",
            "width": [1, 2],
            "kind": "torch.float32",
            "rate": 0.1,
        }
        assert settings_of(own) == settings_of(copy.deepcopy(own)) == told
        assert settings_of(Bare(towers.backbone(), TASK, "imagenet7")) == {"class": "Bare", "templates": "imagenet7"}
        assert not any(p.is_inference() for p in own.parameters())

    @pytest.mark.parametrize(
        ("kind", "name", "value", "expected"),
        [
            (NearestClassMean, "scale", 0.0, "scale is 0.0, and must be above 0."),
            (NearestClassMean, "scale", float("nan"), "scale is nan, and must be above 0."),
            (KgCoOp, "weight", -8.0, "weight is -8.0, and must be at least 0."),
            (PromptSRC, "text_weight", -1.0, "text_weight is -1.0, and must be at least 0."),
            (PromptSRC, "image_weight", float("inf"), "image_weight is inf, and must be at least 0."),
            (PromptSRC, "logit_weight", float("nan"), "logit_weight is nan, and must be at least 0."),
            (CoOp, "position", "behind", "position is 'behind', and must be 'end', 'middle' or 'front'."),
        ],
    )
    def test_of_no_sense_are_refused(self, kind, name, value, expected):
        with pytest.raises(UserError) as error:
            made(kind, {name: value})
        assert str(error.value) == f"{kind.__name__}: {expected}"

    def test_a_list_that_changes_later(self):
        ratios = [0.1, 0.2]
        given = CLIPAdapter(towers.backbone(), TASK, ratios)
        ratios.append(0.3)
        assert settings_of(given)["ratio"] == [0.1, 0.2]
