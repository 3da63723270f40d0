"""An evaluation beside the training: learners go on, its figures stand at its own step, and no
checkpoint forgets or doubles it."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from emberl.rewards.inputs import Reward, RewardInput
from emberl.rewards.suite import Part, RewardSuite, build_suite
from emberl.rewards.verdict import Verdict, verifier_error
from emberl.rl.checkpoints import read_progress
from emberl.rl.config.load import resolve
from emberl.rl.eval_sets import HELD_OUT, EvalSet
from emberl.rl.evaluate import begin_evaluation
from emberl.rl.groups import Progress
from emberl.rl.run import Run
from emberl.rollout.actors import ActorLostError
from emberl.rollout.crew import Job
from emberl.rollout.samples import Completion, Prompt, Span

DIGITS = {5: "1", 6: "2", 1: "<eos>"}


class Tokenizer:
    chat_template = bos_token_id = pad_token_id = None
    eos_token_id = 1
    added_tokens_decoder: Mapping[int, Any] = {}

    def decode(self, token_ids: Sequence[int]) -> str:
        return "".join(DIGITS[token] for token in token_ids)


class Weights:
    """What the evaluation asks of them, in order."""

    probe = SimpleNamespace(level=None)

    def __init__(self) -> None:
        self.said: list[str] = []

    async def delivered(self) -> dict[str, float]:
        return {}

    def hold(self, version: int) -> None:
        self.said.append(f"hold {version}")

    async def serving(self, version: int) -> None:
        self.said.append(f"serving {version}")

    def release(self) -> None:
        self.said.append("release")


class Pool:
    def __init__(self) -> None:
        self.jobs: list[Job] = []

    def submit(self, jobs: Sequence[Job]) -> None:
        self.jobs += jobs

    async def asked(self, count: int) -> list[Job]:
        while len(self.jobs) < count:
            await asyncio.sleep(0.001)
        return self.jobs


def answer(job: Job, token: int) -> None:
    job.finish(
        (
            Completion(
                prompt_id=job.prompt.id,
                sample=0,
                token_ids=np.array([token, 1], np.int32),
                logprobs=np.zeros(2, np.float32),
                spans=(Span(7, 0, 2),),
                finish_reason="stop",
            ),
        )
    )


def make(folder: Path, max_staleness: int, **progress: Any) -> tuple[Any, list[Any]]:
    """A run at step 3 and version 7 that holds out two problems, whose answers are 1; its rows."""
    suite = build_suite({"answer": {"use": "math"}})
    prompts = [Prompt(id=f"h/{i}", token_ids=(5,), answer="1", source="h") for i in range(2)]
    rows: list[Any] = []
    alerts: list[tuple[str, str]] = []
    tree = {"name": "run", "model": {"path": "m"}, "data": {"source": "arithmetic"}}
    run: Any = Run(
        config=resolve({**tree, "schedule": {"max_staleness": max_staleness}}),
        run_id="run",
        run_dir=folder,
        tokenizer=Tokenizer(),
        source=None,  # type: ignore[arg-type]
        suite=suite,
        learners=SimpleNamespace(  # type: ignore[arg-type]
            snapshot=lambda: None, write=lambda folder: None
        ),
        pool=Pool(),  # type: ignore[arg-type]
        weights=Weights(),  # type: ignore[arg-type]
        tracker=SimpleNamespace(  # type: ignore[arg-type]
            log=lambda *row: rows.append(row),
            samples=lambda *_: None,
            doing=lambda what: nullcontext(),
            spans=SimpleNamespace(span=lambda *_: nullcontext()),
            keep=lambda *_: None,
            alert=lambda *said: alerts.append(said),
            alerts=alerts,
        ),
        stop=None,  # type: ignore[arg-type]
        started=time.time(),
        progress=Progress(step=3, version=7, accuracy_end=0.25),
        eval_sets=(EvalSet(name=HELD_OUT, prompts=prompts, samples=1, sampling={}, suite=suite),),
        stop_token_ids=(1,),
    )
    return run, rows


def play(work: Any) -> None:
    asyncio.run(asyncio.wait_for(work(), 30))


def test_learners_go_on_and_the_figures_stand_at_their_own_step(tmp_path: Path) -> None:
    run, rows = make(tmp_path, max_staleness=1)

    async def scenario() -> None:
        await begin_evaluation(run)
        assert run.progress.evaluating == 3
        assert run.weights.said == ["hold 7"], "before the learners can publish anything"
        await run.save()  # which does not wait for it
        await run.saved()
        run.progress = run.progress.advance(step=4, version=8)
        right, wrong = await run.pool.asked(2)
        answer(right, 5)
        await asyncio.sleep(0.05)
        assert run.weights.said == ["hold 7", "serving 7"] and rows == []
        answer(wrong, 6)
        await run.evaluated()

    play(scenario)
    assert run.weights.said == ["hold 7", "serving 7", "release"]
    ((step, metrics, axis, show),) = rows
    assert (step, axis, show) == (3, "eval", {"held-out accuracy": "50.0%"})
    assert metrics["val-aux/version/oldest"] == metrics["val-aux/version/newest"] == 7
    assert (run.progress.step, run.progress.accuracy_end) == (4, 0.5)
    assert run.suite.metrics()["reward/answer/status/correct"] == 0, "it is no training step's"
    (checkpoint,) = (tmp_path / "checkpoints").iterdir()
    written = json.loads((checkpoint / "progress.json").read_text())
    assert (written["evaluating"], written["accuracy_end"]) == (3, 0.25)
    read = read_progress(checkpoint)
    assert (read.step, read.evaluating, read.accuracy_end) == (3, None, 0.5)


def test_a_later_checkpoint_waits_for_what_it_could_not_repeat(tmp_path: Path) -> None:
    run, _ = make(tmp_path, max_staleness=1)

    async def scenario() -> None:
        await begin_evaluation(run)
        run.progress = run.progress.advance(step=4)
        saving = asyncio.create_task(run.save())
        jobs = await run.pool.asked(2)
        await asyncio.sleep(0.05)
        assert not saving.done() and not (tmp_path / "checkpoints").exists()
        for job in jobs:
            answer(job, 5)
        await saving
        await run.saved()

    play(scenario)
    (checkpoint,) = (tmp_path / "checkpoints").iterdir()
    assert read_progress(checkpoint).evaluating is None
    assert read_progress(checkpoint).accuracy_end == 1.0


def test_an_evaluation_that_fails_lets_the_weights_go_and_says_so(tmp_path: Path) -> None:
    run, rows = make(tmp_path, max_staleness=1)

    async def scenario() -> None:
        await begin_evaluation(run)
        (await run.pool.asked(2))[1].fail(ActorLostError("rollout worker 0 is gone"))
        with pytest.raises(ActorLostError, match="worker 0 is gone"):
            await run.evaluated()

    play(scenario)
    assert run.weights.said[-1] == "release" and rows == []


class Broken(Reward):
    def __call__(self, batch: Sequence[RewardInput], /) -> list[Verdict]:
        return [verifier_error("no such host") for _ in batch]


def test_a_figure_without_verdicts_is_said_to_be_one(tmp_path: Path) -> None:
    run, rows = make(tmp_path, max_staleness=0)
    suite = RewardSuite([Part(name="answer", reward=Broken())])
    run.eval_sets = (replace(run.eval_sets[0], suite=suite),)

    async def scenario() -> None:
        evaluation = asyncio.create_task(begin_evaluation(run))
        for job in await run.pool.asked(2):
            answer(job, 5)
        await evaluation

    play(scenario)
    assert run.tracker.alerts == [
        (
            "verifier errors",
            "evaluation at step 3: 2 of 2 completions have no verdict (limit 1.0%); the causes:"
            " 2 x answer: no such host; these count as not right",
        )
    ]
    assert rows[0][1]["val-core/accuracy"] == 0.0


def test_where_they_take_turns_the_learners_wait(tmp_path: Path) -> None:
    run, rows = make(tmp_path, max_staleness=0)

    async def scenario() -> None:
        evaluation = asyncio.create_task(begin_evaluation(run))
        for job in await run.pool.asked(2):
            assert not evaluation.done()
            answer(job, 5)
        await evaluation

    play(scenario)
    assert run.weights.said == [] and run.evaluation is None
    assert run.progress.accuracy_end == 1.0
    assert "val-aux/version/oldest" not in rows[0][1]
