"""Numbers of trained parameters on CLIP ViT-B/16, exactly those of the papers."""

from functools import partial

import pytest
from plain_prompts import trained

from kshot.backbones import OpenClip
from kshot.classifiers import VPT, CLIPAdapter, CoCoOp, CoOp, DePT, KgCoOp, MaPLe, PromptSRC, Task

COUNTS = {
    "CoOp": (CoOp, {}, 8_192),
    "CoOp, 4 tokens": (CoOp, {"init_words": "a photo of a"}, 2_048),
    "CoOp, class-specific": (CoOp, {"class_specific": True}, 3 * 8_192),
    "CoCoOp": (CoCoOp, {}, 35_360),
    "KgCoOp": (KgCoOp, {}, 2_048),
    "MaPLe": (MaPLe, {}, 3_555_072),
    "IVLP": (VPT, {"head": partial(CoOp, init_words="a photo of a", depth=9)}, 46_080),
    "VPT": (VPT, {}, 9 * 4 * 768),
    "PromptSRC": (PromptSRC, {}, 46_080),
    "PromptSRC, 3 blocks": (PromptSRC, {"depth": 3}, 15_360),
    "CLIPAdapter": (CLIPAdapter, {}, 131_072),
}


@pytest.fixture(scope="module")
def vit_b_16() -> OpenClip:
    return OpenClip("ViT-B-16-quickgelu", "random")


def count(backbone, kind, classes=3, **settings) -> int:
    classifier = kind(backbone, Task(tuple(f"thing {i}" for i in range(classes))), **settings)
    return sum(p.numel() for p in trained(classifier).values())


@pytest.mark.parametrize("method", COUNTS)
def test_published_count(vit_b_16, method):
    kind, settings, expected = COUNTS[method]
    assert count(vit_b_16, kind, **settings) == expected


@pytest.mark.parametrize(("classes", "expected"), [(50, 27_698), (500, 258_548)])
def test_what_dept_adds(vit_b_16, classes, expected):
    assert count(vit_b_16, DePT, classes) - count(vit_b_16, CoOp, classes) == expected
