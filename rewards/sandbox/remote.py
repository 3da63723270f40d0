"""`RemoteSandbox`: runs programs on another machine by Sandbox Fusion's protocol (`POST
URL/run_code`).

For machines that support no sandbox. Differences from the local one: isolation and limits are those
of the service (it limits wall time, so that its load can change a verdict), the inputs of a
function test are sent all at once, and a program that kills itself cannot be told from one that is
killed.

A service that is busy (429), fails (5xx, `SandboxError`) or cannot be reached is asked again for a
while; then the run raises SandboxError, which is no verdict.
"""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import httpx

from .runs import Limits, Outcome, ProgramEnded, Run, SandboxError, SandboxUnavailable

_ATTEMPTS = 5
_MOST_PAUSE = 20.0  # seconds between two attempts
_ANSWER_SECONDS = 60.0  # beyond the limits of the run: the far side's queue and the network
_DEFAULT = Limits()
_COMPILING = Limits(seconds=30.0, memory_mb=1536, output_bytes=64 << 20)
_CHILD = Path(__file__).with_name("child.py").read_text()
# Once LINES are used up `read_line` sees the end of the channel, which ends the child.
_TALK = """
import os
replies, null = os.dup(1), os.open("/dev/null", os.O_RDWR)
os.dup2(null, 0)
os.dup2(null, 1)
names = {"__name__": "child"}
exec(compile(CHILD, "<child>", "exec"), names)
names["CHANNEL"] = replies
names["_received"].extend(LINES)
names["read_line"].__defaults__ = (lambda *_: b"", *names["read_line"].__defaults__[1:])
names["main"]()
"""
# `run_program` closes its channel first: here that is a copy of stdin.
_USUAL = """
import os
names = {"__name__": "child"}
exec(compile(CHILD, "<child>", "exec"), names)
names["CHANNEL"] = os.dup(0)
names["run_program"]({"code": [CODE], "usual": True})
"""


class RemoteSandbox:
    """The methods of `Sandbox` for a service at `url`, e.g. `http://10.0.0.5:8080`. Thread-safe.

    `workers`: concurrent requests; `preload`: modules that must be installed there. Raises
    ValueError for a malformed option, SandboxUnavailable if the service does not answer or lacks a
    module.
    """

    backend = "remote"

    def __init__(
        self, url: str, *, workers: int | None = None, preload: Sequence[str] = ()
    ) -> None:
        if not url.startswith(("http://", "https://")):
            raise ValueError(f"url is {url!r}; it must be one such as http://HOST:8080")
        if workers is not None and workers < 1:
            raise ValueError(f"workers is {workers}; the sandbox needs at least 1")
        self.workers = workers or 16
        self.finished = 0
        """Runs that have ended so far, or nearly: threads may count two as one."""
        self._address = url.rstrip("/") + "/run_code"
        connections = httpx.Limits(max_connections=self.workers)
        self._client = httpx.Client(limits=connections, trust_env=False)
        self._free = threading.BoundedSemaphore(self.workers)
        try:
            run = self.run_program("".join(f"import {name}\n" for name in preload) + "print(6 * 7)")
        except SandboxError as error:
            self.close()
            raise SandboxUnavailable(f"no sandbox at {url}: {error}") from None
        if run.stdout.strip() != b"42":
            self.close()
            raise SandboxUnavailable(
                f"the sandbox at {url} does not run Python: {run} {run.stderr[:200]!r}"
            )

    def close(self) -> None:
        self._client.close()

    def __enter__(self) -> RemoteSandbox:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def run_program(
        self, code: str, stdin: bytes = b"", limits: Limits = _DEFAULT, *, usual: bool = False
    ) -> Run:
        """Runs a Python script on `stdin`. `usual`: the imports that contest programs rely on are
        made for it."""
        if usual:
            code = f"CHILD, CODE = {_CHILD!r}, {code!r}\n{_USUAL}"
        _, run = self._post("python", code, stdin, limits)
        assert run is not None, "Python is not compiled"
        return run

    def compile_cpp(self, source: str, limits: Limits = _COMPILING) -> tuple[bytes, Run]:
        """Compiles C++ there. Returns the source for `run_native`, empty if it does not compile,
        and the run of the compiler."""
        compilation, _ = self._post("cpp", source, b"", _DEFAULT, limits.own_seconds)
        assert compilation is not None, "C++ is compiled"
        return (source.encode() if compilation.exit_code == 0 else b""), compilation

    def run_native(self, binary: bytes, stdin: bytes = b"", limits: Limits = _DEFAULT) -> Run:
        """Compiles and runs a source from `compile_cpp` on `stdin`."""
        compilation, run = self._post("cpp", binary.decode(), stdin, limits, _COMPILING.own_seconds)
        assert compilation is not None, "C++ is compiled"
        return run or compilation

    @contextlib.contextmanager
    def session(
        self,
        request: Mapping[str, Any],
        limits: Limits = _DEFAULT,
        *,
        first: Mapping[str, Any] | None = None,
        upcoming: Sequence[Mapping[str, Any]] = (),
    ) -> Iterator[RemoteSession]:
        """Yields a session as with a local child. With all later messages in `upcoming` it takes a
        single request."""
        talk = RemoteSession(
            self, request, limits, [*([] if first is None else [first]), *upcoming]
        )
        if first is not None:
            talk.send(first)
        yield talk

    def _post(
        self, language: str, code: str, stdin: bytes, limits: Limits, compile_seconds: float = 10.0
    ) -> tuple[Run | None, Run | None]:
        """The runs of the compiler (None for Python) and of the program (None if it did not
        compile)."""
        body = {
            "language": language,
            "code": code,
            "stdin": stdin.decode("utf-8", "replace"),
            "compile_timeout": compile_seconds,
            "run_timeout": limits.own_seconds,
            "memory_limit_MB": limits.memory_mb,
        }
        with self._free:  # a holder's requests all have deadlines
            answer = self._asked(body, compile_seconds + limits.own_seconds + _ANSWER_SECONDS)
        self.finished += 1
        compilation = _read(answer.get("compile_result"), limits) if language != "python" else None
        compiled = compilation is None or compilation.exit_code == 0
        run = _read(answer.get("run_result"), limits) if compiled else None
        return compilation, run

    def _asked(self, body: Mapping[str, Any], seconds: float) -> dict[str, Any]:
        """The service's answer. Raises SandboxError if no attempt brings one."""
        problem, pause = "", 0.5
        for attempt in range(_ATTEMPTS):
            if attempt:
                time.sleep(min(pause, _MOST_PAUSE))
                pause *= 2
            try:
                reply = self._client.post(
                    self._address, json=body, timeout=httpx.Timeout(seconds, connect=10.0)
                )
                if reply.status_code == 429 or reply.status_code >= 500:
                    problem = f"it answered {reply.status_code}"
                    pause = max(pause, _seconds(reply.headers.get("Retry-After")))
                    continue
                if reply.status_code != 200:
                    raise SandboxError(f"it answered {reply.status_code} to POST {self._address}")
                answer = reply.json()
            except (httpx.HTTPError, ValueError) as error:  # the network, or no JSON
                problem = f"{type(error).__name__} {error}".strip()
                continue
            if isinstance(answer, dict) and answer.get("status") in ("Success", "Failed"):
                return answer
            problem = f"it answered {str(answer)[:200]}"
        raise SandboxError(f"the remote sandbox gave no run in {_ATTEMPTS} attempts: {problem}")


class RemoteSession:
    """A session with a program that is run again, with all messages so far, for every message that
    was not foreseen."""

    def __init__(
        self,
        box: RemoteSandbox,
        request: Mapping[str, Any],
        limits: Limits,
        foreseen: Sequence[Mapping[str, Any]],
    ) -> None:
        self._box = box
        self._request = request
        self._limits = limits
        self._foreseen = list(foreseen)
        self._sent: list[Mapping[str, Any]] = []
        self._replies: list[bytes] = []
        self._asked: list[Mapping[str, Any]] | None = None
        self._run: Run | None = None
        self._received = 0

    def send(self, *messages: Mapping[str, Any]) -> None:
        self._sent += messages

    def relay(self, line: bytes) -> None:
        """Sends a line from another session."""
        self._sent.append(json.loads(line))

    def receive(self) -> bytes:
        """Returns the program's next line, untrusted. Raises ProgramEnded, SandboxError."""
        if self._asked is None or self._asked[: len(self._sent)] != self._sent:
            foreseen = self._foreseen[: len(self._sent)] == self._sent
            self._ask(
                self._foreseen
                if foreseen and len(self._foreseen) > len(self._sent)
                else list(self._sent)
            )
        if self._received >= len(self._replies):
            assert self._run is not None, "it was asked"
            raise ProgramEnded(self._run)
        self._received += 1
        return self._replies[self._received - 1]

    def _ask(self, messages: list[Mapping[str, Any]]) -> None:
        lines = "".join(json.dumps(each) + "\n" for each in (self._request, *messages)).encode()
        code = f"CHILD = {_CHILD!r}\nLINES = {lines!r}\n{_TALK}"
        self._run = self._box.run_program(code, limits=self._limits)
        self._asked = messages
        self._replies = self._run.stdout.split(b"\n")[:-1]


def _read(result: Any, limits: Limits) -> Run:
    """The run of one command. Raises SandboxError if the result says nothing about a program."""
    if not isinstance(result, dict) or result.get("status") not in (
        "Finished",
        "TimeLimitExceeded",
    ):
        raise SandboxError(f"the remote sandbox did not run the program: {str(result)[:200]}")
    late, code = result["status"] == "TimeLimitExceeded", result.get("return_code")
    if not late and type(code) is not int:
        raise SandboxError(f"the remote sandbox sent no exit code: {str(result)[:200]}")
    stdout, stderr = (
        str(result.get(name) or "").encode("utf-8", "replace") for name in ("stdout", "stderr")
    )
    outcome = Outcome.EXITED if type(code) is int and code >= 0 else Outcome.CRASHED
    if late:
        outcome = Outcome.TIME_LIMIT
    elif len(stdout) > limits.output_bytes:
        outcome = Outcome.OUTPUT_LIMIT
    elif stderr.rstrip().rpartition(b"\n")[2].startswith((b"MemoryError", b"std::bad_alloc")):
        outcome = Outcome.MEMORY_LIMIT
    seconds = _seconds(result.get("execution_time"))
    return Run(
        outcome=outcome,
        exit_code=code if type(code) is int else -9,
        seconds=seconds,
        cpu_seconds=seconds,
        peak_bytes=0,
        stdout=stdout[: limits.output_bytes],
        stderr=stderr[: 1 << 16],
    )


def _seconds(text: Any) -> float:
    try:
        return max(0.0, float(text))
    except (TypeError, ValueError):  # absent, or a date
        return 0.0
