"""The engine's side of a weight update: a state machine that never serves what it has not verified.

    engine serves v --prepare(update)--> w is ready beside it --commit(w)--> engine serves w

PREPARE fetches and verifies the changes, and locates the elements to write, in a thread, while the
engine decodes. COMMIT is one `apply` of the engine; only for that does decoding wait.
The only copy of all weights is the engine's (`Engine.held`). Either call may come twice, late, or
for an older version than the served one; it then does nothing. An error leaves the served weights
as they were.
"""

from __future__ import annotations

import asyncio
import time
from collections import ChainMap
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial, reduce
from typing import Any

import numpy as np

from .engine import Engine
from .vllm_backend.transfer import GroupMember
from .weights.apply import materialise, merge, resolve
from .weights.changes import follow
from .weights.engine_transfer import EngineTransfer
from .weights.patch import (
    Bytes,
    CorruptPatchError,
    DigestMismatchError,
    TensorBytes,
    Transfer,
    VersionError,
    Views,
    WeightPatch,
    Weights,
)
from .weights.transport import FetchContext, PatchRef, TransferError, WeightUpdate
from .weights.wire_format import from_bytes, pieces

RECOVERABLE = (CorruptPatchError, DigestMismatchError, VersionError, TransferError, ValueError)
"""Errors after which the next route is tried."""


class UnrecoverableError(RuntimeError):
    """No announced route leads to the version; the message says why each failed."""


@dataclass(kw_only=True, slots=True)
class Report:
    """The cost of the last update on one worker."""

    version: int = -1
    wire_bytes: int = 0
    transfer_s: float = 0.0
    prepare_s: float = 0.0
    """Verifying and materialising."""
    apply_s: float = 0.0
    """Seconds for which decoding was paused."""
    digest_failures: int = 0
    """Patches refused: damaged, or giving other digests than the learners'."""
    replays: int = 0
    """Patches and anchors needed besides the newest patch."""

    def as_dict(self) -> dict[str, float]:
        return asdict(self)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Ready:
    """A version that the engine may change to."""

    update: WeightUpdate
    steps: tuple[WeightPatch, ...]
    """Verified patches, each based on the one before: whole tensors, or changes to them."""
    passed: tuple[tuple[int, str], ...]
    """(version, root) of the first patch's base, if it has one, and of each patch's result."""

    @property
    def patch(self) -> WeightPatch:
        """All steps as one."""
        return reduce(merge, self.steps)

    def after(self, held: Weights | None) -> WeightPatch:
        """The remaining steps from the held weights, merged; all steps if these are not among
        `passed`."""
        if held is None or (held.version, held.root) not in self.passed:
            return self.patch
        done = self.passed.index((held.version, held.root))
        return reduce(merge, self.steps[done:] or self.steps[-1:])

    @property
    def version(self) -> int:
        return self.steps[-1].version


class Receiver:
    """The receiver of one engine; all methods run on one event loop."""

    def __init__(
        self,
        engine: Engine,
        link: FetchContext,
        *,
        threads: int = 1,
        apply: Callable[[WeightPatch], Awaitable[int]] | None = None,
    ) -> None:
        """apply: called instead of the engine's `apply`."""
        self._engine = engine
        self._link = link
        self._threads = threads
        self._apply = apply or engine.apply
        # whether the engine writes positions and values into its own storage
        self._find = resolve if getattr(engine, "takes_changes", False) else materialise
        self._preparing = asyncio.Lock()
        self._committing = asyncio.Lock()
        self._member = GroupMember()
        self._ready: Ready | None = None
        self._transfer: WeightUpdate | None = None  # comes into the engine's own processes
        self._attempt = -1
        self._report = Report()

    async def prepare(self, update: WeightUpdate) -> None:
        """Makes the announced version ready. Raises `UnrecoverableError` if no announced route
        leads there."""
        async with self._preparing:
            if update.engines is not None and update.version > self._engine.version:
                self._transfer = update
            else:
                self._transfer = None
                await asyncio.to_thread(self._prepare, update)

    async def commit(self, version: int) -> dict[str, float]:
        """Makes the engine serve the prepared version, which must be at least `version`; returns
        the update's `Report`. Raises VersionError if `prepare` did not come first."""
        async with self._committing:
            update = self._transfer
            self._transfer = None
            if update is not None and update.engines is not None:
                try:
                    return await self._receive(update, update.engines)
                except TransferError:  # nothing has begun
                    await asyncio.to_thread(self._prepare, update)
            ready = self._ready
            if ready is None or ready.version < version:
                if self._engine.held is not None and self._engine.version >= version:
                    return replace(self._report, version=self._engine.version).as_dict()
                here = "nothing" if ready is None else f"version {ready.version}"
                raise VersionError(f"version {version} was not prepared, {here} is ready")
            patch = await asyncio.to_thread(self._onto_what_is_served, ready)
            start = time.perf_counter()
            try:
                served = await self._apply(patch)
            except DigestMismatchError:  # the engine's weights are damaged: load all of them, once
                anew = await asyncio.to_thread(self._anew, ready.update)
                self._report.digest_failures += 1
                served = await self._apply(anew)
            # of an engine that does not say, all of it
            stood_still = getattr(self._engine, "pause_s", None)
            self._report.apply_s += stood_still or time.perf_counter() - start
            if self._ready is ready:
                self._ready = None
            return replace(self._report, version=served).as_dict()

    async def catch_up(self, update: WeightUpdate) -> dict[str, float]:
        """`prepare` and `commit` for a worker that was restarted or joins late, without the
        engines' own transfer, in which all workers take part."""
        await self.prepare(replace(update, engines=None))
        return await self.commit(update.version)

    @property
    def version(self) -> int:
        """The version that `export` gives to a peer; -1: none."""
        held = self._engine.held
        return -1 if held is None else held.version

    def export(self) -> Bytes:
        """The bytes of an anchor of the served weights, for a peer without any. Raises VersionError
        if nothing is served."""
        held = self._engine.held
        if held is None:
            raise VersionError("nothing is held here yet")
        anchor = WeightPatch(
            run_id=held.run_id, version=held.version, tensors=held.tensors, digests=held.digests
        )
        return np.frombuffer(b"".join(pieces(anchor)), np.uint8)

    async def _receive(self, update: WeightUpdate, version: EngineTransfer) -> dict[str, float]:
        """The engine's own processes receive the weights from the learners. Raises `TransferError`
        unless all workers take part."""
        missed = False

        def fallback() -> Mapping[str, TensorBytes]:
            nonlocal missed
            missed = True
            return self._anew(update).tensors

        start = time.perf_counter()
        rank = await asyncio.to_thread(self._member.join, version.broadcast, self._engine.joined)
        met = time.perf_counter()
        patch = WeightPatch(
            run_id=update.run_id,
            version=update.version,
            tensors={},
            digests=version.digests,
            transfer=Transfer(version=version, rank=rank, fallback=fallback),
        )
        served = await self._apply(patch)
        now = time.perf_counter()
        if missed:
            self._report.apply_s += now - met
        else:
            self._report = Report(
                wire_bytes=version.num_bytes, transfer_s=now - start, apply_s=now - met
            )
        self._ready = None
        self._attempt = max(self._attempt, update.attempt)
        return replace(self._report, version=served).as_dict()

    # Below, everything runs in threads.

    def _prepare(self, update: WeightUpdate) -> None:
        ready, held = self._ready, self._engine.held  # in this order: a commit may come between
        if ready is not None and not _leads_on(ready, held):
            ready = None
        newest = _after(held, ready)
        if newest is not None and (update.attempt < self._attempt or _covers(newest, update)):
            return
        self._report = Report(version=update.version)
        self._ready = self._reach(update, held, ready)
        self._attempt = update.attempt

    def _onto_what_is_served(self, ready: Ready) -> WeightPatch:
        """The patch from what the engine holds now, which may have changed since `prepare`, or be
        nothing."""
        held = self._engine.held
        if not _leads_on(ready, held):
            return self._reach(ready.update, held, None).patch
        if ready.steps[0].base_version is None or held is None:
            return ready.patch
        return replace(ready.after(held), base_version=held.version, base_root=held.root)

    def _anew(self, update: WeightUpdate) -> WeightPatch:
        """A whole patch with all tensors of the announced version, whatever is held."""
        self._report = Report(version=update.version)
        return self._reach(update, None, None).patch

    def _reach(self, update: WeightUpdate, held: Weights | None, ready: Ready | None) -> Ready:
        failures = []
        newest = _after(held, ready)
        start = newest.version if newest is not None and newest.run_id == update.run_id else None
        for route in update.routes(start):
            try:
                reached = self._follow(update, route, held, ready)
                if reached.passed[-1] != (update.version, update.root):
                    raise DigestMismatchError(
                        f"version {reached.version} is not what the learners hold"
                    )
                return reached
            except RECOVERABLE as error:
                self._report.digest_failures += isinstance(
                    error, CorruptPatchError | DigestMismatchError
                )
                failures.append(f"{_name(route)}: {error}")
        reasons = "; ".join(failures) or "no patch builds on it and there is no anchor"
        here = "nothing" if newest is None else f"version {newest.version}"
        raise UnrecoverableError(
            f"version {update.version} cannot be reached from {here}: {reasons}"
        )

    def _follow(
        self,
        update: WeightUpdate,
        route: Sequence[PatchRef],
        held: Weights | None,
        ready: Ready | None,
    ) -> Ready:
        for number, ref in enumerate(route):
            data = self._fetch(ref)
            start = time.perf_counter()
            patch = from_bytes(data)
            base = None if patch.base_version is None else _after(held, ready)
            patch = self._find(patch, base, threads=self._threads)
            self._report.prepare_s += time.perf_counter() - start
            self._report.replays += number > 0 or (patch.base_version is None and held is not None)
            ready = _joined(update, ready, base, patch)
        assert ready is not None, "a route has a ref or starts from what is ready"
        return ready

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


def _leads_on(ready: Ready, held: Weights | None) -> bool:
    if ready.steps[0].base_version is None:
        return True
    return held is not None and (held.version, held.root) in ready.passed


def _after(held: Weights | None, ready: Ready | None) -> Weights | None:
    """The weights that an engine which holds `held` will have once it has changed."""
    if ready is None:
        return held
    patch = ready.patch
    tensors = patch.tensors
    if patch.base_version is not None:
        assert held is not None, "a patch without what it builds on"
        layers: Any = (tensors, held.tensors)  # typed for what can be written to
        tensors = ChainMap(*layers)
    if patch.changes:
        # a commit may be writing them meanwhile: what is read is the same either way
        tensors = Views(list(tensors), partial(follow, tensors, patch.changes))
    return Weights(
        run_id=patch.run_id,
        version=patch.version,
        tensors=tensors,
        digests=patch.digests,
    )


def _joined(
    update: WeightUpdate, ready: Ready | None, base: Weights | None, patch: WeightPatch
) -> Ready:
    """`ready` with `patch` as its next step; just `patch` if that needs no base."""
    here = (patch.version, patch.root)
    if patch.base_version is None or base is None:
        return Ready(update=update, steps=(patch,), passed=(here,))
    if ready is None:
        return Ready(update=update, steps=(patch,), passed=((base.version, base.root), here))
    return Ready(update=update, steps=(*ready.steps, patch), passed=(*ready.passed, here))


def _covers(newest: Weights, update: WeightUpdate) -> bool:
    """Whether an update needs no work, as these weights are of the same version or a later one of
    its run."""
    if newest.run_id != update.run_id or newest.version < update.version:
        return False
    return newest.version > update.version or newest.root == update.root


def _name(route: Sequence[PatchRef]) -> str:
    return " -> ".join(
        f"{'anchor' if p.base_version is None else 'patch'} {p.version}" for p in route
    )
