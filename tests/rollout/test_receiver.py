"""The receiver beside an engine that is a table of bytes: what it builds on is the engine's own."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from emberl.rollout.receiver import Receiver
from emberl.rollout.weights.apply import advance, materialise
from emberl.rollout.weights.diff import encode
from emberl.rollout.weights.patch import (
    DigestMismatchError,
    TensorBytes,
    VersionError,
    WeightPatch,
    Weights,
    dense_patch,
)
from emberl.rollout.weights.transport import Directory, FetchContext, PatchRef, WeightUpdate
from emberl.rollout.weights.wire_format import pieces
from emberl.rollout.worker import RolloutWorker
from table_engine import TableEngine


def tensors(version: int) -> dict[str, TensorBytes]:
    """`a` changes with every version, `b` with every other one, `c` never."""
    values = {"a": [version, 1], "b": [version // 2, 2, 3], "c": [7]}
    return {
        name: TensorBytes(dtype="F32", shape=(len(row),), data=np.array(row, "<f4").view(np.uint8))
        for name, row in values.items()
    }


class Learner:
    """Announces version after version, each as a patch on the one before and as an anchor."""

    def __init__(self, folder: Path) -> None:
        self.store = Directory(folder)
        self.patches: list[PatchRef] = []
        self.base: Weights | None = None

    def publish(self, version: int) -> WeightUpdate:
        anchor = dense_patch("run", version, tensors(version).items())
        if self.base is not None:
            patch = encode(self.base, tensors(version), run_id="run", version=version)
            self.patches.append(self.store.put(version, version - 1, pieces(patch)))
        self.base = advance(None, materialise(anchor, None))
        whole = self.store.put(version, None, pieces(anchor))
        return WeightUpdate(
            run_id="run",
            attempt=0,
            version=version,
            root=anchor.root,
            patches=tuple(self.patches),
            anchors=(whole,),
        )


class Engine(TableEngine):
    """Writes down what it is given; `damage` is done to it before so many patches."""

    def __init__(self, damage: int = 0, *, takes_changes: bool = False) -> None:
        super().__init__(takes_changes=takes_changes)
        self.damage = damage
        self.given: list[tuple[int | None, set[str]]] = []
        self.gate = asyncio.Event()
        self.gate.set()

    async def apply(self, patch: WeightPatch) -> int:
        await self.gate.wait()
        self.given.append((patch.base_version, set(patch.tensors) | set(patch.changes)))
        if self.version >= 0 and self.damage:
            self.damage -= 1
            self.tensors["c"].data[0] ^= 1
            patch.tensors.get("c", self.tensors["c"]).data[0] ^= patch.base_version is None
        return self.load(patch)


def test_an_engine_is_given_what_changes_and_nothing_twice(tmp_path: Path) -> None:
    learner, engine = Learner(tmp_path), Engine()

    async def play() -> None:
        receiver = Receiver(engine, FetchContext(timeout=5.0))
        for version in range(3):
            update = learner.publish(version)
            for _ in range(2):
                await receiver.prepare(update)
            for _ in range(2):
                assert (await receiver.commit(version))["version"] == version
        with pytest.raises(VersionError, match="version 3 was not prepared, nothing is ready"):
            await receiver.commit(3)
        assert (await receiver.commit(1))["version"] == 2, "a late one changes nothing"

    asyncio.run(asyncio.wait_for(play(), 120))
    assert engine.given == [(None, {"a", "b", "c"}), (0, {"a"}), (1, {"a", "b"})]


def test_the_next_version_is_prepared_while_an_engine_still_waits_to_change(tmp_path: Path) -> None:
    """As with schedule.in_flight=finish, where a commit waits for what is decoded."""
    learner, engine = Learner(tmp_path), Engine()

    async def play() -> dict[str, float]:
        receiver = Receiver(engine, FetchContext(timeout=5.0))
        await receiver.catch_up(learner.publish(0))
        await receiver.prepare(learner.publish(1))
        engine.gate.clear()
        first = asyncio.create_task(receiver.commit(1))
        await asyncio.sleep(0)
        await receiver.prepare(learner.publish(2))
        engine.gate.set()
        assert (await first)["version"] == 1
        return await receiver.commit(2)

    report = asyncio.run(asyncio.wait_for(play(), 120))
    assert (report["version"], report["digest_failures"]) == (2, 0)
    assert engine.given[1:] == [(0, {"a"}), (1, {"a", "b"})]


def test_a_worker_that_joins_late_reports_what_the_others_do(tmp_path: Path) -> None:
    """In one delivery some commit and one that was restarted catches up: their reports are added
    up, name by name."""
    learner = Learner(tmp_path)

    async def play() -> tuple[dict[str, float], dict[str, float]]:
        first, late = (RolloutWorker.__new__(RolloutWorker) for _ in range(2))  # without an actor
        for worker, restarts in ((first, 1), (late, 2)):
            engine: Any = Engine()
            engine.restarts = restarts
            worker.engine = engine
            worker.receiver = Receiver(engine, FetchContext(timeout=5.0))
        update = learner.publish(0)
        await first.prepare(update)
        return await first.commit(0), await late.catch_up(update)

    committed, caught_up = asyncio.run(asyncio.wait_for(play(), 120))
    assert committed.keys() == caught_up.keys()
    assert (committed["engine_restarts"], caught_up["engine_restarts"]) == (1, 2)


@pytest.mark.parametrize(("damage", "served"), [(1, 1), (2, None)])
def test_a_damaged_engine_gets_everything_anew_once(
    damage: int, served: int | None, tmp_path: Path
) -> None:
    learner, engine = Learner(tmp_path), Engine(damage)

    async def play() -> Any:
        receiver = Receiver(engine, FetchContext(timeout=5.0))
        await receiver.catch_up(learner.publish(0))
        await receiver.prepare(learner.publish(1))
        return await receiver.commit(1)

    if served is None:
        with pytest.raises(DigestMismatchError, match="tensor c of version 1"):
            asyncio.run(play())
    else:
        report = asyncio.run(play())
        assert (report["version"], report["digest_failures"]) == (served, 1)
    assert engine.given[1:] == [(0, {"a"}), (None, {"a", "b", "c"})]
