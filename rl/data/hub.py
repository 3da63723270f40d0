"""The Hugging Face Hub, where there may be no way to it."""

from __future__ import annotations

import os
import socket
import urllib.request
from functools import cache
from urllib.parse import urlparse

ADDRESS = "https://huggingface.co"
CONNECT_S = 5.0
"""How long its address may take to answer."""


def look_up() -> None:
    """Before the Hub is asked for anything: where nothing answers at its address, the clients are
    told to look into their caches alone. By themselves they would try six times, which takes half
    a minute for each file."""
    address = os.environ.get("HF_ENDPOINT") or ADDRESS
    if within_reach(address):
        return
    import datasets.config
    from huggingface_hub import constants

    # what HF_HUB_OFFLINE=1 sets, which is read when these are imported
    constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True


@cache
def within_reach(address: str) -> bool:
    """Whether something answers there; taken for granted behind a proxy."""
    if {"http", "https", "all"} & urllib.request.getproxies().keys():
        return True
    parts = urlparse(address)
    port = parts.port or (80 if parts.scheme == "http" else 443)
    try:
        socket.create_connection((parts.hostname or "", port), timeout=CONNECT_S).close()
    except OSError:
        return False
    return True
