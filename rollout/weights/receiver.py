"""The engine's side of a weight update: a state machine that never serves what it has not verified.

    held v --prepare(notice)--> held v, ready w --commit--> held w

PREPARE fetches, verifies and materialises beside what is served, in a thread of its own, while the
engine decodes. COMMIT, all that decoding waits for, gives the engine the tensors that changed.
Either may come twice, late, or for a version that was passed long ago; it then does nothing.
Whatever goes wrong leaves what is held as it was.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

import numpy as np

from .apply import commit, prepare
from .patch import (
    Bytes,
    CorruptPatchError,
    DigestMismatchError,
    VersionError,
    WeightPatch,
    Weights,
    dense_patch,
)
from .transport import FetchContext, PatchRef, TransferError, WeightUpdate
from .wire_format import from_bytes, pieces

RECOVERABLE = (CorruptPatchError, DigestMismatchError, VersionError, TransferError, ValueError)
"""Errors after which the next route is tried."""


class UnrecoverableError(RuntimeError):
    """No way that was announced leads to the version; the message says why each failed."""


@dataclass(kw_only=True, slots=True)
class Report:
    """The cost of the last update on one worker."""

    version: int = -1
    wire_bytes: int = 0
    transfer_s: float = 0.0
    prepare_s: float = 0.0
    """Verifying and materialising."""
    apply_s: float = 0.0
    """Seconds for which decoding stood still."""
    digest_failures: int = 0
    """Patches that were refused: damaged, or not giving the digests of the learners."""
    replays: int = 0
    """Patches and anchors beyond the newest patch that it took to catch up."""

    def as_dict(self) -> dict[str, float]:
        return asdict(self)


class Receiver:
    """One engine's. Thread-safe."""

    def __init__(self, link: FetchContext, *, threads: int = 1) -> None:
        self._link = link
        self._threads = threads
        self._lock = threading.Lock()
        self._held: Weights | None = None
        self._ready: Weights | None = None
        self._given: Weights | None = None
        """The version last handed to the engine, which it may not serve yet."""
        self._attempt = -1
        self._report = Report()

    @property
    def held(self) -> Weights | None:
        """The version last committed."""
        return self._held

    def prepare(self, notice: WeightUpdate) -> Report:
        """Makes the announced version ready. `UnrecoverableError` if no announced way leads
        there."""
        with self._lock:
            newest = self._ready or self._held
            if newest is not None and (notice.attempt < self._attempt or _covers(newest, notice)):
                return self._report
            self._report = Report(version=notice.version)
            self._ready = self._reach(notice, newest)
            self._attempt = notice.attempt
            return self._report

    def patch(self, version: int, served: int) -> WeightPatch:
        """The patch from version `served` to the version that is ready, which is at least
        `version`.

        VersionGap: that is not ready; `prepare` must come first.
        """
        with self._lock:
            target = self._ready or self._held
            if target is None or target.version < version:
                here = "nothing" if target is None else f"version {target.version}"
                raise VersionError(f"version {version} was not prepared, {here} is ready")
            self._given = target
            base = self._held if self._held is not None and self._held.version == served else None
            old = {} if base is None else base.tensors
            changed = {
                name: tensor
                for name, tensor in target.tensors.items()
                if tensor is not old.get(name)
            }
            return WeightPatch(
                run_id=target.run_id,
                version=target.version,
                base_version=None if base is None else base.version,
                base_root=None if base is None else base.root,
                tensors=changed,
                digests=target.digests,
            )

    def commit(self, version: int, seconds: float = 0.0) -> Report:
        """The engine serves this version now, and decoding waited so many seconds for it."""
        with self._lock:
            if self._given is not None and self._given.version == version:
                self._held = self._given
                self._ready = None if self._ready is self._given else self._ready
            self._report.apply_s += seconds
            return replace(self._report, version=version)

    def received(
        self, notice: WeightUpdate, size: int, transfer_s: float, seconds: float
    ) -> Report:
        """The engine has the announced version, of so many bytes, from the learners themselves, and
        what is held here is older; decoding waited so many seconds."""
        with self._lock:
            self._held = self._ready = self._given = None
            self._attempt = max(self._attempt, notice.attempt)
            self._report = Report(
                version=notice.version, wire_bytes=size, transfer_s=transfer_s, apply_s=seconds
            )
            return self._report

    def export(self) -> Bytes:
        """The bytes of an anchor of the held version, for a peer that has nothing. VersionError if
        nothing is held."""
        held = self._held
        if held is None:
            raise VersionError("nothing is held here yet")
        anchor = dense_patch(held.run_id, held.version, held.tensors.items())
        return np.frombuffer(b"".join(pieces(anchor)), np.uint8)

    def _reach(self, notice: WeightUpdate, newest: Weights | None) -> Weights:
        failures = []
        held = newest.version if newest is not None and newest.run_id == notice.run_id else None
        for route in notice.routes(held):
            try:
                weights = self._follow(route, newest)
                if weights.version != notice.version or weights.root != notice.root:
                    raise DigestMismatchError(
                        f"version {weights.version} is not what the learners hold"
                    )
                return weights
            except RECOVERABLE as error:
                self._report.digest_failures += isinstance(
                    error, CorruptPatchError | DigestMismatchError
                )
                failures.append(f"{_name(route)}: {error}")
        reasons = "; ".join(failures) or "no patch builds on it and there is no anchor"
        here = "nothing" if newest is None else f"version {newest.version}"
        raise UnrecoverableError(
            f"version {notice.version} cannot be reached from {here}: {reasons}"
        )

    def _follow(self, route: Sequence[PatchRef], held: Weights | None) -> Weights:
        weights = held
        for number, ref in enumerate(route):
            data = self._fetch(ref)
            start = time.perf_counter()
            patch = from_bytes(data)
            base = None if patch.base_version is None else weights
            weights = commit(base, prepare(patch, base, threads=self._threads))
            self._report.prepare_s += time.perf_counter() - start
            self._report.replays += number > 0 or (patch.base_version is None and held is not None)
        assert weights is not None, "a route has a ref or starts from what is held"
        return weights

    def _fetch(self, ref: PatchRef) -> Bytes:
        start, failures = time.perf_counter(), []
        for place in ref.places:
            try:
                data = place.fetch(self._link)
                self._report.wire_bytes += data.nbytes
                return data
            except TransferError as error:
                failures.append(str(error))
            finally:
                self._report.transfer_s += time.perf_counter() - start
        raise TransferError("; ".join(failures) or "it is nowhere to be had")


def _covers(held: Weights, notice: WeightUpdate) -> bool:
    """Whether there is nothing to do: the notice was followed already, or a later one of its run
    was."""
    if held.run_id != notice.run_id or held.version < notice.version:
        return False
    return held.version > notice.version or held.root == notice.root


def _name(route: Sequence[PatchRef]) -> str:
    return " -> ".join(
        f"{'anchor' if p.base_version is None else 'patch'} {p.version}" for p in route
    )


__all__ = ["Receiver", "Report", "UnrecoverableError"]
