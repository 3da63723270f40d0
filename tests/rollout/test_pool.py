"""The pool of workers at its end."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
from emberl.rl.run import on_loop
from emberl.rollout.actors import ActorLostError
from emberl.rollout.jobs import Job
from emberl.rollout.pool import RolloutPool
from emberl.rollout.samples import Prompt, Sampling


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
