"""What comes before the first step of a fit, and after the last: checks, kept features, starts, choices."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from lightning.fabric.utilities import move_data_to_device
from lightning.pytorch import Trainer

from kshot.adapters.base import SearchProblem, Shared, derived_seed
from kshot.available import check_strategy
from kshot.classifiers import Shots
from kshot.classifiers.two_stage import stages_of
from kshot.data.parts import Batch
from kshot.errors import UserError
from kshot.features import encoded, keep_features, look_up, parts_to_start, place, untouched_shots
from kshot.holding import merged
from kshot.kept_tokens import keep_tokens
from kshot.optim import staged_schedule

Module = Any  # a FewShotModule, which imports this file
Data = Any  # a FewShotDataModule, or None


def prepare(module: Module, data: Data, trainer: Trainer) -> None:
    """Makes a module ready for its first step, on its device and in its precision.

    Schedules are planned, what the run is refused for is found, one step is tried; a classifier that starts from the
    shots is started; features of an image tower that nothing trains take the place of images; methods search.

    Raises:
        UserError: names what does not fit, before anything is written.
    """
    place(module, trainer)
    if data is not None:
        look_up(module, data, trainer)
    steps = planned_steps(trainer)
    if data is not None:
        module.meet(data)
        check_validation(module, data)
        check_classes(module, data)
    stages = stages_of(module.classifier, steps)
    check_devices(module, trainer, stages)
    check_stages(module, stages)
    for shared in module.shared:
        shared.plan(steps)
    start = [] if data is None else parts_to_start(module, data, trainer)
    if start:
        shots = {part: untouched_shots(module, data, trainer, part) for part in start}
        module.classifier.fit(shots["train"], shots.get("val"))
    if module.takes_steps:
        try_step(module, trainer, steps)
        if data is not None:
            keep_features(module, data, trainer)
            module.kept_tokens = keep_tokens(module, data, trainer)
        if trainer.ckpt_path is None:
            search(module, data, trainer, steps)


def low_precision(trainer: Trainer) -> torch.dtype | None:
    """The 16-bit dtype of products in mixed precision; None in any other."""
    return {"16-mixed": torch.float16, "bf16-mixed": torch.bfloat16}.get(str(trainer.precision))


def planned_steps(trainer: Trainer) -> int:
    """Optimizer steps that a run will take.

    Raises:
        UserError: it has no end.
    """
    steps = trainer.estimated_stepping_batches
    if steps == float("inf") or steps < 0:
        raise UserError(
            "The run has no end that schedules could be planned for: set --trainer.max_epochs or --trainer.max_steps."
        )
    return int(steps)


# ---------------------------------------------------------------------------------------------------- refusals


def check_validation(module: Module, data: Data) -> None:
    """Raises UserError when the classifier has nothing to choose its hyper-parameters by."""
    if "val" in module.classifier.needs and not data.draw.val:
        raise UserError(
            f"{type(module.classifier).__name__} chooses hyper-parameters on validation images, and "
            f"{data.dataset_name} has none: give values instead of null, or draw some of its training images: "
            "--data.sampler coop-v1+val."
        )


def check_classes(module: Module, data: Data) -> None:
    """Raises UserError when the data is to be tested on classes that the classifier cannot serve."""
    task = module.classifier.task
    for test_set in data.test_sets:
        if test_set.class_names != task.class_names:
            try:
                module.classifier.set_class_names(test_set.class_names, test_set.templates)
                module.classifier.set_class_names(task.class_names, task.templates)
            except UserError as error:
                raise UserError(
                    f"{type(module.classifier).__name__} cannot be tested on the classes of {test_set.name!r} "
                    f"(data.protocol: {data.protocol}): {error}"
                ) from error


def check_devices(module: Module, trainer: Trainer, stages: Sequence[int] = ()) -> None:
    """Raises UserError for what several devices cannot do together."""
    check_strategy(type(trainer.strategy), type(trainer.strategy).__name__, {})
    if trainer.world_size < 2:
        return
    if not module.takes_steps:
        raise UserError(f"{module.method} takes no gradient step for several devices to share: --trainer.devices 1.")
    if len(stages) > 1:
        raise UserError(
            f"{module.method} trains other tensors in each stage, on one device alone: --trainer.devices 1."
        )
    if any(searches(shared) for shared in module.shared):
        raise UserError(f"{module.method} searches before it trains, on one device alone: --trainer.devices 1.")


def check_stages(module: Module, stages: Sequence[int]) -> None:
    """Raises UserError for an adapter that has its own work in every step, where it trains in the first stage alone."""
    if len(stages) > 1 and any(type(shared).after_step is not Shared.after_step for shared in module.shared):
        raise UserError(
            f"{module.method} trains the adapter in its first stage alone, and {type(module.adapter).__name__} plans "
            "for all steps: use another adapter, such as LoRA."
        )


def try_step(module: Module, trainer: Trainer, steps: int) -> None:
    """Runs one step on noise.

    Raises:
        UserError: names tensors that nothing would train; or the schedule refuses its settings.
    """
    if module.schedule_factory is not None:
        stages = stages_of(module.classifier, max(1, steps))
        staged_schedule(module.schedule_factory, module.optimizer_for(), stages, 1)
    noise, size = torch.Generator().manual_seed(0), module.backbone.image_size
    image = torch.randint(0, 256, (2, 3, size, size), dtype=torch.uint8, generator=noise)
    label = torch.arange(2) % len(module.classifier.task.class_names)
    batch = move_data_to_device(Batch(image, label, label), module.device)
    module.train()
    with torch.random.fork_rng(), torch.enable_grad(), trainer.precision_plugin.forward_context():
        module.loss_of(batch).backward()
    untouched = [name for name, p in module.trained().items() if p.grad is None and p.numel()]  # or it comes later
    module.zero_grad(set_to_none=True)
    if untouched and trainer.ckpt_path is None:  # a run that goes on may have left some behind
        raise UserError(
            f"{len(untouched)} trainable tensors get no gradient, among them {untouched[0]}: nothing downstream of "
            f"them enters the loss of {module.method}. Narrow targets to what the classifier uses."
        )


# ---------------------------------------------------------------------------------------------------- search, choice


def searches(shared: Shared) -> bool:
    """Whether a method has something to decide before it trains."""
    return type(shared).search is not Shared.search


def search(module: Module, data: Data, trainer: Trainer, steps: int) -> None:
    """Lets the method decide what to train, on two halves of the shots; the run trains it from fresh values.

    Raises:
        UserError: there are no halves to judge by.
    """
    for shared in filter(searches, module.shared):
        if data is None:
            raise UserError(f"{module.method} searches on two halves of the shots: fit it with a FewShotDataModule.")
        train, val = (on_device(half, module) for half in data.train_halves())
        problem = SearchProblem(
            module.layers, train, val, module.loss_of, module.optimizer_for, list(module.trained().values()), steps
        )
        torch.manual_seed(derived_seed(module.run_seed, "search"))
        module.train()
        with trainer.precision_plugin.forward_context():
            shared.search(problem)


def on_device(batches: Iterable[Batch], module: Module) -> Iterator[Batch]:
    """Batches where a module is."""
    return (move_data_to_device(batch, module.device) for batch in batches)


def choose(module: Module, data: Data, trainer: Trainer) -> None:
    """Lets the classifier choose, on the validation shots, what is left to choose after gradient steps."""
    if "val" not in module.classifier.needs or not module.takes_steps:
        return
    module.eval()  # what is merged for it, and what is not, as evaluation has them
    with trainer.precision_plugin.forward_context(), merged(module.classifier):
        features = encoded(module, data, trainer, "val", 0, module.features_of)
        module.classifier.select(Shots(features.unsqueeze(0), data.part("val").labels.to(module.device)))
