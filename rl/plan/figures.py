"""The figures of a simulated run, and the split of the devices that trains the most tokens."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import numpy as np

from .scenario import Scenario, Usage
from .simulator import Simulation

Figures = dict[str, Any]


def figures(trace: Simulation) -> Figures:
    """Means over the steps after the warm-up; seconds, tokens, shares of 1."""
    scenario, counts = trace.scenario, trace.counts
    earlier, steps = trace.steps[: scenario.warmup], trace.steps[scenario.warmup :]
    begun, before = (earlier[-1].end, earlier[-1].usage) if earlier else (0.0, Usage())
    idle, held, slot_seconds, decoded = (
        last - first for first, last in zip(before, steps[-1].usage, strict=True)
    )
    seconds = steps[-1].end - begun
    worker_seconds = scenario.workers * seconds
    tokens = sum(step.answer_tokens for step in steps)
    lags: defaultdict[int, float] = defaultdict(float)
    for step in steps:
        for lag, count in step.lags.items():
            lags[lag] += count
    total = sum(lags.values())
    return {
        "step_s": seconds / len(steps),
        "tokens_per_s": tokens / seconds,
        "rollout_idle": idle / worker_seconds,
        "slots_used": slot_seconds / worker_seconds / scenario.slots,
        "learner_idle": sum(step.waited for step in steps) / seconds,
        "learner_busy": sum(step.trained for step in steps) / seconds,
        "sync_exposed_learner_s": sum(step.published for step in steps) / len(steps),
        "sync_exposed_rollout_s": held / scenario.workers / len(steps),
        "staleness": {str(lag): lags[lag] / total for lag in sorted(lags)},
        "staleness_mean": sum(lag * count for lag, count in lags.items()) / total,
        "staleness_max": max(lags),
        "evicted_groups": (counts.cut + counts.stale) / len(trace.steps),
        "wasted_tokens": max(0.0, 1 - tokens / decoded),
        "workers_lost": trace.lost,
        "groups_reissued": counts.reissued,
    }


def best_split(
    evaluate: Callable[[int], Figures],
    candidates: list[int],
    guess: int,
    expect: Callable[[int], None] = lambda trials: None,
) -> tuple[int, dict[int, Figures]]:
    """The candidate with the most tokens per second, and the figures of all that were tried.

    More learners first help (while the learners are the bottleneck), then hurt, so the search
    climbs from the guess with halving strides and tries some twenty of many hundred candidates.
    expect: is told before each round how many trials there will be in all, if the search has to
    climb no further.
    """
    tried: dict[int, Figures] = {}

    def rate(i: int) -> float:
        learners = candidates[i]
        if learners not in tried:
            tried[learners] = evaluate(learners)
        return float(tried[learners]["tokens_per_s"])

    here = candidates.index(guess)
    stride = max(1, len(candidates) // 8)
    while True:
        expect(min(len(candidates), max(1, len(tried)) + 2 * stride.bit_length()))
        near = [i for i in (here - stride, here + stride) if 0 <= i < len(candidates)]
        best = max([here, *near], key=rate)
        if best != here:
            here = best
        elif stride == 1:
            return candidates[here], dict(sorted(tried.items()))
        else:
            stride = max(1, stride // 2)


def imbalance(scenario: Scenario, context: float) -> float:
    """How far from 1 is what full engines decode over what the learners train in the same time.
    context: tokens that a running answer reads."""
    table = scenario.table
    step = table.seconds[-1, np.searchsorted(table.context, context, side="right") - 1]
    decoded = scenario.workers * scenario.slots / step
    return float(abs(decoded * scenario.learner_per_token - 1))
