"""Counts of a patch: changed elements, bytes by mode."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import numpy as np
import zstandard

from .patch import Chunk, Mode, WeightPatch, element_bytes


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
        planes = np.frombuffer(
            zstandard.ZstdDecompressor().decompress(chunk.payload.data), np.uint8
        )
        return int(np.count_nonzero(planes.reshape(width, -1).any(axis=0)))
    return chunk.count if chunk.mode is Mode.RAW else 0


__all__ = ["TensorStats", "changed_elements", "tensor_stats"]
