"""The nouns of `emberl plan`: what a simulated run is made of, and what is seen of it. Times are
seconds, lengths tokens, sizes bytes.

Groups of keys (`Settings`) are those of the command; the other parts of a `Scenario` are numbers
that follow from data sheets (`settings`) or from a run (`calibrate`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import inf
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from ...rollout.schedule import Overdue
from ..config.base import Settings

InFlight = Literal["update", "finish", "park"]
Floats = NDArray[np.float64]


def lognormal(mean: float, cv: float, z: Any) -> Any:
    """Values of this mean and standard deviation over mean, at z of the standard normal."""
    sigma = np.sqrt(np.log1p(cv**2))
    return mean * np.exp(sigma * z - sigma**2 / 2)


class LognormalLengths(Settings):
    """Lognormal answers, cut at a longest one; `--trace` takes recorded ones instead."""

    mean: float = Field(default=8192, gt=0)
    """Tokens, before the cut at `cap`."""
    cv: float = Field(default=1.0, ge=0)
    """Standard deviation over mean, before the cut; 0: all answers are equally long."""
    cap: int = Field(default=32768, ge=1)
    prompt: int = Field(default=512, ge=0)
    correlation: float = Field(default=0.0, ge=0, le=1)
    """Between the logarithms of the answers to one prompt: a hard problem makes all long."""

    def draw(self, rng: np.random.Generator, group_size: int) -> tuple[int, Floats]:
        """A prompt's tokens, and [G] those of its answers."""
        problem = rng.standard_normal()
        own = rng.standard_normal(group_size)
        z = np.sqrt(self.correlation) * problem + np.sqrt(1 - self.correlation) * own
        return self.prompt, np.clip(np.rint(lognormal(self.mean, self.cv, z)), 1, self.cap)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class TraceLengths:
    """Lengths that a run recorded: whole groups are drawn again, so what answers to one prompt have
    in common stays."""

    prompts: tuple[int, ...]
    recorded: tuple[Floats, ...]
    """Tokens of each group's answers."""

    def draw(self, rng: np.random.Generator, group_size: int) -> tuple[int, Floats]:
        """A prompt's tokens, and [G] those of its answers."""
        i = int(rng.integers(len(self.prompts)))
        own = self.recorded[i]
        return self.prompts[i], own if len(own) == group_size else rng.choice(own, group_size)

    @property
    def mean(self) -> float:
        """Tokens of an answer."""
        return float(np.concatenate(self.recorded).mean())


class PlanSchedule(Settings):
    """As `schedule` of a run's configuration."""

    prompts_per_step: int = Field(default=1024, ge=1)
    group_size: int = Field(default=16, ge=1)
    max_staleness: int = Field(default=8, ge=0)
    overdue: Overdue = "wait"
    in_flight: InFlight = "update"
    oversample: float = Field(default=1.0, ge=1)


class RewardTime(Settings):
    """How long marking takes."""

    seconds: float = Field(default=1.0, ge=0)
    """From a group's last token until the learners may have it; the mean."""
    cv: float = Field(default=1.0, ge=0)
    """0: always the same; else lognormal."""
    graders: int = Field(default=256, ge=1)
    """Groups at a time."""

    def draw(self, rng: np.random.Generator) -> float:
        return float(lognormal(self.seconds, self.cv, rng.standard_normal()))


class Failures(Settings):
    """Of rollout engines."""

    mtbf: float = Field(default=inf, gt=0, allow_inf_nan=True)
    """Hours between two losses of one engine, on average."""
    restart: float = Field(default=300.0, ge=0)
    """Seconds until its replacement decodes."""


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

    def rows(self, slots: int) -> list[list[float]]:
        """[slots + 1][C]: the step times of each batch."""
        batches = np.arange(slots + 1, dtype=np.float64)
        columns = [np.interp(batches, self.running, column) for column in self.seconds.T]
        return [list(map(float, row)) for row in np.stack(columns, axis=1)]


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
class Scenario:
    """One run to simulate."""

    workers: int
    """Rollout engines."""
    slots: int
    """Answers that one of them decodes at a time."""
    table: DecodeTable
    lengths: LognormalLengths | TraceLengths
    schedule: PlanSchedule
    learner_fixed: float
    """Seconds of a step whatever its size: everything between the last group and the
    publication."""
    learner_per_token: float
    """And for each token of the groups, prompts included."""
    reward: RewardTime
    publication: Publication = Publication()
    failures: Failures = field(default_factory=Failures)
    steps: int
    warmup: int
    """Steps that the figures leave out: the first ones fill the pipeline."""
    seed: int = 0


class Usage(NamedTuple):
    """Of one or all rollout workers, since the beginning."""

    idle: float = 0.0
    """Worker-seconds with nothing to decode."""
    held: float = 0.0
    """Worker-seconds in which running answers stood still for new weights."""
    slot_seconds: float = 0.0
    """Of slots in use."""
    decoded: float = 0.0
    """Tokens, those that were thrown away included."""


class StepRecord(NamedTuple):
    """One simulated step."""

    end: float
    """On the simulation's clock."""
    waited: float
    """Of the learners, for groups."""
    trained: float
    published: float
    answer_tokens: int
    lags: Mapping[int, float]
    """Versions behind the one that is trained -> tokens of answers."""
    usage: Usage
    """At its end."""
