"""What `auto` decides, by hand-computed times; and which patches an announcement keeps."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from emberl.rl.config.load import resolve
from emberl.rl.learner.publisher import Published, PublishRequest
from emberl.rl.weights.choice import Measured, choose, choose_transport
from emberl.rl.weights.probe import Probe
from emberl.rl.weights.sync import WeightSync
from emberl.rollout.weights.engine_transfer import BroadcastGroup
from emberl.rollout.weights.transport import PatchRef, WeightUpdate

MB = 1e6


@pytest.mark.parametrize(
    ("bandwidth", "ratio", "now", "mode"),
    [
        (None, None, "dense", "dense"),  # nothing is known yet
        (20 * MB, 150.0, "dense", "patch"),  # 10.05 s against 0.07 + 0.4
        (20 * MB, 1.2, "dense", "dense"),  # 10.05 s against 8.3 + 0.4: not worth a change
        (20 * MB, 1.2, "patch", "patch"),
        (8000 * MB, 150.0, "patch", "dense"),  # 0.075 s against 0.4
        (450 * MB, 150.0, "patch", "patch"),  # 0.49 s against 0.40: within the bias
        (450 * MB, 150.0, "dense", "dense"),
    ],
)
def test_the_mode_that_takes_less_time(
    bandwidth: float | None, ratio: float | None, now: Any, mode: str
) -> None:
    found = choose(
        Measured(num_bytes=200 * MB, bandwidth=bandwidth, ratio=ratio, coding_s=0.4), now
    )
    assert found.mode == mode
    if bandwidth == 20 * MB and ratio == 150.0:
        assert (
            found.why
            == "200 MB of weights at 20 MB/s: dense 10 s, patches 0.47 s (150x smaller, 0.4 s to"
            " code)"
        )


def test_the_collective_is_tried_once_where_there_is_a_fabric() -> None:
    assert choose_transport({"object_store": 1.0}, "object_store", fabric=False) == "object_store"
    assert choose_transport({}, "object_store", fabric=True) == "object_store"
    assert choose_transport({"object_store": 1.0}, "object_store", fabric=True) == "collective"
    assert (
        choose_transport({"object_store": 1.0, "collective": 9.0}, "collective", fabric=True)
        == "collective"
    )
    assert (
        choose_transport({"object_store": 1.0, "collective": 0.5}, "collective", fabric=True)
        == "object_store"
    )
    assert (
        choose_transport({"object_store": 1.0, "collective": 1.1}, "object_store", fabric=True)
        == "object_store"
    )


class FakeLearners:
    """Patches of 10 bytes, weights of 100."""

    def __init__(self) -> None:
        self.orders: list[PublishRequest] = []

    def take_weights(self) -> None: ...

    def publish(self, order: PublishRequest) -> Published:
        self.orders.append(order)

        def parcel(base: int | None, size: int) -> PatchRef:
            return PatchRef(version=order.version, base_version=base, size=size, places=())

        patch = parcel(order.version - 1, 10) if order.patch else None
        anchor = parcel(None, 100) if order.anchor else None
        return Published(
            version=order.version,
            root="",
            num_bytes=100,
            patch=patch,
            anchor=anchor,
            changed=0.01,
            encode_s=0.0,
        )


class FakePool:
    """Serves at 1 byte a second."""

    restarts = 0
    workers: Sequence[Any] = (0,)
    gone: tuple[int, ...] = ()

    def __init__(self) -> None:
        self.notices: list[WeightUpdate] = []

    async def serve(self, notice: WeightUpdate) -> list[dict[str, float]]:
        self.notices.append(notice)
        wire = float(notice.patches[-1].size if notice.patches else 100)
        figures = {"prepare_s": 0.0, "apply_s": 0.0, "digest_failures": 0.0, "replays": 0.0}
        return [
            {"version": float(notice.version), "wire_bytes": wire, "transfer_s": wire, **figures}
        ]


def make(
    learners: Any, pool: Any, folder: Path, tell: Callable[[str], None], **sections: Any
) -> WeightSync:
    tree = {"name": "t", "model": {"path": "m"}, "data": {"source": "arithmetic"}, **sections}
    return WeightSync(
        resolve(tree),
        learners,
        pool,
        run_id="run",
        run_dir=folder,
        fabric=True,
        tell=tell,
        probe=Probe(0.01),
    )


def run(
    settings: dict[str, Any], versions: int, folder: Path
) -> tuple[FakeLearners, FakePool, list[str]]:
    learners: Any = FakeLearners()
    pool: Any = FakePool()
    told: list[str] = []
    sync = make(learners, pool, folder, told.append, sync=settings)

    async def play() -> None:
        for version in range(versions):
            assert (await sync.publish(version))["sync/version"] == version

    asyncio.run(play())
    return learners, pool, told


def test_anchors_come_in_time_and_lead_to_the_newest_version(tmp_path: Path) -> None:
    learners, pool, _ = run({"mode": "patch", "anchor_every": 4}, 10, tmp_path)
    assert [order.version for order in learners.orders if order.anchor] == [0, 4, 8]
    for notice in pool.notices:
        (anchor,) = notice.anchors
        held = [*notice.routes(anchor.version)]
        assert held and all(route[-1].version == notice.version for route in held if route)
        assert [len(route) for route in notice.routes(None)] == [
            1 + notice.version - anchor.version
        ]
    assert [parcel.version for parcel in pool.notices[-1].patches] == [5, 6, 7, 8, 9], (
        "back to the anchor before the last"
    )


def test_a_held_version_gives_way_to_a_newer_one(tmp_path: Path) -> None:
    """While an evaluation keeps the workers at 1, learners publish 2, 3 and 4: nobody waits, and 4
    alone is delivered, as a patch on 1."""
    learners: Any = FakeLearners()
    pool: Any = FakePool()
    ahead = {"schedule": {"max_staleness": 3}, "sync": {"mode": "patch"}}
    sync = make(learners, pool, tmp_path, print, **ahead)

    async def play() -> None:
        await sync.publish(0)
        await sync.publish(1, wait=False)
        sync.hold(1)  # before the delivery of 1 has begun
        await sync.delivered()
        for version in (2, 3, 4):
            await asyncio.wait_for(sync.publish(version, wait=False), 10)
            await asyncio.sleep(0)
        assert [notice.version for notice in pool.notices] == [0, 1]
        sync.release()
        assert (await sync.delivered())["sync/version"] == 4

    asyncio.run(play())
    assert [notice.version for notice in pool.notices] == [0, 1, 4]
    assert [order.version for order in learners.orders] == [0, 1, 4]


def test_a_chain_of_half_an_anchor_ends(tmp_path: Path) -> None:
    learners, _, _ = run({"mode": "patch", "anchor_every": 50}, 16, tmp_path)
    assert [order.version for order in learners.orders if order.anchor] == [0, 7, 14], (
        "once six patches have 60 bytes"
    )


def test_auto_changes_over_on_a_weak_link_and_says_why_once(tmp_path: Path) -> None:
    learners, pool, told = run({"mode": "auto"}, 5, tmp_path)
    assert [order.patch for order in learners.orders] == [False, True, True, True, True]
    assert len(told) == 1 and told[0].startswith(
        "weight sync goes from dense to patch: 0.0001 MB of weights at 1e-06 MB/s"
    )
    assert len(pool.notices[-1].patches) == 4


def test_whole_weights_go_into_the_engines_where_all_change_at_once(tmp_path: Path) -> None:
    """Patches, and engines that are updated one after another, go through the object store."""
    met: list[tuple[str, int]] = []
    learners: Any = FakeLearners()
    pool: Any = FakePool()

    def meet(workers: int, timeout: float, backend: str, ranks: int) -> BroadcastGroup:
        met.append((backend, ranks))
        return BroadcastGroup(
            host="", port=0, group=len(met), workers=workers, device="cpu", backend=backend
        )

    async def sent() -> None: ...

    learners.meet, learners.broadcast, pool.serve_later = meet, sent, pool.notices.append
    for mode, gone in (("dense", ()), ("patch", ()), ("dense", (0,))):
        pool.gone = gone
        sync = make(
            learners,
            pool,
            tmp_path,
            print,
            sync={"mode": "dense", "transport": "collective"},
            rollout={
                "engine": "vllm",
                "engine_args": {
                    "tensor_parallel_size": 2,
                    "weight_transfer_config": {"backend": "gloo"},
                },
            },
        )

        sync._route.mode = mode  # mode=auto may change over

        async def play(sync: WeightSync = sync) -> None:
            for version, later in enumerate((False, False, True)):
                await sync._deliver(await sync._take(version, later))

        asyncio.run(play())
    assert met == [("gloo", 2)]
    numbers = [order.broadcast and order.broadcast.number for order in learners.orders]
    assert numbers == [0, 1, None, None, None, None, None, None, None]


class Decoding:
    """In the place of a `DecodeCheck`."""

    seconds = 0.0

    def __init__(self) -> None:
        self.proved: list[int] = []
        self.followed: list[int] = []
        self.told: list[str] = []

    async def prove(self, version: int) -> dict[str, float]:
        self.proved.append(version)
        return {"sync/canary": 1.0}

    async def follow(self, version: int, changed: float | None) -> dict[str, float]:
        self.followed.append(version)
        return {}


def proving(
    folder: Path, events: dict[int, Callable[[Any, Any], None]], **sections: Any
) -> tuple[list[int], Decoding]:
    """Versions 0 to 9; events: what happens before a version to the pool and the
    synchronisation."""
    pool: Any = FakePool()
    pool.restarts = 0
    learners: Any = FakeLearners()
    made = Decoding()
    sync = make(learners, pool, folder, made.told.append, **sections)
    sync.decoding, sync._follows = made, True  # type: ignore[assignment]

    async def play() -> None:
        for version in range(10):
            events.get(version, lambda *_: None)(pool, sync)
            await sync.publish(version, wait=not sections.get("schedule"))
        await sync.delivered()

    asyncio.run(play())
    return made.proved, made


def replaced(pool: Any, _: Any) -> None:
    pool.restarts += 1


def test_a_canary_at_the_start_after_replacements_and_every_so_often(tmp_path: Path) -> None:
    assert proving(tmp_path, {})[0] == [0]
    proved, decoding = proving(tmp_path, {4: replaced}, sync={"canary_every": 3})
    assert proved == [0, 3, 4, 7] and decoding.followed == list(range(10))


def test_rollouts_that_run_ahead_wait_for_a_canary_alone(tmp_path: Path) -> None:
    proved, decoding = proving(tmp_path, {4: replaced}, schedule={"max_staleness": 2})
    assert proved == [0, 4] and decoding.followed == []


def test_engines_that_were_started_anew_are_proved(tmp_path: Path) -> None:
    async def report(notice: WeightUpdate) -> list[dict[str, float]]:
        figures = await FakePool().serve(notice)
        return [each | {"engine_restarts": float(notice.version >= 6)} for each in figures]

    def patched(pool: Any, _: Any) -> None:
        pool.serve = report

    assert proving(tmp_path, {0: patched})[0] == [0, 6]


def test_colocated_engines_are_proved_in_a_bounded_share_of_the_time(tmp_path: Path) -> None:
    def spent(_: Any, sync: Any) -> None:
        sync.decoding.seconds = 1e9

    cluster = {"colocated": True, "learners": 1, "rollouts": 1}
    settings = {"cluster": cluster, "rollout": {"engine": "vllm"}}
    assert proving(tmp_path, {}, **settings)[0] == list(range(10))
    assert proving(tmp_path, {3: spent}, **settings)[0] == [0, 1, 2]
    assert proving(tmp_path, {3: spent, 5: replaced}, **settings)[0] == [0, 1, 2, 5]
    _, decoding = proving(tmp_path, {3: spent, 8: replaced}, **settings)
    told = [line for line in decoding.told if line.startswith("version")]
    assert [line.partition(":")[0] for line in told] == ["version 3", "version 8", "version 9"]
    assert "woke without a canary, since canaries have taken 1e+09 s, more than 5%" in told[0]
    assert told[1] == "version 8: a canary after 5 wakes without one"


def test_what_an_update_moves_is_said_beside_rounding(tmp_path: Path) -> None:
    told: list[str] = []
    learners: Any = FakeLearners()
    pool: Any = FakePool()
    sync = make(learners, pool, tmp_path, told.append)
    sync._probe_ids = (1, 2, 3)
    moves = iter([0.0, 0.1, 0.2, 0.2001, 0.2002])

    def said(batch: Any, temperature: float) -> Any:
        return np.log(np.array([0.5, 0.5, 0.5], np.float32)) + np.float32(next(moves))

    def noisy(ids: Any) -> Any:
        async def found() -> list[Any]:
            return [sync._expected + np.float32(0.004)]

        return found()

    learners.logprobs, pool.probe, pool.reload = said, noisy, print

    async def play() -> list[dict[str, float]]:
        return [await sync.publish(version) for version in range(5)]

    figures = asyncio.run(play())
    assert "sync/probe_moved_p" not in figures[0]
    assert figures[1]["sync/probe_moved_p"] == pytest.approx(0.5 * (math.exp(0.1) - 1), rel=1e-3)
    told = [line for line in told if line.startswith("version")]
    assert len(told) == 2
    assert told[0].startswith("version 1: the update moves the probabilities of 3 tokens by 0.053")
    assert (
        told[1].startswith("version 3") and "cannot tell whether an engine is a version" in told[1]
    )
