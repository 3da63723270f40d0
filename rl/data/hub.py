"""Whether the Hugging Face Hub can be reached, so that machines without network do not wait."""

from __future__ import annotations

import os
import socket
import urllib.request
from functools import cache
from urllib.parse import urlparse

ADDRESS = "https://huggingface.co"
CONNECT_S = 5.0
"""Seconds that its address may take to accept a connection."""


def look_up() -> None:
    """Switches the Hub's clients to their caches if nothing answers at its address; call it before
    them. By themselves they would try six times, which takes half a minute for each file."""
    address = os.environ.get("HF_ENDPOINT") or ADDRESS
    if within_reach(address):
        return
    import datasets.config
    from huggingface_hub import constants

    # the variable HF_HUB_OFFLINE would come too late: it is read when these are imported
    constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True


@cache
def within_reach(address: str) -> bool:
    """Whether something accepts a connection there; taken for granted behind a proxy."""
    if {"http", "https", "all"} & urllib.request.getproxies().keys():
        return True
    parts = urlparse(address)
    port = parts.port or (80 if parts.scheme == "http" else 443)
    try:
        socket.create_connection((parts.hostname or "", port), timeout=CONNECT_S).close()
    except OSError:
        return False
    return True
