"""The transport of patches from the learners to the engines: stores, and announcements of what is
in them.

    ref = store.put(version, base_version, pieces)     # the learners: `ObjectStore`, `Directory`
    data = place.fetch(link)                           # an engine; place is one of ref.places

Nothing here is trusted: fetched bytes are verified by `wire_format` and `apply`.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import ray

from .engine_transfer import EngineTransfer
from .patch import Bytes

READ_BYTES = 1 << 20


class TransferError(RuntimeError):
    """The bytes of a patch could not be fetched from a source within the deadline."""


class TokenBucket:
    """Limits a transfer to `rate` bytes a second, with bursts of `burst` bytes: a slow link for
    tests."""

    def __init__(self, rate: float, burst: float = 1 << 16) -> None:
        self.rate = rate
        self.burst = burst
        self._tokens = burst
        self._at = time.monotonic()

    def take(self, size: int) -> None:
        """Sleeps until the link would have carried `size` bytes."""
        now = time.monotonic()
        self._tokens = min(self.burst, self._tokens + (now - self._at) * self.rate) - size
        self._at = now
        if self._tokens < 0:
            time.sleep(-self._tokens / self.rate)


@dataclass(kw_only=True, slots=True, eq=False)
class FetchContext:
    """The deadline and the rate limit of an engine's fetches."""

    timeout: float
    """Seconds for one patch."""
    bucket: TokenBucket | None = None


class PatchSource(Protocol):
    """A source of one patch's bytes."""

    def fetch(self, link: FetchContext) -> Bytes:
        """All bytes. Raises TransferError if they do not come within the link's deadline."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class ObjectStoreSource:
    """An object in Ray's object store, of which a node gets one copy for all its engines."""

    reference: Any

    def fetch(self, link: FetchContext) -> Bytes:
        try:
            data: Bytes = ray.get(self.reference, timeout=link.timeout)
        except ray.exceptions.RayError as error:  # lost with its node, or late: all the same here
            raise TransferError(
                f"Ray's object store has not given it within {link.timeout:g} s: {error}"
            ) from error
        if link.bucket is not None:
            link.bucket.take(data.nbytes)
        return data


@dataclass(frozen=True, kw_only=True, slots=True)
class FileSource:
    """A file that the learners and the engines both see."""

    path: str

    def fetch(self, link: FetchContext) -> Bytes:
        deadline = time.monotonic() + link.timeout
        try:
            with Path(self.path).open("rb") as file:
                data = np.empty(os.fstat(file.fileno()).st_size, np.uint8)
                for start in range(0, len(data), READ_BYTES):
                    part = data[start : start + READ_BYTES]
                    if file.readinto(part.data) != part.nbytes:
                        raise TransferError(f"{self.path} became shorter while it was read")
                    if link.bucket is not None:
                        link.bucket.take(part.nbytes)
                    if time.monotonic() > deadline:
                        raise TransferError(
                            f"{self.path} could not be read within {link.timeout:g} s"
                        )
        except OSError as error:
            raise TransferError(f"{self.path} cannot be read: {error.strerror}") from error
        return data


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class PatchRef:
    """A published patch, and the sources from which it can be fetched."""

    version: int
    base_version: int | None
    size: int
    """Bytes of the patch."""
    places: tuple[PatchSource, ...]
    """Sources, to be tried in this order."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class WeightUpdate:
    """The announcement to every engine: the version to be served, and all patches that may lead
    there."""

    run_id: str
    attempt: int
    """Number of the learners' start, which grows. A start may begin at an older version, so
    announcements of earlier ones are ignored."""
    version: int
    root: str
    patches: tuple[PatchRef, ...] = ()
    """A chain: each builds on the one before it."""
    anchors: tuple[PatchRef, ...] = ()
    """Anchors, to be tried in this order if the patches do not lead on from the held version."""
    engines: EngineTransfer | None = None
    """If not None, the learners broadcast this version into the engines' own processes; patches and
    anchors are for those that miss it."""

    def with_anchor(self, anchor: PatchRef) -> WeightUpdate:
        """A copy with an anchor that is tried before the others."""
        return replace(self, anchors=(anchor, *self.anchors))

    def routes(self, held: int | None) -> Iterator[tuple[PatchRef, ...]]:
        """Yields chains of patches from the held version (None: nothing) to the new one, in the
        order in which to try them."""
        direct = self._onward(held)
        if direct is not None:
            # twice: bytes that were damaged on the way may arrive intact the second time
            yield from (direct, direct)
        for anchor in self.anchors:
            onward = self._onward(anchor.version)
            if onward is not None:
                yield (anchor, *onward)

    def _onward(self, version: int | None) -> tuple[PatchRef, ...] | None:
        """The patches that lead from `version` to the new one; None if they do not."""
        if version is None:
            return None
        onward: list[PatchRef] = []
        for ref in self.patches:
            if ref.base_version == version:
                onward.append(ref)
                version = ref.version
        return tuple(onward) if version == self.version else None


class PatchStore(Protocol):
    """The learners' side of a transport."""

    def put(
        self, version: int, base_version: int | None, pieces: Iterable[bytes | memoryview]
    ) -> PatchRef: ...


class ObjectStore:
    """Ray's object store; a patch lives as long as anybody holds its ref."""

    def put(
        self, version: int, base_version: int | None, pieces: Iterable[bytes | memoryview]
    ) -> PatchRef:
        data = np.frombuffer(b"".join(pieces), np.uint8)
        place = ObjectStoreSource(reference=ray.put(data))
        return PatchRef(
            version=version, base_version=base_version, size=data.nbytes, places=(place,)
        )


class Directory:
    """Files in a directory that learners and engines share. `base_version` is in their names, so a
    person sees the chain: `00000012.anchor`, `00000013-from-00000012.patch`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def put(
        self, version: int, base_version: int | None, pieces: Iterable[bytes | memoryview]
    ) -> PatchRef:
        self.folder.mkdir(parents=True, exist_ok=True)
        name = (
            f"{version:08}.anchor"
            if base_version is None
            else f"{version:08}-from-{base_version:08}.patch"
        )
        path, partial, size = self.folder / name, self.folder / f".{name}.{os.getpid()}", 0
        with partial.open("wb") as file:
            for piece in pieces:
                size += file.write(piece)
        partial.rename(path)  # atomic: an engine sees the whole file or none
        place = FileSource(path=str(path.absolute()))
        return PatchRef(version=version, base_version=base_version, size=size, places=(place,))

    def keep(self, refs: Iterable[PatchRef]) -> None:
        """Deletes all patches but these."""
        wanted = {
            Path(place.path).name
            for ref in refs
            for place in ref.places
            if isinstance(place, FileSource)
        }
        for path in list_patches(self.folder):
            if path.name not in wanted:
                path.unlink(missing_ok=True)


def list_patches(folder: Path) -> list[Path]:
    """The files that `Directory` wrote, by version, an anchor before a patch of the same
    version."""
    paths = [path for path in folder.glob("[0-9]*") if path.suffix in (".anchor", ".patch")]
    return sorted(paths, key=lambda path: (path.name[:8], path.suffix))


__all__ = [
    "Directory",
    "FileSource",
    "ObjectStoreSource",
    "FetchContext",
    "WeightUpdate",
    "ObjectStore",
    "PatchStore",
    "PatchRef",
    "PatchSource",
    "TokenBucket",
    "TransferError",
    "list_patches",
]
