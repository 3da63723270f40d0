"""The workers of a pool: calls to all of them, and the actor that takes the place of a lost one.

`WorkerState` is the pool's record of one, `Job` that of a group that is asked for.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

from .actors import LOST, ActorLostError, PlaceLostError, WorkerLostError, call, catch_up, cause
from .engine import Request
from .environments import GroupEpisodes
from .samples import Completion, Prompt, Sampling
from .schedule import Dispatch
from .weights.canary import Canary, DecodeProof
from .weights.transport import WeightUpdate


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


class Crew:
    """Workers on numbered seats; one that is lost while it is asked is replaced, and what takes its
    place serves the weights that were announced last."""

    def __init__(
        self,
        workers: Sequence[Any],
        dispatch: Dispatch[Job],
        *,
        sync_timeout: float,
        respawn: Callable[[int], Any] | None = None,
        max_restarts: int = 0,
        gone: Collection[int] = (),
        tell: Callable[[str], None] = lambda _: None,
    ) -> None:
        """dispatch: is told who may be given groups; the rest as of `RolloutPool`."""
        self._sync_timeout = sync_timeout
        self._respawn = respawn
        self._max_restarts = max_restarts if respawn is not None else 0
        self._seats = [WorkerState(worker=worker) for worker in workers]
        self._dispatch = dispatch
        self._tell = tell
        for i in gone:
            self._seats[i].gone = True
            self._dispatch.set_up(i, False)
        self._latest: WeightUpdate | None = None
        self._probed: list[int] = []
        self.served = -1
        """The version that every worker serves at least."""
        self._new_version = asyncio.Condition()
        self.restarts = 0
        """Workers that were replaced."""
        self.prove_fresh: Callable[[int, Any], Awaitable[None]] | None = None
        """Of a worker in a lost one's place, before it decodes; WorkerLostError: it may not."""

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

    async def served_after(self, version: int) -> int:
        """Waits until every worker serves a newer version than this one; returns that."""
        async with self._new_version:
            await self._new_version.wait_for(lambda: self.served > version)
            return self.served

    async def digests(self) -> list[dict[str, str]]:
        """The weights of each worker: name -> xxh3-128 of the bytes."""
        return await self._of_each("digests")

    async def probe(self, token_ids: Sequence[int]) -> list[Any]:
        """Each present worker's log-probs of these tokens but the first: [T-1]."""
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
        await self._of_each("sleep", level)

    async def trace(self, begin: bool) -> list[bytes]:
        """Begins a trace of every worker's process, or ends it: what each recorded."""
        return await self._of_each("trace", begin)

    async def wake(self) -> None:
        """Every worker serves what it served."""
        await self._of_each("wake")

    def idle_seconds(self) -> list[float]:
        """Of each worker since the pool began: the time in which it had nothing to decode."""
        return [seat.idle_seconds() for seat in self._seats]

    def busy_spans(self) -> list[tuple[int, float, float]]:
        """(worker, beginning, end) of the times with something to decode since the last call, as
        `time.time()`."""
        return [(i, *span) for i, seat in enumerate(self._seats) for span in seat.busy_spans()]

    # A lost one's place

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
                        if self.prove_fresh is not None:
                            await self.prove_fresh(i, fresh)
                except PlaceLostError as error:
                    self._give_up(i, f"{why}; {error}")
                    return
                except (*LOST, WorkerLostError) as error:
                    why = f"rollout worker {i}, restarted: {cause(error)}"
                    continue
                seat.worker = fresh
                self._dispatch.set_up(i, True)

    def seat(self, i: int, worker: Any) -> None:
        """Another actor on a seat, before anything was asked of the one that sat there."""
        self._seats[i].worker = worker
        self._seats[i].restarts += 1
        self.restarts += 1

    def leave_out(self, i: int, why: str) -> None:
        """The same where there is none to be had."""
        self._dispatch.set_up(i, False)
        self._give_up(i, why)

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
