"""What the pool asks of workers, and the places where bytes lie: fakes that answer, refuse, or
never do."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
from emberl.rollout.actors import ActorLostError, WorkerLostError, call, catch_up
from emberl.rollout.weights.transport import (
    Directory,
    FetchContext,
    FileSource,
    ObjectStoreSource,
    PatchRef,
    TokenBucket,
    TransferError,
    WeightUpdate,
)


class Method:
    def __init__(self, answer: Callable[..., Awaitable[Any]]) -> None:
        self.answer = answer

    def remote(self, *arguments: Any) -> Any:
        return self.answer(*arguments)


class FakeWorker:
    """Holds `version` on `node`; tells what it was asked to follow."""

    def __init__(self, node: str, version: int, *, dead: bool = False) -> None:
        self.notice: WeightUpdate | None = None

        async def offer() -> tuple[str, int]:
            if dead:
                raise ray.exceptions.RayActorError(error_msg="it is dead")
            return node, version

        async def catch_up(notice: WeightUpdate) -> dict[str, float]:
            self.notice = notice
            return {"version": float(notice.version)}

        self.offer, self.catch_up = Method(offer), Method(catch_up)
        self.export: Any = type("Export", (), {"remote": lambda _: f"anchor of {node}"})()


ANCHOR = PatchRef(version=3, base_version=None, size=9, places=())
PATCHES = tuple(PatchRef(version=v, base_version=v - 1, size=1, places=()) for v in (4, 5, 6))
NOTICE = WeightUpdate(
    run_id="run", attempt=0, version=6, root="", patches=PATCHES, anchors=(ANCHOR,)
)


def followed(peers: list[FakeWorker]) -> WeightUpdate:
    fresh = FakeWorker("here", -1)
    report = asyncio.run(catch_up(fresh, NOTICE, peers, who="rollout worker 1", timeout=5.0))
    assert report == {"version": 6.0} and fresh.notice is not None
    return fresh.notice


def test_a_late_joiner_asks_a_peer_on_its_node_first() -> None:
    peers = [
        FakeWorker("here", 6, dead=True),
        FakeWorker("there", 6),
        FakeWorker("here", 5),
        FakeWorker("here", 6),
    ]
    notice = followed(peers)
    first, second = notice.anchors
    assert (
        isinstance(first.places[0], ObjectStoreSource)
        and first.places[0].reference == "anchor of here"
    )
    assert (first.version, second) == (5, ANCHOR)
    assert [[p.version for p in route] for route in notice.routes(None)] == [[5, 6], [3, 4, 5, 6]]


@pytest.mark.parametrize(
    "peers", [[], [FakeWorker("there", 6)], [FakeWorker("here", -1)], [FakeWorker("here", 7)]]
)
def test_without_such_a_peer_the_learners_anchor_remains(peers: list[FakeWorker]) -> None:
    assert followed(peers).anchors == (ANCHOR,)


def test_a_late_worker_is_named_within_the_deadline() -> None:
    start = time.monotonic()
    with pytest.raises(
        WorkerLostError,
        match=r"rollout worker 2: no answer to 'prepare' within sync.timeout=0.05 s",
    ):
        asyncio.run(call(asyncio.sleep(60), who="rollout worker 2", what="prepare", timeout=0.05))
    assert time.monotonic() - start < 5

    async def refuse() -> None:
        raise ray.exceptions.RayTaskError(
            "prepare", "Traceback\nVersionError: another run", ValueError("x")
        )

    with pytest.raises(
        ActorLostError, match="rollout worker 2 failed in 'commit': VersionError: another run"
    ) as found:
        asyncio.run(call(refuse(), who="rollout worker 2", what="commit", timeout=1.0))
    assert not isinstance(found.value, WorkerLostError), (
        "another actor in its place would refuse too"
    )


def test_routes_prefer_patches_and_try_them_twice() -> None:
    def versions(held: int | None) -> list[list[int]]:
        return [[parcel.version for parcel in route] for route in NOTICE.routes(held)]

    assert versions(5) == [[6], [6], [3, 4, 5, 6]]
    assert versions(3) == [[4, 5, 6], [4, 5, 6], [3, 4, 5, 6]]
    assert versions(1) == [[3, 4, 5, 6]], "a gap"
    assert versions(None) == [[3, 4, 5, 6]]


def test_files_appear_whole_and_go_when_nobody_may_need_them(tmp_path: Path) -> None:
    outbox = Directory(tmp_path / "sync")
    old = outbox.put(0, None, [b"abc", memoryview(b"de")])
    new = outbox.put(1, 0, [b"patch"])
    assert (old.size, new.size) == (5, 5)
    assert bytes(old.places[0].fetch(FetchContext(timeout=1.0))) == b"abcde"
    outbox.keep([new])
    assert [path.name for path in (tmp_path / "sync").iterdir()] == ["00000001-from-00000000.patch"]
    with pytest.raises(TransferError, match=r"00000000.anchor cannot be read: No such file"):
        old.places[0].fetch(FetchContext(timeout=1.0))


def test_a_token_bucket_is_as_slow_as_it_says(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(np.zeros(3 << 20, np.uint8).tobytes())
    link = FetchContext(timeout=10.0, bucket=TokenBucket(rate=10e6))
    start = time.monotonic()
    FileSource(path=str(tmp_path / "file")).fetch(link)
    assert 0.28 < time.monotonic() - start < 2.0, "3.1 MB at 10 MB/s"
    with pytest.raises(TransferError, match=r"within 0\.1 s"):
        FileSource(path=str(tmp_path / "file")).fetch(
            FetchContext(timeout=0.1, bucket=TokenBucket(rate=10e6))
        )
