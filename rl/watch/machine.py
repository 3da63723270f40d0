"""The machine that `emberl doctor` examines, and the lines that it prints. Loads no torch."""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from ...rewards.processes import processors
from ...rewards.sandbox.choose import choose_backend
from ...rewards.sandbox.runs import SandboxUnavailable
from ..config.load import Config

PATIENCE = 5.0
"""Seconds for an answer of a program or of another machine."""


class State(StrEnum):
    OK = "ok"
    WARNING = "warning"
    ERROR = "error"


@dataclass(frozen=True, kw_only=True, slots=True)
class Check:
    """One line, e.g. `Check(name="/dev/shm", state=State.OK, text="24.0 GiB free")`."""

    name: str
    state: State
    text: str
    """The finding."""
    fix: str = ""
    """The remedy; "" if all is well."""

    def __str__(self) -> str:
        line = f"{self.state:8} {self.name:18} {self.text}"
        return f"{line} -> {self.fix}" if self.fix else line


class Machine:
    """The machine that checks examine; tests replace it by one with answers of their own.

    config: the run to be made here; None: unknown, and then nothing that only some runs need is an
    error.
    """

    def __init__(
        self, config: Config | None = None, environ: Mapping[str, str] = os.environ
    ) -> None:
        self.config = config
        self.environ = environ

    def lacking(self, needed: bool) -> State:
        """The state for something absent: an error if the configuration needs it."""
        return State.ERROR if needed and self.config is not None else State.WARNING

    def version(self, package: str) -> str | None:
        """The version of an installed distribution; None if it is not installed."""
        try:
            return importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            return None

    def python(self) -> str:
        return platform.python_version()

    def requirements(self) -> tuple[str, ...]:
        """The requirements of emberl's distribution, as in pyproject.toml."""
        return tuple(importlib.metadata.requires("emberl") or ())

    def read(self, path: str) -> str | None:
        """A file's text; None if it cannot be read."""
        try:
            return Path(path).read_text(errors="replace")
        except OSError:
            return None

    def exists(self, path: str) -> bool:
        return Path(path).exists()

    def listing(self, folder: str) -> list[str]:
        """The names in a folder; [] if it cannot be read."""
        try:
            return sorted(os.listdir(folder))
        except OSError:
            return []

    def package(self, name: str) -> str | None:
        """The folder from which a package would be imported, found without importing it."""
        spec = importlib.util.find_spec(name)
        places = [] if spec is None else list(spec.submodule_search_locations or ())
        return places[0] if places else None

    def output(self, *command: str) -> str | None:
        """A program's stdout; None if it is absent, fails or is slower than `PATIENCE`."""
        try:
            ran = subprocess.run(
                command, capture_output=True, text=True, timeout=PATIENCE, check=False
            )
        except (OSError, subprocess.TimeoutExpired):
            return None
        return ran.stdout if ran.returncode == 0 else None

    def which(self, program: str) -> str | None:
        return shutil.which(program)

    def writable(self, path: str) -> bool:
        return os.access(path, os.W_OK)

    def free(self, path: str) -> int:
        """Free bytes on the disk of a path. Raises OSError if there is no such path."""
        return shutil.disk_usage(path).free

    def cores(self) -> tuple[int, int]:
        """(processors that this process may use, processors of the machine)."""
        return processors(), os.cpu_count() or 1

    def limit(self, name: str) -> tuple[int, int]:
        """(soft, hard) limit, e.g. of `RLIMIT_NOFILE`; -1: none."""
        soft, hard = resource.getrlimit(getattr(resource, name))
        return soft, hard

    def sandbox(self) -> str:
        """The sandbox back end of code rewards, by a trial. Raises SandboxUnavailable."""
        server = choose_backend(None, allow_unsafe=False)
        server.close()
        return server.backend

    def hostname(self) -> str:
        return socket.gethostname()

    def addresses(self, host: str) -> list[str]:
        """The IP addresses of a host name; [] if it does not resolve."""
        try:
            return sorted({str(info[4][0]) for info in socket.getaddrinfo(host, None)})
        except OSError:
            return []

    def outward(self) -> str:
        """This machine's address on its route to others, as Ray takes it, or loopback."""
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            try:
                # sends nothing: connecting a UDP socket only chooses the route
                probe.connect(("8.8.8.8", 80))
                return str(probe.getsockname()[0])
            except OSError:
                return "127.0.0.1"

    def can_listen(self, port: int = 0, host: str = "127.0.0.1") -> bool:
        with socket.socket() as probe:
            try:
                probe.bind((host, port))
            except OSError:
                return False
        return True

    def reaches(self, host: str, port: int) -> str | None:
        """The error of a TCP connection to host:port; None if it succeeds."""
        try:
            socket.create_connection((host, port), timeout=PATIENCE).close()
        except OSError as error:
            return str(error)
        return None

    def joins(self, address: str) -> str | None:
        """The reason why no Ray cluster can be joined at host:port; None if one can."""
        from ..joining import why_no_head

        return why_no_head(address)

    def live(
        self, part: str, order: Mapping[str, Any], deadline: float, environ: Mapping[str, str]
    ) -> dict[str, Any]:
        """The result of a part of `live.py`, run in a process of its own that is killed after
        `deadline` seconds with all that it started; {"error": the reason} if it has none."""
        command = [sys.executable, "-m", f"{__package__}.live", part, json.dumps(order)]
        with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
            done = _group_ended(command, deadline, environ, out, err)
            said = [_lines(file) for file in (out, err)]
        if done is None:
            return {"error": f"no answer in {deadline:g} s{self._beside_others()}"}
        # the last line that is JSON: an engine's processes print to stdout, too
        for line in reversed(said[0] if done == 0 else []):
            with contextlib.suppress(ValueError):
                answer = json.loads(line)
                if isinstance(answer, dict):
                    return answer
        lines = said[1] or said[0] or [f"it ended with status {done}"]
        # the line with the error's type: its message may go on for several lines
        named = [line for line in lines if re.match(r"[\w.]*(Error|Exception|Exit)\b", line)]
        return {"error": (named or lines)[-1].strip()[:500]}

    def _beside_others(self) -> str:
        """A remark on the load, if it is more than twice the processors; else ""."""
        load, cores = os.getloadavg()[0], self.cores()[0]
        return f" (load {load:.0f} on {cores} processors)" if load > 2 * cores else ""


def _lines(file: Any) -> list[str]:
    file.seek(0)
    return str(file.read()).strip().splitlines()


def _group_ended(
    command: list[str], deadline: float, environ: Mapping[str, str], out: Any, err: Any
) -> int | None:
    """The exit status of a command; None at its deadline. Always kills its process group."""
    process = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=out, stderr=err, env=dict(environ),
        start_new_session=True,
    )  # fmt: skip
    ended, until = None, time.monotonic() + deadline
    try:
        while ended is None and time.monotonic() < until:
            # without reaping it: until then no other group can get its id, which `killpg` takes
            ended = os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            time.sleep(0.0 if ended else 0.05)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        status = process.wait()
    return status if ended else None


Examination = Callable[[Machine], Iterable[Check]]
"""An examination of the doctor: checks one thing and yields a line or a few."""


def worst(checks: Iterable[Check]) -> State:
    """The state that decides the exit code."""
    states = [check.state for check in checks]
    return next((state for state in (State.ERROR, State.WARNING) if state in states), State.OK)


def examined(machine: Machine, examinations: Iterable[Examination]) -> Iterator[Check]:
    """The checks of all examinations, in order."""
    for examination in examinations:
        yield from examination(machine)


__all__ = ["Check", "Examination", "Machine", "SandboxUnavailable", "State", "examined", "worst"]
