"""The pool of workers at its end."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

import numpy as np
import pytest
from emberl.rl.run import on_loop
from emberl.rollout import crew as crew_module
from emberl.rollout.actors import ActorLostError, PlaceLostError, WorkerLostError
from emberl.rollout.crew import Job
from emberl.rollout.pool import RolloutPool
from emberl.rollout.samples import Completion, Prompt, Sampling, Span

ANSWER = Completion(
    prompt_id="0",
    sample=0,
    token_ids=np.array([5, 6], np.int32),
    logprobs=np.array([-0.5, -1.5], np.float32),
    spans=(Span(0, 0, 2),),
    finish_reason="stop",
)


class Dying:
    """A worker that is lost when it is told to be, as all are when the run ends them."""

    def __init__(self) -> None:
        self.asked, self.lost = asyncio.Event(), asyncio.Event()

    @property
    def generate(self) -> Dying:
        return self

    def options(self, **_: Any) -> Dying:
        return self

    async def remote(self, *_: Any) -> AsyncIterator[Any]:
        self.asked.set()
        await self.lost.wait()
        raise TimeoutError("gone")
        yield


@pytest.mark.parametrize("ended", [False, True])
def test_a_lost_worker_is_replaced_until_the_loop_ends(
    make_prompt: Callable[..., Prompt], ended: bool
) -> None:
    replaced: list[int] = []

    def respawn(index: int) -> Any:
        replaced.append(index)
        raise TimeoutError("no more")

    async def play() -> None:
        worker = Dying()
        pool = RolloutPool([worker], timeout=20, sync_timeout=20, respawn=respawn, max_restarts=1)
        job = Job(prompt=make_prompt("a"), n=1, sampling=Sampling(max_tokens=2))
        pool.submit([job])
        await asyncio.wait_for(worker.asked.wait(), 10)
        if not ended:
            worker.lost.set()
            with pytest.raises(ActorLostError, match="restarted 1 times"):
                await asyncio.wait_for(job.outcome, 10)

    on_loop(play())
    time.sleep(0.1)
    assert replaced == ([] if ended else [0])


class Answering:
    """A worker that answers every group of a request, one after another, and breaks down after so
    many; what it was asked for."""

    def __init__(self, breaks_after: int | None = None) -> None:
        self.requests: list[list[str]] = []
        self._breaks_after = breaks_after

    @property
    def generate(self) -> Answering:
        return self

    def options(self, **_: Any) -> Answering:
        return self

    async def remote(self, requests: Any, _: Any) -> AsyncIterator[Any]:
        self.requests.append([prompt.id for prompt, _, _ in requests])
        for index in range(len(requests)):
            if index == self._breaks_after:
                raise TimeoutError("killed")
            answer: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
            answer.set_result([(index, (ANSWER,))])
            yield answer


def play_lost(
    make_prompt: Callable[..., Prompt], respawn: Callable[[int], Any], max_samples: int | None
) -> tuple[Answering, Answering, list[int], list[str], RolloutPool]:
    """Six groups over two workers, of which the first breaks down after its first answer; also the
    numbers of the groups that were asked for again, and what was told."""
    again: list[int] = []
    told: list[str] = []

    async def play() -> tuple[Answering, Answering, RolloutPool]:
        breaking, sound = Answering(breaks_after=1), Answering()
        pool = RolloutPool(
            [breaking, sound],
            timeout=20,
            sync_timeout=20,
            max_samples=max_samples,
            respawn=respawn,
            max_restarts=1,
            tell=told.append,
        )
        jobs = [
            Job(
                prompt=make_prompt(str(i)),
                n=1,
                sampling=Sampling(max_tokens=2),
                reissued=lambda i=i: again.append(i),  # type: ignore[misc]
            )
            for i in range(6)
        ]
        pool.submit(jobs)
        await asyncio.wait_for(asyncio.gather(*(job.outcome for job in jobs)), 10)
        return breaking, sound, pool

    breaking, sound, pool = on_loop(play())
    return breaking, sound, again, told, pool


def test_who_takes_a_lost_ones_place_gets_the_same_request(
    make_prompt: Callable[..., Prompt],
) -> None:
    fresh = Answering()
    breaking, sound, again, told, _ = play_lost(make_prompt, lambda index: fresh, None)
    assert breaking.requests == fresh.requests == [["0", "2", "4"]], "whole, what it had too"
    assert sound.requests == [["1", "3", "5"]]
    assert again == [2, 4] and told == []


def test_who_takes_a_lost_ones_place_is_proved_before_it_decodes(
    make_prompt: Callable[..., Prompt], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first that came does not decode with what it holds, and is asked for nothing."""
    monkeypatch.setattr(crew_module, "catch_up", caught_up)
    fresh = [Answering(), Answering()]
    spawned, seen = iter(fresh), []

    async def prove(index: int, worker: Any) -> None:
        seen.append((index, fresh.index(worker), worker.requests.copy()))
        if worker is fresh[0]:
            raise WorkerLostError("it decodes with older weights")

    async def play() -> None:
        pool = RolloutPool(
            [Answering(breaks_after=1)], timeout=20, sync_timeout=20,
            respawn=lambda index: next(spawned), max_restarts=2,
        )  # fmt: skip
        pool._latest, pool.prove_fresh = object(), prove  # type: ignore[assignment]
        jobs = [Job(prompt=make_prompt(str(i)), n=1, sampling=Sampling(max_tokens=2)) for i in "01"]
        pool.submit(jobs)
        await asyncio.wait_for(asyncio.gather(*(job.outcome for job in jobs)), 10)

    on_loop(play())
    assert seen == [(0, 0, []), (0, 1, [])]
    assert fresh[0].requests == [] and fresh[1].requests == [["0", "1"]]


async def caught_up(*_: Any, **__: Any) -> dict[str, float]:
    return {}


def test_others_do_the_work_of_one_whose_node_is_gone(make_prompt: Callable[..., Prompt]) -> None:
    def no_room(index: int) -> Any:
        raise PlaceLostError("no node has room for 1 CPU")

    _, sound, again, told, pool = play_lost(make_prompt, no_room, None)
    assert sound.requests == [["1", "3", "5"], ["2", "4"]]
    assert again == [2, 4] and pool.gone == (0,)
    assert len(told) == 1
    assert "no node has room for 1 CPU; the run goes on with 1 rollout workers" in told[0]


class Traced:
    """A worker whose process has recorded something."""

    def __init__(self, recorded: bytes | None) -> None:
        self._recorded = recorded

    @property
    def trace(self) -> Traced:
        return self

    async def remote(self, begin: bool) -> bytes:
        assert self._recorded is not None, "it is gone"
        return self._recorded


def test_a_trace_is_asked_of_who_is_here() -> None:
    async def play() -> list[bytes]:
        pool = RolloutPool([Traced(None), Traced(b"here")], timeout=5, sync_timeout=5, gone=(0,))
        return await pool.trace(False)

    assert on_loop(play()) == [b"here"]
