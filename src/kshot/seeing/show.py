"""``python main.py show``: a run as a page of HTML and as single figures."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from kshot.building import data_of
from kshot.config import read_command_line
from kshot.data.checking import contact_sheet
from kshot.errors import UserError
from kshot.files import make_folder, may_be_read, write_atomically, write_text
from kshot.opening import CONFIG, OpenRun, open_run
from kshot.predictions import Answered, read
from kshot.seeing import figures
from kshot.seeing.card import card
from kshot.seeing.hub import PREFIX, located
from kshot.seeing.page import Seen, confusions, page
from kshot.seeing.pictures import Pictures, features_of, inlined, laid_out, overlaid
from kshot.seeing.rollout import rollout
from kshot.seeing.runs import result_of
from kshot.settings import OPTIONS, settings
from kshot.showing import Parser
from kshot.surroundings import settle_chatter, told_to_stderr


@told_to_stderr()
def run_show(words: Sequence[str]) -> int:
    """Writes ``index.html``, its figures as files, and a model card into a new folder; returns 0.

    Raises:
        UserError: words that there are not, no tested run, or a folder that is there already.
    """
    parser = Parser(
        prog="main.py show",
        description="A page about a run: confusions, errors, calibration, attention, features. Further options are "
        "laid over the run's config: --data.root where its images are now.",
    )
    parser.add_argument("run", help="a run directory, or hf://ORG/NAME")
    parser.add_argument("--out", type=Path, help="a new folder (default: RUN/show)")
    parser.add_argument("--test-set", help="by name, as result.json has them (default: the classes trained on)")
    parser.add_argument("--errors", type=int, default=24, help="of the most confident errors (default: 24)")
    parser.add_argument("--rollout", type=int, default=6, help="errors whose attention is shown (default: 6)")
    parser.add_argument("--images", type=Path, nargs="+", default=[], help="files whose attention is shown instead")
    parser.add_argument("--map", choices=("tsne", "pca", "none"), default="tsne", help="of features (default: tsne)")
    parser.add_argument("--map-images", type=int, default=500, help="evenly from the test set (default: 500)")
    given, options = parser.parse_known_args(list(words))
    settle_chatter()
    fetched, given.run = given.run.startswith(PREFIX), located(given.run)
    if fetched and given.out is None:
        raise UserError("show of a run on the hub needs --out: a new folder.")
    result, answered = result_of(given.run), read(given.run, given.test_set)
    out = given.out or given.run / "show"
    with new_folder(out) as folder, may_be_read():
        seen = Seen()
        seen.confusion, seen.said["confusion"] = figures.confusion(confusions(answered), answered.class_names)
        seen.reliability = figures.reliability((result.get("reliability") or {}).get(answered.name, []))
        draw(given, options, answered, seen, folder)
        for name in ("confusion", "reliability", "feature_map"):
            if getattr(seen, name):
                write_text(folder / f"{name}.svg", figures.file_of(getattr(seen, name)))
        write_text(folder / "card.md", card(result, answered))
        write_text(folder / "index.html", page(result, answered, seen))
    for note in seen.notes:
        print(note, file=sys.stderr)
    print(out / "index.html")
    return 0


@contextmanager
def new_folder(out: Path) -> Any:
    """Gives a folder beside ``out`` that takes its name at the end, and is gone if there is none.

    Raises:
        UserError: ``out`` is there already, or cannot be made.
    """
    if out.exists():
        raise UserError(f"{out} is there already, and stays as it is: give another --out, or delete it.")
    make_folder(out.parent)
    beside = out.with_name(f".{out.name}.partial")
    shutil.rmtree(beside, ignore_errors=True)
    make_folder(beside)
    try:
        yield beside
        beside.rename(out)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def draw(given: Any, options: Sequence[str], answered: Answered, seen: Seen, folder: Path) -> None:
    """Adds what needs the run's images or its model; what is not there is said in the notes."""
    wrong = np.flatnonzero(~answered.right)
    surest = wrong[np.argsort(-answered.probabilities[wrong, 0], kind="stable")][: max(given.errors, given.rollout, 0)]
    pictures, run = None, None
    try:
        run = open_run(given.run, *options)
    except UserError as error:
        seen.notes.append(f"Without attention and features: {error}")
    taken = None if run is None else run.module.backbone.preprocessing
    try:
        pictures = Pictures(data_of(tree_of(given.run, options)), answered, taken)
    except UserError as error:
        seen.notes.append(f"Without pictures of the test images: {error}")
    found = {} if pictures is None else {int(row): image for row in surest if (image := pictures.open(int(row)))}
    if pictures is not None and len(found) < len(surest):
        gone = f"{len(surest) - len(found)} of {len(surest)} images are gone or have changed since, and are not shown."
        seen.notes.append(gone)
    shown = [row for row in found if row in surest[: max(given.errors, 0)]]
    if shown:
        seen.errors = [
            (inlined(found[row]), tiny(found[row]), sentence(answered, row), answered.path[row]) for row in shown
        ]
        seen.said["errors"] = f"{len(shown)} of {len(wrong):,} errors."
        cells = [(sentence(answered, row, brief=True), found[row].copy) for row in shown]
        write_image(folder / "errors.png", contact_sheet(cells))
    if run is not None:
        attention(run, given, answered, pictures, found, seen, folder)
    if run is not None and pictures is not None and given.map != "none":
        lay_out(run, given, answered, pictures, seen)


def tree_of(run: Path, options: Sequence[str]) -> Any:
    """The settings of a run, with options laid over them."""
    return settings(read_command_line(["test", "--config", str(run / CONFIG), *options], list(OPTIONS)))[1]


def tiny(image: Image.Image) -> bool:
    """Whether an image is enlarged on a page."""
    return min(image.size) <= 64


def sentence(answered: Answered, row: int, brief: bool = False) -> str:
    """What an image is and was taken for."""
    names, sure = answered.class_names, f"{answered.probabilities[row, 0]:.0%}"
    label, guess = names[answered.label[row]], names[answered.guess[row]]
    return f"{label} as {guess}" if brief else f"{label}, taken for {guess} ({sure})"


def attention(
    run: OpenRun,
    given: Any,
    answered: Answered,
    pictures: Pictures | None,
    found: dict[int, Image.Image],
    seen: Seen,
    folder: Path,
) -> None:
    """Adds the attention rollout of the chosen files, or of the most confident errors."""
    if given.images:
        run.images.images = [str(file) for file in given.images]
        run.images.setup("predict")
        part = run.images.part("predict")
        inputs = part.images([(i, 0) for i in range(len(part))])
        logits = run.module.calibration.logits(run.module(inputs).detach())
        sure, guess = logits.softmax(-1).max(-1)
        names = [run.images.class_names[i] for i in guess.tolist()]
        named = [(f"{name} ({p:.0%})", path) for name, p, path in zip(names, sure.tolist(), part.paths, strict=True)]
    else:
        rows = list(found)[: max(given.rollout, 0)]
        if pictures is None or not rows:
            return
        inputs = torch.stack([pictures.seen(found[row]) for row in rows])
        named = [(sentence(answered, row), answered.path[row]) for row in rows]
    try:
        reach = rollout(run.module, inputs)
    except UserError as error:
        seen.notes.append(f"Without attention: {error}")
        return
    drawn = [overlaid(image, each) for image, each in zip(inputs, reach, strict=True)]
    seen.attention = [(inlined(each, 224), tiny(each), *words) for each, words in zip(drawn, named, strict=True)]
    seen.said["attention"] = (
        "Attention rollout (Abnar & Zuidema 2020): left what the model takes; right, the warmer a patch, the more of "
        "it reaches the features, from the least to the most of each image. It shows where information flows, not what "
        "decides."
    )
    write_image(folder / "attention.png", stacked(drawn))


def stacked(images: Sequence[Image.Image]) -> Image.Image:
    """Images of one size below each other."""
    width, height = images[0].size
    sheet = Image.new("RGB", (width, height * len(images)))
    for i, image in enumerate(images):
        sheet.paste(image, (0, i * height))
    return sheet


def lay_out(run: OpenRun, given: Any, answered: Answered, pictures: Pictures, seen: Seen) -> None:
    """Adds the feature map of some test images, evenly from the whole set."""
    images = len(answered.label)
    chosen = np.unique(np.linspace(0, images - 1, min(images, max(given.map_images, 0))).round().astype(int))
    kept, features = features_of(run.module, pictures, chosen.tolist())
    if len(kept) < 3:
        seen.notes.append(f"Without a feature map: {len(kept)} images are there, and it takes three.")
        return
    kind = given.map if len(kept) >= 10 else "pca"
    places, rows = laid_out(features, kind), np.array(kept)
    seen.feature_map = figures.feature_map(places, answered.label[rows], answered.right[rows], answered.class_names)
    how = {"tsne": "t-SNE", "pca": "the first two principal components"}[kind]
    seen.said["map"] = (
        f"{len(kept):,} of {images:,} test images by {how} of the image features; crosses are errors. Near ones are "
        "alike to the model; axes and distances between groups mean nothing."
    )


def write_image(path: Path, image: Image.Image) -> None:
    """Writes a PNG."""
    write_atomically(path, lambda file: image.save(file, format="PNG"))
