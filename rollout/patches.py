"""The noun `WeightPatch`: how the weights of one version become those of the next, with proof.

Canonical space is Hugging Face's: its parameter names and shapes, in the exact bytes that an engine serves. Every patch
carries the digest of each tensor *after* applying it, so an engine can prove that what it serves is what the learners
hold. Here a patch is dense: it carries every tensor whole.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import xxhash
from numpy.typing import NDArray

Bytes = NDArray[np.uint8]


class DigestMismatchError(RuntimeError):
    """An engine holds bytes that are not those of the version it was told to serve."""


class VersionError(RuntimeError):
    """A patch of another run, or one that does not fit the version the engine serves."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class TensorBytes:
    """One tensor in canonical space: `data` is its C-order little-endian bytes."""

    dtype: str
    """As safetensors spells it: `BF16`, `F32`, `F16`, `F64`."""
    shape: tuple[int, ...]
    data: Bytes


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class WeightPatch:
    """Takes an engine to `version`. A dense patch fits whatever the engine served before (`base_version` None)."""

    run_id: str
    version: int
    tensors: Mapping[str, TensorBytes]
    digests: Mapping[str, str]
    """name -> xxh3-128 of the tensor's bytes after applying, for *every* tensor that the engine serves."""
    base_version: int | None = None

    @property
    def num_bytes(self) -> int:
        return sum(tensor.data.nbytes for tensor in self.tensors.values())

    @property
    def root(self) -> str:
        return root_digest(self.digests)


def digest(data: Bytes) -> str:
    """xxh3-128 of a tensor's bytes, as hexadecimal digits."""
    return xxhash.xxh3_128_hexdigest(data.data)


def root_digest(digests: Mapping[str, str]) -> str:
    """One digest over all tensors, independent of their order."""
    lines = "\n".join(f"{name} {digests[name]}" for name in sorted(digests))
    return xxhash.xxh3_128_hexdigest(lines.encode())


def dense_patch(run_id: str, version: int, tensors: Iterable[tuple[str, TensorBytes]]) -> WeightPatch:
    """The patch that carries these tensors whole."""
    by_name = dict(tensors)
    digests = {name: digest(tensor.data) for name, tensor in by_name.items()}
    return WeightPatch(run_id=run_id, version=version, tensors=by_name, digests=digests)


def verify(held: Mapping[str, str], patch: WeightPatch) -> None:
    """Raises `DigestMismatchError` naming the first tensor whose held digest is not the patch's."""
    for name in sorted(set(held) | set(patch.digests)):
        if held.get(name) != patch.digests.get(name):
            raise DigestMismatchError(
                f"tensor {name} of version {patch.version}: the engine holds {held.get(name, 'nothing')}, "
                f"the learners hold {patch.digests.get(name, 'nothing')}"
            )
