"""A worker's weight updates: the receiver beside the engine, on the worker's event loop."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable

import ray

from .engine import Engine
from .patches import Bytes, DigestMismatchError, WeightPatch
from .receiver import Receiver
from .transport import Notice

NOTHING = -1
"""The version of an engine that serves none."""


class WeightUpdates:
    """PREPARE works in a thread of its own while the engine decodes; COMMIT is one `apply` of the engine."""

    def __init__(
        self, engine: Engine, receiver: Receiver, apply: Callable[[WeightPatch], Awaitable[int]] | None = None
    ) -> None:
        """apply: what stands for the engine's own, where somebody has to know before."""
        self._engine, self._receiver, self._apply = engine, receiver, apply or engine.apply
        self._turn = asyncio.Lock()

    async def prepare(self, notice: Notice) -> None:
        await asyncio.to_thread(self._receiver.prepare, notice)

    async def commit(self, version: int) -> dict[str, float]:
        """Serves what was prepared, of at least this version; what the update cost (`Report`)."""
        async with self._turn:
            patch = await asyncio.to_thread(self._receiver.patch, version, self._engine.version)
            start = time.perf_counter()
            try:
                served = await self._apply(patch)
            except DigestMismatchError:  # what the engine held is damaged: everything anew, once
                served = await self._apply(await asyncio.to_thread(self._receiver.patch, version, NOTHING))
            return self._receiver.commit(served, time.perf_counter() - start).as_dict()

    async def apply(self, notice: Notice) -> dict[str, float]:
        """Both, for a worker that has to catch up."""
        await self.prepare(notice)
        return await self.commit(notice.version)

    def offer(self) -> tuple[str, int, int]:
        """(the node, the version that is held or -1, bytes of its anchor or a little less) for a peer."""
        held = self._receiver.held
        size = 0 if held is None else sum(tensor.data.nbytes for tensor in held.tensors.values())
        return node(), -1 if held is None else held.version, size

    async def export(self) -> Bytes:
        """What is held as the bytes of an anchor."""
        return await asyncio.to_thread(self._receiver.export)


def node() -> str:
    """The id of the Ray node that this process runs on."""
    name: str = ray.get_runtime_context().get_node_id()
    return name


__all__ = ["WeightUpdates", "node"]
