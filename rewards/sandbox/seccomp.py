"""Seccomp allow-lists as classic BPF, assembled here without a compiled helper or a dependency.

A filter sees the number and the raw arguments of each system call (`struct seccomp_data`: nr at 0,
arch at 4, six 64-bit arguments from 16). What no rule allows fails with EPERM; a foreign
architecture (32-bit code, x32) dies. Numbers: Linux `asm/unistd_64.h` (x86-64) and
`asm-generic/unistd.h` (aarch64).
"""

from __future__ import annotations

import platform
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

ALLOW, EPERM, ENOSYS, KILL = 0x7FFF0000, 0x00050001, 0x00050026, 0x80000000
LOAD, AND, JUMP_EQUAL, JUMP_GREATER_EQUAL, RETURN = 0x20, 0x54, 0x15, 0x35, 0x06
AUDIT_ARCH = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}

_X86_64 = """
read 0 write 1 open 2 close 3 stat 4 fstat 5 lstat 6 poll 7 lseek 8 mmap 9 mprotect 10 munmap 11
brk 12 rt_sigaction 13 rt_sigprocmask 14 rt_sigreturn 15 ioctl 16 pread64 17 pwrite64 18 readv 19
writev 20 access 21 pipe 22 select 23 sched_yield 24 mremap 25 madvise 28 dup 32 dup2 33
nanosleep 35 alarm 37 setitimer 38 getpid 39 clone 56 fork 57 vfork 58 execve 59 exit 60 wait4 61
uname 63 fcntl 72 ftruncate 77 getdents 78 getcwd 79 chdir 80 rename 82 unlink 87 readlink 89
chmod 90 fchmod 91 umask 95 gettimeofday 96 getrlimit 97 getrusage 98 sysinfo 99 times 100
getuid 102 getgid 104 geteuid 107 getegid 108 getppid 110 getpgrp 111 sigaltstack 131
arch_prctl 158 gettid 186 time 201 futex 202 sched_getaffinity 204 getdents64 217
set_tid_address 218 restart_syscall 219 clock_gettime 228 clock_getres 229 clock_nanosleep 230
exit_group 231 waitid 247 openat 257 newfstatat 262 unlinkat 263 renameat 264 readlinkat 267
fchmodat 268 faccessat 269 pselect6 270 ppoll 271 set_robust_list 273 dup3 292 pipe2 293
prlimit64 302 renameat2 316 getrandom 318 execveat 322 copy_file_range 326 statx 332 rseq 334
clone3 435 faccessat2 439
"""
_AARCH64 = """
read 63 write 64 close 57 fstat 80 lseek 62 mmap 222 mprotect 226 munmap 215 brk 214
rt_sigaction 134 rt_sigprocmask 135 rt_sigreturn 139 ioctl 29 pread64 67 pwrite64 68 readv 65
writev 66 sched_yield 124 mremap 216 madvise 233 dup 23 nanosleep 101 setitimer 103 getpid 172
clone 220 execve 221 exit 93 wait4 260 uname 160 fcntl 25 ftruncate 46 getcwd 17 chdir 49 fchmod 52
umask 166 gettimeofday 169 getrusage 165 sysinfo 179 times 153 getuid 174 getgid 176 geteuid 175
getegid 177 getppid 173 sigaltstack 132 gettid 178 futex 98 sched_getaffinity 123 getdents64 61
set_tid_address 96 restart_syscall 128 clock_gettime 113 clock_getres 114 clock_nanosleep 115
exit_group 94 waitid 95 openat 56 newfstatat 79 unlinkat 35 renameat 38 readlinkat 78 fchmodat 53
faccessat 48 pselect6 72 ppoll 73 set_robust_list 99 dup3 24 pipe2 59 prlimit64 261 renameat2 276
getrandom 278 execveat 281 copy_file_range 285 statx 291 rseq 293 clone3 435 faccessat2 439
"""


def _table(text: str) -> dict[str, int]:
    words = text.split()
    return dict(zip(words[::2], map(int, words[1::2]), strict=True))


NUMBERS: Mapping[str, Mapping[str, int]] = {"x86_64": _table(_X86_64), "aarch64": _table(_AARCH64)}


@dataclass(frozen=True, slots=True)
class When:
    """Allows a call only if the low 32 bits of argument `index`, under `mask`, are one of `values`
    (and, with `null`, the high 32 bits are 0). Each argument compared here is an int or a flag
    word, of which the kernel ignores the high half."""

    index: int
    mask: int
    values: tuple[int, ...]
    null: bool = False


# CLONE_THREAD; CLONE_NEW{NS,CGROUP,UTS,IPC,USER,PID,NET} and NEWTIME
_THREAD, _NAMESPACES = 0x00010000, 0x7E020080
# O_WRONLY, O_RDWR, O_CREAT, O_TRUNC, __O_TMPFILE
_WRITING = 0o1 | 0o2 | 0o100 | 0o1000 | 0o20000000
_SAFE_FCNTL = (0, 1, 2, 3, 4, 1030)  # F_DUPFD, F_GETFD, F_SETFD, F_GETFL, F_SETFL, F_DUPFD_CLOEXEC
_SAFE_IOCTL = (0x5401, 0x5413, 0x5450, 0x5451)  # TCGETS, TIOCGWINSZ, FIONCLEX, FIOCLEX
# own process, no new limit
_READ_LIMITS = (When(0, 0xFFFFFFFF, (0,)), When(2, 0xFFFFFFFF, (0,), null=True))

_CHUNK = 8  # rules between two looks at the order of the numbers

Rules = Mapping[str, Sequence[When]]


def _free(names: str) -> dict[str, Sequence[When]]:
    return dict.fromkeys(names.split(), ())


_BASE: Rules = _free(
    """
    read write close mmap munmap brk mremap mprotect madvise futex lseek readv writev fstat
    rt_sigaction rt_sigprocmask rt_sigreturn sigaltstack clock_gettime clock_getres clock_nanosleep
    nanosleep gettimeofday time times getrusage getrlimit getpid gettid getuid geteuid getgid
    getegid getppid getrandom sched_yield sched_getaffinity set_robust_list set_tid_address rseq
    restart_syscall uname sysinfo exit exit_group alarm
    """
) | {
    "fcntl": (When(1, 0xFFFFFFFF, _SAFE_FCNTL),),
    "ioctl": (When(1, 0xFFFFFFFF, _SAFE_IOCTL),),
    "prlimit64": _READ_LIMITS,
    "setitimer": (When(0, 0xFFFFFFFF, (0, 1)),),  # not ITIMER_PROF, which ends the run
}
_LOOKING: Rules = _free(
    "stat lstat newfstatat statx access faccessat faccessat2 readlink readlinkat getdents64 getcwd"
)
_DUPLICATING: Rules = _free("pread64 dup dup2 dup3 poll ppoll select pselect6")

# A Python program or function: reads files, starts threads; opens nothing for writing, starts no
# process.
PYTHON: Rules = {
    **_BASE,
    **_LOOKING,
    **_DUPLICATING,
    "open": (When(1, _WRITING, (0,)),),
    "openat": (When(2, _WRITING, (0,)),),
    "clone": (When(0, _THREAD | _NAMESPACES, (_THREAD,)),),
}
# A statically linked program on three open files: no path at all, no thread; the one exec takes an
# open file, and after it the program can open none.
NATIVE: Rules = {
    **_BASE,
    "arch_prctl": (When(0, 0xFFFFFFFF, (0x1002, 0x3001)),),  # ARCH_SET_FS, ARCH_CET_STATUS
    "execveat": (When(4, 0xFFFFFFFF, (0x1000,)),),  # AT_EMPTY_PATH
}
# The compiler and its children: trusted programs on an untrusted text.
COMPILER: Rules = {
    **_BASE,
    **_LOOKING,
    **_DUPLICATING,
    **_free(
        """
        open openat pwrite64 ftruncate unlink unlinkat rename renameat renameat2 chmod fchmod
        fchmodat umask chdir pipe pipe2 fork vfork execve execveat wait4 waitid copy_file_range
        getdents getpgrp
        """
    ),
    "clone": (When(0, _NAMESPACES, (0,)),),
    "arch_prctl": (When(0, 0xFFFFFFFF, (0x1002, 0x3001)),),
}


def assemble(rules: Rules, machine: str | None = None) -> bytes:
    """Returns the filter program, 8 bytes per instruction. Raises ValueError for a machine without
    a table of system calls."""
    machine = machine or platform.machine()
    if machine not in NUMBERS:
        raise ValueError(
            f"no system-call table for {machine!r}; the sandbox knows {sorted(NUMBERS)}"
        )
    numbers = NUMBERS[machine]
    program = [
        (LOAD, 0, 0, 4),
        (JUMP_EQUAL, 1, 0, AUDIT_ARCH[machine]),
        (RETURN, 0, 0, KILL),
        (LOAD, 0, 0, 0),
    ]
    if machine == "x86_64":  # the x32 numbers share the architecture word
        program += [(JUMP_GREATER_EQUAL, 0, 1, 0x40000000), (RETURN, 0, 0, KILL)]
    # clone3 hides its flags behind a pointer: "not implemented" makes the C library fall back to
    # clone
    program += [(JUMP_EQUAL, 0, 1, numbers["clone3"]), (RETURN, 0, 0, ENOSYS)]
    known = sorted(
        (numbers[name], conditions) for name, conditions in rules.items() if name in numbers
    )
    blocks = [(number, _block(number, conditions)) for number, conditions in known]
    # the kernel tries every number when a filter is installed
    for start in range(0, len(blocks), _CHUNK):
        chunk = [step for _, block in blocks[start : start + _CHUNK] for step in block] + [
            (RETURN, 0, 0, EPERM)
        ]
        if start + _CHUNK < len(blocks):
            program.append((JUMP_GREATER_EQUAL, len(chunk), 0, blocks[start + _CHUNK][0]))
        program += chunk
    assert len(program) <= 4096, "the kernel takes at most BPF_MAXINSNS instructions"
    return b"".join(struct.pack("<HBBI", *step) for step in program)


def _block(number: int, conditions: Sequence[When]) -> list[tuple[int, int, int, int]]:
    """The instructions that decide on one system call and skip themselves for others."""
    steps = [step for condition in conditions for step in _check(condition)] + [
        (RETURN, 0, 0, ALLOW)
    ]
    return [(JUMP_EQUAL, 0, len(steps), number), *steps]


def _check(condition: When) -> list[tuple[int, int, int, int]]:
    """The instructions that load an argument and return EPERM unless it matches."""
    offset = 16 + 8 * condition.index
    steps = [(LOAD, 0, 0, offset), (AND, 0, 0, condition.mask)]
    last = len(condition.values) - 1
    # a match jumps over the other values and the refusal
    for i, value in enumerate(condition.values):
        steps.append((JUMP_EQUAL, last - i + 1, 0, value))
    steps.append((RETURN, 0, 0, EPERM))
    if condition.null:
        steps += [(LOAD, 0, 0, offset + 4), (JUMP_EQUAL, 1, 0, 0), (RETURN, 0, 0, EPERM)]
    return steps
