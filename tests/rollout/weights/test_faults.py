"""Faults on every step of a weight update, drawn at random: 0 silent mismatches, 0 hangs.

A learner, two workers (one takes whole tensors, one positions and values) and a link that loses,
repeats, reorders, cuts and flips, as a hypothesis
state machine. All is the real thing but the engine, which is a table of bytes, and the link. After
every step whatever an engine serves is, byte for byte, a version that a learner published.
`make test-faults` injects 10,000 faults (EMBERL_FAULTS), CI a few hundred.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from emberl.rollout.receiver import Receiver, UnrecoverableError
from emberl.rollout.weights.diff import encode
from emberl.rollout.weights.patch import (
    TensorBytes,
    VersionError,
    WeightPatch,
    Weights,
    dense_patch,
    digest,
)
from emberl.rollout.weights.transport import FetchContext, PatchRef, TransferError, WeightUpdate
from emberl.rollout.weights.wire_format import pieces
from hypothesis import HealthCheck, note, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    initialize,
    invariant,
    rule,
    run_state_machine_as_test,
)
from table_engine import TableEngine

FAULTS = ("none", "none", "lost", "cut", "flip", "swap", "crash")
"""What the link does to one fetch. `swap`: the bytes of another patch come; `crash`: the engine's
process ends."""


WANTED = int(os.environ.get("EMBERL_FAULTS", "300"))
HANG = 10.0
"""Seconds; an update of these sizes takes a few milliseconds."""


class Crash(BaseException):
    """The process ends here; nothing of it goes on."""


@dataclass(kw_only=True)
class Wire:
    """Where all bytes lie, and what happens to the next fetches of them."""

    data: list[np.ndarray[Any, Any]] = field(default_factory=list)
    faults: list[tuple[str, int]] = field(default_factory=list)
    injected: int = 0


@dataclass(frozen=True, eq=False)
class OnWire:
    """A place whose bytes come through the faults."""

    wire: Wire
    number: int

    def fetch(self, link: FetchContext) -> np.ndarray[Any, Any]:
        data = self.wire.data[self.number]
        fault, at = self.wire.faults.pop(0) if self.wire.faults else ("none", 0)
        self.wire.injected += fault != "none"
        if fault == "lost":
            raise TransferError("it never came")
        if fault == "crash":
            raise Crash
        if fault == "cut":
            return data[: at % len(data)]
        if fault == "swap":
            return self.wire.data[at % len(self.wire.data)]
        if fault == "flip":
            data = data.copy()
            data[at // 8 % len(data)] ^= 1 << at % 8
        return data


class Engine(TableEngine):
    """Its process may end before or after an update."""

    crash = "no"

    async def apply(self, patch: WeightPatch) -> int:
        if self.crash == "before":
            raise Crash
        version = self.load(patch)
        if self.crash == "after":
            raise Crash
        return version


class Worker:
    """A receiver and its engine: what one actor is."""

    def __init__(self, *, takes_changes: bool) -> None:
        self.engine: Any = Engine(takes_changes=takes_changes)
        self.receiver = Receiver(self.engine, FetchContext(timeout=1.0))

    def prepare(self, update: WeightUpdate) -> None:
        asyncio.run(self.receiver.prepare(update))

    def commit(self, version: int, crash: str) -> None:
        self.engine.crash = crash
        asyncio.run(self.receiver.commit(version))


class Learner:
    """Publishes versions of three tensors, keeps the chain, and may be restarted."""

    def __init__(self, seed: int, run: int, wire: Wire, version: int = 0) -> None:
        self.rng = np.random.default_rng((seed, run))
        self.run_id, self.attempt, self.wire = f"run-{run}", run, wire
        self.values = {
            "up": self.rng.integers(0x3C00, 0x3D00, 40),
            "norm": self.rng.integers(0, 1 << 15, 5),
        }
        self.base: Weights | None = None
        self.version = version
        self.patches: list[PatchRef] = []
        self.anchors: list[PatchRef] = []

    def publish(self, *, anchor: bool) -> tuple[WeightUpdate, Weights]:
        flips = self.rng.choice([-1, 0, 0, 0, 1], 40)
        self.values["up"] = self.values["up"] + flips
        tensors = {name: _tensor(values) for name, values in self.values.items()} | {
            "rope": _tensor(np.arange(3))
        }
        digests = {name: digest(tensor.data) for name, tensor in tensors.items()}
        if self.base is not None:
            self.version += 1
            patch = encode(self.base, tensors, run_id=self.run_id, version=self.version)
            self.patches.append(self._send(patch))
        weights = Weights(
            run_id=self.run_id, version=self.version, tensors=tensors, digests=digests
        )
        if anchor or self.base is None:
            self.anchors = [self._send(dense_patch(self.run_id, self.version, tensors.items()))]
            self.patches = self.patches[-3:]
        self.base = weights
        return self.notice(), weights

    def notice(self) -> WeightUpdate:
        assert self.base is not None
        return WeightUpdate(
            run_id=self.run_id,
            attempt=self.attempt,
            version=self.version,
            root=self.base.root,
            patches=tuple(self.patches),
            anchors=tuple(self.anchors),
        )

    def _send(self, patch: WeightPatch) -> PatchRef:
        return _send(self.wire, patch)


def _send(wire: Wire, patch: WeightPatch) -> PatchRef:
    data = np.frombuffer(b"".join(pieces(patch)), np.uint8)
    wire.data.append(data)
    place = OnWire(wire, len(wire.data) - 1)
    return PatchRef(
        version=patch.version, base_version=patch.base_version, size=data.nbytes, places=(place,)
    )


def _tensor(values: Iterable[int]) -> TensorBytes:
    array = np.asarray(values, np.uint16)
    return TensorBytes(dtype="BF16", shape=array.shape, data=array.view(np.uint8).copy())


faults = st.lists(st.tuples(st.sampled_from(FAULTS), st.integers(0, 1 << 20)), max_size=4)


class SyncMachine(RuleBasedStateMachine):
    """`notices` holds every announcement ever made: any may be delivered again, late, or in another
    order."""

    notices = Bundle("notices")
    faults_injected = 0

    @initialize(seed=st.integers(0, 1 << 20))
    def begin(self, seed: int) -> None:
        self.seed, self.runs, self.wire = seed, 0, Wire()
        self.learner = Learner(seed, 0, self.wire)
        self.workers = [Worker(takes_changes=False), Worker(takes_changes=True)]
        self.truth: dict[tuple[str, int], Weights] = {}

    @rule(target=notices, anchor=st.booleans())
    def publish(self, anchor: bool) -> WeightUpdate:
        notice, weights = self.learner.publish(anchor=anchor)
        self.truth[notice.run_id, notice.version] = weights
        return notice

    @rule(
        notice=notices,
        who=st.integers(0, 1),
        faults=faults,
        crash=st.sampled_from(["no", "no", "before", "after"]),
    )
    def deliver(
        self, notice: WeightUpdate, who: int, faults: list[tuple[str, int]], crash: str
    ) -> None:
        """PREPARE and COMMIT of any notice on one worker, with faults on the way. Whatever fails
        leaves it serving what it served; a crash leaves a new, empty worker."""
        SyncMachine.faults_injected += crash != "no"
        self._attempt(notice, who, faults, crash)

    @rule(notice=notices, who=st.integers(0, 1), faults=faults)
    def prepare_only(self, notice: WeightUpdate, who: int, faults: list[tuple[str, int]]) -> None:
        """The learner is lost between PREPARE and COMMIT."""
        self._attempt(notice, who, faults, None)

    @rule(who=st.integers(0, 1), version=st.integers(0, 12))
    def stray_commit(self, who: int, version: int) -> None:
        """COMMIT comes twice, late, or for what was never prepared."""
        worker = self.workers[who]
        before, run = worker.engine.version, worker.engine.run_id
        try:
            worker.commit(version, "no")
        except VersionError as error:
            note(f"refused: {error}")
        # what a restarted learner has prepared may be an older number
        assert worker.engine.version >= before or worker.engine.run_id != run

    @rule(who=st.integers(0, 1))
    def lose_worker(self, who: int) -> None:
        """Its place is taken by one that holds nothing: a late joiner."""
        SyncMachine.faults_injected += 1
        self.workers[who] = Worker(takes_changes=bool(who))

    @rule(target=notices, back=st.integers(0, 3))
    def restart_learner(self, back: int) -> WeightUpdate:
        """From an older checkpoint: a new run id, version numbers that were used before, other
        weights."""
        SyncMachine.faults_injected += 1
        self.runs += 1
        self.learner = Learner(self.seed, self.runs, self.wire, max(0, self.learner.version - back))
        return self.publish(anchor=True)

    @rule(who=st.integers(0, 1))
    def join_from_peer(self, who: int) -> None:
        """What a peer exports is an anchor like any other, tried first."""
        if self.learner.base is None:
            return
        peer = self.workers[1 - who].receiver
        notice = self.learner.notice()
        if peer.version >= 0:
            self.wire.data.append(peer.export())
            place = OnWire(self.wire, len(self.wire.data) - 1)
            parcel = PatchRef(version=peer.version, base_version=None, size=0, places=(place,))
            notice = notice.with_anchor(parcel)
        self.workers[who] = Worker(takes_changes=bool(who))
        self._attempt(notice, who, [], "no")
        self._holds_newest(who)

    @rule(who=st.integers(0, 1))
    def recover(self, who: int) -> None:
        """With the link whole again, one announcement is enough, whatever happened before."""
        if self.learner.base is not None:
            self._attempt(self.learner.notice(), who, [], "no")
            self._holds_newest(who)

    @invariant()
    def what_is_served_was_published(self) -> None:
        for worker in getattr(self, "workers", []):
            engine = worker.engine
            if engine.version < 0:
                continue
            truth = self.truth[engine.run_id, engine.version].tensors
            served = {name: tensor.data.tobytes() for name, tensor in engine.tensors.items()}
            assert served == {name: tensor.data.tobytes() for name, tensor in truth.items()}

    def _attempt(
        self, notice: WeightUpdate, who: int, faults: list[tuple[str, int]], crash: str | None
    ) -> None:
        self.wire.faults, before, start = list(faults), self.wire.injected, time.monotonic()
        worker = self.workers[who]
        try:
            worker.prepare(notice)
            if crash is not None:
                worker.commit(notice.version, crash)
        except Crash:
            self.workers[who] = Worker(takes_changes=bool(who))
        except (UnrecoverableError, VersionError) as error:
            note(f"not served: {error}")
        SyncMachine.faults_injected += self.wire.injected - before
        self.wire.faults = []
        assert time.monotonic() - start < HANG

    def _holds_newest(self, who: int) -> None:
        engine = self.workers[who].engine
        assert (engine.run_id, engine.version) == (self.learner.run_id, self.learner.version)


@pytest.mark.slow
def test_no_fault_is_served_and_every_fault_is_mended() -> None:
    SyncMachine.faults_injected = 0
    examples = max(5, min(200, WANTED // 20))
    while SyncMachine.faults_injected < WANTED:
        run_state_machine_as_test(
            SyncMachine,
            settings=settings(
                max_examples=examples,
                stateful_step_count=30,
                deadline=None,
                suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
            ),
        )
    print(f"{SyncMachine.faults_injected} faults were injected")
