"""What the pool asks of one worker in a weight update, each with a deadline that names the worker.

await prepare(...)        of every worker, while it decodes
await commit(...)         once all are prepared
await catch_up(...)       of one that was restarted or joins late: both at once
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Sequence
from typing import Any, TypeVar

import ray

from .actors import ActorLostError, cause
from .weights.transport import InStore, Notice, Parcel

T = TypeVar("T")

LOST = (TimeoutError, ray.exceptions.RayActorError, ray.exceptions.RaySystemError, ray.exceptions.WorkerCrashedError)
"""What says that an actor is gone or stuck; any other error is its answer."""


class WorkerLostError(ActorLostError):
    """It is gone or late, and another may take its place."""


async def call(work: Awaitable[T], *, who: str, what: str, timeout: float) -> T:
    """A worker's answer; `WorkerLostError` if it is gone or late, `ActorLostError` if it refuses. Both name it."""
    try:
        return await asyncio.wait_for(work, timeout)
    except LOST as error:
        late = isinstance(error, TimeoutError) and not isinstance(error, ray.exceptions.RayError)
        why = (
            f": no answer to {what!r} within sync.timeout={timeout:g} s"
            if late
            else f" failed in {what!r}: {cause(error)}"
        )
        raise WorkerLostError(f"{who}{why}") from error
    except ray.exceptions.RayError as error:
        raise ActorLostError(f"{who} failed in {what!r}: {cause(error)}") from error


async def catch_up(worker: Any, notice: Notice, peers: Sequence[Any], *, who: str, timeout: float) -> dict[str, float]:
    """Brings a worker that holds nothing to what the notice announces: from a peer on its node, if one holds that,
    else from the nearest anchor and the patches after it."""
    anchor = await _from_peer(worker, notice, peers, timeout)
    known = notice if anchor is None else notice.with_anchor(anchor)
    return await call(worker.apply.remote(known), who=who, what="catch up", timeout=timeout)


async def _from_peer(worker: Any, notice: Notice, peers: Sequence[Any], timeout: float) -> Parcel | None:
    """The anchor that a peer makes of what it holds; None where none on the worker's node can."""
    node, _, _ = await call(worker.offer.remote(), who="the new worker", what="offer", timeout=timeout)
    for peer in peers:
        try:
            there, version, size = await call(peer.offer.remote(), who="a peer", what="offer", timeout=timeout / 4)
        except ActorLostError:  # it may be what is lost next; the learners' own anchor remains
            continue
        if there == node and 0 <= version <= notice.version:
            place = InStore(reference=peer.export.remote())
            return Parcel(version=version, base_version=None, size=size, places=(place,))
    return None


__all__ = ["WorkerLostError", "call", "catch_up"]
