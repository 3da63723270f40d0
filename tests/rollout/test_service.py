"""Groups in flight when new weights come: what each way does to tokens, versions and to groups that
come later."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from emberl.rollout.embedded.engine import EmbeddedEngine
from emberl.rollout.embedded.model import Decoder
from emberl.rollout.samples import Completion, Prompt, Sampling, Span
from emberl.rollout.weights.patch import WeightPatch, dense_patch
from emberl.rollout.worker import GroupService

MakeDecoder = Callable[..., Decoder]
MakePrompt = Callable[..., Prompt]
LONG, SHORT = Sampling(max_tokens=150), Sampling(max_tokens=2)


def patch_of(decoder: Decoder, version: int) -> WeightPatch:
    copied = {name: decoder.tensor_bytes(name) for name in decoder.weights}
    return dense_patch(
        "run", version, [(n, replace(t, data=t.data.copy())) for n, t in copied.items()]
    )


async def collect(service: GroupService, requests: list[Any]) -> dict[int, tuple[Completion, ...]]:
    return {i: group async for groups in service.generate(requests) for i, group in groups}


async def until_steps(service: GroupService, steps: int) -> None:
    engine = service.engine
    assert isinstance(engine, EmbeddedEngine)
    while engine.counters.decode_steps < steps:
        await asyncio.sleep(0.001)


def scenario(make_decoder: MakeDecoder, make_prompt: MakePrompt, in_flight: Any) -> tuple[Any, ...]:
    """Two groups of two in flight (one of the four samples without a slot), an update, and a group
    that comes during it."""

    async def play() -> tuple[Any, ...]:
        engine = EmbeddedEngine(make_decoder(0), max_num_seqs=3, max_model_len=200, run_id="run")
        service = GroupService(engine, in_flight)
        early = asyncio.create_task(
            collect(service, [(make_prompt("a"), 2, LONG), (make_prompt("b"), 2, LONG)])
        )
        await until_steps(service, 20)
        update = asyncio.create_task(service.apply(patch_of(make_decoder(1), 1)))
        await asyncio.sleep(0)
        late = asyncio.create_task(collect(service, [(make_prompt("c"), 2, SHORT)]))
        version = await update
        steps = engine.counters.decode_steps
        groups = await early | {2: (await late)[0]}
        await engine.close()
        return version, steps, groups

    return asyncio.run(asyncio.wait_for(play(), 60))


def spans(groups: dict[int, tuple[Completion, ...]]) -> dict[str, tuple[Span, ...]]:
    return {f"{c.prompt_id}{c.sample}": c.spans for group in groups.values() for c in group}


def test_update_goes_on_with_new_weights_at_once(
    make_decoder: MakeDecoder, make_prompt: MakePrompt
) -> None:
    version, steps, groups = scenario(make_decoder, make_prompt, "update")
    found = spans(groups)
    assert version == 1 and steps < 100 and len(found) == 6
    for name in ("a0", "a1", "b0"):
        assert [span.version for span in found[name]] == [0, 1] and found[name][1].stop == 150
    assert found["b1"] == (Span(1, 0, 150),), "it had no slot before"


def test_finish_ends_what_is_in_flight_before_the_update_and_begins_nothing(
    make_decoder: MakeDecoder, make_prompt: MakePrompt
) -> None:
    version, steps, groups = scenario(make_decoder, make_prompt, "finish")
    found = spans(groups)
    assert version == 1 and steps >= 150
    assert {found[name] for name in ("a0", "a1", "b0", "b1")} == {(Span(0, 0, 150),)}
    assert found["c0"] == found["c1"] == (Span(1, 0, 2),), (
        "what came during the update waited for it"
    )


def test_parked_groups_go_on_from_where_they_stood(
    make_decoder: MakeDecoder, make_prompt: MakePrompt
) -> None:
    version, steps, groups = scenario(make_decoder, make_prompt, "park")
    found = spans(groups)
    assert version == 1 and steps < 100 and len(found) == 6
    for name in ("a0", "a1", "b0"):
        first, second = found[name]
        assert (first.version, second.version, second.stop) == (0, 1, 150) and first.stop >= 20
    assert found["b1"] == (Span(1, 0, 150),)


@pytest.mark.parametrize("in_flight", ["update", "park"])
def test_a_cut_group_gives_back_what_it_had_and_holds_up_nobody(
    make_decoder: MakeDecoder, make_prompt: MakePrompt, in_flight: Any
) -> None:
    async def play() -> tuple[Any, ...]:
        engine = EmbeddedEngine(make_decoder(0), max_num_seqs=8, max_model_len=200, run_id="run")
        service = GroupService(engine, in_flight)
        requests = [
            (make_prompt("a"), 2, LONG),
            (make_prompt("b"), 2, replace(LONG, max_tokens=60)),
        ]
        both = asyncio.create_task(collect(service, requests))
        await until_steps(service, 20)
        parts = await service.cut(["a", "unknown"])
        assert await service.cut(["a"]) == []
        groups = await both
        await engine.close()
        return parts, groups

    parts, groups = asyncio.run(asyncio.wait_for(play(), 60))
    assert [sorted(c.sample for c in group) for group in parts] == [[0, 1]]
    assert all(20 <= len(c) < 150 and c.finish_reason == "abort" for c in parts[0])
    assert list(groups) == [1] and [len(c) for c in groups[1]] == [60, 60]


def test_two_updates_at_once_open_the_gate_after_the_second(
    make_decoder: MakeDecoder, make_prompt: MakePrompt
) -> None:
    async def play() -> tuple[Any, ...]:
        engine = EmbeddedEngine(make_decoder(0), max_num_seqs=8, max_model_len=200, run_id="run")
        service = GroupService(engine, "finish")
        early = asyncio.create_task(collect(service, [(make_prompt("a"), 1, LONG)]))
        await until_steps(service, 20)
        updates = [asyncio.create_task(service.apply(patch_of(make_decoder(v), v))) for v in (1, 2)]
        await asyncio.sleep(0)
        late = asyncio.create_task(collect(service, [(make_prompt("c"), 1, SHORT)]))
        versions = await asyncio.gather(*updates)
        groups = spans(await early) | spans(await late)
        await engine.close()
        return versions, groups

    versions, groups = asyncio.run(asyncio.wait_for(play(), 60))
    assert versions == [1, 2] and groups == {"a0": (Span(0, 0, 150),), "c0": (Span(2, 0, 2),)}
