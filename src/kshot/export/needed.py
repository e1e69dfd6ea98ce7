"""Packages that one format alone needs."""

from __future__ import annotations

import importlib
from typing import Any

from kshot.errors import UserError


def needed(*names: str) -> Any:
    """The first of some modules, when all are there; raises UserError that says what installs them."""
    found = []
    for name in names:
        try:
            found.append(importlib.import_module(name))
        except ModuleNotFoundError as error:
            raise UserError(f"{error.name or name} is not installed: pip install 'kshot[export]'.") from error
    return found[0]
