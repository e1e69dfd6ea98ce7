"""The output test of an export: what it answers beside what the run answers, on test images or on noise."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kshot.building import data_of
from kshot.data.digests import digest_of
from kshot.errors import UserError
from kshot.holding import merged
from kshot.opening import OpenRun

EXACT = 1e-4  # of logits over the largest of them: float32 through a deep tower stays below, a wrong weight does not
AT_ONCE = 32  # images; more than one batch, the last of another size, so that a batch size that is fixed shows
Answers = Callable[[Tensor], Tensor]  # logits, (B, classes), of images, (B, 3, H, W), floats in [0, 1]


class Probe(NamedTuple):
    """Images that an export is tried on.

    Attributes:
        images: (N, 3, H, W), uint8.
        label: (N,); None of noise.
        of: what they are, in words.
    """

    images: Tensor
    label: Tensor | None
    of: str


@dataclass(frozen=True)
class Checked:
    """What the output test found.

    Attributes:
        images: what it was made on.
        digest: of these images.
        logits: largest difference of logits.
        relative: the same over the largest logit of the run.
        probabilities: largest difference of calibrated probabilities.
        agreement: share of images that get the same label.
        accuracy: of the export; None on noise.
        accuracy_of_run: on the same images.
    """

    images: str
    digest: str
    logits: float
    relative: float
    probabilities: float
    agreement: float
    accuracy: float | None = None
    accuracy_of_run: float | None = None

    def plain(self) -> dict[str, Any]:
        """As plain data, without what is not known."""
        return {name: value for name, value in asdict(self).items() if value is not None}


def probe_of(run: OpenRun, count: int) -> Probe:
    """Test images of a run, spread over the whole part, where its data set is there; else noise of as many."""
    size = run.module.backbone.image_size
    try:
        data = data_of(run.settings)
        if list(data.class_names) != run.images.class_names:
            raise UserError("its classes are others now")
        data.use_preprocessing(run.module.backbone.preprocessing)
        data.setup("test")
        part = data.part(data.test_parts[0])
        if not len(part):
            raise UserError("it has no test images")
    except UserError as error:
        generator = torch.Generator().manual_seed(0)
        noise = torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8, generator=generator)
        reason = f"the test images of {run.settings['data']['init_args']['dataset']} cannot be had: {error}"
        return Probe(noise, None, f"{count} images of noise ({reason.rstrip('.')})")
    chosen = torch.linspace(0, len(part) - 1, min(count, len(part))).round().long()
    images = part.images([(int(position), 0) for position in chosen])
    return Probe(images, part.labels[chosen], f"{len(chosen)} test images of {data.dataset_name}")


@torch.inference_mode()
def answers_of(run: OpenRun, images: Tensor) -> Tensor:
    """The run's own logits, (N, classes), not calibrated, of images, (N, 3, H, W), as its test computes them."""
    with merged(run.module):
        return torch.cat([run.module(some).float() for some in images.split(AT_ONCE)])


@torch.inference_mode()
def compare(run: OpenRun, expected: Tensor, answers: Answers, probe: Probe) -> Checked:
    """Tries what was written on the images of a probe, of which the run answered ``expected``, (N, classes)."""
    found = torch.cat([answers(some.float() / 255) for some in probe.images.split(AT_ONCE)]).float()
    difference = float((found - expected).abs().max())
    probabilities = [run.module.calibration.logits(z).softmax(-1) for z in (found, expected)]
    labels = found.argmax(-1), expected.argmax(-1)
    accuracy = [None if probe.label is None else float((z == probe.label).double().mean()) for z in labels]
    return Checked(
        probe.of,
        digest_of(probe.images.numpy().tobytes()),
        difference,
        difference / max(float(expected.abs().max()), 1e-12),
        float((probabilities[0] - probabilities[1]).abs().max()),
        float((labels[0] == labels[1]).double().mean()),
        *accuracy,
    )
