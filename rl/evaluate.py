"""Evaluation of a run on held-out problems, with the weights that its engines serve."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..rollout.samples import Sampling
from .eval_sets import HELD_OUT, EvalSet
from .evaluation.measures import accuracy, metrics, reward
from .evaluation.sampling import sampled
from .evaluation.votes import Same, by_reward, outcomes
from .groups import Group
from .run import Run
from .watch.tracking import sample_rows


@dataclass(frozen=True, kw_only=True, slots=True)
class Evaluation:
    """What one evaluation found."""

    accuracy: float
    """mean@n over all problems: the fraction of answers that are correct."""
    reward: float
    """The mean score of the answers that have one."""
    metrics: dict[str, float]


async def evaluate(run: Run) -> Evaluation:
    """Samples answers to all sets of held-out problems with the weights that the engines serve,
    marks and logs them."""
    await run.weights.delivered()
    with run.tracker.doing("evaluating"):
        return await _evaluate(run)


async def _evaluate(run: Run) -> Evaluation:
    step, shown = run.progress.step, run.config.tracking.samples
    found: dict[str, float] = {}
    show: dict[str, str] = {}
    rows: list[dict[str, str]] = []
    results: list[Evaluation] = []
    kept: list[Group] = []
    for problems in run.eval_sets:
        sampling = problems.sampled(run.sampling(0))
        for budget, groups in (await _groups(run, problems, sampling)).items():
            texts = [[run.answers.text(g.prompt, c) for c in g.completions] for g in groups]
            name = problems.name if budget is None else f"{problems.name}@{budget}"
            same = by_reward(problems.suite)
            result = await asyncio.to_thread(summarise, groups, texts, same, name)
            found |= result.metrics
            show |= _line(name or "held-out", result)
            if budget is None:
                results.append(result)
                first = groups[:shown]
                answers = [t[0] for t in texts[:shown]]
                rows += sample_rows(first, answers, [run.answers.problem(g.prompt) for g in first])
                kept += groups
        problems.suite.metrics()  # a training step's figures of the reward are to be its own
    if not any(problems.name == HELD_OUT for problems in run.eval_sets):
        found["val-core/accuracy"] = float(np.mean([r.accuracy for r in results]))
        found["val-core/reward"] = float(np.mean([r.reward for r in results]))
    run.tracker.log(step, found, "eval", show)
    run.tracker.samples(step, rows)
    await asyncio.to_thread(run.tracker.keep, "eval", step, kept, run.answers)
    return Evaluation(
        accuracy=found["val-core/accuracy"], reward=found["val-core/reward"], metrics=found
    )


async def _groups(run: Run, problems: EvalSet, sampling: Sampling) -> dict[int | None, list[Group]]:
    """By thinking budget (None: without one) the graded answers, in the order of the problems;
    marked while others are still decoded."""
    found: dict[int | None, dict[int, Group]] = {}
    prompts = problems.prompts
    async for index, budget, completions in sampled(
        run.pool, prompts, problems.samples, sampling, problems.thinking
    ):
        found.setdefault(budget, {})[index] = await asyncio.to_thread(
            run.grade, prompts[index], completions, problems.suite, sampling.max_tokens
        )
    return {budget: [groups[i] for i in range(len(prompts))] for budget, groups in found.items()}


def _line(name: str, result: Evaluation) -> dict[str, str]:
    """What the console shows of a set."""
    line = {f"{name} accuracy": f"{result.accuracy:.1%}"}
    # a graded reward, of which "correct" says little
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
    found = outcomes(groups, texts, same)
    return Evaluation(accuracy=accuracy(found), reward=reward(found), metrics=metrics(found, name))
