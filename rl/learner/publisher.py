"""A learner rank's side of publishing weights: its shard of each version, and the changes since the
last one.

    # on every rank, between two steps: a copy
    publisher.take(shards_of(model, dtype, rank, world))
    # on every rank but 0, in another thread, while the next step runs
    part = publisher.part(whole=False)
    # on rank 0, which has the whole last version, likewise
    published = publisher.publish(order, parts)

Names and shapes are Hugging Face's. FSDP2 shards a parameter by its first dimension as
`torch.chunk` does, so a shard is consecutive elements of the tensor; tied weights are one
parameter; adapters are merged into their weight.
"""

from __future__ import annotations

import threading
import time
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn

from ...rollout.vllm_backend.transfer import Rendezvous, Sender
from ...rollout.vllm_backend.transfer_api import check_sender
from ...rollout.weights.apply import advance, changed_elements, materialise
from ...rollout.weights.codec import CHUNK_BYTES, spread
from ...rollout.weights.diff import Shard, TensorPart, diff, join
from ...rollout.weights.engine_transfer import Broadcast, BroadcastGroup, EngineTransfer
from ...rollout.weights.patch import (
    Chunk,
    Mode,
    TensorBytes,
    WeightPatch,
    Weights,
    dense_patch,
    digest,
    element_bytes,
)
from ...rollout.weights.tensors import dtype_name
from ...rollout.weights.transport import Directory, ObjectStore, PatchRef, PatchStore
from ...rollout.weights.wire_format import pieces
from .lora import merged_shards

SAMPLE = 4096
"""Elements of a tensor by which the share of changed ones is estimated."""

Shards = Mapping[str, Shard]
Parts = Mapping[str, TensorPart]


@dataclass(frozen=True, kw_only=True, slots=True)
class PublishRequest:
    """A request to publish one version."""

    run_id: str
    version: int
    patch: bool
    """Publish a patch on the version before, if there was one."""
    anchor: bool
    """Publish the whole weights."""
    dense: bool = False
    """Workers take the anchor even if there is a patch, which is then for the history, and to
    measure its size."""
    directory: str | None = None
    """Directory for the files; None: Ray's object store."""
    broadcast: Broadcast | None = None
    """A broadcast of the whole weights for which the engines' processes wait;
    `Publisher.broadcast` sends it."""
    history: str | None = None
    """A directory that gets a copy of each patch, or of the anchor where there is no patch."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Published:
    """One version as rank 0 published it."""

    version: int
    root: str
    num_bytes: int
    """Bytes of the whole weights."""
    patch: PatchRef | None
    anchor: PatchRef | None
    changed: float | None
    """Share of elements that differ from the last version: counted in a patch, else estimated from
    a sample."""
    engines: EngineTransfer | None = None
    """The broadcast into the engines' own processes; None without one."""
    encode_s: float
    """Seconds for diff, encoding, digests and the hand-over to the transport, outside the training
    thread."""


def shards_of(model: nn.Module, dtype: torch.dtype, rank: int, world: int) -> dict[str, Shard]:
    """A copy in host memory of this rank's consecutive elements of every weight, in the served
    dtype; a collective if there are adapters."""
    shards: dict[str, Shard] = {}
    pinned = False
    for name, shape, local in merged_shards(model, rank, world):
        pinned = pinned or local.device.type != "cpu"
        host = torch.empty(local.shape, dtype=dtype, pin_memory=local.device.type != "cpu")
        host.copy_(local, non_blocking=True)
        shards[name] = Shard(
            dtype=dtype_name(dtype),
            shape=shape,
            start=first_row(shape, rank, world) * int(np.prod(shape[1:], dtype=np.int64)),
            data=host.view(-1).view(torch.uint8).numpy(),
        )
    if pinned:
        torch.accelerator.synchronize()
    return shards


def first_row(shape: Sequence[int], rank: int, world: int) -> int:
    """The first row of a rank's shard: all but the last ones have ceil(rows / world) rows."""
    rows = shape[0] if shape else 1
    return min(rank * -(-rows // world), rows)


class Publisher:
    """Publishes one rank's weights. `take` is called by the training thread, everything else by one
    other thread."""

    def __init__(self, *, rank: int, world: int, threads: int) -> None:
        self.rank = rank
        self.world = world
        self.threads = threads
        self._new: dict[str, Shard] = {}
        self._old: dict[str, Shard] | None = None
        self._base: Weights | None = None
        self._taken = threading.Lock()
        self._outgoing: tuple[EngineTransfer, Mapping[str, TensorBytes]] | None = None
        self._rendezvous: Rendezvous | None = None
        self._sender: Sender | None = None

    def take(self, shards: dict[str, Shard]) -> None:
        """Sets the weights of the next version to publish."""
        with self._taken:
            self._new = shards

    def part(self, *, whole: bool) -> dict[str, TensorPart]:
        """The changes of this rank's shard since it was last published (`whole`: all of it). From
        now on this shard counts as the published one."""
        with self._taken:
            new = self._new
        if whole or self._old is None:
            parts = _whole(new, self.threads)
        else:
            parts = diff(
                {name: shard.data for name, shard in self._old.items()}, new, threads=self.threads
            )
        self._old = new
        return parts

    def publish(self, order: PublishRequest, others: Sequence[Parts] = ()) -> Published:
        """On rank 0: joins the parts of all ranks and hands the patch to the transport."""
        start = time.perf_counter()
        whole = not order.patch or self._base is None
        changed = self._guess() if whole else None
        parts = [self.part(whole=whole), *others]
        if whole and self.world == 1:
            patch = dense_patch(order.run_id, order.version, tensor_bytes(self._old or {}))
        else:
            patch = join(
                parts, None if whole else self._base, run_id=order.run_id, version=order.version
            )
        if not whole:
            changed = changed_elements(patch) / max(1, _num_elements(parts))
        weights = self._advance(patch)
        engines = None
        if order.broadcast is not None:
            engines = _into_engines(order.broadcast, weights)
            self._outgoing = (engines, weights.tensors)
        store: PatchStore = (
            Directory(Path(order.directory)) if order.directory is not None else ObjectStore()
        )
        sent = None if whole else _put(store, patch)
        anchor = None
        if whole or order.anchor:
            anchor = _put(store, patch if whole else _anchor(weights))
        if order.history is not None:
            _put(Directory(Path(order.history)), patch)
        return Published(
            version=order.version,
            root=weights.root,
            num_bytes=sum(tensor.data.nbytes for tensor in weights.tensors.values()),
            patch=sent,
            anchor=anchor,
            changed=changed,
            engines=engines,
            encode_s=time.perf_counter() - start,
        )

    def meet(
        self, device: str, workers: int, timeout: float, backend: str, ranks: int = 1
    ) -> BroadcastGroup:
        """On rank 0: a new group of this process and `ranks` processes of each of `workers`
        workers' engines, which receive through `backend`. Raises ValueError if this process cannot
        send through it."""
        check_sender(backend)
        if self._rendezvous is None:
            self._rendezvous = Rendezvous(device, timeout)
        return self._rendezvous.group(workers, backend, ranks)

    def broadcast(self) -> None:
        """On rank 0: sends the version last published to the engines that wait for it. Raises
        TransferError if not all of them do."""
        assert self._rendezvous is not None and self._outgoing is not None, (
            "nothing was published for a broadcast"
        )
        version, tensors = self._outgoing
        self._outgoing = None
        group = version.broadcast.group
        if self._sender is None or self._sender.group != group:
            self._sender = Sender(self._rendezvous.store, group)
        self._sender.send(version, tensors)

    def _advance(self, patch: WeightPatch) -> Weights:
        """The verified whole weights of the new version, the base of the next patch."""
        if self.world == 1:  # rank 0's own shards are the whole, and nobody writes to them any more
            tensors = dict(tensor_bytes(self._old or {}))
            self._base = Weights(
                run_id=patch.run_id, version=patch.version, tensors=tensors, digests=patch.digests
            )
        else:
            base = None if patch.base_version is None else self._base
            self._base = advance(base, materialise(patch, base, threads=self.threads))
        return self._base

    def _guess(self) -> float | None:
        """The share of changed elements, estimated from a sample of this rank's shard."""
        if self._old is None:
            return None
        changed = total = 0
        for name, shard in self._new.items():
            width = element_bytes(name, shard.dtype)
            new, old = shard.data.view(f"<u{width}"), self._old[name].data.view(f"<u{width}")
            step = max(1, len(new) // SAMPLE)
            changed += int(np.count_nonzero(new[::step] != old[::step])) * step
            total += len(new[::step]) * step
        return changed / max(1, total)


def _into_engines(broadcast: Broadcast, weights: Weights) -> EngineTransfer:
    return EngineTransfer(
        broadcast=broadcast,
        tensors={
            name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in weights.tensors.items()
        },
        digests=weights.digests,
    )


def _put(store: PatchStore, patch: WeightPatch) -> PatchRef:
    return store.put(patch.version, patch.base_version, pieces(patch))


def _anchor(weights: Weights) -> WeightPatch:
    return WeightPatch(
        run_id=weights.run_id,
        version=weights.version,
        tensors=weights.tensors,
        digests=weights.digests,
    )


def tensor_bytes(shards: Shards) -> Iterator[tuple[str, TensorBytes]]:
    for name, shard in shards.items():
        yield name, TensorBytes(dtype=shard.dtype, shape=shard.shape, data=shard.data)


def _whole(shards: Shards, threads: int) -> dict[str, TensorPart]:
    """name -> part whose raw chunks are views of the shard."""
    digests = spread(lambda shard: digest(shard.data), list(shards.values()), threads)
    return {
        name: TensorPart(
            dtype=shard.dtype,
            shape=shard.shape,
            start=shard.start,
            chunks=tuple(_raw(name, shard)),
            digest=digest_of_whole,
        )
        for (name, shard), digest_of_whole in zip(shards.items(), digests, strict=True)
    }


def _raw(name: str, shard: Shard) -> Iterator[Chunk]:
    width = element_bytes(name, shard.dtype)
    for start in range(0, shard.data.nbytes, CHUNK_BYTES):
        part = shard.data[start : start + CHUNK_BYTES]
        yield Chunk(
            mode=Mode.RAW, count=part.nbytes // width, payload=part, crc=zlib.crc32(part.data)
        )


def _num_elements(parts: Sequence[Parts]) -> int:
    return sum(piece.count for part in parts for piece in part.values())
