"""Ranks that hold parts of the weights publish what one rank that holds all would, and every engine
gets exactly that."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from emberl.rl.learner.publisher import Published, Publisher, PublishRequest, first_row, shards_of
from emberl.rollout.receiver import Receiver
from emberl.rollout.vllm_backend import transfer as native
from emberl.rollout.vllm_backend.transfer import GroupMember
from emberl.rollout.weights.diff import Shard
from emberl.rollout.weights.engine_transfer import Broadcast
from emberl.rollout.weights.transport import FetchContext, FileSource, WeightUpdate
from table_engine import TableEngine
from torch import nn

SHAPES = {"up": (5, 300), "norm": (3,), "one": (1, 8), "none": (0, 4)}
"""Rows that no number of ranks divides, fewer rows than ranks, and none at all."""


def weights(version: int) -> dict[str, torch.Tensor]:
    """bfloat16 values of which a few change from one version to the next."""
    found = {}
    for seed, (name, shape) in enumerate(SHAPES.items()):
        values = (
            torch.from_numpy(np.random.default_rng(seed).normal(0, 0.02, shape))
            .bfloat16()
            .view(torch.int16)
        )
        for step in range(version):
            mask = np.random.default_rng((seed, step)).random(shape) < 0.02
            values = values + torch.from_numpy(mask.astype(np.int16))
        found[name] = values.view(torch.bfloat16)
    return found


def shard(version: int, rank: int, world: int) -> dict[str, Shard]:
    found = {}
    for name, whole in weights(version).items():
        start, stop = first_row(SHAPES[name], rank, world), first_row(SHAPES[name], rank + 1, world)
        rows = whole[start:stop].contiguous()
        per_row = int(np.prod(SHAPES[name][1:]))
        data = rows.view(-1).view(torch.uint8).numpy()
        found[name] = Shard(dtype="BF16", shape=SHAPES[name], start=start * per_row, data=data)
    return found


def publish(
    ranks: Sequence[Publisher], version: int, folder: Path, *, patch: bool, anchor: bool = False
) -> Published:
    for rank, publisher in enumerate(ranks):
        publisher.take(shard(version, rank, len(ranks)))
    order = PublishRequest(
        run_id="run", version=version, patch=patch, anchor=anchor, directory=str(folder)
    )
    return ranks[0].publish(order, [publisher.part(whole=not patch) for publisher in ranks[1:]])


def ranks(world: int) -> list[Publisher]:
    return [Publisher(rank=rank, world=world, threads=1) for rank in range(world)]


def worker() -> tuple[Any, Receiver]:
    engine: Any = TableEngine()
    return engine, Receiver(engine, FetchContext(timeout=10.0))


def notice(found: Published) -> WeightUpdate:
    patches = () if found.patch is None else (found.patch,)
    anchors = () if found.anchor is None else (found.anchor,)
    return WeightUpdate(
        run_id="run",
        attempt=0,
        version=found.version,
        root=found.root,
        patches=patches,
        anchors=anchors,
    )


@pytest.mark.parametrize("world", [1, 2, 3])
def test_any_number_of_ranks_publishes_the_same_weights(world: int, tmp_path: Path) -> None:
    publishers = ranks(world)
    engine, receiver = worker()
    for version in range(4):
        found = publish(publishers, version, tmp_path, patch=version in (1, 3))
        assert (found.patch is None, found.anchor is None) == (
            version not in (1, 3),
            version in (1, 3),
        )
        asyncio.run(receiver.catch_up(notice(found)))
        for name, whole in weights(version).items():
            assert bytes(engine.tensors[name].data) == bytes(
                whole.contiguous().view(-1).view(torch.uint8).numpy()
            )
        changed = sum(
            int((a != b).sum())
            for a, b in zip(
                weights(version).values(), weights(max(0, version - 1)).values(), strict=True
            )
        )
        if found.patch is not None:
            assert found.changed == changed / (1500 + 3 + 8)
            assert 0 < found.patch.size < 800
        elif version:
            assert (
                found.changed == pytest.approx(changed / (1500 + 3 + 8), abs=1e-9) or world > 1
            ), "a guess of its own shard"


def test_an_anchor_beside_a_patch_holds_the_new_weights(tmp_path: Path) -> None:
    publishers = ranks(2)
    publish(publishers, 0, tmp_path, patch=False)
    found = publish(publishers, 1, tmp_path, patch=True, anchor=True)
    assert (
        found.patch is not None
        and found.anchor is not None
        and isinstance(found.anchor.places[0], FileSource)
    )
    engine, late = worker()
    report = asyncio.run(late.catch_up(notice(found)))
    assert report["wire_bytes"] == found.anchor.size and engine.held.root == found.root
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "00000000.anchor", "00000001-from-00000000.patch", "00000001.anchor",
    ]  # fmt: skip


@pytest.mark.slow
def test_a_thousand_versions_in_a_chain(tmp_path: Path) -> None:
    """Two ranks, patches only: every version bit for bit, the last one reached from version 0 in
    1,000 steps too."""
    publishers = ranks(2)
    engine, receiver = worker()
    rng, values = (
        np.random.default_rng(0),
        np.random.default_rng(1).integers(0x3C00, 0x3D00, (4, 60)).astype(np.uint16),
    )
    patches, first = [], None
    for version in range(1001):
        for rank, publisher in enumerate(publishers):
            data = values[2 * rank : 2 * rank + 2].copy().reshape(-1).view(np.uint8)
            publisher.take({"w": Shard(dtype="BF16", shape=(4, 60), start=120 * rank, data=data)})
        order = PublishRequest(
            run_id="run",
            version=version,
            patch=version > 0,
            anchor=version == 0,
            directory=str(tmp_path),
        )
        found = publishers[0].publish(order, [publishers[1].part(whole=version == 0)])
        first = first or found.anchor
        patches += [found.patch] if found.patch is not None else []
        asyncio.run(receiver.catch_up(notice(found)))
        assert bytes(engine.tensors["w"].data) == values.tobytes()
        values = (values + rng.choice(np.array([-1, 0, 0, 0, 1]), (4, 60))).astype(np.uint16)
    assert first is not None
    second, late = worker()
    whole = WeightUpdate(
        run_id="run",
        attempt=0,
        version=1000,
        root=engine.held.root,
        patches=tuple(patches),
        anchors=(first,),
    )
    assert asyncio.run(late.catch_up(whole))["replays"] == 1000
    assert bytes(second.tensors["w"].data) == bytes(engine.tensors["w"].data)


def test_shards_are_copies_in_the_dtype_that_is_served() -> None:
    """Tied weights come once, under the name that Hugging Face saves them by."""
    model: Any = nn.Module()
    model.embed, model.head = nn.Embedding(3, 2), nn.Linear(2, 3, bias=False)
    model.head.weight = model.embed.weight
    found = shards_of(model, torch.bfloat16, 0, 1)
    assert list(found) == ["embed.weight"]
    before = bytes(found["embed.weight"].data)
    assert before == bytes(model.embed.weight.detach().bfloat16().view(torch.uint8).numpy())
    same = shards_of(model, torch.float32, 0, 1)["embed.weight"].data.copy()
    kept = shards_of(model, torch.float32, 0, 1)["embed.weight"]
    with torch.no_grad():
        model.embed.weight += 1
    assert np.array_equal(kept.data, same), (
        "the optimizer's next step must not reach what is being published"
    )


def test_a_version_is_sent_into_the_engines_and_lies_ready_for_who_misses_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent: list[dict[str, torch.Tensor]] = []
    monkeypatch.setattr(native, "open_group", lambda group, timeout: sent.append)
    (publisher,) = ranks(1)
    group = publisher.meet("cpu", 1, 10.0, "gloo", 2)
    for version in range(2):
        publisher.take(shard(version, 0, 1))
        broadcast = Broadcast(group=group, number=version, timeout=10.0)
        order = PublishRequest(
            run_id="run",
            version=version,
            patch=False,
            anchor=True,
            directory=str(tmp_path),
            broadcast=broadcast,
        )
        found = publisher.publish(order)
        engines = found.engines
        assert engines is not None and engines.broadcast == broadcast
        assert engines.tensors == {name: ("BF16", shape) for name, shape in SHAPES.items()}
        with ThreadPoolExecutor() as threads:
            coming = threads.submit(GroupMember().join, broadcast, group)
            publisher.broadcast()
            coming.result(10.0)
        assert all(
            torch.equal(sent[version][name], tensor) for name, tensor in weights(version).items()
        )
        assert found.anchor is not None and [type(place) for place in found.anchor.places] == [
            FileSource
        ]
        engine, receiver = worker()
        asyncio.run(receiver.catch_up(notice(found)))
        assert engine.held.digests == engines.digests
