"""Applies patches in two steps: a slow one while the old weights serve, and an instant one.

    whole = materialise(patch, held, threads=4)    # verified, beside; `held` is not touched
    held = advance(held, whole)                    # swaps
    await engine.apply(whole)                      # or an engine: it takes the same tensors
    await engine.apply(resolve(patch, held))       # or, if it can, positions and values

Both are idempotent: a patch that was applied, or one that comes late, changes nothing.
`tensor_stats` counts the changes of a patch.
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
"""Most bytes of weights that an anchor may make from each byte of its own."""


def materialise(patch: WeightPatch, held: Weights | None, *, threads: int = 1) -> WeightPatch:
    """The same patch with whole tensors in place of its deltas, verified against `held` (None:
    nothing yet), whose tensors are not touched. If there is nothing to do it has no tensors, and
    leads from the held version to itself.

    Raises VersionError for a patch of another run, VersionGap if its base is not held (the nearest
    anchor must come first), CorruptPatchError if its bytes are not those that were sent (found
    before any is used), and DigestMismatchError if the result, or the held weights of the same
    version, are not the learners'. Each names the tensor.
    """
    if held is not None and _is_late(patch, held):
        return _nothing(held)
    base = None if patch.base_version is None else _check_base(patch, held)
    # all sizes are checked before anything is allocated: the patch may be hostile
    shapes = dict(patch.tensors) | {
        name: _blank(name, delta, fill=False) for name, delta in patch.deltas.items()
    }
    # each is read once: an engine may have to copy it from its device
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
    # in two passes: no payload is used before the CRCs of all are right
    spread(_check, jobs, threads)
    spread(_decode, jobs, threads)
    names = list(tensors)
    after_digests = spread(lambda name: digest(tensors[name].data.reshape(-1)), names, threads)
    kept = {} if base is None else base.digests
    verify({**kept, **dict(zip(names, after_digests, strict=True))}, patch)
    return replace(patch, tensors=tensors, deltas={}, verified=True)


def resolve(patch: WeightPatch, held: Weights | None, *, threads: int = 1) -> WeightPatch:
    """As `materialise`, for an engine that writes changes into its own storage: a tensor that
    changes little comes as positions and values (`changes`), and is not made whole. `held` is read,
    and its digest after the change compared with the learners', which also verifies `held` itself.
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

    resolved = dict(zip(old, spread(find, list(old), threads), strict=True))
    little = {name: pair for name, pair in resolved.items() if pair is not None}
    known = {name: after for name, (_, after) in little.items()}
    # the rest as whole tensors; this also compares `known` with the learners' digests
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
    """Whether a patch is applied already. Raises VersionError for a patch of another run, and
    DigestMismatchError for other weights of the same version."""
    if patch.run_id != held.run_id:
        raise VersionError(
            f"a patch of run {patch.run_id}, but these weights are of run {held.run_id}"
        )
    if patch.version == held.version:
        verify(held.digests, patch)
    return patch.version <= held.version


def merge(first: WeightPatch, second: WeightPatch) -> WeightPatch:
    """Two verified patches, the second built on the first, as one."""
    if second.base_version is None:
        return second
    tensors, combined = dict(first.tensors), dict(first.changes)
    for name, change in second.changes.items():
        if name in tensors:
            tensors[name] = changes.patched(tensors[name], change)
        else:
            combined[name] = changes.merged(combined[name], change) if name in combined else change
    for name, tensor in second.tensors.items():
        tensors[name] = tensor
        combined.pop(name, None)
    return replace(
        second,
        base_version=first.base_version,
        base_root=first.base_root,
        tensors=tensors,
        changes=combined,
    )


def advance(held: Weights | None, patch: WeightPatch) -> Weights:
    """The weights after a materialised patch; `held` itself if it is of that version or a later
    one.

    Raises VersionError for a patch of another run, and VersionGap if `held` is not the version
    against which it was materialised.
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
    """`held`, if the patch builds on it. Raises VersionGap otherwise."""
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
    """A chunk to decode, with its old elements and the room for the new ones."""

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
    """Raises CorruptPatchError for an anchor that would allocate far more memory than it has
    bytes."""
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
    """The statistics of one tensor of a patch."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    elements: int
    changed: int
    """Elements that differ from the base; all elements of a chunk that is sent raw."""
    wire_bytes: int
    modes: dict[str, int]
    """Mode -> number of chunks coded by it."""


def tensor_stats(patch: WeightPatch) -> list[TensorStats]:
    """The statistics of every tensor in the patch, sorted by name. Its CRCs must have been
    checked."""
    stats = []
    for name, delta in sorted(patch.deltas.items()):
        width = element_bytes(name, delta.dtype)
        stats.append(
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
    return stats


def changed_elements(patch: WeightPatch) -> int:
    """The number of elements that the patch changes; one that is sent raw counts as changed."""
    return sum(stats.changed for stats in tensor_stats(patch))


def _changed(chunk: Chunk, width: int) -> int:
    # a sparse stream begins with the number of changes: six bits of its length, then itself
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
