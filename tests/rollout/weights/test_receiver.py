"""An engine whose bytes differ from the learners' gets all of them anew, once."""

from __future__ import annotations

import asyncio
from typing import Any

import numpy as np
import pytest
from emberl.rollout.weights.patch import DigestMismatchError, TensorBytes, WeightPatch, dense_patch
from emberl.rollout.weights.receiver import Report
from emberl.rollout.worker import WeightUpdates

A, B = (
    TensorBytes(dtype="F32", shape=(2,), data=np.array([x, 1.0], "<f4").view(np.uint8))
    for x in (0.0, 5.0)
)
ANCHOR = dense_patch("run", 4, {"a": A, "b": B}.items())
CHANGES = WeightPatch(
    run_id="run", version=4, base_version=3, tensors={"b": B}, digests=ANCHOR.digests
)


class Prepared:
    """Has version 4 ready, for engines of any version."""

    def patch(self, version: int, served: int) -> WeightPatch:
        assert version == 4
        return CHANGES if served == 3 else ANCHOR

    def commit(self, version: int, seconds: float) -> Report:
        return Report(version=version)


class Damaged:
    """An engine at version 3 that refuses so many patches."""

    version = 3

    def __init__(self, failures: int) -> None:
        self.failures, self.given = failures, []

    async def apply(self, patch: WeightPatch) -> int:
        self.given.append(patch)
        if len(self.given) <= self.failures:
            raise DigestMismatchError(
                "tensor a of version 4: the engine holds 0, the learners hold 1"
            )
        return patch.version


def commit(engine: Any) -> dict[str, float]:
    receiver: Any = Prepared()
    return asyncio.run(WeightUpdates(engine, receiver).commit(4))


def test_changes_that_do_not_give_the_digests_are_followed_by_everything() -> None:
    engine = Damaged(1)
    assert commit(engine)["version"] == 4
    assert engine.given == [CHANGES, ANCHOR]


def test_everything_in_vain_names_the_tensor() -> None:
    engine = Damaged(2)
    with pytest.raises(DigestMismatchError, match="tensor a of version 4"):
        commit(engine)
    assert engine.given == [CHANGES, ANCHOR]
