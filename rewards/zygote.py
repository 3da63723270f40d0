"""The sandbox's mother process: builds the walls once, then forks one locked-down child a run.

Started by `sandbox.py` as `python -I -S -B zygote.py FD`: standard library only, empty environment. It never sees a
program, an input or an answer, only limits and open files: the child reads its request itself, after the lock-down.

Stages: the launcher makes new namespaces and forks; its child, a fresh interpreter, is process 1 of the new PID
namespace, so that one SIGKILL of it takes every descendant along, and it dies with the launcher, which dies with the
trainer. Process 1 replaces the file system by a read-only tmpfs with a few read-only binds, forgets its own privileges
but those that it needs to drop a child's, warms up the interpreter and serves requests on a SOCK_SEQPACKET socket.
"""

from __future__ import annotations

import ctypes
import errno
import gc
import io
import json
import mmap
import os
import resource
import select
import signal
import socket
import struct
import sys
import time
from typing import Any, NoReturn

REQUEST = struct.Struct("<Bdd2Q")  # kind, wall s, CPU s, bytes of memory, bytes of output and of any file
REPLY = struct.Struct("<iddQ2B")  # wait status, wall s, CPU s, peak resident bytes, wall deadline struck, locked down
CALLS, PROGRAM, NATIVE, COMPILE = range(4)

_libc = ctypes.CDLL(None, use_errno=True)
_NEWNS, _NEWCGROUP, _NEWUTS, _NEWIPC = 0x20000, 0x2000000, 0x4000000, 0x8000000
_NEWUSER, _NEWPID, _NEWNET = 0x10000000, 0x20000000, 0x40000000
_RDONLY, _NOSUID, _NODEV, _NOEXEC, _REMOUNT, _BIND, _REC, _PRIVATE = 1, 2, 4, 8, 32, 4096, 16384, 1 << 18
_SYSCALLS = {"x86_64": {"pivot_root": 155, "execveat": 322}, "aarch64": {"pivot_root": 41, "execveat": 281}}
_MOUNT_SETATTR = 442  # the same number everywhere
_NOBODY = 65534
_KEPT_CAPABILITIES = 0b11 | (0b111 << 5) | (1 << 18)  # CHOWN, DAC_OVERRIDE; KILL, SETGID, SETUID; SYS_CHROOT


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


def _mount(source: str, target: str, kind: str | None, flags: int, options: str | None = None) -> None:
    words = (
        source.encode(),
        target.encode(),
        kind and kind.encode(),
        ctypes.c_ulong(flags),
        options and options.encode(),
    )
    _check(_libc.mount(*words), f"mount {target}")


# --- walls ------------------------------------------------------------------------------------------------------------


def _map_ids(pid: int) -> None:
    """Writes the id maps of `pid` from outside its user namespace. As root: 0 and nobody, so that a child can be
    nobody; otherwise (or where root may not map two ids) the own id alone."""
    uid, gid = os.getuid(), os.getgid()
    if uid == 0:
        try:
            for name in ("gid_map", "uid_map"):
                _write(f"/proc/{pid}/{name}", f"0 0 1\n{_NOBODY} {_NOBODY} 1\n")
            return
        except OSError:  # a container's root without CAP_SETUID
            pass
    _write(f"/proc/{pid}/setgroups", "deny")
    _write(f"/proc/{pid}/gid_map", f"0 {gid} 1\n")
    _write(f"/proc/{pid}/uid_map", f"0 {uid} 1\n")


def _write(path: str, text: str) -> None:
    fd = os.open(path, os.O_WRONLY)
    try:
        os.write(fd, text.encode())
    finally:
        os.close(fd)


def enter_namespaces() -> None:
    """New user, mount, net, ipc, uts, pid (for children) and cgroup namespaces, as their root."""
    asked, answered = os.pipe(), os.pipe()
    launcher = os.getpid()
    if (mapper := os.fork()) == 0:
        code = 1
        try:
            os.close(asked[1])
            if os.read(asked[0], 1):
                _map_ids(launcher)
                os.write(answered[1], b"m")
                code = 0
        finally:
            os._exit(code)
    os.close(answered[1])
    try:
        flags = _NEWUSER | _NEWNS | _NEWNET | _NEWIPC | _NEWUTS | _NEWPID | _NEWCGROUP
        _check(_libc.unshare(flags), "unshare")
        os.write(asked[1], b"u")
        if os.read(answered[0], 1) != b"m":
            raise OSError(errno.EPERM, "the id maps of the user namespace cannot be written")
    finally:
        for fd in (*asked, answered[0]):
            os.close(fd)
        os.waitpid(mapper, 0)
    os.setresgid(0, 0, 0)
    os.setresuid(0, 0, 0)


def build_root(binds: list[tuple[str, str]], masks: list[str]) -> None:
    """A read-only root of nothing but `binds` (from, to), `masks` inside them hidden, four devices and a /tmp that only
    the compiler's filter lets anybody write to. The old root, /proc included, is gone afterwards."""
    os.umask(0o022)
    root = "/proc"  # always there, never bound: nothing has to be made on the host, so nothing is left behind
    _mount("none", "/", None, _REC | _PRIVATE)
    _mount("tmpfs", root, "tmpfs", _NOSUID | _NODEV, "size=1m,mode=755")
    for path, target in binds:
        if os.path.islink(path):  # /lib64 and the like on a merged /usr
            os.symlink(os.readlink(path), root + target)
            continue
        os.makedirs(root + target, exist_ok=True)
        _mount(path, root + target, None, _BIND | _REC)
        _read_only(root + target)
    for path in masks:
        _mount("tmpfs", root + path, "tmpfs", _RDONLY | _NOSUID | _NODEV | _NOEXEC, "size=4k,mode=755")
    for path in ("/dev", "/tmp", "/empty", "/old"):
        os.mkdir(root + path)
    for name in ("null", "zero", "random", "urandom"):
        os.close(os.open(f"{root}/dev/{name}", os.O_CREAT | os.O_WRONLY))
        _mount(f"/dev/{name}", f"{root}/dev/{name}", None, _BIND)
    _mount("tmpfs", root + "/tmp", "tmpfs", _NOSUID | _NODEV | _NOEXEC, "size=128m,nr_inodes=4k,mode=1777")
    os.chdir(root)
    _check(_libc.syscall(_SYSCALLS[os.uname().machine]["pivot_root"], b".", b"old"), "pivot_root")
    os.chdir("/")
    _check(_libc.umount2(b"/old", 2), "umount /old")
    os.rmdir("/old")
    _mount("none", "/", None, _REMOUNT | _BIND | _RDONLY | _NOSUID | _NODEV)
    _libc.sethostname(b"box", 3)
    os.umask(0o077)


def _move(old: str, new: str) -> None:
    """Tells the running interpreter that its library has another path now."""
    sys.path[:] = [new + path[len(old) :] if path.startswith(old + "/") else path for path in sys.path]
    sys.prefix = sys.base_prefix = sys.exec_prefix = sys.base_exec_prefix = new
    sys.path_importer_cache.clear()
    for finder in sys.meta_path:
        if hasattr(finder, "invalidate_caches"):
            finder.invalidate_caches()


def _read_only(path: str) -> None:
    attributes = struct.pack("<4Q", _RDONLY | _NOSUID | _NODEV, 0, 0, 0)
    if _libc.syscall(_MOUNT_SETATTR, -100, path.encode(), 0x8000, attributes, len(attributes)) == 0:  # AT_RECURSIVE
        return
    flags = os.statvfs(path).f_flag  # before Linux 5.12: the top mount only, its locked flags repeated
    kept = flags & (_NOEXEC | 1024 | 2048) | (1 << 21 if flags & 4096 else 0)  # noexec, noatime, nodiratime, relatime
    _mount("none", path, None, _REMOUNT | _BIND | _RDONLY | _NOSUID | _NODEV | kept)


# --- a child ----------------------------------------------------------------------------------------------------------


class Warden:
    """Forks, locks down, watches and reaps children, one at a time."""

    def __init__(self, control: socket.socket, config: dict[str, Any], privileges: str) -> None:
        self.control = control
        self.walls: bool = config["kind"] != "unsafe"
        self.nobody, self.may_chroot = privileges == "two ids", privileges != "none"
        _check(_libc.prctl(38, 1, 0, 0, 0), "PR_SET_NO_NEW_PRIVS")  # inherited by every child
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)  # Python ignores it; a child over its output ends by it
        self.locked = mmap.mmap(-1, 1)  # shared with the child until it is locked down
        self.filters = [self._filter(bytes.fromhex(text)) for text in config["filters"]]
        self.compiler: list[str] = config["compiler"]
        self.scratch: str = config["scratch"]
        if self.nobody:  # the open file keeps the kernel's record of this user, which would be made anew for every run
            os.setresuid(_NOBODY, 0, 0)
            self.record = os.open("/dev/null", os.O_RDONLY)
            os.setresuid(0, 0, 0)
        self.inmate: dict[str, Any] = {"__name__": "inmate"}
        exec(compile(config["inmate"], "<inmate>", "exec"), self.inmate)
        sys.path += config["packages"]
        for name in config["preload"]:
            __import__(name)
        os.environ.clear()

    def _filter(self, program: bytes) -> _Filter:
        buffer = ctypes.create_string_buffer(program, len(program))
        found = _Filter(len(program) // 8, ctypes.addressof(buffer))
        found.buffer = buffer  # keeps it alive
        return found

    def serve(self) -> None:
        """Handles requests until the parent closes the control socket."""
        while True:
            message, fds, _, _ = socket.recv_fds(self.control, REQUEST.size, 4)
            if not message:
                return
            if len(message) != REQUEST.size:
                continue  # a kill that crossed the child's own end
            reply = self.run(REQUEST.unpack(message), fds)
            self.control.send(reply)

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
        late = self._wait(pid, start + wall)
        _, status, usage = os.wait4(pid, 0)
        self._sweep()
        if kind == COMPILE:
            self._collect(fds[0], status)
        spent = usage.ru_utime + usage.ru_stime
        return REPLY.pack(status, time.monotonic() - start, spent, usage.ru_maxrss * 1024, late, self.locked[0])

    def _wait(self, pid: int, deadline: float) -> bool:
        """Until the child ends, the parent says kill, or the deadline strikes (True)."""
        watched = os.pidfd_open(pid)
        poll = select.poll()
        poll.register(watched, select.POLLIN)
        poll.register(self.control, select.POLLIN)
        events = poll.poll(max(deadline - time.monotonic(), 0.0) * 1000)
        os.close(watched)
        if events != [(watched, select.POLLIN)]:
            os.kill(pid, signal.SIGKILL)
        return not events

    def _sweep(self) -> None:
        """Nothing outlives its run: process 1 kills all that is left in its namespace (a compiler's children)."""
        if not self.walls:
            return
        try:
            os.kill(-1, signal.SIGKILL)
        except ProcessLookupError:
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
        if kind == COMPILE:
            os.mkdir(self.scratch, 0o700)
            if self.nobody:
                os.chown(self.scratch, _NOBODY, _NOBODY)
            os.chdir(self.scratch)
        self._limit(kind, int(cpu), memory, size)
        if kind == NATIVE and self.may_chroot:
            os.chroot("/empty")
            os.chdir("/")
        if kind in (NATIVE, COMPILE):
            signal.signal(signal.SIGPIPE, signal.SIG_DFL)
        self._lock(self.filters[kind])
        self.locked[0] = 1
        if kind == NATIVE:
            number = _SYSCALLS[os.uname().machine]["execveat"]
            argv = (ctypes.c_char_p * 2)(b"program", None)
            os.set_inheritable(3, False)
            _check(_libc.syscall(number, 3, b"", argv, (ctypes.c_char_p * 1)(None), 0x1000), "execveat")
        if kind == COMPILE:
            os.close(3)
            os.execve(self.compiler[0], self.compiler, {"PATH": "/usr/bin", "TMPDIR": self.scratch, "LC_ALL": "C"})
        self.locked.close()
        sys.argv[:] = ["program.py"]
        if kind == PROGRAM:
            sys.stdin = io.TextIOWrapper(io.BufferedReader(io.FileIO(0, "r")), encoding="utf-8")
            sys.stdout = io.TextIOWrapper(io.BufferedWriter(io.FileIO(1, "w")), encoding="utf-8")
            sys.stderr = io.TextIOWrapper(
                io.FileIO(2, "w"), encoding="utf-8", errors="backslashreplace", write_through=True
            )
        gc.enable()
        self.inmate["main"]()
        raise AssertionError("the child ends itself")

    def _limit(self, kind: int, cpu: int, memory: int, size: int) -> None:
        hard = resource.RLIM_INFINITY if kind in (NATIVE, COMPILE) else 64 << 20
        limits = {
            resource.RLIMIT_AS: (memory, memory),
            resource.RLIMIT_CPU: (cpu, cpu + 1),
            resource.RLIMIT_FSIZE: (size, size),
            resource.RLIMIT_NOFILE: (64, 64),
            resource.RLIMIT_CORE: (0, 0),
            resource.RLIMIT_MEMLOCK: (0, 0),
            resource.RLIMIT_MSGQUEUE: (0, 0),
        }
        if self.walls:  # elsewhere the count includes all of the user's processes
            limits[resource.RLIMIT_NPROC] = (64, 64)
        for which, pair in limits.items():
            resource.setrlimit(which, pair)
        _, most = resource.getrlimit(resource.RLIMIT_STACK)
        stack = memory if hard == resource.RLIM_INFINITY else hard
        resource.setrlimit(resource.RLIMIT_STACK, (min(stack, most) if most >= 0 else stack, most))

    def _lock(self, program: _Filter) -> None:
        """Nobody's ids, no capability, then the filter: from here on there is no way back."""
        if self.nobody:
            os.setgroups([])
            os.setresgid(_NOBODY, _NOBODY, _NOBODY)
            os.setresuid(_NOBODY, _NOBODY, _NOBODY)
        _check(_libc.prctl(4, 0, 0, 0, 0), "PR_SET_DUMPABLE")
        if self.may_chroot and not self.nobody:  # leaving id 0 has dropped them already
            _capabilities(0)
        _check(_libc.prctl(22, 2, ctypes.byref(program), 0, 0), "PR_SET_SECCOMP")


# --- start ------------------------------------------------------------------------------------------------------------


def _warm_up() -> None:
    """What every child would do again: imports, first uses; then the garbage collector leaves these pages alone."""
    # not threading and random: each does work of its own in every forked child
    exec("import bisect, collections, copy, functools, heapq, itertools, math, re, string, typing")
    exec(compile("def f(x):\n    return sorted(x)\nf([2, 1])", "<warm>", "exec"), {})
    json.loads(json.dumps({"ok": [1, 2.5, "x"]}))
    gc.collect()
    gc.freeze()
    gc.disable()


def _serve(control: socket.socket, config: dict[str, Any], privileges: str) -> None:
    """Process 1 behind finished walls, or the only process where there are none."""
    warden = Warden(control, config, privileges)
    _warm_up()
    control.send(json.dumps({"ready": True}).encode())
    warden.serve()


def _begin_anew(control: socket.socket, config: dict[str, Any], privileges: str) -> NoReturn:
    """Replaces the forked process by a fresh interpreter: it would drag the launcher's memory map, which it shares page by
    page, through every fork of its own, and runs would cost a twentieth more."""
    memory = os.memfd_create("config", 0)
    os.write(memory, json.dumps([config, privileges]).encode())
    os.lseek(memory, 0, os.SEEK_SET)
    os.set_inheritable(control.fileno(), True)
    os.execve(sys.orig_argv[0], [*sys.orig_argv, str(memory)], {})


def _first_process(control: socket.socket, memory: int) -> None:
    """Process 1 of the new namespaces: puts up the walls around itself and serves."""
    with open(memory, "rb") as file:
        config, privileges = json.load(file)
    os.set_inheritable(control.fileno(), False)
    build_root(config["binds"], config["masks"])
    _move(*config["moved"])
    for number in range(41):
        _libc.prctl(24, number, 0, 0, 0)  # PR_CAPBSET_DROP: no exec gives anything back
    _capabilities(_KEPT_CAPABILITIES)
    _serve(control, config, privileges)


def _launch(control: socket.socket, config: dict[str, Any], parent: int) -> None:
    """Makes the namespaces, forks process 1 and lives until it or the trainer ends."""
    enter_namespaces()
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
    control = socket.socket(fileno=int(sys.argv[1]))
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
