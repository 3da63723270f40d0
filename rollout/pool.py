"""The rollout pool: assigns groups to its workers, and gathers their completions.

Everything runs on the driver's event loop. Every request has an owner and a deadline; the
unfinished requests of a lost worker are submitted to another.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Collection, Coroutine, Sequence
from dataclasses import replace
from typing import Any

import ray

from .actors import LOST, ActorLostError, cause
from .crew import Crew, Job
from .environments import Episodes
from .samples import Completion, Prompt, Sampling
from .schedule import Dispatch
from .weights.transport import WeightUpdate


class RolloutPool(Crew):
    """The same prompts go to the same workers in the same order (`Dispatch`): a synchronous run
    repeats bit for bit."""

    def __init__(
        self,
        workers: Sequence[Any],
        *,
        timeout: float,
        sync_timeout: float,
        max_samples: int | None = None,
        respawn: Callable[[int], Any] | None = None,
        max_restarts: int = 0,
        gone: Collection[int] = (),
        tell: Callable[[str], None] = lambda _: None,
    ) -> None:
        """timeout: seconds for one request; sync_timeout: for an update of the weights.
        max_samples: answers that are given to a worker at a time; None: all. respawn: a new actor
        in the place of a lost one, `max_restarts` times. gone: workers that are lost for good.
        tell: that one was lost for good, and why."""
        self._timeout = timeout
        self._all_at_once = max_samples is None
        super().__init__(
            workers,
            Dispatch(len(workers), max_samples),
            sync_timeout=sync_timeout,
            respawn=respawn,
            max_restarts=max_restarts,
            gone=gone,
            tell=tell,
        )
        self.episodes: Episodes | None = None
        """The loop over turns; None without environments."""
        # groups between two turns, which no worker has
        self._between: set[Job] = set()
        self._next: list[Job] = []  # those of `_between` whose environments have answered
        self._failure: ActorLostError | None = None
        self._lengths = 0.0
        self._answers = 0
        self._tasks: set[asyncio.Task[None]] = set()

    async def generate(
        self, prompts: Sequence[Prompt], n: int, sampling: Sampling
    ) -> AsyncIterator[tuple[int, tuple[Completion, ...]]]:
        """Yields (index of the prompt, its n completions) as groups become complete, in no
        particular order."""
        jobs = [Job(prompt=prompt, n=n, sampling=sampling) for prompt in prompts]
        numbers = {job.outcome: number for number, job in enumerate(jobs)}
        self.submit(jobs)
        pending = set(numbers)
        while pending:  # each request has a deadline of its own, and then an outcome
            done, pending = await asyncio.wait(pending, return_when="FIRST_COMPLETED")
            for outcome in done:
                yield numbers[outcome], outcome.result()

    async def serve(self, update: WeightUpdate) -> list[dict[str, float]]:
        """Makes every worker serve the announced version: all prepare it while they decode, then
        all commit. Returns each worker's `receiver.Report`, with the version that it serves."""
        return await self._serve_version(update, self._sync_timeout)

    def serve_later(self, update: WeightUpdate) -> None:
        """As `serve`, but returns at once: each worker finishes its running groups, begins no new
        ones, and then serves the new version. A failure is raised by the next request."""

        async def work() -> None:
            try:
                # a commit comes after the running groups, which may take all of `timeout`
                await self._serve_version(update, self._sync_timeout + self._timeout)
            except ActorLostError as failure:
                self._fail(failure)

        self._begin(work())

    # Groups

    def submit(self, jobs: Sequence[Job]) -> None:
        """Requests these groups of the least loaded workers; those that no worker may take yet stay
        in the backlog."""
        expected = self._lengths / self._answers if self._answers else None
        for job in jobs:
            job.cost = job.samples * (job.sampling.max_tokens if expected is None else expected)
        self._dispatch.backlog.extend(jobs)
        if self._failure is not None:
            self._fail(self._failure)
        for i, share in sorted(self._dispatch.deal().items()):
            self._states[i].busy(len(share))
            self._begin(self._serve(i, share))

    def _begin(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        """Ends a background task; its unexpected error fails all groups, so that nobody waits for
        ever."""
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            self._fail(ActorLostError(f"the rollout pool failed: {type(error).__name__}: {error}"))

    def _release(self, i: int, job: Job) -> None:
        self._dispatch.release(i, job)
        self._states[i].busy(len(self._dispatch.jobs[i]))

    async def _serve(self, i: int, share: Sequence[Job]) -> None:
        """Sends one request, `share`, to worker i and gathers its groups within the deadline.

        Where all groups are submitted at once, the replacement of a lost worker gets the whole
        request again, whatever of it had come: the batch decides the last bits of the log-probs, so
        the run repeats bit for bit. Otherwise the remaining groups go to the least loaded workers.
        """
        left = dict(enumerate(share))
        request = [(job.prompt, job.samples, job.sampling) for job in share]
        partials = {job.prompt.id: tuple(job.episodes.going_on) for job in share}
        while True:
            worker = self._states[i].worker
            try:
                await self._stream(i, worker, request, partials, left)
                return
            except LOST as error:
                why = f"rollout worker {i}: {cause(error)}"
                if _late(error):
                    why = (
                        f"rollout worker {i} has not finished its answers within"
                        f" rollout.timeout={self._timeout:g} s; raise it, or lower"
                        " rollout.max_response_length"
                    )
                if not await self._after_loss(i, worker, why, left):
                    return
            except ray.exceptions.RayError as error:
                self._fail(ActorLostError(f"rollout worker {i}: {cause(error)}"))
                return

    async def _stream(
        self, i: int, worker: Any, request: Any, partials: Any, left: dict[int, Job]
    ) -> None:
        """Receives the groups that are `left` of a request as they become complete."""
        deadline = time.monotonic() + self._timeout
        stream = worker.generate.options(num_returns="streaming").remote(request, partials)
        try:
            while left:
                reference = await asyncio.wait_for(anext(stream), deadline - time.monotonic())
                for index, completions in await asyncio.wait_for(
                    reference, deadline - time.monotonic()
                ):
                    job = left.pop(index, None)
                    if job is not None and not job.cut:
                        self._finish(i, job, completions)
        except StopAsyncIteration:
            assert all(job.cut for job in left.values()), (
                f"rollout worker {i} left out groups that were not cut"
            )

    async def _after_loss(self, i: int, worker: Any, why: str, left: dict[int, Job]) -> bool:
        """Replaces a lost worker. Returns whether the same request is to be sent to its
        replacement."""
        lost = [job for job in left.values() if not job.cut]
        if not self._all_at_once:
            for job in lost:
                self._release(i, job)
        try:
            await self._replace(i, worker, why)
        except ActorLostError as failure:
            if not self._all_at_once:
                self._dispatch.backlog.extend(lost)
            self._fail(failure)
            return False
        again = self._all_at_once and not self._states[i].gone
        if self._all_at_once and not again:
            for job in lost:
                if not job.cut:
                    self._release(i, job)
        lost = [job for job in lost if not job.cut]
        for job in lost:
            if not job.episodes.going_on:  # else it goes on from its last turn, as old as it is
                job.reissued()
        if again:
            return bool(lost)
        self.submit(lost)
        self._next_turns()
        return False

    def _finish(self, i: int, job: Job, completions: tuple[Completion, ...]) -> None:
        if self._failure is not None:  # everybody was told already
            return
        self._release(i, job)
        if i:
            completions = tuple(replace(completion, worker=i) for completion in completions)
        had = sum(len(completion) for completion in job.episodes.going_on)
        self._lengths += sum(len(completion) for completion in completions) - had
        self._answers += len(completions)
        if self.episodes is None:
            job.finish(completions)
        else:
            self._between.add(job)
            self._begin(self._answer(self.episodes, job, completions))
        if self._dispatch.backlog:
            self.submit([])

    async def _answer(
        self, episodes: Episodes, job: Job, completions: tuple[Completion, ...]
    ) -> None:
        """Passes a group's turn to its environments; then the group awaits another turn, or is
        finished."""
        await episodes.advance(job.episodes, job.prompt, job.sampling, completions)
        if job not in self._between:  # it was cut meanwhile, or everything failed
            return
        if job.episodes.going_on:
            self._next.append(job)
        else:
            self._between.remove(job)
            job.finish(tuple(sorted(job.episodes.ended, key=lambda completion: completion.sample)))
        self._next_turns()

    def _next_turns(self) -> None:
        """Submits the groups that go on, before new ones. Where all groups are submitted at once
        they wait for each other: batches then do not depend on the clock, and a synchronous run
        repeats bit for bit."""
        under_way = (
            self._dispatch.backlog
            or any(self._dispatch.jobs)
            or len(self._next) < len(self._between)
        )
        if not self._next or (self._all_at_once and under_way):
            return
        jobs = sorted(self._next, key=lambda job: job.prompt.id)
        self._between.difference_update(jobs)
        self._next = []
        waiting = list(self._dispatch.backlog)
        self._dispatch.backlog.clear()
        self.submit([*jobs, *waiting])

    def cut(self, jobs: Sequence[Job]) -> None:
        """Ends these groups; `Job.was_cut` gets their partial samples."""
        for job in jobs:
            job.cut = True
            job.outcome.cancel()
        cut = self._dispatch.remove(lambda job: job.cut)
        for job in [job for job in self._between if job.cut]:
            self._between.remove(job)
            job.was_cut((*job.episodes.ended, *job.episodes.going_on))
        self._next = [job for job in self._next if not job.cut]
        for i, mine in cut.items():
            self._states[i].busy(len(self._dispatch.jobs[i]))
            self._begin(self._end(self._states[i].worker, {job.prompt.id: job for job in mine}))
        self.submit([])
        self._next_turns()

    async def _end(self, worker: Any, jobs: dict[str, Job]) -> None:
        try:
            ended = await asyncio.wait_for(worker.cut.remote(list(jobs)), self._sync_timeout)
        except LOST:  # found, and answered, by `_serve`, which waits for its other groups
            return
        for parts in ended:
            job = jobs[parts[0].prompt_id]
            job.was_cut((*job.episodes.ended, *parts))

    def _fail(self, failure: ActorLostError) -> None:
        """Fails every group, running or waiting; later ones fail at once with the same error."""
        self._failure = self._failure or failure  # the first is the cause
        jobs = [*self._dispatch.clear(), *self._between]
        self._between.clear()
        self._next.clear()
        for job in jobs:
            job.fail(self._failure)


def _late(error: BaseException) -> bool:
    """Whether the deadline has passed, rather than that the actor was found to be gone."""
    return isinstance(error, TimeoutError) and not isinstance(error, ray.exceptions.RayError)
