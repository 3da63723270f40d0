"""A worker's weight updates: the receiver beside the engine, on the worker's event loop."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import replace

import ray

from .engine import Engine
from .vllm_backend.transfer import GroupMember
from .weights.engine_transfer import EngineTransfer
from .weights.patch import Bytes, DigestMismatchError, TensorBytes, Transfer, WeightPatch
from .weights.receiver import Receiver
from .weights.transport import WeightUpdate, TransferError

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
        self._member = GroupMember()
        self._coming: WeightUpdate | None = None
        self._came: tuple[WeightUpdate, dict[str, float]] | None = None  # what the engine received last, and its figures

    async def prepare(self, notice: WeightUpdate) -> None:
        if self._came is not None and _same(notice, self._came[0]):
            return
        self._coming = notice if notice.engines is not None and notice.version > self._engine.version else None
        if self._coming is None:
            await asyncio.to_thread(self._receiver.prepare, notice)

    async def commit(self, version: int) -> dict[str, float]:
        """Serves what was prepared, of at least this version; what the update cost (`Report`)."""
        async with self._turn:
            notice, self._coming = self._coming, None
            if notice is not None and notice.engines is not None:
                try:
                    return await self._receive(notice, notice.engines)
                except TransferError:  # nothing has begun
                    await asyncio.to_thread(self._receiver.prepare, notice)
            if self._came is not None and self._came[0].version == version == self._engine.version:
                return self._came[1]
            patch = await asyncio.to_thread(self._receiver.patch, version, self._engine.version)
            start = time.perf_counter()
            try:
                served = await self._apply(patch)
            except DigestMismatchError:  # what the engine held is damaged: everything anew, once
                served = await self._apply(await asyncio.to_thread(self._receiver.patch, version, NOTHING))
            return self._receiver.commit(served, time.perf_counter() - start).as_dict()

    async def apply(self, notice: WeightUpdate) -> dict[str, float]:
        """Both, for a worker that has to catch up: without the others."""
        await self.prepare(replace(notice, engines=None))
        return await self.commit(notice.version)

    async def _receive(self, notice: WeightUpdate, version: EngineTransfer) -> dict[str, float]:
        """The engine's own processes receive from the learners; `TransferError` if not all workers come to that."""
        missed = False

        def fallback() -> Mapping[str, TensorBytes]:
            nonlocal missed
            missed = True
            self._receiver.prepare(notice)
            return self._receiver.patch(notice.version, NOTHING).tensors

        start = time.perf_counter()
        rank = await asyncio.to_thread(self._member.join, version.broadcast, getattr(self._engine, "joined", None))
        met = time.perf_counter()
        transfer = Transfer(version=version, rank=rank, fallback=fallback)
        served = await self._apply(
            WeightPatch(
                run_id=notice.run_id, version=notice.version, tensors={}, digests=version.digests, transfer=transfer
            )
        )
        now = time.perf_counter()
        if missed:
            return self._receiver.commit(served, now - met).as_dict()
        report = self._receiver.received(notice, version.num_bytes, now - start, now - met).as_dict()
        self._came = notice, report
        return report

    def offer(self) -> tuple[str, int, int]:
        """(the node, the version that is held or -1, bytes of its anchor or a little less) for a peer."""
        held = self._receiver.held
        size = 0 if held is None else sum(tensor.data.nbytes for tensor in held.tensors.values())
        return node(), -1 if held is None else held.version, size

    async def export(self) -> Bytes:
        """The bytes of an anchor of the held version."""
        return await asyncio.to_thread(self._receiver.export)


def _same(one: WeightUpdate, other: WeightUpdate) -> bool:
    return (one.sitting, one.version, one.root) == (other.sitting, other.version, other.root)


def node() -> str:
    """The id of the Ray node that this process runs on."""
    name: str = ray.get_runtime_context().get_node_id()
    return name


__all__ = ["WeightUpdates", "node"]
