"""Makes weights of patches, in two steps: one that may take its time while the old weights serve,
one that takes none.

    whole = materialise(patch, held, threads=4)    # verified, beside; `held` is not touched
    held = advance(held, whole)                    # swaps
    await engine.apply(whole)                      # or an engine: it takes the same tensors
    await engine.apply(resolve(patch, held))       # or, where it can, positions and values

Both are idempotent: a patch that was applied, or one that comes late, changes nothing. And what a
patch changes, in numbers: `tensor_stats`.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np

from . import changes
from .codec import CHUNK_BYTES, check_chunk, decode_chunk, decompress, spread
from .patch import (
    Bytes,
    Chunk,
    CorruptPatchError,
    Mode,
    TensorBytes,
    TensorChange,
    TensorDelta,
    VersionError,
    VersionGap,
    WeightPatch,
    Weights,
    digest,
    element_bytes,
    verify,
)

EXPANSION = 1024
"""Bytes of weights that an anchor may make of each of its own."""


def materialise(patch: WeightPatch, held: Weights | None, *, threads: int = 1) -> WeightPatch:
    """Verifies a patch against what is held (None: nothing yet) and makes the tensors that it
    changes, beside the old ones: the same patch with each of them whole. If there is nothing to do
    it has none, and leads from the version that is held to itself.

    VersionError: a patch of another run. VersionGap: its base is not what is held; the nearest
    anchor must come first. CorruptPatchError: its bytes are not those that were sent, found before
    any is used. DigestMismatchError: what comes out is not what the learners hold, or what is held
    under the same version is not. Each names the tensor, and nothing has changed.
    """
    if held is not None and _is_late(patch, held):
        return _nothing(held)
    base = None if patch.base_version is None else _check_base(patch, held)
    # all is looked at before there is room for any: whoever made the patch may mean no good
    shapes = dict(patch.tensors) | {
        name: _blank(name, delta, fill=False) for name, delta in patch.deltas.items()
    }
    # each is asked for once: an engine may have to copy it from its device
    old = {} if base is None else {name: base.tensors.get(name) for name in shapes}
    for name, before in old.items():
        _check_shape(name, shapes[name], before)
    if base is None:
        _check_expansion(patch)
    tensors = shapes | {name: _blank(name, delta) for name, delta in patch.deltas.items()}
    jobs = [
        job
        for name, delta in patch.deltas.items()
        for job in _jobs(name, delta, old.get(name), tensors[name].data)
    ]
    spread(_check, jobs, threads)
    spread(_decode, jobs, threads)
    names = list(tensors)
    found = spread(lambda name: digest(tensors[name].data.reshape(-1)), names, threads)
    kept = {} if base is None else base.digests
    verify({**kept, **dict(zip(names, found, strict=True))}, patch)
    return replace(patch, tensors=tensors, deltas={}, verified=True)


def resolve(patch: WeightPatch, held: Weights | None, *, threads: int = 1) -> WeightPatch:
    """As `materialise`, for an engine that writes what changed into its own storage: of a tensor
    that changes little it has the positions and values (`changes`), and no whole tensor is made.
    `held` is read, and its digest after the change is the learners': so what it was is proved, too.
    """
    if held is None or patch.base_version is None or _is_late(patch, held):
        return materialise(patch, held, threads=threads)
    base = _check_base(patch, held)
    old = {name: base.tensors.get(name) for name in patch.deltas}

    def find(name: str) -> tuple[TensorChange, str] | None:
        delta, before = patch.deltas[name], old[name]
        _check_shape(name, _blank(name, delta, fill=False), before)
        assert before is not None, "checked above"
        return changes.find(name, delta, before)

    found = dict(zip(old, spread(find, list(old), threads), strict=True))
    little = {name: pair for name, pair in found.items() if pair is not None}
    known = {name: after for name, (_, after) in little.items()}
    # the rest as whole tensors, which also compares what was found here with the learners' digests
    rest = materialise(
        replace(
            patch,
            base_root=None,
            deltas={name: delta for name, delta in patch.deltas.items() if name not in little},
        ),
        replace(base, digests={**base.digests, **known}),
        threads=threads,
    )
    little_changes = {name: change for name, (change, _) in little.items()}
    return replace(rest, base_root=patch.base_root, changes=little_changes)


def _is_late(patch: WeightPatch, held: Weights) -> bool:
    """Whether there is nothing left to do; VersionError for a patch of another run,
    DigestMismatchError for other weights of the same version."""
    if patch.run_id != held.run_id:
        raise VersionError(
            f"a patch of run {patch.run_id}, but these weights are of run {held.run_id}"
        )
    if patch.version == held.version:
        verify(held.digests, patch)
    return patch.version <= held.version


def merge(first: WeightPatch, second: WeightPatch) -> WeightPatch:
    """Two verified patches, of which one builds on the other, as one."""
    if second.base_version is None:
        return second
    tensors, found = dict(first.tensors), dict(first.changes)
    for name, change in second.changes.items():
        if name in tensors:
            tensors[name] = changes.patched(tensors[name], change)
        else:
            found[name] = changes.merged(found[name], change) if name in found else change
    for name, tensor in second.tensors.items():
        tensors[name] = tensor
        found.pop(name, None)
    return replace(
        second,
        base_version=first.base_version,
        base_root=first.base_root,
        tensors=tensors,
        changes=found,
    )


def advance(held: Weights | None, patch: WeightPatch) -> Weights:
    """The weights after a patch that was materialised; `held` itself if it is of that version or a
    later one.

    VersionGap: `held` is no longer what the patch was materialised against.
    """
    if held is not None and patch.run_id != held.run_id:
        raise VersionError(
            f"a patch of run {patch.run_id}, but these weights are of run {held.run_id}"
        )
    if held is not None and patch.version <= held.version:
        return held
    assert not patch.changes, "they are an engine's to write"
    tensors = patch.tensors
    if patch.base_version is not None:
        tensors = {**_check_base(patch, held).tensors, **tensors}
    return Weights(
        run_id=patch.run_id, version=patch.version, tensors=tensors, digests=patch.digests
    )


def _nothing(held: Weights) -> WeightPatch:
    return WeightPatch(
        run_id=held.run_id,
        version=held.version,
        base_version=held.version,
        base_root=held.root,
        tensors={},
        digests=held.digests,
        verified=True,
    )


def _check_base(patch: WeightPatch, held: Weights | None) -> Weights:
    """`held`, if the patch builds on it; else VersionGap."""
    if held is None or held.version != patch.base_version:
        here = "nothing" if held is None else f"version {held.version}"
        raise VersionGap(
            f"patch {patch.version} builds on version {patch.base_version}, but {here} is held"
        )
    if patch.base_root is not None and patch.base_root != held.root:
        raise VersionGap(
            f"patch {patch.version} builds on another version {held.version} than the one that is"
            " held"
        )
    return held


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class _Job:
    """A chunk to decode."""

    name: str
    number: int
    chunk: Chunk
    width: int
    old: Bytes | None
    out: Bytes


def _jobs(name: str, delta: TensorDelta, before: TensorBytes | None, out: Bytes) -> Iterator[_Job]:
    width = element_bytes(name, delta.dtype)
    old = None if before is None else before.data.reshape(-1)
    start = 0
    for number, chunk in enumerate(delta.chunks):
        part = slice(start, start + chunk.count * width)
        last = None if old is None else old[part]
        yield _Job(name=name, number=number, chunk=chunk, width=width, old=last, out=out[part])
        start = part.stop


def _check(job: _Job) -> None:
    with _named(job):
        check_chunk(job.chunk)


def _decode(job: _Job) -> None:
    with _named(job):
        decode_chunk(job.chunk, job.old, job.out, job.width)


@contextmanager
def _named(job: _Job) -> Iterator[None]:
    try:
        yield
    except CorruptPatchError as error:
        raise CorruptPatchError(f"tensor {job.name}, chunk {job.number}: {error}") from error


def _blank(name: str, delta: TensorDelta, *, fill: bool = True) -> TensorBytes:
    count, size = sum(chunk.count for chunk in delta.chunks), math.prod(delta.shape)
    if count != size:
        raise CorruptPatchError(f"tensor {name}: chunks of {count} elements for {size}")
    data = np.empty(size * element_bytes(name, delta.dtype) if fill else 0, np.uint8)
    return TensorBytes(dtype=delta.dtype, shape=delta.shape, data=data)


def _check_expansion(patch: WeightPatch) -> None:
    """CorruptPatchError for an anchor that would make far more weights than it has bytes."""
    sent = sum(delta.num_bytes for delta in patch.deltas.values())
    made = sum(
        math.prod(delta.shape) * element_bytes(name, delta.dtype)
        for name, delta in patch.deltas.items()
    )
    if made > EXPANSION * sent + CHUNK_BYTES:
        raise CorruptPatchError(
            f"weight patch {patch.version} would make {made} bytes of weights of {sent}"
        )


def _check_shape(name: str, new: TensorBytes, old: TensorBytes | None) -> None:
    after = f"{new.dtype} {tuple(new.shape)}"
    before = "nothing" if old is None else f"{old.dtype} {tuple(old.shape)}"
    if before != after:
        raise ValueError(
            f"{name}: the patch makes {after} of what is {before} here; only an anchor can do that"
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorStats:
    """One tensor of a patch."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    elements: int
    changed: int
    """Elements that differ from the base; all of a chunk that is sent raw."""
    wire_bytes: int
    modes: dict[str, int]
    """How many chunks are coded in which way."""


def tensor_stats(patch: WeightPatch) -> list[TensorStats]:
    """Of every tensor that the patch brings, in the order of their names. The patch's CRCs must
    have been checked."""
    found = []
    for name, delta in sorted(patch.deltas.items()):
        width = element_bytes(name, delta.dtype)
        found.append(
            TensorStats(
                name=name,
                dtype=delta.dtype,
                shape=delta.shape,
                elements=sum(chunk.count for chunk in delta.chunks),
                changed=sum(_changed(chunk, width) for chunk in delta.chunks),
                wire_bytes=delta.num_bytes,
                modes=dict(Counter(chunk.mode.name.lower() for chunk in delta.chunks)),
            )
        )
    return found


def changed_elements(patch: WeightPatch) -> int:
    """How many elements the patch changes; one that is sent raw counts as changed."""
    return sum(stats.changed for stats in tensor_stats(patch))


def _changed(chunk: Chunk, width: int) -> int:
    # its stream begins with the number: six bits of its length, then itself
    if chunk.mode is Mode.SPARSE:
        head = int.from_bytes(chunk.payload[:9].tobytes(), "little")
        return head >> 6 & ((1 << (head & 63)) - 1)
    if chunk.mode is Mode.DENSE:
        planes = np.frombuffer(decompress(chunk.payload, chunk.count * width), np.uint8)
        return int(np.count_nonzero(planes.reshape(width, -1).any(axis=0)))
    return chunk.count if chunk.mode is Mode.RAW else 0


__all__ = [
    "TensorStats",
    "advance",
    "changed_elements",
    "materialise",
    "merge",
    "resolve",
    "tensor_stats",
]
