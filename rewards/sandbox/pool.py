"""`Sandbox`: runs a model's programs isolated from the machine, in less than two milliseconds a
run.

Back ends, the first that works: `zygote` (own namespaces, `zygote.py`), `bubblewrap` (the same fork
server, isolated by `bwrap`, for machines where only a setuid helper may make namespaces),
`landlock` (without namespaces, for containers that allow none; a program can find out whether a
path of the host exists). Without any of them the sandbox refuses. A plain process with limits and a
system-call filter, which can read the host's files, runs only with `allow_unsafe=True`.

A run that fails by a fault of the sandbox raises `SandboxError`, after a second try on a fresh fork
server unless a session with the program has begun. A `Run` reports only what a program did itself.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
import os
import queue
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

from ..processes import processors
from .backends import ForkServer
from .child_runner import CALLS, COMPILE, NATIVE, PROGRAM
from .choose import choose_backend
from .runs import Limits, Outcome, ProgramEnded, Run, SandboxError, SandboxUnavailable
from .view import compiler

__all__ = [
    "Limits",
    "Outcome",
    "ProgramEnded",
    "Run",
    "Sandbox",
    "SandboxError",
    "SandboxUnavailable",
    "Session",
]

_DEFAULT = Limits()
_dump = json.JSONEncoder(check_circular=False).encode
COMPILER_LIMITS = Limits(seconds=30.0, memory_mb=1536, output_bytes=64 << 20)
_LOOK_SECONDS = 0.5  # between two looks at a run that takes long
_SEALS = 0x1 | 0x2 | 0x4 | 0x8  # F_SEAL_SEAL, SHRINK, GROW, WRITE
_MFD_EXEC = 0x10

T = TypeVar("T")


class Sandbox:
    """A pool of fork servers, each doing one run at a time. Thread-safe; all but the first start on
    demand.

    `workers`: concurrent runs, by default one per core that a CPU quota leaves. `backend`: None
    tries them in order. `preload`: modules that every child has imported before it is locked down;
    of the installed packages it sees only these and their dependencies. Raises SandboxUnavailable
    if the machine supports no back end.
    """

    def __init__(
        self,
        *,
        workers: int | None = None,
        backend: str | None = None,
        allow_unsafe: bool = False,
        preload: Sequence[str] = (),
    ) -> None:
        if workers is not None and workers < 1:
            raise ValueError(f"workers is {workers}; the sandbox needs at least 1")
        self.workers = workers or processors()
        self.preload = tuple(preload)
        server = choose_backend(backend, allow_unsafe, self.preload)
        self.backend = server.backend
        self._idle: queue.LifoQueue[ForkServer | None] = queue.LifoQueue()
        for each in (*[None] * (self.workers - 1), server):
            self._idle.put(each)
        self._closed = threading.Event()
        self.finished = 0
        """Runs that have ended so far, or nearly: threads may count two as one."""

    def close(self) -> None:
        """Ends the idle fork servers; a busy one ends with its run."""
        self._closed.set()
        with contextlib.suppress(queue.Empty):
            while True:
                if (server := self._idle.get_nowait()) is not None:
                    server.close()

    def __enter__(self) -> Sandbox:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @contextlib.contextmanager
    def session(
        self,
        request: Mapping[str, Any],
        limits: Limits = _DEFAULT,
        *,
        first: Mapping[str, Any] | None = None,
        upcoming: Sequence[Mapping[str, Any]] = (),
    ) -> Iterator[Session]:
        """Starts a child on `request` (see `child.py`) and yields a session of lines with it; kills
        it on leaving.

        `first`, the first message, is sent along with the request and saves a switch between the
        processes. `upcoming`, the messages after it, serve a remote sandbox only: here a program
        sees one message at a time.
        """
        with self._server(limits) as server:
            with _our_own_errors():
                ours, theirs = socket.socketpair()
            with ours:
                with theirs:
                    server.start(CALLS, limits, [theirs.fileno()])
                talk = Session(server, ours, limits)
                try:
                    talk.send(request, *(() if first is None else (first,)))
                    yield talk
                finally:
                    if server.busy:
                        server.stop()
                        # a lost fork server is replaced; the talk is over
                        with contextlib.suppress(SandboxError):
                            server.finish(limits)

    def run_program(
        self, code: str, stdin: bytes = b"", limits: Limits = _DEFAULT, *, usual: bool = False
    ) -> Run:
        """Runs a Python script on `stdin`. `usual`: the imports that contest programs rely on are
        made for it."""
        request = json.dumps({"task": "program", "code": [code], "usual": usual}).encode() + b"\n"
        return twice(lambda: self._run(PROGRAM, request, stdin, limits))

    def run_native(self, binary: bytes, stdin: bytes = b"", limits: Limits = _DEFAULT) -> Run:
        """Runs a binary from `compile_cpp` on `stdin`."""
        return twice(lambda: self._run(NATIVE, binary, stdin, limits))

    def compile_cpp(self, source: str, limits: Limits = COMPILER_LIMITS) -> tuple[bytes, Run]:
        """Compiles C++ (g++ -O2 -std=gnu++17 -static) in the sandbox. Returns the binary, empty if
        that failed, and the run of the compiler.

        Raises SandboxUnavailable without g++, and SandboxError if it compiles nothing at all, as on
        a full disk.
        """
        if compiler() is None:
            raise SandboxUnavailable("C++ needs g++ (apt install g++)")
        binary, run = twice(lambda: self._compile(source.encode("utf-8", "replace"), limits))
        if not binary and run.outcome is Outcome.EXITED:
            # A program that compiles on any machine tells an error in the source from a full disk.
            control, failure = twice(lambda: self._compile(b"int main() {}", limits))
            if not control:
                said = failure.stderr.decode("utf-8", "replace").strip()[:300]
                raise SandboxError(f"the compiler does not work here: {failure}: {said}")
        return binary, run

    def _compile(self, source: bytes, limits: Limits) -> tuple[bytes, Run]:
        with (
            _sealed(source) as text,
            _memfd() as binary,
            _memfd() as errors,
            self._server(limits) as server,
        ):
            server.start(COMPILE, limits, [binary, text, errors, errors])
            run = server.finish(limits)
            stderr = os.pread(errors, 1 << 16, 0)
            return os.pread(binary, limits.output_bytes, 0), dataclasses.replace(run, stderr=stderr)

    def _run(self, kind: int, first: bytes, stdin: bytes, limits: Limits) -> Run:
        with _sealed(first) as lead, _sealed(stdin) as source, _memfd() as out, _memfd() as errors:
            with self._server(limits) as server:
                server.start(kind, limits, [lead, source, out, errors])
                run = server.finish(limits)
            most = limits.output_bytes
            run = dataclasses.replace(
                run, stdout=os.pread(out, most, 0), stderr=os.pread(errors, min(most, 1 << 16), 0)
            )
        if run.stderr.rstrip().rpartition(b"\n")[2].startswith((b"MemoryError", b"std::bad_alloc")):
            run = dataclasses.replace(run, outcome=Outcome.MEMORY_LIMIT)
        return run

    @contextlib.contextmanager
    def _server(self, limits: Limits) -> Iterator[ForkServer]:
        """Yields a fork server for one run. One that is lost in it is replaced when it is next
        needed."""
        if self._closed.is_set():
            raise SandboxError("the sandbox is closed")
        server = self._free(limits)
        try:
            with _our_own_errors():
                server = server or ForkServer(self.backend, self.preload)
            yield server
        finally:
            if server is not None and (server.busy or self._closed.is_set()):
                server.close()
                server = None
            self.finished += 1
            self._idle.put(server)

    def _free(self, limits: Limits) -> ForkServer | None:
        """The next free fork server. Raises SandboxError if none finishes a run within the time of
        one: a long queue is no fault."""
        while True:
            finished = self.finished
            try:
                return self._idle.get(timeout=limits.wall_seconds + 60.0)
            except queue.Empty:
                if self.finished == finished:
                    raise SandboxError("no sandbox process became free") from None


class Session:
    """A session with one child, line by line. Waits end with the run's limit, or after a grace if
    the fork server does not enforce it."""

    def __init__(self, server: ForkServer, channel: socket.socket, limits: Limits) -> None:
        self._server = server
        self._channel = channel
        self._limits = limits
        self._received = bytearray()
        self._our_turn = 0.0  # when it began
        channel.settimeout(limits.seconds + _LOOK_SECONDS)

    def send(self, *messages: Mapping[str, Any]) -> None:
        """Sends a line for each message. Raises ProgramEnded, SandboxError."""
        self._send("".join([_dump(message) + "\n" for message in messages]).encode())

    def relay(self, line: bytes) -> None:
        """Sends a line from another session. Raises ProgramEnded, SandboxError."""
        self._send(line + b"\n")

    def _send(self, lines: bytes) -> None:
        if self._our_turn:
            self._server.excuse(time.monotonic() - self._our_turn)
        rest = memoryview(lines)
        while rest:
            try:
                rest = rest[self._channel.send(rest) :]
            except TimeoutError:
                self._look()
            except OSError:  # the child is gone
                raise ProgramEnded(self._server.finish(self._limits)) from None

    def receive(self) -> bytes:
        """Returns the child's next line, untrusted and of at most `output_bytes`. Raises
        ProgramEnded, SandboxError."""
        while (end := self._received.find(b"\n")) < 0:
            if len(self._received) > self._limits.output_bytes:
                self._server.stop()
                run = self._server.finish(self._limits)
                raise ProgramEnded(dataclasses.replace(run, outcome=Outcome.OUTPUT_LIMIT))
            try:
                chunk = self._channel.recv(1 << 16)
            except TimeoutError:
                self._look()
                continue
            except ConnectionError:
                chunk = b""
            if not chunk:
                raise ProgramEnded(self._end())
            self._received += chunk
        line = bytes(self._received[:end])
        del self._received[: end + 1]
        self._our_turn = time.monotonic()
        return line

    def _look(self) -> None:
        self._server.watch(self._limits)
        self._channel.settimeout(_LOOK_SECONDS)

    def _end(self) -> Run:
        """Returns the run of a child that has closed its channel; a child that lives on is
        killed."""
        try:
            # A child killed from outside must not be reported as one that we stopped: wait for its
            # own end first.
            return self._server.finish(self._limits, patience=_LOOK_SECONDS)
        except TimeoutError:
            self._server.stop()
            return self._server.finish(self._limits)


@contextlib.contextmanager
def _our_own_errors() -> Iterator[None]:
    """Turns an OSError in this process (no descriptors, memory, processes or disk space) into a
    SandboxError, as it says nothing about the program."""
    try:
        yield
    except OSError as error:
        raise SandboxError(f"{type(error).__name__}: {error}") from None


def twice(action: Callable[[], T]) -> T:
    """Returns the result of `action`, called again after a SandboxError: a killed fork server loses
    no run."""
    with _our_own_errors():
        try:
            return action()
        except SandboxUnavailable:
            raise
        except SandboxError:
            return action()


@contextlib.contextmanager
def _memfd(content: bytes = b"") -> Iterator[int]:
    """An anonymous file in memory, which ends with its last descriptor."""
    flags = os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING
    try:
        fd = os.memfd_create("sandbox", flags | _MFD_EXEC)
    except OSError:  # before Linux 6.3 every memfd may be executed
        fd = os.memfd_create("sandbox", flags)
    try:
        view = memoryview(content)
        while view:
            view = view[os.write(fd, view) :]
        os.lseek(fd, 0, os.SEEK_SET)
        yield fd
    finally:
        os.close(fd)


@contextlib.contextmanager
def _sealed(content: bytes) -> Iterator[int]:
    """A file in memory that can no longer be changed."""
    with _memfd(content) as fd:
        fcntl.fcntl(fd, 1033, _SEALS)  # F_ADD_SEALS
        yield fd
