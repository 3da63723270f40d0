"""Evaluation of a run on held-out problems, with the weights that its engines serve."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .eval_sets import HELD_OUT
from .evaluation.measures import accuracy, metrics, reward
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


def evaluate(run: Run) -> Evaluation:
    """Samples answers to all sets of held-out problems with the weights that the engines serve,
    marks and logs them."""
    run.wait_published()
    step, shown = run.progress.step, run.config.tracking.samples
    found: dict[str, float] = {}
    show: dict[str, str] = {}
    rows: list[dict[str, str]] = []
    results: list[Evaluation] = []
    for problems in run.eval_sets:
        sampling = problems.sampled(run.sampling(0))
        groups = run.sample_groups(problems.prompts, problems.samples, sampling, problems.suite)
        texts = [[run.text(group.prompt, c) for c in group.completions] for group in groups]
        result = summarise(groups, texts, by_reward(problems.suite), problems.name)
        problems.suite.metrics()  # a training step's figures of the reward are to be its own
        found |= result.metrics
        results.append(result)
        show |= _line(problems.name or "held-out", result)
        first = groups[:shown]
        answers, questions = [t[0] for t in texts[:shown]], [run.problem(g.prompt) for g in first]
        rows += sample_rows(first, answers, questions)
    if not any(problems.name == HELD_OUT for problems in run.eval_sets):
        found["val-core/accuracy"] = float(np.mean([r.accuracy for r in results]))
        found["val-core/reward"] = float(np.mean([r.reward for r in results]))
    run.tracker.log(step, found, "eval", show)
    run.tracker.samples(step, rows)
    return Evaluation(
        accuracy=found["val-core/accuracy"], reward=found["val-core/reward"], metrics=found
    )


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
