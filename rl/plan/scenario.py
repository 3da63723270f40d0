"""The nouns of `emberl plan`: what a simulated run is made of. Times are seconds, lengths tokens,
sizes bytes.

A `Scenario` holds numbers only; `plan_devices` gets them from data sheets and `plan_calibrate` from
a run.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from statistics import NormalDist
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from ...rollout.schedule import Overdue

InFlight = Literal["update", "finish", "park"]
Floats = NDArray[np.float64]


class Problem(NamedTuple):
    """A prompt, and what makes its answers as long as they are."""

    prompt: int
    """Tokens."""
    kind: float


class Lengths(Protocol):
    """Where the lengths of answers come from."""

    def problem(self, rng: np.random.Generator) -> Problem: ...

    def answers(self, problem: Problem, rng: np.random.Generator, group_size: int) -> Floats:
        """[G] tokens; drawn anew each time that the problem is asked."""
        ...

    @property
    def mean(self) -> float:
        """Tokens of an answer."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class LognormalLengths:
    """Long-tailed answers, cut at a longest one: an answer's length is lognormal before the cut."""

    mean_uncut: float
    cv: float
    """Standard deviation over the mean, before the cut; 0: all answers are equally long."""
    cap: float
    prompt: int = 0
    correlation: float = 0.0
    """Of the logarithms within a group: a hard problem makes all its answers long."""

    def problem(self, rng: np.random.Generator) -> Problem:
        return Problem(self.prompt, rng.standard_normal())

    def answers(self, problem: Problem, rng: np.random.Generator, group_size: int) -> Floats:
        sigma = np.sqrt(np.log1p(self.cv**2))
        own = rng.standard_normal(group_size)
        z = np.sqrt(self.correlation) * problem.kind + np.sqrt(1 - self.correlation) * own
        lengths: Floats = np.clip(
            np.rint(self.mean_uncut * np.exp(sigma * z - sigma**2 / 2)), 1, self.cap
        )
        return lengths

    @property
    def mean(self) -> float:
        z = (np.arange(20_000) + 0.5) / 20_000
        sigma = np.sqrt(np.log1p(self.cv**2))
        quantiles = np.array([NormalDist().inv_cdf(p) for p in z])
        return float(
            np.minimum(self.mean_uncut * np.exp(sigma * quantiles - sigma**2 / 2), self.cap).mean()
        )


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class TraceLengths:
    """Lengths that a run recorded: whole groups are drawn again, so what answers to one prompt have
    in common stays, and a prompt that is asked twice takes as long."""

    prompts: tuple[int, ...]
    recorded: tuple[Floats, ...]
    """Tokens of each group's answers."""

    def problem(self, rng: np.random.Generator) -> Problem:
        i = int(rng.integers(len(self.prompts)))
        return Problem(self.prompts[i], i)

    def answers(self, problem: Problem, rng: np.random.Generator, group_size: int) -> Floats:
        recorded = self.recorded[int(problem.kind)]
        return recorded if len(recorded) == group_size else rng.choice(recorded, group_size)

    @property
    def mean(self) -> float:
        return float(np.concatenate(self.recorded).mean())


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class DecodeTable:
    """How fast one worker decodes: seconds of a step, in which each running answer gets a token.

    Bilinear between its points and constant beyond them: a table should reach as far as the plan
    goes.
    """

    running: Floats
    """[R] answers in the batch, ascending."""
    context: Floats
    """[C] mean tokens of prompt and answer so far that each of them reads, ascending."""
    seconds: Floats
    """[R, C]"""
    prefill: float = 0.0
    """Seconds per prompt token; decoding stands still meanwhile."""

    def __post_init__(self) -> None:
        shape = (len(self.running), len(self.context))
        if self.seconds.shape != shape or not (
            np.all(self.seconds > 0) and np.all(np.isfinite(self.seconds))
        ):
            raise ValueError(
                f"a decode table needs {shape} positive step times, got {self.seconds.shape}"
            )
        if np.any(np.diff(self.running) <= 0) or np.any(np.diff(self.context) <= 0):
            raise ValueError("a decode table's batches and contexts must ascend")

    @classmethod
    def constant(cls, tokens_per_second: float) -> DecodeTable:
        """Every answer gets this many tokens a second, whatever else runs."""
        seconds = np.array([[1 / tokens_per_second]])
        return cls(running=np.array([1.0]), context=np.array([0.0]), seconds=seconds)

    def rows(self, slots: int) -> list[list[float]]:
        """[slots + 1][C]: the step times of each batch."""
        batches = np.arange(slots + 1, dtype=np.float64)
        columns = [np.interp(batches, self.running, column) for column in self.seconds.T]
        return [list(map(float, row)) for row in np.stack(columns, axis=1)]


@dataclass(frozen=True, kw_only=True, slots=True)
class RewardTime:
    """How long marking takes."""

    seconds: float = 0.0
    """From a group's last token until the learner may have it; the mean."""
    cv: float = 0.0
    """0: always the same; else lognormal."""
    graders: int = 8
    """Groups that are marked at the same time."""

    def draw(self, rng: np.random.Generator) -> float:
        if self.cv == 0:
            return self.seconds
        sigma = np.sqrt(np.log1p(self.cv**2))
        return float(self.seconds * np.exp(sigma * rng.standard_normal() - sigma**2 / 2))


@dataclass(frozen=True, kw_only=True, slots=True)
class Publication:
    """The times of publishing a new version of the weights. The learners wait until every worker
    serves it."""

    encode: float = 0.0
    """Finding and coding what changed, on the learners."""
    transfer: float = 0.0
    """Until the bytes are on every rollout node."""
    commit: float = 0.0
    """Writing them into the engine, during which it cannot decode."""
    staged: bool = True
    """The bytes are prepared beside the weights that are served, so decoding goes on until the
    commit. False: they are written into the live weights as they come, and decoding stands still
    for the transfer too."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Failures:
    """Of rollout workers."""

    mtbf: float = np.inf
    """Mean seconds between two losses of one worker."""
    restart: float = 60.0
    """Until its replacement decodes."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Scenario:
    """One run to simulate."""

    workers: int
    """Rollout engines."""
    slots: int
    """Answers that one of them decodes at a time."""
    given: int | None = None
    """Answers of incomplete groups that the pool gives one of them at a time; those without a slot
    wait there. None: all."""
    table: DecodeTable
    lengths: Lengths
    prompts_per_step: int
    """B, groups."""
    group_size: int
    """G, answers to each prompt."""
    learner_fixed: float
    """Seconds of a step whatever its size: everything between the last group and the
    publication."""
    learner_per_token: float
    """And for each token of the groups, prompts included."""
    max_staleness: int = 0
    overdue: Overdue = "wait"
    in_flight: InFlight = "update"
    oversample: float = 1.0
    reward: RewardTime = field(default_factory=RewardTime)
    publication: Publication = field(default_factory=Publication)
    failures: Failures = field(default_factory=Failures)
    steps: int = 20
    warmup: int = 5
    """Steps that the figures leave out: the first ones fill the pipeline."""
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.warmup < self.steps:
            raise ValueError(
                f"warmup={self.warmup} must leave some of the {self.steps} steps to measure"
            )
        if self.workers < 1 or self.slots < 1:
            raise ValueError(
                f"workers={self.workers} with slots={self.slots} cannot decode; use at least 1 of"
                " each"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class StepRecord:
    """One simulated step; times are on the simulation's clock."""

    start: float
    """The learners begin to wait for groups."""
    trained_from: float
    published_from: float
    end: float
    answer_tokens: int
    tokens: int
    """Answers and prompts."""
    lags: dict[int, float]
    """Versions behind the one that is trained -> tokens of answers."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Usage:
    """Of all rollout workers, since the beginning."""

    time: float
    idle: float
    """Worker-seconds with nothing to decode."""
    held: float
    """Worker-seconds in which running answers stood still for new weights."""
    slot_seconds: float
    """Of slots in use."""
    decoded: float
    """Tokens, those that were thrown away included."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Trace:
    """A simulated run."""

    scenario: Scenario
    steps: tuple[StepRecord, ...]
    usage: tuple[Usage, ...]
    """At the beginning and after each step."""
    counts: Any
    """The schedule's own books (`rollout.schedule.Counts`)."""
    lost: int
    """Workers."""
    reissued: int
    """Groups that were decoded again because their worker was lost."""
