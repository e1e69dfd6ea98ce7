"""What a checkpoint says of itself, and what of it must agree with the run that measures it or goes on from it."""

from __future__ import annotations

import inspect
import json
import math
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from functools import partial
from typing import Any

from kshot import __version__
from kshot.calibration import Calibration
from kshot.classifiers.base import settings_of
from kshot.errors import UserError
from kshot.optim import built_by

FORMAT = 3  # 2: without digest, and without settings but the adapter's. 1: also averages and PromptSRC kept otherwise
INDIFFERENT = frozenset({"path", "save_bits", "wise_alpha"})  # how a method runs and is stored, not what it learns
TOLERANCE = 1e-4  # of fingerprints: rounding moves them by less than 1e-8, the flip of one pair in a thousand by 0.1
STARTS = frozenset({"head_start", "head_scale"})  # where training began
TRAINED_WITH = STARTS | {"dropout"}  # what a measurement does not depend on


def header_of(module: Any) -> dict[str, Any]:
    """The description of what a FewShotModule is and is trained with, in plain data."""
    classifier, adapter, task = module.classifier, module.adapter, module.classifier.task
    return {
        "format": FORMAT,
        "method": module.method,
        "backbone": module.backbone.name,
        "backbone_sha256": module.backbone.weight_sha256,
        "class_names": list(task.class_names),
        "model": {
            "classifier": settings_of(classifier),
            "adapter": None if adapter is None else adapter.settings(),
            "targets": None if adapter is None else list(module.targets),
            "templates": list(task.templates),
            "backbone": module.backbone.settings(),
        },
        "calibration": module.calibration.plain() if module.calibration != Calibration() else None,
        "frozen": [shared.fingerprint() for shared in module.shared],
        "split": module.split,
        "training": {
            "seed_everything": module.run_seed,
            "model": {
                "optimizer": described(module.optimizer_factory),
                "schedule": described(module.schedule_factory),
                "head_lr": module.head_lr,
            },
            "data": module.drawn_from,
        },
        "kshot": __version__,
    }


def data_settings(data: Any) -> dict[str, Any]:
    """What a FewShotDataModule gives a run to train on, by the names of its options."""
    split = data.split_info()
    drawn = {name: split[name] for name in ("dataset", "protocol", "sampler", "shots")}
    given = {"batch_size": data.batch_size, "views": data.views, "augment": described(data.augment)}
    given |= {name: getattr(data, name) for name in ("fit", "exif", "background", "white")}
    found = {name: split.get(name) for name in ("digest", "images_sha256")}  # last: an option says more
    return {**drawn, "split_seed": split["seed"], **given, **found}


def described(value: Any) -> Any:
    """Settings in plain data: of a class or function but for some arguments, of a record, of plain values."""
    if isinstance(value, Mapping):
        return {str(key): described(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [described(each) for each in value]
    if is_dataclass(value) and not isinstance(value, type):
        given = {each.name: getattr(value, each.name) for each in fields(value)}
        return {"class": type(value).__qualname__} | described(given)
    if not callable(value):
        return value if isinstance(value, (str, int, float)) or value is None else repr(value)
    given = {}
    outer = value
    while isinstance(outer, partial):
        given, outer = outer.keywords | given, outer.func
    target = built_by(value)
    known = inspect.signature(target).parameters.values()
    defaults = {p.name: p.default for p in known if p.default is not p.empty}
    return {"class": getattr(target, "__qualname__", type(target).__qualname__)} | described(defaults | given)


def check_fits(header: Mapping[str, Any], own: Mapping[str, Any]) -> None:
    """Raises UserError for a checkpoint of another backbone, method, setting, frozen basis or task: what differs."""
    if header.get("backbone_sha256") != own["backbone_sha256"]:
        theirs = str(header.get("backbone_sha256"))[:12]
        raise UserError(
            f"The checkpoint belongs to the backbone {header.get('backbone')} (weights {theirs}), and the config names "
            f"{own['backbone']} (weights {own['backbone_sha256'][:12]})."
        )
    if header.get("method") != own["method"]:
        raise UserError(f"The checkpoint was trained by {header.get('method')}, and the config says {own['method']}.")
    if header.get("class_names") != own["class_names"]:
        names = header.get("class_names") or []
        raise UserError(
            f"The checkpoint tells {len(names)} classes apart ({', '.join(names[:3])}, ...), and the config "
            f"{len(own['class_names'])} ({', '.join(own['class_names'][:3])}, ...). To test on other classes, keep the "
            "data set that it was trained on, and set --data.protocol cross-dataset --data.targets '[NAME]'."
        )
    stated = header.get("model", {"adapter": header.get("adapter")})  # before format 3, the adapter's settings alone
    found = first_difference(stated, stated_of(own["model"], stated), "model", INDIFFERENT | TRAINED_WITH)
    if found is not None:
        raise UserError(f"The checkpoint has {found[0]} {found[1]}, and the config {found[2]}.")
    found = first_difference(header.get("frozen"), own["frozen"], "frozen basis", tolerance=TOLERANCE)
    if found is not None:
        raise UserError(f"The checkpoint's {found[0]} is {found[1]}, and the config's {found[2]}.")


def stated_of(own: Mapping[str, Any], stated: Mapping[str, Any]) -> dict[str, Any]:
    """What a header of the present run has in common with an older one, which says less."""
    return {key: own[key] for key in stated.keys() & own.keys()}


def check_same_run(header: Mapping[str, Any], own: Mapping[str, Any], path: Any) -> None:
    """Raises UserError, with the option and both values, where going on would be another run than the one begun."""
    unsaid = frozenset() if "head_start" in json.dumps(header["model"]) else STARTS  # by heads that all began at zero
    found = first_difference(header["model"], stated_of(own["model"], header["model"]), "model", INDIFFERENT | unsaid)
    found = found or first_difference(header["training"], own["training"])
    if found is not None:
        raise UserError(
            f"{path} is of a run with {found[0]} {found[1]}, and this one has {found[2]}: go on with the settings that "
            "it began with, or start a new run."
        )


def first_difference(
    there: Any, here: Any, where: str = "", indifferent: frozenset[str] = frozenset(), tolerance: float = 0.0
) -> tuple[str, Any, Any] | None:
    """Where two pieces of plain data differ first, and how.

    Args:
        there: of a file.
        here: the same of the present run.
        where: name of the whole.
        indifferent: keys that are passed over.
        tolerance: of floats, relative where they exceed 1.
    """
    if isinstance(there, Mapping) and isinstance(here, Mapping):
        keys = [key for key in {**there, **here} if key not in indifferent]
        pairs = [(there.get(key), here.get(key), f"{where}.{key}".lstrip(".")) for key in keys]
    elif isinstance(there, (list, tuple)) and isinstance(here, (list, tuple)) and len(there) == len(here):
        pairs = [(a, b, where) for a, b in zip(there, here, strict=True)]
    else:
        floats = isinstance(there, float) and isinstance(here, float)
        same = math.isclose(there, here, rel_tol=tolerance, abs_tol=tolerance) if floats else there == here
        return None if same else (where, there, here)
    found = (first_difference(*pair, indifferent, tolerance) for pair in pairs)
    return next(filter(None, found), None)
