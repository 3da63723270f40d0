"""Waiting for Ray actors: always with a deadline that names the actor.

gather(...)               of a group of actors: the first failure ends the wait
await call(...)           of one rollout worker
await catch_up(...)       of one that was restarted or joins late: weights from a peer, or from the
learners
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Awaitable, Sequence, Set
from typing import Any, TypeVar

import psutil
import ray

from ..kernels import platform
from .weights.transport import ObjectStoreSource, PatchRef, WeightUpdate

T = TypeVar("T")

PEERS = 5.0
"""Seconds in which Ray finds out that an actor's process is gone."""
LOST = (
    TimeoutError,
    ray.exceptions.RayActorError,
    ray.exceptions.RaySystemError,
    ray.exceptions.WorkerCrashedError,
    ray.exceptions.OutOfMemoryError,
)
"""Errors of an actor that is gone or stuck; any other error is its answer."""


class ActorLostError(RuntimeError):
    """An actor died, failed or did not answer within its deadline; the message names it and the
    cause."""


class PlaceLostError(RuntimeError):
    """There is no node any more that an actor could be started on."""


class CallFailedError(ActorLostError):
    """The actor answered with an error of its own, and is still there."""


def node_address() -> str:
    """Where other nodes of the cluster reach this process: Ray's address of its node, since a
    machine's own name may stand for a loopback address (127.0.1.1 on Debian). Loopback where there
    is no Ray."""
    return str(ray.util.get_node_ip_address()) if ray.is_initialized() else "127.0.0.1"


def own_cards(target: platform.Platform) -> tuple[str, ...]:
    """Names of the cards that Ray gave this actor; none outside of one."""
    if not ray.is_initialized():
        return ()
    return tuple(ray.get_runtime_context().get_accelerator_ids().get(target.resource, ()))


def own_device(target: platform.Platform) -> Any:
    """This actor's torch.device, also where Ray leaves every card visible (`ray_noset`)."""
    return platform.device_of_process(target, platform.card_index(target, own_cards(target)))


def use_node_interface(variables: Sequence[str] = ("GLOO_SOCKET_IFNAME",)) -> None:
    """Has this process's groups talk through the network interface of `node_address`, unless the
    user named one in these variables. Left alone, Gloo takes the address that the machine's own
    name stands for."""
    address = node_address()
    names = [
        name
        for name, addresses in psutil.net_if_addrs().items()
        if any(a.address == address for a in addresses)
    ]
    for variable in variables if names else ():
        os.environ.setdefault(variable, names[0])


def check_reachable(address: str, nodes: Set[str]) -> None:
    """ValueError for a loopback `host:port` where the cluster's nodes have several addresses."""
    host = address.rpartition(":")[0].strip("[]")
    if len(nodes) > 1 and (host.startswith("127.") or host in ("localhost", "::1")):
        raise ValueError(
            f"Ray knows a node of learners as {host}, which other nodes"
            f" ({', '.join(sorted(nodes))}) cannot reach; start Ray on every node with"
            " --node-ip-address=ADDRESS"
        )


def gather(refs: Sequence[Any], *, who: str, what: str, timeout: float, key: str) -> list[Any]:
    """The results of one call to each actor of a group, in order.

    who: how the message calls an actor ("learner rank"); what: the call; key: the setting that
    holds `timeout` (seconds). Raises `ActorLostError`. A failure is raised at once, though its
    peers may wait in a collective for the one that failed.
    """
    deadline = time.monotonic() + timeout
    results: dict[Any, Any] = {}
    pending = list(refs)
    while pending:
        done, pending = ray.wait(
            pending, num_returns=1, timeout=max(0.0, deadline - time.monotonic())
        )
        if not done:
            late = ", ".join(str(i) for i, ref in enumerate(refs) if ref not in results)
            raise ActorLostError(f"{who} {late}: no answer to {what!r} within {key}={timeout:g} s")
        for ref in done:
            try:
                results[ref] = ray.get(ref, timeout=timeout)
            except ray.exceptions.RayError as error:
                ref, error = _first_lost(ref, error, pending)
                answered = isinstance(error, ray.exceptions.RayTaskError)
                raise (CallFailedError if answered else ActorLostError)(
                    f"{who} {list(refs).index(ref)} failed in {what!r}: {cause(error)}"
                ) from error
    return [results[ref] for ref in refs]


def _first_lost(
    ref: Any, error: ray.exceptions.RayError, others: Sequence[Any]
) -> tuple[Any, ray.exceptions.RayError]:
    """A peer that died, if one did, else the failure itself: an actor that missed the dead one in a
    collective may answer before Ray has noticed."""
    if not others or not isinstance(error, ray.exceptions.RayTaskError):
        return ref, error
    done, _ = ray.wait(list(others), num_returns=len(others), timeout=PEERS)
    for other in done:
        try:
            ray.get(other, timeout=PEERS)
        except ray.exceptions.RayTaskError:
            continue
        except ray.exceptions.RayError as lost:
            return other, lost
    return ref, error


def cause(error: Exception) -> str:
    """The last line that says something: Ray wraps an actor's own traceback around it. Where Ray
    ended the actor because memory ran out, which it says on a page of advice, the settings that
    need less."""
    if isinstance(error, ray.exceptions.OutOfMemoryError) or "running low on memory" in str(error):
        return (
            "Ray's memory monitor ended it, since this machine's memory was nearly full; set a"
            " smaller optim.micro_batch_tokens, rollout.max_num_seqs or cluster.learners, or end"
            " other programs"
        )
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__


class WorkerLostError(ActorLostError):
    """It is gone or late, and another may take its place."""


async def call(work: Awaitable[T], *, who: str, what: str, timeout: float) -> T:
    """A worker's answer; `WorkerLostError` if it is gone or late, `ActorLostError` if it refuses.
    Both name it."""
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


async def catch_up(
    worker: Any, notice: WeightUpdate, peers: Sequence[Any], *, who: str, timeout: float
) -> dict[str, float]:
    """Brings a worker that holds nothing to what the notice announces: from a peer on its node, if
    one holds that, else from the nearest anchor and the patches after it."""
    anchor = await _from_peer(worker, notice, peers, timeout)
    known = notice if anchor is None else notice.with_anchor(anchor)
    return await call(worker.catch_up.remote(known), who=who, what="catch up", timeout=timeout)


async def _from_peer(
    worker: Any, notice: WeightUpdate, peers: Sequence[Any], timeout: float
) -> PatchRef | None:
    """The anchor that a peer makes of what it holds; None where none on the worker's node can."""
    node, _ = await call(worker.offer.remote(), who="the new worker", what="offer", timeout=timeout)
    for peer in peers:
        try:
            there, version = await call(
                peer.offer.remote(), who="a peer", what="offer", timeout=timeout / 4
            )
        except ActorLostError:  # it may be what is lost next; the learners' own anchor remains
            continue
        if there == node and 0 <= version <= notice.version:
            place = ObjectStoreSource(reference=peer.export.remote())
            return PatchRef(version=version, base_version=None, size=0, places=(place,))
    return None
