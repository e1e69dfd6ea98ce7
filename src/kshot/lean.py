"""Loading Lightning without what it would load in vain: half of the time that a command takes to start."""

from __future__ import annotations

import gc
import importlib
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from importlib.abc import MetaPathFinder
from importlib.metadata import Distribution, DistributionFinder, PackageNotFoundError
from typing import Any


class Hide(MetaPathFinder):
    """Answers first for some packages, that they are not there: to imports, and to questions for their versions."""

    def __init__(self, names: Iterable[str]) -> None:
        self.names = set(names)

    def find_spec(self, fullname: str, path: Sequence[str] | None, target: Any = None) -> None:  # noqa: ARG002
        """Refuses an import of them, and leaves others to the other finders."""
        if fullname.partition(".")[0] in self.names:
            raise ModuleNotFoundError(f"{fullname} is hidden for the moment", name=fullname)

    def find_distributions(self, context: DistributionFinder.Context) -> Iterable[Distribution]:
        """Ends importlib.metadata's search for one of them before it asks the other finders."""
        if context.name in self.names:
            raise PackageNotFoundError(context.name)
        return ()


@contextmanager
def without(*names: str) -> Iterator[None]:
    """Packages that are not loaded yet count as not installed for a while."""
    finder = Hide(name for name in names if name not in sys.modules)
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)
        importlib.invalidate_caches()


@contextmanager
def without_collection() -> Iterator[None]:
    """Nothing is searched for garbage while libraries load, nor later what they left, which stays."""
    loaded, enabled = len(sys.modules), gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
        if len(sys.modules) > loaded:
            gc.freeze()


def load_lightning() -> None:
    """Loads Lightning, whose torchmetrics takes every optional package that it finds for metrics of text and images.

    In this process those metrics, and the plotting of metrics, then say that their package is not installed; all others
    work. The packages themselves are there for whoever imports them later.
    """
    with without("transformers", "matplotlib", "scipy", "torchvision"), without_collection():
        importlib.import_module("lightning.pytorch")
    utilities = importlib.import_module("lightning_utilities.core.imports")
    for answers in (utilities.package_available, utilities.module_available):
        answers.cache_clear()
