"""The nouns of the sandbox: `Limits` of a run, the finished `Run` and its `Outcome`, and what can
go wrong with neither."""

from __future__ import annotations

import signal
from dataclasses import dataclass
from enum import StrEnum


class SandboxError(RuntimeError):
    """The sandbox failed; says nothing about the program that it was to run."""


class SandboxUnavailable(SandboxError, ValueError):
    """This machine gives no sandbox; the message says why and what to do."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """The limits of one run.

    Time is the program's own, so that a loaded machine changes no verdict: that in which it waits
    for a processor does not count.
    """

    seconds: float = 5.0
    """Processor time of the run: all calls of a function test together, or one run of a program."""
    memory_mb: int = 512
    """Address space in MiB, the interpreter's own 30 or so included."""
    output_bytes: int = 1 << 20
    """Most bytes of each of stdout and stderr, and of one returned value."""

    def __post_init__(self) -> None:
        if not 0 < self.seconds <= 3600:
            raise ValueError(
                f"limits.seconds is {self.seconds}; it must be above 0 and at most 3600"
            )
        if self.memory_mb < 64:
            raise ValueError(
                f"limits.memory_mb is {self.memory_mb}; an interpreter needs at least 64"
            )
        if not 0 < self.output_bytes <= 1 << 28:
            raise ValueError(
                f"limits.output_bytes is {self.output_bytes}; it must be between 1 and 2**28"
            )

    @property
    def own_seconds(self) -> float:
        """Running and sleeping together, waiting for a processor left out."""
        return 2 * self.seconds + 0.5

    @property
    def wall_seconds(self) -> float:
        """When a run is given up whatever it did: a machine that gave it so little time gives no
        verdict either."""
        return 30 * self.seconds + 60


class Outcome(StrEnum):
    """How a run ended; everything here is the program's own doing."""

    EXITED = "exited"
    CRASHED = "crashed"
    TIME_LIMIT = "time limit"
    MEMORY_LIMIT = "memory limit"
    OUTPUT_LIMIT = "output limit"
    THREAD_LIMIT = "thread limit"
    STOPPED = "stopped"  # by the parent, which had heard enough


OVER_LIMIT = (Outcome.TIME_LIMIT, Outcome.MEMORY_LIMIT, Outcome.OUTPUT_LIMIT, Outcome.THREAD_LIMIT)


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """One finished run, e.g. `Run(outcome=Outcome.EXITED, exit_code=0, stdout=b"5\\n", ...)`."""

    outcome: Outcome
    exit_code: int
    """Of the process; minus the signal's number if one ended it."""
    seconds: float
    cpu_seconds: float
    peak_bytes: int
    stdout: bytes = b""
    stderr: bytes = b""

    def __str__(self) -> str:
        if self.outcome is Outcome.CRASHED:
            names = {entry.value: entry.name for entry in signal.Signals}
            return f"ended by {names.get(-self.exit_code, 'a signal')}"
        return (
            f"exit code {self.exit_code}" if self.outcome is Outcome.EXITED else str(self.outcome)
        )


class ProgramEnded(Exception):
    """The program of a session ended, or broke the protocol, instead of answering; `run` says how
    it ended."""

    def __init__(self, run: Run) -> None:
        super().__init__(str(run))
        self.run = run
