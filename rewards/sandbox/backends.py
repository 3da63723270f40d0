"""`ForkServer`: the handle on a fork server (`zygote.py`), and the command that starts it for each
back end."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..processes import asleep, descendants, stat_of, tells_waiting, waited
from . import seccomp
from .child_runner import FOR_ITS_THREADS, NO_RUN, ON_REQUEST, REPLY, REQUEST, RUN
from .runs import Limits, Outcome, Run, SandboxError, SandboxUnavailable
from .view import View, compiler, view_of
from .zygote import READY

_HERE = Path(__file__).resolve().parent
_START_SECONDS = 30.0  # to isolate itself, on a machine however loaded
_GRACE_SECONDS = 10.0  # beyond a run's own deadline, until the fork server counts as lost
_LOOK_SECONDS = 0.5  # between two looks at a run that takes long
_ENVIRONMENT = {
    "LD_BIND_NOW": "1",  # the fork server looks every symbol up once, or its children would
    "MALLOC_ARENA_MAX": "1",  # each thread would reserve 64 MiB of the address space it may have
}
_FOR_PRELOADED = {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
WITH_NAMESPACES = ("zygote", "bubblewrap")
"""Back ends with namespaces, where all processes end with process 1."""


class ForkServer:
    """A fork server, isolated and ready. Not thread-safe: it does one run at a time.

    Raises SandboxUnavailable if it cannot isolate itself, SandboxError if it was lost meanwhile.
    """

    def __init__(self, backend: str, preload: Sequence[str] = ()) -> None:
        self.backend = backend
        self.busy = False
        self._overslept = False
        self._started = 0.0
        self._folder = ""
        if backend not in WITH_NAMESPACES:
            self._folder = tempfile.mkdtemp(prefix="emberl-sandbox-")
            os.mkdir(f"{self._folder}/scratch")
        view = view_of(tuple(preload))
        if backend == "landlock":
            _link_packages(view, self._folder)
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs, open(os.memfd_create("errors"), "w+b") as errors:
            self._process = subprocess.Popen(
                _command(backend, theirs.fileno(), view),
                env=_ENVIRONMENT | (_FOR_PRELOADED if preload else {}),
                cwd="/",
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=errors,
                pass_fds=(theirs.fileno(),),
                start_new_session=True,  # the terminal's Ctrl-C is for the trainer
            )
            theirs.close()
            try:
                self._begin(_config(backend, view, preload, self._folder))
            except BaseException as error:
                self.close()
                errors.seek(0)
                said = errors.read(500).decode(errors="replace").strip()  # bwrap says why there
                if not isinstance(error, SandboxError):
                    raise
                refused = bool(said) or isinstance(error, SandboxUnavailable)
                kind = SandboxUnavailable if refused else SandboxError
                raise kind(f"{backend}: {said or error}") from None

    def _begin(self, config: dict[str, Any]) -> None:
        self._control.settimeout(_START_SECONDS)
        try:
            self._control.send(json.dumps(config).encode())
            answer = self._control.recv(1 << 12)
        except TimeoutError:
            raise SandboxUnavailable(f"no answer within {_START_SECONDS:g} s") from None
        except OSError as error:
            raise SandboxError(str(error)) from None
        if not answer:  # it would have said why: it was killed
            raise SandboxError("the process ended while it isolated itself")
        if answer != READY:
            raise SandboxUnavailable(answer.removeprefix(NO_RUN).decode(errors="replace"))

    def start(self, kind: int, limits: Limits, fds: Sequence[int]) -> None:
        """Starts a child on `fds`: its channel, source or program as descriptor 3, then 0, 1 and 2.
        Raises SandboxError."""
        assert not self.busy, "a fork server does one run at a time"
        self.busy = True
        self._overslept = False
        memory = limits.memory_mb << 20
        message = REQUEST.pack(
            kind, limits.wall_seconds, limits.seconds, memory, limits.output_bytes
        )
        self._control.settimeout(_GRACE_SECONDS)
        self._started = time.monotonic()
        try:
            socket.send_fds(self._control, [message], list(fds))
        except OSError as error:
            raise SandboxError(f"the sandbox process is gone: {error}") from None

    def stop(self) -> None:
        """Kills the child now; `finish` returns how it ended."""
        with contextlib.suppress(OSError):  # `finish` reports a fork server that is gone
            self._control.send(b"K")

    def excuse(self, seconds: float) -> None:
        """Excludes seconds in which the child waited for us from its time."""
        self._started += seconds

    def watch(self, limits: Limits) -> None:
        """Checks a run that takes long, and stops one that has slept beyond its limit.

        Raises SandboxError if the fork server has not ended a run at its deadline.
        """
        elapsed = time.monotonic() - self._started
        if elapsed > limits.wall_seconds + _GRACE_SECONDS:
            raise SandboxError("the sandbox process did not end a run at its deadline")
        if elapsed > limits.own_seconds and not self._overslept:
            if tells_waiting():
                pids = self._run_processes()
                slept = elapsed - sum(map(waited, pids))
                # The kernel counts a wait for a processor only when it ends: a starved run is not a
                # sleeping one.
                asleep_now = bool(pids) and all(map(asleep, pids))  # else it has just ended
                self._overslept = slept > limits.own_seconds and asleep_now
            else:  # all that is known is the time on the wall
                self._overslept = elapsed > limits.wall_seconds / 3
            if self._overslept:
                self.stop()

    def _run_processes(self) -> set[int]:
        """The processes of the run: those below the fork server that have no children."""
        below = set(descendants(self._process.pid))
        parents = {int(stat[1]) for pid in below if (stat := stat_of(pid)) is not None}
        return below - parents

    def finish(self, limits: Limits, patience: float | None = None) -> Run:
        """Waits for the end of the child and returns its run. Raises TimeoutError after `patience`
        seconds, SandboxError if the fork server was lost or the child ended by no doing of its
        own."""
        self._control.settimeout(limits.seconds + _LOOK_SECONDS if patience is None else patience)
        while True:
            try:
                reply = self._control.recv(1 << 12)
                break
            except TimeoutError:
                if patience is not None:
                    raise
                self.watch(limits)
                self._control.settimeout(_LOOK_SECONDS)
            except OSError as error:
                raise SandboxError(f"the sandbox process does not answer: {error}") from None
        if not reply:
            raise SandboxError("the sandbox process was killed")
        if reply.startswith(NO_RUN):
            self.busy = False
            raise SandboxError(reply.removeprefix(NO_RUN).decode(errors="replace"))
        if len(reply) != REPLY.size or not reply.startswith(RUN):
            raise SandboxError(f"the sandbox process sent {reply[:40]!r}")
        self.busy = False
        return self._run(limits, *REPLY.unpack(reply)[1:])

    def _run(
        self,
        limits: Limits,
        status: int,
        seconds: float,
        cpu: float,
        peak: int,
        cause: int,
        locked: int,
    ) -> Run:
        code = os.waitstatus_to_exitcode(status)
        used_up = cpu > limits.seconds or code in (-signal.SIGPROF, -signal.SIGXCPU)
        if used_up or self._overslept:
            outcome = Outcome.TIME_LIMIT
        elif cause == ON_REQUEST:
            outcome = Outcome.STOPPED
        elif not locked:
            raise SandboxError("a child could not be locked down")
        elif cause == FOR_ITS_THREADS:
            outcome = Outcome.THREAD_LIMIT
        elif code == -signal.SIGKILL and seconds > limits.wall_seconds:
            raise SandboxError(
                f"the machine gave a run {cpu:.1f} s of a processor in {seconds:.0f} s"
            )
        elif code == -signal.SIGKILL:  # no program in here can send a signal
            raise SandboxError(
                "a run was killed from outside, perhaps because the machine is out of memory"
            )
        elif code == -signal.SIGXFSZ:
            outcome = Outcome.OUTPUT_LIMIT
        else:
            outcome = Outcome.CRASHED if code < 0 else Outcome.EXITED
        return Run(
            outcome=outcome, exit_code=code, seconds=seconds, cpu_seconds=cpu, peak_bytes=peak
        )

    @property
    def pid(self) -> int:
        return self._process.pid

    def close(self) -> None:
        """Ends the fork server and with it everything in the sandbox."""
        # a process that was forked from this one may hold a copy open
        with contextlib.suppress(OSError):
            self._control.shutdown(socket.SHUT_RDWR)
        self._control.close()
        if self._folder:  # it ends what it has started, when it sees that we are gone
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(_GRACE_SECONDS)
        self._process.kill()
        # a process stuck in the kernel is the kernel's to end
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(_GRACE_SECONDS)
        if self._folder:
            if self._process.returncode != 0:
                _end_session(self._process.pid)
            shutil.rmtree(self._folder, ignore_errors=True)


def _end_session(leader: int) -> None:
    """Kills what a lost fork server without namespaces has left: a compiler's children, in its
    session."""
    for _ in range(100):  # they may fork while we look
        left = [
            int(entry.name)
            for entry in Path("/proc").iterdir()
            if entry.name.isdigit() and (stat := stat_of(int(entry.name))) is not None
            if int(stat[3]) == leader and stat[0] not in "ZX"
        ]
        if not left:
            return
        for pid in left:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)


def _link_packages(view: View, folder: str) -> None:
    """Links the requested packages into `folder`, as `/packages` where programs see the host's own
    file system: the packages installed beside them are not in it."""
    for path, target in view.packages:
        os.makedirs(os.path.dirname(folder + target), exist_ok=True)
        os.symlink(path, folder + target)


def _config(backend: str, view: View, preload: Sequence[str], folder: str) -> dict[str, Any]:
    """The settings of the fork server, with the text of files that it cannot read itself."""
    scratch = f"{folder}/scratch" if folder else "/tmp"
    isolated = backend in WITH_NAMESPACES
    flags = ["-O2", "-std=gnu++17", "-static", "-pipe", "-w", "-x", "c++", "-", "-o"]
    names = {
        "child": "child.py",
        "namespaces": "namespaces.py",
        "child_runner": "child_runner.py",
        "landlock": "landlock.py",
    }
    return {
        "kind": backend,
        "binds": (*view.binds, *view.packages),
        "masks": [pair[isolated] for pair in view.masks],
        "readable": [*view.readable, f"{folder}/packages"],
        "writable": [scratch],
        "folder": folder,
        "packages": (
            sys.path if backend == "unsafe" else [folder + each for each in view.search_path]
        ),
        "moved": view.moved,
        "preload": list(preload),
        "filters": _filters(),
        "compiler": [compiler() or "", *flags, f"{scratch}/run/program"],
        "scratch": f"{scratch}/run",
        **{name: (_HERE / file).read_text() for name, file in names.items()},
    }


def _filters() -> list[str]:
    """The filters for each kind of run: calls, program, native, compile. Raises SandboxUnavailable
    for an unknown machine."""
    if platform.machine() not in seccomp.NUMBERS:
        raise SandboxUnavailable(
            f"no system-call table for {platform.machine()}, only {', '.join(seccomp.NUMBERS)}"
        )
    rules = (seccomp.PYTHON, seccomp.PYTHON, seccomp.NATIVE, seccomp.COMPILER)
    return [seccomp.assemble(each).hex() for each in rules]


def _command(backend: str, fd: int, view: View) -> list[str]:
    python, script = os.path.realpath(sys.executable), str(_HERE / "zygote.py")
    flags = ["-I", "-S", "-B", "-X", "utf8"]
    if backend != "bubblewrap":  # the others isolate themselves
        return [python, *flags, script, str(fd)]
    command = [
        shutil.which("bwrap") or "bwrap",
        "--unshare-all",
        "--unshare-user",
        "--disable-userns",
        "--clearenv",
    ]
    command += [
        "--die-with-parent",
        "--as-pid-1",
        "--new-session",
        "--cap-drop",
        "ALL",
        "--hostname",
        "box",
    ]
    for name, value in _ENVIRONMENT.items():
        command += ["--setenv", name, value]
    command += ["--uid", "65534", "--gid", "65534"]
    for path, target in (*view.binds, *view.packages):
        command += (
            ["--symlink", os.readlink(path), target]
            if os.path.islink(path)
            else ["--ro-bind", path, target]
        )
    for _, path in view.masks:
        command += ["--tmpfs", path, "--remount-ro", path]
    for name in ("null", "zero", "random", "urandom"):
        command += ["--dev-bind", f"/dev/{name}", f"/dev/{name}"]
    inside = f"{view.moved[1]}/bin/{Path(python).name}"
    command += [
        "--ro-bind",
        python,
        inside,
        "--ro-bind",
        script,
        "/zygote.py",
        "--perms",
        "1777",
        "--size",
    ]
    command += [str(128 << 20), "--tmpfs", "/tmp", "--remount-ro", "/", "--chdir", "/"]
    return [*command, "--", inside, *flags, "/zygote.py", str(fd)]
