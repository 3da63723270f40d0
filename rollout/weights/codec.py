"""Coding of one chunk of a tensor: its new bytes against its old ones, by the mode whose payload is
smallest.

Payloads are specified in `wire_format`; the loops are in `kernels/patch_coding/delta.py`.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, TypeVar

import numpy as np
import numpy.typing as npt
import zstandard

from .patch import Bytes, Chunk, CorruptPatchError, Mode

# imported in the functions that use it: numba takes most of a second, also in processes that code
# nothing
if TYPE_CHECKING:
    from ...kernels.patch_coding.delta import Elements

Job = TypeVar("Job")
Result = TypeVar("Result")

CHUNK_BYTES = 1 << 20
"""New bytes of a chunk: few enough that all arrays of its coding stay in the processor's cache;
longer streams are hardly denser."""
ZSTD_LEVEL = 1
SPARSE_ENOUGH = 4
"""If the smallest payload so far is this many times smaller than the raw bytes, a dense one is not
tried."""
SAMPLE = 4096
"""Elements of a chunk that are sampled to decide which modes to try."""
RUN = 512
"""Neighbouring elements of the sample: reading one costs as much as reading its neighbours too."""
NOTHING = np.empty(0, np.uint8)


def encode_chunk(old: Bytes | None, new: Bytes, width: int) -> Chunk:
    """The chunk that takes `old` (None: zeros) to `new`, elements of `width` bytes. A raw chunk's
    payload is `new` itself, not a copy."""
    before = elements(np.zeros_like(new) if old is None else old, width)
    after = elements(new, width)
    count = len(after)
    differences = _sample(before, after)
    if not differences.any() and np.array_equal(before, after):
        return _chunk(Mode.SKIP, count, NOTHING)
    payloads = {Mode.RAW: new}
    if _worth_trying(differences, width):
        from ...kernels.patch_coding.delta import encode_changes

        payloads[Mode.SPARSE] = encode_changes(before, after)
    if min(payload.nbytes for payload in payloads.values()) * SPARSE_ENOUGH > new.nbytes:
        planes = np.ascontiguousarray((before ^ after).view(np.uint8).reshape(-1, width).T)
        payloads[Mode.DENSE] = np.frombuffer(
            zstandard.ZstdCompressor(ZSTD_LEVEL).compress(planes.data), np.uint8
        )
    mode = min(payloads, key=lambda mode: payloads[mode].nbytes)
    return _chunk(mode, count, payloads[mode])


def decode_chunk(chunk: Chunk, old: Bytes | None, out: Bytes, width: int) -> None:
    """Writes the new bytes to `out`. Raises CorruptPatchError, with `out` in any state, if the
    payload cannot be of this chunk."""
    if chunk.mode is Mode.SKIP or chunk.mode is Mode.DENSE:
        out[:] = 0 if old is None else old
    if chunk.mode is Mode.RAW:
        if chunk.payload.nbytes != out.nbytes:
            raise CorruptPatchError(f"{chunk.payload.nbytes} raw bytes for {out.nbytes}")
        out[:] = chunk.payload
    elif chunk.mode is Mode.DENSE:
        planes = np.frombuffer(decompress(chunk.payload, out.nbytes), np.uint8).reshape(width, -1)
        out.reshape(-1, width)[:] ^= planes.T
    elif chunk.mode is Mode.SPARSE:
        from ...kernels.patch_coding.delta import decode_changes

        before = elements(np.zeros_like(out) if old is None else old, width)
        if not decode_changes(chunk.payload, before, elements(out, width)):
            raise CorruptPatchError("not a valid stream of changes")


def check_chunk(chunk: Chunk) -> None:
    """Raises CorruptPatchError if the payload does not have the chunk's CRC."""
    if zlib.crc32(chunk.payload.data) != chunk.crc:
        raise CorruptPatchError(
            f"its {chunk.payload.nbytes} bytes do not have the CRC {chunk.crc:08x}"
        )


def elements(data: Bytes, width: int) -> Elements:
    """The bytes as unsigned integers, without a copy."""
    return data.view(f"<u{width}")


def spread(work: Callable[[Job], Result], jobs: Sequence[Job], threads: int) -> list[Result]:
    """The results of `work` for every job, in their order, computed by `threads` threads."""
    # threads help: coding a chunk releases the interpreter's lock
    if threads == 1:
        return [work(job) for job in jobs]
    with ThreadPoolExecutor(threads, thread_name_prefix="weight-patch") as pool:
        return list(pool.map(work, jobs))


def _chunk(mode: Mode, count: int, payload: Bytes) -> Chunk:
    return Chunk(mode=mode, count=count, payload=payload, crc=zlib.crc32(payload.data))


def _sample(before: Elements, after: Elements) -> npt.NDArray[np.signedinteger]:
    """[runs, `RUN`] differences, new - old, of about `SAMPLE` elements spread over the chunk."""
    runs = max(1, len(before) // RUN)
    step = -(-runs * RUN // SAMPLE)
    old, new = (side[: runs * RUN].reshape(runs, -1)[::step] for side in (before, after))
    return (new - old).view(f"i{before.itemsize}")


def _worth_trying(differences: npt.NDArray[np.signedinteger], width: int) -> bool:
    """Whether a sparse payload may be smaller than the raw bytes, by a sample of differences."""
    # an estimate first, since sparse coding takes longest for chunks in which it saves least
    changed = differences[differences != 0].astype(np.float64)
    return bool(np.sum(np.log2(np.abs(changed)) + 1) < 8 * width * differences.size)


def decompress(payload: Bytes, size: int) -> bytes:
    """The `size` bytes of a zstd frame. Raises CorruptPatchError if it has another size."""
    try:
        # checked first, since a hostile frame could claim any size
        if zstandard.get_frame_parameters(payload.data).content_size != size:
            raise CorruptPatchError(f"a compressed payload of another size than {size} bytes")
        return zstandard.ZstdDecompressor().decompress(payload.data, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise CorruptPatchError(
            f"a compressed payload that cannot be decompressed ({error})"
        ) from error


__all__ = ["CHUNK_BYTES", "check_chunk", "decode_chunk", "elements", "encode_chunk", "spread"]
