"""How a patch's bytes reach the engines: what the learners announce, and the places where the bytes can be had.

    parcel = outbox.put(version, base_version, pieces)     # the learners' side: `ObjectStore` or `Directory`
    data = place.fetch(link)                               # an engine's side; place is one of the parcel's

Nothing here is trusted: what is fetched is verified by `patch_format` and `patch_apply`.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import ray

from .patch import Bytes

if TYPE_CHECKING:
    from ..vllm_backend.transfer import InEngines

READ_BYTES = 1 << 20


class TransferError(RuntimeError):
    """The bytes of a patch could not be had from a place within the deadline."""


class TokenBucket:
    """Lets `rate` bytes a second through, and `burst` at once: a weak link for tests."""

    def __init__(self, rate: float, burst: float = 1 << 16) -> None:
        self.rate, self.burst = rate, burst
        self._tokens, self._at = burst, time.monotonic()

    def take(self, size: int) -> None:
        """Returns when the link would have carried them."""
        now = time.monotonic()
        self._tokens = min(self.burst, self._tokens + (now - self._at) * self.rate) - size
        self._at = now
        if self._tokens < 0:
            time.sleep(-self._tokens / self.rate)


@dataclass(kw_only=True, slots=True, eq=False)
class Link:
    """An engine's end of the way to the learners."""

    timeout: float
    """Seconds for one patch."""
    bucket: TokenBucket | None = None
    memory: dict[str, Any] = field(default_factory=dict)
    """What a transport keeps from one patch to the next."""


class Place(Protocol):
    """Where the bytes of one patch can be had."""

    def fetch(self, link: Link) -> Bytes:
        """All of them; `TransferError` if they do not come within the link's deadline."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class InStore:
    """Ray's object store: of what several engines of a node fetch, the node gets one copy."""

    reference: Any

    def fetch(self, link: Link) -> Bytes:
        try:
            data: Bytes = ray.get(self.reference, timeout=link.timeout)
        except ray.exceptions.RayError as error:  # lost with its node, or late: the same to us
            raise TransferError(f"Ray's object store has not given it within {link.timeout:g} s: {error}") from error
        if link.bucket is not None:
            link.bucket.take(data.nbytes)
        return data


@dataclass(frozen=True, kw_only=True, slots=True)
class InFile:
    """A file that the learners and the engines both see."""

    path: str

    def fetch(self, link: Link) -> Bytes:
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
                        raise TransferError(f"{self.path} could not be read within {link.timeout:g} s")
        except OSError as error:
            raise TransferError(f"{self.path} cannot be read: {error.strerror}") from error
        return data


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Parcel:
    """One patch that can be had."""

    version: int
    base_version: int | None
    size: int
    """Bytes of the file."""
    places: tuple[Place, ...]
    """To be tried in this order."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Notice:
    """What the learners tell every engine: the version that is to be served, and all that may be needed to get there."""

    run_id: str
    sitting: int
    """Grows from one start of the learners to the next, which may begin at an older version: what is announced by an earlier
    one comes late."""
    version: int
    root: str
    patches: tuple[Parcel, ...] = ()
    """Each builds on the one before it."""
    anchors: tuple[Parcel, ...] = ()
    """To be tried in this order where the patches do not lead on from what is held."""
    engines: InEngines | None = None
    """The learners send this version into the engines' own processes; what else is here is for who misses it."""

    def with_anchor(self, anchor: Parcel) -> Notice:
        """The same with an anchor that is tried before the others."""
        return replace(self, anchors=(anchor, *self.anchors))

    def routes(self, held: int | None) -> Iterator[tuple[Parcel, ...]]:
        """Ways from the version that is held (None: nothing) to the new one, in the order in which to try them."""
        direct = self._onward(held)
        if direct is not None:
            yield from (direct, direct)  # what was damaged on its way may come through the second time
        for anchor in self.anchors:
            onward = self._onward(anchor.version)
            if onward is not None:
                yield (anchor, *onward)

    def _onward(self, version: int | None) -> tuple[Parcel, ...] | None:
        """The patches that lead from there to the new version; None if they do not."""
        if version is None:
            return None
        found: list[Parcel] = []
        for parcel in self.patches:
            if parcel.base_version == version:
                found.append(parcel)
                version = parcel.version
        return tuple(found) if version == self.version else None


class Outbox(Protocol):
    """The learners' side of a transport."""

    def put(self, version: int, base_version: int | None, pieces: Iterable[bytes | memoryview]) -> Parcel: ...


class ObjectStore:
    """Ray's; an object lives as long as anybody holds its parcel."""

    def put(self, version: int, base_version: int | None, pieces: Iterable[bytes | memoryview]) -> Parcel:
        data = np.frombuffer(b"".join(pieces), np.uint8)
        place = InStore(reference=ray.put(data))
        return Parcel(version=version, base_version=base_version, size=data.nbytes, places=(place,))


class Directory:
    """Files in a directory that learners and engines share. `base_version` is in their names, so a person sees the chain:
    `00000012.anchor`, `00000013-from-00000012.patch`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def put(self, version: int, base_version: int | None, pieces: Iterable[bytes | memoryview]) -> Parcel:
        self.folder.mkdir(parents=True, exist_ok=True)
        name = f"{version:08}.anchor" if base_version is None else f"{version:08}-from-{base_version:08}.patch"
        path, partial, size = self.folder / name, self.folder / f".{name}.{os.getpid()}", 0
        with partial.open("wb") as file:
            for piece in pieces:
                size += file.write(piece)
        partial.rename(path)  # an engine sees all of it or nothing
        place = InFile(path=str(path.absolute()))
        return Parcel(version=version, base_version=base_version, size=size, places=(place,))

    def keep(self, parcels: Iterable[Parcel]) -> None:
        """Deletes every other patch."""
        wanted = {Path(place.path).name for parcel in parcels for place in parcel.places if isinstance(place, InFile)}
        for path in list_patches(self.folder):
            if path.name not in wanted:
                path.unlink(missing_ok=True)


def list_patches(folder: Path) -> list[Path]:
    """The files that `Directory` wrote, by version, an anchor before a patch of the same version."""
    found = [path for path in folder.glob("[0-9]*") if path.suffix in (".anchor", ".patch")]
    return sorted(found, key=lambda path: (path.name[:8], path.suffix))


__all__ = [
    "Directory",
    "InFile",
    "InStore",
    "Link",
    "Notice",
    "ObjectStore",
    "Outbox",
    "Parcel",
    "Place",
    "TokenBucket",
    "TransferError",
    "list_patches",
]
