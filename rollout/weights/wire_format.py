"""A weight patch as bytes, for slow links and for the files of a run's weight history.

    data = to_bytes(patch)     # or `pieces(patch)`, without a copy of what is large
    patch = from_bytes(data)   # CorruptPatchError says what is broken

Integers are little-endian, u32 is unsigned of 32 bits, i64 signed of 64. A *varint* has seven bits
a byte, lowest first; all its bytes but the last have bit 7 set. A *string* is a varint n and n
bytes of UTF-8.

File
    0   4 bytes   "EMWP"
    4   u16       version of this format: 2
    6   u16       0
    8   i64       version of the weights after applying, not negative
    16  i64       version that they are made from, less than that; -1: from zeros (an anchor)
    24  16 bytes  root digest after applying
    40  16 bytes  root digest before; zeros in an anchor
    56  u32       D, bytes of the directory
    60  u32       0
    64  u64       B, bytes of the body; the file has 80 + D + B bytes
    72  u32       0
    76  u32       CRC-32 (that of zlib) of bytes 0 to 75 and then the directory
    80            directory, then body

Directory
    string        run id
    varint        T, number of tensors: all that are served, in ascending order of their names (as
        UTF-8)
    T times       name: varint p, varint s, string m; it is the first p bytes of the name before it,
                  then m, then the last s bytes of the name before it (before the first is an empty
                  name)
                  u8 dtype: 0 BF16, 1 F16, 2 F32, 3 F64, 4 F8_E4M3, 5 F8_E5M2, 6 BOOL, 7 U8, 8 I8,
                  9 U16, 10 I16, 11 U32, 12 I32, 13 U64, 14 I64; or 255: the tensor stays as it is
                  (never in an anchor), and that is all
                  varint number of dimensions, and a varint for each
                  varint C, number of chunks; C times: u8 mode, varint number of elements, varint
                  bytes of payload
    T times       16 bytes: xxh3-128 of the tensor's bytes after applying
    per chunk     u32 CRC-32 of its payload, in the order above

    The elements of a tensor's chunks follow one another in C order and make up the tensor. A
    digest's 16 bytes are its 32 hexadecimal digits. The root digest is the xxh3-128 of the lines
    "NAME DIGEST" (in hexadecimal) of all tensors in the order above, with a newline between one and
    the next.

Body
    The chunks' payloads, in the order of the directory. `old` is what the chunk's elements were,
    read as unsigned integers of their width (W bits); `new` is what they become. By mode:

    0 skip        nothing; new = old
    1 sparse      the stream below
    2 dense       one zstd frame of W/8 planes: the first bytes of all elements of old XOR new, then
                  all second bytes, ...
    3 raw         new

Sparse stream
    A string of bits: bit i is bit i % 8 of byte i // 8, and the last byte is filled with zeros. A
    field of n bits has its lowest bit first. A *number* is a field of 6 bits, n, and a field of n
    bits, the number.
    A *list* codes numbers v, each with a parameter k that follows from those before it; k starts at
    what is given, and m = 32 * 2^k. Each is q bits 1, a bit 0 and a field of k bits, r: v = q * 2^k
    + r; or 24 bits 1 and a number: v is that. After it m = m + min(v, 24 * 2^k) - m // 32; then k
    grows by 1 as long as k < 38 and m // 32 // 2^k > 1, and shrinks by 1 as long as k > 0 and
    m // 32 // 2^k = 0.

    number        how many elements changed
    2 bits        t
    t times       W - 1 bits: a threshold, greater than the one before it. An element's magnitude is
                  the field of the lowest W - 1 bits of `old`; class c (from 0) has the elements
                  whose magnitude is not less than c thresholds.
    Then class by class, t + 1 times:
      number      how many of its elements changed
      1 bit       whether those that did not change are marked, rather than those that did
                  if so: number, how many those are
      if any are marked:
        6 bits    k of the list of gaps
        each      gap: how many elements of the class, in order, lie between this marked one and the
                  one before it
      if any changed, for those that did, in order:
        1 bit     wide
        6 bits    k of the list of runs
        6 bits    k of the list of excesses
                  if not wide: run
        each      1 bit, negative; then
                  if wide: excess; d = excess + 1
                  else if the run is 0: excess; d = excess + 2; the next run
                  else d = 1, and the run is now 1 less
                  new = old - d if negative else old + d, modulo 2^W

Size
    A chunk's payload is never larger than its new bytes, and none has more than 1 MiB of elements
    (the encoder's have as much, but for the last of a tensor). So a file has at most 1.002 times
    the bytes of the weights, and 128 + the run id, and for each tensor 48 + its name + 6 a
    dimension.
"""

from __future__ import annotations

import math
import struct
import zlib
from collections.abc import Iterator, Mapping

import numpy as np

from .codec import CHUNK_BYTES
from .dtypes import ELEMENT_BYTES
from .patch import (
    Bytes,
    Chunk,
    CorruptPatchError,
    Mode,
    TensorBytes,
    TensorDelta,
    WeightPatch,
    element_bytes,
)

MAGIC = b"EMWP"
FORMAT = 2
HEADER = struct.Struct("<4sHHqq16s16sIIQI")
CRC = struct.Struct("<I")
NO_ROOT = bytes(16)
DTYPES = tuple(ELEMENT_BYTES)
KEPT = 255
LONGEST_NAME, DIMENSIONS, NAMES = 4096, 16, 16
"""Most bytes of a name, dimensions of a tensor, and bytes of all names per byte of the directory:
the limits of a reader, since a file may be hostile."""


def to_bytes(patch: WeightPatch) -> bytes:
    """The whole file."""
    return b"".join(pieces(patch))


def pieces(patch: WeightPatch) -> Iterator[bytes | memoryview]:
    """Yields the file in pieces: header and directory, then each payload, without copying it.
    Raises ValueError for tensors without a digest."""
    deltas = {
        **patch.deltas,
        **{name: _whole(name, tensor) for name, tensor in patch.tensors.items()},
    }
    names = sorted(patch.digests, key=str.encode)
    if strays := deltas.keys() - patch.digests.keys():
        raise ValueError(f"tensors without a digest: {', '.join(sorted(strays))}")
    chunks = [chunk for name in names if name in deltas for chunk in deltas[name].chunks]
    directory = _write_directory(patch, names, deltas, chunks)
    header = HEADER.pack(
        MAGIC,
        FORMAT,
        0,
        patch.version,
        -1 if patch.base_version is None else patch.base_version,
        bytes.fromhex(patch.root),
        NO_ROOT if patch.base_root is None else bytes.fromhex(patch.base_root),
        len(directory),
        0,
        sum(chunk.payload.nbytes for chunk in chunks),
        0,
    )
    yield header + CRC.pack(zlib.crc32(directory, zlib.crc32(header))) + directory
    for chunk in chunks:
        yield chunk.payload.data


def from_bytes(data: bytes | bytearray | memoryview | Bytes) -> WeightPatch:
    """The patch of a file. Its payloads are views of `data`, whose CRCs `apply` checks before it
    uses any. Raises CorruptPatchError for any other fault."""
    file = np.frombuffer(data, np.uint8)
    start = HEADER.size + CRC.size
    if len(file) < start:
        raise CorruptPatchError(
            f"a weight patch of {len(file)} bytes, of which its header alone has {start}"
        )
    header = file[: HEADER.size].tobytes()
    magic, format_version, _, version, base_version, root, base_root, size, _, body, _ = (
        HEADER.unpack(header)
    )
    if magic != MAGIC:
        raise CorruptPatchError(
            f"not a weight patch: it begins with {magic!r} instead of {MAGIC!r}"
        )
    if format_version != FORMAT:
        raise CorruptPatchError(
            f"a weight patch in format {format_version}; this emberl reads format {FORMAT}"
        )
    directory = file[start : start + size].tobytes()
    if CRC.pack(zlib.crc32(directory, zlib.crc32(header))) != file[HEADER.size : start].tobytes():
        raise CorruptPatchError(
            "the header or the directory of a weight patch is damaged or cut short"
        )
    if len(file) != start + size + body:
        raise CorruptPatchError(
            f"weight patch {version} has {len(file)} bytes instead of {start + size + body}"
        )
    try:
        run_id, deltas, digests = _read_directory(directory, file[start + size :])
    except ValueError as error:  # its CRC is right, so it was written wrong, not damaged
        raise CorruptPatchError(
            f"the directory of weight patch {version} makes no sense: {error}"
        ) from error
    anchor = base_version < 0
    patch = WeightPatch(
        run_id=run_id,
        version=version,
        base_version=None if anchor else base_version,
        base_root=None if anchor or base_root == NO_ROOT else base_root.hex(),
        tensors={},
        deltas=deltas,
        digests=digests,
    )
    if patch.root != root.hex():
        raise CorruptPatchError(
            f"the digests of weight patch {version} do not have the root {root.hex()}"
        )
    return patch


def _whole(name: str, tensor: TensorBytes) -> TensorDelta:
    """A tensor as raw chunks that are views of it."""
    width, data = element_bytes(name, tensor.dtype), tensor.data.reshape(-1)
    parts = [data[start : start + CHUNK_BYTES] for start in range(0, data.nbytes, CHUNK_BYTES)]
    chunks = tuple(
        Chunk(mode=Mode.RAW, count=part.nbytes // width, payload=part, crc=zlib.crc32(part.data))
        for part in parts
    )
    return TensorDelta(dtype=tensor.dtype, shape=tuple(tensor.shape), chunks=chunks)


def _write_directory(
    patch: WeightPatch, names: list[str], deltas: Mapping[str, TensorDelta], chunks: list[Chunk]
) -> bytes:
    out = bytearray()
    _put_string(out, patch.run_id.encode())
    _put_varint(out, len(names))
    previous = b""
    for name in names:
        encoded = name.encode()
        first = _common(previous, encoded)
        last = _common(previous[first:][::-1], encoded[first:][::-1])
        _put_varint(out, first)
        _put_varint(out, last)
        _put_string(out, encoded[first : len(encoded) - last])
        previous = encoded
        delta = deltas.get(name)
        if delta is None:
            out.append(KEPT)
            continue
        out.append(DTYPES.index(delta.dtype))
        _put_varint(out, len(delta.shape))
        for length in delta.shape:
            _put_varint(out, length)
        _put_varint(out, len(delta.chunks))
        for chunk in delta.chunks:
            out.append(chunk.mode)
            _put_varint(out, chunk.count)
            _put_varint(out, chunk.payload.nbytes)
    out += b"".join(bytes.fromhex(patch.digests[name]) for name in names)
    out += b"".join(CRC.pack(chunk.crc) for chunk in chunks)
    return bytes(out)


def _read_directory(
    directory: bytes, body: Bytes
) -> tuple[str, dict[str, TensorDelta], dict[str, str]]:
    """(run id, deltas, digests). Raises ValueError if it is not a valid directory."""
    reader = _Reader(directory)
    run_id = reader.string().decode()
    tensors: list[tuple[str, str, tuple[int, ...], list[tuple[Mode, int, int]]]] = []
    names: list[str] = []
    # names share their ends with the one before, so a small file could spell out very long ones
    previous, room = b"", NAMES * len(directory)
    for _ in range(reader.varint()):
        first, last, middle = reader.varint(), reader.varint(), reader.string()
        if first + last + len(middle) > LONGEST_NAME:
            raise ValueError(f"name {len(names)} is longer than {LONGEST_NAME} bytes")
        encoded = previous[:first] + middle + previous[len(previous) - last :]
        room -= len(encoded)
        if room < 0:
            raise ValueError("its names are longer than the names of weights can be")
        if first + last > len(previous) or (names and encoded <= previous):
            raise ValueError(f"name {len(names)}")
        names.append(encoded.decode())
        previous = encoded
        dtype = reader.byte()
        if dtype != KEPT:
            if dtype >= len(DTYPES):
                raise ValueError(f"dtype {dtype} of {names[-1]}")
            dimensions, width = reader.varint(), ELEMENT_BYTES[DTYPES[dtype]]
            if dimensions > DIMENSIONS:
                raise ValueError(f"{dimensions} dimensions of {names[-1]}")
            shape = tuple(reader.varint() for _ in range(dimensions))
            chunks = [
                (Mode(reader.byte()), reader.varint(), reader.varint())
                for _ in range(reader.varint())
            ]
            if any(count * width > CHUNK_BYTES for _, count, _ in chunks):
                raise ValueError(f"a chunk of {names[-1]} has more than {CHUNK_BYTES} bytes")
            if sum(count for _, count, _ in chunks) != math.prod(shape):
                raise ValueError(
                    f"chunks of {names[-1]} do not make its {math.prod(shape)} elements"
                )
            tensors.append((names[-1], DTYPES[dtype], shape, chunks))
    digests = {name: reader.take(16).hex() for name in names}
    deltas, end = {}, 0
    for name, kind, shape, entries in tensors:
        decoded = []
        for mode, count, size in entries:
            (crc,) = CRC.unpack(reader.take(CRC.size))
            decoded.append(Chunk(mode=mode, count=count, payload=body[end : end + size], crc=crc))
            end += size
        deltas[name] = TensorDelta(dtype=kind, shape=shape, chunks=tuple(decoded))
    if reader.at != len(directory) or end != len(body):
        raise ValueError(
            f"{len(directory) - reader.at} of its bytes and {len(body) - end} of the body are left"
            " over"
        )
    return run_id, deltas, digests


def _common(a: bytes, b: bytes) -> int:
    """The length of the longest common prefix."""
    return next(
        (i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b))
    )


def _put_varint(out: bytearray, value: int) -> None:
    while value >> 7:
        out.append(value & 127 | 128)
        value >>= 7
    out.append(value)


def _put_string(out: bytearray, text: bytes) -> None:
    _put_varint(out, len(text))
    out += text


class _Reader:
    """Reads one field after another. Raises ValueError beyond the end."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.at = 0

    def take(self, size: int) -> bytes:
        self.at += size
        if self.at > len(self.data):
            raise ValueError("it ends within a field")
        return self.data[self.at - size : self.at]

    def byte(self) -> int:
        return self.take(1)[0]

    def varint(self) -> int:
        value, shift, more = 0, 0, True
        while more:
            if shift > 63:
                raise ValueError("a number of more than ten bytes")
            byte = self.byte()
            more = byte >= 128
            value |= (byte & 127) << shift
            shift += 7
        return value

    def string(self) -> bytes:
        return self.take(self.varint())


__all__ = ["from_bytes", "pieces", "to_bytes"]
