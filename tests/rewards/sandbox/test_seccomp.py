"""The filters of system calls, by an interpreter of their code, and their numbers, by the kernel's
headers."""

import os
import re
import struct
from pathlib import Path

import pytest
from emberl.rewards.sandbox import seccomp


def verdict(program: bytes, machine: str, number: int, *args: int) -> int:
    """Runs a filter as the kernel does (man 2 seccomp): the return value for one system call."""
    data = struct.pack("<iIQ6Q", number, seccomp.AUDIT_ARCH[machine], 0, *(args + (0,) * 6)[:6])
    steps = list(struct.iter_unpack("<HBBI", program))
    at, value = 0, 0
    while True:
        code, yes, no, k = steps[at]
        at += 1
        if code == seccomp.LOAD:
            value = struct.unpack_from("<I", data, k)[0]
        elif code == seccomp.AND:
            value &= k
        elif code == seccomp.JUMP_EQUAL:
            at += yes if value == k else no
        elif code == seccomp.JUMP_GREATER_EQUAL:
            at += yes if value >= k else no
        else:
            assert code == seccomp.RETURN
            return k


PYTHON, NATIVE, COMPILER = seccomp.PYTHON, seccomp.NATIVE, seccomp.COMPILER
CALLS = [
    (PYTHON, "read", (0,), seccomp.ALLOW),
    (PYTHON, "openat", (0, 0, os.O_RDONLY | os.O_CLOEXEC), seccomp.ALLOW),
    (PYTHON, "openat", (0, 0, os.O_WRONLY), seccomp.EPERM),
    (PYTHON, "openat", (0, 0, os.O_RDWR), seccomp.EPERM),
    (PYTHON, "openat", (0, 0, os.O_CREAT), seccomp.EPERM),
    (PYTHON, "openat", (0, 0, 1 << 32), seccomp.ALLOW),  # the kernel takes an int there
    (PYTHON, "clone", (0x3D0F00,), seccomp.ALLOW),  # a thread, as pthread_create makes it
    (PYTHON, "clone", (17,), seccomp.EPERM),  # a process
    (PYTHON, "clone", (0x3D0F00 | 0x10000000,), seccomp.EPERM),  # a thread with a user namespace
    (PYTHON, "clone3", (), seccomp.ENOSYS),
    (PYTHON, "prlimit64", (0, 7, 0), seccomp.ALLOW),
    (PYTHON, "prlimit64", (0, 7, 1 << 40), seccomp.EPERM),  # a pointer whose low half is zero
    (PYTHON, "prlimit64", (1, 7, 0), seccomp.EPERM),
    (PYTHON, "fcntl", (1, 1030), seccomp.ALLOW),
    (PYTHON, "fcntl", (1, 8), seccomp.EPERM),  # F_SETOWN
    (PYTHON, "ioctl", (0, 0x5401), seccomp.ALLOW),
    (PYTHON, "ioctl", (0, 0x5412), seccomp.EPERM),  # TIOCSTI
    (PYTHON, "execve", (), seccomp.EPERM),
    (NATIVE, "openat", (0, 0, 0), seccomp.EPERM),
    (NATIVE, "clone", (0x3D0F00,), seccomp.EPERM),
    (NATIVE, "execve", (), seccomp.EPERM),
    (NATIVE, "execveat", (3, 1, 1, 1, 0x1000), seccomp.ALLOW),
    (NATIVE, "execveat", (3, 1, 1, 1, 0), seccomp.EPERM),
    (COMPILER, "execve", (), seccomp.ALLOW),
    (COMPILER, "clone", (17,), seccomp.ALLOW),
    (COMPILER, "clone", (17 | 0x20000000,), seccomp.EPERM),  # CLONE_NEWPID
]


@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
@pytest.mark.parametrize(("rules", "name", "args", "expected"), CALLS)
def test_filter(machine: str, rules, name: str, args: tuple[int, ...], expected: int) -> None:
    program = seccomp.assemble(rules, machine)
    assert verdict(program, machine, seccomp.NUMBERS[machine][name], *args) == expected


def test_filters_allow_nothing_else() -> None:
    for machine, numbers in seccomp.NUMBERS.items():
        for rules in (PYTHON, NATIVE, COMPILER):
            program = seccomp.assemble(rules, machine)
            listed = {numbers[name] for name in rules if name in numbers}
            others = set(range(600)) - listed - {numbers["clone3"]}
            assert {verdict(program, machine, number) for number in others} == {seccomp.EPERM}


def test_filter_kills_foreign_architectures() -> None:
    program = seccomp.assemble(PYTHON, "x86_64")
    assert verdict(program, "aarch64", 0) == seccomp.KILL
    assert verdict(program, "x86_64", 0x40000000 + 57) == seccomp.KILL
    with pytest.raises(ValueError, match="riscv64"):
        seccomp.assemble(PYTHON, "riscv64")


@pytest.mark.parametrize(
    ("machine", "header"),
    [
        ("x86_64", "/usr/include/x86_64-linux-gnu/asm/unistd_64.h"),
        ("aarch64", "/usr/include/asm-generic/unistd.h"),
    ],
)
def test_numbers_are_the_kernels(machine: str, header: str) -> None:
    if not Path(header).exists():
        pytest.skip(f"{header} is not installed (apt install linux-libc-dev)")
    found = {
        name: int(n)
        for name, n in re.findall(r"#define __NR(?:3264)?_(\w+) (\d+)", Path(header).read_text())
    }
    names = {"newfstatat": "fstatat"} if machine == "aarch64" else {}
    mine = seccomp.NUMBERS[machine]
    assert mine == {name: found[names.get(name, name)] for name in mine}
