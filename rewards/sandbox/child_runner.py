"""`ChildRunner`: forks, locks down, watches and reaps the sandbox's children, one at a time.

Without namespaces (`landlock`, `unsafe`) there is a single fork server in the host's PID namespace.
Each child gives up the host's files (`landlock.py`) and dies with its parent; its filter allows no
system call that reaches another process. What a compiler started is found by its process group and
by adoption (PR_SET_CHILD_SUBREAPER).

Most of a run's time is spent in page faults: each page that a child, or process 1 after a fork,
writes for the first time is copied, and Python writes to each object that it touches, for its
reference count. So both do as little in Python as possible between the fork and the program, and
what all children share is set up once in process 1.

Sent to the fork server as text (see `zygote.py`): standard library only.
"""

from __future__ import annotations

import _socket
import contextlib
import ctypes
import errno
import gc
import io
import mmap
import os
import resource
import select
import signal
import struct
import sys
import time
from collections.abc import Callable
from typing import Any, NoReturn

# kind, wall s, CPU s, bytes of memory, bytes of output and of any file
REQUEST = struct.Struct("<Bdd2Q")
# RUN, wait status, wall s, CPU s, peak resident bytes, who ended it, locked down
REPLY = struct.Struct("<4siddQ2B")
RUN, NO_RUN = b"run\n", b"no\n"  # how replies begin; after NO_RUN comes why there was none
BY_ITSELF, AT_THE_DEADLINE, ON_REQUEST, FOR_ITS_THREADS = range(4)
CALLS, PROGRAM, NATIVE, COMPILE = range(4)

_libc = ctypes.CDLL(None, use_errno=True)
_EXECVEAT = {"x86_64": 322, "aarch64": 281}
_RESTRICT_SELF = 446  # landlock_restrict_self, on every machine
_NOBODY = 65534
_THREADS = 64  # of one run
# between two counts of a run's threads, where the kernel does not limit them
_LOOK_SECONDS = 0.01
_ROOM = _socket.CMSG_SPACE(4 * struct.calcsize("i"))


class _Cap(ctypes.Structure):
    _fields_ = (
        ("effective", ctypes.c_uint32),
        ("permitted", ctypes.c_uint32),
        ("inheritable", ctypes.c_uint32),
    )


class _CapHeader(ctypes.Structure):
    _fields_ = (("version", ctypes.c_uint32), ("pid", ctypes.c_int))


class _Filter(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("program", ctypes.c_void_p))


def _check(result: int, what: str) -> None:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")


def _capabilities(kept: int) -> None:
    data = (_Cap * 2)(_Cap(kept, kept, 0), _Cap(0, 0, 0))
    _check(_libc.capset(ctypes.byref(_CapHeader(0x20080522, 0)), ctypes.byref(data)), "capset")


def keep_capabilities(kept: int) -> None:
    """Drops all other capabilities for good, so that no exec regains them."""
    for number in range(41):
        _libc.prctl(24, number, 0, 0, 0)  # PR_CAPBSET_DROP
    _capabilities(kept)


class ChildRunner:
    """Forks, locks down, watches and reaps children, one at a time."""

    def __init__(
        self,
        control: _socket.socket,
        config: dict[str, Any],
        privileges: str,
        main: Callable[[], NoReturn],
    ) -> None:
        self.control = control
        self.pid = os.getpid()
        self.namespaces: bool = config["kind"] in ("zygote", "bubblewrap")
        self.nobody = privileges == "two ids"
        self.may_chroot = privileges != "none"
        self.locked = mmap.mmap(-1, 1)  # shared with the child until it is locked down
        self.filters = [self._filter(bytes.fromhex(text)) for text in config["filters"]]
        self.compiler: list[str] = config["compiler"]
        self.scratch: str = config["scratch"]
        self.trainer = [config["trainer"]] if not self.namespaces else []
        self.ruleset: int | None = config.get("ruleset")
        self._for_all()
        if self.nobody:  # the open file keeps the kernel's record of this user from run to run
            os.setresuid(_NOBODY, 0, 0)
            self.record = os.open("/dev/null", os.O_RDONLY)
            os.setresuid(0, 0, 0)
        self.main = main
        sys.path += config["packages"]
        for name in config["preload"]:
            __import__(name)
        os.environ.clear()

    def _filter(self, program: bytes) -> _Filter:
        buffer = ctypes.create_string_buffer(program, len(program))
        filter = _Filter(len(program) // 8, ctypes.addressof(buffer))
        filter.buffer = buffer  # keeps it alive
        return filter

    def _for_all(self) -> None:
        """Sets the state that every child inherits."""
        _check(_libc.prctl(38, 1, 0, 0, 0), "PR_SET_NO_NEW_PRIVS")
        _check(_libc.prctl(4, 0, 0, 0, 0), "PR_SET_DUMPABLE")
        if self.nobody:
            os.setgroups([])
            os.setresgid(_NOBODY, _NOBODY, _NOBODY)
        # Python ignores it; a child over its output ends by it
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
        limits = {
            resource.RLIMIT_NOFILE: 64,
            resource.RLIMIT_CORE: 0,
            resource.RLIMIT_MEMLOCK: 0,
            resource.RLIMIT_MSGQUEUE: 0,
        }
        if self.namespaces and (self.nobody or _kernel() >= (5, 14)):
            limits[resource.RLIMIT_NPROC] = _THREADS  # elsewhere all of the user's processes count
        for which, most in limits.items():
            allowed = resource.getrlimit(which)[1]
            most = most if allowed < 0 else min(most, allowed)
            resource.setrlimit(which, (most, most))
        _stack(64 << 20)

    def serve(self) -> None:
        """Serves requests until the parent closes the control socket."""
        control, size, unpack, run = self.control, REQUEST.size, REQUEST.unpack, self.run
        while True:
            message, extra, _, _ = control.recvmsg(size, _ROOM)
            if not message:
                return
            if extra:  # without files it is a kill that crossed the child's own end
                control.send(run(unpack(message), memoryview(extra[0][2]).cast("i").tolist()))

    def run(self, request: tuple[Any, ...], fds: list[int]) -> bytes:
        kind, wall = request[0], request[1]
        start = time.monotonic()
        self.locked[0] = 0
        try:
            pid = os.fork()
        # a limit on processes, or no memory: says nothing about the program
        except OSError as error:
            for fd in fds:
                os.close(fd)
            return NO_RUN + f"no process for the run: {error}".encode()
        if pid == 0:
            try:
                self._child(request, fds)
            except BaseException:  # the lock-down itself failed: never run a program without it
                if not self.locked.closed:
                    self.locked[0] = 0
            finally:
                os._exit(125)
        for fd in fds[1:] if kind == COMPILE else fds:
            os.close(fd)
        cause = self._wait(pid, wall)
        _, status, usage = os.wait4(pid, 0)
        if self.namespaces:
            self._sweep()
        elif kind == COMPILE:
            self._sweep_group(pid)
        if kind == COMPILE:
            self._collect(fds[0], status)
        spent = usage.ru_utime + usage.ru_stime
        took, peak = time.monotonic() - start, usage.ru_maxrss * 1024
        return REPLY.pack(RUN, status, took, spent, peak, cause, self.locked[0])

    def _wait(self, pid: int, seconds: float) -> int:
        """Waits until the child ends, or ends it; returns the cause."""
        watched = os.pidfd_open(pid)
        files = [watched, self.control.fileno(), *self.trainer]
        if self.namespaces:
            ready, _, _ = select.select(files, (), (), seconds)
            cause = AT_THE_DEADLINE if not ready else ON_REQUEST
        else:
            ready, cause = self._wait_and_count(pid, files, seconds)
        os.close(watched)
        if watched in ready:
            return BY_ITSELF
        os.kill(pid, signal.SIGKILL)
        return cause

    def _wait_and_count(self, pid: int, files: list[int], seconds: float) -> tuple[list[int], int]:
        """Does the same where threads must be counted from outside; returns the files that are
        ready, and the cause."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            ready, _, _ = select.select(files, (), (), _LOOK_SECONDS)
            if ready:
                return ready, ON_REQUEST
            if _threads(pid) > _THREADS:
                return [], FOR_ITS_THREADS
        return [], AT_THE_DEADLINE

    def _sweep(self) -> None:
        """Kills what is left in the namespace, as a compiler's children: nothing outlives its
        run."""
        # nobody is left, which os.kill would raise an exception for, at a dozen pages
        if _libc.kill(-1, 9) < 0:
            return
        while True:
            try:
                os.wait()
            except ChildProcessError:
                return

    def _sweep_group(self, group: int) -> None:
        """Does the same without a PID namespace: a compiler's children cannot leave its group, and
        orphans become ours."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(group, signal.SIGKILL)
        while True:
            try:
                os.wait()
            except ChildProcessError:
                return

    def _collect(self, target: int, status: int) -> None:
        """Copies the compiled program out and removes its directory."""
        try:
            if status == 0:
                with open(self.scratch + "/program", "rb") as source:
                    while block := source.read(1 << 20):
                        os.write(target, block)
        finally:
            os.close(target)
            for name in os.listdir(self.scratch):  # the compiler makes no directories
                os.unlink(f"{self.scratch}/{name}")
            os.rmdir(self.scratch)

    def _child(self, request: tuple[Any, ...], fds: list[int]) -> NoReturn:
        kind, _, cpu, memory, size = request
        for source, place in zip(fds[1:], (0, 1, 2), strict=False):
            os.dup2(source, place)
        if fds[0] != 3:
            os.dup2(fds[0], 3)
        if self.namespaces:
            os.setsid()
        else:
            self._die_with_server()
        if kind >= NATIVE:
            self._prepare_foreign(kind, memory)
        _limit(cpu, memory, size)
        self._lock(self.filters[kind], _NOBODY)
        self.locked[0] = 1
        if kind >= NATIVE:
            self._become_foreign(kind)
        self.locked.close()
        sys.argv[:] = ["program.py"]
        if kind == PROGRAM:
            _open_standard_files()
        gc.enable()
        self.main()
        raise AssertionError("the child ends itself")

    def _die_with_server(self) -> None:
        """Makes the child die with the fork server. It stays in its session, which the trainer
        sweeps, in a group of its own, which the fork server sweeps."""
        _check(_libc.prctl(1, signal.SIGKILL, 0, 0, 0), "PR_SET_PDEATHSIG")
        if os.getppid() != self.pid:  # it has died already
            os._exit(125)
        os.setpgid(0, 0)

    def _prepare_foreign(self, kind: int, memory: int) -> None:
        """Sets the file view of a process that will no longer be this interpreter: the compiler's
        directory, or an empty root."""
        if kind == COMPILE:
            os.mkdir(self.scratch, 0o700)
            if self.nobody:
                os.chown(self.scratch, _NOBODY, _NOBODY)
            os.chdir(self.scratch)
        elif self.may_chroot:
            os.chroot("/empty")
            os.chdir("/")
        _stack(memory)
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)

    def _become_foreign(self, kind: int) -> NoReturn:
        if kind == COMPILE:
            os.close(3)
            os.execve(
                self.compiler[0],
                self.compiler,
                {"PATH": "/usr/bin", "TMPDIR": self.scratch, "LC_ALL": "C"},
            )
        argv = (ctypes.c_char_p * 2)(b"program", None)
        os.set_inheritable(3, False)
        number = _EXECVEAT[os.uname().machine]
        _libc.syscall(number, 3, b"", argv, (ctypes.c_char_p * 1)(None), 0x1000)
        if self.namespaces and ctypes.get_errno() in (errno.EACCES, errno.EPERM):
            # a policy of the machine's: no path that a program names is in sight
            raise PermissionError("execveat")
        # a file that asks for an interpreter, or for more memory than it may have
        os._exit(127)

    def _lock(self, program: _Filter, user: int) -> None:
        """Takes away, in this order and for good: the user id, capabilities, the host's files, our
        open files, and all system calls outside the filter."""
        if self.nobody:
            os.setresuid(user, user, user)
        elif self.may_chroot:  # leaving id 0 drops them
            _capabilities(0)
        if self.ruleset is not None:
            _check(_libc.syscall(_RESTRICT_SELF, self.ruleset, 0), "landlock_restrict_self")
        os.closerange(4, 256)
        _check(_libc.prctl(22, 2, ctypes.byref(program), 0, 0), "PR_SET_SECCOMP")


def _limit(cpu: float, memory: int, size: int) -> None:
    """Sets the limits of a run. Both kernel clocks count ticks and may run a tenth ahead of the
    exact time on a busy machine. The parent judges by the exact time, so these limits only end a
    run that is certainly over it."""
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
    signal.setitimer(signal.ITIMER_PROF, 1.1 * cpu + 0.1)
    whole = int(-(-(1.3 * cpu + 0.3) // 1))  # for those who ignore the signal of the timer
    resource.setrlimit(resource.RLIMIT_CPU, (whole, whole))


def _stack(size: int) -> None:
    _, most = resource.getrlimit(resource.RLIMIT_STACK)
    resource.setrlimit(resource.RLIMIT_STACK, (min(size, most) if most >= 0 else size, most))


def _kernel() -> tuple[int, int]:
    major, minor = os.uname().release.split(".")[:2]
    return int(major), int("".join(filter(str.isdigit, minor)))


def _threads(pid: int) -> int:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return int(file.read().rpartition(")")[2].split()[17])
    except (OSError, IndexError):  # it has just ended
        return 0


def _open_standard_files() -> None:
    sys.stdin = io.TextIOWrapper(io.BufferedReader(io.FileIO(0, "r")), encoding="utf-8")
    sys.stdout = io.TextIOWrapper(io.BufferedWriter(io.FileIO(1, "w")), encoding="utf-8")
    sys.stderr = io.TextIOWrapper(
        io.FileIO(2, "w"), encoding="utf-8", errors="backslashreplace", write_through=True
    )
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        setattr(getattr(sys, name), "mode", mode)  # noqa: B010 (read-only in typeshed)
        setattr(sys, f"__{name}__", getattr(sys, name))
