"""The rollout worker: a Ray actor around one engine, on a device of its own."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Collection, Sequence

import numpy as np
import ray
from numpy.typing import NDArray

from ..kernels import platform
from .engine import Request
from .engines import WorkerSpec, make_engine
from .samples import Completion
from .service import Finished, GroupService
from .updates import WeightUpdates
from .weights.patch import Bytes
from .weights.receiver import Receiver
from .weights.transport import Notice


class RolloutWorker:
    """Serves prompts with the newest weights that it was given; all methods but the first run on one event loop."""

    def __init__(self, spec: WorkerSpec) -> None:
        platform.set_threads(spec.threads)
        self.engine = make_engine(spec, _own_cards(platform.named(spec.device)))
        self.service = GroupService(self.engine, spec.in_flight)
        receiver = Receiver(spec.link(), threads=spec.threads)
        self.updates = WeightUpdates(self.engine, receiver, self.service.apply)

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

    async def prepare(self, notice: Notice) -> None:
        """Makes a version ready while the old one is decoded with; raises if no bytes that can be had are the learners'."""
        await self.updates.prepare(notice)

    async def commit(self, version: int) -> dict[str, float]:
        """Serves what was prepared; the figures of it (`receiver.Report`), with the version that is served from now on."""
        return await self.updates.commit(version)

    async def apply(self, notice: Notice) -> dict[str, float]:
        """Both at once, for a worker that was restarted or joins late."""
        return await self.updates.apply(notice)

    async def offer(self) -> tuple[str, int, int]:
        """What this worker could give to a peer: its node, its version, bytes."""
        return self.updates.offer()

    async def export(self) -> Bytes:
        """The bytes of an anchor of what it serves."""
        return await self.updates.export()

    async def probe(self, token_ids: Sequence[int], reload: bool = False) -> NDArray[np.float32]:
        """[T] tokens -> [T-1] log-probs of all but the first; `reload`: after the engine has loaded everything once more."""
        if reload:
            await self.engine.reload()
        return await self.engine.probe(token_ids)

    async def sleep(self, level: int) -> None:
        """Leaves the device to the learners."""
        await self.engine.sleep(level)

    async def wake(self) -> None:
        """Serves again what it served."""
        await self.engine.wake()

    async def digests(self) -> dict[str, str]:
        """name -> xxh3-128 of the bytes that are served."""
        return self.engine.digests()

    async def close(self) -> None:
        await self.engine.close()


def _own_cards(target: platform.Platform) -> tuple[str, ...]:
    """Ids of the cards that Ray gave this actor."""
    return tuple(ray.get_runtime_context().get_accelerator_ids().get(target.resource, ()))
