"""`emberl doctor`: what this machine has, what it lacks for a run, and how to mend it. Loads no
torch."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import resource
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import StrEnum

from packaging.requirements import Requirement
from packaging.version import Version

from ...rewards.processes import processors
from ...rewards.sandbox.choose import choose_backend
from ...rewards.sandbox.runs import SandboxUnavailable
from ...rewards.sandbox.view import compiler

_GIB = 1 << 30


class Level(StrEnum):
    OK = "ok"
    WARNING = "warning"
    ERROR = "error"


@dataclass(frozen=True, kw_only=True, slots=True)
class Check:
    """One line, e.g. `Check(name="/dev/shm", level=Level.OK, detail="24.0 GiB free")`."""

    name: str
    level: Level
    detail: str
    fix: str = ""
    """What to do; empty where all is well."""

    def __str__(self) -> str:
        return f"{self.level:8} {self.name:18} {self.detail}" + (
            f" -> {self.fix}" if self.fix else ""
        )


def examine() -> list[Check]:
    """All checks, in reading order. Starts and ends a sandbox process; takes about a second."""
    return [
        check_python(platform.python_version()),
        *check_packages(importlib.metadata.requires("emberl") or ()),
        check_sandbox(),
        check_compiler(compiler()),
        check_shared_memory("/dev/shm"),
        check_open_files(*resource.getrlimit(resource.RLIMIT_NOFILE)),
    ]


def worst(checks: Iterable[Check]) -> Level:
    """The level that decides the exit code."""
    levels = [check.level for check in checks]
    return next((level for level in (Level.ERROR, Level.WARNING) if level in levels), Level.OK)


def check_python(version: str) -> Check:
    if Version(version) >= Version("3.11"):
        return Check(name="python", level=Level.OK, detail=version)
    return Check(name="python", level=Level.ERROR, detail=version, fix="use Python 3.11 or later")


def check_packages(
    requirements: Iterable[str], installed: Callable[[str], str] = importlib.metadata.version
) -> list[Check]:
    """A line for each requirement of the distribution: the fixed ones must be there, extras only
    fit if they are."""
    found: list[Check] = []
    for requirement in map(Requirement, requirements):
        extra = requirement.marker is not None and not requirement.marker.evaluate({"extra": ""})
        if extra and not any(requirement.marker.evaluate({"extra": name}) for name in _EXTRAS):  # type: ignore[union-attr]
            continue
        found.append(_package(requirement, extra, installed))
    return found


_EXTRAS = {"vllm", "ascend", "gym"}


def _package(requirement: Requirement, extra: bool, installed: Callable[[str], str]) -> Check:
    name, wanted = requirement.name, str(requirement.specifier)
    fix = f"pip install '{name}{wanted}'"
    try:
        version = installed(name)
    except importlib.metadata.PackageNotFoundError:
        if extra:
            return Check(name=name, level=Level.OK, detail="absent (optional)")
        return Check(name=name, level=Level.ERROR, detail="absent", fix=fix)
    if requirement.specifier.contains(version, prereleases=True):
        return Check(name=name, level=Level.OK, detail=version)
    level = Level.WARNING if extra else Level.ERROR
    return Check(name=name, level=level, detail=f"{version}, outside {wanted}", fix=fix)


def check_sandbox() -> Check:
    """The back end that code rewards get here, found by a trial run."""
    try:
        mother = choose_backend(None, allow_unsafe=False)
    except SandboxUnavailable as error:
        detail, _, fix = str(error).partition(". To fix: ")
        detail = f"no code rewards: {detail}"  # other rewards need none
        return Check(
            name="sandbox",
            level=Level.WARNING,
            detail=detail,
            fix=fix or "run on Linux, x86-64 or aarch64",
        )
    backend = mother.backend
    mother.close()
    seen = " (a program can ask whether a path of the host exists)" if backend == "landlock" else ""
    return Check(
        name="sandbox",
        level=Level.OK,
        detail=f"back end {backend}{seen}, {processors()} processors",
    )


def check_compiler(path: str | None) -> Check:
    if path is not None:
        return Check(name="g++", level=Level.OK, detail=path)
    return Check(
        name="g++",
        level=Level.WARNING,
        detail="absent: no C++ in code rewards",
        fix="apt install g++",
    )


def check_shared_memory(path: str) -> Check:
    """Ray's object store and torch's workers live there."""
    fix = "give more: mount -o remount,size=16g /dev/shm, or docker run --shm-size=16g"
    try:
        free = shutil.disk_usage(path).free
    except OSError as error:
        return Check(
            name=path, level=Level.ERROR, detail=str(error), fix=f"mount -t tmpfs tmpfs {path}"
        )
    detail = f"{free / _GIB:.1f} GiB free"
    if not os.access(path, os.W_OK):
        return Check(name=path, level=Level.ERROR, detail="not writable", fix=f"chmod 1777 {path}")
    if free < _GIB // 4:
        return Check(name=path, level=Level.ERROR, detail=detail, fix=fix)
    if free < 4 * _GIB:
        return Check(name=path, level=Level.WARNING, detail=detail, fix=fix)
    return Check(name=path, level=Level.OK, detail=detail)


def check_open_files(soft: int, hard: int) -> Check:
    """Ray opens several files for each worker and object."""
    if soft == resource.RLIM_INFINITY or soft >= 8192:
        shown = "unlimited" if soft == resource.RLIM_INFINITY else str(soft)
        return Check(name="open files", level=Level.OK, detail=shown)
    reachable = hard == resource.RLIM_INFINITY or hard >= 65536
    fix = "ulimit -n 65536" + (
        "" if reachable else f" (the hard limit is {hard}: raise it in /etc/security/limits.conf)"
    )
    level = Level.WARNING if soft >= 1024 else Level.ERROR
    return Check(name="open files", level=level, detail=str(soft), fix=fix)
