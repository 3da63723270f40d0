"""Runs a file of hostile programs in the sandbox and reports for each whether it was contained.

One JSON object per line: `id`, `category` (`forge`, `resource` or `escape`), `language` (`python`
or `cpp`), `code`. In the code, @PORT@ becomes a port on which the host listens (and `\\0rew@PORT@`
an abstract socket), @SECRETFILE@ a file that must not be read, @CANARY@ one that must not change. A
program that succeeds prints a line that starts with a word in capitals (`CONNECTED`, `UID 0`); a
word followed by a negative number (`MOUNT -1`) is a failed system call.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import socket
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from ..code_tests.reward import CodeReward
from ..inputs import RewardInput
from ..processes import descendants
from ..sandbox.pool import Outcome, Run, SandboxError
from ..sandbox.view import compiler

_CLAIM = re.compile(r"^[A-Z][A-Z0-9_]{2,}\b(?!\s+-\d)", re.M)
_NUMBERS = re.compile(r"^\[[-\d, ]*\]$", re.M)
_SUMS = {
    "test_list": [
        f"assert add({a}, {b}) == {a + b}" for a, b in ((2, 3), (-7, 4), (0, 1), (10**9, 17))
    ]
}
_PRINTED_SUMS = {
    "tests": [
        {"input": f"{a} {b}\n", "output": f"{a + b}\n"} for a, b in ((2, 3), (-7, 4), (10**9, 17))
    ]
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Attack:
    """The result of one hostile program."""

    id: str
    category: str
    contained: bool
    detail: str
    seconds: float

    def __str__(self) -> str:
        word = "contained" if self.contained else "NOT CONTAINED"
        return f"{word:14} {self.category:9} {self.id:28} {self.seconds:6.2f} s  {self.detail}"


@dataclass(frozen=True, kw_only=True, slots=True)
class AttackReport:
    """The results of all attacks and the back end that ran them."""

    backend: str
    attacks: tuple[Attack, ...]
    skipped: tuple[str, ...]
    """Ids of rows without a program, and of C++ programs on a machine without g++."""

    @property
    def contained(self) -> bool:
        return bool(self.attacks) and all(attack.contained for attack in self.attacks)

    def lines(self) -> list[str]:
        """The report for a person: a line for each attack, and the total."""
        held = sum(attack.contained for attack in self.attacks)
        lines = [str(attack) for attack in self.attacks]
        if self.skipped:
            lines.append(
                "skipped, without a program or without g++ here (apt install g++):"
                f" {', '.join(self.skipped)}"
            )
        return [*lines, f"{held} of {len(self.attacks)} contained, back end {self.backend}"]

    def record(self) -> dict[str, object]:
        """The report for `--json`."""
        return {
            "backend": self.backend,
            "contained": sum(attack.contained for attack in self.attacks),
            "total": len(self.attacks),
            "escaped": [attack.id for attack in self.attacks if not attack.contained],
            "skipped": list(self.skipped),
        }


def audit_sandbox(
    path: str | Path, *, seconds: float = 2.0, backend: str | None = None
) -> AttackReport:
    """Runs every program of the file. Raises ValueError if it holds none, SandboxUnavailable
    without a sandbox."""
    try:
        text = Path(path).read_text(encoding="utf-8")
        rows = [json.loads(line) for line in text.splitlines() if line.strip()]
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} is no file of hostile programs: {error}") from None
    whole = all(isinstance(row, dict) and {"id", "code"} <= row.keys() for row in rows)
    if not whole or not any(isinstance(row["code"], str) for row in rows):
        raise ValueError(
            f"{path} holds no hostile programs; each line needs id, category, language and code"
        )
    return run_attacks(rows, seconds=seconds, backend=backend)


def run_attacks(
    rows: Iterable[Mapping[str, str]],
    *,
    seconds: float = 2.0,
    compile_seconds: float = 10.0,
    backend: str | None = None,
) -> AttackReport:
    """Runs hostile programs with 256 MiB and `seconds` of time each."""
    judged: list[Attack] = []
    skipped: list[str] = []
    with _Host() as host, contextlib.closing(_reward(seconds, compile_seconds, backend)) as reward:
        for row in rows:
            runnable = isinstance(row["code"], str)  # a description of an attack has none
            if not runnable or (row.get("language") == "cpp" and compiler() is None):
                skipped.append(row["id"])
            else:
                judged.append(_run_one(row, host, reward))
        return AttackReport(
            backend=reward.sandbox.backend, attacks=tuple(judged), skipped=tuple(skipped)
        )


def _reward(seconds: float, compile_seconds: float, backend: str | None) -> CodeReward:
    return CodeReward(
        timeout=seconds,
        memory_mb=256,
        compile_seconds=compile_seconds,
        concurrency=1,
        backend=backend,
    )


def _run_one(row: Mapping[str, str], host: _Host, reward: CodeReward) -> Attack:
    language, category = row.get("language", "python"), row.get("category", "escape")
    code = host.filled(row["code"])
    before, start = host.state(code), time.monotonic()
    problems: list[str] = []
    details: list[str] = []
    try:
        if language == "python":
            problems += _paid(reward, code, language, _SUMS, details)
        if category == "forge":
            problems += _paid(reward, code, language, _PRINTED_SUMS, details)
        else:
            problems += _watched(reward, code, language, host, details)
        if reward.sandbox.run_program("print(6 * 7)").stdout != b"42\n":
            problems.append("the sandbox no longer works")
    except SandboxError as error:
        problems.append(f"broke the sandbox: {error}")
    problems += host.changes(before, code)
    detail = "; ".join(problems or filter(None, dict.fromkeys(details)))[:200]
    return Attack(
        id=row["id"],
        category=category,
        contained=not problems,
        detail=detail,
        seconds=time.monotonic() - start,
    )


def _paid(
    reward: CodeReward, code: str, language: str, tests: Mapping[str, object], details: list[str]
) -> list[str]:
    """Problems of grading a hostile program, which must get a score of 0: neither a reward nor no
    verdict."""
    # a longer fence than the code may hold itself
    verdict = reward(
        [RewardInput(completion=f"~~~~~~{language}\n{code}\n~~~~~~", columns=dict(tests))]
    )[0]
    details.append(verdict.message)
    return (
        []
        if verdict.score == 0
        else [f"was graded {verdict.status} with {verdict.score}: {verdict.message}"]
    )


def _watched(
    reward: CodeReward, code: str, language: str, host: _Host, details: list[str]
) -> list[str]:
    """Problems of running the program with its output visible."""
    limits, sandbox = reward.limits, reward.sandbox
    problems: list[str] = []
    if language == "cpp":
        binary, compilation = sandbox.compile_cpp(code, reward.compiler_limits)
        problems += _problems(compilation, host)
        if not binary:
            details.append(f"does not compile: {compilation}")
            return problems
        run = sandbox.run_native(binary, b"2 3\n", limits)
    else:
        run = sandbox.run_program(code, b"2 3\n", limits)
    details.append("" if run.outcome is Outcome.EXITED and not run.exit_code else str(run))
    problems += _problems(run, host)
    # the kernel's hard limit, in whole seconds (`_limit` in child_runner.py)
    if run.cpu_seconds > 1.3 * limits.seconds + 1.3 or run.seconds > limits.wall_seconds:
        problems.append(f"ran {run.seconds:.1f} s with a limit of {limits.seconds:g} s")
    if run.peak_bytes > (limits.memory_mb << 20) * 1.1:
        problems.append(f"used {run.peak_bytes >> 20} MiB with a limit of {limits.memory_mb}")
    return problems


def _problems(run: Run, host: _Host) -> list[str]:
    output = (run.stdout + b"\n" + run.stderr).decode("utf-8", "replace")
    problems = ["read a secret of the host"] if host.secret in output else []
    printed = run.stdout.decode("utf-8", "replace")
    if (claim := _CLAIM.search(printed)) is not None:
        problems.append(f"claims success: {printed[claim.start() :][:60]!r}")
    if any(
        "-" not in number
        for line in _NUMBERS.findall(printed)
        for number in re.findall(r"-?\d+", line)
    ):
        problems.append(f"a forbidden system call worked: {printed[:60]!r}")
    return problems


class _Host:
    """The targets of the programs: a listener, a secret (in a file and the environment) and a
    canary; also detects what the programs left behind."""

    def __enter__(self) -> _Host:
        self.secret = secrets.token_hex(16)
        self._directory = tempfile.TemporaryDirectory(prefix="emberl-attacks-")
        folder = Path(self._directory.name)
        self._secret_file = folder / "secret"
        self._canary = folder / "canary"
        self._secret_file.write_text(self.secret)
        self._canary.write_text("untouched")
        os.environ["EMBERL_ATTACK_SECRET"] = self.secret
        self._tcp = socket.create_server(("127.0.0.1", 0))
        self.port = self._tcp.getsockname()[1]
        self._abstract = socket.socket(socket.AF_UNIX)
        self._abstract.bind(f"\0rew{self.port}")
        self._abstract.listen()
        self.connections: list[str] = []
        for listener in (self._tcp, self._abstract):
            threading.Thread(target=self._listen, args=(listener,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        del os.environ["EMBERL_ATTACK_SECRET"]
        for listener in (self._tcp, self._abstract):
            with contextlib.suppress(OSError):
                listener.shutdown(socket.SHUT_RDWR)  # wakes the thread in accept
            listener.close()
        self._directory.cleanup()

    def _listen(self, listener: socket.socket) -> None:
        with contextlib.suppress(OSError):  # closed on leaving
            while True:
                connection, _ = listener.accept()
                self.connections.append(str(listener.family))
                connection.close()

    def filled(self, code: str) -> str:
        for name, value in (
            ("PORT", self.port),
            ("SECRETFILE", self._secret_file),
            ("CANARY", self._canary),
        ):
            code = code.replace(f"@{name}@", str(value))
        return code

    def state(self, code: str) -> tuple[int, set[str], set[str]]:
        """Number of processes below this one, files that the program may have made, and System V
        shared memory."""
        return len(list(descendants(os.getpid()))), set(_files(code)), _segments()

    def changes(self, before: tuple[int, set[str], set[str]], code: str) -> list[str]:
        changes = [f"connected to the host ({len(self.connections)})"] if self.connections else []
        self.connections.clear()
        if self._canary.read_text() != "untouched":
            changes.append("overwrote a file of the host")
            self._canary.write_text("untouched")
        deadline = time.monotonic() + 2.0
        while (count := len(list(descendants(os.getpid())))) > before[
            0
        ] and time.monotonic() < deadline:
            time.sleep(0.02)  # a reaped process may still be listed for a moment
        if count > before[0]:
            changes.append(f"left {count - before[0]} processes behind")
        if files := set(_files(code)) - before[1]:
            changes.append(f"left files behind: {sorted(files)}")
        if segments := _segments() - before[2]:
            changes.append(f"left shared memory behind: {sorted(segments)}")
        return changes


def _files(code: str) -> Iterator[str]:
    """Yields entries of folders that a program could write to, if their names occur in its text."""
    for folder in ("/", "/tmp", "/dev/shm", "/dev/mqueue", "."):
        with contextlib.suppress(OSError):
            yield from (f"{folder}/{name}" for name in os.listdir(folder) if name in code)


def _segments() -> set[str]:
    with contextlib.suppress(OSError):
        return {
            " ".join(line.split()[:2])
            for line in Path("/proc/sysvipc/shm").read_text().splitlines()[1:]
        }
    return set()
