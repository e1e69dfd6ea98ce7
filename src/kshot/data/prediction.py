"""Images to label, with what a run remembers of its classes: the data set that it was trained on may be gone."""

import inspect
import os
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader

from kshot.backbones import Preprocessing
from kshot.data.archives import ARCHIVES
from kshot.data.catalogue import CATALOGUE, load_split
from kshot.data.hub_sets import PREFIX
from kshot.data.images import Decoding, FileImages, ImageSource, decoding_of, fault
from kshot.data.listing import tool_made
from kshot.data.loading import judged_keys, part_loader, share
from kshot.data.manifest import manifest_examples
from kshot.data.names import named
from kshot.data.parts import Batch, Part
from kshot.data.readers import image_files
from kshot.data.splits import Row, Split, display_name, listed
from kshot.errors import UserError
from kshot.files import may_be_read


class PredictionData(LightningDataModule):
    """Images without labels for Lightning, and how images are read.

    Args:
        class_names: words of the classes to choose from, in label order.
        templates: sentences with one ``{}`` each.
        split_seed, eval_batch_size, num_workers, image_size, fit, exif, background, white, skip_unreadable: as in
            :class:`~kshot.data.FewShotDataModule`.
        found_white: what ``white`` is where that is None; None when nobody knows.

    Attributes:
        images: files and folders for prediction, set before ``setup("predict")``.
        predict_paths: the files that these are, in index order.

    Raises:
        UserError: a number below its least, or a colour that is none.
    """

    def __init__(
        self,
        class_names: Sequence[str] = (),
        templates: Sequence[str] = (),
        *,
        split_seed: int = 1,
        eval_batch_size: int = 128,
        num_workers: int = 0,
        image_size: int | None = None,
        fit: Literal["crop", "pad", "squash"] | None = None,
        exif: bool | None = None,
        background: list[int] | None = None,
        white: float | None = None,
        skip_unreadable: bool = False,
        found_white: float | None = None,
    ) -> None:
        super().__init__()
        self.class_names, self.templates = list(class_names), list(templates)
        self.split_seed, self.eval_batch_size, self.num_workers = split_seed, eval_batch_size, num_workers
        self.image_size = image_size
        self.preprocessing = Preprocessing().fitted(fit)
        self.fit, self.exif, self.background, self.white = fit, exif, background, white
        self.found_white = found_white
        decoding_of(True, exif, background, white)  # refuses what is no colour
        self.skip_unreadable = skip_unreadable
        check_least(self, "eval_batch_size", "image_size", "num_workers")
        self.images: list[str] = []
        self.predict_paths: list[str] = []
        self._parts: dict[str, Part] = {}

    def use_preprocessing(self, preprocessing: Preprocessing) -> None:
        """Takes a backbone's; raises UserError for another size than was given, or when images are open by another."""
        size = preprocessing.size
        if self.image_size not in (None, size):
            raise UserError(f"data.image_size is {self.image_size}, the backbone takes {size}: set it on the backbone.")
        wanted = preprocessing.fitted(self.fit).pixels
        if self._parts and self._pixels() != wanted:
            raise UserError(f"images are open by {self._pixels()}, the backbone takes {wanted}: make new data.")
        self.image_size, self.preprocessing = size, wanted

    def setup(self, stage: str) -> None:
        """Lists the images to label; raises UserError when there are none, or one cannot be read."""
        if stage == "predict":
            files = image_files(self.images)
            wrong = None if self.skip_unreadable else next(filter(None, map(fault, files)), None)
            if wrong:
                raise UserError(wrong)
            self._parts[stage] = self._open(FileImages(), [Row(str(f), -1, "") for f in files], stage, None, lazy=True)
            self.predict_paths = self.part(stage).paths

    def part(self, part: str) -> Part:
        """Gives an open part, once it is known which of its images can be read; raises RuntimeError when it is closed.

        Raises UserError for an image that cannot be.
        """
        opened = self.opened(part)
        opened.settle()
        return opened

    def opened(self, part: str) -> Part:
        """Gives an open part as it is; raises RuntimeError when it is closed."""
        if part not in self._parts:
            stage = {"train": "fit", "val": "validate"}.get(part, part.split("/")[0])
            raise RuntimeError(f"the {part} part opens with setup({stage!r})")
        return self._parts[part]

    def predict_dataloader(self) -> DataLoader[Batch]:
        """Goes through ``predict_paths``; labels are -1."""
        return self._judged("predict")

    def _open(self, images: ImageSource, rows: Sequence[Row], part: str, source: Any, **settings: Any) -> Part:
        settings |= {"decoding": self._decoding(source), "skip_unreadable": self.skip_unreadable, "name": part}
        opened = Part(images, rows, self._pixels(), wait=True, **settings)
        if self.trainer is None:
            opened.settle()
        return opened

    def _pixels(self) -> Preprocessing:
        if self.image_size is None:
            raise UserError("image_size is not set: give --data.image_size, or set it before setup")
        return replace(self.preprocessing, size=self.image_size)

    def reading(self) -> tuple[Preprocessing, Decoding]:
        """How an image that belongs to no data set becomes what the backbone sees."""
        return self._pixels(), self._decoding(None)

    def _decoding(self, source: Any) -> Decoding:  # noqa: ARG002  of labelled images
        return decoding_of(True, self.exif, self.background, self.white or self.found_white)

    def _judged(self, part: str, persistent: bool = False) -> DataLoader[Batch]:
        opened = self.part(part)
        rank, devices = share(opened, self.trainer)
        keys = judged_keys(opened, range(rank, len(opened), devices), self.eval_batch_size, self.trainer)
        return self._loader(opened, self.eval_batch_size, keys, persistent=persistent)

    def _loader(self, part: Part, batch_size: int, keys: Any, **how: Any) -> DataLoader[Batch]:
        return part_loader(part, batch_size, keys, self.num_workers, self.split_seed, **how)


def check_least(data: Any, *names: str) -> None:
    """Raises UserError for a number of a data module that is below its least."""
    for name in names:
        value, least = getattr(data, name), 0 if name == "num_workers" else 1
        if value is not None and value < least:
            raise UserError(f"{name} must be at least {least}, not {value}")


def of_run(header: Mapping[str, Any], settings: Mapping[str, Any]) -> PredictionData | None:
    """The data of a run from its checkpoint's header, and settings of a FewShotDataModule that say how to read images.

    None for a checkpoint of the first formats, which do not tell the sentences.

    Raises:
        UserError: the settings name other classes or sentences.
    """
    names, templates = header.get("class_names"), header.get("model", {}).get("templates")
    if not names or not templates:
        return None
    given = settings.get("class_names") or names
    if isinstance(given, Mapping):
        base = settings.get("protocol") == "base-to-new"  # whose new classes have names, and no place in the checkpoint
        agree = base or set(said(given.values())) <= set(names)
    else:
        agree = said(given)[: len(names)] == names
    sentences = settings.get("template") or templates
    sentences = [sentences] if isinstance(sentences, str) else list(sentences)
    for option, same, there in (("class_names", agree, names), ("template", sentences == templates, templates)):
        if not same:
            raise UserError(f"data.{option} says other than the checkpoint, which was trained with {listed(there)}.")
    known = inspect.signature(PredictionData).parameters.keys() - {"class_names", "templates"}
    own = {name: value for name, value in settings.items() if name in known}
    return PredictionData(names, templates, found_white=white_in(header), **own)


def white_in(header: Mapping[str, Any]) -> float | None:
    """What was white in the deep images of a run, by its checkpoint's header; None where it does not tell."""
    return (header.get("split") or {}).get("white")


def said(names: Iterable[str]) -> list[str]:
    """Class names as a header has them."""
    return [display_name(unicodedata.normalize("NFC", name)) for name in names]


def told_changes(settings: Mapping[str, Any], names: Sequence[str], manifest: Path) -> list[str]:
    """A sentence where the classes of a user's data set are no longer those of a run; as :func:`changed_classes`."""
    changed = changed_classes(settings, names, manifest)
    said = f"{settings['dataset']} has changed since the run was trained: {changed}. Predicted are the classes of"
    return [f"{said} the run: {listed(names)}."] if changed else []


@may_be_read()
def changed_classes(settings: Mapping[str, Any], names: Sequence[str], manifest: Path) -> str:
    """What has become of the classes of a user's data set since a run was trained on it; empty where nothing has.

    No image is listed: of a folder only the names of the class folders are read, and of a list of images the list.
    Archives and data sets of the catalogue and the hub are taken to be what they were; one that is gone is no change.

    Args:
        settings: of the FewShotDataModule.
        names: the classes of the run.
        manifest: of the run's draw.
    """
    dataset, root, given = settings["dataset"], settings.get("root") or "data", settings.get("class_names")
    place = next((each for each in (Path(dataset), Path(root, dataset)) if each.exists()), None)
    if dataset in CATALOGUE or dataset.startswith(PREFIX) or place is None or place.name.lower().endswith(ARCHIVES):
        return ""
    try:
        if place.is_dir():
            examples = manifest_examples(manifest) if manifest.is_file() else {}
            before, now = class_folders(place, examples)
            if before != now:
                what = [f"{listed(sorted(before - now))} went"] * bool(before - now)
                return " and ".join(what + [f"{listed(sorted(now - before))} came"] * bool(now - before))
            split = Split(place.name, (), (), (), tuple(examples), place.name, "", {})
            found = said(named(split, given, place, codes=True).said) if before else list(names)
        else:
            found = said(load_split(dataset, root, given)[0].said)
    except UserError as error:
        return f"it cannot be read ({error})"
    return "" if found[: len(names)] == list(names) else f"its classes are {listed(found)}"


def class_folders(place: Path, examples: Mapping[str, str]) -> tuple[set[str], set[str]]:
    """Paths below a folder of the class folders that there were, and of those that are there, beside each other.

    ``examples`` are paths of images by class, which is the name of a folder on each; both sets are empty for others.
    """
    paths = {name: Path(path).parts for name, path in examples.items()}
    deepest = min(map(len, paths.values()), default=0)
    level = next((i for i in range(deepest) if all(parts[i] == name for name, parts in paths.items())), None)
    if level is None:
        return set(), set()
    around = {Path(*parts[:level]) for parts in paths.values()}
    there = [(above, each) for above in around if (place / above).is_dir() for each in os.scandir(place / above)]
    now = {(above / each.name).as_posix() for above, each in there if each.is_dir() and not tool_made(each.name)}
    return {Path(*parts[: level + 1]).as_posix() for parts in paths.values()}, now
