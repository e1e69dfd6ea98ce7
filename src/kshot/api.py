"""kshot from Python, by the names that the command line has.

    import kshot
    run = kshot.fit("clip_16shot.yaml", data="photos/", shots=8)  # or kshot.load("runs/clip_16shot/001")
    run.predict(["a.jpg", image, array, tensor])

Nothing of the process is changed: random state, warnings, environment and log levels are given back.
"""

from __future__ import annotations

import io
import os
import threading
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn
from tqdm.auto import tqdm  # type: ignore[import-untyped]

from kshot.adding import add_class
from kshot.answering import Answers, Prediction, named
from kshot.commands import run as run_words
from kshot.config import find_config, words_of
from kshot.data.catalogue import CATALOGUE
from kshot.errors import UserError
from kshot.files import packaged_folder
from kshot.opening import CONFIG, open_run, parts_of_run, result_of
from kshot.record import result_table
from kshot.surroundings import leaving_no_trace
from kshot.writing import Predictions

Words = str | os.PathLike[str]
PATIENCE = 2.0  # seconds after which a progress bar shows


class Run:
    """A finished run, which its directory holds whole: it may have been trained on another machine.

    Threads may share one. It is opened when it is first asked something.

    Args:
        directory: of the run, or a folder of runs, of which the last finished one is taken, or a checkpoint.
        words: of a command line, that are laid over its config.

    Attributes:
        directory: of the run.

    Raises:
        UserError: it is no run.
    """

    def __init__(self, directory: Words, words: Sequence[str] = ()) -> None:
        self.directory, self.weights = parts_of_run(Path(directory))
        self.words, self.lock = tuple(words), threading.Lock()
        self.opened: Answers | None = None

    def __repr__(self) -> str:
        return f"kshot.load({str(self.directory)!r})"

    @property
    def answers(self) -> Answers:
        """The run, open and on its device.

        Raises:
            UserError: it does not open; see :func:`kshot.opening.open_run`.
        """
        with self.lock:
            if self.opened is None:
                with leaving_no_trace():
                    self.opened = Answers(open_run(self.weights, *self.words))
                for note in self.opened.notes:
                    warnings.warn(note, stacklevel=3)
            return self.opened

    @property
    def result(self) -> dict[str, Any]:
        """What its result.json tells; empty where it was not tested."""
        return result_of(self.directory)

    @property
    def class_names(self) -> tuple[str, ...]:
        """Of the classes that it tells apart, in label order."""
        return self.answers.class_names

    @property
    def model(self) -> nn.Module:
        """An ordinary module in evaluation mode: images, (B, 3, S, S), uint8 or in [0, 1], in, logits, (B, C), out.

        :meth:`pixels` makes such images. ``run.model.calibration.logits(...)`` are those of which the softmax gives
        the probabilities of :meth:`predict`. What evaluation needs again and again is computed once and held: it is
        for use, and :func:`fit` for training.
        """
        return self.answers.module

    def predict(
        self,
        images: Any,
        *,
        top_k: int = 5,
        abstain_error: float | None = None,
        abstain_by: str = "probability",
        workers: int | None = None,
        batch_size: int | None = None,
        progress: bool = True,
    ) -> Predictions:
        """Labels images, with calibrated probabilities; what cannot be read has an ``error`` instead.

        Args:
            images: one, or many: paths of files and folders, patterns such as ``photos/*.png``, bytes of files, images
                of Pillow, arrays, (H, W, 3), and tensors, (3, H, W), of uint8 or floats in [0, 1].
            top_k: labels an image, best first.
            abstain_error: mark what is too unsure for this rate of errors.
            abstain_by: what tells how sure an answer is: one of :data:`~kshot.calibration.SCORES`.
            workers: threads that read images; None takes one a core, at most 8.
            batch_size: images at once; None takes the run's ``data.eval_batch_size``.
            progress: show a bar, with images a second, where it takes longer than a moment.

        Raises:
            UserError: there is something that is no image, or no threshold for such a rate of errors.

        Examples:
            >>> import kshot, numpy as np
            >>> run = kshot.load("runs/clip_16shot/001")
            >>> noise = np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8)
            >>> found = run.predict([noise, "missing.jpg"], top_k=2)
            >>> found[0].label in run.class_names, len(found[0].probabilities)
            (True, 2)
            >>> found[1].error
            "no such image: 'missing.jpg'"
        """
        stream = self.stream(
            images,
            top_k=top_k,
            abstain_error=abstain_error,
            abstain_by=abstain_by,
            workers=workers,
            batch_size=batch_size,
        )
        total = len(images) if isinstance(images, (list, tuple)) else None
        return Predictions(tqdm(stream, total=total, unit=" images", disable=not progress, delay=PATIENCE, leave=False))

    def stream(
        self,
        images: Any,
        *,
        top_k: int = 5,
        abstain_error: float | None = None,
        abstain_by: str = "probability",
        workers: int | None = None,
        batch_size: int | None = None,
    ) -> Iterator[Prediction]:
        """The same as :meth:`predict`, one by one: of endless images too, of which a few batches are held at a time."""
        answers = self.answers
        abstain = answers.abstaining(abstain_by, abstain_error)
        return answers.predictions(named(images), top_k=top_k, abstain=abstain, workers=workers, batch_size=batch_size)

    def features(self, images: Any, *, workers: int | None = None) -> Tensor:
        """Image features, (N, D) in float32 on the CPU, as this run computes them; images as of :meth:`predict`.

        Raises:
            UserError: an image cannot be read.

        Examples:
            >>> import kshot, numpy as np
            >>> run = kshot.load("runs/clip_16shot/001")
            >>> run.features(np.zeros((2, 32, 32, 3), np.uint8)).shape
            torch.Size([2, 128])
        """
        return self.answers.features(named(images), workers)

    def pixels(self, images: Any) -> Tensor:
        """What :attr:`model` takes of images, (N, 3, S, S) in uint8 on the CPU; images as of :meth:`predict`.

        Raises:
            UserError: an image cannot be read.

        Examples:
            >>> import kshot, numpy as np
            >>> run = kshot.load("runs/clip_16shot/001")
            >>> run.model(run.pixels(np.zeros((48, 64, 3), np.uint8))).shape
            torch.Size([1, 10])
        """
        answers = self.answers
        none = torch.empty(0, 3, *[answers.module.backbone.image_size] * 2, dtype=torch.uint8)
        return torch.cat([none, *answers.views(named(images))])

    def add_class(self, name: str, images: Any) -> str:
        """Lets this object tell one class more apart, without training; the files of the run stay as they are.

        A head that compares with text takes the name alone, class means the mean of the images. GDA, ridge regression
        and other closed forms are fitted anew to the shots of the run and the images: its data set must be there.

        Args:
            name: of the class, as it stands in a sentence.
            images: of it, as of :meth:`predict`.

        Returns:
            what was done, in a sentence.

        Raises:
            UserError: the head cannot take another class, or has it already; or an image cannot be read.

        Examples:
            >>> import kshot, numpy as np
            >>> run = kshot.load("runs/clip_16shot/001")
            >>> run.add_class("black", np.zeros((2, 32, 32, 3), np.uint8)).partition(";")[0]
            "The class 'black' was added: its mean is that of 2 images"
            >>> run.predict(np.zeros((32, 32, 3), np.uint8))[0].label
            'black'
        """
        with leaving_no_trace():
            return add_class(self.answers, name, list(named(images)))

    def test(self, *, options: Mapping[str, Any] | None = None, **more: Any) -> dict[str, Any]:
        """Measures the run on the test images of its data set, or of another: ``run.test(data="other/")``.

        Args:
            options: as of :func:`fit`.
            more: as of :func:`fit`.

        Returns:
            what result.json of the new run directory tells: ``acc``, ``acc_class_mean``, ``ece``, ...
        """
        words = [*self.words, *words_of(options, more)]
        return result_of(ran("test", [self.directory / CONFIG], [f"--ckpt_path={self.weights}", *words]))

    def report(self) -> str:
        """The table with which the run ended.

        Raises:
            UserError: it was not tested.
        """
        result = self.result
        if not result:
            raise UserError(f"{self.directory} was not tested: run.test() measures it.")
        console = Console(file=io.StringIO(), width=100)
        console.print(result_table(result, self.directory))
        return str(console.file.getvalue())  # type: ignore[attr-defined]


def fit(
    config: Words | Sequence[Words],
    *,
    data: Words | None = None,
    shots: int | None = None,
    progress: bool = True,
    options: Mapping[str, Any] | None = None,
    **more: Any,
) -> Run:
    """Adapts a backbone from a few images a class, as ``python main.py fit`` does, into a run directory of its own.

    Fits of one process take turns, whatever threads they are in, since they draw from its random state.

    Args:
        config: a YAML file, or one that kshot brings, such as ``clip_16shot.yaml``; of several, later ones are laid
            over earlier ones: ``["clip_16shot.yaml", "methods/coop.yaml"]``. :func:`methods` lists methods.
        data: a folder, a table, an archive, or a name of :func:`datasets`: ``--data.dataset``.
        shots: images a class: ``--data.shots``.
        progress: show bars.
        options: others, by their names on the command line: ``{"model.adapter.rank": 4}``.
        more: the same with two underscores for a dot: ``model__adapter__rank=4``.

    Raises:
        UserError: a mistake in what is given, in one line.

    Examples:
        >>> import kshot
        >>> run = kshot.fit(["clip_16shot.yaml", "methods/class_mean.yaml"], data="digits", shots=2, progress=False)
        ... # doctest: +ELLIPSIS
        NearestClassMean on digits
        ...
        >>> run.result["method"], run.result["acc"] > 0.8
        ('NearestClassMean', True)
    """
    own = {"data.dataset": data, "data.shots": shots, "trainer.enable_progress_bar": None if progress else False}
    words = words_of({name: value for name, value in own.items() if value is not None}, {})
    configs = [config] if isinstance(config, (str, os.PathLike)) else list(config)
    return Run(ran("fit", configs, [*words, *words_of(options, more)]))


def load(run: Words, *, options: Mapping[str, Any] | None = None, **more: Any) -> Run:
    """Opens a run directory, of this machine or another; neither its data set nor its machine need be there.

    A fit that runs in another thread is waited for.

    Args:
        run: the directory of a run, or a folder of runs, of which the last finished one is taken, or a checkpoint.
        options: laid over its config, by their names on the command line, as where the weights of the backbone are
            now: ``{"model.backbone.weights": "vits14.safetensors"}``, or ``{"trainer.accelerator": "cpu"}``.
        more: the same with two underscores for a dot.

    Raises:
        UserError: it is no run, or of a later version, or the weights of its backbone are elsewhere.

    Examples:
        >>> import kshot
        >>> kshot.load("runs/clip_16shot/001").class_names[:3]
        ('zero', 'one', 'two')
    """
    opened = Run(run, words_of(options, more))
    assert opened.answers  # a mistake is told here
    return opened


def methods() -> dict[str, str]:
    """Configs of methods, to be laid over an experiment, and what each is.

    Examples:
        >>> import kshot
        >>> kshot.methods()["methods/gda.yaml"]  # doctest: +ELLIPSIS
        'GDA...'
    """
    folder = packaged_folder("configs") / "methods"
    files = sorted(folder.glob("*.yaml"))
    return {f"methods/{f.name}": f.read_text("utf-8").partition("\n")[0].lstrip("# ") for f in files}


def datasets() -> list[str]:
    """Names of data sets that kshot and what is plugged into it know.

    Examples:
        >>> import kshot
        >>> "digits" in kshot.datasets()
        True
    """
    return sorted(CATALOGUE)


def ran(command: str, configs: Sequence[Words], words: Sequence[str]) -> Path:
    """The directory of the run that a command line makes."""
    started = time.time()
    named_configs = [f"--config={find_config(os.fspath(config))}" for config in configs]
    with leaving_no_trace():
        cli = run_words([command, *named_configs, *words], started)
    if cli.directory is None:
        raise UserError("A run with trainer.fast_dev_run leaves no directory: leave it out.")
    return cli.directory
