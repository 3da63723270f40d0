"""`Verdict`: the result of grading one completion.

A float cannot tell why it is zero. A wrong answer, an answer that could not be parsed, a program
that ran out of time and a grader that was killed are different results, and only the first three
say anything about the policy.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum


class Status(StrEnum):
    """The result of grading. Two have no score: a completion with `VERIFIER_ERROR` enters no loss
    and no baseline; a part of a reward returns `NOT_APPLICABLE` to leave the score to the other
    parts."""

    CORRECT = "correct"
    WRONG = "wrong"
    # some of the named parts or tests passed, or the score is graded rather than binary
    PARTIAL = "partial"
    UNPARSEABLE = "unparseable"  # the completion holds nothing that could be an answer
    # an answer that cannot be compared with the reference: scored as wrong, counted by itself
    UNKNOWN = "unknown"
    OVER_LIMIT = "over_limit"  # the model's own doing: a bomb, or its program's time or memory
    NOT_APPLICABLE = "not_applicable"  # this reward does not mark such samples (TRL's None)
    # ours: a killed worker, a broken plugin, a sandbox that failed
    VERIFIER_ERROR = "verifier_error"


UNSCORED = (Status.NOT_APPLICABLE, Status.VERIFIER_ERROR)
LARGEST_SCORE = 1e9
"""Largest magnitude of a score. A larger one is a fault of the grader, as squares and sums of it
overflow."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    """The result of grading one completion, e.g. `Verdict(status=Status.CORRECT, score=1.0,
    seconds=4e-6)`."""

    status: Status
    score: float | None
    """The reward; finite, or None for the statuses in `UNSCORED`."""
    parts: Mapping[str, float] = field(default_factory=dict)
    """Named components before weighting, e.g. `{"answer": 1.0, "format": 0.5}`; in the verdict of
    one part, numbers that it returned beside its score."""
    message: str = ""
    """The reason, in one line for a person."""
    seconds: float = 0.0
    """Wall seconds of the grading."""

    def __post_init__(self) -> None:
        if self.status in UNSCORED:
            assert self.score is None, f"{self.status} carries no score, got {self.score}"
        else:
            assert self.score is not None and math.isfinite(self.score), (
                f"{self.status} needs a finite score, got {self.score}"
            )

    @property
    def trains(self) -> bool:
        """Whether the completion may enter a loss and its group's baseline."""
        return self.score is not None


def verifier_error(message: str, seconds: float = 0.0) -> Verdict:
    """The verdict of a grader that failed through no fault of the model."""
    return Verdict(status=Status.VERIFIER_ERROR, score=None, message=message, seconds=seconds)


def not_applicable(message: str = "", seconds: float = 0.0) -> Verdict:
    """The verdict of a reward that does not mark samples of this kind."""
    return Verdict(status=Status.NOT_APPLICABLE, score=None, message=message, seconds=seconds)
