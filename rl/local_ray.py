"""A Ray cluster that a run starts for itself. By environment variables, of which Ray reads some
when it is imported, it is told to listen at loopback alone, and to let in who knows its token.
`Watch` ends a run whose cluster has lost a process of Ray's own."""

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
"""Of Ray's processes on a node, those that it cannot do without."""


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
    # workers that would wait for tasks: every actor here has a process of its own environment
    os.environ.setdefault("RAY_prestart_worker_first_driver", "0")
    if os.environ.setdefault(LOOPBACK, "0") == "0":
        constants.ENABLE_RAY_CLUSTER = False


@contextmanager
def needed_alone() -> Iterator[None]:
    """A cluster that is started within has no autoscaler, no reader of logs and no dashboard's
    server, which Ray starts whether or not somebody asks for them: nothing here talks to them, and
    on two cores they are a tenth of a start, for one of which it waits."""
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
    """This process may join another machine's cluster next."""
    from ray._private import ray_constants

    constants: Any = ray_constants
    constants.ENABLE_RAY_CLUSTER = True
    os.environ.pop(LOOPBACK, None)


def _set_token() -> None:
    # one of this run's own leaves no file in the user's home, which would switch authentication on
    # for every cluster that they start later
    os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))


class Watch:
    """A thread that looks after Ray's own processes. Nothing can be done without them, and Ray
    itself waits a minute for them to come back before it ends its driver without a word: this ends
    it at once, with the reason in its last line."""

    EVERY = 0.5
    """Seconds between two looks."""

    def __init__(self) -> None:
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._work, name="ray-watch", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """From now on they may end."""
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
                # what is left of it would wait as long; actors end with the raylet
                node.kill_all_processes(check_alive=False, allow_graceful=False)
                os._exit(FAILED)  # no thread can be talked out of waiting for Ray


@contextmanager
def another_process_group() -> Iterator[None]:
    """Processes started within belong to another process group than this process. `timeout`, a
    shell's job control and service managers signal a group: SIGTERM would end Ray under a driver
    that still has to save."""
    ours = os.getpgrp()
    # ends with its input
    with subprocess.Popen(["cat"], stdin=subprocess.PIPE, process_group=0) as first:
        with suppress(PermissionError):  # the leader of a session cannot leave its group
            os.setpgid(0, first.pid)
        try:
            yield
        finally:
            with suppress(PermissionError):
                os.setpgid(0, ours)
