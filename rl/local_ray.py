"""Environment variables of a Ray cluster that a run starts for itself: to listen at loopback alone,
and to let in who knows its token. Ray reads some of them when it is imported."""

from __future__ import annotations

import os
import secrets
import sys
from typing import Any

LOOPBACK = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"
"""Ray's switch for nodes that other machines reach, on by default on Linux alone."""


def before_import(address: str | None) -> None:
    """For a run that will start a cluster, as it names none to join; without effect once Ray is
    imported."""
    if address or os.environ.get("RAY_ADDRESS") or "ray" in sys.modules:
        return
    os.environ.setdefault("RAY_AUTH_MODE", "token")  # the default since Ray 2.59
    _set_token()
    os.environ.setdefault(LOOPBACK, "0")


def before_start() -> None:
    """The same where Ray was imported first, as far as that goes."""
    from ray._private import ray_constants

    constants: Any = ray_constants
    _set_token()
    if os.environ.setdefault(LOOPBACK, "0") == "0":
        constants.ENABLE_RAY_CLUSTER = False


def after_end() -> None:
    """This process may join another machine's cluster next."""
    from ray._private import ray_constants

    constants: Any = ray_constants
    constants.ENABLE_RAY_CLUSTER = True
    os.environ.pop(LOOPBACK, None)


def _set_token() -> None:
    # one of this run's own leaves no file in the user's home, which would switch authentication on
    # for every cluster that they start later
    os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
