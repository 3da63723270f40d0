"""How a patch's bytes reach the engines: what the learners announce, and the places where the bytes
can be had.

    ref = store.put(version, base_version, pieces)     # the learners' side: `ObjectStore` or
    `Directory` data = place.fetch(link)                               # an engine's side; place is
    one of the ref's

Nothing here is trusted: what is fetched is verified by `patch_format` and `patch_apply`.
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
    """The bytes of a patch could not be had from a place within the deadline."""


class TokenBucket:
    """Lets `rate` bytes a second through, and `burst` at once: a weak link for tests."""

    def __init__(self, rate: float, burst: float = 1 << 16) -> None:
        self.rate = rate
        self.burst = burst
        self._tokens = burst
        self._at = time.monotonic()

    def take(self, size: int) -> None:
        """Returns when the link would have carried them."""
        now = time.monotonic()
        self._tokens = min(self.burst, self._tokens + (now - self._at) * self.rate) - size
        self._at = now
        if self._tokens < 0:
            time.sleep(-self._tokens / self.rate)


@dataclass(kw_only=True, slots=True, eq=False)
class FetchContext:
    """An engine's end of the way to the learners."""

    timeout: float
    """Seconds for one patch."""
    bucket: TokenBucket | None = None


class PatchSource(Protocol):
    """Where the bytes of one patch can be had."""

    def fetch(self, link: FetchContext) -> Bytes:
        """All of them; `TransferError` if they do not come within the link's deadline."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class ObjectStoreSource:
    """Ray's object store: of what several engines of a node fetch, the node gets one copy."""

    reference: Any

    def fetch(self, link: FetchContext) -> Bytes:
        try:
            data: Bytes = ray.get(self.reference, timeout=link.timeout)
        except ray.exceptions.RayError as error:  # lost with its node, or late: the same to us
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
    """One patch that can be had."""

    version: int
    base_version: int | None
    size: int
    """Bytes of the file."""
    places: tuple[PatchSource, ...]
    """To be tried in this order."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class WeightUpdate:
    """The announcement to every engine: the version that is to be served, and all patches that may
    lead there."""

    run_id: str
    attempt: int
    """Grows from one start of the learners to the next, which may begin at an older version: what
    is announced by an earlier one comes late."""
    version: int
    root: str
    patches: tuple[PatchRef, ...] = ()
    """Each builds on the one before it."""
    anchors: tuple[PatchRef, ...] = ()
    """To be tried in this order where the patches do not lead on from what is held."""
    engines: EngineTransfer | None = None
    """The learners send this version into the engines' own processes; what else is here is for who
    misses it."""

    def with_anchor(self, anchor: PatchRef) -> WeightUpdate:
        """The same with an anchor that is tried before the others."""
        return replace(self, anchors=(anchor, *self.anchors))

    def routes(self, held: int | None) -> Iterator[tuple[PatchRef, ...]]:
        """Ways from the version that is held (None: nothing) to the new one, in the order in which
        to try them."""
        direct = self._onward(held)
        if direct is not None:
            # what was damaged on its way may come through the second time
            yield from (direct, direct)
        for anchor in self.anchors:
            onward = self._onward(anchor.version)
            if onward is not None:
                yield (anchor, *onward)

    def _onward(self, version: int | None) -> tuple[PatchRef, ...] | None:
        """The patches that lead from there to the new version; None if they do not."""
        if version is None:
            return None
        found: list[PatchRef] = []
        for ref in self.patches:
            if ref.base_version == version:
                found.append(ref)
                version = ref.version
        return tuple(found) if version == self.version else None


class PatchStore(Protocol):
    """The learners' side of a transport."""

    def put(
        self, version: int, base_version: int | None, pieces: Iterable[bytes | memoryview]
    ) -> PatchRef: ...


class ObjectStore:
    """Ray's; an object lives as long as anybody holds its ref."""

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
        partial.rename(path)  # an engine sees all of it or nothing
        place = FileSource(path=str(path.absolute()))
        return PatchRef(version=version, base_version=base_version, size=size, places=(place,))

    def keep(self, refs: Iterable[PatchRef]) -> None:
        """Deletes every other patch."""
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
    found = [path for path in folder.glob("[0-9]*") if path.suffix in (".anchor", ".patch")]
    return sorted(found, key=lambda path: (path.name[:8], path.suffix))


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
