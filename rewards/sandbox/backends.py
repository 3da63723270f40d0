"""`Mother`: the parent's handle on one mother process (`zygote.py`), and the back ends that build walls around it."""

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
import sysconfig
import uuid
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from . import seccomp
from .zygote import CALLS, REPLY, REQUEST

_HERE = Path(__file__).resolve().parent
_START_SECONDS = 30.0  # to build the walls, on a machine however loaded
_GRACE_SECONDS = 10.0  # beyond a run's own deadline, until the mother process counts as lost
_BINDING = {"LD_BIND_NOW": "1"}  # the mother process looks every symbol up once, or its children would
_FOR_PRELOADED = {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
_FIX = (
    "allow user namespaces (sysctl user.max_user_namespaces=10000, kernel.apparmor_restrict_unprivileged_userns=0; in a "
    "container --cap-add SYS_ADMIN or --security-opt seccomp=unconfined) or install bubblewrap (apt install bubblewrap)"
)


class SandboxError(RuntimeError):
    """The sandbox failed; says nothing about the program that it was to run."""


class SandboxUnavailable(SandboxError, ValueError):
    """This machine gives no sandbox; the message says why and what to do."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """What one run may use."""

    seconds: float = 5.0
    """Wall and CPU time of the run: all calls of a function test together, or one run of a program."""
    memory_mb: int = 512
    """Address space in MiB, the interpreter's own 30 or so included."""
    output_bytes: int = 1 << 20
    """Most bytes of each of stdout and stderr, and of one returned value."""

    def __post_init__(self) -> None:
        if not 0 < self.seconds <= 3600:
            raise ValueError(f"limits.seconds is {self.seconds}; it must be above 0 and at most 3600")
        if self.memory_mb < 64:
            raise ValueError(f"limits.memory_mb is {self.memory_mb}; an interpreter needs at least 64")
        if not 0 < self.output_bytes <= 1 << 28:
            raise ValueError(f"limits.output_bytes is {self.output_bytes}; it must be between 1 and 2**28")


class Outcome(StrEnum):
    """How a run ended; everything here is the program's own doing."""

    EXITED = "exited"
    CRASHED = "crashed"
    TIME_LIMIT = "time limit"
    MEMORY_LIMIT = "memory limit"
    OUTPUT_LIMIT = "output limit"
    STOPPED = "stopped"  # by the parent, which had heard enough


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """One finished run, e.g. `Run(outcome=Outcome.EXITED, exit_code=0, stdout=b"5\\n", ...)`."""

    outcome: Outcome
    exit_code: int
    """Of the process; minus the signal's number if one ended it."""
    seconds: float
    cpu_seconds: float
    peak_bytes: int
    stdout: bytes = b""
    stderr: bytes = b""

    def __str__(self) -> str:
        if self.outcome is Outcome.CRASHED:
            names = {entry.value: entry.name for entry in signal.Signals}
            return f"ended by {names.get(-self.exit_code, 'a signal')}"
        return f"exit code {self.exit_code}" if self.outcome is Outcome.EXITED else str(self.outcome)


class Mother:
    """One mother process behind finished walls. Not thread-safe: one run at a time.

    Raises SandboxUnavailable if the walls cannot be built.
    """

    def __init__(self, backend: str, preload: Sequence[str] = ()) -> None:
        self.backend = backend
        self.busy = self.stopped = False
        view = _view(preload)
        scratch = "/tmp/run" if backend != "unsafe" else f"/tmp/emberl-sandbox-{uuid.uuid4().hex}"
        config = {
            "kind": backend,
            "binds": view.binds,
            "masks": view.masks,
            "packages": view.packages if backend != "unsafe" else sys.path,
            "moved": view.moved,
            "preload": list(preload),
            "filters": _filters(),
            "inmate": (_HERE / "child.py").read_text(),
            "namespaces": (_HERE / "namespaces.py").read_text(),
            "compiler": [
                compiler() or "",
                *["-O2", "-std=gnu++17", "-static", "-pipe", "-w", "-x", "c++", "-", "-o"],
                scratch + "/program",
            ],
            "scratch": scratch,
        }
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self._process = subprocess.Popen(
                _command(backend, theirs.fileno(), view),
                env=_FOR_PRELOADED | _BINDING if preload else _BINDING,
                cwd="/",
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE if backend == "bubblewrap" else subprocess.DEVNULL,
                pass_fds=(theirs.fileno(),),
                start_new_session=True,  # the terminal's Ctrl-C is for the trainer
            )
        try:
            self._begin(config)
        except BaseException:
            self.close()
            raise

    def _begin(self, config: dict[str, Any]) -> None:
        self._control.settimeout(_START_SECONDS)
        try:
            self._control.send(json.dumps(config).encode())
            answer = json.loads(self._control.recv(1 << 16) or "{}")
        except TimeoutError:
            answer = {"error": f"no answer within {_START_SECONDS:g} s"}
        except OSError as error:
            answer = {"error": str(error)}
        if "ready" in answer:
            return
        message = answer.get("error", "the process ended while it built its walls")
        if self._process.stderr is not None:  # bwrap says why on stderr
            self._process.kill()
            message = self._process.stderr.read(500).decode(errors="replace").strip() or message
        raise SandboxUnavailable(f"{self.backend}: {message}")

    def start(self, kind: int, limits: Limits, fds: Sequence[int]) -> None:
        """Starts a child on `fds`: its channel, source or program at 3, then 0, 1 and 2. Raises SandboxError."""
        assert not self.busy, "a mother process does one run at a time"
        self.busy, self.stopped = True, False
        cpu = max(1.0, -(-limits.seconds // 1))
        message = REQUEST.pack(kind, limits.seconds, cpu, limits.memory_mb << 20, limits.output_bytes)
        self._control.settimeout(_GRACE_SECONDS)
        try:
            socket.send_fds(self._control, [message], list(fds))
        except OSError as error:
            raise SandboxError(f"the sandbox process is gone: {error}") from None

    def stop(self) -> None:
        """Kills the child now; `finish` still tells how it ended."""
        self.stopped = True
        with contextlib.suppress(OSError):  # `finish` reports a mother process that is gone
            self._control.send(b"K")

    def finish(self, limits: Limits) -> Run:
        """Waits for the child's end. Raises SandboxError if the mother process was lost or the child ended through no
        doing of its own."""
        self._control.settimeout(limits.seconds + _GRACE_SECONDS)
        try:
            reply = self._control.recv(REPLY.size)
        except OSError as error:
            raise SandboxError(f"the sandbox process does not answer: {error}") from None
        if len(reply) != REPLY.size:
            raise SandboxError("the sandbox process was killed")
        self.busy = False
        status, seconds, cpu, peak, late, locked = REPLY.unpack(reply)
        code = os.waitstatus_to_exitcode(status)
        over_cpu = code == -signal.SIGXCPU or (code == -signal.SIGKILL and cpu >= limits.seconds)
        if late or over_cpu:
            outcome = Outcome.TIME_LIMIT
        elif code == -signal.SIGKILL and self.stopped:
            outcome = Outcome.STOPPED
        elif not locked:
            raise SandboxError("a child could not be locked down")
        elif code == -signal.SIGKILL:  # no program in here can send a signal
            raise SandboxError("a run was killed from outside, perhaps because the machine is out of memory")
        elif code == -signal.SIGXFSZ:
            outcome = Outcome.OUTPUT_LIMIT
        else:
            outcome = Outcome.CRASHED if code < 0 else Outcome.EXITED
        return Run(outcome=outcome, exit_code=code, seconds=seconds, cpu_seconds=cpu, peak_bytes=peak)

    @property
    def pid(self) -> int:
        return self._process.pid

    def close(self) -> None:
        """Kills the process and with it everything behind the walls."""
        self._control.close()
        self._process.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):  # a process stuck in the kernel is the kernel's to end
            self._process.wait(_GRACE_SECONDS)
        if self._process.stderr is not None:
            self._process.stderr.close()


def compiler() -> str | None:
    """The path of g++, or None."""
    return shutil.which("g++", path="/usr/bin:/usr/local/bin")


def choose_backend(backend: str | None, allow_unsafe: bool, preload: Sequence[str] = ()) -> Mother:
    """A mother process of the first back end that works and passes a trial run; SandboxUnavailable if none does."""
    if backend not in (None, "zygote", "bubblewrap", "unsafe"):
        raise ValueError(f"sandbox backend {backend!r} is unknown; use 'zygote' or 'bubblewrap', or leave it out")
    if backend == "unsafe" and not allow_unsafe:
        raise ValueError("sandbox backend 'unsafe' needs allow_unsafe: true")
    failures: list[str] = []
    for name in (backend,) if backend else ("zygote", "bubblewrap", *(("unsafe",) if allow_unsafe else ())):
        try:
            mother = _tried(name, preload)
        except SandboxUnavailable as error:
            failures.append(str(error))
            continue
        if name == "unsafe":
            warnings.warn(
                "UNSAFE: model programs run without a sandbox; they can read every file that this user can read "
                f"({'; '.join(failures) or 'asked for'}). To fix: {_FIX}",
                RuntimeWarning,
                stacklevel=3,
            )
        return mother
    raise SandboxUnavailable(f"no sandbox on this machine: {'; '.join(failures)}. To fix: {_FIX}")


def _tried(backend: str, preload: Sequence[str]) -> Mother:
    """Starts a mother process and runs an empty child, so that a filter that the kernel refuses shows now."""
    if not sys.platform.startswith("linux"):
        raise SandboxUnavailable(f"{backend}: only Linux has what it needs")
    if backend == "bubblewrap" and shutil.which("bwrap") is None:
        raise SandboxUnavailable("bubblewrap: bwrap is not installed")
    mother = Mother(backend, preload)
    limits = Limits()
    try:
        ours, theirs = socket.socketpair()
        with ours, theirs:
            mother.start(CALLS, limits, [theirs.fileno()])
            ours.shutdown(socket.SHUT_WR)  # the child reads the end of its channel and leaves
            theirs.close()
            run = mother.finish(limits)
        if run.exit_code != 0:
            raise SandboxError(f"the trial run gave {run}")
    except SandboxError as error:
        mother.close()
        raise SandboxUnavailable(f"{backend}: {error}") from None
    return mother


def _filters() -> list[str]:
    """One filter for each kind of run: calls, program, native, compile."""
    if platform.machine() not in seccomp.NUMBERS:
        raise SandboxUnavailable(f"no system-call table for {platform.machine()}, only {', '.join(seccomp.NUMBERS)}")
    rules = (seccomp.PYTHON, seccomp.PYTHON, seccomp.NATIVE, seccomp.COMPILER)
    return [seccomp.assemble(each).hex() for each in rules]


@dataclass(frozen=True, slots=True)
class _View:
    """What stays in sight behind the walls, all of it read-only."""

    binds: tuple[tuple[str, str], ...]
    """Path on the host and behind the walls."""
    masks: tuple[str, ...]
    """Folders hidden inside the binds: installed packages may hold a benchmark's answers."""
    packages: tuple[str, ...]
    """Additions to sys.path."""
    moved: tuple[str, str]
    """The interpreter's prefix on the host and behind the walls, which show no user's name."""


def _view(preload: Sequence[str]) -> _View:
    """The standard library, shared libraries and the compiler; with `preload`, the installed packages as well."""
    triple = str(sysconfig.get_config_var("MULTIARCH") or "none")
    wanted = ["/lib64", "/usr/lib64"]
    for library in ("/lib", "/usr/lib"):
        narrow = os.path.exists(f"/usr/lib/{triple}") and not os.path.islink(library)
        wanted += [f"{library}/{triple}"] if narrow else [library]
    if compiler() is not None:
        wanted += ["/bin", "/usr/bin", "/usr/include", "/usr/lib/gcc", "/usr/libexec/gcc"]
        wanted += ["/usr/local"] if str(compiler()).startswith("/usr/local") else []
    stdlib = os.path.realpath(sysconfig.get_path("stdlib"))
    prefix, place = os.path.dirname(os.path.dirname(stdlib)), "/python"
    library = os.path.dirname(stdlib)
    pairs = {path: path for path in wanted if os.path.exists(path)}
    if prefix == "/usr":
        place = prefix
        pairs[stdlib] = stdlib
        pairs |= {path: path for path in ("/usr/lib/python3", f"{stdlib}/lib-dynload") if os.path.isdir(path)}
    else:
        pairs[library] = place + "/lib"
    packages: list[str] = []
    for number, path in enumerate(p for p in sys.path if Path(p).name in ("site-packages", "dist-packages")):
        if preload and os.path.isdir(path):
            packages.append(f"/packages/{number}")
            pairs[os.path.realpath(path)] = packages[-1]
    binds = tuple(
        (path, target)
        for path, target in sorted(pairs.items())
        if os.path.islink(path)
        or path != target
        or not any(path.startswith(f"{above}/") for above in pairs if above != path)
    )
    masks = tuple(
        target + str(found)[len(path) :]
        for path, target in binds
        if not os.path.islink(path) and not target.startswith("/packages/")
        for pattern in ("site-packages", "dist-packages", "python*/site-packages", "python*/dist-packages")
        for found in sorted(Path(path).glob(pattern))
        if found.is_dir() and not found.is_symlink()
    )
    return _View(binds, masks, tuple(packages), (prefix, place))


def _command(backend: str, fd: int, view: _View) -> list[str]:
    python, script = os.path.realpath(sys.executable), str(_HERE / "zygote.py")
    flags = ["-I", "-S", "-B", "-X", "utf8"]
    if backend != "bubblewrap":
        return [python, *flags, script, str(fd)]
    command = [shutil.which("bwrap") or "bwrap", "--unshare-all", "--unshare-user", "--disable-userns", "--clearenv"]
    command += ["--die-with-parent", "--as-pid-1", "--new-session", "--cap-drop", "ALL", "--hostname", "box"]
    command += ["--setenv", *next(iter(_BINDING.items())), "--uid", "65534", "--gid", "65534"]
    for path, target in view.binds:
        command += ["--symlink", os.readlink(path), target] if os.path.islink(path) else ["--ro-bind", path, target]
    for path in view.masks:
        command += ["--tmpfs", path, "--remount-ro", path]
    for name in ("null", "zero", "random", "urandom"):
        command += ["--dev-bind", f"/dev/{name}", f"/dev/{name}"]
    inside = f"{view.moved[1]}/bin/{Path(python).name}"
    command += ["--ro-bind", python, inside, "--ro-bind", script, "/zygote.py", "--perms", "1777", "--size"]
    command += [str(128 << 20), "--tmpfs", "/tmp", "--remount-ro", "/", "--chdir", "/"]
    return [*command, "--", inside, *flags, "/zygote.py", str(fd)]
