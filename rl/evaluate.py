"""Evaluation of a run on held-out problems, with the weights that its engines serve.

If rollouts and learners take turns, both wait for it. If `schedule.max_staleness` lets rollouts run
ahead, its prompts go to the workers besides those of the training, and the learners go on: the
workers keep the evaluated version until all its answers are there, so that each is by that version,
and training continues with that version's samples as far as the bound allows.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ..rewards.suite import TooManyErrors, check_errors
from ..rollout.samples import Completion
from .checkpoints import CHECKPOINTS, add_evaluation
from .eval_sets import HELD_OUT, EvalSet
from .evaluation.generation import sampled
from .evaluation.measures import accuracy, metrics, reward
from .evaluation.votes import Same, by_reward, outcomes
from .groups import Group
from .run import GRADERS, Run
from .watch.tracking import sample_rows


@dataclass(frozen=True, kw_only=True, slots=True)
class Evaluation:
    """The result of one evaluation."""

    accuracy: float
    """mean@n over all problems: the fraction of answers that are correct."""
    reward: float
    """The mean score of the answers that have one."""
    metrics: dict[str, float]


Marks = Mapping[int | None, Mapping[int, asyncio.Task[Group]]]
"""Grading tasks of one set: thinking budget (None: without one) -> index of the problem -> task."""


async def begin_evaluation(run: Run) -> None:
    """Evaluates the current weights, those of step `run.progress.step`. With `max_staleness` 0 it
    is done when this returns; else it continues as the task `run.evaluation`, one at a time."""
    step, version = run.progress.step, run.progress.version
    if not run.config.schedule.max_staleness:
        _keep(run, step, await evaluate(run))
        return
    await run.evaluated()
    run.weights.hold(version)
    run.progress = run.progress.advance(evaluating=step)
    run.evaluation = asyncio.create_task(_beside(run, step, version))
    # retrieves its error: if the run fails otherwise first nobody awaits it, and asyncio complains
    run.evaluation.add_done_callback(lambda task: task.cancelled() or task.exception())


async def _beside(run: Run, step: int, version: int) -> None:
    """An evaluation while the learners go on."""
    try:
        await run.weights.serving(version)
        with run.tracker.spans.span("evaluation", "decoding"):
            marks = await asyncio.gather(*(_decoded(run, each, step) for each in run.eval_sets))
    finally:
        run.weights.release()
    result = await _logged(run, step, marks, with_versions=True)
    _keep(run, step, result)
    add_evaluation(run.run_dir / CHECKPOINTS / run.checkpoint(step), run.progress)


def _keep(run: Run, step: int, result: Evaluation) -> None:
    changed = {"accuracy_end": result.accuracy} if step else {"accuracy_start": result.accuracy}
    run.progress = run.progress.advance(evaluating=None, **changed)


async def evaluate(run: Run) -> Evaluation:
    """Samples answers to all evaluation sets with the weights that the engines serve, grades and
    logs them."""
    await run.weights.delivered()
    step = run.progress.step
    with run.tracker.doing("evaluating"):
        marks = [await _decoded(run, problems, step) for problems in run.eval_sets]
        return await _logged(run, step, marks)


async def _decoded(run: Run, problems: EvalSet, step: int) -> Marks:
    """Samples all answers to a set; returns their grading tasks, which may still run."""
    sampling = problems.sampled(run.sampling(0))
    # apart, so that the reward's metrics of a training step leave these answers out
    suite = problems.suite.apart()
    slots = asyncio.Semaphore(GRADERS)

    async def mark(index: int, completions: Sequence[Completion]) -> Group:
        async with slots:
            return await asyncio.to_thread(
                run.grade, problems.prompts[index], completions, suite, sampling.max_tokens, step
            )

    marks: dict[int | None, dict[int, asyncio.Task[Group]]] = {}
    async for index, budget, completions in sampled(
        run.pool, problems.prompts, problems.samples, sampling, problems.thinking
    ):
        marks.setdefault(budget, {})[index] = asyncio.create_task(mark(index, completions))
    return marks


async def _logged(
    run: Run, step: int, marks: Sequence[Marks], *, with_versions: bool = False
) -> Evaluation:
    """Waits for all grading, then logs and returns the metrics of all sets. with_versions: also log
    the oldest and newest version that sampled."""
    shown = run.config.tracking.samples
    metrics: dict[str, float] = {}
    show: dict[str, str] = {}
    rows: list[dict[str, str]] = []
    results: list[Evaluation] = []
    kept: list[Group] = []
    versions: set[int] = set()
    for problems, of_set in zip(run.eval_sets, marks, strict=True):
        for budget, tasks in of_set.items():
            groups = [await tasks[index] for index in range(len(problems.prompts))]
            texts = [[run.answers.text(g.prompt, c) for c in g.completions] for g in groups]
            name = problems.name if budget is None else f"{problems.name}@{budget}"
            same = by_reward(problems.suite.apart())
            result = await asyncio.to_thread(summarise, groups, texts, same, name)
            metrics |= result.metrics
            show |= _line(name or "held-out", result)
            versions |= {s.version for g in groups for c in g.completions for s in c.spans}
            if budget is None:
                results.append(result)
                first = groups[:shown]
                answers = [t[0] for t in texts[:shown]]
                rows += sample_rows(first, answers, [run.answers.problem(g.prompt) for g in first])
                kept += groups
    if not any(problems.name == HELD_OUT for problems in run.eval_sets):
        metrics["val-core/accuracy"] = float(np.mean([r.accuracy for r in results]))
        metrics["val-core/reward"] = float(np.mean([r.reward for r in results]))
    if with_versions:
        metrics |= {
            "val-aux/version/oldest": float(min(versions)),
            "val-aux/version/newest": float(max(versions)),
        }
    try:
        check_errors([v for g in kept for v in g.verdicts], run.config.reward.max_error_fraction)
    except TooManyErrors as error:  # no reason to end the run: only this metric suffers
        text = f"evaluation at step {step}: {error}; these count as not right"
        run.tracker.alert("verifier errors", text)
    run.tracker.log(step, metrics, "eval", show)
    run.tracker.samples(step, rows)
    await asyncio.to_thread(run.tracker.keep, "eval", step, kept, run.answers)
    return Evaluation(
        accuracy=metrics["val-core/accuracy"], reward=metrics["val-core/reward"], metrics=metrics
    )


def _line(name: str, result: Evaluation) -> dict[str, str]:
    """A set's results as shown on the console."""
    line = {f"{name} accuracy": f"{result.accuracy:.1%}"}
    # a reward that is not just 0 or 1, about which the accuracy says little
    if abs(result.reward - result.accuracy) > 1e-9:
        line[f"{name} reward"] = f"{result.reward:.3f}"
    return line


def summarise(
    groups: Sequence[Group],
    texts: Sequence[Sequence[str]],
    same: Same | None = None,
    name: str = HELD_OUT,
) -> Evaluation:
    """Metrics of graded groups of n answers each; same: as in `votes.outcomes`; name: as in
    `measures.metrics`."""
    judged = outcomes(groups, texts, same)
    return Evaluation(
        accuracy=accuracy(judged), reward=reward(judged), metrics=metrics(judged, name)
    )
