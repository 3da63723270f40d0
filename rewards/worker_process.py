"""The process at the other end of a `WorkerPool`: one task at a time, limits set before anything is imported."""

from __future__ import annotations

import ctypes
import importlib
import json
import math
import os
import pickle
import resource
import socket
import struct
import sys
from collections.abc import Callable
from typing import Any

_CLONE_NEWUSER, _CLONE_NEWNET = 0x10000000, 0x40000000
CPU_SLACK = 10
"""Processor seconds beyond a task's limit after which the kernel ends a worker whose parent is gone."""


def main(descriptor: int) -> None:
    """Serves until the other side closes the socket."""
    channel = socket.socket(fileno=descriptor)
    setup = _receive(channel)
    try:
        if not setup["network"]:
            _leave_network()
        if setup["memory_bytes"]:
            resource.setrlimit(resource.RLIMIT_AS, (setup["memory_bytes"], setup["memory_bytes"]))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        module, _, name = setup["target"].partition(":")
        serve: Callable[[Any], Any] = getattr(importlib.import_module(module), name)(**setup["arguments"])
    except BaseException as error:  # whatever a plugin's import does, the other side must hear of it
        _reply(channel, {"error": describe(error)})
        os._exit(1)
    os.register_at_fork(after_in_child=channel.close)  # a child of a plugin's must not answer in our place
    _reply(channel, {"ready": True})
    while True:
        request = _receive(channel)
        number = {"number": request["number"]}
        _limit_processor(request["timeout"])
        try:
            _reply(channel, number | {"value": serve(request["task"])})
        except MemoryError:
            _reply(channel, number | {"error": "out of memory", "memory": True})
            os._exit(0)  # what is left of the heap is not to be trusted
        except RecursionError:
            _reply(channel, number | {"error": "nested too deeply", "memory": True})
        except Exception as error:  # untrusted: a plugin, or a library fed with what a model wrote
            _reply(channel, number | {"error": describe(error)})


def describe(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error)[:1000]}"


def _receive(channel: socket.socket) -> Any:
    (length,) = struct.unpack(">I", _exactly(channel, 4))
    return pickle.loads(_exactly(channel, length))


def _exactly(channel: socket.socket, count: int) -> bytes:
    found = bytearray()
    while len(found) < count:
        if not (chunk := channel.recv(min(count - len(found), 1 << 20))):
            os._exit(0)  # the other side is gone
        found += chunk
    return bytes(found)


def _reply(channel: socket.socket, value: dict[str, Any]) -> None:
    payload = json.dumps(value, default=str).encode("utf-8", "replace")
    try:
        channel.sendall(struct.pack(">I", len(payload)) + payload)
    except OSError:
        os._exit(0)


def _leave_network() -> None:
    """An empty network namespace, where the kernel lets us have one; else the worker stays as it is."""
    if sys.platform != "linux":
        return
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(_CLONE_NEWNET) != 0:
        libc.unshare(_CLONE_NEWUSER | _CLONE_NEWNET)


def _limit_processor(timeout: float) -> None:
    used = sum(resource.getrusage(resource.RUSAGE_SELF)[:2])
    _, hard = resource.getrlimit(resource.RLIMIT_CPU)
    soft = math.ceil(used + timeout) + CPU_SLACK
    resource.setrlimit(resource.RLIMIT_CPU, (soft if hard == resource.RLIM_INFINITY else min(soft, hard), hard))
