"""One process of a `WorkerPool`: its handle, `WorkerProcess`, and `main`, which runs in it.

It does one task at a time, and its limits are set before it imports anything. Requests are pickles;
replies are JSON, as unpickling the reply of untrusted code would run code here.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import json
import math
import os
import pickle
import resource
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from .processes import asleep, cpu_seconds, waited

_CLONE_NEWUSER, _CLONE_NEWNET = 0x10000000, 0x40000000
CPU_SLACK = 10
"""Processor seconds beyond the limit of a task after which the kernel ends a worker whose parent is
gone."""
MAX_REPLY = 64 * 2**20
_BOOT = (
    "import sys, json, os; sys.path[:] = json.loads(os.environ.pop('EMBERL_WORKER_PATH')); "
    "from {package}.worker_process import main; main(int(sys.argv[1]))"
)


class Ended(StrEnum):
    """The way a task ended."""

    DONE = "done"
    TIMEOUT = "timeout"
    MEMORY = "memory"
    CRASHED = "crashed"  # the task brought its worker down each time: by a signal or an exit
    RAISED = "raised"
    LOST = "lost"  # no worker could be had, or every one was killed from outside


@dataclass(frozen=True, slots=True)
class Answer:
    """The outcome of a task: if `ended` is DONE, the JSON value that the worker returned, else a
    message."""

    ended: Ended
    value: Any = None
    message: str = ""
    seconds: float = 0.0


class WorkerLost(Exception):
    """A worker ended, or broke the protocol. `final`: it reported why it cannot start."""

    def __init__(self, why: str, final: bool = False) -> None:
        super().__init__(why)
        self.final = final


class WorkerProcess:
    """A process and the socket to it, for one thread at a time except `stop`.

    Raises WorkerLost if the process ends or breaks the protocol.
    """

    def __init__(
        self, setup: Mapping[str, Any], environment: Mapping[str, str] | None, output: bool
    ) -> None:
        self.socket, theirs = socket.socketpair()
        self.ready = False
        self.served = 0
        self.stopped = False
        self._buffer = bytearray()
        environment = dict(os.environ if environment is None else environment)
        environment["EMBERL_WORKER_PATH"] = json.dumps([path or os.getcwd() for path in sys.path])
        boot = _BOOT.format(package=__name__.rpartition(".")[0])
        with theirs:
            try:
                self.process = subprocess.Popen(
                    [sys.executable, "-P", "-c", boot, str(theirs.fileno())],
                    pass_fds=(theirs.fileno(),),
                    stdin=subprocess.DEVNULL,
                    stdout=2 if output else subprocess.DEVNULL,
                    stderr=None if output else subprocess.DEVNULL,
                    env=environment,
                    start_new_session=True,  # one signal to the group ends what the worker started
                )
            except OSError:
                self.socket.close()
                raise
        with contextlib.suppress(WorkerLost):  # `wait_ready` says why it is gone
            self._send(setup)

    def quiet(self) -> bool:
        """Whether the process lives and has sent nothing unasked."""
        if not self.ready:
            return True
        self.socket.settimeout(0.0)
        try:
            self.socket.recv(1, socket.MSG_PEEK)
        except BlockingIOError:
            return not self._buffer
        except OSError:  # the connection is broken
            return False
        return False

    def wait_ready(self, timeout: float) -> None:
        if self.ready:
            return
        reply = self._receive(timeout)
        if reply is None:
            raise WorkerLost(f"the worker did not start within {timeout:g} s", final=True)
        if not isinstance(reply, dict) or not reply.get("ready"):
            said = str(reply.get("error")) if isinstance(reply, dict) else "a bad greeting"
            raise WorkerLost(said, final=True)
        self.ready = True

    def ask(self, task: Any, timeout: float) -> Answer:
        """Returns the outcome of the task. A worker is killed at its limit, and after `wall_limit`
        if the machine gave it too little time."""
        self.served += 1
        pid, sent = self.process.pid, time.monotonic()
        waited_before, used_before = waited(pid), cpu_seconds(pid)
        self._send({"task": task, "timeout": timeout, "number": self.served})
        look = timeout  # its time cannot be over before that
        while True:
            reply = self._receive(look)
            wall = time.monotonic() - sent
            if reply is not None:
                if not isinstance(reply, dict) or reply.get("number") != self.served:
                    raise WorkerLost("an answer that was not asked for")
                return _read_reply(reply, wall)
            own = wall - (waited(pid) - waited_before)
            if not asleep(pid):  # how long it has waited just now is not known
                own = min(own, cpu_seconds(pid) - used_before)
            if own >= timeout:
                self.stop()
                return Answer(Ended.TIMEOUT, None, f"stopped at the limit of {timeout:g} s", wall)
            if wall >= wall_limit(timeout):
                self.stop()
                message = f"the machine gave it only {own:.1f} s in {wall:.0f} s"
                return Answer(Ended.LOST, None, message, wall)
            look = max(timeout - own, 0.02)

    def _send(self, message: Any) -> None:
        payload = pickle.dumps(message)
        self.socket.settimeout(10.0)
        try:
            self.socket.sendall(struct.pack(">I", len(payload)) + payload)
        except OSError as error:  # it died, or does not read
            raise WorkerLost(f"the worker does not take tasks: {error}") from None

    def _receive(self, timeout: float) -> Any:
        """The next message; None after `timeout` seconds without one."""
        end = time.monotonic() + timeout
        while (size := self._size()) is None or len(self._buffer) < 4 + size:
            self.socket.settimeout(max(end - time.monotonic(), 0.001))
            try:
                chunk = self.socket.recv(1 << 16)
            except TimeoutError:
                return None
            except OSError as error:
                raise WorkerLost(f"the worker is gone: {error}") from None
            if not chunk:
                raise WorkerLost("the worker ended")
            self._buffer += chunk
        payload = bytes(self._buffer[4 : 4 + size])
        del self._buffer[: 4 + size]
        try:
            return json.loads(payload, parse_constant=_refuse)
        except (ValueError, RecursionError) as error:
            raise WorkerLost(f"a reply that is no JSON: {error}", final=True) from None

    def _size(self) -> int | None:
        """The size of the next message in bytes; None if it is not known yet."""
        if len(self._buffer) < 4:
            return None
        size = int.from_bytes(self._buffer[:4], "big")
        if size > MAX_REPLY:
            raise WorkerLost(f"a reply of {size} bytes", final=True)
        return size

    def stop(self) -> None:
        """Kills the process and all that it started. May be called from any thread."""
        self.stopped = True
        with contextlib.suppress(OSError):  # wakes the thread that waits for a reply
            self.socket.shutdown(socket.SHUT_RDWR)
        with contextlib.suppress(ProcessLookupError):
            if self.process.poll() is None:
                os.killpg(self.process.pid, signal.SIGKILL)

    def close(self) -> int:
        """Ends the process, if it has not ended by itself, and returns its exit status."""
        if not self.stopped:
            with contextlib.suppress(subprocess.TimeoutExpired):  # a dead one has a status to say
                self.process.wait(0.0 if self.quiet() else 0.2)
        self.stop()
        self.socket.close()
        try:
            return self.process.wait(10.0)
        except subprocess.TimeoutExpired:  # stuck in the kernel; no more can be done from here
            return -int(signal.SIGKILL)


def wall_limit(timeout: float) -> float:
    """Wall seconds after which a task is given up, however little own time it has had."""
    return 30 * timeout + 60


def _refuse(constant: str) -> None:
    """Rejects NaN and infinities, which Python reads although they are no JSON."""
    raise ValueError(f"{constant} in a reply")


def _read_reply(reply: Mapping[str, Any], seconds: float) -> Answer:
    if "value" in reply:
        return Answer(Ended.DONE, value=reply["value"], seconds=seconds)
    ended = Ended.MEMORY if reply.get("memory") else Ended.RAISED
    return Answer(ended, message=str(reply.get("error", ""))[:2000], seconds=seconds)


# --- the process itself


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
        serve: Callable[[Any], Any] = getattr(importlib.import_module(module), name)(
            **setup["arguments"]
        )
    # whatever a plugin's import raises, the other side must be told
    except BaseException as error:
        _reply(channel, {"error": describe(error)})
        os._exit(1)
    # a child of a plugin's must not answer in our place
    os.register_at_fork(after_in_child=channel.close)
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
    data = bytearray()
    while len(data) < count:
        if not (chunk := channel.recv(min(count - len(data), 1 << 20))):
            os._exit(0)  # the other side is gone
        data += chunk
    return bytes(data)


def _reply(channel: socket.socket, value: dict[str, Any]) -> None:
    payload = json.dumps(value, default=str).encode("utf-8", "replace")
    try:
        channel.sendall(struct.pack(">I", len(payload)) + payload)
    except OSError:
        os._exit(0)


def _leave_network() -> None:
    """Enters an empty network namespace if the kernel allows that, else does nothing."""
    if sys.platform != "linux":
        return
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(_CLONE_NEWNET) != 0:
        libc.unshare(_CLONE_NEWUSER | _CLONE_NEWNET)


def _limit_processor(timeout: float) -> None:
    used = sum(resource.getrusage(resource.RUSAGE_SELF)[:2])
    _, hard = resource.getrlimit(resource.RLIMIT_CPU)
    soft = math.ceil(used + timeout) + CPU_SLACK
    resource.setrlimit(
        resource.RLIMIT_CPU, (soft if hard == resource.RLIM_INFINITY else min(soft, hard), hard)
    )
