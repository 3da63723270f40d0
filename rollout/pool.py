"""The rollout pool: deals groups to the workers, gathers what they decode, and replaces a worker
that is lost.

It lives on an event loop in a thread of its own, so that answers come in while the learners work.
Every request has an owner and a deadline; what a lost worker had not answered is asked again of
another.
"""

from __future__ import annotations

import asyncio
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Coroutine, Iterator, Sequence
from typing import Any, TypeVar

import ray

from .actors import LOST, ActorLostError, WorkerLostError, call, catch_up, cause
from .environments import Episodes
from .jobs import Job, Outcome, WorkerState
from .samples import Completion, Prompt, Sampling
from .weights.transport import WeightUpdate

T = TypeVar("T")


class RolloutPool:
    """Groups go to the worker with the fewest tokens to decode, so equal groups are dealt in turn
    and the same prompts go to the same workers in the same order: a synchronous run repeats bit for
    bit."""

    def __init__(
        self,
        workers: Sequence[Any],
        *,
        timeout: float,
        sync_timeout: float,
        max_samples: int | None = None,
        respawn: Callable[[int], Any] | None = None,
        max_restarts: int = 0,
    ) -> None:
        """timeout: seconds for one request; sync_timeout: for an update of the weights.
        max_samples: answers that are given to a worker at a time; None: all. respawn: a new actor
        in the place of a lost one, `max_restarts` times."""
        self._timeout, self._sync_timeout, self._max_samples = timeout, sync_timeout, max_samples
        self._respawn, self._max_restarts = respawn, max_restarts if respawn is not None else 0
        self._seats = [WorkerState(worker=worker) for worker in workers]
        self._backlog: deque[Job] = deque()
        self.episodes: Episodes | None = None
        """Where an environment answers the model: the loop over turns."""
        # groups that no worker has and that are to have another turn, or may have one
        self._between: set[Job] = set()
        self._next: list[Job] = []  # of these, those whose environments have answered
        self._latest: WeightUpdate | None = None
        self.served = -1
        """The version that every worker serves at least."""
        self.on_served: Callable[[], None] = lambda: None
        """Called, in whatever thread, when that has changed."""
        self._failure: ActorLostError | None = None
        self._lengths, self._answers = 0.0, 0
        self.restarts = 0
        """Workers that were replaced."""
        self._loop = asyncio.new_event_loop()
        self._tasks: set[asyncio.Task[None]] = set()
        self._thread = threading.Thread(
            target=self._loop.run_forever, daemon=True, name="rollout-pool"
        )
        self._thread.start()

    @property
    def workers(self) -> tuple[Any, ...]:
        return tuple(seat.worker for seat in self._seats)

    def submit(self, jobs: Sequence[Job]) -> None:
        """Asks for these groups; returns at once."""
        self._loop.call_soon_threadsafe(self._deal, list(jobs))

    def generate(
        self, prompts: Sequence[Prompt], n: int, sampling: Sampling
    ) -> Iterator[tuple[int, tuple[Completion, ...]]]:
        """Yields (index of the prompt, its n completions) as groups become complete, in no
        particular order."""
        outcomes: queue.SimpleQueue[tuple[int, Outcome]] = queue.SimpleQueue()

        def deliver(index: int) -> Callable[[Outcome], None]:
            return lambda outcome: outcomes.put((index, outcome))

        self.submit(
            [
                Job(prompt=p, n=n, sampling=sampling, deliver=deliver(index))
                for index, p in enumerate(prompts)
            ]
        )
        for _ in prompts:
            # each request has a deadline of its own, and then an outcome
            index, outcome = outcomes.get()
            if isinstance(outcome, ActorLostError):
                raise outcome
            yield index, outcome

    def cut(self, jobs: Sequence[Job]) -> None:
        """Ends these groups, of which nothing more will be delivered; returns at once."""
        self._loop.call_soon_threadsafe(self._cut, list(jobs))

    def apply(self, notice: WeightUpdate) -> list[dict[str, float]]:
        """Has every worker serve the version that is announced: all prepare it while they decode,
        then all commit. Returns the figures of each (`receiver.Report`), with the version that it
        serves."""
        return self._call(self._apply_all(notice, self._sync_timeout))

    def apply_later(self, notice: WeightUpdate) -> None:
        """As `apply`, but returns at once: each worker serves the new version when it has finished
        what it decodes, and begins nothing before. What fails is raised by whatever is asked for
        next."""

        async def work() -> None:
            try:
                await self._apply_all(notice, self._sync_timeout + self._timeout)
            except ActorLostError as failure:
                self._fail(failure)

        self._loop.call_soon_threadsafe(self._begin, work())

    def digests(self) -> list[dict[str, str]]:
        """What each worker holds: name -> xxh3-128 of the bytes."""
        return self._call(self._digests())

    def probe(self, token_ids: Sequence[int]) -> list[Any]:
        """What each worker gives these tokens: [T-1] log-probs of all but the first."""

        async def work() -> list[Any]:
            return list(
                await asyncio.gather(
                    *(self._probe(i, token_ids, False) for i in range(len(self._seats)))
                )
            )

        return self._call(work())

    def reload(self, worker: int, token_ids: Sequence[int]) -> Any:
        """The same of one worker, after its engine has loaded all weights once more."""
        return self._call(self._probe(worker, token_ids, True))

    def sleep(self, level: int) -> None:
        """Every worker leaves its device to the learners, once nothing is decoded; `apply` or
        `wake` ends that."""
        self._call(self._everybody("sleep", level))

    def wake(self) -> None:
        """Every worker serves what it served."""
        self._call(self._everybody("wake"))

    def idle_seconds(self) -> list[float]:
        """Of each worker since the pool began: the time in which it had nothing to decode."""
        now = time.monotonic()
        return [seat.idle + (0.0 if seat.jobs else now - seat.idle_since) for seat in self._seats]

    def close(self) -> None:
        """Nothing is asked and no worker replaced after this; what was asked fails or has no outcome. Before
        the workers are ended: one that is lost would be replaced, which starts Ray where it is
        gone."""
        self._respawn = None
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._stop)
            self._thread.join(timeout=10)

    def _call(self, work: Coroutine[Any, Any, T]) -> T:
        # every wait inside has a deadline
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    # Below, everything runs in the pool's thread.

    def _stop(self) -> None:
        for task in asyncio.all_tasks(self._loop):
            task.cancel()
        self._loop.call_soon(self._loop.stop)

    def _deal(self, jobs: Sequence[Job]) -> None:
        """Gives jobs to the workers that have the least to do; what they may not take yet stays in
        the backlog."""
        expected = self._lengths / self._answers if self._answers else None
        for job in jobs:
            job.tokens = job.left * (job.sampling.max_tokens if expected is None else expected)
        self._backlog.extend(jobs)
        if self._failure is not None:
            self._fail(self._failure)
        shares: dict[int, list[Job]] = {}
        while self._backlog and (
            free := [i for i, seat in enumerate(self._seats) if self._takes(seat)]
        ):
            i = min(free, key=lambda i: (self._seats[i].load, i))
            job = self._backlog.popleft()
            self._seats[i].take(job)
            shares.setdefault(i, []).append(job)
        for i, share in sorted(shares.items()):
            self._begin(self._serve(i, share))

    def _begin(self, work: Coroutine[Any, Any, None]) -> None:
        task = self._loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        """An error of our own must reach those who wait, too."""
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            self._fail(ActorLostError(f"the rollout pool failed: {type(error).__name__}: {error}"))

    def _takes(self, seat: WorkerState) -> bool:
        return seat.up and (
            self._max_samples is None or not seat.jobs or seat.samples < self._max_samples
        )

    async def _serve(self, i: int, share: Sequence[Job]) -> None:
        """One request of a worker: all its groups, within the deadline."""
        seat, left = self._seats[i], dict(enumerate(share))
        worker, deadline = seat.worker, time.monotonic() + self._timeout
        try:
            stream = worker.generate.options(num_returns="streaming").remote(
                [(job.prompt, job.left, job.sampling) for job in share],
                {job.prompt.id: job.episodes.going_on for job in share},
            )
            while left:
                reference = await asyncio.wait_for(anext(stream), deadline - time.monotonic())
                for index, completions in await asyncio.wait_for(
                    reference, deadline - time.monotonic()
                ):
                    if not (job := left.pop(index)).cut:
                        self._finish(seat, job, completions)
        except StopAsyncIteration:
            assert all(job.cut for job in left.values()), (
                f"rollout worker {i} left out groups that were not cut"
            )
        except LOST as error:
            why = f"rollout worker {i}: {cause(error)}"
            if _late(error):
                why = (
                    f"rollout worker {i} has not finished its answers within"
                    f" rollout.timeout={self._timeout:g} s; raise it, or lower"
                    " rollout.max_response_length"
                )
            lost = [job for job in left.values() if not job.cut]
            for job in lost:
                seat.leave(job)
            try:
                await self._replace(i, worker, why)
            except ActorLostError as failure:
                self._backlog.extend(lost)
                self._fail(failure)
                return
            lost = [job for job in lost if not job.cut]
            for job in lost:
                if not job.episodes.going_on:  # else it goes on from its last turn, as old as it is
                    job.reissued()
            self._deal(lost)
            self._next_turns()
        except ray.exceptions.RayError as error:
            self._fail(ActorLostError(f"rollout worker {i}: {cause(error)}"))

    def _finish(self, seat: WorkerState, job: Job, completions: tuple[Completion, ...]) -> None:
        if self._failure is not None:  # everybody was told already
            return
        seat.leave(job)
        had = sum(len(completion) for completion in job.episodes.going_on)
        self._lengths += sum(len(completion) for completion in completions) - had
        self._answers += len(completions)
        if self.episodes is None:
            job.deliver(completions)
        else:
            self._between.add(job)
            self._begin(self._answer(self.episodes, job, completions))
        if self._backlog:
            self._deal([])

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
            job.deliver(tuple(sorted(job.episodes.ended, key=lambda completion: completion.sample)))
        self._next_turns()

    def _next_turns(self) -> None:
        """Deals the groups that go on, before new ones. Where everything was asked for at once,
        they wait for each other, so that what decodes together does not depend on the clock and a
        synchronous run repeats bit for bit."""
        under_way = (
            self._backlog
            or any(seat.jobs for seat in self._seats)
            or len(self._next) < len(self._between)
        )
        if not self._next or (self._max_samples is None and under_way):
            return
        jobs = sorted(self._next, key=lambda job: job.prompt.id)
        self._between.difference_update(jobs)
        self._next, waiting = [], list(self._backlog)
        self._backlog.clear()
        self._deal([*jobs, *waiting])

    def _cut(self, jobs: Sequence[Job]) -> None:
        for job in jobs:
            job.cut = True
        self._backlog = deque(job for job in self._backlog if not job.cut)
        for job in [job for job in self._between if job.cut]:
            self._between.remove(job)
            job.was_cut((*job.episodes.ended, *job.episodes.going_on))
        self._next = [job for job in self._next if not job.cut]
        for seat in self._seats:
            if mine := [job for job in seat.jobs if job.cut]:
                for job in mine:
                    seat.leave(job)
                self._begin(self._end(seat.worker, {job.prompt.id: job for job in mine}))
        self._deal([])
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
        jobs = [*self._backlog, *self._between, *(job for seat in self._seats for job in seat.jobs)]
        self._backlog.clear()
        self._between.clear()
        self._next.clear()
        for seat in self._seats:
            seat.jobs.clear()
        for job in jobs:
            job.deliver(self._failure)

    async def _replace(self, i: int, lost: Any, why: str) -> None:
        """A new actor on the seat, with the weights that are served now; ActorLostError where that
        is not allowed or does not help."""
        seat = self._seats[i]
        async with seat.lock:
            while seat.worker is lost:
                if self._respawn is None or seat.restarts >= self._max_restarts:
                    tried = f" (restarted {seat.restarts} times)" if seat.restarts else ""
                    raise ActorLostError(f"{why}{tried}")
                seat.up, seat.restarts = False, seat.restarts + 1
                self.restarts += 1
                try:
                    fresh = await self._loop.run_in_executor(None, self._respawn, i)
                    if self._latest is not None:
                        peers = [
                            other.worker for other in self._seats if other is not seat and other.up
                        ]
                        who, timeout = f"rollout worker {i}", self._sync_timeout
                        seat.report = await catch_up(
                            fresh, self._latest, peers, who=who, timeout=timeout
                        )
                except (*LOST, WorkerLostError) as error:
                    why = f"rollout worker {i}, restarted: {cause(error)}"
                    continue
                seat.worker, seat.up = fresh, True

    async def _apply_all(self, notice: WeightUpdate, timeout: float) -> list[dict[str, float]]:
        self._latest = notice
        seats = range(len(self._seats))
        await asyncio.gather(*(self._ask(i, "prepare", notice, self._sync_timeout) for i in seats))
        reports = list(
            await asyncio.gather(*(self._ask(i, "commit", notice.version, timeout) for i in seats))
        )
        self.served = max(self.served, notice.version)
        self.on_served()
        return reports

    async def _ask(self, i: int, method: str, argument: Any, timeout: float) -> dict[str, float]:
        seat = self._seats[i]
        async with seat.lock:  # a worker that is just being replaced
            worker = seat.worker
        try:
            work = getattr(worker, method).remote(argument)
            return await call(work, who=f"rollout worker {i}", what=method, timeout=timeout)
        except WorkerLostError as error:
            await self._replace(i, worker, str(error))  # which brings it to the newest version
        return seat.report

    async def _probe(self, i: int, token_ids: Sequence[int], reload: bool) -> Any:
        while True:
            async with self._seats[i].lock:
                worker = self._seats[i].worker
            try:
                work = worker.probe.remote(token_ids, reload)
                return await call(
                    work, who=f"rollout worker {i}", what="probe", timeout=self._sync_timeout
                )
            except WorkerLostError as error:
                await self._replace(i, worker, str(error))

    async def _everybody(self, method: str, *arguments: Any) -> None:
        async def ask(i: int) -> None:
            async with self._seats[i].lock:
                worker = self._seats[i].worker
            work = getattr(worker, method).remote(*arguments)
            await call(work, who=f"rollout worker {i}", what=method, timeout=self._sync_timeout)

        await asyncio.gather(*(ask(i) for i in range(len(self._seats))))

    async def _digests(self) -> list[dict[str, str]]:
        refs = [seat.worker.digests.remote() for seat in self._seats]
        return list(await asyncio.wait_for(asyncio.gather(*refs), self._sync_timeout))


def _late(error: BaseException) -> bool:
    """Whether the deadline has passed, rather than that the actor was found to be gone."""
    return isinstance(error, TimeoutError) and not isinstance(error, ray.exceptions.RayError)
