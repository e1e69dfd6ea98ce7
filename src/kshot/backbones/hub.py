"""Asking a model hub without waiting for one that cannot be reached."""

from __future__ import annotations

import logging
import os
import socket
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from urllib.parse import urlsplit

from kshot.errors import first_line


@contextmanager
def quiet_loading(hub: bool) -> Iterator[None]:
    """Loads without the libraries' chatter, and from the cache alone where a hub is asked that does not answer.

    The libraries retry a dead hub for most of a minute; one connection attempt tells sooner. Behind a proxy the attempt
    would say nothing, so there it is left out.
    """
    from huggingface_hub import constants

    offline = constants.HF_HUB_OFFLINE
    behind_proxy = any(name in os.environ for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"))
    constants.HF_HUB_OFFLINE = offline or (hub and not behind_proxy and not answers(constants.ENDPOINT))
    try:
        with muted(logging.ERROR):
            yield
    finally:
        constants.HF_HUB_OFFLINE = offline


@contextmanager
def muted(level: int) -> Iterator[None]:
    """Without warnings, and what libraries log up to a level."""
    disabled = logging.root.manager.disable
    logging.disable(level)
    try:
        with warnings.catch_warnings(action="ignore"):
            yield
    finally:
        logging.disable(disabled)


def answers(endpoint: str, timeout: float = 3.0) -> bool:
    """Whether a connection to a hub's address can be opened, within seconds."""
    address, opened = urlsplit(endpoint), threading.Event()

    def connect() -> None:
        with suppress(OSError):
            socket.create_connection((address.hostname or "", address.port or 443), timeout=timeout).close()
            opened.set()

    asking = threading.Thread(target=connect, daemon=True)  # looking up a name knows no timeout
    asking.start()
    asking.join(timeout)
    return opened.is_set()


def out_of_reach(what: str, setting: str, error: Exception) -> str:
    """One line for weights that are neither in the cache nor to be had."""
    return (
        f"{what} are not in the cache and could not be fetched ({first_line(error)}). With a network, run once; "
        f"without one, point HF_HUB_CACHE at a filled cache or set {setting} to a local file."
    )
