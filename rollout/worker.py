"""The rollout worker: a Ray actor around one engine, on a device of its own."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Collection, Sequence

import ray

from ..kernels import platform
from .engine import Request
from .engines import WorkerSpec, make_engine
from .patches import WeightPatch
from .samples import Completion
from .service import Finished, GroupService


class RolloutWorker:
    """Serves prompts with the newest weights that it was given; all methods but the first run on one event loop."""

    def __init__(self, spec: WorkerSpec) -> None:
        platform.set_threads(spec.threads)
        self.engine = make_engine(spec, _own_cards(platform.named(spec.device)))
        self.service = GroupService(self.engine, spec.in_flight)

    async def ready(self) -> int:
        """The process id, once the engine is up."""
        return os.getpid()

    async def generate(self, requests: Sequence[Request]) -> AsyncIterator[Finished]:
        """Groups as they become complete."""
        async for groups in self.service.generate(requests):
            yield groups

    async def cut(self, prompt_ids: Collection[str]) -> list[tuple[Completion, ...]]:
        """Ends these groups; returns what they had."""
        return await self.service.cut(prompt_ids)

    async def apply(self, patch: WeightPatch) -> int:
        """The version served from now on; raises if a single byte differs from what the learners hold."""
        return await self.service.apply(patch)

    async def digests(self) -> dict[str, str]:
        """name -> xxh3-128 of the bytes that are served."""
        return self.engine.digests()

    async def close(self) -> None:
        await self.engine.close()


def _own_cards(target: platform.Platform) -> tuple[str, ...]:
    """Ids of the cards that Ray gave this actor."""
    return tuple(ray.get_runtime_context().get_accelerator_ids().get(target.resource, ()))
