"""The pool's records of a group that is asked for, and of a worker."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from .actors import ActorLostError
from .environments import GroupEpisodes
from .samples import Completion, Prompt, Sampling


@dataclass(kw_only=True, slots=True, eq=False)
class Job:
    """A group that is asked for."""

    prompt: Prompt
    n: int
    sampling: Sampling
    outcome: asyncio.Future[tuple[Completion, ...]] = field(
        default_factory=lambda: asyncio.get_running_loop().create_future()
    )
    """The completions in sample order; an `ActorLostError` where there will be none; cancelled with
    the group."""
    reissued: Callable[[], None] = lambda: None
    """Called when the group is asked for again because its worker was lost."""
    was_cut: Callable[[tuple[Completion, ...]], None] = lambda parts: None
    """Called when a group that `RolloutPool.cut` ended had begun: its samples as far as they had
    come."""
    cost: float = 0.0
    """Tokens that it is expected to have."""
    cut: bool = False
    episodes: GroupEpisodes = field(default_factory=GroupEpisodes)

    @property
    def samples(self) -> int:
        """Answers that are to be decoded in this turn."""
        return len(self.episodes.going_on) or self.n

    def finish(self, completions: tuple[Completion, ...]) -> None:
        if not self.outcome.done():
            self.outcome.set_result(completions)

    def fail(self, failure: ActorLostError) -> None:
        if not self.outcome.done():
            self.outcome.set_exception(failure)
            self.outcome.exception()  # who waits for another group may have raised it already


MOST_SPANS = 100
"""That are remembered of a worker while nobody asks."""


@dataclass(kw_only=True, slots=True, eq=False)
class WorkerState:
    """One worker's place in the pool; the actor on it may be replaced."""

    worker: Any
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    """Held while the actor is replaced or its weights are."""
    report: dict[str, float] = field(default_factory=dict)
    """Metrics of bringing the actor that replaced another to the newest weights."""
    restarts: int = 0
    gone: bool = False
    """For good: its node was lost, and others do its work."""
    idle: float = 0.0
    """Seconds without a job before this time."""
    idle_since: float | None = field(default_factory=time.monotonic)
    """None: it has a job."""
    busy_since: float = 0.0
    """`time.time()` since which it has had one, or since `busy_spans` last told."""
    told: list[tuple[float, float]] = field(default_factory=list)
    """Ended times with a job that `busy_spans` has not told yet; the newest `MOST_SPANS`."""

    def busy(self, jobs: int) -> None:
        """It has so many jobs from now on."""
        now = time.monotonic()
        if self.idle_since is None and not jobs:
            self.idle_since = now
            self.told = [*self.told[-MOST_SPANS:], (self.busy_since, time.time())]
        elif self.idle_since is not None and jobs:
            self.idle += now - self.idle_since
            self.idle_since = None
            self.busy_since = time.time()

    def busy_spans(self) -> list[tuple[float, float]]:
        """When it had jobs since the last call: pairs of `time.time()`."""
        spans, self.told = self.told, []
        if self.idle_since is None:
            now = time.time()
            spans = [*spans, (self.busy_since, now)]
            self.busy_since = now
        return spans

    def idle_seconds(self) -> float:
        """Since it began."""
        return self.idle + (0.0 if self.idle_since is None else time.monotonic() - self.idle_since)
