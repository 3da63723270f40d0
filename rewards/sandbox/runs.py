"""The types of a run: `Limits`, `Run`, `Outcome`, and the errors that are neither."""

from __future__ import annotations

import signal
from dataclasses import dataclass
from enum import StrEnum


class SandboxError(RuntimeError):
    """The sandbox failed, which says nothing about the program."""


class SandboxUnavailable(SandboxError, ValueError):
    """This machine supports no sandbox; the message gives the reason and the remedy."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """The limits of one run.

    Time is the program's own: waiting for a processor does not count, so that a loaded machine
    changes no verdict.
    """

    seconds: float = 5.0
    """Processor seconds of the run: of all calls of a function together, or of one run of a
    program."""
    memory_mb: int = 512
    """Address space in MiB, including about 30 for the interpreter."""
    output_bytes: int = 1 << 20
    """Most bytes of stdout, of stderr, and of one returned value."""

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
        """Seconds of running and sleeping together, without waiting for a processor."""
        return 2 * self.seconds + 0.5

    @property
    def wall_seconds(self) -> float:
        """Wall seconds after which a run is given up without a verdict, as the machine gave it too
        little time."""
        return 30 * self.seconds + 60


class Outcome(StrEnum):
    """The way a run ended, by the doing of its program."""

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
    """The exit code, or minus the number of the signal that ended the process."""
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
    """The program of a session ended, or broke the protocol, instead of answering. `run`: its
    run."""

    def __init__(self, run: Run) -> None:
        super().__init__(str(run))
        self.run = run
