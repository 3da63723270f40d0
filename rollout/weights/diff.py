"""Makes patches: in one process from whole tensors, or on the ranks of a learner, from each one's
own shard.

    patch = encode(base, tensors, run_id=run_id, version=8, threads=4)

    part = diff(snapshot, shards, threads=4)                          # on every rank
    patch = join([part0, part1], base, run_id=run_id, version=8)      # on the one with the base
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from .codec import CHUNK_BYTES, decode_chunk, encode_chunk, spread
from .patch import (
    Bytes,
    Chunk,
    DigestMismatchError,
    Mode,
    TensorBytes,
    TensorDelta,
    VersionError,
    WeightPatch,
    Weights,
    digest,
    element_bytes,
)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Shard:
    """Consecutive elements of a tensor in C order: a rank's part of one that is sharded by its
    first dimension."""

    dtype: str
    shape: tuple[int, ...]
    """Shape of the whole tensor."""
    start: int
    """Index of the first element in the whole tensor."""
    data: Bytes


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class TensorPart:
    """The change of a shard."""

    dtype: str
    shape: tuple[int, ...]
    """Shape of the whole tensor."""
    start: int
    chunks: tuple[Chunk, ...]
    digest: str
    """xxh3-128 of the shard's new bytes."""

    @property
    def count(self) -> int:
        return sum(chunk.count for chunk in self.chunks)


def encode(
    base: Weights | None,
    tensors: Mapping[str, TensorBytes],
    *,
    run_id: str,
    version: int,
    threads: int = 1,
) -> WeightPatch:
    """The patch that takes `base` to these tensors; without a base a compressed anchor
    (`dense_patch` makes one that is not compressed, much faster).

    The tensors must not change until the patch is sent: its raw chunks are views of them.

    Raises ValueError for names, dtypes or shapes that are not the base's, which only an anchor can
    change, and VersionError for a base of another run, or one that is not older.
    """
    shards = {
        name: Shard(dtype=tensor.dtype, shape=tensor.shape, start=0, data=tensor.data)
        for name, tensor in tensors.items()
    }
    old = None if base is None else {name: tensor.data for name, tensor in base.tensors.items()}
    return join([diff(old, shards, threads=threads)], base, run_id=run_id, version=version)


def diff(
    old: Mapping[str, Bytes] | None, new: Mapping[str, Shard], *, threads: int = 1
) -> dict[str, TensorPart]:
    """name -> the change of each shard from its bytes in `old` (None: zeros). Raises ValueError if
    their sizes differ."""
    widths = {name: element_bytes(name, shard.dtype) for name, shard in new.items()}
    after = {name: shard.data.reshape(-1) for name, shard in new.items()}
    before: dict[str, Bytes] = (
        {} if old is None else {name: data.reshape(-1) for name, data in old.items()}
    )
    for name, data in after.items():
        size = before[name].nbytes if name in before else None
        if data.nbytes % widths[name] or (old is not None and size != data.nbytes):
            raise ValueError(
                f"{name}: {data.nbytes} bytes of {new[name].dtype} cannot follow {size} bytes"
            )

    def encode_at(place: tuple[str, int]) -> Chunk:
        name, start = place
        part = slice(start, start + CHUNK_BYTES)
        return encode_chunk(before[name][part] if before else None, after[name][part], widths[name])

    places = [
        (name, start)
        for name, data in after.items()
        for start in range(0, data.nbytes, CHUNK_BYTES)
    ]
    chunks: dict[str, list[Chunk]] = {name: [] for name in new}
    for (name, _), chunk in zip(places, spread(encode_at, places, threads), strict=True):
        chunks[name].append(chunk)
    digests = dict(zip(after, spread(digest, list(after.values()), threads), strict=True))
    return {
        name: TensorPart(
            dtype=shard.dtype,
            shape=tuple(shard.shape),
            start=shard.start,
            chunks=tuple(chunks[name]),
            digest=digests[name],
        )
        for name, shard in new.items()
    }


def join(
    parts: Iterable[Mapping[str, TensorPart]], base: Weights | None, *, run_id: str, version: int
) -> WeightPatch:
    """The patch made of the ranks' parts, in any order. A tensor of several parts is decoded here
    to take its digest, and each part's own digest is verified.

    Raises ValueError for parts that leave an element out or have it twice, or that are not of the
    base's tensors, VersionError as `encode`, and DigestMismatchError if a rank's part was not made
    against this base.
    """
    if base is not None and (base.run_id != run_id or base.version >= version):
        raise VersionError(
            f"version {version} of run {run_id} cannot follow {base.version} of run {base.run_id}"
        )
    by_name: dict[str, list[TensorPart]] = {}
    for part in parts:
        for name, piece in part.items():
            by_name.setdefault(name, []).append(piece)
    if base is not None and by_name.keys() != base.tensors.keys():
        strays = ", ".join(sorted(by_name.keys() ^ base.tensors.keys()))
        raise ValueError(
            f"not in both version {base.version} and {version}: {strays}; only an anchor can say"
            " that"
        )
    deltas, digests = {}, {}
    for name in sorted(by_name):
        pieces = sorted(
            (piece for piece in by_name[name] if piece.count), key=lambda piece: piece.start
        )
        pieces = pieces or by_name[name][:1]  # an empty tensor has parts without elements only
        held = None if base is None else base.tensors[name]
        _check_pieces(name, pieces, held)
        digests[name] = pieces[0].digest if len(pieces) == 1 else _joint_digest(name, pieces, held)
        chunks = tuple(chunk for piece in pieces for chunk in piece.chunks)
        if base is None or any(chunk.mode is not Mode.SKIP for chunk in chunks):
            deltas[name] = TensorDelta(dtype=pieces[0].dtype, shape=pieces[0].shape, chunks=chunks)
    return WeightPatch(
        run_id=run_id,
        version=version,
        base_version=None if base is None else base.version,
        base_root=None if base is None else base.root,
        tensors={},
        deltas=deltas,
        digests=digests,
    )


def _check_pieces(name: str, pieces: Sequence[TensorPart], held: TensorBytes | None) -> None:
    kinds = {(piece.dtype, piece.shape) for piece in pieces}
    if held is not None:
        kinds.add((held.dtype, tuple(held.shape)))
    if len(kinds) > 1:
        raise ValueError(
            f"{name} is {' and '.join(f'{dtype} {shape}' for dtype, shape in sorted(kinds))} at"
            " once"
        )
    edge = 0
    for piece in pieces:
        if piece.start != edge:
            raise ValueError(
                f"{name}: a part begins at element {piece.start} where {edge} is the next"
            )
        edge += piece.count
    if edge != math.prod(pieces[0].shape):
        raise ValueError(f"{name}: the parts end at element {edge} of {math.prod(pieces[0].shape)}")


def _joint_digest(name: str, pieces: Sequence[TensorPart], held: TensorBytes | None) -> str:
    width = element_bytes(name, pieces[0].dtype)
    whole = np.empty(math.prod(pieces[0].shape) * width, np.uint8)
    for piece in pieces:
        start = stop = piece.start * width
        for chunk in piece.chunks:
            part = slice(stop, stop + chunk.count * width)
            decode_chunk(
                chunk, None if held is None else held.data.reshape(-1)[part], whole[part], width
            )
            stop = part.stop
        if digest(whole[start:stop]) != piece.digest:
            raise DigestMismatchError(
                f"tensor {name}: the part from element {piece.start} was made against other weights"
                " than the base"
            )
    return digest(whole)


__all__ = ["Shard", "TensorPart", "diff", "encode", "join"]
