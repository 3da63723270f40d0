"""The loop: sample groups with the newest weights, mark them, keep those with a signal, step, publish, log."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from ..rewards.suite import check_errors
from .algorithm.advantages import group_advantages
from .algorithm.losses import Objective
from .batch import make_batch
from .evaluate import evaluate
from .groups import Batch, Group
from .run import Run


def train_rl(run: Run) -> None:
    """RL steps from where the run stands to `schedule.steps`, on-policy: every token is sampled by the newest weights."""
    config, schedule = run.config, run.config.schedule
    objective = Objective.of(config.loss, config.kl, config.offpolicy, temperature=config.rollout.temperature)
    run.tracker.begin("rl", run.progress.step, schedule.steps)
    if run.progress.step == 0 and config.eval.size:
        run.progress = run.progress.advance(accuracy_start=evaluate(run).accuracy)

    while run.progress.step < schedule.steps:
        run.stop_if_asked()
        step, start = run.progress.step + 1, time.perf_counter()
        position = run.progress.position
        prompts = [run.source.train(i) for i in range(position, position + schedule.prompts_per_step)]
        groups = run.sample_groups(prompts, config.rollout.group_size, run.sampling(step))
        check_errors([v for group in groups for v in group.verdicts], config.reward.max_error_fraction)
        sampled = time.perf_counter()

        trained = with_advantages(run, [g for g in groups if g.has_signal or not config.filter.zero_variance])
        batch = make_batch(trained, config.loss.aggregation, keep_all=objective.needs_all_tokens)
        metrics: dict[str, float] = {}
        if batch is not None:
            metrics = run.learners.step(batch, objective)
            metrics |= run.publish()

        tokens = sum(len(c) for group in groups for c in group.completions)
        seconds = time.perf_counter() - start
        run.progress = run.progress.advance(
            step=step,
            position=position + len(prompts),
            tokens=run.progress.tokens + tokens,
            train_seconds=run.progress.train_seconds + seconds,
        )
        metrics |= group_metrics(groups, trained, batch) | run.suite.metrics()
        metrics |= {"timing_s/gen": sampled - start, "timing_s/step": seconds, "perf/throughput": tokens / seconds}
        show = {"reward": f"{metrics['critic/score/mean']:.3f}", "correct": f"{correct(groups):.1%}"}
        run.tracker.log(step, metrics, show=show | {"tokens/s": f"{tokens / seconds:,.0f}"})

        last = step == schedule.steps
        if config.eval.size and (last or (config.eval.every and step % config.eval.every == 0)):
            run.progress = run.progress.advance(accuracy_end=evaluate(run).accuracy)
        if last or (config.checkpoint.every and step % config.checkpoint.every == 0):
            run.save()


def with_advantages(run: Run, groups: Sequence[Group]) -> list[Group]:
    """The groups with the advantage of each completion, NaN scores (no verdict) at 0."""
    advantages = group_advantages([group.scores for group in groups], run.config.advantage)
    return [group.with_advantages(a) for group, a in zip(groups, advantages, strict=True)]


def correct(groups: Sequence[Group]) -> float:
    """The fraction of completions whose verdict is correct."""
    return float(np.mean([v.status == "correct" for group in groups for v in group.verdicts]))


def group_metrics(groups: Sequence[Group], trained: Sequence[Group], batch: Batch | None) -> dict[str, float]:
    """Figures of a step's samples; names are verl's where it has one."""
    scores = np.concatenate([group.scores for group in groups])
    scores = scores[~np.isnan(scores)]
    lengths = np.array([len(c) for group in groups for c in group.completions])
    cut = [c.finish_reason == "length" for group in groups for c in group.completions]
    found: dict[str, Any] = {
        "response_length/mean": lengths.mean(),
        "response_length/max": lengths.max(),
        "response_length/min": lengths.min(),
        "response_length/clip_ratio": np.mean(cut),
        "prompt_length/mean": np.mean([len(group.prompt.token_ids) for group in groups]),
        "training/accuracy": correct(groups),
        "training/filter_groups/dropped": len(groups) - len(trained),
        "training/filter_groups/solved_all": sum(not g.has_signal and bool((g.scores > 0).all()) for g in groups),
        "training/filter_groups/solved_none": sum(not g.has_signal and bool((g.scores <= 0).all()) for g in groups),
        "training/verifier_errors": sum(not v.trains for group in groups for v in group.verdicts),
        "perf/total_num_tokens": 0 if batch is None else batch.num_tokens,
    }
    for name, values in (("critic/score", scores), ("critic/advantages", advantages_of(trained))):
        if len(values):
            found |= {f"{name}/mean": values.mean(), f"{name}/max": values.max(), f"{name}/min": values.min()}
    return {name: float(value) for name, value in found.items()}


def advantages_of(groups: Sequence[Group]) -> np.ndarray[Any, np.dtype[np.floating[Any]]]:
    """All advantages in one array."""
    return np.concatenate([g.advantages for g in groups if g.advantages is not None] or [np.zeros(0)])
