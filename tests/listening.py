"""Where the processes of a run listen."""

from __future__ import annotations

import subprocess
import time

import psutil

LOOPBACK = ("127.", "::1", "::ffff:127.")


def listeners(driver: int) -> set[tuple[str, str]]:
    """(process, address) of every listening socket of a process and those that it started."""
    found = set()
    for process in (psutil.Process(driver), *psutil.Process(driver).children(recursive=True)):
        try:
            found |= {
                (process.name(), socket.laddr.ip)
                for socket in process.net_connections(kind="inet")
                if socket.status == psutil.CONN_LISTEN
            }
        except psutil.NoSuchProcess:
            continue
    return found


def watched(process: subprocess.Popen[str]) -> tuple[set[str], set[tuple[str, str]]]:
    """The names of all that a process started until it ended, and the `listeners` among them."""
    names: set[str] = set()
    seen: set[tuple[str, str]] = set()
    while process.poll() is None:
        try:
            names |= {p.name() for p in psutil.Process(process.pid).children(recursive=True)}
            seen |= listeners(process.pid)
        except psutil.NoSuchProcess:
            continue
        time.sleep(0.2)
    return names, seen


def beyond_loopback(seen: set[tuple[str, str]]) -> list[tuple[str, str]]:
    return [(name, ip) for name, ip in sorted(seen) if not ip.startswith(LOOPBACK)]
