"""The rollout pool: deals groups to the workers, gathers what they decode, and replaces a worker
that is lost.

Everything runs on the driver's event loop. Every request has an owner and a deadline; what a lost
worker had not answered is asked again of another.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Collection, Coroutine, Sequence
from dataclasses import replace
from typing import Any

import ray

from .actors import (
    LOST,
    ActorLostError,
    PlaceLostError,
    WorkerLostError,
    call,
    catch_up,
    cause,
)
from .dispatch import Dispatch
from .engine import Request
from .environments import Episodes
from .jobs import Job, WorkerState
from .samples import Completion, Prompt, Sampling
from .weights.canary import Canary, DecodeProof
from .weights.transport import WeightUpdate


class RolloutPool:
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
        self._sync_timeout = sync_timeout
        self._all_at_once = max_samples is None
        self._respawn = respawn
        self._max_restarts = max_restarts if respawn is not None else 0
        self._seats = [WorkerState(worker=worker) for worker in workers]
        self._dispatch: Dispatch[Job] = Dispatch(len(workers), max_samples)
        self._tell = tell
        for i in gone:
            self._seats[i].gone = True
            self._dispatch.set_up(i, False)
        self.episodes: Episodes | None = None
        """Where an environment answers the model: the loop over turns."""
        # groups that no worker has and that are to have another turn, or may have one
        self._between: set[Job] = set()
        self._next: list[Job] = []  # of these, those whose environments have answered
        self._latest: WeightUpdate | None = None
        self._probed: list[int] = []
        self.served = -1
        """The version that every worker serves at least."""
        self._new_version = asyncio.Condition()
        self._failure: ActorLostError | None = None
        self._lengths, self._answers = 0.0, 0
        self.restarts = 0
        """Workers that were replaced."""
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def workers(self) -> tuple[Any, ...]:
        return tuple(seat.worker for seat in self._seats)

    @property
    def gone(self) -> tuple[int, ...]:
        """Workers that are lost for good, while others do their work."""
        return tuple(i for i, seat in enumerate(self._seats) if seat.gone)

    @property
    def announced(self) -> int:
        """The newest version that workers were told of; -1: none."""
        return -1 if self._latest is None else self._latest.version

    def _here(self) -> list[int]:
        return [i for i, seat in enumerate(self._seats) if not seat.gone]

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
        """Has every worker serve the version that is announced: all prepare it while they decode,
        then all commit. Returns the figures of each (`receiver.Report`), with the version that it
        serves."""
        return await self._serve_version(update, self._sync_timeout)

    def serve_later(self, update: WeightUpdate) -> None:
        """As `serve`, but returns at once: each worker serves the new version when it has finished
        what it decodes, and begins nothing before. What fails is raised by whatever is asked for
        next."""

        async def work() -> None:
            try:
                await self._serve_version(update, self._sync_timeout + self._timeout)
            except ActorLostError as failure:
                self._fail(failure)

        self._begin(work())

    async def served_after(self, version: int) -> int:
        """Waits until every worker serves a newer version than this one; returns that."""
        async with self._new_version:
            await self._new_version.wait_for(lambda: self.served > version)
            return self.served

    async def digests(self) -> list[dict[str, str]]:
        """What each worker holds: name -> xxh3-128 of the bytes."""
        refs = [self._seats[i].worker.digests.remote() for i in self._here()]
        return list(await asyncio.wait_for(asyncio.gather(*refs), self._sync_timeout))

    async def probe(self, token_ids: Sequence[int]) -> list[Any]:
        """What each worker that is here gives these tokens: [T-1] log-probs of all but the
        first."""
        return await self._of_each("probe", token_ids, False)

    async def reload(self, worker: int, token_ids: Sequence[int]) -> Any:
        """The same of one of these, after its engine has loaded all weights once more."""
        return await self._until_answered(self._asked(worker), "probe", token_ids, True)

    async def decoded_anew(
        self, worker: int, requests: Sequence[Request]
    ) -> list[tuple[Completion, Any]]:
        """`decoded` of one worker, after its engine has loaded all weights once more."""
        await self.reload(worker, requests[0][0].token_ids)
        found: list[tuple[Completion, Any]] = await self._until_answered(
            self._asked(worker), "decoded", requests
        )
        return found

    async def prove(self, canary: Canary, requests: Sequence[Request]) -> list[DecodeProof | None]:
        """Of each worker (`GroupService.prove`)."""
        return await self._of_each("prove", canary, requests)

    async def decoded(self, requests: Sequence[Request]) -> list[list[tuple[Completion, Any]]]:
        """Of each worker (`GroupService.decoded`)."""
        return await self._of_each("decoded", requests)

    async def _of_each(self, method: str, *arguments: Any) -> list[Any]:
        """Of each worker that is here."""
        self._probed = self._here()
        work = (self._until_answered(i, method, *arguments) for i in self._probed)
        found = zip(self._probed, await asyncio.gather(*work), strict=True)
        return [answer for i, answer in found if not self._seats[i].gone]

    def _asked(self, worker: int) -> int:
        """The seat of one of those that `_of_each` gave an answer of."""
        return [i for i in self._probed if not self._seats[i].gone][worker]

    async def sleep(self, level: int) -> None:
        """Every worker leaves its device to the learners, once nothing is decoded; `serve` or
        `wake` ends that."""
        await self._everybody("sleep", level)

    async def trace(self, begin: bool) -> list[bytes]:
        """Begins a trace of every worker's process, or ends it: what each recorded."""
        refs = [self._seats[i].worker.trace.remote(begin) for i in self._here()]
        return list(await asyncio.wait_for(asyncio.gather(*refs), self._sync_timeout))

    async def wake(self) -> None:
        """Every worker serves what it served."""
        await self._everybody("wake")

    def idle_seconds(self) -> list[float]:
        """Of each worker since the pool began: the time in which it had nothing to decode."""
        return [seat.idle_seconds() for seat in self._seats]

    def busy_spans(self) -> list[tuple[int, float, float]]:
        """(worker, beginning, end) of the times with something to decode since the last call, as
        `time.time()`."""
        return [(i, *span) for i, seat in enumerate(self._seats) for span in seat.busy_spans()]

    # Groups

    def submit(self, jobs: Sequence[Job]) -> None:
        """Asks for these groups: gives them to the workers that have the least to do; what they may
        not take yet stays in the backlog."""
        expected = self._lengths / self._answers if self._answers else None
        for job in jobs:
            job.cost = job.samples * (job.sampling.max_tokens if expected is None else expected)
        self._dispatch.backlog.extend(jobs)
        if self._failure is not None:
            self._fail(self._failure)
        for i, share in sorted(self._dispatch.deal().items()):
            self._seats[i].busy(len(share))
            self._begin(self._serve(i, share))

    def _begin(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        """An error of our own must reach those who wait, too."""
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            self._fail(ActorLostError(f"the rollout pool failed: {type(error).__name__}: {error}"))

    def _release(self, i: int, job: Job) -> None:
        self._dispatch.release(i, job)
        self._seats[i].busy(len(self._dispatch.jobs[i]))

    async def _serve(self, i: int, share: Sequence[Job]) -> None:
        """One request of a worker: all its groups, within the deadline.

        Where everything is asked for at once, the worker that takes a lost one's place gets the
        same request again, whatever of it had come: what decodes together decides the last bits of
        the log-probs, so the run repeats bit for bit. Otherwise what is left goes to whoever has
        least to do.
        """
        left = dict(enumerate(share))
        request = [(job.prompt, job.samples, job.sampling) for job in share]
        begun = {job.prompt.id: tuple(job.episodes.going_on) for job in share}
        while True:
            worker = self._seats[i].worker
            try:
                await self._stream(i, worker, request, begun, left)
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
        self, i: int, worker: Any, request: Any, begun: Any, left: dict[int, Job]
    ) -> None:
        """Takes the groups that are `left` of a request as they come."""
        deadline = time.monotonic() + self._timeout
        stream = worker.generate.options(num_returns="streaming").remote(request, begun)
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
        """Brings another worker to the place of a lost one; whether it is to be asked for the same
        again."""
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
        again = self._all_at_once and not self._seats[i].gone
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
        """The environments answer a group's turn; then it is to have another, or is there."""
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
        """Deals the groups that go on, before new ones. Where everything was asked for at once,
        they wait for each other, so that what decodes together does not depend on the clock and a
        synchronous run repeats bit for bit."""
        under_way = (
            self._dispatch.backlog
            or any(self._dispatch.jobs)
            or len(self._next) < len(self._between)
        )
        if not self._next or (self._all_at_once and under_way):
            return
        jobs = sorted(self._next, key=lambda job: job.prompt.id)
        self._between.difference_update(jobs)
        self._next, waiting = [], list(self._dispatch.backlog)
        self._dispatch.backlog.clear()
        self.submit([*jobs, *waiting])

    def cut(self, jobs: Sequence[Job]) -> None:
        """Ends these groups."""
        for job in jobs:
            job.cut = True
            job.outcome.cancel()
        cut = self._dispatch.remove(lambda job: job.cut)
        for job in [job for job in self._between if job.cut]:
            self._between.remove(job)
            job.was_cut((*job.episodes.ended, *job.episodes.going_on))
        self._next = [job for job in self._next if not job.cut]
        for i, mine in cut.items():
            self._seats[i].busy(len(self._dispatch.jobs[i]))
            self._begin(self._end(self._seats[i].worker, {job.prompt.id: job for job in mine}))
        self.submit([])
        self._next_turns()

    async def _end(self, worker: Any, jobs: dict[str, Job]) -> None:
        try:
            ended = await asyncio.wait_for(worker.cut.remote(list(jobs)), self._sync_timeout)
        except LOST:  # whoever waits for its other groups finds that out
            return
        for parts in ended:
            job = jobs[parts[0].prompt_id]
            job.was_cut((*job.episodes.ended, *parts))

    def _fail(self, failure: ActorLostError) -> None:
        """Nothing more will come: tells everybody who waits."""
        self._failure = self._failure or failure  # the first is the cause
        jobs = [*self._dispatch.clear(), *self._between]
        self._between.clear()
        self._next.clear()
        for job in jobs:
            job.fail(self._failure)

    async def _replace(self, i: int, lost: Any, why: str) -> None:
        """A new actor on the seat, with the weights that are served now. Where that is not allowed
        or does not help, the others do its work, and ActorLostError if there is none."""
        seat = self._seats[i]
        async with seat.lock:
            while seat.worker is lost and not seat.gone:
                self._dispatch.set_up(i, False)
                if self._respawn is None or seat.restarts >= self._max_restarts:
                    tried = f" (restarted {seat.restarts} times)" if seat.restarts else ""
                    self._give_up(i, f"{why}{tried}")
                    return
                seat.restarts += 1
                self.restarts += 1
                try:
                    fresh = await asyncio.to_thread(self._respawn, i)
                    if self._latest is not None:
                        peers = [
                            other.worker
                            for j, other in enumerate(self._seats)
                            if j != i and self._dispatch.up[j]
                        ]
                        who, timeout = f"rollout worker {i}", self._sync_timeout
                        seat.report = await catch_up(
                            fresh, self._latest, peers, who=who, timeout=timeout
                        )
                except PlaceLostError as error:
                    self._give_up(i, f"{why}; {error}")
                    return
                except (*LOST, WorkerLostError) as error:
                    why = f"rollout worker {i}, restarted: {cause(error)}"
                    continue
                seat.worker = fresh
                self._dispatch.set_up(i, True)

    def _give_up(self, i: int, why: str) -> None:
        """Goes on without a worker; ActorLostError without any."""
        others = [j for j in self._here() if j != i]
        if not others or self._respawn is None or not self._max_restarts:
            raise ActorLostError(why)
        self._seats[i].gone = True
        self._tell(f"{why}; the run goes on with {len(others)} rollout workers")

    # Weights

    async def _serve_version(self, update: WeightUpdate, timeout: float) -> list[dict[str, float]]:
        self._latest = update
        seats = self._here()
        await asyncio.gather(*(self._ask(i, "prepare", update, self._sync_timeout) for i in seats))
        found = await asyncio.gather(
            *(self._ask(i, "commit", update.version, timeout) for i in seats)
        )
        reports = [
            report for i, report in zip(seats, found, strict=True) if not self._seats[i].gone
        ]
        async with self._new_version:
            self.served = max(self.served, update.version)
            self._new_version.notify_all()
        return reports

    async def _ask(self, i: int, method: str, argument: Any, timeout: float) -> dict[str, float]:
        seat = self._seats[i]
        async with seat.lock:  # a worker that is just being replaced
            worker = seat.worker
        if seat.gone:
            return seat.report
        try:
            work = getattr(worker, method).remote(argument)
            return await call(work, who=f"rollout worker {i}", what=method, timeout=timeout)
        except WorkerLostError as error:
            await self._replace(i, worker, str(error))  # which brings it to the newest version
        return seat.report

    async def _until_answered(self, i: int, method: str, *arguments: Any) -> Any:
        while not self._seats[i].gone:
            async with self._seats[i].lock:
                worker = self._seats[i].worker
            try:
                work = getattr(worker, method).remote(*arguments)
                return await call(
                    work, who=f"rollout worker {i}", what=method, timeout=self._sync_timeout
                )
            except WorkerLostError as error:
                await self._replace(i, worker, str(error))
        return None

    async def _everybody(self, method: str, *arguments: Any) -> None:
        async def ask(i: int) -> None:
            async with self._seats[i].lock:
                worker = self._seats[i].worker
            work = getattr(worker, method).remote(*arguments)
            await call(work, who=f"rollout worker {i}", what=method, timeout=self._sync_timeout)

        await asyncio.gather(*(ask(i) for i in self._here()))


def _late(error: BaseException) -> bool:
    """Whether the deadline has passed, rather than that the actor was found to be gone."""
    return isinstance(error, TimeoutError) and not isinstance(error, ray.exceptions.RayError)
