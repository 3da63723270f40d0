"""The pool of workers at its end."""

from __future__ import annotations

import threading
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

from emberl.rollout.jobs import Job
from emberl.rollout.pool import RolloutPool
from emberl.rollout.samples import Prompt, Sampling


class Dying:
    """A worker that is lost when it is told to be, as all are when the run ends them."""

    def __init__(self) -> None:
        self.asked, self.lost = threading.Event(), threading.Event()

    @property
    def generate(self) -> Dying:
        return self

    def options(self, **_: Any) -> Dying:
        return self

    async def remote(self, *_: Any) -> AsyncIterator[Any]:
        self.asked.set()
        self.lost.wait(10)
        raise TimeoutError("gone")
        yield


def play(make_prompt: Callable[..., Prompt], close: bool) -> list[int]:
    """The workers that were replaced after one was lost."""
    worker, replaced = Dying(), []

    def respawn(index: int) -> Any:
        replaced.append(index)
        raise TimeoutError("no more")

    pool = RolloutPool([worker], timeout=20, sync_timeout=20, respawn=respawn, max_restarts=1)
    outcomes: list[Any] = []
    sampling = Sampling(max_tokens=2)
    pool.submit([Job(prompt=make_prompt("a"), n=1, sampling=sampling, deliver=outcomes.append)])
    assert worker.asked.wait(10)
    if close:
        closing = threading.Thread(target=pool.close)
        closing.start()
        time.sleep(0.1)
        worker.lost.set()
        closing.join(10)
        assert not closing.is_alive()
    else:
        worker.lost.set()
        deadline = time.monotonic() + 10
        while not outcomes and time.monotonic() < deadline:
            time.sleep(0.01)
        assert "restarted" in str(outcomes[0])
    pool.close()
    return replaced


def test_a_lost_worker_is_replaced_until_the_end(make_prompt: Callable[..., Prompt]) -> None:
    assert play(make_prompt, close=False) == [0]
    assert play(make_prompt, close=True) == []
