"""What the command line does once Lightning is loaded: parse, build, check, run, and write down the result."""

from __future__ import annotations

import logging
import math
import shlex
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from jsonargparse._deprecated import JsonargparseDeprecationWarning
from lightning.pytorch.callbacks import Checkpoint, ProgressBar, TQDMProgressBar
from lightning.pytorch.callbacks.progress.tqdm_progress import Tqdm
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import CSVLogger, Logger
from lightning.pytorch.trainer import Trainer

import kshot.optim  # noqa: F401  its classes resolve by their short names once imported
from kshot import __version__, results
from kshot.checkpoint import HEADER, AtomicCheckpoints, write_tensors
from kshot.data.datamodule import FewShotDataModule
from kshot.errors import UserError
from kshot.files import write_atomically
from kshot.foreign import released_tensors
from kshot.module import FewShotModule
from kshot.parser import ConfigByName, Parser
from kshot.results import RunOptions


def run(arguments: list[str], started: float | None = None) -> FewShotCLI:
    """Runs a command line and returns what it built.

    Args:
        arguments: as after ``python main.py``.
        started: when the process began, in seconds since the epoch; by default now.
    """
    FewShotCLI.started = time.time() if started is None else started
    FewShotCLI.given = arguments
    settle_chatter()
    if str(Path.cwd()) not in sys.path:  # a user's own classes lie where the user stands
        sys.path.insert(0, str(Path.cwd()))
    argv, sys.argv = sys.argv, sys.argv[:1]  # Lightning warns when both its arguments and sys.argv hold something
    try:
        return FewShotCLI(
            FewShotModule,
            FewShotDataModule,
            trainer_class=FewShotTrainer,
            subclass_mode_model=True,
            subclass_mode_data=True,
            seed_everything_default=1,
            auto_configure_optimizers=False,
            save_config_callback=None,
            parser_class=Parser,
            trainer_defaults={
                "devices": 1,
                "logger": False,
                "enable_model_summary": False,
                "num_sanity_val_steps": 0,
                "log_every_n_steps": 1,
            },
            args=arguments,
        )
    finally:
        sys.argv = argv


def settle_chatter() -> None:
    """Silences messages that tell a user nothing to act on."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    for message in (
        ".*Total length of .list. across ranks is zero.*",  # a data set without validation images
        ".*does not have many workers.*",  # a few images in memory need none
        ".*this fit will run with no optimizer.*",  # what has a closed form needs none
        ".*LeafSpec.*",  # Lightning 2.6 on newer torch
        ".*Experiment logs directory .* exists and is not empty.*",  # the run directory already holds its config
        ".*module.s. in eval mode.*",  # frozen towers are meant to be
    ):
        warnings.filterwarnings("ignore", message=message)
    log = logging.getLogger("kshot")
    if not log.handlers:
        log.addHandler(logging.StreamHandler())
        log.setLevel(logging.INFO)
    warnings.filterwarnings("ignore", category=JsonargparseDeprecationWarning)  # Lightning 2.6 calls what 5.0 drops


class ResumeFile(Checkpoint):
    """Keeps one file to resume from, ``checkpoints/last.ckpt``, written at ends of epochs.

    Args:
        folder: set once the run directory exists; until then nothing is written.
        seconds: least time between two files; the last epoch is always written.
    """

    def __init__(self, seconds: float) -> None:
        self.folder: Path | None = None
        self.seconds = seconds
        self.written = time.monotonic()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: Any) -> None:  # noqa: ARG002  Lightning's signature
        """Writes the file when it is due."""
        last = (
            0 < (trainer.max_epochs or 0) <= trainer.current_epoch + 1 or 0 < trainer.max_steps <= trainer.global_step
        )
        if self.folder is not None and (last or time.monotonic() - self.written >= self.seconds):
            trainer.save_checkpoint(self.folder / "last.ckpt")
            self.written = time.monotonic()


class Progress(TQDMProgressBar):
    """One bar a stage; validation, which takes no time here, draws none."""

    def get_metrics(self, trainer: Trainer, pl_module: Any) -> dict[str, Any]:
        """Metrics beside the bar, without Lightning's version of the log."""
        return {name: value for name, value in super().get_metrics(trainer, pl_module).items() if name != "v_num"}

    def init_validation_tqdm(self) -> Any:
        """A bar that is not drawn within fit, and drawn for ``validate``."""
        return Tqdm(disable=True) if self.trainer.state.fn == "fit" else super().init_validation_tqdm()


class FewShotTrainer(Trainer):
    """Lightning's trainer, whose methods are the commands, with one command more."""

    imported: Path

    def import_released(
        self,
        model: FewShotModule,
        datamodule: FewShotDataModule,  # noqa: ARG002  the model knows its class names
        file: str | None = None,
        out: str | None = None,
    ) -> None:
        """Turns a file that CoOp or CLIP-LoRA released into a checkpoint of the config's model.

        Args:
            model: of the config.
            datamodule: of the config; no image is opened.
            file: What was released, such as model.pth.tar-200 or lora_weights.pt.
            out: Where to write; by default beside the file, as FILE.safetensors.

        Raises:
            UserError: the file does not fit the config, or there is one already where to write.
        """
        if file is None:
            raise UserError("import needs --file: what CoOp or CLIP-LoRA released, such as model.pth.tar-200.")
        self.imported = Path(out or f"{file}.safetensors")
        if self.imported.suffix != ".safetensors":
            raise UserError(f"--out is {out}, and must end with .safetensors.")
        if self.imported.exists():
            raise UserError(f"{self.imported} exists already: choose another --out.")
        tensors, origin = released_tensors(Path(file), model)
        header = model.header() | {"imported": origin}  # of which shots, no file says
        model.on_load_checkpoint({"state_dict": dict(tensors), HEADER: header})
        write_tensors(self.imported, tensors, header)
        parameters = sum(tensor.numel() for tensor in tensors.values())
        print(f"{model.method} from {file} (tensors {len(tensors)}, parameters {parameters:,}): {self.imported}")


setattr(FewShotTrainer, "import", FewShotTrainer.import_released)  # Python keeps the word, LightningCLI looks it up


class FewShotCLI(LightningCLI):
    """``fit`` (and test), ``validate``, ``test``, ``predict``, ``import``."""

    model: FewShotModule
    datamodule: FewShotDataModule
    trainer: FewShotTrainer
    started: ClassVar[float]
    given: ClassVar[list[str]]
    directory: Path | None = None

    # ------------------------------------------------------------------------------------------------ parsing

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        """A parser that finds configs by name and says so in its help."""
        kwargs.setdefault("dump_header", [f"kshot=={__version__}"])
        parser = self.parser_class(**kwargs)
        parser.add_argument(
            "-c", "--config", action=ConfigByName, help="A YAML file, or the name of one in configs/; may be repeated."
        )
        return parser

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Links what the data set knows to the model, and adds where runs are kept."""
        for name in ("class_names", "templates"):
            parser.link_arguments(f"data.{name}", f"model.init_args.{name}", apply_on="instantiate")
        parser.add_class_arguments(RunOptions, "run")

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """The commands, each with the arguments of the trainer's method that no user gives."""
        return LightningCLI.subcommands() | {"import": {"model", "datamodule"}}

    def _prepare_subcommand_parser(self, klass: type, subcommand: str, **kwargs: Any) -> LightningArgumentParser:
        parser = super()._prepare_subcommand_parser(klass, subcommand, **kwargs)
        if subcommand == "predict":
            parser.add_argument("--images", type=list[str] | str, help="A folder, an image, or a list of them.")
            parser.add_argument("--top_k", type=int, default=5, help="Labels a row, best first.")
            parser.add_argument(
                "--out", type=str | None, default=None, help="CSV file; by default in the run directory."
            )
        return parser

    def _parse_ckpt_path(self) -> None:
        """Leaves config and command line as they are: they win over a checkpoint's hyper-parameters."""

    # ------------------------------------------------------------------------------------------------ building

    def instantiate_classes(self) -> None:
        """Builds data and model, and gives the data the image size of the backbone."""
        super().instantiate_classes()
        size = self.model.backbone.image_size
        if self.datamodule.image_size not in (None, size):
            raise UserError(
                f"data.image_size is {self.datamodule.image_size}, the backbone takes {size}: set it on the backbone."
            )
        self.datamodule.image_size = size

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Adds safe checkpoint files to the configured trainer."""
        configured = self._get(self.config_init, "trainer", default={})
        self.resume_file = ResumeFile(self.options.save_every)
        callbacks = [*(configured.get("callbacks") or []), self.resume_file]
        if configured.get("enable_progress_bar") is not False and not any(
            isinstance(c, ProgressBar) for c in callbacks
        ):
            callbacks.append(Progress(leave=False))
        plugins = configured.get("plugins") or []
        plugins = [*(plugins if isinstance(plugins, list) else [plugins]), AtomicCheckpoints()]
        return super().instantiate_trainer(callbacks=callbacks, plugins=plugins, **kwargs)

    @property
    def options(self) -> RunOptions:
        """The ``run`` options."""
        return RunOptions(**vars(self._get(self.config, "run")))

    def open_directory(self) -> None:
        """Makes the run directory, once all that can be checked was checked, and starts logging there."""
        if getattr(self.trainer, "fast_dev_run", False):
            return
        configs = self._get(self.config, "config") or []
        name = self.options.name or "+".join(Path(str(c)).stem for c in configs if c) or str(self.subcommand)
        self.directory = results.new_directory(Path(self.options.root), name)
        config = self.config[str(self.subcommand)]
        config["run"]["name"] = name  # so that the saved file, given again, adds to the same folder
        file = self.directory / "config.yaml"
        self._parser(self.subcommand).save(config, file, skip_none=False, skip_validation=True)
        self.trainer.loggers = [*self.trainer.loggers, *loggers(self.directory)]
        self.resume_file.folder = self.directory / "checkpoints"
        if self.subcommand != "predict":
            self.datamodule.write_manifest(self.directory / "split.json")

    # ------------------------------------------------------------------------------------------------ running

    def before_fit(self) -> None:
        """Reads the images and tries one step before anything is written."""
        self.seconds = {"start": time.time() - self.started}
        self.check_checkpoint()
        self.datamodule.setup("fit")
        self.model.preflight(planned_steps(self.trainer, len(self.datamodule.train_dataloader())), self.datamodule)
        self.open_directory()
        self.clock = time.time()

    def after_fit(self) -> None:
        """Saves what was learnt, tests it and reports."""
        self.seconds["fit"] = time.time() - self.clock
        if self.trainer.interrupted:
            raise KeyboardInterrupt
        self.unrounded: float | None = None
        lossy = [shared for shared in self.model.shared if shared.lossy]
        if lossy and self.options.test:
            self.trainer.test(self.model, datamodule=self.datamodule, verbose=False)
            self.unrounded = float(self.trainer.callback_metrics["test/acc"])
        for shared in lossy:
            shared.round_to_stored()
        if self.directory is not None:
            write_tensors(self.directory / "tuned.safetensors", self.model.stored_state(), self.model.header())
        if self.options.test:
            self.clock = time.time()
            self.trainer.test(self.model, datamodule=self.datamodule, verbose=False)
            self.after_test()

    def before_test(self) -> None:
        """Opens the run directory."""
        self.seconds = {"start": time.time() - self.started}
        self.model.check_classes(self.datamodule)
        self.check_checkpoint()
        self.open_directory()
        self.clock = time.time()

    def after_test(self) -> None:
        """Writes result.json and prints the table."""
        self.seconds["test"] = time.time() - self.clock
        if self.directory is None:
            return
        result = self.result()
        results.write_json(self.directory / "result.json", result)
        sets = [(each.name, each.class_names, self.model.per_class[each.name]) for each in self.model.test_sets]
        results.write_per_class(self.directory / "per_class.csv", sets)
        zero_shot, trainable = result["zero_shot_acc"], result["trainable_parameters"]
        results.print_table(
            f"{self.model.method} on {self.datamodule.dataset_name}",
            [
                ("zero-shot accuracy", "needs a text tower" if zero_shot is None else f"{zero_shot:.1%}"),
                ("adapted accuracy", f"{result['acc']:.1%}"),
                *self.set_rows(result),
                ("trainable parameters", f"{trainable:,} of {result['total_parameters']:,}"),
                *self.method_rows(result["adapter"], result["ranks"]),
                ("seconds", ", ".join(f"{name} {value:.1f}" for name, value in self.seconds.items())),
                ("peak memory", results.megabytes(result["peak_memory_bytes"])),
                ("results", str(self.directory)),
            ],
        )

    @staticmethod
    def set_rows(result: dict[str, Any]) -> list[tuple[str, str]]:
        """Accuracy, and zero-shot accuracy, of each test set where there are several, and the protocol's figure."""
        sets = result["test_sets"]
        if len(sets) < 2:
            return []

        def shown(values: dict[str, float], adapted: str, before: str) -> str:
            zero_shot = f" (zero-shot {values[before]:.1%})" if before in values else ""
            return f"{values[adapted]:.1%}{zero_shot}"

        rows = [(f"  {name}", shown(values, "acc", "zero_shot_acc")) for name, values in sets.items()]
        both = result["summary"] | {f"zero_shot_{k}": v for k, v in result["zero_shot_summary"].items()}
        return rows + [
            (f"  {name.replace('_', ' ')}", shown(both, name, f"zero_shot_{name}")) for name in result["summary"]
        ]

    @staticmethod
    def method_rows(adapter: dict[str, Any] | None, ranks: dict[str, int] | None) -> list[tuple[str, str]]:
        """What decides the size of an update, together, and the ranks that a method chose."""
        named = {name: (adapter or {}).get(name) for name in ("alpha", "scale", "lr")}
        rows = [("update", ", ".join(f"{name} {value:.4g}" for name, value in named.items() if value is not None))]
        if ranks:
            chosen = list(ranks.values())
            rows.append(("ranks", f"{min(chosen)} to {max(chosen)}, mean {sum(chosen) / len(chosen):.1f}"))
        return [row for row in rows if adapter and row[1]]

    def before_validate(self) -> None:
        """Reads the validation images before anything is written."""
        self.check_checkpoint()
        self.datamodule.setup("validate")
        if not self.datamodule.val_dataloader():
            raise UserError(f"{self.datamodule.dataset_name} has no validation images to measure on: use test.")
        self.open_directory()

    def before_predict(self) -> None:
        """Lists the images before anything is written."""
        images = self.config["predict"]["images"]
        if not images:
            raise UserError("predict needs --images: a folder, an image, or a list of them.")
        self.check_checkpoint()
        self.datamodule.images = [images] if isinstance(images, str) else list(images)
        self.datamodule.setup("predict")
        out = self.config["predict"]["out"]
        if out and Path(out).exists():
            raise UserError(f"{out} exists already: choose another --out.")
        self.open_directory()

    def predict(self, **kwargs: Any) -> None:
        """Labels images and writes the CSV."""
        batches = self.trainer.predict(**kwargs) or []
        if self.directory is None:
            return
        path = Path(self.config["predict"]["out"] or self.directory / "predictions.csv")
        paths, names, top_k = (
            self.datamodule.predict_paths,
            self.datamodule.class_names,
            self.config["predict"]["top_k"],
        )
        flat: Sequence[Any] = batches
        write_atomically(path, lambda file: results.write_predictions(file, paths, flat, names, top_k))
        print(f"{len(paths)} images labelled: {path}")

    def after_import(self) -> None:
        """Prints how to measure what was imported: the same command line with ``test``."""
        words, kept = iter(self.given), []
        for word in words:
            if word in ("--file", "--out"):
                next(words, None)
            elif not word.startswith(("--file=", "--out=")):
                kept.append(word)
        kept[kept.index("import")] = "test"
        print(shlex.join(["python", "main.py", *kept, "--ckpt_path", str(self.trainer.imported)]))

    def check_checkpoint(self) -> None:
        """Raises UserError for a checkpoint that is missing or does not fit, before anything is written."""
        path = self.config[str(self.subcommand)].get("ckpt_path")
        if not path and self.subcommand != "fit" and self.model.tuned_state():
            raise UserError(
                f"{self.model.method} has learnt nothing yet: give {self.subcommand} the --ckpt_path of a run, such as "
                "runs/NAME/001/tuned.safetensors, or a method that trains nothing: --config methods/zero_shot.yaml."
            )
        if path and path not in ("best", "last"):
            checkpoint = AtomicCheckpoints().load_checkpoint(path)
            if self.subcommand == "fit" and "optimizer_states" not in checkpoint:
                raise UserError(f"{path} holds weights only; to resume, give checkpoints/last.ckpt of a run.")
            self.model.on_load_checkpoint(checkpoint)

    def result(self) -> dict[str, Any]:
        """The record of a run: one row of every table."""
        model, data, directory = self.model, self.datamodule, self.directory
        assert directory is not None
        tested = next(iter(model.tested.values()))  # the classes trained on
        tuned = directory / "tuned.safetensors"
        config = self.config[str(self.subcommand)]
        rates = [group.get("initial_lr", group["lr"]) for o in self.trainer.optimizers for group in o.param_groups]
        adapter = None if model.adapter is None else model.adapter.settings()
        return {
            "method": model.method,
            "adapter": None
            if adapter is None
            else adapter | {"lr": next(iter(rates), None)},  # a head's rate comes later
            "ranks": {name: rank for shared in model.shared for name, rank in shared.ranks.items()} or None,
            "backbone": model.backbone.name,
            "backbone_sha256": model.backbone.weight_sha256,
            "dataset": data.dataset_name,
            "split": data.split_info(),
            "seed": config["seed_everything"],
            "protocol": data.protocol,
            **{name: tested[name] for name in ("acc", "acc_class_mean", "f1_macro", "ece")},
            "acc_unrounded": getattr(self, "unrounded", None),
            "zero_shot_acc": tested.get("zero_shot_acc"),
            "test_sets": model.tested,
            "summary": results.summary(data.protocol, model.tested),
            "zero_shot_summary": results.summary(data.protocol, model.tested, "zero_shot_acc"),
            "per_class": "per_class.csv",
            "selection": model.selection,
            "trainable_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
            "total_parameters": sum(p.numel() for p in model.parameters()),
            "checkpoint_bytes": tuned.stat().st_size if tuned.is_file() else None,
            "peak_memory_bytes": results.peak_memory_bytes(),
            "seconds": {name: round(value, 3) for name, value in self.seconds.items()},
            "text_parts": getattr(model.backbone, "chunks", None),
            "precision": str(self.trainer.precision),
            "device": str(torch.cuda.get_device_name() if model.device.type == "cuda" else model.device.type),
            "versions": results.versions(),
            "git_commit": results.git_commit(),
        }


def planned_steps(trainer: Trainer, batches: int) -> int:
    """Optimizer steps that a run will take over so many batches an epoch, or -1 for no end."""
    limit = trainer.limit_train_batches
    batches = min(batches, limit) if isinstance(limit, int) else int(batches * (1.0 if limit is None else limit))
    each = math.ceil(batches / trainer.accumulate_grad_batches)
    counts = [each * trainer.max_epochs] if trainer.max_epochs not in (None, -1) else []
    counts += [trainer.max_steps] if trainer.max_steps != -1 else []
    return min(counts, default=-1)


def loggers(directory: Path) -> list[Logger]:
    """A CSV log always, and TensorBoard's when it is installed."""
    found: list[Logger] = [CSVLogger(directory, name="", version="")]
    try:
        from lightning.pytorch.loggers import TensorBoardLogger

        found.append(TensorBoardLogger(directory, name="", version="tensorboard"))
    except ModuleNotFoundError:
        pass
    return found
