"""The sandbox's fork server: isolates itself once, then forks a locked-down child for each run.

Started by `backends.py` as `python -I -S -B zygote.py FD`: standard library only, empty
environment. It sees no program, input or answer, only limits and open files; the child reads its
request after the lock-down (`child_runner.py`).

The launcher makes new namespaces and forks. Its child, a fresh interpreter, is process 1 of the new
PID namespace, so that one SIGKILL of it ends every descendant; it dies with the launcher, which
dies with the trainer. Process 1 replaces the file system by a read-only tmpfs with a few read-only
binds, drops its privileges except those for dropping a child's (`namespaces.py`), warms up and
serves requests on a SOCK_SEQPACKET socket.
"""

from __future__ import annotations

import _socket
import contextlib
import ctypes
import gc
import json
import os
import select
import signal
import sys
from typing import Any, NoReturn

READY, NO_RUN = b"ready\n", b"no\n"  # how messages to the trainer begin; after NO_RUN comes why

_libc = ctypes.CDLL(None, use_errno=True)
# CHOWN, DAC_OVERRIDE; KILL, SETGID, SETUID; SYS_CHROOT
_KEPT_CAPABILITIES = 0b11 | (0b111 << 5) | (1 << 18)


_WARM_UP_RUNS = 30  # beyond all counters of CPython's specialising interpreter
_REQUEST = {"task": "calls", "code": ["def f(a, b):\n    return [a + 1, *map(len, b)]\n"]}
_CALL = {"eval": "f(1, ['x'])"}


def _warm_up(child: dict[str, Any]) -> None:
    """Talks to the children's code as a parent does. What is specialised and cached here is not
    written again in every child, where each first write copies a page."""
    for _ in range(_WARM_UP_RUNS):
        ours, theirs = _socket.socketpair()
        ours.sendall("".join(json.dumps(each) + "\n" for each in (_REQUEST, _CALL, _CALL)).encode())
        ours.shutdown(_socket.SHUT_WR)
        child["CHANNEL"] = theirs.fileno()
        with contextlib.suppress(child["ChannelClosed"]):
            child["serve_calls"](child["read_line"]())
        ours.close()
        theirs.close()
    child["CHANNEL"] = 3
    del sys.modules["solution"]


def _freeze_heap() -> None:
    """Imports modules that programs use often, then keeps the garbage collector and the allocator
    from writing to these pages."""
    # not threading and random: each does work of its own in every forked child
    exec("import bisect, collections, copy, functools, heapq, itertools, math, re, string, typing")
    gc.collect()
    gc.freeze()
    gc.disable()
    # what is not mapped is neither copied by fork nor freed by exit
    if hasattr(_libc, "malloc_trim"):
        _libc.malloc_trim(0)


def _serve(control: _socket.socket, config: dict[str, Any], privileges: str) -> None:
    """Serves requests: in process 1 once it is isolated, or in the only process without
    namespaces."""
    child = _module(config, "child")
    runner = _module(config, "child_runner")["ChildRunner"](
        control, config, privileges, child["main"]
    )
    null = os.open("/dev/null", os.O_WRONLY)
    # what reads errors of the start reads no more, and a full pipe would block every later run
    os.dup2(null, 2)
    os.close(null)
    _warm_up(child)
    _freeze_heap()
    control.send(READY)
    runner.serve()


def _module(config: dict[str, Any], name: str) -> dict[str, Any]:
    """Loads a companion file from its text: behind bubblewrap no other file is visible."""
    names: dict[str, Any] = {"__name__": name}
    exec(compile(config[name], f"<{name}>", "exec"), names)
    return names


def _begin_anew(control: _socket.socket, config: dict[str, Any], privileges: str) -> NoReturn:
    """Replaces the forked process by a fresh interpreter. It would otherwise carry the launcher's
    memory map through each of its own forks, which made runs a twentieth slower."""
    memory = os.memfd_create("config", 0)
    os.write(memory, json.dumps([config, privileges]).encode())
    os.lseek(memory, 0, os.SEEK_SET)
    os.set_inheritable(control.fileno(), True)
    os.execve(sys.orig_argv[0], [*sys.orig_argv, str(memory)], dict(os.environ))


def _first_process(control: _socket.socket, memory: int) -> None:
    """Process 1 of the new namespaces: isolates itself and serves."""
    with open(memory, "rb") as file:
        config, privileges = json.load(file)
    os.set_inheritable(control.fileno(), False)
    namespaces = _module(config, "namespaces")
    namespaces["build_root"](config["binds"], config["masks"])
    namespaces["move"](*config["moved"])
    _module(config, "child_runner")["keep_capabilities"](_KEPT_CAPABILITIES)
    del namespaces
    _serve(control, config, privileges)


def _launch(control: _socket.socket, config: dict[str, Any], parent: int) -> None:
    """Makes the namespaces, forks process 1 and waits until it or the trainer ends."""
    _module(config, "namespaces")["enter_namespaces"]()
    with open("/proc/self/uid_map") as file:
        privileges = "two ids" if len(file.read().splitlines()) == 2 else "one id"
    if (pid := os.fork()) == 0:
        try:
            os.close(parent)
            # the launcher has one thread, so its end is the process's end
            _libc.prctl(1, signal.SIGKILL, 0, 0, 0)
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


def _stay(config: dict[str, Any]) -> None:
    """Prepares for serving without namespaces: see `child_runner.py`."""
    # readable when it ends, whoever holds its sockets
    config["trainer"] = os.pidfd_open(os.getppid())
    if _libc.prctl(36, 1, 0, 0, 0) < 0:  # PR_SET_CHILD_SUBREAPER
        raise OSError(ctypes.get_errno(), "PR_SET_CHILD_SUBREAPER")
    _module(config, "child_runner")["keep_capabilities"](0)
    if config["kind"] == "landlock":
        landlock = _module(config, "landlock")
        below, masks = landlock["readable_below"], config["masks"]
        readable = [entry for path in config["readable"] for entry in below(path, masks)]
        config["ruleset"] = landlock["ruleset"](readable, config["writable"])


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
            if config["kind"] != "bubblewrap":
                _stay(config)
            _serve(control, config, "none")
            if config["folder"]:  # the trainer may have been killed
                __import__("shutil").rmtree(config["folder"], ignore_errors=True)
    except Exception as error:  # reported to the parent, which falls back or refuses
        with contextlib.suppress(OSError):  # the trainer is gone
            control.send(NO_RUN + f"{type(error).__name__}: {error}".encode())
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
