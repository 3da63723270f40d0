"""The mirror: every tensor that an engine serves, as canonical bytes in memory shared with its
processes.

An engine that packs or shards its weights cannot return their original bytes. So these are kept
here under their Hugging Face names; a patch is applied and verified here, and each of the engine's
processes loads from here and answers with the digest of what it read. The memory has no name in a
file system (except for engines on other machines): nothing is left behind, however a process ends,
and a small /dev/shm does not limit it.
"""

from __future__ import annotations

import json
import math
import mmap
import os
import tempfile
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from ..weights.changes import between, check, patched
from ..weights.dtypes import ELEMENT_BYTES
from ..weights.engine_transfer import Layout
from ..weights.patch import (
    Bytes,
    TensorBytes,
    TensorChange,
    WeightPatch,
    check_names,
    check_size,
    digest,
    verify,
)
from ..weights.tensors import checkpoint_tensors, dtype_name

ALIGNMENT = 64
"""Bytes to which a tensor's start is aligned; enough for any processor's loads."""


class Entry(NamedTuple):
    """The place and layout of one tensor in the shared memory."""

    dtype: str
    """safetensors' name."""
    shape: tuple[int, ...]
    start: int
    size: int
    """Bytes."""


class SharedFile:
    """Memory that other processes of this user can open by its path."""

    def __init__(self, name: str, directory: str | None) -> None:
        """directory: holds it as a file, for other machines; None: anonymous memory, for processes
        on this machine."""
        self._file: str | None = None
        if directory is None:
            self.descriptor = os.memfd_create(name, os.MFD_CLOEXEC)
        else:
            Path(directory).mkdir(parents=True, exist_ok=True)
            descriptor, file = tempfile.mkstemp(prefix=f"{name}-", dir=directory)
            self.descriptor = descriptor
            self._file = file

    @property
    def path(self) -> str:
        return self._file or f"/proc/{os.getpid()}/fd/{self.descriptor}"

    def close(self) -> None:
        """Frees the memory once no other process maps it. Idempotent."""
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1
            if self._file is not None:
                os.unlink(self._file)


class Mirror:
    """The tensors of an engine in shared memory. It is empty until the first write, which must have
    every tensor and fixes the names and shapes of all later ones."""

    def __init__(self, dtype: str, directory: str | None = None) -> None:
        """dtype: that of all tensors, by safetensors' name. directory: holds the mirror as a file
        for the engine's processes; None: they run on this machine, under the same user."""
        self.dtype = dtype
        self._shared = SharedFile("emberl-mirror", directory)
        self._memory: mmap.mmap | None = None
        self.entries: dict[str, Entry] = {}

    @property
    def path(self) -> str:
        """The path by which another process of this user opens it."""
        return self._shared.path

    @property
    def num_bytes(self) -> int:
        return sum(entry.size for entry in self.entries.values())

    def check(self, patch: WeightPatch) -> None:
        """Checks a patch before a byte changes. Raises ValueError for a tensor that is not of this
        model or has another dtype or shape, and DigestMismatchError if applying it would not give
        the patch's digests."""
        self.expect(
            {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in patch.tensors.items()}
        )
        for name, change in patch.changes.items():
            self.expect({name: (change.dtype, tuple(change.shape))})
            check(name, change, change.dtype, change.shape)
        for name, tensor in patch.tensors.items():
            check_size(name, tensor)
        check_names(patch, self.entries or patch.tensors)
        if patch.verified:
            return
        arrived = {name: digest(tensor.data) for name, tensor in patch.tensors.items()} | {
            name: digest(patched(self.tensor(name), change).data)
            for name, change in patch.changes.items()
        }
        kept = {
            name: digest(self._bytes(entry))
            for name, entry in self.entries.items()
            if name not in arrived
        }
        verify(arrived | kept, patch)

    def expect(self, tensors: Layout) -> None:
        """Raises ValueError for a tensor that is not of this model, or of another dtype or
        shape."""
        for name, (dtype, shape) in tensors.items():
            if self.entries and name not in self.entries:
                raise ValueError(f"{name} is not a tensor of this model")
            wanted = self.entries[name].shape if self.entries else shape
            if (dtype, shape) != (self.dtype, wanted):
                raise ValueError(
                    f"{name}: got {dtype} {shape}, the engine serves {self.dtype} {wanted}"
                )

    def write(self, tensors: Mapping[str, TensorBytes]) -> None:
        """Overwrites these tensors. The engine's processes must not be reading."""
        self.lay_out(
            {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
        )
        for name, tensor in tensors.items():
            self._bytes(self.entries[name])[:] = tensor.data.reshape(-1)

    def write_changes(self, changes: Mapping[str, TensorChange]) -> None:
        """Writes the new elements, without a look at the old ones. Idempotent."""
        for name, change in changes.items():
            elements = self._bytes(self.entries[name]).view(change.new.dtype)
            elements[change.positions] = change.new

    def as_changes(self, tensors: Mapping[str, TensorBytes]) -> dict[str, TensorChange]:
        """name -> the elements in which a tensor differs from the stored one."""
        return {name: between(self.tensor(name), tensor) for name, tensor in tensors.items()}

    def listed(self, names: Collection[str] | None = None) -> list[list[Any]]:
        """[name, dtype, shape, start, size] of these tensors, or of all, for other processes."""
        return [[name, *self.entries[name]] for name in (self.entries if names is None else names)]

    def lay_out(self, tensors: Layout) -> None:
        """Allocates memory for these tensors; does nothing once that is done."""
        if self.entries or not tensors:
            return
        position = 0
        for name, (dtype, shape) in tensors.items():
            size = math.prod(shape) * ELEMENT_BYTES[dtype]
            self.entries[name] = Entry(dtype, shape, position, size)
            position += -(-size // ALIGNMENT) * ALIGNMENT
        os.ftruncate(self._shared.descriptor, position)
        self._memory = mmap.mmap(self._shared.descriptor, position)

    def tensor(self, name: str) -> TensorBytes:
        """A view of one tensor's bytes."""
        entry = self.entries[name]
        return TensorBytes(dtype=entry.dtype, shape=entry.shape, data=self._bytes(entry))

    def digests(self) -> dict[str, str]:
        """name -> xxh3-128 of the current bytes."""
        return {name: digest(self._bytes(entry)) for name, entry in self.entries.items()}

    def close(self) -> None:
        """Frees the memory once no other process maps it. Idempotent."""
        # not `self._memory.close()`, which fails while there are views: it is freed with the last
        self._memory = None
        self.entries = {}
        self._shared.close()

    def _bytes(self, entry: Entry) -> Bytes:
        assert self._memory is not None, "the mirror holds nothing yet"
        return np.frombuffer(self._memory, np.uint8, entry.size, entry.start)


def read_mirror(
    path: str, entries: Iterable[tuple[str, Entry]], *, copied: bool = True
) -> Iterator[tuple[str, TensorBytes]]:
    """Yields the tensors of another process's mirror one by one: copies, which share nothing with
    the mirror, or if not `copied` views, which must not be kept."""
    with open(path, "rb") as file:
        # copy-on-write, though nothing is written: torch wants writable arrays
        memory = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    for name, entry in entries:
        data = np.frombuffer(memory, np.uint8, entry.size, entry.start)
        data = data.copy() if copied else data
        yield name, TensorBytes(dtype=entry.dtype, shape=tuple(entry.shape), data=data)


def write_mirror(path: str, entry: Entry, data: Bytes) -> None:
    """Writes one tensor into another process's mirror."""
    with open(path, "r+b") as file:
        file.seek(entry.start)
        file.write(data.data)


class SharedChanges:
    """The changes of one update, in memory that an engine's processes read."""

    def __init__(self, changes: Mapping[str, TensorChange], directory: str | None = None) -> None:
        """directory: as of `Mirror`."""
        self._memory = SharedFile("emberl-changes", directory)
        self.entries: list[list[Any]] = []
        """[name, dtype, shape, changes, width of a position, checksum, start] of each."""
        position = 0
        with open(self._memory.descriptor, "wb", closefd=False) as file:
            for name, change in changes.items():
                width = change.positions.itemsize
                shape, count = list(change.shape), len(change.positions)
                self.entries.append(
                    [name, change.dtype, shape, count, width, change.checksum, position]
                )
                for values in (change.positions, change.old, change.new):
                    position += file.write(values.data)
                position += file.write(bytes(-position % ALIGNMENT))

    @property
    def path(self) -> str:
        return self._memory.path

    def close(self) -> None:
        self._memory.close()


def read_changes(path: str, entries: Iterable[Sequence[Any]]) -> dict[str, TensorChange]:
    """The changes that another process shares, as views."""
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        memory = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if size else b""
    changes = {}
    for name, dtype, shape, count, width, checksum, start in entries:
        positions = np.frombuffer(memory, f"<i{width}", count, start)
        start += positions.nbytes
        kind = np.dtype(f"<u{ELEMENT_BYTES[dtype]}")
        old = np.frombuffer(memory, kind, count, start)
        new = np.frombuffer(memory, kind, count, start + old.nbytes)
        changes[str(name)] = TensorChange(
            dtype=dtype,
            shape=tuple(shape),
            positions=positions,
            old=old,
            new=new,
            checksum=checksum,
        )
    return changes


def copied(tensor: TensorBytes) -> TensorBytes:
    return TensorBytes(dtype=tensor.dtype, shape=tensor.shape, data=tensor.data.copy())


def checkpoint_bytes(path: Path, dtype: str) -> dict[str, TensorBytes]:
    """The tensors of a Hugging Face directory, converted to `dtype` as an engine does; without the
    head if it is tied to the embedding."""
    tied = json.loads((path / "config.json").read_text()).get("tie_word_embeddings", False)
    kind: torch.dtype = getattr(torch, dtype)
    tensors = {}
    for name, tensor in checkpoint_tensors(path):
        if name != "lm_head.weight" or not tied:
            data = tensor.to(kind).contiguous().view(-1).view(torch.uint8).numpy()
            tensors[name] = TensorBytes(
                dtype=dtype_name(kind), shape=tuple(tensor.shape), data=data
            )
    return tensors
