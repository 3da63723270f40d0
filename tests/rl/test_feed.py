"""The feed against a pool, a source and a grader that do as they are told: what goes wrong beside
the loop reaches it, and nothing that was admitted is forgotten."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import Future
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from emberl.rewards.verdict import Status, Verdict
from emberl.rl.config.load import resolve
from emberl.rl.feed import GroupFeed
from emberl.rl.groups import Group, Progress
from emberl.rl.weights.sync import WeightSync
from emberl.rollout.actors import ActorLostError
from emberl.rollout.crew import Job
from emberl.rollout.samples import Completion, Prompt, Sampling, Span


class Pool:
    """Answers at once for every problem that is not `silent`."""

    restarts = 0

    def __init__(self) -> None:
        self.served = 0
        self.changed = asyncio.Event()
        self.asked: list[Job] = []
        self.was_cut: list[str] = []
        self.silent: set[str] = set()

    def submit(self, jobs: Sequence[Job]) -> None:
        self.asked += jobs
        for job in jobs:
            if job.prompt.id not in self.silent:
                self.answer(job, self.served)

    async def served_after(self, version: int) -> int:
        while self.served <= version:
            self.changed.clear()
            await self.changed.wait()
        return self.served

    def serve(self, version: int) -> None:
        self.served = version
        self.changed.set()

    def answer(self, job: Job, version: int) -> None:
        job.finish(
            tuple(
                Completion(
                    prompt_id=job.prompt.id,
                    sample=i,
                    token_ids=np.array([5, 1], np.int32),
                    logprobs=np.zeros(2, np.float32),
                    spans=(Span(version, 0, 2),),
                    finish_reason="stop",
                )
                for i in range(job.n)
            )
        )

    def cut(self, jobs: Sequence[Job]) -> None:
        self.was_cut += [job.prompt.id for job in jobs]

    def idle_seconds(self) -> list[float]:
        return [0.0]


class Source:
    broken_from = 10**9

    def train(self, position: int) -> Prompt:
        if position >= self.broken_from:
            raise ValueError(f"data.path: row {position} has no prompt")
        return Prompt(id=f"p{position}", token_ids=(3, 4), answer="", source="test")


def fake_run(
    *,
    pending: tuple[tuple[int, int], ...] = (),
    flat: Sequence[int] = (),
    sampled: dict[str, Any] | None = None,
    **schedule: Any,
) -> Any:
    """flat: positions of problems whose answers are all worth the same; sampled: the `filter`
    section."""
    tree: dict[str, Any] = {
        "name": "t",
        "model": {"path": "somewhere"},
        "data": {"source": "arithmetic"},
        "rollout": {"group_size": 2},
    }
    config = resolve(
        {**tree, "schedule": {"prompts_per_step": 2, **schedule}, "filter": sampled or {}}
    )

    def grade(prompt: Prompt, completions: Sequence[Completion]) -> Group:
        scores = [1.0, float(int(prompt.id[1:]) in flat)]
        verdicts = tuple(Verdict(status=Status.PARTIAL, score=score) for score in scores)
        return Group(prompt=prompt, completions=tuple(completions), verdicts=verdicts)

    return SimpleNamespace(
        config=config,
        progress=Progress(pending=pending, position=1 + max((p for p, _ in pending), default=-1)),
        pool=Pool(),
        source=Source(),
        grade=grade,
        weights=SimpleNamespace(under_way=None, check=lambda: None),
        evaluation=None,
        suite=SimpleNamespace(finished=0),
        sampling=lambda step: Sampling(max_tokens=4, seed=step),
    )


def problems(groups: Sequence[Group]) -> list[str]:
    return [group.prompt.id for group in groups]


def play(run: Any, scenario: Callable[[GroupFeed], Awaitable[None]]) -> None:
    async def within() -> None:
        async with GroupFeed(run) as feed:
            await scenario(feed)

    asyncio.run(asyncio.wait_for(within(), 60))


def test_what_fails_while_groups_are_admitted_for_a_new_version_reaches_the_loop() -> None:
    run = fake_run(max_staleness=1)

    async def scenario(feed: GroupFeed) -> None:
        await feed.take(0)
        run.progress, run.source.broken_from = run.progress.advance(version=1), 4
        feed._schedule.close(1)
        run.pool.serve(1)  # there is room now, and no row to fill it
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        with pytest.raises(ValueError, match="row 4 has no prompt"):
            await feed.take(1)

    play(run, scenario)


def test_what_fails_while_a_group_is_marked_reaches_the_loop() -> None:
    run = fake_run()
    run.grade = lambda prompt, completions: 1 / 0

    async def scenario(feed: GroupFeed) -> None:
        with pytest.raises(ZeroDivisionError):
            await feed.take(0)

    play(run, scenario)


def test_a_delivery_that_fails_reaches_the_loop_while_it_waits() -> None:
    run = fake_run()
    run.pool.silent = {"p0"}

    async def deliver() -> dict[str, float]:
        await asyncio.sleep(0.1)
        raise ActorLostError("rollout worker 0 is gone")

    async def scenario(feed: GroupFeed) -> None:
        run.weights.under_way = asyncio.create_task(deliver())
        run.weights.check = lambda: WeightSync.check(run.weights)
        with pytest.raises(ActorLostError, match="rollout worker 0 is gone"):
            await feed.take(0)

    play(run, scenario)


def test_the_loop_is_told_by_name_when_no_group_comes() -> None:
    run = fake_run()
    run.pool.silent = {"p0"}

    async def scenario(feed: GroupFeed) -> None:
        feed._patience = 0.2
        with pytest.raises(
            ActorLostError, match=r"no group came within 0\.2 s, though 1 are under way"
        ):
            await feed.take(0)

    play(run, scenario)


def test_while_an_evaluation_keeps_the_workers_the_feed_waits_for_what_becomes_of_it() -> None:
    run = fake_run()
    run.pool.silent = {"p0"}

    async def evaluate() -> None:
        await asyncio.sleep(0.2)
        raise ActorLostError("rollout worker 1 is gone")

    async def scenario(feed: GroupFeed) -> None:
        feed._patience = 0.05
        run.evaluation = asyncio.create_task(evaluate())
        with pytest.raises(ActorLostError, match="rollout worker 1 is gone"):
            await feed.take(0)

    play(run, scenario)


def test_what_is_open_is_in_the_checkpoint_and_is_asked_for_again_first() -> None:
    run = fake_run(max_staleness=1)

    async def first(feed: GroupFeed) -> None:
        run.pool.silent = {"p1", "p3"}
        assert problems((await feed.take(0)).groups) == ["p0", "p2"]

    play(run, first)
    assert run.progress.position == 4
    assert run.progress.pending == ((1, 0), (3, 0))

    resumed = fake_run(max_staleness=1, pending=run.progress.pending)
    resumed.pool.silent = {"p4", "p5"}

    async def second(feed: GroupFeed) -> None:
        assert problems((await feed.take(1)).groups) == ["p1", "p3"]
        assert [job.prompt.id for job in resumed.pool.asked] == ["p1", "p3", "p4", "p5"]
        assert [job.sampling.seed for job in resumed.pool.asked] == [0, 0, 1, 1], (
            "the draws of the step that asked first"
        )

    play(resumed, second)


@pytest.mark.parametrize(
    ("rounds", "flat", "ids", "signals"),
    [
        (3, [0, 2], ["p0", "p1", "p2", "p3"], [False, True, False, True]),
        (2, range(100), ["p0", "p1", "p2", "p3"], [False] * 4),  # it gives up after two rounds
    ],
)
def test_dynamic_sampling_replaces_groups_without_signal_and_still_shows_them(
    rounds: int, flat: Sequence[int], ids: list[str], signals: list[bool]
) -> None:
    run = fake_run(sampled={"dynamic_sampling": True, "max_rounds": rounds}, flat=flat)

    async def scenario(feed: GroupFeed) -> None:
        got = await feed.take(0)
        assert problems(got.groups) == ids
        assert [group.has_signal for group in got.groups] == signals

    play(run, scenario)


def test_a_group_cut_while_it_is_marked_is_gone() -> None:
    marked: dict[str, Future[None]] = {f"p{i}": Future() for i in range(12)}
    run = fake_run(oversample=1.5)
    grade = run.grade

    def slow(prompt: Prompt, completions: Sequence[Completion]) -> Group:
        marked[prompt.id].result(timeout=10)
        return grade(prompt, completions)

    run.grade = slow

    async def scenario(feed: GroupFeed) -> None:
        for name in ("p0", "p2"):
            marked[name].set_result(None)
        assert problems((await feed.take(0)).groups) == ["p0", "p2"]
        run.progress = run.progress.advance(version=1)
        run.pool.serve(1)
        for i in range(3, 12):
            marked[f"p{i}"].set_result(None)
        got = await feed.take(1)
        marked["p1"].set_result(None)
        assert "p1" in run.pool.was_cut and "p1" not in problems(got.groups)
        feed._schedule.check()
        assert got.metrics["sched/groups_evicted"] == 1

    play(run, scenario)
