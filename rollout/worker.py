"""The rollout worker: a Ray actor around one engine, on a device of its own."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Sequence

import ray

from ..kernels import platform
from .engine import Request
from .engines import WorkerSpec, make_engine
from .patches import WeightPatch
from .samples import Completion

Finished = list[tuple[int, tuple[Completion, ...]]]
"""Prompts (by their index in the request) whose samples are all there, each with its completions in sample order."""

LINGER = 0.05
"""Seconds that a finished group waits for others to come along: little enough to grade early, and messages cost time."""


class RolloutWorker:
    """Serves prompts with the newest weights that it was given; all methods but the first run on one event loop."""

    def __init__(self, spec: WorkerSpec) -> None:
        platform.set_threads(spec.threads)
        self.engine = make_engine(spec, _own_cards(platform.named(spec.device)))

    async def ready(self) -> int:
        """The process id, once the engine is up."""
        return os.getpid()

    async def generate(self, requests: Sequence[Request]) -> AsyncIterator[Finished]:
        """All samples of every request, submitted at once; yields groups as they become complete, those together that do so
        within `LINGER`."""
        ready: Finished = []
        some = asyncio.Event()
        work = asyncio.create_task(self._decode(requests, ready, some))
        try:
            while not work.done() or ready:
                await asyncio.wait({work, waiting := asyncio.create_task(some.wait())}, return_when="FIRST_COMPLETED")
                waiting.cancel()
                if not work.done():
                    await asyncio.wait({work}, timeout=LINGER)
                some.clear()
                if ready:
                    groups = list(ready)
                    ready.clear()
                    yield groups
            work.result()
        finally:
            work.cancel()

    async def _decode(self, requests: Sequence[Request], ready: Finished, some: asyncio.Event) -> None:
        index = {prompt.id: i for i, (prompt, _, _) in enumerate(requests)}
        partial: dict[str, list[Completion]] = {prompt.id: [] for prompt, _, _ in requests}
        async for completion in self.engine.generate_all(requests):
            group = partial[completion.prompt_id]
            group.append(completion)
            i = index[completion.prompt_id]
            if len(group) == requests[i][1]:
                ready.append((i, tuple(sorted(group, key=lambda c: c.sample))))
                some.set()

    async def apply(self, patch: WeightPatch) -> int:
        """The version served from now on; raises if a single byte differs from what the learners hold."""
        return await self.engine.apply(patch)

    async def digests(self) -> dict[str, str]:
        """name -> xxh3-128 of the bytes that are served."""
        return self.engine.digests()

    async def close(self) -> None:
        await self.engine.close()


def _own_cards(target: platform.Platform) -> tuple[str, ...]:
    """Ids of the cards that Ray gave this actor."""
    return tuple(ray.get_runtime_context().get_accelerator_ids().get(target.resource, ()))
