"""The noun `WeightPatch`: the step from the weights of one version to those of the next, with
digests.

Canonical space is Hugging Face's: its parameter names and shapes, in the exact bytes that an engine
serves. Every patch carries the digest of each tensor *after* applying it, so an engine can prove
that it serves what the learners hold. An **anchor** carries every tensor and needs no base; any
other patch changes the weights of its base version. Tensors come whole (`tensors`) or as their
changes (`deltas`).

`codec` codes deltas, `diff` makes patches from weights, `apply` makes weights from patches, and
`wire_format` is a patch as bytes. Engines take whole tensors, which `apply.materialise` makes, and
most also take positions and values (`TensorChange`), which `apply.resolve` makes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from enum import IntEnum

import numpy as np
import xxhash
from numpy.typing import NDArray

from .dtypes import ELEMENT_BYTES
from .engine_transfer import EngineTransfer

Bytes = NDArray[np.uint8]


class DigestMismatchError(RuntimeError):
    """An engine holds bytes that are not those of the version it was told to serve."""


class RefusedError(DigestMismatchError):
    """An element in an engine's memory is not the one for which a change was made; nothing was
    written."""


class MovedError(RuntimeError):
    """A tensor of an engine has another address than decoding reads, so updates do not reach it."""


class VersionError(RuntimeError):
    """A patch of another run, or one that does not fit the version the engine serves."""


class VersionGap(VersionError):
    """A patch whose base is not held here: an anchor, or the patches in between, must come
    first."""


class CorruptPatchError(RuntimeError):
    """A patch that is not what was sent: truncated, or with other bits."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class TensorBytes:
    """One tensor in canonical space: `data` is its C-order little-endian bytes."""

    dtype: str
    """safetensors' name, e.g. `BF16`, `F32`, `F16`, `F64`."""
    shape: tuple[int, ...]
    data: Bytes


class Mode(IntEnum):
    """The coding of a chunk's payload."""

    SKIP = 0
    """No payload: nothing changed."""
    SPARSE = 1
    """Positions and sizes of the changes."""
    DENSE = 2
    """Every element's difference, compressed."""
    RAW = 3
    """The new bytes."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Chunk:
    """The change of `count` consecutive elements of a tensor."""

    mode: Mode
    count: int
    payload: Bytes
    crc: int
    """CRC-32 of the payload."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class TensorDelta:
    """The change of one tensor: consecutive chunks from its first element to its last."""

    dtype: str
    shape: tuple[int, ...]
    chunks: tuple[Chunk, ...]

    @property
    def num_bytes(self) -> int:
        return sum(chunk.payload.nbytes for chunk in self.chunks)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class TensorChange:
    """The change of one tensor as positions and values, to be written in place after
    `changes.check`."""

    dtype: str
    shape: tuple[int, ...]
    positions: NDArray[np.integer]
    """[k] int32, or int64 for a tensor of 2^31 elements and more: ascending indices in C order."""
    old: NDArray[np.unsignedinteger]
    """[k] bits of the elements before, as unsigned integers of their width."""
    new: NDArray[np.unsignedinteger]
    """[k] bits of the elements after."""
    checksum: int
    """The change's contribution to the tensor's checksum (`kernels.patch_coding.scatter`), as a
    signed 64-bit number."""

    @property
    def num_bytes(self) -> int:
        return self.positions.nbytes + self.old.nbytes + self.new.nbytes


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Transfer:
    """The data that one engine needs to receive a version in its own processes."""

    version: EngineTransfer
    rank: int
    """Rank in the group of the engine's first process; the others follow it."""
    fallback: Callable[[], Mapping[str, TensorBytes]]
    """Fetches the tensors another way; blocks, so it must be called in a thread."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class WeightPatch:
    """Takes an engine from `base_version` to `version`; an anchor (`base_version` None) does so
    from any version."""

    run_id: str
    version: int
    tensors: Mapping[str, TensorBytes]
    """Tensors that come whole."""
    digests: Mapping[str, str]
    """name -> xxh3-128 of the tensor's bytes after applying, for *every* tensor that the engine
    serves."""
    base_version: int | None = None
    base_root: str | None = None
    """The root digest of the base: versions of one number may differ after a learner's restart."""
    deltas: Mapping[str, TensorDelta] = field(default_factory=dict)
    """Tensors that come as changes of the base (of zeros, in an anchor). Tensors that come in
    neither way stay unchanged."""
    changes: Mapping[str, TensorChange] = field(default_factory=dict)
    """Tensors that come as positions and values, within one machine."""
    transfer: Transfer | None = None
    """If not None, all tensors are broadcast into an engine's own processes, and none are here."""
    verified: bool = False
    """Whether the result was compared with `digests`, so that an engine need not do so again before
    it loads anything."""

    @property
    def num_bytes(self) -> int:
        return sum(tensor.data.nbytes for tensor in self.tensors.values()) + sum(
            delta.num_bytes for delta in self.deltas.values()
        )

    @property
    def root(self) -> str:
        return root_digest(self.digests)

    def of(self, names: Collection[str]) -> WeightPatch:
        """A copy with the digests of these tensors alone, for `verify`."""
        return replace(self, digests={name: self.digests[name] for name in names})


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Weights:
    """All tensors of one version, with verified digests. Nobody writes to them any more, except an
    engine to those that it serves."""

    run_id: str
    version: int
    tensors: Mapping[str, TensorBytes]
    digests: Mapping[str, str]

    @property
    def root(self) -> str:
        return root_digest(self.digests)


class Views(Mapping[str, TensorBytes]):
    """A mapping of tensors that are read on access."""

    def __init__(self, names: Collection[str], read: Callable[[str], TensorBytes]) -> None:
        self._names = names
        self._read = read

    def __getitem__(self, name: str) -> TensorBytes:
        if name not in self._names:
            raise KeyError(name)
        return self._read(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def digest(data: Bytes) -> str:
    """xxh3-128 of a tensor's bytes, as hexadecimal digits."""
    return xxhash.xxh3_128_hexdigest(data.data)


def check_size(name: str, tensor: TensorBytes) -> None:
    """Raises ValueError if a tensor's data has not the bytes of its dtype and shape."""
    size = math.prod(tensor.shape) * element_bytes(name, tensor.dtype)
    if tensor.data.dtype != np.uint8:
        raise ValueError(f"{name}: its data must be bytes (uint8), got {tensor.data.dtype}")
    if tensor.data.nbytes != size:
        raise ValueError(
            f"{name}: {tensor.dtype} {tensor.shape} is {size} bytes, got {tensor.data.nbytes}"
        )


def check_names(patch: WeightPatch, names: Collection[str]) -> None:
    """Checks a patch for an engine with these tensors. Raises DigestMismatchError if it is of other
    tensors, and ValueError if it has one twice, each with a name."""
    if twice := sorted(patch.tensors.keys() & patch.changes.keys()):
        raise ValueError(
            f"{twice[0]} comes twice in patch {patch.version}: whole, and as what changes in it"
        )
    here = dict.fromkeys(names, "a tensor")
    verify(here, replace(patch, digests=dict.fromkeys(patch.digests, "a tensor")))


def check_base(patch: WeightPatch, root: str | None) -> None:
    """Raises VersionError if the patch's base is not the weights of this root digest (None:
    unknown)."""
    if None not in (root, patch.base_version, patch.base_root) and root != patch.base_root:
        raise VersionError(
            f"patch {patch.version} builds on another version {patch.base_version} than the one"
            " that is served"
        )


def root_digest(digests: Mapping[str, str]) -> str:
    """One digest over all tensors, independent of their order."""
    lines = "\n".join(f"{name} {digests[name]}" for name in sorted(digests))
    return xxhash.xxh3_128_hexdigest(lines.encode())


def element_bytes(name: str, dtype: str) -> int:
    """Bytes of an element of the tensor `name`. Raises ValueError for a dtype that is not in
    `ELEMENT_BYTES`."""
    if dtype not in ELEMENT_BYTES:
        raise ValueError(
            f"{name}: dtype {dtype} cannot be patched, only {', '.join(ELEMENT_BYTES)} can"
        )
    return ELEMENT_BYTES[dtype]


def dense_patch(
    run_id: str, version: int, tensors: Iterable[tuple[str, TensorBytes]]
) -> WeightPatch:
    """The anchor that carries these tensors whole."""
    by_name = dict(tensors)
    digests = {name: digest(tensor.data) for name, tensor in by_name.items()}
    return WeightPatch(run_id=run_id, version=version, tensors=by_name, digests=digests)


def is_next(patch: WeightPatch, run_id: str, version: int, *, served: bool) -> bool:
    """Whether an engine at this version has to load the patch. Raises VersionError if it does not
    fit.

    run_id: that of the engine's run; "": any. served: whether the engine's version is intact.
    """
    if run_id and patch.run_id != run_id:
        raise VersionError(f"a patch of run {patch.run_id}, but this engine serves run {run_id}")
    if patch.version < version:
        raise VersionError(f"version goes backwards: {patch.version} after {version}")
    if patch.version == version and served:
        return False
    if patch.base_version not in (None, version):
        raise VersionError(
            f"patch {patch.version} builds on {patch.base_version}, the engine serves {version}"
        )
    return True


def verify(held: Mapping[str, str], patch: WeightPatch) -> None:
    """Raises `DigestMismatchError` naming the first tensor whose held digest is not the patch's."""
    for name in sorted(set(held) | set(patch.digests)):
        if held.get(name) != patch.digests.get(name):
            raise DigestMismatchError(
                f"tensor {name} of version {patch.version}: the engine holds"
                f" {held.get(name, 'nothing')}, the learners hold"
                f" {patch.digests.get(name, 'nothing')}"
            )
