"""The feed against a pool, a source and a grader that do as they are told: what goes wrong in
others' threads reaches the loop, and nothing that was admitted is forgotten."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from emberl.rewards.verdict import Status, Verdict
from emberl.rl.checkpoints import Progress
from emberl.rl.config.load import resolve
from emberl.rl.feed import GroupFeed
from emberl.rl.groups import Group
from emberl.rollout.actors import ActorLostError
from emberl.rollout.jobs import Job
from emberl.rollout.samples import Completion, Prompt, Sampling, Span


class Pool:
    """Answers at once, in the caller's thread, for every problem that is not `silent`."""

    restarts = 0

    def __init__(self) -> None:
        self.served = 0
        self.on_served: Callable[[], None] = lambda: None
        self.asked: list[Job] = []
        self.was_cut: list[str] = []
        self.silent: set[str] = set()

    def submit(self, jobs: Sequence[Job]) -> None:
        self.asked += jobs
        for job in jobs:
            if job.prompt.id not in self.silent:
                self.answer(job, self.served)

    def answer(self, job: Job, version: int) -> None:
        job.deliver(
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
        check_delivery=lambda: None,
        suite=SimpleNamespace(finished=0),
        sampling=lambda step: Sampling(max_tokens=4, seed=step),
    )


def problems(groups: Sequence[Group]) -> list[str]:
    return [group.prompt.id for group in groups]


def in_another_thread(work: Callable[[], None]) -> None:
    thread = threading.Thread(target=work)
    thread.start()
    thread.join(timeout=10)
    assert not thread.is_alive()


def test_what_fails_while_groups_are_admitted_in_another_thread_reaches_the_loop() -> None:
    run = fake_run(max_staleness=1)
    with GroupFeed(run) as feed:
        feed.take(0)
        run.progress, run.source.broken_from = run.progress.advance(version=1), 4
        run.pool.served = 1
        feed._schedule.close(1)
        # as the courier does: there is room now, and no row to fill it
        in_another_thread(run.pool.on_served)
        with pytest.raises(ValueError, match="row 4 has no prompt"):
            feed.take(1)


def test_what_fails_while_a_group_is_marked_reaches_the_loop() -> None:
    run = fake_run()
    run.grade = lambda prompt, completions: 1 / 0
    with GroupFeed(run) as feed, pytest.raises(ZeroDivisionError):
        feed.take(0)


def test_the_loop_is_told_by_name_when_no_group_comes() -> None:
    run = fake_run()
    run.pool.silent = {"p0"}
    with GroupFeed(run) as feed:
        feed._patience = 0.2
        with pytest.raises(
            ActorLostError, match=r"no group came within 0\.2 s, though 1 are under way"
        ):
            feed.take(0)


def test_what_is_open_is_in_the_checkpoint_and_is_asked_for_again_first() -> None:
    run = fake_run(max_staleness=1)
    with GroupFeed(run) as feed:
        run.pool.silent = {"p1", "p3"}
        first = feed.take(0)
        assert problems(first.groups) == ["p0", "p2"]
    assert run.progress.position == 4
    assert run.progress.pending == ((1, 0), (3, 0))

    resumed = fake_run(max_staleness=1, pending=run.progress.pending)
    resumed.pool.silent = {"p4", "p5"}
    with GroupFeed(resumed) as feed:
        assert problems(feed.take(1).groups) == ["p1", "p3"]
        assert [job.prompt.id for job in resumed.pool.asked] == ["p1", "p3", "p4", "p5"]
        assert [job.sampling.seed for job in resumed.pool.asked] == [0, 0, 1, 1], (
            "the draws of the step that asked first"
        )


def test_dynamic_sampling_replaces_groups_without_signal_and_still_shows_them() -> None:
    run = fake_run(sampled={"dynamic_sampling": True, "max_rounds": 3}, flat=[0, 2])
    with GroupFeed(run) as feed:
        got = feed.take(0)
    assert problems(got.groups) == ["p0", "p1", "p2", "p3"]
    assert [group.has_signal for group in got.groups] == [False, True, False, True]


def test_dynamic_sampling_gives_up_after_its_rounds() -> None:
    run = fake_run(sampled={"dynamic_sampling": True, "max_rounds": 2}, flat=range(100))
    with GroupFeed(run) as feed:
        got = feed.take(0)
    assert not any(group.has_signal for group in got.groups)
    assert len(got.groups) == 4, "two rounds of two"


def test_a_group_cut_while_it_is_marked_is_gone() -> None:
    marked: dict[str, Future[None]] = {f"p{i}": Future() for i in range(12)}
    run = fake_run(oversample=1.5)
    grade = run.grade

    def slow(prompt: Prompt, completions: Sequence[Completion]) -> Group:
        marked[prompt.id].result(timeout=10)
        return grade(prompt, completions)

    run.grade = slow
    with GroupFeed(run) as feed:
        for name in ("p0", "p2"):
            marked[name].set_result(None)
        assert problems(feed.take(0).groups) == ["p0", "p2"]
        run.progress = run.progress.advance(version=1)
        run.pool.served = 1
        for i in range(3, 12):
            marked[f"p{i}"].set_result(None)
        got = feed.take(1)
        marked["p1"].set_result(None)
        assert "p1" in run.pool.was_cut and "p1" not in problems(got.groups)
        feed._schedule.check()
        assert got.metrics["sched/groups_evicted"] == 1
