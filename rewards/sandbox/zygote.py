"""The sandbox's mother process: builds the walls once, then forks one locked-down child a run.

Started by `backends.py` as `python -I -S -B zygote.py FD`: standard library only, empty environment. It never sees a
program, an input or an answer, only limits and open files: the child reads its request itself, after the lock-down.

Stages: the launcher makes new namespaces and forks; its child, a fresh interpreter, is process 1 of the new PID
namespace, so that one SIGKILL of it takes every descendant along, and it dies with the launcher, which dies with the
trainer. Process 1 replaces the file system by a read-only tmpfs with a few read-only binds, forgets its own privileges
but those that it needs to drop a child's (`namespaces.py`), rehearses a run and serves requests on a SOCK_SEQPACKET socket.

Most of a run's time goes into page faults: each page that a child, or process 1 after a fork, writes for the first time
is a copy, and each object that Python touches is a write, of its reference count. So the two do as little in Python as
they can between the fork and the program, and what can be set once for all children is set in process 1.
"""

from __future__ import annotations

import _socket
import contextlib
import ctypes
import gc
import io
import json
import mmap
import os
import resource
import select
import signal
import struct
import sys
import time
from typing import Any, NoReturn

REQUEST = struct.Struct("<Bdd2Q")  # kind, wall s, CPU s, bytes of memory, bytes of output and of any file
REPLY = struct.Struct("<iddQ2B")  # wait status, wall s, CPU s, peak resident bytes, wall deadline struck, locked down
CALLS, PROGRAM, NATIVE, COMPILE = range(4)

_libc = ctypes.CDLL(None, use_errno=True)
_EXECVEAT = {"x86_64": 322, "aarch64": 281}
_NOBODY = 65534
_KEPT_CAPABILITIES = 0b11 | (0b111 << 5) | (1 << 18)  # CHOWN, DAC_OVERRIDE; KILL, SETGID, SETUID; SYS_CHROOT
_ROOM = _socket.CMSG_SPACE(4 * struct.calcsize("i"))


class _Cap(ctypes.Structure):
    _fields_ = (("effective", ctypes.c_uint32), ("permitted", ctypes.c_uint32), ("inheritable", ctypes.c_uint32))


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


# --- children ---------------------------------------------------------------------------------------------------------


class Warden:
    """Forks, locks down, watches and reaps children, one at a time."""

    def __init__(self, control: _socket.socket, config: dict[str, Any], privileges: str) -> None:
        self.control = control
        self.walls: bool = config["kind"] != "unsafe"
        self.nobody, self.may_chroot = privileges == "two ids", privileges != "none"
        self.locked = mmap.mmap(-1, 1)  # shared with the child until it is locked down
        self.filters = [self._filter(bytes.fromhex(text)) for text in config["filters"]]
        self.compiler: list[str] = config["compiler"]
        self.scratch: str = config["scratch"]
        self._for_all()
        if self.nobody:  # the open file keeps the kernel's record of this user, which would be made anew for every run
            os.setresuid(_NOBODY, 0, 0)
            self.record = os.open("/dev/null", os.O_RDONLY)
            os.setresuid(0, 0, 0)
        self.inmate = _module(config, "inmate")
        sys.path += config["packages"]
        for name in config["preload"]:
            __import__(name)
        os.environ.clear()

    def _filter(self, program: bytes) -> _Filter:
        buffer = ctypes.create_string_buffer(program, len(program))
        found = _Filter(len(program) // 8, ctypes.addressof(buffer))
        found.buffer = buffer  # keeps it alive
        return found

    def _for_all(self) -> None:
        """What every child inherits."""
        _check(_libc.prctl(38, 1, 0, 0, 0), "PR_SET_NO_NEW_PRIVS")
        _check(_libc.prctl(4, 0, 0, 0, 0), "PR_SET_DUMPABLE")
        if self.nobody:
            os.setgroups([])
            os.setresgid(_NOBODY, _NOBODY, _NOBODY)
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)  # Python ignores it; a child over its output ends by it
        limits = {
            resource.RLIMIT_NOFILE: 64,
            resource.RLIMIT_CORE: 0,
            resource.RLIMIT_MEMLOCK: 0,
            resource.RLIMIT_MSGQUEUE: 0,
        }
        if self.walls:  # elsewhere the count includes all of the user's processes
            limits[resource.RLIMIT_NPROC] = 64
        for which, most in limits.items():
            resource.setrlimit(which, (most, most))
        _stack(64 << 20)

    def serve(self) -> None:
        """Handles requests until the parent closes the control socket."""
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
        if (pid := os.fork()) == 0:
            try:
                self._child(request, fds)
            except BaseException:  # the lock-down itself failed: never run a program without it
                if not self.locked.closed:
                    self.locked[0] = 0
            finally:
                os._exit(125)
        for fd in fds[1:] if kind == COMPILE else fds:
            os.close(fd)
        late = self._wait(pid, wall)
        _, status, usage = os.wait4(pid, 0)
        if self.walls:
            self._sweep()
        if kind == COMPILE:
            self._collect(fds[0], status)
        spent = usage.ru_utime + usage.ru_stime
        return REPLY.pack(status, time.monotonic() - start, spent, usage.ru_maxrss * 1024, late, self.locked[0])

    def _wait(self, pid: int, seconds: float) -> bool:
        """Until the child ends, the parent says kill, or the deadline strikes (True)."""
        watched = os.pidfd_open(pid)
        ready, _, _ = select.select([watched, self.control.fileno()], (), (), seconds)
        os.close(watched)
        if ready != [watched]:
            os.kill(pid, signal.SIGKILL)
        return not ready

    def _sweep(self) -> None:
        """Nothing outlives its run: process 1 kills all that is left in its namespace (a compiler's children)."""
        if _libc.kill(-1, 9) < 0:  # nobody is left, which os.kill would raise an exception for, at a dozen pages
            return
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
        os.closerange(4, 256)
        os.setsid()
        if kind >= NATIVE:
            self._prepare_foreign(kind, memory)
        _limit(int(cpu), memory, size)
        self._lock(self.filters[kind], _NOBODY)
        self.locked[0] = 1
        if kind >= NATIVE:
            self._become_foreign(kind)
        self.locked.close()
        sys.argv[:] = ["program.py"]
        if kind == PROGRAM:
            _open_standard_files()
        gc.enable()
        self.inmate["main"]()
        raise AssertionError("the child ends itself")

    def _prepare_foreign(self, kind: int, memory: int) -> None:
        """What a process that is no longer this interpreter needs: the compiler's directory, or no directory at all."""
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
            os.execve(self.compiler[0], self.compiler, {"PATH": "/usr/bin", "TMPDIR": self.scratch, "LC_ALL": "C"})
        argv = (ctypes.c_char_p * 2)(b"program", None)
        os.set_inheritable(3, False)
        number = _EXECVEAT[os.uname().machine]
        _check(_libc.syscall(number, 3, b"", argv, (ctypes.c_char_p * 1)(None), 0x1000), "execveat")
        raise AssertionError("the process is another program")

    def _lock(self, program: _Filter, user: int) -> None:
        """Nobody's id, no capability, then the filter: from here on there is no way back."""
        if self.nobody:
            os.setresuid(user, user, user)
        elif self.may_chroot:  # leaving id 0 drops them
            _capabilities(0)
        _check(_libc.prctl(22, 2, ctypes.byref(program), 0, 0), "PR_SET_SECCOMP")


def _limit(cpu: int, memory: int, size: int) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    resource.setrlimit(resource.RLIMIT_CPU, (cpu, cpu + 1))
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def _stack(size: int) -> None:
    _, most = resource.getrlimit(resource.RLIMIT_STACK)
    resource.setrlimit(resource.RLIMIT_STACK, (min(size, most) if most >= 0 else size, most))


def _open_standard_files() -> None:
    sys.stdin = io.TextIOWrapper(io.BufferedReader(io.FileIO(0, "r")), encoding="utf-8")
    sys.stdout = io.TextIOWrapper(io.BufferedWriter(io.FileIO(1, "w")), encoding="utf-8")
    sys.stderr = io.TextIOWrapper(io.FileIO(2, "w"), encoding="utf-8", errors="backslashreplace", write_through=True)
    sys.stdin.mode, sys.stdout.mode, sys.stderr.mode = "r", "w", "w"  # as the interpreter's own have
    sys.__stdin__, sys.__stdout__, sys.__stderr__ = sys.stdin, sys.stdout, sys.stderr


# --- start ------------------------------------------------------------------------------------------------------------


_REHEARSALS = 30  # beyond all counters of CPython's specialising interpreter
_REQUEST = {"task": "calls", "code": ["def f(a, b):\n    return [a + 1, *map(len, b)]\n"]}
_CALL = {"eval": "f(1, ['x'])"}


def _rehearse(inmate: dict[str, Any]) -> None:
    """Talks with the children's code as a parent does: what is specialised and cached here need not be in every child,
    where each first use is a write to a page that it shares."""
    for _ in range(_REHEARSALS):
        ours, theirs = _socket.socketpair()
        ours.sendall("".join(json.dumps(each) + "\n" for each in (_REQUEST, _CALL, _CALL)).encode())
        ours.shutdown(_socket.SHUT_WR)
        inmate["CHANNEL"] = theirs.fileno()
        with contextlib.suppress(inmate["ChannelClosed"]):
            inmate["serve_calls"](inmate["read_line"]())
        ours.close()
        theirs.close()
    inmate["CHANNEL"] = 3
    del sys.modules["solution"]


def _settle() -> None:
    """Imports what programs like to use; then garbage collector and allocator leave these pages alone."""
    # not threading and random: each does work of its own in every forked child
    exec("import bisect, collections, copy, functools, heapq, itertools, math, re, string, typing")
    gc.collect()
    gc.freeze()
    gc.disable()
    if hasattr(_libc, "malloc_trim"):  # what is not mapped is neither copied by fork nor freed by exit
        _libc.malloc_trim(0)


def _serve(control: _socket.socket, config: dict[str, Any], privileges: str) -> None:
    """Process 1 behind finished walls, or the only process where there are none."""
    warden = Warden(control, config, privileges)
    _rehearse(warden.inmate)
    _settle()
    control.send(json.dumps({"ready": True}).encode())
    warden.serve()


def _module(config: dict[str, Any], name: str) -> dict[str, Any]:
    """One of this file's companions, by its text: behind bubblewrap's walls no other file is in sight."""
    names: dict[str, Any] = {"__name__": name}
    exec(compile(config[name], f"<{name}>", "exec"), names)
    return names


def _begin_anew(control: _socket.socket, config: dict[str, Any], privileges: str) -> NoReturn:
    """Replaces the forked process by a fresh interpreter: it would drag the launcher's memory map, which it shares page by
    page, through every fork of its own, and runs would cost a twentieth more."""
    memory = os.memfd_create("config", 0)
    os.write(memory, json.dumps([config, privileges]).encode())
    os.lseek(memory, 0, os.SEEK_SET)
    os.set_inheritable(control.fileno(), True)
    os.execve(sys.orig_argv[0], [*sys.orig_argv, str(memory)], dict(os.environ))


def _first_process(control: _socket.socket, memory: int) -> None:
    """Process 1 of the new namespaces: puts up the walls around itself and serves."""
    with open(memory, "rb") as file:
        config, privileges = json.load(file)
    os.set_inheritable(control.fileno(), False)
    walls = _module(config, "namespaces")
    walls["build_root"](config["binds"], config["masks"])
    walls["move"](*config["moved"])
    for number in range(41):
        _libc.prctl(24, number, 0, 0, 0)  # PR_CAPBSET_DROP: no exec gives anything back
    _capabilities(_KEPT_CAPABILITIES)
    del walls
    _serve(control, config, privileges)


def _launch(control: _socket.socket, config: dict[str, Any], parent: int) -> None:
    """Makes the namespaces, forks process 1 and lives until it or the trainer ends."""
    _module(config, "namespaces")["enter_namespaces"]()
    with open("/proc/self/uid_map") as file:
        privileges = "two ids" if len(file.read().splitlines()) == 2 else "one id"
    if (pid := os.fork()) == 0:
        try:
            os.close(parent)
            _libc.prctl(1, signal.SIGKILL, 0, 0, 0)  # the launcher has one thread, so its end is the process's end
            _begin_anew(control, config, privileges)
        finally:
            os._exit(1)
    control.close()
    poll = select.poll()
    for fd in (parent, os.pidfd_open(pid)):
        poll.register(fd, select.POLLIN)
    poll.poll()
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


def main() -> int:
    control = _socket.socket(fileno=int(sys.argv[1]))
    try:
        if len(sys.argv) > 2:
            _first_process(control, int(sys.argv[2]))
            return 0
        config = json.loads(control.recv(1 << 20))
        if config["kind"] == "zygote":
            _launch(control, config, os.pidfd_open(os.getppid()))  # readable when the trainer ends
        else:
            _serve(control, config, "none")
    except Exception as error:  # reported to the parent, which falls back or refuses
        control.send(json.dumps({"error": str(error)}).encode())
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
