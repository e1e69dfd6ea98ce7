"""A class more for a run that is open, without training."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from kshot.answering import Answers, Named, rgb_of
from kshot.building import data_of, method_of
from kshot.classifiers import ClassMeanText, NearestClassMean, Shots, Task
from kshot.classifiers.base import TextClassifier, closed_form, title_of
from kshot.data.images import CLIPS, Decoding
from kshot.data.parts import Part
from kshot.data.splits import Row
from kshot.errors import UserError
from kshot.features import place
from kshot.run import build


def add_class(answers: Answers, name: str, images: Sequence[Named]) -> str:
    """Lets an open run tell one class more apart; its files stay as they are.

    A head that compares with text takes the name alone, class means the mean of the images; another closed form, such
    as GDA and ridge regression, is fitted anew to the shots of the run and the images, for which the data set of the
    run must be there.

    Args:
        answers: of the run.
        name: of the class, as it stands in a sentence.
        images: of the class, with what they are called.

    Returns:
        what was done, in a sentence.

    Raises:
        UserError: the head cannot serve another class, there is such a class already, or an image cannot be read.
    """
    head, names = answers.module.classifier, answers.class_names
    if not name.strip() or name in names:
        raise UserError(
            f"The class to add is {name!r}, which " + ("the run has already." if name in names else "is none.")
        )
    with answers.lock:  # nobody computes meanwhile
        answers.open.close()
    try:
        done = added(answers, head, name, list(images))
    finally:
        answers.hold()
    stays = "the temperature and thresholds of abstaining stay those of the run's own classes."
    return f"The class {name!r} was added: {done}; {stays}"


def added(answers: Answers, head: Any, name: str, images: list[Named]) -> str:
    """Adds a class by what the head is; says how."""
    names = (*answers.class_names, name)
    if isinstance(head, TextClassifier) and not head.bound and not closed_form(head):
        head.set_class_names(names)
        return "it is compared with by its name alone, and no image of it is looked at"
    means = isinstance(head, (NearestClassMean, ClassMeanText))
    if not closed_form(head) or "val" in head.needs:
        raise UserError(
            f"{title_of(head)} cannot take a class more without training: heads that compare with text, class means, "
            "GDA and ridge regression can."
        )
    if not images:
        raise UserError(f"There is no image of the class {name!r} to add.")
    if means:
        append_mean(
            head, F.normalize(answers.features(images), dim=-1).mean(0), len(images), Task(names, head.task.templates)
        )
        return f"its mean is that of {len(images)} images"
    shots = refit(answers, names, images)
    return f"{title_of(head)} was fitted anew to {shots} shots of the run and {len(images)} images"


@torch.no_grad()
def append_mean(head: Any, mean: Tensor, count: int, task: Task) -> None:
    """Gives a head of class means a row more, (D,), the mean of unit-length features of ``count`` images."""
    before, head.task = head.task, task
    if isinstance(head, ClassMeanText):
        try:
            head.prepare_classes()
        except UserError:
            head.task = before
            raise
        head.counts = torch.cat([head.counts, head.counts.new_tensor([count])])
    else:
        mean = F.normalize(mean, dim=-1)
    head.means = torch.cat([head.means, mean.to(head.means)[None]])


def refit(answers: Answers, names: tuple[str, ...], images: list[Named]) -> int:
    """Fits a closed form anew to the shots of a run and to images of a class more; gives the number of the shots."""
    opened, old = answers.opened, answers.module
    tree = opened.settings
    manifest = opened.directory / "split.json"
    data_tree = {**tree["data"], "init_args": {**tree["data"]["init_args"]}}
    if manifest.is_file():
        data_tree["init_args"]["manifest"] = str(manifest)
    try:
        data = data_of({**tree, "data": data_tree})
        data.use_preprocessing(old.backbone.preprocessing)
        data.setup("fit")
        shots = data.part("train")
    except UserError as error:
        raise UserError(f"{title_of(old.classifier)} takes a class more by its own shots too, and {error}") from error
    views = data.train_views() or 1
    rows = [Row(str(i), len(names) - 1, names[-1]) for i in range(len(images))]
    _, decoding = answers.reading
    how: dict[str, Any] = {
        "decoding": decoding,
        "augment": data.augment,
        "views": data.train_views(),
        "seed": data.split_seed,
    }
    new = Part(Given(images), rows, shots.preprocessing, name="class to add", lazy=True, **how)
    features = torch.cat([encoded(answers, part, views) for part in (shots, new)], 1)
    opened.images.class_names = list(names)
    module = build(old.detach(), opened.images, old.run_seed, **method_of(tree))
    place(module, answers.trainer)
    module.calibration, module.mahalanobis = old.calibration, old.mahalanobis
    device = module.device
    label = torch.cat([shots.labels, new.labels])
    with answers.trainer.precision_plugin.forward_context():
        module.classifier.fit(Shots(features.to(device), label.to(device)), None)
    answers.module = module.eval()
    return len(shots)


def encoded(answers: Answers, part: Part, views: int) -> Tensor:
    """Features, (V, N, D) in float32 on the CPU, of the recorded views of the images of a part."""
    size = answers.opened.images.eval_batch_size
    index = list(range(len(part)))
    chunks = [index[i : i + size] for i in range(0, len(index), size)]
    return torch.stack(
        [
            torch.cat([answers.encoded(part.images([(i, view) for i in chunk])) for chunk in chunks])
            for view in range(views)
        ]
    )


class Given:
    """Images in whatever form, by number, as the source of a part."""

    def __init__(self, images: Sequence[Named]) -> None:
        self.images = images

    def open(self, path: str, draft: bool = False, decoding: Decoding = CLIPS) -> Image.Image:  # noqa: ARG002  no draft
        """Gives an image as 8-bit RGB; raises UnreadableImageError for one that cannot be read."""
        return rgb_of(*self.images[int(path)], decoding)

    def digests(self, paths: Sequence[str]) -> list[str]:
        """None is known."""
        return [""] * len(paths)

    def close(self) -> None:
        """Holds nothing that could be got again."""
