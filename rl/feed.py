"""The feed: keeps the rollout workers busy, has their answers graded as they come in, and gives the
training loop the groups of each step.

The loop awaits `take` once a step; between two calls the workers go on decoding, as far ahead as
`schedule.max_staleness` allows, and threads grade finished groups.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from ..rollout.actors import ActorLostError
from ..rollout.crew import Job
from ..rollout.samples import Completion
from ..rollout.schedule import Schedule
from .groups import Group
from .run import GRADERS, Run

Admission = tuple[int, int]
"""The key of a group before it is sampled: the position of its problem in the source, and the RL
step in which it was admitted, which gives the seed of its draws."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Feed:
    """The groups of one step."""

    groups: list[Group]
    """Groups in order of admission; with dynamic sampling also those without a signal, for the
    step's metrics."""
    waited: float
    """Seconds for which the learners had to wait."""
    metrics: dict[str, float]
    """`sched/*`."""


class GroupFeed:
    """An async context manager. Nothing is requested before the first `take`; requests that still
    run at the end are left to run."""

    def __init__(self, run: Run) -> None:
        schedule, filtered = run.config.schedule, run.config.filter
        self._run = run
        self._per_step = schedule.prompts_per_step
        self._dynamic = filtered.dynamic_sampling
        self._most_dropped = (filtered.max_rounds - 1) * self._per_step if self._dynamic else 0
        self._schedule: Schedule[tuple[int, Group]] = Schedule(
            groups_per_step=self._per_step,
            max_staleness=schedule.max_staleness,
            overdue="evict" if schedule.oversample > 1 else schedule.overdue,
            oversample=schedule.oversample,
        )
        self._open: dict[int, tuple[Admission, Job]] = {}  # by number
        self._again: list[Admission] = list(run.progress.pending)
        self._position = run.progress.position
        self._step = run.progress.step
        self._admitted = 0
        self._dropped: list[tuple[int, Group]] = []
        self._without_signal = 0  # groups that were dropped since the step began
        self._figures = _Figures(run)
        self._failure: BaseException | None = None
        # the sum of all deadlines that the pool and the graders keep themselves, so that this one
        # finds only what those forget
        graded = sum(part.deadline for part in run.config.reward.parts.values())
        replaced = run.config.cluster.start_timeout + run.config.sync.timeout
        rollout = run.config.rollout
        turns = 1 if rollout.environment is None else rollout.max_turns
        self._patience = (
            turns * (rollout.timeout + rollout.environment_timeout) + 2 * replaced + graded
        )
        self._changed = asyncio.Event()
        self._grading = asyncio.Semaphore(GRADERS)
        self._tasks: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> GroupFeed:
        self._begin(self._follow_versions(self._run.pool.served))
        return self

    async def __aexit__(self, *_: object) -> None:
        for task in self._tasks:
            task.cancel()

    async def take(self, step: int) -> Feed:
        """The groups of this step, fresh enough to train on the current version; requests more
        first.

        Raises the error that made a worker, or the grading of its answers, fail.
        """
        self._raise_failure()
        self._step = step
        version = self._run.progress.version
        self._without_signal = len(self._dropped)
        self._evict(self._schedule.close(version, min(self._run.pool.served, version)))
        self._schedule.check()
        start = time.perf_counter()
        while True:
            self._raise_failure()
            self._changed.clear()
            self._admit()
            if (taken := self._schedule.take(self._wanted())) is not None:
                break
            await self._change()
        sampled = sorted([*taken, *self._dropped], key=lambda pair: pair[0])
        self._dropped = []
        for number, _ in taken:
            del self._open[number]
        pending = (*self._again, *(self._open[number][0] for number in self._schedule.open))
        self._run.progress = self._run.progress.advance(position=self._position, pending=pending)
        waited = time.perf_counter() - start
        metrics = self._figures.of_step(self._schedule)
        self._figures.took([group for _, group in taken])
        return Feed(groups=[group for _, group in sampled], waited=waited, metrics=metrics)

    async def _change(self) -> None:
        """Waits until a group is graded, a new version is served, or something has failed. Raises
        ActorLostError if nothing happens within the deadline."""
        changed = asyncio.create_task(self._changed.wait())
        delivery = self._run.weights.under_way
        waiting: set[asyncio.Task[Any]] = {changed}
        if delivery is not None and not delivery.done():
            waiting.add(delivery)
        evaluation = self._run.evaluation
        evaluating = evaluation is not None and not evaluation.done()
        if evaluation is not None and evaluating:
            waiting.add(evaluation)  # its own requests have deadlines
        graded = self._run.suite.finished
        done, _ = await asyncio.wait(waiting, timeout=self._patience, return_when="FIRST_COMPLETED")
        changed.cancel()
        if not done and self._run.suite.finished == graded and not evaluating:
            raise ActorLostError(
                f"no group came within {self._patience:g} s, though"
                f" {self._schedule.running} are under way"
            )

    def _raise_failure(self) -> None:
        if self._failure is not None:
            raise self._failure
        self._run.weights.check()
        if self._run.evaluation is not None and self._run.evaluation.done():
            self._run.evaluation.result()

    def _begin(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            self._failure = self._failure or error
            self._changed.set()

    async def _follow_versions(self, version: int) -> None:
        """Admits more groups with every version that the workers serve, which makes room."""
        while True:
            version = await self._run.pool.served_after(version)
            self._admit()
            self._changed.set()

    def _evict(self, numbers: Sequence[int]) -> None:
        """Stops groups that are too old, or that were oversampled."""
        if numbers:
            self._run.pool.cut([self._open[number][1] for number in numbers])
        self._open = {number: self._open[number] for number in self._schedule.open}

    def _wanted(self) -> int:
        """Number of groups for this step: fewer than usual if too many had no signal."""
        exhausted = self._without_signal > self._most_dropped and not self._schedule.running
        return min(self._per_step, self._schedule.ready) if exhausted else self._per_step

    def _admit(self) -> None:
        """Requests as many groups as the schedule has room for."""
        schedule = self._schedule
        schedule.served = min(self._run.pool.served, schedule.version)
        if schedule.max_staleness == 0 and schedule.running:
            # a second round starts when the first is done, so that a synchronous run repeats bit
            # for bit
            return
        if self._without_signal > self._most_dropped:
            return
        jobs = []
        for _ in range(schedule.room):
            if self._again:
                ticket = self._again.pop(0)
            else:
                ticket = (self._position, self._step)
                self._position += 1
            number = self._admitted
            jobs.append(self._job(number, *ticket))  # first of all, since a source may fail
            self._admitted += 1
            schedule.admit(number)
            self._open[number] = (ticket, jobs[-1])
            self._begin(self._mark(number, jobs[-1]))
        if jobs:
            self._run.pool.submit(jobs)

    def _job(self, number: int, position: int, step: int) -> Job:
        return Job(
            prompt=self._run.source.train(position),
            n=self._run.config.rollout.group_size,
            sampling=self._run.sampling(step),
            reissued=partial(self._schedule.reissue, number),
            was_cut=self._figures.was_cut,
        )

    async def _mark(self, number: int, job: Job) -> None:
        """Waits for a group, grades it and gives it to the schedule."""
        completions = await job.outcome
        async with self._grading:
            group = await asyncio.to_thread(self._run.grade, job.prompt, completions)
        if number not in self._open:  # it was cut while it was marked
            return
        self._schedule.finish(number, (number, group), min(c.oldest_version for c in completions))
        if self._dynamic and not group.has_signal:
            self._schedule.drop(number)
            self._dropped.append((number, group))
            self._without_signal += 1
            del self._open[number]
            self._admit()
        self._changed.set()


def censored_mean(finished: Sequence[int], cut: Sequence[int]) -> float:
    """The mean length that answers would have if none were ended early: the area under Kaplan and
    Meier's (1958) estimate of the share of answers longer than x, up to the longest. `cut` are the
    lengths at which answers were ended early."""
    lengths = np.array([*finished, *cut])
    ended = np.array([True] * len(finished) + [False] * len(cut))
    mean, alive, at = 0.0, 1.0, 0
    for x in np.unique(lengths):
        mean += alive * (x - at)
        at = x
        alive *= 1 - (ended & (lengths == x)).sum() / (lengths >= x).sum()
    return float(mean)


class _Figures:
    """The `sched/*` metrics: differences since the last step of counters that only grow."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self._before: dict[str, float] = {}
        self._at = time.monotonic()
        self._idle = run.pool.idle_seconds()
        self._finished: list[int] = []  # lengths of answers that the last step trained on
        self._partial: list[Completion] = []  # answers of the groups that were cut after it

    def took(self, groups: Sequence[Group]) -> None:
        self._finished = [len(c) for group in groups for c in group.completions]

    def was_cut(self, parts: Sequence[Completion]) -> None:
        self._partial += parts

    def of_step(self, schedule: Schedule[tuple[int, Group]]) -> dict[str, float]:
        counts, pool = schedule.counts, self._run.pool
        totals = {
            "sched/groups_issued": counts.issued,
            "sched/groups_reissued": counts.reissued,
            "sched/groups_evicted": counts.cut + counts.stale,
            "sched/workers_restarted": pool.restarts,
        }
        since = {name: float(total - self._before.get(name, 0)) for name, total in totals.items()}
        self._before = dict(totals)
        now, idle = time.monotonic(), pool.idle_seconds()
        spent = [
            (after - before) / max(now - self._at, 1e-9)
            for after, before in zip(idle, self._idle, strict=True)
        ]
        self._at = now
        self._idle = idle
        if self._run.config.schedule.oversample > 1 and self._finished and self._partial:
            cut = [len(c) for c in self._partial if c.finish_reason == "abort"]
            whole = self._finished + [len(c) for c in self._partial if c.finish_reason != "abort"]
            expected = censored_mean(whole, cut)
            since["sched/oversample/length_bias"] = (
                sum(self._finished) / len(self._finished) / expected - 1
            )
        self._partial = []
        return since | {
            "sched/groups_running": float(schedule.running),
            "sched/groups_ready": float(schedule.ready),
            "sched/rollout_idle": sum(spent) / len(spent),
        }
