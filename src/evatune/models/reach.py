"""Whether a hub can be asked: where there is no network, its clients try again for half a minute before they say so."""

from __future__ import annotations

import contextlib
import socket
import sys
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies


@contextlib.contextmanager
def hub_in_reach() -> Iterator[None]:
    """Let the clients of the hub look into their cache only while the block runs, if the hub's name has no address."""
    from huggingface_hub import constants

    if _has_address(constants.ENDPOINT):
        yield
        return
    settings: list[Any] = [constants, *filter(None, [sys.modules.get("datasets.config")])]
    before = [module.HF_HUB_OFFLINE for module in settings]
    for module in settings:
        module.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        for module, value in zip(settings, before, strict=True):
            module.HF_HUB_OFFLINE = value


def _has_address(url: str) -> bool:
    """Return whether the host of a URL has an address, or is asked through a proxy, which then knows it."""
    if getproxies():
        return True
    try:
        return bool(socket.getaddrinfo(urlsplit(url).hostname, None))
    except OSError:
        return False
