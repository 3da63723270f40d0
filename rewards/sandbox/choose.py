"""Chooses the back end of a machine by trial runs, and advises on machines that support none."""

from __future__ import annotations

import ctypes
import os
import shutil
import socket
import sys
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

from .backends import ForkServer
from .child_runner import CALLS
from .runs import Limits, SandboxError, SandboxUnavailable

BACKENDS = ("zygote", "bubblewrap", "landlock")
"""The order in which they are tried. `unsafe` comes last, and only on request."""
_KERNEL = (
    "a kernel with Landlock needs no privilege at all (Linux 5.13 or later, 'landlock' in"
    " /sys/kernel/security/lsm; else boot it with lsm=landlock,... added)"
)
_HOST = (
    "allow user namespaces: sysctl -w user.max_user_namespaces=10000"
    " kernel.unprivileged_userns_clone=1 kernel.apparmor_restrict_unprivileged_userns=0 (those that"
    " exist; the last is Ubuntu's since 23.10), or install bubblewrap (apt install bubblewrap)"
)
_CONTAINER = (
    "start the container with --security-opt seccomp=unconfined --security-opt apparmor=unconfined"
    " (docker, podman, nerdctl for containerd; --cap-add SYS_ADMIN in the place of the first; both"
    " are needed where the host has AppArmor), and on its host: sysctl -w"
    " user.max_user_namespaces=10000 kernel.apparmor_restrict_unprivileged_userns=0 (those that"
    " exist); installing bubblewrap in the container does not help"
)
_KUBERNETES = (
    "give the container securityContext: {seccompProfile: {type: Unconfined}, appArmorProfile:"
    " {type: Unconfined}} (before Kubernetes 1.30 the annotation"
    " container.apparmor.security.beta.kubernetes.io/NAME: unconfined), or {capabilities: {add:"
    " [SYS_ADMIN]}} with the same appArmorProfile; a namespace under Pod Security needs the level"
    " 'privileged' for it; nodes: sysctl user.max_user_namespaces=10000,"
    " kernel.apparmor_restrict_unprivileged_userns=0"
)
_REMOTE = (
    "or use a sandbox on another machine (reward option url: http://HOST:PORT, Sandbox Fusion's"
    " protocol)"
)


def fix(environment: Mapping[str, str] = os.environ, root: Path = Path("/")) -> str:
    """Advice for this kind of machine: a host, a container or a pod."""
    if "KUBERNETES_SERVICE_HOST" in environment:
        place = _KUBERNETES
    elif (
        any((root / name).exists() for name in (".dockerenv", "run/.containerenv"))
        or "container" in environment
    ):
        place = _CONTAINER
    else:
        place = f"{_HOST}; inside a container, {_CONTAINER}"
    return f"{_KERNEL}; {place}; {_REMOTE}"


def choose_backend(
    backend: str | None, allow_unsafe: bool, preload: Sequence[str] = ()
) -> ForkServer:
    """Returns a fork server of the first back end that passes a trial run. Raises
    SandboxUnavailable if none does, ValueError for an unknown name."""
    if backend not in (None, *BACKENDS, "unsafe"):
        raise ValueError(
            f"sandbox backend {backend!r} is unknown; use one of {', '.join(BACKENDS)}, or leave"
            " it out"
        )
    if backend == "unsafe" and not allow_unsafe:
        raise ValueError("sandbox backend 'unsafe' needs allow_unsafe: true")
    failures: list[str] = []
    for name in (backend,) if backend else (*BACKENDS, *(("unsafe",) if allow_unsafe else ())):
        try:
            server = _tried(name, preload)
        except SandboxUnavailable as error:
            failures.append(str(error))
            continue
        if name == "unsafe":
            _hide_memory()
            warnings.warn(
                "UNSAFE: model programs run without a sandbox; they can read every file that this"
                " user can read, and the memory and environment of this user's other processes,"
                f" but not of this one ({'; '.join(failures) or 'asked for'}). To fix: {fix()}",
                RuntimeWarning,
                stacklevel=3,
            )
        return server
    raise SandboxUnavailable(f"no sandbox on this machine: {'; '.join(failures)}. To fix: {fix()}")


def _hide_memory() -> None:
    """Closes /proc/PID/mem and /proc/PID/environ of this process, which holds the expected answers,
    to other processes of its user."""
    if ctypes.CDLL(None).prctl(4, 0, 0, 0, 0) < 0:  # PR_SET_DUMPABLE
        raise SandboxUnavailable("unsafe: this process cannot hide its memory (PR_SET_DUMPABLE)")


def _tried(backend: str, preload: Sequence[str]) -> ForkServer:
    """Starts a fork server and runs an empty child, so that a filter that the kernel refuses is
    noticed now. Raises SandboxUnavailable."""
    if not sys.platform.startswith("linux"):
        raise SandboxUnavailable(f"{backend}: only Linux has what it needs")
    if backend == "bubblewrap" and shutil.which("bwrap") is None:
        raise SandboxUnavailable("bubblewrap: bwrap is not installed")
    lost = ""
    # A fork server killed from outside once made the sandbox fall back to a weaker back end.
    for _ in range(2):
        try:
            return _trial(backend, preload)
        except SandboxUnavailable:
            raise
        except (SandboxError, OSError) as error:  # OSError: no descriptor, process or room on disk
            lost = str(error).removeprefix(f"{backend}: ")
    raise SandboxUnavailable(f"{backend}: {lost}")


def _trial(backend: str, preload: Sequence[str]) -> ForkServer:
    server, limits = ForkServer(backend, preload), Limits()
    try:
        ours, theirs = socket.socketpair()
        with ours, theirs:
            server.start(CALLS, limits, [theirs.fileno()])
            ours.shutdown(socket.SHUT_WR)  # the child reads the end of its channel and leaves
            theirs.close()
            run = server.finish(limits)
        if run.exit_code != 0:
            raise SandboxError(f"the trial run gave {run}")
    except BaseException:
        server.close()
        raise
    return server
