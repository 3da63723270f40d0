"""The changes of a tensor as positions and values, to be written into an engine's own storage.

    change, after = find("up.weight", delta, held.tensors["up.weight"])   # while it decodes
    check("up.weight", change, "BF16", (64, 32))                          # before it pauses

A change is verified by the digest of the tensor after it (`after`), which is computed piece by
piece without making that tensor whole.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import xxhash
from numpy.typing import NDArray

from .codec import check_chunk, decode_chunk, elements
from .patch import (
    CorruptPatchError,
    Mode,
    TensorBytes,
    TensorChange,
    TensorDelta,
    element_bytes,
)

MOST = 0.25
"""Share of a tensor's elements up to which they are written one by one; beyond it loading the whole
tensor costs less."""
PIECE = 1 << 20
WIDTHS = (2, 4, 8)
"""Bytes of elements that can be written one by one."""


def find(name: str, delta: TensorDelta, before: TensorBytes) -> tuple[TensorChange, str] | None:
    """(the change of `before` by `delta`, the digest of the tensor after it); None if it changes
    more than `MOST`, or if its dtype is loaded whole.

    Raises CorruptPatchError, with the chunk's number, for bytes that are not those that were sent.
    """
    width = element_bytes(name, delta.dtype)
    size = math.prod(delta.shape)
    if width not in WIDTHS or not size:
        return None
    old = before.data.reshape(-1)
    scratch = np.empty(max(chunk.count for chunk in delta.chunks) * width, np.uint8)
    hashed, start = xxhash.xxh3_128(), 0
    differences: list[Difference] = []
    for number, chunk in enumerate(delta.chunks):
        part = old[start * width : (start + chunk.count) * width]
        try:
            check_chunk(chunk)
            if chunk.mode is not Mode.SKIP:
                out = scratch[: part.nbytes]
                decode_chunk(chunk, part, out, width)
                differences.append(
                    _difference(elements(part, width), elements(out, width), start, size)
                )
                part = out
        except CorruptPatchError as error:
            raise CorruptPatchError(f"tensor {name}, chunk {number}: {error}") from error
        hashed.update(part.data)
        start += chunk.count
        if sum(len(difference.positions) for difference in differences) > MOST * size:
            return None
    differences = differences or [
        _difference(elements(old[:0], width), elements(old[:0], width), 0, size)
    ]
    whole = Difference(*(np.concatenate(column) for column in zip(*differences, strict=True)))
    return _change(delta.dtype, delta.shape, whole), hashed.hexdigest()


def loops() -> Any:
    """The module `kernels.patch_coding.scatter`."""
    # imported here: numba takes most of a second, and vLLM's workers, which inspect all loaded
    # modules, do not start if it was loaded before
    from ...kernels.patch_coding import scatter

    return scatter


class Difference(NamedTuple):
    """[k] positions, old and new elements, as in `TensorChange`."""

    positions: NDArray[np.integer]
    old: NDArray[np.unsignedinteger]
    new: NDArray[np.unsignedinteger]


def _difference(
    old: NDArray[np.unsignedinteger], new: NDArray[np.unsignedinteger], start: int, size: int
) -> Difference:
    where = np.flatnonzero(old != new)
    return Difference((where + start).astype(_position_type(size)), old[where], new[where])


def between(before: TensorBytes, after: TensorBytes) -> TensorChange:
    """The change from `before` to `after`, both of one dtype and shape."""
    width = element_bytes("a tensor", before.dtype)
    old, new = (elements(side.data.reshape(-1), width) for side in (before, after))
    return _change(before.dtype, tuple(before.shape), _difference(old, new, 0, len(old)))


def piecewise(before: TensorBytes, after: TensorBytes) -> Iterator[TensorChange]:
    """As `between`, in changes of `PIECE` neighbouring elements each, which bounds memory: if most
    of a tensor changes, positions and values take several times its bytes."""
    width = element_bytes("a tensor", before.dtype)
    old, new = (elements(side.data.reshape(-1), width) for side in (before, after))
    for start in range(0, len(old), PIECE):
        part = slice(start, start + PIECE)
        difference = _difference(old[part], new[part], start, len(old))
        yield _change(before.dtype, tuple(before.shape), difference)


def _change(dtype: str, shape: tuple[int, ...], difference: Difference) -> TensorChange:
    return TensorChange(
        dtype=dtype,
        shape=shape,
        positions=difference.positions,
        old=difference.old,
        new=difference.new,
        checksum=int(loops().change_checksum(*difference)),
    )


def check(name: str, change: TensorChange, dtype: str, shape: tuple[int, ...]) -> None:
    """Checks a change before anything is written. Raises ValueError if it is not of a tensor of
    this dtype and shape, and CorruptPatchError for positions that are outside of it, repeat or do
    not ascend, and for a wrong checksum. Each names the tensor."""
    if (change.dtype, tuple(change.shape)) != (dtype, tuple(shape)):
        raise ValueError(
            f"{name}: got {change.dtype} {tuple(change.shape)}, the engine serves {dtype}"
            f" {tuple(shape)}"
        )
    size, width = math.prod(shape), element_bytes(name, dtype)
    kinds = {values.dtype.str for values in (change.old, change.new)}
    lengths = {len(values) for values in (change.positions, change.old, change.new)}
    kinds_of_positions = {np.dtype("<i4"), np.dtype("<i8")}
    flat = all(v.ndim == 1 for v in (change.positions, change.old, change.new))
    if (
        kinds != {f"<u{width}"}
        or len(lengths) > 1
        or not flat
        or change.positions.dtype not in kinds_of_positions
    ):
        raise CorruptPatchError(
            f"tensor {name}: positions and values must be as many, in one dimension, positions as"
            f" integers of 4 or 8 bytes, values of {width} bytes"
        )
    problem, index = loops().check_positions(change.positions, size)
    if problem == loops().OUTSIDE:
        raise CorruptPatchError(
            f"tensor {name}: position {change.positions[index]} is outside of its {size} elements"
        )
    if problem == loops().UNSORTED:
        raise CorruptPatchError(
            f"tensor {name}: position {change.positions[index]} comes after"
            f" {change.positions[index - 1]}; they must ascend without repeating"
        )
    checksum = int(loops().change_checksum(change.positions, change.old, change.new))
    if checksum != change.checksum:
        raise CorruptPatchError(
            f"tensor {name}: its changes have the checksum {checksum}, not {change.checksum}"
        )


def patched(before: TensorBytes, change: TensorChange) -> TensorBytes:
    """A copy of the whole tensor after a change. Idempotent."""
    data = np.array(before.data.reshape(-1))
    elements(data, element_bytes("a tensor", before.dtype))[change.positions] = change.new
    return TensorBytes(dtype=before.dtype, shape=before.shape, data=data)


def merged(first: TensorChange, second: TensorChange) -> TensorChange:
    """Both changes as one; `second` applies to the tensor after `first`."""
    both = np.concatenate((second.positions, first.positions))
    # of equal positions `unique` takes the first, so `second` has to stand before `first`
    positions, at = np.unique(both, return_index=True)
    new = np.concatenate((second.new, first.new))[at]
    old = np.concatenate((second.old, first.old))[at]
    shared, _, of_first = np.intersect1d(
        positions, first.positions, assume_unique=True, return_indices=True
    )
    old[np.searchsorted(positions, shared)] = first.old[of_first]
    return _change(first.dtype, first.shape, Difference(positions, old, new))


def follow(
    tensors: Mapping[str, TensorBytes], changes: Mapping[str, TensorChange], name: str
) -> TensorBytes:
    """The tensor `name` after these changes."""
    change = changes.get(name)
    return tensors[name] if change is None else patched(tensors[name], change)


def _position_type(size: int) -> str:
    return "<i4" if size < 1 << 31 else "<i8"
