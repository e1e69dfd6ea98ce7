"""Few-shot adaptation of vision-language and vision backbones."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kshot.answering import Prediction
    from kshot.api import Predictions, Run, datasets, fit, load, methods
    from kshot.errors import UserError

__version__ = "0.1.0"
__all__ = ["Prediction", "Predictions", "Run", "UserError", "datasets", "fit", "load", "methods"]


def __getattr__(name: str) -> Any:
    """Loads what is asked for, and torch with it: nothing is loaded by ``import kshot``."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module("kshot.errors" if name == "UserError" else "kshot.api"), name)


def __dir__() -> list[str]:
    """What there is, loaded or not."""
    return sorted([*globals(), *__all__])
