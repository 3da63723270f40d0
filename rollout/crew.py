"""The workers of a pool: calls to all of them, and the replacement of lost ones.

`WorkerState` is the pool's record of a worker, `Job` that of a requested group.
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
    """A group of completions that was requested of the pool."""

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
    """Called with the partial samples of a group that `RolloutPool.cut` ended after it had
    begun."""
    cost: float = 0.0
    """Expected number of tokens."""
    cut: bool = False
    episodes: GroupEpisodes = field(default_factory=GroupEpisodes)

    @property
    def samples(self) -> int:
        """Samples to decode in this turn."""
        return len(self.episodes.going_on) or self.n

    def finish(self, completions: tuple[Completion, ...]) -> None:
        if not self.outcome.done():
            self.outcome.set_result(completions)

    def fail(self, failure: ActorLostError) -> None:
        if not self.outcome.done():
            self.outcome.set_exception(failure)
            # marked as retrieved, or asyncio logs it: who waits for another group may have raised
            # it already
            self.outcome.exception()


MOST_SPANS = 100
"""Most busy spans that are kept of a worker until `busy_spans` is called."""


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
    """Lost for good; the other workers do its work."""
    idle: float = 0.0
    """Seconds without a job, up to `idle_since`."""
    idle_since: float | None = field(default_factory=time.monotonic)
    """`time.monotonic()` when it ran out of jobs; None: it has one."""
    busy_since: float = 0.0
    """`time.time()` when it got a job, or when `busy_spans` was last called."""
    told: list[tuple[float, float]] = field(default_factory=list)
    """Finished busy spans that `busy_spans` has not returned yet; the newest `MOST_SPANS`."""

    def busy(self, jobs: int) -> None:
        """Records that the worker has this many jobs from now on."""
        now = time.monotonic()
        if self.idle_since is None and not jobs:
            self.idle_since = now
            self.told = [*self.told[-MOST_SPANS:], (self.busy_since, time.time())]
        elif self.idle_since is not None and jobs:
            self.idle += now - self.idle_since
            self.idle_since = None
            self.busy_since = time.time()

    def busy_spans(self) -> list[tuple[float, float]]:
        """(start, stop) of the times with a job since the last call, as `time.time()`."""
        spans = self.told
        self.told = []
        if self.idle_since is None:
            now = time.time()
            spans = [*spans, (self.busy_since, now)]
            self.busy_since = now
        return spans

    def idle_seconds(self) -> float:
        """Total seconds without a job."""
        return self.idle + (0.0 if self.idle_since is None else time.monotonic() - self.idle_since)


class Crew:
    """Numbered workers. One that is lost during a call is replaced, and its replacement serves the
    weights that were announced last."""

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
        """dispatch: is told which workers are up; the other arguments are those of
        `RolloutPool`."""
        self._sync_timeout = sync_timeout
        self._respawn = respawn
        self._max_restarts = max_restarts if respawn is not None else 0
        self._states = [WorkerState(worker=worker) for worker in workers]
        self._dispatch = dispatch
        self._tell = tell
        for i in gone:
            self._states[i].gone = True
            self._dispatch.set_up(i, False)
        self._latest: WeightUpdate | None = None
        self._probed: list[int] = []
        self.served = -1
        """The oldest version that any worker serves."""
        self._new_version = asyncio.Condition()
        self.restarts = 0
        """Number of replacements."""
        self.prove_fresh: Callable[[int, Any], Awaitable[None]] | None = None
        """Called with the number and actor of a replacement before it decodes; raises
        WorkerLostError to refuse it."""

    @property
    def workers(self) -> tuple[Any, ...]:
        return tuple(state.worker for state in self._states)

    @property
    def gone(self) -> tuple[int, ...]:
        """Numbers of the workers that are lost for good."""
        return tuple(i for i, state in enumerate(self._states) if state.gone)

    @property
    def announced(self) -> int:
        """The newest version that workers were told of; -1: none."""
        return -1 if self._latest is None else self._latest.version

    def _here(self) -> list[int]:
        return [i for i, state in enumerate(self._states) if not state.gone]

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
        """The log-probs of one worker, an index into the last results of `probe`, after its engine
        has loaded all weights once more."""
        return await self._until_answered(self._asked(worker), "probe", token_ids, True)

    async def decoded_anew(
        self, worker: int, requests: Sequence[Request]
    ) -> list[tuple[Completion, Any]]:
        """`decoded` of one worker, after its engine has loaded all weights once more."""
        await self.reload(worker, requests[0][0].token_ids)
        completions: list[tuple[Completion, Any]] = await self._until_answered(
            self._asked(worker), "decoded", requests
        )
        return completions

    async def prove(self, canary: Canary, requests: Sequence[Request]) -> list[DecodeProof | None]:
        """`GroupService.prove` of each present worker."""
        return await self._of_each("prove", canary, requests)

    async def decoded(self, requests: Sequence[Request]) -> list[list[tuple[Completion, Any]]]:
        """`GroupService.decoded` of each present worker."""
        return await self._of_each("decoded", requests)

    async def _of_each(self, method: str, *arguments: Any) -> list[Any]:
        """The method's result of each worker that is not gone, in order."""
        self._probed = self._here()
        work = (self._until_answered(i, method, *arguments) for i in self._probed)
        answers = zip(self._probed, await asyncio.gather(*work), strict=True)
        return [answer for i, answer in answers if not self._states[i].gone]

    def _asked(self, worker: int) -> int:
        """The number of a worker, from its index in the last result of `_of_each`."""
        return [i for i in self._probed if not self._states[i].gone][worker]

    async def sleep(self, level: int) -> None:
        """Every worker frees its device for the learners once nothing is decoded, until `serve` or
        `wake`."""
        await self._of_each("sleep", level)

    async def trace(self, begin: bool) -> list[bytes]:
        """Begins a trace of every worker's process, or ends it and returns each recording."""
        return await self._of_each("trace", begin)

    async def wake(self) -> None:
        """Every worker serves again what it served before `sleep`."""
        await self._of_each("wake")

    def idle_seconds(self) -> list[float]:
        """Seconds in which each worker had nothing to decode, since the pool began."""
        return [state.idle_seconds() for state in self._states]

    def busy_spans(self) -> list[tuple[int, float, float]]:
        """(worker, start, stop) of the times with a job since the last call, as `time.time()`."""
        return [(i, *span) for i, state in enumerate(self._states) for span in state.busy_spans()]

    # Replacement of lost workers

    async def _replace(self, i: int, lost: Any, why: str) -> None:
        """Replaces the actor `lost` by a new one with the weights that are served now. If that is
        not allowed or fails, the others do its work; raises ActorLostError if there are none."""
        state = self._states[i]
        async with state.lock:
            while state.worker is lost and not state.gone:
                self._dispatch.set_up(i, False)
                if self._respawn is None or state.restarts >= self._max_restarts:
                    tried = f" (restarted {state.restarts} times)" if state.restarts else ""
                    self._give_up(i, f"{why}{tried}")
                    return
                state.restarts += 1
                self.restarts += 1
                try:
                    fresh = await asyncio.to_thread(self._respawn, i)
                    if self._latest is not None:
                        peers = [
                            other.worker
                            for j, other in enumerate(self._states)
                            if j != i and self._dispatch.up[j]
                        ]
                        who, timeout = f"rollout worker {i}", self._sync_timeout
                        state.report = await catch_up(
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
                state.worker = fresh
                self._dispatch.set_up(i, True)

    def substitute(self, i: int, worker: Any) -> None:
        """Replaces a worker before anything was asked of it."""
        self._states[i].worker = worker
        self._states[i].restarts += 1
        self.restarts += 1

    def leave_out(self, i: int, why: str) -> None:
        """Goes on without a worker for which there is no replacement."""
        self._dispatch.set_up(i, False)
        self._give_up(i, why)

    def _give_up(self, i: int, why: str) -> None:
        """Marks a worker as lost for good. Raises ActorLostError if no other is left, or if workers
        may not be replaced."""
        others = [j for j in self._here() if j != i]
        if not others or self._respawn is None or not self._max_restarts:
            raise ActorLostError(why)
        self._states[i].gone = True
        self._tell(f"{why}; the run goes on with {len(others)} rollout workers")

    # Weights

    async def _serve_version(self, update: WeightUpdate, timeout: float) -> list[dict[str, float]]:
        self._latest = update
        here = self._here()
        await asyncio.gather(*(self._ask(i, "prepare", update, self._sync_timeout) for i in here))
        answers = await asyncio.gather(
            *(self._ask(i, "commit", update.version, timeout) for i in here)
        )
        reports = [
            report for i, report in zip(here, answers, strict=True) if not self._states[i].gone
        ]
        async with self._new_version:
            self.served = max(self.served, update.version)
            self._new_version.notify_all()
        return reports

    async def _ask(self, i: int, method: str, argument: Any, timeout: float) -> dict[str, float]:
        state = self._states[i]
        async with state.lock:  # a worker that is just being replaced
            worker = state.worker
        if state.gone:
            return state.report
        try:
            work = getattr(worker, method).remote(argument)
            return await call(work, who=f"rollout worker {i}", what=method, timeout=timeout)
        except WorkerLostError as error:
            await self._replace(i, worker, str(error))  # which brings it to the newest version
        return state.report

    async def _until_answered(self, i: int, method: str, *arguments: Any) -> Any:
        while not self._states[i].gone:
            async with self._states[i].lock:
                worker = self._states[i].worker
            try:
                work = getattr(worker, method).remote(*arguments)
                return await call(
                    work, who=f"rollout worker {i}", what=method, timeout=self._sync_timeout
                )
            except WorkerLostError as error:
                await self._replace(i, worker, str(error))
        return None
