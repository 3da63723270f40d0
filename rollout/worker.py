"""The rollout worker: a Ray actor around one engine, on a device of its own."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass

from ..kernels import platform
from .embedded import EmbeddedEngine
from .patches import WeightPatch
from .samples import Completion, Prompt, Sampling

Finished = list[tuple[int, tuple[Completion, ...]]]
"""Prompts (by their index in the request) whose samples are all there, each with its completions in sample order."""

CHUNKS = 8
"""Messages in which a request's groups come back at most: early enough to grade while others decode, few enough that
passing them costs nothing."""


@dataclass(frozen=True, kw_only=True, slots=True)
class WorkerSpec:
    """What an actor needs to start its engine."""

    model_path: str
    device: str
    """A platform's name, as in `cluster.device`."""
    dtype: str
    threads: int
    max_num_seqs: int
    max_model_len: int
    run_id: str
    timeout: float
    """Seconds that one burst of decoding or one weight update may take."""


class RolloutWorker:
    """Serves prompts with the newest weights that it was given; all methods but the first run on one event loop."""

    def __init__(self, spec: WorkerSpec) -> None:
        target = platform.named(spec.device)
        platform.set_threads(spec.threads)
        self.engine = EmbeddedEngine(
            spec.model_path,
            max_num_seqs=spec.max_num_seqs,
            max_model_len=spec.max_model_len,
            dtype=platform.compute_dtype(spec.dtype, target),
            device=str(platform.device_of_process(target)),
            run_id=spec.run_id,
            version=-1,
            deadline_s=spec.timeout,
        )

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
