"""The zygote back end: namespaces, user id maps, and a root file system of its own.

Loaded from its text into the launcher and into process 1 (see `zygote.py`), and dropped before the
first run: standard library only.
"""

from __future__ import annotations

import ctypes
import errno
import os
import struct
import sys

_libc = ctypes.CDLL(None, use_errno=True)
_NEWNS, _NEWCGROUP, _NEWUTS, _NEWIPC = 0x20000, 0x2000000, 0x4000000, 0x8000000
_NEWUSER, _NEWPID, _NEWNET = 0x10000000, 0x20000000, 0x40000000
_RDONLY, _NOSUID, _NODEV, _NOEXEC, _REMOUNT, _BIND, _REC, _PRIVATE = (
    1,
    2,
    4,
    8,
    32,
    4096,
    16384,
    1 << 18,
)
_PIVOT_ROOT = {"x86_64": 155, "aarch64": 41}
_MOUNT_SETATTR = 442  # the same number everywhere
_NOBODY = 65534


def _check(result: int, what: str) -> None:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")


def _mount(
    source: str, target: str, kind: str | None, flags: int, options: str | None = None
) -> None:
    words = (
        source.encode(),
        target.encode(),
        kind and kind.encode(),
        ctypes.c_ulong(flags),
        options and options.encode(),
    )
    _check(_libc.mount(*words), f"mount {target}")


def _map_ids(pid: int) -> None:
    """Writes the id maps of `pid` from outside its user namespace: as root for 0 and nobody, so
    that a child can be nobody; else, or where root may not map two ids, for the own id only."""
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
    """Enters new user, mount, net, ipc, uts, pid (for children) and cgroup namespaces as their
    root."""
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
    """Mounts a read-only root with `binds` (from, to) only, `masks` hidden inside them, four
    devices, and a /tmp that only the compiler's filter lets be written. The old root, /proc
    included, is unmounted."""
    os.umask(0o022)
    root = "/proc"  # always there, never bound: nothing is made on the host and left behind
    _mount("none", "/", None, _REC | _PRIVATE)
    _mount("tmpfs", root, "tmpfs", _NOSUID | _NODEV, "size=1m,mode=755")
    for path, target in binds:
        if os.path.islink(path):  # /lib64 and the like on a merged /usr
            os.symlink(os.readlink(path), root + target)
            continue
        _make_place(path, root + target)
        _mount(path, root + target, None, _BIND | _REC)
        _read_only(root + target)
    for path in masks:
        _mount(
            "tmpfs", root + path, "tmpfs", _RDONLY | _NOSUID | _NODEV | _NOEXEC, "size=4k,mode=755"
        )
    for path in ("/dev", "/tmp", "/empty", "/old"):
        os.mkdir(root + path)
    for name in ("null", "zero", "random", "urandom"):
        _make_place(f"/dev/{name}", f"{root}/dev/{name}")
        _mount(f"/dev/{name}", f"{root}/dev/{name}", None, _BIND)
    _mount(
        "tmpfs",
        root + "/tmp",
        "tmpfs",
        _NOSUID | _NODEV | _NOEXEC,
        "size=128m,nr_inodes=4k,mode=1777",
    )
    os.chdir(root)
    _check(_libc.syscall(_PIVOT_ROOT[os.uname().machine], b".", b"old"), "pivot_root")
    os.chdir("/")
    _check(_libc.umount2(b"/old", 2), "umount /old")
    os.rmdir("/old")
    _mount("none", "/", None, _REMOUNT | _BIND | _RDONLY | _NOSUID | _NODEV)
    _libc.sethostname(b"box", 3)
    os.umask(0o077)


def _make_place(path: str, target: str) -> None:
    """Makes an empty folder or file on which `path` is mounted."""
    folder = target if os.path.isdir(path) else os.path.dirname(target)
    os.makedirs(folder, exist_ok=True)
    if folder != target:
        os.close(os.open(target, os.O_CREAT | os.O_WRONLY))


def move(old: str, new: str) -> None:
    """Updates the paths of the running interpreter to the new place of its library."""
    sys.path[:] = [
        new + path[len(old) :] if path.startswith(old + "/") else path for path in sys.path
    ]
    sys.prefix = sys.base_prefix = sys.exec_prefix = sys.base_exec_prefix = new
    sys.path_importer_cache.clear()
    for finder in sys.meta_path:
        if hasattr(finder, "invalidate_caches"):
            finder.invalidate_caches()


def _read_only(path: str) -> None:
    attributes = struct.pack("<4Q", _RDONLY | _NOSUID | _NODEV, 0, 0, 0)
    # AT_RECURSIVE
    if _libc.syscall(_MOUNT_SETATTR, -100, path.encode(), 0x8000, attributes, len(attributes)) == 0:
        return
    # before Linux 5.12: the top mount only, its locked flags repeated
    flags = os.statvfs(path).f_flag
    # noexec, noatime, nodiratime, relatime
    kept = flags & (_NOEXEC | 1024 | 2048) | (1 << 21 if flags & 4096 else 0)
    _mount("none", path, None, _REMOUNT | _BIND | _RDONLY | _NOSUID | _NODEV | kept)
