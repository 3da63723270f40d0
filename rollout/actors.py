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
"""Seconds within which Ray notices that an actor's process is gone."""
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
    """No node is left on which an actor could be started."""


class CallFailedError(ActorLostError):
    """The actor answered with an error of its own, and is still there."""


def node_address() -> str:
    """The IP address at which other nodes reach this process: Ray's address of its node, since a
    machine's own name may resolve to loopback (127.0.1.1 on Debian). Loopback without Ray."""
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
    """Sets these environment variables to the network interface of `node_address`, unless the user
    did. By default Gloo takes the address that the machine's own name resolves to."""
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
    """(ref, error) of a peer that died, if one did, else of the failure itself: an actor that
    missed the dead one in a collective may fail before Ray has noticed the death."""
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
    """The last line of an error's text, around which Ray wraps the actor's traceback. If Ray killed
    the actor because memory ran out, advice on the settings instead of Ray's page of it."""
    if isinstance(error, ray.exceptions.OutOfMemoryError) or "running low on memory" in str(error):
        return (
            "Ray's memory monitor ended it, since this machine's memory was nearly full; set a"
            " smaller optim.micro_batch_tokens, rollout.max_num_seqs or cluster.learners, or end"
            " other programs"
        )
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__


class WorkerLostError(ActorLostError):
    """A rollout worker is gone or late, and another actor may take its place."""


async def call(work: Awaitable[T], *, who: str, what: str, timeout: float) -> T:
    """A worker's answer. Raises `WorkerLostError` if it is gone or late, `ActorLostError` if it
    answers with an error; both name the worker."""
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
    """Brings a worker without weights to the announced version: from a peer on its node, if one
    has weights, else from the nearest anchor and the patches after it. Returns its report."""
    anchor = await _from_peer(worker, notice, peers, timeout)
    known = notice if anchor is None else notice.with_anchor(anchor)
    return await call(worker.catch_up.remote(known), who=who, what="catch up", timeout=timeout)


async def _from_peer(
    worker: Any, notice: WeightUpdate, peers: Sequence[Any], timeout: float
) -> PatchRef | None:
    """A reference to an anchor exported by a peer on the worker's node; None if there is none."""
    node, _ = await call(worker.offer.remote(), who="the new worker", what="offer", timeout=timeout)
    for peer in peers:
        try:
            there, version = await call(
                peer.offer.remote(), who="a peer", what="offer", timeout=timeout / 4
            )
        except ActorLostError:  # no reason to fail: the learners' own anchor remains
            continue
        if there == node and 0 <= version <= notice.version:
            place = ObjectStoreSource(reference=peer.export.remote())
            return PatchRef(version=version, base_version=None, size=0, places=(place,))
    return None
