"""The landlock back end: a process gives up access to the host's files, irrevocably and without any
privilege.

For containers that allow no namespaces (the defaults of Docker, containerd and Kubernetes). Linux
5.13 and later. Rights that only newer kernels know (TCP ports, signals, abstract sockets, ioctl of
devices) are given up where they are known; the filter of system calls (`seccomp.py`) forbids their
use in any case. Landlock hides the contents of files and folders, but not that a path exists, nor
its size and times.

Sent to the fork server as text (see `zygote.py`): standard library only. Numbers: Linux
`asm-generic/unistd.h` (the same on every machine) and `uapi/linux/landlock.h`.
"""

from __future__ import annotations

import ctypes
import os
import struct

_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long
_CREATE_RULESET, _ADD_RULE = 444, 445  # restrict_self: see `child_runner.py`
_RULE_PATH_BENEATH, _ASK_VERSION = 1, 1

EXECUTE, WRITE_FILE, READ_FILE, READ_DIR, REMOVE_FILE, MAKE_REG, TRUNCATE = (
    1,
    2,
    4,
    8,
    1 << 5,
    1 << 8,
    1 << 14,
)
# rights by the version that brought them
_FILES = {1: (1 << 13) - 1, 2: (1 << 14) - 1, 3: (1 << 15) - 1, 5: (1 << 16) - 1}
_TCP = 0b11  # bind, connect: version 4
_SCOPES = 0b11  # abstract unix sockets, signals: version 6
# the others make sense for folders only
_FOR_FILES = EXECUTE | WRITE_FILE | READ_FILE | TRUNCATE | 1 << 15


def _checked(result: int, what: str) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")
    return result


def version() -> int:
    """The version of Landlock in this kernel. Raises OSError if it has none or has it disabled."""
    version: int = _libc.syscall(
        _CREATE_RULESET, None, ctypes.c_size_t(0), ctypes.c_uint32(_ASK_VERSION)
    )
    return _checked(
        version, "landlock_create_ruleset (Linux 5.13 with landlock among its security modules)"
    )


def handled(abi: int) -> tuple[int, int, int]:
    """The rights that a ruleset of this version can take away: for files, TCP, and scopes."""
    files = max(rights for since, rights in _FILES.items() if since <= abi)
    return files, _TCP if abi >= 4 else 0, _SCOPES if abi >= 6 else 0


def ruleset(readable: list[str], writable: list[str]) -> int:
    """Returns the descriptor of a ruleset. It leaves `readable` paths to be read and executed, and
    files below `writable` ones to be made, written and removed. Raises OSError."""
    abi = version()
    files, tcp, scopes = handled(abi)
    words = (files, tcp, scopes)[: 1 if abi < 4 else 2 if abi < 6 else 3]
    attributes = struct.pack(f"<{len(words)}Q", *words)
    descriptor: int = _libc.syscall(
        _CREATE_RULESET, attributes, ctypes.c_size_t(len(attributes)), ctypes.c_uint32(0)
    )
    ruleset = _checked(descriptor, "landlock_create_ruleset")
    for path in readable:
        _allow(ruleset, path, files & (EXECUTE | READ_FILE | READ_DIR))
    for path in writable:
        most = WRITE_FILE | READ_FILE | READ_DIR | REMOVE_FILE | MAKE_REG | TRUNCATE
        _allow(ruleset, path, files & most)
    return ruleset


def _allow(ruleset: int, path: str, rights: int) -> None:
    try:
        fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except OSError:  # what is not there, or not for us, needs no permission
        return
    try:
        if not os.path.isdir(path):
            rights &= _FOR_FILES
        rule = struct.pack("<Qi", rights, fd)
        result = _libc.syscall(_ADD_RULE, ruleset, _RULE_PATH_BENEATH, rule, ctypes.c_uint32(0))
        _checked(result, f"landlock_add_rule {path}")
    finally:
        os.close(fd)


def readable_below(path: str, masks: list[str]) -> list[str]:
    """`path`, or those of its entries that leave `masks` out, since a rule can only allow.

    A folder with a mask in it can then not be listed. An interpreter that has searched it before
    can still import from it.
    """
    if path in masks:
        return []
    if not any(mask.startswith(path + "/") for mask in masks):
        return [path]
    readable: list[str] = []
    for entry in sorted(os.listdir(path)):
        readable += readable_below(f"{path}/{entry}", masks)
    return readable
