"""What the command line does once Lightning is loaded: build, run, and write down the result."""

from __future__ import annotations

import copy
import json
import shlex
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path

import yaml  # type: ignore[import-untyped]
from lightning.pytorch import seed_everything
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.trainer import Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from kshot import __version__, predictions, record
from kshot.auto import choose
from kshot.backbones import Backbone
from kshot.building import backbone_of, data_of, kind_of, method_of, options_of, trainer_settings
from kshot.calibration import stored_calibration
from kshot.callbacks import Progress, ResumeFile
from kshot.checkpoint import HEADER, AtomicCheckpoints, packed, write_tensors
from kshot.choice import Choice, kept
from kshot.config import CommandLine, Tree, read_command_line
from kshot.data.prediction import white_in
from kshot.data.splits import TEST_SHARE
from kshot.errors import UserError, first_line
from kshot.evaluate import Tested
from kshot.features import FeatureStore
from kshot.files import make_folder, write_text
from kshot.folds import fold_settings, twin_of
from kshot.forecast import look_ahead, look_around
from kshot.foreign import import_released
from kshot.header import header_of
from kshot.layering import BUILDER, listed, written_out
from kshot.module import FewShotModule
from kshot.optim import watches
from kshot.prepare import check_classes
from kshot.run import DEFAULTS, evaluate, finish, fit, has_length, set_length
from kshot.searching import search
from kshot.settings import LINKED, OPTIONS, help_text, settings
from kshot.surroundings import RESUME_FROM, mistake_behind, settle_chatter, told_to_stderr, with_resume
from kshot.warm import Warm

DUMPER = getattr(yaml, "CSafeDumper", yaml.SafeDumper)  # libyaml's, where PyYAML was built with it
TRAINER_DEFAULTS = DEFAULTS | {
    "logger": False,
    "enable_model_summary": False,
    "check_val_every_n_epoch": 0,  # 0: in training only where something is decided by it
}


@told_to_stderr()
def run(arguments: Sequence[str], started: float | None = None, warm: Warm | None = None) -> FewShotCLI:
    """Runs the words after ``python main.py``, in a process that began ``started``, and returns what it built.

    Args:
        arguments: the words.
        started: a time of ``time.time()``; None for now.
        warm: what runs of this process share; the run's model is of no more use afterwards.

    Raises:
        UserError: a mistake in the command line, a config or what they name.
        SystemExit: after --help and --print_config.
    """
    started = time.time() if started is None else started
    with nullcontext() if warm is None else warm.lending():
        settle_chatter()
        line = read_command_line(with_resume(arguments), list(OPTIONS))
        if line.help_for or "help" in line.flags:
            print(help_text(line))
            raise SystemExit(0)
        (places, tree), choice = settings(line), None
        if tree.get("search") is not None and "print_config" not in line.flags:
            line, choice = search(line, places, tree)
            places, tree = settings(line)
        elif tree.get("budget") is not None and "print_config" not in line.flags:
            line, choice = choose(line, tree)
            places, tree = settings(line)
        tree["trainer"] = TRAINER_DEFAULTS | tree["trainer"]
        cli = FewShotCLI(line, written_out(places, tree), started, choice, warm)
        try:
            getattr(cli, f"run_{line.command}")()
        except BaseException as error:
            ended = mistake_behind(error) or error
            cli.tell_how_to_resume(ended)
            if ended is error:
                raise
            raise ended from error
        finally:
            cli.lock.close()
        return cli


class FewShotCLI:
    """Builds data, model and trainer of a command line's settings, and runs its command.

    Args:
        line: the command line.
        tree: its settings, with all defaults written out.
        started: when its process began, or the command.
        choice: how its method was chosen, where it was.
        warm: where its backbone is from, if runs share some.

    Raises:
        UserError: what the parts of a run refuse.
        SystemExit: after --print_config.
    """

    def __init__(
        self, line: CommandLine, tree: Tree, started: float, choice: Choice | None = None, warm: Warm | None = None
    ) -> None:
        self.line, self.config, self.choice, self.warm = line, tree, choice, warm
        self.directory: Path | None = None
        self.lock = ExitStack()  # of the directory
        self.files = AtomicCheckpoints()
        if tree["seed_everything"] is not False:
            chosen = tree["seed_everything"]
            tree["seed_everything"] = seed_everything(None if chosen is True else chosen, workers=True)
        if "print_config" in line.flags:
            print(text_of(tree), end="")
            raise SystemExit(0)
        tree["run"]["name"] = tree["run"]["name"] or line.name  # so that the saved file adds to the same folder
        self.config_text = text_of(tree)
        self.options = options_of(tree)
        self.datamodule = data_of(tree)
        self.model = self.make_model(backbone_of(tree) if warm is None else warm.backbone(tree))
        self.datamodule.use_preprocessing(self.model.backbone.preprocessing)
        self.given = trainer_settings(tree["trainer"])
        self.trainer = self.make_trainer()
        self.seconds = {"start": time.time() - started}

    def make_model(self, backbone: Backbone) -> FewShotModule:
        """The model on a backbone, for the classes of the data, with the settings that its checkpoints tell."""
        known = {name: getattr(self.datamodule, name) for name in LINKED}
        model = kind_of(self.config)(backbone=backbone, **known, **method_of(self.config))
        spec = self.config["model"]
        own = {"_class_path": spec["class_path"], **spec["init_args"], **spec.get("dict_kwargs", {}), **known}
        model.save_hyperparameters(own | {"_instantiator": BUILDER})
        return model

    def make_trainer(self) -> Trainer:
        """The configured trainer with safe checkpoint files, which validates where something is decided by it."""
        given = dict(self.given)
        self.resume_file = ResumeFile(self.options.save_every)
        store = FeatureStore(self.model.backbone, towers={} if self.warm is None else self.warm.towers)
        given["callbacks"] = callbacks = [*listed(given["callbacks"]), self.resume_file, store]
        if given["enable_progress_bar"] is not False and not any(isinstance(c, ProgressBar) for c in callbacks):
            callbacks.append(Progress(leave=False))
        if given["check_val_every_n_epoch"] == 0:
            given["check_val_every_n_epoch"] = 1
            decided = given["val_check_interval"] is not None or any(getattr(c, "monitor", None) for c in callbacks)
            decided = decided or watches(self.model.schedule_factory)
            if self.line.command == "fit" and not decided:
                given["limit_val_batches"] = 0
        given["plugins"] = [*listed(given["plugins"]), self.files]
        left_open = self.line.command == "fit" and not has_length(given)
        if left_open:
            given["max_epochs"] = 1  # until the number of devices is known
        try:
            trainer = Trainer(**given)
        except (MisconfigurationException, ValueError, ModuleNotFoundError) as error:
            raise UserError(f"trainer: {first_line(error)}") from error
        if left_open:
            self.line.notes.append(set_length(trainer, self.datamodule))
        return trainer

    def open_directory(self) -> None:
        """Makes the run directory, which of several processes the first alone has, and starts logging there."""
        if not self.trainer.is_global_zero:
            return
        for note in self.line.notes:
            print(note, file=sys.stderr)
        if getattr(self.trainer, "fast_dev_run", False):
            return
        begun = self.unfinished_run()
        self.directory = begun or record.new_directory(Path(self.options.root), str(self.options.name))
        self.lock.enter_context(record.owned(self.directory))
        self.choice = kept(self.choice, self.directory)
        write_text(self.directory / "config.yaml", self.config_text)
        self.resume_file.folder = self.directory / RESUME_FROM[0]
        make_folder(self.resume_file.folder, parents=False)
        self.resume_file.metrics.file = self.directory / "metrics.csv"
        self.trainer.loggers = [*self.trainer.loggers, self.resume_file.metrics, *record.loggers(self.directory)]
        self.datamodule.write_manifest(self.directory / "split.json")

    def unfinished_run(self) -> Path | None:
        """The directory of the run that a fit goes on with; one that has its result stays as it is."""
        path = Path(self.config["ckpt_path"] or "")
        directory = path.parent.parent
        own = self.line.command == "fit" and path.parts[-2:] == RESUME_FROM and (directory / "config.yaml").is_file()
        return directory if own and not (directory / "result.json").exists() else None

    def tell_how_to_resume(self, error: BaseException) -> None:
        """Adds to what ended the run the command with which it goes on, where there is a file to go on from."""
        if self.line.command == "fit" and self.directory and self.directory.joinpath(*RESUME_FROM).is_file():
            command = shlex.join(["python", "main.py", "fit", "--resume", str(self.directory)])
            error.add_note(f"Go on with: {command}")

    def check_checkpoint(self) -> str | None:
        """The checkpoint to run from; raises UserError if it is missing or does not fit, before anything is written."""
        path, command = self.config["ckpt_path"], self.line.command
        if path is None:
            if command != "fit" and self.model.tuned_state():
                raise UserError(
                    f"{self.model.method} has learnt nothing yet: give {command} the --ckpt_path of a run, such as "
                    "runs/NAME/001/tuned.safetensors, or a method that trains nothing: --config methods/zero_shot.yaml."
                )
            return None
        if command != "fit":  # which looks at it itself
            checkpoint = self.files.look_at(path)
            self.model.on_load_checkpoint(checkpoint)
            self.datamodule.found_white = white_in(checkpoint.get(HEADER, {})) or self.datamodule.found_white
        return str(path)

    # -------------------------------------------------------------------------------------------- the commands

    def run_fit(self) -> None:
        """Trains, saves what was learnt, tests it and reports."""
        tests = self.options.test and self.datamodule.test_share is not None
        if tests:
            check_classes(self.model, self.datamodule)
            self.datamodule.check_test_files()
        elif self.options.test:
            self.line.notes.append(
                "data.test_share is null: all images are for training, and none is left to test on. The same run with "
                f"--data.test_share {TEST_SHARE} estimates the accuracy."
            )
        path, clock, run = self.check_checkpoint(), time.time(), (self.model, self.datamodule, self.trainer)
        unfitted = twin_of(self.model) if self.calibrates() else None
        fit(*run, ckpt_path=path, on_prepared=self.open_directory, finishing=False)
        self.seconds["fit"] = time.time() - clock
        unrounded = self.finish(tests)
        if unfitted is not None:
            self.look_ahead(unfitted)
        if self.directory is not None:
            write_tensors(self.directory / "tuned.safetensors", packed(self.model), header_of(self.model))
        if tests:
            self.test(None, unrounded)
        elif self.options.test:
            self.report(Tested())

    def calibrates(self) -> bool:
        """Whether a fit ends with a temperature and a forecast; a note says why not, where it was asked for."""
        if not self.options.calibrate or getattr(self.trainer, "fast_dev_run", False):
            return False
        several = self.trainer.world_size > 1
        if several:
            self.line.notes.append("Probabilities are not calibrated: run.calibrate needs a single device.")
        return not several

    def look_ahead(self, unfitted: FewShotModule) -> None:
        """Finds temperature and forecast, if choosing the method has not found them, and where the shots lie."""
        clock, run = time.time(), (self.datamodule, self.trainer)
        try:
            if self.choice is not None and self.choice.calibration is not None:
                self.model.calibration = stored_calibration(self.choice.calibration)
            else:
                settings = fold_settings(self.given)
                self.model.calibration = look_ahead(self.model, unfitted, *run, settings)
            self.model.mahalanobis = look_around(self.model, *run)
        except UserError as error:  # of a method that cannot learn from fewer shots; the run itself is whole
            self.line.notes.append(f"Probabilities are not calibrated: {error}")
            print(self.line.notes[-1], file=sys.stderr)
        self.seconds["calibrate"] = time.time() - clock

    def finish(self, tests: bool) -> float | None:
        """Makes the module what its small file holds; the accuracy before, where that changed a number and is asked."""
        before = copy.deepcopy(self.model.tuned_state())
        if not finish(self.model) or not tests:
            return None
        stored = copy.deepcopy(self.model.tuned_state())
        self.model.load_state_dict(before, strict=False)
        tested = evaluate(self.model, self.datamodule, self.trainer)
        self.model.load_state_dict(stored, strict=False)
        return next(iter(tested.sets.values()))["acc"]

    def run_test(self) -> None:
        """Measures a checkpoint on the test sets."""
        check_classes(self.model, self.datamodule)
        path = self.check_checkpoint()
        self.open_directory()
        self.test(path)

    def test(self, path: str | None, unrounded: float | None = None) -> None:
        """Tests and reports."""
        clock = time.time()
        tested = evaluate(self.model, self.datamodule, self.trainer, ckpt_path=path)
        self.seconds["test"] = time.time() - clock
        self.report(tested, unrounded)

    def report(self, tested: Tested, unrounded: float | None = None) -> None:
        """Writes result.json and, of what was tested, per_class.csv and the predictions, and prints the table."""
        if self.directory is None:
            return
        result = record.result(self.model, self.datamodule, self.trainer, tested, self.directory)
        result |= {
            "auto": self.choice and asdict(self.choice),
            "notes": self.line.notes,
            "acc_unrounded": unrounded,
            "seconds": {name: round(s, 3) for name, s in self.seconds.items()},
            "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        write_text(self.directory / "result.json", json.dumps(result, indent=2, ensure_ascii=False) + "\n")
        if tested.sets:
            names = {each.name: each.class_names for each in self.datamodule.test_sets}
            record.write_per_class(self.directory / "per_class.csv", names, tested.per_class)
            predictions.write(self.directory / predictions.FILE, tested.answers, names)
        record.print_result(result, self.directory)

    def run_validate(self) -> None:
        """Measures a checkpoint on the validation images; Lightning prints the table."""
        path = self.check_checkpoint()
        self.datamodule.setup("validate")
        if not self.datamodule.val_dataloader():
            raise UserError(f"{self.datamodule.dataset_name} has no validation images to measure on: use test.")
        self.open_directory()
        self.trainer.validate(self.model, datamodule=self.datamodule, ckpt_path=path)

    def run_import(self) -> None:
        """Turns a file that others wrote into a checkpoint of the config's model, which it must fit."""
        from kshot.export.reading import peft_tensors

        file = self.config["file"]
        read = peft_tensors if file and Path(file).is_dir() else None
        out = import_released(self.model, file, self.config["out"], read)
        print(shlex.join(["python", "main.py", "test", *self.line.without("file", "out"), "--ckpt_path", str(out)]))


def text_of(tree: Tree) -> str:
    """Settings as a config file states them."""
    return f"# kshot=={__version__}\n{yaml.dump(tree, Dumper=DUMPER, sort_keys=False, allow_unicode=True)}"
