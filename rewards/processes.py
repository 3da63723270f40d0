"""The kernel's records of processes: waiting times, descendants, and the number of usable
processors.

A limit on wall time makes a verdict depend on the load of the machine. A limit on *own time* does
not: it counts the time in which a process runs or sleeps, but not that in which it is ready and
waits for a processor (`/proc/PID/schedstat`).
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator
from pathlib import Path

_PROC = Path("/proc")
_TICKS = os.sysconf("SC_CLK_TCK")
_CGROUPS = re.compile(r"^\d+ \d+ \S+ (\S+) (\S+) .* - (cgroup2?) \S+ (\S+)$", re.M)


def descendants(root: int) -> Iterator[int]:
    """Yields the processes below `root`."""
    parents: dict[int, int] = {}
    for entry in _PROC.iterdir():
        if entry.name.isdigit() and (stat := stat_of(int(entry.name))) is not None:
            parents[int(entry.name)] = int(stat[1])
    for pid in parents:
        above = parents.get(pid)
        while above is not None and above != root:
            above = parents.get(above)
        if above == root:
            yield pid


def stat_of(pid: int) -> list[str] | None:
    """The fields of `/proc/PID/stat` from the state on (state, parent, group, session, ...); None
    if the process has ended."""
    try:
        return (_PROC / str(pid) / "stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None


def tells_waiting() -> bool:
    """Whether this kernel records the waiting times of processes."""
    return (_PROC / "self" / "schedstat").exists()


def waited(pid: int) -> float:
    """Seconds for which the threads of a process have been ready without a processor; 0 if it has
    ended."""
    total = 0
    with contextlib.suppress(OSError, IndexError, ValueError):  # it may end while we look
        for thread in (_PROC / str(pid) / "task").iterdir():
            total += int((thread / "schedstat").read_text().split()[1])
    return total * 1e-9


def cpu_seconds(pid: int) -> float:
    """Processor seconds of all threads of a process so far; 0 if it has ended."""
    words = stat_of(pid)
    return (int(words[11]) + int(words[12])) / _TICKS if words else 0.0


def asleep(pid: int) -> bool:
    """Whether a process lives and none of its threads runs or is ready to run.

    A wait for a processor is recorded only when it ends, so that a ready thread must not be taken
    for a sleeping one.
    """
    try:
        threads = [stat_of(int(thread.name)) for thread in (_PROC / str(pid) / "task").iterdir()]
    except OSError:  # it has ended
        return False
    return bool(threads) and all(words is not None and words[0] not in "RZX" for words in threads)


def processors(root: Path = Path("/")) -> int:
    """The number of processors that this process may use: by its affinity or, if lower, by the
    tightest CPU quota of its cgroups (v1 or v2), rounded up. `root`: the folder that holds /proc
    and /sys."""
    allowed = (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )
    quotas = list(_quotas(root))
    return max(1, min(allowed, *(int(-(-quota // 1)) for quota in quotas))) if quotas else allowed


def _quotas(root: Path) -> Iterator[float]:
    """Yields the processors that each cgroup above this process allows, if it sets a limit."""
    try:
        mounts = _CGROUPS.findall((root / "proc/self/mountinfo").read_text())
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    words = [line.split(":", 2) for line in lines]
    paths = {
        name: fields[2] for fields in words if len(fields) == 3 for name in fields[1].split(",")
    }
    for base, point, kind, options in mounts:
        if kind == "cgroup" and "cpu" not in options.split(","):
            continue
        path = paths.get("cpu" if kind == "cgroup" else "")
        if path is None:
            continue
        top = root / point.lstrip("/")
        # inside a container the mount may show only this container's part of the tree
        below = os.path.relpath(path, base) if path.startswith(base) else "."
        folder = top / below
        while True:
            if (quota := _quota(folder, kind)) is not None:
                yield quota
            if folder == top or top not in folder.parents:
                break
            folder = folder.parent


def _quota(folder: Path, kind: str) -> float | None:
    try:
        if kind == "cgroup2":
            most, period = (folder / "cpu.max").read_text().split()
        else:
            most = (folder / "cpu.cfs_quota_us").read_text().strip()
            period = (folder / "cpu.cfs_period_us").read_text().strip()
        return None if most in ("max", "-1") else int(most) / int(period)
    # no such controller here, or the root group, which has no limit
    except (OSError, ValueError, ZeroDivisionError):
        return None
