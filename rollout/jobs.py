"""What the pool keeps of a group that is asked for, and of a worker."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from .actors import ActorLostError
from .environments import GroupEpisodes
from .samples import Completion, Prompt, Sampling

Outcome = tuple[Completion, ...] | ActorLostError


@dataclass(kw_only=True, slots=True, eq=False)
class Job:
    """A group that is asked for, and whom to tell."""

    prompt: Prompt
    n: int
    sampling: Sampling
    deliver: Callable[[Outcome], None]
    """Called once, in the pool's thread: the completions in sample order, or why there will be
    none."""
    reissued: Callable[[], None] = lambda: None
    """Called when the group is asked for again because its worker was lost."""
    was_cut: Callable[[tuple[Completion, ...]], None] = lambda parts: None
    """Called when a group that `RolloutPool.cut` ended had begun: its samples as far as they had
    come."""
    tokens: float = 0.0
    """What it is expected to cost, for balance."""
    cut: bool = False
    episodes: GroupEpisodes = field(default_factory=GroupEpisodes)

    @property
    def left(self) -> int:
        """Samples that are to be decoded in this turn."""
        return len(self.episodes.going_on) or self.n


@dataclass(kw_only=True, slots=True, eq=False)
class WorkerState:
    """One worker's place in the pool; the actor on it may be replaced."""

    worker: Any
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    """Held while the actor is replaced or its weights are."""
    jobs: set[Job] = field(default_factory=set)
    load: float = 0.0
    up: bool = True
    report: dict[str, float] = field(default_factory=dict)
    """What it took to bring the actor that replaced another to the newest weights."""
    restarts: int = 0
    idle: float = 0.0
    """Seconds without a job."""
    idle_since: float = field(default_factory=time.monotonic)

    @property
    def samples(self) -> int:
        return sum(job.left for job in self.jobs)

    def take(self, job: Job) -> None:
        if not self.jobs:
            self.idle += time.monotonic() - self.idle_since
        self.jobs.add(job)
        self.load += job.tokens

    def leave(self, job: Job) -> None:
        self.jobs.remove(job)
        self.load -= job.tokens
        if not self.jobs:
            self.load = 0.0  # not what rounding leaves of it: a tie must be one
            self.idle_since = time.monotonic()


__all__ = ["Job", "Outcome", "WorkerState"]
