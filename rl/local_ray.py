"""A Ray cluster that a run starts for itself. Environment variables, some of which Ray reads when
it is imported, make it listen at loopback only and require a token. `Watch` ends a run whose
cluster has lost a process of Ray's own."""

from __future__ import annotations

import os
import secrets
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from .exits import FAILED, say

LOOPBACK = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"
"""Ray's switch for nodes that other machines reach, on by default on Linux alone."""
NEEDED = ("gcs_server", "raylet")
"""The Ray processes without which a node does not work."""


def before_import(address: str | None) -> None:
    """Sets the environment variables for a cluster that the run will start; does nothing if it
    joins one, or once Ray is imported."""
    if address or os.environ.get("RAY_ADDRESS") or "ray" in sys.modules:
        return
    os.environ.setdefault("RAY_AUTH_MODE", "token")  # the default since Ray 2.59
    _set_token()
    os.environ.setdefault(LOOPBACK, "0")


def before_start() -> None:
    """Sets what still takes effect after Ray was imported."""
    from ray._private import ray_constants

    constants: Any = ray_constants
    _set_token()
    # workers that would wait for tasks: every actor here has a process of its own environment
    os.environ.setdefault("RAY_prestart_worker_first_driver", "0")
    if os.environ.setdefault(LOOPBACK, "0") == "0":
        constants.ENABLE_RAY_CLUSTER = False


@contextmanager
def needed_alone() -> Iterator[None]:
    """A context in which Ray starts a cluster without autoscaler, log monitor and dashboard server.
    Ray starts them whether or not they are asked for; nothing here uses them, and on two cores they
    take a tenth of a start, which waits for one of them."""
    from ray._private.node import Node

    node: Any = Node
    unneeded = ("start_monitor", "start_log_monitor", "start_api_server")
    there = {name: getattr(node, name) for name in unneeded if hasattr(node, name)}
    for name in there:
        setattr(node, name, lambda self, *_, **__: None)
    try:
        yield
    finally:
        for name, method in there.items():
            setattr(node, name, method)


def after_end() -> None:
    """Undoes `before_start`, as this process may join another machine's cluster next."""
    from ray._private import ray_constants

    constants: Any = ray_constants
    constants.ENABLE_RAY_CLUSTER = True
    os.environ.pop(LOOPBACK, None)


def _set_token() -> None:
    # without one Ray writes a token file to the user's home, which would switch authentication on
    # for every cluster that they start later
    os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))


class Watch:
    """A thread that watches Ray's own processes and ends this process, with the reason in its last
    line, when one is gone. Ray itself would wait a minute for its return and then end the driver
    without a message."""

    EVERY = 0.5
    """Seconds between two looks."""

    def __init__(self) -> None:
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._work, name="ray-watch", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stops watching, before Ray is shut down."""
        self._over.set()
        self._thread.join()

    def _work(self) -> None:
        from ray._private import worker

        node: Any = worker._global_node
        while not self._over.wait(self.EVERY):
            dead = [kind for kind, _ in node.dead_processes() if kind in NEEDED]
            if dead and not self._over.is_set():
                say(
                    f"Ray's {dead[0]} was killed or has failed, and with it the cluster that was"
                    " started here; start it again to go on (a run with --resume auto)"
                )
                # Ray's other processes would wait for a minute, too; actors end with the raylet
                node.kill_all_processes(check_alive=False, allow_graceful=False)
                os._exit(FAILED)  # an exception would not reach threads that wait for Ray


@contextmanager
def another_process_group() -> Iterator[None]:
    """A context in which new processes belong to another process group than this one. `timeout`,
    a shell's job control and service managers signal a whole group: SIGTERM would end Ray while the
    driver still has to save."""
    # a `cat` makes the group, for this process to join; it ends with its input
    ours = os.getpgrp()
    with subprocess.Popen(["cat"], stdin=subprocess.PIPE, process_group=0) as first:
        with suppress(PermissionError):  # the leader of a session cannot leave its group
            os.setpgid(0, first.pid)
        try:
            yield
        finally:
            with suppress(PermissionError):
                os.setpgid(0, ours)
