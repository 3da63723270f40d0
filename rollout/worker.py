"""The rollout worker: a Ray actor around one engine, on a device of its own."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Sequence

import ray

from ..kernels import platform
from .engines import WorkerSpec, make_engine
from .patches import WeightPatch
from .samples import Completion, Prompt, Sampling

Finished = list[tuple[int, tuple[Completion, ...]]]
"""Prompts (by their index in the request) whose samples are all there, each with its completions in sample order."""

CHUNKS = 8
"""Messages in which a request's groups come back at most: early enough to grade while others decode, few enough that
passing them costs nothing."""


class RolloutWorker:
    """Serves prompts with the newest weights that it was given; all methods but the first run on one event loop."""

    def __init__(self, spec: WorkerSpec) -> None:
        platform.set_threads(spec.threads)
        self.engine = make_engine(spec, _own_cards(platform.named(spec.device)))

    async def ready(self) -> int:
        """The process id, once the engine is up."""
        return os.getpid()

    async def generate(self, prompts: Sequence[Prompt], n: int, sampling: Sampling) -> AsyncIterator[Finished]:
        """All n samples of every prompt, submitted at once; yields groups of them as they become complete."""
        index = {prompt.id: i for i, prompt in enumerate(prompts)}
        partial: dict[str, list[Completion]] = {prompt.id: [] for prompt in prompts}
        share = max(1, len(prompts) // CHUNKS)
        ready: Finished = []
        async for completion in self.engine.generate_all([(prompt, n, sampling) for prompt in prompts]):
            group = partial[completion.prompt_id]
            group.append(completion)
            if len(group) == n:
                del partial[completion.prompt_id]
                ready.append((index[completion.prompt_id], tuple(sorted(group, key=lambda c: c.sample))))
            if len(ready) >= share:
                yield ready
                ready = []
        if ready:
            yield ready

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
